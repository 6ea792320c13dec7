/* quant/x86_k.h - what the AVX2 kernels of the formats with superblocks of 256 weights share: the
 * loops over rows, superblocks and tokens. A format brings two functions, struct x86_k_format.
 *
 * One token (gemv). The weights are one stream of superblocks, row after row, and are read in the
 * order in which they are stored: memory sets the pace. 8 superblocks give 8 vectors of partial
 * sums, folded together into one vector of sums, whichever rows they belong to; the float part of
 * each goes through the format's expression in vectors, and into the row's sum one by one.
 *
 * Many tokens (gemm). A superblock of 8 rows is unpacked into a tile, transposed so that a vector
 * holds 4 consecutive k of 8 rows:
 *
 *     code[i]   bytes    row 0 k 4i..4i+3 | row 1 k 4i..4i+3 | ... | row 7 k 4i..4i+3
 *     scale[p]  2 int16  row 0: scales of groups of k 32p.., 32p+16.. | row 1 | ... | row 7
 *     min[p]    2 int16  likewise
 *
 * One vector of weights then meets 4 activations of each token, broadcast, and the sums of 8 rows
 * grow in the lanes of one vector: nothing is ever added across lanes.
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_X86_K_H
#define MOE_QUANT_X86_K_H

#include "k.h"
#include "x86.h"

#if MOE_X86

/* A superblock of one row for the tile. The rows are transposed in units of 4 bytes. */
typedef struct x86_k_row {
    uint8_t code[K_LEN];
    int16_t scale[16]; // of 16 weights each
    int16_t min[16];   // what is to be subtracted for each unit of the activations' sums
} x86_k_row;

typedef struct x86_k_tile {
    __m256i code[K_LEN / 4];
    __m256i scale[8], min[8];
    __m256 d, dmin; // [row]
} x86_k_tile;

typedef enum x86_k_min {
    X86_K_NO_MIN,
    X86_K_INT_MIN,  /* sum of scale * products - sum of min * sums, an integer, times d */
    X86_K_FLOAT_MIN /* d * sum of scale * products - dmin * sum of min * sums */
} x86_k_min;

typedef struct x86_k_format {
    size_t block_bytes;
    size_t d_offset;  // of d in the superblock; dmin stands behind it
    x86_k_min min;
    int group;        // weights that share a scale: 16 or 32
    int n_fold;       // how many times two products of a code and an activation fit into 16 bits:
                      // n_fold * 2 * 127 * code <= 32767. 1: the codes are signed, -127..127
    /* One superblock times 256 activations. *dot: 8 numbers whose sum is the integer that d belongs
     * to, the minimum's part included with X86_K_INT_MIN. *min: with X86_K_FLOAT_MIN, the same for
     * dmin. */
    void (*dot)(const uint8_t *w, const int8_t *q, const int16_t *sum, __m256i *dot, __m256i *min);
    void (*unpack)(const uint8_t *w, x86_k_row *row);
} x86_k_format;

MOE_AVX2_INLINE __m256i x86_k_load(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

MOE_AVX2_INLINE void x86_k_store(void *p, __m256i v)
{
    _mm256_storeu_si256((__m256i *)p, v);
}

/* 16 bytes in both halves. */
MOE_AVX2_INLINE __m256i x86_k_twice(__m128i v)
{
    return _mm256_broadcastsi128_si256(v);
}

/* acc + scale * (products of 32 unsigned codes and activations); scale is a vector of int16. */
MOE_AVX2_INLINE __m256i x86_k_madd(__m256i acc, __m256i code, const int8_t *q, __m256i scale)
{
    __m256i part = _mm256_maddubs_epi16(code, x86_k_load(q));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(part, scale));
}

/* The scales and minima of Q4_K and Q5_K; `w` is the superblock, whose bytes 4..15 hold them. */
typedef struct x86_k_scales {
    __m256i low, high; // in both halves: scales of groups 0..3, of groups 4..7, as pairs of int16
    __m256i min;       // minima of groups 0..7, as pairs of int16
} x86_k_scales;

MOE_AVX2_INLINE x86_k_scales x86_k_scale_min(const uint8_t *w)
{
    uint64_t a;
    uint32_t b;
    memcpy(&a, w + 4, 8);
    memcpy(&b, w + 12, 4);
    const uint64_t low = a & 0x3f3f3f3f3f3f3f3f; /* scales 0..3, minima 0..3 */
    const uint64_t high = (a >> 2 & 0x3030303030303030) | (b & 0x0f0f0f0f) |
                          (uint64_t)(b >> 4 & 0x0f0f0f0f) << 32; /* the same of 4..7 */
    const __m256i v = x86_k_twice(_mm_set_epi64x((long long)high, (long long)low));
    const __m256i at = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1));
    const __m256i at_min = _mm256_add_epi8(
        at, _mm256_setr_epi32(0x00040004, 0x00040004, 0x00040004, 0x00040004,
                              0x000c000c, 0x000c000c, 0x000c000c, 0x000c000c));
    return (x86_k_scales){
        _mm256_shuffle_epi8(v, at),
        _mm256_shuffle_epi8(v, _mm256_add_epi8(at, _mm256_set1_epi16(0x0008))),
        _mm256_shuffle_epi8(v, at_min)};
}

/* 16 signed scales of groups of 16 weights. A vector of 32 codes has an even group in its lower and
 * the next in its upper half. */
typedef struct x86_k_scales16 {
    __m256i low;  // groups 0, 2, 4, 6 | 1, 3, 5, 7, as pairs of int16
    __m256i high; // groups 8, 10, 12, 14 | 9, 11, 13, 15
} x86_k_scales16;

MOE_AVX2_INLINE x86_k_scales16 x86_k_spread16(__m128i scales)
{
    const __m256i v = x86_k_twice(scales);
    const __m256i at = _mm256_setr_epi8(-1, 0, -1, 0, -1, 2, -1, 2, -1, 4, -1, 4, -1, 6, -1, 6,
                                        -1, 1, -1, 1, -1, 3, -1, 3, -1, 5, -1, 5, -1, 7, -1, 7);
    const __m256i eight = _mm256_set1_epi16(0x0800);
    return (x86_k_scales16){
        _mm256_srai_epi16(_mm256_shuffle_epi8(v, at), 8),
        _mm256_srai_epi16(_mm256_shuffle_epi8(v, _mm256_add_epi8(at, eight)), 8)};
}

/* acc + scaled products of 128 codes, 8 groups; `scale` is one of the vectors above. */
MOE_AVX2_INLINE __m256i x86_k_madd128(__m256i acc, const __m256i code[4], const int8_t *q,
                                      __m256i scale)
{
    acc = x86_k_madd(acc, code[0], q, _mm256_shuffle_epi32(scale, 0x00));
    acc = x86_k_madd(acc, code[1], q + 32, _mm256_shuffle_epi32(scale, 0x55));
    acc = x86_k_madd(acc, code[2], q + 64, _mm256_shuffle_epi32(scale, 0xaa));
    return x86_k_madd(acc, code[3], q + 96, _mm256_shuffle_epi32(scale, 0xff));
}

/* -------------------------------------------------------------------------------- one token -- */

/* How far ahead of the multiplication memory is fetched. */
enum { X86_K_AHEAD_BYTES = 2048 };

/* 8 superblocks, of any rows, on their way from integers to floats. */
typedef struct x86_k_batch {
    const uint8_t *block[8];
    float x_scale[8];
    __m256i dot[8], min[8];
} x86_k_batch;

/* The two factors, per superblock, that are to be multiplied and added to the row's sum. */
MOE_AVX2_INLINE void x86_k_factors(const x86_k_batch *batch, const x86_k_format *f, float a[8],
                                   float b[8])
{
    __m256 d = x86_f16x8(batch->block, f->d_offset);
    __m256 sum = _mm256_cvtepi32_ps(x86_sum8_i32(batch->dot));
    __m256 x_scale = _mm256_loadu_ps(batch->x_scale);
    if (f->min == X86_K_FLOAT_MIN) {
        __m256 dmin = x86_f16x8(batch->block, f->d_offset + 2);
        __m256 min = _mm256_cvtepi32_ps(x86_sum8_i32(batch->min));
        _mm256_storeu_ps(a, x_scale);
        _mm256_storeu_ps(b, _mm256_fnmadd_ps(dmin, min, _mm256_mul_ps(d, sum)));
    } else {
        _mm256_storeu_ps(a, _mm256_mul_ps(x_scale, d));
        _mm256_storeu_ps(b, sum);
    }
}

MOE_AVX2_INLINE void x86_k_gemv(const moe_mm *mm, const x86_k_format *f)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / K_LEN;
    size_t row = 0, b = 0;         // the superblock that is multiplied next
    size_t row_done = 0, b_done = 0; // and the one that is added next
    float acc = 0;
    x86_k_batch batch;
    memset(&batch, 0, sizeof batch);
    for (size_t n, left = mm->n_row * n_block; left > 0; left -= n) {
        n = MOE_MIN(left, 8);
        for (size_t i = 0; i < n; i++) {
            const uint8_t *w = mm->w + row * mm->w_stride + b * f->block_bytes;
            for (size_t k = 0; k < f->block_bytes; k += 64)
                _mm_prefetch((const char *)w + X86_K_AHEAD_BYTES + k, _MM_HINT_T0);
            batch.block[i] = w;
            batch.x_scale[i] = x.scale[b];
            f->dot(w, x.q + K_LEN * b, x.sum + 16 * b, &batch.dot[i], &batch.min[i]);
            if (++b == n_block) {
                b = 0;
                row++;
            }
        }
        for (size_t i = n; i < 8; i++)
            batch.block[i] = batch.block[0];
        float factor[8], term[8];
        x86_k_factors(&batch, f, factor, term);
        for (size_t i = 0; i < n; i++) {
            acc = fmaf(factor[i], term[i], acc);
            if (++b_done == n_block) {
                mm->y[row_done++] = acc;
                acc = 0;
                b_done = 0;
            }
        }
    }
}

/* ------------------------------------------------------------------------------ many tokens -- */

/* 16 bytes of 8 rows, to 4 vectors that hold 4 bytes of each row. */
MOE_AVX2_INLINE void x86_k_transpose(const x86_k_row row[8], size_t offset, __m256i out[4])
{
    const uint8_t *p = (const uint8_t *)row + offset;
    __m256i v0 = x86_load_pair(p, p + 4 * sizeof *row);
    __m256i v1 = x86_load_pair(p + 1 * sizeof *row, p + 5 * sizeof *row);
    __m256i v2 = x86_load_pair(p + 2 * sizeof *row, p + 6 * sizeof *row);
    __m256i v3 = x86_load_pair(p + 3 * sizeof *row, p + 7 * sizeof *row);
    __m256i a = _mm256_unpacklo_epi32(v0, v1), b = _mm256_unpacklo_epi32(v2, v3);
    __m256i c = _mm256_unpackhi_epi32(v0, v1), d = _mm256_unpackhi_epi32(v2, v3);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
}

/* Unpacks the superblocks at `offset` of 8 rows. */
MOE_AVX2_INLINE void x86_k_load_tile(const uint8_t *const row[8], size_t offset,
                                     const x86_k_format *f, x86_k_tile *tile)
{
    x86_k_row unpacked[8];
    for (int r = 0; r < 8; r++)
        f->unpack(row[r] + offset, &unpacked[r]);
    for (size_t i = 0; i < K_LEN / 16; i++)
        x86_k_transpose(unpacked, 16 * i, tile->code + 4 * i);
    for (size_t i = 0; i < 2; i++) {
        x86_k_transpose(unpacked, offsetof(x86_k_row, scale) + 16 * i, tile->scale + 4 * i);
        if (f->min != X86_K_NO_MIN)
            x86_k_transpose(unpacked, offsetof(x86_k_row, min) + 16 * i, tile->min + 4 * i);
    }
    tile->d = x86_f16x8(row, offset + f->d_offset);
    if (f->min == X86_K_FLOAT_MIN)
        tile->dmin = x86_f16x8(row, offset + f->d_offset + 2);
}

/* Products of 4 k of 8 rows with 4 activations. Signed codes: |w| * (x with w's sign). */
MOE_AVX2_INLINE __m256i x86_k_quad(__m256i code, const int8_t *q, const x86_k_format *f)
{
    int32_t four;
    memcpy(&four, q, 4);
    __m256i x = _mm256_set1_epi32(four);
    if (f->n_fold == 1)
        return _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code));
    return _mm256_maddubs_epi16(code, x);
}

/* sum[t] += the scaled products of k 32 p .. 32 p + 31, for n_tok (constant) tokens. */
MOE_AVX2_INLINE void x86_k_dot32(const x86_k_tile *tile, size_t p, const int8_t *const *q,
                                 __m256i *sum, size_t n_tok, const x86_k_format *f)
{
    const __m256i even = _mm256_set1_epi32(0x01000100), odd = _mm256_set1_epi32(0x03020302);
    const __m256i row = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c,
                                          0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m256i pair = tile->scale[p];
    const size_t n_fold = (size_t)f->n_fold;
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i += n_fold) {
        __m256i scale = pair;
        if (f->group == 16)
            scale = _mm256_shuffle_epi8(pair, _mm256_add_epi8(row, i < 4 ? even : odd));
        __m256i part[4];
#pragma GCC unroll 8
        for (size_t k = i; k < i + n_fold; k++) {
            const __m256i code = tile->code[8 * p + k];
#pragma GCC unroll 4
            for (size_t t = 0; t < n_tok; t++) {
                __m256i v = x86_k_quad(code, q[t] + 32 * p + 4 * k, f);
                part[t] = k == i ? v : _mm256_add_epi16(part[t], v);
            }
        }
#pragma GCC unroll 4
        for (size_t t = 0; t < n_tok; t++)
            sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(part[t], scale));
    }
}

/* acc[t] += tile * superblock b of token t, for n_tok (constant, <= 4) tokens. */
MOE_AVX2_INLINE void x86_k_step(const x86_k_tile *tile, const moe_q8 *x, size_t b, __m256 *acc,
                                size_t n_tok, const x86_k_format *f)
{
    const int8_t *q[4];
    __m256i sum[4];
#pragma GCC unroll 4
    for (size_t t = 0; t < n_tok; t++) {
        q[t] = x[t].q + K_LEN * b;
        sum[t] = _mm256_setzero_si256();
    }
    for (size_t p = 0; p < 8; p++)
        x86_k_dot32(tile, p, q, sum, n_tok, f);
#pragma GCC unroll 4
    for (size_t t = 0; t < n_tok; t++) {
        __m256i min = _mm256_setzero_si256();
        __m256 x_scale = _mm256_broadcast_ss(x[t].scale + b);
        if (f->min != X86_K_NO_MIN)
            for (size_t p = 0; p < 8; p++) {
                int32_t two;
                memcpy(&two, x[t].sum + 16 * b + 2 * p, 4);
                min = _mm256_add_epi32(min,
                                       _mm256_madd_epi16(tile->min[p], _mm256_set1_epi32(two)));
            }
        if (f->min == X86_K_FLOAT_MIN) {
            __m256 term = _mm256_mul_ps(tile->d, _mm256_cvtepi32_ps(sum[t]));
            term = _mm256_fnmadd_ps(tile->dmin, _mm256_cvtepi32_ps(min), term);
            acc[t] = _mm256_fmadd_ps(x_scale, term, acc[t]);
        } else {
            __m256 term = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t], min));
            acc[t] = _mm256_fmadd_ps(_mm256_mul_ps(x_scale, tile->d), term, acc[t]);
        }
    }
}

/* Tokens computed on one tile before the next is unpacked, and the number from which on a tile is
 * worth its unpacking. */
enum { X86_K_TOKENS = 64, X86_K_TOKENS_MIN = 3 };

/* Up to X86_K_TOKENS tokens from t0 on. */
MOE_AVX2_INLINE void x86_k_gemm_tokens(const moe_mm *mm, size_t t0, size_t n_tok,
                                       const x86_k_format *f)
{
    const size_t n_block = mm->n_in / K_LEN;
    moe_q8 x[X86_K_TOKENS];
    for (size_t t = 0; t < n_tok; t++)
        x[t] = act_q8(MOE_ACT_Q8_256, mm->x + (t0 + t) * mm->x_stride, mm->n_in);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        __m256 acc[X86_K_TOKENS];
        for (size_t t = 0; t < n_tok; t++)
            acc[t] = _mm256_setzero_ps();
        for (size_t b = 0; b < n_block; b++) {
            x86_k_tile tile;
            x86_k_load_tile(row, b * f->block_bytes, f, &tile);
            size_t t = 0;
            for (; t + 4 <= n_tok; t += 4)
                x86_k_step(&tile, x + t, b, acc + t, 4, f);
            for (; t < n_tok; t++)
                x86_k_step(&tile, x + t, b, acc + t, 1, f);
        }
        for (size_t t = 0; t < n_tok; t++)
            x86_store_rows(mm->y + (t0 + t) * mm->y_stride + r, acc[t], mm->n_row - r);
    }
}

MOE_AVX2_INLINE void x86_k_gemm(const moe_mm *mm, const x86_k_format *f, moe_mm_fn *gemv)
{
    if (mm->n_tok < X86_K_TOKENS_MIN) {
        for (size_t t = 0; t < mm->n_tok; t++) {
            moe_mm one = *mm;
            one.x += t * mm->x_stride;
            one.y += t * mm->y_stride;
            one.n_tok = 1;
            gemv(&one);
        }
        return;
    }
    for (size_t t = 0; t < mm->n_tok; t += X86_K_TOKENS)
        x86_k_gemm_tokens(mm, t, MOE_MIN(mm->n_tok - t, X86_K_TOKENS), f);
}

#endif
#endif
