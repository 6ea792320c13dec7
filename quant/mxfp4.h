/* quant/mxfp4.h - MXFP4: blocks of 32 weights in the E2M1 float format, with one power of two.
 * OCP Microscaling Formats (MX) v1.0.
 *
 *     byte 0   1                                17
 *          | e | q[16]                          |   w[k]      = 2^(e - 128) * value[q[k] & 15]
 *          E8M0  low nibbles: k 0..15               w[k + 16] = 2^(e - 128) * value[q[k] >> 4]
 *                high nibbles: k 16..31             for k < 16, with value = mxfp4_value
 *
 * The table holds twice the E2M1 numbers, which makes them integers; hence 128 where the standard
 * has a bias of 127. The standard's NaN, e = 255, is read as a power of two like any other, as
 * GGUF's own reader does.
 *
 * Product with a row of activations, block after block:
 *     acc = fmaf(2^(e - 128) * x_scale, (float)sum(value * x_q), acc) */
#ifndef MOE_QUANT_MXFP4_H
#define MOE_QUANT_MXFP4_H

#include "arm.h"
#include "common.h"
#include "quant.h"
#include "x86_512.h"
#include "x86_tile.h"

typedef struct mxfp4_block {
    uint8_t e;
    uint8_t q[16];
} mxfp4_block;
_Static_assert(sizeof(mxfp4_block) == 17, "as in GGUF");

static const int8_t mxfp4_value[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 2^(e - 128), whose two smallest numbers are subnormal. */
MOE_INLINE float mxfp4_scale(uint8_t e)
{
    return f32_of_bits(e < 2 ? 0x00200000u << e : (e - 1u) << 23);
}

static void mxfp4_dequantize(const void *blocks, float *dst, size_t n)
{
    const mxfp4_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++) {
        const float d = mxfp4_scale(w[b].e);
        for (size_t k = 0; k < 16; k++) {
            dst[32 * b + k] = d * (float)mxfp4_value[w[b].q[k] & 15];
            dst[32 * b + k + 16] = d * (float)mxfp4_value[w[b].q[k] >> 4];
        }
    }
}

/* Codes are places in mxfp4_value. */
static void mxfp4_pack(mxfp4_block *w, uint8_t e, const uint8_t code[32])
{
    w->e = e;
    quant_put_nibbles(w->q, code);
}

/* As the standard says: the exponent of the largest magnitude becomes that of the largest number,
 * 6. What lies above 6 becomes 6. */
static void mxfp4_quantize(const float *src, void *blocks, size_t n)
{
    mxfp4_block *w = blocks;
    for (size_t b = 0; b < n / 32; b++, src += 32) {
        int exponent; /* amax in [2^(exponent - 1), 2^exponent) */
        uint8_t code[32];
        const float amax = fabsf(quant_peak(src, 32));
        frexpf(amax, &exponent);
        const int biased = amax > 0 ? exponent - 1 - 2 + 127 : 0;
        const uint8_t e = (uint8_t)MOE_MIN(MOE_MAX(biased, 0), 254);
        for (size_t k = 0; k < 32; k++)
            code[k] = (uint8_t)(quant_nearest(fabsf(src[k]) / mxfp4_scale(e), mxfp4_value, 8) |
                                (src[k] < 0 ? 8 : 0));
        mxfp4_pack(&w[b], e, code);
    }
}

static float mxfp4_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const mxfp4_block *w = (const mxfp4_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        int sum = 0;
        for (size_t k = 0; k < 16; k++) {
            sum += mxfp4_value[w[b].q[k] & 15] * x.q[32 * b + k];
            sum += mxfp4_value[w[b].q[k] >> 4] * x.q[32 * b + k + 16];
        }
        acc = fmaf(mxfp4_scale(w[b].e) * x.scale[b], (float)sum, acc);
    }
    return acc;
}

static void mxfp4_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, mxfp4_dot_c);
}

#if MOE_X86
/* mxfp4_scale() of the bytes at `offset` of 8 rows. */
MOE_AVX2_INLINE __m256 mxfp4_scales_avx2(const uint8_t *const row[8], size_t offset)
{
    const __m256i e = _mm256_setr_epi32(row[0][offset], row[1][offset], row[2][offset],
                                        row[3][offset], row[4][offset], row[5][offset],
                                        row[6][offset], row[7][offset]);
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    return _mm256_castsi256_ps(
        _mm256_blendv_epi8(normal, subnormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}

/* The values are raised by 12, which makes them unsigned codes 0..24. */
static const int8_t mxfp4_code[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

MOE_AVX2_INLINE void mxfp4_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    x86_nibbles(row, offset + offsetof(mxfp4_block, q), w);
    x86_look_up(w, mxfp4_code);
    w->d = mxfp4_scales_avx2(row, offset);
}

/* sum((code - 12) * q) = sum(code * q) - 12 * sum(q) */
MOE_AVX2_INLINE __m256 mxfp4_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    return x86_add_scaled(w, x, _mm256_add_epi32(x86_dot_u5(w, x), x86_sum_times(x, -12)), acc);
}

MOE_AVX2 static void mxfp4_few_avx2(const moe_mm *mm)
{
    x86_few32(mm, sizeof(mxfp4_block), mxfp4_unpack_avx2, mxfp4_step_avx2);
}

MOE_AVX2 static void mxfp4_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                     x86_tile *tile)
{
    for (size_t b = 0; b < n_block; b++) {
        const size_t at = offset + b * sizeof(mxfp4_block);
        __m256i *code = tile->code + 8 * b;
        x86_tile_nibbles(row, at + offsetof(mxfp4_block, q), code);
        x86_tile_look_up(mxfp4_code, code);
        tile->d[b] = mxfp4_scales_avx2(row, at);
    }
}

static const x86_format mxfp4_x86 = {32, sizeof(mxfp4_block), 12, mxfp4_load_avx2};

static void mxfp4_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &mxfp4_x86, x86_block_u5_avx2, mxfp4_few_avx2, X86_FEW);
}

static void mxfp4_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &mxfp4_x86, x86_block_u8_avxvnni, mxfp4_few_avx2, X86_FEW);
}

/* mxfp4_scale() of the lowest byte of each lane. */
MOE_VNNI512_INLINE __m512 mxfp4_scales_vnni512(__m512i v)
{
    const __m512i e = _mm512_and_si512(v, _mm512_set1_epi32(255));
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    return _mm512_castsi512_ps(
        _mm512_mask_sllv_epi32(normal, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2)),
                               _mm512_set1_epi32(0x00200000), e));
}

/* mxfp4_value + 12 */
MOE_VNNI512 static void mxfp4_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m128i table = _mm_add_epi8(_mm_loadu_si128((const __m128i *)mxfp4_value),
                                       _mm_set1_epi8(12));
    __m512i word[8 * sizeof(mxfp4_block) / 4];
    x86_512_load_words(rows, offset, 8 * sizeof(mxfp4_block), word);
    for (size_t b = 0; b < 8; b += 4) {
        const __m512i *w = word + b * sizeof(mxfp4_block) / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++) {
            const size_t at = i * sizeof(mxfp4_block);
            __m512i *code = tile->code + 8 * (b + i);
            x86_512_block_nibbles(w, at + offsetof(mxfp4_block, q), code);
            x86_512_look_up(table, code, 8);
            tile->d[b + i] = mxfp4_scales_vnni512(x86_512_byte(w[at / 4], (int)(at % 4)));
        }
    }
}

static const x86_512_format mxfp4_vnni512 = {32, sizeof(mxfp4_block), 12,
                                             mxfp4_load_vnni512, &x86_512_block};

MOE_VNNI512 static void mxfp4_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &mxfp4_vnni512);
}
#endif

#if MOE_ARM64
/* mxfp4_scale() of the bytes at `offset` of 4 rows. */
MOE_INLINE float32x4_t mxfp4_scales_arm(const uint8_t *const row[4], size_t offset)
{
    uint32x4_t e = vdupq_n_u32(row[0][offset]);
    e = vsetq_lane_u32(row[1][offset], e, 1);
    e = vsetq_lane_u32(row[2][offset], e, 2);
    e = vsetq_lane_u32(row[3][offset], e, 3);
    const uint32x4_t normal = vshlq_n_u32(vsubq_u32(e, vdupq_n_u32(1)), 23);
    const uint32x4_t subnormal = vshlq_u32(vdupq_n_u32(0x00200000), vreinterpretq_s32_u32(e));
    return vreinterpretq_f32_u32(vbslq_u32(vcltq_u32(e, vdupq_n_u32(2)), subnormal, normal));
}

MOE_INLINE void mxfp4_codes_arm(const uint8_t *block, int8x16_t code[2])
{
    arm_nibbles(block + offsetof(mxfp4_block, q), code);
    arm_look_up(code, 2, mxfp4_value);
}

static const arm32_format mxfp4_arm = {.block_bytes = sizeof(mxfp4_block),
                                       .codes = mxfp4_codes_arm, .scales = mxfp4_scales_arm};
ARM_KERNELS(mxfp4, arm32)
#endif

static moe_kernels mxfp4_select(uint32_t cpu)
{
    moe_kernels best = {mxfp4_mm_c, mxfp4_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){mxfp4_few_avx2, mxfp4_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = mxfp4_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best.gemm = mxfp4_gemm_vnni512;
#endif
#if MOE_ARM64
    best = mxfp4_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_mxfp4 = {"MXFP4", 39, 32, sizeof(mxfp4_block), MOE_ACT_Q8_32, 4.25,
                                      mxfp4_dequantize, mxfp4_quantize, mxfp4_select,
                                      .fields = {1, 16}};

#endif
