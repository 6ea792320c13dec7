/* tests/test_kernels.c - every quantization format: its layout against the gguf package, its
 * reference quantizer, and every kernel variant that this machine can run against the C kernel, bit
 * for bit, on random, extreme and unaligned data between guard pages. */
#include "test.h"

#include <sys/mman.h>
#include <unistd.h>

/* --------------------------------------------------------------------------------- helpers -- */

/* The distinct kernels that subsets of the machine's bits select, the C kernels first. */
enum { MAX_VARIANTS = 8 };
typedef struct variants {
    moe_kernels kernels[MAX_VARIANTS];
    uint32_t cpu[MAX_VARIANTS];
    size_t n;
} variants;

static variants variants_of(const moe_quant *quant)
{
    const uint32_t machine = cpu_detect();
    variants v = {.n = 0};
    for (uint32_t cpu = 0; cpu < MOE_CPU_END; cpu++) {
        if (cpu & ~machine)
            continue;
        moe_kernels k = quant->select(cpu);
        size_t i = 0;
        while (i < v.n && (v.kernels[i].gemv != k.gemv || v.kernels[i].gemm != k.gemm))
            i++;
        if (i < v.n)
            continue;
        CHECK(v.n < MAX_VARIANTS, "%s: more variants than are tested", quant->name);
        if (v.n < MAX_VARIANTS) {
            v.cpu[v.n] = cpu;
            v.kernels[v.n++] = k;
        }
    }
    return v;
}

/* `bytes` bytes whose last one, or whose first one, stands next to a page that cannot be
 * touched. */
typedef struct guarded {
    uint8_t *map, *data;
    size_t map_bytes;
} guarded;

static guarded guarded_new(size_t bytes, bool at_end)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t inner = (bytes + page - 1) / page * page;
    guarded g = {.map_bytes = inner + 2 * page};
    g.map = mmap(NULL, g.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect(g.map + page, inner, PROT_READ | PROT_WRITE)) {
        printf("no memory for guard pages\n");
        exit(2);
    }
    g.data = g.map + page + (at_end ? inner - bytes : 0);
    return g;
}

static void guarded_free(guarded g)
{
    munmap(g.map, g.map_bytes);
}

/* Every weight of a block finite and small enough that no sum of products can overflow: those of
 * BF16 are 2^64 times what they stand for. */
static bool block_is_sane(const moe_quant *quant, const uint8_t *block)
{
    const float most = quant->act == MOE_ACT_BF16 ? 1e10f : 1e20f;
    float w[256];
    quant->dequantize(block, w, quant->block_len);
    for (size_t i = 0; i < quant->block_len; i++)
        if (!(fabsf(w[i]) <= most))
            return false;
    return true;
}

static void random_block(const moe_quant *quant, uint8_t *block)
{
    do {
        for (size_t i = 0; i < quant->block_bytes; i++)
            block[i] = (uint8_t)test_random();
    } while (!block_is_sane(quant, block));
}

/* Random at first, then each byte that may be `byte` is: codes and small scales all at a bound. */
static void extreme_block(const moe_quant *quant, uint8_t *block, uint8_t byte)
{
    random_block(quant, block);
    for (size_t i = 0; i < quant->block_bytes; i++) {
        const uint8_t old = block[i];
        block[i] = byte;
        if (!block_is_sane(quant, block))
            block[i] = old;
    }
}

enum { N_EXTREMES = 8 };
static const uint8_t extreme_bytes[N_EXTREMES] = {0xff, 0x00, 0x80, 0x7f, 0xf0, 0x0f, 0x88, 0xaa};

typedef enum data_kind { RANDOM, EXTREME, MIXED, N_KINDS } data_kind;

static void fill_weights(const moe_quant *quant, data_kind kind, const uint8_t *extremes,
                         uint8_t *w, size_t n_row, size_t row_bytes, size_t stride)
{
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < row_bytes; i += quant->block_bytes) {
            uint8_t *block = w + r * stride + i;
            if (kind == RANDOM || (kind == MIXED && test_random() % 2))
                random_block(quant, block);
            else /* the first rows are each of one kind, the others are mixed */
                memcpy(block,
                       extremes + (r < N_EXTREMES ? r : test_random() % N_EXTREMES) *
                                      quant->block_bytes,
                       quant->block_bytes);
        }
}

/* A row of activations that need not come from act_quantize(). */
static void fill_activations(moe_act act, data_kind kind, size_t t, size_t n, uint8_t *row)
{
    memset(row, 0, act_row_bytes(act, n));
    if (act == MOE_ACT_F32) {
        for (size_t k = 0; k < n; k++)
            ((float *)row)[k] = test_random_float() * (kind == RANDOM ? 1.0f : 1e6f);
        return;
    }
    if (act == MOE_ACT_BF16) {
        for (size_t place = 0; place < align_up(n, 16); place++)
            if (act_bf16_element(place) < n)
                ((float *)row)[place] =
                    act_bf16(test_random_float() *
                             (kind == RANDOM ? 1.0f : ldexpf(1, (int)(test_random() % 80) - 60)));
        return;
    }
    const size_t group = act_group(act), n_pad = (size_t)align_up(n, group);
    const moe_q8 x = act_q8(act, row, n);
    for (size_t g = 0; g < n_pad / group; g++)
        ((float *)x.scale)[g] = test_random_float() * (kind == RANDOM ? 0.1f : 1e4f);
    for (size_t k = 0; k < n; k++) {
        int q = (int)(test_random() % 255) - 127;
        if (kind == EXTREME || (kind == MIXED && test_random() % 4))
            q = t % 3 == 0 ? 127 : t % 3 == 1 ? -127 : q < 0 ? -127 : 127;
        ((int8_t *)x.q)[k] = (int8_t)q;
        ((int16_t *)x.sum)[k / 16] = (int16_t)(x.sum[k / 16] + q);
    }
}

/* The narrow form of a row of n BF16 activations. */
static void narrow_row(const uint8_t *wide, size_t n, uint8_t *row)
{
    memset(row, 0, act_row_bytes(MOE_ACT_BF16, n));
    for (size_t place = 0; place < align_up(n, 32); place++)
        memcpy(row + 2 * act_bf16_element(place), wide + 4 * place + 2, 2);
}

/* ------------------------------------------------------------------------------ the table -- */

static void check_listed(const char *upper, const char *lower, uint32_t id)
{
    const moe_quant *q = quant_by_id(id);
    CHECK(q && q->id == id && strcmp(q->name, upper) == 0, "%s, id %u", upper, id);
    CHECK(quant_by_name(upper) == q && quant_by_name(lower) == q, "%s", upper);
}

static void every_type_of_the_list_is_found(void)
{
#define X(NAME, name, id) check_listed(#NAME, #name, id);
#include "../quant/types.def"
#undef X
    CHECK(!quant_by_id(4) && !quant_by_id(UINT32_MAX), "an unknown id was found");
    CHECK(!quant_by_name("") && !quant_by_name("Q4") && !quant_by_name("Q4_01"), "unknown name");
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *q = quant_table[i];
        CHECK(q->bits == 8.0 * q->block_bytes / q->block_len, "%s: %g bits", q->name, q->bits);
    }
}

/* Random blocks, dequantized by the gguf package, or, where it does not have the type, by the
 * script that made the file. */
static void dequantize_equals_gguf(void)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/data/quant_vectors.bin", test_root());
    size_t bytes = 0;
    char *file = test_read_file(path, &bytes);
    REQUIRE(file && bytes > 8 && memcmp(file, "MQV1", 4) == 0, "cannot read %s", path);
    const uint8_t *p = (const uint8_t *)file + 4, *end = (const uint8_t *)file + bytes;
    uint32_t n_types;
    memcpy(&n_types, p, 4);
    p += 4;
    CHECK(n_types == MOE_COUNT(quant_table), "%u types in the file", n_types);
    for (uint32_t i = 0; i < n_types && p + 16 <= end; i++) {
        uint32_t head[4];
        memcpy(head, p, 16);
        p += 16;
        const size_t data_bytes = (size_t)head[2] * head[3], n = (size_t)head[1] * head[3];
        const moe_quant *q = quant_by_id(head[0]);
        const uint8_t *blocks = p, *want = p + data_bytes;
        p = want + 4 * n;
        REQUIRE(p <= end, "the file is too short");
        CHECK(q, "type %u is missing", head[0]);
        if (!q)
            continue;
        CHECK(q->block_len == head[1] && q->block_bytes == head[2], "%s", q->name);
        float *got = malloc(4 * n);
        uint8_t *odd = malloc(data_bytes + 1); /* at an odd address */
        memcpy(odd + 1, blocks, data_bytes);
        q->dequantize(odd + 1, got, n);
        for (size_t k = 0; k < n; k++) {
            uint32_t u;
            memcpy(&u, want + 4 * k, 4);
            const float w = f32_of_bits(u);
            CHECK(bits_of_f32(got[k]) == u || (got[k] != got[k] && w != w),
                  "%s, weight %zu: got %a, want %a", q->name, k, got[k], w);
        }
        free(got);
        free(odd);
    }
    CHECK(p == end, "%zu bytes are left", (size_t)(end - p));
    free(file);
}

/* ------------------------------------------------------------------------ numbers in 16 bits -- */

#if MOE_X86
MOE_TARGET("f16c") static uint16_t f16_by_instruction(float x)
{
    return (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0);
}

MOE_TARGET("f16c") static float f32_by_instruction(uint16_t h)
{
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}
#elif MOE_ARM64
static uint16_t f16_by_instruction(float x)
{
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

static float f32_by_instruction(uint16_t h)
{
    return vgetq_lane_f32(arm_f32_of_f16(vdup_n_u16(h)), 0);
}
#endif

static void f16_conversion_is_exact(void)
{
    for (uint32_t h = 0; h < 65536; h++) {
        const float x = f32_of_f16((uint16_t)h);
        const int exponent = (int)(h >> 10 & 31);
        const double fraction = (h & 1023) / 1024.0;
        const double magnitude =
            exponent ? ldexp(1 + fraction, exponent - 15) : ldexp(fraction, -14);
        if (exponent == 31)
            CHECK((h & 1023) ? x != x : fabsf(x) == INFINITY, "%04x -> %a", h, x);
        else
            CHECK(x == (h & 0x8000 ? -magnitude : magnitude), "%04x -> %a", h, x);
        CHECK(!(h & 0x8000) == !signbit(x), "%04x: sign", h);
        CHECK(f16_of_f32(x) == (x != x ? h | 0x200 : h), "%04x -> %a -> %04x", h, x, f16_of_f32(x));
        /* Between two neighbours the nearer is taken; halfway the even one. */
        if ((h & 0x7fff) < 0x7bff) {
            const float next = f32_of_f16((uint16_t)(h + 1)), mid = x + (next - x) / 2;
            CHECK(f16_of_f32(mid) == h + (h & 1), "%a -> %04x", mid, f16_of_f32(mid));
            CHECK(f16_of_f32(nextafterf(mid, x)) == h, "below %a", mid);
            CHECK(f16_of_f32(nextafterf(mid, next)) == h + 1, "above %a", mid);
        }
    }
    CHECK(f16_of_f32(65519.996f) == 0x7bff && f16_of_f32(65520.0f) == 0x7c00, "overflow");
    CHECK(f16_of_f32(-INFINITY) == 0xfc00 && f16_of_f32(1e-30f) == 0, "ends of the range");
}

static void f16_conversion_equals_the_instruction(void)
{
#if MOE_X86 || MOE_ARM64
    if (!(cpu_detect() & (MOE_CPU_AVX2 | MOE_CPU_NEON)))
        SKIP("no F16C");
    for (uint32_t h = 0; h < 65536; h++)
        CHECK(bits_of_f32(f32_of_f16((uint16_t)h)) == bits_of_f32(f32_by_instruction((uint16_t)h)),
              "%04x", h);
    for (uint32_t i = 0; i < 4000000; i++) {
        /* Half of them in the range of binary16, where the cases are. */
        uint32_t u = test_random();
        if (i & 1)
            u = (u & 0x807fffff) | (100 + (u >> 23) % 46) << 23;
        const float x = f32_of_bits(u);
        CHECK(f16_of_f32(x) == f16_by_instruction(x), "%08x: %04x, %04x", u, f16_of_f32(x),
              f16_by_instruction(x));
    }
#else
    SKIP("no such instruction");
#endif
}

static void bf16_conversion_rounds_to_even(void)
{
    for (uint32_t h = 0; h < 65536; h++) {
        const float x = f32_of_bf16((uint16_t)h);
        CHECK(bits_of_f32(x) == h << 16, "%04x", h);
        CHECK(bf16_of_f32(x) == (x != x ? h | 0x40 : h), "%04x -> %04x", h, bf16_of_f32(x));
        if (x != x || (h & 0x7fff) == 0x7f80)
            continue;
        CHECK(bf16_of_f32(f32_of_bits(h << 16 | 0x7fff)) == h, "%04x: below half", h);
        CHECK(bf16_of_f32(f32_of_bits(h << 16 | 0x8000)) == h + (h & 1), "%04x: half", h);
        CHECK(bf16_of_f32(f32_of_bits(h << 16 | 0x8001)) == h + 1, "%04x: above half", h);
    }
    CHECK(bf16_of_f32(f32_of_bits(0x7f800001)) == 0x7fc0, "a NaN with a low payload stays NaN");
}

/* ----------------------------------------------------------------------------- quantizers -- */

/* The error of a reference quantizer on weights spread evenly over [-1, 1], as a fraction of a
 * block's largest magnitude.
 *   rms   step / sqrt(12), where the step is 2 / 2^bits for scales and 2 / (2^bits - 1) for spans;
 *         1.3 times that for scales that are rounded themselves, and for codes that clip.
 *   max   half a step, or the part that is clipped: one whole step of Q4_0 and Q5_0, whose codes
 *         end at +7/8 and +15/16 of the largest; 14 / 127 of IQ4_NL (127 becomes 113); 8 becomes 6
 *         in MXFP4. Plus the rounding of scales and offsets to 11 bits. 0: not bounded (searches
 *         for the least squares may give up single weights).
 * A state of TCQ4, TCQ5 and TCQ8 offers 16, 32 and 128 values; the largest weight may be a step
 * beyond the range. Which points are in the lists of IQ1 to IQ3 follows no rule: their bounds are
 * 1.04 times what was measured. */
static const struct {
    const char *name;
    double rms, max;
} quantizer_error[] = {
    {"F32", 0, 0},
    {"F16", 0x1p-11 / 1.7320, 0x1p-11},
    {"BF16", 0x1p-8 / 1.7320, 0x1p-8},
    {"Q8_0", 1.3 / 127 / 3.4641, 0.5 / 127 + 0x1p-11},
    {"Q4_0", 1.3 / 8 / 3.4641, 1.0 / 8 + 0x1p-11},
    {"Q5_0", 1.3 / 16 / 3.4641, 1.0 / 16 + 0x1p-11},
    {"Q4_1", 1.3 * 2 / 15 / 3.4641, 1.0 / 15 + 0x3p-11},
    {"Q5_1", 1.3 * 2 / 31 / 3.4641, 1.0 / 31 + 0x3p-11},
    {"IQ4_NL", 1.3 * 2 / 15 / 3.4641, 14.0 / 127 + 0x1p-11},
    {"MXFP4", 0.12, 1.0 / 4},
    {"Q2_K", 1.3 * 2 / 3 / 3.4641, 0},
    {"Q3_K", 1.3 / 4 / 3.4641, 0},
    {"Q4_K", 1.3 * 2 / 15 / 3.4641, 0},
    {"Q5_K", 1.3 * 2 / 31 / 3.4641, 0},
    {"Q6_K", 1.3 / 32 / 3.4641, 0},
    {"IQ4_XS", 1.3 * 2 / 15 / 3.4641, 0},
    {"IQ2_XXS", 0.2, 0},
    {"IQ2_XS", 0.182, 0},
    {"IQ2_S", 0.147, 0},
    {"IQ3_XXS", 0.111, 0},
    {"IQ3_S", 0.0795, 0},
    {"IQ1_S", 0.234, 0},
    {"IQ1_M", 0.223, 0},
    {"TQ1_0", 1.02 / 3.4641, 0.5 + 0x1p-11},
    {"TQ2_0", 1.02 / 3.4641, 0.5 + 0x1p-11},
    {"NVFP4", 0.12, 1.0 / 4},
    {"Q1_0", 1.02 / 3.4641, 0},
    {"Q2_0", 0.2, 0.5 + 0x1p-11},
    {"TCQ4", 1.3 * 2 / 15 / 3.4641, 2.0 / 15 + 0x1p-11},
    {"TCQ5", 1.3 * 2 / 31 / 3.4641, 2.0 / 31 + 0x1p-11},
    {"TCQ8", 1.3 * 2 / 127 / 3.4641, 2.0 / 127 + 0x1p-11},
};

static void quantizers_stay_within_their_error(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *q = quant_table[i];
        size_t e = 0;
        while (e < MOE_COUNT(quantizer_error) && strcmp(quantizer_error[e].name, q->name))
            e++;
        REQUIRE(e < MOE_COUNT(quantizer_error), "no bound for %s", q->name);
        const size_t n = q->block_len == 1 ? 32 : q->block_len;
        double sum = 0;
        for (int round = 0; round < 200; round++) {
            float src[256], dst[256];
            uint8_t blocks[4 * 256];
            // NVFP4's scales, without another, are good for 2^-5 to 2^11
            const int exponent = (int)(test_random() % 12) - (q->id == 40 ? 0 : 8);
            const float size = ldexpf(1.0f, exponent);
            float amax = 0;
            for (size_t k = 0; k < n; k++) {
                src[k] = test_random_float() * size;
                amax = fmaxf(amax, fabsf(src[k]));
            }
            q->quantize(src, blocks, n);
            q->dequantize(blocks, dst, n);
            // the scale of these is made for the largest value
            const bool keeps = strstr("Q4_0 Q5_0 Q8_0", q->name) != NULL;
            for (size_t k = 0; k < n; k++) {
                if (keeps && fabsf(src[k]) == amax)
                    CHECK(fabsf(dst[k] - src[k]) <= 0x1p-10f * amax, "%s: %g becomes %g", q->name,
                          (double)src[k], (double)dst[k]);
                const double error = fabs((double)dst[k] - src[k]) / amax;
                sum += error * error / (double)n / 200;
                if (quantizer_error[e].max > 0 || q->id == 0)
                    CHECK(error <= quantizer_error[e].max, "%s: error %g", q->name, error);
            }
        }
        CHECK(sqrt(sum) <= quantizer_error[e].rms, "%s: rms %g", q->name, sqrt(sum));
    }
}

/* Every scale of MXFP4, the subnormal ones too, as IEEE 754 has it. */
static void scales_of_mxfp4_are_powers_of_two(void)
{
    for (int e = 0; e < 256; e++)
        CHECK(mxfp4_scale((uint8_t)e) == ldexpf(1.0f, e - 128), "%d: %g", e,
              (double)mxfp4_scale((uint8_t)e));
}

/* Every scale of NVFP4 against its definition. */
static void scales_of_nvfp4_are_ue4m3(void)
{
    for (int s = 0; s < 256; s++) {
        const int e = s >> 3 & 15, m = s & 7;
        const float number = e ? ldexpf((float)(8 + m), e - 10) : ldexpf((float)m, -9);
        CHECK(nvfp4_scale((uint8_t)s) == (s == 127 ? 0 : number / 2), "%d: %g", s,
              (double)nvfp4_scale((uint8_t)s));
    }
}

static void quantizers_take_odd_blocks(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *q = quant_table[i];
        const size_t n = q->block_len == 1 ? 32 : q->block_len;
        float src[256] = {0}, dst[256];
        uint8_t blocks[4 * 256];
        q->quantize(src, blocks, n);
        q->dequantize(blocks, dst, n);
        for (size_t k = 0; k < n; k++)
            CHECK(dst[k] == 0, "%s: zero becomes %g", q->name, dst[k]);
        const float sizes[] = {1e-45f, 1e-38f, 1e-20f, 1e-7f, 1e5f, 3.4e38f};
        for (size_t s = 0; s < MOE_COUNT(sizes) && q->block_len > 1; s++)
            for (int kind = 0; kind < 4; kind++) {
                for (size_t k = 0; k < n; k++)
                    src[k] = kind == 0   ? sizes[s]
                             : kind == 1 ? (k % 2 ? sizes[s] : -sizes[s])
                             : kind == 2 ? (k == 5 ? -sizes[s] : 0)
                                         : test_random_float() * sizes[s];
                q->quantize(src, blocks, n);
                q->dequantize(blocks, dst, n);
                for (size_t k = 0; k < n; k++)
                    CHECK(isfinite(dst[k]), "%s: %g becomes %g", q->name, src[k], dst[k]);
            }
    }
}

/* ---------------------------------------------------------------------------- activations -- */

static float edge_value(size_t i)
{
    static const float edge[] = {
        0.0f, -0.0f, 1e-45f,  -1e-40f,  0x1p-119f, 0x1.fffffep-120f, 0x1p-126f, 0.5f,
        1.0f, -1.0f, 3.4e38f, -3.4e38f, 1e-30f,    127.0f,           1.5f,      -2.5f};
    return edge[i % MOE_COUNT(edge)];
}

static void fill_floats(float *x, size_t n, size_t kind)
{
    const float size = kind < 20 ? ldexpf(1.0f, (int)(test_random() % 250) - 125) : 1.0f;
    for (size_t k = 0; k < n; k++)
        x[k] = test_random_float() * size;
    if (kind >= 20 && kind < 40)
        for (size_t k = 0; k < n; k++)
            x[k] = kind == 20 ? 0 : edge_value(kind < 36 ? kind - 20 : test_random());
    if (kind == 40 || kind == 44) { /* all the halves: ties, and close to ties if scaled */
        const float unit = kind == 40 ? 1.0f : 1.0f + fabsf(test_random_float());
        for (size_t k = 0; k < n; k++)
            x[k] = unit * (k % 32 == 31 ? 127.0f : (float)(int)(test_random() % 254) - 126.5f);
    }
    if (kind == 41)
        x[test_random() % n] = NAN;
    if (kind == 42)
        x[test_random() % n] = -INFINITY;
    if (kind == 43)
        x[n - 1] = f32_of_bits(0xff800001);
}

static void check_packed_group(const float *x, size_t n, size_t group, float scale, const int8_t *q)
{
    float amax = 0;
    bool finite = true;
    for (size_t k = 0; k < n; k++) {
        amax = fmaxf(amax, fabsf(x[k]));
        finite = finite && isfinite(x[k]);
    }
    const bool zero = !finite || amax < 0x1p-119f;
    CHECK(finite ? scale == (zero ? 0 : amax / 127) : scale != scale, "amax %a: %a", amax, scale);
    for (size_t k = 0; k < group; k++) {
        CHECK(!(zero || k >= n) || q[k] == 0, "%d where 0 is due", q[k]);
        if (k < n && !zero) {
            /* x * (127 / amax) has two roundings before it is rounded to an integer. */
            const double exact = (double)x[k] * 127 / amax;
            CHECK(fabs(q[k] - exact) <= 0.5 + 127 * 0x1p-23, "%a of %a -> %d", x[k], amax, q[k]);
        }
    }
}

static void activations_are_packed_as_documented(void)
{
    const moe_act acts[] = {MOE_ACT_Q8_32, MOE_ACT_Q8_256};
    const uint32_t machine = cpu_detect();
    const size_t lengths[] = {1, 15, 31, 32, 33, 64, 100, 255, 256, 257, 576, 1000};
    for (size_t i = 0; i < 2 * MOE_COUNT(lengths) * 45; i++) {
        const moe_act act = acts[i % 2];
        const size_t n = lengths[i / 2 % MOE_COUNT(lengths)], group = act_group(act);
        const size_t bytes = act_row_bytes(act, n);
        guarded x = guarded_new(n * sizeof(float), true);
        guarded c = guarded_new(bytes, true), v = guarded_new(bytes, true);
        fill_floats((float *)x.data, n, i / 2 / MOE_COUNT(lengths));
        memset(c.data, 0xaa, bytes);
        act_quantize(act, (float *)x.data, n, c.data, 0);
        for (uint32_t cpu = 1; cpu < MOE_CPU_END; cpu++)
            if (!(cpu & ~machine)) {
                memset(v.data, 0x55, bytes);
                act_quantize(act, (float *)x.data, n, v.data, cpu);
                CHECK(memcmp(c.data, v.data, bytes) == 0, "cpu %x differs from C, n %zu", cpu, n);
            }
        const moe_q8 row = act_q8(act, c.data, n);
        for (size_t k = 0; k < n; k += group)
            check_packed_group((float *)x.data + k, MOE_MIN(group, n - k), group,
                               row.scale[k / group], row.q + k);
        for (size_t k = 0; k < align_up(n, group); k += 16) {
            int sum = 0;
            for (size_t j = 0; j < 16; j++)
                sum += row.q[k + j];
            CHECK(row.sum[k / 16] == sum, "sum %d, want %d", row.sum[k / 16], sum);
        }
        guarded_free(x);
        guarded_free(c);
        guarded_free(v);
    }
}

static void bf16_activations_are_packed_as_documented(void)
{
    const size_t lengths[] = {1, 15, 16, 17, 31, 32, 33, 100, 576};
    const uint32_t machine = cpu_detect();
    for (size_t i = 0; i < MOE_COUNT(lengths) * 45; i++) {
        const size_t n = lengths[i % MOE_COUNT(lengths)], bytes = act_row_bytes(MOE_ACT_BF16, n);
        guarded x = guarded_new(n * sizeof(float), true);
        guarded c = guarded_new(bytes, true), v = guarded_new(bytes, true);
        guarded narrow = guarded_new(bytes, true);
        fill_floats((float *)x.data, n, i / MOE_COUNT(lengths));
        memset(c.data, 0xaa, bytes);
        act_quantize(MOE_ACT_BF16, (float *)x.data, n, c.data, 0);
        for (size_t place = 0; place < bytes / sizeof(float); place++) {
            const size_t k = act_bf16_element(place);
            const float got = ((float *)c.data)[place], from = k < n ? ((float *)x.data)[k] : 0;
            const double want = fabsf(from) < 0x1p-50f ? 0 : ldexp(from, 64);
            CHECK((bits_of_f32(got) & 0xffff) == 0, "%a is no BF16", got);
            if (isfinite(got)) /* half a unit of 8 binary places */
                CHECK(fabs(got - want) <= fabs(want) * 0x1p-8, "%a becomes %a", from, got);
            else
                CHECK(isnan(from) ? isnan(got) : fabs(want) >= 0x1.ffp127, "%a becomes %a", from,
                      got);
        }
        narrow_row(c.data, n, narrow.data);
        for (uint32_t cpu = 1; cpu < MOE_CPU_END; cpu++)
            if (!(cpu & ~machine)) {
                memset(v.data, 0x55, bytes);
                act_quantize(MOE_ACT_BF16, (float *)x.data, n, v.data, cpu);
                CHECK(memcmp(cpu & MOE_CPU_AVX512_BF16 ? narrow.data : c.data, v.data, bytes) == 0,
                      "cpu %x differs from C, n %zu, data %zu", cpu, n, i / MOE_COUNT(lengths));
            }
        guarded_free(x);
        guarded_free(c);
        guarded_free(v);
        guarded_free(narrow);
    }
}

static void float_activations_are_copied(void)
{
    float x[13];
    fill_floats(x, 13, 41);
    guarded row = guarded_new(act_row_bytes(MOE_ACT_F32, 13), true);
    memset(row.data, 0xff, 64);
    act_quantize(MOE_ACT_F32, x, 13, row.data, cpu_detect());
    CHECK(memcmp(row.data, x, sizeof x) == 0, "not the same");
    for (size_t i = sizeof x; i < 64; i++)
        CHECK(row.data[i] == 0, "byte %zu of the padding", i);
    guarded_free(row);
}

/* --------------------------------------------------------------------------------- kernels -- */

static bool takes_narrow(const moe_quant *quant, uint32_t cpu)
{
    return quant->act == MOE_ACT_BF16 && cpu & MOE_CPU_AVX512_BF16;
}

/* One shape and one kind of data: every variant against C, memory guarded, y surrounded by
 * canaries. */
static void check_shape(const moe_quant *quant, const variants *v, const uint8_t *extremes,
                        data_kind kind, size_t n_in, size_t n_row, size_t n_tok)
{
    const bool at_end = test_random() % 4 != 0;
    const size_t row_bytes = n_in / quant->block_len * quant->block_bytes;
    const size_t w_stride = row_bytes + (test_random() % 2 ? test_random() % 40 : 0);
    const size_t x_stride = act_row_bytes(quant->act, n_in) + 32 * (test_random() % 2);
    const size_t y_stride = n_row + test_random() % 3;
    const size_t x_bytes = (n_tok - 1) * x_stride + act_row_bytes(quant->act, n_in);
    const size_t y_len = (n_tok - 1) * y_stride + n_row;
    guarded w = guarded_new((n_row - 1) * w_stride + row_bytes, at_end);
    guarded x = guarded_new(x_bytes, at_end), narrow = guarded_new(x_bytes, at_end);
    guarded want = guarded_new(y_len * sizeof(float), at_end);
    guarded got = guarded_new(y_len * sizeof(float), at_end);
    fill_weights(quant, kind, extremes, w.data, n_row, row_bytes, w_stride);
    for (size_t t = 0; t < n_tok; t++) {
        fill_activations(quant->act, kind, t, n_in, x.data + t * x_stride);
        if (quant->act == MOE_ACT_BF16)
            narrow_row(x.data + t * x_stride, n_in, narrow.data + t * x_stride);
    }
    static const uint8_t *const nowhere = (const uint8_t *)64; /* may be fetched, not read */
    moe_mm mm = {w.data,   w_stride, x.data, x_stride, (float *)want.data,
                 y_stride, n_in,     n_row,  n_tok,    test_random() % 2 ? nowhere : NULL};
    memset(want.data, 0xc5, y_len * sizeof(float));
    v->kernels[0].gemm(&mm);
    for (size_t i = 0; i < y_len; i++)
        if (i % y_stride < n_row)
            CHECK(isfinite(mm.y[i]), "%s: the data is meant to give finite sums", quant->name);
    mm.y = (float *)got.data;
    for (size_t i = 0; i < v->n; i++) {
        memset(got.data, 0xc5, y_len * sizeof(float));
        mm.x = takes_narrow(quant, v->cpu[i]) ? narrow.data : x.data;
        v->kernels[i].gemm(&mm);
        CHECK(memcmp(want.data, got.data, y_len * sizeof(float)) == 0,
              "%s gemm, cpu %x, data %d: %zu x %zu, %zu tokens", quant->name, v->cpu[i], (int)kind,
              n_row, n_in, n_tok);
    }
    /* Matrix times vector, for the last token, gives the same bits; it writes nothing else. */
    const size_t last = (n_tok - 1) * y_stride;
    mm.y = (float *)got.data + last;
    mm.n_tok = 1;
    for (size_t i = 0; i < v->n; i++) {
        memset(mm.y, 0xc5, n_row * sizeof(float));
        mm.x = (takes_narrow(quant, v->cpu[i]) ? narrow.data : x.data) + (n_tok - 1) * x_stride;
        v->kernels[i].gemv(&mm);
        CHECK(memcmp((float *)want.data + last, mm.y, n_row * sizeof(float)) == 0,
              "%s gemv, cpu %x, data %d: %zu x %zu", quant->name, v->cpu[i], (int)kind, n_row,
              n_in);
    }
    CHECK(memcmp(want.data, got.data, y_len * sizeof(float)) == 0, "%s: a canary", quant->name);
    guarded_free(w);
    guarded_free(x);
    guarded_free(narrow);
    guarded_free(want);
    guarded_free(got);
}

/* Where kernels are emulated, a few shapes must do. */
#ifdef MOE_X86_EMULATED
enum { SHAPE_STEP = 4 };
#else
enum { SHAPE_STEP = 1 };
#endif

static void kernels_equal_c(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        const variants v = variants_of(quant);
        uint8_t extremes[N_EXTREMES * 256];
        for (size_t e = 0; e < N_EXTREMES; e++)
            extreme_block(quant, extremes + e * quant->block_bytes, extreme_bytes[e]);
        const size_t blocks[] = {1, 2, 3, 5, 8, 13, 31, 64};
        size_t n = 0;
        for (size_t n_row = 1; n_row <= 17; n_row += SHAPE_STEP)
            for (size_t n_tok = 1; n_tok <= 9; n_tok += SHAPE_STEP) {
                size_t n_in = blocks[n++ % (quant->block_len == 256 ? 3 : 5)] * quant->block_len;
                if (quant->block_len == 1)
                    n_in = 1 + n % 41;
                for (int kind = 0; kind < N_KINDS; kind++)
                    check_shape(quant, &v, extremes, (data_kind)kind, n_in, n_row, n_tok);
            }
        /* Token counts and lengths beyond any tile. */
        for (size_t j = 0; j < 8; j += SHAPE_STEP)
            check_shape(quant, &v, extremes, MIXED,
                        blocks[j] * (quant->block_len == 1 ? 19 : quant->block_len), 9 + j,
                        70 - 9 * j);
        /* Several tiles of rows, and each way to divide tokens into tiles. */
        const size_t rows[] = {31, 32, 33, 48, 49, 64, 70};
        for (size_t n_tok = 1; n_tok <= 17; n_tok += SHAPE_STEP)
            check_shape(quant, &v, extremes, (data_kind)(n_tok % N_KINDS),
                        blocks[n_tok % 4] * (quant->block_len == 1 ? 37 : quant->block_len),
                        rows[n_tok % MOE_COUNT(rows)], n_tok);
        /* All tiles at once, and more tokens than are kept at once. */
        const size_t many[][2] = {{33, 48}, {64, 53}, {70, 66}, {129, 51}, {17, 101}, {9, 301}};
        for (size_t j = 0; j < MOE_COUNT(many); j += SHAPE_STEP)
            check_shape(quant, &v, extremes, (data_kind)(j % N_KINDS),
                        blocks[j % 3] * (quant->block_len == 1 ? 37 : quant->block_len), many[j][0],
                        many[j][1]);
        if (quant->block_len == 1) { /* rows in parts, and more activations than fit into L2 */
            check_shape(quant, &v, extremes, MIXED, 801, 35, 240);
            check_shape(quant, &v, extremes, MIXED, 768, 9, 150);
        }
        if (quant->act == MOE_ACT_BF16) { /* the narrow form's */
            check_shape(quant, &v, extremes, MIXED, 1601, 34, 130);
            check_shape(quant, &v, extremes, MIXED, 1536, 9, 150);
        }
        if (v.n == 1 && i == 0)
            printf("  only the C kernels run here\n");
    }
}

/* Products below the smallest number: their sums are -0, which a lane that is not summed must not
 * turn into +0. */
static void float_kernels_keep_negative_zero(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        const variants v = variants_of(quant);
        if (quant->act != MOE_ACT_F32)
            continue;
        for (size_t n = 8; n < 24; n++) {
            float src[24], y = 1;
            uint8_t w[24 * 4];
            guarded x = guarded_new(act_row_bytes(MOE_ACT_F32, n), true);
            for (size_t k = 0; k < n; k++)
                src[k] = 1e-44f;
            act_quantize(MOE_ACT_F32, src, n, x.data, 0);
            for (size_t k = 0; k < n; k++)
                src[k] = -6e-8f;
            quant->quantize(src, w, n);
            const moe_mm mm = {w, n * quant->block_bytes, x.data, 0, &y, 1, n, 1, 1, NULL};
            for (size_t j = 0; j < v.n; j++) {
                v.kernels[j].gemm(&mm);
                CHECK(y == 0 && signbit(y), "%s gemm, cpu %x: %a", quant->name, v.cpu[j], y);
                v.kernels[j].gemv(&mm);
                CHECK(y == 0 && signbit(y), "%s gemv, cpu %x: %a", quant->name, v.cpu[j], y);
            }
            guarded_free(x);
        }
    }
}

/* The C kernels against a sum in double precision of the dequantized weights and activations. Each
 * block enters with at most 4 roundings, and one of the running sum; a block's terms are at most 4
 * times its largest weight times its activations (where an offset cancels a code). */
static void c_kernels_are_products(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        const size_t n = 1024, group = act_group(quant->act);
        const size_t row_bytes = n / quant->block_len * quant->block_bytes;
        const size_t block = quant->block_len == 1 ? 8 : quant->block_len;
        float src[1024], w[1024], x[1024], y = NAN;
        uint8_t *packed = malloc(row_bytes);
        guarded row = guarded_new(act_row_bytes(quant->act, n), true);
        for (int round = 0; round < 20; round++) {
            for (size_t k = 0; k < n; k++) {
                src[k] = test_random_float();
                x[k] = test_random_float();
            }
            quant->quantize(src, packed, n);
            quant->dequantize(packed, w, n);
            act_quantize(quant->act, x, n, row.data, 0);
            double want = 0, size = 0;
            for (size_t b = 0; b < n; b += block) {
                double wmax = 0, xsum = 0;
                for (size_t k = b; k < b + block; k++) {
                    double xk = x[k];
                    if (quant->act == MOE_ACT_BF16) {
                        xk = ldexp(act_bf16(x[k]), -64);
                    } else if (quant->act != MOE_ACT_F32) {
                        const moe_q8 q = act_q8(quant->act, row.data, n);
                        xk = (double)q.scale[k / group] * q.q[k];
                    }
                    want += w[k] * xk;
                    wmax = fmax(wmax, fabs(w[k]));
                    xsum += fabs(xk);
                }
                size += 4 * wmax * xsum;
            }
            moe_mm mm = {packed, row_bytes, row.data, 0, &y, 1, n, 1, 1, NULL};
            quant->select(0).gemv(&mm);
            const double tolerance = size * (4 + (double)(n / block)) * 0x1p-24;
            CHECK(fabs(y - want) <= tolerance, "%s: %.9g, want %.9g +- %.2g", quant->name, y, want,
                  tolerance);
        }
        free(packed);
        guarded_free(row);
    }
}

/* A NaN among the activations is visible in every result of its token, and in no other. */
static void nan_activations_give_nan(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        const variants v = variants_of(quant);
        const size_t n = 512, n_row = 9;
        const size_t row_bytes = n / quant->block_len * quant->block_bytes;
        const size_t x_stride = act_row_bytes(quant->act, n);
        float x[2][512], y[2 * 9];
        guarded w = guarded_new(row_bytes * n_row, true), rows = guarded_new(2 * x_stride, true);
        for (size_t r = 0; r < n_row; r++)
            for (size_t b = 0; b < row_bytes; b += quant->block_bytes)
                random_block(quant, w.data + r * row_bytes + b);
        fill_floats(x[0], n, 45);
        fill_floats(x[1], n, 45);
        x[1][300] = NAN;
        for (size_t j = 0; j < v.n; j++) {
            for (size_t t = 0; t < 2; t++)
                act_quantize(quant->act, x[t], n, rows.data + t * x_stride, v.cpu[j]);
            moe_mm mm = {w.data, row_bytes, rows.data, x_stride, y, n_row, n, n_row, 2, NULL};
            v.kernels[j].gemm(&mm);
            for (size_t r = 0; r < n_row; r++)
                CHECK(isfinite(y[r]) && isnan(y[n_row + r]), "%s: %g, %g", quant->name, y[r],
                      y[n_row + r]);
        }
        guarded_free(w);
        guarded_free(rows);
    }
}

/* Any weights in BF16 and any activations: subnormal, infinite, NaN. Equal are all results that are
 * numbers, and which are none. */
static void bf16_kernels_equal_c_on_all_numbers(void)
{
    const variants v = variants_of(&quant_bf16);
    enum { N = 48, ROWS = 9, TOKENS = 7 };
    const size_t x_stride = act_row_bytes(MOE_ACT_BF16, N);
    guarded w = guarded_new(2 * N * ROWS, true), x = guarded_new(x_stride * TOKENS, true);
    for (int round = 0; round < 400; round++) {
        float src[TOKENS][N], want[TOKENS * ROWS], got[TOKENS * ROWS];
        for (size_t i = 0; i < N * ROWS; i++) { /* of any size; or tiny and subnormal ones */
            uint16_t u = (uint16_t)test_random();
            u = round % 4 == 0 ? u & 0x83ff : round % 4 == 1 ? u & 0x80ff : u;
            memcpy(w.data + 2 * i, &u, 2);
        }
        for (size_t i = 0; i < N * TOKENS; i++)
            src[i / N][i % N] = round % 4 < 2 ? ldexpf(test_random_float(), 60)
                                              : f32_of_bits(test_random());
        moe_mm mm = {w.data, 2 * N, x.data, x_stride, want, ROWS, N, ROWS, TOKENS, NULL};
        for (size_t i = 0; i < v.n; i++) {
            for (size_t t = 0; t < TOKENS; t++)
                act_quantize(MOE_ACT_BF16, src[t], N, x.data + t * x_stride, v.cpu[i]);
            mm.y = i ? got : want;
            v.kernels[i].gemm(&mm);
            for (size_t k = 0; k < TOKENS * ROWS; k++)
                CHECK(bits_of_f32(mm.y[k]) == bits_of_f32(want[k]) ||
                          (isnan(mm.y[k]) && isnan(want[k])),
                      "cpu %x: %a, want %a", v.cpu[i], mm.y[k], want[k]);
            moe_mm one = mm;
            one.y = got;
            one.n_tok = 1;
            v.kernels[i].gemv(&one);
            for (size_t k = 0; k < ROWS; k++)
                CHECK(bits_of_f32(got[k]) == bits_of_f32(want[k]) ||
                          (isnan(got[k]) && isnan(want[k])),
                      "gemv, cpu %x: %a, want %a", v.cpu[i], got[k], want[k]);
        }
    }
    guarded_free(w);
    guarded_free(x);
}

#if MOE_X86
MOE_BF16_512 static void bf16_lanes_512(float lane[8], const uint16_t w[16], const uint16_t x[16])
{
    const __m256i x16 = _mm256_loadu_si256((const __m256i *)x);
    _mm256_storeu_ps(lane,
                     bf16_multiply8_512(_mm256_loadu_ps(lane), (const uint8_t *)w, x16));
}
#endif

/* The instruction takes small sums for 0, fmaf() does not: with the smallest activations and
 * weights, whose sums cancel, no lane shows that. */
static void bf16_sums_are_never_too_small(void)
{
#if MOE_X86
    if (!(cpu_detect() & MOE_CPU_AVX512_BF16))
        SKIP("no AVX512-BF16");
    for (int round = 0; round < 100000; round++) {
        uint16_t w[16], x[16];
        float lane[8], want[8], y[16];
        for (size_t i = 0; i < 16; i++) {
            y[i] = act_bf16(ldexpf(1 + fabsf(test_random_float()), -51 + (int)(test_random() % 3)));
            x[i] = (uint16_t)(bits_of_f32(y[i]) >> 16);
            w[i] = (uint16_t)(test_random() & 0x81ff); /* below 2^-123 */
        }
        for (size_t i = 0; i < 8; i++) { /* what is left by products of the same kind */
            want[i] = (float)((int)(test_random() % 1024) - 512) * 0x1p-126f;
            lane[i] = want[i];
            for (size_t k = 2 * i + 1; k != 2 * i - 1; k--)
                want[i] = fmaf(w[k] & 0x7f80 ? f32_of_bf16(w[k]) : 0, y[k], want[i]);
        }
        bf16_lanes_512(lane, w, x);
        CHECK(memcmp(lane, want, sizeof lane) == 0, "round %d differs", round);
    }
#else
    SKIP("no such instruction");
#endif
}

TEST_PROGRAM(kernels)
{
    RUN(every_type_of_the_list_is_found);
    RUN(dequantize_equals_gguf);
    RUN(f16_conversion_is_exact);
    RUN(f16_conversion_equals_the_instruction);
    RUN(bf16_conversion_rounds_to_even);
    RUN(quantizers_stay_within_their_error);
    RUN(scales_of_mxfp4_are_powers_of_two);
    RUN(scales_of_nvfp4_are_ue4m3);
    RUN(quantizers_take_odd_blocks);
    RUN(activations_are_packed_as_documented);
    RUN(float_activations_are_copied);
    RUN(bf16_activations_are_packed_as_documented);
    RUN(bf16_kernels_equal_c_on_all_numbers);
    RUN(bf16_sums_are_never_too_small);
    RUN(kernels_equal_c);
    RUN(float_kernels_keep_negative_zero);
    RUN(c_kernels_are_products);
    RUN(nan_activations_give_nan);
}
