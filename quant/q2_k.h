/* quant/q2_k.h - Q2_K: 256 weights in 84 bytes, 2.625 bits per weight.
 *
 *     byte 0            16                             80     82     84
 *          | scales     | qs                           | d    | dmin |
 *          | 16 bytes   | 64 bytes                     | f16  | f16  |
 *
 * 16 groups of 16 weights. scales[g] has the scale s[g] in its low and the minimum m[g] in its high
 * nibble. Each half (128 weights) has 32 bytes of qs: weight 32 j + i of the half, j = 0..3 and
 * i = 0..31, is in bits 2j and 2j + 1 of qs[i].
 *
 *     weight = d s[g] q - dmin m[g]        each product and the difference rounded to float32
 *
 * (The products are exact: 11 + 4 + 2 bits fit into 24. A compiler that fuses changes nothing.)
 *
 * Times activations x = x_scale q_x, with integers that are exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of q q_x)
 *     min_sum = sum over g of m[g] (sum over i of q_x)
 *     acc = fma(x_scale, fma(-dmin, min_sum, d int_sum), acc)     superblock after superblock */
#ifndef MOE_QUANT_Q2_K_H
#define MOE_QUANT_Q2_K_H

#include "arm_k.h"
#include "k.h"
#include "x86_512_k.h"

typedef struct q2_k_block {
    uint8_t scales[16]; // scale | min << 4
    uint8_t qs[64];
    uint8_t d[2], dmin[2]; // f16
} q2_k_block;
_Static_assert(sizeof(q2_k_block) == 84, "as in the file");

static void q2_k_pack(q2_k_block *block, const k_affine *k)
{
    k_put_f16(block->d, k->d);
    k_put_f16(block->dmin, k->dmin);
    for (int g = 0; g < 16; g++)
        block->scales[g] = (uint8_t)(k->scale[g] | k->min[g] << 4);
    for (int i = 0; i < 64; i += 8) {
        const uint8_t *q = k->q + i / 32 * 128 + i % 32;
        const uint64_t v = quant_codes8(q) | quant_codes8(q + 32) << 2 | quant_codes8(q + 64) << 4 |
                           quant_codes8(q + 96) << 6;
        memcpy(block->qs + i, &v, 8);
    }
}

static void q2_k_quantize(const float *src, void *blocks, size_t n)
{
    q2_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        k_affine k;
        k_quantize_affine(src + b * K_LEN, 16, 3, 15, &k);
        q2_k_pack(block, &k);
    }
}

MOE_INLINE int q2_k_code(const q2_k_block *block, int k)
{
    return block->qs[k / 128 * 32 + k % 32] >> k / 32 % 4 * 2 & 3;
}

static void q2_k_dequantize(const void *blocks, float *dst, size_t n)
{
    const q2_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++)
        for (int k = 0; k < K_LEN; k++) {
            float d = f32_of_f16(load_u16(block->d)) * (float)(block->scales[k / 16] & 15);
            float m = f32_of_f16(load_u16(block->dmin)) * (float)(block->scales[k / 16] >> 4);
            *dst++ = d * (float)q2_k_code(block, k) - m;
        }
}

/* -- C: the specification -- */

static float q2_k_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const q2_k_block *block = (const q2_k_block *)w;
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block++) {
        const int8_t *q = x.q + b * K_LEN;
        int32_t int_sum = 0, min_sum = 0;
        for (int g = 0; g < 16; g++) {
            int32_t dot = 0;
            for (int k = 16 * g; k < 16 * g + 16; k++)
                dot += q2_k_code(block, k) * q[k];
            int_sum += (block->scales[g] & 15) * dot;
            min_sum += (block->scales[g] >> 4) * x.sum[16 * b + (size_t)g];
        }
        float d = f32_of_f16(load_u16(block->d)), dmin = f32_of_f16(load_u16(block->dmin));
        acc = fmaf(x.scale[b], fmaf(-dmin, (float)min_sum, d * (float)int_sum), acc);
    }
    return acc;
}

static void q2_k_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q2_k_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

/* The codes j = 0..3 of the same bytes. */
MOE_AVX2_INLINE void q2_k_codes_avx2(__m256i v, __m256i code[4])
{
    const __m256i mask = _mm256_set1_epi8(3);
    code[0] = _mm256_and_si256(v, mask);
    code[1] = _mm256_and_si256(_mm256_srli_epi16(v, 2), mask);
    code[2] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
    code[3] = _mm256_and_si256(_mm256_srli_epi16(v, 6), mask);
}

/* The 16 scales and the 16 minima, as bytes. */
MOE_AVX2_INLINE void q2_k_scales_avx2(const q2_k_block *block, __m128i *scale, __m128i *min)
{
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i v = _mm_loadu_si128((const __m128i *)block->scales);
    *scale = _mm_and_si128(v, mask);
    *min = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
}

/* Codes times 1, 4, 16, 16: hardly a shift is needed. */
MOE_AVX2_INLINE void q2_k_half_avx2(const uint8_t *block, size_t half, __m256i code[4])
{
    const __m256i v = x86_k_load(block + offsetof(q2_k_block, qs) + 32 * half);
    code[0] = _mm256_and_si256(v, _mm256_set1_epi8(3));
    code[1] = _mm256_and_si256(v, _mm256_set1_epi8(12));
    code[2] = _mm256_and_si256(v, _mm256_set1_epi8(48));
    code[3] = _mm256_and_si256(_mm256_srli_epi16(v, 2), _mm256_set1_epi8(48));
}

MOE_AVX2_INLINE void q2_k_both_avx2(const uint8_t *block, __m128i *scale, __m128i *min)
{
    q2_k_scales_avx2((const q2_k_block *)block, scale, min);
}

MOE_AVX2_INLINE void q2_k_dot8_avx2(const uint8_t *w, const x86_k_tokens *x, size_t b, size_t n_tok,
                                    x86_k_half_fn *half, x86_k_sums *out)
{
    static const x86_k_group16 f = {sizeof(q2_k_block), offsetof(q2_k_block, d), true, 0, true};
    x86_k_dot8_16(w, &f, q2_k_half_avx2, q2_k_both_avx2, x, b, n_tok, half, out);
}

MOE_AVX2 static void q2_k_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    (void)n_block;
    for (size_t i = 0; i < 4; i++) { /* half i / 2, 16 bytes of each row */
        __m256i v[4], code[4];
        x86_load_transposed(row, offset + offsetof(q2_k_block, qs) + 16 * i, v);
        MOE_UNROLL
        for (int k = 0; k < 4; k++) {
            q2_k_codes_avx2(v[k], code);
            MOE_UNROLL
            for (int j = 0; j < 4; j++)
                tile->code[32 * (i / 2) + 4 * (i % 2) + 8 * (size_t)j + (size_t)k] = code[j];
        }
    }
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i scale[4], min[4];
    x86_load_transposed(row, offset, scale);
    MOE_UNROLL
    for (int i = 0; i < 4; i++) {
        min[i] = _mm256_and_si256(_mm256_srli_epi16(scale[i], 4), mask);
        scale[i] = _mm256_and_si256(scale[i], mask);
    }
    x86_k_spread_pairs(scale, tile->scale);
    x86_k_spread_pairs(min, tile->min);
    tile->d[0] = x86_f16x8(row, offset + offsetof(q2_k_block, d));
    tile->m[0] = x86_f16x8(row, offset + offsetof(q2_k_block, dmin));
}

static const x86_format q2_k_x86 = {K_LEN, sizeof(q2_k_block), 0, q2_k_load_avx2};

X86_K_GEMV(q2_k, avx2, MOE_AVX2, X86_K_FLOAT_MIN, x86_k_half16_avx2)
X86_K_GEMV(q2_k, avxvnni, MOE_AVX_VNNI, X86_K_FLOAT_MIN, x86_k_half16_avxvnni)

static void q2_k_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &q2_k_x86, x86_k16_u4_min_avx2, q2_k_gemv_avx2, q2_k_gemv2_avx2);
}

static void q2_k_gemm_avxvnni(const moe_mm *mm)
{
    x86_k_gemm(mm, &q2_k_x86, x86_k16_min_avxvnni, q2_k_gemv_avxvnni, q2_k_gemv2_avxvnni);
}

/* -- AVX-512 VNNI -- */

/* The codes times their scales: up to 3 * 15, so that two bytes are multiplied at once. */
MOE_VNNI512 static void q2_k_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m512i low2 = _mm512_set1_epi8(3), low4 = _mm512_set1_epi8(15);
    __m512i last[4], scale[4]; /* of 4 groups each */
    x86_512_load16(rows, offset, scale);
    MOE_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512i min = _mm512_and_si512(_mm512_srli_epi16(scale[i], 4), low4);
        tile->min[2 * i] = x86_512_byte_pair(min, 0);
        tile->min[2 * i + 1] = x86_512_byte_pair(min, 1);
        scale[i] = _mm512_and_si512(scale[i], low4);
    }
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        __m512i v[8], *code = tile->code + 32 * half;
        x86_512_load32(rows, offset + offsetof(q2_k_block, qs) + 32 * half, v);
        MOE_UNROLL
        for (size_t j = 0; j < 4; j++) {
            const size_t g = 8 * half + 2 * j;
            const __m512i even = x86_512_byte_twice(scale[g / 4], g % 4);
            const __m512i odd = x86_512_byte_twice(scale[g / 4], g % 4 + 1);
            MOE_UNROLL
            for (size_t k = 0; k < 8; k++) {
                const __m512i q = _mm512_and_si512(v[k], low2);
                code[8 * j + k] = _mm512_mullo_epi16(q, k < 4 ? even : odd);
                v[k] = _mm512_srli_epi16(v[k], 2);
            }
        }
    }
    x86_512_load16(rows, offset + sizeof(q2_k_block) - 16, last);
    tile->d[0] = x86_512_f16_at(last, 12);
    tile->m[0] = x86_512_f16_at(last, 14);
}

static const x86_512_format q2_k_vnni512 = {K_LEN, sizeof(q2_k_block), 0,
                                             q2_k_load_vnni512, &x86_512_k256_min};

/* The sum over the groups of minima times activations. */
MOE_VNNI512_INLINE __m256i q2_k_min_sum_vnni512(const uint8_t *const row[8], size_t offset,
                                                const int16_t *sum)
{
    __m256i part[8];
    MOE_UNROLL
    for (size_t r = 0; r < 8; r++) {
        __m128i scales, mins;
        q2_k_scales_avx2((const q2_k_block *)(row[r] + offset), &scales, &mins);
        part[r] = _mm256_madd_epi16(_mm256_cvtepi8_epi16(mins), x86_k_load(sum));
    }
    return x86_sum8_i32(part);
}

MOE_VNNI512_INLINE void q2_k_dot8_vnni512(const uint8_t *const row[8], size_t offset,
                                          x86_ahead next, const moe_q8 *x, size_t n_tok,
                                          x86_k_sums *out)
{
    const __m512i groups[2] = {X86_512_GROUPS(0, 2, 1, 3, 8, 10, 9, 11),
                               X86_512_GROUPS(4, 6, 5, 7, 12, 14, 13, 15)};
    x86_512_order order[X86_512_FEWEST];
    __m512i dot[X86_512_FEWEST][8];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        order[t] = x86_512_crumb_order(x[t].q, 0);
    for (size_t r = 0; r < 8; r++) {
        x86_512_fetch(next, r, sizeof(q2_k_block));
        const q2_k_block *block = (const q2_k_block *)(row[r] + offset);
        const __m512i v = x86_512_load64(block->qs);
        __m128i scales, mins;
        q2_k_scales_avx2(block, &scales, &mins);
        x86_512_row w = {.scale = {x86_512_spread16(scales, groups[0]),
                                   x86_512_spread16(scales, groups[1])}};
        MOE_UNROLL
        for (unsigned j = 0; j < 4; j++)
            w.code[j] = _mm512_and_si512(_mm512_srli_epi16(v, 2 * j), _mm512_set1_epi8(3));
        x86_512_multiply(&w, order, n_tok, r, dot);
    }
    const __m256 d = x86_f16x8(row, offset + offsetof(q2_k_block, d));
    const __m256 dmin = x86_f16x8(row, offset + offsetof(q2_k_block, dmin));
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        out[t] = (x86_k_sums){x86_512_sum8(dot[t]), q2_k_min_sum_vnni512(row, offset, x[t].sum), d,
                              dmin};
}

X86_512_KERNELS(q2_k, X86_K_FLOAT_MIN)

#endif

/* -- NEON -- */
#if MOE_ARM64

MOE_INLINE void q2_k_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)
{
    const uint8x16_t v = vld1q_u8(((const q2_k_block *)block)->scales);
    *scale = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    *min = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
}

MOE_INLINE void q2_k_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])
{
    const uint8_t *qs = ((const q2_k_block *)block)->qs + 32 * half;
    const uint8x16_t mask = vdupq_n_u8(3);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint8x16_t v = vld1q_u8(qs + 16 * i);
        code[i] = vreinterpretq_s8_u8(vandq_u8(v, mask));
        code[i + 2] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 2), mask));
        code[i + 4] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 4), mask));
        code[i + 6] = vreinterpretq_s8_u8(vshrq_n_u8(v, 6));
    }
}

static const arm_k_format q2_k_arm = {sizeof(q2_k_block), offsetof(q2_k_block, d), 16, true,
                                    q2_k_scales_arm, q2_k_codes_arm, NULL};
ARM_KERNELS(q2_k, arm_k)

#endif

static moe_kernels q2_k_select(uint32_t cpu)
{
    moe_kernels best = {q2_k_mm_c, q2_k_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q2_k_gemv_avx2, q2_k_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best = (moe_kernels){q2_k_gemv_avxvnni, q2_k_gemm_avxvnni};
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q2_k_gemv_vnni512, q2_k_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q2_k_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q2_k = {
    .name = "Q2_K",
    .id = 10,
    .block_len = K_LEN,
    .block_bytes = sizeof(q2_k_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(q2_k_block) / K_LEN,
    .dequantize = q2_k_dequantize,
    .quantize = q2_k_quantize,
    .select = q2_k_select,
    .fields = {16, 64, 1, 1, 1, 1},
};

#endif
