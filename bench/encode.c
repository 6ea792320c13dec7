/* bench/encode.c - the quantizers of the converter: speed on one thread and squared error.
 *
 *     encode [--json] [--c] [--f32 FILE N_IN] [TYPE ...]
 *     encode --compare SOURCE.gguf RESULT.gguf
 *
 * For each type: million weights per second without and with importance (medians of 5 runs over 4 M
 * weights, rows of 2048, normally distributed unless FILE has others), the squared error relative
 * to the sum of squares, weighted where importance is given, and the reference quantizer's. --c
 * measures the plain C form.
 * --compare reads two GGUF files of one model and prints the relative squared error of RESULT for
 * each type in it: ours and another quantizer's results can be measured in the same way. */
#include "../tests/test.h"

#include <time.h>

#include "../convert/encoders.h"

enum { N_RUNS = 5, N_IN = 2048, N_ROW = 2048, STRIP_FLOATS = 1 << 14 };

typedef struct weights {
    float *x;          // [n_row][n_in]
    float *importance; // [n_in]
    size_t n_row, n_in;
} weights;

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void *alloc(size_t bytes)
{
    void *p = malloc(bytes);
    if (!p) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

static float random_normal(void) // Box and Muller
{
    const double u = ((double)test_random() + 1) * 0x1p-32, v = (double)test_random() * 0x1p-32;
    return (float)(sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v));
}

static void weights_init(weights *w, const char *path, size_t n_in)
{
    size_t bytes = 0;
    w->n_in = n_in;
    w->n_row = N_ROW;
    w->x = path ? (float *)(void *)test_read_file(path, &bytes)
                : alloc(N_ROW * N_IN * sizeof *w->x);
    if (path)
        w->n_row = bytes / sizeof *w->x / n_in;
    if (!w->x || !w->n_row) {
        fprintf(stderr, "%s: expected rows of %zu floats\n", path, n_in);
        exit(1);
    }
    for (size_t i = 0; i < N_ROW * N_IN && !path; i++)
        w->x[i] = random_normal();
    w->importance = alloc(n_in * sizeof *w->importance);
    for (size_t i = 0; i < n_in; i++) // log-normal
        w->importance[i] = expf(random_normal());
}

/* Relative to the sum of squares. */
static double error_of(const moe_quant *quant, const uint8_t *blocks, const weights *w,
                       const float *importance, float *y)
{
    double error = 0, power = 0;
    quant->dequantize(blocks, y, w->n_row * w->n_in);
    for (size_t i = 0; i < w->n_row * w->n_in; i++) {
        const double cost = importance ? (double)importance[i % w->n_in] : 1;
        const double x = (double)w->x[i], e = x - (double)y[i];
        error += cost * e * e;
        power += cost * x * x;
    }
    return error / power;
}

/* Million weights per second; the blocks stay. */
static double encode_all_rows(const moe_quant *quant, encode_fn *encode, const weights *w,
                              const float *importance, uint8_t *blocks)
{
    const size_t row_bytes = w->n_in / quant->block_len * quant->block_bytes;
    const size_t strip = MOE_MAX(STRIP_FLOATS / w->n_in, 1);
    double seconds[N_RUNS];
    for (int run = 0; run < N_RUNS; run++) {
        const double start = cpu_seconds();
        for (size_t r = 0; r < w->n_row; r += strip)
            encode(w->x + r * w->n_in, importance, blocks + r * row_bytes,
                   MOE_MIN(strip, w->n_row - r), w->n_in);
        seconds[run] = cpu_seconds() - start;
    }
    qsort(seconds, N_RUNS, sizeof *seconds, compare_doubles);
    return (double)(w->n_row * w->n_in) / seconds[N_RUNS / 2] * 1e-6;
}

static void bench_type(const moe_quant *quant, const weights *w, uint32_t cpu, bool json,
                       bool first)
{
    const size_t n = w->n_row * w->n_in;
    encode_fn *encode = encoder_select(quant, cpu);
    uint8_t *blocks = alloc(n / quant->block_len * quant->block_bytes);
    float *y = alloc(n * sizeof *y);
    const double speed = encode_all_rows(quant, encode, w, NULL, blocks);
    const double error = error_of(quant, blocks, w, NULL, y);
    const double speed_w = encode_all_rows(quant, encode, w, w->importance, blocks);
    const double error_w = error_of(quant, blocks, w, w->importance, y);
    quant->quantize(w->x, blocks, n);
    const double reference = error_of(quant, blocks, w, NULL, y);
    printf(json ? "%s\n  {\"type\": \"%s\", \"m_weights_s\": %.1f, \"error\": %.6e, "
                  "\"reference_error\": %.6e, \"weighted_m_weights_s\": %.1f, "
                  "\"weighted_error\": %.6e}"
                : "%s%-7s %8.1f   %.4e   %.4e      %8.1f   %.4e\n",
           json && !first ? "," : "", quant->name, speed, error, reference, speed_w, error_w);
    free(blocks);
    free(y);
}

/* ------------------------------------------------------------------------ comparing files -- */

static moe_directory *open_file(const char *path, moe_mem *mem)
{
    moe_directory *dir = NULL;
    moe_error error = {0};
    mem_init(mem, NULL, 0);
    if (directory_open_file(&dir, path, mem, &error)) {
        fprintf(stderr, "%s\n", error.message);
        exit(1);
    }
    return dir;
}

typedef struct type_sum {
    double error, power, n;
} type_sum;

static void compare_tensor(const moe_tensor *x, const moe_tensor *y, type_sum *sum)
{
    const size_t n_in = (size_t)x->dims[0];
    float *a = alloc(n_in * sizeof *a), *b = alloc(n_in * sizeof *b);
    for (uint64_t r = 0; r < x->n_elements / n_in; r++) {
        x->quant->dequantize(x->data + r * (x->bytes / (x->n_elements / n_in)), a, n_in);
        y->quant->dequantize(y->data + r * (y->bytes / (y->n_elements / n_in)), b, n_in);
        for (size_t i = 0; i < n_in; i++) {
            sum->error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
            sum->power += (double)a[i] * (double)a[i];
        }
    }
    sum->n += (double)x->n_elements;
    free(a);
    free(b);
}

static int compare_files(const char *source, const char *result)
{
    moe_mem mem[2];
    moe_directory *a = open_file(source, &mem[0]), *b = open_file(result, &mem[1]);
    type_sum sums[MOE_COUNT(quant_table)] = {{0}};
    for (size_t i = 0; i < directory_n_tensors(b); i++) {
        const moe_tensor *y = directory_tensor_at(b, i), *x = directory_tensor(a, y->name);
        if (!x || x->n_elements != y->n_elements || x->parts || y->parts) {
            fprintf(stderr, "%s: expected the same tensor in %s\n", y->name, source);
            return 1;
        }
        for (size_t t = 0; t < MOE_COUNT(quant_table); t++)
            if (quant_table[t] == y->quant)
                compare_tensor(x, y, &sums[t]);
    }
    printf("type        weights   squared error\n");
    for (size_t t = 0; t < MOE_COUNT(quant_table); t++)
        if (sums[t].n > 0)
            printf("%-7s %11.0f   %.6e\n", quant_table[t]->name, sums[t].n,
                   sums[t].power > 0 ? sums[t].error / sums[t].power : 0);
    directory_close(a);
    directory_close(b);
    return 0;
}

int main(int argc, char **argv)
{
    bool json = false, first = true;
    uint32_t cpu = cpu_detect();
    const char *path = NULL;
    size_t n_in = N_IN;
    int n_names = 0;
    weights w;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--compare") && i + 2 < argc)
            return compare_files(argv[i + 1], argv[i + 2]);
        if (!strcmp(argv[i], "--json"))
            json = true;
        else if (!strcmp(argv[i], "--c"))
            cpu = 0;
        else if (!strcmp(argv[i], "--f32") && i + 2 < argc && atoi(argv[i + 2]) > 0) {
            path = argv[++i];
            n_in = (size_t)atoi(argv[++i]);
        } else if (quant_by_name(argv[i]))
            argv[++n_names] = argv[i];
        else {
            fprintf(stderr, "usage: encode [--json] [--c] [--f32 FILE N_IN] [TYPE ...]\n"
                            "       encode --compare SOURCE.gguf RESULT.gguf\n");
            return 2;
        }
    }
    weights_init(&w, path, n_in);
    printf(json ? "["
                : "        M weights/s  error      reference's  | with importance: error\n");
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        bool wanted = n_names == 0 && quant_table[i]->block_len > 1;
        for (int j = 1; j <= n_names; j++)
            wanted = wanted || quant_by_name(argv[j]) == quant_table[i];
        if (wanted && n_in % quant_table[i]->block_len == 0) {
            bench_type(quant_table[i], &w, cpu, json, first);
            first = false;
        }
    }
    printf(json ? "\n]\n" : "");
    free(w.x);
    free(w.importance);
    return 0;
}
