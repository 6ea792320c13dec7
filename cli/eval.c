/* cli/eval.c - `moe eval`: how well a model predicts a text, and how far it is from another.
 *
 * The protocol (the same as that of llama.cpp's llama-perplexity, so that figures can be compared):
 * the text is encoded once and cut into windows of --ctx tokens; what is left over is dropped. Each
 * window is computed alone. If the tokenizer adds BOS, the window's first token is replaced by it.
 * The first half of a window is context; the predictions at positions n/2 .. n-2 are scored.
 *
 * The file of --save-logits, little-endian:
 *     char     magic[8]   "moelogit"
 *     uint32   version    1
 *     uint32   n_vocab, window, n_window
 *     int32    tokens[n_window][window]                      as they were evaluated
 *     float32  logits[n_window][window - 1 - window/2][n_vocab]
 * It is written and read as a stream, in the order of the evaluation. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows of logits held at once: enough for a matrix product, small with any vocabulary. */
enum { ROWS = 64 };

typedef struct eval_options {
    cli_common common;
    const char *save, *base, *trace;
    uint32_t window;
    int cache;
    bool json;
} eval_options;

/* A mean with its standard error. */
typedef struct eval_sum {
    double sum, sum_squares;
    uint64_t n;
} eval_sum;

typedef struct eval_header {
    char magic[8];
    uint32_t version, n_vocab, window, n_window;
} eval_header;

typedef struct eval_state {
    moe_session *session;
    cli_windows text;
    uint32_t n_vocab;
    float *logits, *base_logits; /* [ROWS][n_vocab]; base_logits if there is a base */
    cli_output save;     /* open if file is set */
    cli_trace *trace;
    FILE *base;
    const char *base_path;
    eval_sum nll, kl;
    double *kl_values;   /* [scored]: for the percentiles */
    uint64_t n_same_top;
    double seconds;
} eval_state;

/* ------------------------------------------------------------------------------ statistics -- */

static void sum_add(eval_sum *s, double x)
{
    s->sum += x;
    s->sum_squares += x * x;
    s->n++;
}

static double sum_mean(const eval_sum *s)
{
    return s->sum / (double)s->n;
}

static double sum_error(const eval_sum *s)
{
    double mean = sum_mean(s), variance = s->sum_squares / (double)s->n - mean * mean;
    return s->n > 1 && variance > 0 ? sqrt(variance / (double)(s->n - 1)) : 0;
}

/* log(sum(exp(x))) of [n], and the index of the largest, ties to the lowest. */
static double log_sum_exp(const float *x, uint32_t n, uint32_t *best)
{
    uint32_t top = 0;
    for (uint32_t i = 1; i < n; i++)
        if (x[i] > x[top])
            top = i;
    double max = (double)x[top], sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)x[i] - max);
    *best = top;
    return max + log(sum);
}

/* KL(base || this) of two rows of logits, given their log_sum_exp. */
static double kl_divergence(const float *base, double base_norm, const float *x, double norm,
                            uint32_t n)
{
    double kl = 0;
    for (uint32_t i = 0; i < n; i++) {
        double log_p = (double)base[i] - base_norm;
        double p = exp(log_p);
        if (p > 0)
            kl += p * (log_p - ((double)x[i] - norm));
    }
    return kl;
}

/* ------------------------------------------------------------------------------------ text -- */

static uint32_t scored_per_window(const eval_state *e)
{
    return e->text.window - 1 - e->text.window / 2;
}

/* ----------------------------------------------------------------------------------- files -- */

static eval_header make_header(const eval_state *e)
{
    return (eval_header){{'m', 'o', 'e', 'l', 'o', 'g', 'i', 't'}, 1, e->n_vocab, e->text.window,
                         e->text.n_window};
}

static int save_begin(eval_state *e, const char *path)
{
    eval_header header = make_header(e);
    if (!output_open(&e->save, path)) {
        e->save.file = NULL;
        return EXIT_FAILED;
    }
    return output_write(&e->save, &header, sizeof header) &&
                   output_write(&e->save, e->text.tokens,
                                (size_t)e->text.n_window * e->text.window * sizeof *e->text.tokens)
               ? EXIT_OK
               : EXIT_FAILED;
}

static int base_read(eval_state *e, void *data, size_t bytes)
{
    if (fread(data, 1, bytes, e->base) == bytes)
        return EXIT_OK;
    return cli_fail("%s: ends too early: write it again with --save-logits", e->base_path);
}

/* The base must be of the same text, cut in the same way, with the same vocabulary. */
static int base_begin(eval_state *e, const char *path)
{
    eval_header want = make_header(e), got;
    e->base_path = path;
    e->base = system_open_file(path, "rb");
    if (!e->base)
        return cli_fail("%s: cannot be opened: write it first with --save-logits", path);
    if (base_read(e, &got, sizeof got))
        return EXIT_FAILED;
    if (memcmp(got.magic, want.magic, sizeof got.magic) || got.version != want.version)
        return cli_fail("%s: not a file of --save-logits that this version can read", path);
    if (got.n_vocab != want.n_vocab)
        return cli_fail("%s: expected a vocabulary of %u tokens, got %u: the models cannot be "
                        "compared", path, want.n_vocab, got.n_vocab);
    if (got.window != want.window || got.n_window != want.n_window)
        return cli_fail("%s: expected %u windows of %u tokens, got %u of %u: use the same text and "
                        "the same --ctx", path, want.n_window, want.window, got.n_window,
                        got.window);
    for (size_t i = 0; i < (size_t)e->text.n_window * e->text.window; i++) {
        moe_token token;
        if (base_read(e, &token, sizeof token))
            return EXIT_FAILED;
        if (token != e->text.tokens[i])
            return cli_fail("%s: token %zu: expected %d, got %d: it was made with another text or "
                            "tokenizer", path, i, (int)e->text.tokens[i], (int)token);
    }
    return EXIT_OK;
}

/* -------------------------------------------------------------------------------- the work -- */

/* Scores rows of logits, [n][n_vocab], against the tokens that followed: next[n]. */
static int score_rows(eval_state *e, const moe_token *next, size_t n)
{
    size_t row_bytes = (size_t)e->n_vocab * sizeof(float);
    if (e->save.file && !output_write(&e->save, e->logits, n * row_bytes))
        return EXIT_FAILED;
    if (e->base && base_read(e, e->base_logits, n * row_bytes))
        return EXIT_FAILED;
    for (size_t i = 0; i < n; i++) {
        const float *row = e->logits + i * e->n_vocab;
        uint32_t best, base_best;
        double norm = log_sum_exp(row, e->n_vocab, &best);
        double nll = norm - (double)row[next[i]];
        if (!isfinite(nll))
            return cli_fail("the logits are not finite: is the model file damaged?");
        sum_add(&e->nll, nll);
        if (!e->base)
            continue;
        const float *base_row = e->base_logits + i * e->n_vocab;
        double base_norm = log_sum_exp(base_row, e->n_vocab, &base_best);
        double kl = kl_divergence(base_row, base_norm, row, norm, e->n_vocab);
        if (!isfinite(kl))
            return cli_fail("%s: its logits are not finite", e->base_path);
        e->kl_values[e->kl.n] = kl;
        sum_add(&e->kl, kl);
        e->n_same_top += best == base_best;
    }
    return EXIT_OK;
}

static int eval_window(eval_state *e, const moe_token *tokens)
{
    uint32_t first = e->text.window / 2, last = e->text.window - 1;
    moe_status status = moe_session_rewind(e->session, 0);
    if (!status)
        status = moe_session_eval(e->session, tokens, first, 0, NULL);
    for (uint32_t at = first, n; !status && at < last; at += n) {
        n = last - at < ROWS ? last - at : ROWS;
        status = moe_session_eval(e->session, tokens + at, n, n, e->logits);
        if (!status && score_rows(e, tokens + at + 1, n))
            return EXIT_FAILED;
    }
    return status ? cli_fail_status(status, moe_session_error(e->session), NULL) : EXIT_OK;
}

static int eval_windows(eval_state *e)
{
    double start = system_seconds();
    int result = EXIT_OK;
    for (uint32_t i = 0; i < e->text.n_window && result == EXIT_OK; i++) {
        progress_show("eval", i, e->text.n_window);
        result = eval_window(e, e->text.tokens + (size_t)i * e->text.window);
    }
    progress_clear();
    e->seconds = system_seconds() - start;
    return result;
}

/* ---------------------------------------------------------------------------------- report -- */

static double percentile(const eval_state *e, double part)
{
    return e->kl_values[(size_t)((double)(e->kl.n - 1) * part)];
}

static void report_text(const eval_state *e)
{
    double mean = sum_mean(&e->nll), error = sum_error(&e->nll), ppl = exp(mean);
    printf("perplexity      %.4f +/- %.4f\n", ppl, ppl * error);
    printf("nll per token   %.6f +/- %.6f\n", mean, error);
    if (e->base) {
        double same = (double)e->n_same_top / (double)e->kl.n;
        printf("KL divergence   %.6g +/- %.2g (median %.6g, 99 %% %.6g, max %.6g)\n",
               sum_mean(&e->kl), sum_error(&e->kl), percentile(e, 0.5), percentile(e, 0.99),
               percentile(e, 1));
        printf("same top token  %.2f %% +/- %.2f %%\n", 100 * same,
               e->kl.n > 1 ? 100 * sqrt(same * (1 - same) / (double)(e->kl.n - 1)) : 0);
    }
    printf("scored          %llu tokens, in %u windows of %u, of %zu in the text%s\n",
           (unsigned long long)e->nll.n, e->text.n_window, e->text.window, e->text.n_text,
           e->text.bos ? "; BOS in front" : "");
}

static void report_json(const eval_state *e, const char *model, const char *file)
{
    double mean = sum_mean(&e->nll), error = sum_error(&e->nll), ppl = exp(mean);
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_string(&json, "model", model);
    json_string(&json, "file", file);
    json_uint(&json, "n_tokens", e->text.n_text);
    json_uint(&json, "window", e->text.window);
    json_uint(&json, "n_window", e->text.n_window);
    json_uint(&json, "n_scored", e->nll.n);
    json_bool(&json, "bos", e->text.bos);
    json_number(&json, "perplexity", ppl, 10);
    json_number(&json, "perplexity_error", ppl * error, 6);
    json_number(&json, "nll", mean, 10);
    json_number(&json, "nll_error", error, 6);
    if (e->base) {
        double same = (double)e->n_same_top / (double)e->kl.n;
        json_string(&json, "base", e->base_path);
        json_number(&json, "kl", sum_mean(&e->kl), 10);
        json_number(&json, "kl_error", sum_error(&e->kl), 6);
        json_number(&json, "kl_median", percentile(e, 0.5), 10);
        json_number(&json, "kl_p99", percentile(e, 0.99), 10);
        json_number(&json, "kl_max", percentile(e, 1), 10);
        json_number(&json, "same_top", same, 10);
        json_number(&json, "same_top_error",
                    e->kl.n > 1 ? sqrt(same * (1 - same) / (double)(e->kl.n - 1)) : 0, 6);
    }
    json_number(&json, "seconds", e->seconds, 6);
    json_close(&json, '}');
    json_end(&json);
}

/* ----------------------------------------------------------------------------------- entry -- */

static int eval_setup(eval_state *e, moe_model *model, const char *path, const eval_options *o)
{
    const moe_tokenizer *tokenizer = moe_model_tokenizer(model);
    if (!tokenizer)
        return cli_fail("no tokenizer in this model file; `moe logits` takes token ids");
    int result = windows_read(&e->text, tokenizer, path, o->window);
    if (result)
        return result;
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    e->n_vocab = info.n_vocab;
    moe_session_options so;
    common_session_options(&so, &o->common, o->cache);
    so.n_ctx = e->text.window;
    so.n_logits = 16;
    moe_observer observer;
    if (o->trace) {
        result = trace_open(&e->trace, o->trace, model, &observer);
        if (result)
            return result;
        so.observer = &observer;
    }
    result = common_session(&e->session, model, &so);
    if (result)
        return result;
    e->logits = cli_alloc(NULL, (size_t)ROWS * e->n_vocab, sizeof(float));
    if (o->base) {
        e->base_logits = cli_alloc(NULL, (size_t)ROWS * e->n_vocab, sizeof(float));
        e->kl_values = cli_alloc(NULL, (size_t)e->text.n_window * scored_per_window(e),
                                 sizeof(double));
        result = base_begin(e, o->base);
    }
    return result ? result : o->save ? save_begin(e, o->save) : EXIT_OK;
}

static int eval_run(moe_model *model, const char *model_path, const char *path,
                    const eval_options *o)
{
    eval_state e = {.session = NULL};
    int result = eval_setup(&e, model, path, o);
    if (result == EXIT_OK)
        result = eval_windows(&e);
    if (e.save.file && !output_close(&e.save, result == EXIT_OK) && result == EXIT_OK)
        result = EXIT_FAILED;
    const int traced = trace_close(e.trace, result == EXIT_OK);
    result = result ? result : traced;
    if (result == EXIT_OK) {
        if (e.base)
            qsort(e.kl_values, e.kl.n, sizeof *e.kl_values, cli_compare_doubles);
        if (o->json)
            report_json(&e, model_path, path);
        else
            report_text(&e);
    }
    if (e.base)
        fclose(e.base);
    free(e.kl_values);
    free(e.base_logits);
    free(e.logits);
    free(e.text.tokens);
    moe_session_close(e.session);
    return result;
}

static int eval_main(int argc, char **argv)
{
    eval_options o = {.window = 512};
    if (!common_init(&o.common))
        return EXIT_USAGE;
    cli_option common_table[COMMON_OPTIONS];
    const cli_option table[] = {
        {0, "ctx", CLI_U32, &o.window, "N", "tokens per window", NULL},
        {0, "save-logits", CLI_TEXT, &o.save, "FILE",
         "write the logits of all scored positions, 4 bytes each", NULL},
        {0, "kl-base", CLI_TEXT, &o.base, "FILE",
         "compare with such a file: mean KL divergence of this\nmodel from that one, and how often "
         "the best token agrees", NULL},
        {0, "cache", CLI_CHOICE, &o.cache, "TYPE", "type of the key/value cache", cache_names},
        {0, "trace-experts", CLI_TEXT, &o.trace, "FILE",
         "write which experts each token used, for `moe experts`", NULL},
        {0, "json", CLI_FLAG, &o.json, NULL, "print one JSON object", NULL},
        {0},
    };
    const cli_option *tables[] = {table, common_options(&o.common, common_table), NULL};
    const char *path[2];
    int status;
    if (!cli_parse(&verb_eval, tables, argc, argv, path, &status))
        return status;
    if (o.window < WINDOW_MIN) {
        cli_fail("eval: --ctx: expected %d or more", WINDOW_MIN);
        return EXIT_USAGE;
    }
    moe_model *model;
    status = common_open(&model, path[0], &o.common);
    if (status)
        return status;
    status = eval_run(model, path[0], path[1], &o);
    moe_model_close(model);
    return status;
}

const cli_verb verb_eval = {
    "eval", "MODEL FILE", "measures perplexity on a text, and KL divergence",
    "The text is cut into windows of --ctx tokens, each computed alone; the second half of each\n"
    "is scored, as llama.cpp's llama-perplexity does. Standard errors follow the \"+/-\".\n"
    "FILE may be \"-\".",
    "  moe eval model.gguf text.txt\n"
    "  moe eval model-f16.gguf text.txt --save-logits base.logits\n"
    "  moe eval model-q4.gguf text.txt --kl-base base.logits --json\n",
    2, eval_main};
