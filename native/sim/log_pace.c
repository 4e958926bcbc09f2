/*
 * A write-back log whose destaging has a rate, in simulated time: what is carried below never outruns it, nor falls far
 * behind; a log that is three quarters full, a drain, another rate and the log's end take no notice of it.
 *
 * The clock moves when nothing else can, so a disk's work takes next to no time and what is measured is the rate alone. That
 * nothing is lost meanwhile is judged by the lives of log_world.c, some of which have a rate.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "sim/log_world.h"

#define RING (4u << 20)
#define SIZE (8ull << 20)
#define PIECE (64u << 10)
#define WRITERS 8u
#define MS ((uint64_t)1000000)
#define SOON_MS 200u                /* of what is not held to the rate */
#define PATIENCE 200000u

struct pace_write {
    struct nv_log_request log;
    bool used;
    uint8_t data[PIECE];
};

struct pace_io {
    struct nv_op op;
    struct iovec iov;
    struct nv_log_below *below;
    bool used;
};

static struct pace {
    struct sim_random random;
    struct nv_io *io;
    struct nv_log *log;
    nv_handle handles[2];           /* the log, what is below */
    struct pace_write writes[WRITERS];
    struct pace_io ios[WORLD_IOS];
    uint64_t rate;
    uint64_t next;                  /* where the next write begins */
    uint64_t carried;               /* bytes, since ... */
    uint64_t since_ns;              /* ... the rate counts */
    bool opened, drained;
} pace;

static uint64_t now_ns(void)
{
    return nv_sim_clock_ns();
}

/* ---- below ---- */

static void io_done(struct nv_op *op)
{
    struct pace_io *io = (struct pace_io *)((char *)op - offsetof(struct pace_io, op));

    io->used = false;
    io->below->error = op->result < 0 ? (int)op->result : 0;
    io->below->done(io->below);
}

/* In any time no more than the rate, what it may catch up with, and one write that is as long as the rate has it. */
static void judge_rate(const struct nv_log_below *asked)
{
    const uint64_t late_ns = now_ns() - pace.since_ns + NV_LOG_PACED_MS * MS;
    const uint64_t one = pace.rate * NV_LOG_PACED_MS / 1000u, piece = NV_LOG_PACED_BLOCKS * (uint64_t)NV_LOG_UNIT;
    const uint64_t most = (uint64_t)((unsigned __int128)pace.rate * late_ns / 1000000000u) + (one > piece ? one : piece);

    pace.carried += asked->length;
    if (pace.rate && pace.carried > most)
        nv_sim_violation("%" PRIu64 " bytes are carried in %" PRIu64 " ms, at %" PRIu64 " a second", pace.carried,
                         (now_ns() - pace.since_ns) / MS, pace.rate);
}

static void start_below(void *context, struct nv_log_below *asked)
{
    static const uint8_t kinds[] = {[NV_LOG_READ] = NV_OP_READ, [NV_LOG_WRITE] = NV_OP_WRITE, [NV_LOG_FLUSH] = NV_OP_SYNC};
    struct pace_io *io = NULL;

    (void)context;
    for (uint32_t i = 0; i < WORLD_IOS && !io; i++)
        io = pace.ios[i].used ? NULL : &pace.ios[i];
    if (!io)
        abort();
    if (asked->ours && asked->kind == NV_LOG_WRITE)
        judge_rate(asked);
    io->used = true;
    io->below = asked;
    io->iov = (struct iovec){asked->data, asked->length};
    io->op = (struct nv_op){.kind = kinds[asked->kind], .handle = pace.handles[1], .offset = asked->offset, .iov = &io->iov,
                            .iov_count = 1, .flags = asked->flags & NV_LOG_FUA ? NV_OP_DSYNC : 0, .done = io_done};
    nv_io_submit(pace.io, &io->op);
}

static void heard(void *context, enum nv_log_event event, int64_t value)
{
    (void)context;
    pace.opened |= event == NV_LOG_OPENED && value == NV_LOG_USABLE;
    pace.drained |= event == NV_LOG_DRAINED;
    if (event != NV_LOG_OPENED && event != NV_LOG_DRAINED)
        nv_sim_violation("the log tells event %d without faults", (int)event);
}

/* ---- steps ---- */

static void step(void)
{
    const bool moved = nv_sim_step();

    nv_io_run(pace.io);
    nv_log_tick(pace.log);
    nv_io_enter(pace.io);
    if (!moved && !nv_sim_advance())
        nv_sim_jump(MS);
}

static struct nv_log_look look(void)
{
    struct nv_log_look out;

    nv_log_look(pace.log, &out);
    return out;
}

static uint64_t dirty_bytes(void)
{
    return look().dirty_blocks * NV_LOG_UNIT;
}

static uint32_t writing(void)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < WRITERS; i++)
        count += pace.writes[i].used;
    return count;
}

static bool has_opened(void)
{
    return pace.opened;
}

static bool all_written(void)
{
    return writing() == 0;
}

static bool is_empty(void)
{
    return dirty_bytes() == 0;
}

static bool has_room(void)
{
    return look().used_bytes < RING / 4 * 3;
}

static bool has_drained(void)
{
    return pace.drained;
}

static bool is_idle(void)
{
    return nv_log_idle(pace.log);
}

static bool has_begun(void)
{
    return pace.carried > 0;
}

/* The time it took, milliseconds. */
static uint64_t settle(bool (*over)(void), const char *what)
{
    const uint64_t from_ns = now_ns();

    for (uint32_t i = 0; !over(); i++) {
        step();
        if (i > PATIENCE)
            nv_sim_violation("%s", what);
    }
    return (now_ns() - from_ns) / MS;
}

static void soon(bool (*over)(void), const char *what)
{
    const uint64_t took_ms = settle(over, what);

    if (took_ms > SOON_MS)
        nv_sim_violation("after %" PRIu64 " ms: %s", took_ms, what);
}

/* ---- writes ---- */

static void written(struct nv_log_request *log)
{
    struct pace_write *request = (struct pace_write *)((char *)log - offsetof(struct pace_write, log));

    request->used = false;
    if (log->error)
        nv_sim_violation("a write fails (%d) without faults", log->error);
}

/* So many bytes, one behind the other over the whole VVol, some of them at once. */
static void write_all(uint64_t bytes)
{
    for (uint64_t left = bytes; left > 0;) {
        for (uint32_t i = 0; i < WRITERS && left > 0; i++) {
            struct pace_write *request = &pace.writes[i];
            if (request->used)
                continue;
            request->used = true;
            request->log = (struct nv_log_request){.kind = NV_LOG_WRITE, .offset = pace.next, .length = PIECE,
                                                   .data = request->data, .done = written};
            pace.next = (pace.next + PIECE) % SIZE;
            left -= PIECE;
            nv_log_start(pace.log, &request->log);
        }
        step();
    }
    settle(all_written, "writes are never answered");
}

static void limit(uint64_t rate)
{
    nv_log_limit(pace.log, &(struct nv_log_limits){.bypass_bytes = NV_LOG_BYPASS_MAX, .age_ms = 1, .rate = rate});
    pace.rate = rate;
    pace.carried = 0;
    pace.since_ns = now_ns();
}

/* ---- what is shown ---- */

static void rate_is_held(void)
{
    uint64_t took_ms;

    limit((128ull << 10) << sim_random_below(&pace.random, 8));
    write_all(2u << 20);
    took_ms = settle(is_empty, "what is logged is never carried");
    if (took_ms * pace.rate / 1000u > (3u << 20))
        nv_sim_violation("2 MiB took %" PRIu64 " ms at %" PRIu64 " bytes a second", took_ms, pace.rate);
}

static void full_log_waits_for_nobody(void)
{
    limit(1); /* a byte a second */
    pace.rate = 0;
    write_all(2 * (uint64_t)RING);
    soon(has_room, "a full log is held to the rate");
}

static void drain_waits_for_nobody(void)
{
    nv_log_drain(pace.log);
    soon(has_drained, "a drain is held to the rate");
    nv_log_allow(pace.log);
    pace.drained = false;
}

static void other_rate_holds_at_once(void)
{
    limit(2); /* another one than before: nothing is owed */
    pace.rate = 0;
    write_all(1u << 20);
    soon(has_begun, "nothing is carried");
    for (uint32_t i = 0; i < 1000; i++)
        step();
    if (is_empty())
        nv_sim_violation("1 MiB is carried at a byte a second");
    limit(0);
    soon(is_empty, "no rate is none");
}

static void end_waits_for_nobody(void)
{
    limit(3);
    pace.rate = 0;
    write_all(1u << 20);
    soon(has_begun, "nothing is carried");
    nv_log_stop(pace.log);
    soon(is_idle, "a log that ends is held to the rate");
}

/* ---- the run ---- */

static void open_log(int log_file, int leg_file)
{
    struct nv_log_config config = {.io = pace.io, .size = SIZE, .bypass_bytes = NV_LOG_BYPASS_MAX, .age_ms = 1,
                                   .below = start_below, .event = heard,
                                   .claim = {.epoch = 1, .generation = 1, .length = NV_LOG_RING + RING}};

    pace.handles[0] = config.handle = nv_io_open_file(log_file);
    pace.handles[1] = nv_io_open_file(leg_file);
    if (nv_log_create(&config, &pace.log) != 0)
        abort();
    nv_log_open(pace.log);
    settle(has_opened, "the log does not open");
    nv_log_allow(pace.log);
}

void pace_run(uint64_t seed)
{
    uint8_t *log_image = calloc(1, NV_LOG_RING + RING), *leg_image = calloc(1, SIZE);

    if (!log_image || !leg_image)
        abort();
    memset(&pace, 0, sizeof pace);
    pace.random.state = seed;
    nv_sim_begin(seed, &(struct nv_sim_faults){.atom = 512});
    if (nv_io_create(&(struct nv_io_config){.cpu = -1}, &pace.io, &(struct nv_io_features){false}) != 0)
        abort();
    open_log(nv_sim_file(sim_disk_create(log_image, NV_LOG_RING + RING), 512, false),
             nv_sim_file(sim_disk_create(leg_image, SIZE), 1, false));
    rate_is_held();
    full_log_waits_for_nobody();
    drain_waits_for_nobody();
    other_rate_holds_at_once();
    end_waits_for_nobody();
    nv_log_free(pace.log);
    nv_io_close(pace.handles[0]);
    nv_io_close(pace.handles[1]);
    nv_io_destroy(pace.io);
    nv_sim_end();
    free(log_image);
    free(leg_image);
}
