/* quant/tcq8.h - TCQ8: blocks of 64 trellis-coded weights in bytes. For rates of 4.3 to 6 bits per
 * weight on disk.
 *
 *     byte 0   2                                                              66
 *          | d | q[64]                                                         |     weight = d q
 *          f16   signed bytes
 *
 * A byte has the room of a code of 7 bits and of its parity: q is the value 2 c + p - 128. So there
 * is no trellis to walk in a product, and any bytes are weights. But a plane has the codes alone,
 * which take a bit less once they are compressed: who writes it drops the parities, who reads it
 * walks along the row and puts them back (tcq8_to_plane, tcq8_from_plane). */
#ifndef MOE_QUANT_TCQ8_H
#define MOE_QUANT_TCQ8_H

#include "tcq.h"

typedef struct tcq8_block {
    uint8_t d[2]; // f16
    int8_t q[2][32];
} tcq8_block;
_Static_assert(sizeof(tcq8_block) == 66, "as in .moe files");

enum { TCQ8_BIAS = 128 };

static void tcq8_put(uint8_t *block, size_t half, const uint8_t v[32])
{
    int8_t *q = ((tcq8_block *)block)->q[half];
    for (size_t k = 0; k < 32; k++)
        q[k] = (int8_t)(v[k] - TCQ8_BIAS);
}

/* The bytes of a row, all of its q: values to codes, if each has the parity of its state. */
static bool tcq8_to_plane(uint8_t *field, size_t n)
{
    uint8_t state[TCQ_PATHS] = {0}, wrong = 0;
    for (size_t k = 0; k < n; k += TCQ_PATHS)
        for (size_t l = 0; l < TCQ_PATHS; l++) {
            const uint8_t v = field[k + l] ^ TCQ8_BIAS, code = v >> 1;
            wrong |= (v ^ state[l]) & 1;
            state[l] = tcq_next(state[l], code);
            field[k + l] = code;
        }
    return !wrong;
}

/* And back. The highest bits are not looked at. */
static void tcq8_from_plane(uint8_t *field, size_t n)
{
    uint8_t state[TCQ_PATHS] = {0};
    for (size_t k = 0; k < n; k += TCQ_PATHS) {
        tcq_step(state, field + k);
        for (size_t l = 0; l < TCQ_PATHS; l++)
            field[k + l] ^= TCQ8_BIAS;
    }
}

static void tcq8_dequantize(const void *blocks, float *dst, size_t n)
{
    const tcq8_block *w = blocks;
    for (size_t k = 0; k < n; k++)
        dst[k] = f32_of_f16(load_u16(w[k / TCQ_LEN].d)) *
                 (float)w[k / TCQ_LEN].q[k / 32 % 2][k % 32];
}

static void tcq8_quantize(const float *src, void *blocks, size_t n)
{
    tcq_quantize(src, blocks, n, sizeof(tcq8_block), TCQ8_BIAS, tcq8_put);
}

static float tcq8_dot_c(const uint8_t *row, const uint8_t *x_row, size_t n_in)
{
    const tcq8_block *w = (const tcq8_block *)row;
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, x_row, n_in);
    float acc = 0;
    for (size_t t = 0; t < n_in / TCQ_PATHS; t++) {
        int sum = 0;
        for (size_t l = 0; l < TCQ_PATHS; l++)
            sum += w[t / 2].q[t % 2][l] * x.q[TCQ_PATHS * t + l];
        acc = fmaf(f32_of_f16(load_u16(w[t / 2].d)) * x.scale[t], (float)sum, acc);
    }
    return acc;
}

static void tcq8_mm_c(const moe_mm *mm)
{
    mm_by_rows(mm, tcq8_dot_c);
}

#if MOE_X86
MOE_AVX2_INLINE __m256i tcq8_dot_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                      tcq_parity_avx2 *const parity[3], const x86_x32 *x)
{
    const size_t q = offset + offsetof(tcq8_block, q) + 32 * half;
    (void)parity;
    __m256i sum[4];
    MOE_UNROLL
    for (size_t r = 0; r < 4; r++)
        sum[r] = x86_dot_pair_i8(x86_load_pair(row[r] + q, row[r + 4] + q),
                                 x86_load_pair(row[r] + q + 16, row[r + 4] + q + 16), x);
    return x86_sum4_i32(sum[0], sum[1], sum[2], sum[3]);
}

MOE_AVX2_INLINE void tcq8_unpack_avx2(const uint8_t *const row[8], size_t offset, size_t half,
                                      tcq_parity_avx2 *const parity[3], __m256i code[8])
{
    const size_t q = offset + offsetof(tcq8_block, q) + 32 * half;
    (void)parity;
    x86_load_transposed(row, q, code);
    x86_load_transposed(row, q + 16, code + 4);
}

TCQ_GEMV_AVX2(tcq8, 0)
TCQ_GEMM_AVX2(tcq8, TCQ8_BIAS, x86_block_i8_avx2, x86_block_i8_avxvnni)

/* A step of 8 rows: sums of products. Rows 0 and 4, 1 and 5, ... are in a vector. */
MOE_VNNI512_INLINE __m256i tcq8_dot_512(const uint8_t *const row[8], size_t q, const int8_t *x_q)
{
    const __m512i x = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)x_q));
    __m512i v[4];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        const __m512i w = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(row[i] + q))),
            _mm256_loadu_si256((const __m256i *)(row[i + 4] + q)), 1);
        v[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(),
                                   _mm512_xor_si512(w, _mm512_set1_epi8((char)TCQ8_BIAS)), x);
    }
    __m512i sum[2]; /* quarters: rows 0, 4, 1, 5 and 2, 6, 3, 7 */
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++)
        sum[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x88),
                                  _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return x86_sum4_i32(
        _mm512_castsi512_si256(sum[0]), _mm512_extracti64x4_epi64(sum[0], 1),
        _mm512_castsi512_si256(sum[1]), _mm512_extracti64x4_epi64(sum[1], 1));
}

MOE_VNNI512 static void tcq8_gemv_vnni512(const moe_mm *mm)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_32, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / TCQ_LEN, block_bytes = sizeof(tcq8_block);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        x86_rows(mm, r, row);
        __m256 acc = _mm256_setzero_ps();
        const x86_ahead next = x86_ahead_rows(mm, r, 8);
        for (size_t b = 0; b < n_block; b++) {
            const size_t q = b * block_bytes + offsetof(tcq8_block, q);
            x86_fetch_ahead(next, b * 8 * block_bytes, 8 * block_bytes);
            const __m256 d = x86_f16x8(row, b * block_bytes);
            MOE_UNROLL
            for (size_t half = 0; half < 2; half++) {
                const x86_x32 xb = x86_load_x32(&x, 2 * b + half);
                const __m256i dot = tcq8_dot_512(row, q + 32 * half, x.q + 64 * b + 32 * half);
                const __m256i sum = _mm256_add_epi32(dot, x86_sum_times(&xb, -TCQ8_BIAS));
                acc = _mm256_fmadd_ps(_mm256_mul_ps(d, xb.d), _mm256_cvtepi32_ps(sum), acc);
            }
        }
        x86_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* u = q + 128 */
MOE_VNNI512_INLINE void tcq8_unpack_512(const __m512i *word, size_t at,
                                        tcq_parity_512 *const parity[3], __m512i code[16])
{
    (void)parity;
    MOE_UNROLL
    for (size_t i = 0; i < 16; i++)
        code[i] = _mm512_xor_si512(x86_512_word(word, at + 4 * i),
                                   _mm512_set1_epi8((char)TCQ8_BIAS));
}

TCQ_GEMM_VNNI512(tcq8, TCQ8_BIAS)

#endif

#if MOE_ARM64
MOE_INLINE void tcq8_values_arm(const uint8_t *block, size_t half,
                                uint8x16_t (*const parity[3])[2], uint8x16_t v[2])
{
    const uint8_t *q = block + offsetof(tcq8_block, q) + 32 * half;
    (void)parity;
    v[0] = veorq_u8(vld1q_u8(q), vdupq_n_u8(TCQ8_BIAS));
    v[1] = veorq_u8(vld1q_u8(q + 16), vdupq_n_u8(TCQ8_BIAS));
}

TCQ_ARM(tcq8, TCQ8_BIAS)
#endif

TCQ_QUANT(tcq8, "TCQ8", QUANT_TCQ_ID + 2, tcq8_to_plane, tcq8_from_plane, 1, 1, 64)

#endif
