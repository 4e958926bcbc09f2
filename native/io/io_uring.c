/*
 * The real I/O port: one io_uring per reactor, liburing 2.3, Linux 5.19 or newer at run time, with
 * SINGLE_ISSUER + DEFER_TASKRUN where the kernel takes them.
 *
 * Invariants: only the creating thread touches the ring; an operation is in exactly one of {backlog, ring, worker,
 * ready}; `done` runs only from nv_io_run(). What it does not do: continue short transfers, know protocols.
 */
#include "io/io.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "io/store.h"
#include "io/worker.h"
#include "limits.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif
#define REAP_BATCH 64u

struct op_queue {
    struct nv_op *head;
    struct nv_op **tail;
};

struct nv_io {
    struct io_uring ring;
    struct op_queue ready;      /* completed, `done` not yet run */
    struct op_queue backlog;    /* no ring entry was free */
    struct nv_worker *worker;   /* blocking look-ups (EXTENTS) */
    unsigned in_ring;           /* operations the kernel has or will get with the next enter */
    uint64_t submissions;
    uint64_t enters;
    int wake_fd;
    bool wake_armed;
    bool deferred;              /* DEFER_TASKRUN: completions appear only inside an enter */
    uint64_t wake_value;
    _Atomic uint32_t sleeping;
};

static_assert(sizeof(struct msghdr) <= sizeof(((struct nv_op *)0)->port), "msghdr must fit in an operation");

static void queue_init(struct op_queue *queue)
{
    queue->head = NULL;
    queue->tail = &queue->head;
}

static void queue_push(struct op_queue *queue, struct nv_op *op)
{
    op->next = NULL;
    *queue->tail = op;
    queue->tail = &op->next;
}

static struct nv_op *queue_pop(struct op_queue *queue)
{
    struct nv_op *op = queue->head;

    if (op) {
        queue->head = op->next;
        if (!queue->head)
            queue->tail = &queue->head;
    }
    return op;
}

static void complete(struct nv_io *io, struct nv_op *op, int64_t result)
{
    op->result = result;
    queue_push(&io->ready, op);
}

/* Ring set-ups from best to plainest; the first the kernel takes is used. */
static int ring_setup(struct nv_io *io, const struct nv_io_config *config)
{
    static const unsigned modes[] = {
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        0,
    };
    int error = -ENOSYS;

    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        struct io_uring_params params = {
            .flags = modes[i] | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
            .cq_entries = config->completions,
        };
        error = io_uring_queue_init_params(config->entries, &io->ring, &params);
        if (error == 0) {
            io->deferred = i == 0;
            return (params.features & (IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP)) ==
                           (IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP)
                       ? 0
                       : (io_uring_queue_exit(&io->ring), -ENOSYS);
        }
        if (error != -EINVAL)
            break;
    }
    return error;
}

static void thread_setup(const struct nv_io_config *config, struct nv_io_features *features)
{
    if (config->cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((unsigned)config->cpu, &set);
        (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set); /* a wish: a missing CPU is no error */
    }
    if (config->io_flusher)
        features->io_flusher = prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0;
}

int nv_io_create(const struct nv_io_config *config, struct nv_io **out, struct nv_io_features *features)
{
    struct nv_io *io = calloc(1, sizeof *io);
    int error;

    if (!io)
        return -ENOMEM;
    *features = (struct nv_io_features){0};
    queue_init(&io->ready);
    queue_init(&io->backlog);
    thread_setup(config, features);
    io->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (io->wake_fd < 0) {
        error = -errno;
        goto fail_memory;
    }
    error = ring_setup(io, config);
    if (error)
        goto fail_wake;
    error = nv_worker_create(&io->worker, io);
    if (error)
        goto fail_ring;
    features->defer_taskrun = io->deferred;
    features->registered_ring = io_uring_register_ring_fd(&io->ring) == 1;
    *out = io;
    return 0;
fail_ring:
    io_uring_queue_exit(&io->ring);
fail_wake:
    close(io->wake_fd);
fail_memory:
    free(io);
    return error;
}

static int flush_ring(struct nv_io *io)
{
    io->enters++;
    return io->deferred ? io_uring_submit_and_get_events(&io->ring) : io_uring_submit(&io->ring);
}

static struct io_uring_sqe *entry(struct nv_io *io)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);

    if (!sqe) {
        flush_ring(io); /* -EBUSY (completions overflow) leaves the queue full: the backlog takes it */
        sqe = io_uring_get_sqe(&io->ring);
    }
    return sqe;
}

static void prepare_socket(struct io_uring_sqe *sqe, struct nv_op *op)
{
    if (op->kind == NV_OP_RECV) {
        io_uring_prep_recv(sqe, op->handle, op->iov->iov_base, op->iov->iov_len,
                           op->flags & NV_OP_WHOLE ? MSG_WAITALL : 0);
        if (op->flags & NV_OP_LATER)
            sqe->ioprio |= IORING_RECVSEND_POLL_FIRST; /* only a poll heeds the low water */
        return;
    }
    struct msghdr *message = (struct msghdr *)op->port;
    *message = (struct msghdr){.msg_iov = op->iov, .msg_iovlen = op->iov_count};
    io_uring_prep_sendmsg(sqe, op->handle, message, MSG_NOSIGNAL | MSG_WAITALL);
}

/* One range, as nearly all have, is told by itself: the kernel reads no array of ours. */
static void prepare_transfer(struct io_uring_sqe *sqe, const struct nv_op *op)
{
    const bool one = op->iov_count == 1 && op->iov->iov_len <= INT32_MAX;
    const bool read = op->kind == NV_OP_READ;

    if (one && read)
        io_uring_prep_read(sqe, op->handle, op->iov->iov_base, (unsigned)op->iov->iov_len, op->offset);
    else if (one)
        io_uring_prep_write(sqe, op->handle, op->iov->iov_base, (unsigned)op->iov->iov_len, op->offset);
    else if (read)
        io_uring_prep_readv(sqe, op->handle, op->iov, op->iov_count, op->offset);
    else
        io_uring_prep_writev(sqe, op->handle, op->iov, op->iov_count, op->offset);
    if (!read)
        sqe->rw_flags = op->flags & NV_OP_DSYNC ? RWF_DSYNC : 0;
}

static void prepare(struct io_uring_sqe *sqe, struct nv_op *op)
{
    struct __kernel_timespec *timer = (struct __kernel_timespec *)op->port;

    switch (op->kind) {
    case NV_OP_READ:
    case NV_OP_WRITE:
        prepare_transfer(sqe, op);
        break;
    case NV_OP_SYNC:
        io_uring_prep_fsync(sqe, op->handle, IORING_FSYNC_DATASYNC);
        break;
    case NV_OP_ZERO:
        io_uring_prep_fallocate(sqe, op->handle, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
                                (off_t)op->length);
        break;
    case NV_OP_PUNCH:
        io_uring_prep_fallocate(sqe, op->handle, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
                                (off_t)op->length);
        break;
    case NV_OP_PREFETCH:
        io_uring_prep_fadvise(sqe, op->handle, op->offset, (off_t)op->length, POSIX_FADV_WILLNEED);
        break;
    case NV_OP_TIMER:
        timer->tv_sec = (int64_t)(op->length / 1000000000u);
        timer->tv_nsec = (int64_t)(op->length % 1000000000u);
        io_uring_prep_timeout(sqe, timer, 0, 0);
        break;
    default:
        assert(op->kind == NV_OP_RECV || op->kind == NV_OP_SEND);
        prepare_socket(sqe, op);
    }
    io_uring_sqe_set_data(sqe, op);
}

/*
 * A device begins as soon as it has some work: it does not wait until a whole batch of requests has been parsed, which
 * takes as long as the device takes for several of them. A failure leaves the entries to the next enter.
 */
static void hand_over(struct nv_io *io, const struct nv_op *op)
{
    if ((op->kind != NV_OP_READ && op->kind != NV_OP_WRITE) ||
        (io_uring_sq_ready(&io->ring) < NV_STORAGE_BATCH && !(op->flags & NV_OP_AT_ONCE)))
        return;
    io->enters++;
    io_uring_submit(&io->ring);
}

static void into_ring(struct nv_io *io, struct nv_op *op)
{
    struct io_uring_sqe *sqe = io->backlog.head ? NULL : entry(io);

    if (!sqe) {
        queue_push(&io->backlog, op);
        return;
    }
    prepare(sqe, op);
    io->in_ring++;
    io->submissions++;
    hand_over(io, op);
}

/*
 * An operation without the ring: true if it has completed. TRY_NOW takes what the page cache holds; NOW is for
 * files in memory, where the ring would only hand the work to a kernel thread (tmpfs knows no RWF_NOWAIT).
 */
static bool perform_now(struct nv_io *io, struct nv_op *op)
{
    const int flags = op->flags & NV_OP_NOW ? (op->flags & NV_OP_DSYNC ? RWF_DSYNC : 0) : RWF_NOWAIT;
    ssize_t moved;

    assert(op->kind == NV_OP_READ || (op->flags & NV_OP_NOW));
    if (op->kind == NV_OP_READ && op->view && (op->flags & NV_OP_NOW) &&
        nv_load(op->iov->iov_base, op->view, op->iov->iov_len))
        moved = (ssize_t)op->iov->iov_len;
    else if (op->kind == NV_OP_READ)
        moved = preadv2(op->handle, op->iov, op->iov_count, (off_t)op->offset, flags);
    else if (op->kind == NV_OP_WRITE && op->view && nv_store(op->view, op->iov->iov_base, op->iov->iov_len))
        moved = (ssize_t)op->iov->iov_len; /* in memory is as durable as this file gets */
    else if (op->kind == NV_OP_WRITE)
        moved = pwritev2(op->handle, op->iov, op->iov_count, (off_t)op->offset, flags);
    else
        moved = fdatasync(op->handle);
    if (moved >= 0) {
        complete(io, op, moved);
        return true;
    }
    if (op->kind == NV_OP_SYNC || (op->flags & NV_OP_DSYNC)) {
        complete(io, op, -errno); /* final: the kernel tells of a lost write once, and a second sync would succeed */
        return true;
    }
    if (errno == EOPNOTSUPP)
        op->flags |= NV_OP_NOW_UNSUPPORTED;
    return false; /* not resident, or an error that the ring will meet again and report */
}

void nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    assert(op->done && op->kind >= NV_OP_READ && op->kind <= NV_OP_TIMER);
    if ((op->flags & (NV_OP_TRY_NOW | NV_OP_NOW)) && perform_now(io, op))
        return;
    if (op->kind == NV_OP_EXTENTS)
        nv_worker_submit(io->worker, op);
    else
        into_ring(io, op);
}

int64_t nv_io_send(struct nv_io *io, nv_handle handle, struct iovec *iov, unsigned count)
{
    const struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};
    ssize_t sent;

    do {
        io->enters++;
        sent = sendmsg(handle, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

static void reap_one(struct nv_io *io, struct io_uring_cqe *cqe)
{
    struct nv_op *op = io_uring_cqe_get_data(cqe);

    if (!op)
        return; /* a cancel's own completion */
    if ((void *)op == io) {
        io->wake_armed = false;
        return;
    }
    assert(io->in_ring > 0);
    io->in_ring--;
    if (cqe->res == -EINTR || cqe->res == -EAGAIN)
        into_ring(io, op);
    else
        complete(io, op, op->kind == NV_OP_TIMER && cqe->res == -ETIME ? 0 : cqe->res);
}

static void reap(struct nv_io *io)
{
    struct io_uring_cqe *batch[REAP_BATCH];
    unsigned count;

    while ((count = io_uring_peek_batch_cqe(&io->ring, batch, REAP_BATCH)) > 0) {
        for (unsigned i = 0; i < count; i++)
            reap_one(io, batch[i]);
        io_uring_cq_advance(&io->ring, count);
    }
    for (struct nv_op *op = nv_worker_take(io->worker), *next; op; op = next) {
        next = op->next;
        queue_push(&io->ready, op);
    }
}

unsigned nv_io_run(struct nv_io *io)
{
    unsigned ran = 0;
    struct op_queue batch;

    reap(io);
    if (!io->ready.head)
        return 0;
    batch = io->ready; /* what `done` submits and completes at once runs in the next round */
    queue_init(&io->ready);
    for (struct nv_op *op = batch.head, *next; op; op = next) {
        next = op->next;
        op->done(op);
        ran++;
    }
    return ran;
}

static void arm_wake(struct nv_io *io)
{
    struct io_uring_sqe *sqe = io->wake_armed ? NULL : io_uring_get_sqe(&io->ring);

    if (!sqe)
        return;
    io_uring_prep_read(sqe, io->wake_fd, &io->wake_value, sizeof io->wake_value, 0);
    io_uring_sqe_set_data(sqe, io);
    io->wake_armed = true;
}

static bool kernel_has_work(struct nv_io *io)
{
    unsigned flags = __atomic_load_n(io->ring.sq.kflags, __ATOMIC_RELAXED);

    return flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

void nv_io_enter(struct nv_io *io)
{
    while (io->backlog.head) {
        struct io_uring_sqe *sqe = entry(io);
        if (!sqe)
            break;
        prepare(sqe, queue_pop(&io->backlog));
        io->in_ring++;
        io->submissions++;
    }
    arm_wake(io);
    if (io_uring_sq_ready(&io->ring) > 0) {
        flush_ring(io);
    } else if (kernel_has_work(io)) {
        io->enters++;
        io_uring_get_events(&io->ring);
    }
}

void nv_io_cancel(struct nv_io *io, struct nv_op *op)
{
    struct io_uring_sqe *sqe = entry(io);

    if (!sqe)
        return; /* the ring is full of work: nothing is idle, and the caller asks again */
    io_uring_prep_cancel(sqe, op, 0);
    io_uring_sqe_set_data(sqe, NULL);
}

bool nv_io_ready(struct nv_io *io)
{
    return io->ready.head || io_uring_cq_ready(&io->ring) > 0 || kernel_has_work(io) || nv_worker_ready(io->worker) ||
           io->backlog.head || io_uring_sq_ready(&io->ring) > 0;
}

void nv_io_sleep_begin(struct nv_io *io)
{
    atomic_store(&io->sleeping, 1);
}

void nv_io_sleep(struct nv_io *io, uint64_t timeout_ns)
{
    struct __kernel_timespec limit = {(int64_t)(timeout_ns / 1000000000u), (int64_t)(timeout_ns % 1000000000u)};
    struct io_uring_cqe *cqe;

    arm_wake(io);
    if (!io->wake_armed || io->ready.head || nv_worker_ready(io->worker) || io->backlog.head)
        return;
    io->enters++;
    if (timeout_ns == UINT64_MAX)
        io_uring_submit_and_wait(&io->ring, 1);
    else
        io_uring_submit_and_wait_timeout(&io->ring, &cqe, 1, &limit, NULL);
}

void nv_io_sleep_end(struct nv_io *io)
{
    atomic_store(&io->sleeping, 0);
}

void nv_io_wake(struct nv_io *io)
{
    uint64_t one = 1;

    if (atomic_exchange(&io->sleeping, 0) == 1)
        while (write(io->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
            ;
}

uint64_t nv_io_now_ns(struct nv_io *io)
{
    struct timespec now;

    (void)io;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void nv_io_counts(const struct nv_io *io, uint64_t *submissions, uint64_t *enters)
{
    *submissions = io->submissions;
    *enters = io->enters;
}

void nv_io_destroy(struct nv_io *io)
{
    assert(io->in_ring == 0 && !io->ready.head && !io->backlog.head);
    if (io->wake_armed) { /* end the wake-up read, so that the kernel holds no address of ours */
        atomic_store(&io->sleeping, 1);
        nv_io_wake(io);
        while (io->wake_armed) {
            io_uring_submit_and_wait(&io->ring, 1);
            reap(io); /* looks at the worker too, which therefore still lives */
        }
    }
    nv_worker_destroy(io->worker); /* ends its thread, which may still be waking us, before the descriptor goes */
    io_uring_queue_exit(&io->ring);
    close(io->wake_fd);
    free(io);
}
