/* core/unicode.c - UTF-8, and the properties of characters that tokenizers ask for.
 *
 * Bytes or code points flow in, code points and properties out; the tables are in unicode_data.h
 * and are constant. Must never: depend on the Unicode version of a library of the system, since a
 * character that is a letter in one version and unassigned in another makes other tokens. */
#ifndef MOE_CORE_UNICODE_C
#define MOE_CORE_UNICODE_C

#include "base.h"
#include "unicode_data.h"

enum {
    UNICODE_MAX = 0x10FFFF,
    UNICODE_REPLACEMENT = 0xFFFD,
    UNICODE_N_CATEGORIES = MOE_COUNT(unicode_category_names)
};

/* The order of unicode_category_names. */
enum {
    GC_LU, GC_LL, GC_LT, GC_LM, GC_LO, GC_MN, GC_MC, GC_ME, GC_ND, GC_NL, GC_NO, GC_PC, GC_PD,
    GC_PS, GC_PE, GC_PI, GC_PF, GC_PO, GC_SM, GC_SC, GC_SK, GC_SO, GC_ZS, GC_ZL, GC_ZP, GC_CC,
    GC_CF, GC_CO, GC_CS, GC_CN
};

/* ----------------------------------------------------------------------------------- UTF-8 -- */

/* Reads the character at p[0..n), n >= 1, into *cp and returns its length. If the bytes are not
 * well-formed, *cp is -1 and the length is that of the maximal part that could have begun a
 * character, at least 1 (Unicode 3.9, "substitution of maximal subparts"). */
static size_t utf8_decode(const uint8_t *p, size_t n, int32_t *cp)
{
    uint32_t lead = p[0];
    *cp = -1;
    if (lead < 0x80) {
        *cp = (int32_t)lead;
        return 1;
    }
    if (lead < 0xC2 || lead > 0xF4)
        return 1;
    size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint32_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint32_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    uint32_t value = lead & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        if (i >= n || p[i] < low || p[i] > high)
            return i;
        value = value << 6 | (p[i] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    *cp = (int32_t)value;
    return length;
}

/* Reads a character of text that is known to be well-formed. */
MOE_INLINE uint32_t utf8_next(const uint8_t *p, size_t *length)
{
    uint32_t c = p[0];
    if (MOE_LIKELY(c < 0x80)) {
        *length = 1;
        return c;
    }
    if (c < 0xE0) {
        *length = 2;
        return (c & 0x1F) << 6 | (p[1] & 0x3Fu);
    }
    if (c < 0xF0) {
        *length = 3;
        return (c & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    }
    *length = 4;
    return (c & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

/* The start of the character that ends before p; p is not the start of the text. */
MOE_INLINE const uint8_t *utf8_back(const uint8_t *p)
{
    do
        p--;
    while ((*p & 0xC0) == 0x80);
    return p;
}

/* The length of a well-formed character, by its first byte. */
MOE_INLINE size_t utf8_length(uint8_t lead)
{
    return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

/* Writes cp to out[4] and returns its length. */
static size_t utf8_encode(uint32_t cp, uint8_t *out)
{
    if (cp < 0x80) {
        out[0] = (uint8_t)cp;
        return 1;
    }
    size_t length = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--, cp >>= 6)
        out[i] = (uint8_t)(0x80 | (cp & 0x3F));
    out[0] = (uint8_t)((0xF00u >> length) | cp); // 110xxxxx, 1110xxxx, 11110xxx
    return length;
}

/* The number of leading bytes that are well-formed. */
static size_t utf8_valid(const uint8_t *p, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint64_t word;
        if (n - i >= sizeof word) {
            memcpy(&word, p + i, sizeof word);
            if (!(word & 0x8080808080808080u)) {
                i += sizeof word;
                continue;
            }
        }
        int32_t cp;
        size_t length = utf8_decode(p + i, n - i, &cp);
        if (cp < 0)
            break;
        i += length;
    }
    return i;
}

/* ------------------------------------------------------------------------------ properties -- */

/* Whether c lies in one of n sorted ranges. */
static bool unicode_in(const uint32_t ranges[][2], size_t n, uint32_t c)
{
    size_t low = 0;
    while (n > low) {
        size_t mid = low + (n - low) / 2;
        if (c > ranges[mid][1])
            low = mid + 1;
        else if (c < ranges[mid][0])
            n = mid;
        else
            return true;
    }
    return false;
}

#define UNICODE_IN(table, c) unicode_in(table, MOE_COUNT(table), c)

/* The general category, GC_LU and so on. c <= UNICODE_MAX. */
static unsigned unicode_category(uint32_t c)
{
    size_t low = 0, high = MOE_COUNT(unicode_runs);
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (unicode_runs[mid] >> 5 <= c)
            low = mid;
        else
            high = mid;
    }
    return unicode_runs[low] & 31;
}

static bool unicode_is_space(uint32_t c)
{
    if (c < 0x80)
        return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
           c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

/* \w of Rust's regular expressions, which decides for added tokens that are single words. */
static bool unicode_is_word(uint32_t c)
{
    unsigned gc = unicode_category(c);
    return gc <= GC_ND || gc == GC_NL || gc == GC_PC || c == 0x200C || c == 0x200D ||
           UNICODE_IN(unicode_other_alphabetic, c);
}

static uint32_t unicode_to_lower(uint32_t c)
{
    size_t low = 0, high = MOE_COUNT(unicode_lower);
    while (high > low) {
        size_t mid = low + (high - low) / 2;
        if ((int32_t)c > unicode_lower[mid][1])
            low = mid + 1;
        else
            high = mid;
    }
    if (low < MOE_COUNT(unicode_lower)) {
        const int32_t *run = unicode_lower[low];
        if ((int32_t)c >= run[0] && ((int32_t)c - run[0]) % run[2] == 0)
            return (uint32_t)((int32_t)c + run[3]);
    }
    return c;
}

#endif
