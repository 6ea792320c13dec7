/* tests/test_int16.c - rows of 16-bit integers (backends/cpu_int16.h): as exact as F16, sums that
 * always fit, and every set of kernels that this machine can run against the C functions, bit for
 * bit. */
#include "test.h"

enum { INT16_MOST = 2048 + 1 }; // elements of a row

typedef struct int16_sets {
    const cpu_int16 *set[8];
    size_t n;
} int16_sets;

/* The distinct sets that subsets of the machine's bits select, C first. */
static int16_sets int16_sets_of_machine(void)
{
    const uint32_t machine = cpu_detect();
    int16_sets s = {{&cpu_int16_c}, 1};
    for (uint32_t cpu = 0; cpu < 128; cpu++) {
        const cpu_int16 *set = cpu_int16_select(cpu & machine);
        size_t i = 0;
        while (i < s.n && s.set[i] != set)
            i++;
        if (i == s.n)
            s.set[s.n++] = set;
    }
    return s;
}

/* Roughly normal, of variance 1. */
static float int16_normal(void)
{
    float sum = 0;
    for (int i = 0; i < 12; i++)
        sum += test_random_float();
    return sum / 2;
}

static void int16_fill(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = int16_normal();
}

static bool int16_same(float a, float b)
{
    return bits_of_f32(a) == bits_of_f32(b) || (isnan(a) && isnan(b));
}

/* ------------------------------------------------------------------------------ exactness -- */

/* Root of the mean square of what rounding n elements costs, by integers and by F16. */
static void int16_errors(const float *x, size_t n, double *integers, double *halves)
{
    int16_t code[INT16_MOST + I16_GROUP];
    float back[INT16_MOST];
    const float scale = cpu_int16_c.quantize(code, x, n);
    cpu_int16_c.dequantize(back, code, scale, n);
    *integers = *halves = 0;
    for (size_t i = 0; i < n; i++) {
        *integers += pow((double)(back[i] - x[i]), 2) / (double)n;
        *halves += pow((double)(f32_of_f16(f16_of_f32(x[i])) - x[i]), 2) / (double)n;
    }
    *integers = sqrt(*integers);
    *halves = sqrt(*halves);
}

/* Latents of DeepSeek-V2-Lite's length, as they come from a norm, and with an element that is much
 * larger than the others. */
static void rows_are_as_exact_as_f16(void)
{
    float x[576];
    for (int outlier = 0; outlier <= 16; outlier += 8) {
        double integers = 0, halves = 0, a, b;
        for (int i = 0; i < 50; i++) {
            int16_fill(x, MOE_COUNT(x));
            x[i] = outlier ? (float)outlier : x[i];
            int16_errors(x, MOE_COUNT(x), &a, &b);
            integers += a / 50;
            halves += b / 50;
        }
        CHECK(integers < halves, "outlier %d: %.2g, F16 %.2g", outlier,
              integers, halves);
    }
}

static int64_t int16_product(const int16_t *a, const int16_t *b, size_t n)
{
    int64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (int64_t)a[i] * b[i];
    return sum;
}

/* The largest product of a row with any other is that with itself. */
static void sums_of_rows_fit(void)
{
    static const size_t lengths[] = {1, 2, 31, 64, 576, 2048};
    float x[INT16_MOST];
    int16_t code[INT16_MOST + I16_GROUP];
    for (size_t l = 0; l < MOE_COUNT(lengths); l++)
        for (int kind = 0; kind < 40; kind++) {
            const size_t n = lengths[l];
            int16_fill(x, n);
            for (size_t i = 0; i < n && kind < 20; i++)
                x[i] = kind < 10 ? 1.0f + (float)kind * 1e-5f : (float)(i % 2) - 0.5f;
            const float scale = cpu_int16_c.quantize(code, x, n);
            CHECK(scale > 0 && int16_product(code, code, n) <= INT32_MAX, "%zu, %d", n, kind);
        }
}

static void sums_of_weights_fit(void)
{
    float p[I16_BLOCK], scale[I16_BLOCK];
    int16_t w[I16_BLOCK];
    for (int kind = 0; kind < 200; kind++) {
        int64_t sum = 0;
        const size_t n = 1 + test_random() % I16_BLOCK;
        for (size_t i = 0; i < n; i++) {
            p[i] = kind < 10 ? 1 : expf(-fabsf(int16_normal()) * (float)(kind % 20));
            scale[i] = kind < 10 ? 1.5f + 1e-3f * (float)kind : ldexpf(1, (int)(test_random() % 9));
        }
        const float step = cpu_int16_c.weights(w, p, scale, n);
        for (size_t i = 0; i < I16_BLOCK; i++) {
            const double want = i < n ? (double)p[i] * scale[i] : 0;
            sum += w[i];
            CHECK(w[i] >= 0 && fabs(w[i] * (double)step - want) <= 0.501 * step, "%d: %d for %g",
                  kind, w[i], want);
        }
        CHECK(sum * INT16_MAX <= INT32_MAX, "%d: %lld", kind, (long long)sum);
    }
}

/* What is no number shows in the scale; what is (nearly) nothing is nothing. */
static void odd_rows_keep_their_meaning(void)
{
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -1e20f};
    static const float small[] = {0, -0.0f, 1e-45f, -1e-30f};
    const int16_sets s = int16_sets_of_machine();
    float x[40], scale[40];
    int16_t code[64];
    for (size_t k = 0; k < s.n; k++)
        for (size_t i = 0; i < 40; i++) {
            const cpu_int16 *set = s.set[k];
            for (size_t o = 0; o < MOE_COUNT(odd); o++) {
                int16_fill(x, 40);
                x[i] = odd[o];
                CHECK(isnan(set->quantize(code, x, 40)), "%g at %zu", (double)odd[o], i);
            }
            for (size_t o = 0; o < MOE_COUNT(small); o++) {
                memset(x, 0, sizeof x);
                x[i] = small[o];
                code[i] = 1;
                CHECK(set->quantize(code, x, 40) == 0 && code[i] == 0, "%g at %zu",
                      (double)small[o], i);
            }
            for (size_t j = 0; j < 40; j++)
                x[j] = scale[j] = 1;
            x[i] = NAN;
            CHECK(isnan(set->weights(code, x, scale, 40)), "weight %zu is NaN", i);
            memset(x, 0, sizeof x);
            x[i] = 1e-38f; // the least that a softmax gives
            CHECK(set->weights(code, x, scale, 40) == 0 && code[i] == 0, "weight %zu", i);
        }
}

/* -------------------------------------------------------------------------- sets of kernels -- */

static void conversions_equal_c(void)
{
    const int16_sets s = int16_sets_of_machine();
    float x[100], scale[100], back[2][100];
    int16_t code[2][128];
    if (s.n < 2)
        SKIP("only C runs here");
    for (size_t k = 1; k < s.n; k++)
        for (size_t n = 1; n <= 99; n++) {
            float got[2];
            int16_fill(x, 100);
            int16_fill(scale, 100);
            memset(code, 0x55, sizeof code);
            memset(back, 0x55, sizeof back);
            for (size_t i = 0; i < 2; i++) {
                const cpu_int16 *set = s.set[i ? k : 0];
                got[i] = set->quantize(code[i], x + 1, n);
                set->dequantize(back[i], code[i], got[i], n);
            }
            CHECK(int16_same(got[0], got[1]) && !memcmp(code[0], code[1], sizeof code[0]),
                  "set %zu, %zu codes", k, n);
            CHECK(!memcmp(back[0], back[1], sizeof back[0]), "set %zu, %zu floats", k, n);
            for (size_t i = 0; i < 100; i++)
                x[i] = fabsf(x[i]), scale[i] = fabsf(scale[i]);
            for (size_t i = 0; i < 2; i++)
                got[i] = s.set[i ? k : 0]->weights(code[i], x + 1, scale,
                                                   MOE_MIN(n, I16_BLOCK));
            CHECK(int16_same(got[0], got[1]) && !memcmp(code[0], code[1], sizeof code[0]),
                  "set %zu, %zu weights", k, n);
        }
}

/* Queries, keys and values of the largest codes that may be, in numbers around those of tiles. */
enum { INT16_ROWS = I16_BLOCK + I16_ROWS, INT16_QUERIES = 21, INT16_DIM = 96 };

typedef struct int16_room {
    int16_t q[INT16_QUERIES * INT16_DIM], k[INT16_ROWS * INT16_DIM], w[INT16_QUERIES * I16_BLOCK];
    float q_scale[INT16_QUERIES], k_scale[INT16_ROWS], step[INT16_QUERIES];
    const int16_t *row[INT16_ROWS];
    float c[2][INT16_QUERIES * 2 * INT16_DIM];
} int16_room;

static void int16_room_fill(int16_room *r, size_t n_dim, size_t n_row)
{
    float x[INT16_DIM], scale[I16_BLOCK];
    for (size_t i = 0; i < INT16_QUERIES; i++) {
        int16_fill(x, INT16_DIM);
        r->q_scale[i] = cpu_int16_c.quantize(r->q + i * n_dim, x, n_dim);
        int16_fill(x, I16_BLOCK);
        for (size_t t = 0; t < I16_BLOCK; t++)
            x[t] = fabsf(x[t]), scale[t] = 1;
        r->step[i] = cpu_int16_c.weights(r->w + i * I16_BLOCK, x, scale, n_row);
    }
    for (size_t j = 0; j < INT16_ROWS; j++) {
        int16_fill(x, INT16_DIM);
        x[j % n_dim] = 40;
        r->k_scale[j] = cpu_int16_c.quantize(r->k + j * n_dim, x, n_dim);
        r->row[j] = r->k + j * n_dim;
    }
    int16_fill(r->c[0], MOE_COUNT(r->c[0]));
    memcpy(r->c[1], r->c[0], sizeof r->c[0]);
}

static void products_of_integers_equal_c(void)
{
    static const size_t queries[] = {1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 21};
    static const size_t rows[] = {1, 2, 3, 4, 5, 31, 63, 64};
    static const size_t cols[] = {1, 3, 4, 15, 16, 17, 31, 32, 33, 50, 64, 90};
    static int16_room r;
    const int16_sets s = int16_sets_of_machine();
    if (s.n < 2)
        SKIP("only C runs here");
    for (size_t k = 1; k < s.n; k++)
        for (size_t i = 0; i < MOE_COUNT(queries); i++)
            for (size_t j = 0; j < MOE_COUNT(rows); j++)
                for (size_t x = 0; x < MOE_COUNT(cols); x++) {
                    const size_t n_dim = (size_t)align_up(cols[x], I16_GROUP);
                    int16_room_fill(&r, n_dim, rows[j]);
                    i16_scores scores = {r.c[0], r.q, r.q_scale, r.row, r.k_scale, 70, queries[i],
                                         rows[j], n_dim, (uintptr_t)&r, sizeof r};
                    s.set[0]->scores(&scores);
                    scores.c = r.c[1];
                    s.set[k]->scores(&scores);
                    for (size_t a = 0; a < queries[i]; a++)
                        CHECK(!memcmp(r.c[0] + 70 * a, r.c[1] + 70 * a, rows[j] * sizeof(float)),
                              "set %zu, scores %zu x %zu x %zu", k, queries[i], rows[j], n_dim);
                    int16_room_fill(&r, n_dim, rows[j]);
                    i16_values values = {r.c[0] + 1, r.w, r.step, r.row, cols[x] + 3, queries[i],
                                         rows[j], cols[x], (uintptr_t)&r, sizeof r};
                    s.set[0]->values(&values);
                    values.c = r.c[1] + 1;
                    s.set[k]->values(&values);
                    CHECK(!memcmp(r.c[0], r.c[1], sizeof r.c[0]), "set %zu, values %zu x %zu x %zu",
                          k, queries[i], rows[j], cols[x]);
                }
}

TEST_PROGRAM(int16)
{
    RUN(rows_are_as_exact_as_f16);
    RUN(sums_of_rows_fit);
    RUN(sums_of_weights_fit);
    RUN(odd_rows_keep_their_meaning);
    RUN(conversions_equal_c);
    RUN(products_of_integers_equal_c);
}
