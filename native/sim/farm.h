/*
 * One seed's farm for a mirrored volume: legs on disks that several hosts reach, the registry with its compare-and-swaps,
 * and the links between hosts and control, which delay, repeat and lose. Hosts are in host.h, what happens to them all is
 * decided in mirror.c.
 *
 * What must hold on the disks (farm_inspect): two legs that the registry has in sync differ only where each of them has
 * the intent; a stale leg differs from an in-sync one only where that one has the intent, or the leg's dirty bit.
 */
#ifndef NV_SIM_FARM_H
#define NV_SIM_FARM_H

#include <stdbool.h>
#include <stdint.h>

#include "io/io_sim.h"
#include "nbdvvol.h"
#include "sim/check.h"
#include "sim/client.h"
#include "sim/random.h"

#define FARM_LEGS 4u
#define FARM_HOSTS 2u
#define FARM_RUNS 3u
#define FARM_MESSAGES 32u
#define FARM_LEG_ID(leg) ((leg) + 11u)

struct farm_run {
    uint64_t offset, length, object_offset;
};

struct farm_leg {
    int file;                       /* the disk */
    uint32_t path;                  /* the leg whose disk a host finds when it opens this one: swapped, if not itself */
    uint64_t disk_size, meta_offset;
    struct farm_run runs[FARM_RUNS];
    uint32_t run_count;
    uint8_t *snapshot;              /* an earlier state of the disk, */
    uint64_t snapshot_epoch, snapshot_generation; /* and the stamp that the registry had of the leg then */
    bool gone, hung;                /* for every host */
    uint64_t stuck_before;          /* what was asked of it before this moment of the world does not complete */
    bool rebooted;                  /* what its cache held may be lost, and perhaps nobody has noticed yet */
    uint64_t rebooted_step, resync_step; /* when it was, and when its last resync began */
    bool suspect;                   /* control knows that a sync failed there: who opens it latches */
    bool spoiled;                   /* rolled back or blank: only a full resync makes it right */
    /* behind a server of its own (far.h) */
    bool far, claims;
    uint32_t far_flags, far_payload, far_timeout_ms, far_hold_ms;
    struct far *openings;           /* by whoever has it open, or had */
    uint32_t attempts;
    uint64_t claim_epoch;           /* the newest claim that it knows */
    uint32_t claim_attempt;
};

struct farm_message {
    bool ask;                       /* to control: action; else to the host: record */
    uint32_t host;
    uint64_t epoch;                 /* of the host's machine */
    nv_legs_action action;
    nv_legs_record record;
    uint64_t sent_step;
};

/* Write-back logs, one of each host; the chances are their own, so that seeds without them are what they were. */
struct farm_log {
    struct sim_random random;
    uint64_t size;                  /* of each disk; 0: there are none */
    int files[FARM_HOSTS];
    nv_log_policy policy;
    bool troubled;                  /* its disks refuse writes and hang at times, */
    struct sim_random bad_luck;     /* by chances that are nobody else's */
    /* control's: */
    bool dirty;                     /* the log of `host`, this one, holds data of the volume */
    uint32_t host;
    uint8_t id[16];
    bool given_up[FARM_HOSTS];      /* what it holds is never replayed: whoever opens it formats it */
};

/* How often, of 1000, which step is taken; what is left is the hosts' work. */
struct farm_shares {
    uint16_t messages, advance, trouble, heal, tend, control, end;
};

struct farm {
    uint64_t seed;
    struct sim_random random;
    struct nv_sim_faults faults;
    uint32_t cell_bytes, block_min, align, region_shift, reactors;
    uint64_t cells, size;
    uint32_t corner;                /* cells that clients ask for mostly */
    uint64_t zero_from, zero_to;    /* bytes without storage */
    nv_desc_mirror policy;
    uint32_t leg_count;
    struct farm_leg legs[FARM_LEGS];
    uint8_t uuid[16];
    bool in_memory;                 /* the legs are files in memory: of one host, which has them as long as it lives */
    uint32_t host_count;            /* that the volume is bound to */
    bool leased;                    /* a host ends by itself before another one is bound; a cache needs that */
    struct farm_log log;
    uint32_t cache_mode, cache_frames; /* NV_CACHE_MODE_*; 0 frames: the filters have no cache */
    uint32_t lives, steps;
    uint32_t good;                  /* this leg has no trouble of its own; FARM_LEGS: none is promised that */
    bool must_serve;                /* nothing may fail for the clients, because of the good leg */
    struct farm_shares shares;
    uint32_t aim, aims;             /* a filter is to die when it does this (enum tally), and how often still */
    bool calm;                      /* no more troubles */
    bool sticky;                    /* who hangs leaves only what it was asked before undone */
    uint16_t hasty;                 /* how often the operator clears a fault at once */
    uint16_t hang, silence, drop, reboot, read_errors, write_errors, sync_errors, cut, kill, rebind, spoil, swap, jump; /* chances */
    /* control */
    nv_legs_record registry;
    uint32_t owner;                 /* host, or FARM_HOSTS: released */
    bool cut_off[FARM_HOSTS];
    struct farm_message messages[FARM_MESSAGES];
    uint32_t message_count;
    struct check *check;
    struct client_rules rules;
    uint64_t now;                   /* counts steps */
    uint64_t commits, inspections;
    uint64_t metadata_writes;
    uint64_t crashes;               /* ends of a process, of a host's right to serve, or of power, so far */
    sim_pick *pick;                 /* what a power cut leaves; NULL: by chance */
    void *pick_context;
};

void farm_draw(struct farm *farm, uint64_t seed);
/* A small one, of two legs and without troubles, for exhaustive.c. */
void farm_plain(struct farm *farm);
/* Make the disks in the world that has begun, freshly formatted: all legs in sync at epoch 0, generation 1. */
void farm_make_disks(struct farm *farm);
/* Whom the volume may be bound to: any host, unless a log holds its data (host_log.c). */
uint32_t farm_some_host(struct farm *farm);
/* Power goes at every log. */
void farm_power_cut_logs(struct farm *farm);
void farm_free(struct farm *farm);

/* The registry: one compare-and-swap; its record is the answer. */
void farm_apply(struct farm *farm, const nv_legs_action *ask);
bool farm_in_sync(const struct farm *farm, uint32_t leg);

/* The link: what a host sends, what it is answered. */
void farm_send(struct farm *farm, const struct farm_message *message);
/* Take a message that arrives now; false: none. What was for control has been answered by then. */
bool farm_receive(struct farm *farm, uint32_t host, struct farm_message *out);
void farm_cut(struct farm *farm, uint32_t host);

/* Disks. */
/* The leg's server knows of a newer epoch: nothing goes through this file of a host any more. */
void farm_fence(int file);
/* A server's own: this claim has to give way to that one, of a newer epoch or a newer opening. */
bool farm_outclaimed(uint64_t epoch, uint32_t attempt, uint64_t by_epoch, uint32_t by_attempt);
void farm_power_cut(struct farm *farm, uint32_t leg);
/* It has everything again, if it was made so from this step on. */
void farm_made_whole(struct farm *farm, uint32_t leg, uint64_t since_step);
/* A leg's metadata was written to since this was last asked. */
bool farm_wrote_metadata(struct farm *farm);
void farm_take_snapshot(struct farm *farm, uint32_t leg);
bool farm_roll_back(struct farm *farm, uint32_t leg); /* false: nothing would show that it was */
void farm_inspect(struct farm *farm);
/* The bytes of a leg's disk that are the volume's at the offset. */
const uint8_t *farm_place(const struct farm *farm, uint32_t leg, uint64_t offset);
/* Change bytes of a leg behind everybody's back. */
void farm_write(struct farm *farm, uint32_t leg, uint64_t offset, const void *bytes, size_t size);
/* All legs hold the same bytes, and no intent is set. */
void farm_expect_equal(struct farm *farm);
/* A change was acknowledged: each leg that the registry has in sync has it. */
void farm_acknowledged(void *context, uint64_t first, uint64_t count);

static inline uint64_t farm_below(struct farm *farm, uint64_t bound)
{
    return sim_random_below(&farm->random, bound);
}

static inline bool farm_chance(struct farm *farm, unsigned of_1024)
{
    return sim_random_chance(&farm->random, of_1024);
}

#endif
