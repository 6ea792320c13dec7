/* quant/q4_0.h - Q4_0: blocks of 32 weights, one scale, 4 bits each.
 *
 *     byte 0   2                                18
 *          | d | q[16]                          |     w[k]      = d * ((q[k] & 15) - 8)   k < 16
 *          f16   low nibbles: k 0..15                 w[k + 16] = d * ((q[k] >> 4) - 8)
 *                high nibbles: k 16..31
 *
 * Product with a row of activations, block after block:
 *     acc = fmaf(d * x_scale, (float)sum((code - 8) * x_q), acc) */
#ifndef MOE_QUANT_Q4_0_H
#define MOE_QUANT_Q4_0_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct q4_0_block {
    uint8_t d[2];
    uint8_t q[16];
} q4_0_block;
_Static_assert(sizeof(q4_0_block) == 18, "as in GGUF");

static void q4_0_dequantize(const void *blocks, float *dst, size_t n)
{
    const q4_0_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++) {
        const float d = f32_of_f16(load_u16(w[b].d));
        for (size_t k = 0; k < 16; k++) {
            dst[32 * b + k] = d * (float)((w[b].q[k] & 15) - 8);
            dst[32 * b + k + 16] = d * (float)((w[b].q[k] >> 4) - 8);
        }
    }
}

/* d as it is stored; code[k] stands for d * (code[k] - 8). */
static void q4_0_pack(q4_0_block *w, uint16_t d, const uint8_t code[32])
{
    memcpy(w->d, &d, 2);
    quant_put_nibbles(w->q, code);
}

/* The weight of the largest magnitude becomes code 0, that is -8 * d. */
static void q4_0_quantize(const float *src, void *blocks, size_t n)
{
    q4_0_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++, src += 32) {
        const uint16_t d = quant_scale(quant_peak(src, 32) / -8);
        uint8_t code[32];
        for (size_t k = 0; k < 32; k++)
            code[k] = (uint8_t)(quant_round(src[k], f32_of_f16(d), -8, 7) + 8);
        q4_0_pack(&w[b], d, code);
    }
}

static float q4_0_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const q4_0_block *w = (const q4_0_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 16; k++) {
            sum += ((w[b].q[k] & 15) - 8) * x.q[32 * b + k];
            sum += ((w[b].q[k] >> 4) - 8) * x.q[32 * b + k + 16];
        }
        acc = fmaf(f32_of_f16(load_u16(w[b].d)) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

static void q4_0_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q4_0_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE void q4_0_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    x86_nibbles(row, offset + offsetof(q4_0_block, q), w);
    w->d = x86_f16x8(row, offset);
}

/* sum((code - 8) * q) = sum(code * q) - 8 * sum(q): the codes stay unsigned. */
MOE_AVX2_INLINE __m256 q4_0_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_scaled(w, x, _mm256_add_epi32(x86_dot_u5(w, x), x86_sum_times(x, -8)), acc);
}

MOE_AVX2 static void q4_0_few_avx2(const moe_mm *mm)
{
    x86_few32(mm, sizeof(q4_0_block), q4_0_unpack_avx2, q4_0_step_avx2);
}

MOE_AVX2 static void q4_0_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(q4_0_block);
        __m256i *code = tile->code + 8 * b;
        x86_tile_nibbles(row, at + offsetof(q4_0_block, q), code);
        tile->d[b] = x86_f16x8(row, at);
    }
}

static const x86_format q4_0_x86 = {32, sizeof(q4_0_block), 8, q4_0_load_avx2};

static void q4_0_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &q4_0_x86, x86_block_u4_avx2, q4_0_few_avx2, X86_FEW);
}

static void q4_0_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &q4_0_x86, x86_block_u8_avxvnni, q4_0_few_avx2, X86_FEW);
}
MOE_VNNI512 static void q4_0_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    __m512i word[8 * sizeof(q4_0_block) / 4];
    x86_512_load_words(rows, offset, 8 * sizeof(q4_0_block), word);
    for (size_t b = 0; b < 8; b += 2) {
        const __m512i *w = word + b * sizeof(q4_0_block) / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            const size_t at = i * sizeof(q4_0_block);
            x86_512_block_nibbles(w, at + offsetof(q4_0_block, q), tile->code + 8 * (b + i));
            tile->d[b + i] = x86_512_f16_at(w, at);
        }
    }
}

static const x86_512_format q4_0_vnni512 = {32, sizeof(q4_0_block), 8,
                                             q4_0_load_vnni512, &x86_512_block};

MOE_VNNI512 static void q4_0_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &q4_0_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void q4_0_codes_arm(const uint8_t *block, int8x16_t code[2])
{
    arm_nibbles(block + offsetof(q4_0_block, q), code);
    arm_subtract(code, 2, 8);
}

static const arm32_format q4_0_arm = {.block_bytes = sizeof(q4_0_block),
                                      .codes = q4_0_codes_arm, .scales = arm_f16x4};
ARM_KERNELS(q4_0, arm32)
#endif

static moe_kernels q4_0_select(uint32_t cpu)
{
    moe_kernels best = {q4_0_mm_c, q4_0_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q4_0_few_avx2, q4_0_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = q4_0_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best.gemm = q4_0_gemm_vnni512;
#endif
#if MOE_ARM64
    best = q4_0_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q4_0 = {"Q4_0", 2, 32, sizeof(q4_0_block), MOE_ACT_Q8_32, 4.5,
                                     q4_0_dequantize, q4_0_quantize, q4_0_select,
                                     .fields = {1, 1, 16}};

#endif
