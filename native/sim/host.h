/*
 * A host of the farm: one filter, that is a plane with the mirrored volume, the leg machine, and the driving around it
 * that in production is Python: open objects, read labels, carry messages, close. It opens the legs' disks through
 * descriptors of its own, or through servers (far.h), so it can be fenced, cut off, and killed by itself.
 */
#ifndef NV_SIM_HOST_H
#define NV_SIM_HOST_H

#include "reactor/plane.h"
#include "sim/far.h"
#include "sim/farm.h"
#include "sim/tally.h"

#define HOST_CLIENTS 3u
#define HOST_PATIENCE 400000u
#define HOST_LOOK 1000u             /* token of a job that reads leg 0's label; the next one has the next */

struct host_leg {
    bool open;                      /* it has an object */
    bool described;                 /* the volume's description names it */
    bool looking;                   /* a job reads its label */
    bool latched;                   /* its object's sync has failed, and nobody has cleared that */
    int file;
    struct far *far;                /* it is behind a server */
    uint32_t object;
    uint32_t path;                  /* whose disk that is */
    uint8_t buffer[2u * 4096u] __attribute__((aligned(4096)));
};

#define HOST_FILES 64u

struct host {
    struct farm *farm;
    uint32_t index;
    nv_plane *plane;                /* NULL: down */
    uint64_t epoch;
    uint64_t bound_step;            /* when it got it */
    nv_legs *machine;
    bool begun;                     /* the machine has the looks */
    bool opened, attached, failed, changing, caching, closing, closed;
    bool refused, deposed;
    bool expired;                   /* as it was when the last turn ended */
    uint64_t log_keeps;             /* ... */
    uint32_t why;                   /* refused */
    uint32_t volume;
    uint64_t map_version;
    nv_legs_record known;           /* the newest record that has come */
    nv_leg_look looks[FARM_LEGS];
    struct host_leg legs[FARM_LEGS];
    int files[HOST_FILES];          /* every descriptor of this boot */
    uint32_t objects[HOST_FILES];   /* ... and what the plane calls it */
    struct far *fars[HOST_FILES];   /* ... and who serves it, if it is behind a server */
    uint32_t file_count;
    struct client *clients[HOST_CLIENTS];
    uint32_t numbers[HOST_CLIENTS];
    uint64_t *next_id;              /* of connections */
    bool log_open, log_found, draining;
    bool log_before, switching;     /* the log is before the volume; it goes in or out */
    bool log_hung;                  /* it was refused, for its disk hung */
    bool log_failed;                /* nothing goes into it any more until it is opened anew */
    int log_file;
    uint32_t log_object;
    uint8_t log_id[16];
    bool verifying;
    uint64_t verified, differed, repaired;
};

/* Bind: the registry has given this host its epoch, the legs are fenced. Boot, look at the legs. */
void host_bind(struct host *host);
bool host_serves(const struct host *host);
/* One thing each; true: something moved. */
bool host_turn(struct host *host);
bool host_events(struct host *host);
bool host_messages(struct host *host);
/* Everything that can move moves once, clients too. */
bool host_move(struct host *host);
void host_link_back(struct host *host);
/* The farm's legs have other troubles now. */
void host_set_troubles(struct host *host);
/* Look at stale legs that are there again, and have them resynced; `eager`: blank ones too, on the operator's word. */
void host_tend(struct host *host, bool eager);
void host_act(struct host *host);   /* a client does something */
/* The first client, who is made now if there is none. The volume is open. */
struct client *host_client(struct host *host);
void host_leg_rebooted(struct host *host, uint32_t disk);
void host_clear_faults(struct host *host);
void host_close_volume(struct host *host);
/* The cache may be switched to any mode at any time. */
void host_set_cache(struct host *host, uint32_t mode);
/* Its lease runs out: it stops by itself, before anybody else is bound. */
void host_lease_ends(struct host *host);
/* Its files are fenced: whoever asks it from now on gets nothing. */
void host_depose(struct host *host);
/* The process dies; what is on its way to the disks has happened in part. */
void host_kill(struct host *host);
/* The end of a plane whose volume is closed, or was never opened. */
void host_stop(struct host *host);
void host_verify(struct host *host, bool repair);

/* host_legs.c */
bool host_reachable(const struct host *host, uint32_t leg);
void host_open_leg(struct host *host, uint32_t leg);
void host_look_at(struct host *host, uint32_t leg);
nv_leg_look host_judge_label(const struct host *host, uint32_t leg, int result);
void host_settle(struct host *host, uint32_t index);
void host_fence_files(struct host *host);
bool host_may_reopen(struct host *host, uint32_t leg, bool eager);
bool host_far_steps(struct host *host);
void host_leave_fars(struct host *host);
void host_link_lost(struct host *host, const nv_event *event);
/* It may lose what it has cached: all that was there before it was opened is durable. True for a leg on a local disk. */
bool host_far_has_flushed(const struct host *host, uint32_t leg);
/* Its client knows of every connection that has ended. */
bool host_far_is_sound(const struct host *host, uint32_t leg);

/* host_log.c: the log in front of the mirror, which the farm's hosts have or not. */
void host_open_log(struct host *host);
void host_log_event(struct host *host, const nv_event *event);
void host_end_log(struct host *host);
/* Nothing is left to carry below. */
bool host_log_rests(const struct host *host);
/* Control may drain the log at any time, and have it written again; one that holds nothing may go out, and in again. */
void host_drain_or_allow(struct host *host);
/* The log's disk has other troubles now, or (`none`) no more. */
void host_trouble_log(struct host *host, bool none);

/* host_watch.c: the plane has the leg in sync; operations of it are under way, late ones included. */
bool host_leg_in_sync(const struct host *host, uint32_t leg);
bool host_leg_has_late(const struct host *host, uint32_t leg);
/* A leg that the plane has in sync and that is not its primary; FARM_LEGS: none. */
uint32_t host_other_leg(const struct host *host);
/* If it died now. */
enum tally host_doing(const struct host *host);
bool host_fenced(const struct host *host);
void host_tally_cache(const struct host *host);
void host_tally_turn(struct host *host);
/* Memory of what the log hands below that late operations may still use. */
uint64_t host_log_keeps(const struct host *host);
void host_tally_event(const struct host *host, const nv_event *event);
void host_tally_action(const struct host *host, const nv_legs_action *action);

#endif
