/*
 * Deliberate bugs in the write-back log, to prove that nvlog would see them: functions replaced at link time (--wrap), so
 * that the log's own code has no hooks. NVSIM_MUTANT=n in the environment chooses one:
 *
 *   1  FUA is answered before the log is durable                  nv_log_sync
 *   2  the tail moves before what is below is flushed              nv_log_below
 *   3  recovery goes on past a record whose data are damaged       nv_log_data_valid
 *   4  recovery takes what an earlier life left (no chain)         nv_log_head_follows
 *   5  what is not synced is destaged                              nv_log_carry_limit
 *   6  of a block the oldest version is carried, not the newest    nv_log_carry
 *   7  a bypass leaves no tombstone                                nv_log_add
 *   8  what is settled counts as not covered                       nv_log_covered
 *   9  a bypass that failed leaves what is below trusted           nv_log_unsettle
 *  10  a bypass runs beside a destage write                        nv_log_carrying
 *  11  destaging takes no notice of a bypass                       nv_log_bypassing
 *  12  a log that failed counts as void without a word on disk     nv_log_make_void
 *  13  a bypass runs beside an older read from below               nv_log_reading
 *  14  what cannot be read from the log counts as settled         nv_log_spoil
 *  15  what comes late is held by a log that is void already      nv_log_hold
 *  16  of a full log all there is is one batch                    nv_log_move_tail
 *  17  a full log has no more destage writes under way than a calm one
 *  18  a rate counts in a full log, too                           nv_log_paced
 *  19  ... and in one that is drained                             nv_log_paced
 *  20  no rate counts                                             nv_log_paced
 *  21  a sync and the superblock have no deadline                 nv_log_watch
 *  22  memory of what was carried that storage still uses is free at once  nv_log_memory_kept, nv_log_memory_back
 *  23  of those that wait for memory to read into one is woken at a time  nv_log_pop
 *  24  when the log has failed, older versions are carried as well   nv_log_carry_newest
 *  25  a log whose tail is lost for ever is well                      nv_log_fail
 *  26  reads have no deadline                                     nv_log_give_up_reads
 *  27  a read that was given up goes below, to what is older      nv_log_give_up_reads
 *  28  an opening has no deadline                                  nv_log_give_up_opening
 *  29  one that was given up goes on when its device answers       nv_log_give_up_opening
 *  30  a small record waits for what no client sends               nv_log_expect
 *  31  what failed and may yet come to be in the log haunts no block   nv_log_haunted
 */
#include <errno.h>

#include "log/state.h"
#include "sim/mutant.h"

bool __real_nv_log_sync(struct nv_log *log, struct nv_log_sync_wait *wait);
bool __wrap_nv_log_sync(struct nv_log *log, struct nv_log_sync_wait *wait);
void __real_nv_log_below(struct nv_log *log, struct nv_log_below *io);
void __wrap_nv_log_below(struct nv_log *log, struct nv_log_below *io);
bool __real_nv_log_data_valid(const uint8_t *unit, const struct nv_log_head *head, const uint8_t *data);
bool __wrap_nv_log_data_valid(const uint8_t *unit, const struct nv_log_head *head, const uint8_t *data);
bool __real_nv_log_head_follows(const struct nv_log_head *head, const uint8_t *id, uint64_t next, uint32_t chain);
bool __wrap_nv_log_head_follows(const struct nv_log_head *head, const uint8_t *id, uint64_t next, uint32_t chain);
uint64_t __real_nv_log_carry_limit(const struct nv_log *log);
uint64_t __wrap_nv_log_carry_limit(const struct nv_log *log);
uint64_t __real_nv_log_carry(const struct nv_log *log, uint64_t block, uint64_t limit);
uint64_t __wrap_nv_log_carry(const struct nv_log *log, uint64_t block, uint64_t limit);
enum nv_log_added __real_nv_log_add(struct nv_log *log, struct nv_log_request *request, uint32_t kind);
enum nv_log_added __wrap_nv_log_add(struct nv_log *log, struct nv_log_request *request, uint32_t kind);
bool __real_nv_log_covered(const struct nv_log *log, uint64_t first, uint64_t blocks);
bool __wrap_nv_log_covered(const struct nv_log *log, uint64_t first, uint64_t blocks);
void __real_nv_log_unsettle(struct nv_log *log, uint64_t first, uint64_t blocks);
void __wrap_nv_log_unsettle(struct nv_log *log, uint64_t first, uint64_t blocks);
bool __real_nv_log_carrying(const struct nv_log *log, uint64_t first, uint64_t blocks);
bool __wrap_nv_log_carrying(const struct nv_log *log, uint64_t first, uint64_t blocks);
bool __real_nv_log_bypassing(const struct nv_log *log, uint64_t block);
bool __wrap_nv_log_bypassing(const struct nv_log *log, uint64_t block);
void __real_nv_log_make_void(struct nv_log *log);
void __wrap_nv_log_make_void(struct nv_log *log);
bool __real_nv_log_reading(const struct nv_log *log, uint64_t first, uint64_t blocks);
bool __wrap_nv_log_reading(const struct nv_log *log, uint64_t first, uint64_t blocks);
void __real_nv_log_spoil(struct nv_log *log, uint64_t number);
void __wrap_nv_log_spoil(struct nv_log *log, uint64_t number);
void __real_nv_log_hold(struct nv_log *log, struct nv_log_request *request);
void __wrap_nv_log_hold(struct nv_log *log, struct nv_log_request *request);
void __real_nv_log_move_tail(struct nv_log *log);
void __wrap_nv_log_move_tail(struct nv_log *log);
bool __real_nv_log_paced(const struct nv_log *log);
bool __wrap_nv_log_paced(const struct nv_log *log);
void __real_nv_log_memory_kept(struct nv_log *log, const uint8_t *data);
void __wrap_nv_log_memory_kept(struct nv_log *log, const uint8_t *data);
void __real_nv_log_memory_back(struct nv_log *log, const uint8_t *data);
void __wrap_nv_log_memory_back(struct nv_log *log, const uint8_t *data);
struct nv_log_request *__real_nv_log_pop(struct nv_log_list *list);
struct nv_log_request *__wrap_nv_log_pop(struct nv_log_list *list);
bool __real_nv_log_give_up_reads(struct nv_log *log);
bool __wrap_nv_log_give_up_reads(struct nv_log *log);
bool __real_nv_log_haunted(const struct nv_log *log, uint64_t first, uint64_t blocks);
bool __wrap_nv_log_haunted(const struct nv_log *log, uint64_t first, uint64_t blocks);
void __real_nv_log_give_up_opening(struct nv_log *log);
void __wrap_nv_log_give_up_opening(struct nv_log *log);
void __real_nv_log_expect(struct nv_log *log, bool more);
void __wrap_nv_log_expect(struct nv_log *log, bool more);
void __real_nv_log_watch(struct nv_log *log);
void __wrap_nv_log_watch(struct nv_log *log);

void __real_nv_log_fail(struct nv_log *log, int error);
void __wrap_nv_log_fail(struct nv_log *log, int error);
void __real_nv_log_carry_newest(struct nv_log *log);
void __wrap_nv_log_carry_newest(struct nv_log *log);

static const struct nv_log *watched;

bool __wrap_nv_log_sync(struct nv_log *log, struct nv_log_sync_wait *wait)
{
    return (mutant(1) && wait != &log->destager.sync) || __real_nv_log_sync(log, wait);
}

void __wrap_nv_log_below(struct nv_log *log, struct nv_log_below *io)
{
    static uint8_t nothing[512];

    if (mutant(2) && io->ours && io->kind == NV_LOG_FLUSH) {
        io->kind = NV_LOG_READ;
        io->length = sizeof nothing;
        io->data = nothing;
    }
    __real_nv_log_below(log, io);
}

bool __wrap_nv_log_data_valid(const uint8_t *unit, const struct nv_log_head *head, const uint8_t *data)
{
    return mutant(3) || __real_nv_log_data_valid(unit, head, data);
}

bool __wrap_nv_log_head_follows(const struct nv_log_head *head, const uint8_t *id, uint64_t next, uint32_t chain)
{
    return __real_nv_log_head_follows(head, id, next, mutant(4) ? head->chain : chain);
}

uint64_t __wrap_nv_log_carry_limit(const struct nv_log *log)
{
    return mutant(5) ? log->version_head : __real_nv_log_carry_limit(log);
}

uint64_t __wrap_nv_log_carry(const struct nv_log *log, uint64_t block, uint64_t limit)
{
    uint64_t number = __real_nv_log_carry(log, block, limit);

    while (mutant(6) && nv_log_version(log, number)->older != NV_LOG_NONE &&
           nv_log_version(log, number)->older >= log->version_tail &&
           nv_log_version(log, nv_log_version(log, number)->older)->state == NV_LOG_LIVE)
        number = nv_log_version(log, number)->older;
    return number;
}

enum nv_log_added __wrap_nv_log_add(struct nv_log *log, struct nv_log_request *request, uint32_t kind)
{
    if (mutant(7) && kind == NV_LOG_TOMBSTONE) {
        nv_log_entombed(log, request);
        return NV_LOG_ADDED;
    }
    return __real_nv_log_add(log, request, kind);
}

bool __wrap_nv_log_covered(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    if (!mutant(8))
        return __real_nv_log_covered(log, first, blocks);
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t number = nv_log_newest(log, first + i);
        if (number != NV_LOG_NONE && nv_log_version(log, number)->state != NV_LOG_SETTLED)
            return true;
    }
    return false;
}

void __wrap_nv_log_unsettle(struct nv_log *log, uint64_t first, uint64_t blocks)
{
    if (!mutant(9))
        __real_nv_log_unsettle(log, first, blocks);
}

bool __wrap_nv_log_carrying(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    return !mutant(10) && __real_nv_log_carrying(log, first, blocks);
}

bool __wrap_nv_log_bypassing(const struct nv_log *log, uint64_t block)
{
    return !mutant(11) && __real_nv_log_bypassing(log, block);
}

void __wrap_nv_log_make_void(struct nv_log *log)
{
    if (!mutant(12)) {
        __real_nv_log_make_void(log);
        return;
    }
    nv_log_rest(log, true);
    nv_log_is_void(log);
}

bool __wrap_nv_log_reading(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    return !mutant(13) && __real_nv_log_reading(log, first, blocks);
}

void __wrap_nv_log_spoil(struct nv_log *log, uint64_t number)
{
    if (mutant(14)) /* as if there were no version: the bytes below are returned */
        nv_log_version(log, number)->state = NV_LOG_SETTLED;
    __real_nv_log_spoil(log, number);
}

void __wrap_nv_log_hold(struct nv_log *log, struct nv_log_request *request)
{
    if (mutant(15))
        nv_log_push(&log->held, request);
    else
        __real_nv_log_hold(log, request);
}

void __wrap_nv_log_move_tail(struct nv_log *log)
{
    if (mutant(16))
        log->destager.most = NV_LOG_BATCH;
    if (mutant(17))
        log->config.runs = NV_LOG_RUNS_CALM;
    __real_nv_log_move_tail(log);
}

bool __wrap_nv_log_paced(const struct nv_log *log)
{
    if (mutant(18) && !log->draining)
        return log->config.rate > 0;
    if (mutant(19) && log->draining)
        return log->config.rate > 0;
    return !mutant(20) && __real_nv_log_paced(log);
}

static void mislead(struct nv_log *log)
{
    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++) {
        struct nv_log_bounce *bounce = &log->bounces[i];
        if (!bounce->used || bounce->late || !nv_log_is_late(log, bounce->since_ns))
            continue;
        for (uint32_t block = 0; block < bounce->count; block++) {
            nv_log_settle(log, bounce->numbers[block]);
            nv_log_version(log, bounce->numbers[block])->bad = true;
            nv_log_version(log, bounce->numbers[block])->pins--;
        }
        bounce->count = 0;
        nv_log_read(log, bounce->request);
        bounce->request = NULL;
        bounce->late = true;
    }
}

bool __wrap_nv_log_give_up_reads(struct nv_log *log)
{
    if (mutant(26))
        return false;
    if (mutant(27))
        mislead(log);
    return __real_nv_log_give_up_reads(log);
}

bool __wrap_nv_log_haunted(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    return !mutant(31) && __real_nv_log_haunted(log, first, blocks);
}

void __wrap_nv_log_give_up_opening(struct nv_log *log)
{
    if (!mutant(28))
        __real_nv_log_give_up_opening(log);
    if (mutant(29))
        log->abandoned = false;
}

void __wrap_nv_log_expect(struct nv_log *log, bool more)
{
    static bool expects;

    expects |= mutant(30) && more;
    __real_nv_log_expect(log, more || expects);
}

void __wrap_nv_log_watch(struct nv_log *log)
{
    watched = log;
    if (mutant(21))
        log->sync_since_ns = log->destager.super_since_ns = nv_io_now_ns(log->config.io);
    __real_nv_log_watch(log);
}

void __wrap_nv_log_memory_kept(struct nv_log *log, const uint8_t *data)
{
    if (!mutant(22))
        __real_nv_log_memory_kept(log, data);
}

void __wrap_nv_log_memory_back(struct nv_log *log, const uint8_t *data)
{
    if (!mutant(22))
        __real_nv_log_memory_back(log, data);
}

struct nv_log_request *__wrap_nv_log_pop(struct nv_log_list *list)
{
    static bool again;

    if (!mutant(23) || !watched || list != &watched->thirsty)
        return __real_nv_log_pop(list);
    again = !again;
    return again ? __real_nv_log_pop(list) : NULL;
}

void __wrap_nv_log_carry_newest(struct nv_log *log)
{
    if (!mutant(24))
        __real_nv_log_carry_newest(log);
}

void __wrap_nv_log_fail(struct nv_log *log, int error)
{
    if (!mutant(25) || !log->blocked.first || !nv_log_tail_is_lost(log))
        __real_nv_log_fail(log, error);
}
