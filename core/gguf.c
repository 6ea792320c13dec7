/* core/gguf.c - the GGUF container, versions 2 and 3 -> moe_directory.
 *
 *     "GGUF"  u32 version  u64 n_tensors  u64 n_kv
 *     n_kv times       string key, u32 type, value
 *     n_tensors times  string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset
 *     padding to general.alignment (32 if there is no such key): the data's start
 *     data of the tensors, at data start + offset
 *
 * A string is u64 length and bytes; an array is u32 item type, u64 count and the items. All numbers
 * are little-endian, at any address.
 *
 * Owns nothing: everything goes into the directory. In: bytes that nobody has checked. Out: a
 * directory in which everything is. What is accepted and refused is written in docs/gguf.md.
 *
 * The header is read into memory through a window that grows until the header fits; each attempt
 * parses from the start, so the parser needs no state that survives one. Tensors are mapped or read
 * only after the whole header was found good.
 * Must never: use a number from the file before it was compared with what is there; allocate more
 * than the bytes of the file can account for. */
#ifndef MOE_CORE_GGUF_C
#define MOE_CORE_GGUF_C

#include "directory.c"

/* What is read of a file at first. Tests set it so low that each header needs several attempts. */
#ifndef MOE_GGUF_WINDOW_BYTES
#define MOE_GGUF_WINDOW_BYTES (1 << 20)
#endif

enum {
    GGUF_MAX_HEADER_BYTES = 64 << 20, // the largest in use have some 20 MiB
    GGUF_WINDOW_BYTES = MOE_GGUF_WINDOW_BYTES,
    GGUF_MAX_KEY_BYTES = 65535,       // by the specification
    GGUF_MAX_NAME_BYTES = 63,         // so that a C string of 64 holds it
    GGUF_MIN_META_BYTES = 8 + 1 + 4 + 1,
    GGUF_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8,
    GGUF_MIN_ALIGNMENT = 8,
    GGUF_MAX_ALIGNMENT = 1 << 20,
    GGUF_MAX_PARTS = 1000 // of a split file: each is kept open
};

typedef struct gguf_reader {
    const uint8_t *data;  // [avail]: the start of the file
    uint64_t avail;
    uint64_t file_bytes;
    uint64_t at;          // what was read so far
    uint64_t need;        // not 0: reading failed only because avail is less than this
    bool metadata_only;   // the tensors' data need not be there, nor of a known type
    uint64_t alignment, data_start;
    moe_directory *dir;
    moe_error *error;
} gguf_reader;

/* ------------------------------------------------------------------------------- reading -- */

/* The next `bytes` bytes. `subject` is what they belong to. */
static moe_status gguf_take(gguf_reader *r, uint64_t bytes, const char *subject, const uint8_t **p)
{
    uint64_t end = UINT64_MAX;
    if (bytes > r->file_bytes - r->at)
        return fail(r->error, MOE_ERR_FORMAT, subject,
                    "expected %llu bytes at offset %llu, got %llu up to the end of the file: it is "
                    "cut off or damaged",
                    (unsigned long long)bytes, (unsigned long long)r->at,
                    (unsigned long long)(r->file_bytes - r->at));
    if (!checked_add(r->at, bytes, &end) || end > GGUF_MAX_HEADER_BYTES)
        return fail(r->error, MOE_ERR_LIMIT, subject,
                    "expected at most %u bytes of metadata, got %llu or more",
                    (unsigned)GGUF_MAX_HEADER_BYTES, (unsigned long long)end);
    if (end > r->avail) {
        r->need = end;
        return MOE_ERR_FORMAT;
    }
    *p = r->data + r->at;
    r->at = end;
    return MOE_OK;
}

static moe_status gguf_u32(gguf_reader *r, const char *subject, uint32_t *value)
{
    const uint8_t *p = NULL;
    moe_status status = gguf_take(r, sizeof *value, subject, &p);
    if (!status)
        memcpy(value, p, sizeof *value);
    return status;
}

static moe_status gguf_u64(gguf_reader *r, const char *subject, uint64_t *value)
{
    const uint8_t *p = NULL;
    moe_status status = gguf_take(r, sizeof *value, subject, &p);
    if (!status)
        memcpy(value, p, sizeof *value);
    return status;
}

static moe_status gguf_string(gguf_reader *r, const char *subject, moe_str *s)
{
    const uint8_t *p = NULL;
    moe_status status = gguf_u64(r, subject, &s->bytes);
    if (!status)
        status = gguf_take(r, s->bytes, subject, &p);
    s->data = (const char *)p;
    return status;
}

/* The name of a key or a tensor: not empty, not too long, text without control characters.
 * `what` is such as "key 7", for errors. */
static moe_status gguf_name(gguf_reader *r, const char *what, uint64_t max_bytes, moe_str *name)
{
    uint64_t at = r->at;
    moe_status status = gguf_u64(r, what, &name->bytes);
    if (status)
        return status;
    if (name->bytes == 0 || name->bytes > max_bytes)
        return fail(r->error, MOE_ERR_FORMAT, what,
                    "expected a name of 1 to %llu bytes at offset %llu, got %llu",
                    (unsigned long long)max_bytes, (unsigned long long)at,
                    (unsigned long long)name->bytes);
    const uint8_t *p = NULL;
    status = gguf_take(r, name->bytes, what, &p);
    if (status)
        return status;
    name->data = (const char *)p;
    for (uint64_t i = 0, n; i < name->bytes; i += n) {
        n = utf8_sequence(name->data + i, (size_t)(name->bytes - i));
        if (n == 0 || p[i] < 0x20 || p[i] == 0x7f)
            return fail(r->error, MOE_ERR_FORMAT, what,
                        "expected a name in UTF-8 without control characters, got byte 0x%02x in "
                        "\"%.*s\"",
                        p[i], (int)MOE_MIN(i, 100), name->data);
    }
    return MOE_OK;
}

/* -------------------------------------------------------------------------------- header -- */

static moe_status gguf_fail_magic(gguf_reader *r, const uint8_t magic[4])
{
    static const char old[][5] = {"lmgg", "fmgg", "tjgg", "algg", "GGML", "GGJT"};
    for (size_t i = 0; i < MOE_COUNT(old); i++)
        if (memcmp(magic, old[i], 4) == 0)
            return fail(r->error, MOE_ERR_UNSUPPORTED, "magic",
                        "expected a GGUF file, got one of its predecessors of before 2023-08; get "
                        "the model as GGUF");
    return fail(r->error, MOE_ERR_FORMAT, "magic",
                "expected a .moe file or a GGUF file, which starts with \"GGUF\", got the bytes "
                "%02x %02x %02x %02x",
                magic[0], magic[1], magic[2], magic[3]);
}

static moe_status gguf_check_version(gguf_reader *r, uint32_t version)
{
    if (version == 2 || version == 3)
        return MOE_OK;
    if (version == 1)
        return fail(r->error, MOE_ERR_UNSUPPORTED, "version",
                    "expected GGUF version 2 or 3, got 1, which was in use for a few days of 2023; "
                    "get a current file of this model or convert it again");
    if (version && (version & 0xffff) == 0)
        return fail(r->error, MOE_ERR_UNSUPPORTED, "version",
                    "expected GGUF version 2 or 3, got 0x%08x: a big-endian file; convert it to "
                    "little-endian",
                    version);
    return fail(r->error, version ? MOE_ERR_UNSUPPORTED : MOE_ERR_FORMAT, "version",
                "expected GGUF version 2 or 3, got %u%s", version,
                version ? "; a newer version of this program may read it" : "");
}

/* Magic, version, and counts that the bytes which are left can hold. */
static moe_status gguf_parse_head(gguf_reader *r, uint64_t *n_tensors, uint64_t *n_meta)
{
    const uint8_t *magic = NULL;
    uint32_t version = 0;
    moe_status status = gguf_take(r, 4, "magic", &magic);
    if (status)
        return status;
    if (memcmp(magic, "GGUF", 4) != 0)
        return gguf_fail_magic(r, magic);
    if ((status = gguf_u32(r, "version", &version)) ||
        (status = gguf_check_version(r, version)) ||
        (status = gguf_u64(r, "tensor_count", n_tensors)) ||
        (status = gguf_u64(r, "metadata_kv_count", n_meta)))
        return status;
    uint64_t left = r->file_bytes - r->at;
    if (*n_meta > left / GGUF_MIN_META_BYTES)
        return fail(r->error, MOE_ERR_FORMAT, "metadata_kv_count",
                    "expected at most %llu keys in the %llu bytes of the file, got %llu",
                    (unsigned long long)(left / GGUF_MIN_META_BYTES),
                    (unsigned long long)r->file_bytes, (unsigned long long)*n_meta);
    left -= *n_meta * GGUF_MIN_META_BYTES;
    if (*n_tensors > left / GGUF_MIN_TENSOR_BYTES)
        return fail(r->error, MOE_ERR_FORMAT, "tensor_count",
                    "expected at most %llu tensors in the %llu bytes of the file, got %llu",
                    (unsigned long long)(left / GGUF_MIN_TENSOR_BYTES),
                    (unsigned long long)r->file_bytes, (unsigned long long)*n_tensors);
    if ((status = dir_table_reserve(r->dir, &r->dir->meta, *n_meta, "metadata_kv_count",
                                    r->error)))
        return status;
    return dir_table_reserve(r->dir, &r->dir->tensor, *n_tensors, "tensor_count", r->error);
}

/* ------------------------------------------------------------------------------ metadata -- */

static moe_status gguf_parse_bools(gguf_reader *r, const moe_meta *meta)
{
    for (uint64_t i = 0; i < meta->data_bytes; i++)
        if (meta->data[i] > 1)
            return fail(r->error, MOE_ERR_FORMAT, meta->key, "expected a bool of 0 or 1, got %u",
                        meta->data[i]);
    return MOE_OK;
}

/* n strings, one after another. */
static moe_status gguf_parse_strings(gguf_reader *r, moe_meta *meta)
{
    uint64_t start = r->at, least;
    if (!checked_mul(meta->n, 8, &least) || least > r->file_bytes - start)
        return fail(r->error, MOE_ERR_FORMAT, meta->key,
                    "expected at most %llu strings up to the end of the file, got %llu",
                    (unsigned long long)((r->file_bytes - start) / 8),
                    (unsigned long long)meta->n);
    moe_str *strings = dir_alloc(r->dir, meta->n, sizeof *strings);
    if (!strings)
        return dir_fail_memory(r->dir, meta->key, meta->n, sizeof *strings, r->error);
    meta->strings = strings;
    for (uint64_t i = 0; i < meta->n; i++) {
        moe_status status = gguf_string(r, meta->key, &strings[i]);
        if (status)
            return status;
        if (i % 4096 == 0 && cancelled(r->dir->cancel))
            return fail(r->error, MOE_ERR_CANCELLED, meta->key, "cancelled during open");
    }
    meta->data = r->data + start;
    meta->data_bytes = r->at - start;
    return MOE_OK;
}

static moe_status gguf_parse_array_head(gguf_reader *r, moe_meta *meta)
{
    uint32_t item = 0;
    moe_status status;
    if ((status = gguf_u32(r, meta->key, &item)) || (status = gguf_u64(r, meta->key, &meta->n)))
        return status;
    if (item >= META_N_TYPES)
        return fail(r->error, MOE_ERR_FORMAT, meta->key,
                    "expected an array of a type from 0 to %d, got type %u", META_N_TYPES - 1,
                    item);
    if (item == META_ARRAY)
        return fail(r->error, MOE_ERR_UNSUPPORTED, meta->key,
                    "expected an array of numbers or strings, got an array of arrays");
    meta->item = (moe_meta_type)item;
    return MOE_OK;
}

static moe_status gguf_parse_value(gguf_reader *r, moe_meta *meta)
{
    moe_status status;
    meta->n = 1;
    if (meta->type == META_ARRAY && (status = gguf_parse_array_head(r, meta)))
        return status;
    moe_meta_type type = meta->type == META_ARRAY ? meta->item : meta->type;
    if (type == META_STRING) {
        if ((status = gguf_parse_strings(r, meta)))
            return status;
        if (meta->type == META_STRING) {
            meta->data = (const uint8_t *)meta->strings->data;
            meta->data_bytes = meta->strings->bytes;
        }
        return MOE_OK;
    }
    if (!checked_mul(meta->n, meta_types[type].bytes, &meta->data_bytes))
        return fail(r->error, MOE_ERR_FORMAT, meta->key,
                    "expected an array that fits into the file, got %llu items of %u bytes",
                    (unsigned long long)meta->n, (unsigned)meta_types[type].bytes);
    if ((status = gguf_take(r, meta->data_bytes, meta->key, &meta->data)))
        return status;
    return type == META_BOOL ? gguf_parse_bools(r, meta) : MOE_OK;
}

static moe_status gguf_parse_meta(gguf_reader *r, uint64_t index)
{
    char what[32];
    moe_str key = {0};
    void *item = NULL;
    uint32_t type = 0;
    moe_status status;
    snprintf(what, sizeof what, "key %llu", (unsigned long long)index);
    if ((status = gguf_name(r, what, GGUF_MAX_KEY_BYTES, &key)) ||
        (status = dir_table_add(r->dir, &r->dir->meta, key, &item, r->error)))
        return status;
    moe_meta *meta = item;
    if ((status = gguf_u32(r, meta->key, &type)))
        return status;
    if (type >= META_N_TYPES)
        return fail(r->error, MOE_ERR_FORMAT, meta->key,
                    "expected a value type from 0 to %d, got %u", META_N_TYPES - 1, type);
    meta->type = (moe_meta_type)type;
    return gguf_parse_value(r, meta);
}

static moe_status gguf_parse_alignment(gguf_reader *r)
{
    const moe_meta *meta = directory_meta(r->dir, "general.alignment");
    char got[128];
    r->alignment = 32;
    if (!meta)
        return MOE_OK;
    int64_t x = meta->type == META_U32 ? meta_item_i64(meta, 0) : 0;
    if (x < GGUF_MIN_ALIGNMENT || x > GGUF_MAX_ALIGNMENT || (x & (x - 1)))
        return fail(r->error, MOE_ERR_FORMAT, meta->key,
                    "expected a u32 that is a power of two from %d to %d, got %s",
                    GGUF_MIN_ALIGNMENT, GGUF_MAX_ALIGNMENT, meta_describe(meta, got, sizeof got));
    r->alignment = (uint64_t)x;
    return MOE_OK;
}

/* ------------------------------------------------------------------------------- tensors -- */

/* Names of the ids that this program does not compute with, for the error alone. */
static const char *gguf_foreign_type(uint32_t id, bool *removed)
{
    static const struct {
        uint32_t id;
        const char *name;
        bool removed;
    } types[] = {
        {4, "Q4_2", true}, {5, "Q4_3", true}, {9, "Q8_1", false}, {15, "Q8_K", false},
        {24, "I8", false}, {25, "I16", false}, {26, "I32", false}, {27, "I64", false},
        {28, "F64", false}, {31, "Q4_0_4_4", true}, {32, "Q4_0_4_8", true}, {33, "Q4_0_8_8", true},
        {36, "IQ4_NL_4_4", true}, {37, "IQ4_NL_4_8", true}, {38, "IQ4_NL_8_8", true},
    };
    for (size_t i = 0; i < MOE_COUNT(types); i++)
        if (types[i].id == id) {
            *removed = types[i].removed;
            return types[i].name;
        }
    return NULL;
}

static moe_status gguf_fail_type(gguf_reader *r, const char *name, uint32_t id)
{
    bool removed = false;
    const char *type = gguf_foreign_type(id, &removed);
    if (removed)
        return fail(r->error, MOE_ERR_UNSUPPORTED, name,
                    "expected a tensor type in use, got %u (%s), which was removed from GGUF; get "
                    "a current file of this model",
                    id, type);
    return fail(r->error, MOE_ERR_UNSUPPORTED, name,
                "expected a tensor type that this program computes with, got %u (%s); get the "
                "model in another quantization, such as Q4_K_M",
                id, type ? type : "unknown");
}

/* Shape and size. */
static moe_status gguf_parse_shape(gguf_reader *r, moe_tensor *t)
{
    moe_status status = gguf_u32(r, t->name, &t->n_dims);
    if (status)
        return status;
    if (t->n_dims < 1 || t->n_dims > 4)
        return fail(r->error, MOE_ERR_FORMAT, t->name, "expected 1 to 4 dimensions, got %u",
                    t->n_dims);
    t->n_elements = 1;
    for (uint32_t i = 0; i < 4; i++) {
        t->dims[i] = 1;
        if (i < t->n_dims && (status = gguf_u64(r, t->name, &t->dims[i])))
            return status;
        if (t->dims[i] < 1 || t->dims[i] > INT64_MAX)
            return fail(r->error, MOE_ERR_FORMAT, t->name,
                        "expected dimension %u to be from 1 to 2^63 - 1, got %lld", i,
                        (long long)t->dims[i]);
        if (!checked_mul(t->n_elements, t->dims[i], &t->n_elements) || t->n_elements > INT64_MAX)
            return fail(r->error, MOE_ERR_FORMAT, t->name,
                        "expected a shape of at most 2^63 - 1 elements, got %llu x %llu x %llu x "
                        "%llu",
                        (unsigned long long)t->dims[0],
                        (unsigned long long)(t->n_dims > 1 && i > 0 ? t->dims[1] : 1),
                        (unsigned long long)(t->n_dims > 2 && i > 1 ? t->dims[2] : 1),
                        (unsigned long long)(t->n_dims > 3 && i > 2 ? t->dims[3] : 1));
    }
    return MOE_OK;
}

static moe_status gguf_parse_type(gguf_reader *r, moe_tensor *t)
{
    uint32_t id = 0;
    moe_status status = gguf_u32(r, t->name, &id);
    if (status)
        return status;
    t->quant = id < QUANT_OWN_ID ? quant_by_id(id) : NULL;
    if (!t->quant)
        return r->metadata_only ? MOE_OK : gguf_fail_type(r, t->name, id);
    if (t->dims[0] % t->quant->block_len)
        return fail(r->error, MOE_ERR_FORMAT, t->name,
                    "expected rows that are a multiple of %u, the block of %s, got rows of %llu",
                    t->quant->block_len, t->quant->name, (unsigned long long)t->dims[0]);
    if (!checked_mul(t->n_elements / t->quant->block_len, t->quant->block_bytes, &t->bytes))
        return fail(r->error, MOE_ERR_FORMAT, t->name,
                    "expected a size that fits into 64 bits, got %llu elements of %s",
                    (unsigned long long)t->n_elements, t->quant->name);
    return MOE_OK;
}

static moe_status gguf_parse_tensor(gguf_reader *r, uint64_t index)
{
    char what[32];
    moe_str name = {0};
    void *item = NULL;
    moe_status status;
    snprintf(what, sizeof what, "tensor %llu", (unsigned long long)index);
    if ((status = gguf_name(r, what, GGUF_MAX_NAME_BYTES, &name)) ||
        (status = dir_table_add(r->dir, &r->dir->tensor, name, &item, r->error)))
        return status;
    moe_tensor *t = item;
    if ((status = gguf_parse_shape(r, t)) || (status = gguf_parse_type(r, t)) ||
        (status = gguf_u64(r, t->name, &t->offset)))
        return status;
    if (t->offset % r->alignment)
        return fail(r->error, MOE_ERR_FORMAT, t->name,
                    "expected an offset that is a multiple of %llu, got %llu",
                    (unsigned long long)r->alignment, (unsigned long long)t->offset);
    return MOE_OK;
}

/* Sorts tensor indices by offset: heapsort, whose time no input can blow up. */
static void gguf_sort(uint32_t *order, size_t n, const moe_tensor *tensors)
{
    for (size_t heap = n / 2, end = n; end > 1;) {
        uint32_t x;
        if (heap > 0) {
            x = order[--heap];
        } else {
            x = order[--end];
            order[end] = order[0];
        }
        size_t i = heap;
        for (size_t child; (child = 2 * i + 1) < end; i = child) {
            if (child + 1 < end &&
                tensors[order[child]].offset < tensors[order[child + 1]].offset)
                child++;
            if (tensors[x].offset >= tensors[order[child]].offset)
                break;
            order[i] = order[child];
        }
        order[i] = x;
    }
}

/* No two tensors share bytes. Any order and any gaps are fine. */
static moe_status gguf_check_overlap(gguf_reader *r)
{
    size_t n = directory_n_tensors(r->dir);
    if (n < 2)
        return MOE_OK;
    uint32_t *order = mem_alloc(r->dir->mem, n, sizeof *order);
    if (!order)
        return fail_memory(r->error, r->dir->mem, "tensors", n * sizeof *order);
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    const moe_tensor *tensors = directory_tensor_at(r->dir, 0);
    gguf_sort(order, n, tensors);
    moe_status status = MOE_OK;
    for (size_t i = 1; i < n && !status; i++) {
        const moe_tensor *a = &tensors[order[i - 1]], *b = &tensors[order[i]];
        if (a->offset + a->bytes > b->offset)
            status = fail(r->error, MOE_ERR_FORMAT, b->name,
                          "expected an offset behind the %llu bytes of \"%s\" at %llu, got %llu: "
                          "they overlap",
                          (unsigned long long)a->bytes, a->name, (unsigned long long)a->offset,
                          (unsigned long long)b->offset);
    }
    mem_free(r->dir->mem, order);
    return status;
}

/* Turns offsets in the data into offsets in the file, all of which must lie in it. */
static moe_status gguf_place_tensors(gguf_reader *r)
{
    if (!checked_align(r->at, r->alignment, &r->data_start))
        return fail(r->error, MOE_ERR_FORMAT, "header", "expected a header that fits the file");
    for (size_t i = 0; i < directory_n_tensors(r->dir); i++) {
        moe_tensor *t = (moe_tensor *)(void *)r->dir->tensor.items + i;
        uint64_t end;
        if (!checked_add(t->offset, r->data_start, &t->offset) ||
            !checked_add(t->offset, t->bytes, &end))
            return fail(r->error, MOE_ERR_FORMAT, t->name,
                        "expected data that ends below 2^64, got %llu bytes at offset %llu",
                        (unsigned long long)t->bytes, (unsigned long long)t->offset);
        if (end > r->file_bytes && !r->metadata_only)
            return fail(r->error, MOE_ERR_FORMAT, t->name,
                        "expected %llu bytes of data at offset %llu, got a file of %llu bytes: it "
                        "is cut off; get it again",
                        (unsigned long long)t->bytes, (unsigned long long)t->offset,
                        (unsigned long long)r->file_bytes);
    }
    return gguf_check_overlap(r);
}

/* ----------------------------------------------------------------------------- one file -- */

static moe_status gguf_parse(gguf_reader *r)
{
    uint64_t n_tensors = 0, n_meta = 0;
    if (cancelled(r->dir->cancel))
        return fail(r->error, MOE_ERR_CANCELLED, NULL, "cancelled during open");
    moe_status status = gguf_parse_head(r, &n_tensors, &n_meta);
    for (uint64_t i = 0; i < n_meta && !status; i++)
        status = gguf_parse_meta(r, i);
    if (!status)
        status = gguf_parse_alignment(r);
    for (uint64_t i = 0; i < n_tensors && !status; i++)
        status = gguf_parse_tensor(r, i);
    return status ? status : gguf_place_tensors(r);
}

/* Fills `dir`, which is empty, from the header of a file. */
static moe_status gguf_load_header(moe_directory *dir, dir_file *file, bool metadata_only,
                                   moe_error *error)
{
    uint64_t window = file->memory ? file->bytes : MOE_MIN(file->bytes, GGUF_WINDOW_BYTES);
    for (;;) {
        if (!file->memory) {
            moe_status status = dir_file_read_head(dir, file, window, error);
            if (status)
                return status;
        }
        gguf_reader r = {
            .data = file->memory ? file->memory : file->head,
            .avail = window,
            .file_bytes = file->bytes,
            .metadata_only = metadata_only,
            .dir = dir,
            .error = error,
        };
        moe_status status = gguf_parse(&r);
        file->data_start = r.data_start;
        if (!r.need)
            return status;
        dir_clear(dir);
        window = MOE_MIN(MOE_MAX(r.need, 2 * window), file->bytes);
    }
}

/* ---------------------------------------------------------------------------- split files -- */

/* Reads split.no or split.count; 0 if there is none. */
static moe_status gguf_split_key(const moe_directory *dir, const char *key, uint32_t max,
                                 uint32_t *value, moe_error *error)
{
    *value = 0;
    if (!meta_u32(dir, key, false, 0, max, value, error))
        return MOE_OK;
    if (error)
        error->status = MOE_ERR_FORMAT; // the container's business, not the model's
    return MOE_ERR_FORMAT;
}

/* Writes the ending of a part's file name. */
static void gguf_part_ending(char ending[32], uint32_t part, uint32_t n_parts)
{
    snprintf(ending, 32, "-%05u-of-%05u.gguf", part + 1, n_parts);
}

/* Puts in front of an error in which part it was found. */
static moe_status gguf_in_part(moe_error *error, moe_status status, const char *path,
                               uint32_t part, uint32_t n_parts)
{
    if (!error || status == MOE_ERR_CANCELLED)
        return status;
    moe_error inner = *error;
    const char *name = path + strlen(path);
    while (name > path && name[-1] != '/' && name[-1] != '\\')
        name--;
    snprintf(error->message, sizeof error->message, "part %u of %u (%.200s): %.260s", part + 1,
             n_parts, name, inner.message);
    text_clean(error->message);
    return status;
}

/* Adds the tensors of a part to the directory. */
static moe_status gguf_merge(moe_directory *dir, const moe_directory *part, uint32_t file,
                             moe_error *error)
{
    size_t n = directory_n_tensors(part);
    moe_status status = dir_table_reserve(dir, &dir->tensor, n, "tensor_count", error);
    for (size_t i = 0; i < n && !status; i++) {
        const moe_tensor *from = directory_tensor_at(part, i);
        void *item = NULL;
        status = dir_table_add(dir, &dir->tensor, (moe_str){from->name, strlen(from->name)}, &item,
                               error);
        if (!status) {
            moe_tensor *t = item;
            const char *name = t->name;
            *t = *from;
            t->name = name;
            t->file = file;
        }
    }
    return status;
}

/* Opens and adds one more part. */
static moe_status gguf_load_part(moe_directory *dir, dir_file *file, const char *path,
                                 uint32_t index, uint32_t n_parts, moe_error *error)
{
    uint32_t no = 0, count = 0;
    moe_directory part;
    dir_init(&part, dir->mem);
    part.cancel = dir->cancel;
    moe_status status = dir_file_open_path(dir->mem, file, path, error);
    if (!status)
        status = gguf_load_header(&part, file, false, error);
    if (!status)
        status = gguf_split_key(&part, "split.no", 65535, &no, error);
    if (!status)
        status = gguf_split_key(&part, "split.count", 65535, &count, error);
    if (!status && (no != index || count != n_parts))
        status = fail(error, MOE_ERR_FORMAT, "split.no",
                      "expected part %u of %u by the file's name, got %u of %u by its metadata",
                      index + 1, n_parts, no + 1, count);
    if (!status)
        status = gguf_merge(dir, &part, index, error);
    dir_clear(&part);
    mem_free(dir->mem, file->head); // only the tensors of further parts are used
    file->head = NULL;
    return status ? gguf_in_part(error, status, path, index, n_parts) : MOE_OK;
}

/* Opens the parts behind the first, which lie beside it. */
static moe_status gguf_load_parts(moe_directory *dir, uint32_t n_parts, moe_error *error)
{
    char ending[32];
    gguf_part_ending(ending, 0, n_parts);
    const char *first = dir->files[0].path;
    size_t path_bytes = strlen(first), ending_bytes = strlen(ending);
    if (path_bytes < ending_bytes || strcmp(first + path_bytes - ending_bytes, ending) != 0)
        return fail(error, MOE_ERR_FORMAT, first,
                    "expected the name of the first part of a split file to end in \"%s\"; rename "
                    "the parts",
                    ending);
    dir_file *files = mem_grow(dir->mem, dir->files, n_parts, sizeof *files);
    if (!files)
        return fail_memory(error, dir->mem, "parts", n_parts * sizeof *files);
    dir->files = files;
    char *path = mem_alloc(dir->mem, path_bytes + 1, 1);
    if (!path)
        return fail_memory(error, dir->mem, "path", path_bytes + 1);
    moe_status status = MOE_OK;
    for (uint32_t i = 1; i < n_parts && !status; i++) {
        gguf_part_ending(ending, i, n_parts);
        memcpy(path, files[0].path, path_bytes - ending_bytes);
        memcpy(path + path_bytes - ending_bytes, ending, ending_bytes + 1);
        dir->n_files = i + 1;
        status = gguf_load_part(dir, &files[i], path, i, n_parts, error);
    }
    mem_free(dir->mem, path);
    return status;
}

/* Finds out whether the file is a part of a split one, and opens the other parts if so. With
 * `metadata_only` the first part has all that is wanted. */
static moe_status gguf_load_split(moe_directory *dir, bool metadata_only, moe_error *error)
{
    uint32_t no = 0, n_parts = 0, n_tensors = 0;
    moe_status status;
    if ((status = gguf_split_key(dir, "split.no", 65535, &no, error)) ||
        (status = gguf_split_key(dir, "split.count", 65535, &n_parts, error)) ||
        (status = gguf_split_key(dir, "split.tensors.count", INT32_MAX, &n_tensors, error)))
        return status;
    if (n_parts < 2)
        return MOE_OK;
    char ending[32];
    gguf_part_ending(ending, 0, n_parts);
    if (no != 0)
        return fail(error, MOE_ERR_UNSUPPORTED, "split.no",
                    "expected the first part of a split file, got part %u of %u; open the file "
                    "whose name ends in \"%s\"",
                    no + 1, n_parts, ending);
    if (metadata_only)
        return MOE_OK;
    if (!dir->files[0].path)
        return fail(error, MOE_ERR_UNSUPPORTED, "split.count",
                    "expected one whole file in memory or from a callback, got the first of %u "
                    "parts; open it by its path or join the parts",
                    n_parts);
    if (n_parts > GGUF_MAX_PARTS)
        return fail(error, MOE_ERR_LIMIT, "split.count", "expected at most %d parts, got %u",
                    GGUF_MAX_PARTS, n_parts);
    if ((status = gguf_load_parts(dir, n_parts, error)))
        return status;
    if (directory_meta(dir, "split.tensors.count") && n_tensors != directory_n_tensors(dir))
        return fail(error, MOE_ERR_FORMAT, "split.tensors.count",
                    "expected %u tensors in all parts, got %llu", n_tensors,
                    (unsigned long long)directory_n_tensors(dir));
    return MOE_OK;
}

/* ---------------------------------------------------------------------------- entry point -- */

/* Fills an empty directory, whose file is open, from it. */
static moe_status gguf_load(moe_directory *dir, const moe_model_options *options, moe_error *error)
{
    moe_status status;
    if ((status = gguf_load_header(dir, dir->files, options->vocab_only, error)) ||
        (status = gguf_load_split(dir, options->vocab_only, error)))
        return status;
    if (options->vocab_only) {
        dir_file_release(dir->files);
        return MOE_OK;
    }
    return dir_load_data(dir, options->copy, error);
}

#endif
