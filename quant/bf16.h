/* quant/bf16.h - BF16: bfloat16, the upper half of a float32.
 *
 * Product with a row of activations, which are rounded to BF16 too and come multiplied by 2^64
 * (quant.h): 8 lanes take 16 elements at a time, two each, the odd one first,
 *
 *     lane[i] = fmaf(w[16b + 2i + 1], x[16b + 2i + 1], lane[i])
 *     lane[i] = fmaf(w[16b + 2i], x[16b + 2i], lane[i])        for ascending b
 *
 * and the result is reduce8(lane) / 2^64. Subnormal weights count as 0. That is what vdpbf16ps
 * (AVX512-BF16) does with two vectors of BF16; other processors multiply the same numbers as
 * floats, widened by shifts and masks.
 *
 * The instruction also takes sums below 2^-126 for 0, whatever the processor's mode, which a fused
 * multiply-add does not. There are none: an activation that is not 0 is at least 2^-50, 2^14 with
 * its factor, hence a multiple of 2^7, a weight of 2^-133. So all products, all sums of them and
 * these sums rounded are multiples of 2^-126. A sum that is 0 is +0 for the same reason: lanes
 * begin with +0, and no negative number is rounded to 0. */
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

/* Reads the wide form of activations. */
static float bf16_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const float *x = (const float *)x_row;
    float lane[8] = {0};
    for (size_t place = 0; place < align_up(n_in, 16); place++) {
        const size_t k = act_bf16_element(place);
        if (k >= n_in)
            continue;
        const uint16_t w = load_u16(row + 2 * k);
        lane[place % 8] = fmaf(w & 0x7f80 ? f32_of_bf16(w) : 0, x[place], lane[place % 8]);
    }
    return reduce8(lane) / ACT_BF16_SCALE;
}

static void bf16_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, bf16_dot_c);
}

#if MOE_X86
static const x86_float_type bf16_x86 = {2, 16, 2, 1 / ACT_BF16_SCALE};
static const x86_float_type bf16_x86_narrow = {2, 16, 1, 1 / ACT_BF16_SCALE};

/* The 8 odd (v = 0) or the 8 even ones of 16 weights. */
MOE_AVX2_INLINE __m256 bf16_load8_avx2(const uint8_t *w, size_t v)
{
    const __m256i raw = _mm256_loadu_si256((const __m256i *)w);
    const __m256i exponent = _mm256_and_si256(raw, _mm256_set1_epi16(0x7f80));
    const __m256i normal = _mm256_sign_epi16(raw, exponent); /* 0 where the exponent is 0 */
    return _mm256_castsi256_ps(
        v == 0 ? _mm256_and_si256(normal, _mm256_set1_epi32((int)0xffff0000))
               : _mm256_slli_epi32(normal, 16));
}

MOE_AVX2 static void bf16_gemv_avx2(const moe_mm *mm)
{
    x86_float_gemv(mm, bf16_x86, bf16_load8_avx2);
}

MOE_AVX2 static void bf16_tokens_avx2(const x86_float_part *p)
{
    x86_float_tokens(p, bf16_x86, bf16_load8_avx2);
}

MOE_AVX2 static void bf16_gemm_avx2(const moe_mm *mm)
{
    x86_float_gemm(mm, bf16_x86, bf16_tokens_avx2);
}

/* 16 weights at a and 16 at b as they are. */
MOE_AVX512_INLINE __m512i bf16_raw_avx512(const uint8_t *a, const uint8_t *b)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a)),
                              _mm256_loadu_si256((const __m256i *)b), 1);
}

MOE_AVX512_INLINE __m512 bf16_load_avx512(const uint8_t *a, const uint8_t *b, size_t v)
{
    const __m512i raw = bf16_raw_avx512(a, b);
    const __m512i normal = _mm512_maskz_mov_epi16(
        _mm512_test_epi16_mask(raw, _mm512_set1_epi16(0x7f80)), raw);
    return _mm512_castsi512_ps(
        v == 0 ? _mm512_and_si512(normal, _mm512_set1_epi32((int)0xffff0000))
               : _mm512_slli_epi32(normal, 16));
}

MOE_AVX512 static void bf16_tokens_avx512(const x86_float_part *p)
{
    x86_512_float_tokens(p, bf16_x86, bf16_load_avx512);
}

MOE_AVX512 static void bf16_gemm_avx512(const moe_mm *mm)
{
    x86_512_float_gemm(mm, bf16_x86, bf16_tokens_avx512);
}

/* ------------------------------------------------------------------------------ AVX512-BF16 -- */

MOE_BF16_512_INLINE __m256 bf16_multiply8_512(__m256 acc, const uint8_t *w, __m256i x)
{
    return _mm256_dpbf16_ps(acc, (__m256bh)_mm256_loadu_si256((const __m256i *)w), (__m256bh)x);
}

/* 8 rows at once, as x86_float_gemv(). */
MOE_BF16_512 static void bf16_gemv_avx512_bf16(const moe_mm *mm)
{
    const size_t n_unit = mm->n_in / 16, n_last = mm->n_in % 16;
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8], *x = mm->x;
        x86_rows(mm, r, row);
        const x86_ahead next = x86_ahead_rows(mm, r, 8);
        __m256 acc[8];
        MOE_UNROLL
        for (size_t i = 0; i < 8; i++)
            acc[i] = _mm256_setzero_ps();
        for (size_t at = 0; at < 32 * n_unit; at += 32) {
            const __m256i xk = _mm256_load_si256((const __m256i *)(x + at));
            x86_fetch_ahead(next, 8 * at, 8 * 32);
            MOE_UNROLL
            for (size_t i = 0; i < 8; i++)
                acc[i] = bf16_multiply8_512(acc[i], row[i] + at, xk);
        }
        for (size_t i = 0; i < MOE_MIN(mm->n_row - r, 8); i++) {
            if (n_last) {
                uint8_t copy[32];
                x86_float_last(row[i] + 32 * n_unit, n_last, bf16_x86_narrow, copy);
                acc[i] = bf16_multiply8_512(
                    acc[i], copy, _mm256_load_si256((const __m256i *)(x + 32 * n_unit)));
            }
            mm->y[r + i] = x86_reduce8(acc[i]) / ACT_BF16_SCALE;
        }
    }
}

MOE_AVX512_INLINE __m512 bf16_load_narrow_512(const uint8_t *a, const uint8_t *b, size_t v)
{
    (void)v;
    return _mm512_castsi512_ps(bf16_raw_avx512(a, b));
}

MOE_BF16_512_INLINE __m512 bf16_multiply_512(__m512 w, __m512 x, __m512 acc)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
}

MOE_BF16_512 static void bf16_rest_avx512_bf16(const x86_float_part *p, size_t t)
{
    x86_512_float_steps(p, t, bf16_multiply_512);
}

MOE_BF16_512 static void bf16_tokens_avx512_bf16(const x86_float_part *p)
{
    const size_t t =
        x86_512_float_first(p, bf16_x86_narrow, bf16_load_narrow_512, bf16_multiply_512);
    if (t < p->n_tok)
        bf16_rest_avx512_bf16(p, t);
}

MOE_BF16_512 static void bf16_gemm_avx512_bf16(const moe_mm *mm)
{
    x86_512_float_gemm(mm, bf16_x86_narrow, bf16_tokens_avx512_bf16);
}
#endif

#if MOE_ARM64
static const arm_float_type bf16_arm = {2, 16, 2, 1 / ACT_BF16_SCALE};

/* The 8 odd (v = 0) or the 8 even ones of 16 weights. */
MOE_INLINE float32x4x2_t bf16_load8_arm(const uint8_t *w, size_t v)
{
    float32x4x2_t out;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint16x8_t raw = vreinterpretq_u16_u8(vld1q_u8(w + 16 * i));
        const uint16x8_t normal = vandq_u16(raw, vtstq_u16(raw, vdupq_n_u16(0x7f80)));
        const uint32x4_t pair = vreinterpretq_u32_u16(normal);
        out.val[i] = vreinterpretq_f32_u32(v == 0 ? vandq_u32(pair, vdupq_n_u32(0xffff0000))
                                                  : vshlq_n_u32(pair, 16));
    }
    return out;
}

static void bf16_gemv_neon(const moe_mm *mm)
{
    arm_float_gemv(mm, bf16_arm, bf16_load8_arm);
}

static void bf16_gemm_neon(const moe_mm *mm)
{
    arm_float_gemm(mm, bf16_arm, bf16_load8_arm);
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
    if (cpu & MOE_CPU_AVX512_BF16)
        best = (moe_kernels){bf16_gemv_avx512_bf16, bf16_gemm_avx512_bf16};
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = (moe_kernels){bf16_gemv_neon, bf16_gemm_neon};
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_bf16 = {"BF16", 30, 1, 2, MOE_ACT_BF16, 16,
                                     bf16_dequantize, bf16_quantize, bf16_select,
                                     .fields = {1, 1}};

#endif
