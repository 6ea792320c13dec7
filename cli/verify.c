/* cli/verify.c - `moe verify`: is every byte of a .moe file as it was written? */
#include "cli.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct verify_damage {
    char *name;
    uint64_t offset, bytes;
} verify_damage;

typedef struct verify_list {
    verify_damage *item; // [n]
    size_t n;
} verify_list;

static void verify_add(void *user, const char *what, uint64_t offset, uint64_t bytes)
{
    verify_list *list = user;
    list->item = cli_alloc(list->item, list->n + 1, sizeof *list->item);
    char *name = cli_alloc(NULL, strlen(what) + 1, 1);
    memcpy(name, what, strlen(what) + 1);
    list->item[list->n++] = (verify_damage){name, offset, bytes};
}

static void verify_json(const char *path, moe_status status, const moe_error *error,
                        const moe_verify_report *report, const verify_list *list)
{
    char root[24];
    cli_json json = {.out = stdout};
    snprintf(root, sizeof root, "%016" PRIx64, report->root);
    json_open(&json, NULL, '{');
    json_string(&json, "file", path);
    json_bool(&json, "good", status == MOE_OK);
    if (status)
        json_string(&json, "reason", error->message);
    json_uint(&json, "bytes", report->file_bytes);
    json_uint(&json, "n_records", report->n_records);
    json_string(&json, "root", root);
    json_open(&json, "damaged", '[');
    for (size_t i = 0; i < list->n; i++) {
        json_open(&json, NULL, '{');
        json_string(&json, "record", list->item[i].name);
        json_uint(&json, "offset", list->item[i].offset);
        json_uint(&json, "bytes", list->item[i].bytes);
        json_close(&json, '}');
    }
    json_close(&json, ']');
    json_close(&json, '}');
    json_end(&json);
}

static int verify_main(int argc, char **argv)
{
    bool json = false;
    cli_common common;
    if (!common_init(&common))
        return EXIT_USAGE;
    const cli_option table[] = {
        {0, "json", CLI_FLAG, &json, NULL, "print one JSON object", NULL},
        {'q', "quiet", CLI_FLAG, &common.quiet, NULL, "no progress", NULL},
        {0},
    };
    const cli_option *tables[] = {table, NULL};
    const char *path[1];
    int status;
    if (!cli_parse(&verb_verify, tables, argc, argv, path, &status))
        return status;
    moe_host host;
    moe_model_options options;
    moe_error error = {0};
    verify_list list = {0};
    moe_verify_report report = {.size = sizeof report};
    common_model_options(&options, &host, path[0], &common);
    const moe_status result = moe_file_verify(&options, verify_add, &list, &report, &error);
    progress_clear();
    if (json && result != MOE_ERR_CANCELLED) {
        verify_json(path[0], result, &error, &report, &list);
        status = result ? EXIT_FAILED : EXIT_OK;
    } else if (result) {
        for (size_t i = 0; i < list.n; i++)
            printf("damaged: %s, %" PRIu64 " bytes at %" PRIu64 "\n", list.item[i].name,
                   list.item[i].bytes, list.item[i].offset);
        status = cli_fail_open(result, &error, path[0], &common);
    } else {
        cli_size size;
        printf("%s: good, %s in %" PRIu64 " records, root %016" PRIx64 "\n", path[0],
               cli_size_text(&size, report.file_bytes), report.n_records, report.root);
        status = EXIT_OK;
    }
    for (size_t i = 0; i < list.n; i++)
        free(list.item[i].name);
    free(list.item);
    return status;
}

const cli_verb verb_verify = {
    "verify", "FILE", "compares every byte of a .moe file with its checksum",
    "Names what is damaged: the directory, or a record, which is a tensor or an expert. The exit\n"
    "status is 0 if all is as it was written, else 1.",
    "  moe verify model.moe\n"
    "  moe verify model.moe --json | jq .damaged\n",
    1, verify_main};
