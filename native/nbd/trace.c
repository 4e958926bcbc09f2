/*
 * See trace.h: what the hooks do while their reactor records. A request is recorded if it was chosen when it was parsed,
 * in the session that still runs when it is sent: then its stamps are all of that session.
 */
#include "nbd/trace.h"

#include <assert.h>

void nv_trace_note_parsed(struct nv_request *request)
{
    struct nv_conn *conn = request->conn;
    struct nv_recorder *recorder = &conn->reactor->recorder;
    struct nv_stamps *stamps = &request->v.stamps;

    stamps->session = 0;
    if ((uint32_t)recorder->session != conn->volume->id || !nv_recorder_chooses(recorder))
        return;
    stamps->session = recorder->session;
    stamps->parsed_ns = nv_io_now_ns(conn->reactor->io);
    /* What came before the trace began, or with the handshake, has no moment of its own. */
    stamps->received_ns = conn->received_ns >= recorder->since_ns ? conn->received_ns : stamps->parsed_ns;
    stamps->submitted_ns = 0;
    stamps->completed_ns = 0;
}

void nv_trace_note_gone(struct nv_request *request, uint64_t now_ns)
{
    const struct nv_stamps *stamps = &request->v.stamps;
    const uint64_t submitted_ns = stamps->submitted_ns ? stamps->submitted_ns : stamps->completed_ns;
    struct nv_recorder *recorder = &request->conn->reactor->recorder;

    if (stamps->session != recorder->session)
        return;
    const nv_trace_record record = {
        .cookie = request->cookie,
        .offset = request->offset,
        .length = request->length,
        .received_ns = stamps->received_ns,
        .parsed_ns = stamps->parsed_ns,
        .submitted_ns = submitted_ns,
        .completed_ns = stamps->completed_ns,
        .sent_ns = now_ns,
        .volume = request->conn->volume->id,
        .connection = request->conn->id,
        .reactor = request->conn->reactor->index,
        .type = request->type,
        .flags = request->flags,
        .error = request->status,
    };

    assert(stamps->received_ns <= stamps->parsed_ns && stamps->parsed_ns <= submitted_ns &&
           submitted_ns <= stamps->completed_ns && stamps->completed_ns <= now_ns);
    nv_recorder_put(recorder, &record);
}

void nv_trace_note_sent(struct nv_conn *conn)
{
    const uint64_t now_ns = nv_io_now_ns(conn->reactor->io);

    for (struct nv_request *request = conn->tx_sending; request; request = request->next)
        nv_trace_note_gone(request, now_ns);
}
