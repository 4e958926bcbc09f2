/*
 * Destaging, a batch at a time: the log is synced; of what is synced the oldest versions are taken, of each block the
 * newest synced one, and carried below in the order of the VVol (carry.c); what is below is flushed; then they are settled
 * and the tail moves (super.c). How much is under way depends on how full the log is, and on the rate (pace.c).
 */
#include <stdlib.h>

#include "log/state.h"

static bool is_due(const struct nv_log *log, uint64_t now_ns)
{
    if (log->mark_tail == log->mark_head)
        return log->state == NV_LOG_FAILED;
    if (log->draining || log->state == NV_LOG_FAILED || log->blocked.first || nv_log_used(log) > log->ring / 4)
        return true;
    return now_ns - log->marks[log->mark_tail & log->mark_mask].since_ns >= log->config.age_ms * 1000000ull;
}

/* The rate is there to leave storage to others: it counts only while nobody needs what is carried to be over. */
bool nv_log_paced(const struct nv_log *log)
{
    const bool serves = log->state == NV_LOG_SERVING || log->state == NV_LOG_THROUGH;

    return log->config.rate > 0 && serves && !log->draining && !log->stopped && !log->blocked.first &&
           nv_log_quarters(log) < 3;
}

void nv_log_rest(struct nv_log *log, bool moved)
{
    struct nv_log_destager *destager = &log->destager;
    const uint64_t now_ns = nv_io_now_ns(log->config.io);

    destager->phase = NV_LOG_RESTING;
    if (destager->failed)
        destager->retry_ns = now_ns + NV_LOG_RETRY_MS * 1000000ull;
    else
        destager->retry_ns = moved ? 0 : now_ns + NV_LOG_REST_MS * 1000000ull;
}

/* ---- a batch ---- */

static int by_block(const void *left, const void *right)
{
    const struct nv_log_pick *a = left, *b = right;

    return a->block < b->block ? -1 : a->block > b->block;
}

/* What is to be carried of a version's block: itself, or a newer one that is synced, too. */
static void pick(struct nv_log *log, uint64_t number, uint64_t limit, bool *left_out)
{
    struct nv_log_destager *destager = &log->destager;
    const struct nv_log_version *version = nv_log_version(log, number);
    uint64_t newest;

    if (version->state != NV_LOG_LIVE || version->bad)
        return;
    if (nv_log_bypassing(log, version->block)) {
        *left_out = true;
        return;
    }
    newest = nv_log_carry(log, version->block, limit);
    assert(newest != NV_LOG_NONE && newest >= number);
    version = nv_log_version(log, newest);
    if (version->state != NV_LOG_LIVE || version->bad)
        return;
    nv_log_version(log, newest)->state = NV_LOG_CARRIED;
    destager->batch[destager->count++] = (struct nv_log_pick){version->block, newest};
}

/*
 * The fuller the log, the longer a batch: more is merged, and the flush below is paid once. But only at its end there is
 * room again in a log that is full, so it is no longer than storage carries in time.
 */
static uint32_t batch_max(const struct nv_log *log)
{
    const bool full = nv_log_used(log) > log->ring / 2 || log->draining || log->state == NV_LOG_FAILED;
    const uint32_t wish = full ? NV_LOG_BATCH : NV_LOG_BATCH / 8, most = nv_log_batch_most(log);
    const uint32_t least = log->destager.most < wish ? log->destager.most : wish;

    return least < most ? least : most;
}

/* What the last batch says of the next one. */
static void adapt(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    const uint64_t took_ms = (nv_io_now_ns(log->config.io) - destager->began_ns) / 1000000u;

    if (destager->waited)
        return;
    if (took_ms > NV_LOG_BATCH_MS)
        destager->most = destager->count / 2 < NV_LOG_BATCH_MIN ? NV_LOG_BATCH_MIN : destager->count / 2;
    else if (took_ms <= NV_LOG_BATCH_MS / 2 && destager->most < NV_LOG_BATCH && destager->count >= destager->most)
        destager->most = destager->most * 2;
    if (destager->most > NV_LOG_BATCH)
        destager->most = NV_LOG_BATCH;
}

static void collect(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    const uint64_t limit = nv_log_carry_limit(log);
    bool left_out = false;
    uint32_t max;

    if (destager->most == 0) /* nothing is known of storage yet */
        destager->most = NV_LOG_BATCH / 8;
    max = batch_max(log);
    destager->count = destager->next = 0;
    destager->failed = destager->carried = destager->waited = false;
    destager->began_ns = nv_io_now_ns(log->config.io);
    for (uint64_t number = log->version_tail; number < limit && destager->count < max; number++)
        pick(log, number, limit, &left_out);
    if (destager->count == 0 && log->state == NV_LOG_FAILED) {
        if (left_out || (log->flight && !log->severed)) /* records that may have to be carried, too */
            nv_log_rest(log, false);
        else
            nv_log_make_void(log);
        return;
    }
    qsort(destager->batch, destager->count, sizeof *destager->batch, by_block);
    destager->phase = NV_LOG_CARRYING;
    nv_log_carry_on(log);
}

static void log_synced(struct nv_log_sync_wait *wait, int error)
{
    struct nv_log *log = (struct nv_log *)((char *)wait - offsetof(struct nv_log, destager.sync));

    if (error)
        nv_log_rest(log, true);
    else
        collect(log);
}

void nv_log_destage(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    const uint64_t now_ns = nv_io_now_ns(log->config.io);
    const bool alive = log->state == NV_LOG_THROUGH || log->state == NV_LOG_SERVING || log->state == NV_LOG_FAILED;

    nv_log_resume(log);
    if (destager->phase != NV_LOG_RESTING || !alive || log->stopped || log->needs_word || now_ns < destager->retry_ns ||
        !is_due(log, now_ns))
        return;
    destager->phase = NV_LOG_SYNCING;
    destager->sync.done = log_synced;
    if (log->state == NV_LOG_FAILED || nv_log_sync(log, &destager->sync))
        collect(log);
}

/* ---- its end ---- */

static void put_back(struct nv_log *log)
{
    for (uint32_t i = 0; i < log->destager.count; i++) {
        struct nv_log_version *version = nv_log_version(log, log->destager.batch[i].number);
        if (version->state == NV_LOG_CARRIED)
            version->state = NV_LOG_LIVE;
    }
}

static void settle_batch(struct nv_log *log)
{
    for (uint32_t i = 0; i < log->destager.count; i++) {
        const uint64_t number = log->destager.batch[i].number;
        if (nv_log_version(log, number)->state != NV_LOG_CARRIED)
            continue;
        nv_log_settle(log, number);
        log->counts.destaged++;
    }
}

static void flushed(struct nv_log_below *io)
{
    struct nv_log *log = io->log;

    if (io->error) {
        put_back(log);
        log->destager.failed = true;
        nv_log_rest(log, false);
        return;
    }
    adapt(log);
    if (log->destager.covers > log->below_flushed)
        log->below_flushed = log->destager.covers;
    settle_batch(log);
    nv_log_move_tail(log);
}

void nv_log_carried(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;

    if (!destager->carried) {
        put_back(log);
        nv_log_move_tail(log);
        return;
    }
    destager->phase = NV_LOG_FLUSHING;
    destager->covers = log->below_writes; /* bypassed changes that this flush covers, too */
    destager->flush = (struct nv_log_below){.kind = NV_LOG_FLUSH, .ours = true, .done = flushed};
    nv_log_below(log, &destager->flush);
}
