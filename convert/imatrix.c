/* convert/imatrix.c - how much each column of each matrix matters, from the file of --imatrix.
 *
 * The file is a GGUF, of `moe imatrix` or of llama.cpp's llama-imatrix: for a tensor NAME it has
 * NAME.in_sum2 [n_in][n_matrix], sums of the squares of what each column was multiplied with, and
 * NAME.counts [1][n_matrix], how many rows were summed up. A stack of experts has as many matrices
 * as there are experts, or one for all of them.
 *
 * In: a file that nobody has checked. Out: conv_tensor.importance of the tensors that it knows.
 * Must never: let a column count for nothing, however little the text made of it. */
#ifndef MOE_CONVERT_IMATRIX_C
#define MOE_CONVERT_IMATRIX_C

#include "files.c"
#include "plan.c"

/* No column counts for less than this, as a part of the mean. */
#define IMATRIX_FLOOR 1e-3

/* Finite and not negative. */
static moe_status imatrix_check(const moe_tensor *t, moe_error *error)
{
    const float *x = (const float *)(const void *)t->data;
    for (uint64_t i = 0; i < t->n_elements; i++)
        if (!(x[i] >= 0 && x[i] <= FLT_MAX))
            return fail(error, MOE_ERR_FORMAT, t->name,
                        "expected sums and counts, finite and at least 0, got %f at element %llu",
                        (double)x[i], (unsigned long long)i);
    return MOE_OK;
}

/* Finds a tensor's sums; it may have none. */
static moe_status imatrix_find(const moe_directory *dir, conv_tensor *t, moe_error *error)
{
    char name[CONVERT_MAX_NAME_BYTES + 16];
    snprintf(name, sizeof name, "%s.in_sum2", t->name);
    const moe_tensor *sums = directory_tensor(dir, name);
    snprintf(name, sizeof name, "%s.counts", t->name);
    const moe_tensor *counts = directory_tensor(dir, name);
    if (!sums && !counts)
        return MOE_OK;
    if (!sums || !counts)
        return fail(error, MOE_ERR_FORMAT, t->name, "expected .in_sum2 and .counts, got only one");
    if (sums->quant->id != Q_F32 || counts->quant->id != Q_F32)
        return fail(error, MOE_ERR_FORMAT, sums->name, "expected F32, got %s and %s",
                    sums->quant->name, counts->quant->name);
    const uint64_t n_matrix = counts->n_elements;
    if (sums->dims[0] != t->row_len || sums->n_elements != t->row_len * n_matrix ||
        (n_matrix != 1 && n_matrix != t->dims[2]))
        return fail(error, MOE_ERR_MODEL, sums->name,
                    "expected sums for %llu columns of %llu matrices, got %llu of %llu: it was "
                    "made with another model", (unsigned long long)t->row_len,
                    (unsigned long long)t->dims[2], (unsigned long long)sums->dims[0],
                    (unsigned long long)n_matrix);
    moe_status status = imatrix_check(sums, error);
    if (!status)
        status = imatrix_check(counts, error);
    t->importance = (conv_importance){(const float *)(const void *)sums->data,
                                      (const float *)(const void *)counts->data,
                                      (uint32_t)n_matrix};
    return status;
}

/* Whether products with this tensor should have been seen. */
static bool imatrix_expects(const conv_tensor *t)
{
    return t->n_dims > 1 && !t->is_vector && !t->is_router && !strncmp(t->name, "blk.", 4) &&
           (strstr(t->name, ".attn_") || strstr(t->name, ".ffn_"));
}

/* Opens the file and gives its sums to the source's tensors. The directory stays open. */
static moe_status imatrix_open(conv_source *s, const char *path, moe_error *error)
{
    conv_file *file; // the result depends on it as on the source
    moe_status status = conv_file_open(s, path, &file, error);
    if (!status)
        status = directory_open_file(&s->imatrix, path, s->mem, error);
    uint32_t n_found = 0, n_missing = 0;
    const char *missing = NULL;
    for (size_t i = 0; i < s->n_tensors && !status; i++) {
        conv_tensor *t = &s->tensors[i];
        status = imatrix_find(s->imatrix, t, error);
        n_found += t->importance.n_matrix > 0;
        if (!t->importance.n_matrix && imatrix_expects(t)) {
            missing = t->name;
            n_missing++;
        }
    }
    if (!status && !n_found)
        status = fail(error, MOE_ERR_MODEL, path,
                      "expected a file of `moe imatrix` made with this model; it has none of its "
                      "matrices");
    if (!status && n_missing)
        conv_note(s, "%s: it lacks %u matrices, %s among them: their columns count alike", path,
                  n_missing, missing);
    return status;
}

/* The matrix of a stack that a row belongs to. */
static uint64_t imatrix_matrix(const conv_tensor *t, uint64_t row)
{
    return row / (t->n_rows / t->importance.n_matrix);
}

/* What a squared error in each column of a matrix costs, [row_len], the mean being 1. False:
 * nothing is known. An expert that the text never used is taken for the mean of all. */
static bool imatrix_columns(const conv_tensor *t, uint64_t matrix, float *columns)
{
    const conv_importance *im = &t->importance;
    const uint64_t n = t->row_len;
    double mean = 0;
    if (!im->n_matrix)
        return false;
    const bool one = im->counts[matrix] > 0;
    const uint64_t first = one ? matrix : 0, end = one ? matrix + 1 : im->n_matrix;
    for (uint64_t m = first; m < end; m++)
        for (uint64_t i = 0; i < n; i++)
            mean += (double)im->sums[m * n + i] / (double)n;
    for (uint64_t i = 0; i < n && mean > 0; i++) {
        double sum = 0;
        for (uint64_t m = first; m < end; m++)
            sum += (double)im->sums[m * n + i];
        columns[i] = (float)fmax(sum / mean, IMATRIX_FLOOR);
    }
    return mean > 0;
}

#endif
