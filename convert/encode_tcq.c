/* convert/encode_tcq.c - the encoder of the trellis-coded types (quant/tcq.h): rows of floats to the
 * blocks that cost least.
 *
 * What a row costs is its squared error, weighted by the importance of the columns, plus lambda times
 * the bits that its codes will take on disk (entropy-constrained trellis-coded quantization: Fischer
 * and Wang 1992). The best path of each of the row's 32 trellises is found by the Viterbi algorithm.
 * lambda is a fixed multiple of the squared step, so the step alone sets the rate.
 *
 * A plan holds what the rows of a tensor have in common: the step, and what each code costs. It is
 * made from a sample of the rows, which is encoded a few times until step, rate and costs agree.
 * Must never: depend on the machine or on how rows are cut into calls. All float expressions are
 * spelled out with fmaf; there is one source for all instruction sets, which compilers vectorize. */
#ifndef MOE_CONVERT_ENCODE_TCQ_C
#define MOE_CONVERT_ENCODE_TCQ_C

#include "convert.h"

enum {
    TCQ_STEPS = 256,      /* of a row that are searched at once: rows of 8192 are not cut */
    TCQ_CODES = 128,      /* of the type with most */
    TCQ_SAMPLE = 1 << 14, /* weights from which a plan is made */
    TCQ_PASSES = 6
};

typedef struct tcq_format {
    uint32_t id;
    int bias;             // half the number of values, and the number of codes
    double bits;          // per weight on disk, of a plan that was not asked for a rate
    double most;          // up to which rate the codes reach far enough
    tcq_put_fn *put;
} tcq_format;

static const tcq_format tcq_formats[] = {
    {4096, TCQ4_BIAS, 3.0, 3.2, tcq4_put},
    {4097, TCQ5_BIAS, 4.0, 4.3, tcq5_put},
    {4098, TCQ8_BIAS, 6.0, 6.0, tcq8_put},
};

typedef struct tcq_search tcq_search;
typedef void tcq_search_fn(tcq_search *x, size_t n_step, const float *code_cost, int bias);

typedef struct tcq_plan {
    const tcq_format *format;
    const moe_quant *type;
    tcq_search_fn *search;
    const float *roots;      // [n_in] of the columns' importance, whose mean is 1; NULL: all alike
    float d;                 // the step of most blocks, a number of binary16
    float cost[TCQ_CODES];   // lambda times the bits of each code, in units of d^2
} tcq_plan;

MOE_UNUSED static bool tcq_is(const moe_quant *type)
{
    return type->id - tcq_formats[0].id < MOE_COUNT(tcq_formats);
}

/* The type for a rate. */
MOE_UNUSED static const moe_quant *tcq_type(double bits)
{
    size_t i = 0;
    while (i + 1 < MOE_COUNT(tcq_formats) && bits > tcq_formats[i].most)
        i++;
    return quant_by_id(tcq_formats[i].id);
}

/* -------------------------------------------------------------------------------- search -- */

/* Weights of up to TCQ_STEPS steps of the 32 paths, in units of the step d of their block, what the
 * search makes of them, and what it found. */
struct tcq_search {
    float y[TCQ_STEPS][TCQ_PATHS];
    float scale[TCQ_STEPS][TCQ_PATHS];     // the root of what an error of 1 costs
    int32_t code[TCQ_STEPS][4][TCQ_PATHS]; // the best code of each subset
    int32_t from[TCQ_STEPS][TCQ_PATHS];    // bit s: which of the two ways led into state s
    uint8_t best[TCQ_STEPS][TCQ_PATHS];    // the codes of the best paths
    uint8_t state[TCQ_PATHS];              // of each path, at the beginning and then at the end
};

/* The two ways into each state: from which one, and by which subset, v mod 4. */
static const struct { uint8_t state[2], subset[2]; } tcq_ways[8] = {
    {{0, 4}, {0, 2}}, {{0, 4}, {2, 0}}, {{1, 5}, {1, 3}}, {{1, 5}, {3, 1}},
    {{2, 6}, {2, 0}}, {{2, 6}, {0, 2}}, {{3, 7}, {3, 1}}, {{3, 7}, {1, 3}}};

/* The code nearest to each weight of one step in subset j, and what it costs: its values are 4 q + j.
 * (No sum of a product is left to the compiler: what looks like one is exact.) */
MOE_INLINE void tcq_match(const float *restrict y, const float *restrict scale, const float *code_cost,
                          int bias, int j, int32_t *restrict code, float *restrict cost)
{
    const float least = (float)(-bias / 4), most = (float)(bias / 4 - 1);
    const float rounds = 0x1.8p23f; /* adding it rounds to the nearest integer */
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        float q = (y[l] - (float)j) * 0.25f + rounds - rounds;
        q = q < least ? least : q;
        q = q > most ? most : q;
        cost[l] = (y[l] - (4.0f * q + (float)j)) * scale[l];
        code[l] = 2 * (int32_t)q + (j >> 1) + bias / 2;
    }
    float bits[TCQ_PATHS];
    for (size_t l = 0; l < TCQ_PATHS; l++)
        bits[l] = code_cost[code[l]];
    for (size_t l = 0; l < TCQ_PATHS; l++)
        cost[l] = fmaf(cost[l], cost[l], bits[l]);
}

/* The best way into state s. */
MOE_INLINE void tcq_choose(float (*path)[TCQ_PATHS], float (*cost)[TCQ_PATHS], int s,
                           float *restrict next, int32_t *restrict from)
{
    const float *path0 = path[tcq_ways[s].state[0]], *cost0 = cost[tcq_ways[s].subset[0]];
    const float *path1 = path[tcq_ways[s].state[1]], *cost1 = cost[tcq_ways[s].subset[1]];
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        const float a = path0[l] + cost0[l], b = path1[l] + cost1[l];
        const int32_t second = -(b < a);
        next[l] = b < a ? b : a;
        from[l] |= second & 1 << s;
    }
}

/* Forward: what the best path into each state costs, step after step; then back along the best. */
MOE_INLINE void tcq_search_body(tcq_search *x, size_t n_step, const float *code_cost, int bias)
{
    float path[2][8][TCQ_PATHS], cost[4][TCQ_PATHS];
    for (size_t l = 0; l < TCQ_PATHS; l++)
        for (int s = 0; s < 8; s++)
            path[0][s][l] = s == x->state[l] ? 0 : 1e30f;
    for (size_t t = 0; t < n_step; t++) {
        for (int j = 0; j < 4; j++)
            tcq_match(x->y[t], x->scale[t], code_cost, bias, j, x->code[t][j], cost[j]);
        memset(x->from[t], 0, sizeof x->from[t]);
        for (int s = 0; s < 8; s++)
            tcq_choose(path[t % 2], cost, s, path[1 - t % 2][s], x->from[t]);
    }
    uint8_t state[TCQ_PATHS];
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        int best = 0;
        for (int s = 1; s < 8; s++)
            if (path[n_step % 2][s][l] < path[n_step % 2][best][l])
                best = s;
        x->state[l] = state[l] = (uint8_t)best;
    }
    for (size_t t = n_step; t-- > 0;)
        for (size_t l = 0; l < TCQ_PATHS; l++) {
            const int s = state[l], way = x->from[t][l] >> s & 1;
            x->best[t][l] = (uint8_t)x->code[t][tcq_ways[s].subset[way]][l];
            state[l] = tcq_ways[s].state[way];
        }
}

static void tcq_search_c(tcq_search *x, size_t n_step, const float *code_cost, int bias)
{
    tcq_search_body(x, n_step, code_cost, bias);
}

#if MOE_X86
MOE_AVX2 static void tcq_search_avx2(tcq_search *x, size_t n_step, const float *code_cost, int bias)
{
    tcq_search_body(x, n_step, code_cost, bias);
}
#endif

static tcq_search_fn *tcq_search_select(uint32_t cpu)
{
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        return tcq_search_avx2;
#endif
    (void)cpu;
    return tcq_search_c;
}

/* ---------------------------------------------------------------------------------- rows -- */

/* The scale of a block: the plan's, or larger if its weights need it. Larger ones differ in the high
 * byte only: the plane of low bytes stays one number. */
static uint16_t tcq_block_scale(const tcq_plan *p, const float *src)
{
    uint16_t stored = f16_of_f32(p->d);
    const float peak = fabsf(quant_peak(src, TCQ_LEN)) / ((float)p->format->bias - 0.5f);
    while (f32_of_f16(stored) < peak && stored < 0x7b00)
        stored = (uint16_t)(stored + 0x100);
    return stored;
}

/* Steps first .. first + n_step - 1 of a row. */
static void tcq_encode_steps(const tcq_plan *p, tcq_search *x, const float *src, size_t first,
                             size_t n_step, uint8_t *blocks)
{
    for (size_t t = 0; t < n_step; t++) {
        uint8_t *block = blocks + (first + t) / 2 * p->type->block_bytes;
        const float *w = src + (first + t) * TCQ_PATHS;
        if (t % 2 == 0) {
            const uint16_t stored = tcq_block_scale(p, w);
            memcpy(block, &stored, 2);
        }
        const float d = f32_of_f16(load_u16(block)), relative = d / p->d;
        for (size_t l = 0; l < TCQ_PATHS; l++) {
            x->y[t][l] = w[l] / d;
            x->scale[t][l] =
                p->roots ? p->roots[(first + t) * TCQ_PATHS + l] * relative : relative;
        }
    }
    p->search(x, n_step, p->cost, p->format->bias);
    for (size_t t = 0; t < n_step; t++)
        p->format->put(blocks + (first + t) / 2 * p->type->block_bytes, t % 2, x->best[t]);
}

/* Counts the codes, unless `counts` is NULL. */
static void tcq_encode_row(const tcq_plan *p, tcq_search *x, const float *src, uint8_t *blocks,
                           size_t n_in, uint32_t *counts)
{
    const size_t n_step = n_in / TCQ_PATHS;
    memset(x->state, 0, sizeof x->state);
    for (size_t first = 0; first < n_step; first += TCQ_STEPS) {
        const size_t n = MOE_MIN(n_step - first, (size_t)TCQ_STEPS);
        tcq_encode_steps(p, x, src, first, n, blocks);
        for (size_t t = 0; counts && t < n; t++)
            for (size_t l = 0; l < TCQ_PATHS; l++)
                counts[x->best[t][l]]++;
    }
}

/* ---------------------------------------------------------------------------------- plan -- */

/* log2(x) in units of 2^-16, x > 0; the same on all machines. */
static int64_t tcq_log2(uint64_t x)
{
    int64_t log = 63 - __builtin_clzll(x);
    x <<= 63 - log; // 2^63 is 1
    for (int i = 0; i < 16; i++) {
        const uint64_t half = x >> 32;
        x = half * half; // 2^62 is 1
        log = 2 * log + (int64_t)(x >> 63);
        x <<= !(x >> 63);
    }
    return log;
}

/* Bits per weight on disk, in units of 2^-16: the entropy of the codes (TCQ5: with their lowest bits
 * apart), and what Huffman codes of bytes lose. */
static int64_t tcq_bits(const tcq_format *f, const uint32_t counts[TCQ_CODES], uint64_t n)
{
    const int64_t loss = 65536 * 15 / 1000;
    const int apart = f->bias == TCQ5_BIAS;
    int64_t sum = 0;
    for (int c = 0; c < f->bias; c += 1 + apart) {
        const uint64_t count = (uint64_t)counts[c] + (apart ? counts[c + 1] : 0);
        if (count)
            sum += (int64_t)count * tcq_log2(count);
    }
    return tcq_log2(n) - sum / (int64_t)n + apart * 65536 + loss;
}

/* What the codes will cost, from how often they were used: lambda is 0.4 squared steps per bit, which
 * gives the least error at a given rate. Codes that were not used cost as if it had been half a time. */
static void tcq_costs(tcq_plan *p, const uint32_t counts[TCQ_CODES], uint64_t n)
{
    for (int c = 0; c < p->format->bias; c++)
        p->cost[c] = (float)(tcq_log2(2 * n) - tcq_log2(2 * (uint64_t)counts[c] + 1)) * (0.4f / 65536);
}

/* No column is without any importance. */
static void tcq_roots(const float *importance, float *roots, size_t n)
{
    double sum = 0;
    for (size_t k = 0; k < n; k++)
        sum += importance[k];
    const float mean = (float)(sum / (double)n);
    for (size_t k = 0; k < n; k++)
        roots[k] = mean > 0 ? sqrtf(fmaxf(importance[k] / mean, 1e-3f)) : 1;
}

/* Bytes of the room that a plan for rows of n_in weights is made in and then needs; it need not be
 * initialized: the search, the roots, a row of blocks. */
static size_t tcq_room_bytes(size_t n_in)
{
    return sizeof(tcq_search) + n_in * sizeof(float) + n_in / TCQ_LEN * sizeof(tcq8_block);
}

/* The plan for rows like these: `bits` per weight on disk; 0: the type's default. importance [n_in] as
 * for an encode_fn. */
static void tcq_plan_make(tcq_plan *p, const moe_quant *type, double bits, const float *src,
                          const float *importance, size_t n_row, size_t n_in, void *room)
{
    const tcq_format *f = &tcq_formats[type->id - tcq_formats[0].id];
    const int64_t want = (int64_t)((bits > 0 ? bits : f->bits) * 65536);
    float *roots = (float *)(void *)((uint8_t *)room + sizeof(tcq_search));
    uint8_t *blocks = (uint8_t *)(roots + n_in);
    double sum = 0;
    *p = (tcq_plan){.format = f, .type = type, .search = tcq_search_select(cpu_detect())};
    if (importance) {
        tcq_roots(importance, roots, n_in);
        p->roots = roots;
    }
    for (size_t k = 0; k < n_row * n_in; k++)
        sum += (double)src[k] * (double)src[k]; // exact products
    int32_t stored = f16_of_f32((float)(sqrt(sum / (double)(n_row * n_in)) * 0.25));
    for (int pass = 0; pass < TCQ_PASSES; pass++) {
        uint32_t counts[TCQ_CODES] = {0};
        p->d = f32_of_f16((uint16_t)MOE_MIN(MOE_MAX(stored, 1), 0x7bff));
        for (size_t r = 0; r < n_row; r++)
            tcq_encode_row(p, room, src + r * n_in, blocks, n_in, counts);
        tcq_costs(p, counts, n_row * n_in);
        // 2^10 in binary16 is an octave, which is a bit
        stored += (int32_t)((tcq_bits(f, counts, n_row * n_in) - want) >> 6);
    }
}

/* Rows by the plan, in the room that it was made in. */
static void tcq_encode(const tcq_plan *p, const float *src, uint8_t *dst, size_t n_row, size_t n_in,
                       void *room)
{
    for (size_t r = 0; r < n_row; r++)
        tcq_encode_row(p, room, src + r * n_in, dst + r * (n_in / TCQ_LEN) * p->type->block_bytes,
                       n_in, NULL);
}

#endif
