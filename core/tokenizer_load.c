/* core/tokenizer_load.c - what both sources of a tokenizer share: the vocabulary with its indexes,
 * the merges, the tokens that end a generation.
 *
 * Order: tok_reserve, tok_set for each token, tok_index, then merges and the rest. Everything goes
 * into the tokenizer's arena; a failure leaves it to tokenizer_free. */
#ifndef MOE_CORE_TOKENIZER_LOAD_C
#define MOE_CORE_TOKENIZER_LOAD_C

#include "normalize.c"
#include "pretokenize.c"
#include "special.c"

/* -------------------------------------------------------------------------------- vocabulary -- */

static moe_status tok_reserve(moe_tokenizer *tok, uint64_t n, const char *subject, moe_error *error)
{
    if (n == 0 || n > TOK_MAX_TOKENS)
        return fail(error, MOE_ERR_FORMAT, subject, "expected 1 to %d tokens, got %llu",
                    TOK_MAX_TOKENS, (unsigned long long)n);
    tok->tokens = arena_alloc(&tok->arena, n, sizeof *tok->tokens);
    if (!tok->tokens)
        return fail_memory(error, tok->mem, subject, n * sizeof *tok->tokens);
    tok->n_tokens = (uint32_t)n;
    for (uint32_t i = 0; i < n; i++)
        tok->tokens[i] = (tok_entry){.text = "", .out = (const uint8_t *)"", .kind = TOK_ABSENT};
    return MOE_OK;
}

static moe_status tok_set(moe_tokenizer *tok, uint32_t id, const char *text, uint64_t bytes,
                          tok_kind kind, double score, const char *subject, moe_error *error)
{
    if (bytes > TOK_MAX_TOKEN_BYTES)
        return fail(error, MOE_ERR_FORMAT, subject, "expected tokens of at most %d bytes, token %u "
                    "has %llu", TOK_MAX_TOKEN_BYTES, id, (unsigned long long)bytes);
    tok_entry *t = &tok->tokens[id];
    t->text = arena_copy(&tok->arena, text, bytes, 1);
    if (!t->text)
        return fail_memory(error, tok->mem, subject, bytes);
    t->bytes = (uint16_t)bytes;
    t->kind = (uint8_t)kind;
    t->score = score;
    return MOE_OK;
}

/* The byte that a character stands for in a byte-level vocabulary, or -1. Printable Latin-1
 * characters stand for themselves, the other bytes follow from U+0100 on, in order. */
static int bytelevel_byte(uint32_t c)
{
    if ((c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF))
        return (int)c;
    if (c < 0x100 || c > 0x143)
        return -1;
    c -= 0x100;
    return c < 0x21 ? (int)c : c < 0x43 ? (int)(c - 0x21 + 0x7F) : 0xAD;
}

/* Turns the text of a byte-level token into its bytes; false if it is not such a text. */
static bool bytelevel_decode(const char *text, size_t bytes, uint8_t *out, uint32_t *n)
{
    *n = 0;
    for (size_t i = 0; i < bytes;) {
        int32_t cp;
        i += utf8_decode((const uint8_t *)text + i, bytes - i, &cp);
        int byte = cp < 0 ? -1 : bytelevel_byte((uint32_t)cp);
        if (byte < 0)
            return false;
        out[(*n)++] = (uint8_t)byte;
    }
    return true;
}

/* "<0x41>" -> 0x41, or -1. */
static int tok_byte_value(const char *text, size_t bytes)
{
    static const char digits[] = "0123456789ABCDEF";
    if (bytes != 6 || memcmp(text, "<0x", 3) || text[5] != '>' || !text[3] || !text[4])
        return -1;
    const char *high = strchr(digits, text[3]), *low = strchr(digits, text[4]);
    return high && low ? (int)((high - digits) * 16 + (low - digits)) : -1;
}

/* What a token decodes to, without the decoder's own rules. */
static bool tok_set_out(moe_tokenizer *tok, tok_entry *t)
{
    t->out = (const uint8_t *)t->text;
    t->out_bytes = t->bytes;
    int byte = tok_byte_value(t->text, t->bytes);
    if (t->kind == TOK_BYTE && byte >= 0) {
        uint8_t value = (uint8_t)byte;
        t->out = arena_copy(&tok->arena, &value, 1, 1);
        t->out_bytes = 1;
        return t->out != NULL;
    }
    if (!tok->byte_level || t->kind == TOK_ABSENT)
        return true;
    uint32_t n;
    uint8_t *out = arena_alloc(&tok->arena, (uint64_t)t->bytes + 1, 1);
    if (!out)
        return false;
    if (bytelevel_decode(t->text, t->bytes, out, &n)) {
        t->out = out;
        t->out_bytes = (uint16_t)n;
    }
    return true;
}

/* Enters a token; the first of two equal ones stays. False if the keys collide beyond reason. */
static bool map_insert(moe_tokenizer *tok, uint32_t id)
{
    tok_map *map = &tok->map;
    uint32_t bytes, other_bytes, tries = 0;
    const uint8_t *key = tok_key(tok, &tok->tokens[id], &bytes);
    if (!bytes)
        return true;
    uint32_t i = (uint32_t)map_hash(key, bytes) & map->mask;
    for (; map->slot[i]; i = (i + 1) & map->mask) {
        const uint8_t *other = tok_key(tok, &tok->tokens[map->slot[i] - 1], &other_bytes);
        if (other_bytes == bytes && !memcmp(key, other, bytes))
            return true;
        if (++tries > 1000)
            return false;
    }
    map->slot[i] = id + 1;
    map->max_bytes = MOE_MAX(map->max_bytes, bytes);
    return true;
}

/* Makes the map and what each token decodes to. tok->byte_level and all tokens are set. */
static moe_status tok_index(moe_tokenizer *tok, const char *subject, moe_error *error)
{
    uint64_t slots = 16;
    while (slots < 2 * (uint64_t)tok->n_tokens)
        slots *= 2;
    tok->map.slot = arena_alloc(&tok->arena, slots, sizeof *tok->map.slot);
    if (!tok->map.slot)
        return fail_memory(error, tok->mem, subject, slots * 4);
    tok->map.mask = (uint32_t)slots - 1;
    for (int i = 0; i < 256; i++)
        tok->byte_token[i] = -1;
    for (uint32_t id = 0; id < tok->n_tokens; id++) {
        tok_entry *t = &tok->tokens[id];
        if (!tok_set_out(tok, t))
            return fail_memory(error, tok->mem, subject, t->bytes);
        bool literal = tok->byte_level && t->out == (const uint8_t *)t->text;
        if (t->kind == TOK_ABSENT || literal)
            continue; // a text that no bytes spell: found as an added token only
        if (!map_insert(tok, id))
            return fail(error, MOE_ERR_LIMIT, subject, "too many tokens with one hash value");
    }
    for (uint32_t id = tok->n_tokens; id-- > 0;) {
        const tok_entry *t = &tok->tokens[id];
        if (tok->byte_level && t->model && t->out_bytes == 1 && t->out != (const uint8_t *)t->text)
            tok->byte_token[t->out[0]] = (int32_t)id;
        int byte = tok->byte_level ? -1 : tok_byte_value(t->text, t->bytes);
        if (byte >= 0)
            tok->byte_token[byte] = (int32_t)id;
    }
    return MOE_OK;
}

/* ------------------------------------------------------------------------------------ merges -- */

static moe_status merges_reserve(moe_tokenizer *tok, uint64_t n, const char *subject,
                                 moe_error *error)
{
    const uint64_t slots = n + n / 2 + 1;
    if (n > 4 * (uint64_t)TOK_MAX_TOKENS)
        return fail(error, MOE_ERR_FORMAT, subject, "expected at most %d merges, got %llu",
                    4 * TOK_MAX_TOKENS, (unsigned long long)n);
    tok->merges = arena_alloc(&tok->arena, slots, sizeof *tok->merges);
    if (!tok->merges)
        return fail_memory(error, tok->mem, subject, slots * sizeof *tok->merges);
    tok->n_merge_slots = (uint32_t)slots;
    for (uint64_t i = 0; i < slots; i++)
        tok->merges[i].pair = UINT64_MAX;
    return MOE_OK;
}

/* The id of a part of a merge, given as it stands in the vocabulary. `key` has room for it. */
static int32_t merge_part(const moe_tokenizer *tok, text_buf *key, const char *text, size_t bytes)
{
    uint32_t n;
    if (!tok->byte_level)
        return map_find(tok, (const uint8_t *)text, bytes);
    if (bytes > TOK_MAX_TOKEN_BYTES || !bytelevel_decode(text, bytes, key->data, &n))
        return -1;
    return map_find(tok, key->data, n);
}

/* Enters merge number `rank` of two texts. A merge that makes a control token is left out: text
 * must not spell one. */
static moe_status merges_add(moe_tokenizer *tok, text_buf *key, uint32_t rank, const char *left,
                             size_t left_bytes, const char *right, size_t right_bytes,
                             const char *subject, moe_error *error)
{
    const size_t most = MOE_MIN(MOE_MAX(left_bytes, right_bytes), (size_t)TOK_MAX_TOKEN_BYTES);
    key->n = 0;
    if (!buf_reserve(key, most + 1))
        return fail_memory(error, tok->mem, subject, most);
    int32_t a = merge_part(tok, key, left, left_bytes);
    int32_t b = merge_part(tok, key, right, right_bytes);
    if (a < 0 || b < 0)
        return fail(error, MOE_ERR_FORMAT, subject, "merge %u is of a part that is not a token: "
                    "\"%.*s\"", rank, (int)MOE_MIN(a < 0 ? left_bytes : right_bytes, 100),
                    a < 0 ? left : right);
    uint32_t a_bytes, b_bytes;
    const uint8_t *a_key = tok_key(tok, &tok->tokens[a], &a_bytes);
    const uint8_t *b_key = tok_key(tok, &tok->tokens[b], &b_bytes);
    size_t skip = MOE_MIN(strlen(tok->prefix), b_bytes);
    key->n = 0;
    if (!buf_append(key, a_key, a_bytes) || !buf_append(key, b_key + skip, b_bytes - skip))
        return fail_memory(error, tok->mem, subject, a_bytes + b_bytes);
    int32_t id = map_find(tok, key->data, key->n);
    if (id < 0)
        return fail(error, MOE_ERR_FORMAT, subject, "merge %u makes a text that is not a token: "
                    "\"%.*s\" + \"%.*s\"", rank, (int)MOE_MIN(left_bytes, 100), left,
                    (int)MOE_MIN(right_bytes, 100), right);
    if (!tok->tokens[id].model)
        return MOE_OK;
    uint64_t pair = (uint64_t)a << 32 | (uint32_t)b;
    uint32_t tries = 0;
    for (uint32_t i = merge_first(tok, pair);; i = merge_next(tok, i)) {
        bpe_merge *m = &tok->merges[i];
        if (m->pair == pair)
            return fail(error, MOE_ERR_FORMAT, subject, "merge %u is there twice, first as %u: "
                        "\"%.*s\" + \"%.*s\"", rank, m->rank, (int)MOE_MIN(left_bytes, 100), left,
                        (int)MOE_MIN(right_bytes, 100), right);
        if (m->pair == UINT64_MAX) {
            *m = (bpe_merge){.pair = pair, .rank = rank, .id = (uint32_t)id};
            return MOE_OK;
        }
        if (++tries > 1000)
            return fail(error, MOE_ERR_LIMIT, subject, "too many merges with one hash value");
    }
}

/* Whether text can be cut before each U+2581 that follows another character: then no token that the
 * model can make holds such a place. */
static bool tok_can_split_marks(const moe_tokenizer *tok)
{
    if (tok->byte_level || map_find_text(tok, "\xE2\x96\x81") < 0)
        return false;
    for (uint32_t id = 0; id < tok->n_tokens; id++) {
        const tok_entry *t = &tok->tokens[id];
        for (uint32_t i = 3; t->model && i + 3 <= t->bytes; i++)
            if (!memcmp(t->text + i, "\xE2\x96\x81", 3) &&
                memcmp(t->text + i - 3, "\xE2\x96\x81", 3))
                return false;
        for (uint32_t i = 1; t->model && i < 3 && i + 3 <= t->bytes; i++)
            if (!memcmp(t->text + i, "\xE2\x96\x81", 3))
                return false;
    }
    return true;
}

/* Replaces every `from` in what a token decodes to, which may become four times as long as its
 * text: a vocabulary is many tokens. */
static moe_status tok_replace_out(moe_tokenizer *tok, tok_entry *t, const char *from,
                                  size_t from_bytes, const char *to, size_t to_bytes,
                                  moe_error *error)
{
    uint64_t n = 0, bytes = t->out_bytes;
    for (size_t i = 0; i + from_bytes <= t->out_bytes; i++)
        if (!memcmp(t->out + i, from, from_bytes)) {
            n++;
            i += from_bytes - 1;
        }
    if (!n)
        return MOE_OK;
    bytes = bytes - n * from_bytes + n * to_bytes;
    if (bytes > 4 * (uint64_t)t->bytes + 16 || bytes > TOK_MAX_TOKEN_BYTES)
        return fail(error, MOE_ERR_LIMIT, "decoder", "expected tokens that decode to at most four "
                    "times their text, one of %u bytes would to %llu", t->bytes,
                    (unsigned long long)bytes);
    uint8_t *out = arena_alloc(&tok->arena, bytes + 1, 1);
    if (!out)
        return fail_memory(error, tok->mem, "token", bytes);
    size_t at = 0;
    for (size_t i = 0; i < t->out_bytes;) {
        bool match = i + from_bytes <= t->out_bytes && !memcmp(t->out + i, from, from_bytes);
        if (match)
            memcpy(out + at, to, to_bytes);
        else
            out[at] = t->out[i];
        at += match ? to_bytes : 1;
        i += match ? from_bytes : 1;
    }
    t->out = out;
    t->out_bytes = (uint16_t)at;
    return MOE_OK;
}

/* The unigram model's sorted vocabulary and the score of an unknown character. */
static moe_status unigram_prepare(moe_tokenizer *tok, const char *subject, moe_error *error)
{
    double lowest = INFINITY;
    tok_added_set *set = &tok->sorted;
    set->items = arena_alloc(&tok->arena, tok->n_tokens, sizeof *set->items);
    if (!set->items)
        return fail_memory(error, tok->mem, subject, tok->n_tokens);
    for (uint32_t id = 0; id < tok->n_tokens; id++) {
        const tok_entry *t = &tok->tokens[id];
        if (!t->model || t->kind == TOK_UNUSED) // unused: never made from text
            continue;
        if (isfinite(t->score))
            lowest = MOE_MIN(lowest, t->score);
        if (t->bytes)
            set->items[set->n++] = (tok_added){.text = (const uint8_t *)t->text, .bytes = t->bytes,
                                               .id = id};
    }
    added_sort(set);
    tok->unknown_score = (isfinite(lowest) ? lowest : 0) - 10;
    return MOE_OK;
}

/* ------------------------------------------------------------------------------ added tokens -- */

/* Adds a literal; `capacity` items were reserved. */
static void added_add(tok_added_set *set, const moe_tokenizer *tok, uint32_t id)
{
    const tok_entry *t = &tok->tokens[id];
    if (t->bytes)
        set->items[set->n++] = (tok_added){.text = (const uint8_t *)t->text, .bytes = t->bytes,
                                           .id = id, .control = t->kind != TOK_USER};
}

static bool added_reserve(tok_added_set *set, moe_tokenizer *tok, uint32_t n)
{
    set->items = arena_alloc(&tok->arena, n, sizeof *set->items);
    return set->items != NULL;
}

/* A text that only ever marks structure, whatever the file says of it: "<|im_end|>", DeepSeek's
 * form with full-width bars, "<unused7>". */
static bool tok_looks_control(const char *text, size_t bytes)
{
    static const char *const pairs[][2] = {{"<|", "|>"}, {"<\xEF\xBD\x9C", "\xEF\xBD\x9C>"},
                                           {"<unused", ">"}, {"[@", "@]"}};
    for (size_t i = 0; i < MOE_COUNT(pairs); i++) {
        size_t a = strlen(pairs[i][0]), b = strlen(pairs[i][1]);
        if (bytes > a + b && !memcmp(text, pairs[i][0], a) &&
            !memcmp(text + bytes - b, pairs[i][1], b))
            return true;
    }
    return (bytes == 5 && !memcmp(text, "<pad>", 5)) || (bytes == 6 && !memcmp(text, "<mask>", 6));
}

/* Marks the tokens that end a generation by what they are called. */
static void tok_mark_ends(moe_tokenizer *tok)
{
    static const char *const ends[] = {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>",
        "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<EOT>", "_<EOT>",
        "[EOT]", "[EOS]", "<eos>", "</s>", "<|eos|>", "<|hy_eos|>", "<|role_end|>", "[e~[",
        "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
    };
    bool has_return = false, has_call = false;
    uint32_t end_of_message = UINT32_MAX;
    for (uint32_t id = 0; id < tok->n_tokens; id++) {
        tok_entry *t = &tok->tokens[id];
        if (t->kind != TOK_CONTROL && t->kind != TOK_USER)
            continue;
        for (size_t k = 0; k < MOE_COUNT(ends); k++)
            t->end |= !strcmp(t->text, ends[k]);
        has_return |= !strcmp(t->text, "<|return|>");
        has_call |= !strcmp(t->text, "<|call|>");
        if (!strcmp(t->text, "<|end|>"))
            end_of_message = id;
    }
    // in the Harmony format <|end|> closes one message of several
    if (has_return && has_call && end_of_message != UINT32_MAX)
        tok->tokens[end_of_message].end = false;
    if (tok->eos >= 0)
        tok->tokens[tok->eos].end = true;
}

#endif
