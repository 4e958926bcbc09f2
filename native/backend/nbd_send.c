/*
 * Requests to bytes. Everything queued on a link leaves in one gathered send, headers from the requests' own slots and
 * payload from the pieces' own memory. At most one send of a link is under way; its memory belongs to the port until it
 * ends, so a request that is answered before that is concluded only then.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>

#include "backend/nbd.h"
#include "reactor/pool.h"

static void sent(struct nv_op *op);

static void encode(struct nv_ask *ask, uint16_t flags)
{
    const bool extended = nv_link_extended(ask->link);
    uint8_t *to = put32(ask->header, extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);

    to = put16(to, flags);
    to = put16(to, ask->command);
    to = put64(to, (uint64_t)ask->serial << 32 | (uint64_t)(ask - ask->link->asks));
    to = put64(to, ask->offset);
    if (extended)
        put64(to, ask->length);
    else
        put32(to, (uint32_t)ask->length);
}

void nv_link_queue(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;
    const bool carries = ask->command == NBD_CMD_WRITE && nv_link_extended(link);

    assert(ask->state == NV_ASK_QUEUED && (nv_link_extended(link) || ask->length <= UINT32_MAX));
    encode(ask, (uint16_t)(ask->flags | (carries ? NBD_CMD_FLAG_PAYLOAD_LEN : 0)));
    ask->next = NULL;
    *link->tx_tail = ask;
    link->tx_tail = &ask->next;
}

/* The request's pieces of memory: a header, and a payload where there is one. */
static unsigned build(const struct nv_ask *ask, struct iovec *iov)
{
    const struct nv_piece *piece = ask->piece;

    iov[0] = (struct iovec){(void *)(uintptr_t)ask->header,
                            nv_link_extended(ask->link) ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES};
    if (ask->command != NBD_CMD_WRITE)
        return 1;
    if (piece->kind == NV_PIECE_WRITE)
        iov[1] = (struct iovec){piece->data + piece->moved, ask->length};
    else
        iov[1] = (struct iovec){(void *)(uintptr_t)nv_zero_pages(), ask->length};
    return 2;
}

bool nv_link_gather(struct nv_link *link)
{
    struct nv_ask **tail = &link->tx_sending;
    uint64_t bytes = 0;

    if (link->tx_sending)
        return true;
    link->tx_first = link->tx_count = 0;
    while (link->tx_queue && link->state < NV_LINK_DRAINING && bytes < NV_LINK_TX_BYTES && link->tx_count + 2 <= NV_LINK_TX_IOV) {
        struct nv_ask *ask = link->tx_queue;
        unsigned count = build(ask, &link->tx_iov[link->tx_count]);
        for (unsigned i = 0; i < count; i++)
            bytes += link->tx_iov[link->tx_count + i].iov_len;
        link->tx_count += count;
        link->tx_queue = ask->next;
        ask->next = NULL;
        ask->state = NV_ASK_SENDING;
        *tail = ask;
        tail = &ask->next;
    }
    if (!link->tx_queue)
        link->tx_tail = &link->tx_queue;
    return link->tx_sending;
}

void nv_link_submit_send(struct nv_link *link, struct iovec *iov, unsigned count)
{
    assert(!link->tx_pending && count > 0 && count <= NV_LINK_TX_IOV);
    link->tx_op.kind = NV_OP_SEND;
    link->tx_op.flags = 0;
    link->tx_op.handle = link->handle;
    link->tx_op.iov = iov;
    link->tx_op.iov_count = (uint16_t)count;
    link->tx_op.done = sent;
    link->tx_pending = true;
    link->tx_tick = link->ticks;
    nv_io_submit(link->reactor->io, &link->tx_op);
}

void nv_link_transmit(struct nv_link *link)
{
    if (link->tx_pending || link->mute || link->state >= NV_LINK_LOST)
        return;
    if (link->tls)
        nv_link_transmit_secure(link);
    else if (nv_link_gather(link))
        nv_link_submit_send(link, &link->tx_iov[link->tx_first], link->tx_count - link->tx_first);
}

/* The port has no more use for the first request that was being sent. */
static void release_first(struct nv_link *link)
{
    struct nv_ask *ask = link->tx_sending;

    link->tx_sending = ask->next;
    ask->state = NV_ASK_SENT;
    if (!ask->piece && !ask->abandoned)
        nv_ask_free(ask); /* DISC has no answer */
    else if (ask->answered && link->state < NV_LINK_LOST)
        nv_remote_concluded(ask);
}

void nv_link_advance(struct nv_link *link, uint64_t bytes)
{
    while (link->tx_first < link->tx_count && bytes >= link->tx_iov[link->tx_first].iov_len) {
        const struct iovec *next = &link->tx_iov[link->tx_first + 1];
        bytes -= link->tx_iov[link->tx_first++].iov_len;
        if (link->tx_first == link->tx_count || (link->tx_sending->next && next->iov_base == link->tx_sending->next->header))
            release_first(link);
    }
    if (link->tx_first == link->tx_count) {
        assert(bytes == 0 && !link->tx_sending);
        return;
    }
    link->tx_iov[link->tx_first].iov_base = (uint8_t *)link->tx_iov[link->tx_first].iov_base + bytes;
    link->tx_iov[link->tx_first].iov_len -= bytes;
}

void nv_link_tx_release(struct nv_link *link)
{
    assert(!link->tx_pending && link->state == NV_LINK_LOST);
    link->tx_queue = NULL;
    link->tx_tail = &link->tx_queue;
    for (struct nv_ask *ask = link->tx_sending; ask; ask = ask->next)
        ask->state = NV_ASK_SENT;
    link->tx_sending = NULL;
}

static void sent(struct nv_op *op)
{
    struct nv_link *link = (struct nv_link *)((char *)op - offsetof(struct nv_link, tx_op));

    link->tx_pending = false;
    if (link->state < NV_LINK_LOST) {
        if (op->result <= 0)
            nv_link_lose(link, op->result < 0 ? (int)op->result : -EPIPE, "the server takes no more requests");
        else if (link->tls)
            nv_link_sent_secure(link, op->result);
        else
            nv_link_advance(link, (uint64_t)op->result);
        if (link->tx_tick != link->ticks) /* it had waited for room: the server takes things in */
            link->heard = link->ticks;
    } else {
        nv_link_hang_up(link);
    }
    nv_link_transmit(link);
    nv_remote_wants_turn(link->remote);
    nv_link_settle(link);
}
