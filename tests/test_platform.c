/* tests/test_platform.c - the platform layer, the allocator, and the small public functions: files
 * that change under a reader, threads that meet, memory that is counted. */
#include "test.h"

#include <signal.h>
#include <unistd.h>

/* --------------------------------------------------------------------------------- files -- */

static char file_path[256];

static bool make_file(size_t n)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(file_path, sizeof file_path, "%s/moe_platform_XXXXXX", tmp ? tmp : "/tmp");
    int fd = mkstemp(file_path);
    bool ok = fd >= 0;
    for (size_t i = 0; i < n && ok; i++) {
        uint8_t c = (uint8_t)(i * 7);
        ok = write(fd, &c, 1) == 1;
    }
    if (fd >= 0)
        close(fd);
    return ok;
}

static void file_reads_and_maps(void)
{
    moe_error e = {0};
    plat_file f;
    const uint8_t *map = NULL;
    uint8_t part[100];
    uint64_t now = 0;
    REQUIRE(make_file(5000), "%s", file_path);
    REQUIRE(!plat_open(&f, file_path, &e), "%s", e.message);
    CHECK(f.bytes == 5000, "%llu", (unsigned long long)f.bytes);
    CHECK(!plat_read(&f, 4900, part, 100, file_path, &e) && part[0] == (uint8_t)(4900 * 7) &&
              part[99] == (uint8_t)(4999 * 7),
          "%s", e.message);
    CHECK(!plat_read(&f, 5000, part, 0, file_path, &e), "%s", e.message);
    CHECK(plat_read(&f, 4901, part, 100, file_path, &e) == MOE_ERR_IO &&
              strstr(e.message, "1 more bytes at offset 5000") && strcmp(e.subject, file_path) == 0,
          "%s", e.message);
    REQUIRE(!plat_map(&f, &map, file_path, &e), "%s", e.message);
    CHECK(map[0] == 0 && map[1] == 7 && map[4999] == (uint8_t)(4999 * 7), "content of the map");
    CHECK(plat_size_now(&f, &now) && now == 5000, "%llu", (unsigned long long)now);
    CHECK(truncate(file_path, 70) == 0 && plat_size_now(&f, &now) && now == 70, "%llu",
          (unsigned long long)now);
    plat_unmap(map, f.bytes);
    plat_close(&f);
    unlink(file_path);
}

static void empty_file_is_not_mapped(void)
{
    moe_error e = {0};
    plat_file f;
    const uint8_t *map = NULL;
    REQUIRE(make_file(0), "%s", file_path);
    REQUIRE(!plat_open(&f, file_path, &e), "%s", e.message);
    CHECK(plat_map(&f, &map, file_path, &e) == MOE_ERR_LIMIT && !map, "%s", e.message);
    plat_close(&f);
    unlink(file_path);
}

static void open_says_why_not(void)
{
    static const char *const paths[][2] = {{"/no/such/file", "there is no such file"},
                                           {"/dev/null", "a device"},
                                           {"/", "a folder"},
                                           {"/dev/null/x", "not a folder"}};
    for (size_t i = 0; i < MOE_COUNT(paths); i++) {
        moe_error e = {0};
        plat_file f;
        CHECK(plat_open(&f, paths[i][0], &e) == MOE_ERR_IO && strstr(e.message, paths[i][1]) &&
                  strcmp(e.subject, paths[i][0]) == 0,
              "%s", e.message);
    }
}

/* ------------------------------------------------------------------------- machine and clock -- */

static void machine_is_plausible(void)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t n = plat_n_cores();
    CHECK(n >= 1 && n <= (uint32_t)online, "%u cores of %ld processors", n, online);
    uint64_t bytes = plat_free_memory();
    uint64_t all = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    CHECK(bytes <= all, "%llu of %llu bytes", (unsigned long long)bytes, (unsigned long long)all);
#ifdef __linux__
    CHECK(bytes > 1 << 20, "%llu bytes", (unsigned long long)bytes);
#endif
    uint64_t a = plat_time_ns();
    usleep(20000);
    uint64_t passed = plat_time_ns() - a;
    CHECK(passed >= 19000000 && passed < 10000000000u, "%llu ns", (unsigned long long)passed);
}

#ifdef __linux__
static void affinity_limits_cores(void)
{
    cpu_set_t before, one;
    REQUIRE(sched_getaffinity(0, sizeof before, &before) == 0, "sched_getaffinity");
    CPU_ZERO(&one);
    for (size_t cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; cpu++)
        if (CPU_ISSET(cpu, &before))
            CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0)
        SKIP("the system does not let a program choose its processors");
    CHECK(plat_n_cores() == 1, "%u", plat_n_cores());
    sched_setaffinity(0, sizeof before, &before);
}

static bool write_limit(const char *dir, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    bool ok = f && fputs(text, f) >= 0;
    if (f)
        ok &= fclose(f) == 0;
    return ok;
}

/* The limit files of both versions of control groups, as the kernel writes them. */
static void cgroup_limits(void)
{
    static const struct {
        const char *files[3][2];
        uint64_t cores, bytes; // of 64 cores and 10^12 bytes
    } cases[] = {
        {{{"cpu.max", "150000 100000\n"}}, 1, 1000000000000u},
        {{{"cpu.max", "max 100000\n"}}, 64, 1000000000000u},
        {{{"cpu.max", "50000 100000\n"}}, 1, 1000000000000u},
        {{{"cpu.cfs_quota_us", "400000\n"}, {"cpu.cfs_period_us", "100000\n"}}, 4, 1000000000000u},
        {{{"cpu.cfs_quota_us", "-1\n"}, {"cpu.cfs_period_us", "100000\n"}}, 64, 1000000000000u},
        {{{"memory.max", "max\n"}, {"memory.current", "500\n"}}, 64, 1000000000000u},
        {{{"memory.max", "1000000\n"}, {"memory.current", "400000\n"}}, 64, 600000},
        {{{"memory.max", "1000000\n"},
          {"memory.current", "900000\n"},
          {"memory.stat", "anon 5\ninactive_file 300000\nx 1\n"}}, 64, 400000},
        {{{"memory.max", "1000\n"}, {"memory.current", "5000\n"}}, 64, 0},
        {{{"memory.limit_in_bytes", "9223372036854771712\n"},
          {"memory.usage_in_bytes", "5000\n"}}, 64, 1000000000000u},
        {{{"memory.limit_in_bytes", "70000\n"},
          {"memory.usage_in_bytes", "60000\n"},
          {"memory.stat", "inactive_file 7\ntotal_inactive_file 20000\n"}}, 64, 30000},
    };
    char dir[] = "/tmp/moe_cgroup_XXXXXX";
    REQUIRE(mkdtemp(dir), "mkdtemp");
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        uint64_t cores = 64, bytes = 1000000000000u;
        for (size_t k = 0; k < 3 && cases[i].files[k][0]; k++)
            REQUIRE(write_limit(dir, cases[i].files[k][0], cases[i].files[k][1]), "%s", dir);
        plat_look_quota(dir, &cores);
        plat_look_memory_v1(dir, &bytes);
        plat_look_memory_v2(dir, &bytes);
        CHECK(cores == cases[i].cores && bytes == cases[i].bytes, "case %zu: %llu cores, "
              "%llu bytes", i, (unsigned long long)cores, (unsigned long long)bytes);
        for (size_t k = 0; k < 3 && cases[i].files[k][0]; k++) {
            char path[512];
            snprintf(path, sizeof path, "%s/%s", dir, cases[i].files[k][0]);
            unlink(path);
        }
    }
    rmdir(dir);
}
#endif

/* ------------------------------------------------------------------------------- threads -- */

enum { N_THREADS = 4, N_ROUNDS = 2000 };

typedef struct meeting {
    plat_mutex mutex;
    plat_cond cond;
    uint32_t n_here, round;
    uint64_t count; // guarded by the mutex alone
} meeting;

/* All threads add to a counter that is not atomic, and wait for each other each round. */
static void meet(void *arg)
{
    meeting *m = arg;
    for (int i = 0; i < N_ROUNDS; i++) {
        plat_mutex_lock(&m->mutex);
        m->count++;
        uint32_t round = m->round;
        if (++m->n_here == N_THREADS) {
            m->n_here = 0;
            m->round++;
            plat_cond_broadcast(&m->cond);
        }
        while (m->round == round)
            plat_cond_wait(&m->cond, &m->mutex);
        plat_mutex_unlock(&m->mutex);
        plat_yield();
        plat_relax();
    }
}

static void threads_meet(void)
{
    meeting m = {0};
    plat_thread threads[N_THREADS];
    int started = 0;
    REQUIRE(plat_mutex_init(&m.mutex) && plat_cond_init(&m.cond), "init");
    while (started < N_THREADS && plat_thread_start(&threads[started], meet, &m))
        started++;
    REQUIRE(started == N_THREADS, "%d threads", started);
    for (int i = 0; i < started; i++)
        plat_thread_join(&threads[i]);
    CHECK(m.count == N_THREADS * N_ROUNDS && m.round == N_ROUNDS, "%llu in %u rounds",
          (unsigned long long)m.count, m.round);
    plat_cond_destroy(&m.cond);
    plat_mutex_destroy(&m.mutex);
}

static void look_at_signals(void *arg)
{
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    *(bool *)arg = sigismember(&now, SIGINT) == 1 && sigismember(&now, SIGTERM) == 1;
}

/* A signal to the program runs its handler on the program's own thread. */
static void threads_take_no_signals(void)
{
    plat_thread t;
    bool blocked = false;
    sigset_t now;
    REQUIRE(plat_thread_start(&t, look_at_signals, &blocked), "start");
    plat_thread_join(&t);
    CHECK(blocked, "the thread takes signals");
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    CHECK(sigismember(&now, SIGINT) == 0, "and the program does not any more");
}

/* -------------------------------------------------------------------------------- memory -- */

static void *dirty_alloc(void *user, size_t bytes, size_t align)
{
    void *p = NULL;
    (void)user;
    return posix_memalign(&p, align, bytes) ? NULL : memset(p, 0xa5, bytes);
}

static void dirty_free(void *user, void *p, size_t bytes, size_t align)
{
    (void)user;
    (void)bytes;
    (void)align;
    free(p);
}

static bool all_are(const uint8_t *p, size_t n, uint8_t value)
{
    for (size_t i = 0; i < n; i++)
        if (p[i] != value)
            return false;
    return true;
}

static void memory_is_cleared_and_counted(void)
{
    moe_host host;
    moe_mem mem;
    moe_host_init(&host);
    host.alloc = dirty_alloc;
    host.free = dirty_free;
    mem_init(&mem, &host, 0);
    for (size_t n = 0; n < 300; n += 13) {
        uint8_t *p = mem_alloc(&mem, n, 1);
        REQUIRE(p && (uintptr_t)p % 64 == 0 && all_are(p, n, 0), "%zu bytes", n);
        memset(p, 7, n);
        uint8_t *q = mem_grow(&mem, p, 400, 1);
        REQUIRE(q && all_are(q, n, 7) && all_are(q + n, 400 - n, 0), "grown from %zu bytes", n);
        q = mem_grow(&mem, q, n / 2, 1);
        REQUIRE(q && all_are(q, n / 2, 7), "cut from 400 bytes");
        mem_free(&mem, q);
        CHECK(mem.used_bytes == 0, "%llu bytes left", (unsigned long long)mem.used_bytes);
    }
    mem_free(&mem, NULL);
    volatile uint64_t most = UINT64_MAX; // or the compiler warns of what is meant
    CHECK(!mem_alloc(&mem, most, 2) && !mem_alloc(&mem, most / 8 + 2, 8) &&
              !mem_alloc(&mem, most, 1) && !mem_alloc(&mem, most - 100, 1),
          "sizes that wrap");
    CHECK(mem.used_bytes == 0, "%llu bytes left", (unsigned long long)mem.used_bytes);
}

static moe_mem shared_mem;

static void allocate_often(void *arg)
{
    (void)arg;
    for (int i = 0; i < 2000; i++) {
        void *p = mem_alloc(&shared_mem, 1000, 1), *q = mem_alloc(&shared_mem, 3000, 1);
        mem_free(&shared_mem, p);
        mem_free(&shared_mem, q);
    }
}

static void ceiling_holds_over_threads(void)
{
    plat_thread threads[N_THREADS];
    mem_init(&shared_mem, NULL, 8192);
    for (int i = 0; i < N_THREADS; i++)
        REQUIRE(plat_thread_start(&threads[i], allocate_often, NULL), "start");
    for (int i = 0; i < N_THREADS; i++)
        plat_thread_join(&threads[i]);
    CHECK(shared_mem.used_bytes == 0, "%llu", (unsigned long long)shared_mem.used_bytes);
    CHECK(shared_mem.peak_bytes <= 8192 && shared_mem.peak_bytes >= 3064, "%llu",
          (unsigned long long)shared_mem.peak_bytes);
    CHECK(mem_alloc(&shared_mem, 8192, 1) == NULL, "over the ceiling");
}

/* -------------------------------------------------------------------------- public functions -- */

static moe_cancel signalled;

static void on_signal(int number)
{
    (void)number;
    moe_cancel_set(&signalled);
}

static void cancel_from_a_signal(void)
{
    void (*before)(int) = signal(SIGUSR1, on_signal);
    CHECK(!cancelled(&signalled) && !cancelled(NULL), "set at the start");
    raise(SIGUSR1);
    CHECK(cancelled(&signalled), "not set");
    moe_cancel_clear(&signalled);
    CHECK(!cancelled(&signalled), "not cleared");
    signal(SIGUSR1, before);
}

static void names_and_defaults(void)
{
    char version[32];
    for (int i = MOE_OK; i <= MOE_ERR_BACKEND; i++)
        CHECK(strncmp(moe_status_name((moe_status)i), "MOE_", 4) == 0, "status %d", i);
    CHECK(strcmp(moe_status_name(MOE_ERR_FORMAT), "MOE_ERR_FORMAT") == 0, "MOE_ERR_FORMAT");
    CHECK(moe_status_name((moe_status)99)[0] && moe_status_name((moe_status)-1)[0], "unknown");
    snprintf(version, sizeof version, "%d.%d.%d", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
             MOE_VERSION_PATCH);
    CHECK(strcmp(moe_version(), version) == 0, "%s", moe_version());
    moe_model_options m;
    moe_session_options s;
    moe_sampler_options p;
    moe_model_options_init(&m);
    moe_session_options_init(&s);
    moe_sampler_options_init(&p);
    CHECK(m.size == sizeof m && !m.path && !m.copy && m.isa == MOE_ISA_AUTO && !m.cancel, "model");
    CHECK(s.size == sizeof s && s.n_ctx == 0 && s.n_batch == 512 && s.n_logits == 1 &&
              s.n_threads == 0 && s.cache_type == MOE_CACHE_F16,
          "session");
    CHECK(p.size == sizeof p && p.temperature == 0 && p.repetition_penalty == 1 && p.top_p == 1 &&
              p.min_p == 0 && p.penalty_window == 64 && p.top_k == 0,
          "sampler");
}

static void utf8_sequences(void)
{
    static const struct {
        const char *text;
        size_t bytes, want;
    } cases[] = {
        {"", 0, 0}, {"a", 1, 1}, {"\0", 1, 1}, {"\xc3\xa4", 2, 2}, {"\xc3", 1, 0}, {"\x80", 1, 0},
        {"\xc1\xbf", 2, 0}, {"\xe0\xa0\x80", 3, 3}, {"\xe0\x9f\xbf", 3, 0},
        {"\xed\x9f\xbf", 3, 3}, {"\xed\xa0\x80", 3, 0}, {"\xef\xbf\xbf", 3, 3},
        {"\xf0\x90\x80\x80", 4, 4}, {"\xf0\x8f\xbf\xbf", 4, 0}, {"\xf4\x8f\xbf\xbf", 4, 4},
        {"\xf4\x90\x80\x80", 4, 0}, {"\xf5\x80\x80\x80", 4, 0}, {"\xf0\x90\x80\x41", 4, 0},
        {"\xe2\x82\xac", 2, 0},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++)
        CHECK(utf8_sequence(cases[i].text, cases[i].bytes) == cases[i].want, "case %zu: %zu", i,
              utf8_sequence(cases[i].text, cases[i].bytes));
}

#ifdef __GLIBC__
static void use_stack(void *arg)
{
    volatile uint8_t tile[PLAT_STACK_BYTES / 2];
    for (size_t i = 0; i < sizeof tile; i += 1024)
        tile[i] = (uint8_t)i;
    *(uint8_t *)arg = tile[1024];
}

/* Where threads are born with little stack, as with musl, ours have what kernels need. */
static void threads_have_stack(void)
{
    pthread_attr_t before, small;
    plat_thread thread;
    uint8_t done = 1;
    REQUIRE(!pthread_getattr_default_np(&before) && !pthread_attr_init(&small) &&
                !pthread_attr_setstacksize(&small, 128 << 10) &&
                !pthread_setattr_default_np(&small), "no other default");
    const bool started = plat_thread_start(&thread, use_stack, &done);
    if (started)
        plat_thread_join(&thread);
    pthread_setattr_default_np(&before);
    pthread_attr_destroy(&small);
    CHECK(started && done == 0, "the thread did not end as it should");
}
#endif

TEST_PROGRAM(platform)
{
#ifdef __GLIBC__
    RUN(threads_have_stack);
#endif
    RUN(file_reads_and_maps);
    RUN(empty_file_is_not_mapped);
    RUN(open_says_why_not);
    RUN(machine_is_plausible);
#ifdef __linux__
    RUN(affinity_limits_cores);
    RUN(cgroup_limits);
#endif
    RUN(threads_meet);
    RUN(threads_take_no_signals);
    RUN(memory_is_cleared_and_counted);
    RUN(ceiling_holds_over_threads);
    RUN(cancel_from_a_signal);
    RUN(names_and_defaults);
    RUN(utf8_sequences);
}
