/*
 * Durability of the log: one sync is under way at most, it covers what was acknowledged when it was handed in, and who
 * comes later waits for the next one. FLUSH is a sync of the log and, if anything went past it, a flush below.
 */
#include <errno.h>

#include "log/state.h"

static void start_sync(struct nv_log *log);

static void answer(struct nv_log *log, int error)
{
    struct nv_log_sync_wait *list = log->sync_waiting;

    log->sync_waiting = NULL;
    for (struct nv_log_sync_wait *wait = list, *next; wait; wait = next) {
        next = wait->next;
        if (error || wait->target <= log->synced) {
            wait->done(wait, error);
        } else {
            wait->next = log->sync_waiting;
            log->sync_waiting = wait;
        }
    }
}

void nv_log_sync_fails(struct nv_log *log, int error)
{
    answer(log, error);
}

static void sync_done(struct nv_op *op)
{
    struct nv_log *log = (struct nv_log *)((char *)op - offsetof(struct nv_log, sync_op));

    log->syncing = false;
    if (op->result < 0) {
        nv_log_fail(log, (int)op->result);
        return;
    }
    if (log->sync_covers > log->synced) { /* else a DSYNC write came first */
        log->synced = log->sync_covers;
        log->synced_versions = log->sync_versions;
    }
    answer(log, nv_log_has_failed(log) ? -EIO : 0);
    if (log->sync_waiting && !log->syncing)
        start_sync(log);
}

static void start_sync(struct nv_log *log)
{
    log->syncing = true;
    log->sync_since_ns = nv_io_now_ns(log->config.io);
    log->counts.syncs++;
    log->sync_covers = log->completed;
    log->sync_versions = log->version_head;
    log->sync_op = (struct nv_op){.kind = NV_OP_SYNC, .handle = log->config.handle, .done = sync_done};
    nv_io_submit(log->config.io, &log->sync_op);
}

bool nv_log_sync(struct nv_log *log, struct nv_log_sync_wait *wait)
{
    if (log->synced >= log->completed)
        return true;
    wait->target = log->completed;
    wait->next = log->sync_waiting;
    log->sync_waiting = wait;
    if (!log->syncing)
        start_sync(log);
    return false;
}

/* ---- FLUSH ---- */

/* What was lost is not durable, even if it has been overwritten since: this flush need not cover that. */
static void part_done(struct nv_log *log, struct nv_log_request *request)
{
    const bool lost = request->losses != log->losses;

    if (--request->parts > 0)
        return;
    if (request->hold && !request->error)
        nv_log_hold(log, request);
    else
        nv_log_finish(log, request, lost && !request->error ? -EIO : request->error);
}

static void log_part(struct nv_log_sync_wait *wait, int error)
{
    struct nv_log_request *request = nv_log_who_waits(wait);

    request->hold |= error != 0;
    part_done(request->below.log, request);
}

static void below_part(struct nv_log_below *io)
{
    struct nv_log_request *request = nv_log_who_asked(io);
    struct nv_log *log = io->log;

    log->below_busy--;
    if (io->error)
        request->error = io->error;
    else if (request->covers > log->below_flushed)
        log->below_flushed = request->covers;
    part_done(log, request);
}

void nv_log_flush(struct nv_log *log, struct nv_log_request *request)
{
    request->hold = false;
    request->parts = 2;
    request->covers = log->below_writes;
    request->wait.done = log_part;
    request->below.kind = NV_LOG_FLUSH;
    request->below.flags = 0;
    request->below.done = below_part;
    if (request->covers > log->below_flushed) {
        log->below_busy++;
        nv_log_below(log, &request->below);
    } else {
        request->parts--;
    }
    if (log->state == NV_LOG_VOID || nv_log_sync(log, &request->wait))
        part_done(log, request);
}
