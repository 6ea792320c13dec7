/* core/bpe.c - byte-pair encoding: of bytes, of characters with merges, of characters with scores.
 *
 * A piece of text flows in, tokens flow out. All three start from the smallest tokens and join the
 * best pair until none is left; best is the lowest rank (or the highest score), then the leftmost.
 * Short pieces scan for it; long ones keep a heap, so that a megabyte without a space is n log n.
 * Must never: keep anything in the tokenizer. */
#ifndef MOE_CORE_BPE_C
#define MOE_CORE_BPE_C

#include "tokenizer.h"

enum { BPE_SHORT = 40, BPE_NONE = -1 };

/* One part of the piece: a token, or with id -1 a character that is none. */
typedef struct bpe_symbol {
    int32_t id;
    uint32_t start, bytes; // in the piece
    uint32_t prev, next;   // long pieces only; UINT32_MAX: none
} bpe_symbol;

typedef struct bpe_pair {
    uint32_t rank, left;   // order of joining; index of the left symbol
    uint32_t bytes;        // of both: tells a pair whose parts have changed since
    int32_t id;            // what they become
} bpe_pair;

/* Finds what two neighbours become; false if they do not join. */
static bool bpe_join(const moe_tokenizer *tok, const uint8_t *piece, const bpe_symbol *a,
                     const bpe_symbol *b, uint32_t *rank, int32_t *id)
{
    if (tok->model == MODEL_SCORES) {
        // U+2581 and spaces are text here; a token of the vocabulary is what counts
        int32_t found = map_find(tok, piece + a->start, (size_t)a->bytes + b->bytes);
        if (found < 0 || !tok->tokens[found].model)
            return false;
        uint32_t bits;
        float score = (float)tok->tokens[found].score;
        memcpy(&bits, &score, sizeof bits);
        *rank = bits >> 31 ? bits : ~bits & 0x7FFFFFFF; // falls as the score rises
        if (tok->tokens[found].kind == TOK_USER) // their scores mean nothing: before all others
            *rank = 0;
        *id = found;
        return true;
    }
    if (a->id < 0 || b->id < 0)
        return false;
    uint64_t pair = (uint64_t)a->id << 32 | (uint32_t)b->id;
    for (uint32_t i = merge_first(tok, pair);; i = merge_next(tok, i)) {
        const bpe_merge *m = &tok->merges[i];
        if (m->pair == pair) {
            *rank = m->rank;
            *id = (int32_t)m->id;
            return true;
        }
        if (m->pair == UINT64_MAX)
            return false;
    }
}

/* Joins s[0..n) by scanning; returns the new count. n <= BPE_SHORT. */
static uint32_t bpe_merge_short(const moe_tokenizer *tok, const uint8_t *piece, bpe_symbol *s,
                                uint32_t n)
{
    uint32_t rank[BPE_SHORT];
    int32_t id[BPE_SHORT];
    for (uint32_t i = 0; i + 1 < n; i++)
        if (!bpe_join(tok, piece, &s[i], &s[i + 1], &rank[i], &id[i]))
            id[i] = BPE_NONE;
    for (;;) {
        uint32_t best = UINT32_MAX;
        for (uint32_t i = 0; i + 1 < n; i++)
            if (id[i] != BPE_NONE && (best == UINT32_MAX || rank[i] < rank[best]))
                best = i;
        if (best == UINT32_MAX)
            return n;
        s[best].id = id[best];
        s[best].bytes += s[best + 1].bytes;
        n--;
        for (uint32_t i = best + 1; i < n; i++) {
            s[i] = s[i + 1];
            rank[i] = rank[i + 1];
            id[i] = id[i + 1];
        }
        for (uint32_t i = best ? best - 1 : 0; i <= best && i + 1 < n; i++)
            if (!bpe_join(tok, piece, &s[i], &s[i + 1], &rank[i], &id[i]))
                id[i] = BPE_NONE;
    }
}

/* -- the heap: the smallest (rank, left) on top -- */

static bool bpe_before(const bpe_pair *a, const bpe_pair *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static void bpe_sift_down(bpe_pair *heap, size_t n, size_t i)
{
    bpe_pair x = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && bpe_before(&heap[child + 1], &heap[child]))
            child++;
        if (!bpe_before(&heap[child], &x))
            break;
        heap[i] = heap[child];
    }
    heap[i] = x;
}

static void bpe_sift_up(bpe_pair *heap, size_t i)
{
    bpe_pair x = heap[i];
    for (; i && bpe_before(&x, &heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = x;
}

typedef struct bpe_long {
    const moe_tokenizer *tok;
    const uint8_t *piece;
    bpe_symbol *s;
    bpe_pair *heap; // [2 n]: a merge takes one pair out and puts at most two in
    size_t n_heap;
} bpe_long;

static bool bpe_push(bpe_long *b, uint32_t left)
{
    uint32_t right = left == UINT32_MAX ? left : b->s[left].next;
    bpe_pair *pair = &b->heap[b->n_heap];
    if (right == UINT32_MAX ||
        !bpe_join(b->tok, b->piece, &b->s[left], &b->s[right], &pair->rank, &pair->id))
        return false;
    pair->left = left;
    pair->bytes = b->s[left].bytes + b->s[right].bytes;
    b->n_heap++;
    return true;
}

/* Joins s[0..n) with the heap; returns the new count. */
static uint32_t bpe_merge_long(bpe_long *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        b->s[i].prev = i ? i - 1 : UINT32_MAX;
        b->s[i].next = i + 1 < n ? i + 1 : UINT32_MAX;
    }
    for (uint32_t i = 0; i + 1 < n; i++)
        bpe_push(b, i);
    for (size_t i = b->n_heap / 2; i-- > 0;)
        bpe_sift_down(b->heap, b->n_heap, i);
    while (b->n_heap) {
        bpe_pair top = b->heap[0];
        b->heap[0] = b->heap[--b->n_heap];
        if (b->n_heap)
            bpe_sift_down(b->heap, b->n_heap, 0);
        bpe_symbol *left = &b->s[top.left];
        // A symbol that was joined to its left has no bytes. Symbols only grow: the same length is
        // the same text.
        if (!left->bytes || left->next == UINT32_MAX ||
            left->bytes + b->s[left->next].bytes != top.bytes)
            continue;
        bpe_symbol *right = &b->s[left->next];
        left->id = top.id;
        left->bytes = top.bytes;
        left->next = right->next;
        right->bytes = 0;
        if (left->next != UINT32_MAX)
            b->s[left->next].prev = top.left;
        if (bpe_push(b, left->prev))
            bpe_sift_up(b->heap, b->n_heap - 1);
        if (bpe_push(b, top.left))
            bpe_sift_up(b->heap, b->n_heap - 1);
    }
    uint32_t m = 0;
    for (uint32_t i = 0; i != UINT32_MAX && i < n; i = b->s[i].next)
        b->s[m++] = b->s[i];
    return m;
}

/* -- the symbols that a piece starts with -- */

/* The id of a character with the marks of its place in the word, for which run->word has room. */
static int32_t bpe_char_id(tok_run *run, const uint8_t *c, size_t bytes, bool first, bool last)
{
    const moe_tokenizer *tok = run->tok;
    const char *prefix = first ? "" : tok->prefix, *suffix = last ? tok->suffix : "";
    if (!*prefix && !*suffix) {
        int32_t id = map_find(tok, c, bytes);
        return id >= 0 && tok->tokens[id].model ? id : -1;
    }
    run->word.n = 0;
    buf_append(&run->word, prefix, strlen(prefix));
    buf_append(&run->word, c, bytes);
    buf_append(&run->word, suffix, strlen(suffix));
    return map_find(tok, run->word.data, run->word.n);
}

static uint32_t bpe_unknown(const moe_tokenizer *tok, bpe_symbol *s, uint32_t n, uint32_t start,
                            uint32_t bytes, bool *open)
{
    if (tok->unknown < 0)
        return n; // the character is lost, as elsewhere
    if (tok->fuse_unknown && *open) {
        s[n - 1].bytes += bytes;
        return n;
    }
    *open = true;
    s[n] = (bpe_symbol){.id = tok->unknown, .start = start, .bytes = bytes};
    return n + 1;
}

/* Fills s[0..bytes) with the characters of the piece; returns their number. */
static uint32_t bpe_start(tok_run *run, const uint8_t *piece, uint32_t bytes, bpe_symbol *s)
{
    const moe_tokenizer *tok = run->tok;
    uint32_t n = 0;
    bool open = false; // the last symbol is an unknown one
    for (uint32_t i = 0, length; i < bytes; i += length) {
        length = tok->byte_level ? 1 : (uint32_t)utf8_length(piece[i]);
        int32_t id = tok->byte_level && !*tok->prefix && !*tok->suffix
                         ? tok->byte_token[piece[i]]
                         : bpe_char_id(run, piece + i, length, i == 0, i + length == bytes);
        if (id < 0 && tok->model == MODEL_SCORES) {
            s[n++] = (bpe_symbol){.id = -1, .start = i, .bytes = length};
            continue;
        }
        if (id >= 0) {
            s[n++] = (bpe_symbol){.id = id, .start = i, .bytes = length};
            open = false;
            continue;
        }
        bool fallback = tok->byte_fallback;
        for (uint32_t k = 0; k < length; k++)
            fallback &= tok->byte_token[piece[i + k]] >= 0;
        for (uint32_t k = 0; fallback && k < length; k++)
            s[n++] = (bpe_symbol){.id = tok->byte_token[piece[i + k]], .start = i + k, .bytes = 1};
        if (fallback)
            open = false;
        else
            n = bpe_unknown(tok, s, n, i, length, &open);
    }
    return n;
}

/* A token, or the characters that are none, to the output. */
static void bpe_emit(tok_run *run, const uint8_t *piece, const bpe_symbol *s, bool *unknown)
{
    const moe_tokenizer *tok = run->tok;
    if (s->id >= 0) {
        run_emit(run, s->id);
        *unknown = false;
        return;
    }
    bool fallback = tok->byte_fallback;
    for (uint32_t k = 0; k < s->bytes; k++)
        fallback &= tok->byte_token[piece[s->start + k]] >= 0;
    for (uint32_t k = 0; fallback && k < s->bytes; k++)
        run_emit(run, tok->byte_token[piece[s->start + k]]);
    if (!fallback && tok->unknown >= 0 && !(*unknown && tok->fuse_unknown))
        run_emit(run, tok->unknown);
    *unknown = !fallback;
}

static moe_status bpe_merge_piece(tok_run *run, const uint8_t *piece, size_t bytes)
{
    bpe_symbol few[BPE_SHORT], *s = few;
    bpe_long b = {.tok = run->tok, .piece = piece};
    if (bytes > BPE_SHORT) {
        run->work.n = 0;
        if (!buf_reserve(&run->work, bytes * (sizeof *s + 2 * sizeof *b.heap)))
            return run_fail(run, MOE_ERR_MEMORY);
        b.s = s = (bpe_symbol *)(void *)run->work.data;
        b.heap = (bpe_pair *)(void *)(run->work.data + bytes * sizeof *s);
    }
    run->word.n = 0;
    const size_t marks = strlen(run->tok->prefix) + strlen(run->tok->suffix);
    if (marks && !buf_reserve(&run->word, marks + 4)) // bytes of a character
        return run_fail(run, MOE_ERR_MEMORY);
    uint32_t n = bpe_start(run, piece, (uint32_t)bytes, s);
    n = bytes > BPE_SHORT ? bpe_merge_long(&b, n) : bpe_merge_short(run->tok, piece, s, n);
    bool unknown = false;
    for (uint32_t i = 0; i < n; i++)
        bpe_emit(run, piece, &s[i], &unknown);
    return MOE_OK;
}

/* Encodes a piece through the call's cache of short pieces. */
static moe_status bpe_cached(tok_run *run, const uint8_t *piece, size_t bytes)
{
    tok_cache_entry *e = NULL;
    if (run->cache && bytes <= sizeof e->key) {
        e = &run->cache[map_hash(piece, bytes) % TOK_CACHE_ENTRIES];
        if (e->key_bytes == bytes && !memcmp(e->key, piece, bytes)) {
            for (uint32_t i = 0; i < e->n_ids; i++)
                run_emit(run, e->ids[i]);
            return MOE_OK;
        }
    }
    size_t before = run->n;
    moe_status status = bpe_merge_piece(run, piece, bytes);
    size_t made = run->n - before;
    if (status == MOE_OK && e && run->n <= run->capacity && made <= MOE_COUNT(e->ids)) {
        e->key_bytes = (uint8_t)bytes;
        e->n_ids = (uint8_t)made;
        memcpy(e->key, piece, bytes);
        memcpy(e->ids, run->out + before, made * sizeof *e->ids);
    }
    return status;
}

static moe_status bpe_encode(tok_run *run, const uint8_t *piece, size_t bytes)
{
    const moe_tokenizer *tok = run->tok;
    if (bytes > UINT32_MAX / 64)
        return fail(run->error, MOE_ERR_LIMIT, "text",
                    "expected less than 64 MiB without a place to split, got %zu bytes", bytes);
    if (tok->ignore_merges) {
        int32_t id = map_find(tok, piece, bytes);
        if (id >= 0 && tok->tokens[id].model) {
            run_emit(run, id);
            return MOE_OK;
        }
    }
    if (!tok->split_marks)
        return bpe_cached(run, piece, bytes);
    // U+2581 is E2 96 81
    for (size_t i = 1, start = 0; i <= bytes; i++) {
        bool mark = i + 3 <= bytes && piece[i] == 0xE2 && piece[i + 1] == 0x96 &&
                    piece[i + 2] == 0x81;
        bool after = i >= 3 && piece[i - 3] == 0xE2 && piece[i - 2] == 0x96 && piece[i - 1] == 0x81;
        if (i < bytes && (!mark || after))
            continue;
        moe_status status = bpe_cached(run, piece + start, i - start);
        if (status != MOE_OK)
            return status;
        start = i;
    }
    return MOE_OK;
}

#endif
