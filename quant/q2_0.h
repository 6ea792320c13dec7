/* quant/q2_0.h - Q2_0: blocks of 64 weights, one scale, 2 bits each.
 *
 *     byte 0   2                                18
 *          | d | q[16]                          |     w[k] = d * (code - 1)
 *          f16                                         code = q[k / 4] >> 2 (k % 4) & 3
 *
 * Product with a row of activations, 32 weights after another:
 *     acc = fmaf(d * x_scale, (float)sum((code - 1) * x_q), acc) */
#ifndef MOE_QUANT_Q2_0_H
#define MOE_QUANT_Q2_0_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct q2_0_block {
    uint8_t d[2];
    uint8_t q[16];
} q2_0_block;
_Static_assert(sizeof(q2_0_block) == 18, "as in GGUF");

MOE_INLINE int q2_0_value(const q2_0_block *w, size_t k)
{
    return (w->q[k / 4] >> 2 * (k % 4) & 3) - 1;
}

static void q2_0_dequantize(const void *blocks, float *dst, size_t n)
{
    const q2_0_block *w = blocks;
    for (size_t b = 0; b < n / 64; b++) {
        const float d = f32_of_f16(load_u16(w[b].d));
        for (size_t k = 0; k < 64; k++)
            dst[64 * b + k] = d * (float)q2_0_value(&w[b], k);
    }
}

/* The weight of the largest magnitude becomes 2 * d. */
static void q2_0_quantize(const float *src, void *blocks, size_t n)
{
    q2_0_block *w = blocks;
    for (size_t b = 0; b < n / 64; b++, src += 64) {
        const uint16_t stored = quant_scale(quant_peak(src, 64) / 2);
        const float d = f32_of_f16(stored);
        memset(w[b].q, 0, sizeof w[b].q);
        memcpy(w[b].d, &stored, 2);
        for (size_t k = 0; k < 64; k++)
            w[b].q[k / 4] |= (uint8_t)((quant_round(src[k], d, -1, 2) + 1) << 2 * (k % 4));
    }
}

static float q2_0_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const q2_0_block *w = (const q2_0_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 32; k++)
            sum += q2_0_value(&w[b / 2], b % 2 * 32 + k) * x.q[32 * b + k];
        acc = fmaf(f32_of_f16(load_u16(w[b / 2].d)) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

static void q2_0_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q2_0_dot_c);
}

#if MOE_X86
/* How the four codes of a byte b, which fills a lane of 32 bits, become its bytes. Of the four,
 * bytes 1 and 3 keep the half that has two of the codes, u = b & 0x0f and u = b & 0xf0. The upper
 * 16 bits of a product of 16-bit lanes, 256 u times a factor, are u + 64 u and u / 16 + 4 u: the
 * lowest 2 bits of both bytes are the codes, since no carry reaches them. */
enum { Q2_0_HALVES = (int)0xf0000f00, Q2_0_FACTORS = 0x04104100 };

MOE_AVX2_INLINE __m256i q2_0_split_avx2(__m256i v)
{
    v = _mm256_and_si256(v, _mm256_set1_epi32(Q2_0_HALVES));
    v = _mm256_mulhi_epu16(v, _mm256_set1_epi32(Q2_0_FACTORS));
    return _mm256_and_si256(v, _mm256_set1_epi8(3));
}

MOE_AVX2_INLINE void q2_0_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    __m256i head[2];
    x86_heads(row, offset + offsetof(q2_0_block, q) + 8 * w->part, head);
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const __m256i at = _mm256_add_epi8(first, _mm256_set1_epi8((char)(r % 2 * 8)));
        const __m256i four = _mm256_set1_epi8(4);
        w->lo[r] = q2_0_split_avx2(_mm256_shuffle_epi8(head[r / 2], at));
        w->hi[r] = q2_0_split_avx2(_mm256_shuffle_epi8(head[r / 2], _mm256_add_epi8(at, four)));
    }
    w->d = x86_f16x8(row, offset);
}

/* sum((code - 1) * q) = sum(code * q) - sum(q) */
MOE_AVX2_INLINE __m256 q2_0_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_scaled(w, x, _mm256_add_epi32(x86_dot_u5(w, x), x86_sum_times(x, -1)), acc);
}

MOE_AVX2 static void q2_0_few_avx2(const moe_mm *mm)
{
    x86_few32_parts(mm, sizeof(q2_0_block), 2, q2_0_unpack_avx2, q2_0_step_avx2);
}

MOE_AVX2 static void q2_0_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(q2_0_block);
        __m256i words[4], *code = tile->code + 16 * b;
        x86_load_transposed(row, at + offsetof(q2_0_block, q), words);
        MOE_UNROLL
        for (size_t j = 0; j < 16; j++) {
            const __m256i byte = _mm256_add_epi8(first, _mm256_set1_epi8((char)(j % 4)));
            code[j] = q2_0_split_avx2(_mm256_shuffle_epi8(words[j / 4], byte));
        }
        tile->d[2 * b] = tile->d[2 * b + 1] = x86_f16x8(row, at);
    }
}

static const x86_format q2_0_x86 = {64, sizeof(q2_0_block), 1, q2_0_load_avx2};

static void q2_0_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &q2_0_x86, x86_block_u4_avx2, q2_0_few_avx2, X86_FEW);
}

static void q2_0_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &q2_0_x86, x86_block_u8_avxvnni, q2_0_few_avx2, X86_FEW);
}

/* The 16 codes of 4 bytes. */
MOE_VNNI512_INLINE void q2_0_split_vnni512(__m512i word, __m512i code[4])
{
    const __m512i first = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    MOE_UNROLL
    for (size_t j = 0; j < 4; j++) {
        const __m512i at = _mm512_add_epi8(first, _mm512_set1_epi8((char)j));
        __m512i v = _mm512_and_si512(_mm512_shuffle_epi8(word, at),
                                     _mm512_set1_epi32(Q2_0_HALVES));
        v = _mm512_mulhi_epu16(v, _mm512_set1_epi32(Q2_0_FACTORS));
        code[j] = _mm512_and_si512(v, _mm512_set1_epi8(3));
    }
}

MOE_VNNI512 static void q2_0_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    __m512i word[4 * sizeof(q2_0_block) / 4];
    x86_512_load_words(rows, offset, 4 * sizeof(q2_0_block), word);
    for (size_t b = 0; b < 4; b += 2) {
        const __m512i *w = word + b * sizeof(q2_0_block) / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            const size_t at = i * sizeof(q2_0_block);
            MOE_UNROLL
            for (size_t j = 0; j < 4; j++)
                q2_0_split_vnni512(x86_512_word(w, at + offsetof(q2_0_block, q) + 4 * j),
                                   tile->code + 16 * (b + i) + 4 * j);
            tile->d[2 * (b + i)] = tile->d[2 * (b + i) + 1] = x86_512_f16_at(w, at);
        }
    }
}

static const x86_512_format q2_0_vnni512 = {64, sizeof(q2_0_block), 1, q2_0_load_vnni512,
                                            &x86_512_block};

MOE_VNNI512 static void q2_0_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &q2_0_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void q2_0_codes_arm(const uint8_t *block, size_t part, int8x16_t code[2])
{
    const uint8x16_t byte = vshrq_n_u8(vcombine_u8(vcreate_u8(0x0706050403020100),
                                                   vcreate_u8(0x0f0e0d0c0b0a0908)), 2);
    const int8x16_t shift = vreinterpretq_s8_u32(vdupq_n_u32(0xfafcfe00)); // 0, -2, -4, -6
    const uint8x8_t q = vld1_u8(((const q2_0_block *)block)->q + 8 * part);
    const uint8x16_t both = vcombine_u8(q, q);
    MOE_UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8x16_t at = vaddq_u8(byte, vdupq_n_u8((uint8_t)(4 * i)));
        const uint8x16_t v = vshlq_u8(vqtbl1q_u8(both, at), shift);
        code[i] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(3)));
    }
    arm_subtract(code, 2, 1);
}

static const arm32_format q2_0_arm = {.block_bytes = sizeof(q2_0_block), .n_part = 2,
                                      .part_codes = q2_0_codes_arm,
                                      .part_scales = arm32_common_scale};
ARM_KERNELS(q2_0, arm32)
#endif

static moe_kernels q2_0_select(uint32_t cpu)
{
    moe_kernels best = {q2_0_mm_c, q2_0_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q2_0_few_avx2, q2_0_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = q2_0_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q2_0_gemm_vnni512, q2_0_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q2_0_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q2_0 = {.name = "Q2_0",
                                     .id = 42,
                                     .block_len = 64,
                                     .block_bytes = sizeof(q2_0_block),
                                     .act = MOE_ACT_Q8_32,
                                     .bits = 2.25,
                                     .dequantize = q2_0_dequantize,
                                     .quantize = q2_0_quantize,
                                     .select = q2_0_select,
                                     .fields = {1, 1, 16},
                                     .given = true};

#endif
