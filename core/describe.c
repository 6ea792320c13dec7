/* core/describe.c - a model's router and attention in words, for people who want to know what they
 * run. */
#ifndef MOE_CORE_DESCRIBE_C
#define MOE_CORE_DESCRIBE_C

#include "model.h"

MOE_PRINTF(3, 4) static void describe_add(char *text, size_t text_bytes, const char *format, ...)
{
    const size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + used, text_bytes - used, format, args);
    va_end(args);
}

static void describe_router(const moe_model *m, char *text, size_t bytes)
{
    const moe_hparams *hp = &m->hp;
    const moe_router *r = &hp->router;
    const moe_layer *last = &m->layers[hp->n_layer - 1];
    text[0] = 0;
    if (!r->n_expert)
        return;
    describe_add(text, bytes, "best %u of %u by %s", r->n_used, r->n_expert,
                 r->score == MOE_SCORE_SIGMOID ? "sigmoid" : "softmax");
    if (r->score == MOE_SCORE_SOFTMAX_TOPK)
        describe_add(text, bytes, " over those");
    if (weight_present(&last->router_choice))
        describe_add(text, bytes, " and a bias for the selection");
    if (r->n_group > 1)
        describe_add(text, bytes, ", from %u of %u groups by their %s", r->n_group_used, r->n_group,
                     r->group_max ? "best" : "best two");
    if (r->renormalize)
        describe_add(text, bytes, ", weights renormalized");
    if (r->scale != 1)
        describe_add(text, bytes, ", times %g", (double)r->scale);
    if (hp->n_expert_shared)
        describe_add(text, bytes, "; %u shared%s, width %u", hp->n_expert_shared,
                     weight_present(&last->shared_router) ? " behind a sigmoid gate" : "",
                     hp->n_ff_shared);
    if (hp->parallel_dense)
        describe_add(text, bytes, "; beside a dense feed-forward, width %u", hp->n_ff);
    bool leading = true;
    for (uint32_t i = 0; i < hp->n_layer_dense; i++)
        leading &= !layer_has_experts(hp, i);
    if (hp->n_layer_dense && leading)
        describe_add(text, bytes, "; %u leading dense layer%s", hp->n_layer_dense,
                     hp->n_layer_dense > 1 ? "s" : "");
    else if (hp->n_layer_dense)
        describe_add(text, bytes, "; %u of %u layers dense", hp->n_layer_dense, hp->n_layer);
}

static void describe_heads(const moe_hparams *hp, char *text, size_t bytes)
{
    if (hparams_latent(hp)) {
        describe_add(text, bytes, "multi-head latent: %u heads, %u + %u values kept per token",
                     hp->n_head, hp->n_latent, hp->n_rot);
        if (hp->n_latent_q)
            describe_add(text, bytes, ", queries from %u", hp->n_latent_q);
        return;
    }
    describe_add(text, bytes, "%s: %u heads", hp->n_head == hp->n_head_kv ? "multi-head"
                                              : hp->n_head_kv == 1        ? "multi-query"
                                                                          : "grouped-query",
                 hp->n_head);
    if (hp->n_head != hp->n_head_kv)
        describe_add(text, bytes, " on %u", hp->n_head_kv);
}

/* Where local layers look, and how they differ from the global ones. */
static void describe_window(const moe_model *m, char *text, size_t bytes)
{
    const moe_hparams *hp = &m->hp;
    uint32_t n_local = 0, global = 0;
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        n_local += layer_is_local(hp, i);
        global = layer_is_local(hp, i) || layer_is_recurrent(hp, i) ? global : i;
    }
    if (n_local)
        describe_add(text, bytes, ", window of %u", hp->window);
    if (n_local && n_local < hp->n_layer)
        describe_add(text, bytes, " in %u of %u layers", n_local, hp->n_layer);
    if (hp->local.n_kv != hp->n_head_kv || hp->local.dim != hp->head_dim)
        describe_add(text, bytes, ", there on %u of %u elements, elsewhere %u", hp->local.n_kv,
                     hp->local.dim, hp->head_dim);
    if (hp->v_norm && !weight_present(&m->layers[global].wv))
        describe_add(text, bytes, ", values from keys in global layers");
}

static void describe_rope(const moe_model *m, char *text, size_t bytes)
{
    const moe_rope_params *rope = &m->hp.rope;
    if (rope->scaling != ROPE_PLAIN)
        describe_add(text, bytes, ", %s x%g", rope->scaling == ROPE_YARN ? "YaRN" : "linear RoPE",
                     (double)rope->factor);
    if (rope->divided && weight_present(&m->globals.rope_freqs))
        describe_add(text, bytes, ", RoPE frequencies divided by a table");
}

/* What stands in place of attention in the other layers. */
static void describe_recurrence(const moe_hparams *hp, char *text, size_t bytes)
{
    uint32_t n_recurrent = 0;
    for (uint32_t i = 0; i < hp->n_layer; i++)
        n_recurrent += layer_is_recurrent(hp, i);
    if (!n_recurrent)
        return;
    describe_add(text, bytes, "; %u of %u layers have a ", n_recurrent, hp->n_layer);
    if (hp->delta.n_head)
        describe_add(text, bytes, "gated delta rule instead: %u heads on %u, states of %u x %u",
                     hp->delta.n_head, hp->delta.n_head_k, hp->delta.dim_k, hp->delta.dim_v);
    else
        describe_add(text, bytes, "convolution over %u positions instead", hp->n_conv);
}

static void describe_attention(const moe_model *m, char *text, size_t bytes)
{
    const moe_hparams *hp = &m->hp;
    uint32_t first = 0; // with attention
    while (first + 1 < hp->n_layer && layer_is_recurrent(hp, first))
        first++;
    text[0] = 0;
    describe_heads(hp, text, bytes);
    if (weight_present(&m->layers[first].q_norm))
        describe_add(text, bytes, ", norms of q and k");
    if (weight_present(&m->layers[first].sinks))
        describe_add(text, bytes, ", sinks");
    describe_window(m, text, bytes);
    if (hp->q_gated)
        describe_add(text, bytes, ", gated");
    describe_rope(m, text, bytes);
    describe_recurrence(hp, text, bytes);
}

/* Fills the texts of a model whose weights are bound. */
static void model_describe(moe_model *m)
{
    describe_router(m, m->router_text, sizeof m->router_text);
    describe_attention(m, m->attention_text, sizeof m->attention_text);
}

#endif
