/*
 * The ghost of a shard: fingerprints of blocks that have left the small queue lately, so that one that comes back is known
 * to be worth keeping. A table of sets of eight; an entry is forgotten by age, or when its set is full of younger ones. A
 * false memory costs a place in main, nothing else.
 */
#ifndef NV_CACHE_GHOST_H
#define NV_CACHE_GHOST_H

#include <stdbool.h>
#include <stdint.h>

#define NV_GHOST_WAYS 8u

struct nv_ghost_entry {
    uint32_t print;                 /* never 0 in a used entry */
    uint32_t stamp;
};

struct nv_ghost {
    struct nv_ghost_entry *entries;
    uint32_t set_mask;
    uint32_t stamp;                 /* raised with each entry */
};

static inline uint64_t nv_ghost_spread(uint64_t mixed, uint64_t block, uint32_t tag)
{
    uint64_t x = (mixed ^ block * 0xd6e8feb86659fd93ull) + tag;

    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
    return x ^ (x >> 32);
}

static inline struct nv_ghost_entry *nv_ghost_set(const struct nv_ghost *ghost, uint64_t spread_bits)
{
    return &ghost->entries[(uint32_t)(spread_bits & ghost->set_mask) * NV_GHOST_WAYS];
}

/* It will be asked for: fetch its set into the processor's cache. */
static inline void nv_ghost_expect(const struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag)
{
    __builtin_prefetch(nv_ghost_set(ghost, nv_ghost_spread(mixed, block, tag)), 1);
}

bool nv_ghost_init(struct nv_ghost *ghost, uint32_t frames);
void nv_ghost_free(struct nv_ghost *ghost);
void nv_ghost_add(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag);
/* Is it among the last `span` that were added? It is forgotten then. */
bool nv_ghost_take(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag, uint32_t span);
/* Likewise; if it is not among them, it is added. */
bool nv_ghost_pass(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag, uint32_t span);

#endif
