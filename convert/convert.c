/* convert/convert.c - the converter as a library: source -> plan -> encoder -> writer. The program
 * is convert/main.c; tests include this file. */
#ifndef MOE_CONVERT_CONVERT_C
#define MOE_CONVERT_CONVERT_C

#include <float.h>

#include "convert.h"

#include "files.c"        /* files of the source, watched for changes */
#include "meta.c"         /* keys and values in the making */
#include "safetensors.c"  /* shards -> a table of tensors */
#include "config.c"       /* config.json -> keys, by the family's tables */
#include "sentencepiece.c" /* tokenizer.model -> keys */
#include "vocab.c"        /* tokenizer.json -> keys */
#include "hf_weights.c"   /* matrices of a checkpoint, quantized ones too */
#include "hf.c"           /* a checkpoint -> a source */
#include "gguf_source.c"  /* a GGUF file -> a source */
#include "moe_source.c"   /* a .moe file -> a source */
#include "plan.c"         /* the type of each tensor */
#include "imatrix.c"      /* which columns matter */
#include "gguf_write.c"   /* the result */
#include "encode.c"       /* the work */
#include "moe_write.c"    /* the result as a .moe file */
#include "moe_size.c"     /* its size, before it is made */
#include "allocate.c"     /* types that fit a size */

static bool conv_ends(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && quant_name_equal(text + n - m, end);
}

static moe_status conv_check_out(const conv_options *o, moe_error *error)
{
    if (!o->source || !o->out)
        return fail(error, MOE_ERR_ARGUMENT, NULL, "expected a source and an output file");
    if (!conv_ends(o->out, ".gguf") && !conv_ends(o->out, ".moe"))
        return fail(error, MOE_ERR_ARGUMENT, o->out,
                    "expected a name that ends in .moe or .gguf, which says what to write");
    return MOE_OK;
}

static moe_status conv_open_source(conv_job *job, moe_error *error)
{
    conv_source *s = &job->source;
    const conv_options *o = &job->options;
    const bool new_types = o->quant || o->n_keeps || o->bits_per_weight > 0 || o->max_bytes;
    struct stat info;
    s->mem = s->arena.mem = s->kv.mem = &job->mem;
    s->files = mem_alloc(&job->mem, CONVERT_MAX_FILES, sizeof *s->files);
    if (!s->files)
        return fail_memory(error, &job->mem, "files", CONVERT_MAX_FILES * sizeof *s->files);
    if (stat(o->source, &info) != 0)
        return fail(error, MOE_ERR_IO, o->source, "cannot open: %s",
                    errno == ENOENT ? "there is no such file or folder" : writer_why(errno));
    if (S_ISDIR(info.st_mode))
        return conv_open_hf(s, o->source, o->pre, error);
    if (conv_ends(o->source, ".moe"))
        return conv_open_moe(s, o->source, new_types, error);
    if (conv_ends(o->source, ".safetensors") || conv_ends(o->source, ".json"))
        return fail(error, MOE_ERR_ARGUMENT, o->source,
                    "expected the folder of the checkpoint: its other files are needed, too");
    return conv_open_gguf(s, o->source, new_types, error);
}

/* The result would take the place of what it is made of. */
static moe_status conv_check_apart(const conv_job *job, moe_error *error)
{
    struct stat out;
    const conv_source *s = &job->source;
    if (stat(job->options.out, &out) != 0)
        return MOE_OK;
    for (uint32_t i = 0; i < s->n_files; i++)
        if ((uint64_t)out.st_ino == s->files[i].inode &&
            (uint64_t)out.st_dev == s->files[i].device)
            return fail(error, MOE_ERR_ARGUMENT, job->options.out,
                        "expected another name than that of the source, which would be lost");
    return MOE_OK;
}

static moe_status conv_write_gguf(conv_job *job, moe_error *error)
{
    conv_writer writer = {0};
    text_buf header = {.mem = &job->mem};
    moe_status status = gguf_make_header(&job->source, &header, &job->file_bytes, error);
    job->sampled = 1;
    for (size_t i = 0; i < job->source.n_tensors; i++)
        job->source.tensors[i].stored_bytes = job->source.tensors[i].bytes;
    job->header_bytes = header.n;
    if (!status && !job->options.dry_run) {
        status = writer_open(&writer, job->options.out, error);
        if (!status)
            status = writer_begin(&writer, job->file_bytes, error);
        if (!status)
            status = writer_put(&writer, header.data, header.n, 0, error);
        if (!status)
            status = encode_gguf(job, &writer, error);
        if (!status)
            status = conv_files_check(&job->source, error);
        status = writer_close(&writer, status, false, error);
    }
    buf_free(&header);
    return status;
}

static moe_status conv_write_moe(conv_job *job, moe_error *error)
{
    moew_sink sink;
    if (job->options.dry_run)
        return size_measure(job, SIZE_LOOK, error);
    moe_status status = moew_open(&sink, job, error);
    if (!status)
        status = moew_write(&sink, error);
    moew_close(&sink);
    return status;
}

/* Says of which tensors scales were rounded when their blocks were made. */
static void conv_note_rounded(conv_source *s)
{
    const char *first = NULL;
    size_t n = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        n += s->tensors[i].is_rounded;
        if (s->tensors[i].is_rounded && !first)
            first = s->tensors[i].name;
    }
    if (n)
        conv_note(s, "%zu tensors, the first of them %s, have scales that are not exact in the F16 "
                  "of Q4_0 and Q8_0: those are rounded", n, first);
}

/* Converts, or only plans. Either way the job is to be closed; after success it says what was
 * done. */
MOE_UNUSED static moe_status conv_run(conv_job *job, const conv_options *options,
                                      moe_error *error)
{
    const uint64_t start = plat_time_ns();
    plan p = {0};
    memset(job, 0, sizeof *job);
    job->options = *options;
    mem_init(&job->mem, NULL, 0);
    moe_status status = conv_check_out(options, error);
    if (!status)
        status = conv_open_source(job, error);
    if (!status && !options->dry_run)
        status = conv_check_apart(job, error);
    if (!status && options->imatrix)
        status = imatrix_open(&job->source, options->imatrix, error);
    if (!status)
        status = plan_types(&p, &job->source, options, error);
    for (size_t i = 0; i < job->source.n_tensors && !status; i++)
        job->n_weights += job->source.tensors[i].row_len * job->source.tensors[i].n_rows;
    if (!status && (options->bits_per_weight > 0 || options->max_bytes))
        status = allocate_types(job, conv_ends(options->out, ".moe"), error);
    if (!status)
        status = plan_finish(&p, &job->source, error);
    for (size_t i = 0; i < job->source.n_tensors; i++) // of those that were tried only
        job->source.tensors[i].is_rounded = false;
    if (!status)
        status = conv_ends(options->out, ".moe") ? conv_write_moe(job, error)
                                                 : conv_write_gguf(job, error);
    conv_note_rounded(&job->source);
    job->seconds = (double)(plat_time_ns() - start) * 1e-9;
    return status;
}

MOE_UNUSED static void conv_close(conv_job *job)
{
    conv_source *s = &job->source;
    for (uint32_t i = 0; i < s->n_files; i++)
        plat_close(&s->files[i].os);
    mem_free(&job->mem, s->files);
    directory_close(s->dir);
    directory_close(s->imatrix);
    buf_free(&s->kv);
    arena_free(&s->arena);
    memset(job, 0, sizeof *job);
}

#endif
