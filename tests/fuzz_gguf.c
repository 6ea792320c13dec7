/* tests/fuzz_gguf.c - any bytes into the GGUF loader, through each kind of source.
 *
 *     clang -O1 -g -fsanitize=fuzzer,address,undefined -DMOE_FUZZ tests/fuzz_gguf.c ...
 *         a fuzzer; start it with a folder of small GGUF files
 *     cc tests/fuzz_gguf.c ...
 *         a program that runs the files it is given, once each
 */
#include "test.h"

#include "gguf_walk.h"

static int fuzz_read(void *user, uint64_t offset, void *dst, size_t bytes)
{
    memcpy(dst, (const char *)user + offset, bytes);
    return 0;
}

/* Not assert: this must hold in release builds as well. */
static void fuzz_require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "broken promise: %s\n", what);
        __builtin_trap();
    }
}

static moe_status fuzz_open(moe_model_options *options, bool vocab_only)
{
    moe_mem mem;
    moe_error error = {0};
    moe_directory *dir = NULL;
    mem_init(&mem, NULL, 0);
    options->vocab_only = vocab_only;
    moe_status status = directory_open(&dir, options, &mem, &error);
    fuzz_require((status == MOE_OK) == (dir != NULL), "a directory or an error");
    fuzz_require(status == error.status, "the error has the status");
    if (status) {
        fuzz_require(error.message[0] != 0, "an error has a message");
        fuzz_require(status == MOE_ERR_FORMAT || status == MOE_ERR_UNSUPPORTED ||
                         status == MOE_ERR_LIMIT || status == MOE_ERR_ARGUMENT,
                     "the status is one of a bad file");
    } else {
        bool ok;
        gguf_walk(dir, &ok);
        fuzz_require(ok, "entries are found by their names");
        fuzz_require(directory_check(dir, NULL) == MOE_OK, "the file is as long as it was");
        directory_close(dir);
    }
    fuzz_require(mem.used_bytes == 0, "all memory is given back");
    fuzz_require(mem.peak_bytes <= ((uint64_t)64 << 20) + options->data_bytes + options->read_bytes,
                 "memory is bounded");
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    moe_model_options memory, callback;
    moe_model_options_init(&memory);
    moe_model_options_init(&callback);
    memory.data = data;
    memory.data_bytes = bytes;
    callback.read = fuzz_read;
    callback.read_user = (void *)(uintptr_t)data;
    callback.read_bytes = bytes;
    for (int vocab_only = 0; vocab_only < 2; vocab_only++) {
        moe_status a = fuzz_open(&memory, vocab_only), b = fuzz_open(&callback, vocab_only);
        fuzz_require(a == b || (!data && a == MOE_ERR_ARGUMENT), "each source gives the same");
    }
    return 0;
}

#ifndef MOE_FUZZ
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        size_t bytes;
        char *data = test_read_file(argv[i], &bytes);
        if (!data) {
            fprintf(stderr, "cannot read %s\n", argv[i]);
            return 1;
        }
        // An allocation of just this size: a sanitizer sees the first byte behind it.
        uint8_t *exact = malloc(bytes ? bytes : 1);
        if (exact)
            LLVMFuzzerTestOneInput(memcpy(exact, data, bytes), bytes);
        free(exact);
        free(data);
    }
    printf("%d files, no broken promise\n", argc - 1);
    return 0;
}
#endif
