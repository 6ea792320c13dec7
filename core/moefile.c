/* core/moefile.c - the .moe container -> moe_directory.
 *
 * A .moe file stores a model as records, each a tensor or one expert, raw or as compressed planes.
 * docs/format.md is the specification, core/moeformat.h has the structs. Here they are checked and
 * made readable: raw slices are used where they are in the map, compressed ones are decoded into
 * one block of memory, by all cores.
 *
 * Owns nothing: everything goes into the directory. In: bytes that nobody has checked. Out: a
 * directory in which everything is.
 * Must never: use a number from the file before it was compared with what is there; decode into
 * memory that the file's size does not account for. */
#ifndef MOE_CORE_MOEFILE_C
#define MOE_CORE_MOEFILE_C

#ifndef MOE_NO_ZSTD
#ifndef ZSTD_STATIC_LINKING_ONLY
#define ZSTD_STATIC_LINKING_ONLY /* a decoder in memory that is counted */
#endif
#include <zstd.h>
#endif

#include "gguf.c"
#include "moeformat.h"

enum {
    MOEFILE_PIECE_BYTES = MOEFILE_SEGMENT_BYTES + MOEFILE_SEGMENT_EXTRA // what is read at once
};

/* What the directory of a .moe file knows beyond that of other files. */
typedef struct moefile {
    moefile_header header;
    const uint8_t *records, *slices, *segments; // tables of the file, at any alignment
    moe_part *parts;                            // [n_slices], tensor by tensor
    uint64_t *first_part;                       // [n_tensors]
} moefile;

/* ------------------------------------------------------------------------------- tables -- */

static moefile_record moefile_record_at(const moefile *f, uint32_t index)
{
    moefile_record r;
    memcpy(&r, f->records + (size_t)index * sizeof r, sizeof r);
    return r;
}

static moefile_slice moefile_slice_at(const moefile *f, uint32_t index)
{
    moefile_slice s;
    memcpy(&s, f->slices + (size_t)index * sizeof s, sizeof s);
    return s;
}

static uint32_t moefile_segment_at(const moefile *f, uint32_t index)
{
    uint32_t bytes;
    memcpy(&bytes, f->segments + (size_t)index * sizeof bytes, sizeof bytes);
    return bytes;
}

static uint64_t moefile_n_parts(const moefile *f, uint32_t tensor)
{
    const uint64_t end = tensor + 1 < f->header.n_tensors ? f->first_part[tensor + 1]
                                                          : f->header.n_slices;
    return end - f->first_part[tensor];
}

static moe_part *moefile_part_of(const moefile *f, const moefile_slice *s)
{
    return &f->parts[f->first_part[s->tensor] + s->part];
}

/* Blocks of a slice. */
static uint64_t moefile_n_blocks(const moe_part *part)
{
    return part->bytes / part->quant->block_bytes;
}

/* Of a row of a slice. */
static uint64_t moefile_row_blocks(const moe_directory *dir, const moefile_slice *s)
{
    const moe_part *part = moefile_part_of(dir->moe, s);
    return directory_tensor_at(dir, s->tensor)->dims[0] / part->quant->block_len;
}

/* What a person calls a slice: its tensor, and the expert if there are several. */
static const char *moefile_slice_name(const moe_directory *dir, const moefile_slice *s,
                                      char buf[128])
{
    const moe_tensor *t = directory_tensor_at(dir, s->tensor);
    if (moefile_n_parts(dir->moe, s->tensor) > 1)
        snprintf(buf, 128, "%s, expert %u", t->name, s->part);
    else
        snprintf(buf, 128, "%s", t->name);
    return buf;
}

/* And a record. */
static const char *moefile_record_name(const moe_directory *dir, uint32_t index, char buf[160])
{
    const moefile_record r = moefile_record_at(dir->moe, index);
    char first[128] = "";
    if (r.n_slices) {
        const moefile_slice s = moefile_slice_at(dir->moe, r.first_slice);
        snprintf(first, sizeof first, "%s", directory_tensor_at(dir, s.tensor)->name);
    }
    if (r.kind == MOEFILE_EXPERT)
        snprintf(buf, 160, "layer %u, expert %u (record %u)", r.layer, r.expert, index);
    else if (r.n_slices > 1)
        snprintf(buf, 160, "%s and %u more (record %u)", first, r.n_slices - 1, index);
    else
        snprintf(buf, 160, "%s (record %u)", r.n_slices ? first : "a part of unknown kind", index);
    return buf;
}

/* ------------------------------------------------------------------------------- header -- */

static moe_status moefile_check_version(const moefile_header *h, moe_error *error)
{
    if (h->major != MOEFILE_MAJOR)
        return fail(error, MOE_ERR_UNSUPPORTED, "version",
                    "expected version %d of the .moe format, got %u.%u; %s",
                    MOEFILE_MAJOR, h->major, h->minor,
                    h->major > MOEFILE_MAJOR ? "a newer version of this program may read it"
                                             : "convert the model again");
    if (h->features & MOEFILE_FEATURE_DRAFT_PLANES)
        return fail(error, MOE_ERR_UNSUPPORTED, "features",
                    "expected compressed weights of version %d.%d of the format, got those of a "
                    "draft; convert the source of this file again", MOEFILE_MAJOR, MOEFILE_MINOR);
    if (h->features & ~(uint64_t)MOEFILE_KNOWN_FEATURES)
        return fail(error, MOE_ERR_UNSUPPORTED, "features",
                    "expected no features but 0x%x, got 0x%llx; a newer version of this program "
                    "may read the file",
                    MOEFILE_KNOWN_FEATURES, (unsigned long long)h->features);
    return MOE_OK;
}

/* The sections of the directory have just the size that the header says. */
static moe_status moefile_check_sizes(const moefile_header *h, uint64_t file_bytes,
                                      moe_error *error)
{
    uint64_t bytes = 0;
    const uint64_t tables = (uint64_t)h->n_records * sizeof(moefile_record) +
                            (uint64_t)h->n_slices * sizeof(moefile_slice) +
                            (uint64_t)h->n_segments * sizeof(uint32_t);
    if (h->file_bytes != file_bytes)
        return fail(error, MOE_ERR_FORMAT, "file_bytes",
                    "expected a file of %llu bytes, got %llu: it is cut off or damaged; get it "
                    "again",
                    (unsigned long long)h->file_bytes, (unsigned long long)file_bytes);
    if (h->header_bytes != sizeof *h || h->reserved[0] || h->reserved[1] || h->reserved[2])
        return fail(error, MOE_ERR_FORMAT, "header", "expected %zu bytes with zeros at the end, "
                    "got %u bytes or other values", sizeof *h, h->header_bytes);
    if (h->directory_bytes > MOEFILE_MAX_DIRECTORY_BYTES)
        return fail(error, MOE_ERR_LIMIT, "directory_bytes", "expected at most %u, got %llu",
                    (unsigned)MOEFILE_MAX_DIRECTORY_BYTES, (unsigned long long)h->directory_bytes);
    if (h->directory_bytes > file_bytes - sizeof *h)
        return fail(error, MOE_ERR_FORMAT, "directory_bytes",
                    "expected at most the %llu bytes behind the header, got %llu",
                    (unsigned long long)(file_bytes - sizeof *h),
                    (unsigned long long)h->directory_bytes);
    if (!checked_add(h->keys_bytes, h->receipt_bytes, &bytes) ||
        !checked_add(bytes, h->tensors_bytes, &bytes) ||
        !checked_align(bytes, MOEFILE_TABLE_ALIGN, &bytes) || !checked_add(bytes, tables, &bytes) ||
        bytes != h->directory_bytes)
        return fail(error, MOE_ERR_FORMAT, "directory_bytes",
                    "expected the sum of the directory's sections, got %llu",
                    (unsigned long long)h->directory_bytes);
    if (h->data_offset < sizeof *h + h->directory_bytes || h->data_offset > file_bytes ||
        h->data_offset % MOEFILE_PAGE)
        return fail(error, MOE_ERR_FORMAT, "data_offset",
                    "expected a multiple of %d behind the directory, got %llu",
                    MOEFILE_PAGE, (unsigned long long)h->data_offset);
    return MOE_OK;
}

/* Has header and directory in *bytes, whole and as they were written. */
static moe_status moefile_read_directory(moe_directory *dir, dir_file *file, moefile_header *h,
                                         const uint8_t **bytes, moe_error *error)
{
    moe_status status;
    if (file->bytes < sizeof *h)
        return fail(error, MOE_ERR_FORMAT, "header", "expected %zu bytes, got a file of %llu",
                    sizeof *h, (unsigned long long)file->bytes);
    if ((status = dir_file_read(dir, file, 0, (uint8_t *)h, sizeof *h, error)) ||
        (status = moefile_check_version(h, error)) ||
        (status = moefile_check_sizes(h, file->bytes, error)))
        return status;
    *bytes = file->memory;
    if (!file->memory) {
        status = dir_file_read_head(dir, file, sizeof *h + h->directory_bytes, error);
        *bytes = file->head;
    }
    if (!status && moefile_root(h, *bytes + sizeof *h) != h->root)
        return fail(error, MOE_ERR_FORMAT, "directory",
                    "expected the checksum %016llx over header and directory, got another: the "
                    "file is damaged; get it again", (unsigned long long)h->root);
    return status;
}

/* ------------------------------------------------------------------- keys and tensors -- */

static moe_status moefile_end_section(const gguf_reader *r, const char *section)
{
    if (r->at == r->file_bytes)
        return MOE_OK;
    return fail(r->error, MOE_ERR_FORMAT, section, "expected a section that ends at %llu, got %llu",
                (unsigned long long)r->file_bytes, (unsigned long long)r->at);
}

/* Lets the reader see one section alone. */
static void moefile_begin_section(gguf_reader *r, uint64_t bytes)
{
    r->at = r->file_bytes;
    r->avail = r->file_bytes = r->at + bytes;
}

static moe_status moefile_parse_keys(gguf_reader *r, const char *section, uint32_t n,
                                     uint64_t bytes)
{
    moefile_begin_section(r, bytes);
    if (n > bytes / GGUF_MIN_META_BYTES)
        return fail(r->error, MOE_ERR_FORMAT, section, "expected at most %llu keys in %llu bytes, "
                    "got %u", (unsigned long long)(bytes / GGUF_MIN_META_BYTES),
                    (unsigned long long)bytes, n);
    moe_status status = dir_table_reserve(r->dir, &r->dir->meta, n, section, r->error);
    for (uint32_t i = 0; i < n && !status; i++)
        status = gguf_parse_meta(r, i);
    return status ? status : moefile_end_section(r, section);
}

static moe_status moefile_parse_tensor(gguf_reader *r, uint32_t index, uint64_t *n_parts_all)
{
    char what[32];
    moe_str name = {0};
    void *item = NULL;
    uint32_t n_parts = 0;
    moe_status status;
    snprintf(what, sizeof what, "tensor %u", index);
    if ((status = gguf_name(r, what, GGUF_MAX_NAME_BYTES, &name)) ||
        (status = dir_table_add(r->dir, &r->dir->tensor, name, &item, r->error)))
        return status;
    moe_tensor *t = item;
    if ((status = gguf_parse_shape(r, t)) || (status = gguf_u32(r, t->name, &n_parts)))
        return status;
    if (n_parts != 1 && (t->n_dims != 3 || n_parts != t->dims[2]))
        return fail(r->error, MOE_ERR_FORMAT, t->name,
                    "expected one part, or one for each matrix of a stack of them, got %u",
                    n_parts);
    r->dir->moe->first_part[index] = *n_parts_all;
    *n_parts_all += n_parts;
    if (*n_parts_all > r->dir->moe->header.n_slices)
        return fail(r->error, MOE_ERR_FORMAT, t->name, "expected at most %u slices by the header, "
                    "got more with the parts of this tensor", r->dir->moe->header.n_slices);
    t->parts = r->dir->moe->parts + r->dir->moe->first_part[index];
    return MOE_OK;
}

static moe_status moefile_parse_tensors(gguf_reader *r)
{
    moefile *f = r->dir->moe;
    const moefile_header *h = &f->header;
    enum { LEAST = 8 + 1 + 4 + 8 + 4 };
    moefile_begin_section(r, h->tensors_bytes);
    if (h->n_tensors > h->tensors_bytes / LEAST)
        return fail(r->error, MOE_ERR_FORMAT, "tensors",
                    "expected at most %llu in %llu bytes, got %u",
                    (unsigned long long)(h->tensors_bytes / LEAST),
                    (unsigned long long)h->tensors_bytes, h->n_tensors);
    moe_status status = dir_table_reserve(r->dir, &r->dir->tensor, h->n_tensors, "tensors",
                                          r->error);
    if (status)
        return status;
    f->parts = dir_alloc(r->dir, h->n_slices, sizeof *f->parts);
    f->first_part = dir_alloc(r->dir, h->n_tensors, sizeof *f->first_part);
    if (!f->parts || !f->first_part)
        return dir_fail_memory(r->dir, "slices", h->n_slices, sizeof *f->parts, r->error);
    uint64_t n_parts = 0;
    for (uint32_t i = 0; i < h->n_tensors && !status; i++)
        status = moefile_parse_tensor(r, i, &n_parts);
    if (!status && n_parts != h->n_slices)
        status = fail(r->error, MOE_ERR_FORMAT, "tensors",
                      "expected as many parts of tensors as slices, %u, got %llu", h->n_slices,
                      (unsigned long long)n_parts);
    return status ? status : moefile_end_section(r, "tensors");
}

/* ------------------------------------------------------------------- records and slices -- */

/* Where a walk over the records has got to: everything has one place, the next. */
typedef struct moefile_walk {
    moe_directory *dir;
    uint32_t slice, segment;   // the next
    uint64_t at;               // end of what is taken in the file, or in the record
    uint64_t decoded_bytes;    // of the record
    moe_error *error;
} moefile_walk;

/* The part that a slice holds: its type, size and place in the file. */
static moe_status moefile_take_part(moefile_walk *w, const moefile_slice *s, uint64_t record_offset)
{
    char name[128];
    const moefile *f = w->dir->moe;
    if (s->tensor >= f->header.n_tensors)
        return fail(w->error, MOE_ERR_FORMAT, "slices",
                    "expected a tensor below %u in slice %u, got %u",
                    f->header.n_tensors, w->slice, s->tensor);
    const moe_tensor *t = directory_tensor_at(w->dir, s->tensor);
    const uint64_t n_parts = moefile_n_parts(f, s->tensor);
    if (s->part >= n_parts || moefile_part_of(f, s)->bytes)
        return fail(w->error, MOE_ERR_FORMAT, t->name,
                    "expected each of its %llu parts once, got part %u in slice %u",
                    (unsigned long long)n_parts, s->part, w->slice);
    moe_part *part = moefile_part_of(f, s);
    const moe_quant *quant = quant_by_id(s->type);
    moefile_slice_name(w->dir, s, name);
    if (!quant && s->type >= QUANT_OWN_ID && s->type < QUANT_TCQ_ID)
        return fail(w->error, MOE_ERR_UNSUPPORTED, name,
                    "expected a type of version %u.%u of the format, got type %u of a draft; "
                    "convert the source of this file again", MOEFILE_MAJOR, MOEFILE_MINOR, s->type);
    if (!quant || s->layout)
        return fail(w->error, MOE_ERR_UNSUPPORTED, name,
                    "expected a type and a layout that this program computes with, got type %u in "
                    "layout %u; a newer version may know it", s->type, s->layout);
    if (t->dims[0] % quant->block_len)
        return fail(w->error, MOE_ERR_FORMAT, name,
                    "expected rows that are a multiple of %u, the block of %s, got rows of %llu",
                    quant->block_len, quant->name, (unsigned long long)t->dims[0]);
    *part = (moe_part){.quant = quant, .offset = record_offset + s->offset};
    if (!checked_mul(t->n_elements / n_parts / quant->block_len, quant->block_bytes,
                     &part->bytes) ||
        !checked_add(w->decoded_bytes, part->bytes, &w->decoded_bytes))
        return fail(w->error, MOE_ERR_FORMAT, name, "expected a size that fits into 64 bits");
    return MOE_OK;
}

/* The sizes of a compressed slice's segments add up, and none is larger than a reader's buffer. */
static moe_status moefile_take_segments(moefile_walk *w, const moefile_slice *s, const char *name)
{
    const moefile *f = w->dir->moe;
    const moe_part *part = moefile_part_of(f, s);
    const uint64_t n_blocks = moefile_n_blocks(part), per = s->segment_blocks;
    if (per == 0 || per * part->quant->block_bytes > MOEFILE_SEGMENT_BYTES)
        return fail(w->error, MOE_ERR_FORMAT, name,
                    "expected segments of 1 to %u blocks of %s, got %u",
                    MOEFILE_SEGMENT_BYTES / part->quant->block_bytes, part->quant->name,
                    s->segment_blocks);
    const uint64_t per_row = moefile_row_blocks(w->dir, s);
    if (part->quant->from_plane && per % per_row)
        return fail(w->error, MOE_ERR_FORMAT, name,
                    "expected segments of whole rows, %llu blocks of %s each, got %u blocks",
                    (unsigned long long)per_row, part->quant->name, s->segment_blocks);
    const uint64_t n = (n_blocks + per - 1) / per;
    if (s->first_segment != w->segment || n > f->header.n_segments - w->segment)
        return fail(w->error, MOE_ERR_FORMAT, name,
                    "expected %llu segments from %u on, got %u of %u",
                    (unsigned long long)n, w->segment, s->first_segment, f->header.n_segments);
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint32_t stored = moefile_segment_at(f, w->segment++);
        const uint64_t blocks = MOE_MIN(per, n_blocks - i * per);
        bytes += stored;
        if (stored > blocks * part->quant->block_bytes + MOEFILE_SEGMENT_EXTRA)
            return fail(w->error, MOE_ERR_FORMAT, name,
                        "expected at most %u bytes more in a segment than the %llu of its blocks, "
                        "got %u", MOEFILE_SEGMENT_EXTRA,
                        (unsigned long long)(blocks * part->quant->block_bytes), stored);
    }
    if (bytes != s->stored_bytes)
        return fail(w->error, MOE_ERR_FORMAT, name, "expected segments of %llu bytes, got %llu",
                    (unsigned long long)s->stored_bytes, (unsigned long long)bytes);
    return MOE_OK;
}

static moe_status moefile_take_slice(moefile_walk *w, const moefile_record *r)
{
    char name[128];
    const moefile *f = w->dir->moe;
    const moefile_slice s = moefile_slice_at(f, w->slice);
    moe_status status = moefile_take_part(w, &s, r->offset);
    if (status)
        return status;
    moefile_slice_name(w->dir, &s, name);
    if (s.offset != moefile_slice_start(w->at, s.encoding) || s.offset > r->stored_bytes ||
        s.stored_bytes > r->stored_bytes - s.offset)
        return fail(w->error, MOE_ERR_FORMAT, name,
                    "expected it behind the %llu bytes before it in a record of %llu, got %llu "
                    "bytes at %llu", (unsigned long long)w->at, (unsigned long long)r->stored_bytes,
                    (unsigned long long)s.stored_bytes, (unsigned long long)s.offset);
    w->at = s.offset + s.stored_bytes;
    if (s.encoding == MOEFILE_PLANES)
        status = moefile_take_segments(w, &s, name);
    else if (s.encoding != MOEFILE_RAW)
        status = fail(w->error, MOE_ERR_UNSUPPORTED, name, "expected encoding 0 or 1, got %u; a "
                      "newer version of this program may know it", s.encoding);
    else if (s.segment_blocks || s.first_segment != w->segment ||
             s.stored_bytes != moefile_part_of(f, &s)->bytes)
        status = fail(w->error, MOE_ERR_FORMAT, name,
                      "expected %llu bytes without segments, got %llu",
                      (unsigned long long)moefile_part_of(f, &s)->bytes,
                      (unsigned long long)s.stored_bytes);
    if (!status && r->kind == MOEFILE_EXPERT && s.part != r->expert)
        status = fail(w->error, MOE_ERR_FORMAT, name, "expected a part of expert %u, got another",
                      r->expert);
    w->slice++;
    return status;
}

static moe_status moefile_take_record(moefile_walk *w, uint32_t index)
{
    char name[32];
    const moefile *f = w->dir->moe;
    const moefile_record r = moefile_record_at(f, index);
    snprintf(name, sizeof name, "record %u", index);
    uint64_t end = 0;
    const bool in_place = index ? r.offset >= w->at && r.offset - w->at < MOEFILE_PAGE
                                : r.offset == w->at;
    if (!in_place || r.offset % MOEFILE_SLICE_ALIGN ||
        !checked_add(r.offset, r.stored_bytes, &end) || end > f->header.file_bytes)
        return fail(w->error, MOE_ERR_FORMAT, name,
                    "expected it less than a page behind %llu, at a multiple of %d, in a file of "
                    "%llu bytes, got %llu bytes at %llu", (unsigned long long)w->at,
                    MOEFILE_SLICE_ALIGN, (unsigned long long)f->header.file_bytes,
                    (unsigned long long)r.stored_bytes, (unsigned long long)r.offset);
    if (r.first_slice != w->slice || r.n_slices > f->header.n_slices - w->slice)
        return fail(w->error, MOE_ERR_FORMAT, name, "expected slices from %u on, got %u from %u",
                    w->slice, r.n_slices, r.first_slice);
    const bool known = r.kind == MOEFILE_DENSE || r.kind == MOEFILE_EXPERT;
    if (!known && (!(r.flags & MOEFILE_OPTIONAL) || r.n_slices))
        return fail(w->error, MOE_ERR_UNSUPPORTED, name, "expected kind 1 or 2, got %u; a newer "
                    "version of this program may know it", r.kind);
    w->at = w->decoded_bytes = 0;
    moe_status status = MOE_OK;
    for (uint32_t i = 0; i < r.n_slices && !status; i++)
        status = moefile_take_slice(w, &r);
    if (!status && known && (w->at != r.stored_bytes || w->decoded_bytes != r.decoded_bytes))
        status = fail(w->error, MOE_ERR_FORMAT, name,
                      "expected %llu bytes for %llu of weights, the sums of its slices, got %llu "
                      "for %llu", (unsigned long long)w->at, (unsigned long long)w->decoded_bytes,
                      (unsigned long long)r.stored_bytes, (unsigned long long)r.decoded_bytes);
    w->at = end;
    return status;
}

/* What the tensors are, now that their parts are known. One of several parts of one type that are
 * not needed apart becomes a plain stack. */
static void moefile_sum_parts(moe_directory *dir)
{
    const moefile *f = dir->moe;
    for (uint32_t i = 0; i < f->header.n_tensors; i++) {
        moe_tensor *t = (moe_tensor *)(void *)dir->tensor.items + i;
        const moe_part *parts = f->parts + f->first_part[i];
        const uint64_t n = moefile_n_parts(f, i);
        t->quant = parts[0].quant;
        t->offset = parts[0].offset;
        for (uint64_t k = 0; k < n; k++) // no overflow: raw ones lie in the file, and there are
            t->bytes += parts[k].bytes;  // less than 2^24 segments of at most 2^20 bytes
        t->parts = n > 1 ? parts : NULL;
    }
}

static moe_status moefile_parse(moe_directory *dir, const uint8_t *bytes, moe_error *error)
{
    moefile *f = dir->moe;
    const moefile_header *h = &f->header;
    gguf_reader reader = {.data = bytes, .file_bytes = sizeof *h, .dir = dir, .error = error};
    gguf_reader *r = &reader;
    moe_status status;
    if ((status = moefile_parse_keys(r, "keys", h->n_keys, h->keys_bytes)) ||
        (status = gguf_parse_alignment(r)) ||
        (status = moefile_parse_keys(r, "receipt", h->n_receipt, h->receipt_bytes)) ||
        (status = moefile_parse_tensors(r)))
        return status;
    f->records = bytes + align_up(r->at, MOEFILE_TABLE_ALIGN);
    f->slices = f->records + (size_t)h->n_records * sizeof(moefile_record);
    f->segments = f->slices + (size_t)h->n_slices * sizeof(moefile_slice);
    moefile_walk w = {.dir = dir, .error = error, .at = h->data_offset};
    for (uint32_t i = 0; i < h->n_records && !status; i++)
        status = moefile_take_record(&w, i);
    if (!status && (w.slice != h->n_slices || w.segment != h->n_segments || w.at != h->file_bytes))
        status = fail(error, MOE_ERR_FORMAT, "records",
                      "expected %u slices, %u segments and %llu bytes in all records, got %u, %u "
                      "and %llu", h->n_slices, h->n_segments, (unsigned long long)h->file_bytes,
                      w.slice, w.segment, (unsigned long long)w.at);
    if (!status)
        moefile_sum_parts(dir);
    return status;
}

/* ------------------------------------------------------------------------------- decoding -- */

/* One thread's buffers. */
typedef struct moefile_decoder {
    uint8_t *stored; // [MOEFILE_PIECE_BYTES]: a piece as it is in the file
    uint8_t *planes; // [MOEFILE_SEGMENT_BYTES]
    void *zstd;      // a ZSTD_DCtx in `memory`
    void *memory;
} moefile_decoder;

static void moefile_decoder_close(moe_mem *mem, moefile_decoder *d)
{
    mem_free(mem, d->stored);
    mem_free(mem, d->planes);
    mem_free(mem, d->memory);
    *d = (moefile_decoder){0};
}

static moe_status moefile_decoder_open(moe_mem *mem, moefile_decoder *d, moe_error *error)
{
    uint64_t bytes = 1;
#ifndef MOE_NO_ZSTD
    bytes = ZSTD_estimateDCtxSize();
#endif
    d->stored = mem_alloc_uncleared(mem, MOEFILE_PIECE_BYTES, 1);
    d->planes = mem_alloc_uncleared(mem, MOEFILE_SEGMENT_BYTES, 1);
    d->memory = mem_alloc_uncleared(mem, bytes, 1);
    if (!d->stored || !d->planes || !d->memory) {
        moefile_decoder_close(mem, d);
        return fail_memory(error, mem, "decoder",
                           MOEFILE_PIECE_BYTES + MOEFILE_SEGMENT_BYTES + bytes);
    }
#ifndef MOE_NO_ZSTD
    d->zstd = ZSTD_initStaticDCtx(d->memory, (size_t)bytes);
#endif
    return MOE_OK;
}

/* What a segment holds. */
typedef struct moefile_blocks {
    const moe_quant *quant;
    size_t n;       // blocks
    size_t per_row; // of a row; the segment is whole rows if the type's planes need it
} moefile_blocks;

#ifndef MOE_NO_ZSTD
/* Brings the plane of the last field, of that width, into the form that it has in blocks. */
static void moefile_from_plane(uint8_t *plane, size_t width, const moefile_blocks *blocks)
{
    const size_t row = blocks->per_row * width;
    for (size_t at = 0; blocks->quant->from_plane && at < blocks->n * width; at += row)
        blocks->quant->from_plane(plane + at, row);
}

/* One frame, of at most dst_bytes, at the front of src. Returns the bytes it took, 0 if it is not
 * right: *why says what. *got: the bytes in it. */
static size_t moefile_decode_frame(const moefile_decoder *d, const uint8_t *src, size_t src_bytes,
                                   uint8_t *dst, size_t dst_bytes, size_t *got, const char **why)
{
    static const uint8_t magic[4] = {0x28, 0xb5, 0x2f, 0xfd};
    *why = "a frame of zstd";
    if (src_bytes < sizeof magic || memcmp(src, magic, sizeof magic)) // not one that can be skipped
        return 0;
    const size_t bytes = ZSTD_findFrameCompressedSize(src, src_bytes);
    if (ZSTD_isError(bytes) || ZSTD_getDictID_fromFrame(src, src_bytes))
        return 0;
    *why = "a frame that tells its size, no more than what is missing";
    const unsigned long long n = ZSTD_getFrameContentSize(src, src_bytes);
    if (n == 0 || n > dst_bytes) // unknown is more than any
        return 0;
    *got = ZSTD_decompressDCtx(d->zstd, dst, dst_bytes, src, bytes);
    *why = ZSTD_isError(*got) ? ZSTD_getErrorName(*got) : "as many bytes as it tells";
    return *got == n ? bytes : 0;
}

/* All frames of a segment, to its planes one after another. */
static moe_status moefile_decode_frames(const moefile_decoder *d, const uint8_t *src,
                                        size_t src_bytes, size_t planes_bytes, const char *name,
                                        moe_error *error)
{
    size_t at = 0;
    for (size_t done = 0, got = 0; done < planes_bytes; done += got) {
        const char *why = NULL;
        const size_t bytes = moefile_decode_frame(d, src + at, src_bytes - at, d->planes + done,
                                                  planes_bytes - done, &got, &why);
        if (!bytes)
            return fail(error, MOE_ERR_FORMAT, name,
                        "expected frames of its planes, got a bad one behind %zu of %zu bytes "
                        "(%s): the file is damaged", done, planes_bytes, why);
        at += bytes;
    }
    if (at != src_bytes)
        return fail(error, MOE_ERR_FORMAT, name, "expected a segment of %zu bytes, got %zu", at,
                    src_bytes);
    return MOE_OK;
}
#endif

/* Decodes a segment to blocks at dst. */
static moe_status moefile_decode_segment(const moefile_decoder *d, const moefile_blocks *blocks,
                                         const uint8_t *src, size_t src_bytes, uint8_t *dst,
                                         const char *name, moe_error *error)
{
#ifdef MOE_NO_ZSTD
    (void)d, (void)blocks, (void)src, (void)src_bytes, (void)dst;
    return fail(error, MOE_ERR_UNSUPPORTED, name,
                "expected raw weights, got compressed ones, which this build leaves out "
                "(MOE_NO_ZSTD); convert the model with --store raw");
#else
    const moe_quant *quant = blocks->quant;
    const moe_status status = moefile_decode_frames(d, src, src_bytes,
                                                    blocks->n * quant->block_bytes, name, error);
    for (size_t i = 0, offset = 0; !status && offset < quant->block_bytes; i++) {
        const size_t width = quant->fields[i];
        uint8_t *plane = d->planes + offset * blocks->n;
        if (offset + width == quant->block_bytes)
            moefile_from_plane(plane, width, blocks);
        moefile_move_field(dst + offset, quant->block_bytes, plane, width, blocks->n, width);
        offset += width;
    }
    if (!status && quant->rotate)
        quant->rotate(dst, blocks->n, true);
    return status;
#endif
}

/* ------------------------------------------------------------------------------- threads -- */

/* Work that several threads share, each with buffers of its own. */
typedef struct moefile_team {
    const moe_directory *dir;
    void *self;
    bool (*run)(void *self, moefile_decoder *d, moe_error *error); // until it returns false
    moefile_decoder decoders[DIR_MAX_WORKERS];
} moefile_team;

static bool moefile_team_work(void *arg, uint32_t worker, moe_error *error)
{
    moefile_team *team = arg;
    return team->run(team->self, &team->decoders[worker], error);
}

/* Runs on up to n threads: as many as there are buffers for. The buffers are made here, since a
 * host's allocator is called by one thread at a time. */
static moe_status moefile_team_run(moefile_team *team, uint32_t n, moe_error *error)
{
    moe_mem *mem = team->dir->mem;
    moe_status status = MOE_OK;
    uint32_t ready = 0;
    n = MOE_MAX(MOE_MIN(n, (uint32_t)DIR_MAX_WORKERS), 1);
    while (ready < n && !(status = moefile_decoder_open(mem, &team->decoders[ready],
                                                        ready ? NULL : error)))
        ready++;
    if (ready)
        status = dir_team_run(mem, ready, moefile_team_work, team, error);
    for (uint32_t i = 0; i < ready; i++)
        moefile_decoder_close(mem, &team->decoders[i]);
    return status;
}

/* Reads a piece of the file: a pointer into memory that is there, or into `room`. Callbacks are
 * called by one thread at a time. */
static moe_status moefile_fetch(const moe_directory *dir, plat_mutex *lock, uint64_t offset,
                                uint64_t bytes, uint8_t *room, const uint8_t **data,
                                moe_error *error)
{
    const dir_file *file = dir->files;
    if (file->memory) {
        *data = file->memory + offset;
        return MOE_OK;
    }
    *data = room;
    if (file->read)
        plat_mutex_lock(lock);
    moe_status status = dir_file_read(dir, file, offset, room, bytes, error);
    if (file->read)
        plat_mutex_unlock(lock);
    return status;
}

/* ----------------------------------------------------------------------------- verifying -- */

/* Every byte behind the directory: records by their hashes, what is between them by being zero. */
typedef struct moefile_check {
    moe_directory *dir;
    bool *damaged;       // [n_records + 1]; the last: the padding in front of all records
    plat_mutex lock;
    /* Under the lock: */
    uint32_t next;
    uint64_t checked_bytes;
    bool stop;
} moefile_check;

static bool moefile_is_zero(const uint8_t *p, uint64_t n)
{
    uint8_t any = 0;
    for (uint64_t i = 0; i < n; i++)
        any |= p[i];
    return !any;
}

/* The bytes [offset, end) of the file: the first `hashed` are hashed, the rest must be 0. */
static moe_status moefile_check_range(moefile_check *c, const moefile_decoder *d, uint64_t offset,
                                      uint64_t hashed, uint64_t end, uint64_t hash, bool *good,
                                      moe_error *error)
{
    xxh64_state state;
    const uint64_t hashed_end = offset + hashed;
    xxh64_begin(&state);
    *good = true;
    for (uint64_t at = offset; at < end;) {
        const uint8_t *data = NULL;
        const uint64_t stop = at < hashed_end ? hashed_end : end;
        const uint64_t n = MOE_MIN(stop - at, MOEFILE_PIECE_BYTES);
        if (cancelled(c->dir->cancel))
            return fail(error, MOE_ERR_CANCELLED, NULL, "cancelled while the file was verified");
        moe_status status = moefile_fetch(c->dir, &c->lock, at, n, d->stored, &data, error);
        if (status)
            return status;
        if (at < hashed_end)
            xxh64_add(&state, data, n);
        else
            *good &= moefile_is_zero(data, n);
        at += n;
    }
    *good &= xxh64_end(&state) == hash || !hashed;
    return MOE_OK;
}

static bool moefile_check_run(void *self, moefile_decoder *d, moe_error *error)
{
    moefile_check *c = self;
    const moefile_header *h = &c->dir->moe->header;
    plat_mutex_lock(&c->lock);
    const uint32_t i = c->stop || c->next > h->n_records ? UINT32_MAX : c->next++;
    plat_mutex_unlock(&c->lock);
    if (i == UINT32_MAX)
        return false;
    moefile_record r = {.offset = sizeof *h + h->directory_bytes};
    uint64_t end = h->data_offset;
    if (i < h->n_records) {
        r = moefile_record_at(c->dir->moe, i);
        end = i + 1 < h->n_records ? moefile_record_at(c->dir->moe, i + 1).offset : h->file_bytes;
    }
    bool good = false;
    moe_status status = moefile_check_range(c, d, r.offset, r.stored_bytes, end, r.hash, &good,
                                            error);
    plat_mutex_lock(&c->lock);
    c->damaged[i] = !good;
    c->stop |= status != MOE_OK;
    c->checked_bytes += end - r.offset;
    mem_progress(c->dir->mem, "verify", c->checked_bytes, h->file_bytes);
    plat_mutex_unlock(&c->lock);
    return !status;
}

/* Fills damaged [n_records + 1]. */
static moe_status moefile_check_all(moe_directory *dir, bool *damaged, moe_error *error)
{
    moefile_check c = {.dir = dir, .damaged = damaged};
    moefile_team team = {.dir = dir, .self = &c, .run = moefile_check_run};
    if (!plat_mutex_init(&c.lock))
        return fail(error, MOE_ERR_THREAD, NULL, "cannot make a lock");
    moe_status status = moefile_team_run(&team, plat_n_cores(), error);
    plat_mutex_destroy(&c.lock);
    return status;
}

static moe_status moefile_fail_damaged(const moe_directory *dir, uint32_t index, moe_error *error)
{
    char name[160] = "padding";
    if (index < dir->moe->header.n_records)
        moefile_record_name(dir, index, name);
    return fail(error, MOE_ERR_FORMAT, name,
                "expected the bytes that the checksum was made of, got others: the file is "
                "damaged; get it again");
}

/* Before anything is used: all records are as they were written. */
static moe_status moefile_check_first(moe_directory *dir, moe_error *error)
{
    const uint32_t n = dir->moe->header.n_records;
    bool *damaged = mem_alloc(dir->mem, (uint64_t)n + 1, sizeof *damaged);
    if (!damaged)
        return fail_memory(error, dir->mem, "records", n);
    moe_status status = moefile_check_all(dir, damaged, error);
    for (uint32_t i = 0; i <= n && !status; i++)
        if (damaged[i])
            status = moefile_fail_damaged(dir, i, error);
    mem_free(dir->mem, damaged);
    return status;
}

/* ------------------------------------------------------------------------------- loading -- */

/* What is loaded into memory, in pieces. A piece is a segment, or about as much of raw rows. */
typedef struct moefile_load_state {
    moe_directory *dir;
    const dir_file *file;
    uint8_t **places;     // [n_slices]: where a slice goes; NULL: it is used where it is
    plat_mutex lock;
    /* Under the lock: */
    uint32_t slice;       // the cursor
    uint64_t done_bytes;  // of the slice, as stored
    uint64_t done_blocks;
    uint32_t segment;
    uint64_t loaded_bytes, total_bytes;
    bool stop;
} moefile_load_state;

typedef struct moefile_piece {
    moefile_slice slice;
    const moe_quant *quant;
    uint64_t offset;      // in the file
    uint64_t bytes;
    uint64_t n_blocks;    // 0: raw
    uint8_t *dst;
} moefile_piece;

/* The next piece of the slice at the cursor; the cursor moves on. */
static void moefile_cut_piece(moefile_load_state *st, moefile_piece *p)
{
    const moefile *f = st->dir->moe;
    const moefile_slice *s = &p->slice;
    const moe_part *part = moefile_part_of(f, s);
    p->quant = part->quant;
    p->offset = part->offset + st->done_bytes;
    if (s->encoding == MOEFILE_PLANES) {
        p->bytes = moefile_segment_at(f, s->first_segment + st->segment++);
        p->n_blocks = MOE_MIN(s->segment_blocks, moefile_n_blocks(part) - st->done_blocks);
        p->dst = st->places[st->slice] + st->done_blocks * part->quant->block_bytes;
        st->done_blocks += p->n_blocks;
    } else {
        p->bytes = MOE_MIN(s->stored_bytes - st->done_bytes, MOEFILE_SEGMENT_BYTES);
        p->n_blocks = 0;
        p->dst = st->places[st->slice] + st->done_bytes;
    }
    st->done_bytes += p->bytes;
}

/* Takes the next piece; false if there is none or the work is over. */
static bool moefile_next_piece(moefile_load_state *st, moefile_piece *p)
{
    const moefile *f = st->dir->moe;
    plat_mutex_lock(&st->lock);
    bool more = false;
    while (!st->stop && !more && st->slice < f->header.n_slices) {
        p->slice = moefile_slice_at(f, st->slice);
        const moe_part *part = moefile_part_of(f, &p->slice);
        more = st->places[st->slice] && (p->slice.encoding == MOEFILE_PLANES
                                             ? st->done_blocks < moefile_n_blocks(part)
                                             : st->done_bytes < part->bytes);
        if (!more) {
            st->slice++;
            st->done_bytes = st->done_blocks = st->segment = 0;
        }
    }
    if (more)
        moefile_cut_piece(st, p);
    plat_mutex_unlock(&st->lock);
    return more;
}

static moe_status moefile_load_piece(moefile_load_state *st, const moefile_decoder *d,
                                     const moefile_piece *p, moe_error *error)
{
    char name[128];
    const uint8_t *data = NULL;
    const bool raw = p->n_blocks == 0;
    if (cancelled(st->dir->cancel))
        return fail(error, MOE_ERR_CANCELLED, st->file->path, "cancelled while it was being read");
    moe_status status = moefile_fetch(st->dir, &st->lock, p->offset, p->bytes,
                                      raw ? p->dst : d->stored, &data, error);
    if (status)
        return status;
    if (!raw) {
        const moefile_blocks blocks = {p->quant, (size_t)p->n_blocks,
                                       (size_t)moefile_row_blocks(st->dir, &p->slice)};
        return moefile_decode_segment(d, &blocks, data, (size_t)p->bytes, p->dst,
                                      moefile_slice_name(st->dir, &p->slice, name), error);
    }
    if (data != p->dst)
        memcpy(p->dst, data, (size_t)p->bytes);
    return MOE_OK;
}

static bool moefile_load_run(void *self, moefile_decoder *d, moe_error *error)
{
    moefile_load_state *st = self;
    moefile_piece p;
    if (!moefile_next_piece(st, &p))
        return false;
    const moe_status status = moefile_load_piece(st, d, &p, error);
    plat_mutex_lock(&st->lock);
    st->stop |= status != MOE_OK;
    st->loaded_bytes += p.bytes;
    mem_progress(st->dir->mem, "load", st->loaded_bytes, st->total_bytes);
    plat_mutex_unlock(&st->lock);
    return !status;
}

/* Which tensors have a slice that cannot be used where it is. */
static void moefile_find_loaded(const moe_directory *dir, bool in_place, bool *load)
{
    const moefile *f = dir->moe;
    for (uint32_t i = 0; i < f->header.n_slices; i++) {
        const moefile_slice s = moefile_slice_at(f, i);
        load[s.tensor] |= !in_place || s.encoding != MOEFILE_RAW;
    }
}

/* Gives each tensor that is loaded a place in memory, its parts one after another; `memory` NULL:
 * only counts. A tensor whose parts are of one type is a plain stack then. */
static uint64_t moefile_place_tensors(moe_directory *dir, const bool *load, uint8_t *memory)
{
    const moefile *f = dir->moe;
    uint64_t at = 0;
    for (uint32_t i = 0; i < f->header.n_tensors; i++) {
        moe_tensor *t = (moe_tensor *)(void *)dir->tensor.items + i;
        if (!load[i])
            continue;
        moe_part *parts = f->parts + f->first_part[i];
        bool stack = true;
        uint64_t in_tensor = 0;
        const uint64_t n = tensor_n_parts(t);
        for (uint64_t k = 0; k < n; k++) {
            parts[k].data = memory ? memory + at + in_tensor : NULL;
            in_tensor += parts[k].bytes;
            stack &= parts[k].quant == parts[0].quant;
        }
        if (memory && stack) {
            t->data = memory + at;
            t->parts = NULL;
        }
        at += align_up(t->bytes, MEM_ALIGN);
    }
    return at;
}

/* Points the other tensors into the map or the caller's memory. */
static void moefile_point_tensors(moe_directory *dir, const bool *load)
{
    const moefile *f = dir->moe;
    const uint8_t *base = dir->files->map ? dir->files->map : dir->files->memory;
    for (uint32_t i = 0; i < f->header.n_tensors; i++) {
        moe_tensor *t = (moe_tensor *)(void *)dir->tensor.items + i;
        if (load[i])
            continue;
        moe_part *parts = f->parts + f->first_part[i];
        for (uint64_t k = 0; k < tensor_n_parts(t); k++)
            parts[k].data = base + parts[k].offset;
        t->data = t->parts ? NULL : parts->data;
    }
}

/* Reads and decodes what has a place. */
static moe_status moefile_load_pieces(moe_directory *dir, const bool *load, moe_error *error)
{
    const moefile *f = dir->moe;
    moefile_load_state st = {.dir = dir, .file = dir->files};
    moefile_team team = {.dir = dir, .self = &st, .run = moefile_load_run};
    st.places = mem_alloc(dir->mem, f->header.n_slices, sizeof *st.places);
    if (!st.places)
        return fail_memory(error, dir->mem, "slices", f->header.n_slices * sizeof *st.places);
    for (uint32_t i = 0; i < f->header.n_slices; i++) {
        const moefile_slice s = moefile_slice_at(f, i);
        if (!load[s.tensor])
            continue;
        st.places[i] = (uint8_t *)(uintptr_t)moefile_part_of(f, &s)->data;
        st.total_bytes += s.stored_bytes;
    }
    moe_status status = plat_mutex_init(&st.lock) ? MOE_OK
                        : fail(error, MOE_ERR_THREAD, NULL, "cannot make a lock");
    if (!status) {
        status = moefile_team_run(&team, (uint32_t)MOE_MIN(plat_n_cores(), st.total_bytes /
                                                           MOEFILE_SEGMENT_BYTES + 1), error);
        plat_mutex_destroy(&st.lock);
    }
    mem_free(dir->mem, st.places);
    return status;
}

/* Makes the data of all tensors readable. */
static moe_status moefile_load_data(moe_directory *dir, bool copy, moe_error *error)
{
    const moefile *f = dir->moe;
    dir_file *file = dir->files;
    const bool in_place = !copy && !file->read;
    bool *load = mem_alloc(dir->mem, f->header.n_tensors, sizeof *load);
    if (!load)
        return fail_memory(error, dir->mem, "tensors", f->header.n_tensors);
    moefile_find_loaded(dir, in_place, load);
    uint64_t n_place = 0;
    for (uint32_t i = 0; i < f->header.n_tensors; i++)
        n_place += !load[i];
    const uint64_t bytes = moefile_place_tensors(dir, load, NULL);
    moe_status status = MOE_OK;
    if (bytes / MOEFILE_MAX_EXPANSION > file->bytes + DIR_READ_STEP_BYTES)
        status = fail(error, MOE_ERR_LIMIT, "weights",
                      "expected at most %d times the size of the file, got %llu bytes",
                      MOEFILE_MAX_EXPANSION, (unsigned long long)bytes);
    if (!status && n_place && file->path) {
        status = plat_map(&file->os, &file->map, file->path, error);
        if (!status)
            status = dir_file_check(file, error);
    }
    if (!status && bytes) {
        file->copy = mem_alloc_uncleared(dir->mem, bytes, 1);
        if (!file->copy)
            status = fail_memory(error, dir->mem, "weights", bytes);
        else
            plat_large_pages(file->copy, bytes);
    }
    if (!status) {
        moefile_point_tensors(dir, load);
        moefile_place_tensors(dir, load, file->copy);
        if (bytes)
            status = moefile_load_pieces(dir, load, error);
    }
    if (!file->map)
        dir_file_release(file);
    dir_large_pages(dir);
    mem_free(dir->mem, load);
    return status;
}

/* ------------------------------------------------------------------------------- receipt -- */

/* What the tables say of a tensor: bytes in the file, and the error of making it. The experts of a
 * stack count alike. */
static void moefile_describe(const moe_directory *dir, uint32_t tensor, moe_tensor_info *info)
{
    const moefile *f = dir->moe;
    double sum = 0;
    info->stored_bytes = 0;
    info->error_worst = 0;
    for (uint32_t i = 0; i < f->header.n_slices; i++) {
        const moefile_slice s = moefile_slice_at(f, i);
        if (s.tensor != tensor)
            continue;
        info->stored_bytes += s.stored_bytes;
        sum = s.error >= 0 ? sum + (double)s.error : -INFINITY;
        info->error_worst = MOE_MAX(info->error_worst, s.error);
    }
    const bool known = sum >= 0;
    info->error = known ? (float)(sum / (double)moefile_n_parts(f, tensor)) : -1;
    info->error_worst = known ? info->error_worst : -1;
}

/* --------------------------------------------------------------------------- entry points -- */

/* Fills an empty directory, whose file is open, from it. */
static moe_status moefile_load(moe_directory *dir, const moe_model_options *options,
                               moe_error *error)
{
    const uint8_t *bytes = NULL;
    dir->moe = dir_alloc(dir, 1, sizeof *dir->moe);
    if (!dir->moe)
        return dir_fail_memory(dir, "directory", 1, sizeof *dir->moe, error);
    moe_status status = moefile_read_directory(dir, dir->files, &dir->moe->header, &bytes, error);
    if (!status)
        status = moefile_parse(dir, bytes, error);
    if (!status && options->verify)
        status = moefile_check_first(dir, error);
    if (status)
        return status;
    if (options->vocab_only) {
        dir_file_release(dir->files);
        return MOE_OK;
    }
    return moefile_load_data(dir, options->copy, error);
}

/* Fills an empty directory, whose file is open, by the file's first bytes. */
static moe_status container_load(moe_directory *dir, const moe_model_options *options,
                                 moe_error *error)
{
    uint8_t magic[8] = {0};
    const dir_file *file = dir->files;
    moe_status status = MOE_OK;
    if (file->bytes >= sizeof magic)
        status = dir_file_read(dir, file, 0, magic, sizeof magic, error);
    if (status)
        return status;
    return memcmp(magic, MOEFILE_MAGIC, sizeof magic) ? gguf_load(dir, options, error)
                                                      : moefile_load(dir, options, error);
}

/* Says which file is wrong, where that is not said: a program may have opened several. */
static void dir_name_file(const char *path, moe_error *error)
{
    if (!path || !error || strstr(error->message, path) || error->status < MOE_ERR_FORMAT ||
        error->status > MOE_ERR_UNSUPPORTED)
        return;
    char message[sizeof error->message];
    memcpy(message, error->message, sizeof message);
    const int used = snprintf(error->message, sizeof message, "%.*s: ", 255, path);
    snprintf(error->message + used, sizeof message - (size_t)used, "%.*s",
             (int)(sizeof message - (size_t)used - 1), message);
}

MOE_UNUSED static moe_status directory_open(moe_directory **out, const moe_model_options *options,
                                            moe_mem *mem, moe_error *error)
{
    moe_model_options known; // an older caller's struct is shorter
    moe_model_options_init(&known);
    memcpy(&known, options, MOE_MIN(options->size, sizeof known));
    *out = NULL;
    moe_directory *dir = mem_alloc(mem, 1, sizeof *dir);
    if (!dir)
        return fail_memory(error, mem, "directory", sizeof *dir);
    dir_init(dir, mem);
    dir->cancel = known.cancel;
    dir->files = mem_alloc(mem, 1, sizeof *dir->files);
    moe_status status = MOE_OK;
    if (!dir->files) {
        status = fail_memory(error, mem, "files", sizeof *dir->files);
    } else {
        dir->n_files = 1;
        status = dir_file_open(mem, dir->files, &known, error);
    }
    if (!status)
        status = container_load(dir, &known, error);
    dir->cancel = NULL;
    if (status) {
        directory_close(dir);
        dir_name_file(known.path, error);
        return status;
    }
    *out = dir;
    return MOE_OK;
}

MOE_UNUSED static moe_status directory_open_file(moe_directory **out, const char *path,
                                                 moe_mem *mem, moe_error *error)
{
    moe_model_options options;
    moe_model_options_init(&options);
    options.path = path;
    return directory_open(out, &options, mem, error);
}

/* Tells `damage` of each record that is damaged, and of the padding, which comes last; the first of
 * them, or UINT32_MAX. */
static uint32_t moefile_report_damage(moe_directory *dir, const bool *damaged,
                                      moe_damage_fn *damage, void *user,
                                      moe_verify_report *report)
{
    const moefile_header *h = &dir->moe->header;
    char name[160];
    uint32_t first = UINT32_MAX;
    for (uint32_t i = 0; i <= h->n_records; i++) {
        if (!damaged[i])
            continue;
        const bool record = i < h->n_records;
        const moefile_record r =
            record ? moefile_record_at(dir->moe, i)
                   : (moefile_record){.offset = sizeof *h + h->directory_bytes};
        first = MOE_MIN(first, i);
        report->n_damaged++;
        if (damage)
            damage(user, record ? moefile_record_name(dir, i, name) : "padding", r.offset,
                   record ? r.stored_bytes : h->data_offset - r.offset);
    }
    return first;
}

/* Opens a .moe file as far as its directory, and checks the rest. */
static moe_status moefile_verify(moe_directory *dir, const moe_model_options *options,
                                 moe_damage_fn *damage, void *user, moe_verify_report *report,
                                 moe_error *error)
{
    uint8_t magic[8] = {0};
    dir_file *file = dir->files;
    const uint8_t *bytes = NULL;
    moe_status status = dir_file_open(dir->mem, file, options, error);
    if (!status && file->bytes >= sizeof magic)
        status = dir_file_read(dir, file, 0, magic, sizeof magic, error);
    if (!status && memcmp(magic, MOEFILE_MAGIC, sizeof magic))
        status = fail(error, MOE_ERR_UNSUPPORTED, file->path,
                      "expected a .moe file, got one of another kind, which has no checksums");
    if (!status && !(dir->moe = dir_alloc(dir, 1, sizeof *dir->moe)))
        status = dir_fail_memory(dir, "directory", 1, sizeof *dir->moe, error);
    if (!status)
        status = moefile_read_directory(dir, file, &dir->moe->header, &bytes, error);
    if (!status)
        status = moefile_parse(dir, bytes, error);
    if (status)
        return status;
    const moefile_header *h = &dir->moe->header;
    bool *damaged = mem_alloc(dir->mem, (uint64_t)h->n_records + 1, sizeof *damaged);
    if (!damaged)
        return fail_memory(error, dir->mem, "records", h->n_records);
    status = moefile_check_all(dir, damaged, error);
    *report = (moe_verify_report){.size = sizeof *report, .n_records = h->n_records,
                                  .file_bytes = h->file_bytes, .root = h->root};
    const uint32_t first =
        status ? UINT32_MAX : moefile_report_damage(dir, damaged, damage, user, report);
    mem_free(dir->mem, damaged);
    return first == UINT32_MAX ? status : moefile_fail_damaged(dir, first, error);
}

moe_status moe_file_verify(const moe_model_options *options, moe_damage_fn *damage, void *user,
                           moe_verify_report *report, moe_error *error)
{
    moe_model_options known;
    moe_verify_report full = {.size = sizeof full};
    if (!options || !options->size || (report && !report->size))
        return fail(error, MOE_ERR_ARGUMENT, "options",
                    "expected options filled by moe_model_options_init, and the size of the "
                    "report");
    moe_model_options_init(&known);
    memcpy(&known, options, MOE_MIN(options->size, sizeof known));
    moe_mem mem;
    mem_init(&mem, known.host, known.memory_limit_bytes);
    moe_directory *dir = mem_alloc(&mem, 1, sizeof *dir);
    if (!dir)
        return fail_memory(error, &mem, "directory", sizeof *dir);
    dir_init(dir, &mem);
    dir->cancel = known.cancel;
    dir->files = mem_alloc(&mem, 1, sizeof *dir->files);
    dir->n_files = dir->files != NULL;
    moe_status status = dir->files ? moefile_verify(dir, &known, damage, user, &full, error)
                                   : fail_memory(error, &mem, "files", sizeof *dir->files);
    directory_close(dir);
    if (report) {
        const size_t size = MOE_MIN(report->size, sizeof full);
        memcpy(report, &full, size);
        report->size = size;
    }
    return status;
}

#endif
