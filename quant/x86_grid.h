/* quant/x86_grid.h - AVX2 and AVX-512 kernels of the formats of grid.h for few tokens (decode,
 * drafts, experts with few tokens).
 *
 * A point is looked up as a number of 16 bits, in which its 8 codes have 2 bits each or its 4 codes
 * 4 bits each. 16 points thus are 32 bytes, and every two of their bits, or four, one vector of
 * codes: a byte shuffle turns them into values. So a vector v = 0..3 does not hold codes that lie
 * one behind the other, but, of each 8 weights 8i .. 8i + 7,
 *
 *     byte 2i        weight 8i + 2v
 *     byte 2i + 1    weight 8i + 2v + 1           its words are the words v, 4 + v, 8 + v, ...
 *
 * The activations are brought into the same order, once for 8 rows or more. All words of 16 bits
 * with number i belong to the same 8 weights, all words of 32 bits with number g to group g of 16:
 * the sums of a group meet in one lane, without a shuffle, and its scale is one multiplication.
 * TQ1_0 and TQ2_0 have no points and orders of their own; all else is the same.
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_X86_GRID_H
#define MOE_QUANT_X86_GRID_H

#include "grid_data.h"
#include "x86_512_k.h"

#if MOE_X86

/* ---------------------------------------------------------------------------------- points -- */

/* The code of weight k: of 8, at bit 8 (k % 2) + 2 (k / 2); of 4, at bit 8 (k % 2) + 4 (k / 2). */
#define X86_GRID_2(p, k) (((p) >> 2 * (k) & 3) << (8 * ((k) % 2) + (k) / 2 * 2))
#define X86_GRID_3(p, k) (((p) >> 3 * (k) & 7) << (8 * ((k) % 2) + (k) / 2 * 4))
#define X86_GRID_EIGHT(p)                                                                          \
    (X86_GRID_2(p, 0) | X86_GRID_2(p, 1) | X86_GRID_2(p, 2) | X86_GRID_2(p, 3) |                   \
     X86_GRID_2(p, 4) | X86_GRID_2(p, 5) | X86_GRID_2(p, 6) | X86_GRID_2(p, 7))
#define X86_GRID_FOUR(p) (X86_GRID_3(p, 0) | X86_GRID_3(p, 1) | X86_GRID_3(p, 2) | X86_GRID_3(p, 3))

#define X86_GRID_ROW(of, a, b, c, d, e, f, g, h)                                                   \
    of(a), of(b), of(c), of(d), of(e), of(f), of(g), of(h),
#define X86_GRID_EIGHTS(...) X86_GRID_ROW(X86_GRID_EIGHT, __VA_ARGS__)
#define X86_GRID_FOURS(...) X86_GRID_ROW(X86_GRID_FOUR, __VA_ARGS__)

static const uint16_t x86_grid_iq2_xxs[256] = {GRID_IQ2_XXS(X86_GRID_EIGHTS)};
static const uint16_t x86_grid_iq2_xs[512] = {GRID_IQ2_XS(X86_GRID_EIGHTS)};
static const uint16_t x86_grid_iq2_s[1024] = {GRID_IQ2_S(X86_GRID_EIGHTS)};
static const uint16_t x86_grid_iq3_xxs[256] = {GRID_IQ3_XXS(X86_GRID_FOURS)};
static const uint16_t x86_grid_iq3_s[512] = {GRID_IQ3_S(X86_GRID_FOURS)};

/* In the highest of four words, whose others are 0: read 2, 4 or 6 bytes later, the point stands
 * lower. So four points are put together by three ors. */
#define X86_GRID_TOP_EIGHT(p) (uint64_t)X86_GRID_EIGHT(p) << 48
#define X86_GRID_TOP_FOUR(p) (uint64_t)X86_GRID_FOUR(p) << 48
#define X86_GRID_TOP8(...) X86_GRID_ROW(X86_GRID_TOP_EIGHT, __VA_ARGS__)
#define X86_GRID_TOP4(...) X86_GRID_ROW(X86_GRID_TOP_FOUR, __VA_ARGS__)

static const uint64_t x86_grid_top_iq2_xxs[256 + 1] = {GRID_IQ2_XXS(X86_GRID_TOP8)};
static const uint64_t x86_grid_top_iq2_xs[512 + 1] = {GRID_IQ2_XS(X86_GRID_TOP8)};
static const uint64_t x86_grid_top_iq2_s[1024 + 1] = {GRID_IQ2_S(X86_GRID_TOP8)};
static const uint64_t x86_grid_top_iq1[2048 + 1] = {GRID_IQ1(X86_GRID_TOP8)};
static const uint64_t x86_grid_top_iq3_xxs[256 + 1] = {GRID_IQ3_XXS(X86_GRID_TOP4)};
static const uint64_t x86_grid_top_iq3_s[512 + 1] = {GRID_IQ3_S(X86_GRID_TOP4)};

MOE_INLINE uint64_t x86_grid_top(const uint64_t *tops, size_t i, size_t place)
{
    uint64_t v;
    memcpy(&v, (const uint8_t *)tops + 8 * i + 6 - 2 * place, 8);
    return v;
}

/* Points a, b, c, d. */
MOE_INLINE int64_t x86_grid_four(const uint64_t *tops, size_t a, size_t b, size_t c, size_t d)
{
    return (int64_t)(x86_grid_top(tops, a, 0) | x86_grid_top(tops, b, 1) |
                     x86_grid_top(tops, c, 2) | x86_grid_top(tops, d, 3));
}

/* Points whose numbers are four words, or four bytes that stand `step` apart. */
MOE_INLINE int64_t x86_grid_words(const uint64_t *tops, const uint16_t *i)
{
    return x86_grid_four(tops, i[0], i[1], i[2], i[3]);
}

MOE_INLINE int64_t x86_grid_bytes(const uint64_t *tops, const uint8_t *i, size_t step)
{
    return x86_grid_four(tops, i[0], i[step], i[2 * step], i[3 * step]);
}

/* What a format's kernels are made of. */
typedef struct x86_grid_shape {
    int offset;   // AVX-512: codes are weights and this
    size_t n;     // vectors of codes: of 64, or of 32 in each half
    size_t fold;  // AVX2: so many vectors of products fit into sums of 16 bits
    bool has_signs, has_scales;
    bool shifted; // 8 weights have an offset of their own
} x86_grid_shape;

enum { X86_GRID_MOST = 5 }; /* n */

#define X86_GRID_SIGNED(offset, fold) {offset, 4, fold, true, true, false}
#define X86_GRID_SHIFTED {0, 4, 4, false, true, true}
#define X86_GRID_TERNARY(n) {1, n, n, false, false, false}

/* ----------------------------------------------------------------------------------- AVX2 -- */

/* 128 weights. Words of 16 bits belong to 8 weights each, of 32 bits to 16. */
typedef struct x86_grid_half {
    __m256i code[X86_GRID_MOST]; // or magnitudes
    __m256i signs;               // words: a bit for each weight
    __m256i scale;               // words, two for each group
    __m256i shift;               // words, what is added to 8 codes
} x86_grid_half;

enum { X86_GRID_INDICES = 64 }; /* of a superblock, at most */

/* The numbers of a superblock's points, of formats that have them in pieces. Reading one of a
 * vector that has just been written takes long: those of 8 superblocks are written first. */
typedef void x86_grid_index_fn(const uint8_t *block, uint16_t index[X86_GRID_INDICES]);

/* Unpacks half a superblock, whose points have these numbers. */
typedef void x86_grid_half_fn(const uint8_t *block, size_t half, const uint16_t *index,
                              x86_grid_half *w);

MOE_AVX2_INLINE void x86_grid_no_index_avx2(const uint8_t *block,
                                            uint16_t index[X86_GRID_INDICES])
{
    (void)block;
    (void)index;
}

MOE_AVX2_INLINE void x86_grid_put_index_avx2(uint16_t *to, __m256i index)
{
    _mm256_storeu_si256((__m256i *)to, index);
}

MOE_AVX2_INLINE __m128i x86_grid_load16(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)p);
}

MOE_AVX2_INLINE __m128i x86_grid_load8(const uint8_t *p)
{
    return _mm_loadl_epi64((const __m128i *)p);
}

/* 4 bytes 8 times. */
MOE_AVX2_INLINE __m256i x86_grid_load4(const uint8_t *p)
{
    return _mm256_set1_epi32(x86_load_i32(p));
}

/* 16 points. */
MOE_AVX2_INLINE __m256i x86_grid_find_avx2(const uint64_t *tops, const uint16_t *i)
{
    return _mm256_setr_epi64x(x86_grid_words(tops, i), x86_grid_words(tops, i + 4),
                              x86_grid_words(tops, i + 8), x86_grid_words(tops, i + 12));
}

/* The values of 16 nibbles. */
MOE_AVX2_INLINE __m256i x86_grid_values_avx2(__m256i nibbles, __m128i values)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values),
                               _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}

/* Codes of 2 bits, of values a, b, c. */
MOE_AVX2_INLINE void x86_grid_codes2_avx2(__m256i points, char a, char b, char c, __m256i code[4])
{
    const __m128i first = _mm_setr_epi8(a, b, c, 0, a, b, c, 0, a, b, c, 0, a, b, c, 0);
    const __m128i second = _mm_setr_epi8(a, a, a, a, b, b, b, b, c, c, c, c, 0, 0, 0, 0);
    const __m256i high = _mm256_srli_epi16(points, 4);
    code[0] = x86_grid_values_avx2(points, first);
    code[1] = x86_grid_values_avx2(points, second);
    code[2] = x86_grid_values_avx2(high, first);
    code[3] = x86_grid_values_avx2(high, second);
}

/* Codes of 4 bits, from the points of even and of odd numbers. */
MOE_AVX2_INLINE void x86_grid_codes4_avx2(__m256i even, __m256i odd, __m128i values,
                                          __m256i code[4])
{
    code[0] = x86_grid_values_avx2(even, values);
    code[1] = x86_grid_values_avx2(_mm256_srli_epi16(even, 4), values);
    code[2] = x86_grid_values_avx2(odd, values);
    code[3] = x86_grid_values_avx2(_mm256_srli_epi16(odd, 4), values);
}

/* Words of 8 signs from words of 7: the number of negative ones is even. */
MOE_AVX2_INLINE __m256i x86_grid_even_avx2(__m256i sevens)
{
    const __m256i odd = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
    const __m256i folded = _mm256_and_si256(
        _mm256_xor_si256(sevens, _mm256_srli_epi16(sevens, 4)), _mm256_set1_epi16(15));
    return _mm256_or_si256(sevens, _mm256_shuffle_epi8(odd, folded));
}

/* Bits 1..k of words of 32 bits, of which `mask` says which they are, and one more: twice. */
MOE_AVX2_INLINE __m256i x86_grid_odd_avx2(__m256i v, int mask)
{
    const __m256i twice = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
    const __m256i odd = _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi32(mask)),
                                        _mm256_set1_epi32(1));
    return _mm256_shuffle_epi8(odd, twice);
}

/* 8 scales of 4 bits. */
MOE_AVX2_INLINE __m256i x86_grid_scales_avx2(const uint8_t *nibbles)
{
    const __m256i v = _mm256_srlv_epi32(x86_grid_load4(nibbles),
                                        _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return x86_grid_odd_avx2(_mm256_add_epi32(v, v), 30);
}

/* IQ2_XXS, IQ3_XXS: a word for each 32 weights has signs and scale. `words` holds each twice. */
MOE_AVX2_INLINE void x86_grid_rest_avx2(__m256i words, x86_grid_half *w)
{
    const __m256i low = _mm256_srlv_epi32(words, _mm256_set1_epi64x(14ll << 32));
    const __m256i high =
        _mm256_or_si256(_mm256_sllv_epi32(words, _mm256_set1_epi64x(32ll << 32 | 9)),
                        _mm256_srlv_epi32(words, _mm256_set1_epi64x(5ll << 32 | 32)));
    w->signs = x86_grid_even_avx2(_mm256_and_si256(_mm256_blend_epi16(low, high, 0xaa),
                                                   _mm256_set1_epi16(127)));
    w->scale = x86_grid_odd_avx2(_mm256_srli_epi32(words, 27), 30);
}

/* 4 bytes, each in the lower half of 4 words. */
MOE_AVX2_INLINE __m256i x86_grid_bits_avx2(const uint8_t *bytes)
{
    return _mm256_shuffle_epi8(x86_grid_load4(bytes),
                               _mm256_setr_epi64x(0, 0x0001000100010001, 0x0002000200020002,
                                                  0x0003000300030003));
}

/* -- products -- */

/* 256 activations in the order of above, half after half; behind each half, its sums of 8. */
MOE_AVX2 static void x86_grid_order_avx2(const int8_t *q, int8_t *out)
{
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), one = _mm256_set1_epi8(1);
    for (size_t half = 0; half < 2; half++, q += K_LEN / 2) {
        __m256i v[4], u[4], sum = _mm256_setzero_si256();
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++)
            v[i] = _mm256_shuffle_epi8(x86_k_load(q + 32 * i), pairs);
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            u[i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            u[2 + i] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++, out += 32) {
            const __m256i mixed = i % 2 ? _mm256_unpackhi_epi64(u[i / 2 * 2], u[i / 2 * 2 + 1])
                                        : _mm256_unpacklo_epi64(u[i / 2 * 2], u[i / 2 * 2 + 1]);
            const __m256i sorted = _mm256_permutevar8x32_epi32(mixed, lanes);
            _mm256_storeu_si256((__m256i *)out, sorted);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(one, sorted));
        }
        _mm256_storeu_si256((__m256i *)out, sum);
        out += 32;
    }
}

/* The products of vector v with activations. Bit 7 of a byte becomes the sign of its weight. */
MOE_AVX2_INLINE __m256i x86_grid_product_avx2(const x86_grid_half *w, const x86_grid_shape *s,
                                              size_t v, const int8_t *q)
{
    __m256i x = x86_k_load(q + 32 * v);
    if (s->has_signs) {
        const __m256i both = _mm256_or_si256(_mm256_slli_epi16(w->signs, 8),
                                             _mm256_slli_epi16(w->signs, 1));
        x = _mm256_sign_epi8(x, _mm256_or_si256(_mm256_slli_epi16(both, 6 - 2 * (int)v),
                                                _mm256_set1_epi8(1)));
    }
    return _mm256_maddubs_epi16(w->code[v], x);
}

/* sum + the scaled products of half a superblock. */
MOE_AVX2_INLINE __m256i x86_grid_multiply_avx2(const x86_grid_half *w, const x86_grid_shape *s,
                                               const int8_t *q, __m256i sum)
{
    const __m256i scale = s->has_scales ? w->scale : _mm256_set1_epi16(1);
    MOE_UNROLL
    for (size_t v = 0; v < s->n; v += s->fold) {
        __m256i part = x86_grid_product_avx2(w, s, v, q);
        MOE_UNROLL
        for (size_t i = 1; i < s->fold; i++)
            part = _mm256_add_epi16(part, x86_grid_product_avx2(w, s, v + i, q));
        if (s->shifted) /* 1016 * 9 + 4 * 2 * 127 * 16 fits into 16 bits */
            part = _mm256_add_epi16(part, _mm256_mullo_epi16(w->shift, x86_k_load(q + 128)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, scale));
    }
    return sum;
}

/* 8 superblocks one behind the other. */
MOE_AVX2_INLINE void x86_grid_dot8_avx2(const uint8_t *w, size_t block_bytes,
                                        const x86_k_tokens *x, size_t b, size_t n_tok,
                                        const x86_grid_shape *s, x86_grid_index_fn *find,
                                        x86_grid_half_fn *half, x86_k_sums *out)
{
    __m256i dot[X86_K_FEWEST][8];
    uint16_t index[8][X86_GRID_INDICES];
    for (size_t i = 0; i < 8; i++) {
        x86_k_fetch(w + i * block_bytes, block_bytes);
        find(w + i * block_bytes, index[i]);
    }
    for (size_t i = 0; i < 8; i++, w += block_bytes) {
        const size_t at = x->at[b + i] / K_LEN * X86_K_ORDERED;
        __m256i sum[X86_K_FEWEST];
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            sum[t] = s->has_scales ? _mm256_setzero_si256()
                                   : _mm256_madd_epi16(
                                         x86_k_load(x->tok[t].sum + x->at[b + i] / 16),
                                         _mm256_set1_epi16(-1));
        MOE_UNROLL
        for (size_t h = 0; h < 2; h++) {
            x86_grid_half v;
            half(w, h, index[i], &v);
            MOE_UNROLL
            for (size_t t = 0; t < n_tok; t++)
                sum[t] = x86_grid_multiply_avx2(&v, s,
                                                x->tok[t].q + at + X86_K_ORDERED / 2 * h, sum[t]);
        }
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            dot[t][i] = sum[t];
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        out[t].dot = x86_sum8_i32(dot[t]);
}

/* A format's kernels for one token and for two. */
#define X86_GRID_GEMV_OF(type, order, index, number, n_tok)                                        \
    MOE_AVX2 static void type##_dot8_##number##_avx2(const uint8_t *w, const x86_k_tokens *x,      \
                                                     size_t b, x86_k_sums *out)                    \
    {                                                                                              \
        const uint8_t *block[8];                                                                   \
        x86_k_blocks(w, sizeof(type##_block), block);                                              \
        x86_grid_dot8_avx2(w, sizeof(type##_block), x, b, n_tok, &type##_shape, index##_avx2,      \
                           type##_half_avx2, out);                                                 \
        const __m256 d = type##_d8_avx2(block, 0);                                                 \
        MOE_UNROLL                                                                                 \
        for (size_t t = 0; t < n_tok; t++)                                                         \
            out[t].d = d;                                                                          \
    }                                                                                              \
    MOE_AVX2 static void type##_gemv##number##_avx2(const moe_mm *mm)                              \
    {                                                                                              \
        x86_k_few_tokens(mm, sizeof(type##_block), X86_K_NO_MIN, order##_avx2,                     \
                         type##_dot8_##number##_avx2, n_tok);                                      \
    }

/* -------------------------------------------------------------------------------- AVX-512 -- */

/* A superblock of one row. */
typedef struct x86_grid_row_512 {
    __m512i code[X86_GRID_MOST];
    __m512i scale; // int32[16]
    __m512i shift; // int16[32], what is added to 8 codes
} x86_grid_row_512;

/* Points whose numbers are the lower bits of 32 words, of lists of 256, 512, 1024. `points` are in
 * registers, as far as there are enough of them. */
MOE_VNNI512_INLINE __m512i x86_512_pick64(const uint16_t *points, __m512i index)
{
    return _mm512_permutex2var_epi16(x86_512_load64(points), index, x86_512_load64(points + 32));
}

MOE_VNNI512_INLINE __m512i x86_512_pick256(const uint16_t *points, __m512i index)
{
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(1 << 6));
    const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(1 << 7));
    const __m512i low = _mm512_mask_mov_epi16(x86_512_pick64(points, index), bit6,
                                              x86_512_pick64(points + 64, index));
    const __m512i high = _mm512_mask_mov_epi16(x86_512_pick64(points + 128, index), bit6,
                                               x86_512_pick64(points + 192, index));
    return _mm512_mask_mov_epi16(low, bit7, high);
}

MOE_VNNI512_INLINE __m512i x86_512_pick512(const uint16_t *points, __m512i index, __mmask32 bit8)
{
    return _mm512_mask_mov_epi16(x86_512_pick256(points, index), bit8,
                                 x86_512_pick256(points + 256, index));
}

/* The values of 16 nibbles. */
MOE_VNNI512_INLINE __m512i x86_grid_values_512(__m512i nibbles, __m128i values)
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
}

/* Codes of 2 bits, of values 0, 1, 2. */
MOE_VNNI512_INLINE void x86_grid_codes2_512(__m512i points, int v0, int v1, int v2,
                                            __m512i code[4])
{
    const char a = (char)v0, b = (char)v1, c = (char)v2;
    const __m128i first = _mm_setr_epi8(a, b, c, 0, a, b, c, 0, a, b, c, 0, a, b, c, 0);
    const __m128i second = _mm_setr_epi8(a, a, a, a, b, b, b, b, c, c, c, c, 0, 0, 0, 0);
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i low = _mm512_and_si512(points, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(points, 4), mask);
    code[0] = x86_grid_values_512(low, first);
    code[1] = x86_grid_values_512(low, second);
    code[2] = x86_grid_values_512(high, first);
    code[3] = x86_grid_values_512(high, second);
}

/* Codes of 4 bits, from the points of even and of odd numbers. */
MOE_VNNI512_INLINE void x86_grid_codes4_512(__m512i even, __m512i odd, __m128i values,
                                            __m512i code[4])
{
    const __m512i mask = _mm512_set1_epi8(15);
    code[0] = x86_grid_values_512(_mm512_and_si512(even, mask), values);
    code[1] = x86_grid_values_512(_mm512_and_si512(_mm512_srli_epi16(even, 4), mask), values);
    code[2] = x86_grid_values_512(_mm512_and_si512(odd, mask), values);
    code[3] = x86_grid_values_512(_mm512_and_si512(_mm512_srli_epi16(odd, 4), mask), values);
}

/* The sign bytes of 8 weights each, twice, from the lower 7 bits of words that have no others: the
 * number of negative ones is even. */
MOE_VNNI512_INLINE __m512i x86_grid_even_512(__m512i sevens)
{
    const __m512i odd = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
    const __m512i folded = _mm512_and_si512(
        _mm512_xor_si512(sevens, _mm512_srli_epi16(sevens, 4)), _mm512_set1_epi16(15));
    const __m512i signs = _mm512_or_si512(sevens, _mm512_shuffle_epi8(odd, folded));
    return _mm512_or_si512(signs, _mm512_slli_epi16(signs, 8));
}

/* 32 sign bytes, each twice. */
MOE_VNNI512_INLINE __m512i x86_grid_all_signs_512(const uint8_t *signs)
{
    const __m512i twice = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14));
    return _mm512_shuffle_epi8(
        _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)signs)), twice);
}

/* offset + code becomes offset - code. */
MOE_VNNI512_INLINE void x86_grid_sign_512(__m512i signs, int offset, __m512i code[4])
{
    const __m512i twice = _mm512_set1_epi8((char)(2 * offset));
    MOE_UNROLL
    for (int v = 0; v < 4; v++) {
        const __mmask64 negative =
            _mm512_test_epi8_mask(signs, _mm512_set1_epi16((int16_t)(0x0201 << 2 * v)));
        code[v] = _mm512_mask_sub_epi8(code[v], negative, twice, code[v]);
    }
}

/* Odd scales from bits 1..4 of words whose other bits do not matter. */
MOE_VNNI512_INLINE __m512i x86_grid_odd_512(__m512i v, int mask)
{
    return _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(2 * mask), _mm512_set1_epi32(1),
                                     0xea); /* v & mask | 1 */
}

/* IQ2_XXS, IQ3_XXS: a word for each 32 weights has signs and scale. `words` holds each twice. */
MOE_VNNI512_INLINE __m512i x86_grid_word_signs_512(__m512i words)
{
    const __m512i right = _mm512_set1_epi64(14ll << 32);
    const __m512i rotate = _mm512_set1_epi64(5ll << 32 | 23);
    const __m512i v = _mm512_mask_mov_epi16(_mm512_srlv_epi32(words, right), 0xaaaaaaaa,
                                            _mm512_rorv_epi32(words, rotate));
    return x86_grid_even_512(_mm512_and_si512(v, _mm512_set1_epi16(127)));
}

MOE_VNNI512_INLINE __m512i x86_grid_word_scales_512(__m512i words)
{
    return x86_grid_odd_512(_mm512_srli_epi32(words, 27), 15);
}

/* 16 of 4 bits: of each byte for two groups of 16. */
MOE_VNNI512_INLINE __m512i x86_grid_scales16_512(const uint8_t *nibbles)
{
    const __m512i each = _mm512_set_epi64(
        0x0000000700000007, 0x0000000600000006, 0x0000000500000005, 0x0000000400000004,
        0x0000000300000003, 0x0000000200000002, 0x0000000100000001, 0x0000000000000000);
    int64_t v;
    memcpy(&v, nibbles, 8);
    return x86_grid_odd_512(_mm512_rorv_epi32(_mm512_maskz_shuffle_epi8(0x1111111111111111,
                                                                        _mm512_set1_epi64(v), each),
                                              _mm512_set1_epi64(3ll << 32 | 31)), 15);
}

/* 8 bytes, each in the lower half of 4 words. */
MOE_VNNI512_INLINE __m512i x86_grid_bits_512(const uint8_t *bytes)
{
    const __m512i each = _mm512_set_epi64(
        0x0007000700070007, 0x0006000600060006, 0x0005000500050005, 0x0004000400040004,
        0x0003000300030003, 0x0002000200020002, 0x0001000100010001, 0);
    int64_t v;
    memcpy(&v, bytes, 8);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(v), each);
}

/* 32 points. */
MOE_VNNI512_INLINE __m512i x86_grid_find_512(const uint64_t *tops, const uint16_t *i)
{
    return _mm512_setr_epi64(x86_grid_words(tops, i), x86_grid_words(tops, i + 4),
                             x86_grid_words(tops, i + 8), x86_grid_words(tops, i + 12),
                             x86_grid_words(tops, i + 16), x86_grid_words(tops, i + 20),
                             x86_grid_words(tops, i + 24), x86_grid_words(tops, i + 28));
}

/* IQ1: 8 point + 8; what is left is a shift by 7 or 9 less. */
MOE_VNNI512_INLINE void x86_grid_iq1_512(const uint16_t *index, __mmask32 down,
                                         x86_grid_row_512 *w)
{
    x86_grid_codes2_512(x86_grid_find_512(x86_grid_top_iq1, index), 0, 8, 16, w->code);
    w->shift = _mm512_mask_mov_epi16(_mm512_set1_epi16(-7), down, _mm512_set1_epi16(-9));
}

/* IQ2: codes from points and signs. */
MOE_VNNI512_INLINE void x86_grid_iq2_512(__m512i points, __m512i signs, x86_grid_row_512 *w)
{
    x86_grid_codes2_512(points, 43 + 8, 43 + 25, 43 + 43, w->code);
    x86_grid_sign_512(signs, 43, w->code);
}

/* -- products -- */

/* The activations of one token in the order of above. */
typedef struct x86_grid_x_512 {
    __m512i q[X86_GRID_MOST];
    __m512i init; // where sums begin; if shifted, int16: the sums of 8 activations
} x86_grid_x_512;

/* 256 activations in the order of above. */
MOE_VNNI512_INLINE void x86_grid_order_512(const int8_t *q, __m512i out[X86_GRID_MOST])
{
    const __m512i pairs = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i v[4], u[4];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        v[i] = _mm512_shuffle_epi8(x86_512_load64(q + 64 * i), pairs);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        u[i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        u[2 + i] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const __m512i low = _mm512_unpacklo_epi64(u[2 * i], u[2 * i + 1]);
        const __m512i high = _mm512_unpackhi_epi64(u[2 * i], u[2 * i + 1]);
        out[2 * i] = _mm512_permutexvar_epi32(lanes, low);
        out[2 * i + 1] = _mm512_permutexvar_epi32(lanes, high);
    }
}

MOE_VNNI512_INLINE __m512i x86_grid_init_512(const x86_grid_shape *s, const moe_q8 *x,
                                             const __m512i *q)
{
    const __m512i one = _mm512_set1_epi8(1);
    if (!s->shifted)
        return _mm512_mullo_epi32(
            _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)x->sum)),
            _mm512_set1_epi32(-s->offset));
    return _mm512_add_epi16(
        _mm512_add_epi16(_mm512_maddubs_epi16(one, q[0]), _mm512_maddubs_epi16(one, q[1])),
        _mm512_add_epi16(_mm512_maddubs_epi16(one, q[2]), _mm512_maddubs_epi16(one, q[3])));
}

/* dot[t][r] = 16 numbers whose sum is the integer of row r and token t. The largest sum of a group
 * is 16 * 2 * 62 * 127, times 31. */
MOE_VNNI512_INLINE void x86_grid_multiply_512(const x86_grid_row_512 *w, const x86_grid_shape *s,
                                              const x86_grid_x_512 *x, size_t n_tok, size_t r,
                                              __m512i dot[][8])
{
    const __m512i zero = _mm512_setzero_si512();
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        __m512i sum = s->shifted ? _mm512_dpwssd_epi32(zero, x[t].init, w->shift) : x[t].init;
        MOE_UNROLL
        for (size_t v = 0; v < s->n; v++)
            sum = _mm512_dpbusd_epi32(sum, w->code[v], x[t].q[v]);
        dot[t][r] = s->has_scales ? _mm512_mullo_epi32(sum, w->scale) : sum;
    }
}

MOE_VNNI512_INLINE void x86_grid_sums_512(__m512i dot[][8], __m256 d, size_t n_tok,
                                          x86_k_sums *out)
{
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        out[t].dot = x86_512_sum8(dot[t]);
        out[t].d = d;
    }
}

/* IQ1 has too many points for registers: `index` is for it. */
#define X86_GRID_DOT8_512(type, order, index)                                                      \
    MOE_VNNI512_INLINE void type##_dot8_vnni512(const uint8_t *const row[8], size_t at,            \
                                                x86_ahead next, const moe_q8 *x, size_t n_tok,     \
                                                x86_k_sums *out)                                   \
    {                                                                                              \
        x86_grid_x_512 own[X86_512_FEWEST];                                                        \
        __m512i dot[X86_512_FEWEST][8];                                                            \
        uint16_t found[8][X86_GRID_INDICES];                                                       \
        for (size_t r = 0; r < 8 && type##_shape.shifted; r++)                                     \
            index##_avx2(row[r] + at, found[r]);                                                   \
        MOE_UNROLL                                                                                 \
        for (size_t t = 0; t < n_tok; t++) {                                                       \
            order##_512(x[t].q, own[t].q);                                                         \
            own[t].init = x86_grid_init_512(&type##_shape, &x[t], own[t].q);                       \
        }                                                                                          \
        for (size_t r = 0; r < 8; r++) {                                                           \
            x86_grid_row_512 w;                                                                    \
            x86_512_fetch(next, r, sizeof(type##_block));                                          \
            type##_unpack_vnni512(row[r] + at, found[r], &w);                                      \
            x86_grid_multiply_512(&w, &type##_shape, own, n_tok, r, dot);                          \
        }                                                                                          \
        x86_grid_sums_512(dot, type##_d8_avx2(row, at), n_tok, out);                               \
    }

/* A format brings type_shape, type_d8_avx2(), type_half_avx2() and type_unpack_vnni512(); order is
 * x86_grid_order, index is x86_grid_no_index, or its own. */
#define X86_GRID_FEW(type, order, index)                                                           \
    X86_GRID_GEMV_OF(type, order, index, , 1)                                                      \
    X86_GRID_GEMV_OF(type, order, index, 2, 2)                                                     \
    X86_GRID_DOT8_512(type, order, index)

#endif
#endif
