/* core/platform.h - what differs between operating systems: files, maps, threads, the clock.
 * core/platform.c implements it for POSIX and Win32. */
#ifndef MOE_CORE_PLATFORM_H
#define MOE_CORE_PLATFORM_H

#include "base.h"

/* -- clock and machine -- */
MOE_UNUSED static uint64_t plat_time_ns(void);      // monotonic
MOE_UNUSED static uint32_t plat_n_cores(void);      // physical cores this process may use, >= 1
MOE_UNUSED static uint64_t plat_free_memory(void);  // bytes that can be allocated without swapping,
                                                    // cgroup limits heeded; 0: unknown

/* Asks for large pages behind memory that is about to be filled, or a map: otherwise the first
 * touch of each small page can take as long as what is written to it, and reads here and there wait
 * for walks of the page tables. A hint. */
MOE_UNUSED static void plat_large_pages(void *p, uint64_t bytes);

/* -- files -- */
typedef struct plat_file {
    intptr_t handle;
    uint64_t bytes;
} plat_file;

/* Opens a regular file for reading; anything else (directory, FIFO, device) is an error at once. */
MOE_UNUSED static moe_status plat_open(plat_file *file, const char *path, moe_error *error);
MOE_UNUSED static void plat_close(plat_file *file);
/* Reads exactly `bytes` bytes at `offset`. */
MOE_UNUSED static moe_status plat_read(const plat_file *file, uint64_t offset, void *dst,
                                       uint64_t bytes, const char *path, moe_error *error);
/* The size of the file now; false if it cannot be known. */
MOE_UNUSED static bool plat_size_now(const plat_file *file, uint64_t *bytes);
/* Maps the whole file read-only. */
MOE_UNUSED static moe_status plat_map(const plat_file *file, const uint8_t **data,
                                      const char *path, moe_error *error);
MOE_UNUSED static void plat_unmap(const uint8_t *data, uint64_t bytes);

/* -- threads -- */
#ifdef _WIN32
typedef struct plat_thread { void *handle; void (*run)(void *); void *arg; } plat_thread;
typedef struct plat_mutex { void *srw; } plat_mutex;
typedef struct plat_cond { void *cv; } plat_cond;
#else
#include <pthread.h>
typedef struct plat_thread { pthread_t id; void (*run)(void *); void *arg; } plat_thread;
typedef struct plat_mutex { pthread_mutex_t m; } plat_mutex;
typedef struct plat_cond { pthread_cond_t c; } plat_cond;
#endif

/* At least so much stack: kernels have tiles of up to 150 KB there, more without optimization. */
enum { PLAT_STACK_BYTES = 1 << 20 };

/* *thread must stay where it is until it was joined. */
MOE_UNUSED static bool plat_thread_start(plat_thread *thread, void (*run)(void *), void *arg);
MOE_UNUSED static void plat_thread_join(plat_thread *thread);
MOE_UNUSED static bool plat_mutex_init(plat_mutex *m);
MOE_UNUSED static void plat_mutex_destroy(plat_mutex *m);
MOE_UNUSED static void plat_mutex_lock(plat_mutex *m);
MOE_UNUSED static void plat_mutex_unlock(plat_mutex *m);
MOE_UNUSED static bool plat_cond_init(plat_cond *c);
MOE_UNUSED static void plat_cond_destroy(plat_cond *c);
MOE_UNUSED static void plat_cond_wait(plat_cond *c, plat_mutex *m);
MOE_UNUSED static void plat_cond_broadcast(plat_cond *c);
MOE_UNUSED static void plat_yield(void);             // lets another thread run
MOE_INLINE void plat_relax(void)                     // a pause inside a spin loop
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
