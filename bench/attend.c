/* bench/attend.c - the speed of attention by itself, behind a long context.
 *
 *     attend [--isa NAME] [--cache TYPE] [-t THREADS] [-n TOKENS] [-d DEPTH] [SHAPE ...]
 *
 * TOKENS tokens (1: decode) are attended to behind DEPTH - TOKENS others, layer after layer, each
 * with a cache of its own: together they are larger than the caches of the core, as in a model,
 * where weights pass through between one layer and the next. Per layer: milliseconds, multiply-adds
 * (two operations each) per second, and bytes of keys and values per second: the median run, and
 * milliseconds of the best, which other users of the machine disturb least. TYPE is f32, f16, q8_0
 * or int16, which is how latents are kept where F16 is asked for: only the shapes of DeepSeek. */
#include "../tests/test.h"

enum { N_RUNS = 15, RAM_BYTES = 128 << 20, MOST_LAYERS = 64 };

typedef struct bench_shape {
    const char *name;
    uint32_t n_head, n_kv, dim_k, dim_v;
    bool latent; // the values are the first dim_v elements of the keys
} bench_shape;

static const bench_shape shapes[] = {
    {"smollm2", 9, 3, 64, 64, false},
    {"llama-8b", 32, 8, 128, 128, false},
    {"qwen3-moe", 32, 4, 128, 128, false},
    {"deepseek-v2-lite", 16, 1, 576, 512, true},
    {"deepseek-v3", 128, 1, 576, 512, true},
};

typedef struct bench_options {
    moe_isa isa;
    moe_cache_type type;
    uint32_t n_threads, n_tok, depth;
} bench_options;

typedef struct rig {
    const bench_shape *shape;
    const bench_options *options;
    moe_mem mem;
    moe_device *device;
    moe_queue *queue;
    moe_buffer *q, *dst, *rows, *caches;
    uint32_t n_layer;
    uint64_t k_bytes, v_bytes; // of a layer's cache
    moe_cache k[MOST_LAYERS], v[MOST_LAYERS];
} rig;

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static moe_status rig_buffers(rig *r, moe_error *error)
{
    const bench_shape *s = r->shape;
    const bench_options *o = r->options;
    const moe_backend *be = backend_cpu();
    const uint64_t f = sizeof(float), n = (uint64_t)o->n_tok * s->n_head;
    const uint32_t dim_v = s->latent ? 0 : s->dim_v;
    r->k_bytes = cache_row_bytes(o->type, s->dim_k) * s->n_kv * o->depth;
    r->v_bytes = cache_row_bytes(o->type, dim_v) * s->n_kv * o->depth;
    r->n_layer = (uint32_t)MOE_MIN(MOST_LAYERS, RAM_BYTES / (r->k_bytes + r->v_bytes) + 1);
    moe_status status = be->buffer_new(r->device, n * s->dim_k * f, &r->q, error);
    if (!status)
        status = be->buffer_new(r->device, n * s->dim_v * f, &r->dst, error);
    if (!status)
        status = be->buffer_new(r->device, (uint64_t)o->depth * s->n_kv * s->dim_k * f, &r->rows,
                                error);
    if (!status)
        status = be->buffer_new(r->device, r->n_layer * (r->k_bytes + r->v_bytes), &r->caches,
                                error);
    for (uint32_t i = 0; i < r->n_layer && !status; i++) {
        const moe_view view = {r->caches, i * (r->k_bytes + r->v_bytes)};
        r->k[i] = (moe_cache){view, o->type, s->n_kv, o->depth, s->dim_k};
        r->v[i] = s->latent ? r->k[i] : (moe_cache){view_at(view, r->k_bytes), o->type, s->n_kv,
                                                    o->depth, s->dim_v};
    }
    return status;
}

static void fill(moe_buffer *b)
{
    float *x = (float *)(void *)b->data;
    for (uint64_t i = 0; i < b->bytes / sizeof *x; i++)
        x[i] = test_random_float();
}

static moe_status rig_open(rig *r, const bench_shape *s, const bench_options *o, moe_error *error)
{
    const moe_backend *be = backend_cpu();
    *r = (rig){.shape = s, .options = o};
    mem_init(&r->mem, NULL, 0);
    const moe_device_options device = {&r->mem, o->isa};
    const moe_queue_options queue = {
        .n_threads = o->n_threads, .n_tok_max = o->depth, .n_head_max = s->n_head,
        .n_slot_max = o->depth, .dim_max = MOE_MAX(s->dim_k, s->dim_v),
        .int16 = o->type == CACHE_INT16};
    moe_status status = be->device_open(&r->device, &device, error);
    if (!status)
        status = be->queue_open(&r->queue, r->device, &queue, error);
    if (!status)
        status = rig_buffers(r, error);
    if (status)
        return status;
    fill(r->q);
    fill(r->rows);
    for (uint32_t i = 0; i < r->n_layer; i++) {
        be->store(r->queue, &(moe_store_op){&r->k[i], {r->rows, 0}, o->depth, 0});
        if (!s->latent)
            be->store(r->queue, &(moe_store_op){&r->v[i], {r->rows, 0}, o->depth, 0});
    }
    return be->submit(r->queue, error);
}

static void rig_close(rig *r)
{
    const moe_backend *be = backend_cpu();
    be->buffer_free(r->device, r->q);
    be->buffer_free(r->device, r->dst);
    be->buffer_free(r->device, r->rows);
    be->buffer_free(r->device, r->caches);
    be->queue_close(r->queue);
    be->device_close(r->device);
}

/* Milliseconds per layer. */
static double rig_run(rig *r)
{
    const bench_shape *s = r->shape;
    const moe_backend *be = backend_cpu();
    moe_error error;
    const uint64_t start = plat_time_ns();
    for (uint32_t i = 0; i < r->n_layer; i++) {
        const moe_attend_op attend = {
            .dst = {r->dst, 0},
            .q = {r->q, 0},
            .k = &r->k[i],
            .v = &r->v[i],
            .n_tok = r->options->n_tok,
            .pos = r->options->depth - r->options->n_tok,
            .n_head = s->n_head,
            .scale = 0.1f,
            .dim_v = s->latent ? s->dim_v : 0,
        };
        be->attend(r->queue, &attend);
    }
    be->submit(r->queue, &error);
    return (double)(plat_time_ns() - start) * 1e-6 / r->n_layer;
}

static bool bench(const bench_shape *s, const bench_options *o)
{
    rig r;
    moe_error error;
    double ms[N_RUNS];
    const moe_status status = rig_open(&r, s, o, &error);
    if (status) {
        fprintf(stderr, "%s: %s\n", s->name, error.message);
    } else {
        /* Token t sees depth - n_tok + t + 1 positions. */
        const double seen = o->n_tok * (o->depth - (o->n_tok - 1) / 2.0);
        const double op = 2.0 * s->n_head * (s->dim_k + s->dim_v) * seen;
        rig_run(&r);
        for (size_t i = 0; i < N_RUNS; i++)
            ms[i] = rig_run(&r);
        qsort(ms, N_RUNS, sizeof *ms, compare);
        const double median = ms[N_RUNS / 2];
        printf("%-17s %8.3f ms %7.1f GFLOP/s %6.1f GB/s, best %8.3f ms\n", s->name, median,
               op / median * 1e-6, (double)(r.k_bytes + r.v_bytes) / median * 1e-6, ms[0]);
        fflush(stdout);
    }
    rig_close(&r);
    return !status;
}

/* What stands behind an option; false: not that. */
static bool read_option(bench_options *o, const char *name, const char *value)
{
    static const char *const isas[] = {"auto", "c", "avx2", "avxvnni", "neon"};
    static const moe_isa isa[] = {MOE_ISA_AUTO, MOE_ISA_C, MOE_ISA_AVX2, MOE_ISA_AVXVNNI,
                                  MOE_ISA_NEON};
    static const char *const types[] = {"f32", "f16", "q8_0", "int16"};
    static const moe_cache_type type[] = {MOE_CACHE_F32, MOE_CACHE_F16, MOE_CACHE_Q8_0,
                                          CACHE_INT16};
    const uint32_t number = (uint32_t)strtoul(value, NULL, 10);
    if (strcmp(name, "-t") == 0)
        return (o->n_threads = number) != 0 && number <= MOE_MAX_THREADS;
    if (strcmp(name, "-n") == 0)
        return (o->n_tok = number) != 0;
    if (strcmp(name, "-d") == 0)
        return (o->depth = number) != 0;
    for (size_t i = 0; i < MOE_COUNT(isas); i++)
        if (strcmp(name, "--isa") == 0 && strcmp(value, isas[i]) == 0)
            return o->isa = isa[i], true;
    for (size_t i = 0; i < MOE_COUNT(types); i++)
        if (strcmp(name, "--cache") == 0 && strcmp(value, types[i]) == 0)
            return o->type = type[i], true;
    return false;
}

int main(int argc, char **argv)
{
    bench_options o = {MOE_ISA_AUTO, MOE_CACHE_F16, 1, 1, 4096};
    int i = 1;
    while (i + 1 < argc && argv[i][0] == '-' && read_option(&o, argv[i], argv[i + 1]))
        i += 2;
    bool known = o.n_tok <= o.depth, ok = true, found = i == argc;
    for (int j = i; j < argc; j++, known = known && found) {
        found = false;
        for (size_t k = 0; k < MOE_COUNT(shapes); k++)
            found = found || strcmp(argv[j], shapes[k].name) == 0;
    }
    if (!known) {
        fprintf(stderr, "usage: attend [--isa NAME] [--cache f32|f16|q8_0|int16] [-t THREADS] "
                        "[-n TOKENS] [-d DEPTH] [SHAPE ...]\n");
        return 2;
    }
    for (size_t k = 0; k < MOE_COUNT(shapes); k++) {
        bool wanted = i == argc;
        for (int j = i; j < argc; j++)
            wanted = wanted || strcmp(argv[j], shapes[k].name) == 0;
        wanted = wanted && (shapes[k].latent || o.type != CACHE_INT16);
        ok = (!wanted || bench(&shapes[k], &o)) && ok;
    }
    return ok ? 0 : 1;
}
