/* convert/hf.c - a Hugging Face checkpoint -> a source: config.json through the family's tables,
 * and each tensor of the family's bindings found in the safetensors files, with the shape it must
 * have.
 *
 * In: files that nobody has checked. Out: tensors whose places are known to lie in their files.
 * What the model does not use is an error: leaving it out would give wrong results. */
#ifndef MOE_CONVERT_HF_C
#define MOE_CONVERT_HF_C

#include "hf_weights.c"
#include "vocab.c"

/* --------------------------------------------------------------------------------- config -- */

static const moe_family *hf_family(json_ref root)
{
    char buf[64];
    const char *type = config_text(config_path(root, "model_type"), buf);
    for (size_t i = 0; i < MOE_COUNT(family_table); i++)
        if (config_find_word(family_table[i]->hf, type))
            return family_table[i];
    return NULL;
}

static moe_status hf_fail_family(const hf_source *h)
{
    char known[400], buf[64];
    size_t used = 0;
    json_ref type = config_path(h->root, "model_type");
    for (size_t i = 0; i < MOE_COUNT(family_table) && used < sizeof known; i++)
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? " " : "",
                                 family_table[i]->hf);
    return fail(h->error, type.node ? MOE_ERR_UNSUPPORTED : MOE_ERR_MODEL,
                "config.json: model_type", "expected one of %s; got %s", known,
                config_text(type, buf));
}

/* The name of the model: that of its folder. */
static void hf_put_general(hf_source *h, meta_writer *kv)
{
    char *real = realpath(h->dir, NULL);
    const char *slash = real ? strrchr(real, '/') : NULL;
    meta_put_string(kv, "general.architecture", h->family->arch);
    meta_put_string(kv, "general.type", "model");
    if (slash && slash[1] && utf8_valid((const uint8_t *)slash + 1, strlen(slash + 1)) ==
        strlen(slash + 1))
        meta_put_string(kv, "general.name", slash + 1);
    free(real);
}

/* Puts the config's key in front of an error about the GGUF key that was made from it. */
static moe_status hf_explain(const hf_source *h, moe_status status)
{
    const char *name = h->error ? config_name_of(h->family, h->error->subject) : NULL;
    if (!name)
        return status;
    moe_error inner = *h->error;
    return fail(h->error, status, inner.subject, "from config.json's %s: %.300s", name,
                inner.message + strlen(inner.subject) + 2);
}

/* Writes the keys and reads them as the runtime will. */
static moe_status hf_read_config(hf_source *h, json_ref generation)
{
    conv_source *s = h->source;
    config_reader r = {s, h->family, h->root, {&s->kv, &s->n_kv, false}, h->error, h->n_draft};
    text_buf file = {.mem = s->mem};
    moe_model model = {.family = h->family};
    hf_put_general(h, &r.kv);
    moe_status status = config_put_sampling(&r, generation);
    if (!status)
        status = config_put_table(&r, config_common, h->family->config);
    if (!status)
        status = config_put_table(&r, h->family->config, NULL);
    if (!status)
        status = config_check_forms(&r);
    if (!status)
        status = config_put_rope(&r);
    if (!status && r.kv.failed)
        status = fail_memory(h->error, s->mem, "metadata", s->kv.n);
    if (!status)
        status = meta_read_back(&model.dir, s, &file, h->error);
    if (!status) {
        status = model_read_hparams(&model, h->error);
        if (status)
            status = hf_explain(h, status);
        h->hp = model.hp;
        directory_close(model.dir);
    }
    buf_free(&file);
    snprintf(s->arch, sizeof s->arch, "%s", h->family->arch);
    s->n_layer = h->hp.n_layer;
    s->n_expert = h->hp.router.n_expert;
    return status;
}

/* ---------------------------------------------------------------------------------- names -- */

/* What stands for "model.layers.%u." of a layer with names of its own, and the rest of the name. */
static const char *hf_draft_place(const char **rest)
{
    static const char *const own[][2] = {{"eh_proj.weight", "fc.weight"},
                                         {"enorm.weight", "pre_fc_norm_embedding.weight"},
                                         {"hnorm.weight", "pre_fc_norm_hidden.weight"},
                                         {"shared_head.norm.weight", "norm.weight"}};
    for (size_t i = 0; i < MOE_COUNT(own); i++)
        if (!strcmp(*rest, own[i][0])) {
            *rest = own[i][1];
            return "";
        }
    return "layers.0.";
}

/* "model.layers.%u.x.%u.y" with its numbers, and the checkpoint's prefix for "model.". */
static const char *hf_name(const hf_source *h, const char *format, uint32_t layer, uint32_t expert,
                           char buf[CONVERT_MAX_NAME_BYTES])
{
    static const char layers[] = "model.layers.%u.";
    const uint32_t numbers[2] = {layer, expert};
    uint32_t n = 0;
    size_t used = 0;
    if (h->draft_prefix && h->hp.n_layer && layer >= h->hp.n_layer &&
        !strncmp(format, layers, sizeof layers - 1)) {
        format += sizeof layers - 1;
        const char *place = hf_draft_place(&format);
        used = (size_t)snprintf(buf, CONVERT_MAX_NAME_BYTES, "%s%s", h->draft_prefix, place);
        n = 1;
    } else if (!strncmp(format, "model.", 6)) {
        used = (size_t)snprintf(buf, CONVERT_MAX_NAME_BYTES, "%s", h->prefix);
        format += 6;
    }
    while (*format && used + 24 < CONVERT_MAX_NAME_BYTES) {
        if (format[0] == '%' && format[1] == 'u') {
            used += (size_t)snprintf(buf + used, 16, "%u", numbers[MOE_MIN(n, 1u)]);
            n++;
            format += 2;
        } else {
            buf[used++] = *format++;
        }
    }
    buf[used] = 0;
    return buf;
}

/* How the checkpoint's names begin: models with eyes keep their text part under another name. */
static moe_status hf_find_prefix(hf_source *h)
{
    static const char *const prefixes[] = {"model.", "language_model.model.",
                                           "model.language_model.", ""};
    char name[64];
    for (size_t i = 0; i < MOE_COUNT(prefixes); i++) {
        h->prefix = prefixes[i];
        snprintf(name, sizeof name, "%sembed_tokens.weight", h->prefix);
        if (st_find(&h->table, name))
            return MOE_OK;
    }
    return fail(h->error, MOE_ERR_MODEL, "model.embed_tokens.weight",
                "expected the token embedding among the %zu tensors of %s, got none", h->table.n,
                h->dir);
}

/* The bytes with which names of a layer for multi-token prediction of Qwen3.5's kind begin; 0: it
 * is none of them. */
static size_t hf_draft_names(const char *name)
{
    static const char *const prefixes[] = {"mtp.", "model.mtp."};
    for (size_t i = 0; i < MOE_COUNT(prefixes); i++)
        if (!strncmp(name, prefixes[i], strlen(prefixes[i])))
            return strlen(prefixes[i]);
    return 0;
}

/* Of the layers for multi-token prediction, of which config.json tells the number, one is carried
 * over, if the checkpoint has it. The number becomes what is carried over: the file tells of no
 * other. */
static void hf_count_draft(hf_source *h)
{
    static const char *const keys[] = {"num_nextn_predict_layers", "mtp_num_hidden_layers"};
    char name[CONVERT_MAX_NAME_BYTES];
    const double n_layer = json_double(config_path(h->root, "num_hidden_layers"), 0);
    for (size_t i = 0; i < MOE_COUNT(keys); i++) {
        json_ref v = config_path(h->root, keys[i]);
        if (!(json_double(v, 0) > 0))
            continue;
        snprintf(name, sizeof name, "%slayers.%.0f.eh_proj.weight", h->prefix, n_layer);
        h->draft_prefix = hf_find_weight(h, "mtp.fc.weight")         ? "mtp."
                          : hf_find_weight(h, "model.mtp.fc.weight") ? "model.mtp." : NULL;
        h->n_draft = h->draft_prefix || hf_find_weight(h, name);
        h->root.doc->nodes[v.node - h->root.doc->nodes].as.number = h->n_draft;
        if (!h->n_draft)
            conv_note(h->source, "the layer for multi-token prediction, of which config.json "
                      "tells, is not in the checkpoint");
    }
}

/* ------------------------------------------------------------------------- stacked experts -- */

/* Experts that the checkpoint stacks itself: "experts.down_proj" [n][out][in], and gate and up as
 * two halves of "experts.gate_up_proj" [n][2 out][in]. */
static moe_status hf_fused_experts(hf_source *h, const moe_binding *b, uint32_t layer,
                                   conv_tensor *t, bool *found)
{
    char format[CONVERT_MAX_NAME_BYTES], name[CONVERT_MAX_NAME_BYTES];
    const char *mark = strstr(b->hf, "experts.%u.");
    const bool down = b->field == offsetof(moe_layer, experts_down);
    const bool up = b->field == offsetof(moe_layer, experts_up);
    const uint64_t dims[3] = {t->dims[0], down ? t->dims[1] : 2 * t->dims[1], t->dims[2]};
    conv_input whole;
    *found = false;
    if (!mark || (!down && !up && b->field != offsetof(moe_layer, experts_gate)))
        return MOE_OK;
    snprintf(format, sizeof format, "%.*sexperts.%s", (int)(mark - b->hf), b->hf,
             down ? "down_proj" : "gate_up_proj");
    st_tensor *st = st_find(&h->table, hf_name(h, format, layer, 0, name));
    if (!st)
        return MOE_OK;
    *found = true;
    if (!hf_shape_is(st, dims, 3))
        return hf_fail_shape(h, st, dims, 3);
    moe_status status = hf_input(h, st, hf_is_plain(st, dims, 3), &whole);
    for (uint64_t e = 0; e < t->n_inputs && !status; e++) {
        const uint64_t matrix = dims[0] * dims[1] * st->dtype->bytes;
        t->inputs[e] = whole;
        t->inputs[e].offset += e * matrix + (up ? matrix / 2 : 0);
        if (!whole.type)
            hf_fp8_from_row(&t->inputs[e], dims, e, up ? dims[1] / 2 : 0);
    }
    return status;
}

/* ------------------------------------------------------------------------- delta rule -- */

/* Tensors with rows for the heads of a delta rule. In a checkpoint the value heads of one key head
 * stand together; GGUF wants them as the family says, and Qwen3-Next's queries, keys, values and
 * gates apart. */
static bool hf_is_delta(const hf_source *h, const moe_binding *b)
{
    static const size_t fields[] = {
        offsetof(moe_layer, conv_in), offsetof(moe_layer, conv), offsetof(moe_layer, delta_z),
        offsetof(moe_layer, delta_a), offsetof(moe_layer, delta_b),
        offsetof(moe_layer, delta_rate), offsetof(moe_layer, delta_bias)};
    for (size_t i = 0; i < MOE_COUNT(fields); i++)
        if (h->family->convert & CONVERT_DELTA && !(b->flags & BIND_GLOBAL) &&
            b->field == fields[i])
            return true;
    return false;
}

static bool hf_has_keys(const moe_binding *b)
{
    return b->field == offsetof(moe_layer, conv_in) || b->field == offsetof(moe_layer, conv);
}

/* Rows of a value head in a tensor. */
static uint32_t hf_delta_dim(const hf_source *h, const moe_binding *b)
{
    const bool wide = hf_has_keys(b) || b->field == offsetof(moe_layer, delta_z);
    return wide ? h->hp.delta.dim_v : 1;
}

/* The most rows that stay together, whatever the order. */
static uint32_t hf_delta_unit(const hf_source *h, const moe_binding *b)
{
    uint32_t a = hf_delta_dim(h, b), rest = hf_has_keys(b) ? h->hp.delta.dim_k : a;
    while (rest) {
        const uint32_t next = a % rest;
        a = rest;
        rest = next;
    }
    return a;
}

/* Which row of the checkpoint's tensor row r is; `packed`: of in_proj_qkvz, where each key head has
 * its query, its key, and the values and gates of its value heads. */
static uint64_t hf_delta_row(const hf_source *h, const moe_binding *b, bool packed, uint64_t r)
{
    const moe_delta_shape *d = &h->hp.delta;
    const uint64_t keys = (uint64_t)d->n_head_k * d->dim_k, dim = hf_delta_dim(h, b);
    const uint64_t each = d->n_head / d->n_head_k, group = 2 * (d->dim_k + each * d->dim_v);
    uint64_t first = 0;
    if (hf_has_keys(b)) {
        if (r < 2 * keys)
            return packed ? r % keys / d->dim_k * group + r / keys * d->dim_k + r % d->dim_k : r;
        r -= 2 * keys;
        first = 2 * keys;
    }
    uint64_t head = r / dim;
    if (d->tiled)
        head = head % d->n_head_k * each + head / d->n_head_k;
    if (!packed)
        return first + head * dim + r % dim;
    const uint64_t gates = hf_has_keys(b) ? 0 : each * d->dim_v;
    return head / each * group + 2 * d->dim_k + gates + head % each * dim + r % dim;
}

static moe_status hf_delta_inputs(hf_source *h, const moe_binding *b, uint32_t layer,
                                  conv_tensor *t)
{
    char name[CONVERT_MAX_NAME_BYTES];
    const moe_delta_shape *d = &h->hp.delta;
    const bool packed = strstr(b->hf, "in_proj_qkvz") != NULL;
    const uint64_t total = 2 * ((uint64_t)d->n_head_k * d->dim_k + (uint64_t)d->n_head * d->dim_v);
    const uint64_t dims[2] = {t->dims[0], packed ? total : t->dims[1]};
    const uint64_t unit = t->n_rows / t->n_inputs;
    st_tensor *st = hf_find_weight(h, hf_name(h, b->hf, layer, 0, name));
    conv_input whole;
    if (!st)
        return fail(h->error, MOE_ERR_MODEL, name,
                    "expected this tensor in a checkpoint of model_type %s, got none",
                    h->family->hf);
    moe_status status = hf_matrix(h, st, dims, t->n_dims, &whole);
    for (uint64_t i = 0; i < t->n_inputs && !status; i++) {
        const uint64_t row = hf_delta_row(h, b, packed, i * unit);
        uint64_t scales;
        t->inputs[i] = whole;
        t->inputs[i].offset += row * packed_row_bytes(&whole, t->row_len, &scales);
        t->inputs[i].scale_offset += row * scales;
        if (!whole.type)
            hf_fp8_from_row(&t->inputs[i], dims, 0, row);
    }
    return status;
}

/* ------------------------------------------------------------------------- packed experts -- */

/* One of the two parts of a matrix in MXFP4: bytes of `dims`. */
static moe_status hf_packed_part(hf_source *h, const char *name, const char *part,
                                 const uint64_t *dims, uint32_t n_dims, st_tensor **out)
{
    char full[CONVERT_MAX_NAME_BYTES + 16];
    snprintf(full, sizeof full, "%s_%s", name, part);
    st_tensor *st = *out = st_find(&h->table, full);
    if (!st)
        return fail(h->error, MOE_ERR_MODEL, full,
                    "expected this tensor in a checkpoint of model_type %s, got none",
                    h->family->hf);
    if (strcmp(st->dtype->name, "U8"))
        return fail(h->error, MOE_ERR_UNSUPPORTED, full, "expected bytes (U8), got %s",
                    st->dtype->name);
    st->used = true;
    return hf_shape_is(st, dims, n_dims) ? MOE_OK : hf_fail_shape(h, st, dims, n_dims);
}

/* gpt-oss in floats: the stack's matrices are transposed, [expert][in][out], and columns of gate
 * and up take turns. */
static moe_status hf_transposed_experts(hf_source *h, st_tensor *st, uint64_t step, bool up,
                                        conv_tensor *t)
{
    const uint64_t dims[3] = {step * t->dims[1], t->dims[0], t->dims[2]};
    const uint64_t n_expert = t->dims[2];
    conv_input whole;
    if (!hf_shape_is(st, dims, 3))
        return hf_fail_shape(h, st, dims, 3);
    if (!strcmp(st->dtype->name, "F8_E4M3"))
        return fail(h->error, MOE_ERR_UNSUPPORTED, st->name,
                    "expected experts in F32, F16, BF16 or MXFP4, since they are transposed, got "
                    "%s; convert the checkpoint that it was made from", st->dtype->name);
    moe_status status = hf_input(h, st, false, &whole);
    if (status)
        return status;
    t->inputs = arena_alloc(&h->source->arena, n_expert, sizeof *t->inputs);
    if (!t->inputs)
        return fail_memory(h->error, h->source->mem, t->name, n_expert * sizeof *t->inputs);
    t->n_inputs = (uint32_t)n_expert;
    whole.row_step = (uint32_t)step;
    whole.transposed = (uint32_t)dims[0];
    whole.offset += up ? st->dtype->bytes : 0;
    for (uint64_t e = 0; e < n_expert; e++) {
        t->inputs[e] = whole;
        t->inputs[e].offset += e * dims[0] * dims[1] * st->dtype->bytes;
    }
    return MOE_OK;
}

/* gpt-oss: experts stacked and in MXFP4, 16 bytes of codes for each 32 weights in one tensor and
 * their exponents in another. Rows of gate and up take turns in one matrix, and so do their
 * biases. */
static moe_status hf_packed_experts(hf_source *h, const moe_binding *b, uint32_t layer,
                                    conv_tensor *t)
{
    char name[CONVERT_MAX_NAME_BYTES];
    const uint64_t n_in = t->dims[0], step = strstr(b->hf, "gate_up_proj") ? 2 : 1;
    const bool up = b->field == offsetof(moe_layer, experts_up) ||
                    b->field == offsetof(moe_layer, experts_up_bias);
    const uint64_t blocks[4] = {16, n_in / 32, step * t->dims[1], t->dims[2]};
    const uint64_t bias[2] = {step * n_in, t->dims[1]};
    st_tensor *codes, *scales;
    moe_status status;
    hf_name(h, b->hf, layer, 0, name);
    st_tensor *st = st_find(&h->table, name);
    if (st && !t->is_vector)
        return hf_transposed_experts(h, st, step, up, t);
    if (t->is_vector) {
        if (!st)
            return fail(h->error, MOE_ERR_MODEL, name,
                        "expected this tensor in a checkpoint of model_type %s, got none",
                        h->family->hf);
        if (!hf_shape_is(st, bias, 2))
            return hf_fail_shape(h, st, bias, 2);
        t->row_len = 1; // worked on as a column, of which this is every second number
        t->n_rows = n_in * t->dims[1];
        status = hf_input(h, st, false, t->inputs);
        t->inputs->offset += up ? st->dtype->bytes : 0;
        t->inputs->row_step = (uint32_t)step;
        return status;
    }
    if (n_in % 32)
        return fail(h->error, MOE_ERR_MODEL, name,
                    "expected rows of a multiple of 32 in MXFP4, got %llu by config.json",
                    (unsigned long long)n_in);
    if ((status = hf_packed_part(h, name, "blocks", blocks, 4, &codes)) ||
        (status = hf_packed_part(h, name, "scales", blocks + 1, 3, &scales)))
        return status;
    *t->inputs = (conv_input){
        .file = codes->file, .name = codes->name, .offset = codes->offset + (up ? n_in / 2 : 0),
        .type = &quant_mxfp4, .apart = APART_MXFP4, .scale_file = scales->file,
        .scale_offset = scales->offset + (up ? n_in / 32 : 0), .row_step = (uint32_t)step};
    return MOE_OK;
}

static moe_status hf_find_inputs(hf_source *h, const moe_binding *b, uint32_t layer, conv_tensor *t)
{
    char name[CONVERT_MAX_NAME_BYTES];
    if (strstr(b->hf, ".mlp.experts.gate_up_proj") ||
        (strstr(b->hf, ".mlp.experts.down_proj") && !t->is_vector))
        return hf_packed_experts(h, b, layer, t);
    const uint32_t n_dims = t->n_inputs > 1 || strstr(b->hf, "experts.%u.") ? 2 : t->n_dims;
    if (hf_is_delta(h, b))
        return hf_delta_inputs(h, b, layer, t);
    for (uint32_t e = 0; e < t->n_inputs; e++) {
        st_tensor *st = hf_find_weight(h, hf_name(h, b->hf, layer, e, name));
        moe_status status;
        if (!st && e == 0) {
            bool found;
            status = hf_fused_experts(h, b, layer, t, &found);
            if (status || found)
                return status;
        }
        if (!st)
            return fail(h->error, MOE_ERR_MODEL, name,
                        "expected this tensor in a checkpoint of model_type %s, got none",
                        h->family->hf);
        if ((status = hf_matrix(h, st, t->dims, n_dims, &t->inputs[e])))
            return status;
    }
    return MOE_OK;
}

/* --------------------------------------------------------------------------------- tensors -- */

/* Whether a tensor is there at all, under its own name or stacked. */
static bool hf_present(const hf_source *h, const moe_binding *b, uint32_t layer)
{
    char name[CONVERT_MAX_NAME_BYTES], format[CONVERT_MAX_NAME_BYTES];
    const char *mark = b->hf ? strstr(b->hf, "experts.%u.") : NULL;
    if (b->hf && hf_find_weight(h, hf_name(h, b->hf, layer, 0, name)))
        return true;
    snprintf(format, sizeof format, "%.*sexperts.%s", mark ? (int)(mark - b->hf) : 0,
             mark ? b->hf : "",
             b->field == offsetof(moe_layer, experts_down) ? "down_proj" : "gate_up_proj");
    return mark && st_find(&h->table, hf_name(h, format, layer, 0, name));
}

static moe_status hf_new_tensor(hf_source *h, const moe_binding *b, uint32_t layer,
                                conv_tensor **out)
{
    conv_source *s = h->source;
    char name[96];
    conv_tensor *t = *out = &s->tensors[s->n_tensors++];
    *t = (conv_tensor){.dims = {1, 1, 1, 1}, .n_inputs = 1};
    t->name = conv_text(s, "%s", binding_name(b, layer, name, sizeof name));
    uint64_t n = 1;
    for (uint32_t d = 0; d < 3 && b->dims[d] != DIM_NONE; d++) {
        t->dims[t->n_dims++] = dim_value(&h->hp, layer, (moe_dim)b->dims[d]);
        if (!checked_mul(n, t->dims[d], &n) || n > INT64_MAX / 8)
            return fail(h->error, MOE_ERR_LIMIT, t->name, "expected fewer elements");
    }
    t->is_vector = (b->flags & BIND_VECTOR) != 0;
    t->is_router = !(b->flags & BIND_GLOBAL) && b->field == offsetof(moe_layer, router);
    const moe_dim last = (moe_dim)b->dims[t->n_dims - 1];
    if (h->family->convert & CONVERT_INTERLEAVE_QK && (last == DIM_Q || last == DIM_K))
        t->interleave = h->hp.head_dim;
    const char *end = t->name + strlen(t->name) - MOE_MIN(strlen(t->name), strlen("norm.weight"));
    t->plus_1 = h->family->convert & CONVERT_NORM_PLUS_1 && !strcmp(end, "norm.weight") &&
                b->field != offsetof(moe_layer, delta_norm);
    t->minus_exp = b->field == offsetof(moe_layer, delta_rate) && !(b->flags & BIND_GLOBAL);
    if (h->family->convert & CONVERT_DELTA && h->hp.delta.tiled &&
        b->field == offsetof(moe_layer, conv_out))
        t->tile = (conv_tile){h->hp.delta.n_head_k, h->hp.delta.n_head / h->hp.delta.n_head_k,
                              h->hp.delta.dim_v};
    // a vector whose elements change places is worked on as a column
    const bool column = t->interleave || hf_is_delta(h, b);
    t->row_len = column && t->n_dims == 1 ? 1 : t->dims[0];
    t->n_rows = n / t->row_len;
    if (hf_is_delta(h, b))
        t->n_inputs = (uint32_t)(t->n_rows / hf_delta_unit(h, b));
    if (b->hf && strstr(b->hf, "%u") && strstr(strstr(b->hf, "%u") + 2, "%u"))
        t->n_inputs = (uint32_t)t->dims[t->n_dims - 1];
    t->inputs = arena_alloc(&s->arena, t->n_inputs, sizeof *t->inputs);
    return t->inputs && t->name ? MOE_OK : fail_memory(h->error, s->mem, "tensors", t->n_inputs);
}

/* Divisors of the rotary frequencies where only the first share of the pairs is rotated, at the
 * frequencies that they have among all: the others are divided until they stand still. */
static moe_status hf_make_proportional(hf_source *h, const moe_binding *b, json_ref rope)
{
    config_reader r = {h->source, h->family, h->root, {0}, h->error, 0};
    double share, factor;
    conv_tensor *t;
    moe_status status;
    if ((status = config_rope_number(&r, rope, "partial_rotary_factor", 1, &share)) ||
        (status = config_rope_number(&r, rope, "factor", 1, &factor)) ||
        (status = hf_new_tensor(h, b, 0, &t)))
        return status;
    if (!(share >= 0 && share <= 1 && factor > 0))
        return config_fail(&r, MOE_ERR_MODEL, "rope_parameters", "a partial_rotary_factor from 0 "
                           "to 1 and a positive factor", rope);
    float *made = arena_alloc(&h->source->arena, t->dims[0], sizeof *made);
    if (!made)
        return fail_memory(h->error, h->source->mem, t->name, t->dims[0] * sizeof *made);
    const uint64_t n_turned = (uint64_t)floor(share * h->hp.n_rot / 2);
    for (uint64_t i = 0; i < t->dims[0]; i++)
        made[i] = i < n_turned ? (float)factor : 1e30f;
    t->made = made;
    return MOE_OK;
}

/* Divisors of the rotary frequencies, as Llama 3.1 stretches them; see rope_type llama3 in
 * transformers' modeling_rope_utils. Slow pairs are divided by the factor, fast ones by nothing. */
static moe_status hf_make_rope_freqs(hf_source *h, const moe_binding *b)
{
    json_ref rope = config_rope(h->root);
    config_reader r = {h->source, h->family, h->root, {0}, h->error, 0};
    double factor, low, high, n_ctx;
    conv_tensor *t;
    moe_status status;
    if (json_typeof(rope) == JSON_OBJECT && config_rope_is(rope, "proportional"))
        return hf_make_proportional(h, b, rope);
    if (json_typeof(rope) != JSON_OBJECT || !config_rope_is(rope, "llama3"))
        return MOE_OK;
    if ((status = config_rope_number(&r, rope, "factor", NAN, &factor)) ||
        (status = config_rope_number(&r, rope, "low_freq_factor", NAN, &low)) ||
        (status = config_rope_number(&r, rope, "high_freq_factor", NAN, &high)) ||
        (status = config_rope_number(&r, rope, "original_max_position_embeddings", NAN, &n_ctx)) ||
        (status = hf_new_tensor(h, b, 0, &t)))
        return status;
    if (!(factor > 0 && high > low && low > 0 && n_ctx > 0))
        return config_fail(&r, MOE_ERR_MODEL, "rope_scaling", "positive numbers, and "
                           "high_freq_factor above low_freq_factor", rope);
    float *made = arena_alloc(&h->source->arena, t->dims[0], sizeof *made);
    if (!made)
        return fail_memory(h->error, h->source->mem, t->name, t->dims[0] * sizeof *made);
    for (uint64_t i = 0; i < t->dims[0]; i++) {
        const double freq = pow((double)h->hp.rope.base, -2.0 * (double)i / h->hp.n_rot);
        const double turns = n_ctx * freq / (2 * M_PI);
        double smooth = (turns - low) / (high - low);
        smooth = smooth < 0 ? 0 : smooth > 1 ? 1 : smooth;
        made[i] = (float)(1 / ((1 - smooth) / factor + smooth));
    }
    t->made = made;
    return MOE_OK;
}

/* The output matrix: none of its own if the embedding is used for it. One that is in the checkpoint
 * and differs from the embedding is used whatever the config says, as transformers does. */
static moe_status hf_check_tied(hf_source *h, const moe_binding *b, bool *skip)
{
    json_ref tied = config_path(h->root, "tie_word_embeddings");
    if (!tied.node)
        tied = config_path(h->whole, "tie_word_embeddings");
    char name[CONVERT_MAX_NAME_BYTES];
    st_tensor *t = hf_find_weight(h, hf_name(h, b->hf, 0, 0, name));
    bool same = false;
    if (t && json_bool(tied, false)) {
        moe_status status = st_compare(t, st_find(&h->table, hf_name(h, "model.embed_tokens.weight",
                                                                     0, 0, name)),
                                       &same, h->error);
        if (status)
            return status;
        t->used = same;
        if (!same)
            conv_note(h->source, "config.json says that the embedding is the output matrix too, "
                      "but the checkpoint has another one: it is used");
    }
    *skip = same || !t;
    if (!t && json_typeof(tied) == JSON_FALSE)
        return fail(h->error, MOE_ERR_MODEL, name,
                    "expected an output matrix, since config.json says tie_word_embeddings false, "
                    "got none");
    h->source->tied = *skip;
    return MOE_OK;
}

/* Experts that come in several types. */
static moe_status hf_mix_types(hf_source *h, conv_tensor *t)
{
    bool same = true;
    for (uint32_t i = 1; i < t->n_inputs; i++)
        same &= conv_own_type(&t->inputs[i]) == conv_own_type(&t->inputs[0]);
    if (same || !conv_is_experts(h->source, t))
        return MOE_OK;
    t->source_types = arena_alloc(&h->source->arena, t->n_inputs, sizeof *t->source_types);
    if (!t->source_types)
        return fail_memory(h->error, h->source->mem, t->name,
                           t->n_inputs * sizeof *t->source_types);
    for (uint32_t i = 0; i < t->n_inputs; i++)
        t->source_types[i] = conv_kept_type(&t->inputs[i]);
    return MOE_OK;
}

/* Blocks whose columns change places go there as they are. */
static moe_status hf_check_tile(hf_source *h, const conv_tensor *t)
{
    const moe_quant *type = t->inputs->type;
    if (!t->tile.head_k || !type || t->tile.dim % type->block_len == 0)
        return MOE_OK;
    return fail(h->error, MOE_ERR_UNSUPPORTED, t->inputs->name,
                "expected heads of a multiple of %u in %s, got %u", type->block_len, type->name,
                t->tile.dim);
}

/* The factors of matrices become a tensor "x.scale" beside "x.weight", of experts one for each.
 * Where the runtime looks for none, the weights themselves are multiplied, and kept as floats. */
static moe_status hf_make_factors(hf_source *h, const moe_binding *b, uint32_t layer,
                                  const conv_tensor *t)
{
    conv_source *s = h->source;
    char name[96];
    const moe_model model = {.family = h->family};
    const bool stack = b->dims[2] == DIM_EXPERT;
    const uint32_t n = stack ? (uint32_t)t->dims[2] : 1;
    bool any = false;
    for (uint32_t i = 0; i < t->n_inputs; i++)
        any |= t->inputs[i].factor > 0;
    if (!any || t->is_router || (stack && t->n_inputs != n) ||
        !binding_scale(&model, b, layer, ".scale", name, sizeof name))
        return MOE_OK;
    float *made = arena_alloc(&s->arena, n, sizeof *made);
    conv_tensor *f = &s->tensors[s->n_tensors++];
    *f = (conv_tensor){.name = conv_text(s, "%s", name), .n_dims = 1, .dims = {n, 1, 1, 1},
                       .row_len = n, .n_rows = 1, .inputs = t->inputs, .n_inputs = 1,
                       .made = made, .is_vector = true};
    if (!made || !f->name)
        return fail_memory(h->error, s->mem, t->name, n * sizeof *made);
    for (uint32_t i = 0; i < n; i++)
        made[i] = t->inputs[i].factor > 0 ? t->inputs[i].factor : 1;
    for (uint32_t i = 0; i < t->n_inputs; i++)
        t->inputs[i].factor = 0;
    return MOE_OK;
}

static moe_status hf_add(hf_source *h, const moe_binding *b, uint32_t layer)
{
    conv_tensor *t;
    bool skip = false;
    const bool global = b->flags & BIND_GLOBAL;
    if (global && b->field == offsetof(moe_globals, rope_freqs))
        return hf_make_rope_freqs(h, b);
    if (!b->hf || (b->flags & BIND_OPTIONAL && !hf_present(h, b, layer) &&
                   !(global && b->field == offsetof(moe_globals, output))))
        return MOE_OK;
    if (global && b->field == offsetof(moe_globals, output)) {
        moe_status status = hf_check_tied(h, b, &skip);
        if (status || skip)
            return status;
    }
    moe_status status = hf_new_tensor(h, b, layer, &t);
    if (!status)
        status = hf_find_inputs(h, b, layer, t);
    if (!status)
        status = hf_check_tile(h, t);
    if (!status)
        status = hf_make_factors(h, b, layer, t);
    return status ? status : hf_mix_types(h, t);
}

/* All bindings of the layers (layer < n_layer), or those outside: the embedding comes first in the
 * file, the rest last. */
static moe_status hf_add_all(hf_source *h, uint32_t layer, bool global, bool embedding)
{
    moe_status status = MOE_OK;
    for (uint32_t i = 0; h->family->bindings[i] && !status; i++) {
        for (const moe_binding *b = h->family->bindings[i]; b->gguf && !status; b++) {
            const bool is_global = (b->flags & BIND_GLOBAL) != 0;
            if (is_global != global ||
                (global && (b->field == offsetof(moe_globals, embedding)) != embedding))
                continue;
            if (global || binding_applies(&h->hp, b, layer))
                status = hf_add(h, b, layer);
        }
    }
    return status;
}

static moe_status hf_reserve(hf_source *h)
{
    uint64_t n = 0;
    for (uint32_t i = 0; h->family->bindings[i]; i++)
        for (const moe_binding *b = h->family->bindings[i]; b->gguf; b++)
            n += 2 * (b->flags & BIND_GLOBAL ? 1 : h->hp.n_layer_all); // each may have a factor
    h->source->tensors = arena_alloc(&h->source->arena, n, sizeof *h->source->tensors);
    return h->source->tensors ? MOE_OK : fail_memory(h->error, h->source->mem, "tensors", n);
}

/* Tensors without weights of the text model, which may be left out. */
static bool hf_ignored(const hf_source *h, const char *name)
{
    static const char *const endings[] = {".rotary_emb.inv_freq", ".attention.bias",
                                          ".masked_bias"};
    const size_t n = strlen(name);
    for (size_t i = 0; i < MOE_COUNT(endings); i++)
        if (n > strlen(endings[i]) && !strcmp(name + n - strlen(endings[i]), endings[i]))
            return true;
    // the parts of a model with eyes that are not its text model
    if (h->root.node != h->whole.node && strncmp(name, h->prefix, strlen(h->prefix)) &&
        !strstr(name, "lm_head"))
        return true;
    // multi-token prediction: layers behind the first, and what that one shares with the model
    char start[128];
    const size_t own = hf_draft_names(name);
    if (own)
        return !h->n_draft || strstr(name, "embed_tokens.weight") || strstr(name, "head.weight") ||
               (!strncmp(name + own, "layers.", 7) && strncmp(name + own, "layers.0.", 9));
    const int bytes = snprintf(start, sizeof start, "%slayers.", h->prefix);
    if (!h->hp.n_layer_draft || strncmp(name, start, (size_t)bytes))
        return false;
    const unsigned long layer = strtoul(name + bytes, NULL, 10);
    return layer >= h->hp.n_layer_all ||
           (layer >= h->hp.n_layer &&
            (strstr(name, ".embed_tokens.weight") || strstr(name, ".shared_head.head.weight")));
}

static moe_status hf_check_unused(hf_source *h)
{
    size_t n_ignored = 0, n_scales = 0;
    for (size_t i = 0; i < h->table.n; i++) {
        const st_tensor *t = &h->table.items[i];
        if (t->used || !t->n_elements) // shared experts of which there are none
            continue;
        if (hf_is_activation_scale(h, t->name)) {
            n_scales++;
            continue;
        }
        if (!hf_ignored(h, t->name))
            return fail(h->error, MOE_ERR_MODEL, t->name,
                        "model_type %s with %u layers has no place for this tensor; leaving it out "
                        "would give wrong results", h->family->hf, h->hp.n_layer);
        n_ignored++;
    }
    if (n_scales)
        conv_note(h->source, "%zu scales for activations or a cache in fewer bits are left out: "
                  "here such scales are found while the model runs", n_scales);
    if (n_ignored)
        conv_note(h->source, "%zu tensors are not part of the text model and are left out",
                  n_ignored);
    return MOE_OK;
}

/* Settings that say whether a checkpoint has tensors of a name with these parts. */
static const struct {
    const char *hf, *part, *end;
} hf_promises[] = {
    {"attention_bias", ".self_attn.", ".bias"},
    {"mlp_bias", ".mlp.", "_proj.bias"},
};

static moe_status hf_check_promise(const hf_source *h, const char *key, const char *part,
                                   const char *end)
{
    char subject[64];
    const json_ref flag = config_path(h->root, key);
    const st_tensor *found = NULL;
    const size_t n_end = strlen(end);
    bool any = false; // a model may have no attention at all
    for (size_t i = 0; i < h->table.n && !found; i++) {
        const char *name = h->table.items[i].name;
        const size_t n = strlen(name);
        if (strncmp(name, h->prefix, strlen(h->prefix)) || !strstr(name, part))
            continue;
        any = true;
        if (n > n_end && !strcmp(name + n - n_end, end))
            found = &h->table.items[i];
    }
    snprintf(subject, sizeof subject, "config.json: %s", key);
    if (json_typeof(flag) == JSON_TRUE && any && !found)
        return fail(h->error, MOE_ERR_MODEL, subject,
                    "expected biases, since this is true, got no tensor \"*%s*%s\"", part, end);
    if (json_typeof(flag) == JSON_FALSE && found)
        return fail(h->error, MOE_ERR_MODEL, subject,
                    "expected no biases, since this is false, got %s", found->name);
    return MOE_OK;
}

/* Global layers of Gemma 4 have no values of their own if the config says so. */
static moe_status hf_check_values(const hf_source *h)
{
    char name[CONVERT_MAX_NAME_BYTES];
    const bool shared = json_bool(config_path(h->root, "attention_k_eq_v"), false);
    for (uint32_t i = 0; i < h->hp.n_layer; i++) {
        if (!hf_find_weight(h, hf_name(h, "model.layers.%u.self_attn.k_proj.weight", i, 0, name)))
            continue;
        const bool none = shared && !layer_is_local(&h->hp, i);
        hf_name(h, "model.layers.%u.self_attn.v_proj.weight", i, 0, name);
        if (!hf_find_weight(h, name) != none)
            return fail(h->error, MOE_ERR_MODEL, name,
                        "expected %s, since config.json says attention_k_eq_v %s, got %s",
                        none ? "no such tensor" : "this tensor", shared ? "true" : "false",
                        none ? "one" : "none");
    }
    return MOE_OK;
}

/* The config against what is in the checkpoint and what is not. */
static moe_status hf_check_promises(const hf_source *h)
{
    moe_status status = hf_check_values(h);
    for (size_t i = 0; i < MOE_COUNT(hf_promises) && !status; i++)
        status = hf_check_promise(h, hf_promises[i].hf, hf_promises[i].part, hf_promises[i].end);
    return status;
}

static moe_status hf_find_tensors(hf_source *h)
{
    char name[CONVERT_MAX_NAME_BYTES];
    const st_tensor *embedding = st_find(&h->table, hf_name(h, "model.embed_tokens.weight", 0, 0,
                                                            name));
    const double vocab = json_double(config_path(h->root, "vocab_size"), -1);
    if (embedding->n_dims != 2 || embedding->dims[0] > TOK_MAX_TOKENS ||
        (vocab >= 0 && (double)embedding->dims[0] != vocab))
        return fail(h->error, MOE_ERR_MODEL, embedding->name,
                    "expected %.0f rows, the vocab_size of config.json, got %llu", vocab,
                    (unsigned long long)(embedding->n_dims ? embedding->dims[0] : 0));
    h->hp.n_vocab = (uint32_t)embedding->dims[0];
    h->hp.n_layer_all = h->hp.n_layer + h->hp.n_layer_draft;
    moe_status status = hf_reserve(h);
    if (!status)
        status = hf_add_all(h, 0, true, true);
    for (uint32_t i = 0; i < h->hp.n_layer_all && !status; i++)
        status = hf_add_all(h, i, false, false);
    if (!status)
        status = hf_add_all(h, 0, true, false);
    if (!status)
        status = hf_check_unused(h);
    if (!status)
        status = hf_check_quantization(h);
    return status ? status : hf_check_promises(h);
}

/* ----------------------------------------------------------------------------------- entry -- */

static moe_status hf_convert(hf_source *h, json_ref generation, const char *pre)
{
    conv_source *s = h->source;
    h->root = h->whole;
    h->family = hf_family(h->root);
    json_ref text = config_path(h->whole, "text_config");
    if (!h->family && json_typeof(text) == JSON_OBJECT) {
        h->root = text;
        h->family = hf_family(text);
    }
    if (!h->family)
        return hf_fail_family(h);
    moe_status status = hf_read_quantization(h);
    if (!status)
        status = st_load(&h->table, h->dir, h->error);
    if (!status)
        status = hf_find_prefix(h);
    if (!status) {
        hf_count_draft(h);
        status = hf_read_config(h, generation);
    }
    if (!status)
        status = hf_find_tensors(h);
    if (status)
        return status;
    vocab_writer w = {.source = s, .dir = h->dir, .pre = pre, .n_vocab = h->hp.n_vocab,
                      .config = h->root, .generation = generation, .error = h->error};
    return vocab_convert(&w);
}

/* Fills an empty source from a folder. */
static moe_status conv_open_hf(conv_source *s, const char *dir, const char *pre, moe_error *error)
{
    json_doc config = {0}, generation = {0};
    hf_source h = {.source = s, .dir = dir, .table = {.source = s}, .error = error};
    json_ref sampling = {&generation, NULL};
    moe_status status = conv_read_json(s, dir, "config.json", true, &config, &h.whole, error);
    if (status)
        return status;
    status = conv_read_json(s, dir, "generation_config.json", false, &generation, &sampling, error);
    if (!status)
        status = hf_convert(&h, sampling, pre);
    json_free(&config);
    if (sampling.node)
        json_free(&generation);
    mem_free(s->mem, h.table.items);
    return status;
}

#endif
