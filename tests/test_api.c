/* tests/test_api.c - the promises of moe.h that are not about numbers: versions of structs,
 * arguments, memory ceiling and estimate, failing allocators, callbacks, cancelling, closing.
 *
 * Environment: MOE_TEST_SLOW, a factor on time limits for emulators. */
#include "test.h"

#include "gguf_edit.h"
#include "models.h"

#include <pthread.h>
#include <time.h>

/* ------------------------------------------------------------------------------------- host -- */

/* A host that counts, can fail one allocation, and has a parallel_for. Several objects may use it
 * from several threads. */
typedef struct test_host {
    moe_host host;
    atomic_ullong calls, used, peak;
    unsigned long long fail_at; // number of the allocation that fails; 0: none
    atomic_uint n_parallel, n_tasks, n_lines, n_progress;
    uint64_t progress_done, progress_total;
    char stage[16];
    bool progress_is_wrong;
} test_host;

static void *host_alloc(void *user, size_t bytes, size_t align)
{
    test_host *h = user;
    void *p = NULL;
    if (atomic_fetch_add(&h->calls, 1) + 1 == h->fail_at || posix_memalign(&p, align, bytes))
        return NULL;
    unsigned long long used = atomic_fetch_add(&h->used, bytes) + bytes;
    unsigned long long peak = atomic_load(&h->peak);
    while (peak < used && !atomic_compare_exchange_weak(&h->peak, &peak, used))
        ;
    return p;
}

static void host_free(void *user, void *ptr, size_t bytes, size_t align)
{
    (void)align;
    atomic_fetch_sub(&((test_host *)user)->used, bytes);
    free(ptr);
}

static void host_log(void *user, moe_log_level level, const char *line)
{
    (void)level;
    atomic_fetch_add(&((test_host *)user)->n_lines, !strchr(line, '\n'));
}

static void host_progress(void *user, const char *stage, uint64_t done, uint64_t total)
{
    test_host *h = user;
    snprintf(h->stage, sizeof h->stage, "%s", stage);
    h->progress_is_wrong |= done > total || (h->n_progress && done < h->progress_done);
    h->progress_done = done;
    h->progress_total = total;
    h->n_progress++;
}

/* From the last to the first, to be different. */
static void host_parallel_for(void *user, uint32_t n, void (*task)(void *arg, uint32_t i),
                              void *arg)
{
    test_host *h = user;
    atomic_fetch_add(&h->n_parallel, 1);
    atomic_fetch_add(&h->n_tasks, n);
    while (n--)
        task(arg, n);
}

static void host_setup(test_host *h)
{
    memset(h, 0, sizeof *h);
    moe_host_init(&h->host);
    h->host.user = h;
    h->host.alloc = host_alloc;
    h->host.free = host_free;
    h->host.log = host_log;
    h->host.progress = host_progress;
}

/* ----------------------------------------------------------------------------------- models -- */

static moe_model_options options_for(const char *fixture, test_host *h)
{
    moe_model_options o;
    moe_model_options_init(&o);
    o.path = fixture_path(fixture);
    o.host = h ? &h->host : NULL;
    return o;
}

static moe_model *open_hosted(const char *name, test_host *h)
{
    moe_model_options o = options_for(name, h);
    return open_model(&o);
}

static moe_session_options session_options(uint32_t n_ctx)
{
    moe_session_options o;
    moe_session_options_init(&o);
    o.n_ctx = n_ctx;
    o.n_threads = 2;
    o.n_batch = 32;
    return o;
}

static const moe_token api_tokens[24] = {1, 5, 9, 2, 33, 71, 8, 8, 90, 3, 14, 15,
                                     92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32};

/* A model that keeps two cores busy for a second or more: about 72 million weights in Q8_0. */
static uint8_t *big_model(size_t *bytes)
{
    enum { LAYERS = 6, EMBD = 1024, FF = 3072, KV = 256, VOCAB = 512 };
    static const struct {
        const char *name;
        uint64_t dims[2];
    } matrices[] = {
        {"attn_q", {EMBD, EMBD}}, {"attn_k", {EMBD, KV}}, {"attn_v", {EMBD, KV}},
        {"attn_output", {EMBD, EMBD}}, {"ffn_gate", {EMBD, FF}}, {"ffn_up", {EMBD, FF}},
        {"ffn_down", {FF, EMBD}},
    };
    static const char *const norms[] = {"attn_norm", "ffn_norm"};
    gguf_edit *e = edit_new();
    edit_set_string(e, "general.architecture", "llama");
    edit_set_u32(e, "llama.block_count", LAYERS);
    edit_set_u32(e, "llama.context_length", 8192);
    edit_set_u32(e, "llama.embedding_length", EMBD);
    edit_set_u32(e, "llama.feed_forward_length", FF);
    edit_set_u32(e, "llama.attention.head_count", 16);
    edit_set_u32(e, "llama.attention.head_count_kv", KV / 64);
    edit_set_f32(e, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    edit_add_tensor(e, "token_embd.weight", "Q8_0", 2, (uint64_t[]){EMBD, VOCAB});
    edit_add_tensor(e, "output_norm.weight", "F32", 1, (uint64_t[]){EMBD});
    char name[64];
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        for (size_t i = 0; i < MOE_COUNT(matrices); i++) {
            snprintf(name, sizeof name, "blk.%u.%s.weight", layer, matrices[i].name);
            edit_add_tensor(e, name, "Q8_0", 2, matrices[i].dims);
        }
        for (size_t i = 0; i < MOE_COUNT(norms); i++) {
            snprintf(name, sizeof name, "blk.%u.%s.weight", layer, norms[i]);
            edit_add_tensor(e, name, "F32", 1, (uint64_t[]){EMBD});
        }
    }
    /* Blocks of random codes; their scale gives a matrix rows of length 1. */
    static uint8_t pattern[34 * 997];
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = (uint8_t)test_random();
    uint16_t scale = f16_of_f32(1.0f / 73 / 32);
    for (size_t i = 0; i < sizeof pattern; i += 34)
        memcpy(pattern + i, &scale, 2);
    for (size_t i = 0; i < e->n_tensors; i++) {
        edit_tensor *t = &e->tensor[i];
        for (size_t at = 0; t->n_dims == 2 && at < t->bytes; at += sizeof pattern)
            memcpy(t->data + at, pattern, MOE_MIN(sizeof pattern, t->bytes - at));
        for (size_t k = 0; t->n_dims == 1 && k < t->dims[0]; k++)
            ((float *)(void *)t->data)[k] = 1;
    }
    uint8_t *data = edit_write(e, bytes);
    edit_free(e);
    return data;
}

static moe_model *open_memory(const uint8_t *data, size_t bytes, test_host *h)
{
    moe_model_options o;
    moe_model_options_init(&o);
    o.data = data;
    o.data_bytes = bytes;
    o.host = h ? &h->host : NULL;
    return open_model(&o);
}

/* ---------------------------------------------------------------------------------- clock -- */

static double now_ms(void)
{
    return (double)plat_time_ns() * 1e-6;
}

static void sleep_ms(double ms)
{
    struct timespec t = {(time_t)(ms / 1000), (long)(fmod(ms, 1000) * 1e6)};
    nanosleep(&t, NULL);
}

/* Sets a flag after a while, and remembers when. */
typedef struct later {
    pthread_t thread;
    moe_cancel *cancel;
    double delay_ms, set_at_ms;
} later;

static void *later_run(void *arg)
{
    later *l = arg;
    sleep_ms(l->delay_ms);
    l->set_at_ms = now_ms();
    moe_cancel_set(l->cancel);
    return NULL;
}

static void cancel_later(later *l, moe_cancel *cancel, double delay_ms)
{
    *l = (later){.cancel = cancel, .delay_ms = delay_ms};
    CHECK(pthread_create(&l->thread, NULL, later_run, l) == 0, "no thread");
}

/* ------------------------------------------------------------------------- names, versions -- */

static void every_status_has_a_name(void)
{
    CHECK(!strcmp(moe_status_name(MOE_OK), "MOE_OK"), "%s", moe_status_name(MOE_OK));
    for (int i = 0; i <= MOE_ERR_BACKEND; i++) {
        const char *name = moe_status_name((moe_status)i);
        CHECK(name && !strncmp(name, i ? "MOE_ERR_" : "MOE_OK", 6), "%d: %s", i, name);
        for (int k = 0; k < i; k++)
            CHECK(strcmp(name, moe_status_name((moe_status)k)), "%d and %d: %s", i, k, name);
    }
    CHECK(moe_status_name((moe_status)99) && moe_status_name((moe_status)-1), "NULL");
    int major, minor, patch;
    CHECK(sscanf(moe_version(), "%d.%d.%d", &major, &minor, &patch) == 3 &&
              major == MOE_VERSION_MAJOR && minor == MOE_VERSION_MINOR &&
              patch == MOE_VERSION_PATCH, "%s", moe_version());
}

/* An older program's struct ends early, and what lies behind it is not ours; a newer one's is
 * longer. */
static void model_options_are_versioned(void)
{
    struct {
        moe_model_options o;
        uint8_t rest[64];
    } options;
    const size_t cuts[] = {offsetof(moe_model_options, data), offsetof(moe_model_options, copy),
                           offsetof(moe_model_options, memory_limit_bytes)};
    char path[512];
    snprintf(path, sizeof path, "%s", fixture_path("llama-tied"));
    for (size_t i = 0; i < MOE_COUNT(cuts); i++) {
        moe_model_options_init(&options.o);
        options.o.path = path;
        options.o.size = cuts[i];
        memset((uint8_t *)&options + cuts[i], 0xa5, sizeof options - cuts[i]);
        moe_model_close(open_model(&options.o));
    }
    moe_model_options_init(&options.o);
    memset(options.rest, 0xa5, sizeof options.rest);
    options.o.path = path;
    options.o.size = sizeof options;
    moe_model_close(open_model(&options.o));

    moe_model *model = (moe_model *)&options;
    moe_error error = {0};
    options.o.size = 0;
    CHECK(moe_model_open(&model, &options.o, &error) == MOE_ERR_ARGUMENT && !model, "size 0: %s",
          error.message);
}

static void session_options_are_versioned(void)
{
    moe_model *model = open_hosted("llama-tied", NULL);
    struct {
        moe_session_options o;
        uint8_t rest[64];
    } options;
    REQUIRE(model, "no model");
    const size_t cuts[] = {offsetof(moe_session_options, n_batch),
                           offsetof(moe_session_options, cache_type),
                           offsetof(moe_session_options, cancel), sizeof options};
    for (size_t i = 0; i < MOE_COUNT(cuts); i++) {
        moe_session_options_init(&options.o);
        memset((uint8_t *)&options + MOE_MIN(cuts[i], sizeof options.o), 0xa5,
               sizeof options - MOE_MIN(cuts[i], sizeof options.o));
        options.o.n_ctx = 16;
        options.o.size = cuts[i];
        moe_session *session = open_session(model, &options.o);
        CHECK(session && moe_session_capacity(session) == 16, "capacity");
        CHECK(session && moe_session_eval(session, api_tokens, 3, 0, NULL) == MOE_OK, "eval");
        moe_session_close(session);
    }
    moe_session *session = open_session(model, NULL); // the defaults
    CHECK(session && moe_session_capacity(session) == 128, "no options");
    CHECK(session && moe_session_threads(session) >= 1, "a thread per core, at least one");
    moe_session_close(session);
    moe_session_options three;
    moe_session_options_init(&three);
    three.n_threads = 3;
    session = open_session(model, &three);
    CHECK(session && moe_session_threads(session) == 3, "the threads that were asked for");
    moe_session_close(session);
    moe_model_close(model);
}

/* Structs that are filled in: nothing behind `size` is touched. */
static void results_are_versioned(void)
{
    moe_model *model = open_hosted("qwen3moe", NULL);
    union {
        moe_model_info info;
        moe_memory_estimate estimate;
        moe_tensor_info tensor;
        uint8_t bytes[512];
    } u;
    REQUIRE(model, "no model");
    moe_session_options o = session_options(16);
    for (int what = 0; what < 3; what++) {
        const size_t full = what == 0   ? sizeof u.info
                            : what == 1 ? sizeof u.estimate
                                        : sizeof u.tensor;
        for (size_t cut = sizeof(size_t); cut <= full + 64; cut += 8) {
            memset(&u, 0xa5, sizeof u);
            u.info.size = cut;
            if (what == 0)
                moe_model_get_info(model, &u.info);
            else if (what == 1)
                CHECK(moe_session_estimate(model, &o, &u.estimate, NULL) == MOE_OK, "estimate");
            else
                CHECK(moe_model_tensor(model, 0, &u.tensor) == MOE_OK, "tensor");
            for (size_t i = MOE_MIN(cut, full); i < sizeof u; i++)
                CHECK(u.bytes[i] == 0xa5, "struct %d, size %zu: byte %zu written", what, cut, i);
        }
    }
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    gguf_edit *e = edit_read(fixture_path("qwen3moe"));
    REQUIRE(e, "no fixture");
    const struct {
        const char *key;
        uint32_t value;
    } expected[] = {
        {"qwen3moe.block_count", info.n_layer},
        {"qwen3moe.context_length", info.n_ctx_train},
        {"qwen3moe.embedding_length", info.n_embd},
        {"qwen3moe.vocab_size", info.n_vocab},
        {"qwen3moe.attention.head_count", info.n_head},
        {"qwen3moe.attention.head_count_kv", info.n_head_kv},
        {"qwen3moe.attention.key_length", info.head_dim},
        {"qwen3moe.expert_count", info.n_expert},
        {"qwen3moe.expert_used_count", info.n_expert_used},
        {"qwen3moe.expert_feed_forward_length", info.n_ff_expert},
    };
    for (size_t i = 0; i < MOE_COUNT(expected); i++)
        CHECK(expected[i].value && expected[i].value == edit_u32(e, expected[i].key), "%s: %u",
              expected[i].key, expected[i].value);
    CHECK(!strcmp(info.architecture, "qwen3moe"), "%s", info.architecture);
    edit_free(e);
    moe_model_close(model);
}

/* ------------------------------------------------------------------------------- arguments -- */

static void null_is_an_argument_error(void)
{
    moe_model *model = open_hosted("llama-tied", NULL), *other = (moe_model *)&model;
    moe_session_options so = session_options(16);
    moe_memory_estimate estimate = {.size = sizeof estimate};
    moe_error error = {0};
    REQUIRE(model, "no model");
    moe_session *session = open_session(model, &so), *none = (moe_session *)&model;
    REQUIRE(session, "no session");
    moe_model_options mo = options_for("llama-tied", NULL);
    float logits[1];

    CHECK(moe_model_open(NULL, &mo, &error) == MOE_ERR_ARGUMENT, "out");
    CHECK(moe_model_open(&other, NULL, &error) == MOE_ERR_ARGUMENT && !other, "options");
    CHECK(moe_session_open(NULL, model, &so, &error) == MOE_ERR_ARGUMENT, "out");
    CHECK(moe_session_open(&none, NULL, &so, &error) == MOE_ERR_ARGUMENT && !none, "model");
    CHECK(moe_session_estimate(NULL, &so, &estimate, &error) == MOE_ERR_ARGUMENT, "model");
    CHECK(moe_session_estimate(model, &so, NULL, &error) == MOE_ERR_ARGUMENT, "estimate");
    CHECK(moe_session_eval(NULL, api_tokens, 1, 0, NULL) == MOE_ERR_ARGUMENT, "session");
    CHECK(moe_session_eval(session, NULL, 1, 0, NULL) == MOE_ERR_ARGUMENT, "tokens");
    CHECK(moe_session_eval(session, api_tokens, 1, 1, NULL) == MOE_ERR_ARGUMENT, "logits");
    CHECK(moe_session_eval(session, api_tokens, 1, 2, logits) == MOE_ERR_ARGUMENT,
          "n_logits > n_tok");
    CHECK(moe_session_rewind(NULL, 0) == MOE_ERR_ARGUMENT, "session");
    CHECK(moe_session_checkpoint(NULL) == MOE_ERR_ARGUMENT, "session");
    CHECK(moe_session_length(session) == 0, "a refused call changed the length");
    moe_session_close(NULL);
    moe_model_close(NULL);
    moe_session_close(session);
    moe_model_close(model);
}

static void sources_are_exclusive(void)
{
    moe_model *model = (moe_model *)&model;
    moe_error error = {0};
    uint8_t data[64] = {0};
    moe_model_options o = options_for("llama-tied", NULL);
    o.data = data;
    o.data_bytes = sizeof data;
    CHECK(moe_model_open(&model, &o, &error) == MOE_ERR_ARGUMENT && !model, "two sources");
    CHECK(error.status == MOE_ERR_ARGUMENT && error.message[0], "no message");
    moe_model_options_init(&o);
    CHECK(moe_model_open(&model, &o, &error) == MOE_ERR_ARGUMENT, "no source");
    o.path = "no/such/file.gguf";
    CHECK(moe_model_open(&model, &o, &error) == MOE_ERR_IO, "%s", error.message);
    CHECK(strstr(error.message, o.path), "the path is not in \"%s\"", error.message);
    CHECK(moe_model_open(&model, &o, NULL) == MOE_ERR_IO, "error may be NULL");
    o = options_for("llama-tied", NULL);
    o.isa = (moe_isa)77;
    CHECK(moe_model_open(&model, &o, &error) == MOE_ERR_ARGUMENT, "isa");
    test_host h;
    host_setup(&h);
    h.host.free = NULL;
    o = options_for("llama-tied", &h);
    CHECK(moe_model_open(&model, &o, &error) == MOE_ERR_ARGUMENT && !model, "alloc without free");
}

static void session_options_are_checked(void)
{
    moe_model *model = open_hosted("llama-tied", NULL);
    REQUIRE(model, "no model");
    for (int i = 0; i < 6; i++) {
        moe_session_options o = session_options(16);
        const char *subject = i < 2 ? "n_threads" : i < 4 ? "n_batch" : "cache_type";
        switch (i) {
        case 0: o.n_threads = 257; break;
        case 1: o.n_threads = UINT32_MAX; break;
        case 2: o.n_batch = 0; break;
        case 3: o.n_batch = 4097; break;
        case 4: o.cache_type = (moe_cache_type)3; break;
        default: o.cache_type = (moe_cache_type)-1; break;
        }
        moe_session *session = (moe_session *)&o;
        moe_memory_estimate estimate = {.size = sizeof estimate};
        moe_error error = {0};
        CHECK(moe_session_open(&session, model, &o, &error) == MOE_ERR_ARGUMENT && !session,
              "case %d: %s", i, error.message);
        CHECK(!strcmp(error.subject, subject), "case %d: subject \"%s\"", i, error.subject);
        error = (moe_error){0};
        CHECK(moe_session_estimate(model, &o, &estimate, &error) == MOE_ERR_ARGUMENT,
              "case %d: %s", i, error.message);
    }
    moe_session_options o = session_options(0); // the fixture was trained on 128
    moe_session *session = open_session(model, &o);
    CHECK(session && moe_session_capacity(session) == 128, "n_ctx 0");
    moe_session_close(session);
    o.n_threads = 0;
    o.n_ctx = 1;
    session = open_session(model, &o);
    CHECK(session && moe_session_eval(session, api_tokens, 1, 0, NULL) == MOE_OK, "a context of 1");
    moe_session_close(session);
    moe_model_close(model);
}

static void refused_evals_change_nothing(void)
{
    moe_model *model = open_hosted("llama-tied", NULL);
    moe_session_options o = session_options(8);
    REQUIRE(model, "no model");
    moe_session *s = open_session(model, &o);
    uint32_t n_vocab = vocab_of(model);
    float *logits = calloc(3 * (size_t)n_vocab, sizeof *logits);
    moe_token bad[3] = {1, 2, 3};
    REQUIRE(s && logits, "no session");
    CHECK(moe_session_eval(s, api_tokens, 5, 0, NULL) == MOE_OK, "%s",
          moe_session_error(s)->message);
    CHECK(moe_session_length(s) == 5 && moe_session_capacity(s) == 8, "length");
    const moe_token ids[] = {-1, (moe_token)n_vocab, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < MOE_COUNT(ids); i++) {
        bad[2] = ids[i];
        CHECK(moe_session_eval(s, bad, 3, 1, logits) == MOE_ERR_ARGUMENT, "token %d", ids[i]);
        CHECK(moe_session_error(s)->status == MOE_ERR_ARGUMENT &&
                  moe_session_error(s)->message[0], "no message");
    }
    CHECK(moe_session_eval(s, api_tokens, 4, 1, logits) == MOE_ERR_CONTEXT, "9 tokens in 8");
    CHECK(strstr(moe_session_error(s)->message, "8"), "%s", moe_session_error(s)->message);
    CHECK(moe_session_eval(s, api_tokens, SIZE_MAX / 2, 0, NULL) == MOE_ERR_CONTEXT, "huge n_tok");
    CHECK(moe_session_rewind(s, 6) == MOE_ERR_ARGUMENT, "rewind beyond the end");
    CHECK(moe_session_length(s) == 5, "length %u", moe_session_length(s));
    for (size_t i = 0; i < 3 * (size_t)n_vocab; i++)
        CHECK(logits[i] == 0, "logits were written");
    CHECK(moe_session_eval(s, api_tokens + 5, 3, 3, logits) == MOE_OK, "full");
    CHECK(moe_session_eval(s, api_tokens, 1, 0, NULL) == MOE_ERR_CONTEXT, "over full");
    CHECK(moe_session_rewind(s, 0) == MOE_OK && moe_session_length(s) == 0, "rewind to 0");
    CHECK(moe_session_eval(s, api_tokens, 8, 0, NULL) == MOE_OK, "again");
    free(logits);
    moe_session_close(s);
    moe_model_close(model);
}

/* ---------------------------------------------------------------------------------- memory -- */

static void estimate_is_what_is_allocated(void)
{
    static const char *const names[] = {"llama-tied", "qwen3moe", "gemma3"};
    for (size_t f = 0; f < MOE_COUNT(names); f++) {
        test_host h;
        host_setup(&h);
        moe_model *model = open_hosted(names[f], &h);
        REQUIRE(model, "no model");
        for (uint32_t i = 0; i < 12; i++) {
            moe_session_options o = session_options(1 + 61 * i);
            o.n_threads = 1 + i % 2;
            o.n_batch = 1 + 40 * (i % 4);
            o.n_logits = 1 + i % 2 * 7;
            o.cache_type = (moe_cache_type)(i % 3);
            moe_memory_estimate e = {.size = sizeof e};
            unsigned long long calls = h.calls, used = h.used;
            CHECK(moe_session_estimate(model, &o, &e, NULL) == MOE_OK, "estimate");
            CHECK(h.calls == calls, "an estimate allocates");
            CHECK(e.fits && e.n_ctx == o.n_ctx, "n_ctx %u", e.n_ctx);
            CHECK(e.cache_bytes && e.work_bytes && e.total_bytes >= e.cache_bytes + e.work_bytes,
                  "%llu + %llu > %llu", (unsigned long long)e.cache_bytes,
                  (unsigned long long)e.work_bytes, (unsigned long long)e.total_bytes);
            moe_session *s = open_session(model, &o);
            uint64_t got = h.used - used;
            CHECK(got <= e.total_bytes && e.total_bytes <= got + 4096,
                  "%s: estimated %llu, allocated %llu", names[f],
                  (unsigned long long)e.total_bytes, (unsigned long long)got);
            calls = h.calls;
            for (uint32_t k = 0; k < 4 && k < o.n_ctx; k++)
                CHECK(moe_session_eval(s, api_tokens + k, 1, 0, NULL) == MOE_OK, "eval");
            CHECK(h.calls == calls, "%llu allocations in eval",
                  (unsigned long long)h.calls - calls);
            moe_session_close(s);
            CHECK(h.used == used, "a session leaks %lld bytes", (long long)(h.used - used));
        }
        moe_model_close(model);
        CHECK(h.used == 0, "a model leaks %llu bytes", (unsigned long long)h.used);
    }
}

/* A ceiling under which a context of about 300 fits, above what an open model takes. */
static uint64_t limit_for_300(void)
{
    test_host h;
    host_setup(&h);
    moe_model *model = open_hosted("llama-tied", &h);
    moe_session_options o = session_options(300);
    moe_memory_estimate e = {.size = sizeof e};
    CHECK(model && moe_session_estimate(model, &o, &e, NULL) == MOE_OK, "estimate");
    uint64_t limit = h.used + e.total_bytes;
    moe_model_close(model);
    return limit;
}

/* A session of just the ceiling's size fits, and one byte less is too little: the estimate says it,
 * and opening it does. */
static void a_session_may_fill_the_ceiling(void)
{
    const uint64_t limit = limit_for_300();
    for (uint64_t less = 0; less < 2; less++) {
        test_host h;
        host_setup(&h);
        moe_model_options mo = options_for("llama-tied", &h);
        mo.memory_limit_bytes = limit - less;
        moe_model *model = open_model(&mo);
        REQUIRE(model, "no model");
        moe_session_options o = session_options(300);
        moe_memory_estimate e = {.size = sizeof e};
        moe_session *s;
        CHECK(moe_session_estimate(model, &o, &e, NULL) == MOE_OK && e.fits == !less, "%d less",
              (int)less);
        CHECK(moe_session_open(&s, model, &o, NULL) == (less ? MOE_ERR_LIMIT : MOE_OK), "%d less",
              (int)less);
        moe_session_close(s);
        o.n_ctx = UINT32_MAX;
        CHECK(moe_session_estimate(model, &o, &e, NULL) == MOE_OK && !e.fits, "2^32 - 1");
        moe_model_close(model);
    }
}

/* The context that is said to fit does fit, to its last token, and one token more does not. */
static void longest_context_works(moe_model *model, uint32_t n_ctx_max, bool fill)
{
    moe_session_options o = session_options(n_ctx_max + 1);
    moe_session *s = (moe_session *)&o;
    moe_error error = {0};
    CHECK(moe_session_open(&s, model, &o, &error) == MOE_ERR_LIMIT && !s, "%u", o.n_ctx);
    o.n_ctx = n_ctx_max;
    s = open_session(model, &o);
    REQUIRE(s && moe_session_capacity(s) == n_ctx_max, "capacity");
    for (uint32_t k = 0; k < (fill ? n_ctx_max : 48); k += 24) {
        moe_status status = moe_session_eval(s, api_tokens, MOE_MIN(24, n_ctx_max - k), 0, NULL);
        CHECK(status == MOE_OK, "at %u: %s", k, moe_session_error(s)->message);
    }
    CHECK(!fill || moe_session_eval(s, api_tokens, 1, 0, NULL) == MOE_ERR_CONTEXT, "not full");
    moe_session_close(s);
}

static void too_long_a_context_is_refused(void)
{
    const uint64_t limits[] = {limit_for_300(), 12 << 20, 0};
    const uint32_t too_long = 1u << 30;
    for (size_t i = 0; i < MOE_COUNT(limits); i++) {
        test_host h;
        host_setup(&h);
        moe_model_options mo = options_for("llama-tied", &h);
        mo.memory_limit_bytes = limits[i];
        moe_model *model = open_model(&mo);
        REQUIRE(model, "no model");
        moe_session_options o = session_options(too_long);
        moe_memory_estimate e = {.size = sizeof e};
        moe_session *s = (moe_session *)&o;
        moe_error error = {0};
        char number[16];
        unsigned long long calls = h.calls;
        CHECK(moe_session_estimate(model, &o, &e, &error) == MOE_OK, "%s", error.message);
        CHECK(!e.fits && e.n_ctx == too_long && e.n_ctx_max >= 300, "n_ctx_max %u", e.n_ctx_max);
        CHECK(i > 0 || e.n_ctx_max < 310, "n_ctx_max %u", e.n_ctx_max);
        CHECK(e.total_bytes > (uint64_t)too_long * 64, "size %llu",
              (unsigned long long)e.total_bytes);
        CHECK(moe_session_open(&s, model, &o, &error) == MOE_ERR_LIMIT && !s, "%s", error.message);
        snprintf(number, sizeof number, "%u", e.n_ctx_max);
        CHECK(!limits[i] || strstr(error.message, number), "%s is not in \"%s\"", number,
              error.message); // without a ceiling the free memory may have changed meanwhile
        o.n_ctx = UINT32_MAX;
        CHECK(moe_session_open(&s, model, &o, &error) == MOE_ERR_LIMIT && !s, "2^32 - 1");
        CHECK(h.calls == calls, "%llu allocations", (unsigned long long)h.calls - calls);
        if (limits[i]) {
            longest_context_works(model, e.n_ctx_max, i == 0);
            CHECK(h.peak <= limits[i], "peak %llu over the ceiling of %llu",
                  (unsigned long long)h.peak, (unsigned long long)limits[i]);
        }
        moe_model_close(model);
        CHECK(h.used == 0, "leak");
    }
}

/* From far too little to enough: whatever happens, the ceiling holds and nothing leaks. */
static void ceiling_holds(void)
{
    uint32_t n_model = 0, n_session = 0, n_failed = 0;
    for (uint64_t limit = 1; limit < 4 << 20; limit = limit + limit / 3 + 1) {
        for (int how = 0; how < 2; how++) { // mapped, and read into memory
            test_host h;
            host_setup(&h);
            moe_model_options mo = options_for("qwen3moe", &h);
            mo.memory_limit_bytes = limit;
            mo.copy = how;
            moe_model *model = NULL;
            moe_session *s = NULL;
            moe_error error = {0};
            moe_session_options so = session_options(64);
            moe_status status = moe_model_open(&model, &mo, &error);
            n_model += status == MOE_OK;
            if (!status)
                status = moe_session_open(&s, model, &so, &error);
            n_session += status == MOE_OK;
            n_failed += status != MOE_OK;
            CHECK(status == MOE_OK || status == MOE_ERR_LIMIT, "%s: %s", moe_status_name(status),
                  error.message);
            CHECK(status == MOE_OK || error.message[0], "no message");
            if (s)
                CHECK(moe_session_eval(s, api_tokens, 24, 0, NULL) == MOE_OK, "eval");
            CHECK(h.peak <= limit, "peak %llu over the ceiling of %llu", (unsigned long long)h.peak,
                  (unsigned long long)limit);
            moe_session_close(s);
            moe_model_close(model);
            CHECK(h.used == 0, "limit %llu: %llu bytes leaked", (unsigned long long)limit,
                  (unsigned long long)h.used);
        }
    }
    CHECK(n_failed > 5 && n_model > 5 && n_session > 2, "%u %u %u", n_failed, n_model, n_session);
}

/* Every single allocation fails in turn. */
static void failing_allocations_are_survived(void)
{
    static const char *const names[] = {"llama-tied", "qwen3moe", "gemma3", "alphabet.moe"};
    char packed[500];
    snprintf(packed, sizeof packed, "%s/data/alphabet.moe", test_root());
    for (size_t f = 0; f < 2 * MOE_COUNT(names); f++) {
        unsigned long long n = 0;
#ifdef MOE_NO_ZSTD
        if (!strcmp(names[f / 2], "alphabet.moe"))
            continue;
#endif
        for (unsigned long long fail_at = 0; fail_at <= n; fail_at++) {
            test_host h;
            host_setup(&h);
            h.fail_at = fail_at;
            moe_model_options mo = options_for(names[f / 2], &h);
            mo.copy = f % 2;
            mo.verify = true;
            if (!strcmp(names[f / 2], "alphabet.moe"))
                mo.path = packed;
            moe_model *model = (moe_model *)&mo;
            moe_session *s = NULL;
            moe_error error = {0};
            moe_session_options so = session_options(40);
            moe_status status = moe_model_open(&model, &mo, &error);
            CHECK((status == MOE_OK) == (model != NULL), "*out after %s", moe_status_name(status));
            if (!status) {
                s = (moe_session *)&mo;
                status = moe_session_open(&s, model, &so, &error);
                CHECK((status == MOE_OK) == (s != NULL), "*out after %s", moe_status_name(status));
            }
            const bool spared = mo.path == packed && status == MOE_OK; // one thread less
            CHECK(status == (fail_at && !spared ? MOE_ERR_MEMORY : MOE_OK),
                  "allocation %llu of %llu: %s: %s", fail_at, n, moe_status_name(status),
                  error.message);
            CHECK(error.status == status, "the error is another one: %s", error.message);
            moe_session_close(s);
            moe_model_close(model);
            CHECK(h.used == 0, "allocation %llu: %llu bytes leaked", fail_at,
                  (unsigned long long)h.used);
            if (fail_at == 0)
                n = h.calls;
            if (test_failures)
                return;
        }
        CHECK(n > 10, "only %llu allocations", n);
    }
}

/* The same for tokenizers, which have their own ways to fail. */
static void failing_allocations_of_tokenizers_are_survived(void)
{
    static const char *const names[] = {"alphabet.gguf", "tok_bpe_gpt2.json", "tok_bpe_marks.json",
                                        "tok_bpe_words.json", "tok_unigram.json",
                                        "tok_wordpiece.json"};
#ifdef MOE_NO_TEXT
    SKIP("there are no tokenizers");
#endif
    for (size_t f = 0; f < MOE_COUNT(names); f++) {
        unsigned long long n = 0;
        char path[500];
        snprintf(path, sizeof path, "%s/data/%s", test_root(), names[f]);
        for (unsigned long long fail_at = 0; fail_at <= n && !test_failures; fail_at++) {
            static const char text[] = "Abc \xE2\x96\x81 de\xCC\x81";
            test_host h;
            host_setup(&h);
            h.fail_at = fail_at;
            moe_model_options o = options_for("", &h);
            moe_tokenizer *tok = NULL;
            moe_error error = {0};
            moe_token ids[64];
            size_t n_ids = 0;
            o.path = path;
            moe_status status = moe_tokenizer_open(&tok, &o, &error);
            CHECK((status == MOE_OK) == (tok != NULL), "*out after %s", moe_status_name(status));
            if (tok)
                status = moe_tokenizer_encode(tok, text, sizeof text - 1, 0, ids, 64, &n_ids,
                                              &error);
            CHECK(status == (fail_at ? MOE_ERR_MEMORY : MOE_OK),
                  "%s, allocation %llu of %llu: %s: %s", names[f], fail_at, n,
                  moe_status_name(status), error.message);
            moe_tokenizer_close(tok);
            CHECK(h.used == 0, "allocation %llu: %llu bytes leaked", fail_at,
                  (unsigned long long)h.used);
            n = fail_at ? n : h.calls;
        }
        CHECK(n > 5, "%s: only %llu allocations", names[f], n);
    }
}

/* ------------------------------------------------------------------------------- callbacks -- */

static void evaluate_all(moe_model *model, uint32_t n_threads, float *logits)
{
    moe_session_options o = session_options(32);
    o.n_threads = n_threads;
    o.n_batch = 7;
    moe_session *s = open_session(model, &o);
    moe_status status = s ? moe_session_eval(s, api_tokens, 24, 24, logits) : MOE_ERR_MEMORY;
    CHECK(status == MOE_OK, "%s", moe_status_name(status));
    moe_session_close(s);
}

static uint32_t n_threads_now(void)
{
    uint32_t n = 0;
    char line[256];
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "Threads: %u", &n) == 1)
            break;
    if (f)
        fclose(f);
    return n;
}

static void hosts_threads_are_used(void)
{
    test_host h;
    host_setup(&h);
    h.host.parallel_for = host_parallel_for;
    moe_model *own = open_hosted("qwen3moe", NULL), *hosts = open_hosted("qwen3moe", &h);
    REQUIRE(own && hosts, "no model");
    size_t n = 24 * (size_t)vocab_of(own);
    float *a = calloc(n, sizeof *a), *b = calloc(n, sizeof *b);
    REQUIRE(a && b, "no memory");
    evaluate_all(own, 1, a);
    evaluate_all(own, 3, b);
    CHECK(memcmp(a, b, n * sizeof *a) == 0, "threads change the bits");
    memset(b, 0, n * sizeof *b);
    uint32_t threads = n_threads_now();
    moe_session_options o = session_options(32);
    o.n_threads = 4;
    moe_session *s = open_session(hosts, &o);
    CHECK(n_threads_now() == threads, "threads were started");
    moe_session_close(s);
    evaluate_all(hosts, 4, b);
    CHECK(memcmp(a, b, n * sizeof *a) == 0, "the host's threads change the bits");
    CHECK(h.n_parallel > 10 && h.n_tasks > 2 * h.n_parallel - 1, "%u calls, %u tasks", h.n_parallel,
          h.n_tasks);
    free(a);
    free(b);
    moe_model_close(own);
    moe_model_close(hosts);
    CHECK(h.used == 0, "leak");
}

/* A file behind a callback. It can fail, be slow, and set a cancel flag, at a given call. */
typedef struct api_source {
    const uint8_t *data;
    size_t bytes;
    uint32_t n_calls, fail_at, cancel_at;
    moe_cancel *cancel;
    bool out_of_range;
} api_source;

static int api_source_read(void *user, uint64_t offset, void *dst, size_t bytes)
{
    api_source *s = user;
    s->n_calls++;
    if (s->n_calls == s->cancel_at)
        moe_cancel_set(s->cancel);
    if (offset > s->bytes || bytes > s->bytes - offset) {
        s->out_of_range = true;
        return -1;
    }
    memcpy(dst, s->data + offset, bytes);
    return s->n_calls == s->fail_at ? 5 : 0;
}

static void callbacks_are_told(void)
{
    test_host h;
    host_setup(&h);
    moe_model_options o = options_for("qwen3moe", &h);
    o.copy = true;
    moe_model_close(open_model(&o));
    CHECK(h.n_progress > 0 && h.progress_total > 0 && h.progress_done == h.progress_total,
          "%u calls, %llu of %llu", h.n_progress, (unsigned long long)h.progress_done,
          (unsigned long long)h.progress_total);
    CHECK(!h.progress_is_wrong && !strcmp(h.stage, "load"), "stage \"%s\"", h.stage);
    CHECK(h.used == 0, "leak");

    moe_model *model = open_hosted("qwen3moe", &h);
    moe_session_options so = session_options(64);
    so.n_batch = 4;
    moe_session *s = open_session(model, &so);
    const moe_token tokens[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    h.n_progress = 0;
    CHECK(!moe_session_eval(s, tokens, 4, 0, NULL) && !h.n_progress, "one batch is no long step");
    CHECK(!moe_session_eval(s, tokens, 10, 0, NULL), "%s", moe_session_error(s)->message);
    CHECK(h.n_progress == 4 && !h.progress_is_wrong && !strcmp(h.stage, "prefill"),
          "%u calls, stage \"%s\"", h.n_progress, h.stage);
    CHECK(h.progress_done == 10 && h.progress_total == 10, "not to the end");
    moe_session_close(s);
    moe_model_close(model);
}

static void read_failures_are_reported(void)
{
    api_source file = {0};
    file.data = (uint8_t *)test_read_file(fixture_path("llama-tied"), &file.bytes);
    REQUIRE(file.data, "no fixture");
    uint32_t n = 0;
    for (uint32_t fail_at = 0; fail_at <= n; fail_at++) {
        test_host h;
        host_setup(&h);
        api_source s = file;
        s.fail_at = fail_at;
        moe_model_options o;
        moe_model_options_init(&o);
        o.host = &h.host;
        o.read = api_source_read;
        o.read_user = &s;
        o.read_bytes = file.bytes;
        moe_model *model = (moe_model *)&o;
        moe_error error = {0};
        moe_status status = moe_model_open(&model, &o, &error);
        CHECK(status == (fail_at ? MOE_ERR_IO : MOE_OK), "call %u: %s", fail_at, error.message);
        CHECK((status == MOE_OK) == (model != NULL), "*out");
        CHECK(!fail_at || strstr(error.message, "5"), "code 5 is not in \"%s\"", error.message);
        CHECK(!s.out_of_range, "read outside of the file");
        n = fail_at ? n : s.n_calls;
        moe_model_close(model);
        CHECK(h.used == 0, "leak");
    }
    CHECK(n >= 2, "%u calls", n);
    free((void *)(uintptr_t)file.data);
}

/* ------------------------------------------------------------------------------- cancelling -- */

static void load_can_be_cancelled(void)
{
    api_source file = {0};
    file.data = big_model(&file.bytes);
    uint32_t n = 0;
    for (uint32_t cancel_at = 0; cancel_at < 2 || cancel_at < n; cancel_at++) {
        test_host h;
        host_setup(&h);
        moe_cancel cancel = {0};
        api_source s = file;
        s.cancel = &cancel;
        s.cancel_at = cancel_at;
        moe_model_options o;
        moe_model_options_init(&o);
        o.host = &h.host;
        o.read = api_source_read;
        o.read_user = &s;
        o.read_bytes = file.bytes;
        o.cancel = &cancel;
        moe_model *model = (moe_model *)&o;
        moe_error error = {0};
        moe_status status = moe_model_open(&model, &o, &error);
        if (cancel_at) {
            CHECK(status == MOE_ERR_CANCELLED && !model, "call %u: %s", cancel_at, error.message);
            CHECK(s.n_calls == cancel_at, "%u more calls after the flag was set",
                  s.n_calls - cancel_at);
        } else {
            CHECK(status == MOE_OK, "%s", error.message);
            n = s.n_calls;
        }
        moe_model_close(model);
        CHECK(h.used == 0, "leak");
    }
    CHECK(n > 5, "only %u calls", n);

    moe_cancel cancel = {1};
    moe_model_options o = options_for("llama-tied", NULL);
    o.cancel = &cancel;
    moe_model *model = NULL;
    CHECK(moe_model_open(&model, &o, NULL) == MOE_ERR_CANCELLED && !model, "set before");
    moe_cancel_clear(&cancel);
    moe_model_close(open_model(&o));
    free((void *)(uintptr_t)file.data);
}

/* One long prompt, cancelled in the middle. Of several tries the fastest counts: this is about the
 * library, not about a busy machine. */
static void check_prefill_cancel(moe_model *model, uint32_t n_batch, uint32_t n_prefix)
{
    enum { LONG = 3000 };
    static moe_token prompt[LONG];
    for (uint32_t i = 0; i < LONG; i++)
        prompt[i] = (moe_token)(test_random() % vocab_of(model));
    moe_cancel cancel = {0};
    moe_session_options o = session_options(LONG + 100);
    o.n_batch = n_batch;
    o.cancel = &cancel;
    moe_session *s = open_session(model, &o), *fresh = open_session(model, &o);
    REQUIRE(s && fresh, "no session");
    size_t n_vocab = vocab_of(model);
    float *a = calloc(n_vocab, sizeof *a), *b = calloc(n_vocab, sizeof *b);
    REQUIRE(a && b, "no memory");
    CHECK(moe_session_eval(s, api_tokens, n_prefix, 0, NULL) == MOE_OK, "prefix");

    const double limit_ms = 100.0 * test_slowness();
    double best = 1e9;
    for (int attempt = 0; attempt < 8 && best > limit_ms; attempt++) {
        later l;
        cancel_later(&l, &cancel, 60);
        moe_status status = moe_session_eval(s, prompt, LONG, 1, a);
        double end = now_ms();
        pthread_join(l.thread, NULL);
        CHECK(status == MOE_ERR_CANCELLED, "%s", moe_status_name(status));
        CHECK(moe_session_error(s)->status == MOE_ERR_CANCELLED, "no error");
        CHECK(moe_session_length(s) == n_prefix, "length %u", moe_session_length(s));
        best = MOE_MIN(best, end - l.set_at_ms);
        status = moe_session_eval(s, api_tokens, 1, 0, NULL);
        CHECK(status == MOE_ERR_CANCELLED, "the flag stays set: %s", moe_status_name(status));
        moe_cancel_clear(&cancel);
    }
    CHECK(best <= limit_ms, "n_batch %u: returned after %.0f ms", n_batch, best);
    for (size_t i = 0; i < n_vocab; i++)
        CHECK(a[i] == 0, "logits were written");

    /* The session goes on as if nothing had been. */
    CHECK(moe_session_eval(s, api_tokens + n_prefix, 9, 1, a) == MOE_OK, "after the cancel");
    CHECK(moe_session_eval(fresh, api_tokens, n_prefix + 9, 1, b) == MOE_OK, "fresh");
    CHECK(moe_session_length(s) == n_prefix + 9, "length");
    CHECK(memcmp(a, b, n_vocab * sizeof *a) == 0, "another result after a cancel");
    free(a);
    free(b);
    moe_session_close(s);
    moe_session_close(fresh);
}

static void prefill_can_be_cancelled(void)
{
    size_t bytes;
    uint8_t *data = big_model(&bytes);
    moe_model *model = open_memory(data, bytes, NULL);
    REQUIRE(model, "no model");
    check_prefill_cancel(model, 64, 0);
    check_prefill_cancel(model, 512, 11);
    check_prefill_cancel(model, 4096, 3);
    moe_model_close(model);
    free(data);
}

/* -------------------------------------------------------------------------------- lifetime -- */

static void sessions_close_in_any_order(void)
{
    for (int order = 0; order < 6; order++) {
        test_host h;
        host_setup(&h);
        moe_model *model = open_hosted("gemma3", &h);
        REQUIRE(model, "no model");
        moe_session *s[3];
        for (int i = 0; i < 3; i++) {
            moe_session_options o = session_options(16 << i);
            o.n_threads = (uint32_t)(1 + i);
            s[i] = open_session(model, &o);
            CHECK(s[i] && moe_session_eval(s[i], api_tokens, (size_t)(4 + i), 0, NULL) == MOE_OK,
                  "eval");
        }
        int first = order % 3, second = (first + 1 + order / 3) % 3, third = 3 - first - second;
        moe_session_close(s[first]);
        CHECK(moe_session_eval(s[second], api_tokens, 3, 0, NULL) == MOE_OK, "one was closed");
        moe_session_close(s[second]);
        CHECK(moe_session_eval(s[third], api_tokens, 3, 0, NULL) == MOE_OK, "two were closed");
        moe_session_close(s[third]);
        moe_model_close(model);
        CHECK(h.used == 0, "%llu bytes leaked", (unsigned long long)h.used);
    }
}

static void metadata_can_be_listed(void)
{
    moe_model *model = open_hosted("llama-tied", NULL);
    REQUIRE(model, "no model");
    bool found = false;
    for (size_t i = 0; i < moe_model_meta_count(model); i++) {
        char value[64], small[3] = "xx";
        size_t n = moe_model_meta_value(model, i, value, sizeof value);
        CHECK(n == strlen(value) || n >= sizeof value, "length %zu of \"%s\"", n, value);
        CHECK(moe_model_meta_value(model, i, NULL, 0) == n, "length without a buffer");
        CHECK(moe_model_meta_value(model, i, small, sizeof small) == n, "length with a small one");
        CHECK(strlen(small) == MOE_MIN(n, 2) && !memcmp(small, value, strlen(small)), "%s", small);
        if (!strcmp(moe_model_meta_key(model, i), "llama.block_count"))
            found = !strcmp(value, "3");
    }
    CHECK(found, "llama.block_count is not 3");
    // every size of buffer: as much of the text as fits, a NUL, and nothing behind it
    for (size_t i = 0; i < moe_model_meta_count(model); i++) {
        char whole[64], part[66];
        const size_t n = moe_model_meta_value(model, i, whole, sizeof whole);
        for (size_t size = 1; size < n + 2 && n < sizeof whole; size++) {
            memset(part, 'x', sizeof part);
            CHECK(moe_model_meta_value(model, i, part, size) == n, "%s in %zu", whole, size);
            CHECK(!part[MOE_MIN(n, size - 1)] && !memcmp(part, whole, MOE_MIN(n, size - 1)) &&
                      part[size] == 'x', "\"%.65s\" of \"%s\" in %zu", part, whole, size);
        }
    }
    moe_tensor_info info = {.size = sizeof info};
    bool embedding = false;
    for (size_t i = 0; i < moe_model_tensor_count(model); i++) {
        CHECK(moe_model_tensor(model, i, &info) == MOE_OK, "tensor %zu", i);
        if (!strcmp(info.name, "token_embd.weight"))
            embedding = info.n_dims == 2 && info.dims[0] == 42 && info.dims[1] == 131 &&
                        info.bytes == 4 * 42 * 131 && !strcmp(info.type, "F32");
        CHECK(info.error < 0 && info.error_worst < 0, "%s: a GGUF file says nothing of errors",
              info.name);
    }
    CHECK(embedding, "token_embd.weight");
    CHECK(moe_model_tensor(model, moe_model_tensor_count(model), &info) == MOE_ERR_ARGUMENT, "end");
    CHECK(moe_model_tensor(model, SIZE_MAX, &info) == MOE_ERR_ARGUMENT, "far beyond the end");
    CHECK(moe_model_tokenizer(model) == NULL, "this file has no tokenizer");
    moe_model_close(model);
}

/* Arrays of numbers, truth values and strings as text, in buffers of any size. */
static void arrays_of_metadata_are_listed(void)
{
    static const struct { const char *file, *key, *text; } cases[] = {
        {"fixtures/lfm2moe-4.gguf", "lfm2moe.attention.head_count_kv", "[3] 0, 3, 0"},
        {"fixtures/gemma4.gguf", "gemma4.attention.sliding_window_pattern",
         "[4] true, true, false, false"},
        {"fixtures/gemma4.gguf", "gemma4.final_logit_softcapping", "4"},
        {"data/alphabet.gguf", "tokenizer.ggml.tokens", "[259] \u0100, \u0101, "},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        char path[512], part[64];
        snprintf(path, sizeof path, "%s/%s", test_root(), cases[i].file);
        moe_model_options o;
        moe_model_options_init(&o);
        o.path = path;
        moe_model *model = open_model(&o);
        REQUIRE(model, "no model");
        size_t k = 0;
        while (k < moe_model_meta_count(model) &&
               strcmp(moe_model_meta_key(model, k), cases[i].key))
            k++;
        const size_t n = strlen(cases[i].text), whole = moe_model_meta_value(model, k, NULL, 0);
        CHECK(i == 3 ? whole > n : whole == n, "%s: %zu bytes", cases[i].key, whole);
        for (size_t size = 1; size <= n + 1; size++) {
            memset(part, 'x', sizeof part);
            CHECK(moe_model_meta_value(model, k, part, size) == whole, "%s", cases[i].key);
            CHECK(strlen(part) == size - 1 && !memcmp(part, cases[i].text, size - 1) &&
                      part[size] == 'x', "\"%.63s\" of \"%s\" in %zu", part, cases[i].text, size);
        }
        CHECK(moe_model_meta_value(model, moe_model_meta_count(model), part, 9) == 0 && !part[0],
              "behind the last key");
        moe_model_close(model);
    }
}

static void vocab_only_has_no_sessions(void)
{
    moe_model_options o = options_for("llama-tied", NULL);
    o.vocab_only = true;
    moe_model *model = open_model(&o);
    REQUIRE(model, "no model");
    moe_session_options so = session_options(16);
    moe_memory_estimate estimate = {.size = sizeof estimate};
    moe_session *s = (moe_session *)&so;
    moe_error error = {0};
    moe_status status = moe_session_open(&s, model, &so, &error);
    CHECK(status != MOE_OK && !s && error.message[0], "%s", moe_status_name(status));
    CHECK(moe_session_estimate(model, &so, &estimate, &error) == status, "estimate");
    CHECK(moe_model_meta_count(model) > 5, "no metadata");
    moe_model_close(model);
}

TEST_PROGRAM(api)
{
    RUN(every_status_has_a_name);
    RUN(model_options_are_versioned);
    RUN(session_options_are_versioned);
    RUN(results_are_versioned);
    RUN(null_is_an_argument_error);
    RUN(sources_are_exclusive);
    RUN(session_options_are_checked);
    RUN(refused_evals_change_nothing);
    RUN(estimate_is_what_is_allocated);
    RUN(a_session_may_fill_the_ceiling);
    RUN(too_long_a_context_is_refused);
    RUN(ceiling_holds);
    RUN(failing_allocations_are_survived);
    RUN(failing_allocations_of_tokenizers_are_survived);
    RUN(hosts_threads_are_used);
    RUN(callbacks_are_told);
    RUN(read_failures_are_reported);
    RUN(load_can_be_cancelled);
    RUN(prefill_can_be_cancelled);
    RUN(sessions_close_in_any_order);
    RUN(metadata_can_be_listed);
    RUN(arrays_of_metadata_are_listed);
    RUN(vocab_only_has_no_sessions);
}
