/*
 * The backend's door: an object (a file, a block device; whatever holds a datastore's bytes) and one piece of I/O on it.
 *
 * A piece is a contiguous range of one object. Everybody above starts pieces here and syncs through the object's
 * nv_sync, and does not know what kind the object is. The way to a file is one predictable branch, because files are
 * what most farms have. Order between pieces, maps and durability across pieces are the volume's business.
 *
 * What every kind promises: `finished` runs exactly once, on the piece's reactor, never from inside nv_piece_start();
 * a read never succeeds with fewer bytes than asked; the piece's memory is not touched after `finished`; every change
 * that is not durable by itself is told to the sync state (nv_sync_wrote) before `finished` runs.
 */
#ifndef NV_BACKEND_H
#define NV_BACKEND_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/view.h"
#include "io/io.h"
#include "reactor/count.h"
#include "volume/flush.h"

struct nv_reactor;

enum nv_object_kind {
    NV_KIND_FILE,                   /* backend/file.c */
    NV_KIND_NBD,                    /* an export of an NBD server: backend/nbd.h */
};

enum nv_piece_kind {
    NV_PIECE_ANSWER,                /* the backend's own: nothing (left) to do, finishes with piece->answer */
    NV_PIECE_READ,
    NV_PIECE_WRITE,
    NV_PIECE_ZERO,                  /* guaranteed zeros */
    NV_PIECE_TRIM,                  /* a hint: only EIO is an error */
    NV_PIECE_EXTENTS,               /* result: count */
    NV_PIECE_PREFETCH,              /* a hint */
    NV_PIECE_KINDS,
};

struct nv_object_counters {         /* of one reactor, its only writer; read by the front */
    _Alignas(64) _Atomic uint64_t errors;
    struct {
        _Atomic uint64_t pieces, bytes; /* that ended well */
    } kinds[NV_PIECE_KINDS];            /* by NV_PIECE_*; those of NV_PIECE_ANSWER did not reach the storage */
};

struct nv_object {
    uint32_t id;
    nv_handle handle;               /* of a file; -1 otherwise */
    uint8_t kind;                   /* enum nv_object_kind */
    uint32_t flags;                 /* NV_OBJECT_* */
    uint32_t align;                 /* offsets and lengths are multiples of it */
    uint32_t memory_align;          /* and so is memory: 1 unless DIRECT */
    _Atomic(struct nv_view *) view; /* of a file in memory: the largest; NULL for any other object */
    _Atomic uint64_t size;
    _Atomic bool no_punch;          /* learned: the operation is not supported here */
    _Atomic bool no_zero_range;
    _Atomic bool no_try_now;
    struct nv_sync sync;
    struct nv_message close_message;
    struct nv_event_slot closed;
    uint32_t users;                 /* front thread: maps and jobs that name it */
    bool closing;                   /* front thread */
    struct nv_object_counters *counters; /* one a reactor */
};

#define NV_PIECE_DSYNC 1u           /* WRITE: durable on completion */
#define NV_PIECE_NO_HOLE 2u         /* ZERO: keep (or make) the space allocated */
#define NV_PIECE_FAST 4u            /* ZERO: -EOPNOTSUPP rather than writing zeros out */
#define NV_PIECE_LEG 8u             /* -ESTALE rather than go on with an object whose sync state has a fault */

struct nv_piece {
    union {                         /* the backend's own */
        struct {
            struct nv_op op;
            struct iovec iov;
        };
        struct {                    /* a remote piece on its way to its object's home reactor, in a queue there, or back */
            struct nv_message message;
            struct nv_piece *next;
            uint64_t era, sets;
            uint64_t shut_ns;       /* since when servers say that they shut down; 0: the last one did not */
            uint32_t lost, timeouts, hangups; /* links that it was on */
        } remote;
    };
    struct nv_reactor *reactor;
    struct nv_object *object;
    uint8_t kind;
    uint8_t flags;
    uint8_t stage;                  /* the backend's own */
    uint64_t offset;                /* in the object */
    uint64_t length;
    uint64_t moved;
    int64_t answer;                 /* the backend's own */
    uint8_t *data;                  /* READ, WRITE; aligned to object->memory_align */
    struct nv_extent *extents;
    uint32_t extents_max;
    void (*finished)(struct nv_piece *piece, int64_t result); /* 0 or a count, or -errno */
};

void nv_file_start(struct nv_piece *piece);     /* backend/file.c */
void nv_remote_start(struct nv_piece *piece);   /* backend/nbd_remote.c */

/* Start a filled-in piece. `finished` runs later, from the reactor's loop, never from inside. */
static inline void nv_piece_start(struct nv_piece *piece)
{
    if (__builtin_expect(piece->object->kind == NV_KIND_FILE, 1))
        nv_file_start(piece);
    else
        nv_remote_start(piece);
}

/* Front: make room for an object's counters. 0 or -ENOMEM. */
int nv_object_counts(struct nv_object *object, uint32_t reactors);

/* Reactor: the object's storage did something with success, for a piece or without one. */
static inline void nv_object_count(struct nv_object *object, uint32_t reactor, uint8_t kind, uint64_t bytes)
{
    struct nv_object_counters *counters = &object->counters[reactor];

    nv_count(&counters->kinds[kind].pieces, 1);
    nv_count(&counters->kinds[kind].bytes, bytes);
}

void nv_piece_count_error(struct nv_object *object, uint32_t reactor, int64_t result);

/* Reactor: every kind of object counts a piece of its users just before it finishes. */
static inline void nv_piece_count(const struct nv_piece *piece, uint32_t reactor, int64_t result)
{
    if (__builtin_expect(result >= 0, 1))
        nv_object_count(piece->object, reactor, piece->kind, piece->length);
    else
        nv_piece_count_error(piece->object, reactor, result);
}

/* Front: let go of what the object holds open, and of its memory. Nothing uses it any more. */
void nv_object_free(struct nv_object *object);

#endif
