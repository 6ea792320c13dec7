/* core/model_gemma4.c - Gemma 4, dense and with experts: local and global layers have heads of
 * different lengths, values may be the keys before their norm, and experts stand beside a dense
 * feed-forward. Gemma Team 2026, the model's card and its reference implementation. */
#ifndef MOE_CORE_MODEL_GEMMA4_C
#define MOE_CORE_MODEL_GEMMA4_C

#include "model_llama.c"

static const moe_binding bindings_gemma4_attention[] = {
    BIND_IN_LAYER("attn_norm.weight", "input_layernorm.weight", attn_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_q.weight", "self_attn.q_proj.weight", wq, 0, DIM_EMBD, DIM_Q),
    BIND_IN_LAYER("attn_k.weight", "self_attn.k_proj.weight", wk, 0, DIM_EMBD, DIM_K),
    BIND_IN_LAYER("attn_v.weight", "self_attn.v_proj.weight", wv, BIND_OPTIONAL, DIM_EMBD, DIM_V),
    BIND_IN_LAYER("attn_output.weight", "self_attn.o_proj.weight", wo, 0, DIM_O, DIM_EMBD),
    BIND_IN_LAYER("post_attention_norm.weight", "post_attention_layernorm.weight", attn_post_norm,
                  BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("layer_output_scale.weight", "layer_scalar", layer_scale, BIND_VECTOR, DIM_ONE),
    BIND_END,
};

static const moe_binding bindings_gemma4_feed_forward[] = {
    BIND_IN_LAYER("ffn_norm.weight", "pre_feedforward_layernorm.weight", ffn_norm, BIND_VECTOR,
                  DIM_EMBD),
    BIND_IN_LAYER("ffn_gate.weight", "mlp.gate_proj.weight", gate, 0, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_up.weight", "mlp.up_proj.weight", up, 0, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_down.weight", "mlp.down_proj.weight", down, 0, DIM_FF, DIM_EMBD),
    BIND_IN_LAYER("post_ffw_norm.weight", "post_feedforward_layernorm.weight", ffn_post_norm,
                  BIND_VECTOR, DIM_EMBD),
    BIND_END,
};

/* Files have gate and up of each expert in one matrix, or apart: gemma4_derive(). */
static const moe_binding bindings_gemma4_experts[] = {
    BIND_IN_LAYER("ffn_gate_inp.weight", "router.proj.weight", router, BIND_EXPERTS, DIM_EMBD,
                  DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_inp.scale", "router.scale", router_scale, BIND_EXPERTS | BIND_VECTOR,
                  DIM_EMBD),
    BIND_IN_LAYER("ffn_down_exps.scale", "router.per_expert_scale", experts_factor,
                  BIND_EXPERTS | BIND_VECTOR, DIM_EXPERT),
    BIND_IN_LAYER("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", ffn_norm_2,
                  BIND_EXPERTS | BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight",
                  ffn_post_norm_1, BIND_EXPERTS | BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight",
                  ffn_post_norm_2, BIND_EXPERTS | BIND_VECTOR, DIM_EMBD),
    BIND_GGUF_ONLY("ffn_gate_up_exps.weight", experts_gate_up,
                   BIND_EXPERTS | BIND_OPTIONAL | BIND_HALVES, DIM_EMBD, DIM_FF_EXPERT_2,
                   DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_exps.weight", "experts.%u.gate_proj.weight", experts_gate,
                  BIND_EXPERTS | BIND_OPTIONAL, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_up_exps.weight", "experts.%u.up_proj.weight", experts_up,
                  BIND_EXPERTS | BIND_OPTIONAL, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_down_exps.weight", "experts.%u.down_proj.weight", experts_down,
                  BIND_EXPERTS, DIM_FF_EXPERT, DIM_EMBD, DIM_EXPERT),
    BIND_END,
};

/* What the smaller models of the family have, and this does not compute. */
static void gemma4_refuse(hparam_reader *r, const char *key)
{
    char buf[160];
    uint32_t value = 0;
    hparam_u32(r, key, false, 0, UINT32_MAX, &value);
    if (!r->status && value)
        r->status = fail(r->error, MOE_ERR_UNSUPPORTED, hparam_key(r, key, buf),
                         "expected 0, got %u: embeddings for each layer and shared caches are not "
                         "computed", value);
}

static void gemma4_local_heads(moe_hparams *hp, hparam_reader *r)
{
    moe_head_shape *local = &hp->local;
    local->dim = hp->head_dim;
    hparam_u32(r, "attention.key_length_swa", false, 2, MODEL_MAX_HEAD_DIM, &local->dim);
    local->dim_v = local->dim;
    hparam_u32(r, "attention.value_length_swa", false, 2, MODEL_MAX_HEAD_DIM, &local->dim_v);
    local->n_rot = local->dim;
    hparam_u32(r, "rope.dimension_count_swa", false, 2, local->dim, &local->n_rot);
    hparam_require(r, local->n_rot % 2 == 0, "rope.dimension_count_swa",
                   "expected an even number, at most %u, got %u", local->dim, local->n_rot);
    hparam_require(r, local->dim_v == local->dim, "attention.value_length_swa",
                   "expected %u, as attention.key_length_swa, got %u", local->dim, local->dim_v);
    hparam_require(r, hp->head_dim_v == hp->head_dim, "attention.value_length",
                   "expected %u, as attention.key_length, got %u", hp->head_dim, hp->head_dim_v);
}

static void gemma4_hparams(moe_hparams *hp, hparam_reader *r)
{
    hp->embed_scale = sqrtf((float)hp->n_embd);
    hp->attn_scale = 1.0f;
    hp->glu = MOE_GLU_GELU_TANH;
    hp->v_norm = true;
    hp->parallel_dense = true;
    hp->router.score = MOE_SCORE_SOFTMAX;
    hparam_window(r, hp, true, 0);
    hparam_require(r, r->status || hp->window_period, "attention.sliding_window_pattern",
                   "expected 1 to %u, or a list; got %u", MODEL_MAX_LAYERS, 0);
    gemma4_local_heads(hp, r);
    hp->rope_local = (moe_rope_params){.base = 10000.0f, .factor = 1.0f, .attn_factor = 1.0f,
                                       .beta_fast = 32.0f, .beta_slow = 1.0f,
                                       .n_ctx_original = hp->n_ctx_train};
    hparam_f32(r, "rope.freq_base_swa", false, 1, 1e12, &hp->rope_local.base);
    hparam_f32(r, "final_logit_softcapping", false, 0, 1e6, &hp->logit_cap);
    gemma4_refuse(r, "embedding_length_per_layer_input");
    gemma4_refuse(r, "attention.shared_kv_layers");
    hparam_require(r, hp->n_ff > 0, "feed_forward_length", "expected 1 to %u, got %u", MODEL_MAX_FF,
                   hp->n_ff);
}

/* Gate and up as views of the matrix that holds the rows of both; in a .moe file of each expert's
 * own. */
static moe_status gemma4_split(moe_model *m, moe_layer *l, moe_error *error)
{
    const moe_weight *both = &l->experts_gate_up;
    const uint64_t n_row = both->dims[1] / 2;
    l->experts_gate = l->experts_up = *both;
    l->experts_gate.dims[1] = l->experts_up.dims[1] = n_row;
    bool aligned = true;
    for (uint64_t i = 0; i < both->dims[2]; i++)
        aligned &= n_row * weight_matrix(both, i).row_bytes % sizeof(float) == 0;
    if (!aligned)
        return fail(error, MOE_ERR_UNSUPPORTED, both->name,
                    "expected gate and up of the experts in tensors of their own, since the rows "
                    "of both cannot be told apart in place");
    l->experts_up.data = view_at(both->data, n_row * weight_matrix(both, 0).row_bytes);
    if (!both->matrices)
        return MOE_OK;
    moe_matrix *up = m->matrices + (both->matrices - m->matrices) + both->dims[2];
    for (uint64_t i = 0; i < both->dims[2]; i++) {
        up[i] = both->matrices[i];
        up[i].data = view_at(up[i].data, n_row * up[i].row_bytes);
    }
    l->experts_up.matrices = up;
    return MOE_OK;
}

/* Experts have one of two forms. */
static moe_status gemma4_check_experts(moe_model *m, uint32_t layer, moe_error *error)
{
    moe_layer *l = &m->layers[layer];
    char name[64];
    const bool both = weight_present(&l->experts_gate_up);
    const bool gate = weight_present(&l->experts_gate), up = weight_present(&l->experts_up);
    if (both && !gate && !up)
        return gemma4_split(m, l, error);
    if (!both && gate && up)
        return MOE_OK;
    snprintf(name, sizeof name, "blk.%u.ffn_%s_exps.weight", layer,
             both || gate == up ? "gate_up" : gate ? "up" : "gate");
    return fail(error, MOE_ERR_MODEL, name,
                "expected gate and up of the experts, either both apart or in one, got %s",
                both ? "both forms" : gate || up ? "one of them" : "none");
}

/* Which of the optional tensors are there must make sense: values of their own in local layers, and
 * in all global ones or in none. */
static moe_status gemma4_derive(moe_model *m, moe_error *error)
{
    char name[64];
    moe_status status = MOE_OK;
    bool values = false;
    for (uint32_t i = 0; i < m->hp.n_layer; i++)
        values |= !layer_is_local(&m->hp, i) && weight_present(&m->layers[i].wv);
    for (uint32_t i = 0; i < m->hp.n_layer && !status; i++) {
        moe_layer *l = &m->layers[i];
        snprintf(name, sizeof name, "blk.%u.attn_v.weight", i);
        if (!weight_present(&l->wv) && (values || layer_is_local(&m->hp, i)))
            return fail(error, MOE_ERR_MODEL, name, "expected values in each layer with a sliding "
                        "window, and in all other layers or in none; got none");
        if (weight_present(&l->router))
            status = gemma4_check_experts(m, i, error);
    }
    return status;
}

/* Experts, from the residual stream: to p->mixed. The router sees it at unit length. */
static void gemma4_experts(moe_pass *p, const moe_layer *l)
{
    const uint32_t n = p->model->hp.n_embd;
    const moe_norm_op unit = {.dst = p->mixed, .src = p->x, .weight = l->router_scale.data,
                              .n_row = p->n_tok, .dim = n, .dst_stride = n, .src_stride = n,
                              .eps = p->model->hp.eps * (float)n, .l2 = true};
    p->be->norm(p->queue, &unit);
    layer_route(p, l, p->mixed);
    layer_norm(p, p->h, p->x, &l->ffn_norm_2, p->n_tok, n);
    layer_routed_experts(p, l, p->mixed, false);
    layer_norm(p, p->mixed, p->mixed, &l->ffn_post_norm_2, p->n_tok, n);
}

static void gemma4_layer(moe_pass *p, uint32_t index)
{
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_embd = p->model->hp.n_embd;
    const bool experts = weight_present(&l->router);
    layer_norm(p, p->h, p->x, &l->attn_norm, p->n_tok, n_embd);
    layer_attention(p, index, p->h, false);
    layer_norm(p, p->h, p->h, &l->attn_post_norm, p->n_tok, n_embd);
    layer_add(p, p->x, p->h);
    if (experts)
        gemma4_experts(p, l);
    layer_norm(p, p->h, p->x, &l->ffn_norm, p->n_tok, n_embd);
    layer_feed_forward(p, l, p->h, false);
    if (experts) {
        layer_norm(p, p->h, p->h, &l->ffn_post_norm_1, p->n_tok, n_embd);
        layer_add(p, p->h, p->mixed);
    }
    layer_norm(p, p->h, p->h, &l->ffn_post_norm, p->n_tok, n_embd);
    layer_add(p, p->x, p->h);
    layer_output_scale(p, l);
}

static const moe_config_key config_gemma4[] = {
    {"hidden_activation", NULL, CONFIG_EXPECT, "gelu_pytorch_tanh", 0},
    {"attention_bias", NULL, CONFIG_EXPECT, "false", 0},
    {"enable_moe_block=false?num_experts", NULL, CONFIG_EXPECT, "0", 0},
    {"use_bidirectional_attention", NULL, CONFIG_EXPECT, "null vision", 0},
    {"rope_parameters.sliding_attention.rope_type", NULL, CONFIG_EXPECT, "default", 0},
    {"sliding_window", "attention.sliding_window", CONFIG_U32, NULL, 0},
    {"layer_types", "attention.sliding_window_pattern", CONFIG_LAYERS,
     "sliding_attention=1 full_attention=0", 0},
    {"layer_types", "attention.head_count_kv", CONFIG_LAYERS,
     "sliding_attention=num_key_value_heads "
     "full_attention=per_layer_config.[].num_key_value_heads|num_global_key_value_heads|"
     "num_key_value_heads", 0},
    {"per_layer_config.[].head_dim|global_head_dim|head_dim", "attention.key_length", CONFIG_U32,
     NULL, 0},
    {"per_layer_config.[].head_dim|global_head_dim|head_dim", "attention.value_length", CONFIG_U32,
     NULL, 0},
    {"head_dim", "attention.key_length_swa", CONFIG_U32, NULL, 0},
    {"head_dim", "attention.value_length_swa", CONFIG_U32, NULL, 0},
    {"head_dim", "rope.dimension_count_swa", CONFIG_U32, NULL, 0},
    {"rope_parameters.sliding_attention.rope_theta", "rope.freq_base_swa", CONFIG_F32, NULL, 0},
    {"hidden_size_per_layer_input", "embedding_length_per_layer_input", CONFIG_U32, NULL, 0},
    {"num_kv_shared_layers", "attention.shared_kv_layers", CONFIG_U32, NULL, 0},
    {"top_k_experts", "expert_used_count", CONFIG_U32, NULL, 0},
    {"final_logit_softcapping", "final_logit_softcapping", CONFIG_F32, NULL, 0},
    {0},
};

static const moe_family family_gemma4 = {
    "gemma4", "gemma4_text", gemma4_hparams,
    {bindings_model, bindings_gemma4_attention, bindings_head_norm, bindings_gemma4_feed_forward,
     bindings_gemma4_experts, NULL},
    gemma4_layer, config_gemma4, 0, gemma4_derive,
};

#endif
