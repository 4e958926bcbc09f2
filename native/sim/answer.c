/*
 * The model client's ear: replies are taken apart by the protocol document and judged, chunk by chunk. Anything the
 * protocol does not allow is a violation; contents go to the judge of contents (check.h).
 */
#include "sim/answer.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"

#define CHUNK_MAX (256u << 10)

enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_STATUS = 5, CHUNK_STATUS_EXT = 6, CHUNK_ERROR = 0x8001 };

struct chunk {
    uint16_t flags, type;
    uint64_t length;
    const uint8_t *body;
};

static uint64_t get(const uint8_t *bytes, unsigned size)
{
    uint64_t big = 0;

    memcpy((uint8_t *)&big + 8 - size, bytes, size);
    return be64toh(big);
}

static struct client_request *find(struct client *client, uint64_t cookie)
{
    for (unsigned i = 0; i < CLIENT_REQUESTS; i++)
        if (client->requests[i].used && client->requests[i].cookie == cookie)
            return &client->requests[i];
    nv_sim_violation("connection %u: an answer to cookie %#llx, which is not waiting", client->id,
                     (unsigned long long)cookie);
}

/* ---- is this the right verdict? ---- */

/* A write where nothing is stored: the place of the map fault, which is an error until it is built. */
static bool lacks_storage(const struct client *client, const struct client_request *request)
{
    return request->type == COMMAND_WRITE && request->offset < client->rules->zero_to &&
           request->offset + request->length > client->rules->zero_from;
}

static bool fair_error(const struct client *client, const struct client_request *request, int error)
{
    const struct client_rules *rules = client->rules;
    bool changes = request->type == COMMAND_WRITE || request->type == COMMAND_TRIM || request->type == COMMAND_ZEROES;
    bool durable = request->type == COMMAND_FLUSH || (changes && (request->flags & FLAG_FUA));

    switch (error) {
    case EIO:
        return lacks_storage(client, request) ||
               (rules->io_errors && request->type != COMMAND_FLUSH && request->type != COMMAND_CACHE) ||
               (rules->sync_errors && (durable || (rules->logged && changes)));
    case ENOSPC:
        return rules->io_errors && changes;
    case EOPNOTSUPP:
        return request->type == COMMAND_ZEROES && (request->flags & FLAG_FAST_ZERO);
    case ESHUTDOWN:
        return rules->closing || client->dismissed;
    default:
        return false;
    }
}

static void judge_verdict(const struct client *client, const struct client_request *request, int error)
{
    if (request->expect && error == ESHUTDOWN && (client->rules->closing || client->dismissed))
        return;
    if (request->expect && error != request->expect)
        nv_sim_violation("connection %u: command %u flags %#x offset %llu length %llu got error %d, and %d is due",
                         client->id, request->type, request->flags, (unsigned long long)request->offset,
                         (unsigned long long)request->length, error, request->expect);
    if (!request->expect && error && !fair_error(client, request, error))
        nv_sim_violation("connection %u: command %u flags %#x offset %llu length %llu got error %d for no reason",
                         client->id, request->type, request->flags, (unsigned long long)request->offset,
                         (unsigned long long)request->length, error);
    if (!error && lacks_storage(client, request))
        nv_sim_violation("connection %u: a write of %llu bytes at %llu, where nothing is stored, succeeded", client->id,
                         (unsigned long long)request->length, (unsigned long long)request->offset);
    if (!error && request->must_fail && request->clears == client->rules->clears)
        nv_sim_violation("connection %u: command %u was called durable after a sync had failed", client->id,
                         request->type);
}

/* Two hosts never serve one volume: what was asked of the old one after the legs were fenced has no effect and no bytes. */
static void judge_late(const struct client *client, const struct client_request *request, int error)
{
    bool stored = client->rules->zero_to == 0;

    if (!error && request->late && !request->expect && stored &&
        (request->type == COMMAND_READ || request->type == COMMAND_WRITE))
        nv_sim_violation("connection %u: a deposed host has served command %u at %llu", client->id, request->type,
                         (unsigned long long)request->offset);
}

static void judge_read(const struct client *client, const struct client_request *request)
{
    const struct client_rules *rules = client->rules;

    if (request->got != request->length)
        nv_sim_violation("connection %u: a read of %llu bytes was answered with %llu", client->id,
                         (unsigned long long)request->length, (unsigned long long)request->got);
    if (request->length)
        check_read_answer(rules->check, request->sent, request->offset / rules->cell_bytes,
                          request->length / rules->cell_bytes, request->data);
}

/* The request is over: tell the judge, free the slot. */
static void conclude(struct client *client, struct client_request *request, int error)
{
    struct check *check = client->rules->check;

    if (client->deposed)
        judge_late(client, request, error);
    else
        judge_verdict(client, request, error);
    client->rules->answers++;
    onlooker_answered(client->rules->onlooker, request->cookie, error);
    if (client->rules->trace)
        printf("connection %u <- cookie %llu error %d\n", client->id, (unsigned long long)request->cookie, error);
    request->used = false;
    if (request->expect || request->late || request->stray)
        return;
    switch (request->type) {
    case COMMAND_WRITE:
    case COMMAND_TRIM:
    case COMMAND_ZEROES:
        check_write_answered(check, request->write, error == 0, request->flags & FLAG_FUA);
        if (!error && client->rules->acknowledged)
            client->rules->acknowledged(client->rules->context, request->offset / client->rules->cell_bytes,
                                        request->length / client->rules->cell_bytes);
        break;
    case COMMAND_READ:
        if (!error && !client->deposed)
            judge_read(client, request);
        check_read_over(check, request->sent);
        break;
    case COMMAND_STATUS:
        if (!error && !request->has_status)
            nv_sim_violation("connection %u: block status succeeded and said nothing", client->id);
        check_read_over(check, request->sent);
        break;
    case COMMAND_FLUSH:
        if (!error && !client->deposed)
            check_flush_answered(check, request->sent);
        break;
    default:
        break;
    }
}

/* ---- contents ---- */

static void take_content(struct client *client, struct client_request *request, uint64_t offset, uint64_t length,
                         const uint8_t *bytes)
{
    uint8_t *present;

    if (request->type != COMMAND_READ || offset < request->offset || length == 0 ||
        offset + length > request->offset + request->length)
        nv_sim_violation("connection %u: content for %llu bytes at %llu was not asked for", client->id,
                         (unsigned long long)length, (unsigned long long)offset);
    if (request->flags & FLAG_DF && request->content++)
        nv_sim_violation("connection %u: a read with DF was fragmented", client->id);
    if (!request->data)
        request->data = calloc(2, request->length);
    assert(request->data);
    present = request->data + request->length + (offset - request->offset);
    for (uint64_t i = 0; i < length; i++)
        if (present[i])
            nv_sim_violation("connection %u: byte %llu was sent twice", client->id, (unsigned long long)(offset + i));
    memset(present, 1, length);
    if (bytes)
        memcpy(request->data + (offset - request->offset), bytes, length);
    request->got += length;
}

/* Cells that are said to read as zeros must be allowed to. */
static void judge_zero_extent(const struct client *client, const struct client_request *request, uint64_t offset,
                              uint64_t length)
{
    const uint32_t cell = client->rules->cell_bytes;
    uint64_t end = offset + length;
    uint8_t zeros[512] = {0};

    assert(cell <= sizeof zeros);
    if (end > client->rules->cells * cell)
        end = client->rules->cells * cell;
    for (uint64_t at = (offset + cell - 1) / cell; (at + 1) * cell <= end; at++)
        check_read_answer(client->rules->check, request->sent, at, 1, zeros);
}

static void take_status(struct client *client, struct client_request *request, const struct chunk *chunk)
{
    const unsigned width = chunk->type == CHUNK_STATUS_EXT ? 8 : 4, head = chunk->type == CHUNK_STATUS_EXT ? 8 : 4;
    uint64_t count = chunk->length >= head ? (chunk->length - head) / (2 * width) : 0, sum = 0;
    uint64_t last_state = UINT64_MAX;

    if (request->type != COMMAND_STATUS || request->has_status || count == 0 ||
        chunk->length != head + count * 2 * width || get(chunk->body, 4) != client->context ||
        (width == 8 && get(chunk->body + 4, 4) != count) || (width == 8) != client->extended)
        nv_sim_violation("connection %u: a malformed block status of %llu bytes", client->id,
                         (unsigned long long)chunk->length);
    request->has_status = true;
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *entry = chunk->body + head + i * 2 * width;
        uint64_t length = get(entry, width), state = get(entry + width, width);
        if (length == 0 || sum >= request->length || state > 3 || state == last_state ||
            length % client->rules->block_min)
            nv_sim_violation("connection %u: extent %llu of block status: length %llu, state %llu", client->id,
                             (unsigned long long)i, (unsigned long long)length, (unsigned long long)state);
        if ((state & 2) && !client->deposed)
            judge_zero_extent(client, request, request->offset + sum, length);
        sum += length;
        last_state = state;
    }
    if ((request->flags & FLAG_REQ_ONE) && (count != 1 || sum > request->length))
        nv_sim_violation("connection %u: REQ_ONE got %llu extents, %llu bytes of %llu", client->id,
                         (unsigned long long)count, (unsigned long long)sum, (unsigned long long)request->length);
}

static void take_chunk(struct client *client, struct client_request *request, const struct chunk *chunk)
{
    uint64_t length = chunk->length;

    switch (chunk->type) {
    case CHUNK_NONE:
        if (length || !(chunk->flags & 1))
            nv_sim_violation("connection %u: a NONE chunk without DONE, or with %llu bytes", client->id,
                             (unsigned long long)length);
        break;
    case CHUNK_DATA:
        if (length < 9)
            nv_sim_violation("connection %u: a data chunk of %llu bytes", client->id, (unsigned long long)length);
        take_content(client, request, get(chunk->body, 8), length - 8, chunk->body + 8);
        break;
    case CHUNK_HOLE:
        if (length != 12)
            nv_sim_violation("connection %u: a hole chunk of %llu bytes", client->id, (unsigned long long)length);
        take_content(client, request, get(chunk->body, 8), get(chunk->body + 8, 4), NULL);
        break;
    case CHUNK_STATUS:
    case CHUNK_STATUS_EXT:
        take_status(client, request, chunk);
        break;
    case CHUNK_ERROR:
        if (length < 6 || get(chunk->body + 4, 2) != length - 6 || get(chunk->body, 4) == 0)
            nv_sim_violation("connection %u: a malformed error chunk of %llu bytes", client->id,
                             (unsigned long long)length);
        request->error = (int)get(chunk->body, 4);
        break;
    default:
        nv_sim_violation("connection %u: chunk type %u", client->id, chunk->type);
    }
    if (chunk->flags & 1)
        conclude(client, request, request->error);
}

/* ---- framing: each returns the bytes used, 0 when more are needed ---- */

static size_t understand_simple(struct client *client)
{
    struct client_request *request = find(client, get(client->rx + 8, 8));
    int error = (int)get(client->rx + 4, 4);
    uint64_t payload = request->type == COMMAND_READ && !error ? request->length : 0;

    if (client->extended || (client->structured && request->type == COMMAND_READ))
        nv_sim_violation("connection %u: a simple reply to command %u, where chunks were negotiated", client->id,
                         request->type);
    if (client->rx_size < 16 + payload)
        return 0;
    if (payload)
        take_content(client, request, request->offset, payload, client->rx + 16);
    conclude(client, request, error);
    return 16 + (size_t)payload;
}

static size_t understand_chunk(struct client *client, size_t header)
{
    struct client_request *request = find(client, get(client->rx + 8, 8));
    struct chunk chunk = {(uint16_t)get(client->rx + 4, 2), (uint16_t)get(client->rx + 6, 2), 0, client->rx + header};

    chunk.length = header == 32 ? get(client->rx + 24, 8) : get(client->rx + 16, 4);
    if (!client->structured || client->extended != (header == 32) || chunk.length > CHUNK_MAX - header)
        nv_sim_violation("connection %u: a chunk of %zu + %llu bytes that was not negotiated", client->id, header,
                         (unsigned long long)chunk.length);
    if (header == 32 && get(client->rx + 16, 8) != request->offset)
        nv_sim_violation("connection %u: an extended reply names offset %llu for a request at %llu", client->id,
                         (unsigned long long)get(client->rx + 16, 8), (unsigned long long)request->offset);
    if (client->rx_size < header + chunk.length)
        return 0;
    take_chunk(client, request, &chunk);
    return header + (size_t)chunk.length;
}

static size_t understand_one(struct client *client)
{
    if (client->rx_size < 16)
        return 0;
    switch (get(client->rx, 4)) {
    case 0x67446698u:
        return understand_simple(client);
    case 0x668e33efu:
        return client->rx_size < 20 ? 0 : understand_chunk(client, 20);
    case 0x6e8a278cu:
        return client->rx_size < 32 ? 0 : understand_chunk(client, 32);
    default:
        nv_sim_violation("connection %u: an answer starts with %#llx", client->id,
                         (unsigned long long)get(client->rx, 4));
    }
}

void client_understand(struct client *client)
{
    size_t used;

    while ((used = understand_one(client)) > 0) {
        client->rx_size -= used;
        memmove(client->rx, client->rx + used, client->rx_size);
    }
}
