/*
 * Deliberate bugs, to prove that the simulation would see them. Linked in place of the real function by
 * --wrap=FUNCTION (CMakeLists.txt), one per binary, so that the data plane's own code has no hooks.
 *
 *   1  FLUSH is answered without a sync                    nv_sync_begin
 *   2  FUA writes are not durable                          nv_io_submit
 *   3  overlapping writes run in any order                 nv_range_enter
 *   4  a failed sync is forgotten at the next flush        nv_sync_begin
 *   5  a flush joins a sync that was already submitted     nv_sync_begin
 *   6  requests are parsed after the client hung up        nv_io_hung_up
 */
#include <stdatomic.h>

#include "io/io.h"
#include "volume/flush.h"
#include "volume/range.h"

#ifndef NV_MUTANT
#define NV_MUTANT 0 /* a compile for the warnings alone */
#endif

bool __real_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
bool __wrap_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
void __real_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __real_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
bool __wrap_nv_io_hung_up(nv_handle handle);

bool __wrap_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait)
{
#if NV_MUTANT == 1
    wait->error = 0;
    return true;
#elif NV_MUTANT == 4
    nv_sync_clear(sync);
#elif NV_MUTANT == 5
    if (sync->running && !atomic_load(&sync->fault)) {
        wait->reactor = reactor;
        wait->next = sync->riders;
        sync->riders = wait;
        return false;
    }
#endif
    return __real_nv_sync_begin(sync, reactor, wait);
}

void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    op->flags &= (uint8_t)~NV_OP_DSYNC;
    __real_nv_io_submit(io, op);
}

void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range)
{
    static uint64_t unique;

    range->offset = (1ull << 60) + ++unique; /* a place where nobody else is */
    range->length = 1;
    __real_nv_range_enter(table, range);
}

bool __wrap_nv_io_hung_up(nv_handle handle)
{
    (void)handle;
    return false;
}
