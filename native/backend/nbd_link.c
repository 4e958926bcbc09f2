/*
 * The life of one connection to a remote export (nbd.h): it opens (through TLS, it is haggled first), serves, and ends by
 * leaving (DISC, then the server closes) or by being lost. Once lost, no byte of it means anything; it waits for its
 * operations at the port, gives its requests back to the remote, and is the front's.
 *
 * Deadlines are looked at by ticks: a request that has no answer for the remote's time-out loses its link.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "backend/nbd.h"
#include "nbd/tls.h"

#define ROUND(bytes) (((bytes) + NV_POOL_PAGE - 1) / NV_POOL_PAGE * NV_POOL_PAGE)
#define LINK_BYTES ROUND(sizeof(struct nv_link))
#define ASKS_BYTES ROUND(NV_LINK_ASKS * sizeof(struct nv_ask))
#define ARENA_BYTES (LINK_BYTES + ASKS_BYTES + NV_LINK_RX + NV_TLS_RECEIVE)

static void tick(struct nv_ticker *ticker, uint64_t now_ns);
static void settle(struct nv_late *late);

struct nv_link *nv_link_create(struct nv_remote *remote, nv_handle handle)
{
    uint8_t *arena = nv_pages_map(ARENA_BYTES);
    struct nv_link *link = (struct nv_link *)arena;

    if (!arena)
        return NULL;
    link->remote = remote;
    link->reactor = remote->home;
    link->handle = handle;
    link->asks = (struct nv_ask *)(arena + LINK_BYTES);
    link->rx = arena + LINK_BYTES + ASKS_BYTES;
    link->cipher = link->rx + NV_LINK_RX;
    link->rx_window = NV_LINK_RX;
    link->tx_tail = &link->tx_queue;
    link->ticker.tick = tick;
    link->late.run = settle;
    return link;
}

void nv_link_free(struct nv_link *link)
{
    nv_tls_free(link->tls);
    nv_talk_free(link->talk);
    nv_pages_unmap(link, ARENA_BYTES);
}

/* ---- requests' places ---- */

struct nv_ask *nv_ask_take(struct nv_link *link, struct nv_piece *piece)
{
    struct nv_ask *ask = link->free_asks;

    if (ask)
        link->free_asks = ask->next;
    else
        ask = &link->asks[link->asks_touched++];
    assert(link->asks_touched <= NV_LINK_ASKS && ask->state == NV_ASK_FREE);
    ask->state = NV_ASK_QUEUED;
    ask->link = link;
    ask->piece = piece;
    ask->serial = ++link->serials;
    ask->tick = link->ticks;
    ask->answered = ask->described = ask->full = false;
    ask->error = 0;
    ask->got = 0;
    ask->extents = ask->span_count = 0;
    link->in_flight++;
    nv_reactor_want_tick(link->reactor);
    return ask;
}

void nv_ask_free(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;

    assert(ask->state != NV_ASK_FREE && link->in_flight > 0);
    if (ask->command == NBD_CMD_READ || ask->command == NBD_CMD_WRITE)
        link->bytes -= ask->length;
    ask->state = NV_ASK_FREE;
    ask->next = link->free_asks;
    link->free_asks = ask;
    link->in_flight--;
}

/* ---- beginning ---- */

void nv_link_opens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_link *link = (struct nv_link *)((char *)message - offsetof(struct nv_link, message));
    struct nv_remote *remote = link->remote;

    assert(link->reactor == reactor);
    link->next = remote->links;
    link->back = &remote->links;
    if (link->next)
        link->next->back = &link->next;
    remote->links = link;
    nv_reactor_add_ticker(reactor, &link->ticker);
    nv_reactor_want_tick(reactor);
    if (remote->ending) {
        link->state = NV_LINK_HAGGLING;
        nv_link_lose(link, -ESHUTDOWN, "nobody uses the export any more");
        return;
    }
    if (link->talk) {
        link->state = NV_LINK_HAGGLING;
        link->deadline_ns = nv_io_now_ns(reactor->io) + link->haggle_ms * 1000000ull;
        nv_link_haggle(link);
        nv_link_arm_receive(link);
    } else {
        nv_link_enters(link);
    }
}

void nv_link_enters(struct nv_link *link)
{
    link->deadline_ns = 0;
    nv_remote_link_came(link);
    nv_link_transmit(link);
    nv_link_arm_receive(link);
}

/* ---- end ---- */

static void end(struct nv_link *link)
{
    assert(link->state == NV_LINK_LOST && link->in_flight == 0 && !link->tx_queue && !link->tx_sending);
    link->state = NV_LINK_ENDED;
    *link->back = link->next;
    if (link->next)
        link->next->back = link->back;
    nv_reactor_drop_ticker(&link->ticker);
    nv_io_close(link->handle);
    link->ended.event.kind = NV_EVENT_LINK_LOST;
    link->ended.event.result = link->end_reason;
    link->ended.event.args[0] = link->remote->object.id;
    link->ended.event.args[1] = link->id;
    link->ended.subject = link;
    nv_events_raise(&link->reactor->events, &link->ended); /* the front may free it from here on */
}

/*
 * Lost, and the port holds nothing of it any more: what has no answer goes to another link, in the old order. So does
 * what was done, if its owner has not heard of it yet: the server that did it may be gone, and another set have begun.
 */
static void give_back(struct nv_link *link)
{
    struct nv_ask *newest = NULL;

    nv_link_tx_release(link);
    do {
        newest = NULL;
        for (uint32_t i = 0; i < link->asks_touched; i++) {
            struct nv_ask *ask = &link->asks[i];
            if (ask->state != NV_ASK_FREE && (!newest || (int32_t)(ask->serial - newest->serial) > 0))
                newest = ask;
        }
        if (newest && newest->piece && newest->answered && newest->error)
            nv_remote_concluded(newest);
        else if (newest && newest->piece)
            nv_remote_again(newest);
        else if (newest)
            nv_ask_free(newest);
    } while (newest);
}

/* Late in a turn: whoever lost it has returned, and looks at it no more. */
static void settle(struct nv_late *late)
{
    struct nv_link *link = (struct nv_link *)((char *)late - offsetof(struct nv_link, late));

    if (link->retiring && link->in_flight == 0)
        nv_link_lose(link, -ESHUTDOWN, "the server shuts down");
    if (link->state != NV_LINK_LOST || link->rx_pending || link->tx_pending || link->late.queued)
        return;
    give_back(link);
    end(link);
}

void nv_link_settle(struct nv_link *link)
{
    if (link->state == NV_LINK_LOST || link->retiring)
        nv_reactor_late(link->reactor, &link->late);
}

void nv_link_lose(struct nv_link *link, int error, const char *format, ...)
{
    va_list arguments;

    assert(error <= 0);
    if (link->state >= NV_LINK_LOST)
        return;
    va_start(arguments, format);
    vsnprintf(link->reason, sizeof link->reason, format, arguments);
    va_end(arguments);
    link->end_reason = error;
    nv_remote_link_goes(link, NV_LINK_LOST);
    nv_io_shutdown(link->handle);
    nv_link_settle(link);
}

void nv_link_leave(struct nv_link *link)
{
    struct nv_ask *ask;

    if (link->state >= NV_LINK_LEAVING)
        return;
    if (link->state == NV_LINK_HAGGLING || link->in_flight > 0) { /* in flight: the plane is being torn down around it */
        nv_link_lose(link, -ESHUTDOWN, "nobody uses the export any more");
        return;
    }
    nv_remote_link_goes(link, NV_LINK_LEAVING);
    ask = nv_ask_take(link, NULL);
    ask->command = NBD_CMD_DISC;
    ask->flags = 0;
    ask->offset = ask->length = 0;
    nv_link_queue(ask);
    nv_link_transmit(link);
    link->deadline_ns = nv_io_now_ns(link->reactor->io) + NV_LINK_BYE_MS * 1000000ull;
    nv_reactor_want_tick(link->reactor);
}

void nv_link_closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_link *link = (struct nv_link *)((char *)message - offsetof(struct nv_link, close_message));

    assert(link->reactor == reactor);
    (void)reactor;
    nv_link_leave(link);
}

/* ---- the clock ---- */

static const char *command_name(uint16_t command)
{
    static const char *const names[] = {"READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES",
                                        "BLOCK_STATUS"};

    return command < sizeof names / sizeof names[0] ? names[command] : "a request";
}

static void check_deadlines(struct nv_link *link)
{
    const uint32_t limit = link->remote->timeout_ticks;

    for (uint32_t i = 0; i < link->asks_touched; i++) {
        const struct nv_ask *ask = &link->asks[i];
        if (ask->state == NV_ASK_FREE || !ask->piece || link->ticks - ask->tick <= limit)
            continue;
        nv_link_lose(link, -ETIMEDOUT, "no answer to %s of %" PRIu64 " bytes at %" PRIu64 " for %u ms",
                     command_name(ask->command), ask->length, ask->offset, limit * NV_TICK_MS);
        return;
    }
}

static void tick(struct nv_ticker *ticker, uint64_t now_ns)
{
    struct nv_link *link = (struct nv_link *)((char *)ticker - offsetof(struct nv_link, ticker));

    link->ticks++;
    if (link->in_flight > 0 || link->deadline_ns)
        nv_reactor_want_tick(link->reactor);
    if (link->deadline_ns && now_ns >= link->deadline_ns) {
        const bool leaving = link->state == NV_LINK_LEAVING;
        link->deadline_ns = 0;
        nv_link_lose(link, leaving ? 0 : -ETIMEDOUT, "%s", leaving ? "closed" : "the handshake takes too long");
        return;
    }
    if (link->state < NV_LINK_LOST)
        check_deadlines(link);
}
