/* quant/arm.h - what the NEON kernels of all formats share: instructions that not all machines
 * have, the order of weights that each of them wants, sums across lanes, and the loops over rows,
 * blocks and tokens. A format with blocks of 32 weights brings two functions, struct arm32_format;
 * arm_k.h is for superblocks.
 *
 * Codes are unpacked to signed bytes, -128..127; activations are -127..127.
 *
 * One token (gemv). 4 rows side by side: each has one vector of partial sums, and three pairwise
 * additions turn the four vectors into one, in row order.
 *
 * Many tokens (gemm). A block of 8 rows is unpacked once per tile of tokens, in slices of 16 k,
 * which are 8 vectors. An engine knows their order and what it multiplies:
 *
 *     NEON     code[r]        16 k of row r; 16-bit products, two of which fit
 *     dotprod  code[2 i + h]  k 4i..4i+3 of rows 4h..4h+3; 4 activations are one lane of a vector,
 *                             so that the sums of 4 rows grow in the lanes of one vector
 *     i8mm     code[4 i + p]  k 8i..8i+7 of rows 2p and 2p+1; one instruction multiplies them with
 *                             8 activations of each of two tokens
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_ARM_H
#define MOE_QUANT_ARM_H

#include "quant.h"

#if MOE_ARM64
#include <arm_neon.h>

/* --------------------------------------------------------------------------- instructions -- */

/* acc += w x, for SDOT, for SDOT with one lane of x, and for SMMLA. Not by intrinsics: clang before
 * 16 has them only if the whole file is compiled for a machine that has the instructions. Not by
 * name with gcc: Debian's assemblers refuse the name below ARMv8.2, and a function for a later
 * architecture cannot take in the functions of an earlier one with other extensions. The symbols
 * make numbers of the registers' names. */
#ifdef __clang__
#define MOE_DOTPROD MOE_TARGET("dotprod")
#define MOE_I8MM MOE_TARGET("i8mm")
#define ARM_SDOT(acc, w, x) __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x))
#define ARM_SDOT_LANE(acc, w, x, lane)                                                            \
    __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(acc) : "w"(w), "w"(x))
#define ARM_SMMLA(acc, w, x) __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x))
#else
#define MOE_DOTPROD
#define MOE_I8MM
#define ARM_INST(code, acc, w, x)                                                                 \
    __asm__(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28," \
            "29,30,31\n\t.equ .Lmoe_v\\n,\\n\n\t.endr\n\t"                                        \
            ".inst " #code " + .Lmoe_%0 + (.Lmoe_%1 << 5) + (.Lmoe_%2 << 16)"                     \
            : "+w"(acc)                                                                           \
            : "w"(w), "w"(x))
#define ARM_SDOT(acc, w, x) ARM_INST(0x4e809400, acc, w, x)
#define ARM_SDOT_LANE(acc, w, x, lane)                                                            \
    ARM_INST(0x4f80e000 + ((lane & 1) << 21) + ((lane >> 1) << 11), acc, w, x)
#define ARM_SMMLA(acc, w, x) ARM_INST(0x4e80a400, acc, w, x)
#endif

/* acc + the products of 16 weights and activations, spread over the lanes: only the sum of the
 * lanes is meant. */
typedef int32x4_t arm_dot_fn(int32x4_t acc, int8x16_t w, int8x16_t x);

/* 2 * 128 * 127 = 32512 fits into 16 bits. */
MOE_INLINE int32x4_t arm_dot_neon(int32x4_t acc, int8x16_t w, int8x16_t x)
{
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    return vpadalq_s16(acc, vmlal_high_s8(low, w, x));
}

MOE_DOTPROD MOE_INLINE int32x4_t arm_dot_dotprod(int32x4_t acc, int8x16_t w, int8x16_t x)
{
    ARM_SDOT(acc, w, x);
    return acc;
}

/* ------------------------------------------------------------------------ loading, summing -- */

/* Where rows r .. r + n - 1 begin; those past the end are the last row once more. */
MOE_INLINE void arm_rows(const moe_mm *mm, size_t r, size_t n, const uint8_t **row)
{
    for (size_t i = 0; i < n; i++)
        row[i] = mm->w + MOE_MIN(r + i, mm->n_row - 1) * mm->w_stride;
}

/* 4 half-precision numbers. */
MOE_INLINE float32x4_t arm_f32_of_f16(uint16x4_t h)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(h));
}

/* The 16-bit word at `offset` of each of 4 rows. */
MOE_INLINE uint16x4_t arm_u16x4(const uint8_t *const row[4], size_t offset)
{
    uint16x4_t h = vdup_n_u16(load_u16(row[0] + offset));
    h = vset_lane_u16(load_u16(row[1] + offset), h, 1);
    h = vset_lane_u16(load_u16(row[2] + offset), h, 2);
    return vset_lane_u16(load_u16(row[3] + offset), h, 3);
}

/* The half-precision number there. */
MOE_INLINE float32x4_t arm_f16x4(const uint8_t *const row[4], size_t offset)
{
    return arm_f32_of_f16(arm_u16x4(row, offset));
}

/* Writes the results of n rows, 4 at most. */
MOE_INLINE void arm_store_rows(float *y, float32x4_t v, size_t n)
{
    if (MOE_LIKELY(n >= 4)) {
        vst1q_f32(y, v);
        return;
    }
    float lane[4];
    vst1q_f32(lane, v);
    for (size_t i = 0; i < n; i++)
        y[i] = lane[i];
}

/* The sum of the lanes of each of 4 vectors. */
MOE_INLINE int32x4_t arm_sum4(int32x4_t v0, int32x4_t v1, int32x4_t v2, int32x4_t v3)
{
    return vpaddq_s32(vpaddq_s32(v0, v1), vpaddq_s32(v2, v3));
}

/* Touches the cache lines of memory that will be needed; a hint, which no address can make fail. */
MOE_INLINE void arm_prefetch(uintptr_t address, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const void *)(address + i));
}

/* ------------------------------------------------------------------ codes of 1 to 5 bits -- */

/* 16 bytes: low nibbles are k 0..15, high nibbles k 16..31. */
MOE_INLINE void arm_nibbles(const uint8_t *p, int8x16_t code[2])
{
    const uint8x16_t v = vld1q_u8(p);
    code[0] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    code[1] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
}

/* Adds `value`, a bit that it does not have, to code k of a block if bit k of the 4 bytes at p is
 * set. */
MOE_INLINE void arm_bits(const uint8_t *p, uint8_t value, int8x16_t code[2])
{
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t v[2] = {vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1])),
                             vcombine_u8(vdup_n_u8(p[2]), vdup_n_u8(p[3]))};
    MOE_UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8x16_t set = vandq_u8(vtstq_u8(v[i], bit), vdupq_n_u8(value));
        code[i] = vorrq_s8(code[i], vreinterpretq_s8_u8(set));
    }
}

MOE_INLINE void arm_fifth_bits(const uint8_t *p, int8x16_t code[2])
{
    arm_bits(p, 16, code);
}

MOE_INLINE void arm_subtract(int8x16_t *code, size_t n, int8_t bias)
{
    MOE_UNROLL
    for (size_t i = 0; i < n; i++)
        code[i] = vsubq_s8(code[i], vdupq_n_s8(bias));
}

/* Replaces codes 0..15 by the table's values. */
MOE_INLINE void arm_look_up(int8x16_t *code, size_t n, const int8_t table[16])
{
    const int8x16_t t = vld1q_s8(table);
    MOE_UNROLL
    for (size_t i = 0; i < n; i++)
        code[i] = vqtbl1q_s8(t, vreinterpretq_u8_s8(code[i]));
}

/* --------------------------------------------------------------------------------- engines -- */

/* How one set of instructions multiplies 8 rows with tokens. `n_tok` is always a constant, n_tok of
 * the struct or 2, and there are 8 or fewer vectors of sums. */
typedef struct arm_engine {
    size_t n_tok;      // tokens at a time
    size_t n_sum;      // vectors of sums per token
    /* Brings 16 k of 8 rows into the order described at the top. */
    void (*pack)(const int8x16_t row[8], int8x16_t code[8]);
    /* sum += a slice times the 16 activations at q[t] + at */
    void (*dot)(const int8x16_t code[8], const int8_t *const *q, size_t at, size_t n_tok,
                int32x4_t *sum);
    /* sum += part * scale, with the scales of 8 rows */
    void (*scale)(const int32x4_t *part, const int32x4_t scale[2], size_t n_tok, int32x4_t *sum);
    /* out[t]: the sums of rows 0..3 and 4..7 */
    void (*finish)(const int32x4_t *sum, size_t n_tok, int32x4_t (*out)[2]);
} arm_engine;

MOE_INLINE void arm_neon_pack(const int8x16_t row[8], int8x16_t code[8])
{
    MOE_UNROLL
    for (size_t r = 0; r < 8; r++)
        code[r] = row[r];
}

MOE_INLINE void arm_neon_dot(const int8x16_t code[8], const int8_t *const *q, size_t at,
                             size_t n_tok, int32x4_t *sum)
{
    (void)n_tok;
    const int8x16_t x = vld1q_s8(q[0] + at);
    MOE_UNROLL
    for (size_t r = 0; r < 8; r++)
        sum[r] = arm_dot_neon(sum[r], code[r], x);
}

MOE_INLINE void arm_neon_scale(const int32x4_t *part, const int32x4_t scale[2], size_t n_tok,
                               int32x4_t *sum)
{
    (void)n_tok;
    MOE_UNROLL
    for (size_t h = 0; h < 2; h++) {
        sum[4 * h] = vmlaq_laneq_s32(sum[4 * h], part[4 * h], scale[h], 0);
        sum[4 * h + 1] = vmlaq_laneq_s32(sum[4 * h + 1], part[4 * h + 1], scale[h], 1);
        sum[4 * h + 2] = vmlaq_laneq_s32(sum[4 * h + 2], part[4 * h + 2], scale[h], 2);
        sum[4 * h + 3] = vmlaq_laneq_s32(sum[4 * h + 3], part[4 * h + 3], scale[h], 3);
    }
}

MOE_INLINE void arm_neon_finish(const int32x4_t *sum, size_t n_tok, int32x4_t (*out)[2])
{
    (void)n_tok;
    out[0][0] = arm_sum4(sum[0], sum[1], sum[2], sum[3]);
    out[0][1] = arm_sum4(sum[4], sum[5], sum[6], sum[7]);
}

static const arm_engine arm_neon = {1, 8, arm_neon_pack, arm_neon_dot, arm_neon_scale,
                                    arm_neon_finish};

/* Two transpositions of 4 x 4 words. */
MOE_INLINE void arm_dotprod_pack(const int8x16_t row[8], int8x16_t code[8])
{
    MOE_UNROLL
    for (size_t h = 0; h < 2; h++) {
        const int32x4_t a = vreinterpretq_s32_s8(row[4 * h]);
        const int32x4_t b = vreinterpretq_s32_s8(row[4 * h + 1]);
        const int32x4_t c = vreinterpretq_s32_s8(row[4 * h + 2]);
        const int32x4_t d = vreinterpretq_s32_s8(row[4 * h + 3]);
        const int64x2_t ab02 = vreinterpretq_s64_s32(vtrn1q_s32(a, b));
        const int64x2_t ab13 = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
        const int64x2_t cd02 = vreinterpretq_s64_s32(vtrn1q_s32(c, d));
        const int64x2_t cd13 = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
        code[h] = vreinterpretq_s8_s64(vtrn1q_s64(ab02, cd02));
        code[2 + h] = vreinterpretq_s8_s64(vtrn1q_s64(ab13, cd13));
        code[4 + h] = vreinterpretq_s8_s64(vtrn2q_s64(ab02, cd02));
        code[6 + h] = vreinterpretq_s8_s64(vtrn2q_s64(ab13, cd13));
    }
}

/* sum[2 t + h]; the lanes one after another, so that no instruction waits for the one before. */
MOE_DOTPROD MOE_INLINE void arm_dotprod_dot(const int8x16_t code[8], const int8_t *const *q,
                                            size_t at, size_t n_tok, int32x4_t *sum)
{
    int8x16_t x[4];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        x[t] = vld1q_s8(q[t] + at);
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        ARM_SDOT_LANE(sum[i], code[i % 2], x[i / 2], 0);
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        ARM_SDOT_LANE(sum[i], code[2 + i % 2], x[i / 2], 1);
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        ARM_SDOT_LANE(sum[i], code[4 + i % 2], x[i / 2], 2);
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        ARM_SDOT_LANE(sum[i], code[6 + i % 2], x[i / 2], 3);
}

MOE_INLINE void arm_dotprod_scale(const int32x4_t *part, const int32x4_t scale[2], size_t n_tok,
                                  int32x4_t *sum)
{
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        sum[i] = vmlaq_s32(sum[i], part[i], scale[i % 2]);
}

MOE_INLINE void arm_dotprod_finish(const int32x4_t *sum, size_t n_tok, int32x4_t (*out)[2])
{
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        out[i / 2][i % 2] = sum[i];
}

static const arm_engine arm_dotprod = {4, 2, arm_dotprod_pack, arm_dotprod_dot, arm_dotprod_scale,
                                       arm_dotprod_finish};

MOE_INLINE void arm_i8mm_pack(const int8x16_t row[8], int8x16_t code[8])
{
    MOE_UNROLL
    for (size_t p = 0; p < 4; p++) {
        const int64x2_t a = vreinterpretq_s64_s8(row[2 * p]);
        const int64x2_t b = vreinterpretq_s64_s8(row[2 * p + 1]);
        code[p] = vreinterpretq_s8_s64(vtrn1q_s64(a, b));
        code[4 + p] = vreinterpretq_s8_s64(vtrn2q_s64(a, b));
    }
}

/* sum[4 u + p]: rows 2p and 2p + 1, of each tokens 2u and 2u + 1. */
MOE_I8MM MOE_INLINE void arm_i8mm_dot(const int8x16_t code[8], const int8_t *const *q, size_t at,
                                      size_t n_tok, int32x4_t *sum)
{
    int64x2_t low[2], high[2]; /* k 0..7 and 8..15 of two tokens */
    MOE_UNROLL
    for (size_t u = 0; u < n_tok / 2; u++) {
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(q[2 * u] + at));
        const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(q[2 * u + 1] + at));
        low[u] = vtrn1q_s64(a, b);
        high[u] = vtrn2q_s64(a, b);
    }
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        ARM_SMMLA(sum[i], code[i % 4], low[i / 4]);
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        ARM_SMMLA(sum[i], code[4 + i % 4], high[i / 4]);
}

MOE_INLINE void arm_i8mm_scale(const int32x4_t *part, const int32x4_t scale[2], size_t n_tok,
                               int32x4_t *sum)
{
    const int32x4_t twice[4] = {vzip1q_s32(scale[0], scale[0]), vzip2q_s32(scale[0], scale[0]),
                                vzip1q_s32(scale[1], scale[1]), vzip2q_s32(scale[1], scale[1])};
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++)
        sum[i] = vmlaq_s32(sum[i], part[i], twice[i % 4]);
}

MOE_INLINE void arm_i8mm_finish(const int32x4_t *sum, size_t n_tok, int32x4_t (*out)[2])
{
    MOE_UNROLL
    for (size_t i = 0; i < n_tok; i++) {
        const int32x4_t a = sum[2 * i], b = sum[2 * i + 1];
        out[i / 2 * 2][i % 2] = vuzp1q_s32(a, b);
        out[i / 2 * 2 + 1][i % 2] = vuzp2q_s32(a, b);
    }
}

static const arm_engine arm_i8mm = {4, 2, arm_i8mm_pack, arm_i8mm_dot, arm_i8mm_scale,
                                    arm_i8mm_finish};

/* -------------------------------------------------------------------- blocks of 32 weights -- */

typedef struct arm32_format {
    size_t block_bytes;
    bool affine; /* the block has an offset, a half-precision number at byte 2 */
    /* Unpacks a block: k 0..15, k 16..31. */
    void (*codes)(const uint8_t *block, int8x16_t code[2]);
    /* The scales of the blocks at `offset` of 4 rows. */
    float32x4_t (*scales)(const uint8_t *const row[4], size_t offset);
    /* Longer blocks consist of n_part times 32 weights, and the format has these functions instead:
     * pair says that k 0..15 and 16..31 have a scale each, d[0] and d[1]; else d[0] is that of
     * all. */
    size_t n_part;
    bool pair;
    void (*part_codes)(const uint8_t *block, size_t part, int8x16_t code[2]);
    void (*part_scales)(const uint8_t *const row[4], size_t offset, size_t part, float32x4_t d[2]);
} arm32_format;

/* The part_scales of blocks that begin with one, a half-precision number, for all parts. */
MOE_INLINE void arm32_common_scale(const uint8_t *const row[4], size_t offset, size_t part,
                                   float32x4_t d[2])
{
    (void)part;
    d[0] = d[1] = arm_f16x4(row, offset);
}

/* Where the 32 weights number b of a row stand. */
MOE_INLINE size_t arm32_at(const arm32_format *f, size_t b)
{
    return (f->n_part ? b / f->n_part : b) * f->block_bytes;
}

MOE_INLINE void arm32_codes(const arm32_format *f, const uint8_t *row, size_t b, int8x16_t code[2])
{
    if (f->n_part)
        f->part_codes(row + arm32_at(f, b), b % f->n_part, code);
    else
        f->codes(row + arm32_at(f, b), code);
}

/* d, and m or what stands in its place. */
MOE_INLINE void arm32_scales(const arm32_format *f, const uint8_t *const row[4], size_t b,
                             float32x4_t d[2])
{
    const size_t at = arm32_at(f, b);
    if (f->n_part) {
        f->part_scales(row, at, b % f->n_part, d);
        return;
    }
    d[0] = f->scales(row, at);
    d[1] = f->affine ? arm_f16x4(row, at + 2) : d[0];
}

/* acc + the part of 32 weights of 4 rows: the expression of the formats. dot2 is that of k 16..31
 * of a pair. */
MOE_INLINE float32x4_t arm32_add(const arm32_format *f, int32x4_t dot, int32x4_t dot2,
                                 float32x4_t d, float32x4_t m, const moe_q8 *x, size_t b,
                                 float32x4_t acc)
{
    const float32x4_t x_scale = vld1q_dup_f32(x->scale + b);
    if (f->pair) {
        const float32x4_t first = vmulq_f32(d, vcvtq_f32_s32(dot));
        return vfmaq_f32(acc, x_scale, vfmaq_f32(first, m, vcvtq_f32_s32(dot2)));
    }
    acc = vfmaq_f32(acc, vmulq_f32(d, x_scale), vcvtq_f32_s32(dot));
    if (!f->affine)
        return acc;
    const float sum = (float)(x->sum[2 * b] + x->sum[2 * b + 1]);
    return vfmaq_f32(acc, vmulq_f32(m, x_scale), vdupq_n_f32(sum));
}

/* While 4 rows are multiplied the next 4, which follow in memory, are fetched as one stream: four
 * short ones are too many for some prefetchers. */
MOE_INLINE void arm32_gemv(const moe_mm *mm, const arm32_format *f, arm_dot_fn *dot)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / 32;
    for (size_t r = 0; r < mm->n_row; r += 4) {
        const uint8_t *row[4];
        arm_rows(mm, r, 4, row);
        float32x4_t acc = vdupq_n_f32(0);
        const uintptr_t next = (uintptr_t)row[0] + 4 * mm->w_stride;
        for (size_t b = 0; b < n_block; b++) {
            const int8x16_t x0 = vld1q_s8(x.q + 32 * b), x1 = vld1q_s8(x.q + 32 * b + 16);
            int32x4_t sum[4], sum2[4];
            if (!f->n_part || b % f->n_part == 0)
                arm_prefetch(next + 4 * arm32_at(f, b), 4 * f->block_bytes);
            MOE_UNROLL
            for (size_t i = 0; i < 4; i++) {
                int8x16_t code[2];
                arm32_codes(f, row[i], b, code);
                sum[i] = dot(vdupq_n_s32(0), code[0], x0);
                sum2[i] = dot(f->pair ? vdupq_n_s32(0) : sum[i], code[1], x1);
            }
            float32x4_t d[2];
            arm32_scales(f, row, b, d);
            const int32x4_t dot2 = arm_sum4(sum2[0], sum2[1], sum2[2], sum2[3]);
            const int32x4_t dot1 = f->pair ? arm_sum4(sum[0], sum[1], sum[2], sum[3]) : dot2;
            acc = arm32_add(f, dot1, dot2, d[0], d[1], &x, b, acc);
        }
        arm_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* 32 weights of 8 rows. */
typedef struct arm32_tile {
    int8x16_t code[16];     // two slices
    float32x4_t d[2][2];    // [row / 4] as arm32_scales() has them
} arm32_tile;

MOE_INLINE void arm32_load(const uint8_t *const row[8], size_t b, const arm32_format *f,
                           const arm_engine *e, arm32_tile *tile)
{
    int8x16_t low[8], high[8];
    MOE_UNROLL
    for (size_t r = 0; r < 8; r++) {
        int8x16_t code[2];
        arm32_codes(f, row[r], b, code);
        low[r] = code[0];
        high[r] = code[1];
    }
    e->pack(low, tile->code);
    e->pack(high, tile->code + 8);
    MOE_UNROLL
    for (size_t h = 0; h < 2; h++)
        arm32_scales(f, row + 4 * h, b, tile->d[h]);
}

/* acc[t] += tile * block b of token t, for n_tok (constant, <= 4) tokens. */
MOE_INLINE void arm32_step(const arm32_tile *tile, const moe_q8 *x, size_t b, size_t n_tok,
                           const arm32_format *f, const arm_engine *e, float32x4_t (*acc)[2])
{
    const int8_t *q[4];
    int32x4_t sum[8], dot[4][2], dot2[4][2];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        q[t] = x[t].q + 32 * b;
    MOE_UNROLL
    for (size_t i = 0; i < n_tok * e->n_sum; i++)
        sum[i] = vdupq_n_s32(0);
    e->dot(tile->code, q, 0, n_tok, sum);
    if (f->pair) {
        e->finish(sum, n_tok, dot);
        MOE_UNROLL
        for (size_t i = 0; i < n_tok * e->n_sum; i++)
            sum[i] = vdupq_n_s32(0);
    }
    e->dot(tile->code + 8, q, 16, n_tok, sum);
    e->finish(sum, n_tok, f->pair ? dot2 : dot);
    MOE_UNROLL
    for (size_t i = 0; i < 2 * n_tok; i++) {
        const size_t t = i / 2, h = i % 2;
        const float32x4_t *d = tile->d[h];
        acc[t][h] = arm32_add(f, dot[t][h], f->pair ? dot2[t][h] : dot[t][h], d[0], d[1], &x[t], b,
                              acc[t][h]);
    }
}

/* Tokens computed on one tile before the next is unpacked, and the number from which on a tile is
 * worth its unpacking. */
enum { ARM_TOKENS = 64, ARM_TOKENS_MIN = 4 };

/* The rows of n_tok <= ARM_TOKENS tokens from t0 on; where they are odd in number the last stands
 * twice, since remainders are computed in pairs. */
MOE_INLINE void arm_tokens(const moe_mm *mm, moe_act act, size_t t0, size_t n_tok,
                           moe_q8 x[ARM_TOKENS + 1])
{
    for (size_t t = 0; t <= n_tok; t++)
        x[t] = act_q8(act, mm->x + (t0 + MOE_MIN(t, n_tok - 1)) * mm->x_stride, mm->n_in);
}

MOE_INLINE void arm_store_tokens(const moe_mm *mm, size_t r, size_t t0, size_t n_tok,
                                 float32x4_t (*acc)[2])
{
    for (size_t t = 0; t < n_tok; t++) {
        float *y = mm->y + (t0 + t) * mm->y_stride + r;
        arm_store_rows(y, acc[t][0], mm->n_row - r);
        if (r + 4 < mm->n_row)
            arm_store_rows(y + 4, acc[t][1], mm->n_row - r - 4);
    }
}

/* Few tokens: one by one, on 4 rows at a time, which stay in the cache. */
MOE_INLINE void arm_gemm_few(const moe_mm *mm, moe_mm_fn *gemv)
{
    for (size_t r = 0; r < mm->n_row; r += 4)
        for (size_t t = 0; t < mm->n_tok; t++) {
            moe_mm part = *mm;
            part.w += r * mm->w_stride;
            part.x += t * mm->x_stride;
            part.y += t * mm->y_stride + r;
            part.n_row = MOE_MIN(mm->n_row - r, 4);
            part.n_tok = 1;
            gemv(&part);
        }
}

MOE_INLINE void arm32_gemm_tokens(const moe_mm *mm, size_t t0, size_t n_tok, const arm32_format *f,
                                  const arm_engine *e)
{
    moe_q8 x[ARM_TOKENS + 1];
    arm_tokens(mm, MOE_ACT_Q8_32, t0, n_tok, x);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        arm_rows(mm, r, 8, row);
        float32x4_t acc[ARM_TOKENS + 1][2];
        memset(acc, 0, (n_tok + 1) * sizeof acc[0]);
        const uintptr_t next = (uintptr_t)row[0] + 8 * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / 32; b++) {
            arm32_tile tile;
            if (!f->n_part || b % f->n_part == 0)
                arm_prefetch(next + 8 * arm32_at(f, b), 8 * f->block_bytes);
            arm32_load(row, b, f, e, &tile);
            size_t t = 0;
            for (; t + e->n_tok <= n_tok; t += e->n_tok)
                arm32_step(&tile, x + t, b, e->n_tok, f, e, acc + t);
            for (; e->n_tok > 2 && t < n_tok; t += 2)
                arm32_step(&tile, x + t, b, 2, f, e, acc + t);
        }
        arm_store_tokens(mm, r, t0, n_tok, acc);
    }
}

MOE_INLINE void arm32_gemm(const moe_mm *mm, const arm32_format *f, const arm_engine *e,
                           moe_mm_fn *gemv)
{
    if (mm->n_tok < ARM_TOKENS_MIN) {
        arm_gemm_few(mm, gemv);
        return;
    }
    for (size_t t = 0; t < mm->n_tok; t += ARM_TOKENS)
        arm32_gemm_tokens(mm, t, MOE_MIN(mm->n_tok - t, (size_t)ARM_TOKENS), f, e);
}

/* A format's kernels, made of its struct `type`_arm and the loops `loops`_gemv and `loops`_gemm,
 * and the ladder from `best` on. */
#define ARM_KERNELS(type, loops)                                                                  \
    static void type##_gemv_neon(const moe_mm *mm)                                                \
    {                                                                                             \
        loops##_gemv(mm, &type##_arm, arm_dot_neon);                                              \
    }                                                                                             \
    static void type##_gemm_neon(const moe_mm *mm)                                                \
    {                                                                                             \
        loops##_gemm(mm, &type##_arm, &arm_neon, type##_gemv_neon);                               \
    }                                                                                             \
    MOE_DOTPROD static void type##_gemv_dotprod(const moe_mm *mm)                                 \
    {                                                                                             \
        loops##_gemv(mm, &type##_arm, arm_dot_dotprod);                                           \
    }                                                                                             \
    MOE_DOTPROD static void type##_gemm_dotprod(const moe_mm *mm)                                 \
    {                                                                                             \
        loops##_gemm(mm, &type##_arm, &arm_dotprod, type##_gemv_dotprod);                         \
    }                                                                                             \
    MOE_I8MM static void type##_gemm_i8mm(const moe_mm *mm)                                       \
    {                                                                                             \
        loops##_gemm(mm, &type##_arm, &arm_i8mm, type##_gemv_dotprod);                            \
    }                                                                                             \
    static moe_kernels type##_select_arm(uint32_t cpu, moe_kernels best)                          \
    {                                                                                             \
        if (cpu & MOE_CPU_NEON)                                                                   \
            best = (moe_kernels){type##_gemv_neon, type##_gemm_neon};                             \
        if (cpu & MOE_CPU_DOTPROD)                                                                \
            best = (moe_kernels){type##_gemv_dotprod, type##_gemm_dotprod};                       \
        if (cpu & MOE_CPU_DOTPROD && cpu & MOE_CPU_I8MM)                                          \
            best.gemm = type##_gemm_i8mm;                                                         \
        return best;                                                                              \
    }

/* -------------------------------------------------------------------------- float weights -- */

/* What the kernels have to know of a type. */
typedef struct arm_float_type {
    size_t item_bytes; // of a weight
    size_t unit;       // weights of a row that are loaded at once: 8 or 16
    size_t vectors;    // of 8 floats that they become: 1 or 2
    float scale;       // the factor of the results
} arm_float_type;

/* A unit's vector v. */
typedef float32x4x2_t arm_load8_fn(const uint8_t *w, size_t v);

/* The result of a row, after its last n weights have entered the lanes: filled up to a unit with
 * -0, which meets activations that are 0 and so changes no sum. */
MOE_INLINE float arm_float_end(float lane[8], const uint8_t *w, const float *x, size_t n,
                               arm_float_type f, arm_load8_fn *load8)
{
    uint8_t copy[32] = {0};
    for (size_t i = f.item_bytes - 1; i < 32; i += f.item_bytes)
        copy[i] = 0x80;
    memcpy(copy, w, n * f.item_bytes);
    for (size_t v = 0; n && v < f.vectors; v++) {
        const float32x4x2_t last = load8(copy, v);
        vst1q_f32(lane, vfmaq_f32(vld1q_f32(lane), last.val[0], vld1q_f32(x + 8 * v)));
        vst1q_f32(lane + 4, vfmaq_f32(vld1q_f32(lane + 4), last.val[1], vld1q_f32(x + 8 * v + 4)));
    }
    return reduce8(lane) * f.scale;
}

/* 8 rows at once: as many chains as hide the latency of a fused multiply-add. */
MOE_INLINE void arm_float_gemv(const moe_mm *mm, arm_float_type f, arm_load8_fn *load8)
{
    const size_t n_unit = mm->n_in / f.unit, unit_bytes = f.unit * f.item_bytes;
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const float *x = (const float *)mm->x;
        const uint8_t *row[8];
        arm_rows(mm, r, 8, row);
        const uintptr_t next = (uintptr_t)row[0] + 8 * mm->w_stride;
        float32x4_t low[8], high[8];
        MOE_UNROLL
        for (size_t i = 0; i < 8; i++)
            low[i] = high[i] = vdupq_n_f32(0);
        for (size_t at = 0; at < n_unit * unit_bytes; at += unit_bytes) {
            arm_prefetch(next + 8 * at, 8 * unit_bytes);
            MOE_UNROLL
            for (size_t v = 0; v < f.vectors; v++, x += 8) {
                const float32x4_t x0 = vld1q_f32(x), x1 = vld1q_f32(x + 4);
                MOE_UNROLL
                for (size_t i = 0; i < 8; i++) {
                    const float32x4x2_t w = load8(row[i] + at, v);
                    low[i] = vfmaq_f32(low[i], w.val[0], x0);
                    high[i] = vfmaq_f32(high[i], w.val[1], x1);
                    if (i == 3) /* 8 loads in advance, not 16: for these gcc spills sums */
                        __asm__ volatile("" : : : "memory");
                }
            }
        }
        float y[8], lane[8][8];
        MOE_UNROLL
        for (size_t i = 0; i < 8; i++) {
            vst1q_f32(lane[i], low[i]);
            vst1q_f32(lane[i] + 4, high[i]);
        }
        for (size_t i = 0; i < 8; i++)
            y[i] = arm_float_end(lane[i], row[i] + n_unit * unit_bytes, x, mm->n_in % f.unit, f,
                                 load8);
        memcpy(mm->y + r, y, MOE_MIN(mm->n_row - r, 8) * sizeof *y);
    }
}

/* Tokens whose sums are kept at once, 4 rows of each; and weights of a row that are used for all of
 * these tokens before the next, so that the 4 rows stay in L1. */
enum { ARM_FLOAT_TOKENS = 48, ARM_FLOAT_CHUNK = 512 };

/* The sums of 4 rows and one token. */
typedef struct arm_float_sums {
    float32x4_t low[4], high[4];
} arm_float_sums;

/* Weights k .. end of 4 rows, whole units, times 2 tokens, which may be the same. */
MOE_INLINE void arm_float_tile(const uint8_t *const row[4], const float *x, const float *x2,
                               size_t k, size_t end, arm_float_sums *sum, arm_float_sums *sum2,
                               arm_float_type f, arm_load8_fn *load8)
{
    arm_float_sums a = *sum, b = *sum2;
    for (; k < end; k += f.unit) {
        MOE_UNROLL
        for (size_t v = 0; v < f.vectors; v++) {
            const size_t at = k + 8 * v;
            const float32x4_t a0 = vld1q_f32(x + at), a1 = vld1q_f32(x + at + 4);
            const float32x4_t b0 = vld1q_f32(x2 + at), b1 = vld1q_f32(x2 + at + 4);
            MOE_UNROLL
            for (size_t i = 0; i < 4; i++) {
                const float32x4x2_t w = load8(row[i] + k * f.item_bytes, v);
                a.low[i] = vfmaq_f32(a.low[i], w.val[0], a0);
                a.high[i] = vfmaq_f32(a.high[i], w.val[1], a1);
                b.low[i] = vfmaq_f32(b.low[i], w.val[0], b0);
                b.high[i] = vfmaq_f32(b.high[i], w.val[1], b1);
            }
        }
    }
    *sum = a;
    *sum2 = b;
}

/* 4 rows times n_tok <= ARM_FLOAT_TOKENS tokens from t0 on; the first n weights, whole units. */
MOE_INLINE void arm_float_strip(const moe_mm *mm, const uint8_t *const row[4], size_t n, size_t t0,
                                size_t n_tok, arm_float_sums *sum, arm_float_type f,
                                arm_load8_fn *load8)
{
    for (size_t k = 0; k < n; k += ARM_FLOAT_CHUNK) {
        const size_t end = MOE_MIN(k + ARM_FLOAT_CHUNK, n);
        for (size_t t = 0; t < n_tok; t += 2) {
            const size_t t2 = MOE_MIN(t + 1, n_tok - 1);
            const float *x = (const float *)(mm->x + (t0 + t) * mm->x_stride);
            const float *x2 = (const float *)(mm->x + (t0 + t2) * mm->x_stride);
            arm_float_tile(row, x, x2, k, end, &sum[t], &sum[t2], f, load8);
        }
    }
}

MOE_INLINE void arm_float_gemm(const moe_mm *mm, arm_float_type f, arm_load8_fn *load8)
{
    const size_t n_last = mm->n_in % f.unit, n = mm->n_in - n_last;
    for (size_t t0 = 0; t0 < mm->n_tok; t0 += ARM_FLOAT_TOKENS) {
        const size_t n_tok = MOE_MIN(mm->n_tok - t0, (size_t)ARM_FLOAT_TOKENS);
        for (size_t r = 0; r < mm->n_row; r += 4) {
            const uint8_t *row[4];
            arm_rows(mm, r, 4, row);
            arm_float_sums sum[ARM_FLOAT_TOKENS];
            memset(sum, 0, n_tok * sizeof sum[0]);
            arm_float_strip(mm, row, n, t0, n_tok, sum, f, load8);
            for (size_t t = 0; t < n_tok; t++) {
                const float *x = (const float *)(mm->x + (t0 + t) * mm->x_stride);
                float y[4], lane[8];
                for (size_t i = 0; i < 4; i++) {
                    vst1q_f32(lane, sum[t].low[i]);
                    vst1q_f32(lane + 4, sum[t].high[i]);
                    y[i] = arm_float_end(lane, row[i] + n * f.item_bytes, x + n, n_last, f, load8);
                }
                memcpy(mm->y + (t0 + t) * mm->y_stride + r, y,
                       MOE_MIN(mm->n_row - r, 4) * sizeof *y);
            }
        }
    }
}

#endif
#endif
