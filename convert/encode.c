/* convert/encode.c - rows from their places in the source to blocks in the result, on all cores.
 *
 * The work is cut into chunks: some rows of one tensor, about 4 MB as floats. A thread takes the next
 * chunk, reads its rows, turns them into floats, checks them, quantizes them and writes the blocks to
 * their final place. Threads share only the cursor, so memory is a few MB for each of them, whatever
 * the size of the model. Where nothing has to change, bytes are copied.
 * Must never: write a number that is not finite, unless asked to. */
#ifndef MOE_CONVERT_ENCODE_C
#define MOE_CONVERT_ENCODE_C

#include "encoders.h"
#include "gguf_write.c"
#include "plan.c"

/* What all threads share. */
typedef struct encode_state {
    const conv_source *source;
    const conv_options *options;
    const conv_writer *writer;
    uint64_t total;         // weights
    float fp8[256];         // the value of each code
    plat_mutex lock;
    /* Under the lock: */
    size_t tensor;          // the cursor
    uint64_t row;
    uint64_t done;          // weights
    moe_status status;      // the first failure
    moe_error error;
} encode_state;

/* One thread's buffers, which grow as chunks need it. */
typedef struct encode_worker {
    encode_state *state;
    bool first;             // reports progress
    moe_mem *mem;
    text_buf raw, blocks, scales;
    text_buf floats;
    moe_error error;
} encode_worker;

/* Rows of one input of a tensor. */
typedef struct encode_chunk {
    const conv_tensor *t;
    const conv_input *in;   // NULL: t->made
    uint64_t row;           // first, in the tensor
    uint64_t in_row;        // first, in the input
    uint64_t n_rows;
} encode_chunk;

/* --------------------------------------------------------------------------------- FP8 -- */

/* E4M3 without infinities: sign, 4 bits of exponent with bias 7, 3 bits of fraction; S.1111.111 is
 * NaN. */
static float fp8_value(uint8_t code)
{
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const float sign = code & 0x80 ? -1.0f : 1.0f;
    if ((code & 0x7f) == 0x7f)
        return NAN;
    if (!exponent)
        return sign * (float)fraction * 0x1p-9f;
    return sign * ldexpf((float)(8 + fraction), exponent - 10);
}

static void fp8_decode(const float table[256], const uint8_t *src, const float *scales,
                       uint32_t block, float *dst, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        dst[i] = table[src[i]] * scales[i / block];
}

/* --------------------------------------------------------------------------------- rows -- */

static uint64_t encode_row_bytes(const moe_quant *type, uint64_t row_len)
{
    return type ? row_len / type->block_len * type->block_bytes : row_len; // FP8: a byte each
}

/* Where row r of a chunk stands among the rows that were read. Rows of a head are stored in two
 * halves, whose rows become neighbours: 0, d/2, 1, d/2 + 1, ... Chunks hold whole heads. */
static uint64_t encode_source_row(const conv_tensor *t, uint64_t r)
{
    if (!t->interleave)
        return r;
    const uint64_t in_head = r % t->interleave;
    return r - in_head + in_head / 2 + (in_head & 1) * (t->interleave / 2);
}

static moe_status encode_read(encode_worker *w, const encode_chunk *c)
{
    const conv_tensor *t = c->t;
    const uint64_t row_bytes = encode_row_bytes(c->in->type, t->row_len);
    w->raw.n = 0;
    if (!buf_reserve(&w->raw, (size_t)(c->n_rows * row_bytes)))
        return fail_memory(&w->error, w->mem, t->name, c->n_rows * row_bytes);
    moe_status status = plat_read(&c->in->file->os, c->in->offset + c->in_row * row_bytes, w->raw.data,
                                  c->n_rows * row_bytes, c->in->file->path, &w->error);
    if (status || c->in->type)
        return status;
    const uint64_t block = c->in->scale_block, n = (t->row_len + block - 1) / block;
    const uint64_t first = c->in_row / block, last = (c->in_row + c->n_rows - 1) / block;
    w->scales.n = 0;
    if (!buf_reserve(&w->scales, (size_t)((last - first + 1) * n * sizeof(float))))
        return fail_memory(&w->error, w->mem, t->name, n * sizeof(float));
    return plat_read(&c->in->scale_file->os, c->in->scale_offset + first * n * sizeof(float),
                     w->scales.data, (last - first + 1) * n * sizeof(float),
                     c->in->scale_file->path, &w->error);
}

/* Row r of the chunk as floats. */
static void encode_row_floats(const encode_worker *w, const encode_chunk *c, uint64_t r, float *dst)
{
    const conv_tensor *t = c->t;
    const uint64_t from = encode_source_row(t, r), n = t->row_len;
    if (!c->in) {
        memcpy(dst, t->made + (c->row + from) * n, (size_t)n * sizeof *dst);
        return;
    }
    const uint8_t *src = w->raw.data + from * encode_row_bytes(c->in->type, n);
    if (c->in->type) {
        c->in->type->dequantize(src, dst, (size_t)n);
    } else {
        const uint32_t block = c->in->scale_block;
        const uint64_t in_row = c->in_row + from;
        const uint64_t line = in_row / block - c->in_row / block;
        const float *scales = (const float *)(const void *)w->scales.data;
        fp8_decode(w->state->fp8, src, scales + line * ((n + block - 1) / block), block, dst, n);
    }
    for (uint64_t i = 0; t->plus_1 && i < n; i++)
        dst[i] += 1.0f;
}

/* Names the first number that is not finite, or that the type cannot hold. */
static moe_status encode_check(encode_worker *w, const encode_chunk *c, uint64_t r, float *x)
{
    const conv_tensor *t = c->t;
    const float max = t->target->id == Q_F32 || t->target->id == Q_BF16 ? FLT_MAX : 65504.0f;
    const bool floats = t->target->block_len == 1;
    uint64_t i = 0;
    // one compare for a run of good numbers; NaN compares false
    for (; i < t->row_len && fabsf(x[i]) <= max; i++)
        ;
    for (; i < t->row_len; i++) {
        if (fabsf(x[i]) <= max)
            continue;
        const unsigned long long row = (unsigned long long)(c->row + r), column = i;
        if (!w->state->options->allow_nonfinite && !isfinite(x[i]))
            return fail(&w->error, MOE_ERR_MODEL, t->name,
                        "expected finite weights, got %f at row %llu, column %llu (from %s); "
                        "--allow-nonfinite keeps such numbers in float types and makes them 0 in "
                        "others", (double)x[i], row, column, c->in ? c->in->name : "config.json");
        if (isfinite(x[i]))
            return fail(&w->error, MOE_ERR_MODEL, t->name,
                        "expected weights of at most 65504, the largest number of %s, got %g at row "
                        "%llu, column %llu; use --keep '^%s$=BF16'", t->target->name, (double)x[i],
                        row, column, t->name);
        if (!floats)
            x[i] = 0;
    }
    return MOE_OK;
}

/* Bytes can be copied as they are. */
static bool encode_is_copy(const encode_chunk *c)
{
    return c->in && c->in->type == c->t->target && !c->t->plus_1;
}

/* Rows that are worked on at once: few enough to stay in the cache, many enough for short rows. */
static uint64_t encode_strip(const encode_chunk *c)
{
    return MOE_MIN(MOE_MAX(CONVERT_STRIP_FLOATS / c->t->row_len, 1), c->n_rows);
}

/* `n` rows from row `first` of the chunk, as blocks at their place among the chunk's. */
static moe_status encode_some(encode_worker *w, const encode_chunk *c, uint64_t first, uint64_t n)
{
    const conv_tensor *t = c->t;
    const uint64_t row_bytes = encode_row_bytes(t->target, t->row_len);
    const bool copy = encode_is_copy(c);
    uint8_t *dst = w->blocks.data + first * row_bytes;
    float *x = (float *)(void *)w->floats.data; // [n][row_len]
    moe_status status = MOE_OK;
    if (!copy || t->target->block_len == 1)
        for (uint64_t r = 0; r < n && !status; r++) {
            encode_row_floats(w, c, first + r, x + r * t->row_len);
            // a GGUF file's own floats are copied, whatever they are: it is what it is
            if (!copy || !w->state->source->dir)
                status = encode_check(w, c, first + r, x + r * t->row_len);
        }
    for (uint64_t r = 0; r < n && copy; r++)
        memcpy(dst + r * row_bytes, w->raw.data + encode_source_row(t, first + r) * row_bytes,
               (size_t)row_bytes);
    if (!copy && !status)
        encoder_for(t->target)(x, NULL, dst, (size_t)n, (size_t)t->row_len);
    return status;
}

static moe_status encode_rows(encode_worker *w, const encode_chunk *c)
{
    const conv_tensor *t = c->t;
    const uint64_t row_bytes = encode_row_bytes(t->target, t->row_len), strip = encode_strip(c);
    moe_status status = c->in ? encode_read(w, c) : MOE_OK;
    w->blocks.n = w->floats.n = 0;
    if (!status && (!buf_reserve(&w->blocks, (size_t)(c->n_rows * row_bytes)) ||
                    !buf_reserve(&w->floats, (size_t)(strip * t->row_len) * sizeof(float))))
        status = fail_memory(&w->error, w->mem, t->name, c->n_rows * row_bytes);
    for (uint64_t r = 0; r < c->n_rows && !status; r += strip)
        status = encode_some(w, c, r, MOE_MIN(strip, c->n_rows - r));
    return status ? status
                  : writer_put(w->state->writer, w->blocks.data, c->n_rows * row_bytes,
                               t->offset + c->row * row_bytes, &w->error);
}

/* ------------------------------------------------------------------------------- threads -- */

/* Takes the next chunk; false if there is none or the work is over. */
static bool encode_next(encode_worker *w, encode_chunk *c)
{
    encode_state *st = w->state;
    bool more = false;
    plat_mutex_lock(&st->lock);
    if (!st->status && cancelled(st->options->cancel))
        st->status = fail(&st->error, MOE_ERR_CANCELLED, NULL, "cancelled");
    while (!st->status && st->tensor < st->source->n_tensors &&
           st->row == st->source->tensors[st->tensor].n_rows) {
        st->tensor++;
        st->row = 0;
    }
    if (!st->status && st->tensor < st->source->n_tensors) {
        const conv_tensor *t = &st->source->tensors[st->tensor];
        const uint64_t in_rows = t->n_rows / t->n_inputs, unit = t->interleave ? t->interleave : 1;
        uint64_t n = MOE_MAX(CONVERT_CHUNK_FLOATS / t->row_len / unit, 1) * unit;
        *c = (encode_chunk){.t = t, .row = st->row, .in_row = st->row % in_rows};
        c->in = t->made ? NULL : &t->inputs[st->row / in_rows];
        c->n_rows = MOE_MIN(n, in_rows - c->in_row);
        st->row += c->n_rows;
        more = true;
    }
    plat_mutex_unlock(&st->lock);
    return more;
}

static void encode_finish(encode_worker *w, const encode_chunk *c, moe_status status)
{
    encode_state *st = w->state;
    conv_progress progress = {c->t->name, 0, st->total};
    plat_mutex_lock(&st->lock);
    progress.done = st->done += c->n_rows * c->t->row_len;
    if (status && !st->status) {
        st->status = status;
        st->error = w->error;
    }
    plat_mutex_unlock(&st->lock);
    if (w->first && st->options->progress)
        st->options->progress(st->options->user, &progress);
}

static void encode_work(void *arg)
{
    encode_worker *w = arg;
    encode_chunk c;
    while (encode_next(w, &c))
        encode_finish(w, &c, encode_rows(w, &c));
    buf_free(&w->raw);
    buf_free(&w->floats);
    buf_free(&w->blocks);
    buf_free(&w->scales);
}

/* Encodes all tensors into the open file. */
static moe_status encode_all(conv_job *job, const conv_writer *writer, moe_error *error)
{
    enum { MAX_THREADS = 256 };
    encode_state st = {.source = &job->source, .options = &job->options, .writer = writer,
                       .total = job->n_weights};
    const uint32_t asked = job->options.n_threads ? job->options.n_threads : plat_n_cores();
    const uint32_t n = MOE_MIN(MOE_MAX(asked, 1u), (uint32_t)MAX_THREADS);
    encode_worker *workers = mem_alloc(&job->mem, n, sizeof *workers);
    plat_thread *threads = mem_alloc(&job->mem, n, sizeof *threads);
    uint32_t started = 1;
    for (int i = 0; i < 256; i++)
        st.fp8[i] = fp8_value((uint8_t)i);
    if (!workers || !threads || !plat_mutex_init(&st.lock)) {
        mem_free(&job->mem, workers);
        mem_free(&job->mem, threads);
        return fail_memory(error, &job->mem, "threads", n * sizeof *workers);
    }
    for (uint32_t i = 0; i < n; i++) {
        workers[i] = (encode_worker){.state = &st, .first = i == 0, .mem = &job->mem};
        text_buf *bufs[4] = {&workers[i].raw, &workers[i].blocks, &workers[i].scales,
                             &workers[i].floats};
        for (int b = 0; b < 4; b++)
            bufs[b]->mem = &job->mem;
    }
    while (started < n && plat_thread_start(&threads[started], encode_work, &workers[started]))
        started++;
    encode_work(&workers[0]); // fewer threads than asked for: slower, not wrong
    for (uint32_t i = 1; i < started; i++)
        plat_thread_join(&threads[i]);
    plat_mutex_destroy(&st.lock);
    mem_free(&job->mem, workers);
    mem_free(&job->mem, threads);
    if (st.status && error)
        *error = st.error;
    return st.status;
}

#endif
