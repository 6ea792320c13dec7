/* quant/iq2_s.h - IQ2_S: 256 weights in 82 bytes, 2.5625 bits per weight.
 *
 *     byte 0      2            34          66        74         82
 *          | d    | qs         | signs     | qh      | scales   |
 *          | f16  | 32 bytes   | 32 bytes  | 8 bytes | 8 bytes  |
 *
 * Of weights 8i .. 8i + 7, qs[i] and bits 2 (i mod 4), 2 (i mod 4) + 1 of qh[i / 4] are the place
 * in grid_iq2_s (magnitudes 8, 25, 43), qh above; signs[i] has a bit for each negative one. 16
 * groups of 16 weights have scales s: nibbles, the low one first.
 *
 *     weight = d / 8 (2 s + 1) (+- magnitude)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ2_S_H
#define MOE_QUANT_IQ2_S_H

#include "grid.h"

typedef struct iq2_s_block {
    uint8_t d[2]; // f16
    uint8_t qs[32];
    uint8_t signs[32];
    uint8_t qh[8];
    uint8_t scales[8];
} iq2_s_block;
_Static_assert(sizeof(iq2_s_block) == 82, "as in the file");

static const grid_list iq2_s_list = {grid_iq2_s, 1024, 8, 16, 15, 0.125f, 43, false, 0};

static void iq2_s_pack(uint8_t *to, const grid_parts *parts)
{
    iq2_s_block *block = (iq2_s_block *)to;
    memcpy(block->d, &parts->d, 2);
    memcpy(block->signs, parts->sign, 32);
    memset(block->qh, 0, sizeof block->qh);
    for (int i = 0; i < 32; i++) {
        block->qs[i] = (uint8_t)parts->index[i];
        block->qh[i / 4] = (uint8_t)(block->qh[i / 4] | parts->index[i] >> 8 << i % 4 * 2);
    }
    grid_put_nibbles(block->scales, parts->scale, 16);
}

static void iq2_s_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq2_s_list, sizeof(iq2_s_block), iq2_s_pack);
}

static void iq2_s_codes(const uint8_t *from, size_t half, uint8_t code[128],
                        uint64_t sign[2])
{
    const iq2_s_block *block = (const iq2_s_block *)from;
    const uint8_t *qs = block->qs + 16 * half, *qh = block->qh + 4 * half;
    memcpy(sign, block->signs + 16 * half, 16);
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++, code += 8)
        grid_put8(code, grid_iq2_s[qs[i] | (qh[i / 4] >> i % 4 * 2 & 3u) << 8]);
}

static void iq2_s_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales16(((const iq2_s_block *)block)->scales, scale);
}

static float iq2_s_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

#if MOE_X86
static const x86_grid_shape iq2_s_shape = X86_GRID_SIGNED(43, 2);

MOE_AVX2_INLINE __m256 iq2_s_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return _mm256_mul_ps(x86_f16x8(row, at + offsetof(iq2_s_block, d)),
                         _mm256_set1_ps(0.125f));
}

MOE_AVX2_INLINE void iq2_s_index_avx2(const uint8_t *block, uint16_t index[X86_GRID_INDICES])
{
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const __m256i bits = x86_grid_bits_avx2(block + offsetof(iq2_s_block, qh) + 4 * half);
        const __m256i high =
            _mm256_and_si256(_mm256_mullo_epi16(bits, _mm256_set1_epi64x(0x0004001000400100)),
                             _mm256_set1_epi16(0x300));
        const __m256i low = _mm256_cvtepu8_epi16(
            x86_grid_load16(block + offsetof(iq2_s_block, qs) + 16 * half));
        x86_grid_put_index_avx2(index + 16 * half, _mm256_or_si256(low, high));
    }
}

MOE_AVX2_INLINE void iq2_s_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                     x86_grid_half *w)
{
    const __m256i points = x86_grid_find_avx2(x86_grid_top_iq2_s, index + 16 * half);
    x86_grid_codes2_avx2(points, 8, 25, 43, w->code);
    w->signs = _mm256_cvtepu8_epi16(
        x86_grid_load16(block + offsetof(iq2_s_block, signs) + 16 * half));
    w->scale = x86_grid_scales_avx2(block + offsetof(iq2_s_block, scales) + 4 * half);
}

MOE_VNNI512_INLINE void iq2_s_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                             x86_grid_row_512 *w)
{
    (void)index;
    const __m512i qs = _mm512_cvtepu8_epi16(
        _mm256_loadu_si256((const __m256i *)(block + offsetof(iq2_s_block, qs))));
    const __m512i qh = x86_grid_bits_512(block + offsetof(iq2_s_block, qh));
    const __mmask32 bit8 = _mm512_test_epi16_mask(qh, _mm512_set1_epi64(0x0040001000040001));
    const __mmask32 bit9 = _mm512_test_epi16_mask(qh, _mm512_set1_epi64(0x0080002000080002));
    const __m512i points =
        _mm512_mask_mov_epi16(x86_512_pick512(x86_grid_iq2_s, qs, bit8), bit9,
                              x86_512_pick512(x86_grid_iq2_s + 512, qs, bit8));
    x86_grid_iq2_512(points, x86_grid_all_signs_512(block + offsetof(iq2_s_block, signs)), w);
    w->scale = x86_grid_scales16_512(block + offsetof(iq2_s_block, scales));
}

X86_GRID_FEW(iq2_s, x86_grid_order, iq2_s_index)
#endif

GRID_KERNELS(iq2_s, true, 16, 43, u7)
GRID_QUANT(iq2_s, "IQ2_S", 22, 1, 1, 32, 32, 8, 8)

#endif
