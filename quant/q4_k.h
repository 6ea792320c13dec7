/* quant/q4_k.h - Q4_K: 256 weights in 144 bytes, 4.5 bits per weight.
 *
 *     byte 0      2      4            16                              144
 *          | d    | dmin | scales     | qs                            |
 *          | f16  | f16  | 12 bytes   | 128 bytes                     |
 *
 * 8 groups of 32 weights. Group g has a 6-bit scale s[g] and a 6-bit minimum m[g], packed as k.h
 * says. qs holds groups in pairs: byte 32 p + i has weight i of group 2p in its low and of group
 * 2p + 1 in its high nibble.
 *
 *     weight = d s[g] q - dmin m[g]        each product and the difference rounded to float32
 *
 * (The products are exact: 11 + 6 + 4 bits fit into 24. A compiler that fuses changes nothing.)
 *
 * Times activations x = x_scale q_x, with integers that are exact,
 *
 *     int_sum = sum over g of s[g] (sum over i of q q_x)
 *     min_sum = sum over g of m[g] (sum over i of q_x)
 *     acc = fma(x_scale, fma(-dmin, min_sum, d int_sum), acc)     superblock after superblock */
#ifndef MOE_QUANT_Q4_K_H
#define MOE_QUANT_Q4_K_H

#include "arm_k.h"
#include "k.h"
#include "x86_512_k.h"

typedef struct q4_k_block {
    uint8_t d[2], dmin[2]; // f16
    uint8_t scales[12];    // 8 scales, 8 minima
    uint8_t qs[128];
} q4_k_block;
_Static_assert(sizeof(q4_k_block) == 144, "as in the file");

static void q4_k_pack(q4_k_block *block, const k_affine *k)
{
    k_put_f16(block->d, k->d);
    k_put_f16(block->dmin, k->dmin);
    k_put_scales_mins(block->scales, k->scale, k->min);
    for (int i = 0; i < 128; i += 8) {
        const uint8_t *q = k->q + i / 32 * 64 + i % 32;
        const uint64_t v = quant_codes8(q) | quant_codes8(q + 32) << 4;
        memcpy(block->qs + i, &v, 8);
    }
}

static void q4_k_quantize(const float *src, void *blocks, size_t n)
{
    q4_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        k_affine k;
        k_quantize_affine(src + b * K_LEN, 8, 15, 63, &k);
        q4_k_pack(block, &k);
    }
}

MOE_INLINE int q4_k_code(const q4_k_block *block, int k)
{
    return block->qs[k / 64 * 32 + k % 32] >> k / 32 % 2 * 4 & 15;
}

static void q4_k_dequantize(const void *blocks, float *dst, size_t n)
{
    const q4_k_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++) {
        for (int k = 0; k < K_LEN; k++) {
            int scale, min;
            k_get_scale_min(block->scales, k / 32, &scale, &min);
            float d = f32_of_f16(load_u16(block->d)) * (float)scale;
            float m = f32_of_f16(load_u16(block->dmin)) * (float)min;
            *dst++ = d * (float)q4_k_code(block, k) - m;
        }
    }
}

/* -- C: the specification -- */

static float q4_k_dot_c(const uint8_t *w, const uint8_t *x_row, size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    const q4_k_block *block = (const q4_k_block *)w;
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
                dot += q4_k_code(block, k) * q[k];
            int_sum += scale * dot;
            min_sum += min * (sum[2 * g] + sum[2 * g + 1]);
        }
        float d = f32_of_f16(load_u16(block->d)), dmin = f32_of_f16(load_u16(block->dmin));
        acc = fmaf(x.scale[b], fmaf(-dmin, (float)min_sum, d * (float)int_sum), acc);
    }
    return acc;
}

static void q4_k_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, q4_k_dot_c);
}

/* -- AVX2 -- */
#if MOE_X86

MOE_AVX2_INLINE void q4_k_codes_avx2(const uint8_t *block, size_t half, __m256i code[4])
{
    const __m256i mask = _mm256_set1_epi8(15);
    MOE_UNROLL
    for (size_t p = 0; p < 2; p++) {
        __m256i v = x86_k_load(block + offsetof(q4_k_block, qs) + 64 * half + 32 * p);
        x86_pin(&v);
        code[2 * p] = _mm256_and_si256(v, mask);
        code[2 * p + 1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
    }
}

MOE_AVX2_INLINE void q4_k_dot8_avx2(const uint8_t *w, const x86_k_tokens *x, size_t b, size_t n_tok,
                                    x86_k_half_fn *half, x86_k_sums *out)
{
    x86_k_dot8_32(w, sizeof(q4_k_block), q4_k_codes_avx2, x, b, n_tok, half, out);
}

MOE_AVX2 static void q4_k_load_avx2(const uint8_t *const row[8], size_t offset, size_t n_block,
                                    x86_tile *tile)
{
    (void)n_block;
    const __m256i mask = _mm256_set1_epi8(15);
    for (size_t i = 0; i < 8; i++) {
        __m256i v[4], *code = tile->code + 16 * (i / 2) + 4 * (i % 2);
        x86_load_transposed(row, offset + offsetof(q4_k_block, qs) + 16 * i, v);
        MOE_UNROLL
        for (int j = 0; j < 4; j++) {
            code[j] = _mm256_and_si256(v[j], mask);
            code[j + 8] = _mm256_and_si256(_mm256_srli_epi16(v[j], 4), mask);
        }
    }
    x86_k_load_scales(row, offset, tile);
}

static const x86_format q4_k_x86 = {K_LEN, sizeof(q4_k_block), 0, q4_k_load_avx2};

X86_K_GEMV(q4_k, avx2, MOE_AVX2, X86_K_FLOAT_MIN, x86_k_half32_avx2)
X86_K_GEMV(q4_k, avxvnni, MOE_AVX_VNNI, X86_K_FLOAT_MIN, x86_k_half32_avxvnni)

static void q4_k_gemm_avx2(const moe_mm *mm)
{
    x86_k_gemm(mm, &q4_k_x86, x86_k32_u4_min_avx2, q4_k_gemv_avx2, q4_k_gemv2_avx2);
}

static void q4_k_gemm_avxvnni(const moe_mm *mm)
{
    x86_k_gemm(mm, &q4_k_x86, x86_k32_min_avxvnni, q4_k_gemv_avxvnni, q4_k_gemv2_avxvnni);
}

/* -- AVX-512 VNNI -- */

MOE_VNNI512 static void q4_k_load_vnni512(x86_512_rows *rows, size_t offset, x86_512_tile *tile)
{
    x86_512_load_header(rows, offset, tile);
    for (size_t p = 0; p < 4; p++) {
        __m512i v[8], *code = tile->code + 16 * p;
        x86_512_load32(rows, offset + offsetof(q4_k_block, qs) + 32 * p, v);
        MOE_UNROLL
        for (int j = 0; j < 8; j++)
            x86_512_nibbles(v[j], &code[j], &code[j + 8]);
    }
}

static const x86_512_format q4_k_vnni512 = {K_LEN, sizeof(q4_k_block), 0,
                                             q4_k_load_vnni512, &x86_512_k32_min};

MOE_VNNI512_INLINE void q4_k_dot8_vnni512(const uint8_t *const row[8], size_t offset,
                                          x86_ahead next, const moe_q8 *x, size_t n_tok,
                                          x86_k_sums *out)
{
    const x86_k_header h = x86_k_load_header(row, offset);
    x86_512_order order[X86_512_FEWEST];
    uint32_t scale[2][8];
    __m512i dot[X86_512_FEWEST][8];
    _mm256_storeu_si256((__m256i *)scale[0], h.scale[0]);
    _mm256_storeu_si256((__m256i *)scale[1], h.scale[1]);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        order[t] = x86_512_nibble_order(x[t].q);
    for (size_t r = 0; r < 8; r++) {
        x86_512_fetch(next, r, sizeof(q4_k_block));
        const uint8_t *qs = row[r] + offset + offsetof(q4_k_block, qs);
        x86_512_row w;
        MOE_UNROLL
        for (size_t p = 0; p < 2; p++) {
            x86_512_nibbles(x86_512_load64(qs + 64 * p), &w.code[2 * p], &w.code[2 * p + 1]);
            w.scale[p] = x86_512_nibble_scales(scale[p][r]);
        }
        x86_512_multiply(&w, order, n_tok, r, dot);
    }
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        out[t] = (x86_k_sums){x86_512_sum8(dot[t]), x86_k_min_sum(&h, x[t].sum), h.d, h.dmin};
}

X86_512_KERNELS(q4_k, X86_K_FLOAT_MIN)

#endif

/* -- NEON -- */
#if MOE_ARM64

MOE_INLINE void q4_k_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)
{
    arm_k_scales6(((const q4_k_block *)block)->scales, scale, min);
}

MOE_INLINE void q4_k_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])
{
    const uint8_t *qs = ((const q4_k_block *)block)->qs + 64 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        const uint8x16_t v = vld1q_u8(qs + 16 * i);
        const size_t at = i / 2 * 4 + i % 2;
        code[at] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
        code[at + 2] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
    }
}

static const arm_k_format q4_k_arm = {sizeof(q4_k_block), offsetof(q4_k_block, d), 32, true,
                                    q4_k_scales_arm, q4_k_codes_arm, NULL};
ARM_KERNELS(q4_k, arm_k)

#endif

static moe_kernels q4_k_select(uint32_t cpu)
{
    moe_kernels best = {q4_k_mm_c, q4_k_mm_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        best = (moe_kernels){q4_k_gemv_avx2, q4_k_gemm_avx2};
    if (cpu & MOE_CPU_AVX_VNNI)
        best = (moe_kernels){q4_k_gemv_avxvnni, q4_k_gemm_avxvnni};
    if (cpu & MOE_CPU_AVX512_VNNI)
        best = (moe_kernels){q4_k_gemv_vnni512, q4_k_gemm_vnni512};
#endif
#if MOE_ARM64
    best = q4_k_select_arm(cpu, best);
#endif
    (void)cpu;
    return best;
}

static const moe_quant quant_q4_k = {
    .name = "Q4_K",
    .id = 12,
    .block_len = K_LEN,
    .block_bytes = sizeof(q4_k_block),
    .act = MOE_ACT_Q8_256,
    .bits = 8.0 * sizeof(q4_k_block) / K_LEN,
    .dequantize = q4_k_dequantize,
    .quantize = q4_k_quantize,
    .select = q4_k_select,
    .fields = {1, 1, 1, 1, 4, 4, 4, 128},
};

#endif
