/* cli/tokenize.c - `moe tokenize`: text on standard input to token ids. */
#include "cli.h"

#include <stdlib.h>

typedef struct tokenize_options {
    cli_common common;
    bool ids, no_special, parse_special, json;
} tokenize_options;

static void print_ids(const moe_token *tokens, size_t n)
{
    for (size_t i = 0; i < n; i++)
        printf(i ? " %d" : "%d", (int)tokens[i]);
    putchar('\n');
}

/* One token per line: the id and its text as it stands in the vocabulary, quoted as in JSON, so
 * that spaces and control characters are seen. */
static void print_pieces(const moe_tokenizer *tokenizer, const moe_token *tokens, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const char *piece = "";
        size_t piece_bytes = 0;
        moe_tokenizer_piece(tokenizer, tokens[i], &piece, &piece_bytes);
        printf("%8d  ", (int)tokens[i]);
        cli_json json = {.out = stdout};
        json_text(&json, NULL, piece, piece_bytes);
        putchar('\n');
    }
}

static void print_json(const moe_tokenizer *tokenizer, const moe_token *tokens, size_t n)
{
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_uint(&json, "n_tokens", n);
    json_open(&json, "tokens", '[');
    for (size_t i = 0; i < n; i++) {
        const char *piece = "";
        size_t piece_bytes = 0;
        moe_tokenizer_piece(tokenizer, tokens[i], &piece, &piece_bytes);
        json_open(&json, NULL, '{');
        json_int(&json, "id", tokens[i]);
        json_text(&json, "piece", piece, piece_bytes);
        json_close(&json, '}');
    }
    json_close(&json, ']');
    json_close(&json, '}');
    json_end(&json);
}

static int tokenize(const moe_tokenizer *tokenizer, const tokenize_options *o)
{
    size_t bytes, n;
    char *text = cli_read_all(NULL, &bytes);
    if (!text)
        return EXIT_FAILED;
    uint32_t flags = (o->no_special ? 0 : MOE_ENCODE_ADD_SPECIAL) |
                     (o->parse_special ? MOE_ENCODE_PARSE_SPECIAL : 0);
    moe_token *tokens = cli_encode(tokenizer, text, bytes, flags, &n);
    free(text);
    if (!tokens)
        return EXIT_FAILED;
    if (o->json)
        print_json(tokenizer, tokens, n);
    else if (o->ids)
        print_ids(tokens, n);
    else
        print_pieces(tokenizer, tokens, n);
    free(tokens);
    return EXIT_OK;
}

static int tokenize_main(int argc, char **argv)
{
    tokenize_options o = {0};
    if (!common_init(&o.common))
        return EXIT_USAGE;
    const cli_option table[] = {
        {0, "ids", CLI_FLAG, &o.ids, NULL, "print the ids alone, on one line", NULL},
        {0, "no-special", CLI_FLAG, &o.no_special, NULL,
         "add no token that marks the beginning or the end", NULL},
        {0, "parse-special", CLI_FLAG, &o.parse_special, NULL,
         "text that spells a special token becomes that token", NULL},
        {0, "json", CLI_FLAG, &o.json, NULL, "print one JSON object", NULL},
        {'v', "verbose", CLI_FLAG, &o.common.verbose, NULL,
         "tell on stderr how many tokens the vocabulary has", NULL},
        {0},
    };
    const cli_option *tables[] = {table, NULL};
    const char *path[1];
    int status;
    if (!cli_parse(&verb_tokenize, tables, argc, argv, path, &status))
        return status;
    moe_host host;
    moe_model_options options;
    common_model_options(&options, &host, path[0], &o.common);
    moe_tokenizer *tokenizer;
    moe_error error = {0};
    moe_status opened = moe_tokenizer_open(&tokenizer, &options, &error);
    progress_clear();
    if (opened)
        return cli_fail_open(opened, &error, path[0], &o.common);
    if (o.common.verbose)
        fprintf(stderr, "moe: %s: %u tokens in the vocabulary\n", path[0],
                moe_tokenizer_size(tokenizer));
    status = tokenize(tokenizer, &o);
    moe_tokenizer_close(tokenizer);
    return status;
}

const cli_verb verb_tokenize = {
    "tokenize", "MODEL", "turns text on standard input into token ids",
    "MODEL is a GGUF file, with or without weights and of any architecture, or a tokenizer.json.\n"
    "The text is taken as it is, with every newline; bytes that are not UTF-8 count as U+FFFD. It\n"
    "never becomes a special token unless --parse-special is given. Pieces are shown as they\n"
    "stand in the vocabulary, where U+0120 (G with a dot) or U+2581 (a low line) may mean a blank.",
    "  printf 'Hello world' | moe tokenize model.gguf --ids\n"
    "  moe tokenize tokenizer.json --ids --no-special <text.txt\n"
    "  moe tokenize model.gguf --json <text.txt | jq .n_tokens\n",
    1, tokenize_main};
