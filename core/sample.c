/* core/sample.c - from logits to a token.
 *
 * Owns: the samplers (options, history of tokens, random numbers, work arrays). Logits flow in, one
 * token id flows out. Must never: allocate while picking, sort the vocabulary, or let a rounding
 * error of the machine decide.
 *
 * How it stays the same everywhere: after temperature each candidate gets an integer weight, 2^38
 * times its probability relative to the best one, from a polynomial in integers. From then on every
 * decision (top-p, min-p, the draw) adds and compares integers, which are exact in any order. The
 * few float operations before that are single IEEE operations or explicit fused ones.
 *
 * How it stays fast: top-k and top-p are the same question, "the shortest run of best candidates
 * whose mass reaches a number", with a mass of 1 or of the weight. keep_best() answers it in linear
 * time by radix selection, for any logits. */
#include "base.h"

enum {
    SAMPLE_MAX = 1 << 24,    // cap of the vocabulary and of the window: sums of weights fit 63 bits
    SAMPLE_WEIGHT_BITS = 38, // the best candidate weighs 2^38
    SAMPLE_BINS = 2048
};

#define SAMPLE_HUGE 0x1.fffffep127f

/* Marks a token as done while the history is walked; counts stay below it. */
#define SAMPLE_SEEN 0x80000000u

typedef struct moe_candidate {
    moe_token id;
    uint32_t key;    // orders as the logit does
    uint64_t weight; // 0..2^38
} moe_candidate;

struct moe_sampler {
    moe_host host;
    moe_sampler_options options;
    moe_logit_bias *bias; // [options.n_logit_bias]
    uint32_t n_vocab;

    uint64_t random;      // state of the generator
    moe_token *history;   // [penalty_window], a ring; NULL if no penalty is on
    uint32_t *count;      // [n_vocab], how often each token is in the ring
    uint32_t n_history, history_next;

    float *logits;        // [n_vocab], biased and penalized
    moe_candidate *candidates; // [n_vocab], by rising id; n_candidates are used
    uint32_t n_candidates;
    uint64_t bins[SAMPLE_BINS];
};

/* -------------------------------------------------------------------------------- options -- */

/* False for NaN and infinities, too. */
static bool sample_in_range(float x, float min, float max)
{
    return x >= min && x <= max;
}

static moe_status sample_check_bias(const moe_sampler_options *o, uint32_t n_vocab,
                                    moe_error *error)
{
    if (o->n_logit_bias && !o->logit_bias)
        return fail(error, MOE_ERR_ARGUMENT, "logit_bias",
                    "expected n_logit_bias = %zu entries, got NULL", o->n_logit_bias);
    if (o->n_logit_bias > SAMPLE_MAX)
        return fail(error, MOE_ERR_LIMIT, "n_logit_bias", "expected at most %d, got %zu",
                    SAMPLE_MAX, o->n_logit_bias);
    for (size_t i = 0; i < o->n_logit_bias; i++) {
        const moe_logit_bias *b = &o->logit_bias[i];
        if (b->token < 0 || (uint32_t)b->token >= n_vocab)
            return fail(error, MOE_ERR_ARGUMENT, "logit_bias",
                        "expected a token id below %u, got %d in entry %zu", n_vocab, b->token, i);
        if (!(b->bias <= SAMPLE_HUGE))
            return fail(error, MOE_ERR_ARGUMENT, "logit_bias",
                        "expected a finite number or -infinity, got %g in entry %zu",
                        (double)b->bias, i);
    }
    return MOE_OK;
}

static moe_status sample_check(const moe_sampler_options *o, uint32_t n_vocab, moe_error *error)
{
    const float huge = SAMPLE_HUGE, tiny = 1e-45f, below_1 = 0x1.fffffep-1f;
    const struct {
        const char *name, *expected;
        float value, min, max;
    } rules[] = {
        {"repetition_penalty", "a finite number > 0", o->repetition_penalty, tiny, huge},
        {"frequency_penalty", "a finite number", o->frequency_penalty, -huge, huge},
        {"presence_penalty", "a finite number", o->presence_penalty, -huge, huge},
        {"temperature", "a finite number >= 0", o->temperature, 0, huge},
        {"top_p", "0 < top_p <= 1", o->top_p, tiny, 1},
        {"min_p", "0 <= min_p < 1", o->min_p, 0, below_1},
    };
    if (n_vocab < 1)
        return fail(error, MOE_ERR_ARGUMENT, "n_vocab", "expected at least 1, got 0");
    if (n_vocab > SAMPLE_MAX)
        return fail(error, MOE_ERR_LIMIT, "n_vocab", "expected at most %d, got %u", SAMPLE_MAX,
                    n_vocab);
    if (o->penalty_window > SAMPLE_MAX)
        return fail(error, MOE_ERR_LIMIT, "penalty_window", "expected at most %d, got %u",
                    SAMPLE_MAX, o->penalty_window);
    for (size_t i = 0; i < MOE_COUNT(rules); i++)
        if (!sample_in_range(rules[i].value, rules[i].min, rules[i].max))
            return fail(error, MOE_ERR_ARGUMENT, rules[i].name, "expected %s, got %g",
                        rules[i].expected, (double)rules[i].value);
    return sample_check_bias(o, n_vocab, error);
}

/* --------------------------------------------------------------------------------- weights -- */

/* 2^38 * 2^-x for x = octaves / 2^31, with a relative error below 2^-28 until the weight has fewer
 * bits than that; falls monotonically and is 0 from x = 39 on.
 * With x = i + 1 - g, 0 < g <= 1, it is p(g) >> i, where p(g) / 2^38 is a minimax polynomial of
 * degree 6 for 2^(g-1), scaled by 2^31 so that each product fits 64 bits. p(1) is exactly
 * 2 * p(0), so the pieces meet. */
static uint64_t sample_weight(uint64_t octaves)
{
    uint64_t i = octaves >> 31;
    uint64_t g = (1u << 31) - (octaves & 0x7fffffff);
    if (i > SAMPLE_WEIGHT_BITS)
        return 0;
    uint64_t p = 466326;
    p = 2671658 + (p * g >> 31);
    p = 20783484 + (p * g >> 31);
    p = 119151310 + (p * g >> 31);
    p = 515888952 + (p * g >> 31);
    p = 1488521918 + (p * g >> 31);
    p = 2147483648 + (p * g >> 31);
    return p << (SAMPLE_WEIGHT_BITS - 32) >> i;
}

/* Gives each candidate its weight and returns their sum. `best` is the highest logit. */
static uint64_t sample_weigh(moe_sampler *s, float best)
{
    /* A quotient this small or large stays finite as a double; a distance of 39 octaves or more
     * weighs nothing. */
    const double octaves_per_logit = 1.4426950408889634 * 0x1p31 / (double)s->options.temperature;
    const double end = (SAMPLE_WEIGHT_BITS + 1) * 0x1p31;
    uint64_t sum = 0;
    for (uint32_t i = 0; i < s->n_candidates; i++) {
        moe_candidate *c = &s->candidates[i];
        double distance = (double)best - (double)s->logits[c->id];
        double octaves = distance * octaves_per_logit;
        c->weight = octaves < end ? sample_weight((uint64_t)octaves) : 0;
        sum += c->weight;
    }
    return sum;
}

/* -------------------------------------------------------------------------------- choosing -- */

/* Unsigned integers in the order of the floats; -0 and 0 are the same. */
static uint32_t sample_key(float x)
{
    uint32_t u;
    x += 0.0f; // -0 becomes 0
    memcpy(&u, &x, 4);
    return u ^ (0x80000000u | (0u - (u >> 31)));
}

/* Drops all but the best candidates: the shortest run, by falling logit and then rising id, whose
 * mass is at least `need`. The mass is the weight or, if !by_weight, 1 for each. 1 <= need <= the
 * mass of all. */
static void keep_best(moe_sampler *s, uint64_t need, bool by_weight)
{
    static const struct {
        uint8_t shift, bits;
    } digits[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t last = 0, known = 0; // the last key that is kept, and which of its bits are known
    for (size_t d = 0; d < MOE_COUNT(digits); d++) {
        uint32_t digit_mask = (1u << digits[d].bits) - 1;
        memset(s->bins, 0, sizeof s->bins);
        for (uint32_t i = 0; i < s->n_candidates; i++) {
            const moe_candidate *c = &s->candidates[i];
            if ((c->key & known) == last)
                s->bins[c->key >> digits[d].shift & digit_mask] += by_weight ? c->weight : 1;
        }
        uint32_t bin = digit_mask;
        while (s->bins[bin] < need)
            need -= s->bins[bin--];
        last |= bin << digits[d].shift;
        known |= digit_mask << digits[d].shift;
    }
    uint32_t n = 0; // `need` is now the mass wanted of those whose key is `last`
    for (uint32_t i = 0; i < s->n_candidates; i++) {
        moe_candidate c = s->candidates[i];
        if (c.key < last || (c.key == last && need == 0))
            continue;
        if (c.key == last)
            need -= MOE_MIN(need, by_weight ? c.weight : 1);
        s->candidates[n++] = c;
    }
    s->n_candidates = n;
}

static uint64_t sample_keep_top_p(moe_sampler *s, uint64_t sum)
{
    double wanted = (double)s->options.top_p * (double)sum;
    uint64_t need = (uint64_t)wanted;
    if ((double)need < wanted || need == 0)
        need++;
    keep_best(s, need, true);
    sum = 0;
    for (uint32_t i = 0; i < s->n_candidates; i++)
        sum += s->candidates[i].weight;
    return sum;
}

static uint64_t sample_keep_min_p(moe_sampler *s)
{
    double least = (double)s->options.min_p * (double)(1ull << SAMPLE_WEIGHT_BITS);
    uint64_t sum = 0;
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->n_candidates; i++) {
        moe_candidate c = s->candidates[i];
        if ((double)c.weight < least)
            continue;
        sum += c.weight;
        s->candidates[n++] = c;
    }
    s->n_candidates = n;
    return sum;
}

/* --------------------------------------------------------------------------------- logits -- */

/* NaN becomes -infinity, which forbids a token; infinity the largest float, so that distances from
 * the best logit are finite. */
static float sample_tame(float x)
{
    return x > SAMPLE_HUGE ? SAMPLE_HUGE : x >= -SAMPLE_HUGE ? x : -INFINITY;
}

/* The result of arithmetic on finite numbers: overflow stops at the largest float. */
static float sample_clamp(float x)
{
    return MOE_MAX(MOE_MIN(x, SAMPLE_HUGE), -SAMPLE_HUGE);
}

/* The penalties of Keskar et al. 2019, arXiv:1909.05858 (repetition), and of the common completion
 * APIs (frequency, presence). Each is one IEEE operation: no compiler can fuse two of them. */
static float sample_penalized(const moe_sampler_options *o, float x, uint32_t count)
{
    x = sample_clamp(x > 0 ? x / o->repetition_penalty : x * o->repetition_penalty);
    x = sample_clamp(fmaf(-o->frequency_penalty, (float)count, x));
    return sample_clamp(x - o->presence_penalty);
}

static void sample_penalize(moe_sampler *s)
{
    for (uint32_t i = 0; i < s->n_history; i++) {
        moe_token t = s->history[i];
        if (s->count[t] & SAMPLE_SEEN)
            continue;
        if (s->logits[t] > -INFINITY)
            s->logits[t] = sample_penalized(&s->options, s->logits[t], s->count[t]);
        s->count[t] |= SAMPLE_SEEN;
    }
    for (uint32_t i = 0; i < s->n_history; i++)
        s->count[s->history[i]] &= ~SAMPLE_SEEN;
}

/* Fills s->logits and returns the best token, the first of equal ones; -1 if no logit is finite. */
static moe_token sample_adjust(moe_sampler *s, const float *logits)
{
    const uint32_t n_vocab = s->n_vocab;
    float *adjusted = s->logits, best = -INFINITY;
    moe_token best_id = -1;
    bool any_finite = false;
    for (uint32_t i = 0; i < n_vocab; i++)
        adjusted[i] = sample_tame(logits[i]);
    for (size_t i = 0; i < s->options.n_logit_bias; i++) {
        float *x = &adjusted[s->bias[i].token], bias = s->bias[i].bias;
        *x = *x > -INFINITY && bias > -INFINITY ? sample_clamp(*x + bias) : -INFINITY;
    }
    sample_penalize(s);
    for (uint32_t i = 0; i < n_vocab; i++) {
        any_finite |= adjusted[i] > -INFINITY && logits[i] <= SAMPLE_HUGE;
        if (adjusted[i] > best) {
            best = adjusted[i];
            best_id = (moe_token)i;
        }
    }
    return any_finite ? best_id : -1;
}

/* Makes each token that is not forbidden a candidate. */
static void sample_collect(moe_sampler *s)
{
    const float *logits = s->logits;
    moe_candidate *candidates = s->candidates;
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        candidates[n] = (moe_candidate){(moe_token)i, sample_key(logits[i]), 0};
        n += logits[i] > -INFINITY;
    }
    s->n_candidates = n;
}

/* Leaves the candidates that may be drawn, with their weights, and returns the sum of those; 0 if
 * no logit is finite. */
static uint64_t sample_narrow(moe_sampler *s, const float *logits)
{
    const moe_sampler_options *o = &s->options;
    moe_token best = sample_adjust(s, logits);
    if (best < 0)
        return 0;
    if (o->temperature == 0 || o->top_k == 1) {
        s->candidates[0] = (moe_candidate){best, 0, 1};
        s->n_candidates = 1;
        return 1;
    }
    sample_collect(s);
    if (o->top_k && o->top_k < s->n_candidates)
        keep_best(s, o->top_k, false);
    uint64_t sum = sample_weigh(s, s->logits[best]);
    if (o->top_p < 1)
        sum = sample_keep_top_p(s, sum);
    if (o->min_p > 0)
        sum = sample_keep_min_p(s);
    return sum;
}

/* -------------------------------------------------------------------------------- drawing -- */

/* SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators". */
static uint64_t sample_random(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* The upper half of the product: a random x becomes a number below n, each value with its fair
 * share up to one in 2^64. */
static uint64_t sample_scale(uint64_t x, uint64_t n)
{
    uint64_t x_lo = x & 0xffffffff, x_hi = x >> 32, n_lo = n & 0xffffffff, n_hi = n >> 32;
    uint64_t middle = x_hi * n_lo + (x_lo * n_lo >> 32);
    return x_hi * n_hi + (middle >> 32) + ((x_lo * n_hi + (middle & 0xffffffff)) >> 32);
}

static moe_token sample_draw(moe_sampler *s, uint64_t sum)
{
    uint64_t ticket = sample_scale(sample_random(&s->random), sum);
    uint32_t i = 0;
    while (ticket >= s->candidates[i].weight)
        ticket -= s->candidates[i++].weight;
    return s->candidates[i].id;
}

/* --------------------------------------------------------------------------- entry points -- */

/* All that the options ask for; false if there is no memory for it. */
static bool sample_make_room(moe_sampler *s, moe_mem *mem)
{
    const moe_sampler_options *o = &s->options;
    const bool penalize = o->penalty_window &&
                          (o->repetition_penalty != 1 || o->frequency_penalty != 0 ||
                           o->presence_penalty != 0);
    s->bias = mem_alloc(mem, o->n_logit_bias, sizeof *s->bias);
    s->logits = mem_alloc(mem, s->n_vocab, sizeof *s->logits);
    s->candidates = mem_alloc(mem, s->n_vocab, sizeof *s->candidates);
    s->history = penalize ? mem_alloc(mem, o->penalty_window, sizeof *s->history) : NULL;
    s->count = penalize ? mem_alloc(mem, s->n_vocab, sizeof *s->count) : NULL;
    return s->bias && s->logits && s->candidates && (!penalize || (s->history && s->count));
}

MOE_API moe_status moe_sampler_new(moe_sampler **out, uint32_t n_vocab,
                                   const moe_sampler_options *options, const moe_host *host,
                                   moe_error *error)
{
    if (!out)
        return fail(error, MOE_ERR_ARGUMENT, "out", "expected a place for the sampler, got NULL");
    *out = NULL;
    if (options && options->size < sizeof options->size)
        return fail(error, MOE_ERR_ARGUMENT, "size",
                    "expected options filled by moe_sampler_options_init, got a size of %zu",
                    options->size);
    moe_sampler_options o;
    moe_sampler_options_init(&o);
    if (options)
        memcpy(&o, options, MOE_MIN(options->size, sizeof o));
    o.size = sizeof o;
    moe_status status = sample_check(&o, n_vocab, error);
    if (status)
        return status;

    moe_mem mem;
    mem_init(&mem, host, 0);
    if (!mem.host.alloc != !mem.host.free)
        return fail(error, MOE_ERR_ARGUMENT, "host", "expected both alloc and free, or neither");
    moe_sampler *s = mem_alloc(&mem, 1, sizeof *s);
    if (!s)
        return fail_memory(error, &mem, "sampler", sizeof *s);
    s->host = mem.host;
    s->options = o;
    s->n_vocab = n_vocab;
    if (!sample_make_room(s, &mem)) {
        moe_sampler_free(s);
        return fail_memory(error, &mem, "sampler", (uint64_t)n_vocab * sizeof *s->candidates);
    }
    if (o.n_logit_bias)
        memcpy(s->bias, o.logit_bias, o.n_logit_bias * sizeof *s->bias);
    s->options.logit_bias = s->bias;
    moe_sampler_reset(s);
    *out = s;
    return MOE_OK;
}

MOE_API void moe_sampler_free(moe_sampler *sampler)
{
    if (!sampler)
        return;
    moe_mem mem; // mem_free counts in it after the sampler is gone
    mem_init(&mem, &sampler->host, 0);
    mem_free(&mem, sampler->bias);
    mem_free(&mem, sampler->logits);
    mem_free(&mem, sampler->candidates);
    mem_free(&mem, sampler->history);
    mem_free(&mem, sampler->count);
    mem_free(&mem, sampler);
}

MOE_API moe_status moe_sampler_pick(moe_sampler *sampler, const float *logits, moe_token *token)
{
    if (!sampler || !logits || !token)
        return MOE_ERR_ARGUMENT;
    uint64_t sum = sample_narrow(sampler, logits);
    if (!sum)
        return MOE_ERR_ARGUMENT;
    *token = sample_draw(sampler, sum);
    moe_sampler_accept(sampler, *token);
    return MOE_OK;
}

MOE_API void moe_sampler_accept(moe_sampler *sampler, moe_token token)
{
    if (!sampler || !sampler->history || token < 0 || (uint32_t)token >= sampler->n_vocab)
        return;
    moe_token *place = &sampler->history[sampler->history_next];
    if (sampler->n_history == sampler->options.penalty_window)
        sampler->count[*place]--;
    else
        sampler->n_history++;
    *place = token;
    sampler->count[token]++;
    sampler->history_next = (sampler->history_next + 1) % sampler->options.penalty_window;
}

MOE_API void moe_sampler_reset(moe_sampler *sampler)
{
    if (!sampler)
        return;
    for (uint32_t i = 0; i < sampler->n_history; i++)
        sampler->count[sampler->history[i]] = 0;
    sampler->n_history = sampler->history_next = 0;
    sampler->random = sampler->options.seed;
}
