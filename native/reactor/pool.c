/*
 * See pool.h. Bookkeeping is out of band, one node per 4 KiB page, so that a free block's memory is never touched.
 * Invariants: a block of order n starts at a multiple of 2^n pages; of two free buddies none stays split; the pages
 * of all free blocks add up to free_pages.
 */
#include "reactor/pool.h"

#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "limits.h"

#define ORDERS 14u /* 4 KiB << 13 = 32 MiB */
#define NONE UINT32_MAX
#define HUGE_PAGE ((size_t)2 << 20)
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

struct node {
    uint32_t next;
    uint32_t previous;
    uint8_t order; /* valid at a block's first page */
    bool free;
};

struct nv_pool {
    uint8_t *base;
    struct node *nodes;
    uint32_t pages;
    uint32_t free_pages;
    uint32_t heads[ORDERS];
};

static const uint8_t zero_pages[NV_ZERO_PIECE] __attribute__((aligned(4096)));

const void *nv_zero_pages(void)
{
    return zero_pages;
}

void *nv_pages_map(size_t bytes)
{
    void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return pages == MAP_FAILED ? NULL : pages;
}

void *nv_pages_map_huge(size_t least)
{
    const size_t bytes = (least + NV_POOL_PAGE - 1) & ~((size_t)NV_POOL_PAGE - 1);
    uint8_t *wide = nv_pages_map(bytes + HUGE_PAGE);
    size_t before;

    if (!wide)
        return NULL;
    before = (HUGE_PAGE - ((uintptr_t)wide & (HUGE_PAGE - 1))) & (HUGE_PAGE - 1);
    if (before > 0)
        nv_pages_unmap(wide, before);
    if (before < HUGE_PAGE)
        nv_pages_unmap(wide + before + bytes, HUGE_PAGE - before);
    (void)madvise(wide + before, bytes, MADV_HUGEPAGE); /* a wish: the kernel may know none */
    return wide + before;
}

void nv_pages_unmap(void *pages, size_t bytes)
{
    munmap(pages, bytes);
}

void nv_pages_shed(void *pages, size_t bytes)
{
    if (madvise(pages, bytes, MADV_DONTNEED) != 0) /* locked memory wants the newer word */
        (void)madvise(pages, bytes, MADV_DONTNEED_LOCKED);
}

static void link_free(struct nv_pool *pool, uint32_t page, unsigned order)
{
    struct node *node = &pool->nodes[page];

    assert(order < ORDERS && (page & ((1u << order) - 1)) == 0);
    *node = (struct node){pool->heads[order], NONE, (uint8_t)order, true};
    if (node->next != NONE)
        pool->nodes[node->next].previous = page;
    pool->heads[order] = page;
    pool->free_pages += 1u << order;
}

static void unlink_free(struct nv_pool *pool, uint32_t page)
{
    struct node *node = &pool->nodes[page];

    assert(node->free && pool->free_pages >= 1u << node->order);
    if (node->previous != NONE)
        pool->nodes[node->previous].next = node->next;
    else
        pool->heads[node->order] = node->next;
    if (node->next != NONE)
        pool->nodes[node->next].previous = node->previous;
    node->free = false;
    pool->free_pages -= 1u << node->order;
}

struct nv_pool *nv_pool_create(uint64_t bytes)
{
    struct nv_pool *pool = calloc(1, sizeof *pool);
    uint32_t page = 0;

    if (!pool)
        return NULL;
    pool->pages = (uint32_t)(bytes / NV_POOL_PAGE);
    pool->nodes = calloc(pool->pages, sizeof *pool->nodes);
    pool->base = nv_pages_map_huge((size_t)pool->pages * NV_POOL_PAGE);
    if (!pool->nodes || !pool->base) {
        nv_pool_destroy(pool);
        return NULL;
    }
    for (unsigned i = 0; i < ORDERS; i++)
        pool->heads[i] = NONE;
    while (page < pool->pages) { /* the largest aligned blocks that fit */
        unsigned order = ORDERS - 1;
        while ((page & ((1u << order) - 1)) != 0 || page + (1u << order) > pool->pages)
            order--;
        link_free(pool, page, order);
        page += 1u << order;
    }
    return pool;
}

void nv_pool_destroy(struct nv_pool *pool)
{
    if (!pool)
        return;
    if (pool->base)
        nv_pages_unmap(pool->base, (size_t)pool->pages * NV_POOL_PAGE);
    free(pool->nodes);
    free(pool);
}

static unsigned order_of(size_t size)
{
    size_t pages = (size + NV_POOL_PAGE - 1) / NV_POOL_PAGE;

    assert(size > 0 && size <= NV_PAYLOAD_MAX);
    return pages <= 1 ? 0 : 64u - (unsigned)__builtin_clzll(pages - 1);
}

uint64_t nv_pool_cost(size_t size)
{
    return (uint64_t)NV_POOL_PAGE << order_of(size);
}

void *nv_pool_get(struct nv_pool *pool, size_t size)
{
    const unsigned wanted = order_of(size);
    unsigned order = wanted;
    uint32_t page;

    while (order < ORDERS && pool->heads[order] == NONE)
        order++;
    if (order == ORDERS)
        return NULL;
    page = pool->heads[order];
    unlink_free(pool, page);
    while (order > wanted) {
        order--;
        link_free(pool, page + (1u << order), order);
    }
    pool->nodes[page].order = (uint8_t)wanted;
    return pool->base + (size_t)page * NV_POOL_PAGE;
}

void nv_pool_put(struct nv_pool *pool, void *block)
{
    uint32_t page = (uint32_t)(((uint8_t *)block - pool->base) / NV_POOL_PAGE);
    unsigned order;

    assert(page < pool->pages && !pool->nodes[page].free);
    order = pool->nodes[page].order;
    while (order + 1 < ORDERS) {
        uint32_t buddy = page ^ (1u << order);
        if (buddy + (1u << order) > pool->pages || !pool->nodes[buddy].free || pool->nodes[buddy].order != order)
            break;
        unlink_free(pool, buddy);
        page &= ~(1u << order);
        order++;
    }
    link_free(pool, page, order);
}

uint64_t nv_pool_total(const struct nv_pool *pool)
{
    return (uint64_t)pool->pages * NV_POOL_PAGE;
}

uint64_t nv_pool_free_bytes(const struct nv_pool *pool)
{
    return (uint64_t)pool->free_pages * NV_POOL_PAGE;
}
