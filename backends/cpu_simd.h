/* backends/cpu_simd.h - float kernels that are no matrix products: softmax, normalization,
 * exponentials, conversions.
 *
 * Each kernel stands first in C, which specifies its result to the bit, then in AVX2, where longer
 * vectors pay in AVX-512, and in NEON, which give the same bits. The rules of quant/quant.h hold:
 * sums run in 8 lanes (lane l takes the elements l mod 8, ascending) and are added by reduce8(); a
 * multiplication feeds an addition only through fmaf. cpu_simd_select() picks the set for a
 * machine. Nothing here knows about threads or operations. */
#ifndef MOE_BACKENDS_CPU_SIMD_H
#define MOE_BACKENDS_CPU_SIMD_H

#include "../quant/arm.h"
#include "../quant/quant.h"
#if MOE_X86
#include MOE_X86_INTRINSICS
#endif

/* Scores of attention, one query per column. */
typedef struct cpu_columns {
    float *x;                    // [n_row][stride]
    size_t stride, n_row, n_col; // n_col: a multiple of 16
    const uint32_t *first, *end; // [n_col]: the rows of each column that count are [first, end)
    float *max, *sum;            // [n_col]
} cpu_columns;

typedef struct cpu_simd {
    /* sum of x[i] * x[i] */
    float (*sum_squares)(const float *x, size_t n);
    /* dst = (src * factor) * weight; weight may be NULL: 1 */
    void (*scale_rows)(float *dst, const float *src, float factor, const float *weight, size_t n);
    /* the largest element */
    float (*max)(const float *x, size_t n);
    /* x[i] = exp(x[i] - max); returns the sum */
    float (*exp_sum)(float *x, size_t n, float max);
    /* max() of each column, then exp_sum(); rows that do not count become 0 */
    void (*exp_columns)(const cpu_columns *c);
    /* dst = silu(gate) * up */
    void (*silu)(float *dst, const float *gate, const float *up, size_t n);
    /* dst = sigmoid(gate) * up */
    void (*sigmoid)(float *dst, const float *gate, const float *up, size_t n);
    /* dst = gelu_tanh(gate) * up */
    void (*gelu)(float *dst, const float *gate, const float *up, size_t n);
    /* dst = gate sigmoid(alpha gate) * (up + 1), gate at most limit, up within -limit and limit */
    void (*silu_clamped)(float *dst, const float *gate, const float *up, float alpha, float limit,
                         size_t n);
    /* x = cap tanh(x / cap) */
    void (*softcap)(float *x, float cap, size_t n);
    /* dst = a + scale * b */
    void (*add)(float *dst, const float *a, const float *b, float scale, size_t n);
    /* Turns n pairs (x[i * step], x[i * step + mate]) by the angles of table: cosine, sine, ... */
    void (*rope)(float *x, const float *table, size_t n, size_t step, size_t mate);
    void (*f32_of_f16)(float *dst, const uint8_t *src, size_t n);
    /* n elements, a multiple of 32, of blocks of Q8_0 (quant/q8_0.h) */
    void (*f32_of_q8_0)(float *dst, const uint8_t *src, size_t n);
    void (*f16_of_f32)(uint8_t *dst, const float *src, size_t n);
} cpu_simd;

/* ------------------------------------------------------------------------------------- C -- */

/* exp(x) for the x of a softmax or a sigmoid: clamped to [-87, 88], so that neither infinities nor
 * subnormal numbers occur. x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) is its Taylor polynomial of
 * degree 7, whose remainder is below 6e-9; with roundings the relative error is under 1.5e-7. */
#define EXP_MIN -87.0f
#define EXP_MAX 88.0f
#define EXP_LOG2E 0x1.715476p+0f
#define EXP_LN2_HIGH 0x1.62e400p-1f  /* 16 bits: n * this is exact */
#define EXP_LN2_LOW 0x1.7f7d1cp-20f
#define EXP_MAGIC 0x1.8p23f          /* adding it rounds to an integer in the low bits */
static const float exp_taylor[8] = {1.0f,        1.0f,         1.0f / 2,   1.0f / 6,
                                    1.0f / 24,   1.0f / 120,   1.0f / 720, 1.0f / 5040};

static float cpu_exp(float x)
{
    x = x < EXP_MIN ? EXP_MIN : x;
    x = x > EXP_MAX ? EXP_MAX : x;
    float shifted = fmaf(x, EXP_LOG2E, EXP_MAGIC);
    float n = shifted - EXP_MAGIC;
    float r = fmaf(n, -EXP_LN2_HIGH, x);
    r = fmaf(n, -EXP_LN2_LOW, r);
    float p = exp_taylor[7];
    for (int i = 6; i >= 0; i--)
        p = fmaf(p, r, exp_taylor[i]);
    return p * f32_of_bits((bits_of_f32(shifted) + 127) << 23);
}

/* 1 / (1 + exp(-x)) */
static float cpu_sigmoid(float x)
{
    return 1.0f / (1.0f + cpu_exp(-x));
}

/* tanh(x) = 2 sigmoid(2x) - 1; absolute error under 3e-7, which is what a soft cap needs. */
static float cpu_tanh(float x)
{
    return fmaf(2.0f, cpu_sigmoid(2.0f * x), -1.0f);
}

/* gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
 * Hendrycks and Gimpel 2016, arXiv:1606.08415. */
#define GELU_CUBIC 0.044715f
#define GELU_SLOPE 1.59576912160573f /* 2 sqrt(2/pi) */

static float cpu_gelu(float x)
{
    float cubic = fmaf(GELU_CUBIC * x, x, 1.0f);
    return x * cpu_sigmoid(GELU_SLOPE * x * cubic);
}

static float sum_squares_c(const float *x, size_t n)
{
    float lane[8] = {0};
    for (size_t i = 0; i < n; i++)
        lane[i % 8] = fmaf(x[i], x[i], lane[i % 8]);
    return reduce8(lane);
}

static void scale_rows_c(float *dst, const float *src, float factor, const float *weight, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = src[i] * factor * (weight ? weight[i] : 1.0f);
}

/* NaN is passed over: exp_sum() brings it to light. Of two zeros, +0. */
static float max_c(const float *x, size_t n)
{
    float max = -INFINITY;
    for (size_t i = 0; i < n; i++)
        max = x[i] > max ? x[i] : max;
    return max + 0.0f;
}

static float exp_sum_c(float *x, size_t n, float max)
{
    float lane[8] = {0};
    for (size_t i = 0; i < n; i++) {
        x[i] = cpu_exp(x[i] - max);
        lane[i % 8] += x[i];
    }
    return reduce8(lane);
}

static void exp_columns_c(const cpu_columns *c)
{
    for (size_t x = 0; x < c->n_col; x++) {
        float max = -INFINITY, lane[8] = {0};
        for (size_t j = c->first[x]; j < c->end[x]; j++)
            max = c->x[j * c->stride + x] > max ? c->x[j * c->stride + x] : max;
        c->max[x] = max + 0.0f;
        for (size_t j = 0; j < c->n_row; j++) {
            float *e = c->x + j * c->stride + x;
            const bool counts = j >= c->first[x] && j < c->end[x];
            *e = counts ? cpu_exp(*e - c->max[x]) : 0;
            if (counts)
                lane[(j - c->first[x]) % 8] += *e;
        }
        c->sum[x] = reduce8(lane);
    }
}

/* Whether all rows of columns [x, x + n) count. */
MOE_INLINE bool columns_are_whole(const cpu_columns *c, size_t x, size_t n)
{
    uint32_t missing = 0;
    for (size_t i = x; i < x + n; i++)
        missing |= c->first[i] | (c->end[i] ^ (uint32_t)c->n_row);
    return !missing;
}

/* The sums of columns [x, x + n) from sums[r][n] over the rows r modulo 8. */
MOE_UNUSED static void columns_reduce(const cpu_columns *c, size_t x, size_t n, const float *sums)
{
    for (size_t i = 0; i < n; i++) {
        float lane[8];
        for (size_t r = 0; r < 8; r++)
            lane[r] = sums[(r + c->first[x + i]) % 8 * n + i];
        c->sum[x + i] = reduce8(lane);
    }
}

static void silu_c(float *dst, const float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = gate[i] * cpu_sigmoid(gate[i]) * up[i];
}

static void sigmoid_c(float *dst, const float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = cpu_sigmoid(gate[i]) * up[i];
}

static void gelu_c(float *dst, const float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = cpu_gelu(gate[i]) * up[i];
}

static void silu_clamped_c(float *dst, const float *gate, const float *up, float alpha, float limit,
                           size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const float g = gate[i] > limit ? limit : gate[i];
        float u = up[i] > limit ? limit : up[i];
        u = u < -limit ? -limit : u;
        dst[i] = g * cpu_sigmoid(alpha * g) * (u + 1.0f);
    }
}

static void softcap_c(float *x, float cap, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = cap * cpu_tanh(x[i] / cap);
}

static void add_c(float *dst, const float *a, const float *b, float scale, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = fmaf(scale, b[i], a[i]);
}

MOE_INLINE void rope_pairs(float *x, const float *table, size_t n, size_t step, size_t mate)
{
    for (size_t i = 0; i < n; i++) {
        float *a = x + i * step, *b = a + mate;
        const float cosine = table[2 * i], sine = table[2 * i + 1];
        const float minus = *b * sine, plus = *b * cosine;
        const float turned = fmaf(*a, cosine, -minus);
        *b = fmaf(*a, sine, plus);
        *a = turned;
    }
}

static void rope_c(float *x, const float *table, size_t n, size_t step, size_t mate)
{
    rope_pairs(x, table, n, step, mate);
}

static void f32_of_f16_c(float *dst, const uint8_t *src, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = f32_of_f16(load_u16(src + 2 * i));
}

enum { Q8_0_BYTES = 34 }; /* of a block: scale, 32 codes */

static void f32_of_q8_0_c(float *dst, const uint8_t *src, size_t n)
{
    for (; n; n -= 32, src += Q8_0_BYTES, dst += 32) {
        const float d = f32_of_f16(load_u16(src));
        for (size_t k = 0; k < 32; k++)
            dst[k] = d * (float)(int8_t)src[2 + k];
    }
}

static void f16_of_f32_c(uint8_t *dst, const float *src, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t h = f16_of_f32(src[i]);
        memcpy(dst + 2 * i, &h, 2);
    }
}

static const cpu_simd cpu_simd_c = {
    .sum_squares = sum_squares_c,
    .scale_rows = scale_rows_c,
    .max = max_c,
    .exp_sum = exp_sum_c,
    .exp_columns = exp_columns_c,
    .silu = silu_c,
    .sigmoid = sigmoid_c,
    .gelu = gelu_c,
    .silu_clamped = silu_clamped_c,
    .softcap = softcap_c,
    .add = add_c,
    .rope = rope_c,
    .f32_of_f16 = f32_of_f16_c,
    .f32_of_q8_0 = f32_of_q8_0_c,
    .f16_of_f32 = f16_of_f32_c,
};

/* ---------------------------------------------------------------------------------- AVX2 -- */

#if MOE_X86
#define AVX2 MOE_TARGET("avx2,fma,f16c")

/* reduce8() of a register. */
AVX2 MOE_INLINE float reduce8_avx2(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The first n < 8 floats, the rest 0; and back. */
AVX2 MOE_INLINE __m256i tail_mask_avx2(size_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* n vectors at once, a constant: the steps of one wait for each other, and those of several fill
 * the gaps. */
AVX2 MOE_INLINE void exp_many_avx2(__m256 *x, size_t n)
{
    const __m256 magic = _mm256_set1_ps(EXP_MAGIC);
    __m256 shifted[4], p[4];
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        x[i] = _mm256_max_ps(_mm256_set1_ps(EXP_MIN), x[i]); /* the order keeps NaN */
        x[i] = _mm256_min_ps(_mm256_set1_ps(EXP_MAX), x[i]);
        shifted[i] = _mm256_fmadd_ps(x[i], _mm256_set1_ps(EXP_LOG2E), magic);
    }
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        const __m256 round = _mm256_sub_ps(shifted[i], magic);
        x[i] = _mm256_fmadd_ps(round, _mm256_set1_ps(-EXP_LN2_HIGH), x[i]);
        x[i] = _mm256_fmadd_ps(round, _mm256_set1_ps(-EXP_LN2_LOW), x[i]);
        p[i] = _mm256_set1_ps(exp_taylor[7]);
    }
    MOE_UNROLL
    for (int k = 6; k >= 0; k--)
        MOE_UNROLL
        for (size_t i = 0; i < n; i++)
            p[i] = _mm256_fmadd_ps(p[i], x[i], _mm256_set1_ps(exp_taylor[k]));
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        __m256i power = _mm256_add_epi32(_mm256_castps_si256(shifted[i]), _mm256_set1_epi32(127));
        x[i] = _mm256_mul_ps(p[i], _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
    }
}

AVX2 MOE_INLINE __m256 exp_avx2(__m256 x)
{
    exp_many_avx2(&x, 1);
    return x;
}

AVX2 MOE_INLINE __m256 sigmoid_avx2(__m256 x)
{
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_div_ps(one, _mm256_add_ps(one, exp_avx2(minus)));
}

AVX2 static float sum_squares_avx2(const float *x, size_t n)
{
    __m256 sum = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    if (i < n) {
        __m256 v = _mm256_maskload_ps(x + i, tail_mask_avx2(n - i));
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    return reduce8_avx2(sum);
}

AVX2 static void scale_rows_avx2(float *dst, const float *src, float factor, const float *weight,
                                 size_t n)
{
    const __m256 f = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(src + i), f);
        if (weight)
            v = _mm256_mul_ps(v, _mm256_loadu_ps(weight + i));
        _mm256_storeu_ps(dst + i, v);
    }
    scale_rows_c(dst + i, src + i, factor, weight ? weight + i : NULL, n - i);
}

AVX2 static float max_avx2(const float *x, size_t n)
{
    __m256 max = _mm256_set1_ps(-INFINITY);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        max = _mm256_max_ps(_mm256_loadu_ps(x + i), max); /* the order passes over NaN */
    float lane[9];
    _mm256_storeu_ps(lane, max);
    lane[8] = max_c(x + i, n - i);
    return max_c(lane, 9);
}

AVX2 static float exp_sum_avx2(float *x, size_t n, float max)
{
    const __m256 m = _mm256_set1_ps(max);
    __m256 sum = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 e = exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i), m));
        _mm256_storeu_ps(x + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    if (i < n) {
        __m256i mask = tail_mask_avx2(n - i);
        __m256 e = exp_avx2(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), m));
        _mm256_maskstore_ps(x + i, mask, e);
        sum = _mm256_add_ps(sum, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
    }
    return reduce8_avx2(sum);
}

/* Where row j counts: first <= j < end. */
AVX2 MOE_INLINE __m256 row_counts_avx2(__m256i first, __m256i end, size_t j)
{
    const __m256i row = _mm256_set1_epi32((int)j);
    return _mm256_castsi256_ps(
        _mm256_andnot_si256(_mm256_cmpgt_epi32(first, row), _mm256_cmpgt_epi32(end, row)));
}

/* Columns [x, x + 8); `whole`: all their rows count. */
typedef struct exp_strip_x8 {
    const cpu_columns *c;
    size_t x;
    bool whole;
    __m256i first, end;
    __m256 max;
} exp_strip_x8;

AVX2 MOE_INLINE __m256 max_strip_avx2(const exp_strip_x8 *s)
{
    const __m256 least = _mm256_set1_ps(-INFINITY);
    __m256 max = least;
    for (size_t j = 0; j < s->c->n_row; j++) {
        __m256 v = _mm256_loadu_ps(s->c->x + j * s->c->stride + s->x);
        if (!s->whole)
            v = _mm256_blendv_ps(least, v, row_counts_avx2(s->first, s->end, j));
        max = _mm256_max_ps(v, max); /* the order passes over NaN */
    }
    return _mm256_add_ps(max, _mm256_setzero_ps());
}

/* Rows [j, j + n), n <= 4. */
AVX2 MOE_INLINE void exp_rows_avx2(const exp_strip_x8 *s, size_t j, size_t n, __m256 *sums)
{
    float *row = s->c->x + j * s->c->stride + s->x;
    __m256 e[4];
    MOE_UNROLL
    for (size_t i = 0; i < n; i++)
        e[i] = _mm256_sub_ps(_mm256_loadu_ps(row + i * s->c->stride), s->max);
    exp_many_avx2(e, n);
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        if (!s->whole)
            e[i] = _mm256_and_ps(e[i], row_counts_avx2(s->first, s->end, j + i));
        _mm256_storeu_ps(row + i * s->c->stride, e[i]);
        sums[i] = _mm256_add_ps(sums[i], e[i]);
    }
}

AVX2 MOE_INLINE void exp_strip_avx2(const cpu_columns *c, size_t x, bool whole)
{
    exp_strip_x8 s = {c, x, whole, _mm256_loadu_si256((const __m256i *)(c->first + x)),
                      _mm256_loadu_si256((const __m256i *)(c->end + x)), _mm256_setzero_ps()};
    __m256 sums[8];
    for (size_t r = 0; r < 8; r++)
        sums[r] = _mm256_setzero_ps();
    s.max = max_strip_avx2(&s);
    _mm256_storeu_ps(c->max + x, s.max);
    size_t j = 0;
    for (; j + 4 <= c->n_row; j += 4)
        exp_rows_avx2(&s, j, 4, sums + j % 8);
    for (; j < c->n_row; j++)
        exp_rows_avx2(&s, j, 1, sums + j % 8);
    if (!whole) {
        columns_reduce(c, x, 8, (const float *)sums);
        return;
    }
    for (size_t half = 4; half; half /= 2)
        for (size_t r = 0; r < half; r++)
            sums[r] = _mm256_add_ps(sums[r], sums[r + half]);
    _mm256_storeu_ps(c->sum + x, sums[0]);
}

AVX2 static void exp_columns_avx2(const cpu_columns *c)
{
    for (size_t x = 0; x < c->n_col; x += 8)
        if (columns_are_whole(c, x, 8))
            exp_strip_avx2(c, x, true);
        else
            exp_strip_avx2(c, x, false);
}

AVX2 static void silu_avx2(float *dst, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i);
        __m256 s = _mm256_mul_ps(g, sigmoid_avx2(g));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(s, _mm256_loadu_ps(up + i)));
    }
    silu_c(dst + i, gate + i, up + i, n - i);
}

AVX2 static void sigmoid_rows_avx2(float *dst, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(sigmoid_avx2(_mm256_loadu_ps(gate + i)),
                                                _mm256_loadu_ps(up + i)));
    sigmoid_c(dst + i, gate + i, up + i, n - i);
}

AVX2 static void gelu_avx2(float *dst, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(gate + i);
        __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(GELU_CUBIC), x), x,
                                       _mm256_set1_ps(1.0f));
        __m256 u = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(GELU_SLOPE), x), cubic);
        __m256 y = _mm256_mul_ps(x, sigmoid_avx2(u));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(y, _mm256_loadu_ps(up + i)));
    }
    gelu_c(dst + i, gate + i, up + i, n - i);
}

/* Of a NaN and a limit, min and max return their second operand: NaN. */
AVX2 static void silu_clamped_avx2(float *dst, const float *gate, const float *up, float alpha,
                                   float limit, size_t n)
{
    const __m256 high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 g = _mm256_min_ps(high, _mm256_loadu_ps(gate + i));
        __m256 u = _mm256_max_ps(low, _mm256_min_ps(high, _mm256_loadu_ps(up + i)));
        __m256 s = _mm256_mul_ps(g, sigmoid_avx2(_mm256_mul_ps(_mm256_set1_ps(alpha), g)));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(s, _mm256_add_ps(u, _mm256_set1_ps(1.0f))));
    }
    silu_clamped_c(dst + i, gate + i, up + i, alpha, limit, n - i);
}

AVX2 static void softcap_avx2(float *x, float cap, size_t n)
{
    const __m256 c = _mm256_set1_ps(cap), two = _mm256_set1_ps(2.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_div_ps(_mm256_loadu_ps(x + i), c);
        __m256 tanh = _mm256_fmadd_ps(two, sigmoid_avx2(_mm256_mul_ps(two, v)),
                                      _mm256_set1_ps(-1.0f));
        _mm256_storeu_ps(x + i, _mm256_mul_ps(c, tanh));
    }
    softcap_c(x + i, cap, n - i);
}

AVX2 static void add_avx2(float *dst, const float *a, const float *b, float scale, size_t n)
{
    const __m256 s = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i,
                         _mm256_fmadd_ps(s, _mm256_loadu_ps(b + i), _mm256_loadu_ps(a + i)));
    add_c(dst + i, a + i, b + i, scale, n - i);
}

/* The C function, compiled with instructions for fmaf. */
AVX2 static void rope_avx2(float *x, const float *table, size_t n, size_t step, size_t mate)
{
    rope_pairs(x, table, n, step, mate);
}

AVX2 static void f32_of_f16_avx2(float *dst, const uint8_t *src, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + 2 * i))));
    f32_of_f16_c(dst + i, src + 2 * i, n - i);
}

AVX2 static void f32_of_q8_0_avx2(float *dst, const uint8_t *src, size_t n)
{
    for (; n; n -= 32, src += Q8_0_BYTES, dst += 32) {
        const __m256 d = _mm256_set1_ps(f32_of_f16(load_u16(src)));
        MOE_UNROLL
        for (size_t k = 0; k < 32; k += 8) {
            const __m128i codes = _mm_loadl_epi64((const __m128i *)(src + 2 + k));
            const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            _mm256_storeu_ps(dst + k, _mm256_mul_ps(d, x));
        }
    }
}

AVX2 static void f16_of_f32_avx2(uint8_t *dst, const float *src, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(dst + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    f16_of_f32_c(dst + 2 * i, src + i, n - i);
}

static const cpu_simd cpu_simd_avx2 = {
    .sum_squares = sum_squares_avx2,
    .scale_rows = scale_rows_avx2,
    .max = max_avx2,
    .exp_sum = exp_sum_avx2,
    .exp_columns = exp_columns_avx2,
    .silu = silu_avx2,
    .sigmoid = sigmoid_rows_avx2,
    .gelu = gelu_avx2,
    .silu_clamped = silu_clamped_avx2,
    .softcap = softcap_avx2,
    .add = add_avx2,
    .rope = rope_avx2,
    .f32_of_f16 = f32_of_f16_avx2,
    .f32_of_q8_0 = f32_of_q8_0_avx2,
    .f16_of_f32 = f16_of_f32_avx2,
};

/* ------------------------------------------------------------------------------- AVX-512 -- */

/* What a long context spends its time with. The rest gains nothing from longer vectors. */
#define AVX512 MOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

AVX512 MOE_INLINE void exp_many_avx512(__m512 *x, size_t n)
{
    const __m512 magic = _mm512_set1_ps(EXP_MAGIC);
    __m512 shifted[4], p[4];
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        x[i] = _mm512_max_ps(_mm512_set1_ps(EXP_MIN), x[i]); /* the order keeps NaN */
        x[i] = _mm512_min_ps(_mm512_set1_ps(EXP_MAX), x[i]);
        shifted[i] = _mm512_fmadd_ps(x[i], _mm512_set1_ps(EXP_LOG2E), magic);
    }
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        const __m512 round = _mm512_sub_ps(shifted[i], magic);
        x[i] = _mm512_fmadd_ps(round, _mm512_set1_ps(-EXP_LN2_HIGH), x[i]);
        x[i] = _mm512_fmadd_ps(round, _mm512_set1_ps(-EXP_LN2_LOW), x[i]);
        p[i] = _mm512_set1_ps(exp_taylor[7]);
    }
    MOE_UNROLL
    for (int k = 6; k >= 0; k--)
        MOE_UNROLL
        for (size_t i = 0; i < n; i++)
            p[i] = _mm512_fmadd_ps(p[i], x[i], _mm512_set1_ps(exp_taylor[k]));
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        __m512i power = _mm512_add_epi32(_mm512_castps_si512(shifted[i]), _mm512_set1_epi32(127));
        x[i] = _mm512_mul_ps(p[i], _mm512_castsi512_ps(_mm512_slli_epi32(power, 23)));
    }
}

AVX512 MOE_INLINE __m512 exp_avx512(__m512 x)
{
    exp_many_avx512(&x, 1);
    return x;
}

/* The first n < 16 lanes. */
AVX512 MOE_INLINE __mmask16 first_lanes_avx512(size_t n)
{
    return (__mmask16)((1u << n) - 1);
}

/* 16 at a time; the 8 lanes take the lower half, then the upper one. */
AVX512 static float exp_sum_avx512(float *x, size_t n, float max)
{
    const __m512 m = _mm512_set1_ps(max);
    __m256 sum = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 e = exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + i), m));
        _mm512_storeu_ps(x + i, e);
        sum = _mm256_add_ps(sum, _mm512_castps512_ps256(e));
        sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(e, 1));
    }
    if (i < n) {
        const __mmask16 some = first_lanes_avx512(n - i);
        __m512 e = exp_avx512(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, x + i), m));
        e = _mm512_maskz_mov_ps(some, e);
        _mm512_mask_storeu_ps(x + i, some, e);
        sum = _mm256_add_ps(sum, _mm512_castps512_ps256(e));
        sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(e, 1));
    }
    return reduce8_avx2(sum);
}

AVX512 static float max_avx512(const float *x, size_t n)
{
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 even = least, odd = least;
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        even = _mm512_max_ps(_mm512_loadu_ps(x + i), even); /* the order passes over NaN */
        odd = _mm512_max_ps(_mm512_loadu_ps(x + i + 16), odd);
    }
    for (; i < n; i += 16) {
        const __mmask16 some = n - i < 16 ? first_lanes_avx512(n - i) : (__mmask16)0xffff;
        even = _mm512_max_ps(_mm512_mask_loadu_ps(least, some, x + i), even);
    }
    float lane[16];
    _mm512_storeu_ps(lane, _mm512_max_ps(even, odd));
    return max_avx2(lane, 16);
}

/* Where row j counts: first <= j < end. */
AVX512 MOE_INLINE __mmask16 row_counts_avx512(__m512i first, __m512i end, size_t j)
{
    const __m512i row = _mm512_set1_epi32((int)j);
    return (__mmask16)(_mm512_cmpgt_epi32_mask(end, row) & ~_mm512_cmpgt_epi32_mask(first, row));
}

/* Columns [x, x + 16); `whole`: all their rows count. */
typedef struct exp_strip_x16 {
    const cpu_columns *c;
    size_t x;
    bool whole;
    __m512i first, end;
    __m512 max;
} exp_strip_x16;

AVX512 MOE_INLINE __m512 max_strip_avx512(const exp_strip_x16 *s)
{
    __m512 max = _mm512_set1_ps(-INFINITY);
    for (size_t j = 0; j < s->c->n_row; j++) {
        const __m512 v = _mm512_loadu_ps(s->c->x + j * s->c->stride + s->x);
        const __mmask16 counts = s->whole ? (__mmask16)0xffff
                                          : row_counts_avx512(s->first, s->end, j);
        max = _mm512_mask_max_ps(max, counts, v, max); /* the order passes over NaN */
    }
    return _mm512_add_ps(max, _mm512_setzero_ps());
}

/* Rows [j, j + n), n <= 4. */
AVX512 MOE_INLINE void exp_rows_avx512(const exp_strip_x16 *s, size_t j, size_t n, __m512 *sums)
{
    float *row = s->c->x + j * s->c->stride + s->x;
    __m512 e[4];
    MOE_UNROLL
    for (size_t i = 0; i < n; i++)
        e[i] = _mm512_sub_ps(_mm512_loadu_ps(row + i * s->c->stride), s->max);
    exp_many_avx512(e, n);
    MOE_UNROLL
    for (size_t i = 0; i < n; i++) {
        if (!s->whole)
            e[i] = _mm512_maskz_mov_ps(row_counts_avx512(s->first, s->end, j + i), e[i]);
        _mm512_storeu_ps(row + i * s->c->stride, e[i]);
        sums[i] = _mm512_add_ps(sums[i], e[i]);
    }
}

AVX512 MOE_INLINE void exp_strip_avx512(const cpu_columns *c, size_t x, bool whole)
{
    exp_strip_x16 s = {c, x, whole, _mm512_loadu_si512(c->first + x),
                       _mm512_loadu_si512(c->end + x), _mm512_setzero_ps()};
    __m512 sums[8];
    for (size_t r = 0; r < 8; r++)
        sums[r] = _mm512_setzero_ps();
    s.max = max_strip_avx512(&s);
    _mm512_storeu_ps(c->max + x, s.max);
    size_t j = 0;
    for (; j + 4 <= c->n_row; j += 4)
        exp_rows_avx512(&s, j, 4, sums + j % 8);
    for (; j < c->n_row; j++)
        exp_rows_avx512(&s, j, 1, sums + j % 8);
    if (!whole) {
        columns_reduce(c, x, 16, (const float *)sums);
        return;
    }
    for (size_t half = 4; half; half /= 2)
        for (size_t r = 0; r < half; r++)
            sums[r] = _mm512_add_ps(sums[r], sums[r + half]);
    _mm512_storeu_ps(c->sum + x, sums[0]);
}

AVX512 static void exp_columns_avx512(const cpu_columns *c)
{
    for (size_t x = 0; x < c->n_col; x += 16)
        if (columns_are_whole(c, x, 16))
            exp_strip_avx512(c, x, true);
        else
            exp_strip_avx512(c, x, false);
}

AVX512 static void silu_avx512(float *dst, const float *gate, const float *up, size_t n)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 g = _mm512_loadu_ps(gate + i);
        __m512 e = exp_avx512(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f)));
        __m512 s = _mm512_mul_ps(g, _mm512_div_ps(one, _mm512_add_ps(one, e)));
        _mm512_storeu_ps(dst + i, _mm512_mul_ps(s, _mm512_loadu_ps(up + i)));
    }
    silu_avx2(dst + i, gate + i, up + i, n - i);
}

AVX512 static void f32_of_f16_avx512(float *dst, const uint8_t *src, size_t n)
{
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(dst + i,
                         _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src + 2 * i))));
    f32_of_f16_avx2(dst + i, src + 2 * i, n - i);
}

static const cpu_simd cpu_simd_avx512 = {
    .sum_squares = sum_squares_avx2,
    .scale_rows = scale_rows_avx2,
    .max = max_avx512,
    .exp_sum = exp_sum_avx512,
    .exp_columns = exp_columns_avx512,
    .silu = silu_avx512,
    .sigmoid = sigmoid_rows_avx2,
    .gelu = gelu_avx2,
    .silu_clamped = silu_clamped_avx2,
    .softcap = softcap_avx2,
    .add = add_avx2,
    .rope = rope_avx2,
    .f32_of_f16 = f32_of_f16_avx512,
    .f32_of_q8_0 = f32_of_q8_0_avx2,
    .f16_of_f32 = f16_of_f32_avx2,
};
#undef AVX512
#undef AVX2
#endif

/* ---------------------------------------------------------------------------------- NEON -- */

#if MOE_ARM64
/* Two registers are the 8 lanes. What is left over after the last 8 elements is added to their
 * lanes one by one. */
typedef float32x4x2_t f32x8;

MOE_INLINE f32x8 load8_neon(const float *p)
{
    return (f32x8){{vld1q_f32(p), vld1q_f32(p + 4)}};
}

MOE_INLINE void store8_neon(float *p, f32x8 v)
{
    vst1q_f32(p, v.val[0]);
    vst1q_f32(p + 4, v.val[1]);
}

MOE_INLINE f32x8 same8_neon(float x)
{
    return (f32x8){{vdupq_n_f32(x), vdupq_n_f32(x)}};
}

/* a + b * c */
MOE_INLINE f32x8 fma8_neon(f32x8 a, f32x8 b, f32x8 c)
{
    return (f32x8){{vfmaq_f32(a.val[0], b.val[0], c.val[0]),
                    vfmaq_f32(a.val[1], b.val[1], c.val[1])}};
}

MOE_INLINE float32x4_t exp_neon(float32x4_t x)
{
    x = vmaxq_f32(x, vdupq_n_f32(EXP_MIN)); /* keeps NaN */
    x = vminq_f32(x, vdupq_n_f32(EXP_MAX));
    const float32x4_t magic = vdupq_n_f32(EXP_MAGIC);
    float32x4_t shifted = vfmaq_f32(magic, x, vdupq_n_f32(EXP_LOG2E));
    float32x4_t n = vsubq_f32(shifted, magic);
    float32x4_t r = vfmaq_f32(x, n, vdupq_n_f32(-EXP_LN2_HIGH));
    r = vfmaq_f32(r, n, vdupq_n_f32(-EXP_LN2_LOW));
    float32x4_t p = vdupq_n_f32(exp_taylor[7]);
    for (int i = 6; i >= 0; i--)
        p = vfmaq_f32(vdupq_n_f32(exp_taylor[i]), p, r);
    uint32x4_t power = vaddq_u32(vreinterpretq_u32_f32(shifted), vdupq_n_u32(127));
    return vmulq_f32(p, vreinterpretq_f32_u32(vshlq_n_u32(power, 23)));
}

MOE_INLINE float32x4_t sigmoid_neon(float32x4_t x)
{
    const float32x4_t one = vdupq_n_f32(1.0f);
    return vdivq_f32(one, vaddq_f32(one, exp_neon(vnegq_f32(x))));
}

static float sum_squares_neon(const float *x, size_t n)
{
    f32x8 sum = same8_neon(0);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        f32x8 v = load8_neon(x + i);
        sum = fma8_neon(sum, v, v);
    }
    float lane[8];
    store8_neon(lane, sum);
    for (; i < n; i++)
        lane[i % 8] = fmaf(x[i], x[i], lane[i % 8]);
    return reduce8(lane);
}

static void scale_rows_neon(float *dst, const float *src, float factor, const float *weight,
                            size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vmulq_n_f32(vld1q_f32(src + i), factor);
        if (weight)
            v = vmulq_f32(v, vld1q_f32(weight + i));
        vst1q_f32(dst + i, v);
    }
    scale_rows_c(dst + i, src + i, factor, weight ? weight + i : NULL, n - i);
}

static float max_neon(const float *x, size_t n)
{
    float32x4_t max = vdupq_n_f32(-INFINITY);
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        max = vmaxnmq_f32(vld1q_f32(x + i), max);
    float lane[5];
    vst1q_f32(lane, max);
    lane[4] = max_c(x + i, n - i);
    return max_c(lane, 5);
}

static float exp_sum_neon(float *x, size_t n, float max)
{
    const float32x4_t m = vdupq_n_f32(max);
    float32x4_t low = vdupq_n_f32(0), high = low;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        float32x4_t a = exp_neon(vsubq_f32(vld1q_f32(x + i), m));
        float32x4_t b = exp_neon(vsubq_f32(vld1q_f32(x + i + 4), m));
        vst1q_f32(x + i, a);
        vst1q_f32(x + i + 4, b);
        low = vaddq_f32(low, a);
        high = vaddq_f32(high, b);
    }
    float lane[8];
    store8_neon(lane, (f32x8){{low, high}});
    for (; i < n; i++) {
        x[i] = cpu_exp(x[i] - max);
        lane[i % 8] += x[i];
    }
    return reduce8(lane);
}

/* Where row j counts: first <= j < end. */
MOE_INLINE uint32x4_t row_counts_neon(uint32x4_t first, uint32x4_t end, size_t j)
{
    const uint32x4_t row = vdupq_n_u32((uint32_t)j);
    return vandq_u32(vcgeq_u32(row, first), vcltq_u32(row, end));
}

/* The columns [x, x + 4), one after another of the 8 sums; `whole`: all rows count. */
MOE_INLINE void exp_strip_neon(const cpu_columns *c, size_t x, bool whole)
{
    const uint32x4_t first = vld1q_u32(c->first + x), end = vld1q_u32(c->end + x);
    const float32x4_t least = vdupq_n_f32(-INFINITY);
    float sums[32];
    float32x4_t max = least;
    for (size_t j = 0; j < c->n_row; j++) {
        float32x4_t v = vld1q_f32(c->x + j * c->stride + x);
        if (!whole)
            v = vbslq_f32(row_counts_neon(first, end, j), v, least);
        max = vmaxnmq_f32(v, max);
    }
    max = vaddq_f32(max, vdupq_n_f32(0));
    vst1q_f32(c->max + x, max);
    for (size_t r = 0; r < 8; r++) {
        float32x4_t sum = vdupq_n_f32(0);
        for (size_t j = r; j < c->n_row; j += 8) {
            float *p = c->x + j * c->stride + x;
            float32x4_t e = exp_neon(vsubq_f32(vld1q_f32(p), max));
            if (!whole)
                e = vbslq_f32(row_counts_neon(first, end, j), e, vdupq_n_f32(0));
            vst1q_f32(p, e);
            sum = vaddq_f32(sum, e);
        }
        vst1q_f32(sums + 4 * r, sum);
    }
    columns_reduce(c, x, 4, sums);
}

static void exp_columns_neon(const cpu_columns *c)
{
    for (size_t x = 0; x < c->n_col; x += 4)
        if (columns_are_whole(c, x, 4))
            exp_strip_neon(c, x, true);
        else
            exp_strip_neon(c, x, false);
}

static void silu_neon(float *dst, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t g = vld1q_f32(gate + i);
        float32x4_t s = vmulq_f32(g, sigmoid_neon(g));
        vst1q_f32(dst + i, vmulq_f32(s, vld1q_f32(up + i)));
    }
    silu_c(dst + i, gate + i, up + i, n - i);
}

static void sigmoid_rows_neon(float *dst, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(dst + i, vmulq_f32(sigmoid_neon(vld1q_f32(gate + i)), vld1q_f32(up + i)));
    sigmoid_c(dst + i, gate + i, up + i, n - i);
}

static void gelu_neon(float *dst, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t x = vld1q_f32(gate + i);
        float32x4_t cubic = vfmaq_f32(vdupq_n_f32(1.0f), vmulq_n_f32(x, GELU_CUBIC), x);
        float32x4_t u = vmulq_f32(vmulq_n_f32(x, GELU_SLOPE), cubic);
        float32x4_t y = vmulq_f32(x, sigmoid_neon(u));
        vst1q_f32(dst + i, vmulq_f32(y, vld1q_f32(up + i)));
    }
    gelu_c(dst + i, gate + i, up + i, n - i);
}

static void silu_clamped_neon(float *dst, const float *gate, const float *up, float alpha,
                              float limit, size_t n)
{
    const float32x4_t high = vdupq_n_f32(limit), low = vdupq_n_f32(-limit);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t g = vminq_f32(vld1q_f32(gate + i), high);
        float32x4_t u = vmaxq_f32(vminq_f32(vld1q_f32(up + i), high), low);
        float32x4_t s = vmulq_f32(g, sigmoid_neon(vmulq_n_f32(g, alpha)));
        vst1q_f32(dst + i, vmulq_f32(s, vaddq_f32(u, vdupq_n_f32(1.0f))));
    }
    silu_clamped_c(dst + i, gate + i, up + i, alpha, limit, n - i);
}

static void softcap_neon(float *x, float cap, size_t n)
{
    const float32x4_t c = vdupq_n_f32(cap);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vdivq_f32(vld1q_f32(x + i), c);
        float32x4_t s = sigmoid_neon(vmulq_n_f32(v, 2.0f));
        vst1q_f32(x + i, vmulq_f32(c, vfmaq_n_f32(vdupq_n_f32(-1.0f), s, 2.0f)));
    }
    softcap_c(x + i, cap, n - i);
}

static void add_neon(float *dst, const float *a, const float *b, float scale, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(dst + i, vfmaq_n_f32(vld1q_f32(a + i), vld1q_f32(b + i), scale));
    add_c(dst + i, a + i, b + i, scale, n - i);
}

static void f32_of_f16_neon(float *dst, const uint8_t *src, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(dst + i, arm_f32_of_f16(vreinterpret_u16_u8(vld1_u8(src + 2 * i))));
    f32_of_f16_c(dst + i, src + 2 * i, n - i);
}

static void f32_of_q8_0_neon(float *dst, const uint8_t *src, size_t n)
{
    for (; n; n -= 32, src += Q8_0_BYTES, dst += 32) {
        const float d = f32_of_f16(load_u16(src));
        for (size_t k = 0; k < 32; k += 8) {
            const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(vld1_u8(src + 2 + k)));
            vst1q_f32(dst + k, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), d));
            vst1q_f32(dst + k + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(x))), d));
        }
    }
}

static void f16_of_f32_neon(uint8_t *dst, const float *src, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1_u8(dst + 2 * i, vreinterpret_u8_f16(vcvt_f16_f32(vld1q_f32(src + i))));
    f16_of_f32_c(dst + 2 * i, src + i, n - i);
}

static const cpu_simd cpu_simd_neon = {
    .sum_squares = sum_squares_neon,
    .scale_rows = scale_rows_neon,
    .max = max_neon,
    .exp_sum = exp_sum_neon,
    .exp_columns = exp_columns_neon,
    .silu = silu_neon,
    .sigmoid = sigmoid_rows_neon,
    .gelu = gelu_neon,
    .silu_clamped = silu_clamped_neon,
    .softcap = softcap_neon,
    .add = add_neon,
    .rope = rope_c,
    .f32_of_f16 = f32_of_f16_neon,
    .f32_of_q8_0 = f32_of_q8_0_neon,
    .f16_of_f32 = f16_of_f32_neon,
};
#endif

static const cpu_simd *cpu_simd_select(uint32_t cpu)
{
    const cpu_simd *best = &cpu_simd_c;
    (void)cpu;
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = &cpu_simd_avx2;
    if (cpu & MOE_CPU_AVX2 && cpu & MOE_CPU_AVX512)
        best = &cpu_simd_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = &cpu_simd_neon;
#endif
    return best;
}

#endif
