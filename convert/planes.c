/* convert/planes.c - blocks -> planes -> frames of zstd, most of which hold literals only.
 *
 * A segment's planes stand in one frame, in blocks by convert/literals.c. Codes are a bit long at
 * least; planes that would need little more, such as scales that are nearly all alike, are also
 * compressed by zstd as usual, and become a frame of their own where that is shorter. */
#ifndef MOE_CONVERT_PLANES_C
#define MOE_CONVERT_PLANES_C

#include "convert.h"
#include "literals.c"

#ifdef MOE_NO_ZSTD
#error "the converter needs libzstd"
#endif

enum {
    PLANES_FRAME_HEAD = 9,           // of a frame of literals
    PLANES_FRAME_TAIL = 4,
    PLANES_MAX_SEGMENTS = 4096       // in one task
};

/* A frame that planes are added to. */
typedef struct planes_frame {
    size_t at;          // where it begins in the output; SIZE_MAX: there is none
    size_t last_block;  // where its last block does
    size_t n;           // bytes in it
    xxh64_state hash;
    lit_codes codes;    // of its last coded block
} planes_frame;

/* One thread's compressors. */
typedef struct planes_packer {
    moe_mem *mem;
    ZSTD_CCtx *matches;
    uint8_t *planes;    // [MOEFILE_SEGMENT_BYTES]
    uint8_t *rotated;   // [MOEFILE_SEGMENT_BYTES]: blocks, of types that are
    planes_frame frame;
    text_buf out;       // segments
    uint32_t *sizes;    // [PLANES_MAX_SEGMENTS] of each
    size_t n_segments;
} planes_packer;

static void planes_close(planes_packer *p)
{
    if (!p)
        return;
    ZSTD_freeCCtx(p->matches);
    mem_free(p->mem, p->planes);
    mem_free(p->mem, p->rotated);
    mem_free(p->mem, p->sizes);
    buf_free(&p->out);
    mem_free(p->mem, p);
}

/* For planes that repeat, or NULL. Frames are of 1 MiB at most. */
static ZSTD_CCtx *planes_compressor(void)
{
    const struct { ZSTD_cParameter name; int value; } params[] = {
        {ZSTD_c_strategy, ZSTD_btopt}, {ZSTD_c_windowLog, 20}, {ZSTD_c_hashLog, 14},
        {ZSTD_c_chainLog, 14}, {ZSTD_c_searchLog, 4}, {ZSTD_c_minMatch, 4},
        {ZSTD_c_targetLength, 0}, {ZSTD_c_checksumFlag, 1}, {ZSTD_c_contentSizeFlag, 1},
        {ZSTD_c_dictIDFlag, 0}};
    ZSTD_CCtx *zstd = ZSTD_createCCtx();
    for (size_t i = 0; zstd && i < MOE_COUNT(params); i++)
        if (ZSTD_isError(ZSTD_CCtx_setParameter(zstd, params[i].name, params[i].value))) {
            ZSTD_freeCCtx(zstd);
            zstd = NULL;
        }
    return zstd;
}

/* NULL if there is no memory. */
static planes_packer *planes_open(moe_mem *mem)
{
    planes_packer *p = mem_alloc(mem, 1, sizeof *p);
    if (!p)
        return NULL;
    p->mem = p->out.mem = mem;
    p->planes = mem_alloc_uncleared(mem, MOEFILE_SEGMENT_BYTES, 1);
    p->rotated = mem_alloc_uncleared(mem, MOEFILE_SEGMENT_BYTES, 1);
    p->sizes = mem_alloc(mem, PLANES_MAX_SEGMENTS, sizeof *p->sizes);
    p->matches = planes_compressor();
    if (!p->planes || !p->rotated || !p->sizes || !p->matches) {
        planes_close(p);
        return NULL;
    }
    return p;
}

/* ------------------------------------------------------------------------------- frames -- */

static void planes_begin_frame(planes_packer *p)
{
    p->frame = (planes_frame){.at = p->out.n};
    xxh64_begin(&p->frame.hash);
    p->out.n += PLANES_FRAME_HEAD;
}

/* Writes what is only known at a frame's end (RFC 8878, section 3.1.1). */
static void planes_end_frame(planes_packer *p)
{
    const uint32_t magic = 0xfd2fb528, bytes = (uint32_t)p->frame.n;
    const uint64_t hash = xxh64_end(&p->frame.hash);
    uint8_t *head = p->out.data + p->frame.at;
    memcpy(head, &magic, 4);
    head[4] = 2 << 6 | 1 << 5 | 1 << 2; // the size in 4 bytes, a single segment, a checksum
    memcpy(head + 5, &bytes, 4);
    p->out.data[p->frame.last_block] |= 1;
    memcpy(p->out.data + p->out.n, &hash, PLANES_FRAME_TAIL);
    p->out.n += PLANES_FRAME_TAIL;
    p->frame.at = SIZE_MAX;
}

/* Adds a plane of n bytes to the frame. */
static void planes_add_literals(planes_packer *p, const uint8_t *plane, size_t n)
{
    for (size_t at = 0, some; at < n; at += some) {
        some = MOE_MIN(n - at, LIT_BLOCK_BYTES);
        p->frame.last_block = p->out.n;
        p->out.n += lit_put_block(&p->frame.codes, p->out.data + p->out.n, plane + at, some);
    }
    p->frame.n += n;
    xxh64_add(&p->frame.hash, plane, n);
}

/* Puts the frame of zstd's own at `from` in the place of what was added from `start` on. */
static void planes_replace(planes_packer *p, const planes_frame *before, size_t start, size_t from,
                           size_t bytes)
{
    p->frame = *before;
    p->out.n = start;
    if (p->frame.at != SIZE_MAX)
        planes_end_frame(p);
    memmove(p->out.data + p->out.n, p->out.data + from, bytes);
    p->out.n += bytes;
}

/* Appends a plane of n bytes. */
static moe_status planes_add(planes_packer *p, const uint8_t *plane, size_t n, const char *name,
                             moe_error *error)
{
    const size_t ends = PLANES_FRAME_HEAD + PLANES_FRAME_TAIL, start = p->out.n;
    const size_t literals = n + (n / LIT_BLOCK_BYTES + 1) * LIT_BLOCK_EXTRA + ends;
    const size_t room = literals + ZSTD_compressBound(n);
    const planes_frame before = p->frame;
    if (!buf_reserve(&p->out, room))
        return fail_memory(error, p->mem, name, room);
    if (p->frame.at == SIZE_MAX)
        planes_begin_frame(p);
    planes_add_literals(p, plane, n);
    const size_t bytes = p->out.n - start, from = start + literals;
    if (bytes <= ends || bytes > n / 4)
        return MOE_OK;
    const size_t other =
        ZSTD_compress2(p->matches, p->out.data + from, ZSTD_compressBound(n), plane, n);
    if (ZSTD_isError(other))
        return fail(error, MOE_ERR_MEMORY, name, "cannot compress %zu bytes", n);
    if (other + ends < bytes) // planes behind it need a frame again
        planes_replace(p, &before, start, from, other);
    return MOE_OK;
}

/* Brings the last field's plane into the form that it has in files. */
static moe_status planes_form(uint8_t *plane, size_t width, const moefile_blocks *b,
                              const char *name, moe_error *error)
{
    const size_t row = b->per_row * width;
    for (size_t at = 0; b->quant->to_plane && at < b->n * width; at += row)
        if (!b->quant->to_plane(plane + at, row))
            return fail(error, MOE_ERR_FORMAT, name,
                        "expected rows of %s on a path of their trellis, got others: the file they "
                        "come from is damaged, or not made by moe-convert", b->quant->name);
    return MOE_OK;
}

/* Moves blocks into planes, one behind another. */
static moe_status planes_split(planes_packer *p, const moefile_blocks *b, const uint8_t *blocks,
                               const char *name, moe_error *error)
{
    const moe_quant *type = b->quant;
    size_t width = 0;
    uint8_t *plane = p->planes;
    if (type->rotate) {
        blocks = memcpy(p->rotated, blocks, b->n * type->block_bytes);
        type->rotate(p->rotated, b->n, false);
    }
    for (size_t i = 0, offset = 0; offset < type->block_bytes; i++, offset += width) {
        width = type->fields[i];
        plane = p->planes + offset * b->n;
        moefile_move_field(plane, width, blocks + offset, type->block_bytes, b->n, width);
    }
    return planes_form(plane, width, b, name, error);
}

/* How many fields from this one on are coded as if they were one: small planes of parts of scales,
 * if they are alike enough that a tree less is worth more. *width: of all of them. */
static size_t planes_join(const planes_packer *p, const moefile_blocks *b, size_t field,
                          size_t offset, size_t *width)
{
    const uint8_t *fields = b->quant->fields, *plane = p->planes + offset * b->n;
    size_t n = 1;
    *width = fields[field];
    for (; offset + *width < b->quant->block_bytes; n++) {
        const size_t next = fields[field + n], both = *width + next;
        if (next == 1 || next != fields[field] || next * b->n < LIT_MIN_BYTES ||
            both * b->n > LIT_SMALL_BYTES ||
            lit_estimate(plane, both * b->n) >=
                lit_estimate(plane, *width * b->n) +
                    lit_estimate(plane + *width * b->n, next * b->n))
            break;
        *width = both;
    }
    return n;
}

/* Appends a segment: the planes of blocks. */
static moe_status planes_pack(planes_packer *p, const moefile_blocks *b, const uint8_t *blocks,
                              const char *name, moe_error *error)
{
    const size_t start = p->out.n;
    if (p->n_segments == PLANES_MAX_SEGMENTS)
        return fail(error, MOE_ERR_LIMIT, name, "expected at most %d segments in a head",
                    PLANES_MAX_SEGMENTS);
    p->frame.at = SIZE_MAX;
    moe_status status = planes_split(p, b, blocks, name, error);
    for (size_t i = 0, offset = 0, width; !status && offset < b->quant->block_bytes;
         offset += width) {
        i += planes_join(p, b, i, offset, &width);
        status = planes_add(p, p->planes + offset * b->n, b->n * width, name, error);
    }
    if (p->frame.at != SIZE_MAX && !status)
        planes_end_frame(p);
    p->sizes[p->n_segments++] = (uint32_t)(p->out.n - start);
    return status;
}

#endif
