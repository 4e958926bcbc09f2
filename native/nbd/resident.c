/*
 * Reads whose bytes stand in memory (an object's view): they take no buffer and no ring operation, because the send
 * itself reads them, while the reply waits in the queue like any other.
 *
 * Invariants: a send that reads views takes what the socket has room for and never waits for the client, so a stalled
 * client pins no byte of a VVol, and a block is read as a whole, as one read would. What the socket did not take goes
 * back to the queue; only the reply of which a part has gone is made the connection's own, in its spill
 * memory, and sent from there. A queued read holds the volume's present map: nv_conn_remap() sees to that. Of a mirror,
 * whose legs fail, it is looked at once more just before the send.
 *
 * Not here: whether bytes are in memory (backend/view.c). A byte that memory cannot give after all (-EFAULT: the file
 * was cut, or memory is full) makes the reads start again in the usual way, which tells the client what is wrong.
 */
#include <assert.h>
#include <errno.h>

#include "nbd/session.h"
#include "nbd/trace.h"
#include "volume/mirror.h"

#define LINE 64u

/* A mirror says by itself what may be read where, and only on its own reactor. */
static __attribute__((noinline)) uint8_t *look_at_mirror(const struct nv_conn *conn, struct nv_request *request,
                                                         const struct nv_map *map)
{
    struct nv_mirror *mirror = conn->volume->mirror;

    if (nv_mirror_owner(mirror) != conn->reactor)
        return NULL;
    return nv_mirror_view(mirror, map, request->offset, request->length, &request->v.piece.object);
}

static inline __attribute__((always_inline)) uint8_t *look(const struct nv_conn *conn, struct nv_request *request,
                                                           const struct nv_map *map)
{
    if (__builtin_expect(map->flags & NV_VOLUME_MIRROR, 0))
        return look_at_mirror(conn, request, map);
    return nv_volume_look(map, request->offset, request->length, &request->v.piece.object);
}

/* Not every compiler takes what the access is for from a variable. */
static inline __attribute__((always_inline)) void fetch_line(const uint8_t *line, const int write)
{
    if (write)
        __builtin_prefetch(line, 1);
    else
        __builtin_prefetch(line, 0);
}

/*
 * Have the head of a block fetched into the processor's cache: by the time it is used, the page walk and the first misses are
 * over. Unrolled: the loop's own steps were a fifth of what a read costs.
 */
static inline __attribute__((always_inline)) void fetch(const uint8_t *at, uint64_t length, const int write)
{
    if (__builtin_expect(length >= NV_PREFETCH_BYTES, 1)) {
#pragma GCC unroll 64
        for (uint32_t i = 0; i < NV_PREFETCH_BYTES; i += LINE)
            fetch_line(at + i, write);
        return;
    }
    for (uint32_t i = 0; i < length; i += LINE)
        fetch_line(at + i, write);
}

bool nv_resident_take(struct nv_request *request)
{
    const struct nv_conn *conn = request->conn;
    uint8_t *at;

    if (request->length > NV_NOW_BYTES || conn->tls ||
        (conn->local->layers & (NV_LAYER_LOG | NV_LAYER_GATE))) /* what is logged stands elsewhere */
        return false;
    at = look(conn, request, conn->local->map);
    if (!at)
        return false;
    fetch(at, request->length, 0);
    request->buffer = at;
    request->memory = NV_MEMORY_VIEW;
    return true;
}

void nv_resident_expect(const struct nv_request *request)
{
    struct nv_object *object;
    const uint8_t *at = nv_volume_look(request->conn->local->map, request->offset, request->length, &object);

    if (at)
        fetch(at, request->length, 1);
}

/* ---- reads that start again ---- */

static void start_again(struct nv_request *request)
{
    struct nv_conn *conn = request->conn;

    assert(request->memory == NV_MEMORY_VIEW);
    request->next = NULL;
    *conn->again_tail = request;
    conn->again_tail = &request->next;
    nv_reactor_kick(conn->reactor, conn);
}

static bool get_buffer(struct nv_request *request)
{
    request->memory = NV_MEMORY_NONE;
    if (nv_request_buffer(request, (uint32_t)request->length))
        return true;
    request->memory = NV_MEMORY_VIEW;
    return false;
}

void nv_resident_read_again(struct nv_conn *conn)
{
    while (conn->again) {
        struct nv_request *request = conn->again;
        if (!conn->tx_dead && !get_buffer(request))
            return;
        conn->again = request->next;
        if (!conn->again)
            conn->again_tail = &conn->again;
        if (conn->tx_dead) {
            nv_request_release(request);
        } else {
            request->v.data = request->buffer;
            nv_volume_start(&request->v);
        }
    }
}

/* ---- the map was replaced ---- */

/* Let go of the old map. False: the read does not exist any more, and its reply says so. */
static bool change_over(struct nv_request *request)
{
    nv_volume_remap(&request->v);
    if (request->offset + request->length <= request->v.map->size)
        return true;
    nv_volume_abandon(&request->v);
    request->memory = NV_MEMORY_NONE;
    nv_count(&request->conn->local->counters.errors, 1);
    nv_request_fail(request, EIO, "the volume shrank while the request waited");
    return false;
}

/* True: the reply can stand in the queue. */
static bool look_again(struct nv_request *request)
{
    const struct nv_map *present = request->conn->local->map;

    if (request->memory != NV_MEMORY_VIEW)
        return true;
    if (request->v.map == present) {
        if (!(present->flags & NV_VOLUME_MIRROR)) /* a mirror may have lost the leg */
            return true;
    } else if (!change_over(request)) {
        return true;
    }
    request->buffer = look(request->conn, request, present);
    return request->buffer;
}

void nv_resident_stage(struct nv_request *request)
{
    if (look_again(request)) /* the map may have changed while it was held */
        nv_conn_stage(request);
    else
        start_again(request);
}

static void remap_again(struct nv_conn *conn)
{
    struct nv_request **link = &conn->again, *request;

    while ((request = *link)) {
        if (request->v.map == conn->local->map || change_over(request)) {
            link = &request->next;
            continue;
        }
        *link = request->next;
        nv_conn_stage(request);
    }
    conn->again_tail = link;
}

void nv_conn_remap(struct nv_conn *conn)
{
    struct nv_request **link = &conn->tx_queue, *request, *moved = NULL;

    remap_again(conn);
    while ((request = *link)) {
        if (look_again(request)) {
            link = &request->next;
            continue;
        }
        *link = request->next;
        request->next = moved;
        moved = request;
    }
    conn->tx_queue_tail = link;
    for (; moved; moved = request) {
        request = moved->next;
        start_again(moved);
    }
}

/* ---- what the socket did not take ---- */

/* Back to the head of the queue, in order; reads that cannot be sent from memory start again. */
static void requeue(struct nv_conn *conn, struct nv_request *list, bool views_fail)
{
    struct nv_request *head = NULL, **tail = &head;

    for (struct nv_request *request = list, *next; request; request = next) {
        next = request->next;
        if ((views_fail && request->memory == NV_MEMORY_VIEW) || !look_again(request)) {
            start_again(request);
            continue;
        }
        *tail = request;
        tail = &request->next;
    }
    if (!head)
        return;
    *tail = conn->tx_queue;
    if (!conn->tx_queue)
        conn->tx_queue_tail = tail;
    conn->tx_queue = head;
}

/* Release the replies that have gone whole; the index of the first piece of the first that has not. */
static uint32_t drop_gone(struct nv_conn *conn)
{
    uint32_t base = 0;

    while (base + conn->tx_sending->pieces <= conn->tx_first) {
        struct nv_request *request = conn->tx_sending;
        base += request->pieces;
        conn->tx_sending = request->next;
        assert(conn->tx_sending);
        nv_trace_gone(request);
        nv_conn_reply_gone(request);
    }
    return base;
}

/* Copy what is left of a read's bytes out of the view; the piece then points at the copy. */
static bool spill(struct nv_conn *conn, struct nv_request *request, struct iovec *payload)
{
    const uint64_t left = payload->iov_len;

    assert(left > 0 && left <= request->length && request->length <= NV_NOW_BYTES);
    if (nv_volume_copy(&request->v, request->length - left, conn->spill, left) != (int64_t)left)
        return false;
    conn->spill_touched = true;
    nv_reactor_want_tick(conn->reactor);
    *payload = (struct iovec){conn->spill, left};
    nv_volume_served(&request->v);
    request->memory = NV_MEMORY_SPILL;
    return true;
}

/* The socket is full: the first reply goes on alone, from memory of the connection's own, and waits for room. */
static void settle(struct nv_conn *conn)
{
    const uint32_t base = drop_gone(conn);
    struct nv_request *first = conn->tx_sending, *rest = first->next;
    const uint32_t end = base + first->pieces;
    const bool begun = conn->tx_first > base || conn->tx_iov[base].iov_base != first->header;

    first->next = NULL;
    requeue(conn, rest, false);
    if (first->memory == NV_MEMORY_VIEW && !spill(conn, first, &conn->tx_iov[end - 1])) {
        if (begun) {
            nv_conn_kill(conn, -EIO); /* nothing else can be said in the middle of a reply */
            return;
        }
        conn->tx_sending = NULL;
        start_again(first);
        return;
    }
    conn->tx_count = end;
    conn->tx_views = false;
    nv_conn_submit_send(conn, &conn->tx_iov[conn->tx_first], end - conn->tx_first);
}

void nv_resident_send(struct nv_conn *conn)
{
    struct nv_request *list = conn->tx_sending;
    int64_t result;

    assert(list && conn->tx_views && conn->tx_first == 0 && !conn->tx_pending);
    result = nv_io_send(conn->reactor->io, conn->handle, conn->tx_iov, conn->tx_count);
    if (result > 0)
        nv_conn_advance(conn, (uint64_t)result);
    if (result > 0 && !conn->tx_sending)
        return;
    if (result > 0 || result == -EAGAIN) {
        settle(conn);
    } else if (result == -EFAULT) {
        conn->tx_sending = NULL;
        requeue(conn, list, true);
    } else {
        nv_conn_kill(conn, result < 0 ? (int)result : -EPIPE);
    }
}
