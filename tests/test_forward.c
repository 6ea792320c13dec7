/* tests/test_forward.c - the forward pass of every family against the logits that Hugging Face
 * transformers computes (tests/make_fixtures.py), and the promise that those logits are the same
 * bits however they are asked for.
 *
 * Environment: MOE_TEST_FIXTURES, another folder of fixtures; MOE_TEST_WRITE_BITS, a file to write
 * the hashes to that bits_are_those_recorded compares.
 * With -DMOE_TEST_BACKEND_FENCED everything runs on the backend of tests/fenced_backend.h. */
#include "test.h"

#include "gguf_edit.h"

#include <dirent.h>
#include <pthread.h>

#ifdef MOE_TEST_BACKEND_FENCED
#include "fenced_backend.h"
#define TEST_BACKEND fenced_backend()
#else
#define TEST_BACKEND NULL
#endif

enum { MAX_FIXTURES = 64, LONG_TOK = 560 };

typedef struct fixture {
    char name[64];
    char *gguf;           // the file's content
    size_t gguf_bytes;
    char path[512];
    uint32_t n_tok, n_vocab;
    float rounding[3];    // relative error of an F16, Q8_0, F32 cache in transformers
    const int32_t *tok;   // [n_tok]
    const float *logits;  // [n_tok][n_vocab]
} fixture;

static fixture fixtures[MAX_FIXTURES];
static size_t n_fixtures;

/* ------------------------------------------------------------------------------- fixtures -- */

static const char *fixture_folder(void)
{
    static char folder[400];
    const char *other = getenv("MOE_TEST_FIXTURES");
    if (other)
        return other;
    snprintf(folder, sizeof folder, "%s/fixtures", test_root());
    return folder;
}

static bool fixture_load(fixture *f, const char *name)
{
    char path[512];
    snprintf(f->name, sizeof f->name, "%s", name);
    snprintf(f->path, sizeof f->path, "%s/%s.gguf", fixture_folder(), name);
    snprintf(path, sizeof path, "%s/%s.expected", fixture_folder(), name);
    f->gguf = test_read_file(f->path, &f->gguf_bytes);
    size_t bytes = 0;
    char *expected = test_read_file(path, &bytes);
    if (!f->gguf || !expected || bytes < 24 || memcmp(expected, "MOEX", 4))
        return false;
    memcpy(&f->n_tok, expected + 4, 4);
    memcpy(&f->n_vocab, expected + 8, 4);
    memcpy(f->rounding, expected + 12, 12);
    f->tok = (const int32_t *)(expected + 24);
    f->logits = (const float *)(expected + 24 + 4 * (size_t)f->n_tok);
    return bytes == 24 + 4 * (size_t)f->n_tok * (1 + (size_t)f->n_vocab);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const fixture *)a)->name, ((const fixture *)b)->name);
}

static bool fixtures_load(void)
{
    DIR *dir = opendir(fixture_folder());
    if (!dir)
        return false;
    bool ok = true;
    for (struct dirent *entry; (entry = readdir(dir));) {
        char name[64];
        char *dot = strrchr(entry->d_name, '.');
        if (!dot || strcmp(dot, ".gguf") || (size_t)(dot - entry->d_name) >= sizeof name)
            continue;
        snprintf(name, sizeof name, "%.*s", (int)(dot - entry->d_name), entry->d_name);
        if (n_fixtures == MAX_FIXTURES || !fixture_load(&fixtures[n_fixtures], name)) {
            printf("  cannot read fixture %s\n", name);
            ok = false;
            continue;
        }
        n_fixtures++;
    }
    closedir(dir);
    qsort(fixtures, n_fixtures, sizeof fixtures[0], by_name);
    return ok && n_fixtures > 0;
}

/* -------------------------------------------------------------------------------- running -- */

/* How a sequence is computed. 0 or NULL: the default. */
typedef struct run_options {
    moe_cache_type cache;
    uint32_t n_threads, n_batch, n_logits;
    size_t chunk; // tokens per call; 0: all in one
    moe_latent latent;
} run_options;

static moe_model *model_open_with(const fixture *f, moe_model_options *options)
{
    moe_model *model = NULL;
    moe_error error = {0};
    options->backend = TEST_BACKEND;
    moe_status status = moe_model_open(&model, options, &error);
    CHECK(status == MOE_OK && model, "%s: %s: %s", f->name, moe_status_name(status), error.message);
    return model;
}

static moe_model *model_open_isa(const fixture *f, moe_isa isa)
{
    moe_model_options options;
    moe_model_options_init(&options);
    options.path = f->path;
    options.isa = isa;
    return model_open_with(f, &options);
}

static bool has_latent(const moe_model *model)
{
    moe_model_info info = {.size = sizeof info};
    if (model)
        moe_model_get_info(model, &info);
    return model && strstr(info.attention, "latent");
}

static moe_session *session_open_how(moe_model *model, const run_options *h, uint32_t n_ctx)
{
    moe_session_options options;
    moe_session_options_init(&options);
    options.n_ctx = n_ctx;
    options.cache_type = h->cache;
    options.latent = h->latent;
    options.n_threads = h->n_threads ? h->n_threads : 1;
    if (h->n_batch)
        options.n_batch = h->n_batch;
    if (h->n_logits)
        options.n_logits = h->n_logits;
    moe_session *session = NULL;
    moe_error error = {0};
    moe_status status = moe_session_open(&session, model, &options, &error);
    CHECK(status == MOE_OK && session, "%s: %s", moe_status_name(status), error.message);
    return session;
}

/* Appends tokens in calls of `chunk` tokens; all logits. */
static bool eval_chunks(moe_session *session, const moe_token *tok, size_t n_tok, size_t chunk,
                        size_t n_vocab, float *logits)
{
    for (size_t i = 0; i < n_tok;) {
        size_t n = MOE_MIN(chunk ? chunk : n_tok, n_tok - i);
        moe_status status = moe_session_eval(session, tok + i, n, n, logits + i * n_vocab);
        CHECK(status == MOE_OK, "eval of %zu tokens at %zu: %s: %s", n, i, moe_status_name(status),
              moe_session_error(session)->message);
        if (status)
            return false;
        i += n;
    }
    return true;
}

/* All logits of a sequence, from malloc and NaN where nothing was written; NULL if it failed. */
static float *run(moe_model *model, const run_options *h, const moe_token *tok, size_t n_tok,
                  size_t n_vocab)
{
    float *logits = malloc(n_tok * n_vocab * sizeof(float));
    memset(logits, 0xff, n_tok * n_vocab * sizeof(float));
    moe_session *session = model ? session_open_how(model, h, (uint32_t)n_tok) : NULL;
    bool ok = session && eval_chunks(session, tok, n_tok, h->chunk, n_vocab, logits);
    moe_session_close(session);
    if (ok)
        return logits;
    free(logits);
    return NULL;
}

/* The largest difference, in units of the largest expected logit of the position. */
static double relative_error(const float *got, const float *want, size_t n)
{
    double diff = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= diff)) /* NaN included */
            diff = d;
        scale = MOE_MAX(scale, fabs((double)want[i]));
    }
    return diff / scale;
}

static uint64_t hash_of(const void *data, size_t bytes)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return h;
}

/* Both blocks of logits are the same bits; says where they differ. Frees `got`. */
static void check_same_logits(const fixture *f, const char *what, float *got, const float *want,
                       size_t n_tok)
{
    if (!got)
        return; /* the failure was reported */
    size_t bytes = n_tok * f->n_vocab * sizeof(float), first = 0;
    if (hash_of(got, bytes) != hash_of(want, bytes)) {
        while (!memcmp(got + first * f->n_vocab, want + first * f->n_vocab,
                       f->n_vocab * sizeof(float)))
            first++;
        CHECK(false, "%s: %s: other bits from position %zu on, relative error %.1e", f->name, what,
              first, relative_error(got + first * f->n_vocab, want + first * f->n_vocab,
                                    f->n_vocab));
    }
    free(got);
}

/* -------------------------------------------------------------------------- transformers -- */

/* F32 and F16 weights, an F32 cache: single precision alone puts transformers 1e-6 to 7e-6 away
 * from itself in double precision (make_fixtures.py prints it); 1e-4 is the promise.
 *
 * A rounded cache, and activations rounded to 8 bits in front of integer weights and to BF16 in
 * front of such weights, cost what they cost transformers when it rounds likewise in double
 * precision: the fixture says how much. This library rounds the same numbers, but single precision
 * turns a few of them the other way, and each such turn is an error of the same kind: half as much
 * again. */
static double tolerance(const fixture *f, moe_cache_type cache)
{
    return 1e-4 + 1.5 * (double)f->rounding[cache];
}

static void check_against_transformers(const run_options *h, const char *what)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        const bool wanted = h->latent == MOE_LATENT_ABSORBED || has_latent(model);
        float *got = wanted ? run(model, h, f->tok, f->n_tok, f->n_vocab) : NULL;
        double worst = 0, limit = tolerance(f, h->cache);
        for (size_t t = 0; got && t < f->n_tok; t++) {
            double e = relative_error(got + t * f->n_vocab, f->logits + t * f->n_vocab, f->n_vocab);
            CHECK(e <= limit, "%s, %s, position %zu: relative error %.2e, allowed %.0e", f->name,
                  what, t, e, limit);
            worst = e <= worst ? worst : e;
        }
        if (test_only && got)
            printf("  %-14s %-10s largest relative error %.1e, allowed %.1e\n", f->name, what,
                   worst, limit);
        free(got);
        moe_model_close(model);
    }
}

static void prefill_is_right(void)
{
    check_against_transformers(&(run_options){.cache = MOE_CACHE_F32}, "prefill");
}

static void step_by_step_is_right(void)
{
    check_against_transformers(&(run_options){.cache = MOE_CACHE_F32, .chunk = 1}, "steps");
}

static void chunks_are_right(void)
{
    check_against_transformers(&(run_options){.cache = MOE_CACHE_F32, .chunk = 7}, "chunks");
}

static void small_batches_are_right(void)
{
    check_against_transformers(&(run_options){.cache = MOE_CACHE_F32, .n_batch = 5}, "batches");
}

/* 22 tokens are enough for some of the models with latent attention and floats. */
static void expanded_latents_are_right(void)
{
    check_against_transformers(
        &(run_options){.cache = MOE_CACHE_F32, .latent = MOE_LATENT_EXPANDED}, "expanded");
    check_against_transformers(
        &(run_options){.cache = MOE_CACHE_F32, .latent = MOE_LATENT_EXPANDED, .chunk = 22},
        "expanded, chunks");
}

static void f16_cache_is_right(void)
{
    check_against_transformers(&(run_options){.cache = MOE_CACHE_F16}, "F16 cache");
}

static void q8_0_cache_is_right(void)
{
    check_against_transformers(&(run_options){.cache = MOE_CACHE_Q8_0}, "Q8_0 cache");
}

/* A test of the tests: one other token at the start must be outside the tolerances at some
 * position, with whichever cache. */
static void tolerances_can_fail(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        moe_token *tok = malloc(f->n_tok * sizeof *tok);
        memcpy(tok, f->tok, f->n_tok * sizeof *tok);
        tok[0] = (tok[0] + 1) % (int32_t)f->n_vocab;
        float *got = run(model, &(run_options){.cache = MOE_CACHE_F32}, tok, f->n_tok, f->n_vocab);
        double worst = 0;
        for (size_t t = 1; got && t < f->n_tok; t++)
            worst = MOE_MAX(worst, relative_error(got + t * f->n_vocab, f->logits + t * f->n_vocab,
                                                  f->n_vocab));
        for (int c = 0; got && c < 3; c++)
            CHECK(worst > 1.2 * tolerance(f, (moe_cache_type)c),
                  "%s, cache %d: another first token changes later positions by only %.1e", f->name,
                  c, worst);
        free(got);
        free(tok);
        moe_model_close(model);
    }
}

/* ------------------------------------------------------------------------------ same bits -- */

/* A longer sequence than the fixture's, as far as the model goes, so that large chunks mean
 * something and sliding windows wrap around many times. */
static size_t long_tokens(const fixture *f, const moe_model *model, moe_token *tok)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    size_t n = MOE_MIN((size_t)LONG_TOK, info.n_ctx_train);
    test_random_state = 88172645463325252u;
    for (size_t i = 0; i < n; i++)
        tok[i] = (moe_token)(test_random() % f->n_vocab);
    return n;
}

/* For each fixture and cache type: the long sequence in one call on one thread, and what `compare`
 * has to say about it. */
static void for_each_reference(void (*compare)(const fixture *, moe_model *, moe_cache_type,
                                               const moe_token *, size_t, const float *))
{
    for (size_t i = 0; i < n_fixtures; i++) {
        moe_token tok[LONG_TOK];
        moe_model *model = model_open_isa(&fixtures[i], MOE_ISA_AUTO);
        if (!model)
            continue;
        size_t n = long_tokens(&fixtures[i], model, tok);
        for (int c = 0; c < 3; c++) {
            moe_cache_type cache = (moe_cache_type)c;
            float *want = run(model, &(run_options){.cache = cache}, tok, n, fixtures[i].n_vocab);
            if (want)
                compare(&fixtures[i], model, cache, tok, n, want);
            free(want);
        }
        moe_model_close(model);
    }
}

/* Whether the n-th way of doing the same is for this fixture and cache. Where tests are slow, as
 * under emulators and sanitizers, it is every fourth, and another one for the next: all ways and
 * all fixtures have their turn. */
static bool way_is_due(size_t way, const fixture *f, moe_cache_type cache)
{
    return test_slowness() == 1 || (way + (size_t)(f - fixtures) + (size_t)cache) % 4 == 0;
}

/* More threads than cores make each of the many tiny steps wait for the scheduler, so the long
 * sequence is for two threads only. */
static void compare_threads(const fixture *f, moe_model *model, moe_cache_type cache,
                            const moe_token *tok, size_t n, const float *want)
{
    static const struct {
        uint32_t n_threads;
        size_t chunk, n_tok;
    } ways[] = {{2, 0, LONG_TOK}, {3, 0, 40}, {8, 0, 40}, {3, 1, 4}};
    for (size_t i = 0; i < MOE_COUNT(ways); i++) {
        if (!way_is_due(i, f, cache))
            continue;
        char what[60];
        snprintf(what, sizeof what, "%u threads, calls of %zu, cache %d", ways[i].n_threads,
                 ways[i].chunk, (int)cache);
        run_options h = {.cache = cache, .n_threads = ways[i].n_threads, .chunk = ways[i].chunk,
                 .n_logits = 64};
        size_t n_tok = MOE_MIN(n, ways[i].n_tok);
        check_same_logits(f, what, run(model, &h, tok, n_tok, f->n_vocab), want, n_tok);
    }
}

static void same_bits_for_any_thread_count(void)
{
    for_each_reference(compare_threads);
}

static void compare_chunks(const fixture *f, moe_model *model, moe_cache_type cache,
                           const moe_token *tok, size_t n, const float *want)
{
    static const struct {
        uint32_t chunk, n_batch, n_logits;
    } ways[] = {{1, 0, 0}, {7, 0, 0},  {64, 0, 0}, {512, 0, 0}, {0, 1, 0},
                {0, 5, 3}, {0, 64, 0}, {0, 33, 7}, {13, 4, 64}, {0, 4096, 512}};
    for (size_t i = 0; i < MOE_COUNT(ways); i++) {
        if (!way_is_due(i, f, cache))
            continue;
        char what[80];
        snprintf(what, sizeof what, "calls of %u, n_batch %u, n_logits %u, cache %d", ways[i].chunk,
                 ways[i].n_batch, ways[i].n_logits, (int)cache);
        run_options h = {.cache = cache, .chunk = ways[i].chunk, .n_batch = ways[i].n_batch,
                 .n_logits = ways[i].n_logits};
        check_same_logits(f, what, run(model, &h, tok, n, f->n_vocab), want, n);
    }
}

static void same_bits_for_any_chunks(void)
{
    for_each_reference(compare_chunks);
}

static void same_bits_for_any_context_length(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, bytes = n * f->n_vocab * sizeof(float);
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        float *want = run(model, &(run_options){.chunk = 3}, f->tok, n, f->n_vocab);
        moe_session *session =
            model ? session_open_how(model, &(run_options){0}, (uint32_t)n + 37) : NULL;
        float *got = malloc(bytes);
        if (session && want && eval_chunks(session, f->tok, n, 11, f->n_vocab, got))
            check_same_logits(f, "a longer context", got, want, n);
        else
            free(got);
        moe_session_close(session);
        free(want);
        moe_model_close(model);
    }
}

static void same_bits_on_any_instruction_set(void)
{
    static const moe_isa isas[] = {MOE_ISA_C, MOE_ISA_AVX2, MOE_ISA_AVXVNNI, MOE_ISA_AVX512,
                                   MOE_ISA_NEON};
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        moe_model *best = model_open_isa(f, MOE_ISA_AUTO);
        for (int c = 0; c < 3; c++) {
            run_options h = {.cache = (moe_cache_type)c};
            float *want = run(best, &h, f->tok, f->n_tok, f->n_vocab);
            for (size_t k = 0; want && k < MOE_COUNT(isas); k++) {
                moe_model *model = model_open_isa(f, isas[k]);
                char what[40];
                snprintf(what, sizeof what, "isa %d, cache %d", (int)isas[k], c);
                h.chunk = 0;
                check_same_logits(f, what, run(model, &h, f->tok, f->n_tok, f->n_vocab), want,
                                  f->n_tok);
                h.chunk = 1;
                check_same_logits(f, what, run(model, &h, f->tok, f->n_tok, f->n_vocab), want,
                                  f->n_tok);
                moe_model_close(model);
            }
            free(want);
        }
        moe_model_close(best);
    }
}

/* --------------------------------------------------------------- latent attention, expanded -- */

/* From how many tokens in a call on keys and values are expanded: those that give other bits than
 * the absorbed form does; 0: never. */
static size_t expanded_from(const fixture *f, moe_model *model, moe_cache_type cache,
                            const moe_token *tok, size_t n)
{
    const run_options absorbed = {.cache = cache};
    const run_options expanded = {.cache = cache, .latent = MOE_LATENT_EXPANDED};
    size_t low = 0, high = n + 1; /* high tokens are enough, low are not */
    while (low + 1 < high) {
        const size_t middle = low + (high - low) / 2, bytes = middle * f->n_vocab * sizeof(float);
        float *one = run(model, &absorbed, tok, middle, f->n_vocab);
        float *other = run(model, &expanded, tok, middle, f->n_vocab);
        if (one && other && memcmp(one, other, bytes))
            high = middle;
        else
            low = middle;
        free(one);
        free(other);
    }
    return high > n ? 0 : high;
}

/* Goes back, and on in a call that is long enough, and in one that is not. */
static void compare_expanded_rewound(const fixture *f, moe_model *model, moe_cache_type cache,
                                     const moe_token *tok, size_t n, size_t from,
                                     const float *want)
{
    const size_t v = f->n_vocab, keep = n - from;
    const run_options expanded = {.cache = cache, .latent = MOE_LATENT_EXPANDED};
    moe_session *s = session_open_how(model, &expanded, (uint32_t)n);
    float *got = malloc(n * v * sizeof *got);
    bool ok = s && eval_chunks(s, tok, n, 0, v, got) && !moe_session_rewind(s, (uint32_t)keep) &&
              eval_chunks(s, tok + keep, n - keep, 0, v, got + keep * v);
    CHECK(ok && !memcmp(got, want, n * v * sizeof *got), "%s: other bits after a rewind", f->name);
    /* A few tokens are computed as each of them alone. */
    ok = ok && !moe_session_rewind(s, (uint32_t)n - 5) &&
         eval_chunks(s, tok + n - 5, 5, 0, v, got) && !moe_session_rewind(s, (uint32_t)n - 5) &&
         eval_chunks(s, tok + n - 5, 5, 1, v, got + 5 * v);
    CHECK(ok && !memcmp(got, got + 5 * v, 5 * v * sizeof *got), "%s: other bits in one call of 5",
          f->name);
    free(got);
    moe_session_close(s);
}

/* Calls of any length that is long enough, batches, threads and instruction sets. */
static void compare_expanded(const fixture *f, moe_model *model, moe_cache_type cache,
                             const moe_token *tok, size_t n, size_t from)
{
    size_t chunk = from; /* no shorter one is left over */
    while (n % chunk)
        chunk++;
    static const struct {
        moe_cache_type cache;
        moe_isa isa;
        uint32_t n_threads, n_batch;
        bool calls;
    } ways[] = {{MOE_CACHE_F16, MOE_ISA_AUTO, 1, 50, false},
                {MOE_CACHE_F16, MOE_ISA_AUTO, 3, 64, true},
                {MOE_CACHE_F16, MOE_ISA_C, 2, 512, false},
                {MOE_CACHE_F16, MOE_ISA_AVX2, 1, 512, true},
                {MOE_CACHE_F32, MOE_ISA_AUTO, 3, 64, true},
                {MOE_CACHE_F32, MOE_ISA_AVX2, 2, 100, false},
                {MOE_CACHE_F32, MOE_ISA_C, 2, 512, false},
                {MOE_CACHE_Q8_0, MOE_ISA_AVX2, 2, 512, false}};
    const run_options plain = {.cache = cache, .latent = MOE_LATENT_EXPANDED};
    float *want = run(model, &plain, tok, n, f->n_vocab);
    for (size_t i = 0; want && i < MOE_COUNT(ways); i++) {
        if (ways[i].cache != cache)
            continue;
        char what[80];
        moe_model *other = model_open_isa(f, ways[i].isa);
        const run_options h = {.cache = cache, .n_threads = ways[i].n_threads,
                               .n_batch = ways[i].n_batch, .chunk = ways[i].calls ? chunk : 0,
                               .latent = MOE_LATENT_EXPANDED};
        snprintf(what, sizeof what, "expanded, cache %d, isa %d, %u threads, batches of %u, "
                 "calls of %zu", (int)cache, (int)ways[i].isa, h.n_threads, h.n_batch, h.chunk);
        check_same_logits(f, what, run(other, &h, tok, n, f->n_vocab), want, n);
        moe_model_close(other);
    }
    if (want)
        compare_expanded_rewound(f, model, cache, tok, n, from, want);
    float *absorbed = run(model, &(run_options){.cache = cache}, tok, n, f->n_vocab);
    size_t n_far = 0; // where another expert is chosen, nearly as good
    for (size_t t = 0; want && absorbed && t < n; t++)
        n_far += !(relative_error(want + t * f->n_vocab, absorbed + t * f->n_vocab, f->n_vocab) <=
                   2 * tolerance(f, cache));
    CHECK(n_far <= n / 10, "%s, cache %d: %zu of %zu positions are far from the absorbed form",
          f->name, (int)cache, n_far, n);
    free(absorbed);
    free(want);
}

static void expanded_latents_depend_on_the_length_of_calls_alone(void)
{
    size_t n_expanded[3] = {0};
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        moe_token tok[LONG_TOK];
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        for (int c = 0; c < 3 && has_latent(model); c++) {
            const size_t most = n_expanded[c] < 2 ? 280 : 100; /* more than a segment, or quick */
            const size_t n = MOE_MIN(long_tokens(f, model, tok), most);
            /* Of the integers that stand for F16, longer calls are expanded. */
            const size_t within = MOE_MIN(n, c == MOE_CACHE_F16 ? 130 : 70);
            const size_t from = expanded_from(f, model, (moe_cache_type)c, tok, within);
            if (!from)
                continue;
            n_expanded[c]++;
            CHECK(from > 16, "%s: a token and its guesses, %zu, are expanded", f->name, from);
            compare_expanded(f, model, (moe_cache_type)c, tok, n, from);
        }
        moe_model_close(model);
    }
    CHECK(n_expanded[MOE_CACHE_F16] >= 1 && n_expanded[MOE_CACHE_F32] >= 5 &&
          n_expanded[MOE_CACHE_Q8_0] >= 5, "models that expand latents: %zu of F16, %zu, %zu",
          n_expanded[MOE_CACHE_F16], n_expanded[MOE_CACHE_F32], n_expanded[MOE_CACHE_Q8_0]);
}

/* ------------------------------------------------------------------------- ways of opening -- */

static int fixture_read(void *user, uint64_t offset, void *dst, size_t bytes)
{
    const fixture *f = user;
    if (offset > f->gguf_bytes || bytes > f->gguf_bytes - offset)
        return 1;
    memcpy(dst, f->gguf + offset, bytes);
    return 0;
}

static void same_bits_for_any_way_of_opening(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        fixture *f = &fixtures[i];
        moe_model *mapped = model_open_isa(f, MOE_ISA_AUTO);
        float *want = run(mapped, &(run_options){0}, f->tok, f->n_tok, f->n_vocab);
        char *moved = malloc(f->gguf_bytes + 64);
        for (int way = 0; want && way < 5; way++) {
            static const char *const names[] = {"copied", "read by a callback", "a buffer",
                                                "a buffer at +4", "a buffer at +1"};
            moe_model_options options;
            moe_model_options_init(&options);
            if (way == 0) {
                options.path = f->path;
                options.copy = true;
            } else if (way == 1) {
                options.read = fixture_read;
                options.read_user = f;
                options.read_bytes = f->gguf_bytes;
            } else {
                uintptr_t base = ((uintptr_t)moved + 31) & ~(uintptr_t)31;
                char *at = (char *)base + (way == 3 ? 4 : way == 4 ? 1 : 0);
                memcpy(at, f->gguf, f->gguf_bytes);
                options.data = at;
                options.data_bytes = f->gguf_bytes;
            }
            moe_model *model = model_open_with(f, &options);
            check_same_logits(f, names[way],
                              run(model, &(run_options){0}, f->tok, f->n_tok, f->n_vocab), want,
                              f->n_tok);
            moe_model_close(model);
        }
        free(moved);
        free(want);
        moe_model_close(mapped);
    }
}

/* ------------------------------------------------------------------------- rewind, sessions -- */

/* Goes forward with the fixture's tokens, back, forward with others, back, and forward again. */
static void rewound_session_equals_a_fresh_one(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, v = f->n_vocab;
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        moe_token *other = malloc(n * sizeof *other);
        for (size_t t = 0; t < n; t++)
            other[t] = (f->tok[t] + 5) % (moe_token)v;
        for (int c = 0; c < 3; c++) {
            /* Small batches: the caches of sliding windows hold less than the sequence. */
            run_options h = {.cache = (moe_cache_type)c, .n_batch = c == 1 ? 0 : 3};
            float *want = run(model, &(run_options){.cache = h.cache}, f->tok, n, v);
            float *got = malloc(n * v * sizeof(float));
            moe_session *session = want ? session_open_how(model, &h, (uint32_t)n) : NULL;
            const size_t backs[] = {n - 1, n - 3, n / 2, 9, 1, 0};
            for (size_t b = 0; session && b < MOE_COUNT(backs); b++) {
                size_t back = backs[b], now = moe_session_length(session);
                bool ok = eval_chunks(session, f->tok + now, n - now, 0, v, got + now * v);
                ok = ok && moe_session_rewind(session, (uint32_t)back) == MOE_OK;
                ok = ok && eval_chunks(session, other, n - back, 5, v, got + back * v);
                ok = ok && moe_session_rewind(session, (uint32_t)back) == MOE_OK;
                CHECK(ok && moe_session_length(session) == back, "%s: rewind to %zu: %s", f->name,
                      back, moe_session_error(session)->message);
                memset(got + back * v, 0xff, (n - back) * v * sizeof(float));
                if (!ok || !eval_chunks(session, f->tok + back, n - back, b % 2, v, got + back * v))
                    break;
                size_t at = back;
                while (at < n && !memcmp(got + at * v, want + at * v, v * sizeof(float)))
                    at++;
                CHECK(at == n, "%s, cache %d: after a rewind to %zu position %zu has other bits",
                      f->name, c, back, at);
                CHECK(moe_session_rewind(session, (uint32_t)(back / 2)) == MOE_OK, "%s", f->name);
            }
            moe_session_close(session);
            free(got);
            free(want);
        }
        free(other);
        moe_model_close(model);
    }
}

/* Tokens that a backend has been asked to embed: those that are computed. */
static struct {
    const moe_backend *inner;
    size_t n_tok;
} counted;

static void count_embed(moe_queue *queue, const moe_embed_op *op)
{
    counted.n_tok += op->n_tok;
    counted.inner->embed(queue, op);
}

/* As a draft of tokens that is taken back in part: in every model, recurrent layers too. */
static void going_back_a_little_computes_nothing_anew(void)
{
    enum { PROMPT = 21, DRAFT = 7 };
    static moe_backend counting;
    counted.inner = TEST_BACKEND ? TEST_BACKEND : backend_cpu();
    counting = *counted.inner;
    counting.embed = count_embed;
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t v = f->n_vocab, expected = PROMPT;
        moe_model_options options;
        moe_model_options_init(&options);
        options.path = f->path;
        options.backend = &counting;
        moe_model *model = NULL;
        bool ok = moe_model_open(&model, &options, NULL) == MOE_OK;
        moe_session *s = ok ? session_open_how(model, &(run_options){0}, f->n_tok) : NULL;
        float *want = s ? run(model, &(run_options){0}, f->tok, f->n_tok, v) : NULL;
        float *got = malloc(v * sizeof *got);
        counted.n_tok = 0;
        ok = want && moe_session_eval(s, f->tok, PROMPT, 0, NULL) == MOE_OK;
        for (size_t at = PROMPT, taken = 0; ok && at + DRAFT < f->n_tok;) {
            moe_token draft[DRAFT];
            for (size_t k = 0; k < DRAFT; k++)
                draft[k] = (f->tok[at + k] + (k >= taken)) % (moe_token)v;
            ok = moe_session_eval(s, draft, DRAFT, 1, got) == MOE_OK &&
                 moe_session_rewind(s, (uint32_t)(at + taken)) == MOE_OK &&
                 moe_session_eval(s, &f->tok[at + taken], 1, 1, got) == MOE_OK;
            CHECK(ok && !memcmp(got, want + (at + taken) * v, v * sizeof *got),
                  "%s: other bits after a draft of which %zu were taken", f->name, taken);
            expected += DRAFT + 1;
            at += taken + 1;
            taken = (taken + 2) % DRAFT;
        }
        /* Back to the end of the prompt, which was a call of more than one token. */
        ok = ok && moe_session_rewind(s, PROMPT) == MOE_OK &&
             moe_session_eval(s, f->tok + PROMPT, 1, 1, got) == MOE_OK;
        CHECK(ok && !memcmp(got, want + PROMPT * v, v * sizeof *got), "%s: other bits", f->name);
        CHECK(counted.n_tok == expected + 1, "%s: expected %zu tokens to be computed, got %zu",
              f->name, expected + 1, counted.n_tok);
        moe_session_close(s);
        moe_model_close(model);
        free(want);
        free(got);
    }
}

/* A call that ends early may have overwritten what a sliding window still needs. */
static void a_cancelled_call_loses_nothing(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, v = f->n_vocab;
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        float *want = run(model, &(run_options){0}, f->tok, n, v);
        float *got = malloc(n * v * sizeof(float));
        moe_cancel cancel = {0};
        moe_session_options options;
        moe_session_options_init(&options);
        options.n_ctx = (uint32_t)n;
        options.n_batch = 2;
        options.n_threads = 1;
        options.cancel = &cancel;
        moe_session *s = NULL;
        bool ok = want && moe_session_open(&s, model, &options, NULL) == MOE_OK;
        for (size_t at = 0; ok && at < n;) {
            const size_t step = MOE_MIN((size_t)13, n - at);
            ok = eval_chunks(s, f->tok + at, step, 0, v, got + at * v);
            at += step;
            if (!ok || at == n)
                break;
            moe_cancel_set(&cancel);
            CHECK(moe_session_eval(s, f->tok, n - at, 0, NULL) == MOE_ERR_CANCELLED, "%s", f->name);
            moe_cancel_clear(&cancel);
            /* Other tokens, all of them: then the sequence is cut back. */
            ok = moe_session_eval(s, f->tok, n - at, 0, NULL) == MOE_OK &&
                 moe_session_rewind(s, (uint32_t)at) == MOE_OK;
            CHECK(ok, "%s: %s", f->name, moe_session_error(s)->message);
            moe_cancel_set(&cancel); /* while what was lost is computed anew */
            CHECK(moe_session_eval(s, f->tok, 1, 0, NULL) == MOE_ERR_CANCELLED, "%s", f->name);
            moe_cancel_clear(&cancel);
        }
        CHECK(!ok || moe_session_length(s) == n, "%s: %u tokens", f->name, moe_session_length(s));
        moe_session_close(s);
        if (ok)
            check_same_logits(f, "after cancelled calls", got, want, n);
        else
            free(got);
        free(want);
        moe_model_close(model);
    }
}

/* The cache of a layer with a sliding window does not grow with the context. */
static void windows_bound_the_cache(void)
{
    uint32_t n_windowed = 0;
    for (size_t i = 0; i < n_fixtures; i++) {
        moe_model *model = model_open_isa(&fixtures[i], MOE_ISA_AUTO);
        moe_model_info info = {.size = sizeof info};
        moe_memory_estimate e = {.size = sizeof e};
        moe_session_options options;
        moe_session_options_init(&options);
        options.n_ctx = 4000;
        options.n_batch = 16;
        if (!model)
            continue;
        moe_model_get_info(model, &info);
        CHECK(moe_session_estimate(model, &options, &e, NULL) == MOE_OK, "estimate");
        const double share = (double)e.cache_bytes / (4000.0 * (double)info.kv_bytes_per_token);
        CHECK(info.sliding_window ? share < 0.8 : share >= 1, "%s: %g of a whole cache",
              fixtures[i].name, share);
        n_windowed += info.sliding_window > 0;
        moe_model_close(model);
    }
    CHECK(n_windowed > 0 || getenv("MOE_TEST_FIXTURES"), "no fixture has a sliding window");
}

static void interleaved_sessions_do_not_disturb_each_other(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, v = f->n_vocab;
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        moe_token *reverse = malloc(n * sizeof *reverse);
        for (size_t t = 0; t < n; t++)
            reverse[t] = f->tok[n - 1 - t];
        run_options h = {.n_threads = 2, .n_logits = 16};
        float *want[2] = {run(model, &h, f->tok, n, v), run(model, &h, reverse, n, v)};
        float *got[2] = {malloc(n * v * sizeof(float)), malloc(n * v * sizeof(float))};
        moe_session *s[2] = {NULL, NULL};
        bool ok = want[0] && want[1] && (s[0] = session_open_how(model, &h, (uint32_t)n)) &&
                  (s[1] = session_open_how(model, &h, (uint32_t)n));
        for (size_t t = 0; ok && t < n; t += 11)
            for (int k = 0; ok && k < 2; k++)
                ok = eval_chunks(s[k], (k ? reverse : f->tok) + t, MOE_MIN((size_t)11, n - t), 0, v,
                                 got[k] + t * v);
        for (int k = 0; k < 2; k++) {
            if (ok)
                check_same_logits(f, "interleaved", got[k], want[k], n);
            else
                free(got[k]);
            moe_session_close(s[k]);
            free(want[k]);
        }
        free(reverse);
        moe_model_close(model);
    }
}

typedef struct thread_job {
    const fixture *f;
    moe_model *model;
    const moe_token *tok;
    size_t n_tok;
    float *logits;
    bool ok;
} thread_job;

static void *thread_run(void *arg)
{
    thread_job *job = arg;
    moe_session_options options;
    moe_session_options_init(&options);
    options.n_ctx = (uint32_t)job->n_tok;
    options.n_threads = 2;
    options.n_logits = 16;
    moe_session *session = NULL;
    job->ok = moe_session_open(&session, job->model, &options, NULL) == MOE_OK;
    for (size_t t = 0; job->ok && t < job->n_tok; t += 9) {
        size_t n = MOE_MIN((size_t)9, job->n_tok - t);
        job->ok = moe_session_eval(session, job->tok + t, n, n,
                                   job->logits + t * job->f->n_vocab) == MOE_OK;
    }
    moe_session_close(session);
    return NULL;
}

static void sessions_in_two_threads_share_a_model(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, v = f->n_vocab;
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        moe_token *reverse = malloc(n * sizeof *reverse);
        for (size_t t = 0; t < n; t++)
            reverse[t] = f->tok[n - 1 - t];
        thread_job jobs[2];
        pthread_t threads[2];
        float *want[2];
        for (int k = 0; k < 2; k++) {
            jobs[k] = (thread_job){f, model, k ? reverse : f->tok, n,
                                   malloc(n * v * sizeof(float)), false};
            want[k] = run(model, &(run_options){0}, jobs[k].tok, n, v);
        }
        bool started = want[0] && want[1];
        for (int k = 0; started && k < 2; k++)
            CHECK(!pthread_create(&threads[k], NULL, thread_run, &jobs[k]), "thread %d", k);
        for (int k = 0; k < 2; k++) {
            if (started)
                pthread_join(threads[k], NULL);
            CHECK(jobs[k].ok, "%s: a session in thread %d failed", f->name, k);
            if (jobs[k].ok)
                check_same_logits(f, "two threads", jobs[k].logits, want[k], n);
            else
                free(jobs[k].logits);
            free(want[k]);
        }
        free(reverse);
        moe_model_close(model);
    }
}

/* ---------------------------------------------------------------------- the host's threads -- */

/* A parallel_for that takes the tasks from the back, on one thread. */
static void backwards(void *user, uint32_t n, void (*task)(void *arg, uint32_t i), void *arg)
{
    ++*(uint32_t *)user;
    while (n--)
        task(arg, n);
}

static void same_bits_with_the_hosts_threads(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        moe_model *own = model_open_isa(f, MOE_ISA_AUTO);
        float *want = run(own, &(run_options){0}, f->tok, f->n_tok, f->n_vocab);
        uint32_t n_calls = 0;
        moe_host host;
        moe_host_init(&host);
        host.user = &n_calls;
        host.parallel_for = backwards;
        moe_model_options options;
        moe_model_options_init(&options);
        options.path = f->path;
        options.host = &host;
        moe_model *model = model_open_with(f, &options);
        run_options h = {.n_threads = 4};
        if (want)
            check_same_logits(f, "parallel_for", run(model, &h, f->tok, f->n_tok, f->n_vocab), want,
                       f->n_tok);
        CHECK(n_calls > 0, "%s: parallel_for was not called", f->name);
        free(want);
        moe_model_close(model);
        moe_model_close(own);
    }
}

/* ---------------------------------------------------------------------------- fewer logits -- */

static void any_number_of_logits_gives_the_same_rows(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, v = f->n_vocab;
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        float *want = run(model, &(run_options){0}, f->tok, n, v);
        float *got = malloc(n * v * sizeof(float));
        static const size_t counts[] = {0, 1, 2, 17};
        for (size_t k = 0; want && k < MOE_COUNT(counts); k++) {
            moe_session *session = session_open_how(model, &(run_options){.n_batch = 8},
                                                    (uint32_t)n);
            if (!session)
                break;
            size_t first = n - 1; /* the last token goes alone, after the logits of some before */
            moe_status status = moe_session_eval(session, f->tok, first, counts[k],
                                                 counts[k] ? got : NULL);
            CHECK(status == MOE_OK, "%s: %s", f->name, moe_session_error(session)->message);
            CHECK(status || !counts[k] ||
                      !memcmp(got, want + (first - counts[k]) * v, counts[k] * v * sizeof(float)),
                  "%s: the last %zu rows differ", f->name, counts[k]);
            status = moe_session_eval(session, f->tok + first, 1, 1, got);
            CHECK(status == MOE_OK && !memcmp(got, want + first * v, v * sizeof(float)),
                  "%s: the last row differs after %zu rows of logits", f->name, counts[k]);
            moe_session_close(session);
        }
        free(got);
        free(want);
        moe_model_close(model);
    }
}

/* Gives matrices of floats a scale, 2^-k with a k for each and for each expert, and the matrices
 * the inverse: nothing is rounded differently. */
static size_t scale_matrices(gguf_edit *e)
{
    static const char *const names[] = {
        "attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "attn_q_a",
        "attn_q_b", "attn_kv_a_mqa", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_shexp",
        "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
        "ffn_gate_up_exps", "ssm_out"};
    size_t n = 0;
    for (size_t i = 0, end = e->n_tensors; i < end; i++) {
        edit_tensor *t = &e->tensor[i];
        char part[64] = "output", name[64];
        sscanf(t->name, "blk.%*u.%63[^.].weight", part);
        bool known = !strcmp(t->name, "output.weight");
        for (size_t k = 0; k < MOE_COUNT(names); k++)
            known |= !strcmp(part, names[k]) && strstr(t->name, ".weight");
        snprintf(name, sizeof name, "%.*s.scale", (int)(strlen(t->name) - 7), t->name);
        if (!known || t->type != 0 || edit_find_tensor(e, name))
            continue;
        const uint64_t one = 1;
        edit_tensor *s = edit_add_tensor(e, name, "F32", 1, t->n_dims > 2 ? &t->dims[2] : &one);
        const size_t n_matrix = t->n_dims > 2 ? (size_t)t->dims[2] : 1;
        for (size_t m = 0; m < n_matrix; m++) {
            const int k = (int)((n++ + m) % 9) - 4;
            float *w = (float *)(void *)t->data + m * (size_t)(t->dims[0] * t->dims[1]);
            for (size_t j = 0; j < t->dims[0] * t->dims[1]; j++)
                w[j] = ldexpf(w[j], k);
            ((float *)(void *)s->data)[m] = ldexpf(1.0f, -k);
        }
        snprintf(name, sizeof name, "%.*s.input_scale", (int)(strlen(t->name) - 7), t->name);
        ((float *)(void *)edit_add_tensor(e, name, "F32", 1, s->dims)->data)[0] = 3;
    }
    return n;
}

static moe_model *model_open_edited(const gguf_edit *e, uint8_t **data, moe_error *error)
{
    moe_model_options o;
    moe_model_options_init(&o);
    o.backend = TEST_BACKEND;
    o.data = *data = edit_write(e, &o.data_bytes);
    moe_model *model = NULL;
    CHECK((moe_model_open(&model, &o, error) == MOE_OK) == (model != NULL), "a model or an error");
    return model;
}

static void scales_of_matrices_are_factors_of_their_products(void)
{
    static const char *const names[] = {"llama-llama3", "mixtral", "qwen2moe", "gpt-oss", "gemma4",
                                        "deepseek3", "qwen35moe", "gemma3"};
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        bool taken = false;
        for (size_t k = 0; k < MOE_COUNT(names); k++)
            taken |= !strcmp(f->name, names[k]);
        gguf_edit *e = taken ? edit_read(f->path) : NULL;
        if (!e)
            continue;
        CHECK(scale_matrices(e) > 8, "%s: too few matrices", f->name);
        moe_error error = {0};
        uint8_t *data;
        moe_model *plain = model_open_isa(f, MOE_ISA_AUTO);
        moe_model *scaled = model_open_edited(e, &data, &error);
        CHECK(scaled, "%s: %s: %s", f->name, error.subject, error.message);
        for (size_t chunk = 0; chunk < 2 && scaled; chunk++) {
            const run_options h = {.chunk = chunk};
            float *want = run(plain, &h, f->tok, f->n_tok, f->n_vocab);
            check_same_logits(f, "scales", run(scaled, &h, f->tok, f->n_tok, f->n_vocab), want,
                              f->n_tok);
            free(want);
        }
        moe_model_close(plain);
        moe_model_close(scaled);
        free(data);
        edit_free(e);
    }
}

/* A scale that has no place, or not the shape, or is no number, is an error. */
static void scales_are_not_left_out(void)
{
    static const struct {
        const char *name;
        uint64_t n;
        float value;
        moe_status status;
    } cases[] = {{"blk.0.attn_q.scale", 2, 1, MOE_ERR_MODEL},
                 {"blk.0.ffn_up_exps.scale", 1, 1, MOE_ERR_MODEL},
                 {"blk.1.attn_q.scale", 1, INFINITY, MOE_ERR_MODEL},
                 {"token_embd.scale", 1, 1, MOE_ERR_UNSUPPORTED},
                 {"blk.0.attn_norm.scale", 1, 1, MOE_ERR_UNSUPPORTED},
                 {"blk.9.attn_q.scale", 1, 1, MOE_ERR_UNSUPPORTED}};
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/mixtral.gguf", fixture_folder());
        gguf_edit *e = edit_read(path);
        if (!e)
            SKIP("this folder of fixtures has no mixtral");
        edit_tensor *t = edit_add_tensor(e, cases[i].name, "F32", 1, &cases[i].n);
        for (size_t k = 0; k < cases[i].n; k++)
            ((float *)(void *)t->data)[k] = cases[i].value;
        moe_error error = {0};
        uint8_t *data;
        moe_model *model = model_open_edited(e, &data, &error);
        CHECK(!model && error.status == cases[i].status && !strcmp(error.subject, cases[i].name),
              "%s: %s: %s", cases[i].name, moe_status_name(error.status), error.message);
        moe_model_close(model);
        free(data);
        edit_free(e);
    }
}

/* The experts of a token: the best first, ties to the lower index, each once, also where scores are
 * no numbers. */
static void an_expert_is_chosen_once(void)
{
    static const struct { float x[4]; int32_t want[4]; } cases[] = {
        {{1, 3, 2, 3}, {1, 3, 2, 0}}, {{5, NAN, NAN, NAN}, {0, 1, 2, 3}},
        {{NAN, NAN, NAN, -INFINITY}, {0, 1, 2, 3}}, {{NAN, 1, NAN, 2}, {3, 1, 0, 2}},
        {{-INFINITY, NAN, INFINITY, 0}, {2, 3, 0, 1}}};
    for (size_t i = 0; i < MOE_COUNT(cases); i++)
        for (uint32_t k = 1; k <= 4; k++) {
            float x[4];
            int32_t ids[4] = {-1, -1, -1, -1};
            memcpy(x, cases[i].x, sizeof x);
            cpu_top_k(x, 4, k, ids);
            CHECK(!memcmp(ids, cases[i].want, k * sizeof *ids) && (k == 4 || ids[k] == -1),
                  "case %zu: %d %d %d %d", i, ids[0], ids[1], ids[2], ids[3]);
        }
}

static void a_refused_call_changes_nothing(void)
{
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        size_t n = f->n_tok, v = f->n_vocab;
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        float *want = run(model, &(run_options){0}, f->tok, n, v);
        float *got = malloc((n + 1) * v * sizeof(float));
        moe_session *session =
            want ? session_open_how(model, &(run_options){0}, (uint32_t)n) : NULL;
        if (session && eval_chunks(session, f->tok, 10, 0, v, got)) {
            moe_token bad[2] = {f->tok[10], (moe_token)v};
            CHECK(moe_session_eval(session, f->tok, n - 9, 1, got) == MOE_ERR_CONTEXT, "%s",
                  f->name);
            CHECK(moe_session_eval(session, bad, 2, 1, got) == MOE_ERR_ARGUMENT, "%s", f->name);
            bad[1] = -1;
            CHECK(moe_session_eval(session, bad, 2, 1, got) == MOE_ERR_ARGUMENT, "%s", f->name);
            CHECK(moe_session_length(session) == 10, "%s: length %u", f->name,
                  moe_session_length(session));
            if (eval_chunks(session, f->tok + 10, n - 10, 0, v, got))
                CHECK(!memcmp(got, want + 10 * v, (n - 10) * v * sizeof(float)), "%s", f->name);
        }
        moe_session_close(session);
        free(got);
        free(want);
        moe_model_close(model);
    }
}

/* -------------------------------------------------------------------------- recorded bits -- */

/* The hashes of the fixtures' logits are those of fixtures/bits.txt, lines of "NAME CACHE HASH":
 * the only test that compares compilers and machines with each other. After a change of the
 * arithmetic that is meant, write the file anew: MOE_TEST_WRITE_BITS=tests/fixtures/bits.txt. */
static void bits_are_those_recorded(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/bits.txt", fixture_folder());
    const char *new_path = getenv("MOE_TEST_WRITE_BITS");
    FILE *written = new_path ? fopen(new_path, "w") : NULL;
    size_t bytes;
    char *recorded = test_read_file(path, &bytes);
    if (!recorded && !written)
        SKIP("this folder of fixtures has no bits.txt");
    for (size_t i = 0; i < n_fixtures; i++) {
        const fixture *f = &fixtures[i];
        moe_model *model = model_open_isa(f, MOE_ISA_AUTO);
        for (int c = 0; c < 3; c++) {
            static const char *const names[] = {"F16", "Q8_0", "F32"};
            run_options h = {.cache = (moe_cache_type)c};
            float *got = run(model, &h, f->tok, f->n_tok, f->n_vocab);
            char key[80], line[128];
            snprintf(key, sizeof key, "%.60s %s ", f->name, names[c]);
            snprintf(line, sizeof line, "%s%016llx\n", key,
                     got ? (unsigned long long)hash_of(got, f->n_tok * f->n_vocab * sizeof(float))
                         : 0ull);
            if (written)
                fputs(line, written);
            else if (!strstr(recorded, key))
                printf("  %snot recorded\n", key);
            else
                CHECK(strstr(recorded, line), "%s: got %s", path, line);
            free(got);
        }
        moe_model_close(model);
    }
    if (written)
        fclose(written);
    free(recorded);
}

TEST_PROGRAM(forward)
{
    if (!fixtures_load())
        CANNOT_RUN("fixtures: cannot read all of %s", fixture_folder());
    RUN(prefill_is_right);
    RUN(step_by_step_is_right);
    RUN(chunks_are_right);
    RUN(small_batches_are_right);
    RUN(expanded_latents_are_right);
    RUN(f16_cache_is_right);
    RUN(q8_0_cache_is_right);
    RUN(tolerances_can_fail);
    RUN(same_bits_for_any_thread_count);
    RUN(same_bits_for_any_chunks);
    RUN(same_bits_for_any_context_length);
    RUN(same_bits_on_any_instruction_set);
    RUN(expanded_latents_depend_on_the_length_of_calls_alone);
    RUN(same_bits_for_any_way_of_opening);
    RUN(scales_of_matrices_are_factors_of_their_products);
    RUN(scales_are_not_left_out);
    RUN(same_bits_with_the_hosts_threads);
    RUN(rewound_session_equals_a_fresh_one);
    RUN(going_back_a_little_computes_nothing_anew);
    RUN(a_cancelled_call_loses_nothing);
    RUN(windows_bound_the_cache);
    RUN(interleaved_sessions_do_not_disturb_each_other);
    RUN(sessions_in_two_threads_share_a_model);
    RUN(any_number_of_logits_gives_the_same_rows);
    RUN(an_expert_is_chosen_once);
    RUN(a_refused_call_changes_nothing);
    RUN(bits_are_those_recorded);
}
