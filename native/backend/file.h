/*
 * The file backend: an object (a file or block device) and one piece of I/O on it. A piece is a contiguous range of one
 * object; the backend continues short transfers, falls back where the object cannot do an operation natively, and
 * remembers that. Order between pieces, maps and durability across pieces are the volume's business.
 */
#ifndef NV_FILE_H
#define NV_FILE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/view.h"
#include "io/io.h"
#include "volume/flush.h"

struct nv_reactor;

struct nv_object {
    uint32_t id;
    nv_handle handle;
    uint32_t flags;                 /* NV_OBJECT_* */
    uint32_t align;                 /* of offsets and memory; 1 unless DIRECT */
    _Atomic(struct nv_view *) view; /* of a file in memory: the largest; NULL for any other */
    _Atomic uint64_t size;
    _Atomic bool no_punch;          /* learned: the operation is not supported here */
    _Atomic bool no_zero_range;
    _Atomic bool no_try_now;
    struct nv_sync sync;
    struct nv_message close_message;
    struct nv_event_slot closed;
    uint32_t users;                 /* front thread: maps and jobs that name it */
    bool closing;                   /* front thread */
};

enum nv_piece_kind {
    NV_PIECE_READ = 1,
    NV_PIECE_WRITE,
    NV_PIECE_ZERO,                  /* guaranteed zeros */
    NV_PIECE_TRIM,                  /* a hint: only EIO is an error */
    NV_PIECE_EXTENTS,               /* result: count */
    NV_PIECE_PREFETCH,              /* a hint */
};

#define NV_PIECE_DSYNC 1u           /* WRITE: durable on completion */
#define NV_PIECE_NO_HOLE 2u         /* ZERO: keep (or make) the space allocated */
#define NV_PIECE_FAST 4u            /* ZERO: -EOPNOTSUPP rather than writing zeros out */

struct nv_piece {
    struct nv_op op;
    struct iovec iov;
    struct nv_reactor *reactor;
    struct nv_object *object;
    uint8_t kind;
    uint8_t flags;
    uint8_t stage;                  /* ZERO: which way is being tried */
    uint64_t offset;                /* in the object */
    uint64_t length;
    uint64_t moved;
    int64_t answer;                 /* the backend's own */
    uint8_t *data;                  /* READ, WRITE; aligned to object->align */
    struct nv_extent *extents;
    uint32_t extents_max;
    void (*finished)(struct nv_piece *piece, int64_t result); /* 0 or a count, or -errno */
};

/* Start a filled-in piece (moved = 0). `finished` runs later from nv_io_run(), never from inside. */
void nv_piece_start(struct nv_piece *piece);

#endif
