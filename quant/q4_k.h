/* quant/q4_k.h - Q4_K: 256 weights in 144 bytes, 4.5 bits per weight.
 *
 *     byte 0      2      4            16                              144
 *          | d    | dmin | scales     | qs                            |
 *          | f16  | f16  | 12 bytes   | 128 bytes                     |
 *
 * 8 groups of 32 weights. Group g has a 6-bit scale s[g] and a 6-bit minimum m[g], packed as k.h
 * says. qs holds groups in pairs: byte 32 p + i has weight i of group 2p in its low and of group
 * 2p + 1 in its high nibble.
 *
 *     weight = d s[g] q - dmin m[g]        each product and the difference rounded to float32
 *
 * (The products are exact: 11 + 6 + 4 bits fit into 24. A compiler that fuses them changes nothing.)
 *
 * Times activations x = x_scale q_x, with integers that are exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of q q_x)
 *     min_sum = sum over g of m[g] (sum over i of q_x)
 *     acc = fma(x_scale, fma(-dmin, min_sum, d int_sum), acc)     superblock after superblock */
#ifndef MOE_QUANT_Q4_K_H
#define MOE_QUANT_Q4_K_H

#include "k.h"
#include "x86_k.h"

typedef struct q4_k_block {
    uint8_t d[2], dmin[2]; // f16
    uint8_t scales[12];    // 8 scales, 8 minima
    uint8_t qs[128];
} q4_k_block;
_Static_assert(sizeof(q4_k_block) == 144, "as in the file");

static void q4_k_quantize(const float *src, void *blocks, size_t n)
{
    q4_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        k_affine k;
        k_quantize_affine(src + b * K_LEN, 8, 15, 63, &k);
        k_put_f16(block->d, k.d);
        k_put_f16(block->dmin, k.dmin);
        k_put_scales_mins(block->scales, k.scale, k.min);
        for (int i = 0; i < 128; i++) {
            const uint8_t *q = k.q + i / 32 * 64 + i % 32;
            block->qs[i] = (uint8_t)(q[0] | q[32] << 4);
        }
    }
}

MOE_INLINE int q4_k_code(const q4_k_block *block, int k)
{
    return block->qs[k / 64 * 32 + k % 32] >> k / 32 % 2 * 4 & 15;
}

static void q4_k_dequantize(const void *blocks, float *dst, size_t n)
{
    const q4_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        for (int k = 0; k < K_LEN; k++) {
            int scale, min;
            k_get_scale_min(block->scales, k / 32, &scale, &min);
            float d = f32_of_f16(load_u16(block->d)) * (float)scale;
            float m = f32_of_f16(load_u16(block->dmin)) * (float)min;
            *dst++ = d * (float)q4_k_code(block, k) - m;
        }
    }
}

/* -- C: the specification -- */

static float q4_k_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const q4_k_block *block = (const q4_k_block *)w;
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block++) {
        const int8_t *q = x.q + b * K_LEN;
        const int16_t *sum = x.sum + b * 16;
        int32_t int_sum = 0, min_sum = 0;
        for (int g = 0; g < 8; g++) {
            int scale, min;
            k_get_scale_min(block->scales, g, &scale, &min);
            int32_t dot = 0;
            for (int k = 32 * g; k < 32 * g + 32; k++)
                dot += q4_k_code(block, k) * q[k];
            int_sum += scale * dot;
            min_sum += min * (sum[2 * g] + sum[2 * g + 1]);
        }
        float d = f32_of_f16(load_u16(block->d)), dmin = f32_of_f16(load_u16(block->dmin));
        acc = fmaf(x.scale[b], fmaf(-dmin, (float)min_sum, d * (float)int_sum), acc);
    }
    return acc;
}

static void q4_k_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q4_k_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

/* Groups 2p and 2p + 1. */
MOE_AVX2_INLINE __m256i q4_k_dot64_avx2(__m256i acc, const uint8_t *qs, const int8_t *q,
                                        __m256i scale0, __m256i scale1)
{
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i v = x86_k_load(qs);
    acc = x86_k_madd(acc, _mm256_and_si256(v, mask), q, scale0);
    return x86_k_madd(acc, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), q + 32, scale1);
}

MOE_AVX2_INLINE void q4_k_dot_avx2(const uint8_t *w, const int8_t *q, const int16_t *sum,
                                   __m256i *dot, __m256i *min)
{
    const x86_k_scales s = x86_k_scale_min(w);
    const uint8_t *qs = w + offsetof(q4_k_block, qs);
    __m256i acc = _mm256_setzero_si256();
    acc = q4_k_dot64_avx2(acc, qs, q, _mm256_shuffle_epi32(s.low, 0x00),
                          _mm256_shuffle_epi32(s.low, 0x55));
    acc = q4_k_dot64_avx2(acc, qs + 32, q + 64, _mm256_shuffle_epi32(s.low, 0xaa),
                          _mm256_shuffle_epi32(s.low, 0xff));
    acc = q4_k_dot64_avx2(acc, qs + 64, q + 128, _mm256_shuffle_epi32(s.high, 0x00),
                          _mm256_shuffle_epi32(s.high, 0x55));
    acc = q4_k_dot64_avx2(acc, qs + 96, q + 192, _mm256_shuffle_epi32(s.high, 0xaa),
                          _mm256_shuffle_epi32(s.high, 0xff));
    *dot = acc;
    *min = _mm256_madd_epi16(s.min, x86_k_load(sum));
}

MOE_AVX2_INLINE void q4_k_unpack_avx2(const uint8_t *w, x86_k_row *row)
{
    const __m256i mask = _mm256_set1_epi8(15);
    const x86_k_scales s = x86_k_scale_min(w);
    for (int p = 0; p < 4; p++) {
        __m256i v = x86_k_load(w + offsetof(q4_k_block, qs) + 32 * p);
        x86_k_store(row->code + 64 * p, _mm256_and_si256(v, mask));
        x86_k_store(row->code + 64 * p + 32, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
    }
    x86_k_store(row->scale, _mm256_blend_epi32(s.low, s.high, 0xf0));
    x86_k_store(row->min, s.min);
}

/* 8 * 2 * 127 * 15 = 30480 */
static const x86_k_format q4_k_avx2 = {sizeof(q4_k_block), 0,  X86_K_FLOAT_MIN, 32, 8,
                                       q4_k_dot_avx2,      q4_k_unpack_avx2};

MOE_AVX2 static void q4_k_gemv_avx2(const moe_mm *mm)
{
    x86_k_gemv(mm, &q4_k_avx2);
}

MOE_AVX2 static void q4_k_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &q4_k_avx2, q4_k_gemv_avx2);
}

#endif

static moe_kernels q4_k_select(uint32_t cpu)
{
    moe_kernels best = {q4_k_mm_c, q4_k_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q4_k_gemv_avx2, q4_k_gemm_avx2};
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q4_k = {
    .name = "Q4_K",
    .id = 12,
    .block_len = K_LEN,
    .block_bytes = sizeof(q4_k_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(q4_k_block) / K_LEN,
    .dequantize = q4_k_dequantize,
    .quantize = q4_k_quantize,
    .select = q4_k_select,
};

#endif
