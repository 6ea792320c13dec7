/* convert/encode_plain_x86.h - the quantizers of encode_plain.h with AVX2, 8 blocks at once, and
 * with AVX-512, 16 at once: line by line the same. */
#ifndef MOE_CONVERT_ENCODE_PLAIN_X86_H
#define MOE_CONVERT_ENCODE_PLAIN_X86_H

#include "encode_fit_avx2.h"
#include "encode_plain.h"

#if MOE_X86

/* A block from its codes, in order, as bytes. */
MOE_AVX2_INLINE void plain_put_avx2(const plain_type *type, __m128i low, __m128i high, uint16_t d,
                                    uint16_t m, uint8_t *dst)
{
    __m128i q = _mm_or_si128(low, _mm_slli_epi16(high, 4));
    memcpy(dst, &d, 2);
    dst += 2;
    if (type->affine) {
        memcpy(dst, &m, 2);
        dst += 2;
    }
    if (type->fifth) {
        const uint32_t fifth =
            (uint32_t)_mm_movemask_epi8(_mm_slli_epi16(low, 3)) |
            (uint32_t)_mm_movemask_epi8(_mm_slli_epi16(high, 3)) << 16;
        const __m128i nibble = _mm_set1_epi8(15);
        q = _mm_or_si128(_mm_and_si128(low, nibble),
                         _mm_slli_epi16(_mm_and_si128(high, nibble), 4));
        memcpy(dst, &fifth, 4);
        dst += 4;
    }
    _mm_storeu_si128((__m128i *)dst, q);
}

/* ----------------------------------------------------------------------------------- AVX2 -- */

typedef struct plain_fit_avx2 {
    float x[32][8];
    __m256 sum, low, unit, scale, offset, gain;
} plain_fit_avx2;

MOE_AVX2_INLINE void plain_load_avx2(const plain_type *type, const float *const x[8],
                                     plain_fit_avx2 *fit)
{
    const __m256 none = _mm256_setzero_ps();
    for (int i = 0; i < 32; i += 8)
        fit_transpose_avx2(fit->x, x, i);
    __m256 low = _mm256_load_ps(fit->x[0]), high = low, front = none, back = none;
    for (int i = 1; i < 32; i++) {
        low = _mm256_min_ps(_mm256_load_ps(fit->x[i]), low);
        high = _mm256_max_ps(_mm256_load_ps(fit->x[i]), high);
    }
    fit->low = type->affine ? low : none;
    fit->unit = type->affine
                    ? _mm256_sub_ps(high, low)
                    : _mm256_blendv_ps(low, high, _mm256_cmp_ps(high, fit_negate_avx2(low),
                                                                _CMP_GE_OQ));
    const __m256 inverse = fit_inverse_avx2(fit->unit);
    for (int i = 0; i < 16; i++) {
        const __m256 u = _mm256_sub_ps(_mm256_load_ps(fit->x[i]), fit->low);
        const __m256 v = _mm256_sub_ps(_mm256_load_ps(fit->x[i + 16]), fit->low);
        _mm256_store_ps(fit->x[i], _mm256_mul_ps(u, inverse));
        _mm256_store_ps(fit->x[i + 16], _mm256_mul_ps(v, inverse));
        front = _mm256_fmadd_ps(u, inverse, front);
        back = _mm256_fmadd_ps(v, inverse, back);
    }
    fit->sum = _mm256_add_ps(front, back);
    fit->scale = fit->offset = fit->gain = none;
}

MOE_AVX2_INLINE void plain_try_avx2(const plain_type *type, plain_fit_avx2 *fit, __m256 times,
                                    __m256 zero)
{
    const __m256 none = _mm256_setzero_ps(), n = _mm256_set1_ps(32);
    const __m256 low = _mm256_set1_ps(type->low), high = _mm256_set1_ps(type->high);
    __m256 q1[2] = {none, none}, q2[2] = {none, none}, xq[2] = {none, none};
    for (int i = 0; i < 16; i++)
        for (int half = 0; half < 2; half++) {
            const __m256 x = _mm256_load_ps(fit->x[i + 16 * half]);
            const __m256 y = _mm256_fmadd_ps(x, times, zero);
            const __m256 q = fit_round_avx2(fit_clamp_avx2(y, low, high));
            q1[half] = _mm256_add_ps(q1[half], q);
            q2[half] = _mm256_fmadd_ps(q, q, q2[half]);
            xq[half] = _mm256_fmadd_ps(x, q, xq[half]);
        }
    const __m256 sq = _mm256_add_ps(q1[0], q1[1]);
    __m256 top = _mm256_add_ps(xq[0], xq[1]), bottom = _mm256_add_ps(q2[0], q2[1]);
    if (type->affine) {
        top = _mm256_fmsub_ps(n, top, _mm256_mul_ps(fit->sum, sq));
        bottom = _mm256_fmsub_ps(n, bottom, _mm256_mul_ps(sq, sq));
    }
    const __m256 scale = fit_ratio_avx2(top, bottom), gain = _mm256_mul_ps(scale, top);
    const __m256 better = _mm256_cmp_ps(gain, fit->gain, _CMP_GT_OQ);
    fit_keep_avx2(&fit->gain, gain, better);
    fit_keep_avx2(&fit->scale, scale, better);
    if (type->affine)
        fit_keep_avx2(&fit->offset, _mm256_mul_ps(_mm256_fnmadd_ps(scale, sq, fit->sum),
                                                  _mm256_set1_ps(0.03125f)), better);
}

/* 8 numbers as they are stored, and as they will be read back. */
MOE_AVX2_INLINE __m256 plain_f16_avx2(__m256 x, uint16_t half[8])
{
    const __m256 top = _mm256_set1_ps(QUANT_F16_MAX);
    const __m128i h = _mm256_cvtps_ph(fit_clamp_avx2(x, fit_negate_avx2(top), top),
                                      _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i *)half, h);
    return _mm256_cvtph_ps(h);
}

/* 16 codes as bytes. */
MOE_AVX2_INLINE __m128i plain_codes_avx2(const plain_type *type, const float *x, __m256 add,
                                         __m256 inverse)
{
    const __m256 low = _mm256_set1_ps(type->low), high = _mm256_set1_ps(type->high);
    __m256i c[2];
    for (int half = 0; half < 2; half++) {
        const __m256 y =
            _mm256_mul_ps(_mm256_add_ps(_mm256_loadu_ps(x + 8 * half), add), inverse);
        c[half] = _mm256_sub_epi32(_mm256_cvtps_epi32(fit_clamp_avx2(y, low, high)),
                                   _mm256_set1_epi32((int)type->low));
    }
    return fit_bytes_avx2(c[0], c[1]);
}

MOE_AVX2_INLINE void plain_tile_avx2(const plain_type *type, const float *x, uint8_t *dst, size_t n)
{
    plain_fit_avx2 fit;
    const float *at[8];
    uint16_t d[8], m[8];
    _Alignas(32) float inverse[8], add[8];
    for (size_t g = 0; g < 8; g++)
        at[g] = x + 32 * MOE_MIN(g, n - 1);
    plain_load_avx2(type, at, &fit);
    for (int k = 0; k < type->n_tries; k++)
        plain_try_avx2(type, &fit, _mm256_set1_ps(type->tries[k].times),
                       _mm256_set1_ps(type->tries[k].zero));
    const __m256 times = fit_inverse_avx2(fit.scale);
    plain_try_avx2(type, &fit, times, _mm256_mul_ps(fit_negate_avx2(fit.offset), times));
    _mm256_store_ps(inverse, fit_inverse_avx2(plain_f16_avx2(
                                 _mm256_fmadd_ps(fit.scale, fit.unit, _mm256_setzero_ps()), d)));
    _mm256_store_ps(add, fit_negate_avx2(plain_f16_avx2(
                             _mm256_fmadd_ps(fit.offset, fit.unit, fit.low), m)));
    for (size_t g = 0; g < n; g++, dst += type->type->quant->block_bytes) {
        const __m256 by = _mm256_set1_ps(inverse[g]), plus = _mm256_set1_ps(add[g]);
        plain_put_avx2(type, plain_codes_avx2(type, at[g], plus, by),
                       plain_codes_avx2(type, at[g] + 16, plus, by), d[g], m[g], dst);
    }
}

/* --------------------------------------------------------------------------------- AVX-512 -- */

MOE_AVX512_INLINE __m512 plain_round512(__m512 x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

MOE_AVX512_INLINE __m512 plain_clamp512(__m512 x, float low, float high)
{
    return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(low)), _mm512_set1_ps(high));
}

MOE_AVX512_INLINE __m512 plain_inverse512(__m512 x)
{
    const __m512 y = _mm512_div_ps(_mm512_set1_ps(1), x);
    return _mm512_maskz_mov_ps(
        _mm512_cmp_ps_mask(_mm512_abs_ps(y), _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ), y);
}

MOE_AVX512_INLINE __m512 plain_negate512(__m512 x)
{
    return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
}

typedef struct plain_fit512 {
    float x[32][16];
    __m512 sum, low, unit, scale, offset, gain;
} plain_fit512;

/* 4 weights of each of 16 blocks: block 4 l + j is in lane j of the 4 at l. */
MOE_AVX512_INLINE void plain_transpose512(float dst[4][16], const float *const x[16], int i)
{
    __m512 v[4], u[4];
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_castps128_ps512(_mm_loadu_ps(x[j] + i));
        v[j] = _mm512_insertf32x4(v[j], _mm_loadu_ps(x[j + 4] + i), 1);
        v[j] = _mm512_insertf32x4(v[j], _mm_loadu_ps(x[j + 8] + i), 2);
        v[j] = _mm512_insertf32x4(v[j], _mm_loadu_ps(x[j + 12] + i), 3);
    }
    u[0] = _mm512_unpacklo_ps(v[0], v[1]);
    u[1] = _mm512_unpackhi_ps(v[0], v[1]);
    u[2] = _mm512_unpacklo_ps(v[2], v[3]);
    u[3] = _mm512_unpackhi_ps(v[2], v[3]);
    _mm512_store_ps(dst[0], _mm512_shuffle_ps(u[0], u[2], 0x44));
    _mm512_store_ps(dst[1], _mm512_shuffle_ps(u[0], u[2], 0xee));
    _mm512_store_ps(dst[2], _mm512_shuffle_ps(u[1], u[3], 0x44));
    _mm512_store_ps(dst[3], _mm512_shuffle_ps(u[1], u[3], 0xee));
}

MOE_AVX512_INLINE void plain_load512(const plain_type *type, const float *const x[16],
                                     plain_fit512 *fit)
{
    const __m512 none = _mm512_setzero_ps();
    for (int i = 0; i < 32; i += 4)
        plain_transpose512(fit->x + i, x, i);
    __m512 low = _mm512_load_ps(fit->x[0]), high = low, front = none, back = none;
    for (int i = 1; i < 32; i++) {
        low = _mm512_min_ps(_mm512_load_ps(fit->x[i]), low);
        high = _mm512_max_ps(_mm512_load_ps(fit->x[i]), high);
    }
    fit->low = type->affine ? low : none;
    fit->unit = type->affine
                    ? _mm512_sub_ps(high, low)
                    : _mm512_mask_mov_ps(low, _mm512_cmp_ps_mask(high, plain_negate512(low),
                                                                 _CMP_GE_OQ), high);
    const __m512 inverse = plain_inverse512(fit->unit);
    for (int i = 0; i < 16; i++) {
        const __m512 u = _mm512_sub_ps(_mm512_load_ps(fit->x[i]), fit->low);
        const __m512 v = _mm512_sub_ps(_mm512_load_ps(fit->x[i + 16]), fit->low);
        _mm512_store_ps(fit->x[i], _mm512_mul_ps(u, inverse));
        _mm512_store_ps(fit->x[i + 16], _mm512_mul_ps(v, inverse));
        front = _mm512_fmadd_ps(u, inverse, front);
        back = _mm512_fmadd_ps(v, inverse, back);
    }
    fit->sum = _mm512_add_ps(front, back);
    fit->scale = fit->offset = fit->gain = none;
}

MOE_AVX512_INLINE void plain_try512(const plain_type *type, plain_fit512 *fit, __m512 times,
                                    __m512 zero)
{
    const __m512 none = _mm512_setzero_ps(), n = _mm512_set1_ps(32);
    __m512 q1[2] = {none, none}, q2[2] = {none, none}, xq[2] = {none, none};
    for (int i = 0; i < 16; i++)
        for (int half = 0; half < 2; half++) {
            const __m512 x = _mm512_load_ps(fit->x[i + 16 * half]);
            const __m512 y = _mm512_fmadd_ps(x, times, zero);
            const __m512 q = plain_round512(plain_clamp512(y, type->low, type->high));
            q1[half] = _mm512_add_ps(q1[half], q);
            q2[half] = _mm512_fmadd_ps(q, q, q2[half]);
            xq[half] = _mm512_fmadd_ps(x, q, xq[half]);
        }
    const __m512 sq = _mm512_add_ps(q1[0], q1[1]);
    __m512 top = _mm512_add_ps(xq[0], xq[1]), bottom = _mm512_add_ps(q2[0], q2[1]);
    if (type->affine) {
        top = _mm512_fmsub_ps(n, top, _mm512_mul_ps(fit->sum, sq));
        bottom = _mm512_fmsub_ps(n, bottom, _mm512_mul_ps(sq, sq));
    }
    const __m512 scale = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(bottom, none, _CMP_GT_OQ), top,
                                             bottom);
    const __m512 gain = _mm512_mul_ps(scale, top);
    const __mmask16 better = _mm512_cmp_ps_mask(gain, fit->gain, _CMP_GT_OQ);
    fit->gain = _mm512_mask_mov_ps(fit->gain, better, gain);
    fit->scale = _mm512_mask_mov_ps(fit->scale, better, scale);
    if (type->affine)
        fit->offset = _mm512_mask_mul_ps(fit->offset, better,
                                         _mm512_fnmadd_ps(scale, sq, fit->sum),
                                         _mm512_set1_ps(0.03125f));
}

MOE_AVX512_INLINE __m512 plain_f16_512(__m512 x, uint16_t half[16])
{
    const __m256i h = _mm512_cvtps_ph(plain_clamp512(x, -QUANT_F16_MAX, QUANT_F16_MAX),
                                      _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i *)half, h);
    return _mm512_cvtph_ps(h);
}

MOE_AVX512_INLINE __m128i plain_codes512(const plain_type *type, const float *x, float add,
                                         float inverse)
{
    const __m512 y = _mm512_mul_ps(_mm512_add_ps(_mm512_loadu_ps(x), _mm512_set1_ps(add)),
                                   _mm512_set1_ps(inverse));
    const __m512i code = _mm512_cvtps_epi32(plain_clamp512(y, type->low, type->high));
    return _mm512_cvtepi32_epi8(_mm512_sub_epi32(code, _mm512_set1_epi32((int)type->low)));
}

MOE_AVX512_INLINE void plain_tile512(const plain_type *type, const float *x, uint8_t *dst, size_t n)
{
    plain_fit512 fit;
    const float *at[16];
    uint16_t d[16], m[16];
    _Alignas(64) float inverse[16], add[16];
    for (size_t g = 0; g < 16; g++)
        at[g] = x + 32 * MOE_MIN(g, n - 1);
    plain_load512(type, at, &fit);
    for (int k = 0; k < type->n_tries; k++)
        plain_try512(type, &fit, _mm512_set1_ps(type->tries[k].times),
                     _mm512_set1_ps(type->tries[k].zero));
    const __m512 times = plain_inverse512(fit.scale);
    plain_try512(type, &fit, times, _mm512_mul_ps(plain_negate512(fit.offset), times));
    _mm512_store_ps(inverse, plain_inverse512(plain_f16_512(
                                 _mm512_fmadd_ps(fit.scale, fit.unit, _mm512_setzero_ps()), d)));
    _mm512_store_ps(add, plain_negate512(plain_f16_512(
                             _mm512_fmadd_ps(fit.offset, fit.unit, fit.low), m)));
    for (size_t g = 0; g < n; g++, dst += type->type->quant->block_bytes)
        plain_put_avx2(type, plain_codes512(type, at[g], add[g], inverse[g]),
                       plain_codes512(type, at[g] + 16, add[g], inverse[g]), d[g], m[g], dst);
}

/* ----------------------------------------------------------------------------------- types -- */

#define PLAIN_BLOCKS(name, isa, target, tile, lanes)                                               \
    target static void plain_blocks_##name##_##isa(const float *x, uint8_t *dst, size_t n)         \
    {                                                                                              \
        const plain_type *type = &plain_##name;                                                    \
        for (size_t b = 0; b < n; b += lanes)                                                      \
            tile(type, x + 32 * b, dst + b * type->type->quant->block_bytes,                       \
                 MOE_MIN(n - b, (size_t)lanes));                                                   \
    }
PLAIN_BLOCKS(q4_0, avx2, MOE_AVX2, plain_tile_avx2, 8)
PLAIN_BLOCKS(q4_1, avx2, MOE_AVX2, plain_tile_avx2, 8)
PLAIN_BLOCKS(q5_0, avx2, MOE_AVX2, plain_tile_avx2, 8)
PLAIN_BLOCKS(q5_1, avx2, MOE_AVX2, plain_tile_avx2, 8)
PLAIN_BLOCKS(q4_0, avx512, MOE_AVX512, plain_tile512, 16)
PLAIN_BLOCKS(q4_1, avx512, MOE_AVX512, plain_tile512, 16)
PLAIN_BLOCKS(q5_0, avx512, MOE_AVX512, plain_tile512, 16)
PLAIN_BLOCKS(q5_1, avx512, MOE_AVX512, plain_tile512, 16)
#undef PLAIN_BLOCKS

#endif
#endif
