/* ring: io_uring as the ceiling's forms that use a disk have it (direct.c, records.c): one ring a connection's thread. */
#ifndef RING_H
#define RING_H

#include "responder.h"

#include <assert.h>
#include <liburing.h>

static inline void ring_begin(struct io_uring *ring, unsigned entries)
{
    struct io_uring_params wish = {
        .flags = IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                 IORING_SETUP_TASKRUN_FLAG,
    };
    int error = io_uring_queue_init_params(entries, ring, &wish);
    if (error < 0) { errno = -error; die("io_uring"); }
    io_uring_register_ring_fd(ring);
}

static inline struct io_uring_sqe *ring_entry(struct io_uring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    if (!sqe) {
        io_uring_submit(ring);
        sqe = io_uring_get_sqe(ring);
    }
    assert(sqe);
    return sqe;
}

/* Hand over what is to be submitted and fetch what is done; `wait`: sleep until something is. */
static inline void ring_enter(struct io_uring *ring, bool wait)
{
    unsigned flags = __atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED);
    if (wait) io_uring_submit_and_wait(ring, 1);
    else if (io_uring_sq_ready(ring) > 0 || (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)))
        io_uring_submit_and_get_events(ring);
}

/* What the client sends next; its completion has no data. */
static inline void ring_receive(struct io_uring *ring, int fd, void *at, size_t room)
{
    struct io_uring_sqe *sqe = ring_entry(ring);
    io_uring_prep_recv(sqe, fd, at, room, 0);
    io_uring_sqe_set_data(sqe, NULL);
}

#endif
