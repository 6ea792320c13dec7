/* quant/k.h - what the formats with superblocks of 256 weights share: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
 * IQ4_XS.
 *
 * A superblock is divided into groups of 16 or 32 weights. Each group has a small integer scale
 * and, in some formats, a small integer minimum; one or two 16-bit floats per superblock turn these
 * integers into numbers. Here are the packing of the 6-bit scales and the searches of the reference
 * quantizers. x86_k.h has the loops around the AVX2 kernels. */
#ifndef MOE_QUANT_K_H
#define MOE_QUANT_K_H

#include "common.h"

enum { K_LEN = 256 }; /* weights of a superblock */

/* -------------------------------------------------------------------- 6-bit scales, minima -- */

/* Q4_K and Q5_K keep 8 scales s and 8 minima m of 6 bits in 12 bytes (highest bit on the left; the
 * digit is the group):
 *     byte i = 0..3    s[i+4] bits 5,4 | s[i] bits 5..0
 *     byte 4 + i       m[i+4] bits 5,4 | m[i] bits 5..0
 *     byte 8 + i       m[i+4] bits 3..0 | s[i+4] bits 3..0 */
MOE_INLINE void k_get_scale_min(const uint8_t p[12], int group, int *scale, int *min)
{
    if (group < 4) {
        *scale = p[group] & 63;
        *min = p[group + 4] & 63;
    } else {
        *scale = (p[group + 4] & 15) | (p[group - 4] >> 6) << 4;
        *min = p[group + 4] >> 4 | (p[group] >> 6) << 4;
    }
}

/* The inverse, for all groups at once. */
MOE_UNUSED static void k_put_scales_mins(uint8_t p[12], const uint8_t scale[8],
                                         const uint8_t min[8])
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(scale[i] | (scale[i + 4] >> 4) << 6);
        p[i + 4] = (uint8_t)(min[i] | (min[i + 4] >> 4) << 6);
        p[i + 8] = (uint8_t)((scale[i + 4] & 15) | (min[i + 4] & 15) << 4);
    }
}

/* ------------------------------------------------------------------------------ quantizing -- */

/* The nearest integer in [min, max]. */
MOE_INLINE int k_round(float x, int min, int max)
{
    return (int)lrintf(fminf(fmaxf(x, (float)min), (float)max));
}

MOE_INLINE void k_put_f16(uint8_t dst[2], float x)
{
    uint16_t h = quant_scale(x);
    memcpy(dst, &h, 2);
}

/* 1 / x, and 0 where that is not a finite number. */
MOE_INLINE float k_inverse(float x)
{
    float y = 1.0f / x;
    return isfinite(y) ? y : 0.0f;
}

/* The scale and minimum, both >= 0, of the least squares fit x = scale * q - min to given codes q,
 * and the fit's squared error. */
static double k_fit_affine_to(const float *x, const uint8_t *q, int n, float *scale, float *min)
{
    double sum_x = 0, sum_q = 0, sum_qq = 0, sum_qx = 0;
    for (int i = 0; i < n; i++) {
        sum_x += x[i];
        sum_q += q[i];
        sum_qq += q[i] * q[i];
        sum_qx = fma(q[i], x[i], sum_qx);
    }
    double a = 0, b = 0, det = fma(n, sum_qq, -(sum_q * sum_q));
    if (det > 0) {
        a = fma(n, sum_qx, -(sum_q * sum_x)) / det;
        b = fma(a, sum_q, -sum_x) / n;
    }
    if (b < 0 || det <= 0) {
        b = 0;
        a = sum_qq > 0 ? sum_qx / sum_qq : 0;
    }
    *scale = (float)fmax(a, 0);
    *min = (float)b;
    double error = 0;
    for (int i = 0; i < n; i++) {
        double e = fma(*scale, q[i], -(double)*min) - x[i];
        error = fma(e, e, error);
    }
    return error;
}

/* Finds scale and min, both >= 0, so that x[i] is near scale * q[i] - min with codes q in 0..q_max.
 * Tries steps a little finer and coarser than (max - min) / q_max, which cut off or leave unused
 * the ends of the range, and fits by least squares to each. n <= 32. */
MOE_UNUSED static void k_fit_affine(const float *x, int n, int q_max, float *scale, float *min)
{
    enum { N_TRY = 12 };
    float low = 0, high = x[0];
    for (int i = 0; i < n; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    *scale = 0;
    *min = 0 - low; /* not -low: never -0, which is no larger and no smaller than 0 */
    if (!(high > low))
        return;
    double best = INFINITY;
    for (int k = 0; k <= N_TRY; k++) {
        float steps = fmaf(0.15f, (float)(k - N_TRY / 2), (float)q_max);
        float inverse = k_inverse((high - low) / steps);
        uint8_t q[32];
        for (int i = 0; i < n; i++)
            q[i] = (uint8_t)k_round((x[i] - low) * inverse, 0, q_max);
        float s, m;
        double error = k_fit_affine_to(x, q, n, &s, &m);
        if (error < best) {
            best = error;
            *scale = s;
            *min = m;
        }
    }
}

/* The scale, of either sign, so that x[i] is near scale * q[i] with codes q in q_min..q_max. */
MOE_UNUSED static float k_fit_linear(const float *x, int n, int q_min, int q_max)
{
    enum { N_TRY = 12 };
    float peak = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > fabsf(peak))
            peak = x[i];
    double best = 0;
    float scale = 0;
    for (int k = 0; k < 2 * (N_TRY + 1); k++) {
        float steps = (float)(k % 2 ? q_min : q_max);
        steps = fmaf(steps, 0.025f * (float)(k / 2 - N_TRY / 2), steps);
        float inverse = k_inverse(peak / steps);
        double sum_qx = 0, sum_qq = 0;
        for (int i = 0; i < n; i++) {
            int q = k_round(x[i] * inverse, q_min, q_max);
            sum_qx = fma(q, x[i], sum_qx);
            sum_qq += q * q;
        }
        /* the squared error is sum x^2 - gain */
        double gain = sum_qq > 0 ? sum_qx * sum_qx / sum_qq : 0;
        if (gain > best) {
            best = gain;
            scale = (float)(sum_qx / sum_qq);
        }
    }
    return scale;
}

/* The superblock's part of the formats with minima: from 256 weights to integer scales and minima
 * of n_group groups, d and dmin as they will be read back, and codes. */
typedef struct k_affine {
    float d, dmin;
    uint8_t scale[16], min[16]; // [n_group]
    uint8_t q[K_LEN];
} k_affine;

MOE_UNUSED static void k_quantize_affine(const float *src, int n_group, int q_max, int scale_max,
                                         k_affine *out)
{
    int len = K_LEN / n_group;
    float scale[16], min[16], scale_peak = 0, min_peak = 0;
    for (int g = 0; g < n_group; g++) {
        k_fit_affine(src + g * len, len, q_max, &scale[g], &min[g]);
        scale_peak = fmaxf(scale_peak, scale[g]);
        min_peak = fmaxf(min_peak, min[g]);
    }
    out->d = f32_of_f16(quant_scale(scale_peak / (float)scale_max));
    out->dmin = f32_of_f16(quant_scale(min_peak / (float)scale_max));
    for (int g = 0; g < n_group; g++) {
        out->scale[g] = (uint8_t)k_round(scale[g] * k_inverse(out->d), 0, scale_max);
        out->min[g] = (uint8_t)k_round(min[g] * k_inverse(out->dmin), 0, scale_max);
        float inverse = k_inverse(out->d * (float)out->scale[g]);
        float m = out->dmin * (float)out->min[g];
        for (int i = g * len; i < (g + 1) * len; i++)
            out->q[i] = (uint8_t)k_round((src[i] + m) * inverse, 0, q_max);
    }
}

/* The same for groups of 16 without minima. Codes are q - q_min, thus >= 0. */
typedef struct k_linear {
    float d;
    int8_t scale[16];
    uint8_t q[K_LEN];
} k_linear;

MOE_UNUSED static void k_quantize_linear(const float *src, int q_min, int q_max, int scale_min,
                                         int scale_max, k_linear *out)
{
    float scale[16], peak = 0;
    for (int g = 0; g < 16; g++) {
        scale[g] = k_fit_linear(src + 16 * g, 16, q_min, q_max);
        if (fabsf(scale[g]) > fabsf(peak))
            peak = scale[g];
    }
    out->d = f32_of_f16(quant_scale(peak / (float)scale_min));
    for (int g = 0; g < 16; g++) {
        out->scale[g] = (int8_t)k_round(scale[g] * k_inverse(out->d), scale_min, scale_max);
        float inverse = k_inverse(out->d * (float)out->scale[g]);
        for (int i = 16 * g; i < 16 * g + 16; i++)
            out->q[i] = (uint8_t)(k_round(src[i] * inverse, q_min, q_max) - q_min);
    }
}

#endif
