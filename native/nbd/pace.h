/*
 * Holding connections back: by their volume's limits (pace.c), and by its share of a busy reactor (share.c). Both work
 * by not parsing: a connection that has to wait takes no memory, no place in the range order and no byte from its
 * socket, and one whose volume has no limits on a reactor that serves no other volume pays one predictable branch a
 * request (`gated`).
 */
#ifndef NV_PACE_H
#define NV_PACE_H

#include <stdbool.h>
#include <stdint.h>

#include "nbd/session.h"

/* --- limits (conn->local->qos is not NULL) --- */

/* May the request go on? False: the connection waits; it is parsed again when its time has come. */
bool nv_pace_admit(struct nv_conn *conn, struct nv_request *request);
/* The connection waits no longer, if it did: its place goes back. */
void nv_pace_leave(struct nv_conn *conn);
/* Every NV_TICK_MS while it waits: true if the peer has hung up meanwhile. */
bool nv_pace_tick(struct nv_conn *conn);
/* Message: new limits and shares for this reactor's half of a volume. */
void nv_pace_changes(struct nv_reactor *reactor, struct nv_message *message);

/* --- shares --- */

void nv_share_meet(struct nv_reactor *reactor, struct nv_volume_local *local);
/* Parsing begins: does its volume have to share this reactor, or have limits? */
static inline void nv_gate_begin(struct nv_conn *conn)
{
    if (conn->reactor->served != conn->local)
        nv_share_meet(conn->reactor, conn->local);
    conn->rationed = conn->reactor->turn < conn->reactor->rationed_until;
    conn->gated = conn->rationed || conn->local->qos;
}
/* A rationed connection has a header to parse: true if its volume has had its part; it goes on in the next turn. */
bool nv_share_spent(struct nv_conn *conn);
/* ... and has parsed it. */
void nv_share_charge(struct nv_conn *conn, const struct nv_request *request);

#endif
