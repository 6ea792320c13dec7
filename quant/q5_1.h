/* quant/q5_1.h - Q5_1: blocks of 32 weights, a scale and an offset, 5 bits each.
 *
 *     byte 0   2   4     8                      24
 *          | d | m | qh  | q[16]                |     w[k] = d * code[k] + m
 *          f16 f16   u32   low nibbles: k 0..15       code[k] = nibble | (qh >> k & 1) << 4
 *                          high nibbles: k 16..31
 *
 * Product with a row of activations, block after block:
 *     acc = fmaf(d * x_scale, (float)sum(code * x_q), acc)
 *     acc = fmaf(m * x_scale, (float)sum(x_q), acc) */
#ifndef MOE_QUANT_Q5_1_H
#define MOE_QUANT_Q5_1_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct q5_1_block {
    uint8_t d[2], m[2];
    uint8_t qh[4];
    uint8_t q[16];
} q5_1_block;
_Static_assert(sizeof(q5_1_block) == 24, "as in GGUF");

/* Code k of a block, 0..31. */
MOE_INLINE int q5_1_code(const q5_1_block *w, size_t k)
{
    return (w->q[k % 16] >> k / 16 * 4 & 15) | (w->qh[k / 8] >> k % 8 & 1) << 4;
}

static void q5_1_dequantize(const void *blocks, float *dst, size_t n)
{
    const q5_1_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++) {
        const float d = f32_of_f16(load_u16(w[b].d)), m = f32_of_f16(load_u16(w[b].m));
        for (size_t k = 0; k < 32; k++)
            dst[32 * b + k] = quant_affine(d, q5_1_code(&w[b], k), m);
    }
}

/* d and m as they are stored. */
static void q5_1_pack(q5_1_block *w, uint16_t d, uint16_t m, const uint8_t code[32])
{
    memcpy(w->d, &d, 2);
    memcpy(w->m, &m, 2);
    quant_put_fifth(w->qh, code);
    quant_put_nibbles(w->q, code);
}

/* The codes span the block from its least to its greatest weight. */
static void q5_1_quantize(const float *src, void *blocks, size_t n)
{
    q5_1_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++, src += 32) {
        uint16_t d, m;
        uint8_t code[32];
        quant_span(src, 32, 31, &d, &m);
        for (size_t k = 0; k < 32; k++)
            code[k] = (uint8_t)quant_round(src[k] - f32_of_f16(m), f32_of_f16(d), 0, 31);
        q5_1_pack(&w[b], d, m, code);
    }
}

static float q5_1_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const q5_1_block *w = (const q5_1_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 32; k++)
            sum += q5_1_code(&w[b], k) * x.q[32 * b + k];
        acc = fmaf(f32_of_f16(load_u16(w[b].d)) * x.scale[b], (float)sum, acc);
        acc = fmaf(f32_of_f16(load_u16(w[b].m)) * x.scale[b],
                   (float)(x.sum[2 * b] + x.sum[2 * b + 1]), acc);
    }
    return acc;
}

static void q5_1_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q5_1_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE void q5_1_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    __m256i head[2];
    x86_nibbles(row, offset + offsetof(q5_1_block, q), w);
    x86_heads(row, offset, head);
    x86_fifth_bits(head, offsetof(q5_1_block, qh), w);
    w->d = x86_head_f16(head, offsetof(q5_1_block, d));
    w->m = x86_head_f16(head, offsetof(q5_1_block, m));
}

MOE_AVX2_INLINE __m256 q5_1_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_affine(w, x, x86_dot_u5(w, x), acc);
}

MOE_AVX2 static void q5_1_few_avx2(const moe_mm *mm)
{
    x86_few32(mm, sizeof(q5_1_block), q5_1_unpack_avx2, q5_1_step_avx2);
}

MOE_AVX2 static void q5_1_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(q5_1_block);
        __m256i *code = tile->code + 8 * b;
        x86_tile_nibbles(row, at + offsetof(q5_1_block, q), code);
        x86_tile_fifth_bits(row, at + offsetof(q5_1_block, qh), code);
        tile->d[b] = x86_f16x8(row, at);
        tile->m[b] = x86_f16x8(row, at + offsetof(q5_1_block, m));
    }
}

static const x86_format q5_1_x86 = {32, sizeof(q5_1_block), 0, q5_1_load_avx2};

static void q5_1_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &q5_1_x86, x86_affine_u5_avx2, q5_1_few_avx2, X86_FEW);
}

static void q5_1_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &q5_1_x86, x86_affine_avxvnni, q5_1_few_avx2, X86_FEW);
}

MOE_VNNI512 static void q5_1_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    __m512i word[8 * sizeof(q5_1_block) / 4];
    x86_512_load_words(rows, offset, 8 * sizeof(q5_1_block), word);
    for (size_t b = 0; b < 8; b++) {
        const __m512i *w = word + b * sizeof(q5_1_block) / 4;
        x86_512_block_nibbles(w, offsetof(q5_1_block, q), tile->code + 8 * b);
        x86_512_fifth_bits(x86_512_word(w, offsetof(q5_1_block, qh)), tile->code + 8 * b);
        tile->d[b] = x86_512_f16_at(w, 0);
        tile->m[b] = x86_512_f16_at(w, offsetof(q5_1_block, m));
    }
}

static const x86_512_format q5_1_vnni512 = {32, sizeof(q5_1_block), 0,
                                             q5_1_load_vnni512, &x86_512_affine};

MOE_VNNI512 static void q5_1_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &q5_1_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void q5_1_codes_arm(const uint8_t *block, int8x16_t code[2])
{
    arm_nibbles(block + offsetof(q5_1_block, q), code);
    arm_fifth_bits(block + offsetof(q5_1_block, qh), code);
}

static const arm32_format q5_1_arm = {.block_bytes = sizeof(q5_1_block), .affine = true,
                                      .codes = q5_1_codes_arm, .scales = arm_f16x4};
ARM_KERNELS(q5_1, arm32)
#endif

static moe_kernels q5_1_select(uint32_t cpu)
{
    moe_kernels best = {q5_1_mm_c, q5_1_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q5_1_few_avx2, q5_1_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = q5_1_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best.gemm = q5_1_gemm_vnni512;
#endif
#if MOE_ARM64
    best = q5_1_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static void q5_1_rotate(void *blocks, size_t n, bool back)
{
    q5_1_block *w = blocks;
    for (size_t b = 0; b < n; b++)
        quant_rotate_fifth(w[b].qh, w[b].q, back);
}

static const moe_quant quant_q5_1 = {"Q5_1", 7, 32, sizeof(q5_1_block), MOE_ACT_Q8_32, 6.0,
                                     q5_1_dequantize, q5_1_quantize, q5_1_select,
                                     .fields = {1, 1, 1, 1, 4, 16},
                                     .rotate = q5_1_rotate};

#endif
