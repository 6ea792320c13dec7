/* cli/info.c - `moe info`: what is in a model file, and what it needs to run. */
#include "cli.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct info_options {
    cli_common common;
    uint32_t n_ctx;
    int cache;
    bool json, tensors, metadata;
} info_options;

/* The tensors of one type, summed. */
typedef struct info_type {
    const char *name;
    uint64_t n_tensor, n_weight, bytes, stored_bytes;
    double error; /* squared, relative, weighted by weights; negative: not known */
} info_type;

typedef struct info_file {
    moe_model *model;
    moe_model_info info;
    const char *cannot_run;   /* why, or NULL */
    moe_error cannot_run_error;
    moe_memory_estimate need; /* if it can run */
    info_type *types;         /* [n_types], the largest first */
    size_t n_types;
    uint64_t decoded_bytes;   /* of tensors that are compressed in the file */
} info_file;

/* ----------------------------------------------------------------------------------- facts -- */

/* A file that this build cannot run is still described, as far as its metadata goes. */
static int info_open(info_file *file, const char *path, const info_options *o)
{
    moe_host host;
    moe_model_options options;
    common_model_options(&options, &host, path, &o->common);
    moe_error error = {0};
    moe_status status = moe_model_open(&file->model, &options, &error);
    if (status == MOE_ERR_MODEL || status == MOE_ERR_UNSUPPORTED) {
        options.vocab_only = true;
        if (moe_model_open(&file->model, &options, NULL) == MOE_OK) {
            file->cannot_run_error = error;
            file->cannot_run = file->cannot_run_error.message;
            status = MOE_OK;
        }
    }
    progress_clear();
    if (status)
        return cli_fail_open(status, &error, path, &o->common);
    file->info.size = sizeof file->info;
    moe_model_get_info(file->model, &file->info);
    if (!file->cannot_run)
        common_opened(file->model, path, &o->common);
    return EXIT_OK;
}

static int info_larger(const void *a, const void *b)
{
    const info_type *x = a, *y = b;
    return (x->bytes < y->bytes) - (x->bytes > y->bytes);
}

static uint64_t info_n_weight(const moe_tensor_info *t)
{
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->n_dims; i++)
        n *= t->dims[i];
    return n;
}

static bool info_tensor(const info_file *file, size_t i, moe_tensor_info *t)
{
    *t = (moe_tensor_info){.size = sizeof *t};
    return moe_model_tensor(file->model, i, t) == MOE_OK;
}

static void info_sum_types(info_file *file)
{
    moe_tensor_info t;
    for (size_t i = 0; i < moe_model_tensor_count(file->model) && info_tensor(file, i, &t); i++) {
        size_t k = 0;
        while (k < file->n_types && strcmp(file->types[k].name, t.type))
            k++;
        if (k == file->n_types) {
            file->types = cli_alloc(file->types, ++file->n_types, sizeof *file->types);
            file->types[k] = (info_type){.name = t.type};
        }
        file->types[k].n_tensor++;
        file->types[k].n_weight += info_n_weight(&t);
        file->types[k].bytes += t.bytes;
        file->types[k].stored_bytes += t.stored_bytes;
        if (t.stored_bytes != t.bytes)
            file->decoded_bytes += t.bytes;
        if (t.error < 0 || file->types[k].error < 0)
            file->types[k].error = -1;
        else
            file->types[k].error += (double)t.error * (double)info_n_weight(&t);
    }
    for (size_t k = 0; k < file->n_types; k++)
        if (file->types[k].error > 0)
            file->types[k].error /= (double)file->types[k].n_weight;
    if (file->n_types)
        qsort(file->types, file->n_types, sizeof *file->types, info_larger);
}

static int info_estimate(info_file *file, const info_options *o)
{
    moe_session_options so;
    common_session_options(&so, &o->common, o->cache);
    so.n_ctx = o->n_ctx;
    moe_error error = {0};
    file->need.size = sizeof file->need;
    moe_status status = moe_session_estimate(file->model, &so, &file->need, &error);
    return status ? cli_fail_status(status, &error, NULL) : EXIT_OK;
}

/* The metadata value, whole. The caller frees it. */
static char *info_meta_value(const info_file *file, size_t i, size_t *bytes)
{
    *bytes = moe_model_meta_value(file->model, i, NULL, 0);
    char *value = cli_alloc(NULL, *bytes + 1, 1);
    moe_model_meta_value(file->model, i, value, *bytes + 1);
    return value;
}

/* ------------------------------------------------------------------------------------ text -- */

static void text_count(const char *what, uint64_t n)
{
    if (n)
        printf("  %-24s %" PRIu64 "\n", what, n);
}

static void text_size(const char *what, uint64_t bytes)
{
    cli_size size;
    printf("  %-24s %s\n", what, cli_size_text(&size, bytes));
}

static void text_weights(const char *what, uint64_t n)
{
    if (n)
        printf("  %-24s %.4g M\n", what, (double)n * 1e-6);
}

static void text_words(const char *what, const char *words)
{
    if (*words)
        printf("  %-24s %s\n", what, words);
}

static void text_model(const info_file *file, const char *path)
{
    const moe_model_info *m = &file->info;
    printf("%s\n", path);
    printf("  %-24s %s\n", "architecture", m->architecture);
    if (*m->name) {
        printf("  %-24s ", "name");
        fflush(stdout);
        cli_write_text(m->name, strlen(m->name));
        putchar('\n');
    }
    printf("  %-24s %s\n", "weights, mostly", m->quantization);
    text_weights("parameters", m->n_param);
    text_weights("  active per token", m->n_param_active);
    text_count("layers", m->n_layer);
    text_count("  that draft", m->n_layer_draft);
    text_count("embedding width", m->n_embd);
    text_words("attention", m->attention);
    text_count("heads", m->n_head);
    text_count("heads, key/value", m->n_head_kv);
    text_count("head width", m->head_dim);
    text_count("feed-forward width", m->n_ff);
    text_count("experts", m->n_expert);
    text_count("  used per token", m->n_expert_used);
    text_count("  shared", m->n_expert_shared);
    text_count("  feed-forward width", m->n_ff_expert);
    text_words("  router", m->router);
    text_count("sliding window", m->sliding_window);
    if (m->kv_bytes_per_token)
        text_size("cache per token, f16", m->kv_bytes_per_token);
    if (m->kv_bytes_per_token != m->kv_bytes_per_token_plain)
        text_size("  if all heads had theirs", m->kv_bytes_per_token_plain);
    text_count("vocabulary", m->n_vocab);
    text_count("context in training", m->n_ctx_train);
}

static void text_types(const info_file *file)
{
    printf("\ntensors\n  %-10s %8s %14s %12s %7s %6s\n", "type", "tensors", "weights", "size",
           "share", "bits");
    uint64_t n_tensor = 0, n_weight = 0, bytes = 0;
    for (size_t i = 0; i < file->n_types; i++)
        bytes += file->types[i].bytes;
    for (size_t i = 0; i < file->n_types; i++) {
        const info_type *t = &file->types[i];
        cli_size size;
        printf("  %-10s %8" PRIu64 " %14" PRIu64 " %12s %5.1f %% %6.2f\n", t->name, t->n_tensor,
               t->n_weight, cli_size_text(&size, t->bytes),
               bytes ? 100.0 * (double)t->bytes / (double)bytes : 0.0,
               t->n_weight ? 8.0 * (double)t->bytes / (double)t->n_weight : 0.0);
        n_tensor += t->n_tensor;
        n_weight += t->n_weight;
    }
    cli_size size;
    printf("  %-10s %8" PRIu64 " %14" PRIu64 " %12s\n", "all", n_tensor, n_weight,
           cli_size_text(&size, bytes));
}

/* Of a .moe file: what is compressed, and what quantization has cost. */
static void text_stored(const info_file *file)
{
    uint64_t bytes = 0, stored = 0;
    bool known = false;
    for (size_t i = 0; i < file->n_types; i++) {
        bytes += file->types[i].bytes;
        stored += file->types[i].stored_bytes;
        known |= file->types[i].error >= 0;
    }
    if (stored < bytes) {
        cli_size size;
        printf("  %-10s %8s %14s %12s %5.1f %%\n", "stored", "", "", cli_size_text(&size, stored),
               100.0 * (double)stored / (double)bytes);
    }
    if (!known)
        return;
    printf("\nerror against the source, squared, relative to the weights\n");
    for (size_t i = 0; i < file->n_types; i++)
        if (file->types[i].error >= 0)
            printf("  %-24s %.3g%s\n", file->types[i].name, file->types[i].error,
                   file->types[i].error > 0 ? "" : " (the same)");
}

/* Where a .moe file comes from. */
static void text_receipt(const info_file *file)
{
    static const char prefix[] = "receipt.";
    bool any = false;
    for (size_t i = 0; i < moe_model_meta_count(file->model); i++) {
        const char *key = moe_model_meta_key(file->model, i);
        if (strncmp(key, prefix, sizeof prefix - 1))
            continue;
        size_t bytes;
        char *value = info_meta_value(file, i, &bytes);
        if (!any)
            printf("\nreceipt\n");
        any = true;
        printf("  %-24s ", key + sizeof prefix - 1);
        fflush(stdout);
        cli_write_text(value, strlen(value));
        putchar('\n');
        free(value);
    }
}

/* Compressed weights are decoded into memory of their own; the others stay in the file. */
static void text_weights_memory(const info_file *file, bool copied)
{
    const uint64_t decoded = copied ? 0 : file->decoded_bytes;
    const uint64_t rest = file->info.weight_bytes - decoded;
    if (rest)
        text_size(copied ? "weights, allocated" : "weights, mapped", rest);
    if (decoded)
        text_size("weights, decoded", decoded);
}

static void text_memory(const info_file *file, const info_options *o)
{
    const moe_memory_estimate *need = &file->need;
    printf("\nmemory for a context of %u tokens, cache %s\n", need->n_ctx, cache_names[o->cache]);
    text_size("key/value cache", need->cache_bytes);
    text_size("work", need->work_bytes);
    text_size("session, all", need->total_bytes);
    text_weights_memory(file, o->common.no_mmap);
    text_size("read per token", file->info.weight_bytes_active);
    if (need->fits)
        printf("  %-24s yes; up to %u tokens would\n", "fits", need->n_ctx_max);
    else if (need->n_ctx_max)
        printf("  %-24s NO; %u tokens would: --ctx %u\n", "fits", need->n_ctx_max, need->n_ctx_max);
    else
        printf("  %-24s NO; no context would\n", "fits");
    printf("  %-24s %s\n", "runs on", file->info.device);
    if (strstr(file->info.device, "plain C"))
        printf("  %-24s no AVX2 and no NEON, or switched off: the same results, many times "
               "slower\n",
               "");
}

static void text_tensors(const info_file *file)
{
    printf("\n  %-40s %-8s %-26s %12s %12s %9s\n", "tensor", "type", "shape", "bytes", "stored",
           "error");
    moe_tensor_info t;
    for (size_t i = 0; i < moe_model_tensor_count(file->model) && info_tensor(file, i, &t); i++) {
        char shape[96];
        int used = 0;
        for (uint32_t k = 0; k < t.n_dims && used < (int)sizeof shape - 1; k++)
            used += snprintf(shape + used, sizeof shape - (size_t)used, "%s%" PRIu64,
                             k ? " x " : "", t.dims[k]);
        printf("  %-40s %-8s %-26s %12" PRIu64 " %12" PRIu64, t.name, t.type, shape, t.bytes,
               t.stored_bytes);
        if (t.error >= 0)
            printf(" %9.3g", (double)t.error);
        if (t.error_worst > t.error)
            printf(", %.3g at worst", (double)t.error_worst);
        putchar('\n');
    }
}

static void text_metadata(const info_file *file)
{
    printf("\nmetadata\n");
    for (size_t i = 0; i < moe_model_meta_count(file->model); i++) {
        size_t bytes;
        char *value = info_meta_value(file, i, &bytes);
        for (char *c = value; *c; c++)
            if (*c == '\n')
                *c = ' ';
        printf("  %s = ", moe_model_meta_key(file->model, i));
        size_t shown = bytes < 160 ? bytes : 160;
        while (shown < bytes && shown && (value[shown] & 0xc0) == 0x80)
            shown--; /* not in the middle of a character */
        cli_write_text(value, shown);
        printf("%s\n", shown < bytes ? " ..." : "");
        free(value);
    }
}

/* ------------------------------------------------------------------------------------ JSON -- */

static void json_model(cli_json *json, const info_file *file)
{
    const moe_model_info *m = &file->info;
    json_string(json, "architecture", m->architecture);
    json_string(json, "name", m->name);
    json_string(json, "quantization", m->quantization);
    json_string(json, "device", m->device);
    json_string(json, "router", m->router);
    json_string(json, "attention", m->attention);
    const struct { const char *key; uint64_t value; } number[] = {
        {"n_vocab", m->n_vocab}, {"n_ctx_train", m->n_ctx_train}, {"n_embd", m->n_embd},
        {"n_layer", m->n_layer}, {"n_layer_draft", m->n_layer_draft}, {"n_head", m->n_head},
        {"n_head_kv", m->n_head_kv}, {"head_dim", m->head_dim}, {"n_ff", m->n_ff},
        {"n_expert", m->n_expert}, {"n_expert_used", m->n_expert_used},
        {"n_expert_shared", m->n_expert_shared}, {"n_ff_expert", m->n_ff_expert},
        {"sliding_window", m->sliding_window}, {"n_param", m->n_param},
        {"n_param_active", m->n_param_active}, {"weight_bytes", m->weight_bytes},
        {"weight_bytes_active", m->weight_bytes_active},
        {"kv_bytes_per_token", m->kv_bytes_per_token},
        {"kv_bytes_per_token_plain", m->kv_bytes_per_token_plain},
    };
    for (size_t i = 0; i < CLI_COUNT(number); i++)
        json_uint(json, number[i].key, number[i].value);
}

static void json_memory(cli_json *json, const info_file *file, const info_options *o)
{
    const moe_memory_estimate *need = &file->need;
    json_open(json, "memory", '{');
    json_uint(json, "n_ctx", need->n_ctx);
    json_string(json, "cache", cache_names[o->cache]);
    json_uint(json, "cache_bytes", need->cache_bytes);
    json_uint(json, "work_bytes", need->work_bytes);
    json_uint(json, "total_bytes", need->total_bytes);
    json_uint(json, "weight_bytes_decoded", o->common.no_mmap ? 0 : file->decoded_bytes);
    json_bool(json, "fits", need->fits);
    json_uint(json, "n_ctx_max", need->n_ctx_max);
    json_close(json, '}');
}

static void json_tensors(cli_json *json, const info_file *file)
{
    json_open(json, "tensors", '[');
    moe_tensor_info t;
    for (size_t i = 0; i < moe_model_tensor_count(file->model) && info_tensor(file, i, &t); i++) {
        json_open(json, NULL, '{');
        json_string(json, "name", t.name);
        json_string(json, "type", t.type);
        json_open(json, "dims", '[');
        for (uint32_t k = 0; k < t.n_dims; k++)
            json_uint(json, NULL, t.dims[k]);
        json_close(json, ']');
        json_uint(json, "offset", t.offset);
        json_uint(json, "bytes", t.bytes);
        json_uint(json, "stored_bytes", t.stored_bytes);
        if (t.error >= 0) {
            json_number(json, "error", (double)t.error, 9);
            json_number(json, "error_worst", (double)t.error_worst, 9);
        }
        json_close(json, '}');
    }
    json_close(json, ']');
}

static void json_metadata(cli_json *json, const info_file *file)
{
    json_open(json, "metadata", '{');
    for (size_t i = 0; i < moe_model_meta_count(file->model); i++) {
        size_t bytes;
        char *value = info_meta_value(file, i, &bytes);
        json_text(json, moe_model_meta_key(file->model, i), value, bytes);
        free(value);
    }
    json_close(json, '}');
}

static void info_json(const info_file *file, const char *path, const info_options *o)
{
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_string(&json, "model", path);
    json_model(&json, file);
    json_bool(&json, "runs", !file->cannot_run);
    if (file->cannot_run)
        json_string(&json, "reason", file->cannot_run);
    else
        json_memory(&json, file, o);
    json_open(&json, "types", '[');
    for (size_t i = 0; i < file->n_types; i++) {
        json_open(&json, NULL, '{');
        json_string(&json, "type", file->types[i].name);
        json_uint(&json, "n_tensor", file->types[i].n_tensor);
        json_uint(&json, "n_weight", file->types[i].n_weight);
        json_uint(&json, "bytes", file->types[i].bytes);
        json_uint(&json, "stored_bytes", file->types[i].stored_bytes);
        if (file->types[i].error >= 0)
            json_number(&json, "error", file->types[i].error, 9);
        json_close(&json, '}');
    }
    json_close(&json, ']');
    if (o->tensors)
        json_tensors(&json, file);
    if (o->metadata)
        json_metadata(&json, file);
    json_close(&json, '}');
    json_end(&json);
}

static void info_text(const info_file *file, const char *path, const info_options *o)
{
    text_model(file, path);
    if (file->n_types) {
        text_types(file);
        text_stored(file);
    }
    text_receipt(file);
    if (file->cannot_run)
        printf("\ncannot run: %s\n", file->cannot_run);
    else
        text_memory(file, o);
    if (o->tensors)
        text_tensors(file);
    if (o->metadata)
        text_metadata(file);
}

static int info_main(int argc, char **argv)
{
    info_options o = {0};
    if (!common_init(&o.common))
        return EXIT_USAGE;
    cli_option common_table[COMMON_OPTIONS];
    const cli_option table[] = {
        {0, "ctx", CLI_U32, &o.n_ctx, "N",
         "tell what a context of N tokens needs; 0: the default of\n`moe run`", NULL},
        {0, "cache", CLI_CHOICE, &o.cache, "TYPE", "type of the key/value cache", cache_names},
        {0, "tensors", CLI_FLAG, &o.tensors, NULL, "list every tensor", NULL},
        {0, "metadata", CLI_FLAG, &o.metadata, NULL, "list the file's metadata", NULL},
        {0, "json", CLI_FLAG, &o.json, NULL, "print one JSON object", NULL},
        {0},
    };
    const cli_option *tables[] = {table, common_options(&o.common, common_table), NULL};
    const char *path[1];
    int status;
    if (!cli_parse(&verb_info, tables, argc, argv, path, &status))
        return status;
    info_file file = {.model = NULL};
    status = info_open(&file, path[0], &o);
    if (status == EXIT_OK && !file.cannot_run)
        status = info_estimate(&file, &o);
    if (status == EXIT_OK) {
        info_sum_types(&file);
        if (o.json)
            info_json(&file, path[0], &o);
        else
            info_text(&file, path[0], &o);
    }
    free(file.types);
    moe_model_close(file.model);
    return status;
}

const cli_verb verb_info = {
    "info", "MODEL", "shows a model's sizes and the memory that it needs",
    "Tells the hyperparameters, how the weights are stored, the memory for a context of --ctx\n"
    "tokens, and whether that fits into this machine (or under --memory-limit).",
    "  moe info model.gguf\n"
    "  moe info model.gguf --ctx 32768 --cache q8_0 --memory-limit 4G\n"
    "  moe info model.gguf --json --tensors | jq '.tensors[] | select(.type == \"F32\") | .name'\n",
    1, info_main};
