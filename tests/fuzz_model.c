/* tests/fuzz_model.c - models that are well-formed files with a few things changed: what opens must
 * compute, under its ceiling.
 *
 * The input is no file but a list of changes to one of the small models of tests/fixtures: a byte
 * that picks the model, one for the session's options, then six bytes for each change. So every
 * input reaches the layers, not only the reader. See fuzz.h. */
#define FUZZ_FRONT_BYTES SIZE_MAX
#include "fuzz.h"

#include "gguf_edit.h"

enum {
    FUZZ_CHANGE_BYTES = 6,
    FUZZ_MAX_CHANGES = 12,
    FUZZ_MAX_TENSOR_BYTES = 1 << 20,
    FUZZ_MAX_VOCAB = 4096,
    FUZZ_CEILING_BYTES = 1 << 28
};

static const char *const fuzz_files[] = {
    "llama-tied", "llama-yarn", "qwen2", "qwen3", "olmoe", "qwen3moe", "qwen2moe-tied",
    "gemma3", "deepseek2-groups", "deepseek3-flat", "deepseek3-mtp", "gpt-oss-mxfp4", "lfm2moe-4",
    "qwen35moe-mtp", "qwen35", "qwen3next", "gemma4", "gemma4-dense", "qwen3moe-q", "mixtral-f16"};

/* Keys that no fixture need have. */
static const char *const fuzz_keys[] = {
    "attention.key_length", "attention.value_length", "attention.scale", "attention.clamp_kqv",
    "attention.sliding_window", "attention.sliding_window_pattern", "attention.kv_lora_rank",
    "attention.q_lora_rank", "attention.shared_kv_layers", "attention.key_length_mla",
    "attention.value_length_mla", "attention.key_length_swa", "attention.value_length_swa",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "expert_count",
    "expert_used_count", "expert_group_count", "expert_group_used_count", "expert_shared_count",
    "expert_gating_func", "expert_weights_scale", "leading_dense_block_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "nextn_predict_layers",
    "final_logit_softcapping", "attn_logit_softcapping", "vocab_size", "shortconv.l_cache",
    "ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size",
    "full_attention_interval", "rope.dimension_sections"};

static const char *const fuzz_words[] = {"none", "linear", "yarn", "llama", "qwen3moe", "gemma3",
                                         "deepseek2", "gpt-oss", "qwen35", "gemma4", ""};

static const uint32_t fuzz_numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 64, 100, 255, 256,
                                        1024, 65535, 65536, 1u << 20, 1u << 31, UINT32_MAX};

static const float fuzz_floats[] = {0, 1, -1, 1e-30f, 1e30f, 0.5f, 1e6f, 16, NAN, INFINITY,
                                    -INFINITY};

/* A number near the one that is there, or one of the table. */
static uint32_t fuzz_number(uint32_t old, uint8_t pick)
{
    switch (pick % 32) {
    case 24: return old + 1;
    case 25: return old - 1;
    case 26: return old * 2;
    case 27: return old / 2;
    default: return fuzz_numbers[pick % 32 % MOE_COUNT(fuzz_numbers)];
    }
}

/* Item `at` of a key's value, which is a number or an array of numbers of four bytes. */
static void fuzz_value(edit_key *k, uint8_t at, uint8_t pick)
{
    const bool array = k->type == META_ARRAY;
    const size_t head = array ? 12 : 0, n = k->bytes < head + 4 ? 0 : (k->bytes - head) / 4;
    uint32_t type = k->type, old;
    if (array)
        memcpy(&type, k->value, 4);
    if (!n || type == META_STRING || type == META_U64)
        return;
    uint8_t *p = k->value + head + 4 * (at % n);
    memcpy(&old, p, 4);
    old = fuzz_number(old, pick);
    if (type == META_F32)
        memcpy(p, &fuzz_floats[pick % MOE_COUNT(fuzz_floats)], 4);
    else
        memcpy(p, &old, 4);
}

static void fuzz_key(gguf_edit *e, const uint8_t c[FUZZ_CHANGE_BYTES])
{
    edit_key *k = &e->key[c[1] % e->n_keys];
    char arch[32], name[96];
    switch (c[0] % 4) {
    case 0:
        if (k->type == META_STRING)
            edit_set_string(e, k->name, fuzz_words[c[3] % MOE_COUNT(fuzz_words)]);
        else
            fuzz_value(k, c[2], c[3]);
        break;
    case 1:
        snprintf(name, sizeof name, "%s", k->name);
        if (e->n_keys > 1)
            edit_drop(e, name);
        break;
    case 2:
        if (k->bytes == 4)
            k->type = c[2] % 2 ? META_F32 : META_I32;
        break;
    default:
        if (e->n_keys == EDIT_MAX_KEYS)
            break;
        edit_string(e, "general.architecture", arch, sizeof arch);
        snprintf(name, sizeof name, "%s.%s", arch, fuzz_keys[c[1] % MOE_COUNT(fuzz_keys)]);
        if (c[2] % 2)
            edit_set_u32(e, name, fuzz_number(c[4], c[3]));
        else
            edit_set_f32(e, name, fuzz_floats[c[3] % MOE_COUNT(fuzz_floats)]);
    }
}

/* Another type or shape, within reason. */
static void fuzz_reshape(edit_tensor *t, const uint8_t c[FUZZ_CHANGE_BYTES])
{
    uint64_t dims[4], bytes = 4;
    uint32_t type = c[3], n_dims = t->n_dims;
    memcpy(dims, t->dims, sizeof dims);
    if (c[0] % 2) {
        type = t->type;
        n_dims = 1 + c[5] % 4;
        dims[c[2] % 4] = fuzz_number((uint32_t)dims[c[2] % 4], c[3]);
    }
    for (uint32_t i = 0; i < n_dims; i++)
        if (dims[i] > FUZZ_MAX_TENSOR_BYTES || (bytes *= dims[i]) > FUZZ_MAX_TENSOR_BYTES)
            return;
    for (uint32_t i = n_dims; i < 4; i++)
        dims[i] = 1;
    edit_reshape(t, type, n_dims, dims);
}

static void fuzz_tensor(gguf_edit *e, const uint8_t c[FUZZ_CHANGE_BYTES])
{
    if (!e->n_tensors)
        return;
    edit_tensor *t = &e->tensor[(c[1] | c[4] << 8) % e->n_tensors];
    switch (c[0] % 4) {
    case 0:
    case 1:
        fuzz_reshape(t, c);
        break;
    case 2:
        edit_drop_tensor(e, t);
        break;
    default: // weights of all sizes, and some that are no numbers
        for (size_t i = c[2]; i + 4 <= t->bytes; i += 4 * (size_t)(1 + c[5]))
            memcpy(t->data + i, &fuzz_floats[c[3] % MOE_COUNT(fuzz_floats)], 4);
    }
}

/* The picked model with its changes; the fixtures are read once. */
static gguf_edit *fuzz_make(const uint8_t *data, size_t bytes)
{
    static gguf_edit *known[MOE_COUNT(fuzz_files)];
    char path[512];
    const size_t which = bytes ? data[0] % MOE_COUNT(fuzz_files) : 0;
    snprintf(path, sizeof path, "%s/fixtures/%s.gguf", test_root(), fuzz_files[which]);
    if (!known[which])
        known[which] = edit_read(path);
    fuzz_require(known[which] != NULL, "the fixtures are there: start it where tests/ is");
    gguf_edit *e = edit_copy(known[which]);
    size_t at = 2;
    for (size_t i = 0; i < FUZZ_MAX_CHANGES && at + FUZZ_CHANGE_BYTES <= bytes; i++) {
        if (data[at] & 0x80)
            fuzz_tensor(e, data + at);
        else
            fuzz_key(e, data + at);
        at += FUZZ_CHANGE_BYTES;
    }
    return e;
}

/* A few tokens at once, some one by one, and back. */
static void fuzz_eval(moe_model *model, uint8_t pick)
{
    static float logits[2 * FUZZ_MAX_VOCAB];
    static const moe_token tokens[9] = {1, 2, 3, 2, 3, 2, 3, 2, 3};
    moe_model_info info = {.size = sizeof info};
    moe_session_options o;
    moe_session *s = NULL;
    moe_error error = {0};
    moe_model_get_info(model, &info);
    moe_session_options_init(&o);
    o.n_ctx = 24;
    o.n_threads = 1;
    o.cache_type = (moe_cache_type)(pick % 3);
    o.n_batch = pick & 4 ? 2 : 512;
    o.draft = (moe_draft)(pick >> 3 & 3);
    o.latent = (moe_latent)(pick >> 5 & 1);
    moe_status status = moe_session_open(&s, model, &o, &error);
    fuzz_require((status == MOE_OK) == (s != NULL), "a session or an error");
    fuzz_require(!status == !error.message[0], "an error has a message");
    if (s && info.n_vocab > 3 && info.n_vocab <= FUZZ_MAX_VOCAB) {
        status = moe_session_eval(s, tokens, 9, 2, logits);
        for (size_t i = 0; i < 4 && !status; i++)
            status = moe_session_eval(s, tokens + i, 1, 1, logits);
        moe_session_rewind(s, moe_session_length(s) / 2);
        moe_session_checkpoint(s);
        if (!status)
            moe_session_eval(s, tokens, 3, 1, logits);
    }
    moe_session_close(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    gguf_edit *e = fuzz_make(data, bytes);
    size_t file_bytes;
    uint8_t *file = edit_write(e, &file_bytes);
    moe_model *model = NULL;
    moe_error error = {0};
    moe_model_options o;
    edit_free(e);
    moe_model_options_init(&o);
    o.data = file;
    o.data_bytes = file_bytes;
    o.memory_limit_bytes = FUZZ_CEILING_BYTES;
    o.isa = MOE_ISA_C;
    moe_status status = moe_model_open(&model, &o, &error);
    fuzz_require((status == MOE_OK) == (model != NULL), "a model or an error");
    fuzz_require(!status == !error.message[0], "an error has a message");
    if (model)
        fuzz_eval(model, bytes > 1 ? data[1] : 0);
    moe_model_close(model);
    free(file);
    return 0;
}
