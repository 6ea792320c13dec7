/* moe.h - the public interface of moe.c, an inference runtime for quantized Mixture-of-Experts
 * language models and the dense models distilled from them.
 *
 * SPDX-License-Identifier: MIT
 *
 * Five kinds of object:
 *
 *     moe_model      weights and tokenizer of one file. Immutable once open: any number of threads
 *                    and sessions may share it.
 *     moe_session    one conversation: the key/value cache, the work buffers and the threads.
 *                    Belongs to one thread at a time.
 *     moe_tokenizer  text <-> token ids. Immutable. A model owns one; it can be opened alone.
 *     moe_decoder    the few bytes of state of one token stream that is being turned into text.
 *     moe_sampler    picks the next token from logits. Belongs to one thread at a time.
 *
 * Rules that hold for every function:
 *   - It returns a moe_status; MOE_OK is 0. Nothing in this library ends the process, prints, reads
 *     the environment or keeps global state.
 *   - On failure output parameters are left as they were, except `*out` object pointers, which are
 *     set to NULL, and a moe_error, which says what was wrong.
 *   - Option structs start with `size`; fill them with their `_init` function, then change what you
 *     need. A library that is newer than the header takes the defaults for the fields it adds.
 *   - Strings are UTF-8. A `const char *` that a function returns lives as long as the object it
 *     was asked of. Pointers that you pass in are not kept after the call, except where a comment
 *     says so (callbacks, cancel flags, a model's memory buffer).
 *   - Sizes are in bytes and end in `_bytes`; counts start with `n_`.
 *
 * The logits of a token sequence are the same bits for any number of threads, any split of the
 * sequence into calls, any way of opening the file, and on every instruction set. A session can be
 * asked to give up the second of these for speed, in models with latent attention: moe_latent.
 */
#ifndef MOE_H
#define MOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0

/* moe.c compiled into your program may be made static with -DMOE_API=static. */
#ifndef MOE_API
#if defined(__GNUC__) && !defined(_WIN32)
#define MOE_API __attribute__((visibility("default")))
#else
#define MOE_API
#endif
#endif

/* ---------------------------------------------------------------------------------- status -- */

typedef enum moe_status {
    MOE_OK = 0,
    MOE_ERR_ARGUMENT = 1,    /* the caller passed something this function does not accept */
    MOE_ERR_MEMORY = 2,      /* the allocator returned NULL */
    MOE_ERR_LIMIT = 3,       /* the memory ceiling, or a fixed limit, would be exceeded */
    MOE_ERR_IO = 4,          /* the operating system or a read callback failed */
    MOE_ERR_FORMAT = 5,      /* the file is malformed */
    MOE_ERR_MODEL = 6,       /* the file is well formed, but describes no model that can run */
    MOE_ERR_UNSUPPORTED = 7, /* valid, but this build cannot do it */
    MOE_ERR_CONTEXT = 8,     /* the tokens do not fit into the session's context */
    MOE_ERR_CANCELLED = 9,   /* the cancel flag was set */
    MOE_ERR_THREAD = 10,     /* threads could not be started */
    MOE_ERR_TEXT = 11,       /* text that the tokenizer cannot encode (invalid UTF-8, for one) */
    MOE_ERR_BACKEND = 12     /* the compute device failed */
} moe_status;

/* What went wrong, for a program (`status`, `subject`) and for a person (`message`).
 * Fill it with zeros; functions that take one accept NULL. All strings are NUL-terminated. */
typedef struct moe_error {
    moe_status status;
    char subject[128];  /* the key, tensor, file or option that is at fault; may be empty */
    char message[512];  /* one line: what was expected, what was found, what to do */
} moe_error;

/* The name of a status, such as "MOE_ERR_FORMAT". Never NULL. */
MOE_API const char *moe_status_name(moe_status status);

/* The version of the library that is linked, such as "0.1.0". */
MOE_API const char *moe_version(void);

/* ------------------------------------------------------------------------------------ host -- */

/* A flag that stops work. Zero-initialize it; it must outlive the objects it was given to. Setting
 * it, from any thread or from a signal handler, ends a running open or eval within 100 ms with
 * MOE_ERR_CANCELLED. It stays set until it is cleared. */
typedef struct moe_cancel {
    int32_t flag;
} moe_cancel;

MOE_API void moe_cancel_set(moe_cancel *cancel);
MOE_API void moe_cancel_clear(moe_cancel *cancel);

typedef enum moe_log_level {
    MOE_LOG_DEBUG = 0,
    MOE_LOG_INFO = 1,
    MOE_LOG_WARN = 2
} moe_log_level;

/* What the host program provides. Every member may be NULL. `user` is passed through. The callbacks
 * must stay valid as long as the objects that were opened with them. */
typedef struct moe_host {
    size_t size;
    void *user;

    /* Memory. `align` is a power of two, at most 4096. Both or neither must be set; called from one
     * thread at a time per object, but from several if several objects are in use. Default: the C
     * library. */
    void *(*alloc)(void *user, size_t bytes, size_t align);
    void (*free)(void *user, void *ptr, size_t bytes, size_t align);

    /* One line of text without a newline, for a log. */
    void (*log)(void *user, moe_log_level level, const char *line);

    /* Progress of a long step: `done` of `total` units. `stage` is "load" or "verify" (bytes, by
     * any thread, but one at a time), or "prefill": tokens of a call of moe_session_eval that takes
     * more than one batch, before each batch and at the end. */
    void (*progress)(void *user, const char *stage, uint64_t done, uint64_t total);

    /* Run task(arg, i) for every i in [0, n) and return when all are done, in any order, on any
     * threads, the caller's included. With it set, the library starts no threads of its own; a
     * session's n is at most its n_threads. */
    void (*parallel_for)(void *user, uint32_t n, void (*task)(void *arg, uint32_t i), void *arg);
} moe_host;

MOE_API void moe_host_init(moe_host *host);

/* ----------------------------------------------------------------------------------- model -- */

typedef int32_t moe_token;

/* The best instruction set that may be used; a missing one is never used. The results are the same
 * bits with each. */
typedef enum moe_isa {
    MOE_ISA_AUTO = 0,
    MOE_ISA_C = 1,      /* portable C */
    MOE_ISA_AVX2 = 2,   /* AVX2, FMA, F16C */
    MOE_ISA_AVX512 = 3, /* AVX-512 F/BW/VL/DQ; VNNI, BF16 */
    MOE_ISA_NEON = 4,   /* AArch64 */
    MOE_ISA_AVXVNNI = 5 /* AVX2 and AVX-VNNI, which has VNNI's products of bytes without AVX-512 */
} moe_isa;

/* Reads `bytes` bytes at `offset` into `dst`. Returns 0, or anything else for failure. */
typedef int (*moe_read_fn)(void *user, uint64_t offset, void *dst, size_t bytes);

struct moe_backend; /* backends/backend.h */

/* Where a model comes from. Exactly one of `path`, `data` and `read` must be set.
 *   path   a file. It is mapped, not read: it must not be shortened while the model is open. For a
 *          split GGUF give the first part; the others are found beside it.
 *   data   `data_bytes` bytes of memory, which must stay valid and unchanged while the model is
 *          open. An alignment of 32 is best.
 *   read   a callback over `read_bytes` bytes. Everything is read during open into memory that
 *          counts against the memory ceiling. */
typedef struct moe_model_options {
    size_t size;
    const moe_host *host; /* copied; NULL for the defaults */

    const char *path;
    const void *data;
    size_t data_bytes;
    moe_read_fn read;
    void *read_user;
    uint64_t read_bytes;

    bool copy;        /* read the file into memory instead of mapping it */
    bool vocab_only;  /* open metadata and tokenizer, no weights; sessions cannot be opened */
    moe_isa isa;
    uint64_t memory_limit_bytes; /* ceiling over everything that this model and its sessions
                                    allocate; mapped file pages are the kernel's and do not count.
                                    0: none */
    const moe_cancel *cancel;    /* NULL: cannot be cancelled. Used during open only. */
    const struct moe_backend *backend; /* NULL: the CPU */
    bool verify;     /* of a .moe file: first compare every byte with its checksum, which reads the
                        whole file. Otherwise that is done for what is decoded, and `moe verify`
                        does it for all */
} moe_model_options;

typedef struct moe_model moe_model;

MOE_API void moe_model_options_init(moe_model_options *options);

/* Opens a model. Every size, offset, name, type and shape in the file is validated before it is
 * used; the error names the key or tensor that is wrong. On success the caller owns *out. */
MOE_API moe_status moe_model_open(moe_model **out, const moe_model_options *options,
                                  moe_error *error);

/* Closes a model; its sessions must be closed before. NULL is allowed. */
MOE_API void moe_model_close(moe_model *model);

/* What was found in a .moe file. */
typedef struct moe_verify_report {
    size_t size;
    uint64_t n_records, n_damaged;
    uint64_t file_bytes;
    uint64_t root; /* the checksum of the directory, and so of the whole file */
} moe_verify_report;

/* Called for each damaged part: its name, like "layer 3, expert 17 (record 40)", and its place. */
typedef void moe_damage_fn(void *user, const char *what, uint64_t offset, uint64_t bytes);

/* Compares every byte of a .moe file with its checksum. MOE_ERR_FORMAT if one differs, with the
 * first damaged part in *error; `damage` (may be NULL) is then called for all, in the order of the
 * file, unless it is the directory that is damaged. `report` may be NULL; fill report->size. Of the
 * options only the source, host, memory limit and cancel flag are used. */
MOE_API moe_status moe_file_verify(const moe_model_options *options, moe_damage_fn *damage,
                                   void *user, moe_verify_report *report, moe_error *error);

/* Hyperparameters and sizes. Counts that a family does not have are 0. */
typedef struct moe_model_info {
    size_t size;
    const char *architecture; /* GGUF name, such as "llama", "qwen3moe" */
    const char *name;         /* general.name, or "" */
    const char *quantization; /* the type that holds most weight bytes, such as "Q4_K" */
    const char *device;       /* such as "CPU (AVX2)" */
    uint32_t n_vocab, n_ctx_train, n_embd, n_layer;
    uint32_t n_head, n_head_kv, head_dim, n_ff;
    uint32_t n_expert, n_expert_used, n_expert_shared, n_ff_expert;
    uint32_t sliding_window;
    uint64_t n_param;             /* weights in all tensors */
    uint64_t n_param_active;      /* weights that one token uses; tied embeddings count once */
    uint64_t weight_bytes;        /* all tensors */
    uint64_t weight_bytes_active; /* bytes that decoding one token reads */
    uint64_t kv_bytes_per_token;  /* with an F16 cache, over all layers */
    uint64_t kv_bytes_per_token_plain; /* the same if each head kept its own keys and values */
    const char *router;    /* in words: how experts are chosen; "" in a dense model */
    const char *attention; /* in words */
    uint32_t n_layer_draft; /* layers for multi-token prediction that sessions can draft with */
} moe_model_info;

/* Set info->size before. */
MOE_API void moe_model_get_info(const moe_model *model, moe_model_info *info);

/* The file's metadata, key by key, as text: strings as they are, numbers in decimal, arrays as
 * "[N] a, b, c, ...". index < moe_model_meta_count(). The return value is the length of the whole
 * value without the NUL, as with snprintf. */
MOE_API size_t moe_model_meta_count(const moe_model *model);
MOE_API const char *moe_model_meta_key(const moe_model *model, size_t index);
MOE_API size_t moe_model_meta_value(const moe_model *model, size_t index, char *buf,
                                    size_t buf_bytes);

typedef struct moe_tensor_info {
    size_t size;
    const char *name;
    const char *type;   /* such as "Q4_K" */
    uint32_t n_dims;
    uint64_t dims[4];   /* dims[0] is contiguous: the length of a row */
    uint64_t offset;    /* in the file that holds it; of experts in a .moe file: of the first */
    uint64_t bytes;
    uint64_t stored_bytes; /* in the file: less than `bytes` if it is compressed */
    /* Of .moe files: the squared error against what it was made from, relative to the squared
     * weights: over all of the tensor, and of its worst expert. 0: the same; negative: unknown. */
    float error, error_worst;
} moe_tensor_info;

MOE_API size_t moe_model_tensor_count(const moe_model *model);
/* Set info->size before. MOE_ERR_ARGUMENT if there is no tensor of that index. */
MOE_API moe_status moe_model_tensor(const moe_model *model, size_t index, moe_tensor_info *info);

/* The tokenizer in the model's file, or NULL if the file has none. Owned by the model. */
typedef struct moe_tokenizer moe_tokenizer;
MOE_API const moe_tokenizer *moe_model_tokenizer(const moe_model *model);

/* --------------------------------------------------------------------------------- session -- */

typedef enum moe_cache_type {
    MOE_CACHE_F16 = 0,  /* latents: integers of 16 bits with a scale per position, as exact */
    MOE_CACHE_Q8_0 = 1, /* 53 % of F16's size */
    MOE_CACHE_F32 = 2
} moe_cache_type;

/* Speculative decoding: which tokens are computed ahead, when tokens are evaluated one by one. It
 * changes how fast the logits come, never a bit of them. */
typedef enum moe_draft {
    MOE_DRAFT_OFF = 0,
    MOE_DRAFT_AUTO = 1,  /* what is there, as far as it is measured to be faster */
    MOE_DRAFT_NGRAM = 2, /* what followed the last tokens where they stood before, always */
    MOE_DRAFT_MTP = 3    /* what the model's layer for multi-token prediction says, always */
} moe_draft;

/* What an observer is shown. Pointers are valid during the call only. */

/* The experts that the router chose in one layer, for tokens at positions [pos, pos + n_tok). */
typedef struct moe_observed_experts {
    size_t size;
    uint32_t layer, pos, n_tok, n_used, n_expert;
    const int32_t *ids;    /* [n_tok][n_used], the best first */
    const float *weights;  /* [n_tok][n_used]: what their outputs are multiplied with */
} moe_observed_experts;

/* What a weight matrix, or each matrix of a stack (experts, heads), is multiplied with. Product i,
 * of n_product, is that of matrix[i] and the n_in floats at rows + i / n_per_row * row_stride. */
typedef struct moe_observed_input {
    size_t size;
    const char *tensor;    /* the name in the model's file */
    uint32_t n_in, n_matrix;
    uint32_t n_product, n_per_row, row_stride;
    const float *rows;
    const int32_t *matrix; /* [n_product], all < n_matrix */
} moe_observed_input;

/* Looks on while a session computes. Each member may be NULL. The calls come from the thread that
 * is in moe_session_eval, layer by layer, for each batch of tokens; also for tokens that are
 * computed ahead in vain or whose call fails later, but not again for kept ones that are computed
 * anew. Observing costs time and a copy of what is looked at, and changes no result. The functions
 * must not use the session. */
typedef struct moe_observer {
    size_t size;
    void *user;
    void (*experts)(void *user, const moe_observed_experts *observed);
    void (*input)(void *user, const moe_observed_input *observed);
} moe_observer;

MOE_API void moe_observer_init(moe_observer *observer);

/* How a model with latent attention computes it (DeepSeek V2 and V3 and their kin; others: no
 * difference). The cache is the same, and so is the form for few tokens.
 *   absorbed  queries are multiplied into the space of the latents, always
 *   expanded  where a call of moe_session_eval has so many tokens that it takes less time, from
 *             some hundreds on, keys and values are made from the latents for each head. That is
 *             faster, the more so the longer the prompt and the larger n_batch. It rounds
 *             differently: logits then depend also on how long the calls were, but still on no
 *             batch, thread or instruction set */
typedef enum moe_latent {
    MOE_LATENT_ABSORBED = 0,
    MOE_LATENT_EXPANDED = 1
} moe_latent;

typedef struct moe_session_options {
    size_t size;
    uint32_t n_ctx;      /* tokens the cache holds. 0: the model's training length, at most 4096 */
    uint32_t n_batch;    /* tokens computed at once in prefill, 1..4096. Default 512. A cost in
                            memory and a gain in speed; never a change in the results */
    uint32_t n_logits;   /* rows of logits computed at once when many are asked for, 1..4096.
                            Default 1 */
    uint32_t n_threads;  /* 0: one per physical core. More than 256 is an error */
    moe_cache_type cache_type;
    const moe_cancel *cancel; /* kept; NULL: cannot be cancelled */
    moe_draft draft;     /* default: off */
    uint32_t n_draft;    /* tokens computed ahead at most, 1..15. Default 8 */
    const moe_observer *observer; /* copied; NULL: nobody looks on */
    moe_latent latent;   /* latent attention. Default: absorbed */
} moe_session_options;

typedef struct moe_session moe_session;

MOE_API void moe_session_options_init(moe_session_options *options);

/* What a session with these options will allocate, before it does. */
typedef struct moe_memory_estimate {
    size_t size;
    uint64_t cache_bytes;       /* key/value cache, and states of recurrent layers */
    uint64_t work_bytes;        /* activations and logits */
    uint64_t total_bytes;       /* all of the session */
    uint32_t n_ctx;             /* the context that these options ask for */
    uint32_t n_ctx_max;         /* the longest context that would fit under the memory ceiling, or
                                   into the memory that is free now if there is no ceiling */
    bool fits;
} moe_memory_estimate;

/* Set estimate->size before. */
MOE_API moe_status moe_session_estimate(const moe_model *model, const moe_session_options *options,
                                        moe_memory_estimate *estimate, moe_error *error);

/* Opens a session. Everything it will need is allocated here; MOE_ERR_LIMIT, with the context
 * length that would fit, if that is over the model's memory ceiling or over the free memory. */
MOE_API moe_status moe_session_open(moe_session **out, moe_model *model,
                                    const moe_session_options *options, moe_error *error);

/* Closes a session. NULL is allowed. */
MOE_API void moe_session_close(moe_session *session);

/* Appends tokens[0..n_tok) to the session's sequence and computes.
 *   n_logits  for how many of the last tokens the logits are wanted, 0..n_tok
 *   logits    [n_logits][n_vocab] floats, written; NULL if n_logits is 0
 * In a session that drafts, a call with one token and one row of logits may compute more tokens
 * than that, and the next calls, if they bring those tokens, return at once.
 * On failure the sequence is as long as before the call; with MOE_ERR_CANCELLED too. */
MOE_API moe_status moe_session_eval(moe_session *session, const moe_token *tokens, size_t n_tok,
                                    size_t n_logits, float *logits);

/* How it went with tokens computed ahead, since the session was opened. */
typedef struct moe_draft_stats {
    size_t size;
    uint64_t n_evaluations; /* that computed tokens ahead */
    uint64_t n_drafted;     /* tokens computed ahead */
    uint64_t n_accepted;    /* of those, tokens that were then asked for */
    double saved_s;         /* seconds saved, by the measured time of single tokens; may be < 0 */
} moe_draft_stats;

/* Set stats->size before. */
MOE_API void moe_session_draft_stats(const moe_session *session, moe_draft_stats *stats);

/* The number of tokens in the sequence, and the number that fit. */
MOE_API uint32_t moe_session_length(const moe_session *session);
MOE_API uint32_t moe_session_capacity(const moe_session *session);

/* The number of threads that compute, the caller's included. */
MOE_API uint32_t moe_session_threads(const moe_session *session);

/* Forgets all but the first n_tok tokens. n_tok <= length. It costs nothing, except in two kinds of
 * model, in which the next call may have to compute kept tokens anew:
 *   - layers with a sliding window hold what they look at and n_batch tokens more: after going back
 *     further than n_batch tokens all kept ones are computed;
 *   - recurrent layers (convolutions, linear attention) hold the states of four positions: the
 *     present one and those before the last calls with more than one token, and behind the last of
 *     those, or of moe_session_checkpoint(). What lies between such a position and n_tok is
 *     computed, unless it belongs to a call of at most 16 tokens that was the last. */
MOE_API moe_status moe_session_rewind(moe_session *session, uint32_t n_tok);

/* Makes the present position one that recurrent layers can go back to at no cost, as long as not
 * too many later ones push it out. Models without such layers have nothing to do. */
MOE_API moe_status moe_session_checkpoint(moe_session *session);

/* Why the last call on this session failed. Owned by the session; overwritten by the next call. */
MOE_API const moe_error *moe_session_error(const moe_session *session);

/* --------------------------------------------------------------------------------- sampler -- */

typedef struct moe_logit_bias {
    moe_token token;
    float bias; /* added to the logit; -INFINITY forbids the token */
} moe_logit_bias;

/* The steps are applied in the order of the fields. A value of "off" leaves a step out. */
typedef struct moe_sampler_options {
    size_t size;
    const moe_logit_bias *logit_bias; /* copied */
    size_t n_logit_bias;
    uint32_t penalty_window;   /* tokens looked back on by the penalties. Default 64; 0 is off */
    float repetition_penalty;  /* > 0; divides positive and multiplies negative logits. 1 is off */
    float frequency_penalty;   /* subtracted per earlier occurrence. 0 is off */
    float presence_penalty;    /* subtracted once if it occurred. 0 is off */
    float temperature;         /* >= 0; 0 is greedy: the best logit, ties to the lowest id */
    uint32_t top_k;            /* 0 is off */
    float top_p;               /* 0 < top_p <= 1; 1 is off */
    float min_p;               /* 0 <= min_p < 1, relative to the best token. 0 is off */
    uint64_t seed;             /* the same seed and logits give the same tokens, everywhere */
} moe_sampler_options;

typedef struct moe_sampler moe_sampler;

/* Defaults: greedy, no penalties. */
MOE_API void moe_sampler_options_init(moe_sampler_options *options);

/* `host` may be NULL; only its allocator is used. The caller owns *out. */
MOE_API moe_status moe_sampler_new(moe_sampler **out, uint32_t n_vocab,
                                   const moe_sampler_options *options, const moe_host *host,
                                   moe_error *error);
MOE_API void moe_sampler_free(moe_sampler *sampler); /* NULL is allowed */

/* Picks a token from logits [n_vocab] and remembers it for the penalties. MOE_ERR_ARGUMENT if no
 * logit is finite. */
MOE_API moe_status moe_sampler_pick(moe_sampler *sampler, const float *logits, moe_token *token);

/* Tells the sampler of a token that it did not pick, such as the prompt's. */
MOE_API void moe_sampler_accept(moe_sampler *sampler, moe_token token);

/* Forgets the history and starts the random numbers anew from the seed. */
MOE_API void moe_sampler_reset(moe_sampler *sampler);

/* ------------------------------------------------------------------------------- tokenizer -- */

typedef enum moe_encode_flags {
    MOE_ENCODE_PLAIN = 0,       /* the text, nothing else; "<|im_end|>" in it stays text */
    MOE_ENCODE_ADD_SPECIAL = 1, /* add BOS/EOS as the model's tokenizer says */
    MOE_ENCODE_PARSE_SPECIAL = 2 /* text that spells a special token becomes that token: for
                                    templates, never for text from a user */
} moe_encode_flags;

/* Opens a tokenizer alone, from a GGUF file (with or without weights) or a Hugging Face
 * tokenizer.json. Takes the source and the host of the options. The caller owns *out. */
MOE_API moe_status moe_tokenizer_open(moe_tokenizer **out, const moe_model_options *options,
                                      moe_error *error);

/* Only for tokenizers from moe_tokenizer_open. NULL is allowed. */
MOE_API void moe_tokenizer_close(moe_tokenizer *tokenizer);

/* Encodes text [text_bytes] (need not be NUL-terminated; NUL bytes are text). Bytes that are not
 * valid UTF-8 are replaced by U+FFFD, one for each maximal invalid sequence, before encoding.
 *   flags     moe_encode_flags, or-ed
 *   tokens    [capacity], written as far as it goes; may be NULL if capacity is 0
 *   n_tokens  the number of tokens of the whole text, also when it is more than capacity
 * MOE_ERR_LIMIT if capacity was too small (the tokens that fit are written). */
MOE_API moe_status moe_tokenizer_encode(const moe_tokenizer *tokenizer, const char *text,
                                        size_t text_bytes, uint32_t flags, moe_token *tokens,
                                        size_t capacity, size_t *n_tokens, moe_error *error);

/* The state of one stream of tokens; initialize it with zeros. */
typedef struct moe_decoder {
    uint8_t pending[16]; /* bytes of an unfinished UTF-8 sequence */
    uint8_t n_pending;
    bool started;
    bool show_special;   /* set it to get special tokens as text; default: they are left out */
} moe_decoder;

/* Turns the next token into text: writes whole UTF-8 characters to buf [buf_bytes] with a NUL and
 * returns their length, which is 0 while a character is unfinished. A return value >= buf_bytes
 * means that buf was too small and nothing was done; 256 is enough for all but odd tokenizers.
 * With token = -1 the stream ends: what is unfinished comes out as U+FFFD. */
MOE_API size_t moe_tokenizer_decode(const moe_tokenizer *tokenizer, moe_decoder *decoder,
                                    moe_token token, char *buf, size_t buf_bytes);

MOE_API uint32_t moe_tokenizer_size(const moe_tokenizer *tokenizer);

/* The token's text as it stands in the vocabulary, not NUL-terminated. MOE_ERR_ARGUMENT for an id
 * that does not exist. */
MOE_API moe_status moe_tokenizer_piece(const moe_tokenizer *tokenizer, moe_token token,
                                       const char **piece, size_t *piece_bytes);

/* Special tokens; -1 for one that the tokenizer does not have. */
MOE_API moe_token moe_tokenizer_bos(const moe_tokenizer *tokenizer);
MOE_API moe_token moe_tokenizer_eos(const moe_tokenizer *tokenizer);

/* True for a token that ends a generation: end of text, of turn, of message. */
MOE_API bool moe_tokenizer_is_end(const moe_tokenizer *tokenizer, moe_token token);

/* The model's chat template (Jinja source), or NULL. */
MOE_API const char *moe_tokenizer_chat_template(const moe_tokenizer *tokenizer);

#ifdef __cplusplus
}
#endif
#endif
