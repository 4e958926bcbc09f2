/*
 * A datastore's metadata in the simulation: one block at the end of each disk, written, made durable and read back by
 * object jobs (nv_object_job) while volumes use the same disk. Each write carries a larger number than the last, so
 * that what is found after a crash tells whether anything durable was lost.
 */
#ifndef NV_SIM_META_H
#define NV_SIM_META_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"
#include "sim/random.h"

#define META_BYTES 512u

struct meta {
    uint64_t offset;    /* on the disk */
    uint64_t sent, acknowledged, durable;
    uint64_t unsure;    /* numbers up to here may have been lost by a failed sync */
    uint64_t covers;    /* what the job under way makes durable, if it succeeds */
    uint32_t job;       /* under way: NV_JOB_*, or 0 */
    bool shaken;        /* the storage was restarted meanwhile */
    uint8_t buffer[META_BYTES] __attribute__((aligned(4096)));
};

/* Start a random job on the object, unless one is under way. `token` comes back with its event. */
void meta_act(struct meta *meta, struct sim_random *random, nv_plane *plane, uint32_t object, uint64_t token);
/* Its event. `errors`: it may fail. */
void meta_done(struct meta *meta, int result, bool errors);
void meta_fault_cleared(struct meta *meta);
/* The disk alone was restarted: what was not durable may be gone. */
void meta_rebooted(struct meta *meta);
/* What a dead process, or a power cut, has left: a number that is possible. */
void meta_check_image(struct meta *meta, const uint8_t *image, bool cache_survives);

#endif
