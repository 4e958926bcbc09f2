/*
 * See log_world.h. Range order is kept here, as a volume keeps it: while a change of a block is under way no other change of
 * it is begun. What is below is in log_leg.c.
 */
#include "sim/log_world.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"

#define PATIENCE 200000u
#define TURN_NS 1000000u
#define READ_TRIES 50u

static const struct nv_sim_faults usual_faults = {.short_transfer = 20, .delay = 100, .atom = 512};
struct world *world_of_io;

static uint64_t below(struct world *world, uint64_t bound)
{
    return sim_random_below(&world->random, bound);
}

static bool chance(struct world *world, unsigned of_1024)
{
    return sim_random_chance(&world->random, of_1024);
}

static void say(const struct world *world, const char *what, const struct world_request *request)
{
    static const char *const kinds[] = {"", "READ", "WRITE", "ZERO", "TRIM", "FLUSH"};

    if (world->plan.trace)
        printf("%6" PRIu64 " %s %s%s %" PRIu64 "+%" PRIu64 " -> %d\n", world->step, what, kinds[request->log.kind],
               request->log.flags & NV_LOG_FUA ? "/FUA" : "", request->first, request->blocks, request->log.error);
}

static void heard(void *context, enum nv_log_event event, int64_t value)
{
    struct world *world = context;

    if (world->plan.trace)
        printf("%6" PRIu64 " EVENT %d value %" PRId64 "\n", world->step, (int)event, value);
    switch (event) {
    case NV_LOG_OPENED:
        if (world->opened)
            nv_sim_violation("a log is opened twice");
        world->opened = true;
        world->verdict = (enum nv_log_verdict)value;
        break;
    case NV_LOG_DRAINED:
        world->drained = true;
        world->dirty = false;
        break;
    case NV_LOG_LOST:
        if (!world->troubled)
            nv_sim_violation("block %" PRId64 " is lost on a device without faults", value);
        model_lost(&world->model, (uint64_t)value);
        break;
    case NV_LOG_NEEDS_WORD:
        world->needs_word = true;
        break;
    case NV_LOG_FAILING:
        world->troubled |= value == -ETIMEDOUT; /* the clock may jump past the deadline of a device that is well */
        if (!world->troubled)
            nv_sim_violation("the log fails (%" PRId64 ") on a device without faults", value);
        break;
    case NV_LOG_RESTS:
        break;
    }
}

/* ---- requests ---- */

static void mark_busy(struct world *world, const struct world_request *request, bool busy)
{
    for (uint64_t i = 0; i < request->blocks; i++)
        world->busy[request->first + i] = busy;
}

static bool is_change(const struct world_request *request)
{
    return request->log.kind != NV_LOG_READ && request->log.kind != NV_LOG_FLUSH;
}

static void request_done(struct nv_log_request *log)
{
    struct world_request *request = (struct world_request *)((char *)log - offsetof(struct world_request, log));
    struct world *world = world_of_io;

    say(world, "done ", request);
    request->used = false;
    world->outstanding--;
    world->done++;
    if (log->error && !world->troubled)
        nv_sim_violation("a request of kind %u fails (%d) without faults", log->kind, log->error);
    if (is_change(request)) {
        mark_busy(world, request, false);
        model_written(&world->model, request->first, request->blocks, log->flags & NV_LOG_FUA, log->error != 0);
    } else if (log->error) {
        return;
    } else if (log->kind == NV_LOG_READ) {
        const uint64_t whole = request->blocks * MODEL_BLOCK;
        if (log->length < whole) /* the VVol's end: nothing is there to be judged */
            memset(request->data + log->length, 0, whole - log->length);
        model_was_read(&world->model, request->first, request->blocks - (log->length < whole), request->least, request->data);
    } else {
        model_flushed(&world->model, request->covered);
    }
}

static struct world_request *free_request(struct world *world)
{
    for (uint32_t i = 0; i < world->places; i++)
        if (!world->requests[i].used)
            return &world->requests[i];
    return NULL;
}

static bool may_begin(const struct world *world, const struct world_request *request)
{
    for (uint64_t i = 0; is_change(request) && i < request->blocks; i++)
        if (world->busy[request->first + i])
            return false;
    return true;
}

/* False: a change of one of its blocks is under way. */
static bool ask(struct world *world, uint8_t kind, uint8_t flags, uint64_t first, uint64_t blocks)
{
    struct world_request *request = free_request(world);
    uint64_t end = (first + blocks) * MODEL_BLOCK;

    if (!request)
        return false;
    request->first = first;
    request->blocks = blocks;
    end = end < world->vvol_size ? end : world->vvol_size;
    request->log = (struct nv_log_request){.kind = kind, .flags = flags, .offset = first * MODEL_BLOCK,
                                           .length = end - first * MODEL_BLOCK, .data = request->data, .done = request_done};
    if (!may_begin(world, request))
        return false;
    request->used = true;
    world->outstanding++;
    say(world, "start", request);
    if (kind == NV_LOG_FLUSH) {
        request->log.offset = request->log.length = 0;
        model_flush(&world->model, request->covered);
    } else if (kind == NV_LOG_READ) {
        model_read(&world->model, first, blocks, request->least);
    } else {
        mark_busy(world, request, true);
        model_write(&world->model, first, blocks, kind == NV_LOG_WRITE ? request->data : NULL);
    }
    nv_log_start(world->log, &request->log);
    return true;
}

static void ask_by_chance(struct world *world)
{
    const uint64_t what = below(world, 1000), first = below(world, world->model.blocks);
    uint64_t blocks = 1 + (chance(world, 300) ? below(world, 15) : 0);
    const uint8_t flags = chance(world, 80) ? NV_LOG_FUA : 0;

    if (world->plan.pure && blocks > 3)
        blocks = 3;
    if (blocks > world->model.blocks - first)
        blocks = world->model.blocks - first;
    if (world->plan.crowded && chance(world, 700))
        ask(world, NV_LOG_READ, 0, first, blocks);
    else if (world->plan.crowded && chance(world, 512)) /* what is read after it need not be */
        ask(world, NV_LOG_ZEROES, 0, first, blocks);
    else if (what < 520 || (world->plan.pure && what >= 780 && what < 900))
        ask(world, NV_LOG_WRITE, flags, first, blocks);
    else if (what < 780)
        ask(world, NV_LOG_READ, 0, first, blocks);
    else if (what < 850)
        ask(world, NV_LOG_ZEROES, flags, first, blocks);
    else if (what < 900)
        ask(world, NV_LOG_TRIM, flags, first, blocks);
    else
        ask(world, NV_LOG_FLUSH, 0, 0, 0);
}

/* ---- steps ---- */

static void run_once(struct world *world)
{
    struct sim_random apart = {world->plan.seed ^ world->step << 32 ^ 0x5eed};

    nv_io_run(world->io);
    world_take_landed(world);
    nv_log_expect(world->log, sim_random_chance(&apart, 250)); /* a client is in the middle of sending */
    nv_log_pump(world->log);
    nv_io_enter(world->io);
}

static void control(struct world *world)
{
    if (world->opened && world->verdict == NV_LOG_USABLE && !world->calm && !world->allowed) { /* committed, then told */
        world->allowed = true;
        world->dirty = true;
        memcpy(world->id, nv_log_found(world->log)->super.id, 16);
        nv_log_allow(world->log);
    }
    if (world->needs_word) {
        world->needs_word = false;
        world->dirty = false;
        nv_log_forget(world->log);
    }
}

static void make_trouble(struct world *world)
{
    struct nv_sim_trouble *log = nv_sim_trouble(world->log_file), *leg = nv_sim_trouble(world->leg_file);
    struct sim_random apart = {world->plan.seed ^ world->step << 32}; /* the other worlds stay as they were */

    if (chance(world, world->plan.log_trouble)) {
        log->read_error = chance(world, 300) ? 60 : 0;
        log->write_error = chance(world, 300) ? 60 : 0;
        log->sync_error = chance(world, 300) ? 100 : 0;
        log->gone = chance(world, 60);
        log->hung = world->plan.deadline_ms && chance(world, 200); /* what is slow may still happen, long after it was given up */
        log->stuck_writes = world->plan.deadline_ms && chance(world, 200);
        log->stuck_reads = world->plan.deadline_ms && sim_random_chance(&apart, 200);
        world->troubled = true;
    }
    if (chance(world, world->plan.leg_trouble)) {
        leg->read_error = chance(world, 300) ? 60 : 0;
        leg->write_error = chance(world, 500) ? 100 : 0;
        leg->sync_error = chance(world, 100) ? 100 : 0;
        world->troubled = true;
    }
}

static void end_trouble(struct world *world)
{
    struct nv_sim_trouble *log = nv_sim_trouble(world->log_file), *leg = nv_sim_trouble(world->leg_file);

    *log = *leg = (struct nv_sim_trouble){.hung = false};
    if (world->plan.crowded)
        twin_heal(&world->twin);
    nv_sim_set_faults(&(struct nv_sim_faults){.atom = 512});
}

static void one_step(struct world *world)
{
    const uint64_t what = below(world, 1000);

    world->step++;
    if (world->plan.crowded)
        twin_step(&world->twin);
    if (world->plan.crowded && chance(world, 4))
        nv_sim_trouble(world->log_file)->hung = chance(world, 512);
    if (what < 300 && world->outstanding < world->plan.depth && !world->plan.script)
        ask_by_chance(world);
    else if (what < 650)
        nv_sim_step();
    else if (what < 950)
        run_once(world);
    else if (what < 980)
        nv_log_tick(world->log);
    else if (what < 985)
        nv_sim_jump(TURN_NS * below(world, 50));
    else if (what < 990)
        nv_sim_advance();
    else if (what < 992)
        make_trouble(world);
    else if (what < 993)
        end_trouble(world);
    else
        control(world);
    if (world->step % (world->plan.crowded ? 8 : 64) == 0) {
        const char *wrong = nv_log_check(world->log);
        if (wrong)
            nv_sim_violation("%s", wrong);
    }
}

/* Everything that can move moves once. */
static void settle_once(struct world *world)
{
    const bool moved = nv_sim_step();

    nv_io_run(world->io);
    world_take_landed(world);
    nv_log_expect(world->log, false);
    nv_log_tick(world->log);
    nv_io_enter(world->io);
    if (!moved && !nv_sim_advance())
        nv_sim_jump(TURN_NS);
    if (world->needs_word)
        control(world);
}

static void settle(struct world *world, bool (*over)(const struct world *world), const char *what)
{
    for (uint32_t i = 0; !over(world); i++) {
        settle_once(world);
        if (i > PATIENCE)
            nv_sim_violation("%s", what);
    }
}

static bool has_opened(const struct world *world)
{
    return world->opened;
}

static bool all_answered(const struct world *world)
{
    return world->outstanding == 0;
}

static bool is_idle(const struct world *world)
{
    bool busy = !nv_log_idle(world->log) || nv_log_abandoned(world->log) || world->landed || (world->plan.crowded && !twin_rests(&world->twin));

    for (uint32_t i = 0; i < WORLD_IOS; i++)
        busy |= world->ios[i].used;
    return !busy;
}

static bool has_drained(const struct world *world)
{
    struct nv_log_look look;

    nv_log_look(world->log, &look);
    return world->drained || (look.lost_blocks && look.state == NV_LOG_THROUGH);
}

/* ---- a life ---- */

static void begin_world(struct world *world)
{
    nv_sim_begin(world->plan.seed * 64 + world->life, &usual_faults);
    world->log_file = nv_sim_file(sim_disk_create(world->log_image, world->log_size), 512, false);
    world->leg_file = nv_sim_file(sim_disk_create(world->leg_image, world->leg_size), 1, false);
    world->log_handle = nv_io_open_file(world->log_file);
    world->leg_handle = nv_io_open_file(world->leg_file);
    world->leg_fault = 0;
    world->forgiven = false;
    world->opened = world->drained = world->needs_word = world->calm = world->allowed = world->troubled = false;
    memset(world->ios, 0, sizeof world->ios);
    world->places = world->plan.crowded ? WORLD_CROWD : WORLD_REQUESTS;
    memset(world->requests, 0, world->places * sizeof world->requests[0]);
    world->landed = NULL;
    world->landed_last = &world->landed;
    world->sync_waits = NULL;
    world->leg_syncs = false;
    memset(world->busy, 0, sizeof world->busy);
    world->outstanding = 0;
    world_of_io = world;
    if (nv_io_create(&(struct nv_io_config){.cpu = -1}, &world->io, &(struct nv_io_features){false}) != 0)
        abort();
    if (world->plan.crowded)
        twin_begin(&world->twin, world->io, world->plan.seed, world->leg_size);
}

/* Its device may begin to hang at any step of that. */
static void settle_opening(struct world *world)
{
    struct sim_random apart = {world->plan.seed ^ world->epoch << 40}; /* the other worlds stay as they were */
    struct nv_sim_trouble *log = nv_sim_trouble(world->log_file);
    const bool hangs = world->plan.deadline_ms && sim_random_chance(&apart, 600);
    const uint64_t which = sim_random_below(&apart, 3), from = sim_random_below(&apart, 12);

    for (uint64_t i = 0; !world->opened && i < from; i++)
        settle_once(world);
    if (hangs && !world->opened) {
        log->hung = which == 0;
        log->stuck_writes = which == 1;
        log->stuck_reads = which == 2;
    }
    settle(world, has_opened, "the log does not open");
    *log = (struct nv_sim_trouble){.hung = world->verdict == NV_LOG_HANGS};
}

static void begin_opening(struct world *world, bool discard)
{
    struct nv_log_config config = {
        .io = world->io, .handle = world->log_handle, .size = world->vvol_size, .bypass_bytes = world->plan.bypass,
        .stream_bytes = world->plan.stream, .age_ms = world->plan.age_ms, .deadline_ms = world->plan.deadline_ms,
        .rate = world->plan.rate, .runs = world->plan.seed % 4 ? NV_LOG_RUNS_CALM : NV_LOG_RUNS, .context = world,
        .below = world_below, .event = heard, .discard = discard,
        .claim = {.epoch = ++world->epoch, .generation = 1, .length = world->log_size, .dirty = world->dirty},
    };

    memset(config.claim.uuid, 7, 16);
    memcpy(config.claim.id, world->id, 16);
    for (uint32_t i = 0; i < 16; i++) {
        config.fresh[i] = (uint8_t)below(world, 256);
        config.begin[i] = (uint8_t)below(world, 256);
    }
    if (nv_log_create(&config, &world->log) != 0)
        abort();
    world->opened = false;
    nv_log_open(world->log);
    settle_opening(world);
}

/* What is left of the run after the images are taken happens to nobody; it only has to end tidily. */
static void close_log(struct world *world)
{
    world->calm = true;
    end_trouble(world);
    world->leg_fault = 0;
    nv_log_stop(world->log);
    settle(world, is_idle, "the log does not come to rest");
    nv_log_pump(world->log);
    nv_log_free(world->log);
    world->log = NULL;
}

/* One that hangs is refused; it is tried again when its device has answered, as often as that takes. */
static void open_log(struct world *world, bool discard)
{
    begin_opening(world, discard);
    while (world->verdict == NV_LOG_HANGS) {
        world->hung_openings++;
        close_log(world);
        world->calm = false;
        nv_sim_set_faults(&usual_faults);
        begin_opening(world, discard);
    }
}

static void end_world(struct world *world)
{
    nv_io_close(world->log_handle);
    nv_io_close(world->leg_handle);
    if (world->plan.crowded)
        twin_end(&world->twin);
    nv_io_destroy(world->io);
    nv_sim_end();
}

static void read_all(struct world *world, uint8_t *bytes)
{
    for (uint64_t first = 0; first < world->model.blocks; first += 16) {
        const uint64_t blocks = world->model.blocks - first < 16 ? world->model.blocks - first : 16;
        struct world_request *request = &world->requests[0];
        uint32_t tries = 0;
        do { /* the clock may jump past the deadline of a device that is well */
            if (!ask(world, NV_LOG_READ, 0, first, blocks))
                abort();
            settle(world, all_answered, "a read is never answered");
        } while (request->log.error && world->plan.deadline_ms && ++tries < READ_TRIES);
        if (request->log.error)
            nv_sim_violation("blocks from %" PRIu64 " on cannot be read (%d)", first, request->log.error);
        memcpy(bytes + first * MODEL_BLOCK, request->data, blocks * MODEL_BLOCK);
    }
}

/* The model of the moment of the crash is held against what is there now. */
static void judge_crash(struct world *world)
{
    static uint8_t bytes[MODEL_BLOCKS * MODEL_BLOCK];
    static struct model judged;

    judged = world->at_crash;
    for (uint32_t i = 0; i < judged.blocks; i++) { /* read_all() judges by the model of now: let it take everything */
        memset(world->model.block[i].seen, 0, sizeof world->model.block[i].seen);
        world->model.block[i].acknowledged = 0;
        world->model.block[i].life = 0;
        memset(world->model.block[i].dead, 0, sizeof world->model.block[i].dead);
        memset(judged.block[i].dead, 0, sizeof judged.block[i].dead); /* a crash may bring it back, where it was overwritten */
    }
    read_all(world, bytes);
    if (world->vvol_size < world->leg_size) /* the end of the last block is nobody's */
        judged.blocks--;
    model_crashed(&judged, bytes, world->cache_survived);
    judged.blocks = world->at_crash.blocks;
    world->model = judged;
}

/* After a crash the registry may know less than the log: what is not ours is discarded only if nothing was promised. */
static void open_after(struct world *world)
{
    open_log(world, false);
    if (world->verdict == NV_LOG_USABLE)
        return;
    if (world->verdict != NV_LOG_UNKNOWN_DATA || world->dirty)
        nv_sim_violation("the log is refused: %s", nv_log_verdict_name(world->verdict));
    close_log(world);
    world->calm = false;
    open_log(world, true);
    if (world->verdict != NV_LOG_USABLE)
        nv_sim_violation("the log is not formatted anew: %s", nv_log_verdict_name(world->verdict));
}

static void crash(struct world *world)
{
    struct nv_log_look look;
    struct sim_random *random = &world->random;

    nv_log_look(world->log, &look);
    world->cache_survived = chance(world, 300);
    if (world->plan.trace)
        printf("%6" PRIu64 " -- %s\n", world->step, world->cache_survived ? "the process dies" : "the power is cut");
    world->at_crash = world->model;
    world->at_crash.pure = look.bypassed + look.blocked == 0 && !world->troubled && world->vvol_size == world->leg_size;
    nv_sim_crash(world->log_file, world->cache_survived, random, world->log_image);
    nv_sim_crash(world->leg_file, world->cache_survived, random, world->leg_image);
    const bool dirty = world->dirty; /* the registry of this moment */
    close_log(world);
    world->dirty = dirty;
    world->crashes++;
}

/* The log's writes hang, or its reads, or both, for ever: everything is answered all the same, once what is below is well. */
static void outlast(struct world *world)
{
    struct nv_sim_trouble *log = nv_sim_trouble(world->log_file), *leg = nv_sim_trouble(world->leg_file);

    if (!world->plan.deadline_ms || (!log->hung && !log->stuck_writes && !log->stuck_reads))
        return;
    *leg = (struct nv_sim_trouble){.hung = false};
    world->leg_fault = 0;
    world->forgiven = true;
    settle(world, all_answered, "requests wait for a log whose writes hang, or its reads");
}

static void leave_cleanly(struct world *world)
{
    static uint8_t bytes[MODEL_BLOCKS * MODEL_BLOCK];
    struct nv_log_look look;

    outlast(world);
    end_trouble(world);
    world->leg_fault = 0; /* the operator's word; until then every sync fails: what one lost is lost */
    world->forgiven = true;
    settle(world, all_answered, "requests are never answered");
    nv_log_drain(world->log);
    settle(world, has_drained, "the log is never drained");
    nv_log_look(world->log, &look);
    if (look.lost_blocks == 0)
        read_all(world, bytes);
    if (world->drained) { /* then the leg alone has everything, durably */
        sim_disk_read(nv_sim_disk(world->leg_file), 0, bytes, world->leg_size);
        for (uint64_t i = 0; i < world->model.blocks - (world->vvol_size < world->leg_size); i++) {
            struct model_least least;
            model_read(&world->model, i, 1, &least);
            if (!world->model.block[i].lost)
                model_was_read(&world->model, i, 1, &least, bytes + i * MODEL_BLOCK);
        }
    }
    world->at_crash = world->model;
    world->at_crash.pure = false;
    world->cache_survived = true;
    nv_sim_crash(world->log_file, true, &world->random, world->log_image);
    nv_sim_crash(world->leg_file, true, &world->random, world->leg_image);
    close_log(world);
}

static void run_script(struct world *world)
{
    static const struct {
        char letter;
        uint8_t kind, flags, first, blocks;
    } words[] = {
        {'a', NV_LOG_WRITE, 0, 0, 1},         {'b', NV_LOG_WRITE, 0, 1, 1},   {'A', NV_LOG_WRITE, NV_LOG_FUA, 0, 1},
        {'B', NV_LOG_WRITE, 0, 0, 8},         {'z', NV_LOG_ZEROES, 0, 0, 1},  {'t', NV_LOG_TRIM, 0, 0, 2},
        {'f', NV_LOG_FLUSH, 0, 0, 0},         {'r', NV_LOG_READ, 0, 0, 2},
    };
    const char *at = world->plan.script;

    while (*at && (int64_t)world->step != world->plan.crash_at) {
        bool asked = false;
        for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
            if (words[i].letter == *at)
                asked = ask(world, words[i].kind, words[i].flags, words[i].first, words[i].blocks);
        if (*at == 'd') { /* time passes: what is logged grows old */
            nv_sim_jump(world->plan.age_ms * 1000000ull + TURN_NS);
            asked = true;
        }
        at += asked;
        for (uint32_t i = 0; i < 6 && (int64_t)world->step != world->plan.crash_at; i++)
            one_step(world);
    }
    while ((int64_t)world->step != world->plan.crash_at && world->step < world->plan.steps)
        one_step(world);
}

static void live(struct world *world)
{
    const uint64_t end = world->step + below(world, world->plan.steps);

    if (world->plan.script) {
        control(world);
        run_script(world);
        return;
    }
    if (chance(world, 700))
        control(world);
    while (world->plan.crash_at >= 0 && world->life == 0 ? (int64_t)world->step < world->plan.crash_at : world->step < end)
        one_step(world);
}

static void prepare(struct world *world, const struct world_plan *plan)
{
    memset(world, 0, offsetof(struct world, requests)); /* the rest begins with each life */
    memset(&world->busy, 0, sizeof *world - offsetof(struct world, busy));
    world->plan = *plan;
    world->random.state = plan->seed * 0x9e3779b97f4a7c15ull + 1;
    world->log_size = NV_LOG_RING + plan->ring;
    world->leg_size = plan->blocks * (uint64_t)MODEL_BLOCK;
    world->vvol_size = world->leg_size - (chance(world, 200) ? 1024 : 0);
    world->log_image = calloc(1, world->log_size);
    world->leg_image = calloc(1, world->leg_size);
    assert(world->log_image && world->leg_image);
    model_begin(&world->model, plan->blocks);
}

void world_run(struct world *world, const struct world_plan *plan)
{
    prepare(world, plan);
    for (world->life = 0; world->life <= plan->lives; world->life++) {
        begin_world(world);
        open_after(world);
        if (world->life > 0)
            judge_crash(world);
        if (world->life < plan->lives)
            live(world);
        if (world->life == plan->lives || (!plan->script && plan->crash_at < 0 && chance(world, 150)))
            leave_cleanly(world);
        else
            crash(world);
        end_world(world);
    }
    free(world->log_image);
    free(world->leg_image);
}

/* ---- one life, step by step ---- */

void world_begin(struct world *world, const struct world_plan *plan)
{
    prepare(world, plan);
    begin_world(world);
    open_after(world);
    control(world);
}

void world_ask(struct world *world, uint8_t kind, uint8_t flags, uint64_t block)
{
    if (!ask(world, kind, flags, block, 1))
        abort();
}

void world_write(struct world *world, uint64_t block)
{
    world_ask(world, NV_LOG_WRITE, 0, block);
}

void world_settle(struct world *world, bool (*over)(const struct world *world), const char *what)
{
    settle(world, over, what);
}

bool world_has_answered(const struct world *world)
{
    return all_answered(world);
}

void world_end(struct world *world)
{
    crash(world);
    end_world(world);
    world->life++;
    begin_world(world);
    open_after(world);
    judge_crash(world);
    crash(world);
    end_world(world);
    free(world->log_image);
    free(world->leg_image);
}
