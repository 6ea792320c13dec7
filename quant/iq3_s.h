/* quant/iq3_s.h - IQ3_S: 256 weights in 110 bytes, 3.4375 bits per weight.
 *
 *     byte 0      2                66         74          106        110
 *          | d    | qs             | qh       | signs     | scales   |
 *          | f16  | 64 bytes       | 8 bytes  | 32 bytes  | 4 bytes  |
 *
 * Of weights 4i .. 4i + 3, qs[i] and, above, bit i mod 8 of qh[i / 8] are the place in grid_iq3_s
 * (magnitudes 1, 3, ... 15). signs[i] has a bit for each negative one of weights 8i .. 8i + 7. 8
 * groups of 32 weights have scales s: nibbles, the low one first.
 *
 *     weight = d (2 s + 1) (+- magnitude)             exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ3_S_H
#define MOE_QUANT_IQ3_S_H

#include "grid.h"

typedef struct iq3_s_block {
    uint8_t d[2]; // f16
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
} iq3_s_block;
_Static_assert(sizeof(iq3_s_block) == 110, "as in the file");

static const grid_list iq3_s_list = {grid_iq3_s, 512, 4, 32, 15, 1, 15, false, 0};

static void iq3_s_pack(uint8_t *to, const grid_parts *parts)
{
    iq3_s_block *block = (iq3_s_block *)to;
    memcpy(block->d, &parts->d, 2);
    memcpy(block->signs, parts->sign, 32);
    memset(block->qh, 0, sizeof block->qh);
    for (int i = 0; i < 64; i++) {
        block->qs[i] = (uint8_t)parts->index[i];
        block->qh[i / 8] = (uint8_t)(block->qh[i / 8] | parts->index[i] >> 8 << i % 8);
    }
    grid_put_nibbles(block->scales, parts->scale, 8);
}

static void iq3_s_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq3_s_list, sizeof(iq3_s_block), iq3_s_pack);
}

static void iq3_s_codes(const uint8_t *from, size_t half, uint8_t code[128],
                        uint64_t sign[2])
{
    const iq3_s_block *block = (const iq3_s_block *)from;
    const uint8_t *qs = block->qs + 32 * half, *qh = block->qh + 4 * half;
    memcpy(sign, block->signs + 16 * half, 16);
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++, code += 4)
            memcpy(code, &grid_iq3_s[*qs++ | (qh[i] >> j & 1u) << 8], 4);
}

static void iq3_s_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales8(grid_u32(((const iq3_s_block *)block)->scales), scale);
}

static float iq3_s_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block));
}

GRID_KERNELS(iq3_s, true, 32, 15, u6)
GRID_QUANT(iq3_s, "IQ3_S", 21, 1, 1, 64, 8, 32, 4)

#endif
