/* quant/common.h - the few lines of plain C that the formats share: the loop of the C kernels and
 * the rounding of the reference quantizers. */
#ifndef MOE_QUANT_COMMON_H
#define MOE_QUANT_COMMON_H

#include "quant.h"

/* The C kernels: every row with every token, through the one function that defines the product of a
 * row of weights and a packed row of activations. */
MOE_INLINE void mm_by_rows(const moe_mm *mm,
                           float (*dot)(const uint8_t *w, const uint8_t *x, size_t n_in))
{
    for (size_t t = 0; t < mm->n_tok; t++)
        for (size_t r = 0; r < mm->n_row; r++)
            mm->y[t * mm->y_stride + r] =
                dot(mm->w + r * mm->w_stride, mm->x + t * mm->x_stride, mm->n_in);
}

/* The largest number of binary16. */
#define QUANT_F16_MAX 65504.0f

/* A scale as it will be stored; what is too large for binary16 becomes its largest number. */
MOE_UNUSED static uint16_t quant_scale(float x)
{
    return f16_of_f32(fminf(fmaxf(x, -QUANT_F16_MAX), QUANT_F16_MAX));
}

/* x / d, rounded to the nearest integer in [min, max]; 0 (or the closest to it) if d is 0. */
MOE_UNUSED static int quant_round(float x, float d, int min, int max)
{
    const float v = d != 0 ? x / d : 0; /* may be infinite: d may be tiny */
    return (int)lrintf(fminf(fmaxf(v, (float)min), (float)max));
}

/* The number of the largest magnitude, with its sign. */
MOE_UNUSED static float quant_peak(const float *src, size_t n)
{
    float peak = 0;
    for (size_t k = 0; k < n; k++)
        if (fabsf(src[k]) > fabsf(peak))
            peak = src[k];
    return peak;
}

/* The scale and the offset of codes 0..max over the span of n weights: stored, and as they will be
 * read back. */
MOE_UNUSED static void quant_span(const float *src, size_t n, int max, uint8_t d_stored[2],
                                  uint8_t m_stored[2], float *d, float *m)
{
    float low = src[0], high = src[0];
    for (size_t k = 1; k < n; k++) {
        low = fminf(low, src[k]);
        high = fmaxf(high, src[k]);
    }
    const uint16_t d16 = quant_scale(high / (float)max - low / (float)max), m16 = quant_scale(low);
    memcpy(d_stored, &d16, 2);
    memcpy(m_stored, &m16, 2);
    *d = f32_of_f16(d16);
    *m = f32_of_f16(m16);
}

/* d * code + m. The product of 11 and at most 8 bits is exact: it does not matter whether a
 * compiler fuses the two. */
MOE_INLINE float quant_affine(float d, int code, float m)
{
    return d * (float)code + m;
}

/* The values that the codes of IQ4_NL and IQ4_XS stand for. */
MOE_UNUSED static const int8_t iq4_value[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                1,    13,   25,  38,  53,  69,  89,  113};

/* The index of the value nearest to x; the first of two equally near. */
MOE_UNUSED static int quant_nearest(float x, const int8_t *values, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (fabsf(x - (float)values[i]) < fabsf(x - (float)values[best]))
            best = i;
    return best;
}

#endif
