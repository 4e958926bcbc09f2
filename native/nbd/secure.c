/*
 * A connection's bytes through TLS. Ciphertext is received into a small buffer of the connection, read from there by the
 * TLS object and decrypted straight to where the bytes belong; replies are encrypted out of the requests' own memory, which is
 * released as soon as TLS has taken it in. One send of ciphertext is in flight at most.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "nbd/haggle.h"
#include "nbd/session.h"
#include "nbd/tls.h"

static void broken(struct nv_conn *conn, int reason)
{
    nv_reactor_send_later(conn->reactor, conn); /* an alert may want to go out */
    nv_conn_stop_receiving(conn, reason);
}

/* What was received is read where it stands. What TLS leaves of it (the plaintext's place is full, or TLS has no room for
 * something of its own) stays there for the next call, and nothing is received meanwhile. */
static void lend(struct nv_conn *conn)
{
    nv_tls_lend(conn->tls, conn->cipher + conn->cipher_start, conn->cipher_end - conn->cipher_start);
}

static void take_back(struct nv_conn *conn)
{
    const size_t left = nv_tls_take_back(conn->tls);

    assert(left <= conn->cipher_end - conn->cipher_start);
    conn->cipher_start = conn->cipher_end - (uint32_t)left;
}

static bool handshake(struct nv_conn *conn)
{
    int state;

    lend(conn);
    state = nv_tls_handshake(conn->tls);
    take_back(conn);
    nv_reactor_send_later(conn->reactor, conn);
    if (state < 0)
        broken(conn, state);
    return state > 0;
}

size_t nv_secure_read(struct nv_conn *conn, void *to, size_t size)
{
    ssize_t got;

    assert(size > 0);
    if (conn->rx_done || (conn->haggle->state == NV_HAGGLE_HANDSHAKE && !handshake(conn)))
        return 0;
    if (conn->haggle->state == NV_HAGGLE_HANDSHAKE)
        return 1; /* the handshake is done: the caller moves on */
    lend(conn);
    got = nv_tls_read(conn->tls, to, size);
    take_back(conn);
    if (got > 0)
        return (size_t)got;
    if (got < 0)
        broken(conn, got != -EPIPE ? (int)got : nv_conn_between_requests(conn) ? 0 : -ECONNRESET);
    else
        nv_reactor_send_later(conn->reactor, conn); /* TLS may have something of its own to say */
    return 0;
}

static bool submit_pending(struct nv_conn *conn)
{
    const void *cipher = NULL;
    size_t size = nv_tls_pending(conn->tls, &cipher);

    if (size == 0)
        return false;
    conn->cipher_iov = (struct iovec){(void *)(uintptr_t)cipher, size};
    nv_conn_submit_send(conn, &conn->cipher_iov, 1);
    return true;
}

/* Encrypt the next plaintext; false: there is none, or TLS has no room or is broken. */
static bool encrypt_answer(struct nv_conn *conn)
{
    struct nv_haggle *haggle = conn->haggle;
    struct iovec iov;
    ssize_t taken;

    if (!haggle->answer)
        return false;
    iov = (struct iovec){haggle->answer + haggle->answer_taken, haggle->answer_length - haggle->answer_taken};
    taken = iov.iov_len ? nv_tls_write(conn->tls, &iov, 1) : 0;
    if (taken < 0) {
        nv_conn_kill(conn, (int)taken);
        return false;
    }
    haggle->answer_taken += (uint32_t)taken;
    if (haggle->answer_taken < haggle->answer_length)
        return taken > 0;
    free(haggle->answer);
    haggle->answer = NULL;
    nv_reactor_kick(conn->reactor, conn); /* the next option may have waited for this */
    return true;
}

static bool encrypt_replies(struct nv_conn *conn)
{
    ssize_t taken;

    if (conn->haggle->answer || !nv_conn_gather(conn))
        return false;
    taken = nv_tls_write(conn->tls, &conn->tx_iov[conn->tx_first], (int)(conn->tx_count - conn->tx_first));
    if (taken < 0) {
        nv_conn_kill(conn, (int)taken);
        return false;
    }
    nv_conn_advance(conn, (uint64_t)taken);
    return taken > 0;
}

void nv_secure_transmit(struct nv_conn *conn)
{
    if (conn->tx_pending || conn->tx_dead)
        return;
    while (encrypt_answer(conn) || encrypt_replies(conn))
        ;
    if (!conn->tx_dead)
        submit_pending(conn);
}

void nv_secure_sent(struct nv_conn *conn, int64_t result)
{
    if (result <= 0) {
        nv_conn_kill(conn, result < 0 ? (int)result : -EPIPE);
        return;
    }
    nv_tls_sent(conn->tls, (size_t)result);
    nv_reactor_send_later(conn->reactor, conn);
}

bool nv_secure_finished(struct nv_conn *conn)
{
    const void *cipher = NULL;

    if (conn->tx_dead)
        return true;
    if (conn->tx_pending || conn->tx_sending || conn->haggle->answer)
        return false;
    if (!conn->tls_bye) {
        if (nv_tls_shutdown(conn->tls) == -EAGAIN)
            return false;
        conn->tls_bye = true;
    }
    if (nv_tls_pending(conn->tls, &cipher) == 0)
        return true;
    nv_reactor_send_later(conn->reactor, conn);
    return false;
}
