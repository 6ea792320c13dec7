/* core/regex_set.c - sets of characters, as the regular expressions of pre-tokenizers name them.
 *
 * A set is built as a list of ranges, which makes union, intersection and negation exact, and then
 * frozen into bitmaps, which makes the test of a character two loads. Names and their meaning are
 * Oniguruma's, because that is what runs the patterns of a tokenizer.json elsewhere. */
#ifndef MOE_CORE_REGEX_SET_C
#define MOE_CORE_REGEX_SET_C

#include "textmem.c"
#include "unicode.c"

/* Sorted, disjoint, not adjacent, after ranges_normalize. */
typedef struct regex_ranges {
    text_arena *arena;
    uint32_t (*r)[2];
    size_t n, capacity;
    bool failed; // no memory: checked once, when the set is frozen
} regex_ranges;

typedef struct regex_set {
    uint64_t ascii[2];
    const uint16_t *page;       // [0x1100]: which bitmap describes characters c >> 8
    const uint64_t (*bits)[4];  // bitmaps of 256 characters
} regex_set;

MOE_INLINE bool set_has(const regex_set *set, uint32_t c)
{
    if (MOE_LIKELY(c < 128))
        return set->ascii[c >> 6] >> (c & 63) & 1;
    return set->bits[set->page[c >> 8]][c >> 6 & 3] >> (c & 63) & 1;
}

/* ---------------------------------------------------------------------------------- ranges -- */

static void ranges_add(regex_ranges *set, uint32_t first, uint32_t last)
{
    if (set->n && first <= set->r[set->n - 1][1] + 1 && first >= set->r[set->n - 1][0]) {
        set->r[set->n - 1][1] = MOE_MAX(set->r[set->n - 1][1], last);
        return;
    }
    if (set->n == set->capacity) {
        size_t capacity = set->capacity ? set->capacity * 2 : 16;
        uint32_t(*r)[2] = arena_alloc(set->arena, capacity, sizeof *r);
        if (!r) {
            set->failed = true;
            return;
        }
        if (set->n)
            memcpy(r, set->r, set->n * sizeof *r);
        set->r = r;
        set->capacity = capacity;
    }
    set->r[set->n][0] = first;
    set->r[set->n++][1] = last;
}

static int ranges_compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void ranges_normalize(regex_ranges *set)
{
    if (set->n < 2)
        return;
    qsort(set->r, set->n, sizeof *set->r, ranges_compare);
    size_t n = 1;
    for (size_t i = 1; i < set->n; i++) {
        if (set->r[i][0] <= set->r[n - 1][1] + 1) {
            set->r[n - 1][1] = MOE_MAX(set->r[n - 1][1], set->r[i][1]);
        } else {
            set->r[n][0] = set->r[i][0];
            set->r[n++][1] = set->r[i][1];
        }
    }
    set->n = n;
}

static void ranges_add_all(regex_ranges *set, const uint32_t (*r)[2], size_t n)
{
    for (size_t i = 0; i < n; i++)
        ranges_add(set, r[i][0], r[i][1]);
}

static void ranges_negate(regex_ranges *set)
{
    ranges_normalize(set);
    regex_ranges out = {.arena = set->arena, .failed = set->failed};
    uint32_t next = 0;
    for (size_t i = 0; i < set->n; i++) {
        if (set->r[i][0] > next)
            ranges_add(&out, next, set->r[i][0] - 1);
        next = set->r[i][1] + 1;
    }
    if (next <= UNICODE_MAX)
        ranges_add(&out, next, UNICODE_MAX);
    *set = out;
}

/* a and b are left normalized; the intersection is written to a. */
static void ranges_intersect(regex_ranges *a, regex_ranges *b)
{
    ranges_normalize(a);
    ranges_normalize(b);
    regex_ranges out = {.arena = a->arena, .failed = a->failed || b->failed};
    for (size_t i = 0, j = 0; i < a->n && j < b->n;) {
        uint32_t first = MOE_MAX(a->r[i][0], b->r[j][0]), last = MOE_MIN(a->r[i][1], b->r[j][1]);
        if (first <= last)
            ranges_add(&out, first, last);
        if (a->r[i][1] < b->r[j][1])
            i++;
        else
            j++;
    }
    *a = out;
}

static bool ranges_has(const regex_ranges *set, uint32_t c) // normalized
{
    return unicode_in((const uint32_t(*)[2])set->r, set->n, c);
}

/* Adds the characters that differ from one of the set only by case. */
static void ranges_fold(regex_ranges *set)
{
    ranges_normalize(set);
    regex_ranges more = {.arena = set->arena};
    for (size_t i = 0; i < MOE_COUNT(unicode_lower); i++) {
        const int32_t *run = unicode_lower[i];
        for (int32_t c = run[0]; c <= run[1]; c += run[2]) {
            uint32_t upper = (uint32_t)c, lower = (uint32_t)(c + run[3]);
            if (ranges_has(set, upper))
                ranges_add(&more, lower, lower);
            else if (ranges_has(set, lower))
                ranges_add(&more, upper, upper);
        }
    }
    if (ranges_has(set, 's') || ranges_has(set, 'S'))
        ranges_add(&more, 0x17F, 0x17F); // long s
    if (ranges_has(set, 'K'))
        ranges_add(&more, 0x212A, 0x212A); // Kelvin
    ranges_add_all(set, (const uint32_t(*)[2])more.r, more.n);
    set->failed |= more.failed;
    ranges_normalize(set);
}

/* ------------------------------------------------------------------------------ named sets -- */

static void ranges_add_categories(regex_ranges *set, uint32_t mask) // bits 1 << GC_...
{
    for (size_t i = 0; i < MOE_COUNT(unicode_runs); i++)
        if (mask >> (unicode_runs[i] & 31) & 1)
            ranges_add(set, unicode_runs[i] >> 5,
                       i + 1 < MOE_COUNT(unicode_runs) ? (unicode_runs[i + 1] >> 5) - 1
                                                       : UNICODE_MAX);
    ranges_normalize(set);
}

#define GC_BITS(first, last) ((2u << (last)) - (1u << (first)))

enum { GC_L = GC_BITS(GC_LU, GC_LO), GC_M = GC_BITS(GC_MN, GC_ME), GC_N = GC_BITS(GC_ND, GC_NO),
       GC_P = GC_BITS(GC_PC, GC_PO), GC_S = GC_BITS(GC_SM, GC_SO) };

static const struct {
    const char *name; // lower case, without blanks, '-' and '_'
    uint32_t mask;
} regex_categories[] = {
    {"l", GC_L}, {"letter", GC_L}, {"m", GC_M}, {"mark", GC_M}, {"combiningmark", GC_M},
    {"n", GC_N}, {"number", GC_N}, {"p", GC_P}, {"punctuation", GC_P}, {"s", GC_S},
    {"symbol", GC_S}, {"z", GC_BITS(GC_ZS, GC_ZP)}, {"separator", GC_BITS(GC_ZS, GC_ZP)},
    {"c", GC_BITS(GC_CC, GC_CN)}, {"other", GC_BITS(GC_CC, GC_CN)},
    {"lc", GC_BITS(GC_LU, GC_LT)}, {"casedletter", GC_BITS(GC_LU, GC_LT)},
    {"l&", GC_BITS(GC_LU, GC_LT)}, {"any", GC_BITS(GC_LU, GC_CN)},
    {"uppercaseletter", 1u << GC_LU}, {"lowercaseletter", 1u << GC_LL},
    {"titlecaseletter", 1u << GC_LT}, {"modifierletter", 1u << GC_LM},
    {"otherletter", 1u << GC_LO}, {"nonspacingmark", 1u << GC_MN},
    {"spacingmark", 1u << GC_MC}, {"enclosingmark", 1u << GC_ME},
    {"decimalnumber", 1u << GC_ND}, {"letternumber", 1u << GC_NL},
    {"othernumber", 1u << GC_NO}, {"punct", GC_P | GC_S}, {"digit", 1u << GC_ND},
    {"cntrl", 1u << GC_CC}, {"assigned", GC_BITS(GC_LU, GC_CS)},
};

#define SCRIPT(name) {#name, unicode_script_##name, MOE_COUNT(unicode_script_##name)}
static const struct {
    const char *name;
    const uint32_t (*r)[2];
    size_t n;
} regex_scripts[] = {
    SCRIPT(arabic), SCRIPT(armenian), SCRIPT(bengali), SCRIPT(bopomofo), SCRIPT(cyrillic),
    SCRIPT(devanagari), SCRIPT(ethiopic), SCRIPT(georgian), SCRIPT(greek), SCRIPT(gujarati),
    SCRIPT(gurmukhi), SCRIPT(han), SCRIPT(hangul), SCRIPT(hebrew), SCRIPT(hiragana),
    SCRIPT(kannada), SCRIPT(katakana), SCRIPT(khmer), SCRIPT(lao), SCRIPT(latin),
    SCRIPT(malayalam), SCRIPT(mongolian), SCRIPT(myanmar), SCRIPT(sinhala), SCRIPT(tamil),
    SCRIPT(telugu), SCRIPT(thai), SCRIPT(tibetan),
};
#undef SCRIPT

static void ranges_add_space(regex_ranges *set)
{
    for (uint32_t c = 0; c <= 0x3000; c++)
        if (unicode_is_space(c))
            ranges_add(set, c, c);
}

/* Oniguruma's \w: it also takes circled letters and a few Latin-1 numbers. */
static void ranges_add_word(regex_ranges *set)
{
    static const uint32_t more[][2] = {{0xB2, 0xB3}, {0xB9, 0xB9}, {0xBC, 0xBE}};
    ranges_add_categories(set, GC_L | GC_M | 1u << GC_ND | 1u << GC_NL | 1u << GC_PC);
    ranges_add_all(set, unicode_other_alphabetic, MOE_COUNT(unicode_other_alphabetic));
    ranges_add_all(set, more, MOE_COUNT(more));
    ranges_normalize(set);
}

static void ranges_add_alpha(regex_ranges *set)
{
    ranges_add_categories(set, GC_L | 1u << GC_NL);
    ranges_add_all(set, unicode_other_alphabetic, MOE_COUNT(unicode_other_alphabetic));
    ranges_normalize(set);
}

/* What the splitters at punctuation take for it: an older P, and all of ASCII's. */
static void ranges_add_punctuation(regex_ranges *set)
{
    static const uint32_t ascii[][2] = {{33, 47}, {58, 64}, {91, 96}, {123, 126}};
    regex_ranges known = {.arena = set->arena}, unknown = {.arena = set->arena};
    ranges_add_categories(&known, GC_P);
    ranges_add_all(&unknown, unicode_punctuation_less, MOE_COUNT(unicode_punctuation_less));
    ranges_negate(&unknown);
    ranges_intersect(&known, &unknown);
    ranges_add_all(&known, unicode_punctuation_more, MOE_COUNT(unicode_punctuation_more));
    ranges_add_all(&known, ascii, MOE_COUNT(ascii));
    ranges_add_all(set, (const uint32_t(*)[2])known.r, known.n);
    set->failed |= known.failed;
    ranges_normalize(set);
}

/* Names that are neither a category nor a script. False if there is no such name. */
static bool ranges_add_class(regex_ranges *set, const char *name)
{
    static const uint32_t hex[][2] = {{'0', '9'}, {'A', 'F'}, {'a', 'f'}};
    if (!strcmp(name, "space") || !strcmp(name, "whitespace")) {
        ranges_add_space(set);
    } else if (!strcmp(name, "word")) {
        ranges_add_word(set);
    } else if (!strcmp(name, "alpha") || !strcmp(name, "alphabetic")) {
        ranges_add_alpha(set);
    } else if (!strcmp(name, "alnum")) {
        ranges_add_alpha(set);
        ranges_add_categories(set, 1u << GC_ND);
    } else if (!strcmp(name, "upper") || !strcmp(name, "uppercase")) {
        ranges_add_categories(set, 1u << GC_LU);
    } else if (!strcmp(name, "lower") || !strcmp(name, "lowercase")) {
        ranges_add_categories(set, 1u << GC_LL);
    } else if (!strcmp(name, "ascii")) {
        ranges_add(set, 0, 127);
    } else if (!strcmp(name, "xdigit")) {
        ranges_add_all(set, hex, MOE_COUNT(hex));
    } else if (!strcmp(name, "blank")) {
        ranges_add(set, '\t', '\t');
        ranges_add_categories(set, 1u << GC_ZS);
    } else if (!strcmp(name, "splitterpunctuation")) { // this library's: Punctuation, Bert
        ranges_add_punctuation(set);
    } else if (!strcmp(name, "splitterword")) { // this library's: \w of Rust
        ranges_add_categories(set, GC_L | GC_M | 1u << GC_ND | 1u << GC_NL | 1u << GC_PC);
        ranges_add_all(set, unicode_other_alphabetic, MOE_COUNT(unicode_other_alphabetic));
        ranges_add(set, 0x200C, 0x200D);
    } else {
        return false;
    }
    return true;
}

/* Adds a property by its name, given as it stands in the pattern. */
static bool ranges_add_named(regex_ranges *set, const char *text, size_t bytes)
{
    char name[48];
    size_t n = 0;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (c == ' ' || c == '-' || c == '_')
            continue;
        if (c == '=') { // Script=Han, gc=Lu
            n = 0;
            continue;
        }
        if (n + 1 >= sizeof name || (unsigned char)c >= 0x80)
            return false;
        name[n++] = c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
    }
    name[n] = 0;
    for (unsigned i = 0; i < UNICODE_N_CATEGORIES; i++) {
        const char *gc = unicode_category_names[i];
        if (n == 2 && name[0] == (gc[0] | 32) && name[1] == gc[1]) {
            ranges_add_categories(set, 1u << i);
            return true;
        }
    }
    for (size_t i = 0; i < MOE_COUNT(regex_categories); i++)
        if (!strcmp(name, regex_categories[i].name)) {
            ranges_add_categories(set, regex_categories[i].mask);
            return true;
        }
    for (size_t i = 0; i < MOE_COUNT(regex_scripts); i++)
        if (!strcmp(name, regex_scripts[i].name)) {
            ranges_add_all(set, regex_scripts[i].r, regex_scripts[i].n);
            return true;
        }
    return ranges_add_class(set, name);
}

/* --------------------------------------------------------------------------------- freezing -- */

enum { SET_PAGES = (UNICODE_MAX >> 8) + 1 };

/* Fills the bitmap of the 256 characters of `page`; *i is the first range that may reach it. */
static void set_page_bits(const regex_ranges *ranges, size_t *i, uint32_t page, uint64_t bits[4])
{
    uint32_t first = page << 8, last = first + 255;
    memset(bits, 0, 4 * sizeof *bits);
    while (*i < ranges->n && ranges->r[*i][1] < first)
        ++*i;
    for (size_t k = *i; k < ranges->n && ranges->r[k][0] <= last; k++) {
        uint32_t a = MOE_MAX(ranges->r[k][0], first), b = MOE_MIN(ranges->r[k][1], last);
        if (b - a == 255)
            memset(bits, 0xFF, 4 * sizeof *bits);
        for (uint32_t c = a; c <= b && b - a < 255; c++)
            bits[c >> 6 & 3] |= (uint64_t)1 << (c & 63);
    }
}

/* Makes a set of ranges that live in a scratch arena; the set lives in `arena`. */
static bool set_freeze(regex_set *set, regex_ranges *ranges, text_arena *arena)
{
    ranges_normalize(ranges);
    uint16_t *page = arena_alloc(arena, SET_PAGES, sizeof *page);
    uint64_t(*scratch)[4] = arena_alloc(ranges->arena, SET_PAGES, sizeof *scratch);
    if (ranges->failed || !page || !scratch)
        return false;
    size_t n = 0, next = 0;
    for (uint32_t p = 0; p < SET_PAGES; p++) {
        set_page_bits(ranges, &next, p, scratch[n]);
        size_t same = n; // most pages are empty, full, or like the one before
        for (size_t k = n; k-- > 0 && n - k < 4;)
            if (!memcmp(scratch[k], scratch[n], sizeof *scratch))
                same = k;
        for (size_t k = 0; same == n && k < n && k < 2; k++)
            if (!memcmp(scratch[k], scratch[n], sizeof *scratch))
                same = k;
        page[p] = (uint16_t)same;
        n += same == n;
    }
    uint64_t(*bits)[4] = arena_copy(arena, scratch, n, sizeof *scratch);
    if (!bits)
        return false;
    set->page = page;
    set->bits = (const uint64_t(*)[4])bits;
    memcpy(set->ascii, bits[page[0]], sizeof set->ascii);
    return true;
}

#endif
