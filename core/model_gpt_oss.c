/* core/model_gpt_oss.c - gpt-oss: sinks in the attention, a sliding window in every other layer,
 * biases everywhere, and experts with a clamped gate. OpenAI 2025, arXiv:2508.10925. */
#ifndef MOE_CORE_MODEL_GPT_OSS_C
#define MOE_CORE_MODEL_GPT_OSS_C

#include "model_llama.c"

static const moe_binding bindings_gpt_oss[] = {
    BIND_IN_LAYER("attn_output.bias", "self_attn.o_proj.bias", bo, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_sinks.weight", "self_attn.sinks", sinks, BIND_VECTOR, DIM_Q_HEADS),
    BIND_IN_LAYER("post_attention_norm.weight", "post_attention_layernorm.weight", ffn_norm,
                  BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("ffn_gate_inp.weight", "mlp.router.weight", router, 0, DIM_EMBD, DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_inp.bias", "mlp.router.bias", router_bias, BIND_VECTOR, DIM_EXPERT),
    BIND_END,
};

/* In a checkpoint gate and up are one tensor whose rows are theirs in turn. */
static const moe_binding bindings_gpt_oss_experts[] = {
    BIND_IN_LAYER("ffn_gate_exps.weight", "mlp.experts.gate_up_proj", experts_gate, 0, DIM_EMBD,
                  DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_up_exps.weight", "mlp.experts.gate_up_proj", experts_up, 0, DIM_EMBD,
                  DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_down_exps.weight", "mlp.experts.down_proj", experts_down, 0, DIM_FF_EXPERT,
                  DIM_EMBD, DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_exps.bias", "mlp.experts.gate_up_proj_bias", experts_gate_bias,
                  BIND_VECTOR, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_up_exps.bias", "mlp.experts.gate_up_proj_bias", experts_up_bias,
                  BIND_VECTOR, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_down_exps.bias", "mlp.experts.down_proj_bias", experts_down_bias,
                  BIND_VECTOR, DIM_EMBD, DIM_EXPERT),
    BIND_END,
};

static void gpt_oss_hparams(moe_hparams *hp, hparam_reader *r)
{
    uint32_t n_expert = 0;
    hp->router.score = MOE_SCORE_SOFTMAX_TOPK;
    hp->router.renormalize = false;
    hp->glu = MOE_GLU_CLAMPED;
    hp->glu_alpha = 1.702f;
    hp->glu_limit = 7.0f;
    hparam_u32(r, "expert_count", true, 1, MODEL_MAX_EXPERTS, &n_expert);
    hparam_f32(r, "feed_forward.swiglu_alpha", false, -1e6, 1e6, &hp->glu_alpha);
    hparam_f32(r, "feed_forward.swiglu_limit", false, 0, 1e30, &hp->glu_limit);
    hp->rope.no_truncate = true; /* "truncate" in config.json; others' files do not say it */
    hparam_truncate(r, &hp->rope);
    hparam_window(r, hp, true, 2);
    hparam_f32(r, "rope.freq_base_swa", false, 1, 1e12, &hp->rope_local.base);
}

static const moe_config_key config_gpt_oss[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"attention_bias", NULL, CONFIG_EXPECT, "true", 0},
    {"swiglu_limit", "feed_forward.swiglu_limit", CONFIG_F32, NULL, 0},
    {"swiglu_alpha", "feed_forward.swiglu_alpha", CONFIG_F32, NULL, 0},
    {"layer_types", "attention.sliding_window_pattern", CONFIG_PERIOD,
     "sliding_attention=1 full_attention=0", 0},
    {"sliding_window", "attention.sliding_window", CONFIG_U32, NULL, 0},
    {"intermediate_size", "expert_feed_forward_length", CONFIG_U32, NULL, 0},
    {0},
};

static const moe_family family_gpt_oss = {
    "gpt-oss", "gpt_oss", gpt_oss_hparams,
    {bindings_model, bindings_attention, bindings_qkv_bias, bindings_gpt_oss,
     bindings_gpt_oss_experts, NULL},
    llama_layer, config_gpt_oss, 0, NULL,
};

#endif
