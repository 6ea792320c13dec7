/* quant/tcq.h - what the trellis-coded types (tcq4.h, tcq5.h, tcq8.h) share: the trellis, the scale,
 * and the loops of their kernels.
 *
 * Trellis-coded quantization (Marcellin and Fischer 1990; with entropy coding: Fischer and Wang 1992;
 * the trellis is that of JPEG 2000 part 2, Ungerboeck's with 8 states). The values of a weight are the
 * multiples of a step d. They are dealt out to four subsets, v mod 4 = 0, 1, 2, 3. A state offers two of
 * them, the even or the odd values, so a code is one bit shorter than a value; and the subset that was
 * taken leads to the next state. An encoder that searches the best path through all states (the Viterbi
 * algorithm) is left with 1.1 dB less error than a uniform step whose codes have the same entropy.
 *
 *     state      0      1      2      3      4      5      6      7
 *     offers   0   2  1   3  0   2  1   3  0   2  1   3  0   2  1   3      v mod 4
 *     leads to 0   1  2   3  5   4  7   6  1   0  3   2  4   5  6   7
 *
 * A row of n_in weights is 32 paths side by side: path l has the weights l, l + 32, l + 64, ... Each
 * begins in state 0. A step of all 32 is a shuffle of bytes; a block is one step.
 *
 * The code c of a weight and the lowest bit of its state s give its value and the next state:
 *
 *     v = (2 c | s & 1) - bias           weight = d v             bias: half the range of the values
 *     the subset is v mod 4 = 2 (c & 1) + (s & 1), since a bias is a multiple of 4
 *
 * Here a state is kept in a byte with a gap, its bits 0, 1, 2 at places 0, 2, 3, where a doubled code
 * 2 c has its lowest bit: (s | 2 c & 2) is the place of the next state in a table.
 *
 * The scale of a block is a byte, a float without sign, 5 bits of exponent and 3 of fraction:
 * d = (1 + (b & 7) / 8) 2^((b >> 3) - 22). An encoder that gives all blocks of a tensor the same d is
 * nearly right: at equal error the codes of a block with large weights are longer, those of one with
 * small weights shorter, and the bytes of the scales cost nothing once they are compressed. A block
 * whose weights reach beyond the range takes a larger d.
 *
 * Product with a row of activations, block after block:
 *     acc = fmaf(d x_scale, (float)sum(v x_q), acc)
 *
 * Codes of little entropy want entropy coding on disk: see docs/quantization.md. */
#ifndef MOE_QUANT_TCQ_H
#define MOE_QUANT_TCQ_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86.h"
#include "x86_512.h"

enum { TCQ_LEN = 32 }; /* weights of a block, paths of a row */

/* [s | 2 c & 2], as described above */
static const uint8_t tcq_next[16] = {0, 4, 1, 5, 9, 13, 8, 12, 1, 5, 0, 4, 8, 12, 9, 13};

enum { TCQ_SCALE_EXPONENT = -22 };

MOE_INLINE float tcq_scale(uint8_t byte)
{
    return f32_of_bits(((uint32_t)byte << 20) + ((uint32_t)(127 + TCQ_SCALE_EXPONENT) << 23));
}

/* The byte of the least scale that is not below d. */
MOE_UNUSED static uint8_t tcq_scale_byte(float d)
{
    const uint32_t least = bits_of_f32(tcq_scale(0)), u = bits_of_f32(d);
    if (!(d > tcq_scale(0)))
        return 0;
    return (uint8_t)(d >= tcq_scale(255) ? 255 : (u - least + (1u << 20) - 1) >> 20);
}

/* What a type brings: its doubled codes, 2 c, of a block. */
typedef void tcq_codes_fn(const uint8_t *block, uint8_t doubled[TCQ_LEN]);

/* One step of all paths: doubled codes become values plus bias. */
MOE_INLINE void tcq_step(uint8_t state[TCQ_LEN], uint8_t v[TCQ_LEN])
{
    for (size_t l = 0; l < TCQ_LEN; l++) {
        const uint8_t s = state[l];
        state[l] = tcq_next[s | (v[l] & 2)];
        v[l] |= s & 1;
    }
}

MOE_INLINE void tcq_dequantize(const uint8_t *block, float *dst, size_t n, size_t block_bytes,
                               int bias, tcq_codes_fn *codes)
{
    uint8_t state[TCQ_LEN] = {0}, v[TCQ_LEN];
    for (size_t b = 0; b < n / TCQ_LEN; b++, block += block_bytes) {
        const float d = tcq_scale(block[0]);
        codes(block, v);
        tcq_step(state, v);
        for (size_t l = 0; l < TCQ_LEN; l++)
            *dst++ = d * (float)(v[l] - bias);
    }
}

/* The product of a row with a row of activations. */
MOE_INLINE float tcq_dot_c(const uint8_t *block, const uint8_t *x_row, size_t n_in,
                           size_t block_bytes, int bias, tcq_codes_fn *codes)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    uint8_t state[TCQ_LEN] = {0}, v[TCQ_LEN];
    float acc = 0;
    for (size_t b = 0; b < n_in / TCQ_LEN; b++, block += block_bytes) {
        int sum = 0;
        codes(block, v);
        tcq_step(state, v);
        for (size_t l = 0; l < TCQ_LEN; l++)
            sum += (v[l] - bias) * x.q[TCQ_LEN * b + l];
        acc = fmaf(tcq_scale(block[0]) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

/* The reference quantizer takes no paths into account: each weight becomes the nearest value that its
 * state offers. `put` writes the codes c of a block. */
MOE_INLINE void tcq_quantize(const float *src, uint8_t *block, size_t n, size_t block_bytes, int bias,
                             void (*put)(uint8_t *block, const uint8_t code[TCQ_LEN]))
{
    uint8_t state[TCQ_LEN] = {0}, code[TCQ_LEN];
    for (size_t b = 0; b < n / TCQ_LEN; b++, src += TCQ_LEN, block += block_bytes) {
        block[0] = tcq_scale_byte(fabsf(quant_peak(src, TCQ_LEN)) / (float)(bias - 1));
        const float d = tcq_scale(block[0]);
        for (size_t l = 0; l < TCQ_LEN; l++) {
            const int odd = state[l] & 1;
            const float v = fminf(fmaxf(src[l] / d, (float)-bias), (float)bias);
            const int c = (int)lrintf((v + (float)(bias - odd)) * 0.5f);
            code[l] = (uint8_t)MOE_MIN(c, bias - 1);
            state[l] = tcq_next[state[l] | (code[l] & 1) << 1];
        }
        put(block, code);
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

/* Doubled codes of block `offset` of 8 rows. */
typedef void tcq_load_avx2_fn(const uint8_t *const row[8], size_t offset, x86_block *w);

MOE_AVX2_INLINE void tcq_step_avx2(__m256i *state, __m256i *v)
{
    const __m256i next =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)tcq_next));
    const __m256i s = *state;
    const __m256i at = _mm256_or_si256(s, _mm256_and_si256(*v, _mm256_set1_epi8(2)));
    *state = _mm256_shuffle_epi8(next, at);
    *v = _mm256_or_si256(*v, _mm256_and_si256(s, _mm256_set1_epi8(1)));
}

/* The scales at `offset` of 8 rows. */
MOE_AVX2_INLINE __m256 tcq_scales_avx2(const uint8_t *const row[8], size_t offset)
{
    uint64_t bytes = row[0][offset];
    bytes |= (uint64_t)row[1][offset] << 8 | (uint64_t)row[2][offset] << 16;
    bytes |= (uint64_t)row[3][offset] << 24 | (uint64_t)row[4][offset] << 32;
    bytes |= (uint64_t)row[5][offset] << 40 | (uint64_t)row[6][offset] << 48;
    bytes |= (uint64_t)row[7][offset] << 56;
    const __m256i b = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_slli_epi32(b, 20), _mm256_set1_epi32((127 + TCQ_SCALE_EXPONENT) << 23)));
}

/* The next block of 8 rows. */
MOE_AVX2_INLINE void tcq_unpack_avx2(tcq_paths_avx2 *paths, const uint8_t *const row[8],
                                     size_t offset, tcq_load_avx2_fn *load, x86_block *w)
{
    load(row, offset, w);
    X86_512_UNROLL
    for (size_t r = 0; r < 4; r++) {
        tcq_step_avx2(&paths->lo[r], &w->lo[r]);
        tcq_step_avx2(&paths->hi[r], &w->hi[r]);
    }
    w->d = tcq_scales_avx2(row, offset);
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
            tcq_unpack_avx2(&paths, row, b * block_bytes, load, &w);
            const x86_x32 xb = x86_load_x32(&x, b);
            acc = step(&w, &xb, acc);
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
                tcq_unpack_avx2(&paths, row, b * block_bytes, load, &w);
                for (size_t t = 0; t < n_tok; t++) {
                    const x86_x32 xb = x86_load_x32(&x[t], b);
                    acc[t] = step(&w, &xb, acc[t]);
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

/* ------------------------------------------------------------------------- AVX-512 VNNI, gemv -- */

/* Doubled codes of a block of 8 rows, k 0..15 and 16..31: a quarter of a vector is a row, in the order
 * 0, 4, 1, 5 and 2, 6, 3, 7, so that halves of it are vectors as x86.h has them. */
typedef struct tcq_block_512 {
    __m512i lo[2], hi[2];
} tcq_block_512;

typedef void tcq_load_512_fn(const uint8_t *const row[8], size_t offset, tcq_block_512 *w);

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

MOE_VNNI512_INLINE void tcq_gemv_vnni512(const moe_mm *mm, size_t block_bytes,
                                         tcq_load_512_fn *load, int bias)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    const __m512i zero = _mm512_setzero_si512();
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        __m512i lo0 = zero, lo1 = zero, hi0 = zero, hi1 = zero; /* the states */
        __m256 acc = _mm256_setzero_ps();
        const uintptr_t next = (uintptr_t)mm->w + (r + 8) * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / TCQ_LEN; b++) {
            x86_prefetch(next + b * 8 * block_bytes, 8 * block_bytes);
            tcq_block_512 w;
            load(row, b * block_bytes, &w);
            tcq_step_512(&lo0, &w.lo[0]);
            tcq_step_512(&lo1, &w.lo[1]);
            tcq_step_512(&hi0, &w.hi[0]);
            tcq_step_512(&hi1, &w.hi[1]);
            const x86_x32 xb = x86_load_x32(&x, b);
            const __m512i x0 = _mm512_broadcast_i64x4(xb.lo), x1 = _mm512_broadcast_i64x4(xb.hi);
            const __m512i sum0 =
                _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, w.lo[0], x0), w.hi[0], x1);
            const __m512i sum1 =
                _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, w.lo[1], x0), w.hi[1], x1);
            const __m256i sum = x86_sum4_i32(
                _mm512_castsi512_si256(sum0), _mm512_extracti64x4_epi64(sum0, 1),
                _mm512_castsi512_si256(sum1), _mm512_extracti64x4_epi64(sum1, 1));
            const __m256i dot = _mm256_add_epi32(sum, x86_sum_times(&xb, (int16_t)-bias));
            acc = _mm256_fmadd_ps(_mm256_mul_ps(tcq_scales_avx2(row, b * block_bytes), xb.d),
                                  _mm256_cvtepi32_ps(dot), acc);
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

/* -------------------------------------------------------------------------------- selection -- */

#if MOE_X86
#define TCQ_LADDER(type)                                                                           \
    if (cpu & MOE_CPU_AVX2)                                                                        \
        best = (moe_kernels){type##_gemv_avx2, type##_gemm_avx2};                                  \
    if (cpu & MOE_CPU_AVX512_VNNI)                                                                 \
        best.gemv = type##_gemv_vnni512;
#else
#define TCQ_LADDER(type)
#endif

/* A type's ladder and its entry of the table. */
#define TCQ_QUANT(type, public_name, disk_id, ...)                                                   \
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
