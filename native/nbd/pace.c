/*
 * Connections of a volume with limits (see pace.h). A connection reserves a place for one request at a time, when its
 * header has been parsed and found good, and waits in its volume's list until the time it was told. So connections take
 * turns request by request, on one reactor and across reactors, however deep each one's queue is.
 *
 * One timer a volume and reactor. It is set for the first in the list, but at least a quantum ahead: at high rates some
 * requests then go together, late by less than a quantum, instead of one wake-up each. What is late is caught up with,
 * in the list's order: nobody passes one who waits.
 *
 * Invariants: a connection stands in the list exactly while `pacing`, with its current request in NV_RX_PACED; start
 * times in the list never decrease; while somebody waits, a timer is armed. A reservation is either used, or given back
 * when its connection ends or closes. What costs nothing: FLUSH (the writes that it makes durable have paid), DISC, and
 * every request that is refused.
 */
#include "nbd/pace.h"

#include <assert.h>
#include <stddef.h>

#include "nbd/wire.h"
#include "reactor/plane.h"

/* False: the request is free. */
static bool cost_of(const struct nv_qos *qos, const struct nv_request *request, struct nv_qos_cost *cost)
{
    uint64_t bytes = request->length < NV_PAYLOAD_MAX ? request->length : NV_PAYLOAD_MAX;

    if (request->type == NBD_CMD_FLUSH)
        return false;
    if (request->type == NBD_CMD_TRIM || request->type == NBD_CMD_BLOCK_STATUS)
        bytes = 0; /* they move none */
    *cost = nv_qos_cost(qos, bytes);
    return true;
}

static void fired(struct nv_op *op);

/* Somebody waits: be woken in time for the first. */
static void arm(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t now_ns)
{
    struct nv_pace *pace = &local->pace;
    const uint64_t soonest = now_ns + NV_QOS_QUANTUM_US * 1000ull;
    const uint64_t latest = now_ns + NV_QOS_TIMER_MAX_MS * 1000000ull;
    uint64_t due = pace->head->pace_start_ns > soonest ? pace->head->pace_start_ns : soonest;

    if (due > latest)
        due = latest;
    if (pace->resuming)
        return;
    if (pace->armed) {
        if (pace->due_ns > due) /* for one who left, or by other limits; the cancelled timer arms the next */
            nv_io_cancel(reactor->io, &pace->timer);
        return;
    }
    pace->armed = true;
    pace->due_ns = due;
    pace->timer = (struct nv_op){.kind = NV_OP_TIMER, .done = fired, .length = due - now_ns};
    reactor->pace_timers++;
    nv_io_submit(reactor->io, &pace->timer);
}

/* The list has changed: somebody is first, or nobody waits and nothing need wait for the timer. */
static void watch(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t now_ns)
{
    if (local->pace.head)
        arm(reactor, local, now_ns);
    else if (local->pace.armed)
        nv_io_cancel(reactor->io, &local->pace.timer);
}

/* Into the list, behind those of the same time. That is its end, but for a place that somebody gave back. */
static void insert(struct nv_conn *conn)
{
    struct nv_pace *pace = &conn->local->pace;
    struct nv_conn **link = &pace->head;

    assert(!conn->pacing);
    if (pace->head && pace->last->pace_start_ns <= conn->pace_start_ns)
        link = &pace->last->pace_next;
    else
        while (*link && (*link)->pace_start_ns <= conn->pace_start_ns)
            link = &(*link)->pace_next;
    conn->pace_next = *link;
    *link = conn;
    if (!conn->pace_next)
        pace->last = conn;
    conn->pacing = true;
}

static struct nv_conn *pop(struct nv_pace *pace)
{
    struct nv_conn *conn = pace->head;

    pace->head = conn->pace_next;
    conn->pacing = false;
    return conn;
}

/* Those whose time has come, one request each, until nobody's has: who has more to do stands behind the others. */
static void resume(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t now_ns)
{
    struct nv_pace *pace = &local->pace;

    pace->resuming = true;
    while (pace->head && pace->head->pace_start_ns <= now_ns) {
        struct nv_conn *conn = pop(pace);
        nv_count(&local->counters.delay_ns, now_ns - conn->pace_since_ns);
        nv_conn_parse(conn);
        nv_reactor_kick(reactor, conn); /* starts what was parsed, receives more */
    }
    pace->resuming = false;
    watch(reactor, local, now_ns);
}

static struct nv_reactor *reactor_of(const struct nv_volume_local *local)
{
    return nv_plane_reactor(local->volume->plane, (uint32_t)(local - local->volume->locals));
}

static void fired(struct nv_op *op)
{
    struct nv_volume_local *local =
        (struct nv_volume_local *)((char *)op - offsetof(struct nv_volume_local, pace.timer));
    struct nv_reactor *reactor = reactor_of(local);
    const uint64_t now_ns = nv_io_now_ns(reactor->io);

    assert(local->pace.armed && reactor->pace_timers > 0);
    local->pace.armed = false;
    reactor->pace_timers--;
    resume(reactor, local, now_ns);
    if (!local->pace.armed)
        nv_volume_local_left(reactor, local); /* a close may have waited for the timer */
}

bool nv_pace_admit(struct nv_conn *conn, struct nv_request *request)
{
    struct nv_volume_local *local = conn->local;
    struct nv_qos_cost cost;
    uint64_t now_ns, start_ns;

    if (!cost_of(local->qos, request, &cost))
        return true;
    now_ns = nv_io_now_ns(conn->reactor->io);
    start_ns = nv_qos_reserve(local->qos, now_ns, &cost);
    if (start_ns <= now_ns && (!local->pace.head || local->pace.head->pace_start_ns > now_ns))
        return true;
    conn->pace_cost = cost;
    conn->pace_start_ns = start_ns;
    conn->pace_since_ns = now_ns;
    insert(conn);
    arm(conn->reactor, local, now_ns);
    nv_count(&local->counters.delayed, 1);
    nv_reactor_want_tick(conn->reactor);
    return false;
}

void nv_pace_leave(struct nv_conn *conn)
{
    struct nv_conn **link, *before = NULL;
    struct nv_pace *pace;

    if (!conn->pacing)
        return;
    pace = &conn->local->pace;
    for (link = &pace->head; *link != conn; link = &before->pace_next)
        before = *link;
    *link = conn->pace_next;
    if (pace->last == conn)
        pace->last = before;
    conn->pacing = false;
    if (conn->local->qos)
        nv_qos_refund(conn->local->qos, &conn->pace_cost);
    if (!pace->head && pace->armed)
        nv_io_cancel(conn->reactor->io, &pace->timer);
}

bool nv_pace_tick(struct nv_conn *conn)
{
    nv_reactor_want_tick(conn->reactor);
    return nv_io_hung_up(conn->handle);
}

/* Other limits: who waits asks again, in the same order. */
static void weigh_again(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    const uint64_t now_ns = nv_io_now_ns(reactor->io);
    struct nv_conn *conn = local->pace.head, *next;

    local->pace.head = NULL;
    for (; conn; conn = next) {
        next = conn->pace_next;
        conn->pacing = false;
        conn->pace_start_ns = now_ns;
        if (local->qos && cost_of(local->qos, conn->current, &conn->pace_cost))
            conn->pace_start_ns = nv_qos_reserve(local->qos, now_ns, &conn->pace_cost);
        insert(conn);
    }
    resume(reactor, local, now_ns);
}

void nv_pace_changes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_qos_change *change = ((struct nv_qos_message *)message)->change;
    struct nv_volume_local *local = &change->volume->locals[reactor->index];

    assert(local->qos == change->from);
    local->qos = change->to;
    local->share.weight = change->shares;
    weigh_again(reactor, local);
    if (atomic_fetch_sub(&change->left, 1) == 1)
        nv_events_raise(&reactor->events, &change->changed);
}
