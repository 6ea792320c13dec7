/* cli/main.c - the `moe` program: finds the verb. */
#include "cli.h"

#include <string.h>

static const cli_verb *const verbs[] = {&verb_run,    &verb_info, &verb_verify, &verb_tokenize,
                                        &verb_logits, &verb_eval, &verb_bench,  &verb_experts,
                                        &verb_imatrix};

static void usage(FILE *out)
{
    fputs("moe: runs quantized language models on the CPU\n\n", out);
    for (size_t i = 0; i < CLI_COUNT(verbs); i++)
        fprintf(out, "  moe %-9s %-12s %s\n", verbs[i]->name, verbs[i]->args, verbs[i]->summary);
    fputs("\n`moe VERB --help` lists the options of a verb and shows examples.\n"
          "`moe --version` prints the version.\n"
          "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.\n", out);
}

static const cli_verb *find_verb(const char *name)
{
    for (size_t i = 0; i < CLI_COUNT(verbs); i++)
        if (!strcmp(name, verbs[i]->name))
            return verbs[i];
    return NULL;
}

int main(int argc, char **argv)
{
    system_start(&argc, &argv);
    const char *name = argc > 1 ? argv[1] : "";
    if (!strcmp(name, "--version")) {
        printf("moe %s\n", moe_version());
        return EXIT_OK;
    }
    bool asked = !strcmp(name, "help") || !strcmp(name, "--help") || !strcmp(name, "-h");
    if (asked && argc == 2) {
        usage(stdout);
        return EXIT_OK;
    }
    const cli_verb *verb = find_verb(asked ? argv[2] : name);
    if (!verb) {
        const char *dot = strrchr(name, '.');
        if (dot && (!strcmp(dot, ".gguf") || !strcmp(dot, ".moe")))
            fprintf(stderr, "moe: a verb comes first: moe run %s -p \"...\"\n\n", name);
        else if (*name)
            fprintf(stderr, "moe: unknown verb \"%s\"\n\n", asked ? argv[2] : name);
        usage(stderr);
        return EXIT_USAGE;
    }
    system_catch_interrupt(true);
    char *help[] = {(char *)(uintptr_t)verb->name, (char *)(uintptr_t)"--help"};
    int status = asked ? verb->run(2, help) : verb->run(argc - 1, argv + 1);
    if ((fflush(stdout) || ferror(stdout)) && status == EXIT_OK)
        status = cli_fail("standard output: cannot write");
    return status;
}
