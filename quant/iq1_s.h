/* quant/iq1_s.h - IQ1_S: 256 weights in 50 bytes, 1.5625 bits per weight.
 *
 *     byte 0      2            34           50
 *          | d    | qs         | qh         |
 *          | f16  | 32 bytes   | u16[8]     |
 *
 * 8 groups g of 32 weights. Of weights 8j .. 8j + 7 of a group, qs[4 g + j] and, above, bits 3j ..
 * 3j + 2 of qh[g] are the place in grid_iq1 (-1, 0, 1). Bits 12..14 of qh[g] are the scale s; bit
 * 15 says that all weights are shifted by -1/8, instead of 1/8.
 *
 *     weight = d / 8 (2 s + 1) (8 point +- 1)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ1_S_H
#define MOE_QUANT_IQ1_S_H

#include "grid.h"

typedef struct iq1_s_block {
    uint8_t d[2]; // f16
    uint8_t qs[32];
    uint8_t qh[16]; // u16[8]
} iq1_s_block;
_Static_assert(sizeof(iq1_s_block) == 50, "as in the file");

static const grid_list iq1_s_list = {grid_iq1, 2048, 8, 32, 7, 0.125f, 12, false, 32};

static void iq1_s_pack(uint8_t *to, const grid_parts *parts)
{
    iq1_s_block *block = (iq1_s_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int g = 0; g < 8; g++) {
        uint32_t high = (uint32_t)parts->scale[g] << 12 | (parts->sign[4 * g] & 128u) << 8;
        for (int j = 0; j < 4; j++) {
            block->qs[4 * g + j] = (uint8_t)parts->index[4 * g + j];
            high |= (uint32_t)parts->index[4 * g + j] >> 8 << 3 * j;
        }
        memcpy(block->qh + 2 * g, &high, 2);
    }
}

static void iq1_s_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq1_s_list, sizeof(iq1_s_block), iq1_s_pack);
}

static void iq1_s_codes(const uint8_t *from, size_t half, uint8_t code[128],
                        uint64_t sign[2])
{
    const iq1_s_block *block = (const iq1_s_block *)from;
    const uint8_t *qs = block->qs + 16 * half, *qh = block->qh + 8 * half;
    (void)sign;
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++, code += 8) {
        const uint32_t high = load_u16(qh + i / 4 * 2);
        const uint32_t index = qs[i] | (high >> i % 4 * 3 & 7) << 8;
        grid_put_iq1(code, grid_iq1[index], high >> 15);
    }
}

static void iq1_s_scales(const uint8_t *block, int8_t scale[16])
{
    const uint8_t *qh = ((const iq1_s_block *)block)->qh;
    MOE_UNROLL
    for (size_t g = 0; g < 16; g += 2)
        scale[g] = scale[g + 1] = (int8_t)((qh[g + 1] >> 3 & 14) + 1);
}

static float iq1_s_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

GRID_KERNELS(iq1_s, false, 32, 9, u6)
GRID_QUANT(iq1_s, "IQ1_S", 19, 1, 1, 32, 16)

#endif
