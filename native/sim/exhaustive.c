/*
 * Every short life of a mirror: all sequences of at most three operations of an alphabet of twelve, with either leg as the
 * one that has troubles, hurried and not, ended by a power cut after which that leg may be missing, and for every power cut
 * every choice of what was not durable yet. The farm is small and has no other troubles; the judge is the one of the seeds.
 *
 * And every short life whose last leg in sync loses what it has not written down: the other leg is gone, then at most five
 * operations of five, some of which are syncs that fail, then that leg comes back, is copied to, and intents are cleared.
 *
 * The choices of one sequence are found by running it: each power cut asks for a number a sector, the script answers 0
 * where it has no other answer yet, and counts up from its end, like an odometer, until every answer was given.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim/answer.h"
#include "sim/mirror_world.h"

#define LETTERS "abcdefghijklmn"
#define LONGEST 5u
#define CHOICES 64u
#define HURRY 3u                    /* moves that an operation gets before the next, in a hurried run */
#define IDLE 4u                     /* times that only the clock moved: after that nothing happens by itself for long */
#define PATIENCE 3000u
#define IDLE_MS 2000u               /* of intents where syncs are to fail: no operation waits so long */
#define MOMENT_NS 5000000u

enum operation {
    WRITE,                          /* a */
    WRITE_FUA,                      /* b */
    WRITE_OVER,                     /* c: overlaps, and crosses into another region */
    ZERO,                           /* d */
    FLUSH,                          /* e */
    READ,                           /* f */
    LEG_FAILS,                      /* g */
    LEG_RETURNS,                    /* h */
    CRASH,                          /* i: of everything; then a host binds */
    CONTROL,                        /* j: the links to control are cut, or come back */
    REBIND,                         /* k: to the other host, while this one still runs */
    TIME,                           /* l: a second passes */
    FLUSH_LOST,                     /* m: every sync fails, and loses what it should have saved */
    CLEAR,                          /* n: the operator clears the faults */
};

struct family {
    const char *letters;
    uint32_t longest;
    bool alone;                     /* the leg that fails is gone from the beginning, and back in the end */
};

static const struct family families[EXHAUSTIVE_FAMILIES] = {
    [EXHAUSTIVE_LIVES] = {"abcdefghijkl", 3, false},
    [EXHAUSTIVE_SYNCS] = {"aelmn", 5, true},
};

struct run {
    uint8_t operations[LONGEST];
    uint32_t count;
    uint32_t victim;                /* the leg that fails */
    bool missing;                   /* ... and is not there after the last power cut */
    bool hurried;
    bool alone;                     /* of a family that is */
    uint8_t choices[CHOICES], bounds[CHOICES];
    uint32_t length, at;            /* of the choices */
};

static char under_way[96];

const char *exhaustive_name(void)
{
    return under_way;
}

/* ---- names: the operations' letters, victim, missing, hurried, choices ---- */

static void name_run(const struct run *run)
{
    size_t used = 0;

    for (uint32_t i = 0; i < run->count; i++)
        under_way[used++] = LETTERS[run->operations[i]];
    used += (size_t)snprintf(under_way + used, sizeof under_way - used, ".%u%u%u.", run->victim, run->missing,
                             run->hurried);
    for (uint32_t i = 0; i < run->length && used + 1 < sizeof under_way; i++)
        under_way[used++] = (char)('0' + run->choices[i]);
    under_way[used] = 0;
}

/* A life without such an operation is of the first family. */
static bool loses(uint8_t operation)
{
    return operation == FLUSH_LOST;
}

static bool parse_run(const char *name, struct run *out)
{
    const char *dot = strchr(name, '.');

    *out = (struct run){.count = dot ? (uint32_t)(dot - name) : LONGEST + 1};
    if (out->count > LONGEST || strlen(dot) < 5 || dot[4] != '.' || strlen(dot + 5) > CHOICES)
        return false;
    for (uint32_t i = 0; i < out->count; i++) {
        const char *letter = strchr(LETTERS, name[i]);
        if (!letter)
            return false;
        out->operations[i] = (uint8_t)(letter - LETTERS);
        out->alone |= loses(out->operations[i]);
    }
    out->victim = dot[1] == '1';
    out->missing = dot[2] == '1';
    out->hurried = dot[3] == '1';
    for (const char *digit = dot + 5; *digit; digit++) {
        out->bounds[out->length] = 255;
        out->choices[out->length++] = (uint8_t)(*digit - '0');
    }
    return true;
}

/* ---- choices ---- */

static uint64_t pick(void *context, uint64_t bound)
{
    struct run *run = context;

    assert(bound > 0 && bound < 64 && run->at < CHOICES);
    if (run->at == run->length)
        run->choices[run->length++] = 0;
    run->bounds[run->at] = (uint8_t)bound;
    assert(run->choices[run->at] < bound);
    return run->choices[run->at++];
}

/* False: every choice was made. */
static bool next_choices(struct run *run)
{
    while (run->length > 0 && run->choices[run->length - 1] + 1 == run->bounds[run->length - 1])
        run->length--;
    if (run->length > 0)
        run->choices[run->length - 1]++;
    return run->length > 0;
}

/* ---- operations ---- */

static bool all_answered(const struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        if (world->hosts[i].plane && !world_answered(&world->hosts[i]))
            return false;
    return true;
}

/* Until nothing moves any more by itself, and every request has its answer. */
static void settle(struct world *world)
{
    uint32_t idle = 0;

    for (uint32_t i = 0; idle < IDLE || !all_answered(world); i++) {
        idle += !world_move(world);
        if (i > PATIENCE)
            nv_sim_violation("not every request is answered");
    }
}

static void go_on(struct world *world, const struct run *run)
{
    if (!run->hurried)
        settle(world);
    for (uint32_t i = 0; run->hurried && i < HURRY; i++)
        world_move(world);
}

static void ask(struct world *world, uint16_t command, uint16_t flags, uint64_t first, uint64_t count)
{
    struct host *host = world_serving(world);

    if (!host || !host->opened || host->closing)
        return; /* nobody to ask */
    client_ask(host_client(host), command, flags, first, count);
}

static void return_leg(struct world *world, const struct run *run)
{
    world->farm.legs[run->victim].gone = false;
    world_tell_troubles(world);
    for (uint32_t i = 0; i < 5; i++) { /* look at it, describe it, wish for its resync */
        struct host *host = world_serving(world);
        if (host)
            host_tend(host, false);
        go_on(world, run);
    }
}

static void control(struct world *world)
{
    for (uint32_t i = 0; i < FARM_HOSTS; i++) {
        if (!world->farm.cut_off[i]) {
            farm_cut(&world->farm, i);
            continue;
        }
        world->farm.cut_off[i] = false;
        if (world->hosts[i].plane)
            host_link_back(&world->hosts[i]);
    }
}

static void rebind(struct world *world)
{
    const struct host *host = world_serving(world);

    world_bind(world, &world->hosts[host ? !host->index : 0]);
}

static void pass_time(struct world *world)
{
    const uint64_t until_ns = nv_sim_clock_ns() + 1000000000u;

    while (nv_sim_clock_ns() < until_ns)
        if (!world_move(world))
            nv_sim_jump(MOMENT_NS); /* perhaps nobody waits for the clock */
}

static void set_sync_errors(struct world *world, uint16_t chance)
{
    world->farm.sync_errors = chance;
    world_tell_troubles(world);
}

/* While syncs fail; then they succeed again. */
static void flush_in_vain(struct world *world, const struct run *run)
{
    set_sync_errors(world, 1024);
    ask(world, COMMAND_FLUSH, 0, 0, 0);
    go_on(world, run);
    set_sync_errors(world, 0);
}

static void operate(struct world *world, const struct run *run, enum operation operation)
{
    switch (operation) {
    case WRITE:
        ask(world, COMMAND_WRITE, 0, 1, 1);
        break;
    case WRITE_FUA:
        ask(world, COMMAND_WRITE, FLAG_FUA, 1, 1);
        break;
    case WRITE_OVER:
        ask(world, COMMAND_WRITE, 0, 1, 2);
        break;
    case ZERO:
        ask(world, COMMAND_ZEROES, 0, 1, 1);
        break;
    case FLUSH:
        ask(world, COMMAND_FLUSH, 0, 0, 0);
        break;
    case READ:
        ask(world, COMMAND_READ, 0, 0, 4);
        break;
    case LEG_FAILS:
        world->farm.legs[run->victim].gone = true;
        world_tell_troubles(world);
        break;
    case LEG_RETURNS:
        return_leg(world, run);
        break;
    case CRASH:
        world_outage(world, true);
        world_bind(world, &world->hosts[0]);
        break;
    case CONTROL:
        control(world);
        break;
    case REBIND:
        rebind(world);
        break;
    case TIME:
        pass_time(world);
        break;
    case FLUSH_LOST:
        flush_in_vain(world, run);
        break;
    case CLEAR:
        if (world_serving(world))
            host_clear_faults(world_serving(world));
        break;
    }
    go_on(world, run);
}

/* ---- one run ---- */

static struct host *bind_and_wait(struct world *world, struct host *host)
{
    world_bind(world, host);
    for (uint32_t i = 0; !host->attached && !host->refused && !host->failed; i++) {
        world_move(world);
        if (i > PATIENCE)
            nv_sim_violation("the mirror does not attach");
    }
    return host;
}

/* After the last power cut, perhaps without the victim: what the other leg says must be right. Then it comes back. */
static void end(struct world *world, const struct run *run)
{
    struct host *host;

    world_outage(world, true);
    world->farm.legs[run->victim].gone = run->missing;
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        world->farm.cut_off[i] = false;
    host = bind_and_wait(world, &world->hosts[0]);
    if (host->attached)
        world_read_everything(world, host);
    world_calm(world);
    host = world_recover(world);
    world_read_everything(world, host);
    world_stop(world, host);
}

/* Behind the operations of a life with one leg: all that may be lost is to be written down, or to be there once more. */
static void end_alone(struct world *world, const struct run *run)
{
    host_clear_faults(world_serving(world));
    return_leg(world, run);
    for (uint32_t i = 0; i < 2u * IDLE_MS / 1000u; i++)
        pass_time(world);
}

static struct mirror_figures live(struct run *run, bool trace)
{
    struct world *world = world_create();
    struct mirror_figures figures;
    const struct run calm = {.victim = run->victim};

    name_run(run);
    run->at = 0;
    farm_plain(&world->farm);
    if (run->alone)
        world->farm.policy.intent_idle_ms = IDLE_MS;
    world->farm.pick = pick;
    world->farm.pick_context = run;
    world_begin(world, trace);
    bind_and_wait(world, &world->hosts[0]);
    if (run->alone)
        operate(world, &calm, LEG_FAILS);
    for (world->step = 0; world->step < run->count; world->step++)
        operate(world, run, run->operations[world->step]);
    if (run->alone)
        end_alone(world, &calm);
    end(world, run);
    figures = world_figures(world);
    world_destroy(world);
    under_way[0] = 0;
    return figures;
}

bool exhaustive_replay(const char *name, bool trace)
{
    struct run run;

    if (!parse_run(name, &run))
        return false;
    live(&run, trace);
    return true;
}

/* ---- all of them ---- */

static void add(struct mirror_figures *sum, struct mirror_figures one)
{
    sum->answers += one.answers;
    sum->crashes += one.crashes;
    sum->commits += one.commits;
    sum->inspections += one.inspections;
}

static uint64_t run_choices(struct run run, struct mirror_figures *figures)
{
    uint64_t runs = 0;

    do {
        add(figures, live(&run, false));
        runs++;
    } while (next_choices(&run));
    return runs;
}

/* Which leg fails matters if one does. */
static bool has_victim(const struct run *run)
{
    bool has = run->missing || run->alone;

    for (uint32_t i = 0; i < run->count; i++)
        has |= run->operations[i] == LEG_FAILS;
    return has;
}

/* A life in which a sync fails, and something was written before. */
static bool is_of_syncs(const struct run *run)
{
    bool any = false;

    for (uint32_t i = 0; i < run->count; i++)
        any |= loses(run->operations[i]);
    return any && run->operations[0] == WRITE;
}

static uint64_t run_sequence(struct run run, struct mirror_figures *figures)
{
    uint64_t runs = 0;

    for (unsigned variant = 0; variant < 8; variant++) {
        run.victim = variant & 1;
        run.missing = variant & 2;
        run.hurried = variant & 4;
        if (run.victim == 0 || has_victim(&run))
            runs += run_choices(run, figures);
    }
    return runs;
}

static struct run numbered(const struct family *family, uint32_t count, uint32_t number)
{
    const uint32_t letters = (uint32_t)strlen(family->letters);
    struct run run = {.count = count, .alone = family->alone};

    for (uint32_t i = 0; i < count; i++, number /= letters)
        run.operations[i] = (uint8_t)(strchr(LETTERS, family->letters[number % letters]) - LETTERS);
    return run;
}

uint64_t exhaustive_run(enum exhaustive_family which, uint32_t part, uint32_t parts, struct mirror_figures *figures,
                        uint64_t *sequences_run)
{
    const struct family *family = &families[which];
    uint64_t runs = 0, number = 0;

    *sequences_run = 0;
    for (uint32_t count = 0, sequences = 1; count <= family->longest; count++, sequences *= (uint32_t)strlen(family->letters))
        for (uint32_t sequence = 0; sequence < sequences; sequence++) {
            struct run run = numbered(family, count, sequence);
            if ((family->alone && !is_of_syncs(&run)) || number++ % parts != part)
                continue;
            runs += run_sequence(run, figures);
            ++*sequences_run;
        }
    return runs;
}
