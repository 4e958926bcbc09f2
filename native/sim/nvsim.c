/*
 * nvsim: the plane, its sessions, the plain volume, in some worlds with a write-back log, and the file backend on the
 * simulated port, driven by model clients under a seed. A seed is a few lives of one volume: each life boots the plane on
 * what the last one left, serves random requests with faults and hang-ups, and ends in a power cut, a kill or a clean stop,
 * at any step. The last life reads everything. What must hold is written in check.h and client.h.
 *
 * usage: nvsim --seeds A..B [--steps N] [--trace]
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "limits.h"
#include "reactor/plane.h"
#include "sim/check.h"
#include "sim/client.h"
#include "sim/life.h"
#include "sim/scenario.h"

#define LOOK_EVERY 16u   /* steps between two looks of the onlooker */
#define PATIENCE 400000u /* steps without faults after which everything must have been answered */

static struct {
    uint64_t seed;
    uint32_t life, step, steps_override;
    const char *program;
    const struct life *now;
} where;

static void tell_where(void)
{
    fprintf(stderr, "seed %llu, life %u, step %u\n", (unsigned long long)where.seed, where.life, where.step);
    for (uint32_t i = 0; where.now && i < LIFE_CLIENTS; i++)
        if (where.now->clients[i])
            client_describe(where.now->clients[i]);
    fprintf(stderr, "replay: %s --seeds %llu..%llu", where.program, (unsigned long long)where.seed,
            (unsigned long long)where.seed);
    if (where.steps_override)
        fprintf(stderr, " --steps %u", where.steps_override);
    fputs(" --trace\n", stderr);
}

static uint64_t below(struct life *life, uint64_t bound)
{
    return sim_random_below(&life->scenario->random, bound);
}

static bool chance(struct life *life, unsigned of_1024)
{
    return sim_random_chance(&life->scenario->random, of_1024);
}

/* ---- boot ---- */

/* The cache may be switched on and off, and to any mode, at any time. */
static void cache(struct life *life)
{
    nv_cache_policy policy = {.mode = (uint32_t)below(life, 3), .floor_bytes = below(life, 64) * NV_CACHE_BLOCK};

    if (life->caching || !life->scenario->cache_frames)
        return;
    if (chance(life, 700))
        policy.ahead_bytes = NV_CACHE_BLOCK << below(life, 6);
    if (life->rules->trace)
        printf("-- cache: mode %u, %u bytes ahead\n", policy.mode, policy.ahead_bytes);
    if (nv_volume_set_cache(life->plane, life->volume, &policy, 1) != 0)
        nv_sim_violation("the cache policy is refused: %s", nv_last_error());
    life->caching = true;
}

/* When nothing is under way any more: no reply holds a frame, and the cache's books are right. */
static void check_cache(struct life *life)
{
    const char *wrong = life->plane->cache ? nv_cache_check(life->plane->cache) : NULL;

    for (uint32_t i = 0; i < life->scenario->reactors; i++)
        if (nv_plane_reactor(life->plane, i)->pins || nv_plane_reactor(life->plane, i)->fetches)
            wrong = "a frame is still pinned, or a fetch under way";
    if (wrong)
        nv_sim_violation("the cache: %s", wrong);
}

static void boot(struct life *life)
{
    struct scenario *scenario = life->scenario;
    nv_plane_config config = {.reactors = scenario->reactors, .cpu_first = -1, .pool_bytes = 4u << 20,
                              .connections_max = 64,
                              .cache_bytes = (uint64_t)scenario->cache_frames * NV_CACHE_BLOCK};
    uint8_t record[1024];

    nv_sim_begin(sim_random_next(&scenario->random), &scenario->faults);
    if (nv_plane_build(&config, false, &life->plane) != 0)
        nv_sim_violation("the plane does not start: %s", nv_last_error());
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++) {
        life->files[i] = nv_sim_file(sim_disk_create(scenario->image[i], scenario->disk_size[i]), scenario->align,
                                     scenario->in_memory[i]);
        if (nv_object_open(life->plane, life->files[i], scenario->align > 1 ? NV_OBJECT_DIRECT : 0, scenario->align,
                           scenario->disk_size[i], &life->objects[i]) != 0)
            nv_sim_violation("an object does not open: %s", nv_last_error());
    }
    uint64_t length = scenario_describe(scenario, life->rules->cells, life->objects, 0, 1, record);
    if (nv_volume_open(life->plane, record, length, &life->volume) != 0)
        nv_sim_violation("the volume does not open: %s", nv_last_error());
    life_open_log(life);
    onlooker_boot(life->rules->onlooker, life->plane, life->volume, scenario->reactors);
    cache(life);
}

static void open_client(struct life *life, uint32_t index)
{
    nv_connection_params params;
    uint32_t id = (uint32_t)++*life->next_id, early_length = 0;
    int socket = nv_sim_socket();
    uint8_t early[256];
    struct client *client = client_create(life->rules, id, socket, &params);

    if (chance(life, 512)) { /* a client that does not wait for GO's answer */
        client_request(client);
        early_length = client_early(client, early, (uint32_t)below(life, sizeof early));
    }
    if (nv_connection_open(life->plane, socket, life->volume, &params, early, early_length, id,
                           &life->numbers[index]) != 0)
        nv_sim_violation("a connection does not open: %s", nv_last_error());
    life->clients[index] = client;
    life->connections++;
}

/* ---- events ---- */

static void tell_latches(struct life *life)
{
    life->rules->latched = false;
    life->rules->latched_all = true;
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++) { /* a disk that only jobs use is none of the volume's business */
        life->rules->latched |= life->latched[i] && scenario_uses(life->scenario, i, life->rules->cells);
        life->rules->latched_all &= life->latched[i] || !scenario_uses(life->scenario, i, life->scenario->cells_final);
    }
}

static void take_sync_failure(struct life *life, uint32_t object)
{
    if (!life->rules->sync_errors)
        nv_sim_violation("a sync is said to have failed, and none did");
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++)
        life->latched[i] |= life->objects[i] == object;
    tell_latches(life);
}

static void take_event(struct life *life, const nv_event *event)
{
    if (life->rules->trace)
        printf("-- event %u, token %llu, result %d\n", event->kind, (unsigned long long)event->token, event->result);
    switch (event->kind) {
    case NV_EVENT_CONNECTION_CLOSED:
        check_connection_drained(life->rules->check, (uint32_t)event->token);
        assert(life->connections > 0);
        life->connections--;
        break;
    case NV_EVENT_SYNC_FAILED:
        take_sync_failure(life, (uint32_t)event->args[0]);
        break;
    case NV_EVENT_VOLUME_CHANGED:
        life->rules->cells = life->scenario->cells_final;
        check_grow(life->rules->check, life->rules->cells);
        life->changing = life->rules->growing = false;
        break;
    case NV_EVENT_VOLUME_QOS:
        life->limiting = false;
        break;
    case NV_EVENT_VOLUME_CACHE:
        life->caching = false;
        break;
    case NV_EVENT_JOB_DONE:
        if (!life->over)
            meta_done(&life->scenario->meta[event->token], event->result,
                      life->rules->io_errors || life->rules->sync_errors);
        break;
    case NV_EVENT_VOLUME_CLOSED:
        life->volume_closed = true;
        break;
    case NV_EVENT_OBJECT_CLOSED:
        break;
    default:
        life_log_event(life, event);
    }
}

static bool take_events(struct life *life)
{
    nv_event events[16];
    int count = nv_plane_events(life->plane, events, 16);

    for (int i = 0; i < count; i++)
        take_event(life, &events[i]);
    return count > 0;
}

/* ---- one step ---- */

static bool turn_reactor(struct life *life)
{
    return nv_reactor_turn(nv_plane_reactor(life->plane, (uint32_t)below(life, life->scenario->reactors)));
}

static void grow(struct life *life)
{
    uint8_t record[1024];
    uint64_t length;

    if (life->changing || life->rules->cells == life->scenario->cells_final)
        return;
    length = scenario_describe(life->scenario, life->scenario->cells_final, life->objects, 1, 2, record);
    if (nv_volume_change(life->plane, life->volume, record, length, 1) != 0)
        nv_sim_violation("the volume does not grow: %s", nv_last_error());
    life->changing = true;
}

/* Limits may hold requests up, and nothing else (what they must let through and when is nvqos's business). */
static void limit(struct life *life)
{
    nv_qos_limits limits = {.burst_us = NV_QOS_BURST_MIN_US << below(life, 8), .shares = 100};

    if (life->limiting || !life->scenario->limited)
        return;
    if (chance(life, 700))
        limits.iops = 16ull << below(life, 14);
    if (chance(life, 512))
        limits.bandwidth = NV_QOS_BANDWIDTH_MIN << below(life, 12);
    if (life->rules->trace)
        printf("-- limits: %llu I/Os, %llu bytes a second\n", (unsigned long long)limits.iops,
               (unsigned long long)limits.bandwidth);
    if (nv_volume_set_qos(life->plane, life->volume, &limits, 1) != 0)
        nv_sim_violation("the limits are refused: %s", nv_last_error());
    life->limiting = true;
}

/* The operator's word after a failed sync. */
static void clear_fault(struct life *life)
{
    if (!life->rules->latched)
        return;
    if (life->rules->trace)
        puts("-- the operator clears the fault");
    check_fault_cleared(life->rules->check);
    life->rules->clears++;
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++) {
        if (life->latched[i] && nv_object_clear_fault(life->plane, life->objects[i]) != 0)
            nv_sim_violation("a fault does not clear: %s", nv_last_error());
        if (life->latched[i])
            meta_fault_cleared(&life->scenario->meta[i]);
        life->latched[i] = false;
    }
    tell_latches(life);
}

static void end_client(struct life *life, uint32_t index)
{
    struct client *client = life->clients[index];

    switch (below(life, 5)) {
    case 0:
        client_disconnect(client);
        break;
    case 2:
        if (!client_ended(client)) { /* perhaps the plane has forgotten the connection already, or is about to */
            client_dismissed(client);
            (void)nv_connection_close(life->plane, life->numbers[index]);
        }
        break;
    case 1:
        client_shut(client);
        break;
    default:
        client_close(client, chance(life, 512));
    }
}

static void act(struct life *life)
{
    uint32_t index = (uint32_t)below(life, LIFE_CLIENTS);
    struct client *client = life->clients[index];

    if (client && client_ended(client)) {
        client_pump(client, true);
        if (client_ended(client) && chance(life, 512)) {
            client_close(client, false);
            client_destroy(client);
            life->clients[index] = client = NULL;
        }
    }
    if (!client) {
        open_client(life, index);
        return;
    }
    if (chance(life, 4))
        end_client(life, index);
    else if (chance(life, 400))
        client_pump(client, false);
    else
        client_request(client);
}

static void run_job(struct life *life)
{
    uint32_t disk = (uint32_t)below(life, SCENARIO_DISKS);

    meta_act(&life->scenario->meta[disk], &life->scenario->random, life->plane, life->objects[disk], disk);
}

static void step(struct life *life)
{
    uint64_t what = below(life, 1000);

    if (where.step % LOOK_EVERY == 0) {
        onlooker_act(life->rules->onlooker);
        life_act_on_log(life);
    }
    if (what < 300)
        act(life);
    else if (what < 640)
        nv_sim_step();
    else if (what < 960)
        turn_reactor(life);
    else if (what < 990)
        take_events(life);
    else if (what < 995)
        nv_sim_advance();
    else if (what < 997)
        clear_fault(life);
    else if (what < 998)
        run_job(life);
    else if (chance(life, 400))
        cache(life);
    else if (what < 999)
        limit(life);
    else
        grow(life);
}

/* Everything that can move moves once. False: nothing did, not even the clock. */
bool life_settle_once(struct life *life)
{
    bool moved = nv_sim_step();

    for (uint32_t i = 0; i < life->scenario->reactors; i++)
        moved |= nv_reactor_turn(nv_plane_reactor(life->plane, i));
    moved |= take_events(life);
    for (uint32_t i = 0; i < LIFE_CLIENTS; i++)
        if (life->clients[i])
            moved |= client_pump(life->clients[i], true);
    return moved || nv_sim_advance();
}

static bool all_answered(const struct life *life)
{
    for (uint32_t i = 0; i < LIFE_CLIENTS; i++)
        if (life->clients[i] && !client_ended(life->clients[i]) && client_unanswered(life->clients[i]))
            return false;
    return !life->changing;
}

/* Without further faults every request is answered, and every connection that was asked to end has ended. */
static void settle(struct life *life)
{
    struct nv_sim_faults calm = life->scenario->faults;

    calm.read_error = calm.write_error = calm.sync_error = calm.dsync_error = calm.punch_error = 0;
    nv_sim_set_faults(&calm);
    for (uint32_t i = 0; !all_answered(life); i++) {
        if (life->scenario->log.size) /* what a failed log holds waits for a flush below, and that for the operator */
            clear_fault(life);
        if (!life_settle_once(life) || i > PATIENCE)
            nv_sim_violation("requests are never answered");
    }
    for (uint32_t i = 0; !onlooker_content(life->rules->onlooker); i++)
        if (!life_settle_once(life) || i > PATIENCE)
            nv_sim_violation("a request that was traced and answered has left no record");
}

/* ---- ends ---- */

static void stop_plane(struct life *life)
{
    bool finished = false;

    nv_plane_stop(life->plane);
    for (uint32_t i = 0; !finished; i++) {
        life_settle_once(life);
        finished = true;
        for (uint32_t j = 0; j < life->scenario->reactors; j++)
            finished &= nv_reactor_finished(nv_plane_reactor(life->plane, j));
        if (i > PATIENCE)
            nv_sim_violation("the plane does not stop");
    }
    check_cache(life);
    nv_plane_free(life->plane);
    life->plane = NULL;
}

static void take_images(struct life *life, bool cache_survives)
{
    if (life->rules->trace)
        printf("-- the end: %s\n", cache_survives ? "the process dies" : "the power is cut");
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++) {
        nv_sim_crash(life->files[i], cache_survives, &life->scenario->random, life->scenario->image[i]);
        meta_check_image(&life->scenario->meta[i], life->scenario->image[i], cache_survives);
    }
    if (life->scenario->log.size)
        nv_sim_crash(life->log_file, cache_survives, &life->scenario->random, life->scenario->log.image);
    scenario_check_gaps(life->scenario);
    life->over = true;
}

/* What happens to the plane after the images are taken happens to nobody: it only has to end tidily. */
static void end_abruptly(struct life *life, bool cache_survives)
{
    take_images(life, cache_survives);
    for (uint32_t i = 0; i < LIFE_CLIENTS; i++)
        if (life->clients[i])
            client_close(life->clients[i], true);
    check_crash(life->rules->check, cache_survives);
    life->rules->closing = true;
    stop_plane(life);
}

static void end_cleanly(struct life *life)
{
    settle(life);
    life->rules->closing = true;
    if (chance(life, 512) && nv_volume_close(life->plane, life->volume, 1) != 0)
        nv_sim_violation("the volume does not close: %s", nv_last_error());
    for (uint32_t i = 0; i < LIFE_CLIENTS; i++)
        if (life->clients[i] && chance(life, 512))
            client_disconnect(life->clients[i]);
    for (uint32_t i = (uint32_t)below(life, 200); i > 0; i--)
        life_settle_once(life);
    take_images(life, true); /* what is still in flight was never promised */
    for (uint32_t i = 0; i < LIFE_CLIENTS; i++)
        if (life->clients[i])
            client_close(life->clients[i], false);
    check_crash(life->rules->check, true);
    stop_plane(life);
}

static void read_everything(struct life *life)
{
    uint64_t at = 0;

    open_client(life, 0);
    while (at < life->rules->cells) {
        uint64_t count = life->rules->cells - at < 64 ? life->rules->cells - at : 64;
        if (client_read(life->clients[0], at, count))
            at += count;
        else
            life_settle_once(life);
    }
    settle(life);
}

static void live(struct life *life, bool last)
{
    struct scenario *scenario = life->scenario;
    uint32_t steps = where.steps_override ? where.steps_override : scenario->steps;

    where.now = life;
    where.step = 0;
    life->rules->closing = life->rules->latched = life->rules->latched_all = false;
    life->rules->read_only = last;
    life->rules->growing = life->rules->cells < scenario->cells_final; /* past the end may soon not be */
    boot(life);
    if (life->rules->trace)
        printf("-- life %u: %u reactors, cells of %u bytes, blocks of %u, %u runs, zeros in %llu..%llu\n", where.life,
               scenario->reactors, scenario->cell_bytes, scenario->block_min, scenario->run_count,
               (unsigned long long)scenario->zero_from, (unsigned long long)scenario->zero_to);
    if (last) {
        struct nv_sim_faults none = {.atom = 0};
        nv_sim_set_faults(&none);
        read_everything(life);
    }
    for (; !last && where.step < steps; where.step++)
        step(life);
    if (!last && chance(life, 256)) /* all is answered: nothing is in flight when the end comes */
        settle(life);
    if (last || chance(life, 256))
        end_cleanly(life);
    else
        end_abruptly(life, chance(life, 300));
    nv_sim_end();
    for (uint32_t i = 0; i < LIFE_CLIENTS; i++)
        if (life->clients[i])
            client_destroy(life->clients[i]);
    where.now = NULL;
}

static uint64_t run_seed(uint64_t seed, bool trace)
{
    struct scenario scenario;
    uint64_t next_id = 0;

    scenario_draw(&scenario, seed);
    struct client_rules rules = {
        .check = check_create(scenario.cell_bytes, scenario.cells_first),
        .onlooker = onlooker_create(seed),
        .random = &scenario.random,
        .cell_bytes = scenario.cell_bytes,
        .block_min = scenario.block_min,
        .cells = scenario.cells_first,
        .zero_from = scenario.zero_from,
        .zero_to = scenario.zero_to,
        .cells_max = 128,
        .corner = 48,
        .longs = 100,
        .logged = scenario.log.size > 0,
        .io_errors = scenario.faults.read_error || scenario.faults.write_error || scenario.faults.punch_error,
        .sync_errors = scenario.faults.sync_error || scenario.faults.dsync_error ||
                       scenario.faults.write_error, /* a FUA write that fails counts as a failed sync */
        .trace = trace,
    };
    where.seed = seed;
    for (where.life = 0; where.life <= scenario.lives; where.life++) {
        struct life life = {.scenario = &scenario, .rules = &rules, .next_id = &next_id};
        live(&life, where.life == scenario.lives);
    }
    check_destroy(rules.check);
    onlooker_destroy(rules.onlooker);
    scenario_free(&scenario);
    if (trace)
        printf("seed %llu: %llu requests, %llu answers\n", (unsigned long long)seed,
               (unsigned long long)rules.requests, (unsigned long long)rules.answers);
    return rules.answers;
}

static int usage(const char *program)
{
    fprintf(stderr, "usage: %s --seeds A..B [--steps N] [--trace]\n", program);
    return 2;
}

int main(int argc, char **argv)
{
    unsigned long long first = 0, last = 0;
    uint64_t answers = 0;
    bool trace = false, seeds = false;

    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seeds") && i + 1 < argc)
            seeds = sscanf(argv[++i], "%llu..%llu", &first, &last) == 2 && first <= last;
        else if (!strcmp(argv[i], "--steps") && i + 1 < argc)
            where.steps_override = (uint32_t)strtoul(argv[++i], NULL, 10);
        else if (!strcmp(argv[i], "--trace"))
            trace = true;
        else
            return usage(argv[0]);
    }
    if (!seeds)
        return usage(argv[0]);
    where.program = argv[0];
    nv_sim_on_violation = tell_where;
    for (uint64_t seed = first; seed <= last; seed++)
        answers += run_seed(seed, trace);
    printf("%llu seeds, %llu answers judged, no violation\n", last - first + 1, (unsigned long long)answers);
    return 0;
}
