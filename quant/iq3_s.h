/* quant/iq3_s.h - IQ3_S: 256 weights in 110 bytes, 3.4375 bits per weight.
 *
 *     byte 0      2                66         74          106        110
 *          | d    | qs             | qh       | signs     | scales   |
 *          | f16  | 64 bytes       | 8 bytes  | 32 bytes  | 4 bytes  |
 *
 * Of weights 4i .. 4i + 3, qs[i] and, above, bit i mod 8 of qh[i / 8] are the place in grid_iq3_s
 * (magnitudes 1, 3, ... 15). signs[i] has a bit for each negative one of weights 8i .. 8i + 7. 8
 * groups of 32 weights have scales s: nibbles, the low one first.
 *
 *     weight = d (2 s + 1) (+- magnitude)             exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ3_S_H
#define MOE_QUANT_IQ3_S_H

#include "grid.h"

typedef struct iq3_s_block {
    uint8_t d[2]; // f16
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
} iq3_s_block;
_Static_assert(sizeof(iq3_s_block) == 110, "as in the file");

static const grid_list iq3_s_list = {grid_iq3_s, 512, 4, 32, 15, 1, 15, false, 0};

static void iq3_s_pack(uint8_t *to, const grid_parts *parts)
{
    iq3_s_block *block = (iq3_s_block *)to;
    memcpy(block->d, &parts->d, 2);
    memcpy(block->signs, parts->sign, 32);
    memset(block->qh, 0, sizeof block->qh);
    for (int i = 0; i < 64; i++) {
        block->qs[i] = (uint8_t)parts->index[i];
        block->qh[i / 8] = (uint8_t)(block->qh[i / 8] | parts->index[i] >> 8 << i % 8);
    }
    grid_put_nibbles(block->scales, parts->scale, 8);
}

static void iq3_s_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq3_s_list, sizeof(iq3_s_block), iq3_s_pack);
}

static void iq3_s_codes(const uint8_t *from, size_t half, uint8_t code[128],
                        uint64_t sign[2])
{
    const iq3_s_block *block = (const iq3_s_block *)from;
    const uint8_t *qs = block->qs + 32 * half, *qh = block->qh + 4 * half;
    memcpy(sign, block->signs + 16 * half, 16);
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++, code += 4)
            memcpy(code, &grid_iq3_s[*qs++ | (qh[i] >> j & 1u) << 8], 4);
}

static void iq3_s_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales8(grid_u32(((const iq3_s_block *)block)->scales), scale);
}

static float iq3_s_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block));
}

#if MOE_X86
static const x86_grid_shape iq3_s_shape = X86_GRID_SIGNED(15, 4);

MOE_AVX2_INLINE __m256 iq3_s_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return x86_f16x8(row, at + offsetof(iq3_s_block, d));
}

MOE_AVX2_INLINE void iq3_s_index_avx2(const uint8_t *block, uint16_t index[X86_GRID_INDICES])
{
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const __m256i bit8 = _mm256_set1_epi16(256), low = _mm256_set1_epi16(255);
        const __m256i qs = x86_k_load(block + offsetof(iq3_s_block, qs) + 32 * half);
        const __m256i bits = x86_grid_bits_avx2(block + offsetof(iq3_s_block, qh) + 4 * half);
        const __m256i even = _mm256_mullo_epi16(bits, _mm256_set1_epi64x(0x0004001000400100));
        const __m256i odd = _mm256_mullo_epi16(bits, _mm256_set1_epi64x(0x0002000800200080));
        x86_grid_put_index_avx2(index + 32 * half, _mm256_or_si256(_mm256_and_si256(even, bit8),
                                                                   _mm256_and_si256(qs, low)));
        x86_grid_put_index_avx2(index + 32 * half + 16,
                                _mm256_or_si256(_mm256_and_si256(odd, bit8),
                                                _mm256_srli_epi16(qs, 8)));
    }
}

MOE_AVX2_INLINE void iq3_s_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                     x86_grid_half *w)
{
    const __m128i values = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i shift = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12),
                                           _mm256_set1_epi32(16 * (int)half));
    const __m256i v =
        _mm256_srlv_epi32(x86_grid_load4(block + offsetof(iq3_s_block, scales)), shift);
    x86_grid_codes4_avx2(x86_grid_find_avx2(x86_grid_top_iq3_s, index + 32 * half),
                         x86_grid_find_avx2(x86_grid_top_iq3_s, index + 32 * half + 16), values,
                         w->code);
    w->signs = _mm256_cvtepu8_epi16(
        x86_grid_load16(block + offsetof(iq3_s_block, signs) + 16 * half));
    w->scale = x86_grid_odd_avx2(_mm256_add_epi32(v, v), 30);
}

MOE_VNNI512_INLINE void iq3_s_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                             x86_grid_row_512 *w)
{
    (void)index;
    const __m128i values = _mm_setr_epi8(16, 18, 20, 22, 24, 26, 28, 30, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i rotate = _mm512_setr_epi32(31, 31, 3, 3, 7, 7, 11, 11, 15, 15, 19, 19, 23, 23, 27,
                                             27);
    const __m512i qs = x86_512_load64(block + offsetof(iq3_s_block, qs));
    const __m512i qh = x86_grid_bits_512(block + offsetof(iq3_s_block, qh));
    const __mmask32 even = _mm512_test_epi16_mask(qh, _mm512_set1_epi64(0x0040001000040001));
    const __mmask32 odd = _mm512_test_epi16_mask(qh, _mm512_set1_epi64(0x0080002000080002));
    const __m512i scales =
        _mm512_set1_epi32((int)grid_u32(block + offsetof(iq3_s_block, scales)));
    x86_grid_codes4_512(x86_512_pick512(x86_grid_iq3_s, qs, even),
                        x86_512_pick512(x86_grid_iq3_s, _mm512_srli_epi16(qs, 8), odd), values,
                        w->code);
    x86_grid_sign_512(x86_grid_all_signs_512(block + offsetof(iq3_s_block, signs)), 15, w->code);
    w->scale = x86_grid_odd_512(_mm512_rorv_epi32(scales, rotate), 15);
}

X86_GRID_FEW(iq3_s, x86_grid_order, iq3_s_index)
#endif

GRID_KERNELS(iq3_s, true, 32, 15, u6)
GRID_QUANT(iq3_s, "IQ3_S", 21, 1, 1, 64, 8, 32, 4)

#endif
