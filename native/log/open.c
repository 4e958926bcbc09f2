/*
 * Opening: superblocks → records up to the first invalid one → what is logged is known again → a sync of the log (what was
 * found may not be durable yet) → a BEGIN in the place of the first invalid record, durable → requests. A log that is
 * formatted gets a superblock instead, and its BEGIN at the ring's beginning.
 *
 * An empty one whose device may have failed before (`anew`) gets a superblock behind all that it has: what is read of it may be
 * in no more than a cache, which calls it clean since a write of it has failed, and no sync would bring it to the device.
 *
 * One operation of the device is under way at a time. One that passes the deadline is given up: the log is refused (HANGS), as
 * by an error, and its memory is the port's until it ends. What it does then is what a crash in its place could have left.
 */
#include <errno.h>
#include <string.h>

#include "log/state.h"

static void scan_on(struct nv_log *log);

static struct nv_log *log_of(struct nv_op *op)
{
    return (struct nv_log *)((char *)op - offsetof(struct nv_log, op));
}

/* What was asked of the device has ended. */
static void ends(struct nv_op *op)
{
    struct nv_log *log = log_of(op);

    if (!log->abandoned) {
        log->then(op);
        return;
    }
    log->opening = log->abandoned = false;
    log->config.event(log->config.context, NV_LOG_RESTS, 0); /* the last word: it may be freed from here on */
}

static void ask(struct nv_log *log, void (*then)(struct nv_op *op))
{
    log->op.done = ends;
    log->then = then;
    log->op_since_ns = nv_io_now_ns(log->config.io);
    nv_io_submit(log->config.io, &log->op);
}

static void transfer(struct nv_log *log, uint8_t kind, uint8_t flags, uint64_t offset, void *bytes, uint64_t size,
                     void (*done)(struct nv_op *op))
{
    log->iov = (struct iovec){bytes, size};
    log->op = (struct nv_op){.kind = kind, .flags = flags, .handle = log->config.handle, .iov = &log->iov, .iov_count = 1,
                             .offset = log->config.offset + offset};
    ask(log, done);
}

static void refuse(struct nv_log *log, enum nv_log_verdict verdict, int error)
{
    struct nv_log_request *request;

    log->found.verdict = verdict;
    log->found.error = error;
    log->found.dirty_bytes = log->dirty_blocks * NV_LOG_UNIT;
    log->opening = log->abandoned;
    log->state = NV_LOG_CLOSED;
    while ((request = nv_log_pop(&log->early)))
        nv_log_finish(log, request, -EIO);
    log->config.event(log->config.context, NV_LOG_OPENED, (int64_t)verdict);
}

void nv_log_give_up_opening(struct nv_log *log)
{
    if (!log->opening || log->abandoned || !nv_log_is_late(log, log->op_since_ns))
        return;
    log->abandoned = true;
    refuse(log, NV_LOG_HANGS, -ETIMEDOUT);
}

/* True: the transfer is over, and whole. */
static bool moved(struct nv_log *log)
{
    if (nv_log_goes_on(log, &log->op))
        return false;
    if (log->op.result == (int64_t)log->iov.iov_len)
        return true;
    refuse(log, NV_LOG_UNREADABLE, log->op.result < 0 ? (int)log->op.result : -EIO);
    return false;
}

/* ---- the new life ---- */

static void begun(struct nv_op *op)
{
    struct nv_log *log = log_of(op);

    if (!moved(log))
        return;
    log->head = log->completed = log->synced = log->head + NV_LOG_UNIT;
    log->synced_versions = log->version_head;
    log->opening = false;
    log->state = NV_LOG_THROUGH;
    log->found.dirty_bytes = log->dirty_blocks * NV_LOG_UNIT;
    log->config.event(log->config.context, NV_LOG_OPENED, NV_LOG_USABLE);
    nv_log_route_all(log, &log->early);
}

static void begin(struct nv_log *log)
{
    struct nv_log_head head = {.sequence = log->next, .chain = log->chain, .units = 1, .kind = NV_LOG_BEGIN,
                               .epoch = log->config.claim.epoch};

    memcpy(head.id, log->super.id, 16);
    memcpy(head.random, log->config.begin, 16);
    memset(log->copies, 0, NV_LOG_UNIT);
    nv_log_head_encode(&head, log->copies);
    log->chain = head.seal;
    log->next++;
    nv_log_mark(log, &(struct nv_log_mark){log->head, head.sequence, log->version_head, nv_io_now_ns(log->config.io), 1,
                                           head.seal});
    transfer(log, NV_OP_WRITE, NV_OP_DSYNC, NV_LOG_RING + log->head % log->ring, log->copies, NV_LOG_UNIT, begun);
}

static void synced(struct nv_op *op)
{
    struct nv_log *log = log_of(op);

    if (op->result < 0)
        refuse(log, NV_LOG_UNREADABLE, (int)op->result);
    else
        begin(log);
}

/* ---- what is there ---- */

/* A record behind its end says that the VVol has been larger. */
static bool lies_inside(const struct nv_log *log, const struct nv_log_entry *entry)
{
    return entry->block + entry->blocks <= nv_log_units(log->config.size);
}

static enum nv_log_verdict recover(struct nv_log *log)
{
    const struct nv_log_scan *scan = &log->scan;
    uint32_t unit = (uint32_t)(scan->at % log->ring / NV_LOG_UNIT) + 1;
    struct nv_log_entry entry;

    nv_log_mark(log, &(struct nv_log_mark){scan->at, scan->head.sequence, log->version_head,
                                           nv_io_now_ns(log->config.io), scan->head.units, scan->head.seal});
    for (uint32_t i = 0; i < scan->head.entries; i++) {
        nv_log_entry_decode(scan->unit, i, &entry);
        if (entry.kind == NV_LOG_TOMBSTONE) {
            nv_log_drop(log, entry.block, entry.blocks);
            continue;
        }
        if (!lies_inside(log, &entry))
            return log->config.claim.dirty ? NV_LOG_REGISTRY_OLD : NV_LOG_UNKNOWN_DATA;
        if (log->version_head - log->version_tail + entry.blocks > log->version_mask)
            return NV_LOG_TOO_MANY;
        nv_log_put(log, &entry, unit);
        unit += entry.kind == NV_LOG_DATA;
    }
    log->last_head = scan->head;
    log->found.records++;
    return NV_LOG_USABLE;
}

/* The last life ended before it had logged anything: its BEGIN makes room for ours, so that lives do not fill the ring. */
static void replace_begin(struct nv_log *log)
{
    struct nv_log_scan *scan = &log->scan;

    if (log->mark_head == log->mark_tail || log->last_head.kind != NV_LOG_BEGIN)
        return;
    log->mark_head--;
    scan->position = scan->at;
    scan->next = log->last_head.sequence;
    scan->chain = log->last_head.chain;
}

static void sync_all(struct nv_log *log)
{
    log->op = (struct nv_op){.kind = NV_OP_SYNC, .handle = log->config.handle};
    ask(log, synced);
}

static void renewed(struct nv_op *op)
{
    if (moved(log_of(op)))
        sync_all(log_of(op));
}

static void renew(struct nv_log *log)
{
    struct nv_log_super *super = &log->super;

    nv_log_empty(log);
    super->sequence++;
    super->tail = log->head % log->ring;
    super->next = log->next;
    super->chain = log->chain;
    log->tail = log->head;
    log->found.super = *super;
    nv_log_super_encode(super, log->copies);
    transfer(log, NV_OP_WRITE, NV_OP_DSYNC, (super->sequence & 1) * NV_LOG_UNIT, log->copies, NV_LOG_UNIT, renewed);
}

static void scanned(struct nv_log *log)
{
    struct nv_log_scan *scan = &log->scan;

    if (scan->newer) {
        refuse(log, NV_LOG_REGISTRY_OLD, 0);
        return;
    }
    if (log->dirty_blocks && !log->config.claim.dirty) {
        refuse(log, NV_LOG_UNKNOWN_DATA, 0);
        return;
    }
    if (!log->config.anew)
        replace_begin(log);
    if (!log->config.anew && scan->position - scan->begin + NV_LOG_UNIT > log->ring) {
        refuse(log, NV_LOG_TOO_MANY, 0);
        return;
    }
    log->head = log->completed = log->synced = scan->position;
    log->next = scan->next;
    log->chain = scan->chain;
    if (log->config.anew)
        renew(log);
    else
        sync_all(log);
}

static void window_read(struct nv_op *op)
{
    if (moved(log_of(op)))
        scan_on(log_of(op));
}

static void read_window(struct nv_log *log, uint64_t offset)
{
    const uint64_t left = log->ring - offset;

    log->window = offset;
    log->window_bytes = left < NV_LOG_SCAN_BYTES ? left : NV_LOG_SCAN_BYTES;
    transfer(log, NV_OP_READ, 0, NV_LOG_RING + offset, log->destager.run_memory, log->window_bytes, window_read);
}

static void scan_on(struct nv_log *log)
{
    enum nv_log_verdict verdict;
    uint64_t offset, length;

    while (nv_log_scan_wants(&log->scan, &offset, &length)) {
        if (offset < log->window || offset + length > log->window + log->window_bytes) {
            read_window(log, offset);
            return;
        }
        if (nv_log_scan_take(&log->scan, log->destager.run_memory + (offset - log->window)) == NV_LOG_SCAN_RECORD &&
            (verdict = recover(log)) != NV_LOG_USABLE) {
            refuse(log, verdict, 0);
            return;
        }
    }
    scanned(log);
}

/* ---- superblocks ---- */

static void formatted(struct nv_op *op)
{
    struct nv_log *log = log_of(op);

    if (!moved(log))
        return;
    log->head = log->completed = log->synced = log->tail = 0;
    begin(log);
}

/* Whatever was there is gone: then the first superblock. */
static void cleared(struct nv_op *op)
{
    struct nv_log *log = log_of(op);

    if (!moved(log))
        return;
    log->super = (struct nv_log_super){.sequence = 1, .epoch = log->config.claim.epoch,
                                       .generation = log->config.claim.generation, .ring = log->ring, .next = 1};
    memcpy(log->super.uuid, log->config.claim.uuid, 16);
    memcpy(log->super.id, log->config.fresh, 16);
    log->next = 1;
    log->found.super = log->super;
    nv_log_super_encode(&log->super, log->copies);
    transfer(log, NV_OP_WRITE, NV_OP_DSYNC, NV_LOG_UNIT, log->copies, NV_LOG_UNIT, formatted);
}

static void format(struct nv_log *log)
{
    memset(log->copies, 0, NV_LOG_RING);
    transfer(log, NV_OP_WRITE, NV_OP_DSYNC, 0, log->copies, NV_LOG_RING, cleared);
}

static void copies_read(struct nv_op *op)
{
    struct nv_log *log = log_of(op);
    struct nv_log_super super = {.sequence = 0};
    enum nv_log_verdict verdict;

    if (!moved(log))
        return;
    verdict = nv_log_judge(nv_log_super_decode(log->copies, &super), &super, &log->config.claim);
    log->found.super = super;
    if (verdict == NV_LOG_FORMAT || log->config.discard) {
        format(log);
    } else if (verdict != NV_LOG_USABLE) {
        refuse(log, verdict, 0);
    } else {
        log->super = super;
        log->ring = super.ring;
        log->tail = super.tail;
        nv_log_scan_begin(&log->scan, &super, log->config.claim.epoch);
        scan_on(log);
    }
}

void nv_log_open(struct nv_log *log)
{
    assert(log->state == NV_LOG_CLOSED && !log->opening);
    log->state = NV_LOG_RECOVERING;
    log->opening = true;
    transfer(log, NV_OP_READ, 0, 0, log->copies, NV_LOG_RING, copies_read);
}
