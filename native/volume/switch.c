/*
 * See switch.h. The log's owner leads: it tells every reactor, and goes on when all have answered.
 *
 *     in:   widen -> (no narrow request left) -> close -> (nothing below, a mirror's copies rest) -> the log is in -> open
 *     out:  close -> (nothing below) -> (the log rests, a mirror's copies rest) -> it is out -> open
 *
 * A mirror's copies between its legs take their places in the volume's order without a log and in the one below it with one,
 * where they wait for no client: they change over while none is under way.
 *
 * Widening holds nobody up, so a client that is slow to send a write's bytes delays the log and nothing else. Closing waits for
 * storage alone; is that too slow, every gate is opened again (`cancel`), and the switch has failed. A log that is before no
 * request (refused, or only just opened) goes out without a gate.
 */
#include "volume/switch.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

#include "error.h"
#include "reactor/plane.h"
#include "volume/logged.h"
#include "volume/mirror.h"
#include "volume/volume.h"

enum phase { WIDENING, CLOSING, LEAVING, PAUSING, OPENING };

struct nv_switch_end {              /* of one reactor */
    struct nv_message message;      /* there and back */
    struct nv_message cancel;       /* likewise */
    struct nv_switch *sw;
};

struct nv_switch {
    struct nv_volume *volume;
    struct nv_logged *logged;
    struct nv_reactor *owner;
    struct nv_message begin;
    struct nv_ticker ticker;
    struct nv_late late;            /* the mirror's copies rest */
    bool in, ticks;
    enum phase phase;
    uint32_t left;                  /* reactors that have not answered */
    uint32_t cancels;               /* likewise */
    uint64_t closed_ns;
    int error;
    struct nv_event_slot done;
    struct nv_switch_end ends[];
};

static struct nv_volume_local *local_of(const struct nv_switch *sw, const struct nv_reactor *reactor)
{
    return nv_volume_local(sw->volume, reactor->index);
}

/* ---- a reactor's side ---- */

static void came_back(struct nv_reactor *reactor, struct nv_message *message);

static void answer(struct nv_switch_end *end)
{
    end->message.run = came_back;
    nv_reactor_send(end->sw->owner, &end->message);
}

static void answer_when(struct nv_gate *gate, struct nv_switch_end *end, const uint32_t *count)
{
    assert(!gate->waits);
    if (*count == 0) {
        answer(end);
        return;
    }
    gate->waits = end;
    gate->count = count;
}

void nv_gate_left(struct nv_gate *gate)
{
    struct nv_switch_end *end = gate->waits;

    if (*gate->count > 0)
        return;
    gate->waits = NULL;
    answer(end);
}

void nv_gate_hold(struct nv_gate *gate, struct nv_vreq *request)
{
    if (!gate->held)
        gate->held_last = &gate->held;
    request->queue_next = NULL;
    *gate->held_last = request;
    gate->held_last = &request->queue_next;
}

static void open_gate(struct nv_volume_local *local)
{
    struct nv_vreq *request = local->gate.held, *next;

    local->layers &= (uint8_t)~NV_LAYER_GATE;
    local->gate.held = NULL;
    for (; request; request = next) {
        next = request->queue_next;
        nv_volume_go_on(request);
    }
}

static void widens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch_end *end = (struct nv_switch_end *)message;
    struct nv_gate *gate = &local_of(end->sw, reactor)->gate;

    gate->widens = true;
    answer_when(gate, end, &gate->narrow);
}

static void closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch_end *end = (struct nv_switch_end *)message;
    struct nv_volume_local *local = local_of(end->sw, reactor);

    local->layers |= NV_LAYER_GATE;
    answer_when(&local->gate, end, &local->gate.running);
}

static void set_log(struct nv_volume_local *local, struct nv_logged *logged)
{
    local->logged = logged;
    if (logged)
        local->layers |= NV_LAYER_LOG;
    else
        local->layers &= (uint8_t)~NV_LAYER_LOG;
}

static void opens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch_end *end = (struct nv_switch_end *)message;
    struct nv_volume_local *local = local_of(end->sw, reactor);

    if (!end->sw->error)
        set_log(local, end->sw->in ? end->sw->logged : NULL);
    open_gate(local);
    answer(end);
}

/* ---- the owner leads ---- */

static void tell(struct nv_switch *sw, enum phase phase, void (*run)(struct nv_reactor *, struct nv_message *))
{
    nv_plane *plane = sw->volume->plane;

    sw->phase = phase;
    sw->left = plane->config.reactors;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        sw->ends[i].message.run = run;
        nv_reactor_send(nv_plane_reactor(plane, i), &sw->ends[i].message);
    }
}

/* The volume may be gone once the front has taken the event and its local half here has left. */
static void finish(struct nv_switch *sw)
{
    struct nv_reactor *owner = sw->owner;
    struct nv_volume_local *local = local_of(sw, owner);

    if (sw->ticks)
        nv_reactor_drop_ticker(&sw->ticker);
    owner->jobs--;
    local->switching = false;
    sw->done.event.result = sw->error;
    nv_events_raise(&owner->events, &sw->done);
    nv_volume_local_left(owner, local);
}

static void open_all(struct nv_switch *sw, int error)
{
    sw->error = error;
    tell(sw, OPENING, opens);
}

static void cancel_came_back(struct nv_reactor *reactor, struct nv_message *message);

static void cancels(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch_end *end = (struct nv_switch_end *)((char *)message - offsetof(struct nv_switch_end, cancel));
    struct nv_volume_local *local = local_of(end->sw, reactor);

    open_gate(local);
    if (local->gate.waits == end) {
        local->gate.waits = NULL;
        answer(end);
    }
    message->run = cancel_came_back;
    nv_reactor_send(end->sw->owner, message);
}

static void cancel_all(struct nv_switch *sw)
{
    nv_plane *plane = sw->volume->plane;

    sw->error = -ETIMEDOUT;
    sw->cancels = plane->config.reactors;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        sw->ends[i].cancel.run = cancels;
        nv_reactor_send(nv_plane_reactor(plane, i), &sw->ends[i].cancel);
    }
}

static void ticked(struct nv_ticker *ticker, uint64_t now_ns)
{
    struct nv_switch *sw = (struct nv_switch *)((char *)ticker - offsetof(struct nv_switch, ticker));

    nv_reactor_want_tick(sw->owner);
    if (sw->error || now_ns - sw->closed_ns < NV_GATE_PATIENCE_MS * 1000000ull)
        return;
    if (sw->phase == CLOSING) {
        cancel_all(sw);
    } else if (sw->phase == LEAVING) {
        nv_logged_leaves(sw->logged, NULL);
        open_all(sw, -ETIMEDOUT);
    } else if (sw->phase == PAUSING) {
        nv_reactor_drop_late(sw->owner, &sw->late);
        nv_mirror_resume_copies(sw->volume->mirror, sw->in ? &sw->volume->ranges : &sw->volume->below);
        open_all(sw, -ETIMEDOUT);
    }
}

static void close_all(struct nv_switch *sw)
{
    sw->closed_ns = nv_io_now_ns(sw->owner->io);
    sw->ticks = true;
    sw->ticker.tick = ticked;
    nv_reactor_add_ticker(sw->owner, &sw->ticker);
    nv_reactor_want_tick(sw->owner);
    tell(sw, CLOSING, closes);
}

static void leave(struct nv_switch *sw)
{
    sw->phase = LEAVING;
    nv_logged_leaves(sw->logged, sw);
}

/* Nothing of the volume is below any gate, nothing of the log under way, nor of the copies. */
static void swap(struct nv_switch *sw)
{
    struct nv_volume_local *local = local_of(sw, sw->owner);
    struct nv_mirror *mirror = sw->volume->mirror;
    const bool was_before = local->logged;

    if (!sw->in) {
        nv_logged_gone(sw->logged);
        sw->volume->owned = NULL;
    }
    set_log(local, sw->in ? sw->logged : NULL); /* others' requests may come before this gate is open */
    if (mirror && (sw->in || was_before)) {
        nv_mirror_under(mirror, local->logged);
        nv_mirror_resume_copies(mirror, sw->in ? &sw->volume->below : &sw->volume->ranges);
    }
    if (sw->in || was_before)
        open_all(sw, 0);
    else
        finish(sw);
}

static void copies_rest(struct nv_late *late)
{
    struct nv_switch *sw = (struct nv_switch *)((char *)late - offsetof(struct nv_switch, late));

    assert(sw->phase == PAUSING);
    swap(sw);
}

static void pause_copies(struct nv_switch *sw)
{
    const bool concerned = sw->volume->mirror && (sw->in || local_of(sw, sw->owner)->logged);

    sw->phase = PAUSING;
    sw->late.run = copies_rest;
    if (!concerned || nv_mirror_pause_copies(sw->volume->mirror, &sw->late))
        swap(sw);
}

void nv_switch_rests(struct nv_switch *sw)
{
    assert(sw->phase == LEAVING && !sw->in);
    nv_logged_leaves(sw->logged, NULL);
    pause_copies(sw);
}

static void closed(struct nv_switch *sw)
{
    const int error = sw->in ? nv_logged_may_enter(sw->logged) : nv_logged_may_leave(sw->logged);

    if (error)
        open_all(sw, error);
    else if (sw->in)
        pause_copies(sw);
    else
        leave(sw);
}

static void go_on(struct nv_switch *sw)
{
    if (sw->left > 0 || sw->cancels > 0)
        return;
    if (sw->phase == WIDENING)
        close_all(sw);
    else if (sw->phase == CLOSING && !sw->error)
        closed(sw);
    else
        finish(sw);
}

static void came_back(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch *sw = ((struct nv_switch_end *)message)->sw;

    assert(reactor == sw->owner && sw->left > 0);
    (void)reactor;
    sw->left--;
    go_on(sw);
}

static void cancel_came_back(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch_end *end = (struct nv_switch_end *)((char *)message - offsetof(struct nv_switch_end, cancel));

    assert(reactor == end->sw->owner && end->sw->cancels > 0);
    (void)reactor;
    end->sw->cancels--;
    go_on(end->sw);
}

static void begins(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_switch *sw = (struct nv_switch *)((char *)message - offsetof(struct nv_switch, begin));
    struct nv_volume_local *local = local_of(sw, reactor);

    reactor->jobs++;
    local->switching = true;
    sw->error = sw->in ? nv_logged_may_enter(sw->logged) : nv_logged_may_leave(sw->logged);
    if (sw->error)
        finish(sw);
    else if (sw->in)
        tell(sw, WIDENING, widens);
    else if (local->logged)
        close_all(sw);
    else
        leave(sw);
}

/* ---- the front ---- */

int nv_switch_begin(struct nv_volume *volume, bool in, uint64_t token)
{
    const uint32_t reactors = volume->plane->config.reactors;
    struct nv_switch *sw = calloc(1, sizeof *sw + reactors * sizeof sw->ends[0]);

    if (!sw)
        return nv_fail(ENOMEM, "no memory for a change of a write-back log");
    sw->volume = volume;
    sw->logged = volume->logged;
    sw->owner = nv_logged_owner(volume->logged);
    sw->in = in;
    for (uint32_t i = 0; i < reactors; i++)
        sw->ends[i].sw = sw;
    sw->done.event = (nv_event){.kind = in ? NV_EVENT_LOG_ATTACHED : NV_EVENT_LOG_DETACHED, .token = token,
                                .volume = volume->id};
    sw->done.subject = sw;
    volume->switching = true;
    volume->changes++;
    sw->begin.run = begins;
    nv_reactor_send(sw->owner, &sw->begin);
    return 0;
}

void nv_switch_over(struct nv_switch *sw, int result)
{
    struct nv_volume *volume = sw->volume;

    volume->switching = false;
    volume->changes--;
    if (result == 0)
        nv_logged_switched(sw->logged, sw->in);
    free(sw);
    nv_volume_forget(volume->plane, volume);
}
