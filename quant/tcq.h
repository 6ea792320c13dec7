/* quant/tcq.h - what the trellis-coded types (tcq4.h, tcq5.h, tcq8.h) share: the trellis, the
 * scale, and the loops of their kernels.
 *
 * Trellis-coded quantization: Marcellin and Fischer 1990; with entropy coding, Fischer and Wang
 * 1992; the trellis is Ungerboeck's with 8 states, as in JPEG 2000 part 2. The values of a weight
 * are the multiples of a step d, dealt out to four subsets: v mod 4 = 0, 1, 2, 3. A state offers
 * two of them, the even or the odd values, so that a code is one bit shorter than a value; and the
 * subset that is taken leads to the next state. An encoder that searches the best path through all
 * states (the Viterbi algorithm) is left with 1 dB less error than a uniform step whose codes have
 * the same entropy.
 *
 *     state      0      1      2      3      4      5      6      7
 *     offers   0   2  1   3  0   2  1   3  0   2  1   3  0   2  1   3      v mod 4
 *     leads to 0   1  2   3  5   4  7   6  1   0  3   2  4   5  6   7
 *
 * A row of n_in weights is 32 paths side by side: path l has the weights l, l + 32, l + 64, ...
 * Each begins in state 0. A step of all 32 is a shuffle of bytes; a block of 64 weights is two.
 *
 * The code c of a weight and the lowest bit of its state s give its value and the next state:
 *
 *     v = (2 c | s & 1) - bias         weight = d v         bias: half the number of values
 *     v mod 4 = 2 (c & 1) + (s & 1), since a bias is a multiple of 4
 *
 * Here a state is kept in a byte with a gap, its bits 0, 1, 2 at places 0, 2, 3, where a doubled
 * code 2 c has its lowest bit: (s | 2 c & 2) is the place of the next state in a table.
 *
 * A block has a scale, but an encoder gives most blocks of a tensor the same: at equal error large
 * weights have long codes and small ones short codes, and scales that are all alike take no room
 * once they are compressed. A block whose weights reach beyond the range of the codes takes a
 * larger one.
 *
 * Product with a row of activations, step after step:
 *     acc = fmaf(d x_scale, (float)sum(v x_q), acc)
 *
 * What it is good for, and for which rates: docs/quantization.md. */
#ifndef MOE_QUANT_TCQ_H
#define MOE_QUANT_TCQ_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86.h"
#include "x86_512.h"

enum {
    TCQ_PATHS = 32, /* of a row; weights of a step */
    TCQ_LEN = 64    /* weights of a block */
};

/* [s | 2 c & 2], as described above */
static const uint8_t tcq_next[16] = {0, 4, 1, 5, 9, 13, 8, 12, 1, 5, 0, 4, 8, 12, 9, 13};

/* What a type brings: the doubled codes, 2 c, of a step (half 0 or 1) of a block; and how codes c
 * are stored. */
typedef void tcq_codes_fn(const uint8_t *block, size_t half, uint8_t doubled[TCQ_PATHS]);
typedef void tcq_put_fn(uint8_t *block, size_t half, const uint8_t code[TCQ_PATHS]);

/* One step of all paths: doubled codes become values plus bias. */
MOE_INLINE void tcq_step(uint8_t state[TCQ_PATHS], uint8_t v[TCQ_PATHS])
{
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        const uint8_t s = state[l];
        state[l] = tcq_next[s | (v[l] & 2)];
        v[l] |= s & 1;
    }
}

MOE_INLINE void tcq_dequantize(const uint8_t *row, float *dst, size_t n, size_t block_bytes,
                               int bias, tcq_codes_fn *codes)
{
    uint8_t state[TCQ_PATHS] = {0}, v[TCQ_PATHS];
    for (size_t t = 0; t < n / TCQ_PATHS; t++) {
        const uint8_t *block = row + t / 2 * block_bytes;
        const float d = f32_of_f16(load_u16(block));
        codes(block, t % 2, v);
        tcq_step(state, v);
        for (size_t l = 0; l < TCQ_PATHS; l++)
            *dst++ = d * (float)(v[l] - bias);
    }
}

/* The product of a row with a row of activations. */
MOE_INLINE float tcq_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in,
                           size_t block_bytes, int bias, tcq_codes_fn *codes)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    uint8_t state[TCQ_PATHS] = {0}, v[TCQ_PATHS];
    float acc = 0;
    for (size_t t = 0; t < n_in / TCQ_PATHS; t++) {
        const uint8_t *block = row + t / 2 * block_bytes;
        int sum = 0;
        codes(block, t % 2, v);
        tcq_step(state, v);
        for (size_t l = 0; l < TCQ_PATHS; l++)
            sum += (v[l] - bias) * x.q[TCQ_PATHS * t + l];
        acc = fmaf(f32_of_f16(load_u16(block)) * x.scale[t], (float)sum, acc);
    }
    return acc;
}

/* The reference quantizer takes no paths into account: each weight becomes the nearest value that
 * its state offers. */
MOE_INLINE void tcq_quantize(const float *src, uint8_t *block, size_t n, size_t block_bytes,
                             int bias, tcq_put_fn *put)
{
    uint8_t state[TCQ_PATHS] = {0}, code[TCQ_PATHS];
    for (size_t k = 0; k < n; k += TCQ_LEN, block += block_bytes) {
        const float peak = fabsf(quant_peak(src + k, TCQ_LEN));
        const uint16_t stored = quant_scale(peak / (float)(bias - 1));
        const float d = f32_of_f16(stored);
        memcpy(block, &stored, 2);
        for (size_t i = 0; i < TCQ_LEN; i++) {
            uint8_t *s = &state[i % TCQ_PATHS];
            const float v = d > 0 ? fminf(fmaxf(src[k + i] / d, (float)-bias), (float)bias) : 0;
            const int c = (int)lrintf((v + (float)(bias - (*s & 1))) * 0.5f);
            code[i % TCQ_PATHS] = (uint8_t)MOE_MIN(c, bias - 1);
            *s = tcq_next[*s | (code[i % TCQ_PATHS] & 1) << 1];
            if (i % TCQ_PATHS == TCQ_PATHS - 1)
                put(block, i / TCQ_PATHS, code);
        }
    }
}

/* A type's functions in C, made of its struct `type`_block, `type`_codes and `type`_put. */
#define TCQ_C(type, bias)                                                                          \
    static void type##_dequantize(const void *blocks, float *dst, size_t n)                        \
    {                                                                                              \
        tcq_dequantize(blocks, dst, n, sizeof(type##_block), bias, type##_codes);                  \
    }                                                                                              \
    static void type##_quantize(const float *src, void *blocks, size_t n)                          \
    {                                                                                              \
        tcq_quantize(src, blocks, n, sizeof(type##_block), bias, type##_put);                      \
    }                                                                                              \
    static float type##_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)               \
    {                                                                                              \
        return tcq_dot_c(row, x_row, n_in, sizeof(type##_block), bias, type##_codes);              \
    }                                                                                              \
    static void type##_mm_c(const moe_mm *mm)                                                      \
    {                                                                                              \
        mm_by_rows(mm, type##_dot_c);                                                              \
    }

/* ------------------------------------------------------------------------------------- AVX2 -- */
#if MOE_X86

/* 8 rows on their way: the vectors of x86_block, and one of states for each. */
typedef struct tcq_paths_avx2 {
    __m256i lo[4], hi[4];
} tcq_paths_avx2;

/* Doubled codes of a step of the block at `offset` of 8 rows. */
typedef void tcq_load_avx2_fn(const uint8_t *const row[8], size_t offset, size_t half,
                              x86_block *w);

MOE_AVX2_INLINE void tcq_step_avx2(__m256i *state, __m256i *v)
{
    const __m256i next =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)tcq_next));
    const __m256i s = *state;
    const __m256i at = _mm256_or_si256(s, _mm256_and_si256(*v, _mm256_set1_epi8(2)));
    *state = _mm256_shuffle_epi8(next, at);
    *v = _mm256_or_si256(*v, _mm256_and_si256(s, _mm256_set1_epi8(1)));
}

/* The next step of 8 rows. */
MOE_AVX2_INLINE void tcq_unpack_avx2(tcq_paths_avx2 *paths, const uint8_t *const row[8],
                                     size_t offset, size_t half, tcq_load_avx2_fn *load,
                                     x86_block *w)
{
    load(row, offset, half, w);
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        tcq_step_avx2(&paths->lo[r], &w->lo[r]);
        tcq_step_avx2(&paths->hi[r], &w->hi[r]);
    }
}

/* As x86_gemv32 and x86_gemm32, whose comments hold here, with paths that run through the row. */
MOE_AVX2_INLINE void tcq_gemv_avx2(const moe_mm *mm, size_t block_bytes, tcq_load_avx2_fn *load,
                                   x86_step_fn *step)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        tcq_paths_avx2 paths;
        memset(&paths, 0, sizeof paths);
        __m256 acc = _mm256_setzero_ps();
        const uintptr_t next = (uintptr_t)mm->w + (r + 8) * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / TCQ_LEN; b++) {
            x86_prefetch(next + b * 8 * block_bytes, 8 * block_bytes);
            x86_block w;
            w.d = x86_f16x8(row, b * block_bytes);
            MOE_UNROLL
            for (size_t half = 0; half < 2; half++) {
                tcq_unpack_avx2(&paths, row, b * block_bytes, half, load, &w);
                const x86_x32 xb = x86_load_x32(&x, 2 * b + half);
                acc = step(&w, &xb, acc);
            }
        }
        x86_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

MOE_AVX2_INLINE void tcq_gemm_avx2(const moe_mm *mm, size_t block_bytes, tcq_load_avx2_fn *load,
                                   x86_step_fn *step)
{
    enum { TOKENS = 32 }; /* more than elsewhere: unpacking costs more */
    for (size_t t0 = 0; t0 < mm->n_tok; t0 += TOKENS) {
        const size_t n_tok = MOE_MIN(mm->n_tok - t0, (size_t)TOKENS);
        moe_q8 x[TOKENS];
        for (size_t t = 0; t < n_tok; t++)
            x[t] = act_q8(MOE_ACT_Q8_32, mm->x + (t0 + t) * mm->x_stride, mm->n_in);
        for (size_t r = 0; r < mm->n_row; r += 8) {
            const uint8_t *row[8];
            x86_rows(mm, r, row);
            tcq_paths_avx2 paths;
            __m256 acc[TOKENS];
            memset(&paths, 0, sizeof paths);
            for (size_t t = 0; t < n_tok; t++)
                acc[t] = _mm256_setzero_ps();
            const uintptr_t next = (uintptr_t)mm->w + (r + 8) * mm->w_stride;
            for (size_t b = 0; b < mm->n_in / TCQ_LEN; b++) {
                x86_prefetch(next + b * 8 * block_bytes, 8 * block_bytes);
                x86_block w;
                w.d = x86_f16x8(row, b * block_bytes);
                for (size_t half = 0; half < 2; half++) {
                    tcq_unpack_avx2(&paths, row, b * block_bytes, half, load, &w);
                    for (size_t t = 0; t < n_tok; t++) {
                        const x86_x32 xb = x86_load_x32(&x[t], 2 * b + half);
                        acc[t] = step(&w, &xb, acc[t]);
                    }
                }
            }
            for (size_t t = 0; t < n_tok; t++)
                x86_store_rows(mm->y + (t0 + t) * mm->y_stride + r, acc[t], mm->n_row - r);
        }
    }
}

/* A type's kernels, made of `type`_load_avx2 and `type`_step_avx2. */
#define TCQ_AVX2(type)                                                                             \
    MOE_AVX2 static void type##_gemv_avx2(const moe_mm *mm)                                        \
    {                                                                                              \
        tcq_gemv_avx2(mm, sizeof(type##_block), type##_load_avx2, type##_step_avx2);               \
    }                                                                                              \
    MOE_AVX2 static void type##_gemm_avx2(const moe_mm *mm)                                        \
    {                                                                                              \
        tcq_gemm_avx2(mm, sizeof(type##_block), type##_load_avx2, type##_step_avx2);               \
    }

/* ------------------------------------------------------------------------ AVX-512 VNNI, gemv -- */

/* Doubled codes of a step of 8 rows, k 0..15 and 16..31: a quarter of a vector is a row, in the
 * order 0, 4, 1, 5 and 2, 6, 3, 7, so that halves of it are vectors as x86.h has them. */
typedef struct tcq_codes_512 {
    __m512i lo[2], hi[2];
} tcq_codes_512;

typedef void tcq_load_512_fn(const uint8_t *const row[8], size_t offset, size_t half,
                             tcq_codes_512 *w);

/* 16 bytes at `offset` of 4 rows. */
MOE_VNNI512_INLINE __m512i tcq_load_rows_512(const uint8_t *const row[8], size_t offset, int first)
{
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(x86_load_pair(row[first] + offset, row[first + 4] + offset)),
        x86_load_pair(row[first + 1] + offset, row[first + 5] + offset), 1);
}

MOE_VNNI512_INLINE void tcq_step_512(__m512i *state, __m512i *v)
{
    const __m512i next =
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)tcq_next));
    const __m512i s = *state;
    *state = _mm512_shuffle_epi8(
        next, _mm512_ternarylogic_epi32(*v, _mm512_set1_epi8(2), s, 0xea)); /* v & 2 | s */
    *v = _mm512_ternarylogic_epi32(*v, s, _mm512_set1_epi8(1), 0xf8);       /* v | s & 1 */
}

/* The sums of products of one step of 8 rows. */
MOE_VNNI512_INLINE __m256i tcq_dot_512(tcq_codes_512 *state, tcq_codes_512 *w, const x86_x32 *x)
{
    const __m512i zero = _mm512_setzero_si512();
    const __m512i x0 = _mm512_broadcast_i64x4(x->lo), x1 = _mm512_broadcast_i64x4(x->hi);
    tcq_step_512(&state->lo[0], &w->lo[0]);
    tcq_step_512(&state->lo[1], &w->lo[1]);
    tcq_step_512(&state->hi[0], &w->hi[0]);
    tcq_step_512(&state->hi[1], &w->hi[1]);
    const __m512i a = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, w->lo[0], x0), w->hi[0], x1);
    const __m512i b = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, w->lo[1], x0), w->hi[1], x1);
    return x86_sum4_i32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1),
                        _mm512_castsi512_si256(b), _mm512_extracti64x4_epi64(b, 1));
}

MOE_VNNI512_INLINE void tcq_gemv_vnni512(const moe_mm *mm, size_t block_bytes,
                                         tcq_load_512_fn *load, int bias)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        tcq_codes_512 state;
        memset(&state, 0, sizeof state);
        __m256 acc = _mm256_setzero_ps();
        const uintptr_t next = (uintptr_t)mm->w + (r + 8) * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / TCQ_LEN; b++) {
            x86_prefetch(next + b * 8 * block_bytes, 8 * block_bytes);
            const __m256 d = x86_f16x8(row, b * block_bytes);
            MOE_UNROLL
            for (size_t half = 0; half < 2; half++) {
                tcq_codes_512 w;
                load(row, b * block_bytes, half, &w);
                const x86_x32 xb = x86_load_x32(&x, 2 * b + half);
                const __m256i dot = _mm256_add_epi32(tcq_dot_512(&state, &w, &xb),
                                                     x86_sum_times(&xb, (int16_t)-bias));
                acc = _mm256_fmadd_ps(_mm256_mul_ps(d, xb.d), _mm256_cvtepi32_ps(dot), acc);
            }
        }
        x86_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* A type's kernel, made of `type`_load_512. */
#define TCQ_VNNI512(type, bias)                                                                    \
    MOE_VNNI512 static void type##_gemv_vnni512(const moe_mm *mm)                                  \
    {                                                                                              \
        tcq_gemv_vnni512(mm, sizeof(type##_block), type##_load_512, bias);                         \
    }
#endif

/* ------------------------------------------------------------------------------------- NEON -- */
#if MOE_ARM64

/* As arm32_gemv and arm32_gemm, whose comments hold here, with paths that run through the row. */
typedef struct tcq_arm {
    size_t block_bytes;
    /* Doubled codes of a step of a block: k 0..15, k 16..31. */
    void (*codes)(const uint8_t *block, size_t half, uint8x16_t v[2]);
    uint8_t bias;
} tcq_arm;

/* The next step of a row, as signed values. */
MOE_INLINE void tcq_unpack_arm(const uint8_t *block, size_t half, const tcq_arm *f,
                               uint8x16_t state[2], int8x16_t value[2])
{
    const uint8x16_t next = vld1q_u8(tcq_next);
    uint8x16_t v[2];
    f->codes(block, half, v);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint8x16_t s = state[i];
        state[i] = vqtbl1q_u8(next, vorrq_u8(s, vandq_u8(v[i], vdupq_n_u8(2))));
        v[i] = vorrq_u8(v[i], vandq_u8(s, vdupq_n_u8(1)));
        value[i] = vreinterpretq_s8_u8(vsubq_u8(v[i], vdupq_n_u8(f->bias)));
    }
}

/* acc + the part of one step of 4 rows: the expression of the formats. */
MOE_INLINE float32x4_t tcq_add_arm(int32x4_t dot, float32x4_t d, const moe_q8 *x, size_t t,
                                   float32x4_t acc)
{
    return vfmaq_f32(acc, vmulq_f32(d, vld1q_dup_f32(x->scale + t)), vcvtq_f32_s32(dot));
}

MOE_INLINE void tcq_gemv_arm(const moe_mm *mm, const tcq_arm *f, arm_dot_fn *dot)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    for (size_t r = 0; r < mm->n_row; r += 4) {
        const uint8_t *row[4];
        uint8x16_t state[4][2];
        arm_rows(mm, r, 4, row);
        memset(state, 0, sizeof state);
        float32x4_t acc = vdupq_n_f32(0);
        const uintptr_t next = (uintptr_t)row[0] + 4 * mm->w_stride;
        for (size_t t = 0; t < mm->n_in / TCQ_PATHS; t++) {
            const size_t at = t / 2 * f->block_bytes;
            const int8x16_t x0 = vld1q_s8(x.q + 32 * t), x1 = vld1q_s8(x.q + 32 * t + 16);
            int32x4_t sum[4];
            if (t % 2 == 0)
                arm_prefetch(next + 4 * at, 4 * f->block_bytes);
            MOE_UNROLL
            for (size_t i = 0; i < 4; i++) {
                int8x16_t v[2];
                tcq_unpack_arm(row[i] + at, t % 2, f, state[i], v);
                sum[i] = dot(dot(vdupq_n_s32(0), v[0], x0), v[1], x1);
            }
            acc = tcq_add_arm(arm_sum4(sum[0], sum[1], sum[2], sum[3]), arm_f16x4(row, at), &x, t,
                              acc);
        }
        arm_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* acc[t] += step b of 8 rows (two slices, packed) times that of token t, for n_tok (constant, <= 4)
 * tokens. */
MOE_INLINE void tcq_tile_arm(const int8x16_t code[16], const float32x4_t d[2], const moe_q8 *x,
                             size_t b, size_t n_tok, const arm_engine *e, float32x4_t (*acc)[2])
{
    const int8_t *q[4];
    int32x4_t sum[8], dot[4][2];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        q[t] = x[t].q + 32 * b;
    MOE_UNROLL
    for (size_t i = 0; i < n_tok * e->n_sum; i++)
        sum[i] = vdupq_n_s32(0);
    e->dot(code, q, 0, n_tok, sum);
    e->dot(code + 8, q, 16, n_tok, sum);
    e->finish(sum, n_tok, dot);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        acc[t][0] = tcq_add_arm(dot[t][0], d[0], &x[t], b, acc[t][0]);
        acc[t][1] = tcq_add_arm(dot[t][1], d[1], &x[t], b, acc[t][1]);
    }
}

MOE_INLINE void tcq_gemm_tokens_arm(const moe_mm *mm, size_t t0, size_t n_tok, const tcq_arm *f,
                                    const arm_engine *e)
{
    moe_q8 x[ARM_TOKENS + 1];
    arm_tokens(mm, MOE_ACT_Q8_32, t0, n_tok, x);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        uint8x16_t state[8][2];
        float32x4_t acc[ARM_TOKENS + 1][2];
        arm_rows(mm, r, 8, row);
        memset(state, 0, sizeof state);
        memset(acc, 0, (n_tok + 1) * sizeof acc[0]);
        const uintptr_t next = (uintptr_t)row[0] + 8 * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / TCQ_PATHS; b++) {
            const size_t at = b / 2 * f->block_bytes;
            int8x16_t low[8], high[8], code[16];
            if (b % 2 == 0)
                arm_prefetch(next + 8 * at, 8 * f->block_bytes);
            for (size_t i = 0; i < 8; i++) {
                int8x16_t v[2];
                tcq_unpack_arm(row[i] + at, b % 2, f, state[i], v);
                low[i] = v[0];
                high[i] = v[1];
            }
            e->pack(low, code);
            e->pack(high, code + 8);
            const float32x4_t d[2] = {arm_f16x4(row, at), arm_f16x4(row + 4, at)};
            size_t t = 0;
            for (; t + e->n_tok <= n_tok; t += e->n_tok)
                tcq_tile_arm(code, d, x + t, b, e->n_tok, e, acc + t);
            for (; e->n_tok > 2 && t < n_tok; t += 2)
                tcq_tile_arm(code, d, x + t, b, 2, e, acc + t);
        }
        arm_store_tokens(mm, r, t0, n_tok, acc);
    }
}

MOE_INLINE void tcq_gemm_arm(const moe_mm *mm, const tcq_arm *f, const arm_engine *e,
                             moe_mm_fn *gemv)
{
    if (mm->n_tok < ARM_TOKENS_MIN) {
        arm_gemm_few(mm, gemv);
        return;
    }
    for (size_t t = 0; t < mm->n_tok; t += ARM_TOKENS)
        tcq_gemm_tokens_arm(mm, t, MOE_MIN(mm->n_tok - t, (size_t)ARM_TOKENS), f, e);
}

/* A type's kernels, made of `type`_codes_arm. */
#define TCQ_ARM(type, bias)                                                                        \
    static const tcq_arm type##_arm = {sizeof(type##_block), type##_codes_arm, bias};              \
    static void type##_gemv_neon(const moe_mm *mm)                                                 \
    {                                                                                              \
        tcq_gemv_arm(mm, &type##_arm, arm_dot_neon);                                               \
    }                                                                                              \
    static void type##_gemm_neon(const moe_mm *mm)                                                 \
    {                                                                                              \
        tcq_gemm_arm(mm, &type##_arm, &arm_neon, type##_gemv_neon);                                \
    }                                                                                              \
    MOE_DOTPROD static void type##_gemv_dotprod(const moe_mm *mm)                                  \
    {                                                                                              \
        tcq_gemv_arm(mm, &type##_arm, arm_dot_dotprod);                                            \
    }                                                                                              \
    MOE_DOTPROD static void type##_gemm_dotprod(const moe_mm *mm)                                  \
    {                                                                                              \
        tcq_gemm_arm(mm, &type##_arm, &arm_dotprod, type##_gemv_dotprod);                          \
    }                                                                                              \
    MOE_I8MM static void type##_gemm_i8mm(const moe_mm *mm)                                        \
    {                                                                                              \
        tcq_gemm_arm(mm, &type##_arm, &arm_i8mm, type##_gemv_dotprod);                             \
    }
#endif

/* -------------------------------------------------------------------------------- selection -- */

#if MOE_X86
#define TCQ_LADDER(type)                                                                           \
    if (cpu & MOE_CPU_AVX2)                                                                        \
        best = (moe_kernels){type##_gemv_avx2, type##_gemm_avx2};                                  \
    if (cpu & MOE_CPU_AVX512_VNNI)                                                                 \
        best.gemv = type##_gemv_vnni512;
#elif MOE_ARM64
#define TCQ_LADDER(type)                                                                           \
    if (cpu & MOE_CPU_NEON)                                                                        \
        best = (moe_kernels){type##_gemv_neon, type##_gemm_neon};                                  \
    if (cpu & MOE_CPU_DOTPROD)                                                                     \
        best = (moe_kernels){type##_gemv_dotprod, type##_gemm_dotprod};                            \
    if (cpu & MOE_CPU_DOTPROD && cpu & MOE_CPU_I8MM)                                               \
        best.gemm = type##_gemm_i8mm;
#else
#define TCQ_LADDER(type)
#endif

/* A type's ladder and its entry of the table. */
#define TCQ_QUANT(type, public_name, disk_id, ...)                                                 \
    static moe_kernels type##_select(uint32_t cpu)                                                 \
    {                                                                                              \
        moe_kernels best = {type##_mm_c, type##_mm_c};                                             \
        TCQ_LADDER(type)                                                                           \
        (void)cpu;                                                                                 \
        return best;                                                                               \
    }                                                                                              \
    static const moe_quant quant_##type = {                                                        \
        .name = public_name,                                                                       \
        .id = disk_id,                                                                             \
        .block_len = TCQ_LEN,                                                                      \
        .block_bytes = sizeof(type##_block),                                                       \
        .act = MOE_ACT_Q8_32,                                                                      \
        .bits = 8.0 * sizeof(type##_block) / TCQ_LEN,                                              \
        .dequantize = type##_dequantize,                                                           \
        .quantize = type##_quantize,                                                               \
        .select = type##_select,                                                                   \
        .fields = {__VA_ARGS__},                                                                   \
    };

#endif
