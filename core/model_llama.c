/* core/model_llama.c - the Llama family and those that differ from it only in details that are
 * data: llama (with Mixtral, which GGUF calls llama too), qwen2, qwen2moe, qwen3, qwen3moe, olmoe.
 *
 * The layer, Touvron et al. 2023, arXiv:2302.13971:
 *     x += attention(norm(x));  x += feed_forward(norm(x))
 * where the feed-forward is dense or made of experts. */
#ifndef MOE_CORE_MODEL_LLAMA_C
#define MOE_CORE_MODEL_LLAMA_C

#include "layers.c"
#include "model.c"

/* ---------------------------------------------------------------------- tables of tensors -- */

static const moe_binding bindings_model[] = {
    BIND_IN_MODEL("token_embd.weight", "model.embed_tokens.weight", embedding, 0, DIM_EMBD,
                  DIM_VOCAB),
    BIND_IN_MODEL("output_norm.weight", "model.norm.weight", output_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_MODEL("output.weight", "lm_head.weight", output, BIND_OPTIONAL, DIM_EMBD, DIM_VOCAB),
    BIND_IN_MODEL("rope_freqs.weight", NULL, rope_freqs, BIND_OPTIONAL | BIND_VECTOR,
                  DIM_HALF_ROT),
    BIND_END,
};

static const moe_binding bindings_attention[] = {
    BIND_IN_LAYER("attn_norm.weight", "input_layernorm.weight", attn_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_q.weight", "self_attn.q_proj.weight", wq, 0, DIM_EMBD, DIM_Q),
    BIND_IN_LAYER("attn_k.weight", "self_attn.k_proj.weight", wk, 0, DIM_EMBD, DIM_K),
    BIND_IN_LAYER("attn_v.weight", "self_attn.v_proj.weight", wv, 0, DIM_EMBD, DIM_V),
    BIND_IN_LAYER("attn_output.weight", "self_attn.o_proj.weight", wo, 0, DIM_O, DIM_EMBD),
    BIND_END,
};

/* Llama has biases only in a few derived models; Qwen2 always has them, without the output's. */
static const moe_binding bindings_optional_bias[] = {
    BIND_IN_LAYER("attn_q.bias", "self_attn.q_proj.bias", bq, BIND_OPTIONAL | BIND_VECTOR, DIM_Q),
    BIND_IN_LAYER("attn_k.bias", "self_attn.k_proj.bias", bk, BIND_OPTIONAL | BIND_VECTOR, DIM_K),
    BIND_IN_LAYER("attn_v.bias", "self_attn.v_proj.bias", bv, BIND_OPTIONAL | BIND_VECTOR, DIM_V),
    BIND_IN_LAYER("attn_output.bias", "self_attn.o_proj.bias", bo, BIND_OPTIONAL | BIND_VECTOR,
                  DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_feed_forward_bias[] = {
    BIND_IN_LAYER("ffn_gate.bias", "mlp.gate_proj.bias", gate_bias,
                  BIND_OPTIONAL | BIND_DENSE | BIND_VECTOR, DIM_FF),
    BIND_IN_LAYER("ffn_up.bias", "mlp.up_proj.bias", up_bias,
                  BIND_OPTIONAL | BIND_DENSE | BIND_VECTOR, DIM_FF),
    BIND_IN_LAYER("ffn_down.bias", "mlp.down_proj.bias", down_bias,
                  BIND_OPTIONAL | BIND_DENSE | BIND_VECTOR, DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_qkv_bias[] = {
    BIND_IN_LAYER("attn_q.bias", "self_attn.q_proj.bias", bq, BIND_VECTOR, DIM_Q),
    BIND_IN_LAYER("attn_k.bias", "self_attn.k_proj.bias", bk, BIND_VECTOR, DIM_K),
    BIND_IN_LAYER("attn_v.bias", "self_attn.v_proj.bias", bv, BIND_VECTOR, DIM_V),
    BIND_END,
};

/* A norm of each head of q and k (Qwen3) ... */
static const moe_binding bindings_head_norm[] = {
    BIND_IN_LAYER("attn_q_norm.weight", "self_attn.q_norm.weight", q_norm, BIND_VECTOR, DIM_HEAD),
    BIND_IN_LAYER("attn_k_norm.weight", "self_attn.k_norm.weight", k_norm, BIND_VECTOR, DIM_HEAD),
    BIND_END,
};

/* ... or one of the whole projection (OLMoE). */
static const moe_binding bindings_whole_norm[] = {
    BIND_IN_LAYER("attn_q_norm.weight", "self_attn.q_norm.weight", q_norm, BIND_VECTOR, DIM_Q),
    BIND_IN_LAYER("attn_k_norm.weight", "self_attn.k_norm.weight", k_norm, BIND_VECTOR, DIM_K),
    BIND_END,
};

static const moe_binding bindings_feed_forward[] = {
    BIND_IN_LAYER("ffn_norm.weight", "post_attention_layernorm.weight", ffn_norm, BIND_VECTOR,
                  DIM_EMBD),
    BIND_IN_LAYER("ffn_gate.weight", "mlp.gate_proj.weight", gate, BIND_DENSE, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_up.weight", "mlp.up_proj.weight", up, BIND_DENSE, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_down.weight", "mlp.down_proj.weight", down, BIND_DENSE, DIM_FF, DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_experts[] = {
    BIND_IN_LAYER("ffn_gate_inp.weight", "mlp.gate.weight", router, BIND_EXPERTS, DIM_EMBD,
                  DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_exps.weight", "mlp.experts.%u.gate_proj.weight", experts_gate,
                  BIND_EXPERTS, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_up_exps.weight", "mlp.experts.%u.up_proj.weight", experts_up, BIND_EXPERTS,
                  DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_down_exps.weight", "mlp.experts.%u.down_proj.weight", experts_down,
                  BIND_EXPERTS, DIM_FF_EXPERT, DIM_EMBD, DIM_EXPERT),
    BIND_END,
};

/* Qwen2-MoE: one expert that every token uses, and how much of it. */
static const moe_binding bindings_gated_shared_expert[] = {
    BIND_IN_LAYER("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", shared_router,
                  BIND_SHARED | BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight", shared_gate,
                  BIND_SHARED, DIM_EMBD, DIM_FF_SHARED),
    BIND_IN_LAYER("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight", shared_up,
                  BIND_SHARED, DIM_EMBD, DIM_FF_SHARED),
    BIND_IN_LAYER("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight", shared_down,
                  BIND_SHARED, DIM_FF_SHARED, DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_mixtral_experts[] = {
    BIND_IN_LAYER("ffn_gate_inp.weight", "block_sparse_moe.gate.weight", router, BIND_EXPERTS,
                  DIM_EMBD, DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_exps.weight", "block_sparse_moe.experts.%u.w1.weight", experts_gate,
                  BIND_EXPERTS, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_up_exps.weight", "block_sparse_moe.experts.%u.w3.weight", experts_up,
                  BIND_EXPERTS, DIM_EMBD, DIM_FF_EXPERT, DIM_EXPERT),
    BIND_IN_LAYER("ffn_down_exps.weight", "block_sparse_moe.experts.%u.w2.weight", experts_down,
                  BIND_EXPERTS, DIM_FF_EXPERT, DIM_EMBD, DIM_EXPERT),
    BIND_END,
};

/* The layer for multi-token prediction is a layer like the others, with these around it.
 * Checkpoints repeat the embedding and the output matrix in it; some files do, too. */
static const moe_binding bindings_draft[] = {
    BIND_IN_LAYER("nextn.enorm.weight", "enorm.weight", draft_token_norm, BIND_DRAFT | BIND_VECTOR,
                  DIM_EMBD),
    BIND_IN_LAYER("nextn.hnorm.weight", "hnorm.weight", draft_hidden_norm, BIND_DRAFT | BIND_VECTOR,
                  DIM_EMBD),
    BIND_IN_LAYER("nextn.eh_proj.weight", "eh_proj.weight", draft_join, BIND_DRAFT, DIM_EMBD_2,
                  DIM_EMBD),
    BIND_IN_LAYER("nextn.shared_head_norm.weight", "shared_head.norm.weight", draft_norm,
                  BIND_DRAFT | BIND_OPTIONAL | BIND_VECTOR, DIM_EMBD),
    BIND_GGUF_ONLY("nextn.embed_tokens.weight", draft_embedding, BIND_DRAFT | BIND_OPTIONAL,
                   DIM_EMBD, DIM_VOCAB),
    BIND_GGUF_ONLY("nextn.shared_head_head.weight", draft_output, BIND_DRAFT | BIND_OPTIONAL,
                   DIM_EMBD, DIM_VOCAB),
    BIND_END,
};

/* ------------------------------------------------------------------------ hyperparameters -- */

/* GGUF stores the q and k of Llama with the two halves of each head interleaved, so that rotary
 * pairs are neighbours. */
static void llama_hparams(moe_hparams *hp, hparam_reader *r)
{
    hp->rope_interleaved = true;
    hparam_window(r, hp, false, 0);
    hp->router.score = MOE_SCORE_SOFTMAX; /* Mixtral: renormalized, which is the default */
}

static void qwen_hparams(moe_hparams *hp, hparam_reader *r)
{
    hp->router.score = MOE_SCORE_SOFTMAX;
    hparam_window(r, hp, false, 0);
}

static void qwen2moe_hparams(moe_hparams *hp, hparam_reader *r)
{
    qwen_hparams(hp, r);
    hp->router.renormalize = false;
    hp->n_expert_shared = 1;
    hp->n_ff_shared = hp->n_ff;
}

static void olmoe_hparams(moe_hparams *hp, hparam_reader *r)
{
    float clamp = 0;
    hp->router.score = MOE_SCORE_SOFTMAX;
    hp->router.renormalize = false;
    hparam_f32(r, "attention.clamp_kqv", false, 0, 1e30, &clamp);
    if (!r->status && clamp > 0)
        r->status = fail(r->error, MOE_ERR_UNSUPPORTED, "olmoe.attention.clamp_kqv",
                         "expected 0 (no clamping), got %g", (double)clamp);
}

/* ------------------------------------------------------------------------------ the layer -- */

static void llama_layer(moe_pass *p, uint32_t index)
{
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_embd = p->model->hp.n_embd;
    layer_norm(p, p->h, p->x, &l->attn_norm, p->n_tok, n_embd);
    layer_attention(p, index, p->x, true);
    layer_norm(p, p->h, p->x, &l->ffn_norm, p->n_tok, n_embd);
    layer_mixture(p, l, p->x);
}

/* ---------------------------------------------------------------------------- config.json -- */

static const moe_config_key config_llama[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"model_type!=llama?sliding_window", "attention.sliding_window", CONFIG_U32, NULL, 0},
    {0},
};

static const moe_config_key config_qwen[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"use_sliding_window=true?sliding_window", "attention.sliding_window", CONFIG_U32, NULL, 0},
    {"use_sliding_window=true?layer_types", "attention.sliding_window_pattern", CONFIG_PERIOD,
     "sliding_attention=1 full_attention=0", 0},
    {"num_local_experts|num_experts", "leading_dense_block_count", CONFIG_SPARSE, NULL, 0},
    {"norm_topk_prob", "expert_weights_norm", CONFIG_BOOL, NULL, 0},
    {0},
};

static const moe_config_key config_qwen2moe[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"use_sliding_window=true?sliding_window", "attention.sliding_window", CONFIG_U32, NULL, 0},
    {"use_sliding_window=true?layer_types", "attention.sliding_window_pattern", CONFIG_PERIOD,
     "sliding_attention=1 full_attention=0", 0},
    {"num_local_experts|num_experts", "leading_dense_block_count", CONFIG_SPARSE, NULL, 0},
    {"norm_topk_prob", "expert_weights_norm", CONFIG_BOOL, NULL, 0},
    {"qkv_bias", NULL, CONFIG_EXPECT, "true", 0},
    {"shared_expert_intermediate_size", "expert_shared_feed_forward_length", CONFIG_U32, NULL, 0},
    {0},
};

static const moe_config_key config_olmoe[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"clip_qkv", "attention.clamp_kqv", CONFIG_F32, NULL, 0},
    {"norm_topk_prob", "expert_weights_norm", CONFIG_BOOL, NULL, 0},
    {0},
};

/* ------------------------------------------------------------------------------- families -- */

static const moe_family family_llama = {
    "llama", "llama mistral mixtral", llama_hparams,
    {bindings_model, bindings_attention, bindings_optional_bias, bindings_feed_forward,
     bindings_feed_forward_bias, bindings_mixtral_experts, NULL},
    llama_layer, config_llama, CONVERT_INTERLEAVE_QK, NULL,
};

static const moe_family family_qwen2 = {
    "qwen2", "qwen2", qwen_hparams,
    {bindings_model, bindings_attention, bindings_qkv_bias, bindings_feed_forward, NULL},
    llama_layer, config_qwen, 0, NULL,
};

static const moe_family family_qwen2moe = {
    "qwen2moe", "qwen2_moe", qwen2moe_hparams,
    {bindings_model, bindings_attention, bindings_qkv_bias, bindings_feed_forward,
     bindings_experts, bindings_gated_shared_expert, NULL},
    llama_layer, config_qwen2moe, 0, NULL,
};

static const moe_family family_qwen3 = {
    "qwen3", "qwen3", qwen_hparams,
    {bindings_model, bindings_attention, bindings_optional_bias, bindings_head_norm,
     bindings_feed_forward, NULL},
    llama_layer, config_qwen, 0, NULL,
};

static const moe_family family_qwen3moe = {
    "qwen3moe", "qwen3_moe", qwen_hparams,
    {bindings_model, bindings_attention, bindings_optional_bias, bindings_head_norm,
     bindings_feed_forward,
     bindings_experts, NULL},
    llama_layer, config_qwen, 0, NULL,
};

static const moe_family family_olmoe = {
    "olmoe", "olmoe", olmoe_hparams,
    {bindings_model, bindings_attention, bindings_optional_bias, bindings_whole_norm,
     bindings_feed_forward,
     bindings_experts, NULL},
    llama_layer, config_olmoe, 0, NULL,
};

#endif
