/* cli/logits.c - `moe logits`: token ids in, the logits of every position out. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOP = 10, CHUNK_MAX = 4096 };

typedef struct logits_options {
    cli_common common;
    const char *tokens, *out, *trace;
    uint32_t chunk;
    int cache;
} logits_options;

/* "1,2,3", with blanks or newlines as good as commas. NULL, with a message, if it is not that. */
static moe_token *parse_tokens(const char *text, uint32_t n_vocab, size_t *n)
{
    moe_token *tokens = NULL;
    *n = 0;
    static const char separators[] = ", \t\r\n";
    for (const char *p = text + strspn(text, separators); *p; p += strspn(p, separators)) {
        size_t length = strcspn(p, separators);
        char word[24];
        uint64_t id = UINT64_MAX;
        snprintf(word, sizeof word, "%.*s", length < 23 ? (int)length : 23, p);
        if (length >= sizeof word || !cli_parse_uint(word, &id) || id >= n_vocab) {
            cli_fail("--tokens: expected ids from 0 to %u, got \"%s\"", n_vocab - 1, word);
            free(tokens);
            return NULL;
        }
        if (*n % 1024 == 0)
            tokens = cli_alloc(tokens, *n + 1024, sizeof *tokens);
        tokens[(*n)++] = (moe_token)id;
        p += length;
    }
    if (!*n)
        cli_fail("--tokens: expected at least one id");
    return tokens;
}

/* The ids of the TOP largest logits, the largest first, ties to the lower id. NaN counts as lowest.
 * */
static size_t top_logits(const float *logits, uint32_t n_vocab, uint32_t top[TOP])
{
    size_t n = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        if (isnan(logits[i]) || (n == TOP && logits[i] <= logits[top[TOP - 1]]))
            continue;
        size_t k = n < TOP ? n++ : TOP - 1;
        for (; k && logits[i] > logits[top[k - 1]]; k--)
            top[k] = top[k - 1];
        top[k] = i;
    }
    return n;
}

static void print_position(cli_json *json, const moe_tokenizer *tokenizer, size_t position,
                           moe_token token, const float *logits, uint32_t n_vocab)
{
    uint32_t top[TOP];
    size_t n = top_logits(logits, n_vocab, top);
    json_open(json, NULL, '{');
    json_uint(json, "position", position);
    json_int(json, "token", token);
    json_open(json, "top", '[');
    for (size_t i = 0; i < n; i++) {
        json_open(json, NULL, '{');
        json_uint(json, "id", top[i]);
        json_number(json, "logit", (double)logits[top[i]], 9);
        const char *piece;
        size_t piece_bytes;
        if (tokenizer &&
            !moe_tokenizer_piece(tokenizer, (moe_token)top[i], &piece, &piece_bytes))
            json_text(json, "piece", piece, piece_bytes);
        json_close(json, '}');
    }
    json_close(json, ']');
    json_close(json, '}');
}

/* Feeds the tokens in calls of `chunk` and hands out the logits, [n_vocab] per token, in order. */
static int compute(const moe_model *model, moe_session *session, const moe_token *tokens, size_t n,
                   uint32_t chunk, uint32_t n_vocab, cli_output *output)
{
    int result = EXIT_OK;
    float *logits = cli_alloc(NULL, (n < chunk ? n : chunk) * (size_t)n_vocab, sizeof *logits);
    cli_json json = {.out = stdout};
    if (!output) {
        json_open(&json, NULL, '{');
        json_uint(&json, "n_vocab", n_vocab);
        json_open(&json, "positions", '[');
    }
    for (size_t at = 0, n_now; at < n && result == EXIT_OK; at += n_now) {
        n_now = n - at < chunk ? n - at : chunk;
        moe_status status = moe_session_eval(session, tokens + at, n_now, n_now, logits);
        if (status) {
            result = cli_fail_status(status, moe_session_error(session), NULL);
        } else if (output) {
            if (!output_write(output, logits, n_now * n_vocab * sizeof *logits))
                result = EXIT_FAILED;
        } else {
            for (size_t i = 0; i < n_now; i++)
                print_position(&json, moe_model_tokenizer(model), at + i, tokens[at + i],
                               logits + i * n_vocab, n_vocab);
        }
        progress_show("logits", at + n_now, n);
    }
    if (!output && result == EXIT_OK) {
        json_close(&json, ']');
        json_close(&json, '}');
        json_end(&json);
    }
    free(logits);
    return result;
}

static int logits_write(const moe_model *model, moe_session *session, const moe_token *tokens,
                        size_t n, uint32_t n_vocab, const logits_options *o)
{
    cli_output output;
    if (!o->out)
        return compute(model, session, tokens, n, o->chunk, n_vocab, NULL);
    if (!output_open(&output, o->out))
        return EXIT_FAILED;
    int result = compute(model, session, tokens, n, o->chunk, n_vocab, &output);
    if (!output_close(&output, result == EXIT_OK) && result == EXIT_OK)
        result = EXIT_FAILED;
    return result;
}

static int logits_run(moe_model *model, const logits_options *o)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    size_t bytes, n;
    char *text = strcmp(o->tokens, "-") ? NULL : cli_read_all(NULL, &bytes);
    if (!text && !strcmp(o->tokens, "-"))
        return EXIT_FAILED;
    moe_token *tokens = parse_tokens(text ? text : o->tokens, info.n_vocab, &n);
    free(text);
    if (!tokens)
        return EXIT_FAILED;
    moe_session_options so;
    common_session_options(&so, &o->common, o->cache);
    so.n_ctx = n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
    so.n_batch = o->chunk;
    so.n_logits = o->chunk < 16 ? o->chunk : 16;
    moe_session *session = NULL;
    cli_trace *trace = NULL;
    moe_observer observer;
    int result = o->trace ? trace_open(&trace, o->trace, model, &observer) : EXIT_OK;
    so.observer = trace ? &observer : NULL;
    if (result == EXIT_OK)
        result = common_session(&session, model, &so);
    if (result == EXIT_OK)
        result = logits_write(model, session, tokens, n, info.n_vocab, o);
    const int traced = trace_close(trace, result == EXIT_OK);
    moe_session_close(session);
    free(tokens);
    return result ? result : traced;
}

static int logits_main(int argc, char **argv)
{
    logits_options o = {.chunk = 512};
    if (!common_init(&o.common))
        return EXIT_USAGE;
    cli_option common_table[COMMON_OPTIONS];
    const cli_option table[] = {
        {0, "tokens", CLI_TEXT, &o.tokens, "IDS",
         "token ids, separated by commas or blanks; \"-\": from\nstandard input", NULL},
        {0, "chunk", CLI_U32, &o.chunk, "N", "tokens computed at once; the logits are the same",
         NULL},
        {0, "out", CLI_TEXT, &o.out, "FILE", "write all logits to FILE instead", NULL},
        {0, "trace-experts", CLI_TEXT, &o.trace, "FILE",
         "write which experts each token used, for `moe experts`", NULL},
        {0, "cache", CLI_CHOICE, &o.cache, "TYPE", "type of the key/value cache", cache_names},
        {0},
    };
    const cli_option *tables[] = {table, common_options(&o.common, common_table), NULL};
    const char *path[1];
    int status;
    if (!cli_parse(&verb_logits, tables, argc, argv, path, &status))
        return status;
    if (!o.tokens || !o.chunk || o.chunk > CHUNK_MAX) {
        cli_fail(o.tokens ? "logits: --chunk: expected 1 to 4096"
                          : "logits: --tokens is needed; `moe tokenize MODEL --ids` makes them");
        return EXIT_USAGE;
    }
    moe_model *model;
    status = common_open(&model, path[0], &o.common);
    if (status)
        return status;
    status = logits_run(model, &o);
    moe_model_close(model);
    return status;
}

const cli_verb verb_logits = {
    "logits", "MODEL", "computes the logits for given token ids",
    "Without --out the 10 largest logits of each position are printed as JSON. With it, all are\n"
    "written as little-endian float32 [n_tokens][n_vocab]; row i is the prediction after token i.",
    "  moe logits model.gguf --tokens 1,15043,3186\n"
    "  moe tokenize model.gguf --ids <text | moe logits model.gguf --tokens - --out logits.f32\n"
    "  moe logits model.gguf --tokens 1,2,3 --chunk 1 -t 1 --out - | sha256sum\n",
    1, logits_main};
