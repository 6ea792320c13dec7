/* core/directory.h - what a model file contains, whichever container it came in: a directory of
 * metadata keys and of tensors.
 *
 * core/gguf.c and core/moefile.c fill a moe_directory and validate everything in it; the rest of
 * the program reads it and never sees a file. After a successful load each tensor lies inside its
 * file, has a known type, a shape whose product fits, and data that can be read.
 *
 * Owns: the mapped or copied file(s), the tables. Must never: know a model family. */
#ifndef MOE_CORE_DIRECTORY_H
#define MOE_CORE_DIRECTORY_H

#include "../quant/quant.h"
#include "base.h"

/* GGUF's value types. */
typedef enum moe_meta_type {
    META_U8, META_I8, META_U16, META_I16, META_U32, META_I32, META_F32, META_BOOL, META_STRING,
    META_ARRAY, META_U64, META_I64, META_F64, META_N_TYPES
} moe_meta_type;

/* A string of the file, not NUL-terminated. */
typedef struct moe_str {
    const char *data;
    uint64_t bytes;
} moe_str;

/* One key. Numbers and arrays are left where they are in the file, at any alignment: read them with
 * the meta_ functions. */
typedef struct moe_meta {
    const char *key;      // NUL-terminated, owned by the directory
    moe_meta_type type;
    moe_meta_type item;   // of an array; nested arrays are refused
    uint64_t n;           // items of an array, else 1
    const uint8_t *data;  // the value; of a string array, n times u64 length + bytes
    uint64_t data_bytes;
    const moe_str *strings; // of a string array: [n]; of a string: [1]
} moe_meta;

/* One matrix of a stack of experts. */
typedef struct moe_part {
    const moe_quant *quant;
    uint64_t bytes;
    uint64_t offset;        // from the start of the file
    const uint8_t *data;    // NULL if the directory was opened for metadata only
} moe_part;

typedef struct moe_tensor {
    const char *name;       // NUL-terminated, owned by the directory
    const moe_quant *quant; // NULL only if opened for metadata only and the type is not known
    uint32_t n_dims;        // 1..4
    uint64_t dims[4];       // dims[0] is contiguous; unused ones are 1
    uint64_t n_elements;
    uint64_t bytes;         // 0 if quant is NULL
    uint64_t offset;        // from the start of its file
    uint32_t file;          // which part of a split file
    const uint8_t *data;    // NULL if the directory was opened for metadata only, or with parts
    const moe_part *parts;  // [dims[2]], n_dims is 3: each matrix has its type and its place, and
                            // `quant` is that of the first; NULL: all is of one type, in one place
} moe_tensor;

/* How many runs of rows of one type a tensor is made of, and one of them. */
MOE_INLINE uint64_t tensor_n_parts(const moe_tensor *t)
{
    return t->parts ? t->dims[2] : 1;
}

MOE_INLINE moe_part tensor_part(const moe_tensor *t, uint64_t index)
{
    return t->parts ? t->parts[index] : (moe_part){t->quant, t->bytes, t->offset, t->data};
}

typedef struct moe_directory moe_directory;

/* Opens what the options name (one file, or all parts of a split one), validates it and returns its
 * directory. With options->vocab_only the tensors' data is neither mapped nor required to be there.
 * `mem` must outlive the directory. */
MOE_UNUSED static moe_status directory_open(moe_directory **out, const moe_model_options *options,
                                            moe_mem *mem, moe_error *error);
/* The same of the file at `path`, whole, with the default options. */
MOE_UNUSED static moe_status directory_open_file(moe_directory **out, const char *path,
                                                 moe_mem *mem, moe_error *error);
MOE_UNUSED static void directory_close(moe_directory *dir);

/* MOE_ERR_IO if a mapped file has become shorter since it was opened. Cheap: called before each
 * evaluation, since touching a page past the end would be fatal. */
MOE_UNUSED static moe_status directory_check(const moe_directory *dir, moe_error *error);

MOE_UNUSED static size_t directory_n_meta(const moe_directory *dir);
MOE_UNUSED static const moe_meta *directory_meta_at(const moe_directory *dir, size_t index);
MOE_UNUSED static size_t directory_n_tensors(const moe_directory *dir);
MOE_UNUSED static const moe_tensor *directory_tensor_at(const moe_directory *dir, size_t index);

/* By name; NULL if there is none. Constant time. */
MOE_UNUSED static const moe_meta *directory_meta(const moe_directory *dir, const char *key);
MOE_UNUSED static const moe_tensor *directory_tensor(const moe_directory *dir, const char *name);

/* ------------------------------------------------------------------------- typed reading -- */

/* Each reads a key into *value. A missing key leaves *value alone and is MOE_OK if `required` is
 * false. A key of another type, or a number out of the range [min, max] (also NaN), is
 * MOE_ERR_MODEL, with the key, what was expected and what was found. Any integer type is accepted
 * where an integer is read; for floats, any float or integer type. */
MOE_UNUSED static moe_status meta_u32(const moe_directory *dir, const char *key, bool required,
                                      uint32_t min, uint32_t max, uint32_t *value,
                                      moe_error *error);
MOE_UNUSED static moe_status meta_f32(const moe_directory *dir, const char *key, bool required,
                                      double min, double max, float *value, moe_error *error);
MOE_UNUSED static moe_status meta_bool(const moe_directory *dir, const char *key, bool required,
                                       bool *value, moe_error *error);
MOE_UNUSED static moe_status meta_string(const moe_directory *dir, const char *key, bool required,
                                         moe_str *value, moe_error *error);

/* A number, or an array of at least n numbers: fills value[0..n), a single number n times. */
MOE_UNUSED static moe_status meta_u32_list(const moe_directory *dir, const char *key, bool required,
                                           uint32_t min, uint32_t max, uint32_t *value, size_t n,
                                           moe_error *error);

/* Item `index` of an array of numbers, converted. index < meta->n; meta->item is a number type or
 * META_BOOL. */
MOE_UNUSED static double meta_item_f64(const moe_meta *meta, uint64_t index);
MOE_UNUSED static int64_t meta_item_i64(const moe_meta *meta, uint64_t index);

MOE_INLINE bool str_equal(moe_str s, const char *text)
{
    return strlen(text) == s.bytes && memcmp(s.data, text, (size_t)s.bytes) == 0;
}

#endif
