/* bench/loading.c - how fast files are opened: build/bench/loading FILE...
 *
 * Opens each file (.moe or .gguf) as the library does, directory and weights but no model, and
 * prints for the best of a few rounds: seconds, the bytes that were decoded or read into memory,
 * and the rate at which stored bytes were taken in, for each core that took part. Files are in the
 * page cache after the first round: this measures the machine, not the drive. Without arguments it
 * says so. */
#include "../moe.c"

#include <stdio.h>

typedef struct loading {
    double seconds;
    uint64_t file_bytes, stored_bytes, loaded_bytes, peak_bytes;
} loading;

/* What is compressed in a .moe file, and what it becomes. */
static void loading_count(const moe_directory *dir, loading *l)
{
    const moefile *f = dir->moe;
    l->file_bytes = dir->files->bytes;
    for (uint32_t i = 0; f && i < f->header.n_slices; i++) {
        const moefile_slice s = moefile_slice_at(f, i);
        if (s.encoding == MOEFILE_PLANES) {
            l->stored_bytes += s.stored_bytes;
            l->loaded_bytes += moefile_part_of(f, &s)->bytes;
        }
    }
}

static int loading_once(const char *path, loading *best)
{
    moe_mem mem;
    moe_error error = {0};
    moe_directory *dir = NULL;
    mem_init(&mem, NULL, 0);
    const uint64_t start = plat_time_ns();
    if (directory_open_file(&dir, path, &mem, &error)) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    loading l = {.seconds = (double)(plat_time_ns() - start) * 1e-9};
    loading_count(dir, &l);
    l.peak_bytes = mem.peak_bytes;
    directory_close(dir);
    if (!best->file_bytes || l.seconds < best->seconds)
        *best = l;
    return 0;
}

int main(int argc, char **argv)
{
    enum { ROUNDS = 5 };
    if (argc < 2)
        printf("usage: loading FILE...\n");
    else
        printf("%-40s %10s %9s %12s %10s %14s %10s\n", "file", "MB", "seconds", "decoded MB",
               "over, MB", "stored GB/s", "per core");
    for (int i = 1; i < argc; i++) {
        loading best = {0};
        for (int round = 0; round < ROUNDS; round++)
            if (loading_once(argv[i], &best))
                return 1;
        const double rate = (double)best.stored_bytes / best.seconds * 1e-9;
        const char *name = strrchr(argv[i], '/');
        printf("%-40s %10.2f %9.4f %12.2f %10.2f %14.2f %10.2f\n", name ? name + 1 : argv[i],
               (double)best.file_bytes * 1e-6, best.seconds, (double)best.loaded_bytes * 1e-6,
               ((double)best.peak_bytes - (double)best.loaded_bytes) * 1e-6, rate,
               rate / MOE_MIN(plat_n_cores(), (uint32_t)DIR_MAX_WORKERS));
    }
    return 0;
}
