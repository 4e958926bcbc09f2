/*
 * Limits of one volume: I/Os and bytes a second, each with a burst. Pure: the caller passes the clock and does the
 * waiting (nbd/pace.c).
 *
 * A limit is one number, its "theoretical arrival time" (GCRA): the moment up to which everything granted so far has
 * used the rate up. A request reserves its place the moment it asks: it is told when it may start, and the limits have
 * moved on by its cost already. So places are handed out in the order of asking, across connections and reactors, and
 * nobody who waits can be overtaken for ever. Both limits move in one 16-byte compare-and-swap: a volume's connections
 * may live on several reactors without an owner, a lock, or a grain of rate lost between them.
 *
 * Invariants, when every request starts at the time it was told:
 *   - in any window of length w, the granted cost is at most max(burst, the largest request) + rate * w;
 *   - start times never decrease from one reservation to the next, whatever the requests are;
 *   - a request waits for what was granted before it and for itself, less what the burst lends; never for what comes
 *     after it.
 */
#ifndef NV_QOS_H
#define NV_QOS_H

#include <stdint.h>

#include "nbdvvol.h"

enum nv_qos_limit { NV_QOS_IOS, NV_QOS_BYTES, NV_QOS_LIMITS };

struct nv_qos_cost {                /* of one request, in ticks of each limit */
    uint64_t ticks[NV_QOS_LIMITS];
};

struct nv_qos_state {
    _Alignas(16) uint64_t arrival[NV_QOS_LIMITS]; /* theoretical arrival times, ticks; changed together */
};

struct nv_qos {                     /* the limits never change; a new set is a new object */
    struct nv_qos_state state;
    uint64_t scale[NV_QOS_LIMITS];  /* ticks a unit, as a fixed-point number; 0: no limit */
    uint64_t tolerance;             /* ticks that may be saved up */
    uint32_t io_bytes;              /* one I/O per so many bytes, begun; 0: a request is one */
};

/* 0, or -EINVAL with nv_last_error(). */
int nv_qos_check(const nv_qos_limits *limits);
/* Whether they limit anything (shares alone do not). */
int nv_qos_limits_anything(const nv_qos_limits *limits);
/* Limits that passed the check; both buckets are full. */
void nv_qos_init(struct nv_qos *qos, const nv_qos_limits *limits);
/* The cost of one request that moves `bytes`. */
struct nv_qos_cost nv_qos_cost(const struct nv_qos *qos, uint64_t bytes);
/* Any thread: reserve a place; when the request may start, in nanoseconds of the same clock, >= now_ns. */
uint64_t nv_qos_reserve(struct nv_qos *qos, uint64_t now_ns, const struct nv_qos_cost *cost);
/*
 * Any thread: give back a place that was not used. Those that reserved behind it keep theirs; what is given back goes to
 * later requests, so the rate is right over time, and a window may hold as much more as was given back before it. With
 * two limits, what one made the place wait has moved the other on, and is not given back: until the place's time has
 * come, others may still wait for it, as they would have if it had been used.
 */
void nv_qos_refund(struct nv_qos *qos, const struct nv_qos_cost *cost);

#endif
