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
 *
 * and of the client of remote exports:
 *
 *   9  a remote server's restart goes unnoticed            nv_sync_fail
 *  10  an answer is given to another request               nv_remote_concluded
 *  11  a request whose link is lost counts as done         nv_remote_again
 *  12  a link joins the set by an old sign of life         nv_remote_link_came
 *  13  FUA is not passed on                                nv_link_queue
 *  14  a remote FLUSH that fails counts as done            nv_remote_concluded
 *  15  a FLUSH settles what was written after it           nv_remote_concluded
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "backend/nbd.h"
#include "io/io.h"
#include "nbd/session.h"
#include "volume/flush.h"
#include "volume/range.h"

bool __real_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
bool __wrap_nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
void __real_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __real_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
void __wrap_nv_range_enter(struct nv_range_table *table, struct nv_range *range);
bool __real_nv_io_hung_up(nv_handle handle);
bool __wrap_nv_io_hung_up(nv_handle handle);

void __real_nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error);
void __wrap_nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error);
void __real_nv_remote_concluded(struct nv_ask *ask);
void __wrap_nv_remote_concluded(struct nv_ask *ask);
void __real_nv_remote_again(struct nv_ask *ask);
void __wrap_nv_remote_again(struct nv_ask *ask);
void __real_nv_remote_link_came(struct nv_link *link);
void __wrap_nv_remote_link_came(struct nv_link *link);
void __real_nv_link_queue(struct nv_ask *ask);
void __wrap_nv_link_queue(struct nv_ask *ask);
void __real_nv_trace_note_parsed(struct nv_request *request);
void __wrap_nv_trace_note_parsed(struct nv_request *request);

static bool mutant(int number)
{
    const char *chosen = getenv("NVSIM_MUTANT");

    return chosen && strtol(chosen, NULL, 10) == number;
}

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
    __real_nv_range_enter(table, range);
}

bool __wrap_nv_io_hung_up(nv_handle handle)
{
    return !mutant(6) && __real_nv_io_hung_up(handle);
}

void __wrap_nv_trace_note_parsed(struct nv_request *request)
{
    if (!mutant(8) || request->cookie % 8)
        __real_nv_trace_note_parsed(request);
}

void __wrap_nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error)
{
    if (!mutant(9) || error != -ESTALE)
        __real_nv_sync_fail(sync, reactor, error);
}

/* The other's owner gets this answer, and the other way round. */
static void swap_pieces(struct nv_ask *ask)
{
    for (uint32_t i = 0; i < ask->link->asks_touched; i++) {
        struct nv_ask *other = &ask->link->asks[i];
        struct nv_piece *piece = other->piece;
        if (other->state == NV_ASK_FREE || other == ask || other->command != NBD_CMD_READ ||
            other->length != ask->length)
            continue;
        other->piece = ask->piece;
        ask->piece = piece;
        return;
    }
}

void __wrap_nv_remote_concluded(struct nv_ask *ask)
{
    if (mutant(10) && ask->command == NBD_CMD_READ)
        swap_pieces(ask);
    if (mutant(14) && ask->command == NBD_CMD_FLUSH)
        ask->error = 0;
    if (mutant(15))
        ask->covers = ask->link->remote->acked;
    __real_nv_remote_concluded(ask);
}

void __wrap_nv_remote_again(struct nv_ask *ask)
{
    if (mutant(11))
        __real_nv_remote_concluded(ask);
    else
        __real_nv_remote_again(ask);
}

void __wrap_nv_remote_link_came(struct nv_link *link)
{
    __real_nv_remote_link_came(link);
    if (mutant(12))
        link->arrival -= 1000;
}

void __wrap_nv_link_queue(struct nv_ask *ask)
{
    const uint16_t flags = ask->flags;

    if (mutant(13))
        ask->flags &= (uint16_t)~NBD_CMD_FLAG_FUA;
    __real_nv_link_queue(ask);
    ask->flags = flags;
}
