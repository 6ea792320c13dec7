/* tests/test_threads.c - what several threads may do at the same time: use one model, each with a
 * session, a sampler and a decoder of its own; open and close sessions beside running ones; open
 * models; cancel one another. The results are the bits of a single thread.
 *
 * Made for ThreadSanitizer (make test SAN=tsan T=threads), and of use without it. */
#include "test.h"

#include "models.h"

#include <pthread.h>

enum { N_JOBS = 4, JOB_PROMPT = 20, N_STEPS = 12, MAX_VOCAB = 512 };

/* -------------------------------------------------------------------------------- generation -- */

/* What one thread does: a prompt, then a few sampled tokens; and what came out. */
typedef struct job {
    moe_model *model;
    const moe_tokenizer *tokenizer; // may be NULL
    uint32_t seed, n_threads, n_batch;
    uint64_t hash; // of all logits, tokens and text
    moe_status status;
} job;

static void job_hash(uint64_t *hash, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < bytes; i++)
        *hash = (*hash ^ p[i]) * 0x100000001b3u;
}

static void hash_text(job *j, moe_decoder *decoder, moe_token token)
{
    char text[256];
    if (!j->tokenizer)
        return;
    size_t n = moe_tokenizer_decode(j->tokenizer, decoder, token, text, sizeof text);
    job_hash(&j->hash, text, MOE_MIN(n, sizeof text));
}

/* The prompt: text through the tokenizer if there is one, else numbers. */
static size_t make_prompt(job *j, moe_token *prompt, uint32_t n_vocab)
{
    size_t n = 0;
    char text[64];
    if (!j->tokenizer) {
        for (; n < JOB_PROMPT; n++)
            prompt[n] = (moe_token)((j->seed * 7919u + (uint32_t)n * 104729u) % n_vocab);
        return n;
    }
    int bytes = snprintf(text, sizeof text, "h\xc3\xa9llo xyz %c", (int)('b' + 3 * j->seed));
    j->status = moe_tokenizer_encode(j->tokenizer, text, (size_t)bytes, MOE_ENCODE_ADD_SPECIAL,
                                     prompt, JOB_PROMPT, &n, NULL);
    return n;
}

static moe_status job_generate(job *j, moe_session *session, moe_sampler *sampler)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(j->model, &info);
    moe_token tokens[JOB_PROMPT];
    moe_decoder decoder = {0};
    float logits[MAX_VOCAB];
    if (info.n_vocab > MAX_VOCAB)
        return MOE_ERR_LIMIT;
    size_t n = make_prompt(j, tokens, info.n_vocab);
    for (int step = 0; step < N_STEPS && !j->status; step++) {
        moe_status status = moe_session_eval(session, tokens, n, 1, logits);
        if (!status)
            status = moe_sampler_pick(sampler, logits, &tokens[0]);
        if (status)
            return status;
        n = 1;
        job_hash(&j->hash, logits, info.n_vocab * sizeof *logits);
        job_hash(&j->hash, &tokens[0], sizeof tokens[0]);
        hash_text(j, &decoder, tokens[0]);
    }
    return j->status;
}

static void *run_job(void *arg)
{
    job *j = arg;
    moe_session *session = NULL;
    moe_sampler *sampler = NULL;
    moe_session_options so;
    moe_session_options_init(&so);
    so.n_ctx = JOB_PROMPT + N_STEPS;
    so.n_threads = j->n_threads;
    so.n_batch = j->n_batch;
    moe_sampler_options to;
    moe_sampler_options_init(&to);
    to.temperature = 0.9f;
    to.top_p = 0.95f;
    to.repetition_penalty = 1.1f;
    to.seed = j->seed;
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(j->model, &info);
    j->hash = 0xcbf29ce484222325u;
    j->status = moe_session_open(&session, j->model, &so, NULL);
    if (!j->status)
        j->status = moe_sampler_new(&sampler, info.n_vocab, &to, NULL, NULL);
    if (!j->status)
        j->status = job_generate(j, session, sampler);
    moe_sampler_free(sampler);
    moe_session_close(session);
    return NULL;
}

/* ------------------------------------------------------------------------------------- tests -- */

static moe_model *open_for_jobs(const char *folder, const char *name, uint64_t limit)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s/%s.gguf", test_root(), folder, name);
    moe_model_options o;
    moe_model_options_init(&o);
    o.path = path;
    o.memory_limit_bytes = limit;
    return open_model(&o);
}

/* The same jobs one after another and all at once, each time with other numbers of threads. */
static void compare_alone_and_together(moe_model *model, const moe_tokenizer *tokenizer)
{
    uint64_t alone[N_JOBS];
    for (uint32_t i = 0; i < N_JOBS; i++) {
        job j = {.model = model, .tokenizer = tokenizer, .seed = i, .n_threads = 1, .n_batch = 64};
        run_job(&j);
        CHECK(j.status == MOE_OK, "%s", moe_status_name(j.status));
        alone[i] = j.hash;
        CHECK(i == 0 || alone[i] != alone[i - 1], "two seeds gave the same");
    }
    for (uint32_t round = 0; round < 2; round++) {
        pthread_t thread[N_JOBS];
        job jobs[N_JOBS];
        for (uint32_t i = 0; i < N_JOBS; i++) {
            jobs[i] = (job){.model = model, .tokenizer = tokenizer, .seed = i,
                            .n_threads = 1 + (i + round) % 3, .n_batch = 1 + 6 * ((i + round) % 4)};
            CHECK(pthread_create(&thread[i], NULL, run_job, &jobs[i]) == 0, "no thread");
        }
        for (uint32_t i = 0; i < N_JOBS; i++) {
            pthread_join(thread[i], NULL);
            CHECK(jobs[i].status == MOE_OK, "%s", moe_status_name(jobs[i].status));
            CHECK(jobs[i].hash == alone[i], "job %u in round %u: other bits than alone", i, round);
        }
    }
}

static void sessions_share_a_model(void)
{
    static const char *const names[] = {"llama-tied", "qwen3moe-q", "gemma3"};
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        moe_model *model = open_for_jobs("fixtures", names[i], 0);
        REQUIRE(model, "%s", names[i]);
        compare_alone_and_together(model, NULL);
        moe_model_close(model);
    }
}

static void threads_share_a_tokenizer(void)
{
#ifdef MOE_NO_TEXT
    SKIP("this build has no tokenizers");
#else
    moe_model *model = open_for_jobs("data", "alphabet", 0);
    REQUIRE(model && moe_model_tokenizer(model), "no tokenizer");
    compare_alone_and_together(model, moe_model_tokenizer(model));
    moe_model_close(model);
#endif
}

/* Under a ceiling that not all sessions fit into: some are refused, the others are right, and the
 * sum is never over it. */
static void *open_and_close(void *arg)
{
    job *j = arg;
    for (int i = 0; i < 25; i++) {
        moe_session *session = NULL;
        moe_session_options o;
        moe_session_options_init(&o);
        o.n_ctx = 64 + 32 * (uint32_t)(i % 5);
        o.n_threads = 1 + (uint32_t)i % 2;
        o.n_batch = 16;
        moe_error error = {0};
        moe_status status = moe_session_open(&session, j->model, &o, &error);
        if (status == MOE_OK) {
            j->n_batch++;
            status = moe_session_eval(session, (moe_token[]){1, 2, 3}, 3, 0, NULL);
        } else if (status == MOE_ERR_LIMIT) {
            j->n_threads++;
            status = error.message[0] ? MOE_OK : MOE_ERR_FORMAT;
        }
        j->status = status ? status : j->status;
        moe_session_close(session);
    }
    return NULL;
}

static void sessions_compete_for_memory(void)
{
    moe_model *probe = open_for_jobs("fixtures", "llama-tied", 0);
    REQUIRE(probe, "no model");
    moe_session_options o;
    moe_session_options_init(&o);
    o.n_ctx = 192;
    o.n_threads = 2;
    o.n_batch = 16;
    moe_memory_estimate e = {.size = sizeof e};
    CHECK(moe_session_estimate(probe, &o, &e, NULL) == MOE_OK, "estimate");
    uint64_t limit = probe->mem.used_bytes + 2 * e.total_bytes;
    moe_model_close(probe);

    moe_model *model = open_for_jobs("fixtures", "llama-tied", limit);
    REQUIRE(model, "no model");
    uint64_t before = model->mem.used_bytes;
    pthread_t thread[N_JOBS];
    job jobs[N_JOBS] = {{0}};
    uint32_t n_opened = 0;
    for (uint32_t i = 0; i < N_JOBS; i++) {
        jobs[i].model = model;
        CHECK(pthread_create(&thread[i], NULL, open_and_close, &jobs[i]) == 0, "no thread");
    }
    for (uint32_t i = 0; i < N_JOBS; i++) {
        pthread_join(thread[i], NULL);
        CHECK(jobs[i].status == MOE_OK, "%s", moe_status_name(jobs[i].status));
        n_opened += jobs[i].n_batch;
        CHECK(jobs[i].n_batch + jobs[i].n_threads == 25, "%u + %u", jobs[i].n_batch,
              jobs[i].n_threads);
    }
    CHECK(n_opened > 0, "no session was opened");
    CHECK(model->mem.peak_bytes <= limit, "peak %llu over %llu",
          (unsigned long long)model->mem.peak_bytes, (unsigned long long)limit);
    CHECK(model->mem.used_bytes == before, "%llu bytes leaked",
          (unsigned long long)(model->mem.used_bytes - before));
    moe_model_close(model);
}

/* Models are opened, asked and closed by several threads; nothing in the library is shared. */
static void *open_models(void *arg)
{
    job *j = arg;
    for (int i = 0; i < 6; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/fixtures/%s.gguf", test_root(),
                 i % 2 ? "qwen3" : "mixtral");
        moe_model_options o;
        moe_model_options_init(&o);
        o.path = path;
        o.copy = i % 3 == 0;
        j->status = moe_model_open(&j->model, &o, NULL);
        if (j->status)
            return NULL;
        j->n_threads = 1 + (uint32_t)i % 2;
        run_job(j);
        moe_model_close(j->model);
        if (j->status)
            return NULL;
    }
    return NULL;
}

static void models_are_opened_side_by_side(void)
{
    pthread_t thread[N_JOBS];
    job jobs[N_JOBS] = {{0}};
    for (uint32_t i = 0; i < N_JOBS; i++) {
        jobs[i].n_batch = 8;
        CHECK(pthread_create(&thread[i], NULL, open_models, &jobs[i]) == 0, "no thread");
    }
    for (uint32_t i = 0; i < N_JOBS; i++) {
        pthread_join(thread[i], NULL);
        CHECK(jobs[i].status == MOE_OK, "%s", moe_status_name(jobs[i].status));
        CHECK(jobs[i].hash == jobs[0].hash, "other bits");
    }
}

/* A flag that another thread sets and clears, at first all the time, then less and less often: each
 * call either works or says that it was cancelled, and the sequence is then as it was. */
typedef struct flicker {
    moe_cancel cancel;
    atomic_bool stop;
} flicker;

static void *flicker_run(void *arg)
{
    flicker *f = arg;
    for (uint64_t wait_ns = 10000; !atomic_load(&f->stop); wait_ns += wait_ns / 8) {
        moe_cancel_set(&f->cancel);
        plat_yield();
        moe_cancel_clear(&f->cancel);
        uint64_t end = plat_time_ns() + MOE_MIN(wait_ns, 5000000000u);
        while (plat_time_ns() < end && !atomic_load(&f->stop))
            plat_yield();
    }
    return NULL;
}

static void another_thread_cancels(void)
{
    moe_model *model = open_for_jobs("fixtures", "qwen3moe", 0);
    REQUIRE(model, "no model");
    static flicker f;
    moe_session *disturbed = NULL, *quiet = NULL;
    moe_session_options o;
    moe_session_options_init(&o);
    o.n_ctx = 64;
    o.n_threads = 3;
    o.n_batch = 5;
    CHECK(moe_session_open(&quiet, model, &o, NULL) == MOE_OK, "no session");
    o.cancel = &f.cancel;
    CHECK(moe_session_open(&disturbed, model, &o, NULL) == MOE_OK, "no session");
    REQUIRE(quiet && disturbed, "no session");

    moe_token tokens[16];
    static float a[16 * MAX_VOCAB], b[16 * MAX_VOCAB];
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    REQUIRE(info.n_vocab <= MAX_VOCAB, "%u tokens", info.n_vocab);
    for (int i = 0; i < 16; i++)
        tokens[i] = (moe_token)(test_random() % info.n_vocab);
    CHECK(moe_session_eval(quiet, tokens, 16, 16, b) == MOE_OK, "quiet");

    pthread_t thread;
    uint32_t n_ok = 0, n_cancelled = 0;
    CHECK(pthread_create(&thread, NULL, flicker_run, &f) == 0, "no thread");
    uint64_t end = plat_time_ns() + 60000000000u;
    while ((n_ok < 5 || n_cancelled < 3) && plat_time_ns() < end) {
        moe_status status = moe_session_eval(disturbed, tokens, 16, 16, a);
        if (status == MOE_OK) {
            n_ok++;
            CHECK(memcmp(a, b, 16 * info.n_vocab * sizeof *a) == 0, "other bits");
            CHECK(moe_session_rewind(disturbed, 0) == MOE_OK, "rewind");
        } else {
            n_cancelled++;
            CHECK(status == MOE_ERR_CANCELLED, "%s", moe_status_name(status));
            CHECK(moe_session_length(disturbed) == 0, "length %u", moe_session_length(disturbed));
        }
    }
    atomic_store(&f.stop, true);
    pthread_join(thread, NULL);
    CHECK(n_ok && n_cancelled, "%u worked, %u were cancelled", n_ok, n_cancelled);
    moe_session_close(quiet);
    moe_session_close(disturbed);
    moe_model_close(model);
}

/* ------------------------------------------------------------------------------ the pool -- */

enum { POOL_JOBS = 5000, POOL_PHASES = 4 };

typedef struct pool_work {
    uint32_t n_task;
    _Atomic uint32_t counts[POOL_PHASES]; // tasks that were run
} pool_work;

static uint32_t pool_n_task(void *arg, uint32_t phase)
{
    (void)phase;
    return ((const pool_work *)arg)->n_task;
}

static void pool_count(void *arg, uint32_t phase, uint32_t task, uint32_t thread)
{
    (void)task, (void)thread;
    atomic_fetch_add(&((pool_work *)arg)->counts[phase], 1);
}

/* More threads than cores go to sleep at every barrier. One lost wake-up would stop them all. */
static void sleeping_threads_are_woken(void)
{
    const uint32_t n_threads = plat_n_cores() + 1;
    pool_work work = {.n_task = n_threads};
    const cpu_job phases = {&work, POOL_PHASES, pool_count, pool_n_task, NULL};
    moe_mem mem = {0};
    cpu_pool pool;
    mem_init(&mem, NULL, 0);
    REQUIRE(cpu_pool_open(&pool, n_threads, &mem, NULL) == MOE_OK, "%u threads", n_threads);
    for (uint32_t i = 0; i < POOL_JOBS; i++)
        cpu_pool_run(&pool, &phases);
    for (uint32_t i = 0; i < POOL_PHASES; i++)
        CHECK(work.counts[i] == POOL_JOBS * n_threads, "phase %u: %u tasks", i, work.counts[i]);
    cpu_pool_close(&pool);
}

TEST_PROGRAM(threads)
{
    RUN(sleeping_threads_are_woken);
    RUN(sessions_share_a_model);
    RUN(threads_share_a_tokenizer);
    RUN(sessions_compete_for_memory);
    RUN(models_are_opened_side_by_side);
    RUN(another_thread_cancels);
}
