/* core/layers.c - the building blocks of a layer: norms, attention, feed-forward, experts.
 *
 * A block records operations on the backend's queue and returns at once. It decides by what weights
 * are there, never by the family's name; families compose blocks in core/model_<family>.c. */
#ifndef MOE_CORE_LAYERS_C
#define MOE_CORE_LAYERS_C

#include "observe.c"

enum { JOURNAL_TOK = 16 }; /* the most tokens of a batch whose inputs are kept */

/* One batch of tokens on its way through the layers: positions [pos, pos + n_tok) of a session. */
struct moe_pass {
    const moe_model *model;
    const moe_backend *be;
    moe_queue *queue;
    const moe_cache *k_cache, *v_cache; // [n_layer]
    /* Of all recurrent layers: their states before the batch, which are absent at position 0, and
     * behind it. */
    moe_view before, after;
    /* [layer][JOURNAL_TOK][...]: the inputs of a small batch, so that the state behind some of its
     * tokens can be had without computing them anew */
    moe_view journal;
    uint32_t n_tok, pos;
    uint32_t n_out;          // the last tokens, >= 1, whose outputs are wanted of the layers
    bool expanded;           // latent attention makes each head's keys and values
    uint32_t layer;          // whose work is being recorded
    moe_observe *observe;    // NULL: nobody looks on
    /* Places of activations, each large enough for the session's batch. */
    moe_view ids;            // int32 [n_tok]
    moe_view rope[2];        // [n_tok][n_rot / 2][2] cos, sin: global, local layers
    moe_view x;              // [n_tok][n_embd] the residual stream
    moe_view h;              // [n_tok][n_embd] normed, or a block's output
    moe_view q;              // [n_tok][n_head][head_dim]
    moe_view k, v;           // [n_tok][n_head_kv][row of the cache]
    moe_view attn;           // [n_tok][n_head][head_dim_v], or [n_tok][delta.n_head][dim_v]
    moe_view q_latent;       // [n_tok][n_latent_q]
    moe_view q_absorbed;     // [n_tok][n_head][n_latent + n_rot]
    moe_view attn_latent;    // [n_tok][n_head][n_latent]
    moe_view inputs;         // [n_tok][...] of a recurrent layer, before its state takes part
    moe_view mixed;          // [n_tok][n_embd] what experts beside a dense feed-forward give
    moe_view q_gated;        // [n_tok][n_head][2][head_dim]
    moe_view delta_qk;       // [n_tok][2][delta.n_head_k][dim_k]
    moe_view delta_v, delta_z; // [n_tok][delta.n_head][dim_v]
    moe_view delta_decay, delta_beta; // [n_tok][delta.n_head]
    moe_view gate, up;       // [n_tok][n_ff or n_ff_shared], or [n_tok][n_used][n_ff_expert]
    moe_view router;         // [n_tok][n_expert]
    moe_view expert_ids;     // int32 [n_tok][n_used]
    moe_view expert_weights; // [n_tok][n_used]
    moe_view expert_out;     // [n_tok][n_used][n_embd]
    moe_view logits;         // [n_logits][n_vocab]
    /* Of a session that drafts with multi-token prediction: */
    moe_view draft_outputs;  // [n_batch + 1][n_embd]: the model's outputs, normed
    moe_view draft_input;    // [n_tok][2][n_embd]
    moe_view draft_output;   // [n_embd]: the layer's own, normed
};

static void layer_norm(moe_pass *p, moe_view dst, moe_view src, const moe_weight *weight,
                       uint32_t n_row, uint32_t dim)
{
    const moe_norm_op op = {.dst = dst, .src = src, .weight = weight->data, .n_row = n_row,
                            .dim = dim, .dst_stride = dim, .src_stride = dim,
                            .eps = p->model->hp.eps};
    p->be->norm(p->queue, &op);
}

/* Products of matrices go through the next three, so that an observer sees the input of each. */
static void layer_matmul(moe_pass *p, const moe_matmul_op *op)
{
    p->be->matmul(p->queue, op);
    if (p->observe)
        observe_matmul(p->observe, p->be, p->queue, op);
}

static void layer_expert_matmul(moe_pass *p, const moe_experts_op *op)
{
    p->be->experts(p->queue, op);
    if (p->observe)
        observe_experts(p->observe, p->be, p->queue, op);
}

static void layer_head_matmul(moe_pass *p, const moe_heads_op *op)
{
    p->be->heads(p->queue, op);
    if (p->observe)
        observe_heads(p->observe, p->be, p->queue, op);
}

/* dst = (add ? dst : 0) + w src + bias */
static void layer_linear(moe_pass *p, moe_view dst, const moe_weight *w, moe_view src,
                         const moe_weight *bias, bool add)
{
    const moe_matmul_op op = {
        .src = src,
        .n_tok = p->n_tok,
        .n_out = 1,
        .out = {{w, bias ? bias->data : (moe_view){0}, dst, add}},
    };
    layer_matmul(p, &op);
}

/* Whether the rest of the layer is of no use for most of the batch's tokens: in the last one only
 * keys and values of all are wanted, and the outputs of the last n_out. The rows of these move to
 * the front, which copies in any order: they must not overlap. */
static bool layer_narrows(const moe_pass *p)
{
    return p->layer + 1 == p->model->hp.n_layer && p->n_out <= p->n_tok / 2;
}

/* rows: [n_tok][n] */
static void layer_move_rows(moe_pass *p, moe_view rows, uint32_t n)
{
    const uint64_t first = p->n_tok - p->n_out;
    const moe_copy_op op = {rows, view_at(rows, first * n * sizeof(float)), p->n_out, n, n, n};
    p->be->copy(p->queue, &op);
}

/* What follows is computed for the last n_out tokens, from the residual stream and src,
 * [n_tok][n]. */
static void layer_narrow(moe_pass *p, moe_view src, uint32_t n)
{
    layer_move_rows(p, src, n);
    layer_move_rows(p, p->x, p->model->hp.n_embd);
    p->pos += p->n_tok - p->n_out;
    p->n_tok = p->n_out;
}

/* The projection behind what mixes tokens. dst may be p->x, but not src. */
static void layer_linear_behind(moe_pass *p, moe_view dst, const moe_weight *w, moe_view src,
                                const moe_weight *bias, bool add)
{
    if (layer_narrows(p))
        layer_narrow(p, src, (uint32_t)w->dims[0]);
    layer_linear(p, dst, w, src, bias, add);
}

/* ----------------------------------------------------------------------- recurrent layers -- */

/* A layer's part of states. */
static moe_view layer_state(const moe_pass *p, moe_view states, uint32_t index)
{
    const moe_hparams *hp = &p->model->hp;
    const uint64_t bytes = align_up(hparams_state_floats(hp) * sizeof(float), MEM_ALIGN);
    return states.buffer ? view_at(states, recurrent_rank(hp, index) * bytes) : states;
}

/* Where a recurrent layer's inputs go; *capacity tokens fit. */
static moe_view layer_inputs(const moe_pass *p, uint32_t index, uint64_t *capacity)
{
    const moe_hparams *hp = &p->model->hp;
    const uint64_t bytes = align_up(JOURNAL_TOK * hparams_input_floats(hp) * sizeof(float),
                                    MEM_ALIGN);
    *capacity = MOE_MAX(p->n_tok, JOURNAL_TOK);
    return p->n_tok > JOURNAL_TOK ? p->inputs
                                  : view_at(p->journal, recurrent_rank(hp, index) * bytes);
}

/* Short gated convolution, from a layer's inputs [n_tok][3][n_embd] to p->h. */
static void layer_short_conv_mix(moe_pass *p, uint32_t index)
{
    const moe_hparams *hp = &p->model->hp;
    const uint64_t third = hp->n_embd * sizeof(float);
    uint64_t capacity;
    const moe_view inputs = layer_inputs(p, index, &capacity);
    const moe_conv_op conv = {
        .dst = p->h,
        .b = inputs,
        .c = view_at(inputs, third),
        .x = view_at(inputs, 2 * third),
        .weight = p->model->layers[index].conv.data,
        .before = layer_state(p, p->before, index),
        .after = layer_state(p, p->after, index),
        .n_tok = p->n_tok,
        .dim = hp->n_embd,
        .n_tap = hp->n_conv,
        .src_stride = 3 * hp->n_embd,
    };
    p->be->conv(p->queue, &conv);
}

/* A convolution over some of the elements of a layer with a delta rule, from `first` on. */
static void layer_delta_conv(moe_pass *p, uint32_t index, moe_view dst, uint64_t first,
                             uint64_t dim)
{
    const moe_hparams *hp = &p->model->hp;
    const uint64_t n = hparams_conv_dim(hp);
    const uint64_t past = (hparams_delta_floats(hp) + (hp->n_conv - 1) * first) * sizeof(float);
    const moe_view before = layer_state(p, p->before, index);
    uint64_t capacity;
    const moe_conv_op conv = {
        .dst = dst,
        .x = view_at(layer_inputs(p, index, &capacity), first * sizeof(float)),
        .weight = view_at(p->model->layers[index].conv.data, first * hp->n_conv * sizeof(float)),
        .before = before.buffer ? view_at(before, past) : before,
        .after = view_at(layer_state(p, p->after, index), past),
        .n_tok = p->n_tok,
        .dim = (uint32_t)dim,
        .n_tap = hp->n_conv,
        .src_stride = (uint32_t)n,
        .silu = true,
    };
    p->be->conv(p->queue, &conv);
}

/* Gated delta rule, from a layer's inputs to p->attn [n_tok][n_head][dim_v]. The inputs:
 * [n_tok][...] queries, keys and values in front of the convolution; a and b [n_tok][n_head] of the
 * gates. */
static void layer_delta_mix(moe_pass *p, uint32_t index)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_layer *l = &p->model->layers[index];
    const moe_delta_shape *d = &hp->delta;
    const uint64_t n_keys = 2ull * d->n_head_k * d->dim_k, n = hparams_conv_dim(hp);
    uint64_t capacity;
    const moe_view inputs = layer_inputs(p, index, &capacity);
    const moe_view a = view_at(inputs, capacity * n * sizeof(float));
    layer_delta_conv(p, index, p->delta_qk, 0, n_keys);
    layer_delta_conv(p, index, p->delta_v, n_keys, n - n_keys);
    const moe_norm_op norm = {.dst = p->delta_qk, .src = p->delta_qk,
                              .n_row = p->n_tok * 2 * d->n_head_k, .dim = d->dim_k,
                              .dst_stride = d->dim_k, .src_stride = d->dim_k,
                              .eps = 1e-6f, .l2 = true};
    p->be->norm(p->queue, &norm);
    const moe_gates_op gates = {p->delta_decay, p->delta_beta, a,
                                view_at(a, capacity * d->n_head * sizeof(float)),
                                l->delta_rate.data, l->delta_bias.data, p->n_tok, d->n_head};
    p->be->gates(p->queue, &gates);
    const moe_delta_op delta = {
        .dst = p->attn,
        .qk = p->delta_qk,
        .v = p->delta_v,
        .decay = p->delta_decay,
        .beta = p->delta_beta,
        .before = layer_state(p, p->before, index),
        .after = layer_state(p, p->after, index),
        .n_tok = p->n_tok,
        .n_head = d->n_head,
        .n_head_k = d->n_head_k,
        .dim_k = d->dim_k,
        .dim_v = d->dim_v,
        .tiled = d->tiled,
        .scale = (float)(1.0 / sqrt((double)d->dim_k)),
    };
    p->be->delta(p->queue, &delta);
}

/* The part of a recurrent layer that changes its state: from its inputs on. */
static void layer_recur(moe_pass *p, uint32_t index)
{
    if (p->model->hp.delta.n_head)
        layer_delta_mix(p, index);
    else
        layer_short_conv_mix(p, index);
}

/* Short gated convolution: p->h in, added to dst. p->h is used up. */
static void layer_short_conv(moe_pass *p, uint32_t index, moe_view dst)
{
    const moe_layer *l = &p->model->layers[index];
    uint64_t capacity;
    layer_linear(p, layer_inputs(p, index, &capacity), &l->conv_in, p->h, NULL, false);
    layer_recur(p, index);
    layer_linear_behind(p, dst, &l->conv_out, p->h, NULL, true);
}

/* Linear attention by a gated delta rule: p->h in, added to dst. */
static void layer_delta(moe_pass *p, uint32_t index, moe_view dst)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_head = hp->delta.n_head, dim = hp->delta.dim_v;
    uint64_t capacity;
    const moe_view inputs = layer_inputs(p, index, &capacity);
    const moe_view a = view_at(inputs, capacity * hparams_conv_dim(hp) * sizeof(float));
    const moe_matmul_op project = {
        .src = p->h,
        .n_tok = p->n_tok,
        .n_out = 4,
        .out = {{.w = &l->conv_in, .dst = inputs},
                {.w = &l->delta_z, .dst = p->delta_z},
                {.w = &l->delta_a, .dst = a},
                {.w = &l->delta_b, .dst = view_at(a, capacity * n_head * sizeof(float))}},
    };
    layer_matmul(p, &project);
    layer_recur(p, index);
    layer_norm(p, p->attn, p->attn, &l->delta_norm, p->n_tok * n_head, dim);
    const moe_glu_op gate = {.dst = p->attn, .gate = p->delta_z, .up = p->attn,
                             .n = (uint64_t)p->n_tok * n_head * dim, .kind = MOE_GLU_SILU};
    p->be->glu(p->queue, &gate);
    layer_linear_behind(p, dst, &l->conv_out, p->attn, NULL, true);
}

/* ------------------------------------------------------------------------------ attention -- */

/* Norm of each head, or, where the weight is longer, of all heads as one row (OLMoE). */
static void layer_qk_norm(moe_pass *p, moe_view x, const moe_weight *weight, uint32_t n_head,
                          uint32_t head_dim)
{
    const uint32_t dim = (uint32_t)weight->dims[0];
    if (weight_present(weight))
        layer_norm(p, x, x, weight, p->n_tok * (n_head * head_dim / dim), dim);
}

static void layer_rope(moe_pass *p, moe_view x, uint32_t n_head, bool local)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_head_shape heads = hparams_heads(hp, local);
    const moe_rope_op op = {x, p->rope[local], p->n_tok, n_head, heads.dim, 0, heads.n_rot,
                            hp->rope_interleaved};
    p->be->rope(p->queue, &op);
}

static void layer_store(moe_pass *p, const moe_cache *cache, moe_view src)
{
    const moe_store_op op = {cache, src, p->n_tok, p->pos};
    p->be->store(p->queue, &op);
}

/* The queries out of p->q_gated, or their gates, which stand `first` elements behind. */
static void layer_copy_gated(moe_pass *p, moe_view dst, uint32_t first)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_copy_op op = {dst, view_at(p->q_gated, first * sizeof(float)), p->n_tok * hp->n_head,
                            hp->head_dim, hp->head_dim, 2 * hp->head_dim};
    p->be->copy(p->queue, &op);
}

/* p->attn *= sigmoid(gate); p->q is used up. */
static void layer_gate_heads(moe_pass *p)
{
    const moe_hparams *hp = &p->model->hp;
    layer_copy_gated(p, p->q, hp->head_dim);
    const moe_glu_op op = {.dst = p->attn, .gate = p->q, .up = p->attn,
                           .n = (uint64_t)p->n_tok * hp->n_head * hp->head_dim,
                           .kind = MOE_GLU_SIGMOID};
    p->be->glu(p->queue, &op);
}

/* Attention of the pass's tokens over a cache, with what all forms of it share. */
static moe_attend_op layer_attend_op(const moe_pass *p, moe_view dst, moe_view q,
                                     const moe_cache *k, const moe_cache *v)
{
    const moe_hparams *hp = &p->model->hp;
    return (moe_attend_op){.dst = dst, .q = q, .k = k, .v = v, .n_tok = p->n_tok, .pos = p->pos,
                           .n_head = hp->n_head, .scale = hp->attn_scale};
}

/* Keys and values, projected, into the caches. Without values these are the keys, before their
 * norm. */
static void layer_store_keys(moe_pass *p, uint32_t index)
{
    static const moe_weight no_weight = {0};
    const moe_hparams *hp = &p->model->hp;
    const moe_layer *l = &p->model->layers[index];
    const bool local = layer_is_local(hp, index), values = weight_present(&l->wv);
    const moe_head_shape heads = hparams_heads(hp, local);
    if (hp->v_norm)
        layer_norm(p, p->v, values ? p->v : p->k, &no_weight, p->n_tok * heads.n_kv, heads.dim_v);
    layer_qk_norm(p, p->k, &l->k_norm, heads.n_kv, heads.dim);
    layer_rope(p, p->k, heads.n_kv, local);
    layer_store(p, &p->k_cache[index], p->k);
    layer_store(p, &p->v_cache[index], p->v);
}

/* Queries, projected, on the keys and values of the caches: to p->attn. */
static void layer_attend(moe_pass *p, uint32_t index)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_layer *l = &p->model->layers[index];
    const bool local = layer_is_local(hp, index);
    if (hp->q_gated)
        layer_copy_gated(p, p->q, 0);
    layer_qk_norm(p, p->q, &l->q_norm, hp->n_head, hparams_heads(hp, local).dim);
    layer_rope(p, p->q, hp->n_head, local);
    moe_attend_op attend = layer_attend_op(p, p->attn, p->q, &p->k_cache[index],
                                           &p->v_cache[index]);
    attend.sink = l->sinks.data;
    attend.window = local ? hp->window : 0;
    p->be->attend(p->queue, &attend);
    if (hp->q_gated)
        layer_gate_heads(p);
}

/* One more matrix that has op's input. */
static void layer_add_matrix(moe_matmul_op *op, moe_view dst, const moe_weight *w,
                             const moe_weight *bias)
{
    const uint32_t i = op->n_out++;
    op->out[i].w = w;
    op->out[i].bias = bias->data;
    op->out[i].dst = dst;
}

/* Grouped-query attention: p->h in; the output projection is written to dst, or added to it.
 * Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245. */
static void layer_attention(moe_pass *p, uint32_t index, moe_view dst, bool add)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_layer *l = &p->model->layers[index];
    const bool narrows = layer_narrows(p), local = layer_is_local(hp, index);
    const moe_view q = hp->q_gated ? p->q_gated : p->q;
    moe_matmul_op project = {.src = p->h, .n_tok = p->n_tok};
    if (!narrows)
        layer_add_matrix(&project, q, &l->wq, &l->bq);
    layer_add_matrix(&project, p->k, &l->wk, &l->bk);
    if (weight_present(&l->wv))
        layer_add_matrix(&project, p->v, &l->wv, &l->bv);
    layer_matmul(p, &project);
    layer_store_keys(p, index);
    if (narrows) {
        layer_move_rows(p, p->rope[local], hparams_heads(hp, local).n_rot);
        layer_narrow(p, p->h, hp->n_embd);
        layer_linear(p, q, &l->wq, p->h, &l->bq, false);
    }
    layer_attend(p, index);
    layer_linear(p, dst, &l->wo, p->attn, &l->bo, add);
}

/* Queries of latent attention, in p->q, with their last n_rot elements rotated; and p->k, a row of
 * the cache: the normed latent and the rotated part that all heads share. */
static void layer_latent_project(moe_pass *p, const moe_layer *l)
{
    const moe_hparams *hp = &p->model->hp;
    const uint32_t row = hp->n_latent + hp->n_rot, n_nope = hp->head_dim - hp->n_rot;
    const bool direct = !hp->n_latent_q;
    const moe_view no_bias = {NULL, 0};
    const moe_matmul_op project = {
        .src = p->h,
        .n_tok = p->n_tok,
        .n_out = 2,
        .out = {{direct ? &l->wq : &l->wq_a, direct ? no_bias : l->bq_a.data,
                 direct ? p->q : p->q_latent, false},
                {&l->wkv_a, l->bkv_a.data, p->k, false}},
    };
    layer_matmul(p, &project);
    if (!direct) {
        const moe_norm_op norm = {p->q_latent, p->q_latent, l->wq_a_norm.data, p->n_tok,
                                  hp->n_latent_q, hp->n_latent_q, hp->n_latent_q, hp->eps_latent,
                                  false};
        p->be->norm(p->queue, &norm);
        layer_linear(p, p->q, &l->wq_b, p->q_latent, NULL, false);
    }
    const moe_norm_op norm = {p->k, p->k, l->wkv_a_norm.data, p->n_tok, hp->n_latent, row, row,
                              hp->eps_latent, false};
    p->be->norm(p->queue, &norm);
    const moe_rope_op rope_q = {p->q, p->rope[0], p->n_tok, hp->n_head, hp->head_dim, n_nope,
                                hp->n_rot, hp->rope_interleaved};
    const moe_rope_op rope_k = {p->k, p->rope[0], p->n_tok, 1, row, hp->n_latent, hp->n_rot,
                                hp->rope_interleaved};
    p->be->rope(p->queue, &rope_q);
    p->be->rope(p->queue, &rope_k);
}

/* Latent attention in its absorbed form: q . (k_b c) is (k_b^T q) . c, and the sum of the weighted
 * v_b c is v_b times the weighted sum of c. */
static void layer_attend_absorbed(moe_pass *p, const moe_layer *l, const moe_cache *cache)
{
    const moe_hparams *hp = &p->model->hp;
    const uint32_t row = hp->n_latent + hp->n_rot, n_nope = hp->head_dim - hp->n_rot;
    const moe_heads_op absorb = {p->q_absorbed, p->q, &l->wk_b, p->n_tok, row, hp->head_dim};
    layer_head_matmul(p, &absorb);
    const moe_copy_op rotated = {view_at(p->q_absorbed, hp->n_latent * sizeof(float)),
                                 view_at(p->q, n_nope * sizeof(float)), p->n_tok * hp->n_head,
                                 hp->n_rot, row, hp->head_dim};
    p->be->copy(p->queue, &rotated);
    moe_attend_op attend = layer_attend_op(p, p->attn_latent, p->q_absorbed, cache, cache);
    attend.dim_v = hp->n_latent;
    p->be->attend(p->queue, &attend);
    const moe_heads_op expand = {p->attn, p->attn_latent, &l->wv_b, p->n_tok, hp->head_dim_v,
                                 hp->n_latent};
    layer_head_matmul(p, &expand);
}

/* Latent attention with each head's keys k_b c and values v_b c. */
static void layer_attend_expanded(moe_pass *p, const moe_layer *l, const moe_cache *cache)
{
    const moe_hparams *hp = &p->model->hp;
    if (p->observe) { // the keys' matrix is stored as it is multiplied with queries
        observe_stack(p->observe, p->be, p->queue, &l->wk_b, p->q, p->n_tok, hp->head_dim, 1);
        observe_stack(p->observe, p->be, p->queue, &l->wv_b, p->k, p->n_tok, cache->dim,
                      hp->n_head);
    }
    moe_attend_op attend = layer_attend_op(p, p->attn, p->q, cache, cache);
    attend.k_b = &l->wk_b;
    attend.v_b = &l->wv_b;
    p->be->attend(p->queue, &attend);
}

/* Multi-head latent attention: p->h in. Keys are k_b c and values v_b c of a latent c per token,
 * and only c is kept. DeepSeek-AI 2024, arXiv:2405.04434, section 2.1. */
static void layer_latent_attention(moe_pass *p, uint32_t index, moe_view dst, bool add)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_layer *l = &p->model->layers[index];
    const moe_cache *cache = &p->k_cache[index];
    const uint32_t row = hp->n_latent + hp->n_rot;
    layer_latent_project(p, l);
    if (p->observe && weight_present(&l->wkv_b)) // both stacks are made from it
        observe_source(p->observe, p->be, p->queue, &l->wkv_b, p->k, p->n_tok, row);
    layer_store(p, cache, p->k);
    (p->expanded ? layer_attend_expanded : layer_attend_absorbed)(p, l, cache);
    layer_linear_behind(p, dst, &l->wo, p->attn, &l->bo, add);
}

static void layer_glu(moe_pass *p, uint64_t n)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_glu_op op = {p->gate, p->gate, p->up, n, hp->glu, hp->glu_alpha, hp->glu_limit};
    p->be->glu(p->queue, &op);
}

/* Gated feed-forward: p->h in; gate, up and down with their biases, which may be absent. Shazeer
 * 2020, arXiv:2002.05202. */
static void layer_gated(moe_pass *p, const moe_weight *const w[3], const moe_weight *const bias[3],
                        moe_view dst, bool add)
{
    const moe_matmul_op project = {
        .src = p->h,
        .n_tok = p->n_tok,
        .n_out = 2,
        .out = {{w[0], bias[0]->data, p->gate, false}, {w[1], bias[1]->data, p->up, false}},
    };
    layer_matmul(p, &project);
    layer_glu(p, p->n_tok * w[0]->dims[1]);
    layer_linear(p, dst, w[2], p->gate, bias[2], add);
}

static void layer_feed_forward(moe_pass *p, const moe_layer *l, moe_view dst, bool add)
{
    const moe_weight *const w[3] = {&l->gate, &l->up, &l->down};
    const moe_weight *const bias[3] = {&l->gate_bias, &l->up_bias, &l->down_bias};
    layer_gated(p, w, bias, dst, add);
}

/* The experts of each token, and their weights, by the router's logits of src. */
static void layer_route(moe_pass *p, const moe_layer *l, moe_view src)
{
    layer_linear(p, p->router, &l->router, src, &l->router_bias, false);
    const moe_route_op route = {.ids = p->expert_ids, .weights = p->expert_weights,
                                .logits = p->router, .bias = l->router_choice.data,
                                .factor = l->experts_factor.data,
                                .router = p->model->hp.router, .n_tok = p->n_tok};
    p->be->route(p->queue, &route);
    if (p->observe)
        observe_route(p->observe, p->be, p->queue, &route, p->layer, p->pos);
}

/* Routed experts: p->h in. n_used experts have been chosen for each token; their outputs are summed
 * with the router's weights. Shazeer et al. 2017, arXiv:1701.06538. */
static void layer_routed_experts(moe_pass *p, const moe_layer *l, moe_view dst, bool add)
{
    const moe_hparams *hp = &p->model->hp;
    const moe_router *r = &hp->router;
    const moe_experts_op project = {
        .src = p->h,
        .ids = p->expert_ids,
        .n_tok = p->n_tok,
        .n_used = r->n_used,
        .shared_src = true,
        .n_out = 2,
        .out = {{&l->experts_gate, l->experts_gate_bias.data, p->gate},
                {&l->experts_up, l->experts_up_bias.data, p->up}},
    };
    layer_expert_matmul(p, &project);
    layer_glu(p, (uint64_t)p->n_tok * r->n_used * hp->n_ff_expert);
    const moe_experts_op down = {
        .src = p->gate,
        .ids = p->expert_ids,
        .n_tok = p->n_tok,
        .n_used = r->n_used,
        .n_out = 1,
        .out = {{&l->experts_down, l->experts_down_bias.data, p->expert_out}},
    };
    layer_expert_matmul(p, &down);
    const moe_combine_op combine = {dst, p->expert_out, p->expert_weights, p->n_tok, r->n_used,
                                    hp->n_embd, add};
    p->be->combine(p->queue, &combine);
}

/* Experts that every token uses: p->h in, added to dst. Where a gate says how much of them, it is a
 * router with one expert, which is always chosen and whose weight is a sigmoid. */
static void layer_shared_experts(moe_pass *p, const moe_layer *l, moe_view dst)
{
    const bool gated = weight_present(&l->shared_router);
    const moe_weight none = {0};
    const moe_weight *const w[3] = {&l->shared_gate, &l->shared_up, &l->shared_down};
    const moe_weight *const bias[3] = {&none, &none, &none};
    layer_gated(p, w, bias, gated ? p->expert_out : dst, !gated);
    if (!gated)
        return;
    layer_linear(p, p->router, &l->shared_router, p->h, NULL, false);
    const moe_route_op route = {
        .ids = p->expert_ids, .weights = p->expert_weights, .logits = p->router, .n_tok = p->n_tok,
        .router = {.score = MOE_SCORE_SIGMOID, .n_expert = 1, .n_used = 1, .scale = 1.0f}};
    p->be->route(p->queue, &route);
    const moe_combine_op combine = {dst, p->expert_out, p->expert_weights, p->n_tok, 1,
                                    p->model->hp.n_embd, true};
    p->be->combine(p->queue, &combine);
}

/* The same experts: p->h in, for the router too. */
static void layer_experts(moe_pass *p, const moe_layer *l, moe_view dst, bool add)
{
    layer_route(p, l, p->h);
    layer_routed_experts(p, l, dst, add);
}

/* What stands behind the attention: experts, with the shared ones if there are any, or a dense
 * feed-forward. p->h in, added to dst. */
static void layer_mixture(moe_pass *p, const moe_layer *l, moe_view dst)
{
    if (weight_present(&l->router))
        layer_experts(p, l, dst, true);
    else
        layer_feed_forward(p, l, dst, true);
    if (weight_present(&l->shared_gate))
        layer_shared_experts(p, l, dst);
}

/* x *= the layer's factor. */
static void layer_output_scale(moe_pass *p, const moe_layer *l)
{
    const moe_model *m = p->model;
    const float scale = m->vectors[l->layer_scale.data.offset / sizeof(float)];
    const moe_add_op op = {.dst = p->x, .b = p->x, .n = (uint64_t)p->n_tok * m->hp.n_embd,
                           .scale = scale};
    p->be->add(p->queue, &op);
}

/* dst += src, n_embd elements of each token. */
static void layer_add(moe_pass *p, moe_view dst, moe_view src)
{
    const moe_add_op op = {dst, dst, src, (uint64_t)p->n_tok * p->model->hp.n_embd, 1.0f};
    p->be->add(p->queue, &op);
}

#endif
