/*
 * The simulated port's functions (see io_sim.h, io_sim_world.h): operations are checked and staged here, and their
 * completions run here; when and how they take effect is the world's business.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "io/io_sim_world.h"

int nv_io_create(const struct nv_io_config *config, struct nv_io **io, struct nv_io_features *features)
{
    (void)config;
    *features = (struct nv_io_features){0};
    *io = calloc(1, sizeof **io);
    return *io ? 0 : -ENOMEM;
}

void nv_io_destroy(struct nv_io *io)
{
    if (io->staged.count || io->ready.count)
        nv_sim_violation("a port is destroyed with %zu operations not completed", io->staged.count + io->ready.count);
    for (size_t i = 0; i < sim_world.pending.count; i++)
        if (sim_state_of(sim_world.pending.items[i])->io == io)
            nv_sim_violation("a port is destroyed with an operation of kind %u pending",
                             sim_world.pending.items[i]->kind);
    free(io->staged.items);
    free(io->ready.items);
    free(io);
}

static uint64_t delay_ns(void)
{
    if (sim_random_chance(&sim_world.random, sim_world.faults.stall))
        return sim_random_below(&sim_world.random, 2000000000u);
    if (sim_random_chance(&sim_world.random, sim_world.faults.delay))
        return sim_random_below(&sim_world.random, 10000000u);
    return 0;
}

static bool is_hurried(const struct sim_socket *socket)
{
    return socket && socket->hurried;
}

static uint64_t delay_of(const struct nv_op *op)
{
    if (op->kind == NV_OP_TIMER)
        return op->length;
    return is_hurried(sim_world.handles[op->handle].socket) ? 0 : delay_ns();
}

static void check_direct(const struct nv_op *op, uint32_t align)
{
    uint64_t bits = op->offset;

    if (op->kind != NV_OP_READ && op->kind != NV_OP_WRITE)
        return;
    for (unsigned i = 0; i < op->iov_count; i++)
        bits |= (uint64_t)(uintptr_t)op->iov[i].iov_base | op->iov[i].iov_len;
    if (bits & (align - 1))
        nv_sim_violation("an operation at %llu of %llu bytes is not aligned to %u", (unsigned long long)op->offset,
                         (unsigned long long)sim_total(op), align);
}

static void check_operation(struct nv_op *op)
{
    struct handle *handle;

    assert(op->done && op->kind >= NV_OP_READ && op->kind <= NV_OP_TIMER);
    if (op->kind == NV_OP_TIMER)
        return;
    handle = sim_handle_of(op->handle, op->kind == NV_OP_RECV || op->kind == NV_OP_SEND ? HANDLE_SOCKET : HANDLE_FILE);
    handle->operations++;
    if (handle->align > 1)
        check_direct(op, handle->align);
    if ((sim_incoming(op) || sim_outgoing(op)) && sim_total(op) == 0)
        nv_sim_violation("an operation of kind %u moves no bytes", op->kind);
}

/* An operation is its port's until it has completed. */
static void check_free(const struct nv_op *op)
{
    for (size_t i = 0; i < sim_world.pending.count; i++)
        if (sim_world.pending.items[i] == op)
            nv_sim_violation("an operation of kind %u is handed in again while it is under way", op->kind);
}

void nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    struct op_state *state = sim_state_of(op);

    check_free(op);
    check_operation(op);
    *state = (struct op_state){.io = io};
    if (sim_outgoing(op))
        state->hash = sim_hash_iov(op);
    if (sim_incoming(op))
        sim_scribble(op);
    io->submissions++;
    if (op->kind == NV_OP_READ && (op->flags & NV_OP_TRY_NOW) && !sim_trouble_of(op)->hung && sim_random_chance(&sim_world.random, 512)) {
        if (sim_random_chance(&sim_world.random, 64))
            op->flags |= NV_OP_NOW_UNSUPPORTED;
        sim_perform(op);
        sim_make_ready(op);
        return;
    }
    if (op->flags & NV_OP_NOW) {
        state->entered_at = sim_world.time + 1;
        sim_perform(op);
        sim_make_ready(op);
        return;
    }
    sim_list_add(&io->staged, op);
}

void nv_io_enter(struct nv_io *io)
{
    if (io->staged.count)
        io->enters++;
    for (size_t i = 0; i < io->staged.count; i++) {
        struct nv_op *op = io->staged.items[i];
        struct op_state *state = sim_state_of(op);
        state->entered_at = sim_world.time + 1; /* after every effect so far */
        state->not_before_ns = sim_world.clock_ns + delay_of(op);
        sim_world.counts.delayed += op->kind != NV_OP_TIMER && state->not_before_ns > sim_world.clock_ns;
        sim_list_add(&sim_world.pending, op);
    }
    io->staged.count = 0;
}

static void note_lateness(struct nv_op *op)
{
    const uint64_t late_ns = sim_world.clock_ns - sim_state_of(op)->not_before_ns;

    if (late_ns > sim_world.timers_late_ns)
        sim_world.timers_late_ns = late_ns;
}

unsigned nv_io_run(struct nv_io *io)
{
    struct op_list batch = io->ready;
    unsigned ran = 0;

    io->ready = (struct op_list){0};
    while (batch.count) {
        struct nv_op *op = sim_list_take(&batch, (size_t)sim_random_below(&sim_world.random, batch.count));
        sim_check_stable(op);
        if (op->kind == NV_OP_TIMER && op->result == 0)
            note_lateness(op);
        op->done(op);
        ran++;
    }
    free(batch.items);
    return ran;
}

int64_t nv_io_send(struct nv_io *io, nv_handle handle, struct iovec *iov, unsigned count)
{
    io->enters++;
    return sim_send(sim_handle_of(handle, HANDLE_SOCKET)->socket, iov, count);
}

static bool cancel_in(struct op_list *list, struct nv_op *op)
{
    for (size_t i = 0; i < list->count; i++)
        if (list->items[i] == op) {
            sim_list_take(list, i);
            op->result = op->kind == NV_OP_RECV && sim_state_of(op)->moved > 0 ? (int64_t)sim_state_of(op)->moved : -ECANCELED;
            sim_make_ready(op);
            return true;
        }
    return false;
}

void nv_io_cancel(struct nv_io *io, struct nv_op *op)
{
    if (!cancel_in(&sim_world.pending, op))
        cancel_in(&io->staged, op);
}

bool nv_io_ready(struct nv_io *io)
{
    return io->ready.count || io->staged.count;
}

void nv_io_sleep_begin(struct nv_io *io)
{
    (void)io;
}

/* Sleeping is the simulation's business: it runs a reactor's next turn when it likes. */
void nv_io_sleep(struct nv_io *io, uint64_t timeout_ns)
{
    (void)timeout_ns;
    nv_io_enter(io);
}

void nv_io_sleep_end(struct nv_io *io)
{
    (void)io;
}

void nv_io_wake(struct nv_io *io)
{
    (void)io;
}

uint64_t nv_io_now_ns(struct nv_io *io)
{
    (void)io;
    return sim_world.clock_ns;
}

void nv_io_counts(const struct nv_io *io, uint64_t *submissions, uint64_t *enters)
{
    *submissions = io->submissions;
    *enters = io->enters;
}

/* ---- handles ---- */

nv_handle nv_io_open_file(int fd)
{
    const struct handle *file = sim_handle_of(fd, HANDLE_FILE);

    return sim_add_handle((struct handle){
        .kind = HANDLE_FILE, .disk = file->disk, .align = file->align, .in_memory = file->in_memory, .origin = fd});
}

bool nv_io_in_memory(nv_handle handle)
{
    return sim_handle_of(handle, HANDLE_FILE)->in_memory;
}

uint8_t *nv_io_map(nv_handle handle, uint64_t size, bool writable)
{
    struct sim_disk *disk = sim_handle_of(handle, HANDLE_FILE)->disk;

    (void)writable; /* writes go through the disk, which keeps their versions */
    return size <= sim_disk_size(disk) ? sim_disk_bytes(disk) : NULL;
}

void nv_io_unmap(uint8_t *view, uint64_t size)
{
    (void)view;
    (void)size;
}

/* The world's files have pages that come and go as they like. */
uint64_t nv_io_present(const uint8_t *at, unsigned pages)
{
    (void)at;
    (void)pages;
    return sim_random_chance(&sim_world.random, 700) ? UINT64_MAX : sim_random_next(&sim_world.random);
}

int64_t nv_io_copy(nv_handle handle, void *to, uint64_t length, uint64_t offset)
{
    struct sim_disk *disk = sim_handle_of(handle, HANDLE_FILE)->disk;
    uint64_t size = sim_disk_clip(disk, offset, length);

    sim_disk_read(disk, offset, to, size);
    return (int64_t)size;
}

nv_handle nv_io_open_socket(int fd)
{
    sim_handle_of(fd, HANDLE_SOCKET);
    return fd;
}

void nv_io_close(nv_handle number)
{
    struct handle *handle = number >= 3 && number < sim_world.handle_count ? &sim_world.handles[number] : NULL;

    if (!handle || handle->kind == HANDLE_CLOSED)
        nv_sim_violation("handle %d is closed, but is not open", number);
    if (handle->operations)
        nv_sim_violation("handle %d is closed with %u operations in flight", number, handle->operations);
    handle->kind = HANDLE_CLOSED;
    if (handle->socket)
        handle->socket->server_closed = true;
}

void nv_io_shutdown(nv_handle number)
{
    sim_handle_of(number, HANDLE_SOCKET)->socket->server_shut = true;
}

void nv_io_shutdown_send(nv_handle number)
{
    sim_handle_of(number, HANDLE_SOCKET)->socket->server_shut_send = true;
}

void nv_io_reset_on_close(nv_handle number)
{
    sim_handle_of(number, HANDLE_SOCKET); /* what has not been taken is lost with the handle, here */
}

bool nv_io_hung_up(nv_handle number)
{
    return sim_handle_of(number, HANDLE_SOCKET)->socket->client_shut;
}

/* ---- the bell: the simulation looks at events after every step, nobody needs to be woken ---- */

int nv_bell_create(void)
{
    return 0;
}

void nv_bell_ring(int bell)
{
    (void)bell;
}

void nv_bell_silence(int bell)
{
    (void)bell;
}

void nv_bell_destroy(int bell)
{
    (void)bell;
}
