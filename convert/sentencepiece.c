/* convert/sentencepiece.c - tokenizer.model, SentencePiece's own file, -> tokenizer.ggml.* keys.
 *
 * The file is a protocol buffer: fields of a number, a wire type and a value, some of which are
 * messages of fields again. In: bytes that nobody has checked. Out: pieces in the order of their
 * ids, what the normalizer does, and the ids of the roles. Layout: sentencepiece_model.proto of the
 * SentencePiece project.
 * Must never: read behind the field that it is in, or write a tokenizer that cuts text in another
 * way. */
#ifndef MOE_CONVERT_SENTENCEPIECE_C
#define MOE_CONVERT_SENTENCEPIECE_C

#include "files.c"
#include "meta.c"

typedef enum sp_kind { SP_UNIGRAM = 1, SP_BPE = 2 } sp_kind;

typedef struct sp_piece {
    moe_str text;
    float score;
    tok_kind kind;          // SentencePiece and GGUF number them alike
} sp_piece;

typedef struct sp_model {
    sp_piece *pieces;       // [capacity]; those behind n are none
    uint32_t n, capacity;
    uint64_t kind;
    bool prefix;            // a space is put in front of the text
    bool squeeze;           // spaces at the ends vanish, several in a row become one
    bool escape, suffix;
    moe_str charsmap;
    int32_t bos, eos, unknown, pad; // -1: none
} sp_model;

/* -------------------------------------------------------------------------- protocol buffer -- */

typedef struct proto_reader {
    const uint8_t *p, *end;
} proto_reader;

enum { PROTO_VARINT = 0, PROTO_64 = 1, PROTO_BYTES = 2, PROTO_32 = 5 };

typedef struct proto_field {
    uint64_t number, wire;
    uint64_t value;         // of PROTO_VARINT, PROTO_32 and PROTO_64
    proto_reader bytes;     // of PROTO_BYTES
} proto_field;

static bool proto_varint(proto_reader *r, uint64_t *value)
{
    *value = 0;
    for (uint32_t shift = 0; shift < 64 && r->p < r->end; shift += 7) {
        const uint8_t byte = *r->p++;
        *value |= (uint64_t)(byte & 0x7F) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return false;
}

/* The next field of a message that has not ended; false: what is there is no field. */
static bool proto_next(proto_reader *r, proto_field *f)
{
    uint64_t tag, bytes;
    if (!proto_varint(r, &tag))
        return false;
    *f = (proto_field){.number = tag >> 3, .wire = tag & 7};
    if (f->wire == PROTO_VARINT)
        return f->number && proto_varint(r, &f->value);
    bytes = f->wire == PROTO_64 ? 8 : 4;
    if (f->wire == PROTO_BYTES && !proto_varint(r, &bytes))
        return false;
    const bool known = f->wire == PROTO_64 || f->wire == PROTO_32 || f->wire == PROTO_BYTES;
    if (!f->number || !known || bytes > (uint64_t)(r->end - r->p))
        return false;
    f->bytes = (proto_reader){r->p, r->p + bytes};
    if (f->wire != PROTO_BYTES)
        memcpy(&f->value, r->p, (size_t)bytes); // little-endian
    r->p += bytes;
    return true;
}

static moe_str proto_text(const proto_field *f)
{
    return (moe_str){(const char *)f->bytes.p, (uint64_t)(f->bytes.end - f->bytes.p)};
}

/* ------------------------------------------------------------------------------------- model -- */

static const char sp_subject[] = "tokenizer.model";

static moe_status sp_fail_broken(moe_error *error)
{
    return fail(error, MOE_ERR_FORMAT, sp_subject,
                "expected a model of SentencePiece, got other bytes: the file is damaged, or it is "
                "of another kind of tokenizer, for which a tokenizer.json is needed");
}

static bool sp_has_text(moe_str text)
{
    return text.bytes && utf8_valid((const uint8_t *)text.data, (size_t)text.bytes) == text.bytes &&
           !memchr(text.data, 0, (size_t)text.bytes);
}

static moe_status sp_read_piece(sp_model *m, proto_reader r, moe_error *error)
{
    proto_field f;
    sp_piece piece = {.text = {"", 0}, .kind = TOK_NORMAL};
    uint64_t kind = TOK_NORMAL;
    while (r.p < r.end) {
        if (!proto_next(&r, &f))
            return sp_fail_broken(error);
        if (f.number == 1 && f.wire == PROTO_BYTES)
            piece.text = proto_text(&f);
        if (f.number == 2 && f.wire == PROTO_32)
            memcpy(&piece.score, &f.value, sizeof piece.score);
        if (f.number == 3 && f.wire == PROTO_VARINT)
            kind = f.value;
    }
    if (m->n == m->capacity)
        return fail(error, MOE_ERR_MODEL, sp_subject,
                    "expected at most %u tokens, one for each row of the embedding, got more",
                    m->capacity);
    if (!sp_has_text(piece.text) || piece.text.bytes > TOK_MAX_TOKEN_BYTES)
        return fail(error, MOE_ERR_FORMAT, sp_subject, "expected a text in UTF-8 of 1 to %d bytes "
                    "for token %u, got %llu bytes", TOK_MAX_TOKEN_BYTES, m->n,
                    (unsigned long long)piece.text.bytes);
    const bool byte = tok_byte_value(piece.text.data, (size_t)piece.text.bytes) >= 0;
    if (kind < TOK_NORMAL || kind > TOK_BYTE || !isfinite(piece.score) ||
        (kind == TOK_BYTE && !byte))
        return fail(error, MOE_ERR_FORMAT, sp_subject, "expected a kind from 1 to 6 and a finite "
                    "score for token %u, got %llu and %g", m->n, (unsigned long long)kind,
                    (double)piece.score);
    piece.kind = (tok_kind)kind;
    m->pieces[m->n++] = piece;
    return MOE_OK;
}

/* TrainerSpec: which model it is, and the roles. */
static moe_status sp_read_trainer(sp_model *m, proto_reader r, moe_error *error)
{
    proto_field f;
    while (r.p < r.end) {
        if (!proto_next(&r, &f))
            return sp_fail_broken(error);
        if (f.wire != PROTO_VARINT)
            continue;
        switch (f.number) {
        case 3: m->kind = f.value; break;
        case 24: m->suffix = f.value != 0; break;
        case 40: m->unknown = (int32_t)f.value; break;
        case 41: m->bos = (int32_t)f.value; break;
        case 42: m->eos = (int32_t)f.value; break;
        case 43: m->pad = (int32_t)f.value; break;
        }
    }
    return MOE_OK;
}

/* NormalizerSpec. */
static moe_status sp_read_normalizer(sp_model *m, proto_reader r, moe_error *error)
{
    proto_field f;
    while (r.p < r.end) {
        if (!proto_next(&r, &f))
            return sp_fail_broken(error);
        if (f.number == 2 && f.wire == PROTO_BYTES)
            m->charsmap = proto_text(&f);
        if (f.wire != PROTO_VARINT)
            continue;
        switch (f.number) {
        case 3: m->prefix = f.value != 0; break;
        case 4: m->squeeze = f.value != 0; break;
        case 5: m->escape = f.value != 0; break;
        }
    }
    return MOE_OK;
}

/* A role whose token is not there, or is an ordinary one, is none. */
static void sp_check_role(const sp_model *m, int32_t *id)
{
    if (*id < 0 || (uint32_t)*id >= m->n || m->pieces[*id].kind == TOK_NORMAL ||
        m->pieces[*id].kind == TOK_BYTE)
        *id = -1;
}

/* Reads the file. The texts of the pieces stay where they are; `pieces` has room for the rows of
 * the embedding. */
static moe_status sp_read(sp_model *m, sp_piece *pieces, uint32_t capacity, const char *data,
                          uint64_t bytes, moe_error *error)
{
    proto_reader r = {(const uint8_t *)data, (const uint8_t *)data + bytes};
    proto_field f;
    moe_status status = MOE_OK;
    *m = (sp_model){.pieces = pieces, .capacity = capacity, .kind = SP_UNIGRAM, .prefix = true,
                    .squeeze = true, .escape = true, .charsmap = {"", 0}, .bos = 1, .eos = 2,
                    .pad = -1};
    while (r.p < r.end && !status) {
        if (!proto_next(&r, &f))
            return sp_fail_broken(error);
        if (f.wire == PROTO_BYTES && f.number <= 3)
            status = f.number == 1   ? sp_read_piece(m, f.bytes, error)
                     : f.number == 2 ? sp_read_trainer(m, f.bytes, error)
                                     : sp_read_normalizer(m, f.bytes, error);
    }
    if (status)
        return status;
    if (!m->n)
        return sp_fail_broken(error);
    if (m->kind != SP_UNIGRAM && m->kind != SP_BPE)
        return fail(error, MOE_ERR_UNSUPPORTED, sp_subject,
                    "expected a unigram (1) or a BPE model (2), got kind %llu",
                    (unsigned long long)m->kind);
    if (m->suffix || !m->escape)
        return fail(error, MOE_ERR_UNSUPPORTED, sp_subject, "expected spaces to become marks in "
                    "front of words (treat_whitespace_as_suffix false, escape_whitespaces true)");
    sp_check_role(m, &m->bos);
    sp_check_role(m, &m->eos);
    sp_check_role(m, &m->unknown);
    sp_check_role(m, &m->pad);
    return MOE_OK;
}

/* ----------------------------------------------------------------------------------- writing -- */

/* The vocabulary, a token for each row of the embedding, and what the normalizer does. */
static void sp_put(const sp_model *m, meta_writer *kv)
{
    char filler[32];
    const bool unigram = m->kind == SP_UNIGRAM;
    meta_put_string(kv, "tokenizer.ggml.model", unigram ? "t5" : "llama");
    meta_put_string(kv, "tokenizer.ggml.pre", "default");
    meta_put_array(kv, "tokenizer.ggml.tokens", META_STRING, m->capacity);
    for (uint32_t id = 0; id < m->capacity; id++) {
        const sp_piece *p = &m->pieces[id];
        const int n = snprintf(filler, sizeof filler, "[PAD%u]", id);
        meta_text(kv, p->text.bytes ? p->text.data : filler,
                  p->text.bytes ? (size_t)p->text.bytes : (size_t)n);
    }
    meta_put_array(kv, "tokenizer.ggml.scores", META_F32, m->capacity);
    for (uint32_t id = 0; id < m->capacity; id++) {
        const float score = m->pieces[id].text.bytes ? m->pieces[id].score : -10000;
        meta_bytes(kv, &score, sizeof score);
    }
    meta_put_array(kv, "tokenizer.ggml.token_type", META_I32, m->capacity);
    for (uint32_t id = 0; id < m->capacity; id++)
        meta_number(kv, m->pieces[id].text.bytes ? (uint32_t)m->pieces[id].kind : TOK_UNUSED, 4);
    if (unigram || m->squeeze)
        meta_put_bool(kv, "tokenizer.ggml.remove_extra_whitespaces", m->squeeze);
    if (m->charsmap.bytes) {
        meta_put_array(kv, "tokenizer.ggml.precompiled_charsmap", META_U8, m->charsmap.bytes);
        meta_bytes(kv, m->charsmap.data, (size_t)m->charsmap.bytes);
    }
}

#endif
