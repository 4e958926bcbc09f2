/*
 * See logged.h. A request's way through the log: slots, parts, turns. What goes below is in logged_below.c, the front's side
 * in logged_front.c.
 *
 * Invariants: a slot has one client's request and at most one request of the log under way; the log is pumped in each turn
 * of the owner in which anything happened; once it is fenced every request fails, also one that has reached the device.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "reactor/plane.h"
#include "volume/logged_state.h"
#include "volume/mirror.h"
#include "volume/switch.h"

static void go_on(struct nv_logged_slot *slot);

/* ---- answers ---- */

static void answer_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_vreq *request = (struct nv_vreq *)((char *)message - offsetof(struct nv_vreq, wait.message));

    assert(request->reactor == reactor);
    (void)reactor;
    nv_volume_finish(request, request->error);
}

static void answer(struct nv_logged *logged, struct nv_vreq *request, int error)
{
    if (request->reactor == logged->reactor) {
        nv_volume_finish(request, error);
        return;
    }
    request->error = error;
    request->wait.message.run = answer_arrives;
    nv_reactor_send(request->reactor, &request->wait.message);
}

/* ---- slots ---- */

static struct nv_logged_slots *slots_for(struct nv_logged *logged, const struct nv_vreq *request)
{
    return &logged->slots[request->kind == NV_REQUEST_READ];
}

/* A trim of no whole block. */
static bool does_nothing(const struct nv_vreq *request)
{
    const uint64_t end_at = request->offset + request->length;
    const uint64_t first = (request->offset + NV_LOG_UNIT - 1) & ~(uint64_t)(NV_LOG_UNIT - 1);

    return request->kind == NV_REQUEST_TRIM &&
           first >= (end_at == request->map->size ? end_at : end_at & ~(uint64_t)(NV_LOG_UNIT - 1));
}

static void begin(struct nv_logged *logged, struct nv_vreq *request)
{
    struct nv_logged_slots *slots = slots_for(logged, request);
    struct nv_logged_slot *slot = slots->free;

    if (logged->fenced || does_nothing(request)) { /* so whoever has a slot has something to wait for */
        answer(logged, request, logged->fenced ? -EIO : 0);
        return;
    }
    if (!slot) { /* they come in turn */
        request->queue_next = NULL;
        *slots->waiting_last = request;
        slots->waiting_last = &request->queue_next;
        return;
    }
    slots->free = slot->next;
    slot->request = request;
    slot->at = request->offset + request->done;
    slot->part = 0;
    slot->merging = false;
    go_on(slot);
}

static void end(struct nv_logged_slot *slot, int error)
{
    struct nv_logged *logged = slot->logged;
    struct nv_vreq *request = slot->request, *next;
    struct nv_logged_slots *slots = slots_for(logged, request);

    slot->request = NULL;
    slot->next = slots->free;
    slots->free = slot;
    while (slots->free && (next = slots->waiting)) {
        slots->waiting = next->queue_next;
        if (!slots->waiting)
            slots->waiting_last = &slots->waiting;
        begin(logged, next);
    }
    answer(logged, request, logged->fenced ? -EIO : error);
}

/* ---- parts: whole blocks at once, a block that is touched in part by itself ---- */

static void start(struct nv_logged_slot *slot, enum nv_log_kind kind, uint64_t offset, uint64_t length, uint8_t *data)
{
    slot->log.kind = (uint8_t)kind;
    slot->log.flags = slot->request->flags & NV_REQUEST_FUA && kind != NV_LOG_READ ? NV_LOG_FUA : 0;
    slot->log.offset = offset;
    slot->log.length = length;
    slot->log.data = data;
    nv_log_start(slot->logged->log, &slot->log);
}

static uint64_t block_end(const struct nv_logged_slot *slot)
{
    const uint64_t size = slot->request->map->size, next = (slot->at & ~(uint64_t)(NV_LOG_UNIT - 1)) + NV_LOG_UNIT;

    return next < size ? next : size;
}

/* The block at `at` has been read: put in what the request brings, and write it. */
static void merge(struct nv_logged_slot *slot)
{
    const struct nv_vreq *request = slot->request;
    const uint64_t into = slot->at & (NV_LOG_UNIT - 1), from = slot->at - into;

    slot->merging = false;
    if (request->kind == NV_REQUEST_WRITE)
        memcpy(slot->block + into, request->data + (slot->at - request->offset), slot->part);
    else
        memset(slot->block + into, 0, slot->part);
    start(slot, NV_LOG_WRITE, from, block_end(slot) - from, slot->block);
}

static void start_whole(struct nv_logged_slot *slot, uint64_t left)
{
    static const uint8_t kinds[] = {[NV_REQUEST_WRITE] = NV_LOG_WRITE, [NV_REQUEST_ZERO] = NV_LOG_ZEROES,
                                    [NV_REQUEST_TRIM] = NV_LOG_TRIM};
    const struct nv_vreq *request = slot->request;
    const bool to_the_end = slot->at + left == request->map->size;

    slot->part = to_the_end ? left : left & ~(uint64_t)(NV_LOG_UNIT - 1);
    start(slot, kinds[request->kind], slot->at, slot->part,
          request->data ? request->data + (slot->at - request->offset) : NULL);
}

static void change_on(struct nv_logged_slot *slot)
{
    const struct nv_vreq *request = slot->request;
    const uint64_t end_at = request->offset + request->length;

    while (slot->at < end_at) {
        const uint64_t into = slot->at & (NV_LOG_UNIT - 1), left = end_at - slot->at, here = block_end(slot) - slot->at;
        if (into == 0 && left >= here) {
            start_whole(slot, left);
            return;
        }
        slot->part = left < here ? left : here;
        if (request->kind != NV_REQUEST_TRIM) {
            slot->merging = true;
            start(slot, NV_LOG_READ, slot->at - into, into + here, slot->block);
            return;
        }
        slot->at += slot->part; /* a hint */
    }
    end(slot, 0);
}

static void go_on(struct nv_logged_slot *slot)
{
    struct nv_vreq *request = slot->request;

    if (request->kind == NV_REQUEST_READ && slot->part == 0) {
        slot->part = request->length - request->done;
        start(slot, NV_LOG_READ, slot->at, slot->part, request->data + request->done);
    } else if (request->kind == NV_REQUEST_FLUSH && slot->part == 0) {
        slot->part = 1;
        start(slot, NV_LOG_FLUSH, 0, 0, NULL);
    } else if (request->kind == NV_REQUEST_READ || request->kind == NV_REQUEST_FLUSH) {
        end(slot, 0);
    } else {
        change_on(slot);
    }
}

void nv_logged_part_done(struct nv_log_request *log)
{
    struct nv_logged_slot *slot = (struct nv_logged_slot *)log;

    if (log->error) {
        end(slot, log->error);
    } else if (slot->merging) {
        merge(slot);
    } else {
        slot->at += slot->part;
        go_on(slot);
    }
}

/* ---- block status: what is logged is data, whatever is below ---- */

static void past_the_log(struct nv_reactor *reactor, struct nv_message *message)
{
    (void)reactor;
    nv_volume_past_log((struct nv_vreq *)((char *)message - offsetof(struct nv_vreq, wait.message)));
}

static void run_status(struct nv_logged *logged, struct nv_vreq *request)
{
    bool holds;
    const uint64_t alike = nv_log_alike(logged->log, request->offset, request->length, &holds);

    if (logged->fenced) {
        answer(logged, request, -EIO);
        return;
    }
    request->length = alike; /* an answer may be about less than was asked */
    if (holds) {
        nv_volume_extent(request, alike, 0);
        answer(logged, request, 0);
    } else if (request->reactor == logged->reactor) {
        nv_volume_past_log(request);
    } else {
        request->wait.message.run = past_the_log;
        nv_reactor_send(request->reactor, &request->wait.message);
    }
}

/* ---- requests come ---- */

static void run_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_vreq *request = (struct nv_vreq *)((char *)message - offsetof(struct nv_vreq, wait.message));
    struct nv_logged *logged = nv_volume_local(request->volume, reactor->index)->logged;

    assert(reactor == logged->reactor);
    if (request->map->size > nv_volume_local(request->volume, reactor->index)->map->size) {
        nv_reactor_send(reactor, message); /* its reactor has heard of the growth, the owner's word is on its way */
        return;
    }
    nv_log_grow(logged->log, request->map->size);
    if (request->kind == NV_REQUEST_STATUS)
        run_status(logged, request);
    else
        begin(logged, request);
    nv_reactor_want_tick(reactor);
    nv_reactor_late(reactor, &logged->late);
}

void nv_logged_run(struct nv_vreq *request)
{
    struct nv_logged *logged = nv_volume_local(request->volume, request->reactor->index)->logged;

    request->wait.message.run = run_arrives;
    if (request->reactor == logged->reactor)
        run_arrives(logged->reactor, &request->wait.message);
    else
        nv_reactor_send(logged->reactor, &request->wait.message);
}

/* ---- turns ---- */

static bool busy(const struct nv_logged *logged)
{
    return !nv_log_idle(logged->log) || logged->landed_first;
}

static void raise_drained(struct nv_logged *logged, int result)
{
    struct nv_event_slot *slot = &logged->drained;

    if (slot->waiting && !logged->draining)
        return; /* the same is being told already */
    slot->event.token = logged->draining ? logged->drain.token : 0;
    slot->event.result = result;
    logged->draining = false;
    if (!slot->waiting)
        nv_events_raise(&logged->reactor->events, slot);
}

void nv_logged_gone(struct nv_logged *logged)
{
    for (uint32_t i = 0; i < 2; i++)
        assert(!logged->slots[i].waiting);
    nv_reactor_drop_ticker(&logged->ticker);
    nv_reactor_drop_turner(&logged->turner);
    nv_reactor_drop_late(logged->reactor, &logged->late);
    if (logged->draining)
        raise_drained(logged, -ESHUTDOWN);
}

/* Nothing may touch it any more. */
static void finish_end(struct nv_logged *logged)
{
    struct nv_volume *volume = logged->volume;
    struct nv_reactor *reactor = logged->reactor;

    nv_logged_gone(logged);
    nv_volume_logged_ended(volume, reactor);
}

static void take_landed(struct nv_logged *logged)
{
    struct nv_log_below *io;

    while ((io = logged->landed_first)) {
        logged->landed_first = io->next;
        if (!logged->landed_first)
            logged->landed_last = &logged->landed_first;
        io->done(io);
    }
}

/* A record that waits for what a client is sending is looked at again in the next turn. */
static void hold(struct nv_logged *logged)
{
    if (!nv_log_waits(logged->log)) {
        logged->held_turns = 0;
        return;
    }
    logged->held_turns++;
    nv_reactor_late(logged->reactor, &logged->late);
}

static void pump(struct nv_logged *logged)
{
    assert(!logged->pumping);
    logged->pumping = true;
    do {
        take_landed(logged);
        if (logged->fenced || (logged->closing && nv_log_stuck(logged->log)))
            nv_log_shut(logged->log);
        nv_log_expect(logged->log, logged->held_turns < NV_LOG_HELD_TURNS && nv_reactor_more_comes(logged->reactor));
        nv_log_pump(logged->log);
    } while (logged->landed_first);
    logged->pumping = false;
    hold(logged);
    logged->was_busy = busy(logged);
    nv_logged_show(logged);
    if (busy(logged))
        return;
    if (logged->end_wanted)
        finish_end(logged);
    else if (logged->leaves)
        nv_switch_rests(logged->leaves);
}

static void pump_late(struct nv_late *late)
{
    pump((struct nv_logged *)((char *)late - offsetof(struct nv_logged, late)));
}

/* What was under way may have ended. */
static void pump_turn(struct nv_turner *turner)
{
    struct nv_logged *logged = (struct nv_logged *)((char *)turner - offsetof(struct nv_logged, turner));

    if (logged->was_busy || busy(logged))
        pump(logged);
}

/* What a mirror copies between its legs goes by the order below the log from now on; what it began before ends first. */
static bool copies_are_over(struct nv_logged *logged)
{
    struct nv_mirror *mirror = logged->volume->mirror;
    const bool before = nv_volume_local(logged->volume, logged->reactor->index)->logged;

    return !mirror || !before || nv_mirror_orders_by(mirror, &logged->volume->below);
}

static void open_now(struct nv_logged *logged)
{
    logged->opening = false;
    nv_log_open(logged->log);
    nv_reactor_late(logged->reactor, &logged->late);
}

static void ticked(struct nv_ticker *ticker, uint64_t now_ns)
{
    struct nv_logged *logged = (struct nv_logged *)((char *)ticker - offsetof(struct nv_logged, ticker));
    struct nv_log_look look;

    (void)now_ns;
    if (logged->opening) {
        nv_reactor_want_tick(logged->reactor);
        if (copies_are_over(logged))
            open_now(logged);
        return;
    }
    nv_log_look(logged->log, &look);
    if (nv_logged_show_lost(logged, &look))
        nv_reactor_want_tick(logged->reactor);
    if (look.state == NV_LOG_CLOSED ||
        (look.used_bytes == 0 && look.held == 0 && look.state != NV_LOG_FAILED && !busy(logged)))
        return;
    nv_reactor_want_tick(logged->reactor);
    nv_log_tick(logged->log);
    nv_reactor_late(logged->reactor, &logged->late);
}

/* ---- the front's words ---- */

static void opens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_logged *logged = (struct nv_logged *)((char *)message - offsetof(struct nv_logged, open_message));

    nv_reactor_add_turner(reactor, &logged->turner);
    nv_reactor_add_ticker(reactor, &logged->ticker);
    nv_reactor_want_tick(reactor);
    logged->volume->owned = logged;
    if (logged->volume->mirror && nv_volume_local(logged->volume, reactor->index)->logged)
        nv_mirror_under(logged->volume->mirror, logged);
    logged->opening = true;
    if (copies_are_over(logged))
        open_now(logged);
}

/* ---- in and out ---- */

int nv_logged_may_enter(const struct nv_logged *logged)
{
    struct nv_log_look look;

    nv_log_look(logged->log, &look);
    return look.state == NV_LOG_THROUGH && look.dirty_blocks == 0 ? 0 : -EINVAL;
}

int nv_logged_may_leave(const struct nv_logged *logged)
{
    const bool before = nv_volume_local(logged->volume, logged->reactor->index)->logged;

    return !before || nv_log_holds_nothing(logged->log) ? 0 : -EBUSY;
}

void nv_logged_leaves(struct nv_logged *logged, struct nv_switch *sw)
{
    logged->leaves = sw;
    nv_reactor_late(logged->reactor, &logged->late);
}

static void ends(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_logged *logged = (struct nv_logged *)((char *)message - offsetof(struct nv_logged, end_message));

    nv_log_stop(logged->log);
    logged->end_wanted = true;
    nv_reactor_late(reactor, &logged->late);
}

void nv_logged_send_end(struct nv_logged *logged)
{
    logged->end_message.run = ends;
    nv_reactor_send(logged->reactor, &logged->end_message);
}

void nv_logged_fence(struct nv_logged *logged)
{
    logged->fenced = true;
    nv_log_shut(logged->log);
    nv_reactor_late(logged->reactor, &logged->late);
}

void nv_logged_closes(struct nv_logged *logged)
{
    logged->closing = true;
    nv_reactor_late(logged->reactor, &logged->late);
}

static void take_limits(struct nv_logged *logged)
{
    const nv_log_policy *limits = &logged->limits;

    nv_log_limit(logged->log, &(struct nv_log_limits){
        .bypass_bytes = limits->bypass_bytes, .stream_bytes = limits->stream_bytes, .age_ms = limits->age_ms,
        .deadline_ms = limits->deadline_ms, .rate = limits->destage_rate,
    });
}

static void command_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_logged_command *command = (struct nv_logged_command *)message;
    struct nv_logged *logged = command->logged;

    assert(!logged->end_wanted);
    if (command->kind == NV_LOGGED_LIMIT)
        take_limits(logged); /* before the front may write to them again */
    atomic_store(&command->sent, false);
    switch (command->kind) {
    case NV_LOGGED_LIMIT:
        break;
    case NV_LOGGED_ALLOW:
        logged->is_drained &= nv_log_state(logged->log) == NV_LOG_VOID;
        nv_log_allow(logged->log);
        break;
    case NV_LOGGED_FORGET:
        nv_log_forget(logged->log);
        break;
    case NV_LOGGED_DRAIN:
        logged->draining = true;
        if (logged->is_drained)
            raise_drained(logged, 0);
        else
            nv_log_drain(logged->log);
        break;
    }
    nv_reactor_want_tick(reactor);
    nv_reactor_late(reactor, &logged->late);
}

void nv_logged_send(struct nv_logged *logged, struct nv_logged_command *command)
{
    command->message.run = command_arrives;
    nv_reactor_send(logged->reactor, &command->message);
}

void nv_logged_send_open(struct nv_logged *logged)
{
    logged->turner.run = pump_turn;
    logged->late.run = pump_late;
    logged->ticker.tick = ticked;
    logged->open_message.run = opens;
    nv_reactor_send(logged->reactor, &logged->open_message);
}

void nv_logged_event(void *context, enum nv_log_event event, int64_t value)
{
    struct nv_logged *logged = context;
    struct nv_event_slot *slot = NULL;

    if (event != NV_LOG_RESTS)
        nv_logged_show(logged); /* who hears it may look at once */
    switch (event) {
    case NV_LOG_OPENED:
        logged->reactor->jobs += nv_log_abandoned(logged->log);
        nv_logged_tell_opened(logged);
        return;
    case NV_LOG_RESTS: /* the volume may be gone; nothing of this is touched any more once the front has heard it */
        logged->reactor->jobs--;
        nv_events_raise(&logged->reactor->events, &logged->rests);
        return;
    case NV_LOG_DRAINED:
        logged->is_drained = true;
        raise_drained(logged, 0);
        return;
    case NV_LOG_FAILING:
        slot = &logged->failed;
        slot->event.result = (int32_t)value;
        break;
    case NV_LOG_LOST:
        slot = &logged->lost;
        slot->event.args[0] = (uint64_t)value * NV_LOG_UNIT;
        slot->event.args[1]++;
        nv_reactor_want_tick(logged->reactor);
        break;
    case NV_LOG_NEEDS_WORD:
        slot = &logged->word;
        slot->event.result = (int32_t)value;
        break;
    }
    if (!slot->waiting) /* else the same is being told already */
        nv_events_raise(&logged->reactor->events, slot);
}
