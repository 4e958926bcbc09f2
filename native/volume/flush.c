/*
 * See flush.h. Invariants: at most one sync of an object is in flight; riders are those who waited when it was
 * submitted; once `fault` is set, no waiter of this object gets a success.
 */
#include "volume/flush.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>

#include "reactor/plane.h"
#include "reactor/reactor.h"

static void wait_arrives(struct nv_reactor *reactor, struct nv_message *message);

void nv_sync_init(struct nv_sync *sync, uint32_t object_id, nv_sync_run *run)
{
    pthread_mutex_init(&sync->lock, NULL);
    /* A filter that ran before us may have died with acknowledged writes in the page cache: the first flush syncs. */
    atomic_store(&sync->written, 1);
    sync->run = run;
    sync->event.event = (nv_event){.kind = NV_EVENT_SYNC_FAILED, .args = {object_id}};
}

void nv_sync_free(struct nv_sync *sync)
{
    assert(!sync->running && !sync->waiting && !sync->riders);
    pthread_mutex_destroy(&sync->lock);
}

void nv_sync_wrote(struct nv_sync *sync)
{
    atomic_fetch_add(&sync->written, 1);
}

static void tell_fault(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_sync *sync = (struct nv_sync *)((char *)message - offsetof(struct nv_sync, tell));

    if (!sync->event.waiting) /* else the earlier event still stands for this fault too */
        nv_events_raise(&reactor->events, &sync->event);
    atomic_store(&sync->telling, false);
}

/* True: it stands from now on; false: an earlier one does. */
static bool set_fault(struct nv_sync *sync, int error)
{
    int none = 0;

    atomic_fetch_add(&sync->faults, 1);
    return atomic_compare_exchange_strong(&sync->fault, &none, error);
}

/* Under the lock. The event is raised by the plane's first reactor, so that its slot has one user. */
static void latch(struct nv_sync *sync, struct nv_reactor *reactor, int error)
{
    assert(error < 0);
    if (!set_fault(sync, error) || atomic_exchange(&sync->telling, true))
        return;
    sync->event.event.result = error;
    sync->tell.run = tell_fault;
    nv_reactor_send(nv_plane_reactor(reactor->plane, 0), &sync->tell);
}

/* Under the lock. */
static void start(struct nv_sync *sync, struct nv_reactor *reactor)
{
    assert(!sync->running && sync->waiting && !sync->riders);
    sync->riders = sync->waiting;
    sync->waiting = NULL;
    sync->running = true;
    sync->runner = reactor;
    sync->covers = atomic_load(&sync->written);
    atomic_fetch_add(&sync->syncs, 1);
    reactor->syncs++;
    sync->run(sync, reactor);
}

bool nv_sync_begin(struct nv_sync *sync, struct nv_reactor *reactor, struct nv_sync_wait *wait)
{
    bool done = true;

    wait->reactor = reactor;
    wait->error = 0;
    pthread_mutex_lock(&sync->lock);
    if (atomic_load(&sync->fault)) {
        wait->error = -EIO;
    } else if (atomic_load(&sync->synced) != atomic_load(&sync->written)) {
        done = false;
        wait->next = sync->waiting;
        sync->waiting = wait;
        if (!sync->running)
            start(sync, reactor);
    }
    pthread_mutex_unlock(&sync->lock);
    return done;
}

static void wait_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_sync_wait *wait = (struct nv_sync_wait *)((char *)message - offsetof(struct nv_sync_wait, message));

    assert(wait->reactor == reactor);
    wait->done(wait);
}

static void answer(struct nv_sync_wait *list, int error)
{
    for (struct nv_sync_wait *wait = list, *next; wait; wait = next) {
        next = wait->next;
        wait->error = error;
        wait->message.run = wait_arrives;
        nv_reactor_send(wait->reactor, &wait->message);
    }
}

void nv_sync_ran(struct nv_sync *sync, int64_t result)
{
    struct nv_reactor *reactor = sync->runner;
    struct nv_sync_wait *riders, *failed = NULL;
    int error = 0;

    pthread_mutex_lock(&sync->lock);
    assert(sync->running && sync->riders);
    sync->running = false;
    reactor->syncs--;
    riders = sync->riders;
    sync->riders = NULL;
    if (result < 0) {
        atomic_fetch_add(&sync->failures, 1);
        if (result != -ENOTCONN) /* nobody there to ask: what was lost with a server has latched before this */
            latch(sync, reactor, (int)result);
    }
    if (result < 0 || atomic_load(&sync->fault)) {
        error = -EIO;
        failed = sync->waiting; /* they must not be answered from a later, clean-looking sync */
        sync->waiting = NULL;
    } else {
        atomic_store(&sync->synced, sync->covers);
        if (sync->waiting)
            start(sync, reactor);
    }
    pthread_mutex_unlock(&sync->lock);
    answer(riders, error);
    answer(failed, error);
}

void nv_sync_fail(struct nv_sync *sync, struct nv_reactor *reactor, int error)
{
    pthread_mutex_lock(&sync->lock);
    latch(sync, reactor, error);
    pthread_mutex_unlock(&sync->lock);
}

void nv_sync_latch(struct nv_sync *sync)
{
    pthread_mutex_lock(&sync->lock);
    (void)set_fault(sync, -EIO);
    pthread_mutex_unlock(&sync->lock);
}

void nv_sync_clear(struct nv_sync *sync)
{
    pthread_mutex_lock(&sync->lock);
    atomic_fetch_add(&sync->written, 1); /* nothing before the fault counts as durable */
    atomic_store(&sync->fault, 0);
    pthread_mutex_unlock(&sync->lock);
}
