/* tests/fuzz_moefile.c - any bytes into the reader of .moe files, through each kind of source. See
 * tests/fuzz.h.
 *
 * Random bytes do not get past the checksum of the directory, so it is made right first: what is
 * tried is what a liar would do, not what a bad drive does. */
#include "fuzz.h"

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const uint64_t peak_bytes = ((uint64_t)192 << 20) + 18 * (uint64_t)bytes;
    uint8_t *copy = malloc(bytes ? bytes : 1); // a sanitizer sees the first byte behind it
    if (!copy)
        return 0;
    if (bytes)
        memcpy(copy, data, bytes);
    fuzz_seal(copy, bytes);
    moe_model_options memory, callback;
    fuzz_sources(copy, bytes, &memory, &callback);
    moe_status a = fuzz_open(&memory, peak_bytes);
    fuzz_require(a == fuzz_open(&callback, peak_bytes), "each source gives the same");
    memory.copy = true;
    fuzz_require(a == fuzz_open(&memory, peak_bytes), "a copy gives the same");
    memory.vocab_only = true;
    fuzz_open(&memory, peak_bytes);
    moe_file_verify(&memory, NULL, NULL, NULL, NULL);
    free(copy);
    return 0;
}

#ifndef MOE_FUZZ
static size_t fuzz_front(const uint8_t *data, size_t bytes) // the header and the directory
{
    moefile_header h;
    if (bytes <= sizeof h)
        return bytes;
    memcpy(&h, data, sizeof h);
    return MOE_MIN(bytes, sizeof h + (size_t)(h.directory_bytes % (1 << 24)));
}
#endif
