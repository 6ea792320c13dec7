/* convert/moe_write.c - the result as a .moe file (docs/format.md): records one after another, in
 * the order of use, and the directory in front of them once all is known.
 *
 * Threads encode and compress tasks in any order; what comes out is placed in the order of the
 * tasks, so the bytes do not depend on the threads. The file has another name until it is whole.
 * Each finished record is entered into the tables at the file's front at once: a conversion that
 * was killed goes on behind the last one.
 * Must never: hold more than a task for each thread. */
#ifndef MOE_CONVERT_MOE_WRITE_C
#define MOE_CONVERT_MOE_WRITE_C

#include "encode.c"
#include "planes.c"
#include "source_hash.c"

/* Tests set both so low that small models have compressed slices of many segments. */
#ifndef MOE_CONVERT_SMALL_BYTES
#define MOE_CONVERT_SMALL_BYTES (1 << 14)
#endif
#ifndef MOE_CONVERT_SEGMENT_BYTES
#define MOE_CONVERT_SEGMENT_BYTES MOEFILE_SEGMENT_BYTES
#endif

enum {
    MOEW_SMALL_BYTES = MOE_CONVERT_SMALL_BYTES, // tensors below share their layer's first record,
                                                // and slices below stay raw
    MOEW_SEGMENT_BYTES = MOE_CONVERT_SEGMENT_BYTES
};

/* In the place of the magic, until the file is whole. */
static const char moew_partial_magic[8] = "MOE\0part";

typedef enum moew_choice { MOEW_OPEN, MOEW_RAW, MOEW_PLANES } moew_choice;

/* A slice as it is planned. */
typedef struct moew_slice {
    const conv_tensor *t;
    const moe_quant *type;
    double bits;            // of a trellis-coded type, per weight on disk; 0: the type's own
    uint64_t first_row, n_rows, row_bytes;
    uint64_t segment_rows;  // 0: it can only be raw
    uint64_t task_rows;
    uint32_t record;
    moew_choice choice;     // by its first segment
    uint64_t source_at;     // of a layer's first: where the layer begins in the source; else 0
    double error_sum, square_sum;
} moew_slice;

typedef struct moew_sink {
    conv_job *job;
    conv_writer writer;
    moefile_header header;
    text_buf front;         // header, keys, receipt, tensors, and room for the tables
    uint64_t sha256_at;     // where the hashes of the source's files stand in it, as strings
    uint64_t records_at, slices_at, segments_at; // where the tables stand in the file
    uint64_t plan;          // hash of all that the result depends on
    moefile_record *records; // [n_records], as are the other tables
    moefile_slice *tables;   // [n_slices]
    moew_slice *slices;      // [n_slices]
    uint32_t *segments;      // [max_segments]
    uint32_t n_records, n_slices;
    uint64_t max_segments;
    /* The cursor: */
    uint32_t next_slice;
    uint64_t next_row, next_number;
    /* Under the lock: */
    plat_mutex lock;
    plat_cond changed;
    bool has_lock, has_cond;
    bool stopped;
    uint64_t turn;          // the number of the task that may be placed
    uint64_t at;            // end of what was placed, in the file
    uint32_t n_segments;
    xxh64_state hash;       // of the record
    source_hasher hasher;   // has a lock of its own
} moew_sink;

/* --------------------------------------------------------------------------------- plan -- */

/* Gate, up, down: the order in which an expert's matrices are needed. */
static int moew_rank(const char *name)
{
    return strstr(name, "gate") ? 0 : strstr(name, "up") ? 1 : strstr(name, "down") ? 2 : 3;
}

/* The order of use: what is in no layer comes first, except for the output. */
enum { MOEW_FIRST = -1, MOEW_LAST = INT32_MAX };

static int32_t moew_layer(const char *name)
{
    uint32_t layer;
    if (tensor_layer(name, &layer))
        return (int32_t)layer;
    return strncmp(name, "output", 6) ? MOEW_FIRST : MOEW_LAST;
}

static moefile_record *moew_add_record(moew_sink *m, moefile_kind kind, int32_t layer,
                                       uint32_t expert)
{
    moefile_record *r = &m->records[m->n_records++];
    *r = (moefile_record){.kind = kind, .expert = expert, .first_slice = m->n_slices,
                          .layer = layer < 0 || layer == MOEW_LAST ? MOEFILE_NONE
                                                                   : (uint32_t)layer};
    return r;
}

static uint64_t moew_common_divisor(uint64_t a, uint64_t b)
{
    return b ? moew_common_divisor(b, a % b) : a;
}

/* Rows of a segment, and of a task: whole segments and whole heads. */
static void moew_cut(moew_slice *s)
{
    const uint64_t heads = s->t->interleave ? s->t->interleave : 1;
    s->segment_rows = MOEW_SEGMENT_BYTES / s->row_bytes;
    if (s->segment_rows > heads)
        s->segment_rows -= s->segment_rows % heads;
    const uint64_t rows = MOE_MAX(s->segment_rows, 1);
    s->task_rows = rows / moew_common_divisor(rows, heads) * heads;
    if (s->n_rows * s->row_bytes < MOEW_SMALL_BYTES)
        s->segment_rows = 0;
}

static void moew_add_slice(moew_sink *m, size_t tensor, uint32_t part, uint32_t n_parts)
{
    const conv_tensor *t = &m->job->source.tensors[tensor];
    moew_slice *s = &m->slices[m->n_slices];
    *s = (moew_slice){.t = t, .type = conv_part_type(t, part), .bits = conv_part_bits(t, part),
                      .record = m->n_records - 1};
    s->n_rows = t->n_rows / n_parts;
    s->first_row = part * s->n_rows;
    s->row_bytes = encode_row_bytes(s->type, t->row_len);
    moew_cut(s);
    m->tables[m->n_slices++] = (moefile_slice){.tensor = (uint32_t)tensor, .part = part,
                                               .type = s->type->id};
    m->records[s->record].n_slices++;
    m->records[s->record].decoded_bytes += s->n_rows * s->row_bytes;
    if (s->segment_rows && m->job->options.store != CONV_STORE_RAW)
        m->max_segments += (s->n_rows + s->segment_rows - 1) / s->segment_rows;
}

/* The experts of a layer, one record each. */
static void moew_plan_experts(moew_sink *m, int32_t layer)
{
    const conv_source *s = &m->job->source;
    for (uint32_t expert = 0; expert < s->n_expert; expert++) {
        moefile_record *r = NULL;
        for (int rank = 0; rank < 4; rank++)
            for (size_t i = 0; i < s->n_tensors; i++) {
                const conv_tensor *t = &s->tensors[i];
                if (moew_layer(t->name) != layer || !conv_is_experts(s, t) ||
                    moew_rank(t->name) != rank)
                    continue;
                if (!r)
                    r = moew_add_record(m, MOEFILE_EXPERT, layer, expert);
                moew_add_slice(m, i, expert, s->n_expert);
            }
        if (!r)
            return;
    }
}

static void moew_plan_layer(moew_sink *m, int32_t layer)
{
    const conv_source *s = &m->job->source;
    bool any = false;
    for (int small = 1; small >= 0; small--)
        for (size_t i = 0; i < s->n_tensors; i++) {
            const conv_tensor *t = &s->tensors[i];
            if (moew_layer(t->name) != layer || conv_is_experts(s, t) ||
                (t->bytes < MOEW_SMALL_BYTES) != small)
                continue;
            if (!any || !small)
                moew_add_record(m, MOEFILE_DENSE, layer, MOEFILE_NONE);
            any = true;
            moew_add_slice(m, i, 0, 1);
        }
    if (layer != MOEW_FIRST && layer != MOEW_LAST)
        moew_plan_experts(m, layer);
}

/* Cuts the model into records and slices. */
static moe_status moew_plan(moew_sink *m, moe_error *error)
{
    const conv_source *s = &m->job->source;
    int32_t n_layer = 0;
    uint64_t n = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        const int32_t layer = moew_layer(s->tensors[i].name);
        n += conv_is_experts(s, &s->tensors[i]) ? s->n_expert : 1;
        if (layer != MOEW_LAST)
            n_layer = MOE_MAX(n_layer, layer + 1);
    }
    if (n > UINT32_MAX / 2)
        return fail(error, MOE_ERR_LIMIT, "tensors", "expected less than 2^31 of them");
    m->records = arena_alloc(&m->job->source.arena, n, sizeof *m->records);
    m->tables = arena_alloc(&m->job->source.arena, n, sizeof *m->tables);
    m->slices = arena_alloc(&m->job->source.arena, n, sizeof *m->slices);
    if (!m->records || !m->tables || !m->slices)
        return fail_memory(error, &m->job->mem, "records", n * sizeof *m->slices);
    moew_plan_layer(m, MOEW_FIRST);
    for (int32_t i = 0; i < n_layer; i++)
        moew_plan_layer(m, i);
    moew_plan_layer(m, MOEW_LAST);
    m->segments = arena_alloc(&m->job->source.arena, m->max_segments, sizeof *m->segments);
    if (!m->segments || m->max_segments > UINT32_MAX)
        return fail_memory(error, &m->job->mem, "segments", m->max_segments * sizeof *m->segments);
    return MOE_OK;
}

/* -------------------------------------------------------------------------------- front -- */

/* Where the model came from and how it was made. */
static void moew_put_receipt(meta_writer *w, const conv_job *job)
{
    static const char *const stores[] = {"auto", "raw", "zstd"};
    const conv_options *o = &job->options;
    char tool[64];
    snprintf(tool, sizeof tool, "moe-convert %s", moe_version());
    meta_put_string(w, "receipt.tool", tool);
    meta_put_string(w, "receipt.quant", o->quant ? o->quant : "as in the source");
    meta_put_string(w, "receipt.store", stores[o->store]);
    if (o->bits_per_weight > 0)
        meta_put_f32(w, "receipt.bits_per_weight", (float)o->bits_per_weight);
    if (o->imatrix) { // it is among the source's files, with its hash
        const char *name = strrchr(o->imatrix, '/');
        meta_put_string(w, "receipt.imatrix", name ? name + 1 : o->imatrix);
    }
    meta_put_array(w, "receipt.source.files", META_STRING, job->source.n_files);
    for (uint32_t i = 0; i < job->source.n_files; i++) {
        const char *name = strrchr(job->source.files[i].path, '/');
        name = name ? name + 1 : job->source.files[i].path;
        meta_text(w, name, strlen(name));
    }
    meta_put_array(w, "receipt.source.bytes", META_U64, job->source.n_files);
    for (uint32_t i = 0; i < job->source.n_files; i++)
        meta_number(w, job->source.files[i].bytes, 8);
    meta_put_array(w, "receipt.source.sha256", META_STRING, job->source.n_files);
}

/* Room for the hashes, which are known at the end. */
static void moew_put_sha256(meta_writer *w, const conv_job *job)
{
    char digits[64];
    memset(digits, '0', sizeof digits);
    for (uint32_t i = 0; i < job->source.n_files; i++)
        meta_text(w, digits, sizeof digits);
}

static void moew_put_tensors(meta_writer *w, const conv_source *s)
{
    for (size_t i = 0; i < s->n_tensors; i++) {
        const conv_tensor *t = &s->tensors[i];
        meta_text(w, t->name, strlen(t->name));
        meta_number(w, t->n_dims, 4);
        for (uint32_t d = 0; d < t->n_dims; d++)
            meta_number(w, t->dims[d], 8);
        meta_number(w, conv_is_experts(s, t) ? s->n_expert : 1, 4);
    }
}

/* Everything in front of the records but what is only known at the end. */
static moe_status moew_make_front(moew_sink *m, moe_error *error)
{
    const conv_source *s = &m->job->source;
    moefile_header *h = &m->header;
    uint64_t n_receipt = 0;
    meta_writer w = {&m->front, &n_receipt, false};
    m->front.n = 0;
    meta_bytes(&w, h, sizeof *h);
    meta_bytes(&w, s->kv.data, s->kv.n);
    h->keys_bytes = s->kv.n;
    moew_put_receipt(&w, m->job);
    m->sha256_at = m->front.n;
    moew_put_sha256(&w, m->job);
    h->receipt_bytes = m->front.n - sizeof *h - s->kv.n;
    moew_put_tensors(&w, s);
    h->tensors_bytes = m->front.n - sizeof *h - s->kv.n - h->receipt_bytes;
    while (m->front.n % MOEFILE_TABLE_ALIGN && !w.failed)
        meta_number(&w, 0, 1);
    m->records_at = m->front.n;
    m->slices_at = m->records_at + m->n_records * sizeof(moefile_record);
    m->segments_at = m->slices_at + m->n_slices * sizeof(moefile_slice);
    const uint64_t end = m->segments_at + m->max_segments * sizeof(uint32_t);
    memcpy(h->magic, MOEFILE_MAGIC, sizeof h->magic);
    h->major = MOEFILE_MAJOR;
    h->minor = MOEFILE_MINOR;
    h->header_bytes = sizeof *h;
    h->n_keys = (uint32_t)s->n_kv;
    h->n_receipt = (uint32_t)n_receipt;
    h->n_tensors = (uint32_t)s->n_tensors;
    h->n_records = m->n_records;
    h->n_slices = m->n_slices;
    h->data_offset = align_up(end, MOEFILE_PAGE);
    m->at = h->data_offset;
    if (end - sizeof *h > MOEFILE_MAX_DIRECTORY_BYTES)
        return fail(error, MOE_ERR_LIMIT, "directory", "expected at most %u bytes, got %llu",
                    (unsigned)MOEFILE_MAX_DIRECTORY_BYTES, (unsigned long long)end);
    return w.failed ? fail_memory(error, s->mem, "directory", end) : MOE_OK;
}

/* Where a record begins that follows what ends at `at`, by its first slice: at a page if that is
 * mapped, as far as that can matter. */
static uint64_t moew_record_start(uint64_t at, bool raw, uint64_t slice_bytes)
{
    return align_up(at, raw && slice_bytes >= MOEFILE_PAGE ? MOEFILE_PAGE : MOEFILE_SLICE_ALIGN);
}

/* The bytes of the file if nothing were compressed, and all records began with a page. */
static uint64_t moew_raw_bytes(const moew_sink *m)
{
    uint64_t at = m->header.data_offset;
    for (uint32_t i = 0; i < m->n_records; i++) {
        at = align_up(at, MOEFILE_PAGE) + m->records[i].decoded_bytes +
             m->records[i].n_slices * (uint64_t)MOEFILE_SLICE_ALIGN;
    }
    return at;
}

/* -------------------------------------------------------------------------------- tasks -- */

static bool moew_next(void *self, encode_task *task)
{
    moew_sink *m = self;
    if (m->next_slice < m->n_slices && m->next_row == m->slices[m->next_slice].n_rows) {
        m->next_slice++;
        m->next_row = 0;
    }
    if (m->next_slice == m->n_slices)
        return false;
    const moew_slice *s = &m->slices[m->next_slice];
    *task = (encode_task){.t = s->t, .type = s->type, .bits = s->bits,
                          .row = s->first_row + m->next_row,
                          .n_rows = MOE_MIN(s->task_rows, s->n_rows - m->next_row),
                          .number = m->next_number++, .slice = m->next_slice};
    m->next_row += task->n_rows;
    return true;
}

static void moew_stop(void *self)
{
    moew_sink *m = self;
    plat_mutex_lock(&m->lock);
    m->stopped = true;
    plat_cond_broadcast(&m->changed);
    plat_mutex_unlock(&m->lock);
}

static void moew_leave(encode_worker *w)
{
    planes_close(w->own);
    w->own = NULL;
}

/* ----------------------------------------------------------------------------- encoding -- */

/* Compresses the task's segments into the packer. `first`: only the first. */
static moe_status moew_pack(moew_sink *m, encode_worker *w, const encode_task *task, bool first)
{
    const moew_slice *s = &m->slices[task->slice];
    moe_status status = MOE_OK;
    planes_packer *p = w->own;
    p->out.n = p->n_segments = 0;
    for (uint64_t row = 0; row < task->n_rows && !status && !(first && row);
         row += s->segment_rows) {
        const size_t n = (size_t)MOE_MIN(s->segment_rows, task->n_rows - row);
        const size_t per_row = (size_t)(s->row_bytes / s->type->block_bytes);
        const moefile_blocks blocks = {s->type, n * per_row, per_row};
        status = planes_pack(p, &blocks, w->blocks.data + row * s->row_bytes, s->t->name,
                             &w->error);
    }
    return status;
}

/* Whether a slice is compressed whose first segment becomes so many bytes. Trellis-coded types are
 * made for it. */
static bool moew_pays(const moew_sink *m, const moe_quant *type, uint64_t bytes, uint64_t packed)
{
    const conv_store store = m->job->options.store;
    const uint64_t percent = store == CONV_STORE_ZSTD || tcq_is(type) ? 1 : CONV_AUTO_PERCENT;
    return store != CONV_STORE_RAW && packed <= bytes - bytes / 100 * percent;
}

/* Whether a slice is compressed: by what its first segment saves. The others wait for it. */
static moe_status moew_choose(moew_sink *m, encode_worker *w, const encode_task *task,
                              moew_choice *choice)
{
    moew_slice *s = &m->slices[task->slice];
    const uint64_t row = task->row - s->first_row;
    moe_status status = MOE_OK;
    *choice = MOEW_RAW;
    if (!s->segment_rows || m->job->options.store == CONV_STORE_RAW)
        return MOE_OK;
    if (!w->own && !(w->own = planes_open(w->mem)))
        return fail_memory(&w->error, w->mem, "compressor", MOEFILE_SEGMENT_BYTES);
    if (row == 0) {
        const uint64_t bytes = MOE_MIN(s->segment_rows, task->n_rows) * s->row_bytes;
        status = moew_pack(m, w, task, true);
        const planes_packer *p = w->own;
        *choice = !status && moew_pays(m, s->type, bytes, p->out.n) ? MOEW_PLANES : MOEW_RAW;
    }
    plat_mutex_lock(&m->lock);
    if (row == 0) {
        s->choice = *choice;
        plat_cond_broadcast(&m->changed);
    }
    while (s->choice == MOEW_OPEN && !m->stopped)
        plat_cond_wait(&m->changed, &m->lock);
    *choice = s->choice;
    plat_mutex_unlock(&m->lock);
    return status;
}

/* ------------------------------------------------------------------------------ placing -- */

/* Appends bytes to the record; data NULL: zeros, which are in the file already. */
static moe_status moew_append(moew_sink *m, const void *data, uint64_t bytes, moe_error *error)
{
    static const uint8_t zeros[MOEFILE_SLICE_ALIGN];
    moe_status status = data ? writer_put(&m->writer, data, bytes, m->at, error) : MOE_OK;
    xxh64_add(&m->hash, data ? data : zeros, bytes);
    m->at += bytes;
    return status;
}

/* The entries of a finished record, which stand in the file before the record's own. */
static uint64_t moew_hash_entries(const moefile_record *r, const moefile_slice *slices,
                                  const uint32_t *segments, uint32_t n_segments)
{
    xxh64_state state;
    xxh64_begin(&state);
    xxh64_add(&state, r, offsetof(moefile_record, reserved));
    xxh64_add(&state, slices, r->n_slices * sizeof *slices);
    xxh64_add(&state, segments, n_segments * sizeof *segments);
    return xxh64_end(&state);
}

/* Enters a finished record into the tables of the file: from here on it is not made again. */
static moe_status moew_finish_record(moew_sink *m, uint32_t index, moe_error *error)
{
    moefile_record *r = &m->records[index];
    r->stored_bytes = m->at - r->offset;
    r->hash = xxh64_end(&m->hash);
    const uint32_t first = m->tables[r->first_slice].first_segment;
    moefile_record entry = *r;
    entry.reserved = moew_hash_entries(r, m->tables + r->first_slice, m->segments + first,
                                       m->n_segments - first);
    moe_status status;
    if ((status = writer_put(&m->writer, m->segments + first,
                             (m->n_segments - first) * sizeof *m->segments,
                             m->segments_at + first * sizeof *m->segments, error)) ||
        (status = writer_put(&m->writer, m->tables + r->first_slice,
                             r->n_slices * sizeof *m->tables,
                             m->slices_at + r->first_slice * sizeof *m->tables, error)))
        return status;
    return writer_put(&m->writer, &entry, sizeof entry, m->records_at + index * sizeof entry,
                      error);
}

static moe_status moew_begin_slice(moew_sink *m, uint32_t index, moew_choice choice,
                                   moe_error *error)
{
    moefile_slice *table = &m->tables[index];
    const moew_slice *s = &m->slices[index];
    moefile_record *r = &m->records[s->record];
    if (index == r->first_slice) {
        m->at = r->offset = moew_record_start(m->at, choice == MOEW_RAW, s->n_rows * s->row_bytes);
        xxh64_begin(&m->hash);
    }
    const uint64_t used = m->at - r->offset;
    table->encoding = choice == MOEW_PLANES ? MOEFILE_PLANES : MOEFILE_RAW;
    table->offset = moefile_slice_start(used, table->encoding);
    moe_status status = moew_append(m, NULL, table->offset - used, error);
    table->first_segment = m->n_segments;
    if (choice == MOEW_PLANES)
        table->segment_blocks = (uint32_t)(s->segment_rows * s->row_bytes / s->type->block_bytes);
    return status;
}

/* Puts the task's bytes behind those of the task before it. Its turn has come. */
static moe_status moew_place(moew_sink *m, encode_worker *w, const encode_task *task,
                             moew_choice choice)
{
    moew_slice *s = &m->slices[task->slice];
    moefile_slice *table = &m->tables[task->slice];
    const planes_packer *p = w->own;
    const text_buf *data = choice == MOEW_PLANES ? &p->out : &w->blocks;
    moe_status status = MOE_OK;
    if (task->row == s->first_row)
        status = moew_begin_slice(m, task->slice, choice, &w->error);
    if (!status)
        status = moew_append(m, data->data, data->n, &w->error);
    for (size_t i = 0; choice == MOEW_PLANES && i < p->n_segments; i++)
        m->segments[m->n_segments++] = p->sizes[i];
    table->stored_bytes += data->n;
    s->error_sum += w->error_sum;
    s->square_sum += w->square_sum;
    if (status || task->row + task->n_rows < s->first_row + s->n_rows)
        return status;
    table->error = s->square_sum > 0 ? (float)(s->error_sum / s->square_sum) : 0;
    const moefile_record *r = &m->records[s->record];
    return task->slice + 1 == r->first_slice + r->n_slices
               ? moew_finish_record(m, s->record, &w->error) : MOE_OK;
}

static moe_status moew_put(void *self, encode_worker *w, const encode_task *task)
{
    moew_sink *m = self;
    moew_choice choice;
    moe_status status = moew_choose(m, w, task, &choice);
    if (!status && choice == MOEW_PLANES)
        status = moew_pack(m, w, task, false);
    plat_mutex_lock(&m->lock);
    while (m->turn != task->number && !m->stopped)
        plat_cond_wait(&m->changed, &m->lock);
    if (!status && !m->stopped)
        status = moew_place(m, w, task, choice);
    m->stopped |= status != MOE_OK;
    m->turn++;
    plat_cond_broadcast(&m->changed);
    plat_mutex_unlock(&m->lock);
    if (!status)
        hasher_follow(&m->hasher, m->slices[task->slice].source_at, task->t, task->n_rows);
    return status;
}

/* ----------------------------------------------------------------------------- going on -- */

/* All that the result depends on: the plan, the program, and the source as far as it can be
 * seen. */
static uint64_t moew_hash_plan(const moew_sink *m)
{
    const conv_source *s = &m->job->source;
    const uint32_t options[] = {m->job->options.store, m->job->options.allow_nonfinite};
    xxh64_state state;
    xxh64_begin(&state);
    xxh64_add(&state, &m->header, sizeof m->header);
    xxh64_add(&state, m->front.data + sizeof m->header, m->records_at - sizeof m->header);
    xxh64_add(&state, m->records, m->n_records * sizeof *m->records);
    xxh64_add(&state, m->tables, m->n_slices * sizeof *m->tables);
    xxh64_add(&state, options, sizeof options);
    for (uint32_t i = 0; i < m->n_slices; i++)
        xxh64_add(&state, &m->slices[i].bits, sizeof m->slices[i].bits);
    for (uint32_t i = 0; i < s->n_files; i++) {
        const conv_file *f = &s->files[i];
        xxh64_add(&state, f->path, strlen(f->path));
        xxh64_add(&state, (const uint64_t[]){f->bytes, f->inode, (uint64_t)f->mtime_s,
                                             (uint64_t)f->mtime_ns}, 4 * sizeof(uint64_t));
    }
    return xxh64_end(&state);
}

static uint32_t moew_count_segments(const moew_sink *m, const moefile_record *r,
                                    const moefile_slice *slices)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < r->n_slices; i++) {
        const moew_slice *s = &m->slices[r->first_slice + i];
        if (slices[i].encoding == MOEFILE_PLANES && s->segment_rows)
            n += (s->n_rows + s->segment_rows - 1) / s->segment_rows;
    }
    return (uint32_t)MOE_MIN(n, m->max_segments - m->n_segments);
}

/* Takes over a record of an earlier run, if it is whole. */
static bool moew_resume_record(moew_sink *m, uint32_t index, uint8_t *room)
{
    moefile_record *planned = &m->records[index], r;
    const plat_file file = {.handle = m->writer.fd};
    const char *path = m->writer.partial;
    xxh64_state state;
    if (plat_read(&file, m->records_at + index * sizeof r, &r, sizeof r, path, NULL) ||
        r.first_slice != planned->first_slice || r.n_slices != planned->n_slices ||
        r.decoded_bytes != planned->decoded_bytes)
        return false;
    moefile_slice *slices = m->tables + r.first_slice;
    const size_t slice_bytes = r.n_slices * sizeof *slices;
    if (plat_read(&file, m->slices_at + r.first_slice * sizeof *slices, slices, slice_bytes, path,
                  NULL) ||
        r.offset != moew_record_start(m->at, slices->encoding == MOEFILE_RAW, slices->stored_bytes))
        return false;
    const uint32_t n = moew_count_segments(m, &r, slices);
    uint32_t *segments = m->segments + m->n_segments;
    if (plat_read(&file, m->segments_at + m->n_segments * sizeof *segments, segments,
                  n * sizeof *segments, path, NULL) ||
        moew_hash_entries(&r, slices, segments, n) != r.reserved)
        return false;
    xxh64_begin(&state);
    for (uint64_t at = 0; at < r.stored_bytes;) {
        const uint64_t some = MOE_MIN(r.stored_bytes - at, MOEFILE_SEGMENT_BYTES);
        if (plat_read(&file, r.offset + at, room, some, path, NULL))
            return false;
        xxh64_add(&state, room, some);
        at += some;
    }
    static const uint8_t zeros[MOEFILE_PAGE];
    if (xxh64_end(&state) != r.hash ||
        writer_put(&m->writer, zeros, r.offset - m->at, m->at, NULL)) // the padding has no hash
        return false;
    r.reserved = 0;
    *planned = r;
    m->at = r.offset + r.stored_bytes;
    m->n_segments += n;
    return true;
}

/* Takes over what an earlier run of the same conversion has left. *done: its weights. */
static moe_status moew_resume(moew_sink *m, uint64_t *done, moe_error *error)
{
    moefile_header h;
    const plat_file file = {.handle = m->writer.fd};
    *done = 0;
    if (plat_read(&file, 0, &h, sizeof h, m->writer.partial, NULL) ||
        memcmp(h.magic, moew_partial_magic, sizeof h.magic) || h.root != m->plan)
        return MOE_OK;
    uint8_t *room = mem_alloc_uncleared(&m->job->mem, MOEFILE_SEGMENT_BYTES, 1);
    moefile_slice *planned = mem_alloc(&m->job->mem, m->n_slices, sizeof *planned);
    if (!room || !planned) {
        mem_free(&m->job->mem, room);
        mem_free(&m->job->mem, planned);
        return fail_memory(error, &m->job->mem, "records", MOEFILE_SEGMENT_BYTES);
    }
    memcpy(planned, m->tables, m->n_slices * sizeof *planned);
    uint32_t i = 0;
    while (i < m->n_records && moew_resume_record(m, i, room))
        i++;
    const uint32_t next = i < m->n_records ? m->records[i].first_slice : m->n_slices;
    memcpy(m->tables + next, planned + next, (m->n_slices - next) * sizeof *planned);
    mem_free(&m->job->mem, room);
    mem_free(&m->job->mem, planned);
    for (uint32_t k = 0; k < next; k++)
        *done += m->slices[k].n_rows * m->slices[k].t->row_len;
    m->next_slice = next;
    if (next)
        conv_note(&m->job->source, "%u of %u records were there already, of a conversion that did "
                  "not come to its end", i, m->n_records);
    return MOE_OK;
}

/* Empties the file behind what is taken over, and says in it what it is going to be. */
static moe_status moew_begin(moew_sink *m, uint64_t *done, moe_error *error)
{
    moefile_header h = m->header;
    memcpy(h.magic, moew_partial_magic, sizeof h.magic);
    h.root = m->plan;
    moe_status status = moew_resume(m, done, error);
    if (status)
        return status;
    if (!m->next_slice)
        status = writer_begin(&m->writer, m->job->file_bytes, error);
    else if (ftruncate(m->writer.fd, (off_t)m->at) != 0)
        status = fail(error, MOE_ERR_IO, m->writer.partial, "cannot shorten it: %s",
                      writer_why(errno));
    else
        status = writer_reserve(&m->writer, m->job->file_bytes, error);
    return status ? status : writer_put(&m->writer, &h, sizeof h, 0, error);
}

/* ----------------------------------------------------------------------------- the file -- */

/* Directory and header, which make the file one. */
static moe_status moew_write_front(moew_sink *m, moe_error *error)
{
    moefile_header *h = &m->header;
    uint64_t unused = 0;
    meta_writer w = {&m->front, &unused, false};
    m->front.n = (size_t)m->records_at;
    meta_bytes(&w, m->records, m->n_records * sizeof *m->records);
    meta_bytes(&w, m->tables, m->n_slices * sizeof *m->tables);
    meta_bytes(&w, m->segments, m->n_segments * sizeof *m->segments);
    if (w.failed)
        return fail_memory(error, &m->job->mem, "directory", m->front.n);
    for (uint32_t i = 0; i < m->n_slices; i++)
        m->job->source.tensors[m->tables[i].tensor].stored_bytes += m->tables[i].stored_bytes;
    m->job->sampled = 1;
    h->n_segments = m->n_segments;
    h->features = m->n_segments ? MOEFILE_FEATURE_PLANES : 0;
    h->directory_bytes = m->front.n - sizeof *h;
    h->file_bytes = m->job->file_bytes = m->at;
    h->root = moefile_root(h, m->front.data + sizeof *h);
    memcpy(m->front.data, h, sizeof *h);
    while (m->front.n < h->data_offset && !w.failed)
        meta_number(&w, 0, sizeof(uint32_t));
    if (w.failed)
        return fail_memory(error, &m->job->mem, "directory", m->front.n);
    if (ftruncate(m->writer.fd, (off_t)m->at) != 0)
        return fail(error, MOE_ERR_IO, m->writer.partial, "cannot make it %llu bytes long: %s",
                    (unsigned long long)m->at, writer_why(errno));
    return writer_put(&m->writer, m->front.data, m->front.n, 0, error);
}

static void moew_close(moew_sink *m)
{
    if (m->has_cond)
        plat_cond_destroy(&m->changed);
    if (m->has_lock)
        plat_mutex_destroy(&m->lock);
    buf_free(&m->front);
}

/* Plans the file; job->file_bytes is its size without compression. */
static moe_status moew_open(moew_sink *m, conv_job *job, moe_error *error)
{
    *m = (moew_sink){.job = job};
    m->front.mem = &job->mem;
    moe_status status = moew_plan(m, error);
    if (!status)
        status = moew_make_front(m, error);
    job->header_bytes = m->header.data_offset;
    job->file_bytes = status ? 0 : moew_raw_bytes(m);
    m->plan = status ? 0 : moew_hash_plan(m);
    return status;
}

/* Tells the hash in which order the source will be read. */
static void moew_expect(moew_sink *m)
{
    for (uint32_t i = m->next_slice, first = i; i < m->n_slices; i++) {
        moew_slice *s = &m->slices[i];
        const uint64_t at = hasher_expect(&m->hasher, s->t);
        if (moew_layer(s->t->name) != moew_layer(m->slices[first].t->name))
            first = i;
        if (i == first || at < m->slices[first].source_at)
            m->slices[first].source_at = at;
    }
}

/* Encodes all that is left, and hashes the source meanwhile. */
static moe_status moew_encode(moew_sink *m, const encode_sink *sink, uint64_t done,
                              moe_error *error)
{
    moe_status status = hasher_init(&m->hasher, &m->job->source, error);
    if (!status) {
        moew_expect(m);
        hasher_start(&m->hasher, (char *)m->front.data + m->sha256_at + sizeof(uint64_t),
                     m->job->options.cancel);
        status = encode_all(m->job, sink, done, error);
        if (status)
            hasher_finish(&m->hasher, true, NULL);
        else
            status = hasher_finish(&m->hasher, false, error);
    }
    hasher_close(&m->hasher);
    return status;
}

static moe_status moew_write(moew_sink *m, moe_error *error)
{
    const encode_sink sink = {.self = m, .measure = true, .next = moew_next, .put = moew_put,
                              .stop = moew_stop, .leave = moew_leave};
    conv_job *job = m->job;
    m->has_lock = plat_mutex_init(&m->lock);
    m->has_cond = m->has_lock && plat_cond_init(&m->changed);
    for (size_t i = 0; i < job->source.n_tensors; i++)
        job->source.tensors[i].stored_bytes = 0;
    if (!m->has_cond)
        return fail(error, MOE_ERR_THREAD, NULL, "cannot make a lock");
    uint64_t done = 0;
    moe_status status = writer_open(&m->writer, job->options.out, error);
    if (!status)
        status = moew_begin(m, &done, error);
    if (!status)
        status = moew_encode(m, &sink, done, error);
    if (!status)
        status = conv_files_check(&job->source, error);
    if (!status)
        status = moew_write_front(m, error);
    // What a cancelled run has made is kept, without the room for the rest.
    const bool keep = status == MOE_ERR_CANCELLED && m->at > m->header.data_offset &&
                      ftruncate(m->writer.fd, (off_t)m->at) == 0;
    return writer_close(&m->writer, status, keep, error);
}

#endif
