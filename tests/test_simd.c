/* tests/test_simd.c - the float kernels of backends/cpu_simd.h: every set that this machine can run
 * against the C functions, bit for bit, for all lengths around the width of a vector, at unaligned
 * addresses, between canaries. */
#include "test.h"

enum { N_MAX = 75, SLACK = 8 };

/* The distinct sets that subsets of the machine's bits select, without C. */
typedef struct sets {
    const cpu_simd *simd[8];
    uint32_t cpu[8];
    size_t n;
} sets;

static sets sets_of_machine(void)
{
    const uint32_t machine = cpu_detect();
    sets s = {.n = 0};
    for (uint32_t cpu = 0; cpu < 128; cpu++) {
        const cpu_simd *simd = cpu_simd_select(cpu & machine);
        size_t i = 0;
        while (i < s.n && s.simd[i] != simd)
            i++;
        if (i == s.n && simd != &cpu_simd_c && s.n < 8) {
            s.cpu[s.n] = cpu & machine;
            s.simd[s.n++] = simd;
        }
    }
    return s;
}

/* NaN need not carry the same payload. */
static bool same_floats(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (bits_of_f32(a[i]) != bits_of_f32(b[i]) && !(a[i] != a[i] && b[i] != b[i]))
            return false;
    return true;
}

/* Ordinary numbers, numbers of all sizes, or some that are at the ends of ranges. */
static void fill(float *x, size_t n, unsigned kind)
{
    static const float odd[] = {0.0f,    -0.0f,   1e-45f, -1e-40f, 87.0f,    -87.0f,  88.5f,
                                -200.0f, 1e30f,   -1e30f, 0.5f,    INFINITY, -3e38f,  NAN,
                                65504,   65520.0f, 6e-8f, -3e-8f,  1.0f,     -126.5f, -INFINITY};
    for (size_t i = 0; i < n; i++) {
        x[i] = test_random_float() * 8;
        if (kind == 1)
            x[i] = ldexpf(x[i], (int)(test_random() % 60) - 30);
        if (kind == 2 && test_random() % 3 == 0)
            x[i] = odd[test_random() % MOE_COUNT(odd)];
    }
}

typedef struct buffers {
    float a[N_MAX + SLACK], b[N_MAX + SLACK], c[N_MAX + SLACK];
    float want[N_MAX + SLACK], got[N_MAX + SLACK];
} buffers;

static buffers buffers_new(unsigned kind)
{
    buffers v;
    fill(v.a, N_MAX + SLACK, kind);
    fill(v.b, N_MAX + SLACK, kind);
    fill(v.c, N_MAX + SLACK, kind);
    memcpy(v.want, v.c, sizeof v.c);
    memcpy(v.got, v.c, sizeof v.c);
    return v;
}

/* Calls `want` and `got` and compares the whole buffers. */
#define CHECK_SAME(name, call_c, call)                                                            \
    do {                                                                                          \
        buffers v = buffers_new(kind);                                                            \
        float *out = v.want + 1, result_c = 0, result = 0;                                        \
        (void)out, (void)result_c, (void)result;                                                  \
        call_c;                                                                                   \
        out = v.got + 1;                                                                          \
        call;                                                                                     \
        CHECK(same_floats(v.want, v.got, N_MAX + SLACK) && same_floats(&result_c, &result, 1),    \
              "%s, cpu %x, n %zu, data %u: %a, %a", name, s.cpu[i], n, kind, result_c, result);   \
    } while (0)

static void elementwise_equals_c(void)
{
    const cpu_simd *c = &cpu_simd_c;
    const sets s = sets_of_machine();
    if (!s.n)
        SKIP("only C runs here");
    for (size_t i = 0; i < s.n; i++)
        for (size_t n = 0; n <= N_MAX; n++)
            for (unsigned kind = 0; kind < 3; kind++) {
                const cpu_simd *m = s.simd[i];
                CHECK_SAME("scale_rows", c->scale_rows(out, v.a, 0.3f, v.b, n),
                           m->scale_rows(out, v.a, 0.3f, v.b, n));
                CHECK_SAME("scale_rows without weights", c->scale_rows(out, v.a, 0.3f, NULL, n),
                           m->scale_rows(out, v.a, 0.3f, NULL, n));
                CHECK_SAME("silu", c->silu(out, v.a, v.b, n), m->silu(out, v.a, v.b, n));
                CHECK_SAME("sigmoid", c->sigmoid(out, v.a, v.b, n), m->sigmoid(out, v.a, v.b, n));
                CHECK_SAME("gelu", c->gelu(out, v.a, v.b, n), m->gelu(out, v.a, v.b, n));
                CHECK_SAME("silu_clamped", c->silu_clamped(out, v.a, v.b, 1.702f, 0.5f, n),
                           m->silu_clamped(out, v.a, v.b, 1.702f, 0.5f, n));
                CHECK_SAME("softcap", c->softcap(out, 0.7f, n), m->softcap(out, 0.7f, n));
                CHECK_SAME("add", c->add(out, v.a, v.b, -1.7f, n), m->add(out, v.a, v.b, -1.7f, n));
                CHECK_SAME("rope", c->rope(out, v.a, n / 2, 1, n / 2),
                           m->rope(out, v.a, n / 2, 1, n / 2));
                CHECK_SAME("rope, pairs", c->rope(out, v.a, n / 2, 2, 1),
                           m->rope(out, v.a, n / 2, 2, 1));
                CHECK_SAME("f32_of_f16", c->f32_of_f16(out, (uint8_t *)v.a + 1, n),
                           m->f32_of_f16(out, (uint8_t *)v.a + 1, n));
                CHECK_SAME("f32_of_q8_0", c->f32_of_q8_0(out, (uint8_t *)v.a + 1, n / 32 * 32),
                           m->f32_of_q8_0(out, (uint8_t *)v.a + 1, n / 32 * 32));
                CHECK_SAME("f16_of_f32", c->f16_of_f32((uint8_t *)out + 1, v.a, n),
                           m->f16_of_f32((uint8_t *)out + 1, v.a, n));
            }
}

static void sums_equal_c(void)
{
    const cpu_simd *c = &cpu_simd_c;
    const sets s = sets_of_machine();
    if (!s.n)
        SKIP("only C runs here");
    for (size_t i = 0; i < s.n; i++)
        for (size_t n = 0; n <= N_MAX; n++)
            for (unsigned kind = 0; kind < 3; kind++) {
                const cpu_simd *m = s.simd[i];
                CHECK_SAME("sum_squares", result_c = c->sum_squares(v.a + 1, n),
                           result = m->sum_squares(v.a + 1, n));
                CHECK_SAME("max", result_c = c->max(v.a + 1, n), result = m->max(v.a + 1, n));
                CHECK_SAME("exp_sum", result_c = c->exp_sum(out, n, 1.5f),
                           result = m->exp_sum(out, n, 1.5f));
            }
}

/* Columns of which all rows count, the first ones, the last ones, or none. */
static void columns_equal_c(void)
{
    enum { ROWS = 41, COLS = 48, STRIDE = COLS + 3 };
    static float x[2][ROWS * STRIDE];
    float max[2][COLS], sum[2][COLS];
    uint32_t first[COLS], end[COLS];
    const sets s = sets_of_machine();
    if (!s.n)
        SKIP("only C runs here");
    for (size_t i = 0; i < s.n; i++)
        for (uint32_t n = 0; n <= ROWS; n++)
            for (unsigned kind = 0; kind < 3; kind++) {
                fill(x[0], MOE_COUNT(x[0]), kind);
                memcpy(x[1], x[0], sizeof x[0]);
                for (uint32_t c = 0; c < COLS; c++) {
                    first[c] = c < 16 ? 0 : c * 7 % (n + 1);
                    end[c] = c < 32 ? n : first[c] + c * 5 % (n + 1 - first[c]);
                }
                cpu_columns c = {x[0] + 1, STRIDE, n, COLS, first, end, max[0], sum[0]};
                exp_columns_c(&c);
                c.x = x[1] + 1;
                c.max = max[1];
                c.sum = sum[1];
                s.simd[i]->exp_columns(&c);
                CHECK(same_floats(x[0], x[1], MOE_COUNT(x[0])), "exp_columns, %u rows", n);
                CHECK(same_floats(max[0], max[1], COLS) && same_floats(sum[0], sum[1], COLS),
                      "exp_columns, sums of %u rows", n);
            }
}

/* Products around the sizes of the tiles, with strides larger than the rows. */
static void products_equal_c(void)
{
    enum { ROWS = 8, STRIDE = N_MAX + 3 };
    static const size_t cols[] = {1, 7, 8, 15, 16, 17, 24, 31, 33, 48, 63, 64, 67};
    static float a[9 * STRIDE], b[9 * STRIDE], c[2][10 * STRIDE];
    const uint32_t machine = cpu_detect();
    size_t n_checked = 0;
    for (uint32_t cpu = 1; cpu < 128; cpu++) {
        const cpu_outer_kernels *m = cpu_outer_select(cpu & machine);
        if (m == &cpu_outer_c || m == cpu_outer_select((cpu - 1) & machine))
            continue;
        n_checked++;
        for (size_t n_row = 1; n_row <= ROWS; n_row++)
            for (size_t i = 0; i < MOE_COUNT(cols); i++)
                for (size_t n_k = 0; n_k <= 9; n_k += 3) {
                    fill(a, MOE_COUNT(a), i % 3);
                    fill(b, MOE_COUNT(b), i % 3);
                    fill(c[0], MOE_COUNT(c[0]), i % 3);
                    memcpy(c[1], c[0], sizeof c[0]);
                    /* the rows of a, or its columns, lie one after another */
                    const size_t step = n_row % 2 ? 1 : STRIDE;
                    cpu_outer o = {c[0] + 1, a, b, NULL, NULL, STRIDE, STRIDE + 1 - step, step,
                                   STRIDE, n_row, n_k, cols[i], i % 2, (uintptr_t)a, n_k * 100};
                    outer_c(&o);
                    o.c = c[1] + 1;
                    m->outer(&o);
                    CHECK(same_floats(c[0], c[1], MOE_COUNT(c[0])),
                          "outer, cpu %x, %zu x %zu x %zu", cpu & machine, n_row, n_k, cols[i]);
                    transpose_c(c[0], ROWS + 2, b, STRIDE, n_k, cols[i]);
                    m->transpose(c[1], ROWS + 2, b, STRIDE, n_k, cols[i]);
                    CHECK(same_floats(c[0], c[1], MOE_COUNT(c[0])), "transpose, cpu %x, %zu x %zu",
                          cpu & machine, n_k, cols[i]);
                }
    }
    if (!n_checked)
        SKIP("only C runs here");
}

/* With keys or values of F16: around the sizes of tiles and strips. */
static void f16_products_equal_c(void)
{
    enum { STRIDE = 67, ROWS = 35 };
    static const size_t rows[] = {1, 2, 5, 6, 8, 15, 16, 17, 34};
    static const size_t keys[] = {1, 16, 31, 32, 33, 64};
    static const size_t cols[] = {5, 8, 16, 17, 32, 48, 67};
    static float a[ROWS * STRIDE], b[64 * STRIDE], c[2][ROWS * STRIDE];
    static uint8_t half[64 * STRIDE * 2];
    const uint32_t machine = cpu_detect();
    size_t n_checked = 0;
    for (size_t i = 0; i < MOE_COUNT(half); i += 2) { // below 2, subnormal ones too
        const uint16_t h = (uint16_t)(test_random() & 0xbbff);
        memcpy(half + i, &h, 2);
    }
    for (uint32_t cpu = 1; cpu < 128; cpu++) {
        const cpu_outer_kernels *m = cpu_outer_select(cpu & machine);
        if (m == &cpu_outer_c || m == cpu_outer_select((cpu - 1) & machine))
            continue;
        n_checked++;
        for (size_t r = 0; r < MOE_COUNT(rows); r++)
            for (size_t k = 0; k < MOE_COUNT(keys); k++)
                for (size_t x = 0; x < MOE_COUNT(cols); x++) {
                    fill(a, MOE_COUNT(a), 0);
                    fill(b, MOE_COUNT(b), 0);
                    fill(c[0], MOE_COUNT(c[0]), 0);
                    memcpy(c[1], c[0], sizeof c[0]);
                    const bool in_a = cols[x] % 16 == 0;
                    cpu_outer o = {c[0], in_a ? NULL : a, in_a ? b : NULL, in_a ? half : NULL,
                                   in_a ? NULL : half, STRIDE, STRIDE, 1, STRIDE, rows[r], keys[k],
                                   cols[x], k % 2, (uintptr_t)a, 1000};
                    outer_c(&o);
                    o.c = c[1];
                    m->outer(&o);
                    CHECK(same_floats(c[0], c[1], MOE_COUNT(c[0])), "cpu %x, %zu x %zu x %zu",
                          cpu & machine, rows[r], keys[k], cols[x]);
                    transpose_f16_c(c[0], STRIDE, half, STRIDE, rows[r], MOE_MIN(ROWS, cols[x]));
                    m->transpose_f16(c[1], STRIDE, half, STRIDE, rows[r], MOE_MIN(ROWS, cols[x]));
                    CHECK(same_floats(c[0], c[1], MOE_COUNT(c[0])),
                          "transpose, cpu %x, %zu x %zu", cpu & machine, rows[r], cols[x]);
                }
    }
    if (!n_checked)
        SKIP("only C runs here");
}

/* The tolerance that the comment above cpu_exp() promises, over its whole range. */
static void exp_is_accurate(void)
{
    for (int i = -870000; i <= 880000; i++) {
        const float x = (float)i * 1e-4f;
        const double want = exp((double)x), error = fabs(cpu_exp(x) / want - 1);
        CHECK(error < 1.5e-7, "exp(%a): relative error %.2g", x, error);
    }
    CHECK(cpu_exp(-INFINITY) == cpu_exp(-87.0f) && cpu_exp(INFINITY) == cpu_exp(88.0f), "ends");
    CHECK(isnan(cpu_exp(NAN)), "NaN");
}

static float random_bits_float(int low_exponent, int high_exponent)
{
    const uint32_t bits = (uint32_t)test_random();
    const int span = high_exponent - low_exponent + 1;
    const float mantissa = f32_of_bits(0x3f800000 | (bits & 0x7fffff));
    const int exponent = low_exponent + (int)(bits >> 24) % span;
    return ldexpf(bits >> 23 & 1 ? -mantissa : mantissa, exponent);
}

/* What stands in for a C library whose fmaf() rounds twice, against one that does not. */
static void exact_fmaf_rounds_once(void)
{
    /* Below the middle of two floats by 2^-60, which a double has no room for. */
    CHECK(exact_fmaf(0x1.00004p0f, 0x1.ffff8p-25f, 0x1.000002p0f) == 0x1.000002p0f, "the middle");
    CHECK(exact_fmaf(0x1p127f, 2, -INFINITY) == -INFINITY, "infinities");
    CHECK(isnan(exact_fmaf(INFINITY, 1, -INFINITY)) && isnan(exact_fmaf(NAN, 1, 1)), "NaN");
#ifdef __MINGW32__
    SKIP("no fmaf() to compare with");
#endif
    for (int i = 0; i < 300000; i++) {
        const int apart = i % 64; /* products and sums of like size, and others */
        const float a = random_bits_float(-3, 3), b = random_bits_float(-3 - apart, 3 - apart);
        const float c = i % 5 ? random_bits_float(-4, 4) : random_bits_float(-140, -120);
        const float d = i % 5 ? b : ldexpf(b, -110); /* subnormal sums */
        CHECK(bits_of_f32(exact_fmaf(a, d, c)) == bits_of_f32((fmaf)(a, d, c)), "%a %a %a", a, d,
              c);
    }
}

TEST_PROGRAM(simd)
{
    RUN(exact_fmaf_rounds_once);
    RUN(elementwise_equals_c);
    RUN(sums_equal_c);
    RUN(columns_equal_c);
    RUN(products_equal_c);
    RUN(f16_products_equal_c);
    RUN(exp_is_accurate);
}
