/*
 * See rig.h.
 */
#include "fuzz/rig.h"

#include <string.h>

#include "io/io_sim.h"
#include "reactor/plane.h"

#define GUARD_BYTES 4096u
#define DISK_BYTES (RIG_VOLUME_BYTES + 2 * GUARD_BYTES)
#define GUARD 0xa5

struct rig rig;

static uint32_t open_volume(uint32_t object, uint32_t block_min)
{
    struct {
        nv_desc_header header;
        nv_desc_leg leg;
        nv_desc_run run;
    } record = {
        {.magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .length = sizeof record, .size = RIG_VOLUME_BYTES,
         .map_to = 1, .block_min = block_min, .leg_count = 1},
        {.id = 1, .state = NV_LEG_IN_SYNC, .run_count = 1},
        {.length = RIG_VOLUME_BYTES, .object_offset = GUARD_BYTES, .object = object, .state = NV_RUN_MAPPED},
    };
    uint32_t volume;

    if (nv_volume_open(rig.plane, &record, sizeof record, &volume) != 0)
        nv_sim_violation("the volume does not open: %s", nv_last_error());
    return volume;
}

void rig_begin(void)
{
    const struct nv_sim_faults faults = {.short_transfer = 100, .delay = 100};
    const nv_plane_config config = {.reactors = 1, .cpu_first = -1, .pool_bytes = NV_POOL_MIN, .connections_max = 4};
    static uint8_t image[DISK_BYTES];
    uint32_t object;

    if (rig.inputs++ > 0)
        return;
    nv_sim_begin(1, &faults);
    memset(image, GUARD, sizeof image);
    rig.file = nv_sim_file(sim_disk_create(image, sizeof image), 1, true);
    if (nv_plane_build(&config, false, &rig.plane) != 0 ||
        nv_object_open(rig.plane, rig.file, 0, 1, sizeof image, &object) != 0)
        nv_sim_violation("the plane does not start: %s", nv_last_error());
    rig.volumes[0] = open_volume(object, 1);
    rig.volumes[1] = open_volume(object, 512);
}

bool rig_step(int socket)
{
    static uint8_t answer[64u << 10];
    nv_event events[8];
    bool moved = nv_sim_step();

    moved |= nv_reactor_turn(nv_plane_reactor(rig.plane, 0));
    for (int i = 0, count = nv_plane_events(rig.plane, events, 8); i < count; i++)
        if (rig.heard)
            rig.heard(&events[i]);
    for (size_t got = 1; socket >= 0 && got > 0;) {
        got = nv_sim_client_recv(socket, answer, sizeof answer);
        if (got > 0 && rig.answered)
            rig.answered(answer, got);
        moved |= got > 0;
    }
    return moved || nv_sim_advance();
}

void rig_send(int socket, const uint8_t *bytes, size_t size, uint32_t piece, bool listen)
{
    for (unsigned stuck = 0; size > 0 && stuck < 1000 && !nv_sim_client_ended(socket);) {
        size_t sent = nv_sim_client_send(socket, bytes, size < piece ? size : piece);
        bytes += sent;
        size -= sent;
        rig_step(listen || stuck > 100 ? socket : -1);
        stuck = sent ? 0 : stuck + 1;
    }
}

void rig_leave(int socket, bool reset, const bool *ended)
{
    for (unsigned i = 0; i < 50 && !*ended; i++)
        rig_step(socket);
    if (reset)
        nv_sim_client_close(socket, true);
    else
        nv_sim_client_shut(socket);
    for (unsigned i = 0; !*ended; i++)
        if (!rig_step(socket) || i > RIG_PATIENCE)
            nv_sim_violation("the connection does not end");
    rig_step(-1); /* the reactor frees it: its mapping would hide from the leak check what it points to */
}

static void check_guards(void)
{
    static uint8_t image[DISK_BYTES];
    struct sim_random random = {1};

    nv_sim_crash(rig.file, true, &random, image);
    for (uint32_t i = 0; i < GUARD_BYTES; i++)
        if (image[i] != GUARD || image[GUARD_BYTES + RIG_VOLUME_BYTES + i] != GUARD)
            nv_sim_violation("a byte outside the volume's run was written");
}

void rig_end(void)
{
    bool finished = false;

    if (rig.inputs < RIG_INPUTS)
        return;
    check_guards();
    nv_plane_stop(rig.plane);
    for (unsigned i = 0; !finished; i++) {
        rig_step(-1);
        finished = nv_reactor_finished(nv_plane_reactor(rig.plane, 0));
        if (i > RIG_PATIENCE)
            nv_sim_violation("the plane does not stop");
    }
    nv_plane_free(rig.plane);
    nv_sim_end();
    rig.inputs = 0;
}

nv_connection_params rig_params(uint8_t bits, uint32_t block_min)
{
    nv_connection_params params = {
        .flags = (bits & 3 ? NV_CONN_STRUCTURED : 0) | (bits & 2 ? NV_CONN_EXTENDED : 0) |
                 (bits & 4 ? NV_CONN_READ_ONLY : 0),
        .tflags = 1u | 4u | (bits & 8 ? 8u : 0u) | 32u | 64u | (bits & 3 ? 128u : 0u) | 1024u | 2048u |
                  (bits & 2 ? 4096u : 0u) | (bits & 4 ? 2u : 0u),
        .block_min = block_min,
        .payload_max = bits & 16 ? 65536u : NV_PAYLOAD_MAX,
        .context_count = bits & 3 && bits & 32 ? 1 + (bits >> 6) : 0,
    };

    for (uint32_t i = 0; i < params.context_count; i++)
        params.contexts[i] = (nv_context){1 + i, NV_CONTEXT_BASE_ALLOCATION};
    return params;
}
