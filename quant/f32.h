/* quant/f32.h - F32: weights as they are, float32.
 *
 * Product with a row of activations: lane[k % 8] = fmaf(w[k], x[k], lane[k % 8]) for ascending k,
 * then reduce8(lane). */
#ifndef MOE_QUANT_F32_H
#define MOE_QUANT_F32_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_float.h"

static void f32_dequantize(const void *blocks, float *dst, size_t n)
{
    memcpy(dst, blocks, n * sizeof *dst);
}

static void f32_quantize(const float *src, void *blocks, size_t n)
{
    memcpy(blocks, src, n * sizeof *src);
}

static float f32_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const float *x = (const float *)x_row;
    float lane[8] = {0};
    for (size_t k = 0; k < n_in; k++) {
        float w;
        memcpy(&w, row + 4 * k, 4);
        lane[k % 8] = fmaf(w, x[k], lane[k % 8]);
    }
    return reduce8(lane);
}

static void f32_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, f32_dot_c);
}

#if MOE_X86
static const x86_float_type f32_x86 = {4, 8, 1, 1};

MOE_AVX2_INLINE __m256 f32_load8_avx2(const uint8_t *w, size_t v)
{
    (void)v;
    return _mm256_loadu_ps((const float *)w);
}

MOE_AVX2 static void f32_gemv_avx2(const moe_mm *mm)
{
    x86_float_gemv(mm, f32_x86, f32_load8_avx2);
}

MOE_AVX2 static void f32_tokens_avx2(const x86_float_part *p)
{
    x86_float_tokens(p, f32_x86, f32_load8_avx2);
}

MOE_AVX2 static void f32_gemm_avx2(const moe_mm *mm)
{
    x86_float_gemm(mm, f32_x86, f32_tokens_avx2);
}

MOE_AVX512_INLINE __m512 f32_load_avx512(const uint8_t *a, const uint8_t *b, size_t v)
{
    (void)v;
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps((const float *)a)),
                              _mm256_loadu_ps((const float *)b), 1);
}

MOE_AVX512 static void f32_tokens_avx512(const x86_float_part *p)
{
    x86_512_float_tokens(p, f32_x86, f32_load_avx512);
}

MOE_AVX512 static void f32_gemm_avx512(const moe_mm *mm)
{
    x86_512_float_gemm(mm, f32_x86, f32_tokens_avx512);
}
#endif

#if MOE_ARM64
static const arm_float_type f32_arm = {4, 8, 1, 1};

MOE_INLINE float32x4x2_t f32_load8_arm(const uint8_t *w, size_t v)
{
    (void)v;
    const uint8x16_t low = vld1q_u8(w), high = vld1q_u8(w + 16);
    return (float32x4x2_t){{vreinterpretq_f32_u8(low), vreinterpretq_f32_u8(high)}};
}

static void f32_gemv_neon(const moe_mm *mm)
{
    arm_float_gemv(mm, f32_arm, f32_load8_arm);
}

static void f32_gemm_neon(const moe_mm *mm)
{
    arm_float_gemm(mm, f32_arm, f32_load8_arm);
}
#endif

static moe_kernels f32_select(uint32_t cpu)
{
    moe_kernels best = {f32_mm_c, f32_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){f32_gemv_avx2, f32_gemm_avx2};
    if (cpu & MOE_CPU_AVX512)
        best.gemm = f32_gemm_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = (moe_kernels){f32_gemv_neon, f32_gemm_neon};
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_f32 = {"F32", 0, 1, 4, MOE_ACT_F32, 32, f32_dequantize, f32_quantize,
                                    f32_select,
                                    .fields = {1, 1, 1, 1}};

#endif
