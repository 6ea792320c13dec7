/* tests/test_tokenizer.c - tokenizers against ids that the public implementation made
 * (tests/make_tokenizer_fixtures.py), the decoder, and malformed files.
 *
 * With MOE_TEST_SHARED set it also runs six large tokenizers over 1.2 MB of mixed text and the
 * vocabulary files with their .inp/.out pairs. */
#include "test.h"

#include <zstd.h>

/* ------------------------------------------------------------------------------------ corpus -- */

enum { CORPUS_MAX_LINES = 100 };

typedef struct corpus_text {
    char *data;
    size_t n, capacity;
} corpus_text;

typedef struct corpus_line {
    const char *text;
    size_t bytes, n_chars;
} corpus_line;

static void corpus_put(corpus_text *out, const void *data, size_t n)
{
    if (out->n + n > out->capacity) {
        out->capacity = 2 * out->capacity + n;
        out->data = realloc(out->data, out->capacity);
    }
    if (n)
        memcpy(out->data + out->n, data, n);
    out->n += n;
}

static void corpus_put_char(corpus_text *out, uint32_t c)
{
    uint8_t utf8[4];
    corpus_put(out, utf8, utf8_encode(c, utf8));
}

static uint32_t corpus_random(uint32_t n)
{
    return test_random() % n;
}

/* Where character k of a line starts; the end if it has fewer. */
static const char *corpus_at(const corpus_line *line, size_t k)
{
    const char *p = line->text, *end = p + line->bytes;
    for (; k && p < end; k--)
        p += utf8_length((uint8_t)*p);
    return p;
}

/* One step of corpus() in make_tokenizer_fixtures.py. */
static void corpus_piece(corpus_text *out, const corpus_line *lines, uint32_t n_lines)
{
    static const uint32_t blanks[] = {0x20, 0x20, 0x20, 0x0A, 0x09, 0x0D, 0xA0, 0x3000, 0x2009,
                                      0x0A};
    static const char *const contractions[] = {"'s", "'S", "'t", "'ll", "'LL", "'\xC5\xBF", "'re",
                                               "'Ve", "'d", "'m"};
    static const char *const ends[] = {"\n", " ", "\n\n", ""};
    uint32_t kind = corpus_random(16);
    const corpus_line *line = &lines[corpus_random(n_lines)];
    if (kind < 7) {
        const char *end = ends[corpus_random(4)];
        corpus_put(out, line->text, line->bytes);
        corpus_put(out, end, strlen(end));
        return;
    }
    if (kind == 7) {
        size_t a = corpus_random((uint32_t)line->n_chars);
        const char *from = corpus_at(line, a), *to = corpus_at(line, a + corpus_random(12));
        corpus_put(out, from, (size_t)(to - from));
        return;
    }
    uint32_t n = 1 + corpus_random(9);
    if (kind == 12) {
        const char *c = corpus_at(line, corpus_random((uint32_t)line->n_chars));
        for (uint32_t i = 0; i < n * n; i++)
            corpus_put(out, c, utf8_length((uint8_t)*c));
        return;
    }
    if (kind == 13)
        corpus_put_char(out, 97 + corpus_random(26));
    if (kind == 15) {
        const char *c = contractions[corpus_random(10)];
        corpus_put(out, line->text, (size_t)(corpus_at(line, 3) - line->text));
        corpus_put(out, c, strlen(c));
        return;
    }
    for (uint32_t i = 0, c = 0; i < n; i++) {
        switch (kind) {
        case 8: c = blanks[corpus_random(10)]; break;
        case 9: c = 48 + corpus_random(10); break;
        case 10: c = 32 + corpus_random(95); break;
        case 11: c = corpus_random(0x30000); break;
        case 13: c = 0x300 + corpus_random(0x70); break;
        default: c = 0x1F300 + corpus_random(0x700);
        }
        corpus_put_char(out, c >= 0xD800 && c < 0xE000 ? c + 0x1000 : c);
    }
}

/* At least n_bytes of text; the same as corpus() of the script makes. To be freed. */
static char *corpus_make(size_t n_bytes, uint64_t seed, size_t *bytes)
{
    char path[500];
    size_t n;
    corpus_line lines[CORPUS_MAX_LINES];
    uint32_t n_lines = 0;
    snprintf(path, sizeof path, "%s/data/tokenizer_sample.txt", test_root());
    char *sample = test_read_file(path, &n);
    if (!sample)
        return NULL;
    for (char *p = sample, *end = sample + n; p < end && n_lines < CORPUS_MAX_LINES;) {
        char *stop = memchr(p, '\x1e', (size_t)(end - p));
        while (stop && stop[1] != '\n')
            stop = memchr(stop + 1, '\x1e', (size_t)(end - stop - 1));
        corpus_line *line = &lines[n_lines++];
        *line = (corpus_line){.text = p, .bytes = (size_t)((stop ? stop : end) - p)};
        for (size_t i = 0; i < line->bytes; i += utf8_length((uint8_t)p[i]))
            line->n_chars++;
        p = stop ? stop + 2 : end;
    }
    corpus_text out = {0};
    uint64_t saved = test_random_state;
    test_random_state = seed;
    while (out.n < n_bytes)
        corpus_piece(&out, lines, n_lines);
    test_random_state = saved;
    free(sample);
    *bytes = out.n;
    return out.data;
}

/* ----------------------------------------------------------------------------------- helpers -- */

static uint64_t fnv(const moe_token *ids, size_t n)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < 4; k++)
            h = (h ^ ((uint32_t)ids[i] >> 8 * k & 255)) * 1099511628211u;
    return h;
}

static uint64_t fnv_text(const char *p, size_t n)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)p[i]) * 1099511628211u;
    return h;
}

static moe_status open_data(moe_tokenizer **tok, const void *data, size_t bytes, moe_error *error)
{
    moe_model_options o;
    moe_model_options_init(&o);
    o.data = data;
    o.data_bytes = bytes;
    return moe_tokenizer_open(tok, &o, error);
}

static moe_tokenizer *open_path(const char *path)
{
    moe_model_options o;
    moe_error error = {0};
    moe_tokenizer *tok;
    moe_model_options_init(&o);
    o.path = path;
    moe_tokenizer_open(&tok, &o, &error);
    CHECK(tok, "%s: %s", path, error.message);
    return tok;
}

static moe_tokenizer *open_tokenizer(const char *name)
{
    char path[500];
    snprintf(path, sizeof path, "%s/data/tok_%s.json", test_root(), name);
    return open_path(path);
}

/* The tokenizer of a row: a fixture, or a packed file of the shared folder. NULL: not there. */
static moe_tokenizer *open_row(const char *name, bool *shared)
{
    char path[600];
    size_t n;
    snprintf(path, sizeof path, "%s/data/tok_%s.json", test_root(), name);
    FILE *f = fopen(path, "rb");
    *shared = !f;
    if (f) {
        fclose(f);
        return open_path(path);
    }
    if (!test_shared())
        return NULL;
    snprintf(path, sizeof path, "%s/data/tokenizers/%s.tokenizer.json.zst", test_shared(), name);
    char *packed = test_read_file(path, &n);
    if (!packed)
        return NULL;
    unsigned long long bytes = ZSTD_getFrameContentSize(packed, n);
    char *data = malloc((size_t)bytes);
    size_t got = ZSTD_decompress(data, (size_t)bytes, packed, n);
    free(packed);
    moe_tokenizer *tok = NULL;
    moe_error error = {0};
    if (!ZSTD_isError(got))
        open_data(&tok, data, got, &error);
    CHECK(tok, "%s: %s", path, error.message);
    free(data);
    return tok;
}

/* Decodes token by token; to be freed. */
static char *decode_all(const moe_tokenizer *tok, const moe_token *ids, size_t n, bool special,
                        size_t *bytes)
{
    moe_decoder d = {.show_special = special};
    corpus_text out = {0};
    static char buf[70000];
    for (size_t i = 0; i <= n; i++) {
        size_t k = moe_tokenizer_decode(tok, &d, i < n ? ids[i] : -1, buf, sizeof buf);
        if (utf8_valid((const uint8_t *)buf, k) != k) {
            CHECK(false, "token %zu gave broken UTF-8", i);
            break;
        }
        corpus_put(&out, buf, k);
    }
    *bytes = out.n;
    return out.data;
}

/* --------------------------------------------------------------------------- against oracles -- */

static void check_row(const char *row, bool want_shared)
{
    char name[64];
    unsigned flags;
    size_t bytes, count, n, got;
    size_t text_bytes[2];
    unsigned long long hash, text_hash[2];
    int n_fields = sscanf(row, "%63s %u %zu %zu %llx %zu %llx %zu %llx", name, &flags, &bytes,
                          &count, &hash, &text_bytes[0], &text_hash[0], &text_bytes[1],
                          &text_hash[1]);
    REQUIRE(n_fields == 9, "a malformed row: %s", row);
    bool shared;
    char path[500];
    snprintf(path, sizeof path, "%s/data/tok_%s.json", test_root(), name);
    FILE *f = fopen(path, "rb");
    if (f)
        fclose(f);
    if (!f != want_shared)
        return;
    moe_tokenizer *tok = open_row(name, &shared);
    if (!tok)
        return;
    char *text = shared ? corpus_make(1200000, 2, &n) : corpus_make(40000, 1, &n);
    moe_token *ids = malloc((n + 16) * sizeof *ids);
    moe_error error = {0};
    CHECK(text && n == bytes, "%s: the text has %zu bytes, expected %zu", name, n, bytes);
    moe_status status = moe_tokenizer_encode(tok, text, n, flags, ids, n + 16, &got, &error);
    CHECK(status == MOE_OK, "%s: %s", name, error.message);
    if (status == MOE_OK) {
        CHECK(got == count && fnv(ids, got) == hash, "%s, flags %u: %zu ids, expected %zu", name,
              flags, got, count);
        for (int k = 0; k < 2; k++) {
            size_t back;
            char *again = decode_all(tok, ids, got, k == 0, &back);
            CHECK(back == text_bytes[k] && fnv_text(again, back) == text_hash[k],
                  "%s, flags %u: decoding gives %zu bytes, expected %zu", name, flags, back,
                  text_bytes[k]);
            free(again);
        }
    }
    free(ids);
    free(text);
    moe_tokenizer_close(tok);
}

static void each_row(bool shared)
{
    char path[500];
    size_t n;
    snprintf(path, sizeof path, "%s/data/tokenizer_expected.txt", test_root());
    char *rows = test_read_file(path, &n);
    REQUIRE(rows, "%s cannot be read", path);
    for (char *row = strtok(rows, "\n"); row; row = strtok(NULL, "\n"))
        if (row[0] != '#')
            check_row(row, shared);
    free(rows);
}

static void small_tokenizers_give_the_oracles_ids(void)
{
    each_row(false);
}

static void large_tokenizers_give_the_oracles_ids(void)
{
    if (!test_shared())
        SKIP("MOE_TEST_SHARED is not set");
    each_row(true);
}

static void check_pair(const char *name)
{
    char path[600];
    size_t n_in, n_out, got;
    static moe_token ids[10000];
    snprintf(path, sizeof path, "%s/data/vocab/%s.gguf", test_shared(), name);
    moe_tokenizer *tok = open_path(path);
    strcat(path, ".inp");
    char *in = test_read_file(path, &n_in);
    strcpy(path + strlen(path) - 4, ".out");
    char *out = test_read_file(path, &n_out);
    static const char separator[] = "\n__ggml_vocab_test__\n";
    char *text = in, *row = out;
    int n_texts = 0;
    while (tok && text && row && *row) {
        char *end = strstr(text, separator), *row_end = strchr(row, '\n');
        size_t bytes = end ? (size_t)(end - text) : strlen(text);
        moe_status status = moe_tokenizer_encode(tok, text, bytes, 0, ids, 10000, &got, NULL);
        CHECK(status == MOE_OK, "%s: text %d: %d", name, n_texts, (int)status);
        char *p = row;
        for (size_t i = 0; i < got; i++) {
            long want = strtol(p, &p, 10);
            CHECK(ids[i] == want, "%s: text %d, token %zu: %d, expected %ld", name, n_texts, i,
                  ids[i], want);
        }
        while (*p == ' ')
            p++;
        CHECK(p == (row_end ? row_end : row + strlen(row)), "%s: text %d: more tokens expected",
              name, n_texts);
        n_texts++;
        text = end ? end + sizeof separator - 1 : NULL;
        row = row_end ? row_end + 1 : NULL;
    }
    CHECK(n_texts > 40, "%s: only %d texts", name, n_texts);
    free(in);
    free(out);
    moe_tokenizer_close(tok);
}

static void vocabulary_files_give_their_pairs(void)
{
    static const char *const names[] = {"bert-bge", "deepseek-coder", "falcon", "gpt-2",
                                        "llama-spm", "refact"};
    if (!test_shared())
        SKIP("MOE_TEST_SHARED is not set");
    for (size_t i = 0; i < MOE_COUNT(names); i++)
        check_pair(names[i]);
}

/* ------------------------------------------------------------------------------------- rules -- */

static void invalid_utf8_becomes_replacement_characters(void)
{
    static const struct {
        const char *bad, *good; // as Python's bytes.decode(errors="replace")
    } cases[] = {{"a\xFFz", "a\uFFFDz"}, {"\xC0\x80", "\uFFFD\uFFFD"}, {"\xE4\xBD", "\uFFFD"},
                 {"\xE4\xBDx", "\uFFFDx"}, {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
                 {"\xF0\x9F\x99", "\uFFFD"}, {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
                 {"\xF0\x80\x80", "\uFFFD\uFFFD\uFFFD"}, {"\x80\x80", "\uFFFD\uFFFD"},
                 {"\xE4\xBD\xE4\xBD\xA0", "\uFFFD\u4F60"}};
    moe_tokenizer *tok = open_tokenizer("bpe_bytes");
    REQUIRE(tok, "no fixture");
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_token a[64], b[64];
        size_t n_a, n_b;
        moe_tokenizer_encode(tok, cases[i].bad, strlen(cases[i].bad), 0, a, 64, &n_a, NULL);
        moe_tokenizer_encode(tok, cases[i].good, strlen(cases[i].good), 0, b, 64, &n_b, NULL);
        CHECK(n_a == n_b && !memcmp(a, b, n_a * sizeof *a), "case %zu", i);
    }
    moe_tokenizer_close(tok);
}

static void plain_text_never_makes_control_tokens(void)
{
    static const char *const names[] = {"bpe_bytes", "bpe_gpt2", "bpe_marks", "unigram",
                                        "wordpiece"};
    static const char text[] = "<|im_start|>user<|im_end|> </s><s><unk> <mask> [CLS][SEP] <0x0A>";
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        moe_token ids[256];
        size_t n, n_special = 0;
        moe_tokenizer *tok = open_tokenizer(names[i]);
        REQUIRE(tok, "no fixture");
        moe_tokenizer_encode(tok, text, strlen(text), MOE_ENCODE_PLAIN, ids, 256, &n, NULL);
        for (size_t k = 0; k < n; k++)
            CHECK(!tok->tokens[ids[k]].special || ids[k] == tok->unknown, "%s: token %d", names[i],
                  ids[k]);
        moe_tokenizer_encode(tok, text, strlen(text), MOE_ENCODE_PARSE_SPECIAL, ids, 256, &n, NULL);
        for (size_t k = 0; k < n; k++)
            n_special += tok->tokens[ids[k]].special;
        CHECK(n_special >= 2, "%s: only %zu with the flag", names[i], n_special);
        moe_tokenizer_close(tok);
    }
}

static void a_small_buffer_is_reported_with_the_size(void)
{
    moe_tokenizer *tok = open_tokenizer("bpe_bytes");
    REQUIRE(tok, "no fixture");
    moe_token all[64], some[3] = {0};
    size_t n, m;
    moe_error error = {0};
    const char *text = "All human beings are born free.";
    CHECK(!moe_tokenizer_encode(tok, text, strlen(text), 0, all, 64, &n, &error), "%s",
          error.message);
    CHECK(moe_tokenizer_encode(tok, text, strlen(text), 0, some, 2, &m, &error) == MOE_ERR_LIMIT,
          "ok");
    CHECK(m == n && some[0] == all[0] && some[1] == all[1] && some[2] == 0, "%zu %zu", m, n);
    CHECK(moe_tokenizer_encode(tok, text, strlen(text), 0, NULL, 0, &m, NULL) == MOE_ERR_LIMIT &&
          m == n, "%zu", m);
    CHECK(!moe_tokenizer_encode(tok, NULL, 0, 0, NULL, 0, &m, NULL) && m == 0, "%zu", m);
    moe_tokenizer_close(tok);
}

static void decoding_streams_whole_characters(void)
{
    moe_tokenizer *tok = open_tokenizer("bpe_marks");
    REQUIRE(tok, "no fixture");
    const char *text = " two  spaces \U0001F9EC\U0001F642 end";
    moe_token ids[128];
    size_t n, bytes;
    moe_tokenizer_encode(tok, text, strlen(text), 0, ids, 128, &n, NULL);
    char *out = decode_all(tok, ids, n, true, &bytes);
    CHECK(bytes == strlen(text) && !memcmp(out, text, bytes), "[%.*s]", (int)bytes, out);
    free(out);
    moe_decoder d = {0};
    char buf[16];
    CHECK(moe_tokenizer_decode(tok, &d, 3 + 0xE4, buf, 16) == 0, "a lead byte is held back");
    CHECK(moe_tokenizer_decode(tok, &d, -1, buf, 16) == 3 && !strcmp(buf, "\uFFFD"), "[%s]", buf);
    CHECK(moe_tokenizer_decode(tok, &d, 3 + 0xE4, buf, 16) == 0, "held back again");
    CHECK(moe_tokenizer_decode(tok, &d, 3 + 'x', buf, 2) == 4, "too small a buffer");
    CHECK(moe_tokenizer_decode(tok, &d, 3 + 'x', buf, 16) == 4 && !strcmp(buf, "\uFFFDx"), "[%s]",
          buf);
    moe_tokenizer_close(tok);
}

static void long_runs_take_linear_time(void)
{
    static const char *const names[] = {"bpe_bytes", "bpe_gpt2", "bpe_marks", "bpe_words",
                                        "unigram", "wordpiece"};
    static const char *const runs[] = {" ", "a", "Z", "\n", "\U0001F642", "'", "\u0301", "1"};
    enum { BYTES = 1000000 };
    char *text = malloc(BYTES + 8);
    for (size_t i = 0; i < MOE_COUNT(names); i++)
        for (size_t k = 0; k < MOE_COUNT(runs); k++) {
            moe_tokenizer *tok = open_tokenizer(names[i]);
            REQUIRE(tok, "no fixture");
            size_t one = strlen(runs[k]), n = BYTES / one * one, count;
            for (size_t at = 0; at < n; at += one)
                memcpy(text + at, runs[k], one);
            moe_error error = {0};
            const double start = test_cpu_ms();
            moe_status status = moe_tokenizer_encode(tok, text, n, 0, NULL, 0, &count, &error);
            const double seconds = (test_cpu_ms() - start) * 1e-3;
            CHECK(status == MOE_ERR_LIMIT || count == 0, "%s: %s", names[i], error.message);
            CHECK(seconds < 60, "%s, run of \"%s\": %.1f s", names[i], runs[k], seconds);
            moe_tokenizer_close(tok);
        }
    free(text);
}

/* ---------------------------------------------------------------------------------- patterns -- */

static void patterns_match_as_oniguruma(void)
{
    static const struct {
        const char *pattern, *text;
        int start, end; // -1: no match; -2: a step limit
    } cases[] = {
        {"a|ab", "xab", 1, 2}, {"(?:a|ab)c", "abc", 0, 3}, {"a+?", "aaa", 0, 1},
        {"a{2,3}", "aaaa", 0, 3}, {"a{,2}b", "aab", 0, 3}, {"a{x", "a{x", 0, 3},
        {"a++a", "aaa", -1, -1}, {"(?>a+)b", "aab", 0, 3}, {"[\\p{L}&&[^a-c]]+", "abcde", 3, 5},
        {"[^\\s\\p{L}]+", "ab 12", 3, 5}, {"(?i:'S)", "'\u017F", 0, 3}, {"(?i)k", "\u212A", 0, 3},
        {"\\bfoo\\b", "a foo", 2, 5}, {"(?<=a)b", "bab", 2, 3}, {"(?<!a)b", "abb", 2, 3},
        {"\\s+(?!\\S)", "a   b", 1, 3}, {"\\s+$", "a  \nb", 1, 3}, {"[]a]+", "x]a", 1, 3},
        {"[a\\-z]+", "b-z", 1, 3}, {"(a*)*b", "aaab", 0, 4}, {"(|a)+", "aa", 0, 0},
        {"\\x{4E00}", "\u4E00", 0, 3}, {"\\p{Han}+", "a\u4E00\u4E8C", 1, 7},
        {"\\p{^L}", "a1", 1, 2}, {"[[:alpha:]_]+", "1a_", 1, 3}, {".", "\nx", 1, 2},
        {"[[:upper:]]+", "abCDe", 2, 4}, {"[[:lower:]]+", "ABcdE", 2, 4},
        {"[[:alnum:]]+", "-a1-", 1, 3}, {"[[:ascii:]]+", "\u00E9ab", 2, 4},
        {"[[:xdigit:]]+", "xFa0g", 1, 4}, {"[[:blank:]]+", "\n \ta", 1, 3},
        {"[[:^alpha:]]+", "a12b", 1, 3}, {"\\h+", "gA9", 1, 3}, {"[a-\\x{63}]+", "zabcd", 1, 4},
        {"[a-\\s]+", "xa- y", 1, 4}, {"[a-e&&c-z]+", "abcdef", 2, 5},
        {"(?:ab){1,2}", "ababab", 0, 4},
        {"(a+)+$", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", -2, 0},
    };
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        text_arena arena = {.mem = &mem};
        regex_run run = {.mem = &mem, .text = (const uint8_t *)cases[i].text,
                         .steps_left = 1000000};
        run.end = run.text + strlen(cases[i].text);
        regex *re;
        moe_error error = {0};
        const uint8_t *start = NULL, *end = NULL;
        regex_new(&re, cases[i].pattern, strlen(cases[i].pattern), &arena, "test", &error);
        REQUIRE(re, "%s", error.message);
        bool found = regex_find(re, &run, run.text, &start, &end);
        if (cases[i].start == -2)
            CHECK(!found && run.status == MOE_ERR_LIMIT, "%s: no limit", cases[i].pattern);
        else
            CHECK(found ? start - run.text == cases[i].start && end - run.text == cases[i].end
                        : cases[i].start == -1, "%s: %d, %d..%d", cases[i].pattern, found,
                  found ? (int)(start - run.text) : -1, found ? (int)(end - run.text) : -1);
        regex_run_free(&run);
        arena_free(&arena);
    }
    static const char *const bad[] = {"(", ")", "[a", "a{3,2}", "\\p{Nope}", "(?<=a+)b", "\\1",
                                      "*a|(?Z)", "[b-a]", "\\", "(?:ab)?????????????????"};
    for (size_t i = 0; i < MOE_COUNT(bad); i++) {
        text_arena arena = {.mem = &mem};
        regex *re;
        moe_error error = {0};
        moe_status status = regex_new(&re, bad[i], strlen(bad[i]), &arena, "test", &error);
        CHECK(status == MOE_ERR_UNSUPPORTED && error.message[0] && !re, "\"%s\" was accepted",
              bad[i]);
        arena_free(&arena);
    }
    CHECK(mem.used_bytes == 0, "%llu bytes leak", (unsigned long long)mem.used_bytes);
}

/* Patterns of a few bytes that ask for more steps than anybody has: making them and running them
 * ends, soon. */
static void hostile_patterns_end_soon(void)
{
    static const char empty[] = "(){1000}{1000}{1000}", // would be 10^9 copies of nothing
                      branch[] = "(?:(){1000}|a){2}";
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    text_arena arena = {.mem = &mem};
    moe_error error = {0};
    regex *re;
    const double start = test_cpu_ms();
    regex_new(&re, empty, strlen(empty), &arena, "test", &error);
    CHECK(re, "%s", error.message);
    regex_new(&re, branch, strlen(branch), &arena, "test", &error);
    CHECK(re, "%s", error.message);
    const double ms = test_cpu_ms() - start;
    CHECK(ms < 100 * test_slowness(), "%.0f ms", ms);
    // each step back of a look-behind is paid for: here 10000 at each of 20000 places
    enum { N_BACK = 10, N_TEXT = 20000 };
    char pattern[8 * N_BACK + 16] = "(?<=";
    for (int i = 0; i < N_BACK; i++)
        strcat(pattern, "a{1000}");
    strcat(pattern, "b)");
    char *text = malloc(N_TEXT);
    REQUIRE(text, "no memory");
    memset(text, 'a', N_TEXT);
    regex_run run = {.mem = &mem, .text = (const uint8_t *)text, .steps_left = 1000000};
    run.end = run.text + N_TEXT;
    const uint8_t *from, *to;
    regex_new(&re, pattern, strlen(pattern), &arena, "test", &error);
    REQUIRE(re, "%s", error.message);
    CHECK(!regex_find(re, &run, run.text, &from, &to) && run.status == MOE_ERR_LIMIT, "status %d",
          (int)run.status);
    regex_run_free(&run);
    arena_free(&arena);
    free(text);
}

/* Sets of characters against a table of what is in them. */
static void sets_of_characters_are_what_they_hold(void)
{
    enum { N_CHAR = 64, N_SET = 2 };
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    test_random_state = 20260105;
    for (int round = 0; round < 300; round++) {
        text_arena arena = {.mem = &mem};
        regex_ranges set[N_SET] = {{.arena = &arena}, {.arena = &arena}};
        bool in[N_SET][N_CHAR] = {{false}};
        for (int s = 0; s < N_SET; s++)
            for (uint32_t i = test_random() % 8; i > 0; i--) {
                const uint32_t first = test_random() % N_CHAR, more = test_random() % 9;
                const uint32_t last = MOE_MIN(first + more, N_CHAR - 1u);
                ranges_add(&set[s], first, last);
                memset(in[s] + first, true, last - first + 1);
            }
        const bool negate = round % 2, intersect = round % 3;
        if (negate)
            ranges_negate(&set[0]);
        if (intersect)
            ranges_intersect(&set[0], &set[1]);
        else
            ranges_normalize(&set[0]);
        for (uint32_t c = 0; c < N_CHAR; c++)
            CHECK(ranges_has(&set[0], c) == (in[0][c] != negate && (!intersect || in[1][c])),
                  "round %d: %u", round, c);
        CHECK(ranges_has(&set[0], 0x10FFFF) == (negate && !intersect), "round %d: the last", round);
        arena_free(&arena);
    }
}

/* ---------------------------------------------------------------------------- character maps -- */

/* A precompiled map in the making: its double array, of which `used` says what is taken. */
typedef struct map_maker {
    const char *const (*keys)[2]; // [n]: from, to
    uint32_t n;
    uint32_t value[16];           // where each replacement stands
    uint32_t units[1024];
    bool used[1024];
} map_maker;

static bool map_fits(const map_maker *m, const bool next[256], uint32_t base)
{
    for (uint32_t c = 0; c < 256; c++) // 0 stands for the value
        if ((next[c] || !c) && (base ^ c) < 1024 && m->used[base ^ c])
            return false;
    return base < 768;
}

/* The node at unit `at`, of all keys that begin with the first `depth` bytes of `key`. */
static void map_place(map_maker *m, const char *key, size_t depth, uint32_t at)
{
    bool next[256] = {false};
    uint32_t base = 1, leaf = UINT32_MAX;
    for (uint32_t i = 0; i < m->n; i++)
        if (!strncmp(m->keys[i][0], key, depth)) {
            next[(uint8_t)m->keys[i][0][depth]] = true;
            leaf = m->keys[i][0][depth] ? leaf : i;
        }
    while (!map_fits(m, next, base))
        base++;
    for (uint32_t c = 0; c < 256; c++)
        m->used[base ^ c] |= next[c] || !c;
    m->units[at] = (at ^ base) << 10 | (uint32_t)(leaf != UINT32_MAX) << 8 |
                   (depth ? (uint8_t)key[depth - 1] : 0);
    m->units[base] = leaf != UINT32_MAX ? m->value[leaf] | 1u << 31 : 0;
    for (uint32_t i = 0; i < m->n; i++) { // each next byte once, by the first key that has it
        const char *other = m->keys[i][0];
        const uint8_t c = strncmp(other, key, depth) ? 0 : (uint8_t)other[depth];
        if (c && next[c]) {
            next[c] = false;
            map_place(m, other, depth + 1, base ^ c);
        }
    }
}

/* Replacement by graphemes as in Hugging Face's tokenizers, whose results these are; by the longest
 * key as in SentencePiece. */
static void character_maps_replace_graphemes(void)
{
    static const char *const keys[][2] = {
        {"a", "X"}, {"ab", "no"}, {"e", "E"}, {"\u0301", "^"}, {"\u00E9", "e'"}, {"\u0E01", ""},
        {"\u1100", "G"}, {"\U0001F468", "M"}};
    static const struct { const char *text, *want, *longest; } cases[] = {
        {"ae\u0301b", "XEb", "XE^b"}, {"ab", "Xb", "no"}, {"e\u0301\u0327", "E", "E^\u0327"},
        {"e\u0301\u0327\u0301", "E^\u0327^", "E^\u0327^"}, {"x\u00E9\u0301", "xe'", "xe'^"},
        {"\u1100\u1161", "G\u1161", "G\u1161"}, {"\U0001F468", "M", "M"},
        {"\U0001F468\u200D\U0001F469", "M\u200D\U0001F469", "M\u200D\U0001F469"},
        {"\u0301", "^", "^"}, {"zz\u0301e", "zz^E", "zz^E"}, {"a\r\na", "X\r\nX", "X\r\nX"},
        {"\u0E01a", "X", "X"}, {"\u00E9\u0327\u0301\u0301", "e'\u0327^^", "e'\u0327^^"},
        {"a\u200Da", "XX", "X\u200DX"}, {"", "", ""}};
    static map_maker m;
    moe_mem mem;
    moe_error error = {0};
    uint8_t data[8192] = {0};
    uint32_t n_map = 0, n_units = sizeof m.units;
    m = (map_maker){.keys = keys, .n = MOE_COUNT(keys), .used = {true}};
    for (uint32_t i = 0; i < m.n; i++) {
        m.value[i] = n_map;
        memcpy(data + 4 + n_units + n_map, keys[i][1], strlen(keys[i][1]));
        n_map += (uint32_t)strlen(keys[i][1]) + 1;
    }
    map_place(&m, "", 0, 0);
    memcpy(data, &n_units, 4);
    memcpy(data + 4, m.units, n_units);
    mem_init(&mem, NULL, 0);
    text_arena arena = {.mem = &mem};
    text_buf out = {.mem = &mem};
    norm_step step = {.kind = NORM_CHARSMAP};
    CHECK(!charsmap_load(&step, data, 4 + n_units + n_map, &arena, "map", &error), "%s",
          error.message);
    for (size_t i = 0; i < MOE_COUNT(cases); i++)
        for (int longest = 0; longest < 2; longest++) {
            const char *want = longest ? cases[i].longest : cases[i].want;
            const uint8_t *text = (const uint8_t *)cases[i].text;
            step.kind = longest ? NORM_CHARSMAP_LONGEST : NORM_CHARSMAP;
            out.n = 0;
            CHECK(charsmap_apply(&step, text, strlen(cases[i].text), &out) &&
                      out.n == strlen(want) && (!out.n || !memcmp(out.data, want, out.n)),
                  "\"%s\" is \"%.*s\"", cases[i].text, (int)out.n, (const char *)out.data);
        }
    buf_free(&out);
    arena_free(&arena);
    CHECK(mem.used_bytes == 0, "%llu bytes leak", (unsigned long long)mem.used_bytes);
}

/* Vocabularies of a few tokens. The ids are those of the public implementation, but for the last
 * case, which is a rule of this one. */
static void small_vocabularies_give_their_ids(void)
{
#define SMALL(before, model) "{" before "\"model\":{" model "}}"
#define MARKS "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\u2581\"," \
              "\"prepend_scheme\":\"always\",\"split\":false},"
#define BYTES(more, fallback) "\"type\":\"BPE\",\"vocab\":{\"a\":0,\"<0xC3>\":1,\"<unk>\":2" more \
                              "},\"merges\":[],\"unk_token\":\"<unk>\",\"byte_fallback\":" fallback
    static const struct {
        const char *json, *text;
        size_t n;
        moe_token ids[3];
    } cases[] = {
        {SMALL(MARKS, "\"type\":\"BPE\",\"vocab\":{\"\u2581\":0,\"a\":1,\"\u2581\u2581\":2},"
                      "\"merges\":[[\"\u2581\",\"\u2581\"]]"), "\u2581", 1, {0}},
        {SMALL("", BYTES(",\"<0xA9>\":3", "true")), "a\u00E9", 3, {0, 1, 3}},
        {SMALL("", BYTES(",\"<0xA9>\":3", "false")), "a\u00E9", 2, {0, 2}},
        {SMALL("", BYTES("", "true")), "a\u00E9", 2, {0, 2}},
        {SMALL("", "\"type\":\"Unigram\",\"vocab\":[[\"x\",0],[\"a\",-1]],\"unk_id\":0"), "ab", 2,
         {1, 0}},
        // the kind of the model, where it is not named
        {SMALL("", "\"vocab\":[[\"x\",0],[\"a\",-1]],\"unk_id\":0"), "ab", 2, {1, 0}},
        {SMALL("", "\"vocab\":{\"a\":0,\"##a\":1,\"[UNK]\":2},\"unk_token\":\"[UNK]\","
                   "\"max_input_chars_per_word\":9,\"continuing_subword_prefix\":\"##\""),
         "aa", 2, {0, 1}},
        // what only an added token stands for is unknown to the model
        {SMALL("\"added_tokens\":[{\"id\":3,\"content\":\"\u00E9\",\"special\":true}],",
               BYTES("", "false")), "a\u00E9", 2, {0, 2}},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_tokenizer *tok;
        moe_error error = {0};
        moe_token ids[8];
        size_t n = 0;
        REQUIRE(!open_data(&tok, cases[i].json, strlen(cases[i].json), &error), "%zu: %s", i,
                error.message);
        moe_tokenizer_encode(tok, cases[i].text, strlen(cases[i].text), MOE_ENCODE_PLAIN, ids, 8,
                             &n, NULL);
        CHECK(n == cases[i].n && !memcmp(ids, cases[i].ids, n * sizeof *ids),
              "%zu: %zu tokens, %d %d", i, n, n ? ids[0] : -1, n > 1 ? ids[1] : -1);
        moe_tokenizer_close(tok);
    }
}

/* Tokens that mark structure, whatever a file says of them. */
static void marks_of_structure_are_known(void)
{
    static const struct { const char *text; bool looks; } cases[] = {
        {"<|im_end|>", true}, {"<|a|>", true}, {"<||>", false}, {"<|im_end>", false},
        {"im_end|>", false}, {"<\uFF5CUser\uFF5C>", true}, {"<unused7>", true}, {"<unused>", false},
        {"[@x@]", true}, {"[x]", false}, {"<pad>", true}, {"<mask>", true}, {"<mask", false},
        {"<b>", false}, {"", false}};
    for (size_t i = 0; i < MOE_COUNT(cases); i++)
        CHECK(tok_looks_control(cases[i].text, strlen(cases[i].text)) == cases[i].looks, "\"%s\"",
              cases[i].text);
}

/* --------------------------------------------------------------------------------- bad files -- */

static void malformed_json_is_refused(void)
{
#define BPE(vocab, merges) \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}}"
#define WITH(stage) "{" stage ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}"
    static const struct {
        const char *text;
        moe_status status;
    } cases[] = {
        {"{", MOE_ERR_FORMAT}, {"{}", MOE_ERR_FORMAT}, {"{\"model\":null}", MOE_ERR_FORMAT},
        {"{\"a\":1,\"a\":2}", MOE_ERR_FORMAT}, {"{\"a\":\"\\ud800\"}", MOE_ERR_FORMAT},
        {"{\"a\":01}", MOE_ERR_FORMAT}, {"{\"a\":NaN}", MOE_ERR_FORMAT},
        {"{\"a\":\"\x80\"}", MOE_ERR_FORMAT}, {"{} x", MOE_ERR_FORMAT},
        {BPE("{}", "[]"), MOE_ERR_FORMAT}, {BPE("{\"a\":2147483648}", "[]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":-1}", "[]"), MOE_ERR_FORMAT}, {BPE("{\"a\":0.5}", "[]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":0,\"b\":0}", "[]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":0}", "[\"a\"]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":0}", "[\"a b\"]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":0,\"b\":1}", "[\"a b\"]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":0,\"aa\":1}", "[\"a a\",\"a a\"]"), MOE_ERR_FORMAT},
        {BPE("{\"a\":0}", "[[\"a\"]]"), MOE_ERR_FORMAT},
        {WITH("\"pre_tokenizer\":{\"type\":\"FixedLength\",\"length\":0}"), MOE_ERR_FORMAT},
        {WITH("\"pre_tokenizer\":{\"type\":\"Nope\"}"), MOE_ERR_UNSUPPORTED},
        {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a\"},"
              "\"behavior\":\"Isolated\"}"),
         MOE_ERR_UNSUPPORTED},
        {WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\"}"),
         MOE_ERR_FORMAT},
        {WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"ab\"}"),
         MOE_ERR_FORMAT},
        {WITH("\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"abcdefgh\"}"),
         MOE_ERR_FORMAT},
        {WITH("\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"AAA=\"}"),
         MOE_ERR_FORMAT},
        {WITH("\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"/////wAA\"}"),
         MOE_ERR_FORMAT},
        {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\","
              "\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}],"
              "\"special_tokens\":{}}"), MOE_ERR_FORMAT},
        {WITH("\"post_processor\":{\"type\":\"BertProcessing\",\"sep\":[\"x\",9],"
              "\"cls\":[\"x\",9]}"),
         MOE_ERR_FORMAT},
        {WITH("\"added_tokens\":[{\"id\":1,\"content\":\"\"}]"), MOE_ERR_FORMAT},
        {WITH("\"added_tokens\":[{\"id\":4000000000,\"content\":\"x\"}]"), MOE_ERR_FORMAT},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_tokenizer *tok;
        moe_error error = {0};
        moe_status status = open_data(&tok, cases[i].text, strlen(cases[i].text), &error);
        CHECK(status == cases[i].status && !tok && error.status == status && error.message[0],
              "%s: %s %s", cases[i].text, moe_status_name(status), error.message);
        moe_tokenizer_close(tok);
    }
    char deep[3000];
    memset(deep, '[', sizeof deep);
    memcpy(deep, "{\"a\":", 5);
    moe_tokenizer *tok;
    CHECK(open_data(&tok, deep, sizeof deep, NULL) == MOE_ERR_FORMAT, "nesting");
}

/* `n` times `item`, commas between them, with "%d" in it counted, in `out`. */
static void put_items(corpus_text *out, const char *item, int n)
{
    char text[300];
    for (int i = 0; i < n; i++) {
        snprintf(text, sizeof text, item, i + 1, i + 1);
        corpus_put(out, i ? "," : "", i ? 1 : 0);
        corpus_put(out, text, strlen(text));
    }
}

/* A small tokenizer.json with a list of n items in it: its status, at opening or of a text "aa". */
static moe_status status_of_list(const char *before, const char *item, int n, const char *after)
{
    static const char model[] = ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}";
    corpus_text json = {0};
    moe_tokenizer *tok;
    moe_error error = {0};
    moe_token ids[64];
    size_t n_ids;
    corpus_put(&json, before, strlen(before));
    put_items(&json, item, n);
    corpus_put(&json, after, strlen(after));
    corpus_put(&json, model, sizeof model - 1);
    moe_status status = open_data(&tok, json.data, json.n, &error);
    if (tok)
        status = moe_tokenizer_encode(tok, "aa", 2, 0, ids, 64, &n_ids, &error);
    CHECK(status == error.status, "%s", error.message);
    moe_tokenizer_close(tok);
    free(json.data);
    return status;
}

/* A few bytes of rules that would fill all memory, or keep a processor busy for hours. */
static void files_that_make_much_of_little_are_refused(void)
{
#define REPLACE(to) "{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"" to "\"}"
#define NORMALIZER "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":["
#define DECODER "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":["
    static const struct {
        const char *before, *item;
        int n_good, n_bad;
        const char *after;
    } cases[] = {
        // texts that double: 2^12 times as long
        {NORMALIZER, REPLACE("aa"), 4, 12, "]}"},
        {NORMALIZER, REPLACE("aa"), 4, 12,
         "]},\"added_tokens\":[{\"id\":1,\"content\":\"aaa\",\"normalized\":true}]"},
        // tokens that decode to 2^6 times their text; steps that each go over all tokens
        {DECODER, REPLACE("aa"), 3, 6, "]}"},
        {DECODER, REPLACE("b"), 24, 25, "]}"},
        // some 600000 steps for each added token
        {"{\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"(a+)+$\"},\"content\":"
         "\"\"},\"added_tokens\":[", "{\"id\":%d,\"content\":\"aaaaaaaaaaaaaaaab%d\","
         "\"normalized\":true}", 2, 60, "]"},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_status good = status_of_list(cases[i].before, cases[i].item, cases[i].n_good,
                                         cases[i].after);
        moe_status bad = status_of_list(cases[i].before, cases[i].item, cases[i].n_bad,
                                        cases[i].after);
        CHECK(good == MOE_OK && bad == MOE_ERR_LIMIT, "case %zu: %s, %s", i, moe_status_name(good),
              moe_status_name(bad));
    }
}

/* What a JSON string stands for; `says`: why it is none. */
static void json_strings_are_read(void)
{
    static const struct {
        const char *json, *want, *says;
    } cases[] = {
        {"\"a\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "a\"\\/\b\f\n\r\t", NULL},
        {"\"\\u0041\\u00e9\\u20AC\"", "A\xC3\xA9\xE2\x82\xAC", NULL},
        {"\"\\uD83D\\ude00.\\udbff\\udfff\"", "\xF0\x9F\x98\x80.\xF4\x8F\xBF\xBF", NULL},
        {"\"\\ud800\\udc00\\ud7ff\\ue000\"", "\xF0\x90\x80\x80\xED\x9F\xBF\xEE\x80\x80", NULL},
        {"\"\\ud83d\"", NULL, "surrogate"},
        {"\"\\ud83d12345\"", NULL, "surrogate"},
        {"\"\\ud83d\\n1234\"", NULL, "surrogate"},
        {"\"\\ud83d\\ud83d\"", NULL, "surrogate"},
        {"\"\\ud83d\\u0041\"", NULL, "surrogate"},
        {"\"\\udc00\"", NULL, "surrogate"},
        {"\"\\udfff\\ud83d\"", NULL, "surrogate"},
        {"\"\\u00g0\"", NULL, "four hexadecimal"},
        {"\"\\u12\"", NULL, "four hexadecimal"},
        {"\"\\x\"", NULL, "unknown escape"},
        {"\"a\nb\"", NULL, "control character"},
        {"\"a", NULL, "not closed"},
        {"\"a\\\"", NULL, "not closed"},
        {"\xEF\xBB\xBF\"a\"", "a", NULL},
    };
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        text_arena arena = {.mem = &mem};
        json_doc doc;
        moe_error error = {0};
        const moe_status status =
            json_parse(&doc, cases[i].json, strlen(cases[i].json), &arena, "test", &error);
        CHECK((status == MOE_OK) == (cases[i].want != NULL), "%s: %s", cases[i].json,
              error.message);
        if (status) {
            CHECK(cases[i].says && strstr(error.message, cases[i].says), "%s: %s", cases[i].json,
                  error.message);
        } else {
            const json_node *node = doc.nodes;
            CHECK(node->n == strlen(cases[i].want) &&
                      !memcmp(node->as.text, cases[i].want, node->n),
                  "%s is \"%.*s\"", cases[i].json, (int)node->n, node->as.text);
            json_free(&doc);
        }
        arena_free(&arena);
    }
    CHECK(mem.used_bytes == 0, "%llu bytes leak", (unsigned long long)mem.used_bytes);
}

/* -- small GGUF files, built here -- */

typedef struct gguf_text {
    corpus_text bytes;
    uint64_t n_keys;
} gguf_text;

static void put_text(gguf_text *g, const char *text)
{
    uint64_t n = strlen(text);
    corpus_put(&g->bytes, &n, 8);
    corpus_put(&g->bytes, text, (size_t)n);
}

static void put_tokenizer_key(gguf_text *g, const char *name, uint32_t type)
{
    char key[80];
    snprintf(key, sizeof key, "tokenizer.ggml.%s", name);
    put_text(g, key);
    corpus_put(&g->bytes, &type, 4);
    g->n_keys++;
}

static void put_array(gguf_text *g, const char *name, uint32_t item, uint64_t n)
{
    put_tokenizer_key(g, name, 9);
    corpus_put(&g->bytes, &item, 4);
    corpus_put(&g->bytes, &n, 8);
}

/* An array of the strings of `text`, separated by '|'. */
static void put_strings(gguf_text *g, const char *name, const char *text)
{
    uint64_t n = *text ? 1 : 0;
    for (const char *p = text; *p; p++)
        n += *p == '|';
    put_array(g, name, 8, n);
    for (; n; n--) {
        char item[100];
        size_t bytes = strcspn(text, "|");
        snprintf(item, sizeof item, "%.*s", (int)bytes, text);
        put_text(g, item);
        text += bytes + 1;
    }
}

/* What varies between the cases; zeros give a file that loads. */
typedef struct gguf_case {
    const char *name, *model, *pre, *tokens, *merges;
    int n_scores, n_types, type_bytes, kind, charsmap;
    const char *id_key, *chat_template;
    uint32_t id;
    float score;
    moe_status status; // expected
} gguf_case;

static moe_status gguf_case_open(const gguf_case *c, moe_tokenizer **tok, moe_error *error)
{
    gguf_text g = {0};
    uint32_t version[2] = {0x46554747, 3}; // "GGUF"
    uint64_t counts[2] = {0, 0};
    corpus_put(&g.bytes, version, 8);
    corpus_put(&g.bytes, counts, 16);
    int n_tokens = 4;
    put_tokenizer_key(&g, "model", 8);
    put_text(&g, c->model ? c->model : "gpt2");
    put_tokenizer_key(&g, "pre", 8);
    put_text(&g, c->pre ? c->pre : "gpt-2");
    put_strings(&g, "tokens", c->tokens ? c->tokens : "a|b|ab|<s>");
    put_strings(&g, "merges", c->merges ? c->merges : "a b");
    int n_scores = n_tokens + c->n_scores, n_types = n_tokens + c->n_types;
    put_array(&g, "scores", 6, (uint64_t)n_scores);
    for (int i = 0; i < n_scores; i++) {
        float score = i == 1 && c->score != 0 ? c->score : (float)-i;
        corpus_put(&g.bytes, &score, 4);
    }
    put_array(&g, "token_type", c->type_bytes == 1 ? 1 : 5, (uint64_t)n_types);
    for (int i = 0; i < n_types; i++) {
        int32_t kind = i == 3 ? 3 : i == 0 && c->kind ? c->kind : 1;
        corpus_put(&g.bytes, &kind, c->type_bytes ? (size_t)c->type_bytes : 4);
    }
    if (c->charsmap) {
        put_array(&g, "precompiled_charsmap", 0, (uint64_t)c->charsmap);
        for (int i = 0; i < c->charsmap; i++)
            corpus_put(&g.bytes, i < 4 ? "\xFF" : "", 1);
    }
    if (c->id_key) {
        put_tokenizer_key(&g, c->id_key, 4);
        corpus_put(&g.bytes, &c->id, 4);
    }
    if (c->chat_template) {
        put_text(&g, "tokenizer.chat_template");
        corpus_put(&g.bytes, &(uint32_t){8}, 4);
        put_text(&g, c->chat_template);
        g.n_keys++;
    }
    memcpy(g.bytes.data + 16, &g.n_keys, 8);
    corpus_put(&g.bytes, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 32);
    moe_status status = open_data(tok, g.bytes.data, g.bytes.n, error);
    free(g.bytes.data);
    return status;
}

static void malformed_metadata_is_refused(void)
{
    static const gguf_case cases[] = {
        {.name = "control"},
        {.name = "control, scores", .model = "llama"},
        {.name = "control, unigram", .model = "t5"},
        {.name = "control, words", .model = "bert"},
        {.name = "unknown pre", .pre = "from the future"},
        {.name = "unknown model", .model = "nope", .status = MOE_ERR_UNSUPPORTED},
        {.name = "no tokens", .tokens = "", .status = MOE_ERR_FORMAT, .n_scores = -4,
         .n_types = -4},
        {.name = "scores too few", .n_scores = -1, .status = MOE_ERR_MODEL},
        {.name = "scores too many", .n_scores = 1, .status = MOE_ERR_MODEL},
        {.name = "types too few", .n_types = -1, .status = MOE_ERR_MODEL},
        {.name = "types of a byte", .type_bytes = 1, .status = MOE_ERR_MODEL},
        {.name = "type 7", .kind = 7, .status = MOE_ERR_MODEL},
        {.name = "type -1", .kind = -1, .status = MOE_ERR_MODEL},
        {.name = "score NaN", .score = NAN, .status = MOE_ERR_MODEL},
        {.name = "bos past the end", .id_key = "bos_token_id", .id = 4, .status = MOE_ERR_MODEL},
        {.name = "eot past the end", .id_key = "eot_token_id", .id = UINT32_MAX,
         .status = MOE_ERR_MODEL},
        {.name = "byte <0x-1>", .kind = 6, .tokens = "<0x-1>|b|ab|<s>", .status = MOE_ERR_MODEL},
        {.name = "byte <0xZZ>", .kind = 6, .tokens = "<0xZZ>|b|ab|<s>", .status = MOE_ERR_MODEL},
        {.name = "merge without a space", .merges = "ab", .status = MOE_ERR_FORMAT},
        {.name = "merge of an unknown part", .merges = "a c", .status = MOE_ERR_FORMAT},
        {.name = "merge to no token", .merges = "b a", .status = MOE_ERR_FORMAT},
        {.name = "merge twice", .merges = "a b|a b", .status = MOE_ERR_FORMAT},
        {.name = "merge of blanks", .merges = "   ", .status = MOE_ERR_FORMAT},
        {.name = "charsmap of 1 byte", .model = "t5", .charsmap = 1, .status = MOE_ERR_FORMAT},
        {.name = "charsmap of 3 bytes", .model = "t5", .charsmap = 3, .status = MOE_ERR_FORMAT},
        {.name = "charsmap too long inside", .model = "t5", .charsmap = 9,
         .status = MOE_ERR_FORMAT},
        {.name = "empty control token", .tokens = "a|b|ab|"},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_tokenizer *tok;
        moe_error error = {0};
        moe_token ids[32];
        size_t n;
        moe_status status = gguf_case_open(&cases[i], &tok, &error);
        CHECK(status == cases[i].status && (status ? !tok && error.message[0] : tok != NULL),
              "%s: %s %s", cases[i].name, moe_status_name(status), error.message);
        if (tok)
            CHECK(!moe_tokenizer_encode(tok, "ab <s> b", 8, 3, ids, 32, &n, &error), "%s: %s",
                  cases[i].name, error.message);
        moe_tokenizer_close(tok);
    }
}

/* Every file with one changed byte opens or is refused, and then encodes or is refused. */
static void changed_bytes_do_no_harm(void)
{
    static const char *const names[] = {"bpe_bytes", "bpe_marks", "bpe_words", "unigram",
                                        "wordpiece"};
    static const char text[] = "All human beings\u00E9 <|im_end|> 123 \U0001F642 "
                               "\u4EBA\u4EBA e\u0301";
    const char *rounds = getenv("MOE_TEST_ROUNDS");
    int n_rounds = rounds ? atoi(rounds) : 150;
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        char path[500];
        size_t bytes, n;
        moe_token ids[256];
        snprintf(path, sizeof path, "%s/data/tok_%s.json", test_root(), names[i]);
        char *data = test_read_file(path, &bytes);
        REQUIRE(data, "%s cannot be read", path);
        for (int k = 0; k < n_rounds; k++) {
            // most of a file is its vocabulary: half of the changes go to the steps before it
            size_t at = test_random() % (k & 1 ? bytes : MOE_MIN(bytes, (size_t)3000));
            char old = data[at];
            data[at] = "\"{}[]:,0-9.e\\\x01\xFF" "aZ<t "[test_random() % 20];
            moe_tokenizer *tok;
            moe_error error = {0};
            moe_status status = open_data(&tok, data, bytes, &error);
            CHECK((status == MOE_OK) == (tok != NULL) && (tok || error.message[0]), "%s", names[i]);
            if (tok)
                moe_tokenizer_encode(tok, text, strlen(text), test_random() & 3, ids, 256, &n,
                                     NULL);
            moe_tokenizer_close(tok);
            data[at] = old;
        }
        free(data);
    }
}

static void ends_and_roles_are_found(void)
{
    moe_tokenizer *tok = open_tokenizer("bpe_bytes");
    REQUIRE(tok, "no fixture");
    moe_token end;
    moe_tokenizer_encode(tok, "<|im_end|>", 10, MOE_ENCODE_PARSE_SPECIAL, &end, 1, &(size_t){0},
                         NULL);
    CHECK(moe_tokenizer_eos(tok) == end && moe_tokenizer_is_end(tok, end), "%d", end);
    CHECK(moe_tokenizer_bos(tok) == tok->template_ids[0] && !moe_tokenizer_is_end(tok, 5), "bos");
    const char *piece;
    size_t bytes;
    CHECK(!moe_tokenizer_piece(tok, end, &piece, &bytes) && bytes == 10 &&
          !memcmp(piece, "<|im_end|>", 10), "piece");
    CHECK(moe_tokenizer_piece(tok, (moe_token)moe_tokenizer_size(tok), &piece, &bytes) ==
          MOE_ERR_ARGUMENT, "past the end");
    moe_tokenizer_close(tok);
}

/* SentencePiece's merges go by score, the highest first, also above 0. */
static void higher_scores_merge_first(void)
{
    static const struct { float score; moe_token last; } cases[] = {{0.5f, 1}, {-0.5f, 2}};
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        // "ca" has a score of 0
        const gguf_case c = {.model = "llama", .tokens = "ca|ab|b|<s>", .score = cases[i].score};
        moe_tokenizer *tok;
        moe_error error = {0};
        moe_token ids[8];
        size_t n = 0;
        REQUIRE(!gguf_case_open(&c, &tok, &error), "%s", error.message);
        moe_tokenizer_encode(tok, "cab", 3, MOE_ENCODE_PLAIN, ids, 8, &n, NULL);
        CHECK(n > 0 && ids[n - 1] == cases[i].last, "score %g: %zu tokens, the last is %d",
              (double)cases[i].score, n, n ? ids[n - 1] : -1);
        moe_tokenizer_close(tok);
    }
}

static void chat_templates_are_given_as_they_are(void)
{
    static const char text[] = "{% for m in messages %}\n{{ m['content'] }}\u00E9{% endfor %}\n";
    const gguf_case with = {.chat_template = text}, without = {0};
    moe_tokenizer *tok;
    moe_error error = {0};
    REQUIRE(!gguf_case_open(&with, &tok, &error), "%s", error.message);
    const char *got = moe_tokenizer_chat_template(tok);
    CHECK(got && !strcmp(got, text), "\"%s\"", got ? got : "NULL");
    moe_tokenizer_close(tok);
    REQUIRE(!gguf_case_open(&without, &tok, &error), "%s", error.message);
    CHECK(!moe_tokenizer_chat_template(tok) && !moe_tokenizer_chat_template(NULL), "from nothing");
    moe_tokenizer_close(tok);
}

TEST_PROGRAM(tokenizer)
{
    RUN(small_tokenizers_give_the_oracles_ids);
    RUN(large_tokenizers_give_the_oracles_ids);
    RUN(vocabulary_files_give_their_pairs);
    RUN(invalid_utf8_becomes_replacement_characters);
    RUN(plain_text_never_makes_control_tokens);
    RUN(a_small_buffer_is_reported_with_the_size);
    RUN(decoding_streams_whole_characters);
    RUN(ends_and_roles_are_found);
    RUN(higher_scores_merge_first);
    RUN(chat_templates_are_given_as_they_are);
    RUN(long_runs_take_linear_time);
    RUN(patterns_match_as_oniguruma);
    RUN(hostile_patterns_end_soon);
    RUN(sets_of_characters_are_what_they_hold);
    RUN(character_maps_replace_graphemes);
    RUN(small_vocabularies_give_their_ids);
    RUN(marks_of_structure_are_known);
    RUN(malformed_json_is_refused);
    RUN(files_that_make_much_of_little_are_refused);
    RUN(json_strings_are_read);
    RUN(malformed_metadata_is_refused);
    RUN(changed_bytes_do_no_harm);
}
