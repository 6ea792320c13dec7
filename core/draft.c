/* core/draft.c - guesses which tokens come next, and decides how many of them to compute ahead.
 *
 * A session that drafts evaluates a token together with those that are guessed to follow it. One
 * pass over the weights then serves several tokens, if the guesses come true (Leviathan et al.
 * 2023, arXiv:2211.17192). Which logits a caller gets does not depend on anything here, only when
 * they are computed.
 *
 * Two sources of guesses: what followed the last tokens where they stood before (prompt lookup,
 * here), and the model's own layer for multi-token prediction (core/mtp.c). How often the guesses
 * of each kind come true, and how long evaluations of several tokens take, is measured all the
 * time; guesses are computed ahead only where that makes tokens come faster.
 *
 * Owns: those measurements. Must never: see a session, a model or a clock. */
#ifndef MOE_CORE_DRAFT_C
#define MOE_CORE_DRAFT_C

#include "base.h"

enum {
    DRAFT_MAX = 15,     // tokens computed ahead
    DRAFT_MATCH_MAX = 16,
    DRAFT_CLASSES = 8
};

typedef enum draft_source { DRAFT_BY_NGRAM, DRAFT_BY_MTP, DRAFT_N_SOURCES } draft_source;

/* Tokens that may follow. The grade tells how good they are: of prompt lookup, the number of tokens
 * that match; of multi-token prediction, the place in the chain. Each token's is one more. */
typedef struct draft_guess {
    uint32_t n, grade;
    moe_token tokens[DRAFT_MAX];
} draft_guess;

/* A share of guesses that come true, of the last ones more than of those long ago. */
typedef struct draft_share {
    float n, hits;
} draft_share;

/* The time of an evaluation, in units of that of a single token. */
typedef struct draft_time {
    float n, mean;
} draft_time;

typedef struct moe_drafter {
    bool adaptive;  // else every guess is computed ahead
    uint32_t n_max; // tokens computed ahead at most
    draft_share shares[DRAFT_N_SOURCES][DRAFT_CLASSES];
    draft_time times[DRAFT_N_SOURCES][DRAFT_MAX + 2]; // of [b] tokens at once
    double plain_s;      // the time of one token by itself
    uint32_t n_plain;    // how often that was measured, counted up to 8
    uint32_t n_since;    // evaluations since then
    double all_s;        // spent on evaluations
    double lost_s;       // of it, beyond what one token after the other takes; limited below
    moe_draft_stats stats;
} moe_drafter;

/* ------------------------------------------------------------------------- prompt lookup -- */

/* What followed the longest run of tokens at the end of history[0..n) where it stood before, the
 * latest place first. Where that reaches the end of the history it goes on with the guess: text
 * that repeats itself. Reading 4 bytes per token of context is little beside attention over it.
 * Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding. */
static void draft_lookup(const moe_token *history, uint32_t n, uint32_t n_max, draft_guess *guess)
{
    uint32_t best = 0, from = 0;
    *guess = (draft_guess){0};
    for (uint32_t end = n; end-- > 1 && best < DRAFT_MATCH_MAX;) {
        uint32_t length = 0;
        while (length < end && length < DRAFT_MATCH_MAX &&
               history[end - 1 - length] == history[n - 1 - length])
            length++;
        if (length > best) {
            best = length;
            from = end;
        }
    }
    if (!best)
        return;
    guess->grade = best;
    for (; guess->n < MOE_MIN(n_max, (uint32_t)DRAFT_MAX); guess->n++)
        guess->tokens[guess->n] = from + guess->n < n ? history[from + guess->n]
                                                      : guess->tokens[from + guess->n - n];
}

/* --------------------------------------------------------------------------- measurements -- */

static uint32_t draft_class(draft_source source, uint32_t grade)
{
    static const uint8_t by_match[DRAFT_MATCH_MAX + 1] = {0, 0, 1, 2, 3, 4, 4, 5, 5, 5, 5, 6, 6, 6,
                                                          6, 6, 7};
    return source == DRAFT_BY_NGRAM ? by_match[MOE_MIN(grade, (uint32_t)DRAFT_MATCH_MAX)]
                                    : MOE_MIN(grade, DRAFT_CLASSES - 1u);
}

/* The probability that a guess comes true: what is usual, until enough of them were seen. */
static double draft_probability(const moe_drafter *d, draft_source source, uint32_t grade)
{
    static const float usual[DRAFT_N_SOURCES][DRAFT_CLASSES] = {
        {0.15f, 0.3f, 0.45f, 0.55f, 0.65f, 0.75f, 0.85f, 0.9f},
        {0.7f, 0.65f, 0.6f, 0.55f, 0.5f, 0.5f, 0.5f, 0.5f}};
    const double weight = 4;
    const uint32_t c = draft_class(source, grade);
    const draft_share *s = &d->shares[source][c];
    return ((double)s->hits + weight * (double)usual[source][c]) / ((double)s->n + weight);
}

static void draft_learn(moe_drafter *d, draft_source source, uint32_t grade, bool hit)
{
    draft_share *s = &d->shares[source][draft_class(source, grade)];
    s->n = s->n * 0.98f + 1;
    s->hits = s->hits * 0.98f + (hit ? 1 : 0);
}

/* How long an evaluation of n_tok tokens takes: as measured, or between those measured next to it,
 * or as it usually is. */
static double draft_time_of(const moe_drafter *d, draft_source source, uint32_t n_tok)
{
    const double usual = source == DRAFT_BY_MTP ? 0.45 : 0.35; // per further token
    const draft_time *t = d->times[source];
    if (!d->adaptive)
        return 1 + usual * (n_tok - 1);
    uint32_t low = n_tok, high = n_tok;
    while (low > 1 && t[low].n < 0.5f)
        low--;
    if (low == n_tok)
        return n_tok > 1 ? (double)t[n_tok].mean : 1;
    while (high <= DRAFT_MAX + 1 && t[high].n < 0.5f)
        high++;
    const double at_low = low > 1 ? (double)t[low].mean : 1;
    double slope = low > 1 ? (at_low - 1) / (low - 1) : usual;
    if (high <= DRAFT_MAX + 1)
        slope = ((double)t[high].mean - at_low) / (high - low);
    return at_low + slope * (n_tok - low);
}

/* An evaluation of n_tok tokens, all but the first of them guessed, took that long. */
static void draft_record(moe_drafter *d, draft_source source, uint32_t n_tok, double seconds)
{
    d->all_s += seconds;
    if (n_tok > 1) {
        draft_time *t = &d->times[source][n_tok];
        d->stats.n_evaluations++;
        d->stats.n_drafted += n_tok - 1;
        d->n_since++;
        if (!d->n_plain) // nothing to compare it with
            return;
        t->n = MOE_MIN(t->n + 1, 8);
        t->mean += ((float)(seconds / d->plain_s) - t->mean) / t->n;
        d->lost_s += seconds - d->plain_s;
        d->stats.saved_s -= seconds - d->plain_s;
        return;
    }
    d->n_plain += d->n_plain < 8;
    d->plain_s += (seconds - d->plain_s) / d->n_plain;
    d->n_since = 0;
    /* What was measured long ago is forgotten, so that one bad measurement does not last. */
    for (uint32_t i = 0; i < DRAFT_N_SOURCES; i++)
        for (uint32_t b = 2; b <= DRAFT_MAX + 1; b++)
            d->times[i][b].n *= 0.99f;
}

/* A token that was computed ahead has come. */
static void draft_accept(moe_drafter *d)
{
    d->stats.n_accepted++;
    d->stats.saved_s += d->plain_s;
    d->lost_s -= d->plain_s;
    /* Old gains must not pay for new losses. */
    d->lost_s = MOE_MAX(d->lost_s, -8 * d->plain_s);
}

/* ------------------------------------------------------------------------------- decision -- */

/* How many of the tokens of a guess to compute ahead, so that tokens come fastest; 0 if none.
 * *gain: how many times as fast as one by one. Not adaptive: all that is found, or, where each
 * token has to be computed to be guessed, as many as pay, and one at least. */
static uint32_t draft_choose(const moe_drafter *d, draft_source source, uint32_t grade, uint32_t n,
                             double *gain)
{
    enum { REFRESH = 48 };
    double come = 1, expected = 1;
    uint32_t best = 0;
    *gain = d->adaptive ? 1.05 : 0; // less is not worth the risk
    n = MOE_MIN(n, d->n_max);
    if (!d->adaptive && source == DRAFT_BY_NGRAM)
        return n;
    /* The time of one token must be known, and not from long ago; and all losses together may not
     * be more than 1 % of the time. */
    if (d->adaptive && (d->n_plain < 2 || d->n_since >= REFRESH || d->lost_s > 0.01 * d->all_s))
        return 0;
    for (uint32_t k = 1; k <= n; k++) {
        come *= draft_probability(d, source, grade + k - 1);
        expected += come;
        const double faster = expected / draft_time_of(d, source, k + 1);
        if (faster > *gain) {
            *gain = faster;
            best = k;
        }
    }
    return best;
}

#endif
