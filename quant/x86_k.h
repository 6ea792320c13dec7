/* quant/x86_k.h - what the AVX2 kernels of the formats with superblocks of 256 weights share: parts
 * of their tiles (x86_tile.h), and the loop over rows and superblocks for one token (gemv). The
 * loop is a body, as in x86.h; a format brings one function.
 *
 * 8 rows are multiplied side by side: their integer sums become one vector, in row order, which
 * goes through the format's float expression. Meanwhile the next 8 rows are fetched, in the order
 * in which they lie in memory.
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_X86_K_H
#define MOE_QUANT_X86_K_H

#include "k.h"
#include "x86_tile.h"

#if MOE_X86

/* The superblocks at `offset` of 8 rows times 256 activations. */
typedef void x86_k_dot8_fn(const uint8_t *const row[8], size_t offset, const int8_t *q,
                           const int16_t *sum, x86_k_sums *out);

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
    x86_load_transposed(row, offset, v);
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
 * belongs to, and min[r] likewise for dmin. d
 * stands at `d_offset` in the rows, dmin behind it. */
MOE_AVX2_INLINE void x86_k_sum_rows(const __m256i dot[8], const __m256i min[8],
                                    const uint8_t *const row[8], size_t d_offset, x86_kind kind,
                                    x86_k_sums *out)
{
    out->dot = x86_sum8_i32(dot);
    out->d = x86_f16x8(row, d_offset);
    if (kind == X86_K_FLOAT_MIN) {
        out->min = x86_sum8_i32(min);
        out->dmin = x86_f16x8(row, d_offset + 2);
    }
}

MOE_AVX2_INLINE void x86_k_gemv(const moe_mm *mm, size_t block_bytes, x86_kind kind,
                                x86_k_dot8_fn *dot8)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / K_LEN;
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        uintptr_t ahead = x86_ahead(mm, r);
        __m256 acc = _mm256_setzero_ps();
        for (size_t b = 0; b < n_block; b++) {
            for (size_t i = 0; i < 8 * block_bytes; i += 64)
                _mm_prefetch((const char *)(ahead + i), _MM_HINT_T0);
            ahead += 8 * block_bytes;
            x86_k_sums s;
            dot8(row, b * block_bytes, x.q + K_LEN * b, x.sum + 16 * b, &s);
            acc = x86_k_add(&s, kind, _mm256_broadcast_ss(x.scale + b), acc);
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
                                       x86_tile *tile)
{
    const x86_k_header h = x86_k_load_header(row, offset);
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
    MOE_UNROLL
    for (int g = 0; g < 8; g++) {
        const __m256i at = _mm256_add_epi8(first, _mm256_set1_epi16((int16_t)(g % 4)));
        tile->scale[g] = _mm256_shuffle_epi8(h.scale[g / 4], at);
    }
    const __m256i pair = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    MOE_UNROLL
    for (int p = 0; p < 4; p++) {
        const __m256i at = _mm256_add_epi8(pair, _mm256_set1_epi16((int16_t)(2 * (p % 2))));
        tile->min[p] = _mm256_shuffle_epi8(h.min[p / 2], at);
    }
    tile->d[0] = h.d;
    tile->m[0] = h.dmin;
}

#endif
#endif
