/* cli/bench.c - `moe bench`: the speed of prefill and decode, and how near it is to the machine's.
 *
 * The context is filled with `depth` tokens once. A repetition goes back to them, computes
 * `n_prompt` tokens in one call (prefill; timed), goes back again, then computes `n_gen` tokens one
 * by one (decode; timed). Before the first there is a warm-up that is not counted: one token, which
 * reads the weights into memory and tells the time to the first token, and one batch of the prompt.
 * The tokens are pseudo-random: with a mixture of experts, text from one subject would use fewer of
 * them. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

typedef struct bench_options {
    cli_common common;
    uint32_t n_prompt, n_gen, n_repeat, depth, n_batch;
    float read_limit, op_limit; /* of the machine: GB/s, Gop/s; 0: unknown */
    int cache, latent;
    bool json;
} bench_options;

typedef struct bench_state {
    moe_session *session;
    moe_token *tokens;             /* [depth + max(n_prompt, n_gen)] */
    float *logits;                 /* [n_vocab] */
    double *prefill_s, *decode_s;  /* [n_repeat], seconds */
    double start;                  /* when the program began to open the model */
    double load_s, first_token_s;  /* since then */
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

/* Brings the session to `depth` tokens. Going back may leave something to be computed anew (sliding
 * windows): the last token is computed again, so that this is over before a clock starts. */
static moe_status bench_to_depth(bench_state *b, const bench_options *o)
{
    const uint32_t depth = o->depth, length = moe_session_length(b->session);
    if (length < depth)
        return moe_session_eval(b->session, b->tokens + length, depth - length, 0, NULL);
    if (length == depth || !depth)
        return moe_session_rewind(b->session, depth);
    moe_status status = moe_session_rewind(b->session, depth - 1);
    return status ? status : moe_session_eval(b->session, b->tokens + depth - 1, 1, 0, NULL);
}

static moe_status bench_prefill(bench_state *b, const bench_options *o, uint32_t n_prompt,
                                double *seconds)
{
    moe_status status = bench_to_depth(b, o);
    const double start = system_seconds();
    if (!status && n_prompt)
        status = moe_session_eval(b->session, b->tokens + o->depth, n_prompt, 1, b->logits);
    *seconds = system_seconds() - start;
    return status;
}

static moe_status bench_decode(bench_state *b, const bench_options *o, double *seconds)
{
    moe_status status = bench_to_depth(b, o);
    const double start = system_seconds();
    for (uint32_t i = 0; !status && i < o->n_gen; i++)
        status = moe_session_eval(b->session, b->tokens + o->depth + i, 1, 1, b->logits);
    *seconds = system_seconds() - start;
    return status;
}

static moe_status bench_warm_up(bench_state *b, const bench_options *o)
{
    moe_status status = moe_session_eval(b->session, b->tokens, 1, 1, b->logits);
    b->first_token_s = system_seconds() - b->start;
    double unused;
    const uint32_t n_prompt = o->n_prompt < o->n_batch ? o->n_prompt : o->n_batch;
    return status ? status : bench_prefill(b, o, n_prompt, &unused);
}

static int bench_measure(bench_state *b, const bench_options *o)
{
    progress_show("bench", 0, (uint64_t)o->n_repeat + 1);
    moe_status status = bench_warm_up(b, o);
    for (uint32_t i = 0; !status && i < o->n_repeat; i++) {
        progress_show("bench", (uint64_t)i + 1, (uint64_t)o->n_repeat + 1);
        status = bench_prefill(b, o, o->n_prompt, &b->prefill_s[i]);
        if (!status)
            status = bench_decode(b, o, &b->decode_s[i]);
    }
    progress_clear();
    return status ? cli_fail_status(status, moe_session_error(b->session), NULL) : EXIT_OK;
}

/* Operations per token of a prompt: two for each weight that takes part. The matrix of the logits
 * does so for the last token only, and so does the last layer, taken to be like the others, but for
 * keys and values, which are not counted. */
static double bench_ops_per_token(moe_model *model, const moe_model_info *info)
{
    uint64_t output = 0; /* elements; the token embedding where the two are tied */
    for (size_t i = 0; i < moe_model_tensor_count(model); i++) {
        moe_tensor_info t = {.size = sizeof t};
        if (moe_model_tensor(model, i, &t))
            continue;
        const bool own = !strcmp(t.name, "output.weight");
        if (own || (!output && !strcmp(t.name, "token_embd.weight")))
            output = t.dims[0] * t.dims[1];
        if (own)
            break;
    }
    const uint64_t n = info->n_param_active - (output < info->n_param_active ? output : 0);
    return 2.0 * (double)n * (info->n_layer > 1 ? 1 - 1.0 / info->n_layer : 1);
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

/* What the session and its model are and did, for both forms of the report. */
typedef struct bench_report {
    const char *path;
    moe_model_info info;
    bench_rate prefill, decode;
    double prefill_gop_s, decode_gb_s;
    uint64_t session_bytes, peak_bytes;
} bench_report;

static void report_json(const bench_report *r, const bench_state *b, const bench_options *o)
{
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_string(&json, "model", r->path);
    json_string(&json, "architecture", r->info.architecture);
    json_string(&json, "quantization", r->info.quantization);
    json_string(&json, "device", r->info.device);
    json_uint(&json, "threads", moe_session_threads(b->session));
    json_uint(&json, "batch", o->n_batch);
    json_string(&json, "cache", cache_names[o->cache]);
    json_string(&json, "latent", latent_names[o->latent]);
    json_uint(&json, "depth", o->depth);
    json_uint(&json, "repetitions", o->n_repeat);
    if (o->n_prompt) {
        json_rate(&json, "prefill_tokens_per_s", o->n_prompt, r->prefill);
        json_number(&json, "prefill_ops_per_s", r->prefill_gop_s * 1e9, 6);
        if (o->op_limit > 0)
            json_number(&json, "prefill_of_limit", r->prefill_gop_s / (double)o->op_limit, 4);
    }
    if (o->n_gen) {
        json_rate(&json, "decode_tokens_per_s", o->n_gen, r->decode);
        json_number(&json, "decode_bytes_per_s", r->decode_gb_s * 1e9, 6);
        if (o->read_limit > 0)
            json_number(&json, "decode_of_limit", r->decode_gb_s / (double)o->read_limit, 4);
    }
    json_uint(&json, "n_embd", r->info.n_embd);
    json_uint(&json, "weight_bytes", r->info.weight_bytes);
    json_uint(&json, "weight_bytes_per_token", r->info.weight_bytes_active);
    json_number(&json, "load_s", b->load_s, 6);
    json_number(&json, "first_token_s", b->first_token_s, 6);
    json_uint(&json, "session_bytes", r->session_bytes);
    json_uint(&json, "peak_rss_bytes", r->peak_bytes);
    json_close(&json, '}');
    json_end(&json);
}

static void print_rate(const char *what, uint32_t n_tok, bench_rate r)
{
    printf("%-8s %5u tokens  %10.2f tokens/s   (min %.2f, max %.2f)\n", what, n_tok, r.median,
           r.min, r.max);
}

static void print_limit(double value, float limit)
{
    if (limit > 0)
        printf(", %.0f %% of %g", 100 * value / (double)limit, (double)limit);
    putchar('\n');
}

static void report_text(const bench_report *r, const bench_state *b, const bench_options *o)
{
    cli_size size, session;
    printf("%s: %s, %s, %s; ", r->path, r->info.architecture, r->info.quantization, r->info.device);
    const uint32_t n_threads = moe_session_threads(b->session);
    printf("%u thread%s; cache %s, depth %u, median of %u\n", n_threads, n_threads == 1 ? "" : "s",
           cache_names[o->cache], o->depth, o->n_repeat);
    if (o->n_prompt) {
        print_rate("prefill", o->n_prompt, r->prefill);
        printf("         %.1f Gop/s", r->prefill_gop_s);
        print_limit(r->prefill_gop_s, o->op_limit);
    }
    if (o->n_gen) {
        print_rate("decode", o->n_gen, r->decode);
        printf("         %s of weights per token: %.2f GB/s",
               cli_size_text(&size, r->info.weight_bytes_active), r->decode_gb_s);
        print_limit(r->decode_gb_s, o->read_limit);
    }
    printf("load     %.3f s, first token after %.3f s\n", b->load_s, b->first_token_s);
    printf("memory   %s at the peak, file pages included; the session's own: %s\n",
           cli_size_text(&size, r->peak_bytes), cli_size_text(&session, r->session_bytes));
}

static void bench_report_all(moe_model *model, const char *path, const moe_session_options *so,
                             bench_state *b, const bench_options *o)
{
    bench_report r = {.path = path, .info = {.size = sizeof r.info}};
    moe_model_get_info(model, &r.info);
    if (o->n_prompt)
        r.prefill = bench_rates(b->prefill_s, o->n_repeat, o->n_prompt);
    if (o->n_gen)
        r.decode = bench_rates(b->decode_s, o->n_repeat, o->n_gen);
    r.prefill_gop_s = r.prefill.median * bench_ops_per_token(model, &r.info) * 1e-9;
    r.decode_gb_s = r.decode.median * (double)r.info.weight_bytes_active * 1e-9;
    moe_memory_estimate estimate = {.size = sizeof estimate};
    if (!moe_session_estimate(model, so, &estimate, NULL))
        r.session_bytes = estimate.total_bytes;
    r.peak_bytes = system_peak_rss_bytes();
    (o->json ? report_json : report_text)(&r, b, o);
}

/* ----------------------------------------------------------------------------------- entry -- */

static int bench_run(moe_model *model, const char *path, const bench_options *o, double start)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    const uint64_t n = (uint64_t)o->depth + (o->n_prompt > o->n_gen ? o->n_prompt : o->n_gen);
    if (n > UINT32_MAX)
        return cli_fail("bench: -d with -p or -n is more than a context can hold");
    moe_session_options so;
    common_session_options(&so, &o->common, o->cache);
    so.n_ctx = (uint32_t)n;
    so.n_batch = o->n_batch;
    so.latent = (moe_latent)o->latent;
    bench_state b = {.session = NULL, .start = start};
    int result = common_session(&b.session, model, &so);
    if (result)
        return result;
    b.load_s = system_seconds() - start;
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
        bench_report_all(model, path, &so, &b, o);
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
    bench_options o = {.n_prompt = 512, .n_gen = 64, .n_repeat = 3, .n_batch = so.n_batch,
                       .latent = MOE_LATENT_EXPANDED};
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
        {0, "latent", CLI_CHOICE, &o.latent, "FORM", LATENT_HELP, latent_names},
        {0, "read-limit", CLI_FLOAT, &o.read_limit, "GB/S",
         "what the machine reads at most: shown beside decode", NULL},
        {0, "op-limit", CLI_FLOAT, &o.op_limit, "GOP/S",
         "what it computes at most: shown beside prefill", NULL},
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
    "Prints the median, the slowest and the fastest of -r repetitions after a warm-up. Prefill\n"
    "and decode both start from a context of -d tokens. Prefill is also shown as operations (two\n"
    "for each weight that a token uses), decode as bytes of weights read. `build/bench/roofline`\n"
    "says what the machine can do of both.",
    "  moe bench model.gguf\n"
    "  moe bench model.gguf -p 2048 -n 0 -t 1\n"
    "  moe bench model.gguf -p 0 -n 128 -d 4096 --json\n",
    1, bench_main};
