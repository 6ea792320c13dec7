/* backends/cpu_threads.c - the threads of one queue, and how they share a list of phases.
 *
 * A job is a list of phases; a phase is a number of independent tasks. All threads go through the
 * phases together: each takes tasks until none is left, then waits for the others. Which thread runs a
 * task never changes what the task computes.
 *
 * With the host's parallel_for there are no threads here: each phase becomes one call of it.
 *
 * Workers that have nothing to do spin for a short while, since in decode the next job comes within
 * microseconds, then sleep. */
#ifndef MOE_BACKENDS_CPU_THREADS_C
#define MOE_BACKENDS_CPU_THREADS_C

#include "../core/base.h"
#include "../core/platform.h"

enum {
    CPU_SPIN_BARRIER = 4000, /* pauses before a waiting thread offers its core to others */
    CPU_SPIN_IDLE = 20000    /* pauses before an idle worker sleeps: about half a millisecond */
};

typedef struct cpu_pool cpu_pool;

/* One task of a phase. `thread` < n_threads names the memory that the task may scribble in. */
typedef void cpu_task_fn(void *job, uint32_t phase, uint32_t task, uint32_t thread);

typedef struct cpu_job {
    void *arg;
    uint32_t n_phase;
    cpu_task_fn *run;
    /* Tasks of a phase; asked when the phases before it are done. */
    uint32_t (*n_task)(void *job, uint32_t phase);
} cpu_job;

typedef struct cpu_worker {
    cpu_pool *pool;
    uint32_t index;
    plat_thread thread;
} cpu_worker;

struct cpu_pool {
    moe_mem *mem;
    uint32_t n_threads; // the caller's included
    cpu_worker *workers; // [n_threads - 1]
    uint32_t n_started;
    plat_mutex mutex;
    plat_cond wake;
    bool have_mutex, have_cond;

    cpu_job job;
    _Atomic uint32_t generation; // counts jobs
    _Atomic uint32_t n_sleeping;
    _Atomic bool quit;
    char pad0[64]; // the counters below are written by all threads: each on its own cache line
    _Atomic uint32_t next_task;
    char pad1[64];
    _Atomic uint32_t n_arrived;
    char pad2[64];
    _Atomic uint32_t barrier_phase;
    uint32_t n_task; // of the running phase; written between barriers only
};

/* Waits until all threads are here; the last one to arrive prepares phase `next`. */
static void cpu_barrier(cpu_pool *pool, uint32_t next)
{
    uint32_t phase = atomic_load_explicit(&pool->barrier_phase, memory_order_relaxed);
    uint32_t arrived = atomic_fetch_add_explicit(&pool->n_arrived, 1, memory_order_acq_rel) + 1;
    if (arrived == pool->n_threads) {
        atomic_store_explicit(&pool->n_arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->next_task, 0, memory_order_relaxed);
        if (next < pool->job.n_phase)
            pool->n_task = pool->job.n_task(pool->job.arg, next);
        atomic_store_explicit(&pool->barrier_phase, phase + 1, memory_order_release);
        return;
    }
    for (uint32_t spin = 0;
         atomic_load_explicit(&pool->barrier_phase, memory_order_acquire) == phase; spin++) {
        if (spin < CPU_SPIN_BARRIER)
            plat_relax();
        else
            plat_yield();
    }
}

static void cpu_work(cpu_pool *pool, uint32_t thread)
{
    const cpu_job job = pool->job; /* a copy: after the last barrier the next job may be written */
    for (uint32_t phase = 0; phase < job.n_phase; phase++) {
        const uint32_t n_task = pool->n_task;
        uint32_t task;
        while ((task = atomic_fetch_add_explicit(&pool->next_task, 1, memory_order_relaxed)) <
               n_task)
            job.run(job.arg, phase, task, thread);
        cpu_barrier(pool, phase + 1);
    }
}

/* Sleeps until there is a job after number `seen`, or the end. The caller of cpu_pool_run raises
 * `generation` and then looks at `n_sleeping`; a worker does it the other way round; so one of the two
 * sees the other. */
static void cpu_sleep(cpu_pool *pool, uint32_t seen)
{
    plat_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (atomic_load(&pool->generation) == seen && !atomic_load(&pool->quit))
        plat_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    plat_mutex_unlock(&pool->mutex);
}

static void cpu_worker_main(void *arg)
{
    cpu_worker *worker = arg;
    cpu_pool *pool = worker->pool;
    uint32_t seen = 0;
    for (;;) {
        uint32_t spin = 0;
        while (atomic_load_explicit(&pool->generation, memory_order_acquire) == seen &&
               spin++ < CPU_SPIN_IDLE)
            plat_relax();
        if (spin > CPU_SPIN_IDLE)
            cpu_sleep(pool, seen);
        if (atomic_load(&pool->quit))
            return;
        seen = atomic_load_explicit(&pool->generation, memory_order_acquire);
        cpu_work(pool, worker->index);
    }
}

typedef struct cpu_host_phase {
    cpu_pool *pool;
    uint32_t phase, n_task, n_part;
} cpu_host_phase;

/* Part `part` of a phase under the host's parallel_for: it takes tasks like a thread. */
static void cpu_host_part(void *arg, uint32_t part)
{
    cpu_host_phase *p = arg;
    uint32_t task;
    while ((task = atomic_fetch_add_explicit(&p->pool->next_task, 1, memory_order_relaxed)) <
           p->n_task)
        p->pool->job.run(p->pool->job.arg, p->phase, task, part);
}

static void cpu_run_on_host(cpu_pool *pool)
{
    const moe_host *host = &pool->mem->host;
    for (uint32_t phase = 0; phase < pool->job.n_phase; phase++) {
        uint32_t n_task = pool->job.n_task(pool->job.arg, phase);
        cpu_host_phase p = {pool, phase, n_task, MOE_MIN(n_task, pool->n_threads)};
        atomic_store(&pool->next_task, 0);
        if (p.n_part > 1)
            host->parallel_for(host->user, p.n_part, cpu_host_part, &p);
        else
            cpu_host_part(&p, 0);
    }
}

/* Runs all phases of the job; returns when they are done. */
static void cpu_pool_run(cpu_pool *pool, const cpu_job *job)
{
    if (job->n_phase == 0)
        return;
    pool->job = *job;
    if (pool->n_threads == 1) {
        for (uint32_t phase = 0; phase < job->n_phase; phase++) {
            uint32_t n_task = job->n_task(job->arg, phase);
            for (uint32_t task = 0; task < n_task; task++)
                job->run(job->arg, phase, task, 0);
        }
        return;
    }
    if (pool->mem->host.parallel_for) {
        cpu_run_on_host(pool);
        return;
    }
    pool->n_task = job->n_task(job->arg, 0);
    atomic_store_explicit(&pool->next_task, 0, memory_order_relaxed);
    atomic_fetch_add(&pool->generation, 1); /* publishes the job to spinning workers */
    if (atomic_load(&pool->n_sleeping)) {
        plat_mutex_lock(&pool->mutex);
        plat_cond_broadcast(&pool->wake);
        plat_mutex_unlock(&pool->mutex);
    }
    cpu_work(pool, 0);
}

static void cpu_pool_close(cpu_pool *pool)
{
    if (pool->n_started) {
        plat_mutex_lock(&pool->mutex);
        atomic_store(&pool->quit, true);
        plat_cond_broadcast(&pool->wake);
        plat_mutex_unlock(&pool->mutex);
        for (uint32_t i = 0; i < pool->n_started; i++)
            plat_thread_join(&pool->workers[i].thread);
    }
    if (pool->have_cond)
        plat_cond_destroy(&pool->wake);
    if (pool->have_mutex)
        plat_mutex_destroy(&pool->mutex);
    if (pool->mem)
        mem_free(pool->mem, pool->workers);
    memset(pool, 0, sizeof *pool);
}

/* After a failure the pool is closed. */
static moe_status cpu_pool_open(cpu_pool *pool, uint32_t n_threads, moe_mem *mem, moe_error *error)
{
    memset(pool, 0, sizeof *pool);
    pool->mem = mem;
    pool->n_threads = n_threads;
    if (n_threads == 1 || mem->host.parallel_for)
        return MOE_OK;
    pool->workers = mem_alloc(mem, n_threads - 1, sizeof *pool->workers);
    if (!pool->workers)
        return fail_memory(error, mem, "threads", (n_threads - 1) * sizeof *pool->workers);
    pool->have_mutex = plat_mutex_init(&pool->mutex);
    pool->have_cond = pool->have_mutex && plat_cond_init(&pool->wake);
    bool started = pool->have_cond;
    for (uint32_t i = 0; started && i < n_threads - 1; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].index = i + 1;
        started = plat_thread_start(&pool->workers[i].thread, cpu_worker_main, &pool->workers[i]);
        pool->n_started += started;
    }
    if (started)
        return MOE_OK;
    cpu_pool_close(pool);
    return fail(error, MOE_ERR_THREAD, "n_threads",
                "the system refused to start %u threads; ask for fewer", n_threads);
}

#endif
