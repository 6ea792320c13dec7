/* core/model_deepseek.c - DeepSeek V2 and V3 with their kin (R1, Moonlight, GLM-4.7-Flash), which
 * GGUF calls deepseek2: latent attention, shared experts, leading layers without experts.
 *
 * DeepSeek-AI 2024, arXiv:2405.04434 (V2) and arXiv:2412.19437 (V3). The layer is Llama's with
 * another attention. */
#ifndef MOE_CORE_MODEL_DEEPSEEK_C
#define MOE_CORE_MODEL_DEEPSEEK_C

#include "model_llama.c"

/* ---------------------------------------------------------------------- tables of tensors -- */

static const moe_binding bindings_latent_attention[] = {
    BIND_IN_LAYER("attn_norm.weight", "input_layernorm.weight", attn_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_q.weight", "self_attn.q_proj.weight", wq, BIND_NO_LATENT_Q, DIM_EMBD,
                  DIM_Q),
    BIND_IN_LAYER("attn_q_a.weight", "self_attn.q_a_proj.weight", wq_a, BIND_LATENT_Q, DIM_EMBD,
                  DIM_LATENT_Q),
    BIND_IN_LAYER("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight", wq_a_norm,
                  BIND_LATENT_Q | BIND_VECTOR, DIM_LATENT_Q),
    BIND_IN_LAYER("attn_q_b.weight", "self_attn.q_b_proj.weight", wq_b, BIND_LATENT_Q,
                  DIM_LATENT_Q, DIM_Q),
    BIND_IN_LAYER("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight", wkv_a, 0,
                  DIM_EMBD, DIM_LATENT_ROT),
    BIND_IN_LAYER("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight", wkv_a_norm,
                  BIND_VECTOR, DIM_LATENT),
    /* Checkpoints and older files have one matrix: per head, rows for keys, then for values. */
    BIND_IN_LAYER("attn_kv_b.weight", "self_attn.kv_b_proj.weight", wkv_b, BIND_LATENT_FUSED,
                  DIM_LATENT, DIM_LATENT_KV),
    /* Newer files have two stacks, the keys' transposed. */
    BIND_GGUF_ONLY("attn_k_b.weight", wk_b, BIND_LATENT_SPLIT, DIM_NOPE, DIM_LATENT,
                  DIM_Q_HEADS),
    BIND_GGUF_ONLY("attn_v_b.weight", wv_b, BIND_LATENT_SPLIT, DIM_LATENT, DIM_HEAD_V,
                  DIM_Q_HEADS),
    BIND_IN_LAYER("attn_output.weight", "self_attn.o_proj.weight", wo, 0, DIM_O, DIM_EMBD),
    /* No published model has these. */
    BIND_IN_LAYER("attn_q_a.bias", "self_attn.q_a_proj.bias", bq_a,
                  BIND_OPTIONAL | BIND_LATENT_Q | BIND_VECTOR, DIM_LATENT_Q),
    BIND_IN_LAYER("attn_kv_a_mqa.bias", "self_attn.kv_a_proj_with_mqa.bias", bkv_a,
                  BIND_OPTIONAL | BIND_VECTOR, DIM_LATENT_ROT),
    BIND_IN_LAYER("attn_output.bias", "self_attn.o_proj.bias", bo, BIND_OPTIONAL | BIND_VECTOR,
                  DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_shared_experts[] = {
    BIND_IN_LAYER("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", router_choice,
                  BIND_EXPERTS | BIND_SIGMOID | BIND_VECTOR, DIM_EXPERT),
    BIND_IN_LAYER("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight", shared_gate,
                  BIND_SHARED, DIM_EMBD, DIM_FF_SHARED),
    BIND_IN_LAYER("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight", shared_up,
                  BIND_SHARED, DIM_EMBD, DIM_FF_SHARED),
    BIND_IN_LAYER("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight", shared_down,
                  BIND_SHARED, DIM_FF_SHARED, DIM_EMBD),
    BIND_END,
};

/* ------------------------------------------------------------------------ hyperparameters -- */

/* Newer files describe the heads that the cache sees (one, as long as its row) and add the lengths
 * of the model's own heads; older ones have only the latter. */
static void deepseek_heads(moe_hparams *hp, hparam_reader *r)
{
    const uint32_t row = hp->n_latent + hp->n_rot, key = hp->head_dim, value = hp->head_dim_v;
    char buf[160];
    hp->latent_split = directory_meta(r->dir, hparam_key(r, "attention.key_length_mla", buf));
    if (hp->latent_split) {
        hparam_u32(r, "attention.key_length_mla", true, 2, MODEL_MAX_HEAD_DIM, &hp->head_dim);
        hparam_u32(r, "attention.value_length_mla", true, 1, MODEL_MAX_HEAD_DIM, &hp->head_dim_v);
        hparam_require(r, key == row, "attention.key_length",
                       "expected %u, kv_lora_rank and the rotated part, got %u", row, key);
        hparam_require(r, value == hp->n_latent, "attention.value_length",
                       "expected %u, as kv_lora_rank, got %u", hp->n_latent, value);
        hparam_require(r, hp->n_head_kv == 1, "attention.head_count_kv",
                       "expected %u, since all heads share the latent, got %u", 1, hp->n_head_kv);
    } else {
        hparam_require(r, hp->n_head_kv == hp->n_head, "attention.head_count_kv",
                       "expected %u, as many as there are heads, got %u", hp->n_head,
                       hp->n_head_kv);
    }
    hparam_require(r, hp->n_rot < hp->head_dim, "rope.dimension_count",
                   "expected fewer than the %u elements of a head, got %u", hp->head_dim,
                   hp->n_rot);
    hp->n_head_kv = 1;
}

/* The scale of q . k, which YaRN makes larger: with the multiplier given, what other families apply
 * to cos and sin is applied here, to the whole product. */
static void deepseek_scale(moe_hparams *hp, hparam_reader *r)
{
    float given = 0, multiplier = 0;
    hparam_f32(r, "attention.scale", false, 0, 1e6, &given);
    hp->attn_scale = given > 0 ? given : (float)(1.0 / sqrt((double)hp->head_dim));
    hparam_f32(r, "rope.scaling.yarn_log_multiplier", false, 0, 10, &multiplier);
    if (multiplier > 0 && hp->rope.scaling == ROPE_YARN && hp->rope.factor > 1) {
        const double m = 1 + (double)multiplier * log((double)hp->rope.factor);
        hp->attn_scale = (float)((double)hp->attn_scale * m * m);
        hp->rope.log_multiplier = 0;
    }
}

/* Files without expert_gating_func are of V2, which has a softmax, or of a model whose bias for the
 * selection gives it away. */
static bool deepseek_has_choice(const moe_hparams *hp, const hparam_reader *r)
{
    char name[64];
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        snprintf(name, sizeof name, "blk.%u.exp_probs_b.bias", i);
        if (directory_tensor(r->dir, name))
            return true;
    }
    return false;
}

static void deepseek_hparams(moe_hparams *hp, hparam_reader *r)
{
    uint32_t n_rot = 0;
    char buf[160];
    hp->rope_interleaved = true; /* others' files do not say it */
    r->status = meta_bool(r->dir, hparam_key(r, "rope.interleaved", buf), false,
                          &hp->rope_interleaved, r->error);
    hp->eps_latent = 1e-6f; /* whatever rms_norm_eps is */
    hparam_u32(r, "attention.kv_lora_rank", true, 1, MODEL_MAX_EMBD, &hp->n_latent);
    hparam_u32(r, "attention.q_lora_rank", false, 0, MODEL_MAX_EMBD, &hp->n_latent_q);
    hparam_u32(r, "rope.dimension_count", true, 2, MODEL_MAX_HEAD_DIM, &n_rot);
    hparam_require(r, r->status || hp->n_latent <= MODEL_MAX_HEAD_DIM - n_rot,
                   "attention.kv_lora_rank", "expected at most %u, got %u",
                   MODEL_MAX_HEAD_DIM - n_rot, hp->n_latent);
    if (r->status)
        return;
    deepseek_heads(hp, r);
    deepseek_scale(hp, r);
    hparam_u32(r, "nextn_predict_layers", false, 0, hp->n_layer - 1, &hp->n_layer_draft);
    if (!r->status)
        hp->n_layer -= hp->n_layer_draft;
    hp->router.renormalize = false;
    hp->router.score = deepseek_has_choice(hp, r) ? MOE_SCORE_SIGMOID : MOE_SCORE_SOFTMAX;
}

/* -------------------------------------------------------------------------------- weights -- */

/* What the transposed part of a fused matrix is kept as: float types as they are, others as F16. A
 * block of rows cannot be transposed in an integer format without rounding it anew; F16 is a
 * rounding of 2^-12, far below what the format itself has cost. */
static const moe_quant *derived_quant(const moe_weight *fused)
{
    return fused->quant->block_len == 1 ? fused->quant : quant_by_name("F16");
}

/* The keys' part of a layer's fused matrix, [n_head][n_nope][n_latent], as
 * [n_head][n_latent][n_nope] in w. `rows` and `turned` are room for a head's part. */
static void derive_keys(const moe_hparams *hp, const moe_tensor *fused, moe_weight *w, uint8_t *dst,
                        float *rows, float *turned)
{
    const uint64_t n_nope = w->dims[0], n_latent = w->dims[1];
    const uint64_t row_bytes = n_latent / fused->quant->block_len * fused->quant->block_bytes;
    for (uint64_t head = 0; head < w->dims[2]; head++) {
        const uint8_t *src = fused->data + head * (n_nope + hp->head_dim_v) * row_bytes;
        for (uint64_t i = 0; i < n_nope; i++)
            fused->quant->dequantize(src + i * row_bytes, rows + i * n_latent, (size_t)n_latent);
        for (uint64_t i = 0; i < n_nope; i++)
            for (uint64_t k = 0; k < n_latent; k++)
                turned[k * n_nope + i] = rows[i * n_latent + k];
        w->quant->quantize(turned, dst + head * w->matrix_bytes, (size_t)(n_nope * n_latent));
    }
}

/* The values' part as it is, for a file whose rows do not let it stay where it is. */
static void derive_values(const moe_hparams *hp, const moe_tensor *fused, const moe_weight *w,
                          uint8_t *dst)
{
    const uint64_t skipped = (hp->head_dim - hp->n_rot) * w->row_bytes;
    for (uint64_t head = 0; head < w->dims[2]; head++)
        memcpy(dst + head * w->matrix_bytes,
               fused->data + head * (skipped + w->matrix_bytes) + skipped, (size_t)w->matrix_bytes);
}

/* Describes both parts of a layer's fused matrix. That for values is a stack of every head's last
 * rows, where they are, if a view can begin there. Returns the bytes of derived memory in use;
 * `bytes` of them are taken already. */
static uint64_t derive_describe(const moe_hparams *hp, moe_layer *l, uint64_t bytes)
{
    const moe_weight *f = &l->wkv_b;
    const uint64_t n_nope = hp->head_dim - hp->n_rot, skipped = n_nope * f->row_bytes;
    const moe_quant *quant = derived_quant(f);
    l->wk_b = (moe_weight){.quant = quant,
                           .dims = {n_nope, hp->n_latent, hp->n_head},
                           .row_bytes = n_nope * quant->block_bytes,
                           .matrix_bytes = n_nope * hp->n_latent * quant->block_bytes,
                           .data = {NULL, bytes}};
    bytes = align_up(bytes + l->wk_b.matrix_bytes * hp->n_head, MEM_ALIGN);
    l->wv_b = (moe_weight){.quant = f->quant,
                           .dims = {hp->n_latent, hp->head_dim_v, hp->n_head},
                           .row_bytes = f->row_bytes,
                           .matrix_bytes = skipped + hp->head_dim_v * f->row_bytes,
                           .data = view_at(f->data, skipped)};
    if (skipped % 4 == 0 && l->wv_b.matrix_bytes % 4 == 0)
        return bytes;
    l->wv_b.matrix_bytes -= skipped;
    l->wv_b.data = (moe_view){NULL, bytes};
    return align_up(bytes + l->wv_b.matrix_bytes * hp->n_head, MEM_ALIGN);
}

/* Fills the derived memory, and lets the weights that have no place yet point into it. */
static moe_status derive_fill(moe_model *m, uint64_t bytes, float *room, moe_error *error)
{
    const moe_hparams *hp = &m->hp;
    moe_buffer **buffer = &m->buffers[m->n_buffer];
    for (uint32_t i = 0; i < hp->n_layer_all; i++) {
        moe_layer *l = &m->layers[i];
        const moe_tensor *fused = directory_tensor(m->dir, l->wkv_b.name);
        derive_keys(hp, fused, &l->wk_b, m->derived + l->wk_b.data.offset, room,
                    room + l->wk_b.dims[0] * l->wk_b.dims[1]);
        if (!l->wv_b.data.buffer)
            derive_values(hp, fused, &l->wv_b, m->derived + l->wv_b.data.offset);
    }
    moe_status status = m->backend->buffer_wrap(m->device, m->derived, bytes, buffer, error);
    if (status)
        return status;
    m->n_buffer++;
    for (uint32_t i = 0; i < hp->n_layer_all; i++) {
        m->layers[i].wk_b.data.buffer = *buffer;
        if (!m->layers[i].wv_b.data.buffer)
            m->layers[i].wv_b.data.buffer = *buffer;
    }
    return MOE_OK;
}

/* Where a file has the fused matrix, makes the part that absorbs the queries. The memory counts as
 * the model's. */
static moe_status deepseek_derive(moe_model *m, moe_error *error)
{
    const moe_hparams *hp = &m->hp;
    const uint64_t n = (uint64_t)(hp->head_dim - hp->n_rot) * hp->n_latent;
    uint64_t bytes = 0;
    if (hp->latent_split)
        return MOE_OK;
    for (uint32_t i = 0; i < hp->n_layer_all; i++) {
        moe_layer *l = &m->layers[i];
        bytes = derive_describe(hp, l, bytes);
        row_limit_raise(m->row_limits.heads, l->wk_b.quant, l->wk_b.dims[0]);
        row_limit_raise(m->row_limits.heads, l->wv_b.quant, l->wv_b.dims[0]);
    }
    float *room = mem_alloc_uncleared(&m->mem, 2 * n, sizeof *room);
    if (room)
        m->derived = mem_alloc_uncleared(&m->mem, bytes, 1);
    moe_status status = m->derived ? derive_fill(m, bytes, room, error)
                                   : fail_memory(error, &m->mem, "attn_kv_b", bytes);
    mem_free(&m->mem, room);
    return status;
}

/* ------------------------------------------------------------------------------ the layer -- */

static void deepseek_layer(moe_pass *p, uint32_t index)
{
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_embd = p->model->hp.n_embd;
    layer_norm(p, p->h, p->x, &l->attn_norm, p->n_tok, n_embd);
    layer_latent_attention(p, index, p->x, true);
    layer_norm(p, p->h, p->x, &l->ffn_norm, p->n_tok, n_embd);
    layer_mixture(p, l, p->x);
}

static const moe_config_key config_deepseek[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"mlp_bias", NULL, CONFIG_EXPECT, "false", 0},
    {"moe_layer_freq", NULL, CONFIG_EXPECT, "1", 0},
    {"topk_method", NULL, CONFIG_EXPECT, "greedy group_limited_greedy noaux_tc", 0},
    {"rope_interleave=false?rope_interleave", "rope.interleaved", CONFIG_BOOL, NULL, 0},
    {"num_hidden_layers+num_nextn_predict_layers", "block_count", CONFIG_U32, NULL, 0},
    {"num_nextn_predict_layers", "nextn_predict_layers", CONFIG_U32, NULL, 0},
    {"kv_lora_rank", "attention.kv_lora_rank", CONFIG_U32, NULL, 0},
    {"q_lora_rank", "attention.q_lora_rank", CONFIG_U32, NULL, 0},
    {"qk_nope_head_dim+qk_rope_head_dim", "attention.key_length", CONFIG_U32, NULL, 0},
    {"v_head_dim", "attention.value_length", CONFIG_U32, NULL, 0},
    {"qk_rope_head_dim", "rope.dimension_count", CONFIG_U32, NULL, 0},
    {"mlp_layer_types", "leading_dense_block_count", CONFIG_SPARSE, NULL, 0},
    {"first_k_dense_replace", "leading_dense_block_count", CONFIG_U32, NULL, 0},
    {"n_shared_experts", "expert_shared_count", CONFIG_U32, NULL, 0},
    {"topk_method!=greedy?n_group", "expert_group_count", CONFIG_U32, NULL, 0},
    {"topk_method!=greedy?topk_group", "expert_group_used_count", CONFIG_U32, NULL, 0},
    {"model_type!=deepseek_v2?norm_topk_prob", "expert_weights_norm", CONFIG_BOOL, NULL, 0},
    {"routed_scaling_factor", "expert_weights_scale", CONFIG_F32, NULL, 0},
    {"scoring_func|model_type", "expert_gating_func", CONFIG_WORD,
     "softmax=1 sigmoid=2 deepseek_v2=1 deepseek_v3=2 kimi_k2=2 glm4_moe_lite=2", 0},
    {"rope_scaling.mscale_all_dim|rope_parameters.mscale_all_dim",
     "rope.scaling.yarn_log_multiplier", CONFIG_F32, NULL, 0.1},
    {0},
};

static const moe_family family_deepseek2 = {
    "deepseek2", "deepseek_v2 deepseek_v3 kimi_k2 glm4_moe_lite", deepseek_hparams,
    {bindings_model, bindings_latent_attention, bindings_feed_forward, bindings_experts,
     bindings_shared_experts, bindings_draft, NULL},
    deepseek_layer, config_deepseek, 0, deepseek_derive,
};

#endif
