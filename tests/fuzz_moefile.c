/* tests/fuzz_moefile.c - any bytes into the reader of .moe files, through each kind of source.
 *
 * Random bytes do not get past the checksum of the directory, so it is made right first: what is
 * tried is what a liar would do, not what a bad drive does.
 *
 *     clang -O1 -g -fsanitize=fuzzer,address,undefined -DMOE_FUZZ tests/fuzz_moefile.c ...
 *         a fuzzer; start it with a folder of small .moe files
 *     cc tests/fuzz_moefile.c ...
 *         a program that runs the files it is given, once each; `-mutate N` in front of them: and N
 *         random changes of each
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

static moe_status fuzz_open(const moe_model_options *options)
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
        directory_close(dir);
    }
    fuzz_require(mem.used_bytes == 0, "all memory is given back");
    fuzz_require(mem.peak_bytes <= ((uint64_t)192 << 20) + 18 * (options->data_bytes +
                                                                 options->read_bytes),
                 "memory is bounded");
    return status;
}

/* Makes the checksum of the directory right, if there is a directory. */
static void fuzz_seal(uint8_t *data, size_t bytes)
{
    moefile_header h;
    if (bytes < sizeof h)
        return;
    memcpy(data, MOEFILE_MAGIC, 8);
    memcpy(&h, data, sizeof h);
    h.file_bytes = bytes;
    if (h.directory_bytes <= bytes - sizeof h)
        h.root = moefile_root(&h, data + sizeof h);
    memcpy(data, &h, sizeof h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint8_t *copy = malloc(bytes ? bytes : 1); // a sanitizer sees the first byte behind it
    if (!copy)
        return 0;
    if (bytes)
        memcpy(copy, data, bytes);
    fuzz_seal(copy, bytes);
    moe_model_options memory, callback;
    moe_model_options_init(&memory);
    memory.data = copy;
    memory.data_bytes = bytes;
    moe_model_options_init(&callback);
    callback.read = fuzz_read;
    callback.read_user = copy;
    callback.read_bytes = bytes;
    moe_status a = fuzz_open(&memory);
    fuzz_require(a == fuzz_open(&callback), "each source gives the same");
    memory.copy = true;
    fuzz_require(a == fuzz_open(&memory), "a copy gives the same");
    memory.vocab_only = true;
    fuzz_open(&memory);
    moe_file_verify(&memory, NULL, NULL, NULL, NULL);
    free(copy);
    return 0;
}

#ifndef MOE_FUZZ
/* Changes a few bytes, most of them where the numbers are, and tries. */
static void fuzz_mutate(const char *data, size_t bytes, long n)
{
    uint8_t *copy = malloc(bytes ? bytes : 1);
    while (copy && bytes > 128 && n-- > 0) {
        memcpy(copy, data, bytes);
        moefile_header h;
        memcpy(&h, copy, sizeof h);
        const size_t front = MOE_MIN(bytes, sizeof h + (size_t)(h.directory_bytes % (1 << 24)));
        for (uint32_t k = 1 + test_random() % 4; k; k--) {
            const size_t at = test_random() % 3 ? test_random() % front : test_random() % bytes;
            copy[at] = test_random() % 2 ? (uint8_t)test_random()
                                         : (uint8_t)(copy[at] ^ 1u << (test_random() & 7));
        }
        LLVMFuzzerTestOneInput(copy, bytes);
    }
    free(copy);
}

int main(int argc, char **argv)
{
    const bool mutate = argc > 2 && !strcmp(argv[1], "-mutate");
    const long n = mutate ? atol(argv[2]) : 0;
    for (int i = mutate ? 3 : 1; i < argc; i++) {
        size_t bytes;
        char *data = test_read_file(argv[i], &bytes);
        if (!data) {
            fprintf(stderr, "cannot read %s\n", argv[i]);
            return 1;
        }
        LLVMFuzzerTestOneInput((const uint8_t *)data, bytes);
        fuzz_mutate(data, bytes, n);
        free(data);
    }
    printf("%d files, no broken promise\n", argc - (mutate ? 3 : 1));
    return 0;
}
#endif
