/* core/tokenizer.h - what a tokenizer is made of, whichever file it came from.
 *
 * Text passes through these stages; each is a table in moe_tokenizer, filled by tokenizer_gguf.c or
 * tokenizer_json.c, and is carried out by the file named:
 *
 *     added tokens     special.c       literal tokens are cut out; the rest goes on, piece by piece
 *     normalizer       normalize.c     a list of steps that rewrite a piece
 *     pre-tokenizer    pretokenize.c   a list of steps that split a piece
 *     model            bpe.c, unigram.c, wordpiece.c    a piece becomes tokens
 *     post-processor   tokenizer.c     BOS, EOS
 *
 * A tokenizer is immutable; whatever changes during a call lives in a tok_run. */
#ifndef MOE_CORE_TOKENIZER_H
#define MOE_CORE_TOKENIZER_H

#include "regex.c"

/* GGUF's token types. */
typedef enum tok_kind {
    TOK_UNDEFINED = 0,
    TOK_NORMAL = 1,
    TOK_UNKNOWN = 2,
    TOK_CONTROL = 3,  // never made from text without MOE_ENCODE_PARSE_SPECIAL
    TOK_USER = 4,     // made from text wherever it is spelled
    TOK_UNUSED = 5,
    TOK_BYTE = 6,     // "<0x41>"
    TOK_ABSENT = 7    // a hole in the ids of a tokenizer.json
} tok_kind;

typedef struct tok_entry {
    const char *text;     // as it stands in the vocabulary
    const uint8_t *out;   // what it decodes to; TOK_BYTE: one byte
    double score;
    uint16_t bytes, out_bytes;
    uint8_t kind;
    bool special;         // left out by decoding
    bool end;             // ends a generation
    bool model;           // the model may make it from text
} tok_entry;

/* Text -> id, open addressing. The keys are raw bytes: of a byte-level vocabulary what the token
 * decodes to, of others its text. */
typedef struct tok_map {
    uint32_t *slot;       // [mask + 1] id + 1; 0: free
    uint32_t mask;
    uint32_t max_bytes;   // of the longest key
} tok_map;

typedef struct tok_added {
    const uint8_t *text;
    uint32_t bytes;
    uint32_t id;
    bool control, single_word, lstrip, rstrip;
} tok_added;

/* Literal tokens, sorted by their bytes. */
typedef struct tok_added_set {
    tok_added *items;
    uint32_t n;
    uint32_t first[257];  // items that begin with byte b: first[b] .. first[b + 1]
} tok_added_set;

typedef enum norm_kind {
    NORM_NFC, NORM_NFD, NORM_NFKC, NORM_NFKD, NORM_LOWERCASE, NORM_PREPEND, NORM_REPLACE,
    NORM_STRIP, NORM_STRIP_ACCENTS, NORM_BERT_ACCENTS, NORM_CHARSMAP, NORM_CHARSMAP_LONGEST,
    NORM_BERT_CLEAN, NORM_BERT_CJK, NORM_SQUEEZE, NORM_NMT
} norm_kind;

typedef struct norm_step {
    norm_kind kind;
    const regex *pattern;      // NORM_REPLACE
    const uint8_t *text;       // NORM_PREPEND, NORM_REPLACE: new text
    uint32_t text_bytes;
    bool left, right;          // NORM_STRIP
    const uint32_t *units;     // NORM_CHARSMAP: double array
    uint32_t n_units;
    const char *map;           // its replacements, NUL-terminated strings
    uint32_t map_bytes;
} norm_step;

typedef enum pre_behavior {
    PRE_REMOVED, PRE_ISOLATED, PRE_MERGED_WITH_PREVIOUS, PRE_MERGED_WITH_NEXT, PRE_CONTIGUOUS
} pre_behavior;

typedef enum pre_kind {
    PRE_SPLIT,         // at the matches of a pattern
    PRE_PREFIX_SPACE,  // puts a space in front unless there is one
    PRE_METASPACE      // spaces become `mark`, one may be put in front
} pre_kind;

typedef enum pre_prepend { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS } pre_prepend;

typedef struct pre_step {
    pre_kind kind;
    const regex *pattern;
    pre_behavior behavior;
    bool invert;
    pre_prepend prepend;
    uint8_t mark[4];
    uint32_t mark_bytes;
} pre_step;

enum { TOK_MAX_STEPS = 24, TOK_MAX_TEMPLATE = 16, TOK_MAX_TOKENS = 1 << 22,
       TOK_MAX_TOKEN_BYTES = UINT16_MAX };

typedef enum tok_model { MODEL_BPE, MODEL_SCORES, MODEL_UNIGRAM, MODEL_WORDPIECE } tok_model;

typedef struct bpe_merge {
    uint64_t pair; // left id << 32 | right id; UINT64_MAX: free
    uint32_t rank, id;
} bpe_merge;

typedef enum tok_decoder {
    DECODE_PLAIN,      // what each token decodes to, joined
    DECODE_SPACED,     // a space between tokens: no decoder
    DECODE_METASPACE,  // the marks in front of the first token vanish
    DECODE_SUFFIX,     // the space at the end of a word waits for the next token
    DECODE_WORDPIECE   // a space before each but the first token, unless it continues a word
} tok_decoder;

struct moe_tokenizer {
    moe_mem *mem;
    moe_mem own_mem;       // used if the tokenizer was opened alone
    text_arena arena;      // everything below
    tok_entry *tokens;     // [n_tokens]
    uint32_t n_tokens;
    tok_map map;
    int32_t unknown;       // -1: none
    int32_t bos, eos;
    int32_t byte_token[256]; // byte-level: of each byte; else of "<0xXX>"; -1: none
    const char *chat_template;

    tok_added_set added, added_normalized;
    norm_step norm[TOK_MAX_STEPS];
    uint32_t n_norm;
    pre_step pre[TOK_MAX_STEPS];
    uint32_t n_pre;

    tok_model model;
    bool byte_level;       // BPE over bytes
    bool byte_fallback;    // unknown characters become bytes
    bool fuse_unknown;
    bool ignore_merges;    // a piece that is a token is that token
    bool split_marks;      // no token crosses from another character into U+2581: cut there
    bpe_merge *merges;     // [n_merge_slots], half as many again as there are merges
    uint32_t n_merge_slots;
    const char *prefix, *suffix; // of continuing parts / at the end of a word; "" if none
    uint32_t max_word_chars;     // WordPiece
    bool whole_words;            // WordPiece without parts: WordLevel
    double unknown_score;        // unigram
    tok_added_set sorted;        // unigram: the vocabulary

    int32_t template_ids[TOK_MAX_TEMPLATE]; // before and after the text
    uint32_t n_before, n_after;

    tok_decoder decoder;
    uint32_t strip_start;  // spaces that the decoder takes off the start of the text
    bool cleanup;          // DECODE_WORDPIECE: no space before punctuation and contractions
    bool bytes_one_by_one; // an invalid run of byte tokens becomes one U+FFFD per byte
};

/* The state of one encoding call. */
typedef struct tok_cache_entry {
    uint8_t key_bytes, n_ids;
    uint8_t key[26];
    moe_token ids[9];
} tok_cache_entry;

enum { TOK_CACHE_ENTRIES = 4096 };

typedef struct tok_run {
    const moe_tokenizer *tok;
    uint32_t flags;
    moe_token *out;
    size_t capacity, n;
    regex_run re;
    text_buf norm[2];
    text_buf pre[TOK_MAX_STEPS];
    text_buf work;           // the model's
    text_buf word;           // a key that is put together
    tok_cache_entry *cache;  // NULL for short texts
    moe_error *error;
} tok_run;

static moe_status run_fail(tok_run *run, moe_status status)
{
    if (status == MOE_ERR_MEMORY)
        return fail_memory(run->error, run->tok->mem, "text", run->n);
    return fail(run->error, status, "pattern",
                "the tokenizer's pattern needs too many steps on this text; split the text");
}

MOE_INLINE void run_emit(tok_run *run, int32_t id)
{
    if (run->n < run->capacity)
        run->out[run->n] = id;
    run->n++;
}

/* -------------------------------------------------------------------------------- the map -- */

MOE_INLINE uint64_t map_mix(uint64_t x)
{
    x ^= x >> 32;
    x *= 0x9E3779B97F4A7C15u;
    x ^= x >> 29;
    x *= 0xBF58476D1CE4E5B9u;
    return x ^ x >> 32;
}

/* The slots in which a pair is looked for: those from here on. */
MOE_INLINE uint32_t merge_first(const moe_tokenizer *tok, uint64_t pair)
{
    return (uint32_t)((map_mix(pair) >> 32) * tok->n_merge_slots >> 32);
}

MOE_INLINE uint32_t merge_next(const moe_tokenizer *tok, uint32_t slot)
{
    return slot + 1 < tok->n_merge_slots ? slot + 1 : 0;
}

static uint64_t map_hash(const uint8_t *p, size_t n)
{
    uint64_t h = n * 0xD6E8FEB86659FD93u, word;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&word, p, 8);
        h = map_mix(h ^ word);
    }
    word = 0;
    memcpy(&word, p, n);
    return map_mix(h ^ word);
}

MOE_INLINE const uint8_t *tok_key(const moe_tokenizer *tok, const tok_entry *t, uint32_t *bytes)
{
    *bytes = tok->byte_level ? t->out_bytes : t->bytes;
    return tok->byte_level ? t->out : (const uint8_t *)t->text;
}

/* The id of a key, or -1. */
static int32_t map_find(const moe_tokenizer *tok, const uint8_t *p, size_t n)
{
    const tok_map *map = &tok->map;
    if (n > map->max_bytes || !n)
        return -1;
    for (uint32_t i = (uint32_t)map_hash(p, n) & map->mask; map->slot[i]; i = (i + 1) & map->mask) {
        uint32_t id = map->slot[i] - 1, bytes;
        const uint8_t *key = tok_key(tok, &tok->tokens[id], &bytes);
        if (bytes == n && !memcmp(key, p, n))
            return (int32_t)id;
    }
    return -1;
}

static int32_t map_find_text(const moe_tokenizer *tok, const char *text)
{
    return map_find(tok, (const uint8_t *)text, strlen(text));
}

#endif
