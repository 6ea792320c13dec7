/* tests/test.h - the smallest test harness that serves.
 *
 * A test program is tests/test_<part>.c. It includes this file, which brings the whole library with
 * its internals, defines test functions and what to run:
 *
 *     static void addition_carries(void) { CHECK(add(1, 9) == 10, "got %d", add(1, 9)); }
 *     TEST_PROGRAM(part)
 *     {
 *         RUN(addition_carries);
 *     }
 *
 * It compiles alone, with a main() of its own. `make test` compiles many at once, as one program
 * (tests/all.c), so their names at file scope must differ: the compiler says which do not.
 *
 * It prints one line per test, "ok NAME" or "FAIL NAME", and what failed before it; the last line
 * is "N passed, N failed". Tests find their data below test_root() and, if the extra data set is
 * there, below test_shared() (NULL if not: say so with SKIP).
 *
 * An argument runs only the tests whose names contain it. Environment, besides that of test_root(),
 * test_shared() and test_slowness(): MOE_TEST_MODELS, the folder of real models (`make test` sets
 * it); MOE_TEST_FIXTURES and MOE_TEST_CHECKPOINTS, other folders than tests/fixtures and
 * tests/checkpoints; MOE_TEST_WRITE_BITS, where test_forward.c writes bits.txt anew;
 * MOE_TEST_ROUNDS, how many files test_tokenizer.c damages. */
#ifndef MOE_TESTS_TEST_H
#define MOE_TESTS_TEST_H

#ifdef MOE_TEST_CORE /* another form of the library, such as "../dist/moe.c" */
#include MOE_TEST_CORE
#else
#include "../moe.c"
#endif

#include <stdio.h>
#include <time.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

static int test_n_passed, test_n_failed, test_n_skipped, test_failures;
static const char *test_skip_reason, *test_only;

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition) && test_failures++ < 10) {                                                \
            printf("  %s:%d: %s: ", __FILE__, __LINE__, #condition);                               \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

/* Ends the test function if what follows would make no sense. */
#define REQUIRE(condition, ...)                                                                    \
    do {                                                                                           \
        int failures_before_ = test_failures;                                                      \
        CHECK(condition, __VA_ARGS__);                                                             \
        if (test_failures != failures_before_)                                                     \
            return;                                                                                \
    } while (0)

#define SKIP(reason)                                                                               \
    do {                                                                                           \
        test_skip_reason = (reason);                                                               \
        return;                                                                                    \
    } while (0)

/* Ends the test program, as failed, if none of its tests can run. */
#define CANNOT_RUN(...)                                                                            \
    do {                                                                                           \
        printf("FAIL ");                                                                           \
        printf(__VA_ARGS__);                                                                       \
        printf("\n");                                                                              \
        test_n_failed++;                                                                           \
        return;                                                                                    \
    } while (0)

#define RUN(function) test_run(#function, function)

static void test_begin(int argc, char **argv)
{
    test_only = argc > 1 ? argv[1] : NULL; /* run only the tests whose name contains this */
#ifdef _WIN32 /* lines end as they do elsewhere, and come as they are made */
    _setmode(_fileno(stdout), _O_BINARY);
    setvbuf(stdout, NULL, _IONBF, 0);
#else
    setvbuf(stdout, NULL, _IOLBF, 0);
#endif
}

MOE_UNUSED static void test_run(const char *name, void (*function)(void))
{
    if (test_only && !strstr(name, test_only))
        return;
    test_failures = 0;
    test_skip_reason = NULL;
    function();
    if (test_failures) {
        printf("FAIL %s\n", name);
        test_n_failed++;
    } else if (test_skip_reason) {
        printf("skip %s: %s\n", name, test_skip_reason);
        test_n_skipped++;
    } else {
        printf("ok %s\n", name);
        test_n_passed++;
    }
}

static int test_end(void)
{
    printf("%d passed, %d failed, %d skipped\n", test_n_passed, test_n_failed, test_n_skipped);
    return test_n_failed != 0;
}

MOE_UNUSED static int test_main(int argc, char **argv, void (*program)(void))
{
    test_begin(argc, argv);
    program();
    return test_end();
}

/* TEST_PROGRAMS is set where several are one program: see tests/all.c. */
#ifdef TEST_PROGRAMS
#define TEST_PROGRAM(part) MOE_UNUSED static void part##_program(void)
#else
#define TEST_PROGRAM(part)                                                                         \
    static void part##_program(void);                                                              \
    int main(int argc, char **argv) { return test_main(argc, argv, part##_program); }              \
    static void part##_program(void)
#endif

/* The folder tests/, and the optional folder with more test data (environment MOE_TEST_SHARED). */
MOE_UNUSED static const char *test_root(void)
{
    const char *root = getenv("MOE_TEST_ROOT");
    return root ? root : "tests";
}

MOE_UNUSED static const char *test_shared(void)
{
    return getenv("MOE_TEST_SHARED");
}

/* Milliseconds of processor time that this process took: limits hold on a busy machine too. */
MOE_UNUSED static double test_cpu_ms(void)
{
    return (double)clock() * 1e3 / CLOCKS_PER_SEC;
}

/* A factor on time limits: sanitizers are slow, and emulators by what MOE_TEST_SLOW says. */
MOE_UNUSED static uint32_t test_slowness(void)
{
    const char *slow = getenv("MOE_TEST_SLOW");
    uint32_t factor = slow ? (uint32_t)atoi(slow) : 1;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    factor *= 10;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
    factor *= 10;
#endif
#endif
    return factor ? factor : 1;
}

/* Random numbers that are the same everywhere: xorshift64*. */
static uint64_t test_random_state = 88172645463325252u;

MOE_UNUSED static uint32_t test_random(void)
{
    uint64_t x = test_random_state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    test_random_state = x;
    return (uint32_t)(x * 2685821657736338717u >> 32);
}

/* Uniform in [-1, 1). */
MOE_UNUSED static float test_random_float(void)
{
    return (float)(int32_t)test_random() * 0x1p-31f;
}

/* The whole of a file, NUL-terminated, in memory from malloc; NULL if it cannot be read. */
MOE_UNUSED static char *test_read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    char *data = NULL;
    long size;
    if (!fseek(f, 0, SEEK_END) && (size = ftell(f)) >= 0 && !fseek(f, 0, SEEK_SET) &&
        (data = malloc((size_t)size + 1))) {
        *bytes = fread(data, 1, (size_t)size, f);
        data[*bytes] = 0;
    }
    fclose(f);
    return data;
}

#endif
