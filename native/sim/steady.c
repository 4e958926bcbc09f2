/*
 * nvsim_steady: a fixed number of requests through the real session, volume and file backend on the simulated port, with
 * no fault, no chance in what is asked, and batches in lockstep. It is for callgrind: io_uring and valgrind do not go
 * together, and here the code above the port runs in one thread that never sleeps. What it executes is the same on every
 * run, so its instructions can be counted and held to a limit (perf/callgrind.py, tests/sim/test_steady.py).
 *
 * It does not: check contents (nvsim does), or say anything about the real port and the kernel.
 *
 * `mirror` writes to a volume of two legs, whose regions have their intents set from the first batches on. `resync` is not
 * for counting: a leg of such a volume is lost while nobody asks for anything; then a batch of reads comes and at once the
 * order to copy the leg, with a rate, and a batch more each time the simulated clock moves. It prints what was copied.
 *
 * usage: nvsim_steady read|write|structured|mirror|resync BATCHES
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "nbd/wire.h"
#include "limits.h"
#include "reactor/plane.h"

#define SEED 1u /* gives the socket queues that hold a whole batch; run_batch() says so if it does not */
#define BLOCK 4096u
#define VOLUME_BYTES (4u << 20)
#define META_BYTES (NV_META_BITMAPS + 4u * NV_META_PAGE)
#define READS 32u  /* a batch */
#define WRITES 15u /* fit into one receive chunk */
#define RESYNC_RATE (1u << 20)
#define QUIET_NS 1000000000ull /* so long that nobody can take clients for busy any more */
#define SECOND_LEG 2u

struct world {
    nv_plane *plane;
    int socket;
    bool write, structured, mirror, resync;
    uint32_t batch, volume;
    uint64_t asked;
    uint8_t *requests; /* one batch's bytes */
    size_t requests_bytes;
};

_Noreturn static void fail(const char *what)
{
    fprintf(stderr, "nvsim_steady: %s: %s\n", what, nv_last_error());
    exit(1);
}

static uint32_t open_object(struct world *world, uint64_t size)
{
    const int file = nv_sim_file(sim_disk_create(NULL, size), 1, false);
    uint32_t object;

    /* O_DIRECT: every request takes the port's ordinary way, none is answered by chance at once */
    if (nv_object_open(world->plane, file, NV_OBJECT_DIRECT, 1, size, &object) != 0)
        fail("an object does not open");
    return object;
}

/* Two legs, each an object with its metadata behind the bytes. */
static uint32_t open_mirror(struct world *world)
{
    struct {
        nv_desc_header header;
        nv_desc_leg legs[2];
        nv_desc_mirror mirror;
        nv_desc_meta metas[2];
        nv_desc_run runs[2];
    } record = {
        .header = {.magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .length = sizeof record, .size = VOLUME_BYTES,
                   .epoch = 1, .generation = 1, .map_to = 1, .block_min = 1, .flags = NV_VOLUME_MIRROR, .leg_count = 2},
        .mirror = {.region_shift = 22, .op_deadline_ms = 30000, .hold_deadline_ms = 30000, .intent_idle_ms = 30000,
                   .resync_rate = RESYNC_RATE},
    };
    uint32_t volume;

    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t object = open_object(world, VOLUME_BYTES + META_BYTES);
        record.legs[i] = (nv_desc_leg){.id = i + 1, .state = NV_LEG_IN_SYNC, .run_count = 1};
        record.metas[i] = (nv_desc_meta){.object = object, .offset = VOLUME_BYTES, .bitmap_bytes = 2u * NV_META_PAGE};
        record.runs[i] = (nv_desc_run){.length = VOLUME_BYTES, .object = object, .state = NV_RUN_MAPPED};
    }
    if (nv_volume_open(world->plane, &record, sizeof record, &volume) != 0)
        fail("the mirror does not open");
    return volume;
}

static uint32_t open_volume(struct world *world)
{
    struct {
        nv_desc_header header;
        nv_desc_leg leg;
        nv_desc_run run;
    } record = {
        {.magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .length = sizeof record, .size = VOLUME_BYTES, .map_to = 1,
         .block_min = 1, .leg_count = 1},
        {.id = 1, .state = NV_LEG_IN_SYNC, .run_count = 1},
        {.length = VOLUME_BYTES, .object = open_object(world, VOLUME_BYTES), .state = NV_RUN_MAPPED},
    };
    uint32_t volume;

    if (nv_volume_open(world->plane, &record, sizeof record, &volume) != 0)
        fail("the volume does not open");
    return volume;
}

static void open_world(struct world *world)
{
    const nv_plane_config config = {.reactors = 1, .cpu_first = -1, .pool_bytes = 16u << 20, .connections_max = 4};
    const nv_connection_params params = {.flags = world->structured ? NV_CONN_STRUCTURED : 0,
                                         .tflags = NBD_FLAG_SEND_FLUSH,
                                         .block_min = 1, .payload_max = NV_PAYLOAD_MAX};
    const struct nv_sim_faults none = {0};
    uint32_t connection;

    nv_sim_begin(SEED, &none);
    if (nv_plane_build(&config, false, &world->plane) != 0)
        fail("the plane does not start");
    world->volume = world->mirror ? open_mirror(world) : open_volume(world);
    world->socket = nv_sim_socket();
    if (nv_connection_open(world->plane, world->socket, world->volume, &params, NULL, 0, 1, &connection) != 0)
        fail("the connection does not open");
}

/* Everything that can happen now, happens: all effects, then one turn of the reactor, until neither has anything. */
static size_t settle(struct world *world)
{
    static uint8_t answer[256u << 10];
    size_t received = 0;

    for (bool moved = true; moved;) {
        moved = false;
        while (nv_sim_step())
            moved = true;
        moved |= nv_reactor_turn(nv_plane_reactor(world->plane, 0));
        for (size_t got; (got = nv_sim_client_recv(world->socket, answer, sizeof answer)) > 0; moved = true)
            received += got;
    }
    return received;
}

static void build_batch(struct world *world)
{
    uint8_t *to = world->requests;

    for (uint32_t i = 0; i < world->batch; i++) {
        to = put32(to, NBD_REQUEST_MAGIC);
        to = put16(to, 0);
        to = put16(to, world->write ? NBD_CMD_WRITE : NBD_CMD_READ);
        to = put64(to, i);
        to = put64(to, world->asked++ * 37 % (VOLUME_BYTES / BLOCK) * BLOCK);
        to = put32(to, BLOCK);
        to += world->write ? BLOCK : 0;
    }
    world->requests_bytes = (size_t)(to - world->requests);
}

static void run_batch(struct world *world)
{
    const size_t head = world->structured ? 28u : NBD_SIMPLE_BYTES; /* a chunk header, an offset */

    build_batch(world);
    if (nv_sim_client_send(world->socket, world->requests, world->requests_bytes) != world->requests_bytes)
        fail("the socket does not hold a batch: another SEED is needed");
    if (settle(world) != world->batch * (head + (world->write ? 0 : BLOCK)))
        fail("a batch was not answered in full");
}

static void quiet(struct world *world, uint64_t ns)
{
    const uint64_t until = nv_sim_clock_ns() + ns;

    while (nv_sim_clock_ns() < until && nv_sim_advance())
        settle(world);
}

/* Only the order: what the reactor makes of it comes with the next batch. */
static void order_resync(struct world *world)
{
    settle(world);
    if (nv_leg_fail(world->plane, world->volume, SECOND_LEG, 1) != 0)
        fail("the leg is not given up");
    settle(world);
    if (nv_leg_release(world->plane, world->volume, SECOND_LEG, 2, 2) != 0)
        fail("the leg is not let go");
    quiet(world, QUIET_NS);
    run_batch(world);
    if (nv_leg_resync(world->plane, world->volume, SECOND_LEG, 1, 3, 3) != 0)
        fail("the leg is not copied to");
}

static void run_resync(struct world *world, long batches)
{
    nv_mirror_status status;
    uint64_t began;

    order_resync(world);
    began = nv_sim_clock_ns();
    settle(world);
    for (long i = 0; i < batches && nv_sim_advance(); i++)
        run_batch(world);
    nv_volume_mirror(world->plane, world->volume, &status); /* as it was at the last tick */
    printf("%lu bytes copied in %lu us at %u a second, clients being busy; ", (unsigned long)status.copied_bytes,
           (unsigned long)((nv_sim_clock_ns() - began) / 1000), RESYNC_RATE);
    quiet(world, QUIET_NS);
    nv_volume_mirror(world->plane, world->volume, &status);
    printf("%lu of %u a second later, clients being quiet\n", (unsigned long)status.copied_bytes, VOLUME_BYTES);
}

static void close_world(struct world *world)
{
    nv_sim_client_shut(world->socket);
    settle(world);
    nv_plane_stop(world->plane);
    settle(world);
    if (!nv_reactor_finished(nv_plane_reactor(world->plane, 0)))
        fail("the plane does not stop");
    nv_plane_free(world->plane);
    nv_sim_end();
}

int main(int argc, char **argv)
{
    struct world world = {0};
    const long batches = argc == 3 ? strtol(argv[2], NULL, 10) : 0;

    if (batches < 1 || (strcmp(argv[1], "read") && strcmp(argv[1], "write") && strcmp(argv[1], "structured") &&
                        strcmp(argv[1], "mirror") && strcmp(argv[1], "resync"))) {
        fputs("usage: nvsim_steady read|write|structured|mirror|resync BATCHES\n", stderr);
        return 2;
    }
    world.resync = strcmp(argv[1], "resync") == 0;
    world.mirror = world.resync || strcmp(argv[1], "mirror") == 0;
    world.write = (world.mirror && !world.resync) || strcmp(argv[1], "write") == 0;
    world.structured = strcmp(argv[1], "structured") == 0;
    world.batch = world.write ? WRITES : READS;
    world.requests = calloc(world.batch, NBD_REQUEST_BYTES + BLOCK);
    if (!world.requests)
        fail("no memory");
    open_world(&world);
    if (world.resync)
        run_resync(&world, batches);
    for (long i = 0; i < batches && !world.resync; i++)
        run_batch(&world);
    close_world(&world);
    free(world.requests);
    if (!world.resync)
        printf("%lu requests\n", (unsigned long)batches * world.batch);
    return 0;
}
