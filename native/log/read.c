/*
 * Reads: each block from its newest version in the log, or from below where it is not covered. What comes from the log is
 * looked at before it is believed (its checksum), so it is read into memory of the log's own first. While a read looks at a
 * version it is pinned: the tail does not pass it, and nothing is written over its data.
 *
 * A read that passes the deadline is given up (fail.c): who asked is answered -EIO, for what is in the log alone is not to be
 * had, and what is below is older. The port owns its memory until it ends, so the bounce is out of use until then; when all
 * are, reads that wait for one are answered the same way.
 */
#include <errno.h>
#include <string.h>

#include "log/state.h"
#include "reactor/crc32c.h"

/* Bytes of the block at `at` that the request still wants. */
static uint64_t part_of_block(const struct nv_log_request *request, uint64_t at)
{
    const uint64_t left = request->offset + request->length - at, here = NV_LOG_UNIT - at % NV_LOG_UNIT;

    return left < here ? left : here;
}

/* Read from below: not covered, or settled and not to be had from the log. */
static bool is_below(const struct nv_log *log, uint64_t block)
{
    const uint64_t number = nv_log_newest(log, block);
    const struct nv_log_version *version = number == NV_LOG_NONE ? NULL : nv_log_version(log, number);

    return !version || (version->bad && version->state == NV_LOG_SETTLED);
}

static void below_done(struct nv_log_below *io)
{
    struct nv_log_request *request = nv_log_who_asked(io);
    struct nv_log *log = io->log;
    struct nv_log_request **link = &log->reading;

    log->below_busy--;
    while (*link != request)
        link = &(*link)->beside;
    *link = request->beside;
    nv_log_unblock(log);
    if (io->error) {
        nv_log_finish(log, request, io->error);
        return;
    }
    request->moved += io->length;
    nv_log_read(log, request);
}

bool nv_log_reading(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    for (const struct nv_log_request *request = log->reading; request; request = request->beside) {
        const uint64_t from = request->below.offset / NV_LOG_UNIT;
        const uint64_t end = nv_log_units(request->below.offset + request->below.length);
        for (uint64_t block = from > first ? from : first; block < end && block < first + blocks; block++)
            if (nv_log_newest(log, block) != NV_LOG_NONE)
                return true;
    }
    return false;
}

static void read_below(struct nv_log *log, struct nv_log_request *request)
{
    const uint64_t from = request->offset + request->moved, end = request->offset + request->length;
    uint64_t to = from;

    while (to < end && is_below(log, to / NV_LOG_UNIT))
        to += part_of_block(request, to);
    request->below.kind = NV_LOG_READ;
    request->below.flags = 0;
    request->below.offset = from;
    request->below.length = to - from;
    request->below.data = request->data + request->moved;
    request->below.done = below_done;
    request->beside = log->reading;
    log->reading = request;
    log->below_busy++;
    nv_log_below(log, &request->below);
}

/* ---- from the log ---- */

static void look(struct nv_log *log, struct nv_log_bounce *bounce, bool *fine)
{
    for (uint32_t i = 0; i < bounce->count; i++) {
        struct nv_log_version *version = nv_log_version(log, bounce->numbers[i]);
        version->pins--;
        if (bounce->op.result > 0 &&
            nv_crc32c(0, bounce->memory + i * (uint64_t)NV_LOG_UNIT, NV_LOG_UNIT) == version->crc)
            continue;
        *fine = false;
        if (bounce->count == 1)
            nv_log_spoil(log, bounce->numbers[i]);
    }
}

static void copy(struct nv_log_bounce *bounce)
{
    struct nv_log_request *request = bounce->request;

    for (uint32_t i = 0; i < bounce->count; i++) {
        const uint64_t at = request->offset + request->moved, part = part_of_block(request, at);
        memcpy(request->data + request->moved, bounce->memory + i * (uint64_t)NV_LOG_UNIT + at % NV_LOG_UNIT, part);
        request->moved += part;
    }
}

static struct nv_log_bounce *free_bounce(struct nv_log *log)
{
    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++)
        if (!log->bounces[i].used)
            return &log->bounces[i];
    return NULL;
}

/* What one of them waits for may be elsewhere by now, so that it takes no memory: then it is the next one's. */
static void serve_thirsty(struct nv_log *log)
{
    struct nv_log_request *request;

    while (free_bounce(log) && (request = nv_log_pop(&log->thirsty)))
        nv_log_read(log, request);
}

static void bounce_done(struct nv_op *op)
{
    struct nv_log_bounce *bounce = (struct nv_log_bounce *)((char *)op - offsetof(struct nv_log_bounce, op));
    struct nv_log *log = bounce->log;
    struct nv_log_request *request = bounce->request;
    bool fine = true;

    if (bounce->late) {
        bounce->used = bounce->late = false;
        serve_thirsty(log);
        return;
    }
    if (nv_log_goes_on(log, op))
        return;
    look(log, bounce, &fine);
    if (fine)
        copy(bounce);
    request->alone = !fine;
    bounce->used = false;
    nv_log_read(log, request);
    serve_thirsty(log);
}

/* ---- those that hang ---- */

static void give_up(struct nv_log *log, struct nv_log_bounce *bounce)
{
    for (uint32_t i = 0; i < bounce->count; i++)
        nv_log_version(log, bounce->numbers[i])->pins--;
    nv_log_finish(log, bounce->request, -EIO);
    bounce->request = NULL;
    bounce->late = true;
}

bool nv_log_give_up_reads(struct nv_log *log)
{
    struct nv_log_request *request;
    uint32_t late = 0;
    bool some = false;

    for (uint32_t i = 0; i < NV_LOG_BOUNCES; i++) {
        struct nv_log_bounce *bounce = &log->bounces[i];
        if (bounce->used && !bounce->late && nv_log_is_late(log, bounce->since_ns)) {
            give_up(log, bounce);
            some = true;
        }
        late += bounce->late;
    }
    while (late == NV_LOG_BOUNCES && (request = nv_log_pop(&log->thirsty)))
        nv_log_finish(log, request, -EIO);
    return some;
}

static void read_log(struct nv_log *log, struct nv_log_request *request, uint64_t number)
{
    struct nv_log_bounce *bounce = free_bounce(log);
    const uint32_t unit = nv_log_version(log, number)->unit;
    const uint32_t most = request->alone ? 1 : NV_LOG_BOUNCE_BLOCKS;
    uint64_t at = request->offset + request->moved;

    if (!bounce) {
        nv_log_push(&log->thirsty, request);
        return;
    }
    bounce->used = true;
    bounce->request = request;
    bounce->count = 0;
    do { /* as far as the next blocks lie behind it in the log, too */
        struct nv_log_version *version = nv_log_version(log, number);
        if (version->kind != NV_LOG_DATA || version->bad || version->unit != unit + bounce->count)
            break;
        version->pins++;
        bounce->numbers[bounce->count++] = number;
        at += part_of_block(request, at);
        number = at < request->offset + request->length ? nv_log_newest(log, at / NV_LOG_UNIT) : NV_LOG_NONE;
    } while (number != NV_LOG_NONE && bounce->count < most);
    bounce->iov = (struct iovec){bounce->memory, bounce->count * (uint64_t)NV_LOG_UNIT};
    bounce->op = (struct nv_op){.kind = NV_OP_READ, .handle = log->config.handle, .iov = &bounce->iov, .iov_count = 1,
                                .offset = log->config.offset + NV_LOG_RING + unit * (uint64_t)NV_LOG_UNIT,
                                .done = bounce_done};
    bounce->since_ns = nv_io_now_ns(log->config.io);
    nv_io_submit(log->config.io, &bounce->op);
}

void nv_log_read(struct nv_log *log, struct nv_log_request *request)
{
    if (nv_log_haunted(log, request->offset / NV_LOG_UNIT, nv_log_units(request->offset % NV_LOG_UNIT + request->length))) {
        nv_log_finish(log, request, -EIO);
        return;
    }
    while (request->moved < request->length) {
        const uint64_t at = request->offset + request->moved, block = at / NV_LOG_UNIT, number = nv_log_newest(log, block);
        const struct nv_log_version *version = number == NV_LOG_NONE ? NULL : nv_log_version(log, number);

        if (is_below(log, block)) {
            read_below(log, request);
            return;
        }
        if (version->bad) {
            nv_log_finish(log, request, -EIO);
            return;
        }
        if (version->kind == NV_LOG_DATA) {
            read_log(log, request, number);
            return;
        }
        memset(request->data + request->moved, 0, part_of_block(request, at));
        request->moved += part_of_block(request, at);
    }
    nv_log_finish(log, request, 0);
}
