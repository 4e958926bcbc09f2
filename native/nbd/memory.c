/*
 * A connection's memory: request slots, receive chunks and payload buffers. Invariants: slots, chunks and buffers are
 * allocated before they are needed; at most one request uses the private payload memory; a request that finds none
 * waits while another one of the same connection is in flight, so it is always woken by a release.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/session.h"
#include "volume/logged.h"

static uint64_t connection_cap(const struct nv_reactor *reactor)
{
    return nv_pool_total(reactor->pool) / 4;
}

static uint64_t volume_cap(const struct nv_reactor *reactor)
{
    return nv_pool_total(reactor->pool) / 2;
}

/* At its own or its volume's cap: more free memory in the pool would not help. */
static bool capped(const struct nv_conn *conn, uint32_t size)
{
    const uint64_t cost = nv_pool_cost(size);

    return conn->pool_bytes + cost > connection_cap(conn->reactor) ||
           conn->local->pool_bytes + cost > volume_cap(conn->reactor);
}

static void *take_pool(struct nv_conn *conn, uint32_t size)
{
    const uint64_t cost = nv_pool_cost(size);
    void *block = capped(conn, size) ? NULL : nv_pool_get(conn->reactor->pool, size);

    if (block) {
        conn->pool_bytes += cost;
        conn->local->pool_bytes += cost;
    }
    return block;
}

static void give_pool(struct nv_conn *conn, void *block, uint64_t cost)
{
    assert(conn->pool_bytes >= cost && conn->local->pool_bytes >= cost);
    conn->pool_bytes -= cost;
    conn->local->pool_bytes -= cost;
    nv_pool_put(conn->reactor->pool, block);
    conn->reactor->pool_freed = true;
}

struct nv_request *nv_request_take(struct nv_conn *conn)
{
    struct nv_request *request = conn->free_slots;

    if (request)
        conn->free_slots = request->next;
    else if (conn->slots_touched < NV_REQUESTS_PER_CONNECTION)
        request = &conn->slots[conn->slots_touched++];
    else
        return NULL;
    assert(request->memory == NV_MEMORY_NONE);
    request->conn = conn;
    request->status = 0;
    request->text[0] = 0;
    request->encoded = false;
    conn->in_flight++;
    return request;
}

void nv_chunk_return(struct nv_conn *conn, struct nv_chunk *chunk)
{
    assert(chunk->refs == 0 && !chunk->is_private);
    give_pool(conn, chunk, nv_pool_cost(NV_RX_CHUNK));
}

static void unpin(struct nv_conn *conn, struct nv_chunk *chunk)
{
    assert(chunk->refs > 0);
    if (--chunk->refs == 0 && !chunk->is_private)
        nv_chunk_return(conn, chunk);
}

void nv_request_keep(struct nv_vreq *v)
{
    struct nv_request *request = (struct nv_request *)v;

    if (v->flags & NV_REQUEST_BELOW) /* the log's: it looks at its pins when it is over */
        return;
    if (request->memory != NV_MEMORY_KEPT) {
        request->kept_memory = request->memory;
        request->kept_buffer = request->buffer;
        request->memory = NV_MEMORY_KEPT;
        request->over = false;
    }
    if (v->rescue)
        request->buffer = v->rescue;
}

/* False: a late operation still uses the memory; the last one's end comes here again. */
static bool take_kept(struct nv_request *request)
{
    request->over = true;
    if (request->v.pins > 0)
        return false;
    free(request->v.rescue);
    request->v.rescue = NULL;
    request->memory = request->kept_memory;
    request->buffer = request->kept_buffer;
    return true;
}

void nv_request_unpin(struct nv_vreq *v)
{
    struct nv_request *request = (struct nv_request *)v;

    if (v->flags & NV_REQUEST_BELOW) {
        nv_logged_unpin(v);
        return;
    }
    assert(v->pins > 0 && request->memory == NV_MEMORY_KEPT);
    if (--v->pins == 0 && request->over)
        nv_request_release(request);
}

void nv_request_release(struct nv_request *request)
{
    struct nv_conn *conn = request->conn;

    if (request->memory == NV_MEMORY_KEPT && !take_kept(request))
        return;
    if (request->memory == NV_MEMORY_POOL)
        give_pool(conn, request->buffer, request->pool_cost);
    else if (request->memory == NV_MEMORY_PRIVATE)
        conn->private_busy = false;
    else if (request->memory == NV_MEMORY_CHUNK)
        unpin(conn, request->chunk);
    else if (request->memory == NV_MEMORY_CACHE)
        nv_hit_release(request);
    else if (request->memory == NV_MEMORY_VIEW) /* never sent: the volume still counts on it */
        nv_volume_abandon(&request->v);
    request->memory = NV_MEMORY_NONE;
    request->next = conn->free_slots;
    conn->free_slots = request;
    assert(conn->in_flight > 0);
    conn->in_flight--;
    nv_reactor_kick(conn->reactor, conn);
}

bool nv_request_buffer(struct nv_request *request, uint32_t size)
{
    struct nv_conn *conn = request->conn;
    struct nv_reactor *reactor = conn->reactor;
    const bool my_turn = !reactor->starving || reactor->starving == conn;

    assert(request->memory == NV_MEMORY_NONE && size > 0 && size <= NV_PAYLOAD_MAX);
    request->buffer = my_turn ? take_pool(conn, size) : NULL;
    if (request->buffer) {
        request->memory = NV_MEMORY_POOL;
        request->pool_cost = nv_pool_cost(size);
    } else if (!conn->private_busy) {
        request->buffer = conn->private_payload;
        request->memory = NV_MEMORY_PRIVATE;
        conn->private_busy = true;
        conn->private_touched = true;
        nv_reactor_want_tick(reactor);
    } else {
        nv_count(&reactor->counters.pool_waits, conn->rx_waiting ? 0 : 1);
        conn->rx_waiting = true;
        if (capped(conn, size)) /* its own next release wakes it; in the queue it would hold up the others */
            nv_reactor_unstarve(reactor, conn);
        else
            nv_reactor_starve(reactor, conn);
        return false;
    }
    conn->rx_waiting = false;
    nv_reactor_unstarve(reactor, conn);
    return true;
}

void nv_request_pin(struct nv_request *request, uint8_t *payload)
{
    struct nv_chunk *chunk = request->conn->chunk;

    assert(payload >= nv_chunk_data(chunk) && payload < nv_chunk_data(chunk) + NV_CHUNK_CAPACITY);
    chunk->refs++;
    request->chunk = chunk;
    request->buffer = payload;
    request->memory = NV_MEMORY_CHUNK;
}

/* Make `chunk` current; what is not parsed yet moves over (a partial header or small payload). */
static void switch_chunk(struct nv_conn *conn, struct nv_chunk *chunk)
{
    const uint32_t length = conn->rx_end - conn->rx_start;
    struct nv_chunk *old = conn->chunk;

    assert(chunk->refs == 0);
    memcpy(nv_chunk_data(chunk), nv_chunk_data(old) + conn->rx_start, length);
    nv_count(&conn->reactor->counters.copies_bytes, length);
    chunk->refs = 1;
    conn->chunk = chunk;
    conn->rx_start = 0;
    conn->rx_end = length;
    unpin(conn, old);
}

static struct nv_chunk *fresh_chunk(struct nv_conn *conn)
{
    struct nv_chunk *chunk;

    if (conn->private_chunk->refs == 0)
        return conn->private_chunk;
    if (conn->reactor->starving || !(chunk = take_pool(conn, NV_RX_CHUNK)))
        return NULL;
    *chunk = (struct nv_chunk){0};
    nv_reactor_want_tick(conn->reactor); /* an idle connection gives it back */
    return chunk;
}

bool nv_chunk_room(struct nv_conn *conn, uint32_t need)
{
    struct nv_chunk *fresh;
    const uint32_t length = conn->rx_end - conn->rx_start;

    assert(need > 0 && need <= NV_CHUNK_CAPACITY && length < need);
    if (conn->chunk->refs == 1 && length == 0)
        conn->rx_start = conn->rx_end = 0;
    if (length == 0 && !conn->chunk->is_private && conn->private_chunk->refs == 0)
        switch_chunk(conn, conn->private_chunk);
    if (conn->rx_start + need <= NV_CHUNK_CAPACITY && NV_CHUNK_CAPACITY - conn->rx_end >= NV_RX_CHUNK / 8)
        return true;
    if (conn->chunk->refs == 1) {
        memmove(nv_chunk_data(conn->chunk), nv_chunk_data(conn->chunk) + conn->rx_start, length);
        nv_count(&conn->reactor->counters.copies_bytes, length);
        conn->rx_start = 0;
        conn->rx_end = length;
        return true;
    }
    fresh = fresh_chunk(conn);
    if (fresh)
        switch_chunk(conn, fresh);
    return conn->rx_start + need <= NV_CHUNK_CAPACITY;
}
