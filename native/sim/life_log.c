/*
 * The write-back log of nvsim's volume, and control's side of it: who may log, what the registry says, when it goes in and out.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "io/io_sim.h"
#include "sim/life.h"

static bool log_chance(struct life *life, unsigned of_1024)
{
    return sim_random_chance(&life->scenario->log.random, of_1024);
}

/* The registry has it: write into it. */
static void allow_log(struct life *life)
{
    nv_log_policy *policy = &life->scenario->log.policy;

    if (life->rules->trace)
        puts("-- the log may be written to");
    policy->dirty = 1;
    policy->discard = 0;
    (void)nv_volume_log_allow(life->plane, life->volume); /* perhaps it has not heard the last one */
}

static void start_log(struct life *life, bool beside)
{
    struct scenario_log *log = &life->scenario->log;
    const uint32_t align = life->scenario->cell_bytes == SIM_SECTOR ? SIM_SECTOR : 1; /* transfers are cut short at cells */
    nv_log_policy policy;

    for (uint32_t i = 0; i < sizeof log->policy.fresh; i++) {
        log->policy.fresh[i] = (uint8_t)sim_random_next(&log->random);
        log->policy.begin[i] = (uint8_t)sim_random_next(&log->random);
    }
    policy = log->policy;
    policy.beside = beside;
    if (nv_object_open(life->plane, life->log_file, align > 1 ? NV_OBJECT_DIRECT : 0, align, log->size, &life->log_object) != 0 ||
        nv_volume_log_open(life->plane, life->volume, life->log_object, 0, log->size, &policy, 1) != 0)
        nv_sim_violation("the log does not open: %s", nv_last_error());
}

/* What is found is judged elsewhere (nvlog); here it opens without faults. One that holds nothing may go in later. */
void life_open_log(struct life *life)
{
    struct scenario_log *log = &life->scenario->log;
    const uint32_t align = life->scenario->cell_bytes == SIM_SECTOR ? SIM_SECTOR : 1;
    const struct nv_sim_faults none = {.atom = life->scenario->faults.atom};

    if (!log->size)
        return;
    life->log_file = nv_sim_file(sim_disk_create(log->image, log->size), align, false);
    life->plane->scattered = log_chance(life, 700);
    if (!log->policy.dirty && log_chance(life, 300))
        return;
    life->log_before = true;
    nv_sim_set_faults(&none);
    start_log(life, false);
    while (!life->log_opened)
        if (!life_settle_once(life))
            nv_sim_violation("the log is never open");
    nv_sim_set_faults(&life->scenario->faults);
    if (log_chance(life, 900))
        allow_log(life);
}

/* A log that holds nothing may go out at any time, and in again; one that holds something does not. */
static void take_out_log(struct life *life)
{
    if (life->rules->trace)
        puts("-- the log goes out");
    life->switching = true;
    if (nv_volume_log_detach(life->plane, life->volume, 1) != 0)
        nv_sim_violation("the log does not go out: %s", nv_last_error());
}

static void switch_log(struct life *life)
{
    if (life->switching || life->changing || life->draining || life->over)
        return;
    if (life->scenario->log.policy.dirty && !(life->log_before && log_chance(life, 128)))
        return;
    if (life->log_before) {
        take_out_log(life);
        return;
    }
    if (life->rules->trace)
        puts("-- the log goes in");
    life->switching = true;
    start_log(life, true);
}

static void log_attached(struct life *life, int result)
{
    life->switching = false;
    life->log_before = result == 0;
    if (result != 0 && result != -ETIMEDOUT && !(result == -EINVAL && life->rules->sync_errors))
        nv_sim_violation("a log does not go in: %d", result);
    if (life->over || life->rules->closing)
        return;
    if (result != 0)
        take_out_log(life);
    else if (log_chance(life, 800))
        allow_log(life);
}

static void log_detached(struct life *life, int result)
{
    life->switching = false;
    if (result != 0 && result != -EBUSY && result != -ETIMEDOUT)
        nv_sim_violation("a log does not go out: %d", result);
    if (result != 0) {
        if (!life->log_before && !life->over && !life->rules->closing)
            take_out_log(life);
        return;
    }
    life->log_before = life->log_opened = false;
    life->scenario->log.policy.dirty = 0;
    life->log_file = nv_sim_file_again(life->log_file);
    if (nv_object_close(life->plane, life->log_object, 1) != 0)
        nv_sim_violation("the object of a log that is out does not close: %s", nv_last_error());
}

/* Control may drain the log at any time, and have it written again. */
static void drain_or_allow(struct life *life)
{
    if (life->draining || life->switching || !life->log_before)
        return;
    if (log_chance(life, 512)) {
        allow_log(life);
        return;
    }
    life->draining = nv_volume_log_drain(life->plane, life->volume, 1) == 0;
}

static void take_log_opened(struct life *life, const nv_event *event)
{
    const bool beside = !life->log_before, faulty = life->rules->io_errors || life->rules->sync_errors;

    life->log_opened = true;
    if (life->rules->trace)
        printf("-- the log is open: %llu bytes dirty in %llu records\n", (unsigned long long)event->args[1],
               (unsigned long long)event->args[2]);
    if ((event->args[0] != 0 || event->result != 0) && !(beside && faulty && event->result != 0))
        nv_sim_violation("the log is refused: %s", nv_log_verdict_word((uint32_t)event->args[0]));
    memcpy(life->scenario->log.policy.id, &event->args[3], sizeof life->scenario->log.policy.id);
    if (!beside || life->rules->closing || life->over)
        return;
    if (event->result != 0)
        take_out_log(life);
    else if (nv_volume_log_attach(life->plane, life->volume, 1) != 0)
        nv_sim_violation("a log does not go in: %s", nv_last_error());
}

static void log_drained(struct life *life, const nv_event *event)
{
    life->draining = false;
    if (event->result == 0 && !life->over && life->log_before)
        life->scenario->log.policy.dirty = 0;
}

void life_log_event(struct life *life, const nv_event *event)
{
    switch (event->kind) {
    case NV_EVENT_LOG_OPENED:
        take_log_opened(life, event);
        break;
    case NV_EVENT_LOG_DRAINED:
        log_drained(life, event);
        break;
    case NV_EVENT_LOG_ATTACHED:
        log_attached(life, event->result);
        break;
    case NV_EVENT_LOG_DETACHED:
        log_detached(life, event->result);
        break;
    case NV_EVENT_LOG_FAILED:
        if (!life->rules->sync_errors)
            nv_sim_violation("the log is said to have failed, and nothing did");
        break;
    case NV_EVENT_LOG_NEEDS_WORD:
        if (life->over)
            break;
        life->scenario->log.policy.dirty = 0; /* the registry has it */
        life->scenario->log.policy.discard = 1;
        (void)nv_volume_log_forget(life->plane, life->volume);
        break;
    default:
        nv_sim_violation("event of kind %u", event->kind);
    }
}

void life_act_on_log(struct life *life)
{
    if (!life->scenario->log.size || !log_chance(life, 120))
        return;
    if (log_chance(life, 512))
        switch_log(life);
    else
        drain_or_allow(life);
}
