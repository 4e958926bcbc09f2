/*
 * What is below the log in nvlog's world (log_world.h): one disk with a cache; a sync of it that fails latches, as everywhere
 * in the data plane. In a crowded world a twin has all that is carried, too (log_twin.h), and answers come once a turn.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

#include "io/io_sim.h"
#include "sim/log_world.h"

static void io_over(struct world_io *io, int error)
{
    struct nv_log_below *asked = io->below;
    struct world *world = world_of_io;

    io->used = false;
    asked->error = error;
    if (io->twin)
        twin_answered(io->twin, asked);
    if (!world->plan.crowded) {
        asked->done(asked);
        return;
    }
    asked->next = NULL;
    *world->landed_last = asked;
    world->landed_last = &asked->next;
}

void world_take_landed(struct world *world)
{
    struct nv_log_below *asked;

    while ((asked = world->landed)) {
        world->landed = asked->next;
        if (!world->landed)
            world->landed_last = &world->landed;
        asked->done(asked);
    }
}

static void sync_leg(struct world *world, struct world_io *io);
static void sync_over(struct world *world);

static void io_done(struct nv_op *op)
{
    struct world_io *io = (struct world_io *)((char *)op - offsetof(struct world_io, op));
    struct world *world = world_of_io;
    const bool transfer = op->kind == NV_OP_READ || op->kind == NV_OP_WRITE;
    const bool changes = io->below->kind != NV_LOG_READ && io->below->kind != NV_LOG_FLUSH;

    if (world->plan.trace)
        printf("%6" PRIu64 " below done kind %u%s %" PRIu64 "+%" PRIu64 " -> %" PRId64 "\n", world->step, io->below->kind,
               io->below->ours ? "*" : "", io->below->offset / MODEL_BLOCK, io->below->length / MODEL_BLOCK, op->result);
    if (transfer && op->result > 0 && (uint64_t)op->result < io->iov.iov_len) {
        io->iov.iov_base = (uint8_t *)io->iov.iov_base + op->result;
        io->iov.iov_len -= (uint64_t)op->result;
        op->offset += (uint64_t)op->result;
        nv_io_submit(world->io, op);
        return;
    }
    if (changes)
        world->leg_written++;
    if (op->kind == NV_OP_SYNC)
        sync_over(world);
    if (op->kind == NV_OP_SYNC || ((op->flags & NV_OP_DSYNC) && op->result < 0)) {
        if (op->result < 0 && !world->forgiven)
            world->leg_fault = -EIO;
        io_over(io, op->result < 0 || world->leg_fault ? -EIO : 0);
    } else if (op->result < 0 || (transfer && op->result == 0)) {
        io_over(io, op->result < 0 ? (int)op->result : -EIO);
    } else if (changes && (io->below->flags & NV_LOG_FUA) && op->kind != NV_OP_WRITE) {
        sync_leg(world, io);
    } else {
        io_over(io, (op->flags & NV_OP_DSYNC) && world->leg_fault ? -EIO : 0);
    }
}

/* As nv_sync does: one that succeeds beside one that fails would seem to have saved what that one has lost. */
static void submit(struct world *world, struct world_io *io)
{
    if (io->op.kind == NV_OP_SYNC) {
        if (world->leg_syncs) {
            io->next = world->sync_waits;
            world->sync_waits = io;
            return;
        }
        world->leg_syncs = true;
    }
    nv_io_submit(world->io, &io->op);
}

static void sync_over(struct world *world)
{
    struct world_io *next = world->sync_waits;

    world->leg_syncs = false;
    if (!next)
        return;
    world->sync_waits = next->next;
    submit(world, next);
}

static void sync_leg(struct world *world, struct world_io *io)
{
    io->op = (struct nv_op){.kind = NV_OP_SYNC, .handle = world->leg_handle, .done = io_done};
    submit(world, io);
}

void world_below(void *context, struct nv_log_below *asked)
{
    static const uint8_t kinds[] = {
        [NV_LOG_READ] = NV_OP_READ, [NV_LOG_WRITE] = NV_OP_WRITE, [NV_LOG_ZEROES] = NV_OP_ZERO, [NV_LOG_TRIM] = NV_OP_PUNCH,
        [NV_LOG_FLUSH] = NV_OP_SYNC,
    };
    struct world *world = context;
    struct world_io *io = NULL;

    for (uint32_t i = 0; i < WORLD_IOS && !io; i++)
        io = world->ios[i].used ? NULL : &world->ios[i];
    assert(io && (asked->kind == NV_LOG_FLUSH || asked->offset + asked->length <= world->vvol_size));
    io->used = true;
    io->below = asked;
    io->twin = world->plan.crowded ? twin_begins(&world->twin, world->log, asked) : NULL;
    io->iov = (struct iovec){asked->data, asked->length};
    io->op = (struct nv_op){.kind = kinds[asked->kind], .handle = world->leg_handle, .offset = asked->offset,
                            .length = asked->length, .iov = &io->iov, .iov_count = 1, .done = io_done};
    if (asked->kind == NV_LOG_WRITE && (asked->flags & NV_LOG_FUA))
        io->op.flags = NV_OP_DSYNC;
    submit(world, io);
}
