/*
 * A TLS connection before the transmission phase: the TLS handshake, then the client's options, one at a time. C frames
 * and decrypts them; what they mean and what to answer is Python's (NV_EVENT_TLS_OPTION, nv_tls_reply). While an answer
 * is awaited nothing more is read. NV_TLS_ENTER turns the connection into a session; what the client sent behind its GO
 * is still inside the TLS object and is read from there.
 */
#ifndef NV_HAGGLE_H
#define NV_HAGGLE_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"
#include "nbd/session.h"

enum nv_haggle_state {
    NV_HAGGLE_HANDSHAKE,
    NV_HAGGLE_HEADER,
    NV_HAGGLE_PAYLOAD,
    NV_HAGGLE_WAIT,                     /* for Python's answer */
    NV_HAGGLE_OVER,                     /* entered, or closing */
};

struct nv_haggle {
    uint8_t state;
    uint32_t option;
    uint32_t length;                    /* of the option's payload */
    uint32_t filled;                    /* of the header or the payload */
    uint8_t header[16];
    uint8_t *payload;                   /* NV_OPTION_MAX bytes, resident as far as used */
    uint8_t *answer;                    /* not yet taken in by TLS, or NULL */
    uint32_t answer_length, answer_taken;
    struct nv_event_slot ready;
    struct nv_event_slot offered;       /* the option's event */
    char identity[1024];
};

/* Reactor: the connection has been linked; start its clock. */
void nv_haggle_begin(struct nv_conn *conn);
/* Reactor: go on with what has been received; true while more plaintext may be wanted now. */
void nv_haggle_turn(struct nv_conn *conn);
void nv_haggle_free(struct nv_haggle *haggle);

/* secure.c: a connection's bytes through TLS. */

/* Decrypt into `to`: bytes (> 0), or 0 when there is nothing now (more ciphertext is wanted, or the connection ended). */
size_t nv_secure_read(struct nv_conn *conn, void *to, size_t size);
/* Encrypt and send whatever waits: the haggling's answer, then replies. */
void nv_secure_transmit(struct nv_conn *conn);
/* A send of ciphertext ended. */
void nv_secure_sent(struct nv_conn *conn, int64_t result);
/* True if nothing is left to send, close_notify included (queued on the first call). */
bool nv_secure_finished(struct nv_conn *conn);

#endif
