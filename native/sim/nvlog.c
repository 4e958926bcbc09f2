/*
 * nvlog: the write-back log (native/log) in the simulator. Every violation prints what repeats it.
 *
 * usage: nvlog --seeds A..B [--trace]       lives at random: crashes, torn writes, faults of the log's device and below
 *        nvlog --every SEED                 one life, cut off at each of its steps
 *        nvlog --exhaustive LENGTH          every short sequence of requests, cut off at many of its steps
 *        nvlog --crowd A..B [--trace]       the same with many requests at once over storage that keeps memory for long
 *        nvlog --chains A..B                chains of events that hardly ever come by chance (log_world.h)
 *        nvlog --pace A..B                  a rate of destaging, in simulated time
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "sim/log_world.h"

#define CUTS 4u /* of each sequence of --exhaustive */

static struct world world;
static struct world_plan plan;

static void tell(void)
{
    fprintf(stderr, "  seed %" PRIu64 ", life %" PRIu64 ", step %" PRIu64 ", crash at %" PRId64 "%s%s\n", plan.seed, world.life,
            world.step, plan.crash_at, plan.script ? ", script " : "", plan.script ? plan.script : "");
    fprintf(stderr, "  again: nvlog %s %" PRIu64 "..%" PRIu64 " --trace\n", plan.crowded ? "--crowd" : "--seeds", plan.seed,
            plan.seed);
}

/* What a seed means. */
static struct world_plan by_chance(uint64_t seed)
{
    struct sim_random random = {seed ^ 0x6e766c6f67ull};
    struct world_plan made = {.seed = seed, .crash_at = -1, .lives = 3};

    made.blocks = 4 + (uint32_t)sim_random_below(&random, MODEL_BLOCKS - 4 + 1);
    made.ring = NV_LOG_RING_MIN << sim_random_below(&random, 2);
    made.depth = 1 + (uint32_t)sim_random_below(&random, WORLD_REQUESTS);
    made.steps = 200 + (uint32_t)sim_random_below(&random, 3000);
    made.bypass = sim_random_chance(&random, 500) ? 3u * MODEL_BLOCK : NV_LOG_BYPASS_MAX;
    made.stream = sim_random_chance(&random, 200) ? 6u * MODEL_BLOCK : 0;
    made.age_ms = 1 + (uint32_t)sim_random_below(&random, 40);
    made.log_trouble = sim_random_chance(&random, 300) ? 900 : 0;
    made.leg_trouble = sim_random_chance(&random, 200) ? 900 : 0;
    if (sim_random_chance(&random, 250)) { /* nothing goes past the log: what a crash leaves is a prefix */
        made.pure = true;
        made.ring = WORLD_RING_MAX;
        made.bypass = NV_LOG_BYPASS_MAX;
        made.steps = 100 + (uint32_t)sim_random_below(&random, 700);
        made.stream = made.log_trouble = made.leg_trouble = 0;
    }
    made.deadline_ms = made.log_trouble && sim_random_chance(&random, 300) ? 20 : 0;
    made.rate = sim_random_chance(&random, 256) ? 4096ull << sim_random_below(&random, 12) : 0;
    return made;
}

/*
 * More reads than the log has memory for; or a log whose device hangs past its deadline again and again, with much that goes
 * past it.
 */
static void crowd(struct world_plan *made)
{
    made->crowded = true;
    made->depth = WORLD_REQUESTS + (uint32_t)(made->seed % (WORLD_CROWD - WORLD_REQUESTS)) + 1;
    made->ring = NV_LOG_RING_MIN;
    made->blocks = MODEL_BLOCKS;
    if (made->seed % 3)
        return;
    made->pure = false;
    made->blocks = 16;
    made->steps = 500;
    made->lives = 4;
    made->bypass = 2u * MODEL_BLOCK;
    made->deadline_ms = 5;
    made->log_trouble = 900;
    made->rate = 64u << 10; /* so that a batch has not all begun when the log fails */
}

static int seeds(uint64_t first, uint64_t last, bool crowded, bool trace)
{
    uint64_t done = 0, crashes = 0, hung = 0;

    for (uint64_t seed = first; seed <= last; seed++) {
        plan = by_chance(seed);
        plan.trace = trace;
        if (crowded)
            crowd(&plan);
        world_run(&world, &plan);
        done += world.done;
        crashes += world.crashes;
        hung += world.hung_openings;
    }
    printf("seeds %" PRIu64 "..%" PRIu64 ": %" PRIu64 " requests, %" PRIu64 " crashes, %" PRIu64
           " openings that hung, no violation\n", first, last, done, crashes, hung);
    return 0;
}

static int every(uint64_t seed)
{
    const struct world_plan whole = by_chance(seed);
    const uint64_t steps = 300;

    for (uint64_t step = 0; step < steps; step++) {
        plan = whole;
        plan.lives = 2;
        plan.crash_at = (int64_t)step;
        plan.steps = 100;
        world_run(&world, &plan);
    }
    printf("seed %" PRIu64 ": cut off at each of %" PRIu64 " steps, no violation\n", seed, steps);
    return 0;
}

static int exhaustive(uint32_t length)
{
    static const char alphabet[] = "abABztfd";
    const uint64_t letters = sizeof alphabet - 1;
    uint64_t count = 1;
    char script[16] = {0};

    for (uint32_t i = 0; i < length; i++)
        count *= letters;
    for (uint64_t number = 0; number < count; number++) {
        for (uint64_t i = 0, rest = number; i < length; i++, rest /= letters)
            script[i] = alphabet[rest % letters];
        for (uint32_t cut = 1; cut <= CUTS; cut++) {
            plan = (struct world_plan){.seed = number * CUTS + cut, .blocks = 8, .ring = NV_LOG_RING_MIN, .depth = 4, .lives = 2,
                                       .steps = 40 + 12 * length, .bypass = 5u * MODEL_BLOCK, .age_ms = 5, .script = script,
                                       .crash_at = (int64_t)(cut * (40 + 12 * length) / CUTS)};
            world_run(&world, &plan);
        }
    }
    printf("%" PRIu64 " sequences of %u requests, %" PRIu64 " runs, no violation\n", count, length, count * CUTS);
    return 0;
}

static int chains(uint64_t first, uint64_t last)
{
    for (uint64_t seed = first; seed <= last; seed++) {
        plan = (struct world_plan){.seed = seed, .crash_at = -1};
        world_overtaken(&world, seed);
        world_late_sync(&world, seed);
        world_lost_tail(&world, seed);
    }
    printf("seeds %" PRIu64 "..%" PRIu64 ": no violation\n", first, last);
    return 0;
}

static int pace(uint64_t first, uint64_t last)
{
    for (uint64_t seed = first; seed <= last; seed++) {
        plan = (struct world_plan){.seed = seed, .crash_at = -1};
        pace_run(seed);
    }
    printf("seeds %" PRIu64 "..%" PRIu64 ": every rate was held, and held nobody up\n", first, last);
    return 0;
}

int main(int argc, char **argv)
{
    uint64_t first, last;

    nv_sim_on_violation = tell;
    if (argc >= 3 && strcmp(argv[1], "--seeds") == 0 && sscanf(argv[2], "%" SCNu64 "..%" SCNu64, &first, &last) == 2)
        return seeds(first, last, false, argc > 3 && strcmp(argv[3], "--trace") == 0);
    if (argc >= 3 && strcmp(argv[1], "--crowd") == 0 && sscanf(argv[2], "%" SCNu64 "..%" SCNu64, &first, &last) == 2)
        return seeds(first, last, true, argc > 3 && strcmp(argv[3], "--trace") == 0);
    if (argc == 3 && strcmp(argv[1], "--every") == 0)
        return every(strtoull(argv[2], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "--exhaustive") == 0 && strtoul(argv[2], NULL, 10) <= 8)
        return exhaustive((uint32_t)strtoul(argv[2], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "--pace") == 0 && sscanf(argv[2], "%" SCNu64 "..%" SCNu64, &first, &last) == 2)
        return pace(first, last);
    if (argc == 3 && strcmp(argv[1], "--chains") == 0 && sscanf(argv[2], "%" SCNu64 "..%" SCNu64, &first, &last) == 2)
        return chains(first, last);
    fputs("usage: nvlog --seeds A..B [--trace] | --every SEED | --exhaustive LENGTH | --crowd A..B | --chains A..B | --pace A..B\n", stderr);
    return 2;
}
