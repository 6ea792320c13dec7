/* quant/x86_k.h - what the AVX2 kernels of the formats with superblocks of 256 weights share: the
 * loops over rows, superblocks and tokens. They are bodies, as in x86.h; a format brings two
 * functions and a struct x86_k_format.
 *
 * One token (gemv). 8 rows side by side: their integer sums become one vector, in row order, which
 * goes through the format's float expression. While 8 rows are multiplied the next 8 are fetched,
 * in the order in which they lie in memory.
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

typedef struct x86_k_tile {
    __m256i code[K_LEN / 4];
    __m256i scale[8];
    __m256i min[8]; // not with X86_K_NO_MIN
    __m256 d, dmin; // [row]
} x86_k_tile;

typedef enum x86_k_min {
    X86_K_NO_MIN,
    X86_K_INT_MIN,  /* sum of scale * products - sum of min * sums, an integer, times d */
    X86_K_FLOAT_MIN /* d * sum of scale * products - dmin * sum of min * sums */
} x86_k_min;

/* The integers of 8 rows, and the numbers that they belong to. */
typedef struct x86_k_sums {
    __m256i dot, min; // [row]; min and dmin with X86_K_FLOAT_MIN only
    __m256 d, dmin;   // [row]
} x86_k_sums;

typedef struct x86_k_format {
    size_t block_bytes;
    x86_k_min min;
    int group;        // weights that share a scale: 16 or 32
    int n_fold;       // how many times two products of a code and an activation fit into 16 bits:
                      // n_fold * 2 * 127 * code <= 32767. 1: the codes are signed, -127..127
} x86_k_format;

/* The superblocks at `offset` of 8 rows times 256 activations. */
typedef void x86_k_dot8_fn(const uint8_t *const row[8], size_t offset, const int8_t *q,
                           const int16_t *sum, x86_k_sums *out);
/* Unpacks them. */
typedef void x86_k_load_fn(const uint8_t *const row[8], size_t offset, x86_k_tile *tile);

MOE_AVX2_INLINE __m256i x86_k_load(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
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

/* 16 bytes of 8 rows, to 4 vectors that hold 4 bytes of each row. Row i stands in the
 * lower, row i + 4 in the upper half of in[i]. */
MOE_AVX2_INLINE void x86_k_transpose(const __m256i in[4], __m256i out[4])
{
    __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
    __m256i c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
}

MOE_AVX2_INLINE void x86_k_load_transposed(const uint8_t *const row[8], size_t offset,
                                           __m256i out[4])
{
    const __m256i in[4] = {x86_load_pair(row[0] + offset, row[4] + offset),
                           x86_load_pair(row[1] + offset, row[5] + offset),
                           x86_load_pair(row[2] + offset, row[6] + offset),
                           x86_load_pair(row[3] + offset, row[7] + offset)};
    x86_k_transpose(in, out);
}

/* The first 16 bytes of 8 superblocks of Q4_K or Q5_K: d, dmin, scales and minima, all unpacked. */
typedef struct x86_k_header {
    __m256 d, dmin;    // [row]
    __m256i scale[2];  // [row][4] bytes: groups 0..3, 4..7
    __m256i min[2];
} x86_k_header;

MOE_AVX2_INLINE x86_k_header x86_k_load_header(const uint8_t *const row[8], size_t offset)
{
    const __m256i low4 = _mm256_set1_epi8(15), low6 = _mm256_set1_epi8(63);
    const __m256i top2 = _mm256_set1_epi8(48);
    __m256i v[4]; /* d and dmin, bytes 0..3, 4..7, 8..11 of the packed scales */
    x86_k_load_transposed(row, offset, v);
    __m256i dd = _mm256_packus_epi32(_mm256_and_si256(v[0], _mm256_set1_epi32(0xffff)),
                                     _mm256_srli_epi32(v[0], 16));
    dd = _mm256_permute4x64_epi64(dd, 0xd8);
    return (x86_k_header){
        _mm256_cvtph_ps(_mm256_castsi256_si128(dd)),
        _mm256_cvtph_ps(_mm256_extracti128_si256(dd, 1)),
        {_mm256_and_si256(v[1], low6),
         _mm256_or_si256(_mm256_and_si256(v[3], low4),
                         _mm256_and_si256(_mm256_srli_epi16(v[1], 2), top2))},
        {_mm256_and_si256(v[2], low6),
         _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v[3], 4), low4),
                         _mm256_and_si256(_mm256_srli_epi16(v[2], 2), top2))}};
}

/* Sum over the groups of minima times activations, for 8 rows. */
MOE_AVX2_INLINE __m256i x86_k_min_sum(const x86_k_header *h, const int16_t *sum)
{
    const __m256i even = _mm256_set1_epi16(255);
    /* Sums of 32, in the order 0 2 | 1 3 | 4 6 | 5 7. */
    __m128i s = _mm_hadd_epi16(_mm_loadu_si128((const __m128i *)sum),
                               _mm_loadu_si128((const __m128i *)(sum + 8)));
    s = _mm_shufflehi_epi16(_mm_shufflelo_epi16(s, 0xd8), 0xd8);
    const __m256i v = x86_k_twice(s);
    __m256i a = _mm256_madd_epi16(_mm256_and_si256(h->min[0], even), _mm256_shuffle_epi32(v, 0x00));
    __m256i b = _mm256_madd_epi16(_mm256_srli_epi16(h->min[0], 8), _mm256_shuffle_epi32(v, 0x55));
    __m256i c = _mm256_madd_epi16(_mm256_and_si256(h->min[1], even), _mm256_shuffle_epi32(v, 0xaa));
    __m256i d = _mm256_madd_epi16(_mm256_srli_epi16(h->min[1], 8), _mm256_shuffle_epi32(v, 0xff));
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}

/* The scale of group g (constant) of row r in all of the lower half, of row r + 4 in the upper. */
MOE_AVX2_INLINE __m256i x86_k_scale(const x86_k_header *h, int r, int g)
{
    return _mm256_shuffle_epi8(h->scale[g / 4],
                               _mm256_set1_epi16((int16_t)(INT16_MIN | (4 * r + g % 4))));
}

/* -------------------------------------------------------------------------------- one token -- */

/* For formats that multiply row by row: dot[r] are 8 numbers whose sum is the integer that d
 * belongs to, the minimum's part included with X86_K_INT_MIN, and min[r] likewise for dmin. d
 * stands at `d_offset` in the rows, dmin behind it. */
MOE_AVX2_INLINE void x86_k_sum_rows(const __m256i dot[8], const __m256i min[8],
                                    const uint8_t *const row[8], size_t d_offset, x86_k_min kind,
                                    x86_k_sums *out)
{
    out->dot = x86_sum8_i32(dot);
    out->d = x86_f16x8(row, d_offset);
    if (kind == X86_K_FLOAT_MIN) {
        out->min = x86_sum8_i32(min);
        out->dmin = x86_f16x8(row, d_offset + 2);
    }
}

/* acc + the part of one superblock of 8 rows: the expression of the formats. */
MOE_AVX2_INLINE __m256 x86_k_add(const x86_k_sums *s, x86_k_min kind, __m256 x_scale, __m256 acc)
{
    __m256 dot = _mm256_cvtepi32_ps(s->dot);
    if (kind != X86_K_FLOAT_MIN)
        return _mm256_fmadd_ps(_mm256_mul_ps(x_scale, s->d), dot, acc);
    __m256 term = _mm256_mul_ps(s->d, dot);
    term = _mm256_fnmadd_ps(s->dmin, _mm256_cvtepi32_ps(s->min), term);
    return _mm256_fmadd_ps(x_scale, term, acc);
}

MOE_AVX2_INLINE void x86_k_gemv(const moe_mm *mm, const x86_k_format *f, x86_k_dot8_fn *dot8)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / K_LEN;
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        uintptr_t ahead = (uintptr_t)row[0] + 8 * mm->w_stride;
        __m256 acc = _mm256_setzero_ps();
        for (size_t b = 0; b < n_block; b++) {
            for (size_t i = 0; i < 8 * f->block_bytes; i += 64)
                _mm_prefetch((const char *)(ahead + i), _MM_HINT_T0);
            ahead += 8 * f->block_bytes;
            x86_k_sums s;
            dot8(row, b * f->block_bytes, x.q + K_LEN * b, x.sum + 16 * b, &s);
            acc = x86_k_add(&s, f->min, _mm256_broadcast_ss(x.scale + b), acc);
        }
        x86_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* ------------------------------------------------------------------------------ many tokens -- */

/* The tile's scales, or minima, from those of 16 groups: in[i] holds the signed bytes 4i .. 4i + 3
 * of each row. */
MOE_AVX2_INLINE void x86_k_spread_pairs(const __m256i in[4], __m256i out[8])
{
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
    MOE_UNROLL
    for (int i = 0; i < 4; i++) {
        out[2 * i] = _mm256_srai_epi16(_mm256_shuffle_epi8(in[i], low), 8);
        out[2 * i + 1] = _mm256_srai_epi16(_mm256_shuffle_epi8(in[i], high), 8);
    }
}

/* Everything of a tile of Q4_K or Q5_K but the codes. */
MOE_AVX2_INLINE void x86_k_load_scales(const uint8_t *const row[8], size_t offset,
                                       x86_k_tile *tile)
{
    const x86_k_header h = x86_k_load_header(row, offset);
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
    MOE_UNROLL
    for (int g = 0; g < 8; g++) {
        const __m256i at = _mm256_add_epi8(first, _mm256_set1_epi16((int16_t)(g % 4)));
        tile->scale[g] = _mm256_shuffle_epi8(h.scale[g / 4], at);
        tile->min[g] = _mm256_shuffle_epi8(h.min[g / 4], at);
    }
    tile->d = h.d;
    tile->dmin = h.dmin;
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

/* A chain of additions stays a chain: as a tree, which compilers prefer, it takes more registers
 * than there are. */
MOE_AVX2_INLINE void x86_k_pin(__m256i *v)
{
    __asm__("" : MOE_X86_REGISTER(*v));
}

/* sum[i] += the scaled products of k 32 p .. 32 p + 31 of tile i % n_tile with token i / n_tile.
 * n_tile and n_tok are constants, n_tile * n_tok <= 8. */
MOE_AVX2_INLINE void x86_k_dot32(const x86_k_tile *tile, size_t p, const int8_t *const *q,
                                 __m256i *sum, size_t n_tile, size_t n_tok, const x86_k_format *f)
{
    const __m256i even = _mm256_set1_epi32(0x01000100), odd = _mm256_set1_epi32(0x03020302);
    const __m256i row = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c,
                                          0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const size_t n_fold = (size_t)f->n_fold, n_part = 8 / n_fold;
    MOE_UNROLL
    for (size_t i = 0; i < n_part; i++) {
        __m256i part[8];
        MOE_UNROLL
        for (size_t k = 0; k < n_fold; k++) {
            const size_t at = i * n_fold + k;
            MOE_UNROLL
            for (size_t j = 0; j < n_tile * n_tok; j++) {
                const __m256i code = tile[j % n_tile].code[8 * p + at];
                const __m256i v = x86_k_quad(code, q[j / n_tile] + 32 * p + 4 * at, f);
                part[j] = k == 0 ? v : _mm256_add_epi16(part[j], v);
                x86_k_pin(&part[j]);
            }
        }
        MOE_UNROLL
        for (size_t j = 0; j < n_tile * n_tok; j++) {
            __m256i scale = tile[j % n_tile].scale[p];
            if (f->group == 16)
                scale = _mm256_shuffle_epi8(scale,
                                            _mm256_add_epi8(row, i * n_fold < 4 ? even : odd));
            sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(part[j], scale));
            x86_k_pin(&sum[j]);
        }
    }
}

/* The tokens' sums of the rows computed at once. */
enum { X86_K_TILES = 2 };
typedef __m256 x86_k_acc[X86_K_TILES];

/* acc[t] += n_tile tiles times superblock b of token t, for n_tok tokens; n_tile and n_tok are
 * constants, n_tile * n_tok <= 8. */
MOE_AVX2_INLINE void x86_k_step(const x86_k_tile *tile, const moe_q8 *x, size_t b, x86_k_acc *acc,
                                size_t n_tile, size_t n_tok, const x86_k_format *f)
{
    const int8_t *q[4];
    __m256i sum[8];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        q[t] = x[t].q + K_LEN * b;
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++)
        sum[j] = _mm256_setzero_si256();
    for (size_t p = 0; p < 8; p++)
        x86_k_dot32(tile, p, q, sum, n_tile, n_tok, f);
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++) {
        const size_t t = j / n_tile, r = j % n_tile;
        __m256i min = _mm256_setzero_si256();
        const __m256 x_scale = _mm256_broadcast_ss(x[t].scale + b);
        if (f->min != X86_K_NO_MIN) {
            MOE_UNROLL
            for (size_t p = 0; p < 8; p++) {
                int32_t two;
                memcpy(&two, x[t].sum + 16 * b + 2 * p, 4);
                min = _mm256_add_epi32(min, _mm256_madd_epi16(tile[r].min[p],
                                                              _mm256_set1_epi32(two)));
            }
        }
        x86_k_sums s = {sum[j], min, tile[r].d, tile[r].dmin};
        if (f->min == X86_K_INT_MIN)
            s.dot = _mm256_sub_epi32(sum[j], min);
        acc[t][r] = x86_k_add(&s, f->min, x_scale, acc[t][r]);
    }
}

/* Tokens computed on one tile before the next is unpacked, and the number from which on a tile is
 * worth its unpacking. */
enum { X86_K_TOKENS = 64, X86_K_TOKENS_MIN = 4 };

/* 8 n_tile rows from r on, n_tile constant, times the tokens of x, n_tok <= X86_K_TOKENS. The rows
 * that come next are fetched, in the order in which they lie in memory, if `fetch`. */
MOE_AVX2_INLINE void x86_k_gemm_rows(const moe_mm *mm, size_t r, size_t n_tile, const moe_q8 *x,
                                     size_t n_tok, bool fetch, x86_k_acc *acc,
                                     const x86_k_format *f, x86_k_load_fn *load)
{
    const size_t n_block = mm->n_in / K_LEN, panel_bytes = 8 * n_tile * f->block_bytes;
    const size_t step_bytes = fetch ? (size_t)align_up(4 * panel_bytes / n_tok, 64) : 0;
    uintptr_t next = (uintptr_t)mm->w + (r + 8 * n_tile) * mm->w_stride;
    const uint8_t *row[X86_K_TILES][8];
    for (size_t i = 0; i < n_tile; i++)
        x86_rows(mm, r + 8 * i, row[i]);
    memset(acc, 0, n_tok * sizeof *acc);
    for (size_t b = 0; b < n_block; b++) {
        x86_k_tile tile[X86_K_TILES];
        for (size_t i = 0; i < n_tile; i++)
            load(row[i], b * f->block_bytes, &tile[i]);
        size_t t = 0;
        for (; t + 4 <= n_tok; t += 4) {
            x86_prefetch(next, step_bytes);
            next += step_bytes;
            x86_k_step(tile, x + t, b, acc + t, n_tile, 4, f);
        }
        for (; t < n_tok; t++)
            x86_k_step(tile, x + t, b, acc + t, n_tile, 1, f);
    }
}

/* Up to X86_K_TOKENS tokens from t0 on. Two tiles times 4 tokens take 6 loads for 8 products, one
 * takes 5 for 4, which is more than there is time for; but two leave no registers for the sums,
 * which matters where few products are added in 16 bits. */
MOE_AVX2_INLINE void x86_k_gemm_tokens(const moe_mm *mm, size_t t0, size_t n_tok,
                                       const x86_k_format *f, x86_k_load_fn *load)
{
    moe_q8 x[X86_K_TOKENS];
    x86_k_acc acc[X86_K_TOKENS];
    for (size_t t = 0; t < n_tok; t++)
        x[t] = act_q8(MOE_ACT_Q8_256, mm->x + (t0 + t) * mm->x_stride, mm->n_in);
    const size_t n_tile = f->n_fold >= 4 ? X86_K_TILES : 1;
    for (size_t r = 0; r < mm->n_row; r += 8 * n_tile) {
        const size_t n_row = MOE_MIN(mm->n_row - r, 8 * n_tile);
        if (n_tile == 2 && n_row > 8)
            x86_k_gemm_rows(mm, r, 2, x, n_tok, t0 == 0, acc, f, load);
        else
            x86_k_gemm_rows(mm, r, 1, x, n_tok, t0 == 0, acc, f, load);
        for (size_t t = 0; t < n_tok; t++)
            for (size_t i = 0; i < n_row; i += 8)
                x86_store_rows(mm->y + (t0 + t) * mm->y_stride + r + i, acc[t][i / 8], n_row - i);
    }
}

/* Few tokens: one by one, on 8 rows at a time, which stay in the cache. */
MOE_AVX2_INLINE void x86_k_gemm_few(const moe_mm *mm, moe_mm_fn *gemv)
{
    for (size_t r = 0; r < mm->n_row; r += 8)
        for (size_t t = 0; t < mm->n_tok; t++) {
            moe_mm part = *mm;
            part.w += r * mm->w_stride;
            part.x += t * mm->x_stride;
            part.y += t * mm->y_stride + r;
            part.n_row = MOE_MIN(mm->n_row - r, 8);
            part.n_tok = 1;
            gemv(&part);
        }
}

MOE_AVX2_INLINE void x86_k_gemm(const moe_mm *mm, const x86_k_format *f, x86_k_load_fn *load,
                                moe_mm_fn *gemv)
{
    if (mm->n_tok < X86_K_TOKENS_MIN) {
        x86_k_gemm_few(mm, gemv);
        return;
    }
    for (size_t t = 0; t < mm->n_tok; t += X86_K_TOKENS)
        x86_k_gemm_tokens(mm, t, MOE_MIN(mm->n_tok - t, X86_K_TOKENS), f, load);
}

#endif
#endif
