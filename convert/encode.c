/* convert/encode.c - rows from their places in the source to blocks in the result, on all cores.
 *
 * A sink, which is a kind of output file, cuts the work into tasks: some rows of one tensor, about
 * 4 MB as floats. A thread takes the next task, reads its rows, turns them into floats, checks
 * them, quantizes them and gives the blocks to the sink. Threads share only the sink's cursor, so
 * memory is a few MB for each of them, whatever the size of the model. Where nothing has to change,
 * bytes are copied.
 * Must never: write a number that is not finite, unless asked to. */
#ifndef MOE_CONVERT_ENCODE_C
#define MOE_CONVERT_ENCODE_C

#include "encode_input.h"
#include "encode_packed.h"
#include "encoders.h"
#include "gguf_write.c"
#include "imatrix.c"
#include "plan.c"

/* Rows of a tensor, all to be of one type. Rows of a head stay together. */
typedef struct encode_task {
    const conv_tensor *t;
    const moe_quant *type;
    double bits;            // of a trellis-coded type, per weight on disk; 0: the type's own
    uint64_t row, n_rows;
    uint64_t number;        // the sink's own
    uint32_t slice;         // the sink's own
} encode_task;

typedef struct encode_worker encode_worker;

/* Where tasks come from and where their blocks go. */
typedef struct encode_sink {
    void *self;
    bool measure;           // the error of quantization is wanted
    bool weigh;             // and with columns that count by the root of how much they matter
    /* The next task; false if there is none. Called by one thread at a time. */
    bool (*next)(void *self, encode_task *task);
    /* Takes w->blocks, [n_rows] rows. */
    moe_status (*put)(void *self, encode_worker *w, const encode_task *task);
    /* There was a failure: nothing more will come. NULL: does not matter. */
    void (*stop)(void *self);
    /* A thread is about to end; w->own is the sink's. NULL: does not matter. */
    void (*leave)(encode_worker *w);
} encode_sink;

/* What all threads share. */
typedef struct encode_state {
    conv_source *source;    // whose tensors only change under the lock
    const conv_options *options;
    const encode_sink *sink;
    uint64_t total;         // weights
    input_ops input;
    uint32_t cpu;           // moe_cpu bits of this machine
    float fp8[256];         // the value of each code
    plat_mutex lock;
    /* Under the lock, as is the sink's cursor: */
    uint64_t done;          // weights
    moe_status status;      // the first failure
    moe_error error;
} encode_state;

/* One thread's buffers, which grow as chunks need it. */
struct encode_worker {
    encode_state *state;
    bool first;             // reports progress
    moe_mem *mem;
    text_buf raw, blocks, scales, packed;
    text_buf floats, back, columns;
    text_buf room;          // of the trellis search
    tcq_plan tcq;           // of the rows in work, if their type is trellis-coded
    moefile_decoder *decoder; // of compressed rows of a .moe source
    uint8_t *segment;       // [MOEFILE_SEGMENT_BYTES]: decoded
    double error_sum, square_sum; // of the task, if they are measured
    double cost_sum, energy_sum;  // the same, each column counting as the sink weighs it
    void *own;              // the sink's
    bool rounded;           // a scale of the task was
    moe_error error;
};

/* Rows of one input of a tensor. */
typedef struct encode_chunk {
    const conv_tensor *t;
    const moe_quant *type;
    double bits;            // as the task's
    const conv_input *in;   // NULL: t->made
    uint64_t row;           // first, in the tensor
    uint64_t in_row;        // first, in the input
    uint64_t n_rows;
    uint64_t at;            // first, among the task's
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

/* n weights of a row from column `first` on, whose code src begins with; scales are those of the
 * whole row, one for each `cols` columns. A scale is a factor like any other, as it is for all who
 * read such files: quantizers write 0 for blocks of zeros, and a negative one turns signs around.
 * What is not finite is found among the weights. */
static void fp8_decode(const float table[256], const uint8_t *src, const float *scales,
                       uint32_t cols, uint64_t first, float *dst, uint64_t n)
{
    for (uint64_t i = 0, end; i < n; i = end) {
        const uint64_t block = (first + i) / cols;
        const float scale = scales[block];
        end = MOE_MIN((block + 1) * cols - first, n);
        for (uint64_t k = i; k < end; k++)
            dst[k] = table[src[k]] * scale;
    }
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

/* The first column, in the source, of the value head that comes at place h. */
static uint64_t tile_column(const conv_tile *tile, uint32_t h)
{
    return ((uint64_t)(h % tile->head_k) * tile->each + h / tile->head_k) * tile->dim;
}

/* Rows of a compressed slice. */
static moe_status encode_read_planes(encode_worker *w, const encode_chunk *c, uint64_t row_bytes)
{
    if (!w->decoder) {
        w->decoder = mem_alloc(w->mem, 1, sizeof *w->decoder);
        w->segment = mem_alloc_uncleared(w->mem, MOEFILE_SEGMENT_BYTES, 1);
        if (!w->decoder || !w->segment)
            return fail_memory(&w->error, w->mem, c->t->name, MOEFILE_SEGMENT_BYTES);
        moe_status status = moefile_decoder_open(w->mem, w->decoder, &w->error);
        if (status)
            return status;
    }
    return moe_source_read(w->state->source, c->in, w->decoder, w->segment, c->in_row, c->n_rows,
                           row_bytes, w->raw.data, &w->error);
}

/* Reads the chunk's rows of `row_bytes` each, which begin at `offset` of a file; row_step - 1
 * others may stand between them. */
static moe_status encode_read_rows(encode_worker *w, const encode_chunk *c, const conv_file *file,
                                   uint64_t offset, uint64_t row_bytes, text_buf *buf)
{
    const uint64_t step = MOE_MAX(c->in->row_step, 1);
    const uint64_t bytes = ((c->n_rows - 1) * step + 1) * row_bytes;
    buf->n = 0;
    if (!buf_reserve(buf, (size_t)bytes))
        return fail_memory(&w->error, w->mem, c->t->name, bytes);
    moe_status status = plat_read(&file->os, offset + c->in_row * step * row_bytes, buf->data,
                                  bytes, file->path, &w->error);
    for (uint64_t r = 1; r < c->n_rows && step > 1; r++)
        memmove(buf->data + r * row_bytes, buf->data + r * step * row_bytes, (size_t)row_bytes);
    return status;
}

/* Reads rows that are columns in the file: of each of its rows the piece that they share. */
static moe_status encode_read_columns(encode_worker *w, const encode_chunk *c, uint64_t row_bytes)
{
    const uint64_t step = MOE_MAX(c->in->row_step, 1), item = c->in->type->block_bytes;
    const uint64_t piece = ((c->n_rows - 1) * step + 1) * item;
    uint64_t at = c->in->offset + c->in_row * step * item;
    moe_status status = MOE_OK;
    w->raw.n = w->packed.n = 0;
    if (!buf_reserve(&w->raw, (size_t)(c->n_rows * row_bytes)) ||
        !buf_reserve(&w->packed, (size_t)piece))
        return fail_memory(&w->error, w->mem, c->t->name, c->n_rows * row_bytes);
    for (uint64_t i = 0; i < c->t->row_len && !status; i++, at += c->in->transposed * item) {
        status = plat_read(&c->in->file->os, at, w->packed.data, piece, c->in->file->path,
                           &w->error);
        for (uint64_t r = 0; r < c->n_rows; r++)
            memcpy(w->raw.data + r * row_bytes + i * item, w->packed.data + r * step * item,
                   (size_t)item);
    }
    return status;
}

/* Codes and exponents that were read become blocks. Byte i of 16 has the codes 2i and 2i + 1. */
static moe_status encode_make_mxfp4(encode_worker *w, const encode_chunk *c)
{
    const uint64_t n = c->n_rows * c->t->row_len / 32, per_row = c->t->row_len / 32;
    mxfp4_block *block = (mxfp4_block *)w->raw.data;
    for (uint64_t b = 0; b < n; b++, block++) {
        const uint8_t *p = w->packed.data + 16 * b;
        block->e = w->scales.data[b];
        for (int i = 0; i < 8; i++) {
            block->q[2 * i] = (uint8_t)((p[i] & 15) | (p[i + 8] & 15) << 4);
            block->q[2 * i + 1] = (uint8_t)(p[i] >> 4 | (p[i + 8] & 0xf0));
        }
        if (block->e == 255) // the standard's NaN
            return fail(&w->error, MOE_ERR_MODEL, c->t->name,
                        "expected finite weights, got an exponent of 255 at row %llu (from %s)",
                        (unsigned long long)(c->row + b / per_row), c->in->name);
    }
    return MOE_OK;
}

/* The same of NVFP4, whose scales in GGUF have no sign and no NaN. */
static moe_status encode_make_nvfp4(encode_worker *w, const encode_chunk *c)
{
    const uint64_t per_row = c->t->row_len / 16, n = c->n_rows * per_row / 4;
    moe_status status = MOE_OK;
    for (uint64_t i = 0; i < 4 * n && !status; i++) {
        const int scale = packed_nvfp4_scale(w->scales.data[i]);
        const unsigned long long row = (unsigned long long)(c->row + i / per_row);
        if (scale == -2 || (scale == -1 && !w->state->options->allow_nonfinite))
            status = fail(&w->error, MOE_ERR_MODEL, c->t->name,
                          "expected finite scales that are not negative, got %s at row %llu, group "
                          "%llu (from %s)", scale == -1 ? "NaN" : "a negative one", row,
                          (unsigned long long)(i % per_row), c->in->name);
        w->scales.data[i] = (uint8_t)MOE_MAX(scale, 0);
    }
    for (uint64_t b = 0; b < n && !status; b++)
        packed_nvfp4(w->packed.data + 32 * b, w->scales.data + 4 * b,
                     (nvfp4_block *)(void *)w->raw.data + b);
    return status;
}

/* A scale as Q4_0 and Q8_0 have it. */
static moe_status encode_block_scale(encode_worker *w, const encode_chunk *c, uint64_t row,
                                     uint64_t group, float x, uint16_t *d)
{
    *d = f16_of_f32(x);
    if (fabsf(x) < 65520.0f)
        return MOE_OK;
    if (!isfinite(x) && w->state->options->allow_nonfinite) {
        *d = 0;
        return MOE_OK;
    }
    return fail(&w->error, MOE_ERR_MODEL, c->t->name,
                "expected finite scales of at most 65504, the largest number of F16, got %g at row "
                "%llu, group %llu (from %s)%s%s%s", (double)x, (unsigned long long)(c->row + row),
                (unsigned long long)group, c->in->name, isfinite(x) ? "; use --keep '^" : "",
                isfinite(x) ? c->t->name : "", isfinite(x) ? "$=BF16'" : "");
}

/* Packed integers that are kept become blocks in w->raw. A scale that F16 does not have is rounded,
 * which the user is told; it does not matter in groups of zeros. */
static moe_status encode_keep_ints(encode_worker *w, const encode_chunk *c, uint64_t code_bytes,
                                   uint64_t scale_bytes)
{
    const conv_input *in = c->in;
    const uint64_t per_row = c->t->row_len / 32, per_group = in->scale_cols / 32;
    moe_status status = MOE_OK;
    uint8_t *dst = w->raw.data;
    for (uint64_t r = 0; r < c->n_rows; r++) {
        const uint8_t *codes = w->packed.data + r * code_bytes;
        const uint8_t *scales = w->scales.data + r * scale_bytes;
        float x = 0;
        uint16_t d = 0;
        for (uint64_t b = 0; b < per_row; b++, dst += in->type->block_bytes) {
            if (b % per_group == 0) {
                x = packed_scale(in->scale_type, scales, b / per_group);
                if ((status = encode_block_scale(w, c, r, b / per_group, x, &d)))
                    return status;
            }
            if (packed_block(in->type, codes, 32 * b, d, dst) && isfinite(x) && f32_of_f16(d) != x)
                w->rounded = true;
        }
    }
    return MOE_OK;
}

static bool encode_is_copy(const encode_chunk *c);

/* Codes and scales that stand apart, and the blocks made of them in w->raw. Of integers blocks are
 * made only if they are kept: other types are made of the floats, so that scales are rounded to F16
 * for no type but Q4_0 and Q8_0. */
static moe_status encode_read_apart(encode_worker *w, const encode_chunk *c)
{
    const conv_input *in = c->in;
    const uint64_t bytes = c->n_rows * encode_row_bytes(in->type, c->t->row_len);
    uint64_t scale_bytes;
    const uint64_t code_bytes = packed_row_bytes(in, c->t->row_len, &scale_bytes);
    moe_status status = encode_read_rows(w, c, in->file, in->offset, code_bytes, &w->packed);
    if (!status)
        status = encode_read_rows(w, c, in->scale_file, in->scale_offset, scale_bytes, &w->scales);
    if (status || (in->apart == APART_INT && !encode_is_copy(c)))
        return status;
    w->raw.n = 0;
    if (!buf_reserve(&w->raw, (size_t)bytes))
        return fail_memory(&w->error, w->mem, c->t->name, bytes);
    return in->apart == APART_MXFP4   ? encode_make_mxfp4(w, c)
           : in->apart == APART_NVFP4 ? encode_make_nvfp4(w, c)
                                      : encode_keep_ints(w, c, code_bytes, scale_bytes);
}

/* The scales of the chunk's rows of FP8, as floats in w->scales. */
static moe_status encode_read_fp8_scales(encode_worker *w, const encode_chunk *c)
{
    const conv_input *in = c->in;
    const uint64_t per_line = packed_fp8_scales(in, c->t->row_len);
    const uint64_t row = in->scale_skip + c->in_row, first = row / in->scale_rows;
    const uint64_t n = ((row + c->n_rows - 1) / in->scale_rows - first + 1) * per_line;
    const uint64_t item = in->scale_type->block_bytes;
    w->scales.n = w->packed.n = 0;
    if (!buf_reserve(&w->scales, (size_t)(n * sizeof(float))) ||
        !buf_reserve(&w->packed, (size_t)(n * item)))
        return fail_memory(&w->error, w->mem, c->t->name, n * sizeof(float));
    moe_status status = plat_read(&in->scale_file->os, in->scale_offset + first * per_line * item,
                                  w->packed.data, n * item, in->scale_file->path, &w->error);
    if (!status)
        in->scale_type->dequantize(w->packed.data, (float *)(void *)w->scales.data, (size_t)n);
    return status;
}

static moe_status encode_read(encode_worker *w, const encode_chunk *c)
{
    const conv_tensor *t = c->t;
    const uint64_t row_bytes = encode_row_bytes(c->in->type, t->row_len);
    if (c->in->apart)
        return encode_read_apart(w, c);
    if (c->in->transposed)
        return encode_read_columns(w, c, row_bytes);
    if (c->in->planes) {
        w->raw.n = 0;
        return buf_reserve(&w->raw, (size_t)(c->n_rows * row_bytes))
                   ? encode_read_planes(w, c, row_bytes)
                   : fail_memory(&w->error, w->mem, t->name, c->n_rows * row_bytes);
    }
    moe_status status = encode_read_rows(w, c, c->in->file, c->in->offset, row_bytes, &w->raw);
    return status || c->in->type ? status : encode_read_fp8_scales(w, c);
}

/* n weights from column `first` on of row `from` of what was read; `first` begins a block of the
 * type. */
static void encode_floats(const encode_worker *w, const encode_chunk *c, uint64_t from,
                         uint64_t first, float *dst, uint64_t n)
{
    const conv_input *in = c->in;
    const uint64_t row_len = c->t->row_len;
    if (in->apart == APART_INT) {
        uint64_t scale_bytes;
        const uint64_t code_bytes = packed_row_bytes(in, row_len, &scale_bytes);
        packed_floats(in, w->packed.data + from * code_bytes, w->scales.data + from * scale_bytes,
                      first, dst, n);
        return;
    }
    const uint8_t *src = w->raw.data + from * encode_row_bytes(in->type, row_len) +
                         encode_row_bytes(in->type, first);
    if (in->type) {
        input_floats(&w->state->input, in->type, src, dst, (size_t)n);
        return;
    }
    const uint64_t row = in->scale_skip + c->in_row;
    const uint64_t line = (row + from) / in->scale_rows - row / in->scale_rows;
    const float *scales = (const float *)(const void *)w->scales.data;
    fp8_decode(w->state->fp8, src, scales + line * packed_fp8_scales(in, row_len), in->scale_cols,
               first, dst, n);
}

/* A row, whose columns of value heads get another order. */
static void encode_tiled_floats(const encode_worker *w, const encode_chunk *c, uint64_t from,
                                float *dst)
{
    const conv_tile *tile = &c->t->tile;
    for (uint32_t h = 0; h < tile->head_k * tile->each; h++, dst += tile->dim)
        encode_floats(w, c, from, tile_column(tile, h), dst, tile->dim);
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
    if (t->tile.head_k)
        encode_tiled_floats(w, c, from, dst);
    else
        encode_floats(w, c, from, 0, dst, n);
    for (uint64_t i = 0; c->in->factor > 0 && i < n; i++)
        dst[i] *= c->in->factor;
    for (uint64_t i = 0; t->plus_1 && i < n; i++)
        dst[i] += 1.0f;
    for (uint64_t i = 0; t->minus_exp && i < n; i++)
        dst[i] = (float)-exp((double)dst[i]);
}

/* Names the first number that is not finite, or that the type cannot hold. */
static moe_status encode_check(encode_worker *w, const encode_chunk *c, uint64_t r, float *x)
{
    const conv_tensor *t = c->t;
    const float max = c->type->id == Q_F32 || c->type->id == Q_BF16 ? FLT_MAX : 65504.0f;
    const bool floats = c->type->block_len == 1;
    if (w->state->input.within(x, (size_t)t->row_len, max))
        return MOE_OK;
    for (uint64_t i = 0; i < t->row_len; i++) {
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
                        "expected weights of at most 65504, the largest number of %s, got %g at "
                        "row %llu, column %llu; use --keep '^%s$=BF16'", c->type->name,
                        (double)x[i], row, column, t->name);
        if (!floats)
            x[i] = 0;
    }
    return MOE_OK;
}

/* Bytes can be copied as they are, unless they are to have another rate. */
static bool encode_is_copy(const encode_chunk *c)
{
    return c->in && conv_own_type(c->in) == c->type && !c->t->plus_1 && !c->t->minus_exp &&
           !(c->bits > 0 && tcq_is(c->type));
}

/* Row r of the chunk, as it is but for the order of value heads. */
static void encode_copy_row(const encode_worker *w, const encode_chunk *c, uint64_t r, uint8_t *dst)
{
    const conv_tile *tile = &c->t->tile;
    const uint64_t row_bytes = encode_row_bytes(c->type, c->t->row_len);
    const uint8_t *src = w->raw.data + encode_source_row(c->t, r) * row_bytes;
    const uint64_t bytes = tile->head_k ? encode_row_bytes(c->type, tile->dim) : row_bytes;
    for (uint32_t h = 0; h < MOE_MAX(tile->head_k * tile->each, 1u); h++)
        memcpy(dst + h * bytes,
               src + (tile->head_k ? encode_row_bytes(c->type, tile_column(tile, h)) : 0),
               (size_t)bytes);
}

/* Rows that are worked on at once: few enough to stay in the cache, many enough for short rows. */
static uint64_t encode_strip(const encode_chunk *c)
{
    return MOE_MIN(MOE_MAX(CONVERT_STRIP_FLOATS / c->t->row_len, 1), c->n_rows);
}

/* The same, up to the end of a matrix of a stack, if each has columns that matter in their own
 * way. */
static uint64_t encode_alike(const encode_chunk *c, uint64_t first, uint64_t n)
{
    const conv_importance *im = &c->t->importance;
    const uint64_t per_matrix = im->n_matrix ? c->t->n_rows / im->n_matrix : c->t->n_rows;
    return MOE_MIN(n, per_matrix - (c->row + first) % per_matrix);
}

/* How much the columns of a row of the chunk matter; NULL: all alike. */
static const float *encode_columns(encode_worker *w, const encode_chunk *c, uint64_t first)
{
    float *columns = (float *)(void *)w->columns.data;
    const bool known = c->t->importance.n_matrix &&
                       imatrix_columns(c->t, imatrix_matrix(c->t, c->row + first), columns);
    return known ? columns : NULL;
}

/* The error of `n` rows that were quantized, added up in the order of the rows. */
static void encode_measure(encode_worker *w, const encode_chunk *c, const float *x,
                           const float *columns, const uint8_t *blocks, uint64_t n)
{
    float *back = (float *)(void *)w->back.data; // [n][row_len]
    const uint64_t row_len = c->t->row_len;
    double error = 0, square = 0;
    for (uint64_t r = 0; r < n; r++)
        c->type->dequantize(blocks + r * encode_row_bytes(c->type, row_len), back + r * row_len,
                            (size_t)row_len);
    for (uint64_t i = 0; i < n * row_len; i++) {
        const float d = x[i] - back[i]; // whose square is exact: a compiler may fuse the sum or not
        error += (double)d * (double)d;
        square += (double)x[i] * (double)x[i];
    }
    w->error_sum += error;
    w->square_sum += square;
    if (!w->state->sink->weigh)
        return;
    double cost = 0, energy = 0;
    for (uint64_t i = 0; i < n * row_len; i++) {
        const double d = (double)x[i] - (double)back[i];
        const double weight = columns ? sqrt((double)columns[i % row_len]) : 1;
        cost = fma(weight * d, d, cost);
        energy = fma(weight * (double)x[i], (double)x[i], energy);
    }
    w->cost_sum += cost;
    w->energy_sum += energy;
}

/* The trellis-coded types: a plan for n_rows rows from row `first` of the chunk, from some of
 * them. */
static moe_status encode_plan(encode_worker *w, const encode_chunk *c, uint64_t first,
                              uint64_t n_rows)
{
    const uint64_t n_in = c->t->row_len;
    const uint64_t n = MOE_MIN(n_rows, MOE_MAX(TCQ_SAMPLE / n_in, 1));
    const uint64_t room = align_up(tcq_room_bytes((size_t)n_in), sizeof(float));
    w->room.n = 0;
    if (!buf_reserve(&w->room, (size_t)(room + n * n_in * sizeof(float))))
        return fail_memory(&w->error, w->mem, c->t->name, room + n * n_in * sizeof(float));
    float *sample = (float *)(void *)(w->room.data + room); // [n][n_in]
    moe_status status = MOE_OK;
    for (uint64_t i = 0; i < n && !status; i++) {
        const uint64_t r = first + i * n_rows / n;
        encode_row_floats(w, c, r, sample + i * n_in);
        status = encode_check(w, c, r, sample + i * n_in);
    }
    if (!status)
        tcq_plan_make(&w->tcq, c->type, c->bits, sample, encode_columns(w, c, first), (size_t)n,
                      (size_t)n_in, w->room.data);
    return status;
}

/* `n` rows from row `first` of the chunk, as blocks at their place among the task's. */
static moe_status encode_some(encode_worker *w, const encode_chunk *c, uint64_t first, uint64_t n)
{
    const conv_tensor *t = c->t;
    const uint64_t row_bytes = encode_row_bytes(c->type, t->row_len);
    const bool copy = encode_is_copy(c);
    uint8_t *dst = w->blocks.data + (c->at + first) * row_bytes;
    float *x = (float *)(void *)w->floats.data; // [n][row_len]
    moe_status status = MOE_OK;
    if (!copy || c->type->block_len == 1)
        for (uint64_t r = 0; r < n && !status; r++) {
            encode_row_floats(w, c, first + r, x + r * t->row_len);
            // a GGUF file's own floats are copied, whatever they are: it is what it is
            if (!copy || !w->state->source->dir)
                status = encode_check(w, c, first + r, x + r * t->row_len);
        }
    for (uint64_t r = 0; r < n && copy; r++)
        encode_copy_row(w, c, first + r, dst + r * row_bytes);
    if (!copy && !status) {
        const float *columns = encode_columns(w, c, first);
        if (tcq_is(c->type))
            tcq_encode(&w->tcq, x, dst, (size_t)n, (size_t)t->row_len, w->room.data);
        else
            encoder_select(c->type, w->state->cpu)(x, columns, dst, (size_t)n, (size_t)t->row_len);
        if (w->state->sink->measure)
            encode_measure(w, c, x, columns, dst, n);
    }
    return status;
}

static moe_status encode_rows(encode_worker *w, const encode_chunk *c)
{
    const conv_tensor *t = c->t;
    const uint64_t strip = encode_strip(c), bytes = strip * t->row_len * sizeof(float);
    moe_status status = c->in ? encode_read(w, c) : MOE_OK;
    w->floats.n = w->back.n = w->columns.n = 0;
    if (!status && (!buf_reserve(&w->floats, (size_t)bytes) ||
                    !buf_reserve(&w->columns, (size_t)t->row_len * sizeof(float)) ||
                    (w->state->sink->measure && !buf_reserve(&w->back, (size_t)bytes))))
        status = fail_memory(&w->error, w->mem, t->name, bytes);
    for (uint64_t r = 0, n, alike = 0; r < c->n_rows && !status; r += n, alike -= n) {
        if (!alike) {
            alike = encode_alike(c, r, c->n_rows - r);
            if (tcq_is(c->type) && !encode_is_copy(c))
                status = encode_plan(w, c, r, alike);
        }
        n = MOE_MIN(strip, alike);
        if (!status)
            status = encode_some(w, c, r, n);
    }
    return status;
}

/* All rows of a task, input by input. */
static moe_status encode_task_run(encode_worker *w, const encode_task *task)
{
    const conv_tensor *t = task->t;
    const uint64_t bytes = task->n_rows * encode_row_bytes(task->type, t->row_len);
    moe_status status = MOE_OK;
    w->error_sum = w->square_sum = w->cost_sum = w->energy_sum = 0;
    w->blocks.n = 0;
    w->rounded = false;
    if (!buf_reserve(&w->blocks, (size_t)bytes))
        status = fail_memory(&w->error, w->mem, t->name, bytes);
    for (uint64_t at = 0; at < task->n_rows && !status;) {
        const uint64_t in_rows = t->made ? t->n_rows : t->n_rows / t->n_inputs;
        encode_chunk c = {.t = t, .type = task->type, .bits = task->bits, .row = task->row + at,
                          .at = at};
        c.in_row = c.row % in_rows;
        c.in = t->made ? NULL : &t->inputs[c.row / in_rows];
        c.n_rows = MOE_MIN(task->n_rows - at, in_rows - c.in_row);
        status = encode_rows(w, &c);
        at += c.n_rows;
    }
    w->blocks.n = (size_t)bytes;
    return status ? status : w->state->sink->put(w->state->sink->self, w, task);
}

/* ------------------------------------------------------------------------------- threads -- */

/* Takes the next task; false if there is none or the work is over. */
static bool encode_next(encode_worker *w, encode_task *task)
{
    encode_state *st = w->state;
    plat_mutex_lock(&st->lock);
    if (!st->status && cancelled(st->options->cancel))
        st->status = fail(&st->error, MOE_ERR_CANCELLED, NULL, "cancelled");
    const bool more = !st->status && st->sink->next(st->sink->self, task);
    plat_mutex_unlock(&st->lock);
    return more;
}

static void encode_finish(encode_worker *w, const encode_task *task, moe_status status)
{
    encode_state *st = w->state;
    conv_progress progress = {task->t->name, 0, st->total};
    plat_mutex_lock(&st->lock);
    progress.done = st->done += task->n_rows * task->t->row_len;
    if (w->rounded)
        st->source->tensors[task->t - st->source->tensors].is_rounded = true;
    if (status && !st->status) {
        st->status = status;
        st->error = w->error;
    }
    plat_mutex_unlock(&st->lock);
    if (status && st->sink->stop)
        st->sink->stop(st->sink->self);
    if (w->first && st->options->progress)
        st->options->progress(st->options->user, &progress);
}

static void encode_work(void *arg)
{
    encode_worker *w = arg;
    encode_task task;
    while (encode_next(w, &task))
        encode_finish(w, &task, encode_task_run(w, &task));
    text_buf *bufs[] = {&w->raw,    &w->floats, &w->blocks,  &w->scales,
                        &w->packed, &w->back,   &w->columns, &w->room};
    for (size_t i = 0; i < MOE_COUNT(bufs); i++)
        buf_free(bufs[i]);
    if (w->decoder)
        moefile_decoder_close(w->mem, w->decoder);
    mem_free(w->mem, w->decoder);
    mem_free(w->mem, w->segment);
    if (w->state->sink->leave)
        w->state->sink->leave(w);
}

/* Runs the sink's tasks on all threads; `done` weights of the model were encoded before. */
static moe_status encode_all(conv_job *job, const encode_sink *sink, uint64_t done,
                             moe_error *error)
{
    enum { MAX_THREADS = 256 };
    encode_state st = {.source = &job->source, .options = &job->options, .sink = sink,
                       .total = job->n_weights, .done = done};
    const uint32_t asked = job->options.n_threads ? job->options.n_threads : plat_n_cores();
    const uint32_t n = MOE_MIN(MOE_MAX(asked, 1u), (uint32_t)MAX_THREADS);
    encode_worker *workers = mem_alloc(&job->mem, n, sizeof *workers);
    plat_thread *threads = mem_alloc(&job->mem, n, sizeof *threads);
    uint32_t started = 1;
    st.cpu = cpu_detect();
    st.input = input_select(st.cpu);
    for (int i = 0; i < 256; i++)
        st.fp8[i] = fp8_value((uint8_t)i);
    if (!workers || !threads || !plat_mutex_init(&st.lock)) {
        mem_free(&job->mem, workers);
        mem_free(&job->mem, threads);
        return fail_memory(error, &job->mem, "threads", n * sizeof *workers);
    }
    for (uint32_t i = 0; i < n; i++) {
        workers[i] = (encode_worker){.state = &st, .first = i == 0, .mem = &job->mem};
        text_buf *bufs[] = {&workers[i].raw,     &workers[i].blocks, &workers[i].scales,
                            &workers[i].packed,  &workers[i].floats, &workers[i].back,
                            &workers[i].columns, &workers[i].room};
        for (size_t b = 0; b < MOE_COUNT(bufs); b++)
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

/* -------------------------------------------------------------------------------- GGUF -- */

/* The sink of a GGUF file: every block has its place, in any order. */
typedef struct gguf_sink {
    const conv_source *source;
    const conv_writer *writer;
    size_t tensor;          // the cursor
    uint64_t row;
} gguf_sink;

static bool gguf_sink_next(void *self, encode_task *task)
{
    gguf_sink *g = self;
    while (g->tensor < g->source->n_tensors && g->row == g->source->tensors[g->tensor].n_rows) {
        g->tensor++;
        g->row = 0;
    }
    if (g->tensor == g->source->n_tensors)
        return false;
    const conv_tensor *t = &g->source->tensors[g->tensor];
    const uint64_t unit = t->interleave ? t->interleave : 1;
    const uint64_t n = MOE_MAX(CONVERT_CHUNK_FLOATS / t->row_len / unit, 1) * unit;
    *task = (encode_task){.t = t, .type = t->target, .row = g->row,
                          .n_rows = MOE_MIN(n, t->n_rows - g->row)};
    g->row += task->n_rows;
    return true;
}

static moe_status gguf_sink_put(void *self, encode_worker *w, const encode_task *task)
{
    const gguf_sink *g = self;
    return writer_put(g->writer, w->blocks.data, w->blocks.n,
                      task->t->offset + task->row * encode_row_bytes(task->type, task->t->row_len),
                      &w->error);
}

/* Encodes all tensors into the open file. */
static moe_status encode_gguf(conv_job *job, const conv_writer *writer, moe_error *error)
{
    gguf_sink g = {.source = &job->source, .writer = writer};
    const encode_sink sink = {.self = &g, .next = gguf_sink_next, .put = gguf_sink_put};
    return encode_all(job, &sink, 0, error);
}

#endif
