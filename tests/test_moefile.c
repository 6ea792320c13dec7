/* tests/test_moefile.c - .moe files: what goes in comes out again, for every type; the same logits
 * as from GGUF, however the file is opened; damage and lies are found; a killed conversion goes on.
 *
 * Everything is written into a folder of its own below $TMPDIR, which is removed at the end. */

#include "test.h"

#if defined MOE_NO_TEXT || defined MOE_NO_ZSTD
TEST_PROGRAM(moefile)
{
}
#else

#include "converter.h"
#include "fenced_backend.h"
#include "gguf_walk.h"
#include "scratch.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ------------------------------------------------------------------------------- helpers -- */

static bool convert_as(const char *source, const char *out, conv_store store)
{
    moe_error error = {0};
    const conv_options o = {.source = source, .out = out, .store = store, .n_threads = 2};
    const moe_status status = convert_with(&o, &error);
    CHECK(!status, "%s -> %s: %s", source, out, error.message);
    return !status;
}

static bool same_files(const char *a, const char *b)
{
    size_t n = 0, m = 0;
    char *x = test_read_file(a, &n), *y = test_read_file(b, &m);
    const bool same = x && y && n == m && !memcmp(x, y, n);
    free(x);
    free(y);
    return same;
}

/* --------------------------------------------------------------------------------- hashes -- */

static void xxh64_is_the_public_one(void)
{
    static const struct { const char *text; uint64_t hash; } known[] = {
        {"", 0xef46db3751d8e999u}, {"a", 0xd24ec4f1a98c6e5bu}, {"abc", 0x44bc2cf5ad770999u},
        {"Nobody inspects the spammish repetition", 0xfbcea83c8a378bf1u}};
    uint8_t data[300];
    for (size_t i = 0; i < MOE_COUNT(known); i++)
        CHECK(xxh64(known[i].text, strlen(known[i].text)) == known[i].hash, "\"%s\"",
              known[i].text);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)test_random();
    for (size_t cut = 0; cut < sizeof data; cut += 7) { // the state does not depend on the calls
        xxh64_state s;
        xxh64_begin(&s);
        xxh64_add(&s, data, cut);
        xxh64_add(&s, data + cut, sizeof data - cut);
        CHECK(xxh64_end(&s) == xxh64(data, sizeof data), "cut at %zu", cut);
    }
}

static void sha256_is_the_public_one(void)
{
    static const struct { const char *text, *hash; } known[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"}};
    for (size_t i = 0; i < MOE_COUNT(known); i++) {
        char digits[64];
        sha256 s;
        sha256_begin(&s);
        for (const char *p = known[i].text; *p; p++)
            sha256_add(&s, p, 1);
        sha256_end(&s, digits);
        CHECK(!memcmp(digits, known[i].hash, 64), "\"%s\": %.64s", known[i].text, digits);
    }
    // the processor's own instructions and plain C, in pieces of all lengths
    uint8_t data[1000];
    char once[64], pieces[64];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)test_random();
    for (size_t piece = 1; piece < 300; piece += 7) {
        sha256 a, b;
        sha256_begin(&a);
        sha256_begin(&b);
        b.blocks = sha256_blocks_c;
        sha256_add(&a, data, sizeof data);
        for (size_t at = 0; at < sizeof data; at += piece)
            sha256_add(&b, data + at, MOE_MIN(piece, sizeof data - at));
        sha256_end(&a, once);
        sha256_end(&b, pieces);
        CHECK(!memcmp(once, pieces, 64), "pieces of %zu: %.64s, %.64s", piece, once, pieces);
    }
}

enum { STEP_ROW = 1024, STEP_FILE = 6 * HASH_LEAD };

/* Two files, of which the second is encoded first, by a tensor each. */
typedef struct step_source {
    moe_mem mem;
    conv_source source;
    conv_file files[2];
    conv_input inputs[2];
    conv_tensor tensors[2];
    char digits[2][64 + sizeof(uint64_t)], expected[2][64];
} step_source;

static bool step_open(step_source *s, source_hasher *h)
{
    const char *paths[2] = {scratch_path("step0"), scratch_path("step1")};
    uint8_t *data = malloc(STEP_FILE);
    moe_error error = {0};
    *s = (step_source){.source = {.mem = &s->mem, .files = s->files}};
    mem_init(&s->mem, NULL, 0);
    s->source.arena.mem = &s->mem;
    bool ok = data != NULL;
    for (int i = 0; i < 2 && ok; i++) {
        conv_file *file;
        sha256 state;
        memset(data, 'a' + i, STEP_FILE);
        scratch_write(paths[i], data, STEP_FILE);
        sha256_begin(&state);
        sha256_add(&state, data, STEP_FILE);
        sha256_end(&state, s->expected[i]);
        ok = !conv_file_open(&s->source, paths[i], &file, &error);
        s->inputs[i] = (conv_input){.file = file, .type = &quant_f32};
        s->tensors[i] = (conv_tensor){.inputs = &s->inputs[i], .n_inputs = 1, .row_len = STEP_ROW};
    }
    free(data);
    return ok && !hasher_init(h, &s->source, &error) && hasher_expect(h, &s->tensors[1]) == 0 &&
           hasher_expect(h, &s->tensors[0]) == STEP_FILE;
}

static void step_close(step_source *s, source_hasher *h)
{
    hasher_close(h);
    for (uint32_t i = 0; i < s->source.n_files; i++)
        plat_close(&s->files[i].os);
    arena_free(&s->source.arena);
}

static uint64_t step_hashed(source_hasher *h)
{
    plat_mutex_lock(&h->lock);
    const uint64_t n = h->hashed;
    plat_mutex_unlock(&h->lock);
    return n;
}

/* Neither is far ahead of the other, so that what one reads from a drive the other finds in the
 * page cache. */
static void hash_and_encoders_keep_in_step(void)
{
    static step_source s;
    source_hasher h;
    const uint64_t row_bytes = STEP_ROW * sizeof(float), three = 3 * HASH_LEAD / row_bytes;
    for (int failed = 0; failed < 2; failed++) {
        REQUIRE(step_open(&s, &h), "no files");
        hasher_start(&h, s.digits[0], NULL);
        while (step_hashed(&h) <= HASH_LEAD)
            plat_yield();
        usleep(3000);
        CHECK(step_hashed(&h) <= HASH_LEAD + HASH_PIECE, "the hash has gone ahead: %llu",
              (unsigned long long)step_hashed(&h));
        hasher_follow(&h, 0, &s.tensors[1], three);
        CHECK(step_hashed(&h) >= 2 * HASH_LEAD, "the encoders have gone ahead");
        usleep(3000);
        CHECK(step_hashed(&h) <= 4 * HASH_LEAD + HASH_PIECE, "the hash has gone ahead");
        hasher_follow(&h, STEP_FILE, &s.tensors[0], three); // the other file, past the rest of this
        CHECK(step_hashed(&h) >= STEP_FILE + 2 * HASH_LEAD, "the encoders have gone ahead");
        const moe_status status = hasher_finish(&h, failed, NULL);
        CHECK(status == (failed ? MOE_ERR_CANCELLED : MOE_OK), "%s", moe_status_name(status));
        for (int i = 0; i < 2 && !failed; i++)
            CHECK(!memcmp(s.digits[i], s.expected[i], 64), "file %d", i);
        hasher_follow(&h, 9 * STEP_FILE, &s.tensors[0], three); // there is nothing to wait for
        step_close(&s, &h);
    }
}

/* ------------------------------------------------------------------------------ transcode -- */

/* Fields are what a block consists of. */
static void fields_cover_the_block(void)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        uint32_t sum = 0;
        for (size_t k = 0; k < QUANT_MAX_FIELDS && quant_table[i]->fields[k]; k++)
            sum += quant_table[i]->fields[k];
        CHECK(sum == quant_table[i]->block_bytes, "%s: %u of %u bytes", quant_table[i]->name, sum,
              quant_table[i]->block_bytes);
    }
}

/* Code k of a block of 5-bit codes, by the layout of its type. */
static unsigned fifth_code(const moe_quant *type, const uint8_t *block, size_t k)
{
    if (type->block_len == 32) {
        const uint8_t *qh = block + type->block_bytes - 20, *q = block + type->block_bytes - 16;
        return (q[k % 16] >> k / 16 * 4 & 15u) | (qh[k / 8] >> k % 8 & 1u) << 4;
    }
    const uint8_t *qh = block + 16, *q = block + 48;
    return (q[k / 64 * 32 + k % 32] >> k / 32 % 2 * 4 & 15u) | (qh[k % 32] >> k / 32 & 1u) << 4;
}

/* Planes hold codes of 5 bits rotated by one to the right, and nothing else is changed. */
static void codes_are_rotated(void)
{
    enum { N = 7, MOST = 256 };
    uint8_t blocks[N * MOST], rotated[N * MOST];
    uint32_t seed = 1, n_types = 0;
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *type = quant_table[i];
        if (!type->rotate)
            continue;
        n_types++;
        const size_t size = type->block_bytes, codes = type->block_len * 5 / 8;
        for (size_t k = 0; k < N * size; k++)
            blocks[k] = rotated[k] = (uint8_t)((seed = seed * 1664525 + 1013904223) >> 24);
        type->rotate(rotated, N, false);
        for (size_t b = 0; b < N; b++) {
            const uint8_t *was = blocks + b * size, *is = rotated + b * size;
            size_t n_wrong = 0;
            for (size_t k = 0; k < type->block_len; k++) {
                const unsigned code = fifth_code(type, was, k);
                n_wrong += fifth_code(type, is, k) != (code >> 1 | (code & 1) << 4);
            }
            CHECK(!n_wrong, "%s: %zu codes of block %zu", type->name, n_wrong, b);
            CHECK(!memcmp(was, is, size - codes), "%s: scales of block %zu", type->name, b);
        }
        type->rotate(rotated, N, true);
        CHECK(!memcmp(rotated, blocks, N * size), "%s: not back as it was", type->name);
    }
    CHECK(n_types == 3, "%u types", n_types);
}

/* A GGUF file with a tensor of each of GGUF's types, of weights that look like weights, and a key
 * of each kind. */
static void write_all_types(const char *path, uint32_t alignment)
{
    enum { ROW = 512, ROWS = 24, FLOATS = ROW * ROWS };
    static float x[FLOATS];
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    text_buf file = {.mem = &mem}, keys = {.mem = &mem};
    uint64_t n_keys = 0, unused = 0, at = 0, n_tensors = 0;
    meta_writer k = {&keys, &n_keys, false}, w = {&file, &unused, false};
    meta_put_string(&k, "general.architecture", "none");
    meta_put_u32(&k, "general.alignment", alignment);
    meta_put_f32(&k, "a.float", 0.1f);
    meta_put_bool(&k, "a.bool", true);
    meta_put_array(&k, "some.strings", META_STRING, 2);
    meta_text(&k, "one", 3);
    meta_text(&k, "", 0);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        n_tensors += quant_table[i]->id < QUANT_OWN_ID;
    meta_bytes(&w, "GGUF", 4);
    meta_number(&w, 3, 4);
    meta_number(&w, n_tensors, 8);
    meta_number(&w, n_keys, 8);
    meta_bytes(&w, keys.data, keys.n);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *type = quant_table[i];
        if (type->id >= QUANT_OWN_ID)
            continue;
        meta_text(&w, type->name, strlen(type->name));
        meta_number(&w, 2, 4);
        meta_number(&w, ROW, 8);
        meta_number(&w, ROWS, 8);
        meta_number(&w, type->id, 4);
        meta_number(&w, at, 8);
        at = align_up(at + FLOATS / type->block_len * type->block_bytes, alignment);
    }
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++) {
        const moe_quant *type = quant_table[i];
        static uint8_t blocks[FLOATS * 4];
        if (type->id >= QUANT_OWN_ID)
            continue;
        for (size_t j = 0; j < FLOATS; j++)
            x[j] = (test_random_float() + test_random_float() + test_random_float()) * 0.02f;
        type->quantize(x, blocks, FLOATS);
        while (file.n % alignment)
            meta_number(&w, 0, 1);
        meta_bytes(&w, blocks, FLOATS / type->block_len * type->block_bytes);
    }
    while (file.n % alignment)
        meta_number(&w, 0, 1);
    scratch_write(path, file.data, file.n);
    buf_free(&file);
    buf_free(&keys);
}

static void every_type_comes_back_from_moe(void)
{
    static const conv_store stores[] = {CONV_STORE_AUTO, CONV_STORE_RAW, CONV_STORE_ZSTD};
    const char *gguf = scratch_path("types.gguf"), *moe = scratch_path("types.moe");
    const char *again = scratch_path("again.moe"), *back = scratch_path("back.gguf");
    for (uint32_t alignment = 32; alignment <= 256; alignment *= 8) {
        write_all_types(gguf, alignment);
        for (size_t i = 0; i < MOE_COUNT(stores); i++) {
            if (!convert_as(gguf, moe, stores[i]) || !convert_as(moe, back, CONV_STORE_AUTO))
                return;
            CHECK(same_files(gguf, back), "store %d, alignment %u", stores[i], alignment);
            // from one way of storing to another and back
            CHECK(convert_as(moe, again, stores[(i + 1) % 3]) &&
                  convert_as(again, back, CONV_STORE_AUTO) && same_files(gguf, back),
                  "through two .moe files, %d", stores[i]);
        }
    }
}

/* Bytes that a Huffman code is tried with: n of them, by kind. */
static void literals_fill(uint8_t *x, size_t n, int kind)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t r = test_random(), q = test_random();
        switch (kind) {
        case 0: x[i] = 7; break;
        case 1: x[i] = r & 1 ? 255 : 0; break;
        case 2: x[i] = (uint8_t)(r % 7 ? 9 : 200 + r % 3); break;
        case 3: x[i] = (uint8_t)__builtin_ctz(r | 1u << 31); break; // longer codes than are allowed
        case 4: x[i] = (uint8_t)(r % 251 * (q % 1000) / 1000); break;
        case 5: x[i] = (uint8_t)(r % 13 * 16 + q % 13); break; // even, but not all
        case 6: x[i] = (uint8_t)((r & 255) + (r >> 8 & 255) + (q & 255)); break;
        case 7: x[i] = (uint8_t)(r % 9 + 120); break;
        default: x[i] = (uint8_t)r;
        }
    }
}

/* What the best code of whole bits cannot be better than, in bytes. */
static double literals_entropy(const uint8_t *x, size_t n)
{
    size_t counts[256] = {0};
    double bits = 0;
    for (size_t i = 0; i < n; i++)
        counts[x[i]]++;
    for (size_t i = 0; i < 256; i++)
        bits -= counts[i] ? (double)counts[i] * log2((double)counts[i] / (double)n) : 0;
    return bits / 8;
}

/* Blocks of literals, of any length and distribution, are read by zstd, and are about as short as
 * codes of whole bits can be; those of a second block like the first have no tree. */
static void literals_are_read_by_zstd(void)
{
    static const size_t sizes[] = {1, 2, 15, 16, 17, 100, 257, 1000, 1023, 1024, 1025, 5000, 16383,
                                   16384, 40001, LIT_BLOCK_BYTES - 1, LIT_BLOCK_BYTES};
    // the most that whole bits, and 11 of them, cost of the entropy, by kind
    static const double spare[] = {0, 1, 1.55, 1.02, 1.02, 1.02, 1.02, 1.04, 1};
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    planes_packer *p = planes_open(&mem);
    uint8_t *x = mem_alloc(&mem, 2, LIT_BLOCK_BYTES), *y = mem_alloc(&mem, 2, LIT_BLOCK_BYTES);
    REQUIRE(p && x && y && buf_reserve(&p->out, 3 * LIT_BLOCK_BYTES), "no memory");
    for (int kind = 0; kind < (int)MOE_COUNT(spare); kind++)
        for (size_t i = 0; i < MOE_COUNT(sizes); i++) {
            const size_t n = sizes[i];
            literals_fill(x, 2 * n, kind);
            p->out.n = 0;
            planes_begin_frame(p);
            planes_add_literals(p, x, n);
            const size_t first = p->out.n;
            planes_add_literals(p, x + n, n);
            const size_t second = p->out.n - first;
            planes_end_frame(p);
            memset(y, 0xee, 2 * n);
            CHECK(ZSTD_decompress(y, 2 * n, p->out.data, p->out.n) == 2 * n && !memcmp(x, y, 2 * n),
                  "kind %d, %zu bytes", kind, n);
            const double least = literals_entropy(x, n);
            const double most = least * spare[kind] + 3 + 5 + 6 + 4 + 1;
            CHECK((double)second <= (double)n + 3 && (kind || second == 4), "kind %d, %zu: %zu",
                  kind, n, second);
            if (n >= 5000)
                CHECK((double)(first - PLANES_FRAME_HEAD) <= most + 128 &&
                          (kind == 4 || kind == 6 || (double)second <= most * 1.01),
                      "kind %d, %zu: %zu and %zu bytes, entropy %.0f", kind, n, first, second,
                      least);
        }
    planes_close(p);
    mem_free(&mem, x);
    mem_free(&mem, y);
}

/* No code of at most so many bits is better: weights of all lengths that fill a tree, against all
 * counts of few symbols. */
static void lengths_are_the_best(void)
{
    for (int round = 0; round < 300; round++) {
        enum { N = 5, BITS = 3 };
        lit_item items[N];
        uint8_t bits[256], least[N] = {1, 1, 1, 1, 1}, k = 0;
        uint64_t got = 0, best = UINT64_MAX;
        for (size_t i = 0; i < N; i++)
            items[i] = (lit_item){1 + (test_random() % 64 >> test_random() % 7), (uint8_t)i};
        qsort(items, N, sizeof *items, lit_compare);
        lit_lengths(items, N, BITS, bits);
        unsigned kraft = 0;
        for (size_t i = 0; i < N; i++) {
            got += (uint64_t)items[i].count * bits[items[i].symbol];
            kraft += 1u << (BITS - bits[items[i].symbol]);
        }
        CHECK(kraft == 1u << BITS, "round %d: the tree is not full", round);
        while (k < N) { // all lengths
            uint64_t cost = 0;
            unsigned sum = 0;
            for (size_t i = 0; i < N; i++) {
                cost += (uint64_t)items[i].count * least[i];
                sum += 1u << (BITS - least[i]);
            }
            best = sum <= 1u << BITS ? MOE_MIN(best, cost) : best;
            for (k = 0; k < N && ++least[k] > BITS; k++)
                least[k] = 1;
        }
        CHECK(got == best, "round %d: %llu bits, the best are %llu", round,
              (unsigned long long)got, (unsigned long long)best);
    }
}

/* Compression loses nothing and pays, by type, on what looks like weights. */
static void planes_pay(void)
{
    static const struct { const char *type; double at_most; } pays[] = {
        {"BF16", 0.70}, {"F16", 0.88}, {"Q8_0", 0.97}, {"Q4_0", 0.955}, {"Q4_K", 0.975},
        {"MXFP4", 0.956}};
    enum { N = 1 << 18 };
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    float *x = mem_alloc(&mem, N, sizeof *x);
    uint8_t *blocks = mem_alloc(&mem, N, 4), *out = mem_alloc(&mem, N, 4);
    planes_packer *p = planes_open(&mem);
    moefile_decoder d;
    moe_error error = {0};
    REQUIRE(x && blocks && out && p && !moefile_decoder_open(&mem, &d, &error), "no memory");
    for (size_t i = 0; i < N; i++) { // nearly Gaussian
        x[i] = 0;
        for (int k = 0; k < 6; k++)
            x[i] += test_random_float() * 0.02f;
    }
    for (size_t i = 0; i < MOE_COUNT(pays); i++) {
        const moe_quant *type = quant_by_name(pays[i].type);
        const size_t n = MOEFILE_SEGMENT_BYTES / type->block_bytes < N / type->block_len
                             ? MOEFILE_SEGMENT_BYTES / type->block_bytes : N / type->block_len;
        type->quantize(x, blocks, n * type->block_len);
        p->out.n = p->n_segments = 0;
        const moefile_blocks some = {type, n, n};
        CHECK(!planes_pack(p, &some, blocks, "x", &error), "%s", error.message);
        const double ratio = (double)p->out.n / (double)(n * type->block_bytes);
        CHECK(ratio <= pays[i].at_most, "%s: %.4f", type->name, ratio);
        CHECK(!moefile_decode_segment(&d, &some, p->out.data, p->out.n, out, "x", &error) &&
              !memcmp(out, blocks, n * type->block_bytes), "%s: %s", type->name, error.message);
    }
    moefile_decoder_close(&mem, &d);
    planes_close(p);
    mem_free(&mem, x);
    mem_free(&mem, blocks);
    mem_free(&mem, out);
    CHECK(!atomic_load(&mem.used_bytes), "memory is left");
}

/* -------------------------------------------------------------------------------- logits -- */

enum { MOEFILE_TOK = 9 };

typedef struct opening {
    bool copy, verify;
    int source; // 0 path, 1 memory, 2 callback
    const moe_backend *backend;
} opening;

static int moefile_read(void *user, uint64_t offset, void *dst, size_t bytes)
{
    memcpy(dst, (const char *)user + offset, bytes);
    return 0;
}

/* A checksum of the logits of a file; 0, with a failure, if it does not run. */
static uint64_t logits_of(const char *path, opening way)
{
    moe_model *model = NULL;
    moe_session *session = NULL;
    moe_model_options mo;
    moe_session_options so;
    moe_error error = {0};
    static const moe_token tokens[MOEFILE_TOK] = {3, 1, 4, 1, 5, 9, 2, 6, 5};
    size_t bytes = 0;
    char *data = test_read_file(path, &bytes);
    moe_model_options_init(&mo);
    mo.copy = way.copy;
    mo.verify = way.verify;
    mo.backend = way.backend;
    if (way.source == 0) {
        mo.path = path;
    } else if (way.source == 1) {
        mo.data = data;
        mo.data_bytes = bytes;
    } else {
        mo.read = moefile_read;
        mo.read_user = data;
        mo.read_bytes = bytes;
    }
    moe_session_options_init(&so);
    so.n_ctx = 16;
    so.n_threads = 2;
    uint64_t hash = 0;
    moe_status status = moe_model_open(&model, &mo, &error);
    if (!status)
        status = moe_session_open(&session, model, &so, &error);
    if (!status && model) {
        moe_model_info info = {.size = sizeof info};
        moe_model_get_info(model, &info);
        float *logits = malloc((size_t)MOEFILE_TOK * info.n_vocab * sizeof *logits);
        status = moe_session_eval(session, tokens, MOEFILE_TOK, MOEFILE_TOK, logits);
        hash = xxh64(logits, (uint64_t)MOEFILE_TOK * info.n_vocab * sizeof *logits);
        free(logits);
        if (status)
            error = *moe_session_error(session);
    }
    CHECK(!status, "%s: %s", path, error.message);
    moe_session_close(session);
    moe_model_close(model);
    free(data);
    return status ? 0 : hash;
}

static void logits_are_those_of_gguf(void)
{
    static const char *const names[] = {"llama", "gemma3", "olmoe", "qwen3moe", "mixtral-shards",
                                        "deepseek3", "glm4-moe-lite", "lfm2moe"};
    const char *gguf = scratch_path("m.gguf"), *moe = scratch_path("m.moe");
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        REQUIRE(convert_as(checkpoint(names[i]), gguf, CONV_STORE_AUTO), "%s", names[i]);
        const uint64_t want = logits_of(gguf, (opening){0});
        for (conv_store store = CONV_STORE_RAW; store <= CONV_STORE_ZSTD; store++) {
            REQUIRE(convert_as(gguf, moe, store), "%s", names[i]);
            for (int source = 0; source < 3; source++)
                CHECK(logits_of(moe, (opening){.source = source}) == want,
                      "%s, store %d, source %d", names[i], store, source);
            CHECK(logits_of(moe, (opening){.copy = true, .verify = true}) == want, "%s, copy",
                  names[i]);
            CHECK(logits_of(moe, (opening){.backend = fenced_backend()}) == want, "%s, fenced",
                  names[i]);
        }
    }
}

/* Whatever form a family's tensors have in GGUF files. */
static void every_fixture_runs_as_moe(void)
{
    char path[600];
    const char *moe = scratch_path("m.moe");
    int n = 0;
    snprintf(path, sizeof path, "%s/fixtures", test_root());
    DIR *dir = opendir(path);
    REQUIRE(dir, "%s", path);
    for (const struct dirent *e; (e = readdir(dir));) {
        const char *dot = strrchr(e->d_name, '.');
        if (!dot || strcmp(dot, ".gguf"))
            continue;
        snprintf(path, sizeof path, "%s/fixtures/%.200s", test_root(), e->d_name);
        n++;
        if (convert_as(path, moe, CONV_STORE_ZSTD))
            CHECK(logits_of(moe, (opening){0}) == logits_of(path, (opening){0}), "%s", e->d_name);
    }
    closedir(dir);
    CHECK(n > 20, "only %d fixtures", n);
}

/* A checkpoint and its conversion give the same file; also where a tensor is made of the config
 * alone, the divisors of the rotary frequencies. */
static void checkpoints_become_moe(void)
{
    const char *gguf = scratch_path("m.gguf"), *a = scratch_path("a.moe");
    const char *back = scratch_path("back.gguf");
    static const char *const names[] = {"llama-fp8", "qwen3moe-fp8", "qwen35moe-fp8",
                                        "qwen3moe-fused", "qwen3moe-int4", "qwen3moe-nvfp4",
                                        "llama", "gemma4"};
    for (size_t i = 0; i < MOE_COUNT(names); i++) {
        REQUIRE(convert_as(checkpoint(names[i]), gguf, CONV_STORE_AUTO) &&
                convert_as(checkpoint(names[i]), a, CONV_STORE_ZSTD) &&
                convert_as(a, back, CONV_STORE_AUTO), "%s", names[i]);
        CHECK(same_files(gguf, back), "%s", names[i]);
    }
}

/* Experts of one tensor in several types. F16 weights are the same numbers in F32, and both are
 * computed with in the same order: the logits must be the same bits. */
static void experts_have_types_of_their_own(void)
{
    static const conv_keep keeps[] = {
        {"blk.0.ffn_up_exps.weight#[135]$", &quant_f32}, {"ffn_down_exps.weight#0", &quant_f32},
        {"blk.1.ffn_gate_exps.weight#2", &quant_f32}};
    const char *gguf = scratch_path("m.gguf"), *moe = scratch_path("mixed.moe");
    const char *again = scratch_path("again.moe");
    moe_error error = {0};
    conv_options o = {.source = checkpoint("qwen3moe"), .out = gguf, .quant = "f16"};
    REQUIRE(!convert_with(&o, &error), "%s", error.message);
    const uint64_t want = logits_of(gguf, (opening){0});
    for (conv_store store = CONV_STORE_RAW; store <= CONV_STORE_ZSTD; store++) {
        o = (conv_options){.source = gguf, .out = moe, .keeps = keeps, .n_keeps = 3,
                           .store = store};
        REQUIRE(!convert_with(&o, &error), "%s", error.message);
        for (int source = 0; source < 3; source++)
            CHECK(logits_of(moe, (opening){.source = source}) == want, "store %d, source %d", store,
                  source);
        CHECK(logits_of(moe, (opening){.copy = true}) == want, "store %d, copy", store);
        CHECK(logits_of(moe, (opening){.backend = fenced_backend()}) == want, "store %d, fenced",
              store);
        REQUIRE(convert_as(moe, again, store), "again");
        CHECK(logits_of(again, (opening){0}) == want, "types are lost on the way");
    }
    o = (conv_options){.source = moe, .out = scratch_path("x.gguf")};
    CHECK(convert_with(&o, &error) == MOE_ERR_ARGUMENT && strstr(error.message, "one type"), "%s",
          error.message);
    moe_model *model = NULL;
    moe_model_options mo;
    moe_model_options_init(&mo);
    mo.path = moe;
    REQUIRE(!moe_model_open(&model, &mo, &error), "%s", error.message);
    int n_mixed = 0;
    for (size_t i = 0; i < moe_model_tensor_count(model); i++) {
        moe_tensor_info info = {.size = sizeof info};
        n_mixed += !moe_model_tensor(model, i, &info) && !strcmp(info.type, "mixed");
    }
    CHECK(n_mixed >= 3, "%d", n_mixed);
    moe_model_close(model);
}

/* Bytes do not depend on threads; nothing is larger than it must be in memory. */
static void files_and_memory_are_as_promised(void)
{
    static const uint32_t n_threads[3] = {1, 2, 5};
    const char *source = scratch_path("types.gguf");
    write_all_types(source, 32);
    for (int i = 0; i < 3; i++) {
        moe_error error = {0};
        const conv_options o = {.source = source, .out = scratch_path(i ? "t.moe" : "t0.moe"),
                                .n_threads = n_threads[i], .store = CONV_STORE_ZSTD};
        CHECK(!convert_with(&o, &error), "%s", error.message);
        CHECK(same_files(o.out, scratch_path("t0.moe")), "%u threads", n_threads[i]);
    }
    moe_mem mem;
    moe_directory *dir = NULL;
    moe_error error = {0};
    mem_init(&mem, NULL, 0);
    REQUIRE(!directory_open_file(&dir, scratch_path("t0.moe"), &mem, &error), "%s", error.message);
    uint64_t weights = 0;
    for (size_t i = 0; i < directory_n_tensors(dir); i++)
        weights += directory_tensor_at(dir, i)->bytes;
    CHECK(mem.peak_bytes <= weights + (64 << 20), "%llu", (unsigned long long)mem.peak_bytes);
    directory_close(dir);
    CHECK(!mem.used_bytes, "memory is left");
}

/* -------------------------------------------------------------------------------- damage -- */

/* A file in memory, which tests change. */
typedef struct image {
    uint8_t *data;
    size_t bytes;
} image;

static image image_read(const char *path)
{
    image m = {0};
    m.data = (uint8_t *)test_read_file(path, &m.bytes);
    return m;
}

static moe_status image_verify(const image *m, moe_damage_fn *damage, void *user,
                               moe_verify_report *report, moe_error *error)
{
    moe_model_options o;
    moe_model_options_init(&o);
    o.data = m->data;
    o.data_bytes = m->bytes;
    return moe_file_verify(&o, damage, user, report, error);
}

/* Opens it as a directory of tensors, and reads all there is. */
static moe_status image_open(const image *m, moe_error *error)
{
    moe_model_options o;
    moe_mem mem;
    moe_directory *dir = NULL;
    moe_model_options_init(&o);
    mem_init(&mem, NULL, 0);
    uint8_t *exact = malloc(m->bytes ? m->bytes : 1); // a sanitizer sees the byte behind it
    memcpy(exact, m->data, m->bytes);
    o.data = exact;
    o.data_bytes = m->bytes;
    moe_status status = directory_open(&dir, &o, &mem, error);
    if (dir) {
        bool ok;
        gguf_walk(dir, &ok);
        CHECK(ok, "entries are not found by their names");
        directory_close(dir);
    }
    CHECK(!mem.used_bytes, "memory is left");
    CHECK(mem.peak_bytes <= (64u << 20) + 16 * m->bytes, "too much memory");
    free(exact);
    return status;
}

static moefile_header *image_header(const image *m)
{
    return (moefile_header *)(void *)m->data;
}

static size_t image_tables(const image *m)
{
    const moefile_header *h = image_header(m);
    return sizeof *h + (size_t)align_up(h->keys_bytes + h->receipt_bytes + h->tensors_bytes,
                                        MOEFILE_TABLE_ALIGN);
}

static moefile_record *image_record(const image *m, uint32_t i)
{
    return (moefile_record *)(void *)(m->data + image_tables(m)) + i;
}

static moefile_slice *image_slice(const image *m, uint32_t i)
{
    return (moefile_slice *)(void *)image_record(m, image_header(m)->n_records) + i;
}

static uint32_t *image_segment(const image *m, uint32_t i)
{
    return (uint32_t *)(void *)image_slice(m, image_header(m)->n_slices) + i;
}

/* Makes the checksums right again, so that only the lie is wrong. */
static void image_seal(const image *m)
{
    moefile_header *h = image_header(m);
    for (uint32_t i = 0; i < h->n_records; i++) {
        moefile_record *r = image_record(m, i);
        if (r->offset <= m->bytes && r->stored_bytes <= m->bytes - r->offset)
            r->hash = xxh64(m->data + r->offset, r->stored_bytes);
    }
    h->root = moefile_root(h, m->data + sizeof *h);
}

static image make_image(conv_store store)
{
    const char *path = scratch_path("image.moe");
    const char *source = scratch_path("image.gguf");
    if (!convert_as(checkpoint("qwen3moe"), source, CONV_STORE_AUTO) ||
        !convert_as(source, path, store))
        return (image){0};
    return image_read(path);
}

typedef struct damage_found {
    uint32_t n;
    uint64_t offset, bytes;
    char what[160];
} damage_found;

static void on_damage(void *user, const char *what, uint64_t offset, uint64_t bytes)
{
    damage_found *f = user;
    f->n++;
    f->offset = offset;
    f->bytes = bytes;
    snprintf(f->what, sizeof f->what, "%s", what);
}

/* Opens the image as a model, with all checks. */
static moe_status image_open_verified(const image *m, moe_error *error)
{
    moe_model_options o;
    moe_model *model = NULL;
    moe_model_options_init(&o);
    o.data = m->data;
    o.data_bytes = m->bytes;
    o.verify = true;
    const moe_status status = moe_model_open(&model, &o, error);
    moe_model_close(model);
    return status;
}

/* Turns one bit over, has it found by both ways to look for it, and turns it back. */
static void flip_is_found(const image *m, size_t at, uint8_t bit)
{
    const moefile_header h = *image_header(m);
    const size_t front = sizeof h + (size_t)h.directory_bytes;
    moe_error error = {0};
    moe_verify_report report = {.size = sizeof report};
    damage_found f = {0};
    m->data[at] ^= bit;
    const moe_status status = image_verify(m, on_damage, &f, &report, &error);
    CHECK(status == MOE_ERR_FORMAT || (status == MOE_ERR_UNSUPPORTED && at < 24),
          "byte %zu, bit %u: %s", at, bit, moe_status_name(status));
    CHECK(image_open_verified(m, &error), "byte %zu, bit %u: opened", at, bit);
    if (at >= front) {
        CHECK(f.n == 1 && report.n_damaged == 1, "byte %zu: %u parts", at, f.n);
        CHECK(at >= f.offset && at < f.offset + f.bytes + MOEFILE_PAGE,
              "byte %zu is not in %s", at, f.what);
    } else if (at >= sizeof h.magic) {
        CHECK(image_open(m, &error), "byte %zu: the directory was used", at);
    }
    m->data[at] ^= bit;
}

/* Every bit counts: those of the directory, of raw and compressed records, of the padding. */
static void every_flipped_bit_is_found(void)
{
    enum { FLIPS = 1000 };
    image m = make_image(CONV_STORE_ZSTD);
    REQUIRE(m.data, "no image");
    moe_error error = {0};
    moe_verify_report report = {.size = sizeof report};
    CHECK(!image_verify(&m, NULL, NULL, &report, &error), "%s", error.message);
    CHECK(!image_open_verified(&m, &error), "%s", error.message);
    CHECK(report.n_records > 10 && report.file_bytes == m.bytes && !report.n_damaged,
          "%llu records", (unsigned long long)report.n_records);
    const moefile_header h = *image_header(&m);
    const size_t front = sizeof h + (size_t)h.directory_bytes;
    uint32_t n_slice_kind[2] = {0, 0};
    for (uint32_t i = 0; i < h.n_slices; i++)
        n_slice_kind[image_slice(&m, i)->encoding == MOEFILE_PLANES]++;
    CHECK(n_slice_kind[0] && n_slice_kind[1], "%u raw, %u compressed", n_slice_kind[0],
          n_slice_kind[1]);
    for (int i = 0; i < FLIPS; i++) {
        // a third each: anywhere, directory, behind the directory
        const size_t at = i % 3 == 0   ? test_random() % m.bytes
                          : i % 3 == 1 ? test_random() % front
                                       : front + test_random() % (m.bytes - front);
        flip_is_found(&m, at, (uint8_t)(1u << (test_random() & 7)));
    }
    for (size_t end = front, r = 0; r < h.n_records; r++) { // both ends of the zeros in front of it
        const moefile_record record = *image_record(&m, (uint32_t)r);
        if (record.offset > end) {
            flip_is_found(&m, end, 1);
            flip_is_found(&m, (size_t)record.offset - 1, 0x80);
        }
        end = (size_t)(record.offset + record.stored_bytes);
    }
    free(m.data);
}

/* What is decoded at load is checked then; the rest if it is asked for. */
static void damage_is_named_at_load(void)
{
    image m = make_image(CONV_STORE_ZSTD);
    moe_error error = {0};
    moe_model *model = NULL;
    const char *path = scratch_path("damaged.moe");
    int tried = 0;
    REQUIRE(m.data, "no image");
    const moefile_header *h = image_header(&m);
    for (uint32_t i = 0; i < h->n_slices; i++) {
        const moefile_slice s = *image_slice(&m, i);
        uint32_t r = 0;
        while (image_record(&m, r)->first_slice + image_record(&m, r)->n_slices <= i)
            r++;
        uint8_t *byte = m.data + image_record(&m, r)->offset + s.offset + s.stored_bytes / 2;
        *byte ^= 0x10;
        const moe_status status = image_open(&m, &error);
        CHECK(status == (s.encoding == MOEFILE_PLANES ? MOE_ERR_FORMAT : MOE_OK), "slice %u: %s", i,
              moe_status_name(status));
        if (image_record(&m, r)->kind == MOEFILE_EXPERT && !tried++) {
            moe_model_options o;
            scratch_write(path, m.data, m.bytes);
            moe_model_options_init(&o);
            o.path = path;
            o.verify = true;
            CHECK(moe_model_open(&model, &o, &error) == MOE_ERR_FORMAT &&
                  strstr(error.subject, "expert"), "%s", error.message);
        }
        *byte ^= 0x10;
    }
    CHECK(tried, "no experts");
    free(m.data);
}

static void a_file_that_is_cut_is_refused(void)
{
    image m = make_image(CONV_STORE_ZSTD);
    moe_error error = {0};
    REQUIRE(m.data, "no image");
    const size_t whole = m.bytes;
    for (m.bytes = 0; m.bytes < whole; m.bytes += m.bytes < 200 ? 1 : 997) {
        const moe_status status = image_open(&m, &error);
        CHECK(status == MOE_ERR_FORMAT && error.message[0], "%zu bytes: %s", m.bytes,
              moe_status_name(status));
    }
    free(m.data);
}

/* A number of the directory that is changed to a lie, all checksums right. */
typedef enum lie_place {
    IN_HEADER, IN_RECORD, IN_SLICE, IN_SEGMENT,
    IN_EXPERT, // the first record of an expert
    IN_DOWN,   // its third slice
    IN_RAW,    // the first raw slice
    IN_PLANES  // the first compressed one
} lie_place;

#define LIE(place, index, type, field, lie)                                                        \
    {#place ": " #field " = " #lie, place, index, offsetof(type, field),                           \
     sizeof(((type *)0)->field), (uint64_t)(lie)}
#define HEADER_LIE(field, lie) LIE(IN_HEADER, 0, moefile_header, field, lie)
#define RECORD_LIE(index, field, lie) LIE(IN_RECORD, index, moefile_record, field, lie)
#define SLICE_LIE(place, index, field, lie) LIE(place, index, moefile_slice, field, lie)

static const struct {
    const char *name;
    lie_place place;
    uint32_t index;
    size_t offset, bytes;
    uint64_t value;
} lies[] = {
    HEADER_LIE(magic, 0x0a1a0a0d454e4f89), HEADER_LIE(major, 2), HEADER_LIE(major, 0),
    HEADER_LIE(features, 1u << 31), HEADER_LIE(features, 3), HEADER_LIE(features, 1),
    HEADER_LIE(header_bytes, 64), HEADER_LIE(file_bytes, 1000),
    HEADER_LIE(directory_bytes, UINT64_MAX), HEADER_LIE(directory_bytes, 1000),
    HEADER_LIE(n_keys, UINT32_MAX), HEADER_LIE(n_keys, 0), HEADER_LIE(n_receipt, UINT32_MAX),
    HEADER_LIE(n_tensors, UINT32_MAX), HEADER_LIE(n_tensors, 1), HEADER_LIE(n_records, UINT32_MAX),
    HEADER_LIE(n_records, 0), HEADER_LIE(n_slices, UINT32_MAX), HEADER_LIE(n_slices, 0),
    HEADER_LIE(n_segments, UINT32_MAX), HEADER_LIE(keys_bytes, UINT64_MAX),
    HEADER_LIE(keys_bytes, 8), HEADER_LIE(receipt_bytes, UINT64_MAX - 1000),
    HEADER_LIE(tensors_bytes, 0), HEADER_LIE(data_offset, 0), HEADER_LIE(data_offset, 4097),
    HEADER_LIE(data_offset, 1ull << 63), HEADER_LIE(reserved, 1),
    RECORD_LIE(0, kind, 7), RECORD_LIE(0, offset, 0), RECORD_LIE(1, offset, 4096),
    RECORD_LIE(0, offset, UINT64_MAX), RECORD_LIE(2, stored_bytes, UINT64_MAX),
    RECORD_LIE(2, stored_bytes, 0), RECORD_LIE(0, first_slice, 1), RECORD_LIE(0, n_slices, 0),
    RECORD_LIE(0, n_slices, UINT32_MAX), RECORD_LIE(1, decoded_bytes, 1),
    LIE(IN_EXPERT, 0, moefile_record, expert, 99),
    SLICE_LIE(IN_SLICE, 0, tensor, 999999), SLICE_LIE(IN_SLICE, 0, tensor, 1),
    SLICE_LIE(IN_SLICE, 0, part, 1), SLICE_LIE(IN_SLICE, 0, type, 999),
    SLICE_LIE(IN_SLICE, 0, type, 4098),
    SLICE_LIE(IN_SLICE, 0, layout, 1), SLICE_LIE(IN_SLICE, 0, encoding, 2),
    SLICE_LIE(IN_SLICE, 0, offset, 64), SLICE_LIE(IN_SLICE, 0, stored_bytes, 1),
    SLICE_LIE(IN_SLICE, 0, stored_bytes, UINT64_MAX), SLICE_LIE(IN_SLICE, 0, first_segment, 1),
    SLICE_LIE(IN_DOWN, 0, offset, 0), SLICE_LIE(IN_DOWN, 0, part, 3),
    SLICE_LIE(IN_DOWN, 0, type, 2), SLICE_LIE(IN_RAW, 0, encoding, 1),
    SLICE_LIE(IN_RAW, 0, segment_blocks, 5), SLICE_LIE(IN_PLANES, 0, encoding, 0),
    SLICE_LIE(IN_PLANES, 0, segment_blocks, 0), SLICE_LIE(IN_PLANES, 0, segment_blocks, 1),
    SLICE_LIE(IN_PLANES, 0, segment_blocks, 1 << 20), SLICE_LIE(IN_PLANES, 0, stored_bytes, 100),
    SLICE_LIE(IN_PLANES, 0, first_segment, 77),
    {"segment 0: 0", IN_SEGMENT, 0, 0, 4, 0}, {"segment 0: all", IN_SEGMENT, 0, 0, 4, UINT32_MAX},
};

static uint8_t *lie_find(const image *m, lie_place place, uint32_t index)
{
    const moefile_header *h = image_header(m);
    uint32_t r = 0, s = 0;
    while (r + 1 < h->n_records && image_record(m, r)->kind != MOEFILE_EXPERT)
        r++;
    while (s + 1 < h->n_slices &&
           image_slice(m, s)->encoding != (place == IN_RAW ? MOEFILE_RAW : MOEFILE_PLANES))
        s++;
    switch (place) {
    case IN_HEADER: return m->data;
    case IN_RECORD: return (uint8_t *)image_record(m, index);
    case IN_EXPERT: return (uint8_t *)image_record(m, r);
    case IN_DOWN: return (uint8_t *)image_slice(m, image_record(m, r)->first_slice + 2);
    case IN_SEGMENT: return (uint8_t *)image_segment(m, index);
    case IN_SLICE: return (uint8_t *)image_slice(m, index);
    case IN_RAW:
    case IN_PLANES: break;
    }
    return (uint8_t *)image_slice(m, s);
}

static void directories_that_lie_are_refused(void)
{
    image good = make_image(CONV_STORE_ZSTD);
    REQUIRE(good.data, "no image");
    const uint64_t directory_bytes = image_header(&good)->directory_bytes;
    moe_error error = {0};
    image m = {malloc(good.bytes), good.bytes};
    image_seal(&good);
    CHECK(!image_open(&good, &error), "%s", error.message);
    for (size_t i = 0; i < MOE_COUNT(lies); i++) {
        memcpy(m.data, good.data, good.bytes);
        uint8_t *at = lie_find(&m, lies[i].place, lies[i].index) + lies[i].offset;
        CHECK(memcmp(at, &lies[i].value, MOE_MIN(lies[i].bytes, 8)), "%s: it is no lie",
              lies[i].name);
        memcpy(at, &lies[i].value, MOE_MIN(lies[i].bytes, 8));
        xxh64_state root;
        xxh64_begin(&root);
        xxh64_add(&root, m.data, offsetof(moefile_header, root));
        xxh64_add(&root, m.data + sizeof(moefile_header), directory_bytes);
        image_header(&m)->root = xxh64_end(&root);
        error = (moe_error){0};
        const moe_status status = image_open(&m, &error);
        CHECK(status == MOE_ERR_FORMAT || status == MOE_ERR_UNSUPPORTED || status == MOE_ERR_LIMIT,
              "%s: %s", lies[i].name, moe_status_name(status));
        CHECK(error.message[0] && !strstr(error.message, "checksum"), "%s: %s", lies[i].name,
              error.message);
    }
    free(m.data);
    free(good.data);
}

/* A compressed slice with only one segment, in the last record: its frames can be replaced. */
static bool one_segment_image(image *m, uint8_t **frames)
{
    enum { ROW = 256, ROWS = 4 };
    float x[ROW * ROWS];
    uint8_t blocks[ROW * ROWS * 2];
    moe_mem mem;
    mem_init(&mem, NULL, 0);
    text_buf file = {.mem = &mem};
    uint64_t n = 0;
    meta_writer w = {&file, &n, false};
    meta_bytes(&w, "GGUF", 4);
    meta_number(&w, 3, 4);
    meta_number(&w, 1, 8);
    meta_number(&w, 1, 8);
    meta_put_string(&w, "general.architecture", "none");
    meta_text(&w, "w", 1);
    meta_number(&w, 2, 4);
    meta_number(&w, ROW, 8);
    meta_number(&w, ROWS, 8);
    meta_number(&w, quant_bf16.id, 4);
    meta_number(&w, 0, 8);
    while (file.n % 32)
        meta_number(&w, 0, 1);
    for (size_t i = 0; i < ROW * ROWS; i++)
        x[i] = (test_random_float() + test_random_float()) * 0.02f;
    quant_bf16.quantize(x, blocks, ROW * ROWS);
    meta_bytes(&w, blocks, sizeof blocks);
    scratch_write(scratch_path("one.gguf"), file.data, file.n);
    buf_free(&file);
    if (!convert_as(scratch_path("one.gguf"), scratch_path("one.moe"), CONV_STORE_ZSTD))
        return false;
    *m = image_read(scratch_path("one.moe"));
    *frames = m->data + image_record(m, 0)->offset;
    return m->data && image_header(m)->n_segments == 1;
}

/* Converts `from` to `to`, its tensor "w" to TCQ8; the weights, in the last record, to `data`. */
static bool weights_as(const char *from, const char *to, conv_store store, uint8_t *data, size_t n,
                       moe_error *error)
{
    const conv_keep keep = {"w", &quant_tcq8};
    const conv_options o = {
        .source = from, .out = to, .store = store, .keeps = &keep, .n_keeps = 1};
    if (convert_with(&o, error))
        return false;
    const image m = image_read(to);
    const moefile_record *r = image_record(&m, image_header(&m)->n_records - 1);
    const bool whole = m.bytes == r->offset + r->stored_bytes && r->stored_bytes <= n;
    if (whole)
        memcpy(data, m.data + r->offset, (size_t)r->stored_bytes);
    free(m.data);
    return whole;
}

/* TCQ8's planes have codes without their parities: these come back, row by row, or the rows are
 * refused. */
static void parities_come_back(void)
{
    enum { BYTES = 4 * 256 / TCQ_LEN * sizeof(tcq8_block) };
    const char *raw = scratch_path("raw.moe"), *planes = scratch_path("planes.moe");
    const char *back = scratch_path("back.moe");
    uint8_t data[3][BYTES], *frames = NULL;
    moe_error error = {0};
    image m = {0};
    REQUIRE(one_segment_image(&m, &frames), "no image");
    free(m.data);
    REQUIRE(weights_as(scratch_path("one.gguf"), raw, CONV_STORE_RAW, data[0], BYTES, &error) &&
                weights_as(raw, planes, CONV_STORE_ZSTD, data[1], BYTES, &error) &&
                weights_as(planes, back, CONV_STORE_RAW, data[2], BYTES, &error),
            "%s", error.message);
    CHECK(!memcmp(data[0], data[2], BYTES), "other weights");
    m = image_read(planes);
    const uint32_t blocks = image_slice(&m, 0)->segment_blocks;
    CHECK(image_slice(&m, 0)->encoding == MOEFILE_PLANES && blocks % 4 == 0, "%u", blocks);
    image_slice(&m, 0)->segment_blocks = blocks - 1;
    image_seal(&m);
    CHECK(image_open(&m, &error) == MOE_ERR_FORMAT && strstr(error.message, "whole rows"), "%s",
          error.message);
    free(m.data);
    m = image_read(raw);
    m.data[m.bytes - 1] ^= 1; // another parity, of the last weight
    image_seal(&m);
    scratch_write(raw, m.data, m.bytes);
    free(m.data);
    CHECK(weights_as(raw, back, CONV_STORE_RAW, data[1], BYTES, &error), "%s", error.message);
    CHECK(!weights_as(raw, planes, CONV_STORE_ZSTD, data[1], BYTES, &error) &&
              strstr(error.message, "path of their trellis"), "%s", error.message);
}

/* Replaces the segment, all sizes and checksums right. */
static void replace_segment(image *m, const uint8_t *data, size_t bytes)
{
    const size_t offset = (size_t)image_record(m, 0)->offset;
    m->data = realloc(m->data, offset + bytes);
    m->bytes = offset + bytes;
    memcpy(m->data + offset, data, bytes);
    image_record(m, 0)->stored_bytes = image_slice(m, 0)->stored_bytes = bytes;
    *image_segment(m, 0) = (uint32_t)bytes;
    image_header(m)->file_bytes = m->bytes;
    image_seal(m);
}

/* A frame of n bytes, each `value`, with a parameter of zstd set. */
static size_t make_frame(uint8_t *dst, size_t room, size_t n, int value, ZSTD_cParameter name,
                         int to)
{
    uint8_t *src = malloc(n + 1);
    memset(src, value, n);
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 1);
    ZSTD_CCtx_setParameter(c, name, to);
    const size_t bytes = ZSTD_compress2(c, dst, room, src, n);
    ZSTD_freeCCtx(c);
    free(src);
    CHECK(!ZSTD_isError(bytes), "%s", ZSTD_getErrorName(bytes));
    return bytes;
}

static void frames_that_lie_are_refused(void)
{
    enum { PLANE = 1024, ROOM = 8192 };
    image m = {0};
    uint8_t *frames = NULL, one[ROOM], two[2 * ROOM];
    moe_error error = {0};
    REQUIRE(one_segment_image(&m, &frames), "no image");
    CHECK(!image_open(&m, &error), "%s", error.message);
    const size_t n = make_frame(one, ROOM, PLANE, 'x', ZSTD_c_contentSizeFlag, 1);
    memcpy(two, one, n);
    memcpy(two + n, one, n);
    replace_segment(&m, two, 2 * n); // the control: two frames that are right
    CHECK(!image_open(&m, &error), "%s", error.message);
    const uint8_t skippable[8 + 4] = {0x50, 0x2a, 0x4d, 0x18, 4};
    struct { const char *name; size_t bytes; } cases[16];
    uint8_t *data[16];
    size_t count = 0;
#define CASE(text, length) \
    (cases[count].name = (text), cases[count].bytes = (length), \
     data[count] = malloc((length) + 1), \
     memcpy(data[count], two, (length)), data[count++])
    memcpy(two, one, n);
    uint8_t *p;
    CASE("one frame is missing", n);
    CASE("nothing", 0);
    p = CASE("bytes behind the frames", 2 * n + 3), memset(p + 2 * n, 7, 3);
    p = CASE("a third frame", 3 * n), memcpy(p + 2 * n, one, n);
    p = CASE("a bad checksum", 2 * n), p[n - 1] ^= 1;
    p = CASE("reserved bit", 2 * n), p[4] |= 8;
    p = CASE("not a frame", 2 * n), p[0] ^= 1;
    p = CASE("cut", 2 * n - 1);
    uint8_t other[ROOM];
    size_t k = make_frame(other, ROOM, PLANE + 1, 'x', ZSTD_c_contentSizeFlag, 1);
    p = CASE("a plane too large", n + k), memcpy(p + n, other, k);
    k = make_frame(other, ROOM, PLANE - 1, 'x', ZSTD_c_contentSizeFlag, 1);
    p = CASE("a plane too small", n + k), memcpy(p + n, other, k);
    k = make_frame(other, ROOM, PLANE, 'x', ZSTD_c_contentSizeFlag, 0);
    p = CASE("no size", n + k), memcpy(p + n, other, k);
    k = make_frame(other, ROOM, (size_t)1 << 20, 'x', ZSTD_c_contentSizeFlag, 1);
    p = CASE("a bomb", n + k), memcpy(p + n, other, k);
    p = CASE("a frame to skip", n + sizeof skippable), memcpy(p + n, skippable, sizeof skippable);
    p = CASE("a dictionary", 2 * n + 1); // the flag for one byte, and the byte
    memmove(p + n + 6, p + n + 5, n - 5), p[n + 4] |= 1, p[n + 5] = 1;
#undef CASE
    for (size_t i = 0; i < count; i++) {
        replace_segment(&m, data[i], cases[i].bytes);
        const moe_status status = image_open(&m, &error);
        CHECK(status == MOE_ERR_FORMAT && !strcmp(error.subject, "w"), "%s: %s", cases[i].name,
              moe_status_name(status));
        free(data[i]);
    }
    // more than a file of this size may become
    image_header(&m)->root = 0;
    free(m.data);
}

/* Puts an optional record of an unknown kind behind all others, `gap` bytes further than it has to
 * be. The one before it moves on by `shift` bytes. */
static void add_later_record(image *m, size_t shift, size_t gap)
{
    enum { SIZE = sizeof(moefile_record) };
    const size_t tables = image_tables(m), at = m->bytes + shift + gap, bytes = at + 10;
    uint8_t *data = calloc(1, bytes);
    const moefile_header h = *image_header(m);
    memcpy(data, m->data, tables + SIZE);
    memcpy(data + tables + 2 * SIZE, m->data + tables + SIZE,
           h.n_slices * sizeof(moefile_slice) + h.n_segments * sizeof(uint32_t));
    memcpy(data + h.data_offset + shift, m->data + h.data_offset, m->bytes - h.data_offset);
    memcpy(data + at, "from later", 10);
    free(m->data);
    *m = (image){data, bytes};
    moefile_header *now = image_header(m);
    now->n_records = 2;
    now->directory_bytes += SIZE;
    now->data_offset += shift;
    now->file_bytes = bytes;
    image_record(m, 0)->offset += shift;
    *image_record(m, 1) = (moefile_record){.kind = 77, .flags = MOEFILE_OPTIONAL, .first_slice = 1,
                                           .offset = at, .stored_bytes = 10};
    image_seal(m);
}

/* Optional records of kinds that nobody knows yet are skipped; others are not. A record may be up
 * to a page further than where it could be, at a multiple of 64. */
static void unknown_records_are_skipped_if_they_may(void)
{
    uint8_t *frames = NULL;
    moe_error error = {0};
    for (size_t gap = 0; gap <= MOEFILE_PAGE + 64; gap += 32) {
        image m = {0};
        REQUIRE(one_segment_image(&m, &frames), "no image");
        const size_t least = (size_t)align_up(m.bytes, MOEFILE_SLICE_ALIGN) - m.bytes;
        const bool right = gap % MOEFILE_SLICE_ALIGN == 0 && least + gap < MOEFILE_PAGE;
        add_later_record(&m, MOEFILE_PAGE, least + gap);
        moe_status status = image_open(&m, &error);
        CHECK(status == (right ? MOE_OK : MOE_ERR_FORMAT), "gap %zu: %s", gap, error.message);
        if (right)
            CHECK(!image_verify(&m, NULL, NULL, NULL, &error), "%s", error.message);
        image_record(&m, 1)->flags = 0;
        image_seal(&m);
        status = image_open(&m, &error);
        CHECK(status == (right ? MOE_ERR_UNSUPPORTED : MOE_ERR_FORMAT), "%s", error.message);
        free(m.data);
        if (gap >= 128 && gap < MOEFILE_PAGE - 256)
            gap += MOEFILE_PAGE / 4;
    }
}

/* The first record begins with a page, whatever it holds. */
static void records_begin_with_a_page(void)
{
    uint8_t *frames = NULL;
    moe_error error = {0};
    image m = {0};
    REQUIRE(one_segment_image(&m, &frames), "no image");
    add_later_record(&m, MOEFILE_SLICE_ALIGN, (size_t)align_up(m.bytes, MOEFILE_PAGE) - m.bytes);
    CHECK(image_open(&m, &error) == MOE_ERR_FORMAT && strstr(error.message, "data_offset"), "%s",
          error.message);
    free(m.data);
}

/* ------------------------------------------------------------------------------ going on -- */

typedef struct stopper {
    uint64_t at_percent, first_done;
    moe_cancel cancel;
    bool kill;
} stopper;

static void stop_at(void *user, const conv_progress *p)
{
    stopper *s = user;
    if (!s->first_done)
        s->first_done = p->done;
    if (s->at_percent && p->done * 100 >= p->total * s->at_percent) {
        if (s->kill)
            kill(getpid(), SIGKILL);
        moe_cancel_set(&s->cancel);
    }
}

static void a_killed_conversion_goes_on(void)
{
    const char *source = scratch_path("types.gguf"), *whole = scratch_path("whole.moe");
    const char *out = scratch_path("killed.moe"), *partial = scratch_path("killed.moe.partial");
    write_all_types(source, 32);
    REQUIRE(convert_as(source, whole, CONV_STORE_ZSTD), "the whole");
    for (int round = 0; round < 4; round++) {
        stopper s = {.at_percent = 50, .kill = round < 2};
        moe_error error = {0};
        conv_options o = {.source = source, .out = out, .store = CONV_STORE_ZSTD, .n_threads = 1,
                          .progress = stop_at, .user = &s, .cancel = &s.cancel};
        if (s.kill) {
            const pid_t child = fork();
            if (!child) {
                convert_with(&o, &error);
                _exit(1);
            }
            int state = 0;
            waitpid(child, &state, 0);
            CHECK(WIFSIGNALED(state), "it was not killed");
        } else {
            CHECK(convert_with(&o, &error) == MOE_ERR_CANCELLED, "%s", error.message);
        }
        CHECK(scratch_exists(partial) && !scratch_exists(out), "round %d", round);
        if (round % 2) { // what is damaged meanwhile is made again
            image m = image_read(partial);
            m.data[m.bytes / 5] ^= 4;
            scratch_write(partial, m.data, m.bytes);
            free(m.data);
        }
        s = (stopper){0};
        CHECK(!convert_with(&o, &error), "%s", error.message);
        CHECK(same_files(out, whole) && !scratch_exists(partial), "round %d: other bytes", round);
        uint64_t total = 0;
        stopper fresh = {0};
        o.user = &fresh;
        CHECK(!convert_with(&o, &error), "%s", error.message);
        total = fresh.first_done;
        CHECK(round % 2 || s.first_done > 2 * total, "round %d: %llu weights were made again",
              round, (unsigned long long)s.first_done);
        unlink(out);
    }
}

/* What is left of another conversion is not taken over. */
static void another_conversion_starts_anew(void)
{
    const char *source = scratch_path("types.gguf"), *out = scratch_path("other.moe");
    const char *whole = scratch_path("whole.moe");
    write_all_types(source, 32);
    stopper s = {.at_percent = 50};
    moe_error error = {0};
    conv_options o = {.source = source, .out = out, .n_threads = 1, .progress = stop_at, .user = &s,
                      .cancel = &s.cancel, .store = CONV_STORE_RAW};
    CHECK(convert_with(&o, &error) == MOE_ERR_CANCELLED, "%s", error.message);
    REQUIRE(convert_as(source, out, CONV_STORE_ZSTD) && convert_as(source, whole, CONV_STORE_ZSTD),
            "zstd");
    CHECK(same_files(out, whole), "something of the raw file is in it");
    s.cancel.flag = 0;
    CHECK(convert_with(&o, &error) == MOE_ERR_CANCELLED, "%s", error.message);
    write_all_types(source, 32); // the source is another one now
    REQUIRE(convert_as(source, out, CONV_STORE_RAW) && convert_as(source, whole, CONV_STORE_RAW),
            "raw");
    CHECK(same_files(out, whole), "something of the old source is in it");
}

static void failures_leave_nothing(void)
{
    const char *source = scratch_path("types.gguf"), *out = scratch_path("fail.moe");
    const char *partial = scratch_path("fail.moe.partial");
    write_all_types(source, 32);
    moe_error error = {0};
    conv_options o = {.source = source, .out = out, .n_threads = 2, .store = CONV_STORE_RAW};
    struct rlimit old, small = {20000, 20000};
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small.rlim_max = old.rlim_max;
    setrlimit(RLIMIT_FSIZE, &small);
    CHECK(convert_with(&o, &error) == MOE_ERR_IO && strstr(error.message, "fail.moe.partial"), "%s",
          error.message);
    setrlimit(RLIMIT_FSIZE, &old);
    CHECK(!scratch_exists(out) && !scratch_exists(partial), "something is left");
    o.n_threads = 1; // the first thread reports; of two, the other might do all the work
    o.progress = touch_source;
    o.user = (void *)(uintptr_t)source;
    CHECK(convert_with(&o, &error) == MOE_ERR_IO && strstr(error.message, "was changed"), "%s",
          error.message);
    CHECK(!scratch_exists(out) && !scratch_exists(partial), "something is left");
    o = (conv_options){.source = scratch_path("none.moe"), .out = out};
    write_all_types(o.source, 32); // a GGUF under another name
    CHECK(convert_with(&o, &error) == MOE_ERR_FORMAT, "%s", error.message);
    CHECK(!scratch_exists(out) && !scratch_exists(partial), "something is left");
}

/* The receipt says what the file was made from, and how well. */
static void the_receipt_is_there(void)
{
    const char *source = scratch_path("types.gguf"), *out = scratch_path("receipt.moe");
    write_all_types(source, 32);
    moe_error error = {0};
    const conv_keep keep = {"^(Q5|Q6)", &quant_q8_0};
    const conv_options o = {.source = source, .out = out, .keeps = &keep, .n_keeps = 1};
    REQUIRE(!convert_with(&o, &error), "%s", error.message);
    image m = image_read(source), made = image_read(out);
    char digits[65] = "", got[80];
    sha256 s;
    sha256_begin(&s);
    sha256_add(&s, m.data, m.bytes);
    sha256_end(&s, digits);
    moe_model *model = NULL;
    moe_model_options mo;
    moe_model_options_init(&mo);
    mo.path = out;
    mo.vocab_only = true;
    REQUIRE(!moe_model_open(&model, &mo, &error), "%s", error.message);
    bool there = false;
    for (size_t i = 0; i < moe_model_meta_count(model); i++)
        if (!strcmp(moe_model_meta_key(model, i), "receipt.source.sha256")) {
            moe_model_meta_value(model, i, got, sizeof got);
            there = strstr(got, digits) != NULL;
        }
    CHECK(there, "no hash %s", digits);
    moe_model_close(model);
    double worst = 0;
    for (uint32_t i = 0; i < image_header(&made)->n_slices; i++) {
        const moefile_slice *slice = image_slice(&made, i);
        CHECK(slice->error >= 0 && slice->error < 1e-3f, "slice %u: %g", i, (double)slice->error);
        worst = fmax(worst, (double)slice->error);
    }
    CHECK(worst > 1e-6, "no error was measured");
    free(m.data);
    free(made.data);
}

TEST_PROGRAM(moefile)
{
    if (!scratch_begin("moefile"))
        return;
    RUN(xxh64_is_the_public_one);
    RUN(sha256_is_the_public_one);
    RUN(hash_and_encoders_keep_in_step);
    RUN(fields_cover_the_block);
    RUN(codes_are_rotated);
    RUN(every_type_comes_back_from_moe);
    RUN(literals_are_read_by_zstd);
    RUN(lengths_are_the_best);
    RUN(planes_pay);
    RUN(parities_come_back);
    RUN(logits_are_those_of_gguf);
    RUN(every_fixture_runs_as_moe);
    RUN(checkpoints_become_moe);
    RUN(experts_have_types_of_their_own);
    RUN(files_and_memory_are_as_promised);
    RUN(every_flipped_bit_is_found);
    RUN(damage_is_named_at_load);
    RUN(a_file_that_is_cut_is_refused);
    RUN(directories_that_lie_are_refused);
    RUN(frames_that_lie_are_refused);
    RUN(unknown_records_are_skipped_if_they_may);
    RUN(records_begin_with_a_page);
    RUN(a_killed_conversion_goes_on);
    RUN(another_conversion_starts_anew);
    RUN(failures_leave_nothing);
    RUN(the_receipt_is_there);
    scratch_end();
}
#endif
