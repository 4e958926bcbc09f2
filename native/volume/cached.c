/*
 * See cached.h. A request's way past the cache, and the owner's holds. What is not here: where blocks are kept (cache/),
 * what is fetched ahead (ahead.c), replies that are sent from frames (nbd/hit.c).
 */
#include "volume/cached.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "reactor/plane.h"
#include "volume/volume.h"

static struct nv_volume_local *local_of(const struct nv_vreq *request)
{
    return nv_volume_local(request->volume, request->reactor->index);
}

static uint64_t first_block(uint64_t offset)
{
    return offset >> NV_CACHE_SHIFT;
}

/* The block behind the last one that the bytes touch. */
static uint64_t end_block(uint64_t end)
{
    return (end + NV_CACHE_BLOCK - 1) >> NV_CACHE_SHIFT;
}

/* ---- on and off ---- */

static bool in_memory(const struct nv_map *map)
{
    for (uint32_t i = 0; i < map->object_count; i++)
        if (!atomic_load_explicit(&map->objects[i]->view, memory_order_relaxed))
            return false;
    return map->object_count > 0;
}

void nv_cached_open(struct nv_volume *volume)
{
    struct nv_cached *cached = &volume->cached;

    cached->cache = volume->plane->cache;
    cached->owner = volume->id;
    if (!cached->cache)
        return;
    for (uint32_t i = 0; i < volume->plane->config.reactors; i++)
        volume->locals[i].layers |= NV_LAYER_CACHE;
    nv_cache_open(cached->cache, cached->owner);
    cached->no_mode = true;
    cached->bypassed = in_memory(volume->latest);
    if (cached->bypassed)
        nv_cache_hold(cached->cache, cached->owner);
}

void nv_cached_close(struct nv_volume *volume)
{
    if (!volume->cached.cache)
        return;
    nv_cache_hold(volume->cached.cache, volume->cached.owner);
    nv_cache_set_floor(volume->cached.cache, volume->cached.owner, 0);
}

void nv_cached_hold(struct nv_volume *volume)
{
    if (volume->cached.cache)
        nv_cache_hold(volume->cached.cache, volume->cached.owner);
}

void nv_cached_release(struct nv_volume *volume)
{
    if (volume->cached.cache)
        nv_cache_release(volume->cached.cache, volume->cached.owner);
}

void nv_cached_fence(struct nv_volume *volume)
{
    nv_cached_hold(volume);
}

/* Growth: every old run is as it was, the last one perhaps longer. */
bool nv_cached_same_bytes(const struct nv_map *from, const struct nv_map *to)
{
    if (from->epoch != to->epoch || from->run_count > to->run_count || from->size > to->size)
        return false;
    for (uint64_t i = 0; i < from->run_count; i++) {
        const struct nv_run *old = &from->runs[i], *new = &to->runs[i];
        const bool last = i + 1 == from->run_count;
        if (old->offset != new->offset || old->object_offset != new->object_offset || old->object != new->object ||
            old->state != new->state || new->length < old->length || (!last && new->length != old->length))
            return false;
    }
    return true;
}

void nv_cached_map_changes(struct nv_volume *volume, const struct nv_map *from, const struct nv_map *to)
{
    if (!nv_cached_same_bytes(from, to))
        nv_cached_hold(volume);
}

void nv_cached_map_changed(struct nv_volume *volume, const struct nv_map *from, const struct nv_map *to)
{
    struct nv_cached *cached = &volume->cached;
    const bool memory = in_memory(volume->latest);

    if (cached->cache && memory != cached->bypassed) {
        if (memory)
            nv_cached_hold(volume);
        else
            nv_cached_release(volume);
        cached->bypassed = memory;
    }
    if (!nv_cached_same_bytes(from, to))
        nv_cached_release(volume);
}

static void tell(struct nv_reactor *reactor, struct nv_cached_change *change)
{
    if (atomic_fetch_sub(&change->left, 1) == 1)
        nv_events_raise(&reactor->events, &change->changed);
}

static void hook(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_cached_change *change = ((struct nv_cached_message *)message)->change;
    struct nv_cached_local *cached = &nv_volume_local(change->volume, reactor->index)->cached;

    if (!cached->hooks)
        cached->unhooked = cached->writes;
    cached->hooks = true;
    if (cached->unhooked > 0)
        cached->change = change;
    else
        tell(reactor, change);
}

void nv_cached_drained(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    struct nv_cached_change *change = local->cached.change;

    local->cached.change = NULL;
    if (change)
        tell(reactor, change);
}

static struct nv_cached_change *make_change(struct nv_volume *volume, uint64_t token)
{
    const uint32_t reactors = volume->plane->config.reactors;
    struct nv_cached_change *change = calloc(1, sizeof *change + reactors * sizeof(struct nv_cached_message));

    if (!change)
        return NULL;
    change->volume = volume;
    atomic_store(&change->left, reactors);
    change->changed.event = (nv_event){.kind = NV_EVENT_VOLUME_CACHE, .token = token, .volume = volume->id};
    change->changed.subject = change;
    return change;
}

static int check_policy(const struct nv_volume *volume, const nv_cache_policy *policy)
{
    if (policy->mode > NV_CACHE_MODE_WRITETHROUGH)
        return nv_fail(EINVAL, "cache mode %u is unknown", policy->mode);
    if (policy->ahead_bytes > NV_AHEAD_MAX)
        return nv_fail(EINVAL, "reading %u bytes ahead is above %u", policy->ahead_bytes, NV_AHEAD_MAX);
    if (policy->mode != NV_CACHE_MODE_NONE && !volume->cached.cache)
        return nv_fail(ENOSYS, "the data plane was started without memory for a cache");
    return 0;
}

int nv_volume_set_cache(nv_plane *plane, uint32_t number, const nv_cache_policy *policy, uint64_t token)
{
    struct nv_volume *volume = nv_table_get(&plane->volumes, number);
    struct nv_cached_change *change;
    int error = volume && !volume->closing ? check_policy(volume, policy) : nv_fail(ENOENT, "volume %u is not open", number);

    if (error)
        return error;
    if (volume->cached.changing)
        return nv_fail(EALREADY, "another cache policy of volume %u is on its way", number);
    change = make_change(volume, token);
    if (!change)
        return nv_fail(ENOMEM, "no memory for a cache policy");
    atomic_store(&volume->cached.mode, policy->mode);
    atomic_store(&volume->cached.ahead_max, policy->ahead_bytes);
    if (volume->cached.cache)
        nv_cache_set_floor(volume->cached.cache, number, policy->mode == NV_CACHE_MODE_NONE ? 0 : policy->floor_bytes);
    if (policy->mode == NV_CACHE_MODE_NONE && volume->cached.cache && !volume->cached.no_mode) {
        nv_cached_hold(volume);
        volume->cached.no_mode = true;
    }
    volume->cached.changing = true;
    volume->changes++;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        change->messages[i].change = change;
        change->messages[i].message.run = hook;
        nv_reactor_send(nv_plane_reactor(plane, i), &change->messages[i].message);
    }
    return 0;
}

void nv_cached_policy_changed(struct nv_cached_change *change)
{
    struct nv_volume *volume = change->volume;
    struct nv_cached *cached = &volume->cached;

    cached->changing = false;
    volume->changes--;
    if (cached->no_mode && atomic_load(&cached->mode) != NV_CACHE_MODE_NONE) {
        cached->no_mode = false;
        nv_cached_release(volume);
    }
    free(change);
    nv_volume_forget(volume->plane, volume);
}

/* ---- reads ---- */

/*
 * Of a long read at least a quarter is cached from its beginning on, or was fetched ahead for it. Less is not worth a read
 * below that begins elsewhere.
 */
static bool begins_cached(const struct nv_vreq *request, struct nv_cache_spot *spot)
{
    struct nv_cache *cache = request->volume->cached.cache;
    const uint64_t first = first_block(request->offset), blocks = end_block(request->offset + request->length) - first;
    bool enough = blocks < NV_CACHE_LONG_BLOCKS;

    for (spot->block = first; !enough && spot->block < first + blocks / 4; spot->block++) {
        const uint32_t frame = nv_cache_pin(cache, spot);
        if (frame == NV_CACHE_NONE)
            return false;
        enough = nv_cache_is_ahead(cache, frame);
        nv_cache_unpin(cache, frame);
    }
    return true;
}

/* How much of the range is cached from its beginning on: copied, in whole blocks or up to the end. */
static uint64_t copy_hits(struct nv_vreq *request, struct nv_cache_spot *spot)
{
    struct nv_cache *cache = request->volume->cached.cache;
    struct nv_cached_counters *counters = &local_of(request)->cached.counters;
    uint64_t done = 0;

    while (done < request->length) {
        const uint64_t at = request->offset + done, into = at & (NV_CACHE_BLOCK - 1);
        const uint64_t left = request->length - done, here = NV_CACHE_BLOCK - into;
        const uint64_t take = here < left ? here : left;
        uint32_t frame;
        spot->block = first_block(at);
        frame = nv_cache_pin(cache, spot);
        if (frame == NV_CACHE_NONE)
            break;
        memcpy(request->data + done, nv_cache_bytes(cache, frame) + into, take);
        nv_count(&counters->ahead_used, nv_cache_first_use(cache, frame));
        nv_cache_unpin(cache, frame);
        nv_count(&counters->hits, 1);
        done += take;
    }
    nv_count(&request->reactor->counters.copies_bytes, done);
    if (done < request->length && request->map->block_min > NV_CACHE_BLOCK) /* what is left is to be read */
        done = ((request->offset + done) & ~((uint64_t)request->map->block_min - 1)) - request->offset;
    return done;
}

/* A read that covers no whole block leaves nothing behind: have its blocks fetched. */
static void want_edges(struct nv_vreq *request)
{
    const uint64_t from = request->offset + request->done, to = request->offset + request->length;

    if (end_block(from) >= first_block(to))
        nv_cached_want(request->reactor, local_of(request), first_block(from) << NV_CACHE_SHIFT,
                       end_block(to) << NV_CACHE_SHIFT);
}

static void read_begins(struct nv_vreq *request, uint32_t tag)
{
    struct nv_cache_spot spot = {request->volume->cached.owner, tag, 0, false};
    struct nv_cached_request *cached = &request->cached;
    bool scan = false;

    cached->time = nv_cache_now(request->volume->cached.cache);
    cached->tag = tag;
    if (!cached->ahead) {
        request->done = begins_cached(request, &spot) ? copy_hits(request, &spot) : 0;
        scan = nv_cached_saw(request->reactor, local_of(request), request->offset, request->length,
                             request->done == request->length);
    }
    cached->from = request->offset + request->done;
    if (request->done == request->length)
        return;
    if (!cached->ahead) {
        nv_count(&local_of(request)->cached.counters.misses,
                 end_block(request->offset + request->length) - first_block(cached->from));
        local_of(request)->cached.reads++;
        want_edges(request);
    }
    cached->state = scan ? NV_CACHED_SCAN : NV_CACHED_READ;
}

static void read_ends(struct nv_vreq *request)
{
    struct nv_cache *cache = request->volume->cached.cache;
    struct nv_cached_counters *counters = &local_of(request)->cached.counters;
    struct nv_cache_spot spot = {request->volume->cached.owner, request->cached.tag, end_block(request->cached.from),
                                 request->cached.state == NV_CACHED_SCAN};
    uint64_t end = first_block(request->offset + request->length);
    struct nv_cache_filled done;

    if (!request->cached.ahead)
        local_of(request)->cached.reads--;
    if (request->error)
        return;
    if (end > spot.block + NV_CACHE_FILL_MAX)
        end = spot.block + NV_CACHE_FILL_MAX;
    if (spot.block >= end)
        return;
    done = nv_cache_fill(cache, &spot, end - spot.block, request->cached.time,
                         request->data + ((spot.block << NV_CACHE_SHIFT) - request->offset), request->cached.ahead);
    nv_count(&counters->filled, done.filled);
    nv_count(&counters->refused, done.refused);
}

/* ---- writes, trims, zeroes ---- */

static void write_begins(struct nv_vreq *request)
{
    const uint64_t first = first_block(request->offset), end = end_block(request->offset + request->length);

    if (request->length > NV_PAYLOAD_MAX) { /* so many blocks are not looked at one by one */
        nv_cached_hold(request->volume);
        request->cached.state = NV_CACHED_LONG;
        return;
    }
    request->cached.time = nv_cache_write_begins(request->volume->cached.cache, request->volume->cached.owner, first,
                                                 end - first);
    request->cached.state = NV_CACHED_WRITE;
}

static void write_ends(struct nv_vreq *request)
{
    const struct nv_cached *cached = &request->volume->cached;
    const uint64_t first = first_block(request->offset), end = end_block(request->offset + request->length);
    const uint64_t whole = end_block(request->offset), whole_end = first_block(request->offset + request->length);
    const uint64_t count = whole_end > whole ? whole_end - whole : 0;
    const bool keep = request->kind == NV_REQUEST_WRITE && request->error == 0 && count > 0 &&
                      count <= NV_CACHE_FILL_MAX &&
                      atomic_load_explicit(&cached->mode, memory_order_relaxed) == NV_CACHE_MODE_WRITETHROUGH;
    const uint8_t *bytes = keep ? request->data + ((whole << NV_CACHE_SHIFT) - request->offset) : NULL;
    const uint64_t put = nv_cache_write_ends(cached->cache, cached->owner, first, end - first, request->cached.time,
                                             whole, count, bytes);

    nv_count(&local_of(request)->cached.counters.written, put);
}

/* ---- a request's way ---- */

void nv_cached_begins(struct nv_vreq *request)
{
    const struct nv_cached *cached = &request->volume->cached;
    uint32_t tag;

    switch (request->kind) {
    case NV_REQUEST_WRITE:
    case NV_REQUEST_TRIM:
    case NV_REQUEST_ZERO:
        if (!request->cached.unhooked && request->length > 0)
            write_begins(request);
        break;
    case NV_REQUEST_READ:
        if (request->length > 0 && (tag = nv_cache_tag(cached->cache, cached->owner)) != 0)
            read_begins(request, tag);
        break;
    case NV_REQUEST_CACHE:
        if (request->length > 0 && nv_cache_tag(cached->cache, cached->owner) != 0) {
            nv_cached_want(request->reactor, local_of(request), request->offset, request->offset + request->length);
            request->done = request->length;
        }
        break;
    default:
        break;
    }
}

void nv_cached_ends(struct nv_vreq *request)
{
    switch (request->cached.state) {
    case NV_CACHED_READ:
    case NV_CACHED_SCAN:
        read_ends(request);
        break;
    case NV_CACHED_WRITE:
        write_ends(request);
        break;
    default:
        assert(request->cached.state == NV_CACHED_LONG);
        nv_cached_release(request->volume);
        break;
    }
    request->cached.state = 0;
}

/* ---- hits without a copy ---- */

static void unpin_all(struct nv_cache *cache, const uint32_t *frames, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        nv_cache_unpin(cache, frames[i]);
}

uint32_t nv_cached_pin(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset, uint64_t length,
                       uint32_t *frames, uint32_t max)
{
    const struct nv_cached *cached = &local->volume->cached;
    const uint64_t end = end_block(offset + length);
    struct nv_cache_spot spot = {cached->owner, nv_cache_tag(cached->cache, cached->owner), first_block(offset), false};
    uint32_t count = 0;

    if (spot.tag == 0 || end - spot.block > max || reactor->pins + (end - spot.block) > reactor->pins_max)
        return 0;
    for (; spot.block < end; spot.block++) {
        frames[count] = nv_cache_pin(cached->cache, &spot);
        if (frames[count] == NV_CACHE_NONE) {
            unpin_all(cached->cache, frames, count);
            return 0;
        }
        count++;
    }
    for (uint32_t i = 0; i < count; i++)
        nv_count(&local->cached.counters.ahead_used, nv_cache_first_use(cached->cache, frames[i]));
    nv_count(&local->cached.counters.hits, count);
    reactor->pins += count;
    (void)nv_cached_saw(reactor, local, offset, length, true);
    return count;
}

/* ---- looking on ---- */

int nv_volume_cache(nv_plane *plane, uint32_t number, nv_cache_status *out)
{
    struct nv_volume *volume = nv_table_get(&plane->volumes, number);
    struct nv_cached *cached;

    if (!volume)
        return nv_fail(ENOENT, "volume %u is not open", number);
    cached = &volume->cached;
    *out = (nv_cache_status){.mode = atomic_load(&cached->mode), .bypassed = cached->bypassed};
    if (cached->cache)
        out->held_bytes = nv_cache_held_bytes(cached->cache, cached->owner, &out->floor_bytes);
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        struct nv_cached_counters *counters = &volume->locals[i].cached.counters;
        out->hits += atomic_load(&counters->hits);
        out->misses += atomic_load(&counters->misses);
        out->filled += atomic_load(&counters->filled);
        out->refused += atomic_load(&counters->refused);
        out->written += atomic_load(&counters->written);
        out->ahead += atomic_load(&counters->ahead);
        out->ahead_used += atomic_load(&counters->ahead_used);
    }
    return 0;
}

int nv_plane_cache(nv_plane *plane, nv_cache_totals *out)
{
    struct nv_cache_totals totals = {0};

    if (plane->cache)
        nv_cache_look(plane->cache, &totals);
    *out = (nv_cache_totals){.bytes = totals.frames * NV_CACHE_BLOCK, .used_bytes = totals.used * NV_CACHE_BLOCK,
                             .evictions = totals.evictions};
    for (uint32_t i = 0; i < plane->config.reactors; i++)
        out->pinned_bytes += (uint64_t)atomic_load_explicit(&plane->reactors[i].counters.pinned, memory_order_relaxed) *
                             NV_CACHE_BLOCK;
    return 0;
}
