/*
 * How a connection to a remote export ends (nbd.h). Who loses it says how sure we are that it is over: the server has
 * ended it, and then its requests are given back and sent elsewhere; or we gave it up, and then changes on it may still be
 * carried out. Such a link drains: it takes nothing new, what is no change is given back at once, and each change waits
 * until the server has answered it (by whatever) or has ended the connection, at most for the remote's `hold`. A link that
 * cannot be understood any more is told that nothing follows, and only its end counts.
 *
 * The front hears of a lost link at once, to connect anew; a link that drains goes on without it.
 *
 * Invariants: a lost link gives its requests back when the port holds nothing of it any more; nothing waits on a link that
 * has ended; whoever loses a link finds it as it was: all else happens late in the turn.
 */
#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include "backend/nbd.h"
#include "reactor/reactor.h"

/* ---- what is on it ---- */

/* The server may have it, or a part of it, and has said nothing about it. */
static bool doubtful(const struct nv_ask *ask)
{
    return ask->piece && nv_ask_changes(ask) && !ask->answered &&
           (ask->state == NV_ASK_SENDING || ask->state == NV_ASK_SENT);
}

static bool in_doubt(const struct nv_link *link)
{
    for (uint32_t i = 0; i < link->asks_touched; i++)
        if (doubtful(&link->asks[i]))
            return true;
    return false;
}

/* The newest request that `wanted` says yes to, or NULL: given back in this order, they keep the old one. */
static struct nv_ask *newest(struct nv_link *link, bool (*wanted)(const struct nv_ask *ask))
{
    struct nv_ask *found = NULL;

    for (uint32_t i = 0; i < link->asks_touched; i++) {
        struct nv_ask *ask = &link->asks[i];
        if (ask->state != NV_ASK_FREE && wanted(ask) && (!found || (int32_t)(ask->serial - found->serial) > 0))
            found = ask;
    }
    return found;
}

static bool any(const struct nv_ask *ask)
{
    return ask->state != NV_ASK_FREE;
}

static bool unbegun(const struct nv_ask *ask)
{
    return ask->state == NV_ASK_QUEUED;
}

/* ---- the end ---- */

static void announce(struct nv_link *link)
{
    link->announced = true;
    link->ended.event.kind = NV_EVENT_LINK_LOST;
    link->ended.event.result = link->end_reason;
    link->ended.event.args[0] = link->remote->object.id;
    link->ended.event.args[1] = link->id;
    link->ended.subject = link;
    nv_events_raise(&link->reactor->events, &link->ended);
}

static void end(struct nv_link *link)
{
    struct nv_remote *remote = link->remote;

    assert(link->state == NV_LINK_LOST && link->in_flight == 0 && !link->tx_queue && !link->tx_sending);
    link->state = NV_LINK_ENDED;
    *link->back = link->next;
    if (link->next)
        link->next->back = link->back;
    nv_reactor_drop_ticker(&link->ticker);
    nv_io_close(link->handle);
    if (link->forgotten)
        nv_link_free(link);
    else if (!link->announced)
        announce(link); /* the front may forget it from here on */
    nv_remote_link_ended(remote);
}

void nv_link_forgets(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_link *link = (struct nv_link *)((char *)message - offsetof(struct nv_link, message));

    (void)reactor;
    link->forgotten = true;
    if (link->state == NV_LINK_ENDED)
        nv_link_free(link);
}

/* Lost, and the port holds nothing of it any more. */
static void give_back(struct nv_link *link)
{
    struct nv_ask *ask;

    while ((ask = newest(link, unbegun)))
        nv_remote_again(ask);
    nv_link_tx_release(link);
    while ((ask = newest(link, any))) {
        if (!ask->piece)
            nv_ask_free(ask);
        else if (link->expired && doubtful(ask))
            nv_remote_doubt(ask);
        else /* answered or not: nobody was told, and the server that answered may be gone */
            nv_remote_again(ask);
    }
}

void nv_link_hang_up(struct nv_link *link)
{
    nv_io_shutdown(link->handle);
}

/* `expired`: without knowing what became of its changes. */
static void cut(struct nv_link *link, bool expired)
{
    const bool speaking = link->state == NV_LINK_HAGGLING && link->tx_pending; /* TLS says why */

    nv_remote_link_goes(link, NV_LINK_LOST);
    link->expired = expired;
    if (link->in_flight > 0 && link->end_reason < 0 && link->end_reason != -ECONNRESET)
        nv_io_reset_on_close(link->handle); /* what has not left never shall */
    if (speaking) {
        link->deadline_ns = nv_io_now_ns(link->reactor->io) + NV_LINK_BYE_MS * 1000000ull;
        nv_reactor_want_tick(link->reactor);
    } else {
        nv_link_hang_up(link);
    }
    nv_link_settle(link);
}

/* ---- draining ---- */

/* What it says cannot be understood. It hears that nothing follows; what it has it may still do. */
static void deafen(struct nv_link *link)
{
    link->deaf = link->mute = true;
    link->rx_start = link->rx_end = 0;
    link->cipher_start = link->cipher_end = 0;
    link->rx_state = NV_ANSWER_HEADER;
    link->rx_ask = NULL;
    nv_io_shutdown_send(link->handle);
}

/* What a lost link is still good for: to hear by, unless it spoke nonsense; to speak by, if it was only too slow. */
static void weaken(struct nv_link *link, int error)
{
    if (error == -ETIMEDOUT)
        return;
    if (error == -EPIPE)
        link->mute = true;
    else if (!link->deaf)
        deafen(link);
}

static void drain(struct nv_link *link, int error)
{
    nv_remote_link_goes(link, NV_LINK_DRAINING);
    link->deadline_ns = nv_io_now_ns(link->reactor->io) + link->remote->hold_ns;
    nv_reactor_want_tick(link->reactor);
    weaken(link, error);
    announce(link);
    nv_link_settle(link);
}

static bool movable(const struct nv_ask *ask)
{
    return ask->piece && !doubtful(ask) && !(ask->answered && ask->state == NV_ASK_SENDING);
}

/* Its piece goes elsewhere; its place stays for the answer, which may be coming in. */
static void abandon(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;

    nv_remote_takes_back(ask);
    ask->piece = NULL;
    ask->abandoned = true;
    if (link->rx_ask == ask && link->rx_state == NV_ANSWER_DATA)
        link->rx_to = NULL;
}

/* Give back what need not wait. False: the port still receives into a piece's memory. */
static bool sort(struct nv_link *link)
{
    struct nv_ask *ask;

    if (link->rx_pending && nv_link_receives_in_place(link)) {
        nv_io_cancel(link->reactor->io, &link->rx_op);
        return false;
    }
    while ((ask = newest(link, unbegun)))
        nv_remote_again(ask);
    link->tx_queue = NULL;
    link->tx_tail = &link->tx_queue;
    while ((ask = newest(link, movable)))
        abandon(ask);
    link->sorted = true;
    return true;
}

void nv_link_expire(struct nv_link *link)
{
    if (link->state == NV_LINK_DRAINING)
        cut(link, true);
}

/* ---- losing ---- */

void nv_link_lose(struct nv_link *link, int error, const char *format, ...)
{
    const bool over = error == 0 || error == -ECONNRESET;
    va_list arguments;

    assert(error <= 0);
    if (link->state >= NV_LINK_LOST)
        return;
    if (link->state == NV_LINK_DRAINING) {
        if (over)
            cut(link, false);
        else
            weaken(link, error);
        return;
    }
    va_start(arguments, format);
    vsnprintf(link->reason, sizeof link->reason, format, arguments);
    va_end(arguments);
    link->end_reason = error;
    if (over || !in_doubt(link))
        cut(link, false);
    else if (link->remote->stopping)
        cut(link, true);
    else
        drain(link, error);
}

static void settle_draining(struct nv_link *link)
{
    if ((link->sorted || sort(link)) && !in_doubt(link))
        cut(link, false);
}

/* Late in a turn: whoever lost it has returned, and looks at it no more. */
void nv_link_settles(struct nv_late *late)
{
    struct nv_link *link = (struct nv_link *)((char *)late - offsetof(struct nv_link, late));

    if (link->state < NV_LINK_LEAVING && link->in_flight == 0) {
        if (link->retiring)
            nv_link_lose(link, -ESHUTDOWN, "the server shuts down");
        else if (link->parting)
            nv_link_says_bye(link);
    }
    if (link->state == NV_LINK_DRAINING)
        settle_draining(link);
    if (link->state != NV_LINK_LOST || link->rx_pending || link->tx_pending || link->late.queued)
        return;
    give_back(link);
    end(link);
}

void nv_link_settle(struct nv_link *link)
{
    if (link->state == NV_LINK_LOST || link->state == NV_LINK_DRAINING || link->retiring || link->parting)
        nv_reactor_late(link->reactor, &link->late);
}
