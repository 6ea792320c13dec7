/* convert/encode_k.h - quantizers of the types with superblocks of 256 weights. A superblock is one
 * tile of 8 groups of 32 or two of 8 groups of 16.
 *
 * First each group gets the scale that fits it best, whatever it is. The largest decides the scale
 * of the superblock, in which the others are small integers. Then each group tries the integers
 * near what it wants: their steps are coarse enough that the next one is often better. */
#ifndef MOE_CONVERT_ENCODE_K_H
#define MOE_CONVERT_ENCODE_K_H

#include "encode_32.h"

enum { ENCODE_K_TILES = 2 }; // at most

typedef struct encode_k {
    const moe_quant *quant;
    int n_group;
    fit_levels levels;
    float s_min, s_max;         // integers that scales become
    fit_search plain, weighted; // without and with importance
    int n_near, n_near_weighted;
    void (*superblock)(const fit_ops *ops, const struct encode_k *type, const fit_tile *t,
                       const float *x, uint8_t *block); // x [256], the same in t
    void (*pack_affine)(const k_affine *k, uint8_t *block);
    void (*pack_linear)(const k_linear *k, uint8_t *block);
} encode_k;

static const fit_search *encode_k_search(const encode_k *type, const fit_tile *t)
{
    return t->weighted ? &type->weighted : &type->plain;
}

static void encode_k_affine(const fit_ops *ops, const encode_k *type, const fit_tile *t,
                            const float *x, uint8_t *block)
{
    const int n = K_LEN / type->n_group, n_tiles = type->n_group / FIT_LANES;
    fit_lanes scale[ENCODE_K_TILES], offset[ENCODE_K_TILES], s, m;
    float peak = 0, deepest = 0;
    k_affine k;
    for (int i = 0; i < n_tiles; i++) {
        ops->affine(&t[i], type->levels.high, true, encode_k_search(type, t), &scale[i],
                    &offset[i]);
        for (int g = 0; g < FIT_LANES; g++) {
            peak = fit_max(scale[i].v[g], peak);
            deepest = fit_max(-offset[i].v[g], deepest);
        }
    }
    k.d = f32_of_f16(encode_f16(peak / type->s_max));
    k.dmin = f32_of_f16(encode_f16(deepest / type->s_max));
    const fit_scales how = {k.d, k.dmin, 0, type->s_max,
                            t->weighted ? type->n_near_weighted : type->n_near};
    for (int i = 0; i < n_tiles; i++) {
        ops->affine_int(&t[i], type->levels.high, &how, &scale[i], &offset[i], &s, &m);
        for (int g = 0; g < FIT_LANES; g++) {
            const int at = i * FIT_LANES + g;
            k.scale[at] = (uint8_t)s.v[g];
            k.min[at] = (uint8_t)m.v[g];
            ops->codes(x + at * n, n, k.dmin * m.v[g], fit_inverse(k.d * s.v[g]), &type->levels,
                       k.q + at * n);
        }
    }
    type->pack_affine(&k, block);
}

static void encode_k_linear(const fit_ops *ops, const encode_k *type, const fit_tile *t,
                            const float *x, uint8_t *block)
{
    const int n = K_LEN / type->n_group, n_tiles = type->n_group / FIT_LANES;
    fit_lanes scale[ENCODE_K_TILES], s;
    float peak = 0;
    k_linear k;
    for (int i = 0; i < n_tiles; i++) {
        ops->linear(&t[i], &type->levels, encode_k_search(type, t), &scale[i]);
        for (int g = 0; g < FIT_LANES; g++)
            peak = fabsf(scale[i].v[g]) > fabsf(peak) ? scale[i].v[g] : peak;
    }
    k.d = f32_of_f16(encode_f16(peak / type->s_min));
    const fit_scales how = {k.d, 0, type->s_min, type->s_max,
                            t->weighted ? type->n_near_weighted : type->n_near};
    for (int i = 0; i < n_tiles; i++) {
        ops->linear_int(&t[i], &type->levels, &how, &scale[i], &s);
        for (int g = 0; g < FIT_LANES; g++) {
            const int at = i * FIT_LANES + g;
            k.scale[at] = (int8_t)s.v[g];
            ops->codes(x + at * n, n, 0, fit_inverse(k.d * s.v[g]), &type->levels, k.q + at * n);
        }
    }
    type->pack_linear(&k, block);
}

/* ---------------------------------------------------------------------------------- types -- */

static void encode_pack_q2_k(const k_affine *k, uint8_t *block)
{
    q2_k_pack((q2_k_block *)block, k);
}

static void encode_pack_q4_k(const k_affine *k, uint8_t *block)
{
    q4_k_pack((q4_k_block *)block, k);
}

static void encode_pack_q5_k(const k_affine *k, uint8_t *block)
{
    q5_k_pack((q5_k_block *)block, k);
}

static void encode_pack_q3_k(const k_linear *k, uint8_t *block)
{
    q3_k_pack((q3_k_block *)block, k);
}

static void encode_pack_q6_k(const k_linear *k, uint8_t *block)
{
    q6_k_pack((q6_k_block *)block, k);
}

static void encode_pack_iq4_xs(const k_linear *k, uint8_t *block)
{
    iq4_xs_pack((iq4_xs_block *)block, k);
}

static const encode_k encode_q2_k = {
    &quant_q2_k, 16, {0, 3, false}, 0, 15, {1.8f, 0.15f, 12, false, 2},
    {1.8f, 0.15f, 12, false, 2}, 1, 1, encode_k_affine, encode_pack_q2_k, NULL};
static const encode_k encode_q4_k = {
    &quant_q4_k, 8, {0, 15, false}, 0, 63, {12.75f, 0.375f, 10, false, 1},
    {12.5f, 0.25f, 14, false, 1}, 1, 1, encode_k_affine, encode_pack_q4_k, NULL};
static const encode_k encode_q5_k = {
    &quant_q5_k, 8, {0, 31, false}, 0, 63, {28, 0.5f, 8, false, 1}, {28, 0.5f, 10, false, 1},
    2, 2, encode_k_affine, encode_pack_q5_k, NULL};
static const encode_k encode_q3_k = {
    &quant_q3_k, 16, {-4, 3, false}, -32, 31, {-5, 0.25f, 8, false, 1},
    {-5.25f, 0.25f, 11, true, 1}, 1, 2, encode_k_linear, NULL, encode_pack_q3_k};
static const encode_k encode_q6_k = {
    &quant_q6_k, 16, {-32, 31, false}, -128, 127, {-38, 1, 13, false, 0}, {-38, 1, 13, false, 0},
    3, 3, encode_k_linear, NULL, encode_pack_q6_k};
static const encode_k encode_iq4_xs = {
    &quant_iq4_xs, 8, {0, 15, true}, -32, 31, {-155, 7, 9, true, 1}, {-155, 7, 9, true, 1},
    2, 2, encode_k_linear, NULL, encode_pack_iq4_xs};

static void encode_superblocks(const fit_ops *ops, const encode_k *type, const float *src,
                               const float *importance, uint8_t *dst, size_t n_row, size_t n_in)
{
    const size_t n = n_row * n_in / K_LEN, per_row = n_in / K_LEN;
    const int n_tiles = type->n_group / FIT_LANES, len = K_LEN / type->n_group;
    fit_tile t[ENCODE_K_TILES];
    for (int i = 0; i < n_tiles; i++) {
        t[i].weighted = importance != NULL;
        for (int j = 0; j < len * FIT_LANES && !importance; j++)
            t[i].w[j / FIT_LANES][j % FIT_LANES] = 1;
    }
    for (size_t b = 0; b < n; b++) {
        for (int i = 0; i < n_tiles; i++) {
            const float *x[FIT_LANES], *w[FIT_LANES];
            for (int g = 0; g < FIT_LANES; g++) {
                const size_t at = (size_t)((i * FIT_LANES + g) * len);
                x[g] = src + b * K_LEN + at;
                w[g] = importance ? importance + b % per_row * K_LEN + at : NULL;
            }
            ops->load(&t[i], x, importance ? w : NULL, len);
        }
        type->superblock(ops, type, t, src + b * K_LEN, dst + b * type->quant->block_bytes);
    }
}

#endif
