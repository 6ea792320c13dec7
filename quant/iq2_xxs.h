/* quant/iq2_xxs.h - IQ2_XXS: 256 weights in 66 bytes, 2.0625 bits per weight.
 *
 *     byte 0      2                                           66
 *          | d    | qs: 8 groups of 32 weights, 8 bytes each  |
 *          | f16  |  index[4] | u32                           |
 *
 * Of a group, index[j] is the place of weights 8j .. 8j + 7 in grid_iq2_xxs (magnitudes 8, 25, 43),
 * bits 7j .. 7j + 6 of the u32 their signs, of which an even number is negative, and its bits
 * 28..31 the scale s.
 *
 *     weight = d / 8 (2 s + 1) (+- magnitude)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ2_XXS_H
#define MOE_QUANT_IQ2_XXS_H

#include "grid.h"

typedef struct iq2_xxs_block {
    uint8_t d[2]; // f16
    uint8_t qs[64];
} iq2_xxs_block;
_Static_assert(sizeof(iq2_xxs_block) == 66, "as in the file");

static const grid_list iq2_xxs_list = {grid_iq2_xxs, 256, 8, 32, 15, 0.125f, 43, true, 0};

static void iq2_xxs_pack(uint8_t *to, const grid_parts *parts)
{
    iq2_xxs_block *block = (iq2_xxs_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int g = 0; g < 8; g++) {
        uint32_t rest = (uint32_t)parts->scale[g] << 28;
        for (int j = 0; j < 4; j++) {
            block->qs[8 * g + j] = (uint8_t)parts->index[4 * g + j];
            rest |= (parts->sign[4 * g + j] & 127u) << 7 * j;
        }
        memcpy(block->qs + 8 * g + 4, &rest, 4);
    }
}

static void iq2_xxs_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq2_xxs_list, sizeof(iq2_xxs_block), iq2_xxs_pack);
}

static void iq2_xxs_codes(const uint8_t *from, size_t half, uint8_t code[128],
                          uint64_t sign[2])
{
    const uint8_t *qs = ((const iq2_xxs_block *)from)->qs + 32 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++, qs += 16) {
        const uint64_t rest = grid_u32(qs + 4) | (uint64_t)grid_u32(qs + 12) << 32;
        sign[i] = grid_even_signs(grid_sevens(rest));
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++, code += 8)
            grid_put8(code, grid_iq2_xxs[qs[j / 4 * 8 + j % 4]]);
    }
}

static void iq2_xxs_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales8(grid_top_nibbles(((const iq2_xxs_block *)block)->qs + 4, 8), scale);
}

static float iq2_xxs_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

#if MOE_X86
static const x86_grid_shape iq2_xxs_shape = X86_GRID_SIGNED(43, 2);

MOE_AVX2_INLINE __m256 iq2_xxs_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return _mm256_mul_ps(x86_f16x8(row, at + offsetof(iq2_xxs_block, d)),
                         _mm256_set1_ps(0.125f));
}

MOE_AVX2_INLINE void iq2_xxs_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                       x86_grid_half *w)
{
    (void)index;
    const uint8_t *qs = block + offsetof(iq2_xxs_block, qs) + 32 * half;
    const uint64_t *tops = x86_grid_top_iq2_xxs;
    const __m256i points =
        _mm256_setr_epi64x(x86_grid_bytes(tops, qs, 1), x86_grid_bytes(tops, qs + 8, 1),
                           x86_grid_bytes(tops, qs + 16, 1), x86_grid_bytes(tops, qs + 24, 1));
    x86_grid_codes2_avx2(points, 8, 25, 43, w->code);
    x86_grid_rest_avx2(_mm256_shuffle_epi32(x86_k_load(qs), 0xf5), w);
}

/* A group's two words, indices and the rest, side by side. */
MOE_VNNI512_INLINE void iq2_xxs_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                               x86_grid_row_512 *w)
{
    (void)index;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i odd = _mm512_setr_epi32(1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
    const __m512i qs = x86_512_load64(block + offsetof(iq2_xxs_block, qs));
    const __m512i rest = _mm512_permutexvar_epi32(odd, qs);
    const __m512i places = _mm512_cvtepu8_epi16(
        _mm512_castsi512_si256(_mm512_permutexvar_epi32(even, qs)));
    x86_grid_iq2_512(x86_512_pick256(x86_grid_iq2_xxs, places), x86_grid_word_signs_512(rest), w);
    w->scale = x86_grid_word_scales_512(rest);
}

X86_GRID_FEW(iq2_xxs, x86_grid_order, x86_grid_no_index)
#endif

GRID_KERNELS(iq2_xxs, true, 32, 43, u7)
GRID_QUANT(iq2_xxs, "IQ2_XXS", 16, 1, 1, 64)

#endif
