/* tests/emulated/x86.h - the intrinsics of the AVX2 and AVX-512 kernels as ordinary functions, for
 * machines that lack the instructions. Most are SIMDe's (Debian: libsimde-dev, version 0.7.4); here
 * is what that version lacks, and the fused multiply-adds, which it rounds twice. One that is
 * missing once more kernels are written: add it below. */
#ifndef MOE_TESTS_EMULATED_X86_H
#define MOE_TESTS_EMULATED_X86_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE /* or compiling takes a minute */
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#ifndef __AVX512F__ /* else SIMDe has taken the compiler's own */

/* AVX-VNNI's instructions are AVX-512's under other names. */
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32

#define __mmask16 simde__mmask16
#define __mmask32 simde__mmask32
#define __mmask64 simde__mmask64

/* Lanes in and out of a vector. */
#define LANES(type, n, name, vector)                                                               \
    type name[n];                                                                                  \
    memcpy(name, &(vector), sizeof name)

static inline __m512i emulated_from_i32(const int32_t v[16])
{
    return simde_mm512_loadu_si512(v);
}

static inline __m512 emulated_from_f32(const float v[16])
{
    return simde_mm512_loadu_ps(v);
}

/* ------------------------------------------------------------------- fused multiply-adds -- */

static inline __m512 emulated_fma512(__m512 a, __m512 b, __m512 c, float sign)
{
    LANES(float, 16, x, a);
    LANES(float, 16, y, b);
    LANES(float, 16, z, c);
    for (int i = 0; i < 16; i++)
        z[i] = fmaf(sign * x[i], y[i], z[i]);
    return emulated_from_f32(z);
}

static inline __m256 emulated_fma256(__m256 a, __m256 b, __m256 c, float sign)
{
    LANES(float, 8, x, a);
    LANES(float, 8, y, b);
    LANES(float, 8, z, c);
    for (int i = 0; i < 8; i++)
        z[i] = fmaf(sign * x[i], y[i], z[i]);
    return simde_mm256_loadu_ps(z);
}

#undef _mm256_fmadd_ps
#undef _mm256_fnmadd_ps
#undef _mm512_fmadd_ps
#undef _mm512_fnmadd_ps
#define _mm256_fmadd_ps(a, b, c) emulated_fma256(a, b, c, 1)
#define _mm256_fnmadd_ps(a, b, c) emulated_fma256(a, b, c, -1)
#define _mm512_fmadd_ps(a, b, c) emulated_fma512(a, b, c, 1)
#define _mm512_fnmadd_ps(a, b, c) emulated_fma512(a, b, c, -1)

/* -------------------------------------------------------------------------- conversions -- */

static inline __m512 emulated_cvtepi32_ps(__m512i a)
{
    LANES(int32_t, 16, v, a);
    float r[16];
    for (int i = 0; i < 16; i++)
        r[i] = (float)v[i];
    return emulated_from_f32(r);
}

static inline __m512 emulated_cvtph_ps(__m256i a)
{
    LANES(uint16_t, 16, v, a);
    float r[16];
    for (int i = 0; i < 16; i++)
        r[i] = f32_of_f16(v[i]);
    return emulated_from_f32(r);
}

static inline __m256i emulated_cvtepi32_epi16(__m512i a)
{
    LANES(int32_t, 16, v, a);
    int16_t r[16];
    for (int i = 0; i < 16; i++)
        r[i] = (int16_t)v[i];
    return simde_mm256_loadu_epi16(r);
}

static inline __m128i emulated_cvtepi32_epi16_256(__m256i a)
{
    LANES(int32_t, 8, v, a);
    int16_t r[8];
    for (int i = 0; i < 8; i++)
        r[i] = (int16_t)v[i];
    return simde_mm_loadu_epi16(r);
}

static inline __m512i emulated_cvtepi16_epi32(__m256i a)
{
    LANES(int16_t, 16, v, a);
    int32_t r[16];
    for (int i = 0; i < 16; i++)
        r[i] = v[i];
    return emulated_from_i32(r);
}

static inline __m512i emulated_cvtepu16_epi32(__m256i a)
{
    LANES(uint16_t, 16, v, a);
    int32_t r[16];
    for (int i = 0; i < 16; i++)
        r[i] = v[i];
    return emulated_from_i32(r);
}

static inline __m512i emulated_cvtepu8_epi32(__m128i a)
{
    LANES(uint8_t, 16, v, a);
    int32_t r[16];
    for (int i = 0; i < 16; i++)
        r[i] = v[i];
    return emulated_from_i32(r);
}

static inline __m512i emulated_cvtepu8_epi16(__m256i a)
{
    LANES(uint8_t, 32, v, a);
    int16_t r[32];
    for (int i = 0; i < 32; i++)
        r[i] = v[i];
    return simde_mm512_loadu_si512(r);
}

#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm256_cvtepi32_epi16 emulated_cvtepi32_epi16_256
#define _mm512_cvtepi16_epi32 emulated_cvtepi16_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16

/* --------------------------------------------------- products, shifts, masks, halves -- */

static inline __m512i emulated_mulhi_epu16(__m512i a, __m512i b)
{
    LANES(uint16_t, 32, x, a);
    LANES(uint16_t, 32, y, b);
    for (int i = 0; i < 32; i++)
        x[i] = (uint16_t)((uint32_t)x[i] * y[i] >> 16);
    return simde_mm512_loadu_si512(x);
}

static inline __m512i emulated_srai_epi32(__m512i a, unsigned bits)
{
    LANES(int32_t, 16, v, a);
    for (int i = 0; i < 16; i++)
        v[i] >>= bits < 31 ? bits : 31;
    return emulated_from_i32(v);
}

static inline __m512i emulated_mask_sllv_epi32(__m512i src, uint16_t mask, __m512i a, __m512i bits)
{
    LANES(uint32_t, 16, r, src);
    LANES(uint32_t, 16, v, a);
    LANES(uint32_t, 16, n, bits);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            r[i] = n[i] < 32 ? v[i] << n[i] : 0;
    return simde_mm512_loadu_si512(r);
}

static inline uint16_t emulated_cmplt_epi32_mask(__m512i a, __m512i b)
{
    LANES(int32_t, 16, x, a);
    LANES(int32_t, 16, y, b);
    unsigned mask = 0;
    for (int i = 0; i < 16; i++)
        mask |= (unsigned)(x[i] < y[i]) << i;
    return (uint16_t)mask;
}

static inline __m512 emulated_mask_loadu_ps(__m512 src, uint16_t mask, const float *p)
{
    LANES(float, 16, v, src);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            v[i] = p[i];
    return emulated_from_f32(v);
}

static inline __m512i emulated_maskz_loadu_epi8(uint64_t mask, const uint8_t *p)
{
    uint8_t v[64];
    for (int i = 0; i < 64; i++)
        v[i] = mask >> i & 1 ? p[i] : 0;
    return simde_mm512_loadu_si512(v);
}

static inline void emulated_mask_storeu_ps(float *p, uint16_t mask, __m512 a)
{
    LANES(float, 16, v, a);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            p[i] = v[i];
}

/* SIMDe's reads all eight floats, also past the end of a buffer. */
static inline __m256 emulated_maskload_ps(const float *p, __m256i mask)
{
    LANES(int32_t, 8, m, mask);
    float v[8];
    for (int i = 0; i < 8; i++)
        v[i] = m[i] < 0 ? p[i] : 0;
    return simde_mm256_loadu_ps(v);
}

static inline __m256 emulated_extractf32x8_ps(__m512 a, int half)
{
    LANES(float, 16, v, a);
    return simde_mm256_loadu_ps(v + 8 * half);
}

/* Quarters of vectors: two of a, then two of b. */
static inline __m512 emulated_shuffle_f32x4(__m512 a, __m512 b, unsigned pick)
{
    LANES(float, 16, x, a);
    LANES(float, 16, y, b);
    float r[16];
    for (int i = 0; i < 16; i++)
        r[i] = (i < 8 ? x : y)[4 * (pick >> i / 4 * 2 & 3) + (unsigned)i % 4];
    return emulated_from_f32(r);
}

/* ---------------------------------------------------------------------------------- BF16 -- */

/* Both conversions and products take subnormal numbers for 0. */
static inline float emulated_daz(float x)
{
    return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x;
}

static inline __m512i emulated_cvtne2ps_pbh(__m512 high, __m512 low)
{
    LANES(float, 16, x, low);
    LANES(float, 16, y, high);
    uint16_t r[32];
    for (int i = 0; i < 32; i++)
        r[i] = bf16_of_f32(emulated_daz(i < 16 ? x[i] : y[i - 16]));
    return simde_mm512_loadu_si512(r);
}

static inline void emulated_dpbf16(float *acc, const uint16_t *a, const uint16_t *b, int n)
{
    for (int i = 0; i < n; i++)
        for (int k = 2 * i + 1; k >= 2 * i; k--)
            acc[i] = emulated_daz(fmaf(emulated_daz(f32_of_bf16(a[k])),
                                       emulated_daz(f32_of_bf16(b[k])), emulated_daz(acc[i])));
}

static inline __m256 emulated_dpbf16_256(__m256 acc, __m256i a, __m256i b)
{
    LANES(float, 8, z, acc);
    LANES(uint16_t, 16, x, a);
    LANES(uint16_t, 16, y, b);
    emulated_dpbf16(z, x, y, 8);
    return simde_mm256_loadu_ps(z);
}

static inline __m512 emulated_dpbf16_512(__m512 acc, __m512i a, __m512i b)
{
    LANES(float, 16, z, acc);
    LANES(uint16_t, 32, x, a);
    LANES(uint16_t, 32, y, b);
    emulated_dpbf16(z, x, y, 16);
    return emulated_from_f32(z);
}

/* SIMDe's leaves the number as it is where the sign is 0. */
static inline __m256i emulated_sign_epi16(__m256i a, __m256i b)
{
    LANES(int16_t, 16, x, a);
    LANES(int16_t, 16, y, b);
    for (int i = 0; i < 16; i++)
        x[i] = (int16_t)(y[i] < 0 ? -x[i] : y[i] > 0 ? x[i] : 0);
    return simde_mm256_loadu_epi16(x);
}

#undef _mm256_sign_epi16
#define _mm256_sign_epi16 emulated_sign_epi16

/* SIMDe's sums are rounded in another order. */
#undef _mm256_dpbf16_ps
#undef _mm512_dpbf16_ps
#define __m256bh __m256i
#define __m512bh __m512i
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm256_dpbf16_ps emulated_dpbf16_256
#define _mm512_dpbf16_ps emulated_dpbf16_512

#undef _mm256_maskload_ps
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4
#define _mm256_maskload_ps emulated_maskload_ps
#define _mm512_mulhi_epu16 emulated_mulhi_epu16
#define _mm512_srai_epi32 emulated_srai_epi32
#define _mm512_mask_sllv_epi32 emulated_mask_sllv_epi32
#define _mm512_cmplt_epi32_mask emulated_cmplt_epi32_mask
#define _mm512_mask_loadu_ps emulated_mask_loadu_ps
#define _mm512_maskz_loadu_ps(mask, p) emulated_mask_loadu_ps(simde_mm512_setzero_ps(), mask, p)
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps

#undef LANES
#endif

#endif
