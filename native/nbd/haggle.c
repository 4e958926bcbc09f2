/*
 * See haggle.h. Invariants: one option at a time, at most NV_OPTION_MAX bytes; the option's memory is the front's
 * between the OPTION event and its reply, the reactor's otherwise. A client that is silent for NV_HAGGLE_SILENCE_MS, or
 * does not finish the TLS handshake in its time, is cut.
 */
#include "nbd/haggle.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "nbd/tls.h"
#include "nbd/wire.h"
#include "reactor/plane.h"

struct reply {
    struct nv_message message;
    struct nv_conn *conn;
    uint32_t action;
    struct nv_volume *volume;
    nv_connection_params params;
    uint8_t *bytes;
    uint32_t length;
};

void nv_haggle_free(struct nv_haggle *haggle)
{
    if (!haggle)
        return;
    if (haggle->payload)
        nv_pages_unmap(haggle->payload, NV_OPTION_MAX);
    free(haggle->answer);
    free(haggle);
}

static void give_time(struct nv_conn *conn, uint64_t time_ms)
{
    if (conn->closing)
        return; /* the close has its own bound */
    conn->deadline_ns = nv_io_now_ns(conn->reactor->io) + time_ms * 1000000u;
    nv_reactor_want_tick(conn->reactor);
}

void nv_haggle_begin(struct nv_conn *conn)
{
    give_time(conn, conn->haggle_ms);
}

static void handshake_done(struct nv_conn *conn)
{
    struct nv_haggle *haggle = conn->haggle;

    if (nv_tls_peer(conn->tls, haggle->identity, sizeof haggle->identity) < 0) {
        nv_conn_stop_receiving(conn, -ENAMETOOLONG); /* cut names could be somebody else's */
        return;
    }
    haggle->state = NV_HAGGLE_HEADER;
    haggle->ready.event.kind = NV_EVENT_TLS_READY;
    haggle->ready.event.token = conn->closed.event.token;
    nv_events_raise(&conn->reactor->events, &haggle->ready);
    give_time(conn, NV_HAGGLE_SILENCE_MS);
}

static void option_complete(struct nv_conn *conn)
{
    struct nv_haggle *haggle = conn->haggle;

    haggle->state = NV_HAGGLE_WAIT;
    if (!conn->closing)
        conn->deadline_ns = 0; /* it is our turn to speak */
    haggle->offered.event.kind = NV_EVENT_TLS_OPTION;
    haggle->offered.event.token = conn->closed.event.token;
    haggle->offered.event.args[0] = haggle->length;
    nv_events_raise(&conn->reactor->events, &haggle->offered);
}

static void header_complete(struct nv_conn *conn)
{
    struct nv_haggle *haggle = conn->haggle;

    haggle->option = get32(haggle->header + 8);
    haggle->length = get32(haggle->header + 12);
    haggle->filled = 0;
    if (get64(haggle->header) != NBD_OPTION_MAGIC || haggle->length > NV_OPTION_MAX) {
        nv_conn_stop_receiving(conn, -EPROTO);
        return;
    }
    haggle->state = NV_HAGGLE_PAYLOAD;
    if (haggle->length == 0)
        option_complete(conn);
}

static bool advance(struct nv_conn *conn)
{
    struct nv_haggle *haggle = conn->haggle;
    const bool in_header = haggle->state == NV_HAGGLE_HEADER;
    uint8_t *base = in_header ? haggle->header : haggle->payload;
    const uint32_t want = in_header ? (uint32_t)sizeof haggle->header : haggle->length;
    size_t got;

    assert(haggle->filled < want || haggle->state == NV_HAGGLE_HANDSHAKE);
    got = nv_secure_read(conn, base + haggle->filled, want - haggle->filled > 0 ? want - haggle->filled : 1);
    if (got == 0)
        return false;
    if (haggle->state == NV_HAGGLE_HANDSHAKE) {
        handshake_done(conn);
        return true;
    }
    haggle->filled += (uint32_t)got;
    if (haggle->filled < want)
        return true;
    if (in_header)
        header_complete(conn);
    else
        option_complete(conn);
    return true;
}

void nv_haggle_turn(struct nv_conn *conn)
{
    struct nv_haggle *haggle = conn->haggle;

    if (haggle->state > NV_HAGGLE_HANDSHAKE && haggle->state < NV_HAGGLE_WAIT && !conn->closing &&
        conn->cipher_start < conn->cipher_end)
        give_time(conn, NV_HAGGLE_SILENCE_MS);
    /* One at a time: an option behind an answer that TLS has no room for (a client that does not read) waits. */
    while (haggle->state < NV_HAGGLE_WAIT && !haggle->answer && !conn->rx_done && advance(conn))
        ;
}

/* --- the front's side --- */

static int find_haggling(nv_plane *plane, uint32_t number, struct nv_conn **out)
{
    *out = nv_table_get(&plane->connections, number);
    if (!*out)
        return nv_fail(ENOENT, "connection %u is not open", number);
    return (*out)->haggle ? 0 : nv_fail(EINVAL, "connection %u has no TLS", number);
}

int nv_tls_open(nv_plane *plane, int fd, nv_tls_context *context, uint32_t timeout_ms, uint64_t token,
                uint32_t *number)
{
    struct nv_conn *conn = NULL;
    struct nv_haggle *haggle;
    struct nv_tls *tls;
    int error;

    if (timeout_ms == 0 || timeout_ms > NV_HANDSHAKE_MAX_MS)
        return nv_fail(EINVAL, "a TLS handshake time of %u ms; 1..%u are possible", timeout_ms, NV_HANDSHAKE_MAX_MS);
    haggle = calloc(1, sizeof *haggle);
    tls = nv_tls_new(context);
    if (haggle)
        haggle->payload = nv_pages_map(NV_OPTION_MAX);
    if (!haggle || !tls || !haggle->payload)
        error = nv_fail(ENOMEM, "no memory for a TLS connection");
    else
        error = nv_connection_new(plane, NULL, fd, token, &conn);
    if (error) {
        nv_haggle_free(haggle);
        if (tls)
            nv_tls_free(tls);
        return error;
    }
    conn->tls = tls;
    conn->haggle = haggle;
    conn->haggle_ms = timeout_ms;
    *number = conn->id;
    nv_connection_launch(plane, conn);
    return 0;
}

int nv_tls_identity(nv_plane *plane, uint32_t number, char *out, uint64_t size)
{
    struct nv_conn *conn;
    int error = find_haggling(plane, number, &conn);
    size_t length;

    if (error)
        return error;
    length = strlen(conn->haggle->identity); /* written before the READY event, never after */
    if (length >= size)
        return nv_fail(ENAMETOOLONG, "an identity of %zu bytes, room for %" PRIu64, length, size);
    memcpy(out, conn->haggle->identity, length + 1);
    return (int)length;
}

int nv_tls_option(nv_plane *plane, uint32_t number, uint32_t *option, void *out, uint64_t size)
{
    struct nv_conn *conn;
    int error = find_haggling(plane, number, &conn);

    if (error)
        return error;
    if (conn->haggle->length > size)
        return nv_fail(EMSGSIZE, "an option of %u bytes, room for %" PRIu64, conn->haggle->length, size);
    *option = conn->haggle->option;
    memcpy(out, conn->haggle->payload, conn->haggle->length);
    return (int)conn->haggle->length;
}

static void reply_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct reply *reply = (struct reply *)((char *)message - offsetof(struct reply, message));
    struct nv_conn *conn = reply->conn;
    struct nv_haggle *haggle = conn->haggle;

    if (conn->ended || haggle->state != NV_HAGGLE_WAIT) { /* the client is gone, or Python spoke twice */
        free(reply->bytes);
        free(reply);
        return;
    }
    haggle->answer = reply->bytes;
    haggle->answer_length = reply->length;
    haggle->answer_taken = 0;
    haggle->filled = 0;
    haggle->state = reply->action == NV_TLS_CONTINUE ? NV_HAGGLE_HEADER : NV_HAGGLE_OVER;
    nv_reactor_send_later(reactor, conn);
    if (reply->action == NV_TLS_CONTINUE) {
        give_time(conn, NV_HAGGLE_SILENCE_MS);
    } else if (reply->action == NV_TLS_ENTER) {
        nv_conn_enter(conn, reply->volume, &reply->params);
    } else {
        nv_conn_close(conn, 0);
    }
    nv_reactor_kick(reactor, conn);
    free(reply);
}

int nv_tls_reply(nv_plane *plane, uint32_t number, const void *bytes, uint64_t length, uint32_t action,
                 uint32_t volume_number, const nv_connection_params *params)
{
    struct nv_volume *volume = NULL;
    struct nv_conn *conn;
    struct reply *reply;
    int error = find_haggling(plane, number, &conn);

    if (!error && (action > NV_TLS_ENTER || length > NV_ANSWER_MAX))
        error = nv_fail(EINVAL, "a TLS reply of %" PRIu64 " bytes with action %u", length, action);
    if (!error && action == NV_TLS_ENTER)
        error = nv_connection_aim(plane, conn, volume_number, params, &volume);
    if (error)
        return error;
    reply = calloc(1, sizeof *reply);
    if (reply)
        reply->bytes = malloc(length ? length : 1);
    if (!reply || !reply->bytes) {
        free(reply);
        return nv_fail(ENOMEM, "no memory for a TLS reply of %" PRIu64 " bytes", length);
    }
    memcpy(reply->bytes, bytes, length);
    reply->length = (uint32_t)length;
    reply->conn = conn;
    reply->action = action;
    if (volume) {
        reply->volume = volume;
        reply->params = *params;
        nv_connection_bind(conn, volume);
    }
    reply->message.run = reply_arrives;
    nv_reactor_send(conn->reactor, &reply->message);
    return 0;
}
