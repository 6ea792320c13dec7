/* tests/fuzz_gguf.c - any bytes into the GGUF loader, through each kind of source. See fuzz.h. */
#define FUZZ_FRONT_BYTES 4096
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const uint64_t peak_bytes = ((uint64_t)64 << 20) + bytes;
    moe_model_options memory, callback;
    fuzz_sources(data, bytes, &memory, &callback);
    for (int vocab_only = 0; vocab_only < 2; vocab_only++) {
        memory.vocab_only = callback.vocab_only = vocab_only;
        moe_status a = fuzz_open(&memory, peak_bytes), b = fuzz_open(&callback, peak_bytes);
        fuzz_require(a == b || (!data && a == MOE_ERR_ARGUMENT), "each source gives the same");
    }
    return 0;
}
