/*
 * nvsim_steady: a fixed number of requests through the real session, volume and file backend on the simulated port, with
 * no fault, no chance in what is asked, and batches in lockstep. It is for callgrind: io_uring and valgrind do not go
 * together, and here the code above the port runs in one thread that never sleeps. What it executes is the same on every
 * run, so its instructions can be counted and held to a limit (perf/callgrind.py, tests/sim/test_steady.py). Some batches go
 * first that warm it up; those after them are what count_batches() runs, and what a tool is to count.
 *
 * It does not: check contents (nvsim does), or say anything about the real port and the kernel.
 *
 * `mirror` writes to a volume of two legs, whose regions have their intents set from the first batches on. `resync` is not
 * for counting: a leg of such a volume is lost while nobody asks for anything; then a batch of reads comes and at once the
 * order to copy the leg, with a rate, and a batch more each time the simulated clock moves. It prints what was copied.
 *
 * `region`, `runs` and `uneven` read a file in random order, as one run, as a million of one block each, and as a million
 * of 1 to 63 blocks, neighbours in the volume being strangers in the file.
 *
 * `absent`, `held` and `kept` write to a volume with a cache: blocks that it does not hold, that it holds and forgets, that
 * it holds and keeps. `scan` reads 256 KiB a request in sequence, `scan-cached` the same past a cache that is full.
 *
 * usage: nvsim_steady LOAD BATCHES
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
#define LONG (256u << 10)
#define VOLUME_BYTES (4u << 20)
#define META_BYTES (NV_META_BITMAPS + 4u * NV_META_PAGE)
#define READS 32u  /* a batch */
#define WRITES 15u /* fit into one receive chunk */
#define LONGS 8u
#define SCANNED_BYTES (64u << 20) /* more than is asked for: nothing is read twice */
#define CACHE_BYTES (8u << 20)    /* all of a volume but a scanned one, which has filled it when counting begins */
#define AHEAD (512u << 10)        /* a profile's default */
#define RESYNC_RATE (1u << 20)
#define QUIET_NS 1000000000ull /* so long that nobody can take clients for busy any more */
#define SECOND_LEG 2u
#define WARM_UP 5 /* batches that are not for counting */
#define RUNS 1000000u
#define RUN_STRIDE 380017u /* has no divisor in common with RUNS: i * RUN_STRIDE % RUNS is each place once */
#define RUN_BLOCKS_MAX 63u
#define MAP_FILE ((uint64_t)RUNS * BLOCK)

struct load {
    const char *name;
    bool write, structured, mirror, resync, random_order;
    bool scan;                     /* long reads in sequence */
    bool held;                     /* all of the volume is read before */
    uint32_t cache_mode;
    uint32_t runs, run_blocks_max; /* of the map; one run is the whole volume */
    uint64_t file_bytes;
};

static const struct load LOADS[] = {
    {.name = "read", .runs = 1, .file_bytes = VOLUME_BYTES},
    {.name = "write", .runs = 1, .file_bytes = VOLUME_BYTES, .write = true},
    {.name = "structured", .runs = 1, .file_bytes = VOLUME_BYTES, .structured = true},
    {.name = "absent", .runs = 1, .file_bytes = VOLUME_BYTES, .write = true, .cache_mode = NV_CACHE_MODE_READ},
    {.name = "held", .runs = 1, .file_bytes = VOLUME_BYTES, .write = true, .held = true, .cache_mode = NV_CACHE_MODE_READ},
    {.name = "kept", .runs = 1, .file_bytes = VOLUME_BYTES, .write = true, .held = true,
     .cache_mode = NV_CACHE_MODE_WRITETHROUGH},
    {.name = "scan", .runs = 1, .file_bytes = SCANNED_BYTES, .scan = true},
    {.name = "scan-cached", .runs = 1, .file_bytes = SCANNED_BYTES, .scan = true, .cache_mode = NV_CACHE_MODE_READ},
    {.name = "mirror", .write = true, .mirror = true},
    {.name = "resync", .mirror = true, .resync = true},
    {.name = "region", .runs = 1, .file_bytes = MAP_FILE, .random_order = true},
    {.name = "runs", .runs = RUNS, .run_blocks_max = 1, .file_bytes = MAP_FILE, .random_order = true},
    {.name = "uneven", .runs = RUNS, .run_blocks_max = RUN_BLOCKS_MAX, .file_bytes = MAP_FILE, .random_order = true},
};

struct world {
    const struct load *load;
    nv_plane *plane;
    int socket;
    uint32_t batch, block, volume;
    uint64_t volume_bytes, asked;
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
    world->volume_bytes = VOLUME_BYTES;
    return volume;
}

/* A number that looks like chance and is the same each time (the finisher of splitmix64). */
static uint64_t scatter(uint64_t number)
{
    number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9ull;
    number = (number ^ number >> 27) * 0x94d049bb133111ebull;
    return number ^ number >> 31;
}

/* Run `index`, its place in the file: of equal runs each has its own, of others some share blocks. */
static nv_desc_run one_run(const struct load *load, uint64_t index, uint64_t offset, uint32_t object)
{
    nv_desc_run run = {.offset = offset, .length = BLOCK, .object = object, .state = NV_RUN_MAPPED};

    if (load->runs == 1)
        run.length = load->file_bytes;
    else if (load->run_blocks_max == 1)
        run.object_offset = index * RUN_STRIDE % RUNS * BLOCK;
    else {
        run.length = (1 + scatter(index) % load->run_blocks_max) * BLOCK;
        run.object_offset = scatter(~index) % (RUNS - load->run_blocks_max) * BLOCK;
    }
    return run;
}

static uint32_t open_volume(struct world *world)
{
    const size_t length = sizeof(nv_desc_header) + sizeof(nv_desc_leg) + world->load->runs * sizeof(nv_desc_run);
    const uint32_t object = open_object(world, world->load->file_bytes);
    const nv_desc_leg leg = {.id = 1, .state = NV_LEG_IN_SYNC, .run_count = world->load->runs};
    uint8_t *record = malloc(length), *to = record + sizeof(nv_desc_header);
    uint64_t size = 0;
    uint32_t volume;

    if (!record)
        fail("no memory");
    to = (uint8_t *)memcpy(to, &leg, sizeof leg) + sizeof leg;
    for (uint64_t i = 0; i < world->load->runs; i++) {
        const nv_desc_run run = one_run(world->load, i, size, object);
        to = (uint8_t *)memcpy(to, &run, sizeof run) + sizeof run;
        size += run.length;
    }
    memcpy(record, &(nv_desc_header){.magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .length = length, .size = size,
                                     .map_to = 1, .block_min = 1, .leg_count = 1}, sizeof(nv_desc_header));
    if (nv_volume_open(world->plane, record, length, &volume) != 0)
        fail("the volume does not open");
    free(record);
    world->volume_bytes = size;
    return volume;
}

static void open_world(struct world *world)
{
    const nv_plane_config config = {.reactors = 1, .cpu_first = -1, .pool_bytes = 16u << 20, .connections_max = 4,
                                    .cache_bytes = world->load->cache_mode != NV_CACHE_MODE_NONE ? CACHE_BYTES : 0};
    const nv_connection_params params = {.flags = world->load->structured ? NV_CONN_STRUCTURED : 0,
                                         .tflags = NBD_FLAG_SEND_FLUSH,
                                         .block_min = 1, .payload_max = NV_PAYLOAD_MAX};
    const struct nv_sim_faults none = {0};
    uint32_t connection;

    nv_sim_begin(SEED, &none);
    if (nv_plane_build(&config, false, &world->plane) != 0)
        fail("the plane does not start");
    world->volume = world->load->mirror ? open_mirror(world) : open_volume(world);
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

static uint64_t next_block(struct world *world)
{
    const uint64_t asked = world->asked++, blocks = world->volume_bytes / world->block;

    if (world->load->scan)
        return asked % blocks;
    return (world->load->random_order ? scatter(asked) : asked * 37) % blocks;
}

static void build_batch(struct world *world, bool write)
{
    uint8_t *to = world->requests;

    for (uint32_t i = 0; i < world->batch; i++) {
        to = put32(to, NBD_REQUEST_MAGIC);
        to = put16(to, 0);
        to = put16(to, write ? NBD_CMD_WRITE : NBD_CMD_READ);
        to = put64(to, i);
        to = put64(to, next_block(world) * world->block);
        to = put32(to, world->block);
        to += write ? world->block : 0;
    }
    world->requests_bytes = (size_t)(to - world->requests);
}

static void run_batch(struct world *world, bool write)
{
    const size_t head = world->load->structured ? 28u : NBD_SIMPLE_BYTES; /* a chunk header, an offset */

    build_batch(world, write);
    if (nv_sim_client_send(world->socket, world->requests, world->requests_bytes) != world->requests_bytes)
        fail("the socket does not hold a batch: another SEED is needed");
    if (settle(world) != world->batch * (head + (write ? 0 : world->block)))
        fail("a batch was not answered in full");
}

/* A function of its own, whose name a tool is told: what it calls is counted (--toggle-collect), and nothing else. */
__attribute__((noinline)) static void count_batches(struct world *world, long batches)
{
    for (long i = 0; i < batches; i++)
        run_batch(world, world->load->write);
}

/* As the load says; what it says is held is read. */
static void set_cache(struct world *world)
{
    const nv_cache_policy policy = {.mode = world->load->cache_mode, .ahead_bytes = AHEAD};
    const uint64_t blocks = world->load->held ? world->volume_bytes / BLOCK : 0;
    nv_event event;

    if (nv_volume_set_cache(world->plane, world->volume, &policy, 1) != 0)
        fail("the cache is refused");
    settle(world);
    if (nv_plane_events(world->plane, &event, 1) != 1 || event.kind != NV_EVENT_VOLUME_CACHE)
        fail("the cache does not begin");
    while (world->asked < blocks)
        run_batch(world, false);
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
    run_batch(world, false);
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
        run_batch(world, false);
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

static const struct load *load_named(const char *name)
{
    for (size_t i = 0; i < sizeof LOADS / sizeof *LOADS; i++)
        if (strcmp(LOADS[i].name, name) == 0)
            return &LOADS[i];
    return NULL;
}

int main(int argc, char **argv)
{
    const long batches = argc == 3 ? strtol(argv[2], NULL, 10) : 0;
    struct world world = {.load = batches > 0 ? load_named(argv[1]) : NULL};

    if (!world.load) {
        fputs("usage: nvsim_steady LOAD BATCHES\n", stderr);
        return 2;
    }
    world.batch = world.load->scan ? LONGS : world.load->write ? WRITES : READS;
    world.block = world.load->scan ? LONG : BLOCK;
    world.requests = calloc(world.batch, NBD_REQUEST_BYTES + world.block);
    if (!world.requests)
        fail("no memory");
    open_world(&world);
    if (world.load->cache_mode != NV_CACHE_MODE_NONE)
        set_cache(&world);
    if (world.load->resync)
        run_resync(&world, batches);
    else {
        for (int i = 0; i < WARM_UP; i++)
            run_batch(&world, world.load->write);
        count_batches(&world, batches);
        printf("%lu requests\n", (unsigned long)batches * world.batch);
    }
    close_world(&world);
    free(world.requests);
    return 0;
}
