/* tests/test_system.c - files by name, as the program asks the operating system for them
 * (cli/system.c): what is replaced, and that errno is the reason where something fails. */
#include "test.h"

/* The program does not see the library's internals, some of which have the same names. */
#define json_bool cli_json_bool
#define json_number cli_json_number
#define json_string cli_json_string
#include "../cli/system.c"
#undef json_bool
#undef json_number
#undef json_string

#include <errno.h>
#ifdef _WIN32
#include <process.h>
#define getpid _getpid
#endif

/* Of a file of this process, in the folder for such. */
static const char *system_path(char path[512], const char *name)
{
#ifdef _WIN32
    const char *folder = getenv("TEMP");
#else
    const char *folder = getenv("TMPDIR");
#endif
    snprintf(path, 512, "%s/moe_%d_%s", folder ? folder : "/tmp", (int)getpid(), name);
    return path;
}

static bool system_make(const char *path, char content)
{
    FILE *file = system_open_file(path, "wb");
    return file && fputc(content, file) == content && !fclose(file);
}

static int system_content(const char *path)
{
    FILE *file = system_open_file(path, "rb");
    const int c = file ? fgetc(file) : -1;
    if (file)
        fclose(file);
    return c;
}

/* The reason for which it fails; 0 if it does not. */
static int system_replace_reason(const char *from, const char *to)
{
    errno = 0;
    return system_replace_file(from, to) ? 0 : errno;
}

static void files_replace_others(void)
{
    char paths[2][512];
    const char *from = system_path(paths[0], "a"), *to = system_path(paths[1], "d\xc3\xb6rt");
    system_remove_file(to);
    REQUIRE(system_make(from, 'a'), "cannot write %s here", from);
    CHECK(system_is_replaceable(to) && !system_replace_reason(from, to), "%s", to);
    REQUIRE(system_make(from, 'b') && system_content(to) == 'a', "%s", to);
    CHECK(system_is_replaceable(to) && !system_replace_reason(from, to), "%s", to);
    CHECK(system_content(to) == 'b' && system_content(from) == -1, "%s", to);
    system_remove_file(to);
    CHECK(system_content(to) == -1, "%s is there", to);
}

static void errno_is_the_reason(void)
{
    char paths[5][512];
    const char *from = system_path(paths[0], "a"), *none = system_path(paths[1], "none");
    const char *inside = system_path(paths[2], "none/a");
    CHECK(!system_is_replaceable("."), "a folder");
    REQUIRE(system_make(from, 'a'), "cannot write %s here", from);
    CHECK(system_replace_reason(none, from) == ENOENT, "%d", errno);
    CHECK(system_replace_reason(from, inside) == ENOENT, "%d", errno);
    const int folder = system_replace_reason(from, ".");
    CHECK(folder == EACCES || folder == EBUSY || folder == EISDIR, "%d", folder);
    errno = 0;
    CHECK(!system_open_file(none, "rb") && errno == ENOENT, "%d", errno);
#ifdef _WIN32
    const char *bad = system_path(paths[3], "\xff"), *held = system_path(paths[4], "held");
    errno = 0; /* there names are UTF-16, and a byte that is no UTF-8 has no form */
    CHECK(!system_open_file(bad, "wb") && errno == EILSEQ, "%d", errno);
    CHECK(system_replace_reason(from, bad) == EILSEQ, "%d", errno);
    FILE *file = system_open_file(held, "wb");
    CHECK(file && system_replace_reason(from, held) == EACCES, "%d", errno);
    fclose(file);
    system_remove_file(held);
#endif
    CHECK(system_content(from) == 'a', "what could not be moved is not there");
    system_remove_file(from);
}

TEST_PROGRAM(system)
{
    RUN(files_replace_others);
    RUN(errno_is_the_reason);
}
