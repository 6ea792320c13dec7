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
#include "encode_plain_x86.h"

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
ENCODERS(q8_0, encode_blocks32)
ENCODERS(iq4_nl, encode_blocks32)
ENCODERS(mxfp4, encode_blocks32)
ENCODERS(q2_k, encode_superblocks)
ENCODERS(q3_k, encode_superblocks)
ENCODERS(q4_k, encode_superblocks)
ENCODERS(q5_k, encode_superblocks)
ENCODERS(q6_k, encode_superblocks)
ENCODERS(iq4_xs, encode_superblocks)

/* Those that have a form of their own without importance. */
#define ENCODER_PLAIN(name, isa, ops)                                                              \
    static void encoder_##name##_##isa(const float *src, const float *importance, uint8_t *dst,    \
                                       size_t n_row, size_t n_in)                                  \
    {                                                                                              \
        if (importance)                                                                            \
            encode_blocks32(&fit_ops_##ops, &encode_##name, src, importance, dst, n_row, n_in);    \
        else                                                                                       \
            plain_blocks_##name##_##isa(src, dst, n_row * n_in / 32);                              \
    }
#if MOE_X86
#define ENCODERS_PLAIN(name)                                                                       \
    ENCODER_PLAIN(name, c, c) ENCODER_PLAIN(name, avx2, avx2) ENCODER_PLAIN(name, avx512, avx2)
#define ENCODER_AVX512(name) encoder_##name##_avx512
#else
#define ENCODERS_PLAIN(name) ENCODER_PLAIN(name, c, c)
#define ENCODER_AVX512(name) NULL
#endif
ENCODERS_PLAIN(q4_0)
ENCODERS_PLAIN(q4_1)
ENCODERS_PLAIN(q5_0)
ENCODERS_PLAIN(q5_1)

/* The quantizer of a type, for a machine with these moe_cpu bits. */
static encode_fn *encoder_select(const moe_quant *quant, uint32_t cpu)
{
#define ROW(name) {&quant_##name, encoder_##name##_c, ENCODER_AVX2(name), NULL}
#define ROW_512(name) {&quant_##name, encoder_##name##_c, ENCODER_AVX2(name), ENCODER_AVX512(name)}
    static const struct { const moe_quant *quant; encode_fn *c, *avx2, *avx512; } searching[] = {
        ROW_512(q4_0), ROW_512(q4_1), ROW_512(q5_0), ROW_512(q5_1), ROW(q8_0), ROW(iq4_nl),
        ROW(mxfp4), ROW(q2_k), ROW(q3_k), ROW(q4_k), ROW(q5_k), ROW(q6_k), ROW(iq4_xs)};
#undef ROW_512
#undef ROW
    static const struct { uint32_t id; encode_fn *encode; } reference[] = {
#define X(NAME, name, id) {id, encoder_##name},
#include "../quant/types.def"
#undef X
    };
    for (size_t i = 0; i < MOE_COUNT(searching); i++)
        if (searching[i].quant == quant && searching[i].avx2 && cpu & MOE_CPU_AVX2)
            return searching[i].avx512 && cpu & MOE_CPU_AVX512 ? searching[i].avx512
                                                               : searching[i].avx2;
        else if (searching[i].quant == quant)
            return searching[i].c;
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
