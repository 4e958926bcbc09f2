/*
 * A remote export on its home reactor: the queue of pieces, which link each goes to, what its answer means, the set of
 * links that lead to one running server, and what that server owes (nbd.h). Pieces are handed to links late in a turn,
 * so that all of a turn's requests leave in one send a link.
 *
 * Invariants: a piece is in the queue, in exactly one ask, or back with its owner; a piece has one request on the wire
 * at a time; whatever is acknowledged and not durable by itself is counted in `acked` before its owner hears of it.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

#include "backend/nbd.h"
#include "reactor/plane.h"

#define PIECE_FLUSH 0x80            /* kinds of the remote's own: the object's sync, */
#define PIECE_PROBE 0x81            /* and a read of one block that nobody looks at */

enum stage { STAGE_FIRST, STAGE_WRITE_ZEROS, STAGE_FLUSH };

static void run(struct nv_late *late);
static void step(struct nv_remote *remote, struct nv_piece *piece, const struct nv_ask *ask);

/* ---- pieces come and go ---- */

void nv_remote_wants_turn(struct nv_remote *remote)
{
    if (remote->queue)
        nv_reactor_late(remote->home, &remote->late);
}

static void append(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->remote.next = NULL;
    *remote->queue_tail = piece;
    remote->queue_tail = &piece->remote.next;
    nv_count(&remote->counters.waiting, 1);
}

static void push_back(struct nv_remote *remote, struct nv_piece *piece)
{
    append(remote, piece);
    nv_reactor_late(remote->home, &remote->late);
}

/* What was on the wire before goes before what was not. */
static void push_front(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->remote.next = remote->queue;
    if (!remote->queue)
        remote->queue_tail = &piece->remote.next;
    remote->queue = piece;
    nv_count(&remote->counters.waiting, 1);
    nv_reactor_late(remote->home, &remote->late);
}

static struct nv_piece *pop(struct nv_remote *remote)
{
    struct nv_piece *piece = remote->queue;

    remote->queue = piece->remote.next;
    if (!remote->queue)
        remote->queue_tail = &remote->queue;
    nv_count(&remote->counters.waiting, (uint64_t)-1);
    return piece;
}

static void arrive(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->remote.era = remote->era;
    push_back(remote, piece);
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
    piece->stage = STAGE_FIRST;
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

static void finish(struct nv_remote *remote, struct nv_piece *piece, int64_t result)
{
    if (piece->reactor == remote->home) {
        end(piece, remote->home, result);
    } else {
        piece->answer = result;
        piece->remote.message.run = piece_returns;
        nv_reactor_send(piece->reactor, &piece->remote.message);
    }
}

/* ---- what is owed ---- */

/* A change was acknowledged (or may have happened in part). */
static void owe(struct nv_remote *remote)
{
    remote->acked++;
    atomic_store_explicit(&remote->counters.owed, 1, memory_order_relaxed);
    nv_sync_wrote(&remote->object.sync);
}

static bool owes(const struct nv_remote *remote)
{
    return remote->acked != remote->flushed;
}

static void settled(struct nv_remote *remote, uint64_t up_to)
{
    if (up_to <= remote->flushed)
        return;
    remote->flushed = up_to;
    atomic_store_explicit(&remote->counters.owed, owes(remote), memory_order_relaxed);
}

static void lose_what_is_owed(struct nv_remote *remote)
{
    if (!owes(remote))
        return;
    settled(remote, remote->acked); /* the fault stands for them now */
    remote->era++;
    nv_sync_fail(&remote->object.sync, remote->home, -ESTALE);
}

static void sync_finished(struct nv_piece *piece, int64_t result)
{
    nv_sync_ran(&piece->object->sync, result);
}

void nv_remote_sync(struct nv_sync *sync, struct nv_reactor *reactor)
{
    struct nv_object *object = (struct nv_object *)((char *)sync - offsetof(struct nv_object, sync));
    struct nv_piece *piece = &nv_remote_of(object)->sync_piece;

    *piece = (struct nv_piece){.reactor = reactor, .object = object, .kind = PIECE_FLUSH, .finished = sync_finished};
    start(piece);
}

/* ---- the set ---- */

static void probe(struct nv_remote *remote);

static void probed(struct nv_piece *piece, int64_t result)
{
    struct nv_remote *remote = nv_remote_of(piece->object);

    (void)result;
    remote->probing = false;
    probe(remote); /* for links that came after it had been sent */
}

/* Ask a member for a sign of life, so that the links that wait may join. */
static void probe(struct nv_remote *remote)
{
    struct nv_piece *piece = &remote->probe;

    if (remote->probing || remote->waiting_count == 0 || remote->serving_count == 0)
        return;
    remote->probing = true;
    *piece = (struct nv_piece){.reactor = remote->home, .object = &remote->object, .kind = PIECE_PROBE,
                               .length = remote->object.align, .data = remote->probe_data, .finished = probed};
    push_front(remote, piece);
}

static void join(struct nv_link *link)
{
    struct nv_remote *remote = link->remote;

    assert(link->state == NV_LINK_WAITING && remote->serving_count < NV_LINKS_PER_REMOTE);
    link->state = NV_LINK_SERVING;
    remote->waiting_count--;
    remote->serving[remote->serving_count++] = link;
    nv_count(&remote->counters.serving, 1);
    remote->gave_up = false;
    nv_remote_wants_turn(remote);
}

/* A FLUSH on one link covers the others' writes only where the server says so on each of them. */
static bool may_join(const struct nv_remote *remote, const struct nv_link *link)
{
    return link->params.tflags & remote->serving[0]->params.tflags & NBD_FLAG_CAN_MULTI_CONN;
}

/* A member has answered what was sent when `stamp` links had come. */
static void prove(struct nv_remote *remote, uint32_t stamp)
{
    for (struct nv_link *link = remote->links; link; link = link->next)
        if (link->state == NV_LINK_WAITING && (int32_t)(stamp - link->arrival) >= 0 && may_join(remote, link))
            join(link);
}

/* The set is empty: the first link that waits begins a new one. */
static void begin_set(struct nv_remote *remote)
{
    assert(remote->serving_count == 0 && remote->acked == remote->flushed);
    for (struct nv_link *link = remote->links; link; link = link->next)
        if (link->state == NV_LINK_WAITING) {
            join(link);
            break;
        }
    probe(remote);
}

void nv_remote_link_came(struct nv_link *link)
{
    struct nv_remote *remote = link->remote;

    link->arrival = ++remote->arrivals;
    link->state = NV_LINK_WAITING;
    remote->waiting_count++;
    if (remote->serving_count == 0)
        begin_set(remote);
    else if (atomic_load(&remote->object.size) < remote->object.align)
        join(link); /* an export without a block holds nothing to lose, and cannot be probed */
    else
        probe(remote);
}

static void leave_set(struct nv_remote *remote, const struct nv_link *link)
{
    uint32_t i = 0;

    while (remote->serving[i] != link)
        i++;
    assert(i < remote->serving_count);
    remote->serving[i] = remote->serving[--remote->serving_count];
    remote->current = 0;
    nv_count(&remote->counters.serving, (uint64_t)-1);
    if (remote->serving_count > 0 || remote->ending)
        return;
    lose_what_is_owed(remote);
    begin_set(remote);
    nv_reactor_late(remote->home, &remote->late); /* who waits may have to hear that nobody comes, or of the fault */
}

void nv_remote_link_goes(struct nv_link *link, uint8_t to)
{
    const uint8_t was = link->state;

    assert(to == NV_LINK_LEAVING || to == NV_LINK_LOST);
    link->state = to;
    if (was == NV_LINK_WAITING)
        link->remote->waiting_count--;
    else if (was == NV_LINK_SERVING)
        leave_set(link->remote, link);
    if (to == NV_LINK_LOST && was != NV_LINK_LEAVING)
        nv_count(&link->remote->counters.lost, 1);
}

/* ---- which link, which request ---- */

static bool has_room(const struct nv_link *link, uint64_t payload)
{
    return !link->retiring && link->in_flight < NV_LINK_ASKS &&
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

static uint64_t at_most(uint64_t value, uint64_t limit)
{
    return value < limit ? value : limit;
}

static uint64_t payload_of(const struct nv_piece *piece)
{
    const bool carries = piece->kind == NV_PIECE_READ || piece->kind == NV_PIECE_WRITE || piece->kind == PIECE_PROBE;

    return carries ? piece->length - piece->moved : 0;
}

static bool flushes(const struct nv_piece *piece)
{
    return piece->kind == PIECE_FLUSH || piece->stage == STAGE_FLUSH;
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

    return piece->stage == STAGE_FIRST && (link->params.tflags & needs) == needs;
}

static void ask(struct nv_link *link, struct nv_piece *piece, uint16_t command, uint16_t flags, uint64_t limit)
{
    struct nv_remote *remote = link->remote;
    struct nv_ask *ask = nv_ask_take(link, piece);

    if (piece->moved == 0 && command != NBD_CMD_FLUSH)
        piece->remote.era = remote->era; /* what this piece changes begins here */
    ask->command = command;
    ask->flags = flags;
    ask->offset = command == NBD_CMD_FLUSH ? 0 : piece->offset + piece->moved;
    ask->length = command == NBD_CMD_FLUSH ? 0 : at_most(piece->length - piece->moved, limit);
    ask->covers = remote->acked;
    ask->stamp = remote->arrivals;
    if (command == NBD_CMD_READ || command == NBD_CMD_WRITE)
        link->bytes += ask->length;
    nv_count(&remote->counters.asked, 1);
    nv_link_queue(ask);
}

/* What it is to make durable was acknowledged in its own era. */
static void ask_flush(struct nv_link *link, struct nv_piece *piece)
{
    if (piece->remote.era != link->remote->era)
        finish(link->remote, piece, -EIO); /* it may be lost */
    else if (link->params.tflags & NBD_FLAG_SEND_FLUSH)
        ask(link, piece, NBD_CMD_FLUSH, 0, 0);
    else /* such a server is written to with FUA only, or not at all */
        finish(link->remote, piece, owes(link->remote) ? -EIO : 0);
}

static void ask_zero(struct nv_link *link, struct nv_piece *piece)
{
    const uint16_t flags = (uint16_t)(fua(link, piece) | (piece->flags & NV_PIECE_NO_HOLE ? NBD_CMD_FLAG_NO_HOLE : 0) |
                                      (piece->flags & NV_PIECE_FAST ? NBD_CMD_FLAG_FAST_ZERO : 0));

    if (zero_by_command(link, piece)) {
        ask(link, piece, NBD_CMD_WRITE_ZEROES, flags, NV_REMOTE_ZERO_PIECE);
    } else if (piece->flags & NV_PIECE_FAST) {
        finish(link->remote, piece, -EOPNOTSUPP);
    } else {
        piece->stage = STAGE_WRITE_ZEROS;
        ask(link, piece, NBD_CMD_WRITE, fua(link, piece), at_most(link->params.payload_max, NV_ZERO_PIECE));
    }
}

/* All data: always a safe answer. */
static void answer_as_data(struct nv_remote *remote, struct nv_piece *piece)
{
    piece->extents[0] = (struct nv_extent){piece->length, 0};
    finish(remote, piece, 1);
}

/* Put the next request of a piece on the link, or finish the piece if the server has nothing for it. */
static void dispatch(struct nv_link *link, struct nv_piece *piece)
{
    const uint32_t tflags = link->params.tflags;
    struct nv_remote *remote = link->remote;

    if (flushes(piece)) {
        ask_flush(link, piece);
        return;
    }
    switch (piece->kind) {
    case NV_PIECE_READ:
    case PIECE_PROBE:
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
            finish(remote, piece, 0);
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
            finish(remote, piece, 0);
    }
}

static void fail_queue(struct nv_remote *remote)
{
    struct nv_piece *piece = remote->queue;

    remote->queue = NULL;
    remote->queue_tail = &remote->queue;
    for (struct nv_piece *next; piece; piece = next) {
        next = piece->remote.next;
        nv_count(&remote->counters.waiting, (uint64_t)-1);
        finish(remote, piece, -ENOTCONN);
    }
}

/*
 * A fault has latched. What was to make lost changes durable has failed, and need not wait for a link to be told so.
 * Legs of mirrors have others to go on with: the fault is theirs to deal with before this leg is used again.
 */
static void fail_in_fault(struct nv_remote *remote)
{
    struct nv_piece *piece = remote->queue;

    remote->queue = NULL;
    remote->queue_tail = &remote->queue;
    for (struct nv_piece *next; piece; piece = next) {
        next = piece->remote.next;
        nv_count(&remote->counters.waiting, (uint64_t)-1);
        if (flushes(piece) && piece->remote.era != remote->era)
            finish(remote, piece, -EIO);
        else if (piece->flags & NV_PIECE_LEG)
            finish(remote, piece, -ESTALE);
        else
            append(remote, piece);
    }
}

static void run(struct nv_late *late)
{
    struct nv_remote *remote = (struct nv_remote *)((char *)late - offsetof(struct nv_remote, late));
    struct nv_link *link;

    if (remote->serving_count == 0 && (remote->gave_up || remote->stopping || remote->ending))
        fail_queue(remote);
    if (remote->queue && atomic_load(&remote->object.sync.fault))
        fail_in_fault(remote);
    while (remote->queue && (link = choose(remote, payload_of(remote->queue))))
        dispatch(link, pop(remote));
    for (uint32_t i = 0; i < remote->serving_count; i++)
        nv_link_transmit(remote->serving[i]);
}

/* ---- what an answer means ---- */

/* The wire's numbers are Linux's; what is not the caller's fault is EIO. */
static int errno_of(int error)
{
    return error == EPERM || error == ENOSPC || error == EOPNOTSUPP ? -error : -EIO;
}

/* A change that is to be durable, at a server that has no FUA, is followed by a FLUSH of its own. */
static void change_done(struct nv_remote *remote, struct nv_piece *piece, const struct nv_ask *ask)
{
    const bool durable = (ask->flags & NBD_CMD_FLAG_FUA) && ask->length == piece->length; /* by this one request */
    const bool wanted = remote->write_through || (piece->kind == NV_PIECE_WRITE && (piece->flags & NV_PIECE_DSYNC));

    if (!wanted || durable) {
        finish(remote, piece, 0);
        return;
    }
    piece->stage = piece->remote.era == remote->era ? STAGE_FLUSH : STAGE_FIRST;
    if (piece->stage == STAGE_FIRST)
        piece->moved = 0; /* a part went with the server that acknowledged it: all of it once more */
    push_front(remote, piece);
}

static void change_failed(struct nv_remote *remote, struct nv_piece *piece, int error)
{
    if (piece->kind == NV_PIECE_ZERO && piece->stage == STAGE_FIRST && error == EOPNOTSUPP) {
        if (piece->flags & NV_PIECE_FAST) {
            finish(remote, piece, -EOPNOTSUPP);
            return;
        }
        piece->stage = STAGE_WRITE_ZEROS; /* the protocol forbids this answer, but zeros there must be */
        push_front(remote, piece);
    } else if (piece->kind == NV_PIECE_TRIM && error != EIO) {
        finish(remote, piece, 0); /* a hint */
    } else {
        finish(remote, piece, errno_of(error));
    }
}

/* The piece's present request was answered with ask->error. */
static void step(struct nv_remote *remote, struct nv_piece *piece, const struct nv_ask *ask)
{
    const bool changes = piece->kind == NV_PIECE_WRITE || piece->kind == NV_PIECE_ZERO || piece->kind == NV_PIECE_TRIM;

    if (ask->command == NBD_CMD_FLUSH) {
        finish(remote, piece, ask->error ? -EIO : 0);
        return;
    }
    if (ask->error && changes) {
        change_failed(remote, piece, ask->error);
        return;
    }
    if (ask->error) {
        finish(remote, piece, piece->kind == NV_PIECE_PREFETCH ? 0 : errno_of(ask->error));
        return;
    }
    piece->moved += ask->length;
    assert(piece->moved <= piece->length);
    if (piece->kind == NV_PIECE_EXTENTS)
        finish(remote, piece, ask->extents);
    else if (piece->moved < piece->length)
        push_front(remote, piece);
    else if (changes)
        change_done(remote, piece, ask);
    else
        finish(remote, piece, 0);
}

static void account(struct nv_remote *remote, const struct nv_ask *ask)
{
    const bool changes = ask->command == NBD_CMD_WRITE || ask->command == NBD_CMD_TRIM ||
                         ask->command == NBD_CMD_WRITE_ZEROES;
    const bool durable = ask->flags & NBD_CMD_FLAG_FUA;

    nv_count(&remote->counters.answered, 1);
    if (ask->error)
        nv_count(&remote->counters.errors, 1);
    else if (ask->command == NBD_CMD_READ)
        nv_count(&remote->counters.read_bytes, ask->length);
    else if (ask->command == NBD_CMD_WRITE)
        nv_count(&remote->counters.write_bytes, ask->length);
    if (changes && (!durable || (ask->error && (ask->link->params.tflags & NBD_FLAG_SEND_FLUSH))))
        owe(remote); /* also when it failed: part of it may have happened */
    if (changes && durable && ask->error && ask->error != EOPNOTSUPP) /* as a file's failed DSYNC write */
        nv_sync_fail(&remote->object.sync, remote->home, errno_of(ask->error));
    if (ask->command == NBD_CMD_FLUSH && ask->error)
        nv_sync_fail(&remote->object.sync, remote->home, -EIO); /* the server may tell of it once only */
    if (ask->command == NBD_CMD_FLUSH && !ask->error && ask->piece->remote.era == remote->era)
        settled(remote, ask->covers);
}

void nv_remote_concluded(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;
    struct nv_remote *remote = link->remote;
    struct nv_piece *piece = ask->piece;

    if (ask->error == ESHUTDOWN) { /* it was not done: another link, or the next server, will do it */
        link->retiring = true;
        nv_remote_again(ask);
        nv_link_settle(link);
        return;
    }
    account(remote, ask);
    if (link->state == NV_LINK_SERVING && remote->waiting_count > 0)
        prove(remote, ask->stamp);
    step(remote, piece, ask);
    nv_ask_free(ask);
    nv_remote_wants_turn(remote);
}

void nv_remote_again(struct nv_ask *ask)
{
    struct nv_remote *remote = ask->link->remote;
    struct nv_piece *piece = ask->piece;

    nv_count(&remote->counters.again, 1);
    nv_ask_free(ask);
    push_front(remote, piece);
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
    remote->late.run = run;
    remote->timeout_ticks = (config->timeout_ms + NV_TICK_MS - 1) / NV_TICK_MS;
    remote->write_through = config->flags & NV_REMOTE_WRITE_THROUGH;
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
    nv_reactor_late(remote->home, &remote->late);
}

void nv_remote_ends(struct nv_remote *remote)
{
    remote->ending = true;
    for (struct nv_link *link = remote->links, *next; link; link = next) {
        next = link->next;
        nv_link_leave(link);
    }
    nv_reactor_late(remote->home, &remote->late); /* a probe may still wait */
}

void nv_remote_closes(struct nv_remote *remote)
{
    remote->ending = true;
    run(&remote->late);
    nv_reactor_drop_late(remote->home, &remote->late);
    assert(!remote->queue && !remote->links && remote->serving_count == 0);
    *remote->back = remote->next;
    if (remote->next)
        remote->next->back = remote->back;
}
