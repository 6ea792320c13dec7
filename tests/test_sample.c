/* tests/test_sample.c - the sampler against a slow one: sorting, double precision, libm. */
#include "test.h"

/* ------------------------------------------------------------------------------- reference -- */

enum { REF_MAX = 512 };

typedef struct ref_item {
    moe_token id;
    float logit;
    double p; // relative to the best
} ref_item;

/* The candidates in their order, and between which lengths the kept run may end: more than one if a
 * threshold falls within 1e-6 of a sum, where rounding may decide. */
typedef struct ref_result {
    ref_item item[REF_MAX];
    uint32_t n_min, n_max;
} ref_result;

static int ref_compare(const void *a, const void *b)
{
    const ref_item *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static float ref_penalize(const moe_sampler_options *o, float logit, uint32_t count)
{
    float x = (float)(logit > 0 ? (double)logit / o->repetition_penalty
                                : (double)logit * o->repetition_penalty);
    x = (float)((double)x - (double)o->frequency_penalty * count);
    return (float)((double)x - o->presence_penalty);
}

static uint32_t ref_prefix(const ref_item *item, uint32_t n, double top_p, double min_p)
{
    double sum = 0, so_far = 0;
    uint32_t n_top = 0, n_min = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += item[i].p;
    while (n_top < n && (n_top == 0 || so_far < top_p * sum))
        so_far += item[n_top++].p;
    while (n_min < n_top && item[n_min].p >= min_p)
        n_min++;
    return n_min;
}

/* history: all tokens so far, the newest last. */
static void ref_narrow(ref_result *r, const moe_sampler_options *o, const float *logits,
                       uint32_t n_vocab, const moe_token *history, uint32_t n_history)
{
    uint32_t n = 0, first = n_history > o->penalty_window ? n_history - o->penalty_window : 0;
    for (uint32_t id = 0; id < n_vocab; id++) {
        float x = logits[id];
        for (size_t b = 0; b < o->n_logit_bias; b++)
            if (o->logit_bias[b].token == (moe_token)id)
                x += o->logit_bias[b].bias;
        uint32_t count = 0;
        for (uint32_t i = first; i < n_history; i++)
            count += history[i] == (moe_token)id;
        if (count)
            x = ref_penalize(o, x, count);
        if (isfinite(x))
            r->item[n++] = (ref_item){(moe_token)id, x, 0};
    }
    qsort(r->item, n, sizeof r->item[0], ref_compare);
    if (o->temperature == 0) {
        r->item[0].p = 1;
        r->n_min = r->n_max = 1;
        return;
    }
    if (o->top_k && o->top_k < n)
        n = o->top_k;
    for (uint32_t i = 0; i < n; i++)
        r->item[i].p = exp(((double)r->item[i].logit - r->item[0].logit) / o->temperature);
    /* Only the fields that are on have a threshold that rounding can miss. */
    double slack_top = o->top_p < 1 ? 1e-6 : 0, slack_min = o->min_p > 0 ? 1e-6 : 0;
    double top_p = o->top_p < 1 ? o->top_p : 2;
    r->n_min = ref_prefix(r->item, n, top_p - slack_top, o->min_p + slack_min);
    r->n_max = ref_prefix(r->item, n, top_p + slack_top, o->min_p - slack_min);
    if (r->n_min == 0)
        r->n_min = 1;
}

/* ---------------------------------------------------------------------------------- helpers -- */

static moe_sampler_options defaults(void)
{
    moe_sampler_options o;
    moe_sampler_options_init(&o);
    return o;
}

static moe_sampler *sampler_for(uint32_t n_vocab, const moe_sampler_options *o)
{
    moe_sampler *s = NULL;
    moe_error error = {0};
    moe_status status = moe_sampler_new(&s, n_vocab, o, NULL, &error);
    CHECK(status == MOE_OK && s, "%s", error.message);
    return s;
}

/* Small multiples of 1/8, so that there are ties and the penalties of the tests are exact. */
static void coarse_logits(float *logits, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        logits[i] = (float)(int32_t)(test_random() % 97) / 8 - 6;
}

static float pick_of(const float *list, uint32_t n)
{
    return list[test_random() % n];
}

/* Fills options at random; `bias` has room for 8. */
static moe_sampler_options random_options(uint32_t n_vocab, moe_logit_bias *bias)
{
    static const float temperature[] = {0, 0.1f, 0.7f, 1, 1.5f, 30};
    static const float top_p[] = {1, 0.95f, 0.5f, 0.01f, 1e-7f, 0.99999f};
    static const float min_p[] = {0, 0.05f, 0.5f, 0.999f, 1e-6f};
    static const float repetition[] = {1, 1.25f, 1.1f, 0.5f, 2};
    static const float amount[] = {0, 0, 0.5f, -0.25f, 2};
    moe_sampler_options o = defaults();
    o.temperature = pick_of(temperature, MOE_COUNT(temperature));
    o.top_p = pick_of(top_p, MOE_COUNT(top_p));
    o.min_p = pick_of(min_p, MOE_COUNT(min_p));
    o.repetition_penalty = pick_of(repetition, MOE_COUNT(repetition));
    o.frequency_penalty = pick_of(amount, MOE_COUNT(amount));
    o.presence_penalty = pick_of(amount, MOE_COUNT(amount));
    o.penalty_window = test_random() % 20;
    o.top_k = test_random() % 3 ? test_random() % (2 * n_vocab + 1) : 0;
    o.seed = test_random();
    o.logit_bias = bias;
    o.n_logit_bias = test_random() % 2 ? test_random() % 9 : 0;
    for (size_t i = 0; i < o.n_logit_bias; i++)
        bias[i] = (moe_logit_bias){(moe_token)(test_random() % n_vocab),
                                   test_random() % 4 || i == 0 ? (float)(int)(i * 2) - 8
                                                               : -INFINITY};
    return o;
}

/* Our candidates must be a prefix of the reference's, by id, with its probabilities. */
static void compare_with_reference(const moe_sampler *s, uint64_t sum, const ref_result *r)
{
    uint32_t n = s->n_candidates;
    CHECK(n >= r->n_min && n <= r->n_max, "%u candidates, expected %u..%u", n, r->n_min, r->n_max);
    if (n < r->n_min || n > r->n_max)
        return;
    double ref_sum = 0;
    uint64_t our_sum = 0;
    for (uint32_t i = 0; i < n; i++)
        ref_sum += r->item[i].p;
    for (uint32_t i = 0; i < n; i++) {
        const moe_candidate *c = NULL;
        for (uint32_t j = 0; j < n; j++)
            if (s->candidates[j].id == r->item[i].id)
                c = &s->candidates[j];
        CHECK(c, "token %d, number %u by rank, is missing", r->item[i].id, i);
        if (!c)
            return;
        double ours = (double)c->weight / (double)sum, ref = r->item[i].p / ref_sum;
        CHECK(fabs(ours - ref) < 2e-8, "token %d: probability %.10g, expected %.10g", c->id, ours,
              ref);
        our_sum += c->weight;
        CHECK(i == 0 || s->candidates[i].id > s->candidates[i - 1].id, "not in order of ids");
    }
    CHECK(our_sum == sum, "sum %llu, expected %llu", (unsigned long long)sum,
          (unsigned long long)our_sum);
}

/* ------------------------------------------------------------------------------------ tests -- */

static void weights_are_powers(void)
{
    uint64_t before = UINT64_MAX;
    for (uint64_t x = 0; x < 40ull << 31; x += 99991 * (1 + (x >> 31))) {
        uint64_t w = sample_weight(x);
        double exact = exp2(SAMPLE_WEIGHT_BITS - (double)x * 0x1p-31);
        CHECK(fabs((double)w - exact) < exact * 0x1p-28 + 1, "2^-%g: %llu, expected %.17g",
              (double)x * 0x1p-31, (unsigned long long)w, exact);
        CHECK(w <= before, "rises at %llu", (unsigned long long)x);
        before = w;
    }
    for (uint64_t i = 0; i < 42; i++) { // around the seams of the pieces
        uint64_t x = i << 31, w = sample_weight(x);
        CHECK(w == (i > 38 ? 0 : 1ull << (38 - i)), "2^-%llu: %llu", (unsigned long long)i,
              (unsigned long long)w);
        for (uint64_t d = 1; d < 2000; d++) {
            CHECK(sample_weight(x + d) <= sample_weight(x + d - 1), "rises at seam");
            CHECK(x < d || sample_weight(x - d) >= sample_weight(x - d + 1), "rises at seam");
        }
    }
}

static void random_options_equal_reference(void)
{
    static float logits[REF_MAX];
    static ref_result ref;
    for (int round = 0; round < 3000; round++) {
        uint32_t n_vocab = 1 + test_random() % (round % 8 ? 40 : REF_MAX);
        moe_logit_bias bias[8];
        moe_sampler_options o = random_options(n_vocab, bias);
        moe_sampler *s = sampler_for(n_vocab, &o);
        moe_token history[64];
        uint32_t n_history = test_random() % 50;
        for (uint32_t i = 0; i < n_history; i++) {
            history[i] = (moe_token)(test_random() % n_vocab);
            moe_sampler_accept(s, history[i]);
        }
        for (int step = 0; step < 4; step++) {
            coarse_logits(logits, n_vocab);
            if (round % 3 == 0 && n_vocab > 1)
                logits[test_random() % n_vocab] = round % 2 ? NAN : -INFINITY;
            ref_narrow(&ref, &o, logits, n_vocab, history, n_history);
            uint64_t sum = sample_narrow(s, logits);
            if (sum == 0) {
                CHECK(ref.item[0].p == 0 || n_vocab < 9, "nothing left");
                break;
            }
            compare_with_reference(s, sum, &ref);
            moe_token token = -1;
            CHECK(moe_sampler_pick(s, logits, &token) == MOE_OK, "pick failed");
            bool found = false;
            for (uint32_t i = 0; i < ref.n_max; i++)
                found |= ref.item[i].id == token;
            CHECK(found, "picked %d, which is not a candidate", token);
            history[n_history++] = token;
        }
        moe_sampler_free(s);
        if (test_failures)
            return;
    }
}

static void all_floats_keep_their_order(void)
{
    const float list[] = {-INFINITY, -3.4e38f, -1, -1e-40f, 0, 1e-45f, 1e-38f, 1, 2, 3.4e38f};
    for (size_t i = 1; i < MOE_COUNT(list); i++)
        CHECK(sample_key(list[i - 1]) < sample_key(list[i]), "%g, %g", (double)list[i - 1],
              (double)list[i]);
    CHECK(sample_key(-0.0f) == sample_key(0.0f), "zeros differ");
}

static moe_token pick_one(const moe_sampler_options *o, const float *logits, uint32_t n)
{
    moe_token token = -1;
    moe_sampler *s = sampler_for(n, o);
    moe_status status = moe_sampler_pick(s, logits, &token);
    CHECK(status == MOE_OK || token == -1, "a failed pick wrote a token");
    moe_sampler_free(s);
    return token;
}

static void greedy_takes_the_first_best(void)
{
    moe_sampler_options o = defaults();
    CHECK(pick_one(&o, (float[]){1, 3, 3, 2}, 4) == 1, "tie");
    CHECK(pick_one(&o, (float[]){NAN, 3, NAN, 4}, 4) == 3, "NaN");
    CHECK(pick_one(&o, (float[]){NAN, -3, -INFINITY}, 3) == 1, "negative");
    CHECK(pick_one(&o, (float[]){-0.0f, 0.0f}, 2) == 0, "zeros");
    CHECK(pick_one(&o, (float[]){1, INFINITY, 2}, 3) == 1, "infinity");
    CHECK(pick_one(&o, (float[]){5}, 1) == 0, "one token");
    o.temperature = 1;
    o.top_k = 1;
    for (o.seed = 0; o.seed < 20; o.seed++)
        CHECK(pick_one(&o, (float[]){1, 3, 3, 2}, 4) == 1, "top_k = 1");
    o.top_k = 0;
    o.top_p = 1e-9f;
    for (o.seed = 0; o.seed < 20; o.seed++)
        CHECK(pick_one(&o, (float[]){1, 3, 3, 2}, 4) == 1, "tiny top_p");
    o.top_p = 1;
    o.temperature = 1e-40f;
    for (o.seed = 0; o.seed < 20; o.seed++)
        CHECK(pick_one(&o, (float[]){1, 3, 2.9999f, 2}, 4) == 1, "tiny temperature");
}

static void no_finite_logit_is_an_error(void)
{
    const float nothing[][3] = {{NAN, NAN, NAN}, {-INFINITY, -INFINITY, NAN},
                                {INFINITY, -INFINITY, NAN}, {INFINITY, INFINITY, INFINITY}};
    const float logits[3] = {1, 1.5f, 0.5f};
    moe_sampler_options o = defaults();
    for (int t = 0; t < 2; t++, o.temperature = 1) {
        for (size_t i = 0; i < MOE_COUNT(nothing); i++) {
            moe_sampler *a = sampler_for(3, &o), *b = sampler_for(3, &o);
            moe_token x = -7, y = -7;
            CHECK(moe_sampler_pick(a, nothing[i], &x) == MOE_ERR_ARGUMENT, "case %zu", i);
            CHECK(x == -7, "token written");
            for (int step = 0; step < 20; step++) { // the failure left no trace
                moe_sampler_pick(a, logits, &x);
                moe_sampler_pick(b, logits, &y);
                CHECK(x == y, "%d, expected %d", x, y);
            }
            moe_sampler_free(a);
            moe_sampler_free(b);
        }
    }
    moe_logit_bias forbid[3] = {{0, -INFINITY}, {1, -INFINITY}, {2, -INFINITY}};
    o.logit_bias = forbid;
    o.n_logit_bias = 3;
    CHECK(pick_one(&o, logits, 3) == -1, "all are forbidden");
    forbid[2].token = 0;
    for (o.seed = 0; o.seed < 20; o.seed++)
        CHECK(pick_one(&o, logits, 3) == 2, "only token 2 is allowed");
}

static void extreme_numbers_stay_numbers(void)
{
    const float huge = 3.4028235e38f;
    const float logits[4] = {huge, -huge, 0, huge};
    moe_sampler_options o = defaults();
    moe_logit_bias bias[2] = {{0, huge}, {1, -huge}};
    o.logit_bias = bias;
    o.n_logit_bias = 2;
    o.frequency_penalty = -huge;
    o.presence_penalty = -huge;
    o.repetition_penalty = 1e-45f;
    o.temperature = huge;
    moe_sampler *s = sampler_for(4, &o);
    uint32_t seen[4] = {0};
    for (int i = 0; i < 400; i++) {
        moe_token token = -1;
        CHECK(moe_sampler_pick(s, logits, &token) == MOE_OK, "pick failed");
        CHECK(token >= 0 && token < 4, "token %d", token);
        if (token >= 0 && token < 4)
            seen[token]++;
    }
    for (int i = 0; i < 4; i++) // a span of 2 huge at this temperature is a factor of e^2
        CHECK(seen[i] > 10, "token %d: %u times", i, seen[i]);
    moe_sampler_free(s);
}

/* Pearson's test; 20.5 and 24.3 are the 0.999 quantiles for 5 and 7 degrees of freedom. The seed is
 * fixed, so this passes or fails for good. */
static void frequencies_follow_probabilities(void)
{
    const float logits[8] = {0.5f, -1, 2, 1.75f, 0, -3, 1, 0.25f};
    enum { N = 200000 };
    for (int filtered = 0; filtered < 2; filtered++) {
        moe_sampler_options o = defaults();
        o.temperature = 0.8f;
        o.seed = 12345;
        o.top_k = filtered ? 6 : 0;
        moe_sampler *s = sampler_for(8, &o);
        static ref_result ref;
        ref_narrow(&ref, &o, logits, 8, NULL, 0);
        uint32_t seen[8] = {0};
        for (int i = 0; i < N; i++) {
            moe_token token = 0;
            moe_sampler_pick(s, logits, &token);
            seen[token]++;
        }
        double sum = 0, chi2 = 0;
        for (uint32_t i = 0; i < ref.n_max; i++)
            sum += ref.item[i].p;
        for (uint32_t i = 0; i < ref.n_max; i++) {
            double expected = N * ref.item[i].p / sum, d = seen[ref.item[i].id] - expected;
            chi2 += d * d / expected;
            seen[ref.item[i].id] = 0;
        }
        CHECK(chi2 < (filtered ? 20.5 : 24.3), "chi-square %g", chi2);
        for (int i = 0; i < 8; i++)
            CHECK(seen[i] == 0, "token %d was drawn but is not a candidate", i);
        moe_sampler_free(s);
    }
}

/* 1000 tokens, logits from integers alone. */
static void sequence_logits(float *logits, uint32_t n, uint32_t step)
{
    uint32_t x = 2463534242u + step;
    for (uint32_t i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        logits[i] = (float)(int32_t)(x >> 8) * 0x1p-20f - 8;
    }
}

static moe_sampler_options sequence_options(void)
{
    moe_sampler_options o = defaults();
    o.temperature = 0.9f;
    o.top_k = 200;
    o.top_p = 0.95f;
    o.min_p = 0.001f;
    o.repetition_penalty = 1.1f;
    o.frequency_penalty = 0.3f;
    o.presence_penalty = 0.1f;
    o.seed = 42;
    return o;
}

static void seed_fixes_the_tokens(void)
{
    static const moe_token expected[24] = {
        693, 140, 312, 361, 21, 876, 240, 793, 438, 663, 268, 528,
        622, 638, 727, 260, 127, 545, 103, 720, 942, 39, 566, 579,
    };
    static float logits[1000];
    moe_sampler_options o = sequence_options();
    moe_sampler *s = sampler_for(1000, &o);
    for (int again = 0; again < 2; again++) {
        for (uint32_t i = 0; i < 24; i++) {
            moe_token token = -1;
            sequence_logits(logits, 1000, i / 4);
            CHECK(moe_sampler_pick(s, logits, &token) == MOE_OK, "pick failed");
            CHECK(token == expected[i], "token %u is %d, expected %d", i, token, expected[i]);
        }
        moe_sampler_reset(s);
    }
    moe_sampler_free(s);

    o.seed = 43;
    s = sampler_for(1000, &o);
    uint32_t same = 0;
    for (uint32_t i = 0; i < 24; i++) {
        moe_token token = -1;
        sequence_logits(logits, 1000, i / 4);
        moe_sampler_pick(s, logits, &token);
        same += token == expected[i];
    }
    CHECK(same < 12, "another seed gave %u of 24 tokens the same", same);
    moe_sampler_free(s);
}

static void history_is_a_window(void)
{
    const float logits[4] = {4, 3, 2, 1};
    moe_sampler_options o = defaults();
    o.presence_penalty = 10;
    o.penalty_window = 3;
    moe_sampler *s = sampler_for(4, &o);
    moe_token token = -1;
    for (uint32_t i = 0; i < 12; i++) { // three are penalized, so the fourth wins, in turn
        moe_sampler_pick(s, logits, &token);
        CHECK(token == (moe_token)(i % 4), "step %u: %d", i, token);
    }
    moe_sampler_accept(s, 4); // ids that do not exist are not remembered
    moe_sampler_accept(s, -1);
    moe_sampler_accept(NULL, 0);
    moe_sampler_pick(s, logits, &token);
    CHECK(token == 0, "%d", token);
    moe_sampler_reset(s);
    moe_sampler_reset(NULL);
    moe_sampler_accept(s, 0);
    moe_sampler_pick(s, logits, &token);
    CHECK(token == 1, "%d", token);
    moe_sampler_free(s);

    o.penalty_window = 0;
    s = sampler_for(4, &o);
    for (uint32_t i = 0; i < 3; i++) {
        moe_sampler_pick(s, logits, &token);
        CHECK(token == 0, "window 0 is off: %d", token);
    }
    moe_sampler_free(s);
    moe_sampler_free(NULL);
}

/* ---------------------------------------------------------------------------- bad arguments -- */

static void refused_sampler(const moe_sampler_options *o, uint32_t n_vocab, const char *subject)
{
    moe_sampler *s = (moe_sampler *)&s;
    moe_error error = {0};
    moe_status status = moe_sampler_new(&s, n_vocab, o, NULL, &error);
    CHECK(status == MOE_ERR_ARGUMENT || status == MOE_ERR_LIMIT, "%s: %s", subject,
          moe_status_name(status));
    CHECK(error.status == status && !strcmp(error.subject, subject), "subject \"%s\" of \"%s\"",
          error.subject, error.message);
    CHECK(strstr(error.message, "expected") && strstr(error.message, "got"), "%s", error.message);
    CHECK(s == NULL, "%s: *out was not cleared", subject);
    if (status == MOE_OK)
        moe_sampler_free(s);
}

static void bad_options_are_named(void)
{
    static const struct {
        const char *name;
        size_t offset;
        float bad[6];
    } fields[] = {
        {"temperature", offsetof(moe_sampler_options, temperature),
         {NAN, -1, -1e-30f, INFINITY, -INFINITY, NAN}},
        {"top_p", offsetof(moe_sampler_options, top_p), {NAN, 0, -0.5f, 1.0001f, INFINITY, 2}},
        {"min_p", offsetof(moe_sampler_options, min_p), {NAN, 1, -0.1f, 1.5f, INFINITY, -1}},
        {"repetition_penalty", offsetof(moe_sampler_options, repetition_penalty),
         {NAN, 0, -1, INFINITY, -INFINITY, -0.0f}},
        {"frequency_penalty", offsetof(moe_sampler_options, frequency_penalty),
         {NAN, INFINITY, -INFINITY, NAN, NAN, NAN}},
        {"presence_penalty", offsetof(moe_sampler_options, presence_penalty),
         {NAN, INFINITY, -INFINITY, NAN, NAN, NAN}},
    };
    for (size_t f = 0; f < MOE_COUNT(fields); f++)
        for (size_t i = 0; i < 6; i++) {
            moe_sampler_options o = defaults();
            memcpy((char *)&o + fields[f].offset, &fields[f].bad[i], sizeof(float));
            refused_sampler(&o, 10, fields[f].name);
        }
    moe_sampler_options o = defaults();
    refused_sampler(&o, 0, "n_vocab");
    refused_sampler(&o, UINT32_MAX, "n_vocab");
    o.penalty_window = UINT32_MAX;
    refused_sampler(&o, 10, "penalty_window");
    o = defaults();
    o.size = 0;
    refused_sampler(&o, 10, "size");

    const moe_logit_bias bad[] = {{-1, 1}, {10, 1}, {INT32_MAX, 1}, {3, NAN}, {3, INFINITY}};
    for (size_t i = 0; i < MOE_COUNT(bad); i++) {
        o = defaults();
        o.logit_bias = &bad[i];
        o.n_logit_bias = 1;
        refused_sampler(&o, 10, "logit_bias");
    }
    o.logit_bias = NULL;
    refused_sampler(&o, 10, "logit_bias");
    o.logit_bias = bad;
    o.n_logit_bias = SIZE_MAX / 2;
    refused_sampler(&o, 10, "n_logit_bias");
    CHECK(moe_sampler_new(NULL, 10, &o, NULL, NULL) == MOE_ERR_ARGUMENT, "out NULL");
}

static void null_arguments_are_refused(void)
{
    moe_sampler_options o = defaults();
    moe_sampler *s = sampler_for(2, &o);
    float logits[2] = {1, 2};
    moe_token token = -1;
    CHECK(moe_sampler_pick(NULL, logits, &token) == MOE_ERR_ARGUMENT, "sampler NULL");
    CHECK(moe_sampler_pick(s, NULL, &token) == MOE_ERR_ARGUMENT, "logits NULL");
    CHECK(moe_sampler_pick(s, logits, NULL) == MOE_ERR_ARGUMENT, "token NULL");
    CHECK(token == -1, "token written");
    moe_sampler_free(s);
}

/* An older program passes fewer fields, a newer one more: the first gets defaults, the rest of the
 * second is not looked at. */
static void option_sizes_are_versions(void)
{
    struct {
        moe_sampler_options o;
        char rest[32];
    } newer;
    memset(&newer, 0xff, sizeof newer);
    newer.o = defaults();
    newer.o.size = sizeof newer;
    CHECK(pick_one(&newer.o, (float[]){1, 2}, 2) == 1, "newer");

    moe_sampler_options older;
    memset(&older, 0xff, sizeof older); // NaN in every field that must not be read
    older.logit_bias = NULL;
    older.n_logit_bias = 0;
    older.size = offsetof(moe_sampler_options, penalty_window);
    CHECK(pick_one(&older, (float[]){1, 2}, 2) == 1, "older");
    older.size = sizeof older;
    refused_sampler(&older, 2, "penalty_window");
    CHECK(pick_one(NULL, (float[]){1, 2, 2}, 3) == 1, "no options are the defaults");
}

/* ------------------------------------------------------------------------------------ memory -- */

typedef struct counting_host {
    uint64_t calls, fail_at; // the number of the call that fails; 0: none
    uint64_t used;
} counting_host;

static void *counting_alloc(void *user, size_t bytes, size_t align)
{
    counting_host *h = user;
    void *p = NULL;
    if (++h->calls == h->fail_at || posix_memalign(&p, align, bytes))
        return NULL;
    h->used += bytes;
    return p;
}

static void counting_free(void *user, void *ptr, size_t bytes, size_t align)
{
    (void)align;
    ((counting_host *)user)->used -= bytes;
    free(ptr);
}

static void memory_is_the_hosts(void)
{
    counting_host count = {0};
    moe_host host;
    moe_host_init(&host);
    host.user = &count;
    host.alloc = counting_alloc;
    host.free = counting_free;
    static float logits[1000];
    moe_logit_bias bias = {3, 1};
    moe_sampler_options o = sequence_options();
    o.logit_bias = &bias;
    o.n_logit_bias = 1;
    moe_sampler *s = NULL;
    moe_error error = {0};
    REQUIRE(moe_sampler_new(&s, 1000, &o, &host, &error) == MOE_OK, "%s", error.message);
    uint64_t n_calls = count.calls;
    bias.token = -5; // it was copied
    for (uint32_t i = 0; i < 200; i++) {
        moe_token token;
        sequence_logits(logits, 1000, i);
        CHECK(moe_sampler_pick(s, logits, &token) == MOE_OK, "pick failed");
    }
    CHECK(count.calls == n_calls, "%llu allocations while picking",
          (unsigned long long)(count.calls - n_calls));
    moe_sampler_free(s);
    CHECK(count.used == 0, "%llu bytes leaked", (unsigned long long)count.used);

    bias.token = 3;
    for (uint64_t i = 1; i <= n_calls; i++) {
        count = (counting_host){.fail_at = i};
        s = (moe_sampler *)&host;
        moe_status status = moe_sampler_new(&s, 1000, &o, &host, &error);
        CHECK(status == MOE_ERR_MEMORY && s == NULL, "failure %llu of %llu: %s",
              (unsigned long long)i, (unsigned long long)n_calls, moe_status_name(status));
        CHECK(count.used == 0, "%llu bytes leaked", (unsigned long long)count.used);
    }
    host.free = NULL;
    CHECK(moe_sampler_new(&s, 1000, &o, &host, &error) == MOE_ERR_ARGUMENT, "alloc without free");
}

TEST_PROGRAM(sample)
{
    RUN(weights_are_powers);
    RUN(all_floats_keep_their_order);
    RUN(random_options_equal_reference);
    RUN(greedy_takes_the_first_best);
    RUN(no_finite_logit_is_an_error);
    RUN(extreme_numbers_stay_numbers);
    RUN(frequencies_follow_probabilities);
    RUN(seed_fixes_the_tokens);
    RUN(history_is_a_window);
    RUN(bad_options_are_named);
    RUN(null_arguments_are_refused);
    RUN(option_sizes_are_versions);
    RUN(memory_is_the_hosts);
}
