/*
 * A remote export on its home reactor: pieces that come and go, its queue, its syncs, its life (nbd.h).
 *
 * Invariants: a piece is in the queue, in exactly one ask, or back with its owner; a piece has one request on the wire
 * at a time.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

#include "backend/nbd.h"
#include "reactor/plane.h"

/* ---- the queue ---- */

void nv_remote_wants_turn(struct nv_remote *remote)
{
    if (remote->queue)
        nv_reactor_late(remote->home, &remote->late);
}

void nv_remote_append(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->remote.next = NULL;
    *remote->queue_tail = piece;
    remote->queue_tail = &piece->remote.next;
    nv_count(&remote->counters.waiting, 1);
}

void nv_remote_push_front(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->remote.next = remote->queue;
    if (!remote->queue)
        remote->queue_tail = &piece->remote.next;
    remote->queue = piece;
    nv_count(&remote->counters.waiting, 1);
    nv_reactor_late(remote->home, &remote->late);
}

struct nv_piece *nv_remote_pop(struct nv_remote *remote)
{
    struct nv_piece *piece = remote->queue;

    remote->queue = piece->remote.next;
    if (!remote->queue)
        remote->queue_tail = &remote->queue;
    nv_count(&remote->counters.waiting, (uint64_t)-1);
    return piece;
}

struct nv_piece *nv_remote_pop_all(struct nv_remote *remote)
{
    struct nv_piece *all = remote->queue;

    remote->queue = NULL;
    remote->queue_tail = &remote->queue;
    for (const struct nv_piece *piece = all; piece; piece = piece->remote.next)
        nv_count(&remote->counters.waiting, (uint64_t)-1);
    return all;
}

/* ---- pieces come and go ---- */

static void arrive(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->remote.era = remote->era;
    piece->remote.sets = remote->sets;
    piece->remote.timeouts = 0;
    piece->remote.hangups = 0;
    piece->remote.shut_ns = 0;
    nv_remote_append(remote, piece);
    nv_reactor_late(remote->home, &remote->late);
}

static void piece_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_piece *piece = (struct nv_piece *)((char *)message - offsetof(struct nv_piece, remote.message));
    struct nv_remote *remote = nv_remote_of(piece->object);

    assert(remote->home == reactor);
    (void)reactor;
    arrive(remote, piece);
}

/* On the piece's own reactor. */
static void end(struct nv_piece *piece, const struct nv_reactor *reactor, int64_t result)
{
    if (piece->kind < NV_PIECE_KINDS) /* the remote's own flushes and probes are nobody's work */
        nv_piece_count(piece, reactor->index, result);
    piece->finished(piece, result);
}

static void piece_returns(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_piece *piece = (struct nv_piece *)((char *)message - offsetof(struct nv_piece, remote.message));

    assert(piece->reactor == reactor);
    end(piece, reactor, piece->answer);
}

static void start(struct nv_piece *piece)
{
    struct nv_remote *remote = nv_remote_of(piece->object);

    piece->moved = 0;
    piece->stage = NV_STAGE_FIRST;
    if (piece->reactor == remote->home) {
        arrive(remote, piece);
    } else {
        piece->remote.message.run = piece_arrives;
        nv_reactor_send(remote->home, &piece->remote.message);
    }
}

void nv_remote_start(struct nv_piece *piece)
{
    assert(piece->length > 0 && piece->finished && piece->kind >= NV_PIECE_READ && piece->kind <= NV_PIECE_PREFETCH);
    start(piece);
}

void nv_remote_finish(struct nv_remote *remote, struct nv_piece *piece, int64_t result)
{
    if (piece->reactor == remote->home) {
        end(piece, remote->home, result);
    } else {
        piece->answer = result;
        piece->remote.message.run = piece_returns;
        nv_reactor_send(piece->reactor, &piece->remote.message);
    }
}

/* ---- syncs ---- */

static void sync_finished(struct nv_piece *piece, int64_t result)
{
    nv_sync_ran(&piece->object->sync, result);
}

void nv_remote_sync(struct nv_sync *sync, struct nv_reactor *reactor)
{
    struct nv_object *object = (struct nv_object *)((char *)sync - offsetof(struct nv_object, sync));
    struct nv_piece *piece = &nv_remote_of(object)->sync_piece;

    *piece = (struct nv_piece){.reactor = reactor, .object = object, .kind = NV_PIECE_FLUSH, .finished = sync_finished};
    start(piece);
}

/* ---- life ---- */

void nv_remote_opens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_remote *remote = (struct nv_remote *)((char *)message - offsetof(struct nv_remote, open_message));

    assert(remote->home == reactor);
    remote->next = reactor->remotes;
    remote->back = &reactor->remotes;
    if (remote->next)
        remote->next->back = &remote->next;
    reactor->remotes = remote;
    remote->stopping = reactor->stopping;
}

struct nv_remote *nv_remote_create(struct nv_plane *plane, struct nv_reactor *home, const nv_remote_config *config)
{
    struct nv_remote *remote = calloc(1, sizeof *remote);

    if (!remote)
        return NULL;
    remote->probe_data = malloc(config->align);
    if (!remote->probe_data || nv_object_counts(&remote->object, plane->config.reactors) != 0) {
        free(remote->probe_data);
        free(remote);
        return NULL;
    }
    remote->plane = plane;
    remote->home = home;
    remote->queue_tail = &remote->queue;
    remote->late.run = nv_remote_run;
    remote->timeout_ticks = (config->timeout_ms + NV_TICK_MS - 1) / NV_TICK_MS;
    remote->hold_ns = config->hold_ms * 1000000ull;
    remote->patience = config->hold_ms / config->timeout_ms + 1;
    remote->write_through = config->flags & NV_REMOTE_WRITE_THROUGH;
    remote->flush_first = config->flags & NV_REMOTE_FLUSH_FIRST && !(config->flags & NV_REMOTE_READ_ONLY);
    remote->object.kind = NV_KIND_NBD;
    remote->object.handle = -1;
    remote->object.flags = config->flags & NV_REMOTE_READ_ONLY ? NV_OBJECT_READ_ONLY : 0;
    remote->object.align = config->align;
    remote->object.memory_align = 1;
    atomic_store(&remote->object.size, config->size);
    return remote;
}

void nv_remote_free(struct nv_remote *remote)
{
    assert(!remote->queue && !remote->links);
    free(remote->probe_data);
    free(remote->object.counters);
    free(remote);
}

void nv_remote_gives_up(struct nv_remote *remote, bool yes)
{
    remote->gave_up = yes && remote->serving_count == 0;
    if (remote->gave_up)
        nv_reactor_late(remote->home, &remote->late);
}

void nv_remote_stops(struct nv_remote *remote)
{
    remote->stopping = true;
    for (struct nv_link *link = remote->links; link; link = link->next)
        nv_link_expire(link);
    nv_reactor_late(remote->home, &remote->late);
}

void nv_remote_ends(struct nv_remote *remote)
{
    remote->ending = true;
    for (struct nv_link *link = remote->links, *next; link; link = next) {
        next = link->next;
        nv_link_leave(link);
        nv_link_expire(link);
    }
    nv_reactor_late(remote->home, &remote->late); /* a probe may still wait */
}

static void forget(struct nv_remote *remote)
{
    nv_remote_run(&remote->late);
    nv_reactor_drop_late(remote->home, &remote->late);
    assert(!remote->queue && !remote->links && remote->serving_count == 0);
    *remote->back = remote->next;
    if (remote->next)
        remote->next->back = remote->back;
    nv_remote_closed(remote);
}

void nv_remote_closes(struct nv_remote *remote)
{
    nv_remote_ends(remote);
    remote->closing = true;
    nv_remote_link_ended(remote);
}

void nv_remote_link_ended(struct nv_remote *remote)
{
    if (remote->closing && !remote->links)
        forget(remote);
}
