/* quant/nvfp4.h - NVFP4: blocks of 64 weights in the E2M1 float format, with a scale for each 16.
 *
 *     byte 0   4                                36
 *          | s[4] | q[4][8]                     |   w[16 g + k]     = s[g] * value[q[g][k] & 15]
 *           UE4M3   low nibbles: k 0..7             w[16 g + 8 + k] = s[g] * value[q[g][k] >> 4]
 *                   high nibbles: k 8..15           for k < 8, with value = mxfp4_value
 *
 * UE4M3 is binary16 without its sign and its last bits: e and m of the byte 0eeeemmm stand for
 * (1 + m / 8) 2^(e - 7), or m 2^-9 if e is 0; half of that, since the table holds twice the E2M1
 * numbers. As GGUF's own reader has it, the NaN 127 is 0, and the highest bit has no meaning.
 *
 * Such scales alone reach from 2^-9 to 448: files have another one for the whole matrix, a tensor
 * of its own, with which the results are multiplied (core/model.c).
 *
 * Product with a row of activations, 32 weights, that is two groups, after another:
 *     term = fmaf(s[1], (float)sum1(value * x_q), s[0] * (float)sum0(value * x_q))
 *     acc = fmaf(x_scale, term, acc)
 * s has 4 bits and |sum| <= 16 * 12 * 127, so s[0] * (float)sum0 is exact. */
#ifndef MOE_QUANT_NVFP4_H
#define MOE_QUANT_NVFP4_H

#include "mxfp4.h"

typedef struct nvfp4_block {
    uint8_t s[4];
    uint8_t q[4][8];
} nvfp4_block;
_Static_assert(sizeof(nvfp4_block) == 36, "as in GGUF");

/* Half the number: 2^8 for the biases, 15 and 7, of the exponents. */
MOE_INLINE float nvfp4_scale(uint8_t s)
{
    return s == 127 ? 0 : f32_of_f16((uint16_t)((s & 127) << 7)) * 0x1p7f;
}

static void nvfp4_dequantize(const void *blocks, float *dst, size_t n)
{
    const nvfp4_block *w = blocks;
    for (size_t g = 0; g < n / 16; g++, dst += 16) {
        const float d = nvfp4_scale(w[g / 4].s[g % 4]);
        const uint8_t *q = w[g / 4].q[g % 4];
        for (size_t k = 0; k < 8; k++) {
            dst[k] = d * (float)mxfp4_value[q[k] & 15];
            dst[k + 8] = d * (float)mxfp4_value[q[k] >> 4];
        }
    }
}

/* The byte, of 0..126, whose number is nearest to x >= 0. */
static uint8_t nvfp4_nearest_scale(float x)
{
    uint8_t s = 0;
    while (s < 126 && x - nvfp4_scale(s) > nvfp4_scale((uint8_t)(s + 1)) - x)
        s++;
    return s;
}

/* The largest magnitude becomes 6 times the scale, or what is nearest. */
static void nvfp4_quantize(const float *src, void *blocks, size_t n)
{
    nvfp4_block *w = blocks;
    for (size_t g = 0; g < n / 16; g++, src += 16) {
        const uint8_t s = nvfp4_nearest_scale(fabsf(quant_peak(src, 16)) / 12);
        const float d = nvfp4_scale(s);
        uint8_t code[16];
        for (size_t k = 0; k < 16; k++)
            code[k] = d > 0 ? (uint8_t)(quant_nearest(fabsf(src[k]) / d, mxfp4_value, 8) |
                                        (src[k] < 0 ? 8 : 0))
                            : 0;
        w[g / 4].s[g % 4] = s;
        for (size_t k = 0; k < 8; k++)
            w[g / 4].q[g % 4][k] = (uint8_t)(code[k] | code[k + 8] << 4);
    }
}

/* The sum of products of group g. */
static float nvfp4_sum(const nvfp4_block *w, size_t g, const int8_t *q)
{
    int sum = 0;
    for (size_t k = 0; k < 8; k++) {
        sum += mxfp4_value[w->q[g][k] & 15] * q[k];
        sum += mxfp4_value[w->q[g][k] >> 4] * q[k + 8];
    }
    return (float)sum;
}

static float nvfp4_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const nvfp4_block *w = (const nvfp4_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / 32; b++) {
        const uint8_t *s = w[b / 2].s + b % 2 * 2;
        const float sum0 = nvfp4_sum(&w[b / 2], b % 2 * 2, x.q + 32 * b);
        const float sum1 = nvfp4_sum(&w[b / 2], b % 2 * 2 + 1, x.q + 32 * b + 16);
        const float term = fmaf(nvfp4_scale(s[1]), sum1, nvfp4_scale(s[0]) * sum0);
        acc = fmaf(x.scale[b], term, acc);
    }
    return acc;
}

static void nvfp4_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, nvfp4_dot_c);
}

#if MOE_X86
/* The scales in the lowest bytes of 8 lanes of 16 bits. */
MOE_AVX2_INLINE __m256 nvfp4_scales_avx2(__m128i s)
{
    s = _mm_and_si128(s, _mm_set1_epi16(255));
    s = _mm_andnot_si128(_mm_cmpeq_epi16(s, _mm_set1_epi16(127)), s);
    const __m128i f16 = _mm_and_si128(_mm_slli_epi16(s, 7), _mm_set1_epi16(0x3f80));
    return _mm256_mul_ps(_mm256_cvtph_ps(f16), _mm256_set1_ps(0x1p7f));
}

/* Of half b of the blocks at the beginning of 8 rows: d and m are the scales of its groups. */
MOE_AVX2_INLINE void nvfp4_pair_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                     __m256 *d, __m256 *m)
{
    const __m128i s = x86_u16x8(row, offset + 2 * half);
    *d = nvfp4_scales_avx2(s);
    *m = nvfp4_scales_avx2(_mm_srli_epi16(s, 8));
}

/* lo has k 0..7 | 16..23, hi k 8..15 | 24..31, as the nibbles stand: the activations are brought
 * into that order instead. */
MOE_AVX2_INLINE void nvfp4_unpack_avx2(const uint8_t *const row[8], size_t offset, x86_block *w)
{
    x86_nibbles(row, offset + offsetof(nvfp4_block, q) + 16 * w->part, w);
    x86_look_up(w, mxfp4_code);
    nvfp4_pair_avx2(row, offset, w->part, &w->d, &w->m);
}

/* dot + `factors` times the two sums of activations. */
MOE_AVX2_INLINE __m256 nvfp4_group_avx2(__m256 dot, __m256i sum, int factors)
{
    return _mm256_cvtepi32_ps(_mm256_add_epi32(
        _mm256_castps_si256(dot), _mm256_madd_epi16(sum, _mm256_set1_epi32(factors))));
}

/* sum((code - 12) * q) of each group. */
MOE_AVX2_INLINE __m256 nvfp4_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    const __m256i one = _mm256_set1_epi16(1);
    const x86_x32 pair = {.lo = _mm256_unpacklo_epi64(x->lo, x->hi),
                          .hi = _mm256_unpackhi_epi64(x->lo, x->hi)};
    __m256 v[4]; /* [r] halves: two partial sums of group 0, two of group 1 of rows r and r + 4 */
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        v[i] = _mm256_castsi256_ps(
            _mm256_madd_epi16(x86_dot_pair_u5(w->lo[i], w->hi[i], &pair), one));
    MOE_UNROLL
    for (size_t i = 0; i < 4; i += 2) /* groups 0, 1 of row i, then of row i + 1 */
        v[i] = _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(v[i], v[i + 1], 0x88)),
                             _mm256_castps_si256(_mm256_shuffle_ps(v[i], v[i + 1], 0xdd))));
    const __m256 sum0 = nvfp4_group_avx2(_mm256_shuffle_ps(v[0], v[2], 0x88), x->sum,
                                         (uint16_t)-12);
    const __m256 sum1 = nvfp4_group_avx2(_mm256_shuffle_ps(v[0], v[2], 0xdd), x->sum,
                                         -12 * 65536);
    return _mm256_fmadd_ps(x->d, _mm256_fmadd_ps(w->m, sum1, _mm256_mul_ps(w->d, sum0)), acc);
}

MOE_AVX2 static void nvfp4_few_avx2(const moe_mm *mm)
{
    x86_few32_parts(mm, sizeof(nvfp4_block), 2, nvfp4_unpack_avx2, nvfp4_step_avx2);
}

MOE_AVX2 static void nvfp4_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                     x86_tile *tile)
{
    for (size_t b = 0; b < 2 * n_block; b++) {
        const size_t at = offset + b / 2 * sizeof(nvfp4_block);
        __m256i v[8], *code = tile->code + 8 * b;
        x86_tile_nibbles(row, at + offsetof(nvfp4_block, q) + b % 2 * 16, v);
        x86_tile_look_up(mxfp4_code, v);
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++)
            code[j] = v[x86_pair_place(j)];
        nvfp4_pair_avx2(row, at, b % 2, &tile->d[b], &tile->m[b]);
    }
}

static const x86_format nvfp4_x86 = {64, sizeof(nvfp4_block), 12, nvfp4_load_avx2};

static void nvfp4_gemm_avx2(const moe_mm *mm)
{
    x86_gemm32(mm, &nvfp4_x86, x86_pair_u5_avx2, nvfp4_few_avx2, X86_FEW);
}

static void nvfp4_gemm_avxvnni(const moe_mm *mm)
{
    x86_gemm32(mm, &nvfp4_x86, x86_pair_avxvnni, nvfp4_few_avx2, X86_FEW);
}

/* The scales in byte g of 16 lanes. */
MOE_VNNI512_INLINE __m512 nvfp4_scales_vnni512(__m512i word, int g)
{
    const __m512i s = x86_512_byte(word, g);
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(s, _mm512_set1_epi32(127));
    const __m512i f16 = _mm512_and_si512(_mm512_slli_epi32(s, 7), _mm512_set1_epi32(0x3f80));
    return _mm512_maskz_mul_ps((__mmask16)~nan, x86_512_f16(f16), _mm512_set1_ps(0x1p7f));
}

/* mxfp4_value + 12 */
MOE_VNNI512 static void nvfp4_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m128i table = _mm_add_epi8(_mm_loadu_si128((const __m128i *)mxfp4_value),
                                       _mm_set1_epi8(12));
    __m512i word[4 * sizeof(nvfp4_block) / 4];
    x86_512_load_words(rows, offset, 4 * sizeof(nvfp4_block), word);
    for (size_t b = 0; b < 4; b++) {
        const __m512i *w = word + b * sizeof(nvfp4_block) / 4;
        MOE_UNROLL
        for (size_t i = 0; i < 2; i++) {
            __m512i v[8], *code = tile->code + 8 * (2 * b + i);
            x86_512_block_nibbles(w, offsetof(nvfp4_block, q) + 16 * i, v);
            x86_512_look_up(table, v, 8);
            MOE_UNROLL
            for (size_t j = 0; j < 8; j++)
                code[j] = v[x86_pair_place(j)];
            tile->d[2 * b + i] = nvfp4_scales_vnni512(w[0], 2 * (int)i);
            tile->m[2 * b + i] = nvfp4_scales_vnni512(w[0], 2 * (int)i + 1);
        }
    }
}

static const x86_512_format nvfp4_vnni512 = {64, sizeof(nvfp4_block), 12,
                                             nvfp4_load_vnni512, &x86_512_pairs};

MOE_VNNI512 static void nvfp4_gemm_vnni512(const moe_mm *mm)
{
    x86_512_gemm(mm, &nvfp4_vnni512);
}
#endif

#if MOE_ARM64
MOE_INLINE void nvfp4_codes_arm(const uint8_t *block, size_t half, int8x16_t code[2])
{
    arm_nibbles(((const nvfp4_block *)block)->q[2 * half], code);
    const int64x2_t low = vreinterpretq_s64_s8(code[0]), high = vreinterpretq_s64_s8(code[1]);
    code[0] = vreinterpretq_s8_s64(vtrn1q_s64(low, high));
    code[1] = vreinterpretq_s8_s64(vtrn2q_s64(low, high));
    arm_look_up(code, 2, mxfp4_value);
}

/* The scales in the lowest bytes of 4 lanes of 16 bits. */
MOE_INLINE float32x4_t nvfp4_scale4_arm(uint16x4_t s)
{
    s = vand_u16(s, vdup_n_u16(255));
    s = vbic_u16(s, vceq_u16(s, vdup_n_u16(127)));
    const uint16x4_t f16 = vand_u16(vshl_n_u16(s, 7), vdup_n_u16(0x3f80));
    return vmulq_n_f32(arm_f32_of_f16(f16), 0x1p7f);
}

MOE_INLINE void nvfp4_scales_arm(const uint8_t *const row[4], size_t offset, size_t half,
                                 float32x4_t d[2])
{
    const uint16x4_t s = arm_u16x4(row, offset + 2 * half);
    d[0] = nvfp4_scale4_arm(s);
    d[1] = nvfp4_scale4_arm(vshr_n_u16(s, 8));
}

static const arm32_format nvfp4_arm = {.block_bytes = sizeof(nvfp4_block), .n_part = 2,
                                       .pair = true, .part_codes = nvfp4_codes_arm,
                                       .part_scales = nvfp4_scales_arm};
ARM_KERNELS(nvfp4, arm32)
#endif

static moe_kernels nvfp4_select(uint32_t cpu)
{
    moe_kernels best = {nvfp4_mm_c, nvfp4_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){nvfp4_few_avx2, nvfp4_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = nvfp4_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best.gemm = nvfp4_gemm_vnni512;
#endif
#if MOE_ARM64
    best = nvfp4_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_nvfp4 = {.name = "NVFP4",
                                      .id = 40,
                                      .block_len = 64,
                                      .block_bytes = sizeof(nvfp4_block),
                                      .act = MOE_ACT_Q8_32,
                                      .bits = 4.5,
                                      .dequantize = nvfp4_dequantize,
                                      .quantize = nvfp4_quantize,
                                      .select = nvfp4_select,
                                      .fields = {4, 32},
                                      .given = true};

#endif
