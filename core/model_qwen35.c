/* core/model_qwen35.c - Qwen3.5 and 3.6 (dense and MoE) and Qwen3-Next: three of four layers have a
 * gated delta rule in the place of attention, whose output is gated too; experts beside a shared
 * one.
 *
 * Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464. */
#ifndef MOE_CORE_MODEL_QWEN35_C
#define MOE_CORE_MODEL_QWEN35_C

#include "model_llama.c"

/* ---------------------------------------------------------------------- tables of tensors -- */

static const moe_binding bindings_qwen35_attention[] = {
    BIND_IN_LAYER("attn_norm.weight", "input_layernorm.weight", attn_norm, BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_q.weight", "self_attn.q_proj.weight", wq, BIND_ATTENTION, DIM_EMBD,
                  DIM_Q_GATED),
    BIND_IN_LAYER("attn_k.weight", "self_attn.k_proj.weight", wk, BIND_ATTENTION, DIM_EMBD, DIM_K),
    BIND_IN_LAYER("attn_v.weight", "self_attn.v_proj.weight", wv, BIND_ATTENTION, DIM_EMBD, DIM_V),
    BIND_IN_LAYER("attn_output.weight", "self_attn.o_proj.weight", wo, BIND_ATTENTION, DIM_O,
                  DIM_EMBD),
    BIND_IN_LAYER("attn_q_norm.weight", "self_attn.q_norm.weight", q_norm,
                  BIND_ATTENTION | BIND_VECTOR, DIM_HEAD),
    BIND_IN_LAYER("attn_k_norm.weight", "self_attn.k_norm.weight", k_norm,
                  BIND_ATTENTION | BIND_VECTOR, DIM_HEAD),
    BIND_IN_LAYER("post_attention_norm.weight", "post_attention_layernorm.weight", ffn_norm,
                  BIND_VECTOR, DIM_EMBD),
    BIND_IN_LAYER("attn_q.bias", "self_attn.q_proj.bias", bq,
                  BIND_ATTENTION | BIND_OPTIONAL | BIND_VECTOR, DIM_Q_GATED),
    BIND_IN_LAYER("attn_k.bias", "self_attn.k_proj.bias", bk,
                  BIND_ATTENTION | BIND_OPTIONAL | BIND_VECTOR, DIM_K),
    BIND_IN_LAYER("attn_v.bias", "self_attn.v_proj.bias", bv,
                  BIND_ATTENTION | BIND_OPTIONAL | BIND_VECTOR, DIM_V),
    BIND_IN_LAYER("attn_output.bias", "self_attn.o_proj.bias", bo,
                  BIND_ATTENTION | BIND_OPTIONAL | BIND_VECTOR, DIM_EMBD),
    BIND_END,
};

/* GGUF has the rate as the factor of the step, -exp(A_log). */
static const moe_binding bindings_delta[] = {
    BIND_IN_LAYER("ssm_conv1d.weight", "linear_attn.conv1d.weight", conv,
                  BIND_RECURRENT | BIND_VECTOR, DIM_CONV, DIM_DELTA_CONV),
    BIND_IN_LAYER("ssm_a", "linear_attn.A_log", delta_rate, BIND_RECURRENT | BIND_VECTOR,
                  DIM_DELTA_HEADS),
    BIND_IN_LAYER("ssm_dt.bias", "linear_attn.dt_bias", delta_bias, BIND_RECURRENT | BIND_VECTOR,
                  DIM_DELTA_HEADS),
    BIND_IN_LAYER("ssm_norm.weight", "linear_attn.norm.weight", delta_norm,
                  BIND_RECURRENT | BIND_VECTOR, DIM_DELTA_HEAD),
    BIND_IN_LAYER("ssm_out.weight", "linear_attn.out_proj.weight", conv_out, BIND_RECURRENT,
                  DIM_DELTA_V, DIM_EMBD),
    BIND_END,
};

static const moe_binding bindings_qwen35_delta[] = {
    BIND_IN_LAYER("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", conv_in, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_CONV),
    BIND_IN_LAYER("attn_gate.weight", "linear_attn.in_proj_z.weight", delta_z, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_V),
    BIND_IN_LAYER("ssm_alpha.weight", "linear_attn.in_proj_a.weight", delta_a, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_HEADS),
    BIND_IN_LAYER("ssm_beta.weight", "linear_attn.in_proj_b.weight", delta_b, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_HEADS),
    BIND_END,
};

/* A checkpoint has the first two in one matrix, in_proj_qkvz, key head by key head. In ssm_ba the
 * rows of b and a take turns: for each key head, those of its value heads. */
static const moe_binding bindings_qwen3next_delta[] = {
    BIND_IN_LAYER("attn_qkv.weight", "linear_attn.in_proj_qkvz.weight", conv_in, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_CONV),
    BIND_IN_LAYER("attn_gate.weight", "linear_attn.in_proj_qkvz.weight", delta_z, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_V),
    BIND_IN_LAYER("ssm_ba.weight", "linear_attn.in_proj_ba.weight", delta_ba, BIND_RECURRENT,
                  DIM_EMBD, DIM_DELTA_HEADS_2),
    BIND_END,
};

static const moe_binding bindings_dense_feed_forward[] = {
    BIND_IN_LAYER("ffn_gate.weight", "mlp.gate_proj.weight", gate, BIND_DENSE, DIM_EMBD,
                  DIM_FF),
    BIND_IN_LAYER("ffn_up.weight", "mlp.up_proj.weight", up, BIND_DENSE, DIM_EMBD, DIM_FF),
    BIND_IN_LAYER("ffn_down.weight", "mlp.down_proj.weight", down, BIND_DENSE, DIM_FF,
                  DIM_EMBD),
    BIND_END,
};

/* ------------------------------------------------------------------------ hyperparameters -- */

/* The shape of the delta rule, in the words of state-space models. */
static void qwen35_delta(moe_hparams *hp, hparam_reader *r)
{
    moe_delta_shape *d = &hp->delta;
    uint32_t inner = 0;
    hparam_u32(r, "ssm.conv_kernel", true, 1, MOE_CONV_MAX_TAP, &hp->n_conv);
    hparam_u32(r, "ssm.state_size", true, 1, MODEL_MAX_HEAD_DIM, &d->dim_k);
    hparam_u32(r, "ssm.group_count", true, 1, MODEL_MAX_HEADS, &d->n_head_k);
    hparam_u32(r, "ssm.time_step_rank", true, 1, MODEL_MAX_HEADS, &d->n_head);
    hparam_u32(r, "ssm.inner_size", true, 1, MODEL_MAX_HEADS * MODEL_MAX_HEAD_DIM, &inner);
    if (r->status)
        return;
    hparam_require(r, d->n_head % d->n_head_k == 0, "ssm.time_step_rank",
                   "expected a multiple of the %u key heads of ssm.group_count, got %u",
                   d->n_head_k, d->n_head);
    hparam_require(r, inner % d->n_head == 0 && inner / d->n_head <= MODEL_MAX_HEAD_DIM,
                   "ssm.inner_size", "expected a multiple of the %u heads of ssm.time_step_rank, "
                   "got %u", d->n_head, inner);
    d->dim_v = inner / d->n_head;
}

/* Which layers have attention: said for each, or every n-th. */
static void qwen35_layers(moe_hparams *hp, hparam_reader *r)
{
    uint32_t period = 4, list[MODEL_MAX_LAYERS];
    char buf[160];
    hparam_u32(r, "full_attention_interval", false, 1, MODEL_MAX_LAYERS, &period);
    for (uint32_t i = 0; i < hp->n_layer; i++)
        list[i] = (i + 1) % period != 0;
    if (!r->status)
        r->status = meta_u32_list(r->dir, hparam_key(r, "attention.recurrent_layers", buf), false,
                                  0, 1, list, hp->n_layer, r->error);
    for (uint32_t i = 0; i < hp->n_layer && !r->status; i++)
        if (i < hp->n_layer - hp->n_layer_draft) /* a layer that drafts has attention */
            hp->recurrent_layers[i / 32] |= list[i] << i % 32;
}

static void qwen35_hparams(moe_hparams *hp, hparam_reader *r)
{
    qwen_hparams(hp, r);
    hp->q_gated = true;
    hparam_require(r, hp->head_dim_v == hp->head_dim, "attention.value_length",
                   "expected %u, as attention.key_length, got %u", hp->head_dim, hp->head_dim_v);
    hparam_u32(r, "nextn_predict_layers", false, 0, hp->n_layer - 1, &hp->n_layer_draft);
    qwen35_delta(hp, r);
    qwen35_layers(hp, r);
    if (!r->status)
        hp->n_layer -= hp->n_layer_draft;
    hp->delta.tiled = true;
}

static void qwen35moe_hparams(moe_hparams *hp, hparam_reader *r)
{
    uint32_t n_expert = 0;
    qwen35_hparams(hp, r);
    hparam_u32(r, "expert_count", true, 1, MODEL_MAX_EXPERTS, &n_expert);
    hp->n_expert_shared = 1;
    hp->n_ff_shared = hp->n_ff;
}

static void qwen3next_hparams(moe_hparams *hp, hparam_reader *r)
{
    qwen35moe_hparams(hp, r);
    hp->delta.tiled = false;
}

/* -------------------------------------------------------------------------------- weights -- */

/* Describes the rows of b and a as matrices of their own, in derived memory. */
static void qwen3next_describe(const moe_hparams *hp, moe_layer *l, uint64_t *bytes)
{
    moe_weight *const parts[] = {&l->delta_b, &l->delta_a};
    for (size_t i = 0; i < MOE_COUNT(parts); i++) {
        *parts[i] = l->delta_ba;
        parts[i]->dims[1] = hp->delta.n_head;
        parts[i]->matrix_bytes = hp->delta.n_head * l->delta_ba.row_bytes;
        parts[i]->data = (moe_view){NULL, *bytes};
        *bytes = align_up(*bytes + parts[i]->matrix_bytes, MEM_ALIGN);
    }
}

/* Sorts the rows of ssm_ba: all of b, then all of a. */
static moe_status qwen3next_derive(moe_model *m, moe_error *error)
{
    const moe_hparams *hp = &m->hp;
    const uint32_t each = hp->delta.n_head / hp->delta.n_head_k;
    moe_buffer **buffer = &m->buffers[m->n_buffer];
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < hp->n_layer; i++)
        if (layer_is_recurrent(hp, i))
            qwen3next_describe(hp, &m->layers[i], &bytes);
    if (!(m->derived = mem_alloc_uncleared(&m->mem, bytes, 1)))
        return fail_memory(error, &m->mem, "ssm_ba", bytes);
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        const moe_layer *l = &m->layers[i];
        if (!layer_is_recurrent(hp, i))
            continue;
        const uint8_t *src = directory_tensor(m->dir, l->delta_ba.name)->data;
        for (uint32_t row = 0; row < 2 * hp->delta.n_head; row++, src += l->delta_ba.row_bytes) {
            const moe_weight *w = row / each % 2 ? &l->delta_a : &l->delta_b;
            const uint64_t to = row / each / 2 * each + row % each;
            memcpy(m->derived + w->data.offset + to * w->row_bytes, src, (size_t)w->row_bytes);
        }
    }
    moe_status status = m->backend->buffer_wrap(m->device, m->derived, bytes, buffer, error);
    if (status)
        return status;
    m->n_buffer++;
    for (uint32_t i = 0; i < hp->n_layer; i++)
        if (layer_is_recurrent(hp, i))
            m->layers[i].delta_a.data.buffer = m->layers[i].delta_b.data.buffer = *buffer;
    return MOE_OK;
}

/* ------------------------------------------------------------------------------ the layer -- */

static void qwen35_layer(moe_pass *p, uint32_t index)
{
    const moe_layer *l = &p->model->layers[index];
    const uint32_t n_embd = p->model->hp.n_embd;
    layer_norm(p, p->h, p->x, &l->attn_norm, p->n_tok, n_embd);
    if (layer_is_recurrent(&p->model->hp, index))
        layer_delta(p, index, p->x);
    else
        layer_attention(p, index, p->x, true);
    layer_norm(p, p->h, p->x, &l->ffn_norm, p->n_tok, n_embd);
    layer_mixture(p, l, p->x);
}

/* ---------------------------------------------------------------------------- config.json -- */

static const moe_config_key config_qwen35[] = {
    {"hidden_act", NULL, CONFIG_EXPECT, "silu swish", 0},
    {"model_type=qwen3_next?num_experts|model_type=qwen3_next?num_local_experts",
     "leading_dense_block_count", CONFIG_SPARSE, NULL, 0},
    {"model_type=qwen3_next?norm_topk_prob", "expert_weights_norm", CONFIG_BOOL, NULL, 0},
    {"partial_rotary_factor*head_dim|rope_parameters.partial_rotary_factor*head_dim",
     "rope.dimension_count", CONFIG_U32, NULL, 0},
    {"rope_parameters.mrope_section", "rope.dimension_sections", CONFIG_SECTIONS, NULL, 0},
    {"linear_conv_kernel_dim", "ssm.conv_kernel", CONFIG_U32, NULL, 0},
    {"linear_key_head_dim", "ssm.state_size", CONFIG_U32, NULL, 0},
    {"linear_num_key_heads", "ssm.group_count", CONFIG_U32, NULL, 0},
    {"linear_num_value_heads", "ssm.time_step_rank", CONFIG_U32, NULL, 0},
    {"linear_value_head_dim*linear_num_value_heads", "ssm.inner_size", CONFIG_U32, NULL, 0},
    {"layer_types", "attention.recurrent_layers", CONFIG_LAYERS,
     "linear_attention=1 full_attention=0", 0},
    {"full_attention_interval", "full_attention_interval", CONFIG_U32, NULL, 0},
    {"shared_expert_intermediate_size", "expert_shared_feed_forward_length", CONFIG_U32, NULL, 0},
    {"num_hidden_layers+mtp_num_hidden_layers", "block_count", CONFIG_U32, NULL, 0},
    {"mtp_num_hidden_layers", "nextn_predict_layers", CONFIG_U32, NULL, 0},
    {0},
};

static const moe_family family_qwen35 = {
    "qwen35", "qwen3_5_text", qwen35_hparams,
    {bindings_model, bindings_qwen35_attention, bindings_qwen35_delta, bindings_delta,
     bindings_dense_feed_forward, bindings_draft, NULL},
    qwen35_layer, config_qwen35, CONVERT_NORM_PLUS_1 | CONVERT_DELTA, NULL,
};

static const moe_family family_qwen35moe = {
    "qwen35moe", "qwen3_5_moe_text", qwen35moe_hparams,
    {bindings_model, bindings_qwen35_attention, bindings_qwen35_delta, bindings_delta,
     bindings_experts, bindings_gated_shared_expert, bindings_draft, NULL},
    qwen35_layer, config_qwen35, CONVERT_NORM_PLUS_1 | CONVERT_DELTA, NULL,
};

static const moe_family family_qwen3next = {
    "qwen3next", "qwen3_next", qwen3next_hparams,
    {bindings_model, bindings_qwen35_attention, bindings_qwen3next_delta, bindings_delta,
     bindings_dense_feed_forward, bindings_experts, bindings_gated_shared_expert, bindings_draft,
     NULL},
    qwen35_layer, config_qwen35, CONVERT_NORM_PLUS_1 | CONVERT_DELTA, qwen3next_derive,
};

#endif
