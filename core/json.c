/* core/json.c - a strict JSON reader (RFC 8259) for text from files.
 *
 * A document flows in, an array of nodes comes out, in the order of the text: a container is
 * followed by what it holds, and knows where it ends. Strings without escapes point into the
 * document, which must stay as long as the nodes; the others live in the arena.
 *
 * Why not a library: this one takes its memory from a moe_mem, so the host's allocator and the
 * ceiling hold for a file of a million strings, and needs 24 bytes for each value.
 * Must never: recurse, or accept what the RFC does not: comments, NaN, lone surrogates, duplicate
 * keys in small objects (a large one is a vocabulary, whose reader looks itself). */
#ifndef MOE_CORE_JSON_C
#define MOE_CORE_JSON_C

#include <locale.h>

#include "textmem.c"
#include "unicode.c"

typedef enum json_type {
    JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT
} json_type;

enum { JSON_MAX_BYTES = 1 << 28, JSON_MAX_DEPTH = 64, JSON_UNIQUE_KEYS = 48 };

typedef struct json_node {
    uint32_t type : 3, n : 29; // n: bytes of a string, items of an array, members of an object
    uint32_t end;              // index behind the value and all that it holds
    union {
        const char *text;      // JSON_STRING, not NUL-terminated
        double number;
    } as;
} json_node;

/* A parsed document. In an object a member is two values: its key, a string, and what it holds. */
typedef struct json_doc {
    json_node *nodes;
    uint32_t n, capacity;
    text_arena *arena;         // unescaped strings
    const char *start, *p, *end;
    const char *problem;
} json_doc;

/* ---------------------------------------------------------------------------------- parsing -- */

static const char json_no_memory[] = "there is no memory for it";

static bool json_problem(json_doc *doc, const char *problem)
{
    if (!doc->problem)
        doc->problem = problem;
    return false;
}

static void json_blanks(json_doc *doc)
{
    while (doc->p < doc->end &&
           (*doc->p == ' ' || *doc->p == '\n' || *doc->p == '\r' || *doc->p == '\t'))
        doc->p++;
}

/* Appends a node and returns its index, UINT32_MAX if there is no room. */
static uint32_t json_node_new(json_doc *doc, json_type type)
{
    if (doc->n == doc->capacity) {
        uint32_t capacity = MOE_MAX(doc->capacity + doc->capacity / 2, 64u);
        json_node *nodes = mem_alloc_uncleared(doc->arena->mem, capacity, sizeof *nodes);
        if (!nodes) {
            json_problem(doc, json_no_memory);
            return UINT32_MAX;
        }
        if (doc->n)
            memcpy(nodes, doc->nodes, doc->n * sizeof *nodes);
        mem_free(doc->arena->mem, doc->nodes);
        doc->nodes = nodes;
        doc->capacity = capacity;
    }
    doc->nodes[doc->n] = (json_node){.type = type, .end = doc->n + 1};
    return doc->n++;
}

static bool json_hex4(json_doc *doc, uint32_t *value)
{
    *value = 0;
    if (doc->end - doc->p < 4)
        return json_problem(doc, "\\u needs four hexadecimal digits");
    for (int i = 0; i < 4; i++) {
        unsigned char c = (unsigned char)*doc->p++;
        uint32_t low = c | 32u;
        if (c >= '0' && c <= '9')
            *value = *value << 4 | (c - (uint32_t)'0');
        else if (low >= 'a' && low <= 'f')
            *value = *value << 4 | (low - 'a' + 10);
        else
            return json_problem(doc, "\\u needs four hexadecimal digits");
    }
    return true;
}

/* An escape behind its backslash: 1 to 4 bytes to out, their number in *n. */
static bool json_escape(json_doc *doc, uint8_t out[4], size_t *n)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = *doc->p++;
    const char *simple = c ? strchr(from, c) : NULL;
    uint32_t cp, low;
    *n = 1;
    if (simple) {
        out[0] = (uint8_t)to[simple - from];
        return true;
    }
    if (c != 'u')
        return json_problem(doc, "unknown escape in a string");
    if (!json_hex4(doc, &cp))
        return false;
    if (cp >= 0xD800 && cp < 0xDC00) {
        if (doc->end - doc->p < 6 || doc->p[0] != '\\' || doc->p[1] != 'u')
            return json_problem(doc, "half of a surrogate pair in a string");
        doc->p += 2;
        if (!json_hex4(doc, &low))
            return false;
        if (low < 0xDC00 || low > 0xDFFF)
            return json_problem(doc, "half of a surrogate pair in a string");
        cp = 0x10000 + ((cp - 0xD800) << 10) + (low - 0xDC00);
    } else if (cp >= 0xDC00 && cp <= 0xDFFF) {
        return json_problem(doc, "half of a surrogate pair in a string");
    }
    *n = utf8_encode(cp, out);
    return true;
}

static bool json_string_escaped(json_doc *doc, const char *start, const char *close,
                                json_node *node)
{
    uint8_t *out = arena_alloc(doc->arena, (uint64_t)(close - start) + 4, 1);
    size_t n = 0, one;
    if (!out)
        return json_problem(doc, json_no_memory);
    const char *end = doc->end;
    doc->end = close;
    for (doc->p = start; doc->p < close;) {
        const char *slash = memchr(doc->p, '\\', (size_t)(close - doc->p));
        size_t plain = (size_t)((slash ? slash : close) - doc->p);
        memcpy(out + n, doc->p, plain);
        n += plain;
        doc->p += plain;
        if (doc->p == close)
            break;
        doc->p++;
        if (!json_escape(doc, out + n, &one))
            return false;
        n += one; // an escape is at least as long as what it stands for
    }
    doc->end = end;
    doc->p = close + 1;
    node->as.text = (const char *)out;
    node->n = (uint32_t)n & 0x1FFFFFFF;
    return true;
}

static bool json_string(json_doc *doc) // at its quote
{
    uint32_t at = json_node_new(doc, JSON_STRING);
    if (at == UINT32_MAX)
        return false;
    const char *start = ++doc->p;
    bool escaped = false;
    for (const char *p = start; p < doc->end; p++) {
        if ((unsigned char)*p < 0x20)
            break;
        if (*p == '\\') {
            escaped = true;
            p++;
        } else if (*p == '"') {
            json_node *node = &doc->nodes[at];
            if (escaped)
                return json_string_escaped(doc, start, p, node);
            node->as.text = start;
            node->n = (uint32_t)(p - start) & 0x1FFFFFFF; // JSON_MAX_BYTES fits
            doc->p = p + 1;
            return true;
        }
    }
    return json_problem(doc, "a string is not closed, or has a control character in it");
}

static bool json_digits(json_doc *doc)
{
    const char *start = doc->p;
    while (doc->p < doc->end && *doc->p >= '0' && *doc->p <= '9')
        doc->p++;
    return doc->p > start;
}

/* strtod, whatever decimal point the host's locale has. */
static double json_strtod(char *text)
{
    char *point = strchr(text, '.');
    if (point)
        *point = *localeconv()->decimal_point;
    return strtod(text, NULL);
}

static bool json_number(json_doc *doc)
{
    const char *start = doc->p;
    char text[64];
    bool ok = true;
    if (*doc->p == '-')
        doc->p++;
    const char *digits = doc->p;
    ok = json_digits(doc) && (*digits != '0' || doc->p == digits + 1);
    if (ok && doc->p < doc->end && *doc->p == '.') {
        doc->p++;
        ok = json_digits(doc);
    }
    if (ok && doc->p < doc->end && (*doc->p | 32) == 'e') {
        doc->p++;
        if (doc->p < doc->end && (*doc->p == '+' || *doc->p == '-'))
            doc->p++;
        ok = json_digits(doc);
    }
    size_t n = (size_t)(doc->p - start);
    if (!ok || n >= sizeof text)
        return json_problem(doc, "a number is malformed");
    uint32_t at = json_node_new(doc, JSON_NUMBER);
    if (at == UINT32_MAX)
        return false;
    memcpy(text, start, n);
    text[n] = 0;
    double value = 0;
    bool integer = n <= 15 && digits == start;
    for (size_t i = 0; i < n && integer; i++) {
        integer = text[i] >= '0' && text[i] <= '9';
        value = value * 10 + (text[i] - '0');
    }
    doc->nodes[at].as.number = integer ? value : json_strtod(text);
    return true;
}

static bool json_word(json_doc *doc)
{
    static const struct {
        const char *text;
        json_type type;
    } words[] = {{"null", JSON_NULL}, {"true", JSON_TRUE}, {"false", JSON_FALSE}};
    for (size_t i = 0; i < MOE_COUNT(words); i++) {
        size_t n = strlen(words[i].text);
        if ((size_t)(doc->end - doc->p) >= n && !memcmp(doc->p, words[i].text, n)) {
            doc->p += n;
            return json_node_new(doc, words[i].type) != UINT32_MAX;
        }
    }
    return json_problem(doc, "expected a value");
}

/* Whether the last member of the object at `at` repeats the key of another. */
static bool json_repeats(const json_doc *doc, uint32_t at, uint32_t key)
{
    const json_node *last = &doc->nodes[key];
    for (uint32_t i = at + 1; i < key; i = doc->nodes[i + 1].end)
        if (doc->nodes[i].n == last->n && !memcmp(doc->nodes[i].as.text, last->as.text, last->n))
            return true;
    return false;
}

/* The key of an object's next member, and its colon. */
static bool json_key(json_doc *doc, uint32_t object)
{
    json_blanks(doc);
    uint32_t key = doc->n;
    if (doc->p >= doc->end || *doc->p != '"')
        return json_problem(doc, "expected a key in quotes");
    if (!json_string(doc))
        return false;
    if (doc->nodes[object].n < JSON_UNIQUE_KEYS && json_repeats(doc, object, key))
        return json_problem(doc, "a key is there twice in one object");
    json_blanks(doc);
    if (doc->p >= doc->end || *doc->p != ':')
        return json_problem(doc, "expected a colon behind a key");
    doc->p++;
    return true;
}

/* One value; containers are only opened. Returns its index in *at. */
static bool json_value(json_doc *doc, uint32_t *at)
{
    json_blanks(doc);
    *at = doc->n;
    if (doc->p >= doc->end)
        return json_problem(doc, "the text ends too early");
    char c = *doc->p;
    if (c == '"')
        return json_string(doc);
    if (c == '-' || (c >= '0' && c <= '9'))
        return json_number(doc);
    if (c != '{' && c != '[')
        return json_word(doc);
    doc->p++;
    return json_node_new(doc, c == '{' ? JSON_OBJECT : JSON_ARRAY) != UINT32_MAX;
}

static bool json_run(json_doc *doc)
{
    uint32_t open[JSON_MAX_DEPTH], at;
    uint32_t depth = 0;
    if (!json_value(doc, &at))
        return false;
    if (doc->nodes[at].type >= JSON_ARRAY)
        open[depth++] = at;
    bool fresh = true; // the innermost container has nothing yet
    while (depth) {
        json_node *box = &doc->nodes[open[depth - 1]];
        char close = box->type == JSON_OBJECT ? '}' : ']';
        json_blanks(doc);
        if (doc->p < doc->end && *doc->p == close) {
            doc->p++;
            box->end = doc->n;
            depth--;
            fresh = false;
            continue;
        }
        if (!fresh && (doc->p >= doc->end || *doc->p++ != ','))
            return json_problem(doc, "expected a comma or the end of a container");
        if (box->n == 0x1FFFFFFF)
            return json_problem(doc, "a container has too many items");
        if (close == '}' && !json_key(doc, open[depth - 1]))
            return false;
        if (!json_value(doc, &at))
            return false;
        doc->nodes[open[depth - 1]].n++;
        fresh = doc->nodes[at].type >= JSON_ARRAY;
        if (!fresh)
            continue;
        if (depth == JSON_MAX_DEPTH)
            return json_problem(doc, "it is nested too deeply");
        open[depth++] = at;
    }
    json_blanks(doc);
    return doc->p == doc->end || json_problem(doc, "something follows the value");
}

static void json_free(json_doc *doc)
{
    mem_free(doc->arena->mem, doc->nodes);
    doc->nodes = NULL;
}

/* Parses a document. On failure nothing has to be freed but the arena. */
static moe_status json_parse(json_doc *doc, const char *text, uint64_t bytes, text_arena *arena,
                             const char *subject, moe_error *error)
{
    *doc = (json_doc){.arena = arena, .start = text, .p = text, .end = text + bytes};
    if (bytes > JSON_MAX_BYTES)
        return fail(error, MOE_ERR_LIMIT, subject, "expected at most %d bytes of JSON, got %llu",
                    JSON_MAX_BYTES, (unsigned long long)bytes);
    size_t good = utf8_valid((const uint8_t *)text, (size_t)bytes);
    if (good != bytes)
        return fail(error, MOE_ERR_FORMAT, subject, "expected JSON in UTF-8, byte %zu is not",
                    good);
    if (bytes >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3))
        doc->p += 3;
    if (json_run(doc))
        return MOE_OK;
    json_free(doc);
    if (doc->problem == json_no_memory)
        return fail_memory(error, arena->mem, subject, bytes);
    return fail(error, MOE_ERR_FORMAT, subject, "malformed JSON at byte %lld: %s",
                (long long)(doc->p - doc->start), doc->problem);
}

/* ----------------------------------------------------------------------------------- reading -- */

/* A value of a document; node is NULL for one that is not there. */
typedef struct json_ref {
    const json_doc *doc;
    const json_node *node;
} json_ref;

static json_type json_typeof(json_ref v)
{
    return v.node ? (json_type)v.node->type : JSON_NULL;
}

static bool json_is(json_ref v, const char *text)
{
    return json_typeof(v) == JSON_STRING && v.node->n == strlen(text) &&
           !memcmp(v.node->as.text, text, v.node->n);
}

/* A member of an object. */
static json_ref json_get(json_ref object, const char *key)
{
    json_ref none = {object.doc, NULL};
    if (json_typeof(object) != JSON_OBJECT)
        return none;
    const json_node *nodes = object.doc->nodes, *k = object.node + 1;
    size_t bytes = strlen(key);
    for (uint32_t i = 0; i < object.node->n; i++, k = nodes + k[1].end)
        if (k->n == bytes && !memcmp(k->as.text, key, bytes))
            return (json_ref){object.doc, k + 1};
    return none;
}

/* Iteration: for (json_ref v = json_first(array); v.node; v = json_next(array, v)). Over an object
 * it gives the keys; the member's value is json_held(key). */
static json_ref json_first(json_ref box)
{
    bool any = json_typeof(box) >= JSON_ARRAY && box.node->n;
    return (json_ref){box.doc, any ? box.node + 1 : NULL};
}

static json_ref json_next(json_ref box, json_ref v)
{
    const json_node *nodes = box.doc->nodes;
    uint32_t next = box.node->type == JSON_OBJECT ? v.node[1].end : v.node->end;
    return (json_ref){box.doc, next < box.node->end ? nodes + next : NULL};
}

static json_ref json_held(json_ref key)
{
    return (json_ref){key.doc, key.node + 1};
}

static uint32_t json_count(json_ref box)
{
    return json_typeof(box) >= JSON_ARRAY ? box.node->n : 0;
}

/* True or false; `otherwise` if it is missing or null. */
static bool json_bool(json_ref v, bool otherwise)
{
    json_type type = json_typeof(v);
    return type == JSON_TRUE ? true : type == JSON_FALSE ? false : otherwise;
}

static double json_double(json_ref v, double otherwise)
{
    return json_typeof(v) == JSON_NUMBER ? v.node->as.number : otherwise;
}

/* An id: a whole number below `limit`. False if it is none. */
static bool json_id(json_ref v, uint32_t limit, uint32_t *id)
{
    double number = json_double(v, -1);
    if (!(number >= 0 && number < limit) || number != floor(number))
        return false;
    *id = (uint32_t)number;
    return true;
}

#endif
