/* tests/test_convert.c - the converter: checkpoints of every family against the logits of
 * transformers (tests/make_checkpoints.py), GGUF files copied and requantized, plans, tokenizers.
 * What is refused is in tests/test_convert_refuses.c.
 *
 * Everything is written into a folder of its own below $TMPDIR, which is removed at the end. */
#include "test.h"

#if defined MOE_NO_TEXT || defined MOE_NO_ZSTD
TEST_PROGRAM(convert)
{
}
#else

#include "checkpoint_make.h"

/* ------------------------------------------------------------------------------- helpers -- */

static moe_directory *open_directory(const char *path, moe_mem *mem)
{
    moe_directory *dir = NULL;
    moe_error error = {0};
    mem_init(mem, NULL, 0);
    CHECK(!directory_open_file(&dir, path, mem, &error), "%s", error.message);
    return dir;
}

/* --------------------------------------------------------------------------- checkpoints -- */

typedef struct expected_logits {
    char *data;
    uint32_t n_tok, n_vocab;
    const int32_t *tok;
    const float *logits; // [n_tok][n_vocab]
} expected_logits;

static bool expected_load(expected_logits *e, const char *folder)
{
    char path[900];
    size_t bytes = 0;
    snprintf(path, sizeof path, "%s/expected", folder);
    e->data = test_read_file(path, &bytes);
    if (!e->data || bytes < 24 || memcmp(e->data, "MOEX", 4))
        return false;
    memcpy(&e->n_tok, e->data + 4, 4);
    memcpy(&e->n_vocab, e->data + 8, 4);
    e->tok = (const int32_t *)(void *)(e->data + 24);
    e->logits = (const float *)(void *)(e->data + 24 + 4 * (size_t)e->n_tok);
    return bytes == 24 + 4 * (size_t)e->n_tok * (1 + (size_t)e->n_vocab);
}

/* The model's logits [n_tok][n_vocab] for the expected tokens; NULL after a failure. */
static float *run_model(const char *path, const expected_logits *e)
{
    moe_model *model = NULL;
    moe_session *session = NULL;
    moe_model_options mo;
    moe_session_options so;
    moe_error error = {0};
    moe_model_options_init(&mo);
    mo.path = path;
    moe_session_options_init(&so);
    so.cache_type = MOE_CACHE_F32;
    so.n_ctx = e->n_tok;
    so.n_threads = 1;
    float *logits = calloc((size_t)e->n_tok * e->n_vocab, sizeof *logits);
    moe_status status = moe_model_open(&model, &mo, &error);
    if (!status)
        status = moe_session_open(&session, model, &so, &error);
    if (!status)
        status = moe_session_eval(session, e->tok, e->n_tok, e->n_tok, logits);
    CHECK(!status, "%s: %s", path, error.message);
    moe_session_close(session);
    moe_model_close(model);
    if (!status)
        return logits;
    free(logits);
    return NULL;
}

/* The largest distance of a position's logits, in units of the largest of them. */
static double run_distance(const char *path, const expected_logits *e)
{
    float *logits = run_model(path, e);
    double worst = logits ? 0 : 1e9;
    for (uint32_t t = 0; logits && t < e->n_tok; t++) {
        double far = 0, most = 0;
        for (uint32_t v = 0; v < e->n_vocab; v++) {
            const double want = (double)e->logits[(size_t)t * e->n_vocab + v];
            far = fmax(far, fabs((double)logits[(size_t)t * e->n_vocab + v] - want));
            most = fmax(most, fabs(want));
        }
        worst = fmax(worst, far / most);
    }
    free(logits);
    return worst;
}

/* The divergence D(p || q) of two softmaxes, in nats. */
static double divergence(const float *p, const float *q, uint32_t n)
{
    double p_max = -1e30, q_max = -1e30, p_sum = 0, q_sum = 0, sum = 0;
    for (uint32_t v = 0; v < n; v++) {
        p_max = fmax(p_max, (double)p[v]);
        q_max = fmax(q_max, (double)q[v]);
    }
    for (uint32_t v = 0; v < n; v++) {
        p_sum += exp((double)p[v] - p_max);
        q_sum += exp((double)q[v] - q_max);
    }
    for (uint32_t v = 0; v < n; v++) {
        const double log_p = (double)p[v] - p_max - log(p_sum);
        sum += exp(log_p) * (log_p - ((double)q[v] - q_max - log(q_sum)));
    }
    return sum;
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median over the positions of the divergence from the expected logits: some positions lie at a
 * tie of the router, and there the divergence says nothing about the weights. */
static double run_divergence(const char *path, const expected_logits *e)
{
    float *logits = run_model(path, e);
    double *each = calloc(e->n_tok, sizeof *each), median = 1e9;
    for (uint32_t t = 0; logits && t < e->n_tok; t++) {
        const size_t at = (size_t)t * e->n_vocab;
        each[t] = divergence(e->logits + at, logits + at, e->n_vocab);
    }
    if (logits) {
        qsort(each, e->n_tok, sizeof *each, by_size);
        median = each[e->n_tok / 2];
    }
    free(each);
    free(logits);
    return median;
}

/* Whether a checkpoint's own types are multiplied with int8. */
static bool is_packed(const char *name)
{
    return strstr(name, "mxfp4") || strstr(name, "int4") || strstr(name, "nvfp4");
}

/* Every checkpoint as F32 gives transformers' logits; in its own types too, but for BF16, where
 * each activation is rounded by up to 2^-8, FP8, where each weight is when it becomes BF16, and
 * codes of 4 bits, which are multiplied with int8: these can turn a close decision of a router, so
 * their divergence is looked at. */
static void checkpoints_give_the_logits_of_transformers(void)
{
    int n = 0;
    DIR *dir = opendir(checkpoint(""));
    REQUIRE(dir, "%s", checkpoint(""));
    for (struct dirent *d; (d = readdir(dir));) {
        char folder[800];
        expected_logits e = {0};
        moe_error error = {0};
        if (d->d_name[0] == '.')
            continue;
        snprintf(folder, sizeof folder, "%s", checkpoint(d->d_name));
        CHECK(expected_load(&e, folder), "%s", folder);
        for (int i = 0; i < 2 && e.data; i++) {
            const char *out = scratch_path("out.gguf");
            moe_status status = convert(folder, out, i ? "f32" : NULL, &error);
            CHECK(!status, "%s: %s", d->d_name, error.message);
            const bool rounded = i == 0 && (strstr(d->d_name, "bf16") ||
                                            strstr(d->d_name, "fp8") || is_packed(d->d_name));
            const double far = status ? 1e9
                               : rounded ? run_divergence(out, &e)
                                         : run_distance(out, &e);
            CHECK(far <= (rounded ? 0.01 : 1e-4), "%s (%s): %g", d->d_name, i ? "f32" : "source",
                  far);
            unlink(out);
        }
        free(e.data);
        n++;
    }
    closedir(dir);
    CHECK(n >= 16, "%d checkpoints", n);
}

/* A bit less doubles the rounding and so makes the divergence four times as large, until routers
 * change their minds. The committed checkpoints mostly have rows that fill no block; those of
 * make_checkpoints.py --wide are all quantized. Packed ones are exact in one of the types. */
static void quantized_checkpoints_diverge_as_their_bits_say(void)
{
    static const char *const types[3] = {"q8_0", "q5_0", "q4_0"};
    int n = 0;
    DIR *dir = opendir(checkpoint(""));
    REQUIRE(dir, "%s", checkpoint(""));
    for (struct dirent *d; (d = readdir(dir));) {
        expected_logits e = {0};
        moe_error error = {0};
        double far[3];
        if (d->d_name[0] == '.' || (is_packed(d->d_name) && !strstr(d->d_name, "mxfp4")))
            continue; /* some type is exact */
        CHECK(expected_load(&e, checkpoint(d->d_name)), "%s", d->d_name);
        for (size_t i = 0; i < 3; i++) {
            const char *out = scratch_path("out.gguf");
            CHECK(!convert(checkpoint(d->d_name), out, types[i], &error), "%s", error.message);
            far[i] = run_divergence(out, &e);
            unlink(out);
        }
        free(e.data);
        if (far[0] == far[2]) /* no row fills a block */
            continue;
        n++;
        CHECK(far[0] <= 0.02 && 5 * far[0] <= far[1] && far[1] <= 1.5 * far[2] && far[2] <= 2,
              "%s: Q8_0 %.2e, Q5_0 %.2e, Q4_0 %.2e", d->d_name, far[0], far[1], far[2]);
    }
    closedir(dir);
    CHECK(n >= 3, "only %d checkpoints were quantized", n);
}

/* The hash of a tensor's floats that make_checkpoints.py writes: 0 has no sign. Its factor, if it
 * has one, is in the tensor "x.scale". */
static uint64_t hash_of_floats(const moe_directory *dir, const moe_tensor *t)
{
    char name[128];
    uint64_t h = 0xcbf29ce484222325u;
    const size_t n = (size_t)t->n_elements, end = strlen(t->name) - strlen("weight");
    snprintf(name, sizeof name, "%.*sscale", (int)end, t->name);
    const moe_tensor *f = directory_tensor(dir, name);
    float *x = malloc(n * sizeof *x);
    t->quant->dequantize(t->data, x, n);
    for (size_t i = 0; i < n; i++) {
        float factor = 1;
        if (f)
            memcpy(&factor, f->data + i / (n / f->n_elements) * sizeof factor, sizeof factor);
        const uint32_t u = bits_of_f32(x[i] * factor + 0.0f);
        for (int k = 0; k < 32; k += 8)
            h = (h ^ (u >> k & 255)) * 0x100000001b3u;
    }
    free(x);
    return h;
}

/* Compares a converted checkpoint with the hashes of its exact floats. */
static void check_exact(const moe_directory *dir, const char *name)
{
    char path[700], tensor[128];
    size_t bytes;
    unsigned long long want;
    int n = 0, used;
    snprintf(path, sizeof path, "%s/exact", checkpoint(name));
    char *text = test_read_file(path, &bytes);
    REQUIRE(text, "%s", path);
    for (char *p = text; sscanf(p, "%127s %16llx\n%n", tensor, &want, &used) == 2; p += used) {
        const moe_tensor *t = directory_tensor(dir, tensor);
        CHECK(t && hash_of_floats(dir, t) == want, "%s: %s", name, tensor);
        n++;
    }
    CHECK(n >= 12, "%d tensors of %s", n, name);
    free(text);
}

/* Packed checkpoints: each tensor in the type that holds its codes and scales, and in F32, has
 * exactly the floats that compressed-tensors' codes and scales stand for. */
static void packed_weights_are_exact(void)
{
    static const struct {
        const char *checkpoint, *tensor;
        const moe_quant *type;
    } kept[] = {{"qwen3moe-int4", "blk.0.ffn_down_exps.weight", &quant_q4_0},
                {"qwen3moe-int4", "blk.0.attn_q.weight", &quant_q4_0},
                {"qwen3moe-int4", "blk.0.attn_v.weight", &quant_f32},
                {"qwen3moe-int4", "blk.0.attn_output.weight", &quant_q8_0},
                {"qwen3moe-nvfp4", "blk.0.ffn_up_exps.weight", &quant_nvfp4},
                {"qwen3moe-nvfp4", "blk.0.attn_output.weight", &quant_mxfp4},
                {"llama-nvfp4", "blk.0.attn_q.weight", &quant_nvfp4},
                {"qwen35moe-int4", "blk.0.ssm_out.weight", &quant_q4_0},
                {"qwen35moe-int4", "blk.0.attn_qkv.weight", &quant_q4_0}};
    const char *out = scratch_path("exact.gguf");
    for (size_t i = 0; i < 2 * MOE_COUNT(kept); i++) {
        const char *name = kept[i / 2].checkpoint;
        moe_error error = {0};
        moe_mem mem;
        REQUIRE(!convert(checkpoint(name), out, i % 2 ? "f32" : NULL, &error), "%s", error.message);
        moe_directory *dir = open_directory(out, &mem);
        const moe_tensor *t = directory_tensor(dir, kept[i / 2].tensor);
        CHECK(getenv("MOE_TEST_CHECKPOINTS") ||
                  (t && t->quant == (i % 2 ? &quant_f32 : kept[i / 2].type)),
              "%s", t ? t->quant->name : "none");
        check_exact(dir, name);
        directory_close(dir);
    }
    unlink(out);
}

/* FP8 in all its forms: in F32 the exact products; without --quant BF16, which are those numbers
 * rounded, so what compressed-tensors reads where the scales are BF16. */
static void fp8_weights_are_exact(void)
{
    static const char *const names[] = {"qwen3moe-fp8", "qwen35moe-fp8"};
    const char *full = scratch_path("full.gguf"), *kept = scratch_path("kept.gguf");
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        moe_error error = {0};
        moe_mem mem[2];
        int n = 0;
        REQUIRE(!convert(checkpoint(names[i]), full, "f32", &error), "%s", error.message);
        REQUIRE(!convert(checkpoint(names[i]), kept, NULL, &error), "%s", error.message);
        moe_directory *a = open_directory(full, &mem[0]), *b = open_directory(kept, &mem[1]);
        check_exact(a, names[i]);
        for (size_t k = 0; k < directory_n_tensors(b); k++) {
            const moe_tensor *y = directory_tensor_at(b, k), *x = directory_tensor(a, y->name);
            size_t wrong = 0;
            for (size_t w = 0; y->quant == &quant_bf16 && w < y->n_elements; w++) {
                float exact;
                memcpy(&exact, x->data + w * sizeof exact, sizeof exact);
                wrong += load_u16(y->data + 2 * w) != bf16_of_f32(exact);
            }
            CHECK(!wrong, "%s: %zu of %s", names[i], wrong, y->name);
            n += y->quant == &quant_bf16;
        }
        CHECK(n >= 7, "%d tensors in BF16", n);
        directory_close(a);
        directory_close(b);
    }
    unlink(full);
    unlink(kept);
}

/* A scale of 0 makes weights of 0, a negative one turns their signs around. */
static void fp8_scales_are_factors(void)
{
    static const uint16_t scales[3] = {0x3f80, 0, 0xbf80}; /* 1, 0, -1 in BF16 */
    const char *out = scratch_path("factors.gguf");
    float x[3][40];
    for (size_t i = 0; i < 3; i++) {
        moe_error error = {0};
        moe_mem mem;
        const char *source = edited_checkpoint("qwen3moe-fp8", "config.json", "", "");
        overwrite_tensor(source, "experts.0.gate_proj.weight_scale\"", 0, &scales[i], 2);
        REQUIRE(!convert(source, out, "f32", &error), "%s", error.message);
        moe_directory *dir = open_directory(out, &mem);
        memcpy(x[i], directory_tensor(dir, "blk.0.ffn_gate_exps.weight")->data, sizeof x[i]);
        directory_close(dir);
    }
    for (size_t k = 0; k < 40; k++)
        CHECK(x[1][k] == 0 && x[2][k] == -x[0][k] && fabsf(x[0][k]) <= 448, "%zu: %g", k,
              (double)x[0][k]);
    unlink(out);
}

/* What share a scale, by the scales' shape and by the ways that the config tells of. */
static void fp8_scales_are_told_by_their_shape(void)
{
    static const hf_block usual[] = {{UINT32_MAX, UINT32_MAX}, {1, UINT32_MAX}, {128, 128}};
    static const hf_block blocks[] = {{64, 32}}, rows[] = {{1, UINT32_MAX}}, groups[] = {{1, 32}};
    static const hf_block two[] = {{100, 128}, {128, 128}};
    static const struct {
        uint64_t weights[3], scales[4];
        const hf_block *told;
        uint32_t n_told, want_rows, want_cols; /* 0: refused */
    } cases[] = {
        {{300, 260}, {0}, usual, 3, UINT32_MAX, UINT32_MAX},
        {{300, 260}, {1}, usual, 3, UINT32_MAX, UINT32_MAX},
        {{300, 260}, {1, 1}, usual, 3, UINT32_MAX, UINT32_MAX},
        {{300, 260}, {300}, usual, 3, 1, 260},
        {{300, 260}, {300, 1}, usual, 3, 1, 260},
        {{300, 260}, {1, 300}, usual, 3, 0, 0},
        {{300, 260}, {3, 3}, usual, 3, 128, 128},
        {{300, 260}, {3, 1, 3, 1}, usual, 3, 128, 128},
        {{300, 260}, {3, 3, 1, 1}, usual, 3, 0, 0},
        {{300, 260}, {9}, usual, 3, 0, 0},
        {{300, 260}, {2, 3}, usual, 3, 0, 0},
        {{3, 260}, {3, 1}, usual, 3, 1, 260},
        {{3, 260}, {1, 3}, usual, 3, 3, 128}, /* blocks, which are cut off */
        {{1, 260}, {1, 1}, usual, 3, UINT32_MAX, UINT32_MAX},
        {{300, 260}, {5, 9}, blocks, 1, 64, 32},
        {{300, 260}, {1}, blocks, 1, 0, 0},
        {{300, 260}, {300, 1}, blocks, 1, 0, 0},
        {{60, 30}, {1}, blocks, 1, 60, 30},
        {{300, 260}, {300, 1}, rows, 1, 1, 260},
        {{300, 260}, {1}, rows, 1, 0, 0},
        {{300, 64}, {300, 2}, groups, 1, 1, 32},
        {{300, 260}, {3, 3}, two, 2, 1, 0}, /* either */
        {{90, 260}, {1, 3}, two, 2, 90, 128},
        {{300, 260}, {3, 3}, NULL, 0, 0, 0},
        {{4, 300, 260}, {1}, usual, 3, UINT32_MAX, UINT32_MAX}, /* stacks */
        {{4, 300, 260}, {4}, usual, 3, 300, 260},
        {{4, 300, 260}, {4, 1, 1}, usual, 3, 300, 260},
        {{4, 300, 260}, {4, 300}, usual, 3, 1, 260},
        {{4, 300, 260}, {4, 300, 1}, usual, 3, 1, 260},
        {{4, 300, 260}, {4, 3, 3}, usual, 3, 128, 128},
        {{4, 300, 260}, {3, 3}, usual, 3, 0, 0},
        {{4, 300, 260}, {1, 3, 3}, usual, 3, 0, 0},
        {{4, 60, 30}, {1}, blocks, 1, 0, 0},
        {{1, 60, 30}, {1, 1, 1}, blocks, 1, 60, 30},
    };
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        hf_source h = {.n_blocks = cases[i].n_told};
        st_tensor t = {.n_elements = 0}, s = {.n_elements = 1};
        hf_block got = {0, 0};
        bool clear;
        if (cases[i].n_told)
            memcpy(h.blocks, cases[i].told, cases[i].n_told * sizeof *h.blocks);
        for (; t.n_dims < 3 && cases[i].weights[t.n_dims]; t.n_dims++)
            t.dims[t.n_dims] = cases[i].weights[t.n_dims];
        for (; s.n_dims < 4 && cases[i].scales[s.n_dims]; s.n_dims++)
            s.n_elements *= s.dims[s.n_dims] = cases[i].scales[s.n_dims];
        const bool found = hf_fp8_block(&h, &t, &s, &got, &clear);
        CHECK(found == (cases[i].want_rows > 0), "case %zu: %d", i, found);
        CHECK(!found || clear == (cases[i].want_cols > 0), "case %zu: %d", i, clear);
        CHECK(!found || !clear ||
                  (got.rows == cases[i].want_rows && got.cols == cases[i].want_cols),
              "case %zu: %u x %u", i, got.rows, got.cols);
    }
}

/* A file of an older writer has sizes of blocks as a text. */
static void sizes_of_fp8_blocks_may_be_a_text(void)
{
    moe_error error = {0};
    size_t bytes[2];
    char *data[2];
    const char *source = edited_checkpoint("qwen3moe-fp8", "config.json", "\"block_structure\": [",
                                           "\"block_structure\": \"12x16\", \"other\": [");
    const char *out[2] = {scratch_path("list.gguf"), scratch_path("text.gguf")};
    CHECK(!convert(source, out[1], NULL, &error), "%s", error.message);
    source = edited_checkpoint("qwen3moe-fp8", "config.json", "", ""); /* of the same name */
    CHECK(!convert(source, out[0], NULL, &error), "%s", error.message);
    for (size_t i = 0; i < 2; i++)
        data[i] = test_read_file(out[i], &bytes[i]);
    CHECK(data[0] && data[1] && bytes[0] == bytes[1] && !memcmp(data[0], data[1], bytes[0]),
          "other bytes");
    for (size_t i = 0; i < 2; i++) {
        free(data[i]);
        unlink(out[i]);
    }
}

/* How many notes of a conversion say this. */
static int notes_that_say(const conv_options *options, const char *text, moe_status *status)
{
    conv_job job;
    moe_error error = {0};
    int n = 0;
    *status = conv_run(&job, options, &error);
    for (uint32_t i = 0; i < job.source.n_notes; i++)
        n += strstr(job.source.notes[i], text) != NULL;
    conv_close(&job);
    return n;
}

/* BF16 reaches further than the F16 of Q4_0: what is too small is rounded, which a note says; other
 * types are made of the exact numbers. */
static void scales_that_f16_lacks_are_rounded_and_told(void)
{
    static const char scale[] = "layers.0.mlp.experts.1.up_proj.weight_scale\"";
    const char *source = edited_checkpoint("qwen3moe-int4", "config.json", "", "");
    const uint16_t tiny = 0x3340 | 0x13; /* about 2^-24.7 */
    conv_options o = {.source = source, .out = scratch_path("tiny.gguf"), .n_threads = 2};
    moe_status status;
    moe_mem mem;
    CHECK(notes_that_say(&o, "rounded", &status) == 0 && !status, "not yet");
    overwrite_tensor(source, scale, 0, &tiny, sizeof tiny);
    CHECK(notes_that_say(&o, "1 tensors, the first of them blk.0.ffn_up_exps.weight", &status) == 1,
          "no note");
    moe_directory *dir = open_directory(o.out, &mem);
    const moe_tensor *t = directory_tensor(dir, "blk.0.ffn_up_exps.weight");
    CHECK(load_u16(t->data + t->bytes / 4) == f16_of_f32(f32_of_bf16(tiny)), "%#x",
          load_u16(t->data + t->bytes / 4));
    directory_close(dir);
    o.quant = "f32";
    CHECK(notes_that_say(&o, "rounded", &status) == 0 && !status, "floats are not rounded");
    dir = open_directory(o.out, &mem);
    t = directory_tensor(dir, "blk.0.ffn_up_exps.weight");
    float x, largest = 0;
    for (size_t i = 0; i < 32; i++) {
        memcpy(&x, t->data + t->bytes / 4 + i * sizeof x, sizeof x);
        largest = fmaxf(largest, fabsf(x));
    }
    CHECK(fmodf(largest, f32_of_bf16(tiny)) == 0 && largest >= 7 * f32_of_bf16(tiny), "%g",
          (double)largest);
    directory_close(dir);
    unlink(o.out);
}

/* The config says that there is one matrix for both ends, but the checkpoint has two: transformers
 * uses both. */
static void an_output_matrix_of_its_own_is_used(void)
{
    moe_error error = {0};
    const char *out = scratch_path("two.gguf");
    size_t bytes;
    const char *source = edited_checkpoint("llama", "config.json", "\"tie_word_embeddings\": false",
                                           "\"tie_word_embeddings\": true");
    CHECK(!convert(source, out, "f32", &error), "%s", error.message);
    char *file = test_read_file(out, &bytes);
    REQUIRE(file, "%s", out);
    bool found = false;
    for (size_t i = 0; i + 14 <= bytes && !found; i++)
        found = !memcmp(file + i, "output.weight", 13) && (!i || file[i - 1] == 0);
    CHECK(found, "the output matrix is left out");
    free(file);
}

/* Kimi K2 is DeepSeek-V3 under another name. */
static void kimi_k2_is_deepseek_v3(void)
{
    expected_logits e = {0};
    moe_error error = {0};
    const char *out = scratch_path("kimi.gguf");
    REQUIRE(expected_load(&e, checkpoint("deepseek3")), "expected");
    const char *source = edited_checkpoint("deepseek3", "config.json",
                                           "\"model_type\": \"deepseek_v3\"",
                                           "\"model_type\": \"kimi_k2\"");
    CHECK(!convert(source, out, "f32", &error), "%s", error.message);
    CHECK(run_distance(out, &e) <= 1e-4, "other logits");
    unlink(out);
    free(e.data);
}

/* A layer for multi-token prediction is carried over, and says what transformers' says; through
 * GGUF, and through a .moe file to another one. */
static void draft_layer_comes_through(const char *name, bool twice)
{
    char path[600];
    size_t bytes = 0;
    expected_logits e = {0};
    moe_error error = {0};
    draft_guess guess;
    const char *out = scratch_path(twice ? "drafts.moe" : "drafts.gguf");
    REQUIRE(expected_load(&e, checkpoint(name)), "expected");
    snprintf(path, sizeof path, "%s/drafts", checkpoint(name));
    float *want = (float *)(void *)test_read_file(path, &bytes);
    REQUIRE(want && bytes == e.n_vocab * sizeof *want, "%s", path);
    REQUIRE(!convert(checkpoint(name), out, NULL, &error), "%s", error.message);
    if (twice) {
        const char *through = out;
        out = scratch_path("drafts-again.gguf");
        REQUIRE(!convert(through, out, NULL, &error), "%s", error.message);
        unlink(through);
    }
    moe_model_options mo;
    moe_session_options so;
    moe_model *model;
    moe_session *s;
    moe_model_options_init(&mo);
    mo.path = out;
    REQUIRE(!moe_model_open(&model, &mo, &error), "%s", error.message);
    moe_session_options_init(&so);
    so.cache_type = MOE_CACHE_F32;
    so.n_threads = 1;
    so.draft = MOE_DRAFT_MTP;
    REQUIRE(!moe_session_open(&s, model, &so, &error), "%s", error.message);
    CHECK(!moe_session_eval(s, e.tok, e.n_tok - 1, 0, NULL), "%s", moe_session_error(s)->message);
    s->history[e.n_tok - 1] = e.tok[e.n_tok - 1];
    CHECK(!mtp_guess(s, 1, &guess), "%s", moe_session_error(s)->message);
    double far = 0, most = 0;
    for (uint32_t v = 0; v < e.n_vocab; v++) {
        far = fmax(far, fabs((double)s->mtp.logits[v] - (double)want[v]));
        most = fmax(most, fabs((double)want[v]));
    }
    CHECK(far <= 1e-4 * most, "%s: %g of %g", name, far, most);
    moe_session_close(s);
    moe_model_close(model);
    unlink(out);
    free(want);
    free(e.data);
}

static void draft_layer_is_converted(void)
{
    for (int twice = 0; twice < 2; twice++) {
        draft_layer_comes_through("deepseek3-mtp", twice);
        draft_layer_comes_through("qwen35moe-mtp", twice);
    }
}

/* Values of E4M3 as torch's float8_e4m3fn has them: subnormals, both ends, a NaN of each sign. */
static void fp8_codes_have_their_values(void)
{
    static const struct { uint8_t code; float value; } cases[] = {
        {0x00, 0.0f}, {0x01, 0.001953125f}, {0x07, 0.013671875f}, {0x08, 0.015625f},
        {0x0f, 0.029296875f}, {0x37, 0.9375f}, {0x38, 1.0f}, {0x3c, 1.5f}, {0x78, 256.0f},
        {0x7e, 448.0f}, {0x81, -0.001953125f}, {0xb8, -1.0f}, {0xfe, -448.0f}};
    for (size_t i = 0; i < MOE_COUNT(cases); i++)
        CHECK(fp8_value(cases[i].code) == cases[i].value, "%#x: %g", cases[i].code,
              (double)fp8_value(cases[i].code));
    CHECK(isnan(fp8_value(0x7f)) && isnan(fp8_value(0xff)) && signbit(fp8_value(0x80)), "NaN, -0");
    for (int i = 1; i < 0x7f; i++)
        CHECK(fp8_value((uint8_t)i) > fp8_value((uint8_t)(i - 1)), "%#x", i);
}

/* The bytes of the result do not depend on the number of threads. */
static void threads_write_the_same_bytes(void)
{
    size_t bytes[3];
    char *data[3];
    static const uint32_t n_threads[3] = {1, 2, 7};
    for (int i = 0; i < 3; i++) {
        moe_error error = {0};
        const conv_options o = {.source = checkpoint("qwen3moe"), .out = scratch_path("t.gguf"),
                                .n_threads = n_threads[i], .quant = "q8_0"};
        CHECK(!convert_with(&o, &error), "%s", error.message);
        data[i] = test_read_file(o.out, &bytes[i]);
        unlink(o.out);
        CHECK(data[i] && bytes[i] == bytes[0] && !memcmp(data[i], data[0], bytes[0]), "%u threads",
              n_threads[i]);
    }
    for (int i = 0; i < 3; i++)
        free(data[i]);
}

/* Quantized rows are what the format's own quantizer makes of the F32 rows. */
static void blocks_are_those_of_the_encoder(void)
{
    moe_mem mem[2];
    moe_error error = {0};
    const char *fixture_path = "fixtures/qwen3moe-q.gguf";
    char source[500];
    snprintf(source, sizeof source, "%s/%s", test_root(), fixture_path);
    const char *full = scratch_path("full.gguf"), *small = scratch_path("small.gguf");
    REQUIRE(!convert(source, full, "f32", &error), "%s", error.message);
    REQUIRE(!convert(full, small, "q5_1", &error), "%s", error.message);
    moe_directory *a = open_directory(full, &mem[0]), *b = open_directory(small, &mem[1]);
    REQUIRE(a && b, "open");
    size_t n_quantized = 0;
    for (size_t i = 0; i < directory_n_tensors(a); i++) {
        const moe_tensor *x = directory_tensor_at(a, i), *y = directory_tensor_at(b, i);
        uint8_t *blocks = malloc(y->bytes);
        CHECK(!strcmp(x->name, y->name), "%s, %s", x->name, y->name);
        encoder_for(y->quant)((const float *)(const void *)x->data, NULL, blocks, 1,
                              (size_t)x->n_elements);
        CHECK(!memcmp(blocks, y->data, y->bytes), "%s", x->name);
        n_quantized += y->quant->id == Q_Q5_1;
        free(blocks);
    }
    CHECK(n_quantized > 10, "%zu", n_quantized);
    directory_close(a);
    directory_close(b);
    CHECK(convert(full, small, "tcq5", &error) == MOE_ERR_ARGUMENT &&
              strstr(error.message, "only .moe files have"), "%s", error.message);
    unlink(full);
    unlink(small);
}

/* --------------------------------------------------------------------------------- GGUF -- */

/* Without new types each key and each tensor is the same bytes. */
static void gguf_is_copied_byte_for_byte(void)
{
    static const char *const names[] = {"qwen3moe-q", "olmoe-bf16", "mixtral-f16", "gemma3",
                                        "gpt-oss-mxfp4", "deepseek3-q"};
    for (size_t n = 0; n < MOE_COUNT(names); n++) {
        char source[500];
        moe_mem mem[2];
        moe_error error = {0};
        snprintf(source, sizeof source, "%s/fixtures/%s.gguf", test_root(), names[n]);
        const char *out = scratch_path("copy.gguf");
        REQUIRE(!convert(source, out, NULL, &error), "%s", error.message);
        moe_directory *a = open_directory(source, &mem[0]), *b = open_directory(out, &mem[1]);
        REQUIRE(a && b, "open");
        CHECK(directory_n_meta(a) == directory_n_meta(b), "keys");
        CHECK(directory_n_tensors(a) == directory_n_tensors(b), "tensors");
        for (size_t i = 0; i < directory_n_meta(a); i++) {
            const moe_meta *x = directory_meta_at(a, i), *y = directory_meta(b, x->key);
            CHECK(y && x->type == y->type && x->item == y->item && x->n == y->n &&
                      x->data_bytes == y->data_bytes && !memcmp(x->data, y->data, x->data_bytes),
                  "%s: %s", names[n], x->key);
        }
        for (size_t i = 0; i < directory_n_tensors(a); i++) {
            const moe_tensor *x = directory_tensor_at(a, i), *y = directory_tensor_at(b, i);
            CHECK(!strcmp(x->name, y->name) && x->quant == y->quant && x->bytes == y->bytes &&
                      !memcmp(x->dims, y->dims, sizeof x->dims) &&
                      !memcmp(x->data, y->data, x->bytes), "%s: %s", names[n], x->name);
        }
        directory_close(a);
        directory_close(b);
        unlink(out);
    }
}

/* --------------------------------------------------------------------------------- plans -- */

typedef struct planned_files {
    conv_source source;
    conv_tensor tensors[256];
    conv_input inputs[256];
    char names[256][64];
    moe_mem mem;
} planned_files;

static conv_tensor *plan_add(planned_files *p, const char *name, uint64_t row_len)
{
    const size_t i = p->source.n_tensors++;
    snprintf(p->names[i], sizeof p->names[i], "%s", name);
    p->inputs[i].type = quant_by_name("BF16");
    p->tensors[i] = (conv_tensor){.name = p->names[i], .n_dims = 2, .dims = {row_len, 256, 1, 1},
                                  .row_len = row_len, .n_rows = 256, .inputs = &p->inputs[i],
                                  .n_inputs = 1};
    return &p->tensors[i];
}

static void plan_begin(planned_files *p, uint32_t n_layer, bool tied)
{
    memset(p, 0, sizeof *p);
    mem_init(&p->mem, NULL, 0);
    p->source.mem = p->source.kv.mem = p->source.arena.mem = &p->mem;
    p->source.tensors = p->tensors;
    p->source.n_layer = n_layer;
    p->source.tied = tied;
}

static void plan_layers(planned_files *p)
{
    static const char *const parts[] = {"attn_q.weight", "attn_v.weight", "ffn_gate_exps.weight",
                                        "ffn_down_exps.weight"};
    char name[64];
    plan_add(p, "token_embd.weight", 1024);
    for (uint32_t i = 0; i < p->source.n_layer; i++) {
        for (size_t k = 0; k < MOE_COUNT(parts); k++) {
            snprintf(name, sizeof name, "blk.%u.%s", i, parts[k]);
            plan_add(p, name, 1024);
        }
        snprintf(name, sizeof name, "blk.%u.ffn_gate_inp.weight", i);
        plan_add(p, name, 1024)->is_router = true;
    }
    plan_add(p, "output_norm.weight", 1024)->is_vector = true;
}

static const char *plan_of(const planned_files *p, const char *name)
{
    for (size_t i = 0; i < p->source.n_tensors; i++)
        if (!strcmp(p->tensors[i].name, name))
            return p->tensors[i].target->name;
    return "none";
}

static void plan_is(planned_files *p, const char *name, const char *type)
{
    CHECK(!strcmp(plan_of(p, name), type), "%s: expected %s, got %s", name, type, plan_of(p, name));
}

/* Types, sizes and keys, without anything that has to be measured. */
static moe_status plan_make(conv_source *s, const conv_options *options, moe_error *error)
{
    plan p;
    moe_status status = plan_types(&p, s, options, error);
    return status ? status : plan_finish(&p, s, error);
}

/* Q4_K_M as llama.cpp mixes it: more bits in the first and last eighth and every third between. */
static void mixes_give_more_bits_where_it_pays(void)
{
    planned_files *p = malloc(sizeof *p);
    moe_error error = {0};
    conv_options o = {.quant = "q4_k_m"};
    plan_begin(p, 32, false);
    plan_layers(p);
    plan_add(p, "output.weight", 1024);
    CHECK(!plan_make(&p->source, &o, &error), "%s", error.message);
    plan_is(p, "output.weight", "Q6_K");
    plan_is(p, "token_embd.weight", "Q4_K");
    plan_is(p, "output_norm.weight", "F32");
    plan_is(p, "blk.9.ffn_gate_inp.weight", "F32");
    uint32_t more = 0;
    for (uint32_t i = 0; i < 32; i++) {
        char name[64];
        const bool want = i < 4 || i >= 28 || i % 3 == 0; // (i - 4) % 3 == 2
        snprintf(name, sizeof name, "blk.%u.ffn_down_exps.weight", i);
        plan_is(p, name, want ? "Q6_K" : "Q4_K");
        snprintf(name, sizeof name, "blk.%u.attn_v.weight", i);
        plan_is(p, name, want ? "Q6_K" : "Q4_K");
        snprintf(name, sizeof name, "blk.%u.attn_q.weight", i);
        plan_is(p, name, "Q4_K");
        more += want;
    }
    CHECK(more == 16, "%u", more);
    buf_free(&p->source.kv);
    plan_begin(p, 2, true);
    plan_layers(p);
    CHECK(!plan_make(&p->source, &o, &error), "%s", error.message);
    plan_is(p, "token_embd.weight", "Q6_K"); // it is the output matrix, too
    buf_free(&p->source.kv);
    free(p);
}

/* Rows that no superblock fits get blocks of 32; others half floats. */
static void rows_that_fit_no_block_fall_back(void)
{
    static const struct { const char *asked, *at_1408, *at_100; } cases[] = {
        {"Q4_K", "Q5_0", "F16"}, {"Q5_K", "Q5_1", "F16"}, {"Q6_K", "Q8_0", "F16"},
        {"Q2_K", "IQ4_NL", "F16"}, {"Q3_K", "IQ4_NL", "F16"}, {"IQ4_XS", "IQ4_NL", "F16"},
        {"Q4_0", "Q4_0", "F16"}, {"BF16", "BF16", "BF16"}, {"F32", "F32", "F32"}};
    planned_files *p = malloc(sizeof *p);
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        moe_error error = {0};
        const conv_options o = {.quant = cases[i].asked};
        plan_begin(p, 1, false);
        plan_add(p, "blk.0.ffn_up.weight", 1408);
        plan_add(p, "blk.0.ffn_gate.weight", 100);
        CHECK(!plan_make(&p->source, &o, &error), "%s", error.message);
        plan_is(p, "blk.0.ffn_up.weight", cases[i].at_1408);
        plan_is(p, "blk.0.ffn_gate.weight", cases[i].at_100);
        buf_free(&p->source.kv);
    }
    free(p);
}

static void keep_overrides_the_mix(void)
{
    planned_files *p = malloc(sizeof *p);
    moe_error error = {0};
    conv_keep keeps[] = {{"attn", quant_by_name("Q8_0")},
                         {"blk\\.[01]\\.attn_v", quant_by_name("F16")}};
    conv_options o = {.quant = "q4_k", .keeps = keeps, .n_keeps = 2};
    plan_begin(p, 4, false);
    plan_layers(p);
    CHECK(!plan_make(&p->source, &o, &error), "%s", error.message);
    plan_is(p, "blk.0.attn_v.weight", "F16");
    plan_is(p, "blk.2.attn_v.weight", "Q8_0");
    plan_is(p, "blk.2.ffn_gate_exps.weight", "Q4_K");
    keeps[1].pattern = "nothing";
    CHECK(plan_make(&p->source, &o, &error) == MOE_ERR_ARGUMENT && strstr(error.message, "nothing"),
          "%s", error.message);
    keeps[1].pattern = "a(b";
    CHECK(plan_make(&p->source, &o, &error) == MOE_ERR_ARGUMENT, "%s", error.message);
    keeps[1] = (conv_keep){"output_norm", quant_by_name("Q8_0")};
    CHECK(plan_make(&p->source, &o, &error) == MOE_ERR_ARGUMENT &&
              strstr(error.message, "output_norm.weight"), "%s", error.message);
    buf_free(&p->source.kv);
    free(p);
}

/* ----------------------------------------------------------------------------- tokenizer -- */

static void tokenizer_json_becomes_keys(void)
{
    char folder[600], path[700];
    moe_mem mem;
    moe_error error = {0};
    snprintf(folder, sizeof folder, "%s", scratch_path("tok"));
    make_small(folder, 264);
    char *text = make_tokenizer(pre_gpt2);
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    scratch_write_text(path, text);
    free(text);
    snprintf(path, sizeof path, "%s/chat_template.jinja", folder);
    scratch_write_text(path, "{{ messages }}");
    const char *out = scratch_path("tok.gguf");
    REQUIRE(!convert(folder, out, NULL, &error), "%s", error.message);
    moe_directory *dir = open_directory(out, &mem);
    REQUIRE(dir, "open");
    moe_str s = {"", 0};
    uint32_t eos = 0;
    bool nfc = false, bos = true;
    meta_string(dir, "tokenizer.ggml.pre", true, &s, NULL);
    CHECK(str_equal(s, "gpt-2"), "%.*s", (int)s.bytes, s.data);
    meta_string(dir, "tokenizer.chat_template", true, &s, NULL);
    CHECK(str_equal(s, "{{ messages }}"), "%.*s", (int)s.bytes, s.data);
    meta_u32(dir, "tokenizer.ggml.eos_token_id", true, 0, 999, &eos, NULL);
    meta_bool(dir, "tokenizer.ggml.normalizer.nfc", true, &nfc, NULL);
    meta_bool(dir, "tokenizer.ggml.add_bos_token", true, &bos, NULL);
    CHECK(eos == 260 && nfc && !bos, "%u %d %d", eos, nfc, bos);
    const moe_meta *tokens = directory_meta(dir, "tokenizer.ggml.tokens");
    REQUIRE(tokens && tokens->n == 264, "tokens");
    CHECK(str_equal(tokens->strings[263], "[PAD263]"), "padding");
    directory_close(dir);
    moe_model *model = NULL;
    moe_model_options mo;
    moe_model_options_init(&mo);
    mo.path = out;
    CHECK(!moe_model_open(&model, &mo, &error), "%s", error.message);
    moe_token ids[8];
    size_t n = 0;
    moe_tokenizer_encode(moe_model_tokenizer(model), "the inn", 7, 0, ids, 8, &n, NULL);
    CHECK(n == 4 && ids[0] == 257 && ids[2] == 258, "%zu ids", n);
    moe_model_close(model);
    unlink(out);
}

/* ----------------------------------------------------------------------------- SentencePiece -- */

/* Bytes of hexadecimal digits, in place; "-" stands for none. */
static size_t from_hex(char *text)
{
    size_t n = 0;
    unsigned value;
    if (!strcmp(text, "-"))
        return 0;
    for (; sscanf(text + 2 * n, "%2x", &value) == 1; n++)
        text[n] = (char)value;
    return n;
}

/* The ids are those that SentencePiece gives: tests/make_sentencepiece.py. */
static void sentencepiece_gives_its_ids(void)
{
    char path[700], name[32], now[32] = "";
    static char line[8192], hex[4096];
    moe_tokenizer *tok = NULL;
    moe_error error = {0};
    uint32_t n_line = 0, n_model = 0;
    snprintf(path, sizeof path, "%s/data/spm_expected.txt", test_root());
    FILE *f = fopen(path, "r");
    REQUIRE(f, "%s", path);
    while (fgets(line, sizeof line, f)) {
        moe_token want[512], got[512];
        size_t n_want = 0, n_got = 0;
        int at = 0, step;
        if (*line == '#')
            continue;
        REQUIRE(sscanf(line, "%31s %4095s%n", name, hex, &at) == 2, "%s", line);
        while (n_want < 512 && sscanf(line + at, "%d%n", &want[n_want], &step) == 1) {
            at += step;
            n_want++;
        }
        if (strcmp(name, now)) {
            char folder[600];
            moe_model_options o;
            moe_tokenizer_close(tok);
            tok = NULL;
            snprintf(now, sizeof now, "%s", name);
            snprintf(folder, sizeof folder, "%s", scratch_path(name));
            const char *out = scratch_path("spm.gguf");
            REQUIRE(make_small_spm(folder, name, 484), "%s", name);
            REQUIRE(!convert(folder, out, NULL, &error), "%s: %s", name, error.message);
            moe_model_options_init(&o);
            o.path = out;
            REQUIRE(!moe_tokenizer_open(&tok, &o, &error), "%s: %s", name, error.message);
            n_model++;
        }
        const size_t bytes = from_hex(hex);
        CHECK(!moe_tokenizer_encode(tok, hex, bytes, 0, got, 512, &n_got, &error), "%s",
              error.message);
        size_t k = 0;
        while (k < n_want && k < n_got && want[k] == got[k])
            k++;
        CHECK(k == n_want && k == n_got,
              "%s, \"%.*s\": token %zu of %zu (%zu): expected %d, got %d", name, (int)bytes, hex, k,
              n_want, n_got, k < n_want ? want[k] : -1, k < n_got ? got[k] : -1);
        n_line++;
    }
    CHECK(n_model == 5 && n_line > 100, "%u models, %u lines", n_model, n_line);
    moe_tokenizer_close(tok);
    fclose(f);
}

/* Added tokens and roles come from the configs, the rest from the model. */
static void sentencepiece_has_added_tokens(void)
{
    char folder[600], path[700];
    moe_mem mem;
    moe_error error = {0};
    snprintf(folder, sizeof folder, "%s", scratch_path("spm_added"));
    REQUIRE(make_small_spm(folder, "bpe", 490), "no model");
    snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
    scratch_write_text(path, "{\"added_tokens_decoder\": {"
                             "\"480\": {\"content\": \"<|turn|>\", \"special\": true}, "
                             "\"481\": {\"content\": \"<tool>\", \"special\": false}, "
                             "\"0\": {\"content\": \"<unk>\", \"special\": true}}, "
                             "\"eos_token\": \"<|turn|>\"}");
    snprintf(path, sizeof path, "%s/added_tokens.json", folder);
    scratch_write_text(path, "{\"<extra>\": 482}");
    const char *out = scratch_path("spm_added.gguf");
    REQUIRE(!convert(folder, out, NULL, &error), "%s", error.message);
    moe_directory *dir = open_directory(out, &mem);
    REQUIRE(dir, "open");
    const moe_meta *tokens = directory_meta(dir, "tokenizer.ggml.tokens");
    const moe_meta *kinds = directory_meta(dir, "tokenizer.ggml.token_type");
    static const struct { uint32_t id; const char *text; tok_kind kind; } want[] = {
        {0, "<unk>", TOK_UNKNOWN}, {1, "<s>", TOK_CONTROL}, {3, "<|im_end|>", TOK_CONTROL},
        {4, "<code>", TOK_USER}, {5, "<0x00>", TOK_BYTE}, {480, "<|turn|>", TOK_CONTROL},
        {481, "<tool>", TOK_USER}, {482, "<extra>", TOK_USER}, {483, "[PAD483]", TOK_UNUSED}};
    for (size_t i = 0; i < MOE_COUNT(want); i++) {
        const moe_str text = tokens->strings[want[i].id];
        CHECK(str_equal(text, want[i].text) && meta_item_i64(kinds, want[i].id) == want[i].kind,
              "%u: \"%.*s\", %lld", want[i].id, (int)text.bytes, text.data,
              (long long)meta_item_i64(kinds, want[i].id));
    }
    uint32_t bos = 0, eos = 0;
    bool before = false;
    meta_u32(dir, "tokenizer.ggml.bos_token_id", true, 0, 999, &bos, NULL);
    meta_u32(dir, "tokenizer.ggml.eos_token_id", true, 0, 999, &eos, NULL);
    meta_bool(dir, "tokenizer.ggml.add_bos_token", true, &before, NULL);
    CHECK(bos == 1 && eos == 480 && before, "%u %u %d", bos, eos, before);
    directory_close(dir);
}

/* ------------------------------------------------------------------------------- choosing -- */

/* What a budget has left goes into steps off the hull, the best first: two matrices of 800 weights
 * in 100, 150 or 200 bytes, of which the middle type is never the best buy. */
static void what_is_left_is_spent_on_smaller_steps(void)
{
    static const double losses[2][3] = {{10, 9.5, 1}, {10, 8, 1}};
    static const struct { uint64_t budget; uint32_t types[2]; } cases[] = {
        {249, {0, 0}}, {250, {0, 1}}, {260, {0, 1}}, {299, {0, 1}}, {300, {2, 0}}, {349, {2, 0}},
        {350, {2, 1}}, {399, {2, 1}}, {400, {2, 2}}};
    conv_tensor t = {.row_len = 800, .n_rows = 1};
    alloc_choice choices[2];
    alloc_unit units[2];
    alloc_step steps[8];
    alloc_state a = {.choices = choices, .units = units, .steps = steps, .n_choices = 2,
                     .n_units = 2};
    for (uint32_t u = 0; u < 2; u++) {
        choices[u] = (alloc_choice){.t = &t, .n_types = 3, .n_parts = 1, .first_unit = u};
        for (uint32_t k = 0; k < 3; k++)
            choices[u].types[k] = (alloc_type){.bits = 1 + 0.5 * k, .loss = losses[u][k]};
        units[u] = (alloc_unit){.choice = &choices[u], .share = 1};
        alloc_add_steps(&a, u);
    }
    CHECK(a.n_steps == 2 && steps[0].to == 2 && steps[1].to == 2, "%u steps", a.n_steps);
    qsort(steps, a.n_steps, sizeof *steps, alloc_compare);
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        alloc_choose(&a, cases[i].budget, alloc_least(&a, 0));
        CHECK(units[0].type == cases[i].types[0] && units[1].type == cases[i].types[1],
              "%d bytes: types %u and %u", (int)cases[i].budget, units[0].type, units[1].type);
    }
}

/* general.file_type is that of the mix, else of the type of most weights, experts each counted. */
static void files_are_of_the_type_of_most_weights(void)
{
    static const struct {
        const char *quant, *experts, *other;
        uint64_t n_other;
        uint32_t want;
    } cases[] = {
        {NULL, "Q6_K", "Q4_0", 1000, 18}, {NULL, "Q6_K", "Q4_0", 1999, 18},
        {NULL, "Q6_K", "Q4_0", 2001, 2},  {NULL, "Q8_0", "F32", 100, 7},
        {NULL, "F32", "Q8_0", 1999, 0},   {NULL, "F16", "Q8_0", 100, 1},
        {NULL, "Q8_0", "BF16", 9000, 32}, {NULL, "MXFP4", "F32", 0, 38},
        {"q4_k_m", "Q8_0", "F32", 0, 15}, {NULL, "IQ4_NL", "IQ4_XS", 4001, 30}};
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        const moe_quant *most = quant_by_name(cases[i].experts), *few = quant_by_name("Q4_0");
        const moe_quant *parts[4] = {few, most, most, most}; // 1000 weights each
        conv_tensor tensors[2] = {
            {.row_len = 1000, .n_rows = 4, .target = few, .part_types = parts},
            {.row_len = 1, .n_rows = cases[i].n_other, .target = quant_by_name(cases[i].other)}};
        const conv_source s = {.tensors = tensors, .n_tensors = 2, .n_expert = 4};
        moe_error error = {0};
        plan p;
        CHECK(!plan_find(&p, cases[i].quant, &error), "%s", error.message);
        CHECK(plan_file_type(&p, &s) == cases[i].want, "case %zu: %u", i, plan_file_type(&p, &s));
    }
}

TEST_PROGRAM(convert)
{
    if (!scratch_begin("convert"))
        return;
    RUN(checkpoints_give_the_logits_of_transformers);
    RUN(quantized_checkpoints_diverge_as_their_bits_say);
    RUN(fp8_codes_have_their_values);
    RUN(packed_weights_are_exact);
    RUN(fp8_weights_are_exact);
    RUN(fp8_scales_are_factors);
    RUN(fp8_scales_are_told_by_their_shape);
    RUN(sizes_of_fp8_blocks_may_be_a_text);
    RUN(kimi_k2_is_deepseek_v3);
    RUN(scales_that_f16_lacks_are_rounded_and_told);
    RUN(an_output_matrix_of_its_own_is_used);
    RUN(draft_layer_is_converted);
    RUN(threads_write_the_same_bytes);
    RUN(blocks_are_those_of_the_encoder);
    RUN(gguf_is_copied_byte_for_byte);
    RUN(mixes_give_more_bits_where_it_pays);
    RUN(what_is_left_is_spent_on_smaller_steps);
    RUN(files_are_of_the_type_of_most_weights);
    RUN(rows_that_fit_no_block_fall_back);
    RUN(keep_overrides_the_mix);
    RUN(tokenizer_json_becomes_keys);
    RUN(sentencepiece_gives_its_ids);
    RUN(sentencepiece_has_added_tokens);
    scratch_end();
}

#endif
