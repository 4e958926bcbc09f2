/*
 * Reads whose blocks are in the cache: the reply is sent from the cache's frames, which the request keeps pinned until it
 * is released, as it would keep a buffer. Invariant: what one connection and one reactor may pin is bounded, so a client
 * that stalls takes little from the others; a read beyond that is copied from the cache (volume/cached.c).
 */
#include <assert.h>

#include "nbd/session.h"
#include "nbd/wire.h"

#define LINE 64u

/* The request that stands so many headers further on, if it is a read like this one: its block will be looked for. */
static void expect(const struct nv_conn *conn, uint32_t further, bool near)
{
    const struct nv_cached *cached = &conn->volume->cached;
    const uint32_t size = conn->header_bytes;
    const uint8_t *header = nv_chunk_data(conn->chunk) + conn->rx_start + further * size;
    struct nv_cache_spot spot = {cached->owner, nv_cache_tag(cached->cache, cached->owner), 0, false};

    if (conn->rx_end - conn->rx_start < (further + 1) * size || get16(header + 6) != NBD_CMD_READ)
        return;
    spot.block = get64(header + 16) >> NV_CACHE_SHIFT;
    nv_cache_expect(cached->cache, &spot, near);
}

bool nv_hit_take(struct nv_request *request)
{
    struct nv_conn *conn = request->conn;
    uint32_t count;

    if (conn->pins + NV_HIT_FRAMES > NV_HIT_PINS)
        return false;
    count = nv_cached_pin(conn->reactor, conn->local, request->offset, request->length, request->frames, NV_HIT_FRAMES);
    if (count == 0)
        return false;
    conn->pins += count;
    request->frame_count = (uint8_t)count;
    request->memory = NV_MEMORY_CACHE;
    request->buffer = nv_cache_bytes(conn->volume->cached.cache, request->frames[0]) +
                      (request->offset & (NV_CACHE_BLOCK - 1));
    for (uint32_t i = 0; i < NV_PREFETCH_BYTES && i < request->length; i += LINE)
        __builtin_prefetch(request->buffer + i); /* as in resident.c */
    expect(conn, 0, true);
    expect(conn, 1, false);
    return true;
}

void nv_hit_stage(struct nv_request *request)
{
    nv_volume_hit(&request->v);
    nv_conn_stage(request);
}

void nv_hit_release(struct nv_request *request)
{
    struct nv_conn *conn = request->conn;
    struct nv_cache *cache = conn->volume->cached.cache;

    assert(conn->pins >= request->frame_count && conn->reactor->pins >= request->frame_count);
    for (uint32_t i = 0; i < request->frame_count; i++)
        nv_cache_unpin(cache, request->frames[i]);
    conn->pins -= request->frame_count;
    conn->reactor->pins -= request->frame_count;
}

unsigned nv_hit_pieces(const struct nv_request *request, struct iovec *iov)
{
    const struct nv_cache *cache = request->conn->volume->cached.cache;
    uint64_t into = request->offset & (NV_CACHE_BLOCK - 1), left = request->length;
    unsigned pieces = 0;

    for (uint32_t i = 0; i < request->frame_count; i++) {
        uint8_t *at = nv_cache_bytes(cache, request->frames[i]) + into;
        const uint64_t take = left < NV_CACHE_BLOCK - into ? left : NV_CACHE_BLOCK - into;
        if (pieces > 0 && (uint8_t *)iov[pieces - 1].iov_base + iov[pieces - 1].iov_len == at)
            iov[pieces - 1].iov_len += take; /* what was read in one go often stands in one row */
        else
            iov[pieces++] = (struct iovec){at, take};
        into = 0;
        left -= take;
    }
    assert(left == 0);
    return pieces;
}
