/*
 * A batch on its way below, in runs: adjacent blocks of one kind, up to 1 MiB. A run's data is read from the log and looked
 * at, then written below; what cannot be read is read again block by block, and then it is lost (nv_log_spoil). The more
 * the log is filled, the more runs are under way.
 *
 * A run whose reads pass the deadline leaves its batch: its blocks are carried with a later one, from other memory. They are
 * not lost; who knows when the device answers. The port owns its memory until its reads end: until then the run is out of use.
 */
#include "log/state.h"
#include "reactor/crc32c.h"

#define RUN_BYTES (NV_LOG_RUN_BLOCKS * (uint64_t)NV_LOG_UNIT)

static void write_on(struct nv_log_run *run);
static void read_on(struct nv_log_run *run);

/* ---- memory: what is below may still look at it when the write is over (a leg that hangs) ---- */

static uint16_t *users_of(struct nv_log *log, const uint8_t *data)
{
    const uint64_t into = (uint64_t)(data - log->destager.run_memory);

    assert(into < NV_LOG_RUN_MEMORIES * RUN_BYTES);
    return &log->destager.memory_users[into / RUN_BYTES];
}

/* NULL: all of it is kept. */
static uint8_t *take_memory(struct nv_log *log)
{
    for (uint32_t i = 0; i < NV_LOG_RUN_MEMORIES; i++)
        if (log->destager.memory_users[i] == 0) {
            log->destager.memory_users[i] = 1;
            return log->destager.run_memory + i * RUN_BYTES;
        }
    return NULL;
}

void nv_log_memory_kept(struct nv_log *log, const uint8_t *data)
{
    ++*users_of(log, data);
}

void nv_log_memory_back(struct nv_log *log, const uint8_t *data)
{
    uint16_t *users = users_of(log, data);

    assert(*users > 0);
    --*users;
}

static struct nv_log_version *version_of(const struct nv_log_run *run, uint32_t index)
{
    return nv_log_version(run->log, run->log->destager.batch[run->from + index].number);
}

static uint64_t block_of(const struct nv_log_run *run, uint32_t index)
{
    return run->log->destager.batch[run->from + index].block;
}

bool nv_log_carrying(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++) {
        const struct nv_log_run *run = &log->destager.runs[i];
        const uint64_t from = run->used && !run->late ? block_of(run, 0) : 0;
        if (run->used && !run->late && from < first + blocks && first < from + run->count)
            return true;
    }
    return false;
}

static void end_run(struct nv_log_run *run)
{
    run->used = false;
    nv_log_memory_back(run->log, run->memory);
    nv_log_unblock(run->log);
    nv_log_carry_on(run->log);
}

/* ---- below ---- */

static void written(struct nv_log_below *io)
{
    struct nv_log_run *run = (struct nv_log_run *)((char *)io - offsetof(struct nv_log_run, below));

    if (io->error) {
        run->log->destager.failed = true;
        for (uint32_t i = 0; i < run->writing; i++)
            version_of(run, run->at + i)->state = NV_LOG_LIVE;
    } else {
        run->log->destager.carried = true;
    }
    run->at += run->writing;
    write_on(run);
}

static void write_on(struct nv_log_run *run)
{
    struct nv_log *log = run->log;
    uint64_t offset, length;

    while (run->at < run->count && !run->fine[run->at])
        run->at++;
    if (run->at == run->count) {
        end_run(run);
        return;
    }
    run->writing = 1;
    while (run->at + run->writing < run->count && run->fine[run->at + run->writing])
        run->writing++;
    offset = block_of(run, run->at) * NV_LOG_UNIT;
    length = run->writing * (uint64_t)NV_LOG_UNIT;
    if (length > log->config.size - offset)
        length = log->config.size - offset; /* the VVol ends inside its last block */
    run->below = (struct nv_log_below){
        .kind = version_of(run, run->at)->kind == NV_LOG_ZERO ? NV_LOG_ZEROES : NV_LOG_WRITE, .ours = true,
        .offset = offset, .length = length, .data = run->memory + run->at * (uint64_t)NV_LOG_UNIT, .done = written,
    };
    nv_log_below(log, &run->below);
}

/* ---- from the log ---- */

/* All reads are done. */
static void look(struct nv_log_run *run)
{
    bool all = true;

    for (uint32_t i = 0; i < run->count; i++) {
        if (!run->fine[i])
            run->fine[i] = nv_crc32c(0, run->memory + i * (uint64_t)NV_LOG_UNIT, NV_LOG_UNIT) == version_of(run, i)->crc;
        all &= run->fine[i];
    }
    if (!all && !run->again) {
        run->again = true;
        run->next_read = 0;
        read_on(run);
        return;
    }
    for (uint32_t i = 0; i < run->count; i++) {
        if (run->fine[i])
            continue;
        version_of(run, i)->state = NV_LOG_LIVE;
        nv_log_spoil(run->log, run->log->destager.batch[run->from + i].number);
    }
    write_on(run);
}

static void end_late(struct nv_log_run *run)
{
    run->used = run->late = false;
    nv_log_memory_back(run->log, run->memory);
}

static void read_done(struct nv_op *op)
{
    struct nv_log_run_read *read = (struct nv_log_run_read *)((char *)op - offsetof(struct nv_log_run_read, op));

    if (!read->run->late && nv_log_goes_on(read->run->log, op))
        return;
    read->used = false;
    read->run->reading--;
    if (!read->run->late)
        read_on(read->run); /* what did not come fails its checksum */
    else if (read->run->reading == 0)
        end_late(read->run);
}

static void start_read(struct nv_log_run *run, struct nv_log_run_read *read)
{
    const struct nv_log *log = run->log;
    const uint32_t first = run->next_read, unit = version_of(run, first)->unit;
    uint32_t count = 1;

    while (!run->again && first + count < run->count && version_of(run, first + count)->unit == unit + count)
        count++;
    run->next_read += count;
    run->reading++;
    read->used = true;
    read->run = run;
    read->since_ns = nv_io_now_ns(log->config.io);
    read->iov = (struct iovec){run->memory + first * (uint64_t)NV_LOG_UNIT, count * (uint64_t)NV_LOG_UNIT};
    read->op = (struct nv_op){.kind = NV_OP_READ, .handle = log->config.handle, .iov = &read->iov, .iov_count = 1,
                              .offset = log->config.offset + NV_LOG_RING + unit * (uint64_t)NV_LOG_UNIT, .done = read_done};
    nv_io_submit(log->config.io, &read->op);
}

static void read_on(struct nv_log_run *run)
{
    for (uint32_t i = 0; i < NV_LOG_RUN_READS; i++) {
        while (run->next_read < run->count && run->fine[run->next_read])
            run->next_read++;
        if (run->next_read < run->count && !run->reads[i].used)
            start_read(run, &run->reads[i]);
    }
    if (run->reading == 0)
        look(run);
}

/* ---- runs ---- */

/* The next of the batch may be carried now. It may have been overtaken by a tombstone, or be about to. */
static bool may_go(struct nv_log *log, const struct nv_log_pick *pick)
{
    struct nv_log_version *version = nv_log_version(log, pick->number);

    if (version->state != NV_LOG_CARRIED)
        return false;
    if (nv_log_bypassing(log, pick->block)) {
        version->state = NV_LOG_LIVE;
        return false;
    }
    return true;
}

static void start_run(struct nv_log *log, struct nv_log_run *run, uint8_t *memory)
{
    struct nv_log_destager *destager = &log->destager;
    const struct nv_log_pick *first = &destager->batch[destager->next];
    const uint8_t kind = nv_log_version(log, first->number)->kind;
    const uint32_t most = nv_log_run_most(log);

    run->used = true;
    run->memory = memory;
    run->from = destager->next;
    run->count = 1;
    while (run->from + run->count < destager->count && run->count < most) {
        const struct nv_log_pick *next = first + run->count;
        if (next->block != first->block + run->count || !may_go(log, next) || nv_log_version(log, next->number)->kind != kind)
            break;
        run->count++;
    }
    destager->next += run->count;
    nv_log_took_time(log, run->count);
    run->at = run->next_read = run->reading = 0;
    run->again = false;
    for (uint32_t i = 0; i < run->count; i++)
        run->fine[i] = kind == NV_LOG_ZERO;
    if (kind == NV_LOG_ZERO)
        write_on(run);
    else
        read_on(run);
}

static uint32_t runs_max(const struct nv_log *log)
{
    const uint32_t quarters = nv_log_quarters(log);

    if (log->state == NV_LOG_FAILED || log->draining) /* nobody waits for room */
        return NV_LOG_RUNS_CALM;
    if (log->blocked.first || quarters >= 3)
        return log->config.runs ? log->config.runs : NV_LOG_RUNS;
    return 1 + quarters;
}

static void give_up(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;

    destager->failed = true;
    for (; destager->next < destager->count; destager->next++) {
        struct nv_log_version *version = nv_log_version(log, destager->batch[destager->next].number);
        if (version->state == NV_LOG_CARRIED)
            version->state = NV_LOG_LIVE;
    }
}

void nv_log_carry_newest(struct nv_log *log)
{
    const struct nv_log_destager *destager = &log->destager;

    for (uint32_t i = destager->next; i < destager->count; i++) {
        const struct nv_log_pick *pick = &destager->batch[i];
        struct nv_log_version *version = nv_log_version(log, pick->number);
        if (version->state == NV_LOG_CARRIED && nv_log_newest(log, pick->block) != pick->number)
            version->state = NV_LOG_LIVE;
    }
}

void nv_log_carry_on(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    uint32_t busy = 0;

    destager->waits = false;
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++)
        busy += destager->runs[i].used && !destager->runs[i].late;
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++) {
        uint8_t *memory;
        while (destager->next < destager->count && !may_go(log, &destager->batch[destager->next]))
            destager->next++;
        if (destager->next == destager->count || busy >= runs_max(log))
            break;
        if (destager->runs[i].used)
            continue;
        if (!nv_log_has_time(log))
            break;
        memory = take_memory(log);
        if (!memory) { /* what is left of the batch is tried again */
            give_up(log);
            break;
        }
        start_run(log, &destager->runs[i], memory);
        busy++;
    }
    if (busy == 0 && destager->next < destager->count && !destager->waits)
        give_up(log); /* all runs are late */
    if (busy == 0 && destager->next == destager->count)
        nv_log_carried(log);
}

/* ---- those that hang ---- */

static bool is_late(const struct nv_log_run *run)
{
    for (uint32_t i = 0; run->reading > 0 && i < NV_LOG_RUN_READS; i++)
        if (run->reads[i].used && nv_log_is_late(run->log, run->reads[i].since_ns))
            return true;
    return false;
}

bool nv_log_give_up_runs(struct nv_log *log)
{
    bool some = false;

    for (uint32_t i = 0; i < NV_LOG_RUNS; i++) {
        struct nv_log_run *run = &log->destager.runs[i];
        if (!run->used || run->late || !is_late(run))
            continue;
        for (uint32_t block = 0; block < run->count; block++)
            if (version_of(run, block)->state == NV_LOG_CARRIED)
                version_of(run, block)->state = NV_LOG_LIVE;
        run->late = some = log->destager.failed = true;
    }
    if (some) {
        nv_log_unblock(log);
        nv_log_carry_on(log);
    }
    return some;
}
