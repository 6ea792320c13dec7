/* convert/encoders.h - the quantizers of the converter: rows of floats to blocks of a type.
 *
 * quant/<type>.h has a reference quantizer for each type. The ones here replace them in the
 * converter: they are faster, come nearer to the source, and heed how much each column matters.
 * Must never: depend on the machine, the number of threads, or how rows are cut into calls. The
 * same floats become the same bytes everywhere. */
#ifndef MOE_CONVERT_ENCODERS_H
#define MOE_CONVERT_ENCODERS_H

#include "encode_32.h"
#include "encode_fit_avx2.h"
#include "encode_k.h"

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

#define ENCODER(name, body, ops)                                                                   \
    static void encoder_##name##_##ops(const float *src, const float *importance, uint8_t *dst,    \
                                       size_t n_row, size_t n_in)                                  \
    {                                                                                              \
        body(&fit_ops_##ops, &encode_##name, src, importance, dst, n_row, n_in);                   \
    }
#if MOE_X86
#define ENCODERS(name, body) ENCODER(name, body, c) ENCODER(name, body, avx2)
#define ENCODER_AVX2(name) encoder_##name##_avx2
#else
#define ENCODERS(name, body) ENCODER(name, body, c)
#define ENCODER_AVX2(name) NULL
#endif
ENCODERS(q4_0, encode_blocks32)
ENCODERS(q4_1, encode_blocks32)
ENCODERS(q5_0, encode_blocks32)
ENCODERS(q5_1, encode_blocks32)
ENCODERS(q8_0, encode_blocks32)
ENCODERS(iq4_nl, encode_blocks32)
ENCODERS(mxfp4, encode_blocks32)
ENCODERS(q2_k, encode_superblocks)
ENCODERS(q3_k, encode_superblocks)
ENCODERS(q4_k, encode_superblocks)
ENCODERS(q5_k, encode_superblocks)
ENCODERS(q6_k, encode_superblocks)
ENCODERS(iq4_xs, encode_superblocks)

/* The quantizer of a type, for a machine with these moe_cpu bits. */
static encode_fn *encoder_select(const moe_quant *quant, uint32_t cpu)
{
#define ROW(name) {&quant_##name, encoder_##name##_c, ENCODER_AVX2(name)}
    static const struct { const moe_quant *quant; encode_fn *c, *avx2; } searching[] = {
        ROW(q4_0), ROW(q4_1), ROW(q5_0), ROW(q5_1), ROW(q8_0), ROW(iq4_nl), ROW(mxfp4),
        ROW(q2_k), ROW(q3_k), ROW(q4_k), ROW(q5_k), ROW(q6_k), ROW(iq4_xs)};
#undef ROW
    static const struct { uint32_t id; encode_fn *encode; } reference[] = {
#define X(NAME, name, id) {id, encoder_##name},
#include "../quant/types.def"
#undef X
    };
    for (size_t i = 0; i < MOE_COUNT(searching); i++)
        if (searching[i].quant == quant)
            return searching[i].avx2 && cpu & MOE_CPU_AVX2 ? searching[i].avx2 : searching[i].c;
    for (size_t i = 0; i < MOE_COUNT(reference); i++)
        if (reference[i].id == quant->id)
            return reference[i].encode;
    return NULL; // not reached: the table has every type
}

MOE_UNUSED static encode_fn *encoder_for(const moe_quant *quant)
{
    return encoder_select(quant, cpu_detect());
}

#endif
