/* convert/literals.c - bytes -> blocks of a Zstandard frame that hold literals only, in Huffman
 * codes (RFC 8878, section 3.1.1).
 *
 * The bytes of quantized weights are skewed but do not repeat: what a match saves is less than what
 * it costs. zstd's own encoder holds bytes as nearly even as pairs of MXFP4's codes for
 * incompressible at a glance, and leaves 3 % of them there; this one counts. Its codes are the best
 * that have at most 11 bits. A block takes the codes of the one before it if that is shorter.
 *
 * Owns nothing. In: a block's bytes; out: the block, at most as many bytes and its header of 3.
 * Must never: make what a decoder of that standard does not read. */
#ifndef MOE_CONVERT_LITERALS_C
#define MOE_CONVERT_LITERALS_C

#include "../core/base.h"

enum {
    LIT_BLOCK_BYTES = 128 << 10, // the largest block of a frame
    LIT_MAX_BITS = 11,           // of a code
    LIT_MAX_WEIGHT = 11,         // max_bits + 1 - bits
    LIT_ONE_STREAM = 1 << 10,    // shorter blocks are one stream, longer ones four
    LIT_SMALL_BYTES = 1 << 12,   // small blocks gain by shorter codes, whose tree is smaller
    LIT_SMALL_BITS = 9,          // where that begins
    LIT_MIN_BYTES = 128,         // shorter blocks are not coded
    LIT_BLOCK_EXTRA = 64         // that writing a block may take beyond its bytes
};

/* A code for each byte. */
typedef struct lit_codes {
    uint8_t bits[256];  // 0: it has none
    uint16_t code[256];
} lit_codes;

/* ------------------------------------------------------------------------------- lengths -- */

typedef struct lit_item {
    uint32_t count;
    uint8_t symbol;
} lit_item;

static int lit_compare(const void *a, const void *b)
{
    const lit_item *x = a, *y = b;
    return x->count != y->count ? (x->count > y->count) - (x->count < y->count)
                                : x->symbol - y->symbol;
}

/* The lengths of the best codes of at most max_bits bits, for 2 <= n <= 1 << max_bits symbols in
 * the order of their counts: package-merge (Larmore and Hirschberg 1990). Level by level, the list
 * of packages is merged with the symbols, and neighbours are packed; the first 2 n - 2 items of the
 * last list are taken, with all that is packed in them. A symbol is as long as it was often
 * taken. */
static void lit_lengths(const lit_item *items, size_t n, int max_bits, uint8_t bits[256])
{
    static const uint32_t none = UINT32_MAX;
    uint32_t list[512], packed[256];
    bool is_symbol[LIT_MAX_BITS][512];
    size_t n_packed = 0;
    for (int level = 0; level < max_bits; level++) {
        size_t s = 0, p = 0, k = 0;
        for (; s < n || p < n_packed; k++) {
            const uint32_t symbol = s < n ? items[s].count : none;
            const uint32_t package = p < n_packed ? packed[p] : none;
            is_symbol[level][k] = symbol <= package && s < n;
            list[k] = is_symbol[level][k] ? symbol : package;
            s += is_symbol[level][k];
            p += !is_symbol[level][k];
        }
        n_packed = k / 2;
        for (size_t i = 0; i < n_packed; i++)
            packed[i] = list[2 * i] + list[2 * i + 1];
    }
    memset(bits, 0, 256);
    for (size_t level = (size_t)max_bits, taken = 2 * n - 2; level-- && taken;) {
        size_t symbols = 0;
        for (size_t i = 0; i < taken; i++)
            symbols += is_symbol[level][i];
        for (size_t i = 0; i < symbols; i++)
            bits[items[i].symbol]++;
        taken = 2 * (taken - symbols);
    }
}

/* Codes by their lengths: the longest have the lowest values, those of one length in the symbols'
 * order. */
static void lit_number(lit_codes *c)
{
    uint16_t n[LIT_MAX_BITS + 1] = {0}, next[LIT_MAX_BITS + 1], code = 0;
    for (int i = 0; i < 256; i++)
        n[c->bits[i]]++;
    for (int bits = LIT_MAX_BITS; bits; bits--) {
        next[bits] = code;
        code = (uint16_t)((code + n[bits]) >> 1);
    }
    for (int i = 0; i < 256; i++)
        if (c->bits[i])
            c->code[i] = next[c->bits[i]]++;
}

/* --------------------------------------------------------------------------------- bits -- */

/* Bits from the lowest on. They are read from the end: what is put last is read first. */
typedef struct lit_bits {
    uint8_t *to;
    uint64_t held;
    unsigned n;
} lit_bits;

MOE_INLINE void lit_put(lit_bits *b, uint64_t value, unsigned n)
{
    b->held |= value << b->n;
    b->n += n;
}

/* Leaves less than 8 bits. */
MOE_INLINE void lit_flush(lit_bits *b)
{
    memcpy(b->to, &b->held, 8);
    b->to += b->n / 8;
    b->held >>= b->n / 8 * 8;
    b->n %= 8;
}

/* The end, which a reader finds by its highest bit. */
static uint8_t *lit_close(lit_bits *b)
{
    lit_put(b, 1, 1);
    lit_flush(b);
    return b->to + (b->n > 0);
}

/* --------------------------------------------------------------------------------- tree -- */

/* How often each weight comes, out of 1 << log: FSE's table of a tree's weights. */
typedef struct lit_fse {
    int log;
    uint16_t share[LIT_MAX_WEIGHT + 1];
    uint8_t state[LIT_MAX_WEIGHT + 1][64]; // of a weight, by its index from share on
} lit_fse;

/* Shares for n weights, each at least 1 if it comes. */
static void lit_share(lit_fse *f, const uint8_t *weights, size_t n)
{
    const int size = 1 << f->log;
    int count[LIT_MAX_WEIGHT + 1] = {0}, sum = 0;
    for (size_t i = 0; i < n; i++)
        count[weights[i]]++;
    for (int w = 0; w <= LIT_MAX_WEIGHT; w++) {
        const int share = (count[w] * size * 2 + (int)n) / (2 * (int)n);
        f->share[w] = (uint16_t)(count[w] ? MOE_MAX(share, 1) : 0);
        sum += f->share[w];
    }
    while (sum != size) { // the largest can best do with one less or more
        int most = 0;
        for (int w = 1; w <= LIT_MAX_WEIGHT; w++)
            if (f->share[w] > f->share[most])
                most = w;
        f->share[most] = (uint16_t)(f->share[most] + (sum < size ? 1 : -1));
        sum += sum < size ? 1 : -1;
    }
}

/* Spreads the weights over the states. */
static void lit_spread(lit_fse *f)
{
    const int size = 1 << f->log, step = size / 2 + size / 8 + 3;
    uint8_t weight[64], next[LIT_MAX_WEIGHT + 1] = {0};
    for (int w = 0, at = 0; w <= LIT_MAX_WEIGHT; w++)
        for (int k = 0; k < f->share[w]; k++, at = (at + step) % size)
            weight[at] = (uint8_t)w;
    for (int i = 0; i < size; i++)
        f->state[weight[i]][next[weight[i]]++] = (uint8_t)i;
}

/* The table, as the standard has it: shares in as few bits as what is left of them allows. */
static uint8_t *lit_put_shares(const lit_fse *f, uint8_t *dst)
{
    lit_bits b = {.to = dst};
    int left = (1 << f->log) + 1, power = 1 << f->log;
    unsigned width = (unsigned)f->log + 1;
    lit_put(&b, (uint64_t)f->log - 5, 4);
    for (int w = 0; left > 1; w++) {
        const int spare = 2 * power - 1 - left; // so many of the lowest take a bit less
        int value = f->share[w] + 1;
        left -= f->share[w];
        if (value >= power)
            value += spare;
        lit_put(&b, (uint64_t)value, width - (value < spare));
        if (!f->share[w]) { // how many more of none follow, by threes
            int more = 0;
            while (!f->share[w + 1 + more])
                more++;
            w += more;
            for (; more >= 3; more -= 3)
                lit_put(&b, 3, 2);
            lit_put(&b, (uint64_t)more, 2);
        }
        for (; left < power; power /= 2)
            width--;
        lit_flush(&b);
    }
    return b.to + (b.n > 0);
}

/* n >= 2 weights by two states in turn, from the end; returns the bytes with the table. */
static size_t lit_put_fse(const lit_fse *f, uint8_t *dst, const uint8_t *weights, size_t n)
{
    lit_bits b = {.to = lit_put_shares(f, dst)};
    unsigned state[2];
    for (size_t i = n; i-- > 0;) {
        const uint8_t w = weights[i];
        unsigned *x = &state[i % 2], bits = 0, share = f->share[w], index = share;
        if (i + 2 < n) { // the state goes to one of the weight's, and what does not fit is put out
            const unsigned full = *x + (1u << f->log);
            while (full >> bits >= 2 * share)
                bits++;
            lit_put(&b, full & ((1u << bits) - 1), bits);
            index = full >> bits;
        }
        *x = f->state[w][index - share];
        lit_flush(&b);
    }
    lit_put(&b, state[1], (unsigned)f->log);
    lit_put(&b, state[0], (unsigned)f->log);
    return (size_t)(lit_close(&b) - dst);
}

/* The description of codes: weights of all symbols but the last, whose own follows from them.
 * Returns its bytes; 0 if they cannot be described. dst has room for 512. */
static size_t lit_put_tree(const lit_codes *c, uint8_t *dst)
{
    uint8_t weights[256] = {0}, longest = 0, best[256];
    size_t n = 0, bytes = 0;
    bool even = true;
    for (size_t i = 0; i < 256; i++)
        longest = MOE_MAX(longest, c->bits[i]);
    for (size_t i = 0; i < 256; i++) {
        weights[i] = (uint8_t)(c->bits[i] ? longest + 1 - c->bits[i] : 0);
        n = c->bits[i] ? i : n;
    }
    for (size_t i = 1; i < n; i++)
        even &= weights[i] == weights[0];
    for (int log = 5; log <= 6 && !even; log++) {
        lit_fse f = {.log = log};
        lit_share(&f, weights, n);
        lit_spread(&f);
        const size_t some = lit_put_fse(&f, dst + 1, weights, n);
        if (some < 128 && (!bytes || some < bytes - 1)) {
            bytes = 1 + some;
            memcpy(best + 1, dst + 1, some);
            best[0] = (uint8_t)some;
        }
    }
    if (n <= 128 && (!bytes || 1 + (n + 1) / 2 < bytes)) { // as they are, in 4 bits
        bytes = 1 + (n + 1) / 2;
        best[0] = (uint8_t)(127 + n);
        for (size_t i = 0; i < n; i += 2)
            best[1 + i / 2] = (uint8_t)(weights[i] << 4 | (i + 1 < n ? weights[i + 1] : 0));
    }
    memcpy(dst, best, bytes);
    return bytes;
}

/* ------------------------------------------------------------------------------- streams -- */

/* The codes of n bytes; returns their end. Up to 8 bytes behind it are overwritten. */
static uint8_t *lit_put_stream(const lit_codes *c, uint8_t *dst, const uint8_t *src, size_t n)
{
    lit_bits b = {.to = dst};
    for (; n % 4; n--)
        lit_put(&b, c->code[src[n - 1]], c->bits[src[n - 1]]);
    lit_flush(&b);
    for (; n; n -= 4) {
        for (size_t i = 1; i <= 4; i++)
            lit_put(&b, c->code[src[n - i]], c->bits[src[n - i]]);
        lit_flush(&b);
    }
    return lit_close(&b);
}

/* All streams: one, or four with the sizes of three in front. */
static size_t lit_put_streams(const lit_codes *c, uint8_t *dst, const uint8_t *src, size_t n)
{
    if (n < LIT_ONE_STREAM)
        return (size_t)(lit_put_stream(c, dst, src, n) - dst);
    const size_t each = (n + 3) / 4;
    uint8_t *at = dst + 6;
    for (size_t i = 0; i < 4; i++) {
        uint8_t *end = lit_put_stream(c, at, src + i * each, MOE_MIN(each, n - i * each));
        if (i < 3)
            memcpy(dst + 2 * i, &(uint16_t){(uint16_t)(end - at)}, 2);
        at = end;
    }
    return (size_t)(at - dst);
}

/* -------------------------------------------------------------------------------- blocks -- */

static void lit_count(uint32_t counts[256], const uint8_t *src, size_t n)
{
    uint32_t part[4][256] = {{0}}; // equal neighbours do not wait for each other
    for (size_t i = 0; i < n; i++)
        part[i % 4][src[i]]++;
    for (size_t i = 0; i < 256; i++)
        counts[i] = part[0][i] + part[1][i] + part[2][i] + part[3][i];
}

/* Bits of a block in these codes; UINT64_MAX: one of its bytes has none. */
static uint64_t lit_cost(const lit_codes *c, const uint32_t counts[256])
{
    uint64_t bits = 0;
    for (size_t i = 0; i < 256; i++) {
        if (counts[i] && !c->bits[i])
            return UINT64_MAX;
        bits += (uint64_t)counts[i] * c->bits[i];
    }
    return bits;
}

/* The best codes for a block of n bytes, two or more different ones, and their tree. Returns the
 * bits of both; UINT64_MAX: they have no description, or are no shorter than the bytes. */
static uint64_t lit_make(lit_codes *c, const uint32_t counts[256], size_t n, uint8_t tree[512],
                         size_t *tree_bytes)
{
    const bool small = n <= LIT_SMALL_BYTES;
    lit_item items[256];
    size_t n_items = 0;
    uint64_t best = UINT64_MAX;
    for (size_t i = 0; i < 256; i++)
        if (counts[i])
            items[n_items++] = (lit_item){counts[i], (uint8_t)i};
    qsort(items, n_items, sizeof *items, lit_compare);
    for (int bits = small ? LIT_SMALL_BITS : LIT_MAX_BITS; n_items <= (size_t)1 << bits; bits--) {
        lit_codes some;
        uint8_t room[512];
        lit_lengths(items, n_items, bits, some.bits);
        const uint64_t cost = lit_cost(&some, counts);
        const size_t bytes = cost < n * 8 ? lit_put_tree(&some, room) : 0;
        if (!bytes || bytes * 8 + cost >= best)
            break;
        best = bytes * 8 + cost;
        *c = some;
        *tree_bytes = bytes;
        memcpy(tree, room, bytes);
        if (!small)
            break;
    }
    if (best < UINT64_MAX)
        lit_number(c);
    return best;
}

/* The header of a block: the last one of a frame is marked later. */
enum { LIT_RAW = 0, LIT_RUN = 1, LIT_CODED = 2 };

static void lit_put_header(uint8_t *dst, unsigned type, size_t bytes)
{
    const uint32_t header = type << 1 | (uint32_t)bytes << 3;
    memcpy(dst, &header, 3);
}

/* A coded block behind its header: how many literals and how long they are, the tree unless the
 * codes are those of before, the streams, and that there are no sequences. */
static size_t lit_put_coded(const lit_codes *c, uint8_t *dst, const uint8_t *src, size_t n,
                            const uint8_t *tree, size_t tree_bytes)
{
    const unsigned format = n < LIT_ONE_STREAM ? 0 : n < 1 << 14 ? 2 : 3;
    const size_t width = format < 2 ? 10 : format == 2 ? 14 : 18, head = (4 + 2 * width + 7) / 8;
    memcpy(dst + head, tree, tree_bytes);
    const size_t bytes = tree_bytes + lit_put_streams(c, dst + head + tree_bytes, src, n);
    const uint64_t header = (tree_bytes ? 2u : 3u) | format << 2 | (uint64_t)n << 4 |
                            (uint64_t)bytes << (4 + width);
    memcpy(dst, &header, head);
    dst[head + bytes] = 0;
    return head + bytes + 1;
}

/* About how many bits a block of n bytes takes with codes of its own. */
static uint64_t lit_estimate(const uint8_t *src, size_t n)
{
    uint32_t counts[256];
    lit_codes codes;
    uint8_t tree[512];
    size_t tree_bytes = 0;
    lit_count(counts, src, n);
    const uint64_t coded = counts[src[0]] == n ? 8 : lit_make(&codes, counts, n, tree, &tree_bytes);
    return (3 + 4) * 8 + MOE_MIN(coded, n * 8); // the header of a block, and of its literals
}

/* A block of n bytes, 1 to LIT_BLOCK_BYTES: coded if that saves 1 %. *last are the codes of the
 * coded block before it in the frame, if any (else zeros), then this one's. dst has room for
 * n + LIT_BLOCK_EXTRA. */
static size_t lit_put_block(lit_codes *last, uint8_t *dst, const uint8_t *src, size_t n)
{
    uint32_t counts[256];
    lit_codes codes;
    uint8_t tree[512];
    lit_count(counts, src, n);
    if (counts[src[0]] == n) {
        lit_put_header(dst, LIT_RUN, n);
        dst[3] = src[0];
        return 4;
    }
    if (n >= LIT_MIN_BYTES) {
        size_t tree_bytes = 0;
        const uint64_t again = lit_cost(last, counts);
        const uint64_t fresh = lit_make(&codes, counts, n, tree, &tree_bytes);
        if (MOE_MIN(fresh, again) < (n - n / 100) * 8) {
            const lit_codes *best = fresh < again ? &codes : last;
            const size_t bytes = lit_put_coded(best, dst + 3, src, n, tree,
                                               fresh < again ? tree_bytes : 0);
            if (bytes < n - n / 100) {
                if (best != last)
                    *last = codes;
                lit_put_header(dst, LIT_CODED, bytes);
                return 3 + bytes;
            }
        }
    }
    lit_put_header(dst, LIT_RAW, n);
    memcpy(dst + 3, src, n);
    return 3 + n;
}

#endif
