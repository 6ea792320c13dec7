/* core/regex_run.c - matching: the second half of core/regex.c.
 *
 * One regex_run serves all matches of one thread's call: it owns the stack and the budget. */
#ifndef MOE_CORE_REGEX_RUN_C
#define MOE_CORE_REGEX_RUN_C

#include "regex.c"

typedef enum regex_frame_kind {
    RF_BRANCH,  // go on at pc with pos
    RF_GREEDY,  // give one character back, down to low, then pc
    RF_LAZY,    // take one more character of the RE_REPEAT at pc; n are left
    RF_SLOT     // slot n held low
} regex_frame_kind;

typedef struct regex_frame {
    uint32_t pc;
    uint32_t kind : 2, n : 30;
    const uint8_t *pos, *low;
} regex_frame;

typedef struct regex_run {
    moe_mem *mem;
    regex_frame *stack;
    size_t n, capacity;
    const uint8_t *text, *end;
    uint64_t steps_left;
    moe_status status;  // not MOE_OK: the match was given up
    const uint8_t *slots[REGEX_MAX_SLOTS];
} regex_run;

static bool regex_push(regex_run *run, regex_frame frame)
{
    if (run->n == run->capacity) {
        size_t capacity = run->capacity ? run->capacity * 2 : 128;
        regex_frame *stack = capacity > REGEX_MAX_STACK
                                 ? NULL : mem_alloc_uncleared(run->mem, capacity, sizeof *stack);
        if (!stack) {
            run->status = capacity > REGEX_MAX_STACK ? MOE_ERR_LIMIT : MOE_ERR_MEMORY;
            return false;
        }
        if (run->n)
            memcpy(stack, run->stack, run->n * sizeof *stack);
        mem_free(run->mem, run->stack);
        run->stack = stack;
        run->capacity = capacity;
    }
    run->stack[run->n++] = frame;
    return true;
}

static bool regex_word_at(const regex *re, const regex_run *run, const uint8_t *p)
{
    size_t length;
    return p < run->end && set_has(&re->sets[re->word_set], utf8_next(p, &length));
}

static bool regex_assert(const regex *re, const regex_run *run, uint32_t what, const uint8_t *p)
{
    switch (what) {
    case RE_LINE_START:
        return p == run->text || p[-1] == '\n';
    case RE_LINE_END:
        return p == run->end || *p == '\n';
    case RE_TEXT_START:
        return p == run->text;
    case RE_TEXT_END:
        return p == run->end;
    case RE_TEXT_END_NEWLINE:
        return p == run->end || (p + 1 == run->end && *p == '\n');
    default: {
        bool before = p > run->text && regex_word_at(re, run, utf8_back(p));
        return (before != regex_word_at(re, run, p)) == (what == RE_WORD_EDGE);
    }
    }
}

/* RE_REPEAT at pc. Returns where matching goes on, NULL if it fails. */
static const uint8_t *regex_repeat(const regex *re, regex_run *run, uint32_t pc, const uint8_t *p)
{
    const regex_op *op = &re->ops[pc];
    const regex_set *set = &re->sets[op->set];
    uint32_t n = 0, eager = op->mode == RE_LAZY ? op->x : op->y;
    const uint8_t *low = op->x ? NULL : p, *start = p;
    while (n < eager && p < run->end) {
        size_t length;
        if (!set_has(set, utf8_next(p, &length)))
            break;
        p += length;
        if (++n == op->x)
            low = p;
    }
    run->steps_left -= MOE_MIN(run->steps_left, (uint64_t)(p - start) / 16);
    if (!low)
        return NULL;
    if (op->mode == RE_GREEDY && p > low)
        return regex_push(run, (regex_frame){.pc = pc + 1, .kind = RF_GREEDY, .pos = p, .low = low})
                   ? p : NULL;
    if (op->mode == RE_LAZY && op->y > op->x) {
        uint32_t left = MOE_MIN(op->y - op->x, (1u << 30) - 1);
        return regex_push(run, (regex_frame){.pc = pc, .kind = RF_LAZY, .n = left, .pos = p})
                   ? p : NULL;
    }
    return p;
}

/* Takes up the youngest frame above `base`: sets *pc and *p. False if there is none. */
static bool regex_backtrack(const regex *re, regex_run *run, size_t base, uint32_t *pc,
                            const uint8_t **p)
{
    while (run->n > base && run->status == MOE_OK) {
        regex_frame *f = &run->stack[run->n - 1];
        *pc = f->pc;
        *p = f->pos;
        switch (f->kind) {
        case RF_BRANCH:
            run->n--;
            return true;
        case RF_GREEDY:
            *p = f->pos = utf8_back(f->pos);
            if (f->pos == f->low)
                run->n--;
            return true;
        case RF_LAZY: {
            size_t length;
            uint32_t left = f->n - 1;
            run->n--;
            if (*p < run->end && set_has(&re->sets[re->ops[*pc].set], utf8_next(*p, &length))) {
                *p += length;
                if (left)
                    regex_push(run,
                               (regex_frame){.pc = *pc, .kind = RF_LAZY, .n = left, .pos = *p});
                ++*pc;
                return run->status == MOE_OK;
            }
            break;
        }
        default:
            run->slots[f->n] = f->low;
            run->n--;
        }
    }
    return false;
}

static const uint8_t *regex_match(const regex *re, regex_run *run, uint32_t pc, const uint8_t *p);

/* RE_LOOK, RE_ATOMIC: the body at pc + 1 on its own. Recursion is as deep as the pattern nests. */
static const uint8_t *regex_sub(const regex *re, regex_run *run, uint32_t pc, const uint8_t *p)
{
    const regex_op *op = &re->ops[pc];
    const uint8_t *from = p, *match = NULL;
    uint32_t back = op->y;
    for (; back && from > run->text; back--)
        from = utf8_back(from);
    run->steps_left -= MOE_MIN(run->steps_left, (uint64_t)(p - from) / 16);
    if (!back)
        match = regex_match(re, run, pc + 1, from);
    if (run->status != MOE_OK)
        return NULL;
    if (op->code == RE_ATOMIC)
        return match;
    bool negative = op->mode & 1;
    return (match == NULL) == negative ? p : NULL;
}

/* RE_CHAR, RE_SET: returns where the character at p ends, NULL if it is another. */
static const uint8_t *regex_take(const regex *re, const regex_run *run, const regex_op *op,
                                 const uint8_t *p)
{
    size_t length;
    if (p == run->end)
        return NULL;
    const uint32_t c = utf8_next(p, &length);
    return (op->code == RE_CHAR ? c == op->x : set_has(&re->sets[op->x], c)) ? p + length : NULL;
}

/* RE_MARK: the slot's old place comes back when matching goes back before this. */
static bool regex_mark(regex_run *run, uint32_t slot, const uint8_t *p)
{
    const uint8_t *old = run->slots[slot];
    run->slots[slot] = p;
    return regex_push(run, (regex_frame){.kind = RF_SLOT, .n = slot & 31, .low = old});
}

/* Runs the program at pc on the text at p. Returns the end of the match, or NULL. */
static const uint8_t *regex_match(const regex *re, regex_run *run, uint32_t pc, const uint8_t *p)
{
    const size_t base = run->n;
    for (bool matched = true; matched; matched = p || regex_backtrack(re, run, base, &pc, &p)) {
        const uint32_t at = pc++;
        const regex_op *op = &re->ops[at];
        if (!run->steps_left) {
            run->status = MOE_ERR_LIMIT;
            break;
        }
        run->steps_left--;
        switch (op->code) {
        case RE_MATCH:
            run->n = base;
            return p;
        case RE_CHAR:
        case RE_SET:
            p = regex_take(re, run, op, p);
            break;
        case RE_REPEAT:
            p = regex_repeat(re, run, at, p);
            break;
        case RE_SPLIT:
            pc = op->x;
            if (!regex_push(run, (regex_frame){.pc = op->y, .kind = RF_BRANCH, .pos = p}))
                p = NULL;
            break;
        case RE_JUMP:
            pc = op->x;
            break;
        case RE_LOOK:
        case RE_ATOMIC:
            p = regex_sub(re, run, at, p);
            pc = op->x;
            break;
        case RE_ASSERT:
            p = regex_assert(re, run, op->x, p) ? p : NULL;
            break;
        case RE_MARK:
            p = regex_mark(run, op->x, p) ? p : NULL;
            break;
        default: // RE_CHECK: the jump back to the loop's start follows; step over it
            pc += run->slots[op->x] == p;
        }
    }
    run->n = base;
    return NULL;
}

/* The first match at or after `from` in run->text .. run->end: *start and *end. False if there is
 * none, or if run->status says that the search was given up. */
static bool regex_find(const regex *re, regex_run *run, const uint8_t *from, const uint8_t **start,
                       const uint8_t **end)
{
    for (const uint8_t *p = from;; p += utf8_length(*p)) {
        uint32_t alts = re->may_start[p < run->end ? *p : 256];
        for (uint32_t i = 0; alts; i++, alts >>= 1) {
            if (!(alts & 1))
                continue;
            const uint8_t *match = regex_match(re, run, re->alts[i], p);
            if (run->status != MOE_OK)
                return false;
            if (match) {
                *start = p;
                *end = match;
                return true;
            }
        }
        if (p >= run->end)
            return false;
    }
}

static void regex_run_free(regex_run *run)
{
    mem_free(run->mem, run->stack);
    run->stack = NULL;
    run->n = run->capacity = 0;
}

#endif
