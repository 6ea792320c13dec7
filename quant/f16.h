/* quant/f16.h - F16: IEEE 754 binary16.
 *
 * Product with a row of activations, the weights widened to float32 (exactly):
 * lane[k % 8] = fmaf(w[k], x[k], lane[k % 8]) for ascending k, then reduce8(lane). */
#ifndef MOE_QUANT_F16_H
#define MOE_QUANT_F16_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_float.h"

static void f16_dequantize(const void *blocks, float *dst, size_t n)
{
    const uint8_t *w = blocks;
    for (size_t k = 0; k < n; k++)
        dst[k] = f32_of_f16(load_u16(w + 2 * k));
}

static void f16_quantize(const float *src, void *blocks, size_t n)
{
    uint8_t *w = blocks;
    for (size_t k = 0; k < n; k++) {
        const uint16_t u = f16_of_f32(src[k]);
        memcpy(w + 2 * k, &u, 2);
    }
}

static float f16_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const float *x = (const float *)x_row;
    float lane[8] = {0};
    for (size_t k = 0; k < n_in; k++)
        lane[k % 8] = fmaf(f32_of_f16(load_u16(row + 2 * k)), x[k], lane[k % 8]);
    return reduce8(lane);
}

static void f16_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, f16_dot_c);
}

#if MOE_X86
static const x86_float_type f16_x86 = {2, 8, 1, 1};

MOE_AVX2_INLINE __m256 f16_load8_avx2(const uint8_t *w, size_t v)
{
    (void)v;
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w));
}

MOE_AVX2 static void f16_gemv_avx2(const moe_mm *mm)
{
    x86_float_gemv(mm, f16_x86, f16_load8_avx2);
}

MOE_AVX2 static void f16_tokens_avx2(const x86_float_part *p)
{
    x86_float_tokens(p, f16_x86, f16_load8_avx2);
}

MOE_AVX2 static void f16_gemm_avx2(const moe_mm *mm)
{
    x86_float_gemm(mm, f16_x86, f16_tokens_avx2);
}

MOE_AVX512_INLINE __m512 f16_load_avx512(const uint8_t *a, const uint8_t *b, size_t v)
{
    (void)v;
    return _mm512_cvtph_ps(x86_load_pair(a, b));
}

MOE_AVX512 static void f16_tokens_avx512(const x86_float_part *p)
{
    x86_512_float_tokens(p, f16_x86, f16_load_avx512);
}

MOE_AVX512 static void f16_gemm_avx512(const moe_mm *mm)
{
    x86_512_float_gemm(mm, f16_x86, f16_tokens_avx512);
}
#endif

#if MOE_ARM64
static const arm_float_type f16_arm = {2, 8, 1, 1};

MOE_INLINE float32x4x2_t f16_load8_arm(const uint8_t *w, size_t v)
{
    (void)v;
    const uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(w));
    return (float32x4x2_t){{arm_f32_of_f16(vget_low_u16(h)), arm_f32_of_f16(vget_high_u16(h))}};
}

static void f16_gemv_neon(const moe_mm *mm)
{
    arm_float_gemv(mm, f16_arm, f16_load8_arm);
}

static void f16_gemm_neon(const moe_mm *mm)
{
    arm_float_gemm(mm, f16_arm, f16_load8_arm);
}
#endif

static moe_kernels f16_select(uint32_t cpu)
{
    moe_kernels best = {f16_mm_c, f16_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){f16_gemv_avx2, f16_gemm_avx2};
    if (cpu & MOE_CPU_AVX512)
        best.gemm = f16_gemm_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = (moe_kernels){f16_gemv_neon, f16_gemm_neon};
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_f16 = {"F16", 1, 1, 2, MOE_ACT_F32, 16, f16_dequantize, f16_quantize,
                                    f16_select,
                                    .fields = {1, 1}};

#endif
