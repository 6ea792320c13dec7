/* quant/x86_k.h - AVX2 and AVX-VNNI kernels for one and two tokens (decode, drafts, experts with
 * few tokens), shared by the formats with superblocks of 256 weights, and parts of their tiles for
 * many tokens (x86_tile.h).
 *
 * Superblocks are multiplied in the order in which they lie in memory, 8 at a time, past the ends
 * of rows: a thread reads its weights as one stream, and fetches what follows some kilobytes
 * later. What can be done for 8 at once is: unpacking scales, sums across lanes, minima, and the
 * numbers that they become. At last the numbers of a row are added in their order. A vector holds
 * 32 codes of one superblock; a format brings a function that unpacks 128 of them.
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_X86_K_H
#define MOE_QUANT_X86_K_H

#include "k.h"
#include "x86_tile.h"

#if MOE_X86

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

/* ------------------------------------------------------------------------------- few tokens -- */

enum {
    X86_K_FEWEST = 2,     /* tokens multiplied at once */
    X86_K_RUN = 64        /* superblocks of a row that are multiplied before those of the next */
};

/* What a token brings to a run of superblocks. */
typedef struct x86_k_token {
    const float *scale; // [run]
    const int16_t *sum; // [run][16]
    const int8_t *q;    // [run][256]
    /* Groups of 32: pair[p][i] are the sums of groups 2p and 2p + 1 of superblock i % run. */
    int32_t pair[4][X86_K_RUN + 7];
} x86_k_token;

typedef struct x86_k_tokens {
    x86_k_token tok[X86_K_FEWEST];
    uint32_t at[X86_K_RUN + 7]; // where activations of superblock i % run begin
} x86_k_tokens;

/* Unpacks weights 128 half .. 128 half + 127 of a superblock, 32 in each vector. */
typedef void x86_k_codes_fn(const uint8_t *block, size_t half, __m256i code[4]);

/* Groups of 16: all scales, and minima if there are any, as signed bytes. */
typedef void x86_k_scales_fn(const uint8_t *block, __m128i *scale, __m128i *min);

/* sum[t] += products of 128 codes, activations from `at` on of token t < n_tok (a constant), and
 * scales: 8 numbers whose sum is what is wanted. */
typedef void x86_k_half_fn(const __m256i code[4], __m256i scales, const x86_k_tokens *x, size_t at,
                           size_t n_tok, __m256i *sum);

/* 8 superblocks at w, the first of which is number b of its row's run, times the tokens. */
typedef void x86_k_dot8_fn(const uint8_t *w, const x86_k_tokens *x, size_t b, x86_k_sums *out);

/* Of a format with groups of 16. */
typedef struct x86_k_group16 {
    size_t block_bytes, d; // where d stands; dmin is behind it
    bool has_min;
    int offset;            // without minima: 1 << offset is subtracted from the codes
    bool in_place;         // codes come times 1, 4, 16, 16
} x86_k_group16;

/* Groups of 32; `scales`: their 4 as unsigned bytes, 8 times. */
MOE_AVX2_INLINE void x86_k_half32_avx2(const __m256i code[4], __m256i scales, const x86_k_tokens *x,
                                       size_t at, size_t n_tok, __m256i *sum)
{
    MOE_UNROLL
    for (size_t j = 0; j < 4; j++) {
        const __m256i scale =
            _mm256_shuffle_epi8(scales, _mm256_set1_epi16((int16_t)(INT16_MIN | (int)j)));
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            sum[t] = x86_k_madd(sum[t], code[j], x->tok[t].q + at + 32 * j, scale);
    }
}

/* Groups of 16; `scales`: as int16, twice that of groups 0, 2, 4, 6 | 1, 3, 5, 7. */
MOE_AVX2_INLINE void x86_k_half16_avx2(const __m256i code[4], __m256i scales, const x86_k_tokens *x,
                                       size_t at, size_t n_tok, __m256i *sum)
{
    const __m256i scale[4] = {
        _mm256_shuffle_epi32(scales, 0x00), _mm256_shuffle_epi32(scales, 0x55),
        _mm256_shuffle_epi32(scales, 0xaa), _mm256_shuffle_epi32(scales, 0xff)};
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        MOE_UNROLL
        for (size_t j = 0; j < 4; j++)
            sum[t] = x86_k_madd(sum[t], code[j], x->tok[t].q + at + 32 * j, scale[j]);
    }
}

/* The same with vpdpbusd and vpdpwssd. Sums of four products fit into 16 bits: what is added are
 * those of two vectors at once. */
MOE_AVX_VNNI_INLINE void x86_k_half_avxvnni(const __m256i code[4], const __m256i scale[2],
                                            const x86_k_tokens *x, size_t at, size_t n_tok,
                                            __m256i *sum)
{
    const __m256i zero = _mm256_setzero_si256();
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        MOE_UNROLL
        for (size_t j = 0; j < 2; j++) {
            const int8_t *q = x->tok[t].q + at + 64 * j;
            const __m256i a = _mm256_dpbusd_avx_epi32(zero, code[2 * j], x86_k_load(q));
            const __m256i b = _mm256_dpbusd_avx_epi32(zero, code[2 * j + 1], x86_k_load(q + 32));
            sum[t] = _mm256_dpwssd_avx_epi32(sum[t], _mm256_packs_epi32(a, b), scale[j]);
        }
    }
}

MOE_AVX_VNNI_INLINE void x86_k_half32_avxvnni(const __m256i code[4], __m256i scales,
                                              const x86_k_tokens *x, size_t at, size_t n_tok,
                                              __m256i *sum)
{
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1, -1));
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi16(2));
    const __m256i scale[2] = {_mm256_shuffle_epi8(scales, first),
                              _mm256_shuffle_epi8(scales, second)};
    x86_k_half_avxvnni(code, scale, x, at, n_tok, sum);
}

MOE_AVX_VNNI_INLINE void x86_k_half16_avxvnni(const __m256i code[4], __m256i scales,
                                              const x86_k_tokens *x, size_t at, size_t n_tok,
                                              __m256i *sum)
{
    const __m256i scale[2] = {_mm256_shuffle_epi32(scales, 0x50),
                              _mm256_shuffle_epi32(scales, 0xfa)};
    x86_k_half_avxvnni(code, scale, x, at, n_tok, sum);
}

/* -- 8 superblocks -- */

/* With each superblock as many bytes of what follows: those of 8 at once would occupy all that a
 * core has for lines on their way. */
MOE_AVX2_INLINE void x86_k_fetch(const uint8_t *block, size_t block_bytes)
{
    const uintptr_t at = (uintptr_t)block;
    x86_fetch_ahead((x86_ahead){at + X86_AHEAD_FIRST, at + X86_AHEAD_AGAIN}, 0, block_bytes);
}

MOE_INLINE void x86_k_blocks(const uint8_t *w, size_t block_bytes, const uint8_t *block[8])
{
    MOE_UNROLL
    for (size_t i = 0; i < 8; i++)
        block[i] = w + i * block_bytes;
}

/* Sum over the groups of minima times activations, for 8 superblocks from number b on. */
MOE_AVX2_INLINE __m256i x86_k_min_pairs(const x86_k_header *h, const x86_k_token *x, size_t b)
{
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi16(2));
    __m256i v = _mm256_madd_epi16(_mm256_shuffle_epi8(h->min[0], first),
                                  x86_k_load(x->pair[0] + b));
    v = _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_shuffle_epi8(h->min[0], second),
                                              x86_k_load(x->pair[1] + b)));
    v = _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_shuffle_epi8(h->min[1], first),
                                              x86_k_load(x->pair[2] + b)));
    return _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_shuffle_epi8(h->min[1], second),
                                                 x86_k_load(x->pair[3] + b)));
}

/* Q4_K and Q5_K. */
MOE_AVX2_INLINE void x86_k_dot8_32(const uint8_t *w, size_t block_bytes, x86_k_codes_fn *codes,
                                   const x86_k_tokens *x, size_t b, size_t n_tok,
                                   x86_k_half_fn *half, x86_k_sums *out)
{
    const uint8_t *block[8];
    x86_k_blocks(w, block_bytes, block);
    const x86_k_header h = x86_k_load_header(block, 0);
    int32_t scale[2][8]; // [half][superblock]
    __m256i dot[X86_K_FEWEST][8];
    _mm256_storeu_si256((__m256i *)scale[0], h.scale[0]);
    _mm256_storeu_si256((__m256i *)scale[1], h.scale[1]);
    for (size_t i = 0; i < 8; i++, w += block_bytes) {
        __m256i sum[X86_K_FEWEST], code[4];
        x86_k_fetch(w, block_bytes);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            sum[t] = _mm256_setzero_si256();
        MOE_UNROLL
        for (size_t k = 0; k < 2; k++) {
            codes(w, k, code);
            half(code, x86_broadcast4(&scale[k][i]), x, x->at[b + i] + 128 * k, n_tok, sum);
        }
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            dot[t][i] = sum[t];
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        out[t] = (x86_k_sums){x86_sum8_i32(dot[t]), x86_k_min_pairs(&h, &x->tok[t], b), h.d,
                              h.dmin};
}

/* 16 signed scales for x86_k_half16_avx2(), of both halves; times 16, 4, 1, 1 if codes are left in
 * place. */
MOE_AVX2_INLINE void x86_k_spread16(__m128i scales, bool in_place, __m256i out[2])
{
    const __m256i v = x86_k_twice(scales), eight = _mm256_set1_epi16(0x0800);
    const __m256i at = _mm256_setr_epi8(-1, 0, -1, 0, -1, 2, -1, 2, -1, 4, -1, 4, -1, 6, -1, 6,
                                        -1, 1, -1, 1, -1, 3, -1, 3, -1, 5, -1, 5, -1, 7, -1, 7);
    const __m256i factor = _mm256_broadcastsi128_si256(
        _mm_setr_epi16(4096, 4096, 1024, 1024, 256, 256, 256, 256));
    out[0] = _mm256_shuffle_epi8(v, at);
    out[1] = _mm256_shuffle_epi8(v, _mm256_add_epi8(at, eight));
    MOE_UNROLL
    for (size_t k = 0; k < 2; k++)
        out[k] = in_place ? _mm256_mulhi_epi16(out[k], factor) : _mm256_srai_epi16(out[k], 8);
}

/* One superblock with groups of 16. Without minima, sum[t] begins with what the offset of the codes
 * takes away; else min[t] has 8 numbers whose sum is that of minima times activations. */
MOE_AVX2_INLINE void x86_k_block16(const uint8_t *w, const x86_k_group16 *f, x86_k_codes_fn *codes,
                                   x86_k_scales_fn *scales, const x86_k_tokens *x, size_t at,
                                   size_t n_tok, x86_k_half_fn *half, __m256i *sum, __m256i *min)
{
    __m128i scale, low;
    __m256i code[4], spread[2];
    scales(w, &scale, &low);
    x86_k_spread16(scale, f->in_place, spread);
    const __m256i wide = _mm256_cvtepi8_epi16(f->has_min ? low : scale);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        sum[t] = _mm256_setzero_si256();
        min[t] = _mm256_madd_epi16(wide, x86_k_load(x->tok[t].sum + at / 16));
        if (!f->has_min)
            sum[t] = _mm256_slli_epi32(_mm256_sub_epi32(sum[t], min[t]),
                                       f->offset + (f->in_place ? 4 : 0));
    }
    MOE_UNROLL
    for (size_t k = 0; k < 2; k++) {
        codes(w, k, code);
        half(code, spread[k], x, at + 128 * k, n_tok, sum);
    }
}

/* Q2_K, Q3_K and Q6_K. */
MOE_AVX2_INLINE void x86_k_dot8_16(const uint8_t *w, const x86_k_group16 *f, x86_k_codes_fn *codes,
                                   x86_k_scales_fn *scales, const x86_k_tokens *x, size_t b,
                                   size_t n_tok, x86_k_half_fn *half, x86_k_sums *out)
{
    const uint8_t *block[8];
    __m256i dot[X86_K_FEWEST][8], min[X86_K_FEWEST][8];
    x86_k_blocks(w, f->block_bytes, block);
    for (size_t i = 0; i < 8; i++, w += f->block_bytes) {
        __m256i sum[X86_K_FEWEST], low[X86_K_FEWEST];
        x86_k_fetch(w, f->block_bytes);
        x86_k_block16(w, f, codes, scales, x, x->at[b + i], n_tok, half, sum, low);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++) {
            dot[t][i] = sum[t];
            if (f->has_min)
                min[t][i] = low[t];
        }
    }
    const __m256 d = x86_f16x8(block, f->d);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        out[t].d = d;
        out[t].dot = _mm256_srai_epi32(x86_sum8_i32(dot[t]), f->in_place ? 4 : 0);
        if (f->has_min) {
            out[t].dmin = x86_f16x8(block, f->d + 2);
            out[t].min = x86_sum8_i32(min[t]);
        }
    }
}

/* -- rows -- */

/* What superblocks add to their rows: fma(x_scale, term, acc) with minima, else
 * fma(x_scale d, term, acc). */
typedef struct x86_k_parts {
    float d[8 * X86_K_RUN], term[8 * X86_K_RUN];
} x86_k_parts;

MOE_AVX2_INLINE void x86_k_keep(const x86_k_sums *s, x86_kind kind, x86_k_parts *to, size_t i)
{
    __m256 term = _mm256_cvtepi32_ps(s->dot);
    if (kind == X86_K_FLOAT_MIN)
        term = _mm256_fnmadd_ps(s->dmin, _mm256_cvtepi32_ps(s->min), _mm256_mul_ps(s->d, term));
    else
        _mm256_storeu_ps(to->d + i, s->d);
    _mm256_storeu_ps(to->term + i, term);
}

/* acc[r] += the parts of row r < n_row, n of each. All rows are added side by side; in the place of
 * those that are not there, the last. */
MOE_AVX2_INLINE void x86_k_join(const x86_k_parts *from, const float *x_scale, size_t n,
                                size_t n_row, x86_kind kind, float acc[8])
{
    float sum[8];
    size_t row[8];
    MOE_UNROLL
    for (size_t r = 0; r < 8; r++) {
        row[r] = MOE_MIN(r, n_row - 1) * n;
        sum[r] = acc[r];
    }
    for (size_t b = 0; b < n; b++) {
        MOE_UNROLL
        for (size_t r = 0; r < 8; r++) {
            const size_t i = row[r] + b;
            const float scale = kind == X86_K_FLOAT_MIN ? x_scale[b] : x_scale[b] * from->d[i];
            sum[r] = (fmaf)(scale, from->term[i], sum[r]); /* the instruction, not a macro */
        }
    }
    memcpy(acc, sum, sizeof sum);
}

/* n superblocks of each of some rows. */
typedef struct x86_k_run {
    const uint8_t *row[8];
    size_t n, n_row;
    bool joined;             // the rows follow one another
    uint8_t copy[8 * K_LEN]; // of 8 superblocks that do not
} x86_k_run;

/* Superblock b of row r and the 7 that follow it, one behind the other. The last of all is followed
 * by itself. */
MOE_UNUSED static const uint8_t *x86_k_copy(x86_k_run *run, size_t r, size_t b, size_t block_bytes)
{
    for (size_t i = 0; i < 8; i++) {
        memcpy(run->copy + i * block_bytes, run->row[r] + b * block_bytes, block_bytes);
        if (b + 1 < run->n)
            b++;
        else if (r + 1 < run->n_row)
            b = 0, r++;
    }
    return run->copy;
}

/* The same, copied only if need be. */
MOE_AVX2_INLINE const uint8_t *x86_k_eight(x86_k_run *run, size_t r, size_t b, size_t block_bytes)
{
    const size_t end = run->joined ? (run->n_row - r) * run->n : run->n;
    return MOE_LIKELY(b + 8 <= end) ? run->row[r] + b * block_bytes
                                    : x86_k_copy(run, r, b, block_bytes);
}

/* acc[t][r] += a run of superblocks of some rows. */
MOE_AVX2_INLINE void x86_k_rows(x86_k_run *run, const x86_k_tokens *x, size_t n_tok,
                                size_t block_bytes, x86_kind kind, x86_k_dot8_fn *dot8,
                                float acc[][8])
{
    x86_k_parts part[X86_K_FEWEST];
    size_t r = 0, b = 0;
    for (size_t i = 0; i < run->n_row * run->n; i += 8) {
        x86_k_sums s[X86_K_FEWEST];
        dot8(x86_k_eight(run, r, b, block_bytes), x, b, s);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            x86_k_keep(&s[t], kind, &part[t], i);
        for (b += 8; b >= run->n; b -= run->n)
            r++;
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        x86_k_join(&part[t], x->tok[t].scale, run->n, run->n_row, kind, acc[t]);
}

/* Brings the activations of a superblock, and what a format wants with them, into its own order: at
 * most X86_K_ORDERED bytes. NULL: as they are. */
typedef void x86_k_order_fn(const int8_t *q, int8_t *out);

enum { X86_K_ORDERED = 320 };

/* The activations of superblocks b .. b + n - 1 of a row. */
MOE_AVX2_INLINE void x86_k_meet(const moe_mm *mm, size_t b, size_t n, size_t n_tok,
                                x86_k_order_fn *order, int8_t ordered[][X86_K_RUN * X86_K_ORDERED],
                                x86_k_tokens *x)
{
    for (size_t i = 0; i < n + 7; i++)
        x->at[i] = (uint32_t)(i % n * K_LEN);
    for (size_t t = 0; t < n_tok; t++) {
        const uint8_t *from = mm->x + t * mm->x_stride;
        const moe_q8 q8 = act_q8(MOE_ACT_Q8_256, from, mm->n_in);
        x86_k_token *to = &x->tok[t];
        to->scale = q8.scale + b;
        to->sum = q8.sum + K_LEN / 16 * b;
        to->q = q8.q + K_LEN * b;
        for (size_t i = 0; i < n && order; i++)
            order(q8.q + K_LEN * (b + i), ordered[t] + X86_K_ORDERED * i);
        if (order)
            to->q = ordered[t];
        for (size_t i = 0; i < n + 7; i++) {
            const __m128i *sum = (const __m128i *)(to->sum + x->at[i] / 16);
            int32_t four[4];
            _mm_storeu_si128((__m128i *)four,
                             _mm_hadd_epi16(_mm_load_si128(sum), _mm_load_si128(sum + 1)));
            for (size_t p = 0; p < 4; p++)
                to->pair[p][i] = four[p];
        }
    }
}

MOE_AVX2_INLINE void x86_k_few_tokens(const moe_mm *mm, size_t block_bytes, x86_kind kind,
                                      x86_k_order_fn *order, x86_k_dot8_fn *dot8, size_t n_tok)
{
    const size_t n_block = mm->n_in / K_LEN;
    int8_t ordered[X86_K_FEWEST][X86_K_RUN * X86_K_ORDERED];
    x86_k_tokens x;
    x86_k_run run;
    for (size_t b = 0; b < n_block; b += run.n) {
        run.n = MOE_MIN(n_block - b, (size_t)X86_K_RUN);
        run.joined = mm->w_stride == run.n * block_bytes;
        x86_k_meet(mm, b, run.n, n_tok, order, ordered, &x);
        for (size_t r = 0; r < mm->n_row; r += 8) {
            run.n_row = MOE_MIN(mm->n_row - r, (size_t)8);
            for (size_t i = 0; i < run.n_row; i++)
                run.row[i] = mm->w + (r + i) * mm->w_stride + b * block_bytes;
            float acc[X86_K_FEWEST][8] = {{0}};
            for (size_t t = 0; b && t < n_tok; t++)
                memcpy(acc[t], mm->y + t * mm->y_stride + r, run.n_row * sizeof(float));
            x86_k_rows(&run, &x, n_tok, block_bytes, kind, dot8, acc);
            for (size_t t = 0; t < n_tok; t++)
                memcpy(mm->y + t * mm->y_stride + r, acc[t], run.n_row * sizeof(float));
        }
    }
}

/* A format's kernels for one token and for two, with the products of an instruction set. What is
 * inlined through pointers stands in functions of its own: gcc's -Og does not inline what comes
 * through a pointer that came through another. */
#define X86_K_GEMV_OF(type, isa, target, kind, half, number, n_tok)                                \
    target static void type##_dot8_##number##_##isa(const uint8_t *w, const x86_k_tokens *x,       \
                                                    size_t b, x86_k_sums *out)                     \
    {                                                                                              \
        type##_dot8_avx2(w, x, b, n_tok, half, out);                                               \
    }                                                                                              \
    target static void type##_gemv##number##_##isa(const moe_mm *mm)                               \
    {                                                                                              \
        x86_k_few_tokens(mm, sizeof(type##_block), kind, NULL, type##_dot8_##number##_##isa,       \
                         n_tok);                                                                   \
    }
#define X86_K_GEMV(type, isa, target, kind, half)                                                  \
    X86_K_GEMV_OF(type, isa, target, kind, half, , 1)                                              \
    X86_K_GEMV_OF(type, isa, target, kind, half, 2, 2)

/* ------------------------------------------------------------------------------ many tokens -- */

/* Few tokens: two at a time, on 16 rows, which stay in the cache. */
MOE_UNUSED static void x86_k_gemm(const moe_mm *mm, const x86_format *f, x86_steps steps,
                                  moe_mm_fn *gemv, moe_mm_fn *gemv2)
{
    if (mm->n_tok >= X86_TILE_TOKENS_MIN) {
        x86_gemm(mm, f, steps, gemv);
        return;
    }
    for (size_t r = 0; r < mm->n_row; r += 16)
        for (size_t t = 0; t < mm->n_tok; t += 2) {
            moe_mm part = *mm;
            part.w += r * mm->w_stride;
            part.x += t * mm->x_stride;
            part.y += t * mm->y_stride + r;
            part.n_row = MOE_MIN(mm->n_row - r, (size_t)16);
            part.n_tok = MOE_MIN(mm->n_tok - t, (size_t)2);
            (part.n_tok == 2 ? gemv2 : gemv)(&part);
        }
}

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
