/* convert/sha256.c - SHA-256 (FIPS 180-4), for the receipt: what a model was made from is named by
 * the checksum that model hubs publish. */
#ifndef MOE_CONVERT_SHA256_C
#define MOE_CONVERT_SHA256_C

#include "convert.h"

#if MOE_X86
#include <cpuid.h>
#endif

/* Takes n blocks of 64 bytes in. */
typedef void sha256_blocks_fn(uint32_t state[8], const uint8_t *p, size_t n);

typedef struct sha256 {
    uint32_t state[8];
    sha256_blocks_fn *blocks;
    uint64_t bytes;
    uint8_t rest[64];
} sha256;

static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

MOE_INLINE uint32_t sha256_rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

/* A round: what changes is the fourth and the eighth of the eight words, whose roles then move on
 * by one. */
MOE_INLINE void sha256_round(uint32_t a, uint32_t b, uint32_t c, uint32_t *d, uint32_t e,
                             uint32_t f, uint32_t g, uint32_t *h, uint32_t kw)
{
    const uint32_t t1 = *h + (sha256_rotate(e, 6) ^ sha256_rotate(e, 11) ^ sha256_rotate(e, 25)) +
                        ((e & f) ^ (~e & g)) + kw;
    const uint32_t t2 = (sha256_rotate(a, 2) ^ sha256_rotate(a, 13) ^ sha256_rotate(a, 22)) +
                        ((a & b) ^ (a & c) ^ (b & c));
    *d += t1;
    *h = t1 + t2;
}

static void sha256_blocks_c(uint32_t state[8], const uint8_t *p, size_t n)
{
    for (; n; n--, p += 64) {
        uint32_t w[64];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
                   (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            const uint32_t x = w[i - 15], y = w[i - 2];
            w[i] = w[i - 16] + (sha256_rotate(x, 7) ^ sha256_rotate(x, 18) ^ x >> 3) + w[i - 7] +
                   (sha256_rotate(y, 17) ^ sha256_rotate(y, 19) ^ y >> 10);
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; i += 8) {
            sha256_round(a, b, c, &d, e, f, g, &h, sha256_k[i] + w[i]);
            sha256_round(h, a, b, &c, d, e, f, &g, sha256_k[i + 1] + w[i + 1]);
            sha256_round(g, h, a, &b, c, d, e, &f, sha256_k[i + 2] + w[i + 2]);
            sha256_round(f, g, h, &a, b, c, d, &e, sha256_k[i + 3] + w[i + 3]);
            sha256_round(e, f, g, &h, a, b, c, &d, sha256_k[i + 4] + w[i + 4]);
            sha256_round(d, e, f, &g, h, a, b, &c, sha256_k[i + 5] + w[i + 5]);
            sha256_round(c, d, e, &f, g, h, a, &b, sha256_k[i + 6] + w[i + 6]);
            sha256_round(b, c, d, &e, f, g, h, &a, sha256_k[i + 7] + w[i + 7]);
        }
        const uint32_t out[8] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; i++)
            state[i] += out[i];
    }
}

#if MOE_X86

/* The processor's own rounds, two at a time; they want the words as (f, e, b, a) and (h, g, d,
 * c). */
__attribute__((target("sha,sse4.1"))) static void sha256_blocks_x86(uint32_t state[8],
                                                                     const uint8_t *p, size_t n)
{
    const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xb1);
    const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1b);
    __m128i abef = _mm_alignr_epi8(badc, hgfe, 8), cdgh = _mm_blend_epi16(hgfe, badc, 0xf0);
    for (; n; n--, p += 64) {
        const __m128i abef_0 = abef, cdgh_0 = cdgh;
        __m128i w[4];
        for (int i = 0; i < 16; i++) {
            __m128i *now = &w[i & 3];
            if (i < 4) {
                *now = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 16 * i)), order);
            } else {
                const __m128i last = w[(i + 3) & 3], between = w[(i + 2) & 3];
                const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(*now, w[(i + 1) & 3]),
                                                  _mm_alignr_epi8(last, between, 4));
                *now = _mm_sha256msg2_epu32(sum, last);
            }
            const __m128i kw = _mm_add_epi32(
                *now, _mm_loadu_si128((const __m128i *)(sha256_k + 4 * i)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, kw);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(kw, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_0);
        cdgh = _mm_add_epi32(cdgh, cdgh_0);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

/* Whether the processor has these instructions: leaf 7 of CPUID, and SSE4.1 in leaf 1. */
static bool sha256_has_x86(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 19 & 1))
        return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

#endif

static sha256_blocks_fn *sha256_select(void)
{
#if MOE_X86
    if (sha256_has_x86())
        return sha256_blocks_x86;
#endif
    return sha256_blocks_c;
}

static void sha256_begin(sha256 *s)
{
    *s = (sha256){.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
                            0x1f83d9ab, 0x5be0cd19}, .blocks = sha256_select()};
}

static void sha256_add(sha256 *s, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    while (bytes) {
        const size_t held = (size_t)(s->bytes % 64);
        size_t n = MOE_MIN(bytes, 64 - held);
        if (n == 64) {
            n = bytes - bytes % 64;
            s->blocks(s->state, p, n / 64);
        } else {
            memcpy(s->rest + held, p, n);
            if (held + n == 64)
                s->blocks(s->state, s->rest, 1);
        }
        s->bytes += n;
        p += n;
        bytes -= n;
    }
}

/* Writes 64 hexadecimal digits, without a NUL. */
static void sha256_end(sha256 *s, char text[64])
{
    const uint64_t bits = s->bytes * 8;
    uint8_t pad[72] = {0x80};
    const size_t n = (size_t)(s->bytes % 64 < 56 ? 56 - s->bytes % 64 : 120 - s->bytes % 64);
    for (int i = 0; i < 8; i++)
        pad[n + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
    sha256_add(s, pad, n + 8);
    for (int i = 0; i < 64; i++)
        text[i] = "0123456789abcdef"[s->state[i / 8] >> (28 - 4 * (i % 8)) & 15];
}

#endif
