/* quant/tcq.h - what the trellis-coded types (tcq4.h, tcq5.h, tcq8.h) share: the trellis, the
 * scale, and the loops of their kernels.
 *
 * Trellis-coded quantization: Marcellin and Fischer 1990; with entropy coding, Fischer and Wang
 * 1992. The values of a weight are the multiples of a step d. At each weight only the even or only
 * the odd ones are offered, so that a code is one bit shorter than a value; which ones depends on
 * the codes before it. An encoder that searches the best path through all states (the Viterbi
 * algorithm) is left with 1.25 dB less error than a uniform step whose codes have the same entropy.
 *
 * A row of n_in weights is 32 paths side by side: path l has the weights l, l + 32, l + 64, ... A
 * step is a weight of each; a block of 64 weights is two steps. Weight t of a path has the code
 * c[t], the parity p[t] and the value v[t]:
 *
 *     p[t] = (c[t - 2] & 1) ^ p[t - 5] ^ p[t - 6]       0 in front of the row
 *     v[t] = 2 c[t] + p[t] - bias                       bias: half the number of values
 *     weight = d v[t]
 *
 * These are 64 states, as many as an encoder can search in good time: each doubling gains about
 * 0.007 bits per weight. (Ungerboeck's trellises, which are usually taken, need more terms for
 * as much: all with up to three terms were measured, and this is the best.) The parity comes from
 * exclusive ors, which do not care where in a byte the bits are: a kernel takes them for all codes
 * of a vector at once, before it unpacks the codes.
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
#include "x86_tile.h"

enum {
    TCQ_PATHS = 32, /* of a row; weights of a step */
    TCQ_LEN = 64    /* weights of a block */
};

/* The state of a path: bit i is what is known of the parity in i steps. */
MOE_INLINE uint8_t tcq_next(uint8_t state, unsigned code)
{
    return (uint8_t)(state >> 1 ^ (state & 1 ? 48 : 0) ^ (code & 1) << 1);
}

/* What a type brings: the codes of a step (half 0 or 1) of a block, and how values plus bias are
 * stored. */
typedef void tcq_codes_fn(const uint8_t *block, size_t half, uint8_t code[TCQ_PATHS]);
typedef void tcq_put_fn(uint8_t *block, size_t half, const uint8_t v[TCQ_PATHS]);

/* One step of all paths: codes become values plus bias. */
MOE_INLINE void tcq_step(uint8_t state[TCQ_PATHS], uint8_t v[TCQ_PATHS])
{
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        const uint8_t code = v[l];
        v[l] = (uint8_t)(2 * code + (state[l] & 1));
        state[l] = tcq_next(state[l], code);
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
    uint8_t state[TCQ_PATHS] = {0}, u[TCQ_PATHS];
    for (size_t k = 0; k < n; k += TCQ_LEN, block += block_bytes) {
        const float peak = fabsf(quant_peak(src + k, TCQ_LEN));
        const uint16_t stored = quant_scale(peak / (float)(bias - 1));
        const float d = f32_of_f16(stored);
        memcpy(block, &stored, 2);
        for (size_t i = 0; i < TCQ_LEN; i++) {
            uint8_t *s = &state[i % TCQ_PATHS];
            const float v = d > 0 ? fminf(fmaxf(src[k + i] / d, (float)-bias), (float)bias) : 0;
            const int nearest = (int)lrintf((v + (float)(bias - (*s & 1))) * 0.5f);
            const unsigned code = (unsigned)MOE_MIN(nearest, bias - 1);
            u[i % TCQ_PATHS] = (uint8_t)(2 * code + (*s & 1));
            *s = tcq_next(*s, code);
            if (i % TCQ_PATHS == TCQ_PATHS - 1)
                put(block, i / TCQ_PATHS, u);
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

/* A kernel keeps the parities of three blocks, in the place of the codes' lowest bits: those of the
 * block in work, which are known before it is read, and of the two before it. The oldest become
 * those of the next block. The three take turns, in loops of three blocks. */
enum { TCQ_TURNS = 3 };

/* ------------------------------------------------------------------------------------- AVX2 -- */
#if MOE_X86

/* Of 8 rows: as many vectors as a type needs. */
typedef struct tcq_parity_avx2 {
    __m256i p[16];
} tcq_parity_avx2;

/* The parities in i + 2 steps of what has n vectors of codes per step. */
MOE_AVX2_INLINE __m256i tcq_parity_next_avx2(tcq_parity_avx2 *const parity[3], size_t half,
                                             size_t n, size_t i, __m256i code)
{
    const __m256i five = half ? parity[1]->p[i] : parity[2]->p[n + i]; /* steps before that one */
    const __m256i six = half ? parity[2]->p[n + i] : parity[2]->p[i];
    return _mm256_xor_si256(code, _mm256_xor_si256(five, six));
}

/* What a type brings: sums of products, in row order, of the values plus bias of a step (half 0 or
 * 1) of the block at `offset` of 8 rows. parity[0] are its own, parity[1] and parity[2] of the two
 * before. Step 0, then step 1, make those of the next block from parity[2]. */
typedef __m256i tcq_dot_avx2_fn(const uint8_t *const row[8], size_t offset, size_t half,
                                tcq_parity_avx2 *const parity[3], const x86_x32 *x);

/* As x86_few32_rows, whose comment holds here, with paths that run through the row. The parities
 * take turns by their pointers: a loop of three blocks, which gcc keeps in registers that it does
 * not have, stores each of them twice. */
MOE_AVX2_INLINE void tcq_gemv_avx2(const moe_mm *mm, size_t block_bytes, int16_t bias,
                                   tcq_dot_avx2_fn *dot)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        tcq_parity_avx2 p[TCQ_TURNS], *turn[TCQ_TURNS] = {&p[0], &p[1], &p[2]};
        memset(p, 0, sizeof p);
        __m256 acc = _mm256_setzero_ps();
        const x86_ahead next = x86_ahead_rows(mm, r, 8);
        for (size_t b = 0; b < mm->n_in / TCQ_LEN; b++) {
            const size_t at = b * block_bytes;
            x86_fetch_ahead(next, 8 * at, 8 * block_bytes);
            const __m256 d = x86_f16x8(row, at);
            MOE_UNROLL
            for (size_t half = 0; half < 2; half++) {
                const x86_x32 xb = x86_load_x32(&x, 2 * b + half);
                const __m256i sum = _mm256_add_epi32(dot(row, at, half, turn, &xb),
                                                     x86_sum_times(&xb, (int16_t)-bias));
                acc = _mm256_fmadd_ps(_mm256_mul_ps(d, xb.d), _mm256_cvtepi32_ps(sum), acc);
            }
            tcq_parity_avx2 *const made = turn[2];
            turn[2] = turn[1];
            turn[1] = turn[0];
            turn[0] = made;
        }
        x86_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* Codes of a step (half 0 or 1) of the block at `offset` of 8 rows, transposed as in an x86_tile;
 * the parities as above. */
typedef void tcq_tile_avx2_fn(const uint8_t *const row[8], size_t offset, size_t half,
                              tcq_parity_avx2 *const parity[3], __m256i code[8]);

/* The body of an x86_load_fn. */
MOE_AVX2_INLINE void tcq_tile_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                   size_t block_bytes, tcq_tile_avx2_fn *unpack, x86_tile *tile)
{
    tcq_parity_avx2 *const p = (tcq_parity_avx2 *)(void *)tile->path;
    const size_t first = offset / block_bytes;
    if (first == 0)
        memset(p, 0, sizeof tile->path);
    _Static_assert(sizeof(tcq_parity_avx2[TCQ_TURNS]) == sizeof tile->path, "as much");
    for (size_t b = 0; b < n_block; b++, offset += block_bytes) {
        const size_t turn = (first + b) % TCQ_TURNS;
        tcq_parity_avx2 *const parity[3] = {&p[(3 - turn) % 3], &p[(4 - turn) % 3],
                                            &p[(5 - turn) % 3]};
        tile->d[2 * b] = tile->d[2 * b + 1] = x86_f16x8(row, offset);
        MOE_UNROLL
        for (size_t half = 0; half < 2; half++)
            unpack(row, offset, half, parity, tile->code + 16 * b + 8 * half);
    }
}

/* A type's kernels, made of `type`_dot_avx2 and `type`_unpack_avx2; `steps`: of x86_tile.h, for
 * codes of that size. */
#define TCQ_GEMV_AVX2(type, bias)                                                                  \
    MOE_AVX2 static void type##_gemv_avx2(const moe_mm *mm)                                        \
    {                                                                                              \
        tcq_gemv_avx2(mm, sizeof(type##_block), bias, type##_dot_avx2);                            \
    }
#define TCQ_GEMM_AVX2(type, bias, steps, steps_vnni)                                               \
    MOE_AVX2 static void type##_tile_avx2(const uint8_t *const row[8], size_t offset,              \
                                          size_t n_block, x86_tile *tile)                          \
    {                                                                                              \
        tcq_tile_avx2(row, offset, n_block, sizeof(type##_block), type##_unpack_avx2, tile);       \
    }                                                                                              \
    static const x86_format type##_x86 = {.block_len = TCQ_LEN,                                    \
                                          .block_bytes = sizeof(type##_block),                     \
                                          .offset = bias,                                          \
                                          .load = type##_tile_avx2};                               \
    static void type##_gemm_avx2(const moe_mm *mm)                                                 \
    {                                                                                              \
        x86_gemm(mm, &type##_x86, steps, type##_gemv_avx2);                                        \
    }                                                                                              \
    static void type##_gemm_avxvnni(const moe_mm *mm)                                              \
    {                                                                                              \
        x86_gemm(mm, &type##_x86, steps_vnni, type##_gemv_avx2);                                   \
    }

/* ------------------------------------------------------------------------ AVX-512 VNNI, gemv -- */

/* 16 rows: quarter j of vector i is row 4 j + i, so that their sums fold into row order. */
typedef struct tcq_values_512 {
    __m512i lo[4], hi[4]; // k 0..15, k 16..31
} tcq_values_512;

typedef struct tcq_parity_512 {
    __m512i p[16];
} tcq_parity_512;

/* The values plus bias of a step; the parities as for tcq_dot_avx2_fn. */
typedef void tcq_load_512_fn(const uint8_t *const row[16], size_t offset, size_t half,
                             tcq_parity_512 *const parity[3], tcq_values_512 *w);

/* a where the mask has ones, b where it has zeros. */
MOE_VNNI512_INLINE __m512i tcq_select_512(int mask, __m512i a, __m512i b)
{
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), a, b, 0xca);
}

MOE_VNNI512_INLINE __m512i tcq_parity_next_512(tcq_parity_512 *const parity[3], size_t half,
                                               size_t n, size_t i, __m512i code)
{
    const __m512i five = half ? parity[1]->p[i] : parity[2]->p[n + i];
    const __m512i six = half ? parity[2]->p[n + i] : parity[2]->p[i];
    return _mm512_ternarylogic_epi32(code, five, six, 0x96);
}

/* 16 bytes at `offset` of rows i, i + 4, i + 8, i + 12. */
MOE_VNNI512_INLINE __m512i tcq_load_rows_512(const uint8_t *const row[16], size_t offset, size_t i)
{
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(x86_load_pair(row[i] + offset, row[i + 4] + offset)),
        x86_load_pair(row[i + 8] + offset, row[i + 12] + offset), 1);
}

/* The sums of products of a step, in row order. */
MOE_VNNI512_INLINE __m512i tcq_dot_512(const tcq_values_512 *w, const int8_t *q)
{
    const __m512i x0 = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q));
    const __m512i x1 = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(q + 16)));
    __m512i v[4];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        v[i] = _mm512_dpbusd_epi32(
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), w->lo[i], x0), w->hi[i], x1);
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]),
                                       _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]),
                                       _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

MOE_VNNI512_INLINE __m512 tcq_f16_512(const uint8_t *const row[16], size_t offset)
{
    return _mm512_cvtph_ps(_mm256_inserti128_si256(
        _mm256_castsi128_si256(x86_u16x8(row, offset)), x86_u16x8(row + 8, offset), 1));
}

/* acc += a step of 16 rows times step t of x. */
MOE_VNNI512_INLINE __m512 tcq_add_512(const tcq_values_512 *w, __m512 d, const moe_q8 *x, size_t t,
                                      int bias, __m512 acc)
{
    int32_t sum;
    memcpy(&sum, x->sum + 2 * t, 4);
    const __m512i dot = _mm512_dpwssd_epi32(tcq_dot_512(w, x->q + TCQ_PATHS * t),
                                            _mm512_set1_epi16((short)-bias),
                                            _mm512_set1_epi32(sum));
    return _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x->scale[t])), _mm512_cvtepi32_ps(dot),
                           acc);
}

MOE_VNNI512_INLINE void tcq_gemv_vnni512(const moe_mm *mm, size_t block_bytes,
                                         tcq_load_512_fn *load, int bias)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / TCQ_LEN;
    for (size_t r = 0; r < mm->n_row; r += 16) {
        const uint8_t *row[16];
        for (size_t i = 0; i < 16; i++)
            row[i] = mm->w + MOE_MIN(r + i, mm->n_row - 1) * mm->w_stride;
        tcq_parity_512 p[TCQ_TURNS];
        memset(p, 0, sizeof p);
        __m512 acc = _mm512_setzero_ps();
        const x86_ahead next = x86_ahead_rows(mm, r, 16);
        /* A second line of each page: Zen 4, rows of 2048, one and two threads, GB/s: TCQ4 12.5 to
         * 15.9 and 21.5 to 24.4, TCQ5 17.7 to 17.3 and 27.2 to 27.2. */
        for (size_t i = 0; i < 16 * mm->w_stride; i += X86_PAGE)
            _mm_prefetch((const char *)(next.first + X86_AHEAD_PAGES + i), _MM_HINT_T0);
        for (size_t b0 = 0; b0 < n_block; b0 += TCQ_TURNS) {
            MOE_UNROLL
            for (size_t i = 0; i < TCQ_TURNS; i++) {
                const size_t b = b0 + i;
                if (b == n_block)
                    break;
                tcq_parity_512 *const turn[3] = {&p[(3 - i) % 3], &p[(4 - i) % 3], &p[(5 - i) % 3]};
                x86_fetch_ahead(next, b * 16 * block_bytes, 16 * block_bytes);
                const __m512 d = tcq_f16_512(row, b * block_bytes);
                MOE_UNROLL
                for (size_t half = 0; half < 2; half++) {
                    tcq_values_512 w;
                    load(row, b * block_bytes, half, turn, &w);
                    acc = tcq_add_512(&w, d, &x, 2 * b + half, bias, acc);
                }
            }
        }
        const size_t n_row = MOE_MIN(mm->n_row - r, (size_t)16);
        _mm512_mask_storeu_ps(mm->y + r, (__mmask16)((1u << n_row) - 1), acc);
    }
}

/* ------------------------------------------------------------------------ AVX-512 VNNI, gemm -- */

/* The codes of block b (constant) of 256 weights, from its words; the parities as above. */
typedef void tcq_tile_512_fn(const __m512i *word, size_t at, tcq_parity_512 *const parity[3],
                             __m512i code[16]);

/* The body of an x86_512_load_fn. Where three parities take turns and four blocks are a tile, the
 * next tile finds them in other places. */
MOE_VNNI512_INLINE void tcq_tile_512(x86_512_rows *rows, size_t offset, size_t block_bytes,
                                     tcq_tile_512_fn *unpack, x86_512_tile *tile)
{
    enum { N_BLOCK = X86_512_K / TCQ_LEN };
    _Static_assert(sizeof(tcq_parity_512[TCQ_TURNS]) == sizeof *rows->state, "as much");
    __m512i word[66 * N_BLOCK / 4];
    tcq_parity_512 p[TCQ_TURNS];
    memcpy(p, rows->state->v, sizeof p);
    x86_512_load_words(rows, offset, N_BLOCK * block_bytes, word);
    for (size_t b = 0; b < N_BLOCK; b += 2) {
        const __m512i *w = word + b * block_bytes / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            const size_t at = i * block_bytes;
            const __m512 d = x86_512_f16_at(w, at);
            tcq_parity_512 *const turn[3] = {&p[2 - (b + i + 2) % 3], &p[2 - (b + i + 1) % 3],
                                             &p[2 - (b + i) % 3]};
            unpack(w, at + 2, turn, tile->code + 16 * (b + i));
            tile->d[2 * (b + i)] = tile->d[2 * (b + i) + 1] = d;
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < TCQ_TURNS; i++) // turn N_BLOCK becomes turn 0
        memcpy(rows->state->v[2 - (i + 2) % 3], &p[2 - (N_BLOCK + i + 2) % 3], sizeof p[0]);
}

/* A type's kernels, made of `type`_load_512 and `type`_unpack_512. */
#define TCQ_GEMV_VNNI512(type, bias)                                                               \
    MOE_VNNI512 static void type##_gemv_vnni512(const moe_mm *mm)                                  \
    {                                                                                              \
        tcq_gemv_vnni512(mm, sizeof(type##_block), type##_load_512, bias);                         \
    }
#define TCQ_GEMM_VNNI512(type, bias)                                                               \
    MOE_VNNI512 static void type##_tile_vnni512(x86_512_rows *rows, size_t offset,                 \
                                                x86_512_tile *tile)                                \
    {                                                                                              \
        tcq_tile_512(rows, offset, sizeof(type##_block), type##_unpack_512, tile);                 \
    }                                                                                              \
    static const x86_512_format type##_vnni512 = {                                                 \
        .block_len = TCQ_LEN, .block_bytes = sizeof(type##_block), .offset = bias,                 \
        .load = type##_tile_vnni512, .steps = &x86_512_block};                                     \
    MOE_VNNI512 static void type##_gemm_vnni512(const moe_mm *mm)                                  \
    {                                                                                              \
        x86_512_state state[X86_512_TILES];                                                        \
        x86_512_gemm_with(mm, &type##_vnni512, state);                                             \
    }
#endif

/* ------------------------------------------------------------------------------------- NEON -- */
#if MOE_ARM64

/* As arm32_gemv and arm32_gemm, whose comments hold here, with paths that run through the row. */
typedef struct tcq_arm {
    size_t block_bytes;
    /* The values plus bias of a step of one row, k 0..15 and k 16..31; the parities as for
     * tcq_dot_avx2_fn. */
    void (*values)(const uint8_t *block, size_t half, uint8x16_t (*const parity[3])[2],
                   uint8x16_t v[2]);
    uint8_t bias;
} tcq_arm;

/* Parities of a row: of each of three blocks, and of a step, as many vectors as a type needs. */
typedef uint8x16_t tcq_parity_arm[TCQ_TURNS][2][2];

/* The parities in vector i in two steps. */
MOE_INLINE uint8x16_t tcq_parity_next_arm(uint8x16_t (*const parity[3])[2], size_t half, size_t i,
                                          uint8x16_t code)
{
    const uint8x16_t five = half ? parity[1][0][i] : parity[2][1][i];
    const uint8x16_t six = half ? parity[2][1][i] : parity[2][0][i];
    return veorq_u8(code, veorq_u8(five, six));
}

/* Step t of a row, as signed values. */
MOE_INLINE void tcq_unpack_arm(const uint8_t *row, size_t t, const tcq_arm *f, tcq_parity_arm p,
                               int8x16_t value[2])
{
    const size_t b = t / 2;
    uint8x16_t (*const turn[3])[2] = {p[2 - (b + 2) % 3], p[2 - (b + 1) % 3], p[2 - b % 3]};
    uint8x16_t v[2];
    f->values(row + b * f->block_bytes, t % 2, turn, v);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++)
        value[i] = vreinterpretq_s8_u8(vsubq_u8(v[i], vdupq_n_u8(f->bias)));
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
        tcq_parity_arm parity[4];
        arm_rows(mm, r, 4, row);
        memset(parity, 0, sizeof parity);
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
                tcq_unpack_arm(row[i], t, f, parity[i], v);
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
        tcq_parity_arm parity[8];
        float32x4_t acc[ARM_TOKENS + 1][2];
        arm_rows(mm, r, 8, row);
        memset(parity, 0, sizeof parity);
        memset(acc, 0, (n_tok + 1) * sizeof acc[0]);
        const uintptr_t next = (uintptr_t)row[0] + 8 * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / TCQ_PATHS; b++) {
            const size_t at = b / 2 * f->block_bytes;
            int8x16_t low[8], high[8], code[16];
            if (b % 2 == 0)
                arm_prefetch(next + 8 * at, 8 * f->block_bytes);
            for (size_t i = 0; i < 8; i++) {
                int8x16_t v[2];
                tcq_unpack_arm(row[i], b, f, parity[i], v);
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

/* A type's kernels, made of `type`_values_arm. */
#define TCQ_ARM(type, bias)                                                                        \
    static const tcq_arm type##_arm = {sizeof(type##_block), type##_values_arm, bias};             \
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
    if (cpu & MOE_CPU_AVX_VNNI)                                                                    \
        best.gemm = type##_gemm_avxvnni;                                                           \
    if (cpu & MOE_CPU_AVX512_VNNI)                                                                 \
        best = (moe_kernels){type##_gemv_vnni512, type##_gemm_vnni512};
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

/* A type's ladder and its entry of the table; `plane` and `blocks`: to_plane and from_plane. */
#define TCQ_QUANT(type, public_name, disk_id, plane, blocks, ...)                                  \
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
        .to_plane = plane,                                                                         \
        .from_plane = blocks,                                                                      \
    };

#endif
