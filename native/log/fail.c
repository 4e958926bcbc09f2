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
 * What takes longer than the deadline has failed, too, and is waited for no more; it may still happen, at any time later. Who
 * reads what only a device that hangs has is answered -EIO; nothing of it counts as lost, and carrying it is tried again. Records
 * that are on their way then still count; what is held is answered -EIO, too, as long as the device hangs, when it has been held
 * for a deadline; and -ESHUTDOWN when the volume closes. A write whose record was on its way when writing failed, too, *haunts*
 * its blocks from then on: it may come to be in the log, and after a crash be seen, over what was written after it or where a
 * read has found it absent. So until the log is void these blocks are not read, and what would change them waits.
 */
#include <errno.h>

#include "log/state.h"

static void keep(struct nv_log *log, struct nv_log_request *request)
{
    request->held_ns = nv_io_now_ns(log->config.io);
    nv_log_push(&log->held, request);
}

void nv_log_hold(struct nv_log *log, struct nv_log_request *request)
{
    if (log->state == NV_LOG_VOID) /* a late completion: the others have gone already */
        nv_log_route(log, request);
    else if (log->shut)
        nv_log_finish(log, request, -ESHUTDOWN);
    else
        keep(log, request);
}

static void hold_all(struct nv_log *log, struct nv_log_list *list)
{
    struct nv_log_request *request;

    while ((request = nv_log_pop(list))) {
        if (request->dropped) {
            nv_log_leave(log, request);
            request->went_below = true;
        }
        keep(log, request);
    }
}

bool nv_log_stuck(const struct nv_log *log)
{
    return log->needs_word || log->destager.failed;
}

static void haunt(struct nv_log *log, const struct nv_log_request *request)
{
    if (log->haunted_count < NV_LOG_HAUNTED)
        log->haunted[log->haunted_count++] =
            (struct nv_log_range){request->offset / NV_LOG_UNIT, nv_log_units(request->length)};
    else
        log->haunted_count = NV_LOG_HAUNTED + 1;
}

void nv_log_shut(struct nv_log *log)
{
    struct nv_log_request *request;

    log->stopped = log->shut = true;
    hold_all(log, &log->waiting);
    hold_all(log, &log->entombing);
    hold_all(log, &log->blocked);
    while ((request = nv_log_pop(&log->held))) {
        if (request->under_way) /* what has waited behind it comes now, and may not be promised anything either */
            haunt(log, request);
        nv_log_finish(log, request, -ESHUTDOWN);
    }
}

/* What is written does not count any more: a record may be missing before it. */
static void sever(struct nv_log *log)
{
    log->severed = true;
    nv_log_carry_newest(log);
    for (struct nv_log_group *group = log->flight; group; group = group->next) {
        for (struct nv_log_request *request = group->requests.first; request; request = request->next)
            request->under_way = true;
        hold_all(log, &group->requests);
    }
}

static void distrust(struct nv_log *log, int error)
{
    if (log->state != NV_LOG_SERVING && log->state != NV_LOG_THROUGH)
        return;
    log->state = NV_LOG_FAILED;
    log->destager.retry_ns = 0;
    nv_log_carry_newest(log);
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

void nv_log_fail(struct nv_log *log, int error)
{
    if (log->state == NV_LOG_VOID)
        return;
    if (!log->severed)
        sever(log);
    distrust(log, error);
    nv_log_sync_fails(log, error); /* records that still counted when reads had failed may wait for one */
}

bool nv_log_is_late(const struct nv_log *log, uint64_t since_ns)
{
    const uint64_t deadline_ns = log->config.deadline_ms * 1000000ull;

    return deadline_ns && nv_io_now_ns(log->config.io) - since_ns > deadline_ns;
}

bool nv_log_hangs(const struct nv_log *log)
{
    bool hangs = false;

    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++)
        hangs |= log->bounces[i].late;
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++)
        hangs |= log->destager.runs[i].late;
    return hangs;
}

bool nv_log_haunted(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    bool haunted = log->haunted_count > NV_LOG_HAUNTED;

    for (uint32_t i = 0; i < log->haunted_count && !haunted; i++) {
        const struct nv_log_range *range = &log->haunted[i];
        haunted = first < range->first + range->count && range->first < first + blocks;
    }
    return haunted;
}

/* Nobody knows when the log will be void. */
static void answer_held(struct nv_log *log)
{
    struct nv_log_list all = log->held;
    struct nv_log_request *request;

    if (!all.first)
        return;
    log->held = (struct nv_log_list){NULL, &log->held.first};
    while ((request = nv_log_pop(&all))) {
        if (!nv_log_is_late(log, request->held_ns)) {
            nv_log_push(&log->held, request);
            continue;
        }
        if (request->under_way)
            haunt(log, request);
        if (request->went_below) /* what the log has counts: it is carried over that once more */
            nv_log_unsettle(log, request->offset / NV_LOG_UNIT, nv_log_units(request->length));
        nv_log_finish(log, request, -EIO);
    }
}

void nv_log_watch(struct nv_log *log)
{
    const struct nv_log_destager *destager = &log->destager;
    const bool reads = nv_log_give_up_reads(log), runs = nv_log_give_up_runs(log);

    nv_log_give_up_opening(log);
    if ((log->flight && nv_log_is_late(log, log->flight->since_ns)) ||
        (log->syncing && nv_log_is_late(log, log->sync_since_ns)))
        nv_log_fail(log, -ETIMEDOUT);
    if (reads || runs)
        distrust(log, -ETIMEDOUT);
    if (destager->super_out && !destager->given_up && nv_log_is_late(log, destager->super_since_ns))
        nv_log_give_up_super(log);
    if (log->state == NV_LOG_FAILED && nv_log_hangs(log) && destager->phase != NV_LOG_VOIDING && !log->needs_word)
        answer_held(log); /* else void comes without the device; what was written below by them would come to be seen */
}

void nv_log_is_void(struct nv_log *log)
{
    log->state = NV_LOG_VOID;
    log->needs_word = false;
    log->haunted_count = 0;
    nv_log_empty(log);
    nv_log_route_all(log, &log->held);
    nv_log_sync_fails(log, -EIO); /* the sync under way may never end */
    log->config.event(log->config.context, NV_LOG_DRAINED, 0);
}

void nv_log_forget(struct nv_log *log)
{
    log->forgotten = true;
    if (log->needs_word)
        nv_log_is_void(log);
}
