/* convert/meta.c - metadata in the making: GGUF keys and values in a buffer. A failure (no memory)
 * is remembered in `failed`, which is looked at when all is written. */
#ifndef MOE_CONVERT_META_C
#define MOE_CONVERT_META_C

#include "convert.h"

typedef struct meta_writer {
    text_buf *buf;
    uint64_t *n;
    bool failed;
} meta_writer;

static void meta_bytes(meta_writer *w, const void *data, size_t bytes)
{
    w->failed |= !buf_append(w->buf, data, bytes);
}

static void meta_number(meta_writer *w, uint64_t value, size_t bytes)
{
    meta_bytes(w, &value, bytes); // little-endian
}

static void meta_text(meta_writer *w, const char *text, size_t bytes)
{
    meta_number(w, bytes, 8);
    meta_bytes(w, text, bytes);
}

static void meta_key(meta_writer *w, const char *key, moe_meta_type type)
{
    meta_text(w, key, strlen(key));
    meta_number(w, (uint64_t)type, 4);
    ++*w->n;
}

static void meta_put_u32(meta_writer *w, const char *key, uint32_t value)
{
    meta_key(w, key, META_U32);
    meta_number(w, value, 4);
}

static void meta_put_f32(meta_writer *w, const char *key, float value)
{
    meta_key(w, key, META_F32);
    meta_bytes(w, &value, 4);
}

static void meta_put_bool(meta_writer *w, const char *key, bool value)
{
    meta_key(w, key, META_BOOL);
    meta_number(w, value, 1);
}

static void meta_put_text(meta_writer *w, const char *key, const char *text, size_t bytes)
{
    meta_key(w, key, META_STRING);
    meta_text(w, text, bytes);
}

static void meta_put_string(meta_writer *w, const char *key, const char *text)
{
    meta_put_text(w, key, text, strlen(text));
}

static void meta_put_array(meta_writer *w, const char *key, moe_meta_type item, uint64_t n)
{
    meta_key(w, key, META_ARRAY);
    meta_number(w, (uint64_t)item, 4);
    meta_number(w, n, 8);
}

/* Copies a key as it is. */
static void meta_put_copy(meta_writer *w, const moe_meta *m)
{
    meta_key(w, m->key, m->type);
    if (m->type == META_STRING)
        meta_number(w, m->data_bytes, 8);
    if (m->type == META_ARRAY) {
        meta_number(w, (uint64_t)m->item, 4);
        meta_number(w, m->n, 8);
    }
    meta_bytes(w, m->data, (size_t)m->data_bytes);
}

/* The metadata as the runtime reads it: it goes through the loader, like that of any other file. */
static moe_status meta_read_back(moe_directory **dir, const conv_source *s, text_buf *file,
                                 moe_error *error)
{
    uint64_t n = 0;
    meta_writer w = {file, &n, false};
    file->n = 0;
    meta_bytes(&w, "GGUF", 4);
    meta_number(&w, 3, 4);
    meta_number(&w, 0, 8);
    meta_number(&w, s->n_kv, 8);
    meta_bytes(&w, s->kv.data, s->kv.n);
    if (w.failed)
        return fail_memory(error, s->mem, "metadata", s->kv.n);
    moe_model_options options;
    moe_model_options_init(&options);
    options.data = file->data;
    options.data_bytes = file->n;
    options.vocab_only = true;
    return directory_open(dir, &options, s->mem, error);
}

#endif
