/*
 * Deliberate bugs in limits and shares, as mutants.c has them for everything else. The binary nvqos_mutants is nvqos with
 * some functions replaced at link time (--wrap); NVSIM_MUTANT=n in the environment chooses one bug:
 *
 *   1  a limit is looked at, but not charged               nv_qos_reserve
 *   2  bytes cost nothing                                  nv_qos_cost
 *   3  who ends while it waits keeps its place             nv_pace_leave
 *   4  the timer of those who wait is never armed          nv_io_submit
 *   5  nobody waits longer than half the time              nv_qos_reserve
 *   6  a timer is never replaced by an earlier one         nv_io_cancel
 *   7  a busy reactor's parts are not kept to              nv_share_spent
 *   8  who was served goes first again                     nv_reactor_postpone
 */
#include "io/io.h"
#include "limits.h"
#include "nbd/pace.h"
#include "sim/mutant.h"

uint64_t __real_nv_qos_reserve(struct nv_qos *qos, uint64_t now_ns, const struct nv_qos_cost *cost);
uint64_t __wrap_nv_qos_reserve(struct nv_qos *qos, uint64_t now_ns, const struct nv_qos_cost *cost);
struct nv_qos_cost __real_nv_qos_cost(const struct nv_qos *qos, uint64_t bytes);
struct nv_qos_cost __wrap_nv_qos_cost(const struct nv_qos *qos, uint64_t bytes);
void __real_nv_pace_leave(struct nv_conn *conn);
void __wrap_nv_pace_leave(struct nv_conn *conn);
void __real_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __real_nv_io_cancel(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_cancel(struct nv_io *io, struct nv_op *op);
bool __real_nv_share_spent(struct nv_conn *conn);
bool __wrap_nv_share_spent(struct nv_conn *conn);
void __real_nv_reactor_postpone(struct nv_reactor *reactor, struct nv_conn *conn, bool served);
void __wrap_nv_reactor_postpone(struct nv_reactor *reactor, struct nv_conn *conn, bool served);

static bool paces(const struct nv_op *op)
{
    return op->kind == NV_OP_TIMER && op->length != NV_TICK_MS * 1000000ull;
}

uint64_t __wrap_nv_qos_reserve(struct nv_qos *qos, uint64_t now_ns, const struct nv_qos_cost *cost)
{
    const struct nv_qos_cost nothing = {{0, 0}};
    const uint64_t start_ns = __real_nv_qos_reserve(qos, now_ns, mutant(1) ? &nothing : cost);

    return mutant(5) ? now_ns + (start_ns - now_ns) / 2 : start_ns;
}

struct nv_qos_cost __wrap_nv_qos_cost(const struct nv_qos *qos, uint64_t bytes)
{
    return __real_nv_qos_cost(qos, mutant(2) ? 0 : bytes);
}

void __wrap_nv_pace_leave(struct nv_conn *conn)
{
    if (mutant(3))
        conn->pace_cost = (struct nv_qos_cost){{0, 0}};
    __real_nv_pace_leave(conn);
}

void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    if (mutant(4) && paces(op))
        op->length = 1ull << 60;
    __real_nv_io_submit(io, op);
}

void __wrap_nv_io_cancel(struct nv_io *io, struct nv_op *op)
{
    if (!mutant(6) || !paces(op))
        __real_nv_io_cancel(io, op);
}

bool __wrap_nv_share_spent(struct nv_conn *conn)
{
    return !mutant(7) && __real_nv_share_spent(conn);
}

void __wrap_nv_reactor_postpone(struct nv_reactor *reactor, struct nv_conn *conn, bool served)
{
    __real_nv_reactor_postpone(reactor, conn, served != mutant(8));
}
