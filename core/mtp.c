/* core/mtp.c - multi-token prediction: guesses by the model's own extra layer. DeepSeek-AI 2024,
 * arXiv:2412.19437, section 2.2.
 *
 * The layer takes, for each position p > 0, the token there and the model's normed output one
 * position before:
 *     x = join [norm(embedding(token p)); norm(output p - 1)];  x = layer(x);  y = norm(x)
 * and the output matrix on y says which token comes at p + 1. To guess further, y takes the place
 * of the model's output and the guess that of the token.
 *
 * It has a cache like any other layer, with the row of position p in slot p - 1. Rows are made when
 * they are needed: when a guess is asked for, or when there is no room for more of the model's
 * outputs.
 *
 * Owns: session_mtp. Must never: change what the session computes. */
#ifndef MOE_CORE_MTP_C
#define MOE_CORE_MTP_C

#include "session.c"

/* Outputs of position `pos` and further ones are no longer those of the sequence. */
static void mtp_cut(moe_session *s, uint32_t pos)
{
    static const float zeros[64];
    session_mtp *t = &s->mtp;
    const uint64_t row_bytes = s->model->hp.n_embd * sizeof(float);
    if (t->next != pos + 1 || t->token != s->history[pos]) // the row of `pos` may be there already
        t->next = MOE_MIN(t->next, MOE_MAX(pos, 1u));
    if (pos > t->from && pos <= t->to) {
        t->to = pos;
        return;
    }
    /* The output before `pos` is not there any more: one row is made without it. */
    t->from = pos ? pos - 1 : 0;
    t->to = pos;
    for (uint64_t done = 0; pos && done < row_bytes; done += sizeof zeros)
        s->pass.be->write(s->queue, view_at(s->pass.draft_outputs, done), zeros,
                          MOE_MIN(sizeof zeros, row_bytes - done));
}

/* Records the layer for the tokens at positions [first, first + n_tok), from the model's outputs in
 * front of each. The result is in p->x. */
static void mtp_record(moe_session *s, const moe_token *tokens, uint32_t first, uint32_t n_tok,
                       moe_view outputs)
{
    moe_pass *p = &s->pass;
    const moe_model *m = s->model;
    const moe_hparams *hp = &m->hp;
    const moe_layer *l = &m->layers[hp->n_layer];
    const uint32_t n = hp->n_embd;
    p->pos = first - 1;
    p->n_tok = n_tok;
    p->be->write(p->queue, p->ids, tokens, n_tok * sizeof *tokens);
    session_write_rope(s, 0, first, n_tok);
    if (hp->window)
        session_write_rope(s, 1, first, n_tok);
    const moe_weight *table = weight_present(&l->draft_embedding) ? &l->draft_embedding
                                                                  : &m->globals.embedding;
    const moe_embed_op embed = {p->x, p->ids, table, hp->embed_scale, n_tok};
    p->be->embed(p->queue, &embed);
    const moe_norm_op token = {.dst = p->draft_input, .src = p->x,
                               .weight = l->draft_token_norm.data,
                               .n_row = n_tok, .dim = n, .dst_stride = 2 * n, .src_stride = n,
                               .eps = hp->eps};
    moe_norm_op hidden = token;
    hidden.dst = view_at(p->draft_input, n * sizeof(float));
    hidden.src = outputs;
    hidden.weight = l->draft_hidden_norm.data;
    p->be->norm(p->queue, &token);
    p->be->norm(p->queue, &hidden);
    layer_linear(p, p->x, &l->draft_join, p->draft_input, NULL, false);
    moe_observe *observe = p->observe;
    const bool expanded = p->expanded;
    p->observe = NULL; /* what is guessed is not looked on */
    p->expanded = s->expand_from && n_tok >= s->expand_from;
    p->layer = hp->n_layer;
    m->family->layer(p, p->layer);
    p->expanded = expanded;
    p->observe = observe;
}

/* Rows of the positions up to `last`, whose token is in the history. */
static void mtp_catch_up(moe_session *s, uint32_t last)
{
    session_mtp *t = &s->mtp;
    const uint64_t row_bytes = s->model->hp.n_embd * sizeof(float);
    if (t->next > last)
        return;
    mtp_record(s, s->history + t->next, t->next, last + 1 - t->next,
               view_at(s->pass.draft_outputs, (t->next - 1 - t->from) * row_bytes));
    t->next = last + 1;
    t->token = s->history[last];
}

/* Makes room for the outputs of n_tok tokens more, such that the rows which are due behind them are
 * no more than a batch. */
static void mtp_prepare(moe_session *s, uint32_t pos, uint32_t n_tok)
{
    session_mtp *t = &s->mtp;
    const uint32_t n = s->model->hp.n_embd, n_batch = s->options.n_batch;
    if (!t->on)
        return;
    mtp_cut(s, pos);
    if (pos - t->from + n_tok <= n_batch + 1 && pos + 1 - t->next + n_tok <= n_batch)
        return;
    /* The last output is kept, for going back to here and on with another token. */
    mtp_catch_up(s, pos);
    const moe_view last = view_at(s->pass.draft_outputs,
                                  (uint64_t)(pos - 1 - t->from) * n * sizeof(float));
    const moe_copy_op copy = {s->pass.draft_outputs, last, 1, n, n, n};
    if (pos - 1 > t->from)
        s->pass.be->copy(s->pass.queue, &copy);
    t->from = pos - 1;
}

static void mtp_keep(moe_session *s, uint32_t n_tok)
{
    session_mtp *t = &s->mtp;
    const uint32_t n = s->model->hp.n_embd;
    if (!t->on)
        return;
    layer_norm(&s->pass,
               view_at(s->pass.draft_outputs, (uint64_t)(t->to - t->from) * n * sizeof(float)),
               s->pass.x, &s->model->globals.output_norm, n_tok, n);
    t->to += n_tok;
}

/* What the layer says behind the last of the n_row rows in p->x: logits to t->logits. Its normed
 * output goes to p->draft_output. */
static moe_status mtp_read(moe_session *s, uint32_t n_row)
{
    moe_pass *p = &s->pass;
    session_mtp *t = &s->mtp;
    const moe_hparams *hp = &s->model->hp;
    const moe_globals *g = &s->model->globals;
    const moe_layer *l = &s->model->layers[hp->n_layer];
    const moe_weight *norm = weight_present(&l->draft_norm) ? &l->draft_norm : &g->output_norm;
    const moe_weight *output = weight_present(&l->draft_output) ? &l->draft_output
                               : weight_present(&g->output)     ? &g->output
                                                                : &g->embedding;
    layer_norm(p, p->draft_output, view_at(p->x, (n_row - 1ull) * hp->n_embd * sizeof(float)), norm,
               1, hp->n_embd);
    p->n_tok = 1;
    layer_linear(p, p->logits, output, p->draft_output, NULL, false);
    return p->be->read(p->queue, p->logits, t->logits, (uint64_t)hp->n_vocab * sizeof(float),
                       &s->error);
}

/* The best token; the first of several. */
static moe_token mtp_best(const float *logits, uint32_t n_vocab)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n_vocab; i++)
        best = logits[i] > logits[best] ? i : best;
    return (moe_token)best;
}

/* Guesses n tokens behind the one at n_past, which is in the history. */
static moe_status mtp_guess(moe_session *s, uint32_t n, draft_guess *guess)
{
    session_mtp *t = &s->mtp;
    const uint32_t pos = s->n_past;
    *guess = (draft_guess){0};
    if (!pos)
        return MOE_OK;
    mtp_cut(s, pos);
    t->next = MOE_MIN(t->next, pos);
    const uint32_t n_row = pos + 1 - t->next;
    mtp_catch_up(s, pos);
    moe_status status = mtp_read(s, n_row);
    while (!status && ++guess->n < n) {
        moe_token *last = &guess->tokens[guess->n - 1];
        *last = mtp_best(t->logits, s->model->hp.n_vocab);
        mtp_record(s, last, pos + guess->n, 1, s->pass.draft_output);
        status = mtp_read(s, 1);
    }
    if (!status)
        guess->tokens[guess->n - 1] = mtp_best(t->logits, s->model->hp.n_vocab);
    return status;
}

#endif
