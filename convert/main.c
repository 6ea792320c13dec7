/* convert/main.c - the program moe-convert: arguments, progress, what is said at the end.
 *
 * Results go to stdout, everything else to stderr. Exit status: 0, 1 for a failed conversion, 2 for
 * wrong arguments, 130 after Ctrl-C. */
#include "../moe.c"
#include "convert.c"

#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>

static const char help_text[] =
"usage: moe-convert SOURCE OUT [options]\n"
"\n"
"Turns a model into one file: a .moe or a .gguf, by the name of OUT.\n"
"\n"
"SOURCE is\n"
"  a folder with a Hugging Face checkpoint: config.json, safetensors (one file or shards;\n"
"      F32, F16, BF16, FP8, MXFP4, NVFP4, packed INT4 or INT8), tokenizer.json or\n"
"      tokenizer.model, and its config\n"
"  a GGUF file, or the first part of a split one\n"
"  a .moe file\n"
"\n"
"  -q, --quant TYPE       the type of the matrices, or a mix; without it the types of the\n"
"                         source are kept (FP8 becomes BF16, INT4 Q4_0, INT8 Q8_0)\n"
"      --keep REGEX=TYPE  tensors whose GGUF name matches get this type; may be repeated,\n"
"                         the last one that matches wins. In a .moe file a single\n"
"                         expert is NAME#EXPERT, as in blk.0.ffn_up_exps.weight#7\n"
"      --bpw BITS         choose the types so that the file has at most so many bits per weight\n"
"                         and loses as little as possible; in a .moe file each expert has\n"
"                         its own, and if it is compressed, rates of trellis-coded types\n"
"      --size BYTES       the same for the size of the file, such as 6GB or 800M\n"
"      --imatrix FILE     which columns matter, by `moe imatrix` or llama-imatrix: heeded in\n"
"                         every quantizer\n"
"      --store auto|raw|zstd  what of a .moe file is compressed: what saves 10 % or more,\n"
"                         nothing, or what saves 1 %. Raw weights are used from the map\n"
"      --for ram|disk     the same as --store raw, --store zstd\n"
"  -n, --dry-run          show each tensor's type and size and the size of the file, write\n"
"                         nothing\n"
"  -t, --threads N        default: one for each core\n"
"      --pre NAME         tokenizer.ggml.pre, if it is not found\n"
"      --allow-nonfinite  accept NaN and infinite weights; in integer types they become 0\n"
"      --json             a summary as JSON on stdout\n"
"      --quiet            no progress, no summary\n"
"  -h, --help, --version\n"
"\n"
"Types:";

static const char help_end[] =
"\n"
"Rates: tcq3.7 stores matrices at 3.7 bits per weight, or any rate from 1.0 to 6.0, in a .moe\n"
"file; the output matrix gets 1.5 bits more.\n"
"\n"
"q4_k_m is the usual choice: about 4.8 bits per weight, with 6 bits where errors cost most.\n"
"q5_k_m and q6_k are closer to the source, q3_k_m is smaller, q8_0 is hardly different from it.\n"
"Norms, biases and routers always stay floats. Types with blocks of 256 give way to one with\n"
"blocks of 32 where a matrix's rows are not a multiple of 256. Weights in IQ1, IQ2, IQ3 and TQ\n"
"stay as they are without --quant; nothing is quantized to these.\n"
"\n"
"Examples:\n"
"  moe-convert ~/models/Qwen3-0.6B qwen3.gguf -q q4_k_m\n"
"  moe-convert ~/models/OLMoE-1B-7B olmoe.gguf -q q4_k_m --keep 'ffn_down_exps=Q6_K' --dry-run\n"
"  moe-convert big.gguf small.moe -q q3_k_m --for disk\n"
"\n"
"The file appears under its name only when it is whole. A .moe that was not finished, even if\n"
"the program was killed, is gone on with by the same command. Memory: some 20 MB for each\n"
"thread, whatever the size of the model.\n";

enum { EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130, MAX_KEEPS = 64 };

/* The one thing that a signal handler has to reach. */
static moe_cancel main_cancel;

static void main_on_signal(int number)
{
    (void)number;
    moe_cancel_set(&main_cancel);
}

typedef struct main_args {
    conv_options options;
    conv_keep keeps[MAX_KEEPS];
    bool json, quiet;
} main_args;

/* ------------------------------------------------------------------------------- progress -- */

typedef struct main_bar {
    uint64_t started_ns, shown_ns;
    uint64_t done_before; // weights that an earlier run had made, or the first report
    bool drawn;
} main_bar;

/* Columns of the terminal; a line that is longer would not be overwritten by the next. */
static int main_columns(void)
{
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
}

/* "0:07", "12:34", "1:02:03" */
static const char *main_clock(double seconds, char text[32])
{
    const unsigned s = seconds < 3.6e8 ? (unsigned)(seconds + 0.5) : 360000000u;
    if (s >= 3600)
        snprintf(text, 32, "%u:%02u:%02u", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(text, 32, "%u:%02u", s / 60, s % 60);
    return text;
}

static void main_show(void *user, const conv_progress *p)
{
    enum { WIDTH = 20, MAX_LINE = 256 };
    main_bar *bar = user;
    const uint64_t now = plat_time_ns();
    if (!bar->started_ns) {
        bar->started_ns = now;
        bar->done_before = p->done;
    }
    const double seconds = (double)(now - bar->started_ns) * 1e-9;
    const double done = (double)(p->done - bar->done_before);
    if (seconds < 0.5 || now - bar->shown_ns < 100000000 || !(done > 0))
        return;
    bar->shown_ns = now;
    bar->drawn = true;
    const double part = p->total ? (double)p->done / (double)p->total : 1;
    char hashes[WIDTH + 1] = "", line[MAX_LINE], left[32];
    for (int i = 0; i < WIDTH; i++)
        hashes[i] = i < (int)(part * WIDTH) ? '#' : ' ';
    snprintf(line, sizeof line, "[%s] %3d %%  %s left  %.0f M weights/s  %s", hashes,
             (int)(part * 100), main_clock(seconds * (double)(p->total - p->done) / done, left),
             done / seconds * 1e-6, p->tensor);
    fprintf(stderr, "\r%.*s\033[K", MOE_MIN(main_columns() - 1, MAX_LINE), line);
}

/* -------------------------------------------------------------------------------- results -- */

static void main_json_text(const char *text)
{
    putchar('"');
    for (const unsigned char *p = (const unsigned char *)text; *p; p++)
        if (*p == '"' || *p == '\\')
            printf("\\%c", *p);
        else if (*p < 0x20)
            printf("\\u%04x", *p);
        else
            putchar(*p);
    putchar('"');
}

/* Bytes and weights of each type, in the order of quant_table. */
typedef struct main_sums {
    uint64_t n_tensors, n_weights, bytes;
} main_sums;

static void main_sum(const conv_job *job, main_sums sums[MOE_COUNT(quant_table)])
{
    memset(sums, 0, MOE_COUNT(quant_table) * sizeof *sums);
    for (size_t i = 0; i < job->source.n_tensors; i++) {
        const conv_tensor *t = &job->source.tensors[i];
        const uint32_t n_parts = t->part_types ? job->source.n_expert : 1;
        for (uint32_t k = 0; k < n_parts; k++) {
            const moe_quant *type = conv_part_type(t, k);
            const uint64_t n = t->row_len * t->n_rows / n_parts;
            main_sums *sum = &sums[quant_index(type)];
            sum->n_tensors += k == 0;
            sum->n_weights += n;
            sum->bytes += n / type->block_len * type->block_bytes;
        }
    }
}

static double main_bits(const conv_job *job)
{
    return job->n_weights ? 8.0 * (double)(job->file_bytes - job->header_bytes) /
                                (double)job->n_weights : 0;
}

static void main_print_json(const conv_job *job)
{
    main_sums sums[MOE_COUNT(quant_table)];
    bool comma = false;
    main_sum(job, sums);
    printf("{\"out\": ");
    main_json_text(job->options.out);
    printf(", \"written\": %s, \"architecture\": ", job->options.dry_run ? "false" : "true");
    main_json_text(job->source.arch);
    printf(", \"bytes\": %llu, \"header_bytes\": %llu, \"n_tensors\": %zu, \"n_weights\": %llu, "
           "\"bits_per_weight\": %.4f, \"seconds\": %.3f, \"types\": {",
           (unsigned long long)job->file_bytes, (unsigned long long)job->header_bytes,
           job->source.n_tensors, (unsigned long long)job->n_weights, main_bits(job), job->seconds);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        if (!sums[i].n_tensors)
            continue;
        printf("%s\"%s\": {\"n_tensors\": %llu, \"n_weights\": %llu, \"bytes\": %llu}",
               comma ? ", " : "", quant_table[i]->name, (unsigned long long)sums[i].n_tensors,
               (unsigned long long)sums[i].n_weights, (unsigned long long)sums[i].bytes);
        comma = true;
    }
    printf("}, \"notes\": [");
    for (uint32_t i = 0; i < job->source.n_notes; i++) {
        printf("%s", i ? ", " : "");
        main_json_text(job->source.notes[i]);
    }
    printf("]}\n");
}

static void main_print_plan(const conv_job *job)
{
    for (size_t i = 0; i < job->source.n_tensors; i++) {
        const conv_tensor *t = &job->source.tensors[i];
        char shape[96];
        size_t used = 0;
        for (uint32_t d = 0; d < t->n_dims; d++)
            used += (size_t)snprintf(shape + used, sizeof shape - used, "%s%llu", d ? " x " : "",
                                     (unsigned long long)t->dims[d]);
        char type[32];
        if (t->bits > 0 && tcq_is(t->target))
            snprintf(type, sizeof type, "%s %.2f", t->target->name, t->bits);
        else
            snprintf(type, sizeof type, "%s", t->target->name);
        printf("%-36s %-22s %-9s %14llu\n", t->name, shape, t->part_types ? "mixed" : type,
               (unsigned long long)t->stored_bytes);
    }
}

/* "4.21 GB", "106.2 MB": powers of 1000, as sizes of files are told. */
static const char *main_bytes(uint64_t bytes, char text[32])
{
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB"};
    double x = (double)bytes;
    size_t unit = 0;
    for (; x >= 999.5 && unit + 1 < MOE_COUNT(units); unit++)
        x /= 1000;
    snprintf(text, 32, unit ? "%.4g %s" : "%.0f %s", x, units[unit]);
    return text;
}

static void main_print(const conv_job *job)
{
    char size[32];
    main_sums sums[MOE_COUNT(quant_table)];
    main_sum(job, sums);
    if (job->options.dry_run)
        main_print_plan(job);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        if (sums[i].n_tensors)
            printf("%-7s %5llu tensors %16llu weights %16llu bytes in memory\n",
                   quant_table[i]->name, (unsigned long long)sums[i].n_tensors,
                   (unsigned long long)sums[i].n_weights, (unsigned long long)sums[i].bytes);
    printf("%s: %s%llu bytes (%s), %.2f bits per weight", job->options.out,
           !job->options.dry_run ? "" : job->sampled < 1 ? "would have about " : "would have ",
           (unsigned long long)job->file_bytes, main_bytes(job->file_bytes, size), main_bits(job));
    if (!job->options.dry_run)
        printf(", %.1f s, %.0f M weights/s", job->seconds,
               (double)job->n_weights / job->seconds * 1e-6);
    printf("\n");
}

/* ------------------------------------------------------------------------------ arguments -- */

static int main_help(void)
{
    fputs(help_text, stdout);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        if (!quant_table[i]->given)
            printf(" %s", quant_table[i]->name);
    fputs("\nMixes:", stdout);
    for (size_t i = 0; i < MOE_COUNT(plan_mixes); i++)
        printf(" %s", plan_mixes[i].name);
    fputs(help_end, stdout);
    return EXIT_SUCCESS;
}

MOE_PRINTF(1, 2) static int main_usage(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("moe-convert: ", stderr);
    vfprintf(stderr, format, args);
    fputs("\nmoe-convert: see moe-convert --help\n", stderr);
    va_end(args);
    return EXIT_USAGE;
}

/* REGEX=TYPE: the type stands behind the last "=". The regex stays in `text`, which is cut. */
static int main_keep(main_args *a, char *text)
{
    char *equal = strrchr(text, '=');
    if (!equal || equal == text)
        return main_usage("--keep: expected REGEX=TYPE, got %s", text);
    *equal = 0;
    const moe_quant *type = quant_by_name(equal + 1);
    if (!type || type->given)
        return main_usage("--keep: expected a type such as Q6_K behind the =, got %s", equal + 1);
    if (a->options.n_keeps == MAX_KEEPS)
        return main_usage("--keep: expected at most %d of them", MAX_KEEPS);
    a->keeps[a->options.n_keeps++] = (conv_keep){text, type};
    return -1;
}

static int main_threads(main_args *a, const char *text)
{
    char *end;
    const unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || n < 1 || n > 1024)
        return main_usage("--threads: expected 1 to 1024, got %s", text);
    a->options.n_threads = (uint32_t)n;
    return -1;
}

/* --store, or --for, which says the same by what the file is for. */
static int main_store(main_args *a, const char *option, const char *text)
{
    static const struct { const char *option, *text; conv_store store; } words[] = {
        {"--store", "auto", CONV_STORE_AUTO}, {"--store", "raw", CONV_STORE_RAW},
        {"--store", "zstd", CONV_STORE_ZSTD}, {"--for", "ram", CONV_STORE_RAW},
        {"--for", "disk", CONV_STORE_ZSTD}};
    for (size_t i = 0; i < MOE_COUNT(words); i++)
        if (!strcmp(option, words[i].option) && !strcmp(text, words[i].text)) {
            a->options.store = words[i].store;
            return -1;
        }
    return main_usage("%s: expected %s, got %s", option,
                      strcmp(option, "--for") ? "auto, raw or zstd" : "ram or disk", text);
}

static int main_bpw(main_args *a, const char *text)
{
    char *end;
    const double bits = strtod(text, &end);
    if (*text < '0' || *text > '9' || *end || !(bits >= 1 && bits <= 32))
        return main_usage("--bpw: expected 1 to 32, got %s", text);
    a->options.bits_per_weight = bits;
    return -1;
}

/* "6GB" and "6G": powers of 1000, as sizes of files are told; "6GiB": of 1024. */
static int main_size(main_args *a, const char *text)
{
    static const char letters[] = "KMGT";
    char *end;
    double bytes = strtod(text, &end);
    const char *letter = *end ? strchr(letters, *end & ~0x20) : NULL;
    if (letter) {
        const bool binary = end[1] == 'i';
        for (const char *p = letters; p <= letter; p++)
            bytes *= binary ? 1024 : 1000;
        end += binary ? 2 : 1;
    }
    end += *end == 'B';
    if (*text < '0' || *text > '9' || *end || !(bytes >= 1 && bytes < 0x1p62))
        return main_usage("--size: expected a size such as 6GB, 800M or 512MiB, got %s", text);
    a->options.max_bytes = (uint64_t)bytes;
    return -1;
}

/* An option without an argument: true if it was one. */
static bool main_flag(main_args *a, const char *arg)
{
    const struct { const char *name, *letter; bool *flag; } flags[] = {
        {"--dry-run", "-n", &a->options.dry_run},
        {"--allow-nonfinite", "", &a->options.allow_nonfinite},
        {"--json", "", &a->json},
        {"--quiet", "", &a->quiet},
    };
    for (size_t i = 0; i < MOE_COUNT(flags); i++)
        if (!strcmp(arg, flags[i].name) || (*flags[i].letter && !strcmp(arg, flags[i].letter)))
            return *flags[i].flag = true;
    return false;
}

/* An option with an argument; -1: go on. */
static int main_option(main_args *a, const char *arg, char *value)
{
    if (!strcmp(arg, "--keep"))
        return main_keep(a, value);
    if (!strcmp(arg, "--threads") || !strcmp(arg, "-t"))
        return main_threads(a, value);
    if (!strcmp(arg, "--store") || !strcmp(arg, "--for"))
        return main_store(a, arg, value);
    if (!strcmp(arg, "--bpw"))
        return main_bpw(a, value);
    if (!strcmp(arg, "--size"))
        return main_size(a, value);
    if (!strcmp(arg, "--imatrix"))
        a->options.imatrix = value;
    else if (!strcmp(arg, "--pre"))
        a->options.pre = value;
    else
        a->options.quant = value;
    return -1;
}

/* -1: go on; else the exit status. */
static int main_parse(main_args *a, int argc, char **argv)
{
    static const char *const with_value[] = {"--keep", "--threads", "-t", "--pre", "--quant", "-q",
                                             "--store", "--for", "--imatrix", "--bpw", "--size"};
    bool options = true;
    for (int i = 1; i < argc; i++) {
        char *arg = argv[i], *value = NULL, name[32];
        if (options && !strcmp(arg, "--")) {
            options = false;
            continue;
        }
        if (!options || arg[0] != '-' || !arg[1]) {
            const char **place = !a->options.source ? &a->options.source : &a->options.out;
            if (*place)
                return main_usage("expected SOURCE and OUT, got one more: %s", arg);
            *place = arg;
            continue;
        }
        if (!strcmp(arg, "--help") || !strcmp(arg, "-h"))
            return main_help();
        if (!strcmp(arg, "--version")) {
            printf("moe-convert %s\n", moe_version());
            return EXIT_SUCCESS;
        }
        if (main_flag(a, arg))
            continue;
        snprintf(name, sizeof name, "%s", arg);
        if (arg[1] == '-' && strchr(arg, '=')) { // --quant=q8_0
            value = strchr(arg, '=') + 1;
            snprintf(name, sizeof name, "%.*s", (int)(value - 1 - arg), arg);
        }
        bool known = false;
        for (size_t k = 0; k < MOE_COUNT(with_value); k++)
            known |= !strcmp(name, with_value[k]);
        if (!known)
            return main_usage("unknown option %s", arg);
        if (!value && ++i == argc)
            return main_usage("%s: expected a value behind it", name);
        const int status = main_option(a, name, value ? value : argv[i]);
        if (status >= 0)
            return status;
    }
    if (!a->options.out)
        return main_usage("expected SOURCE and OUT");
    return -1;
}

/* A standard stream that is closed would be the next file to be opened, and what is printed would
 * go into that file: opened the wrong way round, it fails as a closed one does. */
static void main_keep_standard_files(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd)
            return;
}

/* Why it failed; and, if work was kept, how to go on. */
static void main_print_failure(const conv_job *job, moe_status status, const moe_error *error)
{
    char partial[4096];
    snprintf(partial, sizeof partial, "%s.partial", job->options.out);
    fprintf(stderr, "moe-convert: %s\n", error->message);
    if (status == MOE_ERR_CANCELLED && conv_ends(job->options.out, ".moe") &&
        !access(partial, F_OK))
        fprintf(stderr, "             the same command goes on from %s\n", partial);
}

int main(int argc, char **argv)
{
    main_keep_standard_files();
    main_args args = {0};
    main_bar bar = {0};
    conv_job job;
    moe_error error = {0};
    const int parsed = main_parse(&args, argc, argv);
    if (parsed >= 0)
        return parsed;
    struct sigaction action = {.sa_handler = main_on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGXFSZ, SIG_IGN); // a file that gets too large is an error like others
    args.options.keeps = args.keeps;
    args.options.cancel = &main_cancel;
    args.options.user = &bar;
    if (!args.quiet && isatty(STDERR_FILENO))
        args.options.progress = main_show;
    const moe_status status = conv_run(&job, &args.options, &error);
    if (bar.drawn)
        fputs("\r\033[K", stderr);
    for (uint32_t i = 0; i < job.source.n_notes && !args.json; i++)
        fprintf(stderr, "moe-convert: %s\n", job.source.notes[i]);
    if (status)
        main_print_failure(&job, status, &error);
    else if (args.json)
        main_print_json(&job);
    else if (!args.quiet)
        main_print(&job);
    conv_close(&job);
    if (!status && (fflush(stdout) || ferror(stdout))) {
        fputs("moe-convert: standard output: cannot write\n", stderr);
        return EXIT_FAILED;
    }
    if (!status)
        return EXIT_SUCCESS;
    return status == MOE_ERR_CANCELLED ? EXIT_INTERRUPTED
           : status == MOE_ERR_ARGUMENT ? EXIT_USAGE
                                        : EXIT_FAILED;
}
