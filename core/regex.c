/* core/regex.c - the regular expressions of pre-tokenizers.
 *
 * A pattern flows in, a small program flows out (regex_new); text flows through it and matches come
 * out (regex_find). The syntax and its meaning are Oniguruma's, in the part that tokenizers use:
 * alternation, groups, classes with && and nesting, \p, (?i), greedy, lazy and possessive
 * quantifiers, look-ahead, look-behind of a fixed length, anchors. Back-references are refused.
 *
 * Why not PCRE2: it lacks class intersection, and its Unicode version is the system's; patterns
 * from the wild must mean the same on every machine.
 *
 * Matching is backtracking on an explicit stack, with a budget of steps: a hostile pattern ends in
 * an error, not in a hang. A pattern is immutable once made; a regex_run belongs to one thread.
 * Must never: recurse over text. */
#ifndef MOE_CORE_REGEX_C
#define MOE_CORE_REGEX_C

#include "regex_set.c"

enum {
    REGEX_MAX_BYTES = 1 << 14,   // of a pattern
    REGEX_MAX_NODES = 1 << 12,
    REGEX_MAX_DEPTH = 48,        // of groups
    REGEX_MAX_OPS = 1 << 13,
    REGEX_MAX_SETS = 200,
    REGEX_MAX_ALTS = 32,
    REGEX_MAX_COUNT = 1000,      // in {m,n}
    REGEX_MAX_QUANTIFIERS = 8,   // of one atom: each is a level of recursion, as a group is
    REGEX_MAX_SLOTS = 32,        // loops whose body may be empty
    REGEX_MAX_STACK = 1 << 22    // entries; 128 MB
};
#define REGEX_INFINITE UINT32_MAX

typedef enum regex_op_code {
    RE_MATCH, RE_CHAR, RE_SET, RE_REPEAT, RE_SPLIT, RE_JUMP, RE_LOOK, RE_ATOMIC, RE_ASSERT,
    RE_MARK, RE_CHECK
} regex_op_code;

typedef enum regex_mode { RE_GREEDY, RE_LAZY, RE_POSSESSIVE } regex_mode;

typedef enum regex_assertion {
    RE_LINE_START, RE_LINE_END, RE_TEXT_START, RE_TEXT_END, RE_TEXT_END_NEWLINE, RE_WORD_EDGE,
    RE_NO_WORD_EDGE
} regex_assertion;

/* RE_CHAR x: character. RE_SET x: set. RE_REPEAT x..y times a character of `set`, mode.
 * RE_SPLIT first x, then y. RE_JUMP x. RE_LOOK, RE_ATOMIC: the body follows and ends with RE_MATCH,
 * then comes x; mode & 1: negative; y: characters to step back before. RE_ASSERT x. RE_MARK,
 * RE_CHECK x: slot; a loop body that matched nothing ends its loop. */
typedef struct regex_op {
    uint8_t code, mode;
    uint16_t set;
    uint32_t x, y;
} regex_op;

typedef struct regex {
    const regex_op *ops;
    const regex_set *sets;
    uint32_t word_set;               // for \b; UINT32_MAX if it is not used
    uint32_t n_alts;
    uint32_t alts[REGEX_MAX_ALTS];   // where each top-level alternative starts
    uint32_t may_start[257];         // bit i: alternative i may begin with this byte; [256]: end
} regex;

/* --------------------------------------------------------------------------------- parsing -- */

typedef enum regex_kind { RN_EMPTY, RN_SET, RN_CAT, RN_ALT, RN_REPEAT, RN_LOOK, RN_ATOMIC,
                          RN_ASSERT } regex_kind;

typedef struct regex_node {
    uint8_t kind, mode;      // RN_LOOK: mode 1 negative, 2 behind
    uint32_t x, y;           // RN_SET: set, or character | 1 << 31. RN_REPEAT: min, max
    struct regex_node *child, *next; // RN_CAT, RN_ALT: list of children through next
} regex_node;

typedef struct regex_parser {
    const uint8_t *p, *end;
    text_arena *keep, *scratch;
    regex_set *sets;
    uint32_t n_sets, n_nodes, n_ops, n_slots, depth, word_set;
    regex_op *ops;
    bool fold, dot_all, extended;
    const char *problem;
} regex_parser;

static regex_node *regex_alt(regex_parser *s);

static const char regex_no_memory[] = "there is no memory for it";

static void *regex_problem(regex_parser *s, const char *problem)
{
    if (!s->problem)
        s->problem = problem;
    s->p = s->end;
    return NULL;
}

static regex_node *regex_new_node(regex_parser *s, regex_kind kind)
{
    if (++s->n_nodes > REGEX_MAX_NODES)
        return regex_problem(s, "it is too long");
    regex_node *node = arena_alloc(s->scratch, 1, sizeof *node);
    if (!node)
        return regex_problem(s, regex_no_memory);
    node->kind = (uint8_t)kind;
    return node;
}

static bool regex_accept(regex_parser *s, const char *text)
{
    size_t n = strlen(text);
    if ((size_t)(s->end - s->p) < n || memcmp(s->p, text, n))
        return false;
    s->p += n;
    return true;
}

static uint32_t regex_next_char(regex_parser *s)
{
    size_t length;
    uint32_t c = utf8_next(s->p, &length);
    s->p += length;
    return c;
}

static uint32_t regex_hex(regex_parser *s, unsigned max_digits)
{
    uint32_t value = 0;
    unsigned n = 0;
    for (; n < max_digits && s->p < s->end; n++, s->p++) {
        uint8_t c = *s->p;
        unsigned digit = c >= '0' && c <= '9' ? c - (unsigned)'0'
                         : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32u) - 'a' + 10 : 99;
        if (digit == 99)
            break;
        value = value << 4 | digit;
    }
    if (!n || value > UNICODE_MAX)
        regex_problem(s, "a hexadecimal character is malformed");
    return value;
}

/* The character that an escape stands for which is no class; its backslash is behind. */
static uint32_t regex_escaped_char(regex_parser *s)
{
    static const char from[] = "nrtfvae", to[] = "\n\r\t\f\v\a\033";
    uint32_t e = regex_next_char(s), c;
    const char *simple = e && e < 0x80 ? strchr(from, (int)e) : NULL;
    if (simple)
        return (uint8_t)to[simple - from];
    if (e == 'u')
        return regex_hex(s, 4);
    if (e == 'x' && regex_accept(s, "{")) {
        c = regex_hex(s, 8);
        if (!regex_accept(s, "}"))
            regex_problem(s, "\\x{ is not closed");
        return c;
    }
    if (e == 'x')
        return regex_hex(s, 2);
    if (e == '0')
        return 0;
    if ((e >= '1' && e <= '9') || (e && e < 0x80 && strchr("kgXRKG", (int)e)))
        regex_problem(s, "it has a back-reference or an escape that is not supported");
    return e;
}

/* After a backslash: true and a set added to `out`, or false and a character in *c. */
static bool regex_escape(regex_parser *s, regex_ranges *out, uint32_t *c)
{
    *c = 0;
    if (s->p >= s->end) {
        regex_problem(s, "it ends in a backslash");
        return false;
    }
    static const char letters[] = "sdwhpSDWHP";
    const char *class = *s->p < 0x80 && *s->p ? strchr(letters, *s->p) : NULL;
    if (!class) {
        *c = regex_escaped_char(s);
        return false;
    }
    s->p++;
    regex_ranges set = {.arena = s->scratch};
    bool negative = *class < 'a';
    char kind = (char)(*class | 32);
    if (kind == 'p') {
        if (!regex_accept(s, "{"))
            return regex_problem(s, "\\p needs a name in braces"), false;
        negative ^= regex_accept(s, "^");
        const uint8_t *close = memchr(s->p, '}', (size_t)(s->end - s->p));
        if (!close || !ranges_add_named(&set, (const char *)s->p, (size_t)(close - s->p)))
            return regex_problem(s, "\\p names an unknown property"), false;
        s->p = close + 1;
    } else {
        ranges_add_named(&set, kind == 's' ? "space" : kind == 'd' ? "digit"
                               : kind == 'w' ? "word" : "xdigit",
                         kind == 's' || kind == 'd' ? 5 : kind == 'w' ? 4 : 6);
    }
    if (negative)
        ranges_negate(&set);
    ranges_add_all(out, (const uint32_t(*)[2])set.r, set.n);
    out->failed |= set.failed;
    return true;
}

static bool regex_posix(regex_parser *s, regex_ranges *out) // after "[:"
{
    bool negative = regex_accept(s, "^");
    const uint8_t *close = s->p;
    while (close + 1 < s->end && !(close[0] == ':' && close[1] == ']'))
        close++;
    regex_ranges set = {.arena = s->scratch};
    if (close + 1 >= s->end || !ranges_add_named(&set, (const char *)s->p, (size_t)(close - s->p)))
        return regex_problem(s, "[: names an unknown class"), false;
    s->p = close + 2;
    if (negative)
        ranges_negate(&set);
    ranges_add_all(out, (const uint32_t(*)[2])set.r, set.n);
    return true;
}

/* The last character of a range that begins with c, if a dash and another follow; else c. */
static uint32_t regex_range_end(regex_parser *s, uint32_t c)
{
    if (s->end - s->p < 2 || s->p[0] != '-' || s->p[1] == ']' || s->p[1] == '[')
        return c;
    const uint8_t *dash = s->p++;
    uint32_t last;
    regex_ranges ignored = {.arena = s->scratch};
    if (!regex_accept(s, "\\")) {
        last = regex_next_char(s);
    } else if (regex_escape(s, &ignored, &last)) { // [a-\s]: the dash is a dash
        s->p = s->problem ? s->end : dash;
        return c;
    }
    if (last < c)
        regex_problem(s, "a range in a class is empty");
    return last;
}

static void regex_class(regex_parser *s, regex_ranges *out);

/* What a class may have between its brackets: a class, a character or a range of them. */
static void regex_class_item(regex_parser *s, regex_ranges *set)
{
    uint32_t c;
    if (regex_accept(s, "[:")) {
        regex_posix(s, set);
    } else if (regex_accept(s, "[")) {
        regex_class(s, set);
    } else if (!regex_accept(s, "\\")) {
        c = regex_next_char(s);
        ranges_add(set, c, regex_range_end(s, c));
    } else if (!regex_escape(s, set, &c)) {
        ranges_add(set, c, regex_range_end(s, c));
    }
}

/* A class after its '[', up to and with its ']'. */
static void regex_class(regex_parser *s, regex_ranges *out)
{
    if (++s->depth > REGEX_MAX_DEPTH) {
        regex_problem(s, "it is nested too deeply");
        return;
    }
    bool negative = regex_accept(s, "^"), first = true, all = false;
    regex_ranges set = {.arena = s->scratch}, common = {.arena = s->scratch};
    for (; s->p < s->end && (first || *s->p != ']'); first = false) {
        if (!regex_accept(s, "&&")) {
            regex_class_item(s, &set);
            continue;
        }
        if (all) // what stands left of it is kept in `common`
            ranges_intersect(&common, &set);
        else
            common = set;
        all = true;
        set = (regex_ranges){.arena = s->scratch};
    }
    if (!regex_accept(s, "]"))
        regex_problem(s, "a class is not closed");
    if (all)
        ranges_intersect(&set, &common);
    if (s->fold)
        ranges_fold(&set);
    if (negative)
        ranges_negate(&set);
    ranges_add_all(out, (const uint32_t(*)[2])set.r, set.n);
    out->failed |= set.failed;
    s->depth--;
}

static regex_node *regex_set_node(regex_parser *s, regex_ranges *ranges)
{
    regex_node *node = regex_new_node(s, RN_SET);
    if (!node)
        return NULL;
    ranges_normalize(ranges);
    if (!ranges->failed && ranges->n == 1 && ranges->r[0][0] == ranges->r[0][1]) {
        node->x = ranges->r[0][0] | 1u << 31;
        return node;
    }
    if (s->n_sets == REGEX_MAX_SETS)
        return regex_problem(s, "it has too many classes");
    if (!set_freeze(&s->sets[s->n_sets], ranges, s->keep))
        return regex_problem(s, regex_no_memory);
    node->x = s->n_sets++;
    return node;
}

static regex_node *regex_char_node(regex_parser *s, uint32_t c)
{
    regex_ranges set = {.arena = s->scratch};
    ranges_add(&set, c, c);
    if (s->fold)
        ranges_fold(&set);
    return regex_set_node(s, &set);
}

static regex_node *regex_assert_node(regex_parser *s, regex_assertion what)
{
    regex_node *node = regex_new_node(s, RN_ASSERT);
    if (node)
        node->x = what;
    if ((what == RE_WORD_EDGE || what == RE_NO_WORD_EDGE) && s->word_set == UINT32_MAX) {
        regex_ranges word = {.arena = s->scratch};
        ranges_add_word(&word);
        regex_node *set = regex_set_node(s, &word);
        if (set)
            s->word_set = set->x;
    }
    return node;
}

/* (?i), (?i:...), (?im-x:...): sets the options; true if a group follows. */
static bool regex_options(regex_parser *s)
{
    for (bool on = true; s->p < s->end; s->p++) {
        switch (*s->p) {
        case '-': on = false; break;
        case 'i': s->fold = on; break;
        case 'm': s->dot_all = on; break; // in Ruby's syntax
        case 's': break;
        case 'x': s->extended = on; break;
        case ':': s->p++; return true;
        case ')': s->p++; return false;
        default: regex_problem(s, "it has an unknown group (?..."); return false;
        }
    }
    return false;
}

static regex_node *regex_group(regex_parser *s) // after "("
{
    regex_node *node = NULL;
    bool fold = s->fold, dot_all = s->dot_all, extended = s->extended;
    if (regex_accept(s, "?#")) {
        while (s->p < s->end && *s->p != ')')
            s->p++;
        return regex_accept(s, ")") ? regex_new_node(s, RN_EMPTY)
                                    : regex_problem(s, "a comment is not closed");
    }
    int look = regex_accept(s, "?=") ? 0 : regex_accept(s, "?!") ? 1
               : regex_accept(s, "?<=") ? 2 : regex_accept(s, "?<!") ? 3 : -1;
    if (look >= 0 || regex_accept(s, "?>")) {
        node = regex_new_node(s, look >= 0 ? RN_LOOK : RN_ATOMIC);
        if (node)
            node->mode = (uint8_t)MOE_MAX(look, 0);
    } else if (regex_accept(s, "?<") || regex_accept(s, "?P<")) {
        while (s->p < s->end && *s->p++ != '>')
            ;
    } else if (regex_accept(s, "?") && !regex_options(s)) {
        // (?i) holds up to the end of the enclosing group, alternatives included
        regex_node *rest = regex_alt(s);
        s->fold = fold;
        s->dot_all = dot_all;
        s->extended = extended;
        return rest;
    }
    regex_node *body = regex_alt(s);
    if (!regex_accept(s, ")"))
        return regex_problem(s, "a group is not closed");
    s->fold = fold;
    s->dot_all = dot_all;
    s->extended = extended;
    if (!node)
        return body;
    node->child = body;
    return node;
}

static regex_node *regex_atom(regex_parser *s)
{
    uint32_t c;
    regex_ranges set = {.arena = s->scratch};
    if (regex_accept(s, "("))
        return regex_group(s);
    if (regex_accept(s, "[")) {
        regex_class(s, &set);
        return regex_set_node(s, &set);
    }
    if (regex_accept(s, ".")) {
        ranges_add(&set, '\n', '\n');
        if (s->dot_all)
            set.n = 0;
        ranges_negate(&set);
        return regex_set_node(s, &set);
    }
    if (regex_accept(s, "^"))
        return regex_assert_node(s, RE_LINE_START);
    if (regex_accept(s, "$"))
        return regex_assert_node(s, RE_LINE_END);
    if (!regex_accept(s, "\\"))
        return regex_char_node(s, regex_next_char(s));
    static const struct {
        const char *text;
        regex_assertion what;
    } assertions[] = {{"b", RE_WORD_EDGE}, {"B", RE_NO_WORD_EDGE}, {"A", RE_TEXT_START},
                      {"z", RE_TEXT_END}, {"Z", RE_TEXT_END_NEWLINE}};
    for (size_t i = 0; i < MOE_COUNT(assertions); i++)
        if (regex_accept(s, assertions[i].text))
            return regex_assert_node(s, assertions[i].what);
    return regex_escape(s, &set, &c) ? regex_set_node(s, &set) : regex_char_node(s, c);
}

static bool regex_number(regex_parser *s, uint32_t *value)
{
    const uint8_t *start = s->p;
    for (*value = 0; s->p < s->end && *s->p >= '0' && *s->p <= '9'; s->p++)
        *value = MOE_MIN(*value * 10 + (*s->p - '0'), (uint32_t)REGEX_MAX_COUNT + 1);
    return s->p > start;
}

/* {n}, {n,}, {,m}, {n,m} after the brace; anything else is text, and s->p goes back to `brace`. */
static bool regex_counts(regex_parser *s, uint32_t *min, uint32_t *max)
{
    const uint8_t *brace = s->p - 1;
    bool has_min = regex_number(s, min), has_max = false;
    *max = *min;
    if (regex_accept(s, ",")) {
        has_max = regex_number(s, max);
        if (!has_max)
            *max = REGEX_INFINITE;
    }
    if (!regex_accept(s, "}") || (!has_min && !has_max)) {
        s->p = brace;
        return false;
    }
    if (*min > REGEX_MAX_COUNT || (*max > REGEX_MAX_COUNT && *max != REGEX_INFINITE) || *max < *min)
        regex_problem(s, "a count in braces is out of range");
    return true;
}

static regex_node *regex_quantified(regex_parser *s)
{
    regex_node *node = regex_atom(s);
    for (uint32_t n = 0; node && s->p < s->end; n++) {
        uint32_t min = 0, max = REGEX_INFINITE;
        bool counted = false;
        if (regex_accept(s, "{")) {
            if (!regex_counts(s, &min, &max))
                break;
            counted = true;
        } else if (regex_accept(s, "?"))
            max = 1;
        else if (regex_accept(s, "+"))
            min = 1;
        else if (!regex_accept(s, "*"))
            break;
        if (n == REGEX_MAX_QUANTIFIERS)
            return regex_problem(s, "it has too many quantifiers in a row");
        regex_node *repeat = regex_new_node(s, RN_REPEAT);
        if (!repeat)
            return NULL;
        repeat->x = min;
        repeat->y = max;
        // in Ruby's syntax {n,m}+ is a second quantifier
        repeat->mode = regex_accept(s, "?") ? RE_LAZY
                       : !counted && regex_accept(s, "+") ? RE_POSSESSIVE : RE_GREEDY;
        repeat->child = node;
        node = repeat;
    }
    return node;
}

static regex_node *regex_cat(regex_parser *s)
{
    regex_node *cat = regex_new_node(s, RN_CAT);
    if (!cat)
        return NULL;
    regex_node **tail = &cat->child;
    while (s->p < s->end && *s->p != '|' && *s->p != ')') {
        if (s->extended && (unicode_is_space(*s->p) || *s->p == '#')) {
            bool comment = *s->p == '#';
            while (s->p < s->end && (comment ? *s->p != '\n' : unicode_is_space(*s->p)))
                s->p++;
            continue;
        }
        regex_node *node = *s->p == '{' ? (s->p++, regex_char_node(s, '{')) : regex_quantified(s);
        if (!node)
            return NULL;
        *tail = node;
        tail = &node->next;
    }
    return cat;
}

static regex_node *regex_alt(regex_parser *s)
{
    regex_node *alt = regex_new_node(s, RN_ALT);
    if (!alt || ++s->depth > REGEX_MAX_DEPTH)
        return regex_problem(s, "it is nested too deeply");
    regex_node **tail = &alt->child;
    do {
        regex_node *cat = regex_cat(s);
        if (!cat)
            return NULL;
        *tail = cat;
        tail = &cat->next;
    } while (regex_accept(s, "|"));
    s->depth--;
    return alt;
}

/* -------------------------------------------------------------------------------- programs -- */

static bool regex_nullable(const regex_node *node)
{
    switch (node->kind) {
    case RN_SET:
        return false;
    case RN_REPEAT:
        return node->x == 0 || regex_nullable(node->child);
    case RN_ATOMIC:
        return regex_nullable(node->child);
    case RN_CAT:
        for (const regex_node *c = node->child; c; c = c->next)
            if (!regex_nullable(c))
                return false;
        return true;
    case RN_ALT:
        for (const regex_node *c = node->child; c; c = c->next)
            if (regex_nullable(c))
                return true;
        return false;
    default:
        return true;
    }
}

/* The number of characters that a look-behind spans; UINT32_MAX if it varies. */
static uint32_t regex_width(const regex_node *node)
{
    uint32_t total = 0, one;
    switch (node->kind) {
    case RN_SET:
        return 1;
    case RN_REPEAT:
        one = regex_width(node->child);
        return node->x == node->y && one < 1000 ? one * node->x : UINT32_MAX;
    case RN_ATOMIC:
        return regex_width(node->child);
    case RN_CAT:
        for (const regex_node *c = node->child; c; c = c->next, total += one)
            if ((one = regex_width(c)) > 1000000)
                return UINT32_MAX;
        return total;
    case RN_ALT:
        total = regex_width(node->child);
        for (const regex_node *c = node->child; c; c = c->next)
            if (regex_width(c) != total)
                return UINT32_MAX;
        return total;
    default:
        return 0;
    }
}

/* Appends an operation and returns its index. */
static uint32_t regex_emit(regex_parser *s, regex_op_code code, unsigned mode, uint32_t x,
                           uint32_t y)
{
    if (s->n_ops == REGEX_MAX_OPS) {
        regex_problem(s, "it is too long");
        return 0;
    }
    s->ops[s->n_ops] = (regex_op){.code = (uint8_t)code, .mode = (uint8_t)mode, .x = x, .y = y};
    return s->n_ops++;
}

static void regex_gen(regex_parser *s, const regex_node *node);

static void regex_gen_once(regex_parser *s, const regex_node *body, bool loop, regex_mode mode)
{
    uint32_t split = regex_emit(s, RE_SPLIT, 0, 0, 0), slot = 0;
    bool check = loop && regex_nullable(body);
    if (check) {
        slot = s->n_slots++;
        if (slot >= REGEX_MAX_SLOTS)
            regex_problem(s, "it has too many loops around what may be empty");
        regex_emit(s, RE_MARK, 0, slot, 0);
    }
    regex_gen(s, body);
    if (check)
        regex_emit(s, RE_CHECK, 0, slot, 0);
    if (loop)
        regex_emit(s, RE_JUMP, 0, split, 0);
    uint32_t in = split + 1, out = s->n_ops;
    s->ops[split].x = mode == RE_LAZY ? out : in;
    s->ops[split].y = mode == RE_LAZY ? in : out;
}

/* A set of one character, so that RE_REPEAT has only sets to deal with. */
static uint32_t regex_char_set(regex_parser *s, uint32_t c)
{
    regex_ranges set = {.arena = s->scratch};
    ranges_add(&set, c, c);
    const bool room = s->n_sets < REGEX_MAX_SETS;
    if (!room || !set_freeze(&s->sets[s->n_sets], &set, s->keep)) {
        regex_problem(s, room ? regex_no_memory : "it has too many classes");
        return 0;
    }
    return s->n_sets++;
}

static void regex_gen_repeat(regex_parser *s, const regex_node *node)
{
    const regex_node *body = node->child;
    while (body->kind == RN_ALT || body->kind == RN_CAT) { // ((x)) is x
        if (!body->child || body->child->next)
            break;
        body = body->child;
    }
    if (body->kind == RN_SET) {
        uint32_t at = regex_emit(s, RE_REPEAT, node->mode, node->x, node->y);
        s->ops[at].set = (uint16_t)(body->x >> 31 ? regex_char_set(s, body->x & 0x7FFFFFFF)
                                                  : body->x);
        return;
    }
    uint32_t atomic = 0, before = UINT32_MAX;
    if (node->mode == RE_POSSESSIVE)
        atomic = regex_emit(s, RE_ATOMIC, 0, 0, 0);
    // what has no operations needs no copies: no limit of the program would end (){9}{9}{9}
    for (uint32_t i = 0; i < node->x && !s->problem && before != s->n_ops; i++) {
        before = s->n_ops;
        regex_gen(s, body);
    }
    if (node->y == REGEX_INFINITE)
        regex_gen_once(s, body, true, (regex_mode)node->mode);
    else
        for (uint32_t i = node->x; i < node->y && !s->problem; i++)
            regex_gen_once(s, body, false, (regex_mode)node->mode);
    if (node->mode == RE_POSSESSIVE) {
        regex_emit(s, RE_MATCH, 0, 0, 0);
        s->ops[atomic].x = s->n_ops;
    }
}

static void regex_gen_alt(regex_parser *s, const regex_node *node)
{
    uint32_t jumps = UINT32_MAX; // a list through RE_JUMP's x
    for (const regex_node *c = node->child; c && !s->problem; c = c->next) {
        if (!c->next) {
            regex_gen(s, c);
            break;
        }
        uint32_t split = regex_emit(s, RE_SPLIT, 0, s->n_ops + 1, 0);
        regex_gen(s, c);
        jumps = regex_emit(s, RE_JUMP, 0, jumps, 0);
        s->ops[split].y = s->n_ops;
    }
    while (jumps != UINT32_MAX && !s->problem) {
        uint32_t next = s->ops[jumps].x;
        s->ops[jumps].x = s->n_ops;
        jumps = next;
    }
}

static void regex_gen(regex_parser *s, const regex_node *node)
{
    if (s->problem)
        return;
    uint32_t at, width;
    switch (node->kind) {
    case RN_SET:
        if (node->x >> 31)
            regex_emit(s, RE_CHAR, 0, node->x & 0x7FFFFFFF, 0);
        else
            regex_emit(s, RE_SET, 0, node->x, 0);
        break;
    case RN_CAT:
        for (const regex_node *c = node->child; c; c = c->next)
            regex_gen(s, c);
        break;
    case RN_ALT:
        regex_gen_alt(s, node);
        break;
    case RN_REPEAT:
        regex_gen_repeat(s, node);
        break;
    case RN_LOOK:
    case RN_ATOMIC:
        width = node->mode & 2 ? regex_width(node->child) : 0;
        if (width == UINT32_MAX)
            regex_problem(s, "a look-behind has no fixed length");
        at = regex_emit(s, node->kind == RN_LOOK ? RE_LOOK : RE_ATOMIC, node->mode & 1, 0, width);
        regex_gen(s, node->child);
        regex_emit(s, RE_MATCH, 0, 0, 0);
        s->ops[at].x = s->n_ops;
        break;
    case RN_ASSERT:
        regex_emit(s, RE_ASSERT, 0, node->x, 0);
        break;
    default:
        break;
    }
}

/* Marks with `bit` the bytes that a match of `node` may begin with; true if it may be empty. */
static bool regex_first(const regex_parser *s, const regex_node *node, uint32_t bit,
                        uint32_t may_start[257])
{
    switch (node->kind) {
    case RN_SET:
        for (uint32_t c = 0; c < 128; c++)
            if (node->x >> 31 ? (node->x & 0x7FFFFFFF) == c : set_has(&s->sets[node->x], c))
                may_start[c] |= bit;
        for (uint32_t c = 128; c < 256; c++) // not worth telling them apart
            may_start[c] |= bit;
        return false;
    case RN_REPEAT:
        return regex_first(s, node->child, bit, may_start) || node->x == 0;
    case RN_ATOMIC:
        return regex_first(s, node->child, bit, may_start);
    case RN_CAT:
        for (const regex_node *c = node->child; c; c = c->next)
            if (!regex_first(s, c, bit, may_start))
                return false;
        return true;
    case RN_ALT: {
        bool empty = false;
        for (const regex_node *c = node->child; c; c = c->next)
            empty |= regex_first(s, c, bit, may_start);
        return empty;
    }
    default:
        return true;
    }
}

static void regex_gen_top(regex_parser *s, regex *re, const regex_node *top)
{
    uint32_t n = 0;
    for (const regex_node *c = top->child; c; c = c->next)
        n++;
    bool whole = n > REGEX_MAX_ALTS; // then the alternation is one alternative
    for (const regex_node *c = whole ? top : top->child; c && !s->problem; c = c->next) {
        uint32_t bit = 1u << re->n_alts;
        re->alts[re->n_alts++] = s->n_ops;
        regex_gen(s, c);
        regex_emit(s, RE_MATCH, 0, 0, 0);
        if (regex_first(s, c, bit, re->may_start))
            for (size_t i = 0; i < 257; i++)
                re->may_start[i] |= bit;
    }
}

/* Compiles a pattern into `arena`. On failure nothing but the arena's memory is used up. */
static moe_status regex_new(regex **out, const char *pattern, size_t bytes, text_arena *arena,
                            const char *subject, moe_error *error)
{
    *out = NULL;
    if (bytes > REGEX_MAX_BYTES || utf8_valid((const uint8_t *)pattern, bytes) != bytes)
        return fail(error, MOE_ERR_FORMAT, subject,
                    "expected a pattern of at most %d bytes of UTF-8, got %zu bytes",
                    REGEX_MAX_BYTES, bytes);
    text_arena scratch = {.mem = arena->mem};
    regex *re = arena_alloc(arena, 1, sizeof *re);
    regex_parser s = {.p = (const uint8_t *)pattern, .end = (const uint8_t *)pattern + bytes,
                      .keep = arena, .scratch = &scratch, .word_set = UINT32_MAX};
    s.sets = arena_alloc(&scratch, REGEX_MAX_SETS, sizeof *s.sets);
    s.ops = arena_alloc(&scratch, REGEX_MAX_OPS, sizeof *s.ops);
    if (!re || !s.sets || !s.ops)
        goto memory;
    regex_node *top = regex_alt(&s);
    if (top && s.p < s.end)
        regex_problem(&s, "a group is closed that was not opened");
    if (top && !s.problem)
        regex_gen_top(&s, re, top);
    if (s.problem == regex_no_memory)
        goto memory;
    if (s.problem) {
        arena_free(&scratch);
        return fail(error, MOE_ERR_UNSUPPORTED, subject, "cannot use the pattern \"%.200s\": %s",
                    pattern, s.problem);
    }
    re->ops = arena_copy(arena, s.ops, s.n_ops, sizeof *s.ops);
    re->sets = arena_copy(arena, s.sets, s.n_sets, sizeof *s.sets);
    re->word_set = s.word_set;
    if (!re->ops || !re->sets)
        goto memory;
    arena_free(&scratch);
    *out = re;
    return MOE_OK;
memory:
    arena_free(&scratch);
    return fail_memory(error, arena->mem, subject, bytes);
}

#include "regex_run.c"

#endif
