/* quant/q8_0.h - Q8_0: blocks of 32 weights, one scale, 8 bits each.
 *
 *     byte 0   2                                34
 *          | d | q[32], signed                  |     w[k] = d * q[k]
 *          f16
 *
 * Product with a row of activations, block after block:
 *     acc = fmaf(d * x_scale, (float)sum(q * x_q), acc) */
#ifndef MOE_QUANT_Q8_0_H
#define MOE_QUANT_Q8_0_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct q8_0_block {
    uint8_t d[2];
    int8_t q[32];
} q8_0_block;
_Static_assert(sizeof(q8_0_block) == 34, "as in GGUF");

static void q8_0_dequantize(const void *blocks, float *dst, size_t n)
{
    const q8_0_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++) {
        const float d = f32_of_f16(load_u16(w[b].d));
        for (size_t k = 0; k < 32; k++)
            dst[32 * b + k] = d * (float)w[b].q[k];
    }
}

static void q8_0_quantize(const float *src, void *blocks, size_t n)
{
    q8_0_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++, src += 32) {
        const uint16_t stored = quant_scale(fabsf(quant_peak(src, 32)) / 127);
        memcpy(w[b].d, &stored, 2);
        for (size_t k = 0; k < 32; k++)
            w[b].q[k] = (int8_t)quant_round(src[k], f32_of_f16(stored), -127, 127);
    }
}

static float q8_0_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const q8_0_block *w = (const q8_0_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 32; k++)
            sum += w[b].q[k] * x.q[32 * b + k];
        acc = fmaf(f32_of_f16(load_u16(w[b].d)) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

static void q8_0_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q8_0_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE void q8_0_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    const size_t q = offset + offsetof(q8_0_block, q);
    w->lo[0] = x86_load_pair(row[0] + q, row[4] + q);
    w->lo[1] = x86_load_pair(row[1] + q, row[5] + q);
    w->lo[2] = x86_load_pair(row[2] + q, row[6] + q);
    w->lo[3] = x86_load_pair(row[3] + q, row[7] + q);
    w->hi[0] = x86_load_pair(row[0] + q + 16, row[4] + q + 16);
    w->hi[1] = x86_load_pair(row[1] + q + 16, row[5] + q + 16);
    w->hi[2] = x86_load_pair(row[2] + q + 16, row[6] + q + 16);
    w->hi[3] = x86_load_pair(row[3] + q + 16, row[7] + q + 16);
    w->d = x86_f16x8(row, offset);
}

MOE_AVX2_INLINE __m256 q8_0_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_scaled(w, x, x86_dot_i8(w, x), acc);
}

MOE_AVX2 static void q8_0_few_avx2(const moe_mm *mm)
{
    x86_few32(mm, sizeof(q8_0_block), q8_0_unpack_avx2, q8_0_step_avx2);
}

MOE_AVX2 static void q8_0_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(q8_0_block);
        __m256i *code = tile->code + 8 * b;
        x86_load_transposed(row, at + offsetof(q8_0_block, q), code);
        x86_load_transposed(row, at + offsetof(q8_0_block, q) + 16, code + 4);
        tile->d[b] = x86_f16x8(row, at);
    }
}

static const x86_format q8_0_x86 = {32, sizeof(q8_0_block), 128, q8_0_load_avx2};

static void q8_0_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &q8_0_x86, x86_block_i8_avx2, q8_0_few_avx2, X86_FEW_SIGNED);
}

static void q8_0_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &q8_0_x86, x86_block_i8_avxvnni, q8_0_few_avx2, X86_FEW);
}
/* q + 128 */
MOE_VNNI512 static void q8_0_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    __m512i word[8 * sizeof(q8_0_block) / 4];
    x86_512_load_words(rows, offset, 8 * sizeof(q8_0_block), word);
    for (size_t b = 0; b < 8; b += 2) {
        const __m512i *w = word + b * sizeof(q8_0_block) / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            const size_t at = i * sizeof(q8_0_block);
            MOE_UNROLL
            for (size_t j = 0; j < 8; j++)
                tile->code[8 * (b + i) + j] = _mm512_xor_si512(
                    x86_512_word(w, at + offsetof(q8_0_block, q) + 4 * j), _mm512_set1_epi8(-128));
            tile->d[b + i] = x86_512_f16_at(w, at);
        }
    }
}

static const x86_512_format q8_0_vnni512 = {32, sizeof(q8_0_block), 128,
                                             q8_0_load_vnni512, &x86_512_block};

static void q8_0_gemm_vnni512(const moe_mm *mm)
{
    if (mm->n_tok <= X86_FEW) /* 2 tokens, 2048 x 512, Zen 5: 106 Gop/s, through a tile 80 */
        q8_0_few_avx2(mm);
    else
        x86_512_gemm(mm, &q8_0_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void q8_0_codes_arm(const uint8_t *block, int8x16_t code[2])
{
    const int8_t *q = ((const q8_0_block *)block)->q;
    code[0] = vld1q_s8(q);
    code[1] = vld1q_s8(q + 16);
}

static const arm32_format q8_0_arm = {.block_bytes = sizeof(q8_0_block),
                                      .codes = q8_0_codes_arm, .scales = arm_f16x4};
ARM_KERNELS(q8_0, arm32)
#endif

static moe_kernels q8_0_select(uint32_t cpu)
{
    moe_kernels best = {q8_0_mm_c, q8_0_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q8_0_few_avx2, q8_0_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = q8_0_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best.gemm = q8_0_gemm_vnni512;
#endif
#if MOE_ARM64
    best = q8_0_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q8_0 = {"Q8_0", 8, 32, sizeof(q8_0_block), MOE_ACT_Q8_32, 8.5,
                                     q8_0_dequantize, q8_0_quantize, q8_0_select,
                                     .fields = {1, 1, 32}};

#endif
