/* quant/q3_k.h - Q3_K: 256 weights in 110 bytes, 3.4375 bits per weight.
 *
 *     byte 0            32                    96           108    110
 *          | hmask      | qs                  | scales     | d    |
 *          | 32 bytes   | 64 bytes            | 12 bytes   | f16  |
 *
 * 16 groups of 16 weights with 6-bit scales s[g], stored as s[g] + 32: the low 4 bits are in
 * scales[g mod 8], in the low nibble if g < 8; the high 2 bits are in scales[8 + g mod 4], bits
 * 2 (g / 4) and the next. Each half (128 weights) has 32 bytes of qs: weight 32 j + i of the half,
 * j = 0..3 and i = 0..31, has its low two bits in bits 2j and 2j + 1 of qs[i] and its highest in
 * bit 4 half + j of hmask[i].
 *
 *     weight = d s[g] (q - 4)              each product rounded to float32
 *
 * Times activations x = x_scale q_x, with an integer that is exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of (q - 4) q_x)
 *     acc = fma(x_scale d, int_sum, acc)   superblock after superblock; x_scale d is rounded */
#ifndef MOE_QUANT_Q3_K_H
#define MOE_QUANT_Q3_K_H

#include "arm_k.h"
#include "k.h"
#include "x86_512_k.h"

typedef struct q3_k_block {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint8_t d[2]; // f16
} q3_k_block;
_Static_assert(sizeof(q3_k_block) == 110, "as in the file");

static void q3_k_pack(q3_k_block *block, const k_linear *k)
{
    const uint64_t two = 0x0303030303030303, bit = 0x0101010101010101;
    memset(block->scales, 0, sizeof block->scales);
    k_put_f16(block->d, k->d);
    for (int g = 0; g < 16; g++) {
        uint8_t *low = &block->scales[g % 8], *high = &block->scales[8 + g % 4];
        *low = (uint8_t)(*low | ((k->scale[g] + 32) & 15) << g / 8 * 4);
        *high = (uint8_t)(*high | (k->scale[g] + 32) >> 4 << g / 4 * 2);
    }
    for (int i = 0; i < 64; i += 8) {
        const uint8_t *q = k->q + i / 32 * 128 + i % 32;
        uint64_t v = 0;
        for (int j = 0; j < 4; j++)
            v |= (quant_codes8(q + 32 * j) & two) << 2 * j;
        memcpy(block->qs + i, &v, 8);
    }
    for (int i = 0; i < 32; i += 8) {
        uint64_t v = 0;
        for (int g = 0; g < 8; g++)
            v |= (quant_codes8(k->q + 32 * g + i) >> 2 & bit) << g;
        memcpy(block->hmask + i, &v, 8);
    }
}

static void q3_k_quantize(const float *src, void *blocks, size_t n)
{
    q3_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        k_linear k;
        k_quantize_linear(src + b * K_LEN, -4, 3, -32, 31, &k);
        q3_k_pack(block, &k);
    }
}

MOE_INLINE int q3_k_scale(const q3_k_block *block, int g)
{
    int low = block->scales[g % 8] >> g / 8 * 4 & 15;
    return (low | (block->scales[8 + g % 4] >> g / 4 * 2 & 3) << 4) - 32;
}

MOE_INLINE int q3_k_code(const q3_k_block *block, int k)
{
    int low = block->qs[k / 128 * 32 + k % 32] >> k / 32 % 4 * 2 & 3;
    return (low | (block->hmask[k % 32] >> k / 32 & 1) << 2) - 4;
}

static void q3_k_dequantize(const void *blocks, float *dst, size_t n)
{
    const q3_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++)
        for (int k = 0; k < K_LEN; k++) {
            float d = f32_of_f16(load_u16(block->d)) * (float)q3_k_scale(block, k / 16);
            *dst++ = d * (float)q3_k_code(block, k);
        }
}

/* -- C: the specification -- */

static float q3_k_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const q3_k_block *block = (const q3_k_block *)w;
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block++) {
        const int8_t *q = x.q + b * K_LEN;
        int32_t int_sum = 0;
        for (int g = 0; g < 16; g++) {
            int32_t dot = 0;
            for (int k = 16 * g; k < 16 * g + 16; k++)
                dot += q3_k_code(block, k) * q[k];
            int_sum += q3_k_scale(block, g) * dot;
        }
        acc = fmaf(x.scale[b] * f32_of_f16(load_u16(block->d)), (float)int_sum, acc);
    }
    return acc;
}

static void q3_k_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q3_k_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

/* The codes + 4 of 32 weights: `low` holds bits 0 and 1, `high` bit 2 where it belongs. */
MOE_AVX2_INLINE __m256i q3_k_join_avx2(__m256i low, __m256i high)
{
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)),
                           _mm256_and_si256(high, _mm256_set1_epi8(4)));
}

/* The codes j = 0..3 of the same bytes. `high` holds the half's first bit of hmask as bit 2. */
MOE_AVX2_INLINE void q3_k_codes_avx2(__m256i v, __m256i high, __m256i code[4])
{
    code[0] = q3_k_join_avx2(v, high);
    code[1] = q3_k_join_avx2(_mm256_srli_epi16(v, 2), _mm256_srli_epi16(high, 1));
    code[2] = q3_k_join_avx2(_mm256_srli_epi16(v, 4), _mm256_srli_epi16(high, 2));
    code[3] = q3_k_join_avx2(_mm256_srli_epi16(v, 6), _mm256_srli_epi16(high, 3));
}

/* The 16 scales as signed bytes. */
MOE_AVX2_INLINE __m128i q3_k_scales_avx2(const q3_k_block *block)
{
    const uint64_t nibbles = 0x0f0f0f0f0f0f0f0f;
    uint64_t low;
    int32_t high;
    memcpy(&low, block->scales, 8);
    memcpy(&high, block->scales + 8, 4);
    __m128i l = _mm_set_epi64x((long long)(low >> 4 & nibbles), (long long)(low & nibbles));
    __m128i h = _mm_srlv_epi32(_mm_set1_epi32(high), _mm_setr_epi32(0, 2, 4, 6));
    h = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi8(3)), 4);
    return _mm_sub_epi8(_mm_or_si128(l, h), _mm_set1_epi8(32));
}

/* Codes + 4 times 1, 4, 16, 16: hardly a shift is needed. */
MOE_AVX2_INLINE void q3_k_half_avx2(const uint8_t *block, size_t half, __m256i code[4])
{
    const __m256i v = x86_k_load(block + offsetof(q3_k_block, qs) + 32 * half);
    __m256i h = x86_k_load(block + offsetof(q3_k_block, hmask));
    if (half == 0)
        h = _mm256_slli_epi16(h, 4);
    const __m256i h1 = _mm256_srli_epi16(h, 1);
    code[0] = q3_k_join_avx2(v, _mm256_srli_epi16(h, 2));
    code[1] = _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi8(12)),
                              _mm256_and_si256(h1, _mm256_set1_epi8(16)));
    code[2] = _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi8(48)),
                              _mm256_and_si256(h, _mm256_set1_epi8(64)));
    code[3] = _mm256_or_si256(
        _mm256_and_si256(_mm256_srli_epi16(v, 2), _mm256_set1_epi8(48)),
        _mm256_and_si256(h1, _mm256_set1_epi8(64)));
}

MOE_AVX2_INLINE void q3_k_both_avx2(const uint8_t *block, __m128i *scale, __m128i *min)
{
    *scale = *min = q3_k_scales_avx2((const q3_k_block *)block);
}

MOE_AVX2_INLINE void q3_k_dot8_avx2(const uint8_t *w, const x86_k_tokens *x, size_t b, size_t n_tok,
                                    x86_k_half_fn *half, x86_k_sums *out)
{
    static const x86_k_group16 f = {sizeof(q3_k_block), offsetof(q3_k_block, d), false, 2, true};
    x86_k_dot8_16(w, &f, q3_k_half_avx2, q3_k_both_avx2, x, b, n_tok, half, out);
}

MOE_AVX2 static void q3_k_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    (void)n_block;
    for (size_t i = 0; i < 2; i++) { /* 16 bytes of each half of each row */
        const size_t qs = offset + offsetof(q3_k_block, qs) + 16 * i;
        __m256i h[4], v0[4], v1[4], code[8];
        x86_load_transposed(row, offset + 16 * i, h);
        x86_load_transposed(row, qs, v0);
        x86_load_transposed(row, qs + 32, v1);
        MOE_UNROLL
        for (int k = 0; k < 4; k++) {
            q3_k_codes_avx2(v0[k], _mm256_slli_epi16(h[k], 2), code);
            q3_k_codes_avx2(v1[k], _mm256_srli_epi16(h[k], 2), code + 4);
            MOE_UNROLL
            for (int j = 0; j < 8; j++)
                tile->code[4 * i + 8 * (size_t)j + (size_t)k] = code[j];
        }
    }
    uint8_t packed[8][16];
    const uint8_t *from[8];
    __m256i scale[4];
    MOE_UNROLL
    for (int r = 0; r < 8; r++) {
        __m128i s = q3_k_scales_avx2((const q3_k_block *)(row[r] + offset));
        _mm_storeu_si128((__m128i *)packed[r], s);
        from[r] = packed[r];
    }
    x86_load_transposed(from, 0, scale);
    x86_k_spread_pairs(scale, tile->scale);
    tile->d[0] = x86_f16x8(row, offset + offsetof(q3_k_block, d));
}

static const x86_format q3_k_x86 = {K_LEN, sizeof(q3_k_block), 4, q3_k_load_avx2};

X86_K_GEMV(q3_k, avx2, MOE_AVX2, X86_K_NO_MIN, x86_k_half16_avx2)

static void q3_k_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &q3_k_x86, x86_k16_u6_avx2, q3_k_gemv_avx2, q3_k_gemv2_avx2);
}

static void q3_k_gemm_avxvnni(const moe_mm *mm)
{
    x86_k_gemm(mm, &q3_k_x86, x86_k16_avxvnni, q3_k_gemv_avx2, q3_k_gemv2_avx2);
}

/* -- AVX-512 VNNI -- */

/* 4 of the scales s, as bytes: 4 bits are in `low`, 2 in `high`, each in its lowest bits. */
MOE_VNNI512_INLINE __m512i q3_k_scales_vnni512(__m512i low, __m512i high)
{
    __m512i v = _mm512_and_si512(low, _mm512_set1_epi8(15));
    v = _mm512_or_si512(v, _mm512_and_si512(_mm512_slli_epi16(high, 4), _mm512_set1_epi8(48)));
    return _mm512_sub_epi8(v, _mm512_set1_epi8(32));
}

/* What a group's codes q, pairs in 16 bits, become: 128 - s (q - 4), which is 0 to 252. (+ would be
 * 4 to 256.) The arithmetic is of 16 bits: what the products of a pair carry over cancels out. */
MOE_VNNI512_INLINE void q3_k_scaled_vnni512(__m512i s, __m512i code[4])
{
    const __m512i zero = _mm512_add_epi16(_mm512_mullo_epi16(s, _mm512_set1_epi16(4 * 257)),
                                          _mm512_set1_epi16((short)0x8080));
    MOE_UNROLL
    for (size_t k = 0; k < 4; k++)
        code[k] = _mm512_sub_epi16(zero, _mm512_mullo_epi16(code[k], s));
}

/* The codes hold the scales, negative, and so d is, too. */
MOE_VNNI512 static void q3_k_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m512i two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
    __m512i high[8], last[4]; /* the last 16 bytes: 2 of qs, scales, d */
    x86_512_load16(rows, offset + sizeof(q3_k_block) - 16, last);
    const __m512i low0 = x86_512_word(last, 2), low1 = x86_512_word(last, 6);
    const __m512i top = x86_512_word(last, 10);
    const __m512i scale[4] = {
        q3_k_scales_vnni512(low0, top),
        q3_k_scales_vnni512(low1, _mm512_srli_epi16(top, 2)),
        q3_k_scales_vnni512(_mm512_srli_epi16(low0, 4), _mm512_srli_epi16(top, 4)),
        q3_k_scales_vnni512(_mm512_srli_epi16(low1, 4), _mm512_srli_epi16(top, 6))};
    x86_512_load32(rows, offset, high);
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        __m512i v[8], *code = tile->code + 32 * half;
        x86_512_load32(rows, offset + offsetof(q3_k_block, qs) + 32 * half, v);
        MOE_UNROLL
        for (int k = 0; k < 8; k++) {
            __m512i h = half ? _mm512_srli_epi16(high[k], 2) : _mm512_slli_epi16(high[k], 2);
            MOE_UNROLL
            for (int j = 0; j < 4; j++) {
                code[8 * j + k] = _mm512_or_si512(_mm512_and_si512(v[k], two),
                                                  _mm512_and_si512(h, four));
                v[k] = _mm512_srli_epi16(v[k], 2);
                h = _mm512_srli_epi16(h, 1);
            }
        }
        MOE_UNROLL
        for (size_t g = 0; g < 8; g++)
            q3_k_scaled_vnni512(x86_512_signed_twice(scale[2 * half + g / 4], g % 4), code + 4 * g);
    }
    tile->d[0] = _mm512_xor_ps(x86_512_f16_at(last, 14), _mm512_set1_ps(-0.0f));
}

static const x86_512_format q3_k_vnni512 = {K_LEN, sizeof(q3_k_block), 128,
                                             q3_k_load_vnni512, &x86_512_k256};

MOE_VNNI512_INLINE void q3_k_dot8_vnni512(const uint8_t *const row[8], size_t offset,
                                          x86_ahead next, const moe_q8 *x, size_t n_tok,
                                          x86_k_sums *out)
{
    const __m512i low2 = _mm512_set1_epi8(3), third = _mm512_set1_epi8(4);
    const __m512i turn = x86_512_halves(2, 62); /* bit 0, or bit 4, of hmask to bit 2 */
    const __m512i groups[2] = {X86_512_GROUPS(0, 2, 1, 3, 8, 10, 9, 11),
                               X86_512_GROUPS(4, 6, 5, 7, 12, 14, 13, 15)};
    x86_512_order order[X86_512_FEWEST];
    __m512i dot[X86_512_FEWEST][8];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        order[t] = x86_512_crumb_order(x[t].q, 4);
    for (size_t r = 0; r < 8; r++) {
        x86_512_fetch(next, r, sizeof(q3_k_block));
        const q3_k_block *block = (const q3_k_block *)(row[r] + offset);
        const __m128i scales = q3_k_scales_avx2(block);
        const __m512i v = x86_512_load64(block->qs);
        const __m512i h = _mm512_rolv_epi64(x86_512_twice(block->hmask), turn);
        x86_512_row w = {.scale = {x86_512_spread16(scales, groups[0]),
                                   x86_512_spread16(scales, groups[1])}};
        MOE_UNROLL
        for (unsigned j = 0; j < 4; j++) {
            const __m512i low = _mm512_and_si512(_mm512_srli_epi16(v, 2 * j), low2);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(h, j), third);
            w.code[j] = _mm512_or_si512(low, high);
        }
        x86_512_multiply(&w, order, n_tok, r, dot);
    }
    const __m256 d = x86_f16x8(row, offset + offsetof(q3_k_block, d));
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        out[t].dot = x86_512_sum8(dot[t]);
        out[t].d = d;
    }
}

X86_512_KERNELS(q3_k, X86_K_NO_MIN)

#endif

/* -- NEON -- */
#if MOE_ARM64

MOE_INLINE void q3_k_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)
{
    const uint64_t nibbles = 0x0f0f0f0f0f0f0f0f;
    const int32x4_t shift = {0, -2, -4, -6};
    uint64_t low;
    uint32_t high;
    memcpy(&low, ((const q3_k_block *)block)->scales, 8);
    memcpy(&high, ((const q3_k_block *)block)->scales + 8, 4);
    const uint8x16_t l = vcombine_u8(vcreate_u8(low & nibbles), vcreate_u8(low >> 4 & nibbles));
    uint8x16_t h = vreinterpretq_u8_u32(vshlq_u32(vdupq_n_u32(high), shift));
    h = vshlq_n_u8(vandq_u8(h, vdupq_n_u8(3)), 4);
    *scale = *min = vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(l, h)), vdupq_n_s8(32));
}

MOE_INLINE void q3_k_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])
{
    const q3_k_block *w = (const q3_k_block *)block;
    const uint8x16_t low = vdupq_n_u8(3), top = vdupq_n_u8(4);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint8x16_t v = vld1q_u8(w->qs + 32 * half + 16 * i);
        /* bits 0..3: the third bits of the half's j = 0..3 */
        const uint8x16_t h =
            vshlq_u8(vld1q_u8(w->hmask + 16 * i), vdupq_n_s8((int8_t)(-4 * (int)half)));
        const uint8x16_t c0 = vorrq_u8(vandq_u8(v, low), vandq_u8(vshlq_n_u8(h, 2), top));
        const uint8x16_t c1 =
            vorrq_u8(vandq_u8(vshrq_n_u8(v, 2), low), vandq_u8(vshlq_n_u8(h, 1), top));
        const uint8x16_t c2 = vorrq_u8(vandq_u8(vshrq_n_u8(v, 4), low), vandq_u8(h, top));
        const uint8x16_t c3 = vorrq_u8(vshrq_n_u8(v, 6), vandq_u8(vshrq_n_u8(h, 1), top));
        code[i] = vreinterpretq_s8_u8(c0);
        code[i + 2] = vreinterpretq_s8_u8(c1);
        code[i + 4] = vreinterpretq_s8_u8(c2);
        code[i + 6] = vreinterpretq_s8_u8(c3);
    }
    arm_subtract(code, 8, 4);
}

static const arm_k_format q3_k_arm = {sizeof(q3_k_block), offsetof(q3_k_block, d), 16, false,
                                    q3_k_scales_arm, q3_k_codes_arm, NULL};
ARM_KERNELS(q3_k, arm_k)

#endif

static moe_kernels q3_k_select(uint32_t cpu)
{
    moe_kernels best = {q3_k_mm_c, q3_k_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q3_k_gemv_avx2, q3_k_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = q3_k_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q3_k_gemv_vnni512, q3_k_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q3_k_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q3_k = {
    .name = "Q3_K",
    .id = 11,
    .block_len = K_LEN,
    .block_bytes = sizeof(q3_k_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(q3_k_block) / K_LEN,
    .dequantize = q3_k_dequantize,
    .quantize = q3_k_quantize,
    .select = q3_k_select,
    .fields = {32, 64, 12, 1, 1},
};

#endif
