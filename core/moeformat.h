/* core/moeformat.h - the parts of a .moe file as they stand in it, for its reader (core/moefile.c)
 * and its writer (convert/moe_write.c). docs/format.md is the specification.
 *
 *     header | directory: keys, receipt, tensors, records, slices, segments |
 *     records, at multiples of 64, or of 4096 to be mapped
 *
 * All numbers are little-endian. Owns nothing. */
#ifndef MOE_CORE_MOEFORMAT_H
#define MOE_CORE_MOEFORMAT_H

#include "base.h"

#define MOEFILE_MAGIC "\x89MOE\r\n\x1a\n"

enum {
    MOEFILE_MAJOR = 1,
    MOEFILE_MINOR = 0,
    MOEFILE_PAGE = 4096,             // records that are used where they are begin with one
    MOEFILE_SLICE_ALIGN = 64,        // all others, and slices in a record
    MOEFILE_TABLE_ALIGN = 8,
    MOEFILE_SEGMENT_BYTES = 1 << 20, // of blocks, at most
    MOEFILE_SEGMENT_EXTRA = 4096,    // that a segment's frames may take more than its blocks
    MOEFILE_MAX_DIRECTORY_BYTES = 64 << 20,
    MOEFILE_MAX_EXPANSION = 16       // of a whole file, by decoding
};

/* Features that a reader must know to read the file. */
enum {
    MOEFILE_FEATURE_DRAFT_PLANES = 1, // of a draft, with other planes: refused
    MOEFILE_FEATURE_PLANES = 2,
    MOEFILE_KNOWN_FEATURES = MOEFILE_FEATURE_PLANES
};

typedef struct moefile_header {
    uint8_t magic[8];
    uint16_t major, minor;
    uint32_t header_bytes;
    uint64_t features;
    uint64_t file_bytes;
    uint64_t directory_bytes; // behind the header
    uint32_t n_keys, n_receipt, n_tensors, n_records, n_slices, n_segments;
    uint64_t keys_bytes, receipt_bytes, tensors_bytes;
    uint64_t data_offset;     // where records begin; zeros before it
    uint64_t reserved[3];     // 0
    uint64_t root;            // XXH64 of all of the header before this and of the directory
} moefile_header;
_Static_assert(sizeof(moefile_header) == 128, "as in the file");

typedef enum moefile_kind { MOEFILE_DENSE = 1, MOEFILE_EXPERT = 2 } moefile_kind;

enum { MOEFILE_OPTIONAL = 1 }; // flag: a reader that does not know the kind may skip the record

#define MOEFILE_NONE UINT32_MAX // no layer, no expert

typedef struct moefile_record {
    uint32_t kind, flags;
    uint32_t layer, expert;
    uint32_t first_slice, n_slices;
    uint64_t offset;          // in the file
    uint64_t stored_bytes;    // without the padding behind it
    uint64_t decoded_bytes;   // of its slices
    uint64_t hash;            // XXH64 of the stored bytes
    uint64_t reserved;        // 0
} moefile_record;
_Static_assert(sizeof(moefile_record) == 64, "as in the file");

typedef enum moefile_encoding { MOEFILE_RAW = 0, MOEFILE_PLANES = 1 } moefile_encoding;

/* One matrix of a stack of experts, or a tensor. */
typedef struct moefile_slice {
    uint32_t tensor, part;
    uint32_t type;            // id of quant/types.def
    uint8_t layout;           // 0: rows of blocks as in GGUF
    uint8_t encoding;
    uint16_t reserved;        // 0
    uint64_t offset;          // in the record
    uint64_t stored_bytes;
    uint32_t segment_blocks;  // of all segments but the last; raw: 0
    uint32_t first_segment;   // in the table of segments
    float error;              // relative squared error against the source; negative: not measured
    uint32_t reserved2;       // 0
} moefile_slice;
_Static_assert(sizeof(moefile_slice) == 48, "as in the file");

/* Where a slice begins behind what ends at `at` in its record: raw ones at a line of the cache. */
MOE_UNUSED static uint64_t moefile_slice_start(uint64_t at, uint8_t encoding)
{
    return encoding == MOEFILE_RAW ? align_up(at, MOEFILE_SLICE_ALIGN) : at;
}

/* ------------------------------------------------------------------------------- checksum -- */

/* XXH64 with seed 0, by its public specification (Y. Collet, xxhash_spec.md). */
typedef struct xxh64_state {
    uint64_t lane[4];
    uint64_t total_bytes;
    uint8_t rest[32];
} xxh64_state;

#define XXH64_P1 0x9e3779b185ebca87u
#define XXH64_P2 0xc2b2ae3d27d4eb4fu
#define XXH64_P3 0x165667b19e3779f9u
#define XXH64_P4 0x85ebca77c2b2ae63u
#define XXH64_P5 0x27d4eb2f165667c5u

MOE_INLINE uint64_t xxh64_rotate(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

MOE_INLINE uint64_t xxh64_load(const uint8_t *p, size_t bytes)
{
    uint64_t x = 0;
    memcpy(&x, p, bytes);
    return x;
}

MOE_INLINE uint64_t xxh64_round(uint64_t lane, uint64_t x)
{
    return xxh64_rotate(lane + x * XXH64_P2, 31) * XXH64_P1;
}

MOE_UNUSED static void xxh64_begin(xxh64_state *s)
{
    *s = (xxh64_state){.lane = {XXH64_P1 + XXH64_P2, XXH64_P2, 0, 0 - XXH64_P1}};
}

/* Stripes of 32 bytes. */
static const uint8_t *xxh64_stripes(xxh64_state *s, const uint8_t *p, size_t n)
{
    uint64_t a = s->lane[0], b = s->lane[1], c = s->lane[2], d = s->lane[3];
    for (; n; n--, p += 32) {
        a = xxh64_round(a, xxh64_load(p, 8));
        b = xxh64_round(b, xxh64_load(p + 8, 8));
        c = xxh64_round(c, xxh64_load(p + 16, 8));
        d = xxh64_round(d, xxh64_load(p + 24, 8));
    }
    s->lane[0] = a, s->lane[1] = b, s->lane[2] = c, s->lane[3] = d;
    return p;
}

MOE_UNUSED static void xxh64_add(xxh64_state *s, const void *data, uint64_t bytes)
{
    const uint8_t *p = data;
    const size_t held = (size_t)(s->total_bytes % 32);
    s->total_bytes += bytes;
    if (held) {
        const size_t n = (size_t)MOE_MIN(bytes, 32 - held);
        memcpy(s->rest + held, p, n);
        p += n;
        bytes -= n;
        if (held + n < 32)
            return;
        xxh64_stripes(s, s->rest, 1);
    }
    p = xxh64_stripes(s, p, (size_t)(bytes / 32));
    if (bytes % 32)
        memcpy(s->rest, p, (size_t)(bytes % 32));
}

MOE_UNUSED static uint64_t xxh64_end(const xxh64_state *s)
{
    uint64_t h = s->lane[2] + XXH64_P5; // lane 2 is the seed while there were no stripes
    if (s->total_bytes >= 32) {
        h = xxh64_rotate(s->lane[0], 1) + xxh64_rotate(s->lane[1], 7) +
            xxh64_rotate(s->lane[2], 12) + xxh64_rotate(s->lane[3], 18);
        for (int i = 0; i < 4; i++)
            h = (h ^ xxh64_round(0, s->lane[i])) * XXH64_P1 + XXH64_P4;
    }
    h += s->total_bytes;
    const uint8_t *p = s->rest;
    size_t left = (size_t)(s->total_bytes % 32);
    for (; left >= 8; left -= 8, p += 8)
        h = xxh64_rotate(h ^ xxh64_round(0, xxh64_load(p, 8)), 27) * XXH64_P1 + XXH64_P4;
    for (; left >= 4; left -= 4, p += 4)
        h = xxh64_rotate(h ^ xxh64_load(p, 4) * XXH64_P1, 23) * XXH64_P2 + XXH64_P3;
    for (; left; left--, p++)
        h = xxh64_rotate(h ^ *p * XXH64_P5, 11) * XXH64_P1;
    h = (h ^ h >> 33) * XXH64_P2;
    h = (h ^ h >> 29) * XXH64_P3;
    return h ^ h >> 32;
}

MOE_UNUSED static uint64_t xxh64(const void *data, uint64_t bytes)
{
    xxh64_state s;
    xxh64_begin(&s);
    xxh64_add(&s, data, bytes);
    return xxh64_end(&s);
}

/* The root hash of a file, by its header (whose own field is not looked at) and its directory. */
MOE_UNUSED static uint64_t moefile_root(const moefile_header *header, const void *directory)
{
    xxh64_state s;
    xxh64_begin(&s);
    xxh64_add(&s, header, offsetof(moefile_header, root));
    xxh64_add(&s, directory, header->directory_bytes);
    return xxh64_end(&s);
}

/* ------------------------------------------------------------------------------- segments -- */

/* A segment is a run of blocks, stored as frames of its planes: for each field of the type a plane,
 * which is the field's bytes of all the blocks. This moves a field of n blocks into a plane or
 * back. */
MOE_INLINE void moefile_copy_field(uint8_t *dst, size_t dst_step, const uint8_t *src,
                                   size_t src_step, size_t n, const size_t width)
{
    for (size_t i = 0; i < n; i++)
        memcpy(dst + i * dst_step, src + i * src_step, width);
}

MOE_UNUSED static void moefile_move_field(uint8_t *dst, size_t dst_step, const uint8_t *src,
                                          size_t src_step, size_t n, size_t width)
{
    switch (width) { // constants, so that a copy is a few instructions
    case 1: moefile_copy_field(dst, dst_step, src, src_step, n, 1); break;
    case 2: moefile_copy_field(dst, dst_step, src, src_step, n, 2); break;
    case 4: moefile_copy_field(dst, dst_step, src, src_step, n, 4); break;
    case 16: moefile_copy_field(dst, dst_step, src, src_step, n, 16); break;
    case 32: moefile_copy_field(dst, dst_step, src, src_step, n, 32); break;
    case 64: moefile_copy_field(dst, dst_step, src, src_step, n, 64); break;
    case 128: moefile_copy_field(dst, dst_step, src, src_step, n, 128); break;
    default: moefile_copy_field(dst, dst_step, src, src_step, n, width);
    }
}

#endif
