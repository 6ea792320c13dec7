/* tests/test_encode.c - the quantizers of the converter: the same bytes on every instruction set,
 * and less error than the reference quantizers leave. */
#include "test.h"

#include "../convert/encode_input.h"
#include "../convert/encoders.h"
#include "../convert/encode_tcq.c"

enum { ENCODE_IN = 768, ENCODE_ROW = 5, ENCODE_N = ENCODE_IN * ENCODE_ROW };

/* The types whose quantizers convert/encode_32.h and encode_k.h are. */
static bool has_own_encoder(const moe_quant *quant)
{
    static const char *const names[] = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K",
                                        "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
                                        "MXFP4"};
    for (size_t i = 0; i < MOE_COUNT(names); i++)
        if (!strcmp(names[i], quant->name))
            return true;
    return false;
}

/* About normal: the sum of four uniform numbers. */
static float random_normal(void)
{
    return (test_random_float() + test_random_float() + test_random_float() + test_random_float()) *
           0.866f;
}

typedef enum encode_data {
    DATA_NORMAL, DATA_HEAVY, DATA_ZERO, DATA_CONSTANT, DATA_POSITIVE, DATA_NEGATIVE, DATA_TINY,
    DATA_HUGE, DATA_SPARSE, DATA_MIXED, N_DATA
} encode_data;

static void encode_fill(float *x, size_t n, encode_data kind)
{
    test_random_state = 20260101 + kind;
    for (size_t i = 0; i < n; i++) {
        const float v = random_normal();
        switch (kind) {
        case DATA_NORMAL: x[i] = v * 0.02f; break;
        case DATA_HEAVY: x[i] = v * v * v * v * v; break;
        case DATA_ZERO: x[i] = 0; break;
        case DATA_CONSTANT: x[i] = 0.7f; break;
        case DATA_POSITIVE: x[i] = fabsf(v) + 1; break;
        case DATA_NEGATIVE: x[i] = -fabsf(v) - 3; break;
        case DATA_TINY: x[i] = v * (i / 256 % 2 ? 1e-7f : 1e-42f); break;
        case DATA_HUGE: x[i] = v * 30000; break;
        case DATA_SPARSE: x[i] = test_random() % 40 ? 0 : v; break;
        default: x[i] = ldexpf(v, -(int)(i / 32 % 23)); break;
        }
    }
}

static size_t blocks_bytes(const moe_quant *quant, size_t n)
{
    return n / quant->block_len * quant->block_bytes;
}

static double error_of(const moe_quant *quant, const uint8_t *blocks, const float *x,
                       const float *importance, size_t n_in, size_t n)
{
    float *y = malloc(n * sizeof *y);
    double sum = 0;
    quant->dequantize(blocks, y, n);
    for (size_t i = 0; i < n; i++) {
        const double e = (double)x[i] - (double)y[i];
        sum += e * e * (importance ? (double)importance[i % n_in] : 1);
    }
    free(y);
    return sum;
}

static double encoded_error(const moe_quant *quant, encode_fn *encode, const float *x,
                            const float *importance, const float *judge)
{
    uint8_t *blocks = malloc(blocks_bytes(quant, ENCODE_N));
    encode(x, importance, blocks, ENCODE_ROW, ENCODE_IN);
    const double error = error_of(quant, blocks, x, judge, ENCODE_IN, ENCODE_N);
    free(blocks);
    return error;
}

/* Importance of columns over two decades, some of them 0. */
static void fill_importance(float *w, size_t n)
{
    for (size_t i = 0; i < n; i++)
        w[i] = test_random() % 16 ? expf(2 * random_normal()) : 0;
}

/* ---------------------------------------------------------------------------------- tests -- */

static void check_vectors(const moe_quant *quant, uint32_t cpu, const float *x, const float *w,
                          const char *what)
{
    const size_t bytes = blocks_bytes(quant, ENCODE_N);
    uint8_t *a = malloc(bytes), *b = malloc(bytes);
    encoder_select(quant, 0)(x, w, a, ENCODE_ROW, ENCODE_IN);
    encoder_select(quant, cpu)(x, w, b, ENCODE_ROW, ENCODE_IN);
    size_t k = 0;
    while (k < bytes && a[k] == b[k])
        k++;
    CHECK(k == bytes, "%s, cpu %x, %s: byte %zu", quant->name, (unsigned)cpu, what, k);
    free(a);
    free(b);
}

static void vectors_give_the_bytes_of_plain_c(void)
{
    static float x[ENCODE_N], w[ENCODE_IN];
    const uint32_t machine = cpu_detect();
    const uint32_t sets[] = {MOE_CPU_AVX2, MOE_CPU_AVX2 | MOE_CPU_AVX512};
    if (!(machine & MOE_CPU_AVX2))
        SKIP("needs AVX2");
    for (size_t i = 0; i < MOE_COUNT(quant_table) * MOE_COUNT(sets); i++)
        for (int kind = 0; kind < N_DATA && has_own_encoder(quant_table[i / 2]); kind++)
            for (int mode = 0; mode < 3 && (sets[i % 2] & machine) == sets[i % 2]; mode++) {
                char what[32];
                snprintf(what, sizeof what, "data %d, mode %d", kind, mode);
                encode_fill(x, ENCODE_N, kind);
                fill_importance(w, ENCODE_IN);
                for (size_t k = 0; k < ENCODE_IN / 2 && mode == 2; k++)
                    w[k] = 0; // whole groups that do not matter
                check_vectors(quant_table[i / 2], sets[i % 2], x, mode ? w : NULL, what);
            }
}

/* Rows alone, or in calls of several, with n_in that leaves a part of a tile. */
static void cutting_rows_changes_nothing(void)
{
    static float x[7 * ENCODE_IN], w[ENCODE_IN];
    encode_fill(x, MOE_COUNT(x), DATA_MIXED);
    fill_importance(w, MOE_COUNT(w));
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        encode_fn *encode = encoder_for(quant);
        const size_t n_in = 3 * MOE_MAX(quant->block_len, 32u), row = blocks_bytes(quant, n_in);
        for (int weighted = 0; weighted < 2; weighted++) {
            uint8_t *all = malloc(7 * row), *one = malloc(row);
            encode(x, weighted ? w : NULL, all, 7, n_in);
            for (size_t r = 0; r < 7; r++) {
                encode(x + r * n_in, weighted ? w : NULL, one, 1, n_in);
                CHECK(!memcmp(one, all + r * row, row), "%s, row %zu", quant->name, r);
            }
            free(all);
            free(one);
        }
    }
}

/* On normal weights, as a part of what the reference quantizers leave: those of Q3_K, Q6_K and
 * IQ4_XS try as many scales, in a tenth of the speed or less. */
static void error_is_below_the_reference(void)
{
    static const struct { const char *name; double part; } bounds[] = {
        {"Q4_0", 0.91}, {"Q4_1", 0.82}, {"Q5_0", 0.91}, {"Q5_1", 0.80}, {"Q8_0", 0.98},
        {"Q2_K", 0.99}, {"Q3_K", 1.001}, {"Q4_K", 0.99}, {"Q5_K", 0.99}, {"Q6_K", 1.001},
        {"IQ4_NL", 0.95}, {"IQ4_XS", 1.001}, {"MXFP4", 0.999}};
    static float x[ENCODE_N];
    for (size_t i = 0; i < MOE_COUNT(bounds); i++) {
        const moe_quant *quant = quant_by_name(bounds[i].name);
        uint8_t *blocks = malloc(blocks_bytes(quant, ENCODE_N));
        encode_fill(x, ENCODE_N, DATA_NORMAL);
        quant->quantize(x, blocks, ENCODE_N);
        const double reference = error_of(quant, blocks, x, NULL, ENCODE_IN, ENCODE_N);
        const double error = encoded_error(quant, encoder_for(quant), x, NULL, NULL);
        CHECK(error <= bounds[i].part * reference, "%s: %.4f of the reference", quant->name,
              error / reference);
        free(blocks);
    }
}

/* On everything else it may be equal, never clearly worse. Where weights are equal, or so small
 * that scales are subnormal, the error is that of the scale's own rounding. */
static void error_is_never_far_above_the_reference(void)
{
    static float x[ENCODE_N];
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        for (int kind = 0; kind < N_DATA; kind++) {
            const moe_quant *quant = quant_table[i];
            if (!has_own_encoder(quant))
                continue;
            uint8_t *blocks = malloc(blocks_bytes(quant, ENCODE_N));
            encode_fill(x, ENCODE_N, kind);
            quant->quantize(x, blocks, ENCODE_N);
            const double reference = error_of(quant, blocks, x, NULL, ENCODE_IN, ENCODE_N);
            const double error = encoded_error(quant, encoder_for(quant), x, NULL, NULL);
            const bool luck = kind == DATA_CONSTANT || kind == DATA_TINY;
            CHECK(error <= reference * (luck ? 1.5 : 1.02), "%s, data %d: %g, reference %g",
                  quant->name, kind, error, reference);
            free(blocks);
        }
}

static void importance_lowers_the_weighted_error(void)
{
    static float x[ENCODE_N], w[ENCODE_IN], ones[ENCODE_IN];
    encode_fill(x, ENCODE_N, DATA_NORMAL);
    fill_importance(w, ENCODE_IN);
    for (size_t i = 0; i < ENCODE_IN; i++)
        ones[i] = 1;
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        if (!has_own_encoder(quant))
            continue;
        const double blind = encoded_error(quant, encoder_for(quant), x, NULL, w);
        const double aware = encoded_error(quant, encoder_for(quant), x, w, w);
        CHECK(aware < 0.99 * blind, "%s: %.4f of the error without importance", quant->name,
              aware / blind);
        // importance that is the same everywhere says nothing; only the searches differ
        const double plain = encoded_error(quant, encoder_for(quant), x, NULL, NULL);
        const double even = encoded_error(quant, encoder_for(quant), x, ones, NULL);
        CHECK(even <= 1.005 * plain, "%s: %.4f", quant->name, even / plain);
    }
}

/* Weights that a type can represent come back as they were. */
static void what_fits_is_exact(void)
{
    static float x[ENCODE_N];
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        const int low = quant->id == 2 || quant->id == 11 || quant->id == 10 ? -1 : -2;
        for (size_t k = 0; k < ENCODE_N; k++) // a scale of 1/4 and the codes -2..1 or -1..1
            x[k] = 0.25f * (float)((int)(test_random() % (low == -1 ? 3 : 4)) + low);
        if (!has_own_encoder(quant))
            continue;
        uint8_t *blocks = malloc(blocks_bytes(quant, ENCODE_N));
        quant->quantize(x, blocks, ENCODE_N);
        const double reference = error_of(quant, blocks, x, NULL, ENCODE_IN, ENCODE_N);
        const double error = encoded_error(quant, encoder_for(quant), x, NULL, NULL);
        CHECK(error <= fmax(reference, 1e-4), "%s: %g, reference %g", quant->name, error,
              reference);
        free(blocks);
    }
}

static uint64_t bytes_hash(const uint8_t *bytes, size_t n)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t k = 0; k < n; k++)
        hash = (hash ^ bytes[k]) * 1099511628211u;
    return hash;
}

/* Rows that are longer than what the trellis' encoder searches at once. */
enum { RECORDED_ROW = 3, RECORDED_IN = TCQ_STEPS * TCQ_PATHS + 256 };
static float recorded_x[RECORDED_ROW * RECORDED_IN], recorded_w[RECORDED_IN];

/* Weights and importance that are the same on every machine: products only. One row has outliers,
 * one is tiny, and each ends with zeros of both signs. */
static void fill_recorded(void)
{
    test_random_state = 20260101;
    for (size_t i = 0; i < MOE_COUNT(recorded_x); i++) {
        const size_t r = i / RECORDED_IN, k = i % RECORDED_IN;
        const float u = test_random_float(), v = test_random_float();
        recorded_x[i] = k >= RECORDED_IN - 300 ? (u < 0 ? -0.0f : 0.0f) :
                        r == 0 ? u * v : r == 1 ? u * u * u * u * u : u * v * 1e-3f;
    }
    for (size_t i = 0; i < RECORDED_IN; i++)
        recorded_w[i] = test_random() % 16 ? (float)(1 + test_random() % 1000) : 0;
}

/* Bytes of all quantizers for one set of weights: of the encoders without and with importance, and
 * of the reference quantizer. A change of any of them is to be seen, and meant: what a search finds
 * that looks at less, or at the wrong places, is only a little worse. To change them, print them
 * anew. */
static void bytes_are_the_recorded_ones(void)
{
    static const struct { const char *name; uint64_t hash[3]; } recorded[] = {
        {"Q4_0", {0xddf1119a82c89651, 0xee4dd57ce01e8ac2, 0x00fdff9368ca8919}},
        {"Q4_1", {0x5e5cc227086cfbc4, 0x2d1ef8819e7c0f54, 0x0c64d2c117f93252}},
        {"Q5_0", {0x473bd0f9ebac30a9, 0xce8b2b7e4c672bc9, 0xe3869cd797ad447d}},
        {"Q5_1", {0xe8f09e8526e49711, 0x17d8f768fb983688, 0x3434f4f9a48ecda1}},
        {"Q8_0", {0xc17b8ac6ec4f74fc, 0x8616d18117aca267, 0xcafbd5edebd64d9b}},
        {"Q2_K", {0xad522ab00a4adbf9, 0xca7474dfc10cbb08, 0x587fd22272025b43}},
        {"Q3_K", {0xc1f68a6936922c34, 0x29929e1ba516d94b, 0xd7ff495a5e836e9b}},
        {"Q4_K", {0x27c7e17f305947c8, 0x6eacbeec08df5b9e, 0x3b64d67ba5546c43}},
        {"Q5_K", {0x6e121312af11c09f, 0xcbbd596b666978a9, 0xc13f254ced427ff4}},
        {"Q6_K", {0x2f6353ff2b2f572d, 0x91e6265687d2fca6, 0x058b7ffe125620e5}},
        {"IQ4_NL", {0xfbc51bb5364e3d0e, 0x17765cdd63f03924, 0x51926a6f6d90f7c2}},
        {"IQ4_XS", {0x87493177809aef5c, 0xd083a3a198ec6b6b, 0x395672860e00d159}},
        {"MXFP4", {0xb736a5d3ec955b3e, 0x28eb3b7bccb1cb7c, 0x74bdfc4e0a4a3f1d}},
        {"TCQ4", {0x2e017ab07d1a020a, 0x2e017ab07d1a020a, 0x2e017ab07d1a020a}},
        {"TCQ5", {0xd020d0adf8a5967f, 0xd020d0adf8a5967f, 0xd020d0adf8a5967f}},
        {"TCQ8", {0x685f7742543d0236, 0x685f7742543d0236, 0x685f7742543d0236}},
    };
    size_t n_recorded = 0;
    fill_recorded();
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *quant = quant_table[i];
        const size_t row = blocks_bytes(quant, RECORDED_IN), bytes = RECORDED_ROW * row;
        if (quant->block_len == 1 || quant->given)
            continue;
        uint64_t hash[3];
        uint8_t *blocks = malloc(bytes);
        for (int weighted = 0; weighted < 2; weighted++) {
            encoder_for(quant)(recorded_x, weighted ? recorded_w : NULL, blocks, RECORDED_ROW,
                               RECORDED_IN);
            hash[weighted] = bytes_hash(blocks, bytes);
        }
        for (size_t r = 0; r < RECORDED_ROW; r++)
            quant->quantize(recorded_x + r * RECORDED_IN, blocks + r * row, RECORDED_IN);
        hash[2] = bytes_hash(blocks, bytes);
        const bool same = n_recorded < MOE_COUNT(recorded) &&
                          !strcmp(recorded[n_recorded].name, quant->name) &&
                          !memcmp(recorded[n_recorded].hash, hash, sizeof hash);
        CHECK(same, "{\"%s\", {0x%016llx, 0x%016llx, 0x%016llx}},", quant->name,
              (unsigned long long)hash[0], (unsigned long long)hash[1],
              (unsigned long long)hash[2]);
        n_recorded++;
        free(blocks);
    }
    CHECK(n_recorded == MOE_COUNT(recorded), "%zu types", n_recorded);
}

/* All numbers of 16 bits, NaN's payload too. */
static void inputs_are_the_same_floats(void)
{
    static uint16_t half[65536 + 3];
    static float a[65536 + 3], b[65536 + 3];
    const input_ops ops = input_select(cpu_detect());
    for (size_t i = 0; i < MOE_COUNT(half); i++)
        half[i] = (uint16_t)i;
    for (int type = 0; type < 2; type++) {
        const moe_quant *quant = type ? &quant_bf16 : &quant_f16;
        input_floats(&ops, quant, half, a, MOE_COUNT(half));
        quant->dequantize(half, b, MOE_COUNT(half));
        CHECK(!memcmp(a, b, sizeof a), "%s", quant->name);
    }
}

static void unusable_numbers_are_found_anywhere(void)
{
    const input_ops ops = input_select(cpu_detect());
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY, 65505, -65505};
    float x[21] = {0};
    for (size_t n = 1; n <= MOE_COUNT(x); n++) {
        for (size_t i = 0; i < n; i++)
            x[i] = i % 2 ? 65504 : -65504;
        CHECK(ops.within(x, n, 65504), "%zu", n);
        for (size_t i = 0; i < n * MOE_COUNT(bad); i++) {
            const float old = x[i / MOE_COUNT(bad)];
            x[i / MOE_COUNT(bad)] = bad[i % MOE_COUNT(bad)];
            CHECK(!ops.within(x, n, 65504), "%g at %zu of %zu", (double)bad[i % MOE_COUNT(bad)],
                  i / MOE_COUNT(bad), n);
            x[i / MOE_COUNT(bad)] = old;
        }
    }
}

/* ---------------------------------------------------------------------- trellis-coded types -- */

enum { TCQ_TEST_IN = 1088, TCQ_TEST_ROW = 15, TCQ_TEST_N = TCQ_TEST_IN * TCQ_TEST_ROW };

static uint8_t *tcq_blocks(const tcq_plan *chosen, const float *x, size_t n_row, void *room)
{
    uint8_t *blocks = malloc(n_row * TCQ_TEST_IN / TCQ_LEN * chosen->type->block_bytes);
    tcq_encode(chosen, x, blocks, n_row, TCQ_TEST_IN, room);
    return blocks;
}

/* The sum of squared errors, weighted. */
static double tcq_error(const moe_quant *type, const float *x, const uint8_t *blocks,
                        const float *importance)
{
    double sum = 0;
    float row[TCQ_TEST_IN];
    for (size_t i = 0; i < TCQ_TEST_N; i++) {
        const size_t k = i % TCQ_TEST_IN;
        if (k == 0)
            type->dequantize(blocks + i / TCQ_LEN * type->block_bytes, row, TCQ_TEST_IN);
        const double error = (double)x[i] - (double)row[k];
        sum += error * error * (importance ? importance[k] : 1);
    }
    return sum;
}

/* The entropy of the bytes of all fields as they are in planes, per weight. */
static double tcq_entropy(const moe_quant *type, const uint8_t *blocks)
{
    static uint8_t plane[TCQ_TEST_N];
    double bits = 0;
    for (size_t f = 0, at = 0; type->fields[f]; at += type->fields[f++]) {
        uint32_t counts[256] = {0};
        const size_t width = type->fields[f], n = TCQ_TEST_N / TCQ_LEN * width;
        for (size_t i = 0; i < n; i++)
            plane[i] = blocks[i / width * type->block_bytes + at + i % width];
        for (size_t i = 0; type->to_plane && !type->fields[f + 1] && i < n; i += n / TCQ_TEST_ROW)
            CHECK(type->to_plane(plane + i, n / TCQ_TEST_ROW), "%s: not a path", type->name);
        for (size_t i = 0; i < n; i++)
            counts[plane[i]]++;
        for (size_t i = 0; i < 256; i++)
            if (counts[i])
                bits -= counts[i] * log2((double)counts[i] / (double)n);
    }
    return bits / TCQ_TEST_N;
}

/* Of all rates: the entropy of the bytes is the rate (few bytes look a little more orderly than
 * many), and the error is less than a uniform step would leave, which needs a quarter of a bit more
 * than the least possible, 2^(-2 rate) of the weights' squares. The same with every search. */
static void trellis_keeps_to_the_rate(void)
{
    float *x = malloc(TCQ_TEST_N * sizeof *x);
    void *room = malloc(tcq_room_bytes(TCQ_TEST_IN));
    encode_fill(x, TCQ_TEST_N, DATA_NORMAL);
    double square = 0;
    for (size_t i = 0; i < TCQ_TEST_N; i++)
        square += (double)x[i] * (double)x[i];
    for (double rate = 1.5; rate <= 6; rate += 0.7) {
        tcq_plan chosen;
        const moe_quant *type = tcq_type(rate);
        const size_t row_bytes = TCQ_TEST_IN / TCQ_LEN * type->block_bytes;
        tcq_plan_make(&chosen, type, rate, x, NULL, TCQ_TEST_ROW, TCQ_TEST_IN, room);
        uint8_t *blocks = tcq_blocks(&chosen, x, TCQ_TEST_ROW, room);
        const double bits = tcq_entropy(type, blocks);
        const double least = -0.5 * log2(tcq_error(type, x, blocks, NULL) / square);
        CHECK(fabs(bits - rate) < 0.08, "%s at %g: %g bits", type->name, rate, bits);
        CHECK(rate - least < 0.18, "%s at %g: error of %g bits", type->name, rate, least);
        uint8_t *row = tcq_blocks(&chosen, x + TCQ_TEST_N - TCQ_TEST_IN, 1, room);
        CHECK(!memcmp(row, blocks + (TCQ_TEST_ROW - 1) * row_bytes, row_bytes), "a row alone");
        chosen.search = tcq_search_c;
        uint8_t *plain = tcq_blocks(&chosen, x, TCQ_TEST_ROW, room);
        CHECK(!memcmp(plain, blocks, TCQ_TEST_ROW * row_bytes), "%s at %g: plain C", type->name,
              rate);
        free(blocks);
        free(row);
        free(plain);
    }
    free(x);
    free(room);
}

/* Outliers, zeros, tiny and huge weights: nothing is far off. */
static void trellis_takes_odd_weights(void)
{
    float *x = malloc(TCQ_TEST_N * sizeof *x), row[TCQ_TEST_IN];
    void *room = malloc(tcq_room_bytes(TCQ_TEST_IN));
    for (encode_data kind = 0; kind < N_DATA; kind++)
        for (size_t f = 0; f < MOE_COUNT(tcq_formats); f++) {
            tcq_plan chosen;
            const moe_quant *type = quant_by_id(tcq_formats[f].id);
            encode_fill(x, TCQ_TEST_N, kind);
            for (size_t i = 0; i < TCQ_TEST_N; i++)
                x[i] = fminf(fmaxf(x[i], -65504), 65504);
            tcq_plan_make(&chosen, type, 0, x, NULL, TCQ_TEST_ROW, TCQ_TEST_IN, room);
            uint8_t *blocks = tcq_blocks(&chosen, x, TCQ_TEST_ROW, room);
            for (size_t r = 0; r < TCQ_TEST_ROW; r++) {
                const float *want = x + r * TCQ_TEST_IN;
                type->dequantize(blocks + r * TCQ_TEST_IN / TCQ_LEN * type->block_bytes, row,
                                 TCQ_TEST_IN);
                for (size_t k = 0; k < TCQ_TEST_IN; k++) {
                    const float d =
                        f32_of_f16(load_u16(blocks + (r * TCQ_TEST_IN + k) / TCQ_LEN *
                                                         type->block_bytes));
                    CHECK(fabsf(row[k] - want[k]) <= 8 * d, "%s, kind %d: %g becomes %g, step %g",
                          type->name, (int)kind, (double)want[k], (double)row[k], (double)d);
                }
            }
            free(blocks);
        }
    free(x);
    free(room);
}

/* The same for the trellis-coded types: without and with importance, and at a rate that is asked
 * for. */
static void trellis_bytes_are_the_recorded_ones(void)
{
    static const struct { const char *name; double rate; uint64_t hash[3]; } recorded[] = {
        {"TCQ4", 2.2, {0x264a1e5c5f192585, 0xde5024b3016006f7, 0x38ccc36716b0a3b4}},
        {"TCQ5", 3.7, {0x9f2e8c254e387eca, 0x8840e6e94d409988, 0x229ce97701415f89}},
        {"TCQ8", 5.1, {0xae1af70da1c5e60b, 0x44e576b081d2b29a, 0xf3fbe7f2e52fae93}},
    };
    void *room = malloc(tcq_room_bytes(RECORDED_IN));
    fill_recorded();
    for (size_t f = 0; f < MOE_COUNT(recorded); f++) {
        const moe_quant *type = quant_by_name(recorded[f].name);
        const size_t bytes = blocks_bytes(type, MOE_COUNT(recorded_x));
        uint64_t hash[3];
        uint8_t *blocks = malloc(bytes);
        for (int kind = 0; kind < 3; kind++) {
            tcq_plan chosen;
            tcq_plan_make(&chosen, type, kind == 2 ? recorded[f].rate : 0, recorded_x,
                          kind == 1 ? recorded_w : NULL, RECORDED_ROW, RECORDED_IN, room);
            tcq_encode(&chosen, recorded_x, blocks, RECORDED_ROW, RECORDED_IN, room);
            hash[kind] = bytes_hash(blocks, bytes);
        }
        CHECK(!memcmp(recorded[f].hash, hash, sizeof hash),
              "{\"%s\", %g, {0x%016llx, 0x%016llx, 0x%016llx}},", type->name, recorded[f].rate,
              (unsigned long long)hash[0], (unsigned long long)hash[1],
              (unsigned long long)hash[2]);
        free(blocks);
    }
    free(room);
}

static void importance_guides_the_trellis(void)
{
    float *x = malloc(TCQ_TEST_N * sizeof *x), importance[TCQ_TEST_IN];
    void *room = malloc(tcq_room_bytes(TCQ_TEST_IN));
    encode_fill(x, TCQ_TEST_N, DATA_NORMAL);
    for (size_t k = 0; k < TCQ_TEST_IN; k++)
        importance[k] = k % 7 ? 1.0f : 20.0f;
    for (size_t f = 0; f < MOE_COUNT(tcq_formats); f++) {
        const moe_quant *type = quant_by_id(tcq_formats[f].id);
        double error[2];
        for (int with = 0; with < 2; with++) {
            tcq_plan chosen;
            tcq_plan_make(&chosen, type, 0, x, with ? importance : NULL, TCQ_TEST_ROW, TCQ_TEST_IN,
                          room);
            uint8_t *blocks = tcq_blocks(&chosen, x, TCQ_TEST_ROW, room);
            error[with] = tcq_error(type, x, blocks, importance);
            free(blocks);
        }
        CHECK(error[1] < error[0] * 0.97, "%s: %g, without %g", type->name, error[1], error[0]);
    }
    free(x);
    free(room);
}

TEST_PROGRAM(encode)
{
    RUN(vectors_give_the_bytes_of_plain_c);
    RUN(cutting_rows_changes_nothing);
    RUN(error_is_below_the_reference);
    RUN(error_is_never_far_above_the_reference);
    RUN(importance_lowers_the_weighted_error);
    RUN(what_fits_is_exact);
    RUN(bytes_are_the_recorded_ones);
    RUN(inputs_are_the_same_floats);
    RUN(unusable_numbers_are_found_anywhere);
    RUN(trellis_keeps_to_the_rate);
    RUN(trellis_takes_odd_weights);
    RUN(trellis_bytes_are_the_recorded_ones);
    RUN(importance_guides_the_trellis);
}
