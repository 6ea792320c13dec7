/* quant/iq4_nl.h - IQ4_NL: blocks of 32 weights, one scale, 4 bits each that choose from 16 values
 * spaced more closely around zero.
 *
 *     byte 0   2                                18
 *          | d | q[16]                          |     w[k]      = d * iq4_value[q[k] & 15]   k < 16
 *          f16   low nibbles: k 0..15                 w[k + 16] = d * iq4_value[q[k] >> 4]
 *                high nibbles: k 16..31
 *
 * Product with a row of activations, block after block:
 *     acc = fmaf(d * x_scale, (float)sum(value * x_q), acc) */
#ifndef MOE_QUANT_IQ4_NL_H
#define MOE_QUANT_IQ4_NL_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct iq4_nl_block {
    uint8_t d[2];
    uint8_t q[16];
} iq4_nl_block;
_Static_assert(sizeof(iq4_nl_block) == 18, "as in GGUF");

static void iq4_nl_dequantize(const void *blocks, float *dst, size_t n)
{
    const iq4_nl_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++) {
        const float d = f32_of_f16(load_u16(w[b].d));
        for (size_t k = 0; k < 16; k++) {
            dst[32 * b + k] = d * (float)iq4_value[w[b].q[k] & 15];
            dst[32 * b + k + 16] = d * (float)iq4_value[w[b].q[k] >> 4];
        }
    }
}

/* d as it is stored; codes are places in iq4_value. */
static void iq4_nl_pack(iq4_nl_block *w, uint16_t d, const uint8_t code[32])
{
    memcpy(w->d, &d, 2);
    quant_put_nibbles(w->q, code);
}

/* The weight of the largest magnitude becomes -127 * d. */
static void iq4_nl_quantize(const float *src, void *blocks, size_t n)
{
    iq4_nl_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++, src += 32) {
        const uint16_t stored = quant_scale(quant_peak(src, 32) / -127);
        const float d = f32_of_f16(stored);
        uint8_t code[32];
        for (size_t k = 0; k < 32; k++)
            code[k] = (uint8_t)quant_nearest(d != 0 ? src[k] / d : 0, iq4_value, 16);
        iq4_nl_pack(&w[b], stored, code);
    }
}

static float iq4_nl_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const iq4_nl_block *w = (const iq4_nl_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 16; k++) {
            sum += iq4_value[w[b].q[k] & 15] * x.q[32 * b + k];
            sum += iq4_value[w[b].q[k] >> 4] * x.q[32 * b + k + 16];
        }
        acc = fmaf(f32_of_f16(load_u16(w[b].d)) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

static void iq4_nl_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, iq4_nl_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE void iq4_nl_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    x86_nibbles(row, offset + offsetof(iq4_nl_block, q), w);
    x86_look_up(w, iq4_value);
    w->d = x86_f16x8(row, offset);
}

MOE_AVX2_INLINE __m256 iq4_nl_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_scaled(w, x, x86_dot_i8(w, x), acc);
}

MOE_AVX2 static void iq4_nl_few_avx2(const moe_mm *mm)
{
    x86_few32(mm, sizeof(iq4_nl_block), iq4_nl_unpack_avx2, iq4_nl_step_avx2);
}

MOE_AVX2 static void iq4_nl_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                      x86_tile *tile)
{
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(iq4_nl_block);
        __m256i *code = tile->code + 8 * b;
        x86_tile_nibbles(row, at + offsetof(iq4_nl_block, q), code);
        x86_tile_look_up(iq4_value, code);
        tile->d[b] = x86_f16x8(row, at);
    }
}

static const x86_format iq4_nl_x86 = {32, sizeof(iq4_nl_block), 128, iq4_nl_load_avx2};

static void iq4_nl_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &iq4_nl_x86, x86_block_i8_avx2, iq4_nl_few_avx2, X86_FEW);
}

static void iq4_nl_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &iq4_nl_x86, x86_block_i8_avxvnni, iq4_nl_few_avx2, X86_FEW);
}

/* iq4_value + 128 */
MOE_VNNI512 static void iq4_nl_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m128i table = _mm_xor_si128(_mm_loadu_si128((const __m128i *)iq4_value),
                                        _mm_set1_epi8(-128));
    __m512i word[8 * sizeof(iq4_nl_block) / 4];
    x86_512_load_words(rows, offset, 8 * sizeof(iq4_nl_block), word);
    for (size_t b = 0; b < 8; b += 2) {
        const __m512i *w = word + b * sizeof(iq4_nl_block) / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            const size_t at = i * sizeof(iq4_nl_block);
            __m512i *code = tile->code + 8 * (b + i);
            x86_512_block_nibbles(w, at + offsetof(iq4_nl_block, q), code);
            x86_512_look_up(table, code, 8);
            tile->d[b + i] = x86_512_f16_at(w, at);
        }
    }
}

static const x86_512_format iq4_nl_vnni512 = {32, sizeof(iq4_nl_block), 128,
                                             iq4_nl_load_vnni512, &x86_512_block};

MOE_VNNI512 static void iq4_nl_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &iq4_nl_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void iq4_nl_codes_arm(const uint8_t *block, int8x16_t code[2])
{
    arm_nibbles(block + offsetof(iq4_nl_block, q), code);
    arm_look_up(code, 2, iq4_value);
}

static const arm32_format iq4_nl_arm = {.block_bytes = sizeof(iq4_nl_block),
                                        .codes = iq4_nl_codes_arm, .scales = arm_f16x4};
ARM_KERNELS(iq4_nl, arm32)
#endif

static moe_kernels iq4_nl_select(uint32_t cpu)
{
    moe_kernels best = {iq4_nl_mm_c, iq4_nl_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){iq4_nl_few_avx2, iq4_nl_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = iq4_nl_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best.gemm = iq4_nl_gemm_vnni512;
#endif
#if MOE_ARM64
    best = iq4_nl_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_iq4_nl = {"IQ4_NL", 20, 32, sizeof(iq4_nl_block), MOE_ACT_Q8_32, 4.5,
                                     iq4_nl_dequantize, iq4_nl_quantize, iq4_nl_select,
                                     .fields = {1, 1, 16}};

#endif
