/* quant/x86_float.h - the AVX2 and AVX-512 kernels of float weights (F32, F16, BF16).
 *
 * A product is summed in 8 lanes (quant.h). One token: 8 rows side by side. Many tokens: a tile of
 * weights, as floats, stays in L1 while the activations of many tokens pass it, a few tokens at a
 * step, whose sums stay in registers. The first step converts the weights while it multiplies: that
 * hides what converting them and waiting for memory takes.
 *
 *             rows of a tile   tokens of a step   loads for products
 *     AVX2          4                 3              7 for 12, all 16 registers
 *     AVX-512       8                 6             10 for 24; a vector holds 8 weights of two rows
 *
 * So the activations have to come from L2: as many tokens are taken at once as fit there. Rows that
 * are too long for a tile are cut into parts. Then a part of several tiles is multiplied before the
 * next part is begun, with sums that wait in memory, so that a part of the activations, read from
 * L3, serves several tiles.
 *
 * BF16 is loaded 16 weights at a time: as two vectors of floats, the odd ones and the even ones, as
 * bf16.h wants them summed; or, for vdpbf16ps, as one vector of pairs.
 *
 * Where the length of a row is no multiple of 8 (16), the tile is filled up with -0 and meets
 * activations that are 0: adding -0 changes no sum, not even one that is -0. Must never: read a
 * byte outside a row, or compute a float in another order than the C kernel of the format. */
#ifndef MOE_QUANT_X86_FLOAT_H
#define MOE_QUANT_X86_FLOAT_H

#include "x86_512.h"

#if MOE_X86

enum {
    X86_FLOAT_VECTORS = 96, /* of 8 lanes, of a row in a tile: 12 KiB, with AVX-512 24 */
    X86_FLOAT_PART_ROWS = 32,    /* rows whose sums wait in memory, */
    X86_FLOAT_PART_TOKENS = 132, /* and tokens: a multiple of both steps, 128 and more */
    X86_FLOAT_L2 = 448 << 10, /* activations for which weights are converted once */
    X86_FLOAT_ROWS = 4,     /* of a tile */
    X86_FLOAT_STEP = 3,     /* tokens of a step */
    X86_512_FLOAT_ROWS = 8,
    X86_512_FLOAT_STEP = 6
};

/* What the kernels have to know of a type. */
typedef struct x86_float_type {
    size_t item_bytes; // of a weight
    size_t unit;       // weights of a row that are loaded at once: 8 or 16
    size_t vectors;    // that they become, and that their activations are, of 32 bytes: 1 or 2
    float scale;       // the factor of the results
} x86_float_type;

/* A tile, or as much of its rows as fits into it, times some tokens. */
typedef struct x86_float_part {
    const uint8_t *row[X86_512_FLOAT_ROWS]; // those past the end are the last row once more
    size_t ahead;       // where the rows that come next begin, in bytes from these; 0: unknown
    const uint8_t *x;   // of the first token, at the first weight
    float *y;           // [n_tok][y_stride]
    size_t x_stride, y_stride;
    size_t n_k, n_row, n_tok;
    size_t n_vector;    // of a row in the tile
    float scale;
    bool first, last;   // part of the rows: if first, sums begin with 0; if last, y is written
    void *tile;         // [n_vector][rows of a tile][8]: written by the first step
    float *sum;         // [n_tok][rows of a tile][8]: what the parts so far gave
} x86_float_part;

typedef void x86_float_part_fn(const x86_float_part *p);

/* Memory of a product, on the stack; without parts the sums are not touched. */
typedef struct x86_float_memory {
    __m512 tile[X86_FLOAT_VECTORS * X86_512_FLOAT_ROWS / 2];
    __m512 sum[X86_FLOAT_PART_ROWS * X86_FLOAT_PART_TOKENS / 2];
} x86_float_memory;

/* Rows r .. r + p->n_row - 1 from weight k on, times the tokens that p has. */
MOE_INLINE void x86_float_run(const moe_mm *mm, size_t r, size_t k, size_t item_bytes,
                              x86_float_part *p, size_t tile_rows, x86_float_part_fn *run)
{
    for (size_t i = 0; i < tile_rows; i++)
        p->row[i] = mm->w + MOE_MIN(r + i, mm->n_row - 1) * mm->w_stride + k * item_bytes;
    p->n_row = MOE_MIN(mm->n_row - r, tile_rows);
    p->first = k == 0;
    p->last = k + p->n_k == mm->n_in;
    run(p);
}

/* Cuts a product into tiles of `tile_rows` rows and into parts of rows. */
MOE_INLINE void x86_float_cut(const moe_mm *mm, x86_float_type f, size_t tile_rows,
                              x86_float_memory *memory, x86_float_part_fn *run)
{
    const size_t tile_k = X86_FLOAT_VECTORS / f.vectors * f.unit;
    const size_t n_part = (mm->n_in + tile_k - 1) / tile_k;
    const size_t part = (size_t)align_up((mm->n_in + n_part - 1) / n_part, f.unit);
    const size_t x_bytes = 32 * f.vectors / f.unit; /* of an activation */
    const size_t most_tok = n_part > 1 ? (size_t)X86_FLOAT_PART_TOKENS
                                       : X86_FLOAT_L2 / (mm->n_in * x_bytes);
    const size_t n_block = (mm->n_tok + most_tok - 1) / most_tok;
    const size_t block = ((mm->n_tok - 1) / n_block / X86_512_FLOAT_STEP + 1) *
                         X86_512_FLOAT_STEP; /* <= X86_FLOAT_PART_TOKENS, which is a multiple */
    const size_t rows = n_part > 1 ? X86_FLOAT_PART_ROWS : mm->n_row;
    x86_float_part p = {.x_stride = mm->x_stride, .y_stride = mm->y_stride, .scale = f.scale,
                        .tile = memory->tile};
    for (size_t t = 0; t < mm->n_tok; t += block)
        for (size_t r0 = 0; r0 < mm->n_row; r0 += rows)
            for (size_t k = 0; k < mm->n_in; k += part)
                for (size_t r = r0; r < MOE_MIN(r0 + rows, mm->n_row); r += tile_rows) {
                    p.x = mm->x + t * mm->x_stride + k * x_bytes;
                    p.y = mm->y + t * mm->y_stride + r;
                    p.sum = (float *)memory->sum + (r - r0) * 8 * X86_FLOAT_PART_TOKENS;
                    p.n_tok = MOE_MIN(block, mm->n_tok - t);
                    p.n_k = MOE_MIN(part, mm->n_in - k);
                    p.n_vector = (p.n_k + f.unit - 1) / f.unit * f.vectors;
                    p.ahead = t == 0 ? tile_rows * mm->w_stride : 0;
                    x86_float_run(mm, r, k, f.item_bytes, &p, tile_rows, run);
                }
}

/* Fetches the cache lines of the next rows that take the places of a unit of k of a tile, all rows'
 * first lines first: into L2, the first of each page into L1 (x86.h). With AVX2 and rows in parts
 * all go into L1: the next tile is but 6 KiB away. Zen 4, one thread, GB/s with L1 and with L2, 4
 * tokens: F16, rows of 4096, AVX-512 9.5 and 13.7, AVX2 10.8 and 8.6; of 576, AVX2 10.2 and 15. */
MOE_AVX2_INLINE void x86_float_fetch(const x86_float_part *p, size_t k, x86_float_type f,
                                     size_t tile_rows)
{
    const size_t n = f.unit * f.item_bytes * tile_rows / 64;
    const bool to_l1 = tile_rows == X86_FLOAT_ROWS && !(p->first && p->last);
    for (size_t i = k / f.unit * n; i < (k / f.unit + 1) * n; i++) {
        const uintptr_t line = (uintptr_t)p->row[i % tile_rows] + p->ahead + i / tile_rows * 64;
        if (to_l1 || line % X86_PAGE < 64)
            _mm_prefetch((const char *)line, _MM_HINT_T0);
        else
            _mm_prefetch((const char *)line, _MM_HINT_T1);
    }
}

/* The last n weights of a row, filled up to a unit with -0. */
MOE_INLINE void x86_float_last(const uint8_t *w, size_t n, x86_float_type f, uint8_t copy[32])
{
    memset(copy, 0, 32);
    for (size_t i = f.item_bytes - 1; i < 32; i += f.item_bytes)
        copy[i] = 0x80;
    memcpy(copy, w, n * f.item_bytes);
}

/* -------------------------------------------------------------------------------------- AVX2 -- */

/* A unit's vector v as floats. */
typedef __m256 x86_load8_fn(const uint8_t *w, size_t v);

/* acc + a unit of weights times its activations. */
MOE_AVX2_INLINE __m256 x86_float_unit(__m256 acc, const uint8_t *w, const __m256 x[2],
                                      x86_float_type f, x86_load8_fn *load8)
{
    MOE_UNROLL
    for (size_t v = 0; v < f.vectors; v++)
        acc = _mm256_fmadd_ps(load8(w, v), x[v], acc);
    return acc;
}

/* One token, 8 rows at once: as many chains as hide the latency of a fused multiply-add. */
MOE_AVX2_INLINE void x86_float_gemv(const moe_mm *mm, x86_float_type f, x86_load8_fn *load8)
{
    const size_t n_unit = mm->n_in / f.unit, unit_bytes = f.unit * f.item_bytes;
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        const x86_ahead next = x86_ahead_rows(mm, r, 8);
        const float *x = (const float *)mm->x;
        __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
        __m256 a4 = a0, a5 = a0, a6 = a0, a7 = a0, xk[2];
        for (size_t i = 0; i < n_unit; i++, x += 8 * f.vectors) {
            const size_t at = i * unit_bytes;
            x86_fetch_ahead(next, 8 * at, 8 * unit_bytes);
            xk[0] = _mm256_load_ps(x);
            xk[1] = f.vectors > 1 ? _mm256_load_ps(x + 8) : xk[0];
            a0 = x86_float_unit(a0, row[0] + at, xk, f, load8);
            a1 = x86_float_unit(a1, row[1] + at, xk, f, load8);
            a2 = x86_float_unit(a2, row[2] + at, xk, f, load8);
            a3 = x86_float_unit(a3, row[3] + at, xk, f, load8);
            a4 = x86_float_unit(a4, row[4] + at, xk, f, load8);
            a5 = x86_float_unit(a5, row[5] + at, xk, f, load8);
            a6 = x86_float_unit(a6, row[6] + at, xk, f, load8);
            a7 = x86_float_unit(a7, row[7] + at, xk, f, load8);
        }
        __m256 acc[8] = {a0, a1, a2, a3, a4, a5, a6, a7};
        const size_t n_last = mm->n_in % f.unit;
        for (size_t i = 0; i < MOE_MIN(mm->n_row - r, 8); i++) {
            if (n_last) {
                uint8_t copy[32];
                x86_float_last(row[i] + n_unit * unit_bytes, n_last, f, copy);
                xk[0] = _mm256_load_ps(x);
                xk[1] = f.vectors > 1 ? _mm256_load_ps(x + 8) : xk[0];
                acc[i] = x86_float_unit(acc[i], copy, xk, f, load8);
            }
            mm->y[r + i] = x86_reduce8(acc[i]) * f.scale;
        }
    }
}

/* Keeps a vector in a register that a compiler would rather load once for each use. */
MOE_AVX2_INLINE void x86_float_pin(__m256 *v)
{
    __asm__("" : MOE_X86_REGISTER(*v));
}

/* v0 and v1, lanes 0..3 plus lanes 4..7. */
MOE_AVX2_INLINE __m256 x86_float_fold(__m256 v0, __m256 v1)
{
    return _mm256_add_ps(_mm256_blend_ps(v0, v1, 0xf0), _mm256_permute2f128_ps(v0, v1, 0x21));
}

/* reduce8() of 4 rows of two tokens. */
MOE_AVX2_INLINE void x86_float_reduce8(const __m256 a[X86_FLOAT_ROWS],
                                       const __m256 b[X86_FLOAT_ROWS], __m128 out[2])
{
    const __m256 a01 = x86_float_fold(a[0], a[1]), a23 = x86_float_fold(a[2], a[3]);
    const __m256 b01 = x86_float_fold(b[0], b[1]), b23 = x86_float_fold(b[2], b[3]);
    /* rows 0 2 0 2 | 1 3 1 3: lane 0 plus 2 of two rows, then lane 1 plus 3 */
    const __m256d a2 = _mm256_castps_pd(
        _mm256_add_ps(_mm256_unpacklo_ps(a01, a23), _mm256_unpackhi_ps(a01, a23)));
    const __m256d b2 = _mm256_castps_pd(
        _mm256_add_ps(_mm256_unpacklo_ps(b01, b23), _mm256_unpackhi_ps(b01, b23)));
    const __m256 sum = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a2, b2)),
                                     _mm256_castpd_ps(_mm256_unpackhi_pd(a2, b2)));
    const __m128 low = _mm256_castps256_ps128(sum), high = _mm256_extractf128_ps(sum, 1);
    out[0] = _mm_unpacklo_ps(low, high);
    out[1] = _mm_unpackhi_ps(low, high);
}

/* acc[t][i] += eight weights of each row times n_tok (constant) tokens. With load8, the weights are
 * vector v of those at row + at, and w is written. */
MOE_AVX2_INLINE void x86_float_eight(__m256 w[X86_FLOAT_ROWS], const uint8_t *const *row, size_t at,
                                     size_t v, x86_load8_fn *load8, const uint8_t *x, size_t stride,
                                     __m256 (*acc)[X86_FLOAT_ROWS], size_t n_tok)
{
    __m256 xk[X86_FLOAT_STEP];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        xk[t] = _mm256_load_ps((const float *)(x + t * stride));
        x86_float_pin(&xk[t]);
    }
    MOE_UNROLL
    for (size_t i = 0; i < X86_FLOAT_ROWS; i++) {
        __m256 wk = load8 ? load8(row[i] + at, v) : w[i];
        if (load8)
            w[i] = wk;
        x86_float_pin(&wk);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            acc[t][i] = _mm256_fmadd_ps(wk, xk[t], acc[t][i]);
    }
}

/* Writes the results of n <= 4 rows. */
MOE_AVX2_INLINE void x86_float_store(float *y, __m128 v, size_t n)
{
    if (MOE_LIKELY(n == 4)) {
        _mm_storeu_ps(y, v);
        return;
    }
    float lane[4];
    _mm_storeu_ps(lane, v);
    for (size_t i = 0; i < n; i++)
        y[i] = lane[i];
}

/* What becomes of the sums of n_tok (constant) tokens from t on. */
MOE_AVX2_INLINE void x86_float_put(const x86_float_part *p, size_t t, size_t n_tok,
                                   __m256 (*acc)[X86_FLOAT_ROWS])
{
    __m256 *sum = (__m256 *)p->sum + t * X86_FLOAT_ROWS;
    const size_t n_row = p->n_row, y_stride = p->y_stride;
    const __m128 scale = _mm_set1_ps(p->scale);
    float *y = p->y + t * y_stride;
    if (!p->last) {
        MOE_UNROLL
        for (size_t i = 0; i < X86_FLOAT_ROWS * n_tok; i++)
            sum[i] = acc[i / X86_FLOAT_ROWS][i % X86_FLOAT_ROWS];
        return;
    }
    __m128 v[X86_FLOAT_STEP + 1];
    MOE_UNROLL
    for (size_t i = 0; i < n_tok; i += 2)
        x86_float_reduce8(acc[i], acc[MOE_MIN(i + 1, n_tok - 1)], v + i);
    MOE_UNROLL
    for (size_t i = 0; i < n_tok; i++, y += y_stride)
        x86_float_store(y, _mm_mul_ps(v[i], scale), n_row);
}

/* The sums so far of n_tok (constant) tokens from t on. */
MOE_AVX2_INLINE void x86_float_get(const x86_float_part *p, size_t t, size_t n_tok,
                                   __m256 (*acc)[X86_FLOAT_ROWS])
{
    const __m256 *sum = (const __m256 *)p->sum + t * X86_FLOAT_ROWS;
    MOE_UNROLL
    for (size_t i = 0; i < X86_FLOAT_ROWS * n_tok; i++)
        acc[i / X86_FLOAT_ROWS][i % X86_FLOAT_ROWS] = _mm256_setzero_ps();
    if (!p->first) {
        MOE_UNROLL
        for (size_t i = 0; i < X86_FLOAT_ROWS * n_tok; i++)
            acc[i / X86_FLOAT_ROWS][i % X86_FLOAT_ROWS] = sum[i];
    }
}

/* The tile times tokens t .. t + n_tok - 1, n_tok constant, <= X86_FLOAT_STEP. */
MOE_AVX2_INLINE void x86_float_step(const x86_float_part *p, size_t t, size_t n_tok)
{
    const uint8_t *x = p->x + t * p->x_stride;
    __m256 (*w)[X86_FLOAT_ROWS] = p->tile, acc[X86_FLOAT_STEP][X86_FLOAT_ROWS];
    x86_float_get(p, t, n_tok, acc);
    for (size_t k = 0; k < p->n_vector; k++, x += 32, w++)
        x86_float_eight(*w, NULL, 0, 0, NULL, x, p->x_stride, acc, n_tok);
    x86_float_put(p, t, n_tok, acc);
}

/* The same with the first tokens: the tile is written on the way. load8 is constant. */
MOE_AVX2_INLINE void x86_float_begin(const x86_float_part *p, size_t n_tok, x86_float_type f,
                                     x86_load8_fn *load8)
{
    const uint8_t *x = p->x;
    __m256 (*w)[X86_FLOAT_ROWS] = p->tile, acc[X86_FLOAT_STEP][X86_FLOAT_ROWS];
    x86_float_get(p, 0, n_tok, acc);
    size_t k = 0;
    for (; k + f.unit <= p->n_k; k += f.unit) {
        if (p->ahead)
            x86_float_fetch(p, k, f, X86_FLOAT_ROWS);
        MOE_UNROLL
        for (size_t v = 0; v < f.vectors; v++, x += 32, w++)
            x86_float_eight(*w, p->row, k * f.item_bytes, v, load8, x, p->x_stride, acc, n_tok);
    }
    if (k < p->n_k) {
        uint8_t copy[X86_FLOAT_ROWS][32];
        const uint8_t *row[X86_FLOAT_ROWS];
        for (size_t i = 0; i < X86_FLOAT_ROWS; i++) {
            x86_float_last(p->row[i] + k * f.item_bytes, p->n_k - k, f, copy[i]);
            row[i] = copy[i];
        }
        for (size_t v = 0; v < f.vectors; v++, x += 32, w++)
            x86_float_eight(*w, row, 0, v, load8, x, p->x_stride, acc, n_tok);
    }
    x86_float_put(p, 0, n_tok, acc);
}

/* The tokens after the first step. */
MOE_AVX2 MOE_UNUSED static void x86_float_rest(const x86_float_part *p, size_t t)
{
    for (; t + X86_FLOAT_STEP <= p->n_tok; t += X86_FLOAT_STEP)
        x86_float_step(p, t, X86_FLOAT_STEP);
    if (p->n_tok - t == 2)
        x86_float_step(p, t, 2);
    else if (p->n_tok - t == 1)
        x86_float_step(p, t, 1);
}

/* The body of an x86_float_part_fn. */
MOE_AVX2_INLINE void x86_float_tokens(const x86_float_part *p, x86_float_type f,
                                      x86_load8_fn *load8)
{
    switch (p->n_tok) {
    case 1: x86_float_begin(p, 1, f, load8); break;
    case 2: x86_float_begin(p, 2, f, load8); break;
    default:
        x86_float_begin(p, X86_FLOAT_STEP, f, load8);
        x86_float_rest(p, X86_FLOAT_STEP);
    }
}

MOE_AVX2 MOE_UNUSED static void x86_float_gemm(const moe_mm *mm, x86_float_type f,
                                               x86_float_part_fn *run)
{
    x86_float_memory memory;
    x86_float_cut(mm, f, X86_FLOAT_ROWS, &memory, run);
}

/* ----------------------------------------------------------------------------------- AVX-512 -- */

/* Vector v of a unit of weights at a and of one at b. */
typedef __m512 x86_512_pair_fn(const uint8_t *a, const uint8_t *b, size_t v);

/* acc + what two vectors of weights give with their activations. */
typedef __m512 x86_512_multiply_fn(__m512 w, __m512 x, __m512 acc);

MOE_AVX512_INLINE __m512 x86_512_fma(__m512 w, __m512 x, __m512 acc)
{
    return _mm512_fmadd_ps(w, x, acc);
}

/* Keeps a vector in a register that a compiler would rather load once for each use. */
MOE_AVX512_INLINE void x86_512_pin(__m512 *v)
{
    __asm__("" : MOE_X86_REGISTER(*v));
}

/* reduce8() of 16 pairs of half vectors, in their order. */
MOE_AVX512_INLINE __m512 x86_512_reduce8(const __m512 low[4], const __m512 high[4])
{
    __m512 four[4]; /* lanes 0..3 plus lanes 4..7 of rows 4i .. 4i + 3 */
    MOE_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512 *v = (i < 2 ? low : high) + i % 2 * 2;
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88),
                                _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
    }
    /* lane 0 plus 2 of two rows, then lane 1 plus 3 */
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]),
                                   _mm512_unpackhi_ps(four[0], four[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]),
                                   _mm512_unpackhi_ps(four[2], four[3]));
    const __m512d a64 = _mm512_castps_pd(a), b64 = _mm512_castps_pd(b);
    const __m512 sum = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a64, b64)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(a64, b64)));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7,
                                                   11, 15), sum);
}

/* acc[t][i] += a vector of weights of each row times n_tok (constant) tokens. */
MOE_AVX512_INLINE void x86_512_float_eight(const __m512 w[4], const uint8_t *x, size_t stride,
                                           __m512 (*acc)[4], size_t n_tok,
                                           x86_512_multiply_fn *multiply)
{
    __m512 wk[4];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        wk[i] = w[i];
        x86_512_pin(&wk[i]);
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        const __m512 xk = _mm512_broadcast_f32x8(_mm256_load_ps((const float *)(x + t * stride)));
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++)
            acc[t][i] = multiply(wk[i], xk, acc[t][i]);
    }
}

/* What becomes of the sums of n_tok (constant, 1 or even) tokens from t on. */
MOE_AVX512_INLINE void x86_512_float_put(const x86_float_part *p, size_t t, size_t n_tok,
                                         __m512 (*acc)[4])
{
    __m512 *sum = (__m512 *)p->sum + 4 * t;
    float *y = p->y + t * p->y_stride;
    if (!p->last) {
        MOE_UNROLL
        for (size_t i = 0; i < 4 * n_tok; i++)
            sum[i] = acc[i / 4][i % 4];
        return;
    }
    MOE_UNROLL
    for (size_t i = 0; i < n_tok; i += 2, y += 2 * p->y_stride) {
        const __m512 v = _mm512_mul_ps(x86_512_reduce8(acc[i], acc[n_tok == 1 ? 0 : i + 1]),
                                       _mm512_set1_ps(p->scale));
        x86_store_rows(y, _mm512_castps512_ps256(v), p->n_row);
        if (n_tok > 1)
            x86_store_rows(y + p->y_stride, _mm512_extractf32x8_ps(v, 1), p->n_row);
    }
}

/* As x86_float_get(). */
MOE_AVX512_INLINE void x86_512_float_get(const x86_float_part *p, size_t t, size_t n_tok,
                                         __m512 (*acc)[4])
{
    const __m512 *sum = (const __m512 *)p->sum + 4 * t;
    MOE_UNROLL
    for (size_t i = 0; i < 4 * n_tok; i++)
        acc[i / 4][i % 4] = _mm512_setzero_ps();
    if (!p->first) {
        MOE_UNROLL
        for (size_t i = 0; i < 4 * n_tok; i++)
            acc[i / 4][i % 4] = sum[i];
    }
}

/* As x86_float_step(); n_tok is 1 or even, <= X86_512_FLOAT_STEP. */
MOE_AVX512_INLINE void x86_512_float_step(const x86_float_part *p, size_t t, size_t n_tok,
                                          x86_512_multiply_fn *multiply)
{
    const uint8_t *x = p->x + t * p->x_stride;
    __m512 (*w)[4] = p->tile, acc[X86_512_FLOAT_STEP][4];
    x86_512_float_get(p, t, n_tok, acc);
    for (size_t k = 0; k < p->n_vector; k++, x += 32, w++)
        x86_512_float_eight(*w, x, p->x_stride, acc, n_tok, multiply);
    x86_512_float_put(p, t, n_tok, acc);
}

/* As x86_float_begin(). */
MOE_AVX512_INLINE void x86_512_float_begin(const x86_float_part *p, size_t n_tok, x86_float_type f,
                                           x86_512_pair_fn *pair, x86_512_multiply_fn *multiply)
{
    const uint8_t *x = p->x;
    __m512 (*w)[4] = p->tile, acc[X86_512_FLOAT_STEP][4];
    x86_512_float_get(p, 0, n_tok, acc);
    size_t k = 0;
    for (; k + f.unit <= p->n_k; k += f.unit) {
        const size_t at = k * f.item_bytes;
        if (p->ahead)
            x86_float_fetch(p, k, f, X86_512_FLOAT_ROWS);
        MOE_UNROLL
        for (size_t v = 0; v < f.vectors; v++, x += 32, w++) {
            MOE_UNROLL
            for (size_t i = 0; i < 4; i++)
                (*w)[i] = pair(p->row[2 * i] + at, p->row[2 * i + 1] + at, v);
            x86_512_float_eight(*w, x, p->x_stride, acc, n_tok, multiply);
        }
    }
    if (k < p->n_k) {
        uint8_t copy[X86_512_FLOAT_ROWS][32];
        for (size_t i = 0; i < X86_512_FLOAT_ROWS; i++)
            x86_float_last(p->row[i] + k * f.item_bytes, p->n_k - k, f, copy[i]);
        for (size_t v = 0; v < f.vectors; v++, x += 32, w++) {
            for (size_t i = 0; i < 4; i++)
                (*w)[i] = pair(copy[2 * i], copy[2 * i + 1], v);
            x86_512_float_eight(*w, x, p->x_stride, acc, n_tok, multiply);
        }
    }
    x86_512_float_put(p, 0, n_tok, acc);
}

/* The tokens from t on; multiply is constant. */
MOE_AVX512_INLINE void x86_512_float_steps(const x86_float_part *p, size_t t,
                                           x86_512_multiply_fn *multiply)
{
    for (; t + X86_512_FLOAT_STEP <= p->n_tok; t += X86_512_FLOAT_STEP)
        x86_512_float_step(p, t, X86_512_FLOAT_STEP, multiply);
    for (; t + 4 <= p->n_tok; t += 4)
        x86_512_float_step(p, t, 4, multiply);
    for (; t + 2 <= p->n_tok; t += 2)
        x86_512_float_step(p, t, 2, multiply);
    if (t < p->n_tok)
        x86_512_float_step(p, t, 1, multiply);
}

/* The first step of the body of an x86_float_part_fn; returns how many tokens it took. */
MOE_AVX512_INLINE size_t x86_512_float_first(const x86_float_part *p, x86_float_type f,
                                             x86_512_pair_fn *pair, x86_512_multiply_fn *multiply)
{
    if (p->n_tok >= X86_512_FLOAT_STEP) {
        x86_512_float_begin(p, X86_512_FLOAT_STEP, f, pair, multiply);
        return X86_512_FLOAT_STEP;
    }
    if (p->n_tok >= 4) {
        x86_512_float_begin(p, 4, f, pair, multiply);
        return 4;
    }
    if (p->n_tok >= 2) {
        x86_512_float_begin(p, 2, f, pair, multiply);
        return 2;
    }
    x86_512_float_begin(p, 1, f, pair, multiply);
    return 1;
}

/* The rest of it, of types that are multiplied as floats. */
MOE_AVX512 MOE_UNUSED static void x86_512_float_rest(const x86_float_part *p, size_t t)
{
    x86_512_float_steps(p, t, x86_512_fma);
}

/* The body of an x86_float_part_fn. */
MOE_AVX512_INLINE void x86_512_float_tokens(const x86_float_part *p, x86_float_type f,
                                            x86_512_pair_fn *pair)
{
    const size_t t = x86_512_float_first(p, f, pair, x86_512_fma);
    if (t < p->n_tok)
        x86_512_float_rest(p, t);
}

MOE_AVX512 MOE_UNUSED static void x86_512_float_gemm(const moe_mm *mm, x86_float_type f,
                                                     x86_float_part_fn *run)
{
    x86_float_memory memory;
    x86_float_cut(mm, f, X86_512_FLOAT_ROWS, &memory, run);
}

#endif
#endif
