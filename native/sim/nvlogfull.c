/*
 * nvlogfull: a write-back log that is full, over storage that takes 2 ms for each operation and any number of them at once,
 * and writers that never pause. By the simulated clock: how long the slowest write waits, and how many are answered a second
 * beside what the same writers would get from that storage without a log. What is written is not judged (nvlog does that).
 *
 * usage: nvlogfull RING_MIB       prints the writes a second, the same without a log, and the longest wait in milliseconds
 *        nvlogfull --records      how many records have begun after each of 16 writes, while the log's device answers none
 *        nvlogfull --sizes        of a thousand records, how many have 8 blocks, where one of 16 writers comes before the others
 */
#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "log/log.h"

#define WRITERS 16u                            /* each with one write of one block in flight */
#define BLOCKS 65536u                          /* of the VVol: 256 MiB */
#define BELOW_NS 2000000u
#define WATCHED_MS 5000u                       /* from the moment when the log is full */
#define PATIENCE 100000000u
#define SIZED_RECORDS 1000u
#define SIZED_RING (64u << 20)
#define IOS (WRITERS + NV_LOG_RUNS + 1u)       /* a destage write each, a flush, a bypass of each writer */

struct below {
    struct nv_op timer;
    struct nv_log_below *io;
};

struct writer {
    struct nv_log_request request;
    uint64_t since_ns;
    bool busy;
    uint8_t data[NV_LOG_UNIT];
};

static struct {
    struct nv_io *io;
    struct nv_log *log;
    struct sim_random random;
    struct writer writers[WRITERS];
    struct below below[IOS];
    bool opened, drained, watched, over;
    uint64_t answered, longest_ns;
    uint64_t records, halves;                  /* handed to the log's device; and those of them with half of the writers' blocks */
    nv_handle handle;
    int file;
} run;

void __real_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op);

void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    if (op->kind == NV_OP_WRITE && op->handle == run.handle) {
        run.records++;
        run.halves += op->iov->iov_len == (1 + WRITERS / 2) * NV_LOG_UNIT;
    }
    __real_nv_io_submit(io, op);
}

static void below_done(struct nv_op *op)
{
    struct below *below = (struct below *)op;
    struct nv_log_below *io = below->io;

    below->io = NULL;
    io->error = 0;
    io->done(io);
}

static void start_below(void *context, struct nv_log_below *io)
{
    struct below *below = run.below;

    (void)context;
    while (below->io)
        below++;
    assert(below < run.below + IOS);
    below->io = io;
    below->timer = (struct nv_op){.kind = NV_OP_TIMER, .length = BELOW_NS, .done = below_done};
    nv_io_submit(run.io, &below->timer);
}

static void heard(void *context, enum nv_log_event event, int64_t value)
{
    (void)context;
    run.opened |= event == NV_LOG_OPENED && value == NV_LOG_USABLE;
    run.drained |= event == NV_LOG_DRAINED;
}

static void answered(struct nv_log_request *request)
{
    struct writer *writer = (struct writer *)request;
    const uint64_t took_ns = nv_io_now_ns(run.io) - writer->since_ns;

    if (request->error)
        nv_sim_violation("a write fails (%d) without faults", request->error);
    writer->busy = false;
    if (!run.watched)
        return;
    run.answered++;
    run.longest_ns = took_ns > run.longest_ns ? took_ns : run.longest_ns;
}

static bool is_free(uint64_t offset)
{
    for (uint32_t i = 0; i < WRITERS; i++)
        if (run.writers[i].busy && run.writers[i].request.offset == offset)
            return false;
    return true;
}

static void write_on(struct writer *writer)
{
    const uint64_t offset = sim_random_below(&run.random, BLOCKS) * NV_LOG_UNIT;

    if (run.over || writer->busy || !is_free(offset))
        return;
    writer->busy = true;
    writer->since_ns = nv_io_now_ns(run.io);
    writer->request = (struct nv_log_request){.kind = NV_LOG_WRITE, .offset = offset, .length = NV_LOG_UNIT,
                                              .data = writer->data, .done = answered};
    nv_log_start(run.log, &writer->request);
}

static void turn(void)
{
    for (uint32_t i = 0; run.opened && i < WRITERS; i++)
        write_on(&run.writers[i]);
    nv_io_run(run.io);
    nv_log_pump(run.log);
    nv_io_enter(run.io);
    if (!nv_sim_step() && !nv_sim_advance())
        nv_sim_jump(NV_LOG_REST_MS * 1000000ull);
}

static bool is_full(void)
{
    struct nv_log_look look;

    nv_log_look(run.log, &look);
    return look.bypassed > 0;
}

static bool has_ended(void)
{
    return run.drained;
}

static bool has_opened(void)
{
    return run.opened;
}

static bool was_watched(void)
{
    static uint64_t since_ns;

    if (!run.watched)
        since_ns = nv_io_now_ns(run.io);
    run.watched = true;
    return nv_io_now_ns(run.io) - since_ns >= WATCHED_MS * 1000000ull;
}

static void until(bool (*reached)(void), const char *what)
{
    for (uint32_t i = 0; !reached(); i++) {
        turn();
        if (i == PATIENCE)
            nv_sim_violation("%s", what);
    }
}

static void begin(uint64_t ring)
{
    const struct nv_sim_faults faults = {.atom = 512};
    struct nv_log_config config = {.io = NULL, .size = BLOCKS * (uint64_t)NV_LOG_UNIT, .bypass_bytes = NV_LOG_BYPASS_MAX,
                                   .age_ms = 5000, .below = start_below, .event = heard,
                                   .claim = {.epoch = 1, .generation = 1, .length = NV_LOG_RING + ring}};

    nv_sim_begin(1, &faults);
    if (nv_io_create(&(struct nv_io_config){.cpu = -1}, &run.io, &(struct nv_io_features){false}) != 0)
        abort();
    config.io = run.io;
    run.file = nv_sim_file(sim_disk_create(NULL, config.claim.length), 512, false);
    config.handle = run.handle = nv_io_open_file(run.file);
    memset(config.claim.uuid, 7, sizeof config.claim.uuid);
    if (nv_log_create(&config, &run.log) != 0)
        abort();
    nv_log_open(run.log);
    until(has_opened, "the log does not open");
    nv_log_allow(run.log);
}

static void end(void)
{
    run.over = true;
    nv_log_drain(run.log);
    until(has_ended, "the log is never drained");
    nv_log_free(run.log);
}

static bool all_answered(void)
{
    bool busy = false;

    for (uint32_t i = 0; i < WRITERS; i++)
        busy |= run.writers[i].busy;
    return !busy;
}

static void count_records(void)
{
    struct nv_log_look look;

    begin(NV_LOG_RING_MIN);
    nv_sim_trouble(run.file)->hung = true;
    for (uint32_t i = 0; i < WRITERS; i++) {
        write_on(&run.writers[i]);
        nv_log_pump(run.log);
        nv_io_enter(run.io);
        nv_log_look(run.log, &look);
        printf("%" PRIu64 "%c", look.groups, i + 1 < WRITERS ? ' ' : '\n');
    }
    nv_sim_trouble(run.file)->hung = false;
    run.over = true;
    until(all_answered, "writes are never answered");
}

static bool has_records(void)
{
    return run.records >= SIZED_RECORDS;
}

static void count_sizes(void)
{
    begin(SIZED_RING);
    write_on(&run.writers[0]);
    nv_log_pump(run.log);
    nv_io_enter(run.io);
    run.records = run.halves = 0;
    until(has_records, "no records begin");
    printf("%" PRIu64 "\n", run.halves);
}

static void watch(uint64_t ring)
{
    begin(ring);
    until(is_full, "the log is never full");
    until(was_watched, "the clock stands still");
    run.watched = false;
    printf("%" PRIu64 " writes a second, %" PRIu64 " without a log, longest wait %" PRIu64 " ms\n",
           run.answered * 1000 / WATCHED_MS, WRITERS * (uint64_t)1000000000 / BELOW_NS, run.longest_ns / 1000000u);
}

int main(int argc, char **argv)
{
    const uint64_t ring = argc == 2 ? strtoull(argv[1], NULL, 10) << 20 : 0;

    if (argc == 2 && strcmp(argv[1], "--records") == 0) {
        count_records();
    } else if (argc == 2 && strcmp(argv[1], "--sizes") == 0) {
        count_sizes();
    } else if (ring > 0) {
        watch(ring);
    } else {
        fputs("usage: nvlogfull RING_MIB | --records | --sizes\n", stderr);
        return 2;
    }
    end();
    return 0;
}
