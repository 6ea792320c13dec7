/* convert/moe_size.c - how large a .moe file is going to be.
 *
 * What compression saves is known when it is done. So tasks of the writer, spread evenly over the
 * file, are encoded and compressed as it would, and what was not tried is taken to shrink like what
 * was: the same slice, else those of the same type. A small model is tried as a whole: exact.
 * Must never: depend on the number of threads. */
#ifndef MOE_CONVERT_MOE_SIZE_C
#define MOE_CONVERT_MOE_SIZE_C

#include "moe_write.c"

/* How many weights are tried, at most: for a first look, and to know. */
enum { SIZE_GLANCE = 1 << 24, SIZE_LOOK = 1 << 28 };

/* What was tried of a slice. */
typedef struct size_slice {
    uint64_t n_weights, blocks, packed; // bytes as blocks, and compressed
    uint64_t first_row, first_blocks, first_packed; // of the first segment that was tried
} size_slice;

typedef struct size_state {
    moew_sink *m;
    size_slice *slices;     // [n_slices]
    uint64_t stride;        // of the tasks, this one is tried
} size_state;

static bool size_next(void *self, encode_task *task)
{
    const size_state *s = self;
    do {
        if (!moew_next(s->m, task))
            return false;
    } while (task->number % s->stride || !s->m->slices[task->slice].segment_rows);
    return true;
}

static moe_status size_put(void *self, encode_worker *w, const encode_task *task)
{
    const size_state *s = self;
    size_slice *slice = &s->slices[task->slice];
    const moew_slice *planned = &s->m->slices[task->slice];
    const uint64_t rows = MOE_MIN(planned->segment_rows, task->n_rows);
    if (!w->own && !(w->own = planes_open(w->mem)))
        return fail_memory(&w->error, w->mem, "compressor", MOEFILE_SEGMENT_BYTES);
    moe_status status = moew_pack(s->m, w, task, false);
    if (status)
        return status;
    const planes_packer *p = w->own;
    plat_mutex_lock(&s->m->lock);
    if (!slice->n_weights || task->row < slice->first_row) {
        slice->first_row = task->row;
        slice->first_blocks = rows * planned->row_bytes;
        slice->first_packed = p->sizes[0];
    }
    slice->n_weights += task->n_rows * task->t->row_len;
    slice->blocks += w->blocks.n;
    slice->packed += p->out.n;
    plat_mutex_unlock(&s->m->lock);
    return MOE_OK;
}

/* What a slice would take if it came out as it was asked for. */
static double size_asked(const moew_slice *s)
{
    const double n = (double)s->n_rows * (double)s->t->row_len;
    return tcq_is(s->type) && s->bits > 0 ? s->bits * n / 8
                                          : (double)s->n_rows * (double)s->row_bytes;
}

/* Bytes of slice i on disk, by what was tried of it, or of its type: [quant_table] of asked and
 * got. */
static uint64_t size_of_slice(const size_state *s, uint32_t i, double (*by_type)[2])
{
    const moew_slice *planned = &s->m->slices[i];
    const size_slice *slice = &s->slices[i];
    const uint64_t bytes = planned->n_rows * planned->row_bytes;
    const double *sums = by_type[quant_index(planned->type)];
    if (!planned->segment_rows || s->m->job->options.store == CONV_STORE_RAW)
        return bytes;
    if (!slice->blocks)
        return (uint64_t)(size_asked(planned) * (sums[0] > 0 ? sums[1] / sums[0] : 1));
    if (!moew_pays(s->m, planned->type, slice->first_blocks, slice->first_packed))
        return bytes;
    if (slice->blocks == bytes)
        return slice->packed;
    return (uint64_t)((double)bytes * (double)slice->packed / (double)slice->blocks);
}

/* Sums up the file, and each tensor's part of it. */
static void size_sum(const size_state *s)
{
    const moew_sink *m = s->m;
    conv_job *job = m->job;
    double by_type[MOE_COUNT(quant_table)][2] = {{0}};
    uint64_t at = m->header.data_offset, start = at, n_tried = 0;
    for (size_t i = 0; i < job->source.n_tensors; i++)
        job->source.tensors[i].stored_bytes = 0;
    for (uint32_t i = 0; i < m->n_slices; i++) {
        const moew_slice *slice = &m->slices[i];
        double *sums = by_type[quant_index(slice->type)];
        const uint64_t n = slice->n_rows * slice->t->row_len;
        n_tried += slice->segment_rows ? s->slices[i].n_weights : n;
        if (!s->slices[i].blocks)
            continue;
        const double part = (double)s->slices[i].n_weights / (double)n;
        sums[0] += part * size_asked(slice);
        sums[1] += part * (double)size_of_slice(s, i, by_type);
    }
    for (uint32_t i = 0, record = UINT32_MAX; i < m->n_slices; i++) {
        const moew_slice *slice = &m->slices[i];
        const uint64_t bytes = size_of_slice(s, i, by_type);
        const bool raw = bytes == slice->n_rows * slice->row_bytes;
        if (slice->record != record)
            at = start = moew_record_start(at, raw, bytes);
        record = slice->record;
        at = start + moefile_slice_start(at - start, raw ? MOEFILE_RAW : MOEFILE_PLANES) + bytes;
        job->source.tensors[m->tables[i].tensor].stored_bytes += bytes;
    }
    job->file_bytes = at;
    job->sampled = job->options.store != CONV_STORE_RAW && job->n_weights
                       ? (double)n_tried / (double)job->n_weights : 1;
}

/* The sizes of the file that is planned, and of its tensors on disk, from about so many weights. */
static moe_status size_measure(conv_job *job, uint64_t most, moe_error *error)
{
    moew_sink m;
    size_state s = {.m = &m};
    const uint64_t n_weights = job->n_weights;
    moe_status status = moew_open(&m, job, error);
    if (!status && !(m.has_lock = plat_mutex_init(&m.lock)))
        status = fail(error, MOE_ERR_THREAD, NULL, "cannot make a lock");
    s.slices = status ? NULL : mem_alloc(&job->mem, m.n_slices, sizeof *s.slices);
    if (!status && !s.slices)
        status = fail_memory(error, &job->mem, "sizes", m.n_slices * sizeof *s.slices);
    s.stride = n_weights / most + 1;
    if (!status && job->options.store != CONV_STORE_RAW) {
        const encode_sink sink = {.self = &s, .next = size_next, .put = size_put,
                                  .leave = moew_leave};
        job->n_weights = n_weights / s.stride;
        status = encode_all(job, &sink, 0, error);
        job->n_weights = n_weights;
    }
    if (!status)
        size_sum(&s);
    mem_free(&job->mem, s.slices);
    moew_close(&m);
    return status;
}

#endif
