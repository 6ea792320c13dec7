/* bench/tcq.c - what the trellis-coded types give: bytes on disk at equal squared error, against
 * the K-quants, and the speed of their encoder.
 *
 *     tcq [FILE.gguf]
 *
 * Weights are Gaussian, or the matrices of a file, each with a plan of its own. For each K-quant,
 * as moe-convert makes it: its bits per weight as it is and as planes in a .moe file, and its
 * error; then the bits per weight in a .moe file, with all that belongs to them, of the
 * trellis-coded type that has the same error. */
#include "../tests/test.h"

#include "../convert/convert.c"

#include <time.h>

enum { MAX_MATRICES = 32 };

typedef struct matrix {
    float *w; // [n_row][n_in]
    size_t n_row, n_in;
} matrix;

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *alloc(size_t bytes)
{
    void *p = malloc(bytes);
    if (!p) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* ------------------------------------------------------------------------------ measuring -- */

/* Of all matrices. */
typedef struct result {
    double error, square; // sums
    double bits;          // on disk, per weight
    double seconds;       // of encoding
} result;

/* Adds the size of the matrix's planes, and its error. */
static void add(result *r, const matrix *m, const moe_quant *type, const uint8_t *blocks)
{
    moe_mem mem;
    moe_error error;
    mem_init(&mem, NULL, 0);
    planes_packer *p = planes_open(&mem);
    const size_t per_row = m->n_in / type->block_len, row_bytes = per_row * type->block_bytes;
    const size_t most = MOEFILE_SEGMENT_BYTES / row_bytes;
    for (size_t i = 0; p && i < m->n_row; i += most) {
        const moefile_blocks some = {type, MOE_MIN(most, m->n_row - i) * per_row, per_row};
        if (planes_pack(p, &some, blocks + i * row_bytes, "bench", &error)) {
            fprintf(stderr, "%s\n", error.message);
            exit(1);
        }
    }
    r->bits += 8.0 * (double)p->out.n;
    float *back = alloc(m->n_in * sizeof *back);
    for (size_t i = 0; i < m->n_row; i++) {
        type->dequantize(blocks + i * row_bytes, back, m->n_in);
        for (size_t k = 0; k < m->n_in; k++) {
            const double w = m->w[i * m->n_in + k], d = w - back[k];
            r->error += d * d;
            r->square += w * w;
        }
    }
    free(back);
    planes_close(p);
}

/* All matrices in one type; bits: of a trellis-coded one, 0 for others. */
static result measure(const matrix *m, size_t n, const moe_quant *type, double bits)
{
    result r = {0};
    size_t n_weights = 0;
    for (size_t i = 0; i < n; i++) {
        const size_t n_in = m[i].n_in, n_row = m[i].n_row;
        uint8_t *blocks = alloc(n_row * n_in / type->block_len * type->block_bytes);
        n_weights += n_row * n_in;
        if (tcq_is(type)) {
            void *room = alloc(tcq_room_bytes(n_in));
            const size_t n_sample = MOE_MIN(n_row, MOE_MAX(TCQ_SAMPLE / n_in, 1));
            float *sample = alloc(n_sample * n_in * sizeof *sample);
            for (size_t s = 0; s < n_sample; s++)
                memcpy(sample + s * n_in, m[i].w + s * n_row / n_sample * n_in,
                       n_in * sizeof *sample);
            tcq_plan made;
            tcq_plan_make(&made, type, bits, sample, NULL, n_sample, n_in, room);
            const double start = seconds();
            tcq_encode(&made, m[i].w, blocks, n_row, n_in, room);
            r.seconds += seconds() - start;
            free(sample);
            free(room);
        } else {
            const double start = seconds();
            encoder_for(type)(m[i].w, NULL, blocks, n_row, n_in);
            r.seconds += seconds() - start;
        }
        add(&r, &m[i], type, blocks);
        free(blocks);
    }
    r.bits /= (double)n_weights;
    r.seconds /= (double)n_weights;
    return r;
}

/* Bits on disk at which the error would be `error`: a bit is a factor of 4. */
static result equal_error(const matrix *m, size_t n, double error, double bits,
                          const moe_quant **type)
{
    result r = {0};
    for (int i = 0; i < 3; i++) {
        *type = tcq_type(bits);
        r = measure(m, n, *type, bits);
        bits += log2(r.error / error) / 2;
    }
    r.bits += log2(r.error / error) / 2;
    return r;
}

static void table(const char *title, const matrix *m, size_t n)
{
    static const struct { const char *name; double bits; } peers[] = {
        {"Q2_K", 2.1}, {"Q3_K", 2.9}, {"Q4_K", 3.95}, {"Q5_K", 4.9}, {"Q6_K", 5.95}};
    printf("%s\n%-7s %7s %7s %10s   %-5s %7s %8s %8s   M weights/s\n", title, "type", "bits",
           "planes", "error", "same", "bits", "/bits", "/planes");
    for (size_t i = 0; i < MOE_COUNT(peers); i++) {
        const moe_quant *peer = quant_by_name(peers[i].name), *type = NULL;
        const result a = measure(m, n, peer, 0);
        const result b = equal_error(m, n, a.error, peers[i].bits, &type);
        printf("%-7s %7.4f %7.4f %10.3e   %-5s %7.4f %+7.2f%% %+7.2f%%   %.1f\n", peer->name,
               peer->bits, a.bits, a.error / a.square, type->name, b.bits,
               100 * (b.bits / peer->bits - 1), 100 * (b.bits / a.bits - 1), 1e-6 / b.seconds);
        fflush(stdout);
    }
}

/* ------------------------------------------------------------------------------- weights -- */

static float gaussian(void)
{
    const double u = ((double)test_random() + 1) * 0x1p-32, v = (double)test_random() * 0x1p-32;
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static matrix gaussian_matrix(size_t n_row, size_t n_in)
{
    matrix m = {alloc(n_row * n_in * sizeof(float)), n_row, n_in};
    for (size_t i = 0; i < n_row * n_in; i++)
        m.w[i] = gaussian() * 0.02f;
    return m;
}

/* The matrices of a file whose rows all types can hold; of larger ones the first rows. */
static size_t file_matrices(const char *path, matrix m[MAX_MATRICES])
{
    enum { MAX_WEIGHTS = 1 << 22 };
    moe_mem mem;
    moe_error error;
    moe_directory *dir = NULL;
    mem_init(&mem, NULL, 0);
    if (directory_open_file(&dir, path, &mem, &error)) {
        fprintf(stderr, "%s\n", error.message);
        exit(1);
    }
    size_t n = 0;
    for (size_t i = 0; i < directory_n_tensors(dir) && n < MAX_MATRICES; i++) {
        const moe_tensor *t = directory_tensor_at(dir, i);
        const size_t n_in = (size_t)t->dims[0];
        if (t->n_dims != 2 || n_in % 256 || t->dims[1] < 64)
            continue;
        const size_t n_row = MOE_MIN((size_t)t->dims[1], MAX_WEIGHTS / n_in);
        m[n] = (matrix){alloc(n_row * n_in * sizeof(float)), n_row, n_in};
        for (size_t r = 0; r < n_row; r++)
            t->quant->dequantize(t->data + r * (n_in / t->quant->block_len) * t->quant->block_bytes,
                                 m[n].w + r * n_in, n_in);
        n++;
    }
    directory_close(dir);
    return n;
}

int main(int argc, char **argv)
{
    matrix m[MAX_MATRICES];
    if (argc > 2 || (argc == 2 && argv[1][0] == '-')) {
        fprintf(stderr, "usage: tcq [FILE.gguf]\n");
        return 2;
    }
    const size_t n = argc == 2 ? file_matrices(argv[1], m) : 1;
    if (argc == 1)
        m[0] = gaussian_matrix(512, 4096);
    table(argc == 2 ? argv[1] : "Gaussian, 512 rows of 4096", m, n);
    for (size_t i = 0; i < n; i++)
        free(m[i].w);
    return 0;
}
