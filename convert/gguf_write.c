/* convert/gguf_write.c - the result as a GGUF file: a header, then tensors at known places, written
 * in any order by any thread. The file has another name until it is whole. */
#ifndef MOE_CONVERT_GGUF_WRITE_C
#define MOE_CONVERT_GGUF_WRITE_C

#include "meta.c"

typedef struct conv_writer {
    char *path, *partial; // malloc'ed
    int fd;
    bool open;
    uint64_t bytes;       // of the whole file
} conv_writer;

static const char *writer_why(int number)
{
    return number == ENOSPC || number == EDQUOT ? "the drive is full"
           : number == EACCES || number == EPERM ? "permission denied"
           : number == ENOENT                    ? "there is no such folder"
           : number == EROFS                     ? "the drive is read-only"
           : number == EFBIG                     ? "the file would be too large for this drive"
                                                 : strerror(number);
}

/* The header, from magic to the data's start; gives the tensors their places. */
static moe_status gguf_make_header(conv_source *s, text_buf *out, uint64_t *file_bytes,
                                   moe_error *error)
{
    uint64_t n = 0, at = 0, header;
    const uint64_t align = s->alignment ? s->alignment : 32;
    static const char zeros[64];
    meta_writer w = {out, &n, false};
    meta_bytes(&w, "GGUF", 4);
    meta_number(&w, 3, 4);
    meta_number(&w, s->n_tensors, 8);
    meta_number(&w, s->n_kv, 8);
    meta_bytes(&w, s->kv.data, s->kv.n);
    for (size_t i = 0; i < s->n_tensors; i++) {
        conv_tensor *t = &s->tensors[i];
        if (t->part_types)
            return fail(error, MOE_ERR_ARGUMENT, t->name,
                        "expected one type for all experts, which is all that GGUF knows, got "
                        "several; write a .moe file or use --quant");
        if (t->target->id >= QUANT_OWN_ID)
            return fail(error, MOE_ERR_ARGUMENT, t->name,
                        "expected a type that GGUF has, such as Q4_K, got %s, which only .moe "
                        "files have; write OUT.moe or choose another type", t->target->name);
        meta_text(&w, t->name, strlen(t->name));
        meta_number(&w, t->n_dims, 4);
        for (uint32_t d = 0; d < t->n_dims; d++)
            meta_number(&w, t->dims[d], 8);
        meta_number(&w, t->target->id, 4);
        meta_number(&w, at, 8);
        t->offset = at;
        if (!checked_add(at, t->bytes, &at) || !checked_align(at, align, &at))
            return fail(error, MOE_ERR_LIMIT, t->name, "expected a file below 2^64 bytes");
    }
    header = align_up(out->n, align);
    while (out->n < header && !w.failed)
        meta_bytes(&w, zeros, (size_t)MOE_MIN(header - out->n, sizeof zeros));
    for (size_t i = 0; i < s->n_tensors; i++)
        s->tensors[i].offset += header;
    *file_bytes = header + at;
    return w.failed ? fail_memory(error, s->mem, "metadata", out->n) : MOE_OK;
}

static moe_status writer_put(const conv_writer *w, const void *data, uint64_t bytes,
                             uint64_t offset, moe_error *error)
{
    const char *p = data;
    while (bytes) {
        const size_t some = (size_t)MOE_MIN(bytes, (uint64_t)1 << 30);
        const ssize_t n = pwrite(w->fd, p, some, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return fail(error, MOE_ERR_IO, w->partial, "cannot write: %s",
                        n < 0 ? writer_why(errno) : "nothing was written");
        p += n;
        offset += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return MOE_OK;
}

/* Gives the file its final size, so that a drive that is too small is known at once. */
static moe_status writer_reserve(conv_writer *w, uint64_t bytes, moe_error *error)
{
    w->bytes = bytes;
#ifdef __linux__ // other systems find out later
    if (bytes && fallocate(w->fd, 0, 0, (off_t)bytes) != 0 &&
        (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
        return fail(error, MOE_ERR_IO, w->partial, "cannot make room for %llu bytes: %s",
                    (unsigned long long)bytes, writer_why(errno));
#endif
    if (ftruncate(w->fd, (off_t)bytes) != 0)
        return fail(error, MOE_ERR_IO, w->partial, "cannot make it %llu bytes long: %s",
                    (unsigned long long)bytes, writer_why(errno));
    return MOE_OK;
}

/* Opens PATH.partial, with what an earlier run has left in it. */
static moe_status writer_open(conv_writer *w, const char *path, moe_error *error)
{
    const size_t n = strlen(path) + sizeof ".partial";
    w->path = malloc(n);
    w->partial = malloc(n);
    if (!w->path || !w->partial)
        return fail(error, MOE_ERR_MEMORY, path, "cannot allocate %zu bytes", n);
    snprintf(w->path, n, "%s", path);
    snprintf(w->partial, n, "%s.partial", path);
    w->fd = open(w->partial, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (w->fd < 0)
        return fail(error, MOE_ERR_IO, w->partial, "cannot create it: %s", writer_why(errno));
    w->open = true;
    return MOE_OK;
}

/* Empties the file, then gives it its final size. */
static moe_status writer_begin(conv_writer *w, uint64_t bytes, moe_error *error)
{
    if (ftruncate(w->fd, 0) != 0)
        return fail(error, MOE_ERR_IO, w->partial, "cannot empty it: %s", writer_why(errno));
    return writer_reserve(w, bytes, error);
}

/* What was renamed must survive a power failure, too. */
static void writer_sync_folder(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *folder = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup(".");
    const int fd = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(folder);
}

/* Puts the file into its place, or removes it if `status` is a failure; `keep`: leaves it for a run
 * that goes on. */
static moe_status writer_close(conv_writer *w, moe_status status, bool keep, moe_error *error)
{
    if (w->open) {
        if (!status && fsync(w->fd) != 0)
            status = fail(error, MOE_ERR_IO, w->partial, "cannot write: %s", writer_why(errno));
        if (close(w->fd) != 0 && !status)
            status = fail(error, MOE_ERR_IO, w->partial, "cannot write: %s", writer_why(errno));
        if (!status && rename(w->partial, w->path) != 0)
            status = fail(error, MOE_ERR_IO, w->path, "cannot give the file its name: %s",
                          writer_why(errno));
        if (status && !keep)
            unlink(w->partial);
        else if (!status)
            writer_sync_folder(w->path);
    }
    free(w->path);
    free(w->partial);
    return status;
}

#endif
