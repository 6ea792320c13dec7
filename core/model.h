/* core/model.h - a model in memory: hyperparameters, weights by role, and what a family is.
 *
 * The structs are unions over all families: a weight that a family does not have is absent
 * (weight_present() is false), a number it does not have is 0. Layer code asks for what is there;
 * it does not ask for the name of the family. */
#ifndef MOE_CORE_MODEL_H
#define MOE_CORE_MODEL_H

#include "../backends/backend.h"
#include "directory.h"

enum {
    MODEL_MAX_LAYERS = 1024,
    MODEL_MAX_EXPERTS = 1024,
    MODEL_MAX_EMBD = 1 << 18,
    MODEL_MAX_HEADS = 4096,
    MODEL_MAX_HEAD_DIM = 2048,
    MODEL_MAX_FF = 1 << 22,
    MODEL_MAX_CTX = 1 << 30
};

typedef enum moe_rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_YARN } moe_rope_scaling;

typedef struct moe_rope_params {
    float base;
    moe_rope_scaling scaling;
    float factor;            // context is stretched by this; 1: not at all
    float attn_factor;       // extra factor on cos and sin
    double log_multiplier;   // YaRN: cos and sin grow by 1 + this * ln(factor); 0: not at all
    float beta_fast, beta_slow;
    bool divided;            // frequencies are divided by the model's rope_freqs, if it has them
    bool no_truncate;        // YaRN: the ends of the ramp are not rounded to whole pairs
    uint32_t n_ctx_original; // YaRN: context length before stretching
} moe_rope_params;

/* Heads of a delta rule: n_head states [dim_k][dim_v], n_head_k queries and keys. */
typedef struct moe_delta_shape {
    uint32_t n_head, n_head_k, dim_k, dim_v;
    bool tiled; // head h reads key head h mod n_head_k, else h / (n_head / n_head_k)
} moe_delta_shape;

/* Attention heads: n_kv keys and values of dim and dim_v elements, of which n_rot are rotated. */
typedef struct moe_head_shape {
    uint32_t n_kv, dim, dim_v, n_rot;
} moe_head_shape;

typedef struct moe_hparams {
    uint32_t n_vocab, n_ctx_train, n_embd, n_layer;
    uint32_t n_head, n_head_kv, head_dim, head_dim_v;
    uint32_t n_latent;        // latent attention: what keys and values are made from; 0: none
    uint32_t n_latent_q;      // latent attention: the same for queries; 0: none
    bool latent_split;        // its up-projection comes as one matrix for keys, one for values
    uint32_t n_conv;          // short convolution: positions it looks at; 0: none
    moe_delta_shape delta;    // what stands behind it; n_head 0: nothing
    uint32_t recurrent_layers[MODEL_MAX_LAYERS / 32]; // bit i: layer i has these, and a state, in
                                                      // the place of attention, keys and values
    bool q_gated;             // each head of q is followed by a gate for the head's output
    uint32_t n_ff;
    uint32_t n_rot;           // elements of a head that are rotated
    bool rope_interleaved;
    float eps;                // of the RMS norms
    float eps_latent;         // of those inside of latent attention
    float embed_scale;        // of the token embedding; 1: none
    float attn_scale;         // of q . k
    float logit_cap;          // soft cap; 0: none
    uint32_t window;          // sliding window of local layers; 0: none
    uint32_t window_period;   // of this many layers the last is global; 0: no layer is
    uint32_t local_layers[MODEL_MAX_LAYERS / 32]; // bit i: layer i has the window
    moe_head_shape local;     // heads of local layers
    bool v_norm;              // values are normed, without a weight
    moe_rope_params rope;       // of global layers
    moe_rope_params rope_local; // of layers with a sliding window
    moe_glu_kind glu;
    float glu_alpha, glu_limit; // of MOE_GLU_CLAMPED
    moe_router router;        // router.n_expert is 0 in a dense model
    uint32_t n_layer_dense;   // layers without experts
    uint32_t dense_layers[MODEL_MAX_LAYERS / 32]; // bit i: layer i is one of them
    uint32_t n_layer_draft;   // layers behind the last one, for multi-token prediction
    uint32_t n_layer_all;     // layers that are bound: n_layer, and the first of those if there
    uint32_t n_ff_expert;
    bool choice_bias;         // the selection of experts has a bias (where that is optional)
    bool parallel_dense;      // a dense feed-forward beside the experts
    uint32_t n_expert_shared, n_ff_shared; // experts that every token uses; width of all of them
} moe_hparams;

/* The weights of a layer. Matrices as [n_out][n_in]; vectors are float32 views. */
typedef struct moe_layer {
    moe_weight attn_norm;                        // [n_embd]
    moe_weight wq, wk, wv;                       // [n_head * head_dim][n_embd], ...
    moe_weight bq, bk, bv, bo;
    moe_weight wq_a, wq_a_norm;                  // [n_latent_q][n_embd], [n_latent_q]
    moe_weight wq_b;                             // [n_head * head_dim][n_latent_q]
    moe_weight wkv_a, wkv_a_norm;                // [n_latent + n_rot][n_embd], [n_latent]
    moe_weight bq_a, bkv_a;                      // of wq_a and wkv_a
    moe_weight wkv_b;                            // both of the next in one
    moe_weight wk_b;                             // [n_head][n_latent][head_dim - n_rot]
    moe_weight wv_b;                             // [n_head][head_dim_v][n_latent]
    moe_weight sinks;                            // [n_head]
    /* Recurrent layers; n: elements of the convolution. */
    moe_weight conv_in;                          // [3 * n_embd, or n][n_embd]
    moe_weight conv;                             // [n][n_conv], the oldest position first
    moe_weight conv_out;                         // [n_embd][n_embd, or delta.n_head * dim_v]
    moe_weight delta_z;                          // [delta.n_head * dim_v][n_embd]
    moe_weight delta_a, delta_b;                 // [delta.n_head][n_embd]
    moe_weight delta_ba;                         // both, in turns of the heads of one key head
    moe_weight delta_rate, delta_bias;           // [delta.n_head]
    moe_weight delta_norm;                       // [delta.dim_v]
    moe_weight q_norm, k_norm;                   // [head_dim], or [n_head * head_dim]
    moe_weight wo;                               // [n_embd][n_head * head_dim_v]
    moe_weight attn_post_norm;                   // [n_embd], on the attention's output
    moe_weight ffn_norm;                         // [n_embd]
    moe_weight ffn_norm_2;                       // [n_embd], in front of experts beside a dense
    moe_weight ffn_post_norm_1, ffn_post_norm_2; // feed-forward; on the latter's output, on theirs
    moe_weight layer_scale;                      // [1], of the layer's output
    moe_weight gate, up, down;                   // [n_ff][n_embd], [n_ff][n_embd], [n_embd][n_ff]
    moe_weight gate_bias, up_bias, down_bias;    // of dense feed-forwards
    moe_weight ffn_post_norm;                    // [n_embd], on the feed-forward's output
    moe_weight router, router_bias;              // [n_expert][n_embd], [n_expert]
    moe_weight router_choice;                    // [n_expert], added for the selection only
    moe_weight router_scale;                     // [n_embd], of the router's input, of length 1
    moe_weight experts_factor;                   // [n_expert], of their outputs
    moe_weight experts_gate_up;                  // gate and up of each expert in one
    moe_weight experts_gate, experts_up;         // [n_expert][n_ff_expert][n_embd]
    moe_weight experts_down;                     // [n_expert][n_embd][n_ff_expert]
    moe_weight experts_gate_bias, experts_up_bias, experts_down_bias; // [n_expert][...]
    moe_weight shared_gate, shared_up, shared_down; // as gate, up, down, of n_ff_shared
    moe_weight shared_router;                    // [n_embd]: how much of the shared experts
    moe_weight draft_token_norm, draft_hidden_norm; // [n_embd]; these of a layer that drafts:
    moe_weight draft_join;                       // [n_embd][2 * n_embd]
    moe_weight draft_norm;                       // [n_embd]; absent: output_norm
    moe_weight draft_embedding, draft_output;    // [n_vocab][n_embd]; absent: the model's
} moe_layer;

/* The weights outside the layers. */
typedef struct moe_globals {
    moe_weight embedding;   // [n_vocab][n_embd]
    moe_weight output_norm; // [n_embd]
    moe_weight output;      // [n_vocab][n_embd]; absent: tied to the embedding
    moe_weight rope_freqs;  // [n_rot / 2]: divisors of the frequencies (Llama 3 scaling)
} moe_globals;

/* Symbolic lengths in the tables of tensors. */
typedef enum moe_dim {
    DIM_NONE, DIM_VOCAB, DIM_EMBD, DIM_Q, DIM_K, DIM_V, DIM_O, DIM_HEAD, DIM_HALF_ROT, DIM_FF,
    DIM_EXPERT, DIM_FF_EXPERT, DIM_FF_SHARED, DIM_Q_HEADS, DIM_NOPE, DIM_LATENT, DIM_LATENT_Q,
    DIM_LATENT_ROT, DIM_LATENT_KV, DIM_HEAD_V, DIM_CONV, DIM_EMBD_2, DIM_EMBD_3, DIM_Q_GATED,
    DIM_DELTA_CONV, DIM_ONE, DIM_FF_EXPERT_2, DIM_DELTA_HEADS, DIM_DELTA_HEADS_2, DIM_DELTA_HEAD,
    DIM_DELTA_V
} moe_dim;

enum {
    BIND_OPTIONAL = 1,
    BIND_VECTOR = 2,  /* kept as float32, converted if need be: norms, biases */
    BIND_DENSE = 4,   /* only in layers without experts */
    BIND_EXPERTS = 8, /* only in layers with experts */
    BIND_GLOBAL = 16, /* not in a layer */
    /* Only in models with ... */
    BIND_SHARED = 32,       /* shared experts, in layers with experts */
    BIND_LATENT_Q = 64,     /* a latent for the queries */
    BIND_NO_LATENT_Q = 128, /* none */
    BIND_LATENT_SPLIT = 256, /* latent attention's up-projection in two parts */
    BIND_LATENT_FUSED = 512, /* in one */
    BIND_SIGMOID = 1024,     /* a router whose scores are sigmoids */
    BIND_RECURRENT = 2048,   /* layers with a state */
    BIND_ATTENTION = 4096,   /* layers with attention */
    BIND_DRAFT = 8192,       /* the layer for multi-token prediction */
    BIND_CHOICE = 16384,     /* a bias for the selection of experts */
    BIND_HALVES = 32768      /* experts whose halves become weights: there is room for the matrices
                              * of the second behind those of the first */
};

/* One tensor of a family: "Hugging Face name, GGUF name -> field, shape". The loader binds by it,
 * the converter renames by it. "%u" is the layer; a second one in the Hugging Face name is the
 * expert, whose matrices GGUF stacks. */
typedef struct moe_binding {
    const char *gguf;
    const char *hf;
    uint16_t field;  // offset in moe_layer, or in moe_globals
    uint16_t flags;
    uint8_t dims[3]; // moe_dim, in GGUF's order: the contiguous one first
} moe_binding;

#define BIND_IN_LAYER(gguf, hf, field, flags, ...)                                                 \
    {"blk.%u." gguf, "model.layers.%u." hf, (uint16_t)offsetof(moe_layer, field), flags,           \
     {__VA_ARGS__}}
/* One that no checkpoint has under a name of its own. */
#define BIND_GGUF_ONLY(gguf, field, flags, ...)                                                    \
    {"blk.%u." gguf, NULL, (uint16_t)offsetof(moe_layer, field), flags, {__VA_ARGS__}}
#define BIND_IN_MODEL(gguf, hf, field, flags, ...)                                                 \
    {gguf, hf, (uint16_t)offsetof(moe_globals, field), (flags) | BIND_GLOBAL, {__VA_ARGS__}}
#define BIND_END {NULL, NULL, 0, 0, {0}}

/* How a key of a Hugging Face config.json becomes one of GGUF. The converter reads these tables;
 * the runtime sees only what comes of them. Keys that all families share stand in core/models.c.
 *
 * `hf` is the path of a value: "a.b" is b inside of a, "a.[]" a's first item; "a|b" the first that
 * is there and not null; "a+b" a sum, "a*b" a product, from left to right; "c=x?a" is a if c is x,
 * else missing, and "c!=x?a" the other way round. Nothing is written where a value is missing. Of
 * several lines for one key the first that has a value is written; a family's go before the
 * common. */
typedef enum moe_config_kind {
    CONFIG_U32,    // a whole number, or an array of them, one for each layer
    CONFIG_F32,
    CONFIG_RSQRT,  // float: 1 / sqrt(value)
    CONFIG_BOOL,
    CONFIG_WORD,   // uint32: the number behind the word in `words`, "softmax=1 sigmoid=2"
    CONFIG_LAYERS, // an array: of each item of a list the number, or the value of the key, behind
                   // its word in `words`, "conv=0 full_attention=num_key_value_heads"
    CONFIG_PERIOD, // the same, but uint32 n if just every n-th item is 0, and 0 if none is
    CONFIG_SPARSE, // which layers have no experts, by a list of "dense" and "sparse", else by
                   // decoder_sparse_step and mlp_only_layers: uint32, how many at the start; if
                   // there are others, "expert_layers" instead, an array of 1 for those with
    CONFIG_SECTIONS, // an array of 4 numbers, of which the last may be missing: 0
    CONFIG_EXPECT  // nothing is written; the value must be one of `words`, "silu swish"
} moe_config_kind;

typedef struct moe_config_key {
    const char *hf;    // NULL ends a table
    const char *gguf;  // without the architecture in front
    moe_config_kind kind;
    const char *words;
    double scale;      // of CONFIG_F32; 0: 1
} moe_config_key;

/* What GGUF's convention for a family changes in the weights. */
enum {
    CONVERT_INTERLEAVE_QK = 1, /* rows of q and k within a head: rotary pairs become neighbours */
    CONVERT_NORM_PLUS_1 = 2,   /* checkpoints hold norm weights less 1 */
    CONVERT_DELTA = 4          /* the delta rule's heads and rates: convert/hf.c */
};

typedef struct moe_pass moe_pass;

/* Reads hyperparameters one after another; after the first failure the rest does nothing. */
typedef struct hparam_reader {
    const moe_directory *dir;
    const char *arch; // prefix of the keys
    moe_error *error;
    moe_status status;
} hparam_reader;

/* A family of models. One file core/model_<family>.c, one line in core/models.def per name. */
typedef struct moe_family {
    const char *arch;       // general.architecture
    const char *hf;         // model_type of the Hugging Face config; several have blanks between
    /* Sets what differs from the common keys, which are read already. */
    void (*hparams)(moe_hparams *hp, hparam_reader *r);
    const moe_binding *bindings[10]; // tables that end with BIND_END; the list ends with NULL
    /* Records the work of one layer: p->x in, p->x out. */
    void (*layer)(moe_pass *p, uint32_t index);
    const moe_config_key *config; // config.json: the family's own keys; NULL: none
    uint32_t convert;             // CONVERT_*
    /* Makes weights from those of the file, once they are bound; NULL: nothing to make. */
    moe_status (*derive)(moe_model *m, moe_error *error);
} moe_family;

struct moe_model {
    moe_mem mem;
    moe_directory *dir;
    moe_tokenizer *tokenizer;
    const moe_family *family;
    moe_hparams hp;
    moe_globals globals;
    moe_layer *layers;             // [n_layer_all]
    float *vectors;                // all norms and biases
    uint8_t *derived;              // weights made by the family's derive()
    double *rope_freqs[2];         // [n_rot / 2] radians per position: global, local
    float rope_magnitude[2];       // factor on cos and sin
    const moe_backend *backend;
    moe_device *device;
    moe_buffer **buffers;          // [n_buffer] every buffer that holds weights
    moe_matrix *matrices;          // of stacks of experts whose matrices stand apart
    uint32_t n_buffer;
    moe_row_limits row_limits;     // of all matrices above
    char *architecture, *name;
    char router_text[256], attention_text[256];
    moe_model_info info;
};

/* Whether a layer carries a state from token to token, in the place of keys and values. */
MOE_INLINE bool layer_is_recurrent(const moe_hparams *hp, uint32_t index)
{
    return hp->recurrent_layers[index / 32] >> index % 32 & 1;
}

/* How many layers before this one do; with n_layer, how many in all. */
MOE_INLINE uint32_t recurrent_rank(const moe_hparams *hp, uint32_t index)
{
    uint32_t rank = 0;
    for (uint32_t i = 0; i < index; i++)
        rank += layer_is_recurrent(hp, i);
    return rank;
}

/* Elements that the short convolution of a recurrent layer runs over. */
MOE_INLINE uint64_t hparams_conv_dim(const moe_hparams *hp)
{
    const moe_delta_shape *d = &hp->delta;
    return d->n_head ? 2ull * d->n_head_k * d->dim_k + (uint64_t)d->n_head * d->dim_v : hp->n_embd;
}

/* Floats of a recurrent layer's state: the delta rule's, then the convolution's last positions. */
MOE_INLINE uint64_t hparams_delta_floats(const moe_hparams *hp)
{
    return delta_state_floats(hp->delta.n_head, hp->delta.dim_k, hp->delta.dim_v);
}

MOE_INLINE uint64_t hparams_state_floats(const moe_hparams *hp)
{
    return hp->n_conv ? hparams_delta_floats(hp) + (hp->n_conv - 1) * hparams_conv_dim(hp) : 0;
}

/* Floats that a recurrent layer makes of one token before its state takes part. */
MOE_INLINE uint64_t hparams_input_floats(const moe_hparams *hp)
{
    if (!hp->n_conv)
        return 0;
    return hp->delta.n_head ? hparams_conv_dim(hp) + 2ull * hp->delta.n_head : 3ull * hp->n_embd;
}

/* Whether keys and values are made from one latent vector per token, which the cache holds. */
MOE_INLINE bool hparams_latent(const moe_hparams *hp)
{
    return hp->n_latent > 0;
}

MOE_INLINE bool layer_has_experts(const moe_hparams *hp, uint32_t index)
{
    return hp->router.n_expert && !(hp->dense_layers[index / 32] >> index % 32 & 1);
}

/* Feed-forward width of layers without experts; 0 if there are none, whatever the file says. */
MOE_INLINE uint32_t hparams_dense_width(const moe_hparams *hp)
{
    return hp->router.n_expert && !hp->n_layer_dense && !hp->parallel_dense ? 0 : hp->n_ff;
}

/* Whether a layer attends within the sliding window only. */
MOE_INLINE bool layer_is_local(const moe_hparams *hp, uint32_t index)
{
    return hp->local_layers[index / 32] >> index % 32 & 1;
}

/* The heads of global layers, or of local ones. */
MOE_INLINE moe_head_shape hparams_heads(const moe_hparams *hp, bool local)
{
    return local ? hp->local
                 : (moe_head_shape){hp->n_head_kv, hp->head_dim, hp->head_dim_v, hp->n_rot};
}

/* The larger of both, in each respect. */
MOE_INLINE moe_head_shape hparams_most_heads(const moe_hparams *hp)
{
    return (moe_head_shape){
        MOE_MAX(hp->n_head_kv, hp->local.n_kv), MOE_MAX(hp->head_dim, hp->local.dim),
        MOE_MAX(hp->head_dim_v, hp->local.dim_v), MOE_MAX(hp->n_rot, hp->local.n_rot)};
}

/* Length of a head's row in the cache of keys, or in that of values. With latent attention the
 * latent and the rotated part stand in the one, and nothing in the other. */
MOE_INLINE uint32_t hparams_cache_dim(const moe_hparams *hp, bool local, bool values)
{
    const moe_head_shape heads = hparams_heads(hp, local);
    if (hparams_latent(hp))
        return values ? 0 : hp->n_latent + hp->n_rot;
    return values ? heads.dim_v : heads.dim;
}

/* How the model's rows are kept where `wanted` is asked for. */
MOE_INLINE moe_cache_type hparams_cache_type(const moe_hparams *hp, moe_cache_type wanted)
{
    return hparams_latent(hp) && wanted == MOE_CACHE_F16 ? CACHE_INT16 : wanted;
}

/* Prints a binding's GGUF name for a layer into buf. */
MOE_UNUSED static const char *binding_name(const moe_binding *b, uint32_t layer, char *buf,
                                           size_t buf_bytes);

#endif
