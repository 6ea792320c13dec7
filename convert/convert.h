/* convert/convert.h - the seams of the converter: source -> plan -> encoder -> writer.
 *
 *     source   convert/hf.c, convert/gguf_source.c, convert/moe_source.c: metadata, as GGUF's keys
 *              and values, and tensors in GGUF's names and shapes, each a list of places in files
 *              (nothing is read yet)
 *     plan     convert/plan.c: the type of each tensor
 *     encoder  convert/encode.c: rows from their places to blocks of that type, on all cores
 *     writer   convert/gguf_write.c, convert/moe_write.c: a header, places for tensors, an atomic
 *              end
 *
 * A converter is one translation unit: moe.c with its internals, then convert/convert.c. Names and
 * shapes come from the runtime's tables of families and nowhere else.
 * Must never: hold more than a few rows of a tensor, or leave a half-written file under its
 * name. */
#ifndef MOE_CONVERT_CONVERT_H
#define MOE_CONVERT_CONVERT_H

#ifndef MOE_CORE_BASE_H
#include "../moe.c"
#endif

enum {
    CONVERT_MAX_FILES = 1000,      // shards; each is kept open
    CONVERT_MAX_NAME_BYTES = 512,
    CONVERT_CHUNK_FLOATS = 1 << 20, // of work for one thread at a time
    CONVERT_STRIP_FLOATS = 1 << 14, // of them that are floats at the same time
    CONVERT_MAX_ROW = 1 << 24
};

/* ------------------------------------------------------------------------------- sources -- */

/* An open file, and what it was when it was opened. */
typedef struct conv_file {
    char *path;
    plat_file os;
    uint64_t bytes, inode, device;
    int64_t mtime_s, mtime_ns;
} conv_file;

/* Codes and scales that stand in two places, of which the reader makes blocks. */
typedef enum conv_apart {
    APART_NOT,
    APART_MXFP4, // byte i of a row has codes 2i and 2i + 1; an exponent for each 32
    APART_NVFP4, // the same; E4M3 for each 16
    APART_INT    // of Q4_0 the same codes, of Q8_0 bytes, 128 above the number
} conv_apart;

/* A matrix in a file: rows one after another. */
typedef struct conv_input {
    const conv_file *file;
    const char *name;          // as the source calls it
    uint64_t offset;
    const moe_quant *type;     // NULL: FP8 E4M3 with scales beside it
    conv_apart apart;
    const conv_file *scale_file; // of FP8, and of what stands apart
    uint64_t scale_offset;     // FP8, APART_INT: scale_type [ceil((skip + n_row) / scale_rows)]
                               //                            [ceil(row_len / scale_cols)]
                               // MXFP4, NVFP4: byte [n_row][row_len / 32 or 16]
    uint32_t scale_rows;       // of FP8: as many rows, and columns, share a scale; UINT32_MAX: all
    uint32_t scale_cols;
    uint32_t scale_skip;       // of FP8: rows of the first block that lie before the first row
    const moe_quant *scale_type;
    float factor;              // of all weights, which then are not kept in `type`; 0: 1
    uint32_t row_step;         // from row to row, in rows of the file; 0: 1
    uint32_t transposed;       // rows are columns of the file's matrix, which has so many; 0: rows
    uint32_t planes;           // of a .moe source: the compressed slice, from 1; 0: plain rows
} conv_input;

/* What is known of the columns of a tensor's matrices, from --imatrix. */
typedef struct conv_importance {
    const float *sums;         // [n_matrix][row_len]: of squares of what is multiplied with them
    const float *counts;       // [n_matrix]: how many rows that was
    uint32_t n_matrix;         // 0: nothing is known; 1: one for all
} conv_importance;

/* Columns of value heads, `dim` each: in the source those of one key head stand together, in the
 * result heads of all key heads take turns. */
typedef struct conv_tile {
    uint32_t head_k, each, dim;
} conv_tile;

/* A tensor of the result. Its rows come from `inputs`, an equal part from each; or from `made`. */
typedef struct conv_tensor {
    const char *name;
    uint32_t n_dims;
    uint64_t dims[4];          // dims[0] is contiguous; unused ones are 1
    uint64_t row_len, n_rows;  // as they are worked on
    conv_input *inputs;
    uint32_t n_inputs;
    const moe_quant **source_types; // [n_inputs], if they differ
    const float *made;         // [n_elements]
    uint32_t interleave;       // rows of a head, whose halves become neighbours; 0: order is kept
    bool plus_1;
    bool minus_exp;            // -exp(x) instead of x
    conv_tile tile;            // columns in another order; head_k 0: as they are
    bool is_vector;            // the runtime wants floats: norms, biases
    bool is_router;
    bool is_kept;              // --keep says what it becomes
    bool is_rounded;           // scales were, when it was encoded
    const moe_quant *target;   // by the plan
    double bits;               // by the plan: of a trellis-coded target, per weight on disk; 0: the
                               // type's own
    const moe_quant **part_types; // by the plan: [dims[2]] of a stack of experts, if they differ
    const double *part_bits;   // by the plan: [dims[2]] their rates, if they differ
    conv_importance importance;
    uint64_t bytes;            // of the result
    uint64_t stored_bytes;     // of it, on disk: less where it is compressed
    uint64_t offset;           // in the output file
} conv_tensor;

typedef struct conv_source {
    moe_mem *mem;
    text_arena arena;          // everything below but buffers
    conv_file *files;          // [CONVERT_MAX_FILES]
    uint32_t n_files;
    moe_directory *dir;        // of a GGUF source
    moe_directory *imatrix;    // NULL: without
    text_buf kv;               // keys and values as they stand in a GGUF file
    uint64_t n_kv;
    conv_tensor *tensors;
    size_t n_tensors;
    char arch[64];
    uint32_t n_layer, n_expert;
    bool tied;                 // the embedding is the output matrix
    bool has_file_type;        // kv holds general.file_type
    uint64_t alignment;
    char *notes[16];           // what the user should know
    uint32_t n_notes;
} conv_source;

/* ------------------------------------------------------------------------------- options -- */

typedef struct conv_keep {
    const char *pattern;       // POSIX extended, on GGUF names
    const moe_quant *type;
} conv_keep;

/* What of a .moe file is compressed. */
typedef enum conv_store {
    CONV_STORE_AUTO, // what saves CONV_AUTO_PERCENT or more; the rest is used from the map
    CONV_STORE_RAW,
    CONV_STORE_ZSTD  // what saves 1 % or more
} conv_store;

enum { CONV_AUTO_PERCENT = 10 };

typedef struct conv_progress {
    const char *tensor;
    uint64_t done, total;      // weights
} conv_progress;

typedef struct conv_options {
    const char *source, *out;
    const char *quant;         // a type or a mix; NULL: as in the source
    const char *pre;           // tokenizer.ggml.pre; NULL: found
    double bits_per_weight;    // of the whole file: types are chosen to fit; 0: not asked for
    uint64_t max_bytes;        // the same for its size
    uint64_t glance;           // weights of the first look at sizes; 0: SIZE_GLANCE
    const char *imatrix;       // what `moe imatrix` has written; NULL: all columns alike
    const conv_keep *keeps;    // a later one wins
    uint32_t n_keeps;
    conv_store store;
    uint32_t n_threads;        // 0: one for each core
    bool allow_nonfinite;
    bool dry_run;
    const moe_cancel *cancel;
    void (*progress)(void *user, const conv_progress *progress);
    void *user;
} conv_options;

/* What was done, or would be. Lives until conv_close. */
typedef struct conv_job {
    moe_mem mem;
    conv_options options;
    conv_source source;
    uint64_t header_bytes, n_weights, file_bytes;
    double sampled; // the part of the weights that were encoded to know file_bytes; 1: all
    double seconds;
} conv_job;

/* The type in which rows can be kept as they are; NULL: none, and they are floats. */
MOE_INLINE const moe_quant *conv_own_type(const conv_input *in)
{
    return in->factor > 0 ? NULL : in->type;
}

/* What a matrix is kept in: its own type; FP8 in BF16, whose rounding is far below its own, and so
 * are weights with a factor that has no place. */
MOE_INLINE const moe_quant *conv_kept_type(const conv_input *in)
{
    return conv_own_type(in) ? in->type : &quant_bf16;
}

/* Whether a tensor is a stack of experts, whose matrices may have types of their own in a .moe
 * file. */
MOE_INLINE bool conv_is_experts(const conv_source *s, const conv_tensor *t)
{
    return t->n_dims == 3 && s->n_expert > 1 && t->dims[2] == s->n_expert &&
           strstr(t->name, "_exps.") != NULL;
}

/* The type of one matrix of a stack of experts, or of a tensor. */
MOE_INLINE const moe_quant *conv_part_type(const conv_tensor *t, uint32_t part)
{
    return t->part_types ? t->part_types[part] : t->target;
}

/* The rate of one, if its type is trellis-coded; 0: the type's own. */
MOE_INLINE double conv_part_bits(const conv_tensor *t, uint32_t part)
{
    return t->part_bits ? t->part_bits[part] : t->bits;
}

#endif
