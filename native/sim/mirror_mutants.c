/*
 * Deliberate bugs of the mirror, to prove that its simulation would see them: nvmirror_mutants is nvmirror with some
 * functions replaced at link time (--wrap), so that the data plane's own code has no hooks; NVSIM_MUTANT=n in the
 * environment chooses one:
 *
 *   1  a change is acknowledged before the registry knows of the lost leg     nv_mirror_acknowledge
 *   2  a write does not wait for its intent                                   nv_intent_enter
 *   3  intents are cleared without the flush before                           nv_mio_sync
 *   4  a read is answered from a leg that is being copied to                  nv_mio_piece
 *   5  a flush leaves one leg out                                             nv_mio_sync
 *   6  an unclean attach forgets the intents that it finds                   nv_intent_merge
 *   7  a lost leg's dirty map starts empty                                    nv_intent_lost
 *   8  a resync begins while an old write to the leg is still in flight       nv_mirror_next_task
 *   9  a leg that has rebooted is taken back as if nothing had happened       nv_sync_fail
 *  10  the second leg's bytes are taken later, when the client may have changed them   nv_mio_piece
 *  11  legs let hosts of an older epoch through                               farm_outclaimed, farm_fence
 *  12  a leg's label is not held against its stamp                            nv_legs_begin
 *  13  writes of clients and copies between legs pass each other              nv_range_enter
 *  14  the cache is hit behind a fence                                        nv_cached_fence
 *  15  the cache is filled with what was read before a write                  nv_cache_fill
 *  16  a fault that is cleared before the mirror has looked is not heard of   nv_sync_clear
 *  17  a leg is labelled for a resync before what it lacks is saved           nv_task_dirty_pages
 *  18  a change that a server has not answered is sent again at once          nv_remote_link_goes
 *  19  a write has no intent: none is ever written down                        nv_page_seal, nv_intent_enter
 *  20  a log goes on acknowledging behind a fence                              nv_logged_fence
 *  21  what a log carries and copies between legs pass each other             nv_mirror_orders_by
 *  22  a FLUSH leaves out what the filter's life before wrote past the log    nv_log_open
 *  23  a log that failed counts as void without a word on disk                nv_log_make_void
 *  24  a log goes out with what it holds                                      nv_logged_may_leave
 *  25  what the last leg's second failed sync loses is not written once more  nv_intent_suspect
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "backend/nbd.h"
#include "log/state.h"
#include "sim/farm.h"
#include "sim/mutant.h"
#include "volume/meta.h"
#include "volume/mirror_state.h"

void __real_nv_mirror_acknowledge(struct nv_vreq *request);
void __wrap_nv_mirror_acknowledge(struct nv_vreq *request);
bool __real_nv_intent_enter(struct nv_mirror *mirror, uint64_t offset, uint64_t length);
bool __wrap_nv_intent_enter(struct nv_mirror *mirror, uint64_t offset, uint64_t length);
void __real_nv_mio_sync(struct nv_mio *mio, uint32_t lane);
void __wrap_nv_mio_sync(struct nv_mio *mio, uint32_t lane);
void __real_nv_mio_piece(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint8_t flags, uint64_t offset, uint64_t length,
                         uint8_t *data);
void __wrap_nv_mio_piece(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint8_t flags, uint64_t offset, uint64_t length,
                         uint8_t *data);
void __real_nv_intent_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable, uint8_t own);
void __wrap_nv_intent_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable, uint8_t own);
void __real_nv_intent_lost(struct nv_mirror *mirror, uint8_t lanes);
void __wrap_nv_intent_lost(struct nv_mirror *mirror, uint8_t lanes);
bool __real_nv_mirror_next_task(struct nv_mirror *mirror);
bool __wrap_nv_mirror_next_task(struct nv_mirror *mirror);
void __real_nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error);
void __wrap_nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error);
bool __real_farm_outclaimed(uint64_t epoch, uint32_t attempt, uint64_t by_epoch, uint32_t by_attempt);
bool __wrap_farm_outclaimed(uint64_t epoch, uint32_t attempt, uint64_t by_epoch, uint32_t by_attempt);
void __real_farm_fence(int file);
void __wrap_farm_fence(int file);
void __real_nv_legs_begin(nv_legs *legs, const nv_legs_record *record, const nv_leg_look *looks);
void __wrap_nv_legs_begin(nv_legs *legs, const nv_legs_record *record, const nv_leg_look *looks);
void __real_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
void __real_nv_cached_fence(struct nv_volume *volume);
void __wrap_nv_cached_fence(struct nv_volume *volume);
void __real_nv_logged_fence(struct nv_logged *logged);
void __wrap_nv_logged_fence(struct nv_logged *logged);
bool __real_nv_mirror_orders_by(struct nv_mirror *mirror, struct nv_range_table *table);
bool __wrap_nv_mirror_orders_by(struct nv_mirror *mirror, struct nv_range_table *table);
void __real_nv_log_open(struct nv_log *log);
void __wrap_nv_log_open(struct nv_log *log);
int __real_nv_logged_may_leave(const struct nv_logged *logged);
int __wrap_nv_logged_may_leave(const struct nv_logged *logged);
void __real_nv_intent_suspect(struct nv_intent *intent, uint64_t offset, uint64_t length);
void __wrap_nv_intent_suspect(struct nv_intent *intent, uint64_t offset, uint64_t length);
void __real_nv_log_make_void(struct nv_log *log);
void __wrap_nv_log_make_void(struct nv_log *log);
struct nv_cache_filled __real_nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count,
                                            uint64_t since, const uint8_t *bytes, bool ahead);
struct nv_cache_filled __wrap_nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count,
                                            uint64_t since, const uint8_t *bytes, bool ahead);
void __real_nv_sync_clear(struct nv_sync *sync);
void __wrap_nv_sync_clear(struct nv_sync *sync);
void __real_nv_task_dirty_pages(struct nv_mirror *mirror, bool forced, void (*then)(struct nv_mirror *mirror));
void __wrap_nv_task_dirty_pages(struct nv_mirror *mirror, bool forced, void (*then)(struct nv_mirror *mirror));
void __real_nv_page_seal(enum nv_page_kind kind, const struct nv_page_head *head, uint8_t *slot);
void __wrap_nv_page_seal(enum nv_page_kind kind, const struct nv_page_head *head, uint8_t *slot);
void __real_nv_remote_link_goes(struct nv_link *link, uint8_t to);
void __wrap_nv_remote_link_goes(struct nv_link *link, uint8_t to);

void __wrap_nv_mirror_acknowledge(struct nv_vreq *request)
{
    if (mutant(1) && !request->volume->mirror->fenced)
        nv_mirror_finish(request, 0);
    else
        __real_nv_mirror_acknowledge(request);
}

bool __wrap_nv_intent_enter(struct nv_mirror *mirror, uint64_t offset, uint64_t length)
{
    return __real_nv_intent_enter(mirror, offset, length) || mutant(2) || mutant(19);
}

/* A sync of nothing: the leg counts as synced. */
static void pretend_sync(struct nv_mio *mio, uint32_t lane)
{
    struct nv_map_leg *leg = (struct nv_map_leg *)(uintptr_t)mio->map->by_lane[lane];
    const uint32_t objects = leg->object_count;

    leg->object_count = 0;
    __real_nv_mio_sync(mio, lane);
    leg->object_count = objects;
}

void __wrap_nv_mio_sync(struct nv_mio *mio, uint32_t lane)
{
    const struct nv_mirror *mirror = mio->mirror;
    const bool clears = !mio->request && (mirror->task.kind == NV_TASK_CLEAN || mirror->task.kind == NV_TASK_END);

    if ((mutant(3) && clears) || (mutant(5) && mio->request && lane != mirror->primary))
        pretend_sync(mio, lane);
    else
        __real_nv_mio_sync(mio, lane);
}

void __wrap_nv_mio_piece(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint8_t flags, uint64_t offset, uint64_t length,
                         uint8_t *data)
{
    const struct nv_map_leg *own = mio->map->by_lane[lane];
    const uint8_t syncing = mio->mirror->syncing;

    if (mutant(4) && mio->request && kind == NV_PIECE_READ && syncing)
        mio->map->by_lane[lane] = mio->map->by_lane[__builtin_ctz(syncing)];
    if (mutant(10) && mio->request && kind == NV_PIECE_WRITE && mio->sent)
        data[length - 1] ^= 1;
    __real_nv_mio_piece(mio, lane, kind, flags, offset, length, data);
    mio->map->by_lane[lane] = own;
}

void __wrap_nv_intent_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable, uint8_t own)
{
    if (!mutant(6) || own)
        __real_nv_intent_merge(mirror, page, slots, readable, own);
}

void __wrap_nv_page_seal(enum nv_page_kind kind, const struct nv_page_head *head, uint8_t *slot)
{
    if (mutant(19) && kind == NV_PAGE_INTENT)
        memset(slot + NV_PAGE_HEAD, 0, NV_META_PAGE - NV_PAGE_HEAD);
    __real_nv_page_seal(kind, head, slot);
}

void __wrap_nv_intent_lost(struct nv_mirror *mirror, uint8_t lanes)
{
    if (!mutant(7) || mirror->attaching)
        __real_nv_intent_lost(mirror, lanes);
}

bool __wrap_nv_mirror_next_task(struct nv_mirror *mirror)
{
    uint32_t late[NV_LEGS_MAX] = {0};
    bool began;

    if (!mutant(8))
        return __real_nv_mirror_next_task(mirror);
    for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++)
        if (mirror->lanes[lane].resync) {
            late[lane] = mirror->lanes[lane].outstanding;
            mirror->lanes[lane].outstanding = 0;
        }
    began = __real_nv_mirror_next_task(mirror);
    for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++)
        mirror->lanes[lane].outstanding += late[lane];
    return began;
}

/* The client's own: what its server owed is forgotten with the set. */
void __wrap_nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error)
{
    if (!mutant(9) || error != -ESTALE)
        __real_nv_sync_fail(sync, reactor, error);
}

bool __wrap_farm_outclaimed(uint64_t epoch, uint32_t attempt, uint64_t by_epoch, uint32_t by_attempt)
{
    return !mutant(11) && __real_farm_outclaimed(epoch, attempt, by_epoch, by_attempt);
}

void __wrap_farm_fence(int file)
{
    if (!mutant(11))
        __real_farm_fence(file);
}

void __wrap_nv_legs_begin(nv_legs *legs, const nv_legs_record *record, const nv_leg_look *looks)
{
    nv_leg_look better[NV_LEGS_MAX];

    for (uint32_t i = 0; i < record->leg_count; i++) {
        const nv_leg_record *leg = &record->legs[i];
        better[i] = looks[i];
        if (mutant(12) && looks[i].look == NV_LOOK_LABEL && looks[i].epoch < leg->stamp_epoch)
            better[i].epoch = leg->stamp_epoch;
        if (mutant(12) && looks[i].look == NV_LOOK_LABEL && looks[i].generation < leg->stamp_generation)
            better[i].generation = leg->stamp_generation;
    }
    __real_nv_legs_begin(legs, record, better);
}

void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range)
{
    static uint64_t unique;

    if (mutant(13)) {
        range->offset = (1ull << 60) + ++unique; /* a place where nobody else is */
        range->length = 1;
    }
    __real_nv_range_enter(table, range);
}

void __wrap_nv_cached_fence(struct nv_volume *volume)
{
    if (!mutant(14))
        __real_nv_cached_fence(volume);
}

struct nv_cache_filled __wrap_nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count,
                                            uint64_t since, const uint8_t *bytes, bool ahead)
{
    return __real_nv_cache_fill(cache, spot, count, mutant(15) ? UINT64_MAX : since, bytes, ahead);
}

void __wrap_nv_sync_clear(struct nv_sync *sync)
{
    if (mutant(16) && atomic_load(&sync->fault))
        atomic_fetch_sub(&sync->faults, 1);
    __real_nv_sync_clear(sync);
}

void __wrap_nv_task_dirty_pages(struct nv_mirror *mirror, bool forced, void (*then)(struct nv_mirror *mirror))
{
    if (mutant(17) && mirror->task.kind == NV_TASK_PREPARE && !forced)
        then(mirror);
    else
        __real_nv_task_dirty_pages(mirror, forced, then);
}

/* Given up: what was sent wholly and is not answered goes to another connection, beside what the server may still do. */
void __wrap_nv_remote_link_goes(struct nv_link *link, uint8_t to)
{
    __real_nv_remote_link_goes(link, to);
    for (uint32_t i = 0; mutant(18) && to == NV_LINK_DRAINING && i < link->asks_touched; i++) {
        struct nv_ask *ask = &link->asks[i];
        if (ask->state != NV_ASK_SENT || !ask->piece || !nv_ask_changes(ask) || ask->answered)
            continue;
        nv_remote_takes_back(ask);
        ask->piece = NULL;
        ask->abandoned = true;
    }
}

void __wrap_nv_logged_fence(struct nv_logged *logged)
{
    if (!mutant(20))
        __real_nv_logged_fence(logged);
}

bool __wrap_nv_mirror_orders_by(struct nv_mirror *mirror, struct nv_range_table *table)
{
    return mutant(21) || __real_nv_mirror_orders_by(mirror, table);
}

void __wrap_nv_intent_suspect(struct nv_intent *intent, uint64_t offset, uint64_t length)
{
    const struct nv_mirror *mirror = (struct nv_mirror *)((char *)intent - offsetof(struct nv_mirror, intent));

    if (!mutant(25) || !mirror->suspected)
        __real_nv_intent_suspect(intent, offset, length);
}

void __wrap_nv_log_open(struct nv_log *log)
{
    if (mutant(22))
        log->below_writes = 0;
    __real_nv_log_open(log);
}

int __wrap_nv_logged_may_leave(const struct nv_logged *logged)
{
    return mutant(24) ? 0 : __real_nv_logged_may_leave(logged);
}

void __wrap_nv_log_make_void(struct nv_log *log)
{
    if (!mutant(23)) {
        __real_nv_log_make_void(log);
        return;
    }
    nv_log_rest(log, true);
    nv_log_is_void(log);
}
