/* convert/gguf_source.c - a GGUF file, whole or in parts -> a source. Keys stay the bytes they are;
 * tensors stay in their order. The loader has checked everything. */
#ifndef MOE_CONVERT_GGUF_SOURCE_C
#define MOE_CONVERT_GGUF_SOURCE_C

#include "files.c"
#include "meta.c"

/* Keys that describe the file rather than the model. */
static bool gguf_key_dropped(const char *key, bool split, bool new_types)
{
    if (split && !strncmp(key, "split.", 6))
        return true;
    return new_types &&
           (!strcmp(key, "general.file_type") || !strcmp(key, "general.quantization_version"));
}

/* Copies the first n keys. */
static moe_status gguf_source_keys(conv_source *s, size_t n, bool new_types, moe_error *error)
{
    meta_writer w = {&s->kv, &s->n_kv, false};
    for (size_t i = 0; i < n; i++) {
        const moe_meta *m = directory_meta_at(s->dir, i);
        s->has_file_type |= !strcmp(m->key, "general.file_type");
        if (!gguf_key_dropped(m->key, s->dir->n_files > 1, new_types))
            meta_put_copy(&w, m);
    }
    s->has_file_type &= !new_types;
    return w.failed ? fail_memory(error, s->mem, "metadata", s->kv.n) : MOE_OK;
}

/* Reads what the plan wants to know; a file without it is converted all the same. */
static void gguf_source_shape(conv_source *s)
{
    moe_str arch = {"", 0};
    char key[160];
    meta_string(s->dir, "general.architecture", false, &arch, NULL);
    snprintf(s->arch, sizeof s->arch, "%.*s", (int)MOE_MIN(arch.bytes, 63), arch.data);
    snprintf(key, sizeof key, "%s.block_count", s->arch);
    meta_u32(s->dir, key, false, 0, UINT32_MAX, &s->n_layer, NULL);
    snprintf(key, sizeof key, "%s.expert_count", s->arch);
    meta_u32(s->dir, key, false, 0, UINT32_MAX, &s->n_expert, NULL);
    s->tied = !directory_tensor(s->dir, "output.weight");
    uint32_t alignment = 32;
    meta_u32(s->dir, "general.alignment", false, 8, 1 << 20, &alignment, NULL);
    s->alignment = alignment;
}

/* The next tensor, but for where its rows come from. */
static conv_tensor *gguf_source_tensor(conv_source *s, const moe_tensor *from)
{
    conv_tensor *t = &s->tensors[s->n_tensors++];
    *t = (conv_tensor){.name = from->name, .n_dims = from->n_dims, .row_len = from->dims[0],
                       .n_rows = from->n_elements / from->dims[0]};
    memcpy(t->dims, from->dims, sizeof t->dims);
    t->is_vector = from->n_dims == 1 || strstr(from->name, "_norm.") != NULL;
    t->is_router = strstr(from->name, "ffn_gate_inp") != NULL;
    return t;
}

static moe_status gguf_source_tensors(conv_source *s, moe_error *error)
{
    const size_t n = directory_n_tensors(s->dir);
    s->tensors = arena_alloc(&s->arena, n, sizeof *s->tensors);
    conv_input *inputs = arena_alloc(&s->arena, n, sizeof *inputs);
    if (!s->tensors || !inputs)
        return fail_memory(error, s->mem, "tensors", n * sizeof *s->tensors);
    for (size_t i = 0; i < n; i++) {
        const moe_tensor *from = directory_tensor_at(s->dir, i);
        conv_tensor *t = gguf_source_tensor(s, from);
        t->inputs = &inputs[i];
        t->n_inputs = 1;
        inputs[i] = (conv_input){.file = &s->files[from->file], .name = from->name,
                                 .offset = from->offset, .type = from->quant};
    }
    return MOE_OK;
}

/* Fills an empty source from the file, or the first of its parts. */
static moe_status conv_open_gguf(conv_source *s, const char *path, bool new_types, moe_error *error)
{
    moe_status status = directory_open_file(&s->dir, path, s->mem, error);
    for (uint32_t i = 0; !status && i < s->dir->n_files; i++) {
        conv_file *file;
        status = conv_file_open(s, s->dir->files[i].path, &file, error);
        if (!status && file->bytes != s->dir->files[i].bytes)
            status = fail(error, MOE_ERR_IO, file->path,
                          "expected the file to stay as it was, but its size changed while it was "
                          "opened");
    }
    if (status)
        return status;
    gguf_source_shape(s);
    status = gguf_source_keys(s, directory_n_meta(s->dir), new_types, error);
    return status ? status : gguf_source_tensors(s, error);
}

#endif
