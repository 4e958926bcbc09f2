/*
 * Which link takes the next piece, and which request it becomes there (nbd.h). Pieces are handed to links late in a
 * turn, so that all of a turn's requests leave in one send a link.
 */
#include <assert.h>
#include <errno.h>

#include "backend/nbd.h"
#include "reactor/reactor.h"

/* ---- which link ---- */

static bool has_room(const struct nv_link *link, uint64_t payload)
{
    return !link->retiring && !link->parting && !link->alone && link->in_flight < NV_LINK_ASKS &&
           (link->in_flight == 0 || link->bytes + payload <= NV_LINK_BYTES);
}

/* Fill one link so far that its requests share a send, then go on with the emptiest. NULL: none has room. */
static struct nv_link *choose(struct nv_remote *remote, uint64_t payload)
{
    struct nv_link *best = NULL;

    if (remote->current < remote->serving_count) {
        struct nv_link *link = remote->serving[remote->current];
        if (link->in_flight < NV_LINK_BATCH && link->bytes < NV_LINK_BATCH_BYTES && has_room(link, payload))
            return link;
    }
    for (uint32_t i = 0; i < remote->serving_count; i++) {
        struct nv_link *link = remote->serving[i];
        if (has_room(link, payload) && (!best || link->in_flight < best->in_flight)) {
            best = link;
            remote->current = i;
        }
    }
    return best;
}

/* It has cost links their lives, or was beside what did: it goes alone, so that the next loss says which it was. */
static struct nv_link *choose_empty(const struct nv_remote *remote)
{
    for (uint32_t i = 0; i < remote->serving_count; i++)
        if (remote->serving[i]->in_flight == 0 && has_room(remote->serving[i], 0))
            return remote->serving[i];
    return NULL;
}

static uint64_t at_most(uint64_t value, uint64_t limit)
{
    return value < limit ? value : limit;
}

static uint64_t payload_of(const struct nv_piece *piece)
{
    const bool carries = piece->kind == NV_PIECE_READ || piece->kind == NV_PIECE_WRITE || piece->kind == NV_PIECE_PROBE;

    return carries ? piece->length - piece->moved : 0;
}

static struct nv_link *link_for(struct nv_remote *remote, const struct nv_piece *piece)
{
    if (__builtin_expect(piece->remote.hangups >= NV_PIECE_SUSPECT, 0))
        return choose_empty(remote);
    return choose(remote, payload_of(piece));
}

/* ---- which request ---- */

bool nv_piece_flushes(const struct nv_piece *piece)
{
    return piece->kind == NV_PIECE_FLUSH || piece->stage == NV_STAGE_FLUSH;
}

static uint16_t fua(const struct nv_link *link, const struct nv_piece *piece)
{
    const bool wanted = link->remote->write_through || (piece->kind == NV_PIECE_WRITE && (piece->flags & NV_PIECE_DSYNC));

    return wanted && (link->params.tflags & NBD_FLAG_SEND_FUA) ? NBD_CMD_FLAG_FUA : 0;
}

/* Can the server zero this as it is asked to? If not: by writing zeros, or -EOPNOTSUPP for a caller in a hurry. */
static bool zero_by_command(const struct nv_link *link, const struct nv_piece *piece)
{
    const uint32_t needs = NBD_FLAG_SEND_WRITE_ZEROES | (piece->flags & NV_PIECE_FAST ? NBD_FLAG_SEND_FAST_ZERO : 0);

    return piece->stage == NV_STAGE_FIRST && (link->params.tflags & needs) == needs;
}

static void ask(struct nv_link *link, struct nv_piece *piece, uint16_t command, uint16_t flags, uint64_t limit)
{
    struct nv_remote *remote = link->remote;
    struct nv_ask *ask = nv_ask_take(link, piece);

    ask->command = command;
    ask->flags = flags;
    ask->offset = command == NBD_CMD_FLUSH ? 0 : piece->offset + piece->moved;
    ask->length = command == NBD_CMD_FLUSH ? 0 : at_most(piece->length - piece->moved, limit);
    ask->covers = remote->acked;
    ask->stamp = remote->arrivals;
    if (command == NBD_CMD_READ || command == NBD_CMD_WRITE)
        link->bytes += ask->length;
    link->flushes += command == NBD_CMD_FLUSH;
    link->alone = piece->remote.hangups >= NV_PIECE_SUSPECT;
    nv_count(&remote->counters.asked, 1);
    nv_link_queue(ask);
}

/* What a sync is to make durable was acknowledged in its own era. */
static void ask_flush(struct nv_link *link, struct nv_piece *piece)
{
    if (piece->kind == NV_PIECE_FLUSH && piece->remote.era != link->remote->era)
        nv_remote_finish(link->remote, piece, -EIO); /* it may be lost */
    else if (link->params.tflags & NBD_FLAG_SEND_FLUSH)
        ask(link, piece, NBD_CMD_FLUSH, 0, 0);
    else /* such a server is written to with FUA only, or not at all */
        nv_remote_finish(link->remote, piece, nv_remote_owes(link->remote) ? -EIO : 0);
}

static void ask_zero(struct nv_link *link, struct nv_piece *piece)
{
    const uint16_t flags = (uint16_t)(fua(link, piece) | (piece->flags & NV_PIECE_NO_HOLE ? NBD_CMD_FLAG_NO_HOLE : 0) |
                                      (piece->flags & NV_PIECE_FAST ? NBD_CMD_FLAG_FAST_ZERO : 0));

    if (zero_by_command(link, piece)) {
        ask(link, piece, NBD_CMD_WRITE_ZEROES, flags, NV_REMOTE_ZERO_PIECE);
    } else if (piece->flags & NV_PIECE_FAST) {
        nv_remote_finish(link->remote, piece, -EOPNOTSUPP);
    } else {
        piece->stage = NV_STAGE_WRITE_ZEROS;
        ask(link, piece, NBD_CMD_WRITE, fua(link, piece), at_most(link->params.payload_max, NV_ZERO_PIECE));
    }
}

/* All data: always a safe answer. */
static void answer_as_data(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->extents[0] = (struct nv_extent){piece->length, 0};
    nv_remote_finish(remote, piece, 1);
}

/* A change on its way. False: it is finished, because an older one may still be carried out there. */
static bool fit_to_change(struct nv_remote *remote, struct nv_piece *piece)
{
    if (piece->remote.sets != remote->sets) { /* a part went with the server that acknowledged it: all of it once more */
        piece->remote.sets = remote->sets;
        piece->moved = 0;
        piece->stage = NV_STAGE_FIRST;
    }
    if (__builtin_expect(remote->doubt_count == 0, 1) || !nv_remote_doubts(remote, piece))
        return true;
    nv_remote_finish(remote, piece, -EIO);
    return false;
}

/* Put the next request of a piece on the link, or finish the piece if the server has nothing for it. */
static void dispatch(struct nv_link *link, struct nv_piece *piece)
{
    const uint32_t tflags = link->params.tflags;
    struct nv_remote *remote = link->remote;

    if (nv_piece_changes(piece) && !fit_to_change(remote, piece))
        return;
    if (nv_piece_flushes(piece)) {
        ask_flush(link, piece);
        return;
    }
    switch (piece->kind) {
    case NV_PIECE_READ:
    case NV_PIECE_PROBE:
        ask(link, piece, NBD_CMD_READ, 0, link->params.payload_max);
        break;
    case NV_PIECE_WRITE:
        ask(link, piece, NBD_CMD_WRITE, fua(link, piece), link->params.payload_max);
        break;
    case NV_PIECE_ZERO:
        ask_zero(link, piece);
        break;
    case NV_PIECE_TRIM:
        if (tflags & NBD_FLAG_SEND_TRIM)
            ask(link, piece, NBD_CMD_TRIM, fua(link, piece), NV_REMOTE_TRIM_PIECE);
        else
            nv_remote_finish(remote, piece, 0);
        break;
    case NV_PIECE_EXTENTS:
        if (link->params.has_allocation)
            ask(link, piece, NBD_CMD_BLOCK_STATUS, 0, nv_link_extended(link) ? UINT64_MAX : 0xffff0000u);
        else
            answer_as_data(remote, piece);
        break;
    default:
        assert(piece->kind == NV_PIECE_PREFETCH);
        if (tflags & NBD_FLAG_SEND_CACHE)
            ask(link, piece, NBD_CMD_CACHE, 0, link->params.payload_max);
        else
            nv_remote_finish(remote, piece, 0);
    }
}

/* ---- flushes of our own ---- */

static void own_flushed(struct nv_piece *piece, int64_t result)
{
    (void)result; /* a failure has latched */
    nv_remote_of(piece->object)->own_flushing = false;
}

static struct nv_piece *own_flush(struct nv_remote *remote)
{
    struct nv_piece *piece = &remote->own_flush;

    assert(!remote->own_flushing);
    remote->own_flushing = true;
    *piece = (struct nv_piece){.reactor = remote->home, .object = &remote->object, .kind = NV_PIECE_FLUSH,
                               .finished = own_flushed};
    piece->remote.era = remote->era;
    return piece;
}

void nv_remote_flush_first(struct nv_remote *remote)
{
    if (!remote->flush_first)
        return;
    remote->flush_first = false;
    nv_remote_push_front(remote, own_flush(remote));
}

bool nv_remote_flush_last(struct nv_link *link)
{
    struct nv_remote *remote = link->remote;

    if (link->state != NV_LINK_SERVING || remote->serving_count > 1 || !nv_remote_owes(remote) || remote->ending ||
        remote->own_flushing || atomic_load(&remote->object.sync.fault) || !(link->params.tflags & NBD_FLAG_SEND_FLUSH))
        return false;
    ask_flush(link, own_flush(remote));
    nv_link_transmit(link);
    return true;
}

/* ---- a turn ---- */

static void fail_queue(struct nv_remote *remote)
{
    for (struct nv_piece *piece = nv_remote_pop_all(remote), *next; piece; piece = next) {
        next = piece->remote.next;
        nv_remote_finish(remote, piece, piece->kind == NV_PIECE_PREFETCH ? 0 : -ENOTCONN); /* that is a hint */
    }
}

/*
 * A fault has latched. What was to make lost changes durable has failed, and need not wait for a link to be told so.
 * Legs of mirrors have others to go on with: the fault is theirs to deal with before this leg is used again.
 */
static void fail_in_fault(struct nv_remote *remote)
{
    for (struct nv_piece *piece = nv_remote_pop_all(remote), *next; piece; piece = next) {
        next = piece->remote.next;
        if (piece->kind == NV_PIECE_FLUSH && piece->remote.era != remote->era)
            nv_remote_finish(remote, piece, -EIO);
        else if (piece->flags & NV_PIECE_LEG)
            nv_remote_finish(remote, piece, -ESTALE);
        else
            nv_remote_append(remote, piece);
    }
}

void nv_remote_run(struct nv_late *late)
{
    struct nv_remote *remote = (struct nv_remote *)((char *)late - offsetof(struct nv_remote, late));
    struct nv_link *link;

    if (remote->serving_count == 0 && (remote->gave_up || remote->stopping || remote->ending))
        fail_queue(remote);
    if (remote->queue && atomic_load(&remote->object.sync.fault))
        fail_in_fault(remote);
    while (remote->queue && (link = link_for(remote, remote->queue)))
        dispatch(link, nv_remote_pop(remote));
    for (uint32_t i = 0; i < remote->serving_count; i++)
        nv_link_transmit(remote->serving[i]);
}
