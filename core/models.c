/* core/models.c - the table of families. */
#ifndef MOE_CORE_MODELS_C
#define MOE_CORE_MODELS_C

#include "model_deepseek.c"
#include "model_gemma.c"
#include "model_gemma4.c"
#include "model_gpt_oss.c"
#include "model_lfm2.c"
#include "model_llama.c"
#include "model_qwen35.c"

static const moe_family *const family_table[] = {
#define X(name) &family_##name,
#include "models.def"
#undef X
};

/* Keys of config.json that mean the same in all families; rope_scaling is read by the converter. */
MOE_UNUSED static const moe_config_key config_common[] = {
    {"vocab_size", "vocab_size", CONFIG_U32, NULL, 0},
    {"max_position_embeddings", "context_length", CONFIG_U32, NULL, 0},
    {"hidden_size", "embedding_length", CONFIG_U32, NULL, 0},
    {"num_hidden_layers", "block_count", CONFIG_U32, NULL, 0},
    {"intermediate_size", "feed_forward_length", CONFIG_U32, NULL, 0},
    {"num_attention_heads", "attention.head_count", CONFIG_U32, NULL, 0},
    {"num_key_value_heads", "attention.head_count_kv", CONFIG_U32, NULL, 0},
    {"head_dim", "attention.key_length", CONFIG_U32, NULL, 0},
    {"head_dim", "attention.value_length", CONFIG_U32, NULL, 0},
    {"rms_norm_eps", "attention.layer_norm_rms_epsilon", CONFIG_F32, NULL, 0},
    {"rope_theta|rope_parameters.rope_theta|rope_parameters.full_attention.rope_theta",
     "rope.freq_base", CONFIG_F32, NULL, 0},
    {"num_local_experts|num_experts|n_routed_experts", "expert_count", CONFIG_U32, NULL, 0},
    {"num_experts_per_tok", "expert_used_count", CONFIG_U32, NULL, 0},
    {"moe_intermediate_size", "expert_feed_forward_length", CONFIG_U32, NULL, 0},
    {0},
};

static const moe_family *family_by_arch(const char *arch)
{
    for (size_t i = 0; i < MOE_COUNT(family_table); i++)
        if (!strcmp(family_table[i]->arch, arch))
            return family_table[i];
    return NULL;
}

static void family_list(char *buf, size_t buf_bytes)
{
    size_t used = 0;
    for (size_t i = 0; i < MOE_COUNT(family_table) && used < buf_bytes; i++)
        used += (size_t)snprintf(buf + used, buf_bytes - used, "%s%s", i ? ", " : "",
                                 family_table[i]->arch);
}

#endif
