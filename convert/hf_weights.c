/* convert/hf_weights.c - a matrix of a checkpoint, by its name -> a place in a file and what its
 * bytes mean: floats, FP8 and its scales, codes of 4 or 8 bits and theirs.
 *
 * A quantized matrix "x.weight" is known by its dtype and by the tensors beside it. What
 * config.json says of the quantization is only compared with that:
 *
 *     FP8       x.weight F8_E4M3, x.weight_scale_inv or x.weight_scale in F32, BF16 or F16: one
 *               for the matrix, one for each row or one for each block, whose size config.json says
 *     integers  x.weight_packed I32, x.weight_scale, x.weight_shape; "pack-quantized"
 *     NVFP4     x.weight U8, x.weight_scale F8_E4M3, x.weight_scale_2; ModelOpt. The same as
 *               x.weight_packed, x.weight_scale, x.weight_global_scale, which divides;
 *               "nvfp4-pack-quantized"
 *     MXFP4     x.weight_packed or x.weight U8, x.weight_scale U8
 *
 * (gpt-oss' MXFP4, whose names are others, is in hf.c.) */
#ifndef MOE_CONVERT_HF_WEIGHTS_C
#define MOE_CONVERT_HF_WEIGHTS_C

#include "config.c"
#include "encode_packed.h"
#include "safetensors.c"

enum { HF_MAX_BLOCKS = 8, HF_FP8_BLOCK = 128 };

/* Weights of FP8 that share a scale; UINT32_MAX: all. */
typedef struct hf_block {
    uint32_t rows, cols;
} hf_block;

typedef struct hf_source {
    conv_source *source;
    const char *dir;
    const moe_family *family;
    json_ref root, whole;   // of config.json: the text model's part, and all of it
    moe_hparams hp;
    st_table table;
    const char *prefix;     // stands for "model." at the start of names
    const char *draft_prefix; // of the layer for multi-token prediction, if it has names of its own
    uint32_t n_draft;       // such layers that are carried over: 0 or 1
    hf_block blocks[HF_MAX_BLOCKS]; // of FP8, by config.json
    uint32_t n_blocks;
    json_ref groups;        // config_groups of a quantization_config; node NULL: none
    const char *algo;       // ModelOpt's word for the format; NULL: none
    bool quantized;         // config.json tells of a quantization
    bool promised;          // and of codes of integers or of FP4
    uint64_t n_packed;      // matrices of such codes that were found
    size_t capacity;        // of source->tensors
    moe_error *error;
} hf_source;

/* --------------------------------------------------------------------------------- shapes -- */

/* Whether a checkpoint's shape is the binding's; dimensions of 1 do not count. `extra`: an outer
 * dimension in front. */
static bool hf_shape_is(const st_tensor *t, const uint64_t *dims, uint32_t n_dims)
{
    uint32_t i = 0;
    for (uint32_t d = n_dims; d-- > 0;) { // GGUF's order is the reverse
        if (dims[d] == 1)
            continue;
        while (i < t->n_dims && t->dims[i] == 1)
            i++;
        if (i == t->n_dims || t->dims[i++] != dims[d])
            return false;
    }
    while (i < t->n_dims && t->dims[i] == 1)
        i++;
    return i == t->n_dims;
}

static moe_status hf_fail_dims(const hf_source *h, const st_tensor *t, const char *want)
{
    char got[200] = "";
    size_t used = 0;
    for (uint32_t d = 0; d < t->n_dims; d++)
        used += (size_t)snprintf(got + used, sizeof got - used, "%s%llu", d ? ", " : "",
                                 (unsigned long long)t->dims[d]);
    return fail(h->error, MOE_ERR_MODEL, t->name, "expected %s by config.json, got [%s] in %s",
                want, got, t->file->path);
}

static moe_status hf_fail_shape(const hf_source *h, const st_tensor *t, const uint64_t *dims,
                                uint32_t n_dims)
{
    char want[108] = "shape [";
    size_t used = strlen(want);
    for (uint32_t d = n_dims; d-- > 0;)
        used += (size_t)snprintf(want + used, sizeof want - used, "%llu%s",
                                 (unsigned long long)dims[d], d ? ", " : "]");
    return hf_fail_dims(h, t, want);
}

/* ------------------------------------------------------------------------ beside a matrix -- */

enum { HF_BESIDE_BYTES = CONVERT_MAX_NAME_BYTES + 32 };

/* "x.END", which belongs to the matrix "x.weight" or "x.weight_packed". */
static void hf_beside_name(const st_tensor *t, const char *end, char name[HF_BESIDE_BYTES])
{
    const char *dot = strrchr(t->name, '.');
    snprintf(name, HF_BESIDE_BYTES, "%.*s.%s", dot ? (int)(dot - t->name) : 0, t->name, end);
}

/* That tensor; what is found is used. NULL: none. */
static st_tensor *hf_beside(hf_source *h, const st_tensor *t, const char *end)
{
    char name[HF_BESIDE_BYTES];
    hf_beside_name(t, end, name);
    st_tensor *found = st_find(&h->table, name);
    if (found)
        found->used = true;
    return found;
}

/* The same; it is an error if there is none. */
static moe_status hf_need_beside(hf_source *h, const st_tensor *t, const char *end, st_tensor **out)
{
    char name[HF_BESIDE_BYTES];
    hf_beside_name(t, end, name);
    *out = hf_beside(h, t, end);
    return *out ? MOE_OK
                : fail(h->error, MOE_ERR_MODEL, t->name, "expected its scales in \"%s\", got none",
                       name);
}

/* ------------------------------------------------------------------------------------ FP8 -- */

/* Whether a tensor's shape is this one, dimensions of 1 included. */
static bool hf_is_plain(const st_tensor *t, const uint64_t *dims, uint32_t n_dims)
{
    bool same = t->n_dims == n_dims;
    for (uint32_t i = 0; same && i < n_dims; i++)
        same = t->dims[i] == dims[n_dims - 1 - i];
    return same;
}

/* How many scales a matrix has, below each other and side by side. */
static void hf_fp8_counts(hf_block block, uint64_t n_out, uint64_t n_in, uint64_t count[2])
{
    count[0] = (n_out + block.rows - 1) / block.rows;
    count[1] = (n_in + block.cols - 1) / block.cols;
}

/* Whether a shape is that of scales [count[0]][count[1]]. ModelOpt has them with a 1 behind each;
 * one for each row may have no second dimension, and one at all none. */
static bool hf_are_scales(const uint64_t *dims, uint32_t n_dims, const uint64_t count[2])
{
    bool one = count[0] == 1 && count[1] == 1;
    for (uint32_t i = 0; one && i < n_dims; i++)
        one = dims[i] == 1;
    return one || (n_dims == 1 && dims[0] == count[0] && count[1] == 1) ||
           (n_dims == 2 && dims[0] == count[0] && dims[1] == count[1]) ||
           (n_dims == 4 && dims[0] == count[0] && dims[2] == count[1] && dims[1] == 1 &&
            dims[3] == 1);
}

/* Which weights of a matrix [n_out][n_in] share a scale, if it is in one of the ways that the
 * config tells of: the first whose scales have such a shape. A stack of matrices has one more
 * dimension in front, or one scale for all. `*clear`: what else fits means the same; it does not if
 * the config has blocks of several sizes and they are as many. */
static bool hf_fp8_block(const hf_source *h, const st_tensor *t, const st_tensor *scale,
                         hf_block *block, bool *clear)
{
    const uint64_t n_out = t->dims[t->n_dims - 2], n_in = t->dims[t->n_dims - 1];
    const bool stack = t->n_dims == 3;
    bool found = false;
    *clear = true;
    for (uint32_t i = 0; i < h->n_blocks; i++) {
        const hf_block b = {(uint32_t)MOE_MIN(h->blocks[i].rows, n_out),
                            (uint32_t)MOE_MIN(h->blocks[i].cols, n_in)};
        uint64_t count[2];
        hf_fp8_counts(b, n_out, n_in, count);
        if (scale->n_elements == 1 && h->blocks[i].rows == UINT32_MAX) {
            *block = h->blocks[i];
            return true;
        }
        if ((stack && (!scale->n_dims || scale->dims[0] != t->dims[0])) ||
            !hf_are_scales(scale->dims + stack, scale->n_dims - stack, count))
            continue;
        *clear &= !found || (block->rows == b.rows && block->cols == b.cols);
        *block = b;
        found = true;
    }
    return found;
}

static moe_status hf_fail_scale(const hf_source *h, const st_tensor *t, const st_tensor *scale)
{
    char want[500] = "scales of shape ", stack[24] = "";
    size_t used = strlen(want);
    if (t->n_dims == 3)
        snprintf(stack, sizeof stack, "%llu, ", (unsigned long long)t->dims[0]);
    for (uint32_t i = 0; i < h->n_blocks; i++) {
        uint64_t count[2];
        hf_fp8_counts(h->blocks[i], t->dims[t->n_dims - 2], t->dims[t->n_dims - 1], count);
        used += (size_t)snprintf(want + used, sizeof want - used, "%s[%s%llu, %llu]",
                                 i ? " or " : "", stack, (unsigned long long)count[0],
                                 (unsigned long long)count[1]);
    }
    return hf_fail_dims(h, scale, want);
}

/* The scales of an FP8 matrix. `plain`: its shape is that of the matrix or stack of matrices that
 * it is worked on as; else, as for vectors, there is one scale. */
static moe_status hf_find_scale(hf_source *h, const st_tensor *t, bool plain, conv_input *in)
{
    char name[CONVERT_MAX_NAME_BYTES + 16];
    hf_block block = {UINT32_MAX, UINT32_MAX};
    bool clear = true;
    plain = plain && t->n_elements;
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    st_tensor *scale = st_find(&h->table, name);
    name[strlen(name) - strlen("_inv")] = 0;
    if (!scale && !(scale = st_find(&h->table, name)))
        return fail(h->error, MOE_ERR_MODEL, t->name,
                    "expected scales of FP8 in \"%s\" or \"%s_inv\", got none", name, name);
    scale->used = true;
    hf_beside(h, t, "input_scale"); // what static quantization of activations would use
    in->scale_type = quant_by_id(scale->dtype->quant);
    if (!in->scale_type)
        return fail(h->error, MOE_ERR_UNSUPPORTED, scale->name,
                    "expected scales in BF16, F16 or F32, got %s", scale->dtype->name);
    if (plain && !h->n_blocks)
        return fail(h->error, MOE_ERR_MODEL, t->name,
                    "expected what quantization_config.config_groups of config.json tells of, got "
                    "weights in FP8");
    if (plain && !hf_fp8_block(h, t, scale, &block, &clear))
        return hf_fail_scale(h, t, scale);
    if (!plain && scale->n_elements != 1)
        return hf_fail_dims(h, scale, "one scale");
    if (!clear)
        return fail(h->error, MOE_ERR_UNSUPPORTED, scale->name,
                    "expected blocks of one size in config.json, got several that have as many "
                    "scales as this tensor");
    in->scale_file = scale->file;
    in->scale_offset = scale->offset;
    in->scale_rows = block.rows;
    in->scale_cols = block.cols;
    return MOE_OK;
}

/* An input of FP8, one of matrices [dims[1]][dims[0]], then begins with row `row` of matrix
 * `matrix`. */
static void hf_fp8_from_row(conv_input *in, const uint64_t dims[2], uint64_t matrix, uint64_t row)
{
    uint64_t count[2];
    if (in->scale_rows == UINT32_MAX)
        return;
    hf_fp8_counts((hf_block){in->scale_rows, in->scale_cols}, dims[1], dims[0], count);
    in->scale_offset += (matrix * count[0] + row / in->scale_rows) * count[1] *
                        in->scale_type->block_bytes;
    in->scale_skip = (uint32_t)(row % in->scale_rows);
}

/* ---------------------------------------------------------------------------- packed codes -- */

/* The tensor of a matrix "x.weight": itself, or "x.weight_packed"; NULL: there is none. */
static st_tensor *hf_find_weight(const hf_source *h, const char *name)
{
    char packed[CONVERT_MAX_NAME_BYTES + 16];
    st_tensor *t = st_find(&h->table, name);
    snprintf(packed, sizeof packed, "%s_packed", name);
    return t ? t : st_find(&h->table, packed);
}

/* Tensors beside a matrix without which its codes do not give its weights. */
static moe_status hf_refuse_beside(hf_source *h, const st_tensor *t)
{
    static const struct { const char *end, *what; } others[] = {
        {"weight_zero_point", "codes without offsets (symmetric quantization)"},
        {"weight_g_idx", "columns that are grouped in their order (no actorder \"group\")"},
        {"pre_quant_scale", "weights whose inputs have no scales of their own"},
        {"svdquant_lora_a", "weights without a low-rank part"},
    };
    for (size_t i = 0; i < MOE_COUNT(others); i++) {
        const st_tensor *other = hf_beside(h, t, others[i].end);
        if (other)
            return fail(h->error, MOE_ERR_UNSUPPORTED, other->name,
                        "expected %s, got this tensor; convert the checkpoint that it was made "
                        "from", others[i].what);
    }
    return MOE_OK;
}

/* One group of config_groups against what a matrix is. */
static bool hf_group_is(json_ref weights, const char *type, uint32_t bits, uint64_t len,
                        uint64_t row_len)
{
    json_ref size = config_path(weights, "group_size"), kind = config_path(weights, "type");
    const double n = json_double(size, 0);
    if (json_double(config_path(weights, "num_bits"), 0) != bits || (kind.node &&
        !json_is(kind, type)) || !json_bool(config_path(weights, "symmetric"), true))
        return false;
    return n > 0 ? n == (double)len : len == row_len || !strcmp(type, "float");
}

/* The config must tell of such a matrix, if it tells of any. */
static moe_status hf_check_group(hf_source *h, const st_tensor *t, const char *type, uint32_t bits,
                                 uint64_t len, uint64_t row_len)
{
    bool found = !h->groups.node || !json_count(h->groups);
    for (json_ref key = json_first(h->groups); h->groups.node && key.node;
         key = json_next(h->groups, key))
        found |= hf_group_is(config_path(json_held(key), "weights"), type, bits, len, row_len);
    h->n_packed++;
    if (!found)
        return fail(h->error, MOE_ERR_MODEL, t->name,
                    "expected what quantization_config.config_groups of config.json tells of, got "
                    "%u bits of type %s in groups of %llu", bits, type, (unsigned long long)len);
    if (h->algo && strcmp(h->algo, "MIXED_PRECISION") && !strstr(h->algo, "FP4"))
        return fail(h->error, MOE_ERR_MODEL, t->name,
                    "expected what the config's quant_algo tells of, %s, got %u bits of type %s",
                    h->algo, bits, type);
    return MOE_OK;
}

/* "x.weight_shape" says what the shape is without packing. */
static moe_status hf_check_weight_shape(hf_source *h, const st_tensor *t, const uint64_t dims[2])
{
    uint8_t data[16] = {0};
    uint64_t got[2] = {0, 0};
    const st_tensor *shape = hf_beside(h, t, "weight_shape");
    if (!shape)
        return MOE_OK;
    const uint32_t bytes = shape->dtype->bytes;
    if ((strcmp(shape->dtype->name, "I64") && strcmp(shape->dtype->name, "I32")) ||
        shape->n_elements != 2)
        return fail(h->error, MOE_ERR_MODEL, shape->name,
                    "expected two numbers in I32 or I64, got %llu in %s",
                    (unsigned long long)shape->n_elements, shape->dtype->name);
    moe_status status = plat_read(&shape->file->os, shape->offset, data, 2 * (size_t)bytes,
                                  shape->file->path, h->error);
    for (uint32_t i = 0; i < 2; i++)
        memcpy(&got[i], data + i * bytes, bytes);
    if (!status && (got[0] != dims[1] || got[1] != dims[0]))
        return fail(h->error, MOE_ERR_MODEL, shape->name,
                    "expected %llu and %llu by config.json, got %llu and %llu",
                    (unsigned long long)dims[1], (unsigned long long)dims[0],
                    (unsigned long long)got[0], (unsigned long long)got[1]);
    return status;
}

/* Words of 32 bits, each of 8 codes of 4 bits or of 4 of 8: 8 or 128 above the number, as Q4_0 has
 * them. A scale is for a group of columns of one row. */
static moe_status hf_packed_ints(hf_source *h, const st_tensor *t, const uint64_t dims[2],
                                 conv_input *in)
{
    const uint64_t n_in = dims[0], n_out = dims[1];
    const uint64_t per_row = t->n_dims == 2 ? t->dims[1] : 0;
    const uint32_t bits = per_row == n_in / 4 ? 8 : 4;
    const uint64_t words[2] = {n_in * bits / 32, n_out};
    st_tensor *scale;
    if (n_in % 32)
        return fail(h->error, MOE_ERR_UNSUPPORTED, t->name,
                    "expected rows of a multiple of 32 weights, got %llu",
                    (unsigned long long)n_in);
    if (t->n_dims != 2 || !hf_shape_is(t, words, 2))
        return hf_fail_shape(h, t, words, 2);
    moe_status status = hf_check_weight_shape(h, t, dims);
    if (!status)
        status = hf_need_beside(h, t, "weight_scale", &scale);
    if (status)
        return status;
    const uint64_t n_group = scale->n_dims == 2 ? scale->dims[1] : 0;
    const uint64_t one[2] = {1, n_out};
    in->scale_type = quant_by_id(scale->dtype->quant);
    if (!in->scale_type)
        return fail(h->error, MOE_ERR_UNSUPPORTED, scale->name,
                    "expected scales in BF16, F16 or F32, got %s", scale->dtype->name);
    if (!n_group || n_in % n_group || scale->dims[0] != n_out)
        return hf_fail_shape(h, scale, one, 2);
    if (n_in / n_group % 32 || n_in / n_group > CONVERT_MAX_ROW)
        return fail(h->error, MOE_ERR_UNSUPPORTED, scale->name,
                    "expected groups of a multiple of 32 weights, got %llu",
                    (unsigned long long)(n_in / n_group));
    in->apart = APART_INT;
    in->type = bits == 4 ? &quant_q4_0 : &quant_q8_0;
    in->scale_file = scale->file;
    in->scale_offset = scale->offset;
    in->scale_rows = 1;
    in->scale_cols = (uint32_t)(n_in / n_group);
    return hf_check_group(h, t, "int", bits, in->scale_cols, n_in);
}

/* The number that all weights of an NVFP4 matrix are multiplied with. compressed-tensors stores its
 * inverse. */
static moe_status hf_nvfp4_factor(hf_source *h, const st_tensor *t, conv_input *in)
{
    const bool inverse = strrchr(t->name, '.') && !strcmp(strrchr(t->name, '.'), ".weight_packed");
    st_tensor *one;
    float x;
    moe_status status =
        hf_need_beside(h, t, inverse ? "weight_global_scale" : "weight_scale_2", &one);
    if (status)
        return status;
    if (one->n_elements != 1 || strcmp(one->dtype->name, "F32"))
        return fail(h->error, MOE_ERR_MODEL, one->name,
                    "expected one number in F32, got %llu in %s",
                    (unsigned long long)one->n_elements, one->dtype->name);
    status = plat_read(&one->file->os, one->offset, &x, sizeof x, one->file->path, h->error);
    if (status)
        return status;
    in->factor = inverse ? 1 / x : x;
    if (!(x > 0 && x <= FLT_MAX && in->factor >= FLT_MIN && in->factor <= FLT_MAX))
        return fail(h->error, MOE_ERR_MODEL, one->name,
                    "expected a positive finite number, got %g", (double)x);
    return MOE_OK;
}

/* Bytes of two E2M1 codes, the first one low, and a scale for each 16 or 32 columns of a row. */
static moe_status hf_packed_fp4(hf_source *h, const st_tensor *t, const uint64_t dims[2],
                                conv_input *in)
{
    const uint64_t n_in = dims[0], bytes[2] = {n_in / 2, dims[1]};
    st_tensor *scale;
    if (t->n_dims != 2 || n_in % 2 || !hf_shape_is(t, bytes, 2))
        return hf_fail_shape(h, t, bytes, 2);
    moe_status status = hf_need_beside(h, t, "weight_scale", &scale);
    if (status)
        return status;
    const bool nv = !strcmp(scale->dtype->name, "F8_E4M3");
    const uint64_t len = nv ? 16 : 32, block = nv ? 64 : 32;
    const uint64_t scales[2] = {n_in / len, dims[1]};
    if (!nv && strcmp(scale->dtype->name, "U8"))
        return fail(h->error, MOE_ERR_UNSUPPORTED, scale->name,
                    "expected scales in F8_E4M3 (NVFP4) or U8 (MXFP4), got %s", scale->dtype->name);
    if (n_in % block)
        return fail(h->error, MOE_ERR_UNSUPPORTED, t->name,
                    "expected rows of a multiple of %llu weights, got %llu",
                    (unsigned long long)block, (unsigned long long)n_in);
    if (!hf_shape_is(scale, scales, 2))
        return hf_fail_shape(h, scale, scales, 2);
    in->apart = nv ? APART_NVFP4 : APART_MXFP4;
    in->type = nv ? &quant_nvfp4 : &quant_mxfp4;
    in->scale_file = scale->file;
    in->scale_offset = scale->offset;
    if (nv)
        status = hf_nvfp4_factor(h, t, in);
    return status ? status : hf_check_group(h, t, "float", 4, len, n_in);
}

/* -------------------------------------------------------------------------------- matrices -- */

/* A tensor whose shape is known to be right; `plain`: see hf_find_scale. */
static moe_status hf_input(hf_source *h, st_tensor *t, bool plain, conv_input *in)
{
    t->used = true;
    *in = (conv_input){.file = t->file, .name = t->name, .offset = t->offset};
    if (!strcmp(t->dtype->name, "F8_E4M3")) {
        moe_status status = hf_refuse_beside(h, t);
        return status ? status : hf_find_scale(h, t, plain, in);
    }
    in->type = quant_by_id(t->dtype->quant);
    if (!in->type)
        return fail(h->error, MOE_ERR_UNSUPPORTED, t->name,
                    "expected weights in F32, F16, BF16 or F8_E4M3, got %s", t->dtype->name);
    return MOE_OK;
}

/* A tensor of `dims`, in GGUF's order, as it is or packed. */
static moe_status hf_matrix(hf_source *h, st_tensor *t, const uint64_t *dims, uint32_t n_dims,
                            conv_input *in)
{
    const bool words = !strcmp(t->dtype->name, "I32"), bytes = !strcmp(t->dtype->name, "U8");
    const char *dot = strrchr(t->name, '.');
    if (dot && !strcmp(dot, ".weight_packed") && !words && !bytes)
        return fail(h->error, MOE_ERR_UNSUPPORTED, t->name,
                    "expected packed codes in I32 or U8, got %s", t->dtype->name);
    if (n_dims != 2 || (!words && !bytes))
        return hf_shape_is(t, dims, n_dims)
                   ? hf_input(h, t, n_dims == 2 && hf_is_plain(t, dims, 2), in)
                   : hf_fail_shape(h, t, dims, n_dims);
    t->used = true;
    *in = (conv_input){.file = t->file, .name = t->name, .offset = t->offset};
    moe_status status = hf_refuse_beside(h, t);
    if (status)
        return status;
    return words ? hf_packed_ints(h, t, dims, in) : hf_packed_fp4(h, t, dims, in);
}

/* ----------------------------------------------------------------------------- the config -- */

/* ModelOpt's own file, or the same words in config.json. */
static moe_status hf_read_algo(hf_source *h, json_ref q)
{
    static const char known[] = "NVFP4 W4A16_NVFP4 FP8 FP8_PER_CHANNEL_PER_TOKEN FP8_PB_WO MXFP4 "
                                "MIXED_PRECISION";
    char buf[64];
    json_ref algo = config_path(q, "quant_algo");
    if (!algo.node)
        return MOE_OK;
    const char *word = config_text(algo, buf);
    if (!config_find_word(known, word))
        return fail(h->error, MOE_ERR_UNSUPPORTED, "quant_algo",
                    "expected one of %s, got %s; convert the checkpoint that it was made from",
                    known, word);
    if (h->algo && strcmp(h->algo, word))
        return fail(h->error, MOE_ERR_MODEL, "hf_quant_config.json: quant_algo",
                    "expected %s, as in config.json, got %s", h->algo, word);
    if (!(h->algo = conv_text(h->source, "%s", word)))
        return fail_memory(h->error, h->source->mem, "quant_algo", strlen(word));
    h->quantized = true;
    h->promised |= strstr(h->algo, "FP4") != NULL;
    return MOE_OK;
}

static moe_status hf_read_modelopt(hf_source *h)
{
    json_doc doc;
    json_ref root;
    moe_status status = conv_read_json(h->source, h->dir, "hf_quant_config.json", false, &doc,
                                       &root, h->error);
    if (status || !root.node)
        return status;
    status = hf_read_algo(h, config_path(root, "quantization"));
    json_free(&doc);
    return status;
}

/* What compressed-tensors says beside its groups. */
static moe_status hf_read_compressed(hf_source *h, json_ref q)
{
    char buf[64];
    json_ref format = config_path(q, "format"), turned = config_path(q, "transform_config");
    json_ref sparse = config_path(q, "sparsity_config.format");
    h->promised |= json_is(format, "pack-quantized") || json_is(format, "nvfp4-pack-quantized") ||
                   json_is(format, "mxfp4-pack-quantized");
    if (json_typeof(turned) == JSON_OBJECT && json_count(turned) &&
        json_count(config_path(turned, "config_groups")))
        return fail(h->error, MOE_ERR_UNSUPPORTED,
                    "config.json: quantization_config.transform_config",
                    "expected none: matrices that activations are turned by are not read; convert "
                    "the checkpoint that it was made from");
    if (sparse.node && !json_is(sparse, "dense"))
        return fail(h->error, MOE_ERR_UNSUPPORTED,
                    "config.json: quantization_config.sparsity_config.format",
                    "expected dense, got %s", config_text(sparse, buf));
    return MOE_OK;
}

/* ---------------------------------------------------------------------- the config: FP8 -- */

static bool hf_read_size(json_ref v, uint32_t *size)
{
    const double x = json_double(v, 0);
    *size = x >= 1 && x <= CONVERT_MAX_ROW && x == floor(x) ? (uint32_t)x : 0;
    return *size > 0;
}

/* The sizes of blocks, [rows, columns]; older files have "128x128". */
static moe_status hf_read_block(const hf_source *h, json_ref v, const char *key, hf_block *block)
{
    char buf[64], end;
    json_ref first = json_first(v);
    unsigned rows, cols;
    if (json_typeof(v) == JSON_ARRAY && json_count(v) == 2 && hf_read_size(first, &block->rows) &&
        hf_read_size(json_next(v, first), &block->cols))
        return MOE_OK;
    if (json_typeof(v) == JSON_STRING &&
        sscanf(config_text(v, buf), "%8ux%8u%c", &rows, &cols, &end) == 2 && rows && cols &&
        rows <= CONVERT_MAX_ROW && cols <= CONVERT_MAX_ROW) {
        *block = (hf_block){rows, cols};
        return MOE_OK;
    }
    return fail(h->error, MOE_ERR_MODEL, key,
                "expected the rows and columns of a block in config.json, two whole numbers from 1 "
                "to %d, got %s", CONVERT_MAX_ROW, config_text(v, buf));
}

static moe_status hf_add_block(hf_source *h, hf_block block)
{
    for (uint32_t i = 0; i < h->n_blocks; i++)
        if (h->blocks[i].rows == block.rows && h->blocks[i].cols == block.cols)
            return MOE_OK;
    if (h->n_blocks == HF_MAX_BLOCKS)
        return fail(h->error, MOE_ERR_LIMIT, "config.json: quantization_config.config_groups",
                    "expected at most %d ways to scale FP8", HF_MAX_BLOCKS);
    h->blocks[h->n_blocks++] = block;
    return MOE_OK;
}

/* What the tensors alone may tell. */
static moe_status hf_add_usual_blocks(hf_source *h)
{
    static const hf_block usual[] = {{UINT32_MAX, UINT32_MAX}, {1, UINT32_MAX},
                                     {HF_FP8_BLOCK, HF_FP8_BLOCK}};
    moe_status status = MOE_OK;
    for (size_t i = 0; i < MOE_COUNT(usual) && !status; i++)
        status = hf_add_block(h, usual[i]);
    return status;
}

/* How one of the config_groups scales weights, if they are FP8. ModelOpt's groups have no
 * strategy. */
static moe_status hf_read_fp8_group(hf_source *h, json_ref weights)
{
    static const char block_key[] =
        "config.json: quantization_config.config_groups.*.weights.block_structure";
    json_ref type = config_path(weights, "type"), strategy = config_path(weights, "strategy");
    json_ref sizes = config_path(weights, "block_structure");
    json_ref group = config_path(weights, "group_size");
    hf_block block = {1, UINT32_MAX};
    if (json_double(config_path(weights, "num_bits"), 0) != 8 ||
        (type.node && !json_is(type, "float")))
        return MOE_OK;
    if (sizes.node) {
        moe_status status = hf_read_block(h, sizes, block_key, &block);
        return status ? status : hf_add_block(h, block);
    }
    if (json_is(strategy, "tensor"))
        block.rows = UINT32_MAX;
    else if (json_is(strategy, "group") && !hf_read_size(group, &block.cols))
        return fail(h->error, MOE_ERR_MODEL,
                    "config.json: quantization_config.config_groups.*.weights.group_size",
                    "expected a whole number from 1 to %d", CONVERT_MAX_ROW);
    else if (!json_is(strategy, "channel") && !json_is(strategy, "group"))
        return hf_add_usual_blocks(h);
    return hf_add_block(h, block);
}

/* In which ways FP8 is scaled. Where config.json says it, other scales are an error. */
static moe_status hf_read_fp8(hf_source *h, json_ref q)
{
    json_ref sizes = config_path(q, "weight_block_size");
    moe_status status = MOE_OK;
    if (sizes.node) {
        hf_block block = {0, 0};
        status = hf_read_block(h, sizes, "config.json: quantization_config.weight_block_size",
                               &block);
        return status ? status : hf_add_block(h, block);
    }
    for (json_ref key = json_first(h->groups); h->groups.node && key.node && !status;
         key = json_next(h->groups, key))
        status = hf_read_fp8_group(h, config_path(json_held(key), "weights"));
    const bool told = json_is(config_path(q, "quant_method"), "compressed-tensors") &&
                      h->groups.node && json_count(h->groups);
    return status || h->n_blocks || told ? status : hf_add_usual_blocks(h);
}

/* ------------------------------------------------------------------ the config: all of it -- */

/* config.json's quantization_config, where it may stand, and ModelOpt's file. */
static moe_status hf_read_quantization(hf_source *h)
{
    static const char known[] = "fp8 fbgemm_fp8 mxfp4 compressed-tensors modelopt modelopt_fp4";
    char buf[64];
    json_ref q = config_path(h->whole, "quantization_config");
    if (!q.node)
        q = config_path(h->root, "quantization_config");
    json_ref method = config_path(q, "quant_method");
    if (!q.node) {
        moe_status status = hf_add_usual_blocks(h);
        return status ? status : hf_read_modelopt(h);
    }
    h->quantized = true;
    if (!config_find_word(known, config_text(method, buf)))
        return fail(h->error, MOE_ERR_UNSUPPORTED, "config.json: quantization_config.quant_method",
                    "expected fp8, fbgemm_fp8, mxfp4, compressed-tensors or modelopt, got %s; "
                    "convert the checkpoint that it was made from", config_text(method, buf));
    const bool grouped = !config_find_word("fp8 fbgemm_fp8 mxfp4", config_text(method, buf));
    h->groups = grouped ? config_path(q, "config_groups") : (json_ref){q.doc, NULL};
    if (json_typeof(h->groups) != JSON_OBJECT)
        h->groups.node = NULL;
    moe_status status = hf_read_fp8(h, q);
    if (status || !grouped)
        return status;
    status = hf_read_compressed(h, q);
    if (!status)
        status = hf_read_algo(h, q);
    return status ? status : hf_read_modelopt(h);
}

/* Once all tensors are found: what the config promises must be among them. */
static moe_status hf_check_quantization(const hf_source *h)
{
    if (h->promised && !h->n_packed)
        return fail(h->error, MOE_ERR_MODEL, "config.json: quantization_config",
                    "expected matrices of packed codes, of which it tells, got none");
    return MOE_OK;
}

/* Scales for activations, keys and values in fewer bits: here they have scales that are found as
 * they come. */
static bool hf_is_activation_scale(const hf_source *h, const char *name)
{
    static const char *const endings[] = {
        ".input_scale", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
        ".kv_scale", ".activation_scale", "proj_activation_scale"};
    const size_t n = strlen(name);
    for (size_t i = 0; h->quantized && i < MOE_COUNT(endings); i++)
        if (n > strlen(endings[i]) && !strcmp(name + n - strlen(endings[i]), endings[i]))
            return true;
    return false;
}

#endif
