/* core/tokenizer_gguf.c - a tokenizer from the metadata of a GGUF (or .moe) file.
 *
 * The keys are tokenizer.ggml.*; a missing one takes the default that writers of such files rely
 * on. tokenizer.ggml.model says which model it is, tokenizer.ggml.pre which patterns split the
 * text. */
#ifndef MOE_CORE_TOKENIZER_GGUF_C
#define MOE_CORE_TOKENIZER_GGUF_C

#include "directory.h"
#include "tokenizer_load.c"

enum { PRE_WHOLE_TOKENS = 1, PRE_ADD_BOS = 2, PRE_MARKS = 4, PRE_NFC = 8 };

#define PATTERN(name, text) name,
#define PRE(...)
enum vocab_pattern_name {
#include "pretokenizers.def"
    PAT_COUNT
};
#undef PATTERN
#undef PRE

#define PATTERN(name, text) text,
#define PRE(...)
static const char *const vocab_patterns[] = {
#include "pretokenizers.def"
};
#undef PATTERN
#undef PRE

typedef struct vocab_pre {
    const char *name;
    uint8_t flags;
    uint8_t n;
    uint8_t patterns[6];
} vocab_pre;

#define PATTERN(name, text)
#define PRE(name, flags, ...)                                                                      \
    {name, flags, sizeof((const uint8_t[]){__VA_ARGS__}), {__VA_ARGS__}},
static const vocab_pre vocab_pres[] = {
#include "pretokenizers.def"
};
#undef PATTERN
#undef PRE

typedef struct vocab_loader {
    moe_tokenizer *tok;
    const moe_directory *dir;
    moe_error *error;
    const vocab_pre *pre;
    bool add_bos, add_eos, add_prefix, squeeze, marks;
} vocab_loader;

/* ----------------------------------------------------------------------------- vocabulary -- */

static moe_status vocab_array(const vocab_loader *g, const char *key, bool required,
                             const moe_meta **out)
{
    *out = directory_meta(g->dir, key);
    if (!*out && required)
        return fail(g->error, MOE_ERR_MODEL, key, "the key is missing");
    if (*out && (*out)->type != META_ARRAY)
        return fail(g->error, MOE_ERR_MODEL, key, "expected an array, got a single value");
    return MOE_OK;
}

/* An array of numbers with one for each token, or NULL. */
static moe_status vocab_numbers(const vocab_loader *g, const char *key, uint64_t n, bool integers,
                               const moe_meta **out)
{
    moe_status status = vocab_array(g, key, false, out);
    if (status != MOE_OK || !*out)
        return status;
    const moe_meta *m = *out;
    bool is_float = m->item == META_F32 || m->item == META_F64;
    bool wide = m->item == META_I32 || m->item == META_U32 || m->item == META_I64 ||
                m->item == META_U64 || is_float;
    if (!wide || (integers && is_float))
        return fail(g->error, MOE_ERR_MODEL, key, "expected an array of 32-bit numbers, got items "
                    "of type %d", (int)m->item);
    if (m->n != n)
        return fail(g->error, MOE_ERR_MODEL, key, "expected one item for each of the %llu tokens, "
                    "got %llu", (unsigned long long)n, (unsigned long long)m->n);
    return MOE_OK;
}

/* Some writers spell the spaces of a user-defined token as spaces, the model sees U+2581: both are
 * literals (vocab_load_added), the marks are the token's key. */
static moe_status vocab_mark_spaces(vocab_loader *g, tok_entry *t)
{
    t->out = (const uint8_t *)t->text;
    t->out_bytes = t->bytes;
    moe_status status = tok_replace_out(g->tok, t, " ", 1, "\xE2\x96\x81", 3, g->error);
    t->text = (const char *)t->out;
    t->bytes = t->out_bytes;
    return status;
}

/* The other spelling of a user-defined token, if it has one. */
static moe_status vocab_add_spaced(vocab_loader *g, uint32_t id)
{
    tok_entry copy = g->tok->tokens[id];
    copy.out = (const uint8_t *)copy.text;
    copy.out_bytes = copy.bytes;
    moe_status status = tok_replace_out(g->tok, &copy, "\xE2\x96\x81", 3, " ", 1, g->error);
    tok_added_set *set = &g->tok->added;
    if (status == MOE_OK && copy.out_bytes != copy.bytes)
        set->items[set->n++] = (tok_added){.text = copy.out, .bytes = copy.out_bytes, .id = id};
    return status;
}

static moe_status vocab_load_tokens(vocab_loader *g)
{
    static const char key[] = "tokenizer.ggml.tokens";
    const moe_meta *tokens, *scores, *types;
    moe_status status = vocab_array(g, key, true, &tokens);
    if (status != MOE_OK)
        return status;
    if (tokens->item != META_STRING)
        return fail(g->error, MOE_ERR_MODEL, key, "expected an array of strings");
    if ((status = vocab_numbers(g, "tokenizer.ggml.scores", tokens->n, false, &scores)) != MOE_OK ||
        (status = vocab_numbers(g, "tokenizer.ggml.token_type", tokens->n, true,
                                &types)) != MOE_OK ||
        (status = tok_reserve(g->tok, tokens->n, key, g->error)) != MOE_OK)
        return status;
    if (!scores && (g->tok->model == MODEL_SCORES || g->tok->model == MODEL_UNIGRAM))
        return fail(g->error, MOE_ERR_MODEL, "tokenizer.ggml.scores", "the key is missing");
    for (uint32_t id = 0; id < g->tok->n_tokens; id++) {
        double score = scores ? meta_item_f64(scores, id) : 0;
        int64_t kind = types ? meta_item_i64(types, id) : TOK_NORMAL;
        if (isnan(score))
            return fail(g->error, MOE_ERR_MODEL, "tokenizer.ggml.scores", "the score of token %u "
                        "is not a number", id);
        if (kind < TOK_UNDEFINED || kind > TOK_BYTE)
            return fail(g->error, MOE_ERR_MODEL, "tokenizer.ggml.token_type", "expected 0 to 6 for "
                        "token %u, got %lld", id, (long long)kind);
        moe_str text = tokens->strings[id];
        if (kind == TOK_BYTE && tok_byte_value(text.data, (size_t)text.bytes) < 0)
            return fail(g->error, MOE_ERR_MODEL, key, "expected a byte token such as <0x41> at %u, "
                        "got \"%.*s\"", id, (int)MOE_MIN(text.bytes, 20), text.data);
        status = tok_set(g->tok, id, text.data, text.bytes, (tok_kind)kind, score, key, g->error);
        if (status == MOE_OK && g->marks && kind == TOK_USER)
            status = vocab_mark_spaces(g, &g->tok->tokens[id]);
        if (status != MOE_OK)
            return status;
        g->tok->tokens[id].model = kind == TOK_NORMAL || kind == TOK_USER || kind == TOK_UNUSED ||
                                   kind == TOK_UNDEFINED;
    }
    return tok_index(g->tok, key, g->error);
}

static moe_status vocab_load_merges(vocab_loader *g)
{
    static const char key[] = "tokenizer.ggml.merges";
    const moe_meta *merges;
    text_buf buf = {.mem = g->tok->mem};
    moe_status status = vocab_array(g, key, true, &merges);
    if (status == MOE_OK && merges->item != META_STRING)
        status = fail(g->error, MOE_ERR_MODEL, key, "expected an array of strings");
    if (status == MOE_OK)
        status = merges_reserve(g->tok, merges->n, key, g->error);
    for (uint32_t i = 0; status == MOE_OK && i < merges->n; i++) {
        moe_str text = merges->strings[i];
        const char *space =
            text.bytes > 2 ? memchr(text.data + 1, ' ', (size_t)text.bytes - 2) : NULL;
        if (!space) {
            status = fail(g->error, MOE_ERR_FORMAT, key, "expected two texts with a space between "
                          "at %u, got \"%.*s\"", i, (int)MOE_MIN(text.bytes, 100), text.data);
            break;
        }
        size_t left = (size_t)(space - text.data);
        status = merges_add(g->tok, &buf, i, text.data, left, space + 1,
                            (size_t)text.bytes - left - 1, key, g->error);
    }
    buf_free(&buf);
    return status;
}

/* Literals: control tokens and user-defined ones. */
static moe_status vocab_load_added(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    uint32_t n = 0;
    for (uint32_t id = 0; id < tok->n_tokens; id++) {
        tok_entry *t = &tok->tokens[id];
        if (t->kind == TOK_USER && tok_looks_control(t->text, t->bytes))
            t->kind = TOK_CONTROL;
        t->special = t->kind == TOK_CONTROL || t->kind == TOK_UNKNOWN;
        n += t->special ? 1 : t->kind == TOK_USER ? 2 : 0;
    }
    if (!added_reserve(&tok->added, tok, n))
        return fail_memory(g->error, tok->mem, "tokenizer.ggml.tokens", n);
    for (uint32_t id = 0; id < tok->n_tokens; id++)
        if (tok->tokens[id].special || tok->tokens[id].kind == TOK_USER) {
            added_add(&tok->added, tok, id);
            moe_status status =
                g->marks && !tok->tokens[id].special ? vocab_add_spaced(g, id) : MOE_OK;
            if (status != MOE_OK)
                return status;
        }
    added_sort(&tok->added);
    return MOE_OK;
}

/* --------------------------------------------------------------------------------- stages -- */

static moe_status vocab_pattern(vocab_loader *g, unsigned index, pre_behavior behavior, bool invert)
{
    moe_tokenizer *tok = g->tok;
    regex *re;
    moe_status status = regex_new(&re, vocab_patterns[index], strlen(vocab_patterns[index]),
                                  &tok->arena, "tokenizer.ggml.pre", g->error);
    if (status == MOE_OK)
        tok->pre[tok->n_pre++] = (pre_step){.kind = PRE_SPLIT, .pattern = re, .behavior = behavior,
                                            .invert = invert};
    return status;
}

static moe_status vocab_regex(vocab_loader *g, const char *pattern, const regex **out)
{
    regex *re;
    moe_status status = regex_new(&re, pattern, strlen(pattern), &g->tok->arena,
                                  "tokenizer.ggml.model", g->error);
    *out = re;
    return status;
}

/* Spaces become U+2581. */
static moe_status vocab_add_marks(vocab_loader *g)
{
    norm_step *step = &g->tok->norm[g->tok->n_norm++];
    *step = (norm_step){.kind = NORM_REPLACE, .text = (const uint8_t *)"\xE2\x96\x81",
                        .text_bytes = 3};
    return vocab_regex(g, " ", &step->pattern);
}

static void vocab_add_norm(vocab_loader *g, norm_kind kind)
{
    g->tok->norm[g->tok->n_norm++] = (norm_step){.kind = kind, .text = (const uint8_t *)" ",
                                                 .text_bytes = 1};
}

static moe_status vocab_find_pre(vocab_loader *g)
{
    moe_str name = {.data = "default", .bytes = 7};
    moe_status status = meta_string(g->dir, "tokenizer.ggml.pre", false, &name, g->error);
    if (status != MOE_OK)
        return status;
    char text[64], line[200];
    snprintf(text, sizeof text, "%.*s", (int)MOE_MIN(name.bytes, sizeof text - 1), name.data);
    for (size_t i = 0; i < MOE_COUNT(vocab_pres); i++)
        if (!strcmp(text, vocab_pres[i].name))
            g->pre = &vocab_pres[i];
    if (g->pre)
        return MOE_OK;
    // the patterns only say where words end: with the wrong ones the text is still all there
    g->pre = &vocab_pres[0];
    snprintf(line, sizeof line, "tokenizer.ggml.pre: unknown name \"%s\", using \"default\"; the "
             "ids may differ from those the model was trained with", text);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 0x20)
            *c = '?';
    mem_log(g->tok->mem, MOE_LOG_WARN, line);
    return MOE_OK;
}

static moe_status vocab_load_bpe(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    moe_status status = vocab_find_pre(g);
    if (status != MOE_OK)
        return status;
    g->marks |= (g->pre->flags & PRE_MARKS) != 0;
    tok->model = MODEL_BPE;
    tok->byte_level = !g->marks;
    tok->byte_fallback = tok->fuse_unknown = g->marks;
    tok->ignore_merges = (g->pre->flags & PRE_WHOLE_TOKENS) != 0;
    g->add_bos = (g->pre->flags & PRE_ADD_BOS) != 0 || g->marks;
    if ((status = vocab_load_tokens(g)) != MOE_OK || (status = vocab_load_merges(g)) != MOE_OK)
        return status;
    if (g->marks) // HF splits no lines: a token of both kinds of characters does not exist
        return vocab_add_marks(g);
    if (g->pre->flags & PRE_NFC)
        vocab_add_norm(g, NORM_NFC);
    for (unsigned i = 0; i < g->pre->n; i++)
        if ((status = vocab_pattern(g, g->pre->patterns[i], PRE_ISOLATED, false)) != MOE_OK)
            return status;
    bool nfc = false; // written by moe-convert; other readers go without
    status = meta_bool(g->dir, "tokenizer.ggml.normalizer.nfc", false, &nfc, g->error);
    if (status == MOE_OK && nfc)
        vocab_add_norm(g, NORM_NFC);
    if (status != MOE_OK)
        return status;
    return meta_bool(g->dir, "tokenizer.ggml.add_space_prefix", false, &g->add_prefix, g->error);
}

/* SentencePiece's normalizer: a map of characters, blanks dropped, one put in front. */
static moe_status vocab_load_normalizer(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    static const char charsmap_key[] = "tokenizer.ggml.precompiled_charsmap";
    const moe_meta *map;
    moe_status status = vocab_array(g, charsmap_key, false, &map);
    if (status == MOE_OK && map && map->n) {
        if (map->item != META_U8 && map->item != META_I8)
            return fail(g->error, MOE_ERR_MODEL, charsmap_key, "expected an array of bytes");
        norm_step *step = &tok->norm[tok->n_norm++];
        *step = (norm_step){.kind = NORM_CHARSMAP_LONGEST};
        status = charsmap_load(step, map->data, map->n, &tok->arena, charsmap_key, g->error);
    }
    if (status == MOE_OK)
        status = meta_bool(g->dir, "tokenizer.ggml.add_space_prefix", false, &g->add_prefix,
                           g->error);
    if (status == MOE_OK)
        status = meta_bool(g->dir, "tokenizer.ggml.remove_extra_whitespaces", false, &g->squeeze,
                           g->error);
    if (status != MOE_OK)
        return status;
    if (g->squeeze)
        vocab_add_norm(g, NORM_SQUEEZE);
    if (g->add_prefix)
        vocab_add_norm(g, NORM_PREPEND);
    return vocab_add_marks(g);
}

/* SentencePiece: BPE by score. */
static moe_status vocab_load_scores(vocab_loader *g)
{
    g->tok->model = MODEL_SCORES;
    g->tok->byte_fallback = g->tok->fuse_unknown = true;
    g->tok->bytes_one_by_one = true;
    g->add_bos = g->add_prefix = g->marks = true;
    moe_status status = vocab_load_tokens(g);
    return status == MOE_OK ? vocab_load_normalizer(g) : status;
}

static moe_status vocab_load_unigram(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    tok->model = MODEL_UNIGRAM;
    tok->fuse_unknown = tok->byte_fallback = true;
    g->add_eos = g->add_prefix = g->squeeze = g->marks = true;
    moe_status status = vocab_load_tokens(g);
    if (status == MOE_OK)
        status = vocab_load_normalizer(g);
    return status == MOE_OK ? unigram_prepare(tok, "tokenizer.ggml.tokens", g->error) : status;
}

/* WordPiece. The writers of these files put U+2581 in front of tokens that begin a word, and take
 * the "##" of the others away. */
static moe_status vocab_load_wordpiece(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    bool lower = true;
    tok->model = MODEL_WORDPIECE;
    tok->decoder = DECODE_WORDPIECE;
    tok->cleanup = true;
    tok->prefix = "";
    tok->suffix = "\xE2\x96\x81";
    tok->max_word_chars = 100;
    g->add_bos = g->add_eos = true;
    moe_status status = vocab_load_tokens(g);
    if (status == MOE_OK)
        status = meta_bool(g->dir, "tokenizer.ggml.normalizer.lowercase", false, &lower, g->error);
    bool strip = lower;
    if (status == MOE_OK)
        status = meta_bool(g->dir, "tokenizer.ggml.normalizer.strip_accents", false, &strip,
                           g->error);
    if (status != MOE_OK)
        return status;
    vocab_add_norm(g, NORM_BERT_CLEAN);
    vocab_add_norm(g, NORM_BERT_CJK);
    if (strip) {
        vocab_add_norm(g, NORM_NFD);
        vocab_add_norm(g, NORM_BERT_ACCENTS);
    }
    if (lower)
        vocab_add_norm(g, NORM_LOWERCASE);
    pre_step *pre = &tok->pre[tok->n_pre++];
    *pre = (pre_step){.kind = PRE_SPLIT, .behavior = PRE_REMOVED};
    if ((status = vocab_regex(g, "\\s", &pre->pattern)) != MOE_OK)
        return status;
    pre = &tok->pre[tok->n_pre++];
    *pre = (pre_step){.kind = PRE_SPLIT, .behavior = PRE_ISOLATED};
    return vocab_regex(g, "\\p{splitter punctuation}", &pre->pattern);
}

/* ---------------------------------------------------------------------------- special ids -- */

/* Reads a token id. `otherwise` is used if the key is missing and the vocabulary has that id. */
static moe_status vocab_id(vocab_loader *g, const char *key, int32_t otherwise, int32_t *id)
{
    uint32_t value = UINT32_MAX;
    moe_status status = meta_u32(g->dir, key, false, 0, g->tok->n_tokens - 1, &value, g->error);
    if (status == MOE_OK)
        *id = value != UINT32_MAX ? (int32_t)value
              : otherwise < (int32_t)g->tok->n_tokens ? otherwise : -1;
    return status;
}

/* tokenizer.ggml.eot_token_id and so on: more tokens that end a generation. */
static moe_status vocab_load_ends(vocab_loader *g)
{
    static const char *const keys[] = {"tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    tok_mark_ends(g->tok);
    for (size_t i = 0; i < MOE_COUNT(keys); i++) {
        int32_t id;
        moe_status status = vocab_id(g, keys[i], -1, &id);
        if (status != MOE_OK)
            return status;
        if (id >= 0)
            g->tok->tokens[id].end = true;
    }
    return MOE_OK;
}

static moe_status vocab_load_template(vocab_loader *g)
{
    moe_str text = {0};
    moe_status status = meta_string(g->dir, "tokenizer.chat_template", false, &text, g->error);
    if (status != MOE_OK || !text.data)
        return status;
    g->tok->chat_template = arena_copy(&g->tok->arena, text.data, text.bytes, 1);
    return g->tok->chat_template ? MOE_OK
                                 : fail_memory(g->error, g->tok->mem, "tokenizer.chat_template",
                                               text.bytes);
}

static moe_status vocab_load_special(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    bool scores = tok->model == MODEL_SCORES, words = tok->model == MODEL_WORDPIECE;
    bool unigram = tok->model == MODEL_UNIGRAM;
    int32_t last = -1; // what MOE_ENCODE_ADD_SPECIAL puts behind the text
    moe_status status = MOE_OK;
    if ((status = vocab_id(g, "tokenizer.ggml.bos_token_id", scores ? 1 : words ? 101 : -1,
                          &tok->bos)) != MOE_OK ||
        (status = vocab_id(g, "tokenizer.ggml.eos_token_id", scores ? 2 : unigram ? 1 : -1,
                          &tok->eos)) != MOE_OK ||
        (status = vocab_id(g, "tokenizer.ggml.unknown_token_id",
                          scores ? 0 : unigram ? 2 : words ? 100 : -1, &tok->unknown)) != MOE_OK ||
        (status = vocab_id(g, words ? "tokenizer.ggml.seperator_token_id"
                                   : "tokenizer.ggml.eos_token_id", words ? 102 : tok->eos,
                          &last)) != MOE_OK ||
        (words && (status = vocab_id(g, "tokenizer.ggml.cls_token_id", tok->bos, &tok->bos))))
        return status;
    if (tok->byte_level)
        tok->unknown = -1; // all bytes are there; a missing one is lost, as with Hugging Face
    if ((status = meta_bool(g->dir, "tokenizer.ggml.add_bos_token", false, &g->add_bos,
                            g->error)) ||
        (status = meta_bool(g->dir, "tokenizer.ggml.add_eos_token", false, &g->add_eos, g->error)))
        return status;
    if (g->add_bos && tok->bos >= 0)
        tok->template_ids[tok->n_before++] = tok->bos;
    if (g->add_eos && last >= 0)
        tok->template_ids[tok->n_before + tok->n_after++] = last;
    if ((status = vocab_load_ends(g)) != MOE_OK)
        return status;
    return vocab_load_template(g);
}

/* What tokens decode to where U+2581 means a space. */
static moe_status vocab_decode_marks(vocab_loader *g)
{
    moe_tokenizer *tok = g->tok;
    for (uint32_t id = 0; id < tok->n_tokens; id++) {
        tok_entry *t = &tok->tokens[id];
        if (t->kind == TOK_BYTE || t->special)
            continue;
        moe_status status = tok_replace_out(tok, t, "\xE2\x96\x81", 3, " ", 1, g->error);
        if (status != MOE_OK)
            return status;
    }
    tok->strip_start = g->add_prefix ? 1 : 0;
    return MOE_OK;
}

static moe_status vocab_load(vocab_loader *g, moe_str model)
{
    static const struct {
        const char *name;
        moe_status (*load)(vocab_loader *g);
    } models[] = {{"gpt2", vocab_load_bpe}, {"gemma4", vocab_load_bpe},
                  {"llama", vocab_load_scores}, {"t5", vocab_load_unigram},
                  {"bert", vocab_load_wordpiece}};
    g->marks = str_equal(model, "gemma4");
    for (size_t i = 0; i < MOE_COUNT(models); i++) {
        if (!str_equal(model, models[i].name))
            continue;
        moe_status status = models[i].load(g);
        if (status == MOE_OK)
            status = vocab_load_added(g);
        if (status == MOE_OK)
            status = vocab_load_special(g);
        if (status == MOE_OK && g->marks)
            status = vocab_decode_marks(g);
        if (status == MOE_OK && (g->tok->model == MODEL_BPE || g->tok->model == MODEL_SCORES))
            g->tok->split_marks = tok_can_split_marks(g->tok);
        return status;
    }
    return fail(g->error, MOE_ERR_UNSUPPORTED, "tokenizer.ggml.model", "expected gpt2, llama, "
                "gemma4, t5 or bert, got \"%.*s\"", (int)MOE_MIN(model.bytes, 40), model.data);
}

#endif
