/* cli/bench.c - `moe bench`: the speed of prefill and decode, and how near it is to the memory's.
 *
 * A repetition is: forget everything, compute `depth` tokens, then `n_prompt` tokens in one call
 * (prefill; timed), then `n_gen` tokens one by one (decode; timed). Before the first there is a
 * warm-up that is not counted, which also brings the file's pages into memory. The tokens are
 * pseudo-random: with a mixture of experts, text from one subject would use fewer of them. */
#include "cli.h"

#include <stdlib.h>

typedef struct bench_options {
    cli_common common;
    uint32_t n_prompt, n_gen, n_repeat, depth, n_batch;
    int cache;
    bool json;
} bench_options;

typedef struct bench_state {
    moe_session *session;
    moe_token *tokens;             /* [depth + n_prompt + n_gen] */
    float *logits;                 /* [n_vocab] */
    double *prefill_s, *decode_s;  /* [n_repeat], seconds */
} bench_state;

/* Rates in tokens per second. */
typedef struct bench_rate {
    double median, min, max;
} bench_rate;

static bench_rate bench_rates(double *seconds, uint32_t n_repeat, uint32_t n_tok)
{
    qsort(seconds, n_repeat, sizeof *seconds, cli_compare_doubles);
    double median = n_repeat % 2 ? seconds[n_repeat / 2]
                                 : (seconds[n_repeat / 2 - 1] + seconds[n_repeat / 2]) / 2;
    return (bench_rate){n_tok / median, n_tok / seconds[n_repeat - 1], n_tok / seconds[0]};
}

static moe_status bench_once(bench_state *b, const bench_options *o, double *prefill_s,
                             double *decode_s)
{
    const moe_token *tokens = b->tokens;
    moe_status status = moe_session_rewind(b->session, 0);
    if (!status && o->depth)
        status = moe_session_eval(b->session, tokens, o->depth, 0, NULL);
    tokens += o->depth;
    double start = system_seconds();
    if (!status && o->n_prompt)
        status = moe_session_eval(b->session, tokens, o->n_prompt, 1, b->logits);
    *prefill_s = system_seconds() - start;
    tokens += o->n_prompt;
    start = system_seconds();
    for (uint32_t i = 0; !status && i < o->n_gen; i++)
        status = moe_session_eval(b->session, tokens + i, 1, 1, b->logits);
    *decode_s = system_seconds() - start;
    return status;
}

static int bench_measure(bench_state *b, const bench_options *o)
{
    for (uint32_t i = 0; i <= o->n_repeat; i++) { /* 0 is the warm-up */
        progress_show("bench", i, (uint64_t)o->n_repeat + 1);
        double prefill_s, decode_s;
        moe_status status = bench_once(b, o, &prefill_s, &decode_s);
        if (status)
            return cli_fail_status(status, moe_session_error(b->session), NULL);
        if (i) {
            b->prefill_s[i - 1] = prefill_s;
            b->decode_s[i - 1] = decode_s;
        }
    }
    progress_clear();
    return EXIT_OK;
}

/* ---------------------------------------------------------------------------------- report -- */

static void json_rate(cli_json *json, const char *key, uint32_t n_tok, bench_rate r)
{
    json_open(json, key, '{');
    json_uint(json, "n_tokens", n_tok);
    json_number(json, "median", r.median, 6);
    json_number(json, "min", r.min, 6);
    json_number(json, "max", r.max, 6);
    json_close(json, '}');
}

static void report_json(bench_state *b, const bench_options *o, const moe_model_info *info,
                        const char *path, double load_s)
{
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_string(&json, "model", path);
    json_string(&json, "architecture", info->architecture);
    json_string(&json, "quantization", info->quantization);
    json_string(&json, "device", info->device);
    json_uint(&json, "threads", moe_session_threads(b->session));
    json_uint(&json, "batch", o->n_batch);
    json_string(&json, "cache", cache_names[o->cache]);
    json_uint(&json, "depth", o->depth);
    json_uint(&json, "repetitions", o->n_repeat);
    if (o->n_prompt)
        json_rate(&json, "prefill_tokens_per_s", o->n_prompt,
                  bench_rates(b->prefill_s, o->n_repeat, o->n_prompt));
    if (o->n_gen) {
        bench_rate r = bench_rates(b->decode_s, o->n_repeat, o->n_gen);
        json_rate(&json, "decode_tokens_per_s", o->n_gen, r);
        json_number(&json, "decode_bytes_per_s", r.median * (double)info->weight_bytes_active, 6);
    }
    json_uint(&json, "weight_bytes_per_token", info->weight_bytes_active);
    json_number(&json, "load_s", load_s, 6);
    json_uint(&json, "peak_rss_bytes", system_peak_rss_bytes());
    json_close(&json, '}');
    json_end(&json);
}

static void print_rate(const char *what, uint32_t n_tok, bench_rate r)
{
    printf("%-8s %5u tokens  %10.2f tokens/s   (min %.2f, max %.2f)\n", what, n_tok, r.median,
           r.min, r.max);
}

static void report_text(bench_state *b, const bench_options *o, const moe_model_info *info,
                        const char *path, double load_s)
{
    cli_size size;
    printf("%s: %s, %s, %s; ", path, info->architecture, info->quantization, info->device);
    const uint32_t n_threads = moe_session_threads(b->session);
    printf("%u thread%s; cache %s, depth %u, median of %u\n", n_threads, n_threads == 1 ? "" : "s",
           cache_names[o->cache], o->depth, o->n_repeat);
    if (o->n_prompt)
        print_rate("prefill", o->n_prompt, bench_rates(b->prefill_s, o->n_repeat, o->n_prompt));
    if (o->n_gen) {
        bench_rate r = bench_rates(b->decode_s, o->n_repeat, o->n_gen);
        print_rate("decode", o->n_gen, r);
        printf("weights  %s per token, so decode reads %.2f GB/s\n",
               cli_size_text(&size, info->weight_bytes_active),
               r.median * (double)info->weight_bytes_active * 1e-9);
    }
    printf("load     %.3f s\n", load_s);
    printf("memory   %s at the peak, file pages included\n",
           cli_size_text(&size, system_peak_rss_bytes()));
}

/* ----------------------------------------------------------------------------------- entry -- */

static int bench_run(moe_model *model, const char *path, const bench_options *o, double start)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    uint64_t n = (uint64_t)o->depth + o->n_prompt + o->n_gen;
    if (n > UINT32_MAX)
        return cli_fail("bench: -d, -p and -n together are more than a context can hold");
    moe_session_options so;
    common_session_options(&so, &o->common, o->cache);
    so.n_ctx = (uint32_t)n;
    so.n_batch = o->n_batch;
    bench_state b = {.session = NULL};
    int result = common_session(&b.session, model, &so);
    if (result)
        return result;
    double load_s = system_seconds() - start;
    b.tokens = cli_alloc(NULL, (size_t)n, sizeof *b.tokens);
    uint64_t random = 88172645463325252u; /* xorshift64 */
    for (uint64_t i = 0; i < n; i++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        b.tokens[i] = (moe_token)(random % info.n_vocab);
    }
    b.logits = cli_alloc(NULL, info.n_vocab, sizeof *b.logits);
    b.prefill_s = cli_alloc(NULL, o->n_repeat, sizeof(double));
    b.decode_s = cli_alloc(NULL, o->n_repeat, sizeof(double));
    result = bench_measure(&b, o);
    if (result == EXIT_OK)
        (o->json ? report_json : report_text)(&b, o, &info, path, load_s);
    free(b.decode_s);
    free(b.prefill_s);
    free(b.logits);
    free(b.tokens);
    moe_session_close(b.session);
    return result;
}

static int bench_main(int argc, char **argv)
{
    moe_session_options so;
    moe_session_options_init(&so);
    bench_options o = {.n_prompt = 512, .n_gen = 64, .n_repeat = 3, .n_batch = so.n_batch};
    if (!common_init(&o.common))
        return EXIT_USAGE;
    cli_option common_table[COMMON_OPTIONS];
    const cli_option table[] = {
        {'p', "prompt", CLI_U32, &o.n_prompt, "N", "tokens of prefill; 0: none", NULL},
        {'n', "n-tokens", CLI_U32, &o.n_gen, "N", "tokens of decode; 0: none", NULL},
        {'r', "repeat", CLI_U32, &o.n_repeat, "N", "repetitions", NULL},
        {'d', "depth", CLI_U32, &o.depth, "N", "tokens that are in the context before", NULL},
        {0, "batch", CLI_U32, &o.n_batch, "N", "prompt tokens computed at once", NULL},
        {0, "cache", CLI_CHOICE, &o.cache, "TYPE", "type of the key/value cache", cache_names},
        {0, "json", CLI_FLAG, &o.json, NULL, "print one JSON object", NULL},
        {0},
    };
    const cli_option *tables[] = {table, common_options(&o.common, common_table), NULL};
    const char *path[1];
    int status;
    if (!cli_parse(&verb_bench, tables, argc, argv, path, &status))
        return status;
    if (!o.n_repeat || !(o.n_prompt || o.n_gen)) {
        cli_fail("bench: expected -r of 1 or more, and -p or -n of 1 or more");
        return EXIT_USAGE;
    }
    double start = system_seconds();
    moe_model *model;
    status = common_open(&model, path[0], &o.common);
    if (status)
        return status;
    status = bench_run(model, path[0], &o, start);
    moe_model_close(model);
    return status;
}

const cli_verb verb_bench = {
    "bench", "MODEL", "measures the speed of prefill and decode",
    "Prints the median, the slowest and the fastest of -r repetitions after a warm-up, the bytes\n"
    "of weights that one token reads and the memory bandwidth that this makes in decode.",
    "  moe bench model.gguf\n"
    "  moe bench model.gguf -p 2048 -n 0 -t 1\n"
    "  moe bench model.gguf -p 0 -n 128 -d 4096 --json\n",
    1, bench_main};
