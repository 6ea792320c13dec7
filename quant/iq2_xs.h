/* quant/iq2_xs.h - IQ2_XS: 256 weights in 74 bytes, 2.3125 bits per weight.
 *
 *     byte 0      2                       66         74
 *          | d    | qs                    | scales   |
 *          | f16  | u16[32]               | 8 bytes  |
 *
 * Of weights 8i .. 8i + 7, bits 0..8 of qs[i] are the place in grid_iq2_xs (magnitudes 8, 25, 43),
 * bits 9..15 the signs, of which an even number is negative. 16 groups of 16 weights have scales s:
 * nibbles, the low one first.
 *
 *     weight = d / 8 (2 s + 1) (+- magnitude)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ2_XS_H
#define MOE_QUANT_IQ2_XS_H

#include "grid.h"

typedef struct iq2_xs_block {
    uint8_t d[2];   // f16
    uint8_t qs[64]; // u16[32]
    uint8_t scales[8];
} iq2_xs_block;
_Static_assert(sizeof(iq2_xs_block) == 74, "as in the file");

static const grid_list iq2_xs_list = {grid_iq2_xs, 512, 8, 16, 15, 0.125f, 43, true, 0};

static void iq2_xs_pack(uint8_t *to, const grid_parts *parts)
{
    iq2_xs_block *block = (iq2_xs_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int i = 0; i < 32; i++) {
        const uint16_t v = (uint16_t)(parts->index[i] | (parts->sign[i] & 127) << 9);
        memcpy(block->qs + 2 * i, &v, 2);
    }
    grid_put_nibbles(block->scales, parts->scale, 16);
}

static void iq2_xs_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq2_xs_list, sizeof(iq2_xs_block), iq2_xs_pack);
}

static void iq2_xs_codes(const uint8_t *from, size_t half, uint8_t code[128],
                         uint64_t sign[2])
{
    const uint8_t *qs = ((const iq2_xs_block *)from)->qs + 32 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        uint64_t sevens = 0;
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++, code += 8, qs += 2) {
            const uint32_t v = load_u16(qs);
            grid_put8(code, grid_iq2_xs[v & 511]);
            sevens |= (uint64_t)(v >> 9) << 8 * j;
        }
        sign[i] = grid_even_signs(sevens);
    }
}

static void iq2_xs_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales16(((const iq2_xs_block *)block)->scales, scale);
}

static float iq2_xs_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

GRID_KERNELS(iq2_xs, true, 16, 43, u7)
GRID_QUANT(iq2_xs, "IQ2_XS", 17, 1, 1, 64, 8)

#endif
