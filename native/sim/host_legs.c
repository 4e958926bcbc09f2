/*
 * The legs' disks as a host has them open (host.h): objects, on files or behind servers, their labels and their troubles.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "sim/host.h"
#include "sim/tally.h"
#include "volume/meta.h"

#define NOTICE_STEPS 20000u
#define NOTICE_READ 32u

/* ---- legs ---- */

bool host_reachable(const struct host *host, uint32_t leg)
{
    const struct farm_leg *at = &host->farm->legs[host->farm->legs[leg].path];

    return !at->gone && !at->hung;
}

/* A descriptor of this boot has the troubles of its disk, also one that is not the leg's newest. */
static void set_trouble(const struct host *host, int file)
{
    struct nv_sim_trouble *trouble = nv_sim_trouble(file);
    const struct farm_leg *at = host->farm->legs;
    bool good;

    while (nv_sim_disk(at->file) != nv_sim_disk(file))
        at++;
    good = at - host->farm->legs == host->farm->good;

    trouble->gone = at->gone;
    trouble->hung = at->hung;
    trouble->stuck_before = at->stuck_before;
    trouble->read_error = good ? 0 : host->farm->read_errors;
    trouble->write_error = good ? 0 : host->farm->write_errors;
    trouble->sync_error = good ? 0 : host->farm->sync_errors;
}

void host_set_troubles(struct host *host)
{
    for (uint32_t i = 0; host->plane && !host->deposed && i < host->file_count; i++)
        set_trouble(host, host->files[i]);
}

void host_open_leg(struct host *host, uint32_t leg)
{
    struct farm *farm = host->farm;
    struct host_leg *mine = &host->legs[leg];
    struct farm_leg *at = &farm->legs[farm->legs[leg].path];

    mine->path = farm->legs[leg].path;
    mine->file = nv_sim_file_again(at->file);
    mine->far = NULL;
    set_trouble(host, mine->file);
    if (mine->file >= 0 && at->far) {
        mine->far = far_open(farm, at, host->plane, mine->file, host->epoch);
        mine->object = far_object(mine->far);
    } else if (mine->file < 0 || nv_object_open(host->plane, mine->file, farm->align > 1 ? NV_OBJECT_DIRECT : 0,
                                                farm->align, at->disk_size, &mine->object) != 0) {
        nv_sim_violation("a leg does not open: %s", nv_last_error());
    }
    assert(host->file_count < HOST_FILES);
    host->objects[host->file_count] = mine->object;
    host->fars[host->file_count] = mine->far;
    host->files[host->file_count++] = mine->file;
    mine->open = true;
    mine->latched = at->suspect;
    if (mine->latched)
        (void)nv_object_latch_fault(host->plane, mine->object);
    if (mine->far)
        (void)far_step(mine->far); /* it claims the leg at once */
}

void host_look_at(struct host *host, uint32_t leg)
{
    struct host_leg *mine = &host->legs[leg];

    if (mine->looking)
        return;
    mine->looking = true;
    if (nv_object_job(host->plane, mine->object, NV_JOB_READ, mine->buffer, host->farm->legs[mine->path].meta_offset,
                      sizeof mine->buffer, HOST_LOOK + leg) != 0)
        nv_sim_violation("a leg's label cannot be asked for: %s", nv_last_error());
}

nv_leg_look host_judge_label(const struct host *host, uint32_t leg, int result)
{
    struct nv_label label;

    if (result < 0)
        return (nv_leg_look){.look = NV_LOOK_ABSENT};
    if (!nv_label_decode(host->legs[leg].buffer, &label))
        return (nv_leg_look){.look = NV_LOOK_NO_LABEL};
    if (label.leg != FARM_LEG_ID(leg) || memcmp(label.uuid, host->farm->uuid, sizeof label.uuid) != 0)
        return (nv_leg_look){.look = NV_LOOK_FOREIGN};
    return (nv_leg_look){.look = NV_LOOK_LABEL, .syncing = label.syncing, .epoch = label.epoch,
                         .generation = label.generation};
}

/* ---- behind servers ---- */

void host_link_lost(struct host *host, const nv_event *event)
{
    for (uint32_t i = 0; i < host->file_count; i++)
        if (host->fars[i] && host->objects[i] == event->args[0])
            far_heard(host->fars[i], event);
}

bool host_far_steps(struct host *host)
{
    bool moved = false;

    for (uint32_t i = 0; i < host->file_count; i++)
        if (host->fars[i])
            moved |= far_step(host->fars[i]);
    return moved;
}

void host_leave_fars(struct host *host)
{
    for (uint32_t i = 0; i < host->file_count; i++)
        if (host->fars[i])
            far_leave(host->fars[i]);
}

/* Nothing of an earlier opening can land late: a newer claim ends it, or it is over, by somebody's word if need be. */
bool host_may_reopen(struct host *host, uint32_t leg, bool eager)
{
    struct far *far = host->legs[leg].far;

    if (!far)
        return true;
    far_leave(far);
    if (host->farm->legs[host->legs[leg].path].claims)
        return true;
    if (!far_is_over(far) || (far_is_doubtful(far) && !eager && !farm_chance(host->farm, 100)))
        return false;
    far_make_sure(far);
    return true;
}

/* What is on its way through this file of the boot has its effect now, in part or not at all. */
void host_settle(struct host *host, uint32_t index)
{
    if (host->fars[index])
        far_settle(host->fars[index]);
    else
        nv_sim_settle(host->files[index], &host->farm->random);
}

/* A server that knows claims, and can be reached, keeps this host out by itself once the next one has claimed the leg. */
static bool fences_itself(const struct host *host, uint32_t index)
{
    const struct nv_sim_trouble *trouble = nv_sim_trouble(host->files[index]);

    return host->fars[index] && far_knows_claims(host->fars[index]) && !trouble->gone && !trouble->hung;
}

void host_fence_files(struct host *host)
{
    for (uint32_t i = 0; i < host->file_count; i++)
        if (!fences_itself(host, i)) {
            host_settle(host, i);
            farm_fence(host->files[i]);
        }
}

/* The client alone can tell that its server was restarted; it does before anything else happens to a leg. */
static void notice(struct host *host, struct far *far)
{
    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++)
        if (host->legs[leg].far == far)
            tally(TALLY_FAR_RESTART);
    for (uint32_t i = 0; i < NOTICE_STEPS && !far_knows_all(far); i++) {
        nv_sim_step();
        host_turn(host);
        if (farm_chance(host->farm, 300))
            far_step(far);
    }
    if (!far_knows_all(far))
        nv_sim_violation("a client does not notice that its server has gone");
    for (uint64_t at = 0; host->opened && !host->closing && at < host->farm->cells; at += NOTICE_READ) /* is it all there? */
        client_read(host_client(host), at, at + NOTICE_READ < host->farm->cells ? NOTICE_READ : host->farm->cells - at);
}

static void file_rebooted(struct host *host, uint32_t index)
{
    if (host->fars[index])
        notice(host, host->fars[index]);
    else if (nv_object_latch_fault(host->plane, host->objects[index]) != 0) /* as if a restarted kernel told it */
        nv_sim_violation("an object does not latch: %s", nv_last_error());
}

void host_leg_rebooted(struct host *host, uint32_t disk)
{
    const struct sim_disk *lost = nv_sim_disk(host->farm->legs[disk].file);

    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++)
        host->legs[leg].latched |= host->legs[leg].open && host->legs[leg].path == disk && !host->legs[leg].far;
    for (uint32_t i = 0; i < host->file_count; i++)
        if (nv_sim_disk(host->files[i]) == lost)
            file_rebooted(host, i);
}

bool host_far_has_flushed(const struct host *host, uint32_t leg)
{
    return !host->legs[leg].far || (host->attached && far_has_flushed(host->legs[leg].far));
}

bool host_far_is_sound(const struct host *host, uint32_t leg)
{
    return !host->legs[leg].far || far_is_sound(host->legs[leg].far);
}
