/*
 * A mirror's life: memory, attach's beginning, changes of the leg set, the tick, the end; and the front's side of it.
 * The front makes and frees; it talks to the owner by messages and looks at a copy of the state under a lock.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "reactor/plane.h"
#include "reactor/reactor.h"
#include "volume/mirror_state.h"

static void ticked(struct nv_ticker *ticker, uint64_t now_ns);

/* --- the front --- */

static void init_slots(struct nv_mirror *mirror, uint32_t volume)
{
    for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++) {
        mirror->lanes[lane].failed.event = (nv_event){.kind = NV_EVENT_LEG_FAILED, .volume = volume};
        mirror->lanes[lane].stopped.event = (nv_event){.kind = NV_EVENT_LEG_STOPPED, .volume = volume};
        mirror->lanes[lane].done.event = (nv_event){.kind = NV_EVENT_RESYNC_DONE, .volume = volume};
    }
    mirror->attached.event = (nv_event){.kind = NV_EVENT_VOLUME_ATTACHED, .volume = volume};
    mirror->fenced_event.event = (nv_event){.kind = NV_EVENT_VOLUME_FENCED, .volume = volume};
    mirror->relabelled.event = (nv_event){.kind = NV_EVENT_LEG_CHANGED, .volume = volume};
    mirror->copier.repair_event.event = (nv_event){.kind = NV_EVENT_READ_REPAIRED, .volume = volume};
}

int nv_mirror_create(struct nv_volume *volume, struct nv_map *map, struct nv_reactor *owner)
{
    struct nv_mirror *mirror = calloc(1, sizeof *mirror);

    if (!mirror)
        return -ENOMEM;
    pthread_mutex_init(&mirror->shown_lock, NULL);
    mirror->volume = volume;
    mirror->order = &volume->ranges;
    mirror->reactor = owner;
    mirror->attaching = true;
    mirror->epoch = map->epoch;
    mirror->generation = map->generation;
    memcpy(mirror->uuid, map->uuid, sizeof mirror->uuid);
    nv_queue_init(&mirror->held);
    nv_queue_init(&mirror->parked);
    nv_queue_init(&mirror->reads);
    nv_queue_init(&mirror->starved);
    mirror->commands_tail = &mirror->commands;
    mirror->late.run = nv_mirror_pump_due;
    init_slots(mirror, volume->id);
    for (uint32_t i = 0; i < map->leg_count; i++) {
        map->legs[i].lane = i;
        map->by_lane[i] = &map->legs[i];
        nv_lane_counts_faults(mirror, i, &map->legs[i]);
        mirror->lanes[i].id = map->legs[i].id;
        mirror->used |= nv_lane_bit(i);
        mirror->lanes[i].state = map->legs[i].state == NV_LEG_IN_SYNC ? NV_LANE_IN_SYNC : NV_LANE_STALE;
        mirror->in_sync |= map->legs[i].state == NV_LEG_IN_SYNC ? nv_lane_bit(i) : 0;
    }
    if (nv_intent_create(&mirror->intent, map->size, map->mirror.region_shift) == 0 &&
        nv_mirror_io_create(mirror) == 0) {
        volume->mirror = mirror;
        return 0;
    }
    nv_mirror_free(mirror);
    return -ENOMEM;
}

void nv_mirror_free(struct nv_mirror *mirror)
{
    nv_mirror_io_free(mirror);
    nv_intent_free(&mirror->intent);
    pthread_mutex_destroy(&mirror->shown_lock);
    free(mirror);
}

static struct nv_map_leg *find_leg(const struct nv_map *map, uint32_t id)
{
    for (uint32_t i = 0; i < map->leg_count; i++)
        if (map->legs[i].id == id)
            return &map->legs[i];
    return NULL;
}

static int free_lane(const struct nv_map *from, const struct nv_map *to)
{
    for (int lane = 0; lane < (int)NV_LEGS_MAX; lane++)
        if (!from->by_lane[lane] && !to->by_lane[lane])
            return lane;
    return -1;
}

int nv_mirror_check_change(const struct nv_map *from, struct nv_map *to)
{
    if (!from->legs || !to->legs)
        return nv_fail(EINVAL, "a running volume cannot begin or cease to be a mirror; close it first");
    if (to->size != from->size || to->mirror.region_shift != from->mirror.region_shift)
        return nv_fail(EINVAL, "a running mirror keeps its size and its regions; close it first");
    if (memcmp(to->uuid, from->uuid, sizeof to->uuid) != 0 || to->epoch != from->epoch)
        return nv_fail(EINVAL, "a change is for the same VVol at the same epoch");
    for (uint32_t i = 0; i < to->leg_count; i++) {
        const struct nv_map_leg *old = find_leg(from, to->legs[i].id);
        if (old)
            to->by_lane[to->legs[i].lane = old->lane] = &to->legs[i];
        else if (to->legs[i].state != NV_LEG_STALE)
            return nv_fail(EINVAL, "leg %u is new and said to be in sync", to->legs[i].id);
    }
    for (uint32_t i = 0; i < to->leg_count; i++) {
        int lane = find_leg(from, to->legs[i].id) ? 0 : free_lane(from, to);
        if (lane < 0)
            return nv_fail(EAGAIN, "the legs that leave and those that come are more than %u", NV_LEGS_MAX);
        if (!find_leg(from, to->legs[i].id))
            to->by_lane[to->legs[i].lane = (uint32_t)lane] = &to->legs[i];
    }
    return 0;
}

int nv_mirror_send_command(struct nv_volume *volume, enum nv_mirror_command_kind kind, uint32_t leg, bool option,
                           uint64_t generation, uint64_t token)
{
    struct nv_mirror_command *command;

    if (!volume->mirror)
        return nv_fail(EINVAL, "volume %u is not a mirror", volume->id);
    command = calloc(1, sizeof *command);
    if (!command)
        return nv_fail(ENOMEM, "no memory for a command to a mirror");
    command->mirror = volume->mirror;
    command->kind = kind;
    command->leg = leg;
    command->option = option;
    command->generation = generation;
    command->done.event = (nv_event){.kind = kind == NV_MIRROR_VERIFY ? NV_EVENT_VERIFY_DONE : NV_EVENT_LEG_CHANGED,
                                     .token = token, .volume = volume->id};
    command->done.subject = command;
    command->message.run = nv_mirror_command_arrives;
    nv_reactor_send(volume->mirror->reactor, &command->message);
    return 0;
}

void nv_mirror_look(struct nv_mirror *mirror, nv_mirror_status *out)
{
    pthread_mutex_lock(&mirror->shown_lock);
    *out = mirror->shown;
    pthread_mutex_unlock(&mirror->shown_lock);
}

uint64_t nv_mirror_faults(const struct nv_mirror *mirror)
{
    return mirror->sole_faults;
}

struct nv_reactor *nv_mirror_owner(const struct nv_mirror *mirror)
{
    return mirror->reactor;
}

/* --- the owner --- */

static void count_regions(const struct nv_mirror *mirror, nv_mirror_status *out)
{
    const struct nv_intent *intent = &mirror->intent;

    for (uint32_t region = 0; region < intent->regions; region++)
        NV_EACH_LANE(lane, intent->dirty[region] & ~intent->copied[region])
            out->legs[lane].dirty_regions++;
    out->regions = intent->regions;
    out->intents = intent->set_count;
    out->doubtful = intent->doubtful_count;
}

void nv_mirror_show(struct nv_mirror *mirror)
{
    nv_mirror_status out = {.copied_bytes = mirror->copier.copied_bytes, .repairs = mirror->copier.repaired};
    nv_leg_status by_lane[NV_LEGS_MAX];

    out.flags = (mirror->attaching ? NV_MIRROR_ATTACHING : 0) | (nv_mirror_frozen(mirror) ? NV_MIRROR_FROZEN : 0) |
                (mirror->expired ? NV_MIRROR_EXPIRED : 0) | (mirror->fenced ? NV_MIRROR_FENCED : 0);
    count_regions(mirror, &out);
    memcpy(by_lane, out.legs, sizeof by_lane);
    memset(out.legs, 0, sizeof out.legs);
    NV_EACH_LANE(lane, nv_lanes_used(mirror)) {
        const struct nv_lane *at = &mirror->lanes[lane];
        out.legs[out.leg_count++] = (nv_leg_status){
            .id = at->id, .state = at->state, .outstanding = at->outstanding,
            .dirty_regions = by_lane[lane].dirty_regions, .reads = at->reads, .latency_ns = at->latency_ns};
    }
    pthread_mutex_lock(&mirror->shown_lock);
    mirror->shown = out;
    pthread_mutex_unlock(&mirror->shown_lock);
}

static void mirror_opens(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_mirror *mirror = (struct nv_mirror *)((char *)message - offsetof(struct nv_mirror, open_message));

    reactor->mirrors++;
    mirror->ticker.tick = ticked;
    nv_reactor_add_ticker(reactor, &mirror->ticker);
    mirror->now_ms = mirror->swept_ms = nv_io_now_ns(reactor->io) / 1000000u;
    nv_mirror_pump(mirror); /* the first task is to attach */
    nv_mirror_show(mirror);
}

void nv_mirror_send_open(struct nv_mirror *mirror)
{
    mirror->open_message.run = mirror_opens;
    nv_reactor_send(mirror->reactor, &mirror->open_message);
}

static void remove_leg(struct nv_mirror *mirror, uint32_t lane)
{
    struct nv_lane *at = &mirror->lanes[lane];
    const uint8_t bit = nv_lane_bit(lane);

    if (at->resync && mirror->task.command != at->resync) {
        nv_mirror_end_command(mirror, at->resync, -ECANCELED);
        at->resync = NULL;
    }
    mirror->in_sync &= (uint8_t)~bit;
    mirror->promoting &= (uint8_t)~bit;
    mirror->syncing &= (uint8_t)~bit;
    mirror->failing &= (uint8_t)~bit;
    mirror->committed &= (uint8_t)~bit;
    mirror->losses++;
    at->state = NV_LANE_UNUSED;
    at->id = 0;
    mirror->used &= (uint8_t)~bit;
    at->label_sequence = 0;
    nv_mirror_abandon(mirror, lane);
    nv_mirror_choose_primary(mirror);
    nv_intent_forget(mirror, bit);
    mirror->reads_due = true;
}

static bool same_storage(const struct nv_map_leg *a, const struct nv_map_leg *b)
{
    return a->meta == b->meta && a->meta_offset == b->meta_offset && a->object_count == b->object_count &&
           memcmp(a->objects, b->objects, a->object_count * sizeof *a->objects) == 0;
}

/* A leg that gets what is written keeps its objects: what is not durable yet is known to them. */
static bool keeps_storage(const struct nv_mirror *mirror, const struct nv_map *from, const struct nv_map *to, uint32_t lane)
{
    if (!to->by_lane[lane]->meta)
        return false;
    return !(nv_lanes_live(mirror) & nv_lane_bit(lane)) || same_storage(from->by_lane[lane], to->by_lane[lane]);
}

void nv_mirror_changed(struct nv_mirror *mirror, const struct nv_map *from, const struct nv_map *to)
{
    NV_EACH_LANE(lane, nv_lanes_used(mirror)) {
        if (!to->by_lane[lane])
            remove_leg(mirror, lane);
        else if (!keeps_storage(mirror, from, to, lane) && !nv_mirror_fault(mirror, lane, -ENODEV))
            mirror->in_sync = 0; /* the last one is gone, and the front says so */
    }
    for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++) {
        if (!to->by_lane[lane] || mirror->lanes[lane].id)
            continue;
        mirror->lanes[lane].id = to->by_lane[lane]->id;
        mirror->used |= nv_lane_bit(lane);
        mirror->lanes[lane].state = NV_LANE_STALE;
        nv_intent_dirty_all(mirror, nv_lane_bit(lane));
    }
    if (to->generation > mirror->generation)
        mirror->generation = to->generation;
    mirror->broken |= mirror->in_sync == 0;
    mirror->relabel_due = true;
    nv_mirror_pump(mirror);
    nv_mirror_show(mirror);
}

void nv_mirror_closes(struct nv_mirror *mirror)
{
    mirror->closing = true;
    mirror->reads_due = true;
    nv_mirror_pump(mirror);
}

static void mirror_ends(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_mirror *mirror = (struct nv_mirror *)((char *)message - offsetof(struct nv_mirror, end_message));

    (void)reactor;
    assert(!mirror->held.first && !mirror->parked.first && !mirror->reads.first && !mirror->starved.first);
    mirror->end_wanted = true;
    nv_mirror_pump(mirror);
}

void nv_mirror_send_end(struct nv_mirror *mirror)
{
    mirror->end_message.run = mirror_ends;
    nv_reactor_send(mirror->reactor, &mirror->end_message);
}

/* --- the tick --- */

/* Regions that nobody touched since the last sweep lose their bit, if the flush of the next pass succeeds. */
static void sweep(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    mirror->swept_ms = mirror->now_ms;
    if (mirror->task.kind == NV_TASK_CLEAN || nv_mirror_frozen(mirror) || mirror->attaching)
        return;
    for (uint32_t region = 0; region < intent->regions && intent->set_count > 0; region++) {
        const uint8_t state = intent->state[region];
        intent->state[region] &= (uint8_t)~NV_REGION_TOUCHED;
        if (state != NV_REGION_SET || intent->in_flight[region] > 0) /* touched and doubtful ones are more than SET */
            continue;
        nv_intent_set_state(intent, region, NV_REGION_CLEANING);
        mirror->clean_due = true;
    }
}

static bool needs_tick(const struct nv_mirror *mirror)
{
    return mirror->active || mirror->intent.set_count > 0 || nv_mirror_frozen(mirror) || nv_copier_has_work(mirror);
}

static void ticked(struct nv_ticker *ticker, uint64_t now_ns)
{
    struct nv_mirror *mirror = (struct nv_mirror *)((char *)ticker - offsetof(struct nv_mirror, ticker));
    const nv_desc_mirror *policy = &nv_mirror_map(mirror)->mirror;

    if (!mirror->tick_wanted)
        return;
    mirror->tick_wanted = false;
    mirror->now_ms = now_ns / 1000000u;
    nv_mirror_check_deadlines(mirror);
    if (nv_mirror_frozen(mirror) && mirror->now_ms - mirror->frozen_ms >= policy->hold_deadline_ms)
        mirror->expired = true;
    if (mirror->now_ms - mirror->swept_ms >= policy->intent_idle_ms)
        sweep(mirror);
    nv_copier_tick(mirror);
    mirror->requests_seen = 0;
    if (needs_tick(mirror))
        nv_mirror_wake_tick(mirror);
    nv_mirror_show(mirror);
    nv_mirror_pump(mirror);
}

void nv_mirror_wake_tick(struct nv_mirror *mirror)
{
    if (mirror->tick_wanted)
        return;
    mirror->tick_wanted = true;
    mirror->now_ms = nv_io_now_ns(mirror->reactor->io) / 1000000u;
    nv_reactor_want_tick(mirror->reactor);
}
