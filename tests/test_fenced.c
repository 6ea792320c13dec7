/* tests/test_fenced.c - the fence of tests/fenced_backend.h is real, and its checks do check.
 *
 * That the models run behind it is shown by tests/test_forward.c. */
#include "test.h"

#include "fenced_backend.h"

#include <signal.h>
#include <sys/wait.h>

/* ---------------------------------------------------------------------------------- helpers -- */

typedef struct bench {
    moe_mem mem;
    const moe_backend *backend;
    moe_device *device;
    moe_queue *queue;
} bench;

static bool bench_open(bench *b, const moe_backend *backend)
{
    memset(b, 0, sizeof *b);
    mem_init(&b->mem, NULL, 0);
    b->backend = backend;
    moe_error error = {0};
    moe_device_options device = {.mem = &b->mem};
    moe_queue_options queue = {.n_threads = 2, .n_tok_max = 4, .n_expert_max = 2, .n_used_max = 2,
                               .n_head_max = 4, .n_slot_max = 8, .dim_max = 32};
    for (int act = 0; act < MOE_ACT_COUNT; act++)
        queue.rows.matmul[act] = queue.rows.experts[act] = queue.rows.heads[act] = 64;
    bool ok = backend->device_open(&b->device, &device, &error) == MOE_OK &&
              backend->queue_open(&b->queue, b->device, &queue, &error) == MOE_OK;
    CHECK(ok, "%s", error.message);
    return ok;
}

static void bench_close(bench *b)
{
    b->backend->queue_close(b->queue);
    b->backend->device_close(b->device);
    CHECK(b->mem.used_bytes == 0, "%llu bytes leaked", (unsigned long long)b->mem.used_bytes);
}

static moe_view bench_new(bench *b, uint64_t bytes)
{
    moe_buffer *buffer = NULL;
    moe_error error = {0};
    CHECK(b->backend->buffer_new(b->device, bytes, &buffer, &error) == MOE_OK, "%s", error.message);
    return (moe_view){buffer, 0};
}

static moe_view bench_wrap(bench *b, const void *data, uint64_t bytes)
{
    moe_buffer *buffer = NULL;
    moe_error error = {0};
    CHECK(b->backend->buffer_wrap(b->device, data, bytes, &buffer, &error) == MOE_OK, "%s",
          error.message);
    return (moe_view){buffer, 0};
}

static void bench_free(bench *b, moe_view view)
{
    b->backend->buffer_free(b->device, view.buffer);
}

/* How a child that touches the byte ends: the signal, or 0 if it lives. */
static int signal_of_touch(volatile uint8_t *p, bool writes)
{
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); // not a sanitizer's handler
        signal(SIGBUS, SIG_DFL);
        uint8_t x = *p;
        if (writes)
            *p = x;
        _exit(0);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork failed");
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static bool faults(const volatile uint8_t *p)
{
    int signal_number = signal_of_touch((volatile uint8_t *)(uintptr_t)p, false);
    return signal_number == SIGSEGV || signal_number == SIGBUS;
}

/* ----------------------------------------------------------------------------------- fence -- */

static void host_cannot_touch_memory(void)
{
    bench b;
    float zeros[64] = {0}, data[64], back[64] = {0};
    for (int i = 0; i < 64; i++)
        data[i] = (float)i;
    REQUIRE(bench_open(&b, fenced_backend()), "no backend");
    moe_view fresh = bench_new(&b, sizeof data), weights = bench_wrap(&b, data, sizeof data);
    fenced_buffer *f = (fenced_buffer *)fresh.buffer, *w = (fenced_buffer *)weights.buffer;

    CHECK(signal_of_touch((uint8_t *)zeros, true) == 0, "ordinary memory must not fault");
    CHECK(w->memory != (uint8_t *)data, "weights were not copied");
    for (int round = 0; round < 2; round++) { // before and after the backend ran
        CHECK(faults(f->memory) && faults(f->memory + sizeof data - 1), "a buffer can be read");
        CHECK(faults(w->memory) && faults(w->memory + sizeof data - 1), "weights can be read");
        CHECK(b.backend->write(b.queue, fresh, zeros, sizeof zeros) == MOE_OK, "write");
        b.backend->add(b.queue, &(moe_add_op){fresh, fresh, weights, 64, 2});
        CHECK(faults(f->memory), "a buffer can be read while work is recorded");
        CHECK(b.backend->read(b.queue, fresh, back, sizeof back, NULL) == MOE_OK, "read");
        for (int i = 0; i < 64; i++)
            CHECK(back[i] == 2 * (float)i, "element %d is %g", i, (double)back[i]);
    }
    fenced_device *d = (fenced_device *)b.device;
    fenced_buffer *both[2] = {f, w};
    fenced_open(d, both, 2); // as two queues would that run at the same time
    fenced_open(d, both, 1);
    CHECK(!faults(f->memory) && !faults(w->memory), "the fence does not open");
    CHECK(signal_of_touch(f->memory, true) == 0, "a buffer cannot be written");
    CHECK(signal_of_touch(w->memory, true) != 0, "weights can be written");
    CHECK(faults(f->memory + 256) && faults(w->memory + 256), "no guard behind a buffer");
    fenced_shut(d, both, 2);
    CHECK(!faults(f->memory) && faults(w->memory), "shut for a queue that still runs");
    fenced_shut(d, both, 1);
    CHECK(faults(f->memory), "not shut again");
    bench_free(&b, fresh);
    bench_free(&b, weights);
    bench_close(&b);
}

static void fresh_memory_is_nan(void)
{
    bench b;
    float back[33];
    memset(back, 0, sizeof back);
    REQUIRE(bench_open(&b, fenced_backend()), "no backend");
    moe_view fresh = bench_new(&b, sizeof back);
    CHECK(b.backend->read(b.queue, fresh, back, sizeof back, NULL) == MOE_OK, "read");
    for (int i = 0; i < 33; i++)
        CHECK(isnan(back[i]), "element %d is %g", i, (double)back[i]);
    bench_free(&b, fresh);
    bench_close(&b);
}

/* More operations than the queue holds, with a write in between, in their order. */
static void recording_keeps_the_order(void)
{
    bench b;
    float one[16], back[16] = {0};
    for (int i = 0; i < 16; i++)
        one[i] = 1;
    REQUIRE(bench_open(&b, fenced_backend()), "no backend");
    moe_view x = bench_new(&b, sizeof one), y = bench_new(&b, sizeof one);
    b.backend->write(b.queue, x, one, sizeof one);
    b.backend->write(b.queue, y, one, sizeof one);
    for (int i = 0; i < 400; i++) // x = 1 + 400
        b.backend->add(b.queue, &(moe_add_op){x, x, y, 16, 1});
    one[0] = 5;
    b.backend->write(b.queue, y, one, sizeof one); // after what was recorded
    for (int i = 0; i < 10; i++)
        b.backend->add(b.queue, &(moe_add_op){x, x, y, 16, 1});
    CHECK(b.backend->read(b.queue, x, back, sizeof back, NULL) == MOE_OK, "read");
    CHECK(back[0] == 451 && back[1] == 411 && back[15] == 411, "%g %g", (double)back[0],
          (double)back[1]);
    CHECK(((fenced_queue *)b.queue)->n_runs == 410, "not all were run");
    bench_free(&b, x);
    bench_free(&b, y);
    bench_close(&b);
}

/* What the backend refuses: each breach is reported once by submit, with the operation's name, and
 * the queue can be used again. */
static void breaches_are_reported(void)
{
    bench b, other;
    static float table[64 * 64];
    REQUIRE(bench_open(&b, fenced_backend()) && bench_open(&other, fenced_backend()), "no backend");
    moe_view x = bench_new(&b, 1024), y = bench_new(&b, 1024), far = bench_new(&other, 1024);
    moe_view data = bench_wrap(&b, table, sizeof table), none = {0};
    moe_weight w = {.name = "w", .quant = quant_by_name("F32"), .dims = {64, 4, 1},
                    .row_bytes = 256, .matrix_bytes = 1024, .data = data};
    moe_weight wide = w, longer = w;
    wide.dims[1] = 65, wide.matrix_bytes = 65 * 256;
    longer.dims[0] = 65, longer.row_bytes = 260, longer.matrix_bytes = 2048;
    moe_cache cache = {x, MOE_CACHE_F16, 2, 4, 32};
    const moe_backend *f = b.backend;
    for (int i = 0; i < 24; i++) {
        const char *op = i < 7    ? "add"
                         : i < 12 ? "matmul"
                         : i < 14 ? "attend"
                         : i < 17 ? "norm"
                         : i < 20 ? "heads"
                         : i < 22 ? "copy"
                                  : "attend";
        switch (i) {
        case 0: f->add(b.queue, &(moe_add_op){x, x, y, 257, 1}); break;
        case 1: f->add(b.queue, &(moe_add_op){x, x, view_at(y, 4), 256, 1}); break;
        case 2: f->add(b.queue, &(moe_add_op){x, x, view_at(y, 2), 16, 1}); break;
        case 3: f->add(b.queue, &(moe_add_op){x, x, far, 16, 1}); break;
        case 4: f->add(b.queue, &(moe_add_op){x, x, none, 16, 1}); break;
        case 5: f->add(b.queue, &(moe_add_op){data, x, y, 16, 1}); break;
        case 6: f->add(b.queue, &(moe_add_op){x, view_at(x, 8), y, 16, 1}); break;
        case 7: f->matmul(b.queue, &(moe_matmul_op){x, 5, 1, {{&w, none, y, false}}}); break;
        case 8: f->matmul(b.queue, &(moe_matmul_op){x, 1, 1, {{&w, none, x, false}}}); break;
        case 9: f->matmul(b.queue, &(moe_matmul_op){x, 1, 1, {{&wide, none, y, false}}}); break;
        case 10: f->matmul(b.queue, &(moe_matmul_op){x, 1, 1, {{&longer, none, y, false}}}); break;
        case 11: f->matmul(b.queue, &(moe_matmul_op){x, 0, 1, {{&w, none, y, false}}}); break;
        case 12: // position 4 has overwritten position 0 in a cache of 4
            f->attend(b.queue, &(moe_attend_op){y, view_at(y, 512), &cache, &cache, none, 1, 4, 2,
                                                0, 1, 0, 0, NULL, NULL});
            break;
        case 13: // three heads on two
            f->attend(b.queue, &(moe_attend_op){y, view_at(y, 512), &cache, &cache, none, 1, 0, 3,
                                                0, 1, 0, 0, NULL, NULL});
            break;
        case 14: f->norm(b.queue, &(moe_norm_op){x, y, none, 5, 64, 64, 64, 1e-5f, false}); break;
        case 15: f->norm(b.queue, &(moe_norm_op){x, y, none, 2, 64, 32, 64, 1e-5f, false}); break;
        case 16: f->norm(b.queue, &(moe_norm_op){x, y, far, 1, 64, 64, 64, 1e-5f, false}); break;
        case 17: f->heads(b.queue, &(moe_heads_op){x, y, &w, 5, 64, 64}); break;
        case 18: f->heads(b.queue, &(moe_heads_op){x, y, &w, 2, 64, 63}); break;
        case 19: f->heads(b.queue, &(moe_heads_op){x, y, &w, 2, 3, 64}); break;
        case 20: f->copy(b.queue, &(moe_copy_op){x, y, 3, 65, 96, 96}); break;
        case 21: f->copy(b.queue, &(moe_copy_op){x, view_at(x, 64), 1, 17, 17, 17}); break;
        case 22: // expanded, which the queue was not opened for
            f->attend(b.queue, &(moe_attend_op){y, view_at(y, 512), &cache, &cache, none, 1, 0, 2,
                                                0, 1, 0, 0, &w, &w});
            break;
        default: // values longer than the cache's
            f->attend(b.queue, &(moe_attend_op){y, view_at(y, 512), &cache, &cache, none, 1, 0, 2,
                                                0, 1, 0, 33, NULL, NULL});
            break;
        }
        moe_error error = {0};
        moe_status status = f->submit(b.queue, &error);
        CHECK(status == MOE_ERR_BACKEND && !strcmp(error.subject, op), "case %d: %s, \"%s\"", i,
              moe_status_name(status), error.message);
        f->add(b.queue, &(moe_add_op){x, x, y, 16, 1});
        CHECK(f->submit(b.queue, &error) == MOE_OK, "case %d left the queue broken", i);
    }
    CHECK(f->write(b.queue, view_at(x, 1020), table, 8) == MOE_ERR_BACKEND, "write past the end");
    CHECK(f->submit(b.queue, NULL) == MOE_ERR_BACKEND, "a failed write is forgotten");
    CHECK(f->read(b.queue, view_at(x, 1020), table, 8, NULL) == MOE_ERR_BACKEND, "read past it");
    bench_free(&b, x);
    bench_free(&b, y);
    bench_free(&b, data);
    bench_free(&other, far);
    bench_close(&b);
    bench_close(&other);
}

TEST_PROGRAM(fenced)
{
    RUN(host_cannot_touch_memory);
    RUN(fresh_memory_is_nan);
    RUN(recording_keeps_the_order);
    RUN(breaches_are_reported);
}
