/* core/notext.c - the tokenizer's functions in builds with -DMOE_NO_TEXT: token ids in, logits out.
 *
 * Opening says that text was left out; a model simply has no tokenizer. With no moe_tokenizer in
 * the world the other functions have only NULL to answer for. */
#ifndef MOE_CORE_NOTEXT_C
#define MOE_CORE_NOTEXT_C

#include "directory.h"

MOE_UNUSED static moe_status tokenizer_from_directory(moe_tokenizer **out, const moe_directory *dir,
                                                      moe_mem *mem, moe_error *error)
{
    (void)dir;
    (void)mem;
    (void)error;
    *out = NULL;
    return MOE_OK;
}

MOE_UNUSED static void tokenizer_free(moe_tokenizer *tokenizer)
{
    (void)tokenizer;
}

static moe_status notext_fail(moe_error *error)
{
    return fail(error, MOE_ERR_UNSUPPORTED, "tokenizer",
                "text was left out of this build (MOE_NO_TEXT); pass token ids");
}

moe_status moe_tokenizer_open(moe_tokenizer **out, const moe_model_options *options,
                              moe_error *error)
{
    (void)options;
    if (out)
        *out = NULL;
    return notext_fail(error);
}

void moe_tokenizer_close(moe_tokenizer *tokenizer)
{
    (void)tokenizer;
}

moe_status moe_tokenizer_encode(const moe_tokenizer *tokenizer, const char *text,
                                size_t text_bytes, uint32_t flags, moe_token *tokens,
                                size_t capacity, size_t *n_tokens, moe_error *error)
{
    (void)tokenizer;
    (void)text;
    (void)text_bytes;
    (void)flags;
    (void)tokens;
    (void)capacity;
    (void)n_tokens;
    return notext_fail(error);
}

size_t moe_tokenizer_decode(const moe_tokenizer *tokenizer, moe_decoder *decoder, moe_token token,
                            char *buf, size_t buf_bytes)
{
    (void)tokenizer;
    (void)decoder;
    (void)token;
    if (buf && buf_bytes)
        buf[0] = 0;
    return 0;
}

uint32_t moe_tokenizer_size(const moe_tokenizer *tokenizer)
{
    (void)tokenizer;
    return 0;
}

moe_status moe_tokenizer_piece(const moe_tokenizer *tokenizer, moe_token token, const char **piece,
                               size_t *piece_bytes)
{
    (void)tokenizer;
    (void)token;
    (void)piece;
    (void)piece_bytes;
    return MOE_ERR_UNSUPPORTED;
}

moe_token moe_tokenizer_bos(const moe_tokenizer *tokenizer)
{
    (void)tokenizer;
    return -1;
}

moe_token moe_tokenizer_eos(const moe_tokenizer *tokenizer)
{
    (void)tokenizer;
    return -1;
}

bool moe_tokenizer_is_end(const moe_tokenizer *tokenizer, moe_token token)
{
    (void)tokenizer;
    (void)token;
    return false;
}

const char *moe_tokenizer_chat_template(const moe_tokenizer *tokenizer)
{
    (void)tokenizer;
    return NULL;
}

#endif
