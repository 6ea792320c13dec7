/* tests/fuzz_tokenizer.c - any bytes as a tokenizer.json (or the metadata of a GGUF file); what
 * loads encodes a text and the beginning of its own file, and decodes what came out. See fuzz.h. */
#define FUZZ_FRONT_BYTES 3000 // the steps stand before the vocabulary
#include "fuzz.h"

#ifdef MOE_NO_TEXT
#error "this fuzzer is about tokenizers"
#endif

enum { FUZZ_MAX_TOKENS = 4096, FUZZ_CEILING_BYTES = 1 << 28 };

/* All that a piece of text may meet: cases, marks, scripts, digits, spaces, broken bytes. */
static const char fuzz_text[] =
    "All human beings\r\n\t  <|im_end|> 12345 don't DON'T \u00E9e\u0301\u0327 \u1100\u1161\u11A8 "
    "\u4EBA\u4EBA\u3000\u2581\u2581_ \uFB01\u00BD \U0001F468\u200D\U0001F469 <mask>word word\xFF"
    "\xE2\x96 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\xF0\x9F";

static void fuzz_round(const moe_tokenizer *tok, const char *text, size_t bytes, uint32_t flags)
{
    static moe_token ids[FUZZ_MAX_TOKENS];
    char out[256];
    size_t n = 0;
    moe_error error = {0};
    moe_decoder decoder = {.show_special = flags & 1};
    moe_status status = moe_tokenizer_encode(tok, text, bytes, flags, ids, FUZZ_MAX_TOKENS, &n,
                                             &error);
    fuzz_require(!status == !error.message[0], "an error has a message");
    for (size_t i = 0; !status && i <= n; i++) {
        fuzz_require(i == n || (uint32_t)ids[i] < moe_tokenizer_size(tok), "ids are tokens");
        size_t k = moe_tokenizer_decode(tok, &decoder, i < n ? ids[i] : -1, out, sizeof out);
        fuzz_require(k >= sizeof out || utf8_valid((const uint8_t *)out, k) == k,
                     "decoding gives UTF-8");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    moe_error error = {0};
    moe_tokenizer *tok;
    moe_model_options o;
    moe_model_options_init(&o);
    o.data = data;
    o.data_bytes = bytes;
    o.memory_limit_bytes = FUZZ_CEILING_BYTES;
    moe_status status = moe_tokenizer_open(&tok, &o, &error);
    fuzz_require((status == MOE_OK) == (tok != NULL), "a tokenizer or an error");
    fuzz_require(!status == !error.message[0], "an error has a message");
    for (uint32_t flags = 0; tok && flags < 4; flags += 3) {
        fuzz_round(tok, fuzz_text, sizeof fuzz_text, flags); // with its NUL
        fuzz_round(tok, (const char *)data, MOE_MIN(bytes, 512), flags);
    }
    moe_tokenizer_close(tok);
    return 0;
}
