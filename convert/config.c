/* convert/config.c - config.json and generation_config.json -> GGUF keys, by the tables of the
 * family (core/models.c, core/model_<family>.c).
 *
 * In: JSON that nobody has checked. Out: keys that the runtime's own reader will check: what it
 * refuses in a GGUF file is refused here in the same words, with the config's key in front. */
#ifndef MOE_CONVERT_CONFIG_C
#define MOE_CONVERT_CONFIG_C

#include "files.c"
#include "meta.c"

typedef struct config_reader {
    conv_source *source;
    const moe_family *family;
    json_ref root;
    meta_writer kv;
    moe_error *error;
    uint32_t n_draft;       // layers for multi-token prediction that the checkpoint has
} config_reader;

/* ---------------------------------------------------------------------------- expressions -- */

/* Splits text at the first of `marks`: *head is what stands before, the result what comes behind,
 * or NULL; *mark is which one it was. */
static const char *config_split(const char *text, const char *marks, char head[128], char *mark)
{
    const size_t n = strcspn(text, marks);
    snprintf(head, 128, "%.*s", (int)MOE_MIN(n, (size_t)127), text);
    *mark = text[n];
    return text[n] ? text + n + 1 : NULL;
}

/* The value at a path such as "a.b", where "[]" is the first item of whatever it is in; node is
 * NULL for one that is missing or null. */
static json_ref config_path(json_ref v, const char *path)
{
    char head[128], mark;
    while (path && v.node) {
        path = config_split(path, ".", head, &mark);
        if (strcmp(head, "[]"))
            v = json_get(v, head);
        else
            v = json_typeof(v) == JSON_OBJECT && json_count(v) ? json_held(json_first(v))
                                                               : json_first(v);
    }
    if (json_typeof(v) == JSON_NULL)
        v.node = NULL;
    return v;
}

/* Sums and products, from left to right. *v is the value if there is only one. */
static bool config_terms(json_ref root, const char *text, json_ref *v, double *number)
{
    char head[128], mark, before = '=';
    while (text) {
        text = config_split(text, "+*", head, &mark);
        *v = config_path(root, head);
        if (!v->node)
            return false;
        const double x = json_double(*v, NAN);
        *number = before == '+' ? *number + x : before == '*' ? *number * x : x;
        before = mark;
    }
    return true;
}

/* A value as text, for comparisons and errors. */
static const char *config_text(json_ref v, char buf[64])
{
    switch (json_typeof(v)) {
    case JSON_NULL: return "null";
    case JSON_TRUE: return "true";
    case JSON_FALSE: return "false";
    case JSON_ARRAY: return json_count(v) ? "[...]" : "[]";
    case JSON_OBJECT: return "{...}";
    case JSON_NUMBER: snprintf(buf, 64, "%.15g", v.node->as.number); return buf;
    case JSON_STRING:
        snprintf(buf, 64, "%.*s", (int)MOE_MIN(v.node->n, 63u), v.node->as.text);
        return buf;
    }
    return "";
}

/* The rest of `words`, blanks between them, behind the one that is `word`; NULL if none is. Numbers
 * may be spelled in any way. */
static const char *config_find_word(const char *words, const char *word)
{
    const size_t n = strlen(word);
    char *end;
    const double number = strtod(word, &end);
    const bool is_number = n && !*end;
    for (const char *p = words; p && n; p = strchr(p, ' '), p = p ? p + 1 : NULL) {
        if (!strncmp(p, word, n) && (!p[n] || p[n] == ' ' || p[n] == '='))
            return p + n;
        if (is_number && strtod(p, &end) == number && end > p)
            return end;
    }
    return NULL;
}

/* Skips the condition in front of an alternative; NULL if it does not hold. */
static const char *config_condition(json_ref root, const char *text)
{
    char key[128], word[128], buf[64], mark;
    if (!strchr(text, '?'))
        return text;
    const char *rest = config_split(text, "=", key, &mark);
    rest = rest ? config_split(rest, "?", word, &mark) : NULL;
    const size_t n = strlen(key);
    const bool not = n && key[n - 1] == '!';
    if (not)
        key[n - 1] = 0;
    return !strcmp(config_text(config_path(root, key), buf), word) != not ? rest : NULL;
}

/* The first alternative of an expression that is there; false if there is none. */
static bool config_value(json_ref root, const char *text, json_ref *v, double *number)
{
    char head[128], mark;
    while (text) {
        text = config_split(text, "|", head, &mark);
        const char *terms = config_condition(root, head);
        if (terms && config_terms(root, terms, v, number))
            return true;
    }
    return false;
}

/* --------------------------------------------------------------------------------- tables -- */

static moe_status config_fail(const config_reader *r, moe_status status, const char *key,
                              const char *expected, json_ref got)
{
    char subject[160], buf[64];
    snprintf(subject, sizeof subject, "config.json: %s", key);
    return fail(r->error, status, subject, "expected %s, got %s", expected, config_text(got, buf));
}

/* A whole number below a limit. */
static bool config_whole(double x, double limit)
{
    return x >= 0 && x < limit && x == floor(x);
}

static moe_status config_put_u32(config_reader *r, const moe_config_key *k, const char *key,
                                 json_ref v, double x)
{
    static const char expected[] = "a whole number below 2^32, or an array of them";
    if (json_typeof(v) != JSON_ARRAY) {
        if (strchr(k->hf, '*')) /* a share of something: transformers cuts it to a whole number */
            x = trunc(x);
        if (!config_whole(x, 4294967296.0))
            return config_fail(r, MOE_ERR_MODEL, k->hf, expected, v);
        meta_put_u32(&r->kv, key, (uint32_t)x);
        return MOE_OK;
    }
    meta_put_array(&r->kv, key, META_U32, json_count(v));
    for (json_ref i = json_first(v); i.node; i = json_next(v, i)) {
        const double item = json_double(i, -1);
        if (!config_whole(item, 4294967296.0))
            return config_fail(r, MOE_ERR_MODEL, k->hf, expected, i);
        meta_number(&r->kv, (uint32_t)item, 4);
    }
    return MOE_OK;
}

static moe_status config_put_word(config_reader *r, const moe_config_key *k, const char *key,
                                  json_ref v)
{
    char buf[64], expected[200];
    const char *word = config_text(v, buf);
    const char *found = config_find_word(k->words, word);
    if (!found) {
        snprintf(expected, sizeof expected, "one of \"%s\"", k->words);
        return config_fail(r, MOE_ERR_UNSUPPORTED, k->hf, expected, v);
    }
    if (k->kind == CONFIG_WORD)
        meta_put_u32(&r->kv, key, (uint32_t)atoi(found + (*found == '=')));
    return MOE_OK;
}

/* Whether a layer has experts, by the keys that Qwen's families have for it. */
static bool config_layer_is_sparse(json_ref root, uint32_t layer)
{
    const double step = json_double(config_path(root, "decoder_sparse_step"), 1);
    const json_ref dense = config_path(root, "mlp_only_layers");
    for (json_ref v = json_first(dense); v.node; v = json_next(dense, v))
        if (json_double(v, -1) == layer)
            return false;
    return step >= 1 && (layer + 1) % (uint32_t)MOE_MIN(step, 1e9) == 0;
}

static moe_status config_put_sparse(config_reader *r, const moe_config_key *k, const char *key,
                                    json_ref list)
{
    uint32_t sparse[MODEL_MAX_LAYERS], n_layer = 0, n_dense = 0, n_leading = 0;
    const bool listed = json_typeof(list) == JSON_ARRAY;
    const double n = json_double(config_path(r->root, "num_hidden_layers"), -1);
    if (!(n >= 1 && n <= MODEL_MAX_LAYERS) || (listed && json_count(list) != n))
        return config_fail(r, MOE_ERR_MODEL, k->hf, "one item for each layer", list);
    for (json_ref v = json_first(list); n_layer < n; v = listed ? json_next(list, v) : v) {
        if (listed && !json_is(v, "dense") && !json_is(v, "sparse"))
            return config_fail(r, MOE_ERR_MODEL, k->hf, "\"dense\" or \"sparse\"", v);
        sparse[n_layer] = listed ? json_is(v, "sparse") : config_layer_is_sparse(r->root, n_layer);
        n_leading += !sparse[n_layer] && n_leading == n_layer;
        n_dense += !sparse[n_layer++];
    }
    if (n_dense == n_leading) {
        if (n_dense || listed)
            meta_put_u32(&r->kv, key, n_dense);
        return MOE_OK;
    }
    char other[160];
    snprintf(other, sizeof other, "%s.expert_layers", r->family->arch);
    meta_put_array(&r->kv, other, META_U32, n_layer);
    for (uint32_t i = 0; i < n_layer; i++)
        meta_number(&r->kv, sparse[i], 4);
    return MOE_OK;
}

static moe_status config_put_sections(config_reader *r, const moe_config_key *k, const char *key,
                                      json_ref list)
{
    enum { N_SECTION = 4 };
    uint32_t n = 0;
    if (json_typeof(list) != JSON_ARRAY || json_count(list) > N_SECTION)
        return config_fail(r, MOE_ERR_MODEL, k->hf, "a list of at most 4 numbers", list);
    meta_put_array(&r->kv, key, META_I32, N_SECTION);
    for (json_ref v = json_first(list); v.node; v = json_next(list, v), n++) {
        const double x = json_double(v, -1);
        if (!config_whole(x, 2147483648.0))
            return config_fail(r, MOE_ERR_MODEL, k->hf, "whole numbers", v);
        meta_number(&r->kv, (uint32_t)x, 4);
    }
    for (; n < N_SECTION; n++)
        meta_number(&r->kv, 0, 4);
    return MOE_OK;
}

/* The number of one item of a list, by its word. */
static moe_status config_layer(config_reader *r, const moe_config_key *k, json_ref v,
                               uint32_t *number)
{
    char buf[64], what[128], mark;
    json_ref value;
    double x = -1;
    const char *found = config_find_word(k->words, config_text(v, buf));
    if (!found)
        return config_fail(r, MOE_ERR_UNSUPPORTED, k->hf, k->words, v);
    config_split(found + (*found == '='), " ", what, &mark);
    if (*what >= '0' && *what <= '9')
        x = strtod(what, NULL);
    else if (!config_value(r->root, what, &value, &x) || !(x >= 0 && x <= UINT32_MAX))
        return config_fail(r, MOE_ERR_MODEL, what, "a whole number", value);
    *number = (uint32_t)x;
    return MOE_OK;
}

/* The n of a list whose every n-th number is 0 and no other; 0 if none is, else UINT32_MAX. */
static uint32_t config_period(const uint32_t *list, uint32_t n)
{
    uint32_t period = 0;
    while (period < n && list[period])
        period++;
    if (period == n)
        return 0;
    period++;
    for (uint32_t i = 0; i < n; i++)
        if (!list[i] != ((i + 1) % period == 0))
            return UINT32_MAX;
    return period;
}

static moe_status config_put_layers(config_reader *r, const moe_config_key *k, const char *key,
                                    json_ref list)
{
    uint32_t number[MODEL_MAX_LAYERS], n = 0;
    if (json_typeof(list) != JSON_ARRAY || json_count(list) > MODEL_MAX_LAYERS)
        return config_fail(r, MOE_ERR_MODEL, k->hf, "a list with an item for each layer", list);
    for (json_ref v = json_first(list); v.node; v = json_next(list, v)) {
        const moe_status status = config_layer(r, k, v, &number[n++]);
        if (status)
            return status;
    }
    const uint32_t period = k->kind == CONFIG_PERIOD ? config_period(number, n) : UINT32_MAX;
    if (period != UINT32_MAX) {
        meta_put_u32(&r->kv, key, period);
        return MOE_OK;
    }
    meta_put_array(&r->kv, key, META_U32, (uint64_t)n + r->n_draft);
    for (uint32_t i = 0; i < n; i++)
        meta_number(&r->kv, number[i], 4);
    for (uint32_t i = 0; i < r->n_draft; i++) // they have attention, not a state
        meta_number(&r->kv, 0, 4);
    return MOE_OK;
}

static moe_status config_put(config_reader *r, const moe_config_key *k)
{
    char key[160];
    double x = NAN;
    json_ref v;
    if (!config_value(r->root, k->hf, &v, &x))
        return MOE_OK;
    snprintf(key, sizeof key, "%s.%s", r->family->arch, k->gguf ? k->gguf : "");
    if (k->kind == CONFIG_U32)
        return config_put_u32(r, k, key, v, x);
    if (k->kind == CONFIG_WORD || k->kind == CONFIG_EXPECT)
        return config_put_word(r, k, key, v);
    if (k->kind == CONFIG_SPARSE)
        return config_put_sparse(r, k, key, v);
    if (k->kind == CONFIG_SECTIONS)
        return config_put_sections(r, k, key, v);
    if (k->kind == CONFIG_LAYERS || k->kind == CONFIG_PERIOD)
        return config_put_layers(r, k, key, v);
    if (k->kind == CONFIG_BOOL) {
        if (json_typeof(v) != JSON_TRUE && json_typeof(v) != JSON_FALSE)
            return config_fail(r, MOE_ERR_MODEL, k->hf, "true or false", v);
        meta_put_bool(&r->kv, key, json_typeof(v) == JSON_TRUE);
        return MOE_OK;
    }
    if (!isfinite(x) || (k->kind == CONFIG_RSQRT && !(x > 0)))
        return config_fail(r, MOE_ERR_MODEL, k->hf, "a number", v);
    x = k->kind == CONFIG_RSQRT ? 1.0 / sqrt(x) : k->scale != 0 ? x * k->scale : x;
    meta_put_f32(&r->kv, key, (float)x);
    return MOE_OK;
}

/* Whether a table writes a key of this name, in a line before `end`. */
static bool config_writes(const config_reader *r, const moe_config_key *keys,
                          const moe_config_key *end, const char *gguf)
{
    json_ref v;
    double x;
    for (const moe_config_key *k = keys; k && k->hf && k != end; k++)
        if (gguf && k->gguf && !strcmp(k->gguf, gguf) && config_value(r->root, k->hf, &v, &x))
            return true;
    return false;
}

/* Writes what a table says, but for the keys that `better` has. */
static moe_status config_put_table(config_reader *r, const moe_config_key *keys,
                                   const moe_config_key *better)
{
    moe_status status = MOE_OK;
    for (const moe_config_key *k = keys; k && k->hf && !status; k++)
        if (!config_writes(r, better, NULL, k->gguf) && !config_writes(r, keys, k, k->gguf))
            status = config_put(r, k);
    return status;
}

/* ---------------------------------------------------------------------------------- forms -- */

typedef enum config_form {
    FORM_BOOL,
    FORM_WHOLE,     // a number
    FORM_OBJECT,
    FORM_PER_LAYER, // a list with an item for each layer
    FORM_LAYERS     // a list of layers
} config_form;

/* What keys must be in the configs that have them, also where nothing is made of them: "x" would
 * else be as good as false, and a list for too few layers as good as none. */
static const struct {
    const char *hf;
    config_form form;
} config_forms[] = {
    {"attention_bias", FORM_BOOL},
    {"attention_k_eq_v", FORM_BOOL},
    {"enable_moe_block", FORM_BOOL},
    {"mlp_bias", FORM_BOOL},
    {"norm_topk_prob", FORM_BOOL},
    {"rope_interleave", FORM_BOOL},
    {"tie_word_embeddings", FORM_BOOL},
    {"use_double_wide_mlp", FORM_BOOL},
    {"use_sliding_window", FORM_BOOL},
    {"decoder_sparse_step", FORM_WHOLE},
    {"max_window_layers", FORM_WHOLE},
    {"mtp_num_hidden_layers", FORM_WHOLE},
    {"n_group", FORM_WHOLE},
    {"num_nextn_predict_layers", FORM_WHOLE},
    {"sliding_window", FORM_WHOLE},
    {"topk_group", FORM_WHOLE},
    {"vocab_size", FORM_WHOLE},
    {"rope_parameters", FORM_OBJECT},
    {"rope_parameters.full_attention", FORM_OBJECT},
    {"rope_parameters.sliding_attention", FORM_OBJECT},
    {"rope_scaling", FORM_OBJECT},
    {"layer_types", FORM_PER_LAYER},
    {"mlp_layer_types", FORM_PER_LAYER},
    {"mlp_only_layers", FORM_LAYERS},
};

/* NULL, or what was expected instead of a value that is not null. */
static const char *config_misfit(json_ref v, config_form form, double n_layer)
{
    switch (form) {
    case FORM_BOOL:
        return json_typeof(v) == JSON_TRUE || json_typeof(v) == JSON_FALSE ? NULL : "true or false";
    case FORM_WHOLE:
        return config_whole(json_double(v, -1), 4294967296.0) ? NULL : "a whole number below 2^32";
    case FORM_OBJECT: return json_typeof(v) == JSON_OBJECT ? NULL : "an object";
    case FORM_PER_LAYER:
        return json_typeof(v) == JSON_ARRAY && json_count(v) == n_layer
                   ? NULL
                   : "a list with an item for each of num_hidden_layers layers";
    case FORM_LAYERS: break;
    }
    bool fits = json_typeof(v) == JSON_ARRAY;
    for (json_ref i = json_first(v); fits && i.node; i = json_next(v, i))
        fits = config_whole(json_double(i, -1), n_layer);
    return fits ? NULL : "a list of numbers below num_hidden_layers";
}

static moe_status config_check_forms(const config_reader *r)
{
    const double n_layer = json_double(config_path(r->root, "num_hidden_layers"), -1);
    for (size_t i = 0; i < MOE_COUNT(config_forms); i++) {
        const json_ref v = config_path(r->root, config_forms[i].hf);
        const char *expected = v.node ? config_misfit(v, config_forms[i].form, n_layer) : NULL;
        if (expected)
            return config_fail(r, MOE_ERR_MODEL, config_forms[i].hf, expected, v);
    }
    return MOE_OK;
}

/* The config's name of a GGUF key: "num_attention_heads" of "llama.attention.head_count". */
static const char *config_name_of(const moe_family *family, const char *key)
{
    const moe_config_key *tables[2] = {family->config, config_common};
    const size_t n = strlen(family->arch);
    if (strncmp(key, family->arch, n) || key[n] != '.')
        return NULL;
    for (int i = 0; i < 2; i++)
        for (const moe_config_key *k = tables[i]; k && k->hf; k++)
            if (k->gguf && !strcmp(k->gguf, key + n + 1))
                return k->hf;
    return NULL;
}

/* --------------------------------------------------------------------------------- rotary -- */

/* The object that says how rotary positions are stretched; transformers 5 has it in another place
 * than its predecessors, and in Gemma one for each kind of layer. */
static json_ref config_rope(json_ref root)
{
    static const char *const places[] = {"rope_scaling", "rope_parameters.full_attention",
                                         "rope_parameters"};
    json_ref v = {root.doc, NULL};
    for (size_t i = 0; i < MOE_COUNT(places) && json_typeof(v) != JSON_OBJECT; i++)
        v = config_path(root, places[i]);
    return v;
}

static bool config_rope_is(json_ref rope, const char *type)
{
    json_ref v = config_path(rope, "rope_type");
    return json_is(v.node ? v : config_path(rope, "type"), type);
}

/* A number of the rope object; `otherwise` NAN makes it required. */
static moe_status config_rope_number(const config_reader *r, json_ref rope, const char *name,
                                     double otherwise, double *value)
{
    char subject[128];
    json_ref v = config_path(rope, name);
    *value = v.node ? json_double(v, NAN) : otherwise;
    if (isfinite(*value))
        return MOE_OK;
    snprintf(subject, sizeof subject, "rope_scaling.%s", name);
    return config_fail(r, MOE_ERR_MODEL, subject, "a number", v);
}

/* What cos and sin are multiplied with: GGUF's readers take the usual factor and this one on top,
 * which must undo it where transformers takes another. With mscale_all_dim DeepSeek's readers take
 * none. */
static moe_status config_put_yarn_factor(config_reader *r, json_ref rope, double factor)
{
    char key[160];
    double mscale, all_dim, x;
    moe_status status = config_rope_number(r, rope, "mscale", 0, &mscale);
    if (!status)
        status = config_rope_number(r, rope, "mscale_all_dim", 0, &all_dim);
    const double log_factor = factor > 1 ? 0.1 * log(factor) : 0;
    const bool none = config_writes(r, r->family->config, NULL,
                                    "rope.scaling.yarn_log_multiplier") && all_dim > 0;
    const double usual = none ? 1 : 1 + log_factor;
    const double otherwise = mscale != 0 && all_dim != 0
                                 ? (1 + mscale * log_factor) / (1 + all_dim * log_factor)
                                 : 1 + log_factor;
    if (!status)
        status = config_rope_number(r, rope, "attention_factor", otherwise, &x);
    if (status || fabs(x - usual) < 1e-12)
        return status;
    snprintf(key, sizeof key, "%s.rope.scaling.attn_factor", r->family->arch);
    meta_put_f32(&r->kv, key, (float)(x / usual));
    return MOE_OK;
}

static moe_status config_put_yarn(config_reader *r, json_ref rope, double factor, double n_ctx)
{
    char key[160];
    double x = 0;
    moe_status status = MOE_OK;
    static const struct { const char *hf, *gguf; } betas[] = {
        {"beta_fast", "yarn_beta_fast"}, {"beta_slow", "yarn_beta_slow"}};
    snprintf(key, sizeof key, "%s.rope.scaling.original_context_length", r->family->arch);
    if (!(n_ctx >= 1 && n_ctx <= UINT32_MAX))
        return config_fail(r, MOE_ERR_MODEL, "rope_scaling.original_max_position_embeddings",
                           "a positive number", rope);
    meta_put_u32(&r->kv, key, (uint32_t)n_ctx);
    for (size_t i = 0; i < MOE_COUNT(betas) && !status; i++) {
        snprintf(key, sizeof key, "%s.rope.scaling.%s", r->family->arch, betas[i].gguf);
        if (!config_path(rope, betas[i].hf).node)
            continue;
        status = config_rope_number(r, rope, betas[i].hf, NAN, &x);
        meta_put_f32(&r->kv, key, (float)x);
    }
    json_ref truncate = config_path(rope, "truncate");
    if (truncate.node && json_typeof(truncate) != JSON_TRUE && json_typeof(truncate) != JSON_FALSE)
        return config_fail(r, MOE_ERR_MODEL, "rope_scaling.truncate", "true or false", truncate);
    snprintf(key, sizeof key, "%s.rope.scaling.yarn_truncate", r->family->arch);
    meta_put_bool(&r->kv, key, json_bool(truncate, true));
    return status ? status : config_put_yarn_factor(r, rope, factor);
}

static moe_status config_put_rope(config_reader *r)
{
    char key[160];
    double factor = 1, n_ctx = 0;
    json_ref rope = config_rope(r->root);
    // "dynamic" changes nothing up to max_position_embeddings, beyond which there is a warning
    if (json_typeof(rope) != JSON_OBJECT || config_rope_is(rope, "default") ||
        config_rope_is(rope, "dynamic"))
        return MOE_OK;
    json_ref type = config_path(rope, "rope_type");
    type = type.node ? type : config_path(rope, "type");
    const bool linear = json_is(type, "linear"), yarn = json_is(type, "yarn");
    // a tensor of divisors, made in hf.c
    if (json_is(type, "llama3") || json_is(type, "proportional") || !type.node)
        return MOE_OK;
    if (!linear && !yarn)
        return config_fail(r, MOE_ERR_UNSUPPORTED, "rope_scaling.rope_type",
                           "default, linear, dynamic, yarn, llama3 or proportional", type);
    snprintf(key, sizeof key, "%s.rope.scaling.type", r->family->arch);
    meta_put_string(&r->kv, key, linear ? "linear" : "yarn");
    const double stretched = json_double(config_path(r->root, "max_position_embeddings"), NAN);
    const double train = json_double(config_path(r->root, "original_max_position_embeddings"),
                                     stretched);
    moe_status status = config_rope_number(r, rope, "original_max_position_embeddings",
                                           yarn ? train : 0, &n_ctx);
    if (!status)
        status = config_rope_number(r, rope, "factor", yarn ? stretched / n_ctx : NAN, &factor);
    snprintf(key, sizeof key, "%s.rope.scaling.factor", r->family->arch);
    meta_put_f32(&r->kv, key, (float)factor);
    return status || linear ? status : config_put_yarn(r, rope, factor, n_ctx);
}

/* ------------------------------------------------------------------------------- defaults -- */

/* generation_config.json: how the makers of the model want it to be sampled. */
static moe_status config_put_sampling(config_reader *r, json_ref generation)
{
    static const struct { const char *hf, *gguf; bool integer; } keys[] = {
        {"temperature", "general.sampling.temp", false}, {"top_k", "general.sampling.top_k", true},
        {"top_p", "general.sampling.top_p", false}, {"min_p", "general.sampling.min_p", false},
        {"repetition_penalty", "general.sampling.penalty_repeat", false}};
    for (size_t i = 0; i < MOE_COUNT(keys); i++) {
        json_ref v = config_path(generation, keys[i].hf);
        const double x = json_double(v, NAN);
        if (!v.node)
            continue;
        if (!isfinite(x) || x < 0 || x > 1e6)
            return fail(r->error, MOE_ERR_MODEL, keys[i].hf,
                        "expected a number from 0 to 1000000 in generation_config.json, got %g", x);
        if (keys[i].integer) {
            meta_key(&r->kv, keys[i].gguf, META_I32);
            meta_number(&r->kv, (uint32_t)x, 4);
        } else {
            meta_put_f32(&r->kv, keys[i].gguf, (float)x);
        }
    }
    return MOE_OK;
}

#endif
