/* tests/fuzz.h - what the fuzzers of file readers share: any bytes into directory_open(), and the
 * promises that must hold whatever they are.
 *
 *     clang -O1 -g -fsanitize=fuzzer,address,undefined -DMOE_FUZZ tests/fuzz_gguf.c ...
 *         a fuzzer; start it with a folder of small files
 *     cc tests/fuzz_gguf.c ...
 *         a program that runs the files it is given, once each; `-mutate N` in front of them: and N
 *         random changes of each
 */
#ifndef MOE_TESTS_FUZZ_H
#define MOE_TESTS_FUZZ_H

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

/* The same bytes in memory and behind a callback. */
MOE_UNUSED static void fuzz_sources(const uint8_t *data, size_t bytes, moe_model_options *memory,
                         moe_model_options *callback)
{
    moe_model_options_init(memory);
    memory->data = data;
    memory->data_bytes = bytes;
    moe_model_options_init(callback);
    callback->read = fuzz_read;
    callback->read_user = (void *)(uintptr_t)data;
    callback->read_bytes = bytes;
}

/* Opens, looks at everything, closes. `peak_bytes`: what it may use at most. */
MOE_UNUSED static moe_status fuzz_open(const moe_model_options *options, uint64_t peak_bytes)
{
    moe_mem mem;
    moe_error error = {0};
    moe_directory *dir = NULL;
    mem_init(&mem, NULL, 0);
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
    fuzz_require(mem.peak_bytes <= peak_bytes, "memory is bounded");
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#ifndef MOE_FUZZ
/* Where a file's numbers are: in so many bytes at its beginning, at least 1. A fuzzer defines
 * FUZZ_FRONT_BYTES, or this if it depends on the file. */
#ifdef FUZZ_FRONT_BYTES
static size_t fuzz_front(const uint8_t *data, size_t bytes)
{
    (void)data;
    return MOE_MIN(bytes, (size_t)FUZZ_FRONT_BYTES);
}
#else
static size_t fuzz_front(const uint8_t *data, size_t bytes);
#endif

/* Changes a few bytes, most of them where the numbers are. */
static void fuzz_change(uint8_t *data, size_t bytes)
{
    const size_t front = fuzz_front(data, bytes);
    for (uint32_t k = 1 + test_random() % 4; k; k--) {
        const size_t at = test_random() % (test_random() % 3 ? front : bytes);
        data[at] = test_random() % 2 ? (uint8_t)test_random()
                                     : (uint8_t)(data[at] ^ 1u << (test_random() & 7));
    }
}

/* The file, and then changes of it, each in an allocation of just its size: a sanitizer sees the
 * first byte behind it. */
static void fuzz_file(const char *data, size_t bytes, long n_changed)
{
    for (long i = 0; i <= n_changed; i++) {
        uint8_t *copy = malloc(bytes ? bytes : 1);
        if (!copy)
            return;
        memcpy(copy, data, bytes);
        if (i && bytes)
            fuzz_change(copy, bytes);
        LLVMFuzzerTestOneInput(copy, bytes);
        free(copy);
    }
}

int main(int argc, char **argv)
{
    const bool mutate = argc > 2 && !strcmp(argv[1], "-mutate");
    const long n_changed = mutate ? atol(argv[2]) : 0;
    const int first = mutate ? 3 : 1;
    for (int i = first; i < argc; i++) {
        size_t bytes;
        char *data = test_read_file(argv[i], &bytes);
        if (!data) {
            fprintf(stderr, "cannot read %s\n", argv[i]);
            return 1;
        }
        fuzz_file(data, bytes, n_changed);
        free(data);
    }
    printf("%d files, no broken promise\n", argc - first);
    return 0;
}
#endif

#endif
