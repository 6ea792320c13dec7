/* convert/safetensors.c - safetensors files, one or many shards -> a table of tensors.
 *
 *     u64 header bytes | header | data
 *     header: JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}}
 *
 * Everything a header says is checked here: sizes with checked arithmetic, ranges that fit dtype
 * and shape, no holes and no overlaps, each name once over all shards, shards that lie in the
 * checkpoint's own folder. Must never: use a number before it was compared with what is there. */
#ifndef MOE_CONVERT_SAFETENSORS_C
#define MOE_CONVERT_SAFETENSORS_C

#include "files.c"

enum { ST_MAX_HEADER_BYTES = 100000000, ST_MAX_TENSORS = 1 << 18, ST_MAX_DIMS = 8 };

typedef struct st_dtype {
    const char *name;
    uint32_t bytes;
    uint32_t quant; // GGUF's id of the same format; UINT32_MAX: none
} st_dtype;

static const st_dtype st_dtypes[] = {
    {"F32", 4, 0}, {"F16", 2, 1}, {"BF16", 2, 30}, {"F8_E4M3", 1, UINT32_MAX},
    {"F64", 8, UINT32_MAX}, {"F8_E5M2", 1, UINT32_MAX}, {"F8_E8M0", 1, UINT32_MAX},
    {"BOOL", 1, UINT32_MAX}, {"U8", 1, UINT32_MAX}, {"I8", 1, UINT32_MAX},
    {"U16", 2, UINT32_MAX}, {"I16", 2, UINT32_MAX}, {"U32", 4, UINT32_MAX},
    {"I32", 4, UINT32_MAX}, {"U64", 8, UINT32_MAX}, {"I64", 8, UINT32_MAX},
};

typedef struct st_tensor {
    const char *name;
    const conv_file *file;
    const st_dtype *dtype;
    uint32_t n_dims;
    uint64_t dims[ST_MAX_DIMS]; // the last is contiguous
    uint64_t n_elements, offset, bytes;
    bool used;
} st_tensor;

typedef struct st_table {
    conv_source *source;
    st_tensor *items; // [n], sorted by name when all shards are in
    size_t n, capacity;
} st_table;

/* -------------------------------------------------------------------------------- headers -- */

static char *st_name(conv_source *s, json_ref key)
{
    char *name = arena_copy(&s->arena, key.node->as.text, key.node->n, 1);
    return name;
}

/* A whole number that a double holds exactly. */
static bool st_number(json_ref v, uint64_t *value)
{
    const double x = json_double(v, -1);
    if (!(x >= 0 && x <= 9007199254740991.0) || x != floor(x))
        return false;
    *value = (uint64_t)x;
    return true;
}

static moe_status st_read_dtype(st_tensor *t, json_ref v, moe_error *error)
{
    char known[256];
    size_t used = 0;
    if (json_typeof(v) != JSON_STRING)
        return fail(error, MOE_ERR_FORMAT, t->name, "expected a dtype in quotes");
    for (size_t i = 0; i < MOE_COUNT(st_dtypes); i++) {
        if (json_is(v, st_dtypes[i].name))
            t->dtype = &st_dtypes[i];
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "",
                                 st_dtypes[i].name);
    }
    if (!t->dtype)
        return fail(error, MOE_ERR_UNSUPPORTED, t->name, "expected a dtype of %s, got \"%.*s\"",
                    known, (int)MOE_MIN(v.node->n, 40u), v.node->as.text);
    return MOE_OK;
}

static moe_status st_read_shape(st_tensor *t, json_ref v, moe_error *error)
{
    if (json_typeof(v) != JSON_ARRAY || json_count(v) > ST_MAX_DIMS)
        return fail(error, MOE_ERR_FORMAT, t->name, "expected a shape of 0 to %d dimensions",
                    ST_MAX_DIMS);
    t->n_elements = 1;
    for (json_ref d = json_first(v); d.node; d = json_next(v, d)) {
        uint64_t dim;
        if (!st_number(d, &dim))
            return fail(error, MOE_ERR_FORMAT, t->name,
                        "expected dimension %u to be a whole number below 2^53, got %g", t->n_dims,
                        json_double(d, NAN));
        t->dims[t->n_dims++] = dim;
        if (!checked_mul(t->n_elements, dim, &t->n_elements))
            return fail(error, MOE_ERR_FORMAT, t->name,
                        "expected a shape whose product fits into 64 bits");
    }
    return MOE_OK;
}

/* Offsets are from the data's start. */
static moe_status st_read_range(st_tensor *t, json_ref v, uint64_t data_start, uint64_t data_bytes,
                                moe_error *error)
{
    json_ref first = json_first(v);
    uint64_t begin, end, want;
    if (json_typeof(v) != JSON_ARRAY || json_count(v) != 2 || !st_number(first, &begin) ||
        !st_number(json_next(v, first), &end))
        return fail(error, MOE_ERR_FORMAT, t->name,
                    "expected data_offsets to be two whole numbers below 2^53");
    if (begin > end)
        return fail(error, MOE_ERR_FORMAT, t->name,
                    "expected data_offsets in order, got %llu before %llu",
                    (unsigned long long)begin, (unsigned long long)end);
    if (end > data_bytes)
        return fail(error, MOE_ERR_FORMAT, t->name,
                    "expected data that ends within the %llu bytes behind the header of %s, got "
                    "%llu: the file is cut off; get it again", (unsigned long long)data_bytes,
                    t->file->path, (unsigned long long)end);
    if (!checked_mul(t->n_elements, t->dtype->bytes, &want) || want != end - begin)
        return fail(error, MOE_ERR_FORMAT, t->name,
                    "expected %llu elements of %s in %llu bytes of data: dtype and shape do not "
                    "fit data_offsets", (unsigned long long)t->n_elements, t->dtype->name,
                    (unsigned long long)(end - begin));
    t->offset = data_start + begin;
    t->bytes = end - begin;
    return MOE_OK;
}

static moe_status st_read_tensor(st_table *table, const conv_file *file, json_ref key,
                                 uint64_t data_start, moe_error *error)
{
    conv_source *s = table->source;
    json_ref v = json_held(key);
    st_tensor *t = &table->items[table->n];
    *t = (st_tensor){.file = file, .name = st_name(s, key)};
    if (!t->name)
        return fail_memory(error, s->mem, "names", key.node->n);
    if (!key.node->n || key.node->n > CONVERT_MAX_NAME_BYTES || strlen(t->name) != key.node->n)
        return fail(error, MOE_ERR_FORMAT, t->name, "expected a name of 1 to %d bytes without NUL",
                    CONVERT_MAX_NAME_BYTES);
    if (json_typeof(v) != JSON_OBJECT)
        return fail(error, MOE_ERR_FORMAT, t->name,
                    "expected an object with dtype, shape and data_offsets");
    moe_status status = st_read_dtype(t, json_get(v, "dtype"), error);
    if (!status)
        status = st_read_shape(t, json_get(v, "shape"), error);
    if (!status)
        status = st_read_range(t, json_get(v, "data_offsets"), data_start,
                               file->bytes - data_start, error);
    table->n += !status;
    return status;
}

static int st_by_offset(const void *a, const void *b)
{
    const st_tensor *x = a, *y = b;
    return x->offset != y->offset ? (x->offset > y->offset) - (x->offset < y->offset)
                                  : (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* The tensors of one file must fill its data exactly. */
static moe_status st_check_cover(st_tensor *items, size_t n, uint64_t at, const conv_file *file,
                                 moe_error *error)
{
    if (n)
        qsort(items, n, sizeof *items, st_by_offset);
    for (size_t i = 0; i < n; i++) {
        if (items[i].offset < at)
            return fail(error, MOE_ERR_FORMAT, items[i].name,
                        "expected data of its own, but it overlaps that of %s", items[i - 1].name);
        if (items[i].offset > at)
            return fail(error, MOE_ERR_FORMAT, items[i].name,
                        "expected its data at byte %llu of %s, right behind the tensor before, got "
                        "%llu: a hole", (unsigned long long)at, file->path,
                        (unsigned long long)items[i].offset);
        at = items[i].offset + items[i].bytes;
    }
    if (at != file->bytes)
        return fail(error, MOE_ERR_FORMAT, file->path,
                    "expected tensors up to the end of the file, got %llu bytes that belong to "
                    "none",
                    (unsigned long long)(file->bytes - at));
    return MOE_OK;
}

static moe_status st_reserve(st_table *table, size_t n, moe_error *error)
{
    if (table->n + n <= table->capacity)
        return MOE_OK;
    moe_mem *mem = table->source->mem;
    const size_t capacity = MOE_MAX(2 * table->capacity, table->n + n);
    st_tensor *items = mem_grow(mem, table->items, capacity, sizeof *items);
    if (!items)
        return fail_memory(error, mem, "tensors", capacity * sizeof *items);
    table->items = items;
    table->capacity = capacity;
    return MOE_OK;
}

static moe_status st_parse_header(st_table *table, const conv_file *file, const char *text,
                                  uint64_t bytes, moe_error *error)
{
    json_doc doc;
    text_arena strings = {.mem = table->source->mem};
    size_t n_marks = 0;
    for (const char *p = text; (p = memchr(p, '{', (size_t)(text + bytes - p))); p++)
        n_marks++; // one for each tensor and two more: a bound before any memory is taken
    if (n_marks > ST_MAX_TENSORS + 2)
        return fail(error, MOE_ERR_LIMIT, file->path,
                    "expected at most %d tensors in a file, got %zu",
                    ST_MAX_TENSORS, n_marks);
    moe_status status = json_parse(&doc, text, bytes, &strings, file->path, error);
    if (status) {
        arena_free(&strings);
        return status;
    }
    json_ref root = {&doc, doc.nodes};
    const size_t first = table->n;
    if (json_typeof(root) != JSON_OBJECT)
        status = fail(error, MOE_ERR_FORMAT, file->path, "expected a JSON object as its header");
    if (!status)
        status = st_reserve(table, json_count(root), error);
    for (json_ref key = json_first(root); key.node && !status; key = json_next(root, key))
        if (!json_is(key, "__metadata__"))
            status = st_read_tensor(table, file, key, 8 + bytes, error);
    json_free(&doc);
    arena_free(&strings);
    st_tensor *added = table->n > first ? table->items + first : NULL;
    return status ? status : st_check_cover(added, table->n - first, 8 + bytes, file, error);
}

/* Adds the tensors of a file to the table. */
static moe_status st_load_file(st_table *table, const char *path, moe_error *error)
{
    conv_file *file;
    uint64_t bytes;
    moe_status status = conv_file_open(table->source, path, &file, error);
    if (status)
        return status;
    if (file->bytes < 8)
        return fail(error, MOE_ERR_FORMAT, path,
                    "expected a safetensors file, got %llu bytes: too few for its first number",
                    (unsigned long long)file->bytes);
    if ((status = plat_read(&file->os, 0, &bytes, 8, path, error)))
        return status;
    if (bytes > file->bytes - 8)
        return fail(error, MOE_ERR_FORMAT, path,
                    "expected a header within the %llu bytes of the file, got one of %llu: it is "
                    "no safetensors file, or is cut off", (unsigned long long)file->bytes,
                    (unsigned long long)bytes);
    if (bytes > ST_MAX_HEADER_BYTES)
        return fail(error, MOE_ERR_LIMIT, path, "expected a header of at most %d bytes, got %llu",
                    ST_MAX_HEADER_BYTES, (unsigned long long)bytes);
    moe_mem *mem = table->source->mem;
    char *text = mem_alloc_uncleared(mem, bytes, 1);
    if (!text)
        return fail_memory(error, mem, path, bytes);
    status = plat_read(&file->os, 8, text, bytes, path, error);
    if (!status)
        status = st_parse_header(table, file, text, bytes, error);
    mem_free(mem, text);
    return status;
}

/* --------------------------------------------------------------------------------- shards -- */

static bool st_inside(const char *path, const char *folder)
{
    const size_t n = strlen(folder);
    return !strncmp(path, folder, n) && path[n] == '/';
}

/* A shard lies in the folder itself. Links are followed only within the folder, or into the "blobs"
 * of the same download cache, whose snapshots are made of links. */
static moe_status st_check_path(const char *dir, const char *path, moe_error *error)
{
    char *real_dir = realpath(dir, NULL), *real = realpath(path, NULL), *blobs = NULL;
    moe_status status = MOE_OK;
    if (real_dir && real && !st_inside(real, real_dir)) {
        size_t n = strlen(real_dir) + sizeof "/../../blobs";
        char *text = malloc(n);
        if (text) {
            snprintf(text, n, "%s/../../blobs", real_dir);
            blobs = realpath(text, NULL);
            free(text);
        }
        if (!blobs || !st_inside(real, blobs))
            status = fail(error, MOE_ERR_FORMAT, path,
                          "expected a file in the folder of the checkpoint, got a link that leaves "
                          "it");
    }
    free(blobs);
    free(real);
    free(real_dir);
    return status;
}

static moe_status st_shard_path(conv_source *s, const char *dir, json_ref name, const char **path,
                                moe_error *error)
{
    char text[CONVERT_MAX_NAME_BYTES];
    if (json_typeof(name) != JSON_STRING || !name.node->n || name.node->n >= sizeof text ||
        memchr(name.node->as.text, 0, name.node->n))
        return fail(error, MOE_ERR_FORMAT, "weight_map",
                    "expected names of files, got another value");
    snprintf(text, sizeof text, "%.*s", (int)name.node->n, name.node->as.text);
    if (strchr(text, '/') || strchr(text, '\\') || !strcmp(text, "..") || !strcmp(text, "."))
        return fail(error, MOE_ERR_FORMAT, "weight_map",
                    "expected names of files in the folder of the checkpoint, got \"%s\"", text);
    *path = conv_text(s, "%s/%s", dir, text);
    return *path ? st_check_path(dir, *path, error)
                 : fail_memory(error, s->mem, "path", strlen(text));
}

static int st_by_name(const void *a, const void *b)
{
    return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

static st_tensor *st_find(const st_table *table, const char *name)
{
    const st_tensor key = {.name = name};
    return table->n ? bsearch(&key, table->items, table->n, sizeof key, st_by_name) : NULL;
}

/* Whether two tensors hold the same bytes in the same shape. */
static moe_status st_compare(const st_tensor *a, const st_tensor *b, bool *same, moe_error *error)
{
    unsigned char x[4096], y[4096];
    *same = b && a->dtype == b->dtype && a->n_dims == b->n_dims && a->bytes == b->bytes &&
            !memcmp(a->dims, b->dims, a->n_dims * sizeof a->dims[0]);
    for (uint64_t at = 0; *same && at < a->bytes; at += sizeof x) {
        const size_t n = (size_t)MOE_MIN(a->bytes - at, sizeof x);
        moe_status status = plat_read(&a->file->os, a->offset + at, x, n, a->file->path, error);
        if (!status)
            status = plat_read(&b->file->os, b->offset + at, y, n, b->file->path, error);
        if (status)
            return status;
        *same = !memcmp(x, y, n);
    }
    return MOE_OK;
}

/* Sorts the table by name and finds names that are there twice. */
static moe_status st_finish(st_table *table, moe_error *error)
{
    if (table->n)
        qsort(table->items, table->n, sizeof *table->items, st_by_name);
    for (size_t i = 1; i < table->n; i++) {
        const st_tensor *a = &table->items[i - 1], *b = &table->items[i];
        if (!strcmp(a->name, b->name))
            return fail(error, MOE_ERR_FORMAT, a->name,
                        a->file == b->file
                            ? "expected each tensor once, got it twice in %s"
                            : "expected each tensor in one shard, got it in %s and %s",
                        a->file->path, b->file->path);
    }
    return MOE_OK;
}

/* The index must say of each tensor the shard that has it. */
static moe_status st_check_map(const st_table *table, json_ref map, moe_error *error)
{
    for (json_ref key = json_first(map); key.node; key = json_next(map, key)) {
        char name[CONVERT_MAX_NAME_BYTES];
        json_ref file = json_held(key);
        snprintf(name, sizeof name, "%.*s", (int)MOE_MIN(key.node->n, sizeof name - 1),
                 key.node->as.text);
        const st_tensor *t = st_find(table, name);
        const char *base = t ? strrchr(t->file->path, '/') + 1 : NULL;
        if (!t || !json_is(file, base))
            return fail(error, MOE_ERR_FORMAT, name,
                        "expected this tensor in %.*s, as the weight_map says, got it %s%s",
                        (int)file.node->n, file.node->as.text, t ? "in " : "nowhere",
                        t ? base : "");
    }
    return MOE_OK;
}

static moe_status st_load_shards(st_table *table, const char *dir, json_ref index, moe_error *error)
{
    conv_source *s = table->source;
    json_ref map = json_get(index, "weight_map");
    const uint32_t first = s->n_files;
    if (json_typeof(map) != JSON_OBJECT || !json_count(map))
        return fail(error, MOE_ERR_FORMAT, "weight_map",
                    "expected an object in model.safetensors.index.json");
    for (json_ref key = json_first(map); key.node; key = json_next(map, key)) {
        const char *path = NULL;
        bool known = false;
        json_ref name = json_held(key);
        for (uint32_t i = s->n_files; i-- > first && !known;) // mostly that of the tensor before
            known = json_is(name, strrchr(s->files[i].path, '/') + 1);
        if (known)
            continue;
        moe_status status = st_shard_path(s, dir, name, &path, error);
        if (!status)
            status = st_load_file(table, path, error);
        if (status)
            return status;
    }
    moe_status status = st_finish(table, error);
    return status ? status : st_check_map(table, map, error);
}

/* Fills the table from a checkpoint's folder. */
static moe_status st_load(st_table *table, const char *dir, moe_error *error)
{
    static const char index_name[] = "model.safetensors.index.json";
    conv_source *s = table->source;
    json_doc doc;
    json_ref root;
    struct stat info;
    moe_status status = conv_read_json(s, dir, index_name, false, &doc, &root, error);
    if (status)
        return status;
    if (root.node) {
        status = st_load_shards(table, dir, root, error);
        json_free(&doc);
        return status;
    }
    const char *path = conv_text(s, "%s/model.safetensors", dir);
    const char *torch = conv_text(s, "%s/pytorch_model.bin", dir);
    if (!path || !torch)
        return fail_memory(error, s->mem, "path", strlen(dir));
    if (stat(path, &info) != 0)
        return fail(error, MOE_ERR_IO, dir, "expected model.safetensors or %s in this folder, got "
                    "neither%s", index_name, stat(torch, &info) == 0 ? "; weights in PyTorch's "
                    "pickle format are not read: get the safetensors files" : "");
    status = st_check_path(dir, path, error);
    if (!status)
        status = st_load_file(table, path, error);
    return status ? status : st_finish(table, error);
}

#endif
