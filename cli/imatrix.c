/* cli/imatrix.c - `moe imatrix`: how much each input of each matrix matters, from a text.
 *
 * An error in column i of a matrix is multiplied with input i, so the mean of that input's square
 * says what a squared error there costs. The text goes through the model in windows; the inputs'
 * squares are summed up by way of an observer, for each expert by itself.
 *
 * The file is a GGUF as llama.cpp's llama-imatrix writes it, so that either program's file serves
 * both:
 *     general.type = "imatrix", imatrix.datasets = [text], imatrix.chunk_count, imatrix.chunk_size
 *     NAME.in_sum2  F32 [n_in][n_matrix]   sums of squares
 *     NAME.counts   F32 [1][n_matrix]      rows that were summed up: of experts, how often they
 * were used for each matrix NAME, in the order of their names. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 64, GGUF_VERSION = 3, GGUF_ALIGNMENT = 32, GGUF_U32 = 4, GGUF_STRING = 8,
       GGUF_ARRAY = 9, GGUF_TENSOR_F32 = 0, GGUF_NAME_MAX = 63 };

typedef struct imatrix_options {
    cli_common common;
    const char *out;
    uint32_t window, n_window;
    bool no_output;
} imatrix_options;

/* The sums of one tensor. */
typedef struct imatrix_entry {
    char *name;
    uint32_t n_in, n_matrix;
    double *squares;  /* [n_matrix][n_in] */
    uint64_t *counts; /* [n_matrix] */
} imatrix_entry;

typedef struct imatrix_state {
    imatrix_entry *entries;
    size_t n_entry;
    size_t next;         /* the entry that comes next if the order is that of the batch before */
    moe_session *session;
    cli_windows text;
    float *logits;       /* [ROWS][n_vocab]; NULL: the output matrix is left out */
    double seconds;
} imatrix_state;

/* ------------------------------------------------------------------------------ collecting -- */

static imatrix_entry *imatrix_find(imatrix_state *s, const moe_observed_input *in)
{
    for (size_t i = 0; i < s->n_entry; i++) {
        imatrix_entry *e = &s->entries[(s->next + i) % s->n_entry];
        if (!strcmp(e->name, in->tensor)) {
            s->next = (size_t)(e - s->entries) + 1;
            return e;
        }
    }
    if (s->n_entry % 64 == 0)
        s->entries = cli_alloc(s->entries, s->n_entry + 64, sizeof *s->entries);
    imatrix_entry *e = &s->entries[s->n_entry++];
    const size_t n = (size_t)in->n_in * in->n_matrix, bytes = strlen(in->tensor) + 1;
    *e = (imatrix_entry){
        .name = memcpy(cli_alloc(NULL, bytes, 1), in->tensor, bytes),
        .n_in = in->n_in,
        .n_matrix = in->n_matrix,
        .squares = cli_alloc(NULL, n, sizeof *e->squares),
        .counts = cli_alloc(NULL, in->n_matrix, sizeof *e->counts),
    };
    memset(e->squares, 0, n * sizeof *e->squares);
    memset(e->counts, 0, in->n_matrix * sizeof *e->counts);
    s->next = s->n_entry;
    return e;
}

static void imatrix_input(void *user, const moe_observed_input *in)
{
    imatrix_entry *e = imatrix_find(user, in);
    for (uint32_t i = 0; i < in->n_product; i++) {
        const float *row = in->rows + (size_t)(i / in->n_per_row) * in->row_stride;
        double *sum = e->squares + (size_t)in->matrix[i] * e->n_in;
        e->counts[in->matrix[i]]++;
        for (uint32_t k = 0; k < e->n_in; k++)
            sum[k] += (double)row[k] * (double)row[k];
    }
}

/* One window: all tokens, and the logits of all, since the output matrix is one of the matrices. */
static moe_status imatrix_window(imatrix_state *s, const moe_token *tokens)
{
    const uint32_t n_tok = s->text.window;
    moe_status status = moe_session_rewind(s->session, 0);
    if (!s->logits)
        return status ? status : moe_session_eval(s->session, tokens, n_tok, 0, NULL);
    for (uint32_t at = 0, n; !status && at < n_tok; at += n) {
        n = n_tok - at < ROWS ? n_tok - at : ROWS;
        status = moe_session_eval(s->session, tokens + at, n, n, s->logits);
    }
    return status;
}

static int imatrix_collect(imatrix_state *s)
{
    const double start = system_seconds();
    moe_status status = MOE_OK;
    for (uint32_t i = 0; i < s->text.n_window && !status; i++) {
        progress_show("imatrix", i, s->text.n_window);
        status = imatrix_window(s, s->text.tokens + (size_t)i * s->text.window);
    }
    progress_clear();
    s->seconds = system_seconds() - start;
    return status ? cli_fail_status(status, moe_session_error(s->session), NULL) : EXIT_OK;
}

/* --------------------------------------------------------------------------------- writing -- */

static int compare_entries(const void *a, const void *b)
{
    return strcmp(((const imatrix_entry *)a)->name, ((const imatrix_entry *)b)->name);
}

/* A file that is being written; after a failure the rest does nothing. */
typedef struct gguf_out {
    cli_output output;
    uint64_t at;
    bool failed;
} gguf_out;

static void put(gguf_out *g, const void *data, size_t bytes)
{
    g->failed = g->failed || !output_write(&g->output, data, bytes);
    g->at += bytes;
}

static void put_u32(gguf_out *g, uint32_t value)
{
    put(g, &value, sizeof value);
}

static void put_u64(gguf_out *g, uint64_t value)
{
    put(g, &value, sizeof value);
}

static void put_string(gguf_out *g, const char *text)
{
    const size_t bytes = strlen(text);
    put_u64(g, bytes);
    put(g, text, bytes);
}

static void put_padding(gguf_out *g)
{
    static const char zeros[GGUF_ALIGNMENT];
    put(g, zeros, (size_t)(-g->at % GGUF_ALIGNMENT));
}

static uint64_t padded(uint64_t bytes)
{
    return (bytes + GGUF_ALIGNMENT - 1) / GGUF_ALIGNMENT * GGUF_ALIGNMENT;
}

static void put_key_u32(gguf_out *g, const char *key, uint32_t value)
{
    put_string(g, key);
    put_u32(g, GGUF_U32);
    put_u32(g, value);
}

/* A tensor's line in the table; returns where the next one's data begins. */
static uint64_t put_tensor(gguf_out *g, const imatrix_entry *e, const char *suffix, uint32_t n_in,
                           uint64_t offset)
{
    char name[GGUF_NAME_MAX + 1];
    if (snprintf(name, sizeof name, "%s%s", e->name, suffix) > GGUF_NAME_MAX && !g->failed) {
        cli_fail("%s: the name is too long for the file", e->name);
        g->failed = true;
    }
    put_string(g, name);
    put_u32(g, 2);
    put_u64(g, n_in);
    put_u64(g, e->n_matrix);
    put_u32(g, GGUF_TENSOR_F32);
    put_u64(g, offset);
    return offset + padded((uint64_t)n_in * e->n_matrix * sizeof(float));
}

static void put_header(gguf_out *g, const imatrix_state *s, const char *text_path)
{
    uint64_t offset = 0;
    put(g, "GGUF", 4);
    put_u32(g, GGUF_VERSION);
    put_u64(g, 2 * s->n_entry);
    put_u64(g, 4);
    put_string(g, "general.type");
    put_u32(g, GGUF_STRING);
    put_string(g, "imatrix");
    put_string(g, "imatrix.datasets");
    put_u32(g, GGUF_ARRAY);
    put_u32(g, GGUF_STRING);
    put_u64(g, 1);
    put_string(g, text_path);
    put_key_u32(g, "imatrix.chunk_count", s->text.n_window);
    put_key_u32(g, "imatrix.chunk_size", s->text.window);
    for (size_t i = 0; i < s->n_entry; i++) {
        offset = put_tensor(g, &s->entries[i], ".in_sum2", s->entries[i].n_in, offset);
        offset = put_tensor(g, &s->entries[i], ".counts", 1, offset);
    }
    put_padding(g);
}

static void put_entry(gguf_out *g, const imatrix_entry *e)
{
    const size_t n = (size_t)e->n_in * e->n_matrix;
    for (size_t i = 0; i < n; i++) {
        const float sum = (float)e->squares[i];
        if (!isfinite(sum) && !g->failed) {
            cli_fail("%s: input %zu is too large: the sum of its squares is %g", e->name,
                     i % e->n_in, e->squares[i]);
            g->failed = true;
        }
        put(g, &sum, sizeof sum);
    }
    put_padding(g);
    for (uint32_t m = 0; m < e->n_matrix; m++) {
        const float count = (float)e->counts[m];
        put(g, &count, sizeof count);
    }
    put_padding(g);
}

static int imatrix_write(imatrix_state *s, const char *path, const char *text_path)
{
    gguf_out g = {.at = 0};
    qsort(s->entries, s->n_entry, sizeof *s->entries, compare_entries);
    if (!output_open(&g.output, path))
        return EXIT_FAILED;
    put_header(&g, s, text_path);
    for (size_t i = 0; i < s->n_entry && !g.failed; i++)
        put_entry(&g, &s->entries[i]);
    return output_close(&g.output, !g.failed) && !g.failed ? EXIT_OK : EXIT_FAILED;
}

/* ----------------------------------------------------------------------------------- entry -- */

/* Experts that no token of the text used: what they are given is a guess. */
static size_t imatrix_unused(const imatrix_state *s)
{
    size_t n = 0;
    for (const imatrix_entry *e = s->entries; e < s->entries + s->n_entry; e++)
        for (uint32_t m = 0; strstr(e->name, "ffn_down_exps") && m < e->n_matrix; m++)
            n += !e->counts[m];
    return n;
}

static int imatrix_setup(imatrix_state *s, moe_model *model, const char *text_path,
                         const imatrix_options *o)
{
    const moe_tokenizer *tokenizer = moe_model_tokenizer(model);
    if (!tokenizer)
        return cli_fail("no tokenizer in this model file");
    int result = windows_read(&s->text, tokenizer, text_path, o->window);
    if (result)
        return result;
    if (o->n_window && s->text.n_window > o->n_window)
        s->text.n_window = o->n_window;
    moe_observer observer;
    moe_observer_init(&observer);
    observer.user = s;
    observer.input = imatrix_input;
    moe_session_options so;
    common_session_options(&so, &o->common, MOE_CACHE_F16);
    so.n_ctx = s->text.window;
    so.n_logits = 16;
    so.observer = &observer;
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    if (!o->no_output)
        s->logits = cli_alloc(NULL, (size_t)ROWS * info.n_vocab, sizeof *s->logits);
    return common_session(&s->session, model, &so);
}

static int imatrix_run(moe_model *model, const char *text_path, const imatrix_options *o)
{
    imatrix_state s = {.entries = NULL};
    int result = imatrix_setup(&s, model, text_path, o);
    if (result == EXIT_OK)
        result = imatrix_collect(&s);
    if (result == EXIT_OK)
        result = imatrix_write(&s, o->out, text_path);
    if (result == EXIT_OK && !o->common.quiet) {
        const size_t unused = imatrix_unused(&s);
        fprintf(stderr, "%zu matrices, %u windows of %u tokens, %.1f s\n", s.n_entry,
                s.text.n_window, s.text.window, s.seconds);
        if (unused)
            fprintf(stderr, "%zu experts were never used: a longer text would reach more\n",
                    unused);
    }
    moe_session_close(s.session);
    for (size_t i = 0; i < s.n_entry; i++) {
        free(s.entries[i].name);
        free(s.entries[i].squares);
        free(s.entries[i].counts);
    }
    free(s.entries);
    free(s.logits);
    free(s.text.tokens);
    return result;
}

static int imatrix_main(int argc, char **argv)
{
    imatrix_options o = {.window = 512};
    if (!common_init(&o.common))
        return EXIT_USAGE;
    cli_option common_table[COMMON_OPTIONS];
    const cli_option table[] = {
        {'o', "out", CLI_TEXT, &o.out, "FILE", "the file to write; \"-\": standard output", NULL},
        {0, "ctx", CLI_U32, &o.window, "N", "tokens per window", NULL},
        {0, "windows", CLI_U32, &o.n_window, "N", "only the first N windows; 0: all", NULL},
        {0, "no-output", CLI_FLAG, &o.no_output, NULL,
         "leave the output matrix out: faster with a large vocabulary", NULL},
        {0},
    };
    const cli_option *tables[] = {table, common_options(&o.common, common_table), NULL};
    const char *path[2];
    int status;
    if (!cli_parse(&verb_imatrix, tables, argc, argv, path, &status))
        return status;
    if (!o.out || o.window < WINDOW_MIN) {
        if (o.out)
            cli_fail("imatrix: --ctx: expected %d or more", WINDOW_MIN);
        else
            cli_fail("imatrix: -o FILE is needed: where the result goes");
        return EXIT_USAGE;
    }
    moe_model *model;
    status = common_open(&model, path[0], &o.common);
    if (status)
        return status;
    status = imatrix_run(model, path[1], &o);
    moe_model_close(model);
    return status;
}

const cli_verb verb_imatrix = {
    "imatrix", "MODEL TEXT", "measures which weights matter, for moe-convert",
    "The text is cut into windows of --ctx tokens, each computed alone. Of each matrix, the\n"
    "squares of what it is multiplied with are summed up, of experts each by itself.\n"
    "`moe-convert --imatrix` spends precision accordingly. The text should be of the kind that\n"
    "the model will see: some 50,000 tokens of it, more for a model of many experts. TEXT may\n"
    "be \"-\".\n"
    "The file is a GGUF that llama.cpp's tools read and write, too.",
    "  moe imatrix model-f16.gguf text.txt -o model.imatrix\n"
    "  moe-convert model-f16.gguf model-q3.gguf --quant q3_k_m --imatrix model.imatrix\n",
    2, imatrix_main};
