/* core/platform.c - files, maps, threads, the clock and what the machine has, for POSIX and Win32.
 *
 * Owns: nothing; handles belong to the caller. In: paths, in UTF-8. Out: statuses, with the path as
 * subject. Must never: allocate, block on something that is not a regular file, keep state. */
#ifndef MOE_CORE_PLATFORM_C
#define MOE_CORE_PLATFORM_C

#include "platform.h"

/* ================================================================================== POSIX == */
#ifndef _WIN32

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

MOE_UNUSED static uint64_t plat_time_ns(void)
{
    struct timespec t = {0};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ------------------------------------------------------------------------------- machine -- */

#ifdef __linux__

/* The start of a small text file, NUL-terminated; false if it cannot be read. Files of /proc and
 * /sys do not block. */
static bool plat_small_file(const char *path, char *text, size_t text_bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    size_t n = 0;
    ssize_t got = 0;
    while (n < text_bytes - 1 && (got = read(fd, text + n, text_bytes - 1 - n)) > 0)
        n += (size_t)got;
    close(fd);
    text[n] = 0;
    return got >= 0;
}

/* The number behind `name` at the start of a line; false if there is none. */
static bool plat_field(const char *text, const char *name, uint64_t *value)
{
    size_t n = strlen(name);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, n) == 0 && (line[n] == ' ' || line[n] == ':')) {
            const char *digits = line + n + 1 + strspn(line + n + 1, " ");
            char *end;
            *value = strtoull(digits, &end, 10);
            return end != digits;
        }
    }
    return false;
}

/* The folder of this process's control group for a v1 controller, or for v2 if that is NULL. In a
 * container the path may lie outside of what is mounted; then the mount's root is the group. */
static bool plat_cgroup(const char *controller, char *path, size_t path_bytes)
{
    char text[4096];
    if (!plat_small_file("/proc/self/cgroup", text, sizeof text))
        return false;
    for (char *line = text, *next; *line; line = next) {
        char *end = strchrnul(line, '\n');
        next = *end ? end + 1 : end;
        *end = 0;
        char *names = strchr(line, ':');
        char *group = names ? strchr(names + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = 0;
        names++;
        const char *found = controller ? strstr(names, controller) : NULL;
        size_t n = controller ? strlen(controller) : 0;
        bool match = controller ? found && (found == names || found[-1] == ',') &&
                                      (!found[n] || found[n] == ',')
                                : !*names;
        if (match)
            return (size_t)snprintf(path, path_bytes, "/sys/fs/cgroup/%s%s",
                                    controller ? controller : "", group) < path_bytes;
    }
    return false;
}

/* Calls look(dir, value) for the group's folder and all above it: a limit on any level holds. */
static void plat_cgroup_walk(const char *controller, void (*look)(const char *dir, uint64_t *value),
                             uint64_t *value)
{
    char dir[1024];
    if (!plat_cgroup(controller, dir, sizeof dir))
        return;
    size_t root = strlen("/sys/fs/cgroup");
    while (strlen(dir) >= root) {
        look(dir, value);
        *strrchr(dir, '/') = 0;
    }
}

static bool plat_cgroup_file(const char *dir, const char *name, char *text, size_t text_bytes)
{
    char path[1088];
    return (size_t)snprintf(path, sizeof path, "%s/%s", dir, name) < sizeof path &&
           plat_small_file(path, text, text_bytes);
}

static void plat_look_quota(const char *dir, uint64_t *n_cores)
{
    char text[64], period_text[64];
    long long quota = 0, period = 0;
    if (plat_cgroup_file(dir, "cpu.max", text, sizeof text)) { // "max 100000", "150000 100000"
        char *rest;
        quota = strtoll(text, &rest, 10);
        period = strtoll(rest, NULL, 10);
    } else if (plat_cgroup_file(dir, "cpu.cfs_quota_us", text, sizeof text) &&
               plat_cgroup_file(dir, "cpu.cfs_period_us", period_text, sizeof period_text)) {
        quota = strtoll(text, NULL, 10);
        period = strtoll(period_text, NULL, 10);
    }
    // Rounded down: threads beyond the quota would be stopped in the middle of their work.
    if (quota > 0 && period > 0)
        *n_cores = MOE_MIN(*n_cores, MOE_MAX((uint64_t)(quota / period), 1));
}

/* Logical CPUs that share a core are listed as "0,8" or "0-1"; the core is counted at the first of
 * them that this process may run on. */
static bool plat_first_of_core(const cpu_set_t *set, int cpu)
{
    char path[128], text[256];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    if (!plat_small_file(path, text, sizeof text))
        return true;
    for (char *p = text; *p >= '0' && *p <= '9';) {
        long first = strtol(p, &p, 10), last = first;
        if (*p == '-')
            last = strtol(p + 1, &p, 10);
        for (long i = first; i <= last && i < cpu; i++)
            if (i < CPU_SETSIZE && CPU_ISSET((size_t)i, set))
                return false;
        p += *p == ',';
    }
    return true;
}

MOE_UNUSED static uint32_t plat_n_cores(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    uint64_t n = 0;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            n += CPU_ISSET((size_t)cpu, &set) && plat_first_of_core(&set, cpu);
    } else { // more CPUs than the set holds
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        n = online > 0 ? (uint64_t)online : 1;
    }
    n = MOE_MAX(n, 1);
    plat_cgroup_walk(NULL, plat_look_quota, &n);
    plat_cgroup_walk("cpu", plat_look_quota, &n);
    return (uint32_t)n;
}

/* What a group may still take: its limit, less what it uses, page cache that can be dropped not
 * counted. `usage` and `cache` are the names of v2 or v1. */
static void plat_look_memory(const char *dir, uint64_t *free_bytes, const char *const names[3])
{
    char text[64], stat[4096];
    if (!plat_cgroup_file(dir, names[0], text, sizeof text) || *text < '0' || *text > '9')
        return; // no such file, or "max"
    uint64_t limit = strtoull(text, NULL, 10), used = 0, cache = 0;
    if (!plat_cgroup_file(dir, names[1], text, sizeof text))
        return;
    used = strtoull(text, NULL, 10);
    if (plat_cgroup_file(dir, "memory.stat", stat, sizeof stat))
        plat_field(stat, names[2], &cache);
    used -= MOE_MIN(cache, used);
    *free_bytes = MOE_MIN(*free_bytes, limit - MOE_MIN(used, limit));
}

static void plat_look_memory_v2(const char *dir, uint64_t *free_bytes)
{
    static const char *const names[3] = {"memory.max", "memory.current", "inactive_file"};
    plat_look_memory(dir, free_bytes, names);
}

static void plat_look_memory_v1(const char *dir, uint64_t *free_bytes)
{
    static const char *const names[3] = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                         "total_inactive_file"};
    plat_look_memory(dir, free_bytes, names);
}

MOE_UNUSED static uint64_t plat_free_memory(void)
{
    char text[4096];
    uint64_t kib, bytes;
    if (!plat_small_file("/proc/meminfo", text, sizeof text) ||
        !plat_field(text, "MemAvailable", &kib) || !checked_mul(kib, 1024, &bytes))
        return 0;
    plat_cgroup_walk(NULL, plat_look_memory_v2, &bytes);
    plat_cgroup_walk("memory", plat_look_memory_v1, &bytes);
    return bytes;
}

#else /* other POSIX systems */

MOE_UNUSED static uint32_t plat_n_cores(void)
{
#ifdef __APPLE__
    int32_t n_physical = 0;
    size_t bytes = sizeof n_physical;
    if (sysctlbyname("hw.physicalcpu", &n_physical, &bytes, NULL, 0) == 0 && n_physical > 0)
        return (uint32_t)n_physical;
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (uint32_t)n : 1;
}

MOE_UNUSED static uint64_t plat_free_memory(void)
{
    return 0;
}

#endif

/* --------------------------------------------------------------------------------- files -- */

static moe_status plat_fail_errno(moe_error *error, const char *path, const char *verb, int number)
{
    static const struct {
        int number;
        const char *text;
    } reasons[] = {
        {ENOENT, "there is no such file"},
        {ENOTDIR, "a part of the path is not a folder"},
        {EACCES, "permission denied"},
        {EPERM, "permission denied"},
        {ELOOP, "too many symbolic links"},
        {ENAMETOOLONG, "the path is too long"},
        {EMFILE, "this process has too many open files"},
        {ENFILE, "the system has too many open files"},
        {ENOMEM, "not enough memory or address space"},
        {ENODEV, "the file system cannot map files; open it with `copy`"},
        {EIO, "the drive reported an error"},
    };
    for (size_t i = 0; i < MOE_COUNT(reasons); i++)
        if (reasons[i].number == number)
            return fail(error, MOE_ERR_IO, path, "cannot %s: %s", verb, reasons[i].text);
    return fail(error, MOE_ERR_IO, path, "cannot %s: system error %d", verb, number);
}

static moe_status plat_check_regular(const struct stat *info, const char *path, moe_error *error)
{
    if (S_ISREG(info->st_mode))
        return MOE_OK;
    return fail(error, MOE_ERR_IO, path, "expected a regular file, got %s",
                S_ISDIR(info->st_mode)    ? "a folder"
                : S_ISFIFO(info->st_mode) ? "a pipe"
                : S_ISCHR(info->st_mode) || S_ISBLK(info->st_mode) ? "a device"
                                                                   : "a special file");
}

MOE_UNUSED static moe_status plat_open(plat_file *file, const char *path, moe_error *error)
{
    // Asked before the file is opened, since opening a device can have effects; and again on what
    // was opened, which is never waited for.
    struct stat info;
    if (stat(path, &info) != 0)
        return plat_fail_errno(error, path, "open", errno);
    moe_status status = plat_check_regular(&info, path, error);
    if (status)
        return status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return plat_fail_errno(error, path, "open", errno);
    if (fstat(fd, &info) != 0)
        status = plat_fail_errno(error, path, "open", errno);
    else
        status = plat_check_regular(&info, path, error);
    if (status) {
        close(fd);
        return status;
    }
    file->handle = fd;
    file->bytes = (uint64_t)info.st_size;
    return MOE_OK;
}

MOE_UNUSED static void plat_close(plat_file *file)
{
    close((int)file->handle);
    file->handle = -1;
}

MOE_UNUSED static moe_status plat_read(const plat_file *file, uint64_t offset, void *dst,
                                       uint64_t bytes, const char *path, moe_error *error)
{
    char *out = dst;
    while (bytes) {
        size_t step = (size_t)MOE_MIN(bytes, (uint64_t)1 << 30); // Linux reads at most 2 GiB
        ssize_t got = pread((int)file->handle, out, step, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return plat_fail_errno(error, path, "read", errno);
        if (got == 0)
            return fail(error, MOE_ERR_IO, path,
                        "expected %llu more bytes at offset %llu, got the end of the file: it was "
                        "shortened",
                        (unsigned long long)bytes, (unsigned long long)offset);
        out += got;
        offset += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return MOE_OK;
}

MOE_UNUSED static bool plat_size_now(const plat_file *file, uint64_t *bytes)
{
    struct stat info;
    if (fstat((int)file->handle, &info) != 0)
        return false;
    *bytes = (uint64_t)info.st_size;
    return true;
}

MOE_UNUSED static moe_status plat_map(const plat_file *file, const uint8_t **data,
                                      const char *path, moe_error *error)
{
    if (file->bytes == 0 || file->bytes > SIZE_MAX / 2)
        return fail(error, MOE_ERR_LIMIT, path, "cannot map %llu bytes into this address space",
                    (unsigned long long)file->bytes);
    void *p = mmap(NULL, (size_t)file->bytes, PROT_READ, MAP_SHARED, (int)file->handle, 0);
    if (p == MAP_FAILED)
        return plat_fail_errno(error, path, "map", errno);
    *data = p;
    return MOE_OK;
}

MOE_UNUSED static void plat_large_pages(void *p, uint64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    enum { PAGE = 4096 };
    const uint64_t start = align_up((uintptr_t)p, PAGE), end = (uintptr_t)p + bytes;
    if (start < end)
        madvise((void *)(uintptr_t)start, (size_t)((end - start) / PAGE * PAGE), MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

MOE_UNUSED static void plat_unmap(const uint8_t *data, uint64_t bytes)
{
    munmap((void *)(uintptr_t)data, (size_t)bytes);
}

/* ------------------------------------------------------------------------------- threads -- */

static void *plat_thread_main(void *p)
{
    plat_thread *thread = p;
    thread->run(thread->arg);
    return NULL;
}

MOE_UNUSED static bool plat_thread_start(plat_thread *thread, void (*run)(void *), void *arg)
{
    thread->run = run;
    thread->arg = arg;
    // The program's signals stay with the program's threads.
    sigset_t all, before;
    sigfillset(&all);
    if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0)
        return false;
    pthread_attr_t attr;
    size_t bytes;
    bool ok = pthread_attr_init(&attr) == 0;
    if (ok) {
        // musl's threads have 128 KiB unless asked for more; a kernel's tile is larger
        if (pthread_attr_getstacksize(&attr, &bytes) || bytes < PLAT_STACK_BYTES)
            pthread_attr_setstacksize(&attr, PLAT_STACK_BYTES);
        ok = pthread_create(&thread->id, &attr, plat_thread_main, thread) == 0;
        pthread_attr_destroy(&attr);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

MOE_UNUSED static void plat_thread_join(plat_thread *thread)
{
    pthread_join(thread->id, NULL);
}

MOE_UNUSED static bool plat_mutex_init(plat_mutex *m)
{
    return pthread_mutex_init(&m->m, NULL) == 0;
}

MOE_UNUSED static void plat_mutex_destroy(plat_mutex *m)
{
    pthread_mutex_destroy(&m->m);
}

MOE_UNUSED static void plat_mutex_lock(plat_mutex *m)
{
    pthread_mutex_lock(&m->m);
}

MOE_UNUSED static void plat_mutex_unlock(plat_mutex *m)
{
    pthread_mutex_unlock(&m->m);
}

MOE_UNUSED static bool plat_cond_init(plat_cond *c)
{
    return pthread_cond_init(&c->c, NULL) == 0;
}

MOE_UNUSED static void plat_cond_destroy(plat_cond *c)
{
    pthread_cond_destroy(&c->c);
}

MOE_UNUSED static void plat_cond_wait(plat_cond *c, plat_mutex *m)
{
    pthread_cond_wait(&c->c, &m->m);
}

MOE_UNUSED static void plat_cond_broadcast(plat_cond *c)
{
    pthread_cond_broadcast(&c->c);
}

MOE_UNUSED static void plat_yield(void)
{
    sched_yield();
}

/* ================================================================================== Win32 == */
#else

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>

MOE_UNUSED static uint64_t plat_time_ns(void)
{
    LARGE_INTEGER now, per_second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    uint64_t t = (uint64_t)now.QuadPart, f = (uint64_t)per_second.QuadPart;
    return t / f * 1000000000u + t % f * 1000000000u / f;
}

MOE_UNUSED static uint32_t plat_n_cores(void)
{
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION info[512];
    DWORD bytes = sizeof info;
    DWORD_PTR allowed, system;
    SYSTEM_INFO basic;
    GetSystemInfo(&basic);
    if (!GetProcessAffinityMask(GetCurrentProcess(), &allowed, &system) ||
        !GetLogicalProcessorInformation(info, &bytes))
        return MOE_MAX(basic.dwNumberOfProcessors, 1);
    uint32_t n = 0;
    for (DWORD i = 0; i < bytes / sizeof info[0]; i++)
        n += info[i].Relationship == RelationProcessorCore &&
             (info[i].ProcessorMask & allowed) != 0;
    return MOE_MAX(n, 1);
}

MOE_UNUSED static uint64_t plat_free_memory(void)
{
    MEMORYSTATUSEX state = {.dwLength = sizeof state};
    return GlobalMemoryStatusEx(&state) ? state.ullAvailPhys : 0;
}

static moe_status plat_fail_last(moe_error *error, const char *path, const char *verb)
{
    DWORD number = GetLastError();
    if (number == ERROR_FILE_NOT_FOUND || number == ERROR_PATH_NOT_FOUND)
        return fail(error, MOE_ERR_IO, path, "cannot %s: there is no such file", verb);
    return fail(error, MOE_ERR_IO, path, "cannot %s: system error %lu", verb,
                (unsigned long)number);
}

MOE_UNUSED static moe_status plat_open(plat_file *file, const char *path, moe_error *error)
{
    WCHAR wide[4096];
    if (!MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 4096))
        return fail(error, MOE_ERR_IO, path, "the path is too long or not UTF-8");
    HANDLE h = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING,
                           FILE_ATTRIBUTE_NORMAL, NULL);
    if (h == INVALID_HANDLE_VALUE)
        return plat_fail_last(error, path, "open");
    LARGE_INTEGER bytes;
    if (GetFileType(h) != FILE_TYPE_DISK || !GetFileSizeEx(h, &bytes)) {
        CloseHandle(h);
        return fail(error, MOE_ERR_IO, path, "expected a regular file, got a device or a pipe");
    }
    file->handle = (intptr_t)h;
    file->bytes = (uint64_t)bytes.QuadPart;
    return MOE_OK;
}

MOE_UNUSED static void plat_close(plat_file *file)
{
    CloseHandle((HANDLE)file->handle);
    file->handle = -1;
}

MOE_UNUSED static moe_status plat_read(const plat_file *file, uint64_t offset, void *dst,
                                       uint64_t bytes, const char *path, moe_error *error)
{
    char *out = dst;
    while (bytes) {
        OVERLAPPED at = {.Offset = (DWORD)offset, .OffsetHigh = (DWORD)(offset >> 32)};
        DWORD got = 0, step = (DWORD)MOE_MIN(bytes, (uint64_t)1 << 30);
        if (!ReadFile((HANDLE)file->handle, out, step, &got, &at) || !got)
            return plat_fail_last(error, path, "read");
        out += got;
        offset += got;
        bytes -= got;
    }
    return MOE_OK;
}

MOE_UNUSED static bool plat_size_now(const plat_file *file, uint64_t *bytes)
{
    LARGE_INTEGER size;
    if (!GetFileSizeEx((HANDLE)file->handle, &size))
        return false;
    *bytes = (uint64_t)size.QuadPart;
    return true;
}

MOE_UNUSED static moe_status plat_map(const plat_file *file, const uint8_t **data,
                                      const char *path, moe_error *error)
{
    HANDLE section = CreateFileMappingW((HANDLE)file->handle, NULL, PAGE_READONLY, 0, 0, NULL);
    if (!section)
        return plat_fail_last(error, path, "map");
    const void *p = MapViewOfFile(section, FILE_MAP_READ, 0, 0, 0);
    moe_status status = p ? MOE_OK : plat_fail_last(error, path, "map");
    CloseHandle(section); // the view keeps it alive
    if (p)
        *data = p;
    return status;
}

MOE_UNUSED static void plat_large_pages(void *p, uint64_t bytes)
{
    (void)p, (void)bytes;
}

MOE_UNUSED static void plat_unmap(const uint8_t *data, uint64_t bytes)
{
    (void)bytes;
    UnmapViewOfFile(data);
}

static DWORD WINAPI plat_thread_main(LPVOID p)
{
    plat_thread *thread = p;
    thread->run(thread->arg);
    return 0;
}

MOE_UNUSED static bool plat_thread_start(plat_thread *thread, void (*run)(void *), void *arg)
{
    thread->run = run;
    thread->arg = arg;
    thread->handle = CreateThread(NULL, PLAT_STACK_BYTES, plat_thread_main, thread,
                                  STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return thread->handle != NULL;
}

MOE_UNUSED static void plat_thread_join(plat_thread *thread)
{
    WaitForSingleObject(thread->handle, INFINITE);
    CloseHandle(thread->handle);
}

/* platform.h keeps windows.h out of the other parts: each of these is one pointer, zero at rest. */
_Static_assert(sizeof(SRWLOCK) == sizeof(plat_mutex), "a slim lock is one pointer");
_Static_assert(sizeof(CONDITION_VARIABLE) == sizeof(plat_cond), "a condition is one pointer");

MOE_UNUSED static bool plat_mutex_init(plat_mutex *m)
{
    InitializeSRWLock((PSRWLOCK)m);
    return true;
}

MOE_UNUSED static void plat_mutex_destroy(plat_mutex *m)
{
    (void)m;
}

MOE_UNUSED static void plat_mutex_lock(plat_mutex *m)
{
    AcquireSRWLockExclusive((PSRWLOCK)m);
}

MOE_UNUSED static void plat_mutex_unlock(plat_mutex *m)
{
    ReleaseSRWLockExclusive((PSRWLOCK)m);
}

MOE_UNUSED static bool plat_cond_init(plat_cond *c)
{
    InitializeConditionVariable((PCONDITION_VARIABLE)c);
    return true;
}

MOE_UNUSED static void plat_cond_destroy(plat_cond *c)
{
    (void)c;
}

MOE_UNUSED static void plat_cond_wait(plat_cond *c, plat_mutex *m)
{
    SleepConditionVariableSRW((PCONDITION_VARIABLE)c, (PSRWLOCK)m, INFINITE, 0);
}

MOE_UNUSED static void plat_cond_broadcast(plat_cond *c)
{
    WakeAllConditionVariable((PCONDITION_VARIABLE)c);
}

MOE_UNUSED static void plat_yield(void)
{
    SwitchToThread();
}

#endif
#endif
