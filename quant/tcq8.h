/* quant/tcq8.h - TCQ8: blocks of 64 trellis-coded weights with codes of 7 bits in bytes. For rates
 * of 4.3 to 6 bits per weight on disk.
 *
 *     byte 0   2                                                              66
 *          | d | q[64]                                                         |
 *          f16   one code each, 0..127                    c[k]   = q[k] & 127
 *                                                         weight = d ((2 c | s & 1) - 128)
 *
 * The state s and the product with activations are described in tcq.h. */
#ifndef MOE_QUANT_TCQ8_H
#define MOE_QUANT_TCQ8_H

#include "tcq.h"

typedef struct tcq8_block {
    uint8_t d[2]; // f16
    uint8_t q[2][32];
} tcq8_block;
_Static_assert(sizeof(tcq8_block) == 66, "as in .moe files");

enum { TCQ8_BIAS = 128 };

MOE_INLINE void tcq8_codes(const uint8_t *block, size_t half, uint8_t doubled[32])
{
    const uint8_t *q = ((const tcq8_block *)block)->q[half];
    for (size_t k = 0; k < 32; k++)
        doubled[k] = (uint8_t)(q[k] << 1);
}

static void tcq8_put(uint8_t *block, size_t half, const uint8_t code[32])
{
    memcpy(((tcq8_block *)block)->q[half], code, 32);
}

TCQ_C(tcq8, TCQ8_BIAS)

#if MOE_X86
MOE_AVX2_INLINE void tcq8_load_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                    x86_block *w)
{
    const size_t q = offset + offsetof(tcq8_block, q) + 32 * half;
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++) {
        const __m256i lo = x86_load_pair(row[r] + q, row[r + 4] + q);
        const __m256i hi = x86_load_pair(row[r] + q + 16, row[r + 4] + q + 16);
        w->lo[r] = _mm256_add_epi8(lo, lo);
        w->hi[r] = _mm256_add_epi8(hi, hi);
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

MOE_VNNI512_INLINE void tcq8_load_512(const uint8_t *const row[8], size_t offset,
                                      size_t half, tcq_codes_512 *w)
{
    const size_t q = offset + offsetof(tcq8_block, q) + 32 * half;
    MOE_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m512i lo = tcq_load_rows_512(row, q, 2 * i);
        const __m512i hi = tcq_load_rows_512(row, q + 16, 2 * i);
        w->lo[i] = _mm512_add_epi8(lo, lo);
        w->hi[i] = _mm512_add_epi8(hi, hi);
    }
}

TCQ_VNNI512(tcq8, TCQ8_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq8_codes_arm(const uint8_t *block, size_t half, uint8x16_t v[2])
{
    const uint8_t *q = block + offsetof(tcq8_block, q) + 32 * half;
    v[0] = vshlq_n_u8(vld1q_u8(q), 1);
    v[1] = vshlq_n_u8(vld1q_u8(q + 16), 1);
}

TCQ_ARM(tcq8, TCQ8_BIAS)
#endif

TCQ_QUANT(tcq8, "TCQ8", QUANT_OWN_ID + 2, 1, 1, 64)

#endif
