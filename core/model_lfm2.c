/* core/model_lfm2.c - LFM2-MoE: most layers mix tokens by a short gated convolution, some by
 * attention; experts behind sigmoids. Liquid AI 2025, "LFM2 Technical Report", arXiv:2511.23404. */
#ifndef MOE_CORE_MODEL_LFM2_C
#define MOE_CORE_MODEL_LFM2_C

#include "model_llama.c"

static const moe_binding bindings_lfm2_model[] = {
    BIND_IN_MODEL("token_embd.weight", "model.embed_tokens.weight", embedding, 0, DIM_EMBD,
                  DIM_VOCAB),
    BIND_IN_MODEL("token_embd_norm.weight", "model.embedding_norm.weight", output_norm,
                  BIND_VECTOR, DIM_EMBD), /* misnamed in GGUF: it stands behind the last layer */
    BIND_IN_MODEL("output.weight", "lm_head.weight", output, BIND_OPTIONAL, DIM_EMBD, DIM_VOCAB),
    BIND_END,
};

static const moe_binding bindings_lfm2_mixer[] = {
    BIND_IN_LAYER("attn_norm.weight", "operator_norm.weight", attn_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_q.weight", "self_attn.q_proj.weight", wq, BIND_ATTENTION, DIM_EMBD, DIM_Q),
    BIND_IN_LAYER("attn_k.weight", "self_attn.k_proj.weight", wk, BIND_ATTENTION, DIM_EMBD, DIM_K),
    BIND_IN_LAYER("attn_v.weight", "self_attn.v_proj.weight", wv, BIND_ATTENTION, DIM_EMBD, DIM_V),
    BIND_IN_LAYER("attn_output.weight", "self_attn.out_proj.weight", wo, BIND_ATTENTION, DIM_O,
                  DIM_EMBD),
    BIND_IN_LAYER("attn_q_norm.weight", "self_attn.q_layernorm.weight", q_norm,
                  BIND_ATTENTION | BIND_VECTOR, DIM_HEAD),
    BIND_IN_LAYER("attn_k_norm.weight", "self_attn.k_layernorm.weight", k_norm,
                  BIND_ATTENTION | BIND_VECTOR, DIM_HEAD),
    BIND_IN_LAYER("shortconv.in_proj.weight", "conv.in_proj.weight", conv_in, BIND_RECURRENT,
                  DIM_EMBD, DIM_EMBD_3),
    BIND_IN_LAYER("shortconv.conv.weight", "conv.conv.weight", conv, BIND_RECURRENT | BIND_VECTOR,
                  DIM_CONV, DIM_EMBD),
    BIND_IN_LAYER("shortconv.out_proj.weight", "conv.out_proj.weight", conv_out, BIND_RECURRENT,
                  DIM_EMBD, DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_lfm2_feed_forward[] = {
    BIND_IN_LAYER("ffn_norm.weight", "ffn_norm.weight", ffn_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("ffn_gate.weight", "feed_forward.w1.weight", gate, BIND_DENSE, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_up.weight", "feed_forward.w3.weight", up, BIND_DENSE, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_down.weight", "feed_forward.w2.weight", down, BIND_DENSE, DIM_FF, DIM_EMBD),
    BIND_IN_LAYER("ffn_gate_inp.weight", "feed_forward.gate.weight", router, BIND_EXPERTS,
                  DIM_EMBD, DIM_EXPERT),
    BIND_IN_LAYER("exp_probs_b.bias", "feed_forward.expert_bias", router_choice,
                  BIND_EXPERTS | BIND_CHOICE | BIND_VECTOR, DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_exps.weight", "feed_forward.experts.%u.w1.weight", experts_gate,
                  BIND_EXPERTS, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_up_exps.weight", "feed_forward.experts.%u.w3.weight", experts_up,
                  BIND_EXPERTS, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_down_exps.weight", "feed_forward.experts.%u.w2.weight", experts_down,
                  BIND_EXPERTS, DIM_FF_EXPERT, DIM_EMBD, DIM_EXPERT),
    BIND_END,
};

static void lfm2moe_hparams(moe_hparams *hp, hparam_reader *r)
{
    char buf[160];
    hp->router.score = MOE_SCORE_SIGMOID;
    hp->choice_bias = true; /* others' files do not say it */
    r->status = meta_bool(r->dir, hparam_key(r, "expert_selection_bias", buf), false,
                          &hp->choice_bias, r->error);
    hparam_u32(r, "shortconv.l_cache", true, 1, MOE_CONV_MAX_TAP, &hp->n_conv);
}

static void lfm2_layer(moe_pass *p, uint32_t index)
{
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_embd = p->model->hp.n_embd;
    layer_norm(p, p->h, p->x, &l->attn_norm, p->n_tok, n_embd);
    if (layer_is_recurrent(&p->model->hp, index))
        layer_short_conv(p, index, p->x);
    else
        layer_attention(p, index, p->x, true);
    layer_norm(p, p->h, p->x, &l->ffn_norm, p->n_tok, n_embd);
    layer_mixture(p, l, p->x);
}

static const moe_config_key config_lfm2[] = {
    {"layer_types", "attention.head_count_kv", CONFIG_LAYERS,
     "conv=0 full_attention=num_key_value_heads", 0},
    {"conv_bias", NULL, CONFIG_EXPECT, "false", 0},
    {"use_expert_bias", "expert_selection_bias", CONFIG_BOOL, NULL, 0},
    {"norm_topk_prob", "expert_weights_norm", CONFIG_BOOL, NULL, 0},
    {"model_type", "expert_gating_func", CONFIG_WORD, "lfm2_moe=2", 0},
    {"norm_eps", "attention.layer_norm_rms_epsilon", CONFIG_F32, NULL, 0},
    {"conv_L_cache", "shortconv.l_cache", CONFIG_U32, NULL, 0},
    {"num_dense_layers", "leading_dense_block_count", CONFIG_U32, NULL, 0},
    {"routed_scaling_factor", "expert_weights_scale", CONFIG_F32, NULL, 0},
    {0},
};

static const moe_family family_lfm2moe = {
    "lfm2moe", "lfm2_moe", lfm2moe_hparams,
    {bindings_lfm2_model, bindings_lfm2_mixer, bindings_lfm2_feed_forward, NULL},
    lfm2_layer, config_lfm2, 0, NULL,
};

#endif
