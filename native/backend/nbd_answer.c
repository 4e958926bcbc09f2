/*
 * What an answer of a remote server means for the piece that asked, and what it means that none came (nbd.h).
 *
 * Invariants: only what a member of the set answered counts; an acknowledged change that is not durable by itself is
 * owed before its owner hears of it; what nobody was told is never owed, it begins anew at the next server.
 */
#include <assert.h>
#include <errno.h>

#include "backend/nbd.h"
#include "reactor/reactor.h"

/* The wire's numbers are Linux's; what is not the caller's fault is EIO. */
static int errno_of(int error)
{
    return error == EPERM || error == ENOSPC || error == EOPNOTSUPP ? -error : -EIO;
}

/* ---- changes ---- */

static bool to_be_durable(const struct nv_remote *remote, const struct nv_piece *piece)
{
    return remote->write_through || (piece->kind == NV_PIECE_WRITE && (piece->flags & NV_PIECE_DSYNC));
}

/* All of it is acknowledged. What is to be durable, at a server that has no FUA, is followed by a FLUSH of its own. */
static void change_done(struct nv_remote *remote, struct nv_piece *piece, const struct nv_ask *ask)
{
    const bool durable = (ask->flags & NBD_CMD_FLAG_FUA) && ask->length == piece->length; /* by this one request */

    if (to_be_durable(remote, piece) && !durable) {
        piece->stage = NV_STAGE_FLUSH;
        nv_remote_push_front(remote, piece);
        return;
    }
    if (!durable)
        nv_remote_owe(remote);
    nv_remote_finish(remote, piece, 0);
}

static void change_failed(struct nv_remote *remote, struct nv_piece *piece, int error)
{
    if (piece->kind == NV_PIECE_ZERO && piece->stage == NV_STAGE_FIRST && error == EOPNOTSUPP &&
        !(piece->flags & NV_PIECE_FAST)) {
        piece->stage = NV_STAGE_WRITE_ZEROS; /* the protocol forbids this answer, but zeros there must be */
        nv_remote_push_front(remote, piece);
        return;
    }
    nv_sync_wrote(&remote->object.sync); /* part of it may have happened, which nobody was promised: not owed */
    nv_remote_finish(remote, piece, piece->kind == NV_PIECE_TRIM && error != EIO ? 0 : errno_of(error)); /* a hint */
}

/* ---- any answer ---- */

/* The piece's present request was answered with ask->error, by a member of the set. */
static void step(struct nv_remote *remote, struct nv_piece *piece, const struct nv_ask *ask)
{
    piece->remote.hangups = 0;
    piece->remote.timeouts = 0;
    piece->remote.shut_ns = 0;
    if (ask->command == NBD_CMD_FLUSH) {
        nv_remote_finish(remote, piece, ask->error ? -EIO : 0);
        return;
    }
    if (ask->error && nv_piece_changes(piece)) {
        change_failed(remote, piece, ask->error);
        return;
    }
    if (ask->error) {
        nv_remote_finish(remote, piece, piece->kind == NV_PIECE_PREFETCH ? 0 : errno_of(ask->error));
        return;
    }
    piece->moved += ask->length;
    assert(piece->moved <= piece->length);
    if (piece->kind == NV_PIECE_EXTENTS)
        nv_remote_finish(remote, piece, ask->extents);
    else if (piece->moved < piece->length)
        nv_remote_push_front(remote, piece);
    else if (nv_piece_changes(piece))
        change_done(remote, piece, ask);
    else
        nv_remote_finish(remote, piece, 0);
}

/*
 * Did the server lose acknowledged changes, and tell it with this answer? It may do so once only. A durable change that
 * fails with EIO may be a failed sync, as a file's failed DSYNC write; with ENOSPC (delayed allocation) it may be one of
 * what was owed before it. Other errors say that the request was refused.
 */
static bool tells_of_loss(const struct nv_remote *remote, const struct nv_ask *ask)
{
    if (!ask->error)
        return false;
    if (ask->command == NBD_CMD_FLUSH)
        return true;
    return nv_ask_changes(ask) && (ask->flags & NBD_CMD_FLAG_FUA) &&
           (ask->error == EIO || (ask->error == ENOSPC && nv_remote_owes(remote)));
}

static void account(struct nv_remote *remote, const struct nv_ask *ask)
{
    nv_count(&remote->counters.answered, 1);
    if (ask->error)
        nv_count(&remote->counters.errors, 1);
    else if (ask->command == NBD_CMD_READ)
        nv_count(&remote->counters.read_bytes, ask->length);
    else if (ask->command == NBD_CMD_WRITE)
        nv_count(&remote->counters.write_bytes, ask->length);
    if (tells_of_loss(remote, ask))
        nv_sync_fail(&remote->object.sync, remote->home, ask->error == ENOSPC ? -ENOSPC : -EIO);
    if (ask->command == NBD_CMD_FLUSH && !ask->error)
        nv_remote_settled(remote, ask->covers);
}

/* An answer on a link that was given up: whoever acknowledged it does not count, but it is over. */
static void over(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;

    if (ask->abandoned)
        nv_ask_free(ask);
    else
        nv_remote_again(ask);
    nv_link_settle(link);
}

/*
 * It was not done: another link, or the next server, will do it. Not for ever: one that says so link after link, for as
 * long as I/O waits for a server that is away, is as good as away.
 */
static void shut_out(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;
    struct nv_remote *remote = link->remote;
    struct nv_piece *piece = ask->piece;
    const uint64_t now = nv_io_now_ns(remote->home->io);

    link->retiring = true;
    if (piece->remote.shut_ns == 0)
        piece->remote.shut_ns = now;
    if (now - piece->remote.shut_ns < remote->hold_ns) {
        nv_remote_again(ask);
    } else {
        nv_ask_free(ask);
        if (nv_piece_changes(piece))
            change_failed(remote, piece, EIO);
        else
            nv_remote_finish(remote, piece, -EIO);
    }
    nv_link_settle(link);
}

void nv_remote_concluded(struct nv_ask *ask)
{
    struct nv_link *link = ask->link;
    struct nv_remote *remote = link->remote;
    struct nv_piece *piece = ask->piece;

    if (link->state != NV_LINK_SERVING) {
        assert(link->state == NV_LINK_DRAINING);
        over(ask);
        return;
    }
    if (ask->error == ESHUTDOWN) {
        shut_out(ask);
        return;
    }
    account(remote, ask);
    if (remote->waiting_count > 0)
        nv_remote_prove(remote, ask->stamp);
    step(remote, piece, ask);
    nv_ask_free(ask);
    nv_remote_wants_turn(remote);
}

/* ---- no answer ---- */

/* The piece was on a link that was lost: how often was it? A server that dies takes all its links along, once. */
static void note_loss(const struct nv_link *link, struct nv_piece *piece)
{
    if (link->end_reason == -ETIMEDOUT) {
        piece->remote.timeouts++;
    } else if (piece->remote.hangups == 0 || (int32_t)(link->arrival - piece->remote.lost) > 0) {
        piece->remote.hangups++;
        piece->remote.lost = link->remote->arrivals;
    }
}

void nv_remote_takes_back(const struct nv_ask *ask)
{
    struct nv_remote *remote = ask->link->remote;
    struct nv_piece *piece = ask->piece;

    nv_count(&remote->counters.again, 1);
    if (ask->state != NV_ASK_QUEUED && !ask->answered)
        note_loss(ask->link, piece);
    if (remote->stopping)
        nv_remote_finish(remote, piece, -ENOTCONN);
    else if (piece->remote.hangups >= NV_PIECE_HANGUPS || piece->remote.timeouts > remote->patience)
        nv_remote_finish(remote, piece, -EIO);
    else
        nv_remote_push_front(remote, piece);
}

void nv_remote_again(struct nv_ask *ask)
{
    nv_remote_takes_back(ask);
    nv_ask_free(ask);
}

/* One more place; when there is no room, a neighbour grows over it. */
static void add_doubt(struct nv_remote *remote, uint64_t from, uint64_t to)
{
    struct nv_span *best = NULL;
    uint64_t best_growth = UINT64_MAX;

    if (remote->doubt_count < NV_REMOTE_DOUBTS) {
        remote->doubts[remote->doubt_count++] = (struct nv_span){from, to};
        return;
    }
    for (uint32_t i = 0; i < NV_REMOTE_DOUBTS; i++) {
        struct nv_span *span = &remote->doubts[i];
        const uint64_t growth = (span->from > from ? span->from - from : 0) + (to > span->to ? to - span->to : 0);
        if (growth < best_growth) {
            best_growth = growth;
            best = span;
        }
    }
    best->from = best->from < from ? best->from : from;
    best->to = best->to > to ? best->to : to;
}

void nv_remote_doubt(struct nv_ask *ask)
{
    struct nv_remote *remote = ask->link->remote;
    struct nv_piece *piece = ask->piece;

    nv_count(&remote->counters.again, 1);
    nv_count(&remote->counters.unsure, 1); /* before its piece is over: whoever hears of that finds it counted */
    add_doubt(remote, ask->offset, ask->offset + ask->length);
    nv_ask_free(ask);
    nv_sync_fail(&remote->object.sync, remote->home, -ETIMEDOUT);
    nv_remote_finish(remote, piece, remote->stopping ? -ENOTCONN : -EIO);
}

bool nv_remote_doubts(struct nv_remote *remote, const struct nv_piece *piece)
{
    if (!atomic_load(&remote->object.sync.fault)) { /* the operator's word: nothing is under way there any more */
        remote->doubt_count = 0;
        return false;
    }
    for (uint32_t i = 0; i < remote->doubt_count; i++)
        if (piece->offset < remote->doubts[i].to && remote->doubts[i].from < piece->offset + piece->length)
            return true;
    return false;
}
