/* backends/backend.h - the seam between the model and the machine.
 *
 * Layers (core/layers.c, core/model_*.c) describe work in the terms below and never touch the data:
 * they name weights and views of buffers, and the backend keeps both wherever it likes. What is
 * needed on the host comes through read(). A backend that cannot be read by the host at all runs
 * the layers unchanged; the tests have one (tests/fenced_backend.h).
 *
 * Two kinds of object:
 *   moe_device  one per model: weights, and what is known about the machine.
 *   moe_queue   one per session: threads or command buffers, scratch memory. Operations are
 *               recorded in order and run by submit(). An operation sees the results of all
 *               before it.
 *
 * Recording copies the description, allocates nothing and cannot fail: an operation that does not
 * fit into the queue submits what is there. Errors come out of submit().
 *
 * Every result is defined to the bit by the C code of the CPU backend (backends/cpu_ops.c); no
 * result depends on how the work is divided. Unless it says otherwise, a view holds float32, rows
 * dense and in the order of the shape in the comment.
 */
#ifndef MOE_BACKENDS_BACKEND_H
#define MOE_BACKENDS_BACKEND_H

#include "../quant/quant.h"

typedef struct moe_device moe_device;
typedef struct moe_queue moe_queue;
typedef struct moe_buffer moe_buffer;

/* A place in a buffer; `offset` in bytes, a multiple of 4. (Whole arrays start at multiples of 64;
 * a view of some of their rows may not.) buffer NULL: absent, where the comment allows it. */
typedef struct moe_view {
    moe_buffer *buffer;
    uint64_t offset;
} moe_view;

/* One matrix of a stack. */
typedef struct moe_matrix {
    const moe_quant *quant;
    uint64_t row_bytes;
    moe_view data;
} moe_matrix;

/* A weight matrix or a stack of them (experts): dims[0] is the length of a row (n_in), dims[1] the
 * number of rows (n_out), dims[2] the number of matrices. The matrices of a stack of experts may
 * each have a type and a place of their own: then only experts() takes it. */
typedef struct moe_weight {
    const char *name;   // in the model's file; NULL: made from another weight
    const moe_quant *quant;
    uint64_t dims[3];
    uint64_t row_bytes;
    uint64_t matrix_bytes; // of one matrix of the stack
    moe_view data;
    const moe_matrix *matrices; // [dims[2]]; NULL: one after another at `data`, all of type `quant`
    uint32_t act_mask;          // with `matrices`: bit i: one of them wants moe_act i
    moe_view scale;             // [dims[2]] what each one's products are multiplied with; absent: 1
} moe_weight;

MOE_INLINE moe_view view_at(moe_view v, uint64_t bytes)
{
    return (moe_view){v.buffer, v.offset + bytes};
}

MOE_INLINE bool weight_present(const moe_weight *w)
{
    return w && w->data.buffer;
}

MOE_INLINE moe_matrix weight_matrix(const moe_weight *w, uint64_t index)
{
    return w->matrices ? w->matrices[index]
                       : (moe_matrix){w->quant, w->row_bytes,
                                      view_at(w->data, index * w->matrix_bytes)};
}

/* The forms of activations that the matrices want: bit i for moe_act i. */
MOE_INLINE uint32_t weight_act_mask(const moe_weight *w)
{
    return w->matrices ? w->act_mask : 1u << w->quant->act;
}

/* ----------------------------------------------------------------------------- operations -- */

/* dst[t][:] = row ids[t] of the table, as floats, times scale. */
typedef struct moe_embed_op {
    moe_view dst;  // [n_tok][n_embd]
    moe_view ids;  // int32 [n_tok], all < dims[1]
    const moe_weight *table;
    float scale;
    uint32_t n_tok;
} moe_embed_op;

/* RMS norm of rows: dst = src / sqrt(mean(src^2) + eps) * weight; with l2 the sum stands in the
 * place of the mean. Row r is at r * stride floats; in place is allowed. Zhang and Sennrich 2019,
 * arXiv:1910.07467. */
typedef struct moe_norm_op {
    moe_view dst, src;   // [n_row][dim], strides below
    moe_view weight;     // [dim]; absent: 1
    uint32_t n_row, dim;
    uint32_t dst_stride, src_stride; // floats
    float eps;
    bool l2;
} moe_norm_op;

enum { MOE_MATMUL_MAX = 4 };

/* Up to 4 matrices that share their input: dst_i[t][:] = (add_i ? dst_i[t][:] : 0) + w_i src[t] +
 * bias_i. dst_i must not overlap src. w_i src[t] includes w_i's scale, a rounded product. */
typedef struct moe_matmul_op {
    moe_view src;        // [n_tok][n_in]
    uint32_t n_tok;
    uint32_t n_out;      // how many of `out` are used
    struct {
        const moe_weight *w;
        moe_view bias;   // [n_out]; may be absent
        moe_view dst;    // [n_tok][dims[1]]
        bool add;
    } out[MOE_MATMUL_MAX];
} moe_matmul_op;

/* Rotary position embedding, in place: in each head the n_rot elements from `first` on are rotated
 * pair by pair, (a, b) -> (a cos - b sin, a sin + b cos). The angles come as a table made by the
 * host, so that no two backends differ. Su et al. 2021, arXiv:2104.09864. */
typedef struct moe_rope_op {
    moe_view x;         // [n_tok][n_head][head_dim]
    moe_view table;     // [n_tok][n_rot / 2][2]: cos, sin
    uint32_t n_tok, n_head, head_dim, first, n_rot;
    bool interleaved;   // pairs (2i, 2i+1), else (i, i + n_rot/2)
} moe_rope_op;

/* How latents are kept where F16 is asked for: as 16-bit integers with a scale for each row, which
 * are as exact and multiplied faster (backends/cpu_int16.h). No other vectors are, and what reads
 * such a cache finds keys and values in the same row. */
#define CACHE_INT16 ((moe_cache_type)(MOE_CACHE_F32 + 1))

/* A cache of one vector per head and position. Position p lives in slot p modulo n_slot; n_slot is
 * the context length, or less for a sliding window. */
typedef struct moe_cache {
    moe_view data;       // [n_head][n_slot], of cache_row_bytes() each: how is the backend's matter
    moe_cache_type type;
    uint32_t n_head, n_slot, dim;
} moe_cache;

MOE_INLINE uint64_t cache_row_bytes(moe_cache_type type, uint32_t dim)
{
    const uint64_t padded = ((uint64_t)dim + 31) / 32 * 32;
    return type == MOE_CACHE_F16   ? (uint64_t)dim * 2
           : type == MOE_CACHE_F32 ? (uint64_t)dim * 4
           : type == CACHE_INT16   ? (dim ? padded * 2 + sizeof(float) : 0)
                                   : padded / 32 * 34; /* blocks of Q8_0 */
}

/* Stores rows for positions pos .. pos + n_tok - 1. */
typedef struct moe_store_op {
    const moe_cache *cache;
    moe_view src;        // [n_tok][n_head][dim]
    uint32_t n_tok, pos;
} moe_store_op;

/* Causal softmax attention of n_tok queries, at positions pos .. pos + n_tok - 1, over the cache;
 * their own keys and values are stored already. Head h reads key/value head h / (n_head /
 * n_head_kv).
 *     s[j] = scale * q . k[j];  s = cap * tanh(s / cap) if cap > 0;  dst = softmax(s) v
 * over the j <= position, and > position - window if window > 0. With a sink, exp(sink[h]) is added
 * to the softmax's denominator. */
typedef struct moe_attend_op {
    moe_view dst;        // [n_tok][n_head][v->dim, or dim_v]
    moe_view q;          // [n_tok][n_head][k->dim]
    const moe_cache *k, *v;
    moe_view sink;       // [n_head]; may be absent
    uint32_t n_tok, pos, n_head, window;
    float scale, cap;
    uint32_t dim_v;      // only the first dim_v elements of a value take part; 0: all. With it v
                         // may be k: latent attention keeps both in one row
    /* Latent attention in its expanded form. A row of k, which is v too, holds a latent c and a
     * part r that all heads share: the key of head h is [c k_b[h], r], its value v_b[h] c. */
    const moe_weight *k_b; // [n_head][n_latent][n_nope]; NULL: keys and values are as they stand
    const moe_weight *v_b; // [n_head][dim_v][n_latent]
} moe_attend_op;

enum { MOE_CONV_MAX_TAP = 64 };

/* Causal convolution over the last n_tap positions, each element by itself. With u = b * x:
 *     y[t][i] = sum over k, ascending, of weight[i][k] * u[t - n_tap + 1 + k][i]
 *     dst = c * y;  or silu(y)
 * u before the first token comes from `before`; what a later call needs goes to `after`. */
typedef struct moe_conv_op {
    moe_view dst;           // [n_tok][dim]
    moe_view x, b, c;       // [n_tok][dim], rows src_stride floats apart; b, c may be absent: 1
    moe_view weight;        // [dim][n_tap]
    moe_view before, after; // [n_tap - 1][dim], the oldest first: the same place, or apart. before
                            // absent: zeros
    uint32_t n_tok, dim, n_tap, src_stride;
    bool silu;              // with it, c is absent
} moe_conv_op;

/* The gates of a delta rule: decay = exp(rate * softplus(a + bias)), beta = sigmoid(b). */
typedef struct moe_gates_op {
    moe_view decay, beta;   // [n_tok][n_head]
    moe_view a, b;          // [n_tok][n_head]
    moe_view rate, bias;    // [n_head]
    uint32_t n_tok, n_head;
} moe_gates_op;

enum { MOE_DELTA_BLOCK = 32 }; // columns of a state that stand together

/* Gated delta rule: each head has a state S [dim_k][dim_v], and for each token in turn
 *     d = beta (v - decay S^T k);  S = decay S + k d^T;  dst = scale S^T q
 * Sums over dim_k run in 4 chains (chain c takes the elements c mod 4, ascending), added as
 * (0 + 1) + (2 + 3). Yang et al. 2024, arXiv:2412.06464. */
typedef struct moe_delta_op {
    moe_view dst;           // [n_tok][n_head][dim_v]
    moe_view qk;            // [n_tok][2][n_head_k][dim_k]
    moe_view v;             // [n_tok][n_head][dim_v]
    moe_view decay, beta;   // [n_tok][n_head]
    moe_view before, after; // [n_head][n_block][dim_k][MOE_DELTA_BLOCK], the last block padded: the
                            // same place, or apart. before absent: zeros
    uint32_t n_tok, n_head, n_head_k, dim_k, dim_v;
    bool tiled;             // head h reads key head h mod n_head_k, else h / (n_head / n_head_k)
    float scale;
} moe_delta_op;

/* Floats of the state of all heads. */
MOE_INLINE uint64_t delta_state_floats(uint32_t n_head, uint32_t dim_k, uint32_t dim_v)
{
    return (uint64_t)n_head * dim_k * align_up(dim_v, MOE_DELTA_BLOCK);
}

/* One matrix per head: dst[t][h][:] = w[h] src[t][h][:]. Rows may stand apart from each other. */
typedef struct moe_heads_op {
    moe_view dst, src;   // [n_tok][dims[2]][stride], of which dims[1], and dims[0], are used
    const moe_weight *w; // dims[2]: heads
    uint32_t n_tok;
    uint32_t dst_stride, src_stride; // floats from head to head
} moe_heads_op;

/* dst = src, for rows that may stand apart. dst must not overlap src. */
typedef struct moe_copy_op {
    moe_view dst, src;   // [n_row][dim], strides below
    uint32_t n_row, dim;
    uint32_t dst_stride, src_stride; // floats
} moe_copy_op;

typedef enum moe_glu_kind {
    MOE_GLU_SILU,      /* silu(gate) * up */
    MOE_GLU_GELU_TANH, /* gelu(gate) * up, with the tanh approximation */
    MOE_GLU_SIGMOID,   /* sigmoid(gate) * up */
    MOE_GLU_CLAMPED    /* gpt-oss: gate and up clamped to `limit`, gate * sigmoid(alpha * gate) *
                          (up + 1) */
} moe_glu_kind;

/* dst = glu(gate, up), element by element; dst may be gate or up. */
typedef struct moe_glu_op {
    moe_view dst, gate, up; // [n]
    uint64_t n;
    moe_glu_kind kind;
    float alpha, limit;
} moe_glu_op;

/* dst = a + scale * b; dst may be a or b. */
typedef struct moe_add_op {
    moe_view dst, a, b;  // [n]; a may be absent: 0
    uint64_t n;
    float scale;
} moe_add_op;

/* x = cap * tanh(x / cap), in place. */
typedef struct moe_softcap_op {
    moe_view x;          // [n]
    uint64_t n;
    float cap;
} moe_softcap_op;

enum { MOE_ROUTER_MAX_GROUPS = 256 };

typedef enum moe_score {
    MOE_SCORE_SOFTMAX,      /* probabilities over all experts; the best k are taken */
    MOE_SCORE_SOFTMAX_TOPK, /* the best k logits are taken; probabilities over those */
    MOE_SCORE_SIGMOID
} moe_score;

/* How a family chooses experts: data, not code. Ties go to the lower expert. */
typedef struct moe_router {
    moe_score score;
    uint32_t n_expert, n_used;
    uint32_t n_group, n_group_used; // > 1: only experts of the best groups may be chosen; a group
                                    // scores the sum of its two best experts (DeepSeek-V3), or its
                                    // best one if group_max (DeepSeek-V2)
    bool group_max;
    bool renormalize;               // the chosen weights are divided by their sum
    float scale;                    // then multiplied by this
} moe_router;

typedef struct moe_route_op {
    moe_view ids;        // int32 [n_tok][n_used], the best first
    moe_view weights;    // [n_tok][n_used]
    moe_view logits;     // [n_tok][n_expert]
    moe_view bias;       // [n_expert], added for the selection only; may be absent
    moe_view factor;     // [n_expert], multiplied to the weight at the end; may be absent
    moe_router router;
    uint32_t n_tok;
} moe_route_op;

/* A matrix of each token's chosen experts: dst_i[t][s][:] = w_i[ids[t][s]] src + bias_i[ids[t][s]],
 * where src is src[t] if shared_src, else src[t][s]. */
typedef struct moe_experts_op {
    moe_view src;        // [n_tok][n_in] or [n_tok][n_used][n_in]
    moe_view ids;        // int32 [n_tok][n_used]
    uint32_t n_tok, n_used;
    bool shared_src;
    uint32_t n_out;
    struct {
        const moe_weight *w;
        moe_view bias;   // [n_expert][n_out]; may be absent
        moe_view dst;    // [n_tok][n_used][n_out]
    } out[2];
} moe_experts_op;

/* dst[t][:] = (add ? dst[t][:] : 0) + sum over s, ascending, of weights[t][s] * src[t][s][:]. */
typedef struct moe_combine_op {
    moe_view dst;        // [n_tok][dim]
    moe_view src;        // [n_tok][n_used][dim]
    moe_view weights;    // [n_tok][n_used]
    uint32_t n_tok, n_used, dim;
    bool add;
} moe_combine_op;

/* -------------------------------------------------------------------------------- backend -- */

typedef struct moe_device_options {
    moe_mem *mem;        // outlives the device
    moe_isa isa;
} moe_device_options;

enum { MOE_MAX_THREADS = 256 };

/* Latents, and what a head's keys and values are that are made of them. */
typedef struct moe_expand_shape {
    uint32_t n_latent, n_nope, dim_k, dim_v; // dim_k: n_nope and the part that all heads share
} moe_expand_shape;

/* The longest rows of the matrices that want a form of activations, by moe_act and by the operation
 * that takes them; 0: there are none. */
typedef struct moe_row_limits {
    uint32_t matmul[MOE_ACT_COUNT];
    uint32_t experts[MOE_ACT_COUNT];
    uint32_t heads[MOE_ACT_COUNT];
} moe_row_limits;

/* Lets the limits of one operation admit a matrix. */
MOE_INLINE void row_limit_raise(uint32_t limit[MOE_ACT_COUNT], const moe_quant *quant,
                                uint64_t n_in)
{
    limit[quant->act] = MOE_MAX(limit[quant->act], (uint32_t)n_in);
}

/* The longest row in any form. */
MOE_INLINE uint32_t row_limit_longest(const uint32_t limit[MOE_ACT_COUNT])
{
    uint32_t longest = 0;
    for (int act = 0; act < MOE_ACT_COUNT; act++)
        longest = MOE_MAX(longest, limit[act]);
    return longest;
}

typedef struct moe_queue_options {
    uint32_t n_threads;      // 1 to MOE_MAX_THREADS
    const moe_cancel *cancel;
    uint32_t n_tok_max;      // the largest n_tok of any operation
    moe_row_limits rows;
    uint32_t n_expert_max;   // 0 if there are no experts
    uint32_t n_used_max;     // experts per token
    uint32_t n_head_max;     // of attend and heads
    uint32_t n_slot_max;     // of a cache
    uint32_t dim_max;        // of a cache
    bool int16;              // some cache is CACHE_INT16
    moe_expand_shape expand; // of attend with expanded keys; zeros: there is none
} moe_queue_options;

typedef struct moe_backend {
    const char *name;

    moe_status (*device_open)(moe_device **out, const moe_device_options *options,
                              moe_error *error);
    void (*device_close)(moe_device *device);
    /* What it runs on, such as "CPU (AVX2)". */
    const char *(*device_name)(const moe_device *device);

    /* Memory for activations and caches: its first content is undefined. */
    moe_status (*buffer_new)(moe_device *device, uint64_t bytes, moe_buffer **out,
                             moe_error *error);
    /* Memory with the content of host memory that stays valid and unchanged as long as the device:
     * weights. A backend may use it in place or copy it. */
    moe_status (*buffer_wrap)(moe_device *device, const void *host, uint64_t bytes,
                              moe_buffer **out, moe_error *error);
    void (*buffer_free)(moe_device *device, moe_buffer *buffer);

    moe_status (*queue_open)(moe_queue **out, moe_device *device,
                             const moe_queue_options *options, moe_error *error);
    void (*queue_close)(moe_queue *queue);
    /* Bytes that queue_open would allocate. */
    uint64_t (*queue_bytes)(const moe_device *device, const moe_queue_options *options);

    /* Runs what was recorded. After an error, and after MOE_ERR_CANCELLED, buffers hold undefined
     * values; the queue is empty and can be used again. */
    moe_status (*submit)(moe_queue *queue, moe_error *error);
    /* Copies between host and device. write() takes effect before operations recorded after it, and
     * after those already recorded; read() submits first. */
    moe_status (*write)(moe_queue *queue, moe_view dst, const void *src, uint64_t bytes);
    moe_status (*read)(moe_queue *queue, moe_view src, void *dst, uint64_t bytes,
                       moe_error *error);

    void (*embed)(moe_queue *queue, const moe_embed_op *op);
    void (*norm)(moe_queue *queue, const moe_norm_op *op);
    void (*matmul)(moe_queue *queue, const moe_matmul_op *op);
    void (*rope)(moe_queue *queue, const moe_rope_op *op);
    void (*store)(moe_queue *queue, const moe_store_op *op);
    void (*attend)(moe_queue *queue, const moe_attend_op *op);
    void (*heads)(moe_queue *queue, const moe_heads_op *op);
    void (*conv)(moe_queue *queue, const moe_conv_op *op);
    void (*gates)(moe_queue *queue, const moe_gates_op *op);
    void (*delta)(moe_queue *queue, const moe_delta_op *op);
    void (*copy)(moe_queue *queue, const moe_copy_op *op);
    void (*glu)(moe_queue *queue, const moe_glu_op *op);
    void (*add)(moe_queue *queue, const moe_add_op *op);
    void (*softcap)(moe_queue *queue, const moe_softcap_op *op);
    void (*route)(moe_queue *queue, const moe_route_op *op);
    void (*experts)(moe_queue *queue, const moe_experts_op *op);
    void (*combine)(moe_queue *queue, const moe_combine_op *op);
} moe_backend;

/* backends/cpu.c */
MOE_UNUSED static const moe_backend *backend_cpu(void);

#endif
