/* tests/checkpoint_make.h - checkpoints for the converter's tests: small ones made in memory, and
 * copies of the committed ones with one thing changed; conversions of them.
 *
 * The test program calls scratch_begin() first. */
#ifndef MOE_TESTS_CHECKPOINT_MAKE_H
#define MOE_TESTS_CHECKPOINT_MAKE_H

#include "converter.h"
#include "scratch.h"

/* Converts, with all else as it is without options. */
MOE_UNUSED static moe_status convert(const char *source, const char *out, const char *quant,
                                     moe_error *error)
{
    const conv_options options = {.source = source, .out = out, .quant = quant, .n_threads = 2};
    return convert_with(&options, error);
}

/* A conversion must fail with this status, say this, and leave nothing. */
MOE_UNUSED static void refused_conversion(const conv_options *options, moe_status status,
                                          const char *says)
{
    char partial[700];
    moe_error error = {0};
    snprintf(partial, sizeof partial, "%s.partial", options->out);
    const double start = test_cpu_ms();
    moe_status got = convert_with(options, &error);
    CHECK(got == status, "expected %s, got %s: %s", moe_status_name(status), moe_status_name(got),
          error.message);
    CHECK(strstr(error.message, says), "expected \"%s\" in: %s", says, error.message);
    CHECK(!scratch_exists(options->out) && !scratch_exists(partial), "%s is left", options->out);
    CHECK(test_cpu_ms() - start < 1e3 * test_slowness(), "it took too long");
}

/* ------------------------------------------------------------------------- small checkpoints -- */

/* A byte-level vocabulary: all bytes, "th", "the", "in" and one that nothing makes; `pre` is its
 * pre-tokenizer. */
MOE_UNUSED static char *make_tokenizer(const char *pre)
{
    static const char merges[] = "}, \"merges\": [[\"t\", \"h\"], \"th e\", \"i n\"]}}";
    char *text = malloc(1 << 16), *p = text;
    uint32_t id = 0;
    p += sprintf(p,
                 "{\"added_tokens\": [{\"id\": 260, \"content\": \"<|end|>\", \"special\": true}],"
                 "\"normalizer\": {\"type\": \"NFC\"}, \"pre_tokenizer\": %s, "
                 "\"post_processor\": null,"
                 "\"decoder\": {\"type\": \"ByteLevel\"}, "
                 "\"model\": {\"type\": \"BPE\", \"vocab\": {",
                 pre);
    for (uint32_t c = 0x21; c < 0x144; c++) {
        uint8_t utf8[4];
        if (bytelevel_byte(c) < 0)
            continue;
        const size_t n = utf8_encode(c, utf8);
        p += sprintf(p, "\"%s%.*s\": %u, ", c == '"' || c == '\\' ? "\\" : "", (int)n,
                     (const char *)utf8, id++);
    }
    p += sprintf(p, "\"th\": 256, \"the\": 257, \"in\": 258, \"x\\u0120y\": 259%s", merges);
    return text;
}

MOE_UNUSED static const char pre_gpt2[] =
    "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": true}";

/* A checkpoint of one layer whose tensors are all zero but for norms. */
MOE_UNUSED static void make_small(const char *folder, uint32_t n_vocab)
{
    static const char *const square[] = {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
    char header[4096], config[512];
    uint64_t at = 0, n = 0;
    mkdir(folder, 0777);
    n += (uint64_t)sprintf(header + n,
                           "{\"model.embed_tokens.weight\": {\"dtype\": \"F32\", \"shape\": "
                           "[%u, 4], \"data_offsets\": [0, %u]}", n_vocab, 16 * n_vocab);
    at = 16 * n_vocab;
    static const char *const norms[] = {"model.norm", "model.layers.0.input_layernorm",
                                        "model.layers.0.post_attention_layernorm"};
    for (size_t i = 0; i < MOE_COUNT(norms); i++, at += 16)
        n += (uint64_t)sprintf(header + n, ", \"%s.weight\": {\"dtype\": \"F32\", \"shape\": [4], "
                               "\"data_offsets\": [%llu, %llu]}", norms[i], (unsigned long long)at,
                               (unsigned long long)at + 16);
    for (size_t i = 0; i < MOE_COUNT(square); i++, at += 64)
        n += (uint64_t)sprintf(header + n, ", \"model.layers.0.%s.weight\": {\"dtype\": \"F32\", "
                               "\"shape\": [4, 4], \"data_offsets\": [%llu, %llu]}", square[i],
                               (unsigned long long)at, (unsigned long long)at + 64);
    n += (uint64_t)sprintf(header + n, "}");
    char *file = calloc(1, 8 + n + at), path[700];
    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    scratch_write(path, file, 8 + n + at);
    free(file);
    snprintf(config, sizeof config,
             "{\"model_type\": \"llama\", \"vocab_size\": %u, \"hidden_size\": 4, "
             "\"intermediate_size\": 4, \"num_hidden_layers\": 1, \"num_attention_heads\": 2, "
             "\"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-5, "
             "\"auto_map\": {\"AutoModel\": \"evil.Model\"}, \"tie_word_embeddings\": true, "
             "\"rope_scaling\": null, \"bos_token_id\": null, \"eos_token_id\": [260, 257]}",
             n_vocab);
    snprintf(path, sizeof path, "%s/config.json", folder);
    scratch_write_text(path, config);
}

/* A checkpoint whose tokenizer is tests/data/spm_NAME.model. */
MOE_UNUSED static bool make_small_spm(const char *folder, const char *name, uint32_t n_vocab)
{
    char path[700];
    size_t bytes;
    snprintf(path, sizeof path, "%s/data/spm_%s.model", test_root(), name);
    char *model = test_read_file(path, &bytes);
    if (!model)
        return false;
    make_small(folder, n_vocab);
    snprintf(path, sizeof path, "%s/tokenizer.model", folder);
    scratch_write(path, model, bytes);
    free(model);
    return true;
}

/* ----------------------------------------------------------------------- changed checkpoints -- */

/* A copy of a checkpoint of one shard in which `to` stands for the first `from` of `file`, which is
 * one of its two; a header of safetensors keeps its length. */
MOE_UNUSED static const char *edited_checkpoint(const char *name, const char *file,
                                                const char *from, const char *to)
{
    static const char *const files[] = {"config.json", "model.safetensors"};
    static char folder[600];
    snprintf(folder, sizeof folder, "%s", scratch_path("edited"));
    mkdir(folder, 0700);
    for (size_t i = 0; i < MOE_COUNT(files); i++) {
        char path[700];
        size_t bytes = 0, at = 0;
        const size_t n_from = strlen(from), n_to = strlen(to);
        snprintf(path, sizeof path, "%s/%s", checkpoint(name), files[i]);
        char *data = test_read_file(path, &bytes), *edited = calloc(1, bytes + n_to + 1);
        CHECK(data && edited, "%s", path);
        while (at + n_from <= bytes && memcmp(data + at, from, n_from))
            at++;
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        if (strcmp(files[i], file)) {
            scratch_write(path, data, bytes);
        } else if (at + n_from <= bytes) {
            CHECK(n_from == n_to || !i, "the header has another length");
            memcpy(edited, data, at);
            memcpy(edited + at, to, n_to);
            memcpy(edited + at + n_to, data + at + n_from, bytes - at - n_from);
            scratch_write(path, edited, bytes + n_to - n_from);
        } else {
            CHECK(false, "no %s in %s of %s", from, file, name);
        }
        free(edited);
        free(data);
    }
    return folder;
}

/* Writes over the bytes of a tensor, from its byte `at` on, in a checkpoint of one shard. */
MOE_UNUSED static void overwrite_tensor(const char *folder, const char *tensor, size_t at,
                                        const void *value, size_t value_bytes)
{
    char path[700];
    size_t bytes;
    uint64_t header;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    char *data = test_read_file(path, &bytes);
    const char *entry = data ? strstr(data + 8, tensor) : NULL;
    const char *offsets = entry ? strstr(entry, "data_offsets") : NULL;
    CHECK(offsets, "no %s in %s", tensor, path);
    if (offsets) {
        memcpy(&header, data, sizeof header);
        memcpy(data + 8 + header + strtoul(strchr(offsets, '[') + 1, NULL, 10) + at, value,
               value_bytes);
        scratch_write(path, data, bytes);
    }
    free(data);
}

#endif
