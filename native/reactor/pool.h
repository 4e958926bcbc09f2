/*
 * A reactor's buffer pool: buddy blocks of 4 KiB .. 32 MiB in one lazily resident mapping. Used by one thread.
 * It never grows and never blocks: a full pool answers NULL and the caller pushes back on its socket.
 */
#ifndef NV_POOL_H
#define NV_POOL_H

#include <stddef.h>
#include <stdint.h>

struct nv_pool;

struct nv_pool *nv_pool_create(uint64_t bytes);
void nv_pool_destroy(struct nv_pool *pool);
/* A page-aligned block of at least `size` (1 .. NV_PAYLOAD_MAX) bytes, or NULL. */
void *nv_pool_get(struct nv_pool *pool, size_t size);
void nv_pool_put(struct nv_pool *pool, void *block);
uint64_t nv_pool_total(const struct nv_pool *pool);
uint64_t nv_pool_free_bytes(const struct nv_pool *pool);
/* What a request of `size` bytes really takes. */
uint64_t nv_pool_cost(size_t size);

/* Page-aligned zeroed memory that becomes resident when touched; NULL without address space. */
void *nv_pages_map(size_t bytes);
/* The same, from a boundary of huge pages on and, where there are some, made of them: large transfers have few segments
 * then, and places all over it are found in few steps. */
void *nv_pages_map_huge(size_t bytes);
void nv_pages_unmap(void *pages, size_t bytes);
/* Give the memory behind the pages back; they read as zeros afterwards. */
void nv_pages_shed(void *pages, size_t bytes);
/* NV_ZERO_PIECE bytes of zeros, page-aligned, never written. */
const void *nv_zero_pages(void);

#endif
