/*
 * The front's side of a volume's log (logged.h): opening, words to the owner, a look at it. The owner calls
 * nv_logged_tell_opened() and nv_logged_show() alone.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "reactor/plane.h"
#include "reactor/pool.h"
#include "volume/logged_state.h"

_Static_assert(NV_LOG_STATE_CLOSED == NV_LOG_CLOSED && NV_LOG_STATE_RECOVERING == NV_LOG_RECOVERING &&
                   NV_LOG_STATE_THROUGH == NV_LOG_THROUGH && NV_LOG_STATE_SERVING == NV_LOG_SERVING &&
                   NV_LOG_STATE_FAILED == NV_LOG_FAILED && NV_LOG_STATE_VOID == NV_LOG_VOID,
               "the API names the log's own states");

/* ---- making and freeing ---- */

static void init_events(struct nv_logged *logged, uint64_t token)
{
    const uint32_t volume = logged->volume->id;

    logged->opened.event = (nv_event){.kind = NV_EVENT_LOG_OPENED, .volume = volume, .token = token};
    logged->opened.subject = logged;
    logged->rests.event = (nv_event){.kind = NV_EVENT_LOG_RESTS, .volume = volume, .args = {logged->object->id}};
    logged->rests.subject = logged;
    logged->drained.event = (nv_event){.kind = NV_EVENT_LOG_DRAINED, .volume = volume};
    logged->drained.subject = logged;
    logged->failed.event = (nv_event){.kind = NV_EVENT_LOG_FAILED, .volume = volume};
    logged->lost.event = (nv_event){.kind = NV_EVENT_LOG_LOST, .volume = volume};
    logged->word.event = (nv_event){.kind = NV_EVENT_LOG_NEEDS_WORD, .volume = volume};
    logged->allow = (struct nv_logged_command){.logged = logged, .kind = NV_LOGGED_ALLOW};
    logged->drain = (struct nv_logged_command){.logged = logged, .kind = NV_LOGGED_DRAIN};
    logged->forget = (struct nv_logged_command){.logged = logged, .kind = NV_LOGGED_FORGET};
    logged->limit = (struct nv_logged_command){.logged = logged, .kind = NV_LOGGED_LIMIT};
}

static void init_slots(struct nv_logged *logged)
{
    for (uint32_t i = 0; i < 2; i++)
        logged->slots[i].waiting_last = &logged->slots[i].waiting;
    for (uint32_t i = 0; i < NV_LOGGED_SLOTS; i++) {
        struct nv_logged_slot *slot = &logged->all[i];
        struct nv_logged_slots *slots = &logged->slots[i < NV_LOGGED_READ_SLOTS];
        slot->logged = logged;
        slot->block = logged->memory + i * (uint64_t)NV_LOG_UNIT;
        slot->log.done = nv_logged_part_done;
        slot->next = slots->free;
        slots->free = slot;
    }
    for (uint32_t i = 0; i < NV_LOGGED_SLOTS + NV_LOGGED_OWN; i++) {
        logged->below[i].next = logged->free_below;
        logged->free_below = &logged->below[i];
    }
    for (uint64_t i = logged->block_total; i > NV_LOGGED_SLOTS; i--)
        logged->blocks[logged->block_count++] = logged->memory + (i - 1) * NV_LOG_UNIT;
    logged->landed_last = &logged->landed_first;
    logged->starved_last = &logged->starved_first;
}

static void free_logged(struct nv_logged *logged)
{
    if (logged->log)
        nv_log_free(logged->log);
    nv_logged_free_below(logged);
    if (logged->object)
        logged->object->users--;
    pthread_mutex_destroy(&logged->shown_lock);
    free(logged->all);
    free(logged);
}

/* What hangs keeps its memory and its object; events of one reactor come in order, so LOG_RESTS is still to come. */
static void let_go(struct nv_logged *logged)
{
    if (logged->hangs)
        logged->orphan = true;
    else
        free_logged(logged);
}

void nv_logged_opened(struct nv_logged *logged, uint64_t verdict)
{
    logged->hangs = verdict == NV_LOG_HANGS;
}

void nv_logged_rests(struct nv_logged *logged)
{
    assert(logged->hangs);
    logged->hangs = false;
    if (logged->orphan)
        free_logged(logged);
}

void nv_logged_free_all(struct nv_volume *volume)
{
    if (volume->logged)
        let_go(volume->logged);
    for (struct nv_logged *logged = volume->retired, *next; logged; logged = next) {
        next = logged->retired;
        free_logged(logged);
    }
}

static int create_log(struct nv_logged *logged, uint64_t offset, uint64_t length, const nv_log_policy *policy)
{
    const struct nv_map *map = logged->volume->latest;
    struct nv_log_config config = {
        .io = logged->reactor->io, .handle = logged->object->handle, .offset = offset, .discard = policy->discard != 0,
        .anew = policy->beside != 0,
        .size = map->size, .bypass_bytes = policy->bypass_bytes, .stream_bytes = policy->stream_bytes,
        .age_ms = policy->age_ms, .deadline_ms = policy->deadline_ms, .rate = policy->destage_rate, .context = logged, .below = nv_logged_below,
        .event = nv_logged_event,
        .claim = {.epoch = map->epoch, .generation = map->generation, .length = length, .dirty = policy->dirty != 0},
    };

    memcpy(config.claim.uuid, map->uuid, sizeof config.claim.uuid);
    memcpy(config.claim.id, policy->id, sizeof config.claim.id);
    memcpy(config.fresh, policy->fresh, sizeof config.fresh);
    memcpy(config.begin, policy->begin, sizeof config.begin);
    return nv_log_create(&config, &logged->log);
}

/* ---- may there be a log? ---- */

static int check_runs(const struct nv_run *runs, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (runs[i].state != NV_RUN_MAPPED)
            return nv_fail(EINVAL, "%" PRIu64 " bytes at %" PRIu64 " have no storage that what is logged could be carried to",
                           runs[i].length, runs[i].offset);
    return 0;
}

static int check_map(const struct nv_map *map)
{
    int error = 0;

    if (map->flags & NV_VOLUME_READ_ONLY)
        return nv_fail(EINVAL, "a read-only volume has no use for a write-back log");
    if (map->block_min > NV_LOG_UNIT)
        return nv_fail(EINVAL, "a minimum block of %u is above %u, the log's", map->block_min, NV_LOG_UNIT);
    if (!map->legs)
        return check_runs(map->runs, map->run_count);
    for (uint32_t i = 0; i < map->leg_count && !error; i++)
        error = check_runs(map->legs[i].runs, map->legs[i].run_count);
    return error;
}

static int check_object(const struct nv_map *map, const struct nv_object *object, uint64_t offset, uint64_t length)
{
    const uint64_t size = atomic_load(&object->size);

    if (object->kind != NV_KIND_FILE || (object->flags & NV_OBJECT_READ_ONLY) || object->closing)
        return nv_fail(EINVAL, "object %u is not a file or device of this host that can be written", object->id);
    for (uint32_t i = 0; i < map->object_count; i++)
        if (map->objects[i] == object)
            return nv_fail(EINVAL, "object %u holds bytes of the volume itself", object->id);
    if (offset % NV_LOG_UNIT || offset > size || length > size - offset)
        return nv_fail(ERANGE, "[%" PRIu64 ", +%" PRIu64 ") is outside object %u of %" PRIu64 " bytes, or not aligned to %u",
                       offset, length, object->id, size, NV_LOG_UNIT);
    return 0;
}

static int check_limits(const nv_log_policy *policy)
{
    if (policy->bypass_bytes > NV_LOG_BYPASS_MAX)
        return nv_fail(EINVAL, "writes of %u bytes are the smallest to bypass the log; at most %u are possible",
                       policy->bypass_bytes, NV_LOG_BYPASS_MAX);
    return 0;
}

static int check_policy(uint64_t length, const nv_log_policy *policy)
{
    if (length < NV_LOG_RING + NV_LOG_RING_MIN || length - NV_LOG_RING > NV_LOG_RING_MAX)
        return nv_fail(EINVAL, "a log of %" PRIu64 " bytes; %u to %" PRIu64 " are possible", length,
                       NV_LOG_RING + NV_LOG_RING_MIN, (uint64_t)NV_LOG_RING_MAX + NV_LOG_RING);
    return check_limits(policy);
}

int nv_logged_check_change(const struct nv_volume *volume, const struct nv_map *to)
{
    const struct nv_map *from = volume->latest;
    int error;

    if (!volume->logged)
        return 0;
    if ((error = check_map(to)))
        return error;
    if (memcmp(to->uuid, from->uuid, sizeof to->uuid) != 0 || to->epoch != from->epoch)
        return nv_fail(EINVAL, "volume %u has a log: a change is for the same VVol at the same epoch", volume->id);
    if (to->size < from->size || (to->size > from->size && from->size % NV_LOG_UNIT))
        return nv_fail(EBUSY, "volume %u of %" PRIu64 " bytes has a log: it cannot shrink, and grows from a multiple of %u",
                       volume->id, from->size, NV_LOG_UNIT);
    return 0;
}

/* ---- the API ---- */

static int find(nv_plane *plane, uint32_t number, struct nv_volume **out)
{
    struct nv_volume *volume = *out = nv_table_get(&plane->volumes, number);

    return volume && !volume->closing ? 0 : nv_fail(ENOENT, "volume %u is not open", number);
}

static int check_volume(const struct nv_volume *volume, const nv_log_policy *policy)
{
    if (volume->logged)
        return nv_fail(EALREADY, "volume %u has a log", volume->id);
    if (volume->map_changes)
        return nv_fail(EBUSY, "a change of volume %u is under way", volume->id);
    if (policy->beside && policy->dirty)
        return nv_fail(EINVAL, "a log that holds data of volume %u is opened before its first connection", volume->id);
    if (volume->served && !policy->beside)
        return nv_fail(EBUSY, "volume %u is in use: its log is opened before its first connection, or beside it", volume->id);
    return check_map(volume->latest);
}

/* No connection has come: its first will bring this to the reactors. */
static void put_before(struct nv_logged *logged)
{
    struct nv_volume *volume = logged->volume;

    for (uint32_t i = 0; i < volume->plane->config.reactors; i++) {
        volume->locals[i].layers |= NV_LAYER_LOG;
        volume->locals[i].gate.widens = true;
        volume->locals[i].logged = logged;
    }
    logged->before = true;
}

int nv_volume_log_open(nv_plane *plane, uint32_t number, uint32_t object_number, uint64_t offset, uint64_t length,
                       const nv_log_policy *policy, uint64_t token)
{
    struct nv_object *object = nv_table_get(&plane->objects, object_number);
    struct nv_logged *logged;
    struct nv_volume *volume;
    int error = find(plane, number, &volume);

    if (error || (error = check_volume(volume, policy)) || (error = check_policy(length, policy)))
        return error;
    if (!object)
        return nv_fail(ENOENT, "object %u is not open", object_number);
    if ((error = check_object(volume->latest, object, offset, length)))
        return error;
    logged = calloc(1, sizeof *logged);
    if (!logged)
        return nv_fail(ENOMEM, "no memory for a write-back log");
    pthread_mutex_init(&logged->shown_lock, NULL);
    logged->volume = volume;
    logged->reactor = nv_plane_reactor(plane, number % plane->config.reactors);
    logged->object = object;
    object->users++;
    logged->all = calloc(NV_LOGGED_SLOTS, sizeof *logged->all);
    logged->below = calloc(NV_LOGGED_SLOTS + NV_LOGGED_OWN, sizeof *logged->below);
    logged->block_total = (uint64_t)NV_LOGGED_SLOTS * (volume->mirror ? NV_LEGS_MAX : 1);
    logged->blocks = calloc(logged->block_total, sizeof *logged->blocks);
    logged->memory = nv_pages_map(logged->block_total * NV_LOG_UNIT);
    error = logged->all && logged->below && logged->blocks && logged->memory ? create_log(logged, offset, length, policy)
                                                                              : -ENOMEM;
    if (error) {
        free_logged(logged);
        return nv_fail(-error, "a write-back log of %" PRIu64 " bytes: %s", length, strerror(-error));
    }
    init_events(logged, token);
    init_slots(logged);
    nv_logged_show(logged);
    volume->logged = logged;
    if (!policy->beside)
        put_before(logged);
    nv_logged_send_open(logged);
    return 0;
}

static int find_log(nv_plane *plane, uint32_t number, struct nv_logged **out)
{
    struct nv_volume *volume;
    int error = find(plane, number, &volume);

    if (!error && !volume->logged)
        error = nv_fail(EINVAL, "volume %u has no log", number);
    if (!error)
        *out = volume->logged;
    return error;
}

static int say(struct nv_logged *logged, struct nv_logged_command *command, uint64_t token)
{
    if (logged->volume->switching)
        return nv_fail(EALREADY, "the log of volume %u is on its way in or out", logged->volume->id);
    if (atomic_load(&command->sent))
        return nv_fail(EALREADY, "the log of volume %u has not heard the same word yet", logged->volume->id);
    atomic_store(&command->sent, true);
    command->token = token;
    nv_logged_send(logged, command);
    return 0;
}

int nv_volume_log_allow(nv_plane *plane, uint32_t number)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);

    return error ? error : say(logged, &logged->allow, 0);
}

int nv_volume_log_limit(nv_plane *plane, uint32_t number, const nv_log_policy *policy)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);

    if (error || (error = check_limits(policy)))
        return error;
    if (!atomic_load(&logged->limit.sent))
        logged->limits = *policy;
    return say(logged, &logged->limit, 0);
}

int nv_volume_log_forget(nv_plane *plane, uint32_t number)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);

    return error ? error : say(logged, &logged->forget, 0);
}

int nv_volume_log_drain(nv_plane *plane, uint32_t number, uint64_t token)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);

    if (!error && logged->asked_to_drain)
        error = nv_fail(EALREADY, "the log of volume %u is being drained", number);
    if (!error)
        error = say(logged, &logged->drain, token);
    if (!error)
        logged->asked_to_drain = true;
    return error;
}

static int begin_switch(nv_plane *plane, uint32_t number, bool in, uint64_t token)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);

    if (!error && logged->volume->switching)
        error = nv_fail(EALREADY, "the log of volume %u is on its way in or out", number);
    if (!error && in && logged->before)
        error = nv_fail(EALREADY, "the log of volume %u is before it", number);
    if (!error && !in && logged->asked_to_drain)
        error = nv_fail(EBUSY, "the log of volume %u is being drained", number);
    return error ? error : nv_switch_begin(logged->volume, in, token);
}

int nv_volume_log_attach(nv_plane *plane, uint32_t number, uint64_t token)
{
    return begin_switch(plane, number, true, token);
}

int nv_volume_log_detach(nv_plane *plane, uint32_t number, uint64_t token)
{
    return begin_switch(plane, number, false, token);
}

void nv_logged_switched(struct nv_logged *logged, bool in)
{
    struct nv_volume *volume = logged->volume;

    if (in) {
        logged->before = true;
        return;
    }
    volume->logged = NULL;
    if (logged->hangs) {
        logged->orphan = true;
        return;
    }
    logged->object->users--;
    logged->object = NULL;
    if (logged->kept == 0) {
        free_logged(logged);
        return;
    }
    logged->retired = volume->retired;
    volume->retired = logged;
}

void nv_logged_drained(struct nv_logged *logged)
{
    logged->asked_to_drain = false;
}

struct nv_reactor *nv_logged_owner(const struct nv_logged *logged)
{
    return logged->reactor;
}

/* ---- what the owner tells ---- */

void nv_logged_tell_opened(struct nv_logged *logged)
{
    const struct nv_log_found *found = nv_log_found(logged->log);
    nv_event *event = &logged->opened.event;

    event->result = found->error;
    event->args[0] = found->verdict;
    event->args[1] = found->dirty_bytes;
    event->args[2] = found->records;
    memcpy(&event->args[3], found->super.id, sizeof found->super.id);
    nv_events_raise(&logged->reactor->events, &logged->opened);
}

void nv_logged_show(struct nv_logged *logged)
{
    struct nv_log_look look;

    nv_log_look(logged->log, &look);
    pthread_mutex_lock(&logged->shown_lock);
    logged->shown = (nv_log_status){
        .state = look.state, .ring_bytes = look.ring_bytes, .used_bytes = look.used_bytes,
        .dirty_bytes = look.dirty_blocks * NV_LOG_UNIT, .lost_bytes = look.lost_blocks * NV_LOG_UNIT,
        .oldest_age_ms = look.oldest_age_ms, .held = look.held, .blocked = look.blocked, .logged = look.logged,
        .groups = look.groups, .syncs = look.syncs, .bypassed = look.bypassed, .tombstones = look.tombstones,
        .destaged_bytes = look.destaged * NV_LOG_UNIT, .merged_bytes = look.merged * NV_LOG_UNIT,
    };
    pthread_mutex_unlock(&logged->shown_lock);
}

bool nv_logged_show_lost(struct nv_logged *logged, const struct nv_log_look *look)
{
    int count;

    if (logged->lost_shown[0] == look->lost_blocks && logged->lost_shown[1] == look->losses)
        return false;
    count = nv_log_lost(logged->log, logged->lost_fresh, NV_LOG_LOST_SPANS);
    if (count < 0)
        return true; /* again with the next tick */
    pthread_mutex_lock(&logged->shown_lock);
    memcpy(logged->lost_spans, logged->lost_fresh, (uint32_t)count * sizeof *logged->lost_spans);
    logged->lost_count = (uint32_t)count;
    pthread_mutex_unlock(&logged->shown_lock);
    logged->lost_shown[0] = look->lost_blocks;
    logged->lost_shown[1] = look->losses;
    return true;
}

int nv_volume_log_lost(nv_plane *plane, uint32_t number, nv_log_span *out, uint32_t capacity)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);
    uint32_t count;

    if (error)
        return error;
    pthread_mutex_lock(&logged->shown_lock);
    count = logged->lost_count < capacity ? logged->lost_count : capacity;
    for (uint32_t i = 0; i < count; i++)
        out[i] = (nv_log_span){logged->lost_spans[i].offset, logged->lost_spans[i].length};
    pthread_mutex_unlock(&logged->shown_lock);
    return (int)count;
}

int nv_volume_log(nv_plane *plane, uint32_t number, nv_log_status *out)
{
    struct nv_logged *logged;
    int error = find_log(plane, number, &logged);

    if (error)
        return error;
    pthread_mutex_lock(&logged->shown_lock);
    *out = logged->shown;
    pthread_mutex_unlock(&logged->shown_lock);
    return 0;
}

const char *nv_log_verdict_word(uint32_t verdict)
{
    return verdict <= NV_LOG_HANGS ? nv_log_verdict_name(verdict) : "unknown";
}
