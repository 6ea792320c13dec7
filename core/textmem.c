/* core/textmem.c - two ways to hold memory while text is worked on: an arena, freed at once, for
 * what a tokenizer keeps, and a growing buffer for one call's work.
 *
 * Both take from a moe_mem, so the host's allocator and the ceiling hold. Must never: free single
 * pieces. */
#ifndef MOE_CORE_TEXTMEM_C
#define MOE_CORE_TEXTMEM_C

#include "base.h"

typedef struct text_block {
    struct text_block *next;
} text_block;

typedef struct text_arena {
    moe_mem *mem;
    text_block *blocks;
    uint8_t *free;
    size_t free_bytes;
    size_t total_bytes; // of all blocks
} text_arena;

enum { TEXT_BLOCK_BYTES = 1 << 14, TEXT_BLOCK_MAX_BYTES = 1 << 20, TEXT_ALIGN = 16 };

/* n x item_bytes bytes of zeros; NULL if there is no memory. Aligned to 16, but for texts (items of
 * one byte), which come from the end of what is free: a vocabulary is mostly short texts. */
static void *arena_alloc(text_arena *arena, uint64_t n, uint64_t item_bytes)
{
    uint64_t bytes;
    const bool text = item_bytes == 1;
    if (!checked_mul(n, item_bytes, &bytes) ||
        !checked_align(bytes, text ? 1 : TEXT_ALIGN, &bytes))
        return NULL;
    if (bytes > arena->free_bytes) {
        // a quarter of what is there already: few blocks, little waste
        uint64_t want = MOE_MIN(MOE_MAX(arena->total_bytes / 4, (size_t)TEXT_BLOCK_BYTES),
                                (size_t)TEXT_BLOCK_MAX_BYTES);
        bool alone = bytes > want / 2;
        uint64_t block_bytes;
        if (!checked_add(alone ? bytes : want, TEXT_ALIGN, &block_bytes))
            return NULL;
        text_block *block = mem_alloc(arena->mem, block_bytes, 1);
        if (!block)
            return NULL;
        block->next = arena->blocks;
        arena->blocks = block;
        arena->total_bytes += (size_t)block_bytes;
        uint8_t *data = (uint8_t *)block + TEXT_ALIGN;
        if (alone)
            return data;
        arena->free = data;
        arena->free_bytes = (size_t)want;
    }
    arena->free_bytes -= (size_t)bytes;
    if (text)
        return arena->free + arena->free_bytes;
    void *p = arena->free;
    arena->free += bytes;
    return p;
}

/* A copy of n items; behind a text (item_bytes 1) there is a NUL. */
static void *arena_copy(text_arena *arena, const void *items, uint64_t n, uint64_t item_bytes)
{
    void *p = arena_alloc(arena, n + (item_bytes == 1), item_bytes);
    if (p && n)
        memcpy(p, items, (size_t)(n * item_bytes));
    return p;
}

static void arena_free(text_arena *arena)
{
    while (arena->blocks) {
        text_block *block = arena->blocks;
        arena->blocks = block->next;
        mem_free(arena->mem, block);
    }
    arena->free = NULL;
    arena->free_bytes = arena->total_bytes = 0;
}

/* A growing array of bytes. */
typedef struct text_buf {
    moe_mem *mem;
    uint8_t *data;
    size_t n;
    size_t capacity;
    size_t max_bytes; // 0: as many as there are
    bool over;        // more than that were asked for
} text_buf;

/* Makes room for `bytes` more. */
static bool buf_reserve(text_buf *buf, size_t bytes)
{
    if (bytes <= buf->capacity - buf->n)
        return true;
    uint64_t want, twice;
    if (!checked_add(buf->n, bytes, &want) || !checked_mul(buf->capacity, 2, &twice))
        return false;
    if (buf->max_bytes && want > buf->max_bytes) {
        buf->over = true;
        return false;
    }
    want = MOE_MAX(MOE_MAX(want, twice), 256);
    uint8_t *data = mem_alloc_uncleared(buf->mem, want, 1);
    if (!data)
        return false;
    if (buf->n)
        memcpy(data, buf->data, buf->n);
    mem_free(buf->mem, buf->data);
    buf->data = data;
    buf->capacity = (size_t)want;
    return true;
}

static bool buf_append(text_buf *buf, const void *data, size_t bytes)
{
    if (!buf_reserve(buf, bytes))
        return false;
    if (bytes)
        memcpy(buf->data + buf->n, data, bytes);
    buf->n += bytes;
    return true;
}

static void buf_free(text_buf *buf)
{
    mem_free(buf->mem, buf->data);
    buf->data = NULL;
    buf->n = buf->capacity = 0;
}

#endif
