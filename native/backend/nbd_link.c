/*
 * The life of one connection to a remote export (nbd.h): it opens (through TLS, it is haggled first), serves, and leaves
 * (DISC, then the server closes), unless it is lost (nbd_end.c).
 *
 * The clock is looked at by ticks. A link is given up when requests wait on it and nothing was heard for the remote's
 * time-out: not when one of them is as old as that, since a slow server has others before it. A FLUSH has a longer limit,
 * because caches may be large, and so has a request that is passed over by others.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
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
    link->late.run = nv_link_settles;
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
    ask->answered = ask->abandoned = ask->described = ask->full = false;
    ask->error = 0;
    ask->got = 0;
    ask->extents = ask->span_count = 0;
    if (link->in_flight++ == 0)
        link->heard = link->ticks;
    nv_reactor_want_tick(link->reactor);
    return ask;
}

void nv_ask_free(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;

    assert(ask->state != NV_ASK_FREE && link->in_flight > 0);
    if (ask->command == NBD_CMD_READ || ask->command == NBD_CMD_WRITE)
        link->bytes -= ask->length;
    link->flushes -= ask->command == NBD_CMD_FLUSH;
    ask->state = NV_ASK_FREE;
    ask->next = link->free_asks;
    link->free_asks = ask;
    if (--link->in_flight == 0)
        link->alone = false;
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
    if (link->tls)
        nv_link_parse_secure(link); /* what came behind the last option, and would wait for ever */
    nv_link_transmit(link);
    nv_link_arm_receive(link);
}

/* ---- leaving ---- */

void nv_link_leave(struct nv_link *link)
{
    if (link->state >= NV_LINK_LEAVING)
        return;
    if (link->state == NV_LINK_HAGGLING || (link->remote->ending && link->in_flight > 0)) { /* a probe that nobody wants */
        nv_link_lose(link, -ESHUTDOWN, "nobody uses the export any more");
        return;
    }
    link->parting = true;
    nv_link_settle(link);
}

/* Nothing is in flight. Nobody could vouch for what is owed once the last link of the set is gone: FLUSH first. */
void nv_link_says_bye(struct nv_link *link)
{
    struct nv_ask *ask;

    assert(link->in_flight == 0 && link->parting && link->state < NV_LINK_LEAVING);
    if (nv_remote_flush_last(link))
        return;
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

static void give_up(struct nv_link *link, const struct nv_ask *ask, uint32_t ticks)
{
    nv_link_lose(link, -ETIMEDOUT, "no answer to %s of %" PRIu64 " bytes at %" PRIu64 " for %u ms",
                 command_name(ask->command), ask->length, ask->offset, ticks * NV_TICK_MS);
}

static void check_deadlines(struct nv_link *link)
{
    const uint32_t limit = link->remote->timeout_ticks * (link->flushes > 0 ? NV_LINK_FLUSH_PATIENCE : 1);
    const struct nv_ask *oldest = NULL;

    for (uint32_t i = 0; i < link->asks_touched; i++) {
        const struct nv_ask *ask = &link->asks[i];
        if (ask->state != NV_ASK_FREE && ask->piece && (!oldest || (int32_t)(ask->serial - oldest->serial) < 0))
            oldest = ask;
    }
    if (oldest && link->ticks - link->heard > limit)
        give_up(link, oldest, limit);
    else if (oldest && link->ticks - oldest->tick > limit * NV_LINK_OLDEST)
        give_up(link, oldest, limit * NV_LINK_OLDEST);
}

/* What had a deadline has passed it. */
static void too_late(struct nv_link *link)
{
    const bool leaving = link->state == NV_LINK_LEAVING;

    if (link->state == NV_LINK_LOST)
        nv_link_hang_up(link);
    else if (link->state == NV_LINK_DRAINING)
        nv_link_expire(link);
    else
        nv_link_lose(link, leaving ? 0 : -ETIMEDOUT, "%s", leaving ? "closed" : "the handshake takes too long");
}

static void tick(struct nv_ticker *ticker, uint64_t now_ns)
{
    struct nv_link *link = (struct nv_link *)((char *)ticker - offsetof(struct nv_link, ticker));

    link->ticks++;
    if (link->in_flight > 0 || link->deadline_ns)
        nv_reactor_want_tick(link->reactor);
    if (link->deadline_ns && now_ns >= link->deadline_ns) {
        link->deadline_ns = 0;
        too_late(link);
        return;
    }
    if (link->state == NV_LINK_SERVING)
        check_deadlines(link);
    else if (link->state == NV_LINK_DRAINING)
        nv_link_settle(link); /* what could not be cancelled before */
}
