/* tests/test_gguf.c - the GGUF loader: valid files load through every kind of source, and each
 * known way to break a loader (the names g01 to g43) ends in a typed error that says what was wrong,
 * quickly, in bounded memory, with nothing left behind.
 *
 * Files are made here, in memory, by a writer that can also write nonsense. */
#include "test.h"

#include "gguf_walk.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* -------------------------------------------------------------------------------- writer -- */

typedef struct bytes {
    uint8_t *data;
    size_t n, capacity;
} bytes;

static void put(bytes *b, const void *data, size_t n)
{
    if (b->n + n > b->capacity) {
        b->capacity = 2 * b->capacity + n + 256;
        b->data = realloc(b->data, b->capacity);
        if (!b->data)
            exit(2);
    }
    if (n)
        memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void put_u8(bytes *b, uint8_t x) { put(b, &x, sizeof x); }
static void put_u16(bytes *b, uint16_t x) { put(b, &x, sizeof x); }
static void put_u32(bytes *b, uint32_t x) { put(b, &x, sizeof x); }
static void put_u64(bytes *b, uint64_t x) { put(b, &x, sizeof x); }

static void put_zeros(bytes *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        put_u8(b, 0);
}

static void put_string(bytes *b, const char *s)
{
    put_u64(b, strlen(s));
    put(b, s, strlen(s));
}

static void put_head(bytes *b, uint32_t version, uint64_t n_tensors, uint64_t n_meta)
{
    put(b, "GGUF", 4);
    put_u32(b, version);
    put_u64(b, n_tensors);
    put_u64(b, n_meta);
}

static void put_key(bytes *b, const char *key, uint32_t type)
{
    put_string(b, key);
    put_u32(b, type);
}

static void put_key_u32(bytes *b, const char *key, uint32_t value)
{
    put_key(b, key, META_U32);
    put_u32(b, value);
}

static void put_key_u16(bytes *b, const char *key, uint16_t value)
{
    put_key(b, key, META_U16);
    put_u16(b, value);
}

static void put_key_string(bytes *b, const char *key, const char *value)
{
    put_key(b, key, META_STRING);
    put_string(b, value);
}

static void put_key_array(bytes *b, const char *key, uint32_t item, uint64_t n)
{
    put_key(b, key, META_ARRAY);
    put_u32(b, item);
    put_u64(b, n);
}

/* An entry of two dimensions, or of one if the second is 0. */
static void put_tensor(bytes *b, const char *name, uint64_t d0, uint64_t d1, uint32_t type,
                       uint64_t offset)
{
    put_string(b, name);
    put_u32(b, d1 ? 2 : 1);
    put_u64(b, d0);
    if (d1)
        put_u64(b, d1);
    put_u32(b, type);
    put_u64(b, offset);
}

/* Padding and n bytes of data, 1, 2, 3, ... */
static void put_data(bytes *b, size_t align, size_t n)
{
    while (b->n % align)
        put_u8(b, 0);
    for (size_t i = 0; i < n; i++)
        put_u8(b, (uint8_t)(i + 1));
}

/* A good file with something of each kind: 2 tensors, 15 keys. */
static void put_valid(bytes *b)
{
    static const uint8_t zeros[8];
    put_head(b, 3, 2, 15);
    put_key_string(b, "general.architecture", "llama");
    put_key_u32(b, "general.alignment", 32);
    for (uint32_t type = 0; type < META_N_TYPES; type++) {
        char key[32];
        snprintf(key, sizeof key, "array.%u", type);
        if (type == META_STRING || type == META_ARRAY)
            continue;
        put_key_array(b, key, type, 2);
        put(b, zeros, meta_types[type].bytes);
        put(b, zeros, meta_types[type].bytes);
    }
    put_key_array(b, "array.strings", META_STRING, 3);
    put_string(b, "one");
    put_string(b, "");
    put_string(b, "three");
    put_key_array(b, "array.empty", META_U32, 0);
    put_tensor(b, "token_embd.weight", 4, 3, 0, 0);
    put_tensor(b, "output.weight", 64, 2, 2, 64);
    put_data(b, 32, 64 + 72);
}

/* ------------------------------------------------------------------------------- sources -- */

/* How long a refusal may take. Sanitizers and emulators are some ten times slower. */
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer) ||                           \
    __has_feature(memory_sanitizer) || !defined(__OPTIMIZE__) || defined(__aarch64__)
enum { MAX_OPEN_MS = 10000 };
#else
enum { MAX_OPEN_MS = 1000 };
#endif

enum { FROM_MAP, FROM_COPY, FROM_MEMORY, FROM_UNALIGNED, FROM_CALLBACK, N_SOURCES };
static const char *const source_names[] = {"map", "copy", "memory", "unaligned", "callback"};

static char test_dir[256];

typedef struct source {
    moe_model_options options;
    moe_mem mem;
    moe_error error;
    moe_directory *dir;
    char path[512];
    uint8_t *block; // an allocation of just the size, so that a sanitizer sees the byte behind it
    uint64_t n_read_calls, fail_at_call, cancel_at_call, largest_read_bytes;
    moe_cancel cancel;
} source;

static int source_read(void *user, uint64_t offset, void *dst, size_t n)
{
    source *s = user;
    s->largest_read_bytes = MOE_MAX(s->largest_read_bytes, n);
    s->n_read_calls++;
    if (s->n_read_calls == s->cancel_at_call)
        moe_cancel_set(&s->cancel);
    if (s->n_read_calls == s->fail_at_call || offset > s->options.read_bytes ||
        n > s->options.read_bytes - offset)
        return 5;
    if (s->block)
        memcpy(dst, s->block + offset, n);
    else
        memset(dst, 0, n);
    return 0;
}

static bool write_file(const char *path, const uint8_t *data, size_t n)
{
    unlink(path); // file systems are quicker with a new file than with one that is cut to 0
    FILE *f = fopen(path, "wb");
    bool ok = f && (n == 0 || fwrite(data, 1, n, f) == n);
    if (f)
        ok &= fclose(f) == 0;
    return ok;
}

static void source_init(source *s, const bytes *b, int kind, bool vocab_only)
{
    memset(s, 0, sizeof *s);
    mem_init(&s->mem, NULL, 0);
    moe_model_options_init(&s->options);
    s->options.vocab_only = vocab_only;
    s->options.cancel = &s->cancel;
    if (kind == FROM_MAP || kind == FROM_COPY) {
        snprintf(s->path, sizeof s->path, "%s/file.gguf", test_dir);
        if (!write_file(s->path, b->data, b->n))
            exit(2);
        s->options.path = s->path;
        s->options.copy = kind == FROM_COPY;
        return;
    }
    size_t shift = kind == FROM_UNALIGNED ? 3 : 0;
    s->block = malloc(b->n + shift + !b->n);
    if (!s->block)
        exit(2);
    if (b->n)
        memcpy(s->block + shift, b->data, b->n);
    if (kind == FROM_CALLBACK) {
        s->options.read = source_read;
        s->options.read_user = s;
        s->options.read_bytes = b->n;
    } else {
        s->options.data = s->block + shift;
        s->options.data_bytes = b->n;
    }
}

static moe_status source_open(source *s)
{
    return directory_open(&s->dir, &s->options, &s->mem, &s->error);
}

static void source_close(source *s)
{
    directory_close(s->dir);
    s->dir = NULL;
    CHECK(s->mem.used_bytes == 0, "%llu bytes left", (unsigned long long)s->mem.used_bytes);
    free(s->block);
    s->block = NULL;
}

/* Opens what was written from all sources, checks the error, and forgets it. `subject` and `text`
 * must stand in the error. */
static void refuse_mode(bytes *b, bool vocab_only, moe_status status, const char *subject,
                        const char *text)
{
    for (int kind = 0; kind < N_SOURCES; kind++) {
        source s;
        source_init(&s, b, kind, vocab_only);
        clock_t start = clock(); // processor time: other programs do not count
        moe_status got = source_open(&s);
        long ms = (long)(clock() - start) / (CLOCKS_PER_SEC / 1000);
        CHECK(got == status && s.error.status == status, "%s: got %s, %s", source_names[kind],
              moe_status_name(got), s.error.message);
        CHECK(strcmp(s.error.subject, subject) == 0, "%s: subject \"%s\", not \"%s\"",
              source_names[kind], s.error.subject, subject);
        CHECK(strstr(s.error.message, text), "%s: \"%s\" lacks \"%s\"", source_names[kind],
              s.error.message, text);
        CHECK(strstr(s.error.message, "expected") && strstr(s.error.message, "got"), "\"%s\"",
              s.error.message);
        CHECK(!s.dir, "a directory in spite of the error");
        CHECK(s.mem.peak_bytes <= ((uint64_t)64 << 20) + b->n, "peak %llu bytes",
              (unsigned long long)s.mem.peak_bytes);
        CHECK(ms < MAX_OPEN_MS, "%ld ms", ms);
        source_close(&s);
    }
    if (test_failures)
        printf("  (the message: see above; %zu bytes of file)\n", b->n);
}

static void refuse(bytes *b, moe_status status, const char *subject, const char *text)
{
    refuse_mode(b, false, status, subject, text);
    free(b->data);
    *b = (bytes){0};
}

/* For what is wrong however the file is opened. */
static void refuse_always(bytes *b, moe_status status, const char *subject, const char *text)
{
    refuse_mode(b, true, status, subject, text);
    refuse(b, status, subject, text);
}

/* Opens from all sources; `look` may check the directory. */
static void accept_mode(const bytes *b, bool vocab_only, void (*look)(const source *s))
{
    uint64_t sum = 0;
    for (int kind = 0; kind < N_SOURCES; kind++) {
        source s;
        bool ok = true;
        source_init(&s, b, kind, vocab_only);
        moe_status got = source_open(&s);
        CHECK(got == MOE_OK, "%s: %s, %s", source_names[kind], moe_status_name(got),
              s.error.message);
        if (!got) {
            uint64_t this_sum = gguf_walk(s.dir, &ok);
            CHECK(ok, "%s: an entry is not found by its name", source_names[kind]);
            CHECK(kind == 0 || sum == this_sum, "%s: other content", source_names[kind]);
            CHECK(directory_check(s.dir, &s.error) == MOE_OK, "%s", s.error.message);
            sum = this_sum;
            if (look)
                look(&s);
        }
        source_close(&s);
    }
}

static void accept(bytes *b, void (*look)(const source *s))
{
    accept_mode(b, false, look);
    free(b->data);
    *b = (bytes){0};
}

/* ------------------------------------------------------------------------- valid controls -- */

static void look_valid(const source *s)
{
    const moe_tensor *t = directory_tensor(s->dir, "output.weight");
    const moe_meta *m = directory_meta(s->dir, "array.strings");
    REQUIRE(t && m, "missing entries");
    CHECK(directory_n_meta(s->dir) == 15 && directory_n_tensors(s->dir) == 2, "counts");
    CHECK(t->n_dims == 2 && t->dims[0] == 64 && t->dims[1] == 2 && t->dims[2] == 1 &&
              t->dims[3] == 1 && t->n_elements == 128 && t->bytes == 72 && t->file == 0,
          "shape of the tensor");
    CHECK(strcmp(t->quant->name, "Q4_0") == 0, "%s", t->quant->name);
    if (s->options.vocab_only)
        CHECK(!t->data, "data that was not asked for");
    else
        CHECK(t->data && t->data[0] == 65 && t->data[71] == 136, "data of the tensor");
    CHECK(m->n == 3 && str_equal(m->strings[0], "one") && str_equal(m->strings[1], "") &&
              str_equal(m->strings[2], "three"),
          "strings");
    CHECK(!directory_meta(s->dir, "general.name") && !directory_tensor(s->dir, "x"),
          "found what is not there");
    CHECK(directory_meta(s->dir, "array.empty")->n == 0, "empty array");
}

static void valid_v3(void)
{
    bytes b = {0};
    put_valid(&b);
    accept_mode(&b, true, look_valid);
    accept(&b, look_valid);
}

static void valid_v2(void)
{
    bytes b = {0};
    put_valid(&b);
    b.data[4] = 2;
    accept(&b, look_valid);
}

static void look_aligned(const source *s)
{
    const moe_tensor *t = directory_tensor(s->dir, "b");
    REQUIRE(t, "missing tensor");
    CHECK(t->offset % 4096 == 0 && t->data[0] == 1, "offset %llu", (unsigned long long)t->offset);
}

static void valid_big_alignment(void)
{
    bytes b = {0};
    put_head(&b, 3, 2, 1);
    put_tensor(&b, "a", 8, 0, 0, 0); // replaced below: the key comes first
    b.n = 24;
    put_key_u32(&b, "general.alignment", 4096);
    put_tensor(&b, "a", 8, 0, 0, 0);
    put_tensor(&b, "b", 8, 0, 0, 4096);
    put_data(&b, 4096, 32);
    put_data(&b, 4096, 32);
    accept(&b, look_aligned);
}

static void valid_small_alignment(void)
{
    bytes b = {0};
    put_head(&b, 3, 2, 1);
    put_key_u32(&b, "general.alignment", 8);
    put_tensor(&b, "a", 2, 0, 0, 0);
    put_tensor(&b, "b", 2, 0, 0, 8);
    put_data(&b, 8, 16);
    accept(&b, NULL);
}

static void valid_without_tensors(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "general.architecture", "gpt2");
    accept_mode(&b, true, NULL);
    accept(&b, NULL);
}

static void valid_empty(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 0);
    accept(&b, NULL);
}

/* G36: gaps between tensors, any order, and bytes behind the last are fine. */
static void valid_g36_gaps_and_order(void)
{
    bytes b = {0};
    put_head(&b, 3, 3, 0);
    put_tensor(&b, "late", 8, 0, 0, 128);
    put_tensor(&b, "early", 8, 0, 0, 0);
    put_tensor(&b, "middle", 8, 0, 0, 64);
    put_data(&b, 32, 128 + 32 + 77);
    accept(&b, NULL);
}

static void look_numbers(const source *s)
{
    uint32_t u = 7, list[3] = {0};
    float f = 0;
    bool flag = false;
    moe_str text = {0};
    moe_error e = {0};
    const moe_directory *d = s->dir;
    CHECK(!meta_u32(d, "n.4", true, 0, 200, &u, &e) && u == 100, "%s", e.message);
    CHECK(!meta_u32(d, "n.11", true, 0, 200, &u, &e) && u == 100, "%s", e.message);
    CHECK(!meta_f32(d, "n.12", true, 0, 200, &f, &e) && f == 100, "%s", e.message);
    CHECK(!meta_f32(d, "n.4", true, 0, 200, &f, &e) && f == 100, "%s", e.message);
    CHECK(!meta_bool(d, "n.7", true, &flag, &e) && flag, "%s", e.message);
    CHECK(!meta_string(d, "text", true, &text, &e) && str_equal(text, "abc"), "%s", e.message);
    CHECK(!meta_u32_list(d, "list", true, 0, 9, list, 3, &e) && list[0] == 3 && list[2] == 5, "%s",
          e.message);
    CHECK(!meta_u32_list(d, "n.4", true, 0, 200, list, 3, &e) && list[2] == 100, "%s", e.message);
}

/* What is missing is left alone, or an error; what is out of range or of another type is an error
 * with the value, and nothing is written. */
static void look_wrong_numbers(const source *s)
{
    uint32_t u = 7, list[3] = {77};
    float f = 0;
    bool flag = false;
    moe_str text = {0};
    moe_error e = {0};
    const moe_directory *d = s->dir;
    CHECK(!meta_u32(d, "none", false, 0, 9, &u, &e) && u == 7, "changed");
    CHECK(meta_u32(d, "none", true, 0, 9, &u, &e) == MOE_ERR_MODEL && strstr(e.message, "none"),
          "%s", e.message);
    CHECK(meta_u32(d, "n.4", true, 0, 99, &u, &e) == MOE_ERR_MODEL && u == 7 &&
              strstr(e.message, "0 to 99") && strstr(e.message, "100"),
          "%s", e.message);
    CHECK(meta_u32(d, "negative", true, 0, 99, &u, &e) == MOE_ERR_MODEL && strstr(e.message, "-1"),
          "%s", e.message);
    CHECK(meta_u32(d, "huge", true, 0, UINT32_MAX, &u, &e) == MOE_ERR_MODEL &&
              strstr(e.message, "18446744073709551615"),
          "%s", e.message);
    CHECK(meta_u32(d, "text", true, 0, 99, &u, &e) == MOE_ERR_MODEL && strstr(e.message, "\"abc\""),
          "%s", e.message);
    CHECK(meta_u32(d, "n.6", true, 0, 999, &u, &e) == MOE_ERR_MODEL, "an f32 is no integer");
    CHECK(meta_f32(d, "nan", true, -1e30, 1e30, &f, &e) == MOE_ERR_MODEL &&
              strstr(e.message, "nan"),
          "%s", e.message);
    CHECK(meta_bool(d, "n.4", true, &flag, &e) == MOE_ERR_MODEL, "a u32 is no bool");
    CHECK(meta_string(d, "n.4", true, &text, &e) == MOE_ERR_MODEL, "a u32 is no string");
    CHECK(meta_u32_list(d, "list", true, 0, 9, list, 4, &e) == MOE_ERR_MODEL &&
              strstr(e.message, "at least 4") && strstr(e.message, "got 3"),
          "%s", e.message);
    CHECK(meta_u32_list(d, "list", true, 0, 4, list, 3, &e) == MOE_ERR_MODEL && list[0] == 77, "%s",
          e.message);
}

/* 100 in each type, and what the typed readers make of it. */
static void valid_numbers_of_all_types(void)
{
    bytes b = {0};
    float f = 100, nan = NAN;
    double d = 100;
    put_head(&b, 3, 0, 16);
    for (uint32_t type = 0; type < META_N_TYPES; type++) {
        char key[16];
        snprintf(key, sizeof key, "n.%u", type);
        if (type == META_STRING || type == META_ARRAY)
            continue;
        put_key(&b, key, type);
        uint64_t x = type == META_BOOL ? 1 : 100;
        put(&b, type == META_F32 ? (void *)&f : type == META_F64 ? (void *)&d : (void *)&x,
            meta_types[type].bytes);
    }
    put_key_string(&b, "text", "abc");
    put_key(&b, "negative", META_I8);
    put_u8(&b, 0xff);
    put_key(&b, "huge", META_U64);
    put_u64(&b, UINT64_MAX);
    put_key(&b, "nan", META_F32);
    put(&b, &nan, 4);
    put_key_array(&b, "list", META_I16, 3);
    put_u16(&b, 3);
    put_u16(&b, 4);
    put_u16(&b, 5);
    accept_mode(&b, false, look_wrong_numbers);
    accept(&b, look_numbers);
}

static void look_vocabulary(const source *s)
{
    const moe_meta *m = directory_meta(s->dir, "tokenizer.ggml.tokens");
    REQUIRE(m && m->n == 200000, "tokens");
    CHECK(str_equal(m->strings[199999], "token 199999"), "last token");
}

/* A header larger than what is read of a file at first. */
static void valid_large_vocabulary(void)
{
    bytes b = {0};
    put_head(&b, 3, 1, 1);
    put_key_array(&b, "tokenizer.ggml.tokens", META_STRING, 200000);
    for (int i = 0; i < 200000; i++) {
        char token[32];
        snprintf(token, sizeof token, "token %d", i);
        put_string(&b, token);
    }
    put_tensor(&b, "t", 1, 0, 0, 0);
    put_data(&b, 32, 4);
    CHECK(b.n > 2 * GGUF_WINDOW_BYTES, "%zu bytes", b.n);
    accept(&b, look_vocabulary);
}

static void look_many_tensors(const source *s)
{
    char name[32];
    for (int i = 0; i < 70000; i += 777) {
        snprintf(name, sizeof name, "blk.%d.ffn.%d.weight", i / 1000, i % 1000);
        CHECK(directory_tensor(s->dir, name) == directory_tensor_at(s->dir, (size_t)i), "%s", name);
    }
}

/* As many tensors as the largest models have when each expert is one. */
static void valid_many_tensors(void)
{
    bytes b = {0};
    put_head(&b, 3, 70000, 0);
    for (int i = 0; i < 70000; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%d.ffn.%d.weight", i / 1000, i % 1000);
        put_tensor(&b, name, 8, 0, 0, 32 * (uint64_t)(69999 - i));
    }
    put_data(&b, 32, 70000 * 32);
    accept(&b, look_many_tensors);
}

static void look_vocab_only(const source *s)
{
    const moe_tensor *t = directory_tensor(s->dir, "odd");
    REQUIRE(t, "missing tensor");
    CHECK(!t->quant && !t->data && !t->bytes && t->n_elements == 7, "tensor of unknown type");
}

/* The metadata of a file that was cut off behind its header, with a type from the future. */
static void valid_vocab_only_of_cut_file(void)
{
    bytes b = {0};
    put_head(&b, 3, 2, 1);
    put_key_string(&b, "general.architecture", "llama");
    put_tensor(&b, "odd", 7, 0, 9999, 0);
    put_tensor(&b, "weight", 1024, 1024, 0, 32);
    accept_mode(&b, true, look_vocab_only);
    refuse(&b, MOE_ERR_UNSUPPORTED, "odd", "9999");
}

/* ----------------------------------------------------------------------- malformed: header -- */

static void g01_0_to_3_bytes(void)
{
    for (size_t n = 0; n < 4; n++) {
        bytes b = {0};
        put(&b, "GGU", n);
        refuse_always(&b, MOE_ERR_FORMAT, "magic", "cut off");
    }
}

static void g02_magic_only(void)
{
    bytes b = {0};
    put(&b, "GGUF", 4);
    refuse_always(&b, MOE_ERR_FORMAT, "version", "cut off");
}

static void g03_bad_magic(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 0);
    b.data[0] = 'P';
    refuse_always(&b, MOE_ERR_FORMAT, "magic", "50 47 55 46");
    put(&b, "tjgg", 4);
    put_zeros(&b, 100);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "magic", "predecessors");
}

static void g04_versions(void)
{
    bytes b = {0};
    put_head(&b, 0, 0, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "version", "got 0");
    put_head(&b, 1, 0, 0);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "version", "convert it again");
    put_head(&b, 4, 0, 0);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "version", "got 4; a newer version");
}

static void g05_swapped_version(void)
{
    bytes b = {0};
    put_head(&b, 0x03000000, 0, 0);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "version", "big-endian");
}

static void g06_n_kv_huge(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, UINT64_MAX);
    refuse_always(&b, MOE_ERR_FORMAT, "metadata_kv_count", "18446744073709551615");
}

static void g07_n_tensors_huge(void)
{
    bytes b = {0};
    put_head(&b, 3, UINT64_MAX / 96 + 2, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor_count", "192153584101141164");
}

static void g08_counts_exceed_bytes(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 5); // 5 keys in the place of 4
    put_zeros(&b, 69);
    refuse_always(&b, MOE_ERR_FORMAT, "metadata_kv_count", "at most 4 keys");
    put_head(&b, 3, 3, 1);
    put_zeros(&b, 14 + 3 * 33 - 1);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor_count", "at most 2 tensors");
}

/* ------------------------------------------------------------------------ malformed: keys -- */

static void put_bad_length(bytes *b, int where, uint64_t length)
{
    put_head(b, 3, where == 3, 1);
    if (where == 0) { // a key
        put_u64(b, length);
        put_zeros(b, 40);
    } else if (where == 1) { // a value
        put_key(b, "text", META_STRING);
        put_u64(b, length);
        put_zeros(b, 40);
    } else if (where == 2) { // in an array
        put_key_array(b, "text", META_STRING, 2);
        put_string(b, "ok");
        put_u64(b, length);
        put_zeros(b, 40);
    } else { // a tensor's name
        put_key_u32(b, "number", 1);
        put_u64(b, length);
        put_zeros(b, 40);
    }
}

static const char *const bad_length_subject[] = {"key 0", "text", "text", "tensor 0"};

static void g09_string_length_wraps(void)
{
    for (int where = 0; where < 4; where++) {
        bytes b = {0};
        put_bad_length(&b, where, UINT64_MAX);
        refuse_always(&b, MOE_ERR_FORMAT, bad_length_subject[where], "18446744073709551615");
        put_bad_length(&b, where, (uint64_t)1 << 63);
        refuse_always(&b, MOE_ERR_FORMAT, bad_length_subject[where], "9223372036854775808");
    }
}

static void g10_string_length_remaining_plus_1(void)
{
    for (int where = 0; where < 4; where++) {
        bytes b = {0};
        put_bad_length(&b, where, 41);
        refuse_always(&b, MOE_ERR_FORMAT, bad_length_subject[where], "expected 41 bytes");
    }
}

static void g11_bad_keys(void)
{
    static const struct {
        const char *key;
        size_t n;
        const char *text;
    } keys[] = {
        {"", 0, "1 to 65535 bytes"}, {"a\0b", 3, "byte 0x00"},     {"\xff", 1, "byte 0xff"},
        {"a\xc0\x80", 3, "0xc0"},    {"\xed\xa0\x80", 3, "0xed"},  {"a\xe2\x82", 3, "byte 0xe2"},
        {"line\n", 5, "byte 0x0a"},  {"\xf4\x90\x80\x80", 4, "0xf4"}, {"\xe0\x9f\xbf", 3, "0xe0"},
    };
    for (size_t i = 0; i < MOE_COUNT(keys); i++) {
        bytes b = {0};
        put_head(&b, 3, 0, 2);
        put_key_u32(&b, "good", 1);
        put_u64(&b, keys[i].n);
        put(&b, keys[i].key, keys[i].n);
        put_u32(&b, META_U32);
        put_zeros(&b, 40);
        refuse_always(&b, MOE_ERR_FORMAT, "key 1", keys[i].text);
    }
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_u64(&b, 65536);
    put_zeros(&b, 70000);
    refuse_always(&b, MOE_ERR_FORMAT, "key 0", "got 65536");
}

static void g12_value_type_out_of_range(void)
{
    static const uint32_t types[] = {13, 255, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        bytes b = {0};
        put_head(&b, 3, 0, 1);
        put_key(&b, "key", types[i]);
        put_zeros(&b, 16);
        char text[32];
        snprintf(text, sizeof text, "got %u", types[i]);
        refuse_always(&b, MOE_ERR_FORMAT, "key", text);
    }
}

static void g13_bad_array_item_type(void)
{
    static const uint32_t types[] = {13, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        bytes b = {0};
        put_head(&b, 3, 0, 1);
        put_key_array(&b, "key", types[i], 1);
        put_zeros(&b, 16);
        char text[32];
        snprintf(text, sizeof text, "got type %u", types[i]);
        refuse_always(&b, MOE_ERR_FORMAT, "key", text);
    }
}

static void g14_array_size_wraps(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_U64, ((uint64_t)1 << 61) + 1); // x 8 = 8
    put_zeros(&b, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "key", "2305843009213693953");
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_STRING, ((uint64_t)1 << 60) + 1); // x sizeof(moe_str) = 16
    put_zeros(&b, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "key", "1152921504606846977");
}

static void g15_nested_arrays(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key(&b, "key", META_ARRAY);
    for (int i = 0; i < 100000; i++) {
        put_u32(&b, META_ARRAY);
        put_u64(&b, 1);
    }
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "key", "array of arrays");
}

static void g16_array_count_2_63(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "k", META_U8, (uint64_t)1 << 63);
    b.n = 43; // part of the count is missing
    refuse_always(&b, MOE_ERR_FORMAT, "k", "cut off");
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "k", META_U8, (uint64_t)1 << 63);
    refuse_always(&b, MOE_ERR_FORMAT, "k", "9223372036854775808");
}

static void g17_truncated_array(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_STRING, 1000);
    for (int i = 0; i < 500; i++)
        put_string(&b, "0123456789abcdef");
    refuse_always(&b, MOE_ERR_FORMAT, "key", "cut off");
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_F32, 1000);
    put_zeros(&b, 3999);
    refuse_always(&b, MOE_ERR_FORMAT, "key", "expected 4000 bytes");
}

static void g18_duplicate_key(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 3);
    put_key_u32(&b, "same.key", 1);
    put_key_u32(&b, "other", 1);
    put_key_string(&b, "same.key", "x");
    refuse_always(&b, MOE_ERR_FORMAT, "same.key", "second");
}

static void put_many_keys(bytes *b, uint32_t n, const char *last)
{
    put_head(b, 3, 0, n);
    for (uint32_t i = 0; i + 1 < n; i++) {
        char key[32];
        snprintf(key, sizeof key, "key.%u", i);
        put_key(b, key, META_U8);
        put_u8(b, 0);
    }
    put_key(b, last, META_U8);
    put_u8(b, 0);
}

static void g19_many_keys(void)
{
    bytes b = {0};
    put_many_keys(&b, 1000000, "key.0");
    refuse_always(&b, MOE_ERR_LIMIT, "metadata_kv_count", "1000000");
    put_many_keys(&b, 200000, "key.0"); // the duplicate is found behind 200000 others
    refuse_always(&b, MOE_ERR_FORMAT, "key.0", "second");
    put_many_keys(&b, 200000, "last");
    accept(&b, NULL);
}

/* Keys whose hashes all fall on one slot of the table. */
static void g19_keys_that_collide(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 600);
    uint32_t n = 0;
    for (uint32_t i = 0; n < 600; i++) {
        char key[32];
        snprintf(key, sizeof key, "%u", i);
        if (dir_hash(key, strlen(key)) % 2048 == 0) {
            put_key_u32(&b, key, 0);
            n++;
        }
    }
    for (int kind = 0; kind < N_SOURCES; kind++) {
        source s;
        source_init(&s, &b, kind, false);
        CHECK(source_open(&s) == MOE_ERR_LIMIT && strstr(s.error.message, "collide"), "%s",
              s.error.message);
        source_close(&s);
    }
    free(b.data);
}

static void put_alignment(bytes *b, uint32_t type, uint64_t value)
{
    put_head(b, 3, 1, 1);
    put_key(b, "general.alignment", type);
    put(b, &value, meta_types[type].bytes);
    put_tensor(b, "t", 8, 0, 0, 0);
    put_data(b, 32, 32);
}

static void g20_alignment_0(void)
{
    bytes b = {0};
    put_alignment(&b, META_U32, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the u32 0");
}

static void g21_alignment_13(void)
{
    bytes b = {0};
    put_alignment(&b, META_U32, 13);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the u32 13");
}

static void g22_alignment_2_31(void)
{
    bytes b = {0};
    put_alignment(&b, META_U32, (uint64_t)1 << 31);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the u32 2147483648");
}

static void g23_alignment_of_other_type(void)
{
    bytes b = {0};
    put_alignment(&b, META_I32, 32);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the i32 32");
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "general.alignment", "32");
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the string \"32\"");
}

static void bool_of_2(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key(&b, "flag", META_BOOL);
    put_u8(&b, 2);
    refuse_always(&b, MOE_ERR_FORMAT, "flag", "got 2");
}

/* ---------------------------------------------------------------------- malformed: tensors -- */

static void put_shape(bytes *b, uint32_t n_dims, const uint64_t dims[4], uint32_t type)
{
    put_head(b, 3, 1, 0);
    put_string(b, "weird");
    put_u32(b, n_dims);
    for (uint32_t i = 0; i < MOE_MIN(n_dims, 5); i++)
        put_u64(b, dims[i % 4]);
    put_u32(b, type);
    put_u64(b, 0);
    put_data(b, 32, 64);
}

static void g24_n_dims(void)
{
    static const uint64_t ones[4] = {1, 1, 1, 1};
    static const uint32_t counts[] = {0, 5, UINT32_MAX};
    for (size_t i = 0; i < MOE_COUNT(counts); i++) {
        bytes b = {0};
        char text[32];
        put_shape(&b, counts[i], ones, 0);
        snprintf(text, sizeof text, "got %u", counts[i]);
        refuse_always(&b, MOE_ERR_FORMAT, "weird", text);
    }
}

static void g25_zero_dim(void)
{
    for (uint32_t i = 0; i < 4; i++) {
        uint64_t dims[4] = {1, 1, 1, 1};
        bytes b = {0};
        char text[48];
        dims[i] = 0;
        put_shape(&b, 4, dims, 0);
        snprintf(text, sizeof text, "dimension %u", i);
        refuse_always(&b, MOE_ERR_FORMAT, "weird", text);
    }
}

static void g26_negative_dim(void)
{
    bytes b = {0};
    put_shape(&b, 2, (uint64_t[4]){4, (uint64_t)-1, 1, 1}, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "got -1");
}

static void g27_product_over_int64(void)
{
    bytes b = {0};
    put_shape(&b, 2, (uint64_t[4]){(uint64_t)1 << 62, 2, 1, 1}, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "4611686018427387904 x 2 x 1 x 1");
}

static void g28_product_wraps_to_0(void)
{
    bytes b = {0};
    put_shape(&b, 2, (uint64_t[4]){(uint64_t)1 << 32, (uint64_t)1 << 32, 1, 1}, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "4294967296 x 4294967296");
}

static void g29_byte_size_wraps(void)
{
    bytes b = {0};
    put_shape(&b, 2, (uint64_t[4]){((uint64_t)1 << 62) + 8, 1, 1, 1}, 0); // x 4 = 32
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "64 bits");
}

static void g30_sum_of_sizes_wraps(void)
{
    bytes b = {0};
    put_head(&b, 3, 2, 0); // the second tensor's end is 2^64 + 32
    put_tensor(&b, "a", (uint64_t)1 << 61, 0, 0, 0);
    put_tensor(&b, "b", (uint64_t)1 << 61, 0, 0, (uint64_t)1 << 63);
    put_data(&b, 32, 64);
    refuse(&b, MOE_ERR_FORMAT, "a", "cut off");
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "a", (uint64_t)1 << 61, 0, 0, (uint64_t)1 << 63);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "a", "below 2^64");
}

static void g31_tensor_type_out_of_range(void)
{
    static const uint32_t types[] = {UINT32_MAX, 4096, 1000, 43};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        bytes b = {0};
        char text[32];
        put_shape(&b, 1, (uint64_t[4]){256, 1, 1, 1}, types[i]);
        snprintf(text, sizeof text, "got %u (unknown)", types[i]);
        refuse(&b, MOE_ERR_UNSUPPORTED, "weird", text);
    }
}

static void g32_removed_type(void)
{
    static const uint32_t types[] = {4, 5, 31, 32, 33, 36, 37, 38};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        bytes b = {0};
        put_shape(&b, 1, (uint64_t[4]){256, 1, 1, 1}, types[i]);
        refuse(&b, MOE_ERR_UNSUPPORTED, "weird", "removed");
    }
    bytes b = {0};
    put_shape(&b, 1, (uint64_t[4]){256, 1, 1, 1}, 26);
    refuse(&b, MOE_ERR_UNSUPPORTED, "weird", "26 (I32)");
}

static void g33_row_not_multiple_of_block(void)
{
    bytes b = {0};
    put_shape(&b, 2, (uint64_t[4]){48, 2, 1, 1}, 2);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "multiple of 32, the block of Q4_0, got rows of 48");
    put_shape(&b, 2, (uint64_t[4]){128, 2, 1, 1}, 12);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "multiple of 256");
}

static void g34_misaligned_offset(void)
{
    bytes b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 4, 0, 0, 16);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "multiple of 32, got 16");
}

static void g35_overlap(void)
{
    bytes b = {0};
    put_head(&b, 3, 3, 0);
    put_tensor(&b, "c", 8, 0, 0, 96);
    put_tensor(&b, "a", 9, 0, 0, 0); // 36 bytes
    put_tensor(&b, "b", 8, 0, 0, 32);
    put_data(&b, 32, 128);
    refuse_always(&b, MOE_ERR_FORMAT, "b", "\"a\"");
    put_head(&b, 3, 2, 0); // the same bytes twice
    put_tensor(&b, "a", 8, 0, 0, 0);
    put_tensor(&b, "b", 8, 0, 0, 0);
    put_data(&b, 32, 128);
    for (int kind = 0; kind < N_SOURCES; kind++) {
        source s;
        source_init(&s, &b, kind, false);
        CHECK(source_open(&s) == MOE_ERR_FORMAT && strstr(s.error.message, "overlap"), "%s",
              s.error.message);
        source_close(&s);
    }
    free(b.data);
}

static void g37_offset_plus_size_wraps(void)
{
    bytes b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 8, 0, 0, (uint64_t)0 - 32); // ends at 2^64 exactly, then data_start
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "below 2^64");
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 64, 0, 0, (uint64_t)0 - 288); // the start fits, the end does not
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "below 2^64");
}

static void g38_past_the_end(void)
{
    bytes b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 17, 0, 0, 0); // 68 bytes
    put_data(&b, 32, 67);
    accept_mode(&b, true, NULL);
    refuse(&b, MOE_ERR_FORMAT, "weird", "cut off");
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 1, 0, 0, (uint64_t)1 << 40);
    put_data(&b, 32, 67);
    refuse(&b, MOE_ERR_FORMAT, "weird", "cut off");
}

static void g39_duplicate_tensor(void)
{
    bytes b = {0};
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "twin", 8, 0, 0, 0);
    put_tensor(&b, "twin", 8, 0, 0, 32);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "twin", "second");
}

static void g40_tensor_name_length(void)
{
    char name[65] = "";
    bytes b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, 8, 0, 0, 0);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor 0", "got 0");
    memset(name, 'n', 64);
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, 8, 0, 0, 0);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor 0", "got 64");
    name[63] = 0;
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, 8, 0, 0, 0);
    put_data(&b, 32, 64);
    accept(&b, NULL);
}

/* Every cut is refused, and each error is of the kind of a file that ends too soon. */
static void g41_cut_at_every_byte(void)
{
    bytes whole = {0};
    put_valid(&whole);
    for (size_t n = 0; n < whole.n; n++) {
        for (int kind = 0; kind < N_SOURCES; kind++) {
            bytes b = {.data = whole.data, .n = n};
            source s;
            source_init(&s, &b, kind, false);
            moe_status got = source_open(&s);
            CHECK(got == MOE_ERR_FORMAT && s.error.message[0], "%s, cut at %zu: %s, %s",
                  source_names[kind], n, moe_status_name(got), s.error.message);
            source_close(&s);
        }
    }
    free(whole.data);
}

/* ---------------------------------------------------------------------- files that change -- */

static void put_large(bytes *b)
{
    put_head(b, 3, 1, 1);
    put_key_string(b, "general.name", "a name that stays readable");
    put_tensor(b, "t", 16384, 0, 0, 0);
    put_data(b, 32, 65536);
}

static void g42_shrunk_after_open(void)
{
    bytes b = {0};
    put_large(&b);
    source s;
    moe_str name = {0};
    source_init(&s, &b, FROM_MAP, false);
    REQUIRE(!source_open(&s), "%s", s.error.message);
    CHECK(!directory_check(s.dir, &s.error), "%s", s.error.message);
    CHECK(truncate(s.path, 10) == 0, "truncate");
    CHECK(directory_check(s.dir, &s.error) == MOE_ERR_IO && strstr(s.error.message, "shortened"),
          "%s", s.error.message);
    CHECK(!meta_string(s.dir, "general.name", true, &name, &s.error) &&
              str_equal(name, "a name that stays readable"),
          "the metadata is gone");
    source_close(&s);
    source_init(&s, &b, FROM_COPY, false); // a copy does not mind
    REQUIRE(!source_open(&s), "%s", s.error.message);
    CHECK(truncate(s.path, 10) == 0, "truncate");
    bool ok;
    gguf_walk(s.dir, &ok);
    CHECK(!directory_check(s.dir, &s.error) && ok, "%s", s.error.message);
    source_close(&s);
    free(b.data);
}

/* Cut to `bytes` bytes between two steps of an open: 0: before the header is read, 1: before the
 * map, 2: before the copy. */
static void shrink_during_open(const bytes *b, int step, off_t n)
{
    source s;
    dir_file file = {0};
    moe_directory dir;
    source_init(&s, b, FROM_MAP, false);
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
    source_close(&s);
}

static void g42_shrunk_during_open(void)
{
    bytes b = {0};
    put_large(&b);
    shrink_during_open(&b, 0, 20);
    shrink_during_open(&b, 1, 4096);
    shrink_during_open(&b, 2, 4096);
    free(b.data);
}

static void g43_not_a_regular_file(void)
{
    char fifo[512];
    snprintf(fifo, sizeof fifo, "%s/fifo", test_dir);
    REQUIRE(mkfifo(fifo, 0600) == 0, "mkfifo");
    const char *const paths[][2] = {{fifo, "a pipe"},
                                    {test_dir, "a folder"},
                                    {"/dev/random", "a device"},
                                    {"/dev/zero", "a device"},
                                    {"/no/such/file.gguf", "no such file"},
                                    {"", "no such file"}};
    alarm(20); // a loader that waits for the pipe's writer is ended
    for (size_t i = 0; i < MOE_COUNT(paths); i++) {
        bytes b = {0};
        source s;
        source_init(&s, &b, FROM_MAP, false);
        s.options.path = paths[i][0];
        uint64_t start = plat_time_ns();
        CHECK(source_open(&s) == MOE_ERR_IO && strstr(s.error.message, paths[i][1]), "%s",
              s.error.message);
        CHECK(plat_time_ns() - start < 1000000000, "waited");
        CHECK(strcmp(s.error.subject, paths[i][0]) == 0, "%s", s.error.subject);
        source_close(&s);
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
        bytes b = {0};
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
        snprintf(path, 512, "%s/model-%05u-of-%05u.gguf", test_dir, i + 1, o->n_parts);
        unlink(path);
        if (i == 2 && o->cut_third)
            b.n -= 5;
        if (!(i == 2 && o->omit_third) && !write_file(path, b.data, b.n))
            exit(2);
        free(b.data);
    }
}

static moe_status open_split(const split_options *o, source *s)
{
    bytes none = {0};
    source_init(s, &none, FROM_MAP, false);
    write_split(o, s->path);
    return source_open(s);
}

static void valid_split(void)
{
    source s;
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
    source_close(&s);
}

static void valid_split_copy_and_vocab_only(void)
{
    bytes none = {0};
    source s;
    source_init(&s, &none, FROM_COPY, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
    REQUIRE(!source_open(&s), "%s", s.error.message);
    const moe_tensor *t = directory_tensor(s.dir, "tensor.2");
    CHECK(t && t->data[0] == 102, "data of the third part");
    source_close(&s);
    source_init(&s, &none, FROM_MAP, true); // the first part has the vocabulary
    write_split(&(split_options){3, 3, 2, false, true, false}, s.path);
    CHECK(!source_open(&s), "%s", s.error.message);
    source_close(&s);
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
        source s;
        moe_status got = open_split(&cases[i].split, &s);
        CHECK(got == cases[i].status && strstr(s.error.message, cases[i].text), "%s, %s",
              moe_status_name(got), s.error.message);
        CHECK(!s.dir, "a directory in spite of the error");
        source_close(&s);
    }
}

/* Each byte of the second part's header changed: an error, or a directory that keeps its
 * promises. */
static void split_mutations(void)
{
    bytes none = {0};
    char second[512];
    size_t n = 0;
    source s;
    source_init(&s, &none, FROM_MAP, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, second);
    second[strlen(second) - strlen("1-of-00003.gguf")] = '2';
    uint8_t *part = (uint8_t *)test_read_file(second, &n);
    REQUIRE(part, "%s", second);
    source_close(&s);
    for (size_t at = 0; at < 3 * (n - 32); at++) {
        static const uint8_t flips[3] = {0x01, 0x80, 0xff};
        bool ok = true;
        source_init(&s, &none, FROM_MAP, false);
        snprintf(s.path, sizeof s.path, "%s/model-00001-of-00003.gguf", test_dir);
        part[at / 3] ^= flips[at % 3];
        if (!write_file(second, part, n))
            exit(2);
        if (source_open(&s))
            CHECK(strstr(s.error.message, "part 2 of 3") || s.error.status == MOE_ERR_FORMAT, "%s",
                  s.error.message);
        else
            gguf_walk(s.dir, &ok);
        CHECK(ok, "byte %zu: a promise is broken", at / 3);
        part[at / 3] ^= flips[at % 3];
        source_close(&s);
    }
    free(part);
}

static void split_from_another_part(void)
{
    bytes none = {0};
    source s;
    source_init(&s, &none, FROM_MAP, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
    s.path[strlen(s.path) - strlen("1-of-00003.gguf")] = '2';
    CHECK(source_open(&s) == MOE_ERR_UNSUPPORTED &&
              strstr(s.error.message, "\"-00001-of-00003.gguf\""),
          "%s", s.error.message);
    source_close(&s);
}

static void split_renamed(void)
{
    bytes none = {0};
    source s;
    char other[512];
    source_init(&s, &none, FROM_MAP, false);
    write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
    snprintf(other, sizeof other, "%s/renamed.gguf", test_dir);
    CHECK(rename(s.path, other) == 0, "rename");
    s.options.path = other;
    CHECK(source_open(&s) == MOE_ERR_FORMAT && strstr(s.error.message, "\"-00001-of-00003.gguf\""),
          "%s", s.error.message);
    source_close(&s);
}

static void split_from_memory(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 2);
    put_key_u16(&b, "split.no", 0);
    put_key_u16(&b, "split.count", 2);
    for (int kind = FROM_MEMORY; kind < N_SOURCES; kind++) {
        source s;
        source_init(&s, &b, kind, false);
        CHECK(source_open(&s) == MOE_ERR_UNSUPPORTED && strstr(s.error.message, "path"), "%s",
              s.error.message);
        source_close(&s);
    }
    free(b.data);
}

static void split_numbers_of_wrong_kind(void)
{
    bytes b = {0};
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
    bytes b = {0};
    put_valid(&b);
    source s;
    source_init(&s, &b, FROM_MEMORY, false);
    s.options.path = "x";
    CHECK(source_open(&s) == MOE_ERR_ARGUMENT && strstr(s.error.message, "got 2"), "%s",
          s.error.message);
    s.options.path = NULL;
    s.options.data = NULL;
    CHECK(source_open(&s) == MOE_ERR_ARGUMENT && strstr(s.error.message, "got 0"), "%s",
          s.error.message);
    s.options.data = s.block;
    s.options.data_bytes = b.n;
    CHECK(directory_open(&s.dir, &s.options, &s.mem, NULL) == MOE_OK, "without an error struct");
    source_close(&s);
    free(b.data);
}

static void read_callback_fails(void)
{
    bytes b = {0};
    put_valid(&b);
    for (uint64_t call = 1; call < 3; call++) { // the header, the data
        source s;
        source_init(&s, &b, FROM_CALLBACK, false);
        s.fail_at_call = call;
        CHECK(source_open(&s) == MOE_ERR_IO && strstr(s.error.message, "got 5") &&
                  s.n_read_calls == call,
              "%s", s.error.message);
        source_close(&s);
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
    bytes b = {0};
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
    source s;
    source_init(&s, &b, FROM_CALLBACK, false);
    mem_init(&s.mem, &host, 0);
    REQUIRE(!source_open(&s), "%s", s.error.message);
    CHECK(s.largest_read_bytes <= 16 << 20, "%llu", (unsigned long long)s.largest_read_bytes);
    CHECK(progress_last == progress_total && progress_total == 64 << 20 && progress_calls >= 4 &&
              progress_step <= 16 << 20,
          "%llu of %llu in %llu calls", (unsigned long long)progress_last,
          (unsigned long long)progress_total, (unsigned long long)progress_calls);
    CHECK(directory_tensor_at(s.dir, 0)->data[(64 << 20) - 1] == 7, "data");
    source_close(&s);
    for (uint64_t call = 1; call < 6; call++) {
        source_init(&s, &b, FROM_CALLBACK, false);
        s.cancel_at_call = call;
        CHECK(source_open(&s) == MOE_ERR_CANCELLED && s.n_read_calls == call, "%s after %llu calls",
              s.error.message, (unsigned long long)s.n_read_calls);
        source_close(&s);
    }
    for (int kind = 0; kind < N_SOURCES; kind++) { // set before the start
        source_init(&s, &b, kind, false);
        moe_cancel_set(&s.cancel);
        CHECK(source_open(&s) == MOE_ERR_CANCELLED, "%s", source_names[kind]);
        moe_cancel_clear(&s.cancel);
        CHECK(source_open(&s) == MOE_OK, "%s", s.error.message);
        source_close(&s);
    }
    free(b.data);
}

/* A callback that claims more bytes than any machine has: refused by the header alone. */
static void callback_of_absurd_size(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 0);
    source s;
    source_init(&s, &b, FROM_CALLBACK, false);
    free(s.block);
    s.block = NULL; // reads as zeros
    s.options.read_bytes = UINT64_MAX;
    CHECK(source_open(&s) == MOE_ERR_FORMAT && strstr(s.error.message, "00 00 00 00"), "%s",
          s.error.message);
    CHECK(s.mem.peak_bytes < 2 << 20, "%llu", (unsigned long long)s.mem.peak_bytes);
    source_close(&s);
    free(b.data);
}

static void header_over_the_limit(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "blob", META_U8, 80 << 20);
    b.data = realloc(b.data, b.n + (80 << 20));
    REQUIRE(b.data, "memory");
    memset(b.data + b.n, 0, 80 << 20);
    b.n += 80 << 20;
    refuse(&b, MOE_ERR_LIMIT, "blob", "67108864");
}

/* Empty strings cost 8 bytes in the file and 16 in memory: their number is bounded. */
static void strings_over_the_limit(void)
{
    bytes b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "tokens", META_STRING, 3 << 20);
    b.data = realloc(b.data, b.n + (24 << 20));
    REQUIRE(b.data, "memory");
    memset(b.data + b.n, 0, 24 << 20);
    b.n += 24 << 20;
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
static void fail_each_allocation(const bytes *b, int kind)
{
    for (uint64_t at = 0;; at++) {
        failing_host h = {.fail_at = at};
        moe_host host;
        source s;
        moe_host_init(&host);
        host.user = &h;
        host.alloc = failing_alloc;
        host.free = failing_free;
        source_init(&s, b, kind == N_SOURCES ? FROM_MAP : kind, false);
        if (kind == N_SOURCES)
            write_split(&(split_options){3, 3, 2, false, false, false}, s.path);
        mem_init(&s.mem, &host, 0);
        moe_status got = source_open(&s);
        bool hit = h.n_alloc > at;
        CHECK(hit ? got == MOE_ERR_MEMORY && !s.dir : got == MOE_OK, "allocation %llu: %s, %s",
              (unsigned long long)at, moe_status_name(got), s.error.message);
        source_close(&s);
        CHECK(h.live == 0, "allocation %llu: %llu blocks left", (unsigned long long)at,
              (unsigned long long)h.live);
        if (!hit || at > 1000)
            return;
    }
}

static void allocation_failures(void)
{
    bytes b = {0};
    put_valid(&b);
    for (int kind = 0; kind <= N_SOURCES; kind++)
        fail_each_allocation(&b, kind);
    free(b.data);
}

static void ceiling_holds(void)
{
    bytes b = {0};
    put_large(&b);
    for (int kind = 0; kind < N_SOURCES; kind++) {
        bool opened = false;
        for (uint64_t limit = 64; limit < 300000 && !opened; limit += 512) {
            source s;
            source_init(&s, &b, kind, false);
            mem_init(&s.mem, NULL, limit);
            moe_status got = source_open(&s);
            opened = got == MOE_OK;
            CHECK(opened || (got == MOE_ERR_LIMIT && strstr(s.error.message, "ceiling")), "%s, %s",
                  moe_status_name(got), s.error.message);
            CHECK(s.mem.peak_bytes <= limit, "peak %llu over %llu",
                  (unsigned long long)s.mem.peak_bytes, (unsigned long long)limit);
            source_close(&s);
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
    bytes whole = {0};
    put_valid(&whole);
    size_t n_ok = 0, n_refused = 0;
    for (size_t at = 0; at < whole.n - 136; at++) {
        for (size_t f = 0; f < MOE_COUNT(flips) * 2; f++) {
            moe_status status[2];
            whole.data[at] ^= flips[f / 2];
            for (int kind = 0; kind < 2; kind++) {
                source s;
                bool ok = true;
                source_init(&s, &whole, kind ? FROM_MEMORY : FROM_CALLBACK, f % 2);
                status[kind] = source_open(&s);
                if (status[kind])
                    CHECK(s.error.message[0], "no message");
                else
                    gguf_walk(s.dir, &ok);
                CHECK(ok, "byte %zu ^ %02x: a promise is broken", at, flips[f / 2]);
                source_close(&s);
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
    bytes b = {0};
    moe_error e = {0};
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "split.count", "\x1b[31m\xff\xe2\x82\xac \x07\xc3");
    source s;
    source_init(&s, &b, FROM_MEMORY, false);
    CHECK(source_open(&s) == MOE_ERR_FORMAT, "%s", s.error.message);
    CHECK(strstr(s.error.message, "\"?[31m?\xe2\x82\xac ??\""), "%s", s.error.message);
    source_close(&s);
    free(b.data);
    char text[200];
    memset(text, 'x', sizeof text);
    memcpy(text + 125, "\xe2\x82\xac", 4); // the subject's end cuts it
    fail(&e, MOE_ERR_IO, text, "y");
    CHECK(strcmp(e.subject + 124, "x??") == 0, "%s", e.subject + 120);
}

static void fuzz_empty_header(void) // an index into a table of nothing
{
    bytes b = {0};
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
        bytes none = {0};
        source s;
        source_init(&s, &none, FROM_MAP, true);
        snprintf(s.path, sizeof s.path, "%s/data/vocab/%s.gguf", test_shared(), files[i].name);
        REQUIRE(!source_open(&s), "%s", s.error.message);
        const moe_meta *m = directory_meta(s.dir, "tokenizer.ggml.tokens");
        CHECK(m && m->n == files[i].n_tokens, "%s", files[i].name);
        source_close(&s);
    }
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    const char *tmp = getenv("TMPDIR");
    snprintf(test_dir, sizeof test_dir, "%s/moe_gguf_XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(test_dir))
        return 2;

    RUN(valid_v3);
    RUN(valid_v2);
    RUN(valid_big_alignment);
    RUN(valid_small_alignment);
    RUN(valid_without_tensors);
    RUN(valid_empty);
    RUN(valid_g36_gaps_and_order);
    RUN(valid_numbers_of_all_types);
    RUN(valid_large_vocabulary);
    RUN(valid_many_tensors);
    RUN(valid_vocab_only_of_cut_file);
    RUN(valid_split);
    RUN(valid_split_copy_and_vocab_only);

    RUN(g01_0_to_3_bytes);
    RUN(g02_magic_only);
    RUN(g03_bad_magic);
    RUN(g04_versions);
    RUN(g05_swapped_version);
    RUN(g06_n_kv_huge);
    RUN(g07_n_tensors_huge);
    RUN(g08_counts_exceed_bytes);
    RUN(g09_string_length_wraps);
    RUN(g10_string_length_remaining_plus_1);
    RUN(g11_bad_keys);
    RUN(g12_value_type_out_of_range);
    RUN(g13_bad_array_item_type);
    RUN(g14_array_size_wraps);
    RUN(g15_nested_arrays);
    RUN(g16_array_count_2_63);
    RUN(g17_truncated_array);
    RUN(g18_duplicate_key);
    RUN(g19_many_keys);
    RUN(g19_keys_that_collide);
    RUN(g20_alignment_0);
    RUN(g21_alignment_13);
    RUN(g22_alignment_2_31);
    RUN(g23_alignment_of_other_type);
    RUN(bool_of_2);
    RUN(g24_n_dims);
    RUN(g25_zero_dim);
    RUN(g26_negative_dim);
    RUN(g27_product_over_int64);
    RUN(g28_product_wraps_to_0);
    RUN(g29_byte_size_wraps);
    RUN(g30_sum_of_sizes_wraps);
    RUN(g31_tensor_type_out_of_range);
    RUN(g32_removed_type);
    RUN(g33_row_not_multiple_of_block);
    RUN(g34_misaligned_offset);
    RUN(g35_overlap);
    RUN(g37_offset_plus_size_wraps);
    RUN(g38_past_the_end);
    RUN(g39_duplicate_tensor);
    RUN(g40_tensor_name_length);
    RUN(g41_cut_at_every_byte);
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
    RUN(ceiling_holds);
    RUN(mutations);
    RUN(errors_are_clean_text);
    RUN(fuzz_empty_header);
    RUN(real_vocabularies);

    char path[512];
    static const char *const left[] = {"file", "renamed", "model-00001-of-00003",
                                       "model-00002-of-00003", "model-00003-of-00003"};
    for (size_t i = 0; i < MOE_COUNT(left); i++) {
        snprintf(path, sizeof path, "%s/%s.gguf", test_dir, left[i]);
        unlink(path);
    }
    rmdir(test_dir);
    return test_end();
}
