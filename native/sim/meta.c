/*
 * See meta.h. Invariant: durable <= acknowledged <= sent; one job at a time.
 */
#include "sim/meta.h"

#include <assert.h>
#include <string.h>

#include "io/io_sim.h"

static void fill(struct meta *meta, uint64_t number)
{
    for (uint32_t at = 0; at < META_BYTES; at += 8)
        memcpy(meta->buffer + at, &number, 8);
}

/* The smallest number found; each must be in least..sent. (A write that the end cut short leaves two.) */
static uint64_t judge_block(const struct meta *meta, const uint8_t *bytes, uint64_t least, const char *when)
{
    uint64_t smallest = UINT64_MAX;

    for (uint32_t at = 0; at < META_BYTES; at += 8) {
        uint64_t number;
        memcpy(&number, bytes + at, 8);
        if (number < least || number > meta->sent)
            nv_sim_violation("metadata is %llu %s; %llu was durable, %llu acknowledged, %llu sent",
                             (unsigned long long)number, when, (unsigned long long)meta->durable,
                             (unsigned long long)meta->acknowledged, (unsigned long long)meta->sent);
        smallest = number < smallest ? number : smallest;
    }
    return smallest;
}

void meta_act(struct meta *meta, struct sim_random *random, nv_plane *plane, uint32_t object, uint64_t token)
{
    static const uint32_t jobs[] = {NV_JOB_WRITE, NV_JOB_WRITE, NV_JOB_SYNC, NV_JOB_READ};

    if (meta->job)
        return;
    meta->job = jobs[sim_random_below(random, 4)];
    if (meta->job == NV_JOB_WRITE)
        fill(meta, ++meta->sent);
    meta->covers = meta->acknowledged;
    meta->shaken = false;
    if (nv_object_job(plane, object, meta->job, meta->buffer, meta->offset, META_BYTES, token) != 0)
        nv_sim_violation("a job on an object is refused: %s", nv_last_error());
}

void meta_done(struct meta *meta, int result, bool errors)
{
    uint32_t job = meta->job;

    assert(job);
    meta->job = 0;
    if (result < 0) {
        if (!errors)
            nv_sim_violation("a job on an object fails with %d for no reason", result);
        return;
    }
    if (job == NV_JOB_WRITE && !meta->shaken)
        meta->acknowledged = meta->sent;
    else if (job == NV_JOB_SYNC && meta->covers > meta->unsure)
        meta->durable = meta->covers;
    else if (job == NV_JOB_READ)
        judge_block(meta, meta->buffer, meta->shaken ? meta->durable : meta->acknowledged, "as a job reads it");
}

void meta_rebooted(struct meta *meta)
{
    meta->acknowledged = meta->durable;
    meta->unsure = meta->sent;
    meta->shaken = true;
}

void meta_fault_cleared(struct meta *meta)
{
    meta->unsure = meta->sent;
}

void meta_check_image(struct meta *meta, const uint8_t *image, bool cache_survives)
{
    uint64_t least = cache_survives ? meta->acknowledged : meta->durable;

    meta->durable = meta->acknowledged = judge_block(meta, image + meta->offset, least, "after the end");
    meta->unsure = meta->job = 0; /* the next life starts from what it finds */
}
