/*
 * Which links of a remote export lead to one running server (the "set"), and what that server owes (nbd.h).
 *
 * Invariants: requests go to members only; whatever is acknowledged and not durable by itself is counted in `acked`
 * before its owner hears of it; when the set is empty nothing is owed: the fault stands for what was.
 */
#include <assert.h>
#include <errno.h>

#include "backend/nbd.h"
#include "reactor/plane.h"

/* ---- what is owed ---- */

void nv_remote_owe(struct nv_remote *remote)
{
    remote->acked++;
    atomic_store_explicit(&remote->counters.owed, 1, memory_order_relaxed);
    nv_sync_wrote(&remote->object.sync);
}

bool nv_remote_owes(const struct nv_remote *remote)
{
    return remote->acked != remote->flushed;
}

void nv_remote_settled(struct nv_remote *remote, uint64_t up_to)
{
    if (up_to <= remote->flushed)
        return;
    remote->flushed = up_to;
    atomic_store_explicit(&remote->counters.owed, nv_remote_owes(remote), memory_order_relaxed);
}

static void lose_what_is_owed(struct nv_remote *remote)
{
    remote->sets++;
    if (!nv_remote_owes(remote))
        return;
    nv_remote_settled(remote, remote->acked); /* the fault stands for them now */
    remote->era++;
    nv_sync_fail(&remote->object.sync, remote->home, -ESTALE);
}

/* ---- who is a member ---- */

static void probe(struct nv_remote *remote);

/* A FLUSH on one link covers the others' writes only where the server says so on each of them. */
static bool may_join(const struct nv_remote *remote, const struct nv_link *link)
{
    return link->params.tflags & remote->serving[0]->params.tflags & NBD_FLAG_CAN_MULTI_CONN;
}

static void probed(struct nv_piece *piece, int64_t result)
{
    struct nv_remote *remote = nv_remote_of(piece->object);

    (void)result;
    remote->probing = false;
    probe(remote); /* for links that came after it had been sent */
}

/* A sign of life would let one join. One that may not join beside the members waits until they are gone. */
static bool awaits_proof(const struct nv_remote *remote)
{
    for (const struct nv_link *link = remote->links; link && remote->serving_count > 0; link = link->next)
        if (link->state == NV_LINK_WAITING && may_join(remote, link))
            return true;
    return false;
}

/* Ask a member for a sign of life, so that the links that wait may join. */
static void probe(struct nv_remote *remote)
{
    struct nv_piece *piece = &remote->probe;

    if (remote->probing || !awaits_proof(remote))
        return;
    remote->probing = true;
    *piece = (struct nv_piece){.reactor = remote->home, .object = &remote->object, .kind = NV_PIECE_PROBE,
                               .length = remote->object.align, .data = remote->probe_data, .finished = probed};
    nv_remote_push_front(remote, piece);
}

static void join(struct nv_link *link)
{
    struct nv_remote *remote = link->remote;

    assert(link->state == NV_LINK_WAITING && remote->serving_count < NV_LINKS_PER_REMOTE);
    link->state = NV_LINK_SERVING;
    remote->waiting_count--;
    remote->serving[remote->serving_count++] = link;
    nv_count(&remote->counters.serving, 1);
    remote->gave_up = false;
    nv_remote_wants_turn(remote);
}

void nv_remote_prove(struct nv_remote *remote, uint32_t stamp)
{
    for (struct nv_link *link = remote->links; link; link = link->next)
        if (link->state == NV_LINK_WAITING && (int32_t)(stamp - link->arrival) >= 0 && may_join(remote, link))
            join(link);
}

/* The set is empty: the first link that waits begins a new one. */
static void begin_set(struct nv_remote *remote)
{
    assert(remote->serving_count == 0 && !nv_remote_owes(remote));
    for (struct nv_link *link = remote->links; link; link = link->next)
        if (link->state == NV_LINK_WAITING && !link->parting) {
            join(link);
            nv_remote_flush_first(remote);
            break;
        }
    probe(remote);
}

void nv_remote_link_came(struct nv_link *link)
{
    struct nv_remote *remote = link->remote;

    link->arrival = ++remote->arrivals;
    link->state = NV_LINK_WAITING;
    remote->waiting_count++;
    if (remote->serving_count == 0)
        begin_set(remote);
    else if (atomic_load(&remote->object.size) < remote->object.align)
        join(link); /* an export without a block holds nothing to lose, and cannot be probed */
    else
        probe(remote);
}

static void leave_set(struct nv_remote *remote, const struct nv_link *link)
{
    uint32_t i = 0;

    while (remote->serving[i] != link)
        i++;
    assert(i < remote->serving_count);
    remote->serving[i] = remote->serving[--remote->serving_count];
    remote->current = 0;
    nv_count(&remote->counters.serving, (uint64_t)-1);
    if (remote->serving_count > 0 || remote->ending)
        return;
    lose_what_is_owed(remote);
    begin_set(remote);
    nv_reactor_late(remote->home, &remote->late); /* who waits may have to hear that nobody comes, or of the fault */
}

void nv_remote_link_goes(struct nv_link *link, uint8_t to)
{
    struct nv_remote *remote = link->remote;
    const uint8_t was = link->state;

    assert(to > was && to >= NV_LINK_LEAVING && to <= NV_LINK_LOST);
    link->state = to;
    if (to == NV_LINK_DRAINING)
        nv_count(&remote->counters.draining, 1);
    if (was == NV_LINK_DRAINING)
        nv_count(&remote->counters.draining, (uint64_t)-1);
    if (was == NV_LINK_WAITING)
        remote->waiting_count--;
    else if (was == NV_LINK_SERVING)
        leave_set(remote, link);
    if (to != NV_LINK_LEAVING && was < NV_LINK_LEAVING)
        nv_count(&remote->counters.lost, 1);
}
