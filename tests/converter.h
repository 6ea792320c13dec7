/* tests/converter.h - the converter with its internals; only in builds with text and zstd.
 *
 * Three sizes are set so small here that the little models of the tests have compressed slices of
 * many segments, and keep the thread that hashes their source waiting. */
#ifndef MOE_TESTS_CONVERTER_H
#define MOE_TESTS_CONVERTER_H

#define MOE_CONVERT_SMALL_BYTES 512
#define MOE_CONVERT_SEGMENT_BYTES 3000
#define MOE_CONVERT_HASH_LEAD (1 << 17)

#include "test.h"

#include "../convert/convert.c"

#include <utime.h>

/* Runs a conversion; all of its memory must come back. */
MOE_UNUSED static moe_status convert_with(const conv_options *options, moe_error *error)
{
    conv_job job;
    *error = (moe_error){0};
    moe_status status = conv_run(&job, options, error);
    conv_close(&job);
    CHECK(!atomic_load(&job.mem.used_bytes), "memory is left");
    return status;
}

/* The folder of a checkpoint: of the committed ones, or of others that make_checkpoints.py made. */
MOE_UNUSED static const char *checkpoint(const char *name)
{
    static char path[500];
    const char *other = getenv("MOE_TEST_CHECKPOINTS");
    snprintf(path, sizeof path, "%s%s/%s", other ? other : test_root(), other ? "" : "/checkpoints",
             name);
    return path;
}

/* For conv_options.progress: the file whose path is `user` is another one from now on. */
MOE_UNUSED static void touch_source(void *user, const conv_progress *progress)
{
    struct utimbuf times = {1, 1};
    (void)progress;
    utime(user, &times);
}

#endif
