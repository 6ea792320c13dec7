/* convert/encode_fit.h - the arithmetic of the quantizers: the scales and offsets that fit best.
 *
 * Weights that share a scale are a group, of 16 or 32. Groups are worked on 8 at a time in a tile,
 * which holds them transposed: a vector is one weight of each of 8 groups, and nothing is ever
 * added across lanes. The C form takes one group after the other and specifies the results; the
 * AVX2 form, encode_fit_avx2.h, gives the same bits.
 *
 * A fit tries steps around the one that spans the group. For each it rounds the weights to codes q,
 * in units of the step y = q + r, and solves the least squares problem y = (1 + a) q + b for these
 * codes: that moves the step and the offset to where the codes want them, and says what squared
 * error would remain,
 *     b = (sum r sum q^2 - sum q sum rq) / (sum 1 sum q^2 - (sum q)^2)          affine, else 0
 *     a = (sum rq - b sum q) / sum q^2
 *     error = sum r^2 - a sum rq - b (2 sum r - a sum q - b sum 1)
 * where each sum is weighted by what an error costs. Rounds with the best step so far follow.
 * Must never: use a number outside the tile's groups, or depend on how groups are combined. */
#ifndef MOE_CONVERT_ENCODE_FIT_H
#define MOE_CONVERT_ENCODE_FIT_H

#include <float.h>

#ifndef MOE_CORE_BASE_H
#include "../moe.c"
#endif

enum { FIT_LANES = 8, FIT_MAX_GROUP = 32 };

typedef struct fit_tile {
    _Alignas(32) float x[FIT_MAX_GROUP][FIT_LANES]; // [weight of the group][group]
    _Alignas(32) float w[FIT_MAX_GROUP][FIT_LANES]; // what its squared error costs
    int n;         // weights of a group
    bool weighted; // false: each w is 1
} fit_tile;

/* One number for each group of a tile. */
typedef struct fit_lanes {
    _Alignas(32) float v[FIT_LANES];
} fit_lanes;

/* How to look for a step. `first`, first + step, ... are the codes to which the largest weight
 * (affine: the span) is mapped. */
typedef struct fit_search {
    float first, step;
    int n;           // of these
    bool both_signs; // and of their negatives
    int n_rounds;    // with the best scale so far
} fit_search;

/* What the codes of a type stand for: integers from low to high, or the table of IQ4_NL. */
typedef struct fit_levels {
    float low, high;
    bool iq4;
} fit_levels;

/* Scales of a superblock: step = d * s with an integer s from s_min to s_max. */
typedef struct fit_scales {
    float d, d_min;    // d_min: of the offset, -d_min * m with m from 0 to s_max
    float s_min, s_max;
    int n_near;        // how far from the nearest s to look
} fit_scales;

/* Tiles in, lanes out. */
typedef struct fit_ops {
    /* x[g], w[g]: where the n weights of group g stand. w: NULL leaves the tile's w alone. */
    void (*load)(fit_tile *t, const float *const x[8], const float *const w[8], int n);
    /* x = scale * level, scale of either sign */
    void (*linear)(const fit_tile *t, const fit_levels *v, const fit_search *how, fit_lanes *scale);
    /* x = scale * code + offset, codes 0..high, scale >= 0; `negative`: offset <= 0 */
    void (*affine)(const fit_tile *t, float high, bool negative, const fit_search *how,
                   fit_lanes *scale, fit_lanes *offset);
    /* The power of two for MXFP4: x = scale * mxfp4_value. */
    void (*mxfp4)(const fit_tile *t, fit_lanes *scale);
    /* From scales to integers s whose steps leave the least error; -offset to m likewise. */
    void (*linear_int)(const fit_tile *t, const fit_levels *v, const fit_scales *how,
                       const fit_lanes *scale, fit_lanes *s);
    void (*affine_int)(const fit_tile *t, float high, const fit_scales *how, const fit_lanes *scale,
                       const fit_lanes *offset, fit_lanes *s, fit_lanes *m);
    /* The codes of n weights that stand one after another, n a multiple of 16:
     * (x + add) / step rounded to low..high, minus low. */
    void (*codes)(const float *x, int n, float add, float inverse, const fit_levels *v,
                  uint8_t *code);
    void (*mxfp4_codes)(const float *x, int n, float inverse, uint8_t *code);
} fit_ops;

/* -------------------------------------------------------------------------------- numbers -- */

/* These are what the instructions of the same names do, also with NaN: then the second operand. */
MOE_INLINE float fit_max(float a, float b)
{
    return a > b ? a : b;
}

MOE_INLINE float fit_min(float a, float b)
{
    return a < b ? a : b;
}

/* To the nearest integer, even ones between two; |x| < 2^22, where floats of this size have no
 * fraction. */
MOE_INLINE float fit_round(float x)
{
    return (x + 12582912.0f) - 12582912.0f;
}

/* 1 / x, and 0 where that is not finite. */
MOE_INLINE float fit_inverse(float x)
{
    const float y = 1.0f / x;
    return fabsf(y) <= FLT_MAX ? y : 0.0f;
}

/* a / b where b > 0, else 0. */
MOE_INLINE float fit_ratio(float a, float b)
{
    return b > 0 ? a / b : 0.0f;
}

/* The borders between neighbours of iq4_value. */
static const float fit_iq4_border[15] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f,
                                         7,       19,     31.5f, 45.5f, 61, 79,  101};

MOE_INLINE int fit_iq4_code(float y)
{
    int i = y > fit_iq4_border[7] ? 8 : 0;
    i += y > fit_iq4_border[i + 3] ? 4 : 0;
    i += y > fit_iq4_border[i + 1] ? 2 : 0;
    return i + (y > fit_iq4_border[i]);
}

MOE_INLINE float fit_level(float y, const fit_levels *v)
{
    if (v->iq4)
        return (float)iq4_value[fit_iq4_code(y)];
    return fit_round(fit_min(fit_max(y, v->low), v->high));
}

/* The magnitude in mxfp4_value nearest to y >= 0: steps of 1 below 4, of 2 below 8, then of 4. */
MOE_INLINE float fit_mxfp4_level(float y)
{
    const float top = fit_min(y, 12);
    if (top < 4)
        return fit_round(top);
    return top < 8 ? fit_round(top * 0.5f) * 2 : fit_round(top * 0.25f) * 4;
}

/* Try k of a search: what to multiply weights with. `unit` belongs to the span, `scale` is the best
 * so far. */
MOE_INLINE float fit_try(const fit_search *how, int k, float unit, float scale)
{
    const int n = how->both_signs ? 2 * how->n : how->n;
    if (k >= n)
        return fit_inverse(scale);
    const float code = fmaf((float)(how->both_signs ? k / 2 : k), how->step, how->first);
    return (how->both_signs && k % 2 ? -code : code) * unit;
}

MOE_INLINE int fit_n_tries(const fit_search *how)
{
    return (how->both_signs ? 2 * how->n : how->n) + how->n_rounds;
}

/* ---------------------------------------------------------------------- C: the specification -- */

static void fit_load_c(fit_tile *t, const float *const x[8], const float *const w[8], int n)
{
    t->n = n;
    for (int g = 0; g < FIT_LANES; g++)
        for (int i = 0; i < n; i++) {
            t->x[i][g] = x[g][i];
            if (w)
                t->w[i][g] = w[g][i];
        }
}

static float fit_linear_group(const fit_tile *t, int g, const fit_levels *v, const fit_search *how)
{
    float peak = 0, best = INFINITY, scale = 0;
    for (int i = 0; i < t->n; i++)
        peak = fabsf(t->x[i][g]) > fabsf(peak) ? t->x[i][g] : peak;
    const float unit = fit_inverse(peak);
    for (int k = 0; k < fit_n_tries(how); k++) {
        const float inverse = fit_try(how, k, unit, scale);
        float qq = 0, rq = 0, rr = 0;
        for (int i = 0; i < t->n; i++) {
            const float y = t->x[i][g] * inverse, w = t->w[i][g];
            const float q = fit_level(y, v), r = y - q, wr = w * r;
            qq = fmaf(w * q, q, qq);
            rq = fmaf(wr, q, rq);
            rr = fmaf(wr, r, rr);
        }
        const float step = fit_inverse(inverse), a = fit_ratio(rq, qq);
        const float error = step * step * fmaf(-a, rq, rr);
        if (error < best) {
            best = error;
            scale = fmaf(step, a, step);
        }
    }
    return scale;
}

static void fit_linear_c(const fit_tile *t, const fit_levels *v, const fit_search *how,
                         fit_lanes *scale)
{
    for (int g = 0; g < FIT_LANES; g++)
        scale->v[g] = fit_linear_group(t, g, v, how);
}

static void fit_affine_group(const fit_tile *t, int g, float top, bool negative,
                             const fit_search *how, float *scale, float *offset)
{
    float low = negative ? 0 : t->x[0][g], high = t->x[0][g], sw = 0, best = INFINITY;
    for (int i = 0; i < t->n; i++) {
        low = fit_min(t->x[i][g], low);
        high = fit_max(t->x[i][g], high);
        sw += t->w[i][g];
    }
    const float unit = fit_inverse(high - low);
    *scale = 0;
    *offset = low;
    for (int k = 0; k < fit_n_tries(how); k++) {
        const float inverse = fit_try(how, k, unit, *scale);
        const float zero = -(k < how->n ? low : *offset) * inverse; // y where x is 0
        float sq = 0, qq = 0, sr = 0, rq = 0, rr = 0;
        for (int i = 0; i < t->n; i++) {
            const float y = fmaf(t->x[i][g], inverse, zero), w = t->w[i][g];
            const float q = fit_round(fit_min(fit_max(y, 0), top)), r = y - q;
            const float wq = w * q, wr = w * r;
            sq += wq;
            sr += wr;
            qq = fmaf(wq, q, qq);
            rq = fmaf(wr, q, rq);
            rr = fmaf(wr, r, rr);
        }
        const float step = fit_inverse(inverse), det = fmaf(sw, qq, -(sq * sq));
        float b = fit_ratio(fmaf(sr, qq, -(sq * rq)), det);
        if (negative)
            b = fit_min(b, zero);
        const float a = fit_ratio(fmaf(-b, sq, rq), qq);
        const float twice = fmaf(-b, sw, fmaf(-a, sq, sr + sr));
        const float error = step * step * fmaf(-b, twice, fmaf(-a, rq, rr));
        if (error < best && step > 0) {
            best = error;
            *scale = fmaf(step, a, step);
            *offset = (b - zero) * step;
        }
    }
}

static void fit_affine_c(const fit_tile *t, float high, bool negative, const fit_search *how,
                         fit_lanes *scale, fit_lanes *offset)
{
    for (int g = 0; g < FIT_LANES; g++)
        fit_affine_group(t, g, high, negative, how, &scale->v[g], &offset->v[g]);
}

/* The standard's exponent and its neighbours. */
static float fit_mxfp4_group(const fit_tile *t, int g)
{
    float peak = 0, best = INFINITY, scale = 0;
    for (int i = 0; i < t->n; i++)
        peak = fit_max(fabsf(t->x[i][g]), peak);
    const float power = f32_of_bits(bits_of_f32(peak) & 0x7f800000);
    for (int k = 0; k < 3; k++) {
        const float step = power * (0.25f / (float)(1 << k)), inverse = fit_inverse(step);
        float rr = 0;
        for (int i = 0; i < t->n; i++) {
            const float y = fabsf(t->x[i][g]) * inverse, r = y - fit_mxfp4_level(y);
            rr = fmaf(t->w[i][g] * r, r, rr);
        }
        const float error = step * step * rr;
        if (error < best) {
            best = error;
            scale = step;
        }
    }
    return scale;
}

static void fit_mxfp4_c(const fit_tile *t, fit_lanes *scale)
{
    for (int g = 0; g < FIT_LANES; g++)
        scale->v[g] = fit_mxfp4_group(t, g);
}

static float fit_linear_int_group(const fit_tile *t, int g, const fit_levels *v,
                                  const fit_scales *how, float scale)
{
    const float s_min = how->s_min, s_max = how->s_max;
    const float near = fit_round(fit_min(fit_max(scale * fit_inverse(how->d), s_min), s_max));
    float best = INFINITY, best_s = 0;
    for (int k = -how->n_near; k <= how->n_near; k++) {
        const float s = fit_min(fit_max(near + (float)k, s_min), s_max);
        const float step = how->d * s, inverse = fit_inverse(step);
        float error = 0;
        for (int i = 0; i < t->n; i++) {
            const float x = t->x[i][g], r = fmaf(-step, fit_level(x * inverse, v), x);
            error = fmaf(t->w[i][g] * r, r, error);
        }
        if (error < best) {
            best = error;
            best_s = s;
        }
    }
    return best_s;
}

static void fit_linear_int_c(const fit_tile *t, const fit_levels *v, const fit_scales *how,
                             const fit_lanes *scale, fit_lanes *s)
{
    for (int g = 0; g < FIT_LANES; g++)
        s->v[g] = fit_linear_int_group(t, g, v, how, scale->v[g]);
}

/* For each step: the nearest m, then the one that its codes want. */
static void fit_affine_int_group(const fit_tile *t, int g, float top, const fit_scales *how,
                                 float scale, float offset, float *best_s, float *best_m)
{
    const float per_d = fit_inverse(how->d), per_min = fit_inverse(how->d_min), s_max = how->s_max;
    const float near = fit_round(fit_min(fit_max(scale * per_d, 0), s_max));
    const float near_m = fit_round(fit_min(fit_max(-offset * per_min, 0), s_max));
    float best = INFINITY, sw = 0;
    for (int i = 0; i < t->n; i++)
        sw += t->w[i][g];
    *best_s = *best_m = 0;
    for (int k = -how->n_near; k <= how->n_near; k++) {
        const float s = fit_min(fit_max(near + (float)k, 0), s_max);
        const float step = how->d * s, inverse = fit_inverse(step);
        float m = near_m;
        for (int turn = 0; turn < 2; turn++) {
            const float add = how->d_min * m;
            float sr = 0, error = 0;
            for (int i = 0; i < t->n; i++) {
                const float x = t->x[i][g] + add;
                const float q = fit_round(fit_min(fit_max(x * inverse, 0), top));
                const float r = fmaf(-step, q, x), wr = t->w[i][g] * r;
                sr += wr;
                error = fmaf(wr, r, error);
            }
            if (error < best) {
                best = error;
                *best_s = s;
                *best_m = m;
            }
            m = (add - fit_ratio(sr, sw)) * per_min;
            m = fit_round(fit_min(fit_max(m, 0), s_max));
        }
    }
}

static void fit_affine_int_c(const fit_tile *t, float high, const fit_scales *how,
                             const fit_lanes *scale, const fit_lanes *offset, fit_lanes *s,
                             fit_lanes *m)
{
    for (int g = 0; g < FIT_LANES; g++)
        fit_affine_int_group(t, g, high, how, scale->v[g], offset->v[g], &s->v[g], &m->v[g]);
}

static void fit_codes_c(const float *x, int n, float add, float inverse, const fit_levels *v,
                        uint8_t *code)
{
    for (int i = 0; i < n; i++) {
        const float y = (x[i] + add) * inverse;
        code[i] = (uint8_t)(v->iq4 ? fit_iq4_code(y) : (int)(fit_level(y, v) - v->low));
    }
}

static void fit_mxfp4_codes_c(const float *x, int n, float inverse, uint8_t *code)
{
    static const uint8_t of_level[13] = {0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7};
    for (int i = 0; i < n; i++) {
        const int level = (int)fit_mxfp4_level(fabsf(x[i]) * inverse);
        code[i] = (uint8_t)(of_level[level] | (x[i] < 0 ? 8 : 0));
    }
}

static const fit_ops fit_ops_c = {fit_load_c,       fit_linear_c,     fit_affine_c, fit_mxfp4_c,
                                  fit_linear_int_c, fit_affine_int_c, fit_codes_c,
                                  fit_mxfp4_codes_c};

#endif
