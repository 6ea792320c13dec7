/* backends/cpu_latent.c - latent attention in its expanded form on the CPU: for many queries, to
 * make each head's keys and values of the latents takes fewer multiplications than long queries do.
 *
 * A task is a head and up to CPU_EXPAND_TOKENS tokens. It goes through the cache segment by
 * segment: the segment's keys and values are expanded into memory of the thread, as a cache of one
 * head and one segment, over which all queries of the task attend as in cpu_attend.c. So memory
 * does not depend on the context, and no bit depends on how queries are shared out.
 *
 * Must never: allocate, lock, fail. */
#ifndef MOE_BACKENDS_CPU_LATENT_C
#define MOE_BACKENDS_CPU_LATENT_C

#include "cpu_attend.c"

/* A head's keys and values of one segment: position p is in slot p modulo CPU_SEGMENT. */
typedef struct cpu_expanded {
    moe_buffer buffer;
    moe_cache k, v;
    uint32_t n_latent, n_nope, n_rot;
} cpu_expanded;

static cpu_expanded cpu_expanded_of(const cpu_op *op, const cpu_scratch *s)
{
    const moe_attend_op *o = &op->u.attend;
    const uint32_t n_nope = (uint32_t)o->k_b->dims[0], n_latent = (uint32_t)o->k_b->dims[1];
    const uint32_t n_rot = op->k.dim - n_latent, dim_k = n_nope + n_rot;
    const uint32_t dim_v = (uint32_t)o->v_b->dims[1];
    cpu_expanded e = {.buffer = {.data = (uint8_t *)s->expanded},
                      .n_latent = n_latent, .n_nope = n_nope, .n_rot = n_rot};
    e.k = (moe_cache){{NULL, 0}, MOE_CACHE_F32, 1, CPU_SEGMENT, dim_k};
    e.v = (moe_cache){{NULL, CPU_SEGMENT * dim_k * sizeof(float)}, MOE_CACHE_F32, 1, CPU_SEGMENT,
                      dim_v};
    return e;
}

/* The head's matrices as floats, a row for each element of a latent: s->up, [n_latent][n_nope] for
 * keys, then [n_latent][dim_v] for values. */
static void cpu_expand_weights(const moe_queue *q, const cpu_op *op, uint32_t head,
                               const cpu_scratch *s)
{
    const moe_weight *k_b = op->u.attend.k_b, *v_b = op->u.attend.v_b;
    const moe_matrix k = weight_matrix(k_b, head), v = weight_matrix(v_b, head);
    const size_t n_nope = (size_t)k_b->dims[0], n_latent = (size_t)k_b->dims[1];
    const size_t dim_v = (size_t)v_b->dims[1];
    float *keys = s->up, *values = s->up + n_latent * n_nope;
    for (size_t i = 0; i < n_latent; i++)
        k.quant->dequantize(k.data.buffer->data + k.data.offset + i * k.row_bytes,
                            keys + i * n_nope, n_nope);
    for (size_t i = 0; i < dim_v; i += CPU_KEY_ROWS) {
        const size_t n = MOE_MIN(CPU_KEY_ROWS, dim_v - i);
        for (size_t j = 0; j < n; j++)
            v.quant->dequantize(v.data.buffer->data + v.data.offset + (i + j) * v.row_bytes,
                                s->rows + j * n_latent, n_latent);
        q->device->outer->transpose(values + i, dim_v, s->rows, n_latent, n, n_latent);
    }
}

/* dst[i] = the latent of row i times a matrix [n_latent][n_col]. */
static void cpu_expand_rows(const moe_queue *q, const float *rows, size_t stride, uint32_t n_row,
                            size_t n_latent, const float *matrix, size_t n_col, float *dst,
                            size_t dst_stride)
{
    for (size_t k = 0; k < n_latent; k += CPU_DIM_BLOCK)
        q->device->outer->outer(&(cpu_outer){
            .c = dst,
            .c_stride = dst_stride,
            .a = rows + k,
            .a_stride = stride,
            .a_step = 1,
            .b = matrix + k * n_col,
            .b_stride = n_col,
            .n_row = n_row,
            .n_k = MOE_MIN(CPU_DIM_BLOCK, n_latent - k),
            .n_col = n_col,
            .fresh = k == 0,
        });
}

/* Keys and values of positions [first, first + n), which lie in one segment. */
static void cpu_expand(const moe_queue *q, const moe_cache *latent, const cpu_expanded *e,
                       uint32_t first, uint32_t n, const cpu_scratch *s)
{
    const size_t stride = (size_t)align_up(latent->dim, 32);
    const float *keys = s->up, *values = s->up + (size_t)e->n_latent * e->n_nope;
    for (uint32_t i = 0, some; i < n; i += some) {
        float *k = s->expanded + (first + i) % CPU_SEGMENT * e->k.dim;
        float *v = s->expanded + CPU_SEGMENT * e->k.dim + (first + i) % CPU_SEGMENT * e->v.dim;
        some = MOE_MIN(CPU_KEY_BLOCK, n - i);
        cpu_cache_floats(q, latent, 0, first + i, some, 0, s->block);
        cpu_expand_rows(q, s->block, stride, some, e->n_latent, keys, e->n_nope, k, e->k.dim);
        cpu_expand_rows(q, s->block, stride, some, e->n_latent, values, e->v.dim, v, e->v.dim);
        for (uint32_t j = 0; j < some; j++)
            memcpy(k + j * e->k.dim + e->n_nope, s->block + j * stride + e->n_latent,
                   e->n_rot * sizeof *k);
    }
}

/* Tokens [tok, tok + n) of a head, and the part of a thread's memory that holds their queries. */
static cpu_queries cpu_panel_queries(const cpu_op *op, const cpu_expanded *e, uint32_t head,
                                     uint32_t tok, uint32_t n)
{
    return (cpu_queries){&op->u.attend, &e->k, &e->v, 0, tok, n, head, 1, n, 0, 0};
}

static cpu_scratch cpu_panel_scratch(const cpu_scratch *s, const cpu_expanded *e, uint32_t i)
{
    cpu_scratch part = *s;
    part.queries = s->expanded_queries + (size_t)i * e->k.dim;
    return part;
}

/* A task: a head and op->chunk tokens over the whole cache. */
static void cpu_attend_expanded(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_attend_op *o = &op->u.attend;
    cpu_scratch *s = &q->scratch[thread];
    cpu_expanded e = cpu_expanded_of(op, s);
    e.k.data.buffer = e.v.data.buffer = &e.buffer;
    const size_t dim = e.v.dim, stride = cpu_sum_stride(dim);
    const uint32_t head = task % o->n_head, tok = task / o->n_head * op->chunk;
    const uint32_t n_tok = MOE_MIN(op->chunk, o->n_tok - tok), end = o->pos + tok + n_tok;
    float *total = s->expanded_total;
    cpu_expand_weights(q, op, head, s);
    memset(total, 0, n_tok * stride * sizeof *total);
    for (uint32_t i = 0; i < n_tok; i += CPU_PANEL) {
        const uint32_t n = MOE_MIN(CPU_PANEL, n_tok - i);
        const cpu_scratch part = cpu_panel_scratch(s, &e, i);
        const cpu_queries a = cpu_panel_queries(op, &e, head, tok + i, n);
        cpu_gather_queries(q, &a, &part);
    }
    for (uint32_t start = 0; start < end; start += CPU_SEGMENT) {
        cpu_expand(q, &op->k, &e, start, MOE_MIN(CPU_SEGMENT, end - start), s);
        for (uint32_t i = 0; i < n_tok; i += CPU_PANEL) {
            const uint32_t n = MOE_MIN(CPU_PANEL, n_tok - i);
            const cpu_scratch part = cpu_panel_scratch(s, &e, i);
            const cpu_queries a = cpu_panel_queries(op, &e, head, tok + i, n);
            if (o->pos + tok + i + n <= start)
                continue;
            cpu_segment(q, &a, start, &part);
            cpu_merge(q, total + i * stride, s->partial, dim, n);
        }
    }
    for (uint32_t i = 0; i < n_tok; i++)
        cpu_attend_finish(q, o, dim, tok + i, head, total + i * stride);
}

#endif
