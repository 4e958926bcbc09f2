/*
 * Answers to bytes. One function builds a reply as a list of pieces in the request's own memory; nothing is allocated
 * and no payload is copied. Which form: simple replies unless structured replies were negotiated; with them, chunks for
 * READ, BLOCK_STATUS and every error; with extended headers, extended chunks for all.
 */
#include <assert.h>

#include "nbd/session.h"
#include "nbd/wire.h"

#define STATUS_HEADER 48u /* room for one context's chunk header, behind the extents */

static bool extended(const struct nv_request *request)
{
    return request->conn->params.flags & NV_CONN_EXTENDED;
}

static uint8_t *put_chunk(const struct nv_request *request, uint8_t *to, uint16_t flags, uint16_t type,
                          uint64_t length)
{
    to = put32(to, extended(request) ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    to = put16(to, flags);
    to = put16(to, type);
    to = put64(to, request->cookie);
    if (!extended(request))
        return put32(to, (uint32_t)length);
    to = put64(to, request->offset);
    return put64(to, length);
}

/* Of a READ. */
static unsigned payload(const struct nv_request *request, struct iovec *iov)
{
    if (request->memory == NV_MEMORY_CACHE)
        return nv_hit_pieces(request, iov);
    iov[0] = (struct iovec){request->buffer, request->length};
    return 1;
}

static unsigned build_simple(struct nv_request *request, struct iovec *iov)
{
    uint8_t *to = put32(request->header, NBD_SIMPLE_REPLY_MAGIC);

    to = put32(to, (uint32_t)request->status);
    put64(to, request->cookie);
    iov[0] = (struct iovec){request->header, NBD_SIMPLE_BYTES};
    if (request->type != NBD_CMD_READ || request->status || request->length == 0)
        return 1;
    return 1 + payload(request, &iov[1]);
}

static unsigned build_error(struct nv_request *request, struct iovec *iov)
{
    const size_t text = strnlen(request->text, sizeof request->text);
    uint8_t *to = put_chunk(request, request->header, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 6 + text);

    to = put32(to, (uint32_t)request->status);
    to = put16(to, (uint16_t)text);
    iov[0] = (struct iovec){request->header, (size_t)(to - request->header)};
    iov[1] = (struct iovec){request->text, text};
    return text ? 2 : 1;
}

static unsigned build_data(struct nv_request *request, struct iovec *iov)
{
    uint8_t *to = put_chunk(request, request->header, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA,
                            8 + request->length);

    to = put64(to, request->offset);
    assert((size_t)(to - request->header) <= sizeof request->header);
    iov[0] = (struct iovec){request->header, (size_t)(to - request->header)};
    return 1 + payload(request, &iov[1]);
}

/*
 * Rewrite the extents as their wire form, in place and once (a reply that a full socket did not take is built again): an
 * entry on the wire is never larger than ours.
 */
static size_t encode_extents(struct nv_request *request, uint32_t count)
{
    const struct nv_extent *extents = request->v.extents;
    uint8_t *to = request->buffer;

    if (request->encoded)
        return count * (extended(request) ? 16u : 8u);
    request->encoded = true;
    for (uint32_t i = 0; i < count; i++) {
        const struct nv_extent extent = extents[i];
        to = extended(request) ? put64(to, extent.length) : put32(to, (uint32_t)extent.length);
        to = extended(request) ? put64(to, extent.flags) : put32(to, extent.flags);
    }
    return (size_t)(to - request->buffer);
}

static unsigned build_status(struct nv_request *request, struct iovec *iov)
{
    const nv_connection_params *params = &request->conn->params;
    const uint32_t count = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : request->v.extents_count;
    uint8_t *header = request->buffer + 2u * request->v.extents_max * sizeof(struct nv_extent);
    const size_t bytes = encode_extents(request, count);
    unsigned pieces = 0;
    uint16_t left = request->contexts;

    assert(count > 0 && left != 0);
    for (uint32_t i = 0; left; i++) {
        if (!(left & (1u << i)))
            continue;
        left &= (uint16_t)~(1u << i);
        uint16_t flags = left ? 0 : NBD_REPLY_FLAG_DONE;
        uint16_t type = extended(request) ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS;
        uint8_t *to = put_chunk(request, header, flags, type, (extended(request) ? 8 : 4) + bytes);
        to = put32(to, params->contexts[i].id);
        if (extended(request))
            to = put32(to, count);
        iov[pieces++] = (struct iovec){header, (size_t)(to - header)};
        iov[pieces++] = (struct iovec){request->buffer, bytes};
        header += STATUS_HEADER;
    }
    return pieces;
}

unsigned nv_reply_pieces(const struct nv_request *request)
{
    if (request->memory == NV_MEMORY_CACHE)
        return 1u + request->frame_count;
    return request->type == NBD_CMD_BLOCK_STATUS ? 2u * NV_CONTEXTS_MAX : 2u;
}

unsigned nv_reply_build(struct nv_request *request, struct iovec *iov)
{
    const bool structured = request->conn->params.flags & (NV_CONN_STRUCTURED | NV_CONN_EXTENDED);

    if (!structured)
        return build_simple(request, iov);
    if (request->status)
        return build_error(request, iov);
    if (request->type == NBD_CMD_READ && request->length > 0)
        return build_data(request, iov);
    if (request->type == NBD_CMD_BLOCK_STATUS)
        return build_status(request, iov);
    if (request->type != NBD_CMD_READ && !extended(request))
        return build_simple(request, iov);
    uint8_t *to = put_chunk(request, request->header, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0);
    iov[0] = (struct iovec){request->header, (size_t)(to - request->header)};
    return 1;
}
