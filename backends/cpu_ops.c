/* backends/cpu_ops.c - what each operation of backends/backend.h does on the CPU.
 *
 * An operation is one or two phases of independent tasks (cpu_threads.c). This file holds the
 * bodies of the tasks and the number of them; backends/cpu.c records operations and owns the
 * memory. The way work is cut into tasks never reaches the results: each output element is computed
 * whole, by one task, by an expression that knows nothing of tasks.
 *
 * Must never: allocate, lock, fail. */
#ifndef MOE_BACKENDS_CPU_OPS_C
#define MOE_BACKENDS_CPU_OPS_C

#include "../quant/quant.c"
#include "backend.h"
#include "cpu_int16.h"
#include "cpu_outer.h"
#include "cpu_simd.h"
#include "cpu_threads.c"

enum {
    CPU_MAX_OPS = 2048,
    CPU_MAX_PHASES = 3 * CPU_MAX_OPS,
    CPU_TOK_TILE = 256,     /* tokens per call of a gemm kernel, which cuts them for its caches */
    CPU_TOK_PART = 64,      /* tokens of a task are a multiple of this */
    CPU_TOK_JOINED = 16,    /* tokens per task of what goes token by token */
    CPU_ROW_TILE = 64,      /* rows per task in prefill */
    CPU_TASKS = 16,         /* tasks per thread that even out what threads differ in */
    CPU_TILE = CPU_TOK_TILE * CPU_ROW_TILE, /* floats of a task's result tile */
    CPU_DECODE_ROWS = 4096,     /* the most rows of a decode task */
    CPU_DECODE_BYTES = 1 << 16, /* weights per decode task */
    CPU_AHEAD_BYTES = 128 << 10, /* of weights fetched while a thread waits: well below L2 */
    CPU_ELEMENTS = 8192,    /* elements per task of the element-wise operations */
    CPU_SEGMENT = 256,      /* positions over which a softmax is computed in one piece */
    CPU_KEY_BLOCK = 64,     /* positions converted to float at once: they stay in L1/L2 */
    CPU_DIM_BLOCK = 128,    /* elements of a panel of queries that stay in L1 */
    CPU_PANEL = 64,         /* queries (tokens x heads) side by side */
    CPU_QUERY_BYTES = 448 << 10, /* of a task's queries with all that is theirs: in L2 */
    CPU_EXPAND_TOKENS = 2048, /* that share the keys and values expanded for a head */
    CPU_FEW_QUERIES = 15,   /* up to so many, keys are transposed instead of queries */
    CPU_F16_QUERIES = 16,   /* up to so many, keys and values of F16 are multiplied as they stand */
    CPU_SCORES = CPU_SEGMENT + 16, /* then: from one query's scores to the next one's */
    CPU_KEY_ROWS = 16       /* and keys before they are transposed */
};

struct moe_buffer {
    uint8_t *data;
    uint64_t bytes;
    bool owned;
};

struct moe_device {
    moe_mem *mem;
    uint32_t cpu; // moe_cpu bits
    const cpu_simd *simd;
    const cpu_outer_kernels *outer;
    const cpu_int16 *int16;
    moe_kernels kernels[MOE_COUNT(quant_table)];
    char name[48];
};

typedef struct cpu_op cpu_op;
typedef void cpu_op_fn(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread);

typedef struct cpu_phase {
    const cpu_op *op;
    cpu_op_fn *run;
    uint32_t n_task;
    bool per_active_expert; // the number of tasks is n_task times the experts in use
    bool joined; // task i belongs to task i of the phase before: the same tokens, still in cache
} cpu_phase;

struct cpu_op {
    uint32_t chunk; // rows, elements or tokens per task
    uint32_t tok_chunk, row_tasks; // of a product: tokens per task, tasks with the same tokens
    uint32_t act_mask; // bit i: moe_act i is needed
    union {
        moe_embed_op embed;
        moe_norm_op norm;
        moe_matmul_op matmul;
        moe_rope_op rope;
        moe_store_op store;
        moe_attend_op attend;
        moe_heads_op heads;
        moe_conv_op conv;
        moe_gates_op gates;
        moe_delta_op delta;
        moe_copy_op copy;
        moe_glu_op glu;
        moe_add_op add;
        moe_softcap_op softcap;
        moe_route_op route;
        moe_experts_op experts;
        moe_combine_op combine;
    } u;
    moe_cache k, v; // copies of what store and attend point to
};

/* Memory of one thread. */
typedef struct cpu_scratch {
    float *tile;    // [CPU_TILE] results of a matrix tile; also scores of a router
    float *queries; // [n_panel][dim_max][CPU_PANEL or less]; few: [n_query][dim_max]
    float *rows;    // [CPU_KEY_ROWS][dim_max rounded up to 32]: keys as they are stored
    float *block;   // [CPU_KEY_BLOCK][dim_max rounded up to 32] keys or values; few: keys turned
    float *scores;  // [n_panel][CPU_SEGMENT][CPU_PANEL or less]; few: [n_query][CPU_SCORES]
    float *partial; // [n_query][cpu_sum_stride(dim_max)]: a segment's values, maximum and sum
    float *total;   // the same of the segments so far
    /* Of latents as integers: */
    int16_t *codes;   // [n_query][dim_max rounded up to 32]: queries
    float *scales;    // [n_query]
    int16_t *weights; // [n_query][I16_BLOCK]
    float *steps;     // [n_query]
    /* Of latent attention in its expanded form, a head at a time: */
    float *up;               // [n_latent][n_nope], [n_latent][dim_v]: its matrices
    float *expanded;         // [CPU_SEGMENT][dim_k], [CPU_SEGMENT][dim_v]: keys, values
    float *expanded_queries; // [n_panel][dim_k][CPU_PANEL]
    float *expanded_total;   // [n_tok][cpu_sum_stride(dim_v)]
} cpu_scratch;

/* Which choice of experts is sorted: that of the gates serves for the matrices behind them. */
typedef struct cpu_sorted {
    moe_view ids;      // buffer NULL: none
    uint32_t n_expert, n; // n: tokens times slots
} cpu_sorted;

struct moe_queue {
    moe_device *device;
    moe_queue_options options;
    cpu_pool pool;
    _Atomic bool cancelled;
    uint32_t n_op, n_phase;
    uint8_t *memory;   // one block, in which all of the following lie
    cpu_op *ops;       // [CPU_MAX_OPS]
    cpu_phase *phases; // [CPU_MAX_PHASES]
    uint8_t *act[MOE_ACT_COUNT]; // by moe_act: packed rows of the running product
    float *segments;   // [n_segment][n_head_max][cpu_sum_stride(dim_max)]: of one token
    uint32_t *expert_start;  // [n_expert_max + 1]: first row of each active expert's tokens
    uint32_t *expert_id;     // [n_expert_max]: the experts in use, ascending
    uint32_t *expert_count;  // [n_expert_max]
    uint32_t *expert_row;    // [n_tok_max * n_used_max]: (token, slot) -> row in expert order
    uint32_t *expert_slot;   // [n_tok_max * n_used_max]: and back
    uint32_t n_active;
    cpu_sorted sorted;       // what will be sorted when what is recorded has run
    cpu_scratch *scratch;    // [n_threads]
};

/* The queries of keys and values of `dim` that one task computes in prefill: whole panels. */
MOE_INLINE uint32_t cpu_most_queries(uint32_t dim)
{
    const uint64_t bytes = (3 * (uint64_t)dim + CPU_SEGMENT) * sizeof(float);
    return MOE_MAX(1, (uint32_t)(CPU_QUERY_BYTES / bytes) / CPU_PANEL) * CPU_PANEL;
}

MOE_INLINE float *cpu_floats(moe_view v)
{
    return (float *)(void *)(v.buffer->data + v.offset);
}

MOE_INLINE const int32_t *cpu_ids(moe_view v)
{
    return (const int32_t *)(const void *)(v.buffer->data + v.offset);
}

MOE_INLINE bool cpu_same_place(moe_view a, moe_view b)
{
    return a.buffer == b.buffer && a.offset == b.offset;
}

MOE_INLINE uint32_t cpu_ceil_div(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

/* Fetches memory that will be read soon, wherever it ends. */
MOE_INLINE void cpu_fetch(uintptr_t address, size_t bytes)
{
#ifdef __GNUC__
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const void *)(address + i));
#else
    (void)address, (void)bytes;
#endif
}

/* ------------------------------------------------------------------- embedding and norms -- */

static void cpu_embed(moe_queue *q, const cpu_op *op, uint32_t t, uint32_t thread)
{
    (void)thread;
    const moe_embed_op *o = &op->u.embed;
    const moe_weight *w = o->table;
    const uint64_t row = (uint32_t)cpu_ids(o->ids)[t];
    float *dst = cpu_floats(o->dst) + (size_t)t * w->dims[0];
    w->quant->dequantize(w->data.buffer->data + w->data.offset + row * w->row_bytes, dst,
                         (size_t)w->dims[0]);
    if (o->scale != 1.0f)
        q->device->simd->scale_rows(dst, dst, o->scale, NULL, (size_t)w->dims[0]);
}

static void cpu_norm(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_norm_op *o = &op->u.norm;
    const cpu_simd *simd = q->device->simd;
    const float *weight = o->weight.buffer ? cpu_floats(o->weight) : NULL;
    const uint32_t end = MOE_MIN(o->n_row, (task + 1) * op->chunk);
    for (uint32_t r = task * op->chunk; r < end; r++) {
        const float *src = cpu_floats(o->src) + (size_t)r * o->src_stride;
        float mean = simd->sum_squares(src, o->dim) / (o->l2 ? 1.0f : (float)o->dim);
        simd->scale_rows(cpu_floats(o->dst) + (size_t)r * o->dst_stride, src,
                         1.0f / sqrtf(mean + o->eps), weight, o->dim);
    }
}

/* Tokens per task of operations that go token by token, so that they can be joined. */
MOE_INLINE uint32_t cpu_joined_tokens(const moe_queue *q, uint32_t n_tok)
{
    return MOE_MAX(1, MOE_MIN(CPU_TOK_JOINED, n_tok / (4 * q->options.n_threads)));
}

/* --------------------------------------------------------------------- matrix products -- */

/* Whether the kernels take a product's activations as they stand: as floats, in rows like those
 * that packing makes, which no result is written over. */
static bool cpu_takes_floats(const moe_matmul_op *o)
{
    const size_t row_bytes = (size_t)o->out[0].w->dims[0] * sizeof(float);
    if (row_bytes != act_row_bytes(MOE_ACT_F32, row_bytes / sizeof(float)) ||
        (uintptr_t)cpu_floats(o->src) % 64)
        return false;
    for (uint32_t i = 0; i < o->n_out; i++) {
        const size_t bytes = (size_t)o->out[i].w->dims[1] * o->n_tok * sizeof(float);
        const uintptr_t src = (uintptr_t)cpu_floats(o->src);
        const uintptr_t dst = (uintptr_t)cpu_floats(o->out[i].dst);
        if (src < dst + bytes && dst < src + row_bytes * o->n_tok)
            return false;
    }
    return true;
}

/* Phase 1 of a product: some tokens in each form that a matrix wants. */
static void cpu_matmul_quantize(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_matmul_op *o = &op->u.matmul;
    const size_t n_in = (size_t)o->out[0].w->dims[0];
    const uint32_t n = cpu_joined_tokens(q, o->n_tok), end = MOE_MIN(o->n_tok, (task + 1) * n);
    for (uint32_t act = 0; act < MOE_COUNT(q->act); act++) {
        if (!(op->act_mask >> act & 1) || (act == MOE_ACT_F32 && cpu_takes_floats(o)))
            continue;
        for (uint32_t t = task * n; t < end; t++)
            act_quantize((moe_act)act, cpu_floats(o->src) + t * n_in, n_in,
                         q->act[act] + t * act_row_bytes((moe_act)act, n_in), q->device->cpu);
    }
}

/* A matrix's factor, of a stack's the one of number i; NULL: none. */
MOE_INLINE const float *cpu_scale(const moe_weight *w, size_t i)
{
    return w->scale.buffer ? cpu_floats(w->scale) + i : NULL;
}

/* dst = (add ? dst : 0) + (scale tile + bias), n_row elements of one token. */
static void cpu_finish_row(const cpu_simd *simd, float *dst, float *tile, const float *scale,
                           const float *bias, bool add, size_t n_row)
{
    for (size_t i = 0; scale && i < n_row; i++)
        tile[i] *= *scale;
    if (bias)
        simd->add(add ? tile : dst, tile, bias, 1.0f, n_row);
    if (add)
        simd->add(dst, dst, tile, 1.0f, n_row);
    else if (!bias)
        memcpy(dst, tile, n_row * sizeof *dst);
}

/* Rows [row, row + n_row) of a matrix times the tokens [tok, end), before those of `next`. */
static void cpu_matmul_rows(moe_queue *q, const moe_matmul_op *o, uint32_t i, size_t row,
                            size_t n_row, size_t tok, size_t end, const uint8_t *next, float *tile)
{
    const moe_weight *w = o->out[i].w;
    const moe_act act = w->quant->act;
    const moe_kernels *kernels = &q->device->kernels[quant_index(w->quant)];
    const size_t n_out = (size_t)w->dims[1];
    const float *scale = cpu_scale(w, 0);
    const bool direct = !o->out[i].bias.buffer && !o->out[i].add && !scale;
    const bool in_place = act == MOE_ACT_F32 && cpu_takes_floats(o);
    const size_t tok_tile = o->n_tok == 1 ? 1 : MOE_MIN(CPU_TOK_TILE, CPU_TILE / n_row);
    float *dst = cpu_floats(o->out[i].dst) + row;
    const float *bias = o->out[i].bias.buffer ? cpu_floats(o->out[i].bias) + row : NULL;
    for (size_t t = tok; t < end; t += tok_tile) {
        moe_mm mm = {
            .w = w->data.buffer->data + w->data.offset + row * w->row_bytes,
            .w_stride = (size_t)w->row_bytes,
            .x_stride = act_row_bytes(act, (size_t)w->dims[0]),
            .y = direct ? dst + t * n_out : tile,
            .y_stride = direct ? n_out : n_row,
            .n_in = (size_t)w->dims[0],
            .n_row = n_row,
            .n_tok = MOE_MIN(tok_tile, end - t),
            .next = next,
        };
        mm.x = (in_place ? (const uint8_t *)cpu_floats(o->src) : q->act[act]) + t * mm.x_stride;
        /* What is added to is there when the product is. */
        for (size_t k = 0; o->out[i].add && o->n_tok > 1 && k < mm.n_tok; k++)
            cpu_fetch((uintptr_t)(dst + (t + k) * n_out), n_row * sizeof *dst);
        (o->n_tok == 1 ? kernels->gemv : kernels->gemm)(&mm);
        for (size_t k = 0; !direct && k < mm.n_tok; k++)
            cpu_finish_row(q->device->simd, dst + (t + k) * n_out, tile + k * n_row, scale, bias,
                           o->out[i].add, n_row);
    }
}

/* The matrix of a task of phase 2, its first row and its first token. Neighbouring tasks have the
 * same tokens, whose activations then stay in L2 from one chunk of rows to the next. */
static uint32_t cpu_matmul_task(const cpu_op *op, uint32_t task, uint64_t *row, uint32_t *tok)
{
    const moe_matmul_op *o = &op->u.matmul;
    uint32_t i = 0;
    *tok = task / op->row_tasks * op->tok_chunk;
    task %= op->row_tasks;
    for (uint32_t n; task >= (n = cpu_ceil_div(o->out[i].w->dims[1], op->chunk)); i++)
        task -= n;
    *row = (uint64_t)task * op->chunk;
    return i;
}

/* The weights of a task, and how many bytes they and those behind them in the matrix are; NULL: all
 * tasks come before this one. */
static const uint8_t *cpu_matmul_weights(const cpu_op *op, uint32_t task, uint64_t *bytes)
{
    uint64_t row;
    uint32_t tok;
    if (task >= op->row_tasks * cpu_ceil_div(op->u.matmul.n_tok, op->tok_chunk))
        return NULL;
    const moe_weight *w = op->u.matmul.out[cpu_matmul_task(op, task, &row, &tok)].w;
    *bytes = (w->dims[1] - row) * w->row_bytes;
    return w->data.buffer->data + w->data.offset + row * w->row_bytes;
}

/* Phase 2: a chunk of rows of one of the matrices times a chunk of the tokens. */
static void cpu_matmul(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_matmul_op *o = &op->u.matmul;
    uint64_t row, bytes;
    uint32_t tok;
    const uint32_t i = cpu_matmul_task(op, task, &row, &tok);
    cpu_matmul_rows(q, o, i, (size_t)row, (size_t)MOE_MIN(op->chunk, o->out[i].w->dims[1] - row),
                    tok, MOE_MIN(o->n_tok, tok + op->tok_chunk),
                    cpu_matmul_weights(op, task + 1, &bytes), q->scratch[thread].tile);
}

/* What a thread fetches of the weights with which its share of a product begins. */
static cpu_upcoming cpu_upcoming_weights(const cpu_op *op, const uint8_t *weights, uint64_t bytes)
{
    if (!weights)
        return (cpu_upcoming){op, 0, 0};
    const uintptr_t next = (uintptr_t)weights;
    return (cpu_upcoming){op, next, next + (uintptr_t)MOE_MIN(bytes, CPU_AHEAD_BYTES)};
}

/* Rows per task: enough weights to be worth a task, enough tasks to keep all threads busy. */
static uint32_t cpu_chunk_rows(const moe_queue *q, uint64_t total_rows, uint64_t row_bytes,
                               uint32_t n_tok)
{
    uint64_t rows = CPU_ROW_TILE;
    if (n_tok == 1)
        rows = MOE_MIN(CPU_DECODE_ROWS, CPU_DECODE_BYTES / MOE_MAX(row_bytes, 1));
    rows = MOE_MIN(rows, total_rows / (4 * q->options.n_threads));
    return (uint32_t)MOE_MAX(rows / 8 * 8, 8);
}

/* Tokens per task: as many as a call of a kernel takes, or less where the rows alone are too few
 * tasks to come out even: the 9 tasks of 576 rows take two threads as long as 10 would. Halves of
 * halves, so that a thread mostly gets the tokens that it had in the phase before. */
static uint32_t cpu_chunk_tokens(const moe_queue *q, uint32_t row_tasks, uint32_t n_tok)
{
    const uint32_t n_threads = q->options.n_threads;
    uint32_t wanted = cpu_ceil_div(n_tok, CPU_TOK_TILE), n_part = 1;
    if (n_threads > 1)
        wanted = MOE_MAX(wanted, cpu_ceil_div(CPU_TASKS * n_threads, row_tasks));
    while (n_part < wanted && 2 * n_part <= n_tok / CPU_TOK_PART)
        n_part *= 2;
    return n_part == 1 ? n_tok : (uint32_t)align_up(cpu_ceil_div(n_tok, n_part), CPU_TOK_PART);
}

/* --------------------------------------------------------------------------- position -- */

static void cpu_rope(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_rope_op *o = &op->u.rope;
    const uint32_t half = o->n_rot / 2;
    const uint32_t step = o->interleaved ? 2 : 1, mate = o->interleaved ? 1 : half;
    const uint32_t end = MOE_MIN(o->n_tok, (task + 1) * op->chunk);
    for (uint32_t t = task * op->chunk; t < end; t++) {
        const float *table = cpu_floats(o->table) + (size_t)t * o->n_rot;
        for (uint32_t h = 0; h < o->n_head; h++) {
            float *x = cpu_floats(o->x) + ((size_t)t * o->n_head + h) * o->head_dim + o->first;
            q->device->simd->rope(x, table, half, step, mate);
        }
    }
}

/* ------------------------------------------------------------------------------- cache -- */

/* From one row to the next. */
MOE_INLINE uint64_t cpu_row_bytes(const moe_cache *c)
{
    return cache_row_bytes(c->type, c->dim) - (c->type == CACHE_INT16 ? sizeof(float) : 0);
}

MOE_INLINE uint8_t *cpu_cache_row(const moe_cache *c, uint32_t head, uint32_t pos)
{
    const uint64_t row = (uint64_t)head * c->n_slot + pos % c->n_slot;
    return c->data.buffer->data + c->data.offset + row * cpu_row_bytes(c);
}

MOE_INLINE const int16_t *cpu_codes(const moe_cache *c, uint32_t head, uint32_t pos)
{
    return (const int16_t *)(const void *)cpu_cache_row(c, head, pos);
}

/* The scale of a row of CACHE_INT16: all of them stand behind the rows, which so begin with a line
 * of the processor's caches. */
MOE_INLINE float *cpu_cache_scale(const moe_cache *c, uint32_t head, uint32_t pos)
{
    const uint64_t n_row = (uint64_t)c->n_head * c->n_slot;
    uint8_t *scales = c->data.buffer->data + c->data.offset + n_row * cpu_row_bytes(c);
    return (float *)(void *)scales + (uint64_t)head * c->n_slot + pos % c->n_slot;
}

/* -------------------------------------------------------------------- products per head -- */

/* Phase 1: one head of all tokens, in the form that the matrices want. A head's tokens are
 * neighbours there. */
static void cpu_heads_quantize(moe_queue *q, const cpu_op *op, uint32_t head, uint32_t thread)
{
    (void)thread;
    const moe_heads_op *o = &op->u.heads;
    const moe_act act = o->w->quant->act;
    const size_t n_in = (size_t)o->w->dims[0], bytes = act_row_bytes(act, n_in);
    for (uint32_t t = 0; t < o->n_tok; t++)
        act_quantize(act, cpu_floats(o->src) + (t * o->w->dims[2] + head) * o->src_stride, n_in,
                     q->act[act] + ((size_t)head * o->n_tok + t) * bytes, q->device->cpu);
}

/* Phase 2: a chunk of rows of one head's matrix, times all tokens. */
static void cpu_heads(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_heads_op *o = &op->u.heads;
    const moe_weight *w = o->w;
    const moe_act act = w->quant->act;
    const moe_kernels *kernels = &q->device->kernels[quant_index(w->quant)];
    const uint32_t n_chunk = cpu_ceil_div(w->dims[1], op->chunk);
    const size_t head = task / n_chunk, row = (size_t)(task % n_chunk) * op->chunk;
    const size_t y_stride = (size_t)w->dims[2] * o->dst_stride;
    for (size_t t = 0; t < o->n_tok; t += CPU_TOK_TILE) {
        moe_mm mm = {
            .w = w->data.buffer->data + w->data.offset + head * w->matrix_bytes +
                 row * w->row_bytes,
            .w_stride = (size_t)w->row_bytes,
            .x_stride = act_row_bytes(act, (size_t)w->dims[0]),
            .y = cpu_floats(o->dst) + t * y_stride + head * o->dst_stride + row,
            .y_stride = y_stride,
            .n_in = (size_t)w->dims[0],
            .n_row = (size_t)MOE_MIN(op->chunk, w->dims[1] - row),
            .n_tok = MOE_MIN(CPU_TOK_TILE, o->n_tok - t),
        };
        mm.x = q->act[act] + (head * o->n_tok + t) * mm.x_stride;
        (mm.n_tok == 1 ? kernels->gemv : kernels->gemm)(&mm);
    }
}

/* ------------------------------------------------------------------------ element-wise -- */

static void cpu_copy(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)q, (void)thread;
    const moe_copy_op *o = &op->u.copy;
    const uint32_t end = MOE_MIN(o->n_row, (task + 1) * op->chunk);
    for (uint32_t r = task * op->chunk; r < end; r++)
        memcpy(cpu_floats(o->dst) + (size_t)r * o->dst_stride,
               cpu_floats(o->src) + (size_t)r * o->src_stride, o->dim * sizeof(float));
}

static void cpu_glu(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_glu_op *o = &op->u.glu;
    const size_t first = (size_t)task * op->chunk, n = MOE_MIN(op->chunk, o->n - first);
    float *dst = cpu_floats(o->dst) + first;
    const float *gate = cpu_floats(o->gate) + first, *up = cpu_floats(o->up) + first;
    if (o->kind == MOE_GLU_SILU)
        q->device->simd->silu(dst, gate, up, n);
    else if (o->kind == MOE_GLU_GELU_TANH)
        q->device->simd->gelu(dst, gate, up, n);
    else if (o->kind == MOE_GLU_SIGMOID)
        q->device->simd->sigmoid(dst, gate, up, n);
    else
        q->device->simd->silu_clamped(dst, gate, up, o->alpha, o->limit, n);
}

static void cpu_add(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_add_op *o = &op->u.add;
    const size_t first = (size_t)task * CPU_ELEMENTS;
    const size_t n = MOE_MIN(CPU_ELEMENTS, o->n - first);
    float *dst = cpu_floats(o->dst) + first;
    const float *b = cpu_floats(o->b) + first;
    if (o->a.buffer)
        q->device->simd->add(dst, cpu_floats(o->a) + first, b, o->scale, n);
    else
        q->device->simd->scale_rows(dst, b, o->scale, NULL, n);
}

static void cpu_softcap(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)thread;
    const moe_softcap_op *o = &op->u.softcap;
    const uint64_t first = (uint64_t)task * CPU_ELEMENTS;
    q->device->simd->softcap(cpu_floats(o->x) + first, o->cap, MOE_MIN(CPU_ELEMENTS, o->n - first));
}

/* ----------------------------------------------------------------------------- experts -- */

/* x = exp(x - max) / sum, over n elements, summed in ascending order. */
static void cpu_softmax(const cpu_simd *simd, float *x, uint32_t n)
{
    float max = x[0], sum = 0;
    for (uint32_t i = 1; i < n; i++)
        max = x[i] > max ? x[i] : max;
    (void)simd->exp_sum(x, n, max); /* its sum has another order */
    for (uint32_t i = 0; i < n; i++)
        sum += x[i];
    for (uint32_t i = 0; i < n; i++)
        x[i] /= sum;
}

/* The k best of n, the best first, ties to the lower index. Takes x: what was chosen becomes
 * -infinity. An index comes once even if x is all NaN. */
static void cpu_top_k(float *x, uint32_t n, uint32_t k, int32_t *ids)
{
    for (uint32_t s = 0; s < k; s++) {
        int32_t best = -1;
        for (uint32_t i = 0; i < n; i++)
            if (x[i] > (best < 0 ? -INFINITY : x[best]))
                best = (int32_t)i;
        for (uint32_t i = 0; best < 0 && i < n; i++) { /* only NaN or -infinity is left */
            best = (int32_t)i;
            for (uint32_t j = 0; j < s; j++)
                if (ids[j] == best)
                    best = -1;
        }
        ids[s] = best;
        x[best] = -INFINITY;
    }
}

/* Rules out the experts of all but the best groups. */
static void cpu_limit_groups(const moe_router *r, float *choice)
{
    const uint32_t size = r->n_expert / r->n_group;
    float score[MOE_ROUTER_MAX_GROUPS];
    int32_t chosen[MOE_ROUTER_MAX_GROUPS];
    for (uint32_t g = 0; g < r->n_group; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (uint32_t i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > first) {
                second = first;
                first = choice[i];
            } else if (choice[i] > second) {
                second = choice[i];
            }
        }
        score[g] = r->group_max || size == 1 ? first : first + second;
    }
    cpu_top_k(score, r->n_group, r->n_group_used, chosen);
    for (uint32_t i = 0; i < r->n_expert; i++) {
        bool allowed = false;
        for (uint32_t j = 0; j < r->n_group_used; j++)
            allowed |= (uint32_t)chosen[j] == i / size;
        if (!allowed)
            choice[i] = -INFINITY;
    }
}

static void cpu_route_token(const cpu_simd *simd, const moe_router *r, const float *logits,
                            const float *bias, const float *factor, float *score, float *choice,
                            int32_t *ids, float *weights)
{
    memcpy(score, logits, r->n_expert * sizeof *score);
    if (r->score == MOE_SCORE_SOFTMAX)
        cpu_softmax(simd, score, r->n_expert);
    else if (r->score == MOE_SCORE_SIGMOID)
        for (uint32_t i = 0; i < r->n_expert; i++)
            score[i] = cpu_sigmoid(score[i]);
    for (uint32_t i = 0; i < r->n_expert; i++)
        choice[i] = bias ? score[i] + bias[i] : score[i];
    if (r->n_group > 1)
        cpu_limit_groups(r, choice);
    cpu_top_k(choice, r->n_expert, r->n_used, ids);
    for (uint32_t s = 0; s < r->n_used; s++)
        weights[s] = score[ids[s]];
    if (r->score == MOE_SCORE_SOFTMAX_TOPK)
        cpu_softmax(simd, weights, r->n_used);
    float sum = 0;
    for (uint32_t s = 0; s < r->n_used; s++)
        sum += weights[s];
    for (uint32_t s = 0; s < r->n_used; s++) {
        if (r->renormalize)
            weights[s] /= sum > 0x1p-64f ? sum : 0x1p-64f;
        weights[s] *= r->scale;
        if (factor)
            weights[s] *= factor[ids[s]];
    }
}

static void cpu_route(moe_queue *q, const cpu_op *op, uint32_t t, uint32_t thread)
{
    const moe_route_op *o = &op->u.route;
    const moe_router *r = &o->router;
    float *score = q->scratch[thread].tile;
    cpu_route_token(q->device->simd, r, cpu_floats(o->logits) + (size_t)t * r->n_expert,
                    o->bias.buffer ? cpu_floats(o->bias) : NULL,
                    o->factor.buffer ? cpu_floats(o->factor) : NULL, score, score + r->n_expert,
                    (int32_t *)(void *)(cpu_floats(o->ids) + (size_t)t * r->n_used),
                    cpu_floats(o->weights) + (size_t)t * r->n_used);
}

/* Phase 1 of the experts: sorts (token, slot) by expert, so that each expert's tokens are
 * neighbours. One task; a counting sort. */
static void cpu_experts_sort(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    (void)task, (void)thread;
    const moe_experts_op *o = &op->u.experts;
    const uint32_t n_expert = (uint32_t)o->out[0].w->dims[2], n = o->n_tok * o->n_used;
    const int32_t *ids = cpu_ids(o->ids);
    memset(q->expert_count, 0, n_expert * sizeof *q->expert_count);
    for (uint32_t i = 0; i < n; i++)
        q->expert_count[ids[i]]++;
    uint32_t start = 0;
    q->n_active = 0;
    for (uint32_t e = 0; e < n_expert; e++) {
        const uint32_t count = q->expert_count[e];
        q->expert_count[e] = start; /* from here on: where the expert's next row goes */
        if (count) {
            q->expert_id[q->n_active] = e;
            q->expert_start[q->n_active++] = start;
        }
        start += count;
    }
    q->expert_start[q->n_active] = start;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t row = q->expert_count[ids[i]]++;
        q->expert_row[i] = row;
        q->expert_slot[row] = i;
    }
}

/* Phase 2: the activations of token t, at the rows where the sort wants them. */
static void cpu_experts_quantize(moe_queue *q, const cpu_op *op, uint32_t t, uint32_t thread)
{
    (void)thread;
    const moe_experts_op *o = &op->u.experts;
    const size_t n_in = (size_t)o->out[0].w->dims[0];
    for (uint32_t act = 0; act < MOE_COUNT(q->act); act++) {
        if (!(op->act_mask >> act & 1))
            continue;
        const size_t bytes = act_row_bytes((moe_act)act, n_in);
        const uint8_t *first = NULL;
        for (uint32_t s = 0; s < o->n_used; s++) {
            const size_t i = (size_t)t * o->n_used + s;
            uint8_t *dst = q->act[act] + q->expert_row[i] * bytes;
            if (o->shared_src && first) {
                memcpy(dst, first, bytes);
                continue;
            }
            act_quantize((moe_act)act, cpu_floats(o->src) + (o->shared_src ? t : i) * n_in, n_in,
                         dst, q->device->cpu);
            first = dst;
        }
    }
}

/* The matrix of a task of phase 3: output i of the a-th expert in use, and the task's first row. */
static moe_matrix cpu_experts_task(const moe_queue *q, const cpu_op *op, uint32_t task,
                                   uint32_t *a, uint32_t *i, size_t *row)
{
    const moe_experts_op *o = &op->u.experts;
    const uint32_t n_chunk = cpu_ceil_div(o->out[0].w->dims[1], op->chunk);
    *a = task / (n_chunk * o->n_out);
    *i = task / n_chunk % o->n_out;
    *row = (size_t)(task % n_chunk) * op->chunk;
    return weight_matrix(o->out[*i].w, q->expert_id[*a]);
}

/* As cpu_matmul_weights(), once the experts are sorted. */
static const uint8_t *cpu_experts_weights(const moe_queue *q, const cpu_op *op, uint32_t task,
                                          uint64_t *bytes)
{
    const moe_experts_op *o = &op->u.experts;
    uint32_t a, i;
    size_t row;
    if (task >= q->n_active * o->n_out * cpu_ceil_div(o->out[0].w->dims[1], op->chunk))
        return NULL;
    const moe_matrix matrix = cpu_experts_task(q, op, task, &a, &i, &row);
    *bytes = (o->out[i].w->dims[1] - row) * matrix.row_bytes;
    return matrix.data.buffer->data + matrix.data.offset + row * matrix.row_bytes;
}

/* Phase 3: a chunk of rows of one matrix of one expert, times the tokens that chose it. */
static void cpu_experts(moe_queue *q, const cpu_op *op, uint32_t task, uint32_t thread)
{
    const moe_experts_op *o = &op->u.experts;
    uint32_t a, i;
    size_t row;
    uint64_t bytes;
    const moe_matrix matrix = cpu_experts_task(q, op, task, &a, &i, &row);
    const moe_weight *w = o->out[i].w;
    const uint32_t expert = q->expert_id[a];
    const size_t n_out = (size_t)w->dims[1], n_row = MOE_MIN(op->chunk, n_out - row);
    const uint8_t *next = cpu_experts_weights(q, op, task + 1, &bytes);
    const moe_act act = matrix.quant->act;
    const moe_kernels *kernels = &q->device->kernels[quant_index(matrix.quant)];
    const float *bias = o->out[i].bias.buffer ? cpu_floats(o->out[i].bias) + expert * n_out + row
                                              : NULL;
    const uint32_t end = q->expert_start[a + 1];
    const uint32_t tok_tile = (uint32_t)MOE_MIN(CPU_TOK_TILE, CPU_TILE / n_row);
    for (uint32_t t = q->expert_start[a]; t < end; t += tok_tile) {
        moe_mm mm = {
            .w = matrix.data.buffer->data + matrix.data.offset + row * matrix.row_bytes,
            .w_stride = (size_t)matrix.row_bytes,
            .x_stride = act_row_bytes(act, (size_t)w->dims[0]),
            .y = q->scratch[thread].tile,
            .y_stride = n_row,
            .n_in = (size_t)w->dims[0],
            .n_row = n_row,
            .n_tok = MOE_MIN(tok_tile, end - t),
            .next = next,
        };
        mm.x = q->act[act] + t * mm.x_stride;
        (mm.n_tok == 1 ? kernels->gemv : kernels->gemm)(&mm);
        for (size_t k = 0; k < mm.n_tok; k++)
            cpu_finish_row(q->device->simd,
                           cpu_floats(o->out[i].dst) + q->expert_slot[t + k] * n_out + row,
                           mm.y + k * n_row, cpu_scale(w, expert), bias, false, n_row);
    }
}

static void cpu_combine(moe_queue *q, const cpu_op *op, uint32_t t, uint32_t thread)
{
    (void)thread;
    const moe_combine_op *o = &op->u.combine;
    float *dst = cpu_floats(o->dst) + (size_t)t * o->dim;
    q->device->outer->outer(&(cpu_outer){
        .c = dst,
        .a = cpu_floats(o->weights) + (size_t)t * o->n_used,
        .a_step = 1,
        .b = cpu_floats(o->src) + (size_t)t * o->n_used * o->dim,
        .b_stride = o->dim,
        .n_row = 1,
        .n_k = o->n_used,
        .n_col = o->dim,
        .fresh = !o->add,
    });
}

#endif
