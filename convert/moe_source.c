/* convert/moe_source.c - a .moe file -> a source. Keys and the order of tensors are those of the
 * file that it was made from; the receipt is its own. Raw slices are read like any rows, compressed
 * ones segment by segment. */
#ifndef MOE_CONVERT_MOE_SOURCE_C
#define MOE_CONVERT_MOE_SOURCE_C

#include "gguf_source.c"

/* The slice of each part: [n_slices], tensor by tensor. */
static uint32_t *moe_source_slices(conv_source *s)
{
    const moefile *f = s->dir->moe;
    uint32_t *slices = arena_alloc(&s->arena, f->header.n_slices, sizeof *slices);
    for (uint32_t i = 0; slices && i < f->header.n_slices; i++) {
        const moefile_slice slice = moefile_slice_at(f, i);
        slices[f->first_part[slice.tensor] + slice.part] = i;
    }
    return slices;
}

/* The types of a stack's matrices, if they differ. */
static moe_status moe_source_types(conv_source *s, conv_tensor *t, moe_error *error)
{
    bool same = true;
    for (uint32_t i = 1; i < t->n_inputs; i++)
        same &= t->inputs[i].type == t->inputs[0].type;
    if (same)
        return MOE_OK;
    const moe_quant **types = arena_alloc(&s->arena, t->n_inputs, sizeof *types);
    if (!types)
        return fail_memory(error, s->mem, t->name, t->n_inputs * sizeof *types);
    for (uint32_t i = 0; i < t->n_inputs; i++)
        types[i] = t->inputs[i].type;
    t->source_types = types;
    return MOE_OK;
}

static moe_status moe_source_tensors(conv_source *s, moe_error *error)
{
    const moefile *f = s->dir->moe;
    const size_t n = directory_n_tensors(s->dir);
    const uint32_t *slices = moe_source_slices(s);
    s->tensors = arena_alloc(&s->arena, n, sizeof *s->tensors);
    conv_input *inputs = arena_alloc(&s->arena, f->header.n_slices, sizeof *inputs);
    if (!slices || !s->tensors || !inputs)
        return fail_memory(error, s->mem, "tensors", n * sizeof *s->tensors);
    for (size_t i = 0; i < n; i++) {
        const uint32_t n_parts = (uint32_t)moefile_n_parts(f, (uint32_t)i);
        conv_tensor *t = gguf_source_tensor(s, directory_tensor_at(s->dir, i));
        t->inputs = inputs + f->first_part[i];
        t->n_inputs = n_parts;
        for (uint32_t k = 0; k < n_parts; k++) {
            const moe_part *part = &f->parts[f->first_part[i] + k];
            const uint32_t slice = slices[f->first_part[i] + k];
            t->inputs[k] = (conv_input){.file = &s->files[0], .name = t->name,
                                        .offset = part->offset,
                                        .type = part->quant};
            if (moefile_slice_at(f, slice).encoding != MOEFILE_RAW)
                t->inputs[k].planes = slice + 1;
        }
        moe_status status = moe_source_types(s, t, error);
        if (status)
            return status;
    }
    return MOE_OK;
}

/* Fills an empty source from the file. */
static moe_status conv_open_moe(conv_source *s, const char *path, bool new_types, moe_error *error)
{
    moe_model_options options;
    moe_model_options_init(&options);
    options.path = path;
    options.vocab_only = true; // what is compressed is read in pieces
    conv_file *file;
    moe_status status = directory_open(&s->dir, &options, s->mem, error);
    if (!status)
        status = conv_file_open(s, path, &file, error);
    if (!status && file->bytes != s->dir->files->bytes)
        status = fail(error, MOE_ERR_IO, file->path,
                      "expected the file to stay as it was, but its size changed while it was "
                      "opened");
    if (status)
        return status;
    if (!s->dir->moe)
        return fail(error, MOE_ERR_FORMAT, path, "expected a .moe file by its name, got another");
    gguf_source_shape(s);
    status = gguf_source_keys(s, s->dir->moe->header.n_keys, new_types, error);
    return status ? status : moe_source_tensors(s, error);
}

/* Reads rows [row, row + n_rows) of a compressed input into dst: all segments that hold some of
 * them. */
static moe_status moe_source_read(const conv_source *s, const conv_input *in,
                                  const moefile_decoder *d, uint8_t *room, uint64_t row,
                                  uint64_t n_rows, uint64_t row_bytes, uint8_t *dst,
                                  moe_error *error)
{
    const moefile *f = s->dir->moe;
    const moefile_slice slice = moefile_slice_at(f, in->planes - 1);
    const moe_part *part = moefile_part_of(f, &slice);
    const uint64_t block_bytes = part->quant->block_bytes;
    const uint64_t segment_bytes = slice.segment_blocks * block_bytes;
    const uint64_t first = row * row_bytes, end = first + n_rows * row_bytes;
    uint64_t offset = part->offset, at = 0;
    moe_status status = MOE_OK;
    for (uint32_t i = slice.first_segment; at < end && !status; i++, at += segment_bytes) {
        const uint32_t stored = moefile_segment_at(f, i);
        const uint64_t bytes = MOE_MIN(segment_bytes, part->bytes - at);
        const uint64_t from = MOE_MAX(first, at), to = MOE_MIN(end, at + bytes);
        if (from < to) {
            status = plat_read(&in->file->os, offset, d->stored, stored, in->file->path, error);
            const moefile_blocks blocks = {part->quant, (size_t)(bytes / block_bytes),
                                           (size_t)moefile_row_blocks(s->dir, &slice)};
            if (!status)
                status = moefile_decode_segment(d, &blocks, d->stored, stored, room, in->name,
                                                error);
            if (!status)
                memcpy(dst + (from - first), room + (from - at), (size_t)(to - from));
        }
        offset += stored;
    }
    return status;
}

#endif
