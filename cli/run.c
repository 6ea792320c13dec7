/* cli/run.c - `moe run`: a prompt in, its continuation out, as it comes. */
#include "cli.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct run_options {
    cli_common common;
    const char *prompt, *file, *trace;
    uint32_t n_max, n_ctx, n_batch;
    int cache, latent, draft;
    bool parse_special, echo, json;
    moe_sampler_options sampler;
    cli_bias_list bias;
} run_options;

/* All that a generation holds; run_free() lets go of it. */
typedef struct run_state {
    moe_model *model;
    const moe_tokenizer *tokenizer; /* the model's */
    moe_session *session;
    cli_trace *trace;
    moe_sampler *sampler;
    moe_token *prompt;              /* [n_prompt] */
    size_t n_prompt;
    float *logits;                  /* [n_vocab] */
    moe_decoder decoder;
    cli_text piece;
    char *text;                     /* [text_bytes]: what was generated, for --json */
    size_t text_bytes;
    moe_token *tokens;              /* [n_tokens]: the same as tokens */
    uint32_t n_tokens;
    const char *finish;             /* why it ended */
    double load_s, prefill_s, decode_s;
    size_t n_prefilled;             /* n_prompt, or 0 if it was interrupted before */
    uint32_t n_decoded;             /* tokens that went through the model one by one */
} run_state;

static void run_free(run_state *run)
{
    free(run->tokens);
    free(run->text);
    free(run->piece.data);
    free(run->logits);
    free(run->prompt);
    moe_sampler_free(run->sampler);
    moe_session_close(run->session);
    moe_model_close(run->model);
}

/* ---------------------------------------------------------------------------------- setup -- */

static char *run_read_prompt(const run_options *o, size_t *bytes)
{
    if (o->prompt) {
        *bytes = strlen(o->prompt);
        char *text = cli_alloc(NULL, *bytes + 1, 1);
        return memcpy(text, o->prompt, *bytes + 1);
    }
    if ((!o->file || !strcmp(o->file, "-")) && system_is_terminal(stdin))
        fputs("moe: reading the prompt from the terminal; Ctrl-D on an empty line ends it\n",
              stderr);
    char *text = cli_read_all(o->file, bytes);
    if (text && *bytes && text[*bytes - 1] == '\n')
        --*bytes; /* the newline that editors and echo put at the end is not part of the prompt */
    return text;
}

/* The context: what was asked for, or the library's default, or as much more as this prompt and its
 * continuation need, up to what the model was trained on. */
static uint32_t run_context(const run_options *o, const run_state *run)
{
    if (o->n_ctx)
        return o->n_ctx;
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(run->model, &info);
    uint32_t usual = info.n_ctx_train < 4096 ? info.n_ctx_train : 4096;
    uint64_t need = (uint64_t)run->n_prompt + o->n_max;
    if (need <= usual)
        return 0;
    return need < info.n_ctx_train ? (uint32_t)need : info.n_ctx_train;
}

/* The prompt as tokens. */
static int run_encode_prompt(run_state *run, const char *path, const run_options *o)
{
    run->tokenizer = moe_model_tokenizer(run->model);
    if (!run->tokenizer)
        return cli_fail("%s: no tokenizer for this file; `moe logits` takes token ids", path);
    size_t bytes;
    char *text = run_read_prompt(o, &bytes);
    if (!text)
        return EXIT_FAILED;
    run->prompt = cli_encode(run->tokenizer, text, bytes,
                             MOE_ENCODE_ADD_SPECIAL |
                                 (o->parse_special ? MOE_ENCODE_PARSE_SPECIAL : 0),
                             &run->n_prompt);
    if (run->prompt && o->echo && !o->json)
        cli_write_text(text, bytes);
    free(text);
    if (!run->prompt)
        return EXIT_FAILED;
    if (!run->n_prompt)
        return cli_fail("the prompt is empty: give one with -p, -f or on standard input");
    return EXIT_OK;
}

static int run_open_session(run_state *run, const run_options *o)
{
    moe_session_options so;
    common_session_options(&so, &o->common, o->cache);
    so.n_ctx = run_context(o, run);
    so.n_batch = o->n_batch;
    so.latent = (moe_latent)o->latent;
    so.draft = (moe_draft)o->draft;
    moe_observer observer;
    if (o->trace) {
        const int status = trace_open(&run->trace, o->trace, run->model, &observer);
        if (status)
            return status;
        so.observer = &observer;
        so.draft = MOE_DRAFT_OFF; /* the experts of tokens that come, not of guesses */
    }
    return common_session(&run->session, run->model, &so);
}

static int run_setup(run_state *run, const char *path, const run_options *o)
{
    const double start = system_seconds();
    int status = common_open(&run->model, path, &o->common);
    if (!status)
        status = run_encode_prompt(run, path, o);
    if (!status)
        status = run_open_session(run, o);
    if (status)
        return status;
    if (run->n_prompt > moe_session_capacity(run->session))
        return cli_fail("the prompt has %zu tokens, but the context holds %u%s: shorten it, or "
                        "give a larger --ctx", run->n_prompt, moe_session_capacity(run->session),
                        o->n_ctx ? "" : ", as many as the model was trained with");
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(run->model, &info);
    moe_error error = {0};
    moe_status made = moe_sampler_new(&run->sampler, info.n_vocab, &o->sampler, NULL, &error);
    if (made)
        return cli_fail_status(made, &error, NULL);
    run->logits = cli_alloc(NULL, info.n_vocab, sizeof *run->logits);
    run->load_s = system_seconds() - start;
    return EXIT_OK;
}

/* ------------------------------------------------------------------------------ generation -- */

/* Shows the text of a token, or keeps it for --json. token -1: the end of the stream. */
static void run_put(run_state *run, moe_token token, bool keep)
{
    size_t bytes = cli_decode(run->tokenizer, &run->decoder, token, &run->piece);
    if (!keep) {
        cli_write_text(run->piece.data, bytes);
        return;
    }
    run->text = cli_alloc(run->text, run->text_bytes + bytes, 1);
    memcpy(run->text + run->text_bytes, run->piece.data, bytes);
    run->text_bytes += bytes;
}

/* A failed call: Ctrl-C is a way to finish, everything else an error. */
static int run_stopped(run_state *run, moe_status status)
{
    if (status != MOE_ERR_CANCELLED || !system_interrupted())
        return cli_fail_status(status, moe_session_error(run->session), NULL);
    run->finish = "interrupted";
    return EXIT_INTERRUPTED;
}

/* One token: picked, shown, fed back. Sets finish if it is the last. */
static int run_step(run_state *run, const run_options *o)
{
    moe_token token;
    if (run->n_tokens == o->n_max) {
        run->finish = "length";
        return EXIT_OK;
    }
    if (moe_sampler_pick(run->sampler, run->logits, &token))
        return cli_fail("no token has a finite logit: is the model file damaged?");
    if (moe_tokenizer_is_end(run->tokenizer, token)) {
        run->finish = "end";
        return EXIT_OK;
    }
    if (run->n_tokens % 256 == 0)
        run->tokens = cli_alloc(run->tokens, run->n_tokens + 256, sizeof *run->tokens);
    run->tokens[run->n_tokens++] = token;
    run_put(run, token, o->json);
    if (run->n_tokens == o->n_max)
        return EXIT_OK; /* the logits after the last token are of no use */
    if (moe_session_length(run->session) == moe_session_capacity(run->session)) {
        run->finish = "context";
        return EXIT_OK;
    }
    moe_status status = moe_session_eval(run->session, &token, 1, 1, run->logits);
    if (status)
        return run_stopped(run, status);
    run->n_decoded++;
    return EXIT_OK;
}

static int run_generate(run_state *run, const run_options *o)
{
    double start = system_seconds();
    moe_status status = moe_session_eval(run->session, run->prompt, run->n_prompt, 1, run->logits);
    progress_clear();
    run->prefill_s = system_seconds() - start;
    if (status)
        return run_stopped(run, status);
    run->n_prefilled = run->n_prompt;
    for (size_t i = 0; i < run->n_prompt; i++)
        moe_sampler_accept(run->sampler, run->prompt[i]);

    int result = EXIT_OK;
    start = system_seconds();
    while (!run->finish && result == EXIT_OK && !ferror(stdout))
        result = run_step(run, o);
    run->decode_s = system_seconds() - start;
    run_put(run, -1, o->json);
    return result;
}

/* ---------------------------------------------------------------------------------- report -- */

static double rate(double n, double seconds)
{
    return seconds > 0 ? n / seconds : 0;
}

static moe_draft_stats run_draft_stats(const run_state *run)
{
    moe_draft_stats stats = {.size = sizeof stats};
    moe_session_draft_stats(run->session, &stats);
    return stats;
}

static void run_report_json(const run_state *run, const char *path)
{
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_string(&json, "model", path);
    json_text(&json, "text", run->text ? run->text : "", run->text_bytes);
    json_string(&json, "finish", run->finish);
    json_uint(&json, "n_prompt", run->n_prompt);
    json_open(&json, "tokens", '[');
    for (uint32_t i = 0; i < run->n_tokens; i++)
        json_int(&json, NULL, run->tokens[i]);
    json_close(&json, ']');
    json_number(&json, "load_s", run->load_s, 6);
    json_number(&json, "prefill_s", run->prefill_s, 6);
    json_number(&json, "prefill_tokens_per_s", rate((double)run->n_prefilled, run->prefill_s), 6);
    json_number(&json, "decode_s", run->decode_s, 6);
    json_number(&json, "decode_tokens_per_s", rate(run->n_decoded, run->decode_s), 6);
    const moe_draft_stats draft = run_draft_stats(run);
    json_open(&json, "draft", '{');
    json_uint(&json, "n_evaluations", draft.n_evaluations);
    json_uint(&json, "n_drafted", draft.n_drafted);
    json_uint(&json, "n_accepted", draft.n_accepted);
    json_number(&json, "saved_s", draft.saved_s, 6);
    json_close(&json, '}');
    json_uint(&json, "peak_rss_bytes", system_peak_rss_bytes());
    json_close(&json, '}');
    json_end(&json);
}

static void run_report(const run_state *run)
{
    cli_size rss;
    char drafted[96] = "";
    const moe_draft_stats draft = run_draft_stats(run);
    if (draft.n_drafted)
        snprintf(drafted, sizeof drafted, " | guessed: %" PRIu64 ", right: %" PRIu64
                 ", saved %.2f s", draft.n_drafted, draft.n_accepted, draft.saved_s);
    fprintf(stderr,
            "\nprompt: %zu tokens, %.1f tokens/s | generated: %u tokens, %.1f tokens/s%s | "
            "load %.2f s | peak memory %s%s%s\n",
            run->n_prompt, rate((double)run->n_prefilled, run->prefill_s), run->n_tokens,
            rate(run->n_decoded, run->decode_s), drafted, run->load_s,
            cli_size_text(&rss, system_peak_rss_bytes()),
            strcmp(run->finish, "end") ? " | stopped: " : "",
            !strcmp(run->finish, "end")       ? ""
            : !strcmp(run->finish, "length")  ? "-n reached"
            : !strcmp(run->finish, "context") ? "context full, --ctx makes it longer"
                                              : run->finish);
}

/* Reads the arguments over the defaults in *o, as cli_parse() does. */
static bool run_parse(run_options *o, int argc, char **argv, const char **path, int *status)
{
    static const char *const draft_names[] = {"off", "auto", "ngram", "mtp", NULL};
    cli_option common_table[COMMON_OPTIONS];
    const cli_option table[] = {
        {'p', "prompt", CLI_TEXT, &o->prompt, "TEXT", "the prompt", NULL},
        {'f', "file", CLI_TEXT, &o->file, "FILE",
         "read the prompt from a file; \"-\": from standard input", NULL},
        {'n', "n-tokens", CLI_U32, &o->n_max, "N", "generate at most N tokens", NULL},
        {0, "echo", CLI_FLAG, &o->echo, NULL, "print the prompt, too", NULL},
        {0, "json", CLI_FLAG, &o->json, NULL, "print one JSON object at the end instead of text",
         NULL},
        {0, "parse-special", CLI_FLAG, &o->parse_special, NULL,
         "\"<|im_start|>\" and the like in the prompt become special\ntokens; never use it on text "
         "from others", NULL},
        {0, "temp", CLI_FLOAT, &o->sampler.temperature, "T",
         "temperature; 0: always the most likely token", NULL},
        {0, "top-k", CLI_U32, &o->sampler.top_k, "K", "of the K most likely tokens; 0: off", NULL},
        {0, "top-p", CLI_FLOAT, &o->sampler.top_p, "P",
         "of the fewest tokens that have the probability P; 1: off", NULL},
        {0, "min-p", CLI_FLOAT, &o->sampler.min_p, "P",
         "of those at least P times as likely as the best; 0: off", NULL},
        {0, "repeat-penalty", CLI_FLOAT, &o->sampler.repetition_penalty, "X",
         "makes tokens of the last ones less likely; 1: off", NULL},
        {0, "frequency-penalty", CLI_FLOAT, &o->sampler.frequency_penalty, "X",
         "the same, for each occurrence; 0: off", NULL},
        {0, "presence-penalty", CLI_FLOAT, &o->sampler.presence_penalty, "X",
         "the same, once; 0: off", NULL},
        {0, "penalty-window", CLI_U32, &o->sampler.penalty_window, "N",
         "how many tokens the penalties look back on", NULL},
        {0, "logit-bias", CLI_BIAS, &o->bias, "ID=B",
         "added to a token's logit; -inf forbids it; may be repeated", NULL},
        {0, "seed", CLI_U64, &o->sampler.seed, "N", "the same seed gives the same text", NULL},
        {0, "ctx", CLI_U32, &o->n_ctx, "N",
         "tokens of context; 0: enough for prompt and -n, up to what\nthe model was trained on",
         NULL},
        {0, "batch", CLI_U32, &o->n_batch, "N", "prompt tokens computed at once", NULL},
        {0, "cache", CLI_CHOICE, &o->cache, "TYPE", "type of the key/value cache", cache_names},
        {0, "latent", CLI_CHOICE, &o->latent, "FORM", LATENT_HELP, latent_names},
        {0, "trace-experts", CLI_TEXT, &o->trace, "FILE",
         "write which experts each token used, for `moe experts`;\nno tokens are drafted then",
         NULL},
        {0, "draft", CLI_CHOICE, &o->draft, "HOW",
         "compute tokens ahead that are guessed to come: the text is\nthe same, the speed is not. "
         "auto: where it is measured to be\nfaster; ngram: what followed earlier; mtp: what the "
         "model's\nlayer for it says", draft_names},
        {0},
    };
    const cli_option *tables[] = {table, common_options(&o->common, common_table), NULL};
    if (!cli_parse(&verb_run, tables, argc, argv, path, status))
        return false;
    if (o->prompt && o->file) {
        cli_fail("run: -p and -f are both a prompt: give one");
        *status = EXIT_USAGE;
        return false;
    }
    o->sampler.logit_bias = o->bias.item;
    o->sampler.n_logit_bias = o->bias.n;
    return true;
}

static int run_main(int argc, char **argv)
{
    run_options o = {.n_max = 256, .draft = MOE_DRAFT_AUTO, .latent = MOE_LATENT_EXPANDED};
    run_state run = {.finish = NULL};
    moe_session_options so;
    const char *path;
    int status;
    moe_session_options_init(&so);
    o.n_batch = so.n_batch;
    moe_sampler_options_init(&o.sampler);
    if (!common_init(&o.common))
        return EXIT_USAGE;
    if (!run_parse(&o, argc, argv, &path, &status)) {
        free(o.bias.item);
        return status;
    }
    status = run_setup(&run, path, &o);
    if (status == EXIT_OK) {
        status = run_generate(&run, &o);
        if (run.finish && o.json)
            run_report_json(&run, path);
        else if (run.finish)
            putchar('\n');
        fflush(stdout);
        if (run.finish && !o.json && !o.common.quiet)
            run_report(&run);
    }
    const int traced = trace_close(run.trace, run.finish != NULL);
    run_free(&run);
    free(o.bias.item);
    return status ? status : traced;
}

const cli_verb verb_run = {
    "run", "MODEL", "continues a prompt",
    "MODEL is a GGUF file (of a split one, the first part) or a .moe file. The prompt comes from\n"
    "-p, from -f or from standard input; one newline at the end of the last two is left out. It\n"
    "is continued as it is: no chat template is applied. Text goes to standard output as it is\n"
    "generated, a line with the speed to standard error. Ctrl-C ends the generation and keeps\n"
    "what is there.",
    "  moe run model.gguf -p \"The capital of France is\" -n 32\n"
    "  moe run model.gguf -f story.txt --temp 0.8 --top-p 0.95 --seed 1\n"
    "  echo \"Once upon a time\" | moe run model.gguf --json | jq -r .text\n"
    "  moe run model.gguf --parse-special -p '<|im_start|>user\n"
    "  Why is the sky blue?<|im_end|>\n"
    "  <|im_start|>assistant\n"
    "  '\n",
    1, run_main};
