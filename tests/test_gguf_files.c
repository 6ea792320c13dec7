/* tests/test_gguf_files.c - the GGUF loader and the world around a file: files that change or are
 * none, split files, read callbacks, limits, allocations that fail, random changes. */
#include "gguf_make.h"

/* ---------------------------------------------------------------------- files that change -- */

static void put_large(gguf_made *b)
{
    put_head(b, 3, 1, 1);
    put_key_string(b, "general.name", "a name that stays readable");
    put_tensor(b, "t", 16384, 0, 0, 0);
    put_data(b, 32, 65536);
}

static void g42_shrunk_after_open(void)
{
    gguf_made b = {0};
    put_large(&b);
    gguf_opened s;
    moe_str name = {0};
    opened_init(&s, &b, FROM_MAP, false);
    REQUIRE(!opened_open(&s), "%s", s.error.message);
    CHECK(!directory_check(s.dir, &s.error), "%s", s.error.message);
    CHECK(truncate(s.path, 10) == 0, "truncate");
    CHECK(directory_check(s.dir, &s.error) == MOE_ERR_IO && strstr(s.error.message, "shortened"),
          "%s", s.error.message);
    CHECK(!meta_string(s.dir, "general.name", true, &name, &s.error) &&
              str_equal(name, "a name that stays readable"),
          "the metadata is gone");
    opened_close(&s);
    opened_init(&s, &b, FROM_COPY, false); // a copy does not mind
    REQUIRE(!opened_open(&s), "%s", s.error.message);
    CHECK(truncate(s.path, 10) == 0, "truncate");
    bool ok;
    gguf_walk(s.dir, &ok);
    CHECK(!directory_check(s.dir, &s.error) && ok, "%s", s.error.message);
    opened_close(&s);
    free(b.data);
}

/* Cut to `bytes` bytes between two steps of an open: 0: before the header is read, 1: before the
 * map, 2: before the copy. */
static void shrink_during_open(const gguf_made *b, int step, off_t n)
{
    gguf_opened s;
    dir_file file = {0};
    moe_directory dir;
    opened_init(&s, b, FROM_MAP, false);
    dir_init(&dir, &s.mem);
    dir.files = &file;
    dir.n_files = 1;
    moe_status got = dir_file_open(&s.mem, &file, &s.options, &s.error);
    if (step == 0)
        CHECK(truncate(s.path, n) == 0, "truncate");
    if (!got)
        got = gguf_load_header(&dir, &file, false, &s.error);
    if (step > 0) {
        CHECK(!got, "%s", s.error.message);
        CHECK(truncate(s.path, n) == 0, "truncate");
        got = dir_load_data(&dir, step == 2, &s.error);
    }
    CHECK(got == MOE_ERR_IO && strstr(s.error.message, "shortened"), "step %d: %s, %s", step,
          moe_status_name(got), s.error.message);
    dir_clear(&dir);
    dir_file_close(&s.mem, &file);
    opened_close(&s);
}

static void g42_shrunk_during_open(void)
{
    gguf_made b = {0};
    put_large(&b);
    shrink_during_open(&b, 0, 20);
    shrink_during_open(&b, 1, 4096);
    shrink_during_open(&b, 2, 4096);
    free(b.data);
}

static void g43_not_a_regular_file(void)
{
    char fifo[512];
    snprintf(fifo, sizeof fifo, "%s/fifo", scratch_folder);
    REQUIRE(mkfifo(fifo, 0600) == 0, "mkfifo");
    const char *const paths[][2] = {{fifo, "a pipe"},
                                    {scratch_folder, "a folder"},
                                    {"/dev/random", "a device"},
                                    {"/dev/zero", "a device"},
                                    {"/no/such/file.gguf", "no such file"},
                                    {"", "no such file"}};
    alarm(20); // a loader that waits for the pipe's writer is ended
    for (size_t i = 0; i < MOE_COUNT(paths); i++) {
        gguf_made b = {0};
        gguf_opened s;
        opened_init(&s, &b, FROM_MAP, false);
        s.options.path = paths[i][0];
        CHECK(opened_open(&s) == MOE_ERR_IO && strstr(s.error.message, paths[i][1]), "%s",
              s.error.message);
        CHECK(strcmp(s.error.subject, paths[i][0]) == 0, "%s", s.error.subject);
        opened_close(&s);
    }
    alarm(0);
    unlink(fifo);
}

/* ---------------------------------------------------------------------------- split files -- */

typedef struct split_options {
    uint32_t n_parts, n_tensors, no_of_third;
    bool twin, omit_third, cut_third;
} split_options;

/* Writes NAME-0000i-of-0000N.gguf; the path of the first part comes back in `path`. */
static void write_split(const split_options *o, char path[512])
{
    for (uint32_t i = o->n_parts; i-- > 0;) {
        gguf_made b = {0};
        char name[32];
        put_head(&b, 3, 1, i == 0 ? 4 : 3);
        put_key_u16(&b, "split.no", (uint16_t)(i == 2 ? o->no_of_third : i));
        put_key_u16(&b, "split.count", (uint16_t)o->n_parts);
        put_key(&b, "split.tensors.count", META_I32);
        put_u32(&b, o->n_tensors);
        if (i == 0)
            put_key_string(&b, "general.name", "split");
        snprintf(name, sizeof name, "tensor.%u", o->twin && i == 2 ? 0 : i);
        put_tensor(&b, name, 8, 0, 0, 0);
        put_data(&b, 32, 32);
        b.data[b.n - 32] = (uint8_t)(100 + i);
        snprintf(path, 512, "%s/model-%05u-of-%05u.gguf", scratch_folder, i + 1, o->n_parts);
        unlink(path);
        if (i == 2 && o->cut_third)
            b.n -= 5;
        if (!(i == 2 && o->omit_third))
            scratch_write(path, b.data, b.n);
        free(b.data);
    }
}

static moe_status open_split(const split_options *o, gguf_opened *s)
{
    gguf_made none = {0};
    opened_init(s, &none, FROM_MAP, false);
    write_split(o, s->path);
    return opened_open(s);
}

static void valid_split(void)
{
    gguf_opened s;
    moe_status got = open_split(&(split_options){3, 3, 2, false, false, false}, &s);
    REQUIRE(!got, "%s", s.error.message);
    CHECK(directory_n_tensors(s.dir) == 3, "%zu tensors", directory_n_tensors(s.dir));
    for (uint32_t i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "tensor.%u", i);
        const moe_tensor *t = directory_tensor(s.dir, name);
        CHECK(t && t->file == i && t->data[0] == 100 + i && t->data[31] == 32, "%s", name);
    }
    CHECK(directory_meta(s.dir, "general.name"), "metadata of the first part");
    bool ok;
    gguf_walk(s.dir, &ok);
    CHECK(ok, "lookups");
    s.path[strlen(s.path) - strlen("1-of-00003.gguf")] = '3';
    CHECK(truncate(s.path, 40) == 0, "truncate");
    CHECK(directory_check(s.dir, &s.error) == MOE_ERR_IO &&
              strstr(s.error.message, "model-00003-of-00003"),
          "%s", s.error.message);
    opened_close(&s);
}

static void valid_split_copy_and_vocab_only(void)
{
    gguf_made none = {0};
    gguf_opened s;
    opened_init(&s, &none, FROM_COPY, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
    REQUIRE(!opened_open(&s), "%s", s.error.message);
    const moe_tensor *t = directory_tensor(s.dir, "tensor.2");
    CHECK(t && t->data[0] == 102, "data of the third part");
    opened_close(&s);
    opened_init(&s, &none, FROM_MAP, true); // the first part has the vocabulary
    write_split(&(split_options){3, 3, 2, false, true, false}, s.path);
    CHECK(!opened_open(&s), "%s", s.error.message);
    opened_close(&s);
}

static void split_errors(void)
{
    static const struct {
        split_options split;
        moe_status status;
        const char *text;
    } cases[] = {
        {{3, 3, 2, false, true, false}, MOE_ERR_IO, "part 3 of 3 (model-00003-of-00003.gguf)"},
        {{3, 3, 1, false, false, false}, MOE_ERR_FORMAT, "part 3 of 3 by the file's name, got 2"},
        {{3, 3, 2, true, false, false}, MOE_ERR_FORMAT, "tensor.0: expected each name once"},
        {{3, 3, 2, false, false, true}, MOE_ERR_FORMAT, "part 3 of 3"},
        {{3, 4, 2, false, false, false}, MOE_ERR_FORMAT, "expected 4 tensors in all parts, got 3"},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        gguf_opened s;
        moe_status got = open_split(&cases[i].split, &s);
        CHECK(got == cases[i].status && strstr(s.error.message, cases[i].text), "%s, %s",
              moe_status_name(got), s.error.message);
        CHECK(!s.dir, "a directory in spite of the error");
        opened_close(&s);
    }
}

/* Each byte of the second part's header changed: an error, or a directory that keeps its
 * promises. */
static void split_mutations(void)
{
    gguf_made none = {0};
    char second[512];
    size_t n = 0;
    gguf_opened s;
    opened_init(&s, &none, FROM_MAP, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, second);
    second[strlen(second) - strlen("1-of-00003.gguf")] = '2';
    uint8_t *part = (uint8_t *)test_read_file(second, &n);
    REQUIRE(part, "%s", second);
    opened_close(&s);
    for (size_t at = 0; at < 3 * (n - 32); at++) {
        static const uint8_t flips[3] = {0x01, 0x80, 0xff};
        bool ok = true;
        opened_init(&s, &none, FROM_MAP, false);
        snprintf(s.path, sizeof s.path, "%s/model-00001-of-00003.gguf", scratch_folder);
        part[at / 3] ^= flips[at % 3];
        scratch_write(second, part, n);
        if (opened_open(&s))
            CHECK(strstr(s.error.message, "part 2 of 3") || s.error.status == MOE_ERR_FORMAT, "%s",
                  s.error.message);
        else
            gguf_walk(s.dir, &ok);
        CHECK(ok, "byte %zu: a promise is broken", at / 3);
        part[at / 3] ^= flips[at % 3];
        opened_close(&s);
    }
    free(part);
}

static void split_from_another_part(void)
{
    gguf_made none = {0};
    gguf_opened s;
    opened_init(&s, &none, FROM_MAP, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
    s.path[strlen(s.path) - strlen("1-of-00003.gguf")] = '2';
    CHECK(opened_open(&s) == MOE_ERR_UNSUPPORTED &&
              strstr(s.error.message, "\"-00001-of-00003.gguf\""),
          "%s", s.error.message);
    opened_close(&s);
}

static void split_renamed(void)
{
    gguf_made none = {0};
    gguf_opened s;
    char other[512];
    opened_init(&s, &none, FROM_MAP, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
    snprintf(other, sizeof other, "%s/renamed.gguf", scratch_folder);
    CHECK(rename(s.path, other) == 0, "rename");
    s.options.path = other;
    CHECK(opened_open(&s) == MOE_ERR_FORMAT && strstr(s.error.message, "\"-00001-of-00003.gguf\""),
          "%s", s.error.message);
    opened_close(&s);
}

static void split_from_memory(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 2);
    put_key_u16(&b, "split.no", 0);
    put_key_u16(&b, "split.count", 2);
    for (int kind = FROM_MEMORY; kind < N_SOURCES; kind++) {
        gguf_opened s;
        opened_init(&s, &b, kind, false);
        CHECK(opened_open(&s) == MOE_ERR_UNSUPPORTED && strstr(s.error.message, "path"), "%s",
              s.error.message);
        opened_close(&s);
    }
    free(b.data);
}

static void split_numbers_of_wrong_kind(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "split.count", "2");
    refuse_always(&b, MOE_ERR_FORMAT, "split.count", "the string \"2\"");
    put_head(&b, 3, 0, 1);
    put_key_u32(&b, "split.count", 100000);
    refuse_always(&b, MOE_ERR_FORMAT, "split.count", "100000");
}

/* -------------------------------------------------------------------- options and callbacks -- */

static void one_source_must_be_set(void)
{
    gguf_made b = {0};
    put_valid(&b);
    gguf_opened s;
    opened_init(&s, &b, FROM_MEMORY, false);
    s.options.path = "x";
    CHECK(opened_open(&s) == MOE_ERR_ARGUMENT && strstr(s.error.message, "got 2"), "%s",
          s.error.message);
    s.options.path = NULL;
    s.options.data = NULL;
    CHECK(opened_open(&s) == MOE_ERR_ARGUMENT && strstr(s.error.message, "got 0"), "%s",
          s.error.message);
    s.options.data = s.block;
    s.options.data_bytes = b.n;
    CHECK(directory_open(&s.dir, &s.options, &s.mem, NULL) == MOE_OK, "without an error struct");
    opened_close(&s);
    free(b.data);
}

static void read_callback_fails(void)
{
    gguf_made b = {0};
    put_valid(&b);
    for (uint64_t call = 1; call < 3; call++) { // the header, the data
        gguf_opened s;
        opened_init(&s, &b, FROM_CALLBACK, false);
        s.fail_at_call = call;
        CHECK(opened_open(&s) == MOE_ERR_IO && strstr(s.error.message, "got 5") &&
                  s.n_read_calls == call,
              "%s", s.error.message);
        opened_close(&s);
    }
    free(b.data);
}

static uint64_t progress_calls, progress_last, progress_total, progress_step;

static void count_progress(void *user, const char *stage, uint64_t done, uint64_t total)
{
    (void)user;
    CHECK(strcmp(stage, "load") == 0 && done > progress_last && done <= total, "%s", stage);
    progress_step = MOE_MAX(progress_step, done - progress_last);
    progress_calls++;
    progress_last = done;
    progress_total = total;
}

/* 64 MiB of weights through a callback: small steps, progress up to the end, and a cancel that is
 * heeded at the next step. */
static void callback_in_steps(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "t", 16 << 20, 0, 0, 0);
    put_data(&b, 32, 64);
    b.data = realloc(b.data, b.n - 64 + (64 << 20));
    REQUIRE(b.data, "memory");
    memset(b.data + b.n - 64, 7, 64 << 20);
    b.n += (64 << 20) - 64;
    moe_host host;
    moe_host_init(&host);
    host.progress = count_progress;
    progress_calls = progress_last = progress_total = progress_step = 0;
    gguf_opened s;
    opened_init(&s, &b, FROM_CALLBACK, false);
    mem_init(&s.mem, &host, 0);
    REQUIRE(!opened_open(&s), "%s", s.error.message);
    CHECK(s.largest_read_bytes <= 16 << 20, "%llu", (unsigned long long)s.largest_read_bytes);
    CHECK(progress_last == progress_total && progress_total == 64 << 20 && progress_calls >= 4 &&
              progress_step <= 16 << 20,
          "%llu of %llu in %llu calls", (unsigned long long)progress_last,
          (unsigned long long)progress_total, (unsigned long long)progress_calls);
    CHECK(directory_tensor_at(s.dir, 0)->data[(64 << 20) - 1] == 7, "data");
    opened_close(&s);
    for (uint64_t call = 1; call < 6; call++) {
        opened_init(&s, &b, FROM_CALLBACK, false);
        s.cancel_at_call = call;
        CHECK(opened_open(&s) == MOE_ERR_CANCELLED && s.n_read_calls == call, "%s after %llu calls",
              s.error.message, (unsigned long long)s.n_read_calls);
        opened_close(&s);
    }
    for (int kind = 0; kind < N_SOURCES; kind++) { // set before the start
        opened_init(&s, &b, kind, false);
        moe_cancel_set(&s.cancel);
        CHECK(opened_open(&s) == MOE_ERR_CANCELLED, "%s", source_names[kind]);
        moe_cancel_clear(&s.cancel);
        CHECK(opened_open(&s) == MOE_OK, "%s", s.error.message);
        opened_close(&s);
    }
    free(b.data);
}

/* A callback that claims more bytes than any machine has: refused by the header alone. */
static void callback_of_absurd_size(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 0);
    gguf_opened s;
    opened_init(&s, &b, FROM_CALLBACK, false);
    free(s.block);
    s.block = NULL; // reads as zeros
    s.options.read_bytes = UINT64_MAX;
    CHECK(opened_open(&s) == MOE_ERR_FORMAT && strstr(s.error.message, "00 00 00 00"), "%s",
          s.error.message);
    CHECK(s.mem.peak_bytes < 2 << 20, "%llu", (unsigned long long)s.mem.peak_bytes);
    opened_close(&s);
    free(b.data);
}

static void header_over_the_limit(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "blob", META_U8, 80 << 20);
    put_zeros(&b, 80 << 20);
    refuse(&b, MOE_ERR_LIMIT, "blob", "67108864");
}

/* Empty strings cost 8 bytes in the file and 16 in memory: their number is bounded. */
static void strings_over_the_limit(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "tokens", META_STRING, 3 << 20);
    put_zeros(&b, 24 << 20);
    refuse(&b, MOE_ERR_LIMIT, "tokens", "3145728");
}

/* ---------------------------------------------------------------------- memory and mutation -- */

typedef struct failing_host {
    uint64_t n_alloc, fail_at, live;
} failing_host;

static void *failing_alloc(void *user, size_t n, size_t align)
{
    failing_host *h = user;
    void *p = NULL;
    if (h->n_alloc++ == h->fail_at || posix_memalign(&p, align, n) != 0)
        return NULL;
    h->live++;
    return memset(p, 0xa5, n); // nobody may count on zeros
}

static void failing_free(void *user, void *p, size_t n, size_t align)
{
    failing_host *h = user;
    (void)n;
    (void)align;
    h->live -= p != NULL;
    free(p);
}

/* Fails each allocation of an open in turn. kind N_SOURCES: a split file. */
static void fail_each_allocation(const gguf_made *b, int kind)
{
    for (uint64_t at = 0;; at++) {
        failing_host h = {.fail_at = at};
        moe_host host;
        gguf_opened s;
        moe_host_init(&host);
        host.user = &h;
        host.alloc = failing_alloc;
        host.free = failing_free;
        opened_init(&s, b, kind == N_SOURCES ? FROM_MAP : kind, false);
        if (kind == N_SOURCES)
            write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
        mem_init(&s.mem, &host, 0);
        moe_status got = opened_open(&s);
        bool hit = h.n_alloc > at;
        CHECK(hit ? got == MOE_ERR_MEMORY && !s.dir : got == MOE_OK, "allocation %llu: %s, %s",
              (unsigned long long)at, moe_status_name(got), s.error.message);
        opened_close(&s);
        CHECK(h.live == 0, "allocation %llu: %llu blocks left", (unsigned long long)at,
              (unsigned long long)h.live);
        if (!hit || at > 1000)
            return;
    }
}

static void allocation_failures(void)
{
    gguf_made b = {0};
    put_valid(&b);
    for (int kind = 0; kind <= N_SOURCES; kind++)
        fail_each_allocation(&b, kind);
    free(b.data);
}

static void ceiling_holds_for_files(void)
{
    gguf_made b = {0};
    put_large(&b);
    for (int kind = 0; kind < N_SOURCES; kind++) {
        bool opened = false;
        for (uint64_t limit = 64; limit < 300000 && !opened; limit += 512) {
            gguf_opened s;
            opened_init(&s, &b, kind, false);
            mem_init(&s.mem, NULL, limit);
            moe_status got = opened_open(&s);
            opened = got == MOE_OK;
            CHECK(opened || (got == MOE_ERR_LIMIT && strstr(s.error.message, "ceiling")), "%s, %s",
                  moe_status_name(got), s.error.message);
            CHECK(s.mem.peak_bytes <= limit, "peak %llu over %llu",
                  (unsigned long long)s.mem.peak_bytes, (unsigned long long)limit);
            opened_close(&s);
        }
        CHECK(opened, "%s: not within 300000 bytes", source_names[kind]);
    }
    free(b.data);
}

/* Every byte of the header changed in several ways: an error or a directory that holds what it
 * promises, and both sources agree. */
static void mutations(void)
{
    static const uint8_t flips[] = {0x01, 0x02, 0x10, 0x40, 0x80, 0xff, 0x7f};
    gguf_made whole = {0};
    put_valid(&whole);
    size_t n_ok = 0, n_refused = 0;
    for (size_t at = 0; at < whole.n - 136; at++) {
        for (size_t f = 0; f < MOE_COUNT(flips) * 2; f++) {
            moe_status status[2];
            whole.data[at] ^= flips[f / 2];
            for (int kind = 0; kind < 2; kind++) {
                gguf_opened s;
                bool ok = true;
                opened_init(&s, &whole, kind ? FROM_MEMORY : FROM_CALLBACK, f % 2);
                status[kind] = opened_open(&s);
                if (status[kind])
                    CHECK(s.error.message[0], "no message");
                else
                    gguf_walk(s.dir, &ok);
                CHECK(ok, "byte %zu ^ %02x: a promise is broken", at, flips[f / 2]);
                opened_close(&s);
            }
            CHECK(status[0] == status[1], "byte %zu ^ %02x: %d, %d", at, flips[f / 2], status[0],
                  status[1]);
            *(status[0] ? &n_refused : &n_ok) += 1;
            whole.data[at] ^= flips[f / 2];
        }
    }
    CHECK(n_ok > 100 && n_refused > 1000, "%zu opened, %zu refused", n_ok, n_refused);
    free(whole.data);
}

/* Hostile text in an error is shown as text: no control characters, whole UTF-8. */
static void errors_are_clean_text(void)
{
    gguf_made b = {0};
    moe_error e = {0};
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "split.count", "\x1b[31m\xff\xe2\x82\xac \x07\xc3");
    gguf_opened s;
    opened_init(&s, &b, FROM_MEMORY, false);
    CHECK(opened_open(&s) == MOE_ERR_FORMAT, "%s", s.error.message);
    CHECK(strstr(s.error.message, "\"?[31m?\xe2\x82\xac ??\""), "%s", s.error.message);
    opened_close(&s);
    free(b.data);
    char text[200];
    memset(text, 'x', sizeof text);
    memcpy(text + 125, "\xe2\x82\xac", 4); // the subject's end cuts it
    fail(&e, MOE_ERR_IO, text, "y");
    CHECK(strcmp(e.subject + 124, "x??") == 0, "%s", e.subject + 120);
}

static void fuzz_empty_header(void) // an index into a table of nothing
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 0);
    put_zeros(&b, 3);
    accept_mode(&b, true, NULL);
    accept(&b, NULL);
}

static void real_vocabularies(void)
{
    static const struct {
        const char *name;
        uint64_t n_tokens;
    } files[] = {{"bert-bge", 30522}, {"falcon", 65024}, {"gpt-2", 50257}, {"llama-spm", 32000}};
    if (!test_shared())
        SKIP("needs MOE_TEST_SHARED");
    for (size_t i = 0; i < MOE_COUNT(files); i++) {
        gguf_made none = {0};
        gguf_opened s;
        opened_init(&s, &none, FROM_MAP, true);
        snprintf(s.path, sizeof s.path, "%s/data/vocab/%s.gguf", test_shared(), files[i].name);
        REQUIRE(!opened_open(&s), "%s", s.error.message);
        const moe_meta *m = directory_meta(s.dir, "tokenizer.ggml.tokens");
        CHECK(m && m->n == files[i].n_tokens, "%s", files[i].name);
        opened_close(&s);
    }
}
TEST_PROGRAM(gguf_files)
{
    if (!scratch_begin("gguf-files"))
        return;
    RUN(valid_split);
    RUN(valid_split_copy_and_vocab_only);
    RUN(g42_shrunk_after_open);
    RUN(g42_shrunk_during_open);
    RUN(g43_not_a_regular_file);
    RUN(split_errors);
    RUN(split_mutations);
    RUN(split_from_another_part);
    RUN(split_renamed);
    RUN(split_from_memory);
    RUN(split_numbers_of_wrong_kind);
    RUN(one_source_must_be_set);
    RUN(read_callback_fails);
    RUN(callback_in_steps);
    RUN(callback_of_absurd_size);
    RUN(header_over_the_limit);
    RUN(strings_over_the_limit);
    RUN(allocation_failures);
    RUN(ceiling_holds_for_files);
    RUN(mutations);
    RUN(errors_are_clean_text);
    RUN(fuzz_empty_header);
    RUN(real_vocabularies);
    scratch_end();
}
