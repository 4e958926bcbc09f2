/*
 * See far_wire.h.
 */
#include "sim/far_wire.h"

#include <assert.h>
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"

#define RX_CAPACITY (256u << 10)
#define PAYLOAD_LEN 32u
#define EXTENTS 32u

void far_conn_begin(struct far_conn *conn, int socket, bool structured, bool extended)
{
    assert(!conn->rx);
    conn->socket = socket;
    conn->structured = structured;
    conn->extended = extended;
    conn->rx = malloc(RX_CAPACITY);
    conn->pieces = calloc(FAR_PIECES, sizeof *conn->pieces);
    assert(conn->rx && conn->pieces);
    conn->rx_size = 0;
    conn->request_count = conn->piece_count = 0;
    conn->begun = false;
}

void far_conn_end(struct far_conn *conn, bool reset)
{
    assert(conn->rx);
    nv_sim_client_close(conn->socket, reset);
    for (uint32_t i = 0; i < conn->request_count; i++)
        free(conn->requests[i].payload);
    for (uint32_t i = 0; i < conn->piece_count; i++)
        free(conn->pieces[i].bytes);
    free(conn->pieces);
    free(conn->rx);
    conn->rx = NULL;
    conn->pieces = NULL;
    conn->request_count = conn->piece_count = 0;
}

/* ---- bytes ---- */

static uint8_t *put(uint8_t *to, uint64_t value, unsigned bytes)
{
    const uint64_t big = htobe64(value);

    memcpy(to, (const uint8_t *)&big + 8 - bytes, bytes);
    return to + bytes;
}

static uint64_t get(const uint8_t *from, unsigned bytes)
{
    uint64_t big = 0;

    memcpy((uint8_t *)&big + 8 - bytes, from, bytes);
    return be64toh(big);
}

/* ---- requests ---- */

static bool parse(struct far_conn *conn)
{
    const size_t header = conn->extended ? 32 : 28;
    struct far_request *request = &conn->requests[conn->request_count];
    size_t payload;

    if (conn->rx_size < header || conn->piece_count > FAR_PIECES - 8)
        return false;
    *request = (struct far_request){.flags = (uint16_t)get(conn->rx + 4, 2), .type = (uint16_t)get(conn->rx + 6, 2),
                                    .cookie = get(conn->rx + 8, 8), .offset = get(conn->rx + 16, 8),
                                    .length = get(conn->rx + 24, conn->extended ? 8 : 4), .received_at = nv_sim_time()};
    if (get(conn->rx, 4) != (conn->extended ? 0x21e41c71u : 0x25609513u) || request->type > FAR_STATUS ||
        (conn->extended && ((request->flags & PAYLOAD_LEN) != 0) != (request->type == FAR_WRITE)))
        nv_sim_violation("a far server is sent %#llx, command %u, flags %#x", (unsigned long long)get(conn->rx, 4),
                         request->type, request->flags);
    payload = request->type == FAR_WRITE ? request->length : 0;
    if (conn->rx_size < header + payload)
        return false;
    if (payload > 0) {
        request->payload = malloc(payload);
        assert(request->payload);
        memcpy(request->payload, conn->rx + header, payload);
    }
    conn->rx_size -= header + payload;
    memmove(conn->rx, conn->rx + header + payload, conn->rx_size);
    conn->request_count++;
    return true;
}

bool far_conn_hear(struct far_conn *conn)
{
    size_t got;

    if (conn->request_count == FAR_REQUESTS)
        return false;
    got = nv_sim_client_recv(conn->socket, conn->rx + conn->rx_size, RX_CAPACITY - conn->rx_size);
    conn->rx_size += got;
    return parse(conn) || got > 0;
}

struct far_request far_conn_take(struct far_conn *conn, uint32_t index)
{
    const struct far_request request = conn->requests[index];

    assert(index < conn->request_count);
    conn->requests[index] = conn->requests[--conn->request_count];
    return request;
}

/* ---- answers ---- */

static uint8_t *add_piece(struct far_conn *conn, uint64_t cookie, size_t size, bool last)
{
    struct far_piece *piece = &conn->pieces[conn->piece_count++];

    assert(conn->piece_count <= FAR_PIECES);
    *piece = (struct far_piece){.bytes = malloc(size), .size = size, .cookie = cookie, .last = last};
    assert(piece->bytes);
    return piece->bytes;
}

static uint8_t *add_chunk(struct far_conn *conn, const struct far_request *request, uint16_t type, size_t body, bool last)
{
    uint8_t *to = add_piece(conn, request->cookie, (conn->extended ? 32 : 20) + body, last);

    to = put(to, conn->extended ? 0x6e8a278cu : 0x668e33efu, 4);
    to = put(to, last, 2);
    to = put(to, type, 2);
    to = put(to, request->cookie, 8);
    if (conn->extended)
        to = put(to, request->offset, 8);
    return put(to, body, conn->extended ? 8 : 4);
}

static void add_simple(struct far_conn *conn, const struct far_request *request, int error, const uint8_t *data, size_t size)
{
    uint8_t *to = add_piece(conn, request->cookie, 16 + size, true);

    to = put(to, 0x67446698u, 4);
    to = put(to, (uint64_t)error, 4);
    to = put(to, request->cookie, 8);
    if (size > 0)
        memcpy(to, data, size);
}

void far_answer(struct far_conn *conn, const struct far_request *request, int error)
{
    if (error && (conn->structured || conn->extended)) {
        uint8_t *to = add_chunk(conn, request, 0x8001, 6 + 4, true);
        to = put(to, (uint64_t)error, 4);
        to = put(to, 4, 2);
        memcpy(to, "why?", 4);
    } else if (conn->extended) {
        add_chunk(conn, request, 0, 0, true);
    } else {
        add_simple(conn, request, error, NULL, 0);
    }
}

static bool all_zero(const uint8_t *bytes, size_t size)
{
    return size == 0 || (bytes[0] == 0 && !memcmp(bytes, bytes + 1, size - 1));
}

/* One to four pieces, as data or holes; the last piece of the answer is one of them, or says only that it is over. */
void far_answer_content(struct far_conn *conn, const struct far_request *request, const uint8_t *data,
                        struct sim_random *random)
{
    uint64_t at = 0;

    if (!conn->structured && !conn->extended) {
        add_simple(conn, request, 0, data, request->length);
        return;
    }
    for (uint32_t i = (uint32_t)sim_random_below(random, 4); at < request->length; i -= i > 0) {
        const uint64_t size = i ? 1 + sim_random_below(random, request->length - at) : request->length - at;
        const bool last = at + size == request->length && sim_random_chance(random, 512);
        const bool hole = all_zero(data + at, size) && sim_random_chance(random, 512);
        uint8_t *to = add_chunk(conn, request, hole ? 2 : 1, 8 + (hole ? 4 : size), last);
        to = put(to, request->offset + at, 8);
        if (hole)
            put(to, size, 4);
        else
            memcpy(to, data + at, size);
        at += size;
        if (last)
            return;
    }
    add_chunk(conn, request, 0, 0, true);
}

void far_answer_status(struct far_conn *conn, const struct far_request *request, const struct sim_disk *disk,
                       struct sim_random *random)
{
    const unsigned width = conn->extended ? 8 : 4;
    uint64_t lengths[EXTENTS], at = request->offset, end = request->offset + request->length;
    bool holes[EXTENTS];
    unsigned count = 0;

    for (; at < end && count < EXTENTS && (count == 0 || sim_random_chance(random, 800)); count++) {
        lengths[count] = sim_disk_extent(disk, at, end - at, &holes[count]);
        at += lengths[count];
    }
    uint8_t *to = add_chunk(conn, request, conn->extended ? 6 : 5, (conn->extended ? 8 : 4) + count * 2 * width, true);
    to = put(to, FAR_ALLOCATION, 4);
    if (conn->extended)
        to = put(to, count, 4);
    for (unsigned i = 0; i < count; i++) {
        to = put(to, lengths[i], width);
        to = put(to, holes[i] ? 3 : 0, width);
    }
}

/* ---- the mouth ---- */

/* A piece that may leave now: the last of an answer only when it is alone. */
static uint32_t choose_piece(const struct far_conn *conn, struct sim_random *random)
{
    const uint32_t start = (uint32_t)sim_random_below(random, conn->piece_count);

    for (uint32_t i = 0; i < conn->piece_count; i++) {
        const uint32_t index = (start + i) % conn->piece_count;
        uint32_t same = 0;
        for (uint32_t j = 0; j < conn->piece_count; j++)
            same += conn->pieces[j].cookie == conn->pieces[index].cookie;
        if (!conn->pieces[index].last || same == 1)
            return index;
    }
    assert(!"every answer has a piece that is not its last, or only its last");
    return 0;
}

bool far_conn_speak(struct far_conn *conn, struct sim_random *random)
{
    struct far_piece *piece = &conn->pieces[0];
    size_t part;

    if (conn->piece_count == 0)
        return false;
    if (!conn->begun) {
        const uint32_t index = choose_piece(conn, random);
        const struct far_piece chosen = conn->pieces[index];
        conn->pieces[index] = conn->pieces[0];
        conn->pieces[0] = chosen;
        conn->begun = true;
    }
    part = piece->size - piece->sent;
    if (sim_random_chance(random, 200))
        part = 1 + (size_t)sim_random_below(random, part);
    part = nv_sim_client_send(conn->socket, piece->bytes + piece->sent, part);
    piece->sent += part;
    if (piece->sent == piece->size) {
        free(piece->bytes);
        *piece = conn->pieces[--conn->piece_count];
        conn->begun = false;
    }
    return part > 0;
}
