/*
 * The cache: blocks of 4 KiB in RAM, shared by all volumes of a filter (docs/cache.md). It knows owners (a volume is one),
 * tags, block numbers and bytes; no request, no reactor, no map. Who uses it tells it of every write's beginning and end.
 *
 * Threads: hits (nv_cache_pin) take no lock and may run anywhere; fills and writes lock one shard at a time; owners are
 * opened by the front thread, held and released by anybody. Nothing is allocated after nv_cache_create().
 */
#ifndef NV_CACHE_H
#define NV_CACHE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

#define NV_CACHE_NONE UINT32_MAX

struct nv_cache;

struct nv_cache_spot {              /* one block of an owner */
    uint32_t owner;
    uint32_t tag;                   /* 0: the cache is off for the owner */
    uint64_t block;
    bool scan;                      /* to put it in: it is one of very many in a row, and nothing should leave for it */
};

enum nv_cache_fill {
    NV_CACHE_FILLED,
    NV_CACHE_THERE,                 /* it was in already */
    NV_CACHE_STALE,                 /* a write came between, or the tag is not the owner's any more */
    NV_CACHE_FULL,                  /* everything that might have gone is pinned or protected */
};

struct nv_cache_filled {            /* of some blocks, how many were put in; how many could not be: STALE or FULL */
    uint32_t filled, refused;
};

struct nv_cache_totals {
    uint64_t frames, used, evictions;
};

/* Owners are 0..owners-1. 0 or -errno. */
int nv_cache_create(uint64_t bytes, uint32_t owners, uint32_t shards, struct nv_cache **out);
void nv_cache_free(struct nv_cache *cache);

/* --- owners: off while anybody holds them; a tag is never used again --- */

/* Front: a volume begins, with one hold. */
void nv_cache_open(struct nv_cache *cache, uint32_t owner);
void nv_cache_hold(struct nv_cache *cache, uint32_t owner);
void nv_cache_release(struct nv_cache *cache, uint32_t owner);
/* 0: off. */
uint32_t nv_cache_tag(const struct nv_cache *cache, uint32_t owner);
/* Front: what others cannot take from an owner; all floors together are cut down to half of the cache. */
void nv_cache_set_floor(struct nv_cache *cache, uint32_t owner, uint64_t bytes);
/* Bytes that it has, and its floor in force. */
uint64_t nv_cache_held_bytes(const struct nv_cache *cache, uint32_t owner, uint64_t *floor);

/* --- hits --- */

/* The frame of a block, pinned: its bytes stay until nv_cache_unpin(). NV_CACHE_NONE: not here. */
uint32_t nv_cache_pin(struct nv_cache *cache, const struct nv_cache_spot *spot);
void nv_cache_unpin(struct nv_cache *cache, uint32_t frame);
/* A block will be asked for soon: bring what finds it nearer to the processor, in two steps, the second one `near`. */
void nv_cache_expect(const struct nv_cache *cache, const struct nv_cache_spot *spot, bool near);
uint8_t *nv_cache_bytes(const struct nv_cache *cache, uint32_t frame);
/* It was fetched ahead, and nobody has used it yet. */
bool nv_cache_is_ahead(const struct nv_cache *cache, uint32_t frame);
/* True once for a frame that was fetched ahead: this is its first use. */
bool nv_cache_first_use(struct nv_cache *cache, uint32_t frame);

/* --- fills --- */

/* The clock. Take it before a read goes to the storage, and hand it to nv_cache_fill() with what came back. */
uint64_t nv_cache_now(const struct nv_cache *cache);
/* So many blocks from the spot's on. */
struct nv_cache_filled nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count, uint64_t since,
                                     const uint8_t *bytes, bool ahead);

/* --- writes --- */

/* Before it reaches storage: nothing of these blocks is found any more. Its time, for nv_cache_write_ends(). */
uint64_t nv_cache_write_begins(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count);
/*
 * Before it is answered. `bytes`, of the `whole` blocks from `first_whole` on, are put in where nobody else wrote
 * meanwhile; NULL: nothing is. How many were put in.
 */
uint64_t nv_cache_write_ends(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count, uint64_t time,
                             uint64_t first_whole, uint64_t whole, const uint8_t *bytes);

/* --- looking on --- */

void nv_cache_look(struct nv_cache *cache, struct nv_cache_totals *out);
/* NULL, or which of the invariants does not hold. Nobody else uses the cache meanwhile. */
const char *nv_cache_check(struct nv_cache *cache);

#endif
