/*
 * One seed's world: what is drawn once and holds for all its lives (sizes, runs, faults, how many reactors), and the
 * disks' contents that survive from life to life.
 */
#ifndef NV_SIM_SCENARIO_H
#define NV_SIM_SCENARIO_H

#include <stdint.h>

#include "io/io_sim.h"
#include "nbdvvol.h"
#include "sim/meta.h"
#include "sim/random.h"

#define SCENARIO_RUNS 8u
#define SCENARIO_DISKS 2u

struct scenario_run {
    uint64_t offset, length, object_offset;
    uint32_t disk;
    uint32_t state;             /* NV_RUN_MAPPED or NV_RUN_ZERO, whose place on the disk nobody may touch */
};

struct scenario_log {           /* a write-back log; its chance is its own, so that worlds without one are what they were */
    struct sim_random random;
    uint64_t size;              /* of its disk; 0: there is none */
    nv_log_policy policy;       /* as the next life will open it: what the registry has is in it */
    uint8_t *image;
};

struct scenario {
    uint64_t seed;
    struct sim_random random;
    struct nv_sim_faults faults;
    uint32_t reactors;
    uint32_t lives;
    uint32_t steps;             /* of a life, at most */
    uint32_t cell_bytes;        /* the judge's unit: all requests are multiples of it */
    uint32_t block_min;
    uint32_t align;             /* of the disks: 1, or what O_DIRECT asks */
    bool in_memory[SCENARIO_DISKS]; /* the disk is a file in memory: reads may be sent from it */
    bool limited;               /* the volume's limits change now and then */
    uint32_t cache_frames;      /* 0: no cache */
    struct scenario_log log;
    uint64_t cells_first, cells_final; /* before and after growing */
    struct scenario_run runs[SCENARIO_RUNS];
    uint32_t run_count;
    uint64_t zero_from, zero_to; /* bytes of the volume in the one zero run, if there is one */
    uint64_t disk_size[SCENARIO_DISKS];
    struct meta meta[SCENARIO_DISKS]; /* in each disk's last block */
    uint8_t *image[SCENARIO_DISKS]; /* what the next life finds */
};

void scenario_draw(struct scenario *scenario, uint64_t seed);
void scenario_free(struct scenario *scenario);
/* A volume description of `cells` cells on these objects; returns its length. */
uint64_t scenario_describe(const struct scenario *scenario, uint64_t cells, const uint32_t objects[SCENARIO_DISKS],
                           uint64_t map_from, uint64_t map_to, uint8_t out[1024]);
/* Whether a volume of so many cells has bytes on the disk. */
bool scenario_uses(const struct scenario *scenario, uint32_t disk, uint64_t cells);
/* Bytes of the disks that belong to no run must be what they were; anything else is a violation. */
void scenario_check_gaps(const struct scenario *scenario);

#endif
