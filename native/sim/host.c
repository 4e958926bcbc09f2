/*
 * See host.h. Invariant: a leg's file belongs to one boot of one host; once it is fenced or the host is dead, nothing that
 * goes through it reaches the disk.
 */
#include "sim/host.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim/tally.h"
#include "volume/meta.h"

#define RECORD_BYTES 2048u
#define TOKEN_CHANGE 2000u
#define TOKEN_CLOSE 2001u
#define TOKEN_VERIFY 2002u
#define TOKEN_CACHE 2003u
#define LEASE_TURNS 1000u

static bool tracing(const struct host *host)
{
    return host->farm->rules.trace;
}

/* ---- the description ---- */

static uint8_t *put(uint8_t *to, const void *record, size_t size)
{
    memcpy(to, record, size);
    return to + size;
}

/* A leg's runs, with a hole where nothing is stored. */
static uint8_t *put_runs(const struct host *host, uint32_t leg, uint8_t *to, uint64_t *count)
{
    const struct farm *farm = host->farm;
    const struct farm_leg *at = &farm->legs[leg];

    for (uint32_t i = 0; i < at->run_count; i++) {
        uint64_t cuts[4] = {at->runs[i].offset, farm->zero_from, farm->zero_to, at->runs[i].offset + at->runs[i].length};
        for (uint32_t j = 0; j < 3; j++) {
            uint64_t from = cuts[j] > cuts[0] ? cuts[j] : cuts[0], until = cuts[j + 1] < cuts[3] ? cuts[j + 1] : cuts[3];
            bool zero = j == 1;
            if (from >= until)
                continue;
            nv_desc_run run = {from, until - from, at->runs[i].object_offset + (from - at->runs[i].offset),
                               host->legs[leg].object, zero ? NV_RUN_ZERO : NV_RUN_MAPPED};
            to = put(to, &run, sizeof run);
            ++*count;
        }
    }
    return to;
}

static uint64_t describe(const struct host *host, const nv_legs_record *registry, uint64_t map_to, uint8_t *out)
{
    const struct farm *farm = host->farm;
    nv_desc_header header = {
        .magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .size = farm->size, .epoch = host->epoch,
        .generation = registry->generation, .map_from = map_to - 1, .map_to = map_to, .block_min = farm->block_min,
        .flags = NV_VOLUME_MIRROR, .leg_count = farm->leg_count};
    nv_desc_leg legs[FARM_LEGS];
    nv_desc_meta metas[FARM_LEGS];
    uint8_t *runs = out + sizeof header + farm->leg_count * (sizeof *legs + sizeof *metas) + sizeof farm->policy;
    uint8_t *to = runs;

    memcpy(header.uuid, farm->uuid, sizeof header.uuid);
    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        const struct host_leg *mine = &host->legs[leg];
        const bool in_sync = mine->described && registry->legs[leg].state == NV_LEG_IN_SYNC;
        legs[leg] = (nv_desc_leg){.id = FARM_LEG_ID(leg), .state = in_sync ? NV_LEG_IN_SYNC : NV_LEG_STALE};
        metas[leg] = (nv_desc_meta){.object = 0};
        if (!mine->described)
            continue;
        metas[leg] = (nv_desc_meta){.object = mine->object, .offset = farm->legs[leg].meta_offset,
                                    .bitmap_bytes = 2u * NV_META_PAGE};
        to = put_runs(host, leg, to, &legs[leg].run_count);
    }
    header.length = (uint64_t)(to - out);
    assert(header.length <= RECORD_BYTES);
    to = put(out, &header, sizeof header);
    to = put(to, legs, farm->leg_count * sizeof *legs);
    to = put(to, &farm->policy, sizeof farm->policy);
    put(to, metas, farm->leg_count * sizeof *metas);
    return header.length;
}

static void open_volume(struct host *host)
{
    uint8_t record[RECORD_BYTES];
    uint64_t length;

    host->map_version = 1;
    length = describe(host, &host->known, host->map_version, record);
    if (nv_volume_open(host->plane, record, length, &host->volume) != 0)
        nv_sim_violation("the mirror does not open: %s", nv_last_error());
    host->opened = true;
    host_open_log(host);
    host_set_cache(host, host->farm->cache_mode);
}

void host_set_cache(struct host *host, uint32_t mode)
{
    const nv_cache_policy policy = {.mode = mode, .ahead_bytes = (uint32_t)farm_below(host->farm, 4) * 4 * NV_CACHE_BLOCK};

    if (!host->farm->cache_frames || host->caching || !host->opened || host->closing)
        return;
    if (nv_volume_set_cache(host->plane, host->volume, &policy, TOKEN_CACHE) != 0)
        nv_sim_violation("the cache policy is refused: %s", nv_last_error());
    host->caching = true;
}

static void change_volume(struct host *host)
{
    uint8_t record[RECORD_BYTES];
    uint64_t length = describe(host, &host->known, host->map_version + 1, record);
    int error = nv_volume_change(host->plane, host->volume, record, length, TOKEN_CHANGE);

    if (error)
        nv_sim_violation("the mirror does not change: %s", nv_last_error());
    host->map_version++;
    host->changing = true;
}

/* ---- what the machine says ---- */

void host_close_volume(struct host *host)
{
    if (!host->opened || host->closing)
        return;
    host->closing = true;
    if (nv_volume_close(host->plane, host->volume, TOKEN_CLOSE) != 0)
        nv_sim_violation("the mirror does not close: %s", nv_last_error());
}

static void dismiss_clients(struct host *host)
{
    for (uint32_t i = 0; i < HOST_CLIENTS; i++)
        if (host->clients[i])
            client_dismissed(host->clients[i]);
}

static void obey(struct host *host, const nv_legs_action *action)
{
    struct farm_message message = {.ask = true, .host = host->index, .epoch = host->epoch, .action = *action};
    int error = 0;

    if (tracing(host))
        printf("-- host %u: action %u, leg %u, ask %u, generation %llu, full %u, why %u\n", host->index, action->kind,
               action->leg, action->ask, (unsigned long long)action->generation, action->full, action->why);
    host_tally_action(host, action);
    switch (action->kind) {
    case NV_ACT_ASK:
        farm_send(host->farm, &message);
        return;
    case NV_ACT_OPEN:
        open_volume(host);
        return;
    case NV_ACT_FAIL:
        error = nv_leg_fail(host->plane, host->volume, action->leg, action->token);
        break;
    case NV_ACT_RELEASE:
        error = nv_leg_release(host->plane, host->volume, action->leg, action->generation, action->token);
        break;
    case NV_ACT_RESYNC:
        host->farm->legs[action->leg - FARM_LEG_ID(0)].resync_step = host->farm->now;
        error = nv_leg_resync(host->plane, host->volume, action->leg, action->full, action->generation, action->token);
        break;
    case NV_ACT_PROMOTE:
        error = nv_leg_promote(host->plane, host->volume, action->leg, action->generation, action->token);
        break;
    case NV_ACT_FENCE:
        (void)nv_volume_fence(host->plane, host->volume);
        dismiss_clients(host);
        host_close_volume(host);
        host->deposed = true;
        return;
    default:
        host->refused = true;
        host->why = action->why;
        return;
    }
    if (error && !host->closing) {
        nv_event failed = {.kind = NV_EVENT_LEG_CHANGED, .result = error, .token = action->token, .args = {action->leg}};
        nv_legs_event(host->machine, &failed);
    }
}

static void follow(struct host *host)
{
    nv_legs_action action;

    while (host->machine && host->begun && !host->refused && nv_legs_next(host->machine, &action))
        obey(host, &action);
}

/* ---- events ---- */

static void looked(struct host *host, uint32_t leg, int result)
{
    nv_leg_look look = host_judge_label(host, leg, result);

    if (tracing(host))
        printf("-- host %u: leg %u looks like %u, epoch %llu, generation %llu%s\n", host->index, FARM_LEG_ID(leg), look.look,
               (unsigned long long)look.epoch, (unsigned long long)look.generation, look.syncing ? ", syncing" : "");
    host->legs[leg].looking = false;
    host->looks[leg] = look;
    if (host->begun)
        nv_legs_looked(host->machine, FARM_LEG_ID(leg), &look);
}

static void took_events(struct host *host, const nv_event *event)
{
    if (tracing(host))
        printf("-- host %u: event %u, token %llu, result %d, %llu %llu %llu\n", host->index, event->kind,
               (unsigned long long)event->token, event->result, (unsigned long long)event->args[0],
               (unsigned long long)event->args[1], (unsigned long long)event->args[2]);
    host_tally_event(host, event);
    switch (event->kind) {
    case NV_EVENT_CONNECTION_CLOSED:
        check_connection_drained(host->farm->check, (uint32_t)event->token);
        break;
    case NV_EVENT_JOB_DONE:
        looked(host, (uint32_t)event->token - HOST_LOOK, event->result);
        break;
    case NV_EVENT_LINK_LOST:
        host_link_lost(host, event);
        return;
    case NV_EVENT_SYNC_FAILED:
        for (uint32_t leg = 0; leg < host->farm->leg_count; leg++)
            host->legs[leg].latched |= host->legs[leg].open && host->legs[leg].object == event->args[0];
        break;
    case NV_EVENT_VOLUME_CHANGED:
        host->changing = false;
        break;
    case NV_EVENT_VOLUME_CACHE:
        host->caching = false;
        break;
    case NV_EVENT_VOLUME_CLOSED:
        host->closed = true;
        break;
    case NV_EVENT_VERIFY_DONE:
        host->verifying = false;
        host->verified = event->args[0];
        host->differed = event->args[1];
        host->repaired = event->args[2];
        break;
    case NV_EVENT_VOLUME_ATTACHED:
        host->attached = event->result == 0;
        host->failed |= event->result != 0;
        for (uint32_t i = 0; host->attached && i < host->farm->leg_count; i++)
            if (farm_in_sync(host->farm, i))
                farm_made_whole(host->farm, i, host->bound_step);
        break;
    default:
        host_log_event(host, event);
        break;
    }
    if (host->begun)
        nv_legs_event(host->machine, event);
}

static bool all_looked(const struct host *host)
{
    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++)
        if (host->legs[leg].looking)
            return false;
    return true;
}

/* Every leg has been looked at: the machine begins with the record that came with the binding. */
static void begin_machine(struct host *host)
{
    host->begun = true;
    nv_legs_begin(host->machine, &host->known, host->looks);
    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++)
        host->legs[leg].described = host->legs[leg].open && host->looks[leg].look == NV_LOOK_LABEL;
}

bool host_events(struct host *host)
{
    nv_event events[16];
    int count = nv_plane_events(host->plane, events, 16);

    for (int i = 0; i < count; i++) {
        took_events(host, &events[i]);
        follow(host);
    }
    if (!host->begun && host->machine && all_looked(host)) {
        begin_machine(host);
        follow(host);
        return true;
    }
    return count > 0;
}

bool host_messages(struct host *host)
{
    struct farm_message message;

    if (!farm_receive(host->farm, host->index, &message))
        return false;
    if (message.epoch != host->epoch || !host->begun)
        return true; /* for an earlier binding */
    if (message.record.epoch == host->epoch && message.record.generation >= host->known.generation)
        host->known = message.record;
    nv_legs_told(host->machine, &message.record);
    follow(host);
    return true;
}

void host_link_back(struct host *host)
{
    host->farm->cut_off[host->index] = false;
    if (host->begun)
        nv_legs_ask_again(host->machine);
    follow(host);
}

/* ---- the driver's own wishes ---- */

static void reopen(struct host *host, uint32_t leg)
{
    host_open_leg(host, leg);
    host->looks[leg].look = NV_LOOK_ABSENT;
    host_look_at(host, leg);
}

static void tend_leg(struct host *host, uint32_t leg, bool eager)
{
    struct host_leg *mine = &host->legs[leg];
    const uint32_t look = host->looks[leg].look;
    const bool usable = look == NV_LOOK_LABEL || (eager && look == NV_LOOK_NO_LABEL);

    if (!host_reachable(host, leg) || mine->looking || host->changing || host->file_count == HOST_FILES)
        return;
    if (!mine->open || mine->path != host->farm->legs[leg].path || (mine->described && farm_chance(host->farm, 50))) {
        mine->described = false; /* until the label is known, then with the new object */
        if (host_may_reopen(host, leg, eager))
            reopen(host, leg);
    } else if (!usable) {
        host_look_at(host, leg);
    } else if (!mine->described) {
        mine->described = true;
        change_volume(host);
    } else {
        nv_legs_want_resync(host->machine, FARM_LEG_ID(leg), look == NV_LOOK_NO_LABEL);
        follow(host);
    }
}

void host_tend(struct host *host, bool eager)
{
    if (!host_serves(host))
        return;
    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++)
        if (host->known.legs[leg].state != NV_LEG_IN_SYNC && (eager || farm_chance(host->farm, 512)))
            tend_leg(host, leg, eager);
}

void host_clear_faults(struct host *host)
{
    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++) {
        if (!host->legs[leg].open || !host->legs[leg].latched)
            continue;
        check_fault_cleared(host->farm->check);
        host->legs[leg].latched = host->farm->legs[host->legs[leg].path].suspect = false;
        if (host->legs[leg].far)
            far_make_sure(host->legs[leg].far);
        if (nv_object_clear_fault(host->plane, host->legs[leg].object) != 0)
            nv_sim_violation("a fault does not clear: %s", nv_last_error());
    }
}

void host_verify(struct host *host, bool repair)
{
    host->verifying = true;
    if (nv_volume_verify(host->plane, host->volume, repair, TOKEN_VERIFY) != 0)
        nv_sim_violation("the mirror does not verify: %s", nv_last_error());
}

/* ---- clients ---- */

static void open_client(struct host *host, uint32_t index)
{
    nv_connection_params params;
    const uint32_t id = (uint32_t)++*host->next_id;
    int socket = nv_sim_socket();
    struct client *client = client_create(&host->farm->rules, id, socket, &params);

    if (nv_connection_open(host->plane, socket, host->volume, &params, NULL, 0, id, &host->numbers[index]) != 0)
        nv_sim_violation("a connection does not open: %s", nv_last_error());
    host->clients[index] = client;
    if (host->deposed)
        client_deposed(client);
}

static void end_client(struct host *host, uint32_t index)
{
    struct client *client = host->clients[index];

    switch (farm_below(host->farm, 4)) {
    case 0:
        client_disconnect(client);
        break;
    case 1:
        client_shut(client);
        break;
    default:
        client_close(client, farm_chance(host->farm, 512));
    }
}

static void forget_client(struct host *host, uint32_t index)
{
    client_close(host->clients[index], false);
    client_destroy(host->clients[index]);
    host->clients[index] = NULL;
}

void host_act(struct host *host)
{
    const uint32_t index = (uint32_t)farm_below(host->farm, HOST_CLIENTS);
    struct client *client = host->clients[index];

    if (!host->opened || host->closing)
        return;
    if (client && client_ended(client)) {
        client_pump(client, true);
        if (client_ended(client))
            forget_client(host, index);
        return;
    }
    if (!client)
        open_client(host, index);
    else if (farm_chance(host->farm, 3))
        end_client(host, index);
    else if (farm_chance(host->farm, 400))
        client_pump(client, false);
    else
        client_request(client);
}

struct client *host_client(struct host *host)
{
    if (host->clients[0] && client_ended(host->clients[0]))
        forget_client(host, 0);
    if (!host->clients[0])
        open_client(host, 0);
    return host->clients[0];
}

bool host_serves(const struct host *host)
{
    return host->plane && host->attached && !host->closing && !host->deposed;
}

/* ---- moving ---- */

bool host_turn(struct host *host)
{
    const uint32_t reactor = (uint32_t)farm_below(host->farm, host->farm->reactors);
    const bool moved = nv_reactor_turn(nv_plane_reactor(host->plane, reactor));

    host_tally_turn(host);
    return moved;
}

static bool turn_all(struct host *host)
{
    bool moved = false;

    for (uint32_t i = 0; i < host->farm->reactors; i++)
        moved |= nv_reactor_turn(nv_plane_reactor(host->plane, i));
    return moved;
}

bool host_move(struct host *host)
{
    bool moved = turn_all(host);

    moved |= host_events(host);
    moved |= host_messages(host);
    for (uint32_t i = 0; i < HOST_CLIENTS; i++)
        if (host->clients[i])
            moved |= client_pump(host->clients[i], true);
    return host_far_steps(host) || moved;
}

/* ---- the beginning and the end ---- */

void host_bind(struct host *host)
{
    struct farm *farm = host->farm;
    nv_plane_config config = {.reactors = farm->reactors, .cpu_first = -1, .pool_bytes = 4u << 20, .connections_max = 64,
                              .cache_bytes = (uint64_t)farm->cache_frames * NV_CACHE_BLOCK};
    struct farm *const keep = farm;
    uint64_t *const next_id = host->next_id;
    const uint32_t index = host->index;

    assert(!host->plane);
    *host = (struct host){.farm = keep, .index = index, .next_id = next_id, .epoch = farm->registry.epoch,
                          .known = farm->registry, .bound_step = farm->now};
    if (nv_plane_build(&config, false, &host->plane) != 0)
        nv_sim_violation("the plane does not start: %s", nv_last_error());
    host->plane->scattered = farm_chance(farm, 300);
    host->machine = nv_legs_create(host->epoch);
    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        if (!host_reachable(host, leg))
            continue;
        host_open_leg(host, leg);
        host_look_at(host, leg);
    }
}

static void end_clients(struct host *host, bool reset)
{
    for (uint32_t i = 0; i < HOST_CLIENTS; i++) {
        if (!host->clients[i])
            continue;
        client_close(host->clients[i], reset);
        client_destroy(host->clients[i]);
        host->clients[i] = NULL;
    }
}

static void end_plane(struct host *host)
{
    bool finished = false;

    host_tally_cache(host);
    nv_plane_stop(host->plane);
    host_leave_fars(host);
    for (uint32_t i = 0; !finished; i++) {
        bool moved = nv_sim_step();
        moved |= turn_all(host);
        moved |= host_far_steps(host);
        if (!moved)
            nv_sim_advance();
        finished = true;
        for (uint32_t j = 0; j < host->farm->reactors; j++)
            finished &= nv_reactor_finished(nv_plane_reactor(host->plane, j));
        if (i > HOST_PATIENCE)
            nv_sim_violation("the plane of host %u does not stop", host->index);
    }
    for (uint32_t i = 0; i < host->file_count; i++)
        if (host->fars[i])
            far_free(host->fars[i]);
    host->file_count = 0;
    nv_plane_free(host->plane);
    nv_legs_free(host->machine);
    host->plane = NULL;
    host->machine = NULL;
    host->begun = host->attached = false;
}

void host_lease_ends(struct host *host)
{
    if (!host->opened || host->closing || nv_volume_fence(host->plane, host->volume) != 0)
        return;
    tally(TALLY_LEASE_ENDS);
    for (uint32_t i = 0; i < LEASE_TURNS && !host_fenced(host); i++)
        turn_all(host);
    if (!host_fenced(host))
        nv_sim_violation("host %u is not fenced at the end of its lease", host->index);
}

/* Something that it could answer from without asking a leg. */
static bool has_at_hand(const struct host *host)
{
    return host->farm->cache_frames || host->farm->log.size;
}

void host_depose(struct host *host)
{
    host_fence_files(host);
    for (uint32_t i = 0; i < HOST_CLIENTS; i++)
        if (host->clients[i])
            client_deposed(host->clients[i]);
    host->deposed = true;
    for (uint32_t i = 0; has_at_hand(host) && i < 4u * HOST_CLIENTS; i++)
        if (host->clients[i % HOST_CLIENTS])
            client_read(host->clients[i % HOST_CLIENTS], farm_below(host->farm, 6) * 8, 8);
}

void host_kill(struct host *host)
{
    tally(host_doing(host));
    for (uint32_t i = 0; i < host->file_count; i++) {
        host_settle(host, i);
        nv_sim_trouble(host->files[i])->gone = true;
    }
    host_end_log(host);
    for (uint32_t leg = 0; leg < host->farm->leg_count; leg++) /* control heard of it, or hears from the next host */
        host->farm->legs[leg].suspect |= sim_disk_has_lost(nv_sim_disk(host->farm->legs[leg].file));
    farm_cut(host->farm, host->index); /* its messages die with it */
    host->farm->cut_off[host->index] = false;
    end_clients(host, true);
    end_plane(host);
}

void host_stop(struct host *host)
{
    end_clients(host, false);
    end_plane(host);
}
