/*
 * The ghost of a shard: blocks that have left the small queue lately, so that one that comes back is known to be worth
 * keeping. A table of sets of eight entries; an entry remembers any of eight neighbours, an octet, so that a scan asks once for
 * eight blocks. It is forgotten by age, or when its set is full of younger ones. A false memory costs a place in main, nothing
 * else.
 *
 * An entry: 24 bits of the octet's hash, the stamp at which its newer bits began (24 bits of it), eight older bits, eight newer
 * ones. Newer bits count while no more than the span has been added since they began, older ones for half of it: they become
 * older when one is added after half of the span. So a block is remembered for the span if its octet is alone, and for half of
 * it to one and a half where its neighbours come and go.
 */
#ifndef NV_CACHE_GHOST_H
#define NV_CACHE_GHOST_H

#include <stdbool.h>
#include <stdint.h>

#define NV_GHOST_WAYS 8u
#define NV_GHOST_OCTET 8u

struct nv_ghost {
    uint64_t *entries;              /* 0: free */
    uint32_t set_mask;
    uint32_t span;                  /* so many additions long a block is remembered */
    uint32_t stamp;                 /* blocks added so far */
};

bool nv_ghost_init(struct nv_ghost *ghost, uint32_t frames, uint32_t span);
void nv_ghost_free(struct nv_ghost *ghost);
/* It will be asked about this block's octet: fetch its set into the processor's cache. */
void nv_ghost_expect(const struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag);
void nv_ghost_add(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag);
/* Is it remembered? It is forgotten then. */
bool nv_ghost_take(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag);
/* Likewise of the block's octet those in `wanted` (bit i: its block i): the ones remembered. The others are added. */
uint32_t nv_ghost_pass(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag, uint32_t wanted);

#endif
