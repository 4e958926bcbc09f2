/*
 * Deliberate bugs, to prove that the simulation would see them. The binary nvsim_mutants is nvsim with some functions
 * replaced at link time (--wrap), so that the data plane's own code has no hooks; NVSIM_MUTANT=n in the environment
 * chooses one bug:
 *
 *   1  FLUSH is answered without a sync                    nv_sync_begin
 *   2  FUA writes are not durable                          nv_io_submit
 *   3  overlapping writes run in any order                 nv_range_enter
 *   4  a failed sync is forgotten at the next flush        nv_sync_begin
 *   5  a flush joins a sync that was already submitted     nv_sync_begin
 *   6  requests are parsed after the client hung up        nv_io_hung_up
 *   7  a write's memory is reused while it is under way    nv_io_submit
 *   8  a traced request keeps moments of an earlier one    nv_trace_note_parsed
 *   9  a fill forgets writes that came between             nv_cache_fill
 *  10  what was cached before an interruption is found     nv_cache_fresh_tag
 *  11  trims and zeroes drop nothing                       nv_cached_begins
 *  12  a write drops blocks at its end, not its beginning  nv_cache_write_begins, nv_cache_write_ends
 *  13  a frame is reused while a reply is sent from it     nv_cached_pin, nv_hit_release
 *  14  reads do not look into the log                      nv_logged_run
 *  15  blocks written in part are merged in any order      nv_range_enter
 *  16  zeros under a tombstone are a mere hint             nv_volume_below
 *  17  more is waited for than a client owes              nv_io_low_water
 *  18  requests go on while a log goes in or out           nv_gate_hold
 *  19  a log goes out with what it holds                   nv_logged_may_leave
 */
#include <stdatomic.h>
#include <stddef.h>

#include "cache/cache.h"
#include "io/io.h"
#include "nbd/session.h"
#include "sim/mutant.h"
#include "volume/flush.h"
#include "volume/logged.h"
#include "volume/range.h"

bool __real_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
bool __wrap_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
void __real_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __real_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
void __real_nv_logged_run(struct nv_vreq *request);
void __wrap_nv_logged_run(struct nv_vreq *request);
void __real_nv_volume_below(struct nv_vreq *request);
void __wrap_nv_volume_below(struct nv_vreq *request);
void __real_nv_gate_hold(struct nv_gate *gate, struct nv_vreq *request);
void __wrap_nv_gate_hold(struct nv_gate *gate, struct nv_vreq *request);
int __real_nv_logged_may_leave(const struct nv_logged *logged);
int __wrap_nv_logged_may_leave(const struct nv_logged *logged);
bool __real_nv_io_hung_up(nv_handle handle);
bool __wrap_nv_io_hung_up(nv_handle handle);
bool __real_nv_io_low_water(nv_handle handle, uint32_t bytes);
bool __wrap_nv_io_low_water(nv_handle handle, uint32_t bytes);

void __real_nv_trace_note_parsed(struct nv_request *request);
void __wrap_nv_trace_note_parsed(struct nv_request *request);

struct nv_cache_filled __real_nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count,
                                            uint64_t since, const uint8_t *bytes, bool ahead);
struct nv_cache_filled __wrap_nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count,
                                            uint64_t since, const uint8_t *bytes, bool ahead);
uint32_t __real_nv_cache_fresh_tag(uint32_t *given, uint32_t before);
uint32_t __wrap_nv_cache_fresh_tag(uint32_t *given, uint32_t before);
void __real_nv_cached_begins(struct nv_vreq *request);
void __wrap_nv_cached_begins(struct nv_vreq *request);
uint64_t __real_nv_cache_write_begins(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count);
uint64_t __wrap_nv_cache_write_begins(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count);
uint64_t __real_nv_cache_write_ends(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count,
                                    uint64_t time, uint64_t first_whole, uint64_t whole, const uint8_t *bytes);
uint64_t __wrap_nv_cache_write_ends(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count,
                                    uint64_t time, uint64_t first_whole, uint64_t whole, const uint8_t *bytes);
uint32_t __real_nv_cached_pin(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset,
                              uint64_t length, uint32_t *frames, uint32_t max);
uint32_t __wrap_nv_cached_pin(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset,
                              uint64_t length, uint32_t *frames, uint32_t max);
void __real_nv_hit_release(struct nv_request *request);
void __wrap_nv_hit_release(struct nv_request *request);

bool __wrap_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait)
{
    if (mutant(1)) {
        wait->error = 0;
        return true;
    }
    if (mutant(4))
        nv_sync_clear(sync);
    if (mutant(5) && sync->running && !atomic_load(&sync->fault)) {
        wait->reactor = reactor;
        wait->next = sync->riders;
        sync->riders = wait;
        return false;
    }
    return __real_nv_sync_begin(sync, reactor, wait);
}

void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    if (mutant(2))
        op->flags &= (uint8_t)~NV_OP_DSYNC;
    __real_nv_io_submit(io, op);
    if (mutant(7) && op->kind == NV_OP_WRITE && op->iov->iov_len == 1536)
        *(uint8_t *)op->iov->iov_base ^= 1;
}

void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range)
{
    static uint64_t unique;

    if (mutant(3)) {
        range->offset = (1ull << 60) + ++unique; /* a place where nobody else is */
        range->length = 1;
    }
    if (mutant(15)) {
        const struct nv_vreq *request = (struct nv_vreq *)((char *)range - offsetof(struct nv_vreq, range));
        range->offset = request->offset;
        range->length = request->length;
    }
    __real_nv_range_enter(table, range);
}

bool __wrap_nv_io_hung_up(nv_handle handle)
{
    return !mutant(6) && __real_nv_io_hung_up(handle);
}

bool __wrap_nv_io_low_water(nv_handle handle, uint32_t bytes)
{
    return __real_nv_io_low_water(handle, mutant(17) && bytes > 1 ? bytes + 512 : bytes);
}

void __wrap_nv_trace_note_parsed(struct nv_request *request)
{
    if (!mutant(8) || request->cookie % 8)
        __real_nv_trace_note_parsed(request);
}

void __wrap_nv_logged_run(struct nv_vreq *request)
{
    if (mutant(14) && request->kind == NV_REQUEST_READ)
        nv_volume_past_log(request);
    else
        __real_nv_logged_run(request);
}

void __wrap_nv_volume_below(struct nv_vreq *request)
{
    if (mutant(16) && request->kind == NV_REQUEST_ZERO && (request->flags & NV_REQUEST_FUA))
        request->kind = NV_REQUEST_TRIM;
    __real_nv_volume_below(request);
}

/* What is under way below when the log has gone in is in no FLUSH of the log's. */
void __wrap_nv_gate_hold(struct nv_gate *gate, struct nv_vreq *request)
{
    if (mutant(18) && request->kind != NV_REQUEST_FLUSH)
        nv_volume_past_log(request);
    else
        __real_nv_gate_hold(gate, request);
}

int __wrap_nv_logged_may_leave(const struct nv_logged *logged)
{
    return mutant(19) ? 0 : __real_nv_logged_may_leave(logged);
}

/* ---- the cache ---- */

struct nv_cache_filled __wrap_nv_cache_fill(struct nv_cache *cache, const struct nv_cache_spot *spot, uint64_t count,
                                            uint64_t since, const uint8_t *bytes, bool ahead)
{
    return __real_nv_cache_fill(cache, spot, count, mutant(9) ? UINT64_MAX : since, bytes, ahead);
}

uint32_t __wrap_nv_cache_fresh_tag(uint32_t *given, uint32_t before)
{
    return mutant(10) && before ? before : __real_nv_cache_fresh_tag(given, before);
}

void __wrap_nv_cached_begins(struct nv_vreq *request)
{
    if (!mutant(11) || (request->kind != NV_REQUEST_TRIM && request->kind != NV_REQUEST_ZERO))
        __real_nv_cached_begins(request);
}

uint64_t __wrap_nv_cache_write_begins(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count)
{
    return mutant(12) ? 0 : __real_nv_cache_write_begins(cache, owner, first, count);
}

uint64_t __wrap_nv_cache_write_ends(struct nv_cache *cache, uint32_t owner, uint64_t first, uint64_t count,
                                    uint64_t time, uint64_t first_whole, uint64_t whole, const uint8_t *bytes)
{
    if (mutant(12))
        time = __real_nv_cache_write_begins(cache, owner, first, count);
    return __real_nv_cache_write_ends(cache, owner, first, count, time, first_whole, whole, bytes);
}

uint32_t __wrap_nv_cached_pin(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset,
                              uint64_t length, uint32_t *frames, uint32_t max)
{
    const uint32_t count = __real_nv_cached_pin(reactor, local, offset, length, frames, max);

    for (uint32_t i = 0; mutant(13) && i < count; i++)
        nv_cache_unpin(local->volume->cached.cache, frames[i]);
    return count;
}

void __wrap_nv_hit_release(struct nv_request *request)
{
    if (!mutant(13)) {
        __real_nv_hit_release(request);
        return;
    }
    request->conn->pins -= request->frame_count;
    request->conn->reactor->pins -= request->frame_count;
}
