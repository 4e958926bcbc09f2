/*
 * See volume.h. Invariants: a request holds its map from enter to finish and counts as a user of it; a write-like
 * request holds its place in the range order exactly that long; pieces of one request run one after another in
 * ascending order. A request that crosses runs becomes several pieces. What is not here: protocol, buffers, policy.
 */
#include "volume/volume.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "limits.h"
#include "nbd/session.h"
#include "reactor/reactor.h"
#include "volume/logged.h"
#include "volume/mirror.h"

static void step(struct nv_vreq *request);
static void sync_next(struct nv_vreq *request);
static void flush(struct nv_vreq *request);
static void finish_below(struct nv_vreq *request);

_Static_assert(NV_REQUEST_READ == 0 && NV_REQUEST_WRITE == 1, "orders() looks at them first");

static bool orders(const struct nv_vreq *request)
{
    if (request->kind <= NV_REQUEST_WRITE) /* most are of these two */
        return request->kind == NV_REQUEST_WRITE;
    return request->kind == NV_REQUEST_TRIM || request->kind == NV_REQUEST_ZERO;
}

/* The trace's moment `submitted` (nbd/trace.h): the first time that the storage is asked. */
static void note_submitted(struct nv_vreq *request)
{
    if (nv_recording(request->reactor) && request->stamps.submitted_ns == 0)
        request->stamps.submitted_ns = nv_io_now_ns(request->reactor->io);
}

static struct nv_volume_local *local_of(const struct nv_vreq *request)
{
    return &request->volume->locals[request->reactor->index];
}

static void owner_checks(struct nv_reactor *reactor, struct nv_message *message);

/*
 * The reactor has no older I/O any more. A mirror's owner may still get some from other reactors, until they have none:
 * its word counts when it is the last.
 */
static void change_drained(struct nv_reactor *reactor, struct nv_volume_change *change)
{
    struct nv_mirror *mirror = change->volume->mirror;
    uint32_t left;

    if (mirror && nv_mirror_owner(mirror) == reactor && !change->owners_turn)
        return;
    left = atomic_fetch_sub(&change->left, 1) - 1;
    if (left == 0) {
        nv_events_raise(&reactor->events, &change->changed);
    } else if (left == 1 && mirror) {
        struct nv_message *message = &change->messages[reactor->index].message; /* it has brought the change here */
        message->run = owner_checks;
        nv_reactor_send(nv_mirror_owner(mirror), message);
    }
}

static void owner_checks(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_volume_change *change = ((struct nv_change_message *)message)->change;
    const struct nv_map_user *user = &change->from->users[reactor->index];

    change->owners_turn = true;
    if (user->retiring && user->in_flight == 0)
        change_drained(reactor, change);
}

void nv_map_hold(struct nv_map *map, struct nv_reactor *reactor)
{
    map->users[reactor->index].in_flight++;
}

void nv_map_release(struct nv_map *map, struct nv_reactor *reactor)
{
    struct nv_map_user *user = &map->users[reactor->index];

    assert(user->in_flight > 0);
    if (--user->in_flight == 0 && user->retiring)
        change_drained(reactor, map->change);
}

static void release_map(struct nv_vreq *request)
{
    nv_map_release(request->map, request->reactor);
    request->map = NULL;
}

/* How many syncs of the map's objects have failed so far, also where the operator has cleared the fault. */
static uint64_t faults_of(const struct nv_map *map)
{
    uint64_t faults = 0;

    for (uint32_t i = 0; i < map->object_count; i++)
        faults += atomic_load(&map->objects[i]->sync.faults);
    return faults;
}

/* Trims and zeroes become durable by a sync that follows them, writes piece by piece. */
static bool syncs_after(const struct nv_vreq *request)
{
    return (request->flags & NV_REQUEST_FUA) && (request->kind == NV_REQUEST_TRIM || request->kind == NV_REQUEST_ZERO);
}

/* To the map. */
static void run_below(struct nv_vreq *request)
{
    if (syncs_after(request) && !request->map->legs)
        request->faults = faults_of(request->map);
    step(request);
}

static void run_logged(struct nv_vreq *request)
{
    note_submitted(request);
    nv_logged_run(request);
}

static void passes_gate(struct nv_vreq *request, struct nv_volume_local *local)
{
    local->gate.running++;
    request->runs = true;
}

/* Through the gate, past the cache, to the log, or to the map. */
static void run_layered(struct nv_vreq *request, struct nv_volume_local *local)
{
    if (local->layers & NV_LAYER_GATE) {
        nv_gate_hold(&local->gate, request);
        return;
    }
    passes_gate(request, local);
    if (local->layers & NV_LAYER_CACHE)
        nv_cached_begins(request);
    if ((local->layers & NV_LAYER_LOG) && request->kind != NV_REQUEST_CACHE && request->done < request->length)
        run_logged(request);
    else
        run_below(request);
}

/* Its turn has come. */
static void run(struct nv_vreq *request)
{
    struct nv_volume_local *local = local_of(request);

    if (__builtin_expect(local->layers, 0)) {
        run_layered(request, local);
        return;
    }
    passes_gate(request, local);
    run_below(request);
}

static void range_ready(struct nv_range *range)
{
    run((struct nv_vreq *)((char *)range - offsetof(struct nv_vreq, range)));
}

/* A log knows whole blocks alone. */
static void widen(struct nv_vreq *request, struct nv_gate *gate)
{
    request->narrow = !gate->widens;
    if (request->narrow)
        gate->narrow++;
    else
        nv_logged_widen(&request->range.offset, &request->range.length);
}

/* A write-like request of a volume with a cache. */
static void enter_cached(struct nv_vreq *request, struct nv_volume_local *local)
{
    local->cached.writes++;
    request->cached.unhooked = !local->cached.hooks;
}

static void leave_cached(struct nv_vreq *request, struct nv_volume_local *local)
{
    local->cached.writes--;
    if (request->cached.unhooked && local->cached.hooks && --local->cached.unhooked == 0)
        nv_cached_drained(request->reactor, local);
}

void nv_volume_enter(struct nv_vreq *request)
{
    struct nv_volume_local *local = local_of(request);

    request->map = local->map;
    request->map->users[request->reactor->index].in_flight++;
    request->error = 0;
    request->done = 0;
    request->object_next = 0;
    request->extents_count = 0;
    request->cached.state = 0;
    request->runs = false;
    nv_count(&local->counters.in_flight, 1);
    if (!orders(request) || request->length == 0)
        return;
    assert(request->offset + request->length <= request->map->size);
    request->range.offset = request->offset;
    request->range.length = request->length;
    widen(request, &local->gate);
    if (local->layers & NV_LAYER_CACHE)
        enter_cached(request, local);
    request->range.reactor = request->reactor;
    request->range.ready = range_ready;
    nv_range_enter(&request->volume->ranges, &request->range);
}

static void leave(struct nv_vreq *request, struct nv_volume_local *local)
{
    nv_count(&local->counters.in_flight, (uint64_t)-1);
    if (orders(request) && request->length > 0) {
        nv_range_leave(&request->volume->ranges, &request->range);
        local->gate.narrow -= request->narrow;
        if (local->layers & NV_LAYER_CACHE)
            leave_cached(request, local);
    }
    local->gate.running -= request->runs;
    if (__builtin_expect(local->gate.waits != NULL, 0))
        nv_gate_left(&local->gate);
    release_map(request);
}

void nv_volume_abandon(struct nv_vreq *request)
{
    leave(request, local_of(request));
}

static void start_flush(struct nv_vreq *request)
{
    struct nv_volume_local *local = local_of(request);

    if (local->layers & NV_LAYER_GATE) {
        nv_gate_hold(&local->gate, request);
        return;
    }
    passes_gate(request, local);
    if (local->layers & NV_LAYER_LOG)
        run_logged(request);
    else if (request->map->legs)
        nv_mirror_run(request);
    else
        flush(request);
}

void nv_volume_start(struct nv_vreq *request)
{
    if (__builtin_expect(request->kind == NV_REQUEST_FLUSH, 0))
        start_flush(request);
    else if (!orders(request) || request->length == 0 || nv_range_release(&request->volume->ranges, &request->range))
        run(request);
}

void nv_volume_go_on(struct nv_vreq *request)
{
    if (request->kind == NV_REQUEST_FLUSH)
        start_flush(request);
    else
        run(request);
}

static void count(struct nv_vreq *request, struct nv_volume_local *local)
{
    struct nv_volume_counters *counters = &local->counters;

    if (__builtin_expect(request->flags & NV_REQUEST_OURS, 0))
        return;
    nv_count(&counters->kinds[request->kind].requests, 1);
    if (__builtin_expect(request->error != 0, 0))
        nv_count(&counters->errors, 1);
    else
        nv_count(&counters->kinds[request->kind].bytes, request->length);
}

uint8_t *nv_volume_look(const struct nv_map *map, uint64_t offset, uint64_t length, struct nv_object **object)
{
    const struct nv_run *run;
    struct nv_view *view;
    uint64_t into;

    if (offset >= map->size || length > map->size - offset)
        return NULL; /* the volume shrank while the request waited */
    run = nv_map_find(map, offset);
    into = offset - run->offset;
    if (!run->object || length > run->length - into)
        return NULL;
    *object = run->object;
    view = atomic_load_explicit(&run->object->view, memory_order_acquire);
    return view ? nv_view_at(view, run->object_offset + into, length) : NULL;
}

int64_t nv_volume_copy(const struct nv_vreq *request, uint64_t from, void *to, uint64_t length)
{
    const struct nv_run *run = nv_map_find(request->map, request->offset);

    if (run->state == NV_RUN_LEGS)
        return nv_mirror_copy(request, from, to, length);
    assert(run->object && from + length <= request->length);
    return nv_io_copy(run->object->handle, to, length, run->object_offset + request->offset - run->offset + from);
}

void nv_volume_served(struct nv_vreq *request)
{
    struct nv_volume_local *local = local_of(request);

    assert(request->kind == NV_REQUEST_READ && request->error == 0);
    nv_object_count(request->piece.object, request->reactor->index, NV_PIECE_READ, request->length);
    count(request, local);
    leave(request, local);
}

void nv_volume_hit(struct nv_vreq *request)
{
    struct nv_volume_local *local = local_of(request);

    assert(request->kind == NV_REQUEST_READ && request->error == 0);
    count(request, local);
    leave(request, local);
}

void nv_volume_remap(struct nv_vreq *request)
{
    assert(request->kind == NV_REQUEST_READ && request->map != local_of(request)->map);
    release_map(request);
    request->map = local_of(request)->map;
    request->map->users[request->reactor->index].in_flight++;
}

void nv_volume_finish(struct nv_vreq *request, int error)
{
    struct nv_volume_local *local = local_of(request);

    assert(error <= 0);
    request->error = error;
    if (__builtin_expect(request->cached.state, 0)) {
        if (request->cached.state == NV_CACHED_BELOW) {
            finish_below(request);
            return;
        }
        nv_cached_ends(request);
    }
    count(request, local);
    leave(request, local);
    request->finished(request);
}

/* --- FLUSH, and FUA of trims and zeroes: the map's objects one after another --- */

static void synced(struct nv_sync_wait *wait)
{
    struct nv_vreq *request = (struct nv_vreq *)((char *)wait - offsetof(struct nv_vreq, wait));

    if (wait->error)
        nv_volume_finish(request, wait->error);
    else
        sync_next(request);
}

/*
 * A sync that failed since the request began may have lost what it covers, and a later one that succeeds says nothing
 * of that: its answer is an error, whatever the operator has cleared meanwhile.
 */
static void sync_next(struct nv_vreq *request)
{
    while (request->object_next < request->map->object_count) {
        struct nv_object *object = request->map->objects[request->object_next++];
        request->wait.done = synced;
        note_submitted(request);
        if (!nv_sync_begin(&object->sync, request->reactor, &request->wait))
            return;
        if (request->wait.error) {
            nv_volume_finish(request, request->wait.error);
            return;
        }
    }
    nv_volume_finish(request, faults_of(request->map) == request->faults ? 0 : -EIO);
}

static void flush(struct nv_vreq *request)
{
    request->faults = faults_of(request->map);
    sync_next(request);
}

/* --- everything else: piece by piece along the runs --- */

static void all_done(struct nv_vreq *request)
{
    assert(request->done == request->length || request->kind == NV_REQUEST_STATUS);
    if (syncs_after(request))
        sync_next(request);
    else
        nv_volume_finish(request, 0);
}

/* Append an extent, merged with an equal neighbour; boundaries are rounded so that data grows, never shrinks. */
void nv_volume_extent(struct nv_vreq *request, uint64_t length, uint32_t flags)
{
    const uint64_t unit = request->map->block_min;
    struct nv_extent *last = request->extents_count ? &request->extents[request->extents_count - 1] : NULL;
    const uint64_t from = request->done;
    uint64_t until = from + length;

    if (until < request->length) /* the last boundary is the request's own */
        until = flags ? until & ~(unit - 1) : (until + unit - 1) & ~(unit - 1);
    if (until > request->length)
        until = request->length;
    if (until <= from)
        return;
    if (last && last->flags == flags)
        last->length += until - from;
    else
        request->extents[request->extents_count++] = (struct nv_extent){until - from, flags};
    request->done = until;
}

bool nv_volume_extents_full(const struct nv_vreq *request)
{
    if (request->kind != NV_REQUEST_STATUS)
        return false;
    return request->extents_count >= request->extents_max ||
           ((request->flags & NV_REQUEST_ONE) && request->extents_count > 1);
}

void nv_volume_extents(struct nv_vreq *request, const struct nv_extent *extents, int64_t count)
{
    const uint64_t start = request->offset + request->done;
    uint64_t at = start;

    for (int64_t i = 0; i < count && !nv_volume_extents_full(request); i++) {
        uint64_t end = at + extents[i].length;
        uint64_t have = request->offset + request->done; /* rounding may have eaten into this one */
        if (end > have)
            nv_volume_extent(request, end - have, extents[i].flags);
        at = end;
    }
    if (request->offset + request->done == start) /* a hole smaller than a block: call the block data */
        nv_volume_extent(request, 1, 0);
}

static void piece_finished(struct nv_piece *piece, int64_t result)
{
    struct nv_vreq *request = (struct nv_vreq *)((char *)piece - offsetof(struct nv_vreq, piece));

    if (result < 0) {
        nv_volume_finish(request, (int)result);
        return;
    }
    if (request->kind == NV_REQUEST_STATUS)
        nv_volume_extents(request, request->piece.extents, result);
    else
        request->done += request->piece_length;
    step(request);
}

static uint8_t piece_kind(const struct nv_vreq *request)
{
    static const uint8_t kinds[] = {
        [NV_REQUEST_READ] = NV_PIECE_READ,      [NV_REQUEST_WRITE] = NV_PIECE_WRITE,
        [NV_REQUEST_TRIM] = NV_PIECE_TRIM,      [NV_REQUEST_ZERO] = NV_PIECE_ZERO,
        [NV_REQUEST_CACHE] = NV_PIECE_PREFETCH, [NV_REQUEST_STATUS] = NV_PIECE_EXTENTS,
    };

    assert(request->kind < sizeof kinds && kinds[request->kind] != 0);
    return kinds[request->kind];
}

static void start_piece(struct nv_vreq *request, const struct nv_run *run, uint64_t into, uint64_t length)
{
    struct nv_piece *piece = &request->piece;

    piece->reactor = request->reactor;
    piece->object = run->object;
    piece->kind = piece_kind(request);
    piece->flags = (uint8_t)((request->flags & NV_REQUEST_FUA ? NV_PIECE_DSYNC : 0) |
                             (request->flags & NV_REQUEST_NO_HOLE ? NV_PIECE_NO_HOLE : 0) |
                             (request->flags & NV_REQUEST_FAST ? NV_PIECE_FAST : 0));
    piece->offset = run->object_offset + into;
    piece->length = length;
    piece->data = request->data ? request->data + request->done : NULL;
    if (request->kind == NV_REQUEST_STATUS) {
        piece->extents = request->extents + request->extents_max;
        piece->extents_max = request->extents_max - request->extents_count;
    }
    piece->finished = piece_finished;
    request->piece_length = length;
    note_submitted(request);
    nv_piece_start(piece);
}

/* A run without storage, or one that may not be written, or that legs have. True: handled, go on; false: no more. */
static bool without_storage(struct nv_vreq *request, const struct nv_run *run, uint64_t length)
{
    if (run->state == NV_RUN_LEGS) {
        nv_mirror_run(request);
        return false;
    }
    if (request->kind == NV_REQUEST_WRITE || (request->kind == NV_REQUEST_ZERO && run->state != NV_RUN_ZERO)) {
        nv_volume_finish(request, -EIO); /* the place of the map fault: until it is built, nothing can allocate the run */
        return false;
    }
    if (request->kind == NV_REQUEST_STATUS) {
        nv_volume_extent(request, length, NV_EXTENT_HOLE | NV_EXTENT_ZERO);
        return true;
    }
    if (request->kind == NV_REQUEST_READ)
        memset(request->data + request->done, 0, length);
    request->done += length;
    return true;
}

static bool needs_storage(const struct nv_vreq *request, const struct nv_run *run)
{
    if (run->state == NV_RUN_MAPPED)
        return true;
    return run->state == NV_RUN_WRITE_PROTECTED && !orders(request);
}

static bool fua_would_lie(const struct nv_vreq *request, const struct nv_run *run)
{
    return (request->flags & NV_REQUEST_FUA) && request->kind == NV_REQUEST_WRITE && run->object &&
           atomic_load(&run->object->sync.fault);
}

static void step(struct nv_vreq *request)
{
    while (request->done < request->length) {
        const uint64_t at = request->offset + request->done;
        const struct nv_run *run = nv_map_find(request->map, at);
        const uint64_t into = at - run->offset;
        uint64_t length = run->length - into;

        assert(at >= run->offset && into < run->length);
        if (length > request->length - request->done)
            length = request->length - request->done;
        if (nv_volume_extents_full(request))
            break;
        if (fua_would_lie(request, run)) {
            nv_volume_finish(request, -EIO);
            return;
        }
        if (needs_storage(request, run)) {
            start_piece(request, run, into, length);
            return;
        }
        if (!without_storage(request, run, length))
            return;
    }
    all_done(request);
}

/* --- below the log --- */

static void start_below(struct nv_vreq *request)
{
    if (request->kind != NV_REQUEST_FLUSH)
        run_below(request);
    else if (request->map->legs)
        nv_mirror_run(request);
    else
        flush(request);
}

static bool orders_below(const struct nv_vreq *request)
{
    return request->volume->mirror && orders(request);
}

static void below_ready(struct nv_range *range)
{
    start_below((struct nv_vreq *)((char *)range - offsetof(struct nv_vreq, range)));
}

void nv_volume_below(struct nv_vreq *request)
{
    assert(request->flags & NV_REQUEST_BELOW);
    request->map = local_of(request)->map;
    nv_map_hold(request->map, request->reactor);
    request->cached.state = NV_CACHED_BELOW;
    if (orders_below(request)) {
        request->range = (struct nv_range){.offset = request->offset, .length = request->length,
                                           .reactor = request->reactor, .ready = below_ready};
        nv_range_enter(&request->volume->below, &request->range);
        if (!nv_range_release(&request->volume->below, &request->range))
            return;
    }
    start_below(request);
}

static void finish_below(struct nv_vreq *request)
{
    if (orders_below(request))
        nv_range_leave(&request->volume->below, &request->range);
    release_map(request);
    request->finished(request);
}

uint64_t nv_volume_faults(const struct nv_volume *volume, const struct nv_reactor *reactor)
{
    return volume->mirror ? nv_mirror_faults(volume->mirror) : faults_of(volume->locals[reactor->index].map);
}

void nv_volume_past_log(struct nv_vreq *request)
{
    step(request);
}

/* --- the local half's changes --- */

void nv_volume_local_change(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_volume_change *change = ((struct nv_change_message *)message)->change;
    struct nv_volume_local *local = &change->volume->locals[reactor->index];
    struct nv_map_user *user = &change->from->users[reactor->index];

    assert(local->map == change->from && !user->retiring);
    local->map = change->to;
    for (struct nv_conn *conn = local->connections; conn; conn = conn->volume_next)
        nv_conn_remap(conn);
    if (change->volume->mirror && nv_mirror_owner(change->volume->mirror) == reactor)
        nv_mirror_changed(change->volume->mirror, change->from, change->to);
    user->retiring = true;
    if (user->in_flight == 0)
        change_drained(reactor, change);
}

static void local_gone(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    struct nv_volume *volume = local->volume;

    if (!local->closing || local->connections || local->pace.armed || local->cached.fetches || local->switching)
        return;
    if (atomic_fetch_sub(&volume->open_locals, 1) > 1)
        return; /* another's end may free the volume */
    if (volume->owned) /* the log's owner has left, so this stays as it is */
        nv_logged_send_end(volume->owned);
    else if (volume->mirror)
        nv_mirror_send_end(volume->mirror);
    else
        nv_events_raise(&reactor->events, &volume->closed);
}

void nv_volume_mirror_ended(struct nv_volume *volume, struct nv_reactor *reactor)
{
    assert(atomic_load(&volume->open_locals) == 0);
    nv_events_raise(&reactor->events, &volume->closed);
}

void nv_volume_logged_ended(struct nv_volume *volume, struct nv_reactor *reactor)
{
    assert(atomic_load(&volume->open_locals) == 0);
    if (volume->mirror)
        nv_mirror_send_end(volume->mirror);
    else
        nv_events_raise(&reactor->events, &volume->closed);
}

void nv_volume_local_close(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    assert(!local->closing);
    local->closing = true;
    local_gone(reactor, local);
}

void nv_volume_local_left(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    local_gone(reactor, local);
}
