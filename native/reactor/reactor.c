/*
 * The loop (see reactor.h). A turn runs completions, messages and parsing in a few rounds until nothing new comes, so
 * that replies to reads answered on the spot join one send; then it sends, tells the front, and enters the kernel once.
 * The lists of connections are intrusive; a connection stands at most once on each.
 */
#include "reactor/reactor.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>

#include "limits.h"
#include "nbd/session.h"
#include "reactor/plane.h"

static void publish(struct nv_reactor *reactor)
{
    uint64_t submissions, enters;

    nv_io_counts(reactor->io, &submissions, &enters);
    atomic_store_explicit(&reactor->counters.submissions, submissions, memory_order_relaxed);
    atomic_store_explicit(&reactor->counters.enters, enters, memory_order_relaxed);
    atomic_store_explicit(&reactor->counters.pinned, reactor->pins, memory_order_relaxed);
    atomic_store_explicit(&reactor->counters.pool_free_bytes, nv_pool_free_bytes(reactor->pool), memory_order_relaxed);
}

int nv_reactor_setup(struct nv_reactor *reactor, const struct nv_io_config *config, struct nv_io_features *features,
                     uint64_t pool_bytes)
{
    int error = nv_io_create(config, &reactor->io, features);

    if (error)
        return error;
    reactor->pool = nv_pool_create(pool_bytes);
    if (!reactor->pool) {
        nv_io_destroy(reactor->io);
        reactor->io = NULL;
        return -ENOMEM;
    }
    reactor->kicked_tail = &reactor->kicked;
    reactor->starving_tail = &reactor->starving;
    reactor->late_tail = &reactor->late;
    for (unsigned i = 0; i < 2; i++)
        reactor->postponed_tail[i] = &reactor->postponed[i];
    publish(reactor);
    return 0;
}

void nv_reactor_teardown(struct nv_reactor *reactor)
{
    assert(!reactor->connections && !reactor->jobs && !reactor->syncs && !reactor->mirrors && !reactor->late &&
           !reactor->tickers && !reactor->turners);
    nv_io_destroy(reactor->io);
    nv_pool_destroy(reactor->pool);
}

void nv_reactor_send(struct nv_reactor *reactor, struct nv_message *message)
{
    assert(message->run);
    nv_inbox_push(&reactor->inbox, message);
    nv_io_wake(reactor->io);
}

void nv_reactor_kick(struct nv_reactor *reactor, struct nv_conn *conn)
{
    if (conn->kicked)
        return;
    conn->kicked = true;
    conn->kick_next = NULL;
    *reactor->kicked_tail = conn;
    reactor->kicked_tail = &conn->kick_next;
}

void nv_reactor_postpone(struct nv_reactor *reactor, struct nv_conn *conn, bool served)
{
    if (conn->postponed)
        return;
    conn->postponed = true;
    conn->postpone_next = NULL;
    *reactor->postponed_tail[served] = conn;
    reactor->postponed_tail[served] = &conn->postpone_next;
}

/*
 * To the head of the kicked, in order: those that were not served first. A connection that was kicked meanwhile, by an answer
 * of its own that has gone, stands where the order puts it, or it would be the first in every turn.
 */
static void resume_postponed(struct nv_reactor *reactor)
{
    struct nv_conn **link = &reactor->kicked, *conn, *others;

    while ((conn = *link))
        if (conn->postponed)
            *link = conn->kick_next;
        else
            link = &conn->kick_next;
    others = reactor->kicked;
    reactor->kicked = NULL;
    reactor->kicked_tail = &reactor->kicked;
    for (unsigned i = 0; i < 2; i++) {
        for (conn = reactor->postponed[i]; conn; conn = conn->postpone_next) {
            conn->postponed = conn->kicked = false;
            nv_reactor_kick(reactor, conn);
        }
        reactor->postponed[i] = NULL;
        reactor->postponed_tail[i] = &reactor->postponed[i];
    }
    if (!others)
        return;
    *reactor->kicked_tail = others;
    reactor->kicked_tail = link;
}

void nv_reactor_send_later(struct nv_reactor *reactor, struct nv_conn *conn)
{
    if (conn->sending)
        return;
    conn->sending = true;
    conn->send_next = reactor->senders;
    reactor->senders = conn;
}

void nv_reactor_starve(struct nv_reactor *reactor, struct nv_conn *conn)
{
    if (conn->starving)
        return;
    conn->starving = true;
    conn->starve_next = NULL;
    *reactor->starving_tail = conn;
    reactor->starving_tail = &conn->starve_next;
}

void nv_reactor_unstarve(struct nv_reactor *reactor, struct nv_conn *conn)
{
    struct nv_conn **link = &reactor->starving;

    if (!conn->starving)
        return;
    conn->starving = false;
    while (*link != conn)
        link = &(*link)->starve_next;
    *link = conn->starve_next;
    if (!*link)
        reactor->starving_tail = link;
    reactor->pool_freed = true; /* the next in line may go now */
}

void nv_reactor_forget(struct nv_reactor *reactor, struct nv_conn *conn)
{
    struct nv_conn **link;

    nv_reactor_unstarve(reactor, conn);
    nv_reactor_ends_inside(reactor, conn, false);
    for (link = &reactor->kicked; conn->kicked && *link; link = &(*link)->kick_next)
        if (*link == conn) {
            *link = conn->kick_next;
            if (!*link)
                reactor->kicked_tail = link;
            break;
        }
    for (unsigned i = 0; i < 2; i++)
        for (link = &reactor->postponed[i]; conn->postponed && *link; link = &(*link)->postpone_next)
            if (*link == conn) {
                *link = conn->postpone_next;
                if (!*link)
                    reactor->postponed_tail[i] = link;
                conn->postponed = false;
                break;
            }
    for (link = &reactor->senders; conn->sending && *link; link = &(*link)->send_next)
        if (*link == conn) {
            *link = conn->send_next;
            break;
        }
    conn->kicked = conn->sending = false;
}

static unsigned run_inbox(struct nv_reactor *reactor)
{
    unsigned count = 0;

    for (struct nv_message *message = nv_inbox_take(&reactor->inbox), *next; message; message = next, count++) {
        next = message->next;
        message->run(reactor, message);
    }
    return count;
}

static unsigned run_kicked(struct nv_reactor *reactor)
{
    unsigned count = 0;

    while (reactor->kicked) {
        struct nv_conn *conn = reactor->kicked;
        reactor->kicked = conn->kick_next;
        if (!reactor->kicked)
            reactor->kicked_tail = &reactor->kicked;
        conn->kicked = false;
        nv_conn_turn(conn);
        count++;
    }
    return count;
}

/* Memory came back: the longest waiting first, and nobody overtakes it. */
static void feed_starving(struct nv_reactor *reactor)
{
    while (reactor->pool_freed && reactor->starving) {
        struct nv_conn *conn = reactor->starving;
        nv_conn_turn(conn);
        if (reactor->starving == conn)
            break;
    }
    reactor->pool_freed = false;
}

/* Each has one send; what wants another one has it in the next turn, so that a long queue holds up nobody else. */
static bool run_senders(struct nv_reactor *reactor)
{
    struct nv_conn *list = reactor->senders;
    const bool any = list;

    reactor->senders = NULL;
    for (struct nv_conn *conn = list, *next; conn; conn = next) {
        next = conn->send_next;
        conn->sending = false;
        nv_conn_transmit(conn);
    }
    return any;
}

void nv_reactor_late(struct nv_reactor *reactor, struct nv_late *late)
{
    if (late->queued)
        return;
    late->queued = true;
    late->next = NULL;
    *reactor->late_tail = late;
    reactor->late_tail = &late->next;
}

/* Where it stands in the list; NULL: elsewhere. */
static struct nv_late **find_late(struct nv_late **link, const struct nv_late *late)
{
    while (*link && *link != late)
        link = &(*link)->next;
    return *link ? link : NULL;
}

void nv_reactor_drop_late(struct nv_reactor *reactor, struct nv_late *late)
{
    struct nv_late **link;

    if (!late->queued)
        return;
    late->queued = false;
    link = find_late(&reactor->late_now, late); /* one that runs may drop one that has yet to */
    if (!link)
        link = find_late(&reactor->late, late);
    assert(link);
    *link = late->next;
    if (reactor->late_tail == &late->next)
        reactor->late_tail = link;
}

static void run_late(struct nv_reactor *reactor)
{
    struct nv_late *late;

    assert(!reactor->late_now);
    reactor->late_now = reactor->late;
    reactor->late = NULL;
    reactor->late_tail = &reactor->late;
    while ((late = reactor->late_now)) {
        reactor->late_now = late->next;
        late->queued = false;
        late->run(late);
    }
}

void nv_reactor_add_turner(struct nv_reactor *reactor, struct nv_turner *turner)
{
    turner->next = reactor->turners;
    turner->back = &reactor->turners;
    if (turner->next)
        turner->next->back = &turner->next;
    reactor->turners = turner;
}

void nv_reactor_drop_turner(struct nv_turner *turner)
{
    *turner->back = turner->next;
    if (turner->next)
        turner->next->back = turner->back;
}

static void run_turners(struct nv_reactor *reactor)
{
    for (struct nv_turner *turner = reactor->turners, *next; turner; turner = next) {
        next = turner->next;
        turner->run(turner);
    }
}

void nv_reactor_add_ticker(struct nv_reactor *reactor, struct nv_ticker *ticker)
{
    ticker->next = reactor->tickers;
    ticker->back = &reactor->tickers;
    if (ticker->next)
        ticker->next->back = &ticker->next;
    reactor->tickers = ticker;
}

void nv_reactor_drop_ticker(struct nv_ticker *ticker)
{
    *ticker->back = ticker->next;
    if (ticker->next)
        ticker->next->back = ticker->back;
}

static void ticked(struct nv_op *op)
{
    struct nv_reactor *reactor = (struct nv_reactor *)((char *)op - offsetof(struct nv_reactor, tick));
    const uint64_t now = nv_io_now_ns(reactor->io);

    reactor->tick_armed = false;
    reactor->tick_wanted = false;
    for (struct nv_conn *conn = reactor->connections, *next; conn; conn = next) {
        next = conn->next;
        nv_conn_tick(conn, now);
    }
    for (struct nv_ticker *ticker = reactor->tickers, *next; ticker; ticker = next) {
        next = ticker->next;
        ticker->tick(ticker, now);
    }
}

void nv_reactor_want_tick(struct nv_reactor *reactor)
{
    reactor->tick_wanted = true;
    if (reactor->tick_armed)
        return;
    reactor->tick_armed = true;
    reactor->tick = (struct nv_op){.kind = NV_OP_TIMER, .done = ticked, .length = NV_TICK_MS * 1000000ull};
    nv_io_submit(reactor->io, &reactor->tick);
}

/* What serves pieces may end only when no reactor can start one any more: the last to drain tells all. */
static void check_drained(struct nv_reactor *reactor)
{
    if (!reactor->stopping || reactor->drained || reactor->connections || reactor->jobs || reactor->syncs ||
        reactor->mirrors || reactor->turners || reactor->fetches)
        return;
    reactor->drained = true;
    nv_plane_drained(reactor->plane);
}

bool nv_reactor_turn(struct nv_reactor *reactor)
{
    bool any = false;

    reactor->turn++;
    if (reactor->postponed[0] || reactor->postponed[1]) {
        resume_postponed(reactor);
        any = run_kicked(reactor) > 0; /* before what has come meanwhile: they have waited longer */
    }
    for (unsigned round = 0; round < NV_TURN_ROUNDS; round++) {
        unsigned count = nv_io_run(reactor->io) + run_inbox(reactor) + run_kicked(reactor);
        feed_starving(reactor);
        if (count == 0)
            break;
        any = true;
    }
    if (any && reactor->turners)
        run_turners(reactor);
    run_late(reactor);
    any |= run_senders(reactor);
    check_drained(reactor);
    if (any)
        publish(reactor); /* before the events: who hears of an end sees its memory counted back */
    nv_events_flush(&reactor->events);
    if (reactor->ending && !reactor->connections && !reactor->tickers && reactor->tick_armed)
        nv_io_cancel(reactor->io, &reactor->tick); /* nobody has a deadline any more */
    nv_io_enter(reactor->io);
    return any;
}

bool nv_reactor_finished(const struct nv_reactor *reactor)
{
    return reactor->ending && !reactor->connections && !reactor->jobs && !reactor->syncs && !reactor->mirrors &&
           !reactor->tickers && !reactor->tick_armed && !reactor->kicked && !reactor->late &&
           !reactor->pace_timers && nv_inbox_empty((struct nv_inbox *)&reactor->inbox);
}

static bool idle(struct nv_reactor *reactor)
{
    return !nv_io_ready(reactor->io) && nv_inbox_empty(&reactor->inbox) && !reactor->kicked && !reactor->senders &&
           !reactor->late &&
           !reactor->postponed[0] && !reactor->postponed[1];
}

/* Only large payloads are under way: who sends them is at work, and being woken for the next part costs less than waiting. */
static bool bulk_alone(const struct nv_reactor *reactor)
{
    return reactor->bulks > 0 && reactor->turn - reactor->brisk_turn > NV_BRISK_TURNS;
}

/* Busy-wait while it has lately paid off: the length doubles when work came in time and halves when it did not. */
static bool spin(struct nv_reactor *reactor)
{
    const uint64_t start = nv_io_now_ns(reactor->io);

    while (reactor->spin_ns > 0 && nv_io_now_ns(reactor->io) - start < reactor->spin_ns) {
        for (unsigned i = 0; i < 16; i++) {
            if (!idle(reactor)) {
                reactor->spin_ns = reactor->spin_ns * 2 < reactor->spin_max_ns ? reactor->spin_ns * 2
                                                                              : reactor->spin_max_ns;
                return true;
            }
            __builtin_ia32_pause();
        }
    }
    reactor->spin_ns /= 2;
    return false;
}

/* Work came after a sleep of `slept_ns`. If a longer spin, still within the limit, would have met it: the next one will. */
static void spin_longer(struct nv_reactor *reactor, uint64_t slept_ns)
{
    const uint64_t waited = slept_ns + 2 * reactor->spin_ns; /* spin() has halved it */

    if (waited >= reactor->spin_max_ns)
        return;
    reactor->spin_ns = 2 * waited < reactor->spin_max_ns ? 2 * waited : reactor->spin_max_ns;
}

static void sleep_until_work(struct nv_reactor *reactor)
{
    nv_io_sleep_begin(reactor->io);
    if (idle(reactor)) {
        nv_count(&reactor->counters.sleeps, 1);
        nv_io_sleep(reactor->io, UINT64_MAX);
    }
    nv_io_sleep_end(reactor->io);
}

static void wait_for_work(struct nv_reactor *reactor)
{
    uint64_t start;

    if (bulk_alone(reactor)) {
        sleep_until_work(reactor);
    } else if (!spin(reactor)) {
        start = nv_io_now_ns(reactor->io);
        sleep_until_work(reactor);
        spin_longer(reactor, nv_io_now_ns(reactor->io) - start);
    }
}

void nv_reactor_loop(struct nv_reactor *reactor)
{
    while (!nv_reactor_finished(reactor)) {
        if (!nv_reactor_turn(reactor) && idle(reactor))
            wait_for_work(reactor);
    }
}
