/* convert/files.c - files of the source: opened once, read at offsets, compared at the end with
 * what they were. */
#ifndef MOE_CONVERT_FILES_C
#define MOE_CONVERT_FILES_C

#include "convert.h"

static char *conv_text(conv_source *s, const char *format, ...) MOE_PRINTF(2, 3);
static char *conv_text(conv_source *s, const char *format, ...)
{
    char text[4096];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    n = n < 0 ? 0 : n >= (int)sizeof text ? (int)sizeof text - 1 : n;
    return arena_copy(&s->arena, text, (uint64_t)n, 1);
}

/* Something the user should know; the result is good all the same. */
#define conv_note(s, ...)                                                                          \
    do {                                                                                           \
        if ((s)->n_notes < MOE_COUNT((s)->notes)) {                                                \
            char *note_ = conv_text(s, __VA_ARGS__);                                               \
            if (note_) {                                                                           \
                text_clean(note_);                                                                 \
                (s)->notes[(s)->n_notes++] = note_;                                                \
            }                                                                                      \
        }                                                                                          \
    } while (0)

static bool file_same(const conv_file *file, const struct stat *info)
{
    return (uint64_t)info->st_size == file->bytes && (uint64_t)info->st_ino == file->inode &&
           (int64_t)info->st_mtim.tv_sec == file->mtime_s &&
           (int64_t)info->st_mtim.tv_nsec == file->mtime_ns;
}

static moe_status conv_file_open(conv_source *s, const char *path, conv_file **out,
                                 moe_error *error)
{
    struct stat info;
    if (s->n_files == CONVERT_MAX_FILES)
        return fail(error, MOE_ERR_LIMIT, path, "expected at most %d files", CONVERT_MAX_FILES);
    conv_file *file = &s->files[s->n_files];
    if (!(file->path = arena_copy(&s->arena, path, strlen(path), 1)))
        return fail_memory(error, s->mem, path, strlen(path));
    moe_status status = plat_open(&file->os, path, error);
    if (status)
        return status;
    s->n_files++;
    if (fstat((int)file->os.handle, &info) != 0)
        return fail(error, MOE_ERR_IO, path, "cannot ask for its size");
    file->bytes = file->os.bytes = (uint64_t)info.st_size;
    file->inode = (uint64_t)info.st_ino;
    file->device = (uint64_t)info.st_dev;
    file->mtime_s = (int64_t)info.st_mtim.tv_sec;
    file->mtime_ns = (int64_t)info.st_mtim.tv_nsec;
    *out = file;
    return MOE_OK;
}

/* MOE_ERR_IO if a file is not what it was when it was opened. */
static moe_status conv_files_check(const conv_source *s, moe_error *error)
{
    for (uint32_t i = 0; i < s->n_files; i++) {
        struct stat info;
        if (stat(s->files[i].path, &info) != 0 || !file_same(&s->files[i], &info))
            return fail(error, MOE_ERR_IO, s->files[i].path,
                        "expected the file to stay as it was, but it was changed during the "
                        "conversion; convert again when it is complete");
    }
    return MOE_OK;
}

/* A whole small file, in the arena. *text is NULL if there is none and it was not required. */
static moe_status conv_read_text(conv_source *s, const char *dir, const char *name, bool required,
                                 char **text, uint64_t *bytes, moe_error *error)
{
    struct stat info;
    *text = NULL;
    *bytes = 0;
    const char *path = conv_text(s, "%s/%s", dir, name);
    if (!path)
        return fail_memory(error, s->mem, name, strlen(dir));
    if (!required && stat(path, &info) != 0 && errno == ENOENT)
        return MOE_OK;
    conv_file *file;
    moe_status status = conv_file_open(s, path, &file, error);
    if (status)
        return status;
    if (file->bytes > JSON_MAX_BYTES)
        return fail(error, MOE_ERR_LIMIT, path, "expected at most %d bytes, got %llu",
                    JSON_MAX_BYTES, (unsigned long long)file->bytes);
    char *data = arena_alloc(&s->arena, file->bytes + 1, 1);
    if (!data)
        return fail_memory(error, s->mem, path, file->bytes);
    status = plat_read(&file->os, 0, data, file->bytes, path, error);
    *text = data;
    *bytes = file->bytes;
    return status;
}

/* The same as a JSON object. root.node is NULL, and *doc holds nothing, if there is no such file or
 * it is refused. */
static moe_status conv_read_json(conv_source *s, const char *dir, const char *name, bool required,
                                 json_doc *doc, json_ref *root, moe_error *error)
{
    char *text;
    uint64_t bytes;
    *root = (json_ref){doc, NULL};
    moe_status status = conv_read_text(s, dir, name, required, &text, &bytes, error);
    if (status || !text)
        return status;
    status = json_parse(doc, text, bytes, &s->arena, name, error);
    if (status)
        return status;
    const json_ref top = {doc, doc->nodes};
    if (json_typeof(top) != JSON_OBJECT) {
        json_free(doc);
        return fail(error, MOE_ERR_FORMAT, name, "expected a JSON object, got another value");
    }
    *root = top;
    return MOE_OK;
}

#endif
