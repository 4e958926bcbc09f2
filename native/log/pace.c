/*
 * The rate of destaging: `config.rate` bytes a second go below, in runs that each take their time, as a mirror's copier
 * does. When it counts, destage.c decides: nv_log_paced().
 *
 * Invariant: while it counts, from any moment on no more begins to be carried than the rate times that long and
 * NV_LOG_PACED_MS, and one run.
 */
#include "log/state.h"

static uint32_t blocks_in(const struct nv_log *log, uint64_t ms, uint32_t least, uint32_t most)
{
    const uint64_t rate = log->config.rate, blocks = rate / 1000u * ms / NV_LOG_UNIT;

    if (blocks < least)
        return least;
    return blocks < most ? (uint32_t)blocks : most;
}

uint32_t nv_log_run_most(const struct nv_log *log)
{
    return nv_log_paced(log) ? blocks_in(log, NV_LOG_PACED_MS, NV_LOG_PACED_BLOCKS, NV_LOG_RUN_BLOCKS) : NV_LOG_RUN_BLOCKS;
}

uint32_t nv_log_batch_most(const struct nv_log *log)
{
    return nv_log_paced(log) ? blocks_in(log, NV_LOG_PACED_BATCH_MS, NV_LOG_PACED_BLOCKS, NV_LOG_BATCH) : NV_LOG_BATCH;
}

static void time_comes(struct nv_op *op)
{
    struct nv_log *log = (struct nv_log *)((char *)op - offsetof(struct nv_log, destager.timer));

    log->destager.timer_out = false;
    nv_log_resume(log);
}

static void wait_for_time(struct nv_log *log, uint64_t wait_ns)
{
    struct nv_log_destager *destager = &log->destager;

    destager->waits = destager->waited = true;
    if (destager->timer_out)
        return;
    if (wait_ns > NV_LOG_TIMER_MAX_MS * 1000000ull)
        wait_ns = NV_LOG_TIMER_MAX_MS * 1000000ull;
    destager->timer_out = true;
    destager->timer = (struct nv_op){.kind = NV_OP_TIMER, .done = time_comes, .length = wait_ns};
    nv_io_submit(log->config.io, &destager->timer);
}

bool nv_log_has_time(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    uint64_t now_ns;

    if (!nv_log_paced(log))
        return true;
    now_ns = nv_io_now_ns(log->config.io);
    if (destager->due_ns > now_ns) {
        wait_for_time(log, destager->due_ns - now_ns);
        return false;
    }
    if (now_ns - destager->due_ns > NV_LOG_PACED_MS * 1000000ull)
        destager->due_ns = now_ns - NV_LOG_PACED_MS * 1000000ull;
    return true;
}

void nv_log_took_time(struct nv_log *log, uint32_t blocks)
{
    if (nv_log_paced(log))
        log->destager.due_ns += blocks * (uint64_t)NV_LOG_UNIT * 1000000000ull / log->config.rate;
}

void nv_log_resume(struct nv_log *log)
{
    if (log->destager.waits)
        nv_log_carry_on(log);
}
