/*
 * See log.h. Memory, lists, and where a request goes.
 */
#include "log/log.h"

#include <errno.h>
#include <stdlib.h>

#include "log/state.h"
#include "reactor/pool.h"

/* ---- lists ---- */

void nv_log_push(struct nv_log_list *list, struct nv_log_request *request)
{
    request->next = NULL;
    *list->last = request;
    list->last = &request->next;
}

struct nv_log_request *nv_log_pop(struct nv_log_list *list)
{
    struct nv_log_request *request = list->first;

    if (!request)
        return NULL;
    list->first = request->next;
    if (!list->first)
        list->last = &list->first;
    return request;
}

void nv_log_unpop(struct nv_log_list *list, struct nv_log_request *request)
{
    request->next = list->first;
    list->first = request;
    if (!request->next)
        list->last = &request->next;
}

void nv_log_finish(struct nv_log *log, struct nv_log_request *request, int error)
{
    request->error = error;
    nv_log_push(&log->finished, request);
}

bool nv_log_goes_on(struct nv_log *log, struct nv_op *op)
{
    if (op->result <= 0 || (uint64_t)op->result >= op->iov->iov_len)
        return false;
    op->iov->iov_base = (uint8_t *)op->iov->iov_base + op->result;
    op->iov->iov_len -= (uint64_t)op->result;
    op->offset += (uint64_t)op->result;
    nv_io_submit(log->config.io, op);
    return true;
}

int nv_log_outcome(const struct nv_op *op)
{
    if (op->result > 0)
        return 0;
    return op->result < 0 ? (int)op->result : -EIO;
}

/* ---- memory ---- */

struct area {                       /* of the log's memory: how it is laid out is said once */
    void **at;
    uint64_t bytes;
};

static uint64_t power_above(uint64_t number)
{
    uint64_t power = 1;

    while (power < number)
        power <<= 1;
    return power;
}

static uint32_t list_areas(struct nv_log *log, struct area *areas)
{
    uint32_t count = 0;

    areas[count++] = (struct area){(void **)&log->marks, (log->mark_mask + 1) * sizeof *log->marks};
    areas[count++] = (struct area){(void **)&log->versions, (log->version_mask + 1) * sizeof *log->versions};
    areas[count++] = (struct area){(void **)&log->index, (log->index_mask + 1) * sizeof *log->index};
    areas[count++] = (struct area){(void **)&log->destager.batch, NV_LOG_BATCH * sizeof *log->destager.batch};
    areas[count++] = (struct area){(void **)&log->destager.memory, NV_LOG_UNIT};
    areas[count++] = (struct area){(void **)&log->copies, NV_LOG_RING};
    for (uint32_t i = 0; i < NV_LOG_GROUPS; i++) {
        areas[count++] = (struct area){(void **)&log->groups[i].memory, NV_LOG_RECORD_UNITS * (uint64_t)NV_LOG_UNIT};
        areas[count++] = (struct area){(void **)&log->groups[i].pad, NV_LOG_UNIT};
    }
    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++)
        areas[count++] = (struct area){(void **)&log->bounces[i].memory, NV_LOG_BOUNCE_BLOCKS * (uint64_t)NV_LOG_UNIT};
    areas[count++] = (struct area){(void **)&log->destager.run_memory,
                                   NV_LOG_RUN_MEMORIES * (uint64_t)NV_LOG_RUN_BLOCKS * NV_LOG_UNIT};
    return count;
}

#define AREAS_MAX (7u + 2u * NV_LOG_GROUPS + NV_LOG_BOUNCES)
_Static_assert(NV_LOG_SCAN_BYTES <= NV_LOG_RUN_BLOCKS * NV_LOG_UNIT, "recovery reads into the memory of a run");

static bool take_memory(struct nv_log *log)
{
    struct area areas[AREAS_MAX];
    const uint32_t count = list_areas(log, areas);
    uint64_t size = 0;
    uint8_t *memory;

    for (uint32_t i = 0; i < count; i++)
        size += nv_log_units(areas[i].bytes) * NV_LOG_UNIT;
    memory = nv_pages_map(size);
    if (!memory)
        return false;
    log->memory = memory;
    log->memory_bytes = size;
    for (uint32_t i = 0; i < count; i++) {
        *areas[i].at = memory;
        memory += nv_log_units(areas[i].bytes) * NV_LOG_UNIT;
    }
    return true;
}

static void set_up(struct nv_log *log)
{
    struct nv_log_list *const lists[] = {&log->waiting, &log->entombing, &log->blocked, &log->thirsty,
                                         &log->held,    &log->early,     &log->finished};

    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
        *lists[i] = (struct nv_log_list){NULL, &lists[i]->first};
    log->flight_last = &log->flight;
    for (uint32_t i = 0; i < NV_LOG_GROUPS; i++)
        log->groups[i].log = log;
    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++)
        log->bounces[i].log = log;
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++)
        log->destager.runs[i].log = log;
}

static uint64_t smaller(uint64_t left, uint64_t right)
{
    return left < right ? left : right;
}

int nv_log_create(const struct nv_log_config *config, struct nv_log **out)
{
    struct nv_log *log;
    uint64_t units;

    if (config->claim.length < NV_LOG_RING + NV_LOG_RING_MIN || config->claim.length - NV_LOG_RING > NV_LOG_RING_MAX ||
        config->offset % NV_LOG_UNIT || config->bypass_bytes > NV_LOG_BYPASS_MAX || config->size == 0)
        return -EINVAL;
    log = calloc(1, sizeof *log);
    if (!log)
        return -ENOMEM;
    log->config = *config;
    log->ring = (config->claim.length - NV_LOG_RING) / NV_LOG_UNIT * NV_LOG_UNIT;
    units = log->ring / NV_LOG_UNIT;
    log->group_data = (uint32_t)smaller(NV_LOG_DATA_UNITS, units / 8);
    log->reserve = smaller(NV_LOG_RESERVE_MAX, log->ring / 8);
    if (log->reserve < log->ring / 100)
        log->reserve = log->ring / 100;
    log->mark_mask = power_above(units) - 1;
    log->version_mask = log->mark_mask;
    log->index_mask = 2 * (log->version_mask + 1) - 1;
    log->below_writes = 1; /* what the life before wrote below and did not flush, the first FLUSH of this one covers */
    set_up(log);
    if (!take_memory(log)) {
        free(log);
        return -ENOMEM;
    }
    *out = log;
    return 0;
}

void nv_log_free(struct nv_log *log)
{
    assert(nv_log_idle(log) && !log->abandoned);
    nv_pages_unmap(log->memory, log->memory_bytes);
    free(log);
}

bool nv_log_idle(const struct nv_log *log)
{
    bool busy = log->in_flight || log->syncing || log->below_busy || (log->opening && !log->abandoned) ||
                log->destager.phase != NV_LOG_RESTING || log->destager.timer_out ||
                log->destager.super_out;

    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++)
        busy |= log->bounces[i].used;
    for (uint32_t i = 0; i < NV_LOG_RUNS; i++)
        busy |= log->destager.runs[i].used;
    return !busy && !log->building && !log->finished.first;
}

bool nv_log_abandoned(const struct nv_log *log)
{
    return log->abandoned;
}

/* ---- where a request goes ---- */

/* Somebody writes in sequence, and has written much: what he writes next goes below. */
static bool in_stream(struct nv_log *log, struct nv_log_request *request)
{
    struct nv_log_stream *stream = NULL;

    if (log->config.stream_bytes == 0 || request->kind != NV_LOG_WRITE || request->routed)
        return false;
    request->routed = true;
    for (uint32_t i = 0; i < NV_LOG_STREAMS; i++)
        if (log->streams[i].bytes && log->streams[i].end == request->offset)
            stream = &log->streams[i];
    if (!stream) {
        stream = &log->streams[log->stream_next++ % NV_LOG_STREAMS];
        stream->bytes = 0;
    }
    stream->end = request->offset + request->length;
    stream->bytes += request->length;
    return stream->bytes > log->config.stream_bytes;
}

static bool loggable(struct nv_log *log, struct nv_log_request *request)
{
    const uint64_t first = request->offset / NV_LOG_UNIT, blocks = nv_log_units(request->length);

    if (log->state != NV_LOG_SERVING)
        return false;
    if (request->kind != NV_LOG_WRITE)
        return blocks <= NV_LOG_ZERO_BLOCKS && nv_log_covered(log, first, blocks);
    return !in_stream(log, request) && blocks <= log->group_data &&
           (request->length < log->config.bypass_bytes || log->config.bypass_bytes == 0);
}

/* False: it has to wait for a group. */
static bool log_it(struct nv_log *log, struct nv_log_request *request)
{
    switch (nv_log_add(log, request, request->kind == NV_LOG_WRITE ? NV_LOG_DATA : NV_LOG_ZERO)) {
    case NV_LOG_ADDED:
        log->counts.logged++;
        return true;
    case NV_LOG_FULL:
        nv_log_bypass(log, request);
        return true;
    default:
        return false;
    }
}

static void route_change(struct nv_log *log, struct nv_log_request *request)
{
    if (!loggable(log, request))
        nv_log_bypass(log, request);
    else if (log->waiting.first || !log_it(log, request))
        nv_log_push(&log->waiting, request);
}

void nv_log_route(struct nv_log *log, struct nv_log_request *request)
{
    if (log->state == NV_LOG_CLOSED)
        nv_log_finish(log, request, -EIO);
    else if (log->state == NV_LOG_RECOVERING)
        nv_log_push(&log->early, request);
    else if (request->kind == NV_LOG_READ)
        nv_log_read(log, request);
    else if (request->kind != NV_LOG_FLUSH)
        route_change(log, request);
    else if (log->state == NV_LOG_FAILED)
        nv_log_hold(log, request);
    else
        nv_log_flush(log, request);
}

void nv_log_route_all(struct nv_log *log, struct nv_log_list *list)
{
    struct nv_log_list again = {NULL, &again.first};
    struct nv_log_request *request;

    if (!list->first)
        return;
    again = *list;
    *list = (struct nv_log_list){NULL, &list->first};
    while ((request = nv_log_pop(&again)))
        nv_log_route(log, request);
}

void nv_log_start(struct nv_log *log, struct nv_log_request *request)
{
    const uint64_t end = request->offset + request->length;

    assert(end <= log->config.size && request->kind >= NV_LOG_READ && request->kind <= NV_LOG_FLUSH);
    assert(request->kind == NV_LOG_READ || request->kind == NV_LOG_FLUSH ||
           (request->offset % NV_LOG_UNIT == 0 && (end % NV_LOG_UNIT == 0 || end == log->config.size)));
    request->below.log = log;
    request->error = 0;
    request->moved = 0;
    request->losses = log->lost_blocks ? NV_LOG_NONE : log->losses;
    request->alone = request->dropped = request->hold = request->routed = false;
    request->under_way = request->went_below = false;
    if (request->length == 0 && request->kind != NV_LOG_FLUSH)
        nv_log_finish(log, request, 0);
    else
        nv_log_route(log, request);
}

/* ---- turns ---- */

static void serve_waiting(struct nv_log *log)
{
    struct nv_log_request *request;

    while ((request = nv_log_pop(&log->waiting))) {
        if (!loggable(log, request)) {
            nv_log_bypass(log, request);
        } else if (!log_it(log, request)) {
            nv_log_unpop(&log->waiting, request);
            return;
        }
    }
}

void nv_log_expect(struct nv_log *log, bool more)
{
    log->more_comes = more;
}

bool nv_log_waits(const struct nv_log *log)
{
    return log->more_comes && log->building && log->in_flight == 0;
}

void nv_log_pump(struct nv_log *log)
{
    struct nv_log_request *request;

    do {
        while ((request = nv_log_pop(&log->finished)))
            request->done(request);
        nv_log_entomb(log);
        serve_waiting(log);
        nv_log_submit(log);
    } while (log->finished.first);
    nv_log_count_crowd(log);
    nv_log_destage(log);
    if (log->draining && !log->drained && log->state == NV_LOG_THROUGH && log->mark_head == log->mark_tail &&
        log->completed == log->head && !log->building && !log->bypasses) {
        log->drained = true;
        log->config.event(log->config.context, NV_LOG_DRAINED, 0);
    }
}

void nv_log_tick(struct nv_log *log)
{
    nv_log_watch(log);
    nv_log_pump(log);
}

void nv_log_allow(struct nv_log *log)
{
    if (log->state != NV_LOG_THROUGH || (log->draining && !log->drained))
        return;
    log->draining = log->drained = false;
    log->state = NV_LOG_SERVING;
}

void nv_log_limit(struct nv_log *log, const struct nv_log_limits *limits)
{
    assert(limits->bypass_bytes <= NV_LOG_BYPASS_MAX);
    log->config.bypass_bytes = limits->bypass_bytes;
    log->config.stream_bytes = limits->stream_bytes;
    log->config.age_ms = limits->age_ms;
    log->config.deadline_ms = limits->deadline_ms;
    if (log->config.rate != limits->rate)
        log->destager.due_ns = 0; /* what has been carried was weighed by the old one */
    log->config.rate = limits->rate;
}

void nv_log_drain(struct nv_log *log)
{
    log->draining = true;
    if (log->state == NV_LOG_SERVING)
        log->state = NV_LOG_THROUGH;
}

void nv_log_stop(struct nv_log *log)
{
    log->stopped = true;
}

void nv_log_grow(struct nv_log *log, uint64_t size)
{
    if (size <= log->config.size)
        return;
    assert(log->config.size % NV_LOG_UNIT == 0);
    log->config.size = size;
}

/* ---- looking on ---- */

enum nv_log_state nv_log_state(const struct nv_log *log)
{
    return log->state;
}

bool nv_log_holds_nothing(const struct nv_log *log)
{
    if (log->lost_blocks > 0) /* reads of these must go on to fail */
        return false;
    if (log->state == NV_LOG_VOID && (log->in_flight || log->syncing || nv_log_hangs(log))) /* its device hangs */
        return false;
    return log->state == NV_LOG_CLOSED || log->state == NV_LOG_VOID || (log->state == NV_LOG_THROUGH && log->indexed == 0);
}

uint64_t nv_log_alike(const struct nv_log *log, uint64_t offset, uint64_t length, bool *holds)
{
    const uint64_t first = offset / NV_LOG_UNIT, end = nv_log_units(offset + length);
    uint64_t block = first;

    /* What haunts a block may come to be seen after a crash: no hole until then, whatever is below. */
    *holds = log->state == NV_LOG_CLOSED || log->state == NV_LOG_RECOVERING || nv_log_haunted(log, first, end - first);
    if (*holds || log->indexed == 0)
        return length;
    *holds = nv_log_newest(log, first) != NV_LOG_NONE;
    while (block < end && block - first < NV_LOG_ALIKE_BLOCKS && (nv_log_newest(log, block) != NV_LOG_NONE) == *holds)
        block++;
    return smaller(block * NV_LOG_UNIT - offset, length);
}

const struct nv_log_found *nv_log_found(const struct nv_log *log)
{
    return &log->found;
}

void nv_log_look(const struct nv_log *log, struct nv_log_look *out)
{
    *out = log->counts;
    out->state = log->state;
    out->ring_bytes = log->ring;
    out->used_bytes = nv_log_used(log);
    out->dirty_blocks = log->dirty_blocks;
    out->lost_blocks = log->lost_blocks;
    out->losses = log->losses;
    out->held = 0;
    for (const struct nv_log_request *request = log->held.first; request; request = request->next)
        out->held++;
    if (log->dirty_blocks && log->mark_head != log->mark_tail)
        out->oldest_age_ms =
            (nv_io_now_ns(log->config.io) - log->marks[log->mark_tail & log->mark_mask].since_ns) / 1000000u;
}

const char *nv_log_check(const struct nv_log *log)
{
    uint64_t dirty = 0, lost = 0, indexed = 0, unsettled = 0;

    for (uint64_t number = log->version_tail; number < log->version_head; number++) {
        const struct nv_log_version *version = nv_log_version(log, number);
        const bool open = version->state != NV_LOG_SETTLED;
        unsettled += open;
        if (nv_log_newest(log, version->block) != number)
            continue;
        indexed++;
        dirty += open;
        lost += open && version->bad;
    }
    if (indexed != log->indexed)
        return "the index leads to versions that are gone, or not to all";
    if (dirty != log->dirty_blocks || lost != log->lost_blocks || unsettled != log->unsettled)
        return "dirty, lost or unsettled blocks are miscounted";
    if (log->tail > log->synced || log->synced > log->completed || log->completed > log->head ||
        (log->head - log->tail > log->ring && log->state != NV_LOG_CLOSED))
        return "positions are out of order";
    for (uint32_t i = 0; i < NV_LOG_BOUNCES && log->thirsty.first; i++)
        if (!log->bounces[i].used)
            return "a read waits for memory, and some is free";
    return NULL;
}
