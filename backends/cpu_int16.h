/* backends/cpu_int16.h - attention over rows of 16-bit integers, which is how latents are kept: one
 * row per position is key and value of all heads, so the products are what attention takes, and an
 * instruction multiplies twice as many pairs of 16 bits as of floats.
 *
 * A row is x = scale * code. Its codes are as large as lets any product of two rows fit into 32
 * bits: by Cauchy and Schwarz |sum a b| <= |a| |b|, so rows have a norm of at most 2^15.5, whatever
 * their length. An element is off by 1.5e-4 of the root mean square of its row, of 576 elements,
 * where F16 is by 2.1e-4. The weights of a softmax become integers in the same way, per I16_BLOCK
 * positions, by the sum of their magnitudes.
 *
 * So sums are exact, and no order of them, no tile and no instruction set can change a bit. Each
 * kernel stands first in C, which specifies what happens around the sums. */
#ifndef MOE_BACKENDS_CPU_INT16_H
#define MOE_BACKENDS_CPU_INT16_H

#include "cpu_simd.h"

#include <float.h>

enum {
    I16_GROUP = 32, /* rows are padded with zeros to a multiple of it */
    I16_BLOCK = 64, /* positions whose weights share a step */
    I16_ROWS = 4    /* lists of rows are padded to a multiple of it */
};

/* Rows of n <= 2^16 elements: rounding adds at most sqrt(n) / 2 = 128 to the norm, and
 * (I16_NORM + 128)^2 < 2^31. */
#define I16_NORM 46200.0f
#define I16_MOST 32766.0f
/* Of a block's weights: with the rounding, (I16_WEIGHTS + I16_BLOCK / 2) * 32767 < 2^31. */
#define I16_WEIGHTS 65500.0f

/* c[i][j] = sum over k of q[i][k] * k[j][k], * k_scale[j], * q_scale[i]: rounded to float after the
 * sum, and after each multiplication. c has room for whole tiles of I16_ROWS columns. */
typedef struct i16_scores {
    float *c;                 // [n_query][c_stride]
    const int16_t *q;         // [n_query][n_dim]
    const float *q_scale;     // [n_query]
    const int16_t *const *k;  // [n_key, padded]: where rows of n_dim codes are
    const float *k_scale;     // [n_key, padded]
    size_t c_stride, n_query, n_key;
    size_t n_dim;             // a multiple of I16_GROUP
    uintptr_t next;           // memory that will be read soon, fetched bit by bit meanwhile
    size_t next_bytes;
} i16_scores;

/* c[i][x] = fmaf(sum over t of w[i][t] * v[t][x], step[i], c[i][x]) for x < n_col. */
typedef struct i16_values {
    float *c;                 // [n_query][c_stride]
    const int16_t *w;         // [n_query][I16_BLOCK]: 0 from n_row on
    const float *step;        // [n_query]
    const int16_t *const *v;  // [n_row, padded]: rows with n_col, padded to I16_GROUP, codes
    size_t c_stride, n_query;
    size_t n_row;             // at most I16_BLOCK
    size_t n_col;
    uintptr_t next;
    size_t next_bytes;
} i16_values;

typedef struct cpu_int16 {
    /* Codes of n elements and zeros up to the next multiple of I16_GROUP; returns the scale: 0 if
     * the row is (nearly) 0, NaN if it has an element that is no number, or is too large. */
    float (*quantize)(int16_t *dst, const float *src, size_t n);
    /* dst = scale * src */
    void (*dequantize)(float *dst, const int16_t *src, float scale, size_t n);
    /* w[i] = p[i] * scale[i] in steps of what is returned, for n <= I16_BLOCK, the rest 0. p >= 0,
     * or NaN: then the step is NaN. */
    float (*weights)(int16_t w[I16_BLOCK], const float *p, const float *scale, size_t n);
    void (*scores)(const i16_scores *s);
    void (*values)(const i16_values *v);
} cpu_int16;

/* ------------------------------------------------------------------------------------- C -- */

/* From a row's sum of squares and largest magnitude to its scale; false: all codes are 0. */
MOE_INLINE bool i16_row_scale(float squares, float most, float *factor, float *scale)
{
    const float norm = sqrtf(squares);
    *factor = 0;
    *scale = norm <= FLT_MAX ? 0 : NAN;
    if (!(norm <= FLT_MAX) || norm < 0x1p-60f)
        return false;
    const float by_norm = I16_NORM / norm, by_most = I16_MOST / most;
    *factor = by_norm < by_most ? by_norm : by_most;
    *scale = 1.0f / *factor;
    return true;
}

/* From the sum of a block's weights and the largest to their step; false: all codes are 0. What is
 * too little to divide by is less than 2^-110 of a value. */
MOE_INLINE bool i16_weight_step(float sum, float most, float *factor, float *step)
{
    *factor = 0;
    *step = sum <= FLT_MAX ? 0 : NAN;
    if (!(sum <= FLT_MAX) || sum < 0x1p-110f)
        return false;
    const float by_sum = I16_WEIGHTS / sum, by_most = I16_MOST / most;
    *factor = by_sum < by_most ? by_sum : by_most;
    *step = 1.0f / *factor;
    return true;
}

static float i16_quantize_c(int16_t *dst, const float *src, size_t n)
{
    float lane[8] = {0}, most = 0, factor, scale;
    for (size_t i = 0; i < n; i++) {
        lane[i % 8] = fmaf(src[i], src[i], lane[i % 8]);
        most = fabsf(src[i]) > most ? fabsf(src[i]) : most;
    }
    const bool any = i16_row_scale(reduce8(lane), most, &factor, &scale);
    for (size_t i = 0; i < n; i++)
        dst[i] = any ? (int16_t)lrintf(src[i] * factor) : 0;
    memset(dst + n, 0, (align_up(n, I16_GROUP) - n) * sizeof *dst);
    return scale;
}

static void i16_dequantize_c(float *dst, const int16_t *src, float scale, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = scale * (float)src[i];
}

static float i16_weights_c(int16_t *w, const float *p, const float *scale, size_t n)
{
    float lane[8] = {0}, most = 0, factor, step;
    for (size_t i = 0; i < n; i++) {
        const float u = p[i] * scale[i];
        lane[i % 8] += u;
        most = u > most ? u : most;
    }
    const bool any = i16_weight_step(reduce8(lane), most, &factor, &step);
    for (size_t i = 0; i < I16_BLOCK; i++)
        w[i] = any && i < n ? (int16_t)lrintf(p[i] * scale[i] * factor) : 0;
    return step;
}

static void i16_scores_c(const i16_scores *s)
{
    for (size_t i = 0; i < s->n_query; i++)
        for (size_t j = 0; j < s->n_key; j++) {
            int32_t sum = 0;
            for (size_t k = 0; k < s->n_dim; k++)
                sum += (int32_t)s->q[i * s->n_dim + k] * s->k[j][k];
            s->c[i * s->c_stride + j] = (float)sum * s->k_scale[j] * s->q_scale[i];
        }
}

static void i16_values_c(const i16_values *v)
{
    for (size_t i = 0; i < v->n_query; i++)
        for (size_t x = 0; x < v->n_col; x++) {
            int32_t sum = 0;
            for (size_t t = 0; t < v->n_row; t++)
                sum += (int32_t)v->w[i * I16_BLOCK + t] * v->v[t][x];
            float *c = v->c + i * v->c_stride + x;
            *c = fmaf((float)sum, v->step[i], *c);
        }
}

static const cpu_int16 cpu_int16_c = {i16_quantize_c, i16_dequantize_c, i16_weights_c, i16_scores_c,
                                      i16_values_c};

/* A tile: queries [query, query + n) and a few keys, or columns, from `at` on. With each step of
 * its sums it fetches a bit of what comes next: many fetches at once would get lost. */
typedef struct i16_tile {
    size_t query, n, at;
    uintptr_t next;
    size_t next_bytes; // per step
} i16_tile;

MOE_INLINE void i16_fetch(i16_tile *t)
{
#ifdef __GNUC__
    __builtin_prefetch((const void *)t->next, 0, 2);
#endif
    t->next += t->next_bytes;
}

/* As many queries as a tile has: a power of 2. */
MOE_INLINE size_t i16_count(size_t left, size_t most)
{
    while (most > left)
        most /= 2;
    return most;
}

/* Queries that are multiplied with the same keys while both stay in L1. */
enum { I16_QUERIES = 16 };

/* In front of the first tile of I16_ROWS keys and `most` queries or fewer. */
MOE_INLINE i16_tile i16_scores_start(const i16_scores *s, size_t most)
{
    const size_t n_tile = (s->n_query + most - 1) / most * ((s->n_key + I16_ROWS - 1) / I16_ROWS);
    const size_t n_step = n_tile * (s->n_dim / I16_GROUP);
    return (i16_tile){.next = s->next, .next_bytes = (s->next_bytes + n_step - 1) / n_step};
}

/* From tile to tile; false: there are no more. */
MOE_INLINE bool i16_scores_next(const i16_scores *s, size_t most, i16_tile *t)
{
    const size_t from = t->query / I16_QUERIES * I16_QUERIES;
    const size_t end = MOE_MIN(from + I16_QUERIES, s->n_query);
    t->query += t->n;
    if (t->query == end) {
        t->at += I16_ROWS;
        t->query = t->at < s->n_key ? from : end;
        t->at = t->at < s->n_key ? t->at : 0;
    }
    const size_t group_end = t->query / I16_QUERIES * I16_QUERIES + I16_QUERIES;
    t->n = i16_count(MOE_MIN(group_end, s->n_query) - t->query, most);
    return t->query < s->n_query;
}

/* The same for tiles of `width` columns. */
MOE_INLINE i16_tile i16_values_start(const i16_values *v, size_t most, size_t width)
{
    const size_t n_tile = (v->n_query + most - 1) / most * ((v->n_col + width - 1) / width);
    const size_t n_step = n_tile * ((v->n_row + 1) / 2);
    return (i16_tile){.next = v->next, .next_bytes = (v->next_bytes + n_step - 1) / n_step};
}

MOE_INLINE bool i16_values_next(const i16_values *v, size_t most, size_t width, i16_tile *t)
{
    t->query += t->n;
    if (t->query == v->n_query) {
        t->query = 0;
        t->at += width;
    }
    t->n = i16_count(v->n_query - t->query, most);
    return t->at < v->n_col;
}

/* ---------------------------------------------------------------------------------- AVX2 -- */

#if MOE_X86
#define AVX2 MOE_TARGET("avx2,fma,f16c")

/* The first n floats of 8, the rest 0. */
AVX2 MOE_INLINE __m256 i16_load8_avx2(const float *x, size_t n)
{
    return n >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, tail_mask_avx2(n));
}

AVX2 MOE_INLINE float i16_most_avx2(__m256 v)
{
    float lane[8];
    _mm256_storeu_ps(lane, v);
    return max_c(lane, 8);
}

/* 16 products, rounded, as codes in their order. */
AVX2 MOE_INLINE __m256i i16_codes_avx2(__m256 low, __m256 high, float factor)
{
    const __m256 f = _mm256_set1_ps(factor);
    const __m256i codes = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(low, f)),
                                             _mm256_cvtps_epi32(_mm256_mul_ps(high, f)));
    return _mm256_permute4x64_epi64(codes, 0xd8);
}

AVX2 static float i16_quantize_avx2(int16_t *dst, const float *src, size_t n)
{
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 8)
        most = _mm256_max_ps(_mm256_and_ps(i16_load8_avx2(src + i, n - i), magnitude), most);
    float factor, scale;
    if (!i16_row_scale(sum_squares_avx2(src, n), i16_most_avx2(most), &factor, &scale)) {
        memset(dst, 0, align_up(n, I16_GROUP) * sizeof *dst);
        return scale;
    }
    for (size_t i = 0; i < align_up(n, I16_GROUP); i += 16) {
        const __m256 low = i < n ? i16_load8_avx2(src + i, n - i) : _mm256_setzero_ps();
        const __m256 high = i + 8 < n ? i16_load8_avx2(src + i + 8, n - i - 8)
                                      : _mm256_setzero_ps();
        _mm256_storeu_si256((__m256i *)(void *)(dst + i), i16_codes_avx2(low, high, factor));
    }
    return scale;
}

AVX2 static void i16_dequantize_avx2(float *dst, const int16_t *src, float scale, size_t n)
{
    const __m256 f = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(src + i));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(codes)),
                                                f));
    }
    i16_dequantize_c(dst + i, src + i, scale, n - i);
}

AVX2 static float i16_weights_avx2(int16_t *w, const float *p, const float *scale, size_t n)
{
    __m256 u[I16_BLOCK / 8], sum = _mm256_setzero_ps(), most = sum;
    MOE_UNROLL
    for (size_t i = 0; i < I16_BLOCK / 8; i++) {
        u[i] = _mm256_setzero_ps();
        if (8 * i < n)
            u[i] = _mm256_mul_ps(i16_load8_avx2(p + 8 * i, n - 8 * i),
                                 i16_load8_avx2(scale + 8 * i, n - 8 * i));
        sum = _mm256_add_ps(sum, u[i]);
        most = _mm256_max_ps(u[i], most);
    }
    float factor, step;
    if (!i16_weight_step(reduce8_avx2(sum), i16_most_avx2(most), &factor, &step)) {
        memset(w, 0, I16_BLOCK * sizeof *w);
        return step;
    }
    MOE_UNROLL
    for (size_t i = 0; i < I16_BLOCK / 16; i++)
        _mm256_storeu_si256((__m256i *)(void *)(w + 16 * i),
                            i16_codes_avx2(u[2 * i], u[2 * i + 1], factor));
    return step;
}

AVX2 MOE_INLINE __m256i i16_load_avx2(const int16_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* c += products of pairs. The sum stays in its register, which gcc 12 else copies. */
AVX2 MOE_INLINE void i16_dot_avx2(__m256i *c, __m256i a, __m256i b)
{
    *c = _mm256_add_epi32(*c, _mm256_madd_epi16(a, b));
    __asm__("" : MOE_X86_REGISTER(*c));
}

AVX2 MOE_INLINE void i16_scores_tile_avx2(const i16_scores *s, i16_tile *t, size_t n)
{
    const size_t i = t->query, j = t->at;
    __m256i c[2][I16_ROWS];
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        MOE_UNROLL
        for (size_t b = 0; b < I16_ROWS; b++)
            c[a][b] = _mm256_setzero_si256();
    const int16_t *q = s->q + i * s->n_dim;
    const int16_t *const key[I16_ROWS] = {s->k[j], s->k[j + 1], s->k[j + 2], s->k[j + 3]};
    for (size_t k = 0; k < s->n_dim; k += I16_GROUP) {
        i16_fetch(t);
        MOE_UNROLL
        for (size_t h = k; h < k + I16_GROUP; h += 16) {
            __m256i x[2];
            MOE_UNROLL
            for (size_t a = 0; a < n; a++)
                x[a] = i16_load_avx2(q + a * s->n_dim + h);
            MOE_UNROLL
            for (size_t b = 0; b < I16_ROWS; b++) {
                const __m256i y = i16_load_avx2(key[b] + h);
                MOE_UNROLL
                for (size_t a = 0; a < n; a++)
                    i16_dot_avx2(&c[a][b], x[a], y);
            }
        }
    }
    const __m128 scale = _mm_loadu_ps(s->k_scale + j);
    MOE_UNROLL
    for (size_t a = 0; a < n; a++) {
        const __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(c[a][0], c[a][1]),
                                            _mm256_hadd_epi32(c[a][2], c[a][3]));
        const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v),
                                          _mm256_extracti128_si256(v, 1));
        const __m128 score = _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(sum), scale),
                                        _mm_set1_ps(s->q_scale[i + a]));
        _mm_storeu_ps(s->c + (i + a) * s->c_stride + j, score);
    }
}

AVX2 static void i16_scores_avx2(const i16_scores *s)
{
    i16_tile t = i16_scores_start(s, 2);
    while (i16_scores_next(s, 2, &t))
        switch (t.n) {
        case 1: i16_scores_tile_avx2(s, &t, 1); break;
        default: i16_scores_tile_avx2(s, &t, 2);
        }
}

/* Adds the sums of 16 columns, in halves as they are unpacked. */
AVX2 MOE_INLINE void i16_add_avx2(float *c, __m256i low, __m256i high, __m256 step, size_t n)
{
    const __m256 sum[2] = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x20)),
                           _mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x31))};
    MOE_UNROLL
    for (size_t h = 0; h < 2; h++, c += 8, n -= MOE_MIN(n, 8)) {
        if (n >= 8) {
            _mm256_storeu_ps(c, _mm256_fmadd_ps(sum[h], step, _mm256_loadu_ps(c)));
        } else if (n) {
            const __m256i mask = tail_mask_avx2(n);
            _mm256_maskstore_ps(c, mask, _mm256_fmadd_ps(sum[h], step,
                                                         _mm256_maskload_ps(c, mask)));
        }
    }
}

/* The weights of two positions, in each lane. */
MOE_INLINE int32_t i16_pair(const int16_t *w)
{
    int32_t pair;
    memcpy(&pair, w, sizeof pair);
    return pair;
}

AVX2 MOE_INLINE void i16_values_tile_avx2(const i16_values *v, i16_tile *t, size_t n)
{
    const size_t i = t->query, x = t->at;
    __m256i c[4][2];
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        c[a][0] = c[a][1] = _mm256_setzero_si256();
    const int16_t *w = v->w + i * I16_BLOCK;
    for (size_t r = 0; r < v->n_row; r += 2) {
        i16_fetch(t);
        const __m256i even = i16_load_avx2(v->v[r] + x), odd = i16_load_avx2(v->v[r + 1] + x);
        const __m256i low = _mm256_unpacklo_epi16(even, odd);
        const __m256i high = _mm256_unpackhi_epi16(even, odd);
        MOE_UNROLL
        for (size_t a = 0; a < n; a++) {
            const __m256i pair = _mm256_set1_epi32(i16_pair(w + a * I16_BLOCK + r));
            i16_dot_avx2(&c[a][0], low, pair);
            i16_dot_avx2(&c[a][1], high, pair);
        }
    }
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        i16_add_avx2(v->c + (i + a) * v->c_stride + x, c[a][0], c[a][1],
                     _mm256_set1_ps(v->step[i + a]), v->n_col - x);
}

AVX2 static void i16_values_avx2(const i16_values *v)
{
    i16_tile t = i16_values_start(v, 4, 16);
    while (i16_values_next(v, 4, 16, &t))
        switch (t.n) {
        case 1: i16_values_tile_avx2(v, &t, 1); break;
        case 2: i16_values_tile_avx2(v, &t, 2); break;
        default: i16_values_tile_avx2(v, &t, 4);
        }
}

static const cpu_int16 cpu_int16_avx2 = {i16_quantize_avx2, i16_dequantize_avx2, i16_weights_avx2,
                                         i16_scores_avx2, i16_values_avx2};
#undef AVX2

/* -------------------------------------------------------------------------- AVX-512 VNNI -- */

#define VNNI512 MOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

VNNI512 MOE_INLINE __m512i i16_load_vnni512(const int16_t *p)
{
    return _mm512_loadu_si512((const void *)p);
}

/* c += products of pairs. The sum stays in its register, which gcc 12 else copies. */
VNNI512 MOE_INLINE void i16_dot_vnni512(__m512i *c, __m512i a, __m512i b)
{
    *c = _mm512_dpwssd_epi32(*c, a, b);
    __asm__("" : MOE_X86_REGISTER(*c));
}

/* Within each quarter of a vector, the sums of four vectors' elements. */
VNNI512 MOE_INLINE __m512i i16_sum4_vnni512(const __m512i c[I16_ROWS])
{
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(c[0], c[1]),
                                       _mm512_unpackhi_epi32(c[0], c[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(c[2], c[3]),
                                       _mm512_unpackhi_epi32(c[2], c[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

VNNI512 MOE_INLINE void i16_scores_tile_vnni512(const i16_scores *s, i16_tile *t, size_t n)
{
    const size_t i = t->query, j = t->at;
    __m512i c[4][I16_ROWS], sum[4];
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        MOE_UNROLL
        for (size_t b = 0; b < I16_ROWS; b++)
            c[a][b] = _mm512_setzero_si512();
    for (size_t k = 0; k < s->n_dim; k += 32) {
        i16_fetch(t);
        __m512i key[I16_ROWS];
        MOE_UNROLL
        for (size_t b = 0; b < I16_ROWS; b++)
            key[b] = i16_load_vnni512(s->k[j + b] + k);
        MOE_UNROLL
        for (size_t a = 0; a < n; a++) {
            const __m512i q = i16_load_vnni512(s->q + (i + a) * s->n_dim + k);
            MOE_UNROLL
            for (size_t b = 0; b < I16_ROWS; b++)
                i16_dot_vnni512(&c[a][b], q, key[b]);
        }
    }
    /* Quarter a of the result is query a. */
    MOE_UNROLL
    for (size_t a = 0; a < 4; a++)
        sum[a] = a < n ? i16_sum4_vnni512(c[a]) : sum[0];
    const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(sum[0], sum[1], 0x44),
                                         _mm512_shuffle_i32x4(sum[0], sum[1], 0xee));
    const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(sum[2], sum[3], 0x44),
                                          _mm512_shuffle_i32x4(sum[2], sum[3], 0xee));
    const __m512i all = _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88),
                                         _mm512_shuffle_i32x4(low, high, 0xdd));
    const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(all),
                                       _mm512_broadcast_f32x4(_mm_loadu_ps(s->k_scale + j)));
    const __m128 quarter[4] = {_mm512_castps512_ps128(score), _mm512_extractf32x4_ps(score, 1),
                               _mm512_extractf32x4_ps(score, 2), _mm512_extractf32x4_ps(score, 3)};
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        _mm_storeu_ps(s->c + (i + a) * s->c_stride + j,
                      _mm_mul_ps(quarter[a], _mm_set1_ps(s->q_scale[i + a])));
}

VNNI512 static void i16_scores_vnni512(const i16_scores *s)
{
    i16_tile t = i16_scores_start(s, 4);
    while (i16_scores_next(s, 4, &t))
        switch (t.n) {
        case 1: i16_scores_tile_vnni512(s, &t, 1); break;
        case 2: i16_scores_tile_vnni512(s, &t, 2); break;
        default: i16_scores_tile_vnni512(s, &t, 4);
        }
}

VNNI512 MOE_INLINE void i16_values_tile_vnni512(const i16_values *v, i16_tile *t, size_t n)
{
    const size_t i = t->query, x = t->at;
    __m512i c[8][2];
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        c[a][0] = c[a][1] = _mm512_setzero_si512();
    const int16_t *w = v->w + i * I16_BLOCK;
    for (size_t r = 0; r < v->n_row; r += 2) {
        i16_fetch(t);
        const __m512i even = i16_load_vnni512(v->v[r] + x), odd = i16_load_vnni512(v->v[r + 1] + x);
        const __m512i low = _mm512_unpacklo_epi16(even, odd);
        const __m512i high = _mm512_unpackhi_epi16(even, odd);
        MOE_UNROLL
        for (size_t a = 0; a < n; a++) {
            const __m512i pair = _mm512_set1_epi32(i16_pair(w + a * I16_BLOCK + r));
            i16_dot_vnni512(&c[a][0], low, pair);
            i16_dot_vnni512(&c[a][1], high, pair);
        }
    }
    const __m512i order[2] = {
        _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
    const size_t left = v->n_col - x;
    const uint32_t mask = left >= 32 ? UINT32_MAX : (1u << left) - 1;
    MOE_UNROLL
    for (size_t a = 0; a < n; a++) {
        const __m512 step = _mm512_set1_ps(v->step[i + a]);
        MOE_UNROLL
        for (size_t h = 0; h < 2; h++) {
            const __mmask16 m = (__mmask16)(mask >> 16 * h);
            float *to = v->c + (i + a) * v->c_stride + x + 16 * h;
            const __m512i sum = _mm512_permutex2var_epi32(c[a][0], order[h], c[a][1]);
            _mm512_mask_storeu_ps(to, m, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step,
                                                         _mm512_maskz_loadu_ps(m, to)));
        }
    }
}

VNNI512 static void i16_values_vnni512(const i16_values *v)
{
    i16_tile t = i16_values_start(v, 8, 32);
    while (i16_values_next(v, 8, 32, &t))
        switch (t.n) {
        case 1: i16_values_tile_vnni512(v, &t, 1); break;
        case 2: i16_values_tile_vnni512(v, &t, 2); break;
        case 4: i16_values_tile_vnni512(v, &t, 4); break;
        default: i16_values_tile_vnni512(v, &t, 8);
        }
}

static const cpu_int16 cpu_int16_vnni512 = {i16_quantize_avx2, i16_dequantize_avx2,
                                            i16_weights_avx2, i16_scores_vnni512,
                                            i16_values_vnni512};
#undef VNNI512
#endif

/* ---------------------------------------------------------------------------------- NEON -- */

#if MOE_ARM64
static float i16_quantize_neon(int16_t *dst, const float *src, size_t n)
{
    float32x4_t most = vdupq_n_f32(0);
    float rest = 0, factor, scale;
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        most = vmaxnmq_f32(most, vabsq_f32(vld1q_f32(src + i)));
    for (; i < n; i++)
        rest = fabsf(src[i]) > rest ? fabsf(src[i]) : rest;
    most = vmaxnmq_f32(most, vdupq_n_f32(rest));
    const bool any = i16_row_scale(sum_squares_neon(src, n), vmaxnmvq_f32(most), &factor, &scale);
    memset(dst, 0, align_up(n, I16_GROUP) * sizeof *dst);
    if (!any)
        return scale;
    for (i = 0; i + 4 <= n; i += 4)
        vst1_s16(dst + i, vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(src + i), factor))));
    for (; i < n; i++)
        dst[i] = (int16_t)lrintf(src[i] * factor);
    return scale;
}

static void i16_dequantize_neon(float *dst, const int16_t *src, float scale, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(dst + i, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vld1_s16(src + i))), scale));
    i16_dequantize_c(dst + i, src + i, scale, n - i);
}

MOE_INLINE void i16_scores_tile_neon(const i16_scores *s, i16_tile *t, size_t n)
{
    const size_t i = t->query, j = t->at;
    int32x4_t c[4][I16_ROWS];
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        MOE_UNROLL
        for (size_t b = 0; b < I16_ROWS; b++)
            c[a][b] = vdupq_n_s32(0);
    for (size_t k = 0; k < s->n_dim; k += 8) {
        if (k % I16_GROUP == 0)
            i16_fetch(t);
        int16x8_t key[I16_ROWS];
        MOE_UNROLL
        for (size_t b = 0; b < I16_ROWS; b++)
            key[b] = vld1q_s16(s->k[j + b] + k);
        MOE_UNROLL
        for (size_t a = 0; a < n; a++) {
            const int16x8_t q = vld1q_s16(s->q + (i + a) * s->n_dim + k);
            MOE_UNROLL
            for (size_t b = 0; b < I16_ROWS; b++)
                c[a][b] = vmlal_high_s16(vmlal_s16(c[a][b], vget_low_s16(q), vget_low_s16(key[b])),
                                         q, key[b]);
        }
    }
    MOE_UNROLL
    for (size_t a = 0; a < n; a++) {
        const int32x4_t sum = vpaddq_s32(vpaddq_s32(c[a][0], c[a][1]),
                                         vpaddq_s32(c[a][2], c[a][3]));
        const float32x4_t score = vmulq_f32(vcvtq_f32_s32(sum), vld1q_f32(s->k_scale + j));
        vst1q_f32(s->c + (i + a) * s->c_stride + j, vmulq_n_f32(score, s->q_scale[i + a]));
    }
}

static void i16_scores_neon(const i16_scores *s)
{
    i16_tile t = i16_scores_start(s, 4);
    while (i16_scores_next(s, 4, &t))
        switch (t.n) {
        case 1: i16_scores_tile_neon(s, &t, 1); break;
        case 2: i16_scores_tile_neon(s, &t, 2); break;
        default: i16_scores_tile_neon(s, &t, 4);
        }
}

/* c += four positions' codes times their weights. */
MOE_INLINE int32x4_t i16_mla4_neon(int32x4_t c, const int16x4_t v[I16_ROWS], int16x4_t w)
{
    c = vmlal_lane_s16(c, v[0], w, 0);
    c = vmlal_lane_s16(c, v[1], w, 1);
    c = vmlal_lane_s16(c, v[2], w, 2);
    return vmlal_lane_s16(c, v[3], w, 3);
}

MOE_INLINE void i16_values_tile_neon(const i16_values *v, i16_tile *t, size_t n)
{
    const size_t i = t->query, x = t->at;
    int32x4_t c[4][4];
    MOE_UNROLL
    for (size_t a = 0; a < n; a++)
        MOE_UNROLL
        for (size_t h = 0; h < 4; h++)
            c[a][h] = vdupq_n_s32(0);
    const int16_t *w = v->w + i * I16_BLOCK;
    for (size_t r = 0; r < v->n_row; r += I16_ROWS) {
        i16_fetch(t);
        MOE_UNROLL
        for (size_t h = 0; h < 4; h++) {
            int16x4_t some[I16_ROWS];
            MOE_UNROLL
            for (size_t b = 0; b < I16_ROWS; b++)
                some[b] = vld1_s16(v->v[r + b] + x + 4 * h);
            MOE_UNROLL
            for (size_t a = 0; a < n; a++)
                c[a][h] = i16_mla4_neon(c[a][h], some, vld1_s16(w + a * I16_BLOCK + r));
        }
    }
    MOE_UNROLL
    for (size_t a = 0; a < n; a++) {
        float *to = v->c + (i + a) * v->c_stride + x, sum[16];
        MOE_UNROLL
        for (size_t h = 0; h < 4; h++)
            vst1q_f32(sum + 4 * h, vcvtq_f32_s32(c[a][h]));
        if (v->n_col - x >= 16)
            add_neon(to, to, sum, v->step[i + a], 16);
        else
            add_c(to, to, sum, v->step[i + a], v->n_col - x);
    }
}

static void i16_values_neon(const i16_values *v)
{
    i16_tile t = i16_values_start(v, 4, 16);
    while (i16_values_next(v, 4, 16, &t))
        switch (t.n) {
        case 1: i16_values_tile_neon(v, &t, 1); break;
        case 2: i16_values_tile_neon(v, &t, 2); break;
        default: i16_values_tile_neon(v, &t, 4);
        }
}

static const cpu_int16 cpu_int16_neon = {i16_quantize_neon, i16_dequantize_neon, i16_weights_c,
                                         i16_scores_neon, i16_values_neon};
#endif

static const cpu_int16 *cpu_int16_select(uint32_t cpu)
{
    const cpu_int16 *best = &cpu_int16_c;
    (void)cpu;
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = &cpu_int16_avx2;
    if (cpu & MOE_CPU_AVX2 && cpu & MOE_CPU_AVX512_VNNI)
        best = &cpu_int16_vnni512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = &cpu_int16_neon;
#endif
    return best;
}

#endif
