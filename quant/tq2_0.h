/* quant/tq2_0.h - TQ2_0: 256 weights in 66 bytes, 2.0625 bits per weight.
 *
 *     byte 0                         64     66
 *          | qs                      | d    |
 *          | 64 bytes                | f16  |
 *
 * Weights are d times -1, 0 or 1 (or 2, which the stored codes q = 0..3 could say as well). Each
 * half (128 weights) has 32 bytes of qs: weight 32 j + i of it has bits 2j and 2j + 1 of byte i.
 *
 *     weight = d (q - 1)                              exact; times activations: grid.h */
#ifndef MOE_QUANT_TQ2_0_H
#define MOE_QUANT_TQ2_0_H

#include "grid.h"

typedef struct tq2_0_block {
    uint8_t qs[64];
    uint8_t d[2]; // f16
} tq2_0_block;
_Static_assert(sizeof(tq2_0_block) == 66, "as in the file");

static void tq2_0_quantize(const float *src, void *blocks, size_t n)
{
    tq2_0_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++, src += K_LEN) {
        const uint16_t h = quant_scale(fabsf(quant_peak(src, K_LEN)));
        const float d = f32_of_f16(h);
        memcpy(block->d, &h, 2);
        memset(block->qs, 0, sizeof block->qs);
        for (size_t k = 0; k < K_LEN; k++) {
            uint8_t *to = &block->qs[k / 128 * 32 + k % 32];
            *to = (uint8_t)(*to | (quant_round(src[k], d, -1, 1) + 1) << k / 32 % 4 * 2);
        }
    }
}

static void tq2_0_codes(const uint8_t *block, size_t half, uint8_t code[128], uint64_t sign[2])
{
    const uint8_t *qs = ((const tq2_0_block *)block)->qs + 32 * half;
    (void)sign;
    for (size_t i = 0; i < 32; i += 8) {
        const uint64_t v = quant_codes8(qs + i);
        for (size_t j = 0; j < 4; j++)
            grid_put8(code + 32 * j + i, grid_ternary(v >> 2 * j));
    }
}

static void tq2_0_scales(const uint8_t *block, int8_t scale[16])
{
    (void)block;
    memset(scale, 1, 16);
}

static float tq2_0_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(((const tq2_0_block *)block)->d));
}

#if MOE_X86
static const x86_grid_shape tq2_0_shape = X86_GRID_TERNARY(4);

MOE_AVX2_INLINE __m256 tq2_0_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return x86_f16x8(row, at + offsetof(tq2_0_block, d));
}

/* Half after half. */
MOE_AVX2 static void tq2_0_order_avx2(const int8_t *q, int8_t *out)
{
    memcpy(out, q, 128);
    memcpy(out + X86_K_ORDERED / 2, q + 128, 128);
}

MOE_AVX2_INLINE void tq2_0_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                     x86_grid_half *w)
{
    (void)index;
    const __m256i qs = x86_k_load(block + 32 * half);
    MOE_UNROLL
    for (int j = 0; j < 4; j++)
        w->code[j] = _mm256_and_si256(_mm256_srli_epi16(qs, 2 * j), _mm256_set1_epi8(3));
}

MOE_VNNI512_INLINE void tq2_0_order_512(const int8_t *q, __m512i out[X86_GRID_MOST])
{
    MOE_UNROLL
    for (size_t j = 0; j < 4; j++)
        out[j] = x86_512_pair(q + 32 * j, 128);
}

MOE_VNNI512_INLINE void tq2_0_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                             x86_grid_row_512 *w)
{
    (void)index;
    const __m512i qs = x86_512_load64(block);
    MOE_UNROLL
    for (unsigned j = 0; j < 4; j++)
        w->code[j] = _mm512_and_si512(_mm512_srli_epi16(qs, 2 * j), _mm512_set1_epi8(3));
}

X86_GRID_FEW(tq2_0, tq2_0_order, x86_grid_no_index)
#endif

GRID_KERNELS(tq2_0, false, 32, 1, u6)
GRID_QUANT(tq2_0, "TQ2_0", 35, 64, 1, 1)

#endif
