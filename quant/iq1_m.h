/* quant/iq1_m.h - IQ1_M: 256 weights in 56 bytes, 1.75 bits per weight.
 *
 *     byte 0            32           48         56
 *          | qs         | qh         | scales   |
 *          | 32 bytes   | 16 bytes   | u16[4]   |
 *
 * Of weights 8i .. 8i + 7, qs[i] and, above, the low 3 bits of a nibble of qh[i / 2], the low one
 * if i is even, are the place in grid_iq1 (-1, 0, 1); the nibble's fourth bit says that they are
 * shifted by -1/8, instead of 1/8. 16 groups of 16 weights have scales s: bits 3 (g mod 4) .. of
 * scales[g / 4]. What is left of the four scales, bits 12..15, is the f16 d, the lowest bits first.
 *
 *     weight = d / 8 (2 s + 1) (8 point +- 1)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ1_M_H
#define MOE_QUANT_IQ1_M_H

#include "grid.h"

typedef struct iq1_m_block {
    uint8_t qs[32];
    uint8_t qh[16];
    uint8_t scales[8]; // u16[4]
} iq1_m_block;
_Static_assert(sizeof(iq1_m_block) == 56, "as in the file");

static const grid_list iq1_m_list = {grid_iq1, 2048, 8, 16, 7, 0.125f, 12, false, 8};

static void iq1_m_pack(uint8_t *to, const grid_parts *parts)
{
    iq1_m_block *block = (iq1_m_block *)to;
    for (int i = 0; i < 32; i++) {
        const int high = parts->index[i] >> 8 | (parts->sign[i] & 8);
        block->qs[i] = (uint8_t)parts->index[i];
        block->qh[i / 2] = (uint8_t)(i % 2 ? block->qh[i / 2] | high << 4 : high);
    }
    for (int g = 0; g < 16; g += 4) {
        uint32_t v = (uint32_t)(parts->d >> g & 15) << 12;
        for (int j = 0; j < 4; j++)
            v |= (uint32_t)parts->scale[g + j] << 3 * j;
        memcpy(block->scales + g / 2, &v, 2);
    }
}

static void iq1_m_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq1_m_list, sizeof(iq1_m_block), iq1_m_pack);
}

static void iq1_m_codes(const uint8_t *from, size_t half, uint8_t code[128],
                        uint64_t sign[2])
{
    const iq1_m_block *block = (const iq1_m_block *)from;
    const uint8_t *qs = block->qs + 16 * half, *qh = block->qh + 8 * half;
    (void)sign;
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++, code += 8) {
        const uint32_t high = qh[i / 2] >> i % 2 * 4;
        grid_put_iq1(code, grid_iq1[qs[i] | (high & 7) << 8], high >> 3 & 1);
    }
}

static void iq1_m_scales(const uint8_t *block, int8_t scale[16])
{
    const uint8_t *scales = ((const iq1_m_block *)block)->scales;
    MOE_UNROLL
    for (size_t g = 0; g < 16; g++)
        scale[g] = (int8_t)(2 * (load_u16(scales + g / 4 * 2) >> g % 4 * 3 & 7) + 1);
}

static float iq1_m_d(const uint8_t *block)
{
    const uint8_t *s = ((const iq1_m_block *)block)->scales;
    const int d = s[1] >> 4 | (s[3] & 0xf0) | (s[5] & 0xf0) << 4 | (s[7] & 0xf0) << 8;
    return f32_of_f16((uint16_t)d) * 0.125f;
}

#if MOE_X86
static const x86_grid_shape iq1_m_shape = X86_GRID_SHIFTED;

MOE_AVX2_INLINE __m256 iq1_m_d8_avx2(const uint8_t *const row[8], size_t at)
{
    uint16_t d[8];
    for (size_t r = 0; r < 8; r++) {
        uint64_t v;
        memcpy(&v, row[r] + at + offsetof(iq1_m_block, scales), 8);
        v = v >> 12 & 0x000f000f000f000f;
        d[r] = (uint16_t)(v | v >> 12 | v >> 24 | v >> 36);
    }
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d)),
                         _mm256_set1_ps(0.125f));
}

/* The nibbles of half of qh, lowest in words. */
MOE_AVX2_INLINE __m256i iq1_m_high_avx2(const uint8_t *block, size_t half)
{
    const __m256i two = _mm256_cvtepu8_epi32(
        x86_grid_load8(block + offsetof(iq1_m_block, qh) + 8 * half));
    return _mm256_or_si256(two, _mm256_slli_epi32(two, 12));
}

MOE_AVX2_INLINE void iq1_m_index_avx2(const uint8_t *block, uint16_t index[X86_GRID_INDICES])
{
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const __m256i high = _mm256_slli_epi16(iq1_m_high_avx2(block, half), 8);
        const __m256i low = _mm256_cvtepu8_epi16(
            x86_grid_load16(block + offsetof(iq1_m_block, qs) + 16 * half));
        x86_grid_put_index_avx2(
            index + 16 * half,
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi16(0x700))));
    }
}

MOE_AVX2_INLINE void iq1_m_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                     x86_grid_half *w)
{
    const __m256i bit3 = _mm256_and_si256(iq1_m_high_avx2(block, half), _mm256_set1_epi16(8));
    const __m256i points = x86_grid_find_avx2(x86_grid_top_iq1, index + 16 * half);
    const __m256i v = _mm256_srlv_epi32(
        x86_grid_load4(block + offsetof(iq1_m_block, scales) + 4 * half),
        _mm256_setr_epi32(0, 3, 6, 9, 16, 19, 22, 25));
    x86_grid_codes2_avx2(points, 0, 8, 16, w->code);
    w->shift = _mm256_sub_epi16(_mm256_set1_epi16(-7), _mm256_srli_epi16(bit3, 2));
    w->scale = x86_grid_odd_avx2(_mm256_add_epi32(v, v), 14);
}

MOE_VNNI512_INLINE void iq1_m_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                             x86_grid_row_512 *w)
{
    const __m512i four = _mm512_set_epi64(
        0x0706070607060706, 0x0706070607060706, 0x0504050405040504, 0x0504050405040504,
        0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    const __m512i two = _mm512_cvtepu8_epi32(
        _mm_loadu_si128((const __m128i *)(block + offsetof(iq1_m_block, qh))));
    const __m512i qh = _mm512_or_si512(two, _mm512_slli_epi32(two, 12));
    int64_t scales;
    memcpy(&scales, block + offsetof(iq1_m_block, scales), 8);
    x86_grid_iq1_512(index, _mm512_test_epi16_mask(qh, _mm512_set1_epi16(8)), w);
    w->scale = x86_grid_odd_512(
        _mm512_rorv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(scales), four),
                          _mm512_broadcast_i32x4(_mm_setr_epi32(31, 2, 5, 8))), 7);
}

X86_GRID_FEW(iq1_m, x86_grid_order, iq1_m_index)
#endif

GRID_KERNELS(iq1_m, false, 16, 9, u6)
GRID_QUANT(iq1_m, "IQ1_M", 29, 32, 16, 8)

#endif
