/* quant/tq1_0.h - TQ1_0: 256 weights in 54 bytes, 1.6875 bits per weight.
 *
 *     byte 0                 48        52     54
 *          | qs              | qh      | d    |
 *          | 48 bytes        | 4 bytes | f16  |
 *
 * Weights are d times -1, 0 or 1. A byte holds five digits of base 3, in qh four; it is the number
 * that they make times 256 / 243, rounded up, so that a digit appears above the byte when the byte
 * is multiplied by 3: the n-th is (byte 3^n mod 256) 3 / 256, rounded down. With the digit n and
 * the byte i,
 *
 *     weight 32 n + i        in qs[i], i < 32
 *     weight 160 + 16 n + i  in qs[32 + i], i < 16
 *     weight 240 + 4 n + i   in qh[i], n < 4
 *
 *     weight = d (digit - 1)                          exact; times activations: grid.h */
#ifndef MOE_QUANT_TQ1_0_H
#define MOE_QUANT_TQ1_0_H

#include "grid.h"

typedef struct tq1_0_block {
    uint8_t qs[48];
    uint8_t qh[4];
    uint8_t d[2]; // f16
} tq1_0_block;
_Static_assert(sizeof(tq1_0_block) == 54, "as in the file");

/* Three areas of bytes, and how many digits each has. */
static const struct { uint8_t byte, n_byte, n_digit, weight; } tq1_0_areas[] = {
    {0, 32, 5, 0}, {32, 16, 5, 160}, {48, 4, 4, 240}};
static const uint8_t tq1_0_power[5] = {1, 3, 9, 27, 81};

static void tq1_0_quantize(const float *src, void *blocks, size_t n)
{
    tq1_0_block *block = blocks;
    for (size_t b = 0; b < n / K_LEN; b++, block++, src += K_LEN) {
        const uint16_t h = quant_scale(fabsf(quant_peak(src, K_LEN)));
        const float d = f32_of_f16(h);
        uint8_t *byte = block->qs; /* and on into qh */
        memcpy(block->d, &h, 2);
        for (size_t a = 0; a < 3; a++)
            for (size_t i = 0; i < tq1_0_areas[a].n_byte; i++) {
                const float *x = src + tq1_0_areas[a].weight + i;
                int v = 0;
                for (size_t k = 0; k < 5; k++, x += tq1_0_areas[a].n_byte)
                    v = 3 * v + (k < tq1_0_areas[a].n_digit ? quant_round(*x, d, -1, 1) + 1 : 0);
                *byte++ = (uint8_t)((v * 256 + 242) / 243);
            }
    }
}

/* The codes of one digit of 8 bytes: 16 bits have room for a product. */
MOE_INLINE uint64_t tq1_0_digits(uint64_t bytes, uint64_t power)
{
    const uint64_t low = 0x00ff00ff00ff00ff;
    const uint64_t even = ((bytes & low) * power & low) * 3 >> 8 & low;
    const uint64_t odd = ((bytes >> 8 & low) * power & low) * 3 & ~low;
    return grid_ternary(even | odd);
}

static void tq1_0_codes(const uint8_t *block, size_t half, uint8_t code[128], uint64_t sign[2])
{
    (void)sign;
    for (size_t a = 0; a < 3; a++)
        for (size_t k = 0; k < tq1_0_areas[a].n_digit; k++) {
            const size_t n = tq1_0_areas[a].n_byte, at = tq1_0_areas[a].weight + k * n;
            if (at / 128 != half)
                continue;
            const uint8_t *from = block + tq1_0_areas[a].byte;
            uint8_t *to = code + at % 128;
            for (size_t i = 0; i + 8 <= n; i += 8)
                grid_put8(to + i, tq1_0_digits(quant_codes8(from + i), tq1_0_power[k]));
            if (n == 4) {
                const uint64_t v = tq1_0_digits(grid_u32(from), tq1_0_power[k]);
                memcpy(to, &v, 4);
            }
        }
}

static void tq1_0_scales(const uint8_t *block, int8_t scale[16])
{
    (void)block;
    memset(scale, 1, 16);
}

static float tq1_0_d(const uint8_t *block)
{
    return f32_of_f16(load_u16(((const tq1_0_block *)block)->d));
}

#if MOE_X86
static const x86_grid_shape tq1_0_shape = X86_GRID_TERNARY(5);

MOE_AVX2_INLINE __m256 tq1_0_d8_avx2(const uint8_t *const row[8], size_t at)
{
    return x86_f16x8(row, at + offsetof(tq1_0_block, d));
}

/* By digits: in the place of each byte of qs and qh the weight of that digit. */
MOE_AVX2 static void tq1_0_order_avx2(const int8_t *q, int8_t *out)
{
    memset(out, 0, X86_K_ORDERED);
    for (size_t n = 0; n < 5; n++, out += 32) {
        memcpy(out, q + 32 * n, 32);
        memcpy(out + X86_K_ORDERED / 2, q + 160 + 16 * n, 16);
        if (n < 4)
            memcpy(out + X86_K_ORDERED / 2 + 16, q + 240 + 4 * n, 4);
    }
}

MOE_AVX2_INLINE void tq1_0_half_avx2(const uint8_t *block, size_t half, const uint16_t *index,
                                     x86_grid_half *w)
{
    (void)index;
    const __m256i ones = _mm256_set1_epi8(-1), two = _mm256_set1_epi8(2);
    const __m256i rest = _mm256_inserti128_si256(
        _mm256_castsi128_si256(x86_grid_load16(block + 32)),
        _mm_cvtsi32_si128(x86_load_i32(block + 48)), 1);
    __m256i u = _mm256_xor_si256(half ? rest : x86_k_load(block), ones);
    MOE_UNROLL
    for (size_t n = 0; n < 5; n++) {
        const __m256i v = _mm256_avg_epu8(u, _mm256_avg_epu8(u, ones));
        w->code[n] = _mm256_andnot_si256(_mm256_srli_epi16(v, 6), _mm256_set1_epi8(3));
        u = _mm256_add_epi8(_mm256_add_epi8(u, u), _mm256_add_epi8(u, two));
    }
}

/* By digits: in the place of each byte of qs and qh the weight of that digit. */
MOE_VNNI512_INLINE void tq1_0_order_512(const int8_t *q, __m512i out[X86_GRID_MOST])
{
    MOE_UNROLL
    for (size_t n = 0; n < 5; n++) {
        int32_t last = 0;
        if (n < 4)
            memcpy(&last, q + 240 + 4 * n, 4);
        const __m256i rest = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(q + 160 + 16 * n))),
            _mm_cvtsi32_si128(last), 1);
        out[n] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(q + 32 * n))), rest, 1);
    }
}

/* With u = 255 - byte, vpavgb rounds down what it halves: of u and of half of it, 255 - 3/4 byte,
 * whose upper two bits are 3 - digit. */
MOE_VNNI512_INLINE void tq1_0_unpack_vnni512(const uint8_t *block, const uint16_t *index,
                                             x86_grid_row_512 *w)
{
    (void)index;
    const __m512i ones = _mm512_set1_epi8(-1), two = _mm512_set1_epi8(2);
    __m512i u = _mm512_xor_si512(_mm512_maskz_loadu_epi8(0x000fffffffffffff, block), ones);
    MOE_UNROLL
    for (size_t n = 0; n < 5; n++) {
        const __m512i v = _mm512_avg_epu8(u, _mm512_avg_epu8(u, ones));
        w->code[n] = _mm512_andnot_si512(_mm512_srli_epi16(v, 6), _mm512_set1_epi8(3));
        u = _mm512_add_epi8(_mm512_add_epi8(u, u), _mm512_add_epi8(u, two));
    }
}

X86_GRID_FEW(tq1_0, tq1_0_order, x86_grid_no_index)
#endif

GRID_KERNELS(tq1_0, false, 32, 1, u6)
GRID_QUANT(tq1_0, "TQ1_0", 34, 48, 4, 1, 1)

#endif
