/* tests/test_draft.c - speculative decoding: the same bits as without, the guesses themselves, and
 * the decision whether they pay. */
#include "test.h"

#include "models.h"

/* -------------------------------------------------------------------------------- sessions -- */

typedef struct setup {
    moe_draft draft;
    uint32_t n_draft, n_ctx, n_batch;
    moe_cache_type cache;
} setup;

static moe_session *open_drafting(moe_model *model, const setup *u)
{
    moe_session_options o;
    moe_session_options_init(&o);
    o.draft = u->draft;
    o.n_draft = u->n_draft ? u->n_draft : 8;
    o.n_ctx = u->n_ctx ? u->n_ctx : 96;
    o.n_batch = u->n_batch ? u->n_batch : 32;
    o.cache_type = u->cache;
    o.n_threads = 1;
    return open_session(model, &o);
}

static moe_draft_stats stats_of(const moe_session *s)
{
    moe_draft_stats stats = {.size = sizeof stats};
    moe_session_draft_stats(s, &stats);
    return stats;
}

enum { N_DRAFT_PROMPT = 9, N_GEN = 60 };

/* Generates from a prompt as a program would: tokens [n], logits [n][n_vocab]. */
static void draft_generate(moe_session *s, const moe_sampler_options *so, uint32_t n_vocab,
                           uint32_t n, moe_token *tokens, float *logits)
{
    moe_token prompt[N_DRAFT_PROMPT];
    moe_sampler *sampler = NULL;
    for (uint32_t i = 0; i < N_DRAFT_PROMPT; i++)
        prompt[i] = (moe_token)(i * 37 % n_vocab);
    REQUIRE(!moe_sampler_new(&sampler, n_vocab, so, NULL, NULL), "sampler");
    moe_status status = moe_session_eval(s, prompt, N_DRAFT_PROMPT, 1, logits);
    for (uint32_t i = 0; i < n && !status; i++) {
        CHECK(!moe_sampler_pick(sampler, logits + (size_t)i * n_vocab, &tokens[i]), "pick");
        CHECK(moe_session_length(s) == N_DRAFT_PROMPT + i, "length %u after %u",
              moe_session_length(s), i);
        if (i + 1 < n)
            status = moe_session_eval(s, &tokens[i], 1, 1, logits + (size_t)(i + 1) * n_vocab);
    }
    CHECK(!status, "%s", moe_session_error(s)->message);
    moe_sampler_free(sampler);
}

/* The same generation with and without drafting: the same tokens, the same bits. Returns the number
 * of guesses that came true. */
static uint64_t compare_with_plain(const char *name, const setup *u, const moe_sampler_options *so)
{
    moe_model *model = open_fixture(name);
    if (!model)
        return 0;
    const uint32_t n_vocab = vocab_of(model);
    moe_token plain[N_GEN], drafted[N_GEN];
    float *a = calloc((size_t)N_GEN * n_vocab, sizeof *a);
    float *b = calloc((size_t)N_GEN * n_vocab, sizeof *b);
    setup off = *u;
    off.draft = MOE_DRAFT_OFF;
    moe_session *first = open_drafting(model, &off), *second = open_drafting(model, u);
    draft_generate(first, so, n_vocab, N_GEN, plain, a);
    draft_generate(second, so, n_vocab, N_GEN, drafted, b);
    CHECK(!memcmp(plain, drafted, sizeof plain), "%s: other tokens", name);
    CHECK(!memcmp(a, b, (size_t)N_GEN * n_vocab * sizeof *a), "%s: other bits", name);
    const moe_draft_stats stats = stats_of(second);
    CHECK(stats.n_accepted <= stats.n_drafted &&
          stats.n_drafted <= u->n_draft * stats.n_evaluations, "%s: %llu of %llu in %llu", name,
          (unsigned long long)stats.n_accepted, (unsigned long long)stats.n_drafted,
          (unsigned long long)stats.n_evaluations);
    moe_session_close(first);
    moe_session_close(second);
    moe_model_close(model);
    free(a);
    free(b);
    return stats.n_accepted;
}

static moe_sampler_options greedy(void)
{
    moe_sampler_options so;
    moe_sampler_options_init(&so);
    return so;
}

/* Small random models repeat themselves soon: guesses come true, others do not. */
static void lookup_gives_the_same_bits(void)
{
    static const char *const names[] = {"llama-tied", "qwen3moe", "gemma3", "gpt-oss", "lfm2moe",
                                        "deepseek3", "deepseek3-q", "gpt-oss-mxfp4"};
    const moe_sampler_options so = greedy();
    uint64_t n = 0;
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        n += compare_with_plain(names[i], &(setup){MOE_DRAFT_NGRAM, 8, 0, 0, MOE_CACHE_F16}, &so);
        n += compare_with_plain(names[i], &(setup){MOE_DRAFT_NGRAM, 3, N_DRAFT_PROMPT + N_GEN, 4,
                                                   MOE_CACHE_Q8_0}, &so);
        n += compare_with_plain(names[i], &(setup){MOE_DRAFT_AUTO, 5, 0, 7, MOE_CACHE_F32}, &so);
    }
    CHECK(n > 100, "only %llu guesses came true", (unsigned long long)n);
}

/* The stream of random numbers goes on one token at a time, whatever was computed ahead. */
static void sampling_gives_the_same_tokens(void)
{
    moe_sampler_options so = greedy();
    uint64_t n = 0;
    so.temperature = 0.5f;
    so.top_p = 0.9f;
    so.repetition_penalty = 1.05f;
    so.penalty_window = 8;
    for (so.seed = 1; so.seed <= 3; so.seed++)
        n += compare_with_plain("llama-tied", &(setup){MOE_DRAFT_NGRAM, 6, 0, 0, MOE_CACHE_F16},
                                &so);
    CHECK(n > 0, "no guess came true");
}

/* A host that does what it likes: several tokens at once, going back, asking for no logits. */
static void any_calls_give_the_same_bits(void)
{
    static const char *const names[] = {"gemma3", "lfm2moe-4", "deepseek2-lite"};
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        moe_model *model = open_fixture(names[i]);
        const uint32_t n_vocab = vocab_of(model);
        float *a = calloc(n_vocab, sizeof *a), *b = calloc(n_vocab, sizeof *b);
        moe_session *plain = open_drafting(model, &(setup){.draft = MOE_DRAFT_OFF, .n_batch = 6});
        moe_session *drafts = open_drafting(model,
                                            &(setup){.draft = MOE_DRAFT_NGRAM, .n_batch = 6});
        for (uint32_t step = 0; step < 300; step++) {
            moe_token tokens[4];
            const uint32_t kind = test_random() % 16, n = kind < 14 ? 1 : 1 + test_random() % 4;
            for (uint32_t k = 0; k < n; k++) /* a short loop, left now and then */
                tokens[k] = (moe_token)(test_random() % 8 ? (moe_session_length(plain) + k) % 5
                                                          : test_random() % n_vocab);
            const uint32_t n_logits = kind % 7 != 0, length = moe_session_length(plain);
            if (kind == 13)
                CHECK(!moe_session_checkpoint(plain) && !moe_session_checkpoint(drafts),
                      "checkpoint");
            if (length + n > moe_session_capacity(plain) || kind == 15) {
                const uint32_t back = kind == 15 && length ? length - 1 - test_random() % MOE_MIN(
                                                                               length, 9) : 3;
                CHECK(!moe_session_rewind(plain, back) && !moe_session_rewind(drafts, back),
                      "rewind");
            }
            CHECK(!moe_session_eval(plain, tokens, n, n_logits, a), "plain");
            CHECK(!moe_session_eval(drafts, tokens, n, n_logits, b), "drafts");
            CHECK(moe_session_length(plain) == moe_session_length(drafts), "lengths");
            CHECK(!n_logits || !memcmp(a, b, n_vocab * sizeof *a), "%s, step %u: other bits",
                  names[i], step);
        }
        CHECK(stats_of(drafts).n_accepted > 10, "%llu came true",
              (unsigned long long)stats_of(drafts).n_accepted);
        moe_session_close(plain);
        moe_session_close(drafts);
        moe_model_close(model);
        free(a);
        free(b);
    }
}

/* Up to the last position of the context, and not further. */
static void drafting_stops_at_the_context(void)
{
    moe_model *model = open_fixture("llama-tied");
    const uint32_t n_vocab = vocab_of(model);
    float *logits = calloc(n_vocab, sizeof *logits);
    moe_session *s = open_drafting(model, &(setup){.draft = MOE_DRAFT_NGRAM, .n_ctx = 12});
    const moe_token token = 7;
    for (uint32_t i = 0; i < 12; i++)
        CHECK(!moe_session_eval(s, &token, 1, 1, logits), "%s", moe_session_error(s)->message);
    CHECK(stats_of(s).n_accepted > 5, "%llu", (unsigned long long)stats_of(s).n_accepted);
    CHECK(moe_session_eval(s, &token, 1, 1, logits) == MOE_ERR_CONTEXT, "one too many");
    CHECK(moe_session_length(s) == 12, "%u", moe_session_length(s));
    moe_session_close(s);
    /* One position, and batches of one token: nothing can be computed ahead. */
    s = open_drafting(model, &(setup){.draft = MOE_DRAFT_NGRAM, .n_ctx = 1});
    CHECK(!moe_session_eval(s, &token, 1, 1, logits), "%s", moe_session_error(s)->message);
    moe_session_close(s);
    s = open_drafting(model, &(setup){.draft = MOE_DRAFT_NGRAM, .n_batch = 1});
    for (uint32_t i = 0; i < 12; i++)
        CHECK(!moe_session_eval(s, &token, 1, 1, logits), "%s", moe_session_error(s)->message);
    CHECK(stats_of(s).n_drafted == 0, "%llu", (unsigned long long)stats_of(s).n_drafted);
    moe_session_close(s);
    moe_model_close(model);
    free(logits);
}

static void options_are_checked(void)
{
    moe_model *model = open_fixture("llama-tied");
    moe_session *s;
    moe_session_options o;
    moe_error error;
    const struct {
        int draft;
        uint32_t n_draft;
        moe_status status;
        const char *subject;
    } cases[] = {
        {4, 8, MOE_ERR_ARGUMENT, "draft"},
        {-1, 8, MOE_ERR_ARGUMENT, "draft"},
        {MOE_DRAFT_NGRAM, 0, MOE_ERR_ARGUMENT, "n_draft"},
        {MOE_DRAFT_NGRAM, 16, MOE_ERR_ARGUMENT, "n_draft"},
        {MOE_DRAFT_MTP, 8, MOE_ERR_UNSUPPORTED, "draft"},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_session_options_init(&o);
        o.draft = (moe_draft)cases[i].draft;
        o.n_draft = cases[i].n_draft;
        CHECK(moe_session_open(&s, model, &o, &error) == cases[i].status && !s &&
              !strcmp(error.subject, cases[i].subject), "%zu: %s", i, error.message);
    }
    /* What is estimated is what is taken. */
    moe_session_options_init(&o);
    o.draft = MOE_DRAFT_AUTO;
    moe_memory_estimate need = {.size = sizeof need};
    CHECK(!moe_session_estimate(model, &o, &need, &error), "%s", error.message);
    const uint64_t before = atomic_load(&model->mem.used_bytes);
    CHECK(!moe_session_open(&s, model, &o, &error), "%s", error.message);
    const uint64_t taken = atomic_load(&model->mem.used_bytes) - before;
    CHECK(taken <= need.total_bytes && taken + 65536 > need.total_bytes, "%llu of %llu",
          (unsigned long long)taken, (unsigned long long)need.total_bytes);
    moe_session_close(s);
    moe_model_close(model);
}

/* ------------------------------------------------------------------ multi-token prediction -- */

/* NAME.expected and NAME.drafts of tests/make_fixtures.py. */
typedef struct draft_reference {
    uint32_t n_tok, n_vocab;
    moe_token *tokens;
    float *drafts; // [2][n_tok][n_vocab]
    char *files[2];
} draft_reference;

static bool read_reference(draft_reference *r, const char *name)
{
    static const char *const endings[] = {"expected", "drafts"};
    for (int i = 0; i < 2; i++) {
        char path[512];
        size_t bytes = 0;
        snprintf(path, sizeof path, "%s/fixtures/%s.%s", test_root(), name, endings[i]);
        r->files[i] = test_read_file(path, &bytes);
        CHECK(r->files[i] && bytes > 64, "%s", path);
        if (!r->files[i])
            return false;
    }
    memcpy(&r->n_tok, r->files[1] + 4, 4);
    memcpy(&r->n_vocab, r->files[1] + 8, 4);
    r->tokens = (moe_token *)(void *)(r->files[0] + 24);
    r->drafts = (float *)(void *)(r->files[1] + 12);
    return true;
}

/* The largest difference, relative to the largest logit. */
static double distance(const float *got, const float *want, uint32_t n)
{
    double worst = 0, largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)got[i] - (double)want[i]));
        largest = fmax(largest, fabs((double)want[i]));
    }
    return worst / largest;
}

/* The layer's logits after the first n_tok tokens, one and two steps on. */
static void check_layer(moe_session *s, const draft_reference *r, double *worst)
{
    draft_guess guess;
    const uint32_t p = moe_session_length(s);
    CHECK(!moe_session_rewind(s, p), "rewind"); /* drops what was computed ahead */
    for (uint32_t depth = 0; depth < 2 && p + depth < s->options.n_ctx; depth++) {
        s->history[p] = r->tokens[p];
        CHECK(!mtp_guess(s, depth + 1, &guess), "%s", moe_session_error(s)->message);
        const float *want = r->drafts + ((size_t)depth * r->n_tok + p) * r->n_vocab;
        *worst = fmax(*worst, distance(s->mtp.logits, want, r->n_vocab));
        CHECK(guess.n == depth + 1 && guess.tokens[depth] == mtp_best(want, r->n_vocab),
              "at %u: %d", p, guess.tokens[depth]);
    }
}

static void check_reference(const char *name)
{
    draft_reference r;
    REQUIRE(read_reference(&r, name), "no fixture");
    moe_model *model = open_fixture(name);
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    CHECK(info.n_layer_draft == 1, "%s: %u", name, info.n_layer_draft);
    float *logits = calloc(r.n_vocab, sizeof *logits);
    for (uint32_t n_batch = 3; n_batch < 32; n_batch += 7) {
        double worst = 0;
        moe_session *s = open_drafting(model, &(setup){MOE_DRAFT_MTP, 2, r.n_tok + 2, n_batch,
                                                      MOE_CACHE_F32});
        for (uint32_t p = 0; p + 1 < r.n_tok;) { /* in pieces of many lengths */
            const uint32_t wish = 1 + test_random() % 9, n = MOE_MIN(wish, r.n_tok - 1 - p);
            for (uint32_t k = 0; k < (n % 3 ? 1 : n); k++)
                CHECK(!moe_session_eval(s, r.tokens + p + k, n % 3 ? n : 1, 1, logits), "%s",
                      moe_session_error(s)->message);
            p += n;
            check_layer(s, &r, &worst);
        }
        CHECK(worst < 1e-4, "%s, batches of %u: %g", name, n_batch, worst);
        /* Back, and on: rows of other tokens are made again if there is output before them. */
        const bool kept = s->mtp.from < r.n_tok - 4;
        CHECK(!moe_session_rewind(s, r.n_tok - 4) &&
              !moe_session_eval(s, (moe_token[]){1, 2, 3}, 3, 1, logits) &&
              !moe_session_rewind(s, r.n_tok - 4) &&
              !moe_session_eval(s, r.tokens + r.n_tok - 4, 2, 1, logits), "%s",
              moe_session_error(s)->message);
        if (kept)
            check_layer(s, &r, &worst);
        CHECK(worst < 1e-4, "%s, after going back, batches of %u: %g", name, n_batch, worst);
        moe_session_close(s);
    }
    moe_model_close(model);
    free(logits);
    free(r.files[0]);
    free(r.files[1]);
}

static const char *const with_layer[] = {"deepseek3-mtp", "qwen35moe-mtp"};

static void layer_matches_the_reference(void)
{
    for (size_t i = 0; i < MOE_COUNT(with_layer); i++)
        check_reference(with_layer[i]);
}

/* Calls of any length from which no guess is asked for: what is due of the layer stays within one
 * batch, for which its buffers are made, and is right when a guess is asked for at last. */
static void rows_that_are_due_fit_into_a_batch(void)
{
    for (size_t i = 0; i < MOE_COUNT(with_layer); i++) {
        draft_reference r;
        REQUIRE(read_reference(&r, with_layer[i]), "no fixture");
        moe_model *model = open_fixture(with_layer[i]);
        for (uint32_t n_batch = 2; n_batch < 6; n_batch++) {
            double worst = 0;
            moe_session *s = open_drafting(model, &(setup){MOE_DRAFT_MTP, 2, r.n_tok + 2, n_batch,
                                                          MOE_CACHE_F32});
            for (uint32_t p = 0, n; p + 1 < r.n_tok; p += n) {
                n = MOE_MIN(p ? 1 + p % 3 % n_batch : n_batch, r.n_tok - 1 - p);
                CHECK(!moe_session_eval(s, r.tokens + p, n, 0, NULL), "%s",
                      moe_session_error(s)->message);
                CHECK(p + n + 1 - s->mtp.next <= n_batch, "batches of %u: from %u to %u", n_batch,
                      s->mtp.next, p + n);
            }
            check_layer(s, &r, &worst);
            CHECK(worst < 1e-4, "%s, batches of %u: %g", with_layer[i], n_batch, worst);
            moe_session_close(s);
        }
        moe_model_close(model);
        free(r.files[0]);
        free(r.files[1]);
    }
}

/* Tokens, and guesses behind them, that are gone back on and replaced: the layer's rows of them are
 * made again, and going back further than its rows reach makes one without what it should know. */
static void rows_of_tokens_gone_back_on_are_made_again(void)
{
    static const moe_token other[3] = {1, 2, 3};
    for (size_t i = 0; i < MOE_COUNT(with_layer); i++) {
        draft_reference r;
        draft_guess guess;
        double worst = 0;
        REQUIRE(read_reference(&r, with_layer[i]), "no fixture");
        moe_model *model = open_fixture(with_layer[i]);
        moe_session *s = open_drafting(model, &(setup){MOE_DRAFT_MTP, 2, r.n_tok + 2, 3,
                                                      MOE_CACHE_F32});
        for (uint32_t p = 3; p + 2 < r.n_tok; p++) {
            CHECK(!moe_session_rewind(s, 0) && !moe_session_eval(s, r.tokens, p, 0, NULL) &&
                      !moe_session_eval(s, other, 1 + p % 3, 0, NULL), "%s",
                  moe_session_error(s)->message);
            s->history[s->n_past] = 5;
            CHECK(!mtp_guess(s, 2, &guess), "guess");
            CHECK(!moe_session_rewind(s, p) && !moe_session_eval(s, r.tokens + p, 1, 0, NULL),
                  "%s", moe_session_error(s)->message);
            check_layer(s, &r, &worst);
            CHECK(!moe_session_rewind(s, p / 2), "rewind");
            CHECK(!mtp_guess(s, 1, &guess) && s->mtp.to == p / 2 && s->mtp.from < p / 2,
                  "outputs of %u to %u are there, at %u", s->mtp.from, s->mtp.to, p / 2);
        }
        CHECK(worst < 1e-4, "%s: %g", with_layer[i], worst);
        moe_session_close(s);
        moe_model_close(model);
        free(r.files[0]);
        free(r.files[1]);
    }
}

/* Guesses of a random layer do not come true. A host that always does as the layer says: */
static void follow_the_layer(const char *name)
{
    moe_model *model = open_fixture(name);
    const uint32_t n_vocab = vocab_of(model);
    float *a = calloc(n_vocab, sizeof *a), *b = calloc(n_vocab, sizeof *b);
    moe_session *plain = open_drafting(model, &(setup){.draft = MOE_DRAFT_OFF});
    moe_session *drafts = open_drafting(model, &(setup){.draft = MOE_DRAFT_MTP, .n_draft = 6});
    moe_token token = 5;
    for (uint32_t i = 0; i < 90; i++) {
        CHECK(!moe_session_eval(plain, &token, 1, 1, a) &&
              !moe_session_eval(drafts, &token, 1, 1, b), "%s", moe_session_error(drafts)->message);
        CHECK(!memcmp(a, b, n_vocab * sizeof *a), "%s, step %u: other bits", name, i);
        const session_ahead *h = &drafts->ahead;
        token = i % 29 == 28     ? 11
                : h->used < h->n ? h->guess.tokens[h->used]
                                 : (moe_token)(i % n_vocab);
    }
    CHECK(stats_of(drafts).n_accepted > 40, "%llu",
          (unsigned long long)stats_of(drafts).n_accepted);
    CHECK(stats_of(drafts).n_drafted > stats_of(drafts).n_evaluations, "no chains");
    moe_session_close(plain);
    moe_session_close(drafts);
    moe_model_close(model);
    free(a);
    free(b);
}

static void layer_gives_the_same_bits(void)
{
    for (size_t i = 0; i < MOE_COUNT(with_layer); i++) {
        moe_sampler_options so = greedy();
        const char *name = with_layer[i];
        compare_with_plain(name, &(setup){MOE_DRAFT_MTP, 4, 0, 0, MOE_CACHE_F16}, &so);
        compare_with_plain(name, &(setup){MOE_DRAFT_MTP, 2, N_DRAFT_PROMPT + N_GEN, 4,
                                          MOE_CACHE_Q8_0}, &so);
        compare_with_plain(name, &(setup){MOE_DRAFT_AUTO, 8, 0, 5, MOE_CACHE_F32}, &so);
        so.temperature = 0.7f;
        compare_with_plain(name, &(setup){MOE_DRAFT_MTP, 3, 0, 0, MOE_CACHE_F16}, &so);
        follow_the_layer(name);
    }
}

/* ---------------------------------------------------------------------------------- guesses -- */

static void lookup_finds_the_longest_match(void)
{
    draft_guess g;
    const moe_token text[] = {1, 2, 3, 4, 9, 2, 3, 8, 9, 2, 3};
    draft_lookup(text, 11, 3, &g); /* "9 2 3" stood before, and 8 9 2 followed */
    CHECK(g.grade == 3 && g.n == 3 && g.tokens[0] == 8 && g.tokens[1] == 9 && g.tokens[2] == 2,
          "%u, %u: %d %d %d", g.grade, g.n, g.tokens[0], g.tokens[1], g.tokens[2]);
    draft_lookup(text, 7, 2, &g); /* "2 3": the earlier place */
    CHECK(g.grade == 2 && g.tokens[0] == 4 && g.tokens[1] == 9, "%u: %d", g.grade, g.tokens[0]);
    draft_lookup(text, 4, 4, &g);
    CHECK(g.n == 0, "%u", g.n);
    const moe_token both[] = {5, 6, 5, 7, 5};
    draft_lookup(both, 5, 1, &g); /* the later of two equally long ones */
    CHECK(g.grade == 1 && g.tokens[0] == 7, "%u: %d", g.grade, g.tokens[0]);
    const moe_token loop[] = {4, 5, 6, 4, 5, 6, 4, 5};
    draft_lookup(loop, 8, 7, &g); /* goes on past the end */
    const moe_token want[] = {6, 4, 5, 6, 4, 5, 6};
    CHECK(g.grade == 5 && g.n == 7 && !memcmp(g.tokens, want, sizeof want), "%u, %u", g.grade, g.n);
    moe_token same[100];
    for (int i = 0; i < 100; i++)
        same[i] = 3;
    draft_lookup(same, 100, DRAFT_MAX, &g);
    CHECK(g.grade == DRAFT_MATCH_MAX && g.n == DRAFT_MAX && g.tokens[DRAFT_MAX - 1] == 3, "%u",
          g.grade);
    draft_lookup(same, 1, 4, &g);
    CHECK(g.n == 0, "%u", g.n);
}

/* Between two that were measured, a time is on the line through them; behind the last, on the line
 * from the first token. One token takes 1. */
static void times_are_on_lines_between_measured_ones(void)
{
    moe_drafter d = {.adaptive = true, .n_max = 8};
    draft_time *t = d.times[DRAFT_BY_NGRAM];
    CHECK(draft_time_of(&d, DRAFT_BY_NGRAM, 1) == 1 &&
              fabs(draft_time_of(&d, DRAFT_BY_NGRAM, 3) - 1.7) < 1e-9, "nothing is measured: %g",
          draft_time_of(&d, DRAFT_BY_NGRAM, 3));
    t[4] = (draft_time){.n = 1, .mean = 7};
    static const double alone[] = {1, 3, 5, 7, 9}, two[] = {1, 2, 4.5, 7, 9};
    for (uint32_t n = 1; n <= 5; n++)
        CHECK(fabs(draft_time_of(&d, DRAFT_BY_NGRAM, n) - alone[n - 1]) < 1e-9, "%u: %g", n,
              draft_time_of(&d, DRAFT_BY_NGRAM, n));
    t[2] = (draft_time){.n = 1, .mean = 2};
    for (uint32_t n = 1; n <= 5; n++)
        CHECK(fabs(draft_time_of(&d, DRAFT_BY_NGRAM, n) - two[n - 1]) < 1e-9, "%u: %g", n,
              draft_time_of(&d, DRAFT_BY_NGRAM, n));
}

/* A made-up machine and text: guesses of grade g come true with probability p[g]; b tokens take 1 +
 * slope * (b - 1). Returns how much time one token takes, with drafting decided as it is. */
static double simulate(double slope, double p_first, double p_next, double noise, uint32_t n_steps)
{
    moe_drafter d = {.adaptive = true, .n_max = 8};
    double all = 0;
    uint32_t n_tokens = 0;
    while (n_tokens < n_steps) {
        double gain;
        const uint32_t grade = 1 + test_random() % 4;
        const uint32_t n = draft_choose(&d, DRAFT_BY_NGRAM, grade, 8, &gain);
        const double seconds = (1 + slope * n) * (1 + noise * (double)test_random_float());
        draft_record(&d, DRAFT_BY_NGRAM, n + 1, seconds);
        all += seconds;
        n_tokens++;
        bool right = true;
        for (uint32_t k = 0; k < 8 && right; k++) {
            right = (double)test_random_float() < 2 * (k ? p_next : p_first) - 1;
            draft_learn(&d, DRAFT_BY_NGRAM, grade + k, right);
            if (right && k < n) {
                draft_accept(&d);
                n_tokens++;
            }
            right &= k < n;
        }
    }
    return all / n_tokens;
}

static void drafting_never_costs_much(void)
{
    for (double slope = 0.2; slope < 1.3; slope += 0.2) {
        for (double p = 0; p < 0.5; p += 0.1) {
            const double t = simulate(slope, p, p, 0.1, 4000);
            CHECK(t < 1.02, "%.1f more per token, %.1f come true: %.3f times as long", slope, p, t);
        }
    }
}

static void drafting_pays_where_it_can(void)
{
    /* At best: the tokens of one evaluation over its time. */
    CHECK(simulate(0.1, 0.95, 0.95, 0.1, 4000) < 0.35, "%.3f",
          simulate(0.1, 0.95, 0.95, 0.1, 4000));
    CHECK(simulate(0.3, 0.8, 0.8, 0.1, 4000) < 0.72, "%.3f", simulate(0.3, 0.8, 0.8, 0.1, 4000));
    CHECK(simulate(0.2, 0.6, 0.6, 0.1, 4000) < 0.85, "%.3f", simulate(0.2, 0.6, 0.6, 0.1, 4000));
}

TEST_PROGRAM(draft)
{
    RUN(lookup_finds_the_longest_match);
    RUN(times_are_on_lines_between_measured_ones);
    RUN(drafting_never_costs_much);
    RUN(drafting_pays_where_it_can);
    RUN(lookup_gives_the_same_bits);
    RUN(sampling_gives_the_same_tokens);
    RUN(any_calls_give_the_same_bits);
    RUN(drafting_stops_at_the_context);
    RUN(layer_matches_the_reference);
    RUN(rows_that_are_due_fit_into_a_batch);
    RUN(rows_of_tokens_gone_back_on_are_made_again);
    RUN(layer_gives_the_same_bits);
    RUN(options_are_checked);
}
