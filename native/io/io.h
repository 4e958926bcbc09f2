/*
 * The I/O port: the only way the data plane reaches storage, sockets and the clock.
 *
 * One `struct nv_io` belongs to one reactor and is used by that reactor's thread alone; the only
 * exceptions are nv_io_wake(), nv_io_now_ns() and the nv_bell_* calls. Operations are intrusive: the caller embeds a
 * `struct nv_op`, fills it and submits it; it stays the port's until `done` runs. `done` is never called
 * from inside nv_io_submit(): completions are queued and run by nv_io_run(), so code above never recurses.
 * Every submitted operation completes exactly once, in any order.
 *
 * Chosen at link time: io_uring.c is the real port, io_sim.c the simulated one. Code above this header uses no
 * clock, no file descriptor and no ring of its own.
 *
 * Results are what the kernel would return: bytes moved (may be short), 0, or -errno. The port retries
 * EINTR and EAGAIN itself; it does not continue short transfers.
 */
#ifndef NV_IO_H
#define NV_IO_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

typedef int nv_handle;                  /* a file or a socket, as the port names it; -1: none */

enum nv_op_kind {
    NV_OP_READ = 1,                     /* handle, offset, iov; 0 at the end of the file */
    NV_OP_WRITE,                        /* handle, offset, iov; NV_OP_DSYNC */
    NV_OP_SYNC,                         /* handle: data and what is needed to read it back, durable */
    NV_OP_ZERO,                         /* handle, offset, length: allocated zeros, contents guaranteed */
    NV_OP_PUNCH,                        /* handle, offset, length: deallocate, reads back as zeros */
    NV_OP_PREFETCH,                     /* handle, offset, length: a hint */
    NV_OP_EXTENTS,                      /* handle, offset, length, extents, extents_max: result = count */
    NV_OP_RECV,                         /* handle, iov[0]; NV_OP_WHOLE; 0 at the end of the stream */
    NV_OP_SEND,                         /* handle, iov: a short count only at an error's edge */
    NV_OP_TIMER,                        /* length = nanoseconds from now; result 0 */
};

#define NV_OP_DSYNC 1u                  /* WRITE: durable before it completes (FUA) */
#define NV_OP_WHOLE 2u                  /* RECV: wait until the buffer is full or the stream ends */
#define NV_OP_TRY_NOW 4u                /* READ: try without blocking at submission (page cache) */
#define NV_OP_NOW_UNSUPPORTED 8u        /* set by the port: TRY_NOW can never work on this handle */
#define NV_OP_LATER 32u                 /* RECV: not before the socket's low water has come, or the stream's end */
#define NV_OP_NOW 16u                   /* READ, WRITE, SYNC: done at submission; for handles in memory only */
#define NV_OP_AT_ONCE 64u               /* READ, WRITE: the device hears of it now, not when the turn ends */

#define NV_EXTENT_HOLE 1u               /* equal to the NBD base:allocation bits */
#define NV_EXTENT_ZERO 2u

struct nv_extent {
    uint64_t length;
    uint32_t flags;
};

struct nv_op {
    struct nv_op *next;                 /* the port's */
    void (*done)(struct nv_op *op);     /* runs on the reactor's thread, from nv_io_run() */
    int64_t result;
    nv_handle handle;
    uint8_t kind;
    uint8_t flags;
    uint16_t iov_count;
    struct iovec *iov;                  /* the caller's array, unchanged by the port, stable until done */
    uint64_t offset;
    uint64_t length;
    struct nv_extent *extents;          /* EXTENTS: gapless from offset on, adjacent ones differ */
    uint32_t extents_max;
    uint8_t *view;                      /* READ, WRITE with NOW: where its bytes stand in a view; NULL: not known */
    uint32_t port_flags;                /* the port's own */
    uint64_t port[8];                   /* the port's own: msghdr, timespec */
};

struct nv_io;

struct nv_io_config {
    uint32_t entries;
    uint32_t completions;
    int cpu;                            /* pin the calling thread; -1: do not */
    bool io_flusher;                    /* mark the calling thread PR_SET_IO_FLUSHER where allowed */
};

struct nv_io_features {
    bool defer_taskrun;
    bool registered_ring;
    bool registered_files;
    bool send_vectorized;
    bool io_flusher;
};

/* Create the port of the calling thread (which becomes its only user). 0 or -errno. */
int nv_io_create(const struct nv_io_config *config, struct nv_io **io, struct nv_io_features *features);
/* All operations must have completed. */
void nv_io_destroy(struct nv_io *io);

/* Take an operation. Never fails: an operation that cannot start completes with an error. Storage may begin at once. */
void nv_io_submit(struct nv_io *io, struct nv_op *op);
/* Run `done` of everything that has completed so far; the number of completions run. */
unsigned nv_io_run(struct nv_io *io);
/* Hand everything submitted to the kernel: at most one system call. */
void nv_io_enter(struct nv_io *io);
/*
 * Send what the socket takes right now: bytes (may be fewer), or -errno (-EAGAIN: none now; -EFAULT: a view has no byte to
 * give). The memory may be a view's; it is not looked at any more when the call returns.
 */
int64_t nv_io_send(struct nv_io *io, nv_handle handle, struct iovec *iov, unsigned count);
/* Ask for an operation's early end; it still completes, possibly with -ECANCELED. Idle path only. */
void nv_io_cancel(struct nv_io *io, struct nv_op *op);
/* True if nv_io_run() or nv_io_enter() has something to do right now. */
bool nv_io_ready(struct nv_io *io);
/*
 * Sleep until a completion, a wake-up or the timeout. Call nv_io_sleep_begin() first, then look once
 * more for work that other threads may have left, then nv_io_sleep(), and nv_io_sleep_end() in any case.
 */
void nv_io_sleep_begin(struct nv_io *io);
void nv_io_sleep(struct nv_io *io, uint64_t timeout_ns);
void nv_io_sleep_end(struct nv_io *io);
/* Any thread: make a sleeping (or falling asleep) port return from nv_io_sleep(). */
void nv_io_wake(struct nv_io *io);
/* Any thread: monotonic nanoseconds, the same clock for every port. */
uint64_t nv_io_now_ns(struct nv_io *io);
/* Operations submitted since creation, and system calls made to hand them over. */
void nv_io_counts(const struct nv_io *io, uint64_t *submissions, uint64_t *enters);

/* --- handles; callable from any thread, nothing here blocks on I/O --- */

/* A duplicate of a caller's file descriptor. >= 0 or -errno. */
nv_handle nv_io_open_file(int fd);
/* Take a connected stream socket over (blocking mode, buffer sizes, TCP_NODELAY). >= 0 or -errno. */
nv_handle nv_io_open_socket(int fd);
/* True if the file's bytes live in memory alone (tmpfs, ramfs): a transfer waits for no device. */
bool nv_io_in_memory(nv_handle handle);
/*
 * A view of the first `size` bytes of a file in memory, or NULL. Only nv_io_send() (which answers -EFAULT where the file
 * has no byte to give) and a READ with NOW may read it, and only a WRITE with NOW change it, all of them only where
 * nv_io_present() says that the pages are there: touching a hole would fill it.
 */
uint8_t *nv_io_map(nv_handle handle, uint64_t size, bool writable);
void nv_io_unmap(uint8_t *view, uint64_t size);
/*
 * Of so many pages of a view (at most 64) from `at` on: bit i, page i is there, and quick to touch from now on. Another
 * user may take it away later.
 */
uint64_t nv_io_present(const uint8_t *at, unsigned pages);
/* Copy bytes of a file in memory: how many (fewer at its end), or -errno. */
int64_t nv_io_copy(nv_handle handle, void *to, uint64_t length, uint64_t offset);
void nv_io_close(nv_handle handle);
/* Shut both directions: pending and later receives end after what has already arrived. */
void nv_io_shutdown(nv_handle handle);
/* Shut our sending direction alone: the peer hears an end after what has been sent, we still hear the peer. */
void nv_io_shutdown_send(nv_handle handle);
/* A TCP connection: nv_io_close() ends it at once, and what has not been sent is dropped. */
void nv_io_reset_on_close(nv_handle handle);
/*
 * So many bytes must have come before a RECV with NV_OP_LATER begins (fewer where the socket's buffer is small); until the
 * next call. Whoever asks for more than the peer is sure to send waits for ever. False: this kind of socket has none.
 */
bool nv_io_low_water(nv_handle handle, uint32_t bytes);
/* True if the peer has closed or shut its sending direction: nothing unparsed may start any more. */
bool nv_io_hung_up(nv_handle handle);

/* --- the bell: how reactors tell the front thread that events wait --- */
int nv_bell_create(void);               /* a readable descriptor for an event loop, or -errno */
void nv_bell_ring(int bell);            /* any thread */
void nv_bell_silence(int bell);
void nv_bell_destroy(int bell);

#endif
