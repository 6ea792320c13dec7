/* tests/test_attend.c - attention (backends/cpu_attend.c) over more than one segment: the same bits
 * for a token by itself and in a batch, for every instruction set and number of threads, and near
 * what plain double arithmetic gives. Shapes are odd on purpose: they fill no vector, panel or
 * block. */
#include "test.h"

typedef struct attend_shape {
    uint32_t n_head, n_kv, dim_k, dim_v, window, n_slot, n_tok;
    moe_cache_type type;
    float cap;
    bool sink, latent; // latent: the values are the first dim_v elements of the keys
} attend_shape;

typedef struct attend_rig {
    const attend_shape *shape;
    moe_mem mem;
    moe_device *device;
    moe_queue *queue;
    moe_buffer *q, *k, *v, *dst, *sink, *k_cache, *v_cache;
    moe_cache keys, values;
} attend_rig;

static void attend_fill(moe_buffer *b, uint32_t seed)
{
    float *x = (float *)(void *)b->data;
    for (size_t i = 0; i < b->bytes / sizeof *x; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(int32_t)seed * 0x1p-30f;
    }
}

static bool attend_open(attend_rig *r, const attend_shape *s, moe_isa isa, uint32_t n_threads)
{
    const moe_backend *be = backend_cpu();
    const uint64_t rows_k = (uint64_t)s->n_tok * s->n_kv * s->dim_k * sizeof(float);
    const uint64_t rows_v = (uint64_t)s->n_tok * s->n_kv * s->dim_v * sizeof(float);
    *r = (attend_rig){.shape = s};
    mem_init(&r->mem, NULL, 0);
    const moe_device_options device = {&r->mem, isa};
    const moe_queue_options queue = {
        .n_threads = n_threads, .n_tok_max = s->n_tok, .n_head_max = s->n_head,
        .n_slot_max = s->n_slot, .dim_max = MOE_MAX(s->dim_k, s->dim_v),
        .int16 = s->type == CACHE_INT16};
    moe_error error;
    if (be->device_open(&r->device, &device, &error) ||
        be->queue_open(&r->queue, r->device, &queue, &error))
        return false;
    const struct {
        moe_buffer **buffer;
        uint64_t bytes;
    } wanted[] = {
        {&r->q, rows_k / s->n_kv * s->n_head}, {&r->dst, rows_v / s->n_kv * s->n_head},
        {&r->k, rows_k}, {&r->v, rows_v}, {&r->sink, s->n_head * sizeof(float)},
        {&r->k_cache, s->n_slot * s->n_kv * cache_row_bytes(s->type, s->dim_k)},
        {&r->v_cache, s->n_slot * s->n_kv * cache_row_bytes(s->type, s->dim_v)}};
    for (size_t i = 0; i < MOE_COUNT(wanted); i++)
        if (be->buffer_new(r->device, wanted[i].bytes, wanted[i].buffer, &error))
            return false;
    attend_fill(r->q, 1);
    attend_fill(r->k, 2);
    attend_fill(r->v, 3);
    attend_fill(r->sink, 4);
    r->keys = (moe_cache){{r->k_cache, 0}, s->type, s->n_kv, s->n_slot, s->dim_k};
    r->values = (moe_cache){{r->v_cache, 0}, s->type, s->n_kv, s->n_slot, s->dim_v};
    return true;
}

static void attend_close(attend_rig *r)
{
    const moe_backend *be = backend_cpu();
    moe_buffer *buffers[] = {r->q, r->k, r->v, r->dst, r->sink, r->k_cache, r->v_cache};
    for (size_t i = 0; i < MOE_COUNT(buffers); i++)
        be->buffer_free(r->device, buffers[i]);
    be->queue_close(r->queue);
    be->device_close(r->device);
}

/* All tokens, `chunk` at a time, each chunk stored before it is attended to: r->dst. */
static void attend_run(attend_rig *r, uint32_t chunk)
{
    const attend_shape *s = r->shape;
    const moe_backend *be = backend_cpu();
    const uint64_t row_k = s->dim_k * sizeof(float), row_v = s->dim_v * sizeof(float);
    moe_error error;
    memset(r->dst->data, 0xff, (size_t)r->dst->bytes);
    for (uint32_t t = 0, n; t < s->n_tok; t += n) {
        n = MOE_MIN(chunk, s->n_tok - t);
        const moe_store_op keys = {&r->keys, {r->k, t * s->n_kv * row_k}, n, t};
        const moe_store_op values = {&r->values, {r->v, t * s->n_kv * row_v}, n, t};
        const moe_attend_op attend = {
            .dst = {r->dst, t * s->n_head * row_v},
            .q = {r->q, t * s->n_head * row_k},
            .k = &r->keys,
            .v = s->latent ? &r->keys : &r->values,
            .sink = {s->sink ? r->sink : NULL, 0},
            .n_tok = n,
            .pos = t,
            .n_head = s->n_head,
            .window = s->window,
            .scale = 0.3f,
            .cap = s->cap,
            .dim_v = s->latent ? s->dim_v : 0,
        };
        be->store(r->queue, &keys);
        if (!s->latent)
            be->store(r->queue, &values);
        be->attend(r->queue, &attend);
        CHECK(!be->submit(r->queue, &error), "%s", error.message);
    }
}

/* The head's result for token t in double arithmetic, from unrounded keys and values. */
static void attend_plainly(const attend_rig *r, uint32_t t, uint32_t head, double *dst)
{
    const attend_shape *s = r->shape;
    const uint32_t kv = head / (s->n_head / s->n_kv), step_v = s->latent ? s->dim_k : s->dim_v;
    const float *q = (const float *)(void *)r->q->data + (t * s->n_head + head) * s->dim_k;
    const float *k = (const float *)(void *)r->k->data + kv * s->dim_k;
    const float *v = s->latent ? k : (const float *)(void *)r->v->data + kv * s->dim_v;
    double sum = s->sink ? exp((double)((const float *)(void *)r->sink->data)[head]) : 0;
    memset(dst, 0, s->dim_v * sizeof *dst);
    for (uint32_t j = s->window && t + 1 > s->window ? t + 1 - s->window : 0; j <= t; j++) {
        double score = 0;
        for (uint32_t i = 0; i < s->dim_k; i++)
            score += (double)q[i] * (double)k[j * s->n_kv * s->dim_k + i];
        score *= (double)0.3f;
        const double weight = exp(s->cap > 0 ? s->cap * tanh(score / s->cap) : score);
        sum += weight;
        for (uint32_t i = 0; i < s->dim_v; i++)
            dst[i] += weight * (double)v[j * s->n_kv * step_v + i];
    }
    for (uint32_t i = 0; i < s->dim_v; i++)
        dst[i] /= sum;
}

static void attend_check_values(const attend_rig *r)
{
    const attend_shape *s = r->shape;
    const double bound = s->type == MOE_CACHE_F32 ? 1e-5 : s->type == MOE_CACHE_Q8_0 ? 0.15 : 5e-3;
    const float *got = (const float *)(void *)r->dst->data;
    double want[64];
    for (uint32_t t = 0; t < s->n_tok; t += 7)
        for (uint32_t h = 0; h < s->n_head; h++) {
            attend_plainly(r, t, h, want);
            for (uint32_t i = 0; i < s->dim_v; i++)
                CHECK(fabs((double)got[(t * s->n_head + h) * s->dim_v + i] - want[i]) < bound,
                      "token %u, head %u: %g instead of %g", t, h,
                      (double)got[(t * s->n_head + h) * s->dim_v + i], want[i]);
        }
}

/* n_slot below n_tok: a ring, as a sliding window has it. */
static const attend_shape attend_shapes[] = {
    {6, 2, 40, 24, 0, 300, 300, MOE_CACHE_F32, 0, false, false},
    {3, 1, 64, 64, 0, 520, 520, MOE_CACHE_F16, 0, false, false},
    {10, 2, 33, 35, 70, 270, 290, MOE_CACHE_F32, 4, true, false},
    {2, 2, 64, 32, 290, 490, 550, MOE_CACHE_Q8_0, 0, true, false},
    {17, 1, 150, 50, 0, 290, 290, MOE_CACHE_Q8_0, 0, false, true},
    {16, 1, 64, 40, 0, 280, 280, MOE_CACHE_F16, 0, false, false},
    {17, 1, 150, 50, 0, 290, 290, CACHE_INT16, 0, false, true},
    {6, 2, 96, 33, 70, 270, 290, CACHE_INT16, 4, true, true},
    {70, 1, 40, 32, 0, 260, 260, CACHE_INT16, 0, true, true},
};

static void attention_is_right(void)
{
    for (size_t i = 0; i < MOE_COUNT(attend_shapes); i++) {
        attend_rig r;
        REQUIRE(attend_open(&r, &attend_shapes[i], MOE_ISA_AUTO, 1), "memory");
        attend_run(&r, 200);
        attend_check_values(&r);
        attend_close(&r);
    }
}

static void attention_keeps_its_bits(void)
{
    static const struct {
        moe_isa isa;
        uint32_t n_threads, chunk;
    } ways[] = {{MOE_ISA_C, 2, 200}, {MOE_ISA_AVX2, 1, 190}, {MOE_ISA_AVX2, 2, 3},
                {MOE_ISA_AUTO, 1, 1}, {MOE_ISA_AUTO, 3, 23}, {MOE_ISA_AUTO, 2, 200}};
    for (size_t i = 0; i < MOE_COUNT(attend_shapes); i++) {
        attend_rig want;
        REQUIRE(attend_open(&want, &attend_shapes[i], MOE_ISA_AUTO, 1), "memory");
        attend_run(&want, 200);
        for (size_t w = 0; w < MOE_COUNT(ways); w++) {
            attend_rig r;
            REQUIRE(attend_open(&r, &attend_shapes[i], ways[w].isa, ways[w].n_threads), "memory");
            attend_run(&r, ways[w].chunk);
            CHECK(memcmp(r.dst->data, want.dst->data, (size_t)want.dst->bytes) == 0,
                  "shape %zu, isa %d, %u threads, calls of %u", i, (int)ways[w].isa,
                  ways[w].n_threads, ways[w].chunk);
            attend_close(&r);
        }
        attend_close(&want);
    }
}

TEST_PROGRAM(attend)
{
    RUN(attention_is_right);
    RUN(attention_keeps_its_bits);
}
