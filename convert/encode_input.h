/* convert/encode_input.h - numbers of the source as floats, and whether they are all usable. What
 * the machine has instructions for goes through them, to the same bits. */
#ifndef MOE_CONVERT_ENCODE_INPUT_H
#define MOE_CONVERT_ENCODE_INPUT_H

#ifndef MOE_CORE_BASE_H
#include "../moe.c"
#endif

typedef struct input_ops {
    void (*f16)(const void *src, float *dst, size_t n);
    void (*bf16)(const void *src, float *dst, size_t n);
    /* |x| <= max for all of them; false with NaN. */
    bool (*within)(const float *x, size_t n, float max);
} input_ops;

static bool input_within_c(const float *x, size_t n, float max)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(x[i]) <= max))
            return false;
    return true;
}

#if MOE_X86

MOE_AVX2 static void input_f16_avx2(const void *src, float *dst, size_t n)
{
    const uint8_t *p = src;
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 2 * i))));
    for (; i < n; i++)
        dst[i] = f32_of_f16(load_u16(p + 2 * i));
}

MOE_AVX2 static void input_bf16_avx2(const void *src, float *dst, size_t n)
{
    const uint8_t *p = src;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 2 * i)));
        _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)));
    }
    for (; i < n; i++)
        dst[i] = f32_of_bf16(load_u16(p + 2 * i));
}

MOE_AVX2 static bool input_within_avx2(const float *x, size_t n, float max)
{
    const __m256 limit = _mm256_set1_ps(max), sign = _mm256_set1_ps(-0.0f);
    __m256 good = _mm256_cmp_ps(limit, limit, _CMP_EQ_OQ);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 a = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
        good = _mm256_and_ps(good, _mm256_cmp_ps(a, limit, _CMP_LE_OQ));
    }
    return _mm256_movemask_ps(good) == 255 && input_within_c(x + i, n - i, max);
}

#endif

static input_ops input_select(uint32_t cpu)
{
    input_ops ops = {quant_f16.dequantize, quant_bf16.dequantize, input_within_c};
#if MOE_X86
    if (cpu & MOE_CPU_AVX2)
        ops = (input_ops){input_f16_avx2, input_bf16_avx2, input_within_avx2};
#endif
    (void)cpu;
    return ops;
}

/* n weights of a type, as floats. */
static void input_floats(const input_ops *ops, const moe_quant *type, const void *src, float *dst,
                         size_t n)
{
    if (type == &quant_f16)
        ops->f16(src, dst, n);
    else if (type == &quant_bf16)
        ops->bf16(src, dst, n);
    else
        type->dequantize(src, dst, n);
}

#endif
