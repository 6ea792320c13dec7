/* cli/args.c - options and help, both from the verbs' tables. */
#define _XOPEN_SOURCE 700

#include "cli.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------------------- help -- */

enum { HELP_COLUMN = 31 };

static void help_default(const cli_option *o)
{
    switch (o->kind) {
    case CLI_U32:
        if (*(uint32_t *)o->value)
            printf(" (default %u)", *(uint32_t *)o->value);
        break;
    case CLI_U64:
        printf(" (default %llu)", (unsigned long long)*(uint64_t *)o->value);
        break;
    case CLI_FLOAT:
        printf(" (default %g)", (double)*(float *)o->value);
        break;
    case CLI_CHOICE:
        if (strchr(o->help, '\n'))
            printf("\n%*sone of ", HELP_COLUMN, "");
        else
            printf(": ");
        for (int i = 0; o->choices[i]; i++)
            printf("%s%s", i ? ", " : "", o->choices[i]);
        printf(" (default %s)", o->choices[*(int *)o->value]);
        break;
    default:
        break;
    }
}

static void help_options(const cli_option *table)
{
    for (const cli_option *o = table; o->name; o++) {
        int used = o->letter ? printf("  -%c, --%s", o->letter, o->name)
                             : printf("      --%s", o->name);
        if (o->arg)
            used += printf(" %s", o->arg);
        printf("%*s", used < HELP_COLUMN ? HELP_COLUMN - used : 1, "");
        for (const char *c = o->help; *c; c++)
            if (*c == '\n')
                printf("\n%*s", HELP_COLUMN, "");
            else
                putchar(*c);
        help_default(o);
        putchar('\n');
    }
}

static void help_print(const cli_verb *verb, const cli_option *const *tables)
{
    printf("usage: moe %s %s [options]\n\n%s\n", verb->name, verb->args, verb->summary);
    if (verb->details)
        printf("\n%s\n", verb->details);
    printf("\noptions:\n");
    for (int i = 0; tables[i]; i++)
        help_options(tables[i]);
    printf("%-*sthis text\n", HELP_COLUMN, "  -h, --help");
    printf("\nexamples:\n%s", verb->examples);
}

/* ------------------------------------------------------------------------------- values -- */

bool cli_parse_uint(const char *text, uint64_t *value)
{
    if (!isdigit((unsigned char)*text))
        return false;
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (errno || *end)
        return false;
    *value = v;
    return true;
}

static bool parse_float(const char *text, float *value)
{
    char *end;
    float v = strtof(text, &end);
    if (end == text || *end || isspace((unsigned char)*text) || isnan(v))
        return false;
    *value = v;
    return true;
}

/* "512", "1.5G", "800 MB" is not taken: one number and at most one letter, then an optional "B" or
 * "iB". */
static bool parse_bytes(const char *text, uint64_t *value)
{
    if (!isdigit((unsigned char)*text))
        return false;
    char *end;
    double v = strtod(text, &end);
    static const char letters[] = "KMGT";
    const char *letter = *end ? strchr(letters, toupper((unsigned char)*end)) : NULL;
    if (letter) {
        v = ldexp(v, 10 * (int)(letter - letters + 1));
        end++;
        if (*end == 'i' && end[1] == 'B')
            end++;
    }
    if (*end == 'B')
        end++;
    if (*end || !(v < 0x1p63))
        return false;
    *value = (uint64_t)v;
    return true;
}

static bool parse_choice(const char *text, const char *const *choices, int *value)
{
    for (int i = 0; choices[i]; i++)
        if (!strcmp(text, choices[i])) {
            *value = i;
            return true;
        }
    return false;
}

static bool parse_bias(const char *text, cli_bias_list *list)
{
    const char *equal = strchr(text, '=');
    char id_text[24];
    uint64_t id;
    float bias;
    if (!equal || (size_t)(equal - text) >= sizeof id_text)
        return false;
    memcpy(id_text, text, (size_t)(equal - text));
    id_text[equal - text] = 0;
    if (!cli_parse_uint(id_text, &id) || id > INT32_MAX || !parse_float(equal + 1, &bias))
        return false;
    list->item = cli_alloc(list->item, list->n + 1, sizeof *list->item);
    list->item[list->n++] = (moe_logit_bias){(moe_token)id, bias};
    return true;
}

/* What an argument should have been, or NULL if it was that. */
static const char *value_set(const cli_option *o, const char *text)
{
    uint64_t number;
    switch (o->kind) {
    case CLI_FLAG:
        *(bool *)o->value = true;
        return NULL;
    case CLI_TEXT:
        *(const char **)o->value = text;
        return NULL;
    case CLI_U32:
        if (!cli_parse_uint(text, &number) || number > UINT32_MAX)
            return "a whole number, 0 or more";
        *(uint32_t *)o->value = (uint32_t)number;
        return NULL;
    case CLI_U64:
        return cli_parse_uint(text, o->value) ? NULL : "a whole number, 0 or more";
    case CLI_FLOAT:
        return parse_float(text, o->value) && isfinite(*(float *)o->value) ? NULL : "a number";
    case CLI_BYTES:
        return parse_bytes(text, o->value) ? NULL : "a size such as 800M or 1.5G";
    case CLI_CHOICE:
        return parse_choice(text, o->choices, o->value) ? NULL : "one of ";
    case CLI_BIAS:
        return parse_bias(text, o->value) ? NULL : "ID=BIAS, such as 42=-1.5 or 42=-inf";
    }
    return "nothing";
}

/* ------------------------------------------------------------------------------- parsing -- */

static const cli_option *find_option(const cli_option *const *tables, char letter,
                                     const char *name, size_t name_length)
{
    for (int i = 0; tables[i]; i++)
        for (const cli_option *o = tables[i]; o->name; o++)
            if (letter ? o->letter == letter
                       : strlen(o->name) == name_length && !memcmp(o->name, name, name_length))
                return o;
    return NULL;
}

static bool usage_error(const cli_verb *verb, int *status)
{
    fprintf(stderr, "\nusage: moe %s %s [options]; `moe %s --help` tells more\n", verb->name,
            verb->args, verb->name);
    *status = EXIT_USAGE;
    return false;
}

/* Takes the option at argv[*i], and its argument. */
static bool take_option(const cli_verb *verb, const cli_option *const *tables, int argc,
                        char **argv, int *i, int *status)
{
    const char *word = argv[*i];
    bool is_long = word[1] == '-';
    const char *equal = is_long ? strchr(word, '=') : NULL;
    const char *name = is_long ? word + 2 : word + 1;
    size_t name_length = equal ? (size_t)(equal - name) : strlen(name);
    const cli_option *o = find_option(tables, is_long ? 0 : word[1], name, name_length);
    if (!o) {
        fprintf(stderr, "moe %s: unknown option %s", verb->name, word);
        return usage_error(verb, status);
    }
    const char *value = equal ? equal + 1 : !is_long && word[2] ? word + 2 : NULL;
    if (o->kind == CLI_FLAG && value) {
        fprintf(stderr, "moe %s: %s: --%s takes no argument", verb->name, word, o->name);
        return usage_error(verb, status);
    }
    if (o->kind != CLI_FLAG && !value) {
        if (*i + 1 >= argc) {
            fprintf(stderr, "moe %s: %s needs an argument, %s", verb->name, word, o->arg);
            return usage_error(verb, status);
        }
        value = argv[++*i];
    }
    const char *expected = value_set(o, value);
    if (expected) {
        fprintf(stderr, "moe %s: --%s: expected %s", verb->name, o->name, expected);
        for (int k = 0; o->kind == CLI_CHOICE && o->choices[k]; k++)
            fprintf(stderr, "%s%s", k ? ", " : "", o->choices[k]);
        fprintf(stderr, ", got \"%s\"", value);
        return usage_error(verb, status);
    }
    return true;
}

bool cli_parse(const cli_verb *verb, const cli_option *const *tables, int argc, char **argv,
               const char **positional, int *status)
{
    int n = 0;
    bool options_end = false;
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (!options_end && (!strcmp(word, "--help") || !strcmp(word, "-h"))) {
            help_print(verb, tables);
            *status = EXIT_OK;
            return false;
        }
        if (!options_end && !strcmp(word, "--")) {
            options_end = true;
        } else if (!options_end && word[0] == '-' && word[1]) {
            if (!take_option(verb, tables, argc, argv, &i, status))
                return false;
        } else if (n == verb->n_positional) {
            fprintf(stderr, "moe %s: one argument too many: %s", verb->name, word);
            return usage_error(verb, status);
        } else {
            positional[n++] = word;
        }
    }
    if (n < verb->n_positional) {
        fprintf(stderr, "moe %s: expected %s, got %s", verb->name, verb->args,
                n ? "only one of them" : "nothing");
        return usage_error(verb, status);
    }
    return true;
}
