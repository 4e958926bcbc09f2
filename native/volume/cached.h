/*
 * Where a volume meets the cache (docs/cache.md): which requests look, fill, drop; when the cache is on.
 *
 * Invariant: every write-like request that entered after a reactor took `hooks` calls begins before it reaches the map or
 * the mirror and ends before it is answered; the volume's owner in the cache is released, for the first time after it was
 * held for want of a mode, only when no older one is left on any reactor.
 */
#ifndef NV_CACHED_H
#define NV_CACHED_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "cache/cache.h"
#include "nbdvvol.h"
#include "reactor/count.h"
#include "reactor/events.h"
#include "reactor/inbox.h"

struct nv_plane;
struct nv_map;
struct nv_reactor;
struct nv_vreq;
struct nv_volume;
struct nv_volume_local;
struct nv_cached_change;

struct nv_cached_counters {         /* one writer, the reactor; read by the front; in blocks */
    _Atomic uint64_t hits, misses, filled, refused, written, ahead, ahead_used;
};

struct nv_stream {                  /* requests that follow each other */
    uint64_t next;                  /* where the next one should begin */
    uint64_t fetched;               /* up to here blocks were asked for ahead */
    uint32_t window;                /* bytes to be ahead */
    uint32_t used;                  /* the local's `looks` when it was last met; 0: free */
    uint32_t pause;                 /* so many requests more nothing is fetched */
    uint32_t pauses;                /* how long the last pause was */
    uint64_t seen;                  /* bytes that it has read */
};

#define NV_STREAMS 8u
#define NV_WANTS 4u

struct nv_want {                    /* a range to be fetched, at leisure */
    uint64_t from, to;
};

struct nv_cached_local {            /* of a volume on one reactor */
    bool hooks;
    uint32_t writes;                /* write-like requests that have entered and not left */
    uint32_t unhooked;              /* of them, those from before `hooks` */
    struct nv_cached_change *change; /* waits for them */
    uint32_t fetches;               /* READs of our own, under way */
    uint32_t reads;                 /* clients' READs that are being read from below */
    bool pumping;
    uint32_t looks;
    struct nv_stream streams[NV_STREAMS];
    struct nv_want wants[NV_WANTS]; /* NBD_CMD_CACHE, and partial blocks */
    struct nv_cached_counters counters;
};

struct nv_cached {                  /* of a volume */
    struct nv_cache *cache;         /* NULL: the plane has none */
    uint32_t owner;
    _Atomic uint32_t mode;          /* NV_CACHE_MODE_* */
    _Atomic uint32_t ahead_max;     /* bytes */
    /* the front's */
    bool hooked;                    /* every reactor has `hooks` */
    bool changing;                  /* between nv_volume_set_cache() and its event */
    bool no_mode;                   /* these two hold the owner */
    bool bypassed;
};

struct nv_cached_request {
    uint8_t state;                  /* 0, or NV_CACHED_* */
    bool unhooked;                  /* a write-like request that entered before `hooks` */
    bool ahead;                     /* a READ of our own */
    uint32_t tag;
    uint64_t time;                  /* of the write's beginning; of the read's */
    uint64_t from;                  /* READ: the offset behind what was copied from the cache */
};

#define NV_CACHED_READ 1u           /* fill what it brings */
#define NV_CACHED_WRITE 2u          /* begins was called */
#define NV_CACHED_LONG 3u           /* holds the owner */
#define NV_CACHED_SCAN 4u           /* READ, of a long stream */
#define NV_CACHED_BELOW 5u          /* NV_REQUEST_BELOW: the cache does not see it */

struct nv_cached_change {           /* a policy on its way to the reactors */
    struct nv_volume *volume;
    _Atomic uint32_t left;
    struct nv_event_slot changed;
    struct nv_cached_message {
        struct nv_message message;
        struct nv_cached_change *change;
    } messages[];
};

/* --- the front --- */

/* A volume begins; its map is in place. */
void nv_cached_open(struct nv_volume *volume);
/* It is gone. */
void nv_cached_close(struct nv_volume *volume);
/* Is what `to` says of the bytes of `from` the same? */
bool nv_cached_same_bytes(const struct nv_map *from, const struct nv_map *to);
/* A change of the map was accepted; and older I/O has drained. */
void nv_cached_map_changes(struct nv_volume *volume, const struct nv_map *from, const struct nv_map *to);
void nv_cached_map_changed(struct nv_volume *volume, const struct nv_map *from, const struct nv_map *to);
/* VOLUME_CACHE is being taken. */
void nv_cached_policy_changed(struct nv_cached_change *change);

/* --- any thread: nothing is served from the cache between the two; a fence is never released --- */

void nv_cached_hold(struct nv_volume *volume);
void nv_cached_release(struct nv_volume *volume);
void nv_cached_fence(struct nv_volume *volume);

/* --- a request's way, on its reactor --- */

/* A write-like request, or a READ or CACHE, is about to reach the map or the mirror. */
void nv_cached_begins(struct nv_vreq *request);
/* It is over, with request->error; its memory is still there. Only if begins left a state. */
void nv_cached_ends(struct nv_vreq *request);
/* The last write-like request from before the hooks has left. */
void nv_cached_drained(struct nv_reactor *reactor, struct nv_volume_local *local);
/* Bytes are read: remember where, and fetch ahead. True: they are of a long stream. */
bool nv_cached_saw(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset, uint64_t length,
                   bool all_hit);
/* Fetch these whole blocks when there is room. */
void nv_cached_want(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t from, uint64_t to);
/* Pin the frames that hold these bytes: how many, 0 when not all are here. */
uint32_t nv_cached_pin(struct nv_reactor *reactor, struct nv_volume_local *local, uint64_t offset, uint64_t length,
                       uint32_t *frames, uint32_t max);

/* --- ahead.c --- */

int nv_ahead_setup(struct nv_reactor *reactor);
void nv_ahead_teardown(struct nv_reactor *reactor);
/* Start what is wanted and has room. */
void nv_ahead_pump(struct nv_reactor *reactor, struct nv_volume_local *local);

#endif
