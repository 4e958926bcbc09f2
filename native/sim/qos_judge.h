/*
 * What limits must do, judged from outside: how much started when, and how long each request took. It counts in its own
 * units and knows nothing of how the data plane waits.
 */
#ifndef NV_SIM_QOS_JUDGE_H
#define NV_SIM_QOS_JUDGE_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"

struct qos_judge {                  /* of one volume */
    nv_qos_limits limits;
    uint64_t bytes_max;             /* of a request */
    bool changing;                  /* new limits are on their way: either may hold */
    uint32_t regime;                /* counts the changes */
    __int128 level[2];              /* I/Os, bytes: a bucket that leaks at the rate, in billionths */
    uint64_t at_ns;
    uint64_t largest[2];            /* request seen, and */
    uint32_t leaving, left;         /* connections that perhaps waited for their time and will give, or gave, it back */
    uint64_t started[2];            /* in all */
};

void judge_begin(struct qos_judge *judge, uint64_t bytes_max);
/* New limits were asked for; and are in force. */
void judge_changes(struct qos_judge *judge);
void judge_changed(struct qos_judge *judge, const nv_qos_limits *limits);
/* A request of this kind (enum nv_request_kind) starts now. A window that holds too much is a violation. */
void judge_start(struct qos_judge *judge, uint8_t kind, uint64_t bytes, uint64_t now_ns);
/* A connection that may be waiting ends: its place will be used again. And: it has ended. */
void judge_leaves(struct qos_judge *judge);
void judge_left(struct qos_judge *judge);
/*
 * How long a request may take beside the world's own time: `depth` requests of its connection, each behind one of
 * every connection, none larger than bytes_max.
 */
uint64_t judge_patience_ns(const struct qos_judge *judge, uint32_t depth, uint32_t connections);

#endif
