/* backends/cpu_outer.h - products of two small float matrices, for attention: scores are queries
 * times keys, and what comes out is weights times values. Both have the same form once the queries,
 * or the keys, stand transposed, so there is one kernel, and its transposition.
 *
 * Each kernel stands first in C, which specifies its result to the bit; the vector forms put
 * neighbouring columns into the lanes of a vector, so that each element is the same chain of fmaf
 * in the same order on every machine, however many rows are computed together. */
#ifndef MOE_BACKENDS_CPU_OUTER_H
#define MOE_BACKENDS_CPU_OUTER_H

#include "../quant/quant.h"
#if MOE_X86
#include MOE_X86_INTRINSICS
#elif MOE_ARM64
#include <arm_neon.h>
#endif

/* c[i][x] = fmaf(a[i][k], b[k][x], c[i][x]), k = 0 .. n_k - 1 in order, for i < n_row, x < n_col;
 * from 0 on if `fresh`, whatever c held. The strides are in floats. */
typedef struct cpu_outer {
    float *c;       // [n_row][c_stride]
    const float *a; // a[i][k] is at i * a_stride + k * a_step: one of them is 1
    const float *b; // [n_k][b_stride]
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
} cpu_outer_kernels;

/* ------------------------------------------------------------------------------------- C -- */

static void outer_c(const cpu_outer *o)
{
    for (size_t i = 0; i < o->n_row; i++) {
        float *c = o->c + i * o->c_stride;
        if (o->fresh)
            memset(c, 0, o->n_col * sizeof *c);
        for (size_t k = 0; k < o->n_k; k++) {
            const float a = o->a[i * o->a_stride + k * o->a_step], *b = o->b + k * o->b_stride;
            for (size_t x = 0; x < o->n_col; x++)
                c[x] = fmaf(a, b[x], c[x]);
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

static const cpu_outer_kernels cpu_outer_c = {outer_c, transpose_c};

/* The rows [row, row + n) and the columns [col, col + n_col) as a product of their own. */
MOE_INLINE cpu_outer outer_part(const cpu_outer *o, size_t row, size_t n_row, size_t col,
                                size_t n_col)
{
    cpu_outer part = *o;
    part.c += row * o->c_stride + col;
    part.a += row * o->a_stride;
    part.b += col;
    part.n_row = n_row;
    part.n_col = n_col;
    return part;
}

/* Fetches the share of tile i of n. */
MOE_UNUSED static void outer_fetch(const cpu_outer *o, size_t i, size_t n)
{
#ifdef __GNUC__
    const size_t step = (o->next_bytes / n + 63) / 64 * 64;
    for (size_t at = i * step; at < MOE_MIN((i + 1) * step, o->next_bytes); at += 64)
        __builtin_prefetch((const void *)(o->next + at), 0, 2);
#else
    (void)o, (void)i, (void)n;
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

/* A tile of c stays in registers over all k: OUTER_ROWS rows (fewer at the end) by a few vectors.
 * `n_row` and `n_vec` are constants at each call, so that the loops over them disappear. */
enum { OUTER_ROWS = 6 };

#define OUTER_DISPATCH(tile, o, n_vec)                                                            \
    do {                                                                                          \
        switch ((o)->n_row) {                                                                     \
        case 1: tile(o, 1, n_vec); break;                                                         \
        case 2: tile(o, 2, n_vec); break;                                                         \
        case 3: tile(o, 3, n_vec); break;                                                         \
        case 4: tile(o, 4, n_vec); break;                                                         \
        case 5: tile(o, 5, n_vec); break;                                                         \
        default: tile(o, OUTER_ROWS, n_vec); break;                                               \
        }                                                                                         \
    } while (0)

/* ---------------------------------------------------------------------------------- AVX2 -- */

#if MOE_X86
#define AVX2 MOE_TARGET("avx2,fma")

AVX2 MOE_INLINE void outer_tile_avx2(const cpu_outer *o, size_t n_row, size_t n_vec)
{
    __m256 c[OUTER_ROWS][2];
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            c[i][v] = o->fresh ? _mm256_setzero_ps()
                                : _mm256_loadu_ps(o->c + i * o->c_stride + 8 * v);
    const float *a_k = o->a, *row = o->b;
    for (size_t k = 0; k < o->n_k; k++, a_k += o->a_step, row += o->b_stride) {
        __m256 b[2];
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            b[v] = _mm256_loadu_ps(row + 8 * v);
        MOE_UNROLL
        for (size_t i = 0; i < n_row; i++) {
            const __m256 a = _mm256_broadcast_ss(a_k + i * o->a_stride);
            MOE_UNROLL
            for (size_t v = 0; v < n_vec; v++)
                c[i][v] = _mm256_fmadd_ps(a, b[v], c[i][v]);
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            _mm256_storeu_ps(o->c + i * o->c_stride + 8 * v, c[i][v]);
}

AVX2 static void outer_avx2(const cpu_outer *o)
{
    const size_t n_tile = (o->n_col + 15) / 16 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t x = 0, tile = 0;
    for (size_t n; o->n_col - x >= 8; x += n) {
        n = o->n_col - x >= 16 ? 16 : 8;
        for (size_t i = 0; i < o->n_row; i += OUTER_ROWS) {
            outer_fetch(o, tile++, n_tile);
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, n);
            if (n == 16)
                OUTER_DISPATCH(outer_tile_avx2, &part, 2);
            else
                OUTER_DISPATCH(outer_tile_avx2, &part, 1);
        }
    }
    const cpu_outer rest = outer_part(o, 0, o->n_row, x, o->n_col - x);
    if (rest.n_col)
        outer_c(&rest);
}

/* 8 x 8: pairs of rows, then quadruples, then halves. */
AVX2 MOE_INLINE void transpose8_avx2(float *dst, size_t dst_stride, const float *src,
                                     size_t src_stride)
{
    __m256 r[8], pair[8], quad[8];
    MOE_UNROLL
    for (size_t i = 0; i < 8; i++)
        r[i] = _mm256_loadu_ps(src + i * src_stride);
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
    for (size_t x = 0; x + 8 <= n_col; x += 8)
        for (size_t i = 0; i + 8 <= n_row; i += 8)
            transpose8_avx2(dst + x * dst_stride + i, dst_stride, src + i * src_stride + x,
                            src_stride);
    transpose_rest(dst, dst_stride, src, src_stride, n_row, n_col, 8);
}

static const cpu_outer_kernels cpu_outer_avx2 = {outer_avx2, transpose_avx2};
#undef AVX2

/* ------------------------------------------------------------------------------- AVX-512 -- */

#define AVX512 MOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

AVX512 MOE_INLINE void outer_tile_avx512(const cpu_outer *o, size_t n_row, size_t n_vec)
{
    __m512 c[OUTER_ROWS][4];
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            c[i][v] = o->fresh ? _mm512_setzero_ps()
                                : _mm512_loadu_ps(o->c + i * o->c_stride + 16 * v);
    const float *a_k = o->a, *row = o->b;
    for (size_t k = 0; k < o->n_k; k++, a_k += o->a_step, row += o->b_stride) {
        __m512 b[4];
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            b[v] = _mm512_loadu_ps(row + 16 * v);
        MOE_UNROLL
        for (size_t i = 0; i < n_row; i++) {
            const __m512 a = _mm512_set1_ps(a_k[i * o->a_stride]);
            MOE_UNROLL
            for (size_t v = 0; v < n_vec; v++)
                c[i][v] = _mm512_fmadd_ps(a, b[v], c[i][v]);
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            _mm512_storeu_ps(o->c + i * o->c_stride + 16 * v, c[i][v]);
}

AVX512 static void outer_avx512(const cpu_outer *o)
{
    const size_t n_tile = (o->n_col + 63) / 64 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t x = 0, tile = 0;
    for (size_t n; o->n_col - x >= 16; x += n) {
        n = o->n_col - x >= 64 ? 64 : o->n_col - x >= 32 ? 32 : 16;
        for (size_t i = 0; i < o->n_row; i += OUTER_ROWS) {
            outer_fetch(o, tile++, n_tile);
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, n);
            if (n == 64)
                OUTER_DISPATCH(outer_tile_avx512, &part, 4);
            else if (n == 32)
                OUTER_DISPATCH(outer_tile_avx512, &part, 2);
            else
                OUTER_DISPATCH(outer_tile_avx512, &part, 1);
        }
    }
    const cpu_outer rest = outer_part(o, 0, o->n_row, x, o->n_col - x);
    if (rest.n_col)
        outer_avx2(&rest);
}

static const cpu_outer_kernels cpu_outer_avx512 = {outer_avx512, transpose_avx2};
#undef AVX512
#endif

/* ---------------------------------------------------------------------------------- NEON -- */

#if MOE_ARM64
MOE_INLINE void outer_tile_neon(const cpu_outer *o, size_t n_row, size_t n_vec)
{
    float32x4_t c[OUTER_ROWS][4];
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            c[i][v] = o->fresh ? vdupq_n_f32(0)
                                : vld1q_f32(o->c + i * o->c_stride + 4 * v);
    const float *a_k = o->a, *row = o->b;
    for (size_t k = 0; k < o->n_k; k++, a_k += o->a_step, row += o->b_stride) {
        float32x4_t b[4];
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            b[v] = vld1q_f32(row + 4 * v);
        MOE_UNROLL
        for (size_t i = 0; i < n_row; i++) {
            const float32x4_t a = vld1q_dup_f32(a_k + i * o->a_stride);
            MOE_UNROLL
            for (size_t v = 0; v < n_vec; v++)
                c[i][v] = vfmaq_f32(c[i][v], a, b[v]);
        }
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_row; i++)
        MOE_UNROLL
        for (size_t v = 0; v < n_vec; v++)
            vst1q_f32(o->c + i * o->c_stride + 4 * v, c[i][v]);
}

static void outer_neon(const cpu_outer *o)
{
    const size_t n_tile = (o->n_col + 15) / 16 * ((o->n_row + OUTER_ROWS - 1) / OUTER_ROWS);
    size_t x = 0, tile = 0;
    for (size_t n; o->n_col - x >= 4; x += n) {
        n = o->n_col - x >= 16 ? 16 : 4;
        for (size_t i = 0; i < o->n_row; i += OUTER_ROWS) {
            outer_fetch(o, tile++, n_tile);
            const cpu_outer part = outer_part(o, i, MOE_MIN(OUTER_ROWS, o->n_row - i), x, n);
            if (n == 16)
                OUTER_DISPATCH(outer_tile_neon, &part, 4);
            else
                OUTER_DISPATCH(outer_tile_neon, &part, 1);
        }
    }
    const cpu_outer rest = outer_part(o, 0, o->n_row, x, o->n_col - x);
    if (rest.n_col)
        outer_c(&rest);
}

/* 4 x 4: pairs of rows, then halves. */
MOE_INLINE void transpose4_neon(float *dst, size_t dst_stride, const float *src, size_t src_stride)
{
    const float32x4x2_t a = vtrnq_f32(vld1q_f32(src), vld1q_f32(src + src_stride));
    const float32x4x2_t b =
        vtrnq_f32(vld1q_f32(src + 2 * src_stride), vld1q_f32(src + 3 * src_stride));
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
    for (size_t x = 0; x + 4 <= n_col; x += 4)
        for (size_t i = 0; i + 4 <= n_row; i += 4)
            transpose4_neon(dst + x * dst_stride + i, dst_stride, src + i * src_stride + x,
                            src_stride);
    transpose_rest(dst, dst_stride, src, src_stride, n_row, n_col, 4);
}

static const cpu_outer_kernels cpu_outer_neon = {outer_neon, transpose_neon};
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
