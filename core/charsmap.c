/* core/charsmap.c - SentencePiece's precompiled character map: a double-array trie of byte strings
 * and the strings that replace them.
 *
 * The array comes from the file: every index is checked before it is used. */
#ifndef MOE_CORE_CHARSMAP_C
#define MOE_CORE_CHARSMAP_C

#include <utf8proc.h>

#include "tokenizer.h"

/* One unit of the double array (Darts-clone's layout): bit 8 says that a value hangs below it, bits
 * 10..30 are the offset, shifted by 8 more if bit 9 is set. */
static uint32_t charsmap_offset(uint32_t unit)
{
    return (unit >> 10) << ((unit & 1u << 9) >> 6);
}

/* Looks p[0..n) up: the shortest (or longest) key that it begins with. Returns the key's length and
 * its replacement, or 0. */
static size_t charsmap_find(const norm_step *step, const uint8_t *p, size_t n, bool longest,
                            const char **to)
{
    size_t found = 0;
    uint64_t at = 0;
    if (!step->n_units)
        return 0;
    at ^= charsmap_offset(step->units[0]);
    for (size_t i = 0; i < n && p[i]; i++) {
        at ^= p[i];
        if (at >= step->n_units)
            break;
        uint32_t unit = step->units[at];
        if ((unit & (1u << 31 | 0xFF)) != p[i])
            break;
        at ^= charsmap_offset(unit);
        if (!(unit >> 8 & 1))
            continue;
        if (at >= step->n_units)
            break;
        uint32_t value = step->units[at] & 0x7FFFFFFF;
        bool inside = i + 1 < n && (p[i + 1] & 0xC0) == 0x80; // keys are whole characters
        if (value >= step->map_bytes || (value && step->map[value - 1]) || inside)
            continue;
        *to = step->map + value; // the map ends with a NUL: checked at load
        found = i + 1;
        if (!longest)
            break;
    }
    return found;
}

/* Hugging Face's way: a grapheme of less than 6 bytes is replaced as a whole if a key begins it,
 * else each of its characters on its own. */
static bool charsmap_grapheme(const norm_step *step, const uint8_t *p, size_t n, text_buf *out)
{
    const char *to;
    if (n < 6 && charsmap_find(step, p, n, false, &to))
        return buf_append(out, to, strlen(to));
    for (size_t i = 0, length; i < n; i += length) {
        length = utf8_length(p[i]);
        bool ok = charsmap_find(step, p + i, length, false, &to)
                      ? buf_append(out, to, strlen(to)) : buf_append(out, p + i, length);
        if (!ok)
            return false;
    }
    return true;
}

static bool charsmap_apply(const norm_step *step, const uint8_t *p, size_t bytes, text_buf *out)
{
    if (step->kind == NORM_CHARSMAP_LONGEST) { // SentencePiece's own way
        const char *to;
        for (size_t i = 0, length; i < bytes; i += length) {
            length = charsmap_find(step, p + i, bytes - i, true, &to);
            bool ok = length ? buf_append(out, to, strlen(to))
                             : buf_append(out, p + i, length = utf8_length(p[i]));
            if (!ok)
                return false;
        }
        return true;
    }
    utf8proc_int32_t state = 0;
    size_t start = 0, length;
    for (size_t i = 0, before = 0; i < bytes; before = i, i += length) {
        utf8proc_int32_t c = (utf8proc_int32_t)utf8_next(p + i, &length);
        if (i) {
            size_t ignored;
            utf8proc_int32_t last = (utf8proc_int32_t)utf8_next(p + before, &ignored);
            if (utf8proc_grapheme_break_stateful(last, c, &state)) {
                if (!charsmap_grapheme(step, p + start, i - start, out))
                    return false;
                start = i;
            }
        }
    }
    return charsmap_grapheme(step, p + start, bytes - start, out);
}

/* Takes a map apart: u32 bytes of the array, the array, the replacements. */
static moe_status charsmap_load(norm_step *step, const uint8_t *data, uint64_t bytes,
                                text_arena *arena, const char *subject, moe_error *error)
{
    uint32_t units_bytes;
    if (bytes < sizeof units_bytes)
        return fail(error, MOE_ERR_FORMAT, subject, "expected at least 4 bytes, got %llu",
                    (unsigned long long)bytes);
    memcpy(&units_bytes, data, sizeof units_bytes);
    if (units_bytes % 4 || units_bytes >= bytes - 4 || data[bytes - 1] || bytes > 1u << 26)
        return fail(error, MOE_ERR_FORMAT, subject,
                    "expected an array of %llu bytes at most and NUL-terminated texts behind it, "
                    "got an array of %u", (unsigned long long)bytes - 5, units_bytes);
    uint8_t *copy = arena_alloc(arena, bytes / 4, sizeof *step->units);
    if (!copy)
        return fail_memory(error, arena->mem, subject, bytes);
    memcpy(copy, data + 4, (size_t)bytes - 4);
    step->units = (const uint32_t *)(const void *)copy;
    step->n_units = units_bytes / 4;
    step->map = (const char *)copy + units_bytes;
    step->map_bytes = (uint32_t)(bytes - 4 - units_bytes);
    size_t map_bytes = step->map_bytes;
    if (utf8_valid((const uint8_t *)step->map, map_bytes) != map_bytes)
        return fail(error, MOE_ERR_FORMAT, subject, "expected texts in UTF-8");
    return MOE_OK;
}

#endif
