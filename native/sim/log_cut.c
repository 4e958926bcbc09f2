/*
 * See log_cut.h. Invariant: an event is recorded before what it tells of has any effect, so that a cut right behind it is a
 * moment that there was.
 */
#include "sim/log_cut.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/io_sim.h"

#define EVENTS_MAX 60000u
#define LOG_SIZE (NV_LOG_RING + CUT_RING)
#define BELOW_SIZE (CUT_BLOCKS * MODEL_BLOCK)
#define SECTOR (MODEL_BLOCK / MODEL_SECTORS)

enum disk { THE_LOG, BELOW, DISKS };
enum what { WRITE_IN, WRITE_DONE, SYNC_IN, SYNC_DONE, ASKED, ANSWERED };

struct event {                      /* in the order in which they happened */
    uint8_t what, disk, kind, flags;
    uint32_t of;                    /* ..._DONE, ANSWERED: the event that it ends */
    uint32_t slot;                  /* ASKED: of the request */
    uint64_t offset, length;        /* ASKED: blocks */
    uint8_t *bytes;
};

struct below_io {
    struct nv_op op;
    struct iovec iov;
    struct nv_log_below *asked;
    bool used;
};

struct cut_run cut_run;

static struct {
    struct nv_io *io;
    struct nv_log *log;
    nv_handle handles[DISKS];
    int files[DISKS];
    struct event *events;
    bool recording, opened;
    enum nv_log_verdict verdict;
    struct below_io ios[64];
    bool busy[CUT_BLOCKS];
    uint32_t stream_bytes;
    uint64_t epoch;
    struct model model;
    uint32_t now;                   /* the cut that is being judged */
    const char *how;
} run;

_Noreturn void nv_sim_violation(const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "VIOLATION at cut %u of %u, %s: ", run.now, cut_run.events, run.how ? run.how : "while running");
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

/* ---- recording: what the port is given ---- */

void __real_nv_io_submit(struct nv_io *io, struct nv_op *op);
void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op);

struct watched {                    /* an operation that is under way, and whose end it is to be told */
    struct nv_op *op;
    void (*done)(struct nv_op *op);
    uint32_t event;
};

static struct watched watched[256];

static uint32_t note(struct event event)
{
    assert(cut_run.events < EVENTS_MAX);
    run.events[cut_run.events] = event;
    return cut_run.events++;
}

static void watched_done(struct nv_op *op)
{
    struct watched *found = watched;
    void (*done)(struct nv_op *op);

    while (found->op != op)
        found++;
    done = found->done;
    if (op->result < 0 || (op->kind == NV_OP_WRITE && (uint64_t)op->result != op->iov->iov_len))
        nv_sim_violation("the file system answers %" PRId64, op->result);
    note((struct event){.what = op->kind == NV_OP_SYNC ? SYNC_DONE : WRITE_DONE, .of = found->event});
    found->op = NULL;
    op->done = done;
    done(op);
}

void __wrap_nv_io_submit(struct nv_io *io, struct nv_op *op)
{
    const uint8_t disk = op->handle == run.handles[THE_LOG] ? THE_LOG : BELOW;
    struct event event = {.what = op->kind == NV_OP_SYNC ? SYNC_IN : WRITE_IN, .disk = disk, .flags = op->flags,
                          .kind = op->kind, .offset = op->offset, .length = op->length};
    struct watched *free_one = watched;

    if (run.recording && (op->kind == NV_OP_WRITE || op->kind == NV_OP_SYNC || op->kind == NV_OP_ZERO || op->kind == NV_OP_PUNCH)) {
        if (op->kind == NV_OP_WRITE) {
            event.length = op->iov->iov_len;
            event.bytes = malloc(event.length);
            assert(event.bytes && op->iov_count == 1);
            memcpy(event.bytes, op->iov->iov_base, event.length);
        }
        while (free_one->op)
            free_one++;
        *free_one = (struct watched){op, op->done, note(event)};
        op->done = watched_done;
    }
    __real_nv_io_submit(io, op);
}

/* ---- below the log ---- */

static void below_done(struct nv_op *op)
{
    struct below_io *io = (struct below_io *)((char *)op - offsetof(struct below_io, op));
    struct nv_log_below *asked = io->asked;

    if (op->kind != NV_OP_SYNC && op->kind != NV_OP_WRITE && (asked->flags & NV_LOG_FUA) && asked->kind != NV_LOG_READ) {
        io->op = (struct nv_op){.kind = NV_OP_SYNC, .handle = run.handles[BELOW], .done = below_done};
        nv_io_submit(run.io, &io->op);
        return;
    }
    io->used = false;
    asked->error = op->result < 0 ? (int)op->result : 0;
    asked->done(asked);
}

static void start_below(void *context, struct nv_log_below *asked)
{
    static const uint8_t kinds[] = {
        [NV_LOG_READ] = NV_OP_READ, [NV_LOG_WRITE] = NV_OP_WRITE, [NV_LOG_ZEROES] = NV_OP_PUNCH,
        [NV_LOG_TRIM] = NV_OP_PUNCH, [NV_LOG_FLUSH] = NV_OP_SYNC,
    };
    struct below_io *io = run.ios;

    (void)context;
    while (io->used)
        io++;
    io->used = true;
    io->asked = asked;
    io->iov = (struct iovec){asked->data, asked->length};
    io->op = (struct nv_op){.kind = kinds[asked->kind], .handle = run.handles[BELOW], .offset = asked->offset,
                            .length = asked->length, .iov = &io->iov, .iov_count = 1, .done = below_done};
    if (asked->kind == NV_LOG_WRITE && (asked->flags & NV_LOG_FUA))
        io->op.flags = NV_OP_DSYNC;
    nv_io_submit(run.io, &io->op);
}

static void heard(void *context, enum nv_log_event event, int64_t value)
{
    (void)context;
    if (event == NV_LOG_OPENED) {
        run.opened = true;
        run.verdict = (enum nv_log_verdict)value;
    } else {
        nv_sim_violation("event %d, value %" PRId64, (int)event, value);
    }
}

void cut_turn(void)
{
    nv_io_run(run.io);
    nv_log_tick(run.log);
    nv_io_enter(run.io);
    nv_io_sleep_begin(run.io);
    if (!nv_io_ready(run.io))
        nv_io_sleep(run.io, 200000);
    nv_io_sleep_end(run.io);
}

static void open_log(bool dirty)
{
    struct nv_log_config config = {
        .io = run.io, .handle = run.handles[THE_LOG], .size = BELOW_SIZE, .bypass_bytes = 6u * MODEL_BLOCK, .age_ms = 20,
        .stream_bytes = run.stream_bytes, .below = start_below, .event = heard,
        .claim = {.epoch = ++run.epoch, .generation = 1, .length = LOG_SIZE, .dirty = dirty},
    };

    memset(config.claim.uuid, 9, 16);
    memset(config.claim.id, 5, 16);
    memset(config.fresh, 5, 16);
    for (uint32_t i = 0; i < 16; i++)
        config.begin[i] = (uint8_t)sim_random_below(&cut_run.random, 256);
    if (nv_log_create(&config, &run.log) != 0)
        nv_sim_violation("no memory for the log");
    run.opened = false;
    nv_log_open(run.log);
    while (!run.opened)
        cut_turn();
    if (run.verdict != NV_LOG_USABLE)
        nv_sim_violation("the log is refused: %s", nv_log_verdict_name(run.verdict));
}

static void close_log(void)
{
    nv_log_stop(run.log);
    while (!nv_log_idle(run.log))
        cut_turn();
    nv_log_free(run.log);
}

/* ---- requests ---- */

static void request_done(struct nv_log_request *log)
{
    struct cut_request *request = (struct cut_request *)((char *)log - offsetof(struct cut_request, log));
    const struct event *asked = &run.events[request->event];

    if (log->error)
        nv_sim_violation("a request of kind %u fails: %d", log->kind, log->error);
    request->used = false;
    if (log->kind != NV_LOG_READ) {
        for (uint64_t i = 0; i < asked->length; i++)
            run.busy[asked->offset + i] = false;
        note((struct event){.what = ANSWERED, .of = request->event});
    }
    if (request->answered)
        request->answered(request);
}

static bool any_busy(uint64_t first, uint64_t blocks)
{
    for (uint64_t i = 0; i < blocks; i++)
        if (run.busy[first + i])
            return true;
    return false;
}

static void note_change(struct cut_request *request, enum nv_log_kind kind, uint8_t flags, uint64_t first, uint64_t blocks)
{
    struct event event = {.what = ASKED, .kind = (uint8_t)kind, .flags = flags, .offset = first, .length = blocks,
                          .slot = (uint32_t)(request - cut_run.requests)};

    if (kind == NV_LOG_WRITE) {
        event.bytes = malloc(blocks * MODEL_BLOCK);
        assert(event.bytes);
        memcpy(event.bytes, request->data, blocks * MODEL_BLOCK);
    }
    for (uint64_t i = 0; i < blocks; i++) {
        run.busy[first + i] = true;
        cut_run.versions[first + i]++;
    }
    request->event = note(event);
}

bool cut_ask(struct cut_request *request, enum nv_log_kind kind, uint8_t flags, uint64_t first, uint64_t blocks)
{
    assert(!request->used && blocks <= CUT_REQUEST_BLOCKS && first + blocks <= CUT_BLOCKS);
    if (kind != NV_LOG_READ && any_busy(first, blocks))
        return false;
    request->used = true;
    if (kind != NV_LOG_READ)
        note_change(request, kind, flags, first, blocks);
    request->log = (struct nv_log_request){.kind = (uint8_t)kind, .flags = flags, .offset = first * MODEL_BLOCK,
                                           .length = blocks * MODEL_BLOCK, .data = request->data, .done = request_done};
    nv_log_start(run.log, &request->log);
    return true;
}

/* ---- a moment of it ---- */

enum pick { ALL, NOTHING, EVERY_OTHER, TORN, PICKS };
static const char *const pick_names[] = {"all that was written", "only what was durable", "every other write", "torn writes"};

static uint8_t images[DISKS][LOG_SIZE > BELOW_SIZE ? LOG_SIZE : BELOW_SIZE];

static void apply(const struct event *event, uint64_t from, uint64_t to)
{
    uint8_t *at = images[event->disk] + event->offset;

    if (event->bytes)
        memcpy(at + from, event->bytes + from, to - from);
    else
        memset(at + from, 0, to - from);
}

static uint32_t durable_at[EVENTS_MAX]; /* of a write: when it became durable */

/* A DSYNC write is durable when it is done; any other with the first sync that was handed in after it was done. */
static void find_durable(void)
{
    static uint32_t done_at[EVENTS_MAX];

    for (uint32_t i = 0; i < cut_run.events; i++)
        done_at[i] = durable_at[i] = UINT32_MAX;
    for (uint32_t i = 0; i < cut_run.events; i++) {
        const struct event *event = &run.events[i];
        if (event->what == WRITE_DONE) {
            done_at[event->of] = i;
            if (run.events[event->of].flags & NV_OP_DSYNC)
                durable_at[event->of] = i;
        }
        for (uint32_t j = 0; event->what == SYNC_DONE && j < event->of; j++)
            if (run.events[j].what == WRITE_IN && run.events[j].disk == run.events[event->of].disk &&
                done_at[j] < event->of && durable_at[j] == UINT32_MAX)
                durable_at[j] = i;
    }
}

/* A sector inside the write, another one each time; now and then behind its end. */
static uint64_t torn_at(const struct event *event, uint32_t number)
{
    const uint64_t sectors = event->length / SECTOR;

    return number % 5 == 4 ? event->length : (number * 7 + sectors / 2) % sectors * SECTOR;
}

/* Every write that was handed in before the cut, as far as the disk has it: durable ones, and what the pick takes. */
static void make_disks(uint32_t cut, enum pick pick)
{
    uint32_t number = 0;

    memset(images, 0, sizeof images);
    for (uint32_t i = 0; i < cut; i++) {
        const struct event *event = &run.events[i];
        if (event->what != WRITE_IN)
            continue;
        if (durable_at[i] < cut || pick == ALL)
            apply(event, 0, event->length);
        else if (pick == EVERY_OTHER && number++ % 2 == 0)
            apply(event, 0, event->length);
        else if (pick == TORN)
            apply(event, 0, torn_at(event, number++));
    }
}

/* What had been answered by then. */
static void make_model(uint32_t cut)
{
    static uint8_t bytes[CUT_REQUEST_BLOCKS * MODEL_BLOCK]; /* the judge's own: see translate() */
    static uint32_t floors[CUT_DEPTH][CUT_BLOCKS];

    model_begin(&run.model, CUT_BLOCKS);
    for (uint32_t i = 0; i < cut; i++) {
        const struct event *event = &run.events[i], *asked = event->what == ANSWERED ? &run.events[event->of] : event;
        if (event->what == ASKED && event->kind == NV_LOG_FLUSH) {
            model_flush(&run.model, floors[event->slot]);
        } else if (event->what == ASKED) {
            model_write(&run.model, event->offset, event->length, event->kind == NV_LOG_WRITE ? bytes : NULL);
        } else if (event->what == ANSWERED && asked->kind == NV_LOG_FLUSH) {
            model_flushed(&run.model, floors[asked->slot]);
        } else if (event->what == ANSWERED) {
            model_written(&run.model, asked->offset, asked->length, asked->flags & NV_LOG_FUA, false);
        }
    }
}

/*
 * The judge knows a version by the words that model_fill() puts into it; a client brings its own bytes. So each sector that
 * has the bytes of some version of its block gets that version's words, and what is of none stays as it is, for the judge.
 */
static const uint8_t *versions[CUT_BLOCKS][MODEL_VERSIONS]; /* bytes of each; NULL: zeros */

static void list_versions(void)
{
    uint32_t newest[CUT_BLOCKS] = {0};

    for (uint32_t i = 0; i < cut_run.events; i++)
        for (uint64_t j = 0; run.events[i].what == ASKED && j < run.events[i].length; j++) {
            const uint64_t block = run.events[i].offset + j;
            versions[block][++newest[block]] = run.events[i].bytes ? run.events[i].bytes + j * MODEL_BLOCK : NULL;
        }
}

static void translate_sector(uint8_t *bytes, uint64_t block, uint32_t sector)
{
    static uint8_t words[MODEL_BLOCK];

    for (uint32_t version = run.model.block[block].newest; version > 0; version--) {
        const uint8_t *theirs = versions[block][version];
        if (!theirs || memcmp(bytes, theirs + sector * SECTOR, SECTOR) != 0)
            continue;
        model_fill(words, block, version);
        memcpy(bytes, words + sector * SECTOR, SECTOR);
        return;
    }
}

static void translate(uint8_t *bytes)
{
    for (uint64_t block = 0; block < CUT_BLOCKS; block++)
        for (uint32_t sector = 0; sector < MODEL_SECTORS; sector++)
            translate_sector(bytes + block * MODEL_BLOCK + sector * SECTOR, block, sector);
}

static void put_file(enum disk disk, uint64_t size)
{
    if (pwrite(run.files[disk], images[disk], size, 0) != (ssize_t)size)
        nv_sim_violation("cannot write a file: %s", strerror(errno));
}

static void read_done(struct nv_log_request *log)
{
    ((struct cut_request *)((char *)log - offsetof(struct cut_request, log)))->used = false;
}

static void judge(uint32_t cut, enum pick pick)
{
    static uint8_t bytes[BELOW_SIZE];
    struct cut_request *request = &cut_run.requests[0];

    run.now = cut;
    run.how = pick_names[pick];
    make_disks(cut, pick);
    make_model(cut);
    put_file(THE_LOG, LOG_SIZE);
    put_file(BELOW, BELOW_SIZE);
    open_log(true);
    request->used = true;
    request->log = (struct nv_log_request){.kind = NV_LOG_READ, .length = BELOW_SIZE, .data = bytes, .done = read_done};
    nv_log_start(run.log, &request->log);
    while (request->used)
        cut_turn();
    if (request->log.error)
        nv_sim_violation("cannot read: %d", request->log.error);
    translate(bytes);
    model_crashed(&run.model, bytes, false);
    close_log();
}

/* Where a record begins to be written and where it is written: from the first request on, the registry knows of the log. */
static uint32_t list_boundaries(uint32_t *cuts)
{
    uint32_t count = 0;
    bool asked = false;

    for (uint32_t i = 0; i < cut_run.events; i++) {
        const struct event *event = &run.events[i], *in = event->what == WRITE_DONE ? &run.events[event->of] : event;
        asked |= event->what == ASKED;
        if (asked && in->what == WRITE_IN && in->disk == THE_LOG)
            cuts[count++] = i + 1;
    }
    return count;
}

void cut_begin(const char *folder, uint64_t seed, uint32_t stream_bytes)
{
    cut_run.random.state = seed;
    run.stream_bytes = stream_bytes;
    run.events = calloc(EVENTS_MAX, sizeof *run.events);
    if (!run.events || chdir(folder) != 0 ||
        nv_io_create(&(struct nv_io_config){.entries = 256, .completions = 512, .cpu = -1}, &run.io,
                     &(struct nv_io_features){false}) != 0)
        nv_sim_violation("no memory, folder or ring");
    for (uint32_t i = 0; i < DISKS; i++) {
        run.files[i] = open(i == THE_LOG ? "log" : "below", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (run.files[i] < 0 || ftruncate(run.files[i], i == THE_LOG ? LOG_SIZE : BELOW_SIZE) != 0)
            nv_sim_violation("no file: %s", strerror(errno));
        run.handles[i] = nv_io_open_file(run.files[i]);
    }
    run.recording = true;
    open_log(false);
    nv_log_allow(run.log);
}

void cut_end(void)
{
    run.recording = false;
    close_log();
}

uint32_t cut_judge(uint32_t wanted, uint32_t *boundaries)
{
    static uint32_t places[EVENTS_MAX];
    const uint32_t count = list_boundaries(places), cuts = wanted < count ? wanted : count;

    find_durable();
    list_versions();
    for (uint32_t i = 0; i < cuts; i++)
        judge(places[(uint64_t)i * count / cuts], (enum pick)(i % PICKS));
    *boundaries = count;
    return cuts;
}
