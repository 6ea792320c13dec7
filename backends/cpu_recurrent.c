/* backends/cpu_recurrent.c - operations of layers that carry a state from token to token:
 * convolution over a few positions, gated delta rule.
 *
 * A task owns a strip of columns and takes its tokens one after another, in the order of the
 * sequence, while the strip's state stays in L1. So the work is parallel over heads and columns,
 * and the bits depend on neither threads nor batches. docs/performance.md says what that costs
 * beside a form that is parallel over tokens.
 *
 * Each kernel stands first in C, which specifies it to the bit, then in AVX2, AVX-512 and NEON. */
#ifndef MOE_BACKENDS_CPU_RECURRENT_C
#define MOE_BACKENDS_CPU_RECURRENT_C

#include "cpu_ops.c"

enum {
    CPU_CONV_STRIP = 32, /* elements of a task: 2 MOE_CONV_MAX_TAP rows of them fit into a tile */
    CPU_GATES = 256 /* pairs of gates per task */
};

/* One token of one head, MOE_DELTA_BLOCK columns. Floats: */
typedef struct cpu_delta_step {
    float *state;         // [dim_k][MOE_DELTA_BLOCK]
    float *known;         // [MOE_DELTA_BLOCK]: state^T k, as `read` makes it; then state^T next
    const float *q, *k;   // [dim_k]
    const float *next;    // [dim_k]: k of the next token; NULL: there is none
    const float *v;       // [MOE_DELTA_BLOCK]
    float *dst;           // [MOE_DELTA_BLOCK]
    size_t dim_k;
    float decay, beta, scale;
} cpu_delta_step;

typedef struct cpu_recurrent {
    /* dst[i] = sum over k, ascending, of weight[k][i] * u[k][i], CPU_CONV_STRIP elements */
    void (*conv)(float *dst, const float *const *u, const float *weight, size_t n_tap);
    void (*delta_read)(float *known, const float *state, const float *k, size_t dim_k);
    void (*delta)(const cpu_delta_step *s);
} cpu_recurrent;

/* ------------------------------------------------------------------------------------- C -- */

static void conv_c(float *dst, const float *const *u, const float *weight, size_t n_tap)
{
    for (size_t i = 0; i < CPU_CONV_STRIP; i++) {
        float sum = 0;
        for (size_t k = 0; k < n_tap; k++)
            sum = fmaf(weight[k * CPU_CONV_STRIP + i], u[k][i], sum);
        dst[i] = sum;
    }
}

static void delta_read_c(float *known, const float *state, const float *k, size_t dim_k)
{
    for (size_t j = 0; j < MOE_DELTA_BLOCK; j++) {
        float chain[4] = {0};
        for (size_t i = 0; i < dim_k; i++)
            chain[i % 4] = fmaf(k[i], state[i * MOE_DELTA_BLOCK + j], chain[i % 4]);
        known[j] = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    }
}

static void delta_c(const cpu_delta_step *s)
{
    for (size_t j = 0; j < MOE_DELTA_BLOCK; j++) {
        const float known = s->decay * s->known[j], d = s->beta * (s->v[j] - known);
        float chain[4] = {0};
        for (size_t i = 0; i < s->dim_k; i++) {
            float *x = &s->state[i * MOE_DELTA_BLOCK + j];
            *x = fmaf(s->k[i], d, s->decay * *x);
            chain[i % 4] = fmaf(s->q[i], *x, chain[i % 4]);
        }
        s->dst[j] = s->scale * ((chain[0] + chain[1]) + (chain[2] + chain[3]));
    }
    if (s->next)
        delta_read_c(s->known, s->state, s->next, s->dim_k);
}

static const cpu_recurrent cpu_recurrent_c = {conv_c, delta_read_c, delta_c};

/* ---------------------------------------------------------------------------------- AVX2 -- */

#if MOE_X86
#define AVX2 MOE_TARGET("avx2,fma")

AVX2 static void conv_avx2(float *dst, const float *const *u, const float *weight, size_t n_tap)
{
    for (size_t i = 0; i < CPU_CONV_STRIP; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (size_t k = 0; k < n_tap; k++)
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(weight + k * CPU_CONV_STRIP + i),
                                  _mm256_loadu_ps(u[k] + i), sum);
        _mm256_storeu_ps(dst + i, sum);
    }
}

/* The four chains of two registers, added. */
AVX2 MOE_INLINE void chains_avx2(__m256 sum[4][2], __m256 *low, __m256 *high)
{
    *low = _mm256_add_ps(_mm256_add_ps(sum[0][0], sum[1][0]), _mm256_add_ps(sum[2][0], sum[3][0]));
    *high = _mm256_add_ps(_mm256_add_ps(sum[0][1], sum[1][1]), _mm256_add_ps(sum[2][1], sum[3][1]));
}

AVX2 MOE_INLINE void delta_zero_avx2(__m256 sum[4][2])
{
    MOE_UNROLL
    for (size_t c = 0; c < 4; c++)
        sum[c][0] = sum[c][1] = _mm256_setzero_ps();
}

/* Row i of a strip of 16 columns, towards S^T k. */
AVX2 MOE_INLINE void delta_add_avx2(const float *x, const float *k, __m256 sum[2])
{
    const __m256 key = _mm256_broadcast_ss(k);
    sum[0] = _mm256_fmadd_ps(key, _mm256_loadu_ps(x), sum[0]);
    sum[1] = _mm256_fmadd_ps(key, _mm256_loadu_ps(x + 8), sum[1]);
}

/* Row i of a strip of 16 columns: its new state, and towards S^T q. */
AVX2 MOE_INLINE void delta_write_avx2(float *x, const float *k, const float *q, __m256 decay,
                                      __m256 d0, __m256 d1, __m256 sum[2])
{
    const __m256 key = _mm256_broadcast_ss(k), query = _mm256_broadcast_ss(q);
    const __m256 x0 = _mm256_fmadd_ps(key, d0, _mm256_mul_ps(decay, _mm256_loadu_ps(x)));
    const __m256 x1 = _mm256_fmadd_ps(key, d1, _mm256_mul_ps(decay, _mm256_loadu_ps(x + 8)));
    _mm256_storeu_ps(x, x0);
    _mm256_storeu_ps(x + 8, x1);
    sum[0] = _mm256_fmadd_ps(query, x0, sum[0]);
    sum[1] = _mm256_fmadd_ps(query, x1, sum[1]);
}

/* Strips of 16 columns: four chains of two registers keep the multipliers busy. */
AVX2 static void delta_read_avx2(float *known, const float *state, const float *k, size_t dim_k)
{
    enum { B = MOE_DELTA_BLOCK };
    for (size_t j = 0; j < B; j += 16) {
        const float *x = state + j;
        __m256 sum[4][2], low, high;
        size_t i = 0;
        delta_zero_avx2(sum);
        for (; i + 4 <= dim_k; i += 4)
            MOE_UNROLL
            for (size_t c = 0; c < 4; c++)
                delta_add_avx2(x + (i + c) * B, k + i + c, sum[c]);
        MOE_UNROLL
        for (size_t c = 0; c < 3; c++)
            if (i + c < dim_k)
                delta_add_avx2(x + (i + c) * B, k + i + c, sum[c]);
        chains_avx2(sum, &low, &high);
        _mm256_storeu_ps(known + j, low);
        _mm256_storeu_ps(known + j + 8, high);
    }
}

AVX2 MOE_INLINE __m256 delta_change_avx2(const cpu_delta_step *s, size_t j)
{
    const __m256 known = _mm256_mul_ps(_mm256_set1_ps(s->decay), _mm256_loadu_ps(s->known + j));
    return _mm256_mul_ps(_mm256_set1_ps(s->beta), _mm256_sub_ps(_mm256_loadu_ps(s->v + j), known));
}

AVX2 static void delta_avx2(const cpu_delta_step *s)
{
    enum { B = MOE_DELTA_BLOCK };
    const __m256 decay = _mm256_set1_ps(s->decay), scale = _mm256_set1_ps(s->scale);
    for (size_t j = 0; j < B; j += 16) {
        const __m256 d0 = delta_change_avx2(s, j), d1 = delta_change_avx2(s, j + 8);
        float *x = s->state + j;
        __m256 sum[4][2], low, high;
        size_t i = 0;
        delta_zero_avx2(sum);
        for (; i + 4 <= s->dim_k; i += 4)
            MOE_UNROLL
            for (size_t c = 0; c < 4; c++)
                delta_write_avx2(x + (i + c) * B, s->k + i + c, s->q + i + c, decay, d0, d1,
                                 sum[c]);
        MOE_UNROLL
        for (size_t c = 0; c < 3; c++)
            if (i + c < s->dim_k)
                delta_write_avx2(x + (i + c) * B, s->k + i + c, s->q + i + c, decay, d0, d1,
                                 sum[c]);
        chains_avx2(sum, &low, &high);
        _mm256_storeu_ps(s->dst + j, _mm256_mul_ps(scale, low));
        _mm256_storeu_ps(s->dst + j + 8, _mm256_mul_ps(scale, high));
    }
    if (s->next)
        delta_read_avx2(s->known, s->state, s->next, s->dim_k);
}

static const cpu_recurrent cpu_recurrent_avx2 = {conv_avx2, delta_read_avx2, delta_avx2};
#undef AVX2

/* ------------------------------------------------------------------------------- AVX-512 -- */

#define AVX512 MOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

AVX512 static void conv_avx512(float *dst, const float *const *u, const float *weight, size_t n_tap)
{
    for (size_t i = 0; i < CPU_CONV_STRIP; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (size_t k = 0; k < n_tap; k++)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(weight + k * CPU_CONV_STRIP + i),
                                  _mm512_loadu_ps(u[k] + i), sum);
        _mm512_storeu_ps(dst + i, sum);
    }
}

AVX512 MOE_INLINE __m512 chains_avx512(__m512 sum[4][2], size_t half)
{
    return _mm512_add_ps(_mm512_add_ps(sum[0][half], sum[1][half]),
                         _mm512_add_ps(sum[2][half], sum[3][half]));
}

/* Row i of 32 columns, towards S^T k. */
AVX512 MOE_INLINE void delta_add_avx512(const float *k, __m512 x0, __m512 x1, __m512 sum[2])
{
    const __m512 key = _mm512_set1_ps(*k);
    sum[0] = _mm512_fmadd_ps(key, x0, sum[0]);
    sum[1] = _mm512_fmadd_ps(key, x1, sum[1]);
}

AVX512 static void delta_read_avx512(float *known, const float *state, const float *k, size_t dim_k)
{
    enum { B = MOE_DELTA_BLOCK };
    __m512 sum[4][2] = {{_mm512_setzero_ps()}};
    size_t i = 0;
    for (; i + 4 <= dim_k; i += 4)
        MOE_UNROLL
        for (size_t c = 0; c < 4; c++)
            delta_add_avx512(k + i + c, _mm512_loadu_ps(state + (i + c) * B),
                             _mm512_loadu_ps(state + (i + c) * B + 16), sum[c]);
    MOE_UNROLL
    for (size_t c = 0; c < 3; c++)
        if (i + c < dim_k)
            delta_add_avx512(k + i + c, _mm512_loadu_ps(state + (i + c) * B),
                             _mm512_loadu_ps(state + (i + c) * B + 16), sum[c]);
    _mm512_storeu_ps(known, chains_avx512(sum, 0));
    _mm512_storeu_ps(known + 16, chains_avx512(sum, 1));
}

/* A row: its new state, towards S^T q and, if there is a next token, towards S^T k of that. */
AVX512 MOE_INLINE void delta_row_avx512(float *x, const float *k, const float *q, const float *next,
                                        __m512 decay, const __m512 d[2], __m512 sum[2],
                                        __m512 known[2])
{
    const __m512 key = _mm512_set1_ps(*k);
    const __m512 x0 = _mm512_fmadd_ps(key, d[0], _mm512_mul_ps(decay, _mm512_loadu_ps(x)));
    const __m512 x1 = _mm512_fmadd_ps(key, d[1], _mm512_mul_ps(decay, _mm512_loadu_ps(x + 16)));
    _mm512_storeu_ps(x, x0);
    _mm512_storeu_ps(x + 16, x1);
    delta_add_avx512(q, x0, x1, sum);
    if (next)
        delta_add_avx512(next, x0, x1, known);
}

/* All columns at once: a token's new state is still in registers when the next token reads it,
 * which saves one of three passes over L1. */
AVX512 MOE_INLINE void delta_rows_avx512(const cpu_delta_step *s, const float *next)
{
    enum { B = MOE_DELTA_BLOCK };
    const __m512 decay = _mm512_set1_ps(s->decay), beta = _mm512_set1_ps(s->beta);
    __m512 sum[4][2] = {{_mm512_setzero_ps()}}, known[4][2] = {{_mm512_setzero_ps()}}, d[2];
    float *x = s->state; // these stay in registers
    const float *k = s->k, *q = s->q;
    const size_t dim_k = s->dim_k;
    size_t i = 0;
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const __m512 before = _mm512_mul_ps(decay, _mm512_loadu_ps(s->known + 16 * half));
        d[half] = _mm512_mul_ps(beta, _mm512_sub_ps(_mm512_loadu_ps(s->v + 16 * half), before));
    }
    for (; i + 4 <= dim_k; i += 4)
        MOE_UNROLL
        for (size_t c = 0; c < 4; c++)
            delta_row_avx512(x + (i + c) * B, k + i + c, q + i + c, next ? next + i + c : NULL,
                             decay, d, sum[c], known[c]);
    MOE_UNROLL
    for (size_t c = 0; c < 3; c++)
        if (i + c < dim_k)
            delta_row_avx512(x + (i + c) * B, k + i + c, q + i + c, next ? next + i + c : NULL,
                             decay, d, sum[c], known[c]);
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        _mm512_storeu_ps(s->dst + 16 * half,
                         _mm512_mul_ps(_mm512_set1_ps(s->scale), chains_avx512(sum, half)));
        if (next)
            _mm512_storeu_ps(s->known + 16 * half, chains_avx512(known, half));
    }
}

AVX512 static void delta_avx512(const cpu_delta_step *s)
{
    _Static_assert(MOE_DELTA_BLOCK == 32, "two registers");
    if (s->next)
        delta_rows_avx512(s, s->next);
    else
        delta_rows_avx512(s, NULL);
}

static const cpu_recurrent cpu_recurrent_avx512 = {conv_avx512, delta_read_avx512, delta_avx512};
#undef AVX512
#endif

/* ---------------------------------------------------------------------------------- NEON -- */

#if MOE_ARM64
static void conv_neon(float *dst, const float *const *u, const float *weight, size_t n_tap)
{
    for (size_t i = 0; i < CPU_CONV_STRIP; i += 4) {
        float32x4_t sum = vdupq_n_f32(0);
        for (size_t k = 0; k < n_tap; k++)
            sum = vfmaq_f32(sum, vld1q_f32(weight + k * CPU_CONV_STRIP + i), vld1q_f32(u[k] + i));
        vst1q_f32(dst + i, sum);
    }
}

MOE_INLINE f32x8 add8_neon(f32x8 a, f32x8 b)
{
    return (f32x8){{vaddq_f32(a.val[0], b.val[0]), vaddq_f32(a.val[1], b.val[1])}};
}

MOE_INLINE f32x8 mul8_neon(f32x8 a, float b)
{
    return (f32x8){{vmulq_n_f32(a.val[0], b), vmulq_n_f32(a.val[1], b)}};
}

MOE_INLINE f32x8 chains_neon(const f32x8 sum[4])
{
    return add8_neon(add8_neon(sum[0], sum[1]), add8_neon(sum[2], sum[3]));
}

/* Row i of a strip of 8 columns: its new state, and towards S^T q. */
MOE_INLINE f32x8 delta_write_neon(float *x, float k, float q, float decay, f32x8 d, f32x8 sum)
{
    const f32x8 y = fma8_neon(mul8_neon(load8_neon(x), decay), same8_neon(k), d);
    store8_neon(x, y);
    return fma8_neon(sum, same8_neon(q), y);
}

/* Strips of 8 columns, in four chains. */
static void delta_read_neon(float *known, const float *state, const float *k, size_t dim_k)
{
    enum { B = MOE_DELTA_BLOCK };
    const size_t whole = dim_k / 4 * 4;
    for (size_t j = 0; j < B; j += 8) {
        const float *x = state + j;
        f32x8 sum[4] = {same8_neon(0), same8_neon(0), same8_neon(0), same8_neon(0)};
        for (size_t i = 0; i < whole; i += 4)
            MOE_UNROLL
            for (size_t c = 0; c < 4; c++)
                sum[c] = fma8_neon(sum[c], same8_neon(k[i + c]), load8_neon(x + (i + c) * B));
        MOE_UNROLL
        for (size_t c = 0; c < 3; c++)
            if (whole + c < dim_k)
                sum[c] = fma8_neon(sum[c], same8_neon(k[whole + c]),
                                   load8_neon(x + (whole + c) * B));
        store8_neon(known + j, chains_neon(sum));
    }
}

static void delta_neon(const cpu_delta_step *s)
{
    enum { B = MOE_DELTA_BLOCK };
    const size_t whole = s->dim_k / 4 * 4;
    for (size_t j = 0; j < B; j += 8) {
        float *x = s->state + j;
        f32x8 sum[4] = {same8_neon(0), same8_neon(0), same8_neon(0), same8_neon(0)};
        const f32x8 known = mul8_neon(load8_neon(s->known + j), s->decay), v = load8_neon(s->v + j);
        const f32x8 d = mul8_neon((f32x8){{vsubq_f32(v.val[0], known.val[0]),
                                           vsubq_f32(v.val[1], known.val[1])}}, s->beta);
        for (size_t i = 0; i < whole; i += 4)
            MOE_UNROLL
            for (size_t c = 0; c < 4; c++)
                sum[c] = delta_write_neon(x + (i + c) * B, s->k[i + c], s->q[i + c], s->decay, d,
                                          sum[c]);
        MOE_UNROLL
        for (size_t c = 0; c < 3; c++)
            if (whole + c < s->dim_k)
                sum[c] = delta_write_neon(x + (whole + c) * B, s->k[whole + c], s->q[whole + c],
                                          s->decay, d, sum[c]);
        store8_neon(s->dst + j, mul8_neon(chains_neon(sum), s->scale));
    }
    if (s->next)
        delta_read_neon(s->known, s->state, s->next, s->dim_k);
}

static const cpu_recurrent cpu_recurrent_neon = {conv_neon, delta_read_neon, delta_neon};
#endif

static const cpu_recurrent *cpu_recurrent_select(uint32_t cpu)
{
    const cpu_recurrent *best = &cpu_recurrent_c;
    (void)cpu;
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = &cpu_recurrent_avx2;
    if (cpu & MOE_CPU_AVX2 && cpu & MOE_CPU_AVX512)
        best = &cpu_recurrent_avx512;
#endif
#if MOE_ARM64
    if (cpu & MOE_CPU_NEON)
        best = &cpu_recurrent_neon;
#endif
    return best;
}

/* ------------------------------------------------------------------------- convolution -- */

/* A strip of columns, all tokens. The last n_tap values of u go round in the task's memory, behind
 * the weights, which stand there tap by tap. */
static void cpu_conv(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    enum { STRIP = CPU_CONV_STRIP };
    static const float ones[STRIP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                      1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const moe_conv_op *o = &op->u.conv;
    const cpu_recurrent *kernels = cpu_recurrent_select(q->device->cpu);
    const size_t first = (size_t)task * STRIP, n = MOE_MIN(STRIP, o->dim - first);
    const size_t n_tap = o->n_tap, bytes = n * sizeof(float);
    float *weight = q->scratch[thread].tile, *ring = weight + n_tap * STRIP, y[STRIP];
    const float *u[MOE_CONV_MAX_TAP];
    memset(weight, 0, 2 * n_tap * STRIP * sizeof *weight);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < n_tap; k++)
            weight[k * STRIP + i] = cpu_floats(o->weight)[(first + i) * n_tap + k];
    for (size_t k = 0; o->before.buffer && k + 1 < n_tap; k++)
        memcpy(ring + k * STRIP, cpu_floats(o->before) + k * o->dim + first, bytes);
    for (size_t t = 0; t < o->n_tok; t++) {
        const size_t at = t * o->src_stride + first;
        float *newest = ring + (t + n_tap - 1) % n_tap * STRIP;
        memcpy(newest, cpu_floats(o->x) + at, bytes);
        for (size_t i = 0; o->b.buffer && i < n; i++)
            newest[i] *= cpu_floats(o->b)[at + i];
        for (size_t k = 0; k < n_tap; k++)
            u[k] = ring + (t + k) % n_tap * STRIP;
        kernels->conv(y, u, weight, n_tap);
        if (o->silu)
            q->device->simd->silu(y, y, ones, STRIP);
        for (size_t i = 0; o->c.buffer && i < n; i++)
            y[i] *= cpu_floats(o->c)[at + i];
        memcpy(cpu_floats(o->dst) + t * o->dim + first, y, bytes);
    }
    for (size_t k = 0; k + 1 < n_tap; k++)
        memcpy(cpu_floats(o->after) + k * o->dim + first, ring + (o->n_tok + k) % n_tap * STRIP,
               bytes);
}

/* --------------------------------------------------------------------------- delta rule -- */

/* log(1 + exp(x)) = max(x, 0) + log(1 + u) with u = exp(-|x|) in (0, 1]. The logarithm is
 * 2 artanh(s), s = u / (2 + u) <= 1/3; the first term left out of the series is below 5e-10 s. */
static float cpu_softplus(float x)
{
    enum { N_TERM = 9 };
    const float u = cpu_exp(-fabsf(x)), s = u / (2.0f + u), square = s * s;
    float series = 1.0f / (2 * N_TERM - 1);
    for (int i = N_TERM - 2; i >= 0; i--)
        series = fmaf(series, square, 1.0f / (float)(2 * i + 1));
    return fmaf(2.0f * s, series, x > 0 ? x : 0.0f);
}

static void cpu_gates(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)q, (void)thread;
    const moe_gates_op *o = &op->u.gates;
    const uint32_t end = MOE_MIN(o->n_tok, (task + 1) * op->chunk);
    for (uint32_t t = task * op->chunk; t < end; t++) {
        for (uint32_t h = 0; h < o->n_head; h++) {
            const size_t i = (size_t)t * o->n_head + h;
            const float step = cpu_softplus(cpu_floats(o->a)[i] + cpu_floats(o->bias)[h]);
            cpu_floats(o->decay)[i] = cpu_exp(cpu_floats(o->rate)[h] * step);
            cpu_floats(o->beta)[i] = cpu_sigmoid(cpu_floats(o->b)[i]);
        }
    }
}

/* A block of columns of one head, all tokens. */
static void cpu_delta(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    enum { B = MOE_DELTA_BLOCK };
    const moe_delta_op *o = &op->u.delta;
    const cpu_recurrent *kernels = cpu_recurrent_select(q->device->cpu);
    const uint32_t n_block = cpu_ceil_div(o->dim_v, B), head = task / n_block;
    const uint32_t key = o->tiled ? head % o->n_head_k : head / (o->n_head / o->n_head_k);
    const size_t first = (size_t)(task % n_block) * B, n = MOE_MIN(B, o->dim_v - first);
    const size_t n_state = (size_t)o->dim_k * B, n_keys = (size_t)o->n_head_k * o->dim_k;
    float *state = cpu_floats(o->after) + task * n_state, v[B] = {0}, dst[B], known[B];
    const float *keys = cpu_floats(o->qk) + n_keys + (size_t)key * o->dim_k; // of token 0
    if (!o->before.buffer)
        memset(state, 0, n_state * sizeof *state);
    else if (cpu_floats(o->before) != cpu_floats(o->after))
        memcpy(state, cpu_floats(o->before) + task * n_state, n_state * sizeof *state);
    kernels->delta_read(known, state, keys, o->dim_k);
    for (size_t t = 0; t < o->n_tok; t++, keys += 2 * n_keys) {
        const size_t gate = t * o->n_head + head, at = gate * o->dim_v + first;
        const cpu_delta_step step = {
            .state = state, .known = known, .q = keys - n_keys, .k = keys,
            .next = t + 1 < o->n_tok ? keys + 2 * n_keys : NULL, .v = v, .dst = dst,
            .dim_k = o->dim_k, .decay = cpu_floats(o->decay)[gate],
            .beta = cpu_floats(o->beta)[gate], .scale = o->scale};
        memcpy(v, cpu_floats(o->v) + at, n * sizeof *v);
        kernels->delta(&step);
        memcpy(cpu_floats(o->dst) + at, dst, n * sizeof *dst);
    }
}

#endif
