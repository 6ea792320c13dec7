/* tests/gguf_edit.h - GGUF files taken apart, changed and put together again, in memory.
 *
 * For tests that need a file with one thing wrong, or a model with sizes of their own. It trusts
 * what it reads and stops the test program if memory runs out. */
#ifndef MOE_TESTS_GGUF_EDIT_H
#define MOE_TESTS_GGUF_EDIT_H

#include "test.h"

enum { EDIT_MAX_KEYS = 96, EDIT_MAX_TENSORS = 512 };

typedef struct edit_key {
    char name[96];
    uint32_t type;  // META_U32 and the like
    uint8_t *value; // as in the file
    size_t bytes;
} edit_key;

typedef struct edit_tensor {
    char name[64];
    uint32_t type, n_dims;
    uint64_t dims[4];
    uint8_t *data;
    size_t bytes;
} edit_tensor;

typedef struct gguf_edit {
    size_t n_keys, n_tensors;
    edit_key key[EDIT_MAX_KEYS];
    edit_tensor tensor[EDIT_MAX_TENSORS];
} gguf_edit;

static void *edit_memory(void *old, size_t bytes)
{
    void *p = realloc(old, bytes ? bytes : 1);
    if (!p) {
        printf("out of memory\n");
        exit(1);
    }
    return p;
}

/* ------------------------------------------------------------------------------------- keys -- */

MOE_UNUSED static edit_key *edit_find(gguf_edit *e, const char *name)
{
    for (size_t i = 0; i < e->n_keys; i++)
        if (!strcmp(e->key[i].name, name))
            return &e->key[i];
    return NULL;
}

MOE_UNUSED static void edit_drop(gguf_edit *e, const char *name)
{
    edit_key *k = edit_find(e, name);
    if (!k)
        return;
    free(k->value);
    memmove(k, k + 1, (size_t)(&e->key[e->n_keys--] - (k + 1)) * sizeof *k);
}

/* Sets a key, new or old, to a value as it stands in a file. */
MOE_UNUSED static void edit_set(gguf_edit *e, const char *name, uint32_t type, const void *value,
                                size_t bytes)
{
    edit_key *k = edit_find(e, name);
    if (!k) {
        k = &e->key[e->n_keys++];
        memset(k, 0, sizeof *k);
        snprintf(k->name, sizeof k->name, "%s", name);
    }
    k->type = type;
    k->bytes = bytes;
    k->value = edit_memory(k->value, bytes);
    memcpy(k->value, value, bytes);
}

MOE_UNUSED static void edit_set_u32(gguf_edit *e, const char *name, uint32_t value)
{
    edit_set(e, name, META_U32, &value, 4);
}

MOE_UNUSED static void edit_set_f32(gguf_edit *e, const char *name, float value)
{
    edit_set(e, name, META_F32, &value, 4);
}

MOE_UNUSED static void edit_set_string(gguf_edit *e, const char *name, const char *text)
{
    uint64_t n = strlen(text);
    uint8_t *value = edit_memory(NULL, 8 + n);
    memcpy(value, &n, 8);
    memcpy(value + 8, text, n);
    edit_set(e, name, META_STRING, value, 8 + n);
    free(value);
}

/* An array: `bytes` bytes hold n items, as they stand in a file. */
MOE_UNUSED static void edit_set_array(gguf_edit *e, const char *name, uint32_t item,
                                      const void *items, uint64_t n, size_t bytes)
{
    uint8_t *value = edit_memory(NULL, 12 + bytes);
    memcpy(value, &item, 4);
    memcpy(value + 4, &n, 8);
    memcpy(value + 12, items, bytes);
    edit_set(e, name, META_ARRAY, value, 12 + bytes);
    free(value);
}

/* The value of a u32 key; 0 if there is none. */
MOE_UNUSED static uint32_t edit_u32(gguf_edit *e, const char *name)
{
    uint32_t value = 0;
    const edit_key *k = edit_find(e, name);
    if (k && k->type == META_U32)
        memcpy(&value, k->value, 4);
    return value;
}

/* The value of a string key, with a NUL, in `text`. */
MOE_UNUSED static const char *edit_string(gguf_edit *e, const char *name, char *text, size_t bytes)
{
    const edit_key *k = edit_find(e, name);
    snprintf(text, bytes, "%.*s", k ? (int)(k->bytes - 8) : 0, k ? (const char *)k->value + 8 : "");
    return text;
}

/* ---------------------------------------------------------------------------------- tensors -- */

MOE_UNUSED static edit_tensor *edit_find_tensor(gguf_edit *e, const char *name)
{
    for (size_t i = 0; i < e->n_tensors; i++)
        if (!strcmp(e->tensor[i].name, name))
            return &e->tensor[i];
    return NULL;
}

MOE_UNUSED static void edit_drop_tensor(gguf_edit *e, edit_tensor *t)
{
    free(t->data);
    memmove(t, t + 1, (size_t)(&e->tensor[e->n_tensors--] - (t + 1)) * sizeof *t);
}

/* Gives a tensor another type and shape, and data of that size: the old data as far as it goes. */
MOE_UNUSED static void edit_reshape(edit_tensor *t, uint32_t type, uint32_t n_dims,
                                    const uint64_t *dims)
{
    const moe_quant *quant = quant_by_id(type);
    uint64_t shape[4] = {1, 1, 1, 1}; // dims may be t's own
    for (uint32_t i = 0; i < n_dims; i++)
        shape[i] = dims[i];
    size_t rows = (size_t)(shape[1] * shape[2] * shape[3]);
    size_t bytes = quant ? rows * (size_t)(shape[0] / quant->block_len * quant->block_bytes)
                         : rows * (size_t)shape[0];
    t->data = edit_memory(t->data, bytes);
    if (bytes > t->bytes)
        memset(t->data + t->bytes, 0, bytes - t->bytes);
    t->type = type;
    t->n_dims = n_dims;
    memcpy(t->dims, shape, sizeof shape);
    t->bytes = bytes;
}

/* A new tensor, all zero. */
MOE_UNUSED static edit_tensor *edit_add_tensor(gguf_edit *e, const char *name, const char *type,
                                               uint32_t n_dims, const uint64_t *dims)
{
    edit_tensor *t = &e->tensor[e->n_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    edit_reshape(t, quant_by_name(type)->id, n_dims, dims);
    return t;
}

/* -------------------------------------------------------------------------- reading, writing -- */

MOE_UNUSED static void edit_free(gguf_edit *e)
{
    if (!e)
        return;
    for (size_t i = 0; i < e->n_keys; i++)
        free(e->key[i].value);
    for (size_t i = 0; i < e->n_tensors; i++)
        free(e->tensor[i].data);
    free(e);
}

MOE_UNUSED static gguf_edit *edit_new(void)
{
    return memset(edit_memory(NULL, sizeof(gguf_edit)), 0, sizeof(gguf_edit));
}

MOE_UNUSED static gguf_edit *edit_copy(const gguf_edit *from)
{
    gguf_edit *e = edit_memory(NULL, sizeof *e);
    *e = *from;
    for (size_t i = 0; i < e->n_keys; i++)
        e->key[i].value = memcpy(edit_memory(NULL, e->key[i].bytes), from->key[i].value,
                                 e->key[i].bytes);
    for (size_t i = 0; i < e->n_tensors; i++)
        e->tensor[i].data = memcpy(edit_memory(NULL, e->tensor[i].bytes), from->tensor[i].data,
                                   e->tensor[i].bytes);
    return e;
}

/* Takes a whole file apart with the library's reader; NULL if that fails. */
MOE_UNUSED static gguf_edit *edit_read(const char *path)
{
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    moe_directory *dir = NULL;
    moe_error error = {0};
    if (directory_open_file(&dir, path, &mem, &error)) {
        printf("  %s\n", error.message);
        return NULL;
    }
    gguf_edit *e = edit_new();
    for (size_t i = 0; i < directory_n_meta(dir); i++) {
        const moe_meta *m = directory_meta_at(dir, i);
        if (m->type == META_STRING) {
            char *text = edit_memory(NULL, (size_t)m->strings->bytes + 1);
            snprintf(text, (size_t)m->strings->bytes + 1, "%.*s", (int)m->strings->bytes,
                     m->strings->data);
            edit_set_string(e, m->key, text);
            free(text);
        } else if (m->type == META_ARRAY) {
            edit_set_array(e, m->key, m->item, m->data, m->n, (size_t)m->data_bytes);
        } else {
            edit_set(e, m->key, m->type, m->data, (size_t)m->data_bytes);
        }
    }
    for (size_t i = 0; i < directory_n_tensors(dir); i++) {
        const moe_tensor *t = directory_tensor_at(dir, i);
        edit_tensor *copy = edit_add_tensor(e, t->name, t->quant->name, t->n_dims, t->dims);
        memcpy(copy->data, t->data, copy->bytes);
    }
    directory_close(dir);
    return e;
}

typedef struct edit_writer {
    uint8_t *data;
    size_t bytes, capacity;
} edit_writer;

static void edit_put(edit_writer *w, const void *data, size_t bytes)
{
    if (w->bytes + bytes > w->capacity) {
        w->capacity = 2 * w->capacity + bytes;
        w->data = edit_memory(w->data, w->capacity);
    }
    if (bytes)
        memcpy(w->data + w->bytes, data, bytes);
    w->bytes += bytes;
}

static void edit_put_name(edit_writer *w, const char *name)
{
    uint64_t n = strlen(name);
    edit_put(w, &n, 8);
    edit_put(w, name, n);
}

static void edit_put_padding(edit_writer *w)
{
    static const uint8_t zeros[32];
    edit_put(w, zeros, (size_t)(align_up(w->bytes, 32) - w->bytes));
}

/* Puts the file together, version 3, in memory from malloc. */
MOE_UNUSED static uint8_t *edit_write(const gguf_edit *e, size_t *bytes)
{
    edit_writer w = {0};
    uint64_t counts[2] = {e->n_tensors, e->n_keys}, offset = 0;
    edit_put(&w, "GGUF\3\0\0\0", 8);
    edit_put(&w, counts, sizeof counts);
    for (size_t i = 0; i < e->n_keys; i++) {
        edit_put_name(&w, e->key[i].name);
        edit_put(&w, &e->key[i].type, 4);
        edit_put(&w, e->key[i].value, e->key[i].bytes);
    }
    for (size_t i = 0; i < e->n_tensors; i++) {
        const edit_tensor *t = &e->tensor[i];
        edit_put_name(&w, t->name);
        edit_put(&w, &t->n_dims, 4);
        edit_put(&w, t->dims, 8 * t->n_dims);
        edit_put(&w, &t->type, 4);
        edit_put(&w, &offset, 8);
        offset += align_up(t->bytes, 32);
    }
    edit_put_padding(&w);
    for (size_t i = 0; i < e->n_tensors; i++) {
        edit_put(&w, e->tensor[i].data, e->tensor[i].bytes);
        edit_put_padding(&w);
    }
    *bytes = w.bytes;
    return w.data;
}

#endif
