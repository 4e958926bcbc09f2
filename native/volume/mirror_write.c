/*
 * What changes a mirror: writes, zeroes, trims; and flushes. Invariants: a span's regions are counted as in flight from
 * before its intents are asked for until it has landed; it is sent to every live leg in one round, from the same bytes;
 * what it is not sent to becomes dirty for it before. A request goes on to its next span only when this one has landed.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "volume/mirror_state.h"

#define TRIM_UNIT 512u

static void next_span(struct nv_vreq *request);

const struct nv_run *nv_mirror_span(const struct nv_map *map, uint64_t offset, uint64_t *length)
{
    const struct nv_run *found = NULL;

    if (*length > NV_MIRROR_SPAN)
        *length = NV_MIRROR_SPAN;
    for (uint32_t i = 0; i < map->leg_count; i++) {
        const struct nv_run *run;
        if (map->legs[i].run_count == 0)
            continue;
        run = nv_leg_find(&map->legs[i], offset);
        if (*length > run->offset + run->length - offset)
            *length = run->offset + run->length - offset;
        found = run;
    }
    assert(found && *length > 0);
    return found->state == NV_RUN_MAPPED ? found : NULL;
}

/* Lanes of `lanes` that have storage in this map. */
static uint8_t reachable(const struct nv_map *map, uint8_t lanes)
{
    uint8_t have = 0;

    NV_EACH_LANE(lane, lanes)
        if (map->by_lane[lane] && map->by_lane[lane]->run_count > 0)
            have |= nv_lane_bit(lane);
    return have;
}

/* --- flush --- */

static void flush_landed(struct nv_mio *mio);

static void sync_lanes(struct nv_mio *mio, uint8_t lanes)
{
    nv_mio_round(mio, flush_landed);
    NV_EACH_LANE(lane, reachable(mio->map, lanes))
        nv_mio_sync(mio, lane);
    nv_mio_go(mio);
}

static void flush_landed(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_vreq *request = mio->request;
    const uint8_t asked = mio->number | mio->sent;
    uint8_t missing;

    mio->did |= nv_mirror_judge(mio);
    missing = nv_lanes_counted(mirror) & (uint8_t)~mio->did;
    if (missing & ~asked) { /* a leg that counts since this began has to have it as well */
        mio->number = asked;
        sync_lanes(mio, missing & (uint8_t)~asked);
        return;
    }
    nv_mio_end(mio);
    if (missing || mirror->sole_faults != request->faults) /* cleared meanwhile or not: what it covers may be lost */
        nv_mirror_finish(request, -EIO);
    else
        nv_mirror_acknowledge(request);
}

void nv_mirror_flush(struct nv_vreq *request)
{
    struct nv_mirror *mirror = request->volume->mirror;
    struct nv_mio *mio = nv_mio_get(mirror, request->map, request);

    if (!mio)
        nv_mirror_hold(&mirror->starved, request);
    else
        sync_lanes(mio, nv_lanes_counted(mirror));
}

/* --- spans --- */

static void all_landed(struct nv_vreq *request)
{
    if ((request->flags & NV_REQUEST_FUA) && request->kind != NV_REQUEST_WRITE)
        nv_mirror_flush(request); /* a write was durable piece by piece */
    else
        nv_mirror_acknowledge(request);
}

/*
 * Who counts and has not got it is lost; but the last in-sync leg is not: 0, or its error, which is the client's. Then
 * the legs that did get it have too much.
 */
static int settle_span(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    const uint8_t did = nv_mirror_judge(mio);
    int error = 0;

    NV_EACH_LANE(lane, nv_lanes_counted(mirror) & ~did)
        if (!nv_mirror_fault(mirror, lane, -EIO))
            error = mio->parts[lane].result < 0 ? (int)mio->parts[lane].result : -EIO;
    if (!error)
        return 0;
    nv_intent_dirty(mirror, mio->offset, mio->length, mirror->syncing);
    NV_EACH_LANE(lane, mirror->promoting)
        nv_mirror_fault(mirror, lane, -EIO);
    return error;
}

static void span_landed(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_vreq *request = mio->request;
    const int error = settle_span(mio);

    nv_conflict_end(mirror, mio->offset, mio->length);
    nv_intent_leave(mirror, mio->offset, mio->length);
    mirror->reads_due = true;
    request->done += mio->length;
    nv_mio_end(mio);
    if (error)
        nv_mirror_finish(request, error);
    else
        next_span(request);
}

/* Its regions' intents are durable: off to the legs. */
static void send_span(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_vreq *request = mio->request;
    const uint8_t kind = request->kind == NV_REQUEST_WRITE ? NV_PIECE_WRITE : NV_PIECE_ZERO;
    const uint8_t lanes = reachable(mio->map, nv_lanes_live(mirror));
    const uint8_t missed = nv_lanes_used(mirror) & (uint8_t)~lanes;
    uint8_t flags = 0;

    if (kind == NV_PIECE_WRITE)
        flags = request->flags & NV_REQUEST_FUA ? NV_PIECE_DSYNC : 0;
    else
        flags = request->flags & NV_REQUEST_NO_HOLE ? NV_PIECE_NO_HOLE : 0;
    if (missed)
        nv_intent_dirty(mirror, mio->offset, mio->length, missed);
    nv_conflict_begin(mirror, mio->offset, mio->length);
    nv_mio_round(mio, span_landed);
    NV_EACH_LANE(lane, lanes)
        nv_mio_piece(mio, lane, kind, flags, mio->offset, mio->length,
                     request->data ? request->data + (mio->offset - request->offset) : NULL);
    nv_mio_go(mio);
}

/* The regions are counted; the mirror may have frozen, or worse, while the intents were written. */
void nv_mirror_intent_ready(struct nv_mio *mio, int error)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_vreq *request = mio->request;

    if (!error && !nv_mirror_stopped(mirror)) {
        send_span(mio);
        return;
    }
    nv_intent_leave(mirror, mio->offset, mio->length);
    nv_mio_end(mio);
    if (error)
        nv_mirror_finish(request, error);
    else
        nv_mirror_hold(&mirror->held, request); /* it begins this span again, or gets its error there */
}

static void start_span(struct nv_mio *mio, uint64_t offset, uint64_t length)
{
    struct nv_mirror *mirror = mio->mirror;

    mio->offset = offset;
    mio->length = length;
    if (nv_intent_enter(mirror, offset, length)) {
        send_span(mio);
        return;
    }
    nv_intent_wait(mirror, mio);
    nv_intent_commit(mirror);
}

/* Where nothing is stored, zeros are there already, and a write is the place of the map fault. */
static bool without_storage(struct nv_vreq *request, uint64_t length)
{
    if (request->kind == NV_REQUEST_WRITE) {
        nv_mirror_finish(request, -EIO);
        return false;
    }
    request->done += length;
    return true;
}

/* Asks for durability of one leg's object that is known to have lost something, and there is no other leg. */
static bool fua_would_lie(const struct nv_mirror *mirror, const struct nv_vreq *request)
{
    const uint8_t only = mirror->in_sync;
    const struct nv_map_leg *leg;
    bool fault = false;

    if (!(request->flags & NV_REQUEST_FUA) || (only & (only - 1)) || mirror->promoting)
        return false;
    leg = request->map->by_lane[__builtin_ctz(only)];
    for (uint32_t i = 0; leg && i < leg->object_count; i++)
        fault |= atomic_load(&leg->objects[i]->sync.fault) != 0;
    return fault;
}

/* A trim shrinks inward to whole blocks, and is nothing where that leaves nothing. */
static uint64_t stop_of(const struct nv_vreq *request)
{
    const uint64_t unit = request->map->block_min > TRIM_UNIT ? request->map->block_min : TRIM_UNIT;
    const uint64_t end = (request->offset + request->length) & ~(unit - 1);

    if (request->kind != NV_REQUEST_TRIM)
        return request->length;
    return end > request->offset ? end - request->offset : 0;
}

static void next_span(struct nv_vreq *request)
{
    struct nv_mirror *mirror = request->volume->mirror;
    const uint64_t stop = stop_of(request);

    while (request->done < stop) {
        const uint64_t offset = request->offset + request->done;
        uint64_t length = stop - request->done;
        struct nv_mio *mio;
        if (nv_mirror_stopped(mirror)) {
            nv_mirror_hold(&mirror->held, request);
            return;
        }
        if (!nv_mirror_span(request->map, offset, &length)) {
            if (!without_storage(request, length))
                return;
            continue;
        }
        if (fua_would_lie(mirror, request)) {
            nv_mirror_finish(request, -EIO);
            return;
        }
        mio = nv_mio_get(mirror, request->map, request);
        if (!mio)
            nv_mirror_hold(&mirror->starved, request);
        else
            start_span(mio, offset, length);
        return;
    }
    all_landed(request);
}

/* Whether every live leg can zero quickly, as far as is known. */
static bool all_quick(const struct nv_vreq *request, bool punch_only)
{
    const bool may_punch = !(request->flags & NV_REQUEST_NO_HOLE);
    bool quick = true;

    NV_EACH_LANE(lane, reachable(request->map, nv_lanes_live(request->volume->mirror))) {
        const struct nv_map_leg *leg = request->map->by_lane[lane];
        for (uint32_t i = 0; i < leg->object_count; i++) {
            const struct nv_object *object = leg->objects[i];
            const bool punches = may_punch && !atomic_load(&object->no_punch);
            const bool zeroes = !(object->flags & NV_OBJECT_BLOCK) && !atomic_load(&object->no_zero_range);
            quick &= punches || (zeroes && !punch_only);
        }
    }
    return quick;
}

void nv_mirror_write(struct nv_vreq *request)
{
    if (request->done == 0 && request->kind == NV_REQUEST_TRIM) {
        const uint64_t unit = request->map->block_min > TRIM_UNIT ? request->map->block_min : TRIM_UNIT;
        request->done = -request->offset & (unit - 1);
        if (!all_quick(request, true)) /* legs must read alike afterwards: a hint is not worth writing zeros */
            request->done = request->length;
    }
    if (request->done == 0 && request->kind == NV_REQUEST_ZERO && (request->flags & NV_REQUEST_FAST) &&
        !all_quick(request, false)) {
        nv_mirror_finish(request, -EOPNOTSUPP); /* before anything is done: later some legs would have changed */
        return;
    }
    next_span(request);
}
