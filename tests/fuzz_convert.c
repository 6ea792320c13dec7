/* tests/fuzz_convert.c - moe-convert on a checkpoint of which one file is any bytes.
 *
 * The first byte of the input says which file of the checkpoint the rest is; the second picks the
 * checkpoint, where a config.json is tried. The others are small ones made here. A folder below
 * $TMPDIR holds them: /dev/shm is a good place. See fuzz.h. */
#include "checkpoint_make.h"

#define FUZZ_FRONT_BYTES 4096
#include "fuzz.h"

enum { FUZZ_VOCAB = 490 };

/* What the input may be. The first ones belong to a checkpoint of tests/checkpoints. */
static const char *const fuzz_parts[] = {
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "imatrix.gguf", "source.gguf", "source.moe"};

static const char *const fuzz_bases[] = {"llama-yarn", "deepseek3-mtp", "gemma4", "gpt-oss-layers",
                                         "qwen35moe-mtp", "glm4-moe-lite", "llama-fp8-tensor",
                                         "lfm2moe", "qwen3moe-layers", "qwen3moe-int4",
                                         "llama-nvfp4", "qwen3moe-fp8", "qwen35moe-fp8"};

/* The folders, made once: small/, with a vocabulary of SentencePiece, and a copy of each base. */
static void fuzz_begin(void)
{
    static bool begun;
    char path[700], from[700];
    size_t bytes;
    if (begun)
        return;
    begun = true;
    fuzz_require(scratch_begin("fuzz"), "a folder can be made");
    atexit(scratch_end);
    fuzz_require(make_small_spm(scratch_path("small"), "unigram", FUZZ_VOCAB),
                 "the test data is there: start it where tests/ is");
    for (size_t i = 0; i < MOE_COUNT(fuzz_bases); i++) {
        mkdir(scratch_path(fuzz_bases[i]), 0777);
        for (size_t k = 0; k < 2; k++) {
            snprintf(from, sizeof from, "%s/%s", checkpoint(fuzz_bases[i]), fuzz_parts[k]);
            snprintf(path, sizeof path, "%s/%s", scratch_path(fuzz_bases[i]), fuzz_parts[k]);
            char *data = test_read_file(from, &bytes);
            fuzz_require(data != NULL, "the checkpoints are there");
            scratch_write(path, data, bytes);
            free(data);
        }
    }
}

/* Converts with the file in place, and takes it away, or puts what was there back. */
static void fuzz_with(const char *folder, const char *part, const uint8_t *data, size_t bytes)
{
    char path[700];
    size_t old_bytes = 0;
    moe_error error = {0};
    conv_job job;
    snprintf(path, sizeof path, "%s/%s", folder, part);
    char *old = test_read_file(path, &old_bytes);
    const bool alone = !strncmp(part, "source.", 7);
    const conv_options o = {.source = alone ? path : folder, .out = scratch_path("out.gguf"),
                            .imatrix = strcmp(part, "imatrix.gguf") ? NULL : path,
                            .quant = bytes & 1 ? "q4_0" : NULL, .n_threads = 1};
    scratch_write(path, data, bytes);
    const moe_status status = conv_run(&job, &o, &error);
    conv_close(&job);
    fuzz_require(!status == !error.message[0], "an error has a message");
    fuzz_require(!status == scratch_exists(o.out), "a result or an error");
    unlink(o.out);
    if (old)
        scratch_write(path, old, old_bytes);
    else
        unlink(path);
    free(old);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < 2)
        return 0;
    fuzz_begin();
    const char *part = fuzz_parts[data[0] % MOE_COUNT(fuzz_parts)];
    const char *folder = scratch_path(part == fuzz_parts[0]
                                          ? fuzz_bases[data[1] % MOE_COUNT(fuzz_bases)] : "small");
    fuzz_with(folder, part, data + 2, bytes - 2);
    return 0;
}
