/* quant/x86_tile.h - many tokens (gemm) with AVX2 and AVX-VNNI, for all integer formats: tiles, how
 * they are multiplied, and the loop over rows, tiles and tokens.
 *
 * 256 weights of 8 rows, a superblock or up to 8 blocks of 32, are unpacked into a tile, transposed
 * so that a vector holds 4 consecutive k of 8 rows:
 *
 *     code[i]   bytes    row 0 k 4i..4i+3 | row 1 k 4i..4i+3 | ... | row 7 k 4i..4i+3
 *     scale[p]  2 int16  row 0: scales of groups of k 32p.., 32p+16.. | row 1 | ... | row 7
 *     d[b]      float    row 0: scale of block b | row 1 | ... | row 7
 *
 * A vector of weights meets 4 activations of a token, broadcast, and the sums of 8 rows grow in the
 * lanes of one vector; nothing is added across lanes. Two tiles and 4 tokens are multiplied at
 * once: 8 products take 6 loads. The instruction sets differ in one step:
 *   - x86_dot32_avx2() multiplies unsigned codes to pairs of products in 16 bits (vpmaddubsw), adds
 *     as many of them as fit for codes of that size (fold), and makes 32 bits of the sums in one
 *     product with the scales, or with 1. Zen 5, one core: 320 Gop/s with Q4_K of a peak of 433.
 *   - x86_dot32_signed_avx2(): bytes with a sign fill 16 bits at once. Four instructions for a
 *     vector instead of two: 186 Gop/s with Q8_0 of a peak of 232.
 *   - x86_dot32_avxvnni() adds four products to 32 bits (vpdpbusd).
 *
 * A format brings a function that unpacks and names the steps for its blocks, which are compiled
 * once for all formats alike and called through pointers, once per tile. Must never: read a byte
 * outside a row, or compute a float in another order than the C kernel of the format. */
#ifndef MOE_QUANT_X86_TILE_H
#define MOE_QUANT_X86_TILE_H

#include "x86.h"

#if MOE_X86

#define MOE_AVX_VNNI MOE_TARGET("avx2,fma,f16c,avxvnni")
#define MOE_AVX_VNNI_INLINE MOE_UNUSED MOE_INLINE MOE_AVX_VNNI

enum {
    X86_K = 256,           /* weights of a row in a tile */
    X86_TILES = 2,         /* tiles computed at once */
    X86_TILE_TOKENS_MIN = 4 /* fewer are computed one by one: a tile would not pay */
};

typedef struct x86_tile {
    __m256i code[X86_K / 4];
    __m256i scale[16];  // superblocks
    __m256i min[8];     // superblocks with minima
    __m256 d[8], m[8];  // [block], [0] with superblocks
    __m256i sign[X86_K / 4], start[8]; // by x86_split_signs_avx2()
    __m256i path[48];   // what load() may keep from one tile of its rows to the next
} x86_tile;

/* How the integers of a block of a row become a part of its float. */
typedef enum x86_kind {
    X86_BLOCK,       /* fma(d x_scale, dot, acc) for each block of 32 */
    X86_AFFINE,      /* then fma(m x_scale, sum of x, acc) */
    X86_PAIR,        /* fma(x_scale, fma(m, dot of k 16.., d dot of k 0..), acc) for blocks of 32 */
    X86_K_NO_MIN,    /* fma(x_scale d, dot, acc) for superblocks, dot = sum of scale * products */
    X86_K_FLOAT_MIN  /* fma(x_scale, fma(-dmin, sum of min * sum of x, d dot), acc) */
} x86_kind;

/* What the sums of products start with. */
typedef enum x86_start {
    X86_ZERO,
    X86_OFFSET, /* -offset * sum of x, for each block or group */
    X86_CENTRE, /* the same in 16 bits, for each group of 16: what fits is the sum of products of
                   code - offset, so that what overflows on the way there comes back */
    X86_CENTRE8, /* the same for each 8 weights */
    X86_SIGNS   /* what x86_split_signs_avx2() left */
} x86_start;

/* What the compiler must know about a format's tiles. */
typedef struct x86_shape {
    x86_kind kind;
    size_t group;  // weights that share a scale: 16 or 32
    size_t fold;   // AVX2: how many pairs of products fit into 16 bits; 1 if the codes are signed
    x86_start start;
} x86_shape;

/* The integers of a superblock of 8 rows, and the numbers that they belong to. */
typedef struct x86_k_sums {
    __m256i dot, min; // [row]; min and dmin with X86_K_FLOAT_MIN only
    __m256 d, dmin;   // [row]
} x86_k_sums;

/* What up to X86_MOST_TOKENS tokens bring to a tile: the activations of the first, the others'
 * follow at distances of `stride` bytes. */
typedef struct x86_tokens {
    const int8_t *q;      // 256 of them, or 32 n_block
    const float *scale;
    const int16_t *sum;
    size_t stride, n_tok;
    size_t n_block;       // blocks of 32 in the tile
    int offset;           // what is subtracted from each unsigned code
    uintptr_t next;       // what is fetched during the next steps: next_bytes for each 4 tokens
    size_t next_bytes;
} x86_tokens;

/* acc[token][tile] += tiles times all tokens of x. May change the tiles. */
typedef __m256 x86_acc[X86_TILES];
typedef void x86_tiles_fn(x86_tile *tile, const x86_tokens *x, x86_acc *acc);
typedef x86_tiles_fn *const x86_steps[X86_TILES]; // [number of tiles - 1]

/* Unpacks n_block blocks at `offset` of 8 rows: from the rows' beginning on, in order. */
typedef void x86_load_fn(const uint8_t *const row[8], size_t offset, size_t n_block,
                         x86_tile *tile);

typedef struct x86_format {
    size_t block_len, block_bytes;
    int offset;           // what is subtracted from unsigned codes; 128 if they are made of signed
    x86_load_fn *load;
} x86_format;

/* ------------------------------------------------------------------------------ unpacking -- */

/* 16 bytes of 8 rows, to 4 vectors that hold 4 bytes of each row. Row i stands in the
 * lower, row i + 4 in the upper half of in[i]. */
MOE_AVX2_INLINE void x86_transpose(const __m256i in[4], __m256i out[4])
{
    __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
    __m256i c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
}

MOE_AVX2_INLINE void x86_load_transposed(const uint8_t *const row[8], size_t offset, __m256i out[4])
{
    const __m256i in[4] = {x86_load_pair(row[0] + offset, row[4] + offset),
                           x86_load_pair(row[1] + offset, row[5] + offset),
                           x86_load_pair(row[2] + offset, row[6] + offset),
                           x86_load_pair(row[3] + offset, row[7] + offset)};
    x86_transpose(in, out);
}

/* 16 bytes at `offset` of 8 rows, to the codes of a block: low nibbles are k 0..15, high ones k
 * 16..31. */
MOE_AVX2_INLINE void x86_tile_nibbles(const uint8_t *const row[8], size_t offset, __m256i code[8])
{
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i v[4];
    x86_load_transposed(row, offset, v);
    MOE_UNROLL
    for (int j = 0; j < 4; j++) {
        code[j] = _mm256_and_si256(v[j], mask);
        code[j + 4] = _mm256_and_si256(_mm256_srli_epi16(v[j], 4), mask);
    }
}

/* Adds `value`, a bit that it does not have, to the code k of a row whose 32-bit word has the bit k
 * set. */
MOE_AVX2_INLINE void x86_tile_bits(__m256i words, char value, __m256i code[8])
{
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    MOE_UNROLL
    for (int j = 0; j < 8; j++) {
        const __m256i at = _mm256_add_epi8(first, _mm256_set1_epi8((char)(j / 2)));
        const __m256i bit = _mm256_set1_epi32(j % 2 ? (int)0x80402010 : 0x08040201);
        __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(words, at), bit);
        v = _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(value));
        code[j] = _mm256_or_si256(code[j], v);
    }
}

/* The same with 16 and the words at `offset` of the rows. */
MOE_AVX2_INLINE void x86_tile_fifth_bits(const uint8_t *const row[8], size_t offset,
                                         __m256i code[8])
{
    x86_tile_bits(x86_u32x8(row, offset), 16, code);
}

/* Replaces codes 0..15 of a block by the table's values. */
MOE_AVX2_INLINE void x86_tile_look_up(const int8_t table[16], __m256i code[8])
{
    const __m256i t =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)table));
    MOE_UNROLL
    for (int j = 0; j < 8; j++)
        code[j] = _mm256_shuffle_epi8(t, code[j]);
}

/* ---------------------------------------------------------------------------- multiplying -- */

/* A chain of additions stays a chain: as a tree, which compilers prefer, it takes more registers
 * than there are. */
MOE_AVX2_INLINE void x86_pin(__m256i *v)
{
    __asm__("" : MOE_X86_REGISTER(*v));
}

/* The sums of floats are operands in memory: gcc else keeps copies of them on the stack, stored
 * with each block as well. */
MOE_AVX2_INLINE void x86_keep_in_memory(x86_acc *acc)
{
    __asm__ volatile("" : : "r"(acc) : "memory");
}

/* 4 bytes at p in all lanes. */
MOE_AVX2_INLINE __m256i x86_broadcast4(const void *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

MOE_INLINE bool x86_is_block(const x86_shape *s)
{
    return s->kind == X86_BLOCK || s->kind == X86_AFFINE || s->kind == X86_PAIR;
}

/* What up to 4 tokens bring to the tiles. */
typedef struct x86_part {
    const int8_t *q[4];
    const int16_t *sum[4];
    const float *scale[4];
    int32_t (*ready)[32]; // [token] x86_ready() of it
} x86_part;

/* Sums over groups of 16 activations, of bytes 0, 1, 4, 5 ... and of bytes 2, 3, 6, 7 ... of each:
 * of groups 0, 2, 4, 6, 1, 3, 5, 7, the lanes to which vpmaddubsw adds them. */
MOE_AVX2_INLINE __m256i x86_half_sums(const int8_t *q)
{
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i *v = (const __m256i *)q;
    const __m256i v0 = _mm256_maddubs_epi16(one, _mm256_load_si256(v));
    const __m256i v1 = _mm256_maddubs_epi16(one, _mm256_load_si256(v + 1));
    const __m256i v2 = _mm256_maddubs_epi16(one, _mm256_load_si256(v + 2));
    const __m256i v3 = _mm256_maddubs_epi16(one, _mm256_load_si256(v + 3));
    __m256i a = _mm256_add_epi16(_mm256_blend_epi32(v0, v1, 0xcc), _mm256_alignr_epi8(v1, v0, 8));
    __m256i b = _mm256_add_epi16(_mm256_blend_epi32(v2, v3, 0xcc), _mm256_alignr_epi8(v3, v2, 8));
    const __m256 even = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
    const __m256 odd = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd);
    return _mm256_add_epi16(_mm256_castps_si256(even), _mm256_castps_si256(odd));
}

/* Of bytes 0, 1 and 4, 5, and of bytes 2, 3 and 6, 7, of each 8: of two vectors, p = 0 and 1, at
 * places x86_eighth(p, i). */
MOE_AVX2_INLINE __m256i x86_eighth_sums(const int8_t *q)
{
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i *v = (const __m256i *)q;
    const __m256 v0 = _mm256_castsi256_ps(_mm256_maddubs_epi16(one, _mm256_load_si256(v)));
    const __m256 v1 = _mm256_castsi256_ps(_mm256_maddubs_epi16(one, _mm256_load_si256(v + 1)));
    return _mm256_add_epi16(_mm256_castps_si256(_mm256_shuffle_ps(v0, v1, 0x88)),
                            _mm256_castps_si256(_mm256_shuffle_ps(v0, v1, 0xdd)));
}

/* Where that of k 32 p + 8 i .. stands. */
MOE_INLINE size_t x86_eighth(size_t p, size_t i)
{
    return p / 2 * 8 + i / 2 * 4 + p % 2 * 2 + i % 2;
}

/* What follows from a token's sums alone, once for all tiles of a step:
 *   X86_OFFSET  [block or group] -offset * sum
 *   X86_CENTRE  [4 * (g % 2) + g / 2 % 4 + 8 * (g / 8)] -offset * half sums of group g of 16
 *   X86_CENTRE8 [x86_eighth()] -offset * sums of 8
 *   X86_AFFINE  [block] the sum, as float
 *   X86_K_FLOAT_MIN and groups of 32: [p] sums of groups 2p and 2p + 1 as int16 */
MOE_AVX2_INLINE void x86_ready(const int8_t *q, const int16_t *sum, int offset, const x86_shape *s,
                               int32_t out[32])
{
    const __m256i factor = _mm256_set1_epi16((int16_t)-offset);
    const __m256i v = _mm256_load_si256((const __m256i *)sum);
    __m256i *to = (__m256i *)out;
    if (s->start == X86_OFFSET && s->group == 32)
        _mm256_store_si256(to, _mm256_madd_epi16(v, factor));
    if (s->start == X86_OFFSET && s->group == 16) {
        const __m256i wide = _mm256_set1_epi32(-offset);
        const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v));
        const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1));
        _mm256_store_si256(to, _mm256_mullo_epi32(low, wide));
        _mm256_store_si256(to + 1, _mm256_mullo_epi32(high, wide));
    }
    if (s->start == X86_CENTRE) {
        _mm256_store_si256(to, _mm256_mullo_epi16(x86_half_sums(q), factor));
        _mm256_store_si256(to + 1, _mm256_mullo_epi16(x86_half_sums(q + 128), factor));
    }
    for (size_t i = 0; i < 4 && s->start == X86_CENTRE8; i++)
        _mm256_store_si256(to + i, _mm256_mullo_epi16(x86_eighth_sums(q + 64 * i), factor));
    if (s->kind == X86_AFFINE)
        _mm256_store_ps((float *)out,
                        _mm256_cvtepi32_ps(_mm256_madd_epi16(v, _mm256_set1_epi16(1))));
    if (s->kind == X86_K_FLOAT_MIN && s->group == 32)
        _mm_store_si128((__m128i *)out, _mm_hadd_epi16(_mm256_castsi256_si128(v),
                                                      _mm256_extracti128_si256(v, 1)));
}

/* sum[j] += the (scaled) products of k 32 p .. 32 p + 31 of tile j % n_tile with token j / n_tile.
 * X86_PAIR: those of k 16 .. are added to sum[8 + j]. n_tile and n_tok are constants and n_tile *
 * n_tok <= 8. */
typedef void x86_dot32_fn(const x86_tile *tile, size_t p, const x86_part *x, __m256i *sum,
                          size_t n_tile, size_t n_tok, const x86_shape *s);

/* What multiplies the sums of 16 bits of group g, of n, of k 32 p .. 32 p + 31. */
MOE_AVX2_INLINE __m256i x86_factor(const x86_tile *tile, size_t p, size_t g, const x86_shape *s)
{
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    if (x86_is_block(s))
        return _mm256_set1_epi16(1);
    if (s->group == 32)
        return tile->scale[p];
    return _mm256_shuffle_epi8(tile->scale[p],
                               _mm256_add_epi8(first, _mm256_set1_epi8(g ? 2 : 0)));
}

/* Unsigned codes, sums of 16 bits. */
MOE_AVX2_INLINE void x86_dot32_avx2(const x86_tile *tile, size_t p, const x86_part *x,
                                    __m256i *sum, size_t n_tile, size_t n_tok, const x86_shape *s)
{
    MOE_UNROLL
    for (size_t i = 0; i < 8 / s->fold; i++) {
        const size_t g = i * s->fold / 4; /* of two of 16 */
        __m256i part[8];
        MOE_UNROLL
        for (size_t k = 0; k < s->fold; k++) {
            const size_t at = 8 * p + i * s->fold + k;
            MOE_UNROLL
            for (size_t j = 0; j < n_tile * n_tok; j++) {
                const __m256i v = _mm256_maddubs_epi16(tile[j % n_tile].code[at],
                                                       x86_broadcast4(x->q[j / n_tile] + 4 * at));
                if (k == 0 && s->start == X86_CENTRE)
                    part[j] = x86_broadcast4(x->ready[j / n_tile] + p / 4 * 8 + p % 4 + 4 * g);
                if (k == 0 && s->start == X86_CENTRE8)
                    part[j] = x86_broadcast4(x->ready[j / n_tile] + x86_eighth(p, i));
                const bool centred = s->start == X86_CENTRE || s->start == X86_CENTRE8;
                part[j] = k == 0 && !centred ? v : _mm256_add_epi16(part[j], v);
                x86_pin(&part[j]);
            }
        }
        MOE_UNROLL
        for (size_t j = 0; j < n_tile * n_tok; j++) {
            const __m256i factor = x86_factor(&tile[j % n_tile], p, g, s);
            const size_t to = s->kind == X86_PAIR ? 8 * g + j : j;
            sum[to] = _mm256_add_epi32(sum[to], _mm256_madd_epi16(part[j], factor));
            x86_pin(&sum[to]);
        }
    }
}

/* Codes with a sign, which x86_split_signs_avx2() has split: |w| (x ^ sign) =
 * w x - (1 if w < 0) |w|. 2 * 128 * 128 = 32768 is reached below zero only. */
MOE_AVX2_INLINE void x86_dot32_signed_avx2(const x86_tile *tile, size_t p, const x86_part *x,
                                           __m256i *sum, size_t n_tile, size_t n_tok,
                                           const x86_shape *s)
{
    MOE_UNROLL
    for (size_t i = 0; i < 8; i++) {
        const size_t at = 8 * p + i;
        MOE_UNROLL
        for (size_t j = 0; j < n_tile * n_tok; j++) {
            const x86_tile *w = &tile[j % n_tile];
            __m256i v = _mm256_xor_si256(x86_broadcast4(x->q[j / n_tile] + 4 * at), w->sign[at]);
            v = _mm256_madd_epi16(_mm256_maddubs_epi16(w->code[at], v), x86_factor(w, p, 0, s));
            sum[j] = _mm256_add_epi32(sum[j], v);
            x86_pin(&sum[j]);
        }
    }
}

/* Magnitudes and signs of signed codes, and what the sums start with for it. */
MOE_AVX2_INLINE void x86_split_signs_avx2(x86_tile *tile, size_t n_block, const x86_shape *s)
{
    const __m256i zero = _mm256_setzero_si256();
    tile->start[0] = zero;
    for (size_t p = 0; p < (x86_is_block(s) ? n_block : 8); p++) {
        __m256i negative = zero; /* 8 * 2 * 128 at most */
        MOE_UNROLL
        for (size_t i = 8 * p; i < 8 * p + 8; i++) {
            const __m256i w = tile->code[i];
            tile->sign[i] = _mm256_cmpgt_epi8(zero, w);
            tile->code[i] = _mm256_abs_epi8(w);
            negative = _mm256_sub_epi16(negative,
                                        _mm256_maddubs_epi16(tile->code[i], tile->sign[i]));
        }
        negative = _mm256_madd_epi16(negative, x86_factor(tile, p, 0, s));
        if (x86_is_block(s))
            tile->start[p] = negative;
        else
            tile->start[0] = _mm256_add_epi32(tile->start[0], negative);
    }
}

/* Sums of 32 bits. Signed codes have become unsigned by adding 128. */
MOE_AVX_VNNI_INLINE void x86_dot32_avxvnni(const x86_tile *tile, size_t p, const x86_part *x,
                                           __m256i *sum, size_t n_tile, size_t n_tok,
                                           const x86_shape *s)
{
    const size_t n_part = 32 / s->group, n_quad = 8 / n_part;
    MOE_UNROLL
    for (size_t i = 0; i < n_part; i++) {
        __m256i part[8];
        MOE_UNROLL
        for (size_t j = 0; j < n_tile * n_tok; j++)
            if (x86_is_block(s))
                part[j] = sum[8 * i + j];
            else if (s->start == X86_OFFSET)
                part[j] = x86_broadcast4(x->ready[j / n_tile] + n_part * p + i);
            else
                part[j] = _mm256_setzero_si256();
        MOE_UNROLL
        for (size_t k = 0; k < n_quad; k++) {
            const size_t at = 8 * p + i * n_quad + k;
            MOE_UNROLL
            for (size_t j = 0; j < n_tile * n_tok; j++)
                part[j] = _mm256_dpbusd_avx_epi32(part[j], tile[j % n_tile].code[at],
                                                  x86_broadcast4(x->q[j / n_tile] + 4 * at));
        }
        MOE_UNROLL
        for (size_t j = 0; j < n_tile * n_tok; j++) {
            const __m256i scale = tile[j % n_tile].scale[n_part * p + i];
            if (x86_is_block(s))
                sum[8 * i + j] = part[j];
            else
                sum[j] = _mm256_add_epi32(sum[j], _mm256_mullo_epi32(part[j], scale));
        }
    }
}

/* What vpdpbusd wants: unsigned codes, and each scale as one number of 32 bits. */
MOE_AVX2_INLINE void x86_widen_avx2(x86_tile *tile, bool is_signed, const x86_shape *s)
{
    if (is_signed)
        for (size_t i = 0; i < X86_K / 4; i++)
            tile->code[i] = _mm256_xor_si256(tile->code[i], _mm256_set1_epi8(-128));
    for (size_t p = x86_is_block(s) ? 0 : 8; p-- > 0;) {
        const __m256i pair = tile->scale[p];
        if (s->group == 32) {
            tile->scale[p] = _mm256_srai_epi32(pair, 16);
            continue;
        }
        tile->scale[2 * p] = _mm256_srai_epi32(_mm256_slli_epi32(pair, 16), 16);
        tile->scale[2 * p + 1] = _mm256_srai_epi32(pair, 16);
    }
}

/* acc[i] += block b of the tiles times that of token i. n_tile and n_tok are constants. */
MOE_AVX2_INLINE void x86_block_step(const x86_tile *tile, const x86_part *x, size_t b,
                                    x86_acc *acc, size_t n_tile, size_t n_tok, const x86_shape *s,
                                    x86_dot32_fn *dot32)
{
    __m256i sum[8];
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++)
        sum[j] = s->start == X86_OFFSET  ? x86_broadcast4(x->ready[j / n_tile] + b)
                 : s->start == X86_SIGNS ? tile[j % n_tile].start[b]
                                         : _mm256_setzero_si256();
    dot32(tile, b, x, sum, n_tile, n_tok, s);
    __m256 d[X86_TILES], m[X86_TILES];
    MOE_UNROLL
    for (size_t r = 0; r < n_tile; r++) {
        d[r] = tile[r].d[b];
        if (s->kind == X86_AFFINE)
            m[r] = tile[r].m[b];
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_tok; i++) {
        const __m256 x_scale = _mm256_broadcast_ss(x->scale[i] + b);
        MOE_UNROLL
        for (size_t r = 0; r < n_tile; r++) {
            const __m256 dot = _mm256_cvtepi32_ps(sum[i * n_tile + r]);
            __m256 y = _mm256_fmadd_ps(_mm256_mul_ps(d[r], x_scale), dot, acc[i][r]);
            if (s->kind == X86_AFFINE)
                y = _mm256_fmadd_ps(_mm256_mul_ps(m[r], x_scale),
                                    _mm256_castsi256_ps(x86_broadcast4(x->ready[i] + b)), y);
            acc[i][r] = y;
        }
    }
    x86_keep_in_memory(acc);
}

/* The same of groups of 16 with a scale each. */
MOE_AVX2_INLINE void x86_pair_step(const x86_tile *tile, const x86_part *x, size_t b, x86_acc *acc,
                                   size_t n_tile, size_t n_tok, const x86_shape *s,
                                   x86_dot32_fn *dot32)
{
    __m256i sum[16];
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++) {
        sum[j] = x86_broadcast4(x->ready[j / n_tile] + 2 * b);
        sum[8 + j] = x86_broadcast4(x->ready[j / n_tile] + 2 * b + 1);
    }
    dot32(tile, b, x, sum, n_tile, n_tok, s);
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++) {
        const size_t i = j / n_tile, r = j % n_tile;
        const __m256 first = _mm256_mul_ps(tile[r].d[b], _mm256_cvtepi32_ps(sum[j]));
        const __m256 term = _mm256_fmadd_ps(tile[r].m[b], _mm256_cvtepi32_ps(sum[8 + j]), first);
        acc[i][r] = _mm256_fmadd_ps(_mm256_broadcast_ss(x->scale[i] + b), term, acc[i][r]);
    }
    x86_keep_in_memory(acc);
}

/* acc + the part of one superblock of 8 rows: the expression of the formats. */
MOE_AVX2_INLINE __m256 x86_k_add(const x86_k_sums *s, x86_kind kind, __m256 x_scale, __m256 acc)
{
    __m256 dot = _mm256_cvtepi32_ps(s->dot);
    if (kind != X86_K_FLOAT_MIN)
        return _mm256_fmadd_ps(_mm256_mul_ps(x_scale, s->d), dot, acc);
    __m256 term = _mm256_mul_ps(s->d, dot);
    term = _mm256_fnmadd_ps(s->dmin, _mm256_cvtepi32_ps(s->min), term);
    return _mm256_fmadd_ps(x_scale, term, acc);
}

/* The sum of minima times sums of a token, for 8 rows. */
MOE_AVX2_INLINE __m256i x86_k_mins(const x86_tile *tile, const int16_t *sum, const int32_t *ready,
                                   const x86_shape *s)
{
    const size_t n = s->group == 32 ? 4 : 8;
    __m256i v = _mm256_setzero_si256();
    MOE_UNROLL
    for (size_t p = 0; p < n; p++) {
        const __m256i two = x86_broadcast4(s->group == 32 ? (const void *)(ready + p)
                                                          : (const void *)(sum + 2 * p));
        v = _mm256_add_epi32(v, _mm256_madd_epi16(tile->min[p], two));
    }
    return v;
}

/* acc[i] += the tiles' superblocks times that of token i. */
MOE_AVX2_INLINE void x86_k_step(const x86_tile *tile, const x86_part *x, x86_acc *acc,
                                size_t n_tile, size_t n_tok, const x86_shape *s,
                                x86_dot32_fn *dot32)
{
    __m256i sum[8];
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++)
        sum[j] = s->start == X86_SIGNS ? tile[j % n_tile].start[0] : _mm256_setzero_si256();
    for (size_t p = 0; p < 8; p++)
        dot32(tile, p, x, sum, n_tile, n_tok, s);
    MOE_UNROLL
    for (size_t j = 0; j < n_tile * n_tok; j++) {
        const size_t i = j / n_tile, r = j % n_tile;
        x86_k_sums sums = {sum[j], sum[j], tile[r].d[0], tile[r].m[0]};
        if (s->kind == X86_K_FLOAT_MIN)
            sums.min = x86_k_mins(&tile[r], x->sum[i], x->ready[i], s);
        acc[i][r] = x86_k_add(&sums, s->kind, _mm256_broadcast_ss(x->scale[i]), acc[i][r]);
    }
}

/* acc[t ..] += tiles times n_tok tokens from t on. */
MOE_AVX2_INLINE void x86_tiles_part(const x86_tile *tile, const x86_tokens *x, size_t t,
                                    x86_acc *acc, size_t n_tile, size_t n_tok, const x86_shape *s,
                                    x86_dot32_fn *dot32)
{
    _Alignas(32) int32_t ready[4][32];
    x86_part part = {.ready = ready};
    MOE_UNROLL
    for (size_t i = 0; i < n_tok; i++) {
        const size_t at = (t + i) * x->stride;
        part.q[i] = x->q + at;
        part.sum[i] = x->sum + at / sizeof(int16_t);
        part.scale[i] = x->scale + at / sizeof(float);
        x86_ready(part.q[i], part.sum[i], x->offset, s, ready[i]);
    }
    if (s->kind == X86_PAIR)
        for (size_t b = 0; b < x->n_block; b++)
            x86_pair_step(tile, &part, b, acc + t, n_tile, n_tok, s, dot32);
    else if (x86_is_block(s))
        for (size_t b = 0; b < x->n_block; b++)
            x86_block_step(tile, &part, b, acc + t, n_tile, n_tok, s, dot32);
    else
        x86_k_step(tile, &part, acc + t, n_tile, n_tok, s, dot32);
}

/* The activations of up to 4 tokens from t on are on their way from L2 or L3 while those before
 * them are multiplied. */
MOE_AVX2_INLINE void x86_fetch_tokens(const x86_tokens *x, size_t t)
{
    for (size_t i = t; i < MOE_MIN(t + 4, x->n_tok); i++) {
        x86_prefetch_x((uintptr_t)x->q + i * x->stride, X86_K);
        x86_prefetch_x((uintptr_t)x->scale + i * x->stride, 1);
    }
}

/* The body of all steps. */
MOE_AVX2_INLINE void x86_tiles(const x86_tile *tile, const x86_tokens *x, x86_acc *acc,
                               size_t n_tile, const x86_shape *s, x86_dot32_fn *dot32)
{
    uintptr_t next = x->next;
    size_t t = 0;
    for (; t + 4 <= x->n_tok; t += 4) {
        x86_prefetch(next, x->next_bytes);
        next += x->next_bytes;
        x86_fetch_tokens(x, t + 4);
        x86_tiles_part(tile, x, t, acc, n_tile, 4, s, dot32);
    }
    if (t + 2 <= x->n_tok) {
        x86_tiles_part(tile, x, t, acc, n_tile, 2, s, dot32);
        t += 2;
    }
    if (t < x->n_tok)
        x86_tiles_part(tile, x, t, acc, n_tile, 1, s, dot32);
}

/* The steps of a shape, for one and for two tiles: `prepare` changes the tiles t, `dot32` is the
 * instruction set's. */
#define X86_STEPS(name, target, prepare, dot32, ...)                                               \
    static const x86_shape x86_shape_##name = {__VA_ARGS__};                                       \
    target static void x86_##name##_1(x86_tile *t, const x86_tokens *x, x86_acc *acc)              \
    {                                                                                              \
        const x86_shape *const s = &x86_shape_##name;                                              \
        prepare(&t[0], x, s);                                                                      \
        x86_tiles(t, x, acc, 1, s, dot32);                                                         \
    }                                                                                              \
    target static void x86_##name##_2(x86_tile *t, const x86_tokens *x, x86_acc *acc)              \
    {                                                                                              \
        const x86_shape *const s = &x86_shape_##name;                                              \
        prepare(&t[0], x, s);                                                                      \
        prepare(&t[1], x, s);                                                                      \
        x86_tiles(t, x, acc, 2, s, dot32);                                                         \
    }                                                                                              \
    static x86_steps x86_##name = {x86_##name##_1, x86_##name##_2};
#define X86_STEPS_AVX2(name, ...)                                                                  \
    X86_STEPS(name##_avx2, MOE_AVX2, X86_AS_IT_IS, x86_dot32_avx2, __VA_ARGS__)
#define X86_STEPS_SIGNED_AVX2(name, ...)                                                           \
    X86_STEPS(name##_avx2, MOE_AVX2, X86_SPLIT_SIGNS, x86_dot32_signed_avx2, __VA_ARGS__)
#define X86_STEPS_AVXVNNI(name, ...)                                                               \
    X86_STEPS(name##_avxvnni, MOE_AVX_VNNI, X86_WIDEN, x86_dot32_avxvnni, __VA_ARGS__)
#define X86_STEPS_SIGNED_AVXVNNI(name, ...)                                                        \
    X86_STEPS(name##_avxvnni, MOE_AVX_VNNI, X86_WIDEN_SIGNED, x86_dot32_avxvnni, __VA_ARGS__)
#define X86_AS_IT_IS(tile, x, s) ((void)0)
#define X86_SPLIT_SIGNS(tile, x, s) x86_split_signs_avx2(tile, (x)->n_block, s)
#define X86_WIDEN(tile, x, s) x86_widen_avx2(tile, false, s)
#define X86_WIDEN_SIGNED(tile, x, s) x86_widen_avx2(tile, true, s)

/* fold: codes of 4 bits, 8 * 2 * 127 * 15 = 30480; of 5 bits, 4 * 2 * 127 * 31 = 31496; of 6 bits,
 * centred, 4 * 2 * 127 * 32 = 32512; as they are, 2 * 2 * 127 * 63 = 32004; of 7 bits, centred,
 * 2 * 2 * 127 * 64 = 32512. */
X86_STEPS_AVX2(block_u4, X86_BLOCK, 32, 8, X86_OFFSET)
X86_STEPS_AVX2(block_u5, X86_BLOCK, 32, 4, X86_OFFSET)
X86_STEPS_AVX2(block_u6, X86_BLOCK, 32, 2, X86_OFFSET)
X86_STEPS_SIGNED_AVX2(block_i8, X86_BLOCK, 32, 1, X86_SIGNS)
X86_STEPS_AVX2(affine_u4, X86_AFFINE, 32, 8, X86_ZERO)
X86_STEPS_AVX2(affine_u5, X86_AFFINE, 32, 4, X86_ZERO)
X86_STEPS_AVX2(pair_u5, X86_PAIR, 16, 4, X86_OFFSET)
X86_STEPS_AVX2(k32_u4_min, X86_K_FLOAT_MIN, 32, 8, X86_ZERO)
X86_STEPS_AVX2(k32_u5_min, X86_K_FLOAT_MIN, 32, 4, X86_ZERO)
X86_STEPS_SIGNED_AVX2(k32_i8, X86_K_NO_MIN, 32, 1, X86_SIGNS)
X86_STEPS_AVX2(k16_u4_min, X86_K_FLOAT_MIN, 16, 4, X86_ZERO)
X86_STEPS_AVX2(k16_u6, X86_K_NO_MIN, 16, 4, X86_CENTRE)
X86_STEPS_AVX2(k32_u6, X86_K_NO_MIN, 32, 4, X86_CENTRE)
X86_STEPS_AVX2(k16_u7, X86_K_NO_MIN, 16, 2, X86_CENTRE8)
X86_STEPS_AVX2(k32_u7, X86_K_NO_MIN, 32, 2, X86_CENTRE8)

X86_STEPS_AVXVNNI(block_u8, X86_BLOCK, 32, 8, X86_OFFSET)
X86_STEPS_SIGNED_AVXVNNI(block_i8, X86_BLOCK, 32, 8, X86_OFFSET)
X86_STEPS_AVXVNNI(affine, X86_AFFINE, 32, 8, X86_ZERO)
X86_STEPS_AVXVNNI(pair, X86_PAIR, 16, 8, X86_OFFSET)
X86_STEPS_AVXVNNI(k32_min, X86_K_FLOAT_MIN, 32, 8, X86_ZERO)
X86_STEPS_SIGNED_AVXVNNI(k32_i8, X86_K_NO_MIN, 32, 8, X86_OFFSET)
X86_STEPS_AVXVNNI(k16_min, X86_K_FLOAT_MIN, 16, 8, X86_ZERO)
X86_STEPS_AVXVNNI(k16, X86_K_NO_MIN, 16, 8, X86_OFFSET)
X86_STEPS_AVXVNNI(k32, X86_K_NO_MIN, 32, 8, X86_OFFSET)

/* --------------------------------------------------------------------------------- looping -- */

/* n_tile tiles of rows from r on times the tokens of x, which stands at the beginning of their
 * activations. */
MOE_AVX2 static void x86_gemm_rows_avx2(const moe_mm *mm, size_t r, size_t n_tile, x86_tokens *x,
                                        x86_acc *acc, const x86_format *f, x86_tiles_fn *step)
{
    const size_t n_block = X86_K / f->block_len; /* in a tile, but for a row's last one */
    const size_t stop = mm->n_in / f->block_len;
    const uint8_t *row[X86_TILES][8];
    x86_tile tile[X86_TILES];
    for (size_t i = 0; i < n_tile; i++)
        x86_rows(mm, r + 8 * i, row[i]);
    memset(acc, 0, x->n_tok * sizeof *acc);
    for (size_t b = 0; b < stop; b += n_block) {
        const size_t n = MOE_MIN(n_block, stop - b);
        x->n_block = f->block_len == X86_K ? n : n * f->block_len / 32;
        for (size_t i = 0; i < n_tile; i++)
            f->load(row[i], b * f->block_bytes, n, &tile[i]);
        step(tile, x, acc);
        x->q += X86_K;
        x->sum += X86_K / 16;
        x->scale += f->block_len == X86_K ? 1 : X86_K / 32;
        x->next += x->n_tok / 4 * x->next_bytes;
    }
}

/* What is fetched meanwhile are the rows that come next, in the order in which they lie in memory;
 * later tokens find them in the cache. */
MOE_AVX2 static void x86_gemm_tokens_avx2(const moe_mm *mm, size_t t0, size_t n_tok,
                                          const x86_format *f, x86_steps steps)
{
    const uint8_t *first = mm->x + t0 * mm->x_stride;
    const moe_act act = f->block_len == X86_K ? MOE_ACT_Q8_256 : MOE_ACT_Q8_32;
    const moe_q8 q8 = act_q8(act, first, mm->n_in);
    x86_acc acc[X86_MOST_TOKENS];
    x86_tokens x;
    x.stride = mm->x_stride;
    x.n_tok = n_tok;
    x.offset = f->offset;
    for (size_t r = 0; r < mm->n_row; r += 8 * X86_TILES) {
        const size_t n_row = MOE_MIN(mm->n_row - r, 8 * X86_TILES), n_tile = (n_row + 7) / 8;
        const size_t panel_bytes = 8 * n_tile * (X86_K / f->block_len) * f->block_bytes;
        x.q = q8.q;
        x.scale = q8.scale;
        x.sum = q8.sum;
        x.next = (uintptr_t)mm->w + (r + 8 * n_tile) * mm->w_stride;
        x.next_bytes = t0 ? 0 : (size_t)align_up(panel_bytes / (n_tok / 4), 64);
        x86_gemm_rows_avx2(mm, r, n_tile, &x, acc, f, steps[n_tile - 1]);
        float *y = mm->y + t0 * mm->y_stride + r;
        for (size_t t = 0; t < n_tok; t++, y += mm->y_stride)
            for (size_t i = 0; i < n_row; i += 8)
                x86_store_rows(y + i, acc[t][i / 8], n_row - i);
    }
}

/* Few tokens: one by one, on 8 rows at a time, which stay in the cache. */
static void x86_gemm_few(const moe_mm *mm, moe_mm_fn *gemv)
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

/* A format's gemm, with the steps of an instruction set. */
static void x86_gemm(const moe_mm *mm, const x86_format *f, x86_steps steps, moe_mm_fn *gemv)
{
    if (mm->n_tok < X86_TILE_TOKENS_MIN) {
        x86_gemm_few(mm, gemv);
        return;
    }
    const size_t part = x86_token_part(mm);
    for (size_t t = 0; t < mm->n_tok; t += part)
        x86_gemm_tokens_avx2(mm, t, MOE_MIN(mm->n_tok - t, part), f, steps);
}

/* The same for blocks of 32: up to `most` tokens by `few`. */
static void x86_gemm32(const moe_mm *mm, const x86_format *f, x86_steps steps, moe_mm_fn *few,
                       size_t most)
{
    if (mm->n_tok <= most)
        few(mm);
    else
        x86_gemm(mm, f, steps, few);
}

#endif
#endif
