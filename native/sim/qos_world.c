/*
 * See qos_world.h. The judge hears of every start through nv_volume_enter(), which is replaced at link time (--wrap): the
 * data plane's own code has no hooks.
 */
#include "sim/qos_world.h"

#include <assert.h>
#include <string.h>

#include "io/io_sim.h"
#include "limits.h"

#define DISK_BYTES (WORLD_VOLUMES * WORLD_VOLUME_BYTES)
#define POOL_BYTES (64u << 20)  /* nobody waits for memory: that would be another reason */
#define STOP_LIMIT_NS ((NV_FORCE_CLOSE_MS + NV_QOS_TIMER_MAX_MS + 2 * NV_TICK_MS) * 1000000ull)

struct world world;

void __real_nv_volume_enter(struct nv_vreq *request);
void __wrap_nv_volume_enter(struct nv_vreq *request);

void __wrap_nv_volume_enter(struct nv_vreq *request)
{
    for (uint32_t i = 0; i < world.volume_count; i++)
        if (world.volumes[i].plane_volume == request->volume) {
            world.volumes[i].served++;
            judge_start(&world.volumes[i].judge, request->kind, request->length, nv_sim_clock_ns());
        }
    __real_nv_volume_enter(request);
}

static uint32_t object;

void world_begin(uint64_t seed, uint32_t reactors)
{
    const struct nv_sim_faults none = {.atom = 0};
    const nv_plane_config config = {.reactors = reactors, .cpu_first = -1, .pool_bytes = POOL_BYTES,
                                    .connections_max = 64};
    int file;

    world = (struct world){.random = {seed * 0x9e3779b97f4a7c15ull + 7}, .reactors = reactors};
    nv_sim_begin(sim_random_next(&world.random), &none);
    file = nv_sim_file(sim_disk_create(NULL, DISK_BYTES), 1, seed & 1);
    if (nv_plane_build(&config, false, &world.plane) != 0 ||
        nv_object_open(world.plane, file, 0, 1, DISK_BYTES, &object) != 0)
        nv_sim_violation("the plane does not start: %s", nv_last_error());
}

uint32_t world_add_volume(const nv_qos_limits *limits, uint32_t bytes_max)
{
    const uint32_t index = world.volume_count++;
    struct world_volume *volume = &world.volumes[index];
    struct {
        nv_desc_header header;
        nv_desc_leg leg;
        nv_desc_run run;
    } record = {
        {.magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .length = sizeof record, .size = WORLD_VOLUME_BYTES,
         .map_to = 1, .block_min = 1, .leg_count = 1},
        {.id = 1, .state = NV_LEG_IN_SYNC, .run_count = 1},
        {.length = WORLD_VOLUME_BYTES, .object_offset = (uint64_t)index * WORLD_VOLUME_BYTES, .object = object,
         .state = NV_RUN_MAPPED},
    };

    assert(index < WORLD_VOLUMES);
    if (nv_volume_open(world.plane, &record, sizeof record, &volume->number) != 0)
        nv_sim_violation("the volume does not open: %s", nv_last_error());
    volume->plane_volume = nv_table_get(&world.plane->volumes, volume->number);
    volume->bytes_max = bytes_max;
    judge_begin(&volume->judge, bytes_max);
    world_set_qos(index, limits);
    return index;
}

void world_set_qos(uint32_t index, const nv_qos_limits *limits)
{
    struct world_volume *volume = &world.volumes[index];

    assert(!volume->changing);
    volume->changing = true;
    volume->wanted = *limits;
    judge_changes(&volume->judge);
    if (nv_volume_set_qos(world.plane, volume->number, limits, index) != 0)
        nv_sim_violation("the limits are refused: %s", nv_last_error());
}

struct qos_client *world_add_client(uint32_t index, uint32_t depth, enum qos_mix mix)
{
    struct world_volume *volume = &world.volumes[index];
    const nv_connection_params params = qos_client_params();
    struct qos_client *client;
    uint32_t slot = 0;

    while (slot < WORLD_CLIENTS && world.clients[slot])
        slot++;
    if (slot == WORLD_CLIENTS)
        return NULL;
    client = world.clients[slot] = qos_client_create(nv_sim_socket(), index, depth, volume->bytes_max);
    if (world.room)
        nv_sim_socket_room(client->socket, world.room);
    client->mix = mix;
    client->volume_bytes = WORLD_VOLUME_BYTES;
    if (nv_connection_open(world.plane, client->socket, volume->number, &params, NULL, 0, slot, &client->number) != 0)
        nv_sim_violation("a connection does not open: %s", nv_last_error());
    volume->connections++;
    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i] && world.clients[i]->volume == index)
            qos_client_crowded(world.clients[i], volume->connections);
    return client;
}

void world_end_client(struct qos_client *client, unsigned how)
{
    judge_leaves(&world.volumes[client->volume].judge);
    client->open = false;
    client->leaving = client->dismissed = true;
    if (how == 2)
        (void)nv_connection_close(world.plane, client->number);
    else
        nv_sim_client_close(client->socket, how == 1);
}

static void answered(void *context, struct qos_client *client, const struct qos_request *request, int error)
{
    const struct world_volume *volume = &world.volumes[client->volume];
    const uint64_t took_ns = nv_sim_clock_ns() - request->sent_ns - (world.busy_ns - request->sent_busy_ns);
    uint64_t patience_ns;

    (void)context;
    world.answers++;
    if (error && !client->dismissed)
        nv_sim_violation("a request failed: error %d", error);
    if (!world.strict || client->dismissed || request->regime != volume->judge.regime || volume->changing)
        return;
    patience_ns = judge_patience_ns(&volume->judge, client->depth, request->connections);
    if (took_ns > patience_ns)
        nv_sim_violation("a request took %llu us, above the %llu us of its limits: depth %u, %u connections",
                         (unsigned long long)took_ns / 1000, (unsigned long long)patience_ns / 1000, client->depth,
                         request->connections);
}

static void fill(struct qos_client *client)
{
    struct world_volume *volume = &world.volumes[client->volume];
    struct qos_request fresh = {.sent_ns = nv_sim_clock_ns(), .sent_busy_ns = world.busy_ns,
                                .regime = volume->judge.regime, .connections = volume->connections};

    for (unsigned i = 0; i < QOS_DEPTH_MAX; i++) /* it waits behind these, who may have been more */
        if (client->requests[i].used && client->requests[i].connections > fresh.connections)
            fresh.connections = client->requests[i].connections;
    qos_client_fill(client, &world.random, &fresh);
}

static bool take_events(void)
{
    nv_event events[16];
    int count = nv_plane_events(world.plane, events, 16);

    for (int i = 0; i < count; i++) {
        struct world_volume *volume;
        switch (events[i].kind) {
        case NV_EVENT_CONNECTION_CLOSED:
            volume = &world.volumes[world.clients[events[i].token]->volume];
            if (!world.clients[events[i].token]->dismissed)
                nv_sim_violation("a connection ended by itself: %d", events[i].result);
            volume->connections--;
            if (world.clients[events[i].token]->leaving)
                judge_left(&volume->judge);
            qos_client_destroy(world.clients[events[i].token]);
            world.clients[events[i].token] = NULL;
            break;
        case NV_EVENT_VOLUME_QOS:
            volume = &world.volumes[events[i].token];
            volume->changing = false;
            judge_changed(&volume->judge, &volume->wanted);
            break;
        case NV_EVENT_VOLUME_CLOSED:
            world.volumes[events[i].token].closed = true;
            break;
        default:
            nv_sim_violation("event of kind %u", events[i].kind);
        }
    }
    return count > 0;
}

bool world_clients(void)
{
    bool moved = false;

    for (uint32_t i = 0; i < WORLD_CLIENTS; i++) {
        struct qos_client *client = world.clients[i];
        if (client && world.filling)
            fill(client);
        if (client)
            moved |= qos_client_pump(client, answered, NULL);
    }
    return moved;
}

bool world_move(void)
{
    const uint64_t before_ns = nv_sim_clock_ns();
    bool moved = nv_sim_step();

    world.busy_ns += nv_sim_clock_ns() - before_ns;
    for (uint32_t i = 0; i < world.reactors; i++)
        moved |= nv_reactor_turn(nv_plane_reactor(world.plane, i));
    moved |= take_events();
    return world_clients() || moved;
}

bool world_step(void)
{
    return world_move() || nv_sim_advance();
}

uint32_t world_unanswered(void)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i] && world.clients[i]->open)
            count += qos_client_unanswered(world.clients[i]);
    return count;
}

void world_end(void)
{
    const uint64_t from_ns = nv_sim_clock_ns(), from_busy_ns = world.busy_ns;
    bool finished = false;

    world.filling = false;
    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i])
            world.clients[i]->dismissed = true;
    nv_plane_stop(world.plane);
    while (!finished) {
        const uint64_t took_ns = nv_sim_clock_ns() - from_ns - (world.busy_ns - from_busy_ns);
        finished = true;
        for (uint32_t i = 0; i < world.reactors; i++)
            finished &= nv_reactor_finished(nv_plane_reactor(world.plane, i));
        if (took_ns > STOP_LIMIT_NS || (!finished && !world_step()))
            nv_sim_violation("the plane does not stop within %llu ms", (unsigned long long)took_ns / 1000000);
    }
    nv_plane_free(world.plane);
    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i])
            qos_client_destroy(world.clients[i]);
    nv_sim_end();
}
