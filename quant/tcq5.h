/* quant/tcq5.h - TCQ5: blocks of 64 trellis-coded weights with codes of 5 bits. For rates of 3.2 to
 * 4.3 bits per weight on disk.
 *
 *     byte 0   2         18        34         42
 *          | d | q[0]    | q[1]    | low      |      half h = 0, 1: weights 32 h .. 32 h + 31
 *          f16   low nibbles: k 0..15        c[32 h + k] = 2 nibble + bit
 *                high nibbles: k 16..31          bit = low[k & 7] >> (2 (k >> 3) + h) & 1
 *
 *     weight = d (2 c + p - 32)
 *
 * The lowest bit of a code, which moves the paths, is as good as random: on disk it costs a bit
 * whether it stands apart or not, and the others are coded by bytes, two of them at once. Apart,
 * the bits of a whole row of a block are 8 bytes, and so are its parities: both of a weight are
 * brought side by side, and unpacked as one number of two bits.
 *
 * The parity p and the product with activations are described in tcq.h. */
#ifndef MOE_QUANT_TCQ5_H
#define MOE_QUANT_TCQ5_H

#include "tcq.h"

typedef struct tcq5_block {
    uint8_t d[2]; // f16
    uint8_t q[2][16];
    uint8_t low[8];
} tcq5_block;
_Static_assert(sizeof(tcq5_block) == 42, "as in .moe files");

enum { TCQ5_BIAS = 32 };

MOE_INLINE void tcq5_codes(const uint8_t *block, size_t half, uint8_t code[32])
{
    const uint8_t *q = ((const tcq5_block *)block)->q[half];
    const uint8_t *low = ((const tcq5_block *)block)->low;
    for (size_t k = 0; k < 32; k++) {
        const int nibble = k < 16 ? q[k] & 15 : q[k - 16] >> 4;
        code[k] = (uint8_t)(2 * nibble + (low[k % 8] >> (2 * (k / 8) + half) & 1));
    }
}

static void tcq5_put(uint8_t *block, size_t half, const uint8_t v[32])
{
    uint8_t *q = ((tcq5_block *)block)->q[half], *low = ((tcq5_block *)block)->low;
    for (size_t k = 0; k < 16; k++)
        q[k] = (uint8_t)(v[k] >> 2 | v[k + 16] >> 2 << 4);
    for (size_t k = 0; k < 32; k++) {
        const size_t at = 2 * (k / 8) + half;
        low[k % 8] = (uint8_t)((low[k % 8] & ~(1u << at)) | (v[k] >> 1 & 1u) << at);
    }
}

TCQ_C(tcq5, TCQ5_BIAS)

#if MOE_X86
/* The lowest bits of 8 rows: rows 0, 1 | 4, 5 and 2, 3 | 6, 7. */
MOE_AVX2_INLINE __m256i tcq5_low_avx2(const uint8_t *const row[8], size_t offset, size_t first)
{
    __m128i at[4];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        at[i] = _mm_loadl_epi64((const void *)(row[first + i / 2 * 4 + i % 2] + offset));
    return _mm256_set_m128i(_mm_unpacklo_epi64(at[2], at[3]), _mm_unpacklo_epi64(at[0], at[1]));
}

/* Bits of step 0 are the even, those of step 1 the odd ones. Parities of the next block: those five
 * and six steps before are of two blocks ago, but five before its step 1 is step 0 of the last. */
MOE_AVX2_INLINE __m256i tcq5_next_avx2(__m256i low, __m256i last, __m256i old)
{
    const __m256i even = _mm256_set1_epi8(0x55), odd = _mm256_set1_epi8((char)0xaa);
    const __m256i a = _mm256_and_si256(_mm256_srli_epi16(old, 1), even);
    const __m256i b = _mm256_and_si256(_mm256_add_epi8(last, last), odd);
    return _mm256_xor_si256(_mm256_xor_si256(low, old), _mm256_or_si256(a, b));
}

/* 2 bit + parity of a step: fields of two bits. */
MOE_AVX2_INLINE __m256i tcq5_fields_avx2(__m256i low, __m256i p, size_t half)
{
    const __m256i even = _mm256_set1_epi8(0x55), odd = _mm256_set1_epi8((char)0xaa);
    return _mm256_or_si256(
        _mm256_and_si256(half ? low : _mm256_add_epi8(low, low), odd),
        _mm256_and_si256(half ? _mm256_srli_epi16(p, 1) : p, even));
}

/* Four products u q, 63 * 127 * 4 = 32004, fit into 16 bits. */
MOE_AVX2_INLINE __m256i tcq5_dot_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                      tcq_parity_avx2 *const parity[3], const x86_x32 *x)
{
    const __m256i mask = _mm256_set1_epi8(60), three = _mm256_set1_epi8(3);
    const __m256i first = _mm256_setr_epi64x(0, 2, 0, 2), second = _mm256_setr_epi64x(4, 6, 4, 6);
    const size_t q = offset + offsetof(tcq5_block, q) + 16 * half;
    __m256i sum[4];
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const __m256i low = tcq5_low_avx2(row, offset + offsetof(tcq5_block, low), 2 * i);
        const __m256i fields = tcq5_fields_avx2(low, parity[0]->p[i], half);
        if (half == 1)
            parity[2]->p[i] = tcq5_next_avx2(low, parity[1]->p[i], parity[2]->p[i]);
        MOE_UNROLL
        for (size_t r = 2 * i; r < 2 * i + 2; r++) {
            const __m256i v = x86_load_pair(row[r] + q, row[r + 4] + q);
            const __m256i f = r % 2 ? _mm256_unpackhi_epi64(fields, fields)
                                    : _mm256_unpacklo_epi64(fields, fields);
            const __m256i f0 = _mm256_and_si256(_mm256_srlv_epi64(f, first), three);
            const __m256i f1 = _mm256_and_si256(_mm256_srlv_epi64(f, second), three);
            const __m256i lo = _mm256_and_si256(_mm256_slli_epi16(v, 2), mask);
            const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(v, 2), mask);
            sum[r] = _mm256_madd_epi16(x86_dot_pair_u5(_mm256_or_si256(lo, f0),
                                                       _mm256_or_si256(hi, f1), x),
                                       _mm256_set1_epi16(1));
        }
    }
    return x86_sum4_i32(sum[0], sum[1], sum[2], sum[3]);
}

MOE_AVX2_INLINE void tcq5_unpack_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                      tcq_parity_avx2 *const parity[3], __m256i code[8])
{
    const __m256i mask = _mm256_set1_epi8(60), three = _mm256_set1_epi8(3);
    __m256i v[4];
    x86_load_transposed(row, offset + offsetof(tcq5_block, q) + 16 * half, v);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) { /* bytes 4 i .. 4 i + 3 of the lowest bits */
        const __m256i low = x86_u32x8(row, offset + offsetof(tcq5_block, low) + 4 * i);
        const __m256i fields = tcq5_fields_avx2(low, parity[0]->p[i], half);
        MOE_UNROLL
        for (size_t k = i; k < 8; k += 2) { /* weights 4 k .. 4 k + 3 */
            const __m256i four = k < 4 ? _mm256_slli_epi16(v[k], 2)
                                       : _mm256_srli_epi16(v[k - 4], 2);
            const __m256i two = _mm256_srli_epi16(fields, (int)(k / 2 * 2));
            code[k] = _mm256_or_si256(_mm256_and_si256(four, mask), _mm256_and_si256(two, three));
        }
        if (half == 1)
            parity[2]->p[i] = tcq5_next_avx2(low, parity[1]->p[i], parity[2]->p[i]);
    }
}

TCQ_GEMV_AVX2(tcq5, TCQ5_BIAS)
TCQ_GEMM_AVX2(tcq5, TCQ5_BIAS, x86_block_u6_avx2, x86_block_u8_avxvnni)

/* The same with 64 bytes: quarters of rows 0, 4, 8 and 12 from `first` on, and those after them. */
MOE_VNNI512_INLINE __m512i tcq5_low_512(const uint8_t *const row[16], size_t offset, size_t first)
{
    const uint8_t *const low[8] = {row[first], row[first + 1], row[0], row[0],
                                   row[first + 4], row[first + 5]};
    const uint8_t *const high[8] = {row[first + 8], row[first + 9], row[0], row[0],
                                    row[first + 12], row[first + 13]};
    return _mm512_inserti64x4(_mm512_castsi256_si512(tcq5_low_avx2(low, offset, 0)),
                              tcq5_low_avx2(high, offset, 0), 1);
}

MOE_VNNI512_INLINE __m512i tcq5_next_512(__m512i low, __m512i last, __m512i old)
{
    const __m512i shifted = tcq_select_512(0x55, _mm512_srli_epi16(old, 1),
                                           _mm512_add_epi8(last, last));
    return _mm512_ternarylogic_epi32(low, old, shifted, 0x96);
}

MOE_VNNI512_INLINE __m512i tcq5_fields_512(__m512i low, __m512i p, size_t half)
{
    return tcq_select_512(0x55, half ? _mm512_srli_epi16(p, 1) : p,
                          half ? low : _mm512_add_epi8(low, low));
}

MOE_VNNI512_INLINE void tcq5_load_512(const uint8_t *const row[16], size_t offset, size_t half,
                                      tcq_parity_512 *const parity[3], tcq_values_512 *w)
{
    const __m512i three = _mm512_set1_epi8(3);
    const __m512i first = _mm512_set4_epi64(2, 0, 2, 0), second = _mm512_set4_epi64(6, 4, 6, 4);
    const size_t q = offset + offsetof(tcq5_block, q) + 16 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const __m512i low = tcq5_low_512(row, offset + offsetof(tcq5_block, low), 2 * i);
        const __m512i fields = tcq5_fields_512(low, parity[0]->p[i], half);
        MOE_UNROLL
        for (size_t r = 2 * i; r < 2 * i + 2; r++) {
            const __m512i v = tcq_load_rows_512(row, q, r);
            const __m512i f = r % 2 ? _mm512_unpackhi_epi64(fields, fields)
                                    : _mm512_unpacklo_epi64(fields, fields);
            w->lo[r] = tcq_select_512(60, _mm512_slli_epi16(v, 2),
                                      _mm512_and_si512(_mm512_srlv_epi64(f, first), three));
            w->hi[r] = tcq_select_512(60, _mm512_srli_epi16(v, 2),
                                      _mm512_and_si512(_mm512_srlv_epi64(f, second), three));
        }
        if (half == 1)
            parity[2]->p[i] = tcq5_next_512(low, parity[1]->p[i], parity[2]->p[i]);
    }
}

MOE_VNNI512_INLINE void tcq5_unpack_512(const __m512i *word, size_t at,
                                        tcq_parity_512 *const parity[3], __m512i code[16])
{
    const __m512i low[2] = {x86_512_word(word, at + 32), x86_512_word(word, at + 36)};
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++) {
        const size_t half = i / 8, k = i % 8; /* weights 4 k .. 4 k + 3 of the step */
        const __m512i v = x86_512_word(word, at + 16 * half + 4 * (k % 4));
        const __m512i fields = tcq5_fields_512(low[k % 2], parity[0]->p[k % 2], half);
        code[i] = tcq_select_512(60, k < 4 ? _mm512_slli_epi16(v, 2) : _mm512_srli_epi16(v, 2),
                                 _mm512_and_si512(_mm512_srli_epi16(fields, (unsigned)(k / 2 * 2)),
                                                  _mm512_set1_epi8(3)));
    }
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++)
        parity[2]->p[i] = tcq5_next_512(low[i], parity[1]->p[i], parity[2]->p[i]);
}

TCQ_GEMV_VNNI512(tcq5, TCQ5_BIAS)
TCQ_GEMM_VNNI512(tcq5, TCQ5_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq5_values_arm(const uint8_t *block, size_t half,
                                uint8x16_t (*const parity[3])[2], uint8x16_t v[2])
{
    const uint8x8_t even = vdup_n_u8(0x55);
    const int8x16_t shift[2] = {vcombine_s8(vdup_n_s8(0), vdup_n_s8(-2)),
                                vcombine_s8(vdup_n_s8(-4), vdup_n_s8(-6))};
    const uint8x16_t q = vld1q_u8(block + offsetof(tcq5_block, q) + 16 * half);
    const uint8x8_t low = vld1_u8(block + offsetof(tcq5_block, low));
    const uint8x8_t p = vget_low_u8(parity[0][0][0]);
    const uint8x8_t f = vbsl_u8(even, half ? vshr_n_u8(p, 1) : p, half ? low : vshl_n_u8(low, 1));
    const uint8x16_t fields = vcombine_u8(f, f), four[2] = {vandq_u8(q, vdupq_n_u8(15)),
                                                            vshrq_n_u8(q, 4)};
    MOE_UNROLL
    for (int i = 0; i < 2; i++)
        v[i] = vsliq_n_u8(vandq_u8(vshlq_u8(fields, shift[i]), vdupq_n_u8(3)), four[i], 2);
    if (half == 1) { /* as tcq5_next_avx2 */
        const uint8x8_t last = vget_low_u8(parity[1][0][0]), old = vget_low_u8(parity[2][0][0]);
        const uint8x8_t next = veor_u8(veor_u8(low, old),
                                       vbsl_u8(even, vshr_n_u8(old, 1), vshl_n_u8(last, 1)));
        parity[2][0][0] = vcombine_u8(next, next);
    }
}

TCQ_ARM(tcq5, TCQ5_BIAS)
#endif

TCQ_QUANT(tcq5, "TCQ5", QUANT_TCQ_ID + 1, NULL, NULL, 1, 1, 32, 8)

#endif
