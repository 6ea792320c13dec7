/* core/model_gemma.c - Gemma 3: norms after attention and feed-forward as well as before, local
 * layers with a sliding window and a rotary base of their own, GeGLU. Gemma Team 2025,
 * arXiv:2503.19786. */
#ifndef MOE_CORE_MODEL_GEMMA_C
#define MOE_CORE_MODEL_GEMMA_C

#include "model_llama.c"

static const moe_binding bindings_gemma[] = {
    BIND_IN_LAYER("post_attention_norm.weight", "post_attention_layernorm.weight", attn_post_norm,
                  BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("ffn_norm.weight", "pre_feedforward_layernorm.weight", ffn_norm, BIND_VECTOR,
                  DIM_EMBD),
    BIND_IN_LAYER("ffn_gate.weight", "mlp.gate_proj.weight", gate, 0, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_up.weight", "mlp.up_proj.weight", up, 0, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_down.weight", "mlp.down_proj.weight", down, 0, DIM_FF, DIM_EMBD),
    BIND_IN_LAYER("post_ffw_norm.weight", "post_feedforward_layernorm.weight", ffn_post_norm,
                  BIND_VECTOR, DIM_EMBD),
    BIND_END,
};

static void gemma3_hparams(moe_hparams *hp, hparam_reader *r)
{
    enum { N_LAYER_27B = 62 };
    char buf[160];
    hp->embed_scale = sqrtf((float)hp->n_embd);
    hp->glu = MOE_GLU_GELU_TANH;
    hparam_window(r, hp, false, 6);
    /* Local layers are never stretched. */
    hp->rope_local = (moe_rope_params){.base = 10000.0f, .factor = 1.0f, .attn_factor = 1.0f,
                                       .beta_fast = 32.0f, .beta_slow = 1.0f,
                                       .n_ctx_original = hp->n_ctx_train};
    hparam_f32(r, "rope.freq_base_swa", false, 1, 1e12, &hp->rope_local.base);
    hparam_f32(r, "final_logit_softcapping", false, 0, 1e6, &hp->logit_cap);
    /* The largest model scales by the width per head instead of the head's length; its files often
     * do not say so. */
    if (hp->n_layer == N_LAYER_27B &&
        !directory_meta(r->dir, hparam_key(r, "attention.scale", buf)))
        hp->attn_scale = 1.0f / sqrtf((float)(hp->n_embd / hp->n_head));
}

static void gemma_layer(moe_pass *p, uint32_t index)
{
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_embd = p->model->hp.n_embd;
    layer_norm(p, p->h, p->x, &l->attn_norm, p->n_tok, n_embd);
    layer_attention(p, index, p->h, false);
    layer_norm(p, p->h, p->h, &l->attn_post_norm, p->n_tok, n_embd);
    layer_add(p, p->x, p->h);
    layer_norm(p, p->h, p->x, &l->ffn_norm, p->n_tok, n_embd);
    layer_feed_forward(p, l, p->h, false);
    layer_norm(p, p->h, p->h, &l->ffn_post_norm, p->n_tok, n_embd);
    layer_add(p, p->x, p->h);
}

static const moe_config_key config_gemma3[] = {
    {"hidden_activation", NULL, CONFIG_EXPECT, "gelu_pytorch_tanh", 0},
    {"use_bidirectional_attention", NULL, CONFIG_EXPECT, "false", 0},
    {"attn_logit_softcapping", NULL, CONFIG_EXPECT, "null", 0},
    {"query_pre_attn_scalar", "attention.scale", CONFIG_RSQRT, NULL, 0},
    {"sliding_window", "attention.sliding_window", CONFIG_U32, NULL, 0},
    {"rope_parameters.sliding_attention.rope_type", NULL, CONFIG_EXPECT, "default", 0},
    {"layer_types", "attention.sliding_window_pattern", CONFIG_PERIOD,
     "sliding_attention=1 full_attention=0", 0},
    {"sliding_window_pattern|_sliding_window_pattern", "attention.sliding_window_pattern",
     CONFIG_U32, NULL, 0},
    {"rope_local_base_freq|rope_parameters.sliding_attention.rope_theta", "rope.freq_base_swa",
     CONFIG_F32, NULL, 0},
    {"final_logit_softcapping", "final_logit_softcapping", CONFIG_F32, NULL, 0},
    {0},
};

static const moe_family family_gemma3 = {
    "gemma3", "gemma3_text", gemma3_hparams,
    {bindings_model, bindings_attention, bindings_optional_bias, bindings_head_norm, bindings_gemma,
     NULL},
    gemma_layer, config_gemma3, CONVERT_NORM_PLUS_1, NULL,
};

#endif
