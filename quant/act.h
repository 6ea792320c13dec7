/* quant/act.h - activations on their way into a matrix: rows of floats become the packed rows that
 * quant.h describes.
 *
 * For each group of 32 or 256 elements, with amax the largest magnitude:
 *
 *     scale = amax / 127        q = x * (127 / amax), rounded to nearest even
 *
 * A group whose amax is below 2^-119 becomes zero (scale 0): 127 / amax would overflow near the end
 * of float's range, and such activations add nothing to any sum. A group that holds an infinity or
 * a NaN gets the scale NaN and q 0, so that every result it takes part in is visibly NaN. All bytes
 * of a row are written, the padding too: equal activations give equal bytes.
 *
 * Rows for weights in BF16 are rounded to nearest even instead, a NaN stays one. */
#ifndef MOE_QUANT_ACT_H
#define MOE_QUANT_ACT_H

#include "arm.h"
#include "quant.h"
#include "x86_512.h"

/* scale and 127 / amax of a group whose largest magnitude has the bits `amax`; false if all q are
 * 0. As integers, magnitudes compare like floats, and infinities and NaN are the largest. */
MOE_INLINE bool act_scale(uint32_t amax, float *scale, float *inverse)
{
    if (amax >= 0x7f800000) {
        *scale = f32_of_bits(0x7fc00000);
        return false;
    }
    if (amax < (127 - 119) << 23) {
        *scale = 0;
        return false;
    }
    *scale = f32_of_bits(amax) / 127;
    *inverse = 127 / f32_of_bits(amax);
    return true;
}

/* Packs one group of n (32 or 256) elements. */
typedef void act_pack_fn(const float *x, size_t n, float *scale, int16_t *sum, int8_t *q);

static void act_pack_c(const float *x, size_t n, float *scale, int16_t *sum, int8_t *q)
{
    uint32_t amax = 0;
    for (size_t i = 0; i < n; i++)
        amax = MOE_MAX(amax, bits_of_f32(x[i]) & 0x7fffffff);
    float inverse = 0;
    const bool nonzero = act_scale(amax, scale, &inverse);
    for (size_t i = 0; i < n; i++)
        q[i] = nonzero ? (int8_t)lrintf(x[i] * inverse) : 0;
    for (size_t i = 0; i < n; i += 16) {
        int s = 0;
        for (size_t j = 0; j < 16; j++)
            s += q[i + j];
        sum[i / 16] = (int16_t)s;
    }
}

#if MOE_X86
MOE_AVX2 static void act_pack_avx2(const float *x, size_t n, float *scale, int16_t *sum, int8_t *q)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), one = _mm256_set1_epi16(1);
    __m256i max = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 8)
        max = _mm256_max_epi32(
            max, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i)), magnitude));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    m = _mm_max_epi32(m, _mm_unpackhi_epi64(m, m));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 1));
    float inverse;
    if (!act_scale((uint32_t)_mm_cvtsi128_si32(m), scale, &inverse)) {
        memset(q, 0, n);
        memset(sum, 0, n / 16 * sizeof *sum);
        return;
    }
    const __m256 factor = _mm256_set1_ps(inverse);
    for (size_t i = 0; i < n; i += 32) {
        __m256i v[4];
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++)
            v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
        /* Packing works within halves: the 4-byte groups come out as 0 2 4 6 1 3 5 7. */
        __m256i a = _mm256_packs_epi32(v[0], v[1]), b = _mm256_packs_epi32(v[2], v[3]);
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b),
                                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(q + i), bytes);
        __m256i s = _mm256_hadd_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
        __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        s4 = _mm_hadd_epi32(s4, s4);
        int32_t pair = _mm_cvtsi128_si32(_mm_packs_epi32(s4, s4));
        memcpy(sum + i / 16, &pair, sizeof pair);
    }
}
#endif

#if MOE_ARM64
static void act_pack_neon(const float *x, size_t n, float *scale, int16_t *sum, int8_t *q)
{
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t max = vdupq_n_u32(0);
    for (size_t i = 0; i < n; i += 4)
        max = vmaxq_u32(max, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), magnitude));
    float inverse;
    if (!act_scale(vmaxvq_u32(max), scale, &inverse)) {
        memset(q, 0, n);
        memset(sum, 0, n / 16 * sizeof *sum);
        return;
    }
    for (size_t i = 0; i < n; i += 16) {
        int32x4_t v[4];
        MOE_UNROLL
        for (size_t j = 0; j < 4; j++)
            v[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4 * j), inverse));
        const int16x8_t a = vuzp1q_s16(vreinterpretq_s16_s32(v[0]), vreinterpretq_s16_s32(v[1]));
        const int16x8_t b = vuzp1q_s16(vreinterpretq_s16_s32(v[2]), vreinterpretq_s16_s32(v[3]));
        const int8x16_t bytes = vuzp1q_s8(vreinterpretq_s8_s16(a), vreinterpretq_s8_s16(b));
        vst1q_s8(q + i, bytes);
        sum[i / 16] = vaddlvq_s8(bytes);
    }
}
#endif

static act_pack_fn *act_pack_select(uint32_t cpu)
{
    act_pack_fn *best = act_pack_c;
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = act_pack_avx2;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = act_pack_neon;
#endif
    (void)cpu;
    return best;
}

/* ---------------------------------------------------------------------------------- BF16 -- */

/* Packs n activations, a multiple of 32. */
typedef void act_bf16_fn(const float *x, size_t n, void *row);

/* What the rows hold of one activation, as a float. */
MOE_INLINE float act_bf16(float x)
{
    return fabsf(x) < ACT_BF16_LEAST ? 0 : f32_of_bf16(bf16_of_f32(x * ACT_BF16_SCALE));
}

static void act_bf16_c(const float *x, size_t n, void *row)
{
    float *wide = row;
    for (size_t i = 0; i < n; i++)
        wide[i] = act_bf16(x[act_bf16_element(i)]);
}

#if MOE_X86
MOE_AVX2_INLINE __m256 act_bf16x8_avx2(const float *x)
{
    const __m256 v = _mm256_loadu_ps(x);
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    const __m256 keep = _mm256_cmp_ps(size, _mm256_set1_ps(ACT_BF16_LEAST), _CMP_NLT_UQ);
    const __m256 scaled = _mm256_and_ps(_mm256_mul_ps(v, _mm256_set1_ps(ACT_BF16_SCALE)), keep);
    const __m256i u = _mm256_castps_si256(scaled);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256 rounded = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(nan),
                                            _mm256_cmp_ps(scaled, scaled, _CMP_UNORD_Q));
    return _mm256_and_ps(rounded, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000)));
}

MOE_AVX2 static void act_bf16_avx2(const float *x, size_t n, void *row)
{
    float *wide = row;
    for (size_t i = 0; i < n; i += 16) {
        const __m256 a = act_bf16x8_avx2(x + i), b = act_bf16x8_avx2(x + i + 8);
        const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
        const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
        _mm256_store_ps(wide + i, _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8)));
        _mm256_store_ps(wide + i + 8, _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)));
    }
}

MOE_AVX512_INLINE __m512 act_bf16x16_avx512(const float *x)
{
    const __m512 v = _mm512_loadu_ps(x), least = _mm512_set1_ps(ACT_BF16_LEAST);
    const __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(v), least, _CMP_NLT_UQ);
    return _mm512_maskz_mul_ps(keep, v, _mm512_set1_ps(ACT_BF16_SCALE));
}

MOE_BF16_512 static void act_bf16_avx512(const float *x, size_t n, void *row)
{
    uint16_t *narrow = row;
    for (size_t i = 0; i < n; i += 32) {
        const __m512 a = act_bf16x16_avx512(x + i), b = act_bf16x16_avx512(x + i + 16);
        _mm512_storeu_si512(narrow + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}
#endif

#if MOE_ARM64
MOE_INLINE float32x4_t act_bf16x4_neon(float32x4_t v)
{
    const uint32x4_t tiny = vcltq_f32(vabsq_f32(v), vdupq_n_f32(ACT_BF16_LEAST));
    const float32x4_t scaled = vmulq_n_f32(v, ACT_BF16_SCALE);
    const uint32x4_t u = vbicq_u32(vreinterpretq_u32_f32(scaled), tiny);
    const uint32x4_t even = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(u, vaddq_u32(even, vdupq_n_u32(0x7fff)));
    const uint32x4_t nan = vorrq_u32(u, vdupq_n_u32(0x400000));
    const uint32x4_t rounded = vbslq_u32(vceqq_f32(scaled, scaled), up, nan);
    return vreinterpretq_f32_u32(vandq_u32(rounded, vdupq_n_u32(0xffff0000)));
}

static void act_bf16_neon(const float *x, size_t n, void *row)
{
    float *wide = row;
    for (size_t i = 0; i < n; i += 16) {
        const float32x4x2_t a = vld2q_f32(x + i), b = vld2q_f32(x + i + 8);
        vst1q_f32(wide + i, act_bf16x4_neon(a.val[1]));
        vst1q_f32(wide + i + 4, act_bf16x4_neon(b.val[1]));
        vst1q_f32(wide + i + 8, act_bf16x4_neon(a.val[0]));
        vst1q_f32(wide + i + 12, act_bf16x4_neon(b.val[0]));
    }
}
#endif

static act_bf16_fn *act_bf16_select(uint32_t cpu)
{
    act_bf16_fn *best = act_bf16_c;
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = act_bf16_avx2;
    if (cpu & MOE_CPU_AVX512_BF16)
        best = act_bf16_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = act_bf16_neon;
#endif
    (void)cpu;
    return best;
}

static void act_bf16_row(const float *x, size_t n, void *row, uint32_t cpu)
{
    act_bf16_fn *pack = act_bf16_select(cpu);
    const size_t item_bytes = cpu & MOE_CPU_AVX512_BF16 ? sizeof(uint16_t) : sizeof(float);
    const size_t whole = n / 32 * 32, n_pad = (size_t)align_up(n, 32);
    char *p = row;
    pack(x, whole, p);
    if (whole < n) {
        float last[32] = {0};
        memcpy(last, x + whole, (n - whole) * sizeof *x);
        pack(last, 32, p + whole * item_bytes);
    }
    memset(p + n_pad * item_bytes, 0, act_row_bytes(MOE_ACT_BF16, n) - n_pad * item_bytes);
}

/* ----------------------------------------------------------------------------------- rows -- */

/* Packs a row of n >= 1 activations into `row`, act_row_bytes(act, n) bytes, aligned to 32. The
 * result is the same bytes for every set of moe_cpu bits, but for the two forms of BF16. */
MOE_UNUSED static void act_quantize(moe_act act, const float *x, size_t n, void *row, uint32_t cpu)
{
    char *p = row;
    if (act == MOE_ACT_F32) {
        memcpy(p, x, n * sizeof *x);
        memset(p + n * sizeof *x, 0, act_row_bytes(act, n) - n * sizeof *x);
        return;
    }
    if (act == MOE_ACT_BF16) {
        act_bf16_row(x, n, row, cpu);
        return;
    }
    act_pack_fn *pack = act_pack_select(cpu);
    const size_t group = act_group(act), n_pad = (size_t)align_up(n, group);
    const size_t sum_at = act_sum_offset(act, n), q_at = act_q_offset(act, n);
    float *scale = row;
    int16_t *sum = (int16_t *)(p + sum_at);
    int8_t *q = (int8_t *)(p + q_at);
    memset(scale + n_pad / group, 0, sum_at - n_pad / group * sizeof *scale);
    memset(sum + n_pad / 16, 0, q_at - sum_at - n_pad / 16 * sizeof *sum);
    size_t i = 0;
    for (; i + group <= n; i += group)
        pack(x + i, group, scale + i / group, sum + i / 16, q + i);
    if (i < n) {
        float last[256] = {0};
        memcpy(last, x + i, (n - i) * sizeof *x);
        pack(last, group, scale + i / group, sum + i / 16, q + i);
    }
}

#endif
