/*
 * See io_sim.h. Invariants: an operation is in exactly one of {staged (not yet entered), pending, ready}; only
 * nv_sim_step() moves one from pending to ready, at the moment of its effect; `done` runs only from nv_io_run().
 * While an operation is not ready the port owns its memory: outgoing bytes are hashed when they come and when
 * they go back, and incoming memory is scribbled over first, so that nobody can rely on what was there.
 */
#include "io/io_sim.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "limits.h"

#define HANDLES_MAX 4096
#define SCRIBBLE_MAX 4096u
#define TURN_NS 2000u

enum handle_kind { HANDLE_FREE, HANDLE_FILE, HANDLE_SOCKET, HANDLE_CLOSED };

struct pipe_queue {
    uint8_t *bytes;
    size_t capacity, start, size;
};

struct sim_socket {
    struct pipe_queue to_server, to_client;
    bool client_shut, client_closed, client_reset;
    bool server_shut, server_closed;
};

struct handle {
    enum handle_kind kind;
    struct sim_disk *disk;
    uint32_t align;
    struct sim_socket *socket;
    bool owner; /* frees the disk or socket at the end of the world */
    unsigned operations;
};

/* Kept in nv_op.port while the port owns the operation. */
struct op_state {
    struct nv_io *io;
    uint64_t hash;
    uint64_t moved;
    uint64_t not_before_ns;
    uint64_t entered_at; /* world time: what a sync covers */
};
_Static_assert(sizeof(struct op_state) <= sizeof(((struct nv_op *)0)->port), "the state must fit in an operation");

struct op_list {
    struct nv_op **items;
    size_t count, capacity;
};

struct nv_io {
    struct op_list staged, ready;
    uint64_t submissions, enters;
};

static struct world {
    bool alive;
    struct sim_random random;
    struct nv_sim_faults faults;
    uint64_t clock_ns;
    uint64_t time; /* counts effects; orders writes against syncs */
    uint64_t syncs_failed;
    struct op_list pending;
    struct handle handles[HANDLES_MAX];
    int handle_count;
} world;

void (*nv_sim_on_violation)(void);

void nv_sim_violation(const char *format, ...)
{
    va_list arguments;

    fflush(stdout);
    fputs("VIOLATION: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    if (nv_sim_on_violation)
        nv_sim_on_violation();
    fflush(stderr);
    abort();
}

static struct op_state *state_of(struct nv_op *op)
{
    return (struct op_state *)op->port;
}

static void list_add(struct op_list *list, struct nv_op *op)
{
    if (list->count == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        list->items = realloc(list->items, list->capacity * sizeof *list->items);
        assert(list->items);
    }
    list->items[list->count++] = op;
}

static struct nv_op *list_take(struct op_list *list, size_t index)
{
    struct nv_op *op = list->items[index];

    assert(index < list->count);
    list->items[index] = list->items[--list->count];
    return op;
}

/* ---- the world ---- */

void nv_sim_begin(uint64_t seed, const struct nv_sim_faults *faults)
{
    assert(!world.alive);
    world = (struct world){.alive = true, .random = {seed}, .faults = *faults, .clock_ns = 1000000000u, .time = 1};
    world.handle_count = 3; /* 0, 1 and 2 are nobody's */
}

void nv_sim_set_faults(const struct nv_sim_faults *faults)
{
    world.faults = *faults;
}

uint64_t nv_sim_syncs_failed(void)
{
    return world.syncs_failed;
}

static int add_handle(struct handle handle)
{
    assert(world.alive);
    if (world.handle_count == HANDLES_MAX)
        return -EMFILE;
    world.handles[world.handle_count] = handle;
    return world.handle_count++;
}

static struct handle *handle_of(nv_handle number, enum handle_kind kind)
{
    struct handle *handle = number >= 3 && number < world.handle_count ? &world.handles[number] : NULL;

    if (!handle || handle->kind != kind)
        nv_sim_violation("handle %d is used, but %s", number,
                         !handle ? "never existed" : handle->kind == HANDLE_CLOSED ? "is closed" : "is of another kind");
    return handle;
}

int nv_sim_file(struct sim_disk *disk, uint32_t align)
{
    return add_handle((struct handle){.kind = HANDLE_FILE, .disk = disk, .align = align, .owner = true});
}

int nv_sim_socket(void)
{
    struct sim_socket *socket = calloc(1, sizeof *socket);

    assert(socket);
    for (int i = 0; i < 2; i++) {
        struct pipe_queue *queue = i ? &socket->to_client : &socket->to_server;
        queue->capacity = 4096u << sim_random_below(&world.random, 8);
        queue->bytes = malloc(queue->capacity);
        assert(queue->bytes);
    }
    return add_handle((struct handle){.kind = HANDLE_SOCKET, .socket = socket, .owner = true});
}

void nv_sim_end(void)
{
    assert(world.alive);
    if (world.pending.count)
        nv_sim_violation("%zu operations are left behind, the first of kind %u", world.pending.count,
                         world.pending.items[0]->kind);
    for (int i = 3; i < world.handle_count; i++) {
        struct handle *handle = &world.handles[i];
        if (handle->owner && handle->disk)
            sim_disk_destroy(handle->disk);
        if (handle->owner && handle->socket) {
            free(handle->socket->to_server.bytes);
            free(handle->socket->to_client.bytes);
            free(handle->socket);
        }
    }
    free(world.pending.items);
    world.alive = false;
}

/* ---- memory the port owns ---- */

static uint64_t hash_iov(const struct nv_op *op)
{
    uint64_t hash = 0xcbf29ce484222325ull ^ op->iov_count;

    for (unsigned i = 0; i < op->iov_count; i++) {
        const uint8_t *bytes = op->iov[i].iov_base;
        size_t length = op->iov[i].iov_len, at = 0;
        for (uint64_t word; at + 8 <= length; at += 8) {
            memcpy(&word, bytes + at, 8);
            hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
            hash ^= hash >> 29;
        }
        for (; at < length; at++)
            hash = (hash ^ bytes[at]) * 0x100000001b3ull;
    }
    return hash;
}

static bool outgoing(const struct nv_op *op)
{
    return op->kind == NV_OP_WRITE || op->kind == NV_OP_SEND;
}

static bool incoming(const struct nv_op *op)
{
    return op->kind == NV_OP_READ || op->kind == NV_OP_RECV;
}

static uint64_t total(const struct nv_op *op)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < op->iov_count; i++)
        sum += op->iov[i].iov_len;
    return sum;
}

/* Visit `size` bytes of the operation's memory from `skip` on, piece by piece; stops when visit answers less. */
static size_t walk(const struct nv_op *op, uint64_t skip, size_t size,
                   size_t (*visit)(void *context, uint8_t *bytes, size_t size), void *context)
{
    size_t walked = 0;

    for (unsigned i = 0; i < op->iov_count && walked < size; i++) {
        uint64_t length = op->iov[i].iov_len;
        if (skip >= length) {
            skip -= length;
            continue;
        }
        size_t part = length - skip < size - walked ? (size_t)(length - skip) : size - walked;
        size_t did = visit(context, (uint8_t *)op->iov[i].iov_base + skip, part);
        walked += did;
        if (did < part)
            break;
        skip = 0;
    }
    return walked;
}

static size_t scribble(void *context, uint8_t *bytes, size_t size)
{
    (void)context;
    memset(bytes, 0xdb, size);
    return size;
}

static void check_stable(struct nv_op *op)
{
    if (outgoing(op) && hash_iov(op) != state_of(op)->hash)
        nv_sim_violation("the bytes of a %s changed while the port owned them (offset %llu, length %llu)",
                         op->kind == NV_OP_WRITE ? "write" : "send", (unsigned long long)op->offset,
                         (unsigned long long)total(op));
}

/* ---- byte queues ---- */

static size_t queue_push(void *context, uint8_t *bytes, size_t size)
{
    struct pipe_queue *queue = context;
    size_t room = queue->capacity - queue->size, pushed;

    size = size < room ? size : room;
    for (pushed = 0; pushed < size;) {
        size_t at = (queue->start + queue->size) % queue->capacity;
        size_t part = queue->capacity - at < size - pushed ? queue->capacity - at : size - pushed;
        memcpy(queue->bytes + at, bytes + pushed, part);
        queue->size += part;
        pushed += part;
    }
    return pushed;
}

static size_t queue_pull(void *context, uint8_t *out, size_t size)
{
    struct pipe_queue *queue = context;
    size_t pulled;

    size = size < queue->size ? size : queue->size;
    for (pulled = 0; pulled < size;) {
        size_t part = queue->capacity - queue->start < size - pulled ? queue->capacity - queue->start : size - pulled;
        memcpy(out + pulled, queue->bytes + queue->start, part);
        queue->start = (queue->start + part) % queue->capacity;
        queue->size -= part;
        pulled += part;
    }
    return pulled;
}

/* ---- effects: each returns true when the operation has completed ---- */

static bool finish(struct nv_op *op, int64_t result)
{
    op->result = result;
    return true;
}

/* Some of the size: 0 or a multiple of the atom. */
static uint64_t part_of(struct sim_random *random, uint64_t size)
{
    uint64_t atom = world.faults.atom ? world.faults.atom : 1;

    return sim_random_below(random, size / atom + 1) * atom;
}

static size_t maybe_short(size_t size)
{
    size_t part;

    if (!sim_random_chance(&world.random, world.faults.short_transfer))
        return size;
    part = (size_t)part_of(&world.random, size);
    return part ? part : size;
}

struct disk_cursor {
    struct sim_disk *disk;
    uint64_t offset;
    enum sim_write_mode mode;
};

static size_t from_disk(void *context, uint8_t *bytes, size_t size)
{
    struct disk_cursor *cursor = context;

    sim_disk_read(cursor->disk, cursor->offset, bytes, size);
    cursor->offset += size;
    return size;
}

static size_t to_disk(void *context, uint8_t *bytes, size_t size)
{
    struct disk_cursor *cursor = context;

    sim_disk_write(cursor->disk, cursor->offset, bytes, size, world.time, cursor->mode);
    cursor->offset += size;
    return size;
}

static bool do_read(struct nv_op *op, struct sim_disk *disk)
{
    struct disk_cursor cursor = {.disk = disk, .offset = op->offset};
    size_t size = (size_t)sim_disk_clip(disk, op->offset, total(op));

    if (sim_random_chance(&world.random, world.faults.read_error))
        return finish(op, -EIO);
    size = maybe_short(size);
    walk(op, 0, size, from_disk, &cursor);
    return finish(op, (int64_t)size);
}

static bool do_write(struct nv_op *op, struct sim_disk *disk)
{
    bool dsync = op->flags & NV_OP_DSYNC;
    struct disk_cursor cursor = {disk, op->offset, dsync ? SIM_WRITE_DURABLE : SIM_WRITE_CACHED};
    uint64_t wanted = total(op);
    size_t size = (size_t)sim_disk_clip(disk, op->offset, wanted);

    if (size < wanted)
        nv_sim_violation("a write of %llu bytes at %llu goes past the end of its file (%llu)",
                         (unsigned long long)wanted, (unsigned long long)op->offset,
                         (unsigned long long)sim_disk_size(disk));
    bool fails = sim_random_chance(&world.random, world.faults.write_error);
    bool sync_fails = dsync && sim_random_chance(&world.random, world.faults.dsync_error);
    if (fails || sync_fails) { /* part of it may have happened */
        cursor.mode = sync_fails ? SIM_WRITE_LOST : SIM_WRITE_CACHED;
        walk(op, 0, (size_t)part_of(&world.random, size), to_disk, &cursor);
        return finish(op, sync_fails || sim_random_chance(&world.random, 512) ? -EIO : -ENOSPC);
    }
    size = maybe_short(size);
    walk(op, 0, size, to_disk, &cursor);
    return finish(op, (int64_t)size);
}

static bool do_sync(struct nv_op *op, struct sim_disk *disk)
{
    bool fails = sim_random_chance(&world.random, world.faults.sync_error);

    sim_disk_sync(disk, state_of(op)->entered_at, fails);
    return finish(op, fails ? -EIO : 0);
}

static bool do_zero(struct nv_op *op, struct sim_disk *disk)
{
    bool punch = op->kind == NV_OP_PUNCH;

    if (punch ? world.faults.no_punch : world.faults.no_zero_range)
        return finish(op, -EOPNOTSUPP);
    if (sim_disk_clip(disk, op->offset, op->length) != op->length)
        nv_sim_violation("zeros of %llu bytes at %llu go past the end of their file", (unsigned long long)op->length,
                         (unsigned long long)op->offset);
    bool fails = sim_random_chance(&world.random, world.faults.punch_error);
    uint64_t size = fails ? part_of(&world.random, op->length) : op->length;
    if (punch && size)
        sim_disk_punch(disk, op->offset, size, world.time);
    else
        sim_disk_write(disk, op->offset, NULL, size, world.time, SIM_WRITE_CACHED);
    return finish(op, fails ? -EIO : 0);
}

static bool do_extents(struct nv_op *op, struct sim_disk *disk)
{
    uint64_t at = op->offset, end = op->offset + sim_disk_clip(disk, op->offset, op->length);
    uint32_t count = 0;

    if (sim_random_chance(&world.random, world.faults.read_error))
        return finish(op, -EIO);
    for (bool hole; at < end && count < op->extents_max; count++) {
        uint64_t length = sim_disk_extent(disk, at, end - at, &hole);
        op->extents[count] = (struct nv_extent){length, hole ? NV_EXTENT_HOLE | NV_EXTENT_ZERO : 0};
        at += length;
    }
    return finish(op, count);
}

static bool do_recv(struct nv_op *op, struct sim_socket *socket)
{
    struct op_state *state = state_of(op);
    size_t left = (size_t)(total(op) - state->moved);
    size_t size = left < socket->to_server.size ? left : socket->to_server.size;

    if (socket->client_reset)
        return finish(op, state->moved ? (int64_t)state->moved : -ECONNRESET);
    if (size == 0)
        return finish(op, (int64_t)state->moved); /* the end of the stream */
    if (sim_random_chance(&world.random, 256))
        size = 1 + (size_t)sim_random_below(&world.random, size);
    state->moved += walk(op, state->moved, size, queue_pull, &socket->to_server);
    if ((op->flags & NV_OP_WHOLE) && state->moved < total(op))
        return false;
    return finish(op, (int64_t)state->moved);
}

static bool do_send(struct nv_op *op, struct sim_socket *socket)
{
    struct op_state *state = state_of(op);

    if (socket->client_closed || socket->server_shut)
        return finish(op, state->moved ? (int64_t)state->moved : -EPIPE);
    size_t left = (size_t)(total(op) - state->moved);
    if (left > 1 && sim_random_chance(&world.random, 256))
        left = 1 + (size_t)sim_random_below(&world.random, left);
    state->moved += walk(op, state->moved, left, queue_push, &socket->to_client);
    return state->moved < total(op) ? false : finish(op, (int64_t)state->moved);
}

static bool can_go_on(struct nv_op *op)
{
    if (state_of(op)->not_before_ns > world.clock_ns)
        return false;
    if (op->kind != NV_OP_RECV && op->kind != NV_OP_SEND)
        return true;
    const struct sim_socket *socket = world.handles[op->handle].socket;
    if (op->kind == NV_OP_RECV)
        return socket->to_server.size > 0 || socket->client_shut || socket->server_shut;
    return socket->to_client.size < socket->to_client.capacity || socket->client_closed || socket->server_shut;
}

static bool perform(struct nv_op *op)
{
    struct handle *handle = op->kind == NV_OP_TIMER ? NULL : &world.handles[op->handle];

    world.time++;
    switch (op->kind) {
    case NV_OP_READ:
        return do_read(op, handle->disk);
    case NV_OP_WRITE:
        return do_write(op, handle->disk);
    case NV_OP_SYNC:
        return do_sync(op, handle->disk);
    case NV_OP_ZERO:
    case NV_OP_PUNCH:
        return do_zero(op, handle->disk);
    case NV_OP_EXTENTS:
        return do_extents(op, handle->disk);
    case NV_OP_RECV:
        return do_recv(op, handle->socket);
    case NV_OP_SEND:
        return do_send(op, handle->socket);
    default:
        return finish(op, 0);
    }
}

static void make_ready(struct nv_op *op)
{
    if (op->kind != NV_OP_TIMER)
        world.handles[op->handle].operations--;
    list_add(&state_of(op)->io->ready, op);
}

bool nv_sim_step(void)
{
    size_t count = world.pending.count, start = (size_t)sim_random_below(&world.random, count);

    world.clock_ns += sim_random_below(&world.random, TURN_NS);
    for (size_t i = 0; i < count; i++) {
        size_t index = (start + i) % count;
        struct nv_op *op = world.pending.items[index];
        if (!can_go_on(op))
            continue;
        if (perform(op)) {
            list_take(&world.pending, index);
            make_ready(op);
        }
        return true;
    }
    return false;
}

bool nv_sim_advance(void)
{
    uint64_t next_ns = UINT64_MAX;

    for (size_t i = 0; i < world.pending.count; i++) {
        uint64_t at_ns = state_of(world.pending.items[i])->not_before_ns;
        if (at_ns > world.clock_ns && at_ns < next_ns)
            next_ns = at_ns;
    }
    if (next_ns == UINT64_MAX)
        return false;
    world.clock_ns = next_ns;
    return true;
}

/* Each sector of a write in flight may or may not have reached the disk. */
static void tear(struct nv_op *op, struct sim_disk *disk, struct sim_random *random)
{
    uint64_t end = op->offset + total(op);

    for (uint64_t at = op->offset; at < end;) {
        uint64_t part = SIM_SECTOR - at % SIM_SECTOR;
        struct disk_cursor cursor = {disk, at, SIM_WRITE_CACHED};
        part = part < end - at ? part : end - at;
        if (sim_random_chance(random, 512))
            walk(op, at - op->offset, (size_t)part, to_disk, &cursor);
        at += part;
    }
}

void nv_sim_crash(int file, bool cache_survives, struct sim_random *random, uint8_t *image)
{
    struct sim_disk *disk = handle_of(file, HANDLE_FILE)->disk;

    for (size_t i = 0; i < world.pending.count; i++) {
        struct nv_op *op = world.pending.items[i];
        if (op->kind == NV_OP_TIMER || world.handles[op->handle].disk != disk)
            continue;
        if (op->kind == NV_OP_WRITE)
            tear(op, disk, random);
        else if ((op->kind == NV_OP_ZERO || op->kind == NV_OP_PUNCH) && sim_random_chance(random, 512))
            sim_disk_write(disk, op->offset, NULL, (size_t)part_of(random, op->length), world.time, SIM_WRITE_CACHED);
    }
    if (cache_survives)
        sim_disk_read(disk, 0, image, sim_disk_size(disk));
    else
        sim_disk_crash(disk, random, image);
}

/* ---- the client's side of sockets ---- */

static struct sim_socket *socket_of(int socket)
{
    struct sim_socket *found = world.handles[socket].socket;

    assert(found);
    return found;
}

size_t nv_sim_client_send(int socket, const void *bytes, size_t size)
{
    struct sim_socket *at = socket_of(socket);

    assert(!at->client_shut);
    return at->server_closed || at->server_shut ? 0 : queue_push(&at->to_server, (uint8_t *)(uintptr_t)bytes, size);
}

size_t nv_sim_client_recv(int socket, void *out, size_t capacity)
{
    return queue_pull(&socket_of(socket)->to_client, out, capacity);
}

bool nv_sim_client_ended(int socket)
{
    const struct sim_socket *at = socket_of(socket);

    return (at->server_closed || at->server_shut) && at->to_client.size == 0;
}

void nv_sim_client_shut(int socket)
{
    socket_of(socket)->client_shut = true;
}

void nv_sim_client_close(int socket, bool reset)
{
    struct sim_socket *at = socket_of(socket);

    at->client_shut = at->client_closed = true;
    at->client_reset = reset;
    if (reset)
        at->to_server.size = 0;
}

/* ---- the port ---- */

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
    for (size_t i = 0; i < world.pending.count; i++)
        if (state_of(world.pending.items[i])->io == io)
            nv_sim_violation("a port is destroyed with an operation of kind %u pending", world.pending.items[i]->kind);
    free(io->staged.items);
    free(io->ready.items);
    free(io);
}

static uint64_t delay_ns(void)
{
    if (sim_random_chance(&world.random, world.faults.stall))
        return sim_random_below(&world.random, 2000000000u);
    if (sim_random_chance(&world.random, world.faults.delay))
        return sim_random_below(&world.random, 10000000u);
    return 0;
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
                         (unsigned long long)total(op), align);
}

static void check_operation(struct nv_op *op)
{
    struct handle *handle;

    assert(op->done && op->kind >= NV_OP_READ && op->kind <= NV_OP_TIMER);
    if (op->kind == NV_OP_TIMER)
        return;
    handle = handle_of(op->handle, op->kind == NV_OP_RECV || op->kind == NV_OP_SEND ? HANDLE_SOCKET : HANDLE_FILE);
    handle->operations++;
    if (handle->align > 1)
        check_direct(op, handle->align);
    if ((incoming(op) || outgoing(op)) && total(op) == 0)
        nv_sim_violation("an operation of kind %u moves no bytes", op->kind);
}

void nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    struct op_state *state = state_of(op);

    check_operation(op);
    *state = (struct op_state){.io = io};
    if (outgoing(op))
        state->hash = hash_iov(op);
    if (incoming(op))
        walk(op, 0, SCRIBBLE_MAX, scribble, NULL);
    io->submissions++;
    if (op->kind == NV_OP_READ && (op->flags & NV_OP_TRY_NOW) && sim_random_chance(&world.random, 512)) {
        if (sim_random_chance(&world.random, 64))
            op->flags |= NV_OP_NOW_UNSUPPORTED;
        perform(op);
        make_ready(op);
        return;
    }
    list_add(&io->staged, op);
}

void nv_io_enter(struct nv_io *io)
{
    if (io->staged.count)
        io->enters++;
    for (size_t i = 0; i < io->staged.count; i++) {
        struct nv_op *op = io->staged.items[i];
        struct op_state *state = state_of(op);
        state->entered_at = world.time + 1; /* after every effect so far */
        state->not_before_ns = world.clock_ns + (op->kind == NV_OP_TIMER ? op->length : delay_ns());
        list_add(&world.pending, op);
    }
    io->staged.count = 0;
}

unsigned nv_io_run(struct nv_io *io)
{
    struct op_list batch = io->ready;
    unsigned ran = 0;

    io->ready = (struct op_list){0};
    while (batch.count) {
        struct nv_op *op = list_take(&batch, (size_t)sim_random_below(&world.random, batch.count));
        check_stable(op);
        if (op->kind == NV_OP_SYNC && op->result < 0)
            world.syncs_failed++;
        op->done(op);
        ran++;
    }
    free(batch.items);
    return ran;
}

void nv_io_cancel(struct nv_io *io, struct nv_op *op)
{
    (void)io;
    for (size_t i = 0; i < world.pending.count; i++)
        if (world.pending.items[i] == op) {
            list_take(&world.pending, i);
            op->result = -ECANCELED;
            make_ready(op);
            return;
        }
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
    return world.clock_ns;
}

void nv_io_counts(const struct nv_io *io, uint64_t *submissions, uint64_t *enters)
{
    *submissions = io->submissions;
    *enters = io->enters;
}

/* ---- handles ---- */

nv_handle nv_io_open_file(int fd)
{
    const struct handle *file = handle_of(fd, HANDLE_FILE);

    return add_handle((struct handle){.kind = HANDLE_FILE, .disk = file->disk, .align = file->align});
}

nv_handle nv_io_open_socket(int fd)
{
    handle_of(fd, HANDLE_SOCKET);
    return fd;
}

void nv_io_close(nv_handle number)
{
    struct handle *handle = number >= 3 && number < world.handle_count ? &world.handles[number] : NULL;

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
    handle_of(number, HANDLE_SOCKET)->socket->server_shut = true;
}

bool nv_io_hung_up(nv_handle number)
{
    return handle_of(number, HANDLE_SOCKET)->socket->client_shut;
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
