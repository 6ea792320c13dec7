/* tests/gguf_make.h - GGUF files made in memory by a writer that can also write nonsense, and
 * opened through every kind of source: what must load gives the same everywhere, what must not is
 * refused with an error that says what was wrong, quickly, in bounded memory, with nothing left
 * behind.
 *
 * The test program calls scratch_begin() first. */
#ifndef MOE_TESTS_GGUF_MAKE_H
#define MOE_TESTS_GGUF_MAKE_H

#include "test.h"

#include "gguf_walk.h"
#include "scratch.h"

#include <time.h>

/* -------------------------------------------------------------------------------- writer -- */

typedef struct gguf_made {
    uint8_t *data;
    size_t n, capacity;
} gguf_made;

/* Room for n bytes more, which belong to b from then on. */
MOE_UNUSED static uint8_t *put_room(gguf_made *b, size_t n)
{
    if (b->n + n > b->capacity) {
        b->capacity = 2 * b->capacity + n + 256;
        b->data = realloc(b->data, b->capacity);
        if (!b->data)
            exit(2);
    }
    b->n += n;
    return b->data + b->n - n;
}

MOE_UNUSED static void put(gguf_made *b, const void *data, size_t n)
{
    uint8_t *room = put_room(b, n);
    if (n)
        memcpy(room, data, n);
}

MOE_UNUSED static void put_u8(gguf_made *b, uint8_t x) { put(b, &x, sizeof x); }
MOE_UNUSED static void put_u16(gguf_made *b, uint16_t x) { put(b, &x, sizeof x); }
MOE_UNUSED static void put_u32(gguf_made *b, uint32_t x) { put(b, &x, sizeof x); }
MOE_UNUSED static void put_u64(gguf_made *b, uint64_t x) { put(b, &x, sizeof x); }

MOE_UNUSED static void put_zeros(gguf_made *b, size_t n)
{
    memset(put_room(b, n), 0, n);
}

MOE_UNUSED static void put_string(gguf_made *b, const char *s)
{
    put_u64(b, strlen(s));
    put(b, s, strlen(s));
}

MOE_UNUSED static void put_head(gguf_made *b, uint32_t version, uint64_t n_tensors, uint64_t n_meta)
{
    put(b, "GGUF", 4);
    put_u32(b, version);
    put_u64(b, n_tensors);
    put_u64(b, n_meta);
}

MOE_UNUSED static void put_key(gguf_made *b, const char *key, uint32_t type)
{
    put_string(b, key);
    put_u32(b, type);
}

MOE_UNUSED static void put_key_u32(gguf_made *b, const char *key, uint32_t value)
{
    put_key(b, key, META_U32);
    put_u32(b, value);
}

MOE_UNUSED static void put_key_u16(gguf_made *b, const char *key, uint16_t value)
{
    put_key(b, key, META_U16);
    put_u16(b, value);
}

MOE_UNUSED static void put_key_string(gguf_made *b, const char *key, const char *value)
{
    put_key(b, key, META_STRING);
    put_string(b, value);
}

MOE_UNUSED static void put_key_array(gguf_made *b, const char *key, uint32_t item, uint64_t n)
{
    put_key(b, key, META_ARRAY);
    put_u32(b, item);
    put_u64(b, n);
}

/* An entry of two dimensions, or of one if the second is 0. */
MOE_UNUSED static void put_tensor(gguf_made *b, const char *name, uint64_t d0, uint64_t d1,
                                  uint32_t type, uint64_t offset)
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
MOE_UNUSED static void put_data(gguf_made *b, size_t align, size_t n)
{
    while (b->n % align)
        put_u8(b, 0);
    for (size_t i = 0; i < n; i++)
        put_u8(b, (uint8_t)(i + 1));
}

/* A good file with something of each kind: 2 tensors, 15 keys. */
MOE_UNUSED static void put_valid(gguf_made *b)
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

typedef struct gguf_opened {
    moe_model_options options;
    moe_mem mem;
    moe_error error;
    moe_directory *dir;
    char path[512];
    uint8_t *block; // an allocation of just the size, so that a sanitizer sees the byte behind it
    uint64_t n_read_calls, fail_at_call, cancel_at_call, largest_read_bytes;
    moe_cancel cancel;
} gguf_opened;

MOE_UNUSED static int opened_read(void *user, uint64_t offset, void *dst, size_t n)
{
    gguf_opened *s = user;
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

MOE_UNUSED static void opened_init(gguf_opened *s, const gguf_made *b, int kind, bool vocab_only)
{
    memset(s, 0, sizeof *s);
    mem_init(&s->mem, NULL, 0);
    moe_model_options_init(&s->options);
    s->options.vocab_only = vocab_only;
    s->options.cancel = &s->cancel;
    if (kind == FROM_MAP || kind == FROM_COPY) {
        snprintf(s->path, sizeof s->path, "%s", scratch_path("file.gguf"));
        scratch_write(s->path, b->data, b->n);
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
        s->options.read = opened_read;
        s->options.read_user = s;
        s->options.read_bytes = b->n;
    } else {
        s->options.data = s->block + shift;
        s->options.data_bytes = b->n;
    }
}

MOE_UNUSED static moe_status opened_open(gguf_opened *s)
{
    return directory_open(&s->dir, &s->options, &s->mem, &s->error);
}

MOE_UNUSED static void opened_close(gguf_opened *s)
{
    directory_close(s->dir);
    s->dir = NULL;
    CHECK(s->mem.used_bytes == 0, "%llu bytes left", (unsigned long long)s->mem.used_bytes);
    free(s->block);
    s->block = NULL;
}

/* Opens what was written from all sources, checks the error, and forgets it. `subject` and `text`
 * must stand in the error. */
MOE_UNUSED static void refuse_mode(gguf_made *b, bool vocab_only, moe_status status,
                                   const char *subject, const char *text)
{
    for (int kind = 0; kind < N_SOURCES; kind++) {
        gguf_opened s;
        opened_init(&s, b, kind, vocab_only);
        clock_t start = clock(); // processor time: other programs do not count
        moe_status got = opened_open(&s);
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
        opened_close(&s);
    }
    if (test_failures)
        printf("  (the message: see above; %zu bytes of file)\n", b->n);
}

MOE_UNUSED static void refuse(gguf_made *b, moe_status status, const char *subject,
                              const char *text)
{
    refuse_mode(b, false, status, subject, text);
    free(b->data);
    *b = (gguf_made){0};
}

/* For what is wrong however the file is opened. */
MOE_UNUSED static void refuse_always(gguf_made *b, moe_status status, const char *subject,
                                     const char *text)
{
    refuse_mode(b, true, status, subject, text);
    refuse(b, status, subject, text);
}

/* Opens from all sources; `look` may check the directory. */
MOE_UNUSED static void accept_mode(const gguf_made *b, bool vocab_only,
                                   void (*look)(const gguf_opened *s))
{
    uint64_t sum = 0;
    for (int kind = 0; kind < N_SOURCES; kind++) {
        gguf_opened s;
        bool ok = true;
        opened_init(&s, b, kind, vocab_only);
        moe_status got = opened_open(&s);
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
        opened_close(&s);
    }
}

MOE_UNUSED static void accept(gguf_made *b, void (*look)(const gguf_opened *s))
{
    accept_mode(b, false, look);
    free(b->data);
    *b = (gguf_made){0};
}

#endif
