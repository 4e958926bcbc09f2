/*
 * Copies between legs, in the background: reconciliation of doubtful regions, resync of syncing legs, repair after read
 * errors, verify. Each copy goes through its range piece by piece: place in the range order, read one leg, write others,
 * leave. Invariants: while a piece is being copied no request changes its place; a region counts as copied for a lane
 * only if every piece was written there and nothing missed the lane meanwhile. What is not here: when copied regions
 * become durable, and when a leg is in sync (mirror_task.c).
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "reactor/reactor.h"
#include "volume/mirror_state.h"

static void next_piece(struct nv_copy *copy);
static void read_source(struct nv_copy *copy);

static uint64_t region_end(const struct nv_mirror *mirror, uint32_t region)
{
    const uint64_t end = ((uint64_t)region + 1) << mirror->intent.shift, size = nv_mirror_map(mirror)->size;

    return end < size ? end : size;
}

/* Lanes of `lanes` for which the region is to be copied. */
static uint8_t wanting(const struct nv_mirror *mirror, uint32_t region, uint8_t lanes)
{
    return mirror->intent.dirty[region] & (uint8_t)~mirror->intent.copied[region] & lanes;
}

/* --- the end of a copy --- */

static void verify_over(struct nv_mirror *mirror)
{
    struct nv_copier *copier = &mirror->copier;
    struct nv_mirror_command *command = copier->verify;

    for (unsigned i = 0; i < NV_COPY_DEPTH; i++)
        if (copier->copies[i].busy && copier->copies[i].kind == NV_COPY_VERIFY)
            return;
    copier->verify = NULL;
    command->done.event.result = copier->verify_error;
    command->done.event.args[0] = copier->verify_bytes;
    command->done.event.args[1] = copier->verify_differed;
    command->done.event.args[2] = copier->verify_repaired;
    nv_events_raise(&mirror->reactor->events, &command->done);
}

static bool waits_for(const struct nv_mirror *mirror, const struct nv_vreq *request, uint32_t region)
{
    const uint64_t first = request->offset + request->done, last = request->offset + request->length - 1;

    return nv_region_of(&mirror->intent, first) <= region && region <= nv_region_of(&mirror->intent, last);
}

/* No leg could be read there: reads that wait for it have their answer, and later ones make it try again. */
static void fail_reads(struct nv_mirror *mirror, uint32_t region, int error)
{
    struct nv_vreq *request = mirror->reads.first, *next;

    nv_queue_init(&mirror->reads);
    for (; request; request = next) {
        next = request->queue_next;
        if (waits_for(mirror, request, region))
            nv_mirror_finish(request, error);
        else
            nv_mirror_hold(&mirror->reads, request);
    }
}

static void reconciled(struct nv_mirror *mirror, const struct nv_copy *copy)
{
    const bool alone = !(mirror->in_sync & (mirror->in_sync - 1)); /* then half of it will do */

    if (!copy->error || alone) {
        nv_mirror_settle_region(mirror, copy->region);
    } else if (copy->error && copy->error != -ECANCELED) {
        mirror->copier.stuck = true;
        fail_reads(mirror, copy->region, copy->error);
    }
    mirror->reads_due = true;
}

static void rewritten(struct nv_mirror *mirror, const struct nv_copy *copy)
{
    struct nv_intent *intent = &mirror->intent;

    if (!copy->error && copy->keep && (intent->state[copy->region] & NV_REGION_REWRITE)) {
        intent->state[copy->region] &= (uint8_t)~NV_REGION_REWRITE;
        intent->rewrite_count--;
    }
    mirror->copier.stuck |= copy->error != 0;
}

static void resynced(struct nv_mirror *mirror, const struct nv_copy *copy)
{
    mirror->copier.resyncing--;
    if (!copy->error)
        mirror->intent.copied[copy->region] |= copy->lanes & mirror->syncing;
    else if (copy->error != -ECANCELED) /* no in-sync leg can be read there: this resync cannot end */
        NV_EACH_LANE(lane, copy->lanes & mirror->syncing)
            nv_mirror_lose_syncing(mirror, lane, copy->error);
}

static void repaired(struct nv_mirror *mirror, const struct nv_copy *copy)
{
    struct nv_copier *copier = &mirror->copier;
    nv_event *event = &copier->repair_event.event;

    copier->repaired += copy->error == 0;
    event->result = copy->error;
    event->args[0] = mirror->lanes[copy->lane].id;
    event->args[1] = copy->begin;
    event->args[2] = copy->end - copy->begin;
    event->args[3] = copier->repaired;
    nv_mirror_raise(mirror, &copier->repair_event);
    mirror->reads_due = true;
}

static void copy_over(struct nv_copy *copy)
{
    struct nv_mirror *mirror = copy->mirror;

    copy->busy = false;
    mirror->copier.busy--;
    switch (copy->kind) {
    case NV_COPY_RECONCILE:
        reconciled(mirror, copy);
        break;
    case NV_COPY_REWRITE:
        rewritten(mirror, copy);
        break;
    case NV_COPY_RESYNC:
        resynced(mirror, copy);
        break;
    case NV_COPY_REPAIR:
        repaired(mirror, copy);
        break;
    default:
        mirror->copier.verify_error = copy->error ? copy->error : mirror->copier.verify_error;
        break;
    }
    if (mirror->copier.verify && mirror->copier.verify_next == mirror->intent.regions)
        verify_over(mirror);
}

/* --- one piece --- */

static bool is_placed(const struct nv_mirror *mirror)
{
    bool any = false;

    for (uint32_t i = 0; i < NV_COPY_DEPTH; i++)
        any |= mirror->copier.copies[i].order != NULL;
    return any;
}

static void piece_over(struct nv_copy *copy, int error)
{
    struct nv_mirror *mirror = copy->mirror;

    nv_range_leave(copy->order, &copy->range);
    copy->order = NULL;
    if (mirror->pausing && !is_placed(mirror))
        nv_reactor_late(mirror->reactor, mirror->pausing);
    copy->error = error;
    copy->at += copy->length;
    mirror->copier.copied_bytes += copy->kind == NV_COPY_VERIFY ? 0 : copy->length;
    mirror->copier.since_checkpoint += copy->kind == NV_COPY_RESYNC ? copy->length : 0;
    next_piece(copy);
}

/* Who gets the bytes that were read. */
static uint8_t targets_of(const struct nv_copy *copy)
{
    const struct nv_mirror *mirror = copy->mirror;

    switch (copy->kind) {
    case NV_COPY_RECONCILE: /* the source too: what a sync has lost there, before a crash, is still visible perhaps */
    case NV_COPY_REWRITE:
        return nv_lanes_counted(mirror);
    case NV_COPY_RESYNC:
        return copy->lanes & mirror->syncing;
    default:
        return nv_lane_bit(copy->lane) & mirror->in_sync;
    }
}

static void written(struct nv_mio *mio)
{
    struct nv_copy *copy = mio->context;
    struct nv_mirror *mirror = copy->mirror;
    const uint8_t did = nv_mirror_judge(mio); /* who failed is lost, and with it what it should have got */
    const bool last_failed = (copy->kind == NV_COPY_RECONCILE || copy->kind == NV_COPY_REWRITE) && !(did & mirror->in_sync);

    if (copy->kind == NV_COPY_REPAIR)
        nv_conflict_end(mirror, copy->at, copy->length);
    nv_mio_end(mio);
    mirror->reads_due = true;
    piece_over(copy, last_failed ? -EIO : 0);
}

static void write_targets(struct nv_copy *copy, struct nv_mio *mio)
{
    const uint8_t targets = targets_of(copy);

    if (!targets) {
        nv_mio_end(mio);
        piece_over(copy, 0);
        return;
    }
    if (copy->kind == NV_COPY_REPAIR)
        nv_conflict_begin(copy->mirror, copy->at, copy->length);
    nv_mio_round(mio, written);
    NV_EACH_LANE(lane, targets)
        nv_mio_piece(mio, lane, NV_PIECE_WRITE, 0, copy->at, copy->length, mio->memory);
    nv_mio_go(mio);
}

/* --- verify: another leg's bytes beside the source's --- */

static void compare_next(struct nv_copy *copy, struct nv_mio *mio);

static void verify_written(struct nv_mio *mio)
{
    struct nv_copy *copy = mio->context;

    copy->mirror->copier.verify_repaired += (nv_mirror_judge(mio) & nv_lane_bit(copy->lane)) != 0;
    nv_conflict_end(copy->mirror, copy->at, copy->length);
    compare_next(copy, mio);
}

static void compared(struct nv_mio *other)
{
    struct nv_copy *copy = other->context;
    struct nv_mio *mio = copy->mio;
    struct nv_mirror *mirror = copy->mirror;
    const bool read = !other->late && other->parts[copy->lane].result >= 0;
    const bool equal = read && memcmp(mio->memory, other->memory, copy->length) == 0;
    const bool repair = mirror->copier.verify && mirror->copier.verify->option;

    nv_mio_end(other);
    copy->compared |= nv_lane_bit(copy->lane);
    if (!equal)
        mirror->copier.verify_differed++;
    if (equal || !repair || !targets_of(copy)) {
        compare_next(copy, mio);
        return;
    }
    nv_conflict_begin(mirror, copy->at, copy->length);
    nv_mio_round(mio, verify_written);
    nv_mio_piece(mio, copy->lane, NV_PIECE_WRITE, 0, copy->at, copy->length, mio->memory);
    nv_mio_go(mio);
}

static void compare_next(struct nv_copy *copy, struct nv_mio *mio)
{
    struct nv_mirror *mirror = copy->mirror;
    const uint8_t left = mirror->in_sync & (uint8_t)~(copy->compared | nv_lane_bit(copy->source));
    struct nv_mio *other;

    if (!left) {
        nv_mio_end(mio);
        piece_over(copy, 0);
        return;
    }
    copy->lane = (uint8_t)__builtin_ctz(left);
    other = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);
    other->context = copy;
    copy->mio = mio;
    if (!nv_mio_memory(other, NV_MIO_COPY)) {
        nv_mio_end(other);
        nv_mio_end(mio);
        piece_over(copy, -ENOMEM);
        return;
    }
    nv_mio_round(other, compared);
    nv_mio_piece(other, copy->lane, NV_PIECE_READ, 0, copy->at, copy->length, other->memory);
    nv_mio_go(other);
}

/* --- reading --- */

static void source_read(struct nv_mio *mio)
{
    struct nv_copy *copy = mio->context;
    struct nv_mirror *mirror = copy->mirror;
    const uint8_t bit = nv_lane_bit(copy->source);
    const struct nv_part *part = &mio->parts[copy->source];

    if (mio->late || part->result < 0 || (nv_lane_latched(mirror, copy->source) && nv_mirror_fault(mirror, copy->source, -EIO)) ||
        !(mirror->in_sync & bit)) {
        copy->tried |= bit;
        nv_mio_end(mio);
        read_source(copy);
    } else if (copy->kind == NV_COPY_VERIFY) {
        mirror->copier.verify_bytes += copy->length;
        copy->compared = 0;
        compare_next(copy, mio);
    } else {
        write_targets(copy, mio);
    }
}

/* The primary first: what reads saw of it while it was written to is what all are to have. */
static void read_source(struct nv_copy *copy)
{
    struct nv_mirror *mirror = copy->mirror;
    uint8_t lanes = mirror->in_sync & (uint8_t)~copy->tried;
    struct nv_mio *mio;

    if (copy->kind == NV_COPY_REPAIR)
        lanes &= (uint8_t)~nv_lane_bit(copy->lane);
    if (!lanes) {
        piece_over(copy, -EIO);
        return;
    }
    copy->source = lanes & nv_lane_bit(mirror->primary) ? (uint8_t)mirror->primary : (uint8_t)__builtin_ctz(lanes);
    mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);
    mio->context = copy;
    if (!nv_mio_memory(mio, NV_MIO_COPY)) { /* all of it is held by late operations */
        nv_mio_end(mio);
        piece_over(copy, -ENOMEM);
        return;
    }
    nv_mio_round(mio, source_read);
    nv_mio_piece(mio, copy->source, NV_PIECE_READ, 0, copy->at, copy->length, mio->memory);
    nv_mio_go(mio);
}

static void range_ready(struct nv_range *range)
{
    struct nv_copy *copy = (struct nv_copy *)((char *)range - offsetof(struct nv_copy, range));
    struct nv_mirror *mirror = copy->mirror;

    copy->tried = 0;
    read_source(copy);
    nv_mirror_pump(mirror);
}

bool nv_mirror_orders_by(struct nv_mirror *mirror, struct nv_range_table *table)
{
    bool all = true;

    mirror->order = table;
    for (uint32_t i = 0; i < NV_COPY_DEPTH; i++)
        all &= !mirror->copier.copies[i].order || mirror->copier.copies[i].order == table;
    return all;
}

/* Nobody wants the rest any more. */
static bool is_idle(const struct nv_copy *copy)
{
    const struct nv_mirror *mirror = copy->mirror;

    if (mirror->fenced || mirror->broken || mirror->end_wanted)
        return true;
    if (copy->kind == NV_COPY_RECONCILE)
        return !(mirror->in_sync & (mirror->in_sync - 1));
    if (copy->kind == NV_COPY_REWRITE)
        return !(mirror->intent.state[copy->region] & NV_REGION_REWRITE);
    return copy->kind != NV_COPY_VERIFY && !targets_of(copy);
}

/* --- a resync with a rate: small pieces, each in its time, so that no client waits long behind one --- */

/* From a client's first request on, not only from the next tick. */
static bool is_paced(const struct nv_copy *copy)
{
    const struct nv_mirror *mirror = copy->mirror;

    return copy->kind == NV_COPY_RESYNC && nv_mirror_map(mirror)->mirror.resync_rate > 0 &&
           (mirror->copier.limited || mirror->requests_seen > 0);
}

static void time_comes(struct nv_op *op)
{
    struct nv_mirror *mirror = (struct nv_mirror *)((char *)op - offsetof(struct nv_mirror, copier.timer));
    struct nv_copier *copier = &mirror->copier;

    copier->timer_out = false;
    for (unsigned i = 0; i < NV_COPY_DEPTH; i++) {
        struct nv_copy *copy = &copier->copies[i];
        if (!copy->busy || !copy->waiting)
            continue;
        copy->waiting = false;
        next_piece(copy);
    }
    nv_mirror_pump(mirror);
}

static void wait_for_time(struct nv_copy *copy, uint64_t wait_ns)
{
    struct nv_mirror *mirror = copy->mirror;
    struct nv_copier *copier = &mirror->copier;

    copy->waiting = true;
    if (copier->timer_out)
        return;
    if (wait_ns > NV_COPY_WAIT_MAX_MS * 1000000ull)
        wait_ns = NV_COPY_WAIT_MAX_MS * 1000000ull;
    copier->timer_out = true;
    copier->timer = (struct nv_op){.kind = NV_OP_TIMER, .done = time_comes, .length = wait_ns};
    nv_io_submit(mirror->reactor->io, &copier->timer);
}

/* True: the copy's present piece may begin, and the next one has its time. */
static bool has_its_time(struct nv_copy *copy)
{
    struct nv_copier *copier = &copy->mirror->copier;
    const uint64_t rate = nv_mirror_map(copy->mirror)->mirror.resync_rate, now = nv_io_now_ns(copy->mirror->reactor->io);

    if (!is_paced(copy))
        return true;
    if (copier->due_ns > now) {
        wait_for_time(copy, copier->due_ns - now);
        return false;
    }
    if (now - copier->due_ns > NV_COPY_LATE_US * 1000ull)
        copier->due_ns = now - NV_COPY_LATE_US * 1000ull;
    copier->due_ns += copy->length * 1000000000ull / rate;
    return true;
}

static void next_piece(struct nv_copy *copy)
{
    struct nv_mirror *mirror = copy->mirror;
    const struct nv_map *map = nv_mirror_map(mirror);

    while (!copy->error && copy->at < copy->end && !is_idle(copy)) {
        const uint64_t most = is_paced(copy) ? NV_COPY_PACED : NV_COPY_PIECE;
        copy->length = copy->end - copy->at < most ? copy->end - copy->at : most;
        if (!nv_mirror_span(map, copy->at, &copy->length)) { /* nothing is stored there */
            copy->at += copy->length;
            continue;
        }
        copy->paused = mirror->pausing != NULL;
        if (copy->paused || !has_its_time(copy))
            return;
        copy->range = (struct nv_range){.offset = copy->at, .length = copy->length, .reactor = mirror->reactor,
                                        .ready = range_ready};
        copy->order = mirror->order;
        nv_range_enter(copy->order, &copy->range);
        if (nv_range_release(copy->order, &copy->range)) {
            copy->tried = 0;
            read_source(copy);
        }
        return;
    }
    if (!copy->error && copy->at < copy->end)
        copy->error = -ECANCELED;
    copy_over(copy);
}

bool nv_mirror_pause_copies(struct nv_mirror *mirror, struct nv_late *rest)
{
    mirror->pausing = rest;
    for (uint32_t i = 0; i < NV_COPY_DEPTH; i++) {
        struct nv_copy *copy = &mirror->copier.copies[i];
        if (!copy->order || !nv_range_withdraw(copy->order, &copy->range))
            continue;
        copy->order = NULL;
        copy->paused = true;
    }
    return !is_placed(mirror);
}

void nv_mirror_resume_copies(struct nv_mirror *mirror, struct nv_range_table *table)
{
    mirror->pausing = NULL;
    mirror->order = table;
    for (uint32_t i = 0; i < NV_COPY_DEPTH; i++) {
        struct nv_copy *copy = &mirror->copier.copies[i];
        if (!copy->paused)
            continue;
        copy->paused = false;
        next_piece(copy);
    }
    nv_mirror_pump(mirror);
}

/* --- what to copy next --- */

static struct nv_copy *begin(struct nv_mirror *mirror, enum nv_copy_kind kind, uint64_t from, uint64_t to)
{
    struct nv_copier *copier = &mirror->copier;
    struct nv_copy *copy = copier->copies;

    while (copy->busy)
        copy++;
    *copy = (struct nv_copy){.busy = true, .kind = kind, .mirror = mirror, .begin = from, .at = from, .end = to,
                             .region = nv_region_of(&mirror->intent, from)};
    copier->busy++;
    copier->resyncing += kind == NV_COPY_RESYNC;
    return copy;
}

static void begin_region(struct nv_mirror *mirror, enum nv_copy_kind kind, uint32_t region, uint8_t lanes)
{
    struct nv_copy *copy = begin(mirror, kind, (uint64_t)region << mirror->intent.shift, region_end(mirror, region));

    copy->lanes = lanes;
    copy->keep = true;
    next_piece(copy);
}

static bool under_way(const struct nv_copier *copier, enum nv_copy_kind kind, uint32_t region)
{
    for (unsigned i = 0; i < NV_COPY_DEPTH; i++)
        if (copier->copies[i].busy && copier->copies[i].kind == kind && copier->copies[i].region == region)
            return true;
    return false;
}

static bool can_reconcile(const struct nv_mirror *mirror, uint32_t region)
{
    return (mirror->intent.state[region] & NV_REGION_DOUBTFUL) &&
           !under_way(&mirror->copier, NV_COPY_RECONCILE, region);
}

/* A doubtful region: one that a read waits for, or the next. -1: none. */
static int64_t next_doubtful(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    for (const struct nv_vreq *request = mirror->reads.first; request; request = request->queue_next) {
        const uint64_t first = request->offset + request->done, last = request->offset + request->length - 1;
        for (uint32_t region = nv_region_of(intent, first); region <= nv_region_of(intent, last); region++)
            if (can_reconcile(mirror, region))
                return region;
    }
    for (uint32_t i = 0; i < intent->regions && !mirror->copier.stuck; i++) {
        const uint32_t region = (mirror->copier.cursor + i) % intent->regions;
        if (!can_reconcile(mirror, region))
            continue;
        mirror->copier.cursor = (region + 1) % intent->regions;
        return region;
    }
    return -1;
}

static bool begin_reconcile(struct nv_mirror *mirror)
{
    int64_t region = -1;

    if (mirror->intent.doubtful_count > 0)
        region = next_doubtful(mirror);
    if (region >= 0)
        begin_region(mirror, NV_COPY_RECONCILE, (uint32_t)region, 0);
    return region >= 0;
}

static bool begin_rewrite(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    for (uint32_t i = 0; i < intent->regions && intent->rewrite_count > 0 && !mirror->copier.stuck; i++) {
        const uint32_t region = (mirror->copier.cursor + i) % intent->regions;
        if (!(intent->state[region] & NV_REGION_REWRITE) || (intent->state[region] & NV_REGION_DOUBTFUL) ||
            under_way(&mirror->copier, NV_COPY_REWRITE, region))
            continue;
        mirror->copier.cursor = (region + 1) % intent->regions;
        begin_region(mirror, NV_COPY_REWRITE, region, 0);
        return true;
    }
    return false;
}

static bool begin_repair(struct nv_mirror *mirror)
{
    struct nv_copier *copier = &mirror->copier;
    struct nv_repair repair;
    struct nv_copy *copy;

    if (copier->repair_count == 0)
        return false;
    repair = copier->repairs[0];
    copier->repair_count--;
    memmove(copier->repairs, copier->repairs + 1, copier->repair_count * sizeof repair);
    copy = begin(mirror, NV_COPY_REPAIR, repair.offset, repair.offset + repair.length);
    copy->lane = repair.lane;
    next_piece(copy);
    return true;
}

static bool begin_verify(struct nv_mirror *mirror)
{
    struct nv_copier *copier = &mirror->copier;

    if (!copier->verify || copier->verify_next == mirror->intent.regions || mirror->intent.doubtful_count > 0)
        return false;
    begin_region(mirror, NV_COPY_VERIFY, copier->verify_next++, 0);
    return true;
}

static bool begin_resync(struct nv_mirror *mirror)
{
    struct nv_copier *copier = &mirror->copier;
    const uint32_t regions = mirror->intent.regions;

    if (!mirror->syncing || copier->exhausted || mirror->checkpoint_due)
        return false;
    for (uint32_t i = 0; i < regions; i++) {
        const uint32_t region = (copier->cursor + i) % regions;
        const uint8_t lanes = wanting(mirror, region, mirror->syncing);
        if (!lanes || under_way(copier, NV_COPY_RESYNC, region))
            continue;
        copier->cursor = (region + 1) % regions;
        begin_region(mirror, NV_COPY_RESYNC, region, lanes);
        return true;
    }
    copier->exhausted = true;
    return false;
}

/* Enough has been copied since the last checkpoint, by bytes or by time; or all there is. */
static bool wants_checkpoint(const struct nv_mirror *mirror)
{
    const struct nv_copier *copier = &mirror->copier;

    return copier->since_checkpoint >= NV_COPY_CHECKPOINT || (copier->exhausted && copier->resyncing == 0) ||
           (copier->since_checkpoint > 0 && mirror->now_ms - copier->checkpoint_ms >= NV_COPY_CHECKPOINT_MS);
}

bool nv_copier_pump(struct nv_mirror *mirror)
{
    struct nv_copier *copier = &mirror->copier;
    bool any = false;

    if (mirror->attaching || mirror->fenced || mirror->broken || mirror->end_wanted || !nv_copier_has_work(mirror))
        return false;
    while (copier->busy < NV_COPY_DEPTH &&
           (begin_repair(mirror) || begin_reconcile(mirror) || begin_rewrite(mirror) ||
            begin_verify(mirror) || begin_resync(mirror)))
        any = true;
    if (mirror->checkpoint_due || !mirror->syncing)
        return any;
    /* when a checkpoint is due no further region is begun; it runs when those under way are through */
    mirror->checkpoint_due = wants_checkpoint(mirror);
    return any || mirror->checkpoint_due;
}

/* --- from outside --- */

void nv_copier_repair(struct nv_mirror *mirror, uint64_t offset, uint64_t length, uint32_t lane)
{
    struct nv_copier *copier = &mirror->copier;

    for (uint32_t i = 0; i < copier->repair_count; i++)
        if (copier->repairs[i].offset == offset && copier->repairs[i].lane == lane)
            return;
    if (copier->repair_count < NV_REPAIRS_MAX) /* else the next read of the place asks again */
        copier->repairs[copier->repair_count++] = (struct nv_repair){offset, length, (uint8_t)lane};
}

void nv_copier_missed(struct nv_mirror *mirror, uint32_t first, uint32_t last, uint8_t lanes)
{
    struct nv_copier *copier = &mirror->copier;

    for (unsigned i = 0; i < NV_COPY_DEPTH; i++) {
        struct nv_copy *copy = &copier->copies[i];
        if (copy->busy && copy->kind == NV_COPY_RESYNC && first <= copy->region && copy->region <= last)
            copy->lanes &= (uint8_t)~lanes;
    }
    if (lanes & mirror->syncing)
        copier->exhausted = false;
}

void nv_copier_suspect(struct nv_mirror *mirror)
{
    for (unsigned i = 0; i < NV_COPY_DEPTH; i++)
        mirror->copier.copies[i].keep = false;
}

bool nv_copier_reconciles(const struct nv_mirror *mirror, uint32_t region)
{
    return under_way(&mirror->copier, NV_COPY_RECONCILE, region);
}

bool nv_copier_has_work(const struct nv_mirror *mirror)
{
    const struct nv_copier *copier = &mirror->copier;

    return copier->busy || copier->repair_count || copier->verify || mirror->syncing || mirror->intent.doubtful_count ||
           mirror->intent.rewrite_count;
}

void nv_copier_tick(struct nv_mirror *mirror)
{
    struct nv_copier *copier = &mirror->copier;

    copier->stuck = false;
    if (copier->since_checkpoint == 0)
        copier->checkpoint_ms = mirror->now_ms;
    copier->limited = mirror->requests_seen > 0; /* with nobody to stand behind, it goes as fast as it can */
}
