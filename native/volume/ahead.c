/*
 * Fetching into the cache what nobody has asked for yet: behind a stream of reads, and what NBD_CMD_CACHE names (cached.h).
 * A fetch is a READ of our own through the whole stack, in pool memory that clients do not wait for; a reactor has a few
 * of them, made at its start. Invariants: a fetch covers whole blocks, and whole minimum blocks of the volume, and none
 * starts on a volume that closes or a reactor that stops; where there is no room it is forgotten.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "reactor/plane.h"
#include "volume/cached.h"
#include "volume/volume.h"

struct nv_fetch {
    struct nv_vreq v;
    struct nv_fetch *next;          /* of the free ones */
    void *memory;
};

struct nv_ahead {
    struct nv_fetch *free;
    struct nv_fetch fetches[NV_FETCHES];
};

int nv_ahead_setup(struct nv_reactor *reactor)
{
    struct nv_ahead *ahead = calloc(1, sizeof *ahead);

    if (!ahead)
        return -ENOMEM;
    for (uint32_t i = 0; i < NV_FETCHES; i++) {
        ahead->fetches[i].next = ahead->free;
        ahead->free = &ahead->fetches[i];
    }
    reactor->ahead = ahead;
    return 0;
}

void nv_ahead_teardown(struct nv_reactor *reactor)
{
    free(reactor->ahead);
    reactor->ahead = NULL;
}

static void fetched(struct nv_vreq *v)
{
    struct nv_fetch *fetch = (struct nv_fetch *)v;
    struct nv_reactor *reactor = v->reactor;
    struct nv_volume_local *local = nv_volume_local(v->volume, reactor->index);

    nv_pool_put(reactor->pool, fetch->memory);
    reactor->pool_freed = true;
    fetch->next = reactor->ahead->free;
    reactor->ahead->free = fetch;
    reactor->fetches--;
    local->cached.fetches--;
    if (local->closing)
        nv_volume_local_left(reactor, local);
    else
        nv_ahead_pump(reactor, local);
}

/* A mirror may keep a request's memory past its answer (nbd/session.h: nv_request_keep); a fetch's it could not. */
static bool may_fetch(const struct nv_reactor *reactor, const struct nv_volume_local *local)
{
    return !local->volume->mirror && reactor->ahead && reactor->ahead->free && !reactor->stopping && !local->closing && !reactor->starving &&
           nv_pool_free_bytes(reactor->pool) >= nv_pool_total(reactor->pool) / 2;
}

/* True: it is under way. */
static bool fetch(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t from, uint64_t length)
{
    struct nv_fetch *fetch = reactor->ahead->free;

    assert(length > 0 && length <= NV_FETCH_BYTES && from + length <= local->map->size);
    fetch->memory = nv_pool_get(reactor->pool, length);
    if (!fetch->memory)
        return false;
    reactor->ahead->free = fetch->next;
    reactor->fetches++;
    local->cached.fetches++;
    nv_count(&local->cached.counters.ahead, length >> NV_CACHE_SHIFT);
    memset(&fetch->v, 0, sizeof fetch->v);
    fetch->v.reactor = reactor;
    fetch->v.volume = local->volume;
    fetch->v.kind = NV_REQUEST_READ;
    fetch->v.flags = NV_REQUEST_OURS;
    fetch->v.offset = from;
    fetch->v.length = length;
    fetch->v.data = fetch->memory;
    fetch->v.finished = fetched;
    fetch->v.cached.ahead = true;
    nv_volume_enter(&fetch->v);
    nv_volume_start(&fetch->v);
    return true;
}

/* Whole blocks of ours, of the storage, and of the volume. */
static uint64_t unit_of(const struct nv_volume_local *local)
{
    return local->map->block_min > NV_CACHE_BLOCK ? local->map->block_min : NV_CACHE_BLOCK;
}

/* Leave out what is there already at the front of a range. */
static uint64_t skip_present(const struct nv_volume_local *local, uint64_t from, uint64_t to)
{
    const struct nv_cached *cached = &local->volume->cached;
    const uint64_t unit = unit_of(local);
    struct nv_cache_spot spot = {cached->owner, nv_cache_tag(cached->cache, cached->owner), 0, false};

    for (uint32_t steps = 0; from < to && spot.tag != 0 && steps < NV_FETCH_BYTES / NV_CACHE_BLOCK; steps++) {
        uint32_t frame;
        spot.block = from >> NV_CACHE_SHIFT;
        frame = nv_cache_pin(cached->cache, &spot);
        if (frame == NV_CACHE_NONE)
            break;
        nv_cache_unpin(cached->cache, frame);
        from += unit;
    }
    return from;
}

/* One fetch at most; where the range begins afterwards. */
static uint64_t advance(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t from, uint64_t to)
{
    uint64_t length;

    from = skip_present(local, from, to);
    if (from >= to)
        return to;
    length = to - from < NV_FETCH_BYTES ? to - from : NV_FETCH_BYTES;
    return fetch(reactor, local, from, length) ? from + length : from;
}

static bool work_on(struct nv_reactor *reactor, struct nv_volume_local *local, struct nv_want *want)
{
    const uint64_t before = want->from, end = local->map->size & ~(unit_of(local) - 1);

    if (want->to > end)
        want->to = end;
    if (want->from >= want->to)
        return false;
    want->from = advance(reactor, local, want->from, want->to);
    return want->from != before;
}

void nv_ahead_pump(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    bool moved = true;

    if (local->cached.pumping) /* a fetch that was over at once */
        return;
    if (nv_cache_tag(local->volume->cached.cache, local->volume->cached.owner) == 0) {
        memset(local->cached.wants, 0, sizeof local->cached.wants);
        return;
    }
    local->cached.pumping = true;
    while (moved) {
        moved = false;
        for (uint32_t i = 0; i < NV_WANTS && may_fetch(reactor, local); i++)
            moved |= work_on(reactor, local, &local->cached.wants[i]);
    }
    local->cached.pumping = false;
}

void nv_cached_want(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t from, uint64_t to)
{
    const uint64_t unit = unit_of(local);

    for (uint32_t i = 0; i < NV_WANTS; i++) {
        struct nv_want *want = &local->cached.wants[i];
        if (want->from < want->to)
            continue;
        *want = (struct nv_want){from & ~(unit - 1), (to + unit - 1) & ~(unit - 1)};
        if (want->to > want->from + reactor->want_max)
            want->to = want->from + reactor->want_max;
        break;
    }
    nv_ahead_pump(reactor, local);
}

/* ---- streams ---- */

static struct nv_stream *stream_at(struct nv_cached_local *cached, uint64_t offset)
{
    for (uint32_t i = 0; i < NV_STREAMS; i++)
        if (cached->streams[i].used && cached->streams[i].next == offset)
            return &cached->streams[i];
    return NULL;
}

static void begin_stream(struct nv_cached_local *cached, uint64_t next)
{
    struct nv_stream *oldest = &cached->streams[0];

    for (uint32_t i = 1; i < NV_STREAMS; i++)
        if (cached->looks - cached->streams[i].used > cached->looks - oldest->used || !cached->streams[i].used)
            oldest = &cached->streams[i];
    *oldest = (struct nv_stream){.next = next, .used = cached->looks};
}

static void follow(struct nv_reactor *reactor, struct nv_volume_local *local, struct nv_stream *stream, uint32_t most)
{
    const uint64_t unit = unit_of(local), end = local->map->size & ~(unit - 1);
    uint64_t target;

    if (stream->fetched < stream->next) /* it has overtaken us, or begins */
        stream->fetched = (stream->next + unit - 1) & ~(unit - 1);
    if (stream->fetched > stream->next + stream->window / 2)
        return;
    stream->window = stream->window * 2 < most ? stream->window * 2 : most;
    target = (stream->next + stream->window) & ~(unit - 1);
    if (target > end)
        target = end;
    while (stream->fetched < target && may_fetch(reactor, local)) {
        const uint64_t before = stream->fetched;
        stream->fetched = advance(reactor, local, before, target);
        if (stream->fetched == before)
            break;
    }
}

/*
 * A client with several requests under way that asks for what is being fetched needs nobody to read ahead of it: both
 * would read the same. It is left alone for a while, and for longer each time.
 */
static void leave_alone(struct nv_stream *stream)
{
    stream->pauses = stream->pauses == 0 ? NV_AHEAD_PAUSE : stream->pauses * 2;
    if (stream->pauses > NV_AHEAD_PAUSE_MAX)
        stream->pauses = NV_AHEAD_PAUSE_MAX;
    stream->pause = stream->pauses;
    stream->window = 0;
}

bool nv_cached_saw(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset, uint64_t length,
                   bool all_hit)
{
    struct nv_cached_local *cached = &local->cached;
    const uint32_t most = atomic_load_explicit(&local->volume->cached.ahead_max, memory_order_relaxed);
    struct nv_stream *stream;

    if (++cached->looks == 0)
        cached->looks = 1;
    stream = stream_at(cached, offset);
    if (!stream) {
        begin_stream(cached, offset + length);
        return false;
    }
    if (!all_hit && offset < stream->fetched) {
        if (cached->fetches == 0)
            stream->window /= 4; /* fetched, and gone again: `follow` doubles it */
        else if (cached->reads > 0 && stream->pause == 0)
            leave_alone(stream);
    }
    if (stream->window < length)
        stream->window = (uint32_t)length;
    stream->next = offset + length;
    stream->used = cached->looks;
    stream->seen += length;
    if (stream->pause > 0)
        stream->pause--;
    else if (most > 0)
        follow(reactor, local, stream, most);
    return stream->seen > local->volume->plane->config.cache_bytes / 10 || stream->seen > NV_SCAN_BYTES;
}
