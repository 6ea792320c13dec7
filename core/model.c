/* core/model.c - from a directory of tensors to a model: reads the hyperparameters, binds each
 * weight to its role, checks every shape, and answers what a model is.
 *
 * What a family looks like stands in core/model_<family>.c. Everything that comes from the file is
 * checked here, once; layer code trusts it. */
#ifndef MOE_CORE_MODEL_C
#define MOE_CORE_MODEL_C

#include "describe.c"
#include "model.h"
#include "platform.h"

/* core/models.c: the table of families */
static const moe_family *family_by_arch(const char *arch);
static void family_list(char *buf, size_t buf_bytes);

/* ----------------------------------------------------------------------- hyperparameters -- */

/* The whole name of an architecture's key, such as "llama.rope.freq_base". */
static const char *hparam_key(const hparam_reader *r, const char *key, char buf[160])
{
    snprintf(buf, 160, "%s.%s", r->arch, key);
    return buf;
}

static void hparam_u32(hparam_reader *r, const char *key, bool required, uint32_t min, uint32_t max,
                       uint32_t *value)
{
    char buf[160];
    if (!r->status)
        r->status = meta_u32(r->dir, hparam_key(r, key, buf), required, min, max, value, r->error);
}

static void hparam_f32(hparam_reader *r, const char *key, bool required, double min, double max,
                       float *value)
{
    char buf[160];
    if (!r->status)
        r->status = meta_f32(r->dir, hparam_key(r, key, buf), required, min, max, value, r->error);
}

/* A number that may be given per layer; this version wants it the same in all of them. */
static void hparam_uniform(hparam_reader *r, const char *key, bool required, uint32_t min,
                           uint32_t max, uint32_t n_layer, uint32_t *value)
{
    char buf[160];
    uint32_t list[MODEL_MAX_LAYERS];
    if (r->status)
        return;
    for (uint32_t i = 0; i < n_layer; i++)
        list[i] = *value;
    r->status = meta_u32_list(r->dir, hparam_key(r, key, buf), required, min, max, list, n_layer,
                              r->error);
    for (uint32_t i = 1; i < n_layer && !r->status; i++)
        if (list[i] != list[0])
            r->status = fail(r->error, MOE_ERR_UNSUPPORTED, buf,
                             "expected the same value in all layers, got %u in layer 0 and %u in "
                             "layer %u", list[0], list[i], i);
    if (!r->status)
        *value = list[0];
}

static void hparam_require(hparam_reader *r, bool condition, const char *key, const char *what,
                           uint32_t a, uint32_t b)
{
    char buf[160];
    if (!r->status && !condition)
        r->status = fail(r->error, MOE_ERR_MODEL, hparam_key(r, key, buf), what, a, b);
}

/* Whether YaRN's ramp ends at whole pairs: no other writer says it, so families have a default. */
static void hparam_truncate(hparam_reader *r, moe_rope_params *rope)
{
    char buf[160];
    bool truncate = !rope->no_truncate;
    if (!r->status)
        r->status = meta_bool(r->dir, hparam_key(r, "rope.scaling.yarn_truncate", buf), false,
                              &truncate, r->error);
    rope->no_truncate = !truncate;
}

static void hparam_rope(hparam_reader *r, moe_hparams *hp)
{
    moe_rope_params *rope = &hp->rope;
    moe_str type = {"none", 4};
    char buf[160];
    *rope = (moe_rope_params){.base = 10000.0f, .scaling = ROPE_PLAIN, .factor = 1.0f,
                              .attn_factor = 1.0f, .divided = true, .log_multiplier = 0.1,
                              .beta_fast = 32.0f, .beta_slow = 1.0f,
                              .n_ctx_original = hp->n_ctx_train};
    hparam_f32(r, "rope.freq_base", false, 1, 1e12, &rope->base);
    hp->n_rot = hp->head_dim;
    hparam_u32(r, "rope.dimension_count", false, 2, hp->head_dim, &hp->n_rot);
    hparam_require(r, hp->n_rot % 2 == 0, "rope.dimension_count",
                   "expected an even number, at most %u, got %u", hp->head_dim, hp->n_rot);
    if (r->status)
        return;
    r->status = meta_string(r->dir, hparam_key(r, "rope.scaling.type", buf), false, &type,
                            r->error);
    if (r->status)
        return;
    if (str_equal(type, "linear"))
        rope->scaling = ROPE_LINEAR;
    else if (str_equal(type, "yarn"))
        rope->scaling = ROPE_YARN;
    else if (!str_equal(type, "none"))
        r->status = fail(r->error, MOE_ERR_UNSUPPORTED, buf,
                         "expected none, linear or yarn, got %.*s",
                         (int)MOE_MIN(type.bytes, 32), type.data);
    if (rope->scaling != ROPE_PLAIN)
        hparam_f32(r, "rope.scaling.factor", true, 1e-3, 1e6, &rope->factor);
    hparam_u32(r, "rope.scaling.original_context_length", false, 1, MODEL_MAX_CTX,
               &rope->n_ctx_original);
    /* yarn_attn_factor is left alone: converters write what config.json has as attn_factor, which
     * the reference implementation does not know and which the files' other readers do not use. */
    hparam_f32(r, "rope.scaling.attn_factor", false, 1e-6, 1e6, &rope->attn_factor);
    hparam_f32(r, "rope.scaling.yarn_beta_fast", false, 1e-6, 1e6, &rope->beta_fast);
    hparam_f32(r, "rope.scaling.yarn_beta_slow", false, 1e-6, 1e6, &rope->beta_slow);
    hparam_truncate(r, rope);
}

/* The sliding window of local layers, and which those are: all but every n-th, if the file does not
 * say it for each, or all for a period of 0. `required`: of a family that always has one. */
MOE_UNUSED static void hparam_window(hparam_reader *r, moe_hparams *hp, bool required,
                                     uint32_t period)
{
    char buf[160];
    const moe_meta *pattern = directory_meta(
        r->dir, hparam_key(r, "attention.sliding_window_pattern", buf));
    const bool listed = pattern && pattern->type == META_ARRAY;
    hparam_u32(r, "attention.sliding_window", required || listed, required || listed, MODEL_MAX_CTX,
               &hp->window);
    hp->window_period = listed ? 1 : period; /* a list has been read already */
    if (!listed)
        hparam_u32(r, "attention.sliding_window_pattern", false, 0, MODEL_MAX_LAYERS,
                   &hp->window_period);
    hp->rope_local = hp->rope;
}

/* Groups of experts: only those of the best groups may be chosen. */
static void hparam_groups(hparam_reader *r, moe_router *router)
{
    router->n_group = router->n_group_used = 1;
    hparam_u32(r, "expert_group_count", false, 0, MOE_ROUTER_MAX_GROUPS, &router->n_group);
    if (r->status || router->n_group <= 1)
        return;
    hparam_require(r, router->n_expert % router->n_group == 0, "expert_group_count",
                   "expected a divisor of the %u experts, got %u", router->n_expert,
                   router->n_group);
    hparam_u32(r, "expert_group_used_count", true, 1, router->n_group, &router->n_group_used);
    hparam_require(r, r->status || router->n_used <= router->n_expert / router->n_group *
                                                        router->n_group_used,
                   "expert_used_count", "expected at most %u, the experts of the groups that may "
                   "be used, got %u", r->status ? 0 : router->n_expert / router->n_group *
                                                       router->n_group_used, router->n_used);
}

/* Experts that every token uses, as one feed-forward of their common width. */
static void hparam_shared_experts(hparam_reader *r, moe_hparams *hp)
{
    uint64_t width;
    hparam_u32(r, "expert_shared_count", false, 0, MODEL_MAX_EXPERTS, &hp->n_expert_shared);
    if (r->status || !hp->n_expert_shared)
        return;
    width = (uint64_t)hp->n_expert_shared * hp->n_ff_expert;
    hparam_require(r, hp->n_ff_shared || width <= MODEL_MAX_FF, "expert_shared_count",
                   "expected shared experts of a width of at most %u together, got %u of them",
                   MODEL_MAX_FF, hp->n_expert_shared);
    if (!hp->n_ff_shared)
        hp->n_ff_shared = (uint32_t)width;
    hparam_u32(r, "expert_shared_feed_forward_length", false, 1, MODEL_MAX_FF, &hp->n_ff_shared);
}

/* How the router's logits become scores, if the file says so. */
static void hparam_score(hparam_reader *r, moe_router *router)
{
    static const moe_score scores[] = {MOE_SCORE_SOFTMAX, MOE_SCORE_SIGMOID,
                                       MOE_SCORE_SOFTMAX_TOPK};
    uint32_t func = 0;
    hparam_u32(r, "expert_gating_func", false, 0, MOE_COUNT(scores), &func);
    if (!r->status && func)
        router->score = scores[func - 1];
}

/* Layers without experts: so many at the start, or as a list says that has 1 for those with. */
static void hparam_dense_layers(hparam_reader *r, moe_hparams *hp)
{
    char buf[160];
    uint32_t list[MODEL_MAX_LAYERS], n_leading = 0;
    hparam_u32(r, "leading_dense_block_count", false, 0, hp->n_layer, &n_leading);
    for (uint32_t i = 0; i < hp->n_layer; i++)
        list[i] = i >= n_leading;
    if (!r->status)
        r->status = meta_u32_list(r->dir, hparam_key(r, "expert_layers", buf), false, 0, 1, list,
                                  hp->n_layer, r->error);
    for (uint32_t i = 0; i < hp->n_layer && !r->status; i++) {
        hp->dense_layers[i / 32] |= (uint32_t)!list[i] << i % 32;
        hp->n_layer_dense += !list[i];
    }
}

static void hparam_experts(hparam_reader *r, moe_hparams *hp)
{
    moe_router *router = &hp->router;
    char buf[160];
    router->scale = 1.0f;
    hparam_u32(r, "expert_count", false, 0, MODEL_MAX_EXPERTS, &router->n_expert);
    if (r->status || !router->n_expert)
        return;
    hparam_u32(r, "expert_used_count", true, 1, router->n_expert, &router->n_used);
    hp->n_ff_expert = hp->n_ff;
    hparam_u32(r, "expert_feed_forward_length", false, 1, MODEL_MAX_FF, &hp->n_ff_expert);
    hparam_f32(r, "expert_weights_scale", false, -1e6, 1e6, &router->scale);
    if (!r->status && router->scale == 0) /* written by some converters for "none" */
        router->scale = 1.0f;
    hparam_dense_layers(r, hp);
    hparam_score(r, router);
    hparam_groups(r, router);
    router->group_max = router->score == MOE_SCORE_SOFTMAX;
    hparam_shared_experts(r, hp);
    if (!r->status)
        r->status = meta_bool(r->dir, hparam_key(r, "expert_weights_norm", buf), false,
                              &router->renormalize, r->error);
}

/* Which layers have the sliding window, where the file says it for each. */
static void hparam_local_layers(hparam_reader *r, moe_hparams *hp)
{
    char buf[160];
    uint32_t list[MODEL_MAX_LAYERS];
    const char *key = hparam_key(r, "attention.sliding_window_pattern", buf);
    const moe_meta *meta = r->status ? NULL : directory_meta(r->dir, key);
    if (!meta || meta->type != META_ARRAY)
        return;
    r->status = meta_u32_list(r->dir, key, true, 0, 1, list, hp->n_layer, r->error);
    for (uint32_t i = 0; i < hp->n_layer && !r->status; i++)
        hp->local_layers[i / 32] |= list[i] << i % 32;
}

/* Layers with 0 have no attention, but a state; the others must be alike, local ones, where the
 * file says which those are, and global ones each for themselves. */
static void hparam_heads_kv(hparam_reader *r, moe_hparams *hp)
{
    char buf[160];
    uint32_t list[MODEL_MAX_LAYERS];
    if (r->status)
        return;
    for (uint32_t i = 0; i < hp->n_layer; i++)
        list[i] = hp->n_head;
    r->status = meta_u32_list(r->dir, hparam_key(r, "attention.head_count_kv", buf), false, 0,
                              MODEL_MAX_HEADS, list, hp->n_layer, r->error);
    hp->n_head_kv = hp->local.n_kv = 0;
    for (uint32_t i = 0; i < hp->n_layer && !r->status; i++) {
        uint32_t *n = layer_is_local(hp, i) ? &hp->local.n_kv : &hp->n_head_kv;
        if (!list[i])
            hp->recurrent_layers[i / 32] |= 1u << i % 32;
        else if (!*n)
            *n = list[i];
        else if (list[i] != *n)
            r->status = fail(r->error, MOE_ERR_UNSUPPORTED, buf,
                             "expected the same value in all layers with attention of one kind, "
                             "got %u and, in layer %u, %u", *n, i, list[i]);
    }
    hp->n_head_kv = hp->n_head_kv ? hp->n_head_kv : hp->local.n_kv;
    hp->local.n_kv = hp->local.n_kv ? hp->local.n_kv : hp->n_head_kv;
    hparam_require(r, hp->n_head_kv, "attention.head_count_kv",
                   "expected 1 to %u in a layer, got %u in all", hp->n_head, 0);
}

/* Once the family has said whether it has layers with a state. */
static void hparam_check_recurrent(hparam_reader *r, const moe_hparams *hp)
{
    for (uint32_t i = 0; i < hp->n_layer && !hp->n_conv; i++)
        hparam_require(r, !layer_is_recurrent(hp, i), "attention.head_count_kv",
                       "expected 1 to %u in all layers, got 0 in layer %u", hp->n_head, i);
}

static void hparam_attention(hparam_reader *r, moe_hparams *hp)
{
    hparam_uniform(r, "attention.head_count", true, 1, MODEL_MAX_HEADS, hp->n_layer, &hp->n_head);
    hparam_local_layers(r, hp);
    hparam_heads_kv(r, hp);
    hparam_require(r, !r->status && hp->n_head_kv <= hp->n_head && hp->n_head % hp->n_head_kv == 0,
                   "attention.head_count_kv", "expected a divisor of the %u heads, got %u",
                   hp->n_head, hp->n_head_kv);
    hparam_require(r, r->status || hp->n_head % hp->local.n_kv == 0, "attention.head_count_kv",
                   "expected a divisor of the %u heads, got %u", hp->n_head, hp->local.n_kv);
    if (r->status)
        return;
    hp->head_dim = 0;
    hparam_u32(r, "attention.key_length", false, 2, MODEL_MAX_HEAD_DIM, &hp->head_dim);
    if (!hp->head_dim) {
        hparam_require(r, hp->n_embd % hp->n_head == 0, "attention.head_count",
                       "expected a divisor of the embedding length %u, got %u", hp->n_embd,
                       hp->n_head);
        hp->head_dim = hp->n_embd / hp->n_head;
        hparam_require(r, hp->head_dim >= 2 && hp->head_dim <= MODEL_MAX_HEAD_DIM,
                       "attention.head_count", "expected heads of 2 to %u elements, got %u",
                       MODEL_MAX_HEAD_DIM, hp->head_dim);
    }
    hp->head_dim_v = hp->head_dim;
    hparam_u32(r, "attention.value_length", false, 1, MODEL_MAX_HEAD_DIM, &hp->head_dim_v);
    hp->attn_scale = 0;
    hparam_f32(r, "attention.scale", false, 0, 1e6, &hp->attn_scale);
    if (hp->attn_scale == 0)
        hp->attn_scale = (float)(1.0 / sqrt((double)hp->head_dim));
}

/* Local layers, where the file does not describe them by themselves. */
static void hparam_fill_local(moe_hparams *hp)
{
    if (!hp->local.dim)
        hp->local = hparams_heads(hp, false);
    for (uint32_t i = 0; hp->window && i < hp->n_layer; i++)
        if (!hp->window_period || (i + 1) % hp->window_period != 0)
            hp->local_layers[i / 32] |= 1u << i % 32;
}

/* The keys that all families share; then the family's own. */
static moe_status model_read_hparams(moe_model *m, moe_error *error)
{
    moe_hparams *hp = &m->hp;
    hparam_reader reader = {m->dir, m->family->arch, error, MOE_OK}, *r = &reader;
    hp->embed_scale = 1.0f;
    hparam_u32(r, "block_count", true, 1, MODEL_MAX_LAYERS, &hp->n_layer);
    hparam_u32(r, "embedding_length", true, 1, MODEL_MAX_EMBD, &hp->n_embd);
    hparam_u32(r, "context_length", true, 1, MODEL_MAX_CTX, &hp->n_ctx_train);
    hparam_f32(r, "attention.layer_norm_rms_epsilon", true, 0, 1, &hp->eps);
    if (r->status)
        return r->status;
    hparam_attention(r, hp);
    if (r->status)
        return r->status;
    hparam_uniform(r, "feed_forward_length", false, 0, MODEL_MAX_FF, hp->n_layer, &hp->n_ff);
    hparam_rope(r, hp);
    hp->router.renormalize = true;
    if (!r->status)
        m->family->hparams(hp, r);
    hparam_fill_local(hp);
    hparam_check_recurrent(r, hp);
    hparam_experts(r, hp);
    hparam_require(r, hp->n_ff > 0 || hp->router.n_expert > 0, "feed_forward_length",
                   "expected 1 to %u, got %u", MODEL_MAX_FF, hp->n_ff);
    return r->status;
}

/* -------------------------------------------------------------------------------- binding -- */

/* The length that a symbol stands for in a layer. */
static uint64_t dim_value(const moe_hparams *hp, uint32_t layer, moe_dim dim)
{
    const moe_head_shape heads = hparams_heads(hp, layer_is_local(hp, layer));
    switch (dim) {
    case DIM_VOCAB: return hp->n_vocab;
    case DIM_EMBD: return hp->n_embd;
    case DIM_ONE: return 1;
    case DIM_Q: return (uint64_t)hp->n_head * heads.dim;
    case DIM_K: return (uint64_t)heads.n_kv * heads.dim;
    case DIM_V: return (uint64_t)heads.n_kv * heads.dim_v;
    case DIM_O: return (uint64_t)hp->n_head * heads.dim_v;
    case DIM_HEAD: return heads.dim;
    case DIM_HALF_ROT: return hp->n_rot / 2;
    case DIM_FF: return hp->n_ff;
    case DIM_EXPERT: return hp->router.n_expert;
    case DIM_FF_EXPERT: return hp->n_ff_expert;
    case DIM_FF_EXPERT_2: return 2ull * hp->n_ff_expert;
    case DIM_FF_SHARED: return hp->n_ff_shared;
    case DIM_Q_HEADS: return hp->n_head;
    case DIM_HEAD_V: return hp->head_dim_v;
    case DIM_CONV: return hp->n_conv;
    case DIM_EMBD_2: return 2 * (uint64_t)hp->n_embd;
    case DIM_EMBD_3: return 3 * (uint64_t)hp->n_embd;
    case DIM_Q_GATED: return 2ull * hp->n_head * hp->head_dim;
    case DIM_DELTA_CONV: return hparams_conv_dim(hp);
    case DIM_DELTA_HEADS: return hp->delta.n_head;
    case DIM_DELTA_HEADS_2: return 2ull * hp->delta.n_head;
    case DIM_DELTA_HEAD: return hp->delta.dim_v;
    case DIM_DELTA_V: return (uint64_t)hp->delta.n_head * hp->delta.dim_v;
    case DIM_NOPE: return hp->head_dim - hp->n_rot;
    case DIM_LATENT: return hp->n_latent;
    case DIM_LATENT_Q: return hp->n_latent_q;
    case DIM_LATENT_ROT: return (uint64_t)hp->n_latent + hp->n_rot;
    case DIM_LATENT_KV: return (uint64_t)hp->n_head * (hp->head_dim - hp->n_rot + hp->head_dim_v);
    case DIM_NONE: break;
    }
    return 1;
}

MOE_UNUSED static const char *binding_name(const moe_binding *b, uint32_t layer, char *buf,
                                           size_t buf_bytes)
{
    const char *mark = b->flags & BIND_GLOBAL ? NULL : strstr(b->gguf, "%u");
    if (mark)
        snprintf(buf, buf_bytes, "%.*s%u%s", (int)(mark - b->gguf), b->gguf, layer, mark + 2);
    else
        snprintf(buf, buf_bytes, "%s", b->gguf);
    return buf;
}

/* Whether a model has this tensor in this layer, as far as its hyperparameters say. */
static bool binding_applies(const moe_hparams *hp, const moe_binding *b, uint32_t layer)
{
    const bool experts = layer_has_experts(hp, layer);
    return !(b->flags & BIND_DENSE && experts) && !(b->flags & BIND_EXPERTS && !experts) &&
           !(b->flags & BIND_SHARED && !(experts && hp->n_expert_shared)) &&
           !(b->flags & BIND_SIGMOID && hp->router.score != MOE_SCORE_SIGMOID) &&
           !(b->flags & BIND_CHOICE && !hp->choice_bias) &&
           !(b->flags & BIND_RECURRENT && !layer_is_recurrent(hp, layer)) &&
           !(b->flags & BIND_ATTENTION && layer_is_recurrent(hp, layer)) &&
           !(b->flags & BIND_DRAFT && layer < hp->n_layer) &&
           !(b->flags & BIND_LATENT_Q && !hp->n_latent_q) &&
           !(b->flags & BIND_NO_LATENT_Q && hp->n_latent_q) &&
           !(b->flags & BIND_LATENT_SPLIT && !hp->latent_split) &&
           !(b->flags & BIND_LATENT_FUSED && hp->latent_split);
}

static moe_status binding_check(const moe_model *m, const moe_binding *b, uint32_t layer,
                                const moe_tensor *t, moe_error *error)
{
    char expected[96], got[96];
    int e = 0, g = 0;
    bool same = true;
    for (uint32_t i = 0; i < 4; i++) {
        const uint64_t want = i < 3 ? dim_value(&m->hp, layer, (moe_dim)b->dims[i]) : 1;
        same &= t->dims[i] == want;
        if (i < 3 && b->dims[i] != DIM_NONE)
            e += snprintf(expected + e, sizeof expected - (size_t)e, "%s%llu", i ? ", " : "",
                          (unsigned long long)want);
        if (i < t->n_dims)
            g += snprintf(got + g, sizeof got - (size_t)g, "%s%llu", i ? ", " : "",
                          (unsigned long long)t->dims[i]);
    }
    if (!same)
        return fail(error, MOE_ERR_MODEL, t->name, "expected shape [%s], got [%s]", expected, got);
    if (b->flags & BIND_VECTOR && t->quant->block_len != 1)
        return fail(error, MOE_ERR_MODEL, t->name, "expected type F32, F16 or BF16, got %s",
                    t->quant->name);
    if (t->parts && (b->flags & BIND_VECTOR || b->dims[2] != DIM_EXPERT))
        return fail(error, MOE_ERR_MODEL, t->name,
                    "expected its matrices in one place, since they are no experts");
    return MOE_OK;
}

/* A matrix "x.weight" may come with "x.scale", the factor of its products, of experts one for each:
 * a format's own scales may have too little range (quant/nvfp4.h). Where a family has a tensor of
 * that name itself, it means that. "x.input_scale" is for activations in FP4, which these are not.
 *
 * Returns the matrix's name with another end; NULL: it has none. */
static const char *binding_scale(const moe_model *m, const moe_binding *b, uint32_t layer,
                                 const char *end, char *buf, size_t buf_bytes)
{
    char other[96];
    const bool global = b->flags & BIND_GLOBAL;
    const bool output = global && b->field == offsetof(moe_globals, output);
    const bool table = b->dims[1] == DIM_VOCAB && !output;
    const bool split = !global && b->field == offsetof(moe_layer, wkv_b);
    binding_name(b, layer, buf, buf_bytes);
    char *dot = strrchr(buf, '.');
    if (b->flags & BIND_VECTOR || table || split || !dot || strcmp(dot, ".weight") ||
        (b->dims[2] != DIM_NONE && b->dims[2] != DIM_EXPERT))
        return NULL;
    snprintf(dot, buf_bytes - (size_t)(dot - buf), "%s", end);
    for (uint32_t i = 0; m->family->bindings[i]; i++)
        for (const moe_binding *of = m->family->bindings[i]; of->gguf; of++)
            if (!strcmp(buf, binding_name(of, layer, other, sizeof other)))
                return NULL;
    return buf;
}

/* One walk over all bindings: what to do with each tensor, and where the walk has got to. */
typedef struct bind_walk {
    moe_model *m;
    moe_error *error;
    moe_status (*visit)(struct bind_walk *walk, const moe_binding *b, const moe_tensor *t,
                        moe_weight *w);
    uint64_t n_vector_floats;
    uint32_t layer, n_tensor, n_buffer, n_matrix;
} bind_walk;

/* The tensors that belong to a matrix, which has had its visit. */
static moe_status bind_scale(bind_walk *walk, const moe_binding *b, uint32_t layer, moe_weight *w)
{
    char name[96];
    const moe_directory *dir = walk->m->dir;
    const moe_binding as = {.flags = BIND_VECTOR | (b->flags & BIND_GLOBAL),
                            .field = UINT16_MAX,
                            .dims = {b->dims[2] == DIM_EXPERT ? DIM_EXPERT : DIM_ONE}};
    if (binding_scale(walk->m, b, layer, ".input_scale", name, sizeof name))
        walk->n_tensor += directory_tensor(dir, name) != NULL;
    const moe_tensor *t = binding_scale(walk->m, b, layer, ".scale", name, sizeof name)
                              ? directory_tensor(dir, name) : NULL;
    if (!t)
        return MOE_OK;
    moe_weight scale = {0};
    walk->n_tensor++;
    const moe_status status = walk->visit(walk, &as, t, &scale);
    w->scale = scale.data;
    return status;
}

static moe_status bind_one(bind_walk *walk, const moe_binding *b, uint32_t layer, void *base)
{
    char name[96];
    const moe_tensor *t = directory_tensor(walk->m->dir, binding_name(b, layer, name, sizeof name));
    if (!t && b->flags & BIND_OPTIONAL)
        return MOE_OK;
    if (!t)
        return fail(walk->error, MOE_ERR_MODEL, name,
                    "expected this tensor in a model of architecture %s, got none",
                    walk->m->family->arch);
    walk->layer = layer;
    walk->n_tensor++;
    moe_weight *w = (moe_weight *)(void *)((char *)base + b->field);
    const moe_status status = walk->visit(walk, b, t, w);
    return status ? status : bind_scale(walk, b, layer, w);
}

/* Visits each tensor that the family binds. */
static moe_status bind_walk_all(bind_walk *walk)
{
    moe_model *m = walk->m;
    for (uint32_t table = 0; m->family->bindings[table]; table++) {
        for (const moe_binding *b = m->family->bindings[table]; b->gguf; b++) {
            const bool global = b->flags & BIND_GLOBAL;
            for (uint32_t i = 0; i < (global ? 1 : m->hp.n_layer_all); i++) {
                if (!binding_applies(&m->hp, b, i))
                    continue;
                void *base = global ? (void *)&m->globals : (void *)&m->layers[i];
                moe_status status = bind_one(walk, b, i, base);
                if (status)
                    return status;
            }
        }
    }
    return MOE_OK;
}

static moe_status bind_count(bind_walk *walk, const moe_binding *b, const moe_tensor *t,
                             moe_weight *w)
{
    (void)w;
    if (b->flags & BIND_VECTOR)
        walk->n_vector_floats += align_up(t->n_elements, MEM_ALIGN / sizeof(float));
    else
        walk->n_buffer += (uint32_t)tensor_n_parts(t);
    if (t->parts)
        walk->n_matrix += (uint32_t)t->dims[2] * (b->flags & BIND_HALVES ? 2 : 1);
    return binding_check(walk->m, b, walk->layer, t, walk->error);
}

/* Norms and biases as floats, checked for NaN and infinities, which would reach every token. */
static moe_status bind_fill(bind_walk *walk, const moe_binding *b, const moe_tensor *t,
                            moe_weight *w)
{
    (void)w;
    if (!(b->flags & BIND_VECTOR))
        return MOE_OK;
    float *dst = walk->m->vectors + walk->n_vector_floats;
    t->quant->dequantize(t->data, dst, (size_t)t->n_elements);
    for (uint64_t i = 0; i < t->n_elements; i++)
        if (!isfinite(dst[i]))
            return fail(walk->error, MOE_ERR_MODEL, t->name,
                        "expected finite numbers, got %f at element %llu", (double)dst[i],
                        (unsigned long long)i);
    walk->n_vector_floats += align_up(t->n_elements, MEM_ALIGN / sizeof(float));
    return MOE_OK;
}

/* The matrices of a stack of experts, each with a type and a place of its own. */
static moe_status bind_matrices(bind_walk *walk, const moe_binding *b, const moe_tensor *t,
                                moe_weight *w)
{
    moe_model *m = walk->m;
    moe_matrix *matrices = m->matrices + walk->n_matrix;
    walk->n_matrix += (uint32_t)t->dims[2] * (b->flags & BIND_HALVES ? 2 : 1);
    for (uint64_t i = 0; i < t->dims[2]; i++) {
        const moe_part *part = &t->parts[i];
        moe_status status = m->backend->buffer_wrap(m->device, part->data, part->bytes,
                                                    &m->buffers[m->n_buffer], walk->error);
        if (status)
            return status;
        matrices[i] = (moe_matrix){part->quant,
                                   t->dims[0] / part->quant->block_len * part->quant->block_bytes,
                                   {m->buffers[m->n_buffer++], 0}};
        w->act_mask |= 1u << part->quant->act;
    }
    w->matrices = matrices;
    w->data = matrices[0].data;
    return MOE_OK;
}

/* Tells what a queue must have room for. */
static void bind_limits(moe_row_limits *limits, const moe_binding *b, const moe_tensor *t)
{
    uint32_t *limit = b->dims[2] == DIM_NONE     ? limits->matmul
                      : b->dims[2] == DIM_EXPERT ? limits->experts
                                                 : limits->heads;
    for (uint64_t i = 0; i < tensor_n_parts(t); i++)
        row_limit_raise(limit, tensor_part(t, i).quant, t->dims[0]);
}

static moe_status bind_weight(bind_walk *walk, const moe_binding *b, const moe_tensor *t,
                              moe_weight *w)
{
    moe_model *m = walk->m;
    w->name = t->name;
    w->quant = t->quant;
    for (int i = 0; i < 3; i++)
        w->dims[i] = t->dims[i];
    w->row_bytes = t->dims[0] / t->quant->block_len * t->quant->block_bytes;
    w->matrix_bytes = w->row_bytes * t->dims[1];
    if (b->flags & BIND_VECTOR) {
        w->quant = quant_by_name("F32");
        w->row_bytes = t->dims[0] * sizeof(float);
        w->matrix_bytes = w->row_bytes * t->dims[1];
        w->data = (moe_view){m->buffers[0], walk->n_vector_floats * sizeof(float)};
        walk->n_vector_floats += align_up(t->n_elements, MEM_ALIGN / sizeof(float));
        if (b->field == offsetof(moe_layer, shared_router) && !(b->flags & BIND_GLOBAL))
            row_limit_raise(m->row_limits.matmul, w->quant, w->dims[0]);
        return MOE_OK;
    }
    bind_limits(&m->row_limits, b, t);
    if (t->parts)
        return bind_matrices(walk, b, t, w);
    moe_status status = m->backend->buffer_wrap(m->device, t->data, t->bytes,
                                                &m->buffers[m->n_buffer], walk->error);
    if (!status)
        w->data = (moe_view){m->buffers[m->n_buffer++], 0};
    return status;
}

/* The layer in a tensor's name "blk.N....", or false. */
static bool tensor_layer(const char *name, uint32_t *layer)
{
    if (strncmp(name, "blk.", 4))
        return false;
    uint32_t n = 0;
    const char *c = name + 4;
    for (; *c >= '0' && *c <= '9' && n < MODEL_MAX_LAYERS; c++)
        n = 10 * n + (uint32_t)(*c - '0');
    *layer = n;
    return *c == '.' && c > name + 4;
}

/* Whether the first layer for multi-token prediction can be bound: some files have none, although
 * they tell of it. Further ones are not used: the first is applied again and again. */
static bool model_has_draft(const moe_model *m)
{
    char name[96];
    for (uint32_t i = 0; m->family->bindings[i] && m->hp.n_layer_draft; i++)
        for (const moe_binding *b = m->family->bindings[i]; b->gguf; b++)
            if (b->field == offsetof(moe_layer, draft_join) && b->flags & BIND_DRAFT)
                return directory_tensor(m->dir, binding_name(b, m->hp.n_layer, name, sizeof name));
    return false;
}

/* A tensor of a layer that only drafts tokens: the model computes the same without. */
static bool tensor_is_draft(const moe_model *m, const moe_tensor *t)
{
    uint32_t layer;
    return m->hp.n_layer_draft && tensor_layer(t->name, &layer) &&
           layer >= m->hp.n_layer && layer - m->hp.n_layer < m->hp.n_layer_draft;
}

/* Whether a tensor is the one of a binding, or belongs to it. */
static bool binding_takes(const moe_model *m, const moe_binding *b, uint32_t layer,
                          const char *tensor)
{
    static const char *const ends[] = {".scale", ".input_scale"};
    char name[96];
    bool takes = !strcmp(tensor, binding_name(b, layer, name, sizeof name));
    for (size_t i = 0; i < MOE_COUNT(ends) && !takes; i++)
        takes = binding_scale(m, b, layer, ends[i], name, sizeof name) && !strcmp(tensor, name);
    return takes;
}

/* A tensor that no binding asks for would be computed without: the results would be wrong. */
static moe_status bind_find_unused(const moe_model *m, moe_error *error)
{
    for (size_t i = 0; i < directory_n_tensors(m->dir); i++) {
        const moe_tensor *t = directory_tensor_at(m->dir, i);
        bool used = tensor_is_draft(m, t);
        for (uint32_t table = 0; m->family->bindings[table] && !used; table++) {
            for (const moe_binding *b = m->family->bindings[table]; b->gguf && !used; b++) {
                uint32_t layer = 0;
                if (!(b->flags & BIND_GLOBAL) && !tensor_layer(t->name, &layer))
                    continue;
                used = layer < m->hp.n_layer_all && binding_applies(&m->hp, b, layer) &&
                       binding_takes(m, b, layer, t->name);
            }
        }
        if (!used)
            return fail(error, MOE_ERR_UNSUPPORTED, t->name,
                        "architecture %s with %u layers has no place for this tensor; leaving it "
                        "out would give wrong results", m->family->arch, m->hp.n_layer);
    }
    return MOE_OK;
}

/* Walks over the bindings: the first checks and counts, so that nothing is allocated for a file
 * that is wrong; the second makes the vectors; the third hands out the places. */
static moe_status model_bind(moe_model *m, moe_error *error)
{
    bind_walk walk = {.m = m, .error = error, .visit = bind_count};
    m->hp.n_layer_all = m->hp.n_layer + model_has_draft(m);
    m->layers = mem_alloc(&m->mem, m->hp.n_layer_all, sizeof *m->layers);
    if (!m->layers)
        return fail_memory(error, &m->mem, "layers", m->hp.n_layer_all * sizeof *m->layers);
    moe_status status = bind_walk_all(&walk);
    if (!status && walk.n_tensor != directory_n_tensors(m->dir))
        status = bind_find_unused(m, error);
    if (status)
        return status;
    const uint64_t vector_bytes = walk.n_vector_floats * sizeof *m->vectors;
    m->vectors = mem_alloc(&m->mem, vector_bytes, 1);
    enum { VECTORS = 1, DERIVED = 1 };
    m->buffers = mem_alloc(&m->mem, walk.n_buffer + VECTORS + DERIVED, sizeof *m->buffers);
    m->matrices = mem_alloc(&m->mem, walk.n_matrix, sizeof *m->matrices);
    if (!m->vectors || !m->buffers || !m->matrices)
        return fail_memory(error, &m->mem, "vectors", vector_bytes);
    walk = (bind_walk){.m = m, .error = error, .visit = bind_fill};
    status = bind_walk_all(&walk);
    if (!status)
        status = m->backend->buffer_wrap(m->device, m->vectors, vector_bytes, &m->buffers[0],
                                         error);
    if (status)
        return status;
    m->n_buffer = 1;
    walk = (bind_walk){.m = m, .error = error, .visit = bind_weight};
    return bind_walk_all(&walk);
}

/* --------------------------------------------------------------------------------- rotary -- */

/* Which dimension turns `n_turns` times within the original context. Peng et al. 2023 (YaRN),
 * arXiv:2309.00071, section 3.2. */
static double yarn_dimension(const moe_rope_params *p, uint32_t n_rot, double n_turns)
{
    return n_rot * log(p->n_ctx_original / (n_turns * 2 * M_PI)) / (2 * log((double)p->base));
}

/* Radians per position of each pair, and the factor on cos and sin. */
static void rope_frequencies(const moe_rope_params *p, uint32_t n_rot, const float *divisors,
                             double *freq, float *magnitude)
{
    double low = yarn_dimension(p, n_rot, p->beta_fast);
    double high = yarn_dimension(p, n_rot, p->beta_slow);
    if (!p->no_truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = MOE_MAX(low, 0);
    high = MOE_MIN(high, n_rot - 1.0);
    for (uint32_t i = 0; i < n_rot / 2; i++) {
        const double plain = pow(p->base, -2.0 * i / n_rot);
        freq[i] = plain / p->factor;
        if (p->scaling == ROPE_YARN) { /* fast pairs keep their frequency, slow are stretched */
            double ramp = (i - low) / (high > low ? high - low : 0.001);
            ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
            freq[i] = plain / p->factor * ramp + plain * (1 - ramp);
        }
        if (divisors)
            freq[i] /= divisors[i];
    }
    *magnitude = p->attn_factor;
    if (p->scaling == ROPE_YARN && p->factor > 1)
        *magnitude *= (float)(p->log_multiplier * log((double)p->factor) + 1);
}

static moe_status model_prepare_rope(moe_model *m, moe_error *error)
{
    const uint32_t n = m->hp.n_rot / 2, n_local = m->hp.local.n_rot / 2;
    double *freqs = mem_alloc(&m->mem, (uint64_t)n + n_local, sizeof *freqs);
    if (!freqs)
        return fail_memory(error, &m->mem, "rope", (n + n_local) * sizeof *freqs);
    m->rope_freqs[0] = freqs;
    m->rope_freqs[1] = freqs + n;
    const moe_weight *w = &m->globals.rope_freqs;
    const float *divisors = w->name ? m->vectors + w->data.offset / sizeof(float) : NULL;
    for (uint32_t i = 0; divisors && i < n; i++)
        if (!(divisors[i] > 0))
            return fail(error, MOE_ERR_MODEL, w->name, "expected positive numbers, got %f",
                        (double)divisors[i]);
    rope_frequencies(&m->hp.rope, m->hp.n_rot, divisors, m->rope_freqs[0], &m->rope_magnitude[0]);
    rope_frequencies(&m->hp.rope_local, m->hp.local.n_rot,
                     m->hp.rope_local.divided ? divisors : NULL,
                     m->rope_freqs[1], &m->rope_magnitude[1]);
    return MOE_OK;
}

/* ----------------------------------------------------------------------------------- info -- */

/* The type that holds most bytes, "" if none is known. */
static const char *model_main_type(const moe_directory *dir)
{
    const moe_quant *largest = NULL;
    uint64_t by_type[MOE_COUNT(quant_table)] = {0};
    for (size_t i = 0; i < directory_n_tensors(dir); i++) {
        const moe_tensor *t = directory_tensor_at(dir, i);
        for (uint64_t k = 0; k < tensor_n_parts(t); k++) {
            const moe_part part = tensor_part(t, k);
            if (!part.quant)
                continue;
            by_type[quant_index(part.quant)] += part.bytes;
            if (!largest || by_type[quant_index(part.quant)] > by_type[quant_index(largest)])
                largest = part.quant;
        }
    }
    return largest ? largest->name : "";
}

static void model_count(moe_model *m)
{
    moe_model_info *info = &m->info;
    const bool tied = !directory_tensor(m->dir, "output.weight");
    for (size_t i = 0; i < directory_n_tensors(m->dir); i++) {
        const moe_tensor *t = directory_tensor_at(m->dir, i);
        info->n_param += t->n_elements;
        info->weight_bytes += t->bytes;
        uint64_t params = t->n_elements, bytes = t->bytes;
        const uint32_t n_expert = m->hp.router.n_expert;
        if (tensor_is_draft(m, t))
            params = bytes = 0;
        if (t->n_dims == 3 && n_expert && strstr(t->name, "_exps.")) {
            params = params / n_expert * m->hp.router.n_used;
            bytes = bytes / n_expert * m->hp.router.n_used;
        }
        if (!strcmp(t->name, "token_embd.weight") && !tied)
            params = m->hp.n_embd, bytes = t->bytes / MOE_MAX(t->dims[1], 1);
        info->n_param_active += params;
        info->weight_bytes_active += bytes;
    }
    info->quantization = model_main_type(m->dir);
}

static void model_fill_info(moe_model *m)
{
    const moe_hparams *hp = &m->hp;
    moe_model_info *info = &m->info;
    info->size = sizeof *info;
    info->router = m->router_text;
    info->attention = m->attention_text;
    info->architecture = m->architecture;
    info->name = m->name;
    info->device = m->device ? m->backend->device_name(m->device) : "";
    info->n_vocab = hp->n_vocab;
    info->n_ctx_train = hp->n_ctx_train;
    info->n_embd = hp->n_embd;
    info->n_layer = hp->n_layer;
    info->n_layer_draft = hp->n_layer_all - hp->n_layer;
    info->n_head = hp->n_head;
    info->n_head_kv = hp->n_head_kv;
    info->head_dim = hp->head_dim;
    info->n_ff = hp->n_ff;
    info->n_expert = hp->router.n_expert;
    info->n_expert_used = hp->router.n_used;
    info->n_ff_expert = hp->n_ff_expert;
    info->n_expert_shared = hp->n_expert_shared;
    info->sliding_window = hp->window;
    const moe_cache_type type = hparams_cache_type(hp, MOE_CACHE_F16);
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        const bool local = layer_is_local(hp, i);
        const moe_head_shape heads = hparams_heads(hp, local);
        if (layer_is_recurrent(hp, i))
            continue;
        info->kv_bytes_per_token +=
            heads.n_kv * (cache_row_bytes(type, hparams_cache_dim(hp, local, false)) +
                          cache_row_bytes(type, hparams_cache_dim(hp, local, true)));
        info->kv_bytes_per_token_plain +=
            hp->n_head * (cache_row_bytes(MOE_CACHE_F16, heads.dim) +
                          cache_row_bytes(MOE_CACHE_F16, heads.dim_v));
    }
    model_count(m);
}

/* A copy of a string of the file, NUL-terminated. */
static moe_status model_copy_string(moe_model *m, const char *key, bool required, char **out,
                                    moe_error *error)
{
    moe_str s = {"", 0};
    moe_status status = meta_string(m->dir, key, required, &s, error);
    if (status)
        return status;
    if (!(*out = mem_alloc(&m->mem, s.bytes + 1, 1)))
        return fail_memory(error, &m->mem, key, s.bytes + 1);
    memcpy(*out, s.data, (size_t)s.bytes);
    return MOE_OK;
}

/* ------------------------------------------------------------------------------- open -- */

static moe_status model_check_vocab(moe_model *m, moe_error *error)
{
    const moe_tensor *embedding = directory_tensor(m->dir, "token_embd.weight");
    if (!embedding)
        return fail(error, MOE_ERR_MODEL, "token_embd.weight",
                    "expected the token embedding, got none: is this a vocabulary-only file?");
    if (embedding->n_dims != 2 || embedding->dims[1] > INT32_MAX)
        return fail(error, MOE_ERR_MODEL, embedding->name,
                    "expected shape [n_embd, n_vocab], got %u dimensions and %llu rows",
                    embedding->n_dims, (unsigned long long)embedding->dims[1]);
    m->hp.n_vocab = (uint32_t)embedding->dims[1];
    uint32_t n_tokens = m->tokenizer ? moe_tokenizer_size(m->tokenizer) : m->hp.n_vocab;
    if (n_tokens != m->hp.n_vocab)
        return fail(error, MOE_ERR_MODEL, "tokenizer.ggml.tokens",
                    "expected %u tokens, one for each row of token_embd.weight, got %u",
                    m->hp.n_vocab, n_tokens);
    return MOE_OK;
}

static moe_status model_load_weights(moe_model *m, const moe_model_options *options,
                                     moe_error *error)
{
    char known[256];
    m->family = family_by_arch(m->architecture);
    if (!m->family) {
        family_list(known, sizeof known);
        return fail(error, MOE_ERR_UNSUPPORTED, "general.architecture",
                    "expected one of %s, got %s", known, m->architecture);
    }
    moe_status status = model_read_hparams(m, error);
    if (!status)
        status = model_check_vocab(m, error);
    if (status)
        return status;
    m->backend = options->backend ? options->backend : backend_cpu();
    const moe_device_options device = {&m->mem, options->isa};
    status = m->backend->device_open(&m->device, &device, error);
    if (!status)
        status = model_bind(m, error);
    if (!status && m->family->derive)
        status = m->family->derive(m, error);
    if (!status)
        status = model_prepare_rope(m, error);
    if (!status)
        model_describe(m);
    return status;
}

static moe_status model_load(moe_model *m, const moe_model_options *options, moe_error *error)
{
    moe_status status = directory_open(&m->dir, options, &m->mem, error);
    if (!status)
        status = model_copy_string(m, "general.architecture", true, &m->architecture, error);
    if (!status)
        status = model_copy_string(m, "general.name", false, &m->name, error);
    if (!status)
        status = tokenizer_from_directory(&m->tokenizer, m->dir, &m->mem, error);
    if (!status && !options->vocab_only)
        status = model_load_weights(m, options, error);
    if (!status)
        model_fill_info(m);
    return status;
}

moe_status moe_model_open(moe_model **out, const moe_model_options *options, moe_error *error)
{
    moe_model_options o;
    if (out)
        *out = NULL;
    if (!out || !options)
        return fail(error, MOE_ERR_ARGUMENT, NULL, "out and options must not be NULL");
    if (!options->size)
        return fail(error, MOE_ERR_ARGUMENT, "size",
                    "expected options filled by moe_model_options_init, got size 0");
    moe_model_options_init(&o);
    memcpy(&o, options, MOE_MIN(options->size, sizeof o));
    o.size = sizeof o;
    if (o.host && !o.host->alloc != !o.host->free)
        return fail(error, MOE_ERR_ARGUMENT, "host", "alloc and free must be set together");
    if (o.isa < MOE_ISA_AUTO || o.isa > MOE_ISA_AVXVNNI)
        return fail(error, MOE_ERR_ARGUMENT, "isa", "expected 0 to %d, got %d", MOE_ISA_AVXVNNI,
                    (int)o.isa);
    moe_mem boot; /* allocates the model, which then has its own */
    mem_init(&boot, o.host, o.memory_limit_bytes);
    moe_model *m = mem_alloc(&boot, 1, sizeof *m);
    if (!m)
        return fail_memory(error, &boot, "model", sizeof *m);
    mem_init(&m->mem, o.host, o.memory_limit_bytes);
    mem_reserve(&m->mem, atomic_load(&boot.used_bytes));
    moe_status status = model_load(m, &o, error);
    if (status) {
        moe_model_close(m);
        return status;
    }
    *out = m;
    return MOE_OK;
}

void moe_model_close(moe_model *m)
{
    if (!m)
        return;
    if (m->device) {
        for (uint32_t i = 0; i < m->n_buffer; i++)
            m->backend->buffer_free(m->device, m->buffers[i]);
        m->backend->device_close(m->device);
    }
    mem_free(&m->mem, m->buffers);
    mem_free(&m->mem, m->matrices);
    mem_free(&m->mem, m->rope_freqs[0]);
    mem_free(&m->mem, m->derived);
    mem_free(&m->mem, m->vectors);
    mem_free(&m->mem, m->layers);
    tokenizer_free(m->tokenizer);
    mem_free(&m->mem, m->name);
    mem_free(&m->mem, m->architecture);
    directory_close(m->dir);
    moe_mem boot;
    mem_init(&boot, &m->mem.host, 0);
    mem_reserve(&boot, ((mem_head *)m - 1)->bytes);
    mem_free(&boot, m);
}

void moe_model_get_info(const moe_model *model, moe_model_info *info)
{
    const size_t size = MOE_MIN(info->size, sizeof *info);
    memcpy(info, &model->info, size);
    info->size = size;
}

size_t moe_model_meta_count(const moe_model *model)
{
    return directory_n_meta(model->dir);
}

const char *moe_model_meta_key(const moe_model *model, size_t index)
{
    return index < directory_n_meta(model->dir) ? directory_meta_at(model->dir, index)->key : "";
}

/* Appends to a buffer that may be too small, and counts what it would have been. */
static void text_append(char *buf, size_t buf_bytes, size_t *used, const char *text, size_t bytes)
{
    if (*used + 1 < buf_bytes) {
        const size_t n = MOE_MIN(bytes, buf_bytes - *used - 1);
        memcpy(buf + *used, text, n);
        buf[*used + n] = 0;
    }
    *used += bytes;
}

static void text_append_number(char *buf, size_t buf_bytes, size_t *used, const moe_meta *meta,
                               moe_meta_type type, uint64_t index)
{
    char number[40];
    int n;
    if (type == META_BOOL)
        n = snprintf(number, sizeof number, "%s", meta_item_i64(meta, index) ? "true" : "false");
    else if (type == META_F32 || type == META_F64)
        n = snprintf(number, sizeof number, "%.*g", type == META_F32 ? 9 : 17,
                     meta_item_f64(meta, index));
    else if (type == META_U64)
        n = snprintf(number, sizeof number, "%llu",
                     (unsigned long long)(uint64_t)meta_item_i64(meta, index));
    else
        n = snprintf(number, sizeof number, "%lld", (long long)meta_item_i64(meta, index));
    text_append(buf, buf_bytes, used, number, (size_t)n);
}

size_t moe_model_meta_value(const moe_model *model, size_t index, char *buf, size_t buf_bytes)
{
    size_t used = 0;
    char head[32];
    if (buf_bytes)
        buf[0] = 0;
    if (index >= directory_n_meta(model->dir))
        return 0;
    const moe_meta *meta = directory_meta_at(model->dir, index);
    const moe_meta_type type = meta->type == META_ARRAY ? meta->item : meta->type;
    if (meta->type == META_ARRAY)
        text_append(buf, buf_bytes, &used, head,
                    (size_t)snprintf(head, sizeof head, "[%llu]", (unsigned long long)meta->n));
    for (uint64_t i = 0; i < meta->n; i++) {
        if (meta->type == META_ARRAY)
            text_append(buf, buf_bytes, &used, i ? ", " : " ", i ? 2 : 1);
        if (type == META_STRING)
            text_append(buf, buf_bytes, &used, meta->strings[i].data,
                        (size_t)meta->strings[i].bytes);
        else
            text_append_number(buf, buf_bytes, &used, meta, type, i);
    }
    return used;
}

size_t moe_model_tensor_count(const moe_model *model)
{
    return directory_n_tensors(model->dir);
}

/* "mixed" if experts have different types. */
static const char *tensor_type_name(const moe_tensor *t)
{
    for (uint64_t i = 1; i < tensor_n_parts(t); i++)
        if (t->parts[i].quant != t->parts[0].quant)
            return "mixed";
    return t->quant ? t->quant->name : "unknown";
}

moe_status moe_model_tensor(const moe_model *model, size_t index, moe_tensor_info *info)
{
    if (index >= directory_n_tensors(model->dir))
        return MOE_ERR_ARGUMENT;
    const moe_tensor *t = directory_tensor_at(model->dir, index);
    moe_tensor_info full = {
        .size = sizeof full,
        .name = t->name,
        .type = tensor_type_name(t),
        .n_dims = t->n_dims,
        .dims = {t->dims[0], t->dims[1], t->dims[2], t->dims[3]},
        .offset = t->offset,
        .bytes = t->bytes,
        .stored_bytes = t->bytes,
        .error = -1,
        .error_worst = -1,
    };
    if (model->dir->moe)
        moefile_describe(model->dir, (uint32_t)index, &full);
    const size_t size = MOE_MIN(info->size, sizeof full);
    memcpy(info, &full, size);
    info->size = size;
    return MOE_OK;
}

const moe_tokenizer *moe_model_tokenizer(const moe_model *model)
{
    return model->tokenizer;
}

#endif
