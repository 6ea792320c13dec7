/* tests/test_convert_refuses.c - what the converter refuses: damaged and lying files of every kind
 * that a checkpoint has, configs that contradict them, weights that are no numbers. It must say
 * what is wrong, in little time, and leave nothing.
 *
 * Everything is written into a folder of its own below $TMPDIR, which is removed at the end. */
#include "test.h"

#if defined MOE_NO_TEXT || defined MOE_NO_ZSTD
TEST_PROGRAM(convert_refuses)
{
}
#else

#include "checkpoint_make.h"

#include <sys/resource.h>

/* A damaged GGUF file is refused in the loader's words. */
static void gguf_damage_is_refused(void)
{
    char source[500];
    size_t bytes;
    snprintf(source, sizeof source, "%s/fixtures/qwen3.gguf", test_root());
    char *data = test_read_file(source, &bytes);
    const char *cut = scratch_path("cut.gguf");
    const conv_options o = {.source = cut, .out = scratch_path("o.gguf")};
    REQUIRE(data, "%s", source);
    scratch_write(cut, data, bytes - 1000);
    refused_conversion(&o, MOE_ERR_FORMAT, "cut off");
    scratch_write(cut, "GGUF", 4);
    refused_conversion(&o, MOE_ERR_FORMAT, "version");
    scratch_write(cut, "", 0);
    refused_conversion(&o, MOE_ERR_FORMAT, ": magic: "); // behind the name of the file
    unlink(cut);
    refused_conversion(&o, MOE_ERR_IO, "no such");
    free(data);
}

/* -------------------------------------------------------------------------------- tokenizers -- */

/* Patterns that no name stands for are refused, not replaced by others. */
static void unknown_patterns_are_refused(void)
{
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("tok2"));
    make_small(folder, 261);
    // it splits "the", or it would make no difference
    char *text = make_tokenizer(
        "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", "
        "\"pattern\": {\"Regex\": "
        "\"[a-e]|[f-z]+\"}, \"behavior\": \"Isolated\", \"invert\": false}, {\"type\": "
        "\"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}]}");
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    scratch_write_text(path, text);
    const conv_options o = {.source = folder, .out = scratch_path("t2.gguf")};
    refused_conversion(&o, MOE_ERR_UNSUPPORTED, "--pre NAME");
    free(text);
}

/* T: more tokens than rows, ids out of range. */
static void tokenizers_that_contradict_the_model_are_refused(void)
{
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("tok3"));
    const conv_options o = {.source = folder, .out = scratch_path("t3.gguf")};
    make_small(folder, 200);
    char *text = make_tokenizer(pre_gpt2);
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    scratch_write_text(path, text);
    refused_conversion(&o, MOE_ERR_MODEL, "at most 200 tokens");
    make_small(folder, 261);
    scratch_write_text(path, "{\"model\": 3}");
    refused_conversion(&o, MOE_ERR_FORMAT, "vocab");
    scratch_write_text(path, text);
    snprintf(path, sizeof path, "%s/generation_config.json", folder);
    scratch_write_text(path, "{\"eos_token_id\": 4000000000}");
    refused_conversion(&o, MOE_ERR_MODEL, "eos_token_id");
    scratch_write_text(path, "{\"temperature\": \"hot\"}");
    refused_conversion(&o, MOE_ERR_MODEL, "temperature");
    free(text);
}

/* Reads bytes of which a sanitizer guards the end, and says what came of it. */
static moe_status spm_read(const void *data, size_t bytes, moe_error *error)
{
    sp_model m;
    sp_piece pieces[490] = {{.score = 0}};
    char *exact = malloc(bytes ? bytes : 1);
    memcpy(exact, data, bytes);
    *error = (moe_error){0};
    const moe_status status = sp_read(&m, pieces, 490, exact, bytes, error);
    CHECK(!status || error->message[0], "no message");
    free(exact);
    return status;
}

static void lying_sentencepiece_models_are_refused(void)
{
    static const struct {
        const char *what, *says;
        size_t bytes;
        char data[24];
        moe_status status;
    } lies[] = {
        {"nothing", "a model of SentencePiece", 0, "", MOE_ERR_FORMAT},
        {"tiktoken", "a model of SentencePiece", 7, "IQ== 0\n", MOE_ERR_FORMAT},
        {"a length of 2^63", "a model of SentencePiece", 12,
         "\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01\x00", MOE_ERR_FORMAT},
        {"a length behind the end", "a model of SentencePiece", 4, "\x0a\x03\x0a\x01",
         MOE_ERR_FORMAT},
        {"a number of 11 bytes", "a model of SentencePiece", 13,
         "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", MOE_ERR_FORMAT},
        {"a group", "a model of SentencePiece", 2, "\x0b\x0c", MOE_ERR_FORMAT},
        {"field 0", "a model of SentencePiece", 2, "\x00\x00", MOE_ERR_FORMAT},
        {"a piece inside of which a length lies", "a model of SentencePiece", 4, "\x0a\x02\x0a\x7f",
         MOE_ERR_FORMAT},
        {"a piece without a text", "1 to 65535 bytes for token 0", 2, "\x0a\x00", MOE_ERR_FORMAT},
        {"a text that is no UTF-8", "UTF-8", 5, "\x0a\x03\x0a\x01\xff", MOE_ERR_FORMAT},
        {"a text with NUL", "UTF-8", 6, "\x0a\x04\x0a\x02\x61\x00", MOE_ERR_FORMAT},
        {"kind 9", "a kind from 1 to 6", 7, "\x0a\x05\x0a\x01\x61\x18\x09", MOE_ERR_FORMAT},
        {"a byte that is none", "a kind from 1 to 6", 7, "\x0a\x05\x0a\x01\x61\x18\x06",
         MOE_ERR_FORMAT},
        {"a score that is no number", "a finite score", 10,
         "\x0a\x08\x0a\x01\x61\x15\x00\x00\xc0\x7f", MOE_ERR_FORMAT},
        {"words", "a unigram (1) or a BPE model (2), got kind 3", 9,
         "\x0a\x03\x0a\x01\x61\x12\x02\x18\x03", MOE_ERR_UNSUPPORTED},
        {"spaces behind words", "treat_whitespace_as_suffix", 10,
         "\x0a\x03\x0a\x01\x61\x12\x03\xc0\x01\x01", MOE_ERR_UNSUPPORTED},
        {"spaces that stay", "escape_whitespaces", 9, "\x0a\x03\x0a\x01\x61\x1a\x02\x28\x00",
         MOE_ERR_UNSUPPORTED}};
    moe_error error = {0};
    char folder[600], path[700];
    for (size_t i = 0; i < MOE_COUNT(lies); i++) {
        const moe_status status = spm_read(lies[i].data, lies[i].bytes, &error);
        CHECK(status == lies[i].status && strstr(error.message, lies[i].says), "%s: %s: %s",
              lies[i].what, moe_status_name(status), error.message);
    }
    snprintf(folder, sizeof folder, "%s", scratch_path("spm_lies"));
    const conv_options o = {.source = folder, .out = scratch_path("spm_lies.gguf")};
    REQUIRE(make_small_spm(folder, "unigram", 479), "no model");
    refused_conversion(&o, MOE_ERR_MODEL, "at most 479 tokens, one for each row");
    make_small_spm(folder, "unigram", 480);
    snprintf(path, sizeof path, "%s/added_tokens.json", folder);
    scratch_write_text(path, "{\"<extra>\": 1e300}");
    refused_conversion(&o, MOE_ERR_FORMAT, "added tokens");
    snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
    scratch_write_text(path, "{\"added_tokens_decoder\": {\"7x\": {\"content\": \"a\"}}}");
    refused_conversion(&o, MOE_ERR_FORMAT, "added tokens");
}

/* JSON files that hold something else than an object, which each reader must do without. */
static void json_that_is_no_object_is_refused(void)
{
    static const char *const names[] = {"config.json", "generation_config.json",
                                        "chat_template.json", "added_tokens.json",
                                        "tokenizer_config.json", "tokenizer.json",
                                        "model.safetensors.index.json"};
    static const char *const texts[] = {"[{\"a\": 1}]", "\"a\"", "null"};
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("no_object"));
    REQUIRE(make_small_spm(folder, "unigram", 480), "no model");
    const conv_options o = {.source = folder, .out = scratch_path("no_object.gguf")};
    for (size_t i = 0; i < MOE_COUNT(names); i++)
        for (size_t k = 0; k < MOE_COUNT(texts); k++) {
            size_t bytes;
            snprintf(path, sizeof path, "%s/%s", folder, names[i]);
            char *old = test_read_file(path, &bytes);
            scratch_write_text(path, texts[k]);
            refused_conversion(&o, MOE_ERR_FORMAT, "expected a JSON object");
            unlink(path);
            if (old)
                scratch_write(path, old, bytes);
            free(old);
        }
}

/* Cut at every byte, and with changed bytes: an error or a success, nothing else. */
static void damaged_sentencepiece_models_are_harmless(void)
{
    char path[700];
    moe_error error;
    size_t bytes;
    uint32_t n_good = 0, n_bad = 0;
    snprintf(path, sizeof path, "%s/data/spm_unigram.model", test_root());
    char *data = test_read_file(path, &bytes);
    REQUIRE(data, "%s", path);
    for (size_t n = 0; n < bytes; n++)
        n_bad += spm_read(data, n, &error) != MOE_OK;
    CHECK(n_bad > bytes / 2, "%u cuts refused", n_bad);
    for (int i = 0; i < 4000; i++) {
        const size_t at = test_random() % bytes;
        const char old = data[at];
        data[at] = (char)test_random();
        if (spm_read(data, bytes, &error))
            n_bad++;
        else
            n_good++;
        data[at] = old;
    }
    CHECK(n_good > 100, "%u changes are harmless", n_good);
    free(data);
}

/* ----------------------------------------------------------------------- hostile safetensors -- */

/* Writes a file with this header and data_bytes bytes of zeros. */
static void write_safetensors(const char *path, const char *header, size_t data_bytes)
{
    const uint64_t n = strlen(header);
    char *file = calloc(1, 8 + n + data_bytes);
    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    scratch_write(path, file, 8 + n + data_bytes);
    free(file);
}

#define T(name, dtype, shape, from, to)                                                            \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", " \
    "\"data_offsets\": [" from ", " to "]}"

static void lying_headers_are_refused(void)
{
    static const struct {
        const char *id, *header;
        size_t data_bytes;
        moe_status status;
        const char *says;
    } cases[] = {
        {"S4 not UTF-8", "{\"\xff\": 1}", 0, MOE_ERR_FORMAT, "UTF-8"},
        {"S5 not JSON", "hello", 0, MOE_ERR_FORMAT, "JSON"},
        {"S5 no object", "[1, 2]", 0, MOE_ERR_FORMAT, "object"},
        {"S5 comment", "{} // no", 0, MOE_ERR_FORMAT, "JSON"},
        {"S7 twice", "{" T("a", "F32", "[1]", "0", "4") ", " T("a", "F32", "[1]", "4", "8") "}", 8,
         MOE_ERR_FORMAT, "twice"},
        {"S8 inverted", "{" T("a", "F32", "[1]", "4", "0") "}", 4, MOE_ERR_FORMAT, "in order"},
        {"S9 overlap", "{" T("a", "F32", "[2]", "0", "8") ", " T("b", "F32", "[1]", "4", "8") "}",
         8, MOE_ERR_FORMAT, "overlaps"},
        {"S9 same place",
         "{" T("a", "F32", "[1]", "0", "4") ", " T("b", "F32", "[1]", "0", "4") "}", 4,
         MOE_ERR_FORMAT, "overlaps"},
        {"S10 hole", "{" T("a", "F32", "[1]", "0", "4") ", " T("b", "F32", "[1]", "8", "12") "}",
         12, MOE_ERR_FORMAT, "a hole"},
        {"S10 hole in front", "{" T("a", "F32", "[1]", "4", "8") "}", 8, MOE_ERR_FORMAT, "a hole"},
        {"S10 tail", "{" T("a", "F32", "[1]", "0", "4") "}", 5, MOE_ERR_FORMAT, "belong to none"},
        {"S11 too small", "{" T("a", "F32", "[3]", "0", "8") "}", 8, MOE_ERR_FORMAT, "do not fit"},
        {"S11 wrong dtype", "{" T("a", "F16", "[2]", "0", "8") "}", 8, MOE_ERR_FORMAT,
         "do not fit"},
        {"S12 wraps", "{" T("a", "F32", "[4294967296, 4294967296]", "0", "4") "}", 4,
         MOE_ERR_FORMAT, "64 bits"},
        {"S12 bytes wrap", "{" T("a", "F32", "[4611686018427387904]", "0", "0") "}", 0,
         MOE_ERR_FORMAT, "2^53"},
        {"S12 bytes wrap", "{" T("a", "F32", "[2147483648, 2147483648]", "0", "0") "}", 0,
         MOE_ERR_FORMAT, "do not fit"},
        {"S13 negative", "{" T("a", "F32", "[-1]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 1e300", "{" T("a", "F32", "[1e300]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 2^53+1", "{" T("a", "F32", "[9007199254740993]", "0", "4") "}", 4, MOE_ERR_FORMAT,
         "2^53"},
        {"S13 fraction", "{" T("a", "F32", "[1.5]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 text", "{" T("a", "F32", "[\"1\"]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 offset", "{" T("a", "F32", "[1]", "-4", "0") "}", 4, MOE_ERR_FORMAT, "data_offsets"},
        {"S14 dtype", "{" T("a", "Q4_0", "[1]", "0", "4") "}", 4, MOE_ERR_UNSUPPORTED, "Q4_0"},
        {"past the end", "{" T("a", "F32", "[2]", "0", "8") "}", 4, MOE_ERR_FORMAT, "cut off"},
        {"no shape", "{\"a\": {\"dtype\": \"F32\", \"data_offsets\": [0, 4]}}", 4, MOE_ERR_FORMAT,
         "shape"},
        {"9 dimensions", "{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, MOE_ERR_FORMAT,
         "dimensions"},
        {"not an object", "{\"a\": 3}", 0, MOE_ERR_FORMAT, "object"},
        {"empty name", "{" T("", "F32", "[1]", "0", "4") "}", 4, MOE_ERR_FORMAT, "name"},
        {"NUL in a name", "{" T("a\\u0000b", "F32", "[1]", "0", "4") "}", 4, MOE_ERR_FORMAT,
         "name"},
        {"nothing", "{}", 0, MOE_ERR_MODEL, "embed_tokens"},
    };
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("bad"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    const conv_options o = {.source = folder, .out = scratch_path("bad.gguf")};
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        const int failures = test_failures;
        write_safetensors(path, cases[i].header, cases[i].data_bytes);
        refused_conversion(&o, cases[i].status, cases[i].says);
        if (test_failures != failures)
            printf("  in case %s\n", cases[i].id);
    }
    uint64_t huge = 1000; // S1, S2, S3, S6
    scratch_write(path, "1234567", 7);
    refused_conversion(&o, MOE_ERR_FORMAT, "too few");
    scratch_write(path, "", 0);
    refused_conversion(&o, MOE_ERR_FORMAT, "too few");
    scratch_write(path, &huge, 8);
    refused_conversion(&o, MOE_ERR_FORMAT, "within");
    huge = UINT64_MAX;
    scratch_write(path, &huge, 8);
    refused_conversion(&o, MOE_ERR_FORMAT, "within");
    char *deep = malloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = 0;
    write_safetensors(path, deep, 0);
    refused_conversion(&o, MOE_ERR_FORMAT, "nested");
    free(deep);
    huge = ST_MAX_HEADER_BYTES + 1ull;
    scratch_write(path, &huge, 8);
    CHECK(!truncate(path, 8 + ST_MAX_HEADER_BYTES + 1ll), "truncate");
    refused_conversion(&o, MOE_ERR_LIMIT, "at most 100000000");
    unlink(path);
    refused_conversion(&o, MOE_ERR_IO, "model.safetensors");
}

/* S15: a small header cannot name more tensors than there are bytes, and names for the same bytes
 * are an overlap. */
static void aliases_are_refused(void)
{
    char folder[600], path[700];
    enum { N = 300000 };
    snprintf(folder, sizeof folder, "%s", scratch_path("alias"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    const conv_options o = {.source = folder, .out = scratch_path("alias.gguf")};
    char *header = malloc((size_t)N * 80), *p = header;
    *p++ = '{';
    for (int i = 0; i < N; i++)
        p += sprintf(p, "%s\"%d\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}",
                     i ? "," : "", i);
    strcpy(p, "}");
    write_safetensors(path, header, 4);
    refused_conversion(&o, MOE_ERR_LIMIT, "at most 262144 tensors");
    free(header);
}

static void write_index(const char *folder, const char *map)
{
    char path[700], text[2000];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    snprintf(text, sizeof text, "{\"weight_map\": %s}", map);
    scratch_write_text(path, text);
}

/* S16, S17: shards elsewhere, a tensor in two of them, one that is not where the index says. */
static void lying_indexes_are_refused(void)
{
    char folder[600], path[700], other[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("shards"));
    make_small(folder, 8);
    const conv_options o = {.source = folder, .out = scratch_path("shards.gguf")};
    static const char *const outside[] = {"../secret", "/etc/passwd", "a/../../b", "..", ".", "",
                                          "a\\\\b"};
    for (size_t i = 0; i < MOE_COUNT(outside); i++) {
        char map[200];
        snprintf(map, sizeof map, "{\"a\": \"%s\"}", outside[i]);
        write_index(folder, map);
        refused_conversion(&o, MOE_ERR_FORMAT, "weight_map");
    }
    snprintf(path, sizeof path, "%s/link.safetensors", folder);
    snprintf(other, sizeof other, "%s", scratch_path("outside.safetensors"));
    write_safetensors(other, "{" T("a", "F32", "[1]", "0", "4") "}", 4);
    CHECK(!symlink(other, path), "symlink");
    write_index(folder, "{\"a\": \"link.safetensors\"}");
    refused_conversion(&o, MOE_ERR_FORMAT, "link that leaves");
    unlink(path);
    for (int i = 1; i <= 2; i++) {
        snprintf(path, sizeof path, "%s/%d.safetensors", folder, i);
        write_safetensors(path, "{" T("a", "F32", "[1]", "0", "4") "}", 4);
    }
    write_index(folder, "{\"a\": \"1.safetensors\", \"b\": \"2.safetensors\"}");
    refused_conversion(&o, MOE_ERR_FORMAT, "in one shard");
    write_index(folder, "{\"a\": \"1.safetensors\", \"b\": \"1.safetensors\"}");
    refused_conversion(&o, MOE_ERR_FORMAT, "b: ");
    write_index(folder, "{\"a\": \"3.safetensors\"}");
    refused_conversion(&o, MOE_ERR_IO, "3.safetensors");
    write_index(folder, "{\"a\": 7}");
    refused_conversion(&o, MOE_ERR_FORMAT, "weight_map");
    write_index(folder, "[]");
    refused_conversion(&o, MOE_ERR_FORMAT, "weight_map");
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    scratch_write_text(path, "null");
    refused_conversion(&o, MOE_ERR_FORMAT, "object");
}

/* ----------------------------------------------------------------------------------- configs -- */

/* S18, M: the config is no object, or says what cannot be, or contradicts the tensors. */
static void lying_configs_are_refused(void)
{
    static const struct {
        const char *config;
        moe_status status;
        const char *says;
    } cases[] = {
        {"null", MOE_ERR_FORMAT, "object"},
        {"\"llama\"", MOE_ERR_FORMAT, "object"},
        {"{\"model_type\": NaN}", MOE_ERR_FORMAT, "JSON"},
        {"{}", MOE_ERR_MODEL, "model_type"},
        {"{\"model_type\": \"gpt9\"}", MOE_ERR_UNSUPPORTED, "gpt9"},
        {"{\"model_type\": 7}", MOE_ERR_UNSUPPORTED, "model_type"},
    };
    static const struct {
        const char *from, *to;
        moe_status status;
        const char *says;
    } edits[] = {
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": 1000000000", MOE_ERR_MODEL,
         "num_hidden_layers"},
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": 0", MOE_ERR_MODEL, "block_count"},
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2", MOE_ERR_MODEL, "model.layers.1."},
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": \"1\"", MOE_ERR_MODEL,
         "num_hidden_layers"},
        {"\"num_attention_heads\": 2", "\"num_attention_heads\": 0", MOE_ERR_MODEL,
         "num_attention_heads"},
        {"\"num_attention_heads\": 2", "\"num_attention_heads\": 3", MOE_ERR_MODEL,
         "num_attention_heads"},
        {"\"hidden_size\": 4", "\"hidden_size\": 8", MOE_ERR_MODEL, "expected shape"},
        {"\"hidden_size\": 4", "\"hidden_size\": -4", MOE_ERR_MODEL, "hidden_size"},
        {"\"hidden_size\": 4", "\"hidden_size\": 4.5", MOE_ERR_MODEL, "hidden_size"},
        {"\"intermediate_size\": 4", "\"intermediate_size\": 5", MOE_ERR_MODEL, "gate_proj"},
        {"\"vocab_size\": 8", "\"vocab_size\": 9", MOE_ERR_MODEL, "vocab_size"},
        {"1e-5", "\"small\"", MOE_ERR_MODEL, "rms_norm_eps"},
        {"1e-5", "7", MOE_ERR_MODEL, "rms_norm_eps"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"magic\"}", MOE_ERR_UNSUPPORTED,
         "magic"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", MOE_ERR_MODEL,
         "factor"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8}",
         MOE_ERR_MODEL, "low_freq_factor"},
        {"\"rope_scaling\": null", "\"hidden_act\": \"relu\"", MOE_ERR_UNSUPPORTED, "relu"},
        {"\"model_type\": \"llama\"", "\"model_type\": \"mistral\", \"sliding_window\": -1",
         MOE_ERR_MODEL, "sliding_window"},
        {"\"model_type\": \"llama\"",
         "\"model_type\": \"qwen3\", \"use_sliding_window\": true, \"sliding_window\": 3, "
         "\"layer_types\": [\"sliding_attention\", \"chunked_attention\"]", MOE_ERR_UNSUPPORTED,
         "chunked_attention"},
        {"\"model_type\": \"llama\"",
         "\"model_type\": \"glm4_moe_lite\", \"mlp_layer_types\": [\"dense\", \"dense\"]",
         MOE_ERR_MODEL, "mlp_layer_types"},
        {"\"rope_scaling\": null",
         "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2, \"truncate\": 1}", MOE_ERR_MODEL,
         "truncate"},
        {"\"rope_scaling\": null", "\"num_local_experts\": 4, \"num_experts_per_tok\": 9",
         MOE_ERR_MODEL, "num_experts_per_tok"},
        {"\"rope_scaling\": null", "\"num_local_experts\": 4, \"num_experts_per_tok\": 2",
         MOE_ERR_MODEL, "block_sparse_moe"},
        {"\"rope_scaling\": null", "\"quantization_config\": {\"quant_method\": \"gptq\"}",
         MOE_ERR_UNSUPPORTED, "gptq"},
        {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", MOE_ERR_MODEL,
         "lm_head.weight"},
        {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": \"yes\"", MOE_ERR_MODEL,
         "tie_word_embeddings: expected true or false, got yes"},
        {"\"vocab_size\": 8", "\"vocab_size\": [8]", MOE_ERR_MODEL, "vocab_size"},
        {"\"rope_scaling\": null", "\"attention_bias\": true", MOE_ERR_MODEL, "attention_bias"},
        {"\"rope_scaling\": null", "\"mlp_bias\": true", MOE_ERR_MODEL, "mlp_bias"},
        {"\"rope_scaling\": null", "\"mlp_bias\": 0", MOE_ERR_MODEL, "mlp_bias"},
        {"\"rope_scaling\": null", "\"rope_scaling\": \"yarn\"", MOE_ERR_MODEL,
         "rope_scaling: expected an object, got yarn"},
        {"\"rope_scaling\": null", "\"rope_parameters\": []", MOE_ERR_MODEL, "rope_parameters"},
        {"\"rope_scaling\": null", "\"rope_parameters\": {\"full_attention\": 1}", MOE_ERR_MODEL,
         "rope_parameters.full_attention"},
        {"\"rope_scaling\": null", "\"layer_types\": [\"full_attention\", \"full_attention\"]",
         MOE_ERR_MODEL, "layer_types: expected a list with an item for each"},
        {"\"rope_scaling\": null", "\"layer_types\": \"full_attention\"", MOE_ERR_MODEL,
         "layer_types"},
        {"\"rope_scaling\": null", "\"mlp_only_layers\": [1]", MOE_ERR_MODEL, "mlp_only_layers"},
        {"\"rope_scaling\": null", "\"mlp_only_layers\": 0", MOE_ERR_MODEL, "mlp_only_layers"},
        {"\"rope_scaling\": null", "\"decoder_sparse_step\": \"1\"", MOE_ERR_MODEL,
         "decoder_sparse_step"},
        {"\"rope_scaling\": null", "\"sliding_window\": 2.5", MOE_ERR_MODEL, "sliding_window"},
        {"\"model_type\": \"llama\"", "\"model_type\": \"deepseek_v2\", \"topk_method\": \"x\"",
         MOE_ERR_UNSUPPORTED, "topk_method"},
    };
    char folder[600], path[700], config[1500];
    snprintf(folder, sizeof folder, "%s", scratch_path("config"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/config.json", folder);
    const conv_options o = {.source = folder, .out = scratch_path("config.gguf")};
    size_t bytes;
    char *good = test_read_file(path, &bytes);
    REQUIRE(good, "%s", path);
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        scratch_write_text(path, cases[i].config);
        refused_conversion(&o, cases[i].status, cases[i].says);
    }
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const char *at = strstr(good, edits[i].from);
        REQUIRE(at, "%s", edits[i].from);
        snprintf(config, sizeof config, "%.*s%s%s", (int)(at - good), good, edits[i].to,
                 at + strlen(edits[i].from));
        scratch_write_text(path, config);
        refused_conversion(&o, edits[i].status, edits[i].says);
    }
    unlink(path);
    refused_conversion(&o, MOE_ERR_IO, "config.json");
    scratch_write_text(path, good); // S19: auto_map is there and does nothing
    moe_error error = {0};
    CHECK(!convert(folder, o.out, NULL, &error), "%s", error.message);
    unlink(o.out);
    free(good);
}

static void configs_that_contradict_the_tensors_are_refused(void)
{
    static const char *const edits[][4] = {
        {"gemma4", "\"attention_k_eq_v\": true", "\"attention_k_eq_v\": false",
         "v_proj.weight: expected this tensor, since config.json says attention_k_eq_v false"},
        {"llama-bias", "\"attention_bias\": true", "\"attention_bias\": false",
         "attention_bias: expected no biases, since this is false, got model.layers.0.self_attn."},
        {"qwen3", "\"attention_bias\": false", "\"attention_bias\": true",
         "attention_bias: expected biases, since this is true, got no tensor"},
        {"gpt-oss-mxfp4", "\"sliding_attention\",", "",
         "layer_types: expected a list with an item for each of num_hidden_layers layers"},
    };
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const conv_options o = {.source = edited_checkpoint(edits[i][0], "config.json",
                                                            edits[i][1], edits[i][2]),
                                .out = scratch_path("edited.gguf")};
        refused_conversion(&o, MOE_ERR_MODEL, edits[i][3]);
    }
    const conv_options o = {.source = edited_checkpoint("gemma4", "config.json",
                                                        "\"enable_moe_block\": true",
                                                        "\"enable_moe_block\": false"),
                            .out = scratch_path("edited.gguf")};
    refused_conversion(&o, MOE_ERR_UNSUPPORTED, "num_experts");
}

/* Neither may a tensor that the model has be missing, nor one that it does not have be left out. */
static void missing_and_unused_tensors_are_refused(void)
{
    conv_options o = {.out = scratch_path("unused.gguf")};
    o.source = edited_checkpoint("llama", "model.safetensors", "model.norm.weight",
                                 "model.nom2.weight");
    refused_conversion(&o, MOE_ERR_MODEL, "model.norm.weight: expected this tensor");
    o.source = edited_checkpoint("llama", "config.json", "\"num_hidden_layers\": 2",
                                 "\"num_hidden_layers\": 1");
    refused_conversion(&o, MOE_ERR_MODEL, "model.layers.1.");
}

static void packed_experts_that_lie_are_refused(void)
{
    static const char *const edits[][3] = {
        {"up_proj_scales", "up_proj_scalez", "gate_up_proj_scales: expected this tensor"},
        {"up_proj_blocks", "up_proj_blockz", "gate_up_proj_blocks: expected this tensor"},
        {"[4,64,2,16]", "[4,64,16,2]",
         "expected shape [4, 64, 2, 16] by config.json, got [4, 64, 16, 2]"},
        {"[4,64,2]", "[4,32,4]", "expected shape [4, 64, 2] by config.json, got [4, 32, 4]"},
    };
    conv_options o = {.out = scratch_path("packed.gguf")};
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        o.source = edited_checkpoint("gpt-oss-mxfp4", "model.safetensors", edits[i][0],
                                     edits[i][1]);
        refused_conversion(&o, MOE_ERR_MODEL, edits[i][2]);
    }
    o.source = edited_checkpoint("gpt-oss-mxfp4", "config.json", "", "");
    overwrite_tensor(o.source, "layers.1.mlp.experts.down_proj_scales", 0, "\xff", 1);
    refused_conversion(&o, MOE_ERR_MODEL,
                       "blk.1.ffn_down_exps.weight: expected finite weights, got an exponent of "
                       "255 at row 0");
}

/* Tensors of packed codes that are missing, of another dtype or shape, or that the runtime cannot
 * make weights of; in the header of the safetensors file. */
static void packed_tensors_that_lie_are_refused(void)
{
#define EXPERT "layers.0.mlp.experts.0.up_proj."
#define ATTN "layers.0.self_attn.q_proj."
    static const struct {
        const char *checkpoint, *from, *to, *says;
        moe_status status;
    } edits[] = {
        {"qwen3moe-int4", EXPERT "weight_packed", EXPERT "weight_pocked",
         "experts.0.up_proj.weight: expected this tensor", MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_scale", EXPERT "weight_scole",
         "expected its scales in \"model.layers.0.mlp.experts.0.up_proj.weight_scale\", got none",
         MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_shape", EXPERT "weight_g_idx", "no actorder",
         MOE_ERR_UNSUPPORTED},
        {"qwen3moe-int4", EXPERT "weight_shape", EXPERT "pre_quant_sc", "has no place for",
         MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_shape\":{\"dtype\":\"I64\",\"shape\":[2]",
         EXPERT "weight_shape\":{\"dtype\":\"F64\",\"shape\":[2]", "two numbers in I32 or I64",
         MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_shape\":{\"dtype\":\"I64\",\"shape\":[2]",
         EXPERT "weight_shape\":{\"dtype\":\"I32\",\"shape\":[4]", "two numbers in I32 or I64",
         MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_packed\":{\"dtype\":\"I32\",\"shape\":[32,8]",
         EXPERT "weight_packed\":{\"dtype\":\"I32\",\"shape\":[8,32]",
         "expected shape [32, 8] by config.json, got [8, 32]", MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_packed\":{\"dtype\":\"I32\"",
         EXPERT "weight_packed\":{\"dtype\":\"U32\"", "got U32", MOE_ERR_UNSUPPORTED},
        {"qwen3moe-int4", EXPERT "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[32,2]",
         EXPERT "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[2,32]",
         "weight_scale: expected shape [32, 1] by config.json, got [2, 32]", MOE_ERR_MODEL},
        {"qwen3moe-int4", EXPERT "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[32,2]",
         EXPERT "weight_scale\":{\"dtype\":\"I16\", \"shape\":[32,2]",
         "expected scales in BF16, F16 or F32, got I16", MOE_ERR_UNSUPPORTED},
        {"qwen3moe-nvfp4", EXPERT "weight_scale\"", EXPERT "weight_scole\"",
         "expected its scales in", MOE_ERR_MODEL},
        {"qwen3moe-nvfp4", EXPERT "weight_global_scale", EXPERT "weight_glubal_scale",
         "weight_global_scale\", got none", MOE_ERR_MODEL},
        {"qwen3moe-nvfp4", EXPERT "weight_global_scale\":{\"dtype\":\"F32\"",
         EXPERT "weight_global_scale\":{\"dtype\":\"I32\"", "expected one number in F32",
         MOE_ERR_MODEL},
        {"qwen3moe-nvfp4", EXPERT "weight_scale\":{\"dtype\":\"F8_E4M3\"",
         EXPERT "weight_scale\":{\"dtype\":\"F8_E5M2\"", "expected scales in F8_E4M3 (NVFP4)",
         MOE_ERR_UNSUPPORTED},
        {"qwen3moe-nvfp4", EXPERT "weight_scale\":{\"dtype\":\"F8_E4M3\",\"shape\":[64,4]",
         EXPERT "weight_scale\":{\"dtype\":\"F8_E4M3\",\"shape\":[4,64]",
         "expected shape [64, 4] by config.json, got [4, 64]", MOE_ERR_MODEL},
        {"llama-nvfp4", ATTN "weight_scale_2", ATTN "weight_scole_2", "weight_scale_2\", got none",
         MOE_ERR_MODEL},
        {"llama-nvfp4", ATTN "weight\":{\"dtype\":\"U8\",\"shape\":[64,32]",
         ATTN "weight\":{\"dtype\":\"U8\",\"shape\":[32,64]",
         "expected shape [64, 32] by config.json, got [32, 64]", MOE_ERR_MODEL},
        {"llama-nvfp4", ATTN "weight\":{\"dtype\":\"U8\"", ATTN "weight\":{\"dtype\":\"I8\"",
         "expected shape [64, 64]", MOE_ERR_MODEL},
    };
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const conv_options o = {.source = edited_checkpoint(edits[i].checkpoint,
                                                            "model.safetensors", edits[i].from,
                                                            edits[i].to),
                                .out = scratch_path("packed.gguf")};
        refused_conversion(&o, edits[i].status, edits[i].says);
    }
}

/* Numbers that no weights can be made of. */
static void packed_numbers_that_are_none_are_refused(void)
{
    static const struct {
        const char *checkpoint, *tensor, *says;
        uint32_t value;
        uint8_t bytes;
    } edits[] = {
        {"qwen3moe-int4", EXPERT "weight_scale\"",
         "blk.0.ffn_up_exps.weight: expected finite scales of at most 65504, the largest number of "
         "F16, got nan at row 0, group 0 (from model.layers.0.mlp.experts.0.up_proj.weight_packed)",
         0x7fc0, 2},
        {"qwen3moe-int4", EXPERT "weight_scale\"", "got inf at row 0", 0x7f80, 2},
        {"qwen3moe-int4", EXPERT "weight_scale\"",
         "use --keep '^blk.0.ffn_up_exps.weight$=BF16'", 0x4780, 2},
        {"qwen3moe-int4", EXPERT "weight_shape\"",
         "up_proj.weight_shape: expected 32 and 64 by config.json, got 33 and 64", 33, 4},
        {"qwen3moe-nvfp4", EXPERT "weight_scale\"",
         "blk.0.ffn_up_exps.weight: expected finite scales that are not negative, got NaN at row 0",
         0x7f, 1},
        {"qwen3moe-nvfp4", EXPERT "weight_scale\"", "got a negative one at row 0, group 0", 0x81,
         1},
        {"qwen3moe-nvfp4", EXPERT "weight_global_scale\"",
         "expected a positive finite number, got 0", 0, 4},
        {"qwen3moe-nvfp4", EXPERT "weight_global_scale\"", "expected a positive finite number",
         0x7fc00000, 4},
        {"qwen3moe-nvfp4", "q_proj.weight_global_scale\"",
         "expected a positive finite number, got -1", 0xbf800000, 4},
        {"llama-nvfp4", ATTN "weight_scale_2\"", "expected a positive finite number, got inf",
         0x7f800000, 4},
        {"llama-nvfp4", ATTN "weight_scale\"", "got NaN at row 0", 0xff, 1},
    };
    conv_options o = {.out = scratch_path("packed.gguf")};
    moe_error error;
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        o.source = edited_checkpoint(edits[i].checkpoint, "config.json", "", "");
        overwrite_tensor(o.source, edits[i].tensor, 0, &edits[i].value, edits[i].bytes);
        refused_conversion(&o, MOE_ERR_MODEL, edits[i].says);
    }
    static const conv_keep keep = {"^blk.0.ffn_up_exps.weight$", &quant_bf16};
    const uint16_t large = 0x4780;
    o.source = edited_checkpoint("qwen3moe-int4", "config.json", "", "");
    overwrite_tensor(o.source, EXPERT "weight_scale\"", 0, &large, sizeof large);
    o.keeps = &keep;
    o.n_keeps = 1;
    CHECK(!convert_with(&o, &error), "the advice helps: %s", error.message);
    unlink(o.out);
    const uint16_t nan = 0x7fc0; // in other types it is a weight like others
    o.source = edited_checkpoint("qwen3moe-int4", "config.json", "", "");
    overwrite_tensor(o.source, EXPERT "weight_scale\"", 0, &nan, sizeof nan);
    refused_conversion(&o, MOE_ERR_MODEL, "expected finite weights, got nan at row 0");
    o.n_keeps = 0;
    o.allow_nonfinite = true;
    CHECK(!convert_with(&o, &error), "%s", error.message);
    unlink(o.out);
#undef EXPERT
#undef ATTN
}

/* FP8 whose scales are missing, of another dtype or shape, or not what the config tells of. */
static void fp8_scales_that_lie_are_refused(void)
{
#define EXPERT "layers.0.mlp.experts.0.gate_proj."
#define ATTN "layers.0.self_attn.q_proj."
#define BLOCKS "\"weight_block_size\": ["
    static const struct {
        const char *checkpoint, *file, *from, *to, *says;
        moe_status status;
    } edits[] = {
        {"qwen3moe-fp8", "model.safetensors", ATTN "weight_scale", ATTN "weight_scole",
         ATTN "weight: expected scales of FP8 in \"model.layers.0.self_attn.q_proj.weight_scale\" "
         "or \"model.layers.0.self_attn.q_proj.weight_scale_inv\", got none", MOE_ERR_MODEL},
        {"qwen3moe-fp8", "model.safetensors", ATTN "weight_scale\":{\"dtype\":\"BF16\",\"shape\"",
         ATTN "weight_scale\":{\"dtype\":\"I16\", \"shape\"",
         "expected scales in BF16, F16 or F32, got I16", MOE_ERR_UNSUPPORTED},
        {"qwen3moe-fp8", "model.safetensors",
         ATTN "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[4,3]",
         ATTN "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[3,4]",
         ATTN "weight_scale: expected scales of shape [40, 1] or [4, 3] or [1, 1] or [40, 20] by "
         "config.json, got [3, 4] in ", MOE_ERR_MODEL},
        {"qwen3moe-fp8", "model.safetensors",
         EXPERT "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[28,1]",
         EXPERT "weight_scale\":{\"dtype\":\"BF16\",\"shape\":[1,28]", "got [1, 28]",
         MOE_ERR_MODEL},
        {"qwen3moe-fp8", "model.safetensors", EXPERT "weight\":{\"dtype\":\"F8_E4M3\"",
         EXPERT "weight\":{\"dtype\":\"F8_E5M2\"", "F8_E4M3, got F8_E5M2", MOE_ERR_UNSUPPORTED},
        {"qwen35moe-fp8", "model.safetensors",
         "experts.down_proj_scale_inv\":{\"dtype\":\"BF16\",\"shape\":[3,4,1]",
         "experts.down_proj_scale_inv\":{\"dtype\":\"BF16\",\"shape\":[4,3,1]",
         "expected scales of shape [3, 4, 1] by config.json, got [4, 3, 1]", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"activation_block_size\": [",
         "expected scales of shape [1, 1] or [72, 1] or [1, 1] by config.json, got [6, 3]",
         MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, BLOCKS "12, ",
         "weight_block_size: expected the rows and columns of a block in config.json, two whole "
         "numbers from 1 to 16777216, got [...]", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"weight_block_size\": [0, 20], \"o\": [",
         "weight_block_size", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"weight_block_size\": [12, -1], \"o\": [",
         "weight_block_size", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"weight_block_size\": [1.5, 20], \"o\": [",
         "weight_block_size", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"weight_block_size\": [12, 1e30], \"o\": [",
         "weight_block_size", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"weight_block_size\": 12, \"o\": [",
         "weight_block_size", MOE_ERR_MODEL},
        {"qwen35moe-fp8", "config.json", BLOCKS, "\"weight_block_size\": [128, 128], \"o\": [",
         "expected scales of shape [1, 1] by config.json, got [6, 3]", MOE_ERR_MODEL},
        {"qwen3moe-fp8", "config.json", "\"block_structure\": [",
         "\"block_structure\": \"12x16x2\", \"o\": [", "block_structure: expected the rows",
         MOE_ERR_MODEL},
        {"qwen3moe-fp8", "config.json", "\"block_structure\": [",
         "\"block_structure\": \"0x16\", \"o\": [", "block_structure", MOE_ERR_MODEL},
        {"qwen3moe-fp8", "config.json", "\"group_size\": 2", "\"group_size\": -1",
         "group_size: expected a whole number from 1 to", MOE_ERR_MODEL},
        {"qwen3moe-fp8", "config.json", "\"strategy\": \"channel\"",
         "\"strategy\": \"tensor\"", "expected scales of shape [1, 1] or ", MOE_ERR_MODEL},
        {"qwen3moe-fp8", "config.json", "\"config_groups\": {",
         "\"config_groups\": {\"x\": {\"weights\": {\"num_bits\": 8, \"block_structure\": "
         "[11, 16]}},", "expected blocks of one size in config.json", MOE_ERR_UNSUPPORTED},
        {"llama-fp8-tensor", "config.json", "\"quant_method\": \"fp8\"",
         "\"quant_method\": \"compressed-tensors\", \"config_groups\": {\"a\": {\"weights\": "
         "{\"num_bits\": 4}}}", "expected what quantization_config.config_groups of config.json "
         "tells of, got weights in FP8", MOE_ERR_MODEL},
        {"llama-fp8-tensor", "config.json", "\"activation_scheme\"", "\"weight_block_size\": "
         "[16, 16], \"o\"", "expected scales of shape [3, 3] by config.json, got []",
         MOE_ERR_MODEL},
    };
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const conv_options o = {.source = edited_checkpoint(edits[i].checkpoint, edits[i].file,
                                                            edits[i].from, edits[i].to),
                                .out = scratch_path("fp8.gguf")};
        refused_conversion(&o, edits[i].status, edits[i].says);
    }
    static const uint16_t bad[] = {0x7fc0, 0x7f80, 0xff80}; /* NaN, inf, -inf in BF16 */
    for (size_t i = 0; i < MOE_COUNT(bad); i++) {
        const conv_options o = {.source = edited_checkpoint("qwen3moe-fp8", "config.json", "", ""),
                                .out = scratch_path("fp8.gguf")};
        overwrite_tensor(o.source, EXPERT "weight_scale\"", 2, &bad[i], sizeof bad[i]);
        refused_conversion(&o, MOE_ERR_MODEL, "ffn_gate_exps.weight: expected finite weights, got");
        refused_conversion(&o, MOE_ERR_MODEL, "at row 1, column 0 (from model." EXPERT "weight)");
    }
#undef EXPERT
#undef ATTN
#undef BLOCKS
}

static void quantization_configs_that_lie_are_refused(void)
{
    static const struct {
        const char *checkpoint, *from, *to, *says;
        moe_status status;
    } edits[] = {
        {"qwen3moe-int4", "\"compressed-tensors\"", "\"gptq\"", "got gptq; convert the checkpoint "
         "that it was made from", MOE_ERR_UNSUPPORTED},
        {"qwen3moe-int4", "\"compressed-tensors\"", "\"awq\"", "got awq", MOE_ERR_UNSUPPORTED},
        {"qwen3moe-int4", "\"group_size\": 32", "\"group_size\": 64",
         "got 4 bits of type int in groups of 32", MOE_ERR_MODEL},
        {"qwen3moe-int4", "\"num_bits\": 8", "\"num_bits\": 4", "got 8 bits of type int",
         MOE_ERR_MODEL},
        {"qwen3moe-int4", "\"symmetric\": true", "\"symmetric\": false", "config_groups",
         MOE_ERR_MODEL},
        {"qwen3moe-int4", "\"type\": \"int\"", "\"type\": \"float\"", "of type int", MOE_ERR_MODEL},
        {"qwen3moe-int4", "\"kv_cache_scheme\"",
         "\"transform_config\": {\"config_groups\": {\"u\": {}}}, \"k\"", "transform_config",
         MOE_ERR_UNSUPPORTED},
        {"qwen3moe-int4", "\"kv_cache_scheme\"", "\"sparsity_config\": {\"format\": "
         "\"sparse-24-bitmask\"}, \"k\"", "expected dense, got sparse", MOE_ERR_UNSUPPORTED},
        {"llama-nvfp4", "\"quant_algo\": \"NVFP4\"", "\"quant_algo\": \"NVFP4_AWQ\"",
         "quant_algo: expected one of NVFP4 ", MOE_ERR_UNSUPPORTED},
        {"llama-nvfp4", "\"quant_algo\": \"NVFP4\"", "\"quant_algo\": \"FP8\"",
         "quant_algo tells of, FP8, got 4 bits of type float", MOE_ERR_MODEL},
        {"llama", "\"vocab_size\"", "\"quantization_config\": {\"quant_method\": "
         "\"compressed-tensors\", \"format\": \"pack-quantized\"}, \"vocab_size\"",
         "expected matrices of packed codes, of which it tells, got none", MOE_ERR_MODEL},
    };
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const conv_options o = {.source = edited_checkpoint(edits[i].checkpoint, "config.json",
                                                            edits[i].from, edits[i].to),
                                .out = scratch_path("packed.gguf")};
        refused_conversion(&o, edits[i].status, edits[i].says);
    }
    char path[700];
    conv_options o = {.out = scratch_path("packed.gguf")};
    o.source = edited_checkpoint("llama-nvfp4", "config.json", "", "");
    snprintf(path, sizeof path, "%s/hf_quant_config.json", o.source);
    scratch_write_text(path, "{\"quantization\": {\"quant_algo\": \"W4A8_AWQ\"}}");
    refused_conversion(&o, MOE_ERR_UNSUPPORTED, "got W4A8_AWQ");
    scratch_write_text(path, "{\"quantization\": {\"quant_algo\": \"FP8\"}}");
    refused_conversion(&o, MOE_ERR_MODEL, "expected NVFP4, as in config.json, got FP8");
    scratch_write_text(path, "[]");
    refused_conversion(&o, MOE_ERR_FORMAT, "hf_quant_config.json");
    unlink(path);
}

/* --------------------------------------------------------------------------- during the work -- */

/* Puts a float into the embedding's row 3, column 1. */
static void poison(const char *folder, float value)
{
    overwrite_tensor(folder, "model.embed_tokens.weight", 4 * (3 * 4 + 1), &value, sizeof value);
}

static void weights_that_are_not_finite_are_named(void)
{
    char folder[600];
    moe_error error = {0};
    snprintf(folder, sizeof folder, "%s", scratch_path("nan"));
    make_small(folder, 8);
    conv_options o = {.source = folder, .out = scratch_path("nan.gguf"), .n_threads = 1};
    static const char *const types[] = {NULL, "f16", "bf16", "q8_0", "f32"};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        o.quant = types[i];
        poison(folder, NAN);
        refused_conversion(&o, MOE_ERR_MODEL,
                           "token_embd.weight: expected finite weights, got nan at row 3, "
                           "column 1");
        poison(folder, -INFINITY);
        refused_conversion(&o, MOE_ERR_MODEL, "got -inf at row 3, column 1");
    }
    poison(folder, 70000.0f);
    o.quant = "f16";
    refused_conversion(&o, MOE_ERR_MODEL, "BF16");
    o.quant = "bf16";
    CHECK(!convert_with(&o, &error), "%s", error.message);
    poison(folder, NAN);
    o.allow_nonfinite = true;
    o.quant = "f32";
    CHECK(!convert_with(&o, &error), "%s", error.message);
    unlink(o.out);
}

static void a_source_that_changes_is_noticed(void)
{
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("change"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    const conv_options o = {.source = folder, .out = scratch_path("change.gguf"), .n_threads = 1,
                            .progress = touch_source, .user = path};
    refused_conversion(&o, MOE_ERR_IO, "changed during the conversion");
}

static void nothing_is_left_after_a_failure(void)
{
    char source[500];
    snprintf(source, sizeof source, "%s/fixtures/qwen3.gguf", test_root());
    moe_cancel cancel = {1};
    conv_options o = {.source = source, .out = scratch_path("x.gguf"), .cancel = &cancel};
    refused_conversion(&o, MOE_ERR_CANCELLED, "cancelled");
    o.cancel = NULL;
    struct rlimit old, small = {20000, 20000};
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small.rlim_max = old.rlim_max;
    setrlimit(RLIMIT_FSIZE, &small);
    refused_conversion(&o, MOE_ERR_IO, "x.gguf.partial");
    setrlimit(RLIMIT_FSIZE, &old);
    o.out = scratch_path("no/such/folder.gguf");
    refused_conversion(&o, MOE_ERR_IO, "no such folder");
    o.out = scratch_path("x.bin");
    refused_conversion(&o, MOE_ERR_ARGUMENT, ".gguf");
    o.out = scratch_path("x.gguf");
    o.quant = "q9_k";
    refused_conversion(&o, MOE_ERR_ARGUMENT, "q4_k_m");
    o.quant = "iq2_xxs";
    refused_conversion(&o, MOE_ERR_ARGUMENT, "--bpw 2.06");
    o.quant = NULL;
    o.dry_run = true;
    moe_error error = {0};
    CHECK(!convert_with(&o, &error) && !scratch_exists(o.out), "%s", error.message);
}

/* A whole file that is there stays until the new one is whole. */
static void an_old_file_survives_a_failure(void)
{
    size_t bytes;
    char folder[600];
    snprintf(folder, sizeof folder, "%s", scratch_path("old"));
    make_small(folder, 8);
    poison(folder, NAN);
    const char *out = scratch_path("old.gguf");
    scratch_write_text(out, "precious");
    moe_error error = {0};
    CHECK(convert(folder, out, NULL, &error) == MOE_ERR_MODEL, "%s", error.message);
    char *data = test_read_file(out, &bytes);
    CHECK(data && !strcmp(data, "precious"), "it is gone");
    free(data);
    unlink(out);
}

TEST_PROGRAM(convert_refuses)
{
    if (!scratch_begin("convert-refuses"))
        return;
    RUN(gguf_damage_is_refused);
    RUN(unknown_patterns_are_refused);
    RUN(tokenizers_that_contradict_the_model_are_refused);
    RUN(lying_sentencepiece_models_are_refused);
    RUN(json_that_is_no_object_is_refused);
    RUN(damaged_sentencepiece_models_are_harmless);
    RUN(lying_headers_are_refused);
    RUN(aliases_are_refused);
    RUN(lying_indexes_are_refused);
    RUN(lying_configs_are_refused);
    RUN(configs_that_contradict_the_tensors_are_refused);
    RUN(missing_and_unused_tensors_are_refused);
    RUN(packed_experts_that_lie_are_refused);
    RUN(packed_tensors_that_lie_are_refused);
    RUN(packed_numbers_that_are_none_are_refused);
    RUN(fp8_scales_that_lie_are_refused);
    RUN(quantization_configs_that_lie_are_refused);
    RUN(weights_that_are_not_finite_are_named);
    RUN(a_source_that_changes_is_noticed);
    RUN(nothing_is_left_after_a_failure);
    RUN(an_old_file_survives_a_failure);
    scratch_end();
}

#endif
