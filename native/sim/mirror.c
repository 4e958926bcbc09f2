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

#include "sim/farm.h"
#include "sim/host.h"

struct world {
    struct farm farm;
    struct host hosts[FARM_HOSTS];
    uint64_t next_id;
    uint32_t life, step;
};

static struct world *now;
static int64_t followed = -1; /* a cell whose bytes on each leg are told when they change, for a person who looks for a bug */

static uint64_t below(struct world *world, uint64_t bound)
{
    return farm_below(&world->farm, bound);
}

static bool chance(struct world *world, unsigned of_1024)
{
    return farm_chance(&world->farm, of_1024);
}

static void say(const struct world *world, const char *what, uint32_t which)
{
    if (world->farm.rules.trace)
        printf("-- step %u: %s %u\n", world->step, what, which);
}

void mirror_follow(uint64_t cell)
{
    followed = (int64_t)cell;
}

static void follow(const struct world *world)
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

static struct host *serving(struct world *world)
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

static void kill_host(struct world *world, struct host *host)
{
    say(world, "the end of host", host->index);
    host_kill(host);
    farm_inspect(&world->farm);
}

/*
 * Bind to a host: a new epoch, and every leg lets nothing of an older one through any more. What the old host had not
 * answered may have happened or not; what it had answered is there.
 */
static void bind_to(struct world *world, struct host *host)
{
    say(world, "bind to host", host->index);
    world->farm.registry.epoch++;
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane)
            host_depose(&world->hosts[i]);
    check_crash(world->farm.check, !something_lost(world));
    farm_inspect(&world->farm);
    if (host->plane)
        kill_host(world, host);
    world->farm.owner = host->index;
    host_bind(host);
}

/* Nobody may serve before an end that every host shares. */
static void kill_all(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane)
            kill_host(world, &world->hosts[i]);
}

/* Power goes, at some legs or at all. */
static void outage(struct world *world, bool everywhere)
{
    say(world, "outage everywhere", everywhere);
    kill_all(world);
    for (uint32_t leg = 0; leg < world->farm.leg_count; leg++)
        if (everywhere || chance(world, 512))
            farm_power_cut(&world->farm, leg);
    check_crash(world->farm.check, !something_lost(world));
    follow(world);
    farm_inspect(&world->farm);
}

/* ---- troubles ---- */

static uint32_t some_leg(struct world *world)
{
    uint32_t leg = (uint32_t)below(world, world->farm.leg_count);

    return leg == world->farm.good ? FARM_LEGS : leg;
}

static void tell_troubles(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        host_set_troubles(&world->hosts[i]);
}

static void reboot_leg(struct world *world, uint32_t leg)
{
    say(world, "reboot of leg", leg);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        for (uint32_t j = 0; world->hosts[i].plane && j < world->hosts[i].file_count; j++)
            if (nv_sim_disk(world->hosts[i].files[j]) == nv_sim_disk(world->farm.legs[leg].file))
                nv_sim_settle(world->hosts[i].files[j], &world->farm.random);
    farm_power_cut(&world->farm, leg);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane && !world->hosts[i].deposed)
            host_leg_rebooted(&world->hosts[i], leg);
}

/* What it has not written down yet is also in another leg that lives and has lost nothing. */
static bool can_lose_cache(struct world *world, uint32_t leg)
{
    const struct host *host = serving(world);

    for (uint32_t other = 0; host && host->opened && other < world->farm.leg_count; other++)
        if (other != leg && host_leg_in_sync(host, other) && farm_in_sync(&world->farm, other) &&
            !world->farm.legs[other].rebooted && !host->legs[other].latched && !world->farm.legs[other].gone)
            return true;
    return !host;
}

static void trouble(struct world *world)
{
    struct farm *farm = &world->farm;
    const uint32_t leg = some_leg(world);

    if (leg < FARM_LEGS && chance(world, farm->hang)) {
        farm->legs[leg].hung = true;
        say(world, "hang of leg", leg);
    }
    if (leg < FARM_LEGS && chance(world, farm->drop)) {
        farm->legs[leg].gone = true;
        say(world, "loss of leg", leg);
    }
    if (leg < FARM_LEGS && chance(world, farm->reboot) && can_lose_cache(world, leg))
        reboot_leg(world, leg);
    if (chance(world, farm->cut)) {
        const uint32_t host = (uint32_t)below(world, FARM_HOSTS);
        farm_cut(farm, host);
        say(world, "cut of host", host);
    }
    if (chance(world, farm->jump))
        nv_sim_jump(below(world, 20000000000ull));
    tell_troubles(world);
}

static void heal(struct world *world, bool all)
{
    struct farm *farm = &world->farm;

    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        if (all || chance(world, 300))
            farm->legs[leg].hung = false;
        if (all || chance(world, 300))
            farm->legs[leg].gone = false;
        if (all || chance(world, 300))
            farm->legs[leg].path = leg;
    }
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (farm->cut_off[i] && (all || chance(world, 300))) {
            farm->cut_off[i] = false;
            if (world->hosts[i].plane)
                host_link_back(&world->hosts[i]);
        }
    tell_troubles(world);
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
    uint32_t leg = some_leg(world), other = some_leg(world);

    if (leg < FARM_LEGS && chance(world, farm->spoil) && can_spare(farm, leg)) {
        say(world, "older state of leg", leg);
        farm_roll_back(farm, leg);
    }
    leg = some_leg(world);
    if (leg < FARM_LEGS && other < FARM_LEGS && leg != other && chance(world, farm->swap) && can_spare(farm, leg) &&
        can_spare(farm, other)) {
        say(world, "swap of leg", leg);
        farm->legs[leg].path = other;
        farm->legs[other].path = leg;
    }
}

/* ---- one step ---- */

/* Control: somebody has to serve; now and then it is to be somebody else. */
static void control(struct world *world)
{
    struct host *host = serving(world);

    if (!host) {
        bind_to(world, &world->hosts[below(world, FARM_HOSTS)]);
        return;
    }
    if (host->refused || host->failed) {
        if (host->refused && host->why == NV_WHY_OLD_REGISTRY)
            nv_sim_violation("the registry is called old, and is not");
        heal(world, chance(world, 512));
        bind_to(world, &world->hosts[below(world, FARM_HOSTS)]);
    } else if (chance(world, world->farm.rebind)) {
        bind_to(world, &world->hosts[below(world, FARM_HOSTS)]);
    }
}

/* A deposed host that was told so ends; one that was not goes on until somebody kills it. */
static void retire(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++) {
        struct host *host = &world->hosts[i];
        if (host->plane && host->deposed && (host->closed || chance(world, 20)))
            kill_host(world, host);
    }
}

static struct host *some_host(struct world *world)
{
    struct host *host = &world->hosts[below(world, FARM_HOSTS)];

    return host->plane ? host : &world->hosts[!host->index];
}

static void run(struct world *world)
{
    if (!nv_sim_step() && chance(world, 200))
        nv_sim_advance();
}

static void step(struct world *world)
{
    const uint64_t what = below(world, 1000);
    struct host *host = some_host(world);

    if (!host->plane || what >= 996)
        control(world);
    else if (what < 280)
        host_act(host);
    else if (what < 600)
        run(world);
    else if (what < 920)
        host_turn(host);
    else if (what < 950)
        host_events(host);
    else if (what < 970)
        host_messages(host);
    else if (what < 973)
        nv_sim_advance();
    else if (what < 985)
        trouble(world);
    else if (what < 988)
        heal(world, false);
    else if (what < 991)
        host_tend(host, false);
    else if (what < 993)
        host_clear_faults(host);
    else if (what < 994)
        farm_take_snapshot(&world->farm, (uint32_t)below(world, world->farm.leg_count));
    else if (what < 995)
        retire(world);
    else if (chance(world, world->farm.kill * 20u))
        outage(world, false);
}

/* ---- the end ---- */

static void calm(struct world *world)
{
    struct farm *farm = &world->farm;
    struct nv_sim_faults none = farm->faults;

    none.read_error = none.write_error = none.sync_error = none.dsync_error = none.punch_error = none.stall = 0;
    nv_sim_set_faults(&none);
    farm->leg_errors = farm->sync_errors = 0;
    heal(world, true);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane && world->hosts[i].deposed)
            kill_host(world, &world->hosts[i]);
}

static bool answered(const struct host *host)
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

/* Every leg is in sync by the registry's word and the plane's, and nothing is left to clear. */
static bool at_rest(struct world *world, struct host *host)
{
    nv_mirror_status status;

    if (!host_serves(host) || !answered(host) || !all_in_sync(world) || host->changing ||
        nv_volume_mirror(host->plane, host->volume, &status) != 0)
        return false;
    for (uint32_t i = 0; i < status.leg_count; i++)
        if (status.legs[i].state != NV_LANE_IN_SYNC)
            return false;
    return status.intents == 0 && status.flags == 0 && status.leg_count == world->farm.leg_count;
}

static void move_all(struct world *world)
{
    bool moved = nv_sim_step();

    follow(world);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane)
            moved |= host_move(&world->hosts[i]);
    if (!moved)
        nv_sim_advance();
}

static struct host *recover(struct world *world)
{
    for (uint32_t i = 0;; i++) {
        struct host *host = serving(world);
        if (!host || host->refused || host->failed)
            bind_to(world, &world->hosts[below(world, FARM_HOSTS)]);
        else if (i % 64 == 63) {
            host_clear_faults(host);
            host_tend(host, true);
        }
        host = serving(world);
        if (at_rest(world, host))
            return host;
        move_all(world);
        if (i > HOST_PATIENCE)
            nv_sim_violation("not every leg comes to be in sync, or not every request is answered");
    }
}

static void verify(struct world *world, struct host *host)
{
    host_verify(host);
    for (uint32_t i = 0; host->verifying; i++) {
        move_all(world);
        if (i > HOST_PATIENCE)
            nv_sim_violation("the verification does not end");
    }
    if (host->differed || host->verified == 0)
        nv_sim_violation("of %llu bytes verified, %llu pieces differ", (unsigned long long)host->verified,
                         (unsigned long long)host->differed);
}

static void stop_cleanly(struct world *world, struct host *host)
{
    world->farm.rules.closing = true;
    host_close_volume(host);
    for (uint32_t i = 0; !host->closed; i++) {
        move_all(world);
        if (i > HOST_PATIENCE)
            nv_sim_violation("the volume does not close");
    }
    host_stop(host);
    world->farm.owner = FARM_HOSTS;
    farm_expect_equal(&world->farm);
    world->farm.rules.closing = false;
}

static void read_everything(struct world *world, struct host *host)
{
    uint64_t at = 0;

    while (!host->opened)
        move_all(world);
    while (!host->clients[0])
        host_act(host);
    while (at < world->farm.cells) {
        const uint64_t left = world->farm.cells - at, count = left < 64 ? left : 64;
        if (client_read(host->clients[0], at, count))
            at += count;
        else
            move_all(world);
    }
    while (!answered(host))
        move_all(world);
}

static void end(struct world *world)
{
    struct host *host;

    calm(world);
    host = recover(world);
    verify(world, host);
    stop_cleanly(world, host);
    if (chance(world, 512))
        outage(world, true);
    else
        check_crash(world->farm.check, true);
    world->farm.rules.read_only = true;
    bind_to(world, &world->hosts[0]);
    read_everything(world, &world->hosts[0]);
    stop_cleanly(world, recover(world));
}

static void live(struct world *world, uint32_t steps)
{
    for (world->step = 0; world->step < steps; world->step++) {
        step(world);
        follow(world);
    }
    if (chance(world, 512))
        outage(world, chance(world, 512));
    else
        kill_all(world);
    if (!serving(world))
        spoil_legs(world);
}

/* ---- one seed ---- */

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

    farm->check = check_create(farm->cell_bytes, farm->cells);
    check_is_mirror(farm->check);
    farm->rules = (struct client_rules){
        .check = farm->check, .random = &farm->random, .cell_bytes = farm->cell_bytes, .block_min = farm->block_min,
        .cells = farm->cells, .zero_from = farm->zero_from, .zero_to = farm->zero_to, .cells_max = 96,
        .io_errors = !farm->must_serve, .sync_errors = !farm->must_serve, .trace = trace,
        .acknowledged = farm_acknowledged, .context = farm};
}

uint64_t mirror_run(uint64_t seed, uint32_t steps, bool trace)
{
    struct world *world = aligned_alloc(4096, sizeof *world);
    uint64_t answers;

    assert(world);
    memset(world, 0, sizeof *world);
    now = world;
    farm_draw(&world->farm, seed);
    set_rules(world, trace);
    nv_sim_begin(sim_random_next(&world->farm.random), &world->farm.faults);
    farm_make_disks(&world->farm);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        world->hosts[i] = (struct host){.farm = &world->farm, .index = i, .next_id = &world->next_id};
    for (world->life = 0; world->life < world->farm.lives; world->life++)
        live(world, steps ? steps : world->farm.steps);
    end(world);
    nv_sim_end();
    answers = world->farm.rules.answers;
    check_destroy(world->farm.check);
    farm_free(&world->farm);
    free(world);
    now = NULL;
    return answers;
}
