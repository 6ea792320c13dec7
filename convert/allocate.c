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
 * In: a source with a plan. Out: targets, or types of parts, of all matrices that --keep leaves
 * free. */
#ifndef MOE_CONVERT_ALLOCATE_C
#define MOE_CONVERT_ALLOCATE_C

#include "encode.c"

enum {
    ALLOC_MAX_TYPES = 16,
    ALLOC_GROUPS = 8,             // places in a tensor where rows are tried
    ALLOC_GROUP_WEIGHTS = 1 << 13 // of a place, at least
};

static const char *const alloc_types[] = {"Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1",
                                          "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"};

/* Some rows of a tensor in a type. */
typedef struct alloc_probe {
    uint32_t choice;
    const moe_quant *type;
    uint64_t row, n_rows;
    double cost, energy;
} alloc_probe;

/* A tensor whose type is free. */
typedef struct alloc_choice {
    conv_tensor *t;
    const moe_quant *types[ALLOC_MAX_TYPES]; // from small to large
    double loss[ALLOC_MAX_TYPES];
    uint32_t n_types;
    uint32_t n_parts;    // that have types of their own
    uint32_t first_unit;
} alloc_choice;

/* What gets one type: a tensor, or one matrix of a stack of experts. */
typedef struct alloc_unit {
    const alloc_choice *choice;
    double share;        // of the choice's loss
    uint32_t type;       // index into the choice's
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
    alloc_choice *choices;
    alloc_probe *probes;
    alloc_unit *units;
    alloc_step *steps;
    uint32_t n_choices, n_units, n_steps;
    size_t n_probes, next;
} alloc_state;

/* ------------------------------------------------------------------------------ measuring -- */

static bool alloc_next(void *self, encode_task *task)
{
    alloc_state *a = self;
    if (a->next == a->n_probes)
        return false;
    const alloc_probe *p = &a->probes[a->next];
    *task = (encode_task){.t = a->choices[p->choice].t, .type = p->type, .row = p->row,
                          .n_rows = p->n_rows, .number = a->next};
    a->next++;
    return true;
}

static moe_status alloc_put(void *self, encode_worker *w, const encode_task *task)
{
    alloc_state *a = self;
    a->probes[task->number].cost = w->cost_sum;
    a->probes[task->number].energy = w->energy_sum;
    return MOE_OK;
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
                              .put = alloc_put};
    for (uint32_t c = 0; c < a->n_choices; c++)
        for (uint32_t k = 0; k < a->choices[c].n_types; k++)
            for (uint32_t g = 0; g < ALLOC_GROUPS; g++) {
                alloc_probe p = {.choice = c, .type = a->choices[c].types[k]};
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

/* Of types of the same size the best stays, and none that is worse than a smaller one. */
static void alloc_prune(alloc_choice *c)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < c->n_types; k++) {
        if (n && alloc_bits(c->types[n - 1]) == alloc_bits(c->types[k]) &&
            c->loss[k] < c->loss[n - 1])
            n--;
        if (n && c->loss[k] >= c->loss[n - 1])
            continue;
        c->types[n] = c->types[k];
        c->loss[n++] = c->loss[k];
    }
    c->n_types = n;
}

/* Losses from probes, in their order, so that they do not depend on the threads. A type that the
 * source has already is copied and costs nothing; the energy is that of the others. */
static void alloc_losses(alloc_state *a)
{
    const alloc_probe *p = a->probes;
    for (uint32_t c = 0; c < a->n_choices; c++) {
        alloc_choice *choice = &a->choices[c];
        const conv_tensor *t = choice->t;
        double energy[ALLOC_GROUPS] = {0}, all = 0, cost[ALLOC_MAX_TYPES] = {0};
        for (uint32_t k = 0; k < choice->n_types; k++)
            for (uint32_t g = 0; g < ALLOC_GROUPS; g++, p++) {
                const uint64_t matrix = t->importance.n_matrix ? imatrix_matrix(t, p->row) : 0;
                const double use = alloc_use(t, matrix);
                energy[g] = fmax(energy[g], use * p->energy);
                cost[k] += use * p->cost;
            }
        for (uint32_t g = 0; g < ALLOC_GROUPS; g++)
            all += energy[g];
        for (uint32_t k = 0; k < choice->n_types; k++)
            choice->loss[k] = all > 0 ? cost[k] / all : 0;
        alloc_prune(choice);
    }
}

/* ------------------------------------------------------------------------------ choosing -- */

static uint64_t alloc_unit_bytes(const alloc_choice *c, uint32_t type)
{
    const moe_quant *q = c->types[type];
    return c->t->row_len / q->block_len * q->block_bytes * (c->t->n_rows / c->n_parts);
}

/* The part of a tensor's loss that is each matrix's, if all have the same type. */
static void alloc_shares(alloc_state *a, const alloc_choice *c)
{
    alloc_unit *units = &a->units[c->first_unit];
    double sum = 0;
    for (uint32_t k = 0; k < c->n_parts; k++)
        sum += units[k].share = alloc_use(c->t, k);
    for (uint32_t k = 0; k < c->n_parts; k++)
        units[k].share = c->n_parts > 1 && sum > 0 ? units[k].share / sum : 1.0 / c->n_parts;
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
            const double r = share * (c->loss[from] - c->loss[to]) / bytes;
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

/* At most what a file has beside the data of its tensors. A .moe file has a record for each layer,
 * and for each expert of a layer. */
static uint64_t alloc_overhead(const alloc_state *a)
{
    enum { HEADER = 4096, PER_TENSOR = 192, PER_UNIT = 128, PER_FILE = 512 };
    const conv_source *s = &a->job->source;
    const uint64_t n_records = a->parts ? (uint64_t)s->n_layer * (s->n_expert + 1) + 2 : 0;
    uint64_t bytes = HEADER + s->kv.n + PER_FILE * (uint64_t)s->n_files +
                     n_records * (MOEFILE_RECORD_ALIGN + sizeof(moefile_record));
    for (size_t i = 0; i < s->n_tensors; i++)
        bytes += PER_TENSOR + strlen(s->tensors[i].name) +
                 MOE_MAX(s->alignment, (uint64_t)MOEFILE_SLICE_ALIGN);
    return bytes + (uint64_t)a->n_units * (PER_UNIT + (a->parts ? MOEFILE_SLICE_ALIGN : 0));
}

/* What the file may have, and what of it is taken by tensors that are not free and by the header.
 * */
static uint64_t alloc_budget(const alloc_state *a, uint64_t *others)
{
    const conv_job *job = a->job;
    const conv_source *s = &job->source;
    uint64_t total = (uint64_t)(job->options.bits_per_weight * (double)job->n_weights / 8);
    *others = 0;
    for (size_t i = 0; i < s->n_tensors; i++)
        *others += plan_bytes(s, &s->tensors[i]);
    for (uint32_t c = 0; c < a->n_choices; c++)
        *others -= plan_bytes(s, a->choices[c].t);
    if (job->options.max_bytes) {
        *others += alloc_overhead(a);
        total = job->options.max_bytes;
    }
    return total;
}

/* Spends what is left on steps off the hull, of units whose next one did not fit: the best each time. */
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
                const double rate = unit->share * (c->loss[unit->type] - c->loss[to]) / (double)bytes;
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

static moe_status alloc_choose(alloc_state *a, moe_error *error)
{
    uint64_t used, budget = alloc_budget(a, &used);
    for (uint32_t u = 0; u < a->n_units; u++)
        used += alloc_unit_bytes(a->units[u].choice, 0);
    if (used > budget)
        return fail(error, MOE_ERR_LIMIT, a->job->options.max_bytes ? "--size" : "--bpw",
                    "expected at least %llu bytes, which is %.2f bits per weight, got %llu: not "
                    "even the smallest types fit", (unsigned long long)used,
                    8.0 * (double)used / (double)a->job->n_weights, (unsigned long long)budget);
    qsort(a->steps, a->n_steps, sizeof *a->steps, alloc_compare);
    for (uint32_t i = 0; i < a->n_steps; i++) {
        const alloc_step *step = &a->steps[i];
        alloc_unit *unit = &a->units[step->unit];
        if (unit->closed || unit->type != step->from)
            continue;
        unit->closed = step->bytes > budget - used;
        if (!unit->closed) {
            unit->type = step->to;
            used += step->bytes;
        }
    }
    alloc_fill(a, budget - used);
    return MOE_OK;
}

/* -------------------------------------------------------------------------------- the plan -- */

/* Types whose blocks fit the rows, by size. */
static void alloc_find_types(alloc_choice *c)
{
    for (size_t i = 0; i < MOE_COUNT(alloc_types); i++) {
        const moe_quant *q = quant_by_name(alloc_types[i]);
        uint32_t at = c->n_types;
        if (c->t->row_len % q->block_len)
            continue;
        for (; at && alloc_bits(c->types[at - 1]) > alloc_bits(q); at--)
            c->types[at] = c->types[at - 1];
        c->types[at] = q;
        c->n_types++;
    }
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
        alloc_find_types(&c);
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

/* Puts the result into the plan. */
static moe_status alloc_apply(const alloc_state *a, moe_error *error)
{
    conv_source *s = &a->job->source;
    for (uint32_t i = 0; i < a->n_choices; i++) {
        const alloc_choice *c = &a->choices[i];
        const alloc_unit *unit = &a->units[c->first_unit];
        bool differ = false;
        c->t->target = c->types[unit->type];
        c->t->part_types = NULL;
        for (uint32_t k = 1; k < c->n_parts; k++)
            differ |= unit[k].type != unit->type;
        if (!differ)
            continue;
        c->t->part_types = arena_alloc(&s->arena, c->n_parts, sizeof *c->t->part_types);
        if (!c->t->part_types)
            return fail_memory(error, s->mem, c->t->name, c->n_parts * sizeof *c->t->part_types);
        for (uint32_t k = 0; k < c->n_parts; k++)
            c->t->part_types[k] = c->types[unit[k].type];
    }
    return MOE_OK;
}

/* Gives all matrices that are free the types that fit best; each expert its own if `parts`. */
static moe_status allocate_types(conv_job *job, bool parts, moe_error *error)
{
    alloc_state a = {.job = job, .parts = parts};
    if (job->options.quant || (job->options.max_bytes && job->options.bits_per_weight > 0))
        return fail(error, MOE_ERR_ARGUMENT, job->options.quant ? "--quant" : "--bpw",
                    "expected one of --quant, --bpw and --size: each says what the types are");
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
        status = alloc_choose(&a, error);
    if (!status)
        status = alloc_apply(&a, error);
    mem_free(&job->mem, a.choices);
    mem_free(&job->mem, a.probes);
    mem_free(&job->mem, a.units);
    mem_free(&job->mem, a.steps);
    return status;
}

#endif
