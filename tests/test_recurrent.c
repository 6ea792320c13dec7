/* tests/test_recurrent.c - kernels of layers with a state (backends/cpu_recurrent.c): the machine's
 * against C, bit for bit; the accuracy of what C computes. What the layers compute with them is the
 * subject of tests/test_forward.c. */
#include "test.h"

/* Numbers of both signs; of widely different sizes; or with zeros. */
static void recurrent_fill(float *x, size_t n, unsigned kind)
{
    uint32_t state = 7 + kind;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(int32_t)state * 0x1p-31f;
        if (kind == 1)
            x[i] = ldexpf(x[i], (int)(state >> 8 & 15) - 8);
        if (kind == 2 && state >> 12 & 1)
            x[i] = 0;
    }
}

static bool recurrent_same(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Convolutions of some taps; steps of the delta rule, one after another, with rows that fill no
 * chain. */
static void check_recurrent_set(const cpu_recurrent *m)
{
    enum { STRIP = CPU_CONV_STRIP, B = MOE_DELTA_BLOCK, DIM = 13, TAPS = 5, STEPS = 3 };
    static float u[TAPS * STRIP], weight[TAPS * STRIP], state[2][DIM * B], qk[2 * DIM], v[B];
    const float *rows[TAPS];
    for (unsigned kind = 0; kind < 3; kind++) {
        recurrent_fill(u, MOE_COUNT(u), kind);
        recurrent_fill(weight, MOE_COUNT(weight), kind);
        recurrent_fill(qk, MOE_COUNT(qk), kind);
        recurrent_fill(v, B, kind);
        for (size_t k = 0; k < TAPS; k++)
            rows[k] = u + k * STRIP;
        for (size_t n = 1; n <= TAPS; n++) {
            float want[STRIP], got[STRIP];
            conv_c(want, rows, weight, n);
            m->conv(got, rows, weight, n);
            CHECK(recurrent_same(want, got, STRIP), "convolution, %zu taps", n);
        }
        for (size_t dim = 1; dim <= DIM; dim++) {
            recurrent_fill(state[0], DIM * B, kind);
            memcpy(state[1], state[0], sizeof state[0]);
            float known[2][B];
            delta_read_c(known[0], state[0], qk + DIM, dim);
            m->delta_read(known[1], state[1], qk + DIM, dim);
            CHECK(recurrent_same(known[0], known[1], B), "delta rule reads, %zu rows", dim);
            for (int step = 0; step < STEPS; step++) {
                float want[B], got[B];
                cpu_delta_step s = {.state = state[0], .known = known[0], .q = qk, .k = qk + DIM,
                                    .next = step + 1 < STEPS ? qk + DIM : NULL, .v = v, .dst = want,
                                    .dim_k = dim, .decay = 0.9f, .beta = 0.4f, .scale = 0.3f};
                delta_c(&s);
                s.state = state[1];
                s.known = known[1];
                s.dst = got;
                m->delta(&s);
                CHECK(recurrent_same(want, got, B) && recurrent_same(state[0], state[1], DIM * B) &&
                          recurrent_same(known[0], known[1], B),
                      "delta rule, %zu rows, data %u", dim, kind);
            }
        }
    }
}

static void recurrent_kernels_equal_c(void)
{
    const uint32_t machine = cpu_detect();
    if (cpu_recurrent_select(machine) == &cpu_recurrent_c)
        SKIP("only C runs here");
    check_recurrent_set(cpu_recurrent_select(machine));
    check_recurrent_set(cpu_recurrent_select(machine & ~(uint32_t)MOE_CPU_AVX512));
}

static void softplus_is_accurate(void)
{
    for (int i = -80000; i <= 80000; i++) {
        const float x = (float)i * 1e-3f;
        const double want = x > 30 ? (double)x : log1p(exp((double)x));
        CHECK(fabs((double)cpu_softplus(x) - want) <= 3e-7 * want,
              "softplus(%g): expected %g, got %g", (double)x, want, (double)cpu_softplus(x));
    }
}

TEST_PROGRAM(recurrent)
{
    RUN(recurrent_kernels_equal_c);
    RUN(softplus_is_accurate);
}
