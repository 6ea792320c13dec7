/* tests/fenced_backend.h - a backend whose memory the host cannot touch.
 *
 * It stands in for a device with memory of its own. Every buffer is a copy in pages that are
 * PROT_NONE except while this backend itself runs and uses it, with a guard page behind it; layers
 * that reach around the seam crash. Fresh buffers hold NaN, weights can never be written, and
 * operations are only run at submit(), so nothing works by accident. What is recorded is checked
 * against the promises of backends/backend.h: views inside their buffers, aligned, not overlapping
 * where they must not, sizes within the queue's options; submit() reports the first breach.
 *
 * The arithmetic is not its subject: operations are run by the CPU backend, over the same pages.
 *
 * moe_device, moe_queue and moe_buffer are the CPU backend's structs in this translation unit; ours
 * have other names and are cast, as each backend alone knows what is behind these pointers. */
#ifndef MOE_TESTS_FENCED_BACKEND_H
#define MOE_TESTS_FENCED_BACKEND_H

#include <sys/mman.h>
#include <unistd.h>

#include "../backends/backend.h"

typedef struct fenced_device fenced_device;

typedef struct fenced_buffer {
    fenced_device *device; // NULL once freed
    uint32_t n_open;       // queues that are using it now; protected by the device's mutex
    moe_buffer *inner;     // the same pages, as the CPU backend sees them
    uint8_t *map;          // whole pages, then one that is never accessible
    uint64_t map_bytes;    // without the guard page
    uint8_t *memory;       // ends where the guard page starts, up to the alignment of 64
    uint64_t bytes;
    bool read_only;
} fenced_buffer;

struct fenced_device {
    const moe_backend *cpu;
    moe_device *inner;
    moe_mem *mem;
    plat_mutex mutex;
};

typedef enum fenced_kind {
    FENCED_EMBED, FENCED_NORM, FENCED_MATMUL, FENCED_ROPE, FENCED_STORE, FENCED_ATTEND,
    FENCED_HEADS, FENCED_CONV, FENCED_GATES, FENCED_DELTA, FENCED_COPY, FENCED_GLU, FENCED_ADD,
    FENCED_SOFTCAP, FENCED_ROUTE, FENCED_EXPERTS, FENCED_COMBINE
} fenced_kind;

/* An operation in the CPU backend's terms, with copies of what it points to. */
typedef struct fenced_op {
    fenced_kind kind;
    union {
        moe_embed_op embed;
        moe_norm_op norm;
        moe_matmul_op matmul;
        moe_rope_op rope;
        moe_store_op store;
        moe_attend_op attend;
        moe_heads_op heads;
        moe_conv_op conv;
        moe_gates_op gates;
        moe_delta_op delta;
        moe_copy_op copy;
        moe_glu_op glu;
        moe_add_op add;
        moe_softcap_op softcap;
        moe_route_op route;
        moe_experts_op experts;
        moe_combine_op combine;
    } as;
    moe_weight weight[MOE_MATMUL_MAX];
    moe_cache cache[2];
} fenced_op;

enum {
    FENCED_N_OPS = 149,        // odd, so that a full queue is flushed at changing places
    FENCED_N_MATRICES = 1024,  // of stacks whose matrices stand apart
    FENCED_N_USED = 8 * FENCED_N_OPS + FENCED_N_MATRICES // buffers that all those may name
};

typedef struct fenced_queue {
    fenced_device *device;
    moe_queue *inner;
    moe_queue_options options;
    moe_status status;     // of what was recorded since the last submit
    moe_error error;
    uint32_t n_ops, n_used, n_matrices;
    uint64_t n_runs;       // operations run so far, for the tests
    fenced_op ops[FENCED_N_OPS];
    moe_matrix matrices[FENCED_N_MATRICES];
    fenced_buffer *used[FENCED_N_USED]; // what the recorded operations name, each once
} fenced_queue;

/* ---------------------------------------------------------------------------------- fence -- */

static bool fenced_protect(const fenced_buffer *b, bool open)
{
    int access = !open ? PROT_NONE : b->read_only ? PROT_READ : PROT_READ | PROT_WRITE;
    return mprotect(b->map, (size_t)b->map_bytes, access) == 0;
}

/* Opens buffers, or shuts those that no other queue is using. */
static void fenced_open(fenced_device *d, fenced_buffer *const *buffers, uint32_t n)
{
    plat_mutex_lock(&d->mutex);
    for (uint32_t i = 0; i < n; i++)
        if (buffers[i]->n_open++ == 0)
            fenced_protect(buffers[i], true);
    plat_mutex_unlock(&d->mutex);
}

static void fenced_shut(fenced_device *d, fenced_buffer *const *buffers, uint32_t n)
{
    plat_mutex_lock(&d->mutex);
    for (uint32_t i = 0; i < n; i++)
        if (--buffers[i]->n_open == 0)
            fenced_protect(buffers[i], false);
    plat_mutex_unlock(&d->mutex);
}

/* -------------------------------------------------------------------------------- buffers -- */

static void fenced_buffer_free(moe_device *device, moe_buffer *buffer)
{
    fenced_device *d = (fenced_device *)device;
    fenced_buffer *b = (fenced_buffer *)buffer;
    if (!b)
        return;
    if (b->inner)
        d->cpu->buffer_free(d->inner, b->inner);
    if (b->map) {
        munmap(b->map, (size_t)b->map_bytes + (size_t)sysconf(_SC_PAGESIZE));
        atomic_fetch_sub(&d->mem->used_bytes, b->map_bytes);
    }
    b->device = NULL;
    mem_free(d->mem, b);
}

/* content NULL: fresh, full of NaN. */
static moe_status fenced_buffer_make(fenced_device *d, const void *content, uint64_t bytes,
                                     moe_buffer **out, moe_error *error)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    *out = NULL;
    fenced_buffer *b = mem_alloc(d->mem, 1, sizeof *b);
    if (!b)
        return fail_memory(error, d->mem, "buffer", sizeof *b);
    uint64_t map_bytes;
    if (!checked_align(bytes ? bytes : 1, page, &map_bytes) || !mem_reserve(d->mem, map_bytes)) {
        mem_free(d->mem, b);
        return fail_memory(error, d->mem, "buffer", bytes);
    }
    void *map = mmap(NULL, (size_t)(map_bytes + page), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                     0);
    if (map == MAP_FAILED) {
        atomic_fetch_sub(&d->mem->used_bytes, map_bytes);
        mem_free(d->mem, b);
        return fail_memory(error, d->mem, "buffer", bytes);
    }
    *b = (fenced_buffer){.device = d, .map = map, .map_bytes = map_bytes, .bytes = bytes};
    b->memory = b->map + map_bytes - align_up(bytes, 64);
    if (!fenced_protect(b, true)) {
        fenced_buffer_free((moe_device *)d, (moe_buffer *)b);
        return fail(error, MOE_ERR_BACKEND, "buffer", "expected mprotect to work");
    }
    if (content)
        memcpy(b->memory, content, (size_t)bytes);
    else
        memset(b->map, 0xff, (size_t)map_bytes);
    b->read_only = content != NULL;
    moe_status status = d->cpu->buffer_wrap(d->inner, b->memory, bytes, &b->inner, error);
    if (status) {
        fenced_buffer_free((moe_device *)d, (moe_buffer *)b);
        return status;
    }
    fenced_protect(b, false);
    *out = (moe_buffer *)b;
    return MOE_OK;
}

static moe_status fenced_buffer_new(moe_device *device, uint64_t bytes, moe_buffer **out,
                                    moe_error *error)
{
    return fenced_buffer_make((fenced_device *)device, NULL, bytes, out, error);
}

static moe_status fenced_buffer_wrap(moe_device *device, const void *host, uint64_t bytes,
                                     moe_buffer **out, moe_error *error)
{
    return fenced_buffer_make((fenced_device *)device, host, bytes, out, error);
}

/* --------------------------------------------------------------------------------- device -- */

static void fenced_device_close(moe_device *device)
{
    fenced_device *d = (fenced_device *)device;
    if (!d)
        return;
    if (d->inner)
        d->cpu->device_close(d->inner);
    plat_mutex_destroy(&d->mutex);
    mem_free(d->mem, d);
}

static moe_status fenced_device_open(moe_device **out, const moe_device_options *options,
                                     moe_error *error)
{
    *out = NULL;
    fenced_device *d = mem_alloc(options->mem, 1, sizeof *d);
    if (!d)
        return fail_memory(error, options->mem, "device", sizeof *d);
    d->cpu = backend_cpu();
    d->mem = options->mem;
    if (!plat_mutex_init(&d->mutex)) {
        mem_free(options->mem, d);
        return fail(error, MOE_ERR_THREAD, "device", "cannot make a mutex");
    }
    moe_status status = d->cpu->device_open(&d->inner, options, error);
    if (status)
        fenced_device_close((moe_device *)d);
    else
        *out = (moe_device *)d;
    return status;
}

static const char *fenced_device_name(const moe_device *device)
{
    (void)device;
    return "fenced memory";
}

/* --------------------------------------------------------------------------------- checks -- */

static bool fenced_fault(fenced_queue *q, const char *op, const char *what, uint64_t expected,
                         uint64_t got)
{
    if (!q->status)
        q->status = fail(&q->error, MOE_ERR_BACKEND, op, "%s: expected at most %llu, got %llu",
                         what, (unsigned long long)expected, (unsigned long long)got);
    return false;
}

static bool fenced_at_most(fenced_queue *q, const char *op, const char *what, uint64_t got,
                           uint64_t limit)
{
    return got <= limit || fenced_fault(q, op, what, limit, got);
}

typedef enum fenced_use {
    FENCED_READ,
    FENCED_WRITE,
    FENCED_MAYBE // reads; may be absent
} fenced_use;

/* Checks that `count` items of `item_bytes` at the view are there, and turns the view into the CPU
 * backend's. */
static bool fenced_view(fenced_queue *q, const char *op, const char *what, moe_view *view,
                        uint64_t count, uint64_t item_bytes, fenced_use use)
{
    fenced_buffer *b = (fenced_buffer *)view->buffer;
    uint64_t bytes, end;
    if (!b && use == FENCED_MAYBE)
        return true;
    if (!b || b->device != q->device)
        return fenced_fault(q, op, what, 0, 1); // no buffer, or one of another device
    if (use == FENCED_WRITE && b->read_only)
        return fenced_fault(q, op, "bytes written to weights", 0, count * item_bytes);
    if (view->offset % 4)
        return fenced_fault(q, op, "misalignment of a view", 0, view->offset % 4);
    if (!checked_mul(count, item_bytes, &bytes) || !checked_add(view->offset, bytes, &end))
        end = UINT64_MAX;
    if (end > b->bytes)
        return fenced_fault(q, op, what, b->bytes, end);
    uint32_t i = 0;
    while (i < q->n_used && q->used[i] != b)
        i++;
    if (i == FENCED_N_USED)
        return fenced_fault(q, op, "buffers in use", FENCED_N_USED, i + 1);
    q->used[i] = b;
    q->n_used = MOE_MAX(q->n_used, i + 1);
    view->buffer = b->inner;
    return true;
}

/* Whether two ranges of floats have a byte in common. */
static bool fenced_apart(fenced_queue *q, const char *op, moe_view a, uint64_t a_floats, moe_view b,
                         uint64_t b_floats)
{
    bool apart = a.buffer != b.buffer || a.offset + 4 * a_floats <= b.offset ||
                 b.offset + 4 * b_floats <= a.offset;
    return apart || fenced_fault(q, op, "overlap of dst and src", 0, 1);
}

/* The same range, or none in common. */
static bool fenced_same_or_apart(fenced_queue *q, const char *op, moe_view a, moe_view b,
                                 uint64_t floats)
{
    return (a.buffer == b.buffer && a.offset == b.offset) ||
           fenced_apart(q, op, a, floats, b, floats);
}

/* Checked copies of the matrices of a stack that stand apart. */
static bool fenced_matrices(fenced_queue *q, const char *op, moe_weight *place,
                            const uint32_t limit[MOE_ACT_COUNT])
{
    const uint64_t n = place->dims[2], n_in = place->dims[0];
    if (!fenced_at_most(q, op, "matrices", n, FENCED_N_MATRICES - q->n_matrices))
        return false;
    moe_matrix *copy = q->matrices + q->n_matrices;
    memcpy(copy, place->matrices, (size_t)n * sizeof *copy);
    place->matrices = copy;
    q->n_matrices += (uint32_t)n;
    bool sound = true;
    for (uint64_t i = 0; i < n && sound; i++) {
        const moe_quant *quant = copy[i].quant;
        sound = fenced_at_most(q, op, "row length", n_in, limit[quant->act]) &&
                fenced_at_most(q, op, "remainder of a row", n_in % quant->block_len, 0) &&
                fenced_at_most(q, op, "bytes in a row",
                               n_in / quant->block_len * quant->block_bytes, copy[i].row_bytes) &&
                fenced_at_most(q, op, "missing form of activations",
                               ~place->act_mask & 1u << quant->act, 0) &&
                fenced_view(q, op, place->name, &copy[i].data, place->dims[1] * copy[i].row_bytes,
                            1, FENCED_READ);
    }
    place->data = copy[0].data;
    return sound;
}

/* A checked copy of a weight, at *place. limit NULL: its rows meet no packed activations. */
static bool fenced_weight(fenced_queue *q, const char *op, const moe_weight **w, moe_weight *place,
                          const uint32_t limit[MOE_ACT_COUNT])
{
    if (!weight_present(*w) || !(*w)->quant)
        return fenced_fault(q, op, "missing weights", 0, 1);
    *place = **w;
    *w = place;
    if (!fenced_view(q, op, "scale", &place->scale, place->dims[2], 4, FENCED_MAYBE))
        return false;
    if (place->matrices)
        return fenced_at_most(q, op, "matrices that stand apart", strcmp(op, "experts") != 0, 0) &&
               fenced_matrices(q, op, place, limit);
    uint64_t block = place->quant->block_len;
    uint64_t row = place->dims[0] / block * place->quant->block_bytes;
    return fenced_at_most(q, op, "remainder of a row", place->dims[0] % block, 0) &&
           fenced_at_most(q, op, "bytes in a row", row, place->row_bytes) &&
           fenced_at_most(q, op, "bytes in a matrix", place->row_bytes * place->dims[1],
                          place->matrix_bytes) &&
           fenced_at_most(q, op, "row length", place->dims[0],
                          limit ? limit[place->quant->act] : UINT32_MAX) &&
           fenced_view(q, op, place->name ? place->name : "weight", &place->data,
                       (place->dims[2] - 1) * place->matrix_bytes +
                           place->dims[1] * place->row_bytes, 1, FENCED_READ);
}

static bool fenced_cache(fenced_queue *q, const char *op, const moe_cache **c, moe_cache *place,
                         fenced_use use)
{
    *place = **c;
    *c = place;
    return fenced_view(q, op, "cache", &place->data, (uint64_t)place->n_head * place->n_slot,
                       cache_row_bytes(place->type, place->dim), use);
}

static bool fenced_n_tok(fenced_queue *q, const char *op, uint64_t n_tok)
{
    return fenced_at_most(q, op, "n_tok", n_tok, q->options.n_tok_max) &&
           fenced_at_most(q, op, "missing n_tok", n_tok == 0, 0);
}

/* -------------------------------------------------------------------------------- running -- */

static void fenced_run_one(fenced_queue *q, const fenced_op *op)
{
    const moe_backend *cpu = q->device->cpu;
    switch (op->kind) {
    case FENCED_EMBED: cpu->embed(q->inner, &op->as.embed); break;
    case FENCED_NORM: cpu->norm(q->inner, &op->as.norm); break;
    case FENCED_MATMUL: cpu->matmul(q->inner, &op->as.matmul); break;
    case FENCED_ROPE: cpu->rope(q->inner, &op->as.rope); break;
    case FENCED_STORE: cpu->store(q->inner, &op->as.store); break;
    case FENCED_ATTEND: cpu->attend(q->inner, &op->as.attend); break;
    case FENCED_HEADS: cpu->heads(q->inner, &op->as.heads); break;
    case FENCED_CONV: cpu->conv(q->inner, &op->as.conv); break;
    case FENCED_GATES: cpu->gates(q->inner, &op->as.gates); break;
    case FENCED_DELTA: cpu->delta(q->inner, &op->as.delta); break;
    case FENCED_COPY: cpu->copy(q->inner, &op->as.copy); break;
    case FENCED_GLU: cpu->glu(q->inner, &op->as.glu); break;
    case FENCED_ADD: cpu->add(q->inner, &op->as.add); break;
    case FENCED_SOFTCAP: cpu->softcap(q->inner, &op->as.softcap); break;
    case FENCED_ROUTE: cpu->route(q->inner, &op->as.route); break;
    case FENCED_EXPERTS: cpu->experts(q->inner, &op->as.experts); break;
    case FENCED_COMBINE: cpu->combine(q->inner, &op->as.combine); break;
    }
    q->n_runs++;
}

/* Runs what is recorded; what goes wrong is kept for submit(). */
static void fenced_flush(fenced_queue *q)
{
    if (!q->status && q->n_ops) {
        fenced_open(q->device, q->used, q->n_used);
        for (uint32_t i = 0; i < q->n_ops; i++)
            fenced_run_one(q, &q->ops[i]);
        q->status = q->device->cpu->submit(q->inner, &q->error);
        fenced_shut(q->device, q->used, q->n_used);
    }
    q->n_ops = q->n_used = q->n_matrices = 0;
}

static moe_status fenced_submit(moe_queue *queue, moe_error *error)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_flush(q);
    moe_status status = q->status;
    if (status && error)
        *error = q->error;
    q->status = MOE_OK;
    q->error = (moe_error){0};
    return status;
}

static moe_status fenced_write(moe_queue *queue, moe_view dst, const void *src, uint64_t bytes)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_buffer *b = (fenced_buffer *)dst.buffer;
    fenced_flush(q);
    if (!q->status && !fenced_view(q, "write", "dst", &dst, bytes, 1, FENCED_WRITE))
        return q->status;
    if (q->status)
        return q->status;
    q->n_used = 0;
    fenced_open(q->device, &b, 1);
    memcpy(b->memory + dst.offset, src, (size_t)bytes);
    fenced_shut(q->device, &b, 1);
    return MOE_OK;
}

static moe_status fenced_read(moe_queue *queue, moe_view src, void *dst, uint64_t bytes,
                              moe_error *error)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_buffer *b = (fenced_buffer *)src.buffer;
    fenced_flush(q);
    if (!q->status)
        fenced_view(q, "read", "src", &src, bytes, 1, FENCED_READ);
    moe_status status = fenced_submit(queue, error);
    if (status)
        return status;
    fenced_open(q->device, &b, 1);
    memcpy(dst, b->memory + src.offset, (size_t)bytes);
    fenced_shut(q->device, &b, 1);
    return MOE_OK;
}

/* ------------------------------------------------------------------------------ recording -- */

/* A place for one more operation. It counts only once fenced_keep() is told that it is sound. */
static fenced_op *fenced_place(fenced_queue *q, fenced_kind kind)
{
    const uint32_t n_matrices = kind == FENCED_EXPERTS ? 2 * q->options.n_expert_max : 0;
    if (q->n_ops == FENCED_N_OPS || q->n_matrices + n_matrices > FENCED_N_MATRICES)
        fenced_flush(q);
    fenced_op *op = &q->ops[q->n_ops];
    op->kind = kind;
    return op;
}

static void fenced_keep(fenced_queue *q, bool sound)
{
    q->n_ops += sound;
}

static void fenced_embed(moe_queue *queue, const moe_embed_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_op *f = fenced_place(q, FENCED_EMBED);
    moe_embed_op *o = &f->as.embed;
    *o = *op;
    fenced_keep(q, fenced_n_tok(q, "embed", o->n_tok) &&
                       fenced_weight(q, "embed", &o->table, &f->weight[0], NULL) &&
                       fenced_view(q, "embed", "ids", &o->ids, o->n_tok, 4, FENCED_READ) &&
                       fenced_view(q, "embed", "dst", &o->dst, o->n_tok * op->table->dims[0], 4,
                                   FENCED_WRITE));
}

static void fenced_norm(moe_queue *queue, const moe_norm_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_norm_op *o = &fenced_place(q, FENCED_NORM)->as.norm;
    *o = *op;
    uint64_t last = o->n_row ? o->n_row - 1 : 0;
    fenced_keep(
        q, fenced_at_most(q, "norm", "missing n_row", o->n_row == 0, 0) &&
               fenced_at_most(q, "norm", "dim, by the strides", o->dim,
                              last ? MOE_MIN(o->dst_stride, o->src_stride) : UINT32_MAX) &&
               fenced_view(q, "norm", "src", &o->src, last * o->src_stride + o->dim, 4,
                           FENCED_READ) &&
               fenced_view(q, "norm", "dst", &o->dst, last * o->dst_stride + o->dim, 4,
                           FENCED_WRITE) &&
               fenced_view(q, "norm", "weight", &o->weight, o->dim, 4, FENCED_MAYBE));
}

static void fenced_matmul(moe_queue *queue, const moe_matmul_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_op *f = fenced_place(q, FENCED_MATMUL);
    moe_matmul_op *o = &f->as.matmul;
    *o = *op;
    bool sound = fenced_n_tok(q, "matmul", o->n_tok) &&
                 fenced_at_most(q, "matmul", "n_out", o->n_out, MOE_MATMUL_MAX) &&
                 fenced_at_most(q, "matmul", "missing n_out", o->n_out == 0, 0) &&
                 weight_present(op->out[0].w) &&
                 fenced_view(q, "matmul", "src", &o->src,
                             o->n_tok * op->out[0].w->dims[0], 4, FENCED_READ);
    for (uint32_t i = 0; sound && i < o->n_out; i++) {
        const moe_weight *w = op->out[i].w;
        sound = fenced_weight(q, "matmul", &o->out[i].w, &f->weight[i], q->options.rows.matmul) &&
                fenced_at_most(q, "matmul", "row length, by the first matrix", w->dims[0],
                               op->out[0].w->dims[0]) &&
                fenced_at_most(q, "matmul", "matrices", w->dims[2], 1) &&
                fenced_view(q, "matmul", "bias", &o->out[i].bias, w->dims[1], 4, FENCED_MAYBE) &&
                fenced_view(q, "matmul", "dst", &o->out[i].dst, o->n_tok * w->dims[1], 4,
                            FENCED_WRITE) &&
                fenced_apart(q, "matmul", op->out[i].dst, o->n_tok * w->dims[1], op->src,
                             o->n_tok * w->dims[0]);
    }
    fenced_keep(q, sound);
}

static void fenced_rope(moe_queue *queue, const moe_rope_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_rope_op *o = &fenced_place(q, FENCED_ROPE)->as.rope;
    *o = *op;
    fenced_keep(q, fenced_n_tok(q, "rope", o->n_tok) &&
                       fenced_at_most(q, "rope", "odd n_rot", o->n_rot % 2, 0) &&
                       fenced_at_most(q, "rope", "first + n_rot", (uint64_t)o->first + o->n_rot,
                                      o->head_dim) &&
                       fenced_view(q, "rope", "table", &o->table, (uint64_t)o->n_tok * o->n_rot, 4,
                                   FENCED_READ) &&
                       fenced_view(q, "rope", "x", &o->x,
                                   (uint64_t)o->n_tok * o->n_head * o->head_dim, 4, FENCED_WRITE));
}

static void fenced_store(moe_queue *queue, const moe_store_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_op *f = fenced_place(q, FENCED_STORE);
    moe_store_op *o = &f->as.store;
    *o = *op;
    fenced_keep(q, fenced_n_tok(q, "store", o->n_tok) &&
                       fenced_cache(q, "store", &o->cache, &f->cache[0], FENCED_WRITE) &&
                       fenced_at_most(q, "store", "n_tok, by n_slot", o->n_tok,
                                      op->cache->n_slot) &&
                       fenced_view(q, "store", "src", &o->src,
                                   (uint64_t)o->n_tok * op->cache->n_head * op->cache->dim, 4,
                                   FENCED_READ));
}

/* The matrices that make keys and values of latents. */
static bool fenced_expand(fenced_queue *q, moe_attend_op *o, fenced_op *f)
{
    const moe_expand_shape *e = &q->options.expand;
    if (!o->k_b)
        return fenced_at_most(q, "attend", "values without keys", o->v_b != NULL, 0);
    return fenced_weight(q, "attend", &o->k_b, &f->weight[0], NULL) &&
           fenced_weight(q, "attend", &o->v_b, &f->weight[1], NULL) &&
           fenced_at_most(q, "attend", "n_nope", o->k_b->dims[0], e->n_nope) &&
           fenced_at_most(q, "attend", "n_latent", o->k_b->dims[1], e->n_latent) &&
           fenced_at_most(q, "attend", "n_latent, by the keys", o->v_b->dims[0],
                          o->k_b->dims[1]) &&
           fenced_at_most(q, "attend", "n_latent, by the cache", o->k_b->dims[1], o->k->dim) &&
           fenced_at_most(q, "attend", "dim of a key",
                          o->k_b->dims[0] + o->k->dim - o->k_b->dims[1], e->dim_k) &&
           fenced_at_most(q, "attend", "dim of a value", o->v_b->dims[1], e->dim_v) &&
           fenced_at_most(q, "attend", "key/value heads", o->k->n_head, 1) &&
           fenced_at_most(q, "attend", "heads", o->n_head,
                          MOE_MIN(o->k_b->dims[2], o->v_b->dims[2])) &&
           fenced_at_most(q, "attend", "dim", MOE_MAX(e->dim_k, e->dim_v), q->options.dim_max);
}

/* A cache of integers is one of latents, with its values in the keys. */
static bool fenced_int16(fenced_queue *q, const moe_attend_op *o)
{
    if (o->k->type != CACHE_INT16 && o->v->type != CACHE_INT16)
        return true;
    return fenced_at_most(q, "attend", "caches of integers", 1, q->options.int16) &&
           fenced_at_most(q, "attend", "types of caches", 1 + (o->k->type != o->v->type), 1) &&
           fenced_at_most(q, "attend", "places of integers",
                          1 + (o->k->data.buffer != o->v->data.buffer ||
                               o->k->data.offset != o->v->data.offset), 1);
}

static void fenced_attend(moe_queue *queue, const moe_attend_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_op *f = fenced_place(q, FENCED_ATTEND);
    moe_attend_op *o = &f->as.attend;
    *o = *op;
    const uint64_t key = op->k_b ? op->k_b->dims[0] + op->k->dim - op->k_b->dims[1] : op->k->dim;
    const uint64_t value = op->k_b ? op->v_b->dims[1] : op->dim_v ? op->dim_v : op->v->dim;
    uint64_t q_floats = (uint64_t)o->n_tok * o->n_head * key;
    uint64_t dst_floats = (uint64_t)o->n_tok * o->n_head * value;
    uint64_t first = o->window && o->pos >= o->window ? o->pos + 1 - o->window : 0;
    fenced_keep(
        q, fenced_n_tok(q, "attend", o->n_tok) &&
               fenced_cache(q, "attend", &o->k, &f->cache[0], FENCED_READ) &&
               fenced_cache(q, "attend", &o->v, &f->cache[1], FENCED_READ) &&
               fenced_expand(q, o, f) && fenced_int16(q, op) &&
               fenced_at_most(q, "attend", "positions in use", o->pos + o->n_tok - first,
                              MOE_MIN(op->k->n_slot, op->v->n_slot)) &&
               fenced_at_most(q, "attend", "n_head", o->n_head, q->options.n_head_max) &&
               fenced_at_most(q, "attend", "n_slot", MOE_MAX(op->k->n_slot, op->v->n_slot),
                              q->options.n_slot_max) &&
               fenced_at_most(q, "attend", "dim", MOE_MAX(op->k->dim, op->v->dim),
                              q->options.dim_max) &&
               fenced_at_most(q, "attend", "dim_v", op->dim_v, op->v->dim) &&
               fenced_at_most(q, "attend", "remainder of heads", o->n_head % op->k->n_head, 0) &&
               fenced_view(q, "attend", "sink", &o->sink, o->n_head, 4, FENCED_MAYBE) &&
               fenced_view(q, "attend", "q", &o->q, q_floats, 4, FENCED_READ) &&
               fenced_view(q, "attend", "dst", &o->dst, dst_floats, 4, FENCED_WRITE) &&
               fenced_apart(q, "attend", op->dst, dst_floats, op->q, q_floats));
}

/* The last row of n, each `stride` floats behind the one before, ends here. */
static uint64_t fenced_span(uint64_t n, uint64_t stride, uint64_t dim)
{
    return n ? (n - 1) * stride + dim : 0;
}

static void fenced_heads(moe_queue *queue, const moe_heads_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_op *f = fenced_place(q, FENCED_HEADS);
    moe_heads_op *o = &f->as.heads;
    *o = *op;
    uint64_t n_row = weight_present(op->w) ? o->n_tok * op->w->dims[2] : 0;
    uint64_t src = n_row ? fenced_span(n_row, o->src_stride, op->w->dims[0]) : 0;
    uint64_t dst = n_row ? fenced_span(n_row, o->dst_stride, op->w->dims[1]) : 0;
    fenced_keep(q, fenced_n_tok(q, "heads", o->n_tok) &&
                       fenced_weight(q, "heads", &o->w, &f->weight[0], q->options.rows.heads) &&
                       fenced_at_most(q, "heads", "heads", op->w->dims[2], q->options.n_head_max) &&
                       fenced_at_most(q, "heads", "n_in, by the stride", op->w->dims[0],
                                      o->src_stride) &&
                       fenced_at_most(q, "heads", "n_out, by the stride", op->w->dims[1],
                                      o->dst_stride) &&
                       fenced_view(q, "heads", "src", &o->src, src, 4, FENCED_READ) &&
                       fenced_view(q, "heads", "dst", &o->dst, dst, 4, FENCED_WRITE) &&
                       fenced_apart(q, "heads", op->dst, dst, op->src, src));
}

/* A state that is read, unless it is absent, and written. */
static bool fenced_state(fenced_queue *q, const char *op, moe_view *before, moe_view *after,
                         uint64_t floats)
{
    const moe_view was_before = *before, was_after = *after;
    return fenced_view(q, op, "before", before, floats, 4, FENCED_MAYBE) &&
           fenced_view(q, op, "after", after, floats, 4, FENCED_WRITE) &&
           fenced_same_or_apart(q, op, was_after, was_before, floats);
}

static void fenced_conv(moe_queue *queue, const moe_conv_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_conv_op *o = &fenced_place(q, FENCED_CONV)->as.conv;
    *o = *op;
    const uint64_t n = (uint64_t)o->n_tok * o->dim;
    const uint64_t src = fenced_span(o->n_tok, o->src_stride, o->dim);
    fenced_keep(q, fenced_n_tok(q, "conv", o->n_tok) &&
                       fenced_at_most(q, "conv", "n_tap", o->n_tap, MOE_CONV_MAX_TAP) &&
                       fenced_at_most(q, "conv", "missing n_tap", o->n_tap == 0, 0) &&
                       fenced_at_most(q, "conv", "dim, by the stride", o->dim, o->src_stride) &&
                       fenced_at_most(q, "conv", "c beside silu", o->silu && o->c.buffer, 0) &&
                       fenced_view(q, "conv", "weight", &o->weight, (uint64_t)o->dim * o->n_tap, 4,
                                   FENCED_READ) &&
                       fenced_state(q, "conv", &o->before, &o->after,
                                    (uint64_t)(o->n_tap - 1) * o->dim) &&
                       fenced_view(q, "conv", "x", &o->x, src, 4, FENCED_READ) &&
                       fenced_view(q, "conv", "b", &o->b, src, 4, FENCED_MAYBE) &&
                       fenced_view(q, "conv", "c", &o->c, src, 4, FENCED_MAYBE) &&
                       fenced_view(q, "conv", "dst", &o->dst, n, 4, FENCED_WRITE) &&
                       fenced_apart(q, "conv", op->dst, n, op->x, src));
}

static void fenced_gates(moe_queue *queue, const moe_gates_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_gates_op *o = &fenced_place(q, FENCED_GATES)->as.gates;
    *o = *op;
    const uint64_t n = (uint64_t)o->n_tok * o->n_head;
    fenced_keep(q, fenced_n_tok(q, "gates", o->n_tok) &&
                       fenced_view(q, "gates", "a", &o->a, n, 4, FENCED_READ) &&
                       fenced_view(q, "gates", "b", &o->b, n, 4, FENCED_READ) &&
                       fenced_view(q, "gates", "rate", &o->rate, o->n_head, 4, FENCED_READ) &&
                       fenced_view(q, "gates", "bias", &o->bias, o->n_head, 4, FENCED_READ) &&
                       fenced_view(q, "gates", "decay", &o->decay, n, 4, FENCED_WRITE) &&
                       fenced_view(q, "gates", "beta", &o->beta, n, 4, FENCED_WRITE));
}

static void fenced_delta(moe_queue *queue, const moe_delta_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_delta_op *o = &fenced_place(q, FENCED_DELTA)->as.delta;
    *o = *op;
    const uint64_t gates = (uint64_t)o->n_tok * o->n_head, n = gates * o->dim_v;
    const uint64_t keys = (uint64_t)o->n_tok * 2 * o->n_head_k * o->dim_k;
    fenced_keep(q, fenced_n_tok(q, "delta", o->n_tok) &&
                       fenced_at_most(q, "delta", "missing heads", o->n_head_k == 0, 0) &&
                       fenced_at_most(q, "delta", "remainder of heads", o->n_head % o->n_head_k,
                                      0) &&
                       fenced_view(q, "delta", "qk", &o->qk, keys, 4, FENCED_READ) &&
                       fenced_view(q, "delta", "v", &o->v, n, 4, FENCED_READ) &&
                       fenced_view(q, "delta", "decay", &o->decay, gates, 4, FENCED_READ) &&
                       fenced_view(q, "delta", "beta", &o->beta, gates, 4, FENCED_READ) &&
                       fenced_state(q, "delta", &o->before, &o->after,
                                    delta_state_floats(o->n_head, o->dim_k, o->dim_v)) &&
                       fenced_view(q, "delta", "dst", &o->dst, n, 4, FENCED_WRITE) &&
                       fenced_apart(q, "delta", op->dst, n, op->qk, keys) &&
                       fenced_same_or_apart(q, "delta", op->dst, op->v, n));
}

static void fenced_copy(moe_queue *queue, const moe_copy_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_copy_op *o = &fenced_place(q, FENCED_COPY)->as.copy;
    *o = *op;
    uint64_t src = fenced_span(o->n_row, o->src_stride, o->dim);
    uint64_t dst = fenced_span(o->n_row, o->dst_stride, o->dim);
    fenced_keep(q, fenced_at_most(q, "copy", "missing n_row", o->n_row == 0, 0) &&
                       fenced_at_most(q, "copy", "dim, by the strides", o->dim,
                                      MOE_MIN(o->dst_stride, o->src_stride)) &&
                       fenced_view(q, "copy", "src", &o->src, src, 4, FENCED_READ) &&
                       fenced_view(q, "copy", "dst", &o->dst, dst, 4, FENCED_WRITE) &&
                       fenced_apart(q, "copy", op->dst, dst, op->src, src));
}

static void fenced_glu(moe_queue *queue, const moe_glu_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_glu_op *o = &fenced_place(q, FENCED_GLU)->as.glu;
    *o = *op;
    fenced_keep(q, fenced_view(q, "glu", "gate", &o->gate, o->n, 4, FENCED_READ) &&
                       fenced_view(q, "glu", "up", &o->up, o->n, 4, FENCED_READ) &&
                       fenced_view(q, "glu", "dst", &o->dst, o->n, 4, FENCED_WRITE) &&
                       fenced_same_or_apart(q, "glu", op->dst, op->gate, o->n) &&
                       fenced_same_or_apart(q, "glu", op->dst, op->up, o->n));
}

static void fenced_add(moe_queue *queue, const moe_add_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_add_op *o = &fenced_place(q, FENCED_ADD)->as.add;
    *o = *op;
    fenced_keep(q, fenced_view(q, "add", "a", &o->a, o->n, 4, FENCED_MAYBE) &&
                       fenced_view(q, "add", "b", &o->b, o->n, 4, FENCED_READ) &&
                       fenced_view(q, "add", "dst", &o->dst, o->n, 4, FENCED_WRITE) &&
                       fenced_same_or_apart(q, "add", op->dst, op->a, o->n) &&
                       fenced_same_or_apart(q, "add", op->dst, op->b, o->n));
}

static void fenced_softcap(moe_queue *queue, const moe_softcap_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_softcap_op *o = &fenced_place(q, FENCED_SOFTCAP)->as.softcap;
    *o = *op;
    fenced_keep(q, fenced_view(q, "softcap", "x", &o->x, o->n, 4, FENCED_WRITE));
}

static void fenced_route(moe_queue *queue, const moe_route_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_route_op *o = &fenced_place(q, FENCED_ROUTE)->as.route;
    *o = *op;
    uint64_t n_tok = o->n_tok, n_used = o->router.n_used, n_expert = o->router.n_expert;
    fenced_keep(
        q, fenced_n_tok(q, "route", n_tok) &&
               fenced_at_most(q, "route", "n_expert", n_expert, q->options.n_expert_max) &&
               fenced_at_most(q, "route", "n_used", n_used,
                              MOE_MIN(n_expert, q->options.n_used_max)) &&
               fenced_view(q, "route", "logits", &o->logits, n_tok * n_expert, 4, FENCED_READ) &&
               fenced_view(q, "route", "bias", &o->bias, n_expert, 4, FENCED_MAYBE) &&
               fenced_view(q, "route", "factor", &o->factor, n_expert, 4, FENCED_MAYBE) &&
               fenced_view(q, "route", "ids", &o->ids, n_tok * n_used, 4, FENCED_WRITE) &&
               fenced_view(q, "route", "weights", &o->weights, n_tok * n_used, 4, FENCED_WRITE));
}

static void fenced_experts(moe_queue *queue, const moe_experts_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    fenced_op *f = fenced_place(q, FENCED_EXPERTS);
    moe_experts_op *o = &f->as.experts;
    *o = *op;
    uint64_t n_row = (uint64_t)o->n_tok * o->n_used, n_src = o->shared_src ? o->n_tok : n_row;
    bool sound = fenced_n_tok(q, "experts", o->n_tok) &&
                 fenced_at_most(q, "experts", "n_used", o->n_used, q->options.n_used_max) &&
                 fenced_at_most(q, "experts", "n_out", o->n_out, MOE_COUNT(o->out)) &&
                 fenced_at_most(q, "experts", "missing n_out", o->n_out == 0, 0) &&
                 fenced_view(q, "experts", "ids", &o->ids, n_row, 4, FENCED_READ) &&
                 weight_present(op->out[0].w) &&
                 fenced_view(q, "experts", "src", &o->src, n_src * op->out[0].w->dims[0], 4,
                             FENCED_READ);
    for (uint32_t i = 0; sound && i < o->n_out; i++) {
        const moe_weight *w = op->out[i].w;
        sound = fenced_weight(q, "experts", &o->out[i].w, &f->weight[i],
                              q->options.rows.experts) &&
                fenced_at_most(q, "experts", "row length, by the first matrix", w->dims[0],
                               op->out[0].w->dims[0]) &&
                fenced_at_most(q, "experts", "matrices", w->dims[2], q->options.n_expert_max) &&
                fenced_view(q, "experts", "bias", &o->out[i].bias, w->dims[2] * w->dims[1], 4,
                            FENCED_MAYBE) &&
                fenced_view(q, "experts", "dst", &o->out[i].dst, n_row * w->dims[1], 4,
                            FENCED_WRITE) &&
                fenced_apart(q, "experts", op->out[i].dst, n_row * w->dims[1], op->src,
                             n_src * w->dims[0]);
    }
    fenced_keep(q, sound);
}

static void fenced_combine(moe_queue *queue, const moe_combine_op *op)
{
    fenced_queue *q = (fenced_queue *)queue;
    moe_combine_op *o = &fenced_place(q, FENCED_COMBINE)->as.combine;
    *o = *op;
    uint64_t n_row = (uint64_t)o->n_tok * o->n_used;
    fenced_keep(q, fenced_n_tok(q, "combine", o->n_tok) &&
                       fenced_at_most(q, "combine", "n_used", o->n_used, q->options.n_used_max) &&
                       fenced_view(q, "combine", "src", &o->src, n_row * o->dim, 4, FENCED_READ) &&
                       fenced_view(q, "combine", "weights", &o->weights, n_row, 4, FENCED_READ) &&
                       fenced_view(q, "combine", "dst", &o->dst, (uint64_t)o->n_tok * o->dim, 4,
                                   FENCED_WRITE) &&
                       fenced_apart(q, "combine", op->dst, (uint64_t)o->n_tok * o->dim, op->src,
                                    n_row * o->dim));
}

/* ---------------------------------------------------------------------------------- queue -- */

static void fenced_queue_close(moe_queue *queue)
{
    fenced_queue *q = (fenced_queue *)queue;
    if (!q)
        return;
    if (q->inner)
        q->device->cpu->queue_close(q->inner);
    mem_free(q->device->mem, q);
}

static moe_status fenced_queue_open(moe_queue **out, moe_device *device,
                                    const moe_queue_options *options, moe_error *error)
{
    fenced_device *d = (fenced_device *)device;
    *out = NULL;
    fenced_queue *q = mem_alloc(d->mem, 1, sizeof *q);
    if (!q)
        return fail_memory(error, d->mem, "queue", sizeof *q);
    q->device = d;
    q->options = *options;
    moe_status status = d->cpu->queue_open(&q->inner, d->inner, options, error);
    if (status)
        fenced_queue_close((moe_queue *)q);
    else
        *out = (moe_queue *)q;
    return status;
}

static uint64_t fenced_queue_bytes(const moe_device *device, const moe_queue_options *options)
{
    const fenced_device *d = (const fenced_device *)device;
    return align_up(sizeof(fenced_queue) + sizeof(mem_head), MEM_ALIGN) +
           d->cpu->queue_bytes(d->inner, options);
}

MOE_UNUSED static const moe_backend *fenced_backend(void)
{
    static const moe_backend backend = {
        .name = "fenced",
        .device_open = fenced_device_open,
        .device_close = fenced_device_close,
        .device_name = fenced_device_name,
        .buffer_new = fenced_buffer_new,
        .buffer_wrap = fenced_buffer_wrap,
        .buffer_free = fenced_buffer_free,
        .queue_open = fenced_queue_open,
        .queue_close = fenced_queue_close,
        .queue_bytes = fenced_queue_bytes,
        .submit = fenced_submit,
        .write = fenced_write,
        .read = fenced_read,
        .embed = fenced_embed,
        .norm = fenced_norm,
        .matmul = fenced_matmul,
        .rope = fenced_rope,
        .store = fenced_store,
        .attend = fenced_attend,
        .heads = fenced_heads,
        .conv = fenced_conv,
        .gates = fenced_gates,
        .delta = fenced_delta,
        .copy = fenced_copy,
        .glu = fenced_glu,
        .add = fenced_add,
        .softcap = fenced_softcap,
        .route = fenced_route,
        .experts = fenced_experts,
        .combine = fenced_combine,
    };
    return &backend;
}

#endif
