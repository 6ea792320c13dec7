/* bench/seam.c - what the seam between model and backend costs in decode.
 *
 *     seam [MODEL]        default: smollm2.gguf in the folder where `make models` keeps it
 *
 * A forward pass is recorded as operations, then run. This measures one token both ways: as it is,
 * and with a backend that records everything and runs nothing; the second is the whole cost of
 * layers that never touch the data. Medians of alternating runs, one thread. */
#include "../tests/test.h"

enum { N_RUNS = 15, N_TOKENS = 32 };

static moe_backend recorder; // the CPU backend, but what is recorded is thrown away

static moe_status discard(moe_queue *q, moe_error *error)
{
    (void)error;
    q->n_op = q->n_phase = 0;
    return MOE_OK;
}

static moe_status discard_write(moe_queue *q, moe_view dst, const void *src, uint64_t bytes)
{
    memcpy(dst.buffer->data + dst.offset, src, (size_t)bytes);
    (void)q;
    return MOE_OK;
}

static moe_status discard_read(moe_queue *q, moe_view src, void *dst, uint64_t bytes,
                               moe_error *error)
{
    (void)src;
    memset(dst, 0, (size_t)bytes);
    return discard(q, error);
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Microseconds per token of N_TOKENS single-token steps. */
static double decode_us(moe_session *s, float *logits)
{
    const moe_token token = 1;
    moe_session_rewind(s, 0);
    const uint64_t start = plat_time_ns();
    for (int i = 0; i < N_TOKENS; i++)
        if (moe_session_eval(s, &token, 1, 1, logits))
            return 0;
    return (double)(plat_time_ns() - start) * 1e-3 / N_TOKENS;
}

static moe_session *open_session(const char *path, const moe_backend *backend, moe_model **model)
{
    moe_model_options mo;
    moe_session_options so;
    moe_session *s = NULL;
    moe_error error = {0};
    moe_model_options_init(&mo);
    moe_session_options_init(&so);
    mo.path = path;
    mo.backend = backend;
    so.n_threads = 1;
    so.n_ctx = 64;
    if (moe_model_open(model, &mo, &error) || moe_session_open(&s, *model, &so, &error))
        fprintf(stderr, "seam: %s\n", error.message);
    return s;
}

int main(int argc, char **argv)
{
    char path[1024];
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    snprintf(path, sizeof path, "%s%s/moe/models/smollm2.gguf", cache ? cache : home ? home : ".",
             cache ? "" : "/.cache");
    recorder = *backend_cpu();
    recorder.submit = discard;
    recorder.write = discard_write;
    recorder.read = discard_read;
    moe_model *model[2] = {NULL, NULL};
    const char *file = argc > 1 ? argv[1] : path;
    if (access(file, R_OK)) {
        printf("seam: no model at %s; run `make models` or name one\n", file);
        return 0;
    }
    moe_session *run = open_session(file, NULL, &model[0]);
    moe_session *record = open_session(file, &recorder, &model[1]);
    if (!run || !record)
        return 1;
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model[0], &info);
    float *logits = malloc(info.n_vocab * sizeof *logits);
    double with[N_RUNS], without[N_RUNS];
    for (int i = 0; logits && i < N_RUNS; i++) {
        with[i] = decode_us(run, logits);
        without[i] = decode_us(record, logits);
    }
    qsort(with, N_RUNS, sizeof *with, compare);
    qsort(without, N_RUNS, sizeof *without, compare);
    printf("decode, 1 thread     %9.1f us per token\n", with[N_RUNS / 2]);
    printf("recording alone      %9.1f us per token, %.2f %%\n", without[N_RUNS / 2],
           100 * without[N_RUNS / 2] / with[N_RUNS / 2]);
    free(logits);
    moe_session_close(run);
    moe_session_close(record);
    moe_model_close(model[0]);
    moe_model_close(model[1]);
    return 0;
}
