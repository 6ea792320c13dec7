/* tests/test_convert.c - the converter: checkpoints of every family against the logits of
 * transformers (tests/make_checkpoints.py), GGUF files copied and requantized, plans, and input
 * that lies.
 *
 * Everything is written into a folder of its own below $TMPDIR, which is removed at the end. */
#include "test.h"

#if defined MOE_NO_TEXT || defined MOE_NO_ZSTD
TEST_PROGRAM(convert)
{
}
#else

#include "converter.h"
#include "scratch.h"

#include <sys/resource.h>

/* ------------------------------------------------------------------------------- helpers -- */

static moe_status convert(const char *source, const char *out, const char *quant, moe_error *error)
{
    const conv_options options = {.source = source, .out = out, .quant = quant, .n_threads = 2};
    return convert_with(&options, error);
}

/* A conversion must fail with this status, say this, and leave nothing. */
static void refused_conversion(const conv_options *options, moe_status status, const char *says)
{
    char partial[700];
    moe_error error = {0};
    snprintf(partial, sizeof partial, "%s.partial", options->out);
    const double start = test_cpu_ms();
    moe_status got = convert_with(options, &error);
    CHECK(got == status, "expected %s, got %s: %s", moe_status_name(status), moe_status_name(got),
          error.message);
    CHECK(strstr(error.message, says), "expected \"%s\" in: %s", says, error.message);
    CHECK(!scratch_exists(options->out) && !scratch_exists(partial), "%s is left", options->out);
    CHECK(test_cpu_ms() - start < 1e3 * test_slowness(), "it took too long");
}

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

/* Every checkpoint as F32 gives transformers' logits; in its own types too, but for FP8, which
 * becomes BF16 with a rounding of 2^-9 for each weight, and MXFP4, which is multiplied with int8:
 * both can turn a close decision of a router, so their divergence is looked at. */
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
            const bool rounded = i == 0 && (strstr(d->d_name, "fp8") || strstr(d->d_name, "mxfp4"));
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
 * make_checkpoints.py --wide are all quantized. */
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
        if (d->d_name[0] == '.')
            continue;
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

/* A damaged GGUF file is refused in the loader's words. */
static void gguf_damage_is_refused(void)
{
    char source[500];
    size_t bytes;
    snprintf(source, sizeof source, "%s/fixtures/qwen3.gguf", test_root());
    char *data = test_read_file(source, &bytes);
    const char *cut = scratch_path("cut.gguf");
    const conv_options o = {.source = cut, .out = scratch_path("o.gguf")};
    REQUIRE(data, "%s", source);
    scratch_write(cut, data, bytes - 1000);
    refused_conversion(&o, MOE_ERR_FORMAT, "cut off");
    scratch_write(cut, "GGUF", 4);
    refused_conversion(&o, MOE_ERR_FORMAT, "version");
    scratch_write(cut, "", 0);
    refused_conversion(&o, MOE_ERR_FORMAT, "magic");
    unlink(cut);
    refused_conversion(&o, MOE_ERR_IO, "no such");
    free(data);
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

/* A byte-level vocabulary: all bytes, "th", "the", "in" and one that nothing makes; `pre` is its
 * pre-tokenizer. */
static char *make_tokenizer(const char *pre)
{
    static const char merges[] = "}, \"merges\": [[\"t\", \"h\"], \"th e\", \"i n\"]}}";
    char *text = malloc(1 << 16), *p = text;
    uint32_t id = 0;
    p += sprintf(p,
                 "{\"added_tokens\": [{\"id\": 260, \"content\": \"<|end|>\", \"special\": true}],"
                 "\"normalizer\": {\"type\": \"NFC\"}, \"pre_tokenizer\": %s, "
                 "\"post_processor\": null,"
                 "\"decoder\": {\"type\": \"ByteLevel\"}, "
                 "\"model\": {\"type\": \"BPE\", \"vocab\": {",
                 pre);
    for (uint32_t c = 0x21; c < 0x144; c++) {
        uint8_t utf8[4];
        if (bytelevel_byte(c) < 0)
            continue;
        const size_t n = utf8_encode(c, utf8);
        p += sprintf(p, "\"%s%.*s\": %u, ", c == '"' || c == '\\' ? "\\" : "", (int)n,
                     (const char *)utf8, id++);
    }
    p += sprintf(p, "\"th\": 256, \"the\": 257, \"in\": 258, \"x\\u0120y\": 259%s", merges);
    return text;
}

static const char pre_gpt2[] =
    "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": true}";

/* A checkpoint of one layer whose tensors are all zero but for norms. */
static void make_small(const char *folder, uint32_t n_vocab)
{
    static const char *const square[] = {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
    char header[4096], config[512];
    uint64_t at = 0, n = 0;
    mkdir(folder, 0777);
    n += (uint64_t)sprintf(header + n,
                           "{\"model.embed_tokens.weight\": {\"dtype\": \"F32\", \"shape\": "
                           "[%u, 4], \"data_offsets\": [0, %u]}", n_vocab, 16 * n_vocab);
    at = 16 * n_vocab;
    static const char *const norms[] = {"model.norm", "model.layers.0.input_layernorm",
                                        "model.layers.0.post_attention_layernorm"};
    for (size_t i = 0; i < MOE_COUNT(norms); i++, at += 16)
        n += (uint64_t)sprintf(header + n, ", \"%s.weight\": {\"dtype\": \"F32\", \"shape\": [4], "
                               "\"data_offsets\": [%llu, %llu]}", norms[i], (unsigned long long)at,
                               (unsigned long long)at + 16);
    for (size_t i = 0; i < MOE_COUNT(square); i++, at += 64)
        n += (uint64_t)sprintf(header + n, ", \"model.layers.0.%s.weight\": {\"dtype\": \"F32\", "
                               "\"shape\": [4, 4], \"data_offsets\": [%llu, %llu]}", square[i],
                               (unsigned long long)at, (unsigned long long)at + 64);
    n += (uint64_t)sprintf(header + n, "}");
    char *file = calloc(1, 8 + n + at), path[700];
    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    scratch_write(path, file, 8 + n + at);
    free(file);
    snprintf(config, sizeof config,
             "{\"model_type\": \"llama\", \"vocab_size\": %u, \"hidden_size\": 4, "
             "\"intermediate_size\": 4, \"num_hidden_layers\": 1, \"num_attention_heads\": 2, "
             "\"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-5, "
             "\"auto_map\": {\"AutoModel\": \"evil.Model\"}, \"tie_word_embeddings\": true, "
             "\"rope_scaling\": null, \"bos_token_id\": null, \"eos_token_id\": [260, 257]}",
             n_vocab);
    snprintf(path, sizeof path, "%s/config.json", folder);
    scratch_write_text(path, config);
}

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

/* Patterns that no name stands for are refused, not replaced by others. */
static void unknown_patterns_are_refused(void)
{
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("tok2"));
    make_small(folder, 261);
    // it splits "the", or it would make no difference
    char *text = make_tokenizer(
        "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", "
        "\"pattern\": {\"Regex\": "
        "\"[a-e]|[f-z]+\"}, \"behavior\": \"Isolated\", \"invert\": false}, {\"type\": "
        "\"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}]}");
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    scratch_write_text(path, text);
    const conv_options o = {.source = folder, .out = scratch_path("t2.gguf")};
    refused_conversion(&o, MOE_ERR_UNSUPPORTED, "--pre NAME");
    free(text);
}

/* T: more tokens than rows, ids out of range. */
static void tokenizers_that_contradict_the_model_are_refused(void)
{
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("tok3"));
    const conv_options o = {.source = folder, .out = scratch_path("t3.gguf")};
    make_small(folder, 200);
    char *text = make_tokenizer(pre_gpt2);
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    scratch_write_text(path, text);
    refused_conversion(&o, MOE_ERR_MODEL, "at most 200 tokens");
    make_small(folder, 261);
    scratch_write_text(path, "{\"model\": 3}");
    refused_conversion(&o, MOE_ERR_FORMAT, "vocab");
    scratch_write_text(path, text);
    snprintf(path, sizeof path, "%s/generation_config.json", folder);
    scratch_write_text(path, "{\"eos_token_id\": 4000000000}");
    refused_conversion(&o, MOE_ERR_MODEL, "eos_token_id");
    scratch_write_text(path, "{\"temperature\": \"hot\"}");
    refused_conversion(&o, MOE_ERR_MODEL, "temperature");
    free(text);
}

/* ----------------------------------------------------------------------------- SentencePiece -- */

/* A checkpoint whose tokenizer is tests/data/spm_NAME.model. */
static bool make_small_spm(const char *folder, const char *name, uint32_t n_vocab)
{
    char path[700];
    size_t bytes;
    snprintf(path, sizeof path, "%s/data/spm_%s.model", test_root(), name);
    char *model = test_read_file(path, &bytes);
    if (!model)
        return false;
    make_small(folder, n_vocab);
    snprintf(path, sizeof path, "%s/tokenizer.model", folder);
    scratch_write(path, model, bytes);
    free(model);
    return true;
}

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

/* Reads bytes of which a sanitizer guards the end, and says what came of it. */
static moe_status spm_read(const void *data, size_t bytes, moe_error *error)
{
    sp_model m;
    sp_piece pieces[490] = {{.score = 0}};
    char *exact = malloc(bytes ? bytes : 1);
    memcpy(exact, data, bytes);
    *error = (moe_error){0};
    const moe_status status = sp_read(&m, pieces, 490, exact, bytes, error);
    CHECK(!status || error->message[0], "no message");
    free(exact);
    return status;
}

static void lying_sentencepiece_models_are_refused(void)
{
    static const struct {
        const char *what, *says;
        size_t bytes;
        char data[24];
        moe_status status;
    } lies[] = {
        {"nothing", "a model of SentencePiece", 0, "", MOE_ERR_FORMAT},
        {"tiktoken", "a model of SentencePiece", 7, "IQ== 0\n", MOE_ERR_FORMAT},
        {"a length of 2^63", "a model of SentencePiece", 12,
         "\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01\x00", MOE_ERR_FORMAT},
        {"a length behind the end", "a model of SentencePiece", 4, "\x0a\x03\x0a\x01",
         MOE_ERR_FORMAT},
        {"a number of 11 bytes", "a model of SentencePiece", 13,
         "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", MOE_ERR_FORMAT},
        {"a group", "a model of SentencePiece", 2, "\x0b\x0c", MOE_ERR_FORMAT},
        {"field 0", "a model of SentencePiece", 2, "\x00\x00", MOE_ERR_FORMAT},
        {"a piece inside of which a length lies", "a model of SentencePiece", 4, "\x0a\x02\x0a\x7f",
         MOE_ERR_FORMAT},
        {"a piece without a text", "1 to 65536 bytes for token 0", 2, "\x0a\x00", MOE_ERR_FORMAT},
        {"a text that is no UTF-8", "UTF-8", 5, "\x0a\x03\x0a\x01\xff", MOE_ERR_FORMAT},
        {"a text with NUL", "UTF-8", 6, "\x0a\x04\x0a\x02\x61\x00", MOE_ERR_FORMAT},
        {"kind 9", "a kind from 1 to 6", 7, "\x0a\x05\x0a\x01\x61\x18\x09", MOE_ERR_FORMAT},
        {"a byte that is none", "a kind from 1 to 6", 7, "\x0a\x05\x0a\x01\x61\x18\x06",
         MOE_ERR_FORMAT},
        {"a score that is no number", "a finite score", 10,
         "\x0a\x08\x0a\x01\x61\x15\x00\x00\xc0\x7f", MOE_ERR_FORMAT},
        {"words", "a unigram (1) or a BPE model (2), got kind 3", 9,
         "\x0a\x03\x0a\x01\x61\x12\x02\x18\x03", MOE_ERR_UNSUPPORTED},
        {"spaces behind words", "treat_whitespace_as_suffix", 10,
         "\x0a\x03\x0a\x01\x61\x12\x03\xc0\x01\x01", MOE_ERR_UNSUPPORTED},
        {"spaces that stay", "escape_whitespaces", 9, "\x0a\x03\x0a\x01\x61\x1a\x02\x28\x00",
         MOE_ERR_UNSUPPORTED}};
    moe_error error = {0};
    char folder[600], path[700];
    for (size_t i = 0; i < MOE_COUNT(lies); i++) {
        const moe_status status = spm_read(lies[i].data, lies[i].bytes, &error);
        CHECK(status == lies[i].status && strstr(error.message, lies[i].says), "%s: %s: %s",
              lies[i].what, moe_status_name(status), error.message);
    }
    snprintf(folder, sizeof folder, "%s", scratch_path("spm_lies"));
    const conv_options o = {.source = folder, .out = scratch_path("spm_lies.gguf")};
    REQUIRE(make_small_spm(folder, "unigram", 479), "no model");
    refused_conversion(&o, MOE_ERR_MODEL, "at most 479 tokens, one for each row");
    make_small_spm(folder, "unigram", 480);
    snprintf(path, sizeof path, "%s/added_tokens.json", folder);
    scratch_write_text(path, "{\"<extra>\": 1e300}");
    refused_conversion(&o, MOE_ERR_FORMAT, "added tokens");
    snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
    scratch_write_text(path, "{\"added_tokens_decoder\": {\"7x\": {\"content\": \"a\"}}}");
    refused_conversion(&o, MOE_ERR_FORMAT, "added tokens");
}

/* Cut at every byte, and with changed bytes: an error or a success, nothing else. */
static void damaged_sentencepiece_models_are_harmless(void)
{
    char path[700];
    moe_error error;
    size_t bytes;
    uint32_t n_good = 0, n_bad = 0;
    snprintf(path, sizeof path, "%s/data/spm_unigram.model", test_root());
    char *data = test_read_file(path, &bytes);
    REQUIRE(data, "%s", path);
    for (size_t n = 0; n < bytes; n++)
        n_bad += spm_read(data, n, &error) != MOE_OK;
    CHECK(n_bad > bytes / 2, "%u cuts refused", n_bad);
    for (int i = 0; i < 4000; i++) {
        const size_t at = test_random() % bytes;
        const char old = data[at];
        data[at] = (char)test_random();
        if (spm_read(data, bytes, &error))
            n_bad++;
        else
            n_good++;
        data[at] = old;
    }
    CHECK(n_good > 100, "%u changes are harmless", n_good);
    free(data);
}

/* --------------------------------------------------------------------- hostile safetensors -- */

/* Writes a file with this header and data_bytes bytes of zeros. */
static void write_safetensors(const char *path, const char *header, size_t data_bytes)
{
    const uint64_t n = strlen(header);
    char *file = calloc(1, 8 + n + data_bytes);
    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    scratch_write(path, file, 8 + n + data_bytes);
    free(file);
}

#define T(name, dtype, shape, from, to)                                                            \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", " \
    "\"data_offsets\": [" from ", " to "]}"

static void lying_headers_are_refused(void)
{
    static const struct {
        const char *id, *header;
        size_t data_bytes;
        moe_status status;
        const char *says;
    } cases[] = {
        {"S4 not UTF-8", "{\"\xff\": 1}", 0, MOE_ERR_FORMAT, "UTF-8"},
        {"S5 not JSON", "hello", 0, MOE_ERR_FORMAT, "JSON"},
        {"S5 no object", "[1, 2]", 0, MOE_ERR_FORMAT, "object"},
        {"S5 comment", "{} // no", 0, MOE_ERR_FORMAT, "JSON"},
        {"S7 twice", "{" T("a", "F32", "[1]", "0", "4") ", " T("a", "F32", "[1]", "4", "8") "}", 8,
         MOE_ERR_FORMAT, "twice"},
        {"S8 inverted", "{" T("a", "F32", "[1]", "4", "0") "}", 4, MOE_ERR_FORMAT, "in order"},
        {"S9 overlap", "{" T("a", "F32", "[2]", "0", "8") ", " T("b", "F32", "[1]", "4", "8") "}",
         8, MOE_ERR_FORMAT, "overlaps"},
        {"S9 same place",
         "{" T("a", "F32", "[1]", "0", "4") ", " T("b", "F32", "[1]", "0", "4") "}", 4,
         MOE_ERR_FORMAT, "overlaps"},
        {"S10 hole", "{" T("a", "F32", "[1]", "0", "4") ", " T("b", "F32", "[1]", "8", "12") "}",
         12, MOE_ERR_FORMAT, "a hole"},
        {"S10 hole in front", "{" T("a", "F32", "[1]", "4", "8") "}", 8, MOE_ERR_FORMAT, "a hole"},
        {"S10 tail", "{" T("a", "F32", "[1]", "0", "4") "}", 5, MOE_ERR_FORMAT, "belong to none"},
        {"S11 too small", "{" T("a", "F32", "[3]", "0", "8") "}", 8, MOE_ERR_FORMAT, "do not fit"},
        {"S11 wrong dtype", "{" T("a", "F16", "[2]", "0", "8") "}", 8, MOE_ERR_FORMAT,
         "do not fit"},
        {"S12 wraps", "{" T("a", "F32", "[4294967296, 4294967296]", "0", "4") "}", 4,
         MOE_ERR_FORMAT, "64 bits"},
        {"S12 bytes wrap", "{" T("a", "F32", "[4611686018427387904]", "0", "0") "}", 0,
         MOE_ERR_FORMAT, "2^53"},
        {"S12 bytes wrap", "{" T("a", "F32", "[2147483648, 2147483648]", "0", "0") "}", 0,
         MOE_ERR_FORMAT, "do not fit"},
        {"S13 negative", "{" T("a", "F32", "[-1]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 1e300", "{" T("a", "F32", "[1e300]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 2^53+1", "{" T("a", "F32", "[9007199254740993]", "0", "4") "}", 4, MOE_ERR_FORMAT,
         "2^53"},
        {"S13 fraction", "{" T("a", "F32", "[1.5]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 text", "{" T("a", "F32", "[\"1\"]", "0", "4") "}", 4, MOE_ERR_FORMAT, "2^53"},
        {"S13 offset", "{" T("a", "F32", "[1]", "-4", "0") "}", 4, MOE_ERR_FORMAT, "data_offsets"},
        {"S14 dtype", "{" T("a", "Q4_0", "[1]", "0", "4") "}", 4, MOE_ERR_UNSUPPORTED, "Q4_0"},
        {"past the end", "{" T("a", "F32", "[2]", "0", "8") "}", 4, MOE_ERR_FORMAT, "cut off"},
        {"no shape", "{\"a\": {\"dtype\": \"F32\", \"data_offsets\": [0, 4]}}", 4, MOE_ERR_FORMAT,
         "shape"},
        {"9 dimensions", "{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, MOE_ERR_FORMAT,
         "dimensions"},
        {"not an object", "{\"a\": 3}", 0, MOE_ERR_FORMAT, "object"},
        {"empty name", "{" T("", "F32", "[1]", "0", "4") "}", 4, MOE_ERR_FORMAT, "name"},
        {"NUL in a name", "{" T("a\\u0000b", "F32", "[1]", "0", "4") "}", 4, MOE_ERR_FORMAT,
         "name"},
        {"nothing", "{}", 0, MOE_ERR_MODEL, "embed_tokens"},
    };
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("bad"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    const conv_options o = {.source = folder, .out = scratch_path("bad.gguf")};
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        const int failures = test_failures;
        write_safetensors(path, cases[i].header, cases[i].data_bytes);
        refused_conversion(&o, cases[i].status, cases[i].says);
        if (test_failures != failures)
            printf("  in case %s\n", cases[i].id);
    }
    uint64_t huge = 1000; // S1, S2, S3, S6
    scratch_write(path, "1234567", 7);
    refused_conversion(&o, MOE_ERR_FORMAT, "too few");
    scratch_write(path, "", 0);
    refused_conversion(&o, MOE_ERR_FORMAT, "too few");
    scratch_write(path, &huge, 8);
    refused_conversion(&o, MOE_ERR_FORMAT, "within");
    huge = UINT64_MAX;
    scratch_write(path, &huge, 8);
    refused_conversion(&o, MOE_ERR_FORMAT, "within");
    char *deep = malloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = 0;
    write_safetensors(path, deep, 0);
    refused_conversion(&o, MOE_ERR_FORMAT, "nested");
    free(deep);
    huge = ST_MAX_HEADER_BYTES + 1ull;
    scratch_write(path, &huge, 8);
    CHECK(!truncate(path, 8 + ST_MAX_HEADER_BYTES + 1ll), "truncate");
    refused_conversion(&o, MOE_ERR_LIMIT, "at most 100000000");
    unlink(path);
    refused_conversion(&o, MOE_ERR_IO, "model.safetensors");
}

/* S15: a small header cannot name more tensors than there are bytes, and names for the same bytes
 * are an overlap. */
static void aliases_are_refused(void)
{
    char folder[600], path[700];
    enum { N = 300000 };
    snprintf(folder, sizeof folder, "%s", scratch_path("alias"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    const conv_options o = {.source = folder, .out = scratch_path("alias.gguf")};
    char *header = malloc((size_t)N * 80), *p = header;
    *p++ = '{';
    for (int i = 0; i < N; i++)
        p += sprintf(p, "%s\"%d\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}",
                     i ? "," : "", i);
    strcpy(p, "}");
    write_safetensors(path, header, 4);
    refused_conversion(&o, MOE_ERR_LIMIT, "at most 262144 tensors");
    free(header);
}

static void write_index(const char *folder, const char *map)
{
    char path[700], text[2000];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    snprintf(text, sizeof text, "{\"weight_map\": %s}", map);
    scratch_write_text(path, text);
}

/* S16, S17: shards elsewhere, a tensor in two of them, one that is not where the index says. */
static void lying_indexes_are_refused(void)
{
    char folder[600], path[700], other[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("shards"));
    make_small(folder, 8);
    const conv_options o = {.source = folder, .out = scratch_path("shards.gguf")};
    static const char *const outside[] = {"../secret", "/etc/passwd", "a/../../b", "..", ".", "",
                                          "a\\\\b"};
    for (size_t i = 0; i < MOE_COUNT(outside); i++) {
        char map[200];
        snprintf(map, sizeof map, "{\"a\": \"%s\"}", outside[i]);
        write_index(folder, map);
        refused_conversion(&o, MOE_ERR_FORMAT, "weight_map");
    }
    snprintf(path, sizeof path, "%s/link.safetensors", folder);
    snprintf(other, sizeof other, "%s", scratch_path("outside.safetensors"));
    write_safetensors(other, "{" T("a", "F32", "[1]", "0", "4") "}", 4);
    CHECK(!symlink(other, path), "symlink");
    write_index(folder, "{\"a\": \"link.safetensors\"}");
    refused_conversion(&o, MOE_ERR_FORMAT, "link that leaves");
    unlink(path);
    for (int i = 1; i <= 2; i++) {
        snprintf(path, sizeof path, "%s/%d.safetensors", folder, i);
        write_safetensors(path, "{" T("a", "F32", "[1]", "0", "4") "}", 4);
    }
    write_index(folder, "{\"a\": \"1.safetensors\", \"b\": \"2.safetensors\"}");
    refused_conversion(&o, MOE_ERR_FORMAT, "in one shard");
    write_index(folder, "{\"a\": \"1.safetensors\", \"b\": \"1.safetensors\"}");
    refused_conversion(&o, MOE_ERR_FORMAT, "b: ");
    write_index(folder, "{\"a\": \"3.safetensors\"}");
    refused_conversion(&o, MOE_ERR_IO, "3.safetensors");
    write_index(folder, "{\"a\": 7}");
    refused_conversion(&o, MOE_ERR_FORMAT, "weight_map");
    write_index(folder, "[]");
    refused_conversion(&o, MOE_ERR_FORMAT, "weight_map");
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    scratch_write_text(path, "null");
    refused_conversion(&o, MOE_ERR_FORMAT, "object");
}

/* ------------------------------------------------------------------------------- configs -- */

/* S18, M: the config is no object, or says what cannot be, or contradicts the tensors. */
static void lying_configs_are_refused(void)
{
    static const struct {
        const char *config;
        moe_status status;
        const char *says;
    } cases[] = {
        {"null", MOE_ERR_FORMAT, "object"},
        {"\"llama\"", MOE_ERR_FORMAT, "object"},
        {"{\"model_type\": NaN}", MOE_ERR_FORMAT, "JSON"},
        {"{}", MOE_ERR_MODEL, "model_type"},
        {"{\"model_type\": \"gpt9\"}", MOE_ERR_UNSUPPORTED, "gpt9"},
        {"{\"model_type\": 7}", MOE_ERR_UNSUPPORTED, "model_type"},
    };
    static const struct {
        const char *from, *to;
        moe_status status;
        const char *says;
    } edits[] = {
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": 1000000000", MOE_ERR_MODEL,
         "num_hidden_layers"},
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": 0", MOE_ERR_MODEL, "block_count"},
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2", MOE_ERR_MODEL, "model.layers.1."},
        {"\"num_hidden_layers\": 1", "\"num_hidden_layers\": \"1\"", MOE_ERR_MODEL,
         "num_hidden_layers"},
        {"\"num_attention_heads\": 2", "\"num_attention_heads\": 0", MOE_ERR_MODEL,
         "num_attention_heads"},
        {"\"num_attention_heads\": 2", "\"num_attention_heads\": 3", MOE_ERR_MODEL,
         "num_attention_heads"},
        {"\"hidden_size\": 4", "\"hidden_size\": 8", MOE_ERR_MODEL, "expected shape"},
        {"\"hidden_size\": 4", "\"hidden_size\": -4", MOE_ERR_MODEL, "hidden_size"},
        {"\"hidden_size\": 4", "\"hidden_size\": 4.5", MOE_ERR_MODEL, "hidden_size"},
        {"\"intermediate_size\": 4", "\"intermediate_size\": 5", MOE_ERR_MODEL, "gate_proj"},
        {"\"vocab_size\": 8", "\"vocab_size\": 9", MOE_ERR_MODEL, "vocab_size"},
        {"1e-5", "\"small\"", MOE_ERR_MODEL, "rms_norm_eps"},
        {"1e-5", "7", MOE_ERR_MODEL, "rms_norm_eps"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"magic\"}", MOE_ERR_UNSUPPORTED,
         "magic"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", MOE_ERR_MODEL,
         "factor"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8}",
         MOE_ERR_MODEL, "low_freq_factor"},
        {"\"rope_scaling\": null", "\"hidden_act\": \"relu\"", MOE_ERR_UNSUPPORTED, "relu"},
        {"\"model_type\": \"llama\"", "\"model_type\": \"mistral\", \"sliding_window\": -1",
         MOE_ERR_MODEL, "sliding_window"},
        {"\"model_type\": \"llama\"",
         "\"model_type\": \"qwen3\", \"use_sliding_window\": true, \"sliding_window\": 3, "
         "\"layer_types\": [\"sliding_attention\", \"chunked_attention\"]", MOE_ERR_UNSUPPORTED,
         "chunked_attention"},
        {"\"model_type\": \"llama\"",
         "\"model_type\": \"glm4_moe_lite\", \"mlp_layer_types\": [\"dense\", \"dense\"]",
         MOE_ERR_MODEL, "mlp_layer_types"},
        {"\"rope_scaling\": null",
         "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2, \"truncate\": 1}", MOE_ERR_MODEL,
         "truncate"},
        {"\"rope_scaling\": null", "\"num_local_experts\": 4, \"num_experts_per_tok\": 9",
         MOE_ERR_MODEL, "num_experts_per_tok"},
        {"\"rope_scaling\": null", "\"num_local_experts\": 4, \"num_experts_per_tok\": 2",
         MOE_ERR_MODEL, "block_sparse_moe"},
        {"\"rope_scaling\": null", "\"quantization_config\": {\"quant_method\": \"gptq\"}",
         MOE_ERR_UNSUPPORTED, "gptq"},
        {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", MOE_ERR_MODEL,
         "lm_head.weight"},
        {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": \"yes\"", MOE_ERR_MODEL,
         "tie_word_embeddings: expected true or false, got yes"},
        {"\"vocab_size\": 8", "\"vocab_size\": [8]", MOE_ERR_MODEL, "vocab_size"},
        {"\"rope_scaling\": null", "\"attention_bias\": true", MOE_ERR_MODEL, "attention_bias"},
        {"\"rope_scaling\": null", "\"mlp_bias\": true", MOE_ERR_MODEL, "mlp_bias"},
        {"\"rope_scaling\": null", "\"mlp_bias\": 0", MOE_ERR_MODEL, "mlp_bias"},
        {"\"rope_scaling\": null", "\"rope_scaling\": \"yarn\"", MOE_ERR_MODEL,
         "rope_scaling: expected an object, got yarn"},
        {"\"rope_scaling\": null", "\"rope_parameters\": []", MOE_ERR_MODEL, "rope_parameters"},
        {"\"rope_scaling\": null", "\"rope_parameters\": {\"full_attention\": 1}", MOE_ERR_MODEL,
         "rope_parameters.full_attention"},
        {"\"rope_scaling\": null", "\"layer_types\": [\"full_attention\", \"full_attention\"]",
         MOE_ERR_MODEL, "layer_types: expected a list with an item for each"},
        {"\"rope_scaling\": null", "\"layer_types\": \"full_attention\"", MOE_ERR_MODEL,
         "layer_types"},
        {"\"rope_scaling\": null", "\"mlp_only_layers\": [1]", MOE_ERR_MODEL, "mlp_only_layers"},
        {"\"rope_scaling\": null", "\"mlp_only_layers\": 0", MOE_ERR_MODEL, "mlp_only_layers"},
        {"\"rope_scaling\": null", "\"decoder_sparse_step\": \"1\"", MOE_ERR_MODEL,
         "decoder_sparse_step"},
        {"\"rope_scaling\": null", "\"sliding_window\": 2.5", MOE_ERR_MODEL, "sliding_window"},
        {"\"model_type\": \"llama\"", "\"model_type\": \"deepseek_v2\", \"topk_method\": \"x\"",
         MOE_ERR_UNSUPPORTED, "topk_method"},
    };
    char folder[600], path[700], config[1500];
    snprintf(folder, sizeof folder, "%s", scratch_path("config"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/config.json", folder);
    const conv_options o = {.source = folder, .out = scratch_path("config.gguf")};
    size_t bytes;
    char *good = test_read_file(path, &bytes);
    REQUIRE(good, "%s", path);
    for (size_t i = 0; i < MOE_COUNT(cases); i++) {
        scratch_write_text(path, cases[i].config);
        refused_conversion(&o, cases[i].status, cases[i].says);
    }
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const char *at = strstr(good, edits[i].from);
        REQUIRE(at, "%s", edits[i].from);
        snprintf(config, sizeof config, "%.*s%s%s", (int)(at - good), good, edits[i].to,
                 at + strlen(edits[i].from));
        scratch_write_text(path, config);
        refused_conversion(&o, edits[i].status, edits[i].says);
    }
    unlink(path);
    refused_conversion(&o, MOE_ERR_IO, "config.json");
    scratch_write_text(path, good); // S19: auto_map is there and does nothing
    moe_error error = {0};
    CHECK(!convert(folder, o.out, NULL, &error), "%s", error.message);
    unlink(o.out);
    free(good);
}

/* A tensor that the model does not have may not be left out. */
/* A copy of a checkpoint of one shard whose config has `to` for the first `from`. */
static const char *edited_checkpoint(const char *name, const char *from, const char *to)
{
    static char folder[600];
    char path[700];
    size_t bytes;
    snprintf(folder, sizeof folder, "%s", scratch_path("edited"));
    mkdir(folder, 0700);
    snprintf(path, sizeof path, "%s/model.safetensors", checkpoint(name));
    char *data = test_read_file(path, &bytes);
    CHECK(data, "%s", path);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    scratch_write(path, data, data ? bytes : 0);
    free(data);
    snprintf(path, sizeof path, "%s/config.json", checkpoint(name));
    char *text = test_read_file(path, &bytes), *at = text ? strstr(text, from) : NULL;
    CHECK(at, "no %s in %s", from, path);
    const size_t room = bytes + strlen(to) + 1;
    char *edited = calloc(1, room);
    if (at && edited)
        snprintf(edited, room, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    snprintf(path, sizeof path, "%s/config.json", folder);
    scratch_write_text(path, edited ? edited : "");
    free(edited);
    free(text);
    return folder;
}

static void configs_that_contradict_the_tensors_are_refused(void)
{
    static const char *const edits[][4] = {
        {"gemma4", "\"attention_k_eq_v\": true", "\"attention_k_eq_v\": false",
         "v_proj.weight: expected this tensor, since config.json says attention_k_eq_v false"},
        {"llama-bias", "\"attention_bias\": true", "\"attention_bias\": false",
         "attention_bias: expected no biases, since this is false, got model.layers.0.self_attn."},
        {"qwen3", "\"attention_bias\": false", "\"attention_bias\": true",
         "attention_bias: expected biases, since this is true, got no tensor"},
        {"gpt-oss-mxfp4", "\"sliding_attention\",", "",
         "layer_types: expected a list with an item for each of num_hidden_layers layers"},
    };
    for (size_t i = 0; i < MOE_COUNT(edits); i++) {
        const conv_options o = {.source = edited_checkpoint(edits[i][0], edits[i][1], edits[i][2]),
                                .out = scratch_path("edited.gguf")};
        refused_conversion(&o, MOE_ERR_MODEL, edits[i][3]);
    }
    const conv_options o = {.source = edited_checkpoint("gemma4", "\"enable_moe_block\": true",
                                                        "\"enable_moe_block\": false"),
                            .out = scratch_path("edited.gguf")};
    refused_conversion(&o, MOE_ERR_UNSUPPORTED, "num_experts");
}

/* The config says that there is one matrix for both ends, but the checkpoint has two: transformers
 * uses both. */
static void an_output_matrix_of_its_own_is_used(void)
{
    moe_error error = {0};
    const char *out = scratch_path("two.gguf");
    size_t bytes;
    const moe_status status =
        convert(edited_checkpoint("llama", "\"tie_word_embeddings\": false",
                                  "\"tie_word_embeddings\": true"), out, "f32", &error);
    CHECK(status == MOE_OK, "%s", error.message);
    char *file = test_read_file(out, &bytes);
    REQUIRE(file, "%s", out);
    bool found = false;
    for (size_t i = 0; i + 14 <= bytes && !found; i++)
        found = !memcmp(file + i, "output.weight", 13) && (!i || file[i - 1] == 0);
    CHECK(found, "the output matrix is left out");
    free(file);
}

static void unused_tensors_are_refused(void)
{
    char folder[600], path[700];
    size_t bytes;
    snprintf(folder, sizeof folder, "%s", scratch_path("unused"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    char *data = test_read_file(path, &bytes);
    REQUIRE(data, "%s", path);
    char *name = strstr(data + 8, "model.norm.weight");
    REQUIRE(name, "name");
    memcpy(name, "model.nom2.weight", 17);
    scratch_write(path, data, bytes);
    const conv_options o = {.source = folder, .out = scratch_path("unused.gguf")};
    refused_conversion(&o, MOE_ERR_MODEL, "model.norm.weight");
    free(data);
}

/* A copy of the gpt-oss checkpoint whose safetensors header has `to` for `from`, of the same
 * length, or whose first byte of a tensor is `value`. */
static void copy_packed(const char *folder, const char *from, const char *to, const char *tensor,
                        uint8_t value)
{
    static const char *const files[] = {"config.json", "model.safetensors"};
    for (size_t i = 0; i < MOE_COUNT(files); i++) {
        char path[700];
        size_t bytes;
        uint64_t header;
        snprintf(path, sizeof path, "%s/%s", checkpoint("gpt-oss-mxfp4"), files[i]);
        char *data = test_read_file(path, &bytes);
        REQUIRE(data, "%s", path);
        memcpy(&header, data, 8);
        for (char *p = data; i && from && (p = strstr(data + 8, from));)
            memcpy(p, to, strlen(to));
        char *entry = i && tensor ? strstr(data + 8, tensor) : NULL;
        CHECK(!i || !tensor || entry, "%s", tensor);
        if (entry)
            data[8 + header + strtoul(strstr(entry, "data_offsets\":[") + 15, NULL, 10)] =
                (char)value;
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        scratch_write(path, data, bytes);
        free(data);
    }
}

static void packed_experts_that_lie_are_refused(void)
{
    char folder[600];
    snprintf(folder, sizeof folder, "%s", scratch_path("packed"));
    mkdir(folder, 0700);
    const conv_options o = {.source = folder, .out = scratch_path("packed.gguf")};
    copy_packed(folder, "up_proj_scales", "up_proj_scalez", NULL, 0);
    refused_conversion(&o, MOE_ERR_MODEL, "gate_up_proj_scales: expected this tensor");
    copy_packed(folder, "up_proj_blocks", "up_proj_blockz", NULL, 0);
    refused_conversion(&o, MOE_ERR_MODEL, "gate_up_proj_blocks: expected this tensor");
    copy_packed(folder, "[4,64,2,16]", "[4,64,16,2]", NULL, 0);
    refused_conversion(&o, MOE_ERR_MODEL,
                       "expected shape [4, 64, 2, 16] by config.json, got [4, 64, 16, 2]");
    copy_packed(folder, "[4,64,2]", "[4,32,4]", NULL, 0);
    refused_conversion(&o, MOE_ERR_MODEL,
                       "expected shape [4, 64, 2] by config.json, got [4, 32, 4]");
    copy_packed(folder, NULL, NULL, "layers.1.mlp.experts.down_proj_scales", 255);
    refused_conversion(&o, MOE_ERR_MODEL,
                       "blk.1.ffn_down_exps.weight: expected finite weights, got an "
                       "exponent of 255 at row 0");
}

/* ------------------------------------------------------------------------- during the work -- */

/* Puts a float into the embedding's row 3, column 1. */
static void poison(const char *folder, float value)
{
    char path[700];
    uint64_t n;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *f = fopen(path, "r+b");
    REQUIRE(f && fread(&n, 8, 1, f) == 1, "%s", path);
    fseek(f, (long)(8 + n + 4 * (3 * 4 + 1)), SEEK_SET);
    fwrite(&value, 4, 1, f);
    fclose(f);
}

static void weights_that_are_not_finite_are_named(void)
{
    char folder[600];
    moe_error error = {0};
    snprintf(folder, sizeof folder, "%s", scratch_path("nan"));
    make_small(folder, 8);
    conv_options o = {.source = folder, .out = scratch_path("nan.gguf"), .n_threads = 1};
    static const char *const types[] = {NULL, "f16", "bf16", "q8_0", "f32"};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        o.quant = types[i];
        poison(folder, NAN);
        refused_conversion(&o, MOE_ERR_MODEL,
                           "token_embd.weight: expected finite weights, got nan at row 3, "
                           "column 1");
        poison(folder, -INFINITY);
        refused_conversion(&o, MOE_ERR_MODEL, "got -inf at row 3, column 1");
    }
    poison(folder, 70000.0f);
    o.quant = "f16";
    refused_conversion(&o, MOE_ERR_MODEL, "BF16");
    o.quant = "bf16";
    CHECK(!convert_with(&o, &error), "%s", error.message);
    poison(folder, NAN);
    o.allow_nonfinite = true;
    o.quant = "f32";
    CHECK(!convert_with(&o, &error), "%s", error.message);
    unlink(o.out);
}

static void a_source_that_changes_is_noticed(void)
{
    char folder[600], path[700];
    snprintf(folder, sizeof folder, "%s", scratch_path("change"));
    make_small(folder, 8);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    const conv_options o = {.source = folder, .out = scratch_path("change.gguf"), .n_threads = 1,
                            .progress = touch_source, .user = path};
    refused_conversion(&o, MOE_ERR_IO, "changed during the conversion");
}

static void nothing_is_left_after_a_failure(void)
{
    char source[500];
    snprintf(source, sizeof source, "%s/fixtures/qwen3.gguf", test_root());
    moe_cancel cancel = {1};
    conv_options o = {.source = source, .out = scratch_path("x.gguf"), .cancel = &cancel};
    refused_conversion(&o, MOE_ERR_CANCELLED, "cancelled");
    o.cancel = NULL;
    struct rlimit old, small = {20000, 20000};
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small.rlim_max = old.rlim_max;
    setrlimit(RLIMIT_FSIZE, &small);
    refused_conversion(&o, MOE_ERR_IO, "x.gguf.partial");
    setrlimit(RLIMIT_FSIZE, &old);
    o.out = scratch_path("no/such/folder.gguf");
    refused_conversion(&o, MOE_ERR_IO, "no such folder");
    o.out = scratch_path("x.bin");
    refused_conversion(&o, MOE_ERR_ARGUMENT, ".gguf");
    o.out = scratch_path("x.gguf");
    o.quant = "q9_k";
    refused_conversion(&o, MOE_ERR_ARGUMENT, "q4_k_m");
    o.quant = NULL;
    o.dry_run = true;
    moe_error error = {0};
    CHECK(!convert_with(&o, &error) && !scratch_exists(o.out), "%s", error.message);
}

/* A whole file that is there stays until the new one is whole. */
static void an_old_file_survives_a_failure(void)
{
    size_t bytes;
    char folder[600];
    snprintf(folder, sizeof folder, "%s", scratch_path("old"));
    make_small(folder, 8);
    poison(folder, NAN);
    const char *out = scratch_path("old.gguf");
    scratch_write_text(out, "precious");
    moe_error error = {0};
    CHECK(convert(folder, out, NULL, &error) == MOE_ERR_MODEL, "%s", error.message);
    char *data = test_read_file(out, &bytes);
    CHECK(data && !strcmp(data, "precious"), "it is gone");
    free(data);
    unlink(out);
}

TEST_PROGRAM(convert)
{
    if (!scratch_begin("convert"))
        return;
    RUN(checkpoints_give_the_logits_of_transformers);
    RUN(quantized_checkpoints_diverge_as_their_bits_say);
    RUN(fp8_codes_have_their_values);
    RUN(draft_layer_is_converted);
    RUN(threads_write_the_same_bytes);
    RUN(blocks_are_those_of_the_encoder);
    RUN(gguf_is_copied_byte_for_byte);
    RUN(gguf_damage_is_refused);
    RUN(mixes_give_more_bits_where_it_pays);
    RUN(rows_that_fit_no_block_fall_back);
    RUN(keep_overrides_the_mix);
    RUN(tokenizer_json_becomes_keys);
    RUN(unknown_patterns_are_refused);
    RUN(tokenizers_that_contradict_the_model_are_refused);
    RUN(sentencepiece_gives_its_ids);
    RUN(sentencepiece_has_added_tokens);
    RUN(lying_sentencepiece_models_are_refused);
    RUN(damaged_sentencepiece_models_are_harmless);
    RUN(lying_headers_are_refused);
    RUN(aliases_are_refused);
    RUN(lying_indexes_are_refused);
    RUN(lying_configs_are_refused);
    RUN(configs_that_contradict_the_tensors_are_refused);
    RUN(an_output_matrix_of_its_own_is_used);
    RUN(unused_tensors_are_refused);
    RUN(packed_experts_that_lie_are_refused);
    RUN(weights_that_are_not_finite_are_named);
    RUN(a_source_that_changes_is_noticed);
    RUN(nothing_is_left_after_a_failure);
    RUN(an_old_file_survives_a_failure);
    scratch_end();
}

#endif
