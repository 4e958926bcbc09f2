/*
 * The world of io_sim.h: disks, faults and the effect of every operation (sockets: io_sim_socket.c; the port itself:
 * io_sim_port.c).
 * Invariants: an operation is in exactly one of {staged (not yet entered), pending, ready}; only
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

#include "io/io_sim_world.h"
#include "limits.h"

#define SCRIBBLE_MAX 4096u
#define TURN_NS 2000u

struct sim_world sim_world;

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

struct op_state *sim_state_of(struct nv_op *op)
{
    return (struct op_state *)op->port;
}

void sim_list_add(struct op_list *list, struct nv_op *op)
{
    if (list->count == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        list->items = realloc(list->items, list->capacity * sizeof *list->items);
        assert(list->items);
    }
    list->items[list->count++] = op;
}

struct nv_op *sim_list_take(struct op_list *list, size_t index)
{
    struct nv_op *op = list->items[index];

    assert(index < list->count);
    list->items[index] = list->items[--list->count];
    return op;
}

/* ---- the world ---- */

void nv_sim_begin(uint64_t seed, const struct nv_sim_faults *faults)
{
    assert(!sim_world.alive);
    sim_world = (struct sim_world){
        .alive = true, .random = {seed}, .faults = *faults, .clock_ns = 1000000000u, .time = 1,
    };
    sim_world.handle_count = 3; /* 0, 1 and 2 are nobody's */
}

void nv_sim_set_faults(const struct nv_sim_faults *faults)
{
    sim_world.faults = *faults;
}

uint64_t nv_sim_clock_ns(void)
{
    return sim_world.clock_ns;
}

uint64_t nv_sim_timers_late_ns(void)
{
    return sim_world.timers_late_ns;
}

uint64_t nv_sim_time(void)
{
    return ++sim_world.time;
}

struct nv_sim_counts nv_sim_counts(void)
{
    return sim_world.counts;
}

int sim_add_handle(struct handle handle)
{
    assert(sim_world.alive);
    if (sim_world.handle_count == HANDLES_MAX)
        return -EMFILE;
    sim_world.handles[sim_world.handle_count] = handle;
    return sim_world.handle_count++;
}

struct handle *sim_handle_of(nv_handle number, enum handle_kind kind)
{
    struct handle *handle = number >= 3 && number < sim_world.handle_count ? &sim_world.handles[number] : NULL;

    if (!handle || handle->kind != kind)
        nv_sim_violation("handle %d is used, but %s", number,
                         !handle ? "never existed" : handle->kind == HANDLE_CLOSED ? "is closed" : "is of another kind");
    return handle;
}

int nv_sim_file(struct sim_disk *disk, uint32_t align, bool in_memory)
{
    return sim_add_handle((struct handle){
        .kind = HANDLE_FILE, .disk = disk, .align = align, .in_memory = in_memory, .owner = true});
}

int nv_sim_file_again(int file)
{
    struct handle again = *sim_handle_of(file, HANDLE_FILE);

    again.owner = false;
    again.operations = 0;
    again.trouble = (struct nv_sim_trouble){.hung = false};
    return sim_add_handle(again);
}

struct nv_sim_trouble *nv_sim_trouble(int file)
{
    return &sim_handle_of(file, HANDLE_FILE)->trouble;
}

struct sim_disk *nv_sim_disk(int file)
{
    return sim_handle_of(file, HANDLE_FILE)->disk;
}

void nv_sim_jump(uint64_t ns)
{
    sim_world.clock_ns += ns;
}

const struct nv_sim_trouble *sim_trouble_of(const struct nv_op *op)
{
    static const struct nv_sim_trouble none;
    const struct handle *handle = op->kind == NV_OP_TIMER ? NULL : &sim_world.handles[op->handle];

    if (!handle || handle->kind != HANDLE_FILE)
        return &none;
    return handle->origin ? &sim_world.handles[handle->origin].trouble : &handle->trouble;
}

void nv_sim_end(void)
{
    assert(sim_world.alive);
    if (sim_world.pending.count)
        nv_sim_violation("%zu operations are left behind, the first of kind %u", sim_world.pending.count,
                         sim_world.pending.items[0]->kind);
    for (int i = 3; i < sim_world.handle_count; i++) {
        struct handle *handle = &sim_world.handles[i];
        if (handle->owner && handle->disk)
            sim_disk_destroy(handle->disk);
        if (handle->owner && handle->socket)
            sim_socket_free(handle->socket);
    }
    free(sim_world.pending.items);
    sim_world.alive = false;
}

/* ---- memory the port owns ---- */

uint64_t sim_hash_iov(const struct nv_op *op)
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

bool sim_outgoing(const struct nv_op *op)
{
    return op->kind == NV_OP_WRITE || op->kind == NV_OP_SEND;
}

bool sim_incoming(const struct nv_op *op)
{
    return op->kind == NV_OP_READ || op->kind == NV_OP_RECV;
}

uint64_t sim_total(const struct nv_op *op)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < op->iov_count; i++)
        sum += op->iov[i].iov_len;
    return sum;
}

size_t sim_walk(const struct nv_op *op, uint64_t skip, size_t size,
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

void sim_scribble(struct nv_op *op)
{
    sim_walk(op, 0, SCRIBBLE_MAX, scribble, NULL);
}

void sim_check_stable(struct nv_op *op)
{
    if (sim_outgoing(op) && sim_hash_iov(op) != sim_state_of(op)->hash)
        nv_sim_violation("the bytes of a %s changed while the port owned them (offset %llu, length %llu)",
                         op->kind == NV_OP_WRITE ? "write" : "send", (unsigned long long)op->offset,
                         (unsigned long long)sim_total(op));
}

/* ---- effects: each returns true when the operation has completed ---- */

bool sim_finish(struct nv_op *op, int64_t result)
{
    op->result = result;
    return true;
}

/* Some of the size: 0 or a multiple of the atom. */
static uint64_t part_of(struct sim_random *random, uint64_t size)
{
    uint64_t atom = sim_world.faults.atom ? sim_world.faults.atom : 1;

    return sim_random_below(random, size / atom + 1) * atom;
}

static size_t maybe_short(size_t size)
{
    size_t part;

    if (!sim_random_chance(&sim_world.random, sim_world.faults.short_transfer))
        return size;
    part = (size_t)part_of(&sim_world.random, size);
    sim_world.counts.short_transfers += part > 0 && part < size;
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

    sim_disk_write(cursor->disk, cursor->offset, bytes, size, sim_world.time, cursor->mode);
    cursor->offset += size;
    return size;
}

static bool do_read(struct nv_op *op, struct sim_disk *disk)
{
    struct disk_cursor cursor = {.disk = disk, .offset = op->offset};
    size_t size = (size_t)sim_disk_clip(disk, op->offset, sim_total(op));

    if (sim_random_chance(&sim_world.random, sim_world.faults.read_error))
        return sim_finish(op, -EIO);
    size = maybe_short(size);
    sim_walk(op, 0, size, from_disk, &cursor);
    return sim_finish(op, (int64_t)size);
}

static bool do_write(struct nv_op *op, struct sim_disk *disk)
{
    bool dsync = op->flags & NV_OP_DSYNC;
    struct disk_cursor cursor = {disk, op->offset, dsync ? SIM_WRITE_DURABLE : SIM_WRITE_CACHED};
    uint64_t wanted = sim_total(op);
    size_t size = (size_t)sim_disk_clip(disk, op->offset, wanted);

    if (size < wanted)
        nv_sim_violation("a write of %llu bytes at %llu goes past the end of its file (%llu)",
                         (unsigned long long)wanted, (unsigned long long)op->offset,
                         (unsigned long long)sim_disk_size(disk));
    bool fails = sim_random_chance(&sim_world.random, sim_world.faults.write_error);
    bool sync_fails = dsync && sim_random_chance(&sim_world.random, sim_world.faults.dsync_error);
    if (fails || sync_fails) { /* part of it may have happened */
        cursor.mode = sync_fails ? SIM_WRITE_LOST : SIM_WRITE_CACHED;
        sim_walk(op, 0, (size_t)part_of(&sim_world.random, size), to_disk, &cursor);
        return sim_finish(op, sync_fails || sim_random_chance(&sim_world.random, 512) ? -EIO : -ENOSPC);
    }
    size = maybe_short(size);
    sim_walk(op, 0, size, to_disk, &cursor);
    return sim_finish(op, (int64_t)size);
}

static bool do_sync(struct nv_op *op, struct sim_disk *disk)
{
    bool fails = sim_random_chance(&sim_world.random, sim_world.faults.sync_error + sim_trouble_of(op)->sync_error);

    sim_world.counts.syncs_failed += fails;
    sim_disk_sync(disk, sim_state_of(op)->entered_at, fails);
    return sim_finish(op, fails ? -EIO : 0);
}

static bool do_zero(struct nv_op *op, struct sim_disk *disk)
{
    bool punch = op->kind == NV_OP_PUNCH;

    if (punch ? sim_world.faults.no_punch : sim_world.faults.no_zero_range)
        return sim_finish(op, -EOPNOTSUPP);
    if (sim_disk_clip(disk, op->offset, op->length) != op->length)
        nv_sim_violation("zeros of %llu bytes at %llu go past the end of their file", (unsigned long long)op->length,
                         (unsigned long long)op->offset);
    bool fails = sim_random_chance(&sim_world.random, sim_world.faults.punch_error);
    uint64_t size = fails ? part_of(&sim_world.random, op->length) : op->length;
    if (punch && size)
        sim_disk_punch(disk, op->offset, size, sim_world.time);
    else
        sim_disk_write(disk, op->offset, NULL, size, sim_world.time, SIM_WRITE_CACHED);
    return sim_finish(op, fails ? -EIO : 0);
}

static bool do_extents(struct nv_op *op, struct sim_disk *disk)
{
    uint64_t at = op->offset, end = op->offset + sim_disk_clip(disk, op->offset, op->length);
    uint32_t count = 0;

    if (sim_random_chance(&sim_world.random, sim_world.faults.read_error))
        return sim_finish(op, -EIO);
    for (bool hole; at < end && count < op->extents_max; count++) {
        uint64_t length = sim_disk_extent(disk, at, end - at, &hole);
        op->extents[count] = (struct nv_extent){length, hole ? NV_EXTENT_HOLE | NV_EXTENT_ZERO : 0};
        at += length;
    }
    return sim_finish(op, count);
}

static bool can_go_on(struct nv_op *op)
{
    const struct nv_sim_trouble *trouble = sim_trouble_of(op);

    if (!trouble->gone && !trouble->fenced && (trouble->hung || (trouble->stuck_writes && op->kind != NV_OP_READ) ||
                                               (trouble->stuck_reads && op->kind == NV_OP_READ) ||
                                               sim_state_of(op)->entered_at < trouble->stuck_before))
        return false;
    if (sim_state_of(op)->settled)
        return true;
    if (sim_state_of(op)->not_before_ns > sim_world.clock_ns)
        return false;
    if (op->kind != NV_OP_RECV && op->kind != NV_OP_SEND)
        return true;
    return sim_socket_ready(op, sim_world.handles[op->handle].socket);
}

/* The file's own troubles: 0, or the error that the operation ends with. */
static int troubled(struct nv_op *op)
{
    const struct nv_sim_trouble *trouble = sim_trouble_of(op);
    uint16_t chance = op->kind == NV_OP_READ ? trouble->read_error : trouble->write_error;

    if (trouble->fenced) {
        sim_world.counts.fenced++;
        return -ESTALE;
    }
    if (trouble->gone || sim_state_of(op)->settled)
        return -EIO;
    if (op->kind == NV_OP_SYNC) /* its failure loses what it should have saved */
        return 0;
    if (!sim_random_chance(&sim_world.random, chance))
        return 0;
    sim_world.counts.errors++;
    return -EIO;
}

static bool is_of_file(const struct nv_op *op)
{
    return op->kind != NV_OP_TIMER && op->kind != NV_OP_RECV && op->kind != NV_OP_SEND;
}

/* One that was asked for later may have been performed already. */
static void note_order(const struct nv_op *op, uint64_t entered_at)
{
    if (!is_of_file(op))
        return;
    sim_world.counts.reordered += entered_at < sim_world.newest_entered;
    if (entered_at > sim_world.newest_entered)
        sim_world.newest_entered = entered_at;
}

bool sim_perform(struct nv_op *op)
{
    struct handle *handle = op->kind == NV_OP_TIMER ? NULL : &sim_world.handles[op->handle];
    int error = troubled(op);

    note_order(op, sim_state_of(op)->entered_at);
    sim_world.time++;
    if (error)
        return sim_finish(op, error);
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
        return sim_recv(op, handle->socket);
    case NV_OP_SEND:
        return sim_send_op(op, handle->socket);
    default:
        return sim_finish(op, 0);
    }
}

void sim_make_ready(struct nv_op *op)
{
    if (op->kind != NV_OP_TIMER)
        sim_world.handles[op->handle].operations--;
    sim_list_add(&sim_state_of(op)->io->ready, op);
}

bool nv_sim_step(void)
{
    size_t count = sim_world.pending.count, start = (size_t)sim_random_below(&sim_world.random, count);

    sim_world.clock_ns += sim_random_below(&sim_world.random, TURN_NS);
    for (size_t i = 0; i < count; i++) {
        size_t index = (start + i) % count;
        struct nv_op *op = sim_world.pending.items[index];
        if (!can_go_on(op))
            continue;
        if (sim_perform(op)) {
            sim_list_take(&sim_world.pending, index);
            sim_make_ready(op);
        }
        return true;
    }
    return false;
}

bool nv_sim_advance(void)
{
    uint64_t next_ns = UINT64_MAX;

    for (size_t i = 0; i < sim_world.pending.count; i++) {
        uint64_t at_ns = sim_state_of(sim_world.pending.items[i])->not_before_ns;
        if (at_ns > sim_world.clock_ns && at_ns < next_ns)
            next_ns = at_ns;
    }
    if (next_ns == UINT64_MAX)
        return false;
    sim_world.clock_ns = next_ns;
    return true;
}

/* Each sector of a write in flight may or may not have reached the disk. */
static void tear(struct nv_op *op, struct sim_disk *disk, struct sim_random *random)
{
    uint64_t end = op->offset + sim_total(op);
    unsigned done = 0, left = 0;

    for (uint64_t at = op->offset; at < end;) {
        uint64_t part = SIM_SECTOR - at % SIM_SECTOR;
        struct disk_cursor cursor = {disk, at, SIM_WRITE_CACHED};
        part = part < end - at ? part : end - at;
        if (sim_random_chance(random, 512)) {
            sim_walk(op, at - op->offset, (size_t)part, to_disk, &cursor);
            done++;
        } else {
            left++;
        }
        at += part;
    }
    sim_world.counts.torn += done && left;
}

/* What an operation that is cut off has done: all of it, some, or nothing. */
static void do_in_part(struct nv_op *op, struct sim_disk *disk, struct sim_random *random)
{
    if (op->kind == NV_OP_WRITE)
        tear(op, disk, random);
    else if ((op->kind == NV_OP_ZERO || op->kind == NV_OP_PUNCH) && sim_random_chance(random, 512))
        sim_disk_write(disk, op->offset, NULL, (size_t)part_of(random, op->length), sim_world.time, SIM_WRITE_CACHED);
}

void nv_sim_settle(int file, struct sim_random *random)
{
    struct sim_disk *disk = sim_handle_of(file, HANDLE_FILE)->disk;

    sim_world.time++;
    for (size_t i = 0; i < sim_world.pending.count; i++) {
        struct nv_op *op = sim_world.pending.items[i];
        const struct handle *handle = op->kind == NV_OP_TIMER ? NULL : &sim_world.handles[op->handle];
        if (!handle || handle->disk != disk || handle->origin != file || sim_state_of(op)->settled)
            continue;
        if (!sim_trouble_of(op)->fenced)
            do_in_part(op, disk, random);
        sim_state_of(op)->settled = true;
    }
}

void nv_sim_crash(int file, bool cache_survives, struct sim_random *random, uint8_t *image)
{
    struct sim_disk *disk = sim_handle_of(file, HANDLE_FILE)->disk;

    for (size_t i = 0; i < sim_world.pending.count; i++) {
        struct nv_op *op = sim_world.pending.items[i];
        if (op->kind == NV_OP_TIMER || sim_world.handles[op->handle].disk != disk)
            continue;
        do_in_part(op, disk, random);
    }
    if (cache_survives)
        sim_disk_read(disk, 0, image, sim_disk_size(disk));
    else
        sim_disk_crash(disk, random, image);
}
