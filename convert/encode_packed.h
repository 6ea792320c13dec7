/* convert/encode_packed.h - codes and scales that stand apart, as in checkpoints -> blocks as GGUF
 * has them, or floats.
 *
 * Codes are in the order of the columns, the first one in the lowest bits. The blocks hold the same
 * codes in another order, and the same scales, if F16 can: those of Q4_0 and Q8_0. */
#ifndef MOE_CONVERT_ENCODE_PACKED_H
#define MOE_CONVERT_ENCODE_PACKED_H

#include "convert.h"

/* The bytes of a row of codes, and of its scales where each row has its own. */
static uint64_t packed_row_bytes(const conv_input *in, uint64_t row_len, uint64_t *scales)
{
    *scales = 0;
    if (in->apart == APART_INT) {
        *scales = row_len / in->scale_cols * in->scale_type->block_bytes;
        return in->type == &quant_q4_0 ? row_len / 2 : row_len;
    }
    if (in->apart) {
        *scales = row_len / (in->apart == APART_NVFP4 ? 16 : 32);
        return row_len / 2;
    }
    return in->type ? row_len * in->type->block_bytes : row_len;
}

/* Code i of a row. */
MOE_INLINE uint8_t packed_nibble(const uint8_t *codes, uint64_t i)
{
    return i & 1 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
}

/* Scale i of a row. */
static float packed_scale(const moe_quant *type, const uint8_t *scales, uint64_t i)
{
    float x;
    type->dequantize(scales + i * type->block_bytes, &x, 1);
    return x;
}

/* Scales of an FP8 matrix for one line of its blocks. */
static uint64_t packed_fp8_scales(const conv_input *in, uint64_t row_len)
{
    return (row_len + in->scale_cols - 1) / in->scale_cols;
}

/* n weights of a row of integers, from column `first` on. */
static void packed_floats(const conv_input *in, const uint8_t *codes, const uint8_t *scales,
                          uint64_t first, float *dst, uint64_t n)
{
    const bool nibbles = in->type == &quant_q4_0;
    float scale = 0;
    for (uint64_t k = 0; k < n; k++) {
        const uint64_t i = first + k;
        if (!k || i % in->scale_cols == 0)
            scale = packed_scale(in->scale_type, scales, i / in->scale_cols);
        dst[k] = scale * (float)(nibbles ? packed_nibble(codes, i) - 8 : codes[i] - 128);
    }
}

/* 32 codes as a block of Q4_0 or Q8_0. Returns whether any stands for a number other than 0. */
static bool packed_block(const moe_quant *type, const uint8_t *codes, uint64_t first, uint16_t d,
                         uint8_t *dst)
{
    uint8_t code[32];
    const bool nibbles = type == &quant_q4_0;
    bool any = false;
    for (uint64_t k = 0; k < 32; k++) {
        code[k] = nibbles ? packed_nibble(codes, first + k) : codes[first + k];
        any |= code[k] != (nibbles ? 8 : 128);
    }
    if (nibbles) {
        q4_0_pack((q4_0_block *)(void *)dst, d, code);
        return any;
    }
    q8_0_block *block = (q8_0_block *)(void *)dst;
    memcpy(block->d, &d, sizeof d);
    for (size_t k = 0; k < 32; k++)
        block->q[k] = (int8_t)(code[k] - 128);
    return any;
}

/* 64 weights of NVFP4: 32 bytes of codes and 4 scales. */
static void packed_nvfp4(const uint8_t *codes, const uint8_t scales[4], nvfp4_block *block)
{
    for (size_t g = 0; g < 4; g++) {
        block->s[g] = scales[g];
        for (size_t k = 0; k < 8; k++)
            block->q[g][k] = (uint8_t)(packed_nibble(codes, 16 * g + k) |
                                       packed_nibble(codes, 16 * g + 8 + k) << 4);
    }
}

/* The byte of GGUF's NVFP4 for a scale in E4M3, which has a sign; -1: it stands for a NaN, -2: it
 * is negative. */
static int packed_nvfp4_scale(uint8_t code)
{
    if ((code & 127) == 127)
        return -1;
    return code > 128 ? -2 : code & 127;
}

#endif
