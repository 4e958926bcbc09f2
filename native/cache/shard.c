/*
 * See shard.h. S3-FIFO with one bit: new blocks enter `small`, a tenth of the shard; those the ghost remembers enter `main`.
 *
 * Invariants: a line that stands in a queue stands in the chain of its key, and no other does; its bytes change only while
 * its word says neither VALID nor pinned. A reader without the lock pins first and looks at key and VALID afterwards, so a
 * line that has changed hands meanwhile is a miss to it.
 */
#include "cache/shard.h"

#include <assert.h>
#include <string.h>

#include "reactor/pool.h"

uint32_t nv_cache_fresh_tag(uint32_t *given, uint32_t before)
{
    (void)before;
    assert(*given < UINT32_MAX);
    return ++*given;
}

static uint32_t power_of_two(uint32_t least)
{
    uint32_t power = 1;

    while (power < least)
        power *= 2;
    return power;
}

bool nv_shard_init(struct nv_shard *shard)
{
    const uint32_t chains = power_of_two(shard->frames);
    const uint32_t slots = power_of_two(shard->frames / 4 > NV_CACHE_SLOTS_MIN ? shard->frames / 4 : NV_CACHE_SLOTS_MIN);

    pthread_mutex_init(&shard->lock, NULL);
    shard->small_target = shard->frames / 10 > 0 ? shard->frames / 10 : 1;
    shard->small = shard->main = (struct nv_cache_fifo){NV_CACHE_NONE, NV_CACHE_NONE, 0};
    shard->chain_mask = chains - 1;
    shard->slot_mask = slots - 1;
    shard->chains = nv_pages_map_huge(chains * sizeof *shard->chains);
    shard->slots = nv_pages_map(slots * sizeof *shard->slots);
    return nv_ghost_init(&shard->ghost, shard->frames, shard->frames - shard->small_target) && shard->chains && shard->slots;
}

void nv_shard_free(struct nv_shard *shard)
{
    nv_ghost_free(&shard->ghost);
    if (shard->chains)
        nv_pages_unmap(shard->chains, ((size_t)shard->chain_mask + 1) * sizeof *shard->chains);
    if (shard->slots)
        nv_pages_unmap(shard->slots, ((size_t)shard->slot_mask + 1) * sizeof *shard->slots);
    pthread_mutex_destroy(&shard->lock);
}

/* ---- the index: chains hold frame number + 1, so that untouched memory is empty ---- */

static _Atomic uint32_t *chain_of(struct nv_shard *shard, uint64_t mixed, uint64_t block, uint32_t tag)
{
    return &shard->chains[(nv_cache_place(mixed, block) + tag * 0x9e3779b1u) & shard->chain_mask];
}

static bool is_key(struct nv_line *line, const struct nv_cache_spot *spot)
{
    return atomic_load_explicit(&line->block, memory_order_relaxed) == spot->block &&
           atomic_load_explicit(&line->tag, memory_order_relaxed) == spot->tag;
}

static uint32_t find(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, uint32_t steps)
{
    uint32_t at = atomic_load_explicit(chain_of(shard, mixed, spot->block, spot->tag), memory_order_acquire);

    for (; at != 0 && steps > 0; steps--) {
        struct nv_line *line = &shard->lines[at - 1];
        if (is_key(line, spot))
            return at - 1;
        at = atomic_load_explicit(&line->next, memory_order_acquire);
    }
    return NV_CACHE_NONE;
}

/* Under the lock a chain stands still: whatever is in it is found. */
static uint32_t find_surely(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot)
{
    return find(shard, mixed, spot, UINT32_MAX);
}

uint32_t nv_shard_pin(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot)
{
    const uint32_t frame = find(shard, mixed, spot, NV_CACHE_CHAIN_STEPS);
    struct nv_line *line;

    if (frame == NV_CACHE_NONE)
        return NV_CACHE_NONE;
    line = &shard->lines[frame];
    if ((atomic_fetch_add_explicit(&line->word, 1, memory_order_acquire) & NV_FRAME_VALID) && is_key(line, spot)) {
        if (!atomic_load_explicit(&line->visited, memory_order_relaxed))
            atomic_store_explicit(&line->visited, 1, memory_order_relaxed);
        return frame;
    }
    atomic_fetch_sub_explicit(&line->word, 1, memory_order_release);
    return NV_CACHE_NONE;
}

/* The first line of a chain whose head is near. */
static void expect_line(const struct nv_shard *shard, _Atomic uint32_t *chain)
{
    const uint32_t at = atomic_load_explicit(chain, memory_order_relaxed);

    if (at != 0)
        __builtin_prefetch(&shard->lines[at - 1], 1);
}

void nv_shard_expect(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, bool near)
{
    _Atomic uint32_t *chain = chain_of(shard, mixed, spot->block, spot->tag);

    if (near)
        expect_line(shard, chain);
    else
        __builtin_prefetch(chain);
}

bool nv_shard_only_notes(const struct nv_shard *shard, const struct nv_cache_spot *spot)
{
    return spot->scan && shard->fresh == shard->frames;
}

void nv_shard_expect_stripe(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, uint64_t end)
{
    for (uint64_t block = spot->block; block < end; block = (block / NV_GHOST_OCTET + 1) * NV_GHOST_OCTET)
        nv_ghost_expect(&shard->ghost, mixed, block, spot->tag);
    for (uint64_t block = spot->block; !spot->scan && block < end; block++)
        expect_line(shard, chain_of(shard, mixed, block, spot->tag));
}

uint32_t nv_shard_wants(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot, uint64_t end)
{
    uint32_t wanted = 0;

    for (uint64_t block = spot->block, next; block < end; block = next) {
        const uint64_t octet = block / NV_GHOST_OCTET * NV_GHOST_OCTET;
        uint32_t bits;
        next = octet + NV_GHOST_OCTET < end ? octet + NV_GHOST_OCTET : end;
        bits = ((1u << (next - block)) - 1) << (block - octet);
        bits = nv_ghost_pass(&shard->ghost, mixed, block, spot->tag, bits) >> (block - octet);
        wanted |= bits << (block - spot->block);
    }
    return wanted;
}

static void unlink_line(struct nv_shard *shard, uint32_t frame)
{
    struct nv_line *line = &shard->lines[frame];
    const uint64_t block = atomic_load_explicit(&line->block, memory_order_relaxed);
    _Atomic uint32_t *link = chain_of(shard, nv_cache_mix(line->owner, block), block,
                                      atomic_load_explicit(&line->tag, memory_order_relaxed));

    while (atomic_load_explicit(link, memory_order_relaxed) != frame + 1) {
        assert(atomic_load_explicit(link, memory_order_relaxed) != 0);
        link = &shard->lines[atomic_load_explicit(link, memory_order_relaxed) - 1].next;
    }
    atomic_store_explicit(link, atomic_load_explicit(&line->next, memory_order_relaxed), memory_order_release);
}

static void link_line(struct nv_shard *shard, uint64_t mixed, uint32_t frame)
{
    struct nv_line *line = &shard->lines[frame];
    _Atomic uint32_t *chain = chain_of(shard, mixed, atomic_load_explicit(&line->block, memory_order_relaxed),
                                       atomic_load_explicit(&line->tag, memory_order_relaxed));

    atomic_store_explicit(&line->next, atomic_load_explicit(chain, memory_order_relaxed), memory_order_release);
    atomic_store_explicit(chain, frame + 1, memory_order_release);
}

/* ---- the queues ---- */

static void push(struct nv_shard *shard, struct nv_cache_fifo *queue, uint32_t frame)
{
    struct nv_line *line = &shard->lines[frame];

    line->behind = NV_CACHE_NONE;
    line->queue = queue == &shard->small ? NV_QUEUE_SMALL : NV_QUEUE_MAIN;
    if (queue->count++ == 0)
        queue->oldest = frame;
    else
        shard->lines[queue->newest].behind = frame;
    queue->newest = frame;
}

static uint32_t pop(struct nv_shard *shard, struct nv_cache_fifo *queue)
{
    const uint32_t frame = queue->oldest;
    struct nv_line *line = &shard->lines[frame];

    assert(queue->count > 0);
    queue->oldest = line->behind;
    queue->count--;
    line->queue = NV_QUEUE_NONE;
    return frame;
}

/* Nothing may be found in it any more, or the block is of a time that is over. */
static bool is_dead(struct nv_shard *shard, struct nv_line *line)
{
    return !(atomic_load_explicit(&line->word, memory_order_relaxed) & NV_FRAME_VALID) ||
           atomic_load_explicit(&line->tag, memory_order_relaxed) !=
               atomic_load_explicit(&shard->owners[line->owner].tag, memory_order_relaxed);
}

static bool is_protected(struct nv_shard *shard, const struct nv_line *line, uint32_t for_owner)
{
    struct nv_owner *owner = &shard->owners[line->owner];

    return line->owner != for_owner && atomic_load_explicit(&owner->frames, memory_order_relaxed) <=
                                           atomic_load_explicit(&owner->floor, memory_order_relaxed);
}

/* Take a popped frame from its block. False: it is pinned. */
static bool take(struct nv_shard *shard, uint32_t frame)
{
    struct nv_line *line = &shard->lines[frame];
    uint32_t word = atomic_load_explicit(&line->word, memory_order_relaxed) & NV_FRAME_VALID;

    if (!atomic_compare_exchange_strong_explicit(&line->word, &word, 0, memory_order_acquire, memory_order_relaxed))
        return false;
    unlink_line(shard, frame);
    atomic_fetch_sub_explicit(&shard->owners[line->owner].frames, 1, memory_order_relaxed);
    shard->evictions++;
    return true;
}

static void remember(struct nv_shard *shard, struct nv_line *line)
{
    const uint64_t block = atomic_load_explicit(&line->block, memory_order_relaxed);

    nv_ghost_add(&shard->ghost, nv_cache_mix(line->owner, block), block,
                 atomic_load_explicit(&line->tag, memory_order_relaxed));
}

/* One look at the queues' ends: a frame, or NV_CACHE_NONE after something has moved on. */
static uint32_t evict_one(struct nv_shard *shard, uint32_t for_owner)
{
    const bool from_small = shard->small.count >= shard->small_target || shard->main.count == 0;
    struct nv_cache_fifo *queue = from_small ? &shard->small : &shard->main;
    const uint32_t frame = pop(shard, queue);
    struct nv_line *line = &shard->lines[frame];

    if (!is_dead(shard, line)) {
        if (is_protected(shard, line, for_owner)) {
            push(shard, queue, frame);
            return NV_CACHE_NONE;
        }
        if (atomic_exchange_explicit(&line->visited, 0, memory_order_relaxed)) {
            push(shard, &shard->main, frame);
            return NV_CACHE_NONE;
        }
        if (from_small)
            remember(shard, line);
    }
    if (take(shard, frame))
        return frame;
    push(shard, queue, frame);
    return NV_CACHE_NONE;
}

static uint32_t find_room(struct nv_shard *shard, uint32_t for_owner)
{
    uint32_t frame = NV_CACHE_NONE;

    if (shard->fresh < shard->frames)
        return shard->first + shard->fresh++;
    for (unsigned steps = 0; frame == NV_CACHE_NONE && steps < NV_CACHE_EVICT_STEPS; steps++)
        frame = evict_one(shard, for_owner);
    return frame;
}

/* ---- blocks come and go ---- */

void nv_shard_drop(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot)
{
    const uint32_t frame = find_surely(shard, mixed, spot);

    if (frame != NV_CACHE_NONE)
        atomic_fetch_and_explicit(&shard->lines[frame].word, ~NV_FRAME_VALID, memory_order_acq_rel);
}

static void fill(struct nv_shard *shard, uint32_t frame, const uint8_t *bytes, bool ahead)
{
    struct nv_line *line = &shard->lines[frame];

    memcpy(shard->memory + (uint64_t)frame * NV_CACHE_BLOCK, bytes, NV_CACHE_BLOCK);
    atomic_store_explicit(&line->ahead, ahead, memory_order_relaxed);
    atomic_fetch_or_explicit(&line->word, NV_FRAME_VALID, memory_order_release);
}

static enum nv_cache_fill refill(struct nv_shard *shard, uint32_t frame, const uint8_t *bytes, bool ahead)
{
    const uint32_t word = atomic_load_explicit(&shard->lines[frame].word, memory_order_acquire);

    if (word & NV_FRAME_VALID)
        return NV_CACHE_THERE;
    if (word != 0) /* somebody still sends what was there */
        return NV_CACHE_FULL;
    fill(shard, frame, bytes, ahead);
    return NV_CACHE_FILLED;
}

enum nv_cache_fill nv_shard_put(struct nv_shard *shard, uint64_t mixed, const struct nv_cache_spot *spot,
                                const uint8_t *bytes, bool ahead, bool known)
{
    uint32_t frame = find_surely(shard, mixed, spot);
    struct nv_line *line;

    if (frame != NV_CACHE_NONE)
        return refill(shard, frame, bytes, ahead);
    known = known || nv_ghost_take(&shard->ghost, mixed, spot->block, spot->tag);
    frame = find_room(shard, spot->owner);
    if (frame == NV_CACHE_NONE)
        return NV_CACHE_FULL;
    line = &shard->lines[frame];
    line->owner = spot->owner;
    atomic_store_explicit(&line->block, spot->block, memory_order_relaxed);
    atomic_store_explicit(&line->tag, spot->tag, memory_order_relaxed);
    atomic_store_explicit(&line->visited, 0, memory_order_relaxed);
    fill(shard, frame, bytes, ahead);
    link_line(shard, mixed, frame);
    push(shard, known ? &shard->main : &shard->small, frame);
    atomic_fetch_add_explicit(&shard->owners[spot->owner].frames, 1, memory_order_relaxed);
    return NV_CACHE_FILLED;
}

/* ---- the invariants ---- */

static const char *check_queue(struct nv_shard *shard, const struct nv_cache_fifo *queue, uint8_t kind)
{
    uint32_t count = 0, frame = queue->oldest;

    for (; count < queue->count; count++, frame = shard->lines[frame].behind) {
        struct nv_line *line = &shard->lines[frame];
        const struct nv_cache_spot spot = {line->owner, atomic_load(&line->tag), atomic_load(&line->block), false};
        if (frame < shard->first || frame >= shard->first + shard->fresh || line->queue != kind)
            return "a queue holds a frame that does not belong to it";
        if (find_surely(shard, nv_cache_mix(spot.owner, spot.block), &spot) != frame)
            return "a frame is not found under its key";
        if (count + 1 == queue->count && frame != queue->newest)
            return "a queue's end is not its newest";
    }
    return NULL;
}

const char *nv_shard_check(struct nv_shard *shard)
{
    const char *wrong = check_queue(shard, &shard->small, NV_QUEUE_SMALL);

    if (!wrong)
        wrong = check_queue(shard, &shard->main, NV_QUEUE_MAIN);
    if (!wrong && shard->small.count + shard->main.count != shard->fresh)
        wrong = "a used frame is in no queue, or in two";
    return wrong;
}
