/*
 * Shares of a busy reactor (see pace.h): a deficit round robin over volumes, one round a turn. While a reactor serves
 * one volume, nothing is counted and a turn takes on whatever has arrived. Once a second one was served within the last
 * NV_SHARE_MEMORY turns, each volume may take on so much a turn: the one with the most shares NV_SHARE_TURN, the others
 * in proportion. What does not fit stays unparsed until the next turn, which comes at once; so a volume that is alone
 * with work is never idle, it only works in smaller batches, and one that has nothing to do saves nothing up.
 *
 * A request costs its bytes and NV_SHARE_REQUEST. A volume may take on a request while its budget is positive, whatever
 * the request costs; what it overdrew is missing in the turns after. Within a volume connections take turns: those that
 * found the budget spent are first in the next turn, before those that spent it, and both before what arrives in it
 * (resume_postponed() in reactor.c).
 */
#include "nbd/pace.h"

#include "nbd/wire.h"

void nv_share_meet(struct nv_reactor *reactor, struct nv_volume_local *local)
{
    if (reactor->served)
        reactor->rationed_until = reactor->turn + NV_SHARE_MEMORY;
    reactor->served = local;
}

/* The most shares among the volumes that were lately served. */
static uint32_t most_shares(struct nv_reactor *reactor, uint32_t weight)
{
    if (reactor->turn - reactor->weights_turn >= NV_SHARE_MEMORY) {
        reactor->weights_turn = reactor->turn;
        reactor->weight_most = reactor->weight_next;
        reactor->weight_next = 0;
    }
    if (weight > reactor->weight_next)
        reactor->weight_next = weight;
    if (weight > reactor->weight_most)
        reactor->weight_most = weight;
    return reactor->weight_most;
}

static void replenish(struct nv_reactor *reactor, struct nv_share *share)
{
    const int64_t turns = (int64_t)(reactor->turn - share->turn);
    int64_t part;

    if (turns == 0)
        return;
    share->turn = reactor->turn;
    part = (int64_t)((uint64_t)NV_SHARE_TURN * share->weight / most_shares(reactor, share->weight));
    if (turns > NV_SHARE_MEMORY || share->budget + turns * part >= part)
        share->budget = part;
    else
        share->budget += turns * part;
}

bool nv_share_spent(struct nv_conn *conn)
{
    struct nv_share *share = &conn->local->share;

    replenish(conn->reactor, share);
    if (share->budget > 0)
        return false;
    nv_reactor_postpone(conn->reactor, conn, conn->served_turn == conn->reactor->turn);
    return true;
}

void nv_share_charge(struct nv_conn *conn, const struct nv_request *request)
{
    const bool moves = request->type == NBD_CMD_READ || request->type == NBD_CMD_WRITE;
    const uint64_t bytes = request->length < NV_PAYLOAD_MAX ? request->length : NV_PAYLOAD_MAX;

    conn->local->share.budget -= NV_SHARE_REQUEST + (moves ? (int64_t)bytes : 0);
    conn->served_turn = conn->reactor->turn;
}
