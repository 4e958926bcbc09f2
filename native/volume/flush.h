/*
 * Durability of one object: which writes a sync has covered, who waits for one, and the latch of a failed one.
 *
 * `written` counts completed changes that are not durable by themselves; it is raised before the change is answered.
 * A flush is done when a sync that was submitted after the flush began, or one that covers everything written, has
 * succeeded. Concurrent flushes share a sync, but only one that has not been submitted yet. A failed sync latches:
 * every waiting and every later flush fails until the operator clears it, and nothing is retried.
 */
#ifndef NV_FLUSH_H
#define NV_FLUSH_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/io.h"
#include "reactor/events.h"
#include "reactor/inbox.h"

struct nv_reactor;
struct nv_object;

struct nv_sync_wait {
    struct nv_message message;      /* carries the answer to the waiter's reactor */
    struct nv_sync_wait *next;
    struct nv_reactor *reactor;
    int error;                      /* 0 or -EIO */
    void (*done)(struct nv_sync_wait *wait); /* on the waiter's reactor, from its inbox */
};

struct nv_sync;

/* How a kind of object syncs. Called under the lock, on the reactor that is to run it; ends in nv_sync_ran(). */
typedef void nv_sync_run(struct nv_sync *sync, struct nv_reactor *reactor);

struct nv_sync {
    _Atomic uint64_t written;
    _Atomic uint64_t synced;        /* value of `written` that the last successful sync covers; raised under the lock */
    _Atomic int fault;              /* 0, or the -errno that latched */
    _Atomic uint64_t faults;        /* syncs that failed: each loses something, also while a fault stands */
    _Atomic uint64_t syncs;         /* submitted since open, and */
    _Atomic uint64_t failures;      /* those of them that failed */
    pthread_mutex_t lock;
    bool running;                   /* under the lock: between `run` and nv_sync_ran() */
    uint64_t covers;                /* what the running sync covers */
    struct nv_sync_wait *riders;    /* of the running sync */
    struct nv_sync_wait *waiting;   /* for the next one */
    nv_sync_run *run;
    struct nv_op op;                /* the backend's, while it runs */
    struct nv_reactor *runner;
    _Atomic bool telling;           /* the fault event is on its way */
    struct nv_message tell;
    struct nv_event_slot event;
};

void nv_sync_init(struct nv_sync *sync, uint32_t object_id, nv_sync_run *run);
void nv_sync_free(struct nv_sync *sync);
/* The sync that `run` began has ended, with 0 or -errno. On the reactor that ran it, and never from inside `run`. */
void nv_sync_ran(struct nv_sync *sync, int64_t result);
/* A change has completed in the backend; call before it is answered. */
void nv_sync_wrote(struct nv_sync *sync);
/* Start making everything answered so far durable. True: done at once, see wait->error. Else wait->done comes. */
bool nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait);
/* A write that was to be durable failed: latch. */
void nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error);
/* A sync failed in an earlier process, or so the registry says: every flush fails from now on. */
void nv_sync_latch(struct nv_sync *sync);
/* The operator's word: forget the fault; the next flush syncs again. */
void nv_sync_clear(struct nv_sync *sync);

#endif
