/* convert/allocate.c - which types make the best file of a given size: --bpw and --size.
 *
 * For each matrix and each type the error is measured on some of its rows, as the part of the
 * output's energy that is lost:
 *     loss = sum over columns of m_i |w_i - q_i|^2 / sum of m_i |w_i|^2
 * with m_i the root of the mean square of what column i is multiplied with (--imatrix; else 1 for
 * all). Not the mean square itself, which the quantizers heed: where a few columns carry nearly all
 * of the energy, often for the first token alone, they would hide what happens to the rest. Losses
 * of different matrices add up in the model's divergence from its source, to first order
 * (Malinovskii et al. 2024, arXiv:2411.17525).
 *
 * From the cheapest type each, the step of the most gain per byte is taken, again and again, until
 * nothing fits: the Lagrangian optimum up to the last step. In a .moe file, which has a type for
 * each expert, an expert's loss counts as much as the text used it.
 *
 * In a compressed .moe file a matrix has a rate rather than a type: the trellis-coded types come at
 * any rate. A few rates are tried, the loss in between follows, and the last step is taken in part.
 * Bytes are those on disk there, which only encoding tells: convert/moe_size.c encodes enough to
 * know, and the choice is made again until the file has its size.
 *
 * In: a source with a plan. Out: targets, or types of parts, of all matrices that --keep leaves
 * free. */
#ifndef MOE_CONVERT_ALLOCATE_C
#define MOE_CONVERT_ALLOCATE_C

#include "moe_size.c"

enum {
    ALLOC_MAX_TYPES = 64,
    ALLOC_GROUPS = 8,              // places in a tensor where rows are tried
    ALLOC_GROUP_WEIGHTS = 1 << 13, // of a place, at least
    ALLOC_ROUNDS = 12              // at most, until a compressed file has its size
};

static const char *const alloc_types[] = {"Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1",
                                          "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
                                          "BF16"};
enum { ALLOC_WIDE = 2 }; // types at the end that are larger than all trellis-coded ones

/* Rates at which trellis-coded types are tried, and the step from one that may be chosen to the
 * next. In between the logarithm of the error is nearly a line: it falls by 6 dB per bit. */
static const double alloc_rates[] = {1.5, 2.75, 4.0, 6.0};
#define ALLOC_LEAST_RATE 1.0
#define ALLOC_MOST_RATE 6.0
#define ALLOC_RATE_STEP 0.125

/* A type that a tensor may have. */
typedef struct alloc_type {
    const moe_quant *type;
    double rate;         // of a trellis-coded type; 0: not asked for
    double bits;         // per weight, in the file
    double loss;
} alloc_type;

/* Some rows of a tensor in a type. */
typedef struct alloc_probe {
    uint32_t choice;
    const alloc_type *type;
    uint64_t row, n_rows;
    double cost, energy;
    uint64_t bytes, packed; // as blocks, and compressed
} alloc_probe;

/* A tensor whose type is free. */
typedef struct alloc_choice {
    conv_tensor *t;
    bool trellis;        // has rates to choose from
    alloc_type types[ALLOC_MAX_TYPES]; // from small to large
    uint32_t n_types;
    uint32_t n_parts;    // that have types of their own
    uint32_t first_unit;
} alloc_choice;

/* What gets one type: a tensor, or one matrix of a stack of experts. */
typedef struct alloc_unit {
    const alloc_choice *choice;
    double share;        // of the choice's loss
    uint32_t type;       // index into the choice's
    double rate;         // of a trellis-coded type: the type's, or up to the next one's
    bool closed;         // the next step did not fit
} alloc_unit;

/* From one type of a unit to a larger one. */
typedef struct alloc_step {
    uint32_t unit, from, to;
    uint64_t bytes;      // more than before
    double rate;         // loss that is gained per byte
} alloc_step;

typedef struct alloc_state {
    conv_job *job;
    bool parts;          // experts may have types of their own
    bool packs;          // the file is compressed
    alloc_choice *choices;
    alloc_probe *probes;
    alloc_unit *units;
    alloc_step *steps;
    uint32_t n_choices, n_units, n_steps;
    size_t n_probes, next;
    double got;          // bytes, of what counts, that the choice takes
} alloc_state;

/* ------------------------------------------------------------------------------ measuring -- */

static bool alloc_next(void *self, encode_task *task)
{
    alloc_state *a = self;
    if (a->next == a->n_probes)
        return false;
    const alloc_probe *p = &a->probes[a->next];
    *task = (encode_task){.t = a->choices[p->choice].t, .type = p->type->type,
                          .bits = p->type->rate, .row = p->row, .n_rows = p->n_rows,
                          .number = a->next};
    a->next++;
    return true;
}

static moe_status alloc_put(void *self, encode_worker *w, const encode_task *task)
{
    alloc_state *a = self;
    alloc_probe *p = &a->probes[task->number];
    moe_status status = MOE_OK;
    p->cost = w->cost_sum;
    p->energy = w->energy_sum;
    p->bytes = p->packed = w->blocks.n;
    if (!a->packs || p->type->rate > 0)
        return MOE_OK;
    if (!w->own && !(w->own = planes_open(w->mem)))
        return fail_memory(&w->error, w->mem, "compressor", MOEFILE_SEGMENT_BYTES);
    planes_packer *packer = w->own;
    const size_t block_bytes = task->type->block_bytes;
    const size_t per_row = (size_t)(task->t->row_len / task->type->block_len);
    const size_t row_bytes = per_row * block_bytes;
    const size_t most = MOEFILE_SEGMENT_BYTES / row_bytes * row_bytes;
    packer->out.n = packer->n_segments = 0;
    for (size_t at = 0, n; most && at < w->blocks.n && !status; at += n) {
        n = MOE_MIN(w->blocks.n - at, most);
        const moefile_blocks blocks = {task->type, n / block_bytes, per_row};
        status = planes_pack(packer, &blocks, w->blocks.data + at, task->t->name, &w->error);
    }
    if (most)
        p->packed = packer->out.n;
    return status;
}

/* How much the text used the matrix that a row belongs to, and how strong its inputs were. */
static double alloc_use(const conv_tensor *t, uint64_t matrix)
{
    const conv_importance *im = &t->importance;
    const uint64_t m = im->n_matrix > 1 ? matrix : 0;
    double sum = 0, all = 0;
    if (!im->n_matrix)
        return 1;
    for (uint64_t i = 0; i < t->row_len; i++)
        sum += (double)im->sums[m * t->row_len + i];
    if (im->counts[m] > 0)
        return sum;
    for (uint64_t k = 0; k < im->n_matrix; k++)
        all += (double)im->counts[k];
    for (uint64_t i = 0; i < t->row_len * im->n_matrix; i++)
        sum += (double)im->sums[i];
    return all > 0 ? 0.5 * sum / all : 1; // never used: as if half a token had
}

/* The groups of rows that are tried: evenly spread, whole heads. */
static uint64_t alloc_group(const conv_tensor *t, uint32_t group, uint64_t *row)
{
    const uint64_t unit = t->interleave ? t->interleave : 1, n_units = t->n_rows / unit;
    const uint64_t want = (ALLOC_GROUP_WEIGHTS + t->row_len * unit - 1) / (t->row_len * unit);
    const uint64_t first = n_units * group / ALLOC_GROUPS;
    const uint64_t end = n_units * (group + 1) / ALLOC_GROUPS;
    const uint64_t n = MOE_MIN(want, end - first);
    *row = (first + (end - first - n) / 2) * unit;
    return n * unit;
}

static moe_status alloc_measure(alloc_state *a, moe_error *error)
{
    conv_job *job = a->job;
    const uint64_t n_weights = job->n_weights;
    const encode_sink sink = {.self = a, .measure = true, .weigh = true, .next = alloc_next,
                              .put = alloc_put, .leave = moew_leave};
    for (uint32_t c = 0; c < a->n_choices; c++)
        for (uint32_t k = 0; k < a->choices[c].n_types; k++)
            for (uint32_t g = 0; g < ALLOC_GROUPS; g++) {
                alloc_probe p = {.choice = c, .type = &a->choices[c].types[k]};
                p.n_rows = alloc_group(a->choices[c].t, g, &p.row);
                a->probes[a->n_probes++] = p;
            }
    job->n_weights = 0;
    for (size_t i = 0; i < a->n_probes; i++)
        job->n_weights += a->probes[i].n_rows * a->choices[a->probes[i].choice].t->row_len;
    moe_status status = encode_all(job, &sink, 0, error);
    job->n_weights = n_weights;
    return status;
}

static double alloc_bits(const moe_quant *q)
{
    return 8.0 * q->block_bytes / q->block_len;
}

/* Whether the writer would compress what becomes so many bytes. */
static bool alloc_pays(const alloc_state *a, uint64_t bytes, uint64_t packed)
{
    const uint64_t percent = a->job->options.store == CONV_STORE_ZSTD ? 1 : CONV_AUTO_PERCENT;
    return a->packs && packed <= bytes - bytes / 100 * percent;
}

/* Puts a type to its place by size. */
static void alloc_insert(alloc_choice *c, const alloc_type *type)
{
    uint32_t at = c->n_types++;
    for (; at && c->types[at - 1].bits > type->bits; at--)
        c->types[at] = c->types[at - 1];
    c->types[at] = *type;
}

/* Of types of the same size the best stays, and none that is worse than a smaller one. */
static void alloc_prune(alloc_choice *c)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < c->n_types; k++) {
        const alloc_type *type = &c->types[k];
        if (n && c->types[n - 1].bits == type->bits && type->loss < c->types[n - 1].loss)
            n--;
        if (n && type->loss >= c->types[n - 1].loss)
            continue;
        c->types[n++] = *type;
    }
    c->n_types = n;
}

/* The loss at a rate, from those that were tried: log2(loss) by lines through neighbours. */
static double alloc_loss_at(const alloc_type *tried, double rate)
{
    uint32_t i = 0;
    while (i + 2 < MOE_COUNT(alloc_rates) && rate > tried[i + 1].rate)
        i++;
    const double least = 1e-30, part = (rate - tried[i].rate) / (tried[i + 1].rate - tried[i].rate);
    const double a = log2(fmax(tried[i].loss, least)), b = log2(fmax(tried[i + 1].loss, least));
    return exp2(a + part * (b - a));
}

/* The types in their order, with all rates instead of those that were tried: the first ones. */
static void alloc_sort(alloc_choice *c)
{
    alloc_type tried[ALLOC_MAX_TYPES];
    const uint32_t n = c->n_types, n_rates = c->trellis ? (uint32_t)MOE_COUNT(alloc_rates) : 0;
    memcpy(tried, c->types, n * sizeof *tried);
    c->n_types = 0;
    for (double rate = ALLOC_LEAST_RATE; n_rates && rate <= ALLOC_MOST_RATE;
         rate += ALLOC_RATE_STEP)
        alloc_insert(c, &(alloc_type){tcq_type(rate), rate, rate, alloc_loss_at(tried, rate)});
    for (uint32_t i = n_rates; i < n; i++)
        alloc_insert(c, &tried[i]);
    alloc_prune(c);
}

/* Losses and sizes from probes, in their order, so that they do not depend on the threads. A type
 * that the source has already is copied and costs nothing; the energy is that of the others. */
static void alloc_losses(alloc_state *a)
{
    const alloc_probe *p = a->probes;
    for (uint32_t c = 0; c < a->n_choices; c++) {
        alloc_choice *choice = &a->choices[c];
        const conv_tensor *t = choice->t;
        double energy[ALLOC_GROUPS] = {0}, all = 0;
        for (uint32_t k = 0; k < choice->n_types; k++) {
            alloc_type *type = &choice->types[k];
            uint64_t bytes = 0, packed = 0;
            for (uint32_t g = 0; g < ALLOC_GROUPS; g++, p++) {
                const uint64_t matrix = t->importance.n_matrix ? imatrix_matrix(t, p->row) : 0;
                const double use = alloc_use(t, matrix);
                energy[g] = fmax(energy[g], use * p->energy);
                type->loss += use * p->cost;
                bytes += p->bytes;
                packed += p->packed;
            }
            if (alloc_pays(a, bytes, packed))
                type->bits *= (double)packed / (double)bytes;
        }
        for (uint32_t g = 0; g < ALLOC_GROUPS; g++)
            all += energy[g];
        for (uint32_t k = 0; k < choice->n_types; k++)
            choice->types[k].loss = all > 0 ? choice->types[k].loss / all : 0;
        alloc_sort(choice);
    }
}

/* ------------------------------------------------------------------------------ choosing -- */

static uint64_t alloc_unit_bytes(const alloc_choice *c, uint32_t type)
{
    const uint64_t n = c->t->row_len * (c->t->n_rows / c->n_parts);
    return (uint64_t)(c->types[type].bits * (double)n / 8);
}

/* How much a tensor's loss counts. The output matrix's goes into the logits as it is, the others'
 * are diluted by all that the layers add up: it counts as much as half of them together. (Noise in
 * one matrix, and the divergence that it causes: 0.7 of them in SmolLM2-135M, 0.2 in Gemma 3
 * 270M.) */
static double alloc_weight(const alloc_state *a, const conv_tensor *t)
{
    return plan_is_output(&a->job->source, t->name) ? fmax(0.5 * (a->n_choices - 1), 1) : 1;
}

/* The part of a tensor's loss that is each matrix's, if all have the same type. */
static void alloc_shares(alloc_state *a, const alloc_choice *c)
{
    alloc_unit *units = &a->units[c->first_unit];
    const double weight = alloc_weight(a, c->t);
    double sum = 0;
    for (uint32_t k = 0; k < c->n_parts; k++)
        sum += units[k].share = alloc_use(c->t, k);
    for (uint32_t k = 0; k < c->n_parts; k++)
        units[k].share = weight * (c->n_parts > 1 && sum > 0 ? units[k].share / sum
                                                             : 1.0 / c->n_parts);
}

/* The steps along the lower convex hull of (bytes, loss): those that could ever be the best. */
static void alloc_add_steps(alloc_state *a, uint32_t unit)
{
    const alloc_choice *c = a->units[unit].choice;
    const double share = a->units[unit].share;
    for (uint32_t from = 0, best; from < c->n_types; from = best) {
        double rate = 0;
        best = c->n_types;
        for (uint32_t to = from + 1; to < c->n_types; to++) {
            const double bytes = (double)(alloc_unit_bytes(c, to) - alloc_unit_bytes(c, from));
            const double r = share * (c->types[from].loss - c->types[to].loss) / bytes;
            if (r > rate) {
                rate = r;
                best = to;
            }
        }
        if (best < c->n_types)
            a->steps[a->n_steps++] =
                (alloc_step){unit, from, best,
                             alloc_unit_bytes(c, best) - alloc_unit_bytes(c, from), rate};
    }
}

static int alloc_compare(const void *x, const void *y)
{
    const alloc_step *a = x, *b = y;
    if (a->rate != b->rate)
        return a->rate < b->rate ? 1 : -1;
    if (a->unit != b->unit)
        return a->unit < b->unit ? -1 : 1;
    return a->from < b->from ? -1 : 1;
}

/* At most what a GGUF file has beside the data of its tensors. */
static uint64_t alloc_overhead(const alloc_state *a)
{
    enum { HEADER = 4096, PER_TENSOR = 192 };
    const conv_source *s = &a->job->source;
    uint64_t bytes = HEADER + s->kv.n;
    for (size_t i = 0; i < s->n_tensors; i++)
        bytes += PER_TENSOR + strlen(s->tensors[i].name) + s->alignment;
    return bytes;
}

/* What is taken by tensors that are not free, and in a GGUF file by padding, and by the header if
 * that counts. */
static uint64_t alloc_others(const alloc_state *a)
{
    const conv_source *s = &a->job->source;
    uint64_t bytes = 0;
    for (size_t i = 0; i < s->n_tensors; i++)
        bytes += plan_bytes(s, &s->tensors[i]);
    for (uint32_t c = 0; c < a->n_choices; c++)
        bytes -= plan_bytes(s, a->choices[c].t);
    if (a->parts)
        return bytes;
    return bytes + (a->job->options.max_bytes ? alloc_overhead(a) : s->n_tensors * s->alignment);
}

/* Spends what is left on steps off the hull, of units whose next one did not fit: the best each
 * time. */
static void alloc_fill(alloc_state *a, uint64_t left)
{
    for (;;) {
        alloc_step best = {.rate = 0};
        for (uint32_t u = 0; u < a->n_units; u++) {
            const alloc_unit *unit = &a->units[u];
            const alloc_choice *c = unit->choice;
            const uint64_t now = alloc_unit_bytes(c, unit->type);
            for (uint32_t to = unit->type + 1; unit->closed && to < c->n_types; to++) {
                const uint64_t bytes = alloc_unit_bytes(c, to) - now;
                const double rate = unit->share *
                                    (c->types[unit->type].loss - c->types[to].loss) / (double)bytes;
                if (bytes <= left && rate > best.rate)
                    best = (alloc_step){.unit = u, .to = to, .bytes = bytes, .rate = rate};
            }
        }
        if (!(best.rate > 0))
            return;
        a->units[best.unit].type = best.to;
        left -= best.bytes;
    }
}

/* Takes as much of a step as fits, if it is from one rate of a trellis-coded type to another. */
static uint64_t alloc_take_part(alloc_unit *unit, const alloc_step *step, uint64_t left)
{
    const alloc_type *from = &unit->choice->types[step->from], *to = &unit->choice->types[step->to];
    if (!(from->rate > 0 && to->rate > 0))
        return 0;
    unit->rate = from->rate + (to->rate - from->rate) * (double)left / (double)step->bytes;
    return left;
}

static moe_status alloc_too_small(const alloc_state *a, uint64_t least, uint64_t most,
                                  moe_error *error)
{
    return fail(error, MOE_ERR_LIMIT, a->job->options.max_bytes ? "--size" : "--bpw",
                "expected at least %llu bytes, which is %.2f bits per weight, got %llu: not even "
                "the smallest types fit", (unsigned long long)least,
                8.0 * (double)least / (double)a->job->n_weights, (unsigned long long)most);
}

/* Bytes with the smallest types, of which `others` are taken. */
static uint64_t alloc_least(const alloc_state *a, uint64_t others)
{
    for (uint32_t u = 0; u < a->n_units; u++)
        others += alloc_unit_bytes(a->units[u].choice, 0);
    return others;
}

/* Chooses the types so that all together has `budget` bytes at most, of which `used` are with the
 * smallest types. */
static void alloc_choose(alloc_state *a, uint64_t budget, uint64_t used)
{
    for (uint32_t u = 0; u < a->n_units; u++) {
        alloc_unit *unit = &a->units[u];
        unit->type = 0;
        unit->rate = unit->choice->types[0].rate;
        unit->closed = false;
    }
    for (uint32_t i = 0; i < a->n_steps; i++) {
        const alloc_step *step = &a->steps[i];
        alloc_unit *unit = &a->units[step->unit];
        if (unit->closed || unit->type != step->from)
            continue;
        unit->closed = step->bytes > budget - used;
        if (unit->closed) {
            used += alloc_take_part(unit, step, budget - used);
            continue;
        }
        unit->type = step->to;
        unit->rate = unit->choice->types[step->to].rate;
        used += step->bytes;
    }
    if (!a->packs) // else what is left is less than what is known of sizes
        alloc_fill(a, budget - used);
}

/* -------------------------------------------------------------------------------- the plan -- */

/* Whether the trellis-coded types are there to choose from: they are made for compression, which
 * leaves small slices alone, and know blocks of 64. */
static bool alloc_has_trellis(const alloc_state *a, const alloc_choice *c)
{
    const moe_quant *q = tcq_type(ALLOC_LEAST_RATE);
    const uint64_t n = c->t->row_len * (c->t->n_rows / c->n_parts);
    return a->packs && c->t->row_len % q->block_len == 0 &&
           n / q->block_len * q->block_bytes >= MOEW_SMALL_BYTES;
}

static void alloc_add_type(alloc_choice *c, const moe_quant *q, double rate)
{
    if (c->t->row_len % q->block_len == 0)
        c->types[c->n_types++] = (alloc_type){q, rate, rate > 0 ? rate : alloc_bits(q), 0};
}

/* Types whose blocks fit the rows. Where there are trellis-coded types, they replace all that are
 * not larger. What the source has already costs nothing. */
static void alloc_find_types(const alloc_state *a, alloc_choice *c)
{
    const moe_quant *own = c->t->made ? NULL : conv_own_type(&c->t->inputs[0]);
    bool known = !own; // FP8 is kept in BF16
    c->trellis = alloc_has_trellis(a, c);
    for (size_t i = 0; c->trellis && i < MOE_COUNT(alloc_rates); i++)
        alloc_add_type(c, tcq_type(alloc_rates[i]), alloc_rates[i]);
    for (size_t i = c->trellis ? MOE_COUNT(alloc_types) - ALLOC_WIDE : 0;
         i < MOE_COUNT(alloc_types); i++) {
        const moe_quant *q = quant_by_name(alloc_types[i]);
        known |= q == own;
        alloc_add_type(c, q, 0);
    }
    if (!known && (a->parts || own->id < QUANT_OWN_ID))
        alloc_add_type(c, own, 0);
}

/* Finds what is free, and makes room for all that will be known of it. */
static moe_status alloc_plan(alloc_state *a, moe_error *error)
{
    conv_source *s = &a->job->source;
    a->choices = mem_alloc(s->mem, s->n_tensors, sizeof *a->choices);
    for (size_t i = 0; a->choices && i < s->n_tensors; i++) {
        conv_tensor *t = &s->tensors[i];
        alloc_choice c = {.t = t, .n_parts = a->parts && conv_is_experts(s, t) ? s->n_expert : 1};
        if (t->is_kept && t->part_types)
            return fail(error, MOE_ERR_ARGUMENT, t->name, "expected --keep of whole tensors: with "
                        "--bpw or --size the types of single experts are chosen");
        alloc_find_types(a, &c);
        if (t->is_kept || plan_is_small(t) || !c.n_types)
            continue;
        c.first_unit = a->n_units;
        a->n_units += c.n_parts;
        a->n_probes += c.n_types * ALLOC_GROUPS;
        a->choices[a->n_choices++] = c;
    }
    a->probes = mem_alloc(s->mem, a->n_probes, sizeof *a->probes);
    a->units = mem_alloc(s->mem, a->n_units, sizeof *a->units);
    a->steps = mem_alloc(s->mem, (uint64_t)a->n_units * ALLOC_MAX_TYPES, sizeof *a->steps);
    a->n_probes = 0;
    if (!a->choices || !a->probes || !a->units || !a->steps)
        return fail_memory(error, s->mem, "plan", a->n_units * sizeof *a->steps);
    for (uint32_t c = 0; c < a->n_choices; c++)
        for (uint32_t k = 0; k < a->choices[c].n_parts; k++)
            a->units[a->choices[c].first_unit + k].choice = &a->choices[c];
    return MOE_OK;
}

static const moe_quant *alloc_unit_type(const alloc_unit *unit)
{
    return unit->rate > 0 ? tcq_type(unit->rate) : unit->choice->types[unit->type].type;
}

/* Puts the result into the plan. */
static moe_status alloc_apply(const alloc_state *a, moe_error *error)
{
    conv_source *s = &a->job->source;
    for (uint32_t i = 0; i < a->n_choices; i++) {
        const alloc_choice *c = &a->choices[i];
        const alloc_unit *unit = &a->units[c->first_unit];
        bool differ = false;
        c->t->target = alloc_unit_type(unit);
        c->t->bits = unit->rate;
        c->t->part_types = NULL;
        c->t->part_bits = NULL;
        for (uint32_t k = 1; k < c->n_parts; k++)
            differ |= alloc_unit_type(&unit[k]) != c->t->target || unit[k].rate != unit->rate;
        if (differ) {
            const moe_quant **types = arena_alloc(&s->arena, c->n_parts, sizeof *types);
            double *bits = arena_alloc(&s->arena, c->n_parts, sizeof *bits);
            if (!types || !bits)
                return fail_memory(error, s->mem, c->t->name, c->n_parts * sizeof *types);
            for (uint32_t k = 0; k < c->n_parts; k++) {
                types[k] = alloc_unit_type(&unit[k]);
                bits[k] = unit[k].rate;
            }
            c->t->part_types = types;
            c->t->part_bits = bits;
        }
        c->t->bytes = plan_bytes(s, c->t);
    }
    return MOE_OK;
}

/* Nothing is left to gain. */
static bool alloc_is_full(const alloc_state *a)
{
    for (uint32_t u = 0; u < a->n_units; u++)
        if (a->units[u].type + 1 < a->units[u].choice->n_types)
            return false;
    return true;
}

/* Bytes of the file per byte of the budget, where both have changed by so much. */
static double alloc_slope(double budget, double got)
{
    const double slope = budget != 0 ? got / budget : 1;
    return slope > 0.3 && slope < 3 ? slope : 1;
}

/* A .moe file: chooses types for a budget, looks how large the file gets, and goes on from there by
 * the secant method, until at most 0.3 % and the padding of a record are left. What is not known
 * exactly gets 0.2 % to spare. */
static moe_status alloc_fit(alloc_state *a, uint64_t most, moe_error *error)
{
    conv_job *job = a->job;
    const uint64_t least = alloc_least(a, alloc_others(a));
    const uint64_t few = job->options.glance ? job->options.glance : SIZE_GLANCE;
    double budget = fmax((double)most, (double)least), last_budget = budget, last_got = 0;
    double smallest = INFINITY, largest = 0, best = 0;
    bool glance = job->n_weights > few, again = true; // again: the same budget would tell more
    for (int round = 0; round < ALLOC_ROUNDS && (again || budget != last_budget); round++) {
        alloc_choose(a, (uint64_t)budget, least);
        moe_status status = alloc_apply(a, error);
        if (!status)
            status = size_measure(job, glance ? few : SIZE_LOOK, error);
        if (status)
            return status;
        const uint64_t header = job->options.max_bytes ? 0 : job->header_bytes;
        const double got = (double)(job->file_bytes - header);
        const double want = (double)most * (1 - 0.002 * (1 - job->sampled));
        if (!glance && got <= want &&
            (got + MOEFILE_PAGE >= want * 0.997 || alloc_is_full(a))) {
            a->got = got;
            return MOE_OK;
        }
        if (!glance && got <= want && got > largest) {
            largest = got;
            best = budget;
        }
        smallest = fmin(smallest, got);
        const double slope = alloc_slope(budget - last_budget, got - last_got);
        last_budget = budget;
        last_got = got;
        if (!glance || got > want || !alloc_is_full(a))
            budget = fmax(budget + (0.9985 * want - got) / slope, (double)least);
        again = glance;
        glance = false;
    }
    if (!(best > 0))
        return alloc_too_small(a, (uint64_t)smallest, most, error);
    a->got = largest;
    alloc_choose(a, (uint64_t)best, least);
    return alloc_apply(a, error);
}

/* A GGUF file, whose size is known from its types. */
static moe_status alloc_fit_gguf(alloc_state *a, uint64_t most, moe_error *error)
{
    const uint64_t least = alloc_least(a, alloc_others(a));
    if (least > most)
        return alloc_too_small(a, least, most, error);
    alloc_choose(a, most, least);
    a->got = (double)alloc_others(a);
    for (uint32_t u = 0; u < a->n_units; u++)
        a->got += (double)alloc_unit_bytes(a->units[u].choice, a->units[u].type);
    return alloc_apply(a, error);
}

/* Says so if much of the room is left. Steps are coarse where types of the source are chosen: what
 * has its own type is exact already, and between the largest rate and Q8_0 there is nothing. */
static void alloc_note_left(const alloc_state *a, double most)
{
    uint32_t n_best = 0;
    if (a->got >= 0.98 * most)
        return;
    for (uint32_t u = 0; u < a->n_units; u++)
        n_best += a->units[u].type + 1 == a->units[u].choice->n_types;
    conv_note(&a->job->source, "%.1f %% of the size that was asked for stay unused: %u of %u "
              "matrices have the best type already%s", 100 * (1 - a->got / most), n_best,
              a->n_units, n_best < a->n_units ? ", a better one for another does not fit" : "");
}

/* Gives all matrices that are free the types that fit best; each expert its own in a .moe file. */
static moe_status allocate_types(conv_job *job, bool is_moe, moe_error *error)
{
    const conv_options *o = &job->options;
    alloc_state a = {.job = job, .parts = is_moe, .packs = is_moe && o->store != CONV_STORE_RAW};
    if (o->quant || (o->max_bytes && o->bits_per_weight > 0))
        return fail(error, MOE_ERR_ARGUMENT, o->quant ? "--quant" : "--bpw",
                    "expected one of --quant, --bpw and --size: each says what the types are");
    const uint64_t most =
        o->max_bytes ? o->max_bytes : (uint64_t)(o->bits_per_weight * (double)job->n_weights / 8);
    moe_status status = alloc_plan(&a, error);
    if (!status)
        status = alloc_measure(&a, error);
    if (!status)
        alloc_losses(&a);
    for (uint32_t c = 0; !status && c < a.n_choices; c++)
        alloc_shares(&a, &a.choices[c]);
    for (uint32_t u = 0; !status && u < a.n_units; u++)
        alloc_add_steps(&a, u);
    if (!status)
        qsort(a.steps, a.n_steps, sizeof *a.steps, alloc_compare);
    if (!status)
        status = is_moe ? alloc_fit(&a, most, error) : alloc_fit_gguf(&a, most, error);
    if (!status)
        alloc_note_left(&a, (double)most);
    mem_free(&job->mem, a.choices);
    mem_free(&job->mem, a.probes);
    mem_free(&job->mem, a.units);
    mem_free(&job->mem, a.steps);
    return status;
}

#endif
