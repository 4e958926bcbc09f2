/*
 * Operations on legs (see mirror_state.h). Invariants: `pending` of a mio has a bit for each operation that the port or
 * a sync still owns; `late` is a subset of it; a mio is on the active list exactly while it waits for an operation that
 * is not late; memory, map and pinned request are let go when nothing is pending and the user is through. Requests find
 * a mio as long as late ones are replaced: a leg that hangs must not use up what the others need.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/session.h"
#include "reactor/pool.h"
#include "reactor/reactor.h"
#include "volume/mirror_state.h"

#define COPIES (2u * NV_COPY_DEPTH + 4u) /* a verify takes two a piece; the rest is for block status */
#define PAGES_SPARE 4u

static void part_over(struct nv_part *part, int64_t result);

/* --- memory --- */

static uint8_t *make_memory(enum nv_mio_memory kind)
{
    if (kind == NV_MIO_PAGES)
        return aligned_alloc(NV_META_PAGE, NV_PAGES_BYTES);
    return nv_pages_map(NV_COPY_PIECE); /* resident when it is used */
}

static void free_memory(enum nv_mio_memory kind, uint8_t *memory)
{
    if (kind == NV_MIO_PAGES)
        free(memory);
    else
        nv_pages_unmap(memory, NV_COPY_PIECE);
}

static uint8_t **memory_list(struct nv_mirror *mirror, enum nv_mio_memory kind)
{
    assert(kind != NV_MIO_NO_MEMORY);
    return kind == NV_MIO_PAGES ? &mirror->free_pages : &mirror->free_copies;
}

static void put_memory(struct nv_mirror *mirror, enum nv_mio_memory kind, uint8_t *memory)
{
    uint8_t **list = memory_list(mirror, kind);

    memcpy(memory, list, sizeof *list);
    *list = memory;
}

static uint8_t *take_memory(struct nv_mirror *mirror, enum nv_mio_memory kind)
{
    uint8_t **list = memory_list(mirror, kind), *memory = *list;

    if (memory)
        memcpy(list, memory, sizeof *list);
    return memory;
}

uint8_t *nv_mio_memory(struct nv_mio *mio, enum nv_mio_memory kind)
{
    assert(mio->memory_kind == NV_MIO_NO_MEMORY);
    mio->memory = take_memory(mio->mirror, kind);
    if (mio->memory)
        mio->memory_kind = (uint8_t)kind;
    return mio->memory;
}

/* --- the slab --- */

static void put_free(struct nv_mirror *mirror, struct nv_mio *mio)
{
    mio->next = mirror->free_mios;
    mirror->free_mios = mio;
    mirror->free_count++;
}

int nv_mirror_io_create(struct nv_mirror *mirror)
{
    const uint32_t mios = NV_MIRROR_IOS + NV_MIOS_RESERVED + mirror->intent.page_count;

    mirror->active_tail = &mirror->active;
    mirror->landed_tail = &mirror->landed;
    mirror->slab = calloc(mios, sizeof *mirror->slab);
    if (!mirror->slab)
        return -ENOMEM;
    for (uint32_t i = mios; i > 0; i--)
        put_free(mirror, &mirror->slab[i - 1]);
    for (uint32_t i = 0; i < COPIES + PAGES_SPARE + mirror->intent.page_count; i++) {
        enum nv_mio_memory kind = i < COPIES ? NV_MIO_COPY : NV_MIO_PAGES;
        uint8_t *memory = make_memory(kind);
        if (!memory)
            return -ENOMEM;
        put_memory(mirror, kind, memory);
    }
    return 0;
}

void nv_mirror_io_free(struct nv_mirror *mirror)
{
    for (unsigned kind = NV_MIO_PAGES; kind <= NV_MIO_COPY; kind++)
        for (uint8_t *memory; (memory = take_memory(mirror, kind));)
            free_memory(kind, memory);
    while (mirror->free_mios) {
        struct nv_mio *mio = mirror->free_mios;
        mirror->free_mios = mio->next;
        if (mio->extra)
            free(mio);
    }
    free(mirror->slab);
}

struct nv_mio *nv_mio_get(struct nv_mirror *mirror, struct nv_map *map, struct nv_vreq *request)
{
    struct nv_mio *mio = mirror->free_mios;
    bool extra;

    if (request && mirror->free_count <= NV_MIOS_RESERVED + mirror->intent.page_count)
        return NULL;
    assert(mio && !mio->used && !mio->pending); /* the mirror's own are fewer than what is reserved for them */
    mirror->free_mios = mio->next;
    mirror->free_count--;
    mirror->mios_out++;
    extra = mio->extra;
    memset(mio, 0, offsetof(struct nv_mio, parts)); /* the parts are filled in one by one */
    mio->extra = extra;
    mio->used = true;
    mio->mirror = mirror;
    mio->map = map;
    mio->request = request;
    nv_map_hold(map, mirror->reactor);
    return mio;
}

/* Nothing of it is out, nobody uses it. */
static void let_go(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    assert(!mio->used && !mio->pending && !mio->active);
    if (mio->memory_kind != NV_MIO_NO_MEMORY)
        put_memory(mirror, mio->memory_kind, mio->memory);
    free(mio->orphan);
    nv_map_release(mio->map, mirror->reactor);
    mirror->mios_out--;
    put_free(mirror, mio);
    mirror->starved_due = true;
}

static void pin_is_back(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_mio *mio = (struct nv_mio *)((char *)message - offsetof(struct nv_mio, message));
    struct nv_mirror *mirror = mio->mirror;

    assert(mirror->reactor == reactor);
    (void)reactor;
    let_go(mio);
    nv_mirror_pump(mirror);
}

/* On the request's reactor. */
static void pin_ends(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_mio *mio = (struct nv_mio *)((char *)message - offsetof(struct nv_mio, message));

    assert(mio->pinned->reactor == reactor);
    (void)reactor;
    nv_request_unpin(mio->pinned);
    message->run = pin_is_back;
    nv_reactor_send(mio->mirror->reactor, message);
}

static void last_late_is_over(struct nv_mio *mio)
{
    if (!mio->pinned) {
        let_go(mio);
    } else if (mio->pinned->reactor == mio->mirror->reactor) {
        nv_request_unpin(mio->pinned);
        let_go(mio);
    } else {
        mio->message.run = pin_ends;
        nv_reactor_send(mio->pinned->reactor, &mio->message);
    }
}

/* A leg that hangs must not use up what requests need: what it holds is replaced, while there is memory. */
static void replace(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_mio *other = calloc(1, sizeof *other);

    if (other) {
        other->extra = true;
        put_free(mirror, other);
        mirror->starved_due = true;
    }
    if (mio->memory_kind != NV_MIO_NO_MEMORY) {
        uint8_t *memory = make_memory(mio->memory_kind);
        if (memory)
            put_memory(mirror, mio->memory_kind, memory);
    }
}

void nv_mio_end(struct nv_mio *mio)
{
    assert(mio->used && !mio->active && mio->pending == mio->late);
    mio->used = false;
    if (!mio->pending) {
        let_go(mio);
        return;
    }
    if (mio->borrows) {
        mio->pinned = mio->request;
        mio->pinned->pins++;
        nv_request_keep(mio->pinned);
    }
    replace(mio);
}

/* --- rounds --- */

static void activate(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    nv_mirror_wake_tick(mirror);
    mio->active = true;
    mio->born_ms = mirror->now_ms;
    mio->next = NULL;
    mio->back = mirror->active_tail;
    *mirror->active_tail = mio;
    mirror->active_tail = &mio->next;
}

static void land(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    assert(mio->active && mio->pending == mio->late);
    mio->active = false;
    *mio->back = mio->next;
    if (mio->next)
        mio->next->back = mio->back;
    else
        mirror->active_tail = mio->back;
    mio->landed_next = NULL;
    *mirror->landed_tail = mio;
    mirror->landed_tail = &mio->landed_next;
}

void nv_mio_round(struct nv_mio *mio, void (*landed)(struct nv_mio *mio))
{
    assert(mio->used && !mio->active && !mio->starting && mio->pending == mio->late);
    mio->landed = landed;
    mio->sent = 0;
    mio->starting = true;
    activate(mio);
}

void nv_mio_go(struct nv_mio *mio)
{
    assert(mio->starting);
    mio->starting = false;
    if (mio->pending == mio->late)
        land(mio);
}

bool nv_mirror_run_landed(struct nv_mirror *mirror)
{
    bool any = false;

    while (mirror->landed) {
        struct nv_mio *mio = mirror->landed;
        mirror->landed = mio->landed_next;
        if (!mirror->landed)
            mirror->landed_tail = &mirror->landed;
        mio->landed(mio);
        any = true;
    }
    return any;
}

/* The trace's moment `submitted` (nbd/trace.h). */
static void note_submitted(const struct nv_mio *mio)
{
    const struct nv_reactor *reactor = mio->mirror->reactor;

    if (nv_recording(reactor) && mio->request && mio->request->stamps.submitted_ns == 0)
        mio->request->stamps.submitted_ns = nv_io_now_ns(reactor->io);
}

static struct nv_part *begin_part(struct nv_mio *mio, uint32_t lane)
{
    struct nv_part *part = &mio->parts[lane];
    const uint8_t bit = nv_lane_bit(lane);

    assert(mio->starting && !(mio->sent & bit) && !(mio->pending & bit));
    note_submitted(mio);
    mio->sent |= bit;
    mio->pending |= bit;
    mio->mirror->lanes[lane].outstanding++;
    part->mio = mio;
    part->result = 0;
    return part;
}

static void piece_over(struct nv_piece *piece, int64_t result)
{
    struct nv_part *part = (struct nv_part *)((char *)piece - offsetof(struct nv_part, piece));
    struct nv_mirror *mirror = part->mio->mirror;

    part_over(part, result);
    nv_mirror_pump_later(mirror);
}

static void start_piece(struct nv_part *part, struct nv_object *object, uint8_t kind, uint8_t flags, uint64_t offset,
                        uint64_t length, uint8_t *data)
{
    struct nv_piece *piece = &part->piece;

    piece->reactor = part->mio->mirror->reactor;
    piece->object = object;
    piece->kind = kind;
    piece->flags = flags;
    piece->offset = offset;
    piece->length = length;
    piece->data = data;
    piece->finished = piece_over;
    nv_piece_start(piece);
}

void nv_mio_piece(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint8_t flags, uint64_t offset, uint64_t length,
                  uint8_t *data)
{
    const struct nv_map_leg *leg = mio->map->by_lane[lane];
    const struct nv_run *run = nv_leg_find(leg, offset);
    struct nv_part *part = begin_part(mio, lane);

    assert(run->object && offset >= run->offset && offset + length <= run->offset + run->length);
    part->leg = leg;
    mio->borrows |= data && mio->memory_kind == NV_MIO_NO_MEMORY;
    if (kind == NV_PIECE_EXTENTS) {
        part->piece.extents = (struct nv_extent *)data;
        part->piece.extents_max = NV_EXTENTS_MAX;
    }
    start_piece(part, run->object, kind, flags, run->object_offset + (offset - run->offset), length, data);
}

void nv_mio_meta(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint64_t offset, uint64_t length, uint8_t *data)
{
    const struct nv_map_leg *leg = mio->map->by_lane[lane];
    struct nv_part *part = begin_part(mio, lane);

    part->leg = leg;
    start_piece(part, leg->meta, kind, kind == NV_PIECE_WRITE ? NV_PIECE_DSYNC : 0, leg->meta_offset + offset, length,
                data);
}

static void sync_objects(struct nv_part *part);

static void part_synced(struct nv_sync_wait *wait)
{
    struct nv_part *part = (struct nv_part *)((char *)wait - offsetof(struct nv_part, wait));
    struct nv_mirror *mirror = part->mio->mirror;

    if (wait->error)
        part_over(part, wait->error);
    else
        sync_objects(part);
    nv_mirror_pump(mirror);
}

static void sync_objects(struct nv_part *part)
{
    const struct nv_mio *mio = part->mio;
    const bool late = mio->late & nv_lane_bit((uint32_t)(part - mio->parts));

    while (part->object_next < part->leg->object_count && !late) {
        struct nv_object *object = part->leg->objects[part->object_next++];
        part->wait.done = part_synced;
        if (!nv_sync_begin(&object->sync, mio->mirror->reactor, &part->wait))
            return;
        if (part->wait.error) {
            part_over(part, part->wait.error);
            return;
        }
    }
    part_over(part, 0);
}

void nv_mio_sync(struct nv_mio *mio, uint32_t lane)
{
    struct nv_part *part = begin_part(mio, lane);

    part->leg = mio->map->by_lane[lane];
    part->object_next = 0;
    sync_objects(part);
}

/* An operation has completed: late, for the pin count only; or it counts. */
static void part_over(struct nv_part *part, int64_t result)
{
    struct nv_mio *mio = part->mio;
    const uint32_t lane = (uint32_t)(part - mio->parts);
    const uint8_t bit = nv_lane_bit(lane);

    assert((mio->pending & bit) && mio->mirror->lanes[lane].outstanding > 0);
    mio->mirror->lanes[lane].outstanding--;
    mio->pending &= (uint8_t)~bit;
    if (mio->late & bit) {
        mio->late &= (uint8_t)~bit;
        if (!mio->used && !mio->pending)
            last_late_is_over(mio);
        return;
    }
    part->result = result;
    if (mio->pending == mio->late && !mio->starting)
        land(mio);
}

void nv_mirror_abandon(struct nv_mirror *mirror, uint32_t lane)
{
    const uint8_t bit = nv_lane_bit(lane);

    for (struct nv_mio *mio = mirror->active, *next; mio; mio = next) {
        next = mio->next;
        if (!(mio->pending & bit) || (mio->late & bit))
            continue;
        mio->late |= bit;
        mio->parts[lane].result = -ECANCELED;
        if (mio->pending == mio->late && !mio->starting)
            land(mio);
    }
}

/* The oldest round is the first of the list. Who is the last in-sync leg may take its time: there is no other. */
void nv_mirror_check_deadlines(struct nv_mirror *mirror)
{
    const uint32_t deadline_ms = nv_mirror_map(mirror)->mirror.op_deadline_ms + NV_MIRROR_TICK_MS; /* born_ms is as old */
    uint8_t overdue = 0;

    for (const struct nv_mio *mio = mirror->active; mio; mio = mio->next)
        if (mirror->now_ms - mio->born_ms >= deadline_ms)
            overdue |= mio->pending & (uint8_t)~mio->late;
    for (uint32_t lane = NV_LEGS_MAX; lane-- > 0;) /* the primary last: it is the one to stay */
        if (overdue & nv_lane_bit(lane))
            nv_mirror_fault(mirror, lane, -ETIMEDOUT);
}
