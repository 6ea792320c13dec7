/* tests/test_gguf.c - the GGUF loader: valid files load, and each known way to write a bad one (the
 * names g01 to g41) ends in a typed error. What happens to files beside their content is the
 * subject of tests/test_gguf_files.c. */
#include "gguf_make.h"

/* ------------------------------------------------------------------------- valid controls -- */

static void look_valid(const gguf_opened *s)
{
    const moe_tensor *t = directory_tensor(s->dir, "output.weight");
    const moe_meta *m = directory_meta(s->dir, "array.strings");
    REQUIRE(t && m, "missing entries");
    CHECK(directory_n_meta(s->dir) == 15 && directory_n_tensors(s->dir) == 2, "counts");
    CHECK(t->n_dims == 2 && t->dims[0] == 64 && t->dims[1] == 2 && t->dims[2] == 1 &&
              t->dims[3] == 1 && t->n_elements == 128 && t->bytes == 72 && t->file == 0,
          "shape of the tensor");
    CHECK(strcmp(t->quant->name, "Q4_0") == 0, "%s", t->quant->name);
    if (s->options.vocab_only)
        CHECK(!t->data, "data that was not asked for");
    else
        CHECK(t->data && t->data[0] == 65 && t->data[71] == 136, "data of the tensor");
    CHECK(m->n == 3 && str_equal(m->strings[0], "one") && str_equal(m->strings[1], "") &&
              str_equal(m->strings[2], "three"),
          "strings");
    CHECK(!directory_meta(s->dir, "general.name") && !directory_tensor(s->dir, "x"),
          "found what is not there");
    CHECK(directory_meta(s->dir, "array.empty")->n == 0, "empty array");
}

static void valid_v3(void)
{
    gguf_made b = {0};
    put_valid(&b);
    accept_mode(&b, true, look_valid);
    accept(&b, look_valid);
}

static void valid_v2(void)
{
    gguf_made b = {0};
    put_valid(&b);
    b.data[4] = 2;
    accept(&b, look_valid);
}

static void look_aligned(const gguf_opened *s)
{
    const moe_tensor *t = directory_tensor(s->dir, "b");
    REQUIRE(t, "missing tensor");
    CHECK(t->offset % 4096 == 0 && t->data[0] == 1, "offset %llu", (unsigned long long)t->offset);
}

static void valid_big_alignment(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 2, 1);
    put_tensor(&b, "a", 8, 0, 0, 0); // replaced below: the key comes first
    b.n = 24;
    put_key_u32(&b, "general.alignment", 4096);
    put_tensor(&b, "a", 8, 0, 0, 0);
    put_tensor(&b, "b", 8, 0, 0, 4096);
    put_data(&b, 4096, 32);
    put_data(&b, 4096, 32);
    accept(&b, look_aligned);
}

static void valid_small_alignment(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 2, 1);
    put_key_u32(&b, "general.alignment", 8);
    put_tensor(&b, "a", 2, 0, 0, 0);
    put_tensor(&b, "b", 2, 0, 0, 8);
    put_data(&b, 8, 16);
    accept(&b, NULL);
}

static void valid_without_tensors(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "general.architecture", "gpt2");
    accept_mode(&b, true, NULL);
    accept(&b, NULL);
}

static void valid_empty(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 0);
    accept(&b, NULL);
}

/* G36: gaps between tensors, any order, and bytes behind the last are fine. */
static void valid_g36_gaps_and_order(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 3, 0);
    put_tensor(&b, "late", 8, 0, 0, 128);
    put_tensor(&b, "early", 8, 0, 0, 0);
    put_tensor(&b, "middle", 8, 0, 0, 64);
    put_data(&b, 32, 128 + 32 + 77);
    accept(&b, NULL);
}

static void look_numbers(const gguf_opened *s)
{
    uint32_t u = 7, list[3] = {0};
    float f = 0;
    bool flag = false;
    moe_str text = {0};
    moe_error e = {0};
    const moe_directory *d = s->dir;
    CHECK(!meta_u32(d, "n.4", true, 0, 200, &u, &e) && u == 100, "%s", e.message);
    CHECK(!meta_u32(d, "n.11", true, 0, 200, &u, &e) && u == 100, "%s", e.message);
    CHECK(!meta_f32(d, "n.12", true, 0, 200, &f, &e) && f == 100, "%s", e.message);
    CHECK(!meta_f32(d, "n.4", true, 0, 200, &f, &e) && f == 100, "%s", e.message);
    CHECK(!meta_bool(d, "n.7", true, &flag, &e) && flag, "%s", e.message);
    CHECK(!meta_string(d, "text", true, &text, &e) && str_equal(text, "abc"), "%s", e.message);
    CHECK(!meta_u32_list(d, "list", true, 0, 9, list, 3, &e) && list[0] == 3 && list[2] == 5, "%s",
          e.message);
    CHECK(!meta_u32_list(d, "n.4", true, 0, 200, list, 3, &e) && list[2] == 100, "%s", e.message);
}

/* What is missing is left alone, or an error; what is out of range or of another type is an error
 * with the value, and nothing is written. */
static void look_wrong_numbers(const gguf_opened *s)
{
    uint32_t u = 7, list[3] = {77};
    float f = 0;
    bool flag = false;
    moe_str text = {0};
    moe_error e = {0};
    const moe_directory *d = s->dir;
    CHECK(!meta_u32(d, "none", false, 0, 9, &u, &e) && u == 7, "changed");
    CHECK(meta_u32(d, "none", true, 0, 9, &u, &e) == MOE_ERR_MODEL && strstr(e.message, "none"),
          "%s", e.message);
    CHECK(meta_u32(d, "n.4", true, 0, 99, &u, &e) == MOE_ERR_MODEL && u == 7 &&
              strstr(e.message, "0 to 99") && strstr(e.message, "100"),
          "%s", e.message);
    CHECK(meta_u32(d, "negative", true, 0, 99, &u, &e) == MOE_ERR_MODEL && strstr(e.message, "-1"),
          "%s", e.message);
    CHECK(meta_u32(d, "huge", true, 0, UINT32_MAX, &u, &e) == MOE_ERR_MODEL &&
              strstr(e.message, "18446744073709551615"),
          "%s", e.message);
    CHECK(meta_u32(d, "text", true, 0, 99, &u, &e) == MOE_ERR_MODEL && strstr(e.message, "\"abc\""),
          "%s", e.message);
    CHECK(meta_u32(d, "n.6", true, 0, 999, &u, &e) == MOE_ERR_MODEL, "an f32 is no integer");
    CHECK(meta_f32(d, "nan", true, -1e30, 1e30, &f, &e) == MOE_ERR_MODEL &&
              strstr(e.message, "nan"),
          "%s", e.message);
    CHECK(meta_bool(d, "n.4", true, &flag, &e) == MOE_ERR_MODEL, "a u32 is no bool");
    CHECK(meta_string(d, "n.4", true, &text, &e) == MOE_ERR_MODEL, "a u32 is no string");
    CHECK(meta_u32_list(d, "list", true, 0, 9, list, 4, &e) == MOE_ERR_MODEL &&
              strstr(e.message, "at least 4") && strstr(e.message, "got 3"),
          "%s", e.message);
    CHECK(meta_u32_list(d, "list", true, 0, 4, list, 3, &e) == MOE_ERR_MODEL && list[0] == 77, "%s",
          e.message);
}

/* 100 in each type, and what the typed readers make of it. */
static void valid_numbers_of_all_types(void)
{
    gguf_made b = {0};
    float f = 100, nan = NAN;
    double d = 100;
    put_head(&b, 3, 0, 16);
    for (uint32_t type = 0; type < META_N_TYPES; type++) {
        char key[16];
        snprintf(key, sizeof key, "n.%u", type);
        if (type == META_STRING || type == META_ARRAY)
            continue;
        put_key(&b, key, type);
        uint64_t x = type == META_BOOL ? 1 : 100;
        put(&b, type == META_F32 ? (void *)&f : type == META_F64 ? (void *)&d : (void *)&x,
            meta_types[type].bytes);
    }
    put_key_string(&b, "text", "abc");
    put_key(&b, "negative", META_I8);
    put_u8(&b, 0xff);
    put_key(&b, "huge", META_U64);
    put_u64(&b, UINT64_MAX);
    put_key(&b, "nan", META_F32);
    put(&b, &nan, 4);
    put_key_array(&b, "list", META_I16, 3);
    put_u16(&b, 3);
    put_u16(&b, 4);
    put_u16(&b, 5);
    accept_mode(&b, false, look_wrong_numbers);
    accept(&b, look_numbers);
}

static void look_vocabulary(const gguf_opened *s)
{
    const moe_meta *m = directory_meta(s->dir, "tokenizer.ggml.tokens");
    REQUIRE(m && m->n == 200000, "tokens");
    CHECK(str_equal(m->strings[199999], "token 199999"), "last token");
}

/* A header larger than what is read of a file at first. */
static void valid_large_vocabulary(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 1, 1);
    put_key_array(&b, "tokenizer.ggml.tokens", META_STRING, 200000);
    for (int i = 0; i < 200000; i++) {
        char token[32];
        snprintf(token, sizeof token, "token %d", i);
        put_string(&b, token);
    }
    put_tensor(&b, "t", 1, 0, 0, 0);
    put_data(&b, 32, 4);
    CHECK(b.n > 2 * GGUF_WINDOW_BYTES, "%zu bytes", b.n);
    accept(&b, look_vocabulary);
}

static void look_many_tensors(const gguf_opened *s)
{
    char name[32];
    for (int i = 0; i < 70000; i += 777) {
        snprintf(name, sizeof name, "blk.%d.ffn.%d.weight", i / 1000, i % 1000);
        CHECK(directory_tensor(s->dir, name) == directory_tensor_at(s->dir, (size_t)i), "%s", name);
    }
}

/* As many tensors as the largest models have when each expert is one. */
static void valid_many_tensors(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 70000, 0);
    for (int i = 0; i < 70000; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%d.ffn.%d.weight", i / 1000, i % 1000);
        put_tensor(&b, name, 8, 0, 0, 32 * (uint64_t)(69999 - i));
    }
    put_data(&b, 32, 70000 * 32);
    accept(&b, look_many_tensors);
}

static void look_vocab_only(const gguf_opened *s)
{
    const moe_tensor *t = directory_tensor(s->dir, "odd");
    REQUIRE(t, "missing tensor");
    CHECK(!t->quant && !t->data && !t->bytes && t->n_elements == 7, "tensor of unknown type");
}

/* The metadata of a file that was cut off behind its header, with a type from the future. */
static void valid_vocab_only_of_cut_file(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 2, 1);
    put_key_string(&b, "general.architecture", "llama");
    put_tensor(&b, "odd", 7, 0, 9999, 0);
    put_tensor(&b, "weight", 1024, 1024, 0, 32);
    accept_mode(&b, true, look_vocab_only);
    refuse(&b, MOE_ERR_UNSUPPORTED, "odd", "9999");
}

/* ----------------------------------------------------------------------- malformed: header -- */

static void g01_0_to_3_bytes(void)
{
    for (size_t n = 0; n < 4; n++) {
        gguf_made b = {0};
        put(&b, "GGU", n);
        refuse_always(&b, MOE_ERR_FORMAT, "magic", "cut off");
    }
}

static void g02_magic_only(void)
{
    gguf_made b = {0};
    put(&b, "GGUF", 4);
    refuse_always(&b, MOE_ERR_FORMAT, "version", "cut off");
}

static void g03_bad_magic(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 0);
    b.data[0] = 'P';
    refuse_always(&b, MOE_ERR_FORMAT, "magic", "50 47 55 46");
    put(&b, "tjgg", 4);
    put_zeros(&b, 100);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "magic", "predecessors");
}

static void g04_versions(void)
{
    gguf_made b = {0};
    put_head(&b, 0, 0, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "version", "got 0");
    put_head(&b, 1, 0, 0);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "version", "convert it again");
    put_head(&b, 4, 0, 0);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "version", "got 4; a newer version");
}

static void g05_swapped_version(void)
{
    gguf_made b = {0};
    put_head(&b, 0x03000000, 0, 0);
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "version", "big-endian");
}

static void g06_n_kv_huge(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, UINT64_MAX);
    refuse_always(&b, MOE_ERR_FORMAT, "metadata_kv_count", "18446744073709551615");
}

static void g07_n_tensors_huge(void)
{
    gguf_made b = {0};
    put_head(&b, 3, UINT64_MAX / 96 + 2, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor_count", "192153584101141164");
}

static void g08_counts_exceed_bytes(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 5); // 5 keys in the place of 4
    put_zeros(&b, 69);
    refuse_always(&b, MOE_ERR_FORMAT, "metadata_kv_count", "at most 4 keys");
    put_head(&b, 3, 3, 1);
    put_zeros(&b, 14 + 3 * 33 - 1);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor_count", "at most 2 tensors");
}

/* ------------------------------------------------------------------------ malformed: keys -- */

static void put_bad_length(gguf_made *b, int where, uint64_t length)
{
    put_head(b, 3, where == 3, 1);
    if (where == 0) { // a key
        put_u64(b, length);
        put_zeros(b, 40);
    } else if (where == 1) { // a value
        put_key(b, "text", META_STRING);
        put_u64(b, length);
        put_zeros(b, 40);
    } else if (where == 2) { // in an array
        put_key_array(b, "text", META_STRING, 2);
        put_string(b, "ok");
        put_u64(b, length);
        put_zeros(b, 40);
    } else { // a tensor's name
        put_key_u32(b, "number", 1);
        put_u64(b, length);
        put_zeros(b, 40);
    }
}

static const char *const bad_length_subject[] = {"key 0", "text", "text", "tensor 0"};

static void g09_string_length_wraps(void)
{
    for (int where = 0; where < 4; where++) {
        gguf_made b = {0};
        put_bad_length(&b, where, UINT64_MAX);
        refuse_always(&b, MOE_ERR_FORMAT, bad_length_subject[where], "18446744073709551615");
        put_bad_length(&b, where, (uint64_t)1 << 63);
        refuse_always(&b, MOE_ERR_FORMAT, bad_length_subject[where], "9223372036854775808");
    }
}

static void g10_string_length_remaining_plus_1(void)
{
    for (int where = 0; where < 4; where++) {
        gguf_made b = {0};
        put_bad_length(&b, where, 41);
        refuse_always(&b, MOE_ERR_FORMAT, bad_length_subject[where], "expected 41 bytes");
    }
}

static void g11_bad_keys(void)
{
    static const struct {
        const char *key;
        size_t n;
        const char *text;
    } keys[] = {
        {"", 0, "1 to 65535 bytes"}, {"a\0b", 3, "byte 0x00"},     {"\xff", 1, "byte 0xff"},
        {"a\xc0\x80", 3, "0xc0"},    {"\xed\xa0\x80", 3, "0xed"},  {"a\xe2\x82", 3, "byte 0xe2"},
        {"line\n", 5, "byte 0x0a"},  {"\xf4\x90\x80\x80", 4, "0xf4"}, {"\xe0\x9f\xbf", 3, "0xe0"},
    };
    for (size_t i = 0; i < MOE_COUNT(keys); i++) {
        gguf_made b = {0};
        put_head(&b, 3, 0, 2);
        put_key_u32(&b, "good", 1);
        put_u64(&b, keys[i].n);
        put(&b, keys[i].key, keys[i].n);
        put_u32(&b, META_U32);
        put_zeros(&b, 40);
        refuse_always(&b, MOE_ERR_FORMAT, "key 1", keys[i].text);
    }
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_u64(&b, 65536);
    put_zeros(&b, 70000);
    refuse_always(&b, MOE_ERR_FORMAT, "key 0", "got 65536");
}

static void g12_value_type_out_of_range(void)
{
    static const uint32_t types[] = {13, 255, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        gguf_made b = {0};
        put_head(&b, 3, 0, 1);
        put_key(&b, "key", types[i]);
        put_zeros(&b, 16);
        char text[32];
        snprintf(text, sizeof text, "got %u", types[i]);
        refuse_always(&b, MOE_ERR_FORMAT, "key", text);
    }
}

static void g13_bad_array_item_type(void)
{
    static const uint32_t types[] = {13, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        gguf_made b = {0};
        put_head(&b, 3, 0, 1);
        put_key_array(&b, "key", types[i], 1);
        put_zeros(&b, 16);
        char text[32];
        snprintf(text, sizeof text, "got type %u", types[i]);
        refuse_always(&b, MOE_ERR_FORMAT, "key", text);
    }
}

static void g14_array_size_wraps(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_U64, ((uint64_t)1 << 61) + 1); // x 8 = 8
    put_zeros(&b, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "key", "2305843009213693953");
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_STRING, ((uint64_t)1 << 60) + 1); // x sizeof(moe_str) = 16
    put_zeros(&b, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "key", "1152921504606846977");
}

static void g15_nested_arrays(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key(&b, "key", META_ARRAY);
    for (int i = 0; i < 100000; i++) {
        put_u32(&b, META_ARRAY);
        put_u64(&b, 1);
    }
    refuse_always(&b, MOE_ERR_UNSUPPORTED, "key", "array of arrays");
}

static void g16_array_count_2_63(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "k", META_U8, (uint64_t)1 << 63);
    b.n = 43; // part of the count is missing
    refuse_always(&b, MOE_ERR_FORMAT, "k", "cut off");
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "k", META_U8, (uint64_t)1 << 63);
    refuse_always(&b, MOE_ERR_FORMAT, "k", "9223372036854775808");
}

static void g17_truncated_array(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_STRING, 1000);
    for (int i = 0; i < 500; i++)
        put_string(&b, "0123456789abcdef");
    refuse_always(&b, MOE_ERR_FORMAT, "key", "cut off");
    put_head(&b, 3, 0, 1);
    put_key_array(&b, "key", META_F32, 1000);
    put_zeros(&b, 3999);
    refuse_always(&b, MOE_ERR_FORMAT, "key", "expected 4000 bytes");
}

static void g18_duplicate_key(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 3);
    put_key_u32(&b, "same.key", 1);
    put_key_u32(&b, "other", 1);
    put_key_string(&b, "same.key", "x");
    refuse_always(&b, MOE_ERR_FORMAT, "same.key", "second");
}

static void put_many_keys(gguf_made *b, uint32_t n, const char *last)
{
    put_head(b, 3, 0, n);
    for (uint32_t i = 0; i + 1 < n; i++) {
        char key[32];
        snprintf(key, sizeof key, "key.%u", i);
        put_key(b, key, META_U8);
        put_u8(b, 0);
    }
    put_key(b, last, META_U8);
    put_u8(b, 0);
}

static void g19_many_keys(void)
{
    gguf_made b = {0};
    put_many_keys(&b, 1000000, "key.0");
    refuse_always(&b, MOE_ERR_LIMIT, "metadata_kv_count", "1000000");
    put_many_keys(&b, 200000, "key.0"); // the duplicate is found behind 200000 others
    refuse_always(&b, MOE_ERR_FORMAT, "key.0", "second");
    put_many_keys(&b, 200000, "last");
    accept(&b, NULL);
}

/* Keys whose hashes all fall on one slot of the table. */
static void g19_keys_that_collide(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 600);
    uint32_t n = 0;
    for (uint32_t i = 0; n < 600; i++) {
        char key[32];
        snprintf(key, sizeof key, "%u", i);
        if (dir_hash(key, strlen(key)) % 2048 == 0) {
            put_key_u32(&b, key, 0);
            n++;
        }
    }
    for (int kind = 0; kind < N_SOURCES; kind++) {
        gguf_opened s;
        opened_init(&s, &b, kind, false);
        CHECK(opened_open(&s) == MOE_ERR_LIMIT && strstr(s.error.message, "collide"), "%s",
              s.error.message);
        opened_close(&s);
    }
    free(b.data);
}

static void put_alignment(gguf_made *b, uint32_t type, uint64_t value)
{
    put_head(b, 3, 1, 1);
    put_key(b, "general.alignment", type);
    put(b, &value, meta_types[type].bytes);
    put_tensor(b, "t", 8, 0, 0, 0);
    put_data(b, 32, 32);
}

static void g20_alignment_0(void)
{
    gguf_made b = {0};
    put_alignment(&b, META_U32, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the u32 0");
}

static void g21_alignment_13(void)
{
    gguf_made b = {0};
    put_alignment(&b, META_U32, 13);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the u32 13");
}

static void g22_alignment_2_31(void)
{
    gguf_made b = {0};
    put_alignment(&b, META_U32, (uint64_t)1 << 31);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the u32 2147483648");
}

static void g23_alignment_of_other_type(void)
{
    gguf_made b = {0};
    put_alignment(&b, META_I32, 32);
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the i32 32");
    put_head(&b, 3, 0, 1);
    put_key_string(&b, "general.alignment", "32");
    refuse_always(&b, MOE_ERR_FORMAT, "general.alignment", "the string \"32\"");
}

static void bool_of_2(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 0, 1);
    put_key(&b, "flag", META_BOOL);
    put_u8(&b, 2);
    refuse_always(&b, MOE_ERR_FORMAT, "flag", "got 2");
}

/* ---------------------------------------------------------------------- malformed: tensors -- */

static void put_shape(gguf_made *b, uint32_t n_dims, const uint64_t dims[4], uint32_t type)
{
    put_head(b, 3, 1, 0);
    put_string(b, "weird");
    put_u32(b, n_dims);
    for (uint32_t i = 0; i < MOE_MIN(n_dims, 5); i++)
        put_u64(b, dims[i % 4]);
    put_u32(b, type);
    put_u64(b, 0);
    put_data(b, 32, 64);
}

static void g24_n_dims(void)
{
    static const uint64_t ones[4] = {1, 1, 1, 1};
    static const uint32_t counts[] = {0, 5, UINT32_MAX};
    for (size_t i = 0; i < MOE_COUNT(counts); i++) {
        gguf_made b = {0};
        char text[32];
        put_shape(&b, counts[i], ones, 0);
        snprintf(text, sizeof text, "got %u", counts[i]);
        refuse_always(&b, MOE_ERR_FORMAT, "weird", text);
    }
}

static void g25_zero_dim(void)
{
    for (uint32_t i = 0; i < 4; i++) {
        uint64_t dims[4] = {1, 1, 1, 1};
        gguf_made b = {0};
        char text[48];
        dims[i] = 0;
        put_shape(&b, 4, dims, 0);
        snprintf(text, sizeof text, "dimension %u", i);
        refuse_always(&b, MOE_ERR_FORMAT, "weird", text);
    }
}

static void g26_negative_dim(void)
{
    gguf_made b = {0};
    put_shape(&b, 2, (uint64_t[4]){4, (uint64_t)-1, 1, 1}, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "got -1");
}

static void g27_product_over_int64(void)
{
    gguf_made b = {0};
    put_shape(&b, 2, (uint64_t[4]){(uint64_t)1 << 62, 2, 1, 1}, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "4611686018427387904 x 2 x 1 x 1");
}

static void g28_product_wraps_to_0(void)
{
    gguf_made b = {0};
    put_shape(&b, 2, (uint64_t[4]){(uint64_t)1 << 32, (uint64_t)1 << 32, 1, 1}, 0);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "4294967296 x 4294967296");
}

static void g29_byte_size_wraps(void)
{
    gguf_made b = {0};
    put_shape(&b, 2, (uint64_t[4]){((uint64_t)1 << 62) + 8, 1, 1, 1}, 0); // x 4 = 32
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "64 bits");
}

static void g30_sum_of_sizes_wraps(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 2, 0); // the second tensor's end is 2^64 + 32
    put_tensor(&b, "a", (uint64_t)1 << 61, 0, 0, 0);
    put_tensor(&b, "b", (uint64_t)1 << 61, 0, 0, (uint64_t)1 << 63);
    put_data(&b, 32, 64);
    refuse(&b, MOE_ERR_FORMAT, "a", "cut off");
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "a", (uint64_t)1 << 61, 0, 0, (uint64_t)1 << 63);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "a", "below 2^64");
}

static void g31_tensor_type_out_of_range(void)
{
    static const uint32_t types[] = {UINT32_MAX, 4096, 1000, 43};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        gguf_made b = {0};
        char text[32];
        put_shape(&b, 1, (uint64_t[4]){256, 1, 1, 1}, types[i]);
        snprintf(text, sizeof text, "got %u (unknown)", types[i]);
        refuse(&b, MOE_ERR_UNSUPPORTED, "weird", text);
    }
}

static void g32_removed_type(void)
{
    static const uint32_t types[] = {4, 5, 31, 32, 33, 36, 37, 38};
    for (size_t i = 0; i < MOE_COUNT(types); i++) {
        gguf_made b = {0};
        put_shape(&b, 1, (uint64_t[4]){256, 1, 1, 1}, types[i]);
        refuse(&b, MOE_ERR_UNSUPPORTED, "weird", "removed");
    }
    gguf_made b = {0};
    put_shape(&b, 1, (uint64_t[4]){256, 1, 1, 1}, 26);
    refuse(&b, MOE_ERR_UNSUPPORTED, "weird", "26 (I32)");
}

static void g33_row_not_multiple_of_block(void)
{
    gguf_made b = {0};
    put_shape(&b, 2, (uint64_t[4]){48, 2, 1, 1}, 2);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "multiple of 32, the block of Q4_0, got rows of 48");
    put_shape(&b, 2, (uint64_t[4]){128, 2, 1, 1}, 12);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "multiple of 256");
}

static void g34_misaligned_offset(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 4, 0, 0, 16);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "multiple of 32, got 16");
}

static void g35_overlap(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 3, 0);
    put_tensor(&b, "c", 8, 0, 0, 96);
    put_tensor(&b, "a", 9, 0, 0, 0); // 36 bytes
    put_tensor(&b, "b", 8, 0, 0, 32);
    put_data(&b, 32, 128);
    refuse_always(&b, MOE_ERR_FORMAT, "b", "\"a\"");
    put_head(&b, 3, 2, 0); // the same bytes twice
    put_tensor(&b, "a", 8, 0, 0, 0);
    put_tensor(&b, "b", 8, 0, 0, 0);
    put_data(&b, 32, 128);
    for (int kind = 0; kind < N_SOURCES; kind++) {
        gguf_opened s;
        opened_init(&s, &b, kind, false);
        CHECK(opened_open(&s) == MOE_ERR_FORMAT && strstr(s.error.message, "overlap"), "%s",
              s.error.message);
        opened_close(&s);
    }
    free(b.data);
}

static void g37_offset_plus_size_wraps(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 8, 0, 0, (uint64_t)0 - 32); // ends at 2^64 exactly, then data_start
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "below 2^64");
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 64, 0, 0, (uint64_t)0 - 288); // the start fits, the end does not
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "weird", "below 2^64");
}

static void g38_past_the_end(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 17, 0, 0, 0); // 68 bytes
    put_data(&b, 32, 67);
    accept_mode(&b, true, NULL);
    refuse(&b, MOE_ERR_FORMAT, "weird", "cut off");
    put_head(&b, 3, 1, 0);
    put_tensor(&b, "weird", 1, 0, 0, (uint64_t)1 << 40);
    put_data(&b, 32, 67);
    refuse(&b, MOE_ERR_FORMAT, "weird", "cut off");
}

static void g39_duplicate_tensor(void)
{
    gguf_made b = {0};
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "twin", 8, 0, 0, 0);
    put_tensor(&b, "twin", 8, 0, 0, 32);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "twin", "second");
}

static void g40_tensor_name_length(void)
{
    char name[65] = "";
    gguf_made b = {0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, 8, 0, 0, 0);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor 0", "got 0");
    memset(name, 'n', 64);
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, 8, 0, 0, 0);
    put_data(&b, 32, 64);
    refuse_always(&b, MOE_ERR_FORMAT, "tensor 0", "got 64");
    name[63] = 0;
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, 8, 0, 0, 0);
    put_data(&b, 32, 64);
    accept(&b, NULL);
}

/* Every cut is refused, and each error is of the kind of a file that ends too soon. */
static void g41_cut_at_every_byte(void)
{
    gguf_made whole = {0};
    put_valid(&whole);
    for (size_t n = 0; n < whole.n; n++) {
        for (int kind = 0; kind < N_SOURCES; kind++) {
            gguf_made b = {.data = whole.data, .n = n};
            gguf_opened s;
            opened_init(&s, &b, kind, false);
            moe_status got = opened_open(&s);
            CHECK(got == MOE_ERR_FORMAT && s.error.message[0], "%s, cut at %zu: %s, %s",
                  source_names[kind], n, moe_status_name(got), s.error.message);
            opened_close(&s);
        }
    }
    free(whole.data);
}
/* Weights that are read into memory in several steps, by several threads, give the same bytes; so
 * does a callback, which one thread calls, unless it fails in the middle. */
typedef struct gguf_slow_source {
    const gguf_made *b;
    uint32_t n_call, fail_at;
} gguf_slow_source;

static int gguf_slow_read(void *user, uint64_t offset, void *dst, size_t bytes)
{
    gguf_slow_source *s = user;
    memcpy(dst, s->b->data + offset, bytes);
    return ++s->n_call == s->fail_at ? 7 : 0;
}

static void copied_in_steps(void)
{
    const uint64_t rows = 3 * DIR_READ_STEP_BYTES / 4096 + 1;
    gguf_made b = {0};
    put_head(&b, 3, 1, 1);
    put_key_string(&b, "general.architecture", "llama");
    put_tensor(&b, "t", 1024, rows, 0, 0);
    put_data(&b, 32, 0);
    const size_t start = b.n;
    for (uint64_t i = 0; i < rows * 512; i++)
        put_u64(&b, i);
    for (uint32_t fail_at = 0; fail_at < 3; fail_at++) { /* 0: memory, 1: callback, 2: it fails */
        gguf_slow_source source = {.b = &b};
        moe_model_options o;
        moe_directory *dir = NULL;
        moe_error error = {0};
        moe_mem mem;
        moe_model_options_init(&o);
        mem_init(&mem, NULL, 0);
        o.copy = true;
        o.data = fail_at ? NULL : b.data;
        o.data_bytes = fail_at ? 0 : b.n;
        o.read = fail_at ? gguf_slow_read : NULL;
        o.read_user = &source;
        o.read_bytes = fail_at ? b.n : 0;
        source.fail_at = fail_at == 2 ? 6 : 0;
        const moe_status status = directory_open(&dir, &o, &mem, &error);
        CHECK(status == (fail_at == 2 ? MOE_ERR_IO : MOE_OK), "%u: %s", fail_at, error.message);
        if (dir)
            CHECK(!memcmp(directory_tensor(dir, "t")->data, b.data + start, b.n - start), "%u",
                  fail_at);
        directory_close(dir);
        CHECK(atomic_load(&mem.used_bytes) == 0, "%u", fail_at);
    }
    free(b.data);
}

TEST_PROGRAM(gguf)
{
    if (!scratch_begin("gguf"))
        return;
    RUN(valid_v3);
    RUN(valid_v2);
    RUN(valid_big_alignment);
    RUN(valid_small_alignment);
    RUN(valid_without_tensors);
    RUN(valid_empty);
    RUN(valid_g36_gaps_and_order);
    RUN(valid_numbers_of_all_types);
    RUN(valid_large_vocabulary);
    RUN(valid_many_tensors);
    RUN(valid_vocab_only_of_cut_file);
    RUN(g01_0_to_3_bytes);
    RUN(g02_magic_only);
    RUN(g03_bad_magic);
    RUN(g04_versions);
    RUN(g05_swapped_version);
    RUN(g06_n_kv_huge);
    RUN(g07_n_tensors_huge);
    RUN(g08_counts_exceed_bytes);
    RUN(g09_string_length_wraps);
    RUN(g10_string_length_remaining_plus_1);
    RUN(g11_bad_keys);
    RUN(g12_value_type_out_of_range);
    RUN(g13_bad_array_item_type);
    RUN(g14_array_size_wraps);
    RUN(g15_nested_arrays);
    RUN(g16_array_count_2_63);
    RUN(g17_truncated_array);
    RUN(g18_duplicate_key);
    RUN(g19_many_keys);
    RUN(g19_keys_that_collide);
    RUN(g20_alignment_0);
    RUN(g21_alignment_13);
    RUN(g22_alignment_2_31);
    RUN(g23_alignment_of_other_type);
    RUN(bool_of_2);
    RUN(g24_n_dims);
    RUN(g25_zero_dim);
    RUN(g26_negative_dim);
    RUN(g27_product_over_int64);
    RUN(g28_product_wraps_to_0);
    RUN(g29_byte_size_wraps);
    RUN(g30_sum_of_sizes_wraps);
    RUN(g31_tensor_type_out_of_range);
    RUN(g32_removed_type);
    RUN(g33_row_not_multiple_of_block);
    RUN(g34_misaligned_offset);
    RUN(g35_overlap);
    RUN(g37_offset_plus_size_wraps);
    RUN(g38_past_the_end);
    RUN(g39_duplicate_tensor);
    RUN(g40_tensor_name_length);
    RUN(g41_cut_at_every_byte);
    RUN(copied_in_steps);
    scratch_end();
}
