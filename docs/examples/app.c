/* docs/examples/app.c - a program that uses moe.h: continues a prompt and prints the text as it
 * comes.
 *
 *     cc -O2 app.c moe.c -lutf8proc -lzstd -lm -pthread     (two files, no installation)
 *     cc app.c $(pkg-config --cflags --libs moe)     (after `make install`)
 *
 *     ./a.out model.gguf "Once upon a time"
 *
 * It is C and C++ alike. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe.h"

static int failed(const char *what, const moe_error *error)
{
    fprintf(stderr, "%s: %s: %s\n", what, moe_status_name(error->status), error->message);
    return EXIT_FAILURE;
}

/* The token ids of a text. The caller frees them. NULL if it cannot be encoded. */
static moe_token *encode(const moe_tokenizer *tokenizer, const char *text, size_t *n)
{
    moe_error error;
    memset(&error, 0, sizeof error);
    size_t room = strlen(text) + 8; /* seldom more tokens than bytes; if so, it is an error here */
    moe_token *tokens = (moe_token *)malloc(room * sizeof *tokens);
    if (tokens && moe_tokenizer_encode(tokenizer, text, strlen(text), MOE_ENCODE_ADD_SPECIAL,
                                       tokens, room, n, &error)) {
        failed("encode", &error);
        free(tokens);
        tokens = NULL;
    }
    return tokens;
}

/* Prefill with the prompt, then token after token until the model ends the text. */
static int generate(moe_session *session, moe_sampler *sampler, const moe_tokenizer *tokenizer,
                    const moe_token *prompt, size_t n_prompt, float *logits)
{
    moe_decoder decoder;
    memset(&decoder, 0, sizeof decoder);
    char text[256];
    moe_token token;
    moe_status status = moe_session_eval(session, prompt, n_prompt, 1, logits);
    for (int i = 0; i < 100 && !status; i++) {
        status = moe_sampler_pick(sampler, logits, &token);
        if (status || moe_tokenizer_is_end(tokenizer, token))
            break;
        if (moe_tokenizer_decode(tokenizer, &decoder, token, text, sizeof text) < sizeof text)
            fputs(text, stdout);
        fflush(stdout);
        status = moe_session_eval(session, &token, 1, 1, logits);
    }
    if (moe_tokenizer_decode(tokenizer, &decoder, -1, text, sizeof text) < sizeof text)
        puts(text);
    return status ? failed("generate", moe_session_error(session)) : EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL.gguf PROMPT\n", argv[0]);
        return EXIT_FAILURE;
    }
    moe_error error;
    memset(&error, 0, sizeof error);

    moe_model_options model_options;
    moe_model_options_init(&model_options);
    model_options.path = argv[1];
    moe_model *model;
    if (moe_model_open(&model, &model_options, &error))
        return failed("open", &error);

    moe_model_info info;
    info.size = sizeof info;
    moe_model_get_info(model, &info);

    moe_session_options session_options;
    moe_session_options_init(&session_options);
    moe_sampler_options sampler_options;
    moe_sampler_options_init(&sampler_options);
    sampler_options.temperature = 0.7f;
    sampler_options.top_p = 0.9f;
    sampler_options.seed = 1;

    int result = EXIT_FAILURE;
    size_t n_prompt = 0;
    moe_session *session = NULL;
    moe_sampler *sampler = NULL;
    moe_token *prompt = NULL;
    float *logits = (float *)malloc(info.n_vocab * sizeof *logits);
    const moe_tokenizer *tokenizer = moe_model_tokenizer(model);
    if (!tokenizer)
        fprintf(stderr, "%s has no tokenizer\n", argv[1]);
    else if (moe_session_open(&session, model, &session_options, &error))
        failed("session", &error);
    else if (moe_sampler_new(&sampler, info.n_vocab, &sampler_options, NULL, &error))
        failed("sampler", &error);
    else if (logits && (prompt = encode(tokenizer, argv[2], &n_prompt)) != NULL)
        result = generate(session, sampler, tokenizer, prompt, n_prompt, logits);

    free(logits);
    free(prompt);
    moe_sampler_free(sampler);
    moe_session_close(session);
    moe_model_close(model);
    return result;
}
