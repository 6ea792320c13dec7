/* core/special.c - added tokens: literal strings that are cut out of the text before anything else
 * happens to it.
 *
 * Which ones: a token of kind TOK_USER always (runs of spaces, HTML tags: text that the vocabulary
 * spells as one token), a token of kind TOK_CONTROL only if the caller asked for it with
 * MOE_ENCODE_PARSE_SPECIAL. The longest one that begins first wins, as with Hugging Face, and a
 * control token that is not wanted still shadows what it contains.
 *
 * Must never: turn a user's text into a control token. */
#ifndef MOE_CORE_SPECIAL_C
#define MOE_CORE_SPECIAL_C

#include "tokenizer.h"

static int added_compare(const void *a, const void *b)
{
    const tok_added *x = a, *y = b;
    int order = memcmp(x->text, y->text, MOE_MIN(x->bytes, y->bytes));
    if (order)
        return order;
    return x->bytes != y->bytes ? (x->bytes > y->bytes) - (x->bytes < y->bytes)
                                : (x->id > y->id) - (x->id < y->id);
}

/* Puts the items in order. Empty ones must not be among them. */
static void added_sort(tok_added_set *set)
{
    if (set->n)
        qsort(set->items, set->n, sizeof *set->items, added_compare);
    uint32_t i = 0;
    for (uint32_t b = 0; b <= 256; b++) {
        while (i < set->n && set->items[i].text[0] < b)
            i++;
        set->first[b] = i;
    }
}

/* Of the items low..high, which agree in k bytes and have more, keeps those whose next one is c. */
static void added_narrow(const tok_added_set *set, uint32_t *low, uint32_t *high, uint32_t k,
                         uint8_t c)
{
    uint32_t a = *low, b = *high;
    while (a < b) { // the first item whose byte k is >= c
        uint32_t mid = a + (b - a) / 2;
        if (set->items[mid].text[k] < c)
            a = mid + 1;
        else
            b = mid;
    }
    *low = a;
    b = *high;
    while (a < b) { // the first item whose byte k is > c
        uint32_t mid = a + (b - a) / 2;
        if (set->items[mid].text[k] <= c)
            a = mid + 1;
        else
            b = mid;
    }
    *high = a;
}

/* The longest item that p[0..n) begins with, or NULL. The candidates narrow byte by byte. */
static const tok_added *added_match(const tok_added_set *set, const uint8_t *p, size_t n)
{
    uint32_t low = set->first[p[0]], high = set->first[p[0] + 1];
    const tok_added *best = NULL;
    for (uint32_t k = 1; low < high; k++) {
        if (set->items[low].bytes == k) { // equal texts: the first one, which has the lowest id
            best = &set->items[low];
            while (low < high && set->items[low].bytes == k)
                low++;
        }
        if (k >= n)
            break;
        added_narrow(set, &low, &high, k, p[k]);
    }
    return best;
}

static bool added_alone(const uint8_t *text, const uint8_t *start, const uint8_t *end,
                        const uint8_t *text_end)
{
    size_t length;
    return (start == text || !unicode_is_word(utf8_next(utf8_back(start), &length))) &&
           (end == text_end || !unicode_is_word(utf8_next(end, &length)));
}

typedef moe_status (*added_piece_fn)(tok_run *run, const uint8_t *text, size_t bytes, bool first);

/* Cuts text[0..bytes) at the items of `set`: emits them, and passes what lies between to `piece`.
 * `first`: the text is the start of the input. */
static moe_status added_split(tok_run *run, const tok_added_set *set, const uint8_t *text,
                              size_t bytes, bool first, added_piece_fn piece)
{
    if (!set->n)
        return bytes ? piece(run, text, bytes, first) : MOE_OK;
    const uint8_t *end = text + bytes, *done = text;
    moe_status status = MOE_OK;
    for (const uint8_t *p = text; p < end && status == MOE_OK;) {
        if (set->first[p[0]] == set->first[p[0] + 1]) {
            p++;
            continue;
        }
        const tok_added *item = added_match(set, p, (size_t)(end - p));
        if (!item) {
            p += utf8_length(*p);
            continue;
        }
        const uint8_t *start = p, *stop = p + item->bytes;
        size_t length;
        p = stop;
        if ((item->control && !(run->flags & MOE_ENCODE_PARSE_SPECIAL)) ||
            (item->single_word && !added_alone(text, start, stop, end)))
            continue;
        while (item->lstrip && start > done &&
               unicode_is_space(utf8_next(utf8_back(start), &length)))
            start = utf8_back(start);
        while (item->rstrip && stop < end && unicode_is_space(utf8_next(stop, &length)))
            stop += length;
        if (start > done)
            status = piece(run, done, (size_t)(start - done), first && done == text);
        if (status == MOE_OK)
            run_emit(run, (int32_t)item->id);
        done = stop;
        p = MOE_MAX(p, stop);
    }
    if (status == MOE_OK && done < end)
        status = piece(run, done, (size_t)(end - done), first && done == text);
    return status;
}

#endif
