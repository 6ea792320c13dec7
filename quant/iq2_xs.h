/* quant/iq2_xs.h - IQ2_XS: 256 weights in 74 bytes, 2.3125 bits per weight.
 *
 *     byte 0      2                       66         74
 *          | d    | qs                    | scales   |
 *          | f16  | u16[32]               | 8 bytes  |
 *
 * Of weights 8i .. 8i + 7, bits 0..8 of qs[i] are the place in grid_iq2_xs (magnitudes 8, 25, 43),
 * bits 9..15 the signs, of which an even number is negative. 16 groups of 16 weights have scales s:
 * nibbles, the low one first.
 *
 *     weight = d / 8 (2 s + 1) (+- magnitude)         exact; times activations: grid.h */
#ifndef MOE_QUANT_IQ2_XS_H
#define MOE_QUANT_IQ2_XS_H

#include "grid.h"

typedef struct iq2_xs_block {
    uint8_t d[2];   // f16
    uint8_t qs[64]; // u16[32]
    uint8_t scales[8];
} iq2_xs_block;
_Static_assert(sizeof(iq2_xs_block) == 74, "as in the file");

static const grid_list iq2_xs_list = {grid_iq2_xs, 512, 8, 16, 15, 0.125f, 43, true, 0};

static void iq2_xs_pack(uint8_t *to, const grid_parts *parts)
{
    iq2_xs_block *block = (iq2_xs_block *)to;
    memcpy(block->d, &parts->d, 2);
    for (int i = 0; i < 32; i++) {
        const uint16_t v = (uint16_t)(parts->index[i] | (parts->sign[i] & 127) << 9);
        memcpy(block->qs + 2 * i, &v, 2);
    }
    grid_put_nibbles(block->scales, parts->scale, 16);
}

static void iq2_xs_quantize(const float *src, void *blocks, size_t n)
{
    grid_quantize(src, blocks, n, &iq2_xs_list, sizeof(iq2_xs_block), iq2_xs_pack);
}

static void iq2_xs_codes(const uint8_t *from, size_t half, uint8_t code[128],
                         uint64_t sign[2])
{
    const uint8_t *qs = ((const iq2_xs_block *)from)->qs + 32 * half;
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        uint64_t sevens = 0;
        MOE_UNROLL
        for (size_t j = 0; j < 8; j++, code += 8, qs += 2) {
            const uint32_t v = load_u16(qs);
            grid_put8(code, grid_iq2_xs[v & 511]);
            sevens |= (uint64_t)(v >> 9) << 8 * j;
        }
        sign[i] = grid_even_signs(sevens);
    }
}

static void iq2_xs_scales(const uint8_t *block, int8_t scale[16])
{
    grid_scales16(((const iq2_xs_block *)block)->scales, scale);
}

static float iq2_xs_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(block)) * 0.125f;
}

#if MOE_X86
static const x86_grid_shape iq2_xs_shape = X86_GRID_SIGNED(43, 2);

MOE_AVX2_INLINE __m256 iq2_xs_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return _mm256_mul_ps(x86_f16x8(row, at + offsetof(iq2_xs_block, d)),
                         _mm256_set1_ps(0.125f));
}

MOE_AVX2_INLINE void iq2_xs_index_avx2(const uint8_t *block, uint16_t index[X86_GRID_INDICES])
{
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const __m256i qs = x86_k_load(block + offsetof(iq2_xs_block, qs) + 32 * half);
        x86_grid_put_index_avx2(index + 16 * half, _mm256_and_si256(qs, _mm256_set1_epi16(511)));
    }
}

MOE_AVX2_INLINE void iq2_xs_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                      x86_grid_half *w)
{
    const __m256i qs = x86_k_load(block + offsetof(iq2_xs_block, qs) + 32 * half);
    const __m256i points = x86_grid_find_avx2(x86_grid_top_iq2_xs, index + 16 * half);
    x86_grid_codes2_avx2(points, 8, 25, 43, w->code);
    w->signs = x86_grid_even_avx2(_mm256_srli_epi16(qs, 9));
    w->scale = x86_grid_scales_avx2(block + offsetof(iq2_xs_block, scales) + 4 * half);
}

MOE_VNNI512_INLINE void iq2_xs_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                              x86_grid_row_512 *w)
{
    (void)index;
    const __m512i qs = x86_512_load64(block + offsetof(iq2_xs_block, qs));
    const __mmask32 bit8 = _mm512_test_epi16_mask(qs, _mm512_set1_epi16(1 << 8));
    x86_grid_iq2_512(x86_512_pick512(x86_grid_iq2_xs, qs, bit8),
                     x86_grid_even_512(_mm512_srli_epi16(qs, 9)), w);
    w->scale = x86_grid_scales16_512(block + offsetof(iq2_xs_block, scales));
}

X86_GRID_FEW(iq2_xs, x86_grid_order, iq2_xs_index)
#endif

GRID_KERNELS(iq2_xs, true, 16, 43, u7)
GRID_QUANT(iq2_xs, "IQ2_XS", 17, 1, 1, 64, 8)

#endif
