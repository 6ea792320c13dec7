/* quant/arm_k.h - what the NEON kernels of the formats with superblocks of 256 weights share: the
 * loops over rows, superblocks and tokens. A format brings two functions, struct arm_k_format. What
 * arm.h says of the order of weights and of its engines holds here too.
 *
 * Must never: read a byte outside a row, or compute a float in another order than the C kernel. */
#ifndef MOE_QUANT_ARM_K_H
#define MOE_QUANT_ARM_K_H

#include "arm.h"
#include "k.h"

#if MOE_ARM64

typedef struct arm_k_format {
    size_t block_bytes;
    size_t d_at;   // where d stands in the block, and dmin behind it
    size_t group;  // weights that share a scale: 16 or 32
    bool min;      // d * sum of scale * products - dmin * sum of min * sums, or no second part
    /* The integer scales and minima of a superblock, by group. */
    void (*scales)(const uint8_t *block, int8x16_t *scale, int8x16_t *min);
    /* Unpacks weights 128 half .. 128 half + 127. */
    void (*codes)(const uint8_t *block, size_t half, int8x16_t code[8]);
    float (*d)(const uint8_t *block); // what d is instead of binary16 at d_at; or NULL
} arm_k_format;

/* d of 4 rows. */
MOE_INLINE float32x4_t arm_k_d(const uint8_t *const row[4], size_t at, const arm_k_format *f)
{
    if (!f->d)
        return arm_f16x4(row, at + f->d_at);
    const float d[4] = {f->d(row[0] + at), f->d(row[1] + at), f->d(row[2] + at), f->d(row[3] + at)};
    return vld1q_f32(d);
}

/* acc + the part of one superblock of 4 rows: the expression of the formats. */
MOE_INLINE float32x4_t arm_k_add(const arm_k_format *f, int32x4_t dot, int32x4_t min, float32x4_t d,
                                 float32x4_t dmin, float32x4_t x_scale, float32x4_t acc)
{
    if (!f->min)
        return vfmaq_f32(acc, vmulq_f32(x_scale, d), vcvtq_f32_s32(dot));
    float32x4_t term = vmulq_f32(d, vcvtq_f32_s32(dot));
    term = vfmsq_f32(term, dmin, vcvtq_f32_s32(min));
    return vfmaq_f32(acc, x_scale, term);
}

/* The 6-bit scales and minima of Q4_K and Q5_K: p[12] as k.h says. */
MOE_INLINE void arm_k_scales6(const uint8_t *p, int8x16_t *scale, int8x16_t *min)
{
    uint32_t a, b, c;
    memcpy(&a, p, 4);
    memcpy(&b, p + 4, 4);
    memcpy(&c, p + 8, 4);
    const uint64_t scale_high = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
    const uint64_t min_high = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
    const int8x8_t zero = vdup_n_s8(0);
    *scale = vcombine_s8(vcreate_s8((a & 0x3f3f3f3f) | scale_high << 32), zero);
    *min = vcombine_s8(vcreate_s8((b & 0x3f3f3f3f) | min_high << 32), zero);
}

/* -------------------------------------------------------------------------------- one token -- */

/* 16 bytes as four vectors. */
MOE_INLINE void arm_k_widen(int8x16_t v, int32x4_t out[4])
{
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
    out[0] = vmovl_s16(vget_low_s16(low));
    out[1] = vmovl_high_s16(low);
    out[2] = vmovl_s16(vget_low_s16(high));
    out[3] = vmovl_high_s16(high);
}

/* acc + the products of 4 groups, each times its scale; group16 vectors of codes are a group. */
MOE_INLINE int32x4_t arm_k_dot4(int32x4_t acc, const int8x16_t *code, const int8_t *q,
                                size_t group16, int32x4_t scale, arm_dot_fn *dot)
{
    int32x4_t part[4];
    MOE_UNROLL
    for (size_t g = 0; g < 4; g++) {
        part[g] = vdupq_n_s32(0);
        MOE_UNROLL
        for (size_t i = group16 * g; i < group16 * (g + 1); i++)
            part[g] = dot(part[g], code[i], vld1q_s8(q + 16 * i));
    }
    acc = vmlaq_laneq_s32(acc, part[0], scale, 0);
    acc = vmlaq_laneq_s32(acc, part[1], scale, 1);
    acc = vmlaq_laneq_s32(acc, part[2], scale, 2);
    return vmlaq_laneq_s32(acc, part[3], scale, 3);
}

/* Numbers whose sum is that of minima times activations. */
MOE_INLINE int32x4_t arm_k_min_dot(int8x16_t min, const int16_t *sum, const arm_k_format *f)
{
    int16x8_t s0 = vld1q_s16(sum), s1 = vld1q_s16(sum + 8);
    const int16x8_t m0 = vmovl_s8(vget_low_s8(min)), m1 = vmovl_high_s8(min);
    if (f->group == 32)
        s0 = vpaddq_s16(s0, s1);
    int32x4_t v = vmlal_high_s16(vmull_s16(vget_low_s16(m0), vget_low_s16(s0)), m0, s0);
    if (f->group == 16)
        v = vmlal_high_s16(vmlal_s16(v, vget_low_s16(m1), vget_low_s16(s1)), m1, s1);
    return v;
}

/* A superblock times 256 activations: numbers whose sums are the integers of the expression. */
MOE_INLINE void arm_k_dot_row(const uint8_t *block, const int8_t *q, const int16_t *sum,
                              const arm_k_format *f, arm_dot_fn *dot, int32x4_t *out,
                              int32x4_t *out_min)
{
    int8x16_t scale, min, code[8];
    int32x4_t s[4], acc[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    f->scales(block, &scale, &min);
    arm_k_widen(scale, s);
    MOE_UNROLL
    for (size_t half = 0; half < 2; half++) {
        const int8_t *x = q + 128 * half;
        f->codes(block, half, code);
        if (f->group == 32) {
            acc[half] = arm_k_dot4(acc[half], code, x, 2, s[half], dot);
        } else {
            acc[0] = arm_k_dot4(acc[0], code, x, 1, s[2 * half], dot);
            acc[1] = arm_k_dot4(acc[1], code + 4, x + 64, 1, s[2 * half + 1], dot);
        }
    }
    *out = vaddq_s32(acc[0], acc[1]);
    *out_min = f->min ? arm_k_min_dot(min, sum, f) : *out;
}

MOE_INLINE void arm_k_gemv(const moe_mm *mm, const arm_k_format *f, arm_dot_fn *dot)
{
    const moe_q8 x = act_q8(MOE_ACT_Q8_256, mm->x, mm->n_in);
    const size_t n_block = mm->n_in / K_LEN;
    for (size_t r = 0; r < mm->n_row; r += 4) {
        const uint8_t *row[4];
        arm_rows(mm, r, 4, row);
        uintptr_t next = (uintptr_t)row[0] + 4 * mm->w_stride;
        float32x4_t acc = vdupq_n_f32(0);
        for (size_t b = 0; b < n_block; b++, next += 4 * f->block_bytes) {
            const size_t at = b * f->block_bytes;
            int32x4_t sum[4], min[4];
            arm_prefetch(next, 4 * f->block_bytes);
            for (size_t i = 0; i < 4; i++)
                arm_k_dot_row(row[i] + at, x.q + K_LEN * b, x.sum + 16 * b, f, dot, &sum[i],
                              &min[i]);
            const float32x4_t d = arm_k_d(row, at, f);
            const float32x4_t dmin = f->min ? arm_f16x4(row, at + f->d_at + 2) : d;
            acc = arm_k_add(f, arm_sum4(sum[0], sum[1], sum[2], sum[3]),
                            arm_sum4(min[0], min[1], min[2], min[3]), d, dmin,
                            vld1q_dup_f32(x.scale + b), acc);
        }
        arm_store_rows(mm->y + r, acc, mm->n_row - r);
    }
}

/* ------------------------------------------------------------------------------ many tokens -- */

/* A superblock of 8 rows. */
typedef struct arm_k_tile {
    int8x16_t code[K_LEN / 2];   // 16 slices
    int32x4_t scale[16][2];      // [group][row]
    int16x8_t min[16];           // [group][row]
    float32x4_t d[2], dmin[2];   // [row]
} arm_k_tile;

/* Bytes by row to bytes by group: out[i] holds groups 2i and 2i + 1 of 8 rows. */
MOE_INLINE void arm_k_transpose(const int8x16_t row[8], int8x16_t out[8])
{
    int8x16_t a[8], b[8];
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) { /* rows i, i + 4; groups 0..7, 8..15 */
        a[i] = vzip1q_s8(row[i], row[i + 4]);
        a[4 + i] = vzip2q_s8(row[i], row[i + 4]);
    }
    MOE_UNROLL
    for (size_t i = 0; i < 2; i++) /* rows i, i + 2, i + 4, i + 6; 4 groups each */
        MOE_UNROLL
        for (size_t h = 0; h < 2; h++) {
            b[4 * h + i] = vzip1q_s8(a[4 * h + i], a[4 * h + i + 2]);
            b[4 * h + 2 + i] = vzip2q_s8(a[4 * h + i], a[4 * h + i + 2]);
        }
    MOE_UNROLL
    for (size_t i = 0; i < 4; i++) {
        out[2 * i] = vzip1q_s8(b[2 * i], b[2 * i + 1]);
        out[2 * i + 1] = vzip2q_s8(b[2 * i], b[2 * i + 1]);
    }
}

MOE_INLINE void arm_k_load_scales(const uint8_t *const row[8], size_t at, const arm_k_format *f,
                                  arm_k_tile *tile)
{
    int8x16_t scale[8], min[8], scales[8], mins[8];
    for (size_t r = 0; r < 8; r++) {
        f->scales(row[r] + at, &scale[r], &min[r]);
        if (!f->min)
            min[r] = vdupq_n_s8(0);
    }
    arm_k_transpose(scale, scales);
    arm_k_transpose(min, mins);
    const size_t n_pair = K_LEN / f->group / 2;
    MOE_UNROLL
    for (size_t i = 0; i < n_pair; i++) {
        int32x4_t wide[4];
        arm_k_widen(scales[i], wide);
        tile->scale[2 * i][0] = wide[0];
        tile->scale[2 * i][1] = wide[1];
        tile->scale[2 * i + 1][0] = wide[2];
        tile->scale[2 * i + 1][1] = wide[3];
        tile->min[2 * i] = vmovl_s8(vget_low_s8(mins[i]));
        tile->min[2 * i + 1] = vmovl_high_s8(mins[i]);
    }
    MOE_UNROLL
    for (size_t h = 0; h < 2; h++) {
        tile->d[h] = arm_k_d(row + 4 * h, at, f);
        tile->dmin[h] = f->min ? arm_f16x4(row + 4 * h, at + f->d_at + 2) : tile->d[h];
    }
}

MOE_INLINE void arm_k_load(const uint8_t *const row[8], size_t at, const arm_k_format *f,
                           const arm_engine *e, arm_k_tile *tile)
{
    for (size_t half = 0; half < 2; half++) {
        int8x16_t code[8][8];
        for (size_t r = 0; r < 8; r++)
            f->codes(row[r] + at, half, code[r]);
        for (size_t i = 0; i < 8; i++) {
            const int8x16_t slice[8] = {code[0][i], code[1][i], code[2][i], code[3][i],
                                        code[4][i], code[5][i], code[6][i], code[7][i]};
            e->pack(slice, tile->code + 64 * half + 8 * i);
        }
    }
    arm_k_load_scales(row, at, f, tile);
}

/* Minima times activations, for 8 rows. */
MOE_INLINE void arm_k_min_sum(const arm_k_tile *tile, const int16_t *sum, const arm_k_format *f,
                              int32x4_t out[2])
{
    const size_t n_group = K_LEN / f->group;
    out[0] = out[1] = vdupq_n_s32(0);
    MOE_UNROLL
    for (size_t g = 0; g < n_group; g++) {
        const size_t at = g * f->group / 16;
        const int16_t s = (int16_t)(f->group == 16 ? sum[at] : sum[at] + sum[at + 1]);
        out[0] = vmlal_n_s16(out[0], vget_low_s16(tile->min[g]), s);
        out[1] = vmlal_high_n_s16(out[1], tile->min[g], s);
    }
}

/* acc[t] += tile * superblock b of token t, for n_tok (constant, <= 4) tokens. */
MOE_INLINE void arm_k_step(const arm_k_tile *tile, const moe_q8 *x, size_t b, size_t n_tok,
                           const arm_k_format *f, const arm_engine *e, float32x4_t (*acc)[2])
{
    const int8_t *q[4];
    int32x4_t sum[8], dot[4][2];
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++)
        q[t] = x[t].q + K_LEN * b;
    MOE_UNROLL
    for (size_t i = 0; i < n_tok * e->n_sum; i++)
        sum[i] = vdupq_n_s32(0);
    for (size_t g = 0; g < K_LEN / f->group; g++) {
        int32x4_t part[8];
        MOE_UNROLL
        for (size_t i = 0; i < n_tok * e->n_sum; i++)
            part[i] = vdupq_n_s32(0);
        MOE_UNROLL
        for (size_t k = 0; k < f->group; k += 16)
            e->dot(tile->code + (g * f->group + k) / 2, q, g * f->group + k, n_tok, part);
        e->scale(part, tile->scale[g], n_tok, sum);
    }
    e->finish(sum, n_tok, dot);
    MOE_UNROLL
    for (size_t t = 0; t < n_tok; t++) {
        const float32x4_t x_scale = vld1q_dup_f32(x[t].scale + b);
        int32x4_t min[2] = {dot[t][0], dot[t][1]};
        if (f->min)
            arm_k_min_sum(tile, x[t].sum + 16 * b, f, min);
        MOE_UNROLL
        for (size_t h = 0; h < 2; h++)
            acc[t][h] = arm_k_add(f, dot[t][h], min[h], tile->d[h], tile->dmin[h], x_scale,
                                  acc[t][h]);
    }
}

MOE_INLINE void arm_k_gemm_tokens(const moe_mm *mm, size_t t0, size_t n_tok, const arm_k_format *f,
                                  const arm_engine *e)
{
    moe_q8 x[ARM_TOKENS + 1];
    arm_tokens(mm, MOE_ACT_Q8_256, t0, n_tok, x);
    for (size_t r = 0; r < mm->n_row; r += 8) {
        const uint8_t *row[8];
        arm_rows(mm, r, 8, row);
        float32x4_t acc[ARM_TOKENS + 1][2];
        memset(acc, 0, (n_tok + 1) * sizeof acc[0]);
        const uintptr_t next = (uintptr_t)row[0] + 8 * mm->w_stride;
        for (size_t b = 0; b < mm->n_in / K_LEN; b++) {
            arm_k_tile tile;
            arm_prefetch(next + b * 8 * f->block_bytes, 8 * f->block_bytes);
            arm_k_load(row, b * f->block_bytes, f, e, &tile);
            size_t t = 0;
            for (; t + e->n_tok <= n_tok; t += e->n_tok)
                arm_k_step(&tile, x + t, b, e->n_tok, f, e, acc + t);
            for (; e->n_tok > 2 && t < n_tok; t += 2)
                arm_k_step(&tile, x + t, b, 2, f, e, acc + t);
        }
        arm_store_tokens(mm, r, t0, n_tok, acc);
    }
}

MOE_INLINE void arm_k_gemm(const moe_mm *mm, const arm_k_format *f, const arm_engine *e,
                           moe_mm_fn *gemv)
{
    if (mm->n_tok < ARM_TOKENS_MIN) {
        arm_gemm_few(mm, gemv);
        return;
    }
    for (size_t t = 0; t < mm->n_tok; t += ARM_TOKENS)
        arm_k_gemm_tokens(mm, t, MOE_MIN(mm->n_tok - t, (size_t)ARM_TOKENS), f, e);
}

#endif
#endif
