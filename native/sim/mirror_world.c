/*
 * See mirror_world.h.
 */
#include "sim/mirror_world.h"
#include "sim/tally.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAST_MOVES 30u              /* of a host that has been told to stop */

static struct world *now;
static int64_t followed = -1; /* a cell whose bytes on each leg are told when they change, for a person who looks for a bug */

void world_say(const struct world *world, const char *what, uint32_t which)
{
    if (world->farm.rules.trace)
        printf("-- step %u: %s %u\n", world->step, what, which);
}

void mirror_follow(uint64_t cell)
{
    followed = (int64_t)cell;
}

void world_follow(const struct world *world)
{
    static uint64_t seen[FARM_LEGS];

    for (uint32_t leg = 0; followed >= 0 && leg < world->farm.leg_count; leg++) {
        const uint8_t *bytes = farm_place(&world->farm, leg, (uint64_t)followed * world->farm.cell_bytes);
        if (memcmp(bytes, &seen[leg], 8) != 0)
            printf("-- step %u: leg %u cell %lld: %s\n", world->step, FARM_LEG_ID(leg), (long long)followed,
                   check_name(world->farm.check, (uint64_t)followed, bytes));
        memcpy(&seen[leg], bytes, 8);
    }
}

/* ---- who serves ---- */

struct host *world_serving(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane && !world->hosts[i].deposed)
            return &world->hosts[i];
    return NULL;
}

/* What a leg's cache held may be lost: then acknowledged is not enough, it must have been flushed. */
static bool something_lost(const struct world *world)
{
    for (uint32_t leg = 0; leg < world->farm.leg_count; leg++)
        if (world->farm.legs[leg].rebooted)
            return true;
    return false;
}

void world_kill(struct world *world, struct host *host)
{
    world_say(world, "the end of host", host->index);
    world->farm.crashes++;
    host_kill(host);
    farm_inspect(&world->farm);
}

/* A host that was told to stop goes on for a moment; nothing that it answers now may have an effect, or bytes. */
static void linger(struct host *host)
{
    for (uint32_t i = 0; i < LAST_MOVES; i++) {
        nv_sim_step();
        host_move(host);
    }
}

/*
 * Bind to a host: a new epoch, and every leg lets nothing of an older one through any more. What the old host had not
 * answered may have happened or not; what it had answered is there.
 */
void world_bind(struct world *world, struct host *host)
{
    world_say(world, "bind to host", host->index);
    if (world_serving(world) && world_serving(world) != host)
        tally(TALLY_REBIND);
    world->farm.registry.epoch++;
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane) {
            if (world->farm.leased && !world->hosts[i].deposed)
                host_lease_ends(&world->hosts[i]);
            world->farm.crashes++;
            host_depose(&world->hosts[i]);
        }
    check_crash(world->farm.check, !something_lost(world));
    farm_inspect(&world->farm);
    if (host->plane && world->farm.log.size)
        linger(host);
    if (host->plane)
        world_kill(world, host);
    world->farm.owner = host->index;
    host_bind(host);
}

/* Nobody may serve before an end that every host shares. */
void world_kill_all(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane)
            world_kill(world, &world->hosts[i]);
}

/* Power goes, at some legs or at all. */
void world_outage(struct world *world, bool everywhere)
{
    const uint64_t before = world->farm.crashes;
    bool lost;

    world_say(world, "outage everywhere", everywhere);
    world_kill_all(world);
    world->farm.crashes += world->farm.crashes == before;
    for (uint32_t leg = 0; leg < world->farm.leg_count; leg++)
        if (everywhere || farm_chance(&world->farm, 512)) {
            tally(TALLY_POWER_CUT);
            farm_power_cut(&world->farm, leg);
        }
    lost = world->farm.log.size && (everywhere || sim_random_chance(&world->farm.log.random, 300));
    if (lost)
        farm_power_cut_logs(&world->farm);
    check_crash(world->farm.check, !lost && !something_lost(world));
    world_follow(world);
    farm_inspect(&world->farm);
}

/* ---- troubles ---- */

void world_tell_troubles(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        host_set_troubles(&world->hosts[i]);
}

static void leg_is_back(struct farm_leg *leg)
{
    if (leg->gone)
        tally(TALLY_BACK);
    leg->gone = false;
}

void world_heal(struct world *world, bool all)
{
    struct farm *farm = &world->farm;

    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        if (all || farm_chance(&world->farm, 300))
            farm->legs[leg].hung = false;
        if (all || farm_chance(&world->farm, 60))
            farm->legs[leg].stuck_before = 0;
        if (all || farm_chance(&world->farm, 300))
            leg_is_back(&farm->legs[leg]);
        if (all || farm_chance(&world->farm, 300))
            farm->legs[leg].path = leg;
    }
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (farm->cut_off[i] && (all || farm_chance(&world->farm, 300))) {
            farm->cut_off[i] = false;
            if (world->hosts[i].plane)
                host_link_back(&world->hosts[i]);
        }
    world_tell_troubles(world);
}

/* ---- the end ---- */

static void end_deposed(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane && world->hosts[i].deposed)
            world_kill(world, &world->hosts[i]);
}

void world_calm(struct world *world)
{
    struct farm *farm = &world->farm;
    struct nv_sim_faults none = farm->faults;

    none.read_error = none.write_error = none.sync_error = none.dsync_error = none.punch_error = none.stall = 0;
    nv_sim_set_faults(&none);
    farm->calm = true;
    farm->read_errors = farm->write_errors = farm->sync_errors = 0;
    world_heal(world, true);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane)
            host_trouble_log(&world->hosts[i], true);
    end_deposed(world);
}

bool world_answered(const struct host *host)
{
    for (uint32_t i = 0; i < HOST_CLIENTS; i++)
        if (host->clients[i] && !client_ended(host->clients[i]) && client_unanswered(host->clients[i]))
            return false;
    return true;
}

static bool all_in_sync(const struct world *world)
{
    for (uint32_t leg = 0; leg < world->farm.leg_count; leg++)
        if (!farm_in_sync(&world->farm, leg))
            return false;
    return true;
}

/*
 * Every leg is in sync by the registry's word and the plane's, and nothing is left to clear, nor under way: what was asked
 * of a leg before its troubles ended may yet take too long, and then that leg is given up, rightly.
 */
bool world_at_rest(struct world *world, struct host *host)
{
    nv_mirror_status status;

    if (!host_serves(host) || !world_answered(host) || !all_in_sync(world) || host->changing ||
        nv_volume_mirror(host->plane, host->volume, &status) != 0)
        return false;
    for (uint32_t i = 0; i < status.leg_count; i++)
        if (status.legs[i].state != NV_LANE_IN_SYNC || host_leg_has_late(host, i))
            return false;
    return status.intents == 0 && status.flags == 0 && status.leg_count == world->farm.leg_count && host_log_rests(host);
}

bool world_move(struct world *world)
{
    bool moved = nv_sim_step();

    world_follow(world);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane)
            moved |= host_move(&world->hosts[i]);
    if (!moved)
        nv_sim_advance();
    return moved;
}

struct host *world_recover(struct world *world)
{
    for (uint32_t i = 0;; i++) {
        struct host *host = world_serving(world);
        if (!host || host->refused || host->failed) {
            world_bind(world, &world->hosts[farm_some_host(&world->farm)]);
            end_deposed(world);
        } else if (i % 64 == 63) {
            host_clear_faults(host);
            host_tend(host, true);
        }
        host = world_serving(world);
        if (world_at_rest(world, host))
            return host;
        world_move(world);
        if (i > HOST_PATIENCE)
            nv_sim_violation("not every leg comes to be in sync, or not every request is answered");
    }
}

/* One pass over all legs; what differs is repaired, or only counted. */
static void verify_once(struct world *world, struct host *host, bool repair, uint64_t differences)
{
    host_verify(host, repair);
    for (uint32_t i = 0; host->verifying; i++) {
        world_move(world);
        if (i > HOST_PATIENCE)
            nv_sim_violation("the verification does not end");
    }
    if (host->differed != differences || host->verified == 0 || host->repaired != (repair ? differences : 0))
        nv_sim_violation("of %llu bytes verified, %llu pieces differ, %llu were repaired; %llu should differ",
                         (unsigned long long)host->verified, (unsigned long long)host->differed,
                         (unsigned long long)host->repaired, (unsigned long long)differences);
}

/* Bits rot silently on one leg that nobody reads first: a verification finds the place, another one repairs it. */
void world_verify(struct world *world, struct host *host)
{
    struct farm *farm = &world->farm;
    const uint64_t cell = farm_below(farm, farm->cells), at = cell * farm->cell_bytes;
    const uint32_t leg = host_other_leg(host);
    static const uint8_t rot[8] = "rotten!";

    verify_once(world, host, false, 0);
    if (leg == FARM_LEGS || (at >= farm->zero_from && at < farm->zero_to))
        return;
    farm_write(farm, leg, at, rot, sizeof rot);
    verify_once(world, host, false, 1);
    verify_once(world, host, true, 1);
    verify_once(world, host, true, 0);
}

void world_stop(struct world *world, struct host *host)
{
    world->farm.rules.closing = true;
    host_close_volume(host);
    for (uint32_t i = 0; !host->closed; i++) {
        world_move(world);
        if (i > HOST_PATIENCE)
            nv_sim_violation("the volume does not close");
    }
    host_stop(host);
    world->farm.owner = FARM_HOSTS;
    farm_expect_equal(&world->farm);
    world->farm.rules.closing = false;
}

void world_read_everything(struct world *world, struct host *host)
{
    uint64_t at = 0;

    while (!host->opened)
        world_move(world);
    while (at < world->farm.cells) {
        const uint64_t left = world->farm.cells - at, count = left < 64 ? left : 64;
        if (client_read(host_client(host), at, count))
            at += count;
        else
            world_move(world);
    }
    while (!world_answered(host))
        world_move(world);
}

/* ---- a world's beginning and its end ---- */

void mirror_describe(void)
{
    if (!now)
        return;
    fprintf(stderr, "mirror: life %u, step %u, registry epoch %llu generation %llu", now->life, now->step,
            (unsigned long long)now->farm.registry.epoch, (unsigned long long)now->farm.registry.generation);
    for (uint32_t leg = 0; leg < now->farm.leg_count; leg++)
        fprintf(stderr, ", leg %u %s%s%s", FARM_LEG_ID(leg), farm_in_sync(&now->farm, leg) ? "in sync" : "stale",
                now->farm.legs[leg].gone ? " gone" : "", now->farm.legs[leg].hung ? " hung" : "");
    fputc('\n', stderr);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        for (uint32_t j = 0; j < HOST_CLIENTS; j++)
            if (now->hosts[i].clients[j])
                client_describe(now->hosts[i].clients[j]);
}

static void set_rules(struct world *world, bool trace)
{
    struct farm *farm = &world->farm;
    const bool log_hangs = farm->log.size && farm->log.troubled && farm->log.policy.deadline_ms; /* then its reads fail */
    const bool errors = !farm->must_serve || log_hangs;

    farm->check = check_create(farm->cell_bytes, farm->cells);
    check_is_mirror(farm->check);
    farm->rules = (struct client_rules){
        .check = farm->check, .random = &farm->random, .cell_bytes = farm->cell_bytes, .block_min = farm->block_min,
        .cells = farm->cells, .zero_from = farm->zero_from, .zero_to = farm->zero_to, .cells_max = 96,
        .corner = farm->corner, .longs = farm->cache_frames ? 500 : 100,
        .io_errors = errors, .sync_errors = errors, .trace = trace,
        .logged = farm->log.size > 0, .acknowledged = farm->log.size ? NULL : farm_acknowledged, .context = farm};
}

struct world *world_create(void)
{
    struct world *world = aligned_alloc(4096, sizeof *world);

    assert(world);
    memset(world, 0, sizeof *world);
    now = world;
    return world;
}

void world_begin(struct world *world, bool trace)
{
    set_rules(world, trace);
    nv_sim_begin(sim_random_next(&world->farm.random), &world->farm.faults);
    farm_make_disks(&world->farm);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        world->hosts[i] = (struct host){.farm = &world->farm, .index = i, .next_id = &world->next_id};
}

struct mirror_figures world_figures(const struct world *world)
{
    const struct farm *farm = &world->farm;

    return (struct mirror_figures){farm->rules.answers, farm->crashes, farm->commits, farm->inspections};
}

static void count_operations(void)
{
    const struct nv_sim_counts counts = nv_sim_counts();

    tally_counts[TALLY_REORDERED] += counts.reordered;
    tally_counts[TALLY_DELAYED] += counts.delayed;
    tally_counts[TALLY_LEG_ERROR] += counts.errors;
    tally_counts[TALLY_SYNC_ERROR] += counts.syncs_failed;
    tally_counts[TALLY_SHORT] += counts.short_transfers;
    tally_counts[TALLY_TORN] += counts.torn;
    tally_counts[TALLY_FENCED] += counts.fenced;
}

void world_destroy(struct world *world)
{
    count_operations();
    nv_sim_end();
    check_destroy(world->farm.check);
    farm_free(&world->farm);
    free(world);
    now = NULL;
}
