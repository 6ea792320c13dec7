/* tests/test_malformed_model.c - files that are well-formed GGUF but describe no sound model.
 *
 * Each case takes a valid fixture of each family, changes one thing, and expects a typed error that
 * names the key or the tensor; with no leak, within a second and 64 MiB more than the file.
 *
 * Environment: MOE_TEST_SLOW, a factor on time limits for emulators. */
#include "test.h"

#include "gguf_edit.h"

/* --------------------------------------------------------------------------------- families -- */

static const char *const family_files[] = {"llama-tied", "llama-llama3", "mixtral", "qwen2",
                                           "qwen3",      "qwen3moe",     "olmoe",   "gemma3",
                                           "qwen2moe",   "deepseek2-lite", "deepseek2-groups",
                                           "deepseek3",  "gpt-oss",      "qwen35moe",
                                           "qwen3next",  "gemma4"};

enum { N_FAMILIES = MOE_COUNT(family_files) };

typedef struct family {
    const char *file;
    char arch[32];
    gguf_edit *valid;
} family;

static family families[N_FAMILIES];

static bool families_load(void)
{
    for (size_t i = 0; i < N_FAMILIES; i++) {
        family *f = &families[i];
        char path[512];
        snprintf(path, sizeof path, "%s/fixtures/%s.gguf", test_root(), family_files[i]);
        f->file = family_files[i];
        f->valid = edit_read(path);
        if (!f->valid)
            return false;
        edit_string(f->valid, "general.architecture", f->arch, sizeof f->arch);
    }
    return true;
}

/* The name of a key of the family's, such as "llama.block_count". */
static const char *key_of(const family *f, const char *key)
{
    static char name[4][128];
    static unsigned next;
    char *text = name[next++ % 4];
    snprintf(text, sizeof name[0], "%s%s%s", strncmp(key, "general.", 8) ? f->arch : "",
             strncmp(key, "general.", 8) ? "." : "", key);
    return text;
}

static bool has_key(const family *f, const char *key)
{
    return edit_find(f->valid, key_of(f, key)) != NULL;
}

/* Whether a key has a value for each layer. */
static bool is_list(const family *f, const char *key)
{
    const edit_key *k = edit_find(f->valid, key_of(f, key));
    return k && k->type == META_ARRAY;
}

static uint32_t number_of(const family *f, const char *key)
{
    return edit_u32(f->valid, key_of(f, key));
}

/* ----------------------------------------------------------------------------------- opening -- */

typedef struct memory_count {
    uint64_t used, peak;
} memory_count;

static void *count_alloc(void *user, size_t bytes, size_t align)
{
    memory_count *m = user;
    void *p = NULL;
    if (posix_memalign(&p, align, bytes))
        return NULL;
    m->used += bytes;
    m->peak = MOE_MAX(m->peak, m->used);
    return p;
}

static void count_free(void *user, void *ptr, size_t bytes, size_t align)
{
    (void)align;
    ((memory_count *)user)->used -= bytes;
    free(ptr);
}

/* Opens the file, and if that works runs a few tokens: the status of the first step that fails, and
 * its error. */
static moe_status outcome(const gguf_edit *e, const char *what, moe_error *error)
{
    memory_count count = {0};
    moe_host host;
    moe_host_init(&host);
    host.user = &count;
    host.alloc = count_alloc;
    host.free = count_free;
    size_t bytes;
    uint8_t *data = edit_write(e, &bytes);
    moe_model_options o;
    moe_model_options_init(&o);
    o.host = &host;
    o.data = data;
    o.data_bytes = bytes;
    memset(error, 0, sizeof *error);
    const double start = test_cpu_ms();
    moe_model *model = (moe_model *)&o;
    moe_session *s = NULL;
    moe_status status = moe_model_open(&model, &o, error);
    CHECK((status == MOE_OK) == (model != NULL), "%s: *out after %s", what,
          moe_status_name(status));
    if (!status) {
        moe_session_options so;
        moe_session_options_init(&so);
        so.n_ctx = 16;
        so.n_threads = 1;
        status = moe_session_open(&s, model, &so, error);
    }
    if (!status) {
        moe_model_info info = {.size = sizeof info};
        moe_model_get_info(model, &info);
        const moe_token tokens[9] = {1, 2, 3, 5, 8, 13, 21, 34, 55};
        float *logits = edit_memory(NULL, 9 * sizeof(float) * info.n_vocab);
        status = moe_session_eval(s, tokens, 9, 9, logits);
        *error = *moe_session_error(s);
        free(logits);
    }
    moe_session_close(s);
    moe_model_close(model);
    const double ms = test_cpu_ms() - start;
    CHECK(ms < 1e3 * test_slowness(), "%s: took %.0f ms", what, ms);
    CHECK(count.used == 0, "%s: %llu bytes leaked", what, (unsigned long long)count.used);
    CHECK(count.peak < (64u << 20) + bytes, "%s: %llu bytes used", what,
          (unsigned long long)count.peak);
    free(data);
    return status;
}

/* The file must be refused, with `name` as the subject and a message of what is expected. */
static void refused_edit(const gguf_edit *e, const family *f, const char *name, const char *what)
{
    moe_error error;
    char label[256];
    snprintf(label, sizeof label, "%s: %s: %s", f->file, name, what);
    moe_status status = outcome(e, label, &error);
    CHECK(status == MOE_ERR_MODEL || status == MOE_ERR_UNSUPPORTED || status == MOE_ERR_FORMAT,
          "%s: %s: %s", label, moe_status_name(status), error.message);
    CHECK(error.status == status, "%s: the error says %s", label, moe_status_name(error.status));
    CHECK(!strcmp(error.subject, name), "%s: subject \"%s\" of \"%s\"", label, error.subject,
          error.message);
    CHECK(strstr(error.message, name), "%s: not named in \"%s\"", label, error.message);
    CHECK(strstr(error.message, "expected") || strstr(error.message, "no place"), "%s: \"%s\"",
          label, error.message);
}

/* One key changed. `value` NULL: dropped. */
static void refuse_key(const family *f, const char *key, uint32_t type, const void *value,
                       size_t bytes, const char *what)
{
    gguf_edit *e = edit_copy(f->valid);
    const char *name = key_of(f, key);
    if (value)
        edit_set(e, name, type, value, bytes);
    else
        edit_drop(e, name);
    refused_edit(e, f, name, what);
    edit_free(e);
}

static void refuse_u32(const family *f, const char *key, uint32_t value)
{
    char what[32];
    snprintf(what, sizeof what, "%u", value);
    refuse_key(f, key, META_U32, &value, 4, what);
}

static void refuse_f32(const family *f, const char *key, float value)
{
    char what[32];
    snprintf(what, sizeof what, "%g", (double)value);
    refuse_key(f, key, META_F32, &value, 4, what);
}

static void refuse_missing(const family *f, const char *key)
{
    refuse_key(f, key, 0, NULL, 0, "missing");
}

#define FOR_EACH_FAMILY(f)                                                                         \
    for (const family *f = families; f < families + N_FAMILIES && !test_failures; f++)

/* ------------------------------------------------------------------------------------ cases -- */

static void valid_files_open(void)
{
    FOR_EACH_FAMILY(f)
    {
        moe_error error;
        CHECK(outcome(f->valid, f->file, &error) == MOE_OK, "%s: %s", f->file, error.message);
    }
}

static void m1_architecture(void)
{
    FOR_EACH_FAMILY(f)
    {
        gguf_edit *e = edit_copy(f->valid);
        edit_drop(e, "general.architecture");
        refused_edit(e, f, "general.architecture", "missing");
        const char *const unknown[] = {"", "nosuch", "Llama", "llama2", "clip"};
        for (size_t i = 0; i < MOE_COUNT(unknown); i++) {
            edit_set_string(e, "general.architecture", unknown[i]);
            refused_edit(e, f, "general.architecture", unknown[i]);
        }
        edit_set_u32(e, "general.architecture", 7);
        refused_edit(e, f, "general.architecture", "a number");
        edit_free(e);
    }
    /* A name of hostile length is cut, not copied over the end. */
    gguf_edit *e = edit_copy(families[0].valid);
    char *name = edit_memory(NULL, 100001);
    memset(name, 'x', 100000);
    name[100000] = 0;
    edit_set_string(e, "general.architecture", name);
    refused_edit(e, &families[0], "general.architecture", "100000 bytes");
    free(name);
    edit_free(e);
}

static void m2_m3_block_count(void)
{
    FOR_EACH_FAMILY(f)
    {
        refuse_missing(f, "block_count");
        refuse_u32(f, "block_count", 0);
        refuse_u32(f, "block_count", 100000);
        refuse_u32(f, "block_count", UINT32_MAX);
        /* One more than there are: the first tensor of the missing layer is named. One fewer: those
         * that are left over. */
        uint32_t n = number_of(f, "block_count");
        char name[64], what[64];
        for (int more = 0; more < 2; more++) {
            gguf_edit *e = edit_copy(f->valid);
            edit_set_u32(e, key_of(f, "block_count"), more ? n + 1 : n - 1);
            moe_error error;
            snprintf(what, sizeof what, "%s: %d layers", f->file, (int)n + (more ? 1 : -1));
            CHECK(outcome(e, what, &error) != MOE_OK, "%s", what);
            snprintf(name, sizeof name, "blk.%u.", more ? n : n - 1);
            // too short for one more
            const char *list = key_of(f, "attention.sliding_window_pattern");
            CHECK(n == 1 || !strncmp(error.subject, name, strlen(name)) ||
                      (is_list(f, "attention.sliding_window_pattern") &&
                       !strcmp(error.subject, list)), "%s: \"%s\"", what, error.message);
            edit_free(e);
        }
    }
}

/* Keys that a family must have, and all the types that they cannot have. */
static void m4_wrong_types(void)
{
    static const char *const keys[] = {
        "block_count", "context_length", "embedding_length", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
        "rope.dimension_count", "expert_count", "expert_used_count", "expert_feed_forward_length",
        "attention.sliding_window", "rope.freq_base_swa"};
    FOR_EACH_FAMILY(f)
    {
        for (size_t i = 0; i < MOE_COUNT(keys); i++) {
            if (!has_key(f, keys[i]))
                continue;
            const uint8_t text[11] = {3, 0, 0, 0, 0, 0, 0, 0, '1', '2', '3'};
            const uint8_t strings[23] = {META_STRING, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
                                         3,           0, 0, 0, 0, 0, 0, 0, 'a', 'b', 'c'};
            refuse_key(f, keys[i], META_STRING, text, sizeof text, "a string");
            refuse_key(f, keys[i], META_BOOL, "\1", 1, "a bool");
            refuse_key(f, keys[i], META_ARRAY, strings, sizeof strings, "an array of strings");
            if (!strstr(keys[i], "eps") && !strstr(keys[i], "freq_base")) {
                refuse_key(f, keys[i], META_F32, &(float){2}, 4, "a float");
                refuse_key(f, keys[i], META_I32, &(int32_t){-2}, 4, "negative");
                refuse_key(f, keys[i], META_I64, &(int64_t){INT64_MIN}, 8, "most negative");
                refuse_key(f, keys[i], META_U64, &(uint64_t){(1ull << 32) + number_of(f, keys[i])},
                           8, "the same modulo 2^32");
                refuse_key(f, keys[i], META_U64, &(uint64_t){UINT64_MAX}, 8, "2^64 - 1");
            }
        }
        const char *const required[] = {"context_length", "embedding_length",
                                        "attention.head_count",
                                        "attention.layer_norm_rms_epsilon"};
        for (size_t i = 0; i < MOE_COUNT(required); i++)
            refuse_missing(f, required[i]);
    }
}

static void m5_sibling_counts(void)
{
    FOR_EACH_FAMILY(f)
    {
        uint32_t n = number_of(f, "block_count");
        if (!number_of(f, "expert_count"))
            continue;
        refuse_u32(f, "leading_dense_block_count", n + 1);
        refuse_u32(f, "leading_dense_block_count", UINT32_MAX);
    }
}

static void m6_m7_heads(void)
{
    FOR_EACH_FAMILY(f)
    {
        uint32_t n = number_of(f, "attention.head_count");
        refuse_u32(f, "attention.head_count", 0);
        refuse_u32(f, "attention.head_count", UINT32_MAX);
        refuse_u32(f, "attention.head_count_kv", 0);
        refuse_u32(f, "attention.head_count_kv", n + 1);
        refuse_u32(f, "attention.head_count_kv", UINT32_MAX);
        if (n > 2)
            refuse_u32(f, "attention.head_count_kv", n - 1);
    }
}

static void m8_short_arrays(void)
{
    static const char *const keys[] = {"attention.head_count", "attention.head_count_kv",
                                       "feed_forward_length"};
    FOR_EACH_FAMILY(f)
    {
        uint32_t n = number_of(f, "block_count"), value[64];
        for (size_t i = 0; i < MOE_COUNT(keys); i++) {
            if (is_list(f, keys[i])) // with values of its own: m8_gemma4
                continue;
            gguf_edit *e = edit_copy(f->valid);
            const char *name = key_of(f, keys[i]);
            moe_error error;
            for (uint32_t k = 0; k < 64; k++)
                value[k] = number_of(f, keys[i]);
            for (uint32_t have = 0; have < n; have++) {
                edit_set_array(e, name, META_U32, value, have, 4 * have);
                refused_edit(e, f, name, "short array");
            }
            edit_set_array(e, name, META_U32, value, n, 4 * n); // the control: one for each layer
            CHECK(outcome(e, name, &error) == MOE_OK, "%s: %s: %s", f->file, name, error.message);
            value[n - 1] = UINT32_MAX; // all items are looked at
            edit_set_array(e, name, META_U32, value, n, 4 * n);
            refused_edit(e, f, name, "2^32 - 1 in the last item");
            edit_free(e);
        }
    }
}

static void m9_heads_do_not_divide(void)
{
    FOR_EACH_FAMILY(f)
    {
        gguf_edit *e = edit_copy(f->valid);
        uint32_t n_embd = number_of(f, "embedding_length"), n = 2;
        edit_drop(e, key_of(f, "attention.key_length"));
        edit_drop(e, key_of(f, "attention.value_length"));
        while (n_embd % n == 0)
            n++;
        edit_set_u32(e, key_of(f, "attention.head_count"), n);
        edit_set_u32(e, key_of(f, "attention.head_count_kv"), 1);
        refused_edit(e, f, key_of(f, "attention.head_count"), "does not divide");
        edit_free(e);
    }
}

static void m10_rope_dimensions(void)
{
    FOR_EACH_FAMILY(f)
    {
        uint32_t dim = number_of(f, "attention.key_length");
        dim = dim ? dim : number_of(f, "embedding_length") / number_of(f, "attention.head_count");
        refuse_u32(f, "rope.dimension_count", 0);
        refuse_u32(f, "rope.dimension_count", 1);
        refuse_u32(f, "rope.dimension_count", dim - 1);
        refuse_u32(f, "rope.dimension_count", dim + 2);
        refuse_u32(f, "rope.dimension_count", UINT32_MAX);
    }
}

static void m11_m12_floats(void)
{
    static const char *const scaling[] = {"rope.scaling.factor", "rope.scaling.attn_factor",
                                          "rope.scaling.yarn_beta_fast",
                                          "rope.scaling.yarn_beta_slow"};
    FOR_EACH_FAMILY(f)
    {
        const float bad[] = {0, NAN, INFINITY, -INFINITY, -1};
        for (size_t i = 0; i < MOE_COUNT(bad); i++) {
            refuse_f32(f, "rope.freq_base", bad[i]);
            if (i > 0)
                refuse_f32(f, "attention.layer_norm_rms_epsilon", bad[i]);
            gguf_edit *e = edit_copy(f->valid);
            edit_set_string(e, key_of(f, "rope.scaling.type"), "yarn");
            edit_set_f32(e, key_of(f, "rope.scaling.factor"), 4);
            for (size_t k = 0; k < MOE_COUNT(scaling); k++) {
                gguf_edit *one = edit_copy(e);
                edit_set_f32(one, key_of(f, scaling[k]), bad[i]);
                refused_edit(one, f, key_of(f, scaling[k]), "not a sound number");
                edit_free(one);
            }
            edit_free(e);
        }
        gguf_edit *e = edit_copy(f->valid);
        edit_set_string(e, key_of(f, "rope.scaling.type"), "magic");
        refused_edit(e, f, key_of(f, "rope.scaling.type"), "unknown");
        edit_free(e);
    }
}

static void m13_m15_experts(void)
{
    FOR_EACH_FAMILY(f)
    {
        uint32_t n = number_of(f, "expert_count");
        if (!n) {
            refuse_u32(f, "expert_count", UINT32_MAX);
            continue;
        }
        refuse_missing(f, "expert_used_count");
        refuse_u32(f, "expert_used_count", 0);
        refuse_u32(f, "expert_used_count", n + 1);
        refuse_u32(f, "expert_used_count", UINT32_MAX);
        refuse_u32(f, "expert_count", 1u << 20);
        refuse_u32(f, "expert_count", UINT32_MAX);
        if (has_key(f, "expert_feed_forward_length")) {
            refuse_u32(f, "expert_feed_forward_length", 0);
            refuse_u32(f, "expert_feed_forward_length", UINT32_MAX);
        }
        if (has_key(f, "feed_forward_length"))
            refuse_u32(f, "feed_forward_length", UINT32_MAX);
    }
}

/* Groups of experts, shared experts, and how logits become scores. */
static void m13_m15_groups_and_shared(void)
{
    uint32_t n_grouped = 0, n_with_shared = 0;
    FOR_EACH_FAMILY(f)
    {
        const uint32_t n = number_of(f, "expert_count");
        if (!n)
            continue;
        refuse_u32(f, "expert_gating_func", 4);
        refuse_u32(f, "expert_gating_func", UINT32_MAX);
        refuse_u32(f, "expert_group_count", 257);
        refuse_u32(f, "expert_group_count", UINT32_MAX);
        refuse_u32(f, "expert_group_count", n + 1);
        refuse_f32(f, "expert_weights_scale", NAN);
        refuse_f32(f, "expert_weights_scale", INFINITY);
        refuse_u32(f, "expert_shared_count", UINT32_MAX);
        if (!strcmp(f->arch, "olmoe"))
            refuse_f32(f, "attention.clamp_kqv", 0.5f); // it is not computed
        refuse_u32(f, "leading_dense_block_count", UINT32_MAX);
        if (has_key(f, "expert_shared_feed_forward_length") || has_key(f, "expert_shared_count")) {
            refuse_u32(f, "expert_shared_feed_forward_length", 0);
            refuse_u32(f, "expert_shared_feed_forward_length", UINT32_MAX);
            n_with_shared++;
        }
        const uint32_t n_group = number_of(f, "expert_group_count");
        if (n_group < 2)
            continue;
        const uint32_t size = n / n_group, groups = number_of(f, "expert_group_used_count");
        n_grouped++;
        refuse_u32(f, "expert_group_count", n - 1);
        refuse_missing(f, "expert_group_used_count");
        refuse_u32(f, "expert_group_used_count", 0);
        refuse_u32(f, "expert_group_used_count", n_group + 1);
        refuse_u32(f, "expert_used_count", groups * size + 1);
    }
    CHECK(n_grouped >= 2 && n_with_shared >= 4, "%u, %u", n_grouped, n_with_shared);
}

/* Latent attention: its lengths, and what else the file says about them. */
static void m6_m10_latent_attention(void)
{
    uint32_t n_split = 0, n_fused = 0;
    FOR_EACH_FAMILY(f)
    {
        const uint32_t n_latent = number_of(f, "attention.kv_lora_rank");
        const uint32_t n_rot = number_of(f, "rope.dimension_count");
        if (!n_latent)
            continue;
        refuse_missing(f, "attention.kv_lora_rank");
        refuse_u32(f, "attention.kv_lora_rank", 0);
        refuse_u32(f, "attention.kv_lora_rank", 2049 - n_rot);
        refuse_u32(f, "attention.kv_lora_rank", UINT32_MAX);
        gguf_edit *direct = edit_copy(f->valid); /* 0 is as if it were not there */
        moe_error error;
        edit_set_u32(direct, key_of(f, "attention.q_lora_rank"), 0);
        if (number_of(f, "attention.q_lora_rank"))
            refused_edit(direct, f, "blk.0.attn_q.weight", "queries without a latent");
        else
            CHECK(outcome(direct, "no latent", &error) == MOE_OK, "%s", error.message);
        edit_free(direct);
        refuse_u32(f, "attention.q_lora_rank", UINT32_MAX);
        refuse_missing(f, "rope.dimension_count");
        refuse_f32(f, "rope.scaling.yarn_log_multiplier", -0.1f);
        refuse_f32(f, "rope.scaling.yarn_log_multiplier", NAN);
        refuse_f32(f, "rope.scaling.yarn_log_multiplier", INFINITY);
        refuse_u32(f, "attention.head_count_kv", 2);
        refuse_u32(f, "nextn_predict_layers", number_of(f, "block_count"));
        refuse_u32(f, "nextn_predict_layers", UINT32_MAX);
        if (has_key(f, "attention.key_length_mla")) {
            refuse_missing(f, "attention.value_length_mla");
            refuse_u32(f, "attention.key_length", n_latent + n_rot + 1);
            refuse_u32(f, "attention.value_length", n_latent - 1);
            refuse_u32(f, "attention.value_length_mla", 0);
            refuse_u32(f, "attention.value_length_mla", 4096);
            refuse_u32(f, "attention.key_length_mla", 0);
            refuse_u32(f, "attention.key_length_mla", 4096);
            gguf_edit *e = edit_copy(f->valid); // nothing left that is not rotated
            edit_set_u32(e, key_of(f, "attention.key_length_mla"), n_rot);
            refused_edit(e, f, key_of(f, "rope.dimension_count"), "all of a head");
            edit_free(e);
            n_split++;
        } else {
            refuse_u32(f, "rope.dimension_count", number_of(f, "attention.key_length"));
            n_fused++;
        }
    }
    CHECK(n_split >= 2 && n_fused >= 1, "%u, %u", n_split, n_fused);
}

/* Layers with a convolution instead of attention: which they are, and how far it looks. */
static void m6_m8_convolutions(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/fixtures/lfm2moe.gguf", test_root());
    const family lfm2 = {.file = "lfm2moe", .arch = "lfm2moe", .valid = edit_read(path)};
    const family *f = &lfm2;
    const char *heads = "lfm2moe.attention.head_count_kv";
    REQUIRE(f->valid, "no fixture");
    moe_error error;
    CHECK(outcome(f->valid, f->file, &error) == MOE_OK, "%s", error.message);
    refuse_missing(f, "shortconv.l_cache");
    refuse_u32(f, "shortconv.l_cache", 0);
    refuse_u32(f, "shortconv.l_cache", 65);
    refuse_u32(f, "shortconv.l_cache", UINT32_MAX);
    refuse_u32(f, "attention.head_count_kv", 0);
    const uint32_t lists[][4] = {{0, 0, 0, 0}, {0, 2, 0, 0}, {0, 6, 0, 0}, {1, 5, 0, 0}};
    gguf_edit *e = edit_copy(f->valid);
    for (size_t i = 0; i < MOE_COUNT(lists); i++) {
        edit_set_array(e, heads, META_U32, lists[i], 4, 16);
        refused_edit(e, f, heads, "a list that does not fit");
    }
    const uint32_t fewer[] = {0, 0, 0, 1}; // another layer has attention: its tensors are missing
    edit_set_array(e, heads, META_U32, fewer, 4, 16);
    CHECK(outcome(e, "another layer", &error) == MOE_ERR_MODEL &&
              strstr(error.subject, "blk.3.attn"), "%s", error.message);
    edit_free(e);
    for (size_t i = 0; i < f->valid->n_tensors; i++) {
        e = edit_copy(f->valid);
        edit_tensor *t = &e->tensor[i];
        char name[64];
        snprintf(name, sizeof name, "%s", t->name);
        const uint64_t longer[4] = {t->dims[0] + 1, t->dims[1], t->dims[2], t->dims[3]};
        edit_reshape(t, 0, t->n_dims, longer);
        refused_edit(e, f, name, "longer rows");
        edit_drop_tensor(e, edit_find_tensor(e, name));
        refused_edit(e, f, name, "missing");
        edit_free(e);
    }
    /* A family without convolutions. */
    const uint32_t none[] = {1, 0, 1};
    e = edit_copy(families[0].valid);
    edit_set_array(e, key_of(&families[0], "attention.head_count_kv"), META_U32, none, 3, 12);
    refused_edit(e, &families[0], key_of(&families[0], "attention.head_count_kv"), "0 in a layer");
    edit_free(e);
    edit_free(f->valid);
}

/* The shape of a delta rule, and which layers have it. */
static void m6_m8_delta_rule(void)
{
    uint32_t n = 0;
    FOR_EACH_FAMILY(f)
    {
        static const char *const keys[] = {"ssm.conv_kernel", "ssm.state_size", "ssm.group_count",
                                           "ssm.time_step_rank", "ssm.inner_size"};
        if (!has_key(f, keys[0]))
            continue;
        n++;
        for (size_t i = 0; i < MOE_COUNT(keys); i++) {
            refuse_missing(f, keys[i]);
            refuse_u32(f, keys[i], 0);
            refuse_u32(f, keys[i], UINT32_MAX);
        }
        refuse_u32(f, "ssm.conv_kernel", 65);
        refuse_u32(f, "ssm.time_step_rank", number_of(f, "ssm.group_count") + 1);
        refuse_u32(f, "ssm.inner_size", number_of(f, "ssm.inner_size") + 1);
        refuse_u32(f, "full_attention_interval", 0);
        refuse_u32(f, "expert_count", 0);
        refuse_u32(f, "attention.value_length", number_of(f, "attention.value_length") + 2);
        refuse_u32(f, "nextn_predict_layers", number_of(f, "block_count"));
        moe_error error;
        gguf_edit *e = edit_copy(f->valid);
        const char *layers = key_of(f, "attention.recurrent_layers");
        const uint32_t lists[][4] = {{1, 1, 2, 0}, {1, 1, 1, UINT32_MAX}};
        for (size_t i = 0; i < MOE_COUNT(lists); i++) {
            edit_set_array(e, layers, META_U32, lists[i], 4, 16);
            refused_edit(e, f, layers, "neither recurrent nor not");
        }
        edit_set_array(e, layers, META_U32, lists[0], 2, 8);
        refused_edit(e, f, layers, "too short a list");
        const uint32_t other[] = {1, 0, 1, 0}, same[] = {1, 1, 1, 0};
        edit_set_array(e, layers, META_U32, same, 4, 16);
        CHECK(outcome(e, "the same layers", &error) == MOE_OK, "%s", error.message);
        edit_set_array(e, layers, META_U32, other, 4, 16);
        CHECK(outcome(e, "another layer", &error) == MOE_ERR_MODEL &&
                  strstr(error.subject, "blk.1.attn"), "%s", error.message);
        edit_free(e);
    }
    CHECK(n == 2, "%u", n);
}

/* Heads that differ by layer; what stands in for what. */
static void m8_gemma4(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/fixtures/gemma4.gguf", test_root());
    const family gemma = {.file = "gemma4", .arch = "gemma4", .valid = edit_read(path)};
    const family *f = &gemma;
    REQUIRE(f->valid, "no fixture");
    const uint32_t n = number_of(f, "attention.key_length_swa");
    refuse_u32(f, "attention.key_length_swa", UINT32_MAX);
    refuse_u32(f, "attention.value_length_swa", n + 2);
    refuse_u32(f, "attention.value_length", n);
    refuse_u32(f, "rope.dimension_count_swa", n + 2);
    refuse_u32(f, "rope.dimension_count_swa", 3);
    refuse_u32(f, "embedding_length_per_layer_input", 8);
    refuse_u32(f, "attention.shared_kv_layers", 1);
    refuse_u32(f, "feed_forward_length", 0);
    refuse_missing(f, "attention.sliding_window");
    refuse_u32(f, "attention.sliding_window", 0);
    gguf_edit *e = edit_copy(f->valid);
    const char *heads = "gemma4.attention.head_count_kv";
    const uint32_t lists[][4] = {{2, 4, 1, 1}, {2, 2, 1, 2}, {3, 3, 1, 1}, {2, 2, 3, 3}};
    for (size_t i = 0; i < MOE_COUNT(lists); i++) {
        edit_set_array(e, heads, META_U32, lists[i], 4, 16);
        refused_edit(e, f, heads, "heads of layers of one kind that differ, or do not divide");
    }
    edit_free(e);
    e = edit_copy(f->valid);
    const uint64_t half[3] = {number_of(f, "embedding_length"),
                              number_of(f, "expert_feed_forward_length"),
                              number_of(f, "expert_count")};
    edit_add_tensor(e, "blk.1.ffn_gate_exps.weight", "F32", 3, half);
    refused_edit(e, f, "blk.1.ffn_gate_up_exps.weight", "both forms");
    edit_drop_tensor(e, edit_find_tensor(e, "blk.1.ffn_gate_up_exps.weight"));
    refused_edit(e, f, "blk.1.ffn_up_exps.weight", "one of two");
    edit_add_tensor(e, "blk.1.ffn_up_exps.weight", "F32", 3, half);
    moe_error error;
    CHECK(outcome(e, "apart", &error) == MOE_OK, "%s", error.message);
    edit_free(e);
    edit_free(f->valid);
}

/* The last layers may be there to draft tokens only: the model is the one without them. The first
 * of them drafts if it is whole. */
static void draft_layers_are_not_of_the_model(void)
{
    FOR_EACH_FAMILY(f)
    {
        moe_error error;
        if (!has_key(f, "attention.kv_lora_rank") && !has_key(f, "ssm.state_size"))
            continue;
        gguf_edit *e = edit_copy(f->valid);
        char extra[64];
        const uint32_t n = number_of(f, "block_count");
        edit_set_u32(e, key_of(f, "nextn_predict_layers"), 1);
        snprintf(extra, sizeof extra, "blk.%u.nextn.hnorm.weight", n - 1);
        edit_add_tensor(e, extra, "F32", 1, (uint64_t[]){8});
        CHECK(outcome(e, "part of a draft layer", &error) == MOE_OK, "%s: %s", f->file,
              error.message);
        gguf_edit *more = edit_copy(e);
        snprintf(extra, sizeof extra, "blk.%u.nextn.eh_proj.weight", n);
        edit_add_tensor(more, extra, "F32", 1, (uint64_t[]){8});
        refused_edit(more, f, extra, "behind the draft layers");
        edit_free(more);
        snprintf(extra, sizeof extra, "blk.%u.nextn.eh_proj.weight", n - 1);
        edit_add_tensor(e, extra, "F32", 1, (uint64_t[]){8});
        snprintf(extra, sizeof extra, "blk.%u.nextn.enorm.weight", n - 1);
        refused_edit(e, f, extra, "a draft layer that is not whole");
        edit_free(e);
    }
}

static void m5_sliding_window(void)
{
    FOR_EACH_FAMILY(f)
    {
        if (!has_key(f, "attention.sliding_window") || !strcmp(f->arch, "gemma4"))
            continue;
        refuse_u32(f, "attention.sliding_window", UINT32_MAX);
        refuse_u32(f, "attention.sliding_window_pattern", UINT32_MAX);
        if (strcmp(f->arch, "gpt-oss"))
            continue;
        refuse_missing(f, "attention.sliding_window");
        refuse_u32(f, "attention.sliding_window", 0);
        refuse_missing(f, "expert_count");
        refuse_u32(f, "expert_count", 0);
    }
}

/* The file must open, and its model have this in a field of its hyperparameters. */
static void expect_hparam(const gguf_edit *e, const char *key, size_t field, const void *value,
                          size_t value_bytes)
{
    moe_model_options o;
    moe_model *model;
    moe_error error = {0};
    size_t bytes;
    uint8_t *data = edit_write(e, &bytes);
    moe_model_options_init(&o);
    o.data = data;
    o.data_bytes = bytes;
    CHECK(!moe_model_open(&model, &o, &error), "%s: %s", key, error.message);
    if (model && field != SIZE_MAX)
        CHECK(!memcmp((const char *)&model->hp + field, value, value_bytes), "%s", key);
    moe_model_close(model);
    free(data);
}

/* Keys that most files do not have: they do what they say, and wrong ones are refused. */
static void keys_that_are_rare(void)
{
    static const struct {
        const char *file, *key;
        uint32_t type;     // META_U32, META_F32 or META_BOOL
        double value, bad; // bad: that is refused
        size_t field;      // of moe_hparams
    } cases[] = {
        {"gpt-oss", "feed_forward.swiglu_alpha", META_F32, 1.25, 2e6,
         offsetof(moe_hparams, glu_alpha)},
        {"gpt-oss", "feed_forward.swiglu_limit", META_F32, 3.5, -1,
         offsetof(moe_hparams, glu_limit)},
        {"qwen3", "attention.sliding_window", META_U32, 24, UINT32_MAX,
         offsetof(moe_hparams, window)},
        {"qwen3moe", "attention.sliding_window_pattern", META_U32, 2, UINT32_MAX,
         offsetof(moe_hparams, window_period)},
        {"llama-tied", "attention.sliding_window", META_U32, 24, UINT32_MAX,
         offsetof(moe_hparams, window)},
        {"lfm2moe", "expert_selection_bias", META_BOOL, 1, -1, offsetof(moe_hparams, choice_bias)},
        {"olmoe", "attention.clamp_kqv", META_F32, 0, 8, SIZE_MAX},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/fixtures/%s.gguf", test_root(), cases[i].file);
        family f = {.file = cases[i].file, .valid = edit_read(path)};
        REQUIRE(f.valid, "%s", path);
        edit_string(f.valid, "general.architecture", f.arch, sizeof f.arch);
        const uint32_t type = cases[i].type, n_bytes = type == META_BOOL ? 1 : 4;
        const float number = (float)cases[i].value, bad_number = (float)cases[i].bad;
        const uint32_t count = (uint32_t)cases[i].value;
        const void *value = type == META_F32 ? (const void *)&number : &count;
        edit_set(f.valid, key_of(&f, cases[i].key), type, value, n_bytes);
        expect_hparam(f.valid, cases[i].key, cases[i].field, value, n_bytes);
        if (type == META_F32)
            refuse_f32(&f, cases[i].key, bad_number);
        else // a truth value is no number
            refuse_u32(&f, cases[i].key, type == META_BOOL ? 1 : (uint32_t)cases[i].bad);
        edit_free(f.valid);
    }
}

/* Gives a file more layers, each a copy of one of those that it has, in turn. */
static void extend_layers(gguf_edit *e, const char *arch, uint32_t n_had, uint32_t n_layer)
{
    char key[128], name[64];
    const size_t n_tensors = e->n_tensors;
    snprintf(key, sizeof key, "%s.block_count", arch);
    edit_set_u32(e, key, n_layer);
    for (uint32_t i = n_had; i < n_layer; i++)
        for (size_t k = 0; k < n_tensors; k++) {
            uint32_t layer;
            const edit_tensor *t = &e->tensor[k];
            if (sscanf(t->name, "blk.%u.", &layer) != 1 || layer != i % n_had)
                continue;
            snprintf(name, sizeof name, "blk.%u%s", i, strchr(t->name + 4, '.'));
            edit_tensor *copy = edit_add_tensor(e, name, quant_by_id(t->type)->name, t->n_dims,
                                                t->dims);
            memcpy(copy->data, t->data, t->bytes);
        }
}

/* Lists of what each layer is, where there are more layers than a word has bits. */
static void lists_of_many_layers_are_kept(void)
{
    enum { N_LAYER = 38 };
    static const char *const files[] = {"lfm2moe-4", "llama-tied"};
    static const char *const keys[] = {"lfm2moe.attention.head_count_kv",
                                       "llama.attention.sliding_window_pattern"};
    for (size_t i = 0; i < MOE_COUNT(files); i++) {
        char path[512], arch[32];
        uint32_t list[N_LAYER], want[MODEL_MAX_LAYERS / 32] = {0};
        snprintf(path, sizeof path, "%s/fixtures/%s.gguf", test_root(), files[i]);
        gguf_edit *e = edit_read(path);
        REQUIRE(e, "%s", path);
        edit_string(e, "general.architecture", arch, sizeof arch);
        extend_layers(e, arch, 3, N_LAYER);
        for (uint32_t k = 0; k < N_LAYER; k++) { // a convolution or not; local or not
            list[k] = i == 0 ? (k % 3 == 1) * 3u : k % 5 < 2;
            want[k / 32] |= (uint32_t)(i == 0 ? !list[k] : list[k]) << k % 32;
        }
        edit_set_array(e, keys[i], META_U32, list, N_LAYER, sizeof list);
        if (i == 1)
            edit_set_u32(e, "llama.attention.sliding_window", 8);
        expect_hparam(e, keys[i], i == 0 ? offsetof(moe_hparams, recurrent_layers)
                                         : offsetof(moe_hparams, local_layers), want, sizeof want);
        edit_free(e);
    }
}

/* The least that a model can have of something. */
static void one_head_is_enough(void)
{
    char path[512];
    const uint32_t one = 1;
    snprintf(path, sizeof path, "%s/fixtures/llama-tied.gguf", test_root());
    gguf_edit *e = edit_read(path);
    REQUIRE(e, "%s", path);
    edit_set_u32(e, "llama.attention.head_count", 1);
    for (size_t i = 0; i < e->n_tensors; i++) {
        edit_tensor *t = &e->tensor[i];
        if (strstr(t->name, "attn_q.weight"))
            edit_reshape(t, t->type, 2, (uint64_t[]){42, 12});
        if (strstr(t->name, "attn_output.weight"))
            edit_reshape(t, t->type, 2, (uint64_t[]){12, 42});
    }
    expect_hparam(e, "llama.attention.head_count", offsetof(moe_hparams, n_head), &one, sizeof one);
    edit_free(e);
}

static void m16_context_length(void)
{
    FOR_EACH_FAMILY(f)
    {
        refuse_u32(f, "context_length", 0);
        refuse_u32(f, "context_length", UINT32_MAX);
        /* The longest that a file may claim: a session of a modest length opens. */
        gguf_edit *e = edit_copy(f->valid);
        edit_set_u32(e, key_of(f, "context_length"), 1u << 30);
        moe_error error;
        CHECK(outcome(e, f->file, &error) == MOE_OK, "%s", error.message);
        edit_free(e);
    }
}

static void m17_vocabulary(void)
{
    FOR_EACH_FAMILY(f)
    {
        for (int more = 0; more < 2; more++) {
            gguf_edit *e = edit_copy(f->valid);
            edit_tensor *t = edit_find_tensor(e, "token_embd.weight");
            t->dims[1] = more ? t->dims[1] + 1 : t->dims[1] - 1;
            edit_reshape(t, t->type, t->n_dims, t->dims);
            t = edit_find_tensor(e, "output.weight");
            moe_error error;
            moe_status status = outcome(e, f->file, &error);
            if (t) // rows of the two no longer agree
                CHECK(status == MOE_ERR_MODEL && !strcmp(error.subject, "output.weight"), "%s: %s",
                      f->file, error.message);
            edit_free(e);
        }
        gguf_edit *e = edit_copy(f->valid);
        edit_tensor *t = edit_find_tensor(e, "token_embd.weight");
        uint64_t huge[4] = {t->dims[0], 1, 1, 1};
        edit_reshape(t, t->type, 1, huge);
        refused_edit(e, f, "token_embd.weight", "one dimension");
        edit_free(e);
    }
}

static bool may_be_missing(const family *f, const char *name)
{
    return !strcmp(name, "output.weight") || !strcmp(name, "rope_freqs.weight") ||
           (strstr(name, ".bias") && !strcmp(f->arch, "llama"));
}

static void m18_missing_tensors(void)
{
    FOR_EACH_FAMILY(f)
    {
        for (size_t i = 0; i < f->valid->n_tensors; i++) {
            gguf_edit *e = edit_copy(f->valid);
            char name[64];
            moe_error error;
            snprintf(name, sizeof name, "%s", e->tensor[i].name);
            edit_drop_tensor(e, &e->tensor[i]);
            if (may_be_missing(f, name))
                CHECK(outcome(e, name, &error) == MOE_OK, "%s: %s", name, error.message);
            else
                refused_edit(e, f, name, "missing");
            edit_free(e);
        }
        gguf_edit *e = edit_copy(f->valid);
        edit_add_tensor(e, "blk.0.attn_mystery.weight", "F32", 1, (uint64_t[]){8});
        refused_edit(e, f, "blk.0.attn_mystery.weight", "unknown");
        edit_free(e);
    }
}

/* Each tensor with a shape that is wrong in each of several ways. */
static void m19_wrong_shapes(void)
{
    FOR_EACH_FAMILY(f)
    {
        for (size_t i = 0; i < f->valid->n_tensors; i++) {
            const edit_tensor *t = &f->valid->tensor[i];
            const uint32_t n = t->n_dims;
            for (int how = 0; how < 5; how++) {
                uint64_t dims[4] = {t->dims[0], t->dims[1], t->dims[2], t->dims[3]};
                uint32_t n_dims = n;
                const char *what = "";
                switch (how) {
                case 0: what = "longer rows", dims[0] += 1; break;
                case 1: what = "one more of the last", dims[n - 1] += 1; break;
                case 2: what = "one dimension more", dims[n_dims++] = 2; break;
                case 3: what = "transposed", dims[0] = t->dims[1], dims[1] = t->dims[0]; break;
                default: what = "a single number", n_dims = 1, dims[0] = 1; break;
                }
                /* The number of tokens is what the embedding says. */
                bool same = (how == 3 && (n == 1 || dims[0] == dims[1])) ||
                            (how == 4 && n == 1 && t->dims[0] == 1);
                bool vocabulary = !strcmp(t->name, "token_embd.weight") && how == 1;
                if (same || vocabulary || n_dims > 4)
                    continue;
                gguf_edit *e = edit_copy(f->valid);
                edit_reshape(&e->tensor[i], 0, n_dims, dims); // as F32, so that any row is whole
                if (!strcmp(t->name, "token_embd.weight") && how == 3)
                    edit_drop_tensor(e, edit_find_tensor(e, "output.weight")
                                            ? edit_find_tensor(e, "output.weight")
                                            : &e->tensor[i]);
                refused_edit(e, f, t->name, what);
                edit_free(e);
            }
        }
    }
}

/* Norms and biases must be floats; matrices may be of any type that can be read. */
static void m20_wrong_types(void)
{
    FOR_EACH_FAMILY(f)
    {
        uint32_t n_vectors = 0;
        for (size_t i = 0; i < f->valid->n_tensors; i++) {
            const edit_tensor *t = &f->valid->tensor[i];
            gguf_edit *e = edit_copy(f->valid);
            edit_tensor *changed = &e->tensor[i];
            const uint32_t unknown[] = {4, 5, 24, 27, 31, 77, UINT32_MAX}; // removed, integer, none
            for (size_t k = 0; k < MOE_COUNT(unknown); k++) {
                changed->type = unknown[k];
                refused_edit(e, f, t->name, "a type that cannot be computed with");
            }
            edit_free(e);
            n_vectors += t->n_dims == 1;
        }
        CHECK(n_vectors > 0, "no vectors");
    }
    /* Q8_0 for a norm of 32 elements, in a model that is sound otherwise. */
    gguf_edit *e = edit_copy(families[0].valid);
    const family *f = &families[0];
    const uint32_t n_embd = number_of(f, "embedding_length");
    for (size_t i = 0; i < e->n_tensors; i++) { // widen the model to 64, all with F32
        edit_tensor *t = &e->tensor[i];
        uint64_t dims[4];
        for (int k = 0; k < 4; k++)
            dims[k] = t->dims[k] == n_embd ? 64 : t->dims[k];
        edit_reshape(t, t->type, t->n_dims, dims);
    }
    edit_set_u32(e, key_of(f, "embedding_length"), 64);
    moe_error error;
    moe_status status = outcome(e, "widened", &error);
    CHECK(status == MOE_OK, "%s", error.message);
    edit_tensor *norm = edit_find_tensor(e, "blk.0.attn_norm.weight");
    edit_reshape(norm, quant_by_name("Q8_0")->id, 1, (uint64_t[]){64});
    refused_edit(e, f, "blk.0.attn_norm.weight", "Q8_0 norm");
    edit_free(e);
}

/* NaN and infinities in the weights. Those in norms are found when the file is opened, others when
 * a result shows it: then the weight is named. Nothing may be read or written out of place. */
static void m21_weights_are_not_numbers(void)
{
    const uint32_t patterns[] = {0x7fc00000, 0x7f800000, 0xff800000, 0xffffffff};
    FOR_EACH_FAMILY(f)
    {
        for (size_t i = 0; i < f->valid->n_tensors; i++) {
            for (size_t p = 0; p < MOE_COUNT(patterns); p++) {
                gguf_edit *e = edit_copy(f->valid);
                edit_tensor *t = &e->tensor[i];
                for (size_t at = 0; at + 4 <= t->bytes; at += 4)
                    memcpy(t->data + at, &patterns[p], 4);
                refused_edit(e, f, t->name, "not numbers");
                edit_free(e);
            }
        }
    }
}

/* The same in the scales of blocks, where the type has other places for them. */
static void m21_scales_are_not_numbers(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/fixtures/qwen3moe-q.gguf", test_root());
    family f = {.file = "qwen3moe-q", .arch = "qwen3moe", .valid = edit_read(path)};
    REQUIRE(f.valid, "no fixture");
    uint32_t n_tried = 0;
    for (size_t i = 0; i < f.valid->n_tensors; i++) {
        gguf_edit *e = edit_copy(f.valid);
        edit_tensor *t = &e->tensor[i];
        const moe_quant *quant = quant_by_id(t->type);
        if (quant->block_len > 1) {
            for (size_t at = 0; at < t->bytes; at += quant->block_bytes)
                memcpy(t->data + at, &(uint16_t){0x7e00}, 2);
            refused_edit(e, &f, t->name, "NaN in the scales");
            n_tried++;
        }
        edit_free(e);
    }
    CHECK(n_tried > 8, "%u quantized tensors", n_tried);
    edit_free(f.valid);
}

/* Divisors of the rotary frequencies: too few, none, zero, negative. */
static void m22_rope_factors(void)
{
    const family *f = NULL;
    for (size_t i = 0; i < N_FAMILIES; i++)
        if (edit_find_tensor(families[i].valid, "rope_freqs.weight"))
            f = &families[i];
    REQUIRE(f, "no fixture with rope_freqs.weight");
    const uint64_t n = edit_find_tensor(f->valid, "rope_freqs.weight")->dims[0];
    for (uint64_t have = 1; have < n; have++) {
        gguf_edit *e = edit_copy(f->valid);
        edit_reshape(edit_find_tensor(e, "rope_freqs.weight"), 0, 1, &have);
        refused_edit(e, f, "rope_freqs.weight", "too few");
        edit_free(e);
    }
    const float bad[] = {0, -1, NAN, INFINITY};
    for (size_t i = 0; i < MOE_COUNT(bad); i++) {
        gguf_edit *e = edit_copy(f->valid);
        memcpy(edit_find_tensor(e, "rope_freqs.weight")->data + 4, &bad[i], 4);
        refused_edit(e, f, "rope_freqs.weight", "not a divisor");
        edit_free(e);
    }
}

/* Sizes whose products pass 2^31, 2^32 or 2^64. */
static void m23_large_products(void)
{
    static const char *const keys[] = {"embedding_length", "feed_forward_length",
                                       "attention.head_count", "attention.key_length",
                                       "attention.value_length", "expert_feed_forward_length",
                                       "attention.sliding_window"};
    const uint32_t sizes[] = {46341, 65536, 1u << 18, 1u << 22, 1u << 24, 1u << 30, 1u << 31,
                              UINT32_MAX};
    FOR_EACH_FAMILY(f)
    {
        for (size_t k = 0; k < MOE_COUNT(keys); k++) {
            for (size_t i = 0; i < MOE_COUNT(sizes); i++) {
                if (!has_key(f, keys[k]))
                    continue;
                gguf_edit *e = edit_copy(f->valid);
                moe_error error;
                char what[96];
                snprintf(what, sizeof what, "%s: %s = %u", f->file, keys[k], sizes[i]);
                edit_set_u32(e, key_of(f, keys[k]), sizes[i]);
                /* A tensor has another shape than this says, or the key alone is out of range. */
                moe_status status = outcome(e, what, &error);
                bool window = strstr(keys[k], "window") && sizes[i] <= 1u << 30;
                bool unused = !strcmp(keys[k], "feed_forward_length") &&
                              has_key(f, "expert_feed_forward_length") && sizes[i] <= 1u << 22;
                if (window || (unused && status == MOE_OK))
                    CHECK(status == MOE_OK, "%s: %s", what, error.message);
                else
                    CHECK(status == MOE_ERR_MODEL && error.subject[0], "%s: %s: %s", what,
                          moe_status_name(status), error.message);
                edit_free(e);
            }
        }
    }
}

TEST_PROGRAM(malformed_model)
{
    if (!families_load())
        CANNOT_RUN("fixtures: cannot be read below %s", test_root());
    RUN(valid_files_open);
    RUN(m1_architecture);
    RUN(m2_m3_block_count);
    RUN(m4_wrong_types);
    RUN(m5_sibling_counts);
    RUN(m6_m7_heads);
    RUN(m8_short_arrays);
    RUN(m9_heads_do_not_divide);
    RUN(m10_rope_dimensions);
    RUN(m11_m12_floats);
    RUN(m13_m15_experts);
    RUN(m13_m15_groups_and_shared);
    RUN(m6_m10_latent_attention);
    RUN(m6_m8_convolutions);
    RUN(m6_m8_delta_rule);
    RUN(m8_gemma4);
    RUN(draft_layers_are_not_of_the_model);
    RUN(m5_sliding_window);
    RUN(keys_that_are_rare);
    RUN(lists_of_many_layers_are_kept);
    RUN(one_head_is_enough);
    RUN(m16_context_length);
    RUN(m17_vocabulary);
    RUN(m18_missing_tensors);
    RUN(m19_wrong_shapes);
    RUN(m20_wrong_types);
    RUN(m21_weights_are_not_numbers);
    RUN(m21_scales_are_not_numbers);
    RUN(m22_rope_factors);
    RUN(m23_large_products);
    for (size_t i = 0; i < N_FAMILIES; i++)
        edit_free(families[i].valid);
}
