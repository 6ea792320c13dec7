/* bench/roofline.c - what this machine can do at most: the speed of reading memory, of float
 * multiply-adds and of int8 products, with each way of multiplying that its instruction sets have.
 *
 *     roofline [--json] [--quick] [--threads N]
 *
 * Rows:
 *   read   a buffer far larger than the caches, one contiguous part per thread, in pages of 2 MiB
 *          where the system gives them and in pages of 4 KiB as a mapped file has them; loads alone
 *          and fetched 8 KiB ahead
 *   f32    fused multiply-adds from registers
 *   int8   products of bytes, summed to 32 bits, from registers. "16-bit sums" adds eight products
 *          in 16 bits before it widens, which 4-bit codes allow
 * A multiplication and an addition are two operations. Each figure is the best of several runs,
 * since a limit is what is asked for: one thread, then all of them. The summary has the best of
 * each kind with all threads: `moe bench --read-limit GB/S --op-limit GOP/S` takes these two
 * numbers. */
#include "../tests/test.h"

#include <sys/mman.h>

enum { BUFFER_BYTES = 512 << 20, PREFETCH = 8192, MAX_THREADS = 256 };

static volatile uint64_t sink;

/* Makes the compiler believe that a vector has changed, so that it leaves no work out. */
#define OPAQUE_AVX512(v) __asm__ volatile("" : "+v"(v))
#define OPAQUE_AVX2(v) __asm__ volatile("" : "+x"(v))
#define OPAQUE_ARM(v) __asm__ volatile("" : "+w"(v))

/* In front of a loop over accumulators, which are to stay in registers. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ------------------------------------------------------------------------------- arithmetic -- */

/* Independent sums, enough to hide the latency of an instruction. Where each has a sum of 16 bits
 * beside it, which takes DEEP products before it is widened, fewer fit into the registers. */
enum { CHAINS = 12, CHAINS_16_AVX2 = 6, CHAINS_16_AVX512 = 8, DEEP = 8 };

/* A function that runs n rounds of CHAINS sums; `step` adds a product of a and b to sum. Sums are
 * opaque from the start, or equal ones would be computed once, and so is a. */
#define RATE(target, name, opaque, zero, of_a, of_b, step) \
    target static void name(uint64_t n)                    \
    {                                                      \
        __typeof__(zero) acc[CHAINS];                      \
        __typeof__(of_a) a = of_a;                         \
        const __typeof__(of_b) b = of_b;                   \
        UNROLL                                             \
        for (int j = 0; j < CHAINS; j++) {                 \
            acc[j] = zero;                                 \
            opaque(acc[j]);                                \
        }                                                  \
        for (uint64_t i = 0; i < n; i++) {                 \
            UNROLL                                         \
            for (int j = 0; j < CHAINS; j++) {             \
                __typeof__(zero) sum = acc[j];             \
                opaque(a);                                 \
                step;                                      \
                acc[j] = sum;                              \
            }                                              \
        }                                                  \
        UNROLL                                             \
        for (int j = 0; j < CHAINS; j++)                   \
            opaque(acc[j]);                                \
    }

#if MOE_X86

#define AVX512 MOE_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#define VNNI512 MOE_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define AVX_VNNI MOE_TARGET("avx2,fma,avxvnni")
#define AVX2_ONLY MOE_TARGET("avx2,fma")

RATE(AVX2_ONLY, f32_avx2, OPAQUE_AVX2, _mm256_setzero_ps(), _mm256_set1_ps(0.5f),
     _mm256_set1_ps(0.25f), sum = _mm256_fmadd_ps(a, b, sum))
RATE(AVX512, f32_avx512, OPAQUE_AVX512, _mm512_setzero_ps(), _mm512_set1_ps(0.5f),
     _mm512_set1_ps(0.25f), sum = _mm512_fmadd_ps(a, b, sum))
/* vpmaddubsw, vpmaddwd, vpaddd: every product is widened at once. */
RATE(AVX2_ONLY, int8_avx2, OPAQUE_AVX2, _mm256_setzero_si256(), _mm256_set1_epi8(3),
     _mm256_set1_epi8(5), sum = _mm256_add_epi32(sum, _mm256_madd_epi16(
         _mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1))))
RATE(AVX_VNNI, int8_avx_vnni, OPAQUE_AVX2, _mm256_setzero_si256(), _mm256_set1_epi8(3),
     _mm256_set1_epi8(5), sum = _mm256_dpbusd_avx_epi32(sum, a, b))
RATE(VNNI512, int8_vnni512, OPAQUE_AVX512, _mm512_setzero_si512(), _mm512_set1_epi8(3),
     _mm512_set1_epi8(5), sum = _mm512_dpbusd_epi32(sum, a, b))

/* DEEP times vpmaddubsw and vpaddw, then vpmaddwd and vpaddd. Sums in 16 bits are opaque too, or
 * GCC keeps all products for later, in memory. */
#define RATE_16(target, name, opaque, bits, n_sums)                                          \
    target static void name(uint64_t n)                                                      \
    {                                                                                        \
        __m##bits##i acc[n_sums], a = _mm##bits##_set1_epi8(3);                              \
        const __m##bits##i b = _mm##bits##_set1_epi8(5), one = _mm##bits##_set1_epi16(1);    \
        UNROLL                                                                               \
        for (int j = 0; j < n_sums; j++) {                                                   \
            acc[j] = _mm##bits##_setzero_si##bits();                                         \
            opaque(acc[j]);                                                                  \
        }                                                                                    \
        for (uint64_t i = 0; i < n; i++) {                                                   \
            __m##bits##i sum[n_sums];                                                        \
            UNROLL                                                                           \
            for (int j = 0; j < n_sums; j++)                                                 \
                sum[j] = _mm##bits##_setzero_si##bits();                                     \
            UNROLL                                                                           \
            for (int d = 0; d < DEEP; d++) {                                                 \
                UNROLL                                                                       \
                for (int j = 0; j < n_sums; j++) {                                           \
                    opaque(a);                                                               \
                    sum[j] = _mm##bits##_add_epi16(sum[j], _mm##bits##_maddubs_epi16(a, b)); \
                    opaque(sum[j]);                                                          \
                }                                                                            \
            }                                                                                \
            UNROLL                                                                           \
            for (int j = 0; j < n_sums; j++)                                                 \
                acc[j] = _mm##bits##_add_epi32(acc[j], _mm##bits##_madd_epi16(sum[j], one)); \
        }                                                                                    \
        UNROLL                                                                               \
        for (int j = 0; j < n_sums; j++)                                                     \
            opaque(acc[j]);                                                                  \
    }

RATE_16(AVX2_ONLY, int8_avx2_16, OPAQUE_AVX2, 256, CHAINS_16_AVX2)
RATE_16(AVX512, int8_avx512_16, OPAQUE_AVX512, 512, CHAINS_16_AVX512)

#elif MOE_ARM64

RATE(, f32_neon, OPAQUE_ARM, vdupq_n_f32(0), vdupq_n_f32(0.5f), vdupq_n_f32(0.25f),
     sum = vfmaq_f32(sum, a, b))
/* smull and smlal2 of halves, sadalp. */
RATE(, int8_neon, OPAQUE_ARM, vdupq_n_s32(0), vdupq_n_s8(3), vdupq_n_s8(5),
     sum = vpadalq_s16(sum, vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b)))
RATE(MOE_DOTPROD, int8_dotprod, OPAQUE_ARM, vdupq_n_s32(0), vdupq_n_s8(3), vdupq_n_s8(5),
     ARM_SDOT(sum, b, a))
RATE(MOE_I8MM, int8_i8mm, OPAQUE_ARM, vdupq_n_s32(0), vdupq_n_s8(3), vdupq_n_s8(5),
     ARM_SMMLA(sum, b, a))

#endif

/* ------------------------------------------------------------------------------------ rows -- */

typedef enum row_kind { ROW_READ, ROW_F32, ROW_INT8, N_KINDS } row_kind;

typedef struct roofline_row {
    const char *name;
    row_kind kind;
    uint32_t cpu;           /* bits that the machine must have */
    void (*run)(uint64_t n);
    double ops;             /* per round of run() */
    bool small_pages, prefetch; /* ROW_READ */
} roofline_row;

static const char *const kind_names[] = {"read", "f32", "int8"};
static const char *const kind_units[] = {"GB/s", "Gop/s", "Gop/s"};

static const roofline_row rows[] = {
    {"2 MiB pages", ROW_READ, 0, NULL, 0, false, false},
    {"2 MiB pages, prefetch", ROW_READ, 0, NULL, 0, false, true},
    {"4 KiB pages", ROW_READ, 0, NULL, 0, true, false},
    {"4 KiB pages, prefetch", ROW_READ, 0, NULL, 0, true, true},
#if MOE_X86
    {"AVX2 FMA", ROW_F32, MOE_CPU_AVX2, f32_avx2, 2 * 8 * CHAINS, false, false},
    {"AVX-512 FMA", ROW_F32, MOE_CPU_AVX512, f32_avx512, 2 * 16 * CHAINS, false, false},
    {"AVX2 maddubs, madd, add", ROW_INT8, MOE_CPU_AVX2, int8_avx2, 2 * 32 * CHAINS, false, false},
    {"AVX2 maddubs, 16-bit sums", ROW_INT8, MOE_CPU_AVX2, int8_avx2_16,
     2 * 32 * DEEP * CHAINS_16_AVX2, false, false},
    {"AVX-VNNI vpdpbusd, 256 bits", ROW_INT8, MOE_CPU_AVX_VNNI, int8_avx_vnni, 2 * 32 * CHAINS,
     false, false},
    {"AVX-512 maddubs, 16-bit sums", ROW_INT8, MOE_CPU_AVX512, int8_avx512_16,
     2 * 64 * DEEP * CHAINS_16_AVX512, false, false},
    {"AVX-512 vpdpbusd, 512 bits", ROW_INT8, MOE_CPU_AVX512_VNNI, int8_vnni512, 2 * 64 * CHAINS,
     false, false},
#elif MOE_ARM64
    {"NEON fmla", ROW_F32, MOE_CPU_NEON, f32_neon, 2 * 4 * CHAINS, false, false},
    {"NEON smull, smlal, sadalp", ROW_INT8, MOE_CPU_NEON, int8_neon, 2 * 16 * CHAINS, false, false},
    {"dotprod sdot", ROW_INT8, MOE_CPU_DOTPROD, int8_dotprod, 2 * 16 * CHAINS, false, false},
    {"i8mm smmla", ROW_INT8, MOE_CPU_I8MM, int8_i8mm, 2 * 32 * CHAINS, false, false},
#endif
};

/* ------------------------------------------------------------------------------- measuring -- */

/* XORs `bytes` bytes, a multiple of 64. */
MOE_INLINE uint64_t read_words(const uint64_t *p, size_t bytes, bool prefetch)
{
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < bytes / 8; i += 8) {
        if (prefetch)
            __builtin_prefetch((const void *)((uintptr_t)(p + i) + PREFETCH));
        for (size_t j = 0; j < 8; j++)
            sum[j] ^= p[i + j];
    }
    uint64_t all = 0;
    for (size_t j = 0; j < 8; j++)
        all ^= sum[j];
    return all;
}

#if MOE_X86
MOE_TARGET("avx2") static uint64_t read_avx2(const void *p, size_t bytes, bool prefetch)
{
    return prefetch ? read_words(p, bytes, true) : read_words(p, bytes, false);
}
#endif

static uint64_t read_any(const void *p, size_t bytes, bool prefetch)
{
#if MOE_X86
    if (cpu_detect() & MOE_CPU_AVX2)
        return read_avx2(p, bytes, prefetch);
#endif
    return prefetch ? read_words(p, bytes, true) : read_words(p, bytes, false);
}

typedef struct worker {
    plat_thread thread;
    const roofline_row *row;
    uint64_t n;                    /* rounds */
    const uint8_t *data;           /* [bytes] its part of the buffer */
    size_t bytes;
    _Atomic uint32_t *n_ready, *go; /* shared by all */
    uint64_t end_ns;
} worker;

static void worker_run(worker *w)
{
    if (w->row->kind == ROW_READ)
        sink ^= read_any(w->data, w->bytes, w->row->prefetch);
    else
        w->row->run(w->n);
    w->end_ns = plat_time_ns();
}

static void worker_main(void *arg)
{
    worker *w = arg;
    atomic_fetch_add(w->n_ready, 1);
    while (!atomic_load(w->go))
        plat_relax();
    worker_run(w);
}

/* Seconds from the common start until the last thread is done. */
static double run_threads(const roofline_row *row, uint64_t n, const uint8_t *data, size_t bytes,
                          uint32_t n_threads)
{
    static worker workers[MAX_THREADS];
    _Atomic uint32_t n_ready = 0, go = 0;
    const size_t part = bytes / n_threads / 64 * 64;
    for (uint32_t i = 0; i < n_threads; i++) {
        workers[i] = (worker){.row = row, .n = n, .data = data + i * part, .bytes = part,
                              .n_ready = &n_ready, .go = &go};
        if (i && !plat_thread_start(&workers[i].thread, worker_main, &workers[i])) {
            fprintf(stderr, "roofline: cannot start thread %u\n", i);
            exit(1);
        }
    }
    while (atomic_load(&n_ready) + 1 < n_threads)
        plat_yield();
    const uint64_t start = plat_time_ns();
    atomic_store(&go, 1);
    worker_run(&workers[0]);
    uint64_t end = workers[0].end_ns;
    for (uint32_t i = 1; i < n_threads; i++) {
        plat_thread_join(&workers[i].thread);
        end = MOE_MAX(end, workers[i].end_ns);
    }
    return (double)(end - start) * 1e-9;
}

/* A buffer in pages of one size, touched. The system may give small pages for large ones. */
static uint8_t *buffer_open(size_t bytes, bool small_pages)
{
    uint8_t *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "roofline: no memory for %zu bytes\n", bytes);
        exit(1);
    }
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, small_pages ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
#endif
    for (size_t i = 0; i < bytes; i += 8)
        memcpy(p + i, &i, 8);
    return p;
}

/* Billions of operations or bytes per second: the best of n_runs. */
static double measure(const roofline_row *row, const uint8_t *data, size_t bytes,
                      uint32_t n_threads, uint32_t n_runs)
{
    uint64_t n = 1000;
    if (row->kind != ROW_READ)
        while (run_threads(row, n, NULL, 0, 1) < 0.01)
            n *= 2;
    double best = 0;
    for (uint32_t i = 0; i < n_runs; i++) {
        const double seconds = run_threads(row, n, data, bytes, n_threads);
        const double work = row->kind == ROW_READ
                                ? (double)(bytes / n_threads / 64 * 64) * n_threads
                                : (double)n * row->ops * n_threads;
        best = MOE_MAX(best, work / seconds * 1e-9);
    }
    return best;
}

/* ------------------------------------------------------------------------------------ main -- */

typedef struct options {
    bool json;
    uint32_t n_threads, n_runs;
    size_t bytes;
} options;

static bool parse(options *o, int argc, char **argv)
{
    *o = (options){false, plat_n_cores(), 9, BUFFER_BYTES};
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--json"))
            o->json = true;
        else if (!strcmp(argv[i], "--quick"))
            o->n_runs = 3, o->bytes = BUFFER_BYTES / 4;
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
            o->n_threads = (uint32_t)strtoul(argv[++i], NULL, 10);
        else
            return false;
    }
    return o->n_threads >= 1 && o->n_threads <= MAX_THREADS;
}

int main(int argc, char **argv)
{
    options o;
    if (!parse(&o, argc, argv)) {
        fprintf(stderr, "usage: roofline [--json] [--quick] [--threads 1..%d]\n", MAX_THREADS);
        return 2;
    }
    const uint32_t cpu = cpu_detect();
    double limit[N_KINDS] = {0};
    const char *comma = "";
    if (o.json)
        printf("{\"threads\": %u, \"rows\": [", o.n_threads);
    else
        printf("%-36s %10s %10u\n", "threads", "1", o.n_threads);
    for (size_t i = 0; i < MOE_COUNT(rows); i++) {
        const roofline_row *r = &rows[i];
        if ((cpu & r->cpu) != r->cpu)
            continue;
        uint8_t *data = r->kind == ROW_READ ? buffer_open(o.bytes, r->small_pages) : NULL;
        const double one = measure(r, data, o.bytes, 1, o.n_runs);
        const double all = measure(r, data, o.bytes, o.n_threads, o.n_runs);
        if (data)
            munmap(data, o.bytes);
        limit[r->kind] = MOE_MAX(limit[r->kind], all);
        const char *kind = kind_names[r->kind], *unit = kind_units[r->kind];
        if (o.json)
            printf("%s\n  {\"kind\": \"%s\", \"name\": \"%s\", \"unit\": \"%s\", \"one\": %.2f, "
                   "\"all\": %.2f}", comma, kind, r->name, unit, one, all);
        else
            printf("%-5s %-30s %10.1f %10.1f %s\n", kind, r->name, one, all, unit);
        fflush(stdout);
        comma = ",";
    }
    if (o.json)
        printf("\n],\n\"read_gb_s\": %.2f, \"f32_gop_s\": %.2f, \"int8_gop_s\": %.2f}\n",
               limit[ROW_READ], limit[ROW_F32], limit[ROW_INT8]);
    else
        printf("limits: read %.1f GB/s, f32 %.0f Gop/s, int8 %.0f Gop/s\n", limit[ROW_READ],
               limit[ROW_F32], limit[ROW_INT8]);
    return 0;
}
