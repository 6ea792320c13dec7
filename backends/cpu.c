/* backends/cpu.c - the CPU as a backend: what the machine has, memory, and the recording of
 * operations into phases of tasks. The operations themselves are in cpu_ops.c and cpu_attend.c.
 *
 * Owns: buffers, a queue's threads and scratch memory. Weights that are wrapped stay where they
 * are, normally in the mapped file. */
#ifndef MOE_BACKENDS_CPU_C
#define MOE_BACKENDS_CPU_C

#include "cpu_latent.c"
#include "cpu_recurrent.c"
#if MOE_X86
#include <cpuid.h>
#elif MOE_ARM64 && defined(__linux__)
#include <sys/auxv.h>
#elif MOE_ARM64 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

/* ----------------------------------------------------------------------------- detection -- */

#if MOE_X86
/* Which registers the operating system saves: XCR0. */
static uint64_t cpu_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

#if MOE_ARM64 && defined(__APPLE__)
/* Whether the system says 1 to a name; an older system does not know all names. */
static bool cpu_sysctl(const char *name)
{
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, NULL, 0) == 0 && bytes == sizeof value && value == 1;
}
#endif

/* The moe_cpu bits of this machine. */
static uint32_t cpu_detect(void)
{
    uint32_t cpu = 0;
#if MOE_X86
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 }; /* leaf 1, ecx */
    enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6 };
    uint32_t a, b, c, d;
    const uint32_t need = FMA | OSXSAVE | AVX | F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & need) != need)
        return 0;
    const uint64_t saved = cpu_xcr0();
    if ((saved & XCR0_AVX) != XCR0_AVX || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    const uint32_t leaf7_b = b, leaf7_c = c, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if (leaf7_b & 1u << 5)
        cpu |= MOE_CPU_AVX2;
    const uint32_t leaf71_a = __get_cpuid_count(7, 1, &a, &b, &c, &d) ? a : 0;
    if (leaf71_a & 1u << 4)
        cpu |= MOE_CPU_AVX_VNNI;
    if ((saved & XCR0_AVX512) == XCR0_AVX512 && (leaf7_b & avx512) == avx512) {
        cpu |= MOE_CPU_AVX512;
        if (leaf7_c & 1u << 11)
            cpu |= MOE_CPU_AVX512_VNNI;
        if (leaf71_a & 1u << 5)
            cpu |= MOE_CPU_AVX512_BF16;
    }
#elif MOE_ARM64
    cpu = MOE_CPU_NEON;
#if defined(__linux__)
    enum { ASIMDDP = 1 << 20, I8MM = 1 << 13 }; /* in AT_HWCAP, in AT_HWCAP2 */
    cpu |= getauxval(AT_HWCAP) & ASIMDDP ? MOE_CPU_DOTPROD : 0u;
    cpu |= getauxval(AT_HWCAP2) & I8MM ? MOE_CPU_I8MM : 0u;
#elif defined(__APPLE__)
    cpu |= cpu_sysctl("hw.optional.arm.FEAT_DotProd") ? MOE_CPU_DOTPROD : 0u;
    cpu |= cpu_sysctl("hw.optional.arm.FEAT_I8MM") ? MOE_CPU_I8MM : 0u;
#endif
#endif
    return cpu;
}

/* What the caller allows of what there is. */
static uint32_t cpu_allowed(uint32_t cpu, moe_isa isa)
{
    switch (isa) {
    case MOE_ISA_C: return 0;
    case MOE_ISA_AVX2: return cpu & MOE_CPU_AVX2;
    case MOE_ISA_AVXVNNI: return cpu & (MOE_CPU_AVX2 | MOE_CPU_AVX_VNNI);
    case MOE_ISA_NEON: return cpu & MOE_CPU_NEON;
    default: return cpu;
    }
}

/* -------------------------------------------------------------------------------- device -- */

static moe_status cpu_device_open(moe_device **out, const moe_device_options *options,
                                  moe_error *error)
{
    moe_device *d = mem_alloc(options->mem, 1, sizeof *d);
    if (!d)
        return fail_memory(error, options->mem, "device", sizeof *d);
    d->mem = options->mem;
    d->cpu = cpu_allowed(cpu_detect(), options->isa);
    d->simd = cpu_simd_select(d->cpu);
    d->outer = cpu_outer_select(d->cpu);
    d->int16 = cpu_int16_select(d->cpu);
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        d->kernels[i] = quant_table[i]->select(d->cpu);
    const uint32_t vnni_bf16 = MOE_CPU_AVX512_VNNI | MOE_CPU_AVX512_BF16;
    snprintf(d->name, sizeof d->name, "CPU (%s)",
             (d->cpu & vnni_bf16) == vnni_bf16 ? "AVX-512 VNNI, BF16"
             : d->cpu & MOE_CPU_AVX512_VNNI    ? "AVX-512 VNNI"
             : d->cpu & MOE_CPU_AVX512         ? "AVX-512"
             : d->cpu & MOE_CPU_AVX_VNNI       ? "AVX-VNNI"
             : d->cpu & MOE_CPU_AVX2           ? "AVX2"
             : d->cpu & MOE_CPU_I8MM           ? "NEON, dotprod, i8mm"
             : d->cpu & MOE_CPU_DOTPROD        ? "NEON, dotprod"
             : d->cpu & MOE_CPU_NEON           ? "NEON"
                                               : "plain C");
    *out = d;
    return MOE_OK;
}

static void cpu_device_close(moe_device *d)
{
    if (d)
        mem_free(d->mem, d);
}

static const char *cpu_device_name(const moe_device *d)
{
    return d->name;
}

static moe_status cpu_buffer_new(moe_device *d, uint64_t bytes, moe_buffer **out, moe_error *error)
{
    moe_buffer *b = mem_alloc(d->mem, 1, sizeof *b);
    uint8_t *data = b ? mem_alloc_uncleared(d->mem, bytes, 1) : NULL;
    if (!data) {
        mem_free(d->mem, b);
        return fail_memory(error, d->mem, "buffer", bytes);
    }
    *b = (moe_buffer){data, bytes, true};
    *out = b;
    return MOE_OK;
}

static moe_status cpu_buffer_wrap(moe_device *d, const void *host, uint64_t bytes,
                                  moe_buffer **out, moe_error *error)
{
    moe_buffer *b = mem_alloc(d->mem, 1, sizeof *b);
    if (!b)
        return fail_memory(error, d->mem, "buffer", sizeof *b);
    *b = (moe_buffer){(uint8_t *)(uintptr_t)host, bytes, false};
    *out = b;
    return MOE_OK;
}

static void cpu_buffer_free(moe_device *d, moe_buffer *b)
{
    if (b && b->owned)
        mem_free(d->mem, b->data);
    mem_free(d->mem, b);
}

/* --------------------------------------------------------------------------------- queue -- */

/* Takes `bytes` from a block of memory; with base NULL it only counts. */
static void *cpu_take(uint8_t *base, uint64_t *used, uint64_t bytes)
{
    void *p = base ? base + *used : NULL;
    *used += align_up(bytes, MEM_ALIGN);
    return p;
}

/* The memory of one thread. */
static cpu_scratch cpu_scratch_layout(const moe_queue_options *o, uint8_t *base, uint64_t *used)
{
    const uint64_t f = sizeof(float), dim = align_up(o->dim_max, 32);
    const uint64_t n_query = MOE_MAX(cpu_most_queries(o->dim_max),
                                     align_up(o->n_head_max, CPU_PANEL));
    const uint64_t row = cpu_sum_stride(o->dim_max) * f;
    const moe_expand_shape *e = &o->expand;
    const uint64_t n_expand = e->n_latent ? align_up(MOE_MIN(o->n_tok_max, CPU_EXPAND_TOKENS),
                                                     CPU_PANEL) : 0;
    const uint64_t n_key = e->n_latent ? CPU_SEGMENT : 0, n_int16 = o->int16 ? n_query : 0;
    return (cpu_scratch){
        .tile = cpu_take(base, used, CPU_TILE * f),
        .queries = cpu_take(base, used, n_query * o->dim_max * f),
        .rows = cpu_take(base, used, CPU_KEY_ROWS * dim * f),
        .block = cpu_take(base, used, CPU_KEY_BLOCK * dim * f),
        .scores = cpu_take(base, used, n_query * CPU_SCORES * f),
        .partial = cpu_take(base, used, n_query * row),
        .total = cpu_take(base, used, n_query * row),
        .codes = cpu_take(base, used, n_int16 * dim * sizeof(int16_t)),
        .scales = cpu_take(base, used, n_int16 * f),
        .weights = cpu_take(base, used, n_int16 * I16_BLOCK * sizeof(int16_t)),
        .steps = cpu_take(base, used, n_int16 * f),
        .up = cpu_take(base, used, (uint64_t)e->n_latent * (e->n_nope + e->dim_v) * f),
        .expanded = cpu_take(base, used, n_key * (e->dim_k + e->dim_v) * f),
        .expanded_queries = cpu_take(base, used, n_expand * e->dim_k * f),
        .expanded_total = cpu_take(base, used, n_expand * cpu_sum_stride(e->dim_v) * f),
    };
}

/* Of packed activations. */
static uint64_t cpu_rows_bytes(moe_act act, uint64_t n_row, uint32_t n_in)
{
    return n_in ? n_row * act_row_bytes(act, n_in) : 0;
}

/* Lays out the memory of a queue and returns its size. With base NULL the pointers are not set: so
 * the estimate and the allocation cannot differ. */
static uint64_t cpu_queue_layout(moe_queue *q, uint8_t *base)
{
    const moe_queue_options *o = &q->options;
    const uint64_t row = cpu_sum_stride(o->dim_max) * sizeof(float);
    const uint64_t n_segment = (uint64_t)o->n_slot_max / CPU_SEGMENT + 1;
    const uint64_t experts = ((uint64_t)o->n_expert_max + 1) * sizeof(uint32_t);
    const uint64_t n_slot = (uint64_t)o->n_tok_max * o->n_used_max;
    uint64_t used = 0;
    q->ops = cpu_take(base, &used, CPU_MAX_OPS * sizeof(cpu_op));
    q->phases = cpu_take(base, &used, CPU_MAX_PHASES * sizeof(cpu_phase));
    for (moe_act act = 0; act < MOE_COUNT(q->act); act++) {
        const uint64_t n_head = (uint64_t)o->n_tok_max * o->n_head_max;
        uint64_t bytes = cpu_rows_bytes(act, o->n_tok_max, o->rows.matmul[act]);
        bytes = MOE_MAX(bytes, cpu_rows_bytes(act, n_slot, o->rows.experts[act]));
        bytes = MOE_MAX(bytes, cpu_rows_bytes(act, n_head, o->rows.heads[act]));
        q->act[act] = cpu_take(base, &used, bytes);
    }
    q->segments = cpu_take(base, &used, o->n_head_max * n_segment * row);
    q->expert_start = cpu_take(base, &used, experts);
    q->expert_id = cpu_take(base, &used, experts);
    q->expert_count = cpu_take(base, &used, experts);
    q->expert_row = cpu_take(base, &used, n_slot * sizeof(uint32_t));
    q->expert_slot = cpu_take(base, &used, n_slot * sizeof(uint32_t));
    q->scratch = cpu_take(base, &used, o->n_threads * sizeof(cpu_scratch));
    for (uint32_t i = 0; i < o->n_threads; i++) {
        const cpu_scratch s = cpu_scratch_layout(o, base, &used);
        if (base)
            q->scratch[i] = s;
    }
    return used;
}

static uint64_t cpu_queue_bytes(const moe_device *d, const moe_queue_options *options)
{
    (void)d;
    moe_queue q = {.options = *options};
    return cpu_queue_layout(&q, NULL) + align_up(sizeof q, MEM_ALIGN) + 3 * MEM_ALIGN +
           align_up(options->n_threads * sizeof(cpu_worker), MEM_ALIGN) +
           align_up(options->n_threads * sizeof(cpu_share), MEM_ALIGN);
}

static void cpu_queue_close(moe_queue *q)
{
    if (!q)
        return;
    cpu_pool_close(&q->pool);
    mem_free(q->device->mem, q->memory);
    mem_free(q->device->mem, q);
}

static moe_status cpu_queue_open(moe_queue **out, moe_device *d, const moe_queue_options *options,
                                 moe_error *error)
{
    moe_queue *q = mem_alloc(d->mem, 1, sizeof *q);
    if (!q)
        return fail_memory(error, d->mem, "queue", sizeof *q);
    q->device = d;
    q->options = *options;
    q->pool.mem = d->mem;
    const uint64_t bytes = cpu_queue_layout(q, NULL);
    moe_status status = MOE_OK;
    if ((q->memory = mem_alloc_uncleared(d->mem, bytes, 1))) {
        cpu_queue_layout(q, q->memory);
        status = cpu_pool_open(&q->pool, options->n_threads, d->mem, error);
    } else {
        status = fail_memory(error, d->mem, "work memory", bytes);
    }
    if (status) {
        cpu_queue_close(q);
        return status;
    }
    *out = q;
    return MOE_OK;
}

static void cpu_run_task(void *job, uint32_t phase, uint32_t task, uint32_t thread)
{
    moe_queue *q = job;
    const cpu_phase *p = &q->phases[phase];
    if (atomic_load_explicit(&q->cancelled, memory_order_relaxed))
        return;
    if (cancelled(q->options.cancel))
        atomic_store_explicit(&q->cancelled, true, memory_order_relaxed);
    else
        do
            p->run(q, p->op, task, thread);
        while (++p < q->phases + q->n_phase && p->joined);
}

static uint32_t cpu_count_tasks(void *job, uint32_t phase)
{
    const moe_queue *q = job;
    const cpu_phase *p = &q->phases[phase];
    if (p->joined || atomic_load_explicit(&q->cancelled, memory_order_relaxed))
        return 0;
    return p->per_active_expert ? p->n_task * q->n_active : p->n_task;
}

/* While a thread waits it fetches the beginning of its share of the next product, unless experts,
 * whose choice is not known yet, come before it. */
static void cpu_look_ahead(void *job, uint32_t phase, uint32_t thread, cpu_upcoming *ahead)
{
    const moe_queue *q = job;
    const cpu_phase *p = q->phases + phase, *end = q->phases + q->n_phase;
    const uint32_t n_threads = q->options.n_threads;
    bool sorted = p->run != cpu_experts_sort;
    for (p++; p < end && p->run != cpu_matmul && p->run != cpu_experts; p++)
        sorted &= p->run != cpu_experts_sort;
    // a sort that was cancelled has left what other experts were chosen by
    sorted &= !atomic_load_explicit(&q->cancelled, memory_order_relaxed);
    if (p == end || (p->run == cpu_experts && !sorted)) {
        *ahead = (cpu_upcoming){0};
        return;
    }
    if (p->op == ahead->op)
        return;
    uint64_t bytes = 0;
    const uint32_t n_task = p->per_active_expert ? p->n_task * q->n_active : p->n_task;
    const uint32_t first = cpu_first_task(n_task, thread, n_threads);
    const uint8_t *weights = p->run == cpu_matmul ? cpu_matmul_weights(p->op, first, &bytes)
                                                  : cpu_experts_weights(q, p->op, first, &bytes);
    *ahead = cpu_upcoming_weights(p->op, weights, bytes);
}

static moe_status cpu_submit(moe_queue *q, moe_error *error)
{
    const cpu_job job = {q, q->n_phase, cpu_run_task, cpu_count_tasks, cpu_look_ahead};
    cpu_pool_run(&q->pool, &job);
    q->n_op = q->n_phase = 0;
    q->sorted = (cpu_sorted){0};
    if (!atomic_load(&q->cancelled))
        return MOE_OK;
    atomic_store(&q->cancelled, false);
    return fail(error, MOE_ERR_CANCELLED, NULL, "cancelled by the caller");
}

/* A full queue runs what it has. If that is cancelled, the rest must not run either: the flag stays
 * up until the caller's submit reports it. */
static void cpu_flush(moe_queue *q)
{
    const cpu_job job = {q, q->n_phase, cpu_run_task, cpu_count_tasks, cpu_look_ahead};
    cpu_pool_run(&q->pool, &job);
    q->n_op = q->n_phase = 0;
}

static moe_status cpu_write(moe_queue *q, moe_view dst, const void *src, uint64_t bytes)
{
    if (q->n_op)
        cpu_flush(q);
    memcpy(dst.buffer->data + dst.offset, src, (size_t)bytes);
    return MOE_OK;
}

static moe_status cpu_read(moe_queue *q, moe_view src, void *dst, uint64_t bytes, moe_error *error)
{
    moe_status status = cpu_submit(q, error);
    if (!status)
        memcpy(dst, src.buffer->data + src.offset, (size_t)bytes);
    return status;
}

/* ----------------------------------------------------------------------------- recording -- */

static cpu_op *cpu_new_op(moe_queue *q)
{
    if (q->n_op == CPU_MAX_OPS)
        cpu_flush(q);
    cpu_op *op = &q->ops[q->n_op++];
    op->chunk = 1;
    op->act_mask = 0;
    return op;
}

static cpu_phase *cpu_new_phase(moe_queue *q, const cpu_op *op, cpu_op_fn *run, uint64_t n_task)
{
    cpu_phase *p = &q->phases[q->n_phase++];
    *p = (cpu_phase){op, run, (uint32_t)n_task, false, false};
    return p;
}

/* A phase whose tasks are n_tok tokens, a few each. */
static cpu_phase *cpu_new_token_phase(moe_queue *q, const cpu_op *op, cpu_op_fn *run,
                                      uint32_t n_tok)
{
    return cpu_new_phase(q, op, run, cpu_ceil_div(n_tok, cpu_joined_tokens(q, n_tok)));
}

/* Joins the packing of more than one token to the phase before it, if that makes them. */
static void cpu_join_packing(moe_queue *q, cpu_phase *packing, const moe_matmul_op *o)
{
    if (packing == q->phases || o->n_tok == 1)
        return;
    cpu_phase *p = packing - 1;
    cpu_op *op = &q->ops[p->op - q->ops];
    const uint32_t n_in = (uint32_t)o->out[0].w->dims[0], n = cpu_joined_tokens(q, o->n_tok);
    const moe_norm_op *norm = &op->u.norm;
    const moe_glu_op *glu = &op->u.glu;
    if (p->run == cpu_norm && cpu_same_place(norm->dst, o->src) && norm->n_row == o->n_tok &&
        norm->dim == n_in && norm->dst_stride == n_in)
        op->chunk = n;
    else if (p->run == cpu_glu && cpu_same_place(glu->dst, o->src) &&
             glu->n == (uint64_t)o->n_tok * n_in)
        op->chunk = n * n_in;
    else
        return;
    p->n_task = packing->n_task;
    packing->joined = true;
}

/* Joins what turns or stores more than one token to such a phase of the same tokens before it. */
static void cpu_join_tokens(moe_queue *q, cpu_phase *phase, uint32_t n_tok)
{
    if (phase == q->phases || n_tok == 1)
        return;
    const cpu_phase *p = phase - 1;
    phase->joined = (p->run == cpu_rope && p->op->u.rope.n_tok == n_tok) ||
                    (p->run == cpu_store && p->op->u.store.n_tok == n_tok);
}

static void cpu_record_embed(moe_queue *q, const moe_embed_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.embed = *o;
    cpu_new_phase(q, op, cpu_embed, o->n_tok);
}

static void cpu_record_norm(moe_queue *q, const moe_norm_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.norm = *o;
    op->chunk = MOE_MAX(1, CPU_ELEMENTS / o->dim);
    cpu_new_phase(q, op, cpu_norm, cpu_ceil_div(o->n_row, op->chunk));
}

static void cpu_record_matmul(moe_queue *q, const moe_matmul_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.matmul = *o;
    uint64_t rows = 0;
    op->row_tasks = 0;
    for (uint32_t i = 0; i < o->n_out; i++) {
        rows += o->out[i].w->dims[1];
        op->act_mask |= 1u << o->out[i].w->quant->act;
    }
    op->chunk = cpu_chunk_rows(q, rows, o->out[0].w->row_bytes, o->n_tok);
    for (uint32_t i = 0; i < o->n_out; i++)
        op->row_tasks += cpu_ceil_div(o->out[i].w->dims[1], op->chunk);
    op->tok_chunk = cpu_chunk_tokens(q, op->row_tasks, o->n_tok);
    cpu_join_packing(q, cpu_new_token_phase(q, op, cpu_matmul_quantize, o->n_tok), o);
    cpu_new_phase(q, op, cpu_matmul,
                  (uint64_t)op->row_tasks * cpu_ceil_div(o->n_tok, op->tok_chunk));
}

static void cpu_record_rope(moe_queue *q, const moe_rope_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.rope = *o;
    op->chunk = cpu_joined_tokens(q, o->n_tok);
    cpu_join_tokens(q, cpu_new_token_phase(q, op, cpu_rope, o->n_tok), o->n_tok);
}

static void cpu_record_store(moe_queue *q, const moe_store_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.store = *o;
    op->k = *o->cache;
    op->chunk = cpu_joined_tokens(q, o->n_tok);
    cpu_join_tokens(q, cpu_new_token_phase(q, op, cpu_store, o->n_tok), o->n_tok);
}

static void cpu_record_attend(moe_queue *q, const moe_attend_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.attend = *o;
    op->k = *o->k;
    op->v = *o->v;
    if (o->k_b) {
        const uint32_t n_part = MOE_MAX(cpu_ceil_div(o->n_tok, CPU_EXPAND_TOKENS),
                                        cpu_ceil_div(2 * q->options.n_threads, o->n_head));
        op->chunk = (uint32_t)align_up(cpu_ceil_div(o->n_tok, n_part), CPU_PANEL);
        op->chunk = MOE_MIN(op->chunk, CPU_EXPAND_TOKENS);
        cpu_new_phase(q, op, cpu_attend_expanded,
                      (uint64_t)cpu_ceil_div(o->n_tok, op->chunk) * o->n_head);
        return;
    }
    if (o->n_tok == 1) {
        enum { FEWEST_HEADS = 4 }; /* per task: they share the conversion of the keys */
        const uint32_t group = o->n_head / op->k.n_head;
        const uint64_t n_task = (uint64_t)cpu_ceil_div(o->pos + 1, CPU_SEGMENT) * op->k.n_head;
        const uint32_t heads = cpu_ceil_div(group * n_task, q->options.n_threads);
        op->chunk = MOE_MIN(group, MOE_MAX(heads, FEWEST_HEADS));
        cpu_new_phase(q, op, cpu_attend_segment, n_task * cpu_ceil_div(group, op->chunk));
        cpu_new_phase(q, op, cpu_attend_join, o->n_head);
        return;
    }
    /* Many queries per converted key, but enough tasks for all threads. */
    const uint32_t most = o->n_tok * op->k.n_head / (2 * q->options.n_threads);
    const uint32_t fit = cpu_most_queries(q->options.dim_max) / (o->n_head / op->k.n_head);
    op->chunk = MOE_MAX(1, MOE_MIN(most, fit));
    cpu_new_phase(q, op, cpu_attend, (uint64_t)cpu_ceil_div(o->n_tok, op->chunk) * op->k.n_head);
}

static void cpu_record_heads(moe_queue *q, const moe_heads_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.heads = *o;
    op->chunk = MOE_MIN(cpu_chunk_rows(q, o->w->dims[1] * o->w->dims[2], o->w->row_bytes, o->n_tok),
                        (uint32_t)align_up(o->w->dims[1], 8));
    cpu_new_phase(q, op, cpu_heads_quantize, o->w->dims[2]);
    cpu_new_phase(q, op, cpu_heads,
                  (uint64_t)cpu_ceil_div(o->w->dims[1], op->chunk) * o->w->dims[2]);
}

static void cpu_record_conv(moe_queue *q, const moe_conv_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.conv = *o;
    cpu_new_phase(q, op, cpu_conv, cpu_ceil_div(o->dim, CPU_CONV_STRIP));
}

static void cpu_record_gates(moe_queue *q, const moe_gates_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.gates = *o;
    op->chunk = MOE_MAX(1, CPU_GATES / o->n_head);
    cpu_new_phase(q, op, cpu_gates, cpu_ceil_div(o->n_tok, op->chunk));
}

static void cpu_record_delta(moe_queue *q, const moe_delta_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.delta = *o;
    cpu_new_phase(q, op, cpu_delta, (uint64_t)o->n_head * cpu_ceil_div(o->dim_v, MOE_DELTA_BLOCK));
}

static void cpu_record_copy(moe_queue *q, const moe_copy_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.copy = *o;
    op->chunk = MOE_MAX(1, CPU_ELEMENTS / o->dim);
    cpu_new_phase(q, op, cpu_copy, cpu_ceil_div(o->n_row, op->chunk));
}

static void cpu_record_glu(moe_queue *q, const moe_glu_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.glu = *o;
    op->chunk = CPU_ELEMENTS;
    cpu_new_phase(q, op, cpu_glu, cpu_ceil_div(o->n, op->chunk));
}

static void cpu_record_add(moe_queue *q, const moe_add_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.add = *o;
    cpu_new_phase(q, op, cpu_add, cpu_ceil_div(o->n, CPU_ELEMENTS));
}

static void cpu_record_softcap(moe_queue *q, const moe_softcap_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.softcap = *o;
    cpu_new_phase(q, op, cpu_softcap, cpu_ceil_div(o->n, CPU_ELEMENTS));
}

static void cpu_record_route(moe_queue *q, const moe_route_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.route = *o;
    q->sorted = (cpu_sorted){0};
    cpu_new_phase(q, op, cpu_route, o->n_tok);
}

static void cpu_record_experts(moe_queue *q, const moe_experts_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.experts = *o;
    const moe_weight *w = o->out[0].w;
    for (uint32_t i = 0; i < o->n_out; i++)
        op->act_mask |= weight_act_mask(o->out[i].w);
    op->chunk = cpu_chunk_rows(q, w->dims[1] * o->n_out * MOE_MIN(o->n_used, w->dims[2]),
                               w->row_bytes, o->n_tok);
    const cpu_sorted sorted = {o->ids, (uint32_t)w->dims[2], o->n_tok * o->n_used};
    if (q->sorted.ids.buffer != sorted.ids.buffer || q->sorted.ids.offset != sorted.ids.offset ||
        q->sorted.n_expert != sorted.n_expert || q->sorted.n != sorted.n)
        cpu_new_phase(q, op, cpu_experts_sort, 1);
    q->sorted = sorted;
    cpu_new_phase(q, op, cpu_experts_quantize, o->n_tok);
    cpu_new_phase(q, op, cpu_experts, (uint64_t)cpu_ceil_div(w->dims[1], op->chunk) * o->n_out)
        ->per_active_expert = true;
}

static void cpu_record_combine(moe_queue *q, const moe_combine_op *o)
{
    cpu_op *op = cpu_new_op(q);
    op->u.combine = *o;
    cpu_new_phase(q, op, cpu_combine, o->n_tok);
}

static const moe_backend cpu_backend = {
    .name = "cpu",
    .device_open = cpu_device_open,
    .device_close = cpu_device_close,
    .device_name = cpu_device_name,
    .buffer_new = cpu_buffer_new,
    .buffer_wrap = cpu_buffer_wrap,
    .buffer_free = cpu_buffer_free,
    .queue_open = cpu_queue_open,
    .queue_close = cpu_queue_close,
    .queue_bytes = cpu_queue_bytes,
    .submit = cpu_submit,
    .write = cpu_write,
    .read = cpu_read,
    .embed = cpu_record_embed,
    .norm = cpu_record_norm,
    .matmul = cpu_record_matmul,
    .rope = cpu_record_rope,
    .store = cpu_record_store,
    .attend = cpu_record_attend,
    .heads = cpu_record_heads,
    .conv = cpu_record_conv,
    .gates = cpu_record_gates,
    .delta = cpu_record_delta,
    .copy = cpu_record_copy,
    .glu = cpu_record_glu,
    .add = cpu_record_add,
    .softcap = cpu_record_softcap,
    .route = cpu_record_route,
    .experts = cpu_record_experts,
    .combine = cpu_record_combine,
};

MOE_UNUSED static const moe_backend *backend_cpu(void)
{
    return &cpu_backend;
}

#endif
