/* quant/q6_k.h - Q6_K: 256 weights in 210 bytes, 6.5625 bits per weight.
 *
 *     byte 0                         128            192        208      210
 *          | ql                      | qh           | scales   | d      |
 *          | 128 bytes               | 64 bytes     | int8[16] | f16    |
 *
 * 16 groups of 16 weights with 8-bit signed scales s[g]. Each half (128 weights) has 64 bytes of ql
 * and 32 of qh: with j = 0..3 and i = 0..31, weight 32 j + i of the half has
 *
 *     bits 0..3 in ql[32 (j mod 2) + i], the low nibble if j < 2
 *     bits 4..5 in qh[i], bits 2j and 2j + 1
 *
 *     weight = d s[g] (q - 32)             each product rounded to float32
 *
 * Times activations x = x_scale q_x, with an integer that is exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of (q - 32) q_x)
 *     acc = fma(x_scale d, int_sum, acc)   superblock after superblock; x_scale d is rounded */
#ifndef MOE_QUANT_Q6_K_H
#define MOE_QUANT_Q6_K_H

#include "arm_k.h"
#include "k.h"
#include "x86_512_k.h"

typedef struct q6_k_block {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint8_t d[2]; // f16
} q6_k_block;
_Static_assert(sizeof(q6_k_block) == 210, "as in the file");

static void q6_k_pack(q6_k_block *block, const k_linear *k)
{
    const uint64_t low = 0x0f0f0f0f0f0f0f0f, two = 0x0303030303030303;
    k_put_f16(block->d, k->d);
    memcpy(block->scales, k->scale, 16);
    for (int i = 0; i < 128; i += 8) {
        const uint8_t *q = k->q + i / 64 * 128 + i % 64;
        const uint64_t v = (quant_codes8(q) & low) | (quant_codes8(q + 64) & low) << 4;
        memcpy(block->ql + i, &v, 8);
    }
    for (int i = 0; i < 64; i += 8) {
        const uint8_t *q = k->q + i / 32 * 128 + i % 32;
        uint64_t v = 0;
        for (int j = 0; j < 4; j++)
            v |= (quant_codes8(q + 32 * j) >> 4 & two) << 2 * j;
        memcpy(block->qh + i, &v, 8);
    }
}

static void q6_k_quantize(const float *src, void *blocks, size_t n)
{
    q6_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        k_linear k;
        k_quantize_linear(src + b * K_LEN, -32, 31, -128, 127, &k);
        q6_k_pack(block, &k);
    }
}

MOE_INLINE int q6_k_code(const q6_k_block *block, int k)
{
    int low = block->ql[k / 128 * 64 + k % 64] >> k / 64 % 2 * 4 & 15;
    return (low | (block->qh[k / 128 * 32 + k % 32] >> k / 32 % 4 * 2 & 3) << 4) - 32;
}

static void q6_k_dequantize(const void *blocks, float *dst, size_t n)
{
    const q6_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++)
        for (int k = 0; k < K_LEN; k++) {
            float d = f32_of_f16(load_u16(block->d)) * (float)block->scales[k / 16];
            *dst++ = d * (float)q6_k_code(block, k);
        }
}

/* -- C: the specification -- */

static float q6_k_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const q6_k_block *block = (const q6_k_block *)w;
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block++) {
        const int8_t *q = x.q + b * K_LEN;
        int32_t int_sum = 0;
        for (int g = 0; g < 16; g++) {
            int32_t dot = 0;
            for (int k = 16 * g; k < 16 * g + 16; k++)
                dot += q6_k_code(block, k) * q[k];
            int_sum += block->scales[g] * dot;
        }
        acc = fmaf(x.scale[b] * f32_of_f16(load_u16(block->d)), (float)int_sum, acc);
    }
    return acc;
}

static void q6_k_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q6_k_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

/* The codes + 32 of 32 weights: `nibble` holds bits 0..3 in the low half of each byte, `high` bits
 * 4..5 where they belong. What stands elsewhere in them is cut off. */
MOE_AVX2_INLINE __m256i q6_k_join_avx2(__m256i nibble, __m256i high)
{
    return _mm256_or_si256(_mm256_and_si256(nibble, _mm256_set1_epi8(15)),
                           _mm256_and_si256(high, _mm256_set1_epi8(48)));
}

/* The codes j = 0..3 of the same i: ql[i], ql[32 + i], qh[i] of a half of the superblock. */
MOE_AVX2_INLINE void q6_k_codes_avx2(__m256i v0, __m256i v1, __m256i h, __m256i code[4])
{
    code[0] = q6_k_join_avx2(v0, _mm256_slli_epi16(h, 4));
    code[1] = q6_k_join_avx2(v1, _mm256_slli_epi16(h, 2));
    code[2] = q6_k_join_avx2(_mm256_srli_epi16(v0, 4), h);
    code[3] = q6_k_join_avx2(_mm256_srli_epi16(v1, 4), _mm256_srli_epi16(h, 2));
}

MOE_AVX2_INLINE void q6_k_half_avx2(const uint8_t *block, size_t half, __m256i code[4])
{
    const uint8_t *ql = block + 64 * half, *qh = block + offsetof(q6_k_block, qh) + 32 * half;
    q6_k_codes_avx2(x86_k_load(ql), x86_k_load(ql + 32), x86_k_load(qh), code);
}

MOE_AVX2_INLINE void q6_k_scales_avx2(const uint8_t *block, __m128i *scale, __m128i *min)
{
    *scale = *min = _mm_loadu_si128((const __m128i *)(block + offsetof(q6_k_block, scales)));
}

MOE_AVX2_INLINE void q6_k_dot8_avx2(const uint8_t *w, const x86_k_tokens *x, size_t b, size_t n_tok,
                                    x86_k_half_fn *half, x86_k_sums *out)
{
    static const x86_k_group16 f = {sizeof(q6_k_block), offsetof(q6_k_block, d), false, 5, false};
    x86_k_dot8_16(w, &f, q6_k_half_avx2, q6_k_scales_avx2, x, b, n_tok, half, out);
}

MOE_AVX2 static void q6_k_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    (void)n_block;
    for (size_t i = 0; i < 4; i++) { /* half i / 2, 16 bytes of each row */
        const size_t ql = offset + 64 * (i / 2) + 16 * (i % 2);
        const size_t qh = offset + offsetof(q6_k_block, qh) + 16 * i;
        __m256i v0[4], v1[4], h[4], code[4];
        x86_load_transposed(row, ql, v0);
        x86_load_transposed(row, ql + 32, v1);
        x86_load_transposed(row, qh, h);
        MOE_UNROLL
        for (int k = 0; k < 4; k++) {
            q6_k_codes_avx2(v0[k], v1[k], h[k], code);
            MOE_UNROLL
            for (int j = 0; j < 4; j++)
                tile->code[32 * (i / 2) + 4 * (i % 2) + 8 * (size_t)j + (size_t)k] = code[j];
        }
    }
    __m256i scale[4];
    x86_load_transposed(row, offset + offsetof(q6_k_block, scales), scale);
    x86_k_spread_pairs(scale, tile->scale);
    tile->d[0] = x86_f16x8(row, offset + offsetof(q6_k_block, d));
}

static const x86_format q6_k_x86 = {K_LEN, sizeof(q6_k_block), 32, q6_k_load_avx2};

X86_K_GEMV(q6_k, avx2, MOE_AVX2, X86_K_NO_MIN, x86_k_half16_avx2)
X86_K_GEMV(q6_k, avxvnni, MOE_AVX_VNNI, X86_K_NO_MIN, x86_k_half16_avxvnni)

static void q6_k_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &q6_k_x86, x86_k16_u6_avx2, q6_k_gemv_avx2, q6_k_gemv2_avx2);
}

static void q6_k_gemm_avxvnni(const moe_mm *mm)
{
    x86_k_gemm(mm, &q6_k_x86, x86_k16_avxvnni, q6_k_gemv_avxvnni, q6_k_gemv2_avxvnni);
}

/* -- AVX-512 VNNI -- */

MOE_VNNI512_INLINE __m512i q6_k_join_vnni512(__m512i nibble, __m512i high)
{
    return _mm512_or_si512(_mm512_and_si512(nibble, _mm512_set1_epi8(15)),
                           _mm512_and_si512(high, _mm512_set1_epi8(48)));
}

MOE_VNNI512 static void q6_k_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    for (size_t half = 0; half < 2; half++) {
        __m512i v0[8], v1[8], h[8], *code = tile->code + 32 * half;
        x86_512_load32(rows, offset + 64 * half, v0);
        x86_512_load32(rows, offset + 64 * half + 32, v1);
        x86_512_load32(rows, offset + offsetof(q6_k_block, qh) + 32 * half, h);
        MOE_UNROLL
        for (int k = 0; k < 8; k++) {
            code[k] = q6_k_join_vnni512(v0[k], _mm512_slli_epi16(h[k], 4));
            code[k + 8] = q6_k_join_vnni512(v1[k], _mm512_slli_epi16(h[k], 2));
            code[k + 16] = q6_k_join_vnni512(_mm512_srli_epi16(v0[k], 4), h[k]);
            code[k + 24] = q6_k_join_vnni512(_mm512_srli_epi16(v1[k], 4),
                                             _mm512_srli_epi16(h[k], 2));
        }
    }
    __m512i v[8]; /* the last 32 bytes: 14 of qh, scales, d */
    x86_512_load32(rows, offset + sizeof(q6_k_block) - 32, v);
    MOE_UNROLL
    for (size_t g = 0; g < 16; g++)
        tile->scale[g] = x86_512_signed_byte(v[(14 + g) / 4], (14 + g) % 4);
    tile->d[0] = x86_512_f16_at(v, 30);
}

static const x86_512_format q6_k_vnni512 = {K_LEN, sizeof(q6_k_block), 32,
                                             q6_k_load_vnni512, &x86_512_k16};

MOE_VNNI512_INLINE void q6_k_dot8_vnni512(const uint8_t *const row[8], size_t offset,
                                          x86_ahead next, const moe_q8 *x, size_t n_tok,
                                          x86_k_sums *out)
{
    const __m512i left = x86_512_halves(4, 2), right = x86_512_halves(0, 2);
    const __m512i groups[2] = {X86_512_GROUPS(0, 4, 1, 5, 2, 6, 3, 7),
                               X86_512_GROUPS(8, 12, 9, 13, 10, 14, 11, 15)};
    x86_512_order order[X86_512_FEWEST];
    __m512i dot[X86_512_FEWEST][8];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++)
            order[t].q[i] = x86_512_load64(x[t].q + 64 * i);
        x86_512_begin(&order[t], 32);
    }
    for (size_t r = 0; r < 8; r++) {
        x86_512_fetch(next, r, sizeof(q6_k_block));
        const q6_k_block *block = (const q6_k_block *)(row[r] + offset);
        const __m128i scales = _mm_loadu_si128((const __m128i *)block->scales);
        x86_512_row w;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            const __m512i v = x86_512_load64(block->ql + 64 * i);
            const __m512i h = x86_512_twice(block->qh + 32 * i);
            w.code[2 * i] = q6_k_join_vnni512(v, _mm512_sllv_epi64(h, left));
            w.code[2 * i + 1] = q6_k_join_vnni512(_mm512_srli_epi16(v, 4),
                                                  _mm512_srlv_epi64(h, right));
            w.scale[i] = x86_512_spread16(scales, groups[i]);
        }
        x86_512_multiply(&w, order, n_tok, r, dot);
    }
    const __m256 d = x86_f16x8(row, offset + offsetof(q6_k_block, d));
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        out[t].dot = x86_512_sum8(dot[t]);
        out[t].d = d;
    }
}

X86_512_KERNELS(q6_k, X86_K_NO_MIN)

#endif

/* -- NEON -- */
#if MOE_ARM64

MOE_INLINE void q6_k_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)
{
    *scale = *min = vld1q_s8(((const q6_k_block *)block)->scales);
}

MOE_INLINE void q6_k_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])
{
    const q6_k_block *w = (const q6_k_block *)block;
    const uint8x16_t nibble = vdupq_n_u8(15), top = vdupq_n_u8(48);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint8x16_t v = vld1q_u8(w->ql + 64 * half + 16 * i);
        const uint8x16_t u = vld1q_u8(w->ql + 64 * half + 16 * i + 32);
        const uint8x16_t h = vld1q_u8(w->qh + 32 * half + 16 * i);
        const uint8x16_t c0 = vorrq_u8(vandq_u8(v, nibble), vandq_u8(vshlq_n_u8(h, 4), top));
        const uint8x16_t c1 = vorrq_u8(vandq_u8(u, nibble), vandq_u8(vshlq_n_u8(h, 2), top));
        const uint8x16_t c2 = vorrq_u8(vshrq_n_u8(v, 4), vandq_u8(h, top));
        const uint8x16_t c3 = vorrq_u8(vshrq_n_u8(u, 4), vandq_u8(vshrq_n_u8(h, 2), top));
        code[i] = vreinterpretq_s8_u8(c0);
        code[i + 2] = vreinterpretq_s8_u8(c1);
        code[i + 4] = vreinterpretq_s8_u8(c2);
        code[i + 6] = vreinterpretq_s8_u8(c3);
    }
    arm_subtract(code, 8, 32);
}

static const arm_k_format q6_k_arm = {sizeof(q6_k_block), offsetof(q6_k_block, d), 16, false,
                                    q6_k_scales_arm, q6_k_codes_arm, NULL};
ARM_KERNELS(q6_k, arm_k)

#endif

static moe_kernels q6_k_select(uint32_t cpu)
{
    moe_kernels best = {q6_k_mm_c, q6_k_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q6_k_gemv_avx2, q6_k_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best = (moe_kernels){q6_k_gemv_avxvnni, q6_k_gemm_avxvnni};
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q6_k_gemv_vnni512, q6_k_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q6_k_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q6_k = {
    .name = "Q6_K",
    .id = 14,
    .block_len = K_LEN,
    .block_bytes = sizeof(q6_k_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(q6_k_block) / K_LEN,
    .dequantize = q6_k_dequantize,
    .quantize = q6_k_quantize,
    .select = q6_k_select,
    .fields = {128, 64, 16, 1, 1},
};

#endif
