/* tests/test_observe.c - what an observer is shown is what is computed, and looking changes
 * nothing; what the converter makes of such figures: importance in every quantizer, types that fit
 * a size. */
#include "test.h"

#include "fenced_backend.h"
#include "models.h"
#include "scratch.h"

enum { N_SEEN_TOK = 7, MAX_TENSORS = 1024, MAX_ROWS = 1 << 16 };

/* All that was seen of one tensor. */
typedef struct seen_tensor {
    char name[96];
    uint32_t n_in, n_matrix;
    uint64_t n_product, hash; // of every product's row and matrix, in order
} seen_tensor;

/* The inputs of one tensor, for a closer look. */
typedef struct seen_rows {
    const char *tensor;
    uint32_t n, n_in;
    float *rows;        // [n][n_in]
    int32_t matrix[MAX_ROWS / 16];
} seen_rows;

typedef struct all_seen {
    seen_tensor tensors[MAX_TENSORS];
    uint32_t n_tensor;
    uint64_t route_hash, n_route;
    seen_rows close[4];
    moe_cancel *cancel_at_route;
    int32_t ids[1024];
    float weights[1024];
    uint32_t n_ids;
} all_seen;

static uint64_t hash_seen(uint64_t hash, const void *data, size_t bytes)
{
    for (const uint8_t *p = data; bytes--; p++)
        hash = (hash ^ *p) * 1099511628211u;
    return hash;
}

static seen_tensor *seen_find(all_seen *s, const char *name)
{
    for (uint32_t i = 0; i < s->n_tensor; i++)
        if (!strcmp(s->tensors[i].name, name))
            return &s->tensors[i];
    if (s->n_tensor == MAX_TENSORS)
        return NULL;
    seen_tensor *t = &s->tensors[s->n_tensor++];
    *t = (seen_tensor){.hash = 1469598103934665603u};
    snprintf(t->name, sizeof t->name, "%s", name);
    return t;
}

static void see_input(void *user, const moe_observed_input *in)
{
    all_seen *s = user;
    seen_tensor *t = seen_find(s, in->tensor);
    REQUIRE(t && in->size == sizeof *in, "too many tensors");
    t->n_in = in->n_in;
    t->n_matrix = in->n_matrix;
    for (uint32_t i = 0; i < in->n_product; i++) {
        const float *row = in->rows + (size_t)(i / in->n_per_row) * in->row_stride;
        CHECK(in->matrix[i] >= 0 && (uint32_t)in->matrix[i] < in->n_matrix, "%s: matrix %d",
              in->tensor, in->matrix[i]);
        t->hash = hash_seen(t->hash, row, in->n_in * sizeof *row);
        t->hash = hash_seen(t->hash, &in->matrix[i], sizeof in->matrix[i]);
        t->n_product++;
        for (size_t k = 0; k < MOE_COUNT(s->close); k++) {
            seen_rows *c = &s->close[k];
            if (!c->tensor || strcmp(c->tensor, in->tensor))
                continue;
            c->n_in = in->n_in;
            if (!c->rows)
                c->rows = malloc(MAX_ROWS * sizeof *c->rows);
            REQUIRE(c->rows && (c->n + 1) * in->n_in <= MAX_ROWS && c->n < MAX_ROWS / 16, "room");
            memcpy(c->rows + (size_t)c->n * in->n_in, row, in->n_in * sizeof *row);
            c->matrix[c->n++] = in->matrix[i];
        }
    }
}

static void see_experts(void *user, const moe_observed_experts *e)
{
    all_seen *s = user;
    const size_t n = (size_t)e->n_tok * e->n_used;
    for (uint32_t t = 0; t < e->n_tok; t++) { // by token, so that batches do not show
        const uint32_t at[2] = {e->layer, e->pos + t};
        uint64_t hash = hash_seen(1, at, sizeof at);
        hash = hash_seen(hash, e->ids + t * e->n_used, e->n_used * sizeof *e->ids);
        s->route_hash += hash_seen(hash, e->weights + t * e->n_used, e->n_used * sizeof(float));
    }
    s->n_route += e->n_tok;
    for (size_t i = 0; e->layer == 0 && i < n && s->n_ids < MOE_COUNT(s->ids); i++) {
        s->weights[s->n_ids] = e->weights[i];
        s->ids[s->n_ids++] = e->ids[i];
    }
    if (s->cancel_at_route)
        moe_cancel_set(s->cancel_at_route);
}

/* ---------------------------------------------------------------------------------- helpers -- */

static moe_model *open_observed(const char *file, const moe_backend *backend)
{
    char path[512];
    moe_model_options options;
    moe_model_options_init(&options);
    snprintf(path, sizeof path, "%s/fixtures/%s", test_root(), file);
    options.path = path;
    options.backend = backend;
    return open_model(&options);
}

/* Evaluates N_SEEN_TOK tokens in calls of `chunk`; all logits. `s` NULL: without an observer. */
static bool evaluate(moe_model *model, all_seen *s, uint32_t chunk, uint32_t n_threads,
                     float *logits)
{
    const moe_observer observer = {sizeof observer, s, see_experts, see_input};
    moe_session_options options;
    moe_session *session = NULL;
    moe_error error = {0};
    moe_session_options_init(&options);
    options.n_ctx = 16;
    options.n_batch = chunk;
    options.n_logits = chunk;
    options.n_threads = n_threads;
    options.observer = s ? &observer : NULL;
    moe_status status = moe_session_open(&session, model, &options, &error);
    for (uint32_t at = 0, n; !status && at < N_SEEN_TOK; at += n) {
        moe_token tokens[N_SEEN_TOK];
        n = MOE_MIN(chunk, N_SEEN_TOK - at);
        for (uint32_t i = 0; i < n; i++)
            tokens[i] = (moe_token)((at + i) * 11 + 3) % (moe_token)model->hp.n_vocab;
        status = moe_session_eval(session, tokens, n, n, logits + (size_t)at * model->hp.n_vocab);
        if (status)
            error = *moe_session_error(session);
    }
    CHECK(status == MOE_OK, "%s", error.message);
    moe_session_close(session);
    return status == MOE_OK;
}

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

/* Whether a forward pass multiplies with a tensor of the file. */
static bool is_matrix(const moe_model *model, const moe_tensor *t)
{
    unsigned layer;
    if (!strcmp(t->name, "token_embd.weight"))
        return !weight_present(&model->globals.output);
    if (sscanf(t->name, "blk.%u.", &layer) == 1 && layer >= model->hp.n_layer)
        return false; // of layers for drafting
    return (t->n_dims > 1 || ends_with(t->name, "ffn_gate_inp_shexp.weight")) &&
           ends_with(t->name, ".weight") && !ends_with(t->name, "shortconv.conv.weight") &&
           !ends_with(t->name, "ssm_conv1d.weight");
}

/* How many products N_SEEN_TOK tokens make with a tensor. */
static uint64_t products(const moe_model *model, const char *name)
{
    const bool heads = strstr(name, "attn_k_b") || strstr(name, "attn_v_b");
    return strstr(name, "_exps.") ? N_SEEN_TOK * model->hp.router.n_used
           : heads                ? N_SEEN_TOK * model->hp.n_head
                                  : N_SEEN_TOK;
}

static void check_complete(const moe_model *model, const char *file, all_seen *s)
{
    uint32_t n = 0;
    for (size_t i = 0; i < directory_n_tensors(model->dir); i++) {
        const moe_tensor *t = directory_tensor_at(model->dir, i);
        if (!is_matrix(model, t))
            continue;
        const seen_tensor *found = seen_find(s, t->name);
        n++;
        CHECK(found && found->n_product == products(model, t->name),
              "%s: %s: expected %llu products, got %llu", file, t->name,
              (unsigned long long)products(model, t->name),
              found ? (unsigned long long)found->n_product : 0);
        CHECK(found && found->n_in == t->dims[0] && found->n_matrix == t->dims[2],
              "%s: %s: another shape", file, t->name);
    }
    CHECK(s->n_tensor == n, "%s: %u tensors seen, %u in the file", file, s->n_tensor, n);
}

static void check_same_seen(const char *file, const char *what, const all_seen *a,
                            const all_seen *b)
{
    CHECK(a->n_tensor == b->n_tensor && a->route_hash == b->route_hash && a->n_route == b->n_route,
          "%s: %s: other tensors, or other experts", file, what);
    for (uint32_t i = 0; i < a->n_tensor && i < b->n_tensor; i++)
        CHECK(!strcmp(a->tensors[i].name, b->tensors[i].name) &&
              a->tensors[i].n_product == b->tensors[i].n_product &&
              a->tensors[i].hash == b->tensors[i].hash, "%s: %s: %s: other inputs", file, what,
              a->tensors[i].name);
}

static void check_fixture(const char *file)
{
    moe_model *model = open_observed(file, NULL), *fenced = open_observed(file, fenced_backend());
    all_seen *s = calloc(4, sizeof *s);
    if (model && fenced && s) {
        const size_t bytes = (size_t)N_SEEN_TOK * model->hp.n_vocab * sizeof(float);
        float *plain = malloc(bytes), *observed = malloc(bytes);
        if (plain && observed && evaluate(model, NULL, N_SEEN_TOK, 1, plain) &&
            evaluate(model, &s[0], N_SEEN_TOK, 1, observed)) {
            CHECK(!memcmp(plain, observed, bytes), "%s: other logits when observed", file);
            check_complete(model, file, &s[0]);
        }
        if (evaluate(model, &s[1], N_SEEN_TOK, 3, observed))
            check_same_seen(file, "3 threads", &s[0], &s[1]);
        if (evaluate(model, &s[2], 2, 2, observed))
            check_same_seen(file, "in parts", &s[0], &s[2]);
        if (evaluate(fenced, &s[3], N_SEEN_TOK, 1, observed))
            check_same_seen(file, "fenced", &s[0], &s[3]);
        CHECK(!memcmp(plain, observed, bytes), "%s: other logits when fenced", file);
        free(plain);
        free(observed);
    }
    free(s);
    moe_model_close(model);
    moe_model_close(fenced);
}

/* ------------------------------------------------------------------------------------ tests -- */

static void every_family_shows_every_matrix(void)
{
    char folder[512];
    snprintf(folder, sizeof folder, "%s/fixtures", test_root());
    DIR *dir = opendir(folder);
    REQUIRE(dir, "%s", folder);
    uint32_t n = 0;
    for (const struct dirent *entry; (entry = readdir(dir));)
        if (ends_with(entry->d_name, ".gguf")) {
            check_fixture(entry->d_name);
            n++;
        }
    closedir(dir);
    CHECK(n > 20, "only %u fixtures", n);
}

/* w[matrix][row] . x, in double precision. */
static double dot(const moe_tensor *w, uint64_t matrix, uint64_t row, const float *x)
{
    const uint64_t n = w->dims[0], first = (matrix * w->dims[1] + row) * n;
    float values[4096];
    double sum = 0;
    w->quant->dequantize(w->data + first / w->quant->block_len * w->quant->block_bytes, values,
                         (size_t)n);
    for (uint64_t i = 0; i < n; i++)
        sum += (double)values[i] * (double)x[i];
    return sum;
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

/* In a model of float weights: the second matrix's input is made from the first two's with the
 * experts that the observer was told, the experts are those with the best scores, and the output
 * matrix makes the logits out of its input. */
static void what_is_shown_is_what_is_computed(void)
{
    moe_model *model = open_observed("qwen3moe.gguf", NULL);
    all_seen *s = calloc(1, sizeof *s);
    REQUIRE(model && s, "no model");
    const moe_tensor *gate = directory_tensor(model->dir, "blk.0.ffn_gate_exps.weight");
    const moe_tensor *up = directory_tensor(model->dir, "blk.0.ffn_up_exps.weight");
    const moe_tensor *router = directory_tensor(model->dir, "blk.0.ffn_gate_inp.weight");
    const moe_tensor *output = directory_tensor(model->dir, "output.weight");
    REQUIRE(gate && up && router && output && gate->quant->block_len == 1, "not this fixture");
    const uint32_t n_used = model->hp.router.n_used, n_vocab = model->hp.n_vocab;
    float *logits = malloc((size_t)N_SEEN_TOK * n_vocab * sizeof *logits);
    s->close[0].tensor = gate->name;
    s->close[1].tensor = "blk.0.ffn_down_exps.weight";
    s->close[2].tensor = router->name;
    s->close[3].tensor = output->name;
    REQUIRE(logits && evaluate(model, s, 3, 2, logits), "evaluate");
    REQUIRE(s->close[0].n == N_SEEN_TOK * n_used && s->n_ids == N_SEEN_TOK * n_used, "%u products",
            s->n_ids);
    for (uint32_t i = 0; i < N_SEEN_TOK * n_used; i++) {
        const float *h = s->close[0].rows + (size_t)i * gate->dims[0];
        const float *a = s->close[1].rows + (size_t)i * gate->dims[1];
        const uint64_t e = (uint64_t)s->ids[i];
        CHECK(s->close[0].matrix[i] == s->ids[i] && s->close[1].matrix[i] == s->ids[i],
              "product %u: other experts", i);
        for (uint64_t k = 0; k < gate->dims[1]; k++) {
            const double want = silu(dot(gate, e, k, h)) * dot(up, e, k, h);
            CHECK(fabs(want - (double)a[k]) <= 1e-5 * (fabs(want) + 1),
                  "product %u, %u: %g, not %g", i, (unsigned)k, (double)a[k], want);
        }
    }
    for (uint32_t t = 0; t < N_SEEN_TOK; t++) {
        const float *h = s->close[2].rows + (size_t)t * router->dims[0];
        double sum = 0;
        for (uint32_t i = 0; i < n_used; i++)
            sum += (double)s->weights[t * n_used + i];
        CHECK(fabs(sum - 1) < 1e-5, "token %u: weights sum up to %g", t, sum);
        for (uint64_t e = 0, better = 0; e < router->dims[1]; e++, better = 0) {
            const double score = dot(router, 0, e, h);
            for (uint64_t o = 0; o < router->dims[1]; o++)
                better += dot(router, 0, o, h) > score;
            for (uint32_t i = 0; i < n_used; i++)
                CHECK((s->ids[t * n_used + i] == (int32_t)e) == (better == i),
                      "token %u: expert %u is not of rank %u", t, (unsigned)e, i);
        }
        for (uint32_t v = 0; v < n_vocab; v++) {
            const double want = dot(output, 0, v, s->close[3].rows + t * output->dims[0]);
            CHECK(fabs(want - (double)logits[t * n_vocab + v]) <= 1e-4 * (fabs(want) + 1),
                  "token %u: logit %u", t, v);
        }
    }
    for (size_t i = 0; i < MOE_COUNT(s->close); i++)
        free(s->close[i].rows);
    free(logits);
    free(s);
    moe_model_close(model);
}

/* Gemma's windows lose what a long way back needs; what is computed anew is not shown again. */
static void tokens_computed_anew_are_not_shown(void)
{
    moe_model *model = open_observed("gemma3.gguf", NULL);
    all_seen *s = calloc(1, sizeof *s);
    REQUIRE(model && s && model->hp.window, "no model with a window");
    const moe_observer observer = {.size = sizeof observer, .user = s, .input = see_input};
    moe_session_options options;
    moe_session *session = NULL;
    moe_token tokens[96];
    moe_session_options_init(&options);
    options.n_ctx = MOE_COUNT(tokens);
    options.n_batch = 4;
    options.observer = &observer;
    for (size_t i = 0; i < MOE_COUNT(tokens); i++)
        tokens[i] = (moe_token)(i * 7 + 2) % 64;
    REQUIRE(moe_session_open(&session, model, &options, NULL) == MOE_OK, "open");
    REQUIRE(moe_session_eval(session, tokens, 80, 0, NULL) == MOE_OK, "eval");
    CHECK(session->held_from > 20, "the caches hold all: the test tests nothing");
    REQUIRE(moe_session_rewind(session, 30) == MOE_OK, "rewind");
    REQUIRE(moe_session_eval(session, tokens, 2, 0, NULL) == MOE_OK, "eval");
    const seen_tensor *t = seen_find(s, "blk.0.ffn_down.weight");
    CHECK(t && t->n_product == 82, "%llu tokens shown, not 82",
          t ? (unsigned long long)t->n_product : 0);
    moe_session_close(session);
    free(s);
    moe_model_close(model);
}

static void a_cancelled_look_is_an_error(void)
{
    moe_model *model = open_observed("olmoe.gguf", NULL);
    all_seen *s = calloc(1, sizeof *s);
    moe_cancel cancel = {0};
    REQUIRE(model && s, "no model");
    const moe_observer observer = {sizeof observer, s, see_experts, see_input};
    moe_session_options options;
    moe_session *session = NULL;
    const moe_token tokens[3] = {1, 2, 3};
    moe_session_options_init(&options);
    options.n_ctx = 16;
    options.cancel = &cancel;
    options.observer = &observer;
    REQUIRE(moe_session_open(&session, model, &options, NULL) == MOE_OK, "open");
    s->cancel_at_route = &cancel;
    CHECK(moe_session_eval(session, tokens, 3, 0, NULL) == MOE_ERR_CANCELLED, "not cancelled");
    CHECK(s->n_route == 3, "%llu tokens shown after it", (unsigned long long)s->n_route);
    CHECK(moe_session_length(session) == 0, "length %u", moe_session_length(session));
    CHECK(moe_session_error(session)->status == MOE_ERR_CANCELLED, "no error");
    moe_cancel_clear(&cancel);
    s->cancel_at_route = NULL;
    CHECK(moe_session_eval(session, tokens, 3, 0, NULL) == MOE_OK, "cannot go on");
    CHECK(moe_session_length(session) == 3, "length %u", moe_session_length(session));
    moe_session_close(session);
    free(s);
    moe_model_close(model);
}

static void options_of_observers(void)
{
    moe_model *model = open_observed("qwen3moe.gguf", NULL);
    REQUIRE(model, "no model");
    moe_observer observer;
    moe_session_options options;
    moe_session *session = NULL;
    moe_error error = {0};
    moe_memory_estimate with = {.size = sizeof with}, without = with;
    moe_observer_init(&observer);
    CHECK(observer.size == sizeof observer && !observer.experts && !observer.input, "defaults");
    moe_session_options_init(&options);
    CHECK(!options.observer, "an observer by default");
    CHECK(moe_session_estimate(model, &options, &without, NULL) == MOE_OK, "estimate");
    options.observer = &observer;
    CHECK(moe_session_estimate(model, &options, &with, NULL) == MOE_OK, "estimate");
    CHECK(with.total_bytes > without.total_bytes, "the observer's memory is not in the estimate");
    const uint64_t before = atomic_load(&model->mem.used_bytes);
    CHECK(moe_session_open(&session, model, &options, NULL) == MOE_OK, "open");
    const uint64_t taken = atomic_load(&model->mem.used_bytes) - before;
    CHECK(taken <= with.total_bytes, "%llu bytes taken, %llu estimated", (unsigned long long)taken,
          (unsigned long long)with.total_bytes);
    CHECK(moe_session_eval(session, (moe_token[]){1}, 1, 0, NULL) == MOE_OK, "nothing to call");
    moe_session_close(session);
    CHECK(atomic_load(&model->mem.used_bytes) == before, "memory is lost");
    observer.size = 0;
    CHECK(moe_session_open(&session, model, &options, &error) == MOE_ERR_ARGUMENT &&
          !strcmp(error.subject, "observer"), "an observer of no size: %s", error.message);
    moe_model_close(model);
}

/* --------------------------------------------------------------- importance in moe-convert -- */

#if !defined MOE_NO_TEXT && !defined MOE_NO_ZSTD

#include "converter.h"

/* A GGUF file in the making. */
typedef struct made_file {
    uint8_t header[8192], data[1 << 20];
    size_t n_header, n_data;
    uint64_t n_tensor;
} made_file;

enum { N_IN = 256, N_OUT = 48, N_EXPERT = 5 };

static void made_put(made_file *m, const void *data, size_t bytes)
{
    memcpy(m->header + m->n_header, data, bytes);
    m->n_header += bytes;
}

static void made_text(made_file *m, const char *text)
{
    const uint64_t n = strlen(text);
    made_put(m, &n, sizeof n);
    made_put(m, text, (size_t)n);
}

static void made_key_u32(made_file *m, const char *key, uint32_t value)
{
    const uint32_t words[] = {META_U32, value};
    made_text(m, key);
    made_put(m, words, sizeof words);
}

/* A tensor of floats. */
static void made_tensor(made_file *m, const char *name, uint64_t n0, uint64_t n1, uint64_t n2,
                        const float *values)
{
    const uint64_t dims[3] = {n0, n1, n2}, offset = m->n_data;
    const uint32_t n_dims = n2 ? 3 : n1 ? 2 : 1, type = Q_F32;
    const size_t n = (size_t)(n0 * (n1 ? n1 : 1) * (n2 ? n2 : 1));
    made_text(m, name);
    made_put(m, &n_dims, sizeof n_dims);
    made_put(m, dims, n_dims * sizeof *dims);
    made_put(m, &type, sizeof type);
    made_put(m, &offset, sizeof offset);
    memcpy(m->data + m->n_data, values, n * sizeof *values);
    m->n_data = (size_t)align_up(m->n_data + n * sizeof *values, 32);
    m->n_tensor++;
}

static void made_write(const made_file *m, const char *path, uint64_t n_key)
{
    static const uint8_t zeros[32];
    const uint64_t counts[2] = {m->n_tensor, n_key};
    const uint32_t version = 3;
    FILE *f = fopen(path, "wb");
    REQUIRE(f, "%s", path);
    fwrite("GGUF", 1, 4, f);
    fwrite(&version, 1, 4, f);
    fwrite(counts, 1, 16, f);
    fwrite(m->header, 1, m->n_header, f);
    fwrite(zeros, 1, (size_t)(-(24 + m->n_header) % 32), f);
    fwrite(m->data, 1, m->n_data, f);
    CHECK(!fclose(f), "%s", path);
}

/* A stack of experts, a matrix, a norm. Expert 0 has large weights in its first columns. */
static float made_weights[N_EXPERT * N_OUT * N_IN];

static void make_source(const char *path)
{
    made_file *m = calloc(1, sizeof *m);
    REQUIRE(m, "memory");
    made_text(m, "general.architecture");
    made_put(m, (const uint32_t[]){META_STRING}, 4);
    made_text(m, "qwen3moe");
    made_key_u32(m, "qwen3moe.block_count", 1);
    made_key_u32(m, "qwen3moe.expert_count", N_EXPERT);
    for (size_t i = 0; i < MOE_COUNT(made_weights); i++)
        made_weights[i] = test_random_float();
    made_tensor(m, "blk.0.ffn_down_exps.weight", N_IN, N_OUT, N_EXPERT, made_weights);
    made_tensor(m, "blk.0.attn_q.weight", N_IN, N_OUT, 0, made_weights);
    made_tensor(m, "blk.0.attn_norm.weight", N_IN, 0, 0, made_weights);
    made_write(m, path, 3);
    free(m);
}

/* Sums in which expert e's columns from 8 e on count most; expert 4 was never used. */
static float made_sums[N_EXPERT * N_IN], made_counts[N_EXPERT];

static void make_imatrix(const char *path, const char *name, uint64_t n_in, uint64_t n_matrix)
{
    made_file *m = calloc(1, sizeof *m);
    REQUIRE(m, "memory");
    made_text(m, "general.type");
    made_put(m, (const uint32_t[]){META_STRING}, 4);
    made_text(m, "imatrix");
    char full[96];
    snprintf(full, sizeof full, "%s.in_sum2", name);
    made_tensor(m, full, n_in, n_matrix, 0, made_sums);
    snprintf(full, sizeof full, "%s.counts", name);
    made_tensor(m, full, 1, n_matrix, 0, made_counts);
    made_write(m, path, 1);
    free(m);
}

static void make_sums(void)
{
    for (uint32_t e = 0; e < N_EXPERT; e++) {
        made_counts[e] = e == 4 ? 0 : (float)(100 << 2 * e);
        for (uint32_t i = 0; i < N_IN; i++)
            made_sums[e * N_IN + i] = i / 8 == e ? 50 * made_counts[e] : made_counts[e];
    }
}

/* What expert e's columns weigh: the unused one's are the mean of all. */
static void expected_columns(uint32_t e, float *columns)
{
    double sum[N_IN] = {0}, mean = 0;
    for (uint32_t k = 0; k < N_EXPERT; k++)
        for (uint32_t i = 0; i < N_IN && (k == e || e == 4); i++)
            sum[i] += (double)made_sums[k * N_IN + i];
    for (uint32_t i = 0; i < N_IN; i++)
        mean += sum[i] / N_IN;
    for (uint32_t i = 0; i < N_IN; i++)
        columns[i] = (float)(sum[i] / mean);
}

/* Each expert is quantized with its own columns, a matrix that the file lacks with none. */
static void importance_reaches_the_quantizers(void)
{
    const char *source = scratch_path("source.gguf"), *out = scratch_path("out.gguf");
    moe_error error;
    make_source(source);
    make_sums();
    make_imatrix(scratch_path("a.imatrix"), "blk.0.ffn_down_exps.weight", N_IN, N_EXPERT);
    for (size_t q = 0; q < MOE_COUNT(quant_table); q++) {
        const moe_quant *quant = quant_table[q];
        if (quant->block_len == 1 || N_IN % quant->block_len || quant->given || quant->id >= 64)
            continue;
        const conv_options o = {.source = source, .out = out, .quant = quant->name,
                                .imatrix = scratch_path("a.imatrix"), .n_threads = 2};
        REQUIRE(convert_with(&o, &error) == MOE_OK, "%s: %s", quant->name, error.message);
        size_t bytes;
        char *data = test_read_file(out, &bytes);
        REQUIRE(data, "no file");
        const size_t matrix = N_OUT * (N_IN / quant->block_len) * quant->block_bytes;
        uint8_t *want = malloc(matrix);
        double better = 0, worse = 0;
        for (uint32_t e = 0; e <= N_EXPERT && want; e++) { // the last: attn_q
            const float *x = made_weights + (e % N_EXPERT) * N_OUT * N_IN;
            float columns[N_IN];
            expected_columns(e, columns);
            encoder_for(quant)(x, e < N_EXPERT ? columns : NULL, want, N_OUT, N_IN);
            bool found = false;
            for (size_t at = 0; at + matrix <= bytes && !found; at += 2)
                found = !memcmp(data + at, want, matrix);
            CHECK(found, "%s: matrix %u is not what the encoder makes of it", quant->name, e);
            if (e < N_EXPERT) {
                float back[N_IN];
                uint8_t *plain = malloc(matrix);
                encoder_for(quant)(x, NULL, plain, N_OUT, N_IN);
                for (uint32_t r = 0; r < 2 * N_OUT; r++) {
                    const uint8_t *row = (r < N_OUT ? want : plain) + r % N_OUT * (matrix / N_OUT);
                    quant->dequantize(row, back, N_IN);
                    for (uint32_t i = 0; i < N_IN; i++) {
                        const double d = (double)back[i] - (double)x[r % N_OUT * N_IN + i];
                        *(r < N_OUT ? &better : &worse) += (double)columns[i] * d * d;
                    }
                }
                free(plain);
            }
        }
        CHECK(better <= worse, "%s: the weighted error grows from %g to %g", quant->name, worse,
              better);
        free(want);
        free(data);
    }
}

static void imatrix_fails(const char *name, uint64_t n_in, uint64_t n_matrix, moe_status want,
                          const char *message)
{
    moe_error error;
    make_imatrix(scratch_path("bad.imatrix"), name, n_in, n_matrix);
    const conv_options o = {.source = scratch_path("source.gguf"), .out = scratch_path("bad.gguf"),
                            .quant = "q4_0", .imatrix = scratch_path("bad.imatrix")};
    const moe_status status = convert_with(&o, &error);
    CHECK(status == want && strstr(error.message, message), "%s: expected %s, got %s: %s", message,
          moe_status_name(want), moe_status_name(status), error.message);
    CHECK(access(scratch_path("bad.gguf"), F_OK), "%s: a file was written", message);
}

static void imatrices_that_do_not_fit(void)
{
    static const char stack[] = "blk.0.ffn_down_exps.weight";
    make_source(scratch_path("source.gguf"));
    make_sums();
    imatrix_fails(stack, N_IN / 2, N_EXPERT, MOE_ERR_MODEL, "another model");
    imatrix_fails(stack, N_IN, N_EXPERT - 1, MOE_ERR_MODEL, "another model");
    imatrix_fails("blk.7.attn_q.weight", N_IN, 1, MOE_ERR_MODEL, "none of its");
    made_sums[70] = NAN;
    imatrix_fails(stack, N_IN, N_EXPERT, MOE_ERR_FORMAT, "at least 0");
    made_sums[70] = INFINITY;
    imatrix_fails(stack, N_IN, N_EXPERT, MOE_ERR_FORMAT, "at least 0");
    made_sums[70] = 1;
    made_counts[2] = -1;
    imatrix_fails(stack, N_IN, N_EXPERT, MOE_ERR_FORMAT, "at least 0");
    make_sums();
    memset(made_sums, 0, sizeof made_sums); // nothing known: as if there were no file
    make_imatrix(scratch_path("zero.imatrix"), stack, N_IN, N_EXPERT);
    moe_error error;
    conv_options o = {.source = scratch_path("source.gguf"), .out = scratch_path("zero.gguf"),
                      .quant = "q4_0", .imatrix = scratch_path("zero.imatrix")};
    CHECK(convert_with(&o, &error) == MOE_OK, "%s", error.message);
    o.out = scratch_path("none.gguf");
    o.imatrix = NULL;
    CHECK(convert_with(&o, &error) == MOE_OK, "%s", error.message);
    size_t n[2];
    char *a = test_read_file(scratch_path("zero.gguf"), &n[0]);
    char *b = test_read_file(o.out, &n[1]);
    CHECK(a && b && n[0] == n[1] && !memcmp(a, b, n[0]), "sums of 0 change the file");
    free(a);
    free(b);
}

/* ------------------------------------------------------------------------- --bpw, --size -- */

/* Converts to a size and returns the job's figures; the types stay readable until conv_close. */
static bool allocate(conv_job *job, const char *out, double bits, uint64_t bytes, bool imatrix,
                     uint32_t n_threads)
{
    moe_error error = {0};
    const conv_options o = {.source = scratch_path("source.gguf"), .out = out,
                            .bits_per_weight = bits, .max_bytes = bytes, .n_threads = n_threads,
                            .imatrix = imatrix ? scratch_path("a.imatrix") : NULL};
    const moe_status status = conv_run(job, &o, &error);
    CHECK(status == MOE_OK, "%s: %s", out, error.message);
    return status == MOE_OK;
}

static void types_fit_the_size(void)
{
    conv_job job;
    double last = 0;
    make_source(scratch_path("source.gguf"));
    make_sums();
    make_imatrix(scratch_path("a.imatrix"), "blk.0.ffn_down_exps.weight", N_IN, N_EXPERT);
    for (int moe = 0; moe < 2; moe++) {
        char out[300];
        snprintf(out, sizeof out, "%s", scratch_path(moe ? "fit.moe" : "fit.gguf"));
        for (double bits = moe ? 3.8 : 2.8; bits < 9; bits += moe ? 1.51 : 0.73) {
            if (!allocate(&job, out, bits, 0, true, 2))
                return conv_close(&job);
            uint64_t used = moe ? job.file_bytes - job.header_bytes : 0;
            for (size_t i = 0; i < job.source.n_tensors && !moe; i++)
                used += job.source.tensors[i].bytes;
            const double got = 8.0 * (double)used / (double)job.n_weights;
            CHECK(got <= bits, "%s: %.3f bits asked for, got %.3f", out, bits, got);
            const double step = moe ? 0.9 : 1.7; // the padding of two records; from Q6_K to Q8_0
            CHECK(bits > 8.5 || got > bits - step, "%s: %.3f bits asked for, only %.3f used", out,
                  bits, got);
            const conv_tensor *stack = &job.source.tensors[0];
            const moe_quant *rare = conv_part_type(stack, 0), *often = conv_part_type(stack, 3);
            CHECK(rare->block_bytes * often->block_len <= often->block_bytes * rare->block_len &&
                  (!tcq_is(often) || conv_part_bits(stack, 0) <= conv_part_bits(stack, 3)),
                  "%.2f bits: %s for an expert that is used more, %s for one that is used less",
                  bits, often->name, rare->name);
            last = MOE_MAX(last, stack->part_types ? 1 : 0);
            conv_close(&job);
        }
        for (uint64_t bytes = moe ? 70000 : 37000; bytes < 100000; bytes += 14999) {
            if (!allocate(&job, out, 0, bytes, false, 1))
                return conv_close(&job);
            struct stat info;
            CHECK(!stat(out, &info) && (uint64_t)info.st_size <= bytes, "%s: %llu bytes asked for",
                  out, (unsigned long long)bytes);
            conv_close(&job);
        }
    }
    CHECK(last > 0, "experts never had different types");
}

static void sizes_that_cannot_be(void)
{
    moe_error error;
    const char *source = scratch_path("source.gguf"), *out = scratch_path("no.gguf");
    make_source(source);
    conv_options o = {.source = source, .out = out, .bits_per_weight = 2};
    CHECK(convert_with(&o, &error) == MOE_ERR_LIMIT && strstr(error.message, "smallest types"),
          "%s", error.message);
    o = (conv_options){.source = source, .out = out, .max_bytes = 5000};
    CHECK(convert_with(&o, &error) == MOE_ERR_LIMIT, "%s", error.message);
    o = (conv_options){.source = source, .out = out, .max_bytes = 50000, .quant = "q4_0"};
    CHECK(convert_with(&o, &error) == MOE_ERR_ARGUMENT, "%s", error.message);
    o = (conv_options){.source = source, .out = out, .max_bytes = 50000, .bits_per_weight = 5};
    CHECK(convert_with(&o, &error) == MOE_ERR_ARGUMENT, "%s", error.message);
    o = (conv_options){.source = source, .out = source, .quant = "q4_0"};
    CHECK(convert_with(&o, &error) == MOE_ERR_ARGUMENT && strstr(error.message, "another name"),
          "%s", error.message);
    CHECK(access(out, F_OK), "a file was written");
    const conv_keep keep = {"^blk.0.attn_q.weight$", quant_by_name("Q8_0")};
    conv_job job;
    o = (conv_options){.source = source, .out = out, .bits_per_weight = 5.5, .keeps = &keep,
                       .n_keeps = 1};
    CHECK(conv_run(&job, &o, &error) == MOE_OK, "%s", error.message);
    CHECK(job.source.n_tensors == 3 && job.source.tensors[1].target == keep.type,
          "--keep does not hold");
    conv_close(&job);
    // Above Q8_0 there is BF16, and what the source has; then room stays, which is told.
    for (int wide = 0; wide < 2; wide++) {
        if (!allocate(&job, out, wide ? 32 : 17, 0, false, 1))
            return conv_close(&job);
        uint32_t n_float = 0;
        for (size_t i = 0; i < job.source.n_tensors; i++)
            n_float += job.source.tensors[i].target->block_len == 1;
        CHECK(n_float == job.source.n_tensors, "%u tensors are floats", n_float);
        conv_close(&job);
    }
    o = (conv_options){.source = scratch_path("no.gguf"), .out = scratch_path("no2.gguf"),
                       .max_bytes = 1 << 30};
    for (int moe = 0; moe < 2; moe++) {
        if (moe)
            o.out = scratch_path("no2.moe");
        for (o.glance = 0; o.glance <= (uint64_t)moe; o.glance++) {
            CHECK(conv_run(&job, &o, &error) == MOE_OK && job.source.n_notes == 1 &&
                  strstr(job.source.notes[0], "unused"), "%s: %s", o.out, error.message);
            conv_close(&job);
        }
    }
}

/* The same bytes, however many threads measure. */
static void allocation_is_deterministic(void)
{
    conv_job job;
    size_t n[2];
    make_source(scratch_path("source.gguf"));
    make_sums();
    make_imatrix(scratch_path("a.imatrix"), "blk.0.ffn_down_exps.weight", N_IN, N_EXPERT);
    for (uint32_t moe = 0; moe < 2; moe++) {
        for (uint32_t i = 0; i < 2; i++) {
            if (!allocate(&job, scratch_path(moe ? i ? "b.moe" : "a.moe" : i ? "b.gguf" : "a.gguf"),
                          5.3, 0, true, i ? 4 : 1))
                return conv_close(&job);
            conv_close(&job);
        }
        char *a = test_read_file(scratch_path(moe ? "a.moe" : "a.gguf"), &n[0]);
        char *b = test_read_file(scratch_path(moe ? "b.moe" : "b.gguf"), &n[1]);
        CHECK(a && b && n[0] == n[1] && !memcmp(a, b, n[0]), "another file with other threads");
        free(a);
        free(b);
    }
}

/* Two matrices for trellis-coded types, and two that are none: rows of 96, and one too small. */
static void make_matrices(const char *path)
{
    made_file *m = calloc(1, sizeof *m);
    float *x = malloc(256 * 192 * sizeof *x);
    REQUIRE(m && x, "memory");
    for (uint32_t i = 0; i < 256 * 192; i++)
        x[i] = test_random_float() * test_random_float();
    made_text(m, "general.architecture");
    made_put(m, (const uint32_t[]){META_STRING}, 4);
    made_text(m, "llama");
    made_key_u32(m, "llama.block_count", 1);
    made_tensor(m, "blk.0.attn_q.weight", 256, 32, 0, x);
    made_tensor(m, "blk.0.ffn_up.weight", 256, 192, 0, x);
    made_tensor(m, "blk.0.ffn_gate.weight", 96, 64, 0, x);
    made_tensor(m, "blk.0.attn_k.weight", 64, 8, 0, x);
    made_write(m, path, 2);
    free(x);
    free(m);
}

/* Whether each tensor of make_matrices gets the kind of type that is right for it. */
static void check_trellis(const char *out, conv_store store, bool expected)
{
    conv_job job;
    moe_error error = {0};
    const conv_options o = {.source = scratch_path("matrices.gguf"), .out = out,
                            .bits_per_weight = 5.4, .store = store, .n_threads = 2};
    REQUIRE(conv_run(&job, &o, &error) == MOE_OK, "%s", error.message);
    for (uint32_t i = 0; i < 4; i++) {
        const conv_tensor *t = &job.source.tensors[i];
        CHECK(tcq_is(t->target) == (expected && i < 2), "%s, store %d: %s is %s", out, (int)store,
              t->name, t->target->name);
        CHECK(i >= 2 || (t->stored_bytes < t->bytes) == expected,
              "%s, store %d: %s: %llu of %llu bytes", out, (int)store, t->name,
              (unsigned long long)t->stored_bytes, (unsigned long long)t->bytes);
    }
    conv_close(&job);
}

static void trellis_types_only_where_they_pay(void)
{
    moe_error error;
    make_matrices(scratch_path("matrices.gguf"));
    check_trellis(scratch_path("t.moe"), CONV_STORE_AUTO, true);
    check_trellis(scratch_path("t.moe"), CONV_STORE_ZSTD, true);
    check_trellis(scratch_path("t.moe"), CONV_STORE_RAW, false);
    check_trellis(scratch_path("t.gguf"), CONV_STORE_ZSTD, false);
    // what is in MXFP4 already stays as it is
    conv_options o = {.source = scratch_path("matrices.gguf"), .out = scratch_path("mx.gguf"),
                      .quant = "mxfp4"};
    REQUIRE(convert_with(&o, &error) == MOE_OK, "%s", error.message);
    conv_job job;
    o = (conv_options){.source = scratch_path("mx.gguf"), .out = scratch_path("mx.moe"),
                       .bits_per_weight = 8};
    REQUIRE(conv_run(&job, &o, &error) == MOE_OK, "%s", error.message);
    for (uint32_t i = 0; i < 3; i++)
        CHECK(!strcmp(job.source.tensors[i].target->name, "MXFP4"), "%s becomes %s",
              job.source.tensors[i].name, job.source.tensors[i].target->name);
    conv_close(&job);
}

/* The size that was asked for, but for the padding of two records; and told before by a dry run. */
static void compressed_files_have_their_size(void)
{
    static const char *const quants[] = {"tcq2.5", "q4_0", NULL};
    conv_job job;
    moe_error error = {0};
    struct stat info;
    uint64_t planned = 0;
    make_matrices(scratch_path("matrices.gguf"));
    for (uint64_t size = 33000; size < 53000; size += 9321) {
        const conv_options o = {.source = scratch_path("matrices.gguf"), .n_threads = 2,
                                .out = scratch_path("sized.moe"), .max_bytes = size};
        REQUIRE(conv_run(&job, &o, &error) == MOE_OK, "%s", error.message);
        CHECK(!stat(o.out, &info) && (uint64_t)info.st_size == job.file_bytes, "%s", o.out);
        CHECK(job.file_bytes <= size &&
              job.file_bytes + 2 * MOEFILE_PAGE + size / 200 > size,
              "%llu bytes asked for, got %llu", (unsigned long long)size,
              (unsigned long long)job.file_bytes);
        conv_close(&job);
    }
    for (uint32_t i = 0; i < 6 * MOE_COUNT(quants); i++) {
        conv_options o = {.source = scratch_path("matrices.gguf"), .quant = quants[i / 6],
                          .bits_per_weight = quants[i / 6] ? 0 : 5.7,
                          .store = (conv_store)(i / 2 % 3), .out = scratch_path("sized.moe"),
                          .dry_run = i % 2 == 0, .n_threads = 3};
        REQUIRE(conv_run(&job, &o, &error) == MOE_OK, "%s", error.message);
        if (o.dry_run)
            planned = job.file_bytes;
        CHECK(planned == job.file_bytes, "%s, store %d: %llu bytes planned, got %llu",
              o.quant ? o.quant : "--bpw", (int)o.store, (unsigned long long)planned,
              (unsigned long long)job.file_bytes);
        conv_close(&job);
    }
}

static void run_convert_tests(void)
{
    if (!scratch_begin("observe"))
        return;
    RUN(importance_reaches_the_quantizers);
    RUN(imatrices_that_do_not_fit);
    RUN(types_fit_the_size);
    RUN(sizes_that_cannot_be);
    RUN(allocation_is_deterministic);
    RUN(trellis_types_only_where_they_pay);
    RUN(compressed_files_have_their_size);
    scratch_end();
}

#else

static void run_convert_tests(void) {}

#endif

/* What `moe info` says of a model's router and attention. */
static void families_are_described(void)
{
    static const char *const words[][3] = {
        {"deepseek3",
         "best 4 of 20 by sigmoid and a bias for the selection, from 2 of 5 groups by their best "
         "two, weights renormalized, times 2.5; 1 shared, width 12; 1 leading dense layer",
         "multi-head latent: 3 heads, 26 + 8 values kept per token, queries from 15, YaRN x8"},
        {"deepseek2-groups",
         "best 3 of 12 by softmax, from 2 of 4 groups by their best, times 2.5; 1 shared, width "
         "13; 1 leading dense layer",
         "multi-head latent: 5 heads, 20 + 4 values kept per token, queries from 17"},
        {"mixtral", "best 2 of 5 by softmax, weights renormalized", "multi-query: 3 heads on 1"},
        {"olmoe", "best 3 of 6 by softmax", "multi-head: 5 heads, norms of q and k"},
        {"qwen2moe", "best 3 of 7 by softmax; 1 shared behind a sigmoid gate, width 27",
         "multi-query: 5 heads on 1"},
        {"gpt-oss", "best 3 of 6 by softmax over those",
         "grouped-query: 6 heads on 2, sinks, window of 5 in 2 of 3 layers, YaRN x8"},
        {"lfm2moe-4",
         "best 2 of 5 by sigmoid and a bias for the selection, weights renormalized, times 1.5",
         "grouped-query: 6 heads on 3, norms of q and k; 2 of 3 layers have a convolution over 4 "
         "positions instead"},
        {"qwen35moe",
         "best 3 of 7 by softmax, weights renormalized; 1 shared behind a sigmoid gate, width 11",
         "multi-query: 3 heads on 1, norms of q and k, gated; 3 of 4 layers have a gated delta "
         "rule instead: 4 heads on 2, states of 10 x 10"},
        {"gemma4",
         "best 2 of 6 by softmax, weights renormalized; beside a dense feed-forward, width 19",
         "multi-query: 4 heads on 1, norms of q and k, window of 5 in 2 of 4 layers, there on 2 "
         "of 10 elements, elsewhere 16, values from keys in global layers, RoPE frequencies "
         "divided by a table"},
        {"llama-llama3", "", "multi-query: 3 heads on 1, RoPE frequencies divided by a table"},
        {"gemma3-linear", "",
         "multi-query: 5 heads on 1, norms of q and k, window of 5 in 5 of 6 layers, linear RoPE "
         "x8"},
    };
    for (size_t i = 0; i < MOE_COUNT(words); i++) {
        moe_model *model = open_fixture(words[i][0]);
        REQUIRE(model, "no %s", words[i][0]);
        moe_model_info info = {.size = sizeof info};
        moe_model_get_info(model, &info);
        CHECK(!strcmp(info.router, words[i][1]), "%s: %s", words[i][0], info.router);
        CHECK(!strcmp(info.attention, words[i][2]), "%s: %s", words[i][0], info.attention);
        moe_model_close(model);
    }
}

TEST_PROGRAM(observe)
{
    RUN(families_are_described);
    RUN(every_family_shows_every_matrix);
    RUN(what_is_shown_is_what_is_computed);
    RUN(tokens_computed_anew_are_not_shown);
    RUN(a_cancelled_look_is_an_error);
    RUN(options_of_observers);
    run_convert_tests();
}
