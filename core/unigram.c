/* core/unigram.c - the unigram model: the most probable way to cut a piece into tokens.
 *
 * Viterbi over byte positions: each position keeps the best score of a cut that ends there. Scores
 * are added as doubles and the first of equals stays, as in Hugging Face's implementation. */
#ifndef MOE_CORE_UNIGRAM_C
#define MOE_CORE_UNIGRAM_C

#include "special.c"

typedef struct unigram_node {
    double score;   // of the best way to here
    uint32_t start; // where its last token starts; UINT32_MAX: no way yet
    int32_t id;     // -1: an unknown character
} unigram_node;

static void unigram_offer(unigram_node *node, double score, uint32_t start, int32_t id)
{
    if (node->start != UINT32_MAX && score <= node->score)
        return;
    *node = (unigram_node){.score = score, .start = start, .id = id};
}

/* Offers every token that starts at `at`. */
static void unigram_step(const moe_tokenizer *tok, const uint8_t *p, uint32_t n, uint32_t at,
                         unigram_node *node)
{
    const tok_added_set *set = &tok->sorted;
    uint32_t low = set->first[p[at]], high = set->first[p[at] + 1];
    uint32_t one = (uint32_t)utf8_length(p[at]);
    bool has_one = false;
    for (uint32_t k = 1; low < high; k++) {
        for (; low < high && set->items[low].bytes == k; low++) {
            int32_t id = (int32_t)set->items[low].id;
            unigram_offer(&node[at + k], node[at].score + tok->tokens[id].score, at, id);
            has_one |= k == one;
        }
        if (at + k >= n)
            break;
        added_narrow(set, &low, &high, k, p[at + k]);
    }
    if (!has_one)
        unigram_offer(&node[at + one], node[at].score + tok->unknown_score, at, -1);
}

static void unigram_emit_unknown(tok_run *run, const uint8_t *p, size_t n)
{
    const moe_tokenizer *tok = run->tok;
    bool fallback = tok->byte_fallback;
    for (size_t i = 0; fallback && i < n; i++)
        fallback = tok->byte_token[p[i]] >= 0;
    for (size_t i = 0; fallback && i < n; i++)
        run_emit(run, tok->byte_token[p[i]]);
    if (!fallback && tok->unknown >= 0)
        run_emit(run, tok->unknown);
}

static moe_status unigram_encode(tok_run *run, const uint8_t *p, size_t bytes)
{
    if (bytes > UINT32_MAX / 64)
        return fail(run->error, MOE_ERR_LIMIT, "text",
                    "expected less than 64 MiB without a place to split, got %zu bytes", bytes);
    uint32_t n = (uint32_t)bytes;
    run->work.n = 0;
    if (!buf_reserve(&run->work, ((size_t)n + 1) * sizeof(unigram_node)))
        return run_fail(run, MOE_ERR_MEMORY);
    unigram_node *node = (unigram_node *)(void *)run->work.data;
    for (uint32_t i = 0; i <= n; i++)
        node[i].start = UINT32_MAX;
    node[0].score = 0;
    for (uint32_t i = 0; i < n; i += (uint32_t)utf8_length(p[i]))
        unigram_step(run->tok, p, n, i, node);
    run->word.n = 0; // where the tokens end, the last one first
    for (uint32_t end = n; end > 0; end = node[end].start)
        if (!buf_append(&run->word, &end, sizeof end))
            return run_fail(run, MOE_ERR_MEMORY);
    const uint32_t *ends = (const uint32_t *)(const void *)run->word.data;
    for (size_t k = run->word.n / sizeof *ends; k-- > 0;) {
        const unigram_node *last = &node[ends[k]];
        uint32_t start = last->start;
        if (last->id >= 0) {
            run_emit(run, last->id);
            continue;
        }
        while (k > 0 && node[ends[k - 1]].id < 0) // unknown characters in a row are one
            k--;
        unigram_emit_unknown(run, p + start, ends[k] - start);
    }
    return MOE_OK;
}

#endif
