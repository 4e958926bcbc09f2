/*
 * The mirrored volume in the simulation: a seed is a farm (farm.h) with one or two hosts, and what happens to it, step by
 * step. In the end every trouble ends; then every leg must come to be in sync by itself, all must hold the same bytes,
 * and a host that binds anew must read what the judge allows.
 */
#include "sim/mirror.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim/mirror_world.h"
#include "sim/tally.h"

#define CLOSE_PATIENCE 2000u

static uint64_t below(struct world *world, uint64_t bound)
{
    return farm_below(&world->farm, bound);
}

static bool chance(struct world *world, unsigned of_1024)
{
    return farm_chance(&world->farm, of_1024);
}

/* ---- troubles ---- */

static uint32_t some_leg(struct world *world)
{
    uint32_t leg = (uint32_t)below(world, world->farm.leg_count);

    return leg == world->farm.good ? FARM_LEGS : leg;
}

static void reboot_leg(struct world *world, uint32_t leg)
{
    tally(TALLY_REBOOT);
    world_say(world, "reboot of leg", leg);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        for (uint32_t j = 0; world->hosts[i].plane && j < world->hosts[i].file_count; j++)
            if (nv_sim_disk(world->hosts[i].files[j]) == nv_sim_disk(world->farm.legs[leg].file))
                host_settle(&world->hosts[i], j);
    farm_power_cut(&world->farm, leg);
    world->farm.crashes++;
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane && !world->hosts[i].deposed)
            host_leg_rebooted(&world->hosts[i], leg);
    for (uint32_t i = 0; i < FARM_HOSTS; i++) /* the operator's word comes before the mirror has looked */
        if (world->hosts[i].plane && chance(world, world->farm.hasty))
            host_clear_faults(&world->hosts[i]);
}

static bool slow(const struct farm_leg *leg)
{
    return leg->hung || leg->stuck_before;
}

/* What it has not written down yet is also in another leg that lives and has lost nothing. */
static bool can_lose_cache(struct world *world, uint32_t leg)
{
    const struct host *host = world_serving(world);

    if (host && !host_far_has_flushed(host, leg))
        return false;
    for (uint32_t other = 0; host && host->opened && other < world->farm.leg_count; other++)
        if (other != leg && host_leg_in_sync(host, other) && farm_in_sync(&world->farm, other) &&
            !world->farm.legs[other].rebooted && !host->legs[other].latched && !world->farm.legs[other].gone &&
            host_far_is_sound(host, other) && (!world->farm.legs[leg].far || !slow(&world->farm.legs[other])))
            return true;
    return !host;
}

/* What it is asked from now on it does, what it was asked before it does not. */
static void leave_stuck(struct world *world, uint32_t leg)
{
    tally(TALLY_STUCK);
    world_say(world, "what it was asked before is stuck: leg", leg);
    world->farm.legs[leg].hung = false;
    world->farm.legs[leg].stuck_before = nv_sim_time() + 1;
}

/* Of a leg behind a server. */
static void trouble_connections(struct world *world, uint32_t leg, void trouble(struct far *far))
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        for (uint32_t j = 0; world->hosts[i].plane && j < world->hosts[i].file_count; j++)
            if (world->hosts[i].fars[j] && nv_sim_disk(world->hosts[i].files[j]) == nv_sim_disk(world->farm.legs[leg].file))
                trouble(world->hosts[i].fars[j]);
}

static void leg_trouble(struct world *world, uint32_t leg)
{
    struct farm *farm = &world->farm;

    if (chance(world, farm->hang)) {
        tally(TALLY_HANG);
        farm->legs[leg].hung = true;
        world_say(world, "hang of leg", leg);
    }
    if (farm->legs[leg].hung && chance(world, farm->sticky ? 1024 : 300))
        leave_stuck(world, leg);
    if (chance(world, farm->drop))
        trouble_connections(world, leg, far_trouble);
    if (chance(world, farm->silence))
        trouble_connections(world, leg, far_silence);
    if (chance(world, farm->drop)) {
        tally(TALLY_LOSS);
        farm->legs[leg].gone = true;
        world_say(world, "loss of leg", leg);
    }
    if (chance(world, farm->reboot) && can_lose_cache(world, leg))
        reboot_leg(world, leg);
}

static void trouble(struct world *world)
{
    struct farm *farm = &world->farm;
    const uint32_t leg = some_leg(world);

    if (leg < FARM_LEGS)
        leg_trouble(world, leg);
    if (chance(world, farm->cut)) {
        const uint32_t host = (uint32_t)below(world, FARM_HOSTS);
        tally(TALLY_CUT);
        farm_cut(farm, host);
        world_say(world, "cut of host", host);
    }
    if (chance(world, farm->jump)) {
        tally(TALLY_JUMP);
        nv_sim_jump(below(world, 20000000000ull));
    }
    world_tell_troubles(world);
}

/* Another leg than this one is in sync and will do as a source. */
static bool can_spare(const struct farm *farm, uint32_t leg)
{
    for (uint32_t other = 0; other < farm->leg_count; other++)
        if (other != leg && farm_in_sync(farm, other) && !farm->legs[other].spoiled && !farm->legs[other].gone &&
            !farm->legs[other].hung && farm->legs[other].path == other)
            return true;
    return false;
}

/* While no host is up: legs come back older than they were, blank, or in each other's place. */
static void spoil_legs(struct world *world)
{
    struct farm *farm = &world->farm;
    const uint32_t leg = some_leg(world), other = some_leg(world);

    for (uint32_t old = 0; old < farm->leg_count; old++)
        if (old != farm->good && chance(world, farm->spoil) && can_spare(farm, old)) {
            world_say(world, "older state of leg", old);
            farm_roll_back(farm, old);
        }
    if (leg < FARM_LEGS && other < FARM_LEGS && leg != other && chance(world, farm->swap) && can_spare(farm, leg) &&
        can_spare(farm, other)) {
        tally(TALLY_SWAP);
        world_say(world, "swap of leg", leg);
        farm->legs[leg].path = other;
        farm->legs[other].path = leg;
    }
}

/* ---- one step ---- */

/* Control: somebody has to serve; now and then it is to be somebody else. */
static void control(struct world *world)
{
    struct host *host = world_serving(world);

    if (!host) {
        world_bind(world, &world->hosts[farm_some_host(&world->farm)]);
        return;
    }
    if (host->refused || host->failed) {
        if (host->refused && host->why == NV_WHY_OLD_REGISTRY)
            nv_sim_violation("the registry is called old, and is not");
        world_heal(world, chance(world, 512));
        world_bind(world, &world->hosts[farm_some_host(&world->farm)]);
    } else if (chance(world, 4u * world->farm.rebind)) {
        world_bind(world, &world->hosts[farm_some_host(&world->farm)]);
    }
}

/* A deposed host that was told so ends; one that was not goes on until somebody kills it. */
static void retire(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++) {
        struct host *host = &world->hosts[i];
        if (host->plane && host->deposed && (host->closed || chance(world, 20)))
            world_kill(world, host);
    }
}

static struct host *some_host(struct world *world)
{
    struct host *host = &world->hosts[below(world, world->farm.host_count)];

    return host->plane ? host : &world->hosts[!host->index];
}

static void run(struct world *world)
{
    if (!nv_sim_step() && chance(world, 200))
        nv_sim_advance();
}

/* The process dies, or power goes. */
static void end_one(struct world *world, struct host *host)
{
    if (chance(world, 512)) {
        world_kill(world, host);
        return;
    }
    world_outage(world, false);
    spoil_legs(world);
}

static void end_somebody(struct world *world, struct host *host)
{
    retire(world);
    if (host->plane && chance(world, world->farm.kill))
        end_one(world, host);
}

/* The seed wants it to end in the middle of something. */
static void end_aimed(struct world *world, struct host *host)
{
    struct farm *farm = &world->farm;
    const bool wrote = farm_wrote_metadata(farm), any_write = farm->aim == TALLY_KILL_METADATA;
    const bool often = any_write || farm->aim == TALLY_KILL_PREPARING; /* anywhere among them */

    if (farm->aims == 0 || !(any_write ? wrote : host_doing(host) == (enum tally)farm->aim) || !chance(world, often ? 100 : 250))
        return;
    farm->aims--;
    if (any_write)
        tally(TALLY_KILL_METADATA);
    end_one(world, host);
}

/* The clients, the hosts, the disks. */
static void work(struct world *world, struct host *host)
{
    const uint64_t what = below(world, 1000);

    if (what < 300)
        host_act(host);
    else if (what < 640)
        run(world);
    else if (what < 965)
        host_turn(host);
    else
        host_events(host);
    for (uint32_t i = 0; i < 2; i++) /* what is behind a server takes more of them */
        (void)host_far_steps(host);
    end_aimed(world, host);
}

static void rarely(struct world *world, struct host *host)
{
    if (chance(world, 100))
        host_set_cache(host, (uint32_t)below(world, 3));
    else if (chance(world, 700))
        host_clear_faults(host);
    else
        farm_take_snapshot(&world->farm, (uint32_t)below(world, world->farm.leg_count));
}

/* True: `what` is within the share, else it has become less by it. */
static bool is_turn_of(uint64_t *what, uint64_t share)
{
    if (*what < share)
        return true;
    *what -= share;
    return false;
}

static void step(struct world *world)
{
    const struct farm_shares *share = &world->farm.shares;
    struct host *host = some_host(world);
    uint64_t what = below(world, 1000);

    world->farm.now++;
    if (world->farm.log.size && host->plane && sim_random_chance(&world->farm.log.random, 6))
        host_drain_or_allow(host);
    if (world->farm.log.troubled && sim_random_chance(&world->farm.log.bad_luck, 6))
        host_trouble_log(host, sim_random_chance(&world->farm.log.bad_luck, 400));
    if (!host->plane || is_turn_of(&what, share->control))
        control(world);
    else if (is_turn_of(&what, share->messages))
        host_messages(host);
    else if (is_turn_of(&what, share->advance))
        nv_sim_advance();
    else if (is_turn_of(&what, share->trouble))
        trouble(world);
    else if (is_turn_of(&what, share->heal))
        world_heal(world, false);
    else if (is_turn_of(&what, share->tend))
        host_tend(host, false);
    else if (is_turn_of(&what, share->end))
        end_somebody(world, host);
    else if (is_turn_of(&what, 3))
        rarely(world, host);
    else
        work(world, host);
}

/* ---- one seed ---- */

static void end(struct world *world)
{
    struct host *host;

    world_calm(world);
    host = world_recover(world);
    world_verify(world, host);
    world_stop(world, host);
    if (chance(world, 512))
        world_outage(world, true);
    else
        check_crash(world->farm.check, true);
    world->farm.rules.read_only = true;
    host = &world->hosts[world->farm.log.dirty ? world->farm.log.host : 0];
    world_bind(world, host);
    world_read_everything(world, host);
    world_stop(world, world_recover(world));
}

/* As far as the legs let it: intents are cleared, and nothing but the dirty maps says then what a leg lacks. */
static void close_cleanly(struct world *world)
{
    struct host *host = world_serving(world);

    if (!host || !host_serves(host))
        return;
    world->farm.rules.closing = true;
    host_close_volume(host);
    for (uint32_t i = 0; i < CLOSE_PATIENCE && !host->closed; i++)
        world_move(world);
    world->farm.rules.closing = false;
    if (!host->closed)
        return;
    tally(TALLY_CLEAN_END);
    world_kill(world, host); /* the process ends, whatever still hangs of what has nothing to do with the volume */
}

static void live(struct world *world, uint32_t steps)
{
    for (world->step = 0; world->step < steps; world->step++) {
        step(world);
        world_follow(world);
    }
    if (world->farm.sticky) /* what is stuck may land when all is calm, and nothing is reconciled before */
        return;
    if (chance(world, 300))
        close_cleanly(world);
    if (chance(world, 512))
        world_outage(world, chance(world, 512));
    else
        world_kill_all(world);
    if (!world_serving(world))
        spoil_legs(world);
}

struct mirror_figures mirror_run(uint64_t seed, uint32_t steps, bool trace)
{
    struct world *world = world_create();
    struct mirror_figures figures;

    farm_draw(&world->farm, seed);
    world_begin(world, trace);
    for (world->life = 0; world->life < world->farm.lives; world->life++)
        live(world, steps ? steps : world->farm.steps);
    end(world);
    figures = world_figures(world);
    world_destroy(world);
    return figures;
}
