/*
 * A connection's life (see session.h). It ends when it may not receive any more or was asked to close, nothing of it
 * is in flight, and every reply has been taken by the kernel or the peer is gone; then the socket is shut, what still
 * comes in is thrown away (so that TCP does not reset replies under way), the handle is closed and the front is told.
 */
#include "nbd/session.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "nbd/haggle.h"
#include "nbd/pace.h"
#include "nbd/tls.h"
#include "nbd/wire.h"
#include "reactor/plane.h"

#define PAGE 4096u
#define ROUND(bytes) (((bytes) + PAGE - 1) / PAGE * PAGE)
#define CONN_BYTES ROUND(sizeof(struct nv_conn))
#define SLOTS_BYTES ROUND(NV_REQUESTS_PER_CONNECTION * sizeof(struct nv_request))
#define ARENA_BYTES (CONN_BYTES + SLOTS_BYTES + NV_RX_CHUNK + NV_TLS_RECEIVE + NV_NOW_BYTES + NV_PAYLOAD_MAX)

struct nv_conn *nv_conn_create(struct nv_reactor *reactor, nv_handle handle)
{
    uint8_t *arena = nv_pages_map(ARENA_BYTES);
    struct nv_conn *conn = (struct nv_conn *)arena;

    if (!arena)
        return NULL;
    conn->reactor = reactor;
    conn->handle = handle;
    conn->slots = (struct nv_request *)(arena + CONN_BYTES);
    conn->private_chunk = (struct nv_chunk *)(arena + CONN_BYTES + SLOTS_BYTES);
    conn->cipher = arena + CONN_BYTES + SLOTS_BYTES + NV_RX_CHUNK;
    conn->spill = conn->cipher + NV_TLS_RECEIVE;
    conn->private_payload = conn->spill + NV_NOW_BYTES;
    conn->private_chunk->is_private = true;
    conn->private_chunk->refs = 1;
    conn->chunk = conn->private_chunk;
    conn->rx_window = NV_RX_CHUNK;
    conn->held_tail = &conn->held;
    conn->tx_queue_tail = &conn->tx_queue;
    conn->again_tail = &conn->again;
    return conn;
}

void nv_conn_free(struct nv_conn *conn)
{
    if (conn->tls)
        nv_tls_free(conn->tls);
    nv_haggle_free(conn->haggle);
    nv_pages_unmap(conn, ARENA_BYTES);
}

void nv_conn_set_params(struct nv_conn *conn, struct nv_volume *volume, const nv_connection_params *params)
{
    conn->params = *params;
    conn->header_bytes = params->flags & NV_CONN_EXTENDED ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES;
    conn->volume = volume;
    conn->local = &volume->locals[conn->reactor->index];
}

void nv_conn_preload(struct nv_conn *conn, const void *bytes, uint32_t length)
{
    assert(length <= NV_CHUNK_CAPACITY && conn->rx_end == 0);
    memcpy(nv_chunk_data(conn->chunk), bytes, length);
    conn->rx_end = length;
}

static void link_volume(struct nv_conn *conn)
{
    conn->volume_next = conn->local->connections;
    conn->volume_back = &conn->local->connections;
    if (conn->volume_next)
        conn->volume_next->volume_back = &conn->volume_next;
    conn->local->connections = conn;
}

static void unlink_volume(struct nv_conn *conn)
{
    *conn->volume_back = conn->volume_next;
    if (conn->volume_next)
        conn->volume_next->volume_back = conn->volume_back;
}

void nv_conn_enter(struct nv_conn *conn, struct nv_volume *volume, const nv_connection_params *params)
{
    nv_conn_set_params(conn, volume, params);
    link_volume(conn);
    if (!conn->closing)
        conn->deadline_ns = 0; /* the transmission phase knows no silence */
    if (conn->local->closing)
        nv_conn_close(conn, -ESHUTDOWN);
    nv_reactor_kick(conn->reactor, conn);
}

void nv_conn_opens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_conn *conn = (struct nv_conn *)((char *)message - offsetof(struct nv_conn, open_message));

    assert(conn->reactor == reactor);
    conn->next = reactor->connections;
    conn->back = &reactor->connections;
    if (conn->next)
        conn->next->back = &conn->next;
    reactor->connections = conn;
    nv_count(&reactor->counters.connections, 1);
    if (conn->local)
        link_volume(conn);
    else
        nv_haggle_begin(conn);
    if (reactor->stopping || (conn->local && conn->local->closing))
        nv_conn_close(conn, -ESHUTDOWN);
    nv_reactor_kick(reactor, conn);
}

void nv_conn_closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_conn *conn = (struct nv_conn *)((char *)message - offsetof(struct nv_conn, close_message));

    assert(conn->reactor == reactor);
    (void)reactor;
    if (!conn->ended)
        nv_conn_close(conn, 0);
}

void nv_conn_frees(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_conn *conn = (struct nv_conn *)((char *)message - offsetof(struct nv_conn, open_message));

    assert(conn->ended && conn->reactor == reactor);
    (void)reactor;
    nv_conn_free(conn);
}

void nv_conn_close(struct nv_conn *conn, int reason)
{
    if (conn->closing)
        return;
    conn->closing = true;
    if (conn->end_reason == 0)
        conn->end_reason = reason;
    conn->deadline_ns = nv_io_now_ns(conn->reactor->io) + NV_FORCE_CLOSE_MS * 1000000ull;
    nv_reactor_want_tick(conn->reactor);
    nv_reactor_kick(conn->reactor, conn);
}

void nv_conn_stop_receiving(struct nv_conn *conn, int reason)
{
    if (conn->rx_done)
        return;
    conn->rx_done = true;
    if (conn->end_reason == 0)
        conn->end_reason = reason;
    nv_reactor_unstarve(conn->reactor, conn);
    nv_pace_leave(conn);
    nv_reactor_kick(conn->reactor, conn);
}

void nv_conn_kill(struct nv_conn *conn, int reason)
{
    if (conn->tx_dead)
        return;
    conn->tx_dead = true;
    if (conn->end_reason == 0 && !conn->rx_done)
        conn->end_reason = reason;
    nv_io_shutdown(conn->handle); /* what is pending on the socket ends; unparsed requests do not start */
    conn->shut = true;
    nv_reactor_unstarve(conn->reactor, conn);
    nv_pace_leave(conn);
    nv_conn_drop_replies(conn);
    nv_reactor_kick(conn->reactor, conn);
}

static void finish(struct nv_conn *conn)
{
    struct nv_reactor *reactor = conn->reactor;

    assert(!conn->rx_pending && !conn->tx_pending && conn->in_flight == 0 && !conn->tx_queue && !conn->held &&
           !conn->again && !conn->pacing);
    conn->ended = true;
    conn->chunk->refs--;
    assert(conn->chunk->refs == 0);
    if (!conn->chunk->is_private)
        nv_chunk_return(conn, conn->chunk);
    nv_io_close(conn->handle);
    *conn->back = conn->next;
    if (conn->next)
        conn->next->back = conn->back;
    nv_reactor_forget(reactor, conn);
    nv_count(&reactor->counters.connections, (uint64_t)-1);
    struct nv_volume_local *local = conn->local;
    if (local)
        unlink_volume(conn);
    conn->closed.event.kind = NV_EVENT_CONNECTION_CLOSED;
    conn->closed.event.result = conn->end_reason;
    conn->closed.event.args[0] = conn->id;
    conn->closed.subject = conn;
    nv_events_raise(&reactor->events, &conn->closed); /* the front may free it from here on */
    if (local)
        nv_volume_local_left(reactor, local);
}

static void check_end(struct nv_conn *conn)
{
    if (!conn->rx_done && !conn->closing && !conn->tx_dead)
        return;
    if (conn->current && !conn->rx_pending && (conn->rx_done || conn->shut)) {
        nv_request_release(conn->current); /* never wholly received: no part of it happens */
        conn->current = NULL;
    }
    if (conn->in_flight > (conn->current ? 1u : 0u) || !nv_conn_transmit_idle(conn) || conn->held)
        return;
    if (!conn->shut) {
        nv_io_shutdown(conn->handle);
        conn->shut = true;
    }
    if (!conn->rx_done)
        nv_conn_arm_receive(conn);
    else if (!conn->rx_pending)
        finish(conn);
}

void nv_conn_turn(struct nv_conn *conn)
{
    if (conn->ended)
        return;
    if (conn->again)
        nv_resident_read_again(conn);
    if (conn->held)
        nv_conn_start_held(conn); /* parsed when its time had come (pace.c); perhaps up to a DISC */
    if (!conn->rx_pending && !conn->rx_done && !conn->shut) {
        if (conn->local) {
            nv_conn_parse(conn);
            nv_conn_start_held(conn);
        } else {
            nv_haggle_turn(conn);
        }
        nv_conn_arm_receive(conn);
    }
    check_end(conn);
}

/* Memory that only a burst needed goes back; a closing connection that does not drain is cut. */
void nv_conn_tick(struct nv_conn *conn, uint64_t now_ns)
{
    if (conn->deadline_ns && now_ns >= conn->deadline_ns) {
        conn->deadline_ns = 0;
        nv_conn_kill(conn, -ETIMEDOUT);
    }
    if (conn->private_touched && !conn->private_busy) {
        conn->private_touched = false;
        nv_pages_shed(conn->private_payload, NV_PAYLOAD_MAX);
    }
    if (conn->spill_touched && !conn->tx_pending && !conn->tx_sending) {
        conn->spill_touched = false;
        nv_pages_shed(conn->spill, NV_NOW_BYTES);
    }
    if (!conn->chunk->is_private && conn->rx_pending && conn->rx_state == NV_RX_HEADER &&
        conn->rx_start == conn->rx_end && conn->private_chunk->refs == 0)
        nv_io_cancel(conn->reactor->io, &conn->rx_op); /* received again, into private memory */
    if (conn->pacing && nv_pace_tick(conn))
        nv_conn_stop_receiving(conn, -ECONNRESET);
    if (conn->deadline_ns || conn->private_touched || conn->spill_touched || !conn->chunk->is_private)
        nv_reactor_want_tick(conn->reactor);
}
