/* convert/encode_plain.h - Q4_0, Q4_1, Q5_0 and Q5_1 where all columns matter alike: quantizers
 * without importance, for many blocks in little time.
 *
 * The weights of a block are brought to the unit of their span (of their peak, where the type has
 * no offset). So a try, that is a way to map this unit to codes, is the same two numbers for all
 * blocks. For the codes q of a try, least squares give the scale, the offset and how much of the
 * sum of squares they explain,
 *     scale = (n sum xq - sum x sum q) / (n sum q^2 - (sum q)^2)            affine, else
 *     scale = sum xq / sum q^2
 * of which the numerator times the scale is the measure. Sums of codes are exact. The try that
 * explains most is rounded once more, with its own scale and offset.
 *
 * Tries that put the ends of a block between two codes are worth more than others with other steps:
 * four or five of these find as much as seven steps do. The C form takes one block after the other
 * and specifies the results; the vector forms have a block in each lane.
 * Must never: depend on how blocks are cut into calls. */
#ifndef MOE_CONVERT_ENCODE_PLAIN_H
#define MOE_CONVERT_ENCODE_PLAIN_H

#include "encode_32.h"

enum { PLAIN_TRIES = 6 };

typedef struct plain_type {
    const encode_32 *type;
    bool affine, fifth;     // has an offset; has a fifth bit
    float low, high;        // codes
    int n_tries;
    struct { float times, zero; } tries[PLAIN_TRIES]; // codes are x * times + zero
} plain_type;

/* Chosen one after the other, each as the one that lowers the error most beside those before, on
 * normal weights and on some with heavy tails. The first is the end of the codes, so that weights
 * which the type can represent come back as they were. */
static const plain_type plain_q4_0 = {
    &encode_q4_0, false, false, -8, 7, 5, {{-8, 0}, {-8.5f, 0}, {-7.25f, 0}, {-9, 0}, {-7.75f, 0}}};
static const plain_type plain_q4_1 = {
    &encode_q4_1, true, false, 0, 15, 4, {{15, 0}, {15.25f, -0.5f}, {15.5f, 0}, {14, 0}}};
static const plain_type plain_q5_0 = {
    &encode_q5_0, false, true, -16, 15, 4, {{-16, 0}, {-15, 0}, {-16.5f, 0}, {-14, 0}}};
static const plain_type plain_q5_1 = {
    &encode_q5_1, true, true, 0, 31, 6,
    {{31, 0}, {30.5f, 0.75f}, {31, 0.25f}, {31, -0.25f}, {29, 0}, {29.75f, 0.25f}}};

/* A block in its unit, and what fits it best so far. */
typedef struct plain_fit {
    float x[32], sum;
    float low, unit;             // of the weights as they are
    float scale, offset, gain;
} plain_fit;

static void plain_load_c(const plain_type *type, const float *x, plain_fit *fit)
{
    float low = x[0], high = x[0], half[2] = {0, 0};
    for (int i = 1; i < 32; i++) {
        low = fit_min(x[i], low);
        high = fit_max(x[i], high);
    }
    *fit = (plain_fit){.low = type->affine ? low : 0};
    fit->unit = type->affine ? high - low : high >= -low ? high : low;
    const float inverse = fit_inverse(fit->unit);
    for (int i = 0; i < 32; i++) {
        fit->x[i] = (x[i] - fit->low) * inverse;
        half[i / 16] = fmaf(x[i] - fit->low, inverse, half[i / 16]);
    }
    fit->sum = half[0] + half[1];
}

/* Codes are x * times + zero. */
static void plain_try_c(const plain_type *type, plain_fit *fit, float times, float zero)
{
    float q1[2] = {0, 0}, q2[2] = {0, 0}, xq[2] = {0, 0};
    for (int i = 0; i < 32; i++) {
        const float y = fmaf(fit->x[i], times, zero);
        const float q = fit_round(fit_min(fit_max(y, type->low), type->high));
        q1[i / 16] += q;
        q2[i / 16] = fmaf(q, q, q2[i / 16]);
        xq[i / 16] = fmaf(fit->x[i], q, xq[i / 16]);
    }
    const float sq = q1[0] + q1[1], qq = q2[0] + q2[1];
    float top = xq[0] + xq[1], bottom = qq;
    if (type->affine) {
        top = fmaf(32, top, -(fit->sum * sq));
        bottom = fmaf(32, bottom, -(sq * sq));
    }
    const float scale = fit_ratio(top, bottom), gain = scale * top;
    if (gain > fit->gain) {
        fit->gain = gain;
        fit->scale = scale;
        fit->offset = type->affine ? fmaf(-scale, sq, fit->sum) * 0.03125f : 0;
    }
}

static void plain_blocks_c(const plain_type *type, const float *x, uint8_t *dst, size_t n)
{
    plain_fit fit;
    for (size_t b = 0; b < n; b++, x += 32, dst += type->type->quant->block_bytes) {
        plain_load_c(type, x, &fit);
        for (int k = 0; k < type->n_tries; k++)
            plain_try_c(type, &fit, type->tries[k].times, type->tries[k].zero);
        const float inverse = fit_inverse(fit.scale);
        plain_try_c(type, &fit, inverse, -fit.offset * inverse);
        type->type->put(&fit_ops_c, type->type, x, fmaf(fit.scale, fit.unit, 0),
                        fmaf(fit.offset, fit.unit, fit.low), dst);
    }
}

#define PLAIN_BLOCKS_C(name)                                                                       \
    static void plain_blocks_##name##_c(const float *x, uint8_t *dst, size_t n)                    \
    {                                                                                              \
        plain_blocks_c(&plain_##name, x, dst, n);                                                  \
    }
PLAIN_BLOCKS_C(q4_0)
PLAIN_BLOCKS_C(q4_1)
PLAIN_BLOCKS_C(q5_0)
PLAIN_BLOCKS_C(q5_1)
#undef PLAIN_BLOCKS_C

#endif
