/*
 * The log's device has failed: an append, a sync or the superblock. It is not written to any more but for one superblock
 * that makes it void. First all that is acknowledged is read from it and carried below, synced or not; requests whose
 * records were on their way, writes over covered blocks and FLUSH are held until the log is void: were they answered
 * before, a crash would bring back what is in the log over what they had been promised. Then they go below.
 *
 * From then on a block is carried in its newest version alone: the tombstone of a bypass that is held now may reach the
 * device yet, and then recovery knows none of the versions that were before it; what is below has to be as new as they were.
 *
 * If not even that superblock can be written, control's word is needed (NV_LOG_NEEDS_WORD): it commits that this log is
 * never replayed, and nv_log_forget() says so.
 *
 * What takes longer than the deadline has failed, too, and is waited for no more; it may still happen, at any time later. Reads
 * have no deadline: what can be read only from a device that hangs waits for that.
 */
#include <errno.h>

#include "log/state.h"

void nv_log_hold(struct nv_log *log, struct nv_log_request *request)
{
    if (log->state == NV_LOG_VOID) /* a late completion: the others have gone already */
        nv_log_route(log, request);
    else if (log->shut)
        nv_log_finish(log, request, -ESHUTDOWN);
    else
        nv_log_push(&log->held, request);
}

static void hold_all(struct nv_log *log, struct nv_log_list *list)
{
    struct nv_log_request *request;

    while ((request = nv_log_pop(list))) {
        if (request->dropped)
            nv_log_leave(log, request);
        nv_log_push(&log->held, request);
    }
}

bool nv_log_stuck(const struct nv_log *log)
{
    return log->needs_word || log->destager.failed;
}

void nv_log_shut(struct nv_log *log)
{
    struct nv_log_request *request;

    log->stopped = log->shut = true;
    hold_all(log, &log->waiting);
    hold_all(log, &log->entombing);
    hold_all(log, &log->blocked);
    while ((request = nv_log_pop(&log->held)))
        nv_log_finish(log, request, -ESHUTDOWN);
}

void nv_log_fail(struct nv_log *log, int error)
{
    if (log->state != NV_LOG_SERVING && log->state != NV_LOG_THROUGH)
        return;
    log->state = NV_LOG_FAILED;
    log->destager.retry_ns = 0;
    nv_log_carry_newest(log);
    for (struct nv_log_group *group = log->flight; group; group = group->next)
        hold_all(log, &group->requests);
    if (log->building) {
        hold_all(log, &log->building->requests);
        log->building->used = false;
        log->building = NULL;
    }
    hold_all(log, &log->waiting);
    hold_all(log, &log->entombing);
    hold_all(log, &log->blocked);
    nv_log_sync_fails(log, error);
    log->config.event(log->config.context, NV_LOG_FAILING, error);
}

static bool is_late(const struct nv_log *log, bool under_way, uint64_t since_ns)
{
    const uint64_t deadline_ns = log->config.deadline_ms * 1000000ull;

    return under_way && deadline_ns && nv_io_now_ns(log->config.io) - since_ns > deadline_ns;
}

void nv_log_watch(struct nv_log *log)
{
    const struct nv_log_destager *destager = &log->destager;

    if ((log->flight && is_late(log, true, log->flight->since_ns)) || is_late(log, log->syncing, log->sync_since_ns))
        nv_log_fail(log, -ETIMEDOUT);
    if (is_late(log, destager->super_out && !destager->given_up, destager->super_since_ns))
        nv_log_give_up_super(log);
}

void nv_log_is_void(struct nv_log *log)
{
    log->state = NV_LOG_VOID;
    log->needs_word = false;
    nv_log_empty(log);
    nv_log_route_all(log, &log->held);
    log->config.event(log->config.context, NV_LOG_DRAINED, 0);
}

void nv_log_forget(struct nv_log *log)
{
    log->forgotten = true;
    if (log->needs_word)
        nv_log_is_void(log);
}
