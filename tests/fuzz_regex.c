/* tests/fuzz_regex.c - a first line as a pattern of a pre-tokenizer, and all of its matches in the
 * lines behind it. See fuzz.h. */
#include "fuzz.h"

#ifdef MOE_NO_TEXT
#error "this fuzzer is about patterns"
#endif

enum { FUZZ_STEPS = 1000000 };

static void fuzz_matches(const regex *re, moe_mem *mem, const uint8_t *text, size_t bytes)
{
    regex_run run = {.mem = mem, .text = text, .end = text + bytes, .steps_left = FUZZ_STEPS};
    const uint8_t *from = text, *start, *stop;
    while (from <= run.end && regex_find(re, &run, from, &start, &stop)) {
        fuzz_require(from <= start && start <= stop && stop <= run.end, "a match is in the text");
        fuzz_require(stop == run.end || (*stop & 0xC0) != 0x80, "a match has whole characters");
        if (start == stop && stop == run.end)
            break;
        from = start == stop ? stop + utf8_length(*stop) : stop;
    }
    regex_run_free(&run);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const uint8_t *line = bytes ? memchr(data, '\n', bytes) : NULL;
    const size_t pattern_bytes = line ? (size_t)(line - data) : bytes;
    const uint8_t *text = line ? line + 1 : data;
    const size_t text_bytes = line ? bytes - pattern_bytes - 1 : 0;
    moe_mem mem;
    moe_error error = {0};
    mem_init(&mem, NULL, 1 << 28);
    text_arena arena = {.mem = &mem};
    regex *re;
    char *pattern = malloc(pattern_bytes + 1); // messages want its NUL
    if (!pattern)
        return 0;
    if (pattern_bytes)
        memcpy(pattern, data, pattern_bytes);
    pattern[pattern_bytes] = 0;
    moe_status status = regex_new(&re, pattern, pattern_bytes, &arena, "pattern", &error);
    fuzz_require((status == MOE_OK) == (re != NULL), "a program or an error");
    if (re && utf8_valid(text, text_bytes) == text_bytes)
        fuzz_matches(re, &mem, text, text_bytes);
    arena_free(&arena);
    free(pattern);
    fuzz_require(mem.used_bytes == 0, "all memory is given back");
    return 0;
}

#ifndef MOE_FUZZ
static size_t fuzz_front(const uint8_t *data, size_t bytes)
{
    const uint8_t *line = memchr(data, '\n', bytes);
    return line && line > data ? (size_t)(line - data) : bytes;
}
#endif
