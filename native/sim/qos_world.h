/*
 * A plane on the simulated port with a few volumes under limits and clients that never pause, run promptly: everything
 * that can move moves before the clock does. So what takes time is what the limits make wait, to the nanosecond; what
 * the world's own steps take is counted apart (busy_ns).
 */
#ifndef NV_SIM_QOS_WORLD_H
#define NV_SIM_QOS_WORLD_H

#include "reactor/plane.h"
#include "sim/qos_client.h"
#include "sim/qos_judge.h"

#define WORLD_VOLUMES 4u
#define WORLD_CLIENTS 8u
#define WORLD_VOLUME_BYTES (1u << 20)

struct world_volume {
    uint32_t number;            /* 0: none */
    const struct nv_volume *plane_volume;
    nv_qos_limits wanted;       /* asked for; in force once !changing */
    struct qos_judge judge;
    bool changing, closed;
    uint32_t connections;       /* whose end was not told */
    uint32_t bytes_max;         /* of a request */
    uint64_t served;            /* requests */
};

struct world {
    struct sim_random random;
    nv_plane *plane;
    uint32_t reactors;
    uint32_t volume_count;
    struct world_volume volumes[WORLD_VOLUMES];
    struct qos_client *clients[WORLD_CLIENTS];
    uint64_t busy_ns;
    uint64_t answers;
    bool filling;               /* clients make new requests */
    size_t room;                /* of each new client's socket; 0: as it is drawn */
    bool strict;                /* answers are judged by how long they took */
};

extern struct world world;

void world_begin(uint64_t seed, uint32_t reactors);
uint32_t world_add_volume(const nv_qos_limits *limits, uint32_t bytes_max);
void world_set_qos(uint32_t volume, const nv_qos_limits *limits);
struct qos_client *world_add_client(uint32_t volume, uint32_t depth, enum qos_mix mix); /* NULL: no room */
/* How: 0 the client closes, 1 it resets, 2 the operator ends it. */
void world_end_client(struct qos_client *client, unsigned how);
/* The clients' part alone: new requests (while filling), bytes both ways. */
bool world_clients(void);
/* What can happen without the clock: one effect of I/O, a turn of each reactor, events, clients. False: nothing. */
bool world_move(void);
/* ... or else the clock goes on to the next timer; false: there is none. */
bool world_step(void);
uint32_t world_unanswered(void);
/* Stop the plane, with whatever still waits, and free everything. */
void world_end(void);

#endif
