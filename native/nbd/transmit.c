/*
 * Replies to the socket. At most one send of a connection is in flight; everything that completes meanwhile is gathered
 * into the next one. A request, with its buffer, belongs to the send until the kernel has taken its last byte.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>

#include "nbd/haggle.h"
#include "nbd/session.h"
#include "nbd/trace.h"

static void sent(struct nv_op *op);

void nv_conn_stage(struct nv_request *request)
{
    struct nv_conn *conn = request->conn;

    if (conn->tx_dead) {
        nv_request_release(request);
        return;
    }
    nv_trace_completed(request);
    request->next = NULL;
    *conn->tx_queue_tail = request;
    conn->tx_queue_tail = &request->next;
    nv_reactor_send_later(conn->reactor, conn);
}

bool nv_conn_transmit_idle(struct nv_conn *conn)
{
    if (conn->tx_pending || conn->tx_queue)
        return false;
    return !conn->tls || nv_secure_finished(conn);
}

void nv_conn_reply_gone(struct nv_request *request)
{
    if (request->memory == NV_MEMORY_VIEW) {
        nv_volume_served(&request->v);
        request->memory = NV_MEMORY_NONE;
    }
    nv_request_release(request);
}

static void release_list(struct nv_request *list)
{
    for (struct nv_request *request = list, *next; request; request = next) {
        next = request->next;
        nv_request_release(request);
    }
}

static void release_sending(struct nv_conn *conn)
{
    struct nv_request *list = conn->tx_sending;

    conn->tx_sending = NULL;
    release_list(list);
}

void nv_conn_drop_replies(struct nv_conn *conn)
{
    struct nv_request *list = conn->tx_queue;

    conn->tx_queue = NULL;
    conn->tx_queue_tail = &conn->tx_queue;
    release_list(list);
    if (!conn->tx_pending) /* else the kernel still reads their buffers */
        release_sending(conn);
}

/* Move replies from the queue into tx_iov and tx_sending, up to the limits of one send. */
static void gather(struct nv_conn *conn)
{
    struct nv_request **tail = &conn->tx_sending;
    uint64_t bytes = 0;

    assert(!conn->tx_sending);
    conn->tx_first = conn->tx_count = 0;
    conn->tx_views = false;
    while (conn->tx_queue && bytes < NV_TX_BYTES &&
           conn->tx_count + nv_reply_pieces(conn->tx_queue) <= NV_TX_IOV) {
        struct nv_request *request = conn->tx_queue;
        unsigned pieces = nv_reply_build(request, &conn->tx_iov[conn->tx_count]);
        assert(pieces > 0 && pieces <= nv_reply_pieces(request));
        for (unsigned i = 0; i < pieces; i++)
            bytes += conn->tx_iov[conn->tx_count + i].iov_len;
        request->pieces = (uint8_t)pieces;
        conn->tx_views |= request->memory == NV_MEMORY_VIEW;
        conn->tx_count += pieces;
        conn->tx_queue = request->next;
        request->next = NULL;
        *tail = request;
        tail = &request->next;
    }
    if (!conn->tx_queue)
        conn->tx_queue_tail = &conn->tx_queue;
}

bool nv_conn_gather(struct nv_conn *conn)
{
    if (!conn->tx_sending && conn->tx_queue) {
        if (conn->local && (conn->local->map->flags & NV_VOLUME_MIRROR))
            nv_conn_remap(conn); /* reads from memory: is the leg still one to read from? */
        gather(conn);
    }
    return conn->tx_sending;
}

void nv_conn_submit_send(struct nv_conn *conn, struct iovec *iov, unsigned count)
{
    assert(!conn->tx_pending && count > 0 && count <= NV_TX_IOV);
    conn->tx_op.kind = NV_OP_SEND;
    conn->tx_op.flags = 0;
    conn->tx_op.handle = conn->handle;
    conn->tx_op.iov = iov;
    conn->tx_op.iov_count = (uint16_t)count;
    conn->tx_op.done = sent;
    conn->tx_pending = true;
    nv_io_submit(conn->reactor->io, &conn->tx_op);
}

void nv_conn_transmit(struct nv_conn *conn)
{
    if (conn->tls) {
        nv_secure_transmit(conn);
        return;
    }
    if (conn->tx_pending || conn->tx_dead || !nv_conn_gather(conn))
        return;
    if (conn->tx_views) {
        nv_resident_send(conn);
        if (!conn->tx_pending && !conn->tx_dead && conn->tx_queue)
            nv_reactor_send_later(conn->reactor, conn); /* in the next turn: others have their turn first */
    } else {
        nv_conn_submit_send(conn, &conn->tx_iov[conn->tx_first], conn->tx_count - conn->tx_first);
    }
}

void nv_conn_advance(struct nv_conn *conn, uint64_t bytes)
{
    while (conn->tx_first < conn->tx_count && bytes >= conn->tx_iov[conn->tx_first].iov_len)
        bytes -= conn->tx_iov[conn->tx_first++].iov_len;
    if (conn->tx_first == conn->tx_count) {
        struct nv_request *list = conn->tx_sending;
        assert(bytes == 0);
        nv_trace_sent(conn);
        conn->tx_sending = NULL;
        for (struct nv_request *request = list, *next; request; request = next) {
            next = request->next;
            nv_conn_reply_gone(request);
        }
        return;
    }
    conn->tx_iov[conn->tx_first].iov_base = (uint8_t *)conn->tx_iov[conn->tx_first].iov_base + bytes;
    conn->tx_iov[conn->tx_first].iov_len -= bytes;
}

static void sent(struct nv_op *op)
{
    struct nv_conn *conn = (struct nv_conn *)((char *)op - offsetof(struct nv_conn, tx_op));

    conn->tx_pending = false;
    if (conn->tls && !conn->tx_dead)
        nv_secure_sent(conn, op->result);
    else if (op->result > 0 && !conn->tx_dead)
        nv_conn_advance(conn, (uint64_t)op->result);
    else
        nv_conn_kill(conn, op->result < 0 ? (int)op->result : -EPIPE);
    if (conn->tx_dead)
        release_sending(conn);
    else if (conn->tx_sending || conn->tx_queue)
        nv_reactor_send_later(conn->reactor, conn);
    nv_reactor_kick(conn->reactor, conn);
}
