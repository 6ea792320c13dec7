/* quant/iq4_xs.h - IQ4_XS: 256 weights in 136 bytes, 4.25 bits per weight.
 *
 *     byte 0      2          4            8                              136
 *          | d    | scales_h | scales_l   | qs                           |
 *          | f16  | u16      | 4 bytes    | 128 bytes                    |
 *
 * 8 groups of 32 weights with 6-bit scales s[g], stored as s[g] + 32: the low 4 bits are in a
 * nibble of scales_l[g / 2], the low one if g is even; the high 2 in bits 2g and 2g + 1 of
 * scales_h. A weight is one of the 16 unevenly spaced values of iq4_value (common.h, as in IQ4_NL):
 * byte 16 g + i of qs has weight i of group g in its low and weight i + 16 in its high nibble.
 *
 *     weight = d s[g] value                each product rounded to float32
 *
 * Times activations x = x_scale q_x, with an integer that is exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of value q_x)
 *     acc = fma(x_scale d, int_sum, acc)   superblock after superblock; x_scale d is rounded */
#ifndef MOE_QUANT_IQ4_XS_H
#define MOE_QUANT_IQ4_XS_H

#include "arm_k.h"
#include "k.h"
#include "x86_512_k.h"

typedef struct iq4_xs_block {
    uint8_t d[2];        // f16
    uint8_t scales_h[2]; // u16
    uint8_t scales_l[4];
    uint8_t qs[128];
} iq4_xs_block;
_Static_assert(sizeof(iq4_xs_block) == 136, "as in the file");

/* The scale, of either sign, with which the values of the table come nearest to 32 weights: steps
 * around those that map the largest weight to an end of the table, fitted by least squares. */
static float iq4_xs_fit(const float *x)
{
    enum { N_TRY = 12 };
    float peak = 0;
    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > fabsf(peak))
            peak = x[i];
    double best = 0;
    float scale = 0;
    for (int k = 0; k < 2 * (N_TRY + 1); k++) {
        float end = (float)iq4_value[k % 2 ? 0 : 15];
        end = fmaf(end, 0.025f * (float)(k / 2 - N_TRY / 2), end);
        float inverse = k_inverse(peak / end);
        double sum_vx = 0, sum_vv = 0;
        for (int i = 0; i < 32; i++) {
            int v = iq4_value[quant_nearest(x[i] * inverse, iq4_value, 16)];
            sum_vx = fma(v, x[i], sum_vx);
            sum_vv += v * v;
        }
        double gain = sum_vx * sum_vx / sum_vv; /* no value is 0 */
        if (gain > best) {
            best = gain;
            scale = (float)(sum_vx / sum_vv);
        }
    }
    return scale;
}

/* k->scale has 8 scales; codes are places in iq4_value. */
static void iq4_xs_pack(iq4_xs_block *block, const k_linear *k)
{
    uint16_t high = 0;
    k_put_f16(block->d, k->d);
    for (int g = 0; g < 8; g += 2) {
        const int s = k->scale[g] + 32, next = k->scale[g + 1] + 32;
        block->scales_l[g / 2] = (uint8_t)((s & 15) | (next & 15) << 4);
        high = (uint16_t)(high | (s >> 4 | next >> 4 << 2) << 2 * g);
    }
    memcpy(block->scales_h, &high, 2);
    for (int g = 0; g < 8; g++)
        quant_put_nibbles(block->qs + 16 * g, k->q + 32 * g);
}

static void iq4_xs_quantize(const float *src, void *blocks, size_t n)
{
    iq4_xs_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++, src += K_LEN) {
        float scale[8], peak = 0;
        k_linear k;
        for (int g = 0; g < 8; g++) {
            scale[g] = iq4_xs_fit(src + 32 * g);
            if (fabsf(scale[g]) > fabsf(peak))
                peak = scale[g];
        }
        k.d = f32_of_f16(quant_scale(peak / -32));
        for (int g = 0; g < 8; g++) {
            k.scale[g] = (int8_t)k_round(scale[g] * k_inverse(k.d), -32, 31);
            const float inverse = k_inverse(k.d * (float)k.scale[g]);
            for (int i = 32 * g; i < 32 * g + 32; i++)
                k.q[i] = (uint8_t)quant_nearest(src[i] * inverse, iq4_value, 16);
        }
        iq4_xs_pack(block, &k);
    }
}

MOE_INLINE int iq4_xs_scale(const iq4_xs_block *block, int g)
{
    int low = block->scales_l[g / 2] >> g % 2 * 4 & 15;
    return (low | (load_u16(block->scales_h) >> 2 * g & 3) << 4) - 32;
}

MOE_INLINE int iq4_xs_value(const iq4_xs_block *block, int k)
{
    return iq4_value[block->qs[k / 32 * 16 + k % 16] >> k / 16 % 2 * 4 & 15];
}

static void iq4_xs_dequantize(const void *blocks, float *dst, size_t n)
{
    const iq4_xs_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++)
        for (int k = 0; k < K_LEN; k++) {
            float d = f32_of_f16(load_u16(block->d)) * (float)iq4_xs_scale(block, k / 32);
            *dst++ = d * (float)iq4_xs_value(block, k);
        }
}

/* -- C: the specification -- */

static float iq4_xs_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const iq4_xs_block *block = (const iq4_xs_block *)w;
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block++) {
        const int8_t *q = x.q + b * K_LEN;
        int32_t int_sum = 0;
        for (int g = 0; g < 8; g++) {
            int32_t dot = 0;
            for (int k = 32 * g; k < 32 * g + 32; k++)
                dot += iq4_xs_value(block, k) * q[k];
            int_sum += iq4_xs_scale(block, g) * dot;
        }
        acc = fmaf(x.scale[b] * f32_of_f16(load_u16(block->d)), (float)int_sum, acc);
    }
    return acc;
}

static void iq4_xs_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, iq4_xs_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

/* 8 scales as pairs of int16, from scales_l and scales_h << 4, each shifted to its group. */
MOE_AVX2_INLINE __m256i iq4_xs_join_avx2(__m256i low, __m256i high)
{
    __m256i s = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                _mm256_and_si256(high, _mm256_set1_epi32(48)));
    s = _mm256_sub_epi32(s, _mm256_set1_epi32(32));
    return _mm256_blend_epi16(s, _mm256_slli_epi32(s, 16), 0xaa);
}

/* Of one row: groups 0, 2, 4, 6 | 1, 3, 5, 7. */
MOE_AVX2_INLINE __m256i iq4_xs_scales_avx2(const iq4_xs_block *block)
{
    const __m256i shift = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
    int32_t low, high = load_u16(block->scales_h) << 4;
    memcpy(&low, block->scales_l, 4);
    return iq4_xs_join_avx2(
        _mm256_srlv_epi32(_mm256_set1_epi32(low), shift),
        _mm256_srlv_epi32(_mm256_set1_epi32(high), _mm256_srli_epi32(shift, 1)));
}

/* The values of 32 bytes: those of the low nibbles, those of the high ones. */
MOE_AVX2_INLINE void iq4_xs_values_avx2(__m256i v, __m256i *low, __m256i *high)
{
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i table = x86_k_twice(_mm_loadu_si128((const __m128i *)iq4_value));
    *low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, mask));
    *high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
}

/* |value| * (x with the value's sign): 2 * 127 * 127 = 32258 fits into 16 bits. */
MOE_AVX2_INLINE __m256i iq4_xs_madd_avx2(__m256i acc, __m256i value, __m256i x, __m256i scale)
{
    __m256i part = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(x, value));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(part, scale));
}

/* Groups 2p and 2p + 1 in the halves of a vector, k 0..15 of both, then k 16..31. */
MOE_AVX2_INLINE void iq4_xs_codes_avx2(const uint8_t *block, size_t half, __m256i code[4])
{
    const uint8_t *qs = block + offsetof(iq4_xs_block, qs) + 64 * half;
    iq4_xs_values_avx2(x86_k_load(qs), &code[0], &code[1]);
    iq4_xs_values_avx2(x86_k_load(qs + 32), &code[2], &code[3]);
}

/* `scales`: groups 0, 2, 4, 6 | 1, 3, 5, 7 of the superblock. */
MOE_AVX2_INLINE void iq4_xs_half_avx2(const __m256i code[4], __m256i scales, const x86_k_tokens *x,
                                      size_t at, size_t n_tok, __m256i *sum)
{
    const __m256i scale[2] = {_mm256_shuffle_epi32(scales, 0x00),
                              _mm256_shuffle_epi32(scales, 0x55)};
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        const uint8_t *q = (const uint8_t *)x->tok[t].q + at;
        sum[t] = iq4_xs_madd_avx2(sum[t], code[0], x86_load_pair(q, q + 32), scale[0]);
        sum[t] = iq4_xs_madd_avx2(sum[t], code[1], x86_load_pair(q + 16, q + 48), scale[0]);
        sum[t] = iq4_xs_madd_avx2(sum[t], code[2], x86_load_pair(q + 64, q + 96), scale[1]);
        sum[t] = iq4_xs_madd_avx2(sum[t], code[3], x86_load_pair(q + 80, q + 112), scale[1]);
    }
}

MOE_AVX2_INLINE void iq4_xs_dot8_avx2(const uint8_t *w, const x86_k_tokens *x, size_t b,
                                      size_t n_tok, x86_k_half_fn *half, x86_k_sums *out)
{
    const uint8_t *block[8];
    __m256i dot[X86_K_FEWEST][8];
    x86_k_blocks(w, sizeof(iq4_xs_block), block);
    for (size_t i = 0; i < 8; i++, w += sizeof(iq4_xs_block)) {
        const __m256i scales = iq4_xs_scales_avx2((const iq4_xs_block *)w);
        __m256i sum[X86_K_FEWEST], code[4];
        x86_k_fetch(w, sizeof(iq4_xs_block));
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            sum[t] = _mm256_setzero_si256();
        iq4_xs_codes_avx2(w, 0, code);
        half(code, scales, x, x->at[b + i], n_tok, sum);
        iq4_xs_codes_avx2(w, 1, code);
        half(code, _mm256_bsrli_epi128(scales, 8), x, x->at[b + i] + 128, n_tok, sum);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            dot[t][i] = sum[t];
    }
    const __m256 d = x86_f16x8(block, offsetof(iq4_xs_block, d));
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        out[t].dot = x86_sum8_i32(dot[t]);
        out[t].d = d;
    }
}

MOE_AVX2 static void iq4_xs_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                      x86_tile *tile)
{
    (void)n_block;
    for (size_t g = 0; g < 8; g++) {
        __m256i v[4], *code = tile->code + 8 * g;
        x86_load_transposed(row, offset + offsetof(iq4_xs_block, qs) + 16 * g, v);
        MOE_UNROLL
        for (int j = 0; j < 4; j++)
            iq4_xs_values_avx2(v[j], &code[j], &code[j + 4]);
    }
    __m256i v[4]; /* d and scales_h, scales_l, two vectors of qs */
    x86_load_transposed(row, offset, v);
    v[0] = _mm256_srli_epi32(v[0], 16 - 4);
    MOE_UNROLL
    for (int g = 0; g < 8; g++)
        tile->scale[g] = iq4_xs_join_avx2(_mm256_srli_epi32(v[1], 4 * g),
                                          _mm256_srli_epi32(v[0], 2 * g));
    tile->d[0] = x86_f16x8(row, offset);
}

static const x86_format iq4_xs_x86 = {K_LEN, sizeof(iq4_xs_block), 128, iq4_xs_load_avx2};

X86_K_GEMV(iq4_xs, avx2, MOE_AVX2, X86_K_NO_MIN, iq4_xs_half_avx2)

static void iq4_xs_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &iq4_xs_x86, x86_k32_i8_avx2, iq4_xs_gemv_avx2, iq4_xs_gemv2_avx2);
}

static void iq4_xs_gemm_avxvnni(const moe_mm *mm)
{
    x86_k_gemm(mm, &iq4_xs_x86, x86_k32_i8_avxvnni, iq4_xs_gemv_avx2, iq4_xs_gemv2_avx2);
}

/* -- AVX-512 VNNI -- */

/* iq4_value + 128 */
MOE_VNNI512 static void iq4_xs_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m128i table = _mm_xor_si128(_mm_loadu_si128((const __m128i *)iq4_value),
                                        _mm_set1_epi8(-128));
    for (size_t p = 0; p < 4; p++) { /* groups 2p and 2p + 1 */
        __m512i v[8], *code = tile->code + 16 * p;
        x86_512_load32(rows, offset + offsetof(iq4_xs_block, qs) + 32 * p, v);
        MOE_UNROLL
        for (int j = 0; j < 4; j++) {
            x86_512_nibbles(v[j], &code[j], &code[j + 4]);
            x86_512_nibbles(v[j + 4], &code[j + 8], &code[j + 12]);
        }
        x86_512_look_up(table, code, 16);
    }
    __m512i v[4]; /* d and scales_h, scales_l, 8 bytes of qs */
    x86_512_load16(rows, offset, v);
    tile->d[0] = x86_512_f16(v[0]);
    __m512i low = v[1], high = _mm512_srli_epi32(v[0], 16 - 4);
    for (int g = 0; g < 8; g++) {
        const __m512i scale = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(15)),
                                              _mm512_and_si512(high, _mm512_set1_epi32(48)));
        tile->scale[g] = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
        low = _mm512_srli_epi32(low, 4);
        high = _mm512_srli_epi32(high, 2);
    }
}

static const x86_512_format iq4_xs_vnni512 = {K_LEN, sizeof(iq4_xs_block), 128,
                                             iq4_xs_load_vnni512, &x86_512_k32};

/* Scales of groups 4p .. 4p + 3, each in a quarter of a vector. */
MOE_VNNI512_INLINE __m512i iq4_xs_scales_vnni512(const iq4_xs_block *block, int p)
{
    const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i low = _mm512_set1_epi32(load_u16(block->scales_l + 2 * p));
    const __m512i high = _mm512_set1_epi32(load_u16(block->scales_h) << 4 >> 8 * p);
    const __m512i scale = _mm512_or_si512(
        _mm512_and_si512(_mm512_srlv_epi32(low, _mm512_slli_epi32(group, 2)),
                         _mm512_set1_epi32(15)),
        _mm512_and_si512(_mm512_srlv_epi32(high, _mm512_slli_epi32(group, 1)),
                         _mm512_set1_epi32(48)));
    return _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
}

/* A quarter of a vector holds 16 bytes, a group: codes 2p are low nibbles, 2p + 1 high ones. */
MOE_VNNI512_INLINE x86_512_order iq4_xs_order_vnni512(const int8_t *q)
{
    x86_512_order x;
    MOE_UNROLL
    for (size_t p = 0; p < 2; p++) {
        const __m512i a = x86_512_load64(q + 128 * p), b = x86_512_load64(q + 128 * p + 64);
        x.q[2 * p] = _mm512_shuffle_i32x4(a, b, 0x88);
        x.q[2 * p + 1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
    x86_512_begin(&x, 128);
    MOE_UNROLL
    for (size_t i = 0; i < 4; i += 2)
        x.init[i] = _mm512_add_epi32(x.init[i], x.init[i + 1]);
    return x;
}

MOE_VNNI512_INLINE void iq4_xs_dot8_vnni512(const uint8_t *const row[8], size_t offset,
                                            x86_ahead next, const moe_q8 *x, size_t n_tok,
                                            x86_k_sums *out)
{
    const __m128i table = _mm_xor_si128(_mm_loadu_si128((const __m128i *)iq4_value),
                                        _mm_set1_epi8(-128));
    x86_512_order order[X86_512_FEWEST];
    __m512i dot[X86_512_FEWEST][8];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        order[t] = iq4_xs_order_vnni512(x[t].q);
    for (size_t r = 0; r < 8; r++) {
        x86_512_fetch(next, r, sizeof(iq4_xs_block));
        const iq4_xs_block *block = (const iq4_xs_block *)(row[r] + offset);
        const __m512i scale[2] = {iq4_xs_scales_vnni512(block, 0), iq4_xs_scales_vnni512(block, 1)};
        __m512i code[4];
        x86_512_nibbles(x86_512_load64(block->qs), &code[0], &code[1]);
        x86_512_nibbles(x86_512_load64(block->qs + 64), &code[2], &code[3]);
        x86_512_look_up(table, code, 4);
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++) {
            __m512i sum[2];
            MOE_UNROLL
            for (size_t p = 0; p < 2; p++) {
                sum[p] = _mm512_dpbusd_epi32(order[t].init[2 * p], code[2 * p], order[t].q[2 * p]);
                sum[p] = _mm512_dpbusd_epi32(sum[p], code[2 * p + 1], order[t].q[2 * p + 1]);
                sum[p] = _mm512_mullo_epi32(sum[p], scale[p]);
            }
            dot[t][r] = _mm512_add_epi32(sum[0], sum[1]);
        }
    }
    const __m256 d = x86_f16x8(row, offset);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        out[t].dot = x86_512_sum8(dot[t]);
        out[t].d = d;
    }
}

X86_512_KERNELS(iq4_xs, X86_K_NO_MIN)

#endif

/* -- NEON -- */
#if MOE_ARM64

MOE_INLINE void iq4_xs_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)
{
    const iq4_xs_block *w = (const iq4_xs_block *)block;
    const int16x8_t shift = {0, -2, -4, -6, -8, -10, -12, -14};
    uint32_t nibbles;
    memcpy(&nibbles, w->scales_l, 4);
    const uint8x8_t l = vcreate_u8(nibbles & 0x0f0f0f0f), u = vcreate_u8(nibbles >> 4 & 0x0f0f0f0f);
    uint8x8_t h = vmovn_u16(vshlq_u16(vdupq_n_u16(load_u16(w->scales_h)), shift));
    h = vshl_n_u8(vand_u8(h, vdup_n_u8(3)), 4);
    const int8x8_t s = vreinterpret_s8_u8(vorr_u8(vzip1_u8(l, u), h));
    *scale = *min = vcombine_s8(vsub_s8(s, vdup_n_s8(32)), vdup_n_s8(0));
}

MOE_INLINE void iq4_xs_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])
{
    const uint8_t *qs = ((const iq4_xs_block *)block)->qs + 64 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        arm_nibbles(qs + 16 * i, code + 2 * i);
    arm_look_up(code, 8, iq4_value);
}

static const arm_k_format iq4_xs_arm = {sizeof(iq4_xs_block), offsetof(iq4_xs_block, d), 32, false,
                                    iq4_xs_scales_arm, iq4_xs_codes_arm, NULL};
ARM_KERNELS(iq4_xs, arm_k)

#endif

static moe_kernels iq4_xs_select(uint32_t cpu)
{
    moe_kernels best = {iq4_xs_mm_c, iq4_xs_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){iq4_xs_gemv_avx2, iq4_xs_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best.gemm = iq4_xs_gemm_avxvnni;
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){iq4_xs_gemv_vnni512, iq4_xs_gemm_vnni512};
#endif
#if MOE_ARM64
    best = iq4_xs_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_iq4_xs = {
    .name = "IQ4_XS",
    .id = 23,
    .block_len = K_LEN,
    .block_bytes = sizeof(iq4_xs_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(iq4_xs_block) / K_LEN,
    .dequantize = iq4_xs_dequantize,
    .quantize = iq4_xs_quantize,
    .select = iq4_xs_select,
    .fields = {1, 1, 2, 4, 128},
};

#endif
