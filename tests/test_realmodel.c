/* tests/test_realmodel.c - real models against transformers' figures for the same files
 * (tests/data/real_models.txt, made by tests/make_real_figures.py; docs/correctness.md explains the
 * protocol and the bounds).
 *
 * Environment: MOE_TEST_MODELS, a folder with smollm2.gguf and gemma3.gguf; without it, or without
 * one of the files, the tests are skipped.
 *
 * The figures were computed with float activations. This library rounds activations to 8 bits in
 * front of integer weights, so it cannot agree exactly; how far off that puts a correct program was
 * measured by making transformers round likewise. The bounds are what it came to, and half as much
 * again. */
#include "test.h"

#ifdef MOE_TEST_BACKEND_FENCED
#include "fenced_backend.h"
#define TEST_BACKEND fenced_backend()
#else
#define TEST_BACKEND NULL
#endif

enum { LOGIT_ROWS = 16 };

static const double ALLOWANCE = 1.5;
/* The mean over 1000 positions hides most of the rounding: some 0.2 to 1 % of the perplexity are
 * left, of either sign. */
static const double PERPLEXITY_LIMIT = 0.015;

static const char *figures_at; // what has not been read of real_models.txt
static char *figures;
static moe_model *real_model;
static char model_name[64];

/* -- reading the figures: words -- */

static bool next_word(char *word, size_t size)
{
    figures_at += strspn(figures_at, " \n");
    size_t n = strcspn(figures_at, " \n");
    snprintf(word, size, "%.*s", (int)n, figures_at);
    figures_at += n;
    return n > 0;
}

static double next_number(void)
{
    char word[64];
    return next_word(word, sizeof word) ? strtod(word, NULL) : NAN;
}

/* "NAME N x1 ... xN": the numbers, from malloc; *n = 0 and NULL if something else comes. */
static double *next_list(const char *name, size_t *n)
{
    char word[64];
    *n = 0;
    if (!next_word(word, sizeof word) || strcmp(word, name))
        return NULL;
    *n = (size_t)next_number();
    double *list = malloc(*n * sizeof *list);
    for (size_t i = 0; i < *n; i++)
        list[i] = next_number();
    return list;
}

static moe_token *next_tokens(const char *name, size_t *n)
{
    double *list = next_list(name, n);
    moe_token *tokens = list ? malloc(*n * sizeof *tokens) : NULL;
    for (size_t i = 0; tokens && i < *n; i++)
        tokens[i] = (moe_token)list[i];
    free(list);
    return tokens;
}

/* Opens the model and goes to its figures. */
static bool find_model(const char *name)
{
    char path[512], word[128];
    const char *folder = getenv("MOE_TEST_MODELS");
    if (!folder)
        return false;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    if (!f)
        return false;
    fclose(f);
    snprintf(path, sizeof path, "model %s ", name);
    figures_at = strstr(figures, path);
    CHECK(figures_at, "no figures of %s", name);
    if (!figures_at)
        return false;
    figures_at += strlen(path);
    next_word(word, sizeof word); // the hash, which whoever fetched the file has checked

    moe_error error = {0};
    moe_model_options options;
    moe_model_options_init(&options);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    options.path = path;
    options.backend = TEST_BACKEND;
    moe_status status = moe_model_open(&real_model, &options, &error);
    CHECK(status == MOE_OK, "%s: %s", name, error.message);
    snprintf(model_name, sizeof model_name, "%s", name);
    return status == MOE_OK;
}

static moe_session *open_real_session(uint32_t n_ctx)
{
    moe_session *session = NULL;
    moe_error error = {0};
    moe_session_options options;
    moe_session_options_init(&options);
    options.n_ctx = n_ctx;
    options.n_logits = LOGIT_ROWS;
    moe_status status = moe_session_open(&session, real_model, &options, &error);
    CHECK(status == MOE_OK, "%s", error.message);
    return session;
}

static double nll_of(const float *logits, size_t n_vocab, moe_token target)
{
    double max = logits[0], sum = 0;
    for (size_t i = 1; i < n_vocab; i++)
        max = MOE_MAX(max, (double)logits[i]);
    for (size_t i = 0; i < n_vocab; i++)
        sum += exp((double)logits[i] - max);
    return log(sum) + max - (double)logits[target];
}

/* Negative log likelihoods of the second half of one window; false if a call failed. */
static bool window_nll(moe_session *session, const moe_token *tok, size_t window, size_t n_vocab,
                       float *logits, double *nll)
{
    size_t first = window / 2;
    if (moe_session_rewind(session, 0) || moe_session_eval(session, tok, first, 0, NULL))
        return false;
    for (size_t at = first; at < window - 1; at += LOGIT_ROWS) {
        size_t n = MOE_MIN((size_t)LOGIT_ROWS, window - 1 - at);
        if (moe_session_eval(session, tok + at, n, n, logits))
            return false;
        for (size_t i = 0; i < n; i++)
            *nll++ = nll_of(logits + i * n_vocab, n_vocab, tok[at + i + 1]);
    }
    return true;
}

static void check_perplexity(const moe_token *text, size_t n_text, size_t n_vocab, moe_token bos)
{
    char word[64];
    next_word(word, sizeof word);
    REQUIRE(!strcmp(word, "perplexity"), "found %s", word);
    size_t window = (size_t)next_number(), n_scored = (size_t)next_number(), n, k = 0;
    double want_ppl = next_number();
    next_number(); // the standard error
    double rounded_ppl = next_number(), rounded_distance = next_number();
    double *want = next_list("nll", &n);
    REQUIRE(want && n == n_scored && n == n_text / window * (window - 1 - window / 2), "%zu", n);

    double *got = malloc(n * sizeof *got), mean = 0, distance = 0;
    moe_token *tok = malloc(window * sizeof *tok);
    float *logits = malloc(LOGIT_ROWS * n_vocab * sizeof *logits);
    moe_session *session = open_real_session((uint32_t)window);
    bool ok = session != NULL;
    for (size_t w = 0; ok && w < n_text / window; w++, k += window - 1 - window / 2) {
        memcpy(tok, text + w * window, window * sizeof *tok);
        if (bos >= 0)
            tok[0] = bos;
        ok = window_nll(session, tok, window, n_vocab, logits, got + k);
        CHECK(ok, "%s", moe_session_error(session)->message);
    }
    for (size_t i = 0; ok && i < n; i++) {
        mean += got[i] / (double)n;
        distance += fabs(got[i] - want[i]) / (double)n;
    }
    if (ok) {
        printf("  %s, window %zu: perplexity %.4f; transformers %.4f, rounding %.4f\n"
               "    mean distance of a position from transformers %.4f, of rounding %.4f\n",
               model_name, window, exp(mean), want_ppl, rounded_ppl, distance, rounded_distance);
        CHECK(fabs(mean - log(want_ppl)) < PERPLEXITY_LIMIT, "perplexity %f", exp(mean));
        CHECK(distance < ALLOWANCE * rounded_distance, "mean distance of a position %f", distance);
    }
    moe_session_close(session);
    free(logits);
    free(tok);
    free(got);
    free(want);
}

typedef struct greedy_count {
    size_t steps, other, rounded_other; // all; with another token than recorded, here and rounding
} greedy_count;

/* Follows the recorded continuation and looks at what this library would have said at each step. It
 * may say something else where the recorded token was ahead by less than rounding moves the logits
 * somewhere in this continuation. */
static void check_greedy(size_t n_vocab, greedy_count *count)
{
    size_t n_prompt, n, n_margin, n_shift;
    char word[64];
    moe_token *prompt = next_tokens("prompt", &n_prompt), *want = next_tokens("greedy", &n);
    double *margin = next_list("margin", &n_margin), *shift = next_list("shift", &n_shift);
    REQUIRE(prompt && want && margin && shift && n_margin == n && n_shift == n, "%zu", n);
    next_word(word, sizeof word);
    count->rounded_other += (size_t)next_number();
    double largest = 0;
    for (size_t i = 0; i < n; i++)
        largest = MOE_MAX(largest, shift[i]);
    float *logits = malloc(n_vocab * sizeof *logits);
    moe_session *session = open_real_session((uint32_t)(n_prompt + n));
    const moe_token *step = prompt;
    for (size_t i = 0, n_step = n_prompt; session && i < n; step = want + i++, n_step = 1) {
        moe_status status = moe_session_eval(session, step, n_step, 1, logits);
        CHECK(status == MOE_OK, "%s", moe_session_error(session)->message);
        moe_token best = 0;
        for (size_t v = 1; v < n_vocab; v++)
            if (logits[v] > logits[best])
                best = (moe_token)v;
        count->steps++;
        count->other += best != want[i];
        CHECK(best == want[i] || margin[i] < ALLOWANCE * largest,
              "%s: step %zu after %zu tokens: %d instead of %d, which was ahead by %.3f",
              model_name, i, n_prompt, best, want[i], margin[i]);
    }
    moe_session_close(session);
    free(logits);
    free(margin);
    free(shift);
    free(prompt);
    free(want);
}

static void check_model(const char *name, moe_token bos)
{
    if (!find_model(name))
        SKIP("MOE_TEST_MODELS names no folder with this file");
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(real_model, &info);
    size_t n_text;
    moe_token *text = next_tokens("text", &n_text);
    REQUIRE(text, "no text");
    check_perplexity(text, n_text, info.n_vocab, bos);
    check_perplexity(text, n_text, info.n_vocab, bos);
    size_t n_prompts = 0;
    greedy_count count = {0, 0, 0};
    for (; !strncmp(figures_at + strspn(figures_at, "\n"), "prompt", 6); n_prompts++)
        check_greedy(info.n_vocab, &count);
    CHECK(n_prompts >= 5, "only %zu prompts", n_prompts);
    printf("  %s: %zu of %zu greedy steps as in transformers, rounding %zu\n", name,
           count.steps - count.other, count.steps, count.steps - count.rounded_other);
    CHECK(count.other <= count.steps / 20 + 2 * count.rounded_other, "%zu other tokens",
          count.other);
    free(text);
    moe_model_close(real_model);
    real_model = NULL;
}

static void smollm2_agrees_with_transformers(void)
{
    check_model("smollm2.gguf", -1);
}

static void gemma3_agrees_with_transformers(void)
{
    check_model("gemma3.gguf", 2);
}

TEST_PROGRAM(realmodel)
{
    char path[512];
    size_t bytes;
    snprintf(path, sizeof path, "%s/data/real_models.txt", test_root());
    figures = test_read_file(path, &bytes);
    if (!figures)
        CANNOT_RUN("cannot read %s", path);
    RUN(smollm2_agrees_with_transformers);
    RUN(gemma3_agrees_with_transformers);
    free(figures);
}
