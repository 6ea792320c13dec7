/* core/wordpiece.c - WordPiece: the longest token that a word begins with, and so on; a word that
 * cannot be cut up like this is unknown as a whole. */
#ifndef MOE_CORE_WORDPIECE_C
#define MOE_CORE_WORDPIECE_C

#include "tokenizer.h"

/* The longest token at p[start..n): its id, and where it ends in *end. -1 if there is none.
 * run->word has room for any. */
static int32_t wordpiece_longest(tok_run *run, const uint8_t *p, size_t n, size_t start,
                                 size_t *end)
{
    const moe_tokenizer *tok = run->tok;
    const char *prefix = start ? tok->prefix : tok->suffix; // see wordpiece_encode
    size_t prefix_bytes = strlen(prefix), stop = MOE_MIN(n, start + tok->map.max_bytes);
    while (stop < n && (p[stop] & 0xC0) == 0x80)
        stop--;
    run->word.n = 0;
    buf_append(&run->word, prefix, prefix_bytes);
    buf_append(&run->word, p + start, stop - start);
    while (stop > start && !(tok->whole_words && stop < n)) {
        int32_t id = map_find(tok, run->word.data, prefix_bytes + (stop - start));
        if (id >= 0 && tok->tokens[id].model) {
            *end = stop;
            return id;
        }
        do
            stop--;
        while (stop > start && (p[stop] & 0xC0) == 0x80);
    }
    return -1;
}

/* tok->prefix stands before a token that continues a word, tok->suffix (an odd place, but free in
 * this model) before one that begins it. */
static moe_status wordpiece_encode(tok_run *run, const uint8_t *p, size_t bytes)
{
    const moe_tokenizer *tok = run->tok;
    size_t n_chars = 0, before = run->n;
    for (size_t i = 0; i < bytes && n_chars <= tok->max_word_chars; i += utf8_length(p[i]))
        n_chars++;
    const size_t mark_bytes = MOE_MAX(strlen(tok->prefix), strlen(tok->suffix));
    run->word.n = 0;
    if (!buf_reserve(&run->word, mark_bytes + MOE_MIN(bytes, (size_t)tok->map.max_bytes)))
        return run_fail(run, MOE_ERR_MEMORY);
    bool known = n_chars <= tok->max_word_chars;
    for (size_t i = 0; known && i < bytes;) {
        int32_t id = wordpiece_longest(run, p, bytes, i, &i);
        if (id < 0)
            known = false;
        else
            run_emit(run, id);
    }
    if (!known) {
        run->n = before;
        if (tok->unknown >= 0)
            run_emit(run, tok->unknown);
    }
    return MOE_OK;
}

#endif
