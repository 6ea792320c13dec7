/* quant/iq2_xxs.h - IQ2_XXS: 256 weights in 66 bytes, 2.0625 bits per weight.
 *
 *     byte 0      2                                           66
 *          | d    | qs: 8 groups of 32 weights, 8 bytes each  |
 *          | f16  |  index[4] | u32                           |
 *
 * Of a group, index[j] is the place of weights 8j .. 8j + 7 in grid_iq2_xxs (magnitudes 8, 25, 43),
 * bits 7j .. 7j + 6 of the u32 their signs, of which an even number is negative, and its bits
 * 28..31 the scale s.
 *
 *     weight = d / 8 (2 s + 1) (+- magnitude)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ2_XXS_H
#define MOE_QUANT_IQ2_XXS_H

#include "grid.h"

typedef struct iq2_xxs_block {
    uint8_t d[2]; // f16
    uint8_t qs[64];
} iq2_xxs_block;
_Static_assert(sizeof(iq2_xxs_block) == 66, "as in the file");

static const grid_list iq2_xxs_list = {grid_iq2_xxs, 256, 8, 32, 15, 0.125f, 43, true, 0};

static void iq2_xxs_pack(uint8_t *to, const grid_parts *parts)
{
    iq2_xxs_block *block = (iq2_xxs_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int g = 0; g < 8; g++) {
        uint32_t rest = (uint32_t)parts->scale[g] << 28;
        for (int j = 0; j < 4; j++) {
            block->qs[8 * g + j] = (uint8_t)parts->index[4 * g + j];
            rest |= (parts->sign[4 * g + j] & 127u) << 7 * j;
        }
        memcpy(block->qs + 8 * g + 4, &rest, 4);
    }
}

static void iq2_xxs_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq2_xxs_list, sizeof(iq2_xxs_block), iq2_xxs_pack);
}

static void iq2_xxs_codes(const uint8_t *from, size_t half, uint8_t code[128],
                          uint64_t sign[2])
{
    const uint8_t *qs = ((const iq2_xxs_block *)from)->qs + 32 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++, qs += 16) {
        const uint64_t rest = grid_u32(qs + 4) | (uint64_t)grid_u32(qs + 12) << 32;
        sign[i] = grid_even_signs(grid_sevens(rest));
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++, code += 8)
            grid_put8(code, grid_iq2_xxs[qs[j / 4 * 8 + j % 4]]);
    }
}

static void iq2_xxs_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales8(grid_top_nibbles(((const iq2_xxs_block *)block)->qs + 4, 8), scale);
}

static float iq2_xxs_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

GRID_KERNELS(iq2_xxs, true, 32, 43, u7)
GRID_QUANT(iq2_xxs, "IQ2_XXS", 16, 1, 1, 64)

#endif
