/*
 * A life of nvsim's volume: what runs in it, and its write-back log (life_log.c), which a part of the worlds have.
 */
#ifndef NV_SIM_LIFE_H
#define NV_SIM_LIFE_H

#include "reactor/plane.h"
#include "sim/client.h"
#include "sim/scenario.h"

#define LIFE_CLIENTS 4u

struct life {
    struct scenario *scenario;
    struct client_rules *rules;
    nv_plane *plane;
    uint32_t objects[SCENARIO_DISKS];
    int files[SCENARIO_DISKS];
    uint32_t volume;
    struct client *clients[LIFE_CLIENTS];
    uint32_t numbers[LIFE_CLIENTS]; /* of their connections, for the plane */
    uint32_t connections;   /* the plane has not told the end of */
    bool changing;          /* a growth is under way */
    bool limiting;          /* new limits are */
    bool caching;           /* a new cache policy is */
    int log_file;
    uint32_t log_object;
    bool log_opened;
    bool log_before;        /* the volume, not beside it */
    bool draining;          /* the log is */
    bool switching;         /* it goes in or out */
    bool volume_closed;
    bool over;              /* the images are taken: what still happens, happens to nobody */
    bool latched[SCENARIO_DISKS];
    uint64_t *next_id;      /* of connections, over all lives */
};

/* Everything that can move moves once. False: nothing did, not even the clock. */
bool life_settle_once(struct life *life);

/* The volume is open, and nobody uses it. */
void life_open_log(struct life *life);
/* Control may drain the log at any time, and have it written again, and put in and taken out. */
void life_act_on_log(struct life *life);
/* An event that is no other's. */
void life_log_event(struct life *life, const nv_event *event);

#endif
