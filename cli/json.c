/* cli/json.c - writes JSON. Reading it is not the program's business.
 *
 * It streams, so that a table of logits needs no memory, and it makes valid JSON of any bytes:
 * names and text come from files that may be hostile. */
#include "cli.h"

#include <math.h>
#include <string.h>

/* The length of the UTF-8 character at p, of n bytes; 0 if it is not one. */
static size_t utf8_length(const unsigned char *p, size_t n)
{
    static const struct {
        unsigned char mask, lead;
        size_t bytes;
        uint32_t min;
    } form[] = {{0x80, 0x00, 1, 0}, {0xe0, 0xc0, 2, 0x80}, {0xf0, 0xe0, 3, 0x800},
                {0xf8, 0xf0, 4, 0x10000}};
    for (size_t i = 0; i < CLI_COUNT(form); i++) {
        if ((p[0] & form[i].mask) != form[i].lead || n < form[i].bytes)
            continue;
        uint32_t code = p[0] & (unsigned char)~form[i].mask;
        for (size_t k = 1; k < form[i].bytes; k++) {
            if ((p[k] & 0xc0) != 0x80)
                return 0;
            code = code << 6 | (p[k] & 0x3f);
        }
        bool surrogate = code >= 0xd800 && code <= 0xdfff;
        return code >= form[i].min && code <= 0x10ffff && !surrogate ? form[i].bytes : 0;
    }
    return 0;
}

static void json_quoted(FILE *out, const char *text, size_t text_bytes)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + text_bytes;
    fputc('"', out);
    while (p < end) {
        size_t bytes = utf8_length(p, (size_t)(end - p));
        if (!bytes) {
            fputs("\\ufffd", out);
            p++;
            continue;
        }
        if (*p == '"' || *p == '\\')
            fprintf(out, "\\%c", *p);
        else if (*p == '\n')
            fputs("\\n", out);
        else if (*p == '\t')
            fputs("\\t", out);
        else if (*p < 0x20 || *p == 0x7f)
            fprintf(out, "\\u%04x", *p);
        else
            fwrite(p, 1, bytes, out);
        p += bytes;
    }
    fputc('"', out);
}

static void json_before(cli_json *json, const char *key)
{
    if (json->comma)
        fputc(',', json->out);
    json->comma = true;
    if (key) {
        json_quoted(json->out, key, strlen(key));
        fputc(':', json->out);
    }
}

void json_open(cli_json *json, const char *key, char bracket)
{
    json_before(json, key);
    fputc(bracket, json->out);
    json->comma = false;
}

void json_close(cli_json *json, char bracket)
{
    fputc(bracket, json->out);
    json->comma = true;
}

void json_text(cli_json *json, const char *key, const char *text, size_t text_bytes)
{
    json_before(json, key);
    json_quoted(json->out, text, text_bytes);
}

void json_string(cli_json *json, const char *key, const char *string)
{
    json_text(json, key, string, strlen(string));
}

void json_uint(cli_json *json, const char *key, uint64_t value)
{
    json_before(json, key);
    fprintf(json->out, "%llu", (unsigned long long)value);
}

void json_int(cli_json *json, const char *key, int64_t value)
{
    json_before(json, key);
    fprintf(json->out, "%lld", (long long)value);
}

void json_number(cli_json *json, const char *key, double value, int digits)
{
    json_before(json, key);
    if (isfinite(value))
        fprintf(json->out, "%.*g", digits, value);
    else
        fputs("null", json->out);
}

void json_bool(cli_json *json, const char *key, bool value)
{
    json_before(json, key);
    fputs(value ? "true" : "false", json->out);
}

void json_end(cli_json *json)
{
    fputc('\n', json->out);
    json->comma = false;
}
