/* quant/x86.h - what the AVX2 kernels of all formats share: loading 8 rows side by side, exact
 * integer dot products, sums across lanes, and the loops over rows, blocks and tokens.
 *
 * Blocks of 32 weights are computed 8 rows at a time. A vector holds 16 weights of row r in its
 * lower and 16 of row r + 4 in its upper half, so that the activations are one broadcast and the
 * sums of the four vectors fold into one vector in row order:
 *
 *     lo[r]   k 0..15 of row r | k 0..15 of row r + 4      r = 0..3
 *     hi[r]   k 16..31         | k 16..31
 *
 * The last group of a matrix repeats its last row instead of reading past it. Must never: read a
 * byte outside a row, or compute a float in another order than the C kernel of the format. */
#ifndef MOE_QUANT_X86_H
#define MOE_QUANT_X86_H

#include "quant.h"

#if MOE_X86
#include MOE_X86_INTRINSICS

#define MOE_AVX2 MOE_TARGET("avx2,fma,f16c")
#define MOE_AVX2_INLINE MOE_UNUSED MOE_INLINE MOE_AVX2

/* ---------------------------------------------------------------------------- loading rows -- */

/* Where rows r .. r + 7 begin; those past the end are the last row once more. */
MOE_INLINE void x86_rows(const moe_mm *mm, size_t r, const uint8_t *row[8])
{
    for (size_t i = 0; i < 8; i++)
        row[i] = mm->w + MOE_MIN(r + i, mm->n_row - 1) * mm->w_stride;
}

/* 16 bytes of one place and 16 of another, in the halves of a vector. */
MOE_AVX2_INLINE __m256i x86_load_pair(const uint8_t *low, const uint8_t *high)
{
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
        _mm_loadu_si128((const __m128i *)high), 1);
}

/* 16 activations in both halves. */
MOE_AVX2_INLINE __m256i x86_load_twice(const int8_t *q)
{
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)q));
}

/* The 16-bit word at `offset` of each of 8 rows, in row order. */
MOE_AVX2_INLINE __m128i x86_u16x8(const uint8_t *const row[8], size_t offset)
{
    __m128i v = _mm_cvtsi32_si128(load_u16(row[0] + offset));
    v = _mm_insert_epi16(v, load_u16(row[1] + offset), 1);
    v = _mm_insert_epi16(v, load_u16(row[2] + offset), 2);
    v = _mm_insert_epi16(v, load_u16(row[3] + offset), 3);
    v = _mm_insert_epi16(v, load_u16(row[4] + offset), 4);
    v = _mm_insert_epi16(v, load_u16(row[5] + offset), 5);
    v = _mm_insert_epi16(v, load_u16(row[6] + offset), 6);
    return _mm_insert_epi16(v, load_u16(row[7] + offset), 7);
}

MOE_AVX2_INLINE int32_t x86_load_i32(const uint8_t *p)
{
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* The 32-bit word at `offset` of each of 8 rows, in row order. */
MOE_AVX2_INLINE __m256i x86_u32x8(const uint8_t *const row[8], size_t offset)
{
    __m128i a = _mm_cvtsi32_si128(x86_load_i32(row[0] + offset));
    a = _mm_insert_epi32(a, x86_load_i32(row[1] + offset), 1);
    a = _mm_insert_epi32(a, x86_load_i32(row[2] + offset), 2);
    a = _mm_insert_epi32(a, x86_load_i32(row[3] + offset), 3);
    __m128i b = _mm_cvtsi32_si128(x86_load_i32(row[4] + offset));
    b = _mm_insert_epi32(b, x86_load_i32(row[5] + offset), 1);
    b = _mm_insert_epi32(b, x86_load_i32(row[6] + offset), 2);
    b = _mm_insert_epi32(b, x86_load_i32(row[7] + offset), 3);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}

/* The half-precision number at `offset` of each of 8 rows. */
MOE_AVX2_INLINE __m256 x86_f16x8(const uint8_t *const row[8], size_t offset)
{
    return _mm256_cvtph_ps(x86_u16x8(row, offset));
}

/* Writes the results of n <= 8 rows. */
MOE_AVX2_INLINE void x86_store_rows(float *y, __m256 v, size_t n)
{
    if (MOE_LIKELY(n >= 8)) {
        _mm256_storeu_ps(y, v);
        return;
    }
    float lane[8];
    _mm256_storeu_ps(lane, v);
    for (size_t i = 0; i < n; i++)
        y[i] = lane[i];
}

/* -------------------------------------------------------------------------------- summing -- */

/* The sum of the 4 numbers in each half of v0..v3: halves of vector r become lanes r and r + 4. */
MOE_AVX2_INLINE __m256i x86_sum4_i32(__m256i v0, __m256i v1, __m256i v2, __m256i v3)
{
    __m256i a = _mm256_add_epi32(_mm256_blend_epi32(v0, v1, 0xcc), _mm256_alignr_epi8(v1, v0, 8));
    __m256i b = _mm256_add_epi32(_mm256_blend_epi32(v2, v3, 0xcc), _mm256_alignr_epi8(v3, v2, 8));
    __m256 even = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
    __m256 odd = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd);
    return _mm256_add_epi32(_mm256_castps_si256(even), _mm256_castps_si256(odd));
}

/* The same of 8 numbers of 16 bits. The sum of two of them must fit into 16 bits. */
MOE_AVX2_INLINE __m256i x86_sum4_i16(__m256i v0, __m256i v1, __m256i v2, __m256i v3)
{
    const __m256i one = _mm256_set1_epi16(1);
    __m256i a = _mm256_add_epi16(_mm256_blend_epi32(v0, v1, 0xcc), _mm256_alignr_epi8(v1, v0, 8));
    __m256i b = _mm256_add_epi16(_mm256_blend_epi32(v2, v3, 0xcc), _mm256_alignr_epi8(v3, v2, 8));
    __m256 a32 = _mm256_castsi256_ps(_mm256_madd_epi16(a, one));
    __m256 b32 = _mm256_castsi256_ps(_mm256_madd_epi16(b, one));
    return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(a32, b32, 0x88)),
                            _mm256_castps_si256(_mm256_shuffle_ps(a32, b32, 0xdd)));
}

/* The sum of the 8 numbers of each of v[0..7], in the order of the vectors. */
MOE_AVX2_INLINE __m256i x86_sum8_i32(const __m256i v[8])
{
    return x86_sum4_i32(
        _mm256_add_epi32(_mm256_permute2x128_si256(v[0], v[4], 0x20),
                         _mm256_permute2x128_si256(v[0], v[4], 0x31)),
        _mm256_add_epi32(_mm256_permute2x128_si256(v[1], v[5], 0x20),
                         _mm256_permute2x128_si256(v[1], v[5], 0x31)),
        _mm256_add_epi32(_mm256_permute2x128_si256(v[2], v[6], 0x20),
                         _mm256_permute2x128_si256(v[2], v[6], 0x31)),
        _mm256_add_epi32(_mm256_permute2x128_si256(v[3], v[7], 0x20),
                         _mm256_permute2x128_si256(v[3], v[7], 0x31)));
}

/* reduce8() of a vector. */
MOE_AVX2_INLINE float x86_reduce8(__m256 v)
{
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

/* -------------------------------------------------------------------- blocks of 32 weights -- */

/* One block of 8 rows, unpacked. d and m are the rows' scales and offsets. `part` is given: which
 * 32 weights of a longer block are meant. */
typedef struct x86_block {
    __m256i lo[4], hi[4];
    __m256 d, m;
    size_t part;
} x86_block;

/* One block of one token. */
typedef struct x86_x32 {
    __m256i lo, hi;      // k 0..15 twice, k 16..31 twice
    __m256i sum;         // 8 times the two int16 sums of 16
    __m256 d;            // the scale 8 times
} x86_x32;

/* Splits 16 bytes at `offset` of 8 rows into low nibbles (lo) and high nibbles (hi). */
MOE_AVX2_INLINE void x86_nibbles(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i v0 = x86_load_pair(row[0] + offset, row[4] + offset);
    __m256i v1 = x86_load_pair(row[1] + offset, row[5] + offset);
    __m256i v2 = x86_load_pair(row[2] + offset, row[6] + offset);
    __m256i v3 = x86_load_pair(row[3] + offset, row[7] + offset);
    w->lo[0] = _mm256_and_si256(v0, mask);
    w->lo[1] = _mm256_and_si256(v1, mask);
    w->lo[2] = _mm256_and_si256(v2, mask);
    w->lo[3] = _mm256_and_si256(v3, mask);
    w->hi[0] = _mm256_and_si256(_mm256_srli_epi16(v0, 4), mask);
    w->hi[1] = _mm256_and_si256(_mm256_srli_epi16(v1, 4), mask);
    w->hi[2] = _mm256_and_si256(_mm256_srli_epi16(v2, 4), mask);
    w->hi[3] = _mm256_and_si256(_mm256_srli_epi16(v3, 4), mask);
}

/* `value` where the bit k of a 32-bit word is set that `words` holds for each half, else 0: for
 * bytes k = 0 to 15 of each half, or 16 to 31. `at` is the place of the word in its half, plus 2
 * for the latter. */
MOE_AVX2_INLINE __m256i x86_bits_to(__m256i words, size_t at, char value)
{
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i copy = _mm256_setr_epi64x(0, 0x0101010101010101, 0, 0x0101010101010101);
    __m256i v = _mm256_shuffle_epi8(words, _mm256_add_epi8(copy, _mm256_set1_epi8((char)at)));
    v = _mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit);
    return _mm256_and_si256(v, _mm256_set1_epi8(value));
}

/* The 8 bytes at `offset` of rows 0, 1 | 4, 5 and of rows 2, 3 | 6, 7. */
MOE_AVX2_INLINE void x86_heads(const uint8_t *const row[8], size_t offset, __m256i head[2])
{
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        __m128i two[2];
        MOE_UNROLL
        for (size_t k = 0; k < 2; k++)
            two[k] = _mm_unpacklo_epi64(
                _mm_loadl_epi64((const __m128i *)(row[4 * k + 2 * i] + offset)),
                _mm_loadl_epi64((const __m128i *)(row[4 * k + 2 * i + 1] + offset)));
        head[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(two[0]), two[1], 1);
    }
}

/* The half-precision number `at` bytes into each of these, in row order. */
MOE_AVX2_INLINE __m256 x86_head_f16(const __m256i head[2], int at)
{
    const __m256i pick = _mm256_add_epi8(
        _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 1, 4, 5, 8, 9, 12, 13)),
        _mm256_set1_epi8((char)at));
    const __m256i v = _mm256_castps_si256(_mm256_shuffle_ps(
        _mm256_castsi256_ps(head[0]), _mm256_castsi256_ps(head[1]), 0x88));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(
        _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, pick), 0x08)));
}

/* Adds 16 to the code k of a row if bit k is set of the 32 that begin `at` bytes into its 8. Bytes
 * and, four bits further to the left, the same once more: so each bit can be found in the upper
 * half of a byte, and what is left of it there is 16 at least. */
MOE_AVX2_INLINE void x86_fifth_bits(const __m256i head[2], int at, x86_block *w)
{
    const __m256i bit = _mm256_set1_epi32((int)0x80402010), most = _mm256_set1_epi8(16);
    const __m256i from =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(4, 4, 4, 4, 0, 0, 0, 0, 5, 5, 5, 5, 1, 1, 1, 1));
    __m256i both[2];
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++)
        both[i] = _mm256_blend_epi32(_mm256_srli_epi64(head[i], 8 * at),
                                     _mm256_slli_epi64(head[i], 36 - 8 * at), 0xaa);
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const __m256i place = _mm256_add_epi8(from, _mm256_set1_epi8((char)(r % 2 * 8)));
        const __m256i lo = _mm256_shuffle_epi8(both[r / 2], place);
        const __m256i hi =
            _mm256_shuffle_epi8(both[r / 2], _mm256_add_epi8(place, _mm256_set1_epi8(2)));
        w->lo[r] = _mm256_or_si256(w->lo[r], _mm256_min_epu8(_mm256_and_si256(lo, bit), most));
        w->hi[r] = _mm256_or_si256(w->hi[r], _mm256_min_epu8(_mm256_and_si256(hi, bit), most));
    }
}

/* Replaces codes 0..15 by the table's values. */
MOE_AVX2_INLINE void x86_look_up(x86_block *w, const int8_t table[16])
{
    const __m256i t =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)table));
    w->lo[0] = _mm256_shuffle_epi8(t, w->lo[0]);
    w->lo[1] = _mm256_shuffle_epi8(t, w->lo[1]);
    w->lo[2] = _mm256_shuffle_epi8(t, w->lo[2]);
    w->lo[3] = _mm256_shuffle_epi8(t, w->lo[3]);
    w->hi[0] = _mm256_shuffle_epi8(t, w->hi[0]);
    w->hi[1] = _mm256_shuffle_epi8(t, w->hi[1]);
    w->hi[2] = _mm256_shuffle_epi8(t, w->hi[2]);
    w->hi[3] = _mm256_shuffle_epi8(t, w->hi[3]);
}

MOE_AVX2_INLINE __m256i x86_dot_pair_u5(__m256i lo, __m256i hi, const x86_x32 *x)
{
    return _mm256_add_epi16(_mm256_maddubs_epi16(lo, x->lo), _mm256_maddubs_epi16(hi, x->hi));
}

/* Sums of products of unsigned codes 0..31: two folds of 4 products stay below 31 * 127 * 8 =
 * 31496, which fits into 16 bits. */
MOE_AVX2_INLINE __m256i x86_dot_u5(const x86_block *w, const x86_x32 *x)
{
    return x86_sum4_i16(x86_dot_pair_u5(w->lo[0], w->hi[0], x),
                        x86_dot_pair_u5(w->lo[1], w->hi[1], x),
                        x86_dot_pair_u5(w->lo[2], w->hi[2], x),
                        x86_dot_pair_u5(w->lo[3], w->hi[3], x));
}

/* |w| * (x with w's sign) makes one factor unsigned; 2 * 128 * 127 = 32512 fits into 16 bits. */
MOE_AVX2_INLINE __m256i x86_dot_pair_i8(__m256i lo, __m256i hi, const x86_x32 *x)
{
    const __m256i one = _mm256_set1_epi16(1);
    __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(lo), _mm256_sign_epi8(x->lo, lo));
    __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(hi), _mm256_sign_epi8(x->hi, hi));
    return _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
}

/* Sums of products of signed weights -128..127. */
MOE_AVX2_INLINE __m256i x86_dot_i8(const x86_block *w, const x86_x32 *x)
{
    return x86_sum4_i32(x86_dot_pair_i8(w->lo[0], w->hi[0], x),
                        x86_dot_pair_i8(w->lo[1], w->hi[1], x),
                        x86_dot_pair_i8(w->lo[2], w->hi[2], x),
                        x86_dot_pair_i8(w->lo[3], w->hi[3], x));
}

/* factor * (sum of the block's activations). */
MOE_AVX2_INLINE __m256i x86_sum_times(const x86_x32 *x, int16_t factor)
{
    return _mm256_madd_epi16(x->sum, _mm256_set1_epi16(factor));
}

/* Where the 4 bytes of a transposed block of 32 in two groups of 16 stand, of which each has k 0..7
 * in low and k 8..15 in high nibbles. */
MOE_INLINE size_t x86_pair_place(size_t j)
{
    return j / 4 * 2 + j / 2 % 2 * 4 + j % 2;
}

/* acc + (d * x_scale) * sum, as fmaf. */
MOE_AVX2_INLINE __m256 x86_add_scaled(const x86_block *w, const x86_x32 *x, __m256i sum, __m256 acc)
{
    return _mm256_fmadd_ps(_mm256_mul_ps(w->d, x->d), _mm256_cvtepi32_ps(sum), acc);
}

/* The same, then + (m * x_scale) * (sum of the block's activations). */
MOE_AVX2_INLINE __m256 x86_add_affine(const x86_block *w, const x86_x32 *x, __m256i sum, __m256 acc)
{
    acc = x86_add_scaled(w, x, sum, acc);
    return _mm256_fmadd_ps(_mm256_mul_ps(w->m, x->d), _mm256_cvtepi32_ps(x86_sum_times(x, 1)), acc);
}

MOE_AVX2_INLINE x86_x32 x86_load_x32(const moe_q8 *x, size_t b)
{
    int32_t sum;
    memcpy(&sum, x->sum + 2 * b, 4);
    return (x86_x32){x86_load_twice(x->q + 32 * b), x86_load_twice(x->q + 32 * b + 16),
                     _mm256_set1_epi32(sum), _mm256_broadcast_ss(x->scale + b)};
}

/* What a format brings: how 8 rows of its block are unpacked (`offset` bytes into the rows), and
 * how a block enters the sums of its 8 rows. The loops below are bodies: a format's kernel is one
 * call with its own two functions, which the compiler inlines. */
typedef void x86_unpack_fn(const uint8_t *const row[8], size_t offset, x86_block *w);
typedef __m256 x86_step_fn(const x86_block *w, const x86_x32 *x, __m256 acc);

/* What is fetched while weights are multiplied are those that follow in memory, into L2, so far
 * ahead that memory has the time to answer. Prefetches into L1 (T0) share the few slots that L1 has
 * for lines on their way: in a burst each takes 8 to 15 cycles on Zen 4, and a tenth of them is
 * lost. Into L2 (T1) they take 3 to 5, and what then comes from L2 is not waited for. But T1 alone
 * is late at pages of memory whose tables are not in a cache, so one line of each page is fetched
 * into L1 before. And when L2 has too many lines on their way already, some of these are lost as
 * well: each is fetched once more, nearer to where it is needed; if it is there that costs nothing.
 * Zen 4, small pages, GB/s with T0 (8 KiB ahead), T1 alone (16), T1 with pages (8, 16, 24 KiB), one
 * thread: Q4_0, rows of 768: 17.7, 10.1, 17.8, 20.5, 22.0; Q8_0, rows of 2048: 15.2, 17.2, 20.2,
 * 22.1, 21.7; MXFP4, rows of 4096: 12.6, 11.5, 15.6, 17.6, 14.3; two threads: Q8_0, rows of 768:
 * 17.4, 21.8, 30.2, 39.8, 38.3. Pages 16, 32 or 64 KiB before: no difference.
 * Large pages, two threads, of what reading alone gets, fetched once (16 KiB ahead) and twice (16
 * and 8): Q4_K 95 and 98 %, Q6_K 88 and 96, Q8_0 90 and 94, Q4_0 97 and 99, F16 (rows of 576) 88
 * and 95; any of 12 to 32 KiB and half as far the second time: no difference. */
enum {
    X86_AHEAD_FIRST = 16 << 10,
    X86_AHEAD_AGAIN = 8 << 10,
    X86_AHEAD_PAGES = 32 << 10, /* before they are fetched the first time */
    X86_PAGE = 4096
};

/* Fetches weights. Neither a hint past the end of a matrix nor a wrong one does harm. */
MOE_AVX2_INLINE void x86_prefetch(uintptr_t address, size_t bytes)
{
    for (size_t i = (size_t)-address % X86_PAGE; i < bytes; i += X86_PAGE)
        _mm_prefetch((const char *)(address + X86_AHEAD_PAGES + i), _MM_HINT_T0);
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)(address + i), _MM_HINT_T1);
}

/* Where weights that follow in memory are fetched, and where they are fetched once more. */
typedef struct x86_ahead {
    uintptr_t first, again;
} x86_ahead;

MOE_AVX2_INLINE void x86_fetch_ahead(x86_ahead next, size_t at, size_t bytes)
{
    x86_prefetch(next.first + at, bytes);
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)(next.again + at + i), _MM_HINT_T1);
}

/* Fetches activations, which come from a cache and are needed at once. */
MOE_AVX2_INLINE void x86_prefetch_x(uintptr_t address, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)(address + i), _MM_HINT_T0);
}

enum { X86_MOST_TOKENS = 256 }; /* multiplied by unpacked weights before the next are unpacked */

/* How many tokens are multiplied at once: even parts of all. Q8_0, rows of 576, 512 tokens, 256
 * instead of 64 with AVX2: 190 to 200 Gop/s, 256 instead of 128 with AVX-512: 596 to 638. */
MOE_INLINE size_t x86_token_part(const moe_mm *mm)
{
    const size_t n_part = (mm->n_tok - 1) / X86_MOST_TOKENS + 1;
    return (size_t)align_up((mm->n_tok - 1) / n_part + 1, 4);
}

/* The most tokens for which a block is unpacked once, and the most for which no tile (x86_tile.h)
 * pays: making one of signed bytes costs more. */
enum { X86_FEW_STEP = 4, X86_FEW = 3, X86_FEW_SIGNED = 7 };

/* The byte `at` of a matrix's rows, or, past their end, of what is read next. */
MOE_INLINE uintptr_t x86_ahead_at(const moe_mm *mm, size_t at)
{
    const size_t end = mm->n_row * mm->w_stride;
    return mm->next && at >= end ? (uintptr_t)mm->next + (at - end) : (uintptr_t)mm->w + at;
}

/* Where what is fetched while n rows from r on are multiplied by few tokens begins. The second time
 * it is as many times n rows further on as come to X86_AHEAD_AGAIN: the n rows that come next are
 * all there when they are needed, at once. */
MOE_INLINE x86_ahead x86_ahead_rows(const moe_mm *mm, size_t r, size_t n)
{
    const size_t step = n * mm->w_stride;
    const size_t at = r * mm->w_stride + ((size_t)X86_AHEAD_AGAIN + step - 1) / step * step;
    return (x86_ahead){x86_ahead_at(mm, at + X86_AHEAD_FIRST - X86_AHEAD_AGAIN),
                       x86_ahead_at(mm, at)};
}

/* 8 rows from r on times n_tok (constant, <= X86_FEW_STEP) tokens from t0 on. Eight rows are eight
 * streams, too short for the hardware's prefetcher: the next eight, which follow in memory, are
 * fetched as one. Zen 5, one thread, Q4_0 from memory with rows of 2048: 21 GB/s (all that reading
 * gives) instead of 8. */
MOE_AVX2_INLINE void x86_few32_rows(const moe_mm *mm, size_t r, size_t t0, size_t n_tok,
                                    size_t block_bytes, size_t n_part, x86_unpack_fn *unpack,
                                    x86_step_fn *step)
{
    const uint8_t *row[8];
    const x86_ahead next = x86_ahead_rows(mm, r, 8);
    moe_q8 x[X86_FEW_STEP];
    __m256 acc[X86_FEW_STEP];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        x[t] = act_q8(MOE_ACT_Q8_32, mm->x + (t0 + t) * mm->x_stride, mm->n_in);
        acc[t] = _mm256_setzero_ps();
    }
    x86_rows(mm, r, row);
    for (size_t b = 0; b < mm->n_in / 32; b++) {
        const size_t at = b / n_part * block_bytes;
        if (t0 == 0 && b % n_part == 0)
            x86_fetch_ahead(next, 8 * at, 8 * block_bytes);
        x86_block w;
        w.part = b % n_part;
        unpack(row, at, &w);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++) {
            const x86_x32 xb = x86_load_x32(&x[t], b);
            acc[t] = step(&w, &xb, acc[t]);
        }
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        x86_store_rows(mm->y + (t0 + t) * mm->y_stride + r, acc[t], mm->n_row - r);
}

/* The kernel of a format for one token and for few, which meet 8 rows while these are in the
 * cache. Blocks are n_part (constant) times 32 weights, which are walked part by part. */
MOE_AVX2_INLINE void x86_few32_parts(const moe_mm *mm, size_t block_bytes, size_t n_part,
                                     x86_unpack_fn *unpack, x86_step_fn *step)
{
    for (size_t r = 0; r < mm->n_row; r += 8) {
        size_t t = 0;
        for (; t + X86_FEW_STEP <= mm->n_tok; t += X86_FEW_STEP)
            x86_few32_rows(mm, r, t, X86_FEW_STEP, block_bytes, n_part, unpack, step);
        if (mm->n_tok - t == 3)
            x86_few32_rows(mm, r, t, 3, block_bytes, n_part, unpack, step);
        else if (mm->n_tok - t == 2)
            x86_few32_rows(mm, r, t, 2, block_bytes, n_part, unpack, step);
        else if (mm->n_tok - t == 1)
            x86_few32_rows(mm, r, t, 1, block_bytes, n_part, unpack, step);
    }
}

MOE_AVX2_INLINE void x86_few32(const moe_mm *mm, size_t block_bytes, x86_unpack_fn *unpack,
                               x86_step_fn *step)
{
    x86_few32_parts(mm, block_bytes, 1, unpack, step);
}

#endif
#endif
