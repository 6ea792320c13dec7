/* tests/scratch.h - a folder of the test program's own below $TMPDIR, and files in it:
 *
 *     if (!scratch_begin("convert")) return;
 *     scratch_write(scratch_path("small.gguf"), data, bytes);
 *     ...
 *     scratch_end();           removes the folder with all that is in it
 */
#ifndef MOE_TESTS_SCRATCH_H
#define MOE_TESTS_SCRATCH_H

#include "test.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

static char scratch_folder[256];

/* A folder that cannot be made is a failed test. */
MOE_UNUSED static bool scratch_begin(const char *name)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(scratch_folder, sizeof scratch_folder, "%s/moe-test-%s.XXXXXX", tmp ? tmp : "/tmp",
             name);
    if (mkdtemp(scratch_folder))
        return true;
    printf("FAIL cannot make a folder: %s\n", scratch_folder);
    test_n_failed++;
    return false;
}

/* The path of a file in the folder; good until sixteen more have been asked for. */
MOE_UNUSED static const char *scratch_path(const char *name)
{
    static char paths[16][512];
    static int next;
    char *path = paths[next++ % 16];
    snprintf(path, sizeof paths[0], "%s/%s", scratch_folder, name);
    return path;
}

MOE_UNUSED static void scratch_write(const char *path, const void *data, size_t bytes)
{
    unlink(path); // file systems are quicker with a new file than with one that is cut to 0
    FILE *f = fopen(path, "wb");
    bool ok = f && (!bytes || fwrite(data, 1, bytes, f) == bytes);
    if (f)
        ok &= fclose(f) == 0;
    CHECK(ok, "cannot write %s", path);
}

MOE_UNUSED static void scratch_write_text(const char *path, const char *text)
{
    scratch_write(path, text, strlen(text));
}

MOE_UNUSED static bool scratch_exists(const char *path)
{
    struct stat info;
    return !lstat(path, &info);
}

MOE_UNUSED static void scratch_remove(const char *path)
{
    DIR *dir = opendir(path);
    char name[1100];
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        snprintf(name, sizeof name, "%s/%s", path, e->d_name);
        struct stat info;
        if (!lstat(name, &info) && S_ISDIR(info.st_mode))
            scratch_remove(name);
        else
            unlink(name);
    }
    if (dir)
        closedir(dir);
    rmdir(path);
}

MOE_UNUSED static void scratch_end(void)
{
    scratch_remove(scratch_folder);
}

#endif
