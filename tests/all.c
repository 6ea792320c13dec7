/* tests/all.c - many test programs in one, so that the library is compiled once for all of them.
 *
 * The Makefile has the compiler include their files in front of this one (-include) and lists them
 * in TEST_PROGRAMS, such as TEST(api) TEST(gguf). It makes a link for each name: the program runs
 * the test by whose name it is called. Two names at file scope that are the same are the compiler's
 * errors. */
#include "test.h"

#define TEST(part) {"test_" #part, part##_program},

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*program)(void);
    } programs[] = {TEST_PROGRAMS};
    const char *name = argv[0];
    for (const char *c = name; *c; c++)
        name = *c == '/' || *c == '\\' ? c + 1 : name;
    const size_t n = strcspn(name, "."); // of Windows' .exe
    for (size_t i = 0; i < MOE_COUNT(programs); i++)
        if (strlen(programs[i].name) == n && !memcmp(name, programs[i].name, n))
            return test_main(argc, argv, programs[i].program);
    printf("no test is called %s\n", name);
    return 1;
}
