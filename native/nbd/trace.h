/*
 * The five moments of a request that a trace shows, as hooks of one line: received (the batch that holds its header
 * came), parsed (its header was read), submitted (its volume first asked the storage: what lies before is waiting for
 * limits, the payload, memory, overlapping requests), completed (its reply is ready), sent (the kernel took the reply's
 * last byte; with TLS: it was encrypted). A read that the send takes from memory is ready as soon as it is allowed; the
 * send then is the read. A request whose reply nobody took leaves no record.
 *
 * Without a trace of its reactor a hook is one load and a branch that is not taken.
 */
#ifndef NV_TRACE_H
#define NV_TRACE_H

#include "nbd/session.h"

void nv_trace_note_parsed(struct nv_request *request);
void nv_trace_note_sent(struct nv_conn *conn);
void nv_trace_note_gone(struct nv_request *request, uint64_t now_ns);

/* A receive completed: all it brought shares the moment. */
static inline void nv_trace_received(struct nv_conn *conn)
{
    if (nv_recording(conn->reactor))
        conn->received_ns = nv_io_now_ns(conn->reactor->io);
}

static inline void nv_trace_parsed(struct nv_request *request)
{
    if (nv_recording(request->conn->reactor))
        nv_trace_note_parsed(request);
}

static inline void nv_trace_completed(struct nv_request *request)
{
    if (nv_recording(request->conn->reactor))
        request->v.stamps.completed_ns = nv_io_now_ns(request->conn->reactor->io);
}

/* All replies in conn->tx_sending have gone, with one send. */
static inline void nv_trace_sent(struct nv_conn *conn)
{
    if (nv_recording(conn->reactor))
        nv_trace_note_sent(conn);
}

/* This reply has gone, others of its send have not. */
static inline void nv_trace_gone(struct nv_request *request)
{
    if (nv_recording(request->conn->reactor))
        nv_trace_note_gone(request, nv_io_now_ns(request->conn->reactor->io));
}

#endif
