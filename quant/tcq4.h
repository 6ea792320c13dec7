/* quant/tcq4.h - TCQ4: blocks of 64 trellis-coded weights with codes of 4 bits. For rates up to 3.2
 * bits per weight on disk.
 *
 *     byte 0   2         18        34
 *          | d | q[0]    | q[1]    |       half h = 0, 1 has weights 32 h .. 32 h + 31:
 *          f16   low nibbles: k 0..15          c[32 h + k]      = q[h][k] & 15       k < 16
 *                high nibbles: k 16..31        c[32 h + k + 16] = q[h][k] >> 4
 *
 *     weight = d (2 c + p - 16)
 *
 * The parity p and the product with activations are described in tcq.h. */
#ifndef MOE_QUANT_TCQ4_H
#define MOE_QUANT_TCQ4_H

#include "tcq.h"

typedef struct tcq4_block {
    uint8_t d[2]; // f16
    uint8_t q[2][16];
} tcq4_block;
_Static_assert(sizeof(tcq4_block) == 34, "as in .moe files");

enum { TCQ4_BIAS = 16 };

MOE_INLINE void tcq4_codes(const uint8_t *block, size_t half, uint8_t code[32])
{
    const uint8_t *q = ((const tcq4_block *)block)->q[half];
    for (size_t k = 0; k < 16; k++) {
        code[k] = q[k] & 15;
        code[k + 16] = q[k] >> 4;
    }
}

static void tcq4_put(uint8_t *block, size_t half, const uint8_t v[32])
{
    uint8_t *q = ((tcq4_block *)block)->q[half];
    for (size_t k = 0; k < 16; k++)
        q[k] = (uint8_t)(v[k] >> 1 | v[k + 16] >> 1 << 4);
}

TCQ_C(tcq4, TCQ4_BIAS)

#if MOE_X86
/* Values from bytes of codes v: both have their parities in the place of their lowest bits, 0 and
 * 4. */
MOE_AVX2_INLINE void tcq4_values_avx2(__m256i v, __m256i p, __m256i *lo, __m256i *hi)
{
    const __m256i mask = _mm256_set1_epi8(30), one = _mm256_set1_epi8(1);
    *lo = _mm256_or_si256(_mm256_and_si256(_mm256_add_epi8(v, v), mask), _mm256_and_si256(p, one));
    *hi = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 3), mask),
                          _mm256_and_si256(_mm256_srli_epi16(p, 4), one));
}

/* Two sums of products u q, u = 0..31, fit into 16 bits as x86_dot_u5 says. */
MOE_AVX2_INLINE __m256i tcq4_dot_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                      tcq_parity_avx2 *const parity[3], const x86_x32 *x)
{
    const size_t q = offset + offsetof(tcq4_block, q) + 16 * half;
    __m256i sum[4];
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const __m256i v = x86_load_pair(row[r] + q, row[r + 4] + q);
        __m256i lo, hi;
        tcq4_values_avx2(v, parity[0]->p[4 * half + r], &lo, &hi);
        sum[r] = x86_dot_pair_u5(lo, hi, x);
        parity[2]->p[4 * half + r] = tcq_parity_next_avx2(parity, half, 4, r, v);
    }
    return x86_sum4_i16(sum[0], sum[1], sum[2], sum[3]);
}

MOE_AVX2_INLINE void tcq4_unpack_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                      tcq_parity_avx2 *const parity[3], __m256i code[8])
{
    __m256i v[4];
    x86_load_transposed(row, offset + offsetof(tcq4_block, q) + 16 * half, v);
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        tcq4_values_avx2(v[i], parity[0]->p[4 * half + i], &code[i], &code[i + 4]);
        parity[2]->p[4 * half + i] = tcq_parity_next_avx2(parity, half, 4, i, v[i]);
    }
}

TCQ_GEMV_AVX2(tcq4, TCQ4_BIAS)
TCQ_GEMM_AVX2(tcq4, TCQ4_BIAS, x86_block_u5_avx2, x86_block_u8_avxvnni)

/* Here parities are masked as they are made. Values from bytes of codes v. */
MOE_VNNI512_INLINE void tcq4_values_512(__m512i v, __m512i p, __m512i *lo, __m512i *hi)
{
    *lo = tcq_select_512(30, _mm512_add_epi8(v, v), p);
    *hi = tcq_select_512(30, _mm512_srli_epi16(v, 3), _mm512_srli_epi16(p, 4));
}

MOE_VNNI512_INLINE void tcq4_load_512(const uint8_t *const row[16], size_t offset, size_t half,
                                      tcq_parity_512 *const parity[3], tcq_values_512 *w)
{
    const size_t q = offset + offsetof(tcq4_block, q) + 16 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        const __m512i v = tcq_load_rows_512(row, q, i);
        const __m512i low = _mm512_and_si512(v, _mm512_set1_epi8(17));
        tcq4_values_512(v, parity[0]->p[4 * half + i], &w->lo[i], &w->hi[i]);
        parity[2]->p[4 * half + i] = tcq_parity_next_512(parity, half, 4, i, low);
    }
}

MOE_VNNI512_INLINE void tcq4_unpack_512(const __m512i *word, size_t at,
                                        tcq_parity_512 *const parity[3], __m512i code[16])
{
    MOE_UNROLL
    for (size_t i = 0; i < 8; i++) {
        const size_t half = i / 4;
        const __m512i v = x86_512_word(word, at + 4 * i);
        const __m512i low = _mm512_and_si512(v, _mm512_set1_epi8(17));
        tcq4_values_512(v, parity[0]->p[i], &code[8 * half + i % 4], &code[8 * half + i % 4 + 4]);
        parity[2]->p[i] = tcq_parity_next_512(parity, half, 4, i % 4, low);
    }
}

TCQ_GEMV_VNNI512(tcq4, TCQ4_BIAS)
TCQ_GEMM_VNNI512(tcq4, TCQ4_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq4_values_arm(const uint8_t *block, size_t half,
                                uint8x16_t (*const parity[3])[2], uint8x16_t v[2])
{
    const uint8x16_t q = vld1q_u8(block + offsetof(tcq4_block, q) + 16 * half);
    const uint8x16_t p = parity[0][half][0]; /* in bits 0 and 4 */
    v[0] = vandq_u8(vsliq_n_u8(p, q, 1), vdupq_n_u8(31));
    v[1] = vsliq_n_u8(vshrq_n_u8(p, 4), vshrq_n_u8(q, 4), 1);
    parity[2][half][0] = tcq_parity_next_arm(parity, half, 0, q);
}

TCQ_ARM(tcq4, TCQ4_BIAS)
#endif

TCQ_QUANT(tcq4, "TCQ4", QUANT_TCQ_ID, NULL, NULL, 1, 1, 32)

#endif
