/* core/tokenizer.c - text <-> tokens: the public functions.
 *
 * Text flows through the stages that tokenizer.h lists; tokens flow back through the decoder, one
 * at a time. Tokenizers come from the metadata of a model file (tokenizer_gguf.c) or from a Hugging
 * Face tokenizer.json (tokenizer_json.c). Any number of threads may use one. */
#ifndef MOE_CORE_TOKENIZER_C
#define MOE_CORE_TOKENIZER_C

#include "platform.h"
#include "tokenizer_gguf.c"
#include "tokenizer_json.c"

/* ----------------------------------------------------------------------------------- opening -- */

static void tokenizer_free(moe_tokenizer *tok)
{
    if (!tok)
        return;
    moe_mem *mem = tok->mem;
    arena_free(&tok->arena);
    if (mem != &tok->own_mem) {
        mem_free(mem, tok);
        return;
    }
    moe_mem own; // the allocator stands inside of what it frees
    mem_init(&own, &mem->host, 0);
    mem_free(&own, tok);
}

/* An empty tokenizer. With mem NULL it gets an allocator of its own, of this host. */
static moe_tokenizer *tokenizer_new(moe_mem *mem, const moe_host *host, uint64_t limit_bytes)
{
    moe_mem own;
    mem_init(&own, host, limit_bytes);
    moe_tokenizer *tok = mem_alloc(mem ? mem : &own, 1, sizeof *tok);
    if (!tok)
        return NULL;
    if (!mem) {
        mem_init(&tok->own_mem, host, limit_bytes);
        mem = &tok->own_mem;
    }
    tok->mem = mem;
    tok->arena.mem = mem;
    tok->unknown = tok->bos = tok->eos = -1;
    tok->prefix = tok->suffix = "";
    return tok;
}

static moe_status tokenizer_fill(moe_tokenizer *tok, const moe_directory *dir, bool *found,
                                 moe_error *error)
{
    moe_str model = {0};
    moe_status status = meta_string(dir, "tokenizer.ggml.model", false, &model, error);
    *found = status == MOE_OK && model.data && !str_equal(model, "none") &&
             !str_equal(model, "no_vocab");
    if (!*found)
        return status;
    vocab_loader g = {.tok = tok, .dir = dir, .error = error};
    return vocab_load(&g, model);
}

/* The tokenizer of a model file. MOE_OK and *out NULL if the file has none. Nothing of the
 * directory is kept. */
MOE_UNUSED static moe_status tokenizer_from_directory(moe_tokenizer **out, const moe_directory *dir,
                                                      moe_mem *mem, moe_error *error)
{
    bool found;
    *out = NULL;
    moe_tokenizer *tok = tokenizer_new(mem, NULL, 0);
    if (!tok)
        return fail_memory(error, mem, "tokenizer", sizeof *tok);
    moe_status status = tokenizer_fill(tok, dir, &found, error);
    if (status == MOE_OK && found)
        *out = tok;
    else
        tokenizer_free(tok);
    return status;
}

/* The bytes of a source. *copy is to be freed with mem_free, and NULL if the caller's own memory
 * serves. */
static moe_status tokenizer_read(const moe_model_options *o, moe_mem *mem, const char **data,
                                 uint64_t *bytes, void **copy, uint64_t max_bytes, moe_error *error)
{
    *copy = NULL;
    if (o->data) {
        *data = o->data;
        *bytes = o->data_bytes;
        return MOE_OK;
    }
    plat_file file;
    moe_status status = MOE_OK;
    *bytes = o->read_bytes;
    if (o->path) {
        status = plat_open(&file, o->path, error);
        if (status != MOE_OK)
            return status;
        *bytes = file.bytes;
    }
    *bytes = MOE_MIN(*bytes, max_bytes);
    *copy = mem_alloc_uncleared(mem, *bytes, 1);
    if (!*copy)
        status = fail_memory(error, mem, o->path, *bytes);
    else if (o->path)
        status = plat_read(&file, 0, *copy, *bytes, o->path, error);
    else if (o->read(o->read_user, 0, *copy, (size_t)*bytes))
        status = fail(error, MOE_ERR_IO, "read", "the callback failed to read %llu bytes",
                      (unsigned long long)*bytes);
    if (o->path)
        plat_close(&file);
    *data = *copy;
    if (status != MOE_OK) {
        mem_free(mem, *copy);
        *copy = NULL;
    }
    return status;
}

static moe_status tokenizer_open_json(moe_tokenizer *tok, const moe_model_options *o,
                                      moe_error *error)
{
    const char *data;
    uint64_t bytes;
    void *copy;
    moe_status status = tokenizer_read(o, tok->mem, &data, &bytes, &copy, JSON_MAX_BYTES + 1,
                                       error);
    if (status != MOE_OK)
        return status;
    status = json_tokenizer_load(tok, data, bytes, error);
    mem_free(tok->mem, copy);
    return status;
}

static moe_status tokenizer_open_gguf(moe_tokenizer *tok, const moe_model_options *o,
                                      moe_error *error)
{
    moe_model_options options = *o;
    moe_directory *dir = NULL;
    bool found = false;
    options.vocab_only = true;
    moe_status status = directory_open(&dir, &options, tok->mem, error);
    if (status == MOE_OK)
        status = tokenizer_fill(tok, dir, &found, error);
    if (status == MOE_OK && !found)
        status = fail(error, MOE_ERR_MODEL, "tokenizer.ggml.model", "the file has no tokenizer");
    directory_close(dir);
    return status;
}

moe_status moe_tokenizer_open(moe_tokenizer **out, const moe_model_options *options,
                              moe_error *error)
{
    if (!out)
        return fail(error, MOE_ERR_ARGUMENT, "out", "expected a pointer, got NULL");
    *out = NULL;
    moe_model_options o;
    moe_model_options_init(&o);
    if (options)
        memcpy(&o, options, MOE_MIN(options->size, sizeof o));
    if ((o.path != NULL) + (o.data != NULL) + (o.read != NULL) != 1)
        return fail(error, MOE_ERR_ARGUMENT, "options",
                    "expected exactly one of path, data and read");
    moe_tokenizer *tok = tokenizer_new(NULL, o.host, o.memory_limit_bytes);
    if (!tok)
        return fail(error, MOE_ERR_MEMORY, "tokenizer", "cannot allocate %zu bytes", sizeof *tok);
    const char *head;
    uint64_t head_bytes;
    void *copy;
    moe_status status = tokenizer_read(&o, tok->mem, &head, &head_bytes, &copy, 16, error);
    if (status == MOE_OK) {
        uint64_t i = 0; // JSON starts with a brace, perhaps behind blanks or a byte order mark
        while (i < head_bytes && (strchr(" \t\r\n", head[i]) || (unsigned char)head[i] >= 0xBB))
            i++;
        bool json = i < head_bytes && head[i] == '{';
        mem_free(tok->mem, copy);
        status = json ? tokenizer_open_json(tok, &o, error) : tokenizer_open_gguf(tok, &o, error);
    }
    if (status == MOE_OK)
        *out = tok;
    else
        tokenizer_free(tok);
    return status;
}

void moe_tokenizer_close(moe_tokenizer *tokenizer)
{
    tokenizer_free(tokenizer);
}

/* ---------------------------------------------------------------------------------- encoding -- */

static moe_status encode_normalized(tok_run *run, const uint8_t *text, size_t bytes, bool first)
{
    return pre_run(run, 0, text, bytes, first);
}

/* A piece of the input without added tokens. */
static moe_status encode_piece(tok_run *run, const uint8_t *text, size_t bytes, bool first)
{
    moe_status status = norm_run(run, &text, &bytes);
    if (status != MOE_OK)
        return status;
    return added_split(run, &run->tok->added_normalized, text, bytes, first, encode_normalized);
}

/* Replaces what is not well-formed by U+FFFD. */
static bool encode_repair(const uint8_t *text, size_t bytes, text_buf *out)
{
    for (size_t i = 0; i < bytes;) {
        size_t good = utf8_valid(text + i, bytes - i);
        int32_t cp;
        if (!buf_append(out, text + i, good))
            return false;
        i += good;
        if (i < bytes && !norm_put(out, UNICODE_REPLACEMENT))
            return false;
        if (i < bytes)
            i += utf8_decode(text + i, bytes - i, &cp);
    }
    return true;
}

enum { ENCODE_CACHE_FROM_BYTES = 2048 };

static moe_status encode_run(tok_run *run, const uint8_t *text, size_t bytes)
{
    const moe_tokenizer *tok = run->tok;
    bool special = (run->flags & MOE_ENCODE_ADD_SPECIAL) != 0;
    run->re.steps_left = 50000000 + 2000 * (uint64_t)bytes;
    if (bytes >= ENCODE_CACHE_FROM_BYTES && run->capacity)
        run->cache = mem_alloc(tok->mem, TOK_CACHE_ENTRIES, sizeof *run->cache); // may fail
    for (uint32_t i = 0; special && i < tok->n_before; i++)
        run_emit(run, tok->template_ids[i]);
    moe_status status = added_split(run, &tok->added, text, bytes, true, encode_piece);
    for (uint32_t i = 0; special && status == MOE_OK && i < tok->n_after; i++)
        run_emit(run, tok->template_ids[tok->n_before + i]);
    return status;
}

static void encode_free(tok_run *run)
{
    regex_run_free(&run->re);
    buf_free(&run->norm[0]);
    buf_free(&run->norm[1]);
    for (size_t i = 0; i < TOK_MAX_STEPS; i++)
        buf_free(&run->pre[i]);
    buf_free(&run->work);
    buf_free(&run->word);
    mem_free(run->tok->mem, run->cache);
}

moe_status moe_tokenizer_encode(const moe_tokenizer *tokenizer, const char *text,
                                size_t text_bytes, uint32_t flags, moe_token *tokens,
                                size_t capacity, size_t *n_tokens, moe_error *error)
{
    if (!tokenizer || (!text && text_bytes) || (!tokens && capacity) || !n_tokens)
        return fail(error, MOE_ERR_ARGUMENT, "tokenizer", "expected pointers, got NULL");
    moe_mem *mem = tokenizer->mem;
    tok_run run = {.tok = tokenizer, .flags = flags, .out = tokens, .capacity = capacity,
                   .error = error};
    run.re.mem = run.norm[0].mem = run.norm[1].mem = run.work.mem = run.word.mem = mem;
    for (size_t i = 0; i < TOK_MAX_STEPS; i++)
        run.pre[i].mem = mem;
    const uint8_t *p = text ? (const uint8_t *)text : (const uint8_t *)"";
    text_buf repaired = {.mem = mem};
    moe_status status = MOE_OK;
    if (utf8_valid(p, text_bytes) != text_bytes) {
        if (!encode_repair(p, text_bytes, &repaired))
            status = run_fail(&run, MOE_ERR_MEMORY);
        p = repaired.data;
        text_bytes = repaired.n;
    }
    if (status == MOE_OK)
        status = encode_run(&run, p, text_bytes);
    buf_free(&repaired);
    encode_free(&run);
    if (status != MOE_OK)
        return status;
    *n_tokens = run.n;
    if (run.n > capacity)
        return fail(error, MOE_ERR_LIMIT, "capacity", "expected room for %zu tokens, got %zu",
                    run.n, capacity);
    return MOE_OK;
}

/* ---------------------------------------------------------------------------------- decoding -- */

/* Text on its way out: counted even where it does not fit. */
typedef struct decode_out {
    char *buf;
    size_t bytes, n;
} decode_out;

static void decode_put(decode_out *out, const void *data, size_t n)
{
    if (out->n < out->bytes && n <= out->bytes - out->n && n)
        memcpy(out->buf + out->n, data, n);
    out->n += n;
}

/* Ends an unfinished sequence. */
static void decode_flush(const moe_tokenizer *tok, moe_decoder *d, decode_out *out)
{
    for (size_t i = 0; i < d->n_pending;) {
        int32_t cp;
        size_t length = utf8_decode(d->pending + i, d->n_pending - i, &cp);
        decode_put(out, "\xEF\xBF\xBD", 3);
        i += tok->bytes_one_by_one ? 1 : length;
    }
    d->n_pending = 0;
}

/* Puts whole characters out and keeps the rest. */
static void decode_bytes(const moe_tokenizer *tok, moe_decoder *d, const uint8_t *p, size_t n,
                         decode_out *out)
{
    while (n && d->n_pending) { // complete the character that is begun
        uint8_t c[8];
        int32_t cp;
        size_t have = d->n_pending, length;
        memcpy(c, d->pending, have);
        c[have] = *p;
        length = utf8_decode(c, have + 1, &cp);
        if (cp < 0 && length <= have) { // *p does not continue it
            decode_flush(tok, d, out);
            break;
        }
        d->pending[d->n_pending++] = *p++;
        n--;
        if (cp >= 0) {
            decode_put(out, c, length);
            d->n_pending = 0;
        }
    }
    while (n) {
        size_t good = utf8_valid(p, n), length;
        int32_t cp;
        decode_put(out, p, good);
        p += good;
        n -= good;
        if (!n)
            break;
        length = utf8_decode(p, n, &cp);
        // could the rest begin a character? a lead byte that is cut off by the end
        bool open = length == n && p[0] >= 0xC2 && p[0] <= 0xF4 && n < utf8_length(p[0]);
        if (open) {
            memcpy(d->pending, p, n);
            d->n_pending = (uint8_t)n;
            break;
        }
        decode_put(out, "\xEF\xBF\xBD", 3);
        p += length;
        n -= length;
    }
}

static bool decode_begins(const uint8_t *p, size_t n, const char *text)
{
    size_t bytes = strlen(text);
    return n >= bytes && !memcmp(p, text, bytes);
}

/* WordPiece: takes the mark off a token and puts a space in front of one that begins a word. */
static void decode_word(const moe_tokenizer *tok, const moe_decoder *d, const uint8_t **p,
                        size_t *n, decode_out *out)
{
    static const char *const glued[] = {".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"};
    bool continues = *tok->prefix ? decode_begins(*p, *n, tok->prefix)
                                  : *tok->suffix && !decode_begins(*p, *n, tok->suffix);
    size_t mark = continues ? strlen(tok->prefix) : strlen(tok->suffix);
    if (*tok->suffix || d->started) {
        *p += MOE_MIN(mark, *n);
        *n -= MOE_MIN(mark, *n);
    }
    for (size_t i = 0; tok->cleanup && i < MOE_COUNT(glued); i++)
        continues |= decode_begins(*p, *n, glued[i]);
    if (d->started && !continues)
        decode_put(out, " ", 1);
}

/* The rules that depend on the place of a token in the stream. */
static void decode_token(const moe_tokenizer *tok, moe_decoder *d, const tok_entry *t,
                         decode_out *out)
{
    const uint8_t *p = t->out;
    size_t n = t->out_bytes;
    bool byte = t->kind == TOK_BYTE && n == 1;
    if (tok->decoder == DECODE_SUFFIX) {
        decode_put(out, d->pending, d->n_pending);
        d->n_pending = n && p[n - 1] == ' ';
        d->pending[0] = ' ';
        decode_put(out, p, n - d->n_pending);
        return;
    }
    if (!byte && !tok->byte_level) // byte tokens form characters among themselves only
        decode_flush(tok, d, out);
    uint32_t strip = d->started ? 0 : tok->decoder == DECODE_METASPACE ? UINT32_MAX
                                                                       : tok->strip_start;
    for (; strip && n && *p == ' '; strip--, n--)
        p++;
    if (tok->decoder == DECODE_WORDPIECE)
        decode_word(tok, d, &p, &n, out);
    else if (tok->decoder == DECODE_SPACED && d->started)
        decode_put(out, " ", 1);
    d->started = true;
    decode_bytes(tok, d, p, n, out);
}

size_t moe_tokenizer_decode(const moe_tokenizer *tokenizer, moe_decoder *decoder, moe_token token,
                            char *buf, size_t buf_bytes)
{
    if (!tokenizer || !decoder)
        return 0;
    moe_decoder d = *decoder;
    decode_out out = {.buf = buf, .bytes = buf ? buf_bytes : 0};
    if (token < 0 && tokenizer->decoder == DECODE_SUFFIX)
        d.n_pending = 0;
    else if (token < 0)
        decode_flush(tokenizer, &d, &out);
    else if ((uint32_t)token < tokenizer->n_tokens &&
             (d.show_special || !tokenizer->tokens[token].special))
        decode_token(tokenizer, &d, &tokenizer->tokens[token], &out);
    if (out.n < out.bytes) {
        buf[out.n] = 0;
        *decoder = d;
    }
    return out.n;
}

/* ------------------------------------------------------------------------------------- facts -- */

uint32_t moe_tokenizer_size(const moe_tokenizer *tokenizer)
{
    return tokenizer ? tokenizer->n_tokens : 0;
}

moe_status moe_tokenizer_piece(const moe_tokenizer *tokenizer, moe_token token, const char **piece,
                               size_t *piece_bytes)
{
    if (!tokenizer || !piece || !piece_bytes || token < 0 ||
        (uint32_t)token >= tokenizer->n_tokens || tokenizer->tokens[token].kind == TOK_ABSENT)
        return MOE_ERR_ARGUMENT;
    *piece = tokenizer->tokens[token].text;
    *piece_bytes = tokenizer->tokens[token].bytes;
    return MOE_OK;
}

moe_token moe_tokenizer_bos(const moe_tokenizer *tokenizer)
{
    return tokenizer ? tokenizer->bos : -1;
}

moe_token moe_tokenizer_eos(const moe_tokenizer *tokenizer)
{
    return tokenizer ? tokenizer->eos : -1;
}

bool moe_tokenizer_is_end(const moe_tokenizer *tokenizer, moe_token token)
{
    return tokenizer && token >= 0 && (uint32_t)token < tokenizer->n_tokens &&
           tokenizer->tokens[token].end;
}

const char *moe_tokenizer_chat_template(const moe_tokenizer *tokenizer)
{
    return tokenizer ? tokenizer->chat_template : NULL;
}

#endif
