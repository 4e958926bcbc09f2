/*
 * A host's write-back log in front of its mirror (host.h), and what control knows of it: who holds data of the volume. In
 * some seeds the log's own disk refuses writes, and hangs until it is given up (then clients may be told of errors); its reads
 * do not fail but for that, and its syncs do not lie: what is lost by worse disks is judged in nvlog.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "log/scan.h"
#include "sim/host.h"

#define TOKEN_LOG 2010u
#define TOKEN_DRAIN 2011u

static void draw_id(struct farm *farm, uint8_t id[16])
{
    for (uint32_t i = 0; i < 16; i++)
        id[i] = (uint8_t)sim_random_next(&farm->log.random);
}

static void start_log(struct host *host, bool beside)
{
    struct farm *farm = host->farm;
    const uint32_t align = farm->cell_bytes == SIM_SECTOR ? SIM_SECTOR : 1; /* transfers are cut short at cells */
    nv_log_policy policy = farm->log.policy;

    policy.beside = beside;
    policy.dirty = farm->log.dirty && farm->log.host == host->index; /* another's: it is deposed already */
    policy.discard = farm->log.given_up[host->index];
    memcpy(policy.id, farm->log.id, sizeof policy.id);
    draw_id(farm, policy.fresh);
    draw_id(farm, policy.begin);
    host->log_file = nv_sim_file_again(farm->log.files[host->index]);
    if (nv_object_open(host->plane, host->log_file, align > 1 ? NV_OBJECT_DIRECT : 0, align, farm->log.size,
                       &host->log_object) != 0 ||
        nv_volume_log_open(host->plane, host->volume, host->log_object, 0, farm->log.size, &policy, TOKEN_LOG) != 0)
        nv_sim_violation("the log of a mirror does not open: %s", nv_last_error());
    host->log_open = true;
    host->log_before = !beside;
    nv_sim_trouble(host->log_file)->hung = policy.deadline_ms && sim_random_chance(&farm->log.bad_luck, 100);
}

void host_open_log(struct host *host)
{
    struct farm *farm = host->farm;

    if (farm->log.size && (farm->log.dirty || sim_random_chance(&farm->log.random, 800)))
        start_log(host, false);
}

static bool has_epoch(const struct host *host)
{
    return !host->deposed && !host->closing && host->epoch == host->farm->registry.epoch;
}

static bool counts(const struct host *host)
{
    return host->log_found && has_epoch(host);
}

/* Control commits that this log holds data of the volume, then it may. */
static void allow(struct host *host)
{
    struct farm *farm = host->farm;

    assert(!farm->log.dirty || farm->log.host == host->index);
    farm->log.dirty = true;
    farm->log.host = host->index;
    memcpy(farm->log.id, host->log_id, sizeof farm->log.id);
    (void)nv_volume_log_allow(host->plane, host->volume); /* perhaps it has not heard the last one */
}

/* A log that holds something does not go out. */
static void switch_log(struct host *host)
{
    if (host->deposed || host->closing || host->changing)
        return;
    if (host->farm->log.dirty && !(host->log_before && sim_random_chance(&host->farm->log.random, 128)))
        return;
    host->switching = true;
    if (!host->log_open)
        start_log(host, true);
    else if (nv_volume_log_detach(host->plane, host->volume, TOKEN_DRAIN) != 0)
        nv_sim_violation("the log of a mirror does not go out: %s", nv_last_error());
}

void host_drain_or_allow(struct host *host)
{
    if (!host->farm->log.size || !host->opened || host->draining || host->log_failed || host->switching)
        return;
    if (!host->log_open || (host->log_found && sim_random_chance(&host->farm->log.random, 400))) {
        switch_log(host);
        return;
    }
    if (!counts(host) || !host->log_before)
        return;
    if (sim_random_chance(&host->farm->log.random, 700))
        allow(host);
    else
        host->draining = nv_volume_log_drain(host->plane, host->volume, TOKEN_DRAIN) == 0;
}

static void drained(struct host *host, const nv_event *event)
{
    host->draining = false;
    if (event->result == 0 && counts(host))
        host->farm->log.dirty = false;
    if (event->result == 0 && host->log_failed)
        tally(TALLY_LOG_VOID);
}

/* What hung as the log was opened uses it until it ends. */
static void close_object(struct host *host)
{
    const int error = nv_object_close(host->plane, host->log_object, TOKEN_LOG);

    if (error != 0 && !(error == -EBUSY && host->log_hung))
        nv_sim_violation("the object of a log that is out does not close: %s", nv_last_error());
    host->log_hung = false;
}

/* A log that could not go in, for what is under way takes too long, goes out again one day. */
static void switched(struct host *host, const nv_event *event)
{
    const bool in = event->kind == NV_EVENT_LOG_ATTACHED;

    host->switching = false;
    if (event->result != 0 && event->result != -ETIMEDOUT && event->result != -EBUSY &&
        !(host->farm->log.troubled && event->result == -EINVAL)) /* it has failed before it was in */
        nv_sim_violation("the log of a mirror does not go in or out: %d", event->result);
    tally(event->result != 0 ? TALLY_LOG_STAYS : in ? TALLY_LOG_IN : TALLY_LOG_OUT);
    if (event->result != 0)
        return;
    host->log_before = in;
    if (in && counts(host) && sim_random_chance(&host->farm->log.random, 900))
        allow(host);
    if (in)
        return;
    host->log_open = host->log_found = false;
    nv_sim_trouble(host->log_file)->hung = false;
    nv_sim_trouble(host->log_file)->write_error = 0;
    if (has_epoch(host))
        host->farm->log.dirty = false;
    close_object(host);
}

/* What was acknowledged is below. Not even its superblock can say so: control commits that it is never replayed. */
static void forget(struct host *host)
{
    if (!counts(host))
        return;
    tally(TALLY_LOG_FORGOTTEN);
    host->farm->log.dirty = false;
    host->farm->log.given_up[host->index] = true;
    (void)nv_volume_log_forget(host->plane, host->volume);
}

static void failed(struct host *host, const nv_event *event)
{
    const struct farm_log *log = &host->farm->log;

    if (!host->deposed && !log->troubled)
        nv_sim_violation("the log of a mirror fails (%d), and its disk has no trouble", event->result);
    tally(event->result == -ETIMEDOUT ? TALLY_LOG_SLOW : TALLY_LOG_FAILED);
    host->log_failed = true;
}

void host_trouble_log(struct host *host, bool none)
{
    struct farm_log *log = &host->farm->log;
    struct nv_sim_trouble *trouble = host->log_open && !host->deposed ? nv_sim_trouble(host->log_file) : NULL;

    if (!trouble || !log->troubled)
        return;
    trouble->hung = !none && log->policy.deadline_ms && sim_random_chance(&log->bad_luck, 300);
    trouble->write_error = !none && sim_random_chance(&log->bad_luck, 512) ? (uint16_t)sim_random_below(&log->bad_luck, 1025) : 0;
    if (!host->log_found) /* one that is refused for an error would be no news to clients */
        trouble->write_error = 0;
}

/* Its disk fails or hangs as it is opened: the volume is not served; or, if it was opened beside it, goes on without. */
static void refused(struct host *host, uint64_t verdict)
{
    if (!host->farm->log.troubled)
        nv_sim_violation("the log of a mirror is refused: %s, and its disk has no trouble", nv_log_verdict_word((uint32_t)verdict));
    host->log_hung = verdict == NV_LOG_HANGS;
    tally(host->log_hung ? TALLY_LOG_HANGS : TALLY_LOG_FAILED);
    host->failed |= host->log_before;
    if (!host->switching)
        return;
    if (host->closing || nv_volume_log_detach(host->plane, host->volume, TOKEN_DRAIN) != 0)
        host->switching = false;
}

void host_log_event(struct host *host, const nv_event *event)
{
    switch (event->kind) {
    case NV_EVENT_LOG_OPENED:
        if (!host->deposed && (event->args[0] == NV_LOG_HANGS || event->args[0] == NV_LOG_UNREADABLE)) {
            refused(host, event->args[0]);
            break;
        }
        if (!host->deposed && (event->args[0] != 0 || event->result != 0))
            nv_sim_violation("the log of a mirror is refused: %s", nv_log_verdict_word((uint32_t)event->args[0]));
        memcpy(host->log_id, &event->args[3], sizeof host->log_id);
        host->log_found = true;
        host->farm->log.given_up[host->index] &= host->deposed;
        if (host->switching) {
            if (host->closing || nv_volume_log_attach(host->plane, host->volume, TOKEN_DRAIN) != 0)
                host->switching = false;
            break;
        }
        if (counts(host) && sim_random_chance(&host->farm->log.random, 900))
            allow(host);
        break;
    case NV_EVENT_LOG_DRAINED:
        drained(host, event);
        break;
    case NV_EVENT_LOG_ATTACHED:
    case NV_EVENT_LOG_DETACHED:
        switched(host, event);
        break;
    case NV_EVENT_LOG_FAILED:
        failed(host, event);
        break;
    case NV_EVENT_LOG_NEEDS_WORD:
        forget(host);
        break;
    case NV_EVENT_LOG_LOST:
        if (!host->deposed)
            nv_sim_violation("a log of a mirror has lost a block, and its disk can be read");
        break;
    default:
        break;
    }
}

bool host_log_rests(const struct host *host)
{
    nv_log_status status;

    return !host->log_open || !host->log_before ||
           (host->log_found && nv_volume_log(host->plane, host->volume, &status) == 0 && status.dirty_bytes == 0);
}

void host_end_log(struct host *host)
{
    if (!host->log_open)
        return;
    nv_sim_settle(host->log_file, &host->farm->random);
    nv_sim_trouble(host->log_file)->gone = true;
}

/* While a log holds data of the volume it is bound to nobody but the log's host. */
uint32_t farm_some_host(struct farm *farm)
{
    return farm->log.dirty ? farm->log.host : (uint32_t)farm_below(farm, farm->host_count);
}
