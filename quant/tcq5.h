/* quant/tcq5.h - TCQ5: blocks of 64 trellis-coded weights with codes of 5 bits. For rates of 3.2 to
 * 4.3 bits per weight on disk.
 *
 *     byte 0   2         18        34       38       42
 *          | d | q[0]    | q[1]    | low[0] | low[1] |   half h = 0, 1: weights 32 h .. 32 h + 31
 *          f16   low nibbles: k 0..15   one bit of each      c[32 h + k] = 2 nibble k + bit k
 *                high nibbles: k 16..31
 *
 *     weight = d ((2 c | s & 1) - 32)
 *
 * The lowest bit of a code, which chooses the subset, is as good as random: on disk it costs a bit
 * whether it stands apart or not, and the others are coded by bytes, two of them at once.
 *
 * The state s and the product with activations are described in tcq.h. */
#ifndef MOE_QUANT_TCQ5_H
#define MOE_QUANT_TCQ5_H

#include "tcq.h"

typedef struct tcq5_block {
    uint8_t d[2]; // f16
    uint8_t q[2][16];
    uint8_t low[2][4];
} tcq5_block;
_Static_assert(sizeof(tcq5_block) == 42, "as in .moe files");

enum { TCQ5_BIAS = 32 };

MOE_INLINE void tcq5_codes(const uint8_t *block, size_t half, uint8_t doubled[32])
{
    const uint8_t *q = ((const tcq5_block *)block)->q[half];
    const uint8_t *low = ((const tcq5_block *)block)->low[half];
    for (size_t k = 0; k < 16; k++) {
        doubled[k] = (uint8_t)(4 * (q[k] & 15) | (low[k / 8] >> k % 8 & 1) << 1);
        doubled[k + 16] = (uint8_t)(4 * (q[k] >> 4) | (low[k / 8 + 2] >> k % 8 & 1) << 1);
    }
}

static void tcq5_put(uint8_t *block, size_t half, const uint8_t code[32])
{
    uint8_t *q = ((tcq5_block *)block)->q[half], *low = ((tcq5_block *)block)->low[half];
    memset(low, 0, 4);
    for (size_t k = 0; k < 16; k++)
        q[k] = (uint8_t)(code[k] >> 1 | code[k + 16] >> 1 << 4);
    for (size_t k = 0; k < 32; k++)
        low[k / 8] |= (uint8_t)((code[k] & 1) << k % 8);
}

TCQ_C(tcq5, TCQ5_BIAS)

#if MOE_X86
/* 2 where the bit k of a 32-bit word is set that `words` holds for each half, else 0: for bytes k
 * = 0 to 15 of each half, or 16 to 31. `at` is the place of the word in its half, plus 2 for the
 * latter. */
MOE_AVX2_INLINE __m256i tcq5_low_avx2(__m256i words, int at)
{
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i copy = _mm256_setr_epi64x(0, 0x0101010101010101, 0, 0x0101010101010101);
    __m256i v = _mm256_shuffle_epi8(words, _mm256_add_epi8(copy, _mm256_set1_epi8((char)at)));
    v = _mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit);
    return _mm256_and_si256(v, _mm256_set1_epi8(2));
}

MOE_AVX2_INLINE void tcq5_load_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                    x86_block *w)
{
    const __m256i mask = _mm256_set1_epi8(60);
    const __m256i low = x86_u32x8(row, offset + offsetof(tcq5_block, low) + 4 * half);
    const size_t q = offset + offsetof(tcq5_block, q) + 16 * half;
    MOE_UNROLL
    for (int r = 0; r < 4; r++) {
        const __m256i v = x86_load_pair(row[r] + q, row[r + 4] + q);
        w->lo[r] = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(v, 2), mask),
                                   tcq5_low_avx2(low, 4 * r));
        w->hi[r] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v, 2), mask),
                                   tcq5_low_avx2(low, 4 * r + 2));
    }
}

/* Four products, 63 * 127 * 4 = 32004, fit into 16 bits. */
MOE_AVX2_INLINE __m256i tcq5_dot_avx2(const x86_block *w, const x86_x32 *x, int r)
{
    return _mm256_madd_epi16(x86_dot_pair_u5(w->lo[r], w->hi[r], x), _mm256_set1_epi16(1));
}

/* sum((u - 32) q) = sum(u q) - 32 sum(q), u = 0..63 */
MOE_AVX2_INLINE __m256 tcq5_step_avx2(const x86_block *w, const x86_x32 *x, __m256 acc)
{
    const __m256i sum = x86_sum4_i32(tcq5_dot_avx2(w, x, 0), tcq5_dot_avx2(w, x, 1),
                                     tcq5_dot_avx2(w, x, 2), tcq5_dot_avx2(w, x, 3));
    return x86_add_scaled(w, x, _mm256_add_epi32(sum, x86_sum_times(x, -TCQ5_BIAS)), acc);
}

TCQ_AVX2(tcq5)

/* Bit i of a mask says whether the lowest bit of byte i is set: its rows are those of a vector. */
MOE_VNNI512_INLINE __m512i tcq5_low_512(__m512i v, const uint8_t *const row[8], size_t offset,
                                        int first, size_t part)
{
    const uint64_t bits = (uint64_t)load_u16(row[first] + offset + 2 * part) |
                          (uint64_t)load_u16(row[first + 4] + offset + 2 * part) << 16 |
                          (uint64_t)load_u16(row[first + 1] + offset + 2 * part) << 32 |
                          (uint64_t)load_u16(row[first + 5] + offset + 2 * part) << 48;
    return _mm512_mask_add_epi8(v, (__mmask64)bits, v, _mm512_set1_epi8(2));
}

MOE_VNNI512_INLINE void tcq5_load_512(const uint8_t *const row[8], size_t offset,
                                      size_t half, tcq_codes_512 *w)
{
    const __m512i mask = _mm512_set1_epi8(60);
    const size_t low = offset + offsetof(tcq5_block, low) + 4 * half;
    const size_t q = offset + offsetof(tcq5_block, q) + 16 * half;
    MOE_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m512i v = tcq_load_rows_512(row, q, 2 * i);
        w->lo[i] = _mm512_and_si512(_mm512_slli_epi16(v, 2), mask);
        w->hi[i] = _mm512_and_si512(_mm512_srli_epi16(v, 2), mask);
        w->lo[i] = tcq5_low_512(w->lo[i], row, low, 2 * i, 0);
        w->hi[i] = tcq5_low_512(w->hi[i], row, low, 2 * i, 1);
    }
}

TCQ_VNNI512(tcq5, TCQ5_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq5_codes_arm(const uint8_t *block, size_t half, uint8x16_t v[2])
{
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t q = vld1q_u8(block + offsetof(tcq5_block, q) + 16 * half);
    const uint8_t *low = block + offsetof(tcq5_block, low) + 4 * half;
    const uint8x16_t four[2] = {vandq_u8(q, vdupq_n_u8(15)), vshrq_n_u8(q, 4)};
    MOE_UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8x16_t copy = vcombine_u8(vdup_n_u8(low[2 * i]), vdup_n_u8(low[2 * i + 1]));
        v[i] = vorrq_u8(vshlq_n_u8(four[i], 2), vandq_u8(vtstq_u8(copy, bit), vdupq_n_u8(2)));
    }
}

TCQ_ARM(tcq5, TCQ5_BIAS)
#endif

TCQ_QUANT(tcq5, "TCQ5", QUANT_OWN_ID + 1, 1, 1, 32, 8)

#endif
