/* quant/iq3_xxs.h - IQ3_XXS: 256 weights in 98 bytes, 3.0625 bits per weight.
 *
 *     byte 0      2                       66           98
 *          | d    | qs                    | rest       |
 *          | f16  | 64 bytes              | u32[8]     |
 *
 * qs[i] is the place of weights 4i .. 4i + 3 in grid_iq3_xxs (magnitudes 4, 12, ... 52, 62). 8
 * groups of 32 weights have a u32 each: bits 7j .. 7j + 6 are the signs of weights 8j .. 8j + 7, of
 * which an even number is negative, bits 28..31 the scale s.
 *
 *     weight = d / 4 (2 s + 1) (+- magnitude)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ3_XXS_H
#define MOE_QUANT_IQ3_XXS_H

#include "grid.h"

typedef struct iq3_xxs_block {
    uint8_t d[2]; // f16
    uint8_t qs[64];
    uint8_t rest[32]; // u32[8]
} iq3_xxs_block;
_Static_assert(sizeof(iq3_xxs_block) == 98, "as in the file");

static const grid_list iq3_xxs_list = {grid_iq3_xxs, 256, 4, 32, 15, 0.25f, 62, true, 0};

static void iq3_xxs_pack(uint8_t *to, const grid_parts *parts)
{
    iq3_xxs_block *block = (iq3_xxs_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int i = 0; i < 64; i++)
        block->qs[i] = (uint8_t)parts->index[i];
    for (int g = 0; g < 8; g++) {
        uint32_t rest = (uint32_t)parts->scale[g] << 28;
        for (int j = 0; j < 4; j++)
            rest |= (parts->sign[4 * g + j] & 127u) << 7 * j;
        memcpy(block->rest + 4 * g, &rest, 4);
    }
}

static void iq3_xxs_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq3_xxs_list, sizeof(iq3_xxs_block), iq3_xxs_pack);
}

static void iq3_xxs_codes(const uint8_t *from, size_t half, uint8_t code[128],
                          uint64_t sign[2])
{
    const iq3_xxs_block *block = (const iq3_xxs_block *)from;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        uint64_t rest;
        memcpy(&rest, block->rest + 16 * half + 8 * i, 8);
        sign[i] = grid_even_signs(grid_sevens(rest));
    }
    const uint8_t *qs = block->qs + 32 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++)
        MOE_UNROLL
        for (size_t j = 0; j < 16; j++, code += 4)
            memcpy(code, &grid_iq3_xxs[*qs++], 4);
}

static void iq3_xxs_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales8(grid_top_nibbles(((const iq3_xxs_block *)block)->rest, 4), scale);
}

static float iq3_xxs_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.25f;
}

#if MOE_X86
static const x86_grid_shape iq3_xxs_shape = X86_GRID_SIGNED(62, 2);

MOE_AVX2_INLINE __m256 iq3_xxs_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return _mm256_mul_ps(x86_f16x8(row, at + offsetof(iq3_xxs_block, d)),
                         _mm256_set1_ps(0.25f));
}

MOE_AVX2_INLINE void iq3_xxs_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                       x86_grid_half *w)
{
    (void)index;
    const __m128i values = _mm_setr_epi8(4, 12, 20, 28, 36, 44, 52, 62, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const uint8_t *qs = block + offsetof(iq3_xxs_block, qs) + 32 * half;
    const uint64_t *tops = x86_grid_top_iq3_xxs;
    const __m256i even =
        _mm256_setr_epi64x(x86_grid_bytes(tops, qs, 2), x86_grid_bytes(tops, qs + 8, 2),
                           x86_grid_bytes(tops, qs + 16, 2), x86_grid_bytes(tops, qs + 24, 2));
    const __m256i odd =
        _mm256_setr_epi64x(x86_grid_bytes(tops, qs + 1, 2), x86_grid_bytes(tops, qs + 9, 2),
                           x86_grid_bytes(tops, qs + 17, 2), x86_grid_bytes(tops, qs + 25, 2));
    const __m128i rest = x86_grid_load16(block + offsetof(iq3_xxs_block, rest) + 16 * half);
    x86_grid_codes4_avx2(even, odd, values, w->code);
    x86_grid_rest_avx2(_mm256_permutevar8x32_epi32(_mm256_castsi128_si256(rest), twice), w);
}

MOE_VNNI512_INLINE void iq3_xxs_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                               x86_grid_row_512 *w)
{
    (void)index;
    const __m128i values = _mm_setr_epi8(66, 74, 82, 90, 98, 106, 114, 124, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i qs = x86_512_load64(block + offsetof(iq3_xxs_block, qs));
    const __m512i rest = _mm512_permutexvar_epi32(
        twice, _mm512_castsi256_si512(_mm256_loadu_si256(
                   (const __m256i *)(block + offsetof(iq3_xxs_block, rest)))));
    x86_grid_codes4_512(x86_512_pick256(x86_grid_iq3_xxs, qs),
                        x86_512_pick256(x86_grid_iq3_xxs, _mm512_srli_epi16(qs, 8)), values,
                        w->code);
    x86_grid_sign_512(x86_grid_word_signs_512(rest), 62, w->code);
    w->scale = x86_grid_word_scales_512(rest);
}

X86_GRID_FEW(iq3_xxs, x86_grid_order, x86_grid_no_index)
#endif

GRID_KERNELS(iq3_xxs, true, 32, 62, u7)
GRID_QUANT(iq3_xxs, "IQ3_XXS", 18, 1, 1, 64, 32)

#endif
