/* core/tokenizer_steps.c - the stages of a tokenizer.json: normalizer, pre-tokenizer,
 * post-processor and decoder, each a step or a sequence of steps, become the tables of
 * moe_tokenizer.
 *
 * Each kind of step has a function, found by the name that the file gives. A step that is not known
 * is an error: leaving it out would give other tokens. */
#ifndef MOE_CORE_TOKENIZER_STEPS_C
#define MOE_CORE_TOKENIZER_STEPS_C

#include "json.c"
#include "tokenizer_load.c"

typedef struct hf_loader {
    moe_tokenizer *tok;
    moe_error *error;
    const char *stage;    // for messages
    bool fused;           // the decoder has joined its tokens
    bool byte_decoder;
    uint32_t n_replaced;  // steps of the decoder that went over all tokens
    uint64_t steps_left;  // of patterns, for all added tokens together
} hf_loader;

typedef struct hf_step {
    const char *type;
    moe_status (*load)(hf_loader *h, json_ref step);
} hf_step;

/* Runs the loader of a step, or of each step of a sequence, whose list is called `list`. */
static moe_status hf_steps(hf_loader *h, json_ref step, const char *list, const hf_step *known,
                           size_t n_known, uint32_t depth)
{
    json_ref type = json_get(step, "type");
    if (json_is(type, "Sequence") && depth < 8) {
        json_ref steps = json_get(step, list);
        moe_status status = MOE_OK;
        for (json_ref s = json_first(steps); s.node && status == MOE_OK; s = json_next(steps, s))
            status = hf_steps(h, s, list, known, n_known, depth + 1);
        return status;
    }
    for (size_t i = 0; i < n_known; i++)
        if (json_is(type, known[i].type))
            return known[i].load(h, step);
    if (json_typeof(type) != JSON_STRING)
        return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected an object with a \"type\"");
    return fail(h->error, MOE_ERR_UNSUPPORTED, h->stage, "the type \"%.*s\" is not known",
                (int)MOE_MIN(type.node->n, 60u), type.node->as.text);
}

/* ---------------------------------------------------------------------------------- patterns -- */

/* {"String": "..."} or {"Regex": "..."} */
static moe_status hf_pattern(hf_loader *h, json_ref pattern, const regex **out)
{
    json_ref literal = json_get(pattern, "String"), re = json_get(pattern, "Regex");
    json_ref text = literal.node ? literal : re;
    if (json_typeof(pattern) == JSON_STRING)
        text = literal = pattern;
    if (json_typeof(text) != JSON_STRING)
        return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected a pattern: a String or a Regex");
    text_buf buf = {.mem = h->tok->mem};
    bool ok = true;
    for (uint32_t i = 0; ok && i < text.node->n; i++) {
        char c = text.node->as.text[i];
        bool escape = literal.node && c > ' ' && c < 0x7F &&
                      !((c | 32) >= 'a' && (c | 32) <= 'z') && !(c >= '0' && c <= '9');
        ok = (!escape || buf_append(&buf, "\\", 1)) && buf_append(&buf, &c, 1);
    }
    regex *made = NULL;
    moe_status status = ok && buf_append(&buf, "", 1)
                            ? regex_new(&made, (const char *)buf.data, buf.n - 1, &h->tok->arena,
                                        h->stage, h->error)
                            : fail_memory(h->error, h->tok->mem, h->stage, text.node->n);
    buf_free(&buf);
    *out = made;
    return status;
}

static moe_status hf_regex(hf_loader *h, const char *pattern, const regex **out)
{
    regex *made;
    moe_status status = regex_new(&made, pattern, strlen(pattern), &h->tok->arena, h->stage,
                                  h->error);
    *out = made;
    return status;
}

/* -------------------------------------------------------------------------------- normalizer -- */

static moe_status hf_add_norm(hf_loader *h, norm_step step)
{
    moe_tokenizer *tok = h->tok;
    if (tok->n_norm == TOK_MAX_STEPS)
        return fail(h->error, MOE_ERR_LIMIT, h->stage, "more than %d steps", TOK_MAX_STEPS);
    tok->norm[tok->n_norm++] = step;
    return MOE_OK;
}

static moe_status hf_norm_plain(hf_loader *h, json_ref s)
{
    static const struct {
        const char *type;
        norm_kind kind;
    } kinds[] = {{"NFC", NORM_NFC}, {"NFD", NORM_NFD}, {"NFKC", NORM_NFKC}, {"NFKD", NORM_NFKD},
                 {"Lowercase", NORM_LOWERCASE}, {"StripAccents", NORM_STRIP_ACCENTS},
                 {"Nmt", NORM_NMT}};
    for (size_t i = 0; i < MOE_COUNT(kinds); i++)
        if (json_is(json_get(s, "type"), kinds[i].type))
            return hf_add_norm(h, (norm_step){.kind = kinds[i].kind});
    return MOE_OK;
}

static moe_status hf_norm_text(hf_loader *h, json_ref text, norm_step *step)
{
    if (json_typeof(text) != JSON_STRING)
        return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected a string to put in");
    step->text = arena_copy(&h->tok->arena, text.node->as.text, text.node->n, 1);
    step->text_bytes = text.node->n;
    return step->text ? MOE_OK : fail_memory(h->error, h->tok->mem, h->stage, text.node->n);
}

static moe_status hf_norm_prepend(hf_loader *h, json_ref s)
{
    norm_step step = {.kind = NORM_PREPEND};
    moe_status status = hf_norm_text(h, json_get(s, "prepend"), &step);
    return status == MOE_OK ? hf_add_norm(h, step) : status;
}

static moe_status hf_norm_replace(hf_loader *h, json_ref s)
{
    norm_step step = {.kind = NORM_REPLACE};
    moe_status status = hf_norm_text(h, json_get(s, "content"), &step);
    if (status == MOE_OK)
        status = hf_pattern(h, json_get(s, "pattern"), &step.pattern);
    return status == MOE_OK ? hf_add_norm(h, step) : status;
}

static moe_status hf_norm_strip(hf_loader *h, json_ref s)
{
    return hf_add_norm(h, (norm_step){.kind = NORM_STRIP,
                                      .left = json_bool(json_get(s, "strip_left"), true),
                                      .right = json_bool(json_get(s, "strip_right"), true)});
}

static moe_status hf_norm_bert(hf_loader *h, json_ref s)
{
    bool lower = json_bool(json_get(s, "lowercase"), true);
    bool strip = json_bool(json_get(s, "strip_accents"), lower);
    const struct {
        bool wanted;
        norm_kind kind;
    } steps[] = {{json_bool(json_get(s, "clean_text"), true), NORM_BERT_CLEAN},
                 {json_bool(json_get(s, "handle_chinese_chars"), true), NORM_BERT_CJK},
                 {strip, NORM_NFD}, {strip, NORM_BERT_ACCENTS}, {lower, NORM_LOWERCASE}};
    moe_status status = MOE_OK;
    for (size_t i = 0; i < MOE_COUNT(steps) && status == MOE_OK; i++)
        if (steps[i].wanted)
            status = hf_add_norm(h, (norm_step){.kind = steps[i].kind});
    return status;
}

/* Decodes base64 into `out`; false if it is malformed. */
static bool hf_base64(json_ref text, text_buf *out)
{
    static const char letters[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0, n_bits = 0, n = text.node->n;
    while (n && text.node->as.text[n - 1] == '=')
        n--;
    for (uint32_t i = 0; i < n; i++) {
        char c = text.node->as.text[i];
        const char *at = c ? strchr(letters, c) : NULL;
        if (!at)
            return false;
        bits = bits << 6 | (uint32_t)(at - letters);
        n_bits += 6;
        if (n_bits >= 8) {
            n_bits -= 8;
            uint8_t byte = (uint8_t)(bits >> n_bits);
            if (!buf_append(out, &byte, 1))
                return false;
        }
    }
    return true;
}

static moe_status hf_norm_charsmap(hf_loader *h, json_ref s)
{
    static const char subject[] = "precompiled_charsmap";
    json_ref map = json_get(s, subject);
    norm_step step = {.kind = NORM_CHARSMAP};
    text_buf data = {.mem = h->tok->mem};
    if (!map.node || json_typeof(map) == JSON_NULL)
        return MOE_OK;
    moe_status status = json_typeof(map) != JSON_STRING || !hf_base64(map, &data)
                            ? fail(h->error, MOE_ERR_FORMAT, subject, "expected base64")
                            : charsmap_load(&step, data.data, data.n, &h->tok->arena, subject,
                                            h->error);
    buf_free(&data);
    return status == MOE_OK ? hf_add_norm(h, step) : status;
}

static moe_status hf_norm_bytelevel(hf_loader *h, json_ref s)
{
    (void)s;
    h->tok->byte_level = true;
    return MOE_OK;
}

static const hf_step hf_normalizers[] = {
    {"NFC", hf_norm_plain}, {"NFD", hf_norm_plain}, {"NFKC", hf_norm_plain},
    {"NFKD", hf_norm_plain}, {"Lowercase", hf_norm_plain}, {"StripAccents", hf_norm_plain},
    {"Nmt", hf_norm_plain}, {"Prepend", hf_norm_prepend}, {"Replace", hf_norm_replace},
    {"Strip", hf_norm_strip}, {"BertNormalizer", hf_norm_bert}, {"Precompiled", hf_norm_charsmap},
    {"ByteLevel", hf_norm_bytelevel},
};

/* ----------------------------------------------------------------------------- pre-tokenizer -- */

static moe_status hf_add_pre(hf_loader *h, pre_step step, const char *pattern)
{
    moe_tokenizer *tok = h->tok;
    if (tok->n_pre == TOK_MAX_STEPS)
        return fail(h->error, MOE_ERR_LIMIT, h->stage, "more than %d steps", TOK_MAX_STEPS);
    if (tok->byte_level)
        return fail(h->error, MOE_ERR_UNSUPPORTED, h->stage, "a step behind ByteLevel");
    moe_status status = pattern ? hf_regex(h, pattern, &step.pattern) : MOE_OK;
    if (status == MOE_OK)
        tok->pre[tok->n_pre++] = step;
    return status;
}

static moe_status hf_behavior(hf_loader *h, json_ref v, pre_behavior *behavior)
{
    static const struct {
        const char *name, *old_name;
        pre_behavior behavior;
    } names[] = {{"Removed", "removed", PRE_REMOVED}, {"Isolated", "isolated", PRE_ISOLATED},
                 {"MergedWithPrevious", "merged_with_previous", PRE_MERGED_WITH_PREVIOUS},
                 {"MergedWithNext", "merged_with_next", PRE_MERGED_WITH_NEXT},
                 {"Contiguous", "contiguous", PRE_CONTIGUOUS}};
    for (size_t i = 0; i < MOE_COUNT(names); i++)
        if (json_is(v, names[i].name) || json_is(v, names[i].old_name)) {
            *behavior = names[i].behavior;
            return MOE_OK;
        }
    return fail(h->error, MOE_ERR_FORMAT, h->stage, "unknown behavior of a split");
}

static moe_status hf_pre_split(hf_loader *h, json_ref s)
{
    pre_step step = {.kind = PRE_SPLIT, .invert = json_bool(json_get(s, "invert"), false)};
    moe_status status = hf_behavior(h, json_get(s, "behavior"), &step.behavior);
    if (status == MOE_OK)
        status = hf_pattern(h, json_get(s, "pattern"), &step.pattern);
    return status == MOE_OK ? hf_add_pre(h, step, NULL) : status;
}

static moe_status hf_pre_bytelevel(hf_loader *h, json_ref s)
{
    moe_status status = MOE_OK;
    if (json_bool(json_get(s, "add_prefix_space"), true))
        status = hf_add_pre(h, (pre_step){.kind = PRE_PREFIX_SPACE}, NULL);
    if (status == MOE_OK && json_bool(json_get(s, "use_regex"), true))
        status = hf_add_pre(h, (pre_step){.kind = PRE_SPLIT, .behavior = PRE_ISOLATED},
                            "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
                            "|\\s+(?!\\S)|\\s+");
    h->tok->byte_level = true;
    return status;
}

/* The mark of a Metaspace step, one character. */
static moe_status hf_mark(hf_loader *h, json_ref s, uint8_t mark[4], uint32_t *bytes)
{
    json_ref v = json_get(s, "replacement");
    if (json_typeof(v) != JSON_STRING || !v.node->n ||
        utf8_length((uint8_t)v.node->as.text[0]) != v.node->n)
        return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected a replacement of one character");
    memcpy(mark, v.node->as.text, v.node->n);
    *bytes = v.node->n;
    return MOE_OK;
}

static pre_prepend hf_prepend(json_ref s)
{
    json_ref scheme = json_get(s, "prepend_scheme");
    if (json_is(scheme, "never"))
        return PREPEND_NEVER;
    if (json_is(scheme, "first"))
        return PREPEND_FIRST;
    return scheme.node || json_bool(json_get(s, "add_prefix_space"), true) ? PREPEND_ALWAYS
                                                                           : PREPEND_NEVER;
}

static moe_status hf_pre_metaspace(hf_loader *h, json_ref s)
{
    pre_step step = {.kind = PRE_METASPACE, .prepend = hf_prepend(s)};
    moe_status status = hf_mark(h, s, step.mark, &step.mark_bytes);
    if (status == MOE_OK)
        status = hf_add_pre(h, step, NULL);
    if (status != MOE_OK || !json_bool(json_get(s, "split"), true))
        return status;
    char pattern[8] = "\\";
    memcpy(pattern + (step.mark_bytes == 1), step.mark, step.mark_bytes);
    return hf_add_pre(h, (pre_step){.kind = PRE_SPLIT, .behavior = PRE_MERGED_WITH_NEXT}, pattern);
}

static moe_status hf_pre_whitespace(hf_loader *h, json_ref s)
{
    (void)s;
    return hf_add_pre(h, (pre_step){.kind = PRE_SPLIT, .behavior = PRE_REMOVED, .invert = true},
                      "\\p{splitter word}+|[^\\p{splitter word}\\s]+");
}

static moe_status hf_pre_whitespace_split(hf_loader *h, json_ref s)
{
    (void)s;
    return hf_add_pre(h, (pre_step){.kind = PRE_SPLIT, .behavior = PRE_REMOVED}, "\\s");
}

static moe_status hf_pre_punctuation(hf_loader *h, json_ref s)
{
    pre_step step = {.kind = PRE_SPLIT, .behavior = PRE_ISOLATED};
    json_ref behavior = json_get(s, "behavior");
    moe_status status = behavior.node ? hf_behavior(h, behavior, &step.behavior) : MOE_OK;
    return status == MOE_OK ? hf_add_pre(h, step, "\\p{splitter punctuation}") : status;
}

static moe_status hf_pre_digits(hf_loader *h, json_ref s)
{
    bool single = json_bool(json_get(s, "individual_digits"), false);
    return hf_add_pre(h, (pre_step){.kind = PRE_SPLIT,
                                    .behavior = single ? PRE_ISOLATED : PRE_CONTIGUOUS}, "\\p{N}");
}

static moe_status hf_pre_bert(hf_loader *h, json_ref s)
{
    moe_status status = hf_pre_whitespace_split(h, s);
    return status == MOE_OK ? hf_add_pre(h, (pre_step){.kind = PRE_SPLIT, .behavior = PRE_ISOLATED},
                                         "\\p{splitter punctuation}") : status;
}

static moe_status hf_pre_delimiter(hf_loader *h, json_ref s)
{
    pre_step step = {.kind = PRE_SPLIT, .behavior = PRE_REMOVED};
    moe_status status = hf_pattern(h, json_get(s, "delimiter"), &step.pattern);
    return status == MOE_OK ? hf_add_pre(h, step, NULL) : status;
}

static moe_status hf_pre_fixed_length(hf_loader *h, json_ref s)
{
    double length = json_double(json_get(s, "length"), 5);
    char pattern[32];
    if (!(length >= 1 && length <= REGEX_MAX_COUNT))
        return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected a length from 1 to %d",
                    REGEX_MAX_COUNT);
    snprintf(pattern, sizeof pattern, "[\\s\\S]{1,%d}", (int)length);
    return hf_add_pre(h, (pre_step){.kind = PRE_SPLIT, .behavior = PRE_ISOLATED}, pattern);
}

static const hf_step hf_pre_tokenizers[] = {
    {"Split", hf_pre_split}, {"ByteLevel", hf_pre_bytelevel}, {"Metaspace", hf_pre_metaspace},
    {"Whitespace", hf_pre_whitespace}, {"WhitespaceSplit", hf_pre_whitespace_split},
    {"Punctuation", hf_pre_punctuation}, {"Digits", hf_pre_digits},
    {"BertPreTokenizer", hf_pre_bert}, {"CharDelimiterSplit", hf_pre_delimiter},
    {"FixedLength", hf_pre_fixed_length},
};

static moe_status hf_load_steps(hf_loader *h, json_ref root)
{
    json_ref norm = json_get(root, "normalizer"), pre = json_get(root, "pre_tokenizer");
    moe_status status = MOE_OK;
    h->stage = "normalizer";
    if (json_typeof(norm) != JSON_NULL)
        status = hf_steps(h, norm, "normalizers", hf_normalizers, MOE_COUNT(hf_normalizers), 0);
    bool bytes = h->tok->byte_level; // said by the normalizer: what follows would split its signs
    h->stage = "pre_tokenizer";
    if (status == MOE_OK && json_typeof(pre) != JSON_NULL)
        status = hf_steps(h, pre, "pretokenizers", hf_pre_tokenizers,
                          MOE_COUNT(hf_pre_tokenizers), 0);
    h->tok->byte_level |= bytes;
    return status;
}

/* ---------------------------------------------------------------------------- post-processor -- */

static moe_status hf_template_put(hf_loader *h, bool before, int32_t id)
{
    moe_tokenizer *tok = h->tok;
    if (tok->n_before + tok->n_after == TOK_MAX_TEMPLATE)
        return fail(h->error, MOE_ERR_LIMIT, h->stage, "more than %d tokens", TOK_MAX_TEMPLATE);
    tok->template_ids[tok->n_before + tok->n_after] = id;
    if (before)
        tok->n_before++;
    else
        tok->n_after++;
    return MOE_OK;
}

static moe_status hf_post_template(hf_loader *h, json_ref s)
{
    json_ref single = json_get(s, "single"), specials = json_get(s, "special_tokens");
    bool before = true;
    moe_status status = MOE_OK;
    for (json_ref part = json_first(single); part.node; part = json_next(single, part)) {
        json_ref name = json_get(json_get(part, "SpecialToken"), "id"), ids = {NULL, NULL};
        if (json_get(part, "Sequence").node) {
            before = false;
            continue;
        }
        for (json_ref k = json_first(specials); k.node && name.node; k = json_next(specials, k))
            if (json_typeof(name) == JSON_STRING && k.node->n == name.node->n &&
                !memcmp(k.node->as.text, name.node->as.text, k.node->n))
                ids = json_get(json_held(k), "ids");
        if (!json_count(ids))
            return fail(h->error, MOE_ERR_FORMAT, h->stage, "a token of the template is not among "
                        "its special_tokens");
        for (json_ref v = json_first(ids); v.node && status == MOE_OK; v = json_next(ids, v)) {
            uint32_t id = 0;
            status = json_id(v, h->tok->n_tokens, &id)
                         ? hf_template_put(h, before, (int32_t)id)
                         : fail(h->error, MOE_ERR_FORMAT, h->stage, "expected ids below %u",
                                h->tok->n_tokens);
        }
        if (status != MOE_OK)
            return status;
    }
    return MOE_OK;
}

/* {"cls": ["[CLS]", 101], "sep": ["[SEP]", 102]} */
static moe_status hf_post_pair(hf_loader *h, json_ref s)
{
    static const char *const names[] = {"cls", "sep"};
    for (int i = 0; i < 2; i++) {
        json_ref pair = json_get(s, names[i]), id = json_first(pair);
        uint32_t value = 0;
        if (json_count(pair) == 2)
            id = json_next(pair, id);
        if (!json_id(id, h->tok->n_tokens, &value))
            return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected a token and an id below %u "
                        "for \"%s\"", h->tok->n_tokens, names[i]);
        moe_status status = hf_template_put(h, i == 0, (int32_t)value);
        if (status != MOE_OK)
            return status;
    }
    return MOE_OK;
}

static moe_status hf_ignore(hf_loader *h, json_ref s) // moves offsets only
{
    (void)h;
    (void)s;
    return MOE_OK;
}

static const hf_step hf_post_processors[] = {
    {"TemplateProcessing", hf_post_template}, {"ByteLevel", hf_ignore},
    {"BertProcessing", hf_post_pair}, {"RobertaProcessing", hf_post_pair},
};

static moe_status hf_load_template(hf_loader *h, json_ref post)
{
    h->stage = "post_processor";
    return json_typeof(post) == JSON_NULL
               ? MOE_OK
               : hf_steps(h, post, "processors", hf_post_processors,
                          MOE_COUNT(hf_post_processors), 0);
}

/* ----------------------------------------------------------------------------------- decoder -- */

static moe_status hf_replace_all(hf_loader *h, const char *from, size_t from_bytes, const char *to,
                                 size_t to_bytes)
{
    moe_status status = MOE_OK;
    if (h->n_replaced++ == TOK_MAX_STEPS)
        return fail(h->error, MOE_ERR_LIMIT, h->stage, "more than %d steps", TOK_MAX_STEPS);
    for (uint32_t id = 0; id < h->tok->n_tokens && status == MOE_OK; id++)
        if (h->tok->tokens[id].kind != TOK_BYTE)
            status = tok_replace_out(h->tok, &h->tok->tokens[id], from, from_bytes, to, to_bytes,
                                     h->error);
    return status;
}

static moe_status hf_dec_replace(hf_loader *h, json_ref s)
{
    json_ref from = json_get(json_get(s, "pattern"), "String"), to = json_get(s, "content");
    if (json_typeof(from) != JSON_STRING || !from.node->n || json_typeof(to) != JSON_STRING ||
        h->fused)
        return fail(h->error, MOE_ERR_UNSUPPORTED, h->stage, "Replace of anything but a String, or "
                    "behind Fuse");
    return hf_replace_all(h, from.node->as.text, from.node->n, to.node->as.text, to.node->n);
}

static moe_status hf_dec_byte_fallback(hf_loader *h, json_ref s)
{
    (void)s;
    for (uint32_t id = 0; id < h->tok->n_tokens; id++) {
        tok_entry *t = &h->tok->tokens[id];
        int byte = tok_byte_value(t->text, t->bytes);
        if (byte < 0 || t->kind == TOK_ABSENT)
            continue;
        uint8_t value = (uint8_t)byte;
        t->out = arena_copy(&h->tok->arena, &value, 1, 1);
        if (!t->out)
            return fail_memory(h->error, h->tok->mem, h->stage, 1);
        t->out_bytes = 1;
        t->kind = TOK_BYTE;
    }
    h->tok->bytes_one_by_one = true;
    return MOE_OK;
}

static moe_status hf_dec_fuse(hf_loader *h, json_ref s)
{
    (void)s;
    h->fused = true;
    return MOE_OK;
}

static moe_status hf_dec_strip(hf_loader *h, json_ref s)
{
    json_ref content = json_get(s, "content");
    double start = json_double(json_get(s, "start"), 0), stop = json_double(json_get(s, "stop"), 0);
    if (!json_is(content, " ") || !(start >= 0 && start <= 1000) || stop != 0 || !h->fused)
        return fail(h->error, MOE_ERR_UNSUPPORTED, h->stage, "Strip of anything but spaces at the "
                    "start, behind Fuse");
    h->tok->strip_start = (uint32_t)start;
    return MOE_OK;
}

static moe_status hf_dec_metaspace(hf_loader *h, json_ref s)
{
    uint8_t mark[4];
    uint32_t bytes = 0;
    moe_status status = hf_mark(h, s, mark, &bytes);
    if (hf_prepend(s) != PREPEND_NEVER)
        h->tok->decoder = DECODE_METASPACE;
    return status == MOE_OK ? hf_replace_all(h, (const char *)mark, bytes, " ", 1) : status;
}

static moe_status hf_dec_wordpiece(hf_loader *h, json_ref s)
{
    json_ref prefix = json_get(s, "prefix");
    h->tok->decoder = DECODE_WORDPIECE;
    h->tok->cleanup = json_bool(json_get(s, "cleanup"), true);
    if (!json_is(prefix, h->tok->prefix) || !prefix.node->n)
        return fail(h->error, MOE_ERR_UNSUPPORTED, h->stage, "a prefix that is not the model's");
    return MOE_OK;
}

static moe_status hf_dec_bpe(hf_loader *h, json_ref s) // the end of a word becomes a space
{
    json_ref suffix = json_get(s, "suffix");
    if (json_typeof(suffix) != JSON_STRING || !suffix.node->n)
        return fail(h->error, MOE_ERR_FORMAT, h->stage, "expected a suffix");
    h->tok->decoder = DECODE_SUFFIX;
    return hf_replace_all(h, suffix.node->as.text, suffix.node->n, " ", 1);
}

static moe_status hf_dec_bytelevel(hf_loader *h, json_ref s)
{
    (void)s;
    h->byte_decoder = true;
    return MOE_OK;
}

static const hf_step hf_decoders[] = {
    {"ByteLevel", hf_dec_bytelevel}, {"Replace", hf_dec_replace},
    {"ByteFallback", hf_dec_byte_fallback}, {"Fuse", hf_dec_fuse}, {"Strip", hf_dec_strip},
    {"Metaspace", hf_dec_metaspace}, {"WordPiece", hf_dec_wordpiece}, {"BPEDecoder", hf_dec_bpe},
};

static moe_status hf_load_decoder(hf_loader *h, json_ref decoder)
{
    h->stage = "decoder";
    h->tok->decoder = DECODE_PLAIN;
    if (json_typeof(decoder) == JSON_NULL)
        h->tok->decoder = DECODE_SPACED;
    else {
        moe_status status = hf_steps(h, decoder, "decoders", hf_decoders,
                                     MOE_COUNT(hf_decoders), 0);
        if (status != MOE_OK)
            return status;
    }
    if (h->byte_decoder != h->tok->byte_level)
        return fail(h->error, MOE_ERR_UNSUPPORTED, h->stage, "ByteLevel must stand in "
                    "pre_tokenizer and decoder, or in neither");
    return MOE_OK;
}

#endif
