/*
 * One reactor: a thread's worth of the plane. It owns its I/O port, pool, connections and the local halves of volumes;
 * other threads reach it through its inbox only. nv_reactor_turn() is one pass of the loop and never sleeps, so the
 * simulator drives the same code.
 */
#ifndef NV_REACTOR_H
#define NV_REACTOR_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/io.h"
#include "limits.h"
#include "reactor/events.h"
#include "reactor/inbox.h"
#include "reactor/pool.h"
#include "reactor/recorder.h"

struct nv_conn;
struct nv_plane;
struct nv_remote;
struct nv_ahead;

struct nv_late {                    /* something to do once before the turn ends */
    struct nv_late *next;
    void (*run)(struct nv_late *late);
    bool queued;
};

struct nv_ticker {                  /* somebody who looks at the clock every NV_TICK_MS, while it is wanted */
    struct nv_ticker *next, **back;
    void (*tick)(struct nv_ticker *ticker, uint64_t now_ns);
};

struct nv_turner {                  /* somebody who goes on in each turn in which anything happened */
    struct nv_turner *next, **back;
    void (*run)(struct nv_turner *turner);
};

struct nv_reactor_counters {        /* one writer, the reactor; read by the front */
    _Atomic uint64_t enters, sleeps, requests, batches, submissions, copies_bytes, connections, pool_free_bytes,
        pool_waits, pinned;
};

struct nv_reactor {
    uint32_t index;
    struct nv_plane *plane;
    struct nv_io *io;
    struct nv_pool *pool;
    struct nv_inbox inbox;
    struct nv_conn *connections;            /* all of this reactor */
    struct nv_conn *kicked, **kicked_tail;  /* want nv_conn_turn() before the turn ends */
    struct nv_conn *senders;                /* have replies to send at the end of the turn */
    struct nv_conn *starving, **starving_tail; /* wait for pool memory, longest first */
    bool pool_freed;                        /* since the starving were last looked at */
    uint64_t turn;                          /* counts nv_reactor_turn() */
    struct nv_conn *postponed[2], **postponed_tail[2]; /* to the next turn; [1]: were served in this one */
    const void *served;                     /* the volume (its local half) whose connection was parsed last */
    uint64_t rationed_until;                /* turn from which on a single volume need not be rationed */
    uint64_t weights_turn;                  /* turn in which weight_next began */
    uint32_t weight_most, weight_next;      /* most shares of a volume served lately; and since weights_turn */
    uint32_t pace_timers;                   /* of volumes with limits, armed */
    uint32_t jobs;                          /* object jobs, and logs on their way in or out, or that hung as they were opened */
    uint32_t syncs;                         /* syncs this reactor runs */
    uint32_t mirrors;                       /* that it owns and that have not ended */
    struct nv_ahead *ahead;                 /* memory of fetches; NULL without a cache */
    uint32_t fetches;                       /* of them, under way */
    uint32_t pins, pins_max;                /* frames of the cache that replies of this reactor hold */
    uint64_t want_max;                      /* bytes of one wish to fetch */
    struct nv_conn *partial;                /* the last whose bytes ended inside a request; NULL: it has had the rest */
    uint64_t partial_turn;                  /* when they did */
    struct nv_late *late, **late_tail;
    struct nv_late *late_now;               /* those of this turn that have not run yet */
    struct nv_ticker *tickers;
    struct nv_turner *turners;
    struct nv_remote *remotes;              /* remote exports whose home this is */
    struct nv_op tick;                      /* coarse timer, armed while somebody has a deadline */
    bool tick_armed;
    bool tick_wanted;
    bool stopping;                          /* no new client; connections end */
    bool drained;                           /* while stopping: nothing here starts a piece any more */
    bool ending;                            /* every reactor has drained: what served pieces ends too */
    uint32_t bulks;                         /* receives under way that wait for much of a large payload */
    uint64_t brisk_turn;                    /* the last turn in which smaller requests came */
    uint64_t spin_ns;                       /* present length of the busy wait */
    uint64_t spin_max_ns;
    pthread_t thread;
    bool threaded;
    struct nv_reactor_counters counters;
    struct nv_events events;
    struct nv_recorder recorder;
};

/* Are requests being recorded on this reactor? The only cost of a trace that is off. */
static inline bool nv_recording(const struct nv_reactor *reactor)
{
    return __builtin_expect(reactor->recorder.session != 0, false);
}

/* On the reactor's own thread, which becomes the port's only user. 0 or -errno. */
int nv_reactor_setup(struct nv_reactor *reactor, const struct nv_io_config *config, struct nv_io_features *features,
                     uint64_t pool_bytes);
void nv_reactor_teardown(struct nv_reactor *reactor);
/* One pass: completions, messages, parsing, replies, at most one enter. True if anything happened. */
bool nv_reactor_turn(struct nv_reactor *reactor);
/* True once stopping and nothing is left. */
bool nv_reactor_finished(const struct nv_reactor *reactor);
/* The thread's loop: turns, spins, sleeps, until finished. */
void nv_reactor_loop(struct nv_reactor *reactor);
/* Any thread: deliver a message and wake the reactor. */
void nv_reactor_send(struct nv_reactor *reactor, struct nv_message *message);
/* Reactor: a connection wants attention before the turn ends. */
void nv_reactor_kick(struct nv_reactor *reactor, struct nv_conn *conn);
/* Reactor: all bytes that have come are parsed, and they end inside a request, or not. */
static inline void nv_reactor_ends_inside(struct nv_reactor *reactor, struct nv_conn *conn, bool inside)
{
    if (inside) {
        reactor->partial = conn;
        reactor->partial_turn = reactor->turn;
    } else if (reactor->partial == conn) {
        reactor->partial = NULL;
    }
}

/* Reactor: somebody is in the middle of sending a request, or was a few turns ago. */
static inline bool nv_reactor_more_comes(const struct nv_reactor *reactor)
{
    return reactor->partial && reactor->turn - reactor->partial_turn <= NV_PARTIAL_TURNS;
}

/* Reactor: a connection waits for pool memory, behind those that already wait. */
void nv_reactor_starve(struct nv_reactor *reactor, struct nv_conn *conn);
/* Reactor: a connection goes on in the next turn; first those that were not `served` in this one. */
void nv_reactor_postpone(struct nv_reactor *reactor, struct nv_conn *conn, bool served);
/* Reactor: replies wait; they go out in one send when the turn ends. */
void nv_reactor_send_later(struct nv_reactor *reactor, struct nv_conn *conn);
/* Reactor: the connection is gone; it stands on no list any more. */
void nv_reactor_forget(struct nv_reactor *reactor, struct nv_conn *conn);
void nv_reactor_unstarve(struct nv_reactor *reactor, struct nv_conn *conn);
/* Reactor: run it once before this turn ends (if it asks again while it runs, in the next turn). */
void nv_reactor_late(struct nv_reactor *reactor, struct nv_late *late);
void nv_reactor_drop_late(struct nv_reactor *reactor, struct nv_late *late);
/* Reactor: who runs at the end of each turn from now on; and no longer. */
void nv_reactor_add_turner(struct nv_reactor *reactor, struct nv_turner *turner);
void nv_reactor_drop_turner(struct nv_turner *turner);
/* Reactor: who ticks from now on; and no longer. */
void nv_reactor_add_ticker(struct nv_reactor *reactor, struct nv_ticker *ticker);
void nv_reactor_drop_ticker(struct nv_ticker *ticker);
/* Reactor: call nv_conn_tick() on all connections, and all tickers, every NV_TICK_MS while wanted. */
void nv_reactor_want_tick(struct nv_reactor *reactor);

#endif
