/* tests/test_observe.c - what an observer is shown is what is computed, and looking changes nothing. */
#include "test.h"

#include "fenced_backend.h"

#include <dirent.h>

enum { N_TOK = 7, MAX_TENSORS = 1024, MAX_ROWS = 1 << 16 };

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

typedef struct seen {
    seen_tensor tensors[MAX_TENSORS];
    uint32_t n_tensor;
    uint64_t route_hash, n_route;
    seen_rows close[4];
    moe_cancel *cancel_at_route;
    int32_t ids[1024];
    float weights[1024];
    uint32_t n_ids;
} seen;

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t bytes)
{
    for (const uint8_t *p = data; bytes--; p++)
        hash = (hash ^ *p) * 1099511628211u;
    return hash;
}

static seen_tensor *seen_find(seen *s, const char *name)
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
    seen *s = user;
    seen_tensor *t = seen_find(s, in->tensor);
    REQUIRE(t && in->size == sizeof *in, "too many tensors");
    t->n_in = in->n_in;
    t->n_matrix = in->n_matrix;
    for (uint32_t i = 0; i < in->n_product; i++) {
        const float *row = in->rows + (size_t)(i / in->n_per_row) * in->row_stride;
        CHECK(in->matrix[i] >= 0 && (uint32_t)in->matrix[i] < in->n_matrix, "%s: matrix %d",
              in->tensor, in->matrix[i]);
        t->hash = hash_bytes(t->hash, row, in->n_in * sizeof *row);
        t->hash = hash_bytes(t->hash, &in->matrix[i], sizeof in->matrix[i]);
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
    seen *s = user;
    const size_t n = (size_t)e->n_tok * e->n_used;
    for (uint32_t t = 0; t < e->n_tok; t++) { // by token, so that batches do not show
        const uint32_t at[2] = {e->layer, e->pos + t};
        uint64_t hash = hash_bytes(1, at, sizeof at);
        hash = hash_bytes(hash, e->ids + t * e->n_used, e->n_used * sizeof *e->ids);
        s->route_hash += hash_bytes(hash, e->weights + t * e->n_used, e->n_used * sizeof(float));
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

static moe_model *open_model(const char *name, const moe_backend *backend)
{
    char path[512];
    moe_model *model = NULL;
    moe_error error = {0};
    moe_model_options options;
    moe_model_options_init(&options);
    snprintf(path, sizeof path, "%s/fixtures/%s", test_root(), name);
    options.path = path;
    options.backend = backend;
    moe_status status = moe_model_open(&model, &options, &error);
    CHECK(status == MOE_OK, "%s: %s", name, error.message);
    return model;
}

/* Evaluates N_TOK tokens in calls of `chunk`; all logits. `s` NULL: without an observer. */
static bool evaluate(moe_model *model, seen *s, uint32_t chunk, uint32_t n_threads, float *logits)
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
    for (uint32_t at = 0, n; !status && at < N_TOK; at += n) {
        moe_token tokens[N_TOK];
        n = MOE_MIN(chunk, N_TOK - at);
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
           ends_with(t->name, ".weight") && !ends_with(t->name, "shortconv.conv.weight");
}

/* How many products N_TOK tokens make with a tensor. */
static uint64_t products(const moe_model *model, const char *name)
{
    const bool heads = strstr(name, "attn_k_b") || strstr(name, "attn_v_b");
    return strstr(name, "_exps.") ? N_TOK * model->hp.router.n_used
           : heads                ? N_TOK * model->hp.n_head
                                  : N_TOK;
}

static void check_complete(const moe_model *model, const char *file, seen *s)
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

static void check_same(const char *file, const char *what, const seen *a, const seen *b)
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
    moe_model *model = open_model(file, NULL), *fenced = open_model(file, fenced_backend());
    seen *s = calloc(4, sizeof *s);
    if (model && fenced && s) {
        const size_t bytes = (size_t)N_TOK * model->hp.n_vocab * sizeof(float);
        float *plain = malloc(bytes), *observed = malloc(bytes);
        if (plain && observed && evaluate(model, NULL, N_TOK, 1, plain) &&
            evaluate(model, &s[0], N_TOK, 1, observed)) {
            CHECK(!memcmp(plain, observed, bytes), "%s: other logits when observed", file);
            check_complete(model, file, &s[0]);
        }
        if (evaluate(model, &s[1], N_TOK, 3, observed))
            check_same(file, "3 threads", &s[0], &s[1]);
        if (evaluate(model, &s[2], 2, 2, observed))
            check_same(file, "in parts", &s[0], &s[2]);
        if (evaluate(fenced, &s[3], N_TOK, 1, observed))
            check_same(file, "fenced", &s[0], &s[3]);
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

/* In a model of float weights: the second matrix's input is made from the first two's with the experts
 * that the observer was told, the experts are those with the best scores, and the output matrix makes
 * the logits out of its input. */
static void what_is_shown_is_what_is_computed(void)
{
    moe_model *model = open_model("qwen3moe.gguf", NULL);
    seen *s = calloc(1, sizeof *s);
    REQUIRE(model && s, "no model");
    const moe_tensor *gate = directory_tensor(model->dir, "blk.0.ffn_gate_exps.weight");
    const moe_tensor *up = directory_tensor(model->dir, "blk.0.ffn_up_exps.weight");
    const moe_tensor *router = directory_tensor(model->dir, "blk.0.ffn_gate_inp.weight");
    const moe_tensor *output = directory_tensor(model->dir, "output.weight");
    REQUIRE(gate && up && router && output && gate->quant->block_len == 1, "not this fixture");
    const uint32_t n_used = model->hp.router.n_used, n_vocab = model->hp.n_vocab;
    float *logits = malloc((size_t)N_TOK * n_vocab * sizeof *logits);
    s->close[0].tensor = gate->name;
    s->close[1].tensor = "blk.0.ffn_down_exps.weight";
    s->close[2].tensor = router->name;
    s->close[3].tensor = output->name;
    REQUIRE(logits && evaluate(model, s, 3, 2, logits), "evaluate");
    REQUIRE(s->close[0].n == N_TOK * n_used && s->n_ids == N_TOK * n_used, "%u products", s->n_ids);
    for (uint32_t i = 0; i < N_TOK * n_used; i++) {
        const float *h = s->close[0].rows + (size_t)i * gate->dims[0];
        const float *a = s->close[1].rows + (size_t)i * gate->dims[1];
        const uint64_t e = (uint64_t)s->ids[i];
        CHECK(s->close[0].matrix[i] == s->ids[i] && s->close[1].matrix[i] == s->ids[i],
              "product %u: other experts", i);
        for (uint64_t k = 0; k < gate->dims[1]; k++) {
            const double want = silu(dot(gate, e, k, h)) * dot(up, e, k, h);
            CHECK(fabs(want - (double)a[k]) <= 1e-5 * (fabs(want) + 1), "product %u, %u: %g, not %g",
                  i, (unsigned)k, (double)a[k], want);
        }
    }
    for (uint32_t t = 0; t < N_TOK; t++) {
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
    moe_model *model = open_model("gemma3.gguf", NULL);
    seen *s = calloc(1, sizeof *s);
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
    moe_model *model = open_model("olmoe.gguf", NULL);
    seen *s = calloc(1, sizeof *s);
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
    moe_model *model = open_model("qwen3moe.gguf", NULL);
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

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(every_family_shows_every_matrix);
    RUN(what_is_shown_is_what_is_computed);
    RUN(tokens_computed_anew_are_not_shown);
    RUN(a_cancelled_look_is_an_error);
    RUN(options_of_observers);
    return test_end();
}
