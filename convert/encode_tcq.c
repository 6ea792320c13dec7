/* convert/encode_tcq.c - the encoder of the trellis-coded types (quant/tcq.h): rows of floats to
 * the blocks that cost least.
 *
 * What a row costs is its squared error, weighted by the importance of the columns, plus lambda
 * times the bits that its codes will take on disk (entropy-constrained trellis-coded quantization:
 * Fischer and Wang 1992). The best path of each of the row's 32 trellises is found by the Viterbi
 * algorithm. lambda is a fixed multiple of the squared step, so the step alone sets the rate.
 *
 * A plan holds what the rows of a tensor have in common: the step, and what each code costs. It is
 * made from a sample of the rows, which is encoded a few times until step, rate and costs agree.
 * Blocks of important columns have smaller steps, those of others larger ones, the same in all
 * rows: a pattern that repeats takes next to no room.
 * Must never: depend on the machine or on how rows are cut into calls. All float expressions are
 * spelled out with fmaf; one source serves all instruction sets, compilers vectorize it. */
#ifndef MOE_CONVERT_ENCODE_TCQ_C
#define MOE_CONVERT_ENCODE_TCQ_C

#include "convert.h"

enum {
    TCQ_STATES = 64,
    TCQ_STEPS = 256,      /* of a row that are searched at once: rows of 8192 are not cut */
    TCQ_CODES = 128,      /* of the type with most */
    TCQ_SAMPLE = 1 << 16, /* weights from which a plan is made */
    TCQ_PASSES = 6,
    TCQ_ROUGH = 4         /* of them with a quarter of the sample */
};

typedef struct tcq_format {
    uint32_t id;
    int bias;             // half the number of values, and the number of codes
    double bits;          // per weight on disk, of a plan that was not asked for a rate
    double most;          // up to which rate the codes reach far enough
    float lambda;         // squared steps that a bit is worth: least error at a given rate
    tcq_put_fn *put;
} tcq_format;

static const tcq_format tcq_formats[] = {
    {QUANT_TCQ_ID, TCQ4_BIAS, 3.0, 3.2, 0.4f, tcq4_put},
    {QUANT_TCQ_ID + 1, TCQ5_BIAS, 4.0, 4.3, 0.4f, tcq5_put},
    {QUANT_TCQ_ID + 2, TCQ8_BIAS, 6.0, 6.0, 0.33f, tcq8_put},
};

typedef struct tcq_search tcq_search;
typedef void tcq_search_fn(tcq_search *x, size_t n_step, const float *code_cost, int bias);

typedef struct tcq_plan {
    const tcq_format *format;
    const moe_quant *type;
    tcq_search_fn *search;
    const float *roots;      // [n_in] of the columns' importance, whose mean is 1; NULL: all alike
    uint16_t *scales;        // [n_in / TCQ_LEN] of a row's blocks, unless weights need more
    float d;                 // the step of columns of mean importance, a number of binary16
    float reach;             // steps from 0 to the largest value that is used
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
    uint32_t from[TCQ_STEPS][TCQ_STATES / 32][TCQ_PATHS]; // a bit for each state: the way into it
    uint8_t best[TCQ_STEPS][TCQ_PATHS];    // the codes of the best paths
    uint8_t state[TCQ_PATHS];              // of each path, at the beginning and then at the end
};

/* tcq_next() backwards: the state before s, if the lowest bit of the code was `low`; and the parity
 * there, which both have in common. */
MOE_INLINE int tcq_parity_before(int s)
{
    return s / (TCQ_STATES / 2);
}

MOE_INLINE int tcq_before(int s, int low)
{
    const int parity = tcq_parity_before(s);
    return (s ^ (parity ? 48 : 0) ^ low << 1) << 1 | parity;
}

/* The code nearest to each weight of one step in subset j, of values 4 q + j, and what it costs.
 * (No sum of a product is left to the compiler: what looks like one is exact.) */
MOE_INLINE void tcq_match(const float *restrict y, const float *restrict scale,
                          const float *code_cost, int bias, int j, int32_t *restrict code,
                          float *restrict cost)
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
                           float *restrict next, uint32_t *restrict from)
{
    const float *path0 = path[tcq_before(s, 0)], *cost0 = cost[tcq_parity_before(s)];
    const float *path1 = path[tcq_before(s, 1)], *cost1 = cost[tcq_parity_before(s) + 2];
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        const float a = path0[l] + cost0[l], b = path1[l] + cost1[l];
        const uint32_t second = 0u - (b < a);
        next[l] = b < a ? b : a;
        from[l] |= second & 1u << s % 32;
    }
}

/* Forward: what the best path into each state costs, step after step; then back along the best. */
MOE_INLINE void tcq_search_body(tcq_search *x, size_t n_step, const float *code_cost, int bias)
{
    float path[2][TCQ_STATES][TCQ_PATHS], cost[4][TCQ_PATHS];
    for (size_t l = 0; l < TCQ_PATHS; l++)
        for (int s = 0; s < TCQ_STATES; s++)
            path[0][s][l] = s == x->state[l] ? 0 : 1e30f;
    for (size_t t = 0; t < n_step; t++) {
        for (int j = 0; j < 4; j++)
            tcq_match(x->y[t], x->scale[t], code_cost, bias, j, x->code[t][j], cost[j]);
        memset(x->from[t], 0, sizeof x->from[t]);
        for (int s0 = 0; s0 < TCQ_STATES; s0 += 16) {
            MOE_UNROLL
            for (int i = 0; i < 16; i++)
                tcq_choose(path[t % 2], cost, s0 + i, path[1 - t % 2][s0 + i],
                           x->from[t][s0 / 32]);
        }
    }
    uint8_t state[TCQ_PATHS];
    for (size_t l = 0; l < TCQ_PATHS; l++) {
        int best = 0;
        for (int s = 1; s < TCQ_STATES; s++)
            if (path[n_step % 2][s][l] < path[n_step % 2][best][l])
                best = s;
        x->state[l] = state[l] = (uint8_t)best;
    }
    for (size_t t = n_step; t-- > 0;)
        for (size_t l = 0; l < TCQ_PATHS; l++) {
            const int s = state[l], low = x->from[t][s / 32][l] >> s % 32 & 1;
            x->best[t][l] = (uint8_t)x->code[t][2 * low + tcq_parity_before(s)][l];
            state[l] = (uint8_t)tcq_before(s, low);
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

/* The scale of block b of a row: the plan's, or larger if its weights need it. Larger ones differ
 * in the high byte only: the plane of low bytes stays one number. */
static uint16_t tcq_block_scale(const tcq_plan *p, size_t b, const float *src)
{
    uint16_t stored = p->scales[b];
    const float peak = fabsf(quant_peak(src, TCQ_LEN)) / p->reach;
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
            const uint16_t stored = tcq_block_scale(p, (first + t) / 2, w);
            memcpy(block, &stored, 2);
        }
        const float d = f32_of_f16(load_u16(block)), relative = d / p->d;
        for (size_t l = 0; l < TCQ_PATHS; l++) {
            x->y[t][l] = w[l] / d;
            x->scale[t][l] =
                p->roots ? p->roots[(first + t) * TCQ_PATHS + l] * relative : relative;
        }
    }
    uint8_t state[TCQ_PATHS], v[TCQ_PATHS];
    memcpy(state, x->state, sizeof state);
    p->search(x, n_step, p->cost, p->format->bias);
    for (size_t t = 0; t < n_step; t++) {
        memcpy(v, x->best[t], sizeof v);
        tcq_step(state, v);
        p->format->put(blocks + (first + t) / 2 * p->type->block_bytes, t % 2, v);
    }
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

/* Lengths of Huffman codes, whole bits. Those of zstd are not longer than 11, which is what codes
 * that were not used would get. */
static void tcq_lengths(const uint32_t *counts, int n_code, uint64_t n, uint8_t *length)
{
    uint64_t weight[TCQ_CODES];
    int tree[TCQ_CODES]; // which each code belongs to, by the first code of it; or -1
    for (int c = 0; c < n_code; c++) {
        weight[c] = MOE_MAX(counts[c], n >> 11);
        tree[c] = counts[c] ? c : -1;
        length[c] = counts[c] ? 0 : 11;
    }
    for (;;) {
        int least = -1, second = -1;
        for (int c = 0; c < n_code; c++) {
            if (tree[c] != c)
                continue;
            if (least < 0 || weight[c] < weight[least]) {
                second = least;
                least = c;
            } else if (second < 0 || weight[c] < weight[second]) {
                second = c;
            }
        }
        if (second < 0)
            return;
        weight[least] += weight[second];
        for (int c = 0; c < n_code; c++) {
            length[c] += tree[c] == least || tree[c] == second;
            tree[c] = tree[c] == second ? least : tree[c];
        }
    }
}

/* Bits of each code on disk, in units of 2^-16, from how often they were used. Bytes of two codes
 * come near to the entropy; codes that were not used count as half a time. Returns the bits per
 * weight. */
static int64_t tcq_bits(const tcq_format *f, const uint32_t counts[TCQ_CODES], uint64_t n,
                        int64_t bits[TCQ_CODES])
{
    uint8_t length[TCQ_CODES];
    const int apart = f->bias == TCQ5_BIAS; // the lowest bits are
    int64_t sum = 0;
    if (f->bias == TCQ8_BIAS)
        tcq_lengths(counts, f->bias, n, length);
    for (int c = 0; c < f->bias; c++) {
        const uint64_t count = apart ? (uint64_t)counts[c & ~1] + counts[c | 1] : counts[c];
        bits[c] = f->bias == TCQ8_BIAS ? length[c] << 16
                                       : tcq_log2(2 * n) - tcq_log2(2 * count + 1) + (apart << 16);
        sum += bits[c] * counts[c];
    }
    return sum / (int64_t)n + (f->bias == TCQ8_BIAS ? 65536 / 200 : 65536 * 7 / 200);
}

static void tcq_costs(tcq_plan *p, const int64_t bits[TCQ_CODES])
{
    for (int c = 0; c < p->format->bias; c++)
        p->cost[c] = (float)bits[c] * (p->format->lambda / 65536);
}

/* What all but one of 2500 weights do not exceed. Huffman codes lose if there are codes that are
 * hardly ever used: blocks of larger weights take a larger step instead. */
static float tcq_most(const float *src, size_t n)
{
    uint32_t low = 0, high = 0x7f800000; // as integers, magnitudes compare like floats
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        size_t n_above = 0;
        for (size_t k = 0; k < n; k++)
            n_above += (bits_of_f32(src[k]) & 0x7fffffff) > middle;
        if (n_above > n / 2500)
            low = middle + 1;
        else
            high = middle;
    }
    return f32_of_bits(low);
}

/* The scales of a row's blocks: the step times the mean importance's root is the same for all, as
 * nearly as the high byte allows, within a factor of 4. */
static void tcq_scales(tcq_plan *p, uint16_t stored, size_t n_in)
{
    for (size_t b = 0; b < n_in / TCQ_LEN; b++) {
        float mean = 0;
        for (size_t k = 0; p->roots && k < TCQ_LEN; k++)
            mean = fmaf(p->roots[b * TCQ_LEN + k], p->roots[b * TCQ_LEN + k], mean);
        const float square = p->roots ? p->d * p->d / (mean / TCQ_LEN) : p->d * p->d;
        uint16_t s = stored;
        for (int i = 0; i < 8 && s < 0x7a00; i++, s = (uint16_t)(s + 0x100))
            if (f32_of_f16(s) * f32_of_f16((uint16_t)(s + 0x100)) >= square)
                break;
        for (int i = 0; i < 8 && s > 0x200; i++, s = (uint16_t)(s - 0x100))
            if (f32_of_f16(s) * f32_of_f16((uint16_t)(s - 0x100)) <= square)
                break;
        p->scales[b] = s;
    }
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
 * initialized: the search, the roots, the scales, a row of blocks. */
static size_t tcq_room_bytes(size_t n_in)
{
    return sizeof(tcq_search) + n_in * sizeof(float) +
           n_in / TCQ_LEN * (sizeof(uint16_t) + sizeof(tcq8_block));
}

/* The plan for rows like these: `bits` per weight on disk; 0: the type's default. importance [n_in]
 * as for an encode_fn. */
static void tcq_plan_make(tcq_plan *p, const moe_quant *type, double bits, const float *src,
                          const float *importance, size_t n_row, size_t n_in, void *room)
{
    const tcq_format *f = &tcq_formats[type->id - tcq_formats[0].id];
    const int64_t want = (int64_t)((bits > 0 ? bits : f->bits) * 65536);
    float *roots = (float *)(void *)((uint8_t *)room + sizeof(tcq_search));
    uint16_t *scales = (uint16_t *)(void *)(roots + n_in);
    uint8_t *blocks = (uint8_t *)(scales + n_in / TCQ_LEN);
    const float most = tcq_most(src, n_row * n_in), range = (float)f->bias - 0.5f;
    double sum = 0;
    *p = (tcq_plan){.format = f, .type = type, .search = tcq_search_select(cpu_detect()),
                    .scales = scales};
    if (importance) {
        tcq_roots(importance, roots, n_in);
        p->roots = roots;
    }
    for (size_t k = 0; k < n_row * n_in; k++)
        sum += (double)src[k] * (double)src[k]; // exact products
    int32_t stored = f16_of_f32((float)(sqrt(sum / (double)(n_row * n_in)) * 0.25));
    for (int pass = 0; pass < TCQ_PASSES; pass++) {
        uint32_t counts[TCQ_CODES] = {0};
        const size_t n_used = pass < TCQ_ROUGH ? (n_row + 3) / 4 : n_row;
        const uint16_t step = (uint16_t)MOE_MIN(MOE_MAX(stored, 1), 0x7bff);
        int64_t bits_of_code[TCQ_CODES];
        p->d = f32_of_f16(step);
        p->reach = fminf(fmaxf(most / p->d, range / 2), range);
        tcq_scales(p, step, n_in);
        for (size_t r = 0; r < n_used; r++)
            tcq_encode_row(p, room, src + r * n_row / n_used * n_in, blocks, n_in, counts);
        const int64_t got = tcq_bits(f, counts, n_used * n_in, bits_of_code);
        tcq_costs(p, bits_of_code);
        stored += (int32_t)((got - want) >> 6); // 2^10 in binary16 is an octave, which is a bit
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
