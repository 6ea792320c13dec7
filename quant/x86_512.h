/* quant/x86_512.h - what the AVX-512 kernels share. Integer formats use VNNI (vpdpbusd): products
 * of four unsigned and four signed bytes are added to a 32-bit lane, exactly and in one step.
 *
 * 256 weights of 16 rows are unpacked into a tile, transposed so that a vector holds 4 consecutive
 * k of 16 rows:
 *
 *     code[i]   bytes    row 0 k 4i..4i+3 | row 1 k 4i..4i+3 | ... | row 15 k 4i..4i+3
 *
 * A vector of weights meets 4 activations of a token, broadcast, and the sums of 16 rows grow in
 * the lanes of one vector; nothing is added across lanes. Four tiles, 64 rows, and 4 tokens are
 * multiplied at once: 16 sums hide the latency of vpdpbusd, and 16 products take 8 loads. The
 * tiles stay in L1, activations stream through it. Zen 5, one core, Q4_K: 770 Gop/s of a peak of
 * 1020, of which scales and minima take 19 %; two tiles times 8 tokens reach 735.
 *
 * Codes are unsigned: what a format subtracts from them (`offset`) is a multiple of the sum of the
 * activations, with which the sum of a group starts instead of 0.
 *
 * A format brings a function that unpacks (load) and picks the steps that suit its blocks. They are
 * called once per tile, through pointers. Must never: read a byte outside a row, or compute a float
 * in another order than the C kernel of the format. */
#ifndef MOE_QUANT_X86_512_H
#define MOE_QUANT_X86_512_H

#include "x86.h"

#if MOE_X86

#define MOE_AVX512 MOE_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define MOE_AVX512_INLINE MOE_UNUSED MOE_INLINE MOE_AVX512
#define MOE_VNNI512 MOE_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define MOE_VNNI512_INLINE MOE_UNUSED MOE_INLINE MOE_VNNI512
#define MOE_BF16_512 MOE_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define MOE_BF16_512_INLINE MOE_UNUSED MOE_INLINE MOE_BF16_512

enum {
    X86_512_K = 256,     /* weights of a row in a tile */
    X86_512_TILES = 4,   /* tiles computed at once */
    X86_512_ROWS = 16 * X86_512_TILES,
    X86_512_FEW = 8,     /* fewer tokens are computed as fast as memory is read */
    X86_512_MANY = 48,   /* from here on all tiles are computed at once */
    X86_512_L1 = 48 << 10
};

/* 256 weights of 16 rows: one superblock, or up to 8 blocks of 32. */
typedef struct x86_512_tile {
    __m512i code[X86_512_K / 4];
    __m512i scale[16];  // superblocks: int32 [row] of each group of 16 or 32 weights
    __m512i min[8];     // superblocks with minima: int16 [row][2] of groups 2p and 2p + 1
    __m512 d[8], m[8];  // [block][row]
} x86_512_tile;

/* What is derived from the sums of one token's 256 activations. */
typedef struct x86_512_token {
    int32_t init[16];   // -offset * the sum of each group
    int16_t sum[16];    // these sums
    float fsum[8];      // the sums of 32
} x86_512_token;

/* 256 activations of up to X86_MOST_TOKENS tokens, `stride` bytes apart. */
typedef struct x86_512_x {
    const int8_t *q;
    const float *scale;
    const int16_t *sum;
    size_t stride;
    size_t n_tok;
    size_t first_block, n_block; // groups of 32 weights of the tile: those that count, [first, n)
    int offset;         // what is subtracted from each code
    uintptr_t next;     // what is fetched during the next steps: next_bytes for each 4 tokens
    size_t next_bytes;
} x86_512_x;

/* What a format's load() takes along through 16 rows; 0 where they begin. */
typedef struct x86_512_state {
    __m512i v[3][16];
} x86_512_state;

/* Where 16 rows begin, and what is fetched while they are loaded; 0: nothing. What is fetched are
 * the rows that come next, as many bytes and in the order in which they lie in memory: as 16 to 64
 * streams they would be too short for any prefetcher. Weights from memory, Zen 5, one core: Q4_K
 * times 8 tokens reads 13.6 GB/s instead of 11.6 with the prefetches of a tile in one piece, 5.2
 * without. From X86_512_FEW tokens on they are spread over the products instead, where memory would
 * be idle (Q8_0, 32 tokens: 518 Gop/s instead of 393), and made for the first tokens only: later
 * ones find the rows in L2. Neither a hint past the end of a matrix nor a wrong one does harm. */
typedef struct x86_512_rows {
    const uint8_t *row[16];
    uintptr_t next;
    x86_512_state *state; // NULL, or of a format whose blocks depend on those before them
} x86_512_rows;

/* Unpacks 256 weights at `offset` of 16 rows. */
typedef void x86_512_load_fn(x86_512_rows *rows, size_t offset, x86_512_tile *tile);

/* acc[token][X86_512_ROWS] += 1, 2 or 4 tiles times all tokens of x. */
typedef void x86_512_step_fn(const x86_512_tile *tile, const x86_512_x *x, float *acc);
typedef x86_512_step_fn *const x86_512_steps[3]; // [log2 of the tiles]

typedef struct x86_512_format {
    size_t block_len, block_bytes;
    int offset;
    x86_512_load_fn *load;
    const x86_512_steps *steps;
} x86_512_format;

/* ---------------------------------------------------------------------------------- loading -- */

/* 4 x 4 words of 32 bits, within quarters of vectors. */
MOE_VNNI512_INLINE void x86_512_transpose(const __m512i in[4], __m512i out[4])
{
    const __m512i a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpacklo_epi32(in[2], in[3]);
    const __m512i c = _mm512_unpackhi_epi32(in[0], in[1]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
}

/* Fetches `bytes` bytes of the next rows. */
MOE_VNNI512_INLINE void x86_512_next(x86_512_rows *rows, size_t bytes)
{
    if (!rows->next)
        return;
    x86_prefetch(rows->next, bytes);
    rows->next += bytes;
}

/* 16 bytes of 16 rows, to 4 vectors that hold 4 bytes of each row, in row order. */
MOE_VNNI512_INLINE void x86_512_load16(x86_512_rows *rows, size_t offset, __m512i out[4])
{
    const uint8_t *const *row = rows->row;
    x86_512_next(rows, 256);
    __m512i in[4]; /* rows i, i + 4, i + 8, i + 12 */
    MOE_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m256i low = x86_load_pair(row[i] + offset, row[i + 4] + offset);
        const __m256i high = x86_load_pair(row[i + 8] + offset, row[i + 12] + offset);
        in[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    x86_512_transpose(in, out);
}

/* 32 bytes of 16 rows, to 8 vectors. */
MOE_VNNI512_INLINE void x86_512_load32(x86_512_rows *rows, size_t offset, __m512i out[8])
{
    const uint8_t *const *row = rows->row;
    x86_512_next(rows, 512);
    __m512i half[2][4]; /* rows 0..3 | 4..7 and 8..11 | 12..15, both 16 bytes of each */
    MOE_UNROLL
    for (int h = 0; h < 2; h++) {
        __m512i in[4];
        MOE_UNROLL
        for (int i = 0; i < 4; i++) {
            const __m256i *low = (const __m256i *)(row[8 * h + i] + offset);
            const __m256i *high = (const __m256i *)(row[8 * h + i + 4] + offset);
            in[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)),
                                       _mm256_loadu_si256(high), 1);
        }
        x86_512_transpose(in, half[h]);
    }
    MOE_UNROLL
    for (int i = 0; i < 4; i++) {
        out[i] = _mm512_shuffle_i32x4(half[0][i], half[1][i], 0x88);
        out[i + 4] = _mm512_shuffle_i32x4(half[0][i], half[1][i], 0xdd);
    }
}

/* `bytes` bytes of 16 rows, a multiple of 4, at least 16; the last 16 are loaded twice. */
MOE_VNNI512_INLINE void x86_512_load_words(x86_512_rows *rows, size_t offset,
                                           size_t bytes, __m512i *out)
{
    for (size_t i = 0; i + 32 <= bytes; i += 32)
        x86_512_load32(rows, offset + i, out + i / 4);
    if (bytes % 32)
        x86_512_load16(rows, offset + bytes - 16, out + bytes / 4 - 4);
}

/* Bytes `at` .. at + 3 of each row, constant, of what x86_512_load_words() read. */
MOE_VNNI512_INLINE __m512i x86_512_word(const __m512i *words, size_t at)
{
    const unsigned shift = 8 * (unsigned)(at % 4);
    if (shift == 0)
        return words[at / 4];
    return _mm512_or_si512(_mm512_srli_epi32(words[at / 4], shift),
                           _mm512_slli_epi32(words[at / 4 + 1], 32 - shift));
}

/* The half-precision numbers in the lower halves of the lanes. */
MOE_VNNI512_INLINE __m512 x86_512_f16(__m512i v)
{
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

/* The one at byte `at` of each row, constant and even. */
MOE_VNNI512_INLINE __m512 x86_512_f16_at(const __m512i *words, size_t at)
{
    const __m512i v = words[at / 4];
    return x86_512_f16(at % 4 ? _mm512_srli_epi32(v, 16) : v);
}

/* Byte i of each 32-bit lane, constant; the bytes are unsigned. */
MOE_VNNI512_INLINE __m512i x86_512_byte(__m512i v, int i)
{
    return _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)(8 * i)), _mm512_set1_epi32(255));
}

/* The same of signed bytes. */
MOE_VNNI512_INLINE __m512i x86_512_signed_byte(__m512i v, size_t i)
{
    return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * (unsigned)i), 24);
}

/* Byte i of each 32-bit lane, constant and unsigned, as two int16. */
MOE_VNNI512_INLINE __m512i x86_512_byte_twice(__m512i v, size_t i)
{
    const __m512i first = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
    return _mm512_shuffle_epi8(v, _mm512_add_epi8(first, _mm512_set1_epi16((short)i)));
}

/* The same of a signed byte. */
MOE_VNNI512_INLINE __m512i x86_512_signed_twice(__m512i v, size_t i)
{
    const __m512i first = _mm512_broadcast_i32x4(
        _mm_setr_epi8(-1, 0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12));
    const __m512i at = _mm512_add_epi8(first, _mm512_set1_epi16((short)(i << 8)));
    return _mm512_srai_epi16(_mm512_shuffle_epi8(v, at), 8);
}

/* Bytes 2i and 2i + 1 of each 32-bit lane, constant, as two int16; the bytes are unsigned. */
MOE_VNNI512_INLINE __m512i x86_512_byte_pair(__m512i v, int i)
{
    const __m512i at = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    return _mm512_shuffle_epi8(i == 0 ? v : _mm512_srli_epi32(v, 16), at);
}

/* Low and high nibbles of the bytes of v. */
MOE_VNNI512_INLINE void x86_512_nibbles(__m512i v, __m512i *low, __m512i *high)
{
    const __m512i mask = _mm512_set1_epi8(15);
    *low = _mm512_and_si512(v, mask);
    *high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
}

/* The codes of a block of 32 whose 16 bytes begin at byte `at`, constant, of each row: low nibbles
 * are k 0..15, high ones k 16..31. */
MOE_VNNI512_INLINE void x86_512_block_nibbles(const __m512i *words, size_t at, __m512i code[8])
{
    MOE_UNROLL
    for (size_t j = 0; j < 4; j++)
        x86_512_nibbles(x86_512_word(words, at + 4 * j), &code[j], &code[j + 4]);
}

/* Adds `value` to the code k of a row whose 32-bit word has the bit k set. */
MOE_VNNI512_INLINE void x86_512_bits(__m512i word, char value, __m512i code[8])
{
    const __m512i first = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    MOE_UNROLL
    for (int j = 0; j < 8; j++) {
        const __m512i at = _mm512_add_epi8(first, _mm512_set1_epi8((char)(j / 2)));
        const __m512i bit = _mm512_set1_epi32(j % 2 ? (int)0x80402010 : 0x08040201);
        const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(word, at), bit);
        code[j] = _mm512_mask_add_epi8(code[j], set, code[j], _mm512_set1_epi8(value));
    }
}

MOE_VNNI512_INLINE void x86_512_fifth_bits(__m512i word, __m512i code[8])
{
    x86_512_bits(word, 16, code);
}

/* Replaces codes 0..15 by the table's values. */
MOE_VNNI512_INLINE void x86_512_look_up(__m128i table, __m512i *code, size_t n)
{
    MOE_UNROLL
    for (size_t j = 0; j < n; j++)
        code[j] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), code[j]);
}

/* d, dmin, scales and minima of Q4_K or Q5_K, which are the first 16 bytes of a superblock. */
MOE_VNNI512_INLINE void x86_512_load_header(x86_512_rows *rows, size_t offset,
                                            x86_512_tile *tile)
{
    const __m512i low4 = _mm512_set1_epi8(15), low6 = _mm512_set1_epi8(63);
    const __m512i top2 = _mm512_set1_epi8(48);
    __m512i v[4]; /* d and dmin, bytes 0..3, 4..7, 8..11 of the packed scales */
    x86_512_load16(rows, offset, v);
    tile->d[0] = x86_512_f16(v[0]);
    tile->m[0] = x86_512_f16(_mm512_srli_epi32(v[0], 16));
    const __m512i scale[2] = {
        _mm512_and_si512(v[1], low6),
        _mm512_or_si512(_mm512_and_si512(v[3], low4),
                        _mm512_and_si512(_mm512_srli_epi16(v[1], 2), top2))};
    const __m512i min[2] = {
        _mm512_and_si512(v[2], low6),
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v[3], 4), low4),
                        _mm512_and_si512(_mm512_srli_epi16(v[2], 2), top2))};
    MOE_UNROLL
    for (int g = 0; g < 8; g++)
        tile->scale[g] = x86_512_byte(scale[g / 4], g % 4);
    MOE_UNROLL
    for (int p = 0; p < 4; p++)
        tile->min[p] = x86_512_byte_pair(min[p / 2], p % 2);
}

/* ------------------------------------------------------------------------------- multiplying -- */

/* sum[t * n_tile + r] += the products of vectors first .. first + n - 1 of tile r with token t. n,
 * n_tile and n_tok are constants; q are the activations that belong to the first. One tile times
 * one token is summed in four chains, to hide the latency of vpdpbusd. */
MOE_VNNI512_INLINE void x86_512_dot(const x86_512_tile *tile, size_t first, size_t n,
                                    const int8_t *q, size_t stride, __m512i sum[16], size_t n_tile,
                                    size_t n_tok)
{
    if (n_tile * n_tok == 1) {
        __m512i part[4] = {sum[0], _mm512_setzero_si512(), _mm512_setzero_si512(),
                           _mm512_setzero_si512()};
        MOE_UNROLL
        for (size_t i = 0; i < n; i++) {
            int32_t four;
            memcpy(&four, q + 4 * i, 4);
            part[i % 4] = _mm512_dpbusd_epi32(part[i % 4], tile->code[first + i],
                                              _mm512_set1_epi32(four));
        }
        sum[0] = _mm512_add_epi32(_mm512_add_epi32(part[1], part[2]),
                                  _mm512_add_epi32(part[3], part[0]));
        return;
    }
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        __m512i w[X86_512_TILES];
        MOE_UNROLL
        for (size_t r = 0; r < n_tile; r++)
            w[r] = tile[r].code[first + i];
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++) {
            int32_t four;
            memcpy(&four, q + t * stride + 4 * i, 4);
            const __m512i x = _mm512_set1_epi32(four);
            MOE_UNROLL
            for (size_t r = 0; r < n_tile; r++)
                sum[t * n_tile + r] = _mm512_dpbusd_epi32(sum[t * n_tile + r], w[r], x);
        }
    }
}

/* What follows from the sums of 256 activations of n_tok tokens from t0 on, for groups of 16, 32 or
 * 256 weights. Made for each tile, while the products of the tokens before are computed. */
MOE_VNNI512_INLINE void x86_512_prepare(const x86_512_x *x, size_t t0, size_t n_tok, size_t group,
                                        x86_512_token *token)
{
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        const char *from = (const char *)x->sum + (t0 + t) * x->stride;
        const __m256i sum = _mm256_loadu_si256((const __m256i *)from);
        const __m256i sum32 = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
        if (group == 16) {
            _mm512_storeu_si512(token[t].init, _mm512_mullo_epi32(_mm512_cvtepi16_epi32(sum),
                                                                  _mm512_set1_epi32(-x->offset)));
            _mm256_storeu_si256((__m256i *)token[t].sum, sum);
        } else if (group == X86_512_K) {
            __m128i v = _mm_add_epi32(_mm256_castsi256_si128(sum32),
                                      _mm256_extracti128_si256(sum32, 1));
            v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
            v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1));
            token[t].init[0] = -x->offset * _mm_cvtsi128_si32(v);
        } else {
            _mm256_storeu_si256((__m256i *)token[t].init,
                                _mm256_mullo_epi32(sum32, _mm256_set1_epi32(-x->offset)));
            _mm_storeu_si128((__m128i *)token[t].sum, _mm256_cvtepi32_epi16(sum32));
            _mm256_storeu_ps(token[t].fsum, _mm256_cvtepi32_ps(sum32));
        }
    }
}

/* Where the sum i of a step belongs. */
MOE_INLINE float *x86_512_at(float *acc, size_t t0, size_t i, size_t n_tile)
{
    return acc + (t0 + i / n_tile) * X86_512_ROWS + i % n_tile * 16;
}

/* Blocks of 32 weights: acc = fma(d x_scale, sum, acc), then, if affine,
 * acc = fma(m x_scale, x_sum, acc), block after block. */
MOE_VNNI512_INLINE void x86_512_step_32(const x86_512_tile *tile, const x86_512_x *x, size_t t0,
                                        float *acc, size_t n_tile, size_t n_tok, bool affine)
{
    const int8_t *q = x->q + t0 * x->stride;
    const char *scale = (const char *)x->scale + t0 * x->stride;
    x86_512_token token[4];
    __m512 total[16];
    x86_512_prepare(x, t0, n_tok, 32, token);
    MOE_UNROLL
    for (size_t i = 0; i < n_tile * n_tok; i++)
        total[i] = _mm512_loadu_ps(x86_512_at(acc, t0, i, n_tile));
    for (size_t b = x->first_block; b < x->n_block; b++) {
        __m512i sum[16];
        MOE_UNROLL
        for (size_t i = 0; i < n_tile * n_tok; i++)
            sum[i] = affine ? _mm512_setzero_si512() : _mm512_set1_epi32(token[i / n_tile].init[b]);
        x86_512_dot(tile, 8 * b, 8, q + 32 * b, x->stride, sum, n_tile, n_tok);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++) {
            float one;
            memcpy(&one, scale + 4 * b + t * x->stride, sizeof one);
            const __m512 x_scale = _mm512_set1_ps(one), x_sum = _mm512_set1_ps(token[t].fsum[b]);
            MOE_UNROLL
            for (size_t r = 0; r < n_tile; r++) {
                __m512 *y = &total[t * n_tile + r];
                const __m512 dot = _mm512_cvtepi32_ps(sum[t * n_tile + r]);
                *y = _mm512_fmadd_ps(_mm512_mul_ps(tile[r].d[b], x_scale), dot, *y);
                if (affine)
                    *y = _mm512_fmadd_ps(_mm512_mul_ps(tile[r].m[b], x_scale), x_sum, *y);
            }
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_tile * n_tok; i++)
        _mm512_storeu_ps(x86_512_at(acc, t0, i, n_tile), total[i]);
}

/* The products of 16 weights, first .. of the tile's codes, as floats. */
MOE_VNNI512_INLINE void x86_512_group(const x86_512_tile *tile, const x86_512_token *token,
                                      size_t group, const int8_t *q, size_t stride, __m512 dot[16],
                                      size_t n_tile, size_t n_tok)
{
    __m512i sum[16];
    MOE_UNROLL
    for (size_t i = 0; i < n_tile * n_tok; i++)
        sum[i] = _mm512_set1_epi32(token[i / n_tile].init[group]);
    x86_512_dot(tile, 4 * group, 4, q + 16 * group, stride, sum, n_tile, n_tok);
    MOE_UNROLL
    for (size_t i = 0; i < n_tile * n_tok; i++)
        dot[i] = _mm512_cvtepi32_ps(sum[i]);
}

/* Blocks of 32 weights in two groups: acc = fma(x_scale, fma(m, sum1, d sum0), acc). */
MOE_VNNI512_INLINE void x86_512_step_pair(const x86_512_tile *tile, const x86_512_x *x, size_t t0,
                                          float *acc, size_t n_tile, size_t n_tok, size_t group)
{
    const int8_t *q = x->q + t0 * x->stride;
    const char *scale = (const char *)x->scale + t0 * x->stride;
    x86_512_token token[4];
    x86_512_prepare(x, t0, n_tok, group, token);
    for (size_t b = x->first_block; b < x->n_block; b++) {
        __m512 first[16], second[16];
        x86_512_group(tile, token, 2 * b, q, x->stride, first, n_tile, n_tok);
        MOE_UNROLL
        for (size_t i = 0; i < n_tile * n_tok; i++)
            first[i] = _mm512_mul_ps(tile[i % n_tile].d[b], first[i]);
        x86_512_group(tile, token, 2 * b + 1, q, x->stride, second, n_tile, n_tok);
        MOE_UNROLL
        for (size_t i = 0; i < n_tile * n_tok; i++) {
            float one, *to = x86_512_at(acc, t0, i, n_tile);
            memcpy(&one, scale + 4 * b + i / n_tile * x->stride, sizeof one);
            const __m512 term = _mm512_fmadd_ps(tile[i % n_tile].m[b], second[i], first[i]);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(one), term, _mm512_loadu_ps(to)));
        }
    }
}

/* A superblock's part of a sum of 16 rows; `min` is NULL for formats without minima. */
MOE_VNNI512_INLINE void x86_512_add(const x86_512_tile *tile, __m512i dot, const __m512i *min,
                                    float scale, float *acc)
{
    const __m512 x_scale = _mm512_set1_ps(scale), old = _mm512_loadu_ps(acc);
    if (!min) {
        const __m512 factor = _mm512_mul_ps(x_scale, tile->d[0]);
        _mm512_storeu_ps(acc, _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dot), old));
        return;
    }
    __m512 term = _mm512_mul_ps(tile->d[0], _mm512_cvtepi32_ps(dot));
    term = _mm512_fnmadd_ps(tile->m[0], _mm512_cvtepi32_ps(*min), term);
    _mm512_storeu_ps(acc, _mm512_fmadd_ps(x_scale, term, old));
}

/* Superblocks. `group` weights share a scale; 256: the codes hold the scales already. n_min pairs
 * of minima; with 0 of them the sums start from the token's `init`. */
MOE_VNNI512_INLINE void x86_512_step_k(const x86_512_tile *tile, const x86_512_x *x, size_t t0,
                                       float *acc, size_t n_tile, size_t n_tok, size_t group,
                                       size_t n_min)
{
    const int8_t *q = x->q + t0 * x->stride;
    const char *scale = (const char *)x->scale + t0 * x->stride;
    x86_512_token token[4];
    __m512i total[16];
    x86_512_prepare(x, t0, n_tok, n_min == 8 ? 16 : group, token);
    MOE_UNROLL
    for (size_t i = 0; i < n_tile * n_tok; i++)
        total[i] = group == X86_512_K && n_min == 0 ? _mm512_set1_epi32(token[i / n_tile].init[0])
                                                    : _mm512_setzero_si512();
    const size_t n = group == 16 ? 4 : 8; /* vectors of codes at a time */
    for (size_t g = 0; g < X86_512_K / 4 / n; g++, q += 4 * n) {
        __m512i sum[16];
        if (group == X86_512_K) {
            x86_512_dot(tile, n * g, n, q, x->stride, total, n_tile, n_tok);
            continue;
        }
        MOE_UNROLL
        for (size_t i = 0; i < n_tile * n_tok; i++)
            sum[i] = n_min ? _mm512_setzero_si512() : _mm512_set1_epi32(token[i / n_tile].init[g]);
        x86_512_dot(tile, n * g, n, q, x->stride, sum, n_tile, n_tok);
        MOE_UNROLL
        for (size_t i = 0; i < n_tile * n_tok; i++)
            total[i] = _mm512_add_epi32(total[i],
                                        _mm512_mullo_epi32(sum[i], tile[i % n_tile].scale[g]));
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        __m512i min[X86_512_TILES];
        MOE_UNROLL
        for (size_t r = 0; r < n_tile; r++)
            min[r] = _mm512_setzero_si512();
        MOE_UNROLL
        for (size_t p = 0; p < n_min; p++) {
            int32_t two;
            memcpy(&two, token[t].sum + 2 * p, 4);
            MOE_UNROLL
            for (size_t r = 0; r < n_tile; r++)
                min[r] = _mm512_dpwssd_epi32(min[r], tile[r].min[p], _mm512_set1_epi32(two));
        }
        float x_scale;
        memcpy(&x_scale, scale + t * x->stride, sizeof x_scale);
        MOE_UNROLL
        for (size_t r = 0; r < n_tile; r++)
            x86_512_add(tile + r, total[t * n_tile + r], n_min ? &min[r] : NULL, x_scale,
                        acc + (t0 + t) * X86_512_ROWS + 16 * r);
    }
}

/* The activations of up to 4 tokens from t on are on their way from L2 or L3 while those before
 * them are multiplied: each is needed once for 64 rows, and too late to wait for it then. */
MOE_VNNI512_INLINE void x86_512_fetch_tokens(const x86_512_x *x, size_t t)
{
    for (size_t i = t; i < MOE_MIN(t + 4, x->n_tok); i++) {
        x86_prefetch_x((uintptr_t)x->q + i * x->stride, X86_512_K);
        x86_prefetch_x((uintptr_t)x->scale + i * x->stride, 1);
        x86_prefetch_x((uintptr_t)x->sum + i * x->stride, 1);
    }
}

/* The three functions of a step, and their table. `body` is a step for a constant number of tokens
 * from t on. */
#define X86_512_STEP(name, body, n_tile, ...)                                                      \
    MOE_VNNI512 static void name##_##n_tile(const x86_512_tile *tile, const x86_512_x *x,          \
                                            float *acc)                                            \
    {                                                                                              \
        size_t t = 0;                                                                              \
        for (; t + 4 <= x->n_tok; t += 4) {                                                        \
            x86_prefetch(x->next + t / 4 * x->next_bytes, x->next_bytes);                          \
            x86_512_fetch_tokens(x, t + 4);                                                        \
            body(tile, x, t, acc, n_tile, 4, __VA_ARGS__);                                         \
        }                                                                                          \
        if (x->n_tok & 2)                                                                          \
            body(tile, x, t, acc, n_tile, 2, __VA_ARGS__);                                         \
        if (x->n_tok & 1)                                                                          \
            body(tile, x, x->n_tok - 1, acc, n_tile, 1, __VA_ARGS__);                              \
    }
#define X86_512_STEPS(name, body, ...)                                                             \
    X86_512_STEP(name, body, 1, __VA_ARGS__)                                                       \
    X86_512_STEP(name, body, 2, __VA_ARGS__)                                                       \
    X86_512_STEP(name, body, 4, __VA_ARGS__)                                                       \
    MOE_UNUSED static x86_512_steps name = {name##_1, name##_2, name##_4};

X86_512_STEPS(x86_512_block, x86_512_step_32, false)
X86_512_STEPS(x86_512_affine, x86_512_step_32, true)
X86_512_STEPS(x86_512_pairs, x86_512_step_pair, 16)
X86_512_STEPS(x86_512_k16, x86_512_step_k, 16, 0)
X86_512_STEPS(x86_512_k32, x86_512_step_k, 32, 0)
X86_512_STEPS(x86_512_k32_min, x86_512_step_k, 32, 4)
X86_512_STEPS(x86_512_k256, x86_512_step_k, X86_512_K, 0)
X86_512_STEPS(x86_512_k256_min, x86_512_step_k, X86_512_K, 8)

/* ------------------------------------------------------------------------------------- loops -- */

/* Calls load(); if the row has less than a tile left, on a copy that is long enough. */
MOE_VNNI512 static void x86_512_load(x86_512_rows *rows, size_t offset, size_t n_block,
                                     const x86_512_format *f, x86_512_tile *tile)
{
    if (n_block * f->block_len == X86_512_K) {
        f->load(rows, offset, tile);
        return;
    }
    uint8_t copy[16][8 * 34]; /* 34: the longest block of 32 */
    x86_512_rows from;
    from.next = rows->next;
    from.state = rows->state;
    for (size_t i = 0; i < 16; i++) {
        memset(copy[i], 0, sizeof copy[i]);
        memcpy(copy[i], rows->row[i] + offset, n_block * f->block_bytes);
        from.row[i] = copy[i];
    }
    f->load(&from, 0, tile);
}

/* Goes back from block b so that a row's last tile is a whole one, which can be loaded in place;
 * what had its turn does not count again. Returns where it begins. */
MOE_INLINE size_t x86_512_go_back(x86_512_x *x, const x86_512_format *f, size_t b, size_t n_block)
{
    const size_t back = X86_512_K / f->block_len - (n_block - b);
    x->first_block = back * f->block_len / 32;
    x->q -= 32 * x->first_block;
    x->sum -= 2 * x->first_block;
    x->scale -= x->first_block;
    return b - back;
}

/* acc = 16 n_tile rows, n_tile 1, 2 or 4, times the tokens of x, which stands at their
 * beginning. */
MOE_VNNI512 static void x86_512_gemm_rows(const moe_mm *mm, x86_512_rows *rows, size_t n_tile,
                                          x86_512_x *x, const x86_512_format *f, float *acc)
{
    const size_t n_block = mm->n_in / f->block_len, tile_blocks = X86_512_K / f->block_len;
    x86_512_step_fn *const step = (*f->steps)[n_tile / 2];
    x->first_block = 0;
    for (size_t b = 0; b < n_block; b += tile_blocks) {
        x86_512_tile tile[X86_512_TILES];
        if (b && n_block - b < tile_blocks && !rows->state)
            b = x86_512_go_back(x, f, b, n_block);
        const size_t n = MOE_MIN(tile_blocks, n_block - b);
        x->n_block = n * f->block_len / 32;
        for (size_t i = 0; i < n_tile; i++)
            x86_512_load(&rows[i], b * f->block_bytes, n, f, &tile[i]);
        step(tile, x, acc);
        x->next += x->n_tok / 4 * x->next_bytes;
        x->q += X86_512_K;
        x->sum += X86_512_K / 16;
        x->scale += f->block_len == X86_512_K ? 1 : X86_512_K / 32;
    }
}

/* How many tiles are computed at once: with few tokens, as many as have their next rows in L1 too
 * (Q8_0, 4 tokens, rows of 2048 from memory: 158 Gop/s instead of 128); with many, all. */
MOE_INLINE size_t x86_512_n_tile(const moe_mm *mm, size_t n_row)
{
    if (mm->n_tok == 1 || n_row <= 16)
        return 1;
    if (mm->n_tok < X86_512_FEW)
        return 32 * mm->w_stride > X86_512_L1 ? 1 : 2;
    return mm->n_tok >= X86_512_MANY && n_row > 32 ? 4 : 2;
}

/* Rows r .. r + 16 n_tile - 1; those past the end are the last row once more. */
MOE_INLINE void x86_512_start(const moe_mm *mm, size_t r, size_t n_tile, size_t tile_bytes,
                              bool fetch, x86_512_rows *rows, x86_512_x *x)
{
    const uintptr_t next = (uintptr_t)mm->w + (r + 16 * n_tile) * mm->w_stride;
    const size_t n_step = x->n_tok / 4;
    const bool few = x->n_tok < X86_512_FEW;
    for (size_t i = 0; i < 16 * n_tile; i++)
        rows[i / 16].row[i % 16] = mm->w + MOE_MIN(r + i, mm->n_row - 1) * mm->w_stride;
    for (size_t i = 0; i < n_tile; i++)
        rows[i].next = fetch && few ? next + 16 * i * mm->w_stride : 0;
    x->next = next;
    x->next_bytes = fetch && !few ? (size_t)align_up(16 * n_tile * tile_bytes / n_step, 64) : 0;
}

/* Rows r .. r + n_row - 1 of the results. */
MOE_VNNI512_INLINE void x86_512_store(const moe_mm *mm, size_t t0, size_t n_tok, size_t r,
                                      size_t n_row, const float *acc)
{
    for (size_t t = 0; t < n_tok; t++, acc += X86_512_ROWS) {
        float *y = mm->y + (t0 + t) * mm->y_stride + r;
        for (size_t i = 0; i < n_row; i += 16) {
            const __mmask16 mask = (__mmask16)(0xffff >> (16 - MOE_MIN(n_row - i, 16)));
            _mm512_mask_storeu_ps(y + i, mask, _mm512_loadu_ps(acc + i));
        }
    }
}

/* `state`: room for a format that needs it, or NULL. */
MOE_VNNI512 static void x86_512_gemm_with(const moe_mm *mm, const x86_512_format *f,
                                          x86_512_state state[X86_512_TILES])
{
    const moe_act act = f->block_len == X86_512_K ? MOE_ACT_Q8_256 : MOE_ACT_Q8_32;
    const size_t tile_bytes = X86_512_K / f->block_len * f->block_bytes;
    const size_t part = x86_token_part(mm);
    for (size_t t0 = 0; t0 < mm->n_tok; t0 += part) {
        const moe_q8 first = act_q8(act, mm->x + t0 * mm->x_stride, mm->n_in);
        x86_512_x x;
        x.stride = mm->x_stride;
        x.n_tok = MOE_MIN(mm->n_tok - t0, part);
        x.offset = f->offset;
        for (size_t r = 0, n_tile; r < mm->n_row; r += 16 * n_tile) {
            x86_512_rows rows[X86_512_TILES];
            float acc[X86_MOST_TOKENS][X86_512_ROWS];
            n_tile = x86_512_n_tile(mm, mm->n_row - r);
            x86_512_start(mm, r, n_tile, tile_bytes, t0 == 0, rows, &x);
            for (size_t i = 0; i < n_tile; i++)
                rows[i].state = state ? &state[i] : NULL;
            if (state)
                memset(state, 0, n_tile * sizeof *state);
            x.q = first.q;
            x.scale = first.scale;
            x.sum = first.sum;
            memset(acc, 0, x.n_tok * sizeof acc[0]);
            x86_512_gemm_rows(mm, rows, n_tile, &x, f, acc[0]);
            x86_512_store(mm, t0, x.n_tok, r, MOE_MIN(mm->n_row - r, 16 * n_tile), acc[0]);
        }
    }
}

MOE_VNNI512 static void x86_512_gemm(const moe_mm *mm, const x86_512_format *f)
{
    x86_512_gemm_with(mm, f, NULL);
}

#endif
#endif
