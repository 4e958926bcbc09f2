/*
 * nvqos: limits and shares of volumes in a prompt simulated world (qos_world.h). What must hold is written in
 * qos_judge.h, in answered() of qos_world.c, and here.
 *
 * usage: nvqos --seeds A..B    random limits, changes of limits, clients that come and go, stops while requests wait
 *        nvqos --hold          what limits let through in 10 s of simulated time, one line a case: achieved / limit
 *        nvqos --shares        what volumes with shares get of a busy reactor, one line a volume: got / its part
 */
#include <stdio.h>
#include <string.h>

#include "io/io_sim.h"
#include "limits.h"
#include "sim/qos_world.h"

#define PATIENCE 2000000u
#define HOLD_NS 10000000000ull
#define TURNS 1200u

static struct {
    uint64_t seed;
    const char *program;
} where;

static void tell_where(void)
{
    fprintf(stderr, "seed %llu\nreplay: %s --seeds %llu..%llu\n", (unsigned long long)where.seed, where.program,
            (unsigned long long)where.seed, (unsigned long long)where.seed);
}

static uint64_t below(uint64_t bound)
{
    return sim_random_below(&world.random, bound);
}

static bool chance(unsigned of_1024)
{
    return sim_random_chance(&world.random, of_1024);
}

/* From tens to tens of millions, every size as likely. */
static uint64_t draw_rate(unsigned least_bits, unsigned more_bits)
{
    const uint64_t top = 1ull << (least_bits + below(more_bits));

    return top + below(top);
}

static nv_qos_limits draw_limits(void)
{
    nv_qos_limits limits = {.burst_us = NV_QOS_BURST_MIN_US << below(8), .shares = 1 + (uint32_t)below(300)};

    if (chance(700))
        limits.iops = draw_rate(5, 14);
    if (chance(512))
        limits.bandwidth = draw_rate(16, 14);
    if (chance(200))
        limits.io_bytes = 4096u << below(5);
    return limits;
}

/* ---- random worlds ---- */

static void something_happens(void)
{
    const uint32_t volume = (uint32_t)below(world.volume_count);
    const uint64_t what = below(1000);
    struct qos_client *client = world.clients[below(WORLD_CLIENTS)];
    nv_qos_limits limits;

    if (what < 990)
        return;
    if (what < 993 && !world.volumes[volume].changing) {
        limits = draw_limits();
        world_set_qos(volume, &limits);
    } else if (what < 997 && client && client->open) {
        world_end_client(client, (unsigned)below(3));
    } else {
        world_add_client(volume, 1 + (uint32_t)below(24), QOS_MIXED);
    }
}

static void settle(void)
{
    world.filling = false;
    for (uint32_t i = 0; world_unanswered(); i++)
        if (!world_step() || i > PATIENCE)
            nv_sim_violation("requests are never answered");
}

/* Limits that would hold everything up for hours must not hold up a close. */
static void close_volumes(void)
{
    const nv_qos_limits slow = {.iops = 1, .bandwidth = NV_QOS_BANDWIDTH_MIN, .burst_us = NV_QOS_BURST_MIN_US,
                                .shares = 1};
    uint32_t closing = 0, closed = 0;

    for (uint32_t i = 0; i < world.volume_count; i++)
        if (!world.volumes[i].changing)
            world_set_qos(i, &slow);
    world.filling = true;
    for (uint32_t i = (uint32_t)below(3000); i > 0; i--)
        world_step();
    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i])
            world.clients[i]->dismissed = true;
    for (uint32_t i = 0; i < world.volume_count; i++, closing++)
        if (nv_volume_close(world.plane, world.volumes[i].number, i) != 0)
            nv_sim_violation("a volume does not close: %s", nv_last_error());
    world.filling = false;
    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i] && world.clients[i]->open)
            world_end_client(world.clients[i], 0);
    const uint64_t from_ns = nv_sim_clock_ns(), limit_ns = (NV_FORCE_CLOSE_MS + 2000) * 1000000ull;
    for (; closed < closing; world_step()) {
        closed = 0;
        for (uint32_t i = 0; i < world.volume_count; i++)
            closed += world.volumes[i].closed;
        if (nv_sim_clock_ns() - from_ns > limit_ns)
            nv_sim_violation("%u of %u volumes closed in time", closed, closing);
    }
}

static void run_seed(uint64_t seed)
{
    nv_qos_limits limits;

    where.seed = seed;
    world_begin(seed, 1 + (uint32_t)(seed % 3));
    world.strict = true;
    for (uint32_t i = 1 + (uint32_t)below(3); i > 0; i--) {
        limits = draw_limits();
        world_add_volume(&limits, 512u << below(7));
    }
    world.filling = true;
    for (uint32_t i = 1 + (uint32_t)below(5); i > 0; i--)
        world_add_client((uint32_t)below(world.volume_count), 1 + (uint32_t)below(24), QOS_MIXED);
    for (uint32_t i = 2000 + (uint32_t)below(4000); i > 0; i--) {
        something_happens();
        world_step();
    }
    if (chance(512))
        settle();
    if (chance(512))
        close_volumes();
    world_end();
}

/* ---- 10 seconds ---- */

struct hold_case {
    nv_qos_limits limits;
    enum qos_mix mix;
    uint32_t block, depth, connections, reactors;
};

static void hold(const struct hold_case *one)
{
    uint64_t from_ns, rate = one->limits.iops ? one->limits.iops : one->limits.bandwidth;
    const unsigned which = one->limits.iops ? 0 : 1;

    world_begin(1, one->reactors);
    world.strict = true;
    world_add_volume(&one->limits, one->block);
    while (world.volumes[0].changing)
        world_step();
    for (uint32_t i = 0; i < one->connections; i++)
        world_add_client(0, one->depth, one->mix);
    world.filling = true;
    from_ns = nv_sim_clock_ns();
    while (nv_sim_clock_ns() - from_ns < HOLD_NS)
        world_step();
    printf("%s %llu block %u depth %u connections %u reactors %u %s: %.4f\n", which ? "bandwidth" : "iops",
           (unsigned long long)rate, one->block, one->depth, one->connections, one->reactors,
           one->mix == QOS_WRITES ? "write" : "read",
           (double)world.volumes[0].judge.started[which] / ((double)rate * ((double)HOLD_NS / 1e9)));
    world_end();
}

static void hold_all(void)
{
    const nv_qos_limits limits[] = {{.iops = 1000, .burst_us = 100000, .shares = 100},
                                    {.bandwidth = 16u << 20, .burst_us = 100000, .shares = 100}};

    for (unsigned which = 0; which < 2; which++)
        for (uint32_t depth = 1; depth <= 32; depth += 31)
            for (uint32_t connections = 1; connections <= 4; connections += 3)
                for (uint32_t reactors = 1; reactors <= 2; reactors++)
                    for (enum qos_mix mix = QOS_READS; mix <= QOS_WRITES; mix++)
                        hold(&(struct hold_case){limits[which], mix, which ? 16384 : 4096, depth, connections,
                                                 reactors});
}

/* ---- shares ---- */

/* A turn, and before it everything else that can happen: each turn finds every volume with work. */
static void busy_turn(void)
{
    bool moved;

    do
        for (moved = world_clients(); nv_sim_step();)
            moved = true;
    while (moved);
    world_move();
}

static void note_served(uint64_t *volumes, uint64_t *clients)
{
    for (uint32_t i = 0; i < world.volume_count; i++)
        volumes[i] = world.volumes[i].served;
    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        clients[i] = world.clients[i] ? world.clients[i]->answers : 0;
}

/* What the connection of a volume that got least was given, of an equal part. */
static double least_of_connections(uint32_t volume, uint32_t count, const uint64_t *before, uint64_t served)
{
    uint64_t least = UINT64_MAX;

    for (uint32_t i = 0; i < WORLD_CLIENTS; i++)
        if (world.clients[i] && world.clients[i]->volume == volume && world.clients[i]->answers - before[i] < least)
            least = world.clients[i]->answers - before[i];
    return (double)least * count / (double)served;
}

static void share(const uint32_t *shares, uint32_t count, const uint32_t *clients, uint32_t block, bool memory)
{
    uint64_t before[WORLD_VOLUMES], answers_before[WORLD_CLIENTS], served = 0;
    uint32_t weights = 0;

    world_begin(2 + memory, 1);
    world.room = QOS_DEPTH_MAX * (block + 64u); /* a small one would let one reply go a turn */
    for (uint32_t i = 0; i < count; i++) {
        const nv_qos_limits limits = {.shares = shares[i], .burst_us = NV_QOS_BURST_MIN_US};
        world_add_volume(&limits, block);
        for (uint32_t j = 0; j < clients[i]; j++)
            world_add_client(i, QOS_DEPTH_MAX, QOS_READS);
        weights += shares[i];
    }
    world.filling = true;
    for (uint32_t i = 0; i < TURNS; i++) {
        if (i == TURNS / 10)
            note_served(before, answers_before);
        busy_turn();
    }
    for (uint32_t i = 0; i < count; i++)
        served += world.volumes[i].served - before[i];
    for (uint32_t i = 0; i < count; i++)
        printf("shares %u of %u block %u%s connections %u: %.4f, each of them at least %.4f\n", shares[i], weights, block,
               memory ? " in memory" : "", clients[i],
               (double)(world.volumes[i].served - before[i]) * weights / ((double)served * shares[i]),
               least_of_connections(i, clients[i], answers_before, world.volumes[i].served - before[i]));
    world_end();
}

static void share_all(void)
{
    for (unsigned memory = 0; memory < 2; memory++) {
        share((uint32_t[]){300, 100}, 2, (uint32_t[]){3, 3}, 4096, memory);
        share((uint32_t[]){300, 100}, 2, (uint32_t[]){3, 3}, 65536, memory);
        share((uint32_t[]){100, 100}, 2, (uint32_t[]){2, 6}, 4096, memory);
        share((uint32_t[]){1000, 10, 100}, 3, (uint32_t[]){3, 3, 2}, 4096, memory);
        share((uint32_t[]){100, 100, 100, 700}, 4, (uint32_t[]){1, 2, 2, 3}, 4096, memory);
    }
}

int main(int argc, char **argv)
{
    unsigned long long first, last;

    where.program = argv[0];
    nv_sim_on_violation = tell_where;
    if (argc == 3 && !strcmp(argv[1], "--seeds") && sscanf(argv[2], "%llu..%llu", &first, &last) == 2) {
        uint64_t answers = 0;
        for (uint64_t seed = first; seed <= last; seed++) {
            run_seed(seed);
            answers += world.answers;
        }
        printf("%llu seeds, %llu answers judged, no violation\n", last - first + 1, (unsigned long long)answers);
    } else if (argc == 2 && !strcmp(argv[1], "--hold")) {
        hold_all();
    } else if (argc == 2 && !strcmp(argv[1], "--shares")) {
        share_all();
    } else {
        fprintf(stderr, "usage: %s --seeds A..B | --hold | --shares\n", argv[0]);
        return 2;
    }
    return 0;
}
