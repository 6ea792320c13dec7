/* bench/kernels.c - the speed of the matrix kernels of every quantization format, on one thread,
 * through the calls that the CPU backend makes.
 *
 *     kernels [--json] [--quick] [TYPE ...]
 *
 * For each format and each variant that this machine can run:
 *   gemv  one token: GB/s of weights, from L2 (256 KiB of them) and from memory (256 MiB), the
 *         latter beside the speed of only reading the same memory, measured in turn with it
 *   gemm  64 tokens, weights from L2: Gop/s (a multiplication and an addition are two); and 8
 *         tokens, weights from memory, as when a batch is spread over experts
 * Figures are medians of 9 runs; "x C" is the ratio to the C kernel. */
#include "../tests/test.h"

#include <time.h>

enum {
    N_RUNS = 9,
    L2_BYTES = 256 << 10,
    RAM_BYTES = 256 << 20,
    GEMM_ROWS = 256,
    ROW_TILE = 64, /* rows per call of a gemm kernel */
    N_IN = 2048
};

typedef struct result {
    double gemv_l2, gemv_ram, read_ram, gemm64, gemm8;
} result;

static volatile uint64_t sink;

/* The time that this thread has run: on a busy machine, the time in which others ran is left
 * out. */
static uint64_t cpu_time_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, size_t n)
{
    qsort(v, n, sizeof *v, compare);
    return v[n / 2];
}

static void *alloc(size_t bytes)
{
    void *p = NULL;
    if (posix_memalign(&p, 4096, bytes)) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

typedef uint64_t bench_vector __attribute__((vector_size(32)));

/* GB/s of reading `bytes` bytes, in vectors and fetched 4 KiB ahead: without that the kernels beat
 * it. */
static double time_read(const uint8_t *data, size_t bytes)
{
    const uint64_t start = cpu_time_ns();
    bench_vector sum[8] = {{0}};
    const bench_vector *p = (const bench_vector *)(const void *)data;
    for (size_t i = 0; i + 8 <= bytes / sizeof *p; i += 8) {
        for (size_t j = 0; j < 8; j += 2)
            __builtin_prefetch((const void *)((uintptr_t)(p + i + j) + 4096));
        for (size_t j = 0; j < 8; j++)
            sum[j] ^= p[i + j];
    }
    for (size_t j = 0; j < 8; j++)
        sink ^= sum[j][0] ^ sum[j][1] ^ sum[j][2] ^ sum[j][3];
    return (double)bytes / (double)(cpu_time_ns() - start);
}

/* GB/s of weights; `repeat` times over mm's rows. */
static double time_gemv(moe_mm_fn *gemv, const moe_mm *mm, size_t repeat)
{
    const uint64_t start = cpu_time_ns();
    for (size_t i = 0; i < repeat; i++)
        gemv(mm);
    return (double)(repeat * mm->n_row * mm->w_stride) / (double)(cpu_time_ns() - start);
}

/* Gop/s, in calls of ROW_TILE rows. */
static double time_gemm(moe_mm_fn *gemm, moe_mm mm, size_t repeat)
{
    const uint8_t *w = mm.w;
    float *y = mm.y;
    const size_t n_row = mm.n_row;
    mm.n_row = ROW_TILE;
    const uint64_t start = cpu_time_ns();
    for (size_t i = 0; i < repeat; i++)
        for (size_t r = 0; r < n_row; r += ROW_TILE) {
            mm.w = w + r * mm.w_stride;
            mm.y = y + r;
            gemm(&mm);
        }
    return 2.0 * (double)(repeat * n_row * mm.n_in * mm.n_tok) / (double)(cpu_time_ns() - start);
}

/* The first MiB is the quantizer's work, the rest repeats it. */
static void fill(const moe_quant *quant, uint8_t *w, size_t row_bytes, size_t n_row)
{
    static float row[N_IN];
    const size_t n_first = MOE_MIN(n_row, ((1u << 20) + row_bytes - 1) / row_bytes);
    for (size_t r = 0; r < n_first; r++) {
        for (size_t k = 0; k < N_IN; k++)
            row[k] = test_random_float();
        quant->quantize(row, w + r * row_bytes, N_IN);
    }
    for (size_t r = n_first; r < n_row; r++)
        memcpy(w + r * row_bytes, w + (r - n_first) * row_bytes, row_bytes);
}

/* One variant; a `slow` one on fewer data, fewer times. */
static result measure(const moe_quant *quant, uint32_t cpu, uint8_t *w, size_t ram_bytes,
                      bool slow)
{
    const moe_kernels k = quant->select(cpu);
    const size_t row_bytes = N_IN / quant->block_len * quant->block_bytes;
    const size_t x_stride = act_row_bytes(quant->act, N_IN);
    const size_t ram_rows = ram_bytes / row_bytes / (slow ? 16 : 1);
    uint8_t *x = alloc(64 * x_stride);
    float *y = alloc(8 * (ram_rows + GEMM_ROWS * 8) * sizeof *y);
    float src[N_IN];
    for (size_t t = 0; t < 64; t++) {
        for (size_t i = 0; i < N_IN; i++)
            src[i] = test_random_float();
        act_quantize(quant->act, src, N_IN, x + t * x_stride, cpu);
    }
    const moe_mm l2 = {w, row_bytes, x, x_stride, y, 0, N_IN, L2_BYTES / row_bytes, 1, NULL};
    const moe_mm ram = {w, row_bytes, x, x_stride, y, 0, N_IN, ram_rows, 1, NULL};
    const size_t n_row64 = slow ? ROW_TILE : GEMM_ROWS, n_row8 = ram_rows / 4 / ROW_TILE * ROW_TILE;
    const moe_mm gemm64 = {w, row_bytes, x, x_stride, y, n_row64, N_IN, n_row64, 64, NULL};
    const moe_mm gemm8 = {w, row_bytes, x, x_stride, y, n_row8, N_IN, n_row8, 8, NULL};
    double v[5][N_RUNS];
    const size_t n_runs = slow ? 3 : N_RUNS;
    for (size_t i = 0; i < n_runs; i++) {
        v[0][i] = time_gemv(k.gemv, &l2, slow ? 2 : 40);
        v[1][i] = time_gemv(k.gemv, &ram, 1);
        v[2][i] = time_read(w, ram_rows * row_bytes);
        v[3][i] = time_gemm(k.gemm, gemm64, 1);
        v[4][i] = time_gemm(k.gemm, gemm8, 1);
    }
    free(x);
    free(y);
    return (result){median(v[0], n_runs), median(v[1], n_runs), median(v[2], n_runs),
                    median(v[3], n_runs), median(v[4], n_runs)};
}

/* The name of the last step of the ladder that a set of bits reaches. */
static const char *variant_name(uint32_t cpu)
{
    static const char *const names[] = {"avx2",    "avx-vnni", "avx512", "avx512-vnni",
                                        "neon",    "dotprod",  "i8mm",   "avx512-bf16"};
    const char *name = "c";
    for (size_t i = 0; i < MOE_COUNT(names); i++)
        if (cpu >> i & 1)
            name = names[i];
    return name;
}

static void print_result(const moe_quant *quant, uint32_t cpu, const result *r, const result *c,
                         bool json, bool first)
{
    if (json) {
        printf("%s\n  {\"type\": \"%s\", \"variant\": \"%s\", \"gemv_l2_gb_s\": %.2f, "
               "\"gemv_ram_gb_s\": %.2f, \"read_ram_gb_s\": %.2f, \"gemm64_l2_gop_s\": %.2f, "
               "\"gemm8_ram_gop_s\": %.2f}",
               first ? "" : ",", quant->name, variant_name(cpu), r->gemv_l2, r->gemv_ram,
               r->read_ram, r->gemm64, r->gemm8);
        return;
    }
    printf("%-7s %-11s %7.2f %7.2f  %3.0f %%  %6.1f x  %7.1f %7.1f  %6.1f x\n", quant->name,
           variant_name(cpu), r->gemv_l2, r->gemv_ram, 100 * r->gemv_ram / r->read_ram,
           r->gemv_l2 / c->gemv_l2, r->gemm64, r->gemm8, r->gemm64 / c->gemm64);
    fflush(stdout);
}

/* Adds one bit of the machine after the other; a step that changes no kernel is left out. */
static void bench_type(const moe_quant *quant, uint8_t *w, size_t ram_bytes, bool json, bool *first)
{
    const size_t row_bytes = N_IN / quant->block_len * quant->block_bytes;
    fill(quant, w, row_bytes, ram_bytes / row_bytes);
    moe_kernels last = quant->select(0);
    const result c = measure(quant, 0, w, ram_bytes, true);
    print_result(quant, 0, &c, &c, json, *first);
    *first = false;
    uint32_t cpu = 0;
    for (uint32_t bit = 1; bit < MOE_CPU_END; bit <<= 1) {
        if (!(cpu_detect() & bit))
            continue;
        cpu |= bit;
        const moe_kernels k = quant->select(cpu);
        if (k.gemv == last.gemv && k.gemm == last.gemm)
            continue;
        last = k;
        const result r = measure(quant, cpu, w, ram_bytes, false);
        print_result(quant, cpu, &r, &c, json, false);
    }
}

int main(int argc, char **argv)
{
    bool json = false, first = true;
    size_t ram_bytes = RAM_BYTES;
    int n_names = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0)
            json = true;
        else if (strcmp(argv[i], "--quick") == 0)
            ram_bytes = RAM_BYTES / 8;
        else if (quant_by_name(argv[i]))
            argv[++n_names] = argv[i];
        else {
            fprintf(stderr, "usage: kernels [--json] [--quick] [TYPE ...]\n");
            return 2;
        }
    }
    uint8_t *w = alloc(ram_bytes);
    if (json)
        printf("[");
    else
        printf("                         gemv GB/s of weights         gemm Gop/s\n"
               "type    variant          L2  memory  /read   L2 / C    64 L2   8 mem  64 / C\n");
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        bool wanted = n_names == 0;
        for (int j = 1; j <= n_names; j++)
            wanted = wanted || quant_by_name(argv[j]) == quant_table[i];
        if (wanted)
            bench_type(quant_table[i], w, ram_bytes, json, &first);
    }
    if (json)
        printf("\n]\n");
    free(w);
    return 0;
}
