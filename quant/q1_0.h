/* quant/q1_0.h - Q1_0: blocks of 128 weights, one scale, a sign each.
 *
 *     byte 0   2                                18
 *          | d | q[16]                          |     w[k] = d if bit k % 8 of q[k / 8] is set,
 *          f16                                               else -d
 *
 * Product with a row of activations, 32 weights after another, w = +-1:
 *     acc = fmaf(d * x_scale, (float)sum(w * x_q), acc)
 *
 * Vector kernels have the codes 0 and 2, from which they subtract 1. */
#ifndef MOE_QUANT_Q1_0_H
#define MOE_QUANT_Q1_0_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct q1_0_block {
    uint8_t d[2];
    uint8_t q[16];
} q1_0_block;
_Static_assert(sizeof(q1_0_block) == 18, "as in GGUF");

MOE_INLINE int q1_0_sign(const q1_0_block *w, size_t k)
{
    return (w->q[k / 8] >> k % 8 & 1) ? 1 : -1;
}

static void q1_0_dequantize(const void *blocks, float *dst, size_t n)
{
    const q1_0_block *w = blocks;
    for (size_t b = 0; b < n / 128; b++) {
        const float d = f32_of_f16(load_u16(w[b].d));
        for (size_t k = 0; k < 128; k++)
            dst[128 * b + k] = d * (float)q1_0_sign(&w[b], k);
    }
}

/* The mean of the magnitudes has the least squares. */
static void q1_0_quantize(const float *src, void *blocks, size_t n)
{
    q1_0_block *w = blocks;
    for (size_t b = 0; b < n / 128; b++, src += 128) {
        float sum = 0;
        memset(&w[b], 0, sizeof w[b]);
        for (size_t k = 0; k < 128; k++) {
            sum += fabsf(src[k]);
            w[b].q[k / 8] |= (uint8_t)((src[k] >= 0) << k % 8);
        }
        const uint16_t stored = quant_scale(sum / 128);
        memcpy(w[b].d, &stored, 2);
    }
}

static float q1_0_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const q1_0_block *w = (const q1_0_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 32; k++)
            sum += q1_0_sign(&w[b / 4], b % 4 * 32 + k) * x.q[32 * b + k];
        acc = fmaf(f32_of_f16(load_u16(w[b / 4].d)) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

static void q1_0_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q1_0_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE void q1_0_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    const __m256i words = x86_u32x8(row, offset + offsetof(q1_0_block, q) + 4 * w->part);
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        w->lo[r] = x86_bits_to(words, 4 * r, 2);
        w->hi[r] = x86_bits_to(words, 4 * r + 2, 2);
    }
    w->d = x86_f16x8(row, offset);
}

/* sum((code - 1) * q) = sum(code * q) - sum(q) */
MOE_AVX2_INLINE __m256 q1_0_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_scaled(w, x, _mm256_add_epi32(x86_dot_u5(w, x), x86_sum_times(x, -1)), acc);
}

MOE_AVX2 static void q1_0_few_avx2(const moe_mm *mm)
{
    x86_few32_parts(mm, sizeof(q1_0_block), 4, q1_0_unpack_avx2, q1_0_step_avx2);
}

MOE_AVX2 static void q1_0_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(q1_0_block);
        const __m256 d = x86_f16x8(row, at);
        __m256i words[4];
        x86_load_transposed(row, at + offsetof(q1_0_block, q), words);
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++) {
            __m256i *code = tile->code + 8 * (4 * b + i);
            MOE_UNROLL
            for (size_t j = 0; j < 8; j++)
                code[j] = _mm256_setzero_si256();
            x86_tile_bits(words[i], 2, code);
            tile->d[4 * b + i] = d;
        }
    }
}

static const x86_format q1_0_x86 = {128, sizeof(q1_0_block), 1, q1_0_load_avx2};

static void q1_0_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &q1_0_x86, x86_block_u4_avx2, q1_0_few_avx2, X86_FEW);
}

static void q1_0_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &q1_0_x86, x86_block_u8_avxvnni, q1_0_few_avx2, X86_FEW);
}

MOE_VNNI512 static void q1_0_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    __m512i word[2 * sizeof(q1_0_block) / 4];
    x86_512_load_words(rows, offset, 2 * sizeof(q1_0_block), word);
    MOE_UNROLL
    for (size_t b = 0; b < 8; b++) {
        const size_t at = b / 4 * sizeof(q1_0_block);
        __m512i *code = tile->code + 8 * b;
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++)
            code[j] = _mm512_setzero_si512();
        x86_512_bits(x86_512_word(word, at + offsetof(q1_0_block, q) + b % 4 * 4), 2, code);
        tile->d[b] = x86_512_f16_at(word, at);
    }
}

static const x86_512_format q1_0_vnni512 = {128, sizeof(q1_0_block), 1, q1_0_load_vnni512,
                                            &x86_512_block};

MOE_VNNI512 static void q1_0_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &q1_0_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void q1_0_codes_arm(const uint8_t *block, size_t part, int8x16_t code[2])
{
    code[0] = code[1] = vdupq_n_s8(0);
    arm_bits(((const q1_0_block *)block)->q + 4 * part, 2, code);
    arm_subtract(code, 2, 1);
}

static const arm32_format q1_0_arm = {.block_bytes = sizeof(q1_0_block), .n_part = 4,
                                      .part_codes = q1_0_codes_arm,
                                      .part_scales = arm32_common_scale};
ARM_KERNELS(q1_0, arm32)
#endif

static moe_kernels q1_0_select(uint32_t cpu)
{
    moe_kernels best = {q1_0_mm_c, q1_0_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q1_0_few_avx2, q1_0_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = q1_0_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q1_0_gemm_vnni512, q1_0_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q1_0_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q1_0 = {.name = "Q1_0",
                                     .id = 41,
                                     .block_len = 128,
                                     .block_bytes = sizeof(q1_0_block),
                                     .act = MOE_ACT_Q8_32,
                                     .bits = 1.125,
                                     .dequantize = q1_0_dequantize,
                                     .quantize = q1_0_quantize,
                                     .select = q1_0_select,
                                     .fields = {1, 1, 16},
                                     .given = true};

#endif
