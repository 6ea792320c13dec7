/* convert/vocab.c - tokenizer.json or tokenizer.model, tokenizer_config.json and chat templates ->
 * tokenizer.ggml.* keys.
 *
 * The tokenizer.json is opened by the runtime's own reader; what is written is opened again as
 * GGUF, and both must give the same ids for a text that has something of everything. A vocabulary
 * for which that cannot be had is refused rather than written slightly wrong. A tokenizer.model is
 * read if there is no tokenizer.json. */
#ifndef MOE_CONVERT_VOCAB_C
#define MOE_CONVERT_VOCAB_C

#include "config.c"
#include "sentencepiece.c"

typedef struct vocab_writer {
    conv_source *source;
    const char *dir;
    const char *pre;          // asked for; NULL: to be found
    uint32_t n_vocab;         // rows of the embedding
    uint32_t n_tokens;        // of the tokenizer, at most n_vocab
    json_ref config, generation, tokenizer_config, json; // node NULL: no such file
    moe_tokenizer *tok;
    bool bytes;               // byte-level BPE; else SentencePiece
    bool prefix;              // a space is put in front of the text
    meta_writer kv;
    moe_error *error;
} vocab_writer;

/* ----------------------------------------------------------------------------------- tokens -- */

/* GGUF's kind of a token. */
static tok_kind vocab_kind(const vocab_writer *w, uint32_t id)
{
    const tok_entry *t = &w->tok->tokens[id];
    if (id >= w->n_tokens || t->kind == TOK_ABSENT)
        return TOK_UNUSED;
    if (!w->bytes && tok_byte_value(t->text, t->bytes) >= 0)
        return TOK_BYTE;
    return (int32_t)id == w->tok->unknown && !w->bytes ? TOK_UNKNOWN : (tok_kind)t->kind;
}

static void vocab_put_tokens(vocab_writer *w)
{
    meta_put_array(&w->kv, "tokenizer.ggml.tokens", META_STRING, w->n_vocab);
    for (uint32_t id = 0; id < w->n_vocab; id++) {
        char filler[32];
        if (id >= w->n_tokens || w->tok->tokens[id].kind == TOK_ABSENT) {
            // rows without a token: the embedding is often padded
            const int n = snprintf(filler, sizeof filler, "[PAD%u]", id);
            meta_text(&w->kv, filler, (size_t)n);
        } else {
            meta_text(&w->kv, w->tok->tokens[id].text, w->tok->tokens[id].bytes);
        }
    }
    meta_put_array(&w->kv, "tokenizer.ggml.token_type", META_I32, w->n_vocab);
    for (uint32_t id = 0; id < w->n_vocab; id++)
        meta_number(&w->kv, id < w->n_tokens ? (uint32_t)vocab_kind(w, id) : TOK_UNUSED, 4);
}

/* The two parts of a merge: "a b", or ["a", "b"]. */
static bool vocab_merge_parts(json_ref merge, json_ref parts[2], moe_str text[2])
{
    if (json_typeof(merge) == JSON_ARRAY && json_count(merge) == 2) {
        parts[0] = json_first(merge);
        parts[1] = json_next(merge, parts[0]);
        for (int i = 0; i < 2; i++) {
            if (json_typeof(parts[i]) != JSON_STRING)
                return false;
            text[i] = (moe_str){parts[i].node->as.text, parts[i].node->n};
        }
        return true;
    }
    if (json_typeof(merge) != JSON_STRING)
        return false;
    const char *p = merge.node->as.text, *end = p + merge.node->n;
    const char *space = end > p + 2 ? memchr(p + 1, ' ', (size_t)(end - p) - 2) : NULL;
    if (!space)
        return false;
    text[0] = (moe_str){p, (uint64_t)(space - p)};
    text[1] = (moe_str){space + 1, (uint64_t)(end - space) - 1};
    return true;
}

static moe_status vocab_put_merges(vocab_writer *w)
{
    json_ref merges = json_get(json_get(w->json, "model"), "merges"), parts[2];
    moe_str text[2];
    meta_put_array(&w->kv, "tokenizer.ggml.merges", META_STRING, json_count(merges));
    for (json_ref m = json_first(merges); m.node; m = json_next(merges, m)) {
        if (!vocab_merge_parts(m, parts, text) || memchr(text[0].data, ' ', (size_t)text[0].bytes))
            return fail(w->error, MOE_ERR_UNSUPPORTED, "model.merges",
                        "expected merges of two texts without blanks");
        meta_number(&w->kv, text[0].bytes + 1 + text[1].bytes, 8);
        meta_bytes(&w->kv, text[0].data, (size_t)text[0].bytes);
        meta_bytes(&w->kv, " ", 1);
        meta_bytes(&w->kv, text[1].data, (size_t)text[1].bytes);
    }
    return MOE_OK;
}

/* SentencePiece merges by the score of what comes of it; a tokenizer.json by the rank of the merge.
 * The merges of a result stand together, best score first, so the order in which results first
 * appear is that of the scores. */
static moe_status vocab_put_scores(vocab_writer *w)
{
    moe_mem *mem = w->source->mem;
    json_ref merges = json_get(json_get(w->json, "model"), "merges"), parts[2];
    moe_str text[2];
    text_buf joined = {.mem = mem};
    float next = 0;
    float *scores = mem_alloc(mem, w->n_vocab, sizeof *scores);
    if (!scores)
        return fail_memory(w->error, mem, "scores", w->n_vocab * sizeof *scores);
    for (uint32_t id = 0; id < w->n_vocab; id++)
        scores[id] = NAN;
    for (json_ref m = json_first(merges); m.node; m = json_next(merges, m)) {
        joined.n = 0;
        if (!vocab_merge_parts(m, parts, text) ||
            !buf_append(&joined, text[0].data, (size_t)text[0].bytes) ||
            !buf_append(&joined, text[1].data, (size_t)text[1].bytes))
            continue;
        const int32_t id = map_find(w->tok, joined.data, joined.n);
        if (id >= 0 && (uint32_t)id < w->n_vocab && isnan(scores[id]))
            scores[id] = next--;
    }
    for (uint32_t id = 0; id < w->n_vocab; id++)
        if (isnan(scores[id])) // nothing merges into it
            scores[id] = id < w->n_tokens && vocab_kind(w, id) == TOK_NORMAL ? next - 1 : 0;
    meta_put_array(&w->kv, "tokenizer.ggml.scores", META_F32, w->n_vocab);
    meta_bytes(&w->kv, scores, w->n_vocab * sizeof *scores);
    mem_free(mem, scores);
    buf_free(&joined);
    return MOE_OK;
}

/* ---------------------------------------------------------------------------- pre-tokenizer -- */

/* A pattern as the tables write it: line ends as escapes. */
static void vocab_spell(moe_str text, text_buf *out)
{
    out->n = 0;
    for (uint64_t i = 0; i < text.bytes; i++) {
        const char c = text.data[i];
        if (c == '\r' || c == '\n')
            buf_append(out, c == '\r' ? "\\r" : "\\n", 2);
        else
            buf_append(out, &c, 1);
    }
}

static int vocab_pattern_index(moe_str text, text_buf *spelled)
{
    vocab_spell(text, spelled);
    for (int i = 0; i < PAT_COUNT; i++)
        if (strlen(vocab_patterns[i]) == spelled->n &&
            !memcmp(vocab_patterns[i], spelled->data, spelled->n))
            return i;
    return -1;
}

/* Adds the patterns of one step; false if a table cannot express it. */
static bool vocab_step(json_ref step, text_buf *spelled, uint8_t list[8], uint32_t *n)
{
    json_ref type = json_get(step, "type"), pattern = json_get(json_get(step, "pattern"), "Regex");
    int index = -1;
    if (json_is(type, "ByteLevel")) {
        if (json_bool(json_get(step, "add_prefix_space"), false))
            return false;
        if (!json_bool(json_get(step, "use_regex"), true))
            return true;
        index = PAT_GPT2;
    } else if (json_is(type, "Digits")) {
        index = json_bool(json_get(step, "individual_digits"), false) ? PAT_DIGIT : PAT_DIGITS;
    } else if (json_is(type, "Split") && json_typeof(pattern) == JSON_STRING) {
        index = vocab_pattern_index((moe_str){pattern.node->as.text, pattern.node->n}, spelled);
    }
    if (index < 0 || *n == 8)
        return false;
    list[(*n)++] = (uint8_t)index;
    return true;
}

/* The name whose patterns are those of the tokenizer.json; NULL if none is. */
static const vocab_pre *vocab_pre_by_pattern(const vocab_writer *w)
{
    json_ref pre = json_get(w->json, "pre_tokenizer"), steps = json_get(pre, "pretokenizers");
    text_buf spelled = {.mem = w->source->mem};
    uint8_t list[8];
    uint32_t n = 0;
    const bool whole = w->tok->ignore_merges;
    bool known = json_is(json_get(pre, "type"), "Sequence");
    if (!known)
        known = vocab_step(pre, &spelled, list, &n);
    for (json_ref s = json_first(steps); s.node && known; s = json_next(steps, s))
        known = vocab_step(s, &spelled, list, &n);
    buf_free(&spelled);
    for (size_t i = 1; i < MOE_COUNT(vocab_pres) && known; i++) {
        const vocab_pre *p = &vocab_pres[i];
        if (p->n == n && !memcmp(p->patterns, list, n) && !(p->flags & PRE_MARKS) &&
            whole == ((p->flags & PRE_WHOLE_TOKENS) != 0))
            return p;
    }
    return NULL;
}

/* ------------------------------------------------------------------------------- special ids -- */

/* The id of a literal token, given as a string or as an object with "content"; -1: none. */
static int32_t vocab_id_of(const vocab_writer *w, json_ref v)
{
    if (json_typeof(v) == JSON_OBJECT)
        v = json_get(v, "content");
    for (uint32_t id = 0; id < w->n_tokens && json_typeof(v) == JSON_STRING; id++)
        if (w->tok->tokens[id].bytes == v.node->n && w->tok->tokens[id].kind != TOK_ABSENT &&
            !memcmp(w->tok->tokens[id].text, v.node->as.text, v.node->n))
            return (int32_t)id;
    return -1;
}

/* An id in config.json or generation_config.json: a number, or the first of a list. */
static moe_status vocab_config_id(const vocab_writer *w, json_ref from, const char *key,
                                  uint32_t index, int32_t *id)
{
    json_ref v = config_path(from, key);
    uint32_t value;
    if (json_typeof(v) == JSON_ARRAY) {
        json_ref list = v;
        for (v = json_first(list); v.node && index; index--)
            v = json_next(list, v);
    } else if (index) {
        return MOE_OK;
    }
    if (!v.node || json_double(v, 0) < 0)
        return MOE_OK;
    if (!json_id(v, w->n_vocab, &value))
        return fail(w->error, MOE_ERR_MODEL, key, "expected an id below %u, the number of tokens, "
                    "got %g", w->n_vocab, json_double(v, NAN));
    *id = (int32_t)value;
    return MOE_OK;
}

static moe_status vocab_put_role(vocab_writer *w, const char *role, int32_t otherwise, int32_t *id)
{
    char name[64], key[64];
    moe_status status = MOE_OK;
    snprintf(name, sizeof name, "%s_token", role);
    *id = vocab_id_of(w, json_get(w->tokenizer_config, name));
    snprintf(name, sizeof name, "%s_token_id", role);
    if (*id < 0)
        *id = otherwise;
    if (*id < 0)
        status = vocab_config_id(w, w->config, name, 0, id);
    snprintf(key, sizeof key, "tokenizer.ggml.%s_token_id",
             !strcmp(role, "unk") ? "unknown" : !strcmp(role, "pad") ? "padding" : role);
    if (!status && *id >= 0 && (uint32_t)*id < w->n_vocab)
        meta_put_u32(&w->kv, key, (uint32_t)*id);
    return status;
}

/* What the tokenizer's own file says; the configs may say it better. */
typedef struct vocab_roles {
    int32_t bos, eos, unknown, pad; // -1: nothing
    bool add_bos, add_eos;
} vocab_roles;

static moe_status vocab_put_roles(vocab_writer *w, const vocab_roles *own)
{
    int32_t bos = -1, eos = -1, other = -1;
    moe_status status = vocab_put_role(w, "bos", own->bos, &bos);
    if (!status)
        status = vocab_put_role(w, "eos", own->eos, &eos);
    if (!status)
        status = vocab_put_role(w, "unk", own->unknown, &other);
    if (!status)
        status = vocab_put_role(w, "pad", own->pad, &other);
    for (uint32_t i = 0; i < 8 && !status; i++) { // one more token that ends a turn
        int32_t id = -1;
        status = vocab_config_id(w, w->generation, "eos_token_id", i, &id);
        if (!status && id >= 0 && id != eos) {
            meta_put_u32(&w->kv, "tokenizer.ggml.eot_token_id", (uint32_t)id);
            break;
        }
    }
    // always said: what readers take for a missing key differs
    const moe_tokenizer *tok = w->tok;
    const bool before = own->add_bos || (tok->n_before && tok->template_ids[0] == bos);
    const bool after = own->add_eos || (tok->n_after && tok->template_ids[tok->n_before] == eos);
    meta_put_bool(&w->kv, "tokenizer.ggml.add_bos_token",
                  bos >= 0 && json_bool(json_get(w->tokenizer_config, "add_bos_token"), before));
    meta_put_bool(&w->kv, "tokenizer.ggml.add_eos_token",
                  eos >= 0 && json_bool(json_get(w->tokenizer_config, "add_eos_token"), after));
    meta_put_bool(&w->kv, "tokenizer.ggml.add_space_prefix", w->prefix);
    return status;
}

/* ----------------------------------------------------------------------------- chat template -- */

/* Several templates with names: the one named "default", and each of the others under its name. */
static void vocab_put_templates(vocab_writer *w, json_ref list)
{
    uint64_t n = 0;
    for (json_ref t = json_first(list); t.node; t = json_next(list, t)) {
        json_ref name = json_get(t, "name"), text = json_get(t, "template");
        char key[128];
        if (json_typeof(name) != JSON_STRING || json_typeof(text) != JSON_STRING ||
            name.node->n > 60)
            continue;
        const bool is_default = json_is(name, "default");
        snprintf(key, sizeof key, "tokenizer.chat_template%s%.*s", is_default ? "" : ".",
                 is_default ? 0 : (int)name.node->n, name.node->as.text);
        meta_put_text(&w->kv, key, text.node->as.text, text.node->n);
        n += !is_default;
    }
    if (!n)
        return;
    meta_put_array(&w->kv, "tokenizer.chat_templates", META_STRING, n);
    for (json_ref t = json_first(list); t.node; t = json_next(list, t)) {
        json_ref name = json_get(t, "name");
        if (json_typeof(name) == JSON_STRING && name.node->n <= 60 && !json_is(name, "default") &&
            json_typeof(json_get(t, "template")) == JSON_STRING)
            meta_text(&w->kv, name.node->as.text, name.node->n);
    }
}

/* A file of its own goes before the tokenizer's config. */
static moe_status vocab_put_template(vocab_writer *w)
{
    char *text;
    uint64_t bytes;
    json_doc doc;
    json_ref root;
    static const char key[] = "tokenizer.chat_template";
    moe_status status = conv_read_text(w->source, w->dir, "chat_template.jinja", false, &text,
                                       &bytes, w->error);
    if (status || text) {
        if (text)
            meta_put_text(&w->kv, key, text, (size_t)bytes);
        return status;
    }
    status = conv_read_json(w->source, w->dir, "chat_template.json", false, &doc, &root, w->error);
    if (status)
        return status;
    json_ref v = json_get(root.node ? root : w->tokenizer_config, "chat_template");
    if (json_typeof(v) == JSON_STRING)
        meta_put_text(&w->kv, key, v.node->as.text, v.node->n);
    else if (json_typeof(v) == JSON_ARRAY)
        vocab_put_templates(w, v);
    if (root.node)
        json_free(&doc);
    return MOE_OK;
}

/* ------------------------------------------------------------------------------------- probe -- */

/* Letters of many scripts, digits, case changes, contractions, blanks, line ends, code, symbols. */
static const char vocab_probe[] =
    "The quick brown fox jumps over the lazy dog, and then there is something interesting in the "
    "other's house. Hello world, it's DON'T we'll'VE I'm 3 12 123 1234 1234567890 x86_64 "
    "CamelCaseHTTPServer\n"
    "  two  three   spaces\t\ttabs \n\n\n newlines\r\n end   \n"
    "naïve café Straße ÀÉÎ Ελληνικά Русский язык עברית العربية हिन्दी ไทย 한국어 日本語のテスト "
    "中文测试123 東京タワー２０２４年 ½ ² Ⅷ\n"
    "for (int i = 0; i < n; i++) { a[i] += b->c * 0x1F; } // ===== !!! ??? ... --- ***\n"
    "https://example.org/a?b=c&d=%20#e user@mail.com $1,234.56 €99 50% 'quoted' \"double\" `code`\n"
    "🙂👍🏽👩‍👩‍👧 emoji… “quotes” – dash — ™ © ∑∫√ ≤ ≥ → ░▒▓ \u00A0nbsp\u3000wide aaaaaaaaaaaaaaaa "
    "            deep\n\t\tindent ______ a.b.c (x)[y]{z} don’t L'été d'accord\n";

typedef struct vocab_ids {
    moe_token *ids;
    size_t n;
} vocab_ids;

static moe_status vocab_encode(const vocab_writer *w, const moe_tokenizer *tok, vocab_ids *out)
{
    enum { CAPACITY = 4 * sizeof vocab_probe };
    out->n = 0;
    if (!out->ids && !(out->ids = mem_alloc(w->source->mem, CAPACITY, sizeof *out->ids)))
        return fail_memory(w->error, w->source->mem, "tokens", CAPACITY * sizeof *out->ids);
    return moe_tokenizer_encode(tok, vocab_probe, sizeof vocab_probe - 1, 0, out->ids, CAPACITY,
                                &out->n, w->error);
}

/* The ids that a reader of the metadata so far would give for the probe. `pre`: with this name. */
static moe_status vocab_encode_as_written(const vocab_writer *w, const char *pre, vocab_ids *out)
{
    moe_mem *mem = w->source->mem;
    text_buf file = {.mem = mem}, kv = {.mem = mem};
    conv_source s = {.mem = mem, .n_kv = w->source->n_kv};
    moe_directory *dir = NULL;
    moe_tokenizer *tok = NULL;
    meta_writer writer = {&kv, &s.n_kv, false};
    buf_append(&kv, w->source->kv.data, w->source->kv.n);
    if (pre)
        meta_put_string(&writer, "tokenizer.ggml.pre", pre);
    s.kv = kv;
    moe_status status = writer.failed ? fail_memory(w->error, mem, "metadata", kv.n)
                                      : meta_read_back(&dir, &s, &file, w->error);
    if (!status)
        status = tokenizer_from_directory(&tok, dir, mem, w->error);
    if (!status)
        status = vocab_encode(w, tok, out);
    tokenizer_free(tok);
    directory_close(dir);
    buf_free(&kv);
    buf_free(&file);
    return status;
}

static size_t vocab_same(const vocab_ids *a, const vocab_ids *b)
{
    size_t i = 0;
    while (i < a->n && i < b->n && a->ids[i] == b->ids[i])
        i++;
    return a->n == b->n && i == a->n ? SIZE_MAX : i;
}

static moe_status vocab_fail_ids(const vocab_writer *w, const char *pre)
{
    return fail(w->error, MOE_ERR_UNSUPPORTED, "tokenizer.json",
                "expected a tokenizer that GGUF's keys can express, got one whose ids differ from "
                "those of the written keys (pre-tokenizer %s); choose the closest with --pre NAME",
                pre ? pre : "none");
}

/* Finds and writes the name of the pre-tokenizer. */
static moe_status vocab_put_pre(vocab_writer *w)
{
    static const char key[] = "tokenizer.ggml.pre";
    vocab_ids want = {0}, got = {0};
    if (w->pre || !w->bytes) {
        meta_put_string(&w->kv, key, w->pre ? w->pre : "default");
        if (w->pre)
            return MOE_OK;
    }
    const vocab_pre *found = w->bytes ? vocab_pre_by_pattern(w) : NULL;
    moe_status status = vocab_encode(w, w->tok, &want);
    bool same = false;
    if (!status) {
        status = vocab_encode_as_written(w, found ? found->name : w->bytes ? "default" : NULL,
                                         &got);
        same = !status && vocab_same(&want, &got) == SIZE_MAX;
    }
    // other patterns may split alike: the same regular expression can be spelled in many ways
    for (size_t i = 0; i < MOE_COUNT(vocab_pres) && w->bytes && !found && !same && !status; i++) {
        const vocab_pre *p = &vocab_pres[i];
        if (p->flags & PRE_MARKS || (w->tok->ignore_merges != ((p->flags & PRE_WHOLE_TOKENS) != 0)))
            continue;
        if (i && p->n == p[-1].n && !memcmp(p->patterns, p[-1].patterns, p->n) && i > 1)
            continue; // tried under another name
        status = vocab_encode_as_written(w, p->name, &got);
        if (!status && vocab_same(&want, &got) == SIZE_MAX) {
            same = true;
            found = p;
            conv_note(w->source, "tokenizer.json: its pre-tokenizer is not known by its patterns; "
                      "%s gives the same ids for a test text", p->name);
        }
    }
    if (!status && !same)
        status = vocab_fail_ids(w, found ? found->name : NULL);
    if (!status && w->bytes)
        meta_put_string(&w->kv, key, found ? found->name : "default");
    mem_free(w->source->mem, want.ids);
    mem_free(w->source->mem, got.ids);
    return status;
}

/* ---------------------------------------------------------------------------- tokenizer.json -- */

/* A space in front of the text: a step of the normalizer or of the pre-tokenizer. */
static bool vocab_has_prefix(const moe_tokenizer *tok)
{
    for (uint32_t i = 0; i < tok->n_norm; i++)
        if (tok->norm[i].kind == NORM_PREPEND)
            return true;
    for (uint32_t i = 0; i < tok->n_pre; i++)
        if (tok->pre[i].kind == PRE_PREFIX_SPACE ||
            (tok->pre[i].kind == PRE_METASPACE && tok->pre[i].prepend != PREPEND_NEVER))
            return true;
    return false;
}

/* The embedding may have more rows than there are tokens, but not fewer, unless what is cut off are
 * added tokens, which a text model without the rows cannot use (Gemma 3's image token). */
static moe_status vocab_count(vocab_writer *w)
{
    const uint32_t n = w->tok->n_tokens;
    w->n_tokens = MOE_MIN(n, w->n_vocab);
    for (uint32_t id = w->n_vocab; id < n; id++)
        if (w->tok->tokens[id].model)
            return fail(w->error, MOE_ERR_MODEL, "tokenizer.json",
                        "expected at most %u tokens, one for each row of the embedding, got %u",
                        w->n_vocab, n);
    if (n > w->n_vocab)
        conv_note(w->source, "tokenizer.json: %u added tokens have no row in the embedding and are "
                  "left out", n - w->n_vocab);
    return MOE_OK;
}

static bool vocab_has_nfc(const moe_tokenizer *tok)
{
    for (uint32_t i = 0; i < tok->n_norm; i++)
        if (tok->norm[i].kind == NORM_NFC)
            return true;
    return false;
}

static moe_status vocab_put(vocab_writer *w)
{
    const moe_tokenizer *tok = w->tok;
    w->bytes = tok->byte_level;
    w->prefix = vocab_has_prefix(tok);
    if (tok->model != MODEL_BPE || (!w->bytes && !tok->byte_fallback))
        return fail(w->error, MOE_ERR_UNSUPPORTED, "tokenizer.json",
                    "expected byte-level BPE or BPE with byte fallback, got another model");
    moe_status status = vocab_count(w);
    if (status)
        return status;
    meta_put_string(&w->kv, "tokenizer.ggml.model", w->bytes ? "gpt2" : "llama");
    vocab_put_tokens(w);
    status = w->bytes ? vocab_put_merges(w) : vocab_put_scores(w);
    const vocab_roles own = {.bos = tok->n_before ? tok->template_ids[0] : -1, .eos = -1,
                             .unknown = w->bytes ? -1 : tok->unknown, .pad = -1};
    if (!status)
        status = vocab_put_roles(w, &own);
    if (!status && w->bytes && vocab_has_nfc(tok))
        meta_put_bool(&w->kv, "tokenizer.ggml.normalizer.nfc", true);
    if (!status)
        status = vocab_put_pre(w);
    return status ? status : vocab_put_template(w);
}

/* --------------------------------------------------------------------------- tokenizer.model -- */

/* Sets one added token, which may stand in for a piece. */
static moe_status vocab_sp_set(vocab_writer *w, sp_model *m, double id, json_ref text, bool special)
{
    if (json_typeof(text) != JSON_STRING || !text.node->n || !(id >= 0 && id < TOK_MAX_TOKENS))
        return fail(w->error, MOE_ERR_FORMAT, "added tokens",
                    "expected texts with ids from 0 to %d", TOK_MAX_TOKENS - 1);
    if (id >= m->capacity) {
        conv_note(w->source, "added token %.0f has no row in the embedding and is left out", id);
        return MOE_OK;
    }
    sp_piece *p = &m->pieces[(uint32_t)id];
    const moe_str got = {text.node->as.text, text.node->n};
    const bool same = p->text.bytes == got.bytes && !memcmp(p->text.data, got.data, got.bytes);
    if (same && (p->kind == TOK_UNKNOWN || p->kind == TOK_BYTE))
        return MOE_OK;
    p->text = got;
    p->kind = special || tok_looks_control(got.data, (size_t)got.bytes) ? TOK_CONTROL : TOK_USER;
    return MOE_OK;
}

/* The tokens that were added behind SentencePiece's back: in tokenizer_config.json by their ids, in
 * added_tokens.json by their texts. */
static moe_status vocab_sp_add(vocab_writer *w, sp_model *m)
{
    json_doc doc;
    json_ref by_text, by_id = json_get(w->tokenizer_config, "added_tokens_decoder");
    moe_status status = conv_read_json(w->source, w->dir, "added_tokens.json", false, &doc,
                                       &by_text, w->error);
    for (json_ref k = json_first(by_text); k.node && !status; k = json_next(by_text, k))
        status = vocab_sp_set(w, m, json_double(json_held(k), -1), k, false);
    for (json_ref k = json_first(by_id); k.node && !status; k = json_next(by_id, k)) {
        char digits[16], *end;
        snprintf(digits, sizeof digits, "%.*s", (int)MOE_MIN(k.node->n, 15u), k.node->as.text);
        const double id = strtod(digits, &end);
        status = vocab_sp_set(w, m, *end || end == digits ? -1 : id,
                              json_get(json_held(k), "content"),
                              json_bool(json_get(json_held(k), "special"), false));
    }
    if (by_text.node)
        json_free(&doc);
    return status;
}

/* Opens what was written so far. */
static moe_status vocab_open_written(vocab_writer *w)
{
    moe_directory *dir = NULL;
    text_buf file = {.mem = w->source->mem};
    moe_status status = w->kv.failed
                            ? fail_memory(w->error, w->source->mem, "metadata", w->source->kv.n)
                            : meta_read_back(&dir, w->source, &file, w->error);
    if (!status)
        status = tokenizer_from_directory(&w->tok, dir, w->source->mem, w->error);
    directory_close(dir);
    buf_free(&file);
    return status;
}

/* What tokenizer.model says of itself is all there is to go by: whether BOS goes in front of the
 * text stands in no field of it, but is what the models of these families were trained with. */
static moe_status vocab_put_sp(vocab_writer *w, const char *data, uint64_t bytes)
{
    sp_model m;
    sp_piece *pieces = arena_alloc(&w->source->arena, w->n_vocab, sizeof *pieces);
    if (!pieces)
        return fail_memory(w->error, w->source->mem, sp_subject, w->n_vocab * sizeof *pieces);
    moe_status status = sp_read(&m, pieces, w->n_vocab, data, bytes, w->error);
    if (!status)
        status = vocab_sp_add(w, &m);
    if (status)
        return status;
    sp_put(&m, &w->kv);
    if ((status = vocab_open_written(w)))
        return status;
    w->n_tokens = w->n_vocab;
    w->prefix = m.prefix;
    if (m.kind == SP_BPE && (m.squeeze || m.charsmap.bytes))
        conv_note(w->source, "tokenizer.model: other readers of GGUF do not know that BPE models "
                  "can have a map of characters, or drop blanks");
    uint32_t n_unused = 0;
    for (uint32_t id = 0; id < m.n; id++)
        n_unused += m.pieces[id].kind == TOK_UNUSED;
    if (m.kind == SP_BPE && n_unused)
        conv_note(w->source,
                  "tokenizer.model: SentencePiece takes its %u unused pieces apart again; "
                  "readers of GGUF may give their ids", n_unused);
    const vocab_roles own = {m.bos, m.eos, m.unknown, m.pad, .add_bos = true};
    status = vocab_put_roles(w, &own);
    return status ? status : vocab_put_template(w);
}

/* ------------------------------------------------------------------------------------- entry -- */

static moe_status vocab_convert_json(vocab_writer *w)
{
    moe_model_options options;
    moe_model_options_init(&options);
    options.path = conv_text(w->source, "%s/tokenizer.json", w->dir);
    if (!options.path)
        return fail_memory(w->error, w->source->mem, "path", strlen(w->dir));
    moe_status status = moe_tokenizer_open(&w->tok, &options, w->error);
    return status ? status : vocab_put(w);
}

/* Reads the tokenizer's files, if there are any, and adds their keys to the source. */
static moe_status vocab_convert(vocab_writer *w)
{
    json_doc doc = {0}, config_doc = {0};
    conv_source *s = w->source;
    char *text = NULL;
    uint64_t bytes = 0;
    moe_status status = conv_read_json(s, w->dir, "tokenizer.json", false, &doc, &w->json,
                                       w->error);
    if (!status && !w->json.node)
        status = conv_read_text(s, w->dir, "tokenizer.model", false, &text, &bytes, w->error);
    if (!status && !w->json.node && !text)
        conv_note(s, "%s: no tokenizer.json and no tokenizer.model: the file will have no "
                  "tokenizer", w->dir);
    if (!status)
        status = conv_read_json(s, w->dir, "tokenizer_config.json", false, &config_doc,
                                &w->tokenizer_config, w->error);
    w->kv = (meta_writer){&s->kv, &s->n_kv, false};
    if (!status && w->json.node)
        status = vocab_convert_json(w);
    else if (!status && text)
        status = vocab_put_sp(w, text, bytes);
    if (!status && w->kv.failed)
        status = fail_memory(w->error, s->mem, "metadata", s->kv.n);
    moe_tokenizer_close(w->tok);
    if (w->json.node)
        json_free(&doc);
    if (w->tokenizer_config.node)
        json_free(&config_doc);
    return status;
}

#endif
