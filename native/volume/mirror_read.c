/*
 * Reads of a mirror, block status, prefetch. Invariants: a read is answered by the primary while writes to its stripes
 * are in flight, and an answer of another leg counts only if no write has begun there since it was asked; so reads never
 * go back in time. No read of a doubtful region starts. A buffer that a late read may still fill is never answered from.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/session.h"
#include "reactor/reactor.h"
#include "volume/mirror_state.h"

#define SAMPLE_EACH 16u             /* a latency is measured so often */
#define SMOOTHING 8u
#define STREAM_SLACK 4u             /* operations that a sequential stream may find on its leg before it leaves */
#define EXPLORE_EACH 64u            /* NEAREST: so often another leg is tried, or its latency would never be known */
#define RESCUE_ALIGN 4096u

/* --- conflicts --- */

static bool is_wide(uint64_t offset, uint64_t length)
{
    return ((offset + length - 1) >> NV_STRIPE_SHIFT) - (offset >> NV_STRIPE_SHIFT) >= NV_STRIPES_EACH;
}

void nv_conflict_begin(struct nv_mirror *mirror, uint64_t offset, uint64_t length)
{
    struct nv_conflicts *c = &mirror->conflicts;

    c->all_out++;
    c->all_begun++;
    if (is_wide(offset, length)) {
        c->wide_out++;
        c->wide_begun++;
        return;
    }
    for (uint64_t stripe = offset >> NV_STRIPE_SHIFT; stripe <= (offset + length - 1) >> NV_STRIPE_SHIFT; stripe++) {
        c->out[stripe % NV_STRIPES]++;
        c->begun[stripe % NV_STRIPES]++;
    }
}

void nv_conflict_end(struct nv_mirror *mirror, uint64_t offset, uint64_t length)
{
    struct nv_conflicts *c = &mirror->conflicts;

    assert(c->all_out > 0);
    c->all_out--;
    if (is_wide(offset, length)) {
        assert(c->wide_out > 0);
        c->wide_out--;
        return;
    }
    for (uint64_t stripe = offset >> NV_STRIPE_SHIFT; stripe <= (offset + length - 1) >> NV_STRIPE_SHIFT; stripe++) {
        assert(c->out[stripe % NV_STRIPES] > 0);
        c->out[stripe % NV_STRIPES]--;
    }
}

/* Writes in flight that may touch the range, and how many have begun there so far. */
static bool in_conflict(const struct nv_mirror *mirror, uint64_t offset, uint64_t length, uint32_t *begun)
{
    const struct nv_conflicts *c = &mirror->conflicts;
    bool busy = c->wide_out > 0;

    if (is_wide(offset, length)) {
        *begun = c->all_begun;
        return c->all_out > 0;
    }
    *begun = c->wide_begun;
    for (uint64_t stripe = offset >> NV_STRIPE_SHIFT; stripe <= (offset + length - 1) >> NV_STRIPE_SHIFT; stripe++) {
        busy |= c->out[stripe % NV_STRIPES] > 0;
        *begun += c->begun[stripe % NV_STRIPES];
    }
    return busy;
}

bool nv_mirror_doubtful(const struct nv_mirror *mirror, uint64_t offset, uint64_t length)
{
    const struct nv_intent *intent = &mirror->intent;
    const uint32_t last = nv_region_of(intent, offset + length - 1);

    if (intent->doubtful_count == 0)
        return false;
    for (uint32_t region = nv_region_of(intent, offset); region <= last; region++)
        if (intent->state[region] & NV_REGION_DOUBTFUL)
            return true;
    return false;
}

/* --- which leg --- */

static uint32_t least_outstanding(struct nv_mirror *mirror, uint8_t lanes, uint64_t offset)
{
    uint32_t best = (uint32_t)__builtin_ctz(lanes);

    NV_EACH_LANE(lane, lanes)
        if (mirror->lanes[lane].outstanding < mirror->lanes[best].outstanding)
            best = lane;
    NV_EACH_LANE(lane, lanes)
        if (mirror->lanes[lane].read_end == offset &&
            mirror->lanes[lane].outstanding <= mirror->lanes[best].outstanding + STREAM_SLACK)
            return lane;
    return best;
}

/* Choices by NEAREST since the lane's latency was measured. */
static uint32_t unmeasured(const struct nv_mirror *mirror, uint32_t lane)
{
    return mirror->explored - mirror->lanes[lane].sampled_at;
}

static uint32_t nearest(struct nv_mirror *mirror, uint8_t lanes)
{
    uint32_t best = (uint32_t)__builtin_ctz(lanes);

    if (++mirror->explored % EXPLORE_EACH == 0) {
        NV_EACH_LANE(lane, lanes) /* the one whose latency was measured longest ago, however often it was read before */
            if (unmeasured(mirror, lane) > unmeasured(mirror, best))
                best = lane;
        return best;
    }
    NV_EACH_LANE(lane, lanes)
        if (mirror->lanes[lane].latency_ns < mirror->lanes[best].latency_ns)
            best = lane;
    return best;
}

static uint32_t choose(struct nv_mirror *mirror, uint8_t lanes, uint64_t offset)
{
    switch (nv_mirror_map(mirror)->mirror.read_policy) {
    case NV_READ_PRIMARY:
        return (uint32_t)__builtin_ctz(lanes);
    case NV_READ_NEAREST:
        return nearest(mirror, lanes);
    default:
        return least_outstanding(mirror, lanes, offset);
    }
}

/* --- one read --- */

static void sample(const struct nv_mio *mio, struct nv_lane *lane)
{
    const uint64_t took_ns = nv_io_now_ns(mio->mirror->reactor->io) - mio->sampled_ns;

    lane->latency_ns = lane->latency_ns ? lane->latency_ns - lane->latency_ns / SMOOTHING + took_ns / SMOOTHING : took_ns;
}

/*
 * The leg's late operation may still write into the memory that the request reads into: go on in other memory. The old
 * one is the request's own, which the mio pins, or was made here, then the mio takes it over.
 */
static bool rescue(struct nv_mio *mio)
{
    struct nv_vreq *request = mio->request;
    const uint64_t size = (request->length + RESCUE_ALIGN - 1) / RESCUE_ALIGN * RESCUE_ALIGN;
    uint8_t *memory = aligned_alloc(RESCUE_ALIGN, size);

    if (!memory)
        return false;
    memcpy(memory, request->data, request->done);
    if (request->rescue) {
        mio->orphan = request->rescue;
        mio->borrows = false;
    }
    request->rescue = request->data = memory;
    nv_request_keep(request);
    return true;
}

/* The bytes count: the leg is still one to read from, and no write has begun that other legs may have already. */
static bool is_good(struct nv_mio *mio, uint32_t lane)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_vreq *request = mio->request;
    const struct nv_part *part = &mio->parts[lane];
    const uint8_t bit = nv_lane_bit(lane);
    uint32_t begun;

    if (part->result < 0) {
        /* A leg that has been cut short is not what it was: a repair would only grow it over what else it lacks. */
        if (part->result != -ENXIO || !nv_mirror_fault(mirror, lane, -ENXIO))
            request->tried |= bit;
        return false;
    }
    if (nv_lane_latched(mirror, lane) && nv_mirror_fault(mirror, lane, -EIO))
        return false;
    if (!(mirror->in_sync & bit))
        return false;
    in_conflict(mirror, mio->offset, mio->length, &begun);
    request->primary_only |= !mio->of_primary && begun != mio->begun;
    return mio->of_primary || begun == mio->begun;
}

static void read_landed(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_vreq *request = mio->request;
    const uint32_t lane = (uint32_t)__builtin_ctz(mio->sent);
    const bool late = mio->late, good = request->kind == NV_REQUEST_CACHE || (!late && is_good(mio, lane));

    if (mio->sampled_ns && !late)
        sample(mio, &mirror->lanes[lane]);
    if (late && mio->borrows && !rescue(mio)) {
        nv_mio_end(mio);
        nv_mirror_finish(request, -ENOMEM);
        return;
    }
    if (good) {
        NV_EACH_LANE(bad, request->tried & mirror->in_sync)
            nv_copier_repair(mirror, mio->offset, mio->length, bad);
        request->tried = 0;
        request->primary_only = false;
        if (request->kind == NV_REQUEST_STATUS)
            nv_volume_extents(request, (struct nv_extent *)mio->memory, mio->parts[lane].result);
        else
            request->done += mio->length;
    }
    nv_mio_end(mio);
    nv_mirror_read(request);
}

static void start_read(struct nv_vreq *request, struct nv_mio *mio, uint32_t lane)
{
    static const uint8_t kinds[] = {
        [NV_REQUEST_READ] = NV_PIECE_READ, [NV_REQUEST_CACHE] = NV_PIECE_PREFETCH, [NV_REQUEST_STATUS] = NV_PIECE_EXTENTS};
    struct nv_mirror *mirror = mio->mirror;
    struct nv_lane *at = &mirror->lanes[lane];
    uint8_t *data = NULL;

    if (request->kind == NV_REQUEST_STATUS)
        data = mio->memory;
    else if (request->kind == NV_REQUEST_READ)
        data = request->data + request->done;
    if (request->kind == NV_REQUEST_READ &&
        (at->reads++ % SAMPLE_EACH == 0 || unmeasured(mirror, lane) >= EXPLORE_EACH - SAMPLE_EACH)) {
        mio->sampled_ns = nv_io_now_ns(mirror->reactor->io);
        at->sampled_at = mirror->explored;
    }
    at->read_end = mio->offset + mio->length;
    nv_mio_round(mio, read_landed);
    nv_mio_piece(mio, lane, kinds[request->kind], 0, mio->offset, mio->length, data);
    nv_mio_go(mio);
}

/* The rest of the request from one leg, as far as one span goes. */
static void read_span(struct nv_vreq *request, uint64_t offset, uint64_t length)
{
    struct nv_mirror *mirror = request->volume->mirror;
    const uint8_t lanes = mirror->in_sync & (uint8_t)~request->tried, first = nv_lane_bit(mirror->primary);
    uint32_t begun, lane;
    const bool busy = in_conflict(mirror, offset, length, &begun);
    struct nv_mio *mio;

    if (nv_mirror_doubtful(mirror, offset, length) || (busy && (mirror->settling || !(lanes & first)))) {
        nv_mirror_hold(&mirror->reads, request);
        return;
    }
    if (!lanes) {
        nv_mirror_finish(request, request->kind == NV_REQUEST_CACHE ? 0 : -EIO);
        return;
    }
    mio = request->kind == NV_REQUEST_STATUS && !mirror->free_copies ? NULL : nv_mio_get(mirror, request->map, request);
    if (!mio) {
        nv_mirror_hold(&mirror->starved, request);
        return;
    }
    if (request->kind == NV_REQUEST_STATUS)
        nv_mio_memory(mio, NV_MIO_COPY);
    lane = (busy || request->primary_only) && (lanes & first) ? mirror->primary : choose(mirror, lanes, offset);
    mio->offset = offset;
    mio->length = length;
    mio->begun = begun;
    mio->of_primary = lane == mirror->primary;
    start_read(request, mio, lane);
}

/*
 * Only the primary's bytes will do: they are right whatever is being written. An object whose sync has failed is for the
 * ordinary read to see to.
 */
uint8_t *nv_mirror_view(struct nv_mirror *mirror, const struct nv_map *map, uint64_t offset, uint64_t length,
                        struct nv_object **object)
{
    const struct nv_map_leg *leg = map->by_lane[mirror->primary];
    const struct nv_run *run;
    struct nv_view *view;

    if (mirror->attaching || mirror->fenced || mirror->broken || mirror->settling || !leg || leg->run_count == 0 ||
        !(mirror->in_sync & nv_lane_bit(mirror->primary)) || offset >= map->size || length > map->size - offset ||
        nv_mirror_doubtful(mirror, offset, length) || nv_lane_latched(mirror, mirror->primary))
        return NULL;
    run = nv_leg_find(leg, offset);
    if (!run->object || length > run->offset + run->length - offset)
        return NULL;
    mirror->requests_seen++;
    *object = run->object;
    view = atomic_load_explicit(&run->object->view, memory_order_acquire);
    return view ? nv_view_at(view, run->object_offset + (offset - run->offset), length) : NULL;
}

int64_t nv_mirror_copy(const struct nv_vreq *request, uint64_t from, void *to, uint64_t length)
{
    const struct nv_run *run = nv_leg_find(request->map->by_lane[request->volume->mirror->primary], request->offset);

    assert(run->object == request->piece.object && from + length <= request->length);
    return nv_io_copy(run->object->handle, to, length, run->object_offset + request->offset - run->offset + from);
}

static void read_nothing(struct nv_vreq *request, uint64_t length)
{
    if (request->kind == NV_REQUEST_STATUS) {
        nv_volume_extent(request, length, NV_EXTENT_HOLE | NV_EXTENT_ZERO);
        return;
    }
    if (request->kind == NV_REQUEST_READ)
        memset(request->data + request->done, 0, length);
    request->done += length;
}

void nv_mirror_read(struct nv_vreq *request)
{
    struct nv_mirror *mirror = request->volume->mirror;

    while (request->done < request->length && !nv_volume_extents_full(request)) {
        const uint64_t offset = request->offset + request->done;
        uint64_t length = request->length - request->done;
        if (mirror->fenced || mirror->broken) {
            nv_mirror_finish(request, request->kind == NV_REQUEST_CACHE ? 0 : -EIO); /* a hint never fails */
            return;
        }
        if (nv_mirror_span(request->map, offset, &length)) {
            read_span(request, offset, length);
            return;
        }
        read_nothing(request, length);
    }
    nv_mirror_finish(request, 0);
}
