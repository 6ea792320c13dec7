/* core/pretokenize.c - splitting a piece of text into the words that the model sees.
 *
 * Each step splits what the step before it made; a part flows down the list as soon as it is found,
 * so nothing is stored but what a step rewrites. Must never: look at the text around the piece. */
#ifndef MOE_CORE_PRETOKENIZE_C
#define MOE_CORE_PRETOKENIZE_C

#include "bpe.c"
#include "unigram.c"
#include "wordpiece.c"

static moe_status pre_run(tok_run *run, uint32_t step, const uint8_t *p, size_t bytes, bool first);

static moe_status model_encode(tok_run *run, const uint8_t *p, size_t bytes)
{
    switch (run->tok->model) {
    case MODEL_UNIGRAM:
        return unigram_encode(run, p, bytes);
    case MODEL_WORDPIECE:
        return wordpiece_encode(run, p, bytes);
    default:
        return bpe_encode(run, p, bytes);
    }
}

/* Segments of a split, in order, held back as long as the next may still join. */
typedef struct pre_state {
    const uint8_t *text;
    const uint8_t *start, *end; // the part that is held back; start == NULL: none
    bool last_match;            // whether the last segment was a match
    bool first;
} pre_state;

static moe_status pre_flush(tok_run *run, uint32_t step, pre_state *s)
{
    const uint8_t *start = s->start;
    s->start = NULL;
    if (!start || start == s->end)
        return MOE_OK;
    return pre_run(run, step + 1, start, (size_t)(s->end - start), s->first && start == s->text);
}

/* The next segment, a match or what lies between matches. It may be empty. */
static moe_status pre_segment(tok_run *run, uint32_t step, pre_state *s, const uint8_t *start,
                              const uint8_t *end, bool match)
{
    pre_behavior behavior = run->tok->pre[step].behavior;
    bool joins = false;
    if (behavior == PRE_MERGED_WITH_PREVIOUS)
        joins = match && !s->last_match;
    else if (behavior == PRE_MERGED_WITH_NEXT)
        joins = !match && s->last_match;
    else if (behavior == PRE_CONTIGUOUS)
        joins = match == s->last_match;
    s->last_match = match;
    if (joins && s->start) {
        s->end = end;
        return MOE_OK;
    }
    moe_status status = pre_flush(run, step, s);
    if (behavior == PRE_REMOVED && match)
        return status;
    s->start = start;
    s->end = end;
    return status;
}

static moe_status pre_split(tok_run *run, uint32_t step, const uint8_t *p, size_t bytes, bool first)
{
    const pre_step *pre = &run->tok->pre[step];
    const uint8_t *end = p + bytes, *done = p, *from = p, *start, *stop;
    pre_state s = {.text = p, .first = first};
    moe_status status = MOE_OK;
    while (status == MOE_OK) {
        run->re.text = p; // the steps below use the same matcher
        run->re.end = end;
        if (!regex_find(pre->pattern, &run->re, from, &start, &stop))
            break;
        if (start == stop && start == done && done > p) { // no empty match behind a match
            if (from == end)
                break;
            from += utf8_length(*from);
            continue;
        }
        if (start > done)
            status = pre_segment(run, step, &s, done, start, pre->invert);
        if (status == MOE_OK)
            status = pre_segment(run, step, &s, start, stop, !pre->invert);
        from = done = stop;
        if (start == stop) {
            if (from == end)
                break;
            from += utf8_length(*from);
        }
    }
    if (run->re.status != MOE_OK)
        return run_fail(run, run->re.status);
    if (status == MOE_OK && done < end)
        status = pre_segment(run, step, &s, done, end, pre->invert);
    return status == MOE_OK ? pre_flush(run, step, &s) : status;
}

static moe_status pre_prefix_space(tok_run *run, uint32_t step, const uint8_t *p, size_t bytes,
                                   bool first)
{
    if (p[0] == ' ')
        return pre_run(run, step + 1, p, bytes, first);
    text_buf *buf = &run->pre[step];
    buf->n = 0;
    if (!buf_append(buf, " ", 1) || !buf_append(buf, p, bytes))
        return run_fail(run, MOE_ERR_MEMORY);
    return pre_run(run, step + 1, buf->data, buf->n, first);
}

static moe_status pre_metaspace(tok_run *run, uint32_t step, const uint8_t *p, size_t bytes,
                                bool first)
{
    const pre_step *pre = &run->tok->pre[step];
    text_buf *buf = &run->pre[step];
    size_t mark_bytes = pre->mark_bytes;
    bool marked = p[0] == ' ' || (bytes >= mark_bytes && !memcmp(p, pre->mark, mark_bytes));
    buf->n = 0;
    if (!buf_reserve(buf, bytes + mark_bytes))
        return run_fail(run, MOE_ERR_MEMORY);
    if (!marked && (pre->prepend == PREPEND_ALWAYS || (pre->prepend == PREPEND_FIRST && first)))
        buf_append(buf, pre->mark, mark_bytes);
    for (size_t i = 0, start = 0; i <= bytes; i++) {
        if (i < bytes && p[i] != ' ')
            continue;
        if (!buf_append(buf, p + start, i - start) ||
            (i < bytes && !buf_append(buf, pre->mark, mark_bytes)))
            return run_fail(run, MOE_ERR_MEMORY);
        start = i + 1;
    }
    return pre_run(run, step + 1, buf->data, buf->n, first);
}

/* Sends p[0..bytes) through the steps from `step` on, and to the model. `first`: the piece is the
 * start of the input. The recursion is as deep as the list is long. */
static moe_status pre_run(tok_run *run, uint32_t step, const uint8_t *p, size_t bytes, bool first)
{
    if (!bytes)
        return MOE_OK;
    if (step == run->tok->n_pre)
        return model_encode(run, p, bytes);
    switch (run->tok->pre[step].kind) {
    case PRE_PREFIX_SPACE:
        return pre_prefix_space(run, step, p, bytes, first);
    case PRE_METASPACE:
        return pre_metaspace(run, step, p, bytes, first);
    default:
        return pre_split(run, step, p, bytes, first);
    }
}

#endif
