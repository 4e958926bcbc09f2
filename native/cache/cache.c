/*
 * See cache.h. The owners, the clock, and the way from a block to its shard. Invariants: an owner's tag is 0 exactly while
 * it has holds; the clock is raised by each beginning and each end of a write, before anything of it is looked at; a fill
 * is judged under the lock under which the slots of its block change.
 */
#include "cache/cache.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cache/shard.h"
#include "reactor/pool.h"

struct nv_cache {
    _Alignas(64) _Atomic uint64_t clock;
    _Alignas(64) pthread_mutex_t lock; /* of the holds and tags */
    uint32_t tags;                  /* given out so far */
    uint32_t frames;
    uint32_t owner_count;
    uint32_t shard_shift;           /* the shard is the mix's highest bits */
    uint32_t shard_count;
    uint8_t *memory;
    struct nv_line *lines;
    struct nv_owner *owners;
    struct nv_shard shards[];
};

static struct nv_shard *shard_of(const struct nv_cache *cache, uint64_t mixed)
{
    return (struct nv_shard *)&cache->shards[cache->shard_count > 1 ? mixed >> cache->shard_shift : 0];
}

/* ---- life ---- */

static bool build(struct nv_cache *cache)
{
    const uint32_t each = cache->frames / cache->shard_count;
    bool good;

    pthread_mutex_init(&cache->lock, NULL);
    cache->memory = nv_pages_map_huge((size_t)cache->frames * NV_CACHE_BLOCK);
    cache->lines = nv_pages_map_huge((size_t)cache->frames * sizeof *cache->lines);
    cache->owners = nv_pages_map((size_t)cache->owner_count * sizeof *cache->owners);
    good = cache->memory && cache->lines && cache->owners;
    for (uint32_t i = 0; i < cache->shard_count; i++) {
        struct nv_shard *shard = &cache->shards[i];
        shard->lines = cache->lines;
        shard->owners = cache->owners;
        shard->memory = cache->memory;
        shard->first = i * each;
        shard->frames = each;
        good &= nv_shard_init(shard);
    }
    return good;
}

int nv_cache_create(uint64_t bytes, uint32_t owners, uint32_t shards, struct nv_cache **out)
{
    const uint64_t frames = bytes / NV_CACHE_BLOCK;
    struct nv_cache *cache;
    uint32_t count = 1, shift = 64;

    if (frames < NV_CACHE_FRAMES_MIN || frames > NV_CACHE_FRAMES_MAX || owners == 0)
        return -EINVAL;
    for (; count < shards && frames / (count * 2) >= NV_CACHE_SHARD_MIN; shift--)
        count *= 2;
    cache = aligned_alloc(64, sizeof *cache + count * sizeof(struct nv_shard));
    if (!cache)
        return -ENOMEM;
    memset(cache, 0, sizeof *cache + count * sizeof(struct nv_shard));
    cache->shard_count = count;
    cache->shard_shift = shift;
    cache->frames = (uint32_t)(frames / count * count);
    cache->owner_count = owners;
    if (!build(cache)) {
        nv_cache_free(cache);
        return -ENOMEM;
    }
    *out = cache;
    return 0;
}

void nv_cache_free(struct nv_cache *cache)
{
    if (!cache)
        return;
    for (uint32_t i = 0; i < cache->shard_count; i++)
        nv_shard_free(&cache->shards[i]);
    if (cache->memory)
        nv_pages_unmap(cache->memory, (size_t)cache->frames * NV_CACHE_BLOCK);
    if (cache->lines)
        nv_pages_unmap(cache->lines, (size_t)cache->frames * sizeof *cache->lines);
    if (cache->owners)
        nv_pages_unmap(cache->owners, (size_t)cache->owner_count * sizeof *cache->owners);
    pthread_mutex_destroy(&cache->lock);
    free(cache);
}

/* ---- owners ---- */

static struct nv_owner *owner_of(const struct nv_cache *cache, uint32_t owner)
{
    assert(owner < cache->owner_count);
    return &cache->owners[owner];
}

void nv_cache_open(struct nv_cache *cache, uint32_t number)
{
    struct nv_owner *owner = owner_of(cache, number);

    pthread_mutex_lock(&cache->lock);
    owner->holds = 1;
    atomic_store(&owner->tag, 0);
    pthread_mutex_unlock(&cache->lock);
}

void nv_cache_hold(struct nv_cache *cache, uint32_t number)
{
    struct nv_owner *owner = owner_of(cache, number);

    pthread_mutex_lock(&cache->lock);
    owner->holds++;
    atomic_store(&owner->tag, 0);
    pthread_mutex_unlock(&cache->lock);
}

void nv_cache_release(struct nv_cache *cache, uint32_t number)
{
    struct nv_owner *owner = owner_of(cache, number);

    pthread_mutex_lock(&cache->lock);
    assert(owner->holds > 0);
    if (--owner->holds == 0) {
        owner->last_tag = nv_cache_fresh_tag(&cache->tags, owner->last_tag);
        atomic_store(&owner->tag, owner->last_tag);
    }
    pthread_mutex_unlock(&cache->lock);
}

uint32_t nv_cache_tag(const struct nv_cache *cache, uint32_t owner)
{
    return atomic_load_explicit(&owner_of(cache, owner)->tag, memory_order_acquire);
}

/* All floors, cut down in proportion to what half of the cache can hold. */
static void share_floors(struct nv_cache *cache)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < cache->owner_count; i++)
        sum += cache->owners[i].floor_wanted;
    for (uint32_t i = 0; i < cache->owner_count; i++) {
        const uint64_t wanted = cache->owners[i].floor_wanted;
        const uint64_t floor = sum > cache->frames / 2 ? wanted * (cache->frames / 2) / sum : wanted;
        if (atomic_load_explicit(&cache->owners[i].floor, memory_order_relaxed) != floor)
            atomic_store_explicit(&cache->owners[i].floor, (uint32_t)floor, memory_order_relaxed);
    }
}

void nv_cache_set_floor(struct nv_cache *cache, uint32_t owner, uint64_t bytes)
{
    const uint64_t frames = bytes / NV_CACHE_BLOCK;

    if (owner_of(cache, owner)->floor_wanted == frames)
        return;
    owner_of(cache, owner)->floor_wanted = frames < cache->frames ? frames : cache->frames;
    share_floors(cache);
}

uint64_t nv_cache_held_bytes(const struct nv_cache *cache, uint32_t owner, uint64_t *floor)
{
    struct nv_owner *found = owner_of(cache, owner);

    *floor = (uint64_t)atomic_load_explicit(&found->floor, memory_order_relaxed) * NV_CACHE_BLOCK;
    return (uint64_t)atomic_load_explicit(&found->frames, memory_order_relaxed) * NV_CACHE_BLOCK;
}

/* ---- hits ---- */

uint32_t nv_cache_pin(struct nv_cache *cache, const struct nv_cache_spot *spot)
{
    const uint64_t mixed = nv_cache_mix(spot->owner, spot->block);

    assert(spot->tag != 0);
    return nv_shard_pin(shard_of(cache, mixed), mixed, spot);
}

void nv_cache_expect(const struct nv_cache *cache, const struct nv_cache_spot *spot, bool near)
{
    const uint64_t mixed = nv_cache_mix(spot->owner, spot->block);

    nv_shard_expect(shard_of(cache, mixed), mixed, spot, near);
}

void nv_cache_unpin(struct nv_cache *cache, uint32_t frame)
{
    const uint32_t word = atomic_fetch_sub_explicit(&cache->lines[frame].word, 1, memory_order_release);

    assert((word & ~NV_FRAME_VALID) > 0);
    (void)word;
}

uint8_t *nv_cache_bytes(const struct nv_cache *cache, uint32_t frame)
{
    return cache->memory + (uint64_t)frame * NV_CACHE_BLOCK;
}

bool nv_cache_is_ahead(const struct nv_cache *cache, uint32_t frame)
{
    return atomic_load_explicit(&cache->lines[frame].ahead, memory_order_relaxed);
}

bool nv_cache_first_use(struct nv_cache *cache, uint32_t frame)
{
    _Atomic uint8_t *ahead = &cache->lines[frame].ahead;

    return atomic_load_explicit(ahead, memory_order_relaxed) &&
           atomic_exchange_explicit(ahead, 0, memory_order_relaxed);
}

/* ---- fills and writes ---- */

uint64_t nv_cache_now(const struct nv_cache *cache)
{
    return atomic_load(&cache->clock);
}

/* The end, above `at`, of the blocks that lie in at's stripe. */
_Static_assert(1u << NV_CACHE_STRIPE_SHIFT <= 32, "a word has a bit for each block of a stripe");

static uint64_t stripe_end(uint64_t at, uint64_t end)
{
    const uint64_t stripe = ((at >> NV_CACHE_STRIPE_SHIFT) + 1) << NV_CACHE_STRIPE_SHIFT;

    return stripe < end ? stripe : end;
}

struct nv_cache_filled nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count, uint64_t since,
                                     const uint8_t *bytes, bool ahead)
{
    struct nv_cache_filled out = {0};
    struct nv_cache_spot at = *spot;
    const uint64_t end = spot->block + count;

    for (; !spot->scan && at.block < end; at.block = stripe_end(at.block, end))
        nv_cache_expect(cache, &at, false);
    at = *spot;
    while (at.block < end) {
        const uint64_t mixed = nv_cache_mix(at.owner, at.block), until = stripe_end(at.block, end);
        struct nv_shard *shard = shard_of(cache, mixed);
        uint32_t wanted = UINT32_MAX;
        bool notes = false;
        nv_shard_expect_stripe(shard, mixed, &at, until);
        pthread_mutex_lock(&shard->lock);
        for (; at.block < until; at.block++, bytes += NV_CACHE_BLOCK, wanted >>= 1) {
            const struct nv_write_slot *slot = nv_shard_slot(shard, mixed, at.block);
            enum nv_cache_fill result = NV_CACHE_STALE;
            if (!notes && nv_shard_only_notes(shard, &at)) { /* perhaps since the block before */
                notes = true;
                wanted = nv_shard_wants(shard, mixed, &at, until);
            }
            if (!(wanted & 1))
                continue;
            if (slot->busy == 0 && slot->last <= since && at.tag == nv_cache_tag(cache, at.owner) && at.tag != 0)
                result = nv_shard_put(shard, mixed, &at, bytes, ahead, notes);
            out.filled += result == NV_CACHE_FILLED;
            out.refused += result == NV_CACHE_STALE || result == NV_CACHE_FULL;
        }
        pthread_mutex_unlock(&shard->lock);
    }
    return out;
}

uint64_t nv_cache_write_begins(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count)
{
    const uint64_t time = atomic_fetch_add(&cache->clock, 1) + 1;
    struct nv_cache_spot spot = {owner, 0, first, false};
    const uint64_t end = first + count;

    while (spot.block < end) {
        const uint64_t mixed = nv_cache_mix(owner, spot.block), until = stripe_end(spot.block, end);
        struct nv_shard *shard = shard_of(cache, mixed);
        pthread_mutex_lock(&shard->lock);
        spot.tag = nv_cache_tag(cache, owner); /* now: what was filled in before us, under whichever tag, has to go */
        for (; spot.block < until; spot.block++) {
            struct nv_write_slot *slot = nv_shard_slot(shard, mixed, spot.block);
            slot->busy++;
            slot->last = time;
            if (spot.tag)
                nv_shard_drop(shard, mixed, &spot);
        }
        pthread_mutex_unlock(&shard->lock);
    }
    return time;
}

uint64_t nv_cache_write_ends(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count, uint64_t time,
                             uint64_t first_whole, uint64_t whole, const uint8_t *bytes)
{
    const uint64_t now = atomic_fetch_add(&cache->clock, 1) + 1, end = first + count;
    struct nv_cache_spot spot = {owner, 0, first, false};
    uint64_t put = 0;

    while (spot.block < end) {
        const uint64_t mixed = nv_cache_mix(owner, spot.block), until = stripe_end(spot.block, end);
        struct nv_shard *shard = shard_of(cache, mixed);
        pthread_mutex_lock(&shard->lock);
        spot.tag = nv_cache_tag(cache, owner); /* under the lock: a hold meanwhile leaves no tag to put under */
        for (; spot.block < until; spot.block++) {
            struct nv_write_slot *slot = nv_shard_slot(shard, mixed, spot.block);
            const bool alone = --slot->busy == 0 && slot->last == time;
            slot->last = now;
            if (alone && bytes && spot.tag && spot.block - first_whole < whole)
                put += nv_shard_put(shard, mixed, &spot, bytes + (spot.block - first_whole) * NV_CACHE_BLOCK, false,
                                    false) == NV_CACHE_FILLED;
        }
        pthread_mutex_unlock(&shard->lock);
    }
    return put;
}

/* ---- looking on ---- */

void nv_cache_look(struct nv_cache *cache, struct nv_cache_totals *out)
{
    *out = (struct nv_cache_totals){.frames = cache->frames};
    for (uint32_t i = 0; i < cache->shard_count; i++) {
        struct nv_shard *shard = &cache->shards[i];
        pthread_mutex_lock(&shard->lock);
        out->used += shard->fresh;
        out->evictions += shard->evictions;
        pthread_mutex_unlock(&shard->lock);
    }
}

const char *nv_cache_check(struct nv_cache *cache)
{
    const char *wrong = NULL;
    uint64_t held = 0, used = 0;

    for (uint32_t i = 0; i < cache->shard_count && !wrong; i++) {
        wrong = nv_shard_check(&cache->shards[i]);
        used += cache->shards[i].fresh;
    }
    for (uint32_t i = 0; i < cache->owner_count; i++)
        held += atomic_load(&cache->owners[i].frames);
    return wrong ? wrong : held != used ? "the owners' frames do not add up" : NULL;
}
