/* core/base.h - what all parts stand on: compiler macros, errors, checked size arithmetic, memory.
 *
 * Owns nothing. Everything here is static; moe.c includes it once, before all other parts.
 * Must never: print, exit, read the environment, keep state. */
#ifndef MOE_CORE_BASE_H
#define MOE_CORE_BASE_H

/* No fusing of a * b + c behind our back: where a fused operation is meant, the code says fmaf.
 * This stands before every include, so that it reaches the bodies of the intrinsics too. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../moe.h"

#ifdef __cplusplus
#error "moe.c is C: compile it with a C compiler (g++ takes .c files for C++); include moe.h in C++"
#endif
#ifdef __FAST_MATH__
#error "moe.c promises the same bits everywhere: compile it without -ffast-math"
#endif
#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "moe.c needs float arithmetic in float precision: on 32-bit x86 use -mfpmath=sse -msse2"
#endif

/* ------------------------------------------------------------------------------- compiler -- */

#if defined(__GNUC__) || defined(__clang__)
#define MOE_TARGET(isa) __attribute__((target(isa)))
#define MOE_INLINE static inline __attribute__((always_inline))
#define MOE_UNUSED __attribute__((unused))
#define MOE_LIKELY(x) __builtin_expect(!!(x), 1)
#define MOE_UNLIKELY(x) __builtin_expect(!!(x), 0)
#if defined(__MINGW32__) && !defined(__clang__) /* there "printf" is what Microsoft's knows */
#define MOE_PRINTF(fmt, args) __attribute__((format(gnu_printf, fmt, args)))
#else
#define MOE_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#endif
/* In front of a loop whose length is a constant once it is inlined: it is to disappear. Not beside
 * a sanitizer, whose checks keep gcc from seeing the constant. */
#ifdef __clang__
#define MOE_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MOE_UNROLL
#else
#define MOE_UNROLL _Pragma("GCC unroll 24")
#endif
#else
#define MOE_TARGET(isa)
#define MOE_INLINE static inline
#define MOE_UNUSED
#define MOE_LIKELY(x) (x)
#define MOE_UNLIKELY(x) (x)
#define MOE_PRINTF(fmt, args)
#define MOE_UNROLL
#endif

/* Checks for our own bugs, never for input: only in builds with -DMOE_DEBUG. */
#ifdef MOE_DEBUG
#include <assert.h>
#define MOE_ASSERT(condition) assert(condition)
#else
#define MOE_ASSERT(condition) ((void)0)
#endif

/* A test compiles the x86 kernels for any machine: MOE_X86_EMULATED is a header that emulates their
 * intrinsics. Inlining all of that would take minutes. */
#ifdef MOE_X86_EMULATED
#undef MOE_TARGET
#undef MOE_INLINE
#define MOE_TARGET(isa)
#define MOE_INLINE static inline
#define MOE_X86 1
#define MOE_X86_INTRINSICS MOE_X86_EMULATED
#define MOE_X86_REGISTER(v) "+m"(v)
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_NO_SIMD)
#define MOE_X86 1
#define MOE_X86_INTRINSICS <immintrin.h>
#define MOE_X86_REGISTER(v) "+v"(v) /* an operand of inline assembly */
#else
#define MOE_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(MOE_NO_SIMD) && !MOE_X86
#define MOE_ARM64 1
#else
#define MOE_ARM64 0
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "moe.c reads little-endian files in place and needs a little-endian machine"
#endif

#define MOE_COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define MOE_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MOE_MAX(a, b) ((a) > (b) ? (a) : (b))

/* ----------------------------------------------------------------------------- arithmetic -- */

/* a b + c rounded once, which fmaf() promises. The product is exact in binary64, and so is the
 * error of the sum (Knuth's TwoSum). Where there is one, the sum becomes its neighbour with an odd
 * last bit: that keeps what the rounding to binary32 must know (Boldo and Melquiond, 2008). */
MOE_UNUSED MOE_INLINE float exact_fmaf(float a, float b, float c)
{
    const double product = (double)a * b;
    double sum = product + c;
    const double back = sum - product, error = (product - (sum - back)) + (c - back);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (error != 0 && isfinite(sum) && !(bits & 1))
        bits = (error > 0) == (sum > 0) ? bits + 1 : bits - 1;
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
}

#ifdef __MINGW32__ /* its fmaf() rounds twice */
#define fmaf(a, b, c) exact_fmaf(a, b, c)
#endif

/* --------------------------------------------------------------------------------- errors -- */

/* The length of the well-formed UTF-8 sequence at text [bytes], 1..4; 0 if there is none. */
MOE_UNUSED static size_t utf8_sequence(const char *text, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)text;
    if (!bytes || p[0] < 0x80)
        return bytes ? 1 : 0;
    if (p[0] < 0xc2 || p[0] > 0xf4)
        return 0;
    size_t n = p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    // The second byte's range shuts out overlong forms, surrogates, and what is past U+10FFFF.
    unsigned low = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;
    unsigned high = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
    if (bytes < n || p[1] < low || p[1] > high)
        return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

/* Makes text from a file fit to be shown: control characters and what is not UTF-8 become '?'. */
static void text_clean(char *text)
{
    for (size_t left = strlen(text), n; left; text += n, left -= n) {
        n = utf8_sequence(text, left);
        if (n == 0 || (n == 1 && ((unsigned char)*text < 0x20 || *text == 0x7f))) {
            *text = '?';
            n = 1;
        }
    }
}

/* Fills *error (if there is one) and returns `status`, so that a failure is one statement:
 *     return fail(err, MOE_ERR_FORMAT, key, "expected %u, got %u", want, got);
 * `subject` names the key, tensor or option; NULL for none. Text from a file may stand in it: bytes
 * that are not printable ASCII or well-formed UTF-8 are shown as '?'. */
MOE_UNUSED MOE_PRINTF(4, 5) static moe_status fail(moe_error *error, moe_status status,
                                                  const char *subject, const char *format, ...)
{
    if (!error)
        return status;
    error->status = status;
    snprintf(error->subject, sizeof error->subject, "%s", subject ? subject : "");
    int used = 0;
    if (subject && *subject)
        used = snprintf(error->message, sizeof error->message, "%s: ", error->subject);
    va_list args;
    va_start(args, format);
    vsnprintf(error->message + used, sizeof error->message - (size_t)used, format, args);
    va_end(args);
    text_clean(error->subject);
    text_clean(error->message);
    return status;
}

/* ---------------------------------------------------------------- checked size arithmetic -- */

/* Each returns false, and leaves *out alone, if the exact result does not fit. All arithmetic on
 * numbers from a file goes through these. */
MOE_UNUSED static bool checked_add(uint64_t a, uint64_t b, uint64_t *out)
{
    if (a > UINT64_MAX - b)
        return false;
    *out = a + b;
    return true;
}

MOE_UNUSED static bool checked_mul(uint64_t a, uint64_t b, uint64_t *out)
{
    if (b && a > UINT64_MAX / b)
        return false;
    *out = a * b;
    return true;
}

/* Rounds up to a multiple of `align`, a power of two. */
MOE_UNUSED static bool checked_align(uint64_t a, uint64_t align, uint64_t *out)
{
    if (!checked_add(a, align - 1, &a))
        return false;
    *out = a & ~(align - 1);
    return true;
}

MOE_UNUSED static uint64_t align_up(uint64_t a, uint64_t align)
{
    return (a + align - 1) & ~(align - 1);
}

/* --------------------------------------------------------------------------------- memory -- */

/* The allocator of one model and all that belongs to it: the host's functions, the ceiling, and
 * what is in use. Shared by threads: the counter is atomic. */
typedef struct moe_mem {
    moe_host host;
    uint64_t limit_bytes; /* 0: none */
    _Atomic uint64_t used_bytes;
    _Atomic uint64_t peak_bytes;
} moe_mem;

enum { MEM_ALIGN = 64 };

/* In front of each block, so that mem_free needs no size. */
typedef union mem_head {
    struct {
        uint64_t bytes;       /* of the whole allocation */
        uint64_t asked_bytes; /* of what the caller may use */
    };
    char pad[MEM_ALIGN];
} mem_head;

static void mem_init(moe_mem *mem, const moe_host *host, uint64_t limit_bytes)
{
    memset(mem, 0, sizeof *mem);
    moe_host_init(&mem->host);
    if (host)
        memcpy(&mem->host, host, MOE_MIN(host->size, sizeof mem->host));
    mem->host.size = sizeof mem->host;
    mem->limit_bytes = limit_bytes;
}

/* Counts `bytes` against the ceiling; false if that is over it. */
static bool mem_reserve(moe_mem *mem, uint64_t bytes)
{
    uint64_t used = atomic_load(&mem->used_bytes);
    do {
        if (mem->limit_bytes && (used > mem->limit_bytes || bytes > mem->limit_bytes - used))
            return false;
    } while (!atomic_compare_exchange_weak(&mem->used_bytes, &used, used + bytes));
    uint64_t peak = atomic_load(&mem->peak_bytes);
    while (peak < used + bytes &&
           !atomic_compare_exchange_weak(&mem->peak_bytes, &peak, used + bytes))
        ;
    return true;
}

static void *mem_raw_alloc(moe_mem *mem, uint64_t bytes)
{
    if (bytes > SIZE_MAX)
        return NULL;
    if (mem->host.alloc)
        return mem->host.alloc(mem->host.user, (size_t)bytes, MEM_ALIGN);
#ifdef _WIN32
    return _aligned_malloc((size_t)bytes, MEM_ALIGN);
#else
    void *p = NULL;
    return posix_memalign(&p, MEM_ALIGN, (size_t)bytes) ? NULL : p;
#endif
}

/* n x item_bytes bytes, not cleared, aligned to 64. NULL if the size overflows, is over the
 * ceiling, or the host has no more. n = 0 gives a block of no bytes, not NULL. */
MOE_UNUSED static void *mem_alloc_uncleared(moe_mem *mem, uint64_t n, uint64_t item_bytes)
{
    uint64_t bytes;
    if (!checked_mul(n, item_bytes, &bytes) || !checked_add(bytes, sizeof(mem_head), &bytes) ||
        !checked_align(bytes, MEM_ALIGN, &bytes) || !mem_reserve(mem, bytes))
        return NULL;
    mem_head *head = mem_raw_alloc(mem, bytes);
    if (!head) {
        atomic_fetch_sub(&mem->used_bytes, bytes);
        return NULL;
    }
    head->bytes = bytes;
    head->asked_bytes = n * item_bytes;
    return head + 1;
}

/* The same, filled with zeros. */
MOE_UNUSED static void *mem_alloc(moe_mem *mem, uint64_t n, uint64_t item_bytes)
{
    void *p = mem_alloc_uncleared(mem, n, item_bytes);
    return p ? memset(p, 0, (size_t)(n * item_bytes)) : NULL;
}

MOE_UNUSED static void mem_free(moe_mem *mem, const void *p)
{
    if (!p)
        return;
    mem_head *head = (mem_head *)(uintptr_t)p - 1;
    uint64_t bytes = head->bytes;
    if (mem->host.free)
        mem->host.free(mem->host.user, head, (size_t)bytes, MEM_ALIGN);
    else
#ifdef _WIN32
        _aligned_free(head);
#else
        free(head);
#endif
    atomic_fetch_sub(&mem->used_bytes, bytes);
}

/* A block of a new size with the old content, the rest zeroed; NULL leaves the old block alone. */
MOE_UNUSED static void *mem_grow(moe_mem *mem, void *p, uint64_t n, uint64_t item_bytes)
{
    void *q = mem_alloc(mem, n, item_bytes);
    if (q && p) {
        uint64_t old_bytes = ((mem_head *)p - 1)->asked_bytes;
        memcpy(q, p, (size_t)MOE_MIN(old_bytes, n * item_bytes));
        mem_free(mem, p);
    }
    return q;
}

/* "Out of memory", said with the number that was asked for. */
MOE_UNUSED static moe_status fail_memory(moe_error *error, const moe_mem *mem, const char *what,
                                         uint64_t bytes)
{
    if (mem->limit_bytes)
        return fail(error, MOE_ERR_LIMIT, what,
                    "%llu bytes do not fit under the memory ceiling of %llu bytes (%llu in use)",
                    (unsigned long long)bytes, (unsigned long long)mem->limit_bytes,
                    (unsigned long long)atomic_load(&mem->used_bytes));
    return fail(error, MOE_ERR_MEMORY, what, "cannot allocate %llu bytes",
                (unsigned long long)bytes);
}

MOE_UNUSED static void mem_log(const moe_mem *mem, moe_log_level level, const char *line)
{
    if (mem->host.log)
        mem->host.log(mem->host.user, level, line);
}

MOE_UNUSED static void mem_progress(const moe_mem *mem, const char *stage, uint64_t done,
                                    uint64_t total)
{
    if (mem->host.progress)
        mem->host.progress(mem->host.user, stage, done, total);
}

MOE_INLINE bool cancelled(const moe_cancel *cancel)
{
    return cancel && __atomic_load_n(&cancel->flag, __ATOMIC_RELAXED) != 0;
}

#endif
