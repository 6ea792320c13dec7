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

/* The scale and the offset, as they are stored, of codes 0..max over the span of n weights. (Which
 * of 0 and -0 fminf() returns is the compiler's choice.) */
MOE_UNUSED static void quant_span(const float *src, size_t n, int max, uint16_t *d, uint16_t *m)
{
    float low = src[0], high = src[0];
    for (size_t k = 1; k < n; k++) {
        low = MOE_MIN(low, src[k]);
        high = MOE_MAX(high, src[k]);
    }
    *d = quant_scale(high / (float)max - low / (float)max);
    *m = quant_scale(low);
}

/* d * code + m. The product of 11 and at most 8 bits is exact: it does not matter whether a
 * compiler fuses the two. */
MOE_INLINE float quant_affine(float d, int code, float m)
{
    return d * (float)code + m;
}

/* 8 codes at a time, as the bytes of one number: packing them is a few shifts. */
MOE_INLINE uint64_t quant_codes8(const uint8_t *code)
{
    uint64_t v;
    memcpy(&v, code, 8);
    return v;
}

/* 32 codes as nibbles: the first 16 are the low ones. What codes have above their low 4 bits is cut
 * off. */
MOE_UNUSED static void quant_put_nibbles(uint8_t q[16], const uint8_t code[32])
{
    const uint64_t mask = 0x0f0f0f0f0f0f0f0f;
    for (int i = 0; i < 16; i += 8) {
        const uint64_t v = (quant_codes8(code + i) & mask) |
                           (quant_codes8(code + 16 + i) & mask) << 4;
        memcpy(q + i, &v, 8);
    }
}

/* The lowest bits of 8 bytes in one: the product gathers them in the top byte. */
MOE_INLINE uint8_t quant_gather8(uint64_t v)
{
    return (uint8_t)((v & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

/* And back: each byte keeps its own bit of 8 copies, and what is not 0 carries into the highest. */
MOE_INLINE uint64_t quant_spread8(uint8_t bits)
{
    const uint64_t own = bits * 0x0101010101010101u & 0x8040201008040201;
    return (own + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
}

/* The highest bits of 32 codes of 5 bits: bit k is that of code k. */
MOE_UNUSED static void quant_put_fifth(uint8_t qh[4], const uint8_t code[32])
{
    for (int i = 0; i < 4; i++)
        qh[i] = quant_gather8(quant_codes8(code + 8 * i) >> 4);
}

/* Rotates the 5 bits of 32 codes, which have four in q and the highest in qh, by one to the right,
 * or back. */
MOE_INLINE void quant_rotate_fifth(uint8_t qh[4], uint8_t q[16], bool back)
{
    for (int i = 0; i < 2; i++) {
        const uint64_t four = quant_codes8(q + 8 * i);
        const uint64_t fifth = quant_spread8(qh[i]) | quant_spread8(qh[i + 2]) << 4;
        const uint64_t out = back ? four >> 3 : four; // the bits that leave q
        const uint64_t in = back ? (four << 1 & 0xeeeeeeeeeeeeeeee) | fifth
                                 : (four >> 1 & 0x7777777777777777) | fifth << 3;
        memcpy(q + 8 * i, &in, 8);
        qh[i] = quant_gather8(out);
        qh[i + 2] = quant_gather8(out >> 4);
    }
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
