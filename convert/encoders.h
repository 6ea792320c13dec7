/* convert/encoders.h - the quantizers of the converter: rows of floats to blocks of a type.
 *
 * quant/<type>.h has a reference quantizer for each type; what stands in the table below replaces it
 * here: faster, nearer to the source, and heeding how much each column matters.
 * Must never: depend on the machine, the number of threads, or how rows are cut into calls. The same
 * floats become the same bytes everywhere. */
#ifndef MOE_CONVERT_ENCODERS_H
#define MOE_CONVERT_ENCODERS_H

#include "convert.h"

/* src [n_row][n_in], finite; importance [n_in], >= 0, what a squared error in that column costs, or
 * NULL: all columns alike. dst [n_row][n_in / block_len blocks]. n_in is a multiple of the type's
 * block_len. */
typedef void encode_fn(const float *src, const float *importance, uint8_t *dst, size_t n_row,
                       size_t n_in);

/* The reference quantizers, which know no importance. */
#define X(NAME, name, id)                                                                          \
    static void encoder_##name(const float *src, const float *importance, uint8_t *dst,            \
                               size_t n_row, size_t n_in)                                          \
    {                                                                                              \
        (void)importance;                                                                          \
        const size_t row_bytes = n_in / quant_##name.block_len * quant_##name.block_bytes;         \
        for (size_t r = 0; r < n_row; r++)                                                         \
            quant_##name.quantize(src + r * n_in, dst + r * row_bytes, n_in);                      \
    }
#include "../quant/types.def"
#undef X

static encode_fn *encoder_for(const moe_quant *quant)
{
    static const struct { uint32_t id; encode_fn *encode; } encoders[] = {
#define X(NAME, name, id) {id, encoder_##name},
#include "../quant/types.def"
#undef X
    };
    for (size_t i = 0; i < MOE_COUNT(encoders); i++)
        if (encoders[i].id == quant->id)
            return encoders[i].encode;
    return NULL; // not reached: the table has every type
}

#endif
