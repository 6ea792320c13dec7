/* quant/grid.h - what the formats of 1.5 to 3.5 bits share: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S,
 * IQ3_XXS, IQ3_S, TQ1_0, TQ2_0.
 *
 * Most of them store, for 4 or 8 weights at once, the place of a point in a list: a few of all
 * points that codes of 2 or 3 bits could make. grid_data.h has the lists; here they become tables
 * of bytes. All formats are alike in what comes out: a superblock of 256 weights is
 *
 *     weight = d scale[g] code             16 groups g of 16 weights
 *
 * with codes of at most 62 in magnitude, odd scales 1..31 (TQ: 1), and a float d, which is binary16
 * times a power of two. (So d scale code is exact, in whatever order it is multiplied.) Times
 * activations x = x_scale q_x, with an integer that is exact,
 *
 *     int_sum = sum over g of scale[g] (sum over i of code q_x)
 *     acc = fma(x_scale d, int_sum, acc)   superblock after superblock; x_scale d is rounded
 *
 * |int_sum| <= 256 * 31 * 62 * 127 < 2^26. A format brings struct grid_format, functions in plain
 * C that the C kernel, the tiles of many tokens (x86_tile.h, x86_512.h) and NEON unpack with; few
 * tokens on x86 have functions of their own (x86_grid.h).
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_GRID_H
#define MOE_QUANT_GRID_H

#include "arm_k.h"
#include "grid_data.h"
#include "k.h"
#include "x86_grid.h"

typedef struct grid_format {
    size_t block_bytes;
    bool has_signs;
    /* The codes of weights 128 half .. 128 half + 127. With signs, their magnitudes, and a bit for
     * each that says whether it is negative; without, `sign` is left as it is. */
    void (*codes)(const uint8_t *block, size_t half, uint8_t code[128], uint64_t sign[2]);
    void (*scales)(const uint8_t *block, int8_t scale[16]);
    float (*d)(const uint8_t *block);
} grid_format;

/* ---------------------------------------------------------------------------------- tables -- */

#define GRID_ONES 0x0101010101010101u

/* 8 codes of 2 bits, or 4 of 3 bits, as bytes. */
#define GRID_SPREAD2(p, i) ((uint64_t)((p) >> 2 * (i) & 3) << 8 * (i))
#define GRID_SPREAD3(p, i) ((uint32_t)((p) >> 3 * (i) & 7) << 8 * (i))
#define GRID_EIGHT(p)                                                                              \
    (GRID_SPREAD2(p, 0) | GRID_SPREAD2(p, 1) | GRID_SPREAD2(p, 2) | GRID_SPREAD2(p, 3) |           \
     GRID_SPREAD2(p, 4) | GRID_SPREAD2(p, 5) | GRID_SPREAD2(p, 6) | GRID_SPREAD2(p, 7))
#define GRID_FOUR(p)                                                                               \
    (GRID_SPREAD3(p, 0) | GRID_SPREAD3(p, 1) | GRID_SPREAD3(p, 2) | GRID_SPREAD3(p, 3))

/* Their values: 8, 25, 43; 8 times 0, 1, 2; 4 + 8 code, but 62 for 7; 1 + 2 code. */
#define GRID_OF_IQ2(p) (17 * GRID_EIGHT(p) + (GRID_EIGHT(p) >> 1 & GRID_ONES) + 8 * GRID_ONES)
#define GRID_OF_IQ1(p) (8 * GRID_EIGHT(p))
#define GRID_SEVEN(p) (GRID_FOUR(p) & GRID_FOUR(p) >> 1 & GRID_FOUR(p) >> 2 & 0x01010101u)
#define GRID_OF_IQ3_XXS(p) (8 * GRID_FOUR(p) + 2 * GRID_SEVEN(p) + 0x04040404u)
#define GRID_OF_IQ3_S(p) (2 * GRID_FOUR(p) + 0x01010101u)

#define GRID_ROW(of, a, b, c, d, e, f, g, h) of(a), of(b), of(c), of(d), of(e), of(f), of(g), of(h),
#define GRID_ROW_IQ2(...) GRID_ROW(GRID_OF_IQ2, __VA_ARGS__)
#define GRID_ROW_IQ1(...) GRID_ROW(GRID_OF_IQ1, __VA_ARGS__)
#define GRID_ROW_IQ3_XXS(...) GRID_ROW(GRID_OF_IQ3_XXS, __VA_ARGS__)
#define GRID_ROW_IQ3_S(...) GRID_ROW(GRID_OF_IQ3_S, __VA_ARGS__)

static const uint64_t grid_iq2_xxs[256] = {GRID_IQ2_XXS(GRID_ROW_IQ2)};
static const uint64_t grid_iq2_xs[512] = {GRID_IQ2_XS(GRID_ROW_IQ2)};
static const uint64_t grid_iq2_s[1024] = {GRID_IQ2_S(GRID_ROW_IQ2)};
static const uint64_t grid_iq1[2048] = {GRID_IQ1(GRID_ROW_IQ1)};
static const uint32_t grid_iq3_xxs[256] = {GRID_IQ3_XXS(GRID_ROW_IQ3_XXS)};
static const uint32_t grid_iq3_s[512] = {GRID_IQ3_S(GRID_ROW_IQ3_S)};

/* ------------------------------------------------------------------------------- unpacking -- */

MOE_INLINE uint32_t grid_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

MOE_INLINE void grid_put8(uint8_t *code, uint64_t point)
{
    memcpy(code, &point, 8);
}

/* Signs of 8 x 8 weights of which 7 bits are stored: the number of negative ones is even. */
MOE_INLINE uint64_t grid_even_signs(uint64_t sevens)
{
    uint64_t parity = sevens ^ sevens >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return sevens | (parity & GRID_ONES) << 7;
}

/* Four numbers of 7 bits, the first one lowest, of each half: a byte each. */
MOE_INLINE uint64_t grid_sevens(uint64_t v)
{
    const uint64_t seven = 0x0000007f0000007f;
    return (v & seven) | (v << 1 & seven << 8) | (v << 2 & seven << 16) | (v << 3 & seven << 24);
}

/* 8 codes of IQ1, from a point of bytes 0, 8, 16: 8 less, and then 1 less or 1 more. With 128 more
 * nothing is borrowed between bytes. */
MOE_INLINE void grid_put_iq1(uint8_t code[8], uint64_t point, uint32_t less)
{
    grid_put8(code, (point + (121 - 2 * (uint64_t)less) * GRID_ONES) ^ 128 * GRID_ONES);
}

/* The lower 2 bits of 8 bytes, 1 less: 127 more carries nothing, and 128 of it is taken away. */
MOE_INLINE uint64_t grid_ternary(uint64_t v)
{
    return ((v & 3 * GRID_ONES) + 127 * GRID_ONES) ^ 128 * GRID_ONES;
}

/* 8 nibbles as bytes, the low ones first, times two and one more. */
MOE_INLINE uint64_t grid_odd8(uint32_t nibbles)
{
    uint64_t v = (nibbles | (uint64_t)nibbles << 16) & 0x0000ffff0000ffff;
    v = (v | v << 8) & 0x00ff00ff00ff00ff;
    v = (v | v << 4) & 0x0f0f0f0f0f0f0f0f;
    return 2 * v + GRID_ONES;
}

/* Scales of 16 groups from 16 nibbles; of 8 groups of 32 from 8. */
MOE_INLINE void grid_scales16(const uint8_t nibbles[8], int8_t scale[16])
{
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) {
        const uint64_t v = grid_odd8(grid_u32(nibbles + 4 * i));
        memcpy(scale + 8 * i, &v, 8);
    }
}

MOE_INLINE void grid_scales8(uint32_t nibbles, int8_t scale[16])
{
    const uint64_t all = grid_odd8(nibbles);
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) { /* each byte twice */
        uint64_t v = all >> 32 * i & 0xffffffff;
        v = (v | v << 16) & 0x0000ffff0000ffff;
        v = (v | v << 8) & 0x00ff00ff00ff00ff;
        v |= v << 8;
        memcpy(scale + 8 * i, &v, 8);
    }
}

/* The highest nibbles of 8 words that stand `step` bytes apart. */
MOE_INLINE uint32_t grid_top_nibbles(const uint8_t *words, size_t step)
{
    uint32_t v = 0;
    MOE_UNROLL
    for (size_t i = 0; i < 8; i++)
        v |= (uint32_t)(words[i * step + 3] >> 4) << 4 * i;
    return v;
}

/* ------------------------------------------------------------------------------ quantizing -- */

/* Reference quantizers: the largest weight of a group decides on its scale, the largest of these on
 * d; then each point is the nearest of the list. */
typedef struct grid_list {
    const void *points;  // [n][len] bytes
    size_t n, len;       // len: 8 or 4
    size_t group;        // weights that share a scale: 16 or 32
    int max_scale;       // stored scales are 0..max_scale and stand for 2 s + 1
    float unit;          // d is the stored number times this
    float top;           // the code that a group's largest weight becomes, about
    bool even;           // the number of negative weights of 8 is even
    size_t shifts;       // IQ1: weights that are shifted alike, 8 or 32; else 0
} grid_list;

typedef struct grid_parts {
    uint16_t d;
    uint8_t scale[16];   // [group]
    uint16_t index[64];  // [256 / len]
    uint8_t sign[32];    // bits; IQ1: 0, or 255 if shifted down
} grid_parts;

enum { GRID_FINE = 16 }; /* weights are compared in 16ths of a code's unit */

/* The point nearest to x, in 16ths, if `shift` is added to each of its bytes. */
static size_t grid_nearest(const grid_list *list, const int *x, int shift, int64_t *error)
{
    size_t best = 0;
    *error = INT64_MAX;
    for (size_t i = 0; i < list->n; i++) {
        const uint8_t *point = (const uint8_t *)list->points + i * list->len;
        int sum = 0; /* 8 * (16 * (127 + 62))^2 fits */
        for (size_t k = 0; k < list->len; k++) {
            const int e = x[k] - GRID_FINE * (point[k] + shift);
            sum += e * e;
        }
        if (sum < *error) {
            *error = sum;
            best = i;
        }
    }
    return best;
}

/* Signs of 8 weights in 16ths; x becomes magnitudes. If their number has to be even and is not, the
 * weakest is taken for one of the other sign. */
static uint8_t grid_take_signs(const grid_list *list, int x[8])
{
    uint8_t sign = 0;
    int weakest = 0, n = 0;
    for (int k = 0; k < 8; k++) {
        if (x[k] < 0) {
            sign = (uint8_t)(sign | 1 << k);
            x[k] = -x[k];
            n++;
        }
        if (x[k] < x[weakest])
            weakest = k;
    }
    if (list->even && n % 2) {
        sign ^= (uint8_t)(1 << weakest);
        x[weakest] = -x[weakest];
    }
    return sign;
}

/* Points from number `first` on of weights that are shifted alike: up or down. */
static void grid_take_shift(const grid_list *list, int *x, grid_parts *out, size_t first)
{
    const size_t n = list->shifts / 8;
    uint16_t index[2][4];
    int64_t sum[2] = {0, 0};
    for (size_t down = 0; down < 2; down++)
        for (size_t i = 0; i < n; i++) {
            int64_t error;
            index[down][i] = (uint16_t)grid_nearest(list, x + 8 * i, down ? -9 : -7, &error);
            sum[down] += error;
        }
    const size_t down = sum[1] < sum[0];
    for (size_t i = 0; i < n; i++) {
        out->index[first + i] = index[down][i];
        out->sign[first + i] = down ? 255 : 0;
    }
}

static void grid_points(const grid_list *list, int x[K_LEN], grid_parts *out)
{
    int64_t error;
    for (size_t i = 0; i < K_LEN / 8 && list->shifts; i += list->shifts / 8)
        grid_take_shift(list, x + 8 * i, out, i);
    for (size_t i = 0; i < K_LEN / 8 && !list->shifts; i++) {
        out->sign[i] = grid_take_signs(list, x + 8 * i);
        for (size_t k = 0; k < 8; k += list->len)
            out->index[(8 * i + k) / list->len] =
                (uint16_t)grid_nearest(list, x + 8 * i + k, 0, &error);
    }
}

/* One superblock. */
static void grid_fit(const grid_list *list, const float *src, grid_parts *out)
{
    float scale[16], peak = 0;
    int x[K_LEN];
    const size_t n = K_LEN / list->group;
    for (size_t g = 0; g < n; g++) {
        scale[g] = fabsf(quant_peak(src + g * list->group, list->group)) / list->top;
        peak = fmaxf(peak, scale[g]);
    }
    out->d = quant_scale(peak / (float)(2 * list->max_scale + 1) / list->unit);
    const float d = f32_of_f16(out->d) * list->unit;
    for (size_t g = 0; g < n; g++) {
        out->scale[g] = (uint8_t)k_round(scale[g] * k_inverse(2 * d) - 0.5f, 0, list->max_scale);
        const float inverse = k_inverse(d * (float)(2 * out->scale[g] + 1));
        for (size_t k = g * list->group; k < (g + 1) * list->group; k++)
            x[k] = k_round(src[k] * inverse * GRID_FINE, -127 * GRID_FINE, 127 * GRID_FINE);
    }
    grid_points(list, x, out);
}

static void grid_put_nibbles(uint8_t *to, const uint8_t *scale, size_t n)
{
    for (size_t i = 0; i < n; i += 2)
        to[i / 2] = (uint8_t)(scale[i] | scale[i + 1] << 4);
}

MOE_INLINE void grid_quantize(const float *src, uint8_t *blocks, size_t n, const grid_list *list,
                              size_t block_bytes, void (*pack)(uint8_t *, const grid_parts *))
{
    for (size_t b = 0; b < n / K_LEN; b++) {
        grid_parts parts;
        grid_fit(list, src + b * K_LEN, &parts);
        pack(blocks + b * block_bytes, &parts);
    }
}

/* The codes of a superblock. */
static void grid_codes(const grid_format *f, const uint8_t *block, int8_t code[K_LEN])
{
    uint8_t magnitude[K_LEN];
    uint64_t sign[4] = {0};
    for (size_t half = 0; half < 2; half++)
        f->codes(block, half, magnitude + 128 * half, sign + 2 * half);
    for (size_t k = 0; k < K_LEN; k++) {
        const int8_t v = (int8_t)magnitude[k];
        code[k] = sign[k / 64] >> k % 64 & 1 ? (int8_t)-v : v;
    }
}

static void grid_dequantize(const grid_format *f, const uint8_t *block, float *dst, size_t n)
{
    for (size_t b = 0; b < n / K_LEN; b++, block += f->block_bytes) {
        const float d = f->d(block);
        int8_t code[K_LEN], scale[16];
        grid_codes(f, block, code);
        f->scales(block, scale);
        for (int k = 0; k < K_LEN; k++)
            *dst++ = d * (float)scale[k / 16] * (float)code[k];
    }
}

/* -- C: the specification -- */

static float grid_dot_c(const grid_format *f, const uint8_t *block, const uint8_t *x_row,
                        size_t n_in)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, x_row, n_in);
    float acc = 0;
    for (size_t b = 0; b < n_in / K_LEN; b++, block += f->block_bytes) {
        const int8_t *q = x.q + b * K_LEN;
        int8_t code[K_LEN], scale[16];
        int32_t int_sum = 0;
        grid_codes(f, block, code);
        f->scales(block, scale);
        for (int g = 0; g < 16; g++) {
            int32_t dot = 0;
            for (int k = 16 * g; k < 16 * g + 16; k++)
                dot += code[k] * q[k];
            int_sum += scale[g] * dot;
        }
        acc = fmaf(x.scale[b] * f->d(block), (float)int_sum, acc);
    }
    return acc;
}

static void grid_mm_c(const moe_mm *mm, const grid_format *f)
{
    for (size_t t = 0; t < mm->n_tok; t++)
        for (size_t r = 0; r < mm->n_row; r++)
            mm->y[t * mm->y_stride + r] =
                grid_dot_c(f, mm->w + r * mm->w_stride, mm->x + t * mm->x_stride, mm->n_in);
}

/* -- AVX2 -- */
#if MOE_X86

/* Superblocks of some rows, unpacked into memory: what is written for one is read much later, when
 * it has reached the cache. */
typedef struct grid_blocks {
    uint8_t code[16][K_LEN]; // or magnitudes
    uint64_t sign[16][4];
    int8_t scale[16][16];
    float d[16];
} grid_blocks;

MOE_INLINE void grid_unpack(const grid_format *f, const uint8_t *block, size_t i, grid_blocks *out)
{
    f->codes(block, 0, out->code[i], out->sign[i]);
    f->codes(block, 1, out->code[i] + K_LEN / 2, out->sign[i] + 2);
    f->scales(block, out->scale[i]);
    out->d[i] = f->d(block);
}

/* 32 codes from number 32 part on. */
MOE_AVX2_INLINE __m256i grid_signed_avx2(const grid_format *f, const grid_blocks *blocks, size_t i,
                                         size_t part)
{
    const __m256i code = x86_k_load(blocks->code[i] + 32 * part);
    if (!f->has_signs)
        return code;
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i byte = _mm256_setr_epi64x(0, GRID_ONES, 2 * GRID_ONES, 3 * GRID_ONES);
    const int32_t signs = (int32_t)(blocks->sign[i][part / 2] >> part % 2 * 32);
    const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(signs), byte), bit);
    const __m256i mask = _mm256_cmpeq_epi8(v, bit);
    return _mm256_sub_epi8(_mm256_xor_si256(code, mask), mask);
}

/* The tile has code + offset. */
MOE_AVX2 static void grid_load_avx2(const grid_format *f, int offset, const uint8_t *const row[8],
                                    size_t at, x86_tile *tile)
{
    grid_blocks blocks;
    const uint8_t *code[8], *scale[8];
    __m256i scales[4];
    for (size_t r = 0; r < 8; r++) {
        grid_unpack(f, row[r] + at, r, &blocks);
        code[r] = blocks.code[r];
        scale[r] = (const uint8_t *)blocks.scale[r];
    }
    for (size_t r = 0; r < 8; r++)
        MOE_UNROLL
        for (size_t part = 0; part < 8; part++)
            _mm256_storeu_si256((__m256i *)(blocks.code[r] + 32 * part),
                                _mm256_add_epi8(grid_signed_avx2(f, &blocks, r, part),
                                                _mm256_set1_epi8((char)offset)));
    for (size_t i = 0; i < K_LEN / 4; i += 4)
        x86_load_transposed(code, 4 * i, tile->code + i);
    x86_load_transposed(scale, 0, scales);
    x86_k_spread_pairs(scales, tile->scale);
    tile->d[0] = _mm256_loadu_ps(blocks.d);
}

/* group: weights that share a scale; offset: the least code, negated; size: of code + offset, in
 * bits. */
#define GRID_X86(type, group, offset, size)                                                        \
    static void type##_load_avx2(const uint8_t *const row[8], size_t at, size_t n_block,           \
                                 x86_tile *tile)                                                   \
    {                                                                                              \
        (void)n_block;                                                                             \
        grid_load_avx2(&type##_grid, offset, row, at, tile);                                       \
    }                                                                                              \
    static const x86_format type##_x86 = {K_LEN, sizeof(type##_block), offset, type##_load_avx2};  \
    static void type##_gemm_avx2(const moe_mm *mm)                                                 \
    {                                                                                              \
        x86_k_gemm(mm, &type##_x86, x86_k##group##_##size##_avx2, type##_gemv_avx2,                \
                   type##_gemv2_avx2);                                                             \
    }                                                                                              \
    static void type##_gemm_avxvnni(const moe_mm *mm)                                              \
    {                                                                                              \
        x86_k_gemm(mm, &type##_x86, x86_k##group##_avxvnni, type##_gemv_avx2, type##_gemv2_avx2);  \
    }

/* -- AVX-512 VNNI -- */

/* 64 codes from number 64 part on, and `offset`. */
MOE_VNNI512_INLINE __m512i grid_code_512(const grid_format *f, int offset,
                                         const grid_blocks *blocks, size_t i, size_t part)
{
    const __m512i code = x86_512_load64(blocks->code[i] + 64 * part);
    const __m512i base = _mm512_set1_epi8((char)offset), sum = _mm512_add_epi8(base, code);
    return f->has_signs
               ? _mm512_mask_sub_epi8(sum, (__mmask64)blocks->sign[i][part], base, code)
               : sum;
}

MOE_VNNI512 static void grid_load_vnni512(const grid_format *f, int offset, size_t group,
                                          x86_512_rows *rows, size_t at, x86_512_tile *tile)
{
    grid_blocks blocks;
    x86_512_rows code = {.next = 0}, scale = {.next = 0};
    __m512i scales[4];
    x86_512_next(rows, 16 * f->block_bytes);
    for (size_t r = 0; r < 16; r++) {
        grid_unpack(f, rows->row[r] + at, r, &blocks);
        code.row[r] = blocks.code[r];
        scale.row[r] = (const uint8_t *)blocks.scale[r];
    }
    for (size_t r = 0; r < 16; r++)
        MOE_UNROLL
        for (size_t part = 0; part < 4; part++)
            _mm512_storeu_si512(blocks.code[r] + 64 * part,
                                grid_code_512(f, offset, &blocks, r, part));
    for (size_t i = 0; i < K_LEN / 4; i += 8)
        x86_512_load32(&code, 4 * i, tile->code + i);
    x86_512_load16(&scale, 0, scales);
    MOE_UNROLL
    for (size_t g = 0; g < 16; g++)
        if (g * 16 % group == 0)
            tile->scale[g * 16 / group] = x86_512_byte(scales[g / 4], (int)(g % 4));
    tile->d[0] = _mm512_loadu_ps(blocks.d);
}

#define GRID_512(type, group, offset)                                                              \
    MOE_VNNI512 static void type##_load_vnni512(x86_512_rows *rows, size_t at, x86_512_tile *tile) \
    {                                                                                              \
        grid_load_vnni512(&type##_grid, offset, group, rows, at, tile);                            \
    }                                                                                              \
    static const x86_512_format type##_vnni512 = {                                                 \
        K_LEN, sizeof(type##_block), offset, type##_load_vnni512, &x86_512_k##group};              \
    X86_512_KERNELS(type, X86_K_NO_MIN)                                                            \
    static moe_kernels type##_select_isa(uint32_t cpu, moe_kernels best)                           \
    {                                                                                              \
        if (cpu & MOE_CPU_AVX2)                                                                    \
            best = (moe_kernels){type##_gemv_avx2, type##_gemm_avx2};                              \
        if (cpu & MOE_CPU_AVX_VNNI)                                                                \
            best.gemm = type##_gemm_avxvnni;                                                       \
        if (cpu & MOE_CPU_AVX512_VNNI)                                                             \
            best = (moe_kernels){type##_gemv_vnni512, type##_gemm_vnni512};                        \
        return best;                                                                               \
    }

#define GRID_ISA(type, group, offset, size)                                                        \
    GRID_X86(type, group, offset, size) GRID_512(type, group, offset)

/* -- NEON -- */
#elif MOE_ARM64

MOE_INLINE void grid_codes_arm(const grid_format *f, const uint8_t *block, size_t half,
                               int8x16_t code[8])
{
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8_t byte[128];
    uint64_t sign[2];
    f->codes(block, half, byte, sign);
    MOE_UNROLL
    for (size_t i = 0; i < 8; i++) {
        const uint8x16_t v = vld1q_u8(byte + 16 * i);
        code[i] = vreinterpretq_s8_u8(v);
        if (!f->has_signs)
            continue;
        const uint64_t two = sign[i / 4] >> i % 4 * 16;
        const uint8x16_t mask = vtstq_u8(
            vcombine_u8(vdup_n_u8((uint8_t)two), vdup_n_u8((uint8_t)(two >> 8))), bit);
        code[i] = vreinterpretq_s8_u8(vsubq_u8(veorq_u8(v, mask), mask));
    }
}

/* One scale for each group. */
MOE_INLINE void grid_scales_arm(const grid_format *f, const uint8_t *block, size_t group,
                                int8x16_t *scale, int8x16_t *min)
{
    int8_t byte[16];
    f->scales(block, byte);
    const int8x16_t v = vld1q_s8(byte);
    *scale = *min = group == 16 ? v : vuzp1q_s8(v, v);
}

#define GRID_ISA(type, group, offset, size)                                                        \
    MOE_INLINE void type##_codes_arm(const uint8_t *block, size_t half, int8x16_t code[8])         \
    {                                                                                              \
        grid_codes_arm(&type##_grid, block, half, code);                                           \
    }                                                                                              \
    MOE_INLINE void type##_scales_arm(const uint8_t *block, int8x16_t *scale, int8x16_t *min)      \
    {                                                                                              \
        grid_scales_arm(&type##_grid, block, group, scale, min);                                   \
    }                                                                                              \
    static const arm_k_format type##_arm = {sizeof(type##_block), 0, group, false,                 \
                                            type##_scales_arm, type##_codes_arm, type##_d};        \
    ARM_KERNELS(type, arm_k)                                                                       \
    static moe_kernels type##_select_isa(uint32_t cpu, moe_kernels best)                           \
    {                                                                                              \
        return type##_select_arm(cpu, best);                                                       \
    }

#else

#define GRID_ISA(type, group, offset, size)                                                        \
    static moe_kernels type##_select_isa(uint32_t cpu, moe_kernels best)                           \
    {                                                                                              \
        (void)cpu;                                                                                 \
        return best;                                                                               \
    }

#endif

/* -- what a type's file ends with -- */

/* has_signs as in grid_format; the rest as in GRID_X86. */
#define GRID_KERNELS(type, has_signs, group, offset, size)                                         \
    static const grid_format type##_grid = {sizeof(type##_block), has_signs, type##_codes,         \
                                            type##_scales, type##_d};                              \
    static void type##_dequantize(const void *blocks, float *dst, size_t n)                        \
    {                                                                                              \
        grid_dequantize(&type##_grid, blocks, dst, n);                                             \
    }                                                                                              \
    static void type##_mm_c(const moe_mm *mm)                                                      \
    {                                                                                              \
        grid_mm_c(mm, &type##_grid);                                                               \
    }                                                                                              \
    GRID_ISA(type, group, offset, size)                                                            \
    static moe_kernels type##_select(uint32_t cpu)                                                 \
    {                                                                                              \
        return type##_select_isa(cpu, (moe_kernels){type##_mm_c, type##_mm_c});                    \
    }

/* Behind the id: the fields. */
#define GRID_QUANT(type, public_name, gguf_id, ...)                                                \
    static const moe_quant quant_##type = {                                                        \
        .name = public_name,                                                                       \
        .id = gguf_id,                                                                             \
        .block_len = K_LEN,                                                                        \
        .block_bytes = sizeof(type##_block),                                                       \
        .act = MOE_ACT_Q8_256,                                                                     \
        .bits = 8.0 * sizeof(type##_block) / K_LEN,                                                \
        .dequantize = type##_dequantize,                                                           \
        .quantize = type##_quantize,                                                               \
        .select = type##_select,                                                                   \
        .fields = {__VA_ARGS__},                                                                   \
        .given = true,                                                                             \
    };

#endif
