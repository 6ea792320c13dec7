/* core/tokenizer_json.c - a tokenizer from a Hugging Face tokenizer.json: vocabulary, merges and
 * added tokens here; the lists of steps in tokenizer_steps.c.
 *
 * The file holds no roles: BOS is what the template puts in front, EOS the first of the usual names
 * that is there. Must never: guess about what it does not know; an unknown step is an error that
 * names it. */
#ifndef MOE_CORE_TOKENIZER_JSON_C
#define MOE_CORE_TOKENIZER_JSON_C

#include "json.c"
#include "tokenizer_load.c"
#include "tokenizer_steps.c"

/* -------------------------------------------------------------------------------- vocabulary -- */

static const char *hf_model_type(json_ref model)
{
    static const char *const types[] = {"BPE", "Unigram", "WordPiece", "WordLevel"};
    json_ref type = json_get(model, "type");
    for (size_t i = 0; i < MOE_COUNT(types); i++)
        if (json_is(type, types[i]))
            return types[i];
    if (type.node) // a new kind
        return NULL;
    return json_get(model, "merges").node ? "BPE"
           : json_typeof(json_get(model, "vocab")) == JSON_ARRAY ? "Unigram" : "WordPiece";
}

/* The largest id in the file; ids are dense but for a few holes. */
static moe_status hf_count(hf_loader *h, json_ref vocab, json_ref added, uint64_t *n)
{
    uint32_t id, largest = 0;
    uint64_t limit = 2 * ((uint64_t)json_count(vocab) + json_count(added)) + (1 << 16);
    limit = MOE_MIN(limit, (uint64_t)TOK_MAX_TOKENS);
    *n = json_typeof(vocab) == JSON_ARRAY ? json_count(vocab) : 0;
    if (json_typeof(vocab) == JSON_OBJECT)
        for (json_ref k = json_first(vocab); k.node; k = json_next(vocab, k)) {
            if (!json_id(json_held(k), (uint32_t)limit, &id))
                return fail(h->error, MOE_ERR_FORMAT, "model.vocab", "expected ids from 0 to %llu, "
                            "\"%.*s\" has another", (unsigned long long)limit - 1,
                            (int)MOE_MIN(k.node->n, 100u), k.node->as.text);
            largest = MOE_MAX(largest, id);
            *n = (uint64_t)largest + 1;
        }
    for (json_ref a = json_first(added); a.node; a = json_next(added, a)) {
        if (!json_id(json_get(a, "id"), (uint32_t)limit, &id))
            return fail(h->error, MOE_ERR_FORMAT, "added_tokens", "expected ids from 0 to %llu",
                        (unsigned long long)limit - 1);
        *n = MOE_MAX(*n, (uint64_t)id + 1);
    }
    return MOE_OK;
}

static moe_status hf_set(hf_loader *h, uint32_t id, json_ref text, double score)
{
    if (json_typeof(text) != JSON_STRING)
        return fail(h->error, MOE_ERR_FORMAT, "model.vocab", "expected a string for token %u", id);
    if (h->tok->tokens[id].kind != TOK_ABSENT)
        return fail(h->error, MOE_ERR_FORMAT, "model.vocab", "two tokens have the id %u", id);
    moe_status status = tok_set(h->tok, id, text.node->as.text, text.node->n, TOK_NORMAL, score,
                                "model.vocab", h->error);
    h->tok->tokens[id].model = true;
    return status;
}

static moe_status hf_load_vocab(hf_loader *h, json_ref vocab)
{
    moe_status status = MOE_OK;
    uint32_t id = 0;
    if (json_typeof(vocab) == JSON_ARRAY) { // unigram: [text, score]
        for (json_ref v = json_first(vocab); v.node && status == MOE_OK; v = json_next(vocab, v)) {
            json_ref text = json_first(v), score = {NULL, NULL};
            if (json_count(v) == 2)
                score = json_next(v, text);
            if (json_typeof(score) != JSON_NUMBER)
                return fail(h->error, MOE_ERR_FORMAT, "model.vocab", "expected a text and a score "
                            "at %u", id);
            status = hf_set(h, id++, text, json_double(score, 0));
        }
        return status;
    }
    for (json_ref k = json_first(vocab); k.node && status == MOE_OK; k = json_next(vocab, k)) {
        json_id(json_held(k), TOK_MAX_TOKENS, &id);
        status = hf_set(h, id, k, 0);
    }
    return status;
}

/* Gives added tokens their kind; those that the model does not know get their text here. */
static moe_status hf_mark_added(hf_loader *h, json_ref added)
{
    uint32_t id = 0;
    for (json_ref a = json_first(added); a.node; a = json_next(added, a)) {
        json_ref text = json_get(a, "content");
        json_id(json_get(a, "id"), TOK_MAX_TOKENS, &id);
        tok_entry *t = &h->tok->tokens[id];
        if (json_typeof(text) != JSON_STRING || !text.node->n)
            return fail(h->error, MOE_ERR_FORMAT, "added_tokens", "token %u has no content", id);
        bool same = t->kind != TOK_ABSENT && t->bytes == text.node->n &&
                    !memcmp(t->text, text.node->as.text, t->bytes);
        bool model = same && t->model;
        moe_status status = same ? MOE_OK
                                 : tok_set(h->tok, id, text.node->as.text, text.node->n, TOK_USER,
                                           0, "added_tokens", h->error);
        if (status != MOE_OK)
            return status;
        t->special = json_bool(json_get(a, "special"), false);
        t->kind = t->special || tok_looks_control(t->text, t->bytes) ? TOK_CONTROL : TOK_USER;
        t->model = model && t->kind == TOK_USER;
    }
    return MOE_OK;
}

static moe_status hf_merge(hf_loader *h, text_buf *key, uint32_t rank, json_ref v)
{
    static const char subject[] = "model.merges";
    if (json_typeof(v) == JSON_ARRAY && json_count(v) == 2) {
        json_ref a = json_first(v), b = json_next(v, a);
        if (json_typeof(a) == JSON_STRING && json_typeof(b) == JSON_STRING)
            return merges_add(h->tok, key, rank, a.node->as.text, a.node->n, b.node->as.text,
                              b.node->n, subject, h->error);
    }
    if (json_typeof(v) == JSON_STRING) {
        const char *text = v.node->as.text, *end = text + v.node->n;
        const char *space = memchr(text, ' ', v.node->n);
        if (space && !memchr(space + 1, ' ', (size_t)(end - space - 1)))
            return merges_add(h->tok, key, rank, text, (size_t)(space - text), space + 1,
                              (size_t)(end - space - 1), subject, h->error);
    }
    return fail(h->error, MOE_ERR_FORMAT, subject, "expected two texts at %u", rank);
}

static moe_status hf_load_merges(hf_loader *h, json_ref merges)
{
    text_buf key = {.mem = h->tok->mem};
    uint32_t rank = 0;
    moe_status status = merges_reserve(h->tok, json_count(merges), "model.merges", h->error);
    for (json_ref v = json_first(merges); v.node && status == MOE_OK; v = json_next(merges, v))
        status = hf_merge(h, &key, rank++, v);
    buf_free(&key);
    return status;
}

/* ------------------------------------------------------------------------------ added tokens -- */

/* Normalized tokens are looked for in normalized text, so their own text is normalized too. */
static moe_status hf_normalized_text(hf_loader *h, tok_added *item)
{
    tok_run run = {.tok = h->tok, .error = h->error};
    run.re.mem = run.norm[0].mem = run.norm[1].mem = h->tok->mem;
    run.re.steps_left = h->steps_left;
    const uint8_t *p = item->text;
    size_t bytes = item->bytes;
    moe_status status = norm_run(&run, &p, &bytes);
    h->steps_left = run.re.steps_left;
    if (status == MOE_OK && p != item->text) {
        item->text = arena_copy(&h->tok->arena, p, bytes, 1);
        item->bytes = (uint32_t)bytes;
        if (!item->text)
            status = fail_memory(h->error, h->tok->mem, "added_tokens", bytes);
    }
    regex_run_free(&run.re);
    buf_free(&run.norm[0]);
    buf_free(&run.norm[1]);
    return status;
}

static moe_status hf_load_added(hf_loader *h, json_ref added)
{
    moe_tokenizer *tok = h->tok;
    uint32_t n = json_count(added), id = 0;
    if (!added_reserve(&tok->added, tok, n) || !added_reserve(&tok->added_normalized, tok, n))
        return fail_memory(h->error, tok->mem, "added_tokens", n);
    for (json_ref a = json_first(added); a.node; a = json_next(added, a)) {
        bool special = json_bool(json_get(a, "special"), false);
        bool normalized = json_bool(json_get(a, "normalized"), !special);
        tok_added_set *set = normalized ? &tok->added_normalized : &tok->added;
        json_id(json_get(a, "id"), TOK_MAX_TOKENS, &id);
        added_add(set, tok, id);
        tok_added *item = &set->items[set->n - 1];
        item->single_word = json_bool(json_get(a, "single_word"), false);
        item->lstrip = json_bool(json_get(a, "lstrip"), false);
        item->rstrip = json_bool(json_get(a, "rstrip"), false);
        moe_status status = normalized && tok->n_norm ? hf_normalized_text(h, item) : MOE_OK;
        if (status != MOE_OK)
            return status;
        set->n -= item->bytes == 0; // normalized to nothing
    }
    added_sort(&tok->added);
    added_sort(&tok->added_normalized);
    return MOE_OK;
}

/* ------------------------------------------------------------------------------------- model -- */

/* A string of the model that may be null or missing. */
static moe_status hf_text(hf_loader *h, json_ref v, const char **out)
{
    if (json_typeof(v) != JSON_STRING)
        return MOE_OK;
    *out = arena_copy(&h->tok->arena, v.node->as.text, v.node->n, 1);
    return *out ? MOE_OK : fail_memory(h->error, h->tok->mem, "model", v.node->n);
}

static moe_status hf_load_unknown(hf_loader *h, json_ref model)
{
    moe_tokenizer *tok = h->tok;
    json_ref text = json_get(model, "unk_token"), id = json_get(model, "unk_id");
    uint32_t value;
    if (json_typeof(text) == JSON_STRING) {
        for (uint32_t i = 0; i < tok->n_tokens && tok->unknown < 0; i++)
            if (tok->tokens[i].bytes == text.node->n && tok->tokens[i].kind != TOK_ABSENT &&
                !memcmp(tok->tokens[i].text, text.node->as.text, text.node->n))
                tok->unknown = (int32_t)i;
    } else if (json_typeof(id) == JSON_NUMBER) {
        if (!json_id(id, tok->n_tokens, &value))
            return fail(h->error, MOE_ERR_FORMAT, "model.unk_id", "expected an id below %u",
                        tok->n_tokens);
        tok->unknown = (int32_t)value;
    }
    return MOE_OK;
}

/* The fields of the model beside its vocabulary. */
static moe_status hf_load_model(hf_loader *h, json_ref model, const char *type)
{
    moe_tokenizer *tok = h->tok;
    moe_status status = MOE_OK;
    tok->byte_fallback = json_bool(json_get(model, "byte_fallback"), false);
    tok->fuse_unknown = json_bool(json_get(model, "fuse_unk"), false);
    tok->ignore_merges = json_bool(json_get(model, "ignore_merges"), false);
    if (!strcmp(type, "BPE")) {
        tok->model = MODEL_BPE;
        status = hf_text(h, json_get(model, "continuing_subword_prefix"), &tok->prefix);
        if (status == MOE_OK)
            status = hf_text(h, json_get(model, "end_of_word_suffix"), &tok->suffix);
    } else if (!strcmp(type, "Unigram")) {
        tok->model = MODEL_UNIGRAM;
    } else { // a WordLevel word is a WordPiece word that has no parts
        bool level = !strcmp(type, "WordLevel");
        tok->model = MODEL_WORDPIECE;
        tok->whole_words = level;
        tok->prefix = level ? "" : "##";
        double most = json_double(json_get(model, "max_input_chars_per_word"), 100);
        tok->max_word_chars = level ? UINT32_MAX : most >= 0 && most < 1e9 ? (uint32_t)most : 100;
        status = hf_text(h, json_get(model, "continuing_subword_prefix"), &tok->prefix);
    }
    if (tok->byte_level && (*tok->prefix || *tok->suffix))
        return fail(h->error, MOE_ERR_UNSUPPORTED, "model", "bytes with a prefix or suffix");
    return status;
}

/* BOS and EOS are not named in the file. */
static void hf_find_roles(moe_tokenizer *tok)
{
    static const char *const bos[] = {"<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>",
        "<\uFF5Cbegin\u2581of\u2581sentence\uFF5C>", "[CLS]"};
    static const char *const eos[] = {"</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "<|return|>",
        "<|end_of_text|>", "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
        "<|endoftext|>", "[SEP]"};
    if (tok->n_before)
        tok->bos = tok->template_ids[0];
    for (size_t i = 0; i < MOE_COUNT(bos) && tok->bos < 0; i++)
        for (uint32_t id = 0; id < tok->n_tokens && tok->bos < 0; id++)
            if (tok->tokens[id].kind == TOK_CONTROL && !strcmp(tok->tokens[id].text, bos[i]))
                tok->bos = (int32_t)id;
    for (size_t i = 0; i < MOE_COUNT(eos) && tok->eos < 0; i++)
        for (uint32_t id = 0; id < tok->n_tokens && tok->eos < 0; id++)
            if (tok->tokens[id].kind == TOK_CONTROL && !strcmp(tok->tokens[id].text, eos[i]))
                tok->eos = (int32_t)id;
    tok_mark_ends(tok);
}

static moe_status hf_load(hf_loader *h, json_ref root)
{
    moe_tokenizer *tok = h->tok;
    json_ref model = json_get(root, "model"), vocab = json_get(model, "vocab");
    json_ref added = json_get(root, "added_tokens");
    uint64_t n = 0;
    if (json_typeof(vocab) < JSON_ARRAY)
        return fail(h->error, MOE_ERR_FORMAT, "model.vocab", "expected a vocabulary; is this a "
                    "tokenizer.json?");
    const char *type = hf_model_type(model);
    if (!type || (json_typeof(vocab) == JSON_ARRAY) != !strcmp(type, "Unigram"))
        return fail(h->error, MOE_ERR_UNSUPPORTED, "model.type", "expected BPE, Unigram, WordPiece "
                    "or WordLevel with a vocabulary of its kind");
    moe_status status = hf_load_steps(h, root);
    if (status == MOE_OK)
        status = hf_load_model(h, model, type);
    if (status == MOE_OK)
        status = hf_count(h, vocab, added, &n);
    if (status == MOE_OK)
        status = tok_reserve(tok, n, "model.vocab", h->error);
    if (status == MOE_OK)
        status = hf_load_vocab(h, vocab);
    if (status == MOE_OK)
        status = hf_mark_added(h, added);
    if (status == MOE_OK)
        status = tok_index(tok, "model.vocab", h->error);
    if (status == MOE_OK)
        status = hf_load_unknown(h, model);
    if (status == MOE_OK && tok->model == MODEL_BPE)
        status = hf_load_merges(h, json_get(model, "merges"));
    if (status == MOE_OK && tok->model == MODEL_UNIGRAM)
        status = unigram_prepare(tok, "model.vocab", h->error);
    if (status == MOE_OK)
        status = hf_load_added(h, added);
    if (status == MOE_OK)
        status = hf_load_template(h, json_get(root, "post_processor"));
    if (status == MOE_OK)
        status = hf_load_decoder(h, json_get(root, "decoder"));
    if (status != MOE_OK)
        return status;
    // a cut is only safe where all characters that the model sees are its own
    tok->split_marks = tok->model == MODEL_BPE && !*tok->prefix && !*tok->suffix &&
                       !tok->ignore_merges && tok_can_split_marks(tok);
    hf_find_roles(tok);
    return MOE_OK;
}

/* Fills a tokenizer from the text of a tokenizer.json, which is not kept. */
static moe_status json_tokenizer_load(moe_tokenizer *tok, const char *data, uint64_t bytes,
                                      moe_error *error)
{
    json_doc doc;
    text_arena strings = {.mem = tok->mem};
    hf_loader h = {.tok = tok, .error = error, .steps_left = 10000000};
    moe_status status = json_parse(&doc, data, bytes, &strings, "tokenizer.json", error);
    if (status == MOE_OK) {
        status = hf_load(&h, (json_ref){&doc, doc.nodes});
        json_free(&doc);
    }
    arena_free(&strings);
    return status;
}

#endif
