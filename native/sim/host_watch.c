/*
 * What a host's mirror is doing, seen from outside: for the world's decisions, and for the tally of what was met.
 */
#include <errno.h>

#include "sim/host.h"
#include "sim/tally.h"
#include "log/state.h"
#include "volume/logged_state.h"
#include "volume/mirror_state.h"

static const struct nv_mirror *mirror_of(const struct host *host)
{
    const struct nv_volume *volume = nv_table_get(&host->plane->volumes, host->volume);

    return host->opened && volume ? volume->mirror : NULL;
}

static int lane_of(const struct nv_mirror *mirror, uint32_t leg)
{
    for (int lane = 0; mirror && lane < (int)NV_LEGS_MAX; lane++)
        if (mirror->lanes[lane].id == FARM_LEG_ID(leg))
            return lane;
    return -1;
}

bool host_leg_in_sync(const struct host *host, uint32_t leg)
{
    const struct nv_mirror *mirror = mirror_of(host);
    const int lane = lane_of(mirror, leg);

    return lane >= 0 && mirror->lanes[lane].state == NV_LANE_IN_SYNC;
}

uint32_t host_other_leg(const struct host *host)
{
    const struct nv_mirror *mirror = mirror_of(host);

    for (uint32_t lane = 0; mirror && lane < NV_LEGS_MAX; lane++)
        if (lane != mirror->primary && (mirror->in_sync & nv_lane_bit(lane)))
            return mirror->lanes[lane].id - FARM_LEG_ID(0);
    return FARM_LEGS;
}

bool host_leg_has_late(const struct host *host, uint32_t leg)
{
    const struct nv_mirror *mirror = mirror_of(host);
    const int lane = lane_of(mirror, leg);

    return lane >= 0 && mirror->lanes[lane].outstanding > 0;
}

bool host_fenced(const struct host *host)
{
    const struct nv_mirror *mirror = mirror_of(host);

    return mirror && mirror->fenced;
}

void host_tally_cache(const struct host *host)
{
    nv_cache_status status;

    if (host->opened && nv_volume_cache(host->plane, host->volume, &status) == 0)
        tally_counts[TALLY_CACHE_HIT] += status.hits;
}

uint64_t host_log_keeps(const struct host *host)
{
    const struct nv_volume *volume = host->log_found ? nv_table_get(&host->plane->volumes, host->volume) : NULL;
    const struct nv_logged *logged = volume ? volume->logged : NULL;
    uint64_t count = 0;

    if (!logged)
        return 0;
    for (uint32_t i = 0; i < NV_LOG_RUN_MEMORIES; i++)
        count += logged->log->destager.memory_users[i];
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++)
        count -= logged->log->destager.runs[i].used;
    return count + logged->block_total - NV_LOGGED_SLOTS - logged->block_count;
}

void host_tally_turn(struct host *host)
{
    const struct nv_mirror *mirror = mirror_of(host);
    const bool expired = mirror && mirror->expired;
    const uint64_t keeps = host_log_keeps(host);

    if (keeps > host->log_keeps)
        tally(TALLY_LOG_KEEPS);
    host->log_keeps = keeps;

    if (expired && !host->expired)
        tally(TALLY_EXPIRED);
    host->expired = expired;
}

void host_tally_event(const struct host *host, const nv_event *event)
{
    switch (event->kind) {
    case NV_EVENT_VOLUME_ATTACHED:
        if (event->result)
            tally(TALLY_ATTACH_FAILED);
        else
            tally(event->args[0] > 0 ? TALLY_ATTACH_UNCLEAN : TALLY_ATTACH_CLEAN);
        break;
    case NV_EVENT_LEG_FAILED:
        tally(event->result == -ETIMEDOUT ? TALLY_FAILED_BY_TIME : TALLY_FAILED_BY_ERROR);
        if (host_leg_has_late(host, (uint32_t)event->args[0] - FARM_LEG_ID(0)))
            tally(TALLY_LATE_OPERATION);
        break;
    case NV_EVENT_SYNC_FAILED:
        if (event->result == -ESTALE)
            tally(TALLY_FAR_OWED);
        else if (event->result == -ETIMEDOUT)
            tally(TALLY_FAR_DOUBT);
        break;
    case NV_EVENT_LEG_STOPPED:
        tally(TALLY_RESYNC_STOPPED);
        break;
    case NV_EVENT_READ_REPAIRED:
        if (event->result == 0)
            tally(TALLY_REPAIRED);
        break;
    default:
        break;
    }
}

void host_tally_action(const struct host *host, const nv_legs_action *action)
{
    switch (action->kind) {
    case NV_ACT_RELEASE:
        tally(TALLY_RELEASED);
        break;
    case NV_ACT_RESYNC:
        tally(action->full ? TALLY_RESYNC_FULL : TALLY_RESYNC_PART);
        if (host_leg_has_late(host, action->leg - FARM_LEG_ID(0)))
            tally(TALLY_RESYNC_WAITED);
        break;
    case NV_ACT_PROMOTE:
        tally(TALLY_PROMOTED);
        break;
    case NV_ACT_FENCE:
        tally(TALLY_FOUND_FENCED);
        break;
    case NV_ACT_REFUSE:
        tally(TALLY_REFUSED);
        break;
    default:
        break;
    }
}

static enum tally doing_task(const struct nv_mirror *mirror)
{
    switch (mirror->task.kind) {
    case NV_TASK_RELEASE:
        return TALLY_KILL_RELEASING;
    case NV_TASK_PREPARE:
        return TALLY_KILL_PREPARING;
    case NV_TASK_CHECKPOINT:
        return TALLY_KILL_CHECKPOINT;
    case NV_TASK_PROMOTE:
        return TALLY_KILL_PROMOTING;
    case NV_TASK_CLEAN:
        return TALLY_KILL_CLEARING;
    default:
        return TALLY_KILL_SERVING;
    }
}

enum tally host_doing(const struct host *host)
{
    const struct nv_mirror *mirror = mirror_of(host);

    if (host->deposed)
        return TALLY_KILL_DEPOSED;
    if (!mirror || mirror->attaching)
        return TALLY_KILL_ATTACHING;
    if (mirror->task.kind != NV_TASK_NONE)
        return doing_task(mirror);
    if (nv_mirror_frozen(mirror))
        return TALLY_KILL_FROZEN;
    if (mirror->promoting)
        return TALLY_KILL_PROMOTING;
    if (mirror->syncing)
        return TALLY_KILL_SYNCING;
    return mirror->intent.doubtful_count > 0 ? TALLY_KILL_DOUBTFUL : TALLY_KILL_SERVING;
}
