/* quant/q5_k.h - Q5_K: 256 weights in 176 bytes, 5.5 bits per weight.
 *
 *     byte 0      2      4            16          48                              176
 *          | d    | dmin | scales     | qh        | qs                            |
 *          | f16  | f16  | 12 bytes   | 32 bytes  | 128 bytes                     |
 *
 * Q4_K with a fifth bit: 8 groups of 32 weights with 6-bit scales s[g] and minima m[g], packed as
 * k.h says. Weight i of group g has its low bits in a nibble of qs[32 (g / 2) + i], the low one if
 * g is even, and its highest in bit g of qh[i].
 *
 *     weight = d s[g] q - dmin m[g]        each product and the difference rounded to float32
 *
 * (The products are exact: 11 + 6 + 5 bits fit into 24. A compiler that fuses changes nothing.)
 *
 * Times activations x = x_scale q_x, with integers that are exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of q q_x)
 *     min_sum = sum over g of m[g] (sum over i of q_x)
 *     acc = fma(x_scale, fma(-dmin, min_sum, d int_sum), acc)     superblock after superblock */
#ifndef MOE_QUANT_Q5_K_H
#define MOE_QUANT_Q5_K_H

#include "arm_k.h"
#include "k.h"
#include "x86_512_k.h"

typedef struct q5_k_block {
    uint8_t d[2], dmin[2]; // f16
    uint8_t scales[12];    // 8 scales, 8 minima
    uint8_t qh[32];
    uint8_t qs[128];
} q5_k_block;
_Static_assert(sizeof(q5_k_block) == 176, "as in the file");

static void q5_k_pack(q5_k_block *block, const k_affine *k)
{
    const uint64_t low = 0x0f0f0f0f0f0f0f0f, bit = 0x0101010101010101;
    k_put_f16(block->d, k->d);
    k_put_f16(block->dmin, k->dmin);
    k_put_scales_mins(block->scales, k->scale, k->min);
    for (int i = 0; i < 128; i += 8) {
        const uint8_t *q = k->q + i / 32 * 64 + i % 32;
        const uint64_t v = (quant_codes8(q) & low) | (quant_codes8(q + 32) & low) << 4;
        memcpy(block->qs + i, &v, 8);
    }
    for (int i = 0; i < 32; i += 8) {
        uint64_t v = 0;
        for (int g = 0; g < 8; g++)
            v |= (quant_codes8(k->q + 32 * g + i) >> 4 & bit) << g;
        memcpy(block->qh + i, &v, 8);
    }
}

static void q5_k_quantize(const float *src, void *blocks, size_t n)
{
    q5_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        k_affine k;
        k_quantize_affine(src + b * K_LEN, 8, 31, 63, &k);
        q5_k_pack(block, &k);
    }
}

MOE_INLINE int q5_k_code(const q5_k_block *block, int k)
{
    int low = block->qs[k / 64 * 32 + k % 32] >> k / 32 % 2 * 4 & 15;
    return low | (block->qh[k % 32] >> k / 32 & 1) << 4;
}

static void q5_k_dequantize(const void *blocks, float *dst, size_t n)
{
    const q5_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        for (int k = 0; k < K_LEN; k++) {
            int scale, min;
            k_get_scale_min(block->scales, k / 32, &scale, &min);
            float d = f32_of_f16(load_u16(block->d)) * (float)scale;
            float m = f32_of_f16(load_u16(block->dmin)) * (float)min;
            *dst++ = d * (float)q5_k_code(block, k) - m;
        }
    }
}

/* -- C: the specification -- */

static float q5_k_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const q5_k_block *block = (const q5_k_block *)w;
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block++) {
        const int8_t *q = x.q + b * K_LEN;
        const int16_t *sum = x.sum + b * 16;
        int32_t int_sum = 0, min_sum = 0;
        for (int g = 0; g < 8; g++) {
            int scale, min;
            k_get_scale_min(block->scales, g, &scale, &min);
            int32_t dot = 0;
            for (int k = 32 * g; k < 32 * g + 32; k++)
                dot += q5_k_code(block, k) * q[k];
            int_sum += scale * dot;
            min_sum += min * (sum[2 * g] + sum[2 * g + 1]);
        }
        float d = f32_of_f16(load_u16(block->d)), dmin = f32_of_f16(load_u16(block->dmin));
        acc = fmaf(x.scale[b], fmaf(-dmin, (float)min_sum, d * (float)int_sum), acc);
    }
    return acc;
}

static void q5_k_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q5_k_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

/* The codes of group 2p (low) and 2p + 1 (high), from 32 bytes of qs and from qh >> 2p. */
MOE_AVX2_INLINE __m256i q5_k_low_avx2(__m256i qs, __m256i qh)
{
    return _mm256_or_si256(
        _mm256_and_si256(qs, _mm256_set1_epi8(15)),
        _mm256_and_si256(_mm256_slli_epi16(qh, 4), _mm256_set1_epi8(16)));
}

MOE_AVX2_INLINE __m256i q5_k_high_avx2(__m256i qs, __m256i qh)
{
    return _mm256_or_si256(
        _mm256_and_si256(_mm256_srli_epi16(qs, 4), _mm256_set1_epi8(15)),
        _mm256_and_si256(_mm256_slli_epi16(qh, 3), _mm256_set1_epi8(16)));
}

MOE_AVX2_INLINE void q5_k_codes_avx2(const uint8_t *block, size_t half, __m256i code[4])
{
    __m256i qh = x86_k_load(block + offsetof(q5_k_block, qh));
    qh = _mm256_srli_epi16(qh, (int)(4 * half));
    MOE_UNROLL
    for (size_t p = 0; p < 2; p++) {
        const __m256i qs = x86_k_load(block + offsetof(q5_k_block, qs) + 64 * half + 32 * p);
        code[2 * p] = q5_k_low_avx2(qs, p ? _mm256_srli_epi16(qh, 2) : qh);
        code[2 * p + 1] = q5_k_high_avx2(qs, p ? _mm256_srli_epi16(qh, 2) : qh);
    }
}

MOE_AVX2_INLINE void q5_k_dot8_avx2(const uint8_t *w, const x86_k_tokens *x, size_t b, size_t n_tok,
                                    x86_k_half_fn *half, x86_k_sums *out)
{
    x86_k_dot8_32(w, sizeof(q5_k_block), q5_k_codes_avx2, x, b, n_tok, half, out);
}

MOE_AVX2 static void q5_k_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    (void)n_block;
    for (size_t half = 0; half < 2; half++) {
        __m256i qh[4];
        x86_load_transposed(row, offset + offsetof(q5_k_block, qh) + 16 * half, qh);
        for (size_t p = 0; p < 4; p++) {
            __m256i qs[4], *code = tile->code + 16 * p + 4 * half;
            x86_load_transposed(row, offset + offsetof(q5_k_block, qs) + 32 * p + 16 * half, qs);
            MOE_UNROLL
            for (int j = 0; j < 4; j++) {
                code[j] = q5_k_low_avx2(qs[j], qh[j]);
                code[j + 8] = q5_k_high_avx2(qs[j], qh[j]);
                qh[j] = _mm256_srli_epi16(qh[j], 2);
            }
        }
    }
    x86_k_load_scales(row, offset, tile);
}

static const x86_format q5_k_x86 = {K_LEN, sizeof(q5_k_block), 0, q5_k_load_avx2};

X86_K_GEMV(q5_k, avx2, MOE_AVX2, X86_K_FLOAT_MIN, x86_k_half32_avx2)
X86_K_GEMV(q5_k, avxvnni, MOE_AVX_VNNI, X86_K_FLOAT_MIN, x86_k_half32_avxvnni)

static void q5_k_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &q5_k_x86, x86_k32_u5_min_avx2, q5_k_gemv_avx2, q5_k_gemv2_avx2);
}

static void q5_k_gemm_avxvnni(const moe_mm *mm)
{
    x86_k_gemm(mm, &q5_k_x86, x86_k32_min_avxvnni, q5_k_gemv_avxvnni, q5_k_gemv2_avxvnni);
}

/* -- AVX-512 VNNI -- */

MOE_VNNI512 static void q5_k_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    const __m512i sixteen = _mm512_set1_epi8(16);
    __m512i high[8];
    x86_512_load_header(rows, offset, tile);
    x86_512_load32(rows, offset + offsetof(q5_k_block, qh), high);
    for (size_t p = 0; p < 4; p++) {
        __m512i v[8], *code = tile->code + 16 * p;
        x86_512_load32(rows, offset + offsetof(q5_k_block, qs) + 32 * p, v);
        MOE_UNROLL
        for (int j = 0; j < 8; j++) {
            x86_512_nibbles(v[j], &code[j], &code[j + 8]);
            const __m512i even = _mm512_slli_epi16(high[j], 4), odd = _mm512_slli_epi16(high[j], 3);
            code[j] = _mm512_or_si512(code[j], _mm512_and_si512(even, sixteen));
            code[j + 8] = _mm512_or_si512(code[j + 8], _mm512_and_si512(odd, sixteen));
            high[j] = _mm512_srli_epi16(high[j], 2);
        }
    }
}

static const x86_512_format q5_k_vnni512 = {K_LEN, sizeof(q5_k_block), 0,
                                             q5_k_load_vnni512, &x86_512_k32_min};

/* The codes' fifth bits, which `shift` moves to bit 4. */
MOE_VNNI512_INLINE __m512i q5_k_join_vnni512(__m512i nibble, __m512i high, __m512i shift)
{
    return _mm512_or_si512(nibble, _mm512_and_si512(_mm512_rolv_epi64(high, shift),
                                                    _mm512_set1_epi8(16)));
}

MOE_VNNI512_INLINE void q5_k_dot8_vnni512(const uint8_t *const row[8], size_t offset,
                                          x86_ahead next, const moe_q8 *x, size_t n_tok,
                                          x86_k_sums *out)
{
    const x86_k_header h = x86_k_load_header(row, offset);
    /* Bit g of qh goes left by 4 - g; to the right is left by 64 less. */
    const __m512i shift[4] = {x86_512_halves(4, 2), x86_512_halves(3, 1), x86_512_halves(0, 62),
                              x86_512_halves(63, 61)};
    x86_512_order order[X86_512_FEWEST];
    uint32_t scale[2][8];
    __m512i dot[X86_512_FEWEST][8];
    _mm256_storeu_si256((__m256i *)scale[0], h.scale[0]);
    _mm256_storeu_si256((__m256i *)scale[1], h.scale[1]);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        order[t] = x86_512_nibble_order(x[t].q);
    for (size_t r = 0; r < 8; r++) {
        x86_512_fetch(next, r, sizeof(q5_k_block));
        const uint8_t *block = row[r] + offset, *qs = block + offsetof(q5_k_block, qs);
        const __m512i qh = x86_512_twice(block + offsetof(q5_k_block, qh));
        x86_512_row w;
        MOE_UNROLL
        for (size_t p = 0; p < 2; p++) {
            x86_512_nibbles(x86_512_load64(qs + 64 * p), &w.code[2 * p], &w.code[2 * p + 1]);
            w.scale[p] = x86_512_nibble_scales(scale[p][r]);
        }
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++)
            w.code[i] = q5_k_join_vnni512(w.code[i], qh, shift[i]);
        x86_512_multiply(&w, order, n_tok, r, dot);
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        out[t] = (x86_k_sums){x86_512_sum8(dot[t]), x86_k_min_sum(&h, x[t].sum), h.d, h.dmin};
}

X86_512_KERNELS(q5_k, X86_K_FLOAT_MIN)

#endif

/* -- NEON -- */
#if MOE_ARM64

MOE_INLINE void q5_k_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)
{
    arm_k_scales6(((const q5_k_block *)block)->scales, scale, min);
}

MOE_INLINE void q5_k_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])
{
    const q5_k_block *w = (const q5_k_block *)block;
    const uint8x16_t nibble = vdupq_n_u8(15), top = vdupq_n_u8(16);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint8x16_t v = vld1q_u8(w->qs + 64 * half + 16 * i);
        const uint8x16_t u = vld1q_u8(w->qs + 64 * half + 16 * i + 32);
        /* bits 0..3: the fifth bits of the half's four groups */
        const uint8x16_t h =
            vshlq_u8(vld1q_u8(w->qh + 16 * i), vdupq_n_s8((int8_t)(-4 * (int)half)));
        const uint8x16_t c0 = vorrq_u8(vandq_u8(v, nibble), vandq_u8(vshlq_n_u8(h, 4), top));
        const uint8x16_t c1 = vorrq_u8(vshrq_n_u8(v, 4), vandq_u8(vshlq_n_u8(h, 3), top));
        const uint8x16_t c2 = vorrq_u8(vandq_u8(u, nibble), vandq_u8(vshlq_n_u8(h, 2), top));
        const uint8x16_t c3 = vorrq_u8(vshrq_n_u8(u, 4), vandq_u8(vshlq_n_u8(h, 1), top));
        code[i] = vreinterpretq_s8_u8(c0);
        code[i + 2] = vreinterpretq_s8_u8(c1);
        code[i + 4] = vreinterpretq_s8_u8(c2);
        code[i + 6] = vreinterpretq_s8_u8(c3);
    }
}

static const arm_k_format q5_k_arm = {sizeof(q5_k_block), offsetof(q5_k_block, d), 32, true,
                                    q5_k_scales_arm, q5_k_codes_arm, NULL};
ARM_KERNELS(q5_k, arm_k)

#endif

static moe_kernels q5_k_select(uint32_t cpu)
{
    moe_kernels best = {q5_k_mm_c, q5_k_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q5_k_gemv_avx2, q5_k_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best = (moe_kernels){q5_k_gemv_avxvnni, q5_k_gemm_avxvnni};
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q5_k_gemv_vnni512, q5_k_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q5_k_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static void q5_k_rotate(void *blocks, size_t n, bool back)
{
    q5_k_block *w = blocks;
    for (size_t b = 0; b < n; b++) {
        uint8_t qh[32] = {0};
        for (int g = 0; g < 8; g += 2) // two groups share the bytes of qs
            for (int i = 0; i < 32; i++) {
                const unsigned four = w[b].qs[16 * g + i], two = w[b].qh[i] >> g;
                const unsigned fifth = (two & 1) | (two & 2) << 3, out = back ? four >> 3 : four;
                qh[i] = (uint8_t)(qh[i] | ((out & 1) | (out >> 3 & 2)) << g);
                w[b].qs[16 * g + i] = (uint8_t)(back ? (four << 1 & 0xee) | fifth
                                                     : (four >> 1 & 0x77) | fifth << 3);
            }
        memcpy(w[b].qh, qh, sizeof qh);
    }
}

static const moe_quant quant_q5_k = {
    .name = "Q5_K",
    .id = 13,
    .block_len = K_LEN,
    .block_bytes = sizeof(q5_k_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(q5_k_block) / K_LEN,
    .dequantize = q5_k_dequantize,
    .quantize = q5_k_quantize,
    .select = q5_k_select,
    .fields = {1, 1, 1, 1, 4, 4, 4, 32, 128},
    .rotate = q5_k_rotate,
};

#endif
