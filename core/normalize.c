/* core/normalize.c - the steps that rewrite text before it is split: Unicode normalization forms,
 * case, accents, replacements, SentencePiece's character map.
 *
 * Well-formed UTF-8 flows in and out. The decomposition data is utf8proc's, but only for characters
 * that the tables of unicode_data.h call active: what newer versions of Unicode added is left
 * alone, as the tokenizers' training tools do. Must never: take quadratic time over marks. */
#ifndef MOE_CORE_NORMALIZE_C
#define MOE_CORE_NORMALIZE_C

#include <utf8proc.h>

#include "tokenizer.h"

typedef struct norm_char {
    int32_t cp;
    uint8_t ccc; // canonical combining class
} norm_char;

static bool norm_put(text_buf *out, uint32_t cp)
{
    if (!buf_reserve(out, 4))
        return false;
    out->n += utf8_encode(cp, out->data + out->n);
    return true;
}

/* ----------------------------------------------------------------------- normalization forms -- */

static uint8_t norm_class(uint32_t cp)
{
    return UNICODE_IN(unicode_norm_active, cp)
               ? (uint8_t)utf8proc_get_property((utf8proc_int32_t)cp)->combining_class : 0;
}

/* Decomposes the text into out, an array of norm_char. */
static bool norm_decompose(const uint8_t *p, size_t bytes, bool compatibility, text_buf *out)
{
    int options = UTF8PROC_DECOMPOSE | UTF8PROC_STABLE | (compatibility ? UTF8PROC_COMPAT : 0);
    for (size_t i = 0, length; i < bytes; i += length) {
        uint32_t cp = utf8_next(p + i, &length);
        utf8proc_int32_t parts[64];
        utf8proc_ssize_t n = 1;
        int last_boundclass = 0;
        parts[0] = (utf8proc_int32_t)cp;
        if (UNICODE_IN(unicode_norm_active, cp))
            n = utf8proc_decompose_char((utf8proc_int32_t)cp, parts, 64,
                                        (utf8proc_option_t)options, &last_boundclass);
        if (n < 1 || n > 64) {
            parts[0] = (utf8proc_int32_t)cp;
            n = 1;
        }
        for (utf8proc_ssize_t k = 0; k < n; k++) {
            norm_char c = {.cp = parts[k], .ccc = norm_class((uint32_t)parts[k])};
            if (!buf_append(out, &c, sizeof c))
                return false;
        }
    }
    return true;
}

/* Sorts c[0..n) by class, stably: a counting sort, for runs of any length. */
static void norm_sort(norm_char *c, size_t n, norm_char *scratch)
{
    size_t start[257] = {0};
    for (size_t i = 0; i < n; i++)
        start[c[i].ccc + 1]++;
    for (size_t i = 1; i < 257; i++)
        start[i] += start[i - 1];
    for (size_t i = 0; i < n; i++)
        scratch[start[c[i].ccc]++] = c[i];
    memcpy(c, scratch, n * sizeof *c);
}

/* Puts runs of combining characters into canonical order. */
static void norm_order(norm_char *c, size_t n, norm_char *scratch)
{
    for (size_t i = 0; i < n;) {
        size_t end = i;
        bool sorted = true;
        for (; end < n && c[end].ccc; end++)
            sorted &= end == i || c[end - 1].ccc <= c[end].ccc;
        if (!sorted)
            norm_sort(c + i, end - i, scratch);
        i = MOE_MAX(end, i + 1);
    }
}

/* Composes c[0..n), which starts with a base, and writes the result. */
static bool norm_compose(const norm_char *c, size_t n, int32_t *work, text_buf *out)
{
    for (size_t i = 0; i < n; i++)
        work[i] = c[i].cp;
    utf8proc_ssize_t m = (utf8proc_ssize_t)n;
    if (n > 1)
        m = utf8proc_normalize_utf32(work, m, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    for (utf8proc_ssize_t i = 0; i < m; i++)
        if (!norm_put(out, (uint32_t)work[i]))
            return false;
    return true;
}

static bool norm_form(norm_kind kind, const uint8_t *p, size_t bytes, text_buf *out)
{
    bool compose = kind == NORM_NFC || kind == NORM_NFKC;
    bool compatibility = kind == NORM_NFKC || kind == NORM_NFKD;
    // below these bytes nothing changes: U+0300 for NFC, U+00A0 for the others
    uint8_t limit = kind == NORM_NFC ? 0xCC : 0xC2;
    size_t plain = 0;
    while (plain < bytes && p[plain] < limit)
        plain++;
    if (plain == bytes)
        return buf_append(out, p, bytes);
    bool ok = false;
    text_buf chars = {.mem = out->mem}, scratch = {.mem = out->mem};
    if (!norm_decompose(p, bytes, compatibility, &chars) ||
        !buf_reserve(&scratch, chars.n) || !buf_reserve(out, bytes))
        goto done;
    norm_char *c = (norm_char *)(void *)chars.data;
    size_t n = chars.n / sizeof *c;
    norm_order(c, n, (norm_char *)(void *)scratch.data);
    for (size_t i = 0, end; i < n; i = end) {
        end = i + 1;
        if (!compose) {
            if (!norm_put(out, (uint32_t)c[i].cp))
                goto done;
            continue;
        }
        // A base that compositions begin with, and what follows it. Any other character stands
        // alone; marks behind it find no base then.
        bool base = UNICODE_IN(unicode_norm_base, (uint32_t)c[i].cp) ||
                    UNICODE_IN(unicode_norm_active, (uint32_t)c[i].cp);
        while (base && end < n && UNICODE_IN(unicode_norm_active, (uint32_t)c[end].cp))
            end++;
        if (!norm_compose(c + i, end - i, (int32_t *)(void *)scratch.data, out))
            goto done;
    }
    ok = true;
done:
    buf_free(&chars);
    buf_free(&scratch);
    return ok;
}

/* ------------------------------------------------------------------------- character filters -- */

static bool norm_is_cjk(uint32_t c) // BERT's list
{
    static const uint32_t cjk[][2] = {{0x3400, 0x4DBF}, {0x4E00, 0x9FFF}, {0xF900, 0xFAFF},
                                      {0x20000, 0x2A6DF}, {0x2A700, 0x2B81F}, {0x2B920, 0x2CEAF},
                                      {0x2F800, 0x2FA1F}};
    return UNICODE_IN(cjk, c);
}

/* What SentencePiece's "nmt" rules remove (0) and turn into a space; other characters stay. */
static uint32_t norm_nmt(uint32_t c)
{
    if ((c >= 1 && c <= 8) || c == 0xB || (c >= 0xE && c <= 0x1F) || c == 0x7F || c == 0x8F ||
        c == 0x9F)
        return 0;
    if (c == 9 || c == 0xA || c == 0xC || c == 0xD || c == 0x1680 || (c >= 0x200B && c <= 0x200F) ||
        c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xFEFF || c == 0xFFFD)
        return ' ';
    return c;
}

static bool norm_filter(norm_kind kind, const uint8_t *p, size_t bytes, text_buf *out)
{
    for (size_t i = 0, length; i < bytes; i += length) {
        uint32_t c = utf8_next(p + i, &length), to = c;
        switch (kind) {
        case NORM_LOWERCASE:
            to = unicode_to_lower(c);
            if (c == 0x130 && !norm_put(out, 'i'))
                return false;
            if (c == 0x130)
                to = 0x307;
            break;
        case NORM_STRIP_ACCENTS:
            if (UNICODE_IN(unicode_accents, c))
                continue;
            break;
        case NORM_BERT_ACCENTS: // of the marks only those without a width
            if (UNICODE_IN(unicode_accents, c) && unicode_category(c) == GC_MN)
                continue;
            break;
        case NORM_BERT_CLEAN:
            if (UNICODE_IN(unicode_bert_removed, c))
                continue;
            to = unicode_is_space(c) ? ' ' : c;
            break;
        case NORM_NMT:
            to = norm_nmt(c);
            if (!to && c)
                continue;
            break;
        default: // NORM_BERT_CJK
            if (norm_is_cjk(c) && (!norm_put(out, ' ') || !norm_put(out, c)))
                return false;
            if (norm_is_cjk(c))
                to = ' ';
        }
        if (!norm_put(out, to))
            return false;
    }
    return true;
}

static bool norm_strip(const norm_step *step, const uint8_t *p, size_t bytes, text_buf *out)
{
    const uint8_t *end = p + bytes;
    size_t length;
    while (step->left && p < end && unicode_is_space(utf8_next(p, &length)))
        p += length;
    while (step->right && p < end && unicode_is_space(utf8_next(utf8_back(end), &length)))
        end = utf8_back(end);
    return buf_append(out, p, (size_t)(end - p));
}

/* SentencePiece's remove_extra_whitespaces: spaces in a row are one, none at the ends. */
static bool norm_squeeze(const uint8_t *p, size_t bytes, text_buf *out)
{
    size_t start = out->n;
    for (size_t i = 0; i < bytes; i++)
        if ((p[i] != ' ' || (out->n > start && out->data[out->n - 1] != ' ')) &&
            !buf_append(out, p + i, 1))
            return false;
    if (out->n > start && out->data[out->n - 1] == ' ')
        out->n--;
    return true;
}

static moe_status norm_replace(tok_run *run, const norm_step *step, const uint8_t *p, size_t bytes,
                               text_buf *out)
{
    const uint8_t *end = p + bytes, *done = p, *from = p, *start, *stop;
    run->re.text = p;
    run->re.end = end;
    while (regex_find(step->pattern, &run->re, from, &start, &stop)) {
        if (!buf_append(out, done, (size_t)(start - done)) ||
            !buf_append(out, step->text, step->text_bytes))
            return run_fail(run, MOE_ERR_MEMORY);
        from = done = stop;
        if (start == stop) {
            if (from == end)
                break;
            from += utf8_length(*from);
        }
    }
    if (run->re.status != MOE_OK)
        return run_fail(run, run->re.status);
    return buf_append(out, done, (size_t)(end - done)) ? MOE_OK : run_fail(run, MOE_ERR_MEMORY);
}

#include "charsmap.c"

/* ------------------------------------------------------------------------------------ steps -- */

static moe_status norm_step_run(tok_run *run, const norm_step *step, const uint8_t *p, size_t bytes,
                                text_buf *out)
{
    bool ok = true;
    switch (step->kind) {
    case NORM_NFC:
    case NORM_NFD:
    case NORM_NFKC:
    case NORM_NFKD:
        ok = norm_form(step->kind, p, bytes, out);
        break;
    case NORM_PREPEND:
        ok = (!bytes || buf_append(out, step->text, step->text_bytes)) && buf_append(out, p, bytes);
        break;
    case NORM_REPLACE:
        return norm_replace(run, step, p, bytes, out);
    case NORM_STRIP:
        ok = norm_strip(step, p, bytes, out);
        break;
    case NORM_SQUEEZE:
        ok = norm_squeeze(p, bytes, out);
        break;
    case NORM_CHARSMAP:
    case NORM_CHARSMAP_LONGEST:
        ok = charsmap_apply(step, p, bytes, out);
        break;
    default:
        ok = norm_filter(step->kind, p, bytes, out);
    }
    return ok ? MOE_OK : run_fail(run, MOE_ERR_MEMORY);
}

/* A text may grow to this: no rules need more, and a few that replace a letter by a page, one after
 * the other, would take all memory. */
static size_t norm_max_bytes(size_t bytes)
{
    return bytes < SIZE_MAX / 64 - 16 ? 64 * (bytes + 16) : SIZE_MAX;
}

/* Runs all steps on *p, *bytes and points them at the result, which is overwritten by the next. */
static moe_status norm_run(tok_run *run, const uint8_t **p, size_t *bytes)
{
    const size_t max_bytes = norm_max_bytes(*bytes);
    for (uint32_t i = 0; i < run->tok->n_norm; i++) {
        text_buf *out = &run->norm[i & 1];
        out->n = 0;
        out->max_bytes = max_bytes;
        moe_status status = norm_step_run(run, &run->tok->norm[i], *p, *bytes, out);
        if (out->over)
            return fail(run->error, MOE_ERR_LIMIT, "normalizer",
                        "expected rules that make at most %zu bytes of this text, got more",
                        max_bytes);
        if (status != MOE_OK)
            return status;
        *p = out->data;
        *bytes = out->n;
    }
    return MOE_OK;
}

#endif
