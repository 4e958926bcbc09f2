/*
 * See worker.h. Invariant: an operation is in `todo`, in the thread's hands, or in `finished`. Not here: who asked
 * and why; a file system that knows no holes is answered as all data, which is always a safe answer.
 */
#include "io/worker.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

struct nv_worker {
    struct nv_io *io;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t thread;
    bool started;
    bool stop;
    struct nv_op *todo, **todo_tail;
    struct nv_op *finished, **finished_tail;
    _Atomic bool ready;
};

static int64_t add_extent(struct nv_op *op, int64_t count, uint64_t length, uint32_t flags)
{
    assert(length > 0 && count >= 0);
    op->extents[count] = (struct nv_extent){length, flags};
    return count + 1;
}

/* Alternate SEEK_DATA and SEEK_HOLE from op->offset until the range or the room for answers ends. */
static int64_t find_extents(struct nv_op *op)
{
    const uint64_t end = op->offset + op->length;
    uint64_t at = op->offset;
    int64_t count = 0;

    assert(op->extents_max > 0 && op->length > 0);
    while (at < end && count < (int64_t)op->extents_max) {
        off_t data = lseek(op->handle, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            data = (off_t)end;
        else if (data < 0)
            return add_extent(op, count, end - at, 0);
        if ((uint64_t)data > at) {
            uint64_t until = (uint64_t)data < end ? (uint64_t)data : end;
            count = add_extent(op, count, until - at, NV_EXTENT_HOLE | NV_EXTENT_ZERO);
            at = until;
            continue;
        }
        off_t hole = lseek(op->handle, (off_t)at, SEEK_HOLE);
        uint64_t until = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
        if (until <= at)
            until = end; /* changed between the two look-ups: data is the safe answer */
        count = add_extent(op, count, until - at, 0);
        at = until;
    }
    return count;
}

static void *worker_main(void *argument)
{
    struct nv_worker *worker = argument;

    pthread_mutex_lock(&worker->lock);
    for (;;) {
        struct nv_op *op = worker->todo;
        if (!op) {
            if (worker->stop)
                break;
            pthread_cond_wait(&worker->wake, &worker->lock);
            continue;
        }
        worker->todo = op->next;
        if (!worker->todo)
            worker->todo_tail = &worker->todo;
        pthread_mutex_unlock(&worker->lock);
        op->result = find_extents(op);
        pthread_mutex_lock(&worker->lock);
        op->next = NULL;
        *worker->finished_tail = op;
        worker->finished_tail = &op->next;
        atomic_store(&worker->ready, true);
        nv_io_wake(worker->io);
    }
    pthread_mutex_unlock(&worker->lock);
    return NULL;
}

int nv_worker_create(struct nv_worker **out, struct nv_io *io)
{
    struct nv_worker *worker = calloc(1, sizeof *worker);

    if (!worker)
        return -ENOMEM;
    worker->io = io;
    worker->todo_tail = &worker->todo;
    worker->finished_tail = &worker->finished;
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->wake, NULL);
    *out = worker;
    return 0;
}

void nv_worker_submit(struct nv_worker *worker, struct nv_op *op)
{
    int error = 0;

    pthread_mutex_lock(&worker->lock);
    if (!worker->started) {
        error = pthread_create(&worker->thread, NULL, worker_main, worker);
        worker->started = error == 0;
    }
    op->next = NULL;
    op->result = -error;
    if (worker->started) {
        *worker->todo_tail = op;
        worker->todo_tail = &op->next;
        pthread_cond_signal(&worker->wake);
    } else {
        *worker->finished_tail = op;
        worker->finished_tail = &op->next;
        atomic_store(&worker->ready, true);
    }
    pthread_mutex_unlock(&worker->lock);
}

bool nv_worker_ready(struct nv_worker *worker)
{
    return atomic_load_explicit(&worker->ready, memory_order_relaxed);
}

struct nv_op *nv_worker_take(struct nv_worker *worker)
{
    struct nv_op *list;

    if (!nv_worker_ready(worker))
        return NULL;
    pthread_mutex_lock(&worker->lock);
    list = worker->finished;
    worker->finished = NULL;
    worker->finished_tail = &worker->finished;
    atomic_store(&worker->ready, false);
    pthread_mutex_unlock(&worker->lock);
    return list;
}

void nv_worker_destroy(struct nv_worker *worker)
{
    pthread_mutex_lock(&worker->lock);
    assert(!worker->todo && !worker->finished);
    worker->stop = true;
    pthread_cond_signal(&worker->wake);
    pthread_mutex_unlock(&worker->lock);
    if (worker->started)
        pthread_join(worker->thread, NULL);
    pthread_cond_destroy(&worker->wake);
    pthread_mutex_destroy(&worker->lock);
    free(worker);
}
