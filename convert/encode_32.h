/* convert/encode_32.h - quantizers of the types with blocks of 32 weights. A tile is 8 blocks,
 * which need not belong to one row. */
#ifndef MOE_CONVERT_ENCODE_32_H
#define MOE_CONVERT_ENCODE_32_H

#include "encode_fit.h"

typedef struct encode_32 encode_32;
struct encode_32 {
    const moe_quant *quant;
    fit_levels levels;
    fit_search plain, weighted; // without and with importance; plain.n = 0: encode_plain.h
    void (*fit)(const fit_ops *ops, const encode_32 *type, const fit_tile *t, fit_lanes *scale,
                fit_lanes *offset);
    /* x [32] */
    void (*put)(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                float offset, uint8_t *block);
};

/* A scale as it is stored: what is too large for binary16 becomes its largest number. */
MOE_INLINE uint16_t encode_f16(float x)
{
    return f16_of_f32(fit_min(fit_max(x, -QUANT_F16_MAX), QUANT_F16_MAX));
}

/* ----------------------------------------------------------------------------------- fits -- */

static void encode_fit_linear(const fit_ops *ops, const encode_32 *type, const fit_tile *t,
                              fit_lanes *scale, fit_lanes *offset)
{
    (void)offset;
    ops->linear(t, &type->levels, t->weighted ? &type->weighted : &type->plain, scale);
}

static void encode_fit_affine(const fit_ops *ops, const encode_32 *type, const fit_tile *t,
                              fit_lanes *scale, fit_lanes *offset)
{
    ops->affine(t, type->levels.high, false, t->weighted ? &type->weighted : &type->plain, scale,
                offset);
}

static void encode_fit_mxfp4(const fit_ops *ops, const encode_32 *type, const fit_tile *t,
                             fit_lanes *scale, fit_lanes *offset)
{
    (void)type;
    (void)offset;
    ops->mxfp4(t, scale);
}

/* --------------------------------------------------------------------------------- blocks -- */

/* The codes for a scale as it will be read back. */
static uint16_t encode_linear_codes(const fit_ops *ops, const encode_32 *type, const float *x,
                                    float scale, uint8_t code[32])
{
    const uint16_t d = encode_f16(scale);
    ops->codes(x, 32, 0, fit_inverse(f32_of_f16(d)), &type->levels, code);
    return d;
}

static void encode_put_q4_0(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                            float offset, uint8_t *block)
{
    uint8_t code[32];
    (void)offset;
    const uint16_t d = encode_linear_codes(ops, type, x, scale, code);
    q4_0_pack((q4_0_block *)block, d, code);
}

static void encode_put_q5_0(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                            float offset, uint8_t *block)
{
    uint8_t code[32];
    (void)offset;
    const uint16_t d = encode_linear_codes(ops, type, x, scale, code);
    q5_0_pack((q5_0_block *)block, d, code);
}

static void encode_put_q8_0(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                            float offset, uint8_t *block)
{
    uint8_t code[32];
    q8_0_block *b = (q8_0_block *)block;
    (void)offset;
    const uint16_t d = encode_linear_codes(ops, type, x, scale, code);
    memcpy(b->d, &d, 2);
    for (int k = 0; k < 32; k++)
        b->q[k] = (int8_t)(code[k] - 127);
}

static void encode_put_iq4_nl(const fit_ops *ops, const encode_32 *type, const float *x,
                              float scale, float offset, uint8_t *block)
{
    uint8_t code[32];
    (void)offset;
    const uint16_t d = encode_linear_codes(ops, type, x, scale, code);
    iq4_nl_pack((iq4_nl_block *)block, d, code);
}

static void encode_put_mxfp4(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                             float offset, uint8_t *block)
{
    uint8_t code[32];
    (void)type;
    (void)offset;
    const uint32_t e = (bits_of_f32(scale) >> 23) + 1; // mxfp4_scale(e) is scale
    ops->mxfp4_codes(x, 32, fit_inverse(mxfp4_scale((uint8_t)MOE_MIN(e, 254u))), code);
    mxfp4_pack((mxfp4_block *)block, (uint8_t)MOE_MIN(e, 254u), code);
}

/* The codes for a scale and an offset as they will be read back. */
static void encode_affine_codes(const fit_ops *ops, const encode_32 *type, const float *x,
                                uint16_t d, uint16_t m, uint8_t code[32])
{
    ops->codes(x, 32, -f32_of_f16(m), fit_inverse(f32_of_f16(d)), &type->levels, code);
}

static void encode_put_q4_1(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                            float offset, uint8_t *block)
{
    uint8_t code[32];
    const uint16_t d = encode_f16(scale), m = encode_f16(offset);
    encode_affine_codes(ops, type, x, d, m, code);
    q4_1_pack((q4_1_block *)block, d, m, code);
}

static void encode_put_q5_1(const fit_ops *ops, const encode_32 *type, const float *x, float scale,
                            float offset, uint8_t *block)
{
    uint8_t code[32];
    const uint16_t d = encode_f16(scale), m = encode_f16(offset);
    encode_affine_codes(ops, type, x, d, m, code);
    q5_1_pack((q5_1_block *)block, d, m, code);
}

/* ---------------------------------------------------------------------------------- types -- */

/* Searches are as wide as it pays on normal weights and on those of real models. Each contains the
 * end of the codes, so that weights which the type can represent come back as they were. */
static const encode_32 encode_q4_0 = {
    &quant_q4_0, {-8, 7, false}, {.n = 0}, {-10.5f, 0.5f, 9, true, 1},
    encode_fit_linear, encode_put_q4_0};
static const encode_32 encode_q5_0 = {
    &quant_q5_0, {-16, 15, false}, {.n = 0}, {-19, 0.5f, 10, false, 1},
    encode_fit_linear, encode_put_q5_0};
static const encode_32 encode_q8_0 = {
    &quant_q8_0, {-127, 127, false}, {-129, 2, 4, false, 0}, {-131, 2, 5, false, 0},
    encode_fit_linear, encode_put_q8_0};
static const encode_32 encode_q4_1 = {
    &quant_q4_1, {0, 15, false}, {.n = 0}, {12.5f, 0.25f, 14, false, 2},
    encode_fit_affine, encode_put_q4_1};
static const encode_32 encode_q5_1 = {
    &quant_q5_1, {0, 31, false}, {.n = 0}, {28, 0.5f, 10, false, 1},
    encode_fit_affine, encode_put_q5_1};
static const encode_32 encode_iq4_nl = {
    &quant_iq4_nl, {0, 15, true}, {-155, 7, 9, true, 1}, {-155, 7, 9, true, 1},
    encode_fit_linear, encode_put_iq4_nl};
static const encode_32 encode_mxfp4 = {
    &quant_mxfp4, {0, 12, false}, {.n = 0}, {.n = 0}, encode_fit_mxfp4, encode_put_mxfp4};

/* Blocks are a stream; a last tile repeats its last block. */
static void encode_blocks32(const fit_ops *ops, const encode_32 *type, const float *src,
                            const float *importance, uint8_t *dst, size_t n_row, size_t n_in)
{
    const size_t n = n_row * n_in / 32, per_row = n_in / 32, bytes = type->quant->block_bytes;
    fit_tile t;
    fit_lanes scale, offset = {{0}};
    t.weighted = importance != NULL;
    for (int i = 0; i < 32 * FIT_LANES && !importance; i++)
        t.w[i / FIT_LANES][i % FIT_LANES] = 1;
    for (size_t b = 0; b < n; b += FIT_LANES) {
        const float *x[FIT_LANES], *w[FIT_LANES];
        for (size_t g = 0; g < FIT_LANES; g++) {
            const size_t i = MOE_MIN(b + g, n - 1);
            x[g] = src + 32 * i;
            w[g] = importance ? importance + 32 * (i % per_row) : NULL;
        }
        ops->load(&t, x, importance ? w : NULL, 32);
        type->fit(ops, type, &t, &scale, &offset);
        for (size_t g = 0; g < MOE_MIN(n - b, (size_t)FIT_LANES); g++)
            type->put(ops, type, x[g], scale.v[g], offset.v[g], dst + (b + g) * bytes);
    }
}

#endif
