/* convert/encode_fit_avx2.h - the fits of encode_fit.h with AVX2 and FMA: line by line the same,
 * for 8 groups at once. */
#ifndef MOE_CONVERT_ENCODE_FIT_AVX2_H
#define MOE_CONVERT_ENCODE_FIT_AVX2_H

#include "encode_fit.h"

#if MOE_X86

/* -------------------------------------------------------------------------------- numbers -- */

MOE_AVX2_INLINE __m256 fit_abs_avx2(__m256 x)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

MOE_AVX2_INLINE __m256 fit_negate_avx2(__m256 x)
{
    return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
}

MOE_AVX2_INLINE __m256 fit_round_avx2(__m256 x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

MOE_AVX2_INLINE __m256 fit_clamp_avx2(__m256 x, __m256 low, __m256 high)
{
    return _mm256_min_ps(_mm256_max_ps(x, low), high);
}

MOE_AVX2_INLINE __m256 fit_inverse_avx2(__m256 x)
{
    const __m256 y = _mm256_div_ps(_mm256_set1_ps(1), x);
    return _mm256_and_ps(y, _mm256_cmp_ps(fit_abs_avx2(y), _mm256_set1_ps(FLT_MAX), _CMP_LE_OQ));
}

MOE_AVX2_INLINE __m256 fit_ratio_avx2(__m256 a, __m256 b)
{
    return _mm256_and_ps(_mm256_div_ps(a, b), _mm256_cmp_ps(b, _mm256_setzero_ps(), _CMP_GT_OQ));
}

/* What the levels need in registers. */
typedef struct fit_levels_avx2 {
    __m256 low, high;
    __m256 border1, border2, border3, border4; // of the search through fit_iq4_border
    __m256 value0, value8;                     // of iq4_value
} fit_levels_avx2;

MOE_AVX2_INLINE fit_levels_avx2 fit_load_levels_avx2(const fit_levels *v)
{
    const float *b = fit_iq4_border;
    const __m128i values = _mm_loadu_si128((const __m128i *)iq4_value);
    return (fit_levels_avx2){
        .low = _mm256_set1_ps(v->low),
        .high = _mm256_set1_ps(v->high),
        .border1 = _mm256_set1_ps(b[7]),
        .border2 = _mm256_setr_ps(b[3], b[11], 0, 0, 0, 0, 0, 0),
        .border3 = _mm256_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0),
        .border4 = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]),
        .value0 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)),
        .value8 = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8)))};
}

/* 2 i + (y > border[i]) */
MOE_AVX2_INLINE __m256i fit_iq4_descend_avx2(__m256i i, __m256 y, __m256 border)
{
    const __m256 above = _mm256_cmp_ps(y, _mm256_permutevar8x32_ps(border, i), _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(i, i), _mm256_castps_si256(above));
}

MOE_AVX2_INLINE __m256i fit_iq4_code_avx2(__m256 y, const fit_levels_avx2 *v)
{
    __m256i i = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_castps_si256(_mm256_cmp_ps(
                                                             y, v->border1, _CMP_GT_OQ)));
    i = fit_iq4_descend_avx2(i, y, v->border2);
    i = fit_iq4_descend_avx2(i, y, v->border3);
    return fit_iq4_descend_avx2(i, y, v->border4);
}

MOE_AVX2_INLINE __m256 fit_level_avx2(__m256 y, const fit_levels_avx2 *v, bool iq4)
{
    if (!iq4)
        return fit_round_avx2(fit_clamp_avx2(y, v->low, v->high));
    const __m256i i = fit_iq4_code_avx2(y, v);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v->value0, i),
                            _mm256_permutevar8x32_ps(v->value8, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28))); // its bit 3
}

MOE_AVX2_INLINE __m256 fit_mxfp4_level_avx2(__m256 y)
{
    const __m256 top = _mm256_min_ps(y, _mm256_set1_ps(12)), one = _mm256_set1_ps(1);
    const __m256 below8 = _mm256_cmp_ps(top, _mm256_set1_ps(8), _CMP_LT_OQ);
    const __m256 below4 = _mm256_cmp_ps(top, _mm256_set1_ps(4), _CMP_LT_OQ);
    __m256 by = _mm256_blendv_ps(_mm256_set1_ps(0.25f), _mm256_set1_ps(0.5f), below8);
    __m256 times = _mm256_blendv_ps(_mm256_set1_ps(4), _mm256_set1_ps(2), below8);
    by = _mm256_blendv_ps(by, one, below4);
    times = _mm256_blendv_ps(times, one, below4);
    return _mm256_mul_ps(fit_round_avx2(_mm256_mul_ps(top, by)), times);
}

/* w x, where a tile without weights has 1. */
MOE_AVX2_INLINE __m256 fit_weigh_avx2(const fit_tile *t, int i, __m256 x, bool weighted)
{
    return weighted ? _mm256_mul_ps(_mm256_load_ps(t->w[i]), x) : x;
}

MOE_AVX2_INLINE __m256 fit_sum_w_avx2(const fit_tile *t)
{
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < t->n; i++)
        sum = _mm256_add_ps(sum, _mm256_load_ps(t->w[i]));
    return sum;
}

MOE_AVX2_INLINE __m256 fit_try_avx2(const fit_search *how, int k, __m256 unit, __m256 scale)
{
    const int n = how->both_signs ? 2 * how->n : how->n;
    if (k >= n)
        return fit_inverse_avx2(scale);
    const float code = fmaf((float)(how->both_signs ? k / 2 : k), how->step, how->first);
    return _mm256_mul_ps(_mm256_set1_ps(how->both_signs && k % 2 ? -code : code), unit);
}

/* `better` chooses the new number. */
MOE_AVX2_INLINE void fit_keep_avx2(__m256 *best, __m256 x, __m256 better)
{
    *best = _mm256_blendv_ps(*best, x, better);
}

/* ---------------------------------------------------------------------------------- tiles -- */

/* 8 weights of each of 8 groups. */
MOE_AVX2_INLINE void fit_transpose_avx2(float dst[][FIT_LANES], const float *const x[8], int i)
{
    __m256 v[4], u[4];
    for (int half = 0; half < 2; half++) {
        for (int g = 0; g < 4; g++)
            v[g] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x[g] + i + 4 * half)),
                                        _mm_loadu_ps(x[g + 4] + i + 4 * half), 1);
        u[0] = _mm256_unpacklo_ps(v[0], v[1]);
        u[1] = _mm256_unpackhi_ps(v[0], v[1]);
        u[2] = _mm256_unpacklo_ps(v[2], v[3]);
        u[3] = _mm256_unpackhi_ps(v[2], v[3]);
        float(*to)[FIT_LANES] = dst + i + 4 * half;
        _mm256_store_ps(to[0], _mm256_shuffle_ps(u[0], u[2], 0x44));
        _mm256_store_ps(to[1], _mm256_shuffle_ps(u[0], u[2], 0xee));
        _mm256_store_ps(to[2], _mm256_shuffle_ps(u[1], u[3], 0x44));
        _mm256_store_ps(to[3], _mm256_shuffle_ps(u[1], u[3], 0xee));
    }
}

MOE_AVX2 static void fit_load_avx2(fit_tile *t, const float *const x[8], const float *const w[8],
                                   int n)
{
    t->n = n;
    for (int i = 0; i < n; i += 8) {
        fit_transpose_avx2(t->x, x, i);
        if (w)
            fit_transpose_avx2(t->w, w, i);
    }
}

/* ----------------------------------------------------------------------------------- fits -- */

MOE_AVX2_INLINE void fit_linear_any_avx2(const fit_tile *t, const fit_levels *levels,
                                         const fit_search *how, fit_lanes *out, bool weighted,
                                         bool iq4)
{
    const fit_levels_avx2 v = fit_load_levels_avx2(levels);
    __m256 peak = _mm256_setzero_ps(), scale = peak, best = _mm256_set1_ps(INFINITY);
    for (int i = 0; i < t->n; i++) {
        const __m256 x = _mm256_load_ps(t->x[i]);
        fit_keep_avx2(&peak, x, _mm256_cmp_ps(fit_abs_avx2(x), fit_abs_avx2(peak), _CMP_GT_OQ));
    }
    const __m256 unit = fit_inverse_avx2(peak);
    for (int k = 0; k < fit_n_tries(how); k++) {
        const __m256 inverse = fit_try_avx2(how, k, unit, scale);
        __m256 qq = _mm256_setzero_ps(), rq = qq, rr = qq;
        for (int i = 0; i < t->n; i++) {
            const __m256 y = _mm256_mul_ps(_mm256_load_ps(t->x[i]), inverse);
            const __m256 q = fit_level_avx2(y, &v, iq4), r = _mm256_sub_ps(y, q);
            const __m256 wr = fit_weigh_avx2(t, i, r, weighted);
            qq = _mm256_fmadd_ps(fit_weigh_avx2(t, i, q, weighted), q, qq);
            rq = _mm256_fmadd_ps(wr, q, rq);
            rr = _mm256_fmadd_ps(wr, r, rr);
        }
        const __m256 step = fit_inverse_avx2(inverse), a = fit_ratio_avx2(rq, qq);
        const __m256 error =
            _mm256_mul_ps(_mm256_mul_ps(step, step), _mm256_fnmadd_ps(a, rq, rr));
        const __m256 better = _mm256_cmp_ps(error, best, _CMP_LT_OQ);
        fit_keep_avx2(&best, error, better);
        fit_keep_avx2(&scale, _mm256_fmadd_ps(step, a, step), better);
    }
    _mm256_store_ps(out->v, scale);
}

MOE_AVX2 static void fit_linear_avx2(const fit_tile *t, const fit_levels *v, const fit_search *how,
                                     fit_lanes *scale)
{
    if (v->iq4 && t->weighted)
        fit_linear_any_avx2(t, v, how, scale, true, true);
    else if (v->iq4)
        fit_linear_any_avx2(t, v, how, scale, false, true);
    else if (t->weighted)
        fit_linear_any_avx2(t, v, how, scale, true, false);
    else
        fit_linear_any_avx2(t, v, how, scale, false, false);
}

MOE_AVX2_INLINE void fit_affine_any_avx2(const fit_tile *t, float high_code, bool negative,
                                         const fit_search *how, fit_lanes *scale_out,
                                         fit_lanes *offset_out, bool weighted)
{
    const __m256 none = _mm256_setzero_ps(), top = _mm256_set1_ps(high_code);
    __m256 high = _mm256_load_ps(t->x[0]), low = negative ? none : high;
    for (int i = 0; i < t->n; i++) {
        low = _mm256_min_ps(_mm256_load_ps(t->x[i]), low);
        high = _mm256_max_ps(_mm256_load_ps(t->x[i]), high);
    }
    const __m256 unit = fit_inverse_avx2(_mm256_sub_ps(high, low)), sw = fit_sum_w_avx2(t);
    __m256 scale = none, offset = low, best = _mm256_set1_ps(INFINITY);
    for (int k = 0; k < fit_n_tries(how); k++) {
        const __m256 inverse = fit_try_avx2(how, k, unit, scale);
        const __m256 zero = _mm256_mul_ps(fit_negate_avx2(k < how->n ? low : offset), inverse);
        __m256 sq = none, qq = none, sr = none, rq = none, rr = none;
        for (int i = 0; i < t->n; i++) {
            const __m256 y = _mm256_fmadd_ps(_mm256_load_ps(t->x[i]), inverse, zero);
            const __m256 q = fit_round_avx2(fit_clamp_avx2(y, none, top));
            const __m256 r = _mm256_sub_ps(y, q);
            const __m256 wq = fit_weigh_avx2(t, i, q, weighted);
            const __m256 wr = fit_weigh_avx2(t, i, r, weighted);
            sq = _mm256_add_ps(sq, wq);
            sr = _mm256_add_ps(sr, wr);
            qq = _mm256_fmadd_ps(wq, q, qq);
            rq = _mm256_fmadd_ps(wr, q, rq);
            rr = _mm256_fmadd_ps(wr, r, rr);
        }
        const __m256 step = fit_inverse_avx2(inverse);
        const __m256 det = _mm256_fmsub_ps(sw, qq, _mm256_mul_ps(sq, sq));
        __m256 b = fit_ratio_avx2(_mm256_fmsub_ps(sr, qq, _mm256_mul_ps(sq, rq)), det);
        if (negative)
            b = _mm256_min_ps(b, zero);
        const __m256 a = fit_ratio_avx2(_mm256_fnmadd_ps(b, sq, rq), qq);
        const __m256 twice =
            _mm256_fnmadd_ps(b, sw, _mm256_fnmadd_ps(a, sq, _mm256_add_ps(sr, sr)));
        const __m256 error = _mm256_mul_ps(_mm256_mul_ps(step, step),
                                           _mm256_fnmadd_ps(b, twice, _mm256_fnmadd_ps(a, rq, rr)));
        const __m256 better = _mm256_and_ps(_mm256_cmp_ps(error, best, _CMP_LT_OQ),
                                            _mm256_cmp_ps(step, none, _CMP_GT_OQ));
        fit_keep_avx2(&best, error, better);
        fit_keep_avx2(&scale, _mm256_fmadd_ps(step, a, step), better);
        fit_keep_avx2(&offset, _mm256_mul_ps(_mm256_sub_ps(b, zero), step), better);
    }
    _mm256_store_ps(scale_out->v, scale);
    _mm256_store_ps(offset_out->v, offset);
}

MOE_AVX2 static void fit_affine_avx2(const fit_tile *t, float high, bool negative,
                                     const fit_search *how, fit_lanes *scale, fit_lanes *offset)
{
    if (t->weighted)
        fit_affine_any_avx2(t, high, negative, how, scale, offset, true);
    else
        fit_affine_any_avx2(t, high, negative, how, scale, offset, false);
}

MOE_AVX2 static void fit_mxfp4_avx2(const fit_tile *t, fit_lanes *out)
{
    __m256 peak = _mm256_setzero_ps(), scale = peak, best = _mm256_set1_ps(INFINITY);
    for (int i = 0; i < t->n; i++)
        peak = _mm256_max_ps(fit_abs_avx2(_mm256_load_ps(t->x[i])), peak);
    const __m256 power =
        _mm256_and_ps(peak, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
    for (int k = 0; k < 3; k++) {
        const __m256 step = _mm256_mul_ps(power, _mm256_set1_ps(0.25f / (float)(1 << k)));
        const __m256 inverse = fit_inverse_avx2(step);
        __m256 rr = _mm256_setzero_ps();
        for (int i = 0; i < t->n; i++) {
            const __m256 y = _mm256_mul_ps(fit_abs_avx2(_mm256_load_ps(t->x[i])), inverse);
            const __m256 r = _mm256_sub_ps(y, fit_mxfp4_level_avx2(y));
            rr = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_load_ps(t->w[i]), r), r, rr);
        }
        const __m256 error = _mm256_mul_ps(_mm256_mul_ps(step, step), rr);
        const __m256 better = _mm256_cmp_ps(error, best, _CMP_LT_OQ);
        fit_keep_avx2(&best, error, better);
        fit_keep_avx2(&scale, step, better);
    }
    _mm256_store_ps(out->v, scale);
}

/* -------------------------------------------------------------------------- integer scales -- */

MOE_AVX2_INLINE void fit_linear_int_any_avx2(const fit_tile *t, const fit_levels *levels,
                                             const fit_scales *how, const fit_lanes *scale,
                                             fit_lanes *out, bool weighted, bool iq4)
{
    const fit_levels_avx2 v = fit_load_levels_avx2(levels);
    const __m256 d = _mm256_set1_ps(how->d), s_min = _mm256_set1_ps(how->s_min);
    const __m256 s_max = _mm256_set1_ps(how->s_max), per_d = _mm256_set1_ps(fit_inverse(how->d));
    const __m256 near = fit_round_avx2(
        fit_clamp_avx2(_mm256_mul_ps(_mm256_load_ps(scale->v), per_d), s_min, s_max));
    __m256 best = _mm256_set1_ps(INFINITY), best_s = _mm256_setzero_ps();
    for (int k = -how->n_near; k <= how->n_near; k++) {
        const __m256 s = fit_clamp_avx2(_mm256_add_ps(near, _mm256_set1_ps((float)k)), s_min,
                                        s_max);
        const __m256 step = _mm256_mul_ps(d, s), inverse = fit_inverse_avx2(step);
        __m256 error = _mm256_setzero_ps();
        for (int i = 0; i < t->n; i++) {
            const __m256 x = _mm256_load_ps(t->x[i]);
            const __m256 q = fit_level_avx2(_mm256_mul_ps(x, inverse), &v, iq4);
            const __m256 r = _mm256_fnmadd_ps(step, q, x);
            error = _mm256_fmadd_ps(fit_weigh_avx2(t, i, r, weighted), r, error);
        }
        const __m256 better = _mm256_cmp_ps(error, best, _CMP_LT_OQ);
        fit_keep_avx2(&best, error, better);
        fit_keep_avx2(&best_s, s, better);
    }
    _mm256_store_ps(out->v, best_s);
}

MOE_AVX2 static void fit_linear_int_avx2(const fit_tile *t, const fit_levels *v,
                                         const fit_scales *how, const fit_lanes *scale,
                                         fit_lanes *s)
{
    if (v->iq4 && t->weighted)
        fit_linear_int_any_avx2(t, v, how, scale, s, true, true);
    else if (v->iq4)
        fit_linear_int_any_avx2(t, v, how, scale, s, false, true);
    else if (t->weighted)
        fit_linear_int_any_avx2(t, v, how, scale, s, true, false);
    else
        fit_linear_int_any_avx2(t, v, how, scale, s, false, false);
}

MOE_AVX2_INLINE void fit_affine_int_any_avx2(const fit_tile *t, float high, const fit_scales *how,
                                             const fit_lanes *scale, const fit_lanes *offset,
                                             fit_lanes *s_out, fit_lanes *m_out, bool weighted)
{
    const __m256 none = _mm256_setzero_ps(), top = _mm256_set1_ps(high);
    const __m256 d = _mm256_set1_ps(how->d), d_min = _mm256_set1_ps(how->d_min);
    const __m256 per_d = _mm256_set1_ps(fit_inverse(how->d)), s_max = _mm256_set1_ps(how->s_max);
    const __m256 per_min = _mm256_set1_ps(fit_inverse(how->d_min)), sw = fit_sum_w_avx2(t);
    const __m256 near = fit_round_avx2(
        fit_clamp_avx2(_mm256_mul_ps(_mm256_load_ps(scale->v), per_d), none, s_max));
    const __m256 near_m = fit_round_avx2(fit_clamp_avx2(
        _mm256_mul_ps(fit_negate_avx2(_mm256_load_ps(offset->v)), per_min), none, s_max));
    __m256 best = _mm256_set1_ps(INFINITY), best_s = none, best_m = none;
    for (int k = -how->n_near; k <= how->n_near; k++) {
        const __m256 s = fit_clamp_avx2(_mm256_add_ps(near, _mm256_set1_ps((float)k)), none, s_max);
        const __m256 step = _mm256_mul_ps(d, s), inverse = fit_inverse_avx2(step);
        __m256 m = near_m;
        for (int turn = 0; turn < 2; turn++) {
            const __m256 add = _mm256_mul_ps(d_min, m);
            __m256 sr = none, error = none;
            for (int i = 0; i < t->n; i++) {
                const __m256 x = _mm256_add_ps(_mm256_load_ps(t->x[i]), add);
                const __m256 q =
                    fit_round_avx2(fit_clamp_avx2(_mm256_mul_ps(x, inverse), none, top));
                const __m256 r = _mm256_fnmadd_ps(step, q, x);
                const __m256 wr = fit_weigh_avx2(t, i, r, weighted);
                sr = _mm256_add_ps(sr, wr);
                error = _mm256_fmadd_ps(wr, r, error);
            }
            const __m256 better = _mm256_cmp_ps(error, best, _CMP_LT_OQ);
            fit_keep_avx2(&best, error, better);
            fit_keep_avx2(&best_s, s, better);
            fit_keep_avx2(&best_m, m, better);
            m = _mm256_mul_ps(_mm256_sub_ps(add, fit_ratio_avx2(sr, sw)), per_min);
            m = fit_round_avx2(fit_clamp_avx2(m, none, s_max));
        }
    }
    _mm256_store_ps(s_out->v, best_s);
    _mm256_store_ps(m_out->v, best_m);
}

MOE_AVX2 static void fit_affine_int_avx2(const fit_tile *t, float high, const fit_scales *how,
                                         const fit_lanes *scale, const fit_lanes *offset,
                                         fit_lanes *s, fit_lanes *m)
{
    if (t->weighted)
        fit_affine_int_any_avx2(t, high, how, scale, offset, s, m, true);
    else
        fit_affine_int_any_avx2(t, high, how, scale, offset, s, m, false);
}

/* ---------------------------------------------------------------------------------- codes -- */

/* 16 small integers as bytes. */
MOE_AVX2_INLINE __m128i fit_bytes_avx2(__m256i a, __m256i b)
{
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

MOE_AVX2_INLINE void fit_codes_any_avx2(const float *x, int n, float add, float inverse,
                                        const fit_levels *levels, uint8_t *code, bool iq4)
{
    const fit_levels_avx2 v = fit_load_levels_avx2(levels);
    const __m256 plus = _mm256_set1_ps(add), times = _mm256_set1_ps(inverse);
    for (int i = 0; i < n; i += 16) {
        __m256i c[2];
        for (int half = 0; half < 2; half++) {
            const __m256 y =
                _mm256_mul_ps(_mm256_add_ps(_mm256_loadu_ps(x + i + 8 * half), plus), times);
            c[half] = iq4 ? fit_iq4_code_avx2(y, &v)
                          : _mm256_cvtps_epi32(_mm256_sub_ps(fit_level_avx2(y, &v, false), v.low));
        }
        _mm_storeu_si128((__m128i *)(code + i), fit_bytes_avx2(c[0], c[1]));
    }
}

MOE_AVX2 static void fit_codes_avx2(const float *x, int n, float add, float inverse,
                                    const fit_levels *v, uint8_t *code)
{
    if (v->iq4)
        fit_codes_any_avx2(x, n, add, inverse, v, code, true);
    else
        fit_codes_any_avx2(x, n, add, inverse, v, code, false);
}

MOE_AVX2 static void fit_mxfp4_codes_avx2(const float *x, int n, float inverse, uint8_t *code)
{
    const __m128i of_level = _mm_setr_epi8(0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 0, 0, 0);
    const __m256 times = _mm256_set1_ps(inverse), none = _mm256_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __m256i level[2], sign[2];
        for (int half = 0; half < 2; half++) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * half);
            const __m256 y = _mm256_mul_ps(fit_abs_avx2(v), times);
            level[half] = _mm256_cvtps_epi32(fit_mxfp4_level_avx2(y));
            sign[half] = _mm256_srli_epi32(
                _mm256_castps_si256(_mm256_cmp_ps(v, none, _CMP_LT_OQ)), 31);
        }
        const __m128i magnitude = _mm_shuffle_epi8(of_level, fit_bytes_avx2(level[0], level[1]));
        const __m128i minus = _mm_slli_epi16(fit_bytes_avx2(sign[0], sign[1]), 3);
        _mm_storeu_si128((__m128i *)(code + i), _mm_or_si128(magnitude, minus));
    }
}

static const fit_ops fit_ops_avx2 = {
    fit_load_avx2,       fit_linear_avx2,     fit_affine_avx2, fit_mxfp4_avx2,
    fit_linear_int_avx2, fit_affine_int_avx2, fit_codes_avx2,  fit_mxfp4_codes_avx2};

#endif
#endif
