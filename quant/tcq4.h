/* quant/tcq4.h - TCQ4: blocks of 64 trellis-coded weights with codes of 4 bits. For rates up to 3.2
 * bits per weight on disk.
 *
 *     byte 0   2         18        34
 *          | d | q[0]    | q[1]    |       half h = 0, 1 has weights 32 h .. 32 h + 31:
 *          f16   low nibbles: k 0..15          c[32 h + k]      = q[h][k] & 15       k < 16
 *                high nibbles: k 16..31        c[32 h + k + 16] = q[h][k] >> 4
 *
 *     weight = d ((2 c | s & 1) - 16)
 *
 * The state s and the product with activations are described in tcq.h. */
#ifndef MOE_QUANT_TCQ4_H
#define MOE_QUANT_TCQ4_H

#include "tcq.h"

typedef struct tcq4_block {
    uint8_t d[2]; // f16
    uint8_t q[2][16];
} tcq4_block;
_Static_assert(sizeof(tcq4_block) == 34, "as in .moe files");

enum { TCQ4_BIAS = 16 };

MOE_INLINE void tcq4_codes(const uint8_t *block, size_t half, uint8_t doubled[32])
{
    const uint8_t *q = ((const tcq4_block *)block)->q[half];
    for (size_t k = 0; k < 16; k++) {
        doubled[k] = (uint8_t)(2 * (q[k] & 15));
        doubled[k + 16] = (uint8_t)(2 * (q[k] >> 4));
    }
}

static void tcq4_put(uint8_t *block, size_t half, const uint8_t code[32])
{
    uint8_t *q = ((tcq4_block *)block)->q[half];
    for (size_t k = 0; k < 16; k++)
        q[k] = (uint8_t)(code[k] | code[k + 16] << 4);
}

TCQ_C(tcq4, TCQ4_BIAS)

#if MOE_X86
MOE_AVX2_INLINE void tcq4_load_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                    x86_block *w)
{
    const __m256i mask = _mm256_set1_epi8(30);
    const size_t q = offset + offsetof(tcq4_block, q) + 16 * half;
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const __m256i v = x86_load_pair(row[r] + q, row[r + 4] + q);
        w->lo[r] = _mm256_and_si256(_mm256_slli_epi16(v, 1), mask);
        w->hi[r] = _mm256_and_si256(_mm256_srli_epi16(v, 3), mask);
    }
}

/* sum((u - 16) q) = sum(u q) - 16 sum(q), u = 0..31 */
MOE_AVX2_INLINE __m256 tcq4_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    const __m256i sum = _mm256_add_epi32(x86_dot_u5(w, x), x86_sum_times(x, -TCQ4_BIAS));
    return x86_add_scaled(w, x, sum, acc);
}

TCQ_AVX2(tcq4)

MOE_VNNI512_INLINE void tcq4_load_512(const uint8_t *const row[8], size_t offset,
                                      size_t half, tcq_codes_512 *w)
{
    const __m512i mask = _mm512_set1_epi8(30);
    const size_t q = offset + offsetof(tcq4_block, q) + 16 * half;
    MOE_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m512i v = tcq_load_rows_512(row, q, 2 * i);
        w->lo[i] = _mm512_and_si512(_mm512_slli_epi16(v, 1), mask);
        w->hi[i] = _mm512_and_si512(_mm512_srli_epi16(v, 3), mask);
    }
}

TCQ_VNNI512(tcq4, TCQ4_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq4_codes_arm(const uint8_t *block, size_t half, uint8x16_t v[2])
{
    const uint8x16_t q = vld1q_u8(block + offsetof(tcq4_block, q) + 16 * half);
    v[0] = vshlq_n_u8(vandq_u8(q, vdupq_n_u8(15)), 1);
    v[1] = vshlq_n_u8(vshrq_n_u8(q, 4), 1);
}

TCQ_ARM(tcq4, TCQ4_BIAS)
#endif

TCQ_QUANT(tcq4, "TCQ4", QUANT_OWN_ID, 1, 1, 32)

#endif
