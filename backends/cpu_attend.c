/* backends/cpu_attend.c - attention on the CPU.
 *
 * Positions go in segments of CPU_SEGMENT, counted from position 0. A segment's scores become weights
 * relative to the segment's maximum and its values are summed; then segments are joined, ascending.
 * So what a query gets does not depend on which queries are computed beside it, nor on whether a
 * segment is a task of its own (decode) or one of many in a task (prefill).
 *
 * Within a segment, blocks of keys are converted to float and transposed, blocks of values only
 * converted; all queries of the task are multiplied with a block while it is in the cache of the core.
 *
 * Must never: allocate, lock, fail. */
#ifndef MOE_BACKENDS_CPU_ATTEND_C
#define MOE_BACKENDS_CPU_ATTEND_C

#include "cpu_ops.c"

/* Stores the heads of one token. */
static void cpu_store(moe_queue *q, const cpu_op *op, uint32_t t, uint32_t thread)
{
    const moe_store_op *o = &op->u.store;
    const moe_cache *c = &op->k;
    for (uint32_t h = 0; h < c->n_head; h++) {
        const float *src = cpu_floats(o->src) + ((size_t)t * c->n_head + h) * c->dim;
        uint8_t *dst = cpu_cache_row(c, h, o->pos + t);
        if (c->type == MOE_CACHE_F32) {
            memcpy(dst, src, c->dim * sizeof *src);
        } else if (c->type == MOE_CACHE_F16) {
            q->device->simd->f16_of_f32(dst, src, c->dim);
        } else {
            float *padded = q->scratch[thread].rows;
            const size_t n = (size_t)align_up(c->dim, 32);
            memset(padded, 0, n * sizeof *padded);
            memcpy(padded, src, c->dim * sizeof *src);
            quant_q8_0.quantize(padded, dst, n);
        }
    }
}

/* Positions [first, first + n) of a head as floats: dst[i][stride], stride = dim rounded up to 32. */
static void cpu_cache_floats(const moe_queue *q, const moe_cache *c, uint32_t head, uint32_t first,
                             uint32_t n, float *dst)
{
    const size_t stride = (size_t)align_up(c->dim, 32);
    for (uint32_t i = 0, n_run; i < n; i += n_run, dst += n_run * stride) {
        const uint8_t *src = cpu_cache_row(c, head, first + i);
        /* Rows that are neighbours here and there, up to where the ring begins anew, are one. */
        n_run = stride == c->dim ? MOE_MIN(n - i, c->n_slot - (first + i) % c->n_slot) : 1;
        if (c->type == MOE_CACHE_F16)
            q->device->simd->f32_of_f16(dst, src, n_run * (size_t)c->dim);
        else if (c->type == MOE_CACHE_Q8_0)
            quant_q8_0.dequantize(src, dst, n_run * stride);
        else
            memcpy(dst, src, n_run * (size_t)c->dim * sizeof *dst);
    }
}

/* The same, transposed: dst[dim][CPU_KEY_BLOCK]. Columns up to the next multiple of CPU_KEY_ROWS
 * become 0: they are computed with, and ignored. */
static void cpu_cache_transposed(const moe_queue *q, const moe_cache *c, uint32_t head,
                                 uint32_t first, uint32_t n, float *rows, float *dst)
{
    const size_t stride = (size_t)align_up(c->dim, 32);
    for (uint32_t i = 0; i < n; i += CPU_KEY_ROWS) {
        const uint32_t n_row = MOE_MIN(CPU_KEY_ROWS, n - i);
        cpu_cache_floats(q, c, head, first + i, n_row, rows);
        memset(rows + n_row * stride, 0, (CPU_KEY_ROWS - n_row) * stride * sizeof *rows);
        q->device->outer->transpose(dst + i, CPU_KEY_BLOCK, rows, stride, CPU_KEY_ROWS, c->dim);
    }
}

MOE_INLINE size_t cpu_value_dim(const moe_attend_op *o, const moe_cache *v)
{
    return o->dim_v ? o->dim_v : v->dim;
}

/* The queries of one task: tokens [tok, tok + n_tok) of heads that share a key/value head: all of
 * them, or in decode, where few tasks would be left, some. */
typedef struct cpu_queries {
    const moe_attend_op *o;
    const moe_cache *k, *v;
    uint32_t kv_head, tok, n_tok;
    uint32_t head, group; // heads [head, head + group)
} cpu_queries;

/* The positions of segment [start, start + CPU_SEGMENT) that token t may see: [*lo, *hi). */
static bool cpu_visible(const moe_attend_op *o, uint32_t t, uint32_t start, uint32_t *lo,
                        uint32_t *hi)
{
    const uint32_t pos = o->pos + t;
    const uint32_t first = o->window && pos + 1 > o->window ? pos + 1 - o->window : 0;
    *lo = MOE_MAX(start, first);
    *hi = MOE_MIN(start + CPU_SEGMENT, pos + 1);
    return *lo < *hi;
}

MOE_INLINE uint32_t cpu_query_head(const cpu_queries *a, uint32_t i)
{
    return a->head + i % a->group;
}

/* The task's queries, times the scale, one after another: s->queries[query][dim]. */
static void cpu_gather_queries(const moe_queue *q, const cpu_queries *a, const cpu_scratch *s)
{
    const size_t n = a->group * (size_t)a->k->dim;
    for (uint32_t t = 0; t < a->n_tok; t++) {
        const size_t first = (size_t)(a->tok + t) * a->o->n_head + a->head;
        q->device->simd->scale_rows(s->queries + t * n, cpu_floats(a->o->q) + first * a->k->dim,
                                    a->o->scale, NULL, n);
    }
}

/* Scores of all queries with positions [first, first + n) of the segment at `start`. */
static void cpu_scores(const moe_queue *q, const cpu_queries *a, uint32_t start, uint32_t first,
                       uint32_t n, const cpu_scratch *s)
{
    const cpu_outer o = {
        .c = s->scores + (first - start),
        .c_stride = CPU_SCORES,
        .a = s->queries,
        .a_stride = a->k->dim,
        .b = s->block,
        .b_stride = CPU_KEY_BLOCK,
        .n_row = a->n_tok * a->group,
        .n_k = a->k->dim,
        .n_col = (size_t)align_up(n, CPU_KEY_ROWS),
        .fresh = true,
    };
    cpu_cache_transposed(q, a->k, a->kv_head, first, n, s->rows, s->block);
    q->device->outer->outer(&o);
}

/* Turns the scores of positions [first, end) of a query into weights, in place: exp(score - max), and 0
 * where it does not see. */
static void cpu_weights(const moe_queue *q, const cpu_queries *a, uint32_t query, uint32_t start,
                        uint32_t first, uint32_t end, const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v);
    float *score = s->scores + (size_t)query * CPU_SCORES, *partial = s->partial + query * (dim + 2);
    uint32_t lo, hi;
    if (!cpu_visible(a->o, a->tok + query / a->group, start, &lo, &hi))
        lo = hi = end;
    memset(score + (first - start), 0, (lo - first) * sizeof *score);
    memset(score + (hi - start), 0, (end - hi) * sizeof *score);
    if (lo == hi)
        return;
    score += lo - start;
    for (uint32_t j = 0; a->o->cap > 0 && j < hi - lo; j++)
        score[j] = a->o->cap * cpu_tanh(score[j] / a->o->cap);
    partial[dim] = q->device->simd->max(score, hi - lo);
    partial[dim + 1] = q->device->simd->exp_sum(score, hi - lo, partial[dim]);
}

/* Adds the values of positions [first, first + n), weighted, to the queries' partial sums. */
static void cpu_values(const moe_queue *q, const cpu_queries *a, uint32_t start, uint32_t first,
                       uint32_t n, const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v), stride = (size_t)align_up(a->v->dim, 32);
    cpu_cache_floats(q, a->v, a->kv_head, first, n, s->block);
    q->device->outer->outer(&(cpu_outer){
        .c = s->partial,
        .c_stride = dim + 2,
        .a = s->scores + (first - start),
        .a_stride = CPU_SCORES,
        .b = s->block,
        .b_stride = stride,
        .n_row = a->n_tok * a->group,
        .n_k = n,
        .n_col = dim,
    });
}

/* One segment for all queries: partial[i] = (sum of exp(s - max) v, max, sum of exp(s - max)). A query
 * that sees nothing of the segment gets a sum of 0. */
static void cpu_segment(const moe_queue *q, const cpu_queries *a, uint32_t start,
                        const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v);
    const uint32_t n_query = a->n_tok * a->group;
    uint32_t first, end, ignored;
    memset(s->partial, 0, n_query * (dim + 2) * sizeof(float));
    cpu_visible(a->o, a->tok, start, &first, &ignored);
    cpu_visible(a->o, a->tok + a->n_tok - 1, start, &ignored, &end);
    for (uint32_t b = first; b < end; b += CPU_KEY_BLOCK)
        cpu_scores(q, a, start, b, MOE_MIN(CPU_KEY_BLOCK, end - b), s);
    for (uint32_t i = 0; i < n_query; i++)
        cpu_weights(q, a, i, start, first, end, s);
    for (uint32_t b = first; b < end; b += CPU_KEY_BLOCK)
        cpu_values(q, a, start, b, MOE_MIN(CPU_KEY_BLOCK, end - b), s);
}

/* Joins a segment to those before it: both are sums relative to their own maximum. Milakov and
 * Gimelshein 2018, arXiv:1805.02867. */
static void cpu_merge(const moe_queue *q, float *total, const float *partial, size_t dim)
{
    if (partial[dim + 1] == 0)
        return;
    if (total[dim + 1] == 0) {
        memcpy(total, partial, (dim + 2) * sizeof *total);
        return;
    }
    const float max = total[dim] > partial[dim] ? total[dim] : partial[dim];
    float factor[2] = {total[dim], partial[dim]};
    q->device->simd->exp_sum(factor, 2, max);
    q->device->simd->scale_rows(total, total, factor[0], NULL, dim + 2);
    q->device->simd->add(total, total, partial, factor[1], dim + 2);
    total[dim] = max;
}

/* dst = total / (sum + sink) */
static void cpu_attend_finish(moe_queue *q, const moe_attend_op *o, size_t dim, uint32_t t,
                              uint32_t head, float *total)
{
    if (o->sink.buffer) {
        const float sink = cpu_floats(o->sink)[head];
        const float max = total[dim] > sink ? total[dim] : sink;
        const float factor = cpu_exp(total[dim] - max);
        q->device->simd->scale_rows(total, total, factor, NULL, dim);
        total[dim + 1] = fmaf(total[dim + 1], factor, cpu_exp(sink - max));
    }
    q->device->simd->scale_rows(cpu_floats(o->dst) + ((size_t)t * o->n_head + head) * dim, total,
                                1.0f / total[dim + 1], NULL, dim);
}

/* A task of prefill: a few tokens and one key/value head over the whole cache. */
static void cpu_attend(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    const size_t dim = cpu_value_dim(o, &op->v);
    cpu_scratch *s = &q->scratch[thread];
    const uint32_t group = o->n_head / op->k.n_head, kv_head = task % op->k.n_head;
    cpu_queries a = {o, &op->k, &op->v, kv_head, task / op->k.n_head * op->chunk, 0,
                     kv_head * group, group};
    a.n_tok = MOE_MIN(op->chunk, o->n_tok - a.tok);
    const uint32_t n_query = a.n_tok * a.group, end = o->pos + a.tok + a.n_tok;
    const uint32_t oldest = o->pos + a.tok;
    const uint32_t first = o->window && oldest + 1 > o->window ? oldest + 1 - o->window : 0;
    memset(s->total, 0, n_query * (dim + 2) * sizeof(float));
    cpu_gather_queries(q, &a, s);
    for (uint32_t start = first / CPU_SEGMENT * CPU_SEGMENT; start < end; start += CPU_SEGMENT) {
        cpu_segment(q, &a, start, s);
        for (uint32_t i = 0; i < n_query; i++)
            cpu_merge(q, s->total + i * (dim + 2), s->partial + i * (dim + 2), dim);
    }
    for (uint32_t i = 0; i < n_query; i++)
        cpu_attend_finish(q, o, dim, a.tok + i / a.group, cpu_query_head(&a, i),
                          s->total + i * (dim + 2));
}

/* Decode: a task is one segment and op->chunk heads of one key/value head; the next phase joins the
 * segments. */
static void cpu_attend_segment(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    const size_t dim = cpu_value_dim(o, &op->v);
    const uint32_t n_segment = cpu_ceil_div(o->pos + 1, CPU_SEGMENT);
    const uint32_t group = o->n_head / op->k.n_head, n_part = cpu_ceil_div(group, op->chunk);
    const uint32_t part = task % n_part, kv_head = task / n_part % op->k.n_head;
    const uint32_t segment = task / n_part / op->k.n_head;
    cpu_queries a = {o, &op->k, &op->v, kv_head, 0, 1, kv_head * group + part * op->chunk,
                     MOE_MIN(op->chunk, group - part * op->chunk)};
    cpu_scratch *s = &q->scratch[thread];
    uint32_t lo, hi;
    cpu_gather_queries(q, &a, s);
    if (cpu_visible(o, 0, segment * CPU_SEGMENT, &lo, &hi))
        cpu_segment(q, &a, segment * CPU_SEGMENT, s);
    else
        memset(s->partial, 0, a.group * (dim + 2) * sizeof(float));
    for (uint32_t i = 0; i < a.group; i++)
        memcpy(q->segments + ((size_t)cpu_query_head(&a, i) * n_segment + segment) * (dim + 2),
               s->partial + i * (dim + 2), (dim + 2) * sizeof(float));
}

static void cpu_attend_join(moe_queue *q, const cpu_op *op, uint32_t head, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    const size_t dim = cpu_value_dim(o, &op->v);
    const uint32_t n_segment = cpu_ceil_div(o->pos + 1, CPU_SEGMENT);
    float *total = q->scratch[thread].total;
    memset(total, 0, (dim + 2) * sizeof *total);
    for (uint32_t i = 0; i < n_segment; i++)
        cpu_merge(q, total, q->segments + ((size_t)head * n_segment + i) * (dim + 2), dim);
    cpu_attend_finish(q, o, dim, 0, head, total);
}

#endif
