/* convert/source_hash.c - SHA-256 of the source's files, by a thread of its own, in step with those
 * that encode.
 *
 * A hash wants each file from front to back, encoding wants weights in the order of use. Both read;
 * what the second one reads is still in the system's page cache, and a byte comes from the drive
 * once, as long as the two are near each other. So files are hashed in the order in which encoding
 * comes to them, and whoever is ahead by more than HASH_LEAD bytes waits for the other.
 * Must never: keep the encoders waiting for a hash that has ended or failed. */
#ifndef MOE_CONVERT_SOURCE_HASH_C
#define MOE_CONVERT_SOURCE_HASH_C

#include "sha256.c"

/* Tests set it so low that small models keep both waiting. */
#ifndef MOE_CONVERT_HASH_LEAD
#define MOE_CONVERT_HASH_LEAD (64 << 20)
#endif

enum { HASH_LEAD = MOE_CONVERT_HASH_LEAD, HASH_PIECE = 1 << 16 };

/* Places in the source count over all files, in the order of hashing. */
typedef struct source_hasher {
    const conv_source *source;
    const moe_cancel *cancel;
    char *digits;           // of the files, in their order: 64 each, 72 bytes apart
    uint32_t *order;        // [n_files]: indices of the source's files, as they are hashed
    uint64_t *base;         // [n_files]: where a file begins; UINT64_MAX: not in the order yet
    uint32_t n_order;
    uint64_t bytes;         // of the files in the order
    plat_thread thread;
    bool has_thread, has_lock, has_cond;
    moe_status status;
    moe_error error;
    plat_mutex lock;
    plat_cond changed;
    /* Under the lock: */
    uint64_t hashed;        // bytes
    uint64_t encoded;       // how far the encoders are
    bool over;              // there is nothing to wait for: the hashes are there, or failed
    bool alone, stop;       // encoding is at its end; or failed
} source_hasher;

static void hasher_add(source_hasher *h, const conv_file *file)
{
    const uint32_t i = (uint32_t)(file - h->source->files);
    if (h->base[i] != UINT64_MAX)
        return;
    h->order[h->n_order++] = i;
    h->base[i] = h->bytes;
    h->bytes += file->bytes;
}

/* Says that a tensor is encoded behind those of the calls before. Returns where it begins;
 * UINT64_MAX: it is made of no file. */
static uint64_t hasher_expect(source_hasher *h, const conv_tensor *t)
{
    uint64_t first = UINT64_MAX;
    for (uint32_t i = 0; i < t->n_inputs; i++) {
        if (!t->inputs[i].file)
            continue;
        hasher_add(h, t->inputs[i].file);
        const uint64_t base = h->base[t->inputs[i].file - h->source->files];
        first = MOE_MIN(first, base + t->inputs[i].offset);
    }
    return first;
}

static moe_status hasher_init(source_hasher *h, conv_source *source, moe_error *error)
{
    *h = (source_hasher){.source = source};
    h->order = arena_alloc(&source->arena, source->n_files, sizeof *h->order);
    h->base = arena_alloc(&source->arena, source->n_files, sizeof *h->base);
    if (!h->order || !h->base)
        return fail_memory(error, source->mem, "hashes", source->n_files * sizeof *h->base);
    for (uint32_t i = 0; i < source->n_files; i++)
        h->base[i] = UINT64_MAX;
    h->has_lock = plat_mutex_init(&h->lock);
    h->has_cond = h->has_lock && plat_cond_init(&h->changed);
    return h->has_cond ? MOE_OK : fail(error, MOE_ERR_THREAD, NULL, "cannot make a lock");
}

static void hasher_close(source_hasher *h)
{
    if (h->has_cond)
        plat_cond_destroy(&h->changed);
    if (h->has_lock)
        plat_mutex_destroy(&h->lock);
}

/* So much is hashed; waits for the encoders. false: stop. */
static bool hasher_advance(source_hasher *h, uint64_t bytes)
{
    plat_mutex_lock(&h->lock);
    h->hashed += bytes;
    if (h->hashed <= h->encoded)
        plat_cond_broadcast(&h->changed);
    while (h->hashed > h->encoded + HASH_LEAD && !h->alone && !h->stop)
        plat_cond_wait(&h->changed, &h->lock);
    const bool go_on = !h->stop;
    plat_mutex_unlock(&h->lock);
    return go_on;
}

static void hasher_work(void *arg)
{
    source_hasher *h = arg;
    uint8_t piece[HASH_PIECE];
    for (uint32_t i = 0; i < h->source->n_files && !h->status; i++) {
        const conv_file *f = &h->source->files[h->order[i]];
        sha256 state;
        sha256_begin(&state);
        for (uint64_t at = 0; at < f->bytes && !h->status; at += HASH_PIECE) {
            const uint64_t n = MOE_MIN(f->bytes - at, HASH_PIECE);
            if (cancelled(h->cancel) || !hasher_advance(h, n))
                h->status = fail(&h->error, MOE_ERR_CANCELLED, NULL, "cancelled");
            else
                h->status = plat_read(&f->os, at, piece, n, f->path, &h->error);
            if (!h->status)
                sha256_add(&state, piece, (size_t)n);
        }
        if (!h->status)
            sha256_end(&state, h->digits + h->order[i] * (64 + sizeof(uint64_t)));
    }
    plat_mutex_lock(&h->lock);
    h->over = true;
    plat_cond_broadcast(&h->changed);
    plat_mutex_unlock(&h->lock);
}

/* Files without weights come last. Without a thread all are hashed at the end. */
static void hasher_start(source_hasher *h, char *digits, const moe_cancel *cancel)
{
    for (uint32_t i = 0; i < h->source->n_files; i++)
        hasher_add(h, &h->source->files[i]);
    h->digits = digits;
    h->cancel = cancel;
    h->has_thread = plat_thread_start(&h->thread, hasher_work, h);
    if (!h->has_thread)
        h->over = true; // it is not to be waited for
}

/* The encoders are at place `from` at least, and some more rows of a tensor are encoded: waits for
 * the hash. */
static void hasher_follow(source_hasher *h, uint64_t from, const conv_tensor *t, uint64_t n_rows)
{
    const moe_quant *type = t->made ? NULL : t->inputs->type;
    const uint64_t row_bytes = type ? t->row_len / type->block_len * type->block_bytes : t->row_len;
    plat_mutex_lock(&h->lock);
    if (from != UINT64_MAX)
        h->encoded = MOE_MAX(h->encoded, from) + n_rows * row_bytes;
    plat_cond_broadcast(&h->changed);
    while (h->encoded > h->hashed + HASH_LEAD && !h->over)
        plat_cond_wait(&h->changed, &h->lock);
    plat_mutex_unlock(&h->lock);
}

/* Waits for the hashes; or, after a failure of the encoders, for their end. */
static moe_status hasher_finish(source_hasher *h, bool failed, moe_error *error)
{
    plat_mutex_lock(&h->lock);
    h->alone = true;
    h->stop = failed;
    plat_cond_broadcast(&h->changed);
    plat_mutex_unlock(&h->lock);
    if (h->has_thread)
        plat_thread_join(&h->thread);
    else if (!failed)
        hasher_work(h);
    if (h->status && error)
        *error = h->error;
    return h->status;
}

#endif
