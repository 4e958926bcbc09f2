/*
 * One shard of the cache, for cache.c: an index of frames, the two queues, the ghost and the write slots.
 *
 * Frame numbers are the whole cache's; a shard has those from `first` on. Everything but a line's atomics is touched under
 * the shard's lock.
 */
#ifndef NV_CACHE_SHARD_H
#define NV_CACHE_SHARD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "cache/cache.h"
#include "cache/ghost.h"

#define NV_FRAME_VALID (1u << 31)   /* of a line's word; the rest are pins */

enum nv_cache_queue { NV_QUEUE_NONE, NV_QUEUE_SMALL, NV_QUEUE_MAIN };

struct nv_line {                    /* a frame's bookkeeping */
    _Atomic uint64_t block;
    _Atomic uint32_t tag;
    _Atomic uint32_t word;
    _Atomic uint32_t next;          /* in its chain */
    uint32_t behind;                /* in its queue: who leaves after it */
    uint32_t owner;
    _Atomic uint8_t visited;
    _Atomic uint8_t ahead;          /* fetched ahead and not asked for yet */
    uint8_t queue;                  /* enum nv_cache_queue */
};

struct nv_cache_fifo {
    uint32_t oldest, newest;
    uint32_t count;
};

struct nv_write_slot {
    uint64_t last;                  /* the clock when a write of one of its blocks last began or ended */
    uint32_t busy;                  /* writes of its blocks under way */
};

struct nv_owner {
    _Alignas(64) _Atomic uint32_t tag;
    _Atomic uint32_t floor;         /* frames, in force */
    _Atomic uint32_t frames;        /* that it has, of old tags too */
    uint32_t holds;                 /* under the cache's lock */
    uint32_t last_tag;              /* ... */
    uint64_t floor_wanted;          /* frames; the front's */
};

struct nv_shard {
    _Alignas(64) pthread_mutex_t lock;
    struct nv_line *lines;          /* the whole cache's */
    struct nv_owner *owners;
    uint8_t *memory;                /* ... */
    uint32_t first, frames;         /* its own */
    uint32_t fresh;                 /* of them, never used so far: those from first + fresh on */
    uint32_t small_target;
    struct nv_cache_fifo small, main;
    struct nv_ghost ghost;
    _Atomic uint32_t *chains;
    uint32_t chain_mask;
    struct nv_write_slot *slots;
    uint32_t slot_mask;
    uint64_t evictions;
};

static inline uint64_t nv_cache_mix(uint32_t owner, uint64_t block)
{
    uint64_t x = (block >> NV_CACHE_STRIPE_SHIFT) + owner * 0x9e3779b97f4a7c15ull;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Neighbours of a stripe fall into neighbouring chains and slots. */
static inline uint32_t nv_cache_place(uint64_t mixed, uint64_t block)
{
    return (uint32_t)mixed + (uint32_t)(block & ((1u << NV_CACHE_STRIPE_SHIFT) - 1));
}

static inline struct nv_write_slot *nv_shard_slot(struct nv_shard *shard, uint64_t mixed, uint64_t block)
{
    return &shard->slots[nv_cache_place(mixed, block) & shard->slot_mask];
}

/* A tag that nobody has had, for an owner whose last one was `before`. */
uint32_t nv_cache_fresh_tag(uint32_t *given, uint32_t before);
bool nv_shard_init(struct nv_shard *shard);
void nv_shard_free(struct nv_shard *shard);
/* Without the lock: may miss what is there while chains change. Pinned, or NV_CACHE_NONE. */
uint32_t nv_shard_pin(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot);
/* It will be looked for: fetch its chain's head into the processor's cache, or, once that is `near`, its first line. */
void nv_shard_expect(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, bool near);
/* All from the spot's block to `end`, of one stripe, will be filled: fetch their chains' first lines and their ghosts. */
void nv_shard_expect_stripe(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, uint64_t end);
/* Under the lock: a scan, and no room is left: what the ghost does not remember is not put in. */
bool nv_shard_only_notes(const struct nv_shard *shard, const struct nv_cache_spot *spot);
/*
 * Under the lock, of such a scan from the spot's block up to `end`, of one stripe: which to put in (bit i: the block i
 * behind). Those that the ghost remembers, whether they are there or not; it forgets them, and notes the others.
 */
uint32_t nv_shard_wants(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, uint64_t end);
/* Under the lock: it is not found any more; who has it pinned keeps its bytes. */
void nv_shard_drop(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot);
/* Under the lock: put it in, whatever the write slots say. `known`: the ghost has been asked, and has remembered it. */
enum nv_cache_fill nv_shard_put(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot,
                                const uint8_t *bytes, bool ahead, bool known);
const char *nv_shard_check(struct nv_shard *shard);

#endif
