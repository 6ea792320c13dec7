/* cli/experts.c - traces of experts: `--trace-experts` writes them, `moe experts` summarizes one.
 *
 * The file, little-endian, without padding:
 *     char     magic[8]            "moetrace"
 *     uint32   version             1
 *     uint32   n_layer             layers with experts
 *     uint32   n_expert, n_used    of each of them; n_used of them for each token
 *     uint32   layer[n_layer]      their indices in the model, ascending
 *     records, as many as there are:
 *         uint32   pos                        of the token in its sequence
 *         uint16   expert[n_layer][n_used]    the best first, all different
 * Records stand in the order of the computation. A token that is computed twice (a sequence that
 * starts anew, guesses that turn out wrong) has two. It is written and read as a stream.
 *
 * What comes from a file is checked before it is used. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    TRACE_VERSION = 1,
    TRACE_MAX_LAYERS = 4096,
    TRACE_MAX_EXPERTS = 65536, /* so that an id fits into 16 bits */
    TRACE_MAX_ALL = 1 << 22,   /* experts of all layers: a header must not ask for any memory */
    TRACE_MAX_SIZES = 16       /* of caches */
};

static const char trace_magic[8] = "moetrace";

typedef struct trace_header {
    char magic[8];
    uint32_t version, n_layer, n_expert, n_used;
} trace_header;

/* -------------------------------------------------------------------------------- writing -- */

/* One batch of tokens on its way through the layers. */
struct cli_trace {
    cli_output output;
    trace_header header;
    uint32_t *layers;      /* [n_layer] */
    uint16_t *experts;     /* [n_layer][n_tok][n_used] */
    size_t room;           /* of experts, in tokens */
    uint32_t pos, n_tok;
    uint32_t n_seen;       /* layers of this batch that came, in order */
    bool failed;
};

/* The layers that have a router, by its matrix. */
static uint32_t trace_find_layers(const moe_model *model, uint32_t n_layer, uint32_t *layers)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_layer; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%u.ffn_gate_inp.weight", i);
        for (size_t t = 0; t < moe_model_tensor_count(model); t++) {
            moe_tensor_info info = {.size = sizeof info};
            if (!moe_model_tensor(model, t, &info) && !strcmp(info.name, name)) {
                layers[n++] = i;
                break;
            }
        }
    }
    return n;
}

/* Writes the batch, unless it broke off. */
static void trace_flush(cli_trace *trace)
{
    const trace_header *h = &trace->header;
    const bool whole = trace->n_seen == h->n_layer && !trace->failed;
    for (uint32_t t = 0; whole && t < trace->n_tok && !trace->failed; t++) {
        const uint32_t pos = trace->pos + t;
        trace->failed = !output_write(&trace->output, &pos, sizeof pos);
        for (uint32_t l = 0; l < h->n_layer && !trace->failed; l++) {
            const uint16_t *ids = trace->experts + ((size_t)l * trace->n_tok + t) * h->n_used;
            trace->failed = !output_write(&trace->output, ids, h->n_used * sizeof *ids);
        }
    }
    trace->n_seen = trace->n_tok = 0;
}

static void trace_experts(void *user, const moe_observed_experts *e)
{
    cli_trace *trace = user;
    const trace_header *h = &trace->header;
    if (e->layer == trace->layers[0]) {
        trace_flush(trace);
        if (e->n_tok > trace->room) {
            trace->room = e->n_tok;
            trace->experts = cli_alloc(trace->experts, trace->room * h->n_layer,
                                       h->n_used * sizeof *trace->experts);
        }
        trace->pos = e->pos;
        trace->n_tok = e->n_tok;
    }
    if (trace->n_seen == h->n_layer || e->layer != trace->layers[trace->n_seen] ||
        e->n_tok != trace->n_tok || e->pos != trace->pos || e->n_used != h->n_used)
        return; /* not a layer of this batch */
    const size_t n = (size_t)e->n_tok * h->n_used;
    uint16_t *ids = trace->experts + trace->n_seen++ * n;
    for (size_t i = 0; i < n; i++)
        ids[i] = (uint16_t)e->ids[i];
}

int trace_open(cli_trace **out, const char *path, const moe_model *model, moe_observer *observer)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    *out = NULL;
    if (!info.n_expert)
        return cli_fail("--trace-experts: this model has no experts");
    cli_trace *trace = cli_alloc(NULL, 1, sizeof *trace);
    *trace = (cli_trace){.header = {"", TRACE_VERSION, 0, info.n_expert, info.n_expert_used}};
    memcpy(trace->header.magic, trace_magic, sizeof trace_magic);
    trace->layers = cli_alloc(NULL, info.n_layer, sizeof *trace->layers);
    trace->header.n_layer = trace_find_layers(model, info.n_layer, trace->layers);
    if (!trace->header.n_layer || !output_open(&trace->output, path)) {
        free(trace->layers);
        free(trace);
        return EXIT_FAILED;
    }
    trace->failed = !output_write(&trace->output, &trace->header, sizeof trace->header) ||
                    !output_write(&trace->output, trace->layers,
                                  trace->header.n_layer * sizeof *trace->layers);
    moe_observer_init(observer);
    observer->user = trace;
    observer->experts = trace_experts;
    *out = trace;
    return EXIT_OK;
}

int trace_close(cli_trace *trace, bool keep)
{
    if (!trace)
        return EXIT_OK;
    trace_flush(trace);
    const bool good = !trace->failed;
    const bool closed = output_close(&trace->output, keep && good);
    free(trace->experts);
    free(trace->layers);
    free(trace);
    return good && closed ? EXIT_OK : EXIT_FAILED;
}

/* -------------------------------------------------------------------------------- reading -- */

/* What is known of one layer. */
typedef struct trace_layer {
    uint64_t *load;        /* [n_expert]: how often it was chosen */
    uint64_t *depth;       /* [n_expert + 1]: how often an expert was used again after that many
                              other experts, the last: for the first time */
    uint32_t *recent;      /* [n_recent]: the experts used so far, the last one first */
    uint32_t n_recent;
    uint16_t *previous;    /* [n_used]: of the token before */
    uint64_t n_shared;     /* experts that a token had in common with the one before */
} trace_layer;

typedef struct trace_summary {
    trace_header header;
    uint32_t *index;       /* [n_layer]: in the model */
    trace_layer *layers;   /* [n_layer] */
    uint64_t n_token;
    uint64_t n_pair;       /* tokens that follow the one before */
    uint32_t pos;          /* of the last token */
} trace_summary;

static void summary_free(trace_summary *s)
{
    for (uint32_t l = 0; s->layers && l < s->header.n_layer; l++) {
        free(s->layers[l].load);
        free(s->layers[l].depth);
        free(s->layers[l].recent);
        free(s->layers[l].previous);
    }
    free(s->layers);
    free(s->index);
}

/* Moves an expert to the front and counts how far back it was. */
static void layer_use(trace_layer *layer, uint32_t expert, uint32_t n_expert)
{
    uint32_t at = 0;
    while (at < layer->n_recent && layer->recent[at] != expert)
        at++;
    layer->depth[at < layer->n_recent ? at : n_expert]++;
    if (at == layer->n_recent)
        layer->n_recent++;
    memmove(layer->recent + 1, layer->recent, at * sizeof *layer->recent);
    layer->recent[0] = expert;
    layer->load[expert]++;
}

/* One layer of one token. False if these are no choices of a router. */
static bool layer_add(trace_layer *layer, const trace_header *h, const uint16_t *ids, bool follows)
{
    for (uint32_t i = 0; i < h->n_used; i++) {
        if (ids[i] >= h->n_expert)
            return false;
        for (uint32_t k = 0; k < i; k++)
            if (ids[k] == ids[i])
                return false;
        for (uint32_t k = 0; follows && k < h->n_used; k++)
            layer->n_shared += layer->previous[k] == ids[i];
    }
    for (uint32_t i = 0; i < h->n_used; i++)
        layer_use(layer, ids[i], h->n_expert);
    memcpy(layer->previous, ids, h->n_used * sizeof *ids);
    return true;
}

/* Checks the header of a file of `bytes` and takes the layers from it. The bytes of the whole
 * header, or 0, with a message. */
static size_t summary_header(trace_summary *s, const char *path, const char *data, size_t bytes)
{
    trace_header *h = &s->header;
    if (bytes < sizeof *h || memcmp(data, trace_magic, sizeof trace_magic)) {
        cli_fail("%s: expected a file of --trace-experts, which begins with \"moetrace\"", path);
        return 0;
    }
    memcpy(h, data, sizeof *h);
    if (h->version != TRACE_VERSION)
        cli_fail("%s: expected version %d, got %u", path, TRACE_VERSION, h->version);
    else if (h->n_layer < 1 || h->n_layer > TRACE_MAX_LAYERS)
        cli_fail("%s: expected 1 to %d layers, got %u", path, TRACE_MAX_LAYERS, h->n_layer);
    else if (h->n_expert < 1 || h->n_expert > TRACE_MAX_EXPERTS)
        cli_fail("%s: expected 1 to %d experts, got %u", path, TRACE_MAX_EXPERTS, h->n_expert);
    else if ((uint64_t)h->n_layer * h->n_expert > TRACE_MAX_ALL)
        cli_fail("%s: expected at most %d experts in all layers, got %u times %u", path,
                 TRACE_MAX_ALL, h->n_layer, h->n_expert);
    else if (h->n_used < 1 || h->n_used > h->n_expert)
        cli_fail("%s: expected 1 to %u experts for each token, got %u", path, h->n_expert,
                 h->n_used);
    else if (bytes - sizeof *h < h->n_layer * sizeof *s->index)
        cli_fail("%s: the file ends inside of its header", path);
    else
        return sizeof *h + h->n_layer * sizeof *s->index;
    return 0;
}

static void summary_allocate(trace_summary *s)
{
    const trace_header *h = &s->header;
    s->layers = cli_alloc(NULL, h->n_layer, sizeof *s->layers);
    for (uint32_t l = 0; l < h->n_layer; l++) {
        trace_layer *layer = &s->layers[l];
        *layer = (trace_layer){
            .load = cli_alloc(NULL, h->n_expert, sizeof *layer->load),
            .depth = cli_alloc(NULL, h->n_expert + 1, sizeof *layer->depth),
            .recent = cli_alloc(NULL, h->n_expert + 1, sizeof *layer->recent),
            .previous = cli_alloc(NULL, h->n_used, sizeof *layer->previous),
        };
        memset(layer->load, 0, h->n_expert * sizeof *layer->load);
        memset(layer->depth, 0, (h->n_expert + 1) * sizeof *layer->depth);
    }
}

/* Takes a whole file; false, with a message, if it is not one. */
static bool summary_read(trace_summary *s, const char *path, const char *data, size_t bytes)
{
    const size_t start = summary_header(s, path, data, bytes);
    if (!start)
        return false;
    const trace_header *h = &s->header;
    const size_t per_layer = h->n_used * sizeof(uint16_t);
    const size_t record = sizeof(uint32_t) + h->n_layer * per_layer;
    s->index = cli_alloc(NULL, h->n_layer, sizeof *s->index);
    memcpy(s->index, data + sizeof *h, h->n_layer * sizeof *s->index);
    for (uint32_t l = 1; l < h->n_layer; l++)
        if (s->index[l] <= s->index[l - 1])
            return cli_fail("%s: expected layers in ascending order, got %u behind %u", path,
                            s->index[l], s->index[l - 1]), false;
    if ((bytes - start) % record)
        return cli_fail("%s: expected records of %zu bytes; the last one has %zu: the file is cut",
                        path, record, (bytes - start) % record), false;
    if (bytes == start)
        return cli_fail("%s: it has no tokens", path), false;
    summary_allocate(s);
    uint16_t *ids = cli_alloc(NULL, h->n_used, sizeof *ids);
    bool good = true;
    for (size_t at = start; at < bytes && good; at += record) {
        uint32_t pos;
        memcpy(&pos, data + at, sizeof pos);
        const bool follows = s->n_token && pos && pos - 1 == s->pos;
        for (uint32_t l = 0; l < h->n_layer && good; l++) {
            memcpy(ids, data + at + sizeof pos + l * per_layer, per_layer);
            good = layer_add(&s->layers[l], h, ids, follows);
            if (!good)
                cli_fail("%s: token %llu, layer %u: expected %u different experts below %u", path,
                         (unsigned long long)s->n_token, s->index[l], h->n_used, h->n_expert);
        }
        s->pos = pos;
        s->n_pair += follows;
        s->n_token++;
    }
    free(ids);
    return good;
}

/* -------------------------------------------------------------------------------- figures -- */

/* Bits of the choice of one expert; log2(n_expert) if all are as likely. */
static double layer_entropy(const trace_layer *layer, uint32_t n_expert)
{
    double total = 0, bits = 0;
    for (uint32_t e = 0; e < n_expert; e++)
        total += (double)layer->load[e];
    for (uint32_t e = 0; e < n_expert; e++) {
        const double p = (double)layer->load[e] / total;
        bits -= p > 0 ? p * log2(p) : 0;
    }
    return bits > 0 ? bits : 0;
}

/* The part of its experts that a token has in common with the one before it. */
static double layer_overlap(const trace_summary *s, const trace_layer *layer)
{
    return s->n_pair ? (double)layer->n_shared / (double)(s->n_pair * s->header.n_used) : 0;
}

/* The same for tokens that have nothing to do with each other: the sum of the experts'
 * probabilities of being used, squared. */
static double layer_chance(const trace_summary *s, const trace_layer *layer)
{
    double sum = 0;
    for (uint32_t e = 0; e < s->header.n_expert; e++) {
        const double q = (double)layer->load[e] / (double)s->n_token;
        sum += q * q;
    }
    return sum / s->header.n_used;
}

/* The part of the uses that find their expert among the `size` last used ones of the layer. */
static double layer_hits(const trace_summary *s, const trace_layer *layer, uint32_t size)
{
    uint64_t hits = 0;
    for (uint32_t d = 0; d < size && d < s->header.n_expert; d++)
        hits += layer->depth[d];
    return (double)hits / (double)(s->n_token * s->header.n_used);
}

static uint32_t layer_busiest(const trace_layer *layer, uint32_t n_expert)
{
    uint32_t best = 0;
    for (uint32_t e = 1; e < n_expert; e++)
        if (layer->load[e] > layer->load[best])
            best = e;
    return best;
}

static uint32_t layer_idle(const trace_layer *layer, uint32_t n_expert)
{
    uint32_t n = 0;
    for (uint32_t e = 0; e < n_expert; e++)
        n += !layer->load[e];
    return n;
}

/* --------------------------------------------------------------------------------- report -- */

typedef struct cache_sizes {
    uint32_t size[TRACE_MAX_SIZES];
    uint32_t n;
} cache_sizes;

/* "8,16,32". */
static bool sizes_parse(cache_sizes *sizes, const char *text)
{
    for (const char *p = text; *p; p += *p == ',') {
        char word[16];
        uint64_t size = 0;
        const size_t length = strcspn(p, ",");
        snprintf(word, sizeof word, "%.*s", (int)(length < 15 ? length : 15), p);
        if (sizes->n == TRACE_MAX_SIZES || !cli_parse_uint(word, &size) || !size ||
            size > TRACE_MAX_EXPERTS) {
            cli_fail("--cache: expected up to %d numbers of experts such as 8,16,32, got \"%s\"",
                     TRACE_MAX_SIZES, text);
            return false;
        }
        sizes->size[sizes->n++] = (uint32_t)size;
        p += length;
    }
    return sizes->n > 0;
}

/* What a token uses, twice that, a quarter, half and three quarters of all. */
static void sizes_default(cache_sizes *sizes, const trace_header *h)
{
    const uint32_t all[] = {h->n_used, 2 * h->n_used, h->n_expert / 4, h->n_expert / 2,
                            h->n_expert / 4 * 3};
    for (uint32_t last = 0, next; ; last = next) {
        next = UINT32_MAX;
        for (size_t i = 0; i < CLI_COUNT(all); i++)
            if (all[i] > last && all[i] < next)
                next = all[i];
        if (next > h->n_expert)
            break;
        sizes->size[sizes->n++] = next;
    }
}

static void report_text(const trace_summary *s, const cache_sizes *sizes)
{
    const trace_header *h = &s->header;
    const double n = h->n_layer;
    double entropy = 0, overlap = 0, chance = 0, hits[TRACE_MAX_SIZES] = {0};
    printf("%llu tokens, %u layers of %u experts, %u for each token\n\n"
           "layer  entropy  of most  busiest        idle  overlap  by chance",
           (unsigned long long)s->n_token, h->n_layer, h->n_expert, h->n_used);
    for (uint32_t i = 0; i < sizes->n; i++)
        printf("  LRU %4u", sizes->size[i]);
    printf("\n");
    for (uint32_t l = 0; l < h->n_layer; l++) {
        const trace_layer *layer = &s->layers[l];
        const double bits = layer_entropy(layer, h->n_expert);
        const double most = h->n_expert > 1 ? log2((double)h->n_expert) : 1;
        const uint32_t busiest = layer_busiest(layer, h->n_expert);
        printf("%5u  %7.3f  %5.1f %%  %5u %4.1f %%  %4u  %5.1f %%  %7.1f %%", s->index[l], bits,
               100 * bits / most, busiest,
               100 * (double)layer->load[busiest] / (double)(s->n_token * h->n_used),
               layer_idle(layer, h->n_expert), 100 * layer_overlap(s, layer),
               100 * layer_chance(s, layer));
        entropy += bits / most / n;
        overlap += layer_overlap(s, layer) / n;
        chance += layer_chance(s, layer) / n;
        for (uint32_t i = 0; i < sizes->n; i++) {
            printf("  %6.1f %%", 100 * layer_hits(s, layer, sizes->size[i]));
            hits[i] += layer_hits(s, layer, sizes->size[i]) / n;
        }
        printf("\n");
    }
    printf("  all           %5.1f %%%22s%5.1f %%  %7.1f %%", 100 * entropy, "", 100 * overlap,
           100 * chance);
    for (uint32_t i = 0; i < sizes->n; i++)
        printf("  %6.1f %%", 100 * hits[i]);
    printf("\n");
}

static void report_json(const trace_summary *s, const cache_sizes *sizes, const char *path)
{
    const trace_header *h = &s->header;
    cli_json json = {.out = stdout};
    json_open(&json, NULL, '{');
    json_string(&json, "file", path);
    json_uint(&json, "n_tokens", s->n_token);
    json_uint(&json, "n_pairs", s->n_pair);
    json_uint(&json, "n_expert", h->n_expert);
    json_uint(&json, "n_used", h->n_used);
    json_open(&json, "layers", '[');
    for (uint32_t l = 0; l < h->n_layer; l++) {
        const trace_layer *layer = &s->layers[l];
        json_open(&json, NULL, '{');
        json_uint(&json, "layer", s->index[l]);
        json_number(&json, "entropy", layer_entropy(layer, h->n_expert), 9);
        json_uint(&json, "idle", layer_idle(layer, h->n_expert));
        json_number(&json, "overlap", layer_overlap(s, layer), 9);
        json_number(&json, "overlap_by_chance", layer_chance(s, layer), 9);
        json_open(&json, "lru", '[');
        for (uint32_t i = 0; i < sizes->n; i++) {
            json_open(&json, NULL, '{');
            json_uint(&json, "experts", sizes->size[i]);
            json_number(&json, "hit_rate", layer_hits(s, layer, sizes->size[i]), 9);
            json_close(&json, '}');
        }
        json_close(&json, ']');
        json_open(&json, "load", '[');
        for (uint32_t e = 0; e < h->n_expert; e++)
            json_uint(&json, NULL, layer->load[e]);
        json_close(&json, ']');
        json_close(&json, '}');
    }
    json_close(&json, ']');
    json_close(&json, '}');
    json_end(&json);
}

static int experts_main(int argc, char **argv)
{
    const char *sizes_text = NULL, *path[1];
    bool json = false;
    const cli_option table[] = {
        {0, "cache", CLI_TEXT, &sizes_text, "N,N,..",
         "sizes of the LRU caches, in experts per layer", NULL},
        {0, "json", CLI_FLAG, &json, NULL, "print one JSON object, with the load of each expert",
         NULL},
        {0},
    };
    const cli_option *tables[] = {table, NULL};
    int status;
    cache_sizes sizes = {.n = 0};
    if (!cli_parse(&verb_experts, tables, argc, argv, path, &status))
        return status;
    if (sizes_text && !sizes_parse(&sizes, sizes_text))
        return EXIT_USAGE;
    size_t bytes;
    char *data = cli_read_all(path[0], &bytes);
    if (!data)
        return EXIT_FAILED;
    trace_summary s = {.index = NULL};
    const bool good = summary_read(&s, path[0], data, bytes);
    if (good && !sizes.n)
        sizes_default(&sizes, &s.header);
    if (good && json)
        report_json(&s, &sizes, path[0]);
    else if (good)
        report_text(&s, &sizes);
    summary_free(&s);
    free(data);
    return good ? EXIT_OK : EXIT_FAILED;
}

const cli_verb verb_experts = {
    "experts", "FILE", "summarizes which experts were used",
    "FILE is written by --trace-experts of `moe run`, `moe eval` or `moe logits`; \"-\" is\n"
    "standard input. For each layer:\n"
    "  entropy    of the choice of an expert, in bits, and as a part of the most that is possible\n"
    "  busiest    the expert that is used most, and its part of all uses\n"
    "  idle       experts that were never used\n"
    "  overlap    the part of its experts that a token shares with the one before it; beside it,\n"
    "             what it would be if tokens chose with these loads, but independently\n"
    "  LRU n      the part of the uses that find their expert among the n last used in the layer",
    "  moe run model.gguf -p \"Once upon a time\" -n 200 --trace-experts story.trace\n"
    "  moe experts story.trace\n"
    "  moe experts story.trace --cache 16,32,64 --json | jq '.layers[0].load'\n",
    1, experts_main};
