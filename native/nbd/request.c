/*
 * Is a request well-formed and allowed? Pure: looks at the connection's parameters and the volume's present map,
 * changes nothing but the request. The order of checks is: command, flags, server state, read-only, range, alignment,
 * size; rules and error numbers are the protocol's (reference: sections 1.7 to 1.12 and 1.15).
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "nbd/session.h"
#include "nbd/wire.h"

int nv_request_fail(struct nv_request *request, int error, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(request->text, sizeof request->text, format, arguments);
    va_end(arguments);
    request->status = error;
    return error;
}

/* Numbers on the wire are the protocol's, which are Linux's for these eight. */
static int wire_error(int error)
{
    switch (error) {
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case EOPNOTSUPP:
    case ESHUTDOWN:
        return error;
    case EROFS:
    case EACCES:
        return EPERM;
    case EDQUOT:
    case EFBIG:
        return ENOSPC;
    default:
        return EIO;
    }
}

void nv_request_failed_io(struct nv_request *request, int error)
{
    assert(error < 0);
    if (request->type == NBD_CMD_WRITE_ZEROES && error == -EOPNOTSUPP)
        nv_request_fail(request, EOPNOTSUPP, "zeroing here would mean writing zeros; send it without FAST_ZERO");
    else
        nv_request_fail(request, wire_error(error == -EOPNOTSUPP ? EIO : -error), "%s at %" PRIu64 " failed: errno %d",
                        request->type == NBD_CMD_FLUSH ? "making data durable" : "I/O", request->offset, -error);
}

bool nv_request_decode(struct nv_request *request, const uint8_t *header)
{
    const bool extended = request->conn->params.flags & NV_CONN_EXTENDED;

    if (get32(header) != (extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC))
        return false;
    request->flags = get16(header + 4);
    request->type = get16(header + 6);
    request->cookie = get64(header + 8);
    request->offset = get64(header + 16);
    request->length = extended ? get64(header + 24) : get32(header + 24);
    request->payload = 0;
    if (request->type == NBD_CMD_WRITE || (extended && (request->flags & NBD_CMD_FLAG_PAYLOAD_LEN))) {
        if (request->length > NV_PAYLOAD_MAX)
            return false; /* longer than anything that must be taken in */
        request->payload = (uint32_t)request->length;
    }
    return true;
}

static int check_command(struct nv_request *request)
{
    const uint32_t tflags = request->conn->params.tflags;
    static const struct {
        uint16_t type;
        uint32_t needs;
        const char *name;
    } optional[] = {
        {NBD_CMD_FLUSH, NBD_FLAG_SEND_FLUSH, "FLUSH"},
        {NBD_CMD_TRIM, NBD_FLAG_SEND_TRIM, "TRIM"},
        {NBD_CMD_WRITE_ZEROES, NBD_FLAG_SEND_WRITE_ZEROES, "WRITE_ZEROES"},
    };

    if (request->type > NBD_CMD_BLOCK_STATUS)
        return nv_request_fail(request, EINVAL, "command %u is unknown", request->type);
    if ((request->conn->params.flags & NV_CONN_READ_ONLY) || (tflags & NBD_FLAG_READ_ONLY))
        return 0; /* a read-only export advertises none of them: EPERM is the better answer */
    for (size_t i = 0; i < sizeof optional / sizeof optional[0]; i++)
        if (request->type == optional[i].type && !(tflags & optional[i].needs))
            return nv_request_fail(request, EINVAL, "%s was not offered", optional[i].name);
    return 0;
}

static int check_flags(struct nv_request *request)
{
    const nv_connection_params *params = &request->conn->params;
    const bool extended = params->flags & NV_CONN_EXTENDED;
    uint32_t allowed = params->tflags & NBD_FLAG_SEND_FUA ? NBD_CMD_FLAG_FUA : 0;

    switch (request->type) {
    case NBD_CMD_READ:
        allowed |= (params->flags & NV_CONN_STRUCTURED) && (params->tflags & NBD_FLAG_SEND_DF) ? NBD_CMD_FLAG_DF : 0;
        break;
    case NBD_CMD_WRITE:
        allowed |= extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
        break;
    case NBD_CMD_WRITE_ZEROES:
        allowed |= NBD_CMD_FLAG_NO_HOLE | (params->tflags & NBD_FLAG_SEND_FAST_ZERO ? NBD_CMD_FLAG_FAST_ZERO : 0);
        break;
    case NBD_CMD_BLOCK_STATUS:
        allowed |= NBD_CMD_FLAG_REQ_ONE;
        allowed |= extended && (params->tflags & NBD_FLAG_BLOCK_STATUS_PAYLOAD) ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
        break;
    default:
        break;
    }
    if (request->flags & ~allowed)
        return nv_request_fail(request, EINVAL, "flags 0x%x are not allowed on command %u", request->flags & ~allowed,
                               request->type);
    if (extended && request->type == NBD_CMD_WRITE && !(request->flags & NBD_CMD_FLAG_PAYLOAD_LEN))
        return nv_request_fail(request, EINVAL, "WRITE with an extended header must set PAYLOAD_LEN");
    return 0;
}

static bool changes(const struct nv_request *request)
{
    return request->type == NBD_CMD_WRITE || request->type == NBD_CMD_TRIM || request->type == NBD_CMD_WRITE_ZEROES;
}

static int check_access(struct nv_request *request)
{
    const struct nv_conn *conn = request->conn;
    const struct nv_map *map = conn->local->map;

    if (conn->closing)
        return nv_request_fail(request, ESHUTDOWN, "the export is being closed");
    if (changes(request) && ((conn->params.flags & NV_CONN_READ_ONLY) || (conn->params.tflags & NBD_FLAG_READ_ONLY) ||
                             (map->flags & NV_VOLUME_READ_ONLY)))
        return nv_request_fail(request, EPERM, "the export is read-only");
    return 0;
}

static int check_range(struct nv_request *request)
{
    const struct nv_map *map = request->conn->local->map;
    const uint32_t unit = request->conn->params.block_min > map->block_min ? request->conn->params.block_min
                                                                           : map->block_min;
    const bool grows = request->type == NBD_CMD_WRITE || request->type == NBD_CMD_WRITE_ZEROES;

    if (request->offset > map->size || request->length > map->size - request->offset)
        return nv_request_fail(request, grows ? ENOSPC : EINVAL,
                               "%" PRIu64 " bytes at %" PRIu64 " reach past the end at %" PRIu64, request->length,
                               request->offset, map->size);
    if ((request->offset | request->length) & (unit - 1))
        return nv_request_fail(request, EINVAL, "%" PRIu64 " bytes at %" PRIu64 " are not multiples of the block %u",
                               request->length, request->offset, unit);
    return 0;
}

static int check_size(struct nv_request *request)
{
    const nv_connection_params *params = &request->conn->params;
    const bool structured = params->flags & (NV_CONN_STRUCTURED | NV_CONN_EXTENDED);

    if (request->type != NBD_CMD_READ && request->type != NBD_CMD_WRITE)
        return 0;
    if (request->length <= params->payload_max)
        return 0;
    return nv_request_fail(request, request->type == NBD_CMD_READ && structured ? EOVERFLOW : EINVAL,
                           "%" PRIu64 " bytes are above the maximum payload of %u", request->length,
                           params->payload_max);
}

static int check_status(struct nv_request *request)
{
    const nv_connection_params *params = &request->conn->params;

    if (!(params->flags & (NV_CONN_STRUCTURED | NV_CONN_EXTENDED)) || params->context_count == 0)
        return nv_request_fail(request, EINVAL, "no meta context was selected");
    if (request->length == 0)
        return nv_request_fail(request, EINVAL, "block status of 0 bytes");
    request->contexts = (uint16_t)((1u << params->context_count) - 1);
    return 0;
}

int nv_request_check(struct nv_request *request)
{
    const bool ranged = request->type != NBD_CMD_FLUSH && request->type != NBD_CMD_DISC;
    int error;

    request->status = 0;
    if ((error = check_command(request)) || (error = check_flags(request)) || (error = check_access(request)))
        return error;
    if (request->type == NBD_CMD_BLOCK_STATUS && request->payload > 0)
        return 0; /* the range comes with the payload */
    if (ranged && (error = check_range(request)))
        return error;
    if (request->type == NBD_CMD_BLOCK_STATUS)
        return check_status(request);
    return check_size(request);
}

int nv_request_select(struct nv_request *request, const uint8_t *payload)
{
    const nv_connection_params *params = &request->conn->params;
    const uint32_t count = (request->payload - 8) / 4;
    uint16_t chosen = 0;
    int error;

    assert(request->payload >= 8 && (request->payload - 8) % 4 == 0);
    request->length = get64(payload);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t id = get32(payload + 8 + 4 * i), index = 0;
        while (index < params->context_count && params->contexts[index].id != id)
            index++;
        if (index == params->context_count || (chosen & (1u << index)))
            return nv_request_fail(request, EINVAL, "meta context %u is %s", id,
                                   index == params->context_count ? "not selected" : "named twice");
        chosen |= (uint16_t)(1u << index);
    }
    if ((error = check_range(request)) || (error = check_status(request)))
        return error;
    request->contexts = chosen;
    return chosen ? 0 : nv_request_fail(request, EINVAL, "no meta context named");
}
