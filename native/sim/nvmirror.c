/*
 * nvmirror: the mirrored volume in the simulated world (mirror.c, exhaustive.c), with the registry, the links and the leg
 * machine that production has. What must hold is written in check.h, client.h and farm.h.
 *
 * usage: nvmirror --seeds A..B [--steps N] [--trace] [--follow CELL]
 *        nvmirror --exhaustive PART/PARTS          every short sequence of operations; part 0/1 is all of them
 *        nvmirror --lost-syncs PART/PARTS          ... in which syncs of the last leg in sync fail
 *        nvmirror --run NAME [--trace]             one of those again, by the name that a violation gives
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "sim/mirror.h"
#include "sim/tally.h"

static struct {
    unsigned long long seed;
    uint32_t steps;
    const char *program;
} where;

static void tell_where(void)
{
    const char *name = exhaustive_name();

    mirror_describe();
    if (name[0]) {
        fprintf(stderr, "replay: %s --run %s --trace\n", where.program, name);
        return;
    }
    fprintf(stderr, "seed %llu\nreplay: %s --seeds %llu..%llu", where.seed, where.program, where.seed, where.seed);
    if (where.steps)
        fprintf(stderr, " --steps %u", where.steps);
    fputs(" --trace\n", stderr);
}

static void add(struct mirror_figures *sum, struct mirror_figures one)
{
    sum->answers += one.answers;
    sum->crashes += one.crashes;
    sum->commits += one.commits;
    sum->inspections += one.inspections;
}

static void tell(const struct mirror_figures *figures)
{
    printf("%llu answers judged, %llu crash points, %llu changes of the registry, %llu inspections, no violation\n",
           (unsigned long long)figures->answers, (unsigned long long)figures->crashes,
           (unsigned long long)figures->commits, (unsigned long long)figures->inspections);
}

static int run_seeds(unsigned long long first, unsigned long long last, bool trace)
{
    struct mirror_figures sum = {0};

    for (where.seed = first; where.seed <= last; where.seed++)
        add(&sum, mirror_run(where.seed, where.steps, trace));
    printf("%llu seeds, ", last - first + 1);
    tell(&sum);
    tally_print(last - first + 1);
    return 0;
}

static int run_exhaustive(enum exhaustive_family family, unsigned part, unsigned parts)
{
    struct mirror_figures sum = {0};
    uint64_t sequences;

    printf("%llu runs, ", (unsigned long long)exhaustive_run(family, part, parts, &sum, &sequences));
    tell(&sum);
    printf("%llu sequences of operations\n", (unsigned long long)sequences);
    return 0;
}

static int usage(void)
{
    fprintf(stderr, "usage: %s --seeds A..B [--steps N] [--trace] [--follow CELL] | --exhaustive PART/PARTS |"
            " --lost-syncs PART/PARTS | --run NAME [--trace]\n", where.program);
    return 2;
}

int main(int argc, char **argv)
{
    unsigned long long first = 0, last = 0;
    unsigned part = 0, parts = 0;
    enum exhaustive_family family = EXHAUSTIVE_LIVES;
    const char *name = NULL;
    bool trace = false, seeds = false;

    where.program = argv[0];
    nv_sim_on_violation = tell_where;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seeds") && i + 1 < argc)
            seeds = sscanf(argv[++i], "%llu..%llu", &first, &last) == 2 && first <= last;
        else if (!strcmp(argv[i], "--exhaustive") && i + 1 < argc)
            (void)sscanf(argv[++i], "%u/%u", &part, &parts);
        else if (!strcmp(argv[i], "--lost-syncs") && i + 1 < argc && (family = EXHAUSTIVE_SYNCS))
            (void)sscanf(argv[++i], "%u/%u", &part, &parts);
        else if (!strcmp(argv[i], "--run") && i + 1 < argc)
            name = argv[++i];
        else if (!strcmp(argv[i], "--steps") && i + 1 < argc)
            where.steps = (uint32_t)strtoul(argv[++i], NULL, 10);
        else if (!strcmp(argv[i], "--trace"))
            trace = true;
        else if (!strcmp(argv[i], "--follow") && i + 1 < argc)
            mirror_follow(strtoull(argv[++i], NULL, 10));
        else
            return usage();
    }
    if (seeds)
        return run_seeds(first, last, trace);
    if (part < parts)
        return run_exhaustive(family, part, parts);
    return name && exhaustive_replay(name, trace) ? 0 : usage();
}
