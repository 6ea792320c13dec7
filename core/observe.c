/* core/observe.c - shows an observer what a session computes with: routers' choices, inputs of
 * matrices.
 *
 * Everything is read through the backend, right behind the operation it belongs to, into memory
 * that was allocated when the session was opened. A read ends a submission early, which changes no
 * result. Must never: write to a buffer. */
#ifndef MOE_CORE_OBSERVE_C
#define MOE_CORE_OBSERVE_C

#include "model.h"

typedef struct moe_observe {
    moe_observer observer;
    uint64_t n_rows_max, n_product_max; // room in what follows
    float *rows;        // [n_rows_max] floats
    float *weights;     // [n_product_max]
    int32_t *ids;       // [n_product_max]
    moe_status status;  // the first failure since it was cleared; nothing is shown after it
    moe_error *error;   // the session's
} moe_observe;

/* Room that a session with these limits needs. */
static void observe_plan(const moe_hparams *hp, const moe_queue_options *q, moe_observe *o)
{
    const uint64_t head = hp->n_latent ? (uint64_t)hp->n_head * MOE_MAX(hp->head_dim, hp->n_latent)
                                       : 0;
    const uint64_t expert = (uint64_t)q->n_used_max * row_limit_longest(q->rows.experts);
    const uint64_t row = MOE_MAX(MOE_MAX(row_limit_longest(q->rows.matmul), expert), head);
    const uint64_t product = MOE_MAX(MOE_MAX(q->n_used_max, 1), hp->n_latent ? hp->n_head : 0);
    o->n_rows_max = q->n_tok_max * row;
    o->n_product_max = q->n_tok_max * product;
}

/* Bytes of that room; 0 without an observer. */
static uint64_t observe_bytes(const moe_hparams *hp, const moe_queue_options *q,
                              const moe_observer *observer)
{
    moe_observe o = {.status = MOE_OK};
    if (!observer)
        return 0;
    observe_plan(hp, q, &o);
    return align_up(sizeof o, MEM_ALIGN) + align_up(o.n_rows_max * sizeof *o.rows, MEM_ALIGN) +
           align_up(o.n_product_max * sizeof *o.weights, MEM_ALIGN) +
           align_up(o.n_product_max * sizeof *o.ids, MEM_ALIGN) + 4 * MEM_ALIGN;
}

static void observe_close(moe_mem *mem, moe_observe *o)
{
    if (!o)
        return;
    mem_free(mem, o->rows);
    mem_free(mem, o->weights);
    mem_free(mem, o->ids);
    mem_free(mem, o);
}

/* NULL if there is no memory. */
static moe_observe *observe_open(moe_mem *mem, const moe_hparams *hp, const moe_queue_options *q,
                                 const moe_observer *observer, moe_error *error)
{
    moe_observe *o = mem_alloc(mem, 1, sizeof *o);
    if (!o)
        return NULL;
    memcpy(&o->observer, observer, MOE_MIN(observer->size, sizeof o->observer));
    o->error = error;
    observe_plan(hp, q, o);
    o->rows = mem_alloc_uncleared(mem, o->n_rows_max, sizeof *o->rows);
    o->weights = mem_alloc_uncleared(mem, o->n_product_max, sizeof *o->weights);
    o->ids = mem_alloc_uncleared(mem, o->n_product_max, sizeof *o->ids);
    if (o->rows && o->weights && o->ids)
        return o;
    observe_close(mem, o);
    return NULL;
}

/* Copies to the host; false after a failure. */
static bool observe_read(moe_observe *o, const moe_backend *be, moe_queue *queue, moe_view src,
                         void *dst, uint64_t bytes)
{
    if (!o->status)
        o->status = be->read(queue, src, dst, bytes, o->error);
    return !o->status;
}

/* Shows n_product products with a weight, whose rows and matrices stand in o->rows and o->ids. */
static void observe_show(moe_observe *o, const moe_weight *w, uint32_t n_product,
                         uint32_t n_per_row, uint32_t row_stride)
{
    const moe_observed_input input = {
        .size = sizeof input,
        .tensor = w->name,
        .n_in = (uint32_t)w->dims[0],
        .n_matrix = (uint32_t)w->dims[2],
        .n_product = n_product,
        .n_per_row = n_per_row,
        .row_stride = row_stride,
        .rows = o->rows,
        .matrix = o->ids,
    };
    if (w->name)
        o->observer.input(o->observer.user, &input);
}

/* Reads rows of floats that stand `stride` apart. */
static bool observe_rows(moe_observe *o, const moe_backend *be, moe_queue *queue, moe_view src,
                         uint64_t n_row, uint64_t stride, uint64_t n_in)
{
    const uint64_t n = (n_row - 1) * stride + n_in;
    MOE_ASSERT(n <= o->n_rows_max);
    return observe_read(o, be, queue, src, o->rows, n * sizeof *o->rows);
}

static void observe_matmul(moe_observe *o, const moe_backend *be, moe_queue *queue,
                           const moe_matmul_op *op)
{
    const uint32_t n_in = (uint32_t)op->out[0].w->dims[0];
    if (!o->observer.input || !observe_rows(o, be, queue, op->src, op->n_tok, n_in, n_in))
        return;
    memset(o->ids, 0, op->n_tok * sizeof *o->ids);
    for (uint32_t i = 0; i < op->n_out; i++) // parts of one tensor are shown once
        if (!i || op->out[i].w->name != op->out[i - 1].w->name)
            observe_show(o, op->out[i].w, op->n_tok, 1, n_in);
}

static void observe_experts(moe_observe *o, const moe_backend *be, moe_queue *queue,
                            const moe_experts_op *op)
{
    const uint32_t n_in = (uint32_t)op->out[0].w->dims[0], n_product = op->n_tok * op->n_used;
    const uint32_t n_per_row = op->shared_src ? op->n_used : 1;
    MOE_ASSERT(n_product <= o->n_product_max);
    if (!o->observer.input ||
        !observe_rows(o, be, queue, op->src, n_product / n_per_row, n_in, n_in) ||
        !observe_read(o, be, queue, op->ids, o->ids, n_product * sizeof *o->ids))
        return;
    for (uint32_t i = 0; i < op->n_out; i++)
        if (!i || op->out[i].w->name != op->out[i - 1].w->name)
            observe_show(o, op->out[i].w, n_product, n_per_row, n_in);
}

/* A stack of matrices, one for each head, which are multiplied with rows of their own, or
 * with one row of a token. */
static void observe_stack(moe_observe *o, const moe_backend *be, moe_queue *queue,
                          const moe_weight *w, moe_view src, uint32_t n_tok, uint32_t stride,
                          uint32_t n_per_row)
{
    const uint32_t n_head = (uint32_t)w->dims[2], n_product = n_tok * n_head;
    MOE_ASSERT(n_product <= o->n_product_max);
    if (!o->observer.input || !w->name ||
        !observe_rows(o, be, queue, src, n_product / n_per_row, stride, w->dims[0]))
        return;
    for (uint32_t i = 0; i < n_product; i++)
        o->ids[i] = (int32_t)(i % n_head);
    observe_show(o, w, n_product, n_per_row, stride);
}

static void observe_heads(moe_observe *o, const moe_backend *be, moe_queue *queue,
                          const moe_heads_op *op)
{
    observe_stack(o, be, queue, op->w, op->src, op->n_tok, op->src_stride, 1);
}

/* A matrix that is not multiplied with as it stands in the file, since others were made from it;
 * the rows are what it would be multiplied with. */
static void observe_source(moe_observe *o, const moe_backend *be, moe_queue *queue,
                           const moe_weight *w, moe_view src, uint32_t n_tok, uint32_t stride)
{
    if (!o->observer.input || !observe_rows(o, be, queue, src, n_tok, stride, w->dims[0]))
        return;
    memset(o->ids, 0, n_tok * sizeof *o->ids);
    observe_show(o, w, n_tok, 1, stride);
}

static void observe_route(moe_observe *o, const moe_backend *be, moe_queue *queue,
                          const moe_route_op *op, uint32_t layer, uint32_t pos)
{
    const uint64_t n = (uint64_t)op->n_tok * op->router.n_used;
    MOE_ASSERT(n <= o->n_product_max);
    if (!o->observer.experts ||
        !observe_read(o, be, queue, op->ids, o->ids, n * sizeof *o->ids) ||
        !observe_read(o, be, queue, op->weights, o->weights, n * sizeof *o->weights))
        return;
    const moe_observed_experts experts = {
        .size = sizeof experts,
        .layer = layer,
        .pos = pos,
        .n_tok = op->n_tok,
        .n_used = op->router.n_used,
        .n_expert = op->router.n_expert,
        .ids = o->ids,
        .weights = o->weights,
    };
    o->observer.experts(o->observer.user, &experts);
}

#endif
