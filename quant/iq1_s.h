/* quant/iq1_s.h - IQ1_S: 256 weights in 50 bytes, 1.5625 bits per weight.
 *
 *     byte 0      2            34           50
 *          | d    | qs         | qh         |
 *          | f16  | 32 bytes   | u16[8]     |
 *
 * 8 groups g of 32 weights. Of weights 8j .. 8j + 7 of a group, qs[4 g + j] and, above, bits 3j ..
 * 3j + 2 of qh[g] are the place in grid_iq1 (-1, 0, 1). Bits 12..14 of qh[g] are the scale s; bit
 * 15 says that all weights are shifted by -1/8, instead of 1/8.
 *
 *     weight = d / 8 (2 s + 1) (8 point +- 1)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ1_S_H
#define MOE_QUANT_IQ1_S_H

#include "grid.h"

typedef struct iq1_s_block {
    uint8_t d[2]; // f16
    uint8_t qs[32];
    uint8_t qh[16]; // u16[8]
} iq1_s_block;
_Static_assert(sizeof(iq1_s_block) == 50, "as in the file");

static const grid_list iq1_s_list = {grid_iq1, 2048, 8, 32, 7, 0.125f, 12, false, 32};

static void iq1_s_pack(uint8_t *to, const grid_parts *parts)
{
    iq1_s_block *block = (iq1_s_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int g = 0; g < 8; g++) {
        uint32_t high = (uint32_t)parts->scale[g] << 12 | (parts->sign[4 * g] & 128u) << 8;
        for (int j = 0; j < 4; j++) {
            block->qs[4 * g + j] = (uint8_t)parts->index[4 * g + j];
            high |= (uint32_t)parts->index[4 * g + j] >> 8 << 3 * j;
        }
        memcpy(block->qh + 2 * g, &high, 2);
    }
}

static void iq1_s_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq1_s_list, sizeof(iq1_s_block), iq1_s_pack);
}

static void iq1_s_codes(const uint8_t *from, size_t half, uint8_t code[128],
                        uint64_t sign[2])
{
    const iq1_s_block *block = (const iq1_s_block *)from;
    const uint8_t *qs = block->qs + 16 * half, *qh = block->qh + 8 * half;
    (void)sign;
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++, code += 8) {
        const uint32_t high = load_u16(qh + i / 4 * 2);
        const uint32_t index = qs[i] | (high >> i % 4 * 3 & 7) << 8;
        grid_put_iq1(code, grid_iq1[index], high >> 15);
    }
}

static void iq1_s_scales(const uint8_t *block, int8_t scale[16])
{
    const uint8_t *qh = ((const iq1_s_block *)block)->qh;
    MOE_UNROLL
    for (size_t g = 0; g < 16; g += 2)
        scale[g] = scale[g + 1] = (int8_t)((qh[g + 1] >> 3 & 14) + 1);
}

static float iq1_s_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

#if MOE_X86
static const x86_grid_shape iq1_s_shape = X86_GRID_SHIFTED;

MOE_AVX2_INLINE __m256 iq1_s_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return _mm256_mul_ps(x86_f16x8(row, at), _mm256_set1_ps(0.125f));
}

/* Each qh of half the groups four times. */
MOE_AVX2_INLINE __m256i iq1_s_groups_avx2(const uint8_t *block, size_t half)
{
    const __m256i four = _mm256_setr_epi64x(0x0100010001000100, 0x0302030203020302,
                                            0x0504050405040504, 0x0706070607060706);
    return _mm256_shuffle_epi8(
        x86_k_twice(x86_grid_load8(block + offsetof(iq1_s_block, qh) + 8 * half)), four);
}

MOE_AVX2_INLINE void iq1_s_index_avx2(const uint8_t *block, uint16_t index[X86_GRID_INDICES])
{
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const __m256i qh = iq1_s_groups_avx2(block, half);
        const __m256i high =
            _mm256_blend_epi16(_mm256_mullo_epi16(qh, _mm256_set1_epi64x(0x0000000400200100)),
                               _mm256_srli_epi16(qh, 1), 0x88);
        const __m256i low = _mm256_cvtepu8_epi16(
            x86_grid_load16(block + offsetof(iq1_s_block, qs) + 16 * half));
        x86_grid_put_index_avx2(
            index + 16 * half,
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi16(0x700))));
    }
}

MOE_AVX2_INLINE void iq1_s_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                     x86_grid_half *w)
{
    const __m256i qh = iq1_s_groups_avx2(block, half);
    const __m256i down = _mm256_and_si256(_mm256_srai_epi16(qh, 15), _mm256_set1_epi16(2));
    const __m256i points = x86_grid_find_avx2(x86_grid_top_iq1, index + 16 * half);
    x86_grid_codes2_avx2(points, 0, 8, 16, w->code);
    w->shift = _mm256_sub_epi16(_mm256_set1_epi16(-7), down);
    w->scale = x86_grid_odd_avx2(_mm256_srli_epi32(qh, 27), 14);
}

MOE_VNNI512_INLINE void iq1_s_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                             x86_grid_row_512 *w)
{
    const __m512i four = _mm512_set_epi64(
        0x0f0e0f0e0f0e0f0e, 0x0d0c0d0c0d0c0d0c, 0x0b0a0b0a0b0a0b0a, 0x0908090809080908,
        0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
    const __m512i qh = _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(
            _mm_loadu_si128((const __m128i *)(block + offsetof(iq1_s_block, qh)))), four);
    x86_grid_iq1_512(index, _mm512_movepi16_mask(qh), w);
    w->scale = x86_grid_odd_512(_mm512_srli_epi32(qh, 27), 7);
}

X86_GRID_FEW(iq1_s, x86_grid_order, iq1_s_index)
#endif

GRID_KERNELS(iq1_s, false, 32, 9, u6)
GRID_QUANT(iq1_s, "IQ1_S", 19, 1, 1, 32, 16)

#endif
