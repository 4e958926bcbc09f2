/*
 * Range order of one volume: overlapping write-like requests run in the order they registered, across connections and
 * reactors. A later overlapping request waits for every earlier one; disjoint requests never wait. This is what makes
 * a request that a client re-sends on a second connection safe.
 */
#ifndef NV_RANGE_H
#define NV_RANGE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "reactor/inbox.h"

struct nv_reactor;

#define NV_RANGE_BUCKETS 64u

struct nv_range {
    struct nv_range *next, **back;  /* in its bucket */
    uint64_t offset;
    uint64_t length;
    uint64_t order;
    uint32_t blockers;              /* earlier overlapping requests, plus one hold until nv_range_release */
    struct nv_reactor *reactor;
    struct nv_message message;
    void (*ready)(struct nv_range *range); /* on its reactor, from the inbox */
};

struct nv_range_table {
    pthread_mutex_t lock;
    uint64_t next_order;
    struct nv_range *wide;          /* longer than a stripe */
    struct nv_range *buckets[NV_RANGE_BUCKETS]; /* by the stripe of the first byte */
};

void nv_range_table_init(struct nv_range_table *table);
void nv_range_table_free(struct nv_range_table *table);
/* Take a place in the order (offset, length, reactor, ready filled in). The request is held. */
void nv_range_enter(struct nv_range_table *table, struct nv_range *range);
/* Let go of the hold: true if the request may start now, else `ready` comes later. */
bool nv_range_release(struct nv_range_table *table, struct nv_range *range);
/* Give up a place that was released and whose turn has not come. False: `ready` has come, or is on its way. */
bool nv_range_withdraw(struct nv_range_table *table, struct nv_range *range);
/* The request is over (or never started): those behind it may go. */
void nv_range_leave(struct nv_range_table *table, struct nv_range *range);

#endif
