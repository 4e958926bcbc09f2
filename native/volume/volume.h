/*
 * A volume and one request on it. The stack is range order -> map -> backend, or range order -> mirror -> the map's legs ->
 * backend; behind the range order there may be a cache (cached.h), and then a write-back log (logged.h). Limits hold a
 * request back before it comes here (nbd/pace.c). A volume's reactor-local half is touched by its reactor alone; what
 * reactors share is the range table, the limits and the objects' sync state.
 */
#ifndef NV_VOLUME_H
#define NV_VOLUME_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"
#include "nbdvvol.h"
#include "reactor/count.h"
#include "reactor/events.h"
#include "reactor/inbox.h"
#include "reactor/recorder.h"
#include "volume/cached.h"
#include "volume/map.h"
#include "volume/qos.h"
#include "volume/range.h"
#include "volume/switch.h"

struct nv_plane;
struct nv_conn;
struct nv_mirror;
struct nv_logged;

enum nv_request_kind {
    NV_REQUEST_READ,
    NV_REQUEST_WRITE,
    NV_REQUEST_FLUSH,
    NV_REQUEST_TRIM,
    NV_REQUEST_ZERO,
    NV_REQUEST_CACHE,
    NV_REQUEST_STATUS,
    NV_REQUEST_KINDS,
};

struct nv_volume_counters {         /* one writer, the reactor; read by the front */
    _Atomic uint64_t errors, in_flight;
    struct {
        _Atomic uint64_t requests, bytes; /* of those that ended well */
    } kinds[NV_REQUEST_KINDS];
    _Atomic uint64_t delayed, delay_ns; /* by the limits */
};

struct nv_pace {                    /* connections that wait for the limits to let their next request go (nbd/pace.c) */
    struct nv_conn *head;           /* in the order of their start times */
    struct nv_conn *last;           /* while there is a head */
    struct nv_op timer;
    bool armed;
    bool resuming;                  /* the list is being worked on: the timer is set when that is over */
    uint64_t due_ns;                /* when the timer fires */
};

struct nv_share {                   /* of the reactor's time (nbd/share.c) */
    uint32_t weight;
    int64_t budget;                 /* cost that may still be taken on in `turn` */
    uint64_t turn;
};

#define NV_LAYER_CACHE 1u           /* between the range order and the map: a cache, */
#define NV_LAYER_LOG 2u             /* a write-back log, */
#define NV_LAYER_GATE 4u            /* a gate that is closed (switch.h) */

struct nv_volume_local {
    _Alignas(64) struct nv_map *map;
    uint8_t layers;                 /* NV_LAYER_*; 0: none, one look tells that */
    bool switching;                 /* the owner's: a log goes in or out, the local half stays until that is over */
    struct nv_gate gate;
    struct nv_logged *logged;       /* the log before the volume, or NULL */
    struct nv_qos *qos;             /* NULL: nothing is limited */
    struct nv_share share;
    struct nv_conn *connections;    /* of this volume on this reactor */
    uint64_t pool_bytes;            /* pool memory its requests hold */
    bool closing;
    struct nv_pace pace;
    struct nv_cached_local cached;
    struct nv_volume_counters counters;
    struct nv_message message;      /* carries the close */
    struct nv_volume *volume;
};

struct nv_volume {
    uint32_t id;
    struct nv_plane *plane;
    struct nv_range_table ranges;
    struct nv_range_table below;    /* of a mirror with a log: of what goes below, and of copies between its legs */
    struct nv_mirror *mirror;       /* NULL: a plain volume */
    struct nv_logged *owned;        /* the log owner's: its log (logged.h), whether it is before the volume or not; or NULL */
    struct nv_cached cached;
    _Atomic uint32_t connections;   /* raised at open, lowered when the front saw the end */
    _Atomic uint64_t bindings;      /* connections that there have ever been */
    _Atomic uint32_t open_locals;   /* reactors that have not finished the close; then the log ends, then the mirror */
    struct nv_event_slot closed;
    /* the front thread's */
    struct nv_map *latest;          /* newest accepted map */
    struct nv_qos *limits;          /* newest accepted; NULL: none */
    uint32_t changes;               /* under way, of map, limits or cache, and */
    uint32_t map_changes;           /* of the map alone */
    struct nv_logged *logged;       /* its write-back log, from nv_volume_log_open() until LOG_DETACHED; or NULL */
    struct nv_logged *retired;      /* those before, whose memory late operations still use */
    bool switching;                 /* the log goes in or out */
    bool closing;
    bool served;                    /* it has, or had, a connection */
    bool gone;                      /* VOLUME_CLOSED was seen */
    struct nv_volume_local locals[];
};

struct nv_volume_change {
    struct nv_volume *volume;
    struct nv_map *from;
    struct nv_map *to;
    _Atomic uint32_t left;          /* reactors that still have older I/O */
    bool owners_turn;               /* a mirror's owner, which holds the map for the others' requests, is the last */
    struct nv_event_slot changed;
    struct nv_change_message {
        struct nv_message message;
        struct nv_volume_change *change;
    } messages[];
};

struct nv_qos_change {              /* new limits on their way to the reactors */
    struct nv_volume *volume;
    struct nv_qos *from, *to;       /* NULL: no limits */
    uint32_t shares;
    _Atomic uint32_t left;          /* reactors that still go by the old ones */
    struct nv_event_slot changed;
    struct nv_qos_message {
        struct nv_message message;
        struct nv_qos_change *change;
    } messages[];
};

#define NV_REQUEST_FUA 1u
#define NV_REQUEST_NO_HOLE 2u
#define NV_REQUEST_FAST 4u
#define NV_REQUEST_ONE 8u           /* STATUS: exactly one extent, not longer than asked */
#define NV_REQUEST_OURS 16u         /* nobody has asked for it: it does not count */
#define NV_REQUEST_BELOW 32u        /* the log's, to what is below it: it neither counts nor takes a place in the order */

struct nv_vreq {
    struct nv_piece piece;          /* the one piece in flight */
    struct nv_range range;
    struct nv_sync_wait wait;
    struct nv_reactor *reactor;
    struct nv_volume *volume;
    struct nv_map *map;             /* held from enter to finish */
    uint8_t kind;
    uint8_t flags;
    bool narrow;                    /* write-like: it has its own bytes alone in the order (switch.h) */
    bool runs;                      /* it is below the gate */
    int32_t error;                  /* 0 or -errno */
    uint32_t object_next;           /* FLUSH and FUA: the next object to sync */
    uint64_t faults;                /* ... and the failed syncs that were known when it began */
    uint64_t offset;
    uint64_t length;
    uint64_t done;
    uint64_t piece_length;
    uint8_t *data;                  /* READ, WRITE */
    struct nv_extent *extents;      /* STATUS: room for extents_max answers, then as many for the backend's */
    uint32_t extents_max;
    uint32_t extents_count;
    void (*finished)(struct nv_vreq *request);
    struct nv_stamps stamps;
    /* mirrors and logs */
    struct nv_vreq *queue_next;
    uint8_t tried;                  /* READ: lanes that could not serve the present span */
    bool primary_only;              /* READ: a write began meanwhile */
    uint8_t *rescue;                /* READ: memory in place of one that a late operation may still fill; `data` is it */
    uint32_t pins;                  /* late operations that still use the caller's memory */
    struct nv_cached_request cached;
};

/*
 * A request's life: enter (takes the map, and for write-like requests its place in the range order), then start or
 * abandon. `finished` runs later, from the reactor's loop; it may run inside start only for requests that need no I/O.
 * The caller has checked the range against the map's size and the block size.
 */
void nv_volume_enter(struct nv_vreq *request);
void nv_volume_start(struct nv_vreq *request);
void nv_volume_abandon(struct nv_vreq *request);
/*
 * A READ may do without start: nv_volume_look() tells where its bytes stand in memory (NULL: they do not, start it as
 * usual), and of which object, which the caller keeps in piece.object. Between enter and nv_volume_served(), which says
 * that they have gone to the client, the request holds its map and with it the place; when the map has been replaced
 * meanwhile, nv_volume_remap() changes over to the present one.
 */
uint8_t *nv_volume_look(const struct nv_map *map, uint64_t offset, uint64_t length, struct nv_object **object);
/* Copy `length` of the bytes that nv_volume_look() showed, from `from` on: how many, or -errno. */
int64_t nv_volume_copy(const struct nv_vreq *request, uint64_t from, void *to, uint64_t length);
void nv_volume_served(struct nv_vreq *request);
/* The same for a READ whose bytes stand in the cache (nv_cached_pin): it needs its place no more once they are pinned. */
void nv_volume_hit(struct nv_vreq *request);
void nv_volume_remap(struct nv_vreq *request);

/* The log's owner: start a request to what is below the log (NV_REQUEST_BELOW). `finished` may run inside. */
void nv_volume_below(struct nv_vreq *request);
/*
 * How many syncs have failed so far, of what holds the bytes (of a mirror: of what no other leg had); also where the
 * operator has cleared the fault.
 */
uint64_t nv_volume_faults(const struct nv_volume *volume, const struct nv_reactor *reactor);
/* Its own reactor: a request that was held at the gate. */
void nv_volume_go_on(struct nv_vreq *request);
/* Its own reactor: the log has nothing to say about this request, let it go on. */
void nv_volume_past_log(struct nv_vreq *request);
/* The log is over. */
void nv_volume_logged_ended(struct nv_volume *volume, struct nv_reactor *reactor);

/* For the layers between: the request is over, with 0 or -errno. On its own reactor. */
void nv_volume_finish(struct nv_vreq *request, int error);
/* Add an extent to a STATUS answer, merged with an equal neighbour. */
void nv_volume_extent(struct nv_vreq *request, uint64_t length, uint32_t flags);
/* Add what a backend has found from the first byte that has no answer yet on. */
void nv_volume_extents(struct nv_vreq *request, const struct nv_extent *extents, int64_t count);
/* A STATUS answer that takes no more. */
bool nv_volume_extents_full(const struct nv_vreq *request);
void nv_map_hold(struct nv_map *map, struct nv_reactor *reactor);
void nv_map_release(struct nv_map *map, struct nv_reactor *reactor);
/* The mirror is over: raise VOLUME_CLOSED. */
void nv_volume_mirror_ended(struct nv_volume *volume, struct nv_reactor *reactor);

/* Reactor: begin closing the local half; the last reactor raises VOLUME_CLOSED. */
void nv_volume_local_close(struct nv_reactor *reactor, struct nv_volume_local *local);
/* Reactor: a connection has left the local half. */
void nv_volume_local_left(struct nv_reactor *reactor, struct nv_volume_local *local);
/* Reactor: put a change's new map in place; tells when older I/O has drained. */
void nv_volume_local_change(struct nv_reactor *reactor, struct nv_message *message);

static inline struct nv_volume_local *nv_volume_local(struct nv_volume *volume, uint32_t reactor)
{
    return &volume->locals[reactor];
}

#endif
