/* quant/x86_512_k.h - AVX-512 kernels for 1 to 4 tokens (decode, drafts, experts with few tokens),
 * shared by the formats with superblocks of 256 weights.
 *
 * 8 rows are computed side by side. A vector holds 64 codes of one row as they lie in memory, and
 * only the sums change sides, once per superblock: for few tokens, unpacking into a tile
 * (x86_512.h) would take longer than the products. A format brings a function for 8 superblocks.
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_X86_512_K_H
#define MOE_QUANT_X86_512_K_H

#include "x86_512.h"
#include "x86_k.h"

#if MOE_X86

enum { X86_512_FEWEST = 4 };

/* 256 codes of one row; scale[i] is what x86_512_scaled() wants for code[2 i] and code[2 i + 1]. */
typedef struct x86_512_row {
    __m512i code[4], scale[2];
} x86_512_row;

/* The activations of one token in the order of a format's codes, and where the sums begin. */
typedef struct x86_512_order {
    __m512i q[4], init[4];
} x86_512_order;

/* The superblocks at `offset` of 8 rows times the 256 activations that each of x begins with; n_tok
 * is a constant. Meanwhile 8 superblocks' bytes from `next` on are fetched, by x86_512_fetch(). */
typedef void x86_512_dot8_fn(const uint8_t *const row[8], size_t offset, x86_ahead next,
                             const moe_q8 *x, size_t n_tok, x86_k_sums *out);

/* Part r of 8. Fetched in one piece, the lines of 8 superblocks would occupy all that a core has
 * for lines on their way. Weights from memory, Zen 4, one core: of what reading alone gets, Q4_K
 * 86 % instead of 53, Q6_K 88 instead of 54; decode of Qwen3-MoE 1.25 times as fast. */
MOE_VNNI512_INLINE void x86_512_fetch(x86_ahead next, size_t r, size_t block_bytes)
{
    x86_fetch_ahead(next, r * block_bytes, block_bytes);
}

MOE_VNNI512_INLINE __m512i x86_512_load64(const void *p)
{
    return _mm512_loadu_si512(p);
}

/* 32 bytes in both halves. */
MOE_VNNI512_INLINE __m512i x86_512_twice(const uint8_t *p)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}

/* A constant in the lower and another in the upper half, for shifts of 64-bit lanes. */
MOE_VNNI512_INLINE __m512i x86_512_halves(int low, int high)
{
    return _mm512_inserti64x4(_mm512_set1_epi64(low), _mm256_set1_epi64x(high), 1);
}

/* 32 activations, and 32 that begin `gap` bytes later. */
MOE_VNNI512_INLINE __m512i x86_512_pair(const int8_t *at, size_t gap)
{
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at)),
        _mm256_loadu_si256((const __m256i *)(at + gap)), 1);
}

/* The sums begin with -offset * (sums of four activations), for codes that are too large by
 * `offset`, a constant. */
MOE_VNNI512_INLINE void x86_512_begin(x86_512_order *x, int offset)
{
    const __m512i zero = _mm512_setzero_si512(), factor = _mm512_set1_epi8((char)offset);
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        x->init[i] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, factor, x->q[i]));
}

/* Qs of Q4_K and Q5_K: the low nibbles of bytes 64p .. 64p + 63 are groups 4p and 4p + 2, the high
 * ones 4p + 1 and 4p + 3. */
MOE_VNNI512_INLINE x86_512_order x86_512_nibble_order(const int8_t *q)
{
    x86_512_order x = {.q = {x86_512_pair(q, 64), x86_512_pair(q + 32, 64),
                             x86_512_pair(q + 128, 64), x86_512_pair(q + 160, 64)}};
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++)
        x.init[i] = _mm512_setzero_si512();
    return x;
}

/* Qs of Q2_K and Q3_K: bits 2j and 2j + 1 of 64 bytes are weights 32j .. of both halves. */
MOE_VNNI512_INLINE x86_512_order x86_512_crumb_order(const int8_t *q, int offset)
{
    x86_512_order x = {.q = {x86_512_pair(q, 128), x86_512_pair(q + 32, 128),
                             x86_512_pair(q + 64, 128), x86_512_pair(q + 96, 128)}};
    x86_512_begin(&x, offset);
    return x;
}

/* acc + scale * sums. a and b are sums of four products, which fit into 16 bits; each of their
 * quarters belongs to one group of weights, or to half of one. `scale` has int16: in each quarter 4
 * times that of a's group, then 4 times that of b's. */
MOE_VNNI512_INLINE __m512i x86_512_scaled(__m512i acc, __m512i a, __m512i b, __m512i scale)
{
    return _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(a, b), scale);
}

/* Such scales from 16 signed bytes; `groups` says which, quarter by quarter. */
#define X86_512_FOUR(g) ((g) * 0x0001000100010001)
#define X86_512_GROUPS(a0, b0, a1, b1, a2, b2, a3, b3)                                             \
    _mm512_setr_epi64(X86_512_FOUR(a0), X86_512_FOUR(b0), X86_512_FOUR(a1), X86_512_FOUR(b1),      \
                      X86_512_FOUR(a2), X86_512_FOUR(b2), X86_512_FOUR(a3), X86_512_FOUR(b3))

MOE_VNNI512_INLINE __m512i x86_512_spread16(__m128i scales, __m512i groups)
{
    return _mm512_permutexvar_epi16(groups,
                                    _mm512_castsi256_si512(_mm256_cvtepi8_epi16(scales)));
}

/* Those of groups 4p .. 4p + 3 in the order of nibbles, from a word that holds them as bytes. */
MOE_VNNI512_INLINE __m512i x86_512_nibble_scales(uint32_t four)
{
    const __m512i at = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1, -1))),
        _mm256_broadcastsi128_si256(
            _mm_setr_epi8(2, -1, 2, -1, 2, -1, 2, -1, 3, -1, 3, -1, 3, -1, 3, -1)), 1);
    return _mm512_shuffle_epi8(_mm512_set1_epi32((int)four), at);
}

/* dot[t][r] = 16 numbers whose sum is the integer of row r and token t. */
MOE_VNNI512_INLINE void x86_512_multiply(const x86_512_row *w, const x86_512_order *x, size_t n_tok,
                                         size_t r, __m512i dot[][8])
{
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        __m512i sum[4];
        MOE_UNROLL
        for (size_t i = 0; i < 4; i++)
            sum[i] = _mm512_dpbusd_epi32(x[t].init[i], w->code[i], x[t].q[i]);
        const __m512i part = x86_512_scaled(_mm512_setzero_si512(), sum[0], sum[1], w->scale[0]);
        dot[t][r] = x86_512_scaled(part, sum[2], sum[3], w->scale[1]);
    }
}

/* The sum of the 16 numbers of each of v[0..7], in the order of the vectors. */
MOE_VNNI512_INLINE __m256i x86_512_sum8(const __m512i v[8])
{
    __m512i four[2];
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) { /* in each quarter: vectors 4i .. 4i + 3 */
        const __m512i *u = v + 4 * i;
        const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(u[0], u[1]),
                                           _mm512_unpackhi_epi32(u[0], u[1]));
        const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(u[2], u[3]),
                                           _mm512_unpackhi_epi32(u[2], u[3]));
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    const __m512i two = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x88),
                                         _mm512_shuffle_i32x4(four[0], four[1], 0xdd));
    const __m512i sum = _mm512_add_epi32(two, _mm512_shuffle_i32x4(two, two, 0xb1));
    return _mm512_castsi512_si256(_mm512_shuffle_i32x4(sum, sum, 0x08));
}

/* n_tok, a constant, is the number of tokens or one more: then the last is computed twice. The next
 * 8 rows are fetched meanwhile, in the order in which they lie in memory. */
MOE_VNNI512_INLINE void x86_512_few_tokens(const moe_mm *mm, size_t block_bytes, x86_kind kind,
                                           x86_512_dot8_fn *dot8, size_t n_tok)
{
    moe_q8 first[X86_512_FEWEST];
    for (size_t t = 0; t < n_tok; t++)
        first[t] = act_q8(MOE_ACT_Q8_256, mm->x + MOE_MIN(t, mm->n_tok - 1) * mm->x_stride,
                          mm->n_in);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_ahead next = x86_ahead_rows(mm, r, 8);
        __m256 acc[X86_512_FEWEST];
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            acc[t] = _mm256_setzero_ps();
        x86_rows(mm, r, row);
        for (size_t b = 0; b < mm->n_in / X86_512_K; b++) {
            moe_q8 x[X86_512_FEWEST];
            x86_k_sums s[X86_512_FEWEST];
            MOE_UNROLL
            for (size_t t = 0; t < n_tok; t++)
                x[t] = (moe_q8){first[t].scale + b, first[t].sum + X86_512_K / 16 * b,
                                first[t].q + X86_512_K * b};
            dot8(row, b * block_bytes, next, x, n_tok, s);
            next.first += 8 * block_bytes;
            next.again += 8 * block_bytes;
            MOE_UNROLL
            for (size_t t = 0; t < n_tok; t++)
                acc[t] = x86_k_add(&s[t], kind, _mm256_broadcast_ss(x[t].scale), acc[t]);
        }
        MOE_UNROLL
        for (size_t t = 0; t < n_tok; t++)
            if (t < mm->n_tok)
                x86_store_rows(mm->y + t * mm->y_stride + r, acc[t], mm->n_row - r);
    }
}

/* The kernels of a format with superblocks. */
#define X86_512_KERNELS(type, kind)                                                                \
    MOE_VNNI512 static void type##_gemv_vnni512(const moe_mm *mm)                                  \
    {                                                                                              \
        x86_512_few_tokens(mm, sizeof(type##_block), kind, type##_dot8_vnni512, 1);                \
    }                                                                                              \
    MOE_VNNI512 static void type##_gemv2_vnni512(const moe_mm *mm)                                 \
    {                                                                                              \
        x86_512_few_tokens(mm, sizeof(type##_block), kind, type##_dot8_vnni512, 2);                \
    }                                                                                              \
    MOE_VNNI512 static void type##_gemv4_vnni512(const moe_mm *mm)                                 \
    {                                                                                              \
        x86_512_few_tokens(mm, sizeof(type##_block), kind, type##_dot8_vnni512, 4);                \
    }                                                                                              \
    MOE_VNNI512 static void type##_gemm_vnni512(const moe_mm *mm)                                  \
    {                                                                                              \
        if (mm->n_tok > X86_512_FEWEST)                                                            \
            x86_512_gemm(mm, &type##_vnni512);                                                     \
        else if (mm->n_tok == 1)                                                                   \
            type##_gemv_vnni512(mm);                                                               \
        else                                                                                       \
            (mm->n_tok == 2 ? type##_gemv2_vnni512 : type##_gemv4_vnni512)(mm);                    \
    }

#endif
#endif
