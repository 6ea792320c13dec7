/* convert/plan.c - which type each tensor gets.
 *
 * A mix is a type for matrices and rules for some of them, as llama.cpp's quantizer has them under
 * the same names: sensitive matrices (output, attention values, the second matrix of a
 * feed-forward) get more bits, some of them only in the layers where it pays: the first and last
 * eighth, and every third between. Norms, biases and routers stay floats. */
#ifndef MOE_CONVERT_PLAN_C
#define MOE_CONVERT_PLAN_C

#include <regex.h>

#include "convert.h"
#include "encode_tcq.c"

enum { Q_F32 = 0, Q_F16 = 1, Q_Q5_0 = 6, Q_Q5_1 = 7, Q_Q8_0 = 8, Q_Q2_K = 10, Q_Q3_K = 11,
       Q_Q4_K = 12, Q_Q5_K = 13, Q_Q6_K = 14, Q_IQ4_NL = 20, Q_IQ4_XS = 23, Q_BF16 = 30,
       Q_TCQ4 = QUANT_TCQ_ID, Q_TCQ5, Q_TCQ8 };

typedef enum plan_when {
    WHEN_ALWAYS, WHEN_MORE_BITS, WHEN_FIRST_EIGHTH, WHEN_FIRST_16TH, WHEN_FIRST_4, WHEN_FIRST_2,
    WHEN_8_EXPERTS
} plan_when;

typedef struct plan_rule {
    const char *part; // of the name
    plan_when when;
    uint32_t type;
} plan_rule;

typedef struct plan_mix {
    const char *name;
    uint32_t file_type;  // GGUF's number for it
    uint32_t type;       // of matrices that no rule names
    plan_rule rules[8];  // the first that fits
} plan_mix;

static const plan_mix plan_mixes[] = {
    {"q3_k_s", 11, Q_Q3_K, {{0}}},
    {"q3_k_m", 12, Q_Q3_K, {{"attn_v", WHEN_FIRST_2, Q_Q5_K}, {"attn_v", WHEN_ALWAYS, Q_Q4_K},
                            {"ffn_down", WHEN_FIRST_16TH, Q_Q5_K},
                            {"ffn_down", WHEN_ALWAYS, Q_Q4_K},
                            {"attn_output", WHEN_ALWAYS, Q_Q4_K}}},
    {"q3_k_l", 13, Q_Q3_K, {{"attn_v", WHEN_ALWAYS, Q_Q5_K}, {"ffn_down", WHEN_ALWAYS, Q_Q5_K},
                            {"attn_output", WHEN_ALWAYS, Q_Q5_K}}},
    {"q4_k_s", 14, Q_Q4_K, {{"attn_v", WHEN_8_EXPERTS, Q_Q8_0}, {"attn_k", WHEN_8_EXPERTS, Q_Q8_0},
                            {"attn_v", WHEN_FIRST_4, Q_Q5_K},
                            {"ffn_down", WHEN_FIRST_EIGHTH, Q_Q5_K},
                            {"attn_output", WHEN_8_EXPERTS, Q_Q5_K}}},
    {"q4_k_m", 15, Q_Q4_K, {{"attn_v", WHEN_8_EXPERTS, Q_Q8_0}, {"attn_k", WHEN_8_EXPERTS, Q_Q8_0},
                            {"attn_v", WHEN_MORE_BITS, Q_Q6_K},
                            {"ffn_down", WHEN_MORE_BITS, Q_Q6_K},
                            {"attn_output", WHEN_8_EXPERTS, Q_Q5_K}}},
    {"q5_k_s", 16, Q_Q5_K, {{"attn_v", WHEN_8_EXPERTS, Q_Q8_0},
                            {"attn_k", WHEN_8_EXPERTS, Q_Q8_0}}},
    {"q5_k_m", 17, Q_Q5_K, {{"attn_v", WHEN_8_EXPERTS, Q_Q8_0}, {"attn_k", WHEN_8_EXPERTS, Q_Q8_0},
                            {"attn_v", WHEN_MORE_BITS, Q_Q6_K},
                            {"ffn_down", WHEN_MORE_BITS, Q_Q6_K}}},
};

/* GGUF's number of a file in one type. */
static const struct { uint32_t type, file_type; } plan_file_types[] = {
    {0, 0}, {1, 1}, {2, 2}, {3, 3}, {8, 7}, {6, 8}, {7, 9}, {10, 10}, {11, 11}, {12, 14}, {13, 16},
    {14, 18}, {20, 25}, {23, 30}, {30, 32}, {39, 38},
};

/* What --quant asked for. */
typedef struct plan {
    const plan_mix *mix;     // NULL: one type
    const moe_quant *type;   // NULL too: as in the source
    double bits;             // the rate of a trellis-coded type, if one was named
} plan;

/* "tcq3.7": the trellis-coded type for 3.7 bits per weight. */
static void plan_find_rate(plan *p, const char *name)
{
    char *end;
    if ((name[0] | 32) != 't' || (name[1] | 32) != 'c' || (name[2] | 32) != 'q' ||
        name[3] < '1' || name[3] > '6' || name[4] != '.')
        return;
    p->bits = strtod(name + 3, &end);
    if (!*end && p->bits <= 6)
        p->type = tcq_type(p->bits);
}

static moe_status plan_find(plan *p, const char *name, moe_error *error)
{
    char known[400];
    size_t used = 0;
    *p = (plan){0};
    if (!name)
        return MOE_OK;
    for (size_t i = 0; i < MOE_COUNT(plan_mixes); i++) {
        if (quant_name_equal(plan_mixes[i].name, name))
            p->mix = &plan_mixes[i];
        used += (size_t)snprintf(known + used, sizeof known - used, "%s ", plan_mixes[i].name);
    }
    p->type = quant_by_name(name);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        if (!quant_table[i]->given)
            used += (size_t)snprintf(known + used, sizeof known - used, "%s ",
                                     quant_table[i]->name);
    if (p->type && p->type->given)
        return fail(error, MOE_ERR_ARGUMENT, "--quant",
                    "expected a type that moe-convert quantizes to, got %s, which only stays where "
                    "the source has it; for a .moe file of this size say --bpw %.2f",
                    p->type->name, p->type->bits);
    if (!p->mix && !p->type)
        plan_find_rate(p, name);
    if (!p->mix && !p->type)
        return fail(error, MOE_ERR_ARGUMENT, "--quant",
                    "expected one of %s, or a rate such as tcq3.7, "
                    "1.0 to 6.0 bits per weight; got %s", known, name);
    return MOE_OK;
}

/* ----------------------------------------------------------------------------------- rules -- */

/* The layer in "blk.7.ffn_up.weight". */
static uint32_t plan_layer(const char *name)
{
    return strncmp(name, "blk.", 4) ? 0 : (uint32_t)strtoul(name + 4, NULL, 10);
}

static bool plan_applies(const plan_rule *rule, const conv_source *s, const char *name)
{
    const uint32_t i = plan_layer(name), n = s->n_layer, eighth = n / 8;
    const char *part = strstr(name, rule->part);
    const size_t bytes = strlen(rule->part);
    if (!part || (part[bytes] != '.' && part[bytes] != '_')) // attn_v.weight, ffn_down_exps.weight
        return false;
    switch (rule->when) {
    case WHEN_ALWAYS: return true;
    case WHEN_MORE_BITS: return i < eighth || i >= 7 * n / 8 || (i - eighth) % 3 == 2;
    case WHEN_FIRST_EIGHTH: return i < eighth;
    case WHEN_FIRST_16TH: return i < n / 16;
    case WHEN_FIRST_4: return i < 4;
    case WHEN_FIRST_2: return i < 2;
    case WHEN_8_EXPERTS: return s->n_expert == 8;
    }
    return false;
}

/* A type whose blocks fit the rows: the next best with short blocks, else half floats. */
static const moe_quant *plan_fit(const moe_quant *type, uint64_t row_len)
{
    static const struct { uint32_t from, to; } shorter[] = {
        {Q_Q2_K, Q_IQ4_NL}, {Q_Q3_K, Q_IQ4_NL}, {Q_IQ4_XS, Q_IQ4_NL}, {Q_Q4_K, Q_Q5_0},
        {Q_Q5_K, Q_Q5_1}, {Q_Q6_K, Q_Q8_0}, {Q_TCQ4, Q_IQ4_NL}, {Q_TCQ5, Q_Q5_0}, {Q_TCQ8, Q_Q8_0}};
    for (size_t i = 0; row_len % type->block_len && i < MOE_COUNT(shorter); i++)
        if (type->id == shorter[i].from)
            type = quant_by_id(shorter[i].to);
    return row_len % type->block_len ? quant_by_id(Q_F16) : type;
}

static bool plan_is_output(const conv_source *s, const char *name)
{
    return !strcmp(name, "output.weight") || (s->tied && !strcmp(name, "token_embd.weight"));
}

/* Tensors that are no matrices to multiply with in one of the integer formats. */
static bool plan_is_small(const conv_tensor *t)
{
    static const char *const parts[] = {"ssm_conv1d", "shortconv.conv", "ssm_a", "ssm_d"};
    const size_t n = strlen(t->name);
    for (size_t i = 0; i < MOE_COUNT(parts); i++)
        if (strstr(t->name, parts[i]))
            return true;
    return t->is_vector || t->is_router || t->n_dims < 2 || n < 7 ||
           strcmp(t->name + n - 7, ".weight") != 0;
}

/* The type that the source has, or one near it. */
static const moe_quant *plan_source_type(const conv_tensor *t)
{
    if (t->made)
        return quant_by_id(Q_F32);
    return conv_kept_type(&t->inputs[0]);
}

/* The rate of a tensor: the output matrix gets 1.5 bits more. */
static double plan_rate(const plan *p, const conv_source *s, const conv_tensor *t)
{
    return p->bits > 0 && plan_is_output(s, t->name) ? MOE_MIN(p->bits + 1.5, 6.0) : p->bits;
}

static const moe_quant *plan_type(const plan *p, const conv_source *s, const conv_tensor *t)
{
    if (plan_is_small(t))
        return s->dir ? plan_source_type(t) : quant_by_id(Q_F32);
    if (!p->mix && !p->type)
        return plan_source_type(t);
    if (!p->mix) {
        if (p->bits > 0)
            return plan_fit(tcq_type(plan_rate(p, s, t)), t->row_len);
        const bool k = p->type->block_len == 256;
        const bool more = k && p->type->id != Q_Q6_K && plan_is_output(s, t->name);
        return plan_fit(more ? quant_by_id(Q_Q6_K) : p->type, t->row_len);
    }
    const moe_quant *type = quant_by_id(p->mix->type);
    if (plan_is_output(s, t->name)) {
        type = quant_by_id(Q_Q6_K);
    } else {
        for (const plan_rule *r = p->mix->rules; r->part; r++)
            if (plan_applies(r, s, t->name)) {
                type = quant_by_id(r->type);
                break;
            }
    }
    return plan_fit(type, t->row_len);
}

/* -------------------------------------------------------------------------------- overrides -- */

/* The types of single experts, whose names are those of their tensor, "#" and the expert. Returns
 * how many match. */
static uint32_t plan_keep_parts(conv_source *s, conv_tensor *t, const regex_t *re,
                                const moe_quant *type, moe_status *status, moe_error *error)
{
    uint32_t n = 0;
    char name[CONVERT_MAX_NAME_BYTES];
    for (uint32_t i = 0; conv_is_experts(s, t) && i < s->n_expert; i++) {
        snprintf(name, sizeof name, "%s#%u", t->name, i);
        if (regexec(re, name, 0, NULL, 0))
            continue;
        if (!n++) { // a copy: the source's own types stay what they are
            const moe_quant **types = arena_alloc(&s->arena, s->n_expert, sizeof *types);
            for (uint32_t k = 0; types && k < s->n_expert; k++)
                types[k] = conv_part_type(t, k);
            if (!(t->part_types = types)) {
                *status = fail_memory(error, s->mem, t->name, s->n_expert * sizeof *types);
                return n;
            }
        }
        t->part_types[i] = type;
    }
    return n;
}

static moe_status plan_keep(conv_source *s, const conv_keep *keep, moe_error *error)
{
    regex_t re;
    char text[128];
    uint32_t n = 0;
    int code = regcomp(&re, keep->pattern, REG_EXTENDED | REG_NOSUB);
    if (code) {
        regerror(code, &re, text, sizeof text);
        return fail(error, MOE_ERR_ARGUMENT, "--keep",
                    "expected a regular expression, got \"%s\": %s", keep->pattern, text);
    }
    moe_status status = MOE_OK;
    for (size_t i = 0; i < s->n_tensors && !status; i++) {
        conv_tensor *t = &s->tensors[i];
        const bool whole = !regexec(&re, t->name, 0, NULL, 0);
        const uint32_t n_parts = whole ? 0 : plan_keep_parts(s, t, &re, keep->type, &status, error);
        if (!whole && !n_parts)
            continue;
        n++;
        if (t->dims[0] % keep->type->block_len)
            status = fail(error, MOE_ERR_ARGUMENT, t->name,
                          "expected a type whose blocks fit rows of %llu, got %s with blocks of %u",
                          (unsigned long long)t->dims[0], keep->type->name, keep->type->block_len);
        else if (t->is_vector && keep->type->block_len > 1)
            status = fail(error, MOE_ERR_ARGUMENT, t->name,
                          "expected F32, F16 or BF16 for a norm or a bias, got %s",
                          keep->type->name);
        t->is_kept = true;
        if (whole) {
            t->target = keep->type;
            t->bits = 0;
            t->part_types = NULL;
        }
    }
    regfree(&re);
    if (!status && !n)
        status = fail(error, MOE_ERR_ARGUMENT, "--keep",
                      "expected a pattern that some tensor's name "
                      "matches, got \"%s\"; see the names with --dry-run", keep->pattern);
    return status;
}

/* -------------------------------------------------------------------------------- the plan -- */

static bool plan_changes(const conv_source *s)
{
    for (size_t i = 0; i < s->n_tensors; i++) {
        const conv_tensor *t = &s->tensors[i];
        if (t->made || t->part_types != t->source_types || t->target != t->inputs[0].type)
            return true;
    }
    return false;
}

/* The number of the file's type: that of the mix, else of the type that most weights have. */
static uint32_t plan_file_type(const plan *p, const conv_source *s)
{
    uint64_t most = 0, by_type[MOE_COUNT(quant_table)] = {0};
    uint32_t type = 0, number = 0;
    if (p->mix)
        return p->mix->file_type;
    for (size_t i = 0; i < s->n_tensors; i++) {
        const conv_tensor *t = &s->tensors[i];
        const uint32_t n_parts = t->part_types ? s->n_expert : 1;
        for (uint32_t k = 0; k < n_parts; k++) {
            uint64_t *sum = &by_type[quant_index(conv_part_type(t, k))];
            *sum += t->row_len * t->n_rows / n_parts;
            if (*sum > most) {
                most = *sum;
                type = conv_part_type(t, k)->id;
            }
        }
    }
    for (size_t i = 0; i < MOE_COUNT(plan_file_types); i++)
        if (plan_file_types[i].type == type)
            number = plan_file_types[i].file_type;
    return number;
}

static void plan_tensor(const plan *p, const conv_source *s, conv_tensor *t)
{
    t->target = plan_type(p, s, t);
    t->bits = plan_rate(p, s, t);
    if (!p->mix && !p->type)
        t->part_types = t->source_types;
}

static uint64_t plan_bytes(const conv_source *s, const conv_tensor *t)
{
    const uint32_t n_parts = t->part_types ? s->n_expert : 1;
    uint64_t bytes = 0;
    for (uint32_t k = 0; k < n_parts; k++) {
        const moe_quant *type = conv_part_type(t, k);
        bytes += t->row_len * t->n_rows / n_parts / type->block_len * type->block_bytes;
    }
    return bytes;
}

/* Gives each tensor its type and size. */
static moe_status plan_types(plan *p, conv_source *s, const conv_options *options, moe_error *error)
{
    moe_status status = plan_find(p, options->quant, error);
    for (size_t i = 0; i < s->n_tensors && !status; i++) {
        conv_tensor *t = &s->tensors[i];
        if (t->row_len > CONVERT_MAX_ROW)
            status = fail(error, MOE_ERR_LIMIT, t->name, "expected rows of at most %d, got %llu",
                          CONVERT_MAX_ROW, (unsigned long long)t->row_len);
        plan_tensor(p, s, t);
    }
    for (uint32_t i = 0; i < options->n_keeps && !status; i++)
        status = plan_keep(s, &options->keeps[i], error);
    for (size_t i = 0; i < s->n_tensors && !status; i++)
        s->tensors[i].bytes = plan_bytes(s, &s->tensors[i]);
    return status;
}

/* Once the types are final: the keys that tell of them. */
static moe_status plan_finish(const plan *p, conv_source *s, moe_error *error)
{
    if (s->has_file_type || (s->dir && !plan_changes(s)))
        return MOE_OK;
    meta_writer w = {&s->kv, &s->n_kv, false};
    meta_put_u32(&w, "general.file_type", plan_file_type(p, s));
    meta_put_u32(&w, "general.quantization_version", 2);
    return w.failed ? fail_memory(error, s->mem, "metadata", s->kv.n) : MOE_OK;
}

#endif
