/*
 * libFuzzer: arbitrary bytes as a client's transmission phase, into the real session, volume and file backend on the
 * simulated port. The first bytes choose what was negotiated and how the stream is cut; the rest is the stream.
 *
 * It holds the server to: no sanitizer report, no failed assertion, every connection ends after the client has gone,
 * nothing is left behind, framing of answers stays intact where replies carry their length, and bytes of the disk that
 * belong to no run are never written.
 *
 * A plane serves WORLD_INPUTS inputs before it is stopped and everything is checked for leftovers: what a connection
 * does must not depend on those before it (contents of the disk aside, which nothing here decides by).
 *
 * With NV_FUZZ_CANARY a bug is planted (a WRITE_ZEROES that is carried out ends the process): it must be found.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "nbd/wire.h"
#include "reactor/plane.h"

#define VOLUME_BYTES (256u << 10)
#define GUARD_BYTES 4096u /* before and behind the volume's run */
#define DISK_BYTES (VOLUME_BYTES + 2 * GUARD_BYTES)
#define GUARD 0xa5
#define SETTINGS_BYTES 4u
#define WORLD_INPUTS 100u
#define PATIENCE 100000u
#define ANSWER_BYTES (64u << 10)

struct settings {
    nv_connection_params params;
    uint32_t block_min;
    uint32_t piece;     /* bytes sent at a time */
    uint32_t early;
    bool reset;         /* instead of a half-close */
    bool deaf;          /* reads no answers until everything is sent */
};

static struct {
    nv_plane *plane;
    uint32_t volumes[2];    /* of block size 1 and 512, on the same bytes */
    int file;
    unsigned inputs;
} world;

struct run {
    int socket;
    bool ended;
    bool framed;            /* every answer carries its length */
    uint8_t header[NBD_EXTENDED_BYTES];
    size_t have;            /* of the header */
    uint64_t skip;          /* of the body */
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct settings read_settings(const uint8_t *data)
{
    const uint8_t bits = data[0], more = data[1];
    struct settings settings = {
        .block_min = more & 1 ? 512 : 1,
        .piece = 1u + data[2] * 16u,
        .early = data[3],
        .reset = more & 2,
        .deaf = more & 4,
    };

    settings.params = (nv_connection_params){
        .flags = (bits & 3 ? NV_CONN_STRUCTURED : 0) | (bits & 2 ? NV_CONN_EXTENDED : 0) |
                 (bits & 4 ? NV_CONN_READ_ONLY : 0),
        .tflags = 1u | 4u | (bits & 8 ? 8u : 0u) | 32u | 64u | (bits & 3 ? 128u : 0u) | 1024u | 2048u |
                  (bits & 2 ? 4096u : 0u) | (bits & 4 ? 2u : 0u),
        .block_min = settings.block_min,
        .payload_max = bits & 16 ? 65536u : NV_PAYLOAD_MAX,
        .context_count = bits & 3 && bits & 32 ? 1 + (bits >> 6) : 0,
    };
    for (uint32_t i = 0; i < settings.params.context_count; i++)
        settings.params.contexts[i] = (nv_context){1 + i, NV_CONTEXT_BASE_ALLOCATION};
    return settings;
}

static uint32_t open_volume(uint32_t object, uint32_t block_min)
{
    struct {
        nv_desc_header header;
        nv_desc_leg leg;
        nv_desc_run run;
    } record = {
        {.magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .length = sizeof record, .size = VOLUME_BYTES, .map_to = 1,
         .block_min = block_min, .leg_count = 1},
        {.id = 1, .state = NV_LEG_IN_SYNC, .run_count = 1},
        {.length = VOLUME_BYTES, .object_offset = GUARD_BYTES, .object = object, .state = NV_RUN_MAPPED},
    };
    uint32_t volume;

    if (nv_volume_open(world.plane, &record, sizeof record, &volume) != 0)
        nv_sim_violation("the volume does not open: %s", nv_last_error());
    return volume;
}

static void begin_world(void)
{
    const struct nv_sim_faults faults = {.short_transfer = 100, .delay = 100};
    const nv_plane_config config = {.reactors = 1, .cpu_first = -1, .pool_bytes = NV_POOL_MIN, .connections_max = 4};
    static uint8_t image[DISK_BYTES];
    uint32_t object;

    nv_sim_begin(1, &faults);
    memset(image, GUARD, sizeof image);
    world.file = nv_sim_file(sim_disk_create(image, sizeof image), 1);
    if (nv_plane_build(&config, false, &world.plane) != 0 ||
        nv_object_open(world.plane, world.file, 0, 1, sizeof image, &object) != 0)
        nv_sim_violation("the plane does not start: %s", nv_last_error());
    world.volumes[0] = open_volume(object, 1);
    world.volumes[1] = open_volume(object, 512);
}

static void start(struct run *run, const struct settings *settings, const uint8_t *early, size_t early_size)
{
    uint32_t connection;

    run->socket = nv_sim_socket();
    run->framed = settings->params.flags & NV_CONN_EXTENDED;
    if (nv_connection_open(world.plane, run->socket, world.volumes[settings->block_min > 1], &settings->params, early,
                           early_size, 1, &connection) != 0)
        nv_sim_violation("the connection does not open: %s", nv_last_error());
}

/* Follow the frames of extended replies: the magic must stand wherever a reply starts. */
static void follow(struct run *run, const uint8_t *bytes, size_t size)
{
    while (run->framed && size > 0) {
        size_t part = run->skip < size ? (size_t)run->skip : size;
        run->skip -= part;
        bytes += part;
        size -= part;
        part = sizeof run->header - run->have < size ? sizeof run->header - run->have : size;
        memcpy(run->header + run->have, bytes, part);
        run->have += part;
        bytes += part;
        size -= part;
        if (run->have < sizeof run->header)
            continue;
        run->have = 0;
        run->skip = get64(run->header + 24);
        if (get32(run->header) != NBD_EXTENDED_REPLY_MAGIC || run->skip > NV_PAYLOAD_MAX + 8u)
            nv_sim_violation("an answer starts with %#x and has %llu bytes", get32(run->header),
                             (unsigned long long)run->skip);
    }
}

static bool step(struct run *run, bool listen)
{
    static uint8_t answer[ANSWER_BYTES];
    nv_event events[8];
    bool moved = nv_sim_step();

    moved |= nv_reactor_turn(nv_plane_reactor(world.plane, 0));
    for (int i = 0, count = nv_plane_events(world.plane, events, 8); i < count; i++)
        run->ended |= events[i].kind == NV_EVENT_CONNECTION_CLOSED;
    for (size_t got = 1; listen && got > 0;) {
        got = nv_sim_client_recv(run->socket, answer, sizeof answer);
        follow(run, answer, got);
        moved |= got > 0;
    }
    return moved || nv_sim_advance();
}

static void send_all(struct run *run, const struct settings *settings, const uint8_t *bytes, size_t size)
{
    for (unsigned stuck = 0; size > 0 && !run->ended && stuck < 1000;) {
        size_t sent = nv_sim_client_send(run->socket, bytes, size < settings->piece ? size : settings->piece);
        bytes += sent;
        size -= sent;
        step(run, !settings->deaf || stuck > 100);
        stuck = sent ? 0 : stuck + 1;
    }
}

static void check_guards(void)
{
    static uint8_t image[DISK_BYTES];
    struct sim_random random = {1};

    nv_sim_crash(world.file, true, &random, image);
    for (uint32_t i = 0; i < GUARD_BYTES; i++)
        if (image[i] != GUARD || image[GUARD_BYTES + VOLUME_BYTES + i] != GUARD)
            nv_sim_violation("a byte outside the volume's run was written");
}

static void finish(struct run *run, bool reset)
{
    for (unsigned i = 0; i < 50 && !run->ended; i++)
        step(run, true);
    if (reset)
        nv_sim_client_close(run->socket, true);
    else
        nv_sim_client_shut(run->socket);
    for (unsigned i = 0; !run->ended; i++)
        if (!step(run, true) || i > PATIENCE)
            nv_sim_violation("the connection does not end");
#ifdef NV_FUZZ_CANARY
    for (unsigned i = 0; i < 2; i++) {
        nv_volume_stats_t stats;
        if (nv_volume_stats(world.plane, world.volumes[i], &stats) == 0 && stats.zeroes > 0)
            nv_sim_violation("the planted bug");
    }
#endif
}

static void end_world(struct run *run)
{
    bool finished = false;

    check_guards();
    nv_plane_stop(world.plane);
    for (unsigned i = 0; !finished; i++) {
        step(run, true);
        finished = nv_reactor_finished(nv_plane_reactor(world.plane, 0));
        if (i > PATIENCE)
            nv_sim_violation("the plane does not stop");
    }
    nv_plane_free(world.plane);
    nv_sim_end();
    world.inputs = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct run run = {0};
    struct settings settings;
    size_t early;

    if (size < SETTINGS_BYTES)
        return -1;
    settings = read_settings(data);
    data += SETTINGS_BYTES;
    size -= SETTINGS_BYTES;
    early = size < settings.early ? size : settings.early;
    if (world.inputs++ == 0)
        begin_world();
    start(&run, &settings, data, early);
    send_all(&run, &settings, data + early, size - early);
    finish(&run, settings.reset);
    if (world.inputs == WORLD_INPUTS)
        end_world(&run);
    return 0;
}
