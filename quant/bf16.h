/* quant/bf16.h - BF16: bfloat16, the upper half of a float32.
 *
 * Product with a row of activations, the weights widened to float32 (exactly):
 * lane[k % 8] = fmaf(w[k], x[k], lane[k % 8]) for ascending k, then reduce8(lane). */
#ifndef MOE_QUANT_BF16_H
#define MOE_QUANT_BF16_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_float.h"

static void bf16_dequantize(const void *blocks, float *dst, size_t n)
{
    const uint8_t *w = blocks;
    for (size_t k = 0; k < n; k++)
        dst[k] = f32_of_bf16(load_u16(w + 2 * k));
}

static void bf16_quantize(const float *src, void *blocks, size_t n)
{
    uint8_t *w = blocks;
    for (size_t k = 0; k < n; k++) {
        const uint16_t u = bf16_of_f32(src[k]);
        memcpy(w + 2 * k, &u, 2);
    }
}

static float bf16_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const float *x = (const float *)x_row;
    float lane[8] = {0};
    for (size_t k = 0; k < n_in; k++)
        lane[k % 8] = fmaf(f32_of_bf16(load_u16(row + 2 * k)), x[k], lane[k % 8]);
    return reduce8(lane);
}

static void bf16_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, bf16_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE __m256 bf16_load8_avx2(const uint8_t *w)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)w);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

MOE_AVX2 static void bf16_gemv_avx2(const moe_mm *mm)
{
    x86_float_gemv(mm, 2, bf16_load8_avx2);
}

MOE_AVX2 static void bf16_tokens_avx2(const x86_float_part *p)
{
    x86_float_tokens(p, 2, bf16_load8_avx2);
}

MOE_AVX2 static void bf16_gemm_avx2(const moe_mm *mm)
{
    x86_float_gemm(mm, 2, bf16_tokens_avx2);
}

MOE_AVX512_INLINE __m512 bf16_load_avx512(const uint8_t *a, const uint8_t *b)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(x86_load_pair(a, b)), 16));
}

MOE_AVX512 static void bf16_tokens_avx512(const x86_float_part *p)
{
    x86_512_float_tokens(p, 2, bf16_load_avx512);
}

MOE_AVX512 static void bf16_gemm_avx512(const moe_mm *mm)
{
    x86_512_float_gemm(mm, 2, bf16_tokens_avx512);
}
#endif

#if MOE_ARM64
MOE_INLINE float32x4x2_t bf16_load8_arm(const uint8_t *w)
{
    const uint16x8_t v = vreinterpretq_u16_u8(vld1q_u8(w)), zero = vdupq_n_u16(0);
    return (float32x4x2_t){{vreinterpretq_f32_u16(vzip1q_u16(zero, v)),
                            vreinterpretq_f32_u16(vzip2q_u16(zero, v))}};
}

static void bf16_gemv_neon(const moe_mm *mm)
{
    arm_float_gemv(mm, 2, bf16_load8_arm);
}

static void bf16_gemm_neon(const moe_mm *mm)
{
    arm_float_gemm(mm, 2, bf16_load8_arm);
}
#endif

static moe_kernels bf16_select(uint32_t cpu)
{
    moe_kernels best = {bf16_mm_c, bf16_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){bf16_gemv_avx2, bf16_gemm_avx2};
    if (cpu & MOE_CPU_AVX512)
        best.gemm = bf16_gemm_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = (moe_kernels){bf16_gemv_neon, bf16_gemm_neon};
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_bf16 = {"BF16", 30, 1, 2, MOE_ACT_F32, 16,
                                     bf16_dequantize, bf16_quantize, bf16_select,
                                     .fields = {1, 1}};

#endif
