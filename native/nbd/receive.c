/*
 * Bytes to requests. One state machine that consumes whatever has arrived; it stops at missing bytes, at a missing slot
 * or buffer, at the volume's limits or its part of this turn (stalled: nothing more is received, which pushes back on
 * the client), or at the end. Requests parsed in one turn are held, with their place in the range order taken, and
 * started together: after looking once whether the peer has hung up meanwhile, because what a client gave up on it may
 * already have sent again elsewhere.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "nbd/haggle.h"
#include "nbd/pace.h"
#include "nbd/session.h"
#include "nbd/trace.h"
#include "nbd/wire.h"

static void request_finished(struct nv_vreq *v)
{
    struct nv_request *request = (struct nv_request *)v;

    if (v->error)
        nv_request_failed_io(request, v->error);
    nv_conn_stage(request);
}

_Static_assert(offsetof(struct nv_request, v) == 0, "a request starts with its volume request");

static void refuse(struct nv_request *request)
{
    assert(request->status > 0);
    nv_count(&request->conn->local->counters.errors, 1);
    nv_conn_stage(request);
}

static void hold(struct nv_request *request)
{
    static const uint8_t kinds[] = {
        [NBD_CMD_READ] = NV_REQUEST_READ,   [NBD_CMD_WRITE] = NV_REQUEST_WRITE,
        [NBD_CMD_FLUSH] = NV_REQUEST_FLUSH, [NBD_CMD_TRIM] = NV_REQUEST_TRIM,
        [NBD_CMD_CACHE] = NV_REQUEST_CACHE, [NBD_CMD_WRITE_ZEROES] = NV_REQUEST_ZERO,
        [NBD_CMD_BLOCK_STATUS] = NV_REQUEST_STATUS,
    };
    struct nv_conn *conn = request->conn;
    struct nv_vreq *v = &request->v;

    v->reactor = conn->reactor;
    v->volume = conn->volume;
    v->kind = kinds[request->type];
    v->flags = (uint8_t)((request->flags & NBD_CMD_FLAG_FUA ? NV_REQUEST_FUA : 0) |
                         (request->flags & NBD_CMD_FLAG_NO_HOLE ? NV_REQUEST_NO_HOLE : 0) |
                         (request->flags & NBD_CMD_FLAG_FAST_ZERO ? NV_REQUEST_FAST : 0) |
                         (request->flags & NBD_CMD_FLAG_REQ_ONE ? NV_REQUEST_ONE : 0));
    v->offset = v->kind == NV_REQUEST_FLUSH ? 0 : request->offset;
    v->length = v->kind == NV_REQUEST_FLUSH ? 0 : request->length;
    v->data = request->memory == NV_MEMORY_NONE ? NULL : request->buffer;
    v->finished = request_finished;
    if (v->offset > conn->local->map->size || v->length > conn->local->map->size - v->offset) {
        nv_request_fail(request, EIO, "the volume shrank while the request waited");
        refuse(request);
        return;
    }
    nv_volume_enter(v);
    request->next = NULL;
    *conn->held_tail = request;
    conn->held_tail = &request->next;
    conn->held_writes |= v->kind == NV_REQUEST_WRITE || v->kind == NV_REQUEST_TRIM || v->kind == NV_REQUEST_ZERO;
}

/* Nobody else can have sent again what this client gave up on: there has been no other connection beside this one. */
static bool alone(const struct nv_conn *conn)
{
    return atomic_load(&conn->volume->bindings) == conn->alone_at;
}

void nv_conn_start_held(struct nv_conn *conn)
{
    struct nv_request *request = conn->held, *next;
    bool gone;

    if (!request)
        return;
    gone = conn->held_writes && !alone(conn) && nv_io_hung_up(conn->handle);
    conn->held = NULL;
    conn->held_tail = &conn->held;
    conn->held_writes = false;
    for (; request; request = next) {
        next = request->next;
        if (request->memory == NV_MEMORY_VIEW) {
            nv_resident_stage(request); /* the send is the read */
        } else if (request->memory == NV_MEMORY_CACHE) {
            nv_hit_stage(request);
        } else if (gone) {
            nv_volume_abandon(&request->v);
            nv_request_release(request);
        } else {
            nv_volume_start(&request->v);
        }
    }
    if (gone)
        nv_conn_stop_receiving(conn, -ECONNRESET);
}

static uint8_t *unparsed(struct nv_conn *conn)
{
    return nv_chunk_data(conn->chunk) + conn->rx_start;
}

static uint32_t available(const struct nv_conn *conn)
{
    assert(conn->rx_start <= conn->rx_end && conn->rx_end <= NV_CHUNK_CAPACITY);
    return conn->rx_end - conn->rx_start;
}

static void skip_payload(struct nv_conn *conn)
{
    conn->rx_filled = conn->current->payload;
    conn->rx_state = NV_RX_SKIP;
}

/* A well-formed, allowed request: what does it need before it can start? */
static inline __attribute__((always_inline)) void admit(struct nv_conn *conn, struct nv_request *request)
{
    conn->current = request;
    if (request->type == NBD_CMD_WRITE && request->payload > 0) {
        conn->rx_state = request->payload <= NV_INLINE_PAYLOAD ? NV_RX_INLINE : NV_RX_ADMIT;
    } else if (request->type == NBD_CMD_BLOCK_STATUS && request->payload > 0) {
        if (request->payload >= 8 && request->payload % 4 == 0 && request->payload <= 8 + 4 * NV_CONTEXTS_MAX) {
            conn->rx_state = NV_RX_INLINE;
        } else {
            nv_request_fail(request, EINVAL, "a block status payload of %u bytes is malformed", request->payload);
            skip_payload(conn);
        }
    } else if ((request->type == NBD_CMD_READ && request->length > 0) || request->type == NBD_CMD_BLOCK_STATUS) {
        conn->rx_state = NV_RX_ADMIT;
    } else {
        conn->current = NULL;
        hold(request);
    }
}

/* A whole header whose time has come: is it good? */
static inline void judge(struct nv_conn *conn, struct nv_request *request, bool good)
{
    if (good) {
        admit(conn, request);
    } else if (request->payload > 0) {
        conn->current = request;
        skip_payload(conn);
    } else {
        refuse(request);
    }
}

static bool wait_for_limits(struct nv_conn *conn)
{
    conn->rx_stalled = true;
    return false;
}

/* The map may have changed, and a connection that closes refuses at once: the request is judged again. */
static bool parse_paced(struct nv_conn *conn)
{
    struct nv_request *request = conn->current;

    if (conn->pacing && !conn->closing)
        return wait_for_limits(conn);
    nv_pace_leave(conn);
    conn->current = NULL;
    conn->rx_state = NV_RX_HEADER;
    judge(conn, request, nv_request_check(request) == 0);
    return true;
}

/* Made twice: who has neither limits nor a rival pays for neither. */
static inline __attribute__((always_inline)) bool parse_header(struct nv_conn *conn, const bool gated)
{
    struct nv_request *request;
    bool good;

    if (available(conn) < conn->header_bytes)
        return false;
    request = gated && conn->rationed && nv_share_spent(conn) ? NULL : nv_request_take(conn);
    if (!request) {
        conn->rx_stalled = true;
        return false;
    }
    if (!nv_request_decode(request, unparsed(conn))) {
        nv_request_release(request);
        nv_conn_stop_receiving(conn, -EPROTO);
        return false;
    }
    conn->rx_start += conn->header_bytes;
    nv_count(&conn->reactor->counters.requests, 1);
    nv_trace_parsed(request);
    if (request->type == NBD_CMD_DISC) {
        nv_request_release(request);
        nv_conn_stop_receiving(conn, 0);
        return false;
    }
    if (gated && conn->rationed)
        nv_share_charge(conn, request);
    good = nv_request_check(request) == 0;
    if (gated && good && conn->local->qos && !nv_pace_admit(conn, request)) {
        conn->current = request;
        conn->rx_state = NV_RX_PACED;
        return wait_for_limits(conn);
    }
    judge(conn, request, good);
    return true;
}

static __attribute__((noinline)) bool parse_gated_header(struct nv_conn *conn)
{
    return parse_header(conn, true);
}

static void start_current(struct nv_conn *conn)
{
    struct nv_request *request = conn->current;

    conn->current = NULL;
    conn->rx_state = NV_RX_HEADER;
    hold(request);
}

/* The payload goes into its own buffer; what of it is already in the chunk is copied, the rest received in place. */
static void begin_body(struct nv_conn *conn)
{
    const uint32_t have = available(conn);
    const uint32_t take = have < conn->current->payload ? have : conn->current->payload;

    memcpy(conn->current->buffer, unparsed(conn), take);
    nv_count(&conn->reactor->counters.copies_bytes, take);
    conn->rx_start += take;
    conn->rx_filled = take;
    conn->rx_state = NV_RX_BODY;
}

static bool parse_admit(struct nv_conn *conn)
{
    struct nv_request *request = conn->current;
    const bool one = request->flags & NBD_CMD_FLAG_REQ_ONE;
    uint32_t size = (uint32_t)request->length;

    if (request->type == NBD_CMD_READ &&
        ((conn->volume->cached.cache && nv_hit_take(request)) || nv_resident_take(request))) {
        start_current(conn);
        return true;
    }
    if (request->type == NBD_CMD_BLOCK_STATUS) {
        request->v.extents_max = one ? 2 : NV_EXTENTS_MAX;
        size = 2u * request->v.extents_max * (uint32_t)sizeof(struct nv_extent) + NV_CONTEXTS_MAX * 48u;
    }
    if (!nv_request_buffer(request, size)) {
        conn->rx_stalled = true;
        return false;
    }
    if (request->type == NBD_CMD_WRITE) {
        begin_body(conn);
    } else {
        request->v.extents = (struct nv_extent *)request->buffer;
        start_current(conn);
    }
    return true;
}

static bool parse_inline(struct nv_conn *conn)
{
    struct nv_request *request = conn->current;
    uint8_t *payload = unparsed(conn);

    if (available(conn) < request->payload)
        return false;
    if (request->type == NBD_CMD_WRITE && conn->local->map->memory_align > 1) {
        conn->rx_state = NV_RX_ADMIT; /* it needs aligned memory, and a copy costs less than two receives of its own */
        return true;
    }
    conn->rx_start += request->payload;
    if (request->type == NBD_CMD_WRITE) {
        nv_request_pin(request, payload);
        nv_resident_expect(request);
        start_current(conn);
    } else if (nv_request_select(request, payload) == 0) {
        conn->rx_state = NV_RX_ADMIT;
    } else {
        conn->current = NULL;
        conn->rx_state = NV_RX_HEADER;
        refuse(request);
    }
    return true;
}

static bool parse_skip(struct nv_conn *conn)
{
    const uint32_t have = available(conn);
    const uint32_t take = have < conn->rx_filled ? have : conn->rx_filled;
    struct nv_request *request = conn->current;

    conn->rx_start += take;
    conn->rx_filled -= take;
    if (conn->rx_filled > 0)
        return false;
    conn->current = NULL;
    conn->rx_state = NV_RX_HEADER;
    refuse(request);
    return true;
}

static bool parse_step(struct nv_conn *conn)
{
    switch (conn->rx_state) {
    case NV_RX_HEADER:
        return conn->gated ? parse_gated_header(conn) : parse_header(conn, false);
    case NV_RX_PACED:
        return parse_paced(conn);
    case NV_RX_ADMIT:
        return parse_admit(conn);
    case NV_RX_INLINE:
        return parse_inline(conn);
    case NV_RX_SKIP:
        return parse_skip(conn);
    default:
        assert(conn->rx_state == NV_RX_BODY && conn->rx_filled <= conn->current->payload);
        if (conn->rx_filled < conn->current->payload)
            return false;
        start_current(conn);
        return true;
    }
}

static bool receive_target(struct nv_conn *conn);

static void account(struct nv_conn *conn, uint32_t got)
{
    if (conn->rx_state == NV_RX_BODY) {
        conn->rx_filled += got;
        conn->rx_window = NV_RX_WINDOW_MIN; /* so that the next large payload's head is a small copy */
    } else {
        conn->rx_end += got;
        if (got == conn->rx_window && conn->rx_window < NV_RX_CHUNK)
            conn->rx_window *= 4;
    }
}

/* TLS: decrypt to where the next bytes belong; false: nothing to decrypt now, or nowhere to put it. */
static bool decrypt(struct nv_conn *conn)
{
    size_t got;

    if (!conn->tls || conn->rx_stalled || conn->rx_done || !receive_target(conn))
        return false;
    got = nv_secure_read(conn, conn->rx_iov.iov_base, conn->rx_iov.iov_len);
    account(conn, (uint32_t)got);
    return got > 0;
}

/* In the middle of a large payload, over a socket that tells when much of it has come. */
static bool in_bulk(const struct nv_conn *conn)
{
    return conn->rx_low_water && conn->rx_state == NV_RX_BODY && conn->current->payload >= NV_RX_BULK;
}

void nv_conn_parse(struct nv_conn *conn)
{
    const bool bulk = in_bulk(conn);

    nv_gate_begin(conn);
    do {
        conn->rx_stalled = false;
        while (!conn->rx_done && parse_step(conn))
            ;
    } while (decrypt(conn));
    nv_reactor_ends_inside(conn->reactor, conn,
                           !conn->rx_done && !conn->rx_stalled && (conn->current || available(conn) > 0));
    if (!bulk && !in_bulk(conn))
        conn->reactor->brisk_turn = conn->reactor->turn;
}

bool nv_conn_between_requests(const struct nv_conn *conn)
{
    if (!conn->local)
        return conn->haggle->state >= NV_HAGGLE_HEADER && conn->haggle->filled == 0;
    return !conn->current && available(conn) == 0;
}

static void received(struct nv_op *op)
{
    struct nv_conn *conn = (struct nv_conn *)((char *)op - offsetof(struct nv_conn, rx_op));
    const int64_t got = op->result;

    conn->rx_pending = false;
    if (op->flags & NV_OP_LATER) {
        assert(conn->reactor->bulks > 0);
        conn->reactor->bulks--;
    }
    nv_reactor_kick(conn->reactor, conn);
    if (got <= 0) {
        if (got != -ECANCELED)
            nv_conn_stop_receiving(conn, got < 0 ? (int)got : nv_conn_between_requests(conn) ? 0 : -ECONNRESET);
    } else if (!conn->rx_done && !conn->shut) {
        nv_count(&conn->reactor->counters.batches, 1);
        nv_trace_received(conn);
        if (conn->tls)
            conn->cipher_end = (uint32_t)got;
        else
            account(conn, (uint32_t)got);
    }
}

/* Where the next bytes go; false: nowhere now (stalled). */
static bool receive_target(struct nv_conn *conn)
{
    uint32_t need = 1, space;

    if (conn->rx_state == NV_RX_BODY) {
        conn->rx_iov = (struct iovec){conn->current->buffer + conn->rx_filled,
                                      conn->current->payload - conn->rx_filled};
        return true;
    }
    if (conn->rx_state == NV_RX_HEADER)
        need = conn->header_bytes;
    else if (conn->rx_state == NV_RX_INLINE)
        need = conn->current->payload;
    if (!nv_chunk_room(conn, need)) {
        conn->rx_stalled = true; /* in-place payloads pin the chunk: their release comes */
        return false;
    }
    space = NV_CHUNK_CAPACITY - conn->rx_end;
    if (conn->rx_window > NV_RX_CHUNK)
        conn->rx_window = NV_RX_CHUNK;
    conn->rx_iov = (struct iovec){nv_chunk_data(conn->chunk) + conn->rx_end,
                                  space < conn->rx_window ? space : conn->rx_window};
    return true;
}

/*
 * How much to wait for before the next receive: much of a large payload, for each wake-up costs both ends more than the
 * few bytes it may be for. Never more than the client still owes of this payload. Of its ciphertext TLS may hold a record
 * already, whose plaintext is still missing here.
 */
static uint32_t wanted_at_once(const struct nv_conn *conn)
{
    uint32_t owed, most = NV_RX_LOW_WATER;

    if (conn->rx_state != NV_RX_BODY || conn->shut)
        return 1;
    assert(conn->rx_filled < conn->current->payload);
    owed = conn->current->payload - conn->rx_filled;
    if (conn->tls) {
        if (owed <= 2 * NV_TLS_RECORD)
            return 1;
        owed -= NV_TLS_RECORD;
        most = NV_TLS_RECEIVE;
    }
    return owed < most ? owed : most;
}

static uint8_t receive_flags(struct nv_conn *conn)
{
    const uint32_t bytes = wanted_at_once(conn);

    if (conn->rx_low_water && conn->rx_low_water != bytes && nv_io_low_water(conn->handle, bytes))
        conn->rx_low_water = bytes;
    if (conn->rx_low_water > 1)
        return NV_OP_LATER;
    return conn->rx_state == NV_RX_BODY && !conn->shut && !conn->tls ? NV_OP_WHOLE : 0;
}

void nv_conn_arm_receive(struct nv_conn *conn)
{
    if (conn->rx_pending || conn->rx_done || (conn->rx_stalled && !conn->shut))
        return;
    if (conn->tls && !conn->shut) {
        if (conn->cipher_start < conn->cipher_end)
            return; /* TLS has no room: a send, or the reader, makes some */
        if (!conn->local && (conn->haggle->state >= NV_HAGGLE_WAIT || conn->haggle->answer))
            return; /* it is Python's turn, or the client's to read */
        conn->cipher_start = conn->cipher_end = 0;
        conn->rx_iov = (struct iovec){conn->cipher, NV_TLS_RECEIVE};
    } else if (conn->shut) /* the end: whatever still comes is thrown away */
        conn->rx_iov = (struct iovec){nv_chunk_data(conn->private_chunk), NV_CHUNK_CAPACITY};
    else if (!receive_target(conn))
        return;
    conn->rx_op.kind = NV_OP_RECV;
    conn->rx_op.flags = receive_flags(conn);
    conn->reactor->bulks += conn->rx_op.flags & NV_OP_LATER ? 1 : 0;
    conn->rx_op.handle = conn->handle;
    conn->rx_op.iov = &conn->rx_iov;
    conn->rx_op.iov_count = 1;
    conn->rx_op.done = received;
    conn->rx_pending = true;
    nv_io_submit(conn->reactor->io, &conn->rx_op);
}
