/* cli/cli.h - what the verbs of the `moe` program share.
 *
 * The program is an ordinary user of the library: it includes moe.h and nothing else of it. One
 * file per verb (run.c, info.c, ...); args.c reads options and prints help, json.c writes JSON,
 * common.c opens models and reports errors, system.c asks the operating system (POSIX, Windows).
 *
 * Conventions: results go to stdout, everything else to stderr. A verb returns its exit status. */
#ifndef MOE_CLI_CLI_H
#define MOE_CLI_CLI_H

#include <stdio.h>

#include "../moe.h"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

#if defined(__MINGW32__) && !defined(__clang__) /* there "printf" is what Microsoft's knows */
#define CLI_PRINTF(fmt, args) __attribute__((format(gnu_printf, fmt, args)))
#elif defined(__GNUC__) || defined(__clang__)
#define CLI_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define CLI_PRINTF(fmt, args)
#endif

#define CLI_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* -------------------------------------------------------------------------------- args.c -- */

typedef enum cli_kind {
    CLI_FLAG,   /* bool: set by being there */
    CLI_TEXT,   /* const char * */
    CLI_U32,    /* uint32_t */
    CLI_U64,    /* uint64_t */
    CLI_FLOAT,  /* float, finite */
    CLI_BYTES,  /* uint64_t, with an optional K, M, G or T (powers of 1024) */
    CLI_CHOICE, /* int: the index into `choices` */
    CLI_BIAS    /* cli_bias_list: ID=BIAS, may be repeated */
} cli_kind;

/* One option. Help shows the value that the variable has before parsing as the default, unless it
 * is zero or NULL. */
typedef struct cli_option {
    char letter;              /* 0: none */
    const char *name;         /* without the dashes; NULL ends a table */
    cli_kind kind;
    void *value;
    const char *arg;          /* what the argument is called in help; NULL for a flag */
    const char *help;
    const char *const *choices; /* CLI_CHOICE: names, NULL at the end */
} cli_option;

typedef struct cli_bias_list {
    moe_logit_bias *item;
    size_t n;
} cli_bias_list;

typedef struct cli_verb {
    const char *name;
    const char *args;     /* such as "MODEL FILE" */
    const char *summary;  /* one line */
    const char *details;  /* the rest of the help text */
    const char *examples;
    int n_positional;     /* how many there must be */
    int (*run)(int argc, char **argv);
} cli_verb;

extern const cli_verb verb_run, verb_info, verb_verify, verb_tokenize, verb_logits, verb_eval,
    verb_bench, verb_experts, verb_imatrix;

/* Reads the arguments of a verb: argv[0] is the verb's name. Options and positional arguments may
 * be mixed; "--" ends options. `tables` ends with NULL. False if the verb is over: help was asked
 * for or the arguments were wrong, all has been said, and *status is the exit status. */
bool cli_parse(const cli_verb *verb, const cli_option *const *tables, int argc, char **argv,
               const char **positional, int *status);

/* Whole, and in range of an unsigned 64-bit number. */
bool cli_parse_uint(const char *text, uint64_t *value);

/* -------------------------------------------------------------------------------- json.c -- */

/* Writes JSON as it goes. Keeps the commas; the caller keeps the nesting. */
typedef struct cli_json {
    FILE *out;
    bool comma; /* the next value needs one before it */
} cli_json;

/* `key` is NULL inside arrays and at the top. Text may be any bytes: what is not UTF-8 becomes
 * U+FFFD. A number that is not finite becomes null. */
void json_open(cli_json *json, const char *key, char bracket); /* '{' or '[' */
void json_close(cli_json *json, char bracket);
void json_text(cli_json *json, const char *key, const char *text, size_t text_bytes);
void json_string(cli_json *json, const char *key, const char *string);
void json_uint(cli_json *json, const char *key, uint64_t value);
void json_int(cli_json *json, const char *key, int64_t value);
void json_number(cli_json *json, const char *key, double value, int digits);
void json_bool(cli_json *json, const char *key, bool value);
void json_end(cli_json *json); /* the final newline */

/* ------------------------------------------------------------------------------ common.c -- */

/* Options that all verbs with a model have, and what comes of them. */
typedef struct cli_common {
    uint32_t n_threads;
    int isa;
    bool no_mmap;
    uint64_t memory_limit_bytes;
    bool verbose;
    bool quiet;
} cli_common;

/* The defaults, with MOE_THREADS and MOE_ISA heeded. False, with a message, if they make no sense.
 * */
bool common_init(cli_common *common);

/* The table of the common options; `table` has room for COMMON_OPTIONS. */
enum { COMMON_OPTIONS = 7 };
const cli_option *common_options(cli_common *common, cli_option table[COMMON_OPTIONS]);

/* Values of --cache, in the order of moe_cache_type. */
extern const char *const cache_names[];
/* Of --latent, in the order of moe_latent, and what --help says of it. */
extern const char *const latent_names[];
#define LATENT_HELP                                                                                \
    "latent attention (DeepSeek) of a prompt: expanded is faster,\nmost of all with long prompts " \
    "and --batch 2048; absorbed\nrounds as decode does"

/* Opens the model at `path`; on failure says why and returns the exit status. */
int common_open(moe_model **model, const char *path, const cli_common *common);
/* With --verbose: tells what was opened, and what computes it. */
void common_opened(const moe_model *model, const char *path, const cli_common *common);
void common_model_options(moe_model_options *options, moe_host *host, const char *path,
                          const cli_common *common);
/* The defaults, with the common options and the cancel flag in them. `cache` is the index of a
 * cache name. */
void common_session_options(moe_session_options *options, const cli_common *common, int cache);
int common_session(moe_session **session, moe_model *model, const moe_session_options *options);

/* Prints "moe: ..." for a person. Returns EXIT_FAILED. */
CLI_PRINTF(1, 2) int cli_fail(const char *format, ...);
/* The same for a failed call; EXIT_INTERRUPTED if it was cancelled. `hint` says what to do next, or
 * is NULL. */
int cli_fail_status(moe_status status, const moe_error *error, const char *hint);
/* The same for a file that could not be opened. */
int cli_fail_open(moe_status status, const moe_error *error, const char *path,
                  const cli_common *common);

/* Reads all of a file, or of stdin if path is NULL or "-". NULL, with a message, on failure. The
 * caller frees it. A NUL follows the last byte. */
char *cli_read_all(const char *path, size_t *bytes);

/* Encodes text. NULL, with a message, on failure. The caller frees it. */
moe_token *cli_encode(const moe_tokenizer *tokenizer, const char *text, size_t text_bytes,
                      uint32_t flags, size_t *n_tokens);

/* Text from tokens: a buffer that grows as odd tokenizers need it. Zero-initialize; free data. */
typedef struct cli_text {
    char *data;
    size_t room;
} cli_text;

/* Decodes one token, -1 to end the stream, into text->data; the length of the text. */
size_t cli_decode(const moe_tokenizer *tokenizer, moe_decoder *decoder, moe_token token,
                  cli_text *text);

/* realloc with n * item_bytes checked; a failure is reported and ends the program, which holds
 * nothing that needs care. */
void *cli_alloc(void *old, size_t n, size_t item_bytes);

/* Writes text to stdout at once. On a terminal, control characters other than newline and tab are
 * shown, not obeyed. */
void cli_write_text(const char *text, size_t text_bytes);

/* For qsort. */
int cli_compare_doubles(const void *a, const void *b);

/* "1.23 GB" in a buffer of the caller. Powers of 1000. */
typedef struct cli_size { char text[24]; } cli_size;
const char *cli_size_text(cli_size *buffer, uint64_t bytes);

/* A file that appears under its name only when it is whole: written beside it first. "-" is
 * standard output; devices and pipes are written to as they are. */
typedef struct cli_output {
    FILE *file;
    const char *path;
    char *partial; /* NULL if it is written directly */
} cli_output;

bool output_open(cli_output *output, const char *path);
bool output_write(cli_output *output, const void *data, size_t bytes);
/* Puts the file into its place, or removes what there is of it. False, with a message, on failure.
 * */
bool output_close(cli_output *output, bool keep);

/* A text as `moe eval` and `moe imatrix` see it: tokens in windows, each computed alone. What is
 * left over at the end is dropped. A BOS of the tokenizer replaces each window's first token. */
typedef struct cli_windows {
    moe_token *tokens;  /* [n_window][window]; the caller frees it */
    uint32_t window, n_window;
    size_t n_text;      /* tokens of the whole text */
    bool bos;
} cli_windows;

/* Reads a file ("-": standard input) into windows of `window` tokens; a shorter text is one
 * window. */
enum { WINDOW_MIN = 4 };
int windows_read(cli_windows *w, const moe_tokenizer *tokenizer, const char *path, uint32_t window);

/* ----------------------------------------------------------------------------- experts.c -- */

/* Writes a trace of experts, by way of an observer. */
typedef struct cli_trace cli_trace;

/* Fills the observer; EXIT_OK, or all has been said. */
int trace_open(cli_trace **trace, const char *path, const moe_model *model, moe_observer *observer);
/* After the last evaluation. Without `keep` there is no file. NULL is allowed. */
int trace_close(cli_trace *trace, bool keep);

/* ---------------------------------------------------------------------------- progress.c -- */

/* A bar on stderr, if that is a terminal. */
void progress_show(const char *stage, uint64_t done, uint64_t total);
void progress_clear(void);
void progress_enable(bool enable);

/* ------------------------------------------------------------------------------ system.c -- */

extern moe_cancel cli_cancel;    /* set by Ctrl-C and SIGTERM */
/* The first thing in main(): has the arguments in UTF-8, and streams that are open and leave bytes
 * alone. */
void system_start(int *argc, char ***argv);
/* Ctrl-C and SIGTERM set the flag, or else end the program. */
void system_catch_interrupt(bool by_flag);
/* True for a path of nothing or of a regular file, which another file may take the place of; false
 * for devices, pipes and folders. */
bool system_is_replaceable(const char *path);
bool system_interrupted(void);
bool system_is_terminal(FILE *file);
/* Columns of a terminal whose lines can be written over; 0 if it is none. */
int system_screen_columns(FILE *file);
double system_seconds(void);     /* monotonic */
uint64_t system_peak_rss_bytes(void);
/* As fopen(); a path is UTF-8. NULL and errno, if that fails. */
FILE *system_open_file(const char *path, const char *mode);
/* Gives a file another name, whose file, if there is one, is gone at the same moment. */
bool system_replace_file(const char *from, const char *to);
void system_remove_file(const char *path);

#endif
