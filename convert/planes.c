/* convert/planes.c - blocks -> planes -> frames of zstd, most of which hold literals only.
 *
 * The bytes of quantized weights have a skewed distribution but do not repeat: what a match saves
 * is less than what it costs. So zstd is told, through its interface for sequence producers, that
 * there are none, and codes each plane's bytes with Huffman codes. Those are a bit long at least;
 * planes that would need little more, such as scales that are nearly all alike, are also compressed
 * as usual, and the shorter frame is taken. Any zstd decoder reads both. */
#ifndef MOE_CONVERT_PLANES_C
#define MOE_CONVERT_PLANES_C

#include "convert.h"

#ifdef MOE_NO_ZSTD
#error "the converter needs libzstd"
#endif
#if ZSTD_VERSION_NUMBER < 10504
#error "the converter needs libzstd 1.5.4 or later, for ZSTD_registerSequenceProducer"
#endif

enum {
    PLANES_BLOCK_BYTES = 128 << 10,  // the largest block of a frame
    PLANES_FRAME_EXTRA = 64,         // a stored frame: header, headers of blocks, checksum
    PLANES_MAX_SEGMENTS = 4096       // in one task
};

/* One thread's compressors. */
typedef struct planes_packer {
    moe_mem *mem;
    ZSTD_CCtx *literals, *matches;
    uint8_t *plane;     // [MOEFILE_SEGMENT_BYTES]
    uint8_t *rotated;   // [MOEFILE_SEGMENT_BYTES]: blocks, of types that are
    text_buf out;       // segments
    uint32_t *sizes;    // [PLANES_MAX_SEGMENTS] of each
    size_t n_segments;
} planes_packer;

/* The sequence producer: the whole block is literals. */
static size_t planes_literals(void *state, ZSTD_Sequence *out, size_t capacity, const void *src,
                              size_t src_bytes, const void *dict, size_t dict_bytes, int level,
                              size_t window)
{
    (void)state, (void)src, (void)dict, (void)dict_bytes, (void)level, (void)window;
    if (!capacity)
        return ZSTD_SEQUENCE_PRODUCER_ERROR;
    out[0] = (ZSTD_Sequence){.litLength = (unsigned)src_bytes};
    return 1;
}

static void planes_close(planes_packer *p)
{
    if (!p)
        return;
    ZSTD_freeCCtx(p->literals);
    ZSTD_freeCCtx(p->matches);
    mem_free(p->mem, p->plane);
    mem_free(p->mem, p->rotated);
    mem_free(p->mem, p->sizes);
    buf_free(&p->out);
    mem_free(p->mem, p);
}

/* A compressor with the settings of a strategy, or NULL. Frames are of 1 MiB at most. */
static ZSTD_CCtx *planes_compressor(int strategy, int hash_log, int chain_log, int search_log)
{
    const struct { ZSTD_cParameter name; int value; } params[] = {
        {ZSTD_c_strategy, strategy}, {ZSTD_c_windowLog, 20}, {ZSTD_c_hashLog, hash_log},
        {ZSTD_c_chainLog, chain_log}, {ZSTD_c_searchLog, search_log}, {ZSTD_c_minMatch, 4},
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
    p->plane = mem_alloc_uncleared(mem, MOEFILE_SEGMENT_BYTES, 1);
    p->rotated = mem_alloc_uncleared(mem, MOEFILE_SEGMENT_BYTES, 1);
    p->sizes = mem_alloc(mem, PLANES_MAX_SEGMENTS, sizeof *p->sizes);
    // Without matches the strategy only decides what is worth coding: this one wants the least. The
    // tables of the finders that are not used are made small.
    p->literals = planes_compressor(ZSTD_btultra2, 6, 6, 1);
    p->matches = planes_compressor(ZSTD_btopt, 14, 14, 4);
    if (!p->plane || !p->rotated || !p->sizes || !p->literals || !p->matches) {
        planes_close(p);
        return NULL;
    }
    ZSTD_registerSequenceProducer(p->literals, NULL, planes_literals);
    return p;
}

/* A frame of n bytes as they are, in blocks of zstd's type for that (RFC 8878, section 3.1.1). */
static size_t planes_store(uint8_t *dst, const uint8_t *src, size_t n)
{
    uint8_t *p = dst;
    const uint64_t hash = xxh64(src, n);
    const uint32_t magic = 0xfd2fb528;
    memcpy(p, &magic, 4);
    p[4] = 2 << 6 | 1 << 5 | 1 << 2; // the size in 4 bytes, a single segment, a checksum
    memcpy(p + 5, &(uint32_t){(uint32_t)n}, 4);
    p += 9;
    for (size_t at = 0; at < n;) {
        const size_t some = MOE_MIN(n - at, PLANES_BLOCK_BYTES);
        const uint32_t header = (uint32_t)(some << 3) | (at + some == n);
        memcpy(p, &header, 3);
        memcpy(p + 3, src + at, some);
        p += 3 + some;
        at += some;
    }
    memcpy(p, &hash, 4);
    return (size_t)(p + 4 - dst);
}

/* The frame of n bytes; 0 if zstd fails. */
static size_t planes_compress(planes_packer *p, uint8_t *dst, size_t room, const uint8_t *src,
                              size_t n)
{
    const size_t bytes = ZSTD_compress2(p->literals, dst, room, src, n);
    if (ZSTD_isError(bytes) || bytes > n / 4)
        return ZSTD_isError(bytes) ? 0 : bytes;
    const size_t other = ZSTD_compress2(p->matches, dst, room, src, n);
    if (ZSTD_isError(other) || other <= bytes)
        return ZSTD_isError(other) ? 0 : other;
    return ZSTD_compress2(p->literals, dst, room, src, n);
}

/* Appends the frame of a plane of n bytes: coded if that saves 1 %, else stored. */
static moe_status planes_frame(planes_packer *p, const uint8_t *plane, size_t n, const char *name,
                               moe_error *error)
{
    const size_t room = MOE_MAX(ZSTD_compressBound(n), n + PLANES_FRAME_EXTRA);
    if (!buf_reserve(&p->out, room))
        return fail_memory(error, p->mem, name, room);
    uint8_t *dst = p->out.data + p->out.n;
    size_t bytes = planes_compress(p, dst, room, plane, n);
    if (!bytes)
        return fail(error, MOE_ERR_MEMORY, name, "cannot compress %zu bytes", n);
    if (bytes > n - n / 100)
        bytes = planes_store(dst, plane, n);
    p->out.n += bytes;
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

/* Appends a segment: the planes of blocks. */
static moe_status planes_pack(planes_packer *p, const moefile_blocks *b, const uint8_t *blocks,
                              const char *name, moe_error *error)
{
    const moe_quant *type = b->quant;
    const size_t start = p->out.n;
    size_t offset = 0;
    moe_status status = MOE_OK;
    if (p->n_segments == PLANES_MAX_SEGMENTS)
        return fail(error, MOE_ERR_LIMIT, name, "expected at most %d segments in a head",
                    PLANES_MAX_SEGMENTS);
    if (type->rotate) {
        blocks = memcpy(p->rotated, blocks, b->n * type->block_bytes);
        type->rotate(p->rotated, b->n, false);
    }
    for (size_t i = 0; i < QUANT_MAX_FIELDS && type->fields[i] && !status; i++) {
        const size_t width = type->fields[i];
        moefile_move_field(p->plane, width, blocks + offset, type->block_bytes, b->n, width);
        offset += width;
        if (offset == type->block_bytes)
            status = planes_form(p->plane, width, b, name, error);
        if (!status)
            status = planes_frame(p, p->plane, b->n * width, name, error);
    }
    p->sizes[p->n_segments++] = (uint32_t)(p->out.n - start);
    return status;
}

#endif
