/* quant/tcq8.h - TCQ8: blocks of 64 trellis-coded weights with codes of 7 bits in bytes. For rates
 * of 4.3 to 6 bits per weight on disk.
 *
 *     byte 0   2                                                              66
 *          | d | q[64]                                                         |
 *          f16   one code each, 0..127                    c[k]   = q[k] & 127
 *                                                         weight = d (2 c + p - 128)
 *
 * The parity p and the product with activations are described in tcq.h. */
#ifndef MOE_QUANT_TCQ8_H
#define MOE_QUANT_TCQ8_H

#include "tcq.h"

typedef struct tcq8_block {
    uint8_t d[2]; // f16
    uint8_t q[2][32];
} tcq8_block;
_Static_assert(sizeof(tcq8_block) == 66, "as in .moe files");

enum { TCQ8_BIAS = 128 };

MOE_INLINE void tcq8_codes(const uint8_t *block, size_t half, uint8_t code[32])
{
    const uint8_t *q = ((const tcq8_block *)block)->q[half];
    for (size_t k = 0; k < 32; k++)
        code[k] = q[k] & 127;
}

static void tcq8_put(uint8_t *block, size_t half, const uint8_t code[32])
{
    memcpy(((tcq8_block *)block)->q[half], code, 32);
}

TCQ_C(tcq8, TCQ8_BIAS)

#if MOE_X86
/* 2 c + p of bytes of codes, with the parities in their lowest bits. */
MOE_AVX2_INLINE __m256i tcq8_value_avx2(__m256i code, __m256i p)
{
    return _mm256_or_si256(_mm256_add_epi8(code, code), _mm256_and_si256(p, _mm256_set1_epi8(1)));
}

MOE_AVX2_INLINE void tcq8_load_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                    tcq_parity_avx2 *const parity[3], x86_block *w)
{
    const size_t q = offset + offsetof(tcq8_block, q) + 32 * half;
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const __m256i lo = x86_load_pair(row[r] + q, row[r + 4] + q);
        const __m256i hi = x86_load_pair(row[r] + q + 16, row[r + 4] + q + 16);
        w->lo[r] = tcq8_value_avx2(lo, parity[0]->p[8 * half + r]);
        w->hi[r] = tcq8_value_avx2(hi, parity[0]->p[8 * half + r + 4]);
        parity[2]->p[8 * half + r] = tcq_parity_next_avx2(parity, half, 8, r, lo);
        parity[2]->p[8 * half + r + 4] = tcq_parity_next_avx2(parity, half, 8, r + 4, hi);
    }
}

/* u - 128 as a signed byte. */
MOE_AVX2_INLINE __m256 tcq8_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    const __m256i bias = _mm256_set1_epi8((char)TCQ8_BIAS);
    x86_block v = *w;
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        v.lo[r] = _mm256_xor_si256(w->lo[r], bias);
        v.hi[r] = _mm256_xor_si256(w->hi[r], bias);
    }
    return x86_add_scaled(&v, x, x86_dot_i8(&v, x), acc);
}

TCQ_AVX2(tcq8)

MOE_VNNI512_INLINE __m512i tcq8_value_512(__m512i code, __m512i p)
{
    return tcq_select_512(1, p, _mm512_add_epi8(code, code));
}

/* A step of 8 rows: sums of products. With 8 rows (0 and 4, 1 and 5, ... in a vector) the parities
 * of three blocks fit into the registers; with 16, of twice as many codes as TCQ4 has in a vector,
 * they do not. */
MOE_VNNI512_INLINE __m256i tcq8_dot_512(const uint8_t *const row[8], size_t q, size_t half,
                                        tcq_parity_512 *const parity[3], const int8_t *x_q)
{
    const __m512i x = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)x_q));
    __m512i v[4];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        const __m512i code = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(row[i] + q))),
            _mm256_loadu_si256((const __m256i *)(row[i + 4] + q)), 1);
        v[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(),
                                   tcq8_value_512(code, parity[0]->p[4 * half + i]), x);
        parity[2]->p[4 * half + i] = tcq_parity_next_512(parity, half, 4, i, code);
    }
    __m512i sum[2]; /* quarters: rows 0, 4, 1, 5 and 2, 6, 3, 7 */
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++)
        sum[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x88),
                                  _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return x86_sum4_i32(
        _mm512_castsi512_si256(sum[0]), _mm512_extracti64x4_epi64(sum[0], 1),
        _mm512_castsi512_si256(sum[1]), _mm512_extracti64x4_epi64(sum[1], 1));
}

MOE_VNNI512 static void tcq8_gemv_vnni512(const moe_mm *mm)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / TCQ_LEN, block_bytes = sizeof(tcq8_block);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        tcq_parity_512 p[TCQ_TURNS];
        memset(p, 0, sizeof p);
        __m256 acc = _mm256_setzero_ps();
        const uintptr_t next = (uintptr_t)mm->w + (r + 8) * mm->w_stride;
        for (size_t b0 = 0; b0 < n_block; b0 += TCQ_TURNS) {
            MOE_UNROLL
            for (size_t i = 0; i < TCQ_TURNS; i++) {
                const size_t b = b0 + i, q = b * block_bytes + offsetof(tcq8_block, q);
                if (b == n_block)
                    break;
                tcq_parity_512 *const turn[3] = {&p[(3 - i) % 3], &p[(4 - i) % 3], &p[(5 - i) % 3]};
                x86_prefetch(next + b * 8 * block_bytes, 8 * block_bytes);
                const __m256 d = x86_f16x8(row, b * block_bytes);
                MOE_UNROLL
                for (size_t half = 0; half < 2; half++) {
                    const x86_x32 xb = x86_load_x32(&x, 2 * b + half);
                    const __m256i dot = tcq8_dot_512(row, q + 32 * half, half, turn,
                                                     x.q + 64 * b + 32 * half);
                    const __m256i sum = _mm256_add_epi32(dot, x86_sum_times(&xb, -TCQ8_BIAS));
                    acc = _mm256_fmadd_ps(_mm256_mul_ps(d, xb.d), _mm256_cvtepi32_ps(sum), acc);
                }
            }
        }
        x86_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

MOE_VNNI512_INLINE void tcq8_unpack_512(const __m512i *word, size_t at,
                                        tcq_parity_512 *const parity[3], __m512i code[16])
{
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++) {
        const __m512i v = x86_512_word(word, at + 4 * i);
        code[i] = tcq8_value_512(v, parity[0]->p[i]);
        parity[2]->p[i] = tcq_parity_next_512(parity, i / 8, 8, i % 8, v);
    }
}

TCQ_GEMM_VNNI512(tcq8, TCQ8_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq8_values_arm(const uint8_t *block, size_t half,
                                uint8x16_t (*const parity[3])[2], uint8x16_t v[2])
{
    const uint8_t *q = block + offsetof(tcq8_block, q) + 32 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint8x16_t code = vld1q_u8(q + 16 * i);
        v[i] = vsliq_n_u8(parity[0][half][i], code, 1);
        parity[2][half][i] = tcq_parity_next_arm(parity, half, i, code);
    }
}

TCQ_ARM(tcq8, TCQ8_BIAS)
#endif

TCQ_QUANT(tcq8, "TCQ8", QUANT_OWN_ID + 2, 1, 1, 64)

#endif
