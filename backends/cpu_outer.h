/* backends/cpu_outer.h - products of two small float matrices, for attention: scores are queries
 * times keys, and what comes out is weights times values. Both have the same form once the queries,
 * or the keys, stand transposed, so there is one kernel, and its transposition.
 *
 * A cache of F16 is multiplied as it stands: of few queries, each key and value is needed so seldom
 * that writing it as float first would cost half as much as the products.
 *
 * Each kernel stands first in C, which specifies its result to the bit; the vector forms put
 * neighbouring columns into the lanes of a vector, so that each element is the same chain of fmaf
 * in the same order on every machine, however many rows are computed together. */
#ifndef MOE_BACKENDS_CPU_OUTER_H
#define MOE_BACKENDS_CPU_OUTER_H

#include "../quant/arm.h"
#include "../quant/quant.h"
#if MOE_X86
#include MOE_X86_INTRINSICS
#endif

/* c[i][x] = fmaf(a[i][k], b[k][x], c[i][x]), k = 0 .. n_k - 1 in order, for i < n_row, x < n_col;
 * from 0 on if `fresh`, whatever c held. The strides are in floats. */
typedef struct cpu_outer {
    float *c;       // [n_row][c_stride]
    const float *a; // a[i][k] is at i * a_stride + k * a_step: one of them is 1
    const float *b; // [n_k][b_stride]
    const uint8_t *a_f16, *b_f16; // one of them stands, as F16, for a or b, which is NULL; a_f16:
                                  // a_step is 1, n_col a multiple of 16. Strides in elements
    size_t c_stride, a_stride, a_step, b_stride;
    size_t n_row, n_k, n_col;
    bool fresh;
    uintptr_t next; // memory that will be read soon, fetched bit by bit meanwhile
    size_t next_bytes;
} cpu_outer;

typedef struct cpu_outer_kernels {
    void (*outer)(const cpu_outer *o);
    /* dst[x][i] = src[i][x] for i < n_row, x < n_col; the strides are in floats */
    void (*transpose)(float *dst, size_t dst_stride, const float *src, size_t src_stride,
                      size_t n_row, size_t n_col);
    /* the same from F16 */
    void (*transpose_f16)(float *dst, size_t dst_stride, const uint8_t *src, size_t src_stride,
                          size_t n_row, size_t n_col);
} cpu_outer_kernels;

/* ------------------------------------------------------------------------------------- C -- */

MOE_INLINE float outer_a(const cpu_outer *o, size_t at)
{
    return o->a_f16 ? f32_of_f16(load_u16(o->a_f16 + 2 * at)) : o->a[at];
}

MOE_INLINE float outer_b(const cpu_outer *o, size_t at)
{
    return o->b_f16 ? f32_of_f16(load_u16(o->b_f16 + 2 * at)) : o->b[at];
}

static void outer_c(const cpu_outer *o)
{
    for (size_t i = 0; i < o->n_row; i++) {
        float *c = o->c + i * o->c_stride;
        if (o->fresh)
            memset(c, 0, o->n_col * sizeof *c);
        for (size_t k = 0; k < o->n_k; k++) {
            const float a = outer_a(o, i * o->a_stride + k * o->a_step);
            for (size_t x = 0; x < o->n_col; x++)
                c[x] = fmaf(a, outer_b(o, k * o->b_stride + x), c[x]);
        }
    }
}

static void transpose_c(float *dst, size_t dst_stride, const float *src, size_t src_stride,
                        size_t n_row, size_t n_col)
{
    for (size_t i = 0; i < n_row; i++)
        for (size_t x = 0; x < n_col; x++)
            dst[x * dst_stride + i] = src[i * src_stride + x];
}

static void transpose_f16_c(float *dst, size_t dst_stride, const uint8_t *src, size_t src_stride,
                            size_t n_row, size_t n_col)
{
    for (size_t i = 0; i < n_row; i++)
        for (size_t x = 0; x < n_col; x++)
            dst[x * dst_stride + i] = f32_of_f16(load_u16(src + 2 * (i * src_stride + x)));
}

static const cpu_outer_kernels cpu_outer_c = {outer_c, transpose_c, transpose_f16_c};

/* The rows [row, row + n) and the columns [col, col + n_col) as a product of their own, number
 * `tile` of n_tile, which fetches `next_bytes` bytes for each k. */
MOE_INLINE cpu_outer outer_part(const cpu_outer *o, size_t row, size_t n_row, size_t col,
                                size_t n_col, size_t tile, size_t n_tile)
{
    cpu_outer part = *o;
    part.c += row * o->c_stride + col;
    if (o->a_f16)
        part.a_f16 += 2 * row * o->a_stride;
    else
        part.a += row * o->a_stride;
    if (o->b_f16)
        part.b_f16 += 2 * col;
    else
        part.b += col;
    part.n_row = n_row;
    part.n_col = n_col;
    part.next_bytes = (o->next_bytes + n_tile * o->n_k) / (n_tile * o->n_k + 1);
    part.next += tile * o->n_k * part.next_bytes;
    return part;
}

MOE_INLINE void outer_fetch(uintptr_t address, size_t bytes)
{
#ifdef __GNUC__
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const void *)(address + i), 0, 2);
#else
    (void)address, (void)bytes;
#endif
}

MOE_INLINE void outer_fetch_near(uintptr_t address)
{
#ifdef __GNUC__
    __builtin_prefetch((const void *)address, 0, 3);
#else
    (void)address;
#endif
}

/* What is left of a transposition after blocks of `block` rows and columns. */
MOE_UNUSED static void transpose_rest(float *dst, size_t dst_stride, const float *src,
                                      size_t src_stride, size_t n_row, size_t n_col, size_t block)
{
    const size_t rows = n_row / block * block, cols = n_col / block * block;
    transpose_c(dst + cols * dst_stride, dst_stride, src + cols, src_stride, rows, n_col - cols);
    transpose_c(dst + rows, dst_stride, src + rows * src_stride, src_stride, n_row - rows, n_col);
}

MOE_UNUSED static void transpose_f16_rest(float *dst, size_t dst_stride, const uint8_t *src,
                                          size_t src_stride, size_t n_row, size_t n_col,
                                          size_t block)
{
    const size_t rows = n_row / block * block, cols = n_col / block * block;
    transpose_f16_c(dst + cols * dst_stride, dst_stride, src + 2 * cols, src_stride, rows,
                    n_col - cols);
    transpose_f16_c(dst + rows, dst_stride, src + 2 * rows * src_stride, src_stride, n_row - rows,
                    n_col);
}

/* Keys of F16 in rows, which a tile takes `n` elements of at a time as floats: strip[row][n]. The
 * last tile repeats the last row. A strip is a line of the cache; no prefetcher follows so many
 * rows, so the lines of a later one are fetched by hand. */
enum { OUTER_KEYS = 16, OUTER_STRIP = 32, OUTER_STRIPS_AHEAD = 2 };

MOE_UNUSED static void outer_key_rows(const cpu_outer *o, size_t row, size_t n,
                                      const uint8_t **rows)
{
    for (size_t i = 0; i < n; i++)
        rows[i] = o->a_f16 + 2 * MOE_MIN(row + i, o->n_row - 1) * o->a_stride;
}

/* From element k of a row to what is fetched meanwhile: further on in the row, or in that of the
 * next tile of `n_key` rows. */
MOE_UNUSED static size_t outer_keys_ahead(const cpu_outer *o, size_t k, size_t n_key)
{
    const size_t ahead = OUTER_STRIPS_AHEAD * OUTER_STRIP;
    return 2 * (k + ahead < o->n_k ? ahead : ahead + n_key * o->a_stride - o->n_k);
}

/* What is left of the rows after whole strips. */
MOE_UNUSED static void outer_key_rest(const uint8_t *const *rows, size_t n_row, size_t k, size_t n,
                                      float *strip)
{
    for (size_t i = 0; i < n_row; i++)
        for (size_t j = 0; j < n; j++)
            strip[i * OUTER_STRIP + j] = f32_of_f16(load_u16(rows[i] + 2 * (k + j)));
}

/* A tile of c stays in registers over all k: OUTER_ROWS rows (fewer at the end) by a few vectors.
 * `n_row`, `n_vec` and `f16`, whether b is F16, are constants at each call, so that the loops over
 * them disappear. */
enum { OUTER_ROWS = 6 };

#define OUTER_DISPATCH(tile, o, n_vec, f16)                                                       \
    do {                                                                                          \
        switch ((o)->n_row) {                                                                     \
        case 1: tile(o, 1, n_vec, f16); break;                                                    \
        case 2: tile(o, 2, n_vec, f16); break;                                                    \
        case 3: tile(o, 3, n_vec, f16); break;                                                    \
        case 4: tile(o, 4, n_vec, f16); break;                                                    \
        case 5: tile(o, 5, n_vec, f16); break;                                                    \
        default: tile(o, OUTER_ROWS, n_vec, f16); break;                                          \
        }                                                                                         \
    } while (0)

/* ---------------------------------------------------------------------------------- AVX2 -- */

#if MOE_X86
#define AVX2 MOE_TARGET("avx2,fma,f16c")

AVX2 MOE_INLINE __m256 outer_f16_avx2(const uint8_t *src)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)src));
}

AVX2 MOE_INLINE void outer_tile_avx2(const cpu_outer *o, size_t n_row, size_t n_vec, bool f16)
{
    __m256 c[OUTER_ROWS][2];
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            c[i][v] = o->fresh ? _mm256_setzero_ps()
                                : _mm256_loadu_ps(o->c + i * o->c_stride + 8 * v);
    const float *a_k = o->a, *row = o->b;
    const uint8_t *row_f16 = o->b_f16;
    uintptr_t next = o->next;
    for (size_t k = 0; k < o->n_k; k++, a_k += o->a_step, next += o->next_bytes) {
        __m256 b[2];
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            b[v] = f16 ? outer_f16_avx2(row_f16 + 16 * v) : _mm256_loadu_ps(row + 8 * v);
        MOE_UNROLL
        for (size_t i = 0; i < n_row; i++) {
            const __m256 a = _mm256_broadcast_ss(a_k + i * o->a_stride);
            MOE_UNROLL
            for (size_t v = 0; v < n_vec; v++)
                c[i][v] = _mm256_fmadd_ps(a, b[v], c[i][v]);
        }
        outer_fetch(next, o->next_bytes);
        if (f16)
            row_f16 += 2 * o->b_stride;
        else
            row += o->b_stride;
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            _mm256_storeu_ps(o->c + i * o->c_stride + 8 * v, c[i][v]);
}

AVX2 MOE_INLINE void outer_columns_avx2(const cpu_outer *o, bool f16)
{
    const size_t n_tile = (o->n_col + 15) / 16 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t x = 0, tile = 0;
    for (size_t n; o->n_col - x >= 8; x += n) {
        n = o->n_col - x >= 16 ? 16 : 8;
        for (size_t i = 0; i < o->n_row; i += OUTER_ROWS) {
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, n, tile++,
                                              n_tile);
            if (n == 16)
                OUTER_DISPATCH(outer_tile_avx2, &part, 2, f16);
            else
                OUTER_DISPATCH(outer_tile_avx2, &part, 1, f16);
        }
    }
    const cpu_outer rest = outer_part(o, 0, o->n_row, x, o->n_col - x, 0, 1);
    if (rest.n_col)
        outer_c(&rest);
}

AVX2 MOE_INLINE void outer_strip_avx2(const cpu_outer *o, const uint8_t *const *rows, size_t k,
                                      float *strip)
{
    const size_t ahead = outer_keys_ahead(o, k, OUTER_ROWS);
    if (o->n_k - k < OUTER_STRIP) {
        outer_key_rest(rows, OUTER_ROWS, k, o->n_k - k, strip);
        return;
    }
    for (size_t i = 0; i < OUTER_ROWS; i++) {
        const uint8_t *key = rows[i] + 2 * k;
        for (size_t j = 0; j < OUTER_STRIP; j += 8, strip += 8)
            _mm256_storeu_ps(strip, outer_f16_avx2(key + 2 * j));
        outer_fetch_near((uintptr_t)key + ahead);
    }
}

/* OUTER_ROWS rows, of which the first n_row are stored, and 16 columns. While a strip is multiplied
 * the next one is converted. */
AVX2 MOE_INLINE void outer_keys_tile_avx2(const cpu_outer *o, const uint8_t *const *rows)
{
    float strips[2][OUTER_ROWS * OUTER_STRIP];
    __m256 c[OUTER_ROWS][2];
    MOE_UNROLL
    for (size_t i = 0; i < OUTER_ROWS; i++)
        MOE_UNROLL
        for (size_t v = 0; v < 2; v++)
            c[i][v] = o->fresh || i >= o->n_row ? _mm256_setzero_ps()
                                                : _mm256_loadu_ps(o->c + i * o->c_stride + 8 * v);
    const float *row = o->b;
    outer_strip_avx2(o, rows, 0, strips[0]);
    for (size_t k = 0; k < o->n_k; k += OUTER_STRIP) {
        const float *strip = strips[k / OUTER_STRIP % 2];
        const size_t n = MOE_MIN(OUTER_STRIP, o->n_k - k);
        if (n == OUTER_STRIP)
            outer_strip_avx2(o, rows, k + n, strips[(k / OUTER_STRIP + 1) % 2]);
        outer_fetch(o->next + k * o->next_bytes, n * o->next_bytes);
        for (size_t j = 0; j < n; j++, row += o->b_stride) {
            const __m256 b[2] = {_mm256_loadu_ps(row), _mm256_loadu_ps(row + 8)};
            MOE_UNROLL
            for (size_t i = 0; i < OUTER_ROWS; i++) {
                const __m256 a = _mm256_broadcast_ss(strip + i * OUTER_STRIP + j);
                MOE_UNROLL
                for (size_t v = 0; v < 2; v++)
                    c[i][v] = _mm256_fmadd_ps(a, b[v], c[i][v]);
            }
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < OUTER_ROWS; i++)
        MOE_UNROLL
        for (size_t v = 0; v < 2; v++)
            if (i < o->n_row)
                _mm256_storeu_ps(o->c + i * o->c_stride + 8 * v, c[i][v]);
}

AVX2 static void outer_keys_avx2(const cpu_outer *o)
{
    const size_t n_tile = o->n_col / 16 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t tile = 0;
    for (size_t i = 0; i < o->n_row; i += OUTER_ROWS)
        for (size_t x = 0; x < o->n_col; x += 16) {
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, 16,
                                              tile++, n_tile);
            const uint8_t *rows[OUTER_ROWS];
            outer_key_rows(&part, 0, OUTER_ROWS, rows);
            outer_keys_tile_avx2(&part, rows);
        }
}

AVX2 static void outer_avx2(const cpu_outer *o)
{
    if (o->a_f16)
        outer_keys_avx2(o);
    else if (o->b_f16)
        outer_columns_avx2(o, true);
    else
        outer_columns_avx2(o, false);
}

/* 8 x 8: pairs of rows, then quadruples, then halves. */
AVX2 MOE_INLINE void transpose8_avx2(float *dst, size_t dst_stride, const __m256 *r)
{
    __m256 pair[8], quad[8];
    MOE_UNROLL
    for (size_t i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    MOE_UNROLL
    for (size_t i = 0; i < 8; i += 4)
        MOE_UNROLL
        for (size_t j = 0; j < 2; j++) {
            const __m256d low = _mm256_castps_pd(pair[i + j]);
            const __m256d high = _mm256_castps_pd(pair[i + j + 2]);
            quad[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            quad[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
    MOE_UNROLL
    for (size_t x = 0; x < 4; x++) {
        _mm256_storeu_ps(dst + x * dst_stride, _mm256_permute2f128_ps(quad[x], quad[x + 4], 0x20));
        _mm256_storeu_ps(dst + (x + 4) * dst_stride,
                         _mm256_permute2f128_ps(quad[x], quad[x + 4], 0x31));
    }
}

AVX2 static void transpose_avx2(float *dst, size_t dst_stride, const float *src, size_t src_stride,
                                size_t n_row, size_t n_col)
{
    __m256 r[8];
    for (size_t x = 0; x + 8 <= n_col; x += 8)
        for (size_t i = 0; i + 8 <= n_row; i += 8) {
            MOE_UNROLL
            for (size_t j = 0; j < 8; j++)
                r[j] = _mm256_loadu_ps(src + (i + j) * src_stride + x);
            transpose8_avx2(dst + x * dst_stride + i, dst_stride, r);
        }
    transpose_rest(dst, dst_stride, src, src_stride, n_row, n_col, 8);
}

AVX2 static void transpose_f16_avx2(float *dst, size_t dst_stride, const uint8_t *src,
                                    size_t src_stride, size_t n_row, size_t n_col)
{
    __m256 r[8];
    for (size_t x = 0; x + 8 <= n_col; x += 8)
        for (size_t i = 0; i + 8 <= n_row; i += 8) {
            MOE_UNROLL
            for (size_t j = 0; j < 8; j++)
                r[j] = outer_f16_avx2(src + 2 * ((i + j) * src_stride + x));
            transpose8_avx2(dst + x * dst_stride + i, dst_stride, r);
        }
    transpose_f16_rest(dst, dst_stride, src, src_stride, n_row, n_col, 8);
}

static const cpu_outer_kernels cpu_outer_avx2 = {outer_avx2, transpose_avx2, transpose_f16_avx2};
#undef AVX2

/* ------------------------------------------------------------------------------- AVX-512 -- */

#define AVX512 MOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

AVX512 MOE_INLINE __m512 outer_f16_avx512(const uint8_t *src)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)src));
}

AVX512 MOE_INLINE void outer_tile_avx512(const cpu_outer *o, size_t n_row, size_t n_vec, bool f16)
{
    __m512 c[8][4];
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            c[i][v] = o->fresh ? _mm512_setzero_ps()
                                : _mm512_loadu_ps(o->c + i * o->c_stride + 16 * v);
    const float *a_k = o->a, *row = o->b;
    const uint8_t *row_f16 = o->b_f16;
    uintptr_t next = o->next;
    for (size_t k = 0; k < o->n_k; k++, a_k += o->a_step, next += o->next_bytes) {
        __m512 b[4];
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            b[v] = f16 ? outer_f16_avx512(row_f16 + 32 * v) : _mm512_loadu_ps(row + 16 * v);
        MOE_UNROLL
        for (size_t i = 0; i < n_row; i++) {
            const __m512 a = _mm512_set1_ps(a_k[i * o->a_stride]);
            MOE_UNROLL
            for (size_t v = 0; v < n_vec; v++)
                c[i][v] = _mm512_fmadd_ps(a, b[v], c[i][v]);
        }
        outer_fetch(next, o->next_bytes);
        if (f16)
            row_f16 += 2 * o->b_stride;
        else
            row += o->b_stride;
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            _mm512_storeu_ps(o->c + i * o->c_stride + 16 * v, c[i][v]);
}

/* Columns [x, x + 16 n_vec). */
AVX512 MOE_INLINE void outer_columns_avx512(const cpu_outer *o, size_t x, size_t n_vec, bool f16,
                                            size_t *tile, size_t n_tile)
{
    /* 8 rows by 2 vectors fill the registers less than 6 by 4, but convert a vector less often. */
    size_t i = 0;
    for (; f16 && n_vec == 2 && i + 8 <= o->n_row; i += 8) {
        const cpu_outer part = outer_part(o, i, 8, x, 32, (*tile)++, n_tile);
        outer_tile_avx512(&part, 8, 2, f16);
    }
    for (size_t n; i < o->n_row; i += n) {
        n = MOE_MIN(OUTER_ROWS, o->n_row - i);
        const cpu_outer part = outer_part(o, i, n, x, 16 * n_vec, (*tile)++, n_tile);
        OUTER_DISPATCH(outer_tile_avx512, &part, n_vec, f16);
    }
}

AVX512 MOE_INLINE void outer_all_columns_avx512(const cpu_outer *o, bool f16)
{
    const size_t most = f16 && o->n_row >= 8 ? 2 : 4;
    const size_t n_tile = (o->n_col / 16 + most - 1) / most *
                          ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t x = 0, tile = 0;
    for (size_t n; o->n_col - x >= 16; x += 16 * n) {
        n = MOE_MIN(most, (o->n_col - x) / 16);
        n = n == 3 ? 2 : n;
        if (n == 4)
            outer_columns_avx512(o, x, 4, f16, &tile, n_tile);
        else if (n == 2)
            outer_columns_avx512(o, x, 2, f16, &tile, n_tile);
        else
            outer_columns_avx512(o, x, 1, f16, &tile, n_tile);
    }
    const cpu_outer rest = outer_part(o, 0, o->n_row, x, o->n_col - x, 0, 1);
    if (rest.n_col)
        outer_avx2(&rest);
}

AVX512 MOE_INLINE void outer_strip_avx512(const cpu_outer *o, const uint8_t *const *rows, size_t k,
                                          float *strip)
{
    const size_t ahead = outer_keys_ahead(o, k, OUTER_KEYS);
    if (o->n_k - k < OUTER_STRIP) {
        outer_key_rest(rows, OUTER_KEYS, k, o->n_k - k, strip);
        return;
    }
    for (size_t i = 0; i < OUTER_KEYS; i++, strip += OUTER_STRIP) {
        const uint8_t *key = rows[i] + 2 * k;
        _mm512_storeu_ps(strip, outer_f16_avx512(key));
        _mm512_storeu_ps(strip + 16, outer_f16_avx512(key + 32));
        outer_fetch_near((uintptr_t)key + ahead);
    }
}

/* OUTER_KEYS rows, of which the first n_row are stored, and 16 columns. While a strip is multiplied
 * the next one is converted. */
AVX512 MOE_INLINE void outer_keys_tile_avx512(const cpu_outer *o, const uint8_t *const *rows)
{
    float strips[2][OUTER_KEYS * OUTER_STRIP];
    __m512 c[OUTER_KEYS];
    MOE_UNROLL
    for (size_t i = 0; i < OUTER_KEYS; i++)
        c[i] = o->fresh || i >= o->n_row ? _mm512_setzero_ps()
                                         : _mm512_loadu_ps(o->c + i * o->c_stride);
    const float *row = o->b;
    outer_strip_avx512(o, rows, 0, strips[0]);
    for (size_t k = 0; k < o->n_k; k += OUTER_STRIP) {
        const float *strip = strips[k / OUTER_STRIP % 2];
        const size_t n = MOE_MIN(OUTER_STRIP, o->n_k - k);
        if (n == OUTER_STRIP)
            outer_strip_avx512(o, rows, k + n, strips[(k / OUTER_STRIP + 1) % 2]);
        outer_fetch(o->next + k * o->next_bytes, n * o->next_bytes);
        for (size_t j = 0; j < n; j++, row += o->b_stride) {
            const __m512 b = _mm512_loadu_ps(row);
            MOE_UNROLL
            for (size_t i = 0; i < OUTER_KEYS; i++)
                c[i] = _mm512_fmadd_ps(_mm512_set1_ps(strip[i * OUTER_STRIP + j]), b, c[i]);
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < OUTER_KEYS; i++)
        if (i < o->n_row)
            _mm512_storeu_ps(o->c + i * o->c_stride, c[i]);
}

AVX512 static void outer_keys_avx512(const cpu_outer *o)
{
    const size_t n_tile = o->n_col / 16 * ((o->n_row + OUTER_KEYS - 1) / OUTER_KEYS);
    size_t tile = 0;
    for (size_t i = 0; i < o->n_row; i += OUTER_KEYS)
        for (size_t x = 0; x < o->n_col; x += 16) {
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_KEYS, o->n_row - i), x, 16,
                                              tile++, n_tile);
            const uint8_t *rows[OUTER_KEYS];
            outer_key_rows(&part, 0, OUTER_KEYS, rows);
            outer_keys_tile_avx512(&part, rows);
        }
}

AVX512 static void outer_avx512(const cpu_outer *o)
{
    if (o->a_f16)
        outer_keys_avx512(o);
    else if (o->b_f16)
        outer_all_columns_avx512(o, true);
    else
        outer_all_columns_avx512(o, false);
}

static const cpu_outer_kernels cpu_outer_avx512 = {outer_avx512, transpose_avx2,
                                                   transpose_f16_avx2};
#undef AVX512
#endif

/* ---------------------------------------------------------------------------------- NEON -- */

#if MOE_ARM64
MOE_INLINE float32x4_t outer_f16_neon(const uint8_t *src)
{
    return arm_f32_of_f16(vreinterpret_u16_u8(vld1_u8(src)));
}

MOE_INLINE void outer_tile_neon(const cpu_outer *o, size_t n_row, size_t n_vec, bool f16)
{
    float32x4_t c[OUTER_ROWS][4];
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            c[i][v] = o->fresh ? vdupq_n_f32(0)
                                : vld1q_f32(o->c + i * o->c_stride + 4 * v);
    const float *a_k = o->a, *row = o->b;
    const uint8_t *row_f16 = o->b_f16;
    uintptr_t next = o->next;
    for (size_t k = 0; k < o->n_k; k++, a_k += o->a_step, next += o->next_bytes) {
        float32x4_t b[4];
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            b[v] = f16 ? outer_f16_neon(row_f16 + 8 * v) : vld1q_f32(row + 4 * v);
        MOE_UNROLL
        for (size_t i = 0; i < n_row; i++) {
            const float32x4_t a = vld1q_dup_f32(a_k + i * o->a_stride);
            MOE_UNROLL
            for (size_t v = 0; v < n_vec; v++)
                c[i][v] = vfmaq_f32(c[i][v], a, b[v]);
        }
        outer_fetch(next, o->next_bytes);
        if (f16)
            row_f16 += 2 * o->b_stride;
        else
            row += o->b_stride;
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            vst1q_f32(o->c + i * o->c_stride + 4 * v, c[i][v]);
}

MOE_INLINE void outer_columns_neon(const cpu_outer *o, bool f16)
{
    const size_t n_tile = (o->n_col + 15) / 16 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t x = 0, tile = 0;
    for (size_t n; o->n_col - x >= 4; x += n) {
        n = o->n_col - x >= 16 ? 16 : 4;
        for (size_t i = 0; i < o->n_row; i += OUTER_ROWS) {
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, n, tile++,
                                              n_tile);
            if (n == 16)
                OUTER_DISPATCH(outer_tile_neon, &part, 4, f16);
            else
                OUTER_DISPATCH(outer_tile_neon, &part, 1, f16);
        }
    }
    const cpu_outer rest = outer_part(o, 0, o->n_row, x, o->n_col - x, 0, 1);
    if (rest.n_col)
        outer_c(&rest);
}

MOE_INLINE void outer_strip_neon(const cpu_outer *o, const uint8_t *const *rows, size_t k,
                                 float *strip)
{
    const size_t ahead = outer_keys_ahead(o, k, OUTER_ROWS);
    if (o->n_k - k < OUTER_STRIP) {
        outer_key_rest(rows, OUTER_ROWS, k, o->n_k - k, strip);
        return;
    }
    for (size_t i = 0; i < OUTER_ROWS; i++) {
        const uint8_t *key = rows[i] + 2 * k;
        for (size_t j = 0; j < OUTER_STRIP; j += 4, strip += 4)
            vst1q_f32(strip, outer_f16_neon(key + 2 * j));
        outer_fetch_near((uintptr_t)key + ahead);
    }
}

/* OUTER_ROWS rows, of which the first n_row are stored, and 16 columns. While a strip is multiplied
 * the next one is converted. */
MOE_INLINE void outer_keys_tile_neon(const cpu_outer *o, const uint8_t *const *rows)
{
    float strips[2][OUTER_ROWS * OUTER_STRIP];
    float32x4_t c[OUTER_ROWS][4];
    MOE_UNROLL
    for (size_t i = 0; i < OUTER_ROWS; i++)
        MOE_UNROLL
        for (size_t v = 0; v < 4; v++)
            c[i][v] = o->fresh || i >= o->n_row ? vdupq_n_f32(0)
                                                : vld1q_f32(o->c + i * o->c_stride + 4 * v);
    const float *row = o->b;
    outer_strip_neon(o, rows, 0, strips[0]);
    for (size_t k = 0; k < o->n_k; k += OUTER_STRIP) {
        const float *strip = strips[k / OUTER_STRIP % 2];
        const size_t n = MOE_MIN(OUTER_STRIP, o->n_k - k);
        if (n == OUTER_STRIP)
            outer_strip_neon(o, rows, k + n, strips[(k / OUTER_STRIP + 1) % 2]);
        outer_fetch(o->next + k * o->next_bytes, n * o->next_bytes);
        for (size_t j = 0; j < n; j++, row += o->b_stride) {
            float32x4_t b[4];
            MOE_UNROLL
            for (size_t v = 0; v < 4; v++)
                b[v] = vld1q_f32(row + 4 * v);
            MOE_UNROLL
            for (size_t i = 0; i < OUTER_ROWS; i++) {
                const float32x4_t a = vld1q_dup_f32(strip + i * OUTER_STRIP + j);
                MOE_UNROLL
                for (size_t v = 0; v < 4; v++)
                    c[i][v] = vfmaq_f32(c[i][v], a, b[v]);
            }
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < OUTER_ROWS; i++)
        MOE_UNROLL
        for (size_t v = 0; v < 4; v++)
            if (i < o->n_row)
                vst1q_f32(o->c + i * o->c_stride + 4 * v, c[i][v]);
}

static void outer_keys_neon(const cpu_outer *o)
{
    const size_t n_tile = o->n_col / 16 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t tile = 0;
    for (size_t i = 0; i < o->n_row; i += OUTER_ROWS)
        for (size_t x = 0; x < o->n_col; x += 16) {
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, 16,
                                              tile++, n_tile);
            const uint8_t *rows[OUTER_ROWS];
            outer_key_rows(&part, 0, OUTER_ROWS, rows);
            outer_keys_tile_neon(&part, rows);
        }
}

static void outer_neon(const cpu_outer *o)
{
    if (o->a_f16)
        outer_keys_neon(o);
    else if (o->b_f16)
        outer_columns_neon(o, true);
    else
        outer_columns_neon(o, false);
}

/* 4 x 4: pairs of rows, then halves. */
MOE_INLINE void transpose4_neon(float *dst, size_t dst_stride, const float32x4_t *r)
{
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    MOE_UNROLL
    for (size_t x = 0; x < 2; x++) {
        vst1q_f32(dst + x * dst_stride,
                  vcombine_f32(vget_low_f32(a.val[x]), vget_low_f32(b.val[x])));
        vst1q_f32(dst + (x + 2) * dst_stride,
                  vcombine_f32(vget_high_f32(a.val[x]), vget_high_f32(b.val[x])));
    }
}

static void transpose_neon(float *dst, size_t dst_stride, const float *src, size_t src_stride,
                           size_t n_row, size_t n_col)
{
    float32x4_t r[4];
    for (size_t x = 0; x + 4 <= n_col; x += 4)
        for (size_t i = 0; i + 4 <= n_row; i += 4) {
            MOE_UNROLL
            for (size_t j = 0; j < 4; j++)
                r[j] = vld1q_f32(src + (i + j) * src_stride + x);
            transpose4_neon(dst + x * dst_stride + i, dst_stride, r);
        }
    transpose_rest(dst, dst_stride, src, src_stride, n_row, n_col, 4);
}

static void transpose_f16_neon(float *dst, size_t dst_stride, const uint8_t *src,
                               size_t src_stride, size_t n_row, size_t n_col)
{
    float32x4_t r[4];
    for (size_t x = 0; x + 4 <= n_col; x += 4)
        for (size_t i = 0; i + 4 <= n_row; i += 4) {
            MOE_UNROLL
            for (size_t j = 0; j < 4; j++)
                r[j] = outer_f16_neon(src + 2 * ((i + j) * src_stride + x));
            transpose4_neon(dst + x * dst_stride + i, dst_stride, r);
        }
    transpose_f16_rest(dst, dst_stride, src, src_stride, n_row, n_col, 4);
}

static const cpu_outer_kernels cpu_outer_neon = {outer_neon, transpose_neon, transpose_f16_neon};
#endif

static const cpu_outer_kernels *cpu_outer_select(uint32_t cpu)
{
    const cpu_outer_kernels *best = &cpu_outer_c;
    (void)cpu;
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = &cpu_outer_avx2;
    if (cpu & MOE_CPU_AVX2 && cpu & MOE_CPU_AVX512)
        best = &cpu_outer_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = &cpu_outer_neon;
#endif
    return best;
}

#endif
