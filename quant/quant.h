/* quant/quant.h - the contract between a quantization format and everything else.
 *
 * A format is one file, quant/<type>.h, and one line of quant/types.def. No other file knows how a
 * weight is stored: they go through the moe_quant table below. A `switch` over formats outside
 * quant/ is a bug.
 *
 * The numerics are specified so that they are the same bits on every instruction set, for one token
 * and for many:
 *   - Weights in an integer format are multiplied with int8 activations. The sum of products of a
 *     block is an exact integer, so its order does not matter.
 *   - Each block then takes part in the float result of a row through one fixed expression, block
 *     after block in ascending order, with explicit fused multiply-adds (fmaf). The expression is
 *     written at the top of the type's file and in its C kernel.
 *   - Weights in a float format are multiplied with float activations in 8 lanes: lane l sums the
 *     elements k = l mod 8 in ascending order with fmaf; then reduce8() adds the lanes. BF16, which
 *     has instructions of its own, takes activations in BF16 and sums them in an order of its own
 *     (bf16.h).
 * A vector kernel therefore equals the C kernel exactly, not approximately; the tests say so. */
#ifndef MOE_QUANT_QUANT_H
#define MOE_QUANT_QUANT_H

#include "../core/base.h"

/* --------------------------------------------------------------------------- activations -- */

/* The form in which a weight format wants its activations. */
typedef enum moe_act {
    MOE_ACT_F32,   /* float[n] */
    MOE_ACT_Q8_32, /* int8 with one scale per 32 elements */
    MOE_ACT_Q8_256, /* int8 with one scale per 256 elements */
    MOE_ACT_BF16   /* rounded to BF16 */
} moe_act;

enum { MOE_ACT_COUNT = MOE_ACT_BF16 + 1 };

/* One row of n int8 activations, as a struct of arrays inside one block of memory:
 *     float   scale[n_group]        x = scale * q; 0 if the whole group is 0
 *     int16_t sum[n_pad / 16]       sums of q over 16 elements
 *     int8_t  q[n_pad]              -127..127, never -128
 * n_pad is n rounded up to the group (32 or 256); the padding is 0. n_group = n_pad / group.
 * Each array starts at a multiple of 32 bytes. */
typedef struct moe_q8 {
    const float *scale;
    const int16_t *sum;
    const int8_t *q;
} moe_q8;

MOE_INLINE size_t act_group(moe_act act)
{
    return act == MOE_ACT_Q8_256 ? 256 : 32;
}

MOE_INLINE size_t act_sum_offset(moe_act act, size_t n)
{
    size_t group = act_group(act);
    return (size_t)align_up((n + group - 1) / group * sizeof(float), 32);
}

MOE_INLINE size_t act_q_offset(moe_act act, size_t n)
{
    size_t n_pad = (size_t)align_up(n, act_group(act));
    return act_sum_offset(act, n) + (size_t)align_up(n_pad / 16 * sizeof(int16_t), 32);
}

/* One row of n activations in BF16, x * 2^64 rounded to nearest even; 0 in the place of those below
 * 2^-50, infinite from 2^64 on. n_pad is n rounded up to 32; the padding is 0. Which of two forms
 * it has depends on the kernels that the processor's bits select:
 *     narrow, with MOE_CPU_AVX512_BF16: bf16 x[n_pad], what vdpbf16ps takes;
 *     wide, without: float x[n_pad], each BF16's value, in the order in which it is summed: of 16,
 *     the 8 odd ones first, then the 8 even ones. */
#define ACT_BF16_LEAST 0x1p-50f
#define ACT_BF16_SCALE 0x1p64f

/* Which element stands at a place of the wide form. */
MOE_INLINE size_t act_bf16_element(size_t place)
{
    return place / 16 * 16 + place % 8 * 2 + (place % 16 < 8);
}

/* Bytes of one row of n activations; a multiple of 32. Rows are stored one after another. Those of
 * floats are never a multiple of 1024 bytes apart, and of BF16 never of 256, so that those of many
 * tokens spread over the sets of a cache. */
MOE_INLINE size_t act_row_bytes(moe_act act, size_t n)
{
    if (act == MOE_ACT_F32 || act == MOE_ACT_BF16) {
        const size_t align = act == MOE_ACT_F32 ? 64 : 128;
        const size_t bytes = (size_t)align_up(n * sizeof(float), align);
        return bytes % (act == MOE_ACT_F32 ? 1024 : 256) ? bytes : bytes + 64;
    }
    return act_q_offset(act, n) + (size_t)align_up(n, act_group(act));
}

MOE_INLINE moe_q8 act_q8(moe_act act, const void *row, size_t n)
{
    const char *p = row;
    return (moe_q8){(const float *)p, (const int16_t *)(p + act_sum_offset(act, n)),
                    (const int8_t *)(p + act_q_offset(act, n))};
}

/* ------------------------------------------------------------------------------- kernels -- */

/* A tile of y = x * w^T:  y[t][r] = sum over k of w[r][k] * x[t][k]
 * Rows of weights are as they stand in a GGUF file: n_in / block_len blocks one after another. They
 * may start at any address. */
typedef struct moe_mm {
    const uint8_t *w;   // [n_row][w_stride bytes]
    size_t w_stride;    // bytes from row to row
    const uint8_t *x;   // [n_tok][x_stride bytes], in the format's moe_act, 32-byte aligned
    size_t x_stride;    // bytes from token to token
    float *y;           // [n_tok][y_stride floats]; n_row of each are written
    size_t y_stride;
    size_t n_in;        // length of a row, a multiple of the format's block length
    size_t n_row, n_tok;
    const uint8_t *next; // weights that are wanted after these, to be fetched before; NULL: those
                         // that follow in memory
} moe_mm;

/* Computes the tile. n_row, n_tok >= 1. Reads nothing outside the rows that it was given (fetching
 * is no reading) and writes nothing outside y. */
typedef void moe_mm_fn(const moe_mm *mm);

typedef struct moe_kernels {
    moe_mm_fn *gemv; /* one token: decode. n_tok is 1 */
    moe_mm_fn *gemm; /* any number of tokens: prefill. Rows are unpacked once per tile of tokens */
} moe_kernels;

/* What the machine has, as bits; detected once when a model is opened, cut down to the caller's
 * moe_isa. */
typedef enum moe_cpu {
    MOE_CPU_AVX2 = 1 << 0, /* AVX2 + FMA + F16C */
    MOE_CPU_AVX_VNNI = 1 << 1,
    MOE_CPU_AVX512 = 1 << 2, /* F, BW, VL, DQ */
    MOE_CPU_AVX512_VNNI = 1 << 3,
    MOE_CPU_NEON = 1 << 4,
    MOE_CPU_DOTPROD = 1 << 5,
    MOE_CPU_I8MM = 1 << 6,
    MOE_CPU_AVX512_BF16 = 1 << 7
} moe_cpu;

enum { MOE_CPU_END = 1 << 8 };

/* ------------------------------------------------------------------------------- formats -- */

enum { QUANT_MAX_FIELDS = 12 };

/* Ids from here on are types of this project's own, which GGUF does not have. The first ones were
 * those of drafts, whose blocks had other meanings: they are refused. */
enum { QUANT_OWN_ID = 4096, QUANT_TCQ_ID = 4099 };

typedef struct moe_quant {
    const char *name;     /* as in public use: "Q4_K" */
    uint32_t id;          /* GGUF's tensor type id, or an own one */
    uint32_t block_len;   /* weights per block */
    uint32_t block_bytes;
    moe_act act;
    double bits;          /* bits per weight */
    /* One row, from its beginning: what a block means may depend on the blocks before it. n is a
     * multiple of block_len. Any alignment. */
    void (*dequantize)(const void *blocks, float *dst, size_t n);
    /* One row. The reference quantizer: obvious rather than best. Finite input. */
    void (*quantize)(const float *src, void *blocks, size_t n);
    /* The best kernels for a set of moe_cpu bits: a ladder that starts from C. */
    moe_kernels (*select)(uint32_t cpu);
    /* What a block consists of, in order: widths in bytes, 0 after the last; their sum is
     * block_bytes. Bytes that are distributed alike are one field. Files that compress weights
     * gather each field of many blocks into a plane (docs/format.md): the widths are part of the
     * format. */
    uint8_t fields[QUANT_MAX_FIELDS];
    /* Codes of 5 bits have their highest in a field of its own. Planes hold them rotated to the
     * right by one, so that the four leading bits, which are skewed, are in one plane, and the
     * last, which is not, in the other. Changes n blocks in place; with `back`, to what they were.
     * NULL: the type has no such codes. */
    void (*rotate)(void *blocks, size_t n, bool back);
    /* Weights come in it as they are; moe-convert does not quantize to it, since its own types are
     * better at the same size. */
    bool given;
    /* In planes, the last field of a row's blocks may have another form: these n bytes are changed
     * in place. NULL: they stay as they are. to_plane is false, and the bytes are of no use, if the
     * row is none that from_plane could bring back. */
    bool (*to_plane)(uint8_t *field, size_t n);
    void (*from_plane)(uint8_t *field, size_t n);
} moe_quant;

/* Types are looked up by their GGUF id; NULL for an id that this build does not know. */
MOE_UNUSED static const moe_quant *quant_by_id(uint32_t id);
/* By name, without regard to case. */
MOE_UNUSED static const moe_quant *quant_by_name(const char *name);
/* Its place in quant_table, for tables with an entry for each type: ids have gaps. */
MOE_UNUSED static size_t quant_index(const moe_quant *quant);

/* ------------------------------------------------------------------- numbers in 16 bits -- */

MOE_INLINE uint32_t bits_of_f32(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

MOE_INLINE float f32_of_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

MOE_INLINE uint16_t load_u16(const void *p)
{
    uint16_t u;
    memcpy(&u, p, 2);
    return u;
}

MOE_INLINE float f32_of_bf16(uint16_t h)
{
    return f32_of_bits((uint32_t)h << 16);
}

/* IEEE 754 binary16 to binary32; exact. */
MOE_INLINE float f32_of_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t rest = h & 0x7fff;
    if (rest >= 0x7c00) /* infinity, NaN: the exponent becomes all ones, the payload moves up */
        return f32_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13 |
                           ((rest & 0x3ff) ? 1u << 22 : 0));
    if (rest < 0x400) /* subnormal: rest * 2^-24 */
        return f32_of_bits(sign | bits_of_f32((float)rest * 0x1p-24f));
    return f32_of_bits(sign | ((rest << 13) + (112u << 23)));
}

/* binary32 to binary16, round to nearest even, as the F16C and NEON instructions do. */
MOE_INLINE uint16_t f16_of_f32(float x)
{
    uint32_t u = bits_of_f32(x);
    uint32_t sign = u >> 16 & 0x8000;
    uint32_t a = u & 0x7fffffff;
    if (a > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (a >> 13 & 0x1ff));
    if (a >= 0x477ff000) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000) /* below 2^-14: the unit in the last place is 2^-24; 0.5 aligns it */
        return (uint16_t)(sign | (bits_of_f32(f32_of_bits(a) + 0.5f) - 0x3f000000));
    a += 0xfff + (a >> 13 & 1);
    return (uint16_t)(sign | (a - (112u << 23)) >> 13);
}

/* Round to nearest even. NaN stays NaN. */
MOE_INLINE uint16_t bf16_of_f32(float x)
{
    uint32_t u = bits_of_f32(x);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* The sum of 8 lanes, in the one order that all kernels use. */
MOE_INLINE float reduce8(const float lane[8])
{
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

#endif
