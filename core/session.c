/* core/session.c - one conversation: the cache, the work memory, and the forward pass over batches
 * of tokens.
 *
 * session_forward() is all of inference at a glance: embedding, layers, final norm, logits. */
#ifndef MOE_CORE_SESSION_C
#define MOE_CORE_SESSION_C

#include "draft.c"
#include "layers.c"
#include "platform.h"

enum {
    SESSION_DEFAULT_CTX = 4096,
    SESSION_MAX_BATCH = 4096,
    SESSION_N_STATE = 4,     /* states of recurrent layers that are held at a time */
    SESSION_NONE = UINT32_MAX /* no position */
};

/* Going back on guesses must not cost recurrent layers more than a replay. */
_Static_assert((int)DRAFT_MAX < (int)JOURNAL_TOK, "a token and its guesses fit into the journal");

/* Tokens that are evaluated, but not yet asked for: at positions n_past, n_past + 1, ... */
typedef struct session_ahead {
    moe_drafter drafter;
    draft_source source;
    draft_guess guess;       // what the tokens are
    uint32_t n, used;        // of the guess: evaluated; asked for since then
    draft_guess lookup;      // what prompt lookup would have guessed, whatever was done
    uint32_t n_right;        // tokens of it that came true so far
    float *logits;           // [n_draft + 1][n_vocab], of the token asked for and of the guess
} session_ahead;

/* The layer for multi-token prediction, as far as it has got: core/mtp.c. */
typedef struct session_mtp {
    bool on;
    uint32_t from, to;     // positions whose outputs pass.draft_outputs holds
    uint32_t next;         // the first position whose row is not in the layer's cache; not 0
    moe_token token;       // what the row before that was made from
    float *logits;         // [n_vocab]
} session_mtp;

struct moe_session {
    moe_model *model;
    moe_session_options options; // with the defaults filled in
    moe_queue *queue;
    moe_buffer *cache, *work;
    moe_cache *caches;     // [2 * plan_n_cache()]: keys, then values
    moe_pass pass;
    float *rope_table;     // [n_batch][n_rot]: on the host, before it is written
    uint32_t n_past;
    /* Layers with a sliding window keep only n_slot_local positions. If that is less than n_ctx: */
    uint32_t lookback;     // positions that they look at; else 0
    uint32_t n_slot_local;
    uint32_t held_from;    // the first position that they still hold; SESSION_NONE: none
    /* Recurrent layers know all positions only as one state, which the next token changes. States
     * of some positions are kept, so as to go back to them: session_choose_states(). */
    uint64_t state_bytes;  // of one; 0: no such layers
    moe_view states;       // [SESSION_N_STATE][state_bytes]
    uint32_t state_pos[SESSION_N_STATE]; // how many tokens it has seen; SESSION_NONE: holds nothing
    uint32_t state;        // the one in use
    bool keep_state;       // the next batch must not overwrite it
    uint32_t journal_pos, journal_n; // whose inputs the journal holds
    moe_token *history;    // [n_ctx]: what to compute anew after going back further, and what
                           // guesses are made from; NULL if neither is needed
    uint32_t expand_from;  // tokens of a call with latent attention in its expanded form; 0: none
    session_ahead ahead;   // of a session that drafts
    moe_observe *observe;  // NULL: nobody looks on
    session_mtp mtp;
    moe_error error;
};

/* ------------------------------------------------------------------------------- planning -- */

/* The memory of a session: computed once for the estimate, the same for the allocation. */
typedef struct session_plan {
    uint64_t cache_bytes, work_bytes, queue_bytes, host_bytes, total_bytes;
    moe_queue_options queue;
} session_plan;

/* Reserves an array in the work buffer. */
static bool plan_take(uint64_t *used, moe_view *view, uint64_t n, uint64_t item_bytes)
{
    uint64_t bytes;
    view->offset = *used;
    return checked_mul(n, item_bytes, &bytes) && checked_add(*used, bytes, used) &&
           checked_align(*used, MEM_ALIGN, used);
}

/* The longest row of a cache of keys, or of values. */
static uint32_t plan_row(const moe_hparams *hp, bool values)
{
    return MOE_MAX(hparams_cache_dim(hp, false, values), hparams_cache_dim(hp, true, values));
}

/* Whether the session drafts with the layer for multi-token prediction. */
static bool plan_mtp(const moe_hparams *hp, const moe_session_options *o)
{
    return (o->draft == MOE_DRAFT_AUTO || o->draft == MOE_DRAFT_MTP) &&
           hp->n_layer_all > hp->n_layer;
}

/* Layers that have caches. */
static uint32_t plan_n_cache(const moe_hparams *hp, const moe_session_options *o)
{
    return hp->n_layer + plan_mtp(hp, o);
}

/* The tokens of a call from which on latent attention is computed in its expanded form; 0: never.
 * For each position that makes keys and values of the latent once, but then needs fewer
 * multiplications with each query. Those of integers take half the time. Tokens with guesses behind
 * them must stay below: they are computed as they are one by one. */
static uint32_t plan_expand_from(const moe_hparams *hp, const moe_session_options *o)
{
    const bool integers = hparams_cache_type(hp, o->cache_type) == CACHE_INT16;
    const uint64_t made = hp->head_dim - hp->n_rot + hp->head_dim_v;
    const uint64_t absorbed = (2ull * hp->n_latent + hp->n_rot) * (integers ? 1 : 2);
    const uint64_t expanded = (made + hp->n_rot) * 2;
    if (o->latent != MOE_LATENT_EXPANDED || absorbed <= expanded)
        return 0;
    const uint64_t n = 2 * hp->n_latent * made / (absorbed - expanded) + 1;
    return (uint32_t)MOE_MIN(MOE_MAX(n, DRAFT_MAX + 2), UINT32_MAX);
}

/* Lays out the activations; the views' offsets are set. */
static bool plan_work(const moe_hparams *hp, const moe_session_options *o, moe_pass *p,
                      uint64_t *used)
{
    const uint64_t n = o->n_batch, f = sizeof(float), used_experts = hp->router.n_used;
    const uint64_t n_dense = MOE_MAX(hparams_dense_width(hp), hp->n_ff_shared);
    const uint64_t n_ff = MOE_MAX(n_dense, used_experts * hp->n_ff_expert);
    const moe_head_shape most = hparams_most_heads(hp);
    const uint64_t n_row = plan_row(hp, false), n_head = hp->n_head;
    const uint64_t n_delta = (uint64_t)hp->delta.n_head * hp->delta.dim_v;
    const uint64_t n_attn = MOE_MAX(n_head * most.dim_v, n_delta);
    const uint64_t n_mtp = plan_mtp(hp, o) ? hp->n_embd : 0;
    const uint32_t expand_from = plan_expand_from(hp, o);
    const uint64_t n_absorbed = expand_from ? MOE_MIN(n, expand_from - 1) : n;
    *used = 0;
    return plan_take(used, &p->ids, n, sizeof(int32_t)) &&
           plan_take(used, &p->rope[0], n * hp->n_rot, f) &&
           plan_take(used, &p->rope[1], n * hp->local.n_rot, f) &&
           plan_take(used, &p->x, n * hp->n_embd, f) &&
           plan_take(used, &p->h, n * hp->n_embd, f) &&
           plan_take(used, &p->q, n * hp->n_head * most.dim, f) &&
           plan_take(used, &p->k, n * most.n_kv * n_row, f) &&
           plan_take(used, &p->v, n * most.n_kv * plan_row(hp, true), f) &&
           plan_take(used, &p->q_latent, n * hp->n_latent_q, f) &&
           plan_take(used, &p->q_absorbed,
                     hp->n_latent ? n_absorbed * n_head * n_row : 0, f) &&
           plan_take(used, &p->attn_latent, n_absorbed * n_head * hp->n_latent, f) &&
           plan_take(used, &p->inputs, n * hparams_input_floats(hp), f) &&
           plan_take(used, &p->mixed, hp->parallel_dense ? n * hp->n_embd : 0, f) &&
           plan_take(used, &p->q_gated, hp->q_gated ? 2 * n * n_head * hp->head_dim : 0, f) &&
           plan_take(used, &p->delta_qk, 2 * n * hp->delta.n_head_k * hp->delta.dim_k, f) &&
           plan_take(used, &p->delta_v, n * n_delta, f) &&
           plan_take(used, &p->delta_z, n * n_delta, f) &&
           plan_take(used, &p->delta_decay, n * hp->delta.n_head, f) &&
           plan_take(used, &p->delta_beta, n * hp->delta.n_head, f) &&
           plan_take(used, &p->attn, n * n_attn, f) &&
           plan_take(used, &p->gate, n * n_ff, f) && plan_take(used, &p->up, n * n_ff, f) &&
           plan_take(used, &p->router, n * hp->router.n_expert, f) &&
           plan_take(used, &p->expert_ids, n * used_experts, sizeof(int32_t)) &&
           plan_take(used, &p->expert_weights, n * used_experts, f) &&
           plan_take(used, &p->expert_out, n * used_experts * hp->n_embd, f) &&
           plan_take(used, &p->draft_outputs, (n + 1) * n_mtp, f) &&
           plan_take(used, &p->draft_input, n * 2 * n_mtp, f) &&
           plan_take(used, &p->draft_output, n_mtp, f) &&
           plan_take(used, &p->logits, (uint64_t)o->n_logits * hp->n_vocab, f);
}

/* Positions that a layer's cache has room for: with a sliding window, what a batch adds, and what
 * its first token looks at. */
static uint32_t plan_slots(const moe_session_options *o, uint32_t window)
{
    return window ? (uint32_t)MOE_MIN(o->n_ctx, (uint64_t)window + o->n_batch) : o->n_ctx;
}

/* A layer's cache of keys, or of values; without its place. Recurrent layers have none. */
static moe_cache plan_cache(const moe_hparams *hp, const moe_session_options *o, uint32_t layer,
                            bool values)
{
    const moe_cache_type type = hparams_cache_type(hp, o->cache_type);
    if (layer_is_recurrent(hp, layer))
        return (moe_cache){{NULL, 0}, type, 0, 0, 0};
    const bool local = layer_is_local(hp, layer);
    return (moe_cache){{NULL, 0}, type, hparams_heads(hp, local).n_kv,
                       plan_slots(o, local ? hp->window : 0),
                       hparams_cache_dim(hp, local, values)};
}

/* Bytes of a cache, rounded up. */
static bool plan_cache_bytes(const moe_cache *c, uint64_t *bytes)
{
    return checked_mul((uint64_t)c->n_head * c->n_slot, cache_row_bytes(c->type, c->dim), bytes) &&
           checked_align(*bytes, MEM_ALIGN, bytes);
}

/* Bytes of one state of all recurrent layers, and of the journal of their inputs. */
static bool plan_states(const moe_hparams *hp, uint64_t *state_bytes, uint64_t *journal_bytes)
{
    const uint64_t n = recurrent_rank(hp, hp->n_layer);
    uint64_t state = hparams_state_floats(hp) * sizeof(float);
    uint64_t journal = JOURNAL_TOK * hparams_input_floats(hp) * sizeof(float);
    return checked_align(state, MEM_ALIGN, &state) && checked_mul(state, n, state_bytes) &&
           checked_align(journal, MEM_ALIGN, &journal) && checked_mul(journal, n, journal_bytes);
}

/* Bytes of all caches, states and the journal. */
static bool plan_caches(const moe_hparams *hp, const moe_session_options *o, uint64_t *bytes)
{
    uint64_t one, journal;
    if (!plan_states(hp, &one, &journal) || !checked_mul(one, SESSION_N_STATE, bytes) ||
        !checked_add(*bytes, journal, bytes))
        return false;
    const uint32_t n = plan_n_cache(hp, o);
    for (uint32_t i = 0; i < 2 * n; i++) {
        const moe_cache c = plan_cache(hp, o, i % n, i >= n);
        if (!plan_cache_bytes(&c, &one) || !checked_add(*bytes, one, bytes))
            return false;
    }
    return true;
}

/* How far sliding windows look back, if their caches are shorter than the context, so that going
 * back may need more than is there; else 0. */
static uint32_t plan_lookback(const moe_hparams *hp, const moe_session_options *o)
{
    for (uint32_t i = 0; i < hp->n_layer; i++)
        if (layer_is_local(hp, i) && !layer_is_recurrent(hp, i) &&
            plan_slots(o, hp->window) < o->n_ctx)
            return hp->window;
    return 0;
}

/* Whether the session must know its tokens: going back may need them to be computed anew. */
static bool plan_history(const moe_hparams *hp, const moe_session_options *o)
{
    return o->draft != MOE_DRAFT_OFF || plan_lookback(hp, o) || recurrent_rank(hp, hp->n_layer);
}

static moe_queue_options plan_queue(const moe_model *m, const moe_session_options *o)
{
    const moe_hparams *hp = &m->hp;
    uint32_t dim_max = MOE_MAX(plan_row(hp, false), plan_row(hp, true));
    moe_expand_shape expand = {0};
    if (plan_expand_from(hp, o)) {
        expand = (moe_expand_shape){hp->n_latent, hp->head_dim - hp->n_rot, hp->head_dim,
                                    hp->head_dim_v};
        dim_max = MOE_MAX(dim_max, MOE_MAX(hp->head_dim, hp->head_dim_v));
    }
    return (moe_queue_options){
        .n_threads = o->n_threads,
        .cancel = o->cancel,
        .n_tok_max = o->n_batch,
        .rows = m->row_limits,
        .n_expert_max = hp->router.n_expert,
        .n_used_max = hp->router.n_used,
        .n_head_max = hp->n_head,
        .n_slot_max = o->n_ctx,
        .dim_max = dim_max,
        .int16 = hparams_cache_type(hp, o->cache_type) == CACHE_INT16,
        .expand = expand,
    };
}

/* False if a size does not fit into 64 bits. */
static bool session_plan_for(const moe_model *m, const moe_session_options *o, session_plan *plan)
{
    const moe_hparams *hp = &m->hp;
    moe_pass scratch = {0};
    plan->queue = plan_queue(m, o);
    if (!plan_work(hp, o, &scratch, &plan->work_bytes) ||
        !plan_caches(hp, o, &plan->cache_bytes))
        return false;
    plan->queue_bytes = m->backend->queue_bytes(m->device, &plan->queue);
    const bool drafts = o->draft != MOE_DRAFT_OFF;
    plan->host_bytes = sizeof(moe_session) + 2ull * plan_n_cache(hp, o) * sizeof(moe_cache) +
                       (uint64_t)o->n_batch * hparams_most_heads(hp).n_rot * sizeof(float) +
                       (plan_history(hp, o) ? (uint64_t)o->n_ctx * sizeof(moe_token) : 0) +
                       (drafts ? (o->n_draft + 1ull) * hp->n_vocab * sizeof(float) : 0) +
                       observe_bytes(hp, &plan->queue, o->observer) +
                       (plan_mtp(hp, o) ? (uint64_t)hp->n_vocab * sizeof(float) : 0) +
                       22 * MEM_ALIGN;
    return checked_add(plan->cache_bytes, plan->work_bytes, &plan->total_bytes) &&
           checked_add(plan->total_bytes, plan->queue_bytes, &plan->total_bytes) &&
           checked_add(plan->total_bytes, plan->host_bytes, &plan->total_bytes);
}

/* Bytes that a new session may take: what is left under the ceiling, or else what is free. */
static uint64_t session_budget(const moe_model *m)
{
    const uint64_t limit = m->mem.limit_bytes, used = atomic_load(&m->mem.used_bytes);
    if (limit)
        return used < limit ? limit - used : 0;
    const uint64_t free_bytes = plat_free_memory();
    return free_bytes ? free_bytes : UINT64_MAX;
}

/* The longest context whose plan fits into the budget; 0 if none does. */
static uint32_t session_longest(const moe_model *m, const moe_session_options *o, uint64_t budget)
{
    uint32_t low = 0, high = MODEL_MAX_CTX;
    while (low < high) {
        const uint32_t middle = low + (high - low + 1) / 2;
        moe_session_options trial = *o;
        session_plan plan;
        trial.n_ctx = middle;
        if (session_plan_for(m, &trial, &plan) && plan.total_bytes <= budget)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Tokens computed ahead need room in a batch, and their logits come all at once. */
static moe_status session_fill_draft(const moe_hparams *hp, moe_session_options *o,
                                     moe_error *error)
{
    if (o->draft < MOE_DRAFT_OFF || o->draft > MOE_DRAFT_MTP)
        return fail(error, MOE_ERR_ARGUMENT, "draft", "expected 0 to %d, got %d", MOE_DRAFT_MTP,
                    (int)o->draft);
    if (o->n_draft < 1 || o->n_draft > DRAFT_MAX)
        return fail(error, MOE_ERR_ARGUMENT, "n_draft", "expected 1 to %d, got %u", DRAFT_MAX,
                    o->n_draft);
    if (o->draft == MOE_DRAFT_MTP && hp->n_layer_all == hp->n_layer)
        return fail(error, MOE_ERR_UNSUPPORTED, "draft",
                    "expected a model with a layer for multi-token prediction, got one without");
    o->n_draft = MOE_MIN(o->n_draft, o->n_batch - 1);
    if (!o->n_draft || o->observer) /* an observer sees the sequence, nothing that may not come */
        o->draft = MOE_DRAFT_OFF;
    if (o->draft != MOE_DRAFT_OFF)
        o->n_logits = MOE_MAX(o->n_logits, o->n_draft + 1);
    return MOE_OK;
}

static moe_status session_fill_options(const moe_model *m, const moe_session_options *options,
                                       moe_session_options *o, moe_error *error)
{
    moe_session_options_init(o);
    if (options && !options->size)
        return fail(error, MOE_ERR_ARGUMENT, "size",
                    "expected options filled by moe_session_options_init, got size 0");
    if (options)
        memcpy(o, options, MOE_MIN(options->size, sizeof *o));
    o->size = sizeof *o;
    if (o->observer && !o->observer->size)
        return fail(error, MOE_ERR_ARGUMENT, "observer",
                    "expected one filled by moe_observer_init, got size 0");
    if (!m->device)
        return fail(error, MOE_ERR_ARGUMENT, "model",
                    "it was opened with vocab_only: it has no weights to compute with");
    if (!o->n_ctx)
        o->n_ctx = MOE_MIN(m->hp.n_ctx_train, SESSION_DEFAULT_CTX);
    if (!o->n_threads)
        o->n_threads = MOE_MIN(plat_n_cores(), MOE_MAX_THREADS);
    if (o->n_threads > MOE_MAX_THREADS)
        return fail(error, MOE_ERR_ARGUMENT, "n_threads", "expected 0 to %d, got %u",
                    MOE_MAX_THREADS, o->n_threads);
    if (o->n_batch < 1 || o->n_batch > SESSION_MAX_BATCH)
        return fail(error, MOE_ERR_ARGUMENT, "n_batch", "expected 1 to %d, got %u",
                    SESSION_MAX_BATCH, o->n_batch);
    if (o->n_logits < 1 || o->n_logits > SESSION_MAX_BATCH)
        return fail(error, MOE_ERR_ARGUMENT, "n_logits", "expected 1 to %d, got %u",
                    SESSION_MAX_BATCH, o->n_logits);
    if (o->cache_type < MOE_CACHE_F16 || o->cache_type > MOE_CACHE_F32)
        return fail(error, MOE_ERR_ARGUMENT, "cache_type", "expected 0 to %d, got %d",
                    MOE_CACHE_F32, (int)o->cache_type);
    if (o->latent < MOE_LATENT_ABSORBED || o->latent > MOE_LATENT_EXPANDED)
        return fail(error, MOE_ERR_ARGUMENT, "latent", "expected 0 to %d, got %d",
                    MOE_LATENT_EXPANDED, (int)o->latent);
    o->n_batch = MOE_MIN(o->n_batch, o->n_ctx);
    moe_status status = session_fill_draft(&m->hp, o, error);
    o->n_logits = MOE_MIN(o->n_logits, o->n_batch);
    return status;
}

moe_status moe_session_estimate(const moe_model *model, const moe_session_options *options,
                                moe_memory_estimate *estimate, moe_error *error)
{
    moe_session_options o;
    session_plan plan;
    if (!model || !estimate)
        return fail(error, MOE_ERR_ARGUMENT, NULL, "model and estimate must not be NULL");
    moe_status status = session_fill_options(model, options, &o, error);
    if (status)
        return status;
    const bool fits_64 = o.n_ctx <= MODEL_MAX_CTX && session_plan_for(model, &o, &plan);
    const uint64_t budget = session_budget(model);
    const moe_memory_estimate full = {
        .size = sizeof full,
        .cache_bytes = fits_64 ? plan.cache_bytes : UINT64_MAX,
        .work_bytes = fits_64 ? plan.total_bytes - plan.cache_bytes : UINT64_MAX,
        .total_bytes = fits_64 ? plan.total_bytes : UINT64_MAX,
        .n_ctx = o.n_ctx,
        .n_ctx_max = session_longest(model, &o, budget),
        .fits = fits_64 && plan.total_bytes <= budget,
    };
    const size_t size = MOE_MIN(estimate->size, sizeof full);
    memcpy(estimate, &full, size);
    estimate->size = size;
    return MOE_OK;
}

/* ----------------------------------------------------------------------------------- open -- */

/* Points the caches and the activations of the pass into the two buffers. */
static void session_lay_out(moe_session *s)
{
    const moe_model *m = s->model;
    const moe_hparams *hp = &m->hp;
    moe_pass *p = &s->pass;
    uint64_t used, journal = 0, offset = 0;
    plan_work(hp, &s->options, p, &used);
    moe_view *const views[] = {&p->ids,  &p->rope[0], &p->rope[1], &p->x,    &p->h,
                               &p->q,    &p->k,       &p->v,       &p->attn, &p->gate,
                               &p->q_latent, &p->q_absorbed, &p->attn_latent, &p->inputs,
                               &p->mixed, &p->q_gated, &p->delta_qk, &p->delta_v, &p->delta_z,
                               &p->delta_decay, &p->delta_beta,
                               &p->up,   &p->router,  &p->expert_ids, &p->expert_weights,
                               &p->expert_out, &p->logits, &p->draft_outputs, &p->draft_input,
                               &p->draft_output};
    for (size_t i = 0; i < MOE_COUNT(views); i++)
        views[i]->buffer = s->work;
    const uint32_t n_cache = plan_n_cache(hp, &s->options);
    for (uint32_t i = 0; i < 2 * n_cache; i++) {
        uint64_t bytes = 0;
        s->caches[i] = plan_cache(hp, &s->options, i % n_cache, i >= n_cache);
        s->caches[i].data = (moe_view){s->cache, offset};
        plan_cache_bytes(&s->caches[i], &bytes);
        offset += bytes;
    }
    s->lookback = plan_lookback(hp, &s->options);
    s->n_slot_local = plan_slots(&s->options, s->lookback);
    plan_states(hp, &s->state_bytes, &journal);
    p->journal = (moe_view){s->cache, offset};
    s->states = (moe_view){s->cache, offset + journal};
    for (uint32_t i = 0; i < SESSION_N_STATE; i++)
        s->state_pos[i] = SESSION_NONE;
    p->model = m;
    p->be = m->backend;
    p->queue = s->queue;
    p->k_cache = s->caches;
    p->v_cache = s->caches + n_cache;
    p->observe = s->observe;
    s->expand_from = plan_expand_from(hp, &s->options);
    s->mtp.on = plan_mtp(hp, &s->options);
    s->mtp.next = 1;
}

static moe_status session_allocate(moe_session *s, const session_plan *plan, moe_error *error)
{
    moe_model *m = s->model;
    s->caches = mem_alloc(&m->mem, 2ull * plan_n_cache(&m->hp, &s->options), sizeof *s->caches);
    s->rope_table = mem_alloc(&m->mem, (uint64_t)s->options.n_batch *
                              hparams_most_heads(&m->hp).n_rot, sizeof(float));
    const bool history = plan_history(&m->hp, &s->options);
    const bool drafts = s->options.draft != MOE_DRAFT_OFF;
    if (history)
        s->history = mem_alloc_uncleared(&m->mem, s->options.n_ctx, sizeof *s->history);
    if (drafts)
        s->ahead.logits = mem_alloc_uncleared(&m->mem, (s->options.n_draft + 1ull) * m->hp.n_vocab,
                                              sizeof *s->ahead.logits);
    const bool mtp = plan_mtp(&m->hp, &s->options);
    if (mtp)
        s->mtp.logits = mem_alloc_uncleared(&m->mem, m->hp.n_vocab, sizeof *s->mtp.logits);
    s->ahead.drafter.n_max = s->options.n_draft;
    s->ahead.drafter.adaptive = s->options.draft == MOE_DRAFT_AUTO;
    const moe_observer *observer = s->options.observer;
    if (observer)
        s->observe = observe_open(&m->mem, &m->hp, &plan->queue, observer, &s->error);
    s->options.observer = NULL; /* the caller's; what was copied stays */
    if (!s->caches || !s->rope_table || (history && !s->history) || (drafts && !s->ahead.logits) ||
        (mtp && !s->mtp.logits) || (observer && !s->observe))
        return fail_memory(error, &m->mem, "session", plan->host_bytes);
    moe_status status = m->backend->buffer_new(m->device, plan->cache_bytes, &s->cache, error);
    if (!status)
        status = m->backend->buffer_new(m->device, plan->work_bytes, &s->work, error);
    if (!status)
        status = m->backend->queue_open(&s->queue, m->device, &plan->queue, error);
    return status;
}

moe_status moe_session_open(moe_session **out, moe_model *model,
                            const moe_session_options *options, moe_error *error)
{
    moe_session_options o;
    session_plan plan;
    if (out)
        *out = NULL;
    if (!out || !model)
        return fail(error, MOE_ERR_ARGUMENT, NULL, "out and model must not be NULL");
    moe_status status = session_fill_options(model, options, &o, error);
    if (status)
        return status;
    const uint64_t budget = session_budget(model);
    if (o.n_ctx > MODEL_MAX_CTX || !session_plan_for(model, &o, &plan) ||
        plan.total_bytes > budget)
        return fail(error, MOE_ERR_LIMIT, "n_ctx",
                    "a context of %u tokens needs more than the %llu MB that are available; at "
                    "most %u tokens fit", o.n_ctx, (unsigned long long)(budget >> 20),
                    session_longest(model, &o, budget));
    moe_session *s = mem_alloc(&model->mem, 1, sizeof *s);
    if (!s)
        return fail_memory(error, &model->mem, "session", sizeof *s);
    s->model = model;
    s->options = o;
    status = session_allocate(s, &plan, error);
    if (status) {
        moe_session_close(s);
        return status;
    }
    session_lay_out(s);
    if (o.n_ctx > model->hp.n_ctx_train)
        mem_log(&model->mem, MOE_LOG_WARN,
                "the context is longer than the one the model was trained with");
    *out = s;
    return MOE_OK;
}

void moe_session_close(moe_session *s)
{
    if (!s)
        return;
    moe_model *m = s->model;
    if (s->queue)
        m->backend->queue_close(s->queue);
    m->backend->buffer_free(m->device, s->work);
    m->backend->buffer_free(m->device, s->cache);
    observe_close(&m->mem, s->observe);
    mem_free(&m->mem, s->mtp.logits);
    mem_free(&m->mem, s->ahead.logits);
    mem_free(&m->mem, s->history);
    mem_free(&m->mem, s->rope_table);
    mem_free(&m->mem, s->caches);
    mem_free(&m->mem, s);
}

/* ----------------------------------------------------------------------------------- states -- */

static moe_view session_state_view(const moe_session *s, uint32_t i)
{
    return view_at(s->states, i * s->state_bytes);
}

/* A state that may be overwritten, but not the one in use: one that holds nothing, or else the one
 * that is closest behind another, so that those kept spread over the sequence. */
static uint32_t session_spare_state(const moe_session *s)
{
    uint32_t spare = SESSION_NONE, least = 0;
    for (uint32_t i = 0; i < SESSION_N_STATE; i++) {
        uint32_t gap = s->state_pos[i];
        if (i == s->state)
            continue;
        if (s->state_pos[i] == SESSION_NONE)
            return i;
        for (uint32_t j = 0; j < SESSION_N_STATE; j++)
            if (s->state_pos[j] < s->state_pos[i])
                gap = MOE_MIN(gap, s->state_pos[i] - s->state_pos[j]);
        if (spare == SESSION_NONE || gap < least) {
            spare = i;
            least = gap;
        }
    }
    return spare;
}

/* Chooses where a batch reads and writes its states. One token overwrites the state in use, unless
 * that is to be kept; a larger batch, which may be one that is gone back on, leaves it, and so does
 * the token behind such a batch. */
static void session_choose_states(moe_session *s, uint32_t pos, uint32_t n_tok)
{
    moe_pass *p = &s->pass;
    if (!s->state_bytes)
        return;
    p->before = pos ? session_state_view(s, s->state) : (moe_view){NULL, 0};
    if (pos && (s->keep_state || n_tok > 1))
        s->state = session_spare_state(s);
    p->after = session_state_view(s, s->state);
    s->state_pos[s->state] = SESSION_NONE; /* until the batch is done */
    s->keep_state = n_tok > 1;
    s->journal_n = 0;
}

/* The batch is done. */
static void session_note_states(moe_session *s, uint32_t pos, uint32_t n_tok)
{
    s->state_pos[s->state] = pos + n_tok;
    s->journal_pos = pos;
    s->journal_n = n_tok <= JOURNAL_TOK ? n_tok : 0;
}

/* Makes the state behind `n_tok` tokens of the last, small batch from what they have left in the
 * journal. */
static moe_status session_replay(moe_session *s, uint32_t n_tok)
{
    moe_pass *p = &s->pass;
    const moe_hparams *hp = &s->model->hp;
    const uint32_t pos = s->journal_pos, n_journal = s->journal_n;
    s->keep_state = true;
    session_choose_states(s, pos, n_tok);
    s->journal_n = n_journal;
    p->pos = pos;
    p->n_tok = n_tok;
    for (uint32_t i = 0; i < hp->n_layer; i++)
        if (layer_is_recurrent(hp, i))
            layer_recur(p, i);
    moe_status status = p->be->submit(p->queue, &s->error);
    if (!status)
        s->state_pos[s->state] = pos + n_tok;
    return status;
}

/* Whether computing can go on behind n_tok tokens: sliding windows hold what the next one looks at,
 * and there is a state, whose index goes to *state. */
static bool session_can_resume(const moe_session *s, uint32_t n_tok, uint32_t *state)
{
    const uint32_t first = n_tok + 1 > s->lookback ? n_tok + 1 - s->lookback : 0;
    *state = s->state;
    if (s->lookback && first < s->held_from)
        return false;
    if (!n_tok || !s->state_bytes)
        return true;
    for (uint32_t i = 0; i < SESSION_N_STATE; i++)
        if (s->state_pos[i] == n_tok) {
            *state = i;
            return true;
        }
    return false;
}

/* The most of the first n_tok tokens that need not be computed anew to go on behind them; *state is
 * the state behind those. */
static uint32_t session_resume_at(const moe_session *s, uint32_t n_tok, uint32_t *state)
{
    uint32_t best = 0, other;
    *state = s->state;
    if (session_can_resume(s, n_tok, state))
        return n_tok;
    for (uint32_t i = 0; s->state_bytes && i < SESSION_N_STATE; i++)
        if (s->state_pos[i] < n_tok && s->state_pos[i] > best &&
            session_can_resume(s, s->state_pos[i], &other)) {
            best = s->state_pos[i];
            *state = i;
        }
    return best;
}

/* ---------------------------------------------------------------------------------- forward -- */

/* Angles of positions [pos, pos + n_tok), in double precision, so that every machine rounds to the
 * same floats. */
static void session_write_rope(moe_session *s, uint32_t kind, uint32_t pos, uint32_t n_tok)
{
    const moe_model *m = s->model;
    const uint32_t half = hparams_heads(&m->hp, kind).n_rot / 2;
    float *dst = s->rope_table;
    for (uint32_t t = 0; t < n_tok; t++) {
        for (uint32_t i = 0; i < half; i++) {
            const double angle = (double)(pos + t) * m->rope_freqs[kind][i];
            *dst++ = (float)(cos(angle) * m->rope_magnitude[kind]);
            *dst++ = (float)(sin(angle) * m->rope_magnitude[kind]);
        }
    }
    m->backend->write(s->queue, s->pass.rope[kind], s->rope_table,
                      (uint64_t)n_tok * 2 * half * sizeof(float));
}

/* Final norm and output matrix for n_row tokens of the batch, from row `row` on. */
static moe_status session_logits(moe_session *s, uint32_t row, uint32_t n_row, float *logits)
{
    moe_pass *p = &s->pass;
    const moe_hparams *hp = &s->model->hp;
    const moe_globals *g = &s->model->globals;
    const moe_weight *output = weight_present(&g->output) ? &g->output : &g->embedding;
    const uint32_t n_tok = p->n_tok;
    p->n_tok = n_row;
    layer_norm(p, p->h, view_at(p->x, (uint64_t)row * hp->n_embd * sizeof(float)),
               &g->output_norm, n_row, hp->n_embd);
    layer_linear(p, p->logits, output, p->h, NULL, false);
    p->n_tok = n_tok;
    if (hp->logit_cap > 0) {
        const moe_softcap_op cap = {p->logits, (uint64_t)n_row * hp->n_vocab, hp->logit_cap};
        p->be->softcap(p->queue, &cap);
    }
    return p->be->read(p->queue, p->logits, logits, (uint64_t)n_row * hp->n_vocab * sizeof(float),
                       &s->error);
}

/* core/mtp.c: before and behind a batch's layers; guesses of n tokens behind that at n_past. */
static void mtp_prepare(moe_session *s, uint32_t pos, uint32_t n_tok);
static void mtp_keep(moe_session *s, uint32_t n_tok);
static moe_status mtp_guess(moe_session *s, uint32_t n, draft_guess *guess);

/* One batch: tokens at positions [pos, pos + n_tok), at most n_batch of them; logits of the last
 * n_logits. */
static moe_status session_forward(moe_session *s, const moe_token *tokens, uint32_t pos,
                                  uint32_t n_tok, uint32_t n_logits, float *logits)
{
    moe_pass *p = &s->pass;
    const moe_model *m = s->model;
    mtp_prepare(s, pos, n_tok);
    p->pos = pos;
    p->n_tok = n_tok;
    p->n_out = p->observe || s->mtp.on ? n_tok : MOE_MAX(n_logits, 1);
    if (p->observe)
        p->observe->status = MOE_OK;
    session_choose_states(s, pos, n_tok);
    if (s->lookback && pos + n_tok > s->n_slot_local)
        s->held_from = MOE_MAX(s->held_from, pos + n_tok - s->n_slot_local);
    p->be->write(p->queue, p->ids, tokens, n_tok * sizeof *tokens);
    session_write_rope(s, 0, pos, n_tok);
    if (m->hp.window)
        session_write_rope(s, 1, pos, n_tok);
    const moe_embed_op embed = {p->x, p->ids, &m->globals.embedding, m->hp.embed_scale, n_tok};
    p->be->embed(p->queue, &embed);
    for (p->layer = 0; p->layer < m->hp.n_layer; p->layer++)
        m->family->layer(p, p->layer);
    mtp_keep(s, n_tok);
    for (uint32_t done = 0; done < n_logits;) {
        const uint32_t n = MOE_MIN(s->options.n_logits, n_logits - done);
        moe_status status = session_logits(s, p->n_tok - n_logits + done, n,
                                           logits + (size_t)done * m->hp.n_vocab);
        if (status)
            return status;
        done += n;
    }
    moe_status status = p->be->submit(p->queue, &s->error);
    if (!status && p->observe)
        status = p->observe->status;
    if (!status)
        session_note_states(s, pos, n_tok);
    return status;
}

/* --------------------------------------------------------------------------------- evaluate -- */

/* The first of n weights that is not a finite number; n if there is none. Rows are cut: where a
 * block depends on those before it the numbers are other ones, but as finite. */
static uint64_t session_first_bad(const moe_quant *quant, const uint8_t *data, uint64_t n,
                                  float *bad)
{
    enum { BLOCK = 4096 };
    float values[BLOCK];
    for (uint64_t first = 0; first < n; first += BLOCK) {
        const size_t some = (size_t)MOE_MIN(BLOCK, n - first);
        quant->dequantize(data + first / quant->block_len * quant->block_bytes, values, some);
        for (size_t k = 0; k < some; k++)
            if (!isfinite(*bad = values[k]))
                return first + k;
    }
    return n;
}

/* Names the first weight that is not a finite number. Only called when a result is not. */
static moe_status session_explain(moe_session *s)
{
    const moe_directory *dir = s->model->dir;
    for (size_t i = 0; i < directory_n_tensors(dir); i++) {
        const moe_tensor *t = directory_tensor_at(dir, i);
        const uint64_t n = t->n_elements / tensor_n_parts(t);
        for (uint64_t k = 0; k < tensor_n_parts(t); k++) {
            const moe_part part = tensor_part(t, k);
            float bad = 0;
            const uint64_t at = session_first_bad(part.quant, part.data, n, &bad);
            if (at < n)
                return fail(&s->error, MOE_ERR_MODEL, t->name,
                            "expected finite weights, got %f at element %llu", (double)bad,
                            (unsigned long long)(k * n + at));
        }
    }
    return fail(&s->error, MOE_ERR_MODEL, NULL,
                "the logits are not finite although all weights are: the activations overflow");
}

static bool logits_are_finite(const float *logits, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        bad |= (bits_of_f32(logits[i]) & 0x7f800000) == 0x7f800000;
    return !bad;
}

static moe_status session_check_eval(moe_session *s, const moe_token *tokens, size_t n_tok,
                                     size_t n_logits, const float *logits)
{
    const uint32_t free_slots = s->options.n_ctx - s->n_past;
    if (n_tok && !tokens)
        return fail(&s->error, MOE_ERR_ARGUMENT, "tokens", "expected %zu ids, got NULL", n_tok);
    if (n_logits > n_tok)
        return fail(&s->error, MOE_ERR_ARGUMENT, "n_logits", "expected at most n_tok, %zu, got %zu",
                    n_tok, n_logits);
    if (n_logits && !logits)
        return fail(&s->error, MOE_ERR_ARGUMENT, "logits", "expected memory for %zu rows, got NULL",
                    n_logits);
    if (n_tok > free_slots)
        return fail(&s->error, MOE_ERR_CONTEXT, NULL,
                    "%zu tokens do not fit: %u of %u positions are taken; rewind, or open a "
                    "session with a longer context", n_tok, s->n_past, s->options.n_ctx);
    for (size_t i = 0; i < n_tok; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= s->model->hp.n_vocab)
            return fail(&s->error, MOE_ERR_ARGUMENT, "tokens",
                        "expected ids from 0 to %u, got %d at index %zu",
                        s->model->hp.n_vocab - 1, tokens[i], i);
    return directory_check(s->model->dir, &s->error);
}

/* After going back, or after a call that failed, sliding windows may have lost what the next token
 * looks at, and states may be those of later tokens. What is missing is computed anew. */
static moe_status session_restore(moe_session *s)
{
    uint32_t from, state;
    moe_status status = MOE_OK;
    s->held_from = s->n_past ? s->held_from : 0;
    for (uint32_t i = 0; i < SESSION_N_STATE; i++) /* of tokens that are no longer there */
        if (s->state_pos[i] > s->n_past)
            s->state_pos[i] = SESSION_NONE;
    if ((from = session_resume_at(s, s->n_past, &state)) == s->n_past) {
        s->keep_state |= state != s->state;
        s->state = state;
        return MOE_OK;
    }
    const uint32_t held_from = s->held_from;
    s->state = state;
    if (from && from == s->journal_pos && s->n_past - from < s->journal_n &&
        (!s->lookback || s->n_past + 1 >= (uint64_t)held_from + s->lookback))
        return session_replay(s, s->n_past - from);
    s->held_from = SESSION_NONE; /* while this is not done */
    s->pass.observe = NULL;      /* these tokens were shown when they came */
    for (uint32_t done = from; done < s->n_past && !status;) {
        const uint32_t n = MOE_MIN(s->options.n_batch, s->n_past - done);
        status = session_forward(s, s->history + done, done, n, 0, NULL);
        done += n;
    }
    s->pass.observe = s->observe;
    if (!status) {
        const uint32_t lost = s->n_past > s->n_slot_local ? s->n_past - s->n_slot_local : 0;
        s->held_from = from ? MOE_MAX(held_from, lost) : lost;
    }
    return status;
}

/* The size of the next batch. A short one at the end would have latent attention expand the whole
 * context for a few tokens: in that form all get about the same size. */
static uint32_t session_next_batch(const moe_session *s, size_t n_left)
{
    const size_t n_batch = s->options.n_batch, n = (n_left + n_batch - 1) / n_batch;
    return (uint32_t)(s->pass.expanded ? (n_left + n - 1) / n : MOE_MIN(n_batch, n_left));
}

/* The next n_tok tokens, checked, in batches; logits of the last n_logits. The session's length is
 * left as it is. */
static moe_status session_compute(moe_session *s, const moe_token *tokens, size_t n_tok,
                                  size_t n_logits, float *logits)
{
    moe_status status = n_tok ? session_restore(s) : MOE_OK;
    const size_t n_silent = n_tok - n_logits;
    const size_t n_vocab = s->model->hp.n_vocab;
    if (s->history && n_tok)
        memcpy(s->history + s->n_past, tokens, n_tok * sizeof *tokens);
    s->pass.expanded = s->expand_from && n_tok >= s->expand_from;
    const bool is_long = n_tok > s->options.n_batch;
    for (size_t done = 0; done < n_tok && !status;) {
        if (is_long)
            mem_progress(&s->model->mem, "prefill", done, n_tok);
        const uint32_t n = session_next_batch(s, n_tok - done);
        /* The batch may end in tokens whose logits are wanted. */
        const size_t first = MOE_MAX(done, n_silent);
        const uint32_t wanted = done + n > first ? (uint32_t)(done + n - first) : 0;
        float *dst = wanted ? logits + (first - n_silent) * n_vocab : NULL;
        status = session_forward(s, tokens + done, s->n_past + (uint32_t)done, n, wanted, dst);
        done += n;
    }
    if (is_long && !status)
        mem_progress(&s->model->mem, "prefill", n_tok, n_tok);
    return status;
}

static moe_status session_check_finite(moe_session *s, const float *logits, size_t n_row)
{
    return logits_are_finite(logits, n_row * s->model->hp.n_vocab) ? MOE_OK : session_explain(s);
}

/* -------------------------------------------------------------------------------- drafting -- */

/* What came instead of, or as, the tokens that were guessed. */
static void session_learn(session_ahead *a, moe_token token)
{
    if (a->used < a->n && a->source == DRAFT_BY_MTP)
        draft_learn(&a->drafter, DRAFT_BY_MTP, a->used, a->guess.tokens[a->used] == token);
    if (a->n_right < a->lookup.n) {
        const bool hit = a->lookup.tokens[a->n_right] == token;
        draft_learn(&a->drafter, DRAFT_BY_NGRAM, a->lookup.grade + a->n_right, hit);
        a->n_right = hit ? a->n_right + 1 : a->lookup.n;
    }
}

/* Tokens to compute along with the one at n_past, which is in the history; their number to *n. */
static moe_status session_guess(moe_session *s, uint32_t *n)
{
    session_ahead *a = &s->ahead;
    const moe_session_options *o = &s->options;
    const uint32_t room = MOE_MIN(o->n_draft, o->n_ctx - s->n_past - 1);
    double by_lookup = 0, by_mtp = 0;
    draft_lookup(s->history, s->n_past + 1, room, &a->lookup);
    a->n_right = 0;
    a->guess = a->lookup;
    a->source = DRAFT_BY_NGRAM;
    *n = 0;
    if (o->draft != MOE_DRAFT_MTP)
        *n = draft_choose(&a->drafter, DRAFT_BY_NGRAM, a->lookup.grade, a->lookup.n, &by_lookup);
    if (!s->mtp.on)
        return MOE_OK;
    const uint32_t n_mtp = draft_choose(&a->drafter, DRAFT_BY_MTP, 0, s->n_past ? room : 0,
                                        &by_mtp);
    if (!n_mtp || by_mtp <= by_lookup)
        return MOE_OK;
    *n = n_mtp;
    a->source = DRAFT_BY_MTP;
    return mtp_guess(s, n_mtp, &a->guess);
}

/* One token, with others that may follow it. */
static moe_status session_eval_ahead(moe_session *s, moe_token token, float *logits)
{
    session_ahead *a = &s->ahead;
    const size_t n_vocab = s->model->hp.n_vocab;
    const uint64_t start = plat_time_ns();
    moe_token tokens[DRAFT_MAX + 1] = {token};
    uint32_t n = 0;
    moe_status status = session_restore(s);
    s->history[s->n_past] = token;
    if (!status)
        status = session_guess(s, &n);
    memcpy(tokens + 1, a->guess.tokens, n * sizeof *tokens);
    if (!status)
        status = session_compute(s, tokens, n + 1, n + 1, n ? a->logits : logits);
    if (status)
        return status;
    if (n)
        memcpy(logits, a->logits, n_vocab * sizeof *logits);
    status = session_check_finite(s, logits, 1);
    a->n = status ? 0 : n;
    a->used = 0;
    draft_record(&a->drafter, a->source, n + 1, (double)(plat_time_ns() - start) * 1e-9);
    return status;
}

/* The logits of a token that was evaluated ahead. */
static moe_status session_take_ahead(moe_session *s, float *logits)
{
    session_ahead *a = &s->ahead;
    const size_t n_vocab = s->model->hp.n_vocab;
    memcpy(logits, a->logits + ++a->used * n_vocab, n_vocab * sizeof *logits);
    draft_accept(&a->drafter);
    moe_status status = session_check_finite(s, logits, 1);
    if (status)
        a->n = 0;
    return status;
}

static moe_status session_eval_drafting(moe_session *s, moe_token token, float *logits)
{
    session_ahead *a = &s->ahead;
    session_learn(a, token);
    if (a->used < a->n && a->guess.tokens[a->used] == token)
        return session_take_ahead(s, logits);
    a->n = 0;
    return session_eval_ahead(s, token, logits);
}

/* ----------------------------------------------------------------------------------- entry -- */

moe_status moe_session_eval(moe_session *s, const moe_token *tokens, size_t n_tok, size_t n_logits,
                            float *logits)
{
    if (!s)
        return MOE_ERR_ARGUMENT;
    memset(&s->error, 0, sizeof s->error);
    moe_status status = session_check_eval(s, tokens, n_tok, n_logits, logits);
    if (!status && s->options.draft != MOE_DRAFT_OFF && n_tok == 1 && n_logits == 1) {
        status = session_eval_drafting(s, tokens[0], logits);
    } else if (!status && n_tok) {
        s->ahead.n = s->ahead.lookup.n = 0;
        status = session_compute(s, tokens, n_tok, n_logits, logits);
        if (!status)
            status = session_check_finite(s, logits, n_logits);
    }
    if (!status)
        s->n_past += (uint32_t)n_tok;
    return status;
}

void moe_session_draft_stats(const moe_session *session, moe_draft_stats *stats)
{
    const size_t size = MOE_MIN(stats->size, sizeof *stats);
    moe_draft_stats full = session->ahead.drafter.stats;
    full.size = size;
    memcpy(stats, &full, size);
}

uint32_t moe_session_length(const moe_session *session)
{
    return session->n_past;
}

uint32_t moe_session_capacity(const moe_session *session)
{
    return session->options.n_ctx;
}

uint32_t moe_session_threads(const moe_session *session)
{
    return session->options.n_threads;
}

moe_status moe_session_rewind(moe_session *session, uint32_t n_tok)
{
    if (!session)
        return MOE_ERR_ARGUMENT;
    if (n_tok > session->n_past)
        return fail(&session->error, MOE_ERR_ARGUMENT, "n_tok", "expected at most %u, got %u",
                    session->n_past, n_tok);
    session->n_past = n_tok;
    session->ahead.n = session->ahead.lookup.n = 0;
    return MOE_OK;
}

moe_status moe_session_checkpoint(moe_session *session)
{
    if (!session)
        return MOE_ERR_ARGUMENT;
    moe_status status = MOE_OK;
    if (session->ahead.n) { /* the state is that of tokens that have not come yet */
        session->ahead.n = 0;
        status = session_restore(session);
    }
    session->keep_state = true;
    return status;
}

const moe_error *moe_session_error(const moe_session *session)
{
    return &session->error;
}

#endif
