/* backends/cpu_threads.c - the threads of one queue, and how they share a list of phases.
 *
 * A job is a list of phases; a phase is a number of independent tasks. All threads go through the
 * phases together. Each starts with an equal share of neighbouring tasks, so that it reads one
 * stretch of the weights in order, as the prefetchers of a processor and of the kernels expect. Who
 * is done takes tasks from the ends of the others' shares; when none is left it waits for the
 * others. The last to arrive runs the phases of a single task that come next by itself, before it
 * lets the others go: in decode that is every second phase. Which thread runs a task never changes
 * what the task computes.
 *
 * With the host's parallel_for there are no threads here: each phase becomes one call of it.
 *
 * A thread that waits spins for a short while, since in decode the next phase or job comes within
 * microseconds, then offers its core to others, then sleeps: on a busy machine the thread that it
 * waits for may need the core. Between phases it first fetches what it will read next, so that
 * memory is not idle while it waits. */
#ifndef MOE_BACKENDS_CPU_THREADS_C
#define MOE_BACKENDS_CPU_THREADS_C

#include "../core/base.h"
#include "../core/platform.h"

enum {
    CPU_SPIN_BARRIER = 2000, /* pauses before a waiting thread offers its core to others */
    CPU_YIELD_BARRIER = 20,  /* offers before it sleeps */
    CPU_SPIN_IDLE = 20000,   /* pauses before an idle worker sleeps: about half a millisecond */
    CPU_FETCH = 256          /* bytes fetched before a waiting thread looks up again */
};

typedef struct cpu_pool cpu_pool;

/* Memory that a thread will read once it need not wait any longer. */
typedef struct cpu_upcoming {
    const void *op;      // that reads it
    uintptr_t next, end; // what has not been fetched yet
} cpu_upcoming;

/* One task of a phase. `thread` < n_threads names the memory that the task may scribble in. */
typedef void cpu_task_fn(void *job, uint32_t phase, uint32_t task, uint32_t thread);

typedef struct cpu_job {
    void *arg;
    uint32_t n_phase;
    cpu_task_fn *run;
    /* Tasks of a phase; asked when the phases before it are done. */
    uint32_t (*n_task)(void *job, uint32_t phase);
    /* Sets `ahead` to what the thread reads after `phase`, unless it is that already. Called while
     * the thread does not count as waiting yet: until then no phase can change. May be NULL. */
    void (*look_ahead)(void *job, uint32_t phase, uint32_t thread, cpu_upcoming *ahead);
} cpu_job;

/* What is left of a thread's share of the running phase: tasks [next, end), next in the low half.
 * Its owner takes from the front, the others from the back. On a cache line of its own. */
typedef struct cpu_share {
    _Atomic uint64_t left;
    char pad[64 - sizeof(uint64_t)];
} cpu_share;

typedef struct cpu_worker {
    cpu_pool *pool;
    uint32_t index;
    plat_thread thread;
} cpu_worker;

struct cpu_pool {
    moe_mem *mem;
    uint32_t n_threads; // the caller's included
    bool crowded;       // more threads than cores: who spins keeps another from its work
    cpu_worker *workers; // [n_threads - 1]
    cpu_share *shares;   // [n_threads]
    uint32_t n_started;
    plat_mutex mutex;
    plat_cond wake;
    bool have_mutex, have_cond;

    cpu_job job;
    _Atomic uint32_t generation; // counts jobs
    _Atomic uint32_t n_sleeping;
    _Atomic bool quit;
    char pad0[64]; // the counters below are written by all threads: each on its own cache line
    _Atomic uint32_t n_arrived;
    char pad1[64];
    _Atomic uint32_t gate;      // changes at each barrier: a count, and the phase that comes next
    uint32_t first_phase;       // of the job
};

/* The gate's low half is a phase, so that a thread learns from one load that the barrier is passed
 * and whether the job is over: once it is, the next job may be written at any moment. */
enum { CPU_GATE_PHASE = 0xffff, CPU_GATE_COUNT = 0x10000 };

/* Sleeps until *counter is no longer `seen`, or the end. Who sets the counter looks at n_sleeping
 * after it; a sleeper does it the other way round; so one of the two sees the other. */
static void cpu_sleep(cpu_pool *pool, const _Atomic uint32_t *counter, uint32_t seen)
{
    plat_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (atomic_load(counter) == seen && !atomic_load(&pool->quit))
        plat_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    plat_mutex_unlock(&pool->mutex);
}

/* Sets a counter that others wait for. An exchange: emulators of AArch64 on x86 let a load pass a
 * store before it, even where both are sequentially consistent, and then nobody would be woken. */
static void cpu_wake(cpu_pool *pool, _Atomic uint32_t *counter, uint32_t value)
{
    atomic_exchange(counter, value);
    if (atomic_load(&pool->n_sleeping)) {
        plat_mutex_lock(&pool->mutex);
        plat_cond_broadcast(&pool->wake);
        plat_mutex_unlock(&pool->mutex);
    }
}

/* Where a thread's share of n_task tasks begins. */
MOE_INLINE uint32_t cpu_first_task(uint32_t n_task, uint32_t thread, uint32_t n_threads)
{
    return (uint32_t)((uint64_t)n_task * thread / n_threads);
}

static void cpu_deal(cpu_pool *pool, uint32_t n_task)
{
    for (uint32_t i = 0; i < pool->n_threads; i++) {
        const uint64_t next = cpu_first_task(n_task, i, pool->n_threads);
        const uint64_t end = cpu_first_task(n_task, i + 1, pool->n_threads);
        atomic_store_explicit(&pool->shares[i].left, end << 32 | next, memory_order_relaxed);
    }
}

/* Takes one task of a share; false if there is none left. */
static bool cpu_take_task(cpu_share *share, bool front, uint32_t *task)
{
    uint64_t left = atomic_load_explicit(&share->left, memory_order_relaxed);
    for (;;) {
        const uint32_t next = (uint32_t)left, end = (uint32_t)(left >> 32);
        if (next >= end)
            return false;
        *task = front ? next : end - 1;
        const uint64_t rest = front ? left + 1 : left - ((uint64_t)1 << 32);
        if (atomic_compare_exchange_weak_explicit(&share->left, &left, rest, memory_order_relaxed,
                                                  memory_order_relaxed))
            return true;
    }
}

/* Runs tasks of the phase until none is left: the thread's own first, then the others'. */
static void cpu_run_phase(cpu_pool *pool, const cpu_job *job, uint32_t phase, uint32_t thread)
{
    uint32_t task;
    for (uint32_t i = 0; i < pool->n_threads; i++) {
        cpu_share *share = &pool->shares[(thread + i) % pool->n_threads];
        while (cpu_take_task(share, i == 0, &task))
            job->run(job->arg, phase, task, thread);
    }
}

/* The first phase from `phase` on that has several tasks; those before it are run here. Only one
 * thread is at work when this is called. */
static uint32_t cpu_advance(cpu_pool *pool, uint32_t phase, uint32_t thread)
{
    const cpu_job *job = &pool->job;
    for (; phase < job->n_phase; phase++) {
        const uint32_t n_task = job->n_task(job->arg, phase);
        if (n_task > 1) {
            cpu_deal(pool, n_task);
            break;
        }
        if (n_task == 1)
            job->run(job->arg, phase, 0, thread);
    }
    return phase;
}

/* Fetches a little; false if there is nothing left. A hint: no address can make it fail. */
static bool cpu_fetch_upcoming(cpu_upcoming *ahead)
{
    if (ahead->next >= ahead->end)
        return false;
    for (uintptr_t stop = ahead->next + CPU_FETCH; ahead->next < stop; ahead->next += 64)
        __builtin_prefetch((const void *)ahead->next, 0, 2);
    return true;
}

/* Waits until all threads are here; the last one to arrive prepares what comes next. Returns the
 * phase that follows `phase`. */
static uint32_t cpu_barrier(cpu_pool *pool, uint32_t phase, uint32_t thread, cpu_upcoming *ahead)
{
    const uint32_t seen = atomic_load_explicit(&pool->gate, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->n_arrived, 1, memory_order_acq_rel) + 1 ==
        pool->n_threads) {
        atomic_store_explicit(&pool->n_arrived, 0, memory_order_relaxed);
        const uint32_t next = cpu_advance(pool, phase + 1, thread);
        cpu_wake(pool, &pool->gate, (seen & ~(uint32_t)CPU_GATE_PHASE) + CPU_GATE_COUNT + next);
        return next;
    }
    uint32_t now = seen;
    while (now == seen && cpu_fetch_upcoming(ahead))
        now = atomic_load_explicit(&pool->gate, memory_order_acquire);
    for (uint32_t i = pool->crowded ? CPU_SPIN_BARRIER : 0;
         i < CPU_SPIN_BARRIER + CPU_YIELD_BARRIER && now == seen; i++) {
        if (i < CPU_SPIN_BARRIER)
            plat_relax();
        else
            plat_yield();
        now = atomic_load_explicit(&pool->gate, memory_order_acquire);
    }
    if (now == seen) {
        cpu_sleep(pool, &pool->gate, seen);
        now = atomic_load_explicit(&pool->gate, memory_order_acquire);
    }
    return now & CPU_GATE_PHASE;
}

/* Runs the job from its first phase on. */
static void cpu_work(cpu_pool *pool, uint32_t thread)
{
    const cpu_job job = pool->job; /* a copy: after the last barrier the next job may be written */
    cpu_upcoming ahead = {0};
    for (uint32_t phase = pool->first_phase; phase < job.n_phase;) {
        cpu_run_phase(pool, &job, phase, thread);
        if (job.look_ahead)
            job.look_ahead(job.arg, phase, thread, &ahead);
        phase = cpu_barrier(pool, phase, thread, &ahead);
    }
}

static void cpu_worker_main(void *arg)
{
    cpu_worker *worker = arg;
    cpu_pool *pool = worker->pool;
    uint32_t seen = 0;
    for (;;) {
        uint32_t spin = pool->crowded ? CPU_SPIN_IDLE : 0;
        while (atomic_load_explicit(&pool->generation, memory_order_acquire) == seen &&
               spin++ < CPU_SPIN_IDLE)
            plat_relax();
        if (spin > CPU_SPIN_IDLE)
            cpu_sleep(pool, &pool->generation, seen);
        if (atomic_load(&pool->quit))
            return;
        seen = atomic_load_explicit(&pool->generation, memory_order_acquire);
        cpu_work(pool, worker->index);
    }
}

typedef struct cpu_host_phase {
    cpu_pool *pool;
    uint32_t phase;
} cpu_host_phase;

/* Part `part` of a phase under the host's parallel_for: it takes tasks like a thread. */
static void cpu_host_part(void *arg, uint32_t part)
{
    const cpu_host_phase *p = arg;
    cpu_run_phase(p->pool, &p->pool->job, p->phase, part);
}

static void cpu_run_on_host(cpu_pool *pool)
{
    const moe_host *host = &pool->mem->host;
    for (uint32_t phase = 0; phase < pool->job.n_phase; phase++) {
        const uint32_t n_task = pool->job.n_task(pool->job.arg, phase);
        cpu_host_phase p = {pool, phase};
        cpu_deal(pool, n_task);
        if (n_task > 1)
            host->parallel_for(host->user, MOE_MIN(n_task, pool->n_threads), cpu_host_part, &p);
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
    pool->first_phase = cpu_advance(pool, 0, 0);
    if (pool->first_phase == job->n_phase)
        return;
    cpu_wake(pool, &pool->generation, atomic_load(&pool->generation) + 1);
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
    if (pool->mem) {
        mem_free(pool->mem, pool->shares);
        mem_free(pool->mem, pool->workers);
    }
    memset(pool, 0, sizeof *pool);
}

/* After a failure the pool is closed. */
static moe_status cpu_pool_open(cpu_pool *pool, uint32_t n_threads, moe_mem *mem, moe_error *error)
{
    memset(pool, 0, sizeof *pool);
    pool->mem = mem;
    pool->n_threads = n_threads;
    pool->crowded = n_threads > plat_n_cores();
    if (n_threads == 1)
        return MOE_OK;
    pool->shares = mem_alloc(mem, n_threads, sizeof *pool->shares);
    if (!pool->shares)
        return fail_memory(error, mem, "threads", n_threads * sizeof *pool->shares);
    if (mem->host.parallel_for)
        return MOE_OK;
    pool->workers = mem_alloc(mem, n_threads - 1, sizeof *pool->workers);
    if (!pool->workers) {
        cpu_pool_close(pool);
        return fail_memory(error, mem, "threads", (n_threads - 1) * sizeof *pool->workers);
    }
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
