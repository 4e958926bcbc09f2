/*
 * What goes past the log. Over blocks that are not covered: simply below. Over covered ones: below with FUA, then a
 * tombstone for them, durable, then out of the index, then answered; until then reads return the logged version, so they
 * do not go back when the write fails. (The tombstone first would leave, at a crash between the two, neither the logged,
 * perhaps flushed, version nor the new one.)
 *
 * A bypass over covered blocks and a destage write of the same blocks never run at once: whoever comes second waits
 * (`blocked`) or leaves them out (nv_log_bypassing()). Nor does one begin while a read from below is under way there, which
 * was asked for before the blocks were covered: it would return the new bytes, and a later read the logged ones.
 */
#include <errno.h>

#include "log/state.h"

static uint64_t first_of(const struct nv_log_request *request)
{
    return request->offset / NV_LOG_UNIT;
}

bool nv_log_bypassing(const struct nv_log *log, uint64_t block)
{
    for (const struct nv_log_request *request = log->active; request; request = request->beside)
        if (block - first_of(request) < nv_log_units(request->length))
            return true;
    return false;
}

void nv_log_below(struct nv_log *log, struct nv_log_below *io)
{
    io->log = log;
    log->config.below(log->config.context, io);
}

void nv_log_leave(struct nv_log *log, struct nv_log_request *request)
{
    struct nv_log_request **link = &log->active;

    while (*link != request)
        link = &(*link)->beside;
    *link = request->beside;
    log->bypasses--;
    request->dropped = false;
}

static void send_below(struct nv_log *log, struct nv_log_request *request, uint8_t flags, void (*done)(struct nv_log_below *))
{
    request->below.kind = request->kind;
    request->below.flags = flags;
    request->below.offset = request->offset;
    request->below.length = request->length;
    request->below.data = request->data;
    request->below.done = done;
    log->below_busy++;
    log->counts.bypassed++;
    nv_log_below(log, &request->below);
}

static void plain_done(struct nv_log_below *io)
{
    struct nv_log *log = io->log;
    struct nv_log_request *request = nv_log_who_asked(io);

    log->below_busy--;
    log->below_writes++; /* a failed one may have happened in part */
    if (!io->error && log->lost_blocks && log->state == NV_LOG_VOID)
        nv_log_drop(log, first_of(request), nv_log_units(request->length)); /* what was lost is overwritten */
    nv_log_finish(log, request, io->error);
}

static void tombstone_synced(struct nv_log_sync_wait *wait, int error)
{
    struct nv_log_request *request = nv_log_who_waits(wait);
    struct nv_log *log = request->below.log;

    nv_log_leave(log, request);
    if (error) {
        request->went_below = request->under_way = true; /* the tombstone is there, durable or not */
        nv_log_hold(log, request);
        return;
    }
    nv_log_drop(log, first_of(request), nv_log_units(request->length));
    log->counts.tombstones++;
    nv_log_finish(log, request, 0);
}

void nv_log_entombed(struct nv_log *log, struct nv_log_request *request)
{
    request->wait.done = tombstone_synced;
    if (nv_log_sync(log, &request->wait))
        tombstone_synced(&request->wait, 0);
}

void nv_log_entomb(struct nv_log *log)
{
    struct nv_log_request *request;

    while ((request = nv_log_pop(&log->entombing))) {
        if (nv_log_add(log, request, NV_LOG_TOMBSTONE) != NV_LOG_ADDED) {
            nv_log_unpop(&log->entombing, request);
            return;
        }
    }
}

static void covered_done(struct nv_log_below *io)
{
    struct nv_log *log = io->log;
    struct nv_log_request *request = nv_log_who_asked(io);

    log->below_busy--;
    if (io->error || nv_log_has_failed(log)) {
        nv_log_unsettle(log, first_of(request), nv_log_units(request->length)); /* what is below is not known any more */
        nv_log_leave(log, request);
        request->went_below = true;
        if (io->error)
            nv_log_finish(log, request, io->error);
        else
            nv_log_hold(log, request);
        return;
    }
    request->dropped = true;
    nv_log_push(&log->entombing, request);
}

void nv_log_bypass(struct nv_log *log, struct nv_log_request *request)
{
    const uint64_t first = first_of(request), blocks = nv_log_units(request->length);

    if (log->state == NV_LOG_VOID || (!nv_log_covered(log, first, blocks) && !nv_log_haunted(log, first, blocks))) {
        send_below(log, request, request->flags, plain_done);
    } else if (log->state == NV_LOG_FAILED) {
        nv_log_hold(log, request);
    } else if (nv_log_carrying(log, first, blocks) || nv_log_reading(log, first, blocks) || !nv_log_tombstone_room(log)) {
        log->counts.blocked++;
        if (log->shut) /* what it waits for may never come */
            nv_log_finish(log, request, -ESHUTDOWN);
        else
            nv_log_push(&log->blocked, request);
    } else {
        request->beside = log->active;
        log->active = request;
        log->bypasses++;
        send_below(log, request, NV_LOG_FUA, covered_done);
    }
}

void nv_log_unblock(struct nv_log *log)
{
    nv_log_route_all(log, &log->blocked);
}
