/* backends/cpu_attend.c - attention on the CPU.
 *
 * Positions go in segments of CPU_SEGMENT, counted from position 0. A segment's scores become
 * weights relative to the segment's maximum and its values are summed; then segments are joined,
 * ascending. So what a query gets does not depend on which queries are computed beside it, nor on
 * whether a segment is a task of its own (decode) or one of many in a task (prefill).
 *
 * Within a segment, blocks of keys and values are converted to float, and all queries of the task
 * are multiplied with a block while it is in the cache of the core; up to 16 queries are multiplied
 * with F16 as it stands. Many queries stand side by side in panels; with few, keys are transposed
 * instead. Latents of integers (cpu_int16.h) are multiplied as they stand, by any number of queries
 * that have become integers too.
 *
 * Must never: allocate, lock, fail. */
#ifndef MOE_BACKENDS_CPU_ATTEND_C
#define MOE_BACKENDS_CPU_ATTEND_C

#include "cpu_ops.c"

/* Stores the heads of one token. */
static void cpu_store_token(moe_queue *q, const cpu_op *op, uint32_t t, uint32_t thread)
{
    const moe_store_op *o = &op->u.store;
    const moe_cache *c = &op->k;
    for (uint32_t h = 0; h < c->n_head; h++) {
        const float *src = cpu_floats(o->src) + ((size_t)t * c->n_head + h) * c->dim;
        uint8_t *dst = cpu_cache_row(c, h, o->pos + t);
        if (c->type == MOE_CACHE_F32) {
            memcpy(dst, src, c->dim * sizeof *src);
        } else if (c->type == CACHE_INT16) {
            *cpu_cache_scale(c, h, o->pos + t) =
                q->device->int16->quantize((int16_t *)(void *)dst, src, c->dim);
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

static void cpu_store(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const uint32_t n_tok = op->u.store.n_tok, end = MOE_MIN(n_tok, (task + 1) * op->chunk);
    for (uint32_t t = task * op->chunk; t < end; t++)
        cpu_store_token(q, op, t, thread);
}

/* cpu_cache_floats() of a cache of integers. */
static void cpu_int16_floats(const moe_queue *q, const moe_cache *c, uint32_t head, uint32_t first,
                             uint32_t n, float *dst)
{
    const size_t stride = (size_t)align_up(c->dim, 32);
    for (uint32_t i = 0; i < n; i++)
        q->device->int16->dequantize(dst + i * stride, cpu_codes(c, head, first + i),
                                     *cpu_cache_scale(c, head, first + i), stride);
}

/* Positions [first, first + n) of a head as floats: dst[i][stride], stride = dim rounded up to 32.
 * Fetches the rows that lie `ahead` rows further on; 0: none. */
static void cpu_cache_floats(const moe_queue *q, const moe_cache *c, uint32_t head, uint32_t first,
                             uint32_t n, uint32_t ahead, float *dst)
{
    enum { FETCH_ROWS = 4 };
    const size_t stride = (size_t)align_up(c->dim, 32);
    const size_t row_bytes = (size_t)cpu_row_bytes(c);
    if (c->type == CACHE_INT16) {
        cpu_int16_floats(q, c, head, first, n, dst);
        return;
    }
    for (uint32_t i = 0, n_run; i < n; i += n_run, dst += n_run * stride) {
        const uint8_t *src = cpu_cache_row(c, head, first + i);
        /* Rows that are neighbours here and there, up to where the ring begins anew, are one. */
        n_run = stride == c->dim ? MOE_MIN(n - i, c->n_slot - (first + i) % c->n_slot) : 1;
        if (ahead) {
            n_run = MOE_MIN(n_run, FETCH_ROWS);
            cpu_fetch((uintptr_t)src + ahead * row_bytes, n_run * row_bytes);
        }
        if (c->type == MOE_CACHE_F16)
            q->device->simd->f32_of_f16(dst, src, n_run * (size_t)c->dim);
        else if (c->type == MOE_CACHE_Q8_0)
            q->device->simd->f32_of_q8_0(dst, src, n_run * stride);
        else
            memcpy(dst, src, n_run * (size_t)c->dim * sizeof *dst);
    }
}

/* The same, where they are if they can be used there; else in s->block. */
static const float *cpu_cache_block(const moe_queue *q, const moe_cache *c, uint32_t head,
                                    uint32_t first, uint32_t n, const cpu_scratch *s)
{
    if (c->type == MOE_CACHE_F32 && c->dim % 32 == 0 && first % c->n_slot + n <= c->n_slot)
        return (const float *)(const void *)cpu_cache_row(c, head, first);
    cpu_cache_floats(q, c, head, first, n, 0, s->block);
    return s->block;
}

/* How many of the positions [first, first + n) lie one after another in the ring. */
MOE_INLINE uint32_t cpu_cache_run(const moe_cache *c, uint32_t first, uint32_t n)
{
    return MOE_MIN(n, c->n_slot - first % c->n_slot);
}

/* As cpu_cache_floats(), transposed: dst[dim][CPU_KEY_BLOCK]. Columns up to the next multiple of
 * CPU_KEY_ROWS become 0: they are computed with, and ignored. */
static void cpu_cache_transposed(const moe_queue *q, const moe_cache *c, uint32_t head,
                                 uint32_t first, uint32_t n, float *rows, float *dst)
{
    const size_t stride = (size_t)align_up(c->dim, 32);
    for (uint32_t i = 0; i < n; i += CPU_KEY_ROWS) {
        const uint32_t n_row = MOE_MIN(CPU_KEY_ROWS, n - i);
        if (c->type == MOE_CACHE_F16 && cpu_cache_run(c, first + i, n_row) == CPU_KEY_ROWS) {
            q->device->outer->transpose_f16(dst + i, CPU_KEY_BLOCK,
                                            cpu_cache_row(c, head, first + i), c->dim,
                                            CPU_KEY_ROWS, c->dim);
            continue;
        }
        cpu_cache_floats(q, c, head, first + i, n_row, CPU_KEY_BLOCK, rows);
        memset(rows + n_row * stride, 0, (CPU_KEY_ROWS - n_row) * stride * sizeof *rows);
        q->device->outer->transpose(dst + i, CPU_KEY_BLOCK, rows, stride, CPU_KEY_ROWS, c->dim);
    }
}

/* From one query's sum of `dim` values, followed by maximum and sum, to the next one's. */
MOE_INLINE size_t cpu_sum_stride(size_t dim)
{
    return (size_t)align_up(dim + 2, 16);
}

MOE_INLINE size_t cpu_value_dim(const moe_attend_op *o, const moe_cache *v)
{
    return o->dim_v ? o->dim_v : v->dim;
}

/* The queries of one task: tokens [tok, tok + n_tok) of heads that share a key/value head: all of
 * them, or in decode, where few tasks would be left, some. Query i is head i % group of token
 * i / group. */
typedef struct cpu_queries {
    const moe_attend_op *o;
    const moe_cache *k, *v;
    uint32_t kv_head, tok, n_tok;
    uint32_t head, group; // heads [head, head + group)
    uint32_t n_query;     // n_tok * group
    uintptr_t next;       // keys that will be needed after those of the segment
    size_t next_bytes;
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

/* The heads of token t, times the scale: dst[group][dim]. */
static void cpu_scale_queries(const moe_queue *q, const cpu_queries *a, uint32_t t, float *dst)
{
    const size_t dim = a->k->dim, first = (size_t)(a->tok + t) * a->o->n_head + a->head;
    q->device->simd->scale_rows(dst, cpu_floats(a->o->q) + first * dim, a->o->scale, NULL,
                                a->group * dim);
}

static void cpu_softcap_scores(const moe_queue *q, const cpu_queries *a, float *score, size_t n)
{
    if (a->o->cap > 0)
        q->device->simd->softcap(score, a->o->cap, n);
}

/* A segment for all queries of a task: partial[i] = (sum of exp(s - max) v, max,
 * sum of exp(s - max)). A query that sees nothing of the segment gets a sum of 0. For floats there
 * are two ways to it, with the same bits: the neighbours in a vector are keys, or they are queries.
 */

/* --------------------------------------------------------------------------- few queries -- */

/* One after another: s->queries[query][dim]. */
static void cpu_gather_rows(const moe_queue *q, const cpu_queries *a, const cpu_scratch *s)
{
    for (uint32_t t = 0; t < a->n_tok; t++)
        cpu_scale_queries(q, a, t, s->queries + t * a->group * (size_t)a->k->dim);
}

/* Scores of all queries with positions [first, first + n) of the segment at `start`. */
static void cpu_row_scores(const moe_queue *q, const cpu_queries *a, uint32_t start, uint32_t first,
                           uint32_t n, const cpu_scratch *s)
{
    const cpu_outer o = {
        .c = s->scores + (first - start),
        .c_stride = CPU_SCORES,
        .a = s->queries,
        .a_stride = a->k->dim,
        .a_step = 1,
        .b = s->block,
        .b_stride = CPU_KEY_BLOCK,
        .n_row = a->n_query,
        .n_k = a->k->dim,
        .n_col = (size_t)align_up(n, CPU_KEY_ROWS),
        .fresh = true,
        .next = (uintptr_t)cpu_cache_row(a->v, a->kv_head, first),
        .next_bytes = n * (size_t)cpu_row_bytes(a->v),
    };
    cpu_cache_transposed(q, a->k, a->kv_head, first, n, s->rows, s->block);
    q->device->outer->outer(&o);
}

/* Turns the scores of positions [first, end) of a query into weights, in place: exp(score - max),
 * and 0 where it does not see. */
static void cpu_row_weights(const moe_queue *q, const cpu_queries *a, uint32_t query,
                            uint32_t start, uint32_t first, uint32_t end, const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v);
    float *score = s->scores + (size_t)query * CPU_SCORES;
    float *partial = s->partial + query * cpu_sum_stride(dim);
    uint32_t lo, hi;
    if (!cpu_visible(a->o, a->tok + query / a->group, start, &lo, &hi))
        lo = hi = end;
    memset(score + (first - start), 0, (lo - first) * sizeof *score);
    memset(score + (hi - start), 0, (end - hi) * sizeof *score);
    if (lo == hi)
        return;
    score += lo - start;
    cpu_softcap_scores(q, a, score, hi - lo);
    partial[dim] = q->device->simd->max(score, hi - lo);
    partial[dim + 1] = q->device->simd->exp_sum(score, hi - lo, partial[dim]);
}

/* Sets b to the values of positions [first, first + n) or the first few of them; returns how many.
 */
static uint32_t cpu_set_values(const moe_queue *q, const cpu_queries *a, uint32_t first, uint32_t n,
                               const cpu_scratch *s, cpu_outer *o)
{
    if (a->v->type == MOE_CACHE_F16) {
        o->b_f16 = cpu_cache_row(a->v, a->kv_head, first);
        o->b_stride = a->v->dim;
        return o->n_k = cpu_cache_run(a->v, first, n);
    }
    n = MOE_MIN(n, CPU_KEY_BLOCK);
    cpu_cache_floats(q, a->v, a->kv_head, first, n, CPU_KEY_BLOCK, s->block);
    o->b = s->block;
    o->b_stride = (size_t)align_up(a->v->dim, 32);
    return o->n_k = n;
}

/* Adds the values of positions [first, end), weighted, to the queries' partial sums. */
static void cpu_row_values(const moe_queue *q, const cpu_queries *a, uint32_t start, uint32_t first,
                           uint32_t end, const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v);
    cpu_outer o = {
        .c = s->partial,
        .c_stride = cpu_sum_stride(dim),
        .a_stride = CPU_SCORES,
        .a_step = 1,
        .n_row = a->n_query,
        .n_col = dim,
        .next = a->next,
        .next_bytes = a->next_bytes,
    };
    for (uint32_t b = first; b < end; b += (uint32_t)o.n_k) {
        o.a = s->scores + (b - start);
        cpu_set_values(q, a, b, end - b, s, &o);
        q->device->outer->outer(&o);
    }
}

static void cpu_segment_rows(const moe_queue *q, const cpu_queries *a, uint32_t start,
                             const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v);
    uint32_t first, end, ignored;
    memset(s->partial, 0, a->n_query * cpu_sum_stride(dim) * sizeof(float));
    cpu_visible(a->o, a->tok, start, &first, &ignored);
    cpu_visible(a->o, a->tok + a->n_tok - 1, start, &ignored, &end);
    for (uint32_t b = first; b < end; b += CPU_KEY_BLOCK)
        cpu_row_scores(q, a, start, b, MOE_MIN(CPU_KEY_BLOCK, end - b), s);
    for (uint32_t i = 0; i < a->n_query; i++)
        cpu_row_weights(q, a, i, start, first, end, s);
    cpu_row_values(q, a, start, first, end, s);
}

/* -------------------------------------------------------------------------- many queries -- */

/* Queries [query, query + n), side by side, and a segment. */
typedef struct cpu_panel {
    uint32_t query, n, n_col; // n_col: n rounded up to whole vectors
    uint32_t start, lo, hi;   // some query sees positions [lo, hi) of the segment
    size_t stride;            // CPU_PANEL, or less if all queries are one panel
    float *queries;           // [dim][stride]
    float *scores;            // [CPU_SEGMENT][stride]
    float *partial;           // [n][cpu_sum_stride(dim_v)]
} cpu_panel;

MOE_INLINE size_t cpu_panel_stride(const cpu_queries *a)
{
    return MOE_MIN(CPU_PANEL, (size_t)align_up(a->n_query, 16));
}

static cpu_panel cpu_panel_at(const cpu_queries *a, uint32_t query, uint32_t start,
                              const cpu_scratch *s)
{
    cpu_panel p = {.query = query, .n = MOE_MIN(CPU_PANEL, a->n_query - query), .start = start};
    uint32_t ignored;
    p.n_col = (uint32_t)align_up(p.n, 16);
    p.stride = cpu_panel_stride(a);
    cpu_visible(a->o, a->tok + query / a->group, start, &p.lo, &ignored);
    cpu_visible(a->o, a->tok + (query + p.n - 1) / a->group, start, &ignored, &p.hi);
    p.lo = MOE_MIN(p.lo, start + CPU_SEGMENT);
    p.queries = s->queries + (size_t)query * a->k->dim;
    p.scores = s->scores + (size_t)query * CPU_SEGMENT;
    p.partial = s->partial + query * cpu_sum_stride(cpu_value_dim(a->o, a->v));
    return p;
}

/* Panels of queries: s->queries[panel][dim][cpu_panel_stride()]. Columns without a query are 0. */
static void cpu_gather_panels(const moe_queue *q, const cpu_queries *a, const cpu_scratch *s)
{
    const size_t dim = a->k->dim, stride = cpu_panel_stride(a);
    float *rows = s->partial; // [n_query][dim]
    for (uint32_t t = 0; t < a->n_tok; t++)
        cpu_scale_queries(q, a, t, rows + t * a->group * dim);
    for (uint32_t i = 0; i < a->n_query; i += CPU_PANEL) {
        const uint32_t n = MOE_MIN(CPU_PANEL, a->n_query - i);
        float *panel = s->queries + i * dim;
        if (n < stride)
            memset(panel, 0, dim * stride * sizeof *panel);
        q->device->outer->transpose(panel, stride, rows + i * dim, dim, n, dim);
    }
}

/* Part of a cache that will be read soon: each of n products fetches a share of it. */
typedef struct cpu_ahead {
    uintptr_t next;
    size_t step;
} cpu_ahead;

static cpu_ahead cpu_ahead_of(const moe_cache *c, uint32_t head, uint32_t first, uint32_t n_product)
{
    const uint64_t bytes = CPU_KEY_BLOCK * cpu_row_bytes(c);
    return (cpu_ahead){(uintptr_t)cpu_cache_row(c, head, first),
                       (size_t)align_up(bytes / n_product, 64)};
}

MOE_INLINE uintptr_t cpu_ahead_share(cpu_ahead *ahead)
{
    ahead->next += ahead->step;
    return ahead->next - ahead->step;
}

/* Scores with the keys of positions [first, end). */
static void cpu_panel_scores(const moe_queue *q, const cpu_queries *a, const cpu_panel *p,
                             uint32_t first, uint32_t end, const float *keys, cpu_ahead *ahead)
{
    const size_t dim = a->k->dim, stride = (size_t)align_up(dim, 32);
    const uint32_t lo = MOE_MAX(first, p->lo), hi = MOE_MIN(end, p->hi);
    for (size_t k = 0; lo < hi && k < dim; k += CPU_DIM_BLOCK)
        q->device->outer->outer(&(cpu_outer){
            .c = p->scores + (lo - p->start) * p->stride,
            .c_stride = p->stride,
            .a = keys + (lo - first) * stride + k,
            .a_stride = stride,
            .a_step = 1,
            .b = p->queries + k * p->stride,
            .b_stride = p->stride,
            .n_row = hi - lo,
            .n_k = MOE_MIN(CPU_DIM_BLOCK, dim - k),
            .n_col = p->n_col,
            .fresh = k == 0,
            .next = cpu_ahead_share(ahead),
            .next_bytes = ahead->step,
        });
}

/* Turns scores into weights, in place. */
static void cpu_panel_weights(const moe_queue *q, const cpu_queries *a, const cpu_panel *p)
{
    const size_t dim = cpu_value_dim(a->o, a->v), stride = cpu_sum_stride(dim);
    const uint32_t n_row = p->hi > p->lo ? p->hi - p->lo : 0;
    uint32_t first[CPU_PANEL] = {0}, end[CPU_PANEL];
    float max[CPU_PANEL], sum[CPU_PANEL], *scores = p->scores + (p->lo - p->start) * p->stride;
    for (uint32_t i = 0, lo = 0, hi = 0; i < p->n_col; i++) {
        if (i < p->n && (i == 0 || (p->query + i) % a->group == 0) &&
            !cpu_visible(a->o, a->tok + (p->query + i) / a->group, p->start, &lo, &hi))
            lo = hi = p->lo;
        first[i] = i < p->n ? lo - p->lo : 0;
        end[i] = i < p->n ? hi - p->lo : n_row;
    }
    cpu_softcap_scores(q, a, scores, n_row * p->stride);
    q->device->simd->exp_columns(&(cpu_columns){scores, p->stride, n_row, p->n_col, first, end, max,
                                                sum});
    for (uint32_t i = 0; i < p->n; i++) {
        p->partial[i * stride + dim] = max[i];
        p->partial[i * stride + dim + 1] = sum[i];
    }
}

/* Adds the values of positions [first, end), weighted. */
static void cpu_panel_values(const moe_queue *q, const cpu_queries *a, const cpu_panel *p,
                             uint32_t first, uint32_t end, const float *values, cpu_ahead *ahead)
{
    const size_t dim = cpu_value_dim(a->o, a->v), stride = (size_t)align_up(a->v->dim, 32);
    const uint32_t lo = MOE_MAX(first, p->lo), hi = MOE_MIN(end, p->hi);
    if (lo < hi)
        q->device->outer->outer(&(cpu_outer){
            .c = p->partial,
            .c_stride = cpu_sum_stride(dim),
            .a = p->scores + (lo - p->start) * p->stride,
            .a_stride = 1,
            .a_step = p->stride,
            .b = values + (lo - first) * stride,
            .b_stride = stride,
            .n_row = p->n,
            .n_k = hi - lo,
            .n_col = dim,
            .fresh = lo == p->lo,
            .next = cpu_ahead_share(ahead),
            .next_bytes = ahead->step,
        });
}

static void cpu_segment_panels(const moe_queue *q, const cpu_queries *a, uint32_t start,
                               const cpu_scratch *s)
{
    const uint32_t n = a->n_query, n_panel = cpu_ceil_div(n, CPU_PANEL);
    const uint32_t n_k_block = cpu_ceil_div(a->k->dim, CPU_DIM_BLOCK);
    uint32_t first, end, ignored;
    cpu_visible(a->o, a->tok, start, &first, &ignored);
    cpu_visible(a->o, a->tok + a->n_tok - 1, start, &ignored, &end);
    for (uint32_t b = first, next; b < end; b = next) {
        next = MOE_MIN(b + CPU_KEY_BLOCK, end);
        cpu_ahead ahead = next < end ? cpu_ahead_of(a->k, a->kv_head, next, n_panel * n_k_block)
                                     : cpu_ahead_of(a->v, a->kv_head, first, n_panel * n_k_block);
        const float *keys = cpu_cache_block(q, a->k, a->kv_head, b, next - b, s);
        for (uint32_t i = 0; i < n; i += CPU_PANEL) {
            const cpu_panel p = cpu_panel_at(a, i, start, s);
            cpu_panel_scores(q, a, &p, b, next, keys, &ahead);
        }
    }
    for (uint32_t i = 0; i < n; i += CPU_PANEL) {
        const cpu_panel p = cpu_panel_at(a, i, start, s);
        cpu_panel_weights(q, a, &p);
    }
    for (uint32_t b = first, next; b < end; b = next) {
        next = MOE_MIN(b + CPU_KEY_BLOCK, end);
        cpu_ahead ahead = cpu_ahead_of(next < end ? a->v : a->k, a->kv_head, next, n_panel);
        const float *values = cpu_cache_block(q, a->v, a->kv_head, b, next - b, s);
        for (uint32_t i = 0; i < n; i += CPU_PANEL) {
            const cpu_panel p = cpu_panel_at(a, i, start, s);
            cpu_panel_values(q, a, &p, b, next, values, &ahead);
        }
    }
}

/* A single panel of up to 16 queries, keys and values of F16 as they stand. What comes next is
 * fetched meanwhile: values, then the next keys. */
static void cpu_segment_f16(const moe_queue *q, const cpu_queries *a, uint32_t start,
                            const cpu_scratch *s)
{
    const cpu_panel p = cpu_panel_at(a, 0, start, s);
    const size_t dim = cpu_value_dim(a->o, a->v);
    cpu_outer scores = {
        .c_stride = p.stride,
        .a_stride = a->k->dim,
        .a_step = 1,
        .b = p.queries,
        .b_stride = p.stride,
        .n_k = a->k->dim,
        .n_col = p.n_col,
        .fresh = true,
        .next = (uintptr_t)cpu_cache_row(a->v, a->kv_head, p.lo),
        .next_bytes = CPU_SEGMENT * cpu_row_bytes(a->v),
    };
    for (uint32_t b = p.lo; b < p.hi; b += (uint32_t)scores.n_row) {
        scores.c = p.scores + (b - start) * p.stride;
        scores.a_f16 = cpu_cache_row(a->k, a->kv_head, b);
        scores.n_row = cpu_cache_run(a->k, b, p.hi - b);
        q->device->outer->outer(&scores);
    }
    cpu_panel_weights(q, a, &p);
    cpu_outer values = {
        .c = p.partial,
        .c_stride = cpu_sum_stride(dim),
        .a_stride = 1,
        .a_step = p.stride,
        .n_row = p.n,
        .n_col = dim,
        .fresh = true,
        .next = a->next,
        .next_bytes = a->next_bytes,
    };
    for (uint32_t b = p.lo; b < p.hi; b += (uint32_t)values.n_k, values.fresh = false) {
        values.a = p.scores + (b - start) * p.stride;
        cpu_set_values(q, a, b, p.hi - b, s, &values);
        q->device->outer->outer(&values);
    }
}

/* ------------------------------------------------------------------------------- integers -- */

/* The positions of a segment that some query may see, as rows of codes. Blocks and padding are
 * filled up with rows that get no weight. */
typedef struct cpu_int16_rows {
    uint32_t start, first, end; // first: that of a block
    const int16_t *row[CPU_SEGMENT + I16_ROWS];
    float scale[CPU_SEGMENT + I16_ROWS]; // both by position from `start` on
} cpu_int16_rows;

static void cpu_gather_codes(const moe_queue *q, const cpu_queries *a, const cpu_scratch *s)
{
    const size_t dim = a->k->dim, stride = (size_t)align_up(dim, I16_GROUP);
    for (uint32_t t = 0, i = 0; t < a->n_tok; t++) {
        cpu_scale_queries(q, a, t, s->queries);
        for (uint32_t h = 0; h < a->group; h++, i++)
            s->scales[i] = q->device->int16->quantize(s->codes + i * stride, s->queries + h * dim,
                                                      dim);
    }
}

static void cpu_int16_find(const cpu_queries *a, uint32_t start, cpu_int16_rows *r)
{
    uint32_t first, end, ignored;
    cpu_visible(a->o, a->tok, start, &first, &ignored);
    cpu_visible(a->o, a->tok + a->n_tok - 1, start, &ignored, &end);
    r->start = start;
    r->first = first / I16_BLOCK * I16_BLOCK;
    r->end = end;
    for (uint32_t pos = r->first; pos < (uint32_t)align_up(end, I16_ROWS); pos++) {
        const uint32_t from = MOE_MIN(MOE_MAX(pos, first), end - 1);
        r->row[pos - start] = cpu_codes(a->k, a->kv_head, from);
        r->scale[pos - start] = *cpu_cache_scale(a->k, a->kv_head, from);
    }
}

/* Weights as integers, and the values times them, a block at a time. */
static void cpu_int16_values(const moe_queue *q, const cpu_queries *a, const cpu_int16_rows *r,
                             const cpu_scratch *s)
{
    const size_t dim = cpu_value_dim(a->o, a->v);
    const uint32_t n_block = cpu_ceil_div(r->end - r->first, I16_BLOCK);
    const size_t share = a->next_bytes / 2 / n_block;
    for (uint32_t b = r->first, n, i = 0; b < r->end; b += n, i++) {
        const uint32_t at = b - r->start;
        n = MOE_MIN(I16_BLOCK, r->end - b);
        for (uint32_t k = 0; k < a->n_query; k++)
            s->steps[k] = q->device->int16->weights(s->weights + k * I16_BLOCK,
                                                    s->scores + (size_t)k * CPU_SCORES + at,
                                                    r->scale + at, n);
        q->device->int16->values(&(i16_values){
            .c = s->partial,
            .w = s->weights,
            .step = s->steps,
            .v = r->row + at,
            .c_stride = cpu_sum_stride(dim),
            .n_query = a->n_query,
            .n_row = n,
            .n_col = dim,
            .next = a->next + a->next_bytes / 2 + i * share,
            .next_bytes = share,
        });
    }
}

/* Any number of queries, keys and values of integers, which are the same rows. The next ones are
 * fetched meanwhile. */
static void cpu_segment_int16(const moe_queue *q, const cpu_queries *a, uint32_t start,
                              const cpu_scratch *s)
{
    cpu_int16_rows r;
    cpu_int16_find(a, start, &r);
    memset(s->partial, 0,
           a->n_query * cpu_sum_stride(cpu_value_dim(a->o, a->v)) * sizeof(float));
    q->device->int16->scores(&(i16_scores){
        .c = s->scores + (r.first - start),
        .q = s->codes,
        .q_scale = s->scales,
        .k = r.row + (r.first - start),
        .k_scale = r.scale + (r.first - start),
        .c_stride = CPU_SCORES,
        .n_query = a->n_query,
        .n_key = r.end - r.first,
        .n_dim = (size_t)align_up(a->k->dim, I16_GROUP),
        .next = a->next,
        .next_bytes = a->next_bytes / 2,
    });
    for (uint32_t i = 0; i < a->n_query; i++)
        cpu_row_weights(q, a, i, start, r.first, r.end, s);
    cpu_int16_values(q, a, &r, s);
}

/* ------------------------------------------------------------------------------- segments -- */

static void cpu_gather_queries(const moe_queue *q, const cpu_queries *a, const cpu_scratch *s)
{
    if (a->k->type == CACHE_INT16)
        cpu_gather_codes(q, a, s);
    else if (a->n_query <= CPU_FEW_QUERIES)
        cpu_gather_rows(q, a, s);
    else
        cpu_gather_panels(q, a, s);
}

static void cpu_segment(const moe_queue *q, const cpu_queries *a, uint32_t start,
                        const cpu_scratch *s)
{
    if (a->k->type == CACHE_INT16)
        cpu_segment_int16(q, a, start, s);
    else if (a->n_query <= CPU_FEW_QUERIES)
        cpu_segment_rows(q, a, start, s);
    else if (a->n_query <= CPU_F16_QUERIES && a->k->type == MOE_CACHE_F16)
        cpu_segment_f16(q, a, start, s);
    else
        cpu_segment_panels(q, a, start, s);
}

/* Joins a segment to those before it, for n <= CPU_PANEL queries: both are sums relative to their
 * own maximum. Milakov and Gimelshein 2018, arXiv:1805.02867. */
static void cpu_merge(const moe_queue *q, float *total, const float *partial, size_t dim, size_t n)
{
    const size_t stride = cpu_sum_stride(dim);
    float factor[2 * CPU_PANEL];
    for (size_t i = 0; i < n; i++) {
        const float before = total[i * stride + dim], now = partial[i * stride + dim];
        const float max = before > now ? before : now;
        factor[2 * i] = before - max;
        factor[2 * i + 1] = now - max;
    }
    q->device->simd->exp_sum(factor, 2 * n, 0);
    for (size_t i = 0; i < n; i++, total += stride, partial += stride) {
        if (partial[dim + 1] == 0)
            continue;
        if (total[dim + 1] == 0) {
            memcpy(total, partial, (dim + 2) * sizeof *total);
            continue;
        }
        const float max = total[dim] > partial[dim] ? total[dim] : partial[dim];
        if (factor[2 * i] != 1) // it mostly is, once the maximum is found
            q->device->simd->scale_rows(total, total, factor[2 * i], NULL, dim + 2);
        q->device->simd->add(total, total, partial, factor[2 * i + 1], dim + 2);
        total[dim] = max;
    }
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

/* The keys of the segment at `start` and how much they are; there are `end` positions. */
static uintptr_t cpu_segment_keys(const moe_cache *k, uint32_t head, uint32_t start, uint32_t end,
                                  size_t *bytes)
{
    const uint32_t n = start < end ? cpu_cache_run(k, start, MOE_MIN(CPU_SEGMENT, end - start)) : 0;
    *bytes = n * (size_t)cpu_row_bytes(k);
    return (uintptr_t)cpu_cache_row(k, head, start);
}

/* A task of prefill: a few tokens and one key/value head over the whole cache. */
static void cpu_attend(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    const size_t dim = cpu_value_dim(o, &op->v), stride = cpu_sum_stride(dim);
    cpu_scratch *s = &q->scratch[thread];
    const uint32_t group = o->n_head / op->k.n_head, kv_head = task % op->k.n_head;
    /* Later tokens see more: they come first, so that the last tasks to be taken are short. */
    const uint32_t part = cpu_ceil_div(o->n_tok, op->chunk) - 1 - task / op->k.n_head;
    cpu_queries a = {o, &op->k, &op->v, kv_head, part * op->chunk, 0, kv_head * group, group, 0, 0,
                     0};
    a.n_tok = MOE_MIN(op->chunk, o->n_tok - a.tok);
    a.n_query = a.n_tok * group;
    const uint32_t n_query = a.n_query, end = o->pos + a.tok + a.n_tok;
    const uint32_t oldest = o->pos + a.tok;
    const uint32_t first = o->window && oldest + 1 > o->window ? oldest + 1 - o->window : 0;
    memset(s->total, 0, n_query * stride * sizeof(float));
    cpu_gather_queries(q, &a, s);
    for (uint32_t start = first / CPU_SEGMENT * CPU_SEGMENT; start < end; start += CPU_SEGMENT) {
        a.next = cpu_segment_keys(&op->k, kv_head, start + CPU_SEGMENT, end, &a.next_bytes);
        cpu_segment(q, &a, start, s);
        for (uint32_t i = 0; i < n_query; i += CPU_PANEL)
            cpu_merge(q, s->total + i * stride, s->partial + i * stride, dim,
                      MOE_MIN(CPU_PANEL, n_query - i));
    }
    for (uint32_t i = 0; i < n_query; i++)
        cpu_attend_finish(q, o, dim, a.tok + i / a.group, cpu_query_head(&a, i),
                          s->total + i * stride);
}

/* Decode: the keys of a task, segment by segment, and of each all heads. */
static uintptr_t cpu_task_keys(const cpu_op *op, uint32_t task, size_t *bytes)
{
    const uint32_t n_part = cpu_ceil_div(op->u.attend.n_head / op->k.n_head, op->chunk);
    return cpu_segment_keys(&op->k, task / n_part % op->k.n_head,
                            task / n_part / op->k.n_head * CPU_SEGMENT, op->u.attend.pos + 1,
                            bytes);
}

/* Decode: a task is one segment and op->chunk heads of one key/value head; the next phase joins the
 * segments. */
static void cpu_attend_segment(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    const size_t dim = cpu_value_dim(o, &op->v), stride = cpu_sum_stride(dim);
    const uint32_t group = o->n_head / op->k.n_head, n_part = cpu_ceil_div(group, op->chunk);
    const uint32_t part = task % n_part, kv_head = task / n_part % op->k.n_head;
    const uint32_t segment = task / n_part / op->k.n_head;
    const uint32_t n_head = MOE_MIN(op->chunk, group - part * op->chunk);
    cpu_queries a = {o, &op->k, &op->v, kv_head, 0, 1, kv_head * group + part * op->chunk, n_head,
                     n_head, 0, 0};
    a.next = cpu_task_keys(op, task + 1, &a.next_bytes);
    const cpu_scratch *s = &q->scratch[thread];
    cpu_scratch out = *s;
    out.partial = q->segments + ((size_t)segment * o->n_head + a.head) * stride;
    uint32_t lo, hi;
    cpu_gather_queries(q, &a, s);
    if (cpu_visible(o, 0, segment * CPU_SEGMENT, &lo, &hi))
        cpu_segment(q, &a, segment * CPU_SEGMENT, &out);
    else
        memset(out.partial, 0, n_head * stride * sizeof(float));
}

static void cpu_attend_join(moe_queue *q, const cpu_op *op, uint32_t head, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    const size_t dim = cpu_value_dim(o, &op->v), stride = cpu_sum_stride(dim);
    const uint32_t n_segment = cpu_ceil_div(o->pos + 1, CPU_SEGMENT);
    float *total = q->scratch[thread].total;
    memset(total, 0, stride * sizeof *total);
    for (uint32_t i = 0; i < n_segment; i++)
        cpu_merge(q, total, q->segments + ((size_t)i * o->n_head + head) * stride, dim, 1);
    cpu_attend_finish(q, o, dim, 0, head, total);
}

#endif
