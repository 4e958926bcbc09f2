/*
 * The mirror's legs and queues (see mirror.h). Invariants: `in_sync` is never empty once the mirror has attached; a lane
 * stands in at most one of the masks; while a lane is failing no write-like request starts and none is acknowledged.
 * Entries from outside end with nv_mirror_pump(), which is the only place where things go on; requests and completions,
 * of which many come in a turn, ask for it once before the turn ends.
 */
#include "volume/mirror.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "reactor/plane.h"
#include "reactor/reactor.h"
#include "volume/logged.h"
#include "volume/mirror_state.h"

/* --- lanes --- */

static uint64_t fresh_ms(const struct nv_mirror *mirror)
{
    return nv_io_now_ns(mirror->reactor->io) / 1000000u;
}

void nv_mirror_raise(struct nv_mirror *mirror, struct nv_event_slot *slot)
{
    if (!slot->waiting) /* else the same is being told already */
        nv_events_raise(&mirror->reactor->events, slot);
}

/*
 * With one in-sync leg left there is nothing to compare it with: what it has is the truth. But not where another leg's
 * bytes are on their way to it: there it is not known yet what it has.
 */
static void end_doubt(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    if (intent->doubtful_count == 0 || (mirror->in_sync & (mirror->in_sync - 1)))
        return;
    for (uint32_t region = 0; region < intent->regions; region++)
        if ((intent->state[region] & NV_REGION_DOUBTFUL) && !nv_copier_reconciles(mirror, region))
            nv_mirror_settle_region(mirror, region);
}

void nv_mirror_settle_region(struct nv_mirror *mirror, uint32_t region)
{
    struct nv_intent *intent = &mirror->intent;

    assert(intent->state[region] & NV_REGION_DOUBTFUL);
    intent->state[region] &= (uint8_t)~NV_REGION_DOUBTFUL;
    intent->doubtful_count--;
    mirror->reads_due = true;
    if (!(mirror->in_sync & (mirror->in_sync - 1))) /* a sync may have lost something before, see nv_mirror_judge() */
        nv_intent_suspect(intent, (uint64_t)region << intent->shift, 1);
}

void nv_mirror_choose_primary(struct nv_mirror *mirror)
{
    if (!mirror->in_sync || (mirror->in_sync & nv_lane_bit(mirror->primary)))
        return;
    mirror->primary = (uint32_t)__builtin_ctz(mirror->in_sync);
    mirror->settling = mirror->conflicts.all_out > 0;
}

static void lose(struct nv_mirror *mirror, uint32_t lane, int error)
{
    struct nv_lane *at = &mirror->lanes[lane];
    const uint8_t bit = nv_lane_bit(lane);

    if (!nv_mirror_frozen(mirror))
        mirror->frozen_ms = mirror->now_ms = fresh_ms(mirror);
    mirror->in_sync &= (uint8_t)~bit;
    mirror->promoting &= (uint8_t)~bit;
    mirror->failing |= bit;
    mirror->losses++;
    at->state = NV_LANE_FAILING;
    nv_intent_lost(mirror, bit);
    nv_mirror_abandon(mirror, lane);
    nv_mirror_choose_primary(mirror);
    end_doubt(mirror);
    at->failed.event.result = error;
    at->failed.event.args[0] = at->id;
    at->failed.event.args[1] = mirror->generation;
    nv_mirror_raise(mirror, &at->failed);
    nv_mirror_wake_tick(mirror);
}

void nv_mirror_lose_syncing(struct nv_mirror *mirror, uint32_t lane, int error)
{
    struct nv_lane *at = &mirror->lanes[lane];
    const uint8_t bit = nv_lane_bit(lane);

    assert(mirror->syncing & bit);
    mirror->syncing &= (uint8_t)~bit;
    mirror->losses++;
    at->state = NV_LANE_STALE;
    nv_intent_lost(mirror, bit);
    nv_mirror_abandon(mirror, lane);
    at->stopped.event.result = error;
    at->stopped.event.args[0] = at->id;
    nv_mirror_raise(mirror, &at->stopped);
}

/* A fault stands of one of the leg's objects; and how many there have been of all of them. */
static bool leg_faults(const struct nv_map_leg *leg, uint64_t *count)
{
    bool stands = leg && leg->meta && atomic_load(&leg->meta->sync.fault) != 0;

    *count = leg && leg->meta ? atomic_load(&leg->meta->sync.faults) : 0;
    for (uint32_t i = 0; leg && i < leg->object_count; i++) {
        stands |= atomic_load(&leg->objects[i]->sync.fault) != 0;
        *count += atomic_load(&leg->objects[i]->sync.faults);
    }
    return stands;
}

bool nv_lane_latched(const struct nv_mirror *mirror, uint32_t lane)
{
    uint64_t count;
    const bool stands = leg_faults(nv_mirror_map(mirror)->by_lane[lane], &count);

    return stands || ((nv_lanes_live(mirror) & nv_lane_bit(lane)) && count != mirror->lanes[lane].faults);
}

void nv_lane_counts_faults(struct nv_mirror *mirror, uint32_t lane, const struct nv_map_leg *leg)
{
    (void)leg_faults(leg, &mirror->lanes[lane].faults);
}

/* In-sync legs that have lost something, where others have not: those go first, or one with everything might. */
static void lose_latched(struct nv_mirror *mirror)
{
    uint8_t latched = 0;

    NV_EACH_LANE(lane, mirror->in_sync)
        if (nv_lane_latched(mirror, lane))
            latched |= nv_lane_bit(lane);
    if (latched == mirror->in_sync)
        return;
    NV_EACH_LANE(lane, latched)
        lose(mirror, lane, -EIO);
}

bool nv_mirror_fault(struct nv_mirror *mirror, uint32_t lane, int error)
{
    const uint8_t bit = nv_lane_bit(lane);

    assert(error < 0);
    if (mirror->in_sync & bit)
        lose_latched(mirror);
    if (mirror->in_sync == bit)
        return false;
    if (mirror->syncing & bit)
        nv_mirror_lose_syncing(mirror, lane, error);
    else if (nv_lanes_counted(mirror) & bit)
        lose(mirror, lane, error);
    else
        nv_mirror_abandon(mirror, lane); /* a resync that was being prepared */
    return true;
}

/*
 * The last in-sync leg has lost something that reads may still see. Nobody else has it all: it is written once more, so
 * that legs which are copied from it later do not have what it has lost.
 */
static void suspect(struct nv_mirror *mirror, uint32_t lane, const struct nv_mio *mio)
{
    uint64_t count;

    (void)leg_faults(nv_mirror_map(mirror)->by_lane[lane], &count);
    if (!mirror->suspected || count != mirror->lanes[lane].faults) { /* one more loses what has been rewritten, too */
        nv_intent_suspect(&mirror->intent, 0, nv_mirror_map(mirror)->size);
        nv_copier_suspect(mirror);
    } else if (mio->request && mio->length > 0) {
        nv_intent_suspect(&mirror->intent, mio->offset, mio->length);
    }
    mirror->suspected = true;
    mirror->lanes[lane].faults = count;
    mirror->sole_faults++;
}

/* True: it may count. */
static bool has_kept_all(struct nv_mio *mio, uint32_t lane)
{
    struct nv_mirror *mirror = mio->mirror;

    if (!nv_lane_latched(mirror, lane)) {
        if (mirror->in_sync == nv_lane_bit(lane))
            mirror->suspected = false;
        return true;
    }
    if (nv_mirror_fault(mirror, lane, -EIO))
        return false;
    suspect(mirror, lane, mio);
    return true;
}

uint8_t nv_mirror_judge(struct nv_mio *mio)
{
    uint8_t did = 0;

    for (uint32_t left = mio->sent & (uint8_t)~mio->late; left;) { /* the primary last: it is the one to stay */
        const uint32_t lane = 31u - (uint32_t)__builtin_clz(left);
        const struct nv_part *part = &mio->parts[lane];
        const uint8_t bit = nv_lane_bit(lane);
        left &= ~(uint32_t)bit;
        if (has_kept_all(mio, lane) && part->result >= 0)
            did |= bit;
        else if (part->result < 0)
            nv_mirror_fault(mio->mirror, lane, (int)part->result);
    }
    return did;
}

/* --- queues --- */

void nv_mirror_hold(struct nv_queue *queue, struct nv_vreq *request)
{
    request->queue_next = NULL;
    *queue->last = request;
    queue->last = &request->queue_next;
}

static struct nv_vreq *take_all(struct nv_queue *queue)
{
    struct nv_vreq *list = queue->first;

    nv_queue_init(queue);
    return list;
}

static void finish_all(struct nv_queue *queue, int error)
{
    for (struct nv_vreq *request = take_all(queue), *next; request; request = next) {
        next = request->queue_next;
        nv_mirror_finish(request, error);
    }
}

static void forwarded_finish(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_vreq *request = (struct nv_vreq *)((char *)message - offsetof(struct nv_vreq, wait.message));

    assert(request->reactor == reactor);
    (void)reactor;
    nv_volume_finish(request, request->error);
}

void nv_mirror_finish(struct nv_vreq *request, int error)
{
    if (request->reactor == request->volume->mirror->reactor) {
        nv_volume_finish(request, error);
        return;
    }
    request->error = error;
    request->wait.message.run = forwarded_finish;
    nv_reactor_send(request->reactor, &request->wait.message);
}

/* Why nothing is served any more; 0: it is. */
static int refusal(const struct nv_mirror *mirror)
{
    if (mirror->fenced || mirror->broken)
        return -EIO;
    if (mirror->closing && (mirror->attaching || nv_mirror_frozen(mirror)))
        return -ESHUTDOWN;
    return mirror->expired ? -EIO : 0;
}

void nv_mirror_acknowledge(struct nv_vreq *request)
{
    struct nv_mirror *mirror = request->volume->mirror;

    if (!nv_mirror_frozen(mirror) && !mirror->fenced)
        nv_mirror_finish(request, 0);
    else if (refusal(mirror))
        nv_mirror_finish(request, refusal(mirror));
    else
        nv_mirror_hold(&mirror->parked, request);
}

static bool reads_only(const struct nv_vreq *request)
{
    return request->kind == NV_REQUEST_READ || request->kind == NV_REQUEST_CACHE || request->kind == NV_REQUEST_STATUS;
}

static void run(struct nv_mirror *mirror, struct nv_vreq *request)
{
    const bool reads = reads_only(request);
    const int error = refusal(mirror);

    if (error && (!reads || mirror->fenced || mirror->broken || mirror->attaching))
        nv_mirror_finish(request, request->kind == NV_REQUEST_CACHE ? 0 : error); /* a hint never fails */
    else if (mirror->attaching || (!reads && nv_mirror_stopped(mirror)))
        nv_mirror_hold(&mirror->held, request);
    else if (reads)
        nv_mirror_read(request);
    else if (request->kind == NV_REQUEST_FLUSH)
        nv_mirror_flush(request);
    else
        nv_mirror_write(request);
}

static void run_all(struct nv_mirror *mirror, struct nv_queue *queue)
{
    for (struct nv_vreq *request = take_all(queue), *next; request; request = next) {
        next = request->queue_next;
        run(mirror, request);
    }
}

static void run_here(struct nv_mirror *mirror, struct nv_vreq *request)
{
    mirror->requests_seen++;
    request->faults = mirror->sole_faults;
    request->tried = 0;
    request->primary_only = false;
    run(mirror, request);
    nv_mirror_pump_later(mirror);
}

static void forwarded_run(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_vreq *request = (struct nv_vreq *)((char *)message - offsetof(struct nv_vreq, wait.message));

    assert(request->volume->mirror->reactor == reactor);
    (void)reactor;
    run_here(request->volume->mirror, request);
}

void nv_mirror_run(struct nv_vreq *request)
{
    struct nv_mirror *mirror = request->volume->mirror;

    if (request->reactor == mirror->reactor) {
        run_here(mirror, request);
        return;
    }
    request->wait.message.run = forwarded_run;
    nv_reactor_send(mirror->reactor, &request->wait.message);
}

/* True: somebody went on. */
static bool run_queues(struct nv_mirror *mirror)
{
    const int error = refusal(mirror);

    if (mirror->parked.first && (error || !nv_mirror_frozen(mirror))) {
        finish_all(&mirror->parked, error);
        return true;
    }
    if (mirror->settling && mirror->conflicts.all_out == 0) {
        mirror->settling = false;
        mirror->reads_due = true;
    }
    if (mirror->held.first && (error || (!mirror->attaching && !nv_mirror_stopped(mirror)))) {
        run_all(mirror, &mirror->held);
        return true;
    }
    if (mirror->starved.first && mirror->starved_due) {
        mirror->starved_due = false;
        run_all(mirror, &mirror->starved);
        return true;
    }
    if (mirror->reads.first && mirror->reads_due) {
        mirror->reads_due = false;
        run_all(mirror, &mirror->reads);
        return true;
    }
    return false;
}

static bool continue_after_force(struct nv_mirror *mirror)
{
    void (*then)(struct nv_mirror *) = mirror->task.after_force;

    if (!then || !nv_intent_forced(mirror))
        return false;
    mirror->task.after_force = NULL;
    then(mirror);
    return true;
}

/* Everything is over: nothing may touch the mirror after this. */
static void finish_end(struct nv_mirror *mirror)
{
    struct nv_reactor *reactor = mirror->reactor;

    if (mirror->mios_out > 0)
        return;
    nv_reactor_drop_ticker(&mirror->ticker);
    nv_reactor_drop_late(reactor, &mirror->late);
    reactor->mirrors--;
    nv_volume_mirror_ended(mirror->volume, reactor);
}

void nv_mirror_pump(struct nv_mirror *mirror)
{
    bool any;

    if (mirror->pumping)
        return;
    mirror->pumping = true;
    do {
        any = nv_mirror_run_landed(mirror);
        any |= run_queues(mirror);
        any |= continue_after_force(mirror);
        any |= nv_mirror_next_task(mirror);
        any |= nv_copier_pump(mirror);
    } while (any);
    mirror->pumping = false;
    if (mirror->ended)
        finish_end(mirror);
}

void nv_mirror_pump_due(struct nv_late *late)
{
    nv_mirror_pump((struct nv_mirror *)((char *)late - offsetof(struct nv_mirror, late)));
}

void nv_mirror_pump_later(struct nv_mirror *mirror)
{
    if (!mirror->pumping)
        nv_reactor_late(mirror->reactor, &mirror->late);
}

/* --- freeze, release, fence --- */

void nv_mirror_unfreeze(struct nv_mirror *mirror, uint8_t lanes)
{
    NV_EACH_LANE(lane, lanes & mirror->failing)
        mirror->lanes[lane].state = NV_LANE_STALE;
    mirror->failing &= (uint8_t)~lanes;
    mirror->committed &= (uint8_t)~lanes;
    if (!mirror->failing)
        mirror->expired = false;
    mirror->reads_due = true;
}

void nv_mirror_under(struct nv_mirror *mirror, struct nv_logged *logged)
{
    mirror->logged = logged;
    if (logged && mirror->fenced)
        nv_logged_fence(logged);
}

void nv_mirror_fence_now(struct nv_mirror *mirror, uint64_t epoch)
{
    if (mirror->fenced)
        return;
    mirror->fenced = true;
    nv_cached_fence(mirror->volume); /* or hits would be served past the epoch */
    if (mirror->logged)
        nv_logged_fence(mirror->logged);
    mirror->reads_due = mirror->starved_due = true;
    mirror->fenced_event.event.args[0] = epoch;
    if (epoch)
        nv_mirror_raise(mirror, &mirror->fenced_event);
}

/* --- commands --- */

void nv_mirror_end_command(struct nv_mirror *mirror, struct nv_mirror_command *command, int error)
{
    command->done.event.result = error;
    command->done.event.args[0] = command->leg;
    if (!mirror->attaching) { /* while it attaches, labels are still to be written: there is nothing to confirm */
        command->done.event.args[1] = mirror->epoch;
        command->done.event.args[2] = mirror->task.kind ? mirror->task.generation : mirror->generation;
    }
    nv_events_raise(&mirror->reactor->events, &command->done); /* the front frees it */
}

static void queue_command(struct nv_mirror *mirror, struct nv_mirror_command *command)
{
    command->next = NULL;
    *mirror->commands_tail = command;
    mirror->commands_tail = &command->next;
}

static int find_lane(const struct nv_mirror *mirror, uint32_t leg)
{
    for (int lane = 0; lane < (int)NV_LEGS_MAX; lane++)
        if (leg && mirror->lanes[lane].id == leg)
            return lane;
    return -ENOENT;
}

static int begin_resync(struct nv_mirror *mirror, uint32_t lane, struct nv_mirror_command *command)
{
    const struct nv_map_leg *leg = nv_mirror_map(mirror)->by_lane[lane];

    if (mirror->lanes[lane].state != NV_LANE_STALE || mirror->lanes[lane].resync)
        return -EALREADY;
    if (!leg || !leg->meta)
        return -ENODEV;
    if (nv_lane_latched(mirror, lane))
        return -EIO; /* until the operator clears it */
    mirror->lanes[lane].resync = command;
    return 1;
}

static int stop_resync(struct nv_mirror *mirror, uint32_t lane)
{
    struct nv_lane *at = &mirror->lanes[lane];

    if (at->resync && mirror->task.command != at->resync) {
        nv_mirror_end_command(mirror, at->resync, -ECANCELED);
        at->resync = NULL;
    }
    if (mirror->syncing & nv_lane_bit(lane))
        nv_mirror_lose_syncing(mirror, lane, -ECANCELED);
    return at->state == NV_LANE_PROMOTING ? -EBUSY : 0;
}

static int release(struct nv_mirror *mirror, uint32_t lane, struct nv_mirror_command *command)
{
    if (mirror->lanes[lane].state == NV_LANE_STALE)
        return 0;
    if (mirror->lanes[lane].state != NV_LANE_FAILING)
        return -EINVAL;
    mirror->committed |= nv_lane_bit(lane);
    queue_command(mirror, command);
    return 1;
}

/* -errno or 0: it is done; 1: it goes on. */
static int obey(struct nv_mirror *mirror, struct nv_mirror_command *command)
{
    const int lane = find_lane(mirror, command->leg);

    if (command->kind == NV_MIRROR_FENCE) {
        nv_mirror_fence_now(mirror, 0);
        return 0;
    }
    if (mirror->fenced || mirror->broken || mirror->closing)
        return -ESHUTDOWN;
    if (command->kind == NV_MIRROR_VERIFY) {
        if (mirror->copier.verify || mirror->attaching)
            return -EBUSY;
        mirror->copier.verify = command;
        mirror->copier.verify_next = 0;
        mirror->copier.verify_error = 0;
        mirror->copier.verify_bytes = mirror->copier.verify_differed = mirror->copier.verify_repaired = 0;
        return 1;
    }
    if (lane < 0)
        return lane;
    if (command->generation > mirror->generation)
        mirror->generation = command->generation;
    switch (command->kind) {
    case NV_MIRROR_FAIL:
        return nv_mirror_fault(mirror, (uint32_t)lane, -ENODEV) ? 0 : -EBUSY;
    case NV_MIRROR_RELEASE:
        return release(mirror, (uint32_t)lane, command);
    case NV_MIRROR_RESYNC:
        return begin_resync(mirror, (uint32_t)lane, command);
    case NV_MIRROR_STOP:
        return stop_resync(mirror, (uint32_t)lane);
    default:
        queue_command(mirror, command);
        return 1;
    }
}

void nv_mirror_command_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_mirror_command *command =
        (struct nv_mirror_command *)((char *)message - offsetof(struct nv_mirror_command, message));
    struct nv_mirror *mirror = command->mirror;
    int error = obey(mirror, command);

    (void)reactor;
    if (error <= 0)
        nv_mirror_end_command(mirror, command, error);
    nv_mirror_pump(mirror);
}
