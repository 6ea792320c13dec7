/* cli/common.c - models, errors, files: what more than one verb does. */
#define _XOPEN_SOURCE 700

#include "cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* -------------------------------------------------------------------------------- errors -- */

int cli_fail(const char *format, ...)
{
    progress_clear();
    fputs("moe: ", stderr);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return EXIT_FAILED;
}

/* What a person can do about it, where the library's message cannot know of the options here. */
static const char *status_hint(moe_status status)
{
    switch (status) {
    case MOE_ERR_MEMORY:
    case MOE_ERR_LIMIT:
        return "a smaller --ctx or --cache q8_0 needs less memory; `moe info MODEL --ctx N` tells "
               "how much";
    case MOE_ERR_CONTEXT:
        return "a larger --ctx makes room";
    case MOE_ERR_THREAD:
        return "-t 1 needs no threads";
    case MOE_ERR_FORMAT:
        return "the file may be incomplete: compare its size and checksum with the source";
    default:
        return NULL;
    }
}

/* `about` stands in front of the message, unless it is there anyway. */
static int fail_about(const char *about, moe_status status, const moe_error *error,
                      const char *hint)
{
    if (status == MOE_ERR_CANCELLED && system_interrupted()) {
        progress_clear();
        return EXIT_INTERRUPTED;
    }
    const char *message = error && error->message[0] ? error->message : moe_status_name(status);
    bool is_there = !about || strstr(message, about);
    cli_fail("%s%s%s", is_there ? "" : about, is_there ? "" : ": ", message);
    if (hint)
        fprintf(stderr, "     %s\n", hint);
    return EXIT_FAILED;
}

int cli_fail_status(moe_status status, const moe_error *error, const char *hint)
{
    return fail_about(NULL, status, error, hint ? hint : status_hint(status));
}

int cli_fail_open(moe_status status, const moe_error *error, const char *path,
                  const cli_common *common)
{
    const char *hint = status_hint(status);
    if (status == MOE_ERR_MEMORY || status == MOE_ERR_LIMIT)
        hint = common->memory_limit_bytes ? "a larger --memory-limit makes room" : NULL;
    else if (!strcmp(error->subject, "magic"))
        hint = NULL; /* a file of another kind is not an incomplete one */
    return fail_about(path, status, error, hint);
}

void *cli_alloc(void *old, size_t n, size_t item_bytes)
{
    void *p = item_bytes && n > SIZE_MAX / item_bytes ? NULL
                                                      : realloc(old, n * item_bytes + !n);
    if (!p) {
        cli_fail("out of memory: cannot allocate %zu x %zu bytes", n, item_bytes);
        exit(EXIT_FAILED);
    }
    return p;
}

/* ------------------------------------------------------------------------ common options -- */

static const char *const isa_names[] = {"auto", "c", "avx2", "avx512", "neon", "avxvnni", NULL};
const char *const latent_names[] = {"absorbed", "expanded", NULL};
const char *const cache_names[] = {"f16", "q8_0", "f32", NULL};

bool common_init(cli_common *common)
{
    *common = (cli_common){0};
    const char *isa = getenv("MOE_ISA"), *threads = getenv("MOE_THREADS");
    while (isa && *isa && strcmp(isa, isa_names[common->isa]))
        if (!isa_names[++common->isa]) {
            cli_fail("MOE_ISA: expected auto, c, avx2, avxvnni, avx512 or neon, got \"%s\"", isa);
            return false;
        }
    uint64_t n = 0;
    if (threads && *threads && (!cli_parse_uint(threads, &n) || n > UINT32_MAX)) {
        cli_fail("MOE_THREADS: expected a whole number, got \"%s\"", threads);
        return false;
    }
    common->n_threads = (uint32_t)n;
    return true;
}

const cli_option *common_options(cli_common *common, cli_option table[COMMON_OPTIONS])
{
    cli_option options[COMMON_OPTIONS] = {
        {'t', "threads", CLI_U32, &common->n_threads, "N",
         "threads; 0: one per physical core. Environment: MOE_THREADS", NULL},
        {0, "isa", CLI_CHOICE, &common->isa, "NAME",
         "best instruction set to use; the results are the same.\nEnvironment: MOE_ISA", isa_names},
        {0, "no-mmap", CLI_FLAG, &common->no_mmap, NULL,
         "read the file into memory instead of mapping it", NULL},
        {0, "memory-limit", CLI_BYTES, &common->memory_limit_bytes, "SIZE",
         "fail rather than allocate more, such as 2G; mapped files\ndo not count", NULL},
        {'v', "verbose", CLI_FLAG, &common->verbose, NULL,
         "tell on stderr what was opened and what computes it", NULL},
        {'q', "quiet", CLI_FLAG, &common->quiet, NULL, "no progress, no statistics", NULL},
        {0},
    };
    memcpy(table, options, sizeof options);
    return table;
}

/* -------------------------------------------------------------------------------- models -- */

static void on_log(void *user, moe_log_level level, const char *line)
{
    const cli_common *common = user;
    if (level < MOE_LOG_WARN && !common->verbose)
        return;
    progress_clear();
    fprintf(stderr, "moe: %s%s\n", level == MOE_LOG_WARN ? "warning: " : "", line);
}

static void on_progress(void *user, const char *stage, uint64_t done, uint64_t total)
{
    (void)user;
    progress_show(stage, done, total);
}

void common_model_options(moe_model_options *options, moe_host *host, const char *path,
                          const cli_common *common)
{
    moe_host_init(host);
    host->user = (void *)(uintptr_t)common;
    host->log = on_log;
    host->progress = on_progress;
    progress_enable(!common->quiet);

    moe_model_options_init(options);
    options->host = host;
    options->path = path;
    options->copy = common->no_mmap;
    options->isa = (moe_isa)common->isa;
    options->memory_limit_bytes = common->memory_limit_bytes;
    options->cancel = &cli_cancel;
}

void common_opened(const moe_model *model, const char *path, const cli_common *common)
{
    if (!common->verbose)
        return;
    cli_size size;
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    fprintf(stderr, "moe: %s: %s, %u layer%s, %s of weights, mostly %s, on %s\n", path,
            info.architecture, info.n_layer, info.n_layer == 1 ? "" : "s",
            cli_size_text(&size, info.weight_bytes), info.quantization, info.device);
}

int common_open(moe_model **model, const char *path, const cli_common *common)
{
    moe_host host;
    moe_model_options options;
    common_model_options(&options, &host, path, common);
    moe_error error = {0};
    moe_status status = moe_model_open(model, &options, &error);
    progress_clear();
    if (status)
        return cli_fail_open(status, &error, path, common);
    common_opened(*model, path, common);
    return EXIT_OK;
}

void common_session_options(moe_session_options *options, const cli_common *common, int cache)
{
    enum { MAX_THREADS = 256 }; /* of moe_session_options */
    moe_session_options_init(options);
    options->n_threads = common->n_threads < MAX_THREADS ? common->n_threads : MAX_THREADS;
    if (common->n_threads > MAX_THREADS && !common->quiet)
        fprintf(stderr, "moe: %u threads are more than can be used: %d\n", common->n_threads,
                MAX_THREADS);
    options->cache_type = (moe_cache_type)cache;
    options->cancel = &cli_cancel;
}

int common_session(moe_session **session, moe_model *model, const moe_session_options *options)
{
    moe_error error = {0};
    moe_status status = moe_session_open(session, model, options, &error);
    return status ? cli_fail_status(status, &error, NULL) : EXIT_OK;
}

moe_token *cli_encode(const moe_tokenizer *tokenizer, const char *text, size_t text_bytes,
                      uint32_t flags, size_t *n_tokens)
{
    /* One pass is enough for nearly all text: few tokens are shorter than a byte. */
    size_t capacity = text_bytes + 16;
    for (;;) {
        moe_token *tokens = cli_alloc(NULL, capacity, sizeof *tokens);
        moe_error error = {0};
        moe_status status = moe_tokenizer_encode(tokenizer, text, text_bytes, flags, tokens,
                                                 capacity, n_tokens, &error);
        if (!status)
            return tokens;
        free(tokens);
        if (status != MOE_ERR_LIMIT || *n_tokens <= capacity) {
            cli_fail_status(status, &error, NULL);
            return NULL;
        }
        capacity = *n_tokens;
    }
}

size_t cli_decode(const moe_tokenizer *tokenizer, moe_decoder *decoder, moe_token token,
                  cli_text *text)
{
    for (;;) {
        size_t bytes = text->room ? moe_tokenizer_decode(tokenizer, decoder, token, text->data,
                                                         text->room)
                                  : 255;
        if (bytes < text->room)
            return bytes;
        text->room = bytes + 1;
        text->data = cli_alloc(text->data, text->room, 1);
    }
}

/* --------------------------------------------------------------------------------- files -- */

char *cli_read_all(const char *path, size_t *bytes)
{
    const bool is_stdin = !path || !strcmp(path, "-");
    const char *name = is_stdin ? "standard input" : path;
    FILE *f = is_stdin ? stdin : system_open_file(path, "rb");
    if (!f) {
        cli_fail("%s: %s", name, strerror(errno));
        return NULL;
    }
    if (is_stdin) /* nothing looks at the flag while this waits for a person */
        system_catch_interrupt(false);
    char *text = NULL;
    size_t used = 0, room = 0;
    do {
        if (room - used < 65536)
            text = cli_alloc(text, room = room * 2 + 131072, 1);
        used += fread(text + used, 1, room - used - 1, f);
    } while (!feof(f) && !ferror(f)); /* reading on would wait for a second Ctrl-D */
    bool bad = ferror(f) != 0;
    if (bad)
        cli_fail("%s: %s", name, strerror(errno));
    if (is_stdin)
        system_catch_interrupt(true);
    else
        fclose(f);
    if (bad) {
        free(text);
        return NULL;
    }
    text[used] = 0;
    *bytes = used;
    return text;
}

bool output_open(cli_output *output, const char *path)
{
    static const char suffix[] = ".partial";
    size_t length = strlen(path);
    *output = (cli_output){.file = stdout, .path = path};
    if (!strcmp(path, "-"))
        return true;
    if (system_is_replaceable(path)) {
        output->partial = cli_alloc(NULL, length + sizeof suffix, 1);
        memcpy(output->partial, path, length);
        memcpy(output->partial + length, suffix, sizeof suffix);
    }
    output->file = system_open_file(output->partial ? output->partial : path, "wb");
    if (output->file)
        return true;
    cli_fail("%s: cannot be written: %s", path, strerror(errno));
    free(output->partial);
    return false;
}

bool output_write(cli_output *output, const void *data, size_t bytes)
{
    if (fwrite(data, 1, bytes, output->file) == bytes)
        return true;
    cli_fail("%s: %s", output->path, strerror(errno));
    return false;
}

bool output_close(cli_output *output, bool keep)
{
    if (output->file == stdout)
        return true; /* main() flushes it and looks at the result */
    bool good = !fclose(output->file);
    if (good && keep && output->partial)
        good = system_replace_file(output->partial, output->path);
    if (!good)
        cli_fail("%s: %s", output->path, strerror(errno));
    if (output->partial && (!good || !keep))
        system_remove_file(output->partial);
    free(output->partial);
    return good;
}

/* ------------------------------------------------------------------------------- windows -- */

static bool adds_bos(const moe_tokenizer *tokenizer)
{
    moe_token first[4];
    size_t n = 0;
    return moe_tokenizer_encode(tokenizer, "", 0, MOE_ENCODE_ADD_SPECIAL, first, 4, &n, NULL) ==
               MOE_OK && n && first[0] == moe_tokenizer_bos(tokenizer);
}

int windows_read(cli_windows *w, const moe_tokenizer *tokenizer, const char *path, uint32_t window)
{
    size_t bytes;
    *w = (cli_windows){.tokens = NULL};
    char *text = cli_read_all(path, &bytes);
    if (!text)
        return EXIT_FAILED;
    if (bytes && text[bytes - 1] == '\n')
        bytes--;
    w->tokens = cli_encode(tokenizer, text, bytes, MOE_ENCODE_ADD_SPECIAL, &w->n_text);
    free(text);
    if (!w->tokens)
        return EXIT_FAILED;
    if (w->n_text < WINDOW_MIN)
        return cli_fail("%s: expected at least %d tokens of text, got %zu", path, WINDOW_MIN,
                        w->n_text);
    w->window = w->n_text < window ? (uint32_t)w->n_text : window;
    if (w->n_text / w->window > UINT32_MAX)
        return cli_fail("%s: too long: %zu tokens", path, w->n_text);
    w->n_window = (uint32_t)(w->n_text / w->window);
    w->bos = adds_bos(tokenizer);
    for (uint32_t i = 0; w->bos && i < w->n_window; i++)
        w->tokens[(size_t)i * w->window] = moe_tokenizer_bos(tokenizer);
    return EXIT_OK;
}

/* ---------------------------------------------------------------------------------- text -- */

void cli_write_text(const char *text, size_t text_bytes)
{
    static int terminal = -1;
    if (terminal < 0)
        terminal = system_is_terminal(stdout);
    for (size_t i = 0; i < text_bytes; i++) {
        unsigned char c = (unsigned char)text[i];
        bool is_control = (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f;
        /* U+0080 to U+009F are control characters, too: C2 80 to C2 9F. */
        bool is_c1 = c == 0xc2 && i + 1 < text_bytes &&
                     ((unsigned char)text[i + 1] & 0xe0) == 0x80; /* else it is no UTF-8 */
        if (terminal && (is_control || is_c1)) {
            putchar('^');
            c = is_c1 ? (unsigned char)text[++i] & 0x7f : c;
            c ^= 0x40;
        }
        putchar(c);
    }
    fflush(stdout);
}

int cli_compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

const char *cli_size_text(cli_size *buffer, uint64_t bytes)
{
    static const char *const unit[] = {"bytes", "kB", "MB", "GB", "TB"};
    double v = (double)bytes;
    size_t i = 0;
    for (; v >= 1000 && i + 1 < CLI_COUNT(unit); i++)
        v /= 1000;
    snprintf(buffer->text, sizeof buffer->text, "%.*f %s",
             i && v < 100 ? 2 : 0, v, unit[i]);
    return buffer->text;
}
