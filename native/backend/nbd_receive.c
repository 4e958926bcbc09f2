/*
 * Bytes to answers. One state machine that consumes whatever has arrived: simple replies, structured and extended
 * chunks, in any order and mixed among requests. Content of a READ goes straight to where its owner wants it, once its
 * place has been checked; nothing else a server sends is stored beyond the receive buffer.
 *
 * A server is not trusted: what it sends must belong to a request that waits, fit it, come once, and say something about
 * all of it. Anything else loses the link, with a sentence that says why; no byte after that is looked at.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <string.h>

#include "backend/nbd.h"
#include "volume/volume.h"

#define PREFIX_MAX (14u + NV_LINK_ERROR_TEXT) /* of a chunk's payload, looked at as a whole */

struct chunk {
    struct nv_ask *ask;
    uint16_t flags;
    uint16_t type;
    uint64_t length;                /* of the payload */
    uint32_t header;                /* bytes of the header */
    const uint8_t *payload;
};

/* Returns false always: nothing more is parsed. */
#define BROKEN(link, ...) (nv_link_lose(link, -EPROTO, __VA_ARGS__), false)

static uint32_t available(const struct nv_link *link)
{
    assert(link->rx_start <= link->rx_end && link->rx_end <= NV_LINK_RX);
    return link->rx_end - link->rx_start;
}

/* ---- what has been answered of a READ ---- */

/* Content [from, to) has come; false when part of it had come before, or too much is scattered. */
static bool add_span(struct nv_ask *ask, uint64_t from, uint64_t to)
{
    uint32_t i = ask->span_count;

    while (i > 0 && ask->spans[i - 1].from >= to)
        i--;
    /* spans[i - 1] begins before `to`, spans[i] does not */
    if (i > 0 && ask->spans[i - 1].to > from)
        return false;
    if (i > 0 && ask->spans[i - 1].to == from) {
        ask->spans[i - 1].to = to;
        if (i < ask->span_count && ask->spans[i].from == to) {
            ask->spans[i - 1].to = ask->spans[i].to;
            ask->span_count--;
            memmove(&ask->spans[i], &ask->spans[i + 1], (ask->span_count - i) * sizeof ask->spans[0]);
        }
        return true;
    }
    if (i < ask->span_count && ask->spans[i].from == to) {
        ask->spans[i].from = from;
        return true;
    }
    if (ask->span_count == NV_LINK_SPANS)
        return false;
    memmove(&ask->spans[i + 1], &ask->spans[i], (ask->span_count - i) * sizeof ask->spans[0]);
    ask->spans[i] = (struct nv_span){from, to};
    ask->span_count++;
    return true;
}

/* Check the place of content and take it; false: the link is lost. */
static bool accept_content(struct nv_link *link, struct nv_ask *ask, uint64_t offset, uint64_t length)
{
    if (ask->command != NBD_CMD_READ)
        return BROKEN(link, "the server sent content for command %u", ask->command);
    if (length == 0 || offset < ask->offset || offset - ask->offset > ask->length ||
        length > ask->length - (offset - ask->offset))
        return BROKEN(link, "the server sent %" PRIu64 " bytes at %" PRIu64 " for a read of %" PRIu64 " at %" PRIu64,
                      length, offset, ask->length, ask->offset);
    if (!add_span(ask, offset, offset + length))
        return BROKEN(link, "the server sent bytes at %" PRIu64 " twice, or in more than %u scattered pieces", offset,
                      NV_LINK_SPANS);
    ask->got += length;
    return true;
}

/* Where content goes; NULL: nobody wants it any more. */
static uint8_t *place(const struct nv_ask *ask, uint64_t offset)
{
    if (ask->abandoned)
        return NULL;
    return ask->piece->data + ask->piece->moved + (offset - ask->offset);
}

/* ---- the end of an answer ---- */

static bool concluded(struct nv_link *link, struct nv_ask *ask)
{
    if (!ask->error && ask->command == NBD_CMD_READ && ask->got != ask->length)
        return BROKEN(link, "the server answered %" PRIu64 " of the %" PRIu64 " bytes of a read", ask->got,
                      ask->length);
    if (!ask->error && ask->command == NBD_CMD_BLOCK_STATUS && !ask->described)
        return BROKEN(link, "the server said nothing about block status");
    ask->answered = true;
    if (ask->state == NV_ASK_SENT)
        nv_remote_concluded(ask);
    return true;
}

static bool chunk_over(struct nv_link *link)
{
    struct nv_ask *ask = link->rx_ask;

    link->rx_state = NV_ANSWER_HEADER;
    link->rx_ask = NULL;
    return link->rx_last ? concluded(link, ask) : true;
}

/* ---- chunks, by type; each has its fixed part in the buffer ---- */

static bool take_data(struct nv_link *link, const struct chunk *chunk)
{
    const uint64_t offset = get64(chunk->payload), length = chunk->length - 8;

    if (!accept_content(link, chunk->ask, offset, length))
        return false;
    link->rx_start += chunk->header + 8;
    link->rx_to = place(chunk->ask, offset);
    link->rx_left = length;
    link->rx_state = NV_ANSWER_DATA;
    return true;
}

static bool take_hole(struct nv_link *link, const struct chunk *chunk)
{
    const uint64_t offset = get64(chunk->payload), length = get32(chunk->payload + 8);

    if (chunk->length != 12)
        return BROKEN(link, "the server sent a hole of %" PRIu64 " bytes of description", chunk->length);
    if (!accept_content(link, chunk->ask, offset, length))
        return false;
    if (!chunk->ask->abandoned)
        memset(place(chunk->ask, offset), 0, length);
    link->rx_start += chunk->header + 12;
    return chunk_over(link);
}

static bool take_status(struct nv_link *link, const struct chunk *chunk)
{
    const bool wide = chunk->type == NBD_REPLY_TYPE_BLOCK_STATUS_EXT;
    const uint64_t head = wide ? 8 : 4, entry = wide ? 16 : 8;
    struct nv_ask *ask = chunk->ask;

    if (ask->command != NBD_CMD_BLOCK_STATUS || wide != nv_link_extended(link) || ask->described)
        return BROKEN(link, "the server sent block status that was not asked for");
    if (get32(chunk->payload) != link->params.allocation_id)
        return BROKEN(link, "the server sent block status of context %u, not of %u", get32(chunk->payload),
                      link->params.allocation_id);
    if (chunk->length < head + entry || (chunk->length - head) % entry ||
        (wide && get32(chunk->payload + 4) != (chunk->length - head) / entry))
        return BROKEN(link, "the server sent block status of %" PRIu64 " bytes", chunk->length);
    ask->described = true;
    link->rx_start += (uint32_t)(chunk->header + head);
    link->rx_left = (chunk->length - head) / entry;
    link->rx_state = NV_ANSWER_STATUS;
    return true;
}

static bool take_error(struct nv_link *link, const struct chunk *chunk)
{
    const uint64_t fixed = chunk->type == NBD_REPLY_TYPE_ERROR_OFFSET ? 14 : 6;
    const uint32_t error = get32(chunk->payload);
    const uint64_t text = get16(chunk->payload + 4);

    if (error == 0 || chunk->length < fixed || text > chunk->length - fixed)
        return BROKEN(link, "the server sent a malformed error of %" PRIu64 " bytes", chunk->length);
    if (!chunk->ask->error)
        chunk->ask->error = error > INT32_MAX ? EIO : (int32_t)error;
    link->rx_start += chunk->header + (uint32_t)chunk->length;
    return chunk_over(link);
}

/* Bytes of the payload that must be there before the chunk can be looked at; false: no such chunk exists. */
static bool fixed_part(const struct chunk *chunk, uint32_t *bytes)
{
    const bool error = chunk->type & NBD_REPLY_TYPE_ERROR_BIT;

    *bytes = 0;
    switch (chunk->type) {
    case NBD_REPLY_TYPE_NONE:
        return chunk->length == 0 && (chunk->flags & NBD_REPLY_FLAG_DONE);
    case NBD_REPLY_TYPE_OFFSET_DATA:
        *bytes = 8;
        return chunk->length > 8;
    case NBD_REPLY_TYPE_OFFSET_HOLE:
        *bytes = 12;
        return chunk->length == 12;
    case NBD_REPLY_TYPE_BLOCK_STATUS:
    case NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
        *bytes = 8;
        return chunk->length >= 12;
    default:
        *bytes = error ? (uint32_t)chunk->length : 0;
        return error && chunk->length >= 6 && chunk->length <= PREFIX_MAX;
    }
}

static bool take_chunk(struct nv_link *link, struct chunk *chunk)
{
    uint32_t fixed;

    if (!fixed_part(chunk, &fixed))
        return BROKEN(link, "the server sent a chunk of type %u with %" PRIu64 " bytes", chunk->type, chunk->length);
    if (available(link) < chunk->header + fixed)
        return false;
    chunk->payload = link->rx + link->rx_start + chunk->header;
    link->rx_ask = chunk->ask;
    link->rx_last = chunk->flags & NBD_REPLY_FLAG_DONE;
    switch (chunk->type) {
    case NBD_REPLY_TYPE_NONE:
        link->rx_start += chunk->header;
        return chunk_over(link);
    case NBD_REPLY_TYPE_OFFSET_DATA:
        return take_data(link, chunk);
    case NBD_REPLY_TYPE_OFFSET_HOLE:
        return take_hole(link, chunk);
    case NBD_REPLY_TYPE_BLOCK_STATUS:
    case NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
        return take_status(link, chunk);
    default:
        return take_error(link, chunk);
    }
}

/* ---- headers ---- */

/* The request that a cookie names, if it waits for (more of) an answer. */
static struct nv_ask *find(struct nv_link *link, uint64_t cookie)
{
    const uint32_t index = (uint32_t)cookie, serial = (uint32_t)(cookie >> 32);
    struct nv_ask *ask = index < link->asks_touched ? &link->asks[index] : NULL;

    if (!ask || ask->serial != serial || (!ask->piece && !ask->abandoned) || ask->answered ||
        (ask->state != NV_ASK_SENT && ask->state != NV_ASK_SENDING))
        return NULL;
    return ask;
}

static bool parse_simple(struct nv_link *link, const uint8_t *from)
{
    const uint32_t error = get32(from + 4);
    struct nv_ask *ask = find(link, get64(from + 8));

    if (!ask)
        return BROKEN(link, "the server answered a request that does not wait for it");
    if (nv_link_extended(link))
        return BROKEN(link, "the server sent a simple reply, where extended ones were agreed");
    if ((link->params.flags & NV_CONN_STRUCTURED) && !error &&
        (ask->command == NBD_CMD_READ || ask->command == NBD_CMD_BLOCK_STATUS))
        return BROKEN(link, "the server sent a simple reply to command %u, where structured ones were agreed",
                      ask->command);
    link->rx_start += NBD_SIMPLE_BYTES;
    link->rx_ask = ask;
    link->rx_last = true;
    ask->error = error > INT32_MAX ? EIO : (int32_t)error;
    if (ask->command != NBD_CMD_READ || error)
        return chunk_over(link);
    if (!accept_content(link, ask, ask->offset, ask->length))
        return false;
    link->rx_to = place(ask, ask->offset);
    link->rx_left = ask->length;
    link->rx_state = NV_ANSWER_DATA;
    return true;
}

static bool parse_chunk(struct nv_link *link, const uint8_t *from, bool extended)
{
    struct chunk chunk = {
        .ask = find(link, get64(from + 8)),
        .flags = get16(from + 4),
        .type = get16(from + 6),
        .length = extended ? get64(from + 24) : get32(from + 16),
        .header = extended ? NBD_EXTENDED_BYTES : NBD_CHUNK_BYTES,
    };

    if (!chunk.ask)
        return BROKEN(link, "the server answered a request that does not wait for it");
    if (extended && get64(from + 16) != chunk.ask->offset)
        return BROKEN(link, "the server's answer names offset %" PRIu64 ", the request %" PRIu64, get64(from + 16),
                      chunk.ask->offset);
    return take_chunk(link, &chunk);
}

static bool parse_header(struct nv_link *link)
{
    const uint8_t *from = link->rx + link->rx_start;
    const uint32_t have = available(link);
    const bool extended = nv_link_extended(link), structured = link->params.flags & NV_CONN_STRUCTURED;

    if (have < NBD_SIMPLE_BYTES)
        return false;
    switch (get32(from)) {
    case NBD_SIMPLE_REPLY_MAGIC:
        return parse_simple(link, from);
    case NBD_STRUCTURED_REPLY_MAGIC:
        if (!structured || extended)
            return BROKEN(link, "the server sent a structured reply, which was not agreed");
        return have < NBD_CHUNK_BYTES ? false : parse_chunk(link, from, false);
    case NBD_EXTENDED_REPLY_MAGIC:
        if (!extended)
            return BROKEN(link, "the server sent an extended reply, which was not agreed");
        return have < NBD_EXTENDED_BYTES ? false : parse_chunk(link, from, true);
    default:
        return BROKEN(link, "the server sent 0x%08x where an answer begins", get32(from));
    }
}

/* ---- bodies ---- */

static bool parse_data(struct nv_link *link)
{
    const uint64_t take = available(link) < link->rx_left ? available(link) : link->rx_left;

    if (link->rx_to) {
        memcpy(link->rx_to, link->rx + link->rx_start, take);
        nv_count(&link->reactor->counters.copies_bytes, take);
        link->rx_to += take;
    }
    link->rx_start += (uint32_t)take;
    link->rx_left -= take;
    return link->rx_left > 0 ? false : chunk_over(link);
}

/* One descriptor. What lies beyond the request, or finds no room, is not kept: callers ask again from where it ends. */
static bool keep_extent(struct nv_link *link, struct nv_ask *ask, uint64_t length, uint64_t flags)
{
    struct nv_piece *piece = ask->piece;
    struct nv_extent *last = piece && ask->extents && !ask->full ? &piece->extents[ask->extents - 1] : NULL;
    const uint32_t bits = (uint32_t)flags & (NV_EXTENT_HOLE | NV_EXTENT_ZERO);

    if (length == 0)
        return BROKEN(link, "the server described 0 bytes");
    if (ask->got >= ask->length)
        return BROKEN(link, "the server described more than was asked for");
    if (length > ask->length - ask->got)
        length = ask->length - ask->got; /* the last one may reach further */
    ask->got += length;
    if (last && last->flags == bits)
        last->length += length;
    else if (piece && !ask->full && ask->extents < piece->extents_max)
        piece->extents[ask->extents++] = (struct nv_extent){length, bits};
    else
        ask->full = true; /* what follows is passed over, and never merged across the gap */
    return true;
}

static bool parse_status(struct nv_link *link)
{
    const bool wide = nv_link_extended(link);
    const uint8_t *from = link->rx + link->rx_start;

    if (available(link) < (wide ? 16u : 8u))
        return false;
    if (!keep_extent(link, link->rx_ask, wide ? get64(from) : get32(from), wide ? get64(from + 8) : get32(from + 4)))
        return false;
    link->rx_start += wide ? 16 : 8;
    return --link->rx_left > 0 ? true : chunk_over(link);
}

void nv_link_parse(struct nv_link *link)
{
    bool more = true;

    while (more && !link->deaf && link->state < NV_LINK_LOST) {
        if (link->rx_state == NV_ANSWER_HEADER)
            more = parse_header(link);
        else if (link->rx_state == NV_ANSWER_DATA)
            more = parse_data(link);
        else
            more = parse_status(link);
    }
}

/* ---- receiving ---- */

static bool direct(const struct nv_link *link)
{
    return link->rx_state == NV_ANSWER_DATA && available(link) == 0 && link->rx_left >= NV_LINK_DIRECT && link->rx_to &&
           link->state < NV_LINK_DRAINING;
}

bool nv_link_receives_in_place(const struct nv_link *link)
{
    const uint8_t *to = link->rx_iov.iov_base;

    return !(to >= link->rx && to < link->rx + NV_LINK_RX) && !(to >= link->cipher && to < link->cipher + NV_TLS_RECEIVE);
}

/* Where the next bytes go. */
static struct iovec target(struct nv_link *link)
{
    uint32_t space;

    if (direct(link))
        return (struct iovec){link->rx_to, link->rx_left};
    if (link->rx_start > 0) { /* less than a header and its fixed part is left, usually nothing */
        memmove(link->rx, link->rx + link->rx_start, available(link));
        link->rx_end -= link->rx_start;
        link->rx_start = 0;
    }
    space = NV_LINK_RX - link->rx_end;
    assert(space > 0);
    return (struct iovec){link->rx + link->rx_end, space < link->rx_window ? space : link->rx_window};
}

static void account(struct nv_link *link, const struct iovec *where, size_t got)
{
    if (where->iov_base == link->rx_to && link->rx_state == NV_ANSWER_DATA) {
        link->rx_to += got;
        link->rx_left -= got;
        link->rx_window = NV_RX_WINDOW_MIN; /* so that the next large payload's head is a small copy */
    } else {
        link->rx_end += (uint32_t)got;
        if (got == link->rx_window && link->rx_window < NV_LINK_RX)
            link->rx_window = link->rx_window * 4 < NV_LINK_RX ? link->rx_window * 4 : NV_LINK_RX;
    }
}

void nv_link_parse_secure(struct nv_link *link)
{
    while (!link->deaf && link->state < NV_LINK_LOST && link->state != NV_LINK_HAGGLING) {
        const struct iovec where = target(link);
        const size_t got = nv_link_decrypt(link, where.iov_base, where.iov_len);
        if (got == 0)
            return;
        account(link, &where, got);
        nv_link_parse(link);
    }
}

/* Nothing more comes, or nothing that could be had. */
static void no_more(struct nv_link *link, int64_t got)
{
    const bool leaving = link->state == NV_LINK_LEAVING;

    if (got == -ECANCELED && link->state == NV_LINK_DRAINING)
        nv_link_arm_receive(link); /* to elsewhere */
    else
        nv_link_lose(link, leaving ? 0 : got < 0 ? (int)got : -ECONNRESET, "%s",
                     leaving ? "closed" : "the server closed the connection");
}

static void take(struct nv_link *link, size_t got)
{
    nv_count(&link->reactor->counters.batches, 1);
    link->heard = link->ticks;
    if (link->deaf)
        return;
    if (link->tls) {
        link->cipher_end = (uint32_t)got;
        if (link->state == NV_LINK_HAGGLING)
            nv_link_haggle(link);
        nv_link_parse_secure(link);
        nv_link_transmit(link); /* TLS may have something of its own to say */
    } else {
        account(link, &link->rx_iov, got);
        nv_link_parse(link);
    }
}

static void received(struct nv_op *op)
{
    struct nv_link *link = (struct nv_link *)((char *)op - offsetof(struct nv_link, rx_op));

    link->rx_pending = false;
    nv_link_settle(link);
    if (link->state >= NV_LINK_LOST)
        return;
    if (op->result <= 0) {
        no_more(link, op->result);
        return;
    }
    take(link, (size_t)op->result);
    nv_link_arm_receive(link);
}

void nv_link_arm_receive(struct nv_link *link)
{
    if (link->rx_pending || link->state >= NV_LINK_LOST)
        return;
    if (link->deaf) {
        link->rx_iov = (struct iovec){link->rx, NV_LINK_RX};
    } else if (link->tls) {
        if (link->cipher_start < link->cipher_end)
            return; /* TLS has no room, or Python has not asked: both come back */
        link->cipher_start = link->cipher_end = 0;
        link->rx_iov = (struct iovec){link->cipher, NV_TLS_RECEIVE};
    } else {
        link->rx_iov = target(link);
    }
    link->rx_op.kind = NV_OP_RECV;
    link->rx_op.flags = nv_link_receives_in_place(link) ? NV_OP_WHOLE : 0;
    link->rx_op.handle = link->handle;
    link->rx_op.iov = &link->rx_iov;
    link->rx_op.iov_count = 1;
    link->rx_op.done = received;
    link->rx_pending = true;
    nv_io_submit(link->reactor->io, &link->rx_op);
}
