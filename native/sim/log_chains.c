/*
 * Chains of events in nvlog's world (log_world.h) that hardly ever come by chance, each of them a life by itself, and a judged end.
 */
#include <string.h>

#include "io/io_sim.h"
#include "log/state.h"
#include "sim/log_world.h"

#define CARRIED_FIRST 0u            /* two blocks of one batch, in two runs */
#define CARRIED_LAST 10u

static uint8_t passed[MODEL_BLOCK]; /* what went past the log */

static void read_below(const struct world *world, uint64_t block, uint8_t *bytes)
{
    sim_disk_read(nv_sim_disk(world->leg_file), block * MODEL_BLOCK, bytes, MODEL_BLOCK);
}

static bool has_carried(const struct world *world)
{
    uint8_t bytes[MODEL_BLOCK];

    read_below(world, CARRIED_LAST, bytes);
    return memcmp(bytes, passed, sizeof bytes) != 0;
}

static bool has_failed(const struct world *world)
{
    return nv_log_state(world->log) == NV_LOG_FAILED;
}

/* The first of the batch is on its way below; behind it the other one waits. */
static bool has_begun(const struct world *world)
{
    bool begun = false;

    for (uint32_t i = 0; i < WORLD_IOS; i++)
        begun |= world->ios[i].used && world->ios[i].below->ours && world->ios[i].below->kind == NV_LOG_WRITE;
    return begun;
}

/*
 * A batch is under way, and what is below is slow with its first block. Its last one is logged once more, and then written
 * past the log, whose device hangs: the log fails while the tombstone is on its way. That reaches the device, and when
 * something has been carried over what went past, it is over.
 */
void world_overtaken(struct world *world, uint64_t seed)
{
    const struct world_plan plan = {.seed = seed, .blocks = 16, .ring = NV_LOG_RING_MIN, .depth = 4, .lives = 1,
                                    .bypass = NV_LOG_BYPASS_MAX, .age_ms = 1, .deadline_ms = 2000, .crash_at = -1};

    world_begin(world, &plan);
    world_write(world, CARRIED_FIRST);
    world_write(world, CARRIED_LAST);
    world_settle(world, has_begun, "nothing is carried");
    nv_sim_trouble(world->leg_file)->stuck_before = nv_sim_time() + 1;
    world_write(world, CARRIED_LAST);
    world_settle(world, world_has_answered, "a write is never answered");
    nv_log_limit(world->log, &(struct nv_log_limits){.bypass_bytes = MODEL_BLOCK, .age_ms = 1, .deadline_ms = 2000});
    nv_sim_trouble(world->log_file)->hung = true;
    world_write(world, CARRIED_LAST);
    world_settle(world, has_failed, "a log whose device hangs does not fail");
    read_below(world, CARRIED_LAST, passed);
    nv_sim_trouble(world->log_file)->hung = false;
    while (nv_sim_step()) {
    }
    nv_sim_trouble(world->leg_file)->stuck_before = 0;
    world_settle(world, has_carried, "nothing is carried by a log that has failed");
    world_end(world);
}

static bool has_lost(const struct world *world)
{
    return world->model.block[0].lost;
}

/* A block that cannot be read holds the tail, and nobody overwrites it: whoever writes is answered all the same. */
void world_lost_tail(struct world *world, uint64_t seed)
{
    const struct world_plan plan = {.seed = seed, .blocks = MODEL_BLOCKS, .ring = NV_LOG_RING_MIN, .depth = 1, .lives = 1,
                                    .bypass = NV_LOG_BYPASS_MAX, .age_ms = 1, .crash_at = -1};

    world_begin(world, &plan);
    world->troubled = true;
    nv_sim_trouble(world->log_file)->read_error = 1024;
    world_write(world, 0);
    world_settle(world, has_lost, "what cannot be read is not lost");
    nv_sim_trouble(world->log_file)->read_error = 0;
    for (uint64_t i = 0; i < 4u * NV_LOG_RING_MIN / MODEL_BLOCK; i++) {
        world_write(world, 1 + i % (MODEL_BLOCKS - 1));
        world_settle(world, world_has_answered, "a write waits for room behind what is lost");
    }
    world_end(world);
}

static bool has_record_out(const struct world *world)
{
    return world->log->in_flight > 0;
}

static bool has_sync_out(const struct world *world)
{
    return world->log->syncing;
}

/*
 * A read passes the deadline while the record of a write with FUA is on its way, which still counts. It is synced, and that
 * hangs: the log has failed already, and who waits for the sync hears of it all the same.
 */
void world_late_sync(struct world *world, uint64_t seed)
{
    const struct world_plan plan = {.seed = seed, .blocks = 16, .ring = NV_LOG_RING_MIN, .depth = 4, .lives = 1,
                                    .bypass = NV_LOG_BYPASS_MAX, .age_ms = 3600000, .deadline_ms = 2000, .crash_at = -1};
    struct nv_sim_trouble *trouble;

    world_begin(world, &plan);
    trouble = nv_sim_trouble(world->log_file);
    world_write(world, 0);
    world_settle(world, world_has_answered, "a write is never answered");
    trouble->stuck_reads = true;
    world_ask(world, NV_LOG_READ, 0, 0);
    nv_sim_jump(1500000000ull);
    trouble->stuck_writes = true;
    world_ask(world, NV_LOG_WRITE, NV_LOG_FUA, 1);
    world_settle(world, has_record_out, "a record is not written");
    world_settle(world, has_failed, "a log whose reads hang does not fail");
    trouble->stuck_writes = false;
    world_settle(world, has_sync_out, "a record that still counts is not synced");
    trouble->stuck_writes = true;
    world_settle(world, world_has_answered, "a write waits for a sync that hangs");
    world_end(world);
}
