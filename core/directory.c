/* core/directory.c - the directory of a model file: its tables, lookups and typed readers, and the
 * sources that its bytes come from.
 *
 * Owns: the tables, their memory, the open or copied files. In: what a container's reader (such as
 * core/gguf.c) found. Out: what core/directory.h promises. All metadata lives in memory; only the
 * tensors' data is used from a map, so a file that is cut short while it is open can hurt nothing
 * but an evaluation, and directory_check() guards that.
 * Must never: know a container or a model family. */
#ifndef MOE_CORE_DIRECTORY_C
#define MOE_CORE_DIRECTORY_C

#include "directory.h"
#include "platform.h"

/* --------------------------------------------------------------------------------- types -- */

/* What the tables of one directory may take. The largest vocabularies in use, with their merges,
 * need about 13 MiB; without a bound a small file could ask for many times its own size. */
enum { DIR_MAX_TABLE_BYTES = 32 << 20 };

/* Names that hash to neighbouring slots. Tables are at most half full, so chance gives runs of a
 * few dozen in the largest; longer ones were made on purpose, to make lookups slow. */
enum { DIR_MAX_PROBES = 256 };

enum { DIR_CHUNK_BYTES = 16 << 10, DIR_READ_STEP_BYTES = 4 << 20 };

/* Small pieces of memory that live as long as the directory. */
typedef struct dir_chunk {
    struct dir_chunk *next;
    uint64_t used_bytes, bytes; // of what follows this struct
} dir_chunk;

typedef struct dir_slot {
    uint32_t hash;
    uint32_t item; // index + 1; 0: free
} dir_slot;

/* moe_meta or moe_tensor structs, in file order, and a hash index over their names. The first
 * member of an item is its name. */
typedef struct dir_table {
    unsigned char *items; // [capacity][item_bytes]
    uint64_t item_bytes;
    uint64_t n, capacity;
    dir_slot *slots; // [n_slots], a power of two, >= 2 * capacity
    uint64_t n_slots;
} dir_table;

/* One file, or what stands in for it. */
typedef struct dir_file {
    char *path;            // NULL for memory and callbacks
    plat_file os;
    bool is_open;
    uint64_t bytes;
    const uint8_t *memory; // the caller's, if that is the source
    moe_read_fn read;      // the caller's, if that is the source
    void *read_user;
    uint8_t *head;         // the first bytes, as far as its reader asked for them, copied
    const uint8_t *map;    // the whole file
    uint8_t *copy;         // its bytes from data_start on; of a .moe, what is not used in place
    uint64_t data_start;   // where tensors begin
} dir_file;

struct moe_directory {
    moe_mem *mem;
    const moe_cancel *cancel; // while it is being opened
    dir_chunk *chunks;
    uint64_t table_bytes;
    dir_table meta, tensor;
    dir_file *files; // [n_files]
    uint32_t n_files;
    struct moefile *moe; // what core/moefile.c keeps; NULL: another container
};

/* -------------------------------------------------------------------------------- memory -- */

/* NULL if the tables would grow over their bound or memory is short; dir_fail_memory() says
 * which. */
static void *dir_count_alloc(moe_directory *dir, uint64_t n, uint64_t item_bytes)
{
    uint64_t bytes;
    if (!checked_mul(n, item_bytes, &bytes) || bytes > DIR_MAX_TABLE_BYTES - dir->table_bytes)
        return NULL;
    void *p = mem_alloc(dir->mem, n, item_bytes);
    if (p)
        dir->table_bytes += bytes;
    return p;
}

static moe_status dir_fail_memory(const moe_directory *dir, const char *subject, uint64_t n,
                                  uint64_t item_bytes, moe_error *error)
{
    uint64_t bytes = UINT64_MAX;
    if (!checked_mul(n, item_bytes, &bytes) || bytes > DIR_MAX_TABLE_BYTES - dir->table_bytes)
        return fail(error, MOE_ERR_LIMIT, subject,
                    "expected metadata whose tables take at most %u bytes, got more with the %llu "
                    "entries of this one",
                    (unsigned)DIR_MAX_TABLE_BYTES, (unsigned long long)n);
    return fail_memory(error, dir->mem, subject, bytes);
}

/* Memory that is freed with the directory; cleared, aligned to 16. */
static void *dir_alloc(moe_directory *dir, uint64_t n, uint64_t item_bytes)
{
    uint64_t bytes, chunk_bytes;
    if (!checked_mul(n, item_bytes, &bytes) || !checked_align(bytes, 16, &bytes))
        return NULL;
    dir_chunk *chunk = dir->chunks;
    if (!chunk || bytes > chunk->bytes - chunk->used_bytes) {
        if (!checked_add(MOE_MAX(bytes, DIR_CHUNK_BYTES), align_up(sizeof *chunk, 16),
                         &chunk_bytes))
            return NULL;
        chunk = dir_count_alloc(dir, chunk_bytes, 1);
        if (!chunk)
            return NULL;
        chunk->bytes = MOE_MAX(bytes, DIR_CHUNK_BYTES);
        chunk->next = dir->chunks;
        dir->chunks = chunk;
    }
    unsigned char *p = (unsigned char *)chunk + align_up(sizeof *chunk, 16) + chunk->used_bytes;
    chunk->used_bytes += bytes;
    return p;
}

/* -------------------------------------------------------------------------------- tables -- */

static uint32_t dir_hash(const char *name, uint64_t bytes)
{
    uint64_t h = 0xcbf29ce484222325u; // FNV-1a, with a last mixing step for the low bits
    for (uint64_t i = 0; i < bytes; i++)
        h = (h ^ (unsigned char)name[i]) * 0x100000001b3u;
    h ^= h >> 32;
    h *= 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32);
}

static const char *dir_table_name(const dir_table *table, uint64_t index)
{
    return *(const char *const *)(const void *)(table->items + index * table->item_bytes);
}

/* The slot that holds the name or is free for it; NULL after too many probes. */
static dir_slot *dir_table_slot(const dir_table *table, const char *name, uint64_t bytes)
{
    uint32_t hash = dir_hash(name, bytes);
    for (uint64_t i = 0; i < MOE_MIN(table->n_slots, DIR_MAX_PROBES); i++) {
        dir_slot *slot = &table->slots[(hash + i) & (table->n_slots - 1)];
        if (!slot->item)
            return slot;
        if (slot->hash != hash)
            continue;
        const char *other = dir_table_name(table, slot->item - 1);
        if (strlen(other) == bytes && memcmp(other, name, (size_t)bytes) == 0)
            return slot;
    }
    return NULL;
}

static const void *dir_table_find(const dir_table *table, const char *name)
{
    const dir_slot *slot = dir_table_slot(table, name, strlen(name));
    return slot && slot->item ? table->items + (slot->item - 1) * table->item_bytes : NULL;
}

/* Makes room for n more items; those that are there may move. */
static moe_status dir_table_reserve(moe_directory *dir, dir_table *table, uint64_t n,
                                    const char *subject, moe_error *error)
{
    uint64_t capacity, n_slots = 16;
    if (!checked_add(table->n, n, &capacity) || capacity > DIR_MAX_TABLE_BYTES)
        return dir_fail_memory(dir, subject, n, DIR_MAX_TABLE_BYTES, error);
    if (capacity <= table->capacity)
        return MOE_OK;
    capacity = MOE_MAX(capacity, 2 * table->capacity);
    while (n_slots < 2 * capacity)
        n_slots *= 2;
    uint64_t old_bytes = table->capacity * table->item_bytes + table->n_slots * sizeof(dir_slot);
    dir->table_bytes -= old_bytes;
    unsigned char *items = dir_count_alloc(dir, capacity, table->item_bytes);
    dir_slot *slots = items ? dir_count_alloc(dir, n_slots, sizeof *slots) : NULL;
    if (!slots) {
        dir->table_bytes += old_bytes - (items ? capacity * table->item_bytes : 0);
        mem_free(dir->mem, items);
        return dir_fail_memory(dir, subject, capacity,
                               table->item_bytes + n_slots / capacity * sizeof(dir_slot), error);
    }
    if (table->n)
        memcpy(items, table->items, (size_t)(table->n * table->item_bytes));
    mem_free(dir->mem, table->items);
    mem_free(dir->mem, table->slots);
    table->items = items;
    table->slots = slots;
    table->capacity = capacity;
    table->n_slots = n_slots;
    for (uint64_t i = 0; i < table->n; i++) {
        const char *name = dir_table_name(table, i);
        dir_slot *slot = dir_table_slot(table, name, strlen(name));
        if (!slot) // the probes of a smaller table sufficed, so only a hostile file comes here
            return fail(error, MOE_ERR_LIMIT, name, "too many names collide with this one");
        *slot = (dir_slot){dir_hash(name, strlen(name)), (uint32_t)(i + 1)};
    }
    return MOE_OK;
}

/* Adds an item with this name, which it copies; the rest of *item is zero. There is room, from
 * dir_table_reserve. The name holds no NUL. */
static moe_status dir_table_add(moe_directory *dir, dir_table *table, moe_str name, void **item,
                                moe_error *error)
{
    char *copy = dir_alloc(dir, name.bytes + 1, 1);
    if (!copy)
        return dir_fail_memory(dir, "names", name.bytes + 1, 1, error);
    memcpy(copy, name.data, (size_t)name.bytes);
    dir_slot *slot = dir_table_slot(table, name.data, name.bytes);
    if (!slot)
        return fail(error, MOE_ERR_LIMIT, copy, "too many names collide with this one");
    if (slot->item)
        return fail(error, MOE_ERR_FORMAT, copy, "expected each name once, got a second entry");
    *slot = (dir_slot){dir_hash(name.data, name.bytes), (uint32_t)(table->n + 1)};
    *item = table->items + table->n++ * table->item_bytes;
    *(const char **)*item = copy;
    return MOE_OK;
}

static void dir_init(moe_directory *dir, moe_mem *mem)
{
    memset(dir, 0, sizeof *dir);
    dir->mem = mem;
    dir->meta.item_bytes = sizeof(moe_meta);
    dir->tensor.item_bytes = sizeof(moe_tensor);
}

/* Forgets all entries. */
static void dir_clear(moe_directory *dir)
{
    while (dir->chunks) {
        dir_chunk *chunk = dir->chunks;
        dir->chunks = chunk->next;
        mem_free(dir->mem, chunk);
    }
    dir_table *tables[2] = {&dir->meta, &dir->tensor};
    for (int i = 0; i < 2; i++) {
        mem_free(dir->mem, tables[i]->items);
        mem_free(dir->mem, tables[i]->slots);
        *tables[i] = (dir_table){.item_bytes = tables[i]->item_bytes};
    }
    dir->table_bytes = 0;
}

/* ------------------------------------------------------------------------------- threads -- */

enum { DIR_MAX_WORKERS = 16 };

/* Work that several threads share: each calls run() until it returns false. */
typedef struct dir_team {
    void *self;
    bool (*run)(void *self, uint32_t worker, moe_error *error);
    moe_error errors[DIR_MAX_WORKERS];
} dir_team;

typedef struct dir_worker {
    dir_team *team;
    uint32_t index;
    plat_thread thread;
} dir_worker;

static void dir_team_work(void *arg, uint32_t index)
{
    dir_team *team = arg;
    while (team->run(team->self, index, &team->errors[index]))
        ;
}

static void dir_team_thread(void *arg)
{
    const dir_worker *worker = arg;
    dir_team_work(worker->team, worker->index);
}

/* Runs on up to n threads, the host's if it gave some, or on fewer: that is slower, not wrong. */
static moe_status dir_team_run(const moe_mem *mem, uint32_t n,
                               bool (*run)(void *self, uint32_t worker, moe_error *error),
                               void *self, moe_error *error)
{
    dir_team team = {.self = self, .run = run};
    dir_worker workers[DIR_MAX_WORKERS];
    n = MOE_MAX(MOE_MIN(n, (uint32_t)DIR_MAX_WORKERS), 1);
    if (mem->host.parallel_for && n > 1) {
        mem->host.parallel_for(mem->host.user, n, dir_team_work, &team);
    } else {
        uint32_t started = 1;
        for (; started < n; started++) {
            workers[started].team = &team;
            workers[started].index = started;
            if (!plat_thread_start(&workers[started].thread, dir_team_thread, &workers[started]))
                break;
        }
        dir_team_work(&team, 0);
        for (uint32_t i = 1; i < started; i++)
            plat_thread_join(&workers[i].thread);
    }
    for (uint32_t i = 0; i < n; i++)
        if (team.errors[i].status) {
            if (error)
                *error = team.errors[i];
            return team.errors[i].status;
        }
    return MOE_OK;
}

/* ------------------------------------------------------------------------------- sources -- */

/* Gives the file back to the system; what was read of it stays. */
static void dir_file_release(dir_file *file)
{
    if (file->is_open)
        plat_close(&file->os);
    file->is_open = false;
}

static void dir_file_close(moe_mem *mem, dir_file *file)
{
    if (file->map)
        plat_unmap(file->map, file->bytes);
    dir_file_release(file);
    mem_free(mem, file->copy);
    mem_free(mem, file->head);
    mem_free(mem, file->path);
    memset(file, 0, sizeof *file);
}

static moe_status dir_file_open_path(moe_mem *mem, dir_file *file, const char *path,
                                     moe_error *error)
{
    uint64_t path_bytes = strlen(path) + 1;
    moe_status status = plat_open(&file->os, path, error);
    if (status)
        return status;
    file->is_open = true;
    file->bytes = file->os.bytes;
    file->path = mem_alloc(mem, path_bytes, 1);
    if (!file->path)
        return fail_memory(error, mem, "path", path_bytes);
    memcpy(file->path, path, path_bytes);
    return MOE_OK;
}

/* Opens what the options name; exactly one source must be set. */
static moe_status dir_file_open(moe_mem *mem, dir_file *file, const moe_model_options *options,
                                moe_error *error)
{
    if ((options->path != NULL) + (options->data != NULL) + (options->read != NULL) != 1)
        return fail(error, MOE_ERR_ARGUMENT, "options",
                    "expected exactly one of path, data and read, got %d",
                    (options->path != NULL) + (options->data != NULL) + (options->read != NULL));
    if (options->path)
        return dir_file_open_path(mem, file, options->path, error);
    file->memory = options->data;
    file->read = options->read;
    file->read_user = options->read_user;
    file->bytes = options->data ? options->data_bytes : options->read_bytes;
    return MOE_OK;
}

/* Reads in steps, so that a cancel is heeded soon also on slow drives. */
static moe_status dir_file_read(const moe_directory *dir, const dir_file *file, uint64_t offset,
                                uint8_t *dst, uint64_t bytes, moe_error *error)
{
    for (uint64_t at = 0; at < bytes;) {
        uint64_t step = MOE_MIN(bytes - at, DIR_READ_STEP_BYTES);
        if (cancelled(dir->cancel))
            return fail(error, MOE_ERR_CANCELLED, file->path, "cancelled while it was being read");
        if (file->memory) {
            memcpy(dst + at, file->memory + offset + at, (size_t)step);
        } else if (file->read) {
            int code = file->read(file->read_user, offset + at, dst + at, (size_t)step);
            if (code)
                return fail(error, MOE_ERR_IO, "read callback",
                            "expected 0 for %llu bytes at offset %llu, got %d",
                            (unsigned long long)step, (unsigned long long)(offset + at), code);
        } else {
            moe_status status =
                plat_read(&file->os, offset + at, dst + at, step, file->path, error);
            if (status)
                return status;
        }
        at += step;
    }
    return MOE_OK;
}

/* Has the file's first `bytes` bytes in file->head. What was there before is gone. */
static moe_status dir_file_read_head(const moe_directory *dir, dir_file *file, uint64_t bytes,
                                     moe_error *error)
{
    mem_free(dir->mem, file->head);
    file->head = mem_alloc_uncleared(dir->mem, bytes, 1);
    if (!file->head)
        return fail_memory(error, dir->mem, "metadata", bytes);
    return dir_file_read(dir, file, 0, file->head, bytes, error);
}

/* MOE_ERR_IO if the file is shorter than it was. */
static moe_status dir_file_check(const dir_file *file, moe_error *error)
{
    uint64_t now;
    if (!file->is_open || (plat_size_now(&file->os, &now) && now >= file->bytes))
        return MOE_OK;
    return fail(error, MOE_ERR_IO, file->path,
                "expected a file of %llu bytes, but it was shortened after it had been opened; "
                "open it again when it is complete",
                (unsigned long long)file->bytes);
}

/* The bytes behind the header; an empty data section may lie past the end. */
static uint64_t dir_file_data_bytes(const dir_file *file)
{
    return file->bytes - MOE_MIN(file->data_start, file->bytes);
}

/* A file's data on its way into memory, in steps that threads take one after another. */
typedef struct dir_copy {
    const moe_directory *dir;
    const dir_file *file;
    uint64_t bytes;
    uint64_t before, total; // of all files: for the progress
    plat_mutex lock;
    /* Under the lock: */
    uint64_t taken, done;
    bool stop;
} dir_copy;

static bool dir_copy_step(void *self, uint32_t worker, moe_error *error)
{
    (void)worker;
    dir_copy *c = self;
    plat_mutex_lock(&c->lock);
    const uint64_t at = c->stop ? c->bytes : c->taken;
    const uint64_t n = MOE_MIN(c->bytes - at, DIR_READ_STEP_BYTES);
    c->taken = at + n;
    plat_mutex_unlock(&c->lock);
    if (n == 0)
        return false;
    const moe_status status = dir_file_read(c->dir, c->file, c->file->data_start + at,
                                            c->file->copy + at, n, error);
    plat_mutex_lock(&c->lock);
    c->stop |= status != MOE_OK;
    c->done += n;
    mem_progress(c->dir->mem, "load", c->before + c->done, c->total);
    plat_mutex_unlock(&c->lock);
    return !status;
}

/* Reads the data section into memory, after `before` of `total` bytes. Threads share it, since the
 * first touch of a page takes as long as its bytes; a callback is called by one. */
static moe_status dir_file_copy(const moe_directory *dir, dir_file *file, uint64_t bytes,
                                uint64_t before, uint64_t total, moe_error *error)
{
    dir_copy c = {.dir = dir, .file = file, .bytes = bytes, .before = before, .total = total};
    const uint64_t n_step = bytes / DIR_READ_STEP_BYTES + 1;
    file->copy = mem_alloc_uncleared(dir->mem, bytes, 1);
    if (!file->copy)
        return fail_memory(error, dir->mem, "weights", bytes);
    plat_large_pages(file->copy, bytes);
    if (!plat_mutex_init(&c.lock))
        return fail(error, MOE_ERR_THREAD, NULL, "cannot make a lock");
    const moe_status status =
        dir_team_run(dir->mem, file->read ? 1 : (uint32_t)MOE_MIN(plat_n_cores(), n_step),
                     dir_copy_step, &c, error);
    plat_mutex_destroy(&c.lock);
    return status;
}

/* Asks for large pages behind maps with experts, which are read here and there: that makes walks of
 * the page tables rare (matrices of 0.9 MB: decode 18 % faster). Not for files that do not fit into
 * memory, which should be read in small pieces, and not for dense models, which are read in order:
 * there it gains nothing, and the first reading from a drive takes 1.5 times as long. */
static void dir_large_pages(const moe_directory *dir)
{
    uint64_t bytes = 0;
    bool experts = false;
    for (uint64_t i = 0; i < dir->tensor.n; i++)
        experts |= directory_tensor_at(dir, (size_t)i)->dims[2] > 1;
    for (uint32_t i = 0; i < dir->n_files; i++)
        bytes += dir->files[i].map ? dir->files[i].bytes : 0;
    for (uint32_t i = 0; experts && bytes <= plat_free_memory() && i < dir->n_files; i++)
        if (dir->files[i].map)
            plat_large_pages((void *)(uintptr_t)dir->files[i].map, dir->files[i].bytes);
}

/* Makes the data of all tensors of all files readable, from the caller's memory, a map or a
 * copy. */
static moe_status dir_load_data(moe_directory *dir, bool copy, moe_error *error)
{
    uint64_t done = 0, total = 0;
    for (uint32_t i = 0; i < dir->n_files; i++)
        if (!checked_add(total, dir_file_data_bytes(&dir->files[i]), &total))
            return fail(error, MOE_ERR_LIMIT, "weights", "expected less than 2^64 bytes");
    for (uint32_t i = 0; i < dir->n_files; i++) {
        dir_file *file = &dir->files[i];
        uint64_t bytes = dir_file_data_bytes(file);
        moe_status status = MOE_OK;
        if (bytes == 0 || (file->memory && !copy))
            continue;
        if (file->path && !copy) {
            status = plat_map(&file->os, &file->map, file->path, error);
            if (!status)
                status = dir_file_check(file, error);
        } else {
            status = dir_file_copy(dir, file, bytes, done, total, error);
            done += bytes;
            dir_file_release(file);
        }
        if (status)
            return status;
    }
    for (uint64_t i = 0; i < dir->tensor.n; i++) {
        moe_tensor *t = (moe_tensor *)(void *)dir->tensor.items + i;
        const dir_file *file = &dir->files[t->file];
        t->data = file->copy ? file->copy + (t->offset - file->data_start)
                  : file->map ? file->map + t->offset
                              : file->memory + t->offset;
    }
    dir_large_pages(dir);
    return MOE_OK;
}

/* --------------------------------------------------------------------------- entry points -- */

MOE_UNUSED static void directory_close(moe_directory *dir)
{
    if (!dir)
        return;
    dir_clear(dir);
    for (uint32_t i = 0; i < dir->n_files; i++)
        dir_file_close(dir->mem, &dir->files[i]);
    mem_free(dir->mem, dir->files);
    mem_free(dir->mem, dir);
}

MOE_UNUSED static moe_status directory_check(const moe_directory *dir, moe_error *error)
{
    moe_status status = MOE_OK;
    for (uint32_t i = 0; i < dir->n_files && !status; i++)
        if (dir->files[i].map)
            status = dir_file_check(&dir->files[i], error);
    return status;
}

MOE_UNUSED static size_t directory_n_meta(const moe_directory *dir)
{
    return (size_t)dir->meta.n;
}

MOE_UNUSED static const moe_meta *directory_meta_at(const moe_directory *dir, size_t index)
{
    return (const moe_meta *)(const void *)dir->meta.items + index;
}

MOE_UNUSED static size_t directory_n_tensors(const moe_directory *dir)
{
    return (size_t)dir->tensor.n;
}

MOE_UNUSED static const moe_tensor *directory_tensor_at(const moe_directory *dir, size_t index)
{
    return (const moe_tensor *)(const void *)dir->tensor.items + index;
}

MOE_UNUSED static const moe_meta *directory_meta(const moe_directory *dir, const char *key)
{
    return dir_table_find(&dir->meta, key);
}

MOE_UNUSED static const moe_tensor *directory_tensor(const moe_directory *dir, const char *name)
{
    return dir_table_find(&dir->tensor, name);
}

/* -------------------------------------------------------------------------- typed reading -- */

/* By moe_meta_type. Bytes of 0: not of a fixed size. */
static const struct {
    const char *name;
    uint8_t bytes;
    bool is_integer, is_number;
} meta_types[META_N_TYPES] = {
    [META_U8] = {"u8", 1, true, true},       [META_I8] = {"i8", 1, true, true},
    [META_U16] = {"u16", 2, true, true},     [META_I16] = {"i16", 2, true, true},
    [META_U32] = {"u32", 4, true, true},     [META_I32] = {"i32", 4, true, true},
    [META_F32] = {"f32", 4, false, true},    [META_BOOL] = {"bool", 1, false, false},
    [META_STRING] = {"string", 0, false, false}, [META_ARRAY] = {"array", 0, false, false},
    [META_U64] = {"u64", 8, true, true},     [META_I64] = {"i64", 8, true, true},
    [META_F64] = {"f64", 8, false, true},
};

static uint64_t meta_load_u64(const uint8_t *p)
{
    uint64_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

static double meta_load_f64(moe_meta_type type, const uint8_t *p)
{
    union {
        uint8_t u8; int8_t i8; uint16_t u16; int16_t i16; uint32_t u32; int32_t i32;
        float f32; uint64_t u64; int64_t i64; double f64;
    } v = {0};
    memcpy(&v, p, meta_types[type].bytes);
    switch (type) {
    case META_U8: case META_BOOL: return v.u8;
    case META_I8: return v.i8;
    case META_U16: return v.u16;
    case META_I16: return v.i16;
    case META_U32: return v.u32;
    case META_I32: return v.i32;
    case META_F32: return (double)v.f32;
    case META_U64: return (double)v.u64;
    case META_I64: return (double)v.i64;
    case META_F64: return v.f64;
    default: return 0;
    }
}

/* Floats are cut to whole numbers; what does not fit becomes the nearest that does; NaN is 0. */
static int64_t meta_load_i64(moe_meta_type type, const uint8_t *p)
{
    if (type == META_I64 || type == META_U64) {
        uint64_t u = meta_load_u64(p);
        return type == META_U64 && u > INT64_MAX ? INT64_MAX : (int64_t)u;
    }
    double x = meta_load_f64(type, p);
    return x >= 0x1p63    ? INT64_MAX
           : x <= -0x1p63 ? INT64_MIN
           : isnan(x)     ? 0
                          : (int64_t)x;
}

MOE_UNUSED static double meta_item_f64(const moe_meta *meta, uint64_t index)
{
    moe_meta_type type = meta->type == META_ARRAY ? meta->item : meta->type;
    return meta_load_f64(type, meta->data + index * meta_types[type].bytes);
}

MOE_UNUSED static int64_t meta_item_i64(const moe_meta *meta, uint64_t index)
{
    moe_meta_type type = meta->type == META_ARRAY ? meta->item : meta->type;
    return meta_load_i64(type, meta->data + index * meta_types[type].bytes);
}

/* "the string "abc"", "the u32 7", "an array of 3 f32". */
static const char *meta_describe(const moe_meta *meta, char *buf, size_t buf_bytes)
{
    if (meta->type == META_ARRAY)
        snprintf(buf, buf_bytes, "an array of %llu %s", (unsigned long long)meta->n,
                 meta_types[meta->item].name);
    else if (meta->type == META_STRING)
        snprintf(buf, buf_bytes, "the string \"%.*s\"%s", (int)MOE_MIN(meta->strings->bytes, 40),
                 meta->strings->data, meta->strings->bytes > 40 ? "..." : "");
    else if (meta->type == META_U64)
        snprintf(buf, buf_bytes, "the u64 %llu", (unsigned long long)meta_load_u64(meta->data));
    else if (meta_types[meta->type].is_integer)
        snprintf(buf, buf_bytes, "the %s %lld", meta_types[meta->type].name,
                 (long long)meta_item_i64(meta, 0));
    else if (meta->type == META_BOOL)
        snprintf(buf, buf_bytes, "the bool %s", meta_item_i64(meta, 0) ? "true" : "false");
    else
        snprintf(buf, buf_bytes, "the %s %g", meta_types[meta->type].name, meta_item_f64(meta, 0));
    return buf;
}

/* Finds a key. *meta is NULL if there is none and it was not required. */
static moe_status meta_get(const moe_directory *dir, const char *key, bool required,
                           const char *expected, const moe_meta **meta, moe_error *error)
{
    *meta = directory_meta(dir, key);
    if (!*meta && required)
        return fail(error, MOE_ERR_MODEL, key, "expected %s, but the file has no such key",
                    expected);
    return MOE_OK;
}

MOE_UNUSED static moe_status meta_u32_list(const moe_directory *dir, const char *key, bool required,
                                           uint32_t min, uint32_t max, uint32_t *value, size_t n,
                                           moe_error *error)
{
    const moe_meta *meta;
    char got[128];
    moe_status status = meta_get(dir, key, required, "an integer or an array", &meta, error);
    if (status || !meta)
        return status;
    bool is_array = meta->type == META_ARRAY;
    moe_meta_type type = is_array ? meta->item : meta->type;
    if (!meta_types[type].is_integer && !(is_array && type == META_BOOL))
        return fail(error, MOE_ERR_MODEL, key, "expected an integer or an array of them, got %s",
                    meta_describe(meta, got, sizeof got));
    if (is_array && meta->n < n)
        return fail(error, MOE_ERR_MODEL, key, "expected an array of at least %llu items, got %llu",
                    (unsigned long long)n, (unsigned long long)meta->n);
    for (size_t i = 0; i < n; i++) { // all are checked before the first is written
        int64_t x = meta_item_i64(meta, is_array ? i : 0);
        if (x < (int64_t)min || x > (int64_t)max)
            return fail(error, MOE_ERR_MODEL, key,
                        "expected %u to %u, got %lld at index %llu", min, max, (long long)x,
                        (unsigned long long)i);
    }
    for (size_t i = 0; i < n; i++)
        value[i] = (uint32_t)meta_item_i64(meta, is_array ? i : 0);
    return MOE_OK;
}

MOE_UNUSED static moe_status meta_u32(const moe_directory *dir, const char *key, bool required,
                                      uint32_t min, uint32_t max, uint32_t *value,
                                      moe_error *error)
{
    const moe_meta *meta;
    char got[128];
    moe_status status = meta_get(dir, key, required, "an integer", &meta, error);
    if (status || !meta)
        return status;
    int64_t x = 0;
    bool ok = meta_types[meta->type].is_integer;
    if (ok)
        x = meta_item_i64(meta, 0);
    if (!ok || x < (int64_t)min || x > (int64_t)max)
        return fail(error, MOE_ERR_MODEL, key, "expected an integer from %u to %u, got %s", min,
                    max, meta_describe(meta, got, sizeof got));
    *value = (uint32_t)x;
    return MOE_OK;
}

MOE_UNUSED static moe_status meta_f32(const moe_directory *dir, const char *key, bool required,
                                      double min, double max, float *value, moe_error *error)
{
    const moe_meta *meta;
    char got[128];
    moe_status status = meta_get(dir, key, required, "a number", &meta, error);
    if (status || !meta)
        return status;
    double x = meta_types[meta->type].is_number ? meta_item_f64(meta, 0) : NAN;
    if (!(x >= min && x <= max))
        return fail(error, MOE_ERR_MODEL, key, "expected a number from %g to %g, got %s", min, max,
                    meta_describe(meta, got, sizeof got));
    *value = (float)x;
    return MOE_OK;
}

MOE_UNUSED static moe_status meta_bool(const moe_directory *dir, const char *key, bool required,
                                       bool *value, moe_error *error)
{
    const moe_meta *meta;
    char got[128];
    moe_status status = meta_get(dir, key, required, "a bool", &meta, error);
    if (status || !meta)
        return status;
    if (meta->type != META_BOOL)
        return fail(error, MOE_ERR_MODEL, key, "expected a bool, got %s",
                    meta_describe(meta, got, sizeof got));
    *value = meta_item_i64(meta, 0) != 0;
    return MOE_OK;
}

MOE_UNUSED static moe_status meta_string(const moe_directory *dir, const char *key, bool required,
                                         moe_str *value, moe_error *error)
{
    const moe_meta *meta;
    char got[128];
    moe_status status = meta_get(dir, key, required, "a string", &meta, error);
    if (status || !meta)
        return status;
    if (meta->type != META_STRING)
        return fail(error, MOE_ERR_MODEL, key, "expected a string, got %s",
                    meta_describe(meta, got, sizeof got));
    *value = meta->strings[0];
    return MOE_OK;
}

#endif
