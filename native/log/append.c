/*
 * Group commit: writes gather in a group, which becomes one record, written at once; the next group gathers meanwhile. At
 * most NV_LOG_GROUPS_UNDER_WAY are under way; they complete in any order and are acknowledged in the order of the ring.
 *
 * A record costs the device and us nearly as much with one block as with eight. So one is half of what clients keep in the
 * log at once: one half is at the device while the other is answered and comes again. Beside others a smaller one does not
 * begin, it gathers; and a larger one is cut, or each would go on to be as large as those that came back together, and the
 * device would have one block and fourteen in turn. From NV_LOG_ENTRIES_BESIDE on a record is large by itself.
 */
#include <errno.h>
#include <string.h>

#include "io/copy.h"
#include "log/state.h"
#include "reactor/crc32c.h"

/* What a group takes of the ring, with the PAD before it if it would cross the end. */
static uint64_t needs(const struct nv_log *log, uint32_t data, uint32_t *pad_units)
{
    const uint64_t left = log->ring - log->head % log->ring, bytes = (1 + data) * (uint64_t)NV_LOG_UNIT;

    *pad_units = bytes > left ? (uint32_t)(left / NV_LOG_UNIT) : 0;
    return bytes + *pad_units * (uint64_t)NV_LOG_UNIT;
}

/* Bytes of the ring that are left when the building group, with so much more, has been written. */
static int64_t left_after(const struct nv_log *log, uint32_t data)
{
    uint32_t pad_units;
    const uint32_t have = log->building ? log->building->data : 0;
    const uint64_t bytes = log->building || data ? needs(log, have + data, &pad_units) : 0;

    return (int64_t)(log->ring - (log->head - log->tail)) - (int64_t)bytes;
}

static uint64_t versions_under_way(const struct nv_log *log)
{
    uint64_t blocks = log->building ? log->building->blocks : 0;

    for (const struct nv_log_group *group = log->flight; group; group = group->next)
        blocks += group->blocks;
    return blocks;
}

/* One unit stays free, so that the next life can begin; each bypass under way has one for its tombstone. */
bool nv_log_tombstone_room(const struct nv_log *log)
{
    return left_after(log, 0) >= (int64_t)((3 + log->bypasses) * (uint64_t)NV_LOG_UNIT);
}

static bool room(const struct nv_log *log, uint32_t data, uint64_t blocks)
{
    const uint64_t keep = log->reserve + (2 + log->bypasses) * (uint64_t)NV_LOG_UNIT;

    return left_after(log, data) >= (int64_t)keep &&
           log->version_head - log->version_tail + versions_under_way(log) + blocks <= log->version_mask;
}

static struct nv_log_group *begin_group(struct nv_log *log)
{
    for (uint32_t i = 0; i < NV_LOG_GROUPS; i++) {
        struct nv_log_group *group = &log->groups[i];
        if (group->used)
            continue;
        group->used = true;
        group->wants_sync = group->dsync = false;
        group->count = group->data = group->left = 0;
        group->blocks = 0;
        group->error = 0;
        group->requests = (struct nv_log_list){NULL, &group->requests.first};
        memset(group->memory, 0, NV_LOG_UNIT);
        return group;
    }
    return NULL;
}

/* ---- how large a record is ---- */

static uint32_t entries_under_way(const struct nv_log *log)
{
    uint32_t entries = 0;

    for (const struct nv_log_group *group = log->flight; group; group = group->next)
        entries += group->count;
    return entries;
}

static uint32_t half_of_all(const struct nv_log *log)
{
    const uint32_t half = (log->crowd + 1) / 2;

    return half < NV_LOG_ENTRIES_BESIDE ? half : NV_LOG_ENTRIES_BESIDE;
}

void nv_log_count_crowd(struct nv_log *log)
{
    const uint32_t now = entries_under_way(log) + (log->building ? log->building->count : 0);

    if (now > log->crowd)
        log->crowd = now;
    if (now > log->crowd_next)
        log->crowd_next = now;
}

/* What clients did long ago says nothing: another record begins. */
static void forget_crowd(struct nv_log *log)
{
    if (++log->crowd_records < NV_LOG_CROWD_RECORDS)
        return;
    log->crowd = log->crowd_next;
    log->crowd_next = log->crowd_records = 0;
}

/* Shall it begin now? The end of each one that is under way asks again, and who has said that more comes. */
static bool begins(const struct nv_log *log, const struct nv_log_group *group)
{
    if (log->in_flight == NV_LOG_GROUPS_UNDER_WAY)
        return false;
    return group->count >= half_of_all(log) || (log->in_flight == 0 && !log->more_comes);
}

/* It is cut here: the rest gathers by itself. */
static bool is_whole(const struct nv_log *log, const struct nv_log_group *group)
{
    const uint32_t half = half_of_all(log);

    return half > 0 && half < NV_LOG_ENTRIES_BESIDE && group->count >= half && begins(log, group);
}

/* ---- groups ---- */

static void submit(struct nv_log *log, uint8_t flags);

/* A group that has room for so many more entries and data, or NULL: it has to wait. */
static struct nv_log_group *group_for(struct nv_log *log, uint32_t entries, uint32_t data)
{
    struct nv_log_group *group = log->building;

    if (group && group->count + entries <= NV_LOG_ENTRIES && group->data + data <= log->group_data && !is_whole(log, group))
        return group;
    if (group)
        submit(log, NV_OP_AT_ONCE);
    if (!log->building)
        log->building = begin_group(log);
    return log->building != group ? log->building : NULL;
}

static void add_entry(struct nv_log_group *group, const struct nv_log_entry *entry)
{
    nv_log_entry_encode(group->memory, group->count, entry);
    group->entries[group->count++] = *entry;
    group->blocks += entry->kind == NV_LOG_TOMBSTONE ? 0 : entry->blocks;
}

static void add_data(struct nv_log_group *group, const struct nv_log_request *request, uint64_t first, uint32_t blocks)
{
    for (uint32_t i = 0; i < blocks; i++) {
        uint8_t *to = group->memory + (1 + group->data) * (uint64_t)NV_LOG_UNIT;
        const uint64_t done = i * (uint64_t)NV_LOG_UNIT, left = request->length - done;
        const uint64_t part = left < NV_LOG_UNIT ? left : NV_LOG_UNIT;
        uint32_t crc = nv_crc32c(0, request->data + done, part); /* before the copy, which leaves none of it in the cache */
        nv_copy_past_cache(to, request->data + done, part);
        if (part < NV_LOG_UNIT) { /* the VVol ends inside this block */
            memset(to + part, 0, NV_LOG_UNIT - part);
            crc = nv_crc32c(crc, to + part, NV_LOG_UNIT - part);
        }
        add_entry(group, &(struct nv_log_entry){first + i, 1, NV_LOG_DATA, crc});
        group->data++;
    }
}

enum nv_log_added nv_log_add(struct nv_log *log, struct nv_log_request *request, uint32_t kind)
{
    const uint64_t first = request->offset / NV_LOG_UNIT, blocks = nv_log_units(request->length);
    const uint32_t data = kind == NV_LOG_DATA ? (uint32_t)blocks : 0;
    struct nv_log_group *group;

    if (kind != NV_LOG_TOMBSTONE && !room(log, data, blocks))
        return NV_LOG_FULL;
    group = group_for(log, data ? data : 1, data);
    if (!group)
        return NV_LOG_NO_GROUP;
    if (kind != NV_LOG_TOMBSTONE && !room(log, data, blocks)) { /* what was being built has been sealed meanwhile */
        if (group->count == 0) {                                /* a record without entries would be none: the log's end */
            group->used = false;
            log->building = NULL;
        }
        return NV_LOG_FULL;
    }
    if (data)
        add_data(group, request, first, data);
    else
        add_entry(group, &(struct nv_log_entry){first, blocks, kind, 0});
    group->wants_sync |= (request->flags & NV_LOG_FUA) || kind == NV_LOG_TOMBSTONE;
    nv_log_push(&group->requests, request);
    return NV_LOG_ADDED;
}

/* ---- completion ---- */

/* A read has found meanwhile that some of it cannot be had from the log: it is not durable. */
static bool is_lost(const struct nv_log *log, const struct nv_log_request *request)
{
    const uint64_t first = request->offset / NV_LOG_UNIT;
    bool lost = false;

    for (uint64_t i = 0; log->lost_blocks > 0 && i < nv_log_units(request->length); i++) {
        const uint64_t number = nv_log_newest(log, first + i);
        lost |= number != NV_LOG_NONE && nv_log_version(log, number)->bad && nv_log_version(log, number)->state != NV_LOG_SETTLED;
    }
    return lost;
}

static void fua_done(struct nv_log_sync_wait *wait, int error)
{
    struct nv_log_request *request = nv_log_who_waits(wait);
    struct nv_log *log = request->below.log;

    if (error)
        nv_log_hold(log, request);
    else
        nv_log_finish(log, request, is_lost(log, request) ? -EIO : 0);
}

static void acknowledge(struct nv_log *log, struct nv_log_group *group)
{
    struct nv_log_request *request;

    while ((request = nv_log_pop(&group->requests))) {
        if (request->dropped) {
            nv_log_entombed(log, request);
        } else if (request->flags & NV_LOG_FUA) {
            request->wait.done = fua_done;
            if (nv_log_sync(log, &request->wait))
                nv_log_finish(log, request, 0);
        } else {
            nv_log_finish(log, request, 0);
        }
    }
}

static void enter_index(struct nv_log *log, const struct nv_log_group *group)
{
    uint32_t unit = (uint32_t)(group->position % log->ring / NV_LOG_UNIT) + 1;

    for (uint32_t i = 0; i < group->count; i++) {
        const struct nv_log_entry *entry = &group->entries[i];
        if (entry->kind != NV_LOG_TOMBSTONE)
            nv_log_put(log, entry, unit);
        unit += entry->kind == NV_LOG_DATA;
    }
}

static void complete(struct nv_log *log, struct nv_log_group *group)
{
    const uint64_t now_ns = nv_io_now_ns(log->config.io);
    const uint64_t pad_bytes = group->pad_units * (uint64_t)NV_LOG_UNIT;

    assert(log->completed == group->position - pad_bytes);
    if (group->pad_units)
        nv_log_mark(log, &(struct nv_log_mark){group->position - pad_bytes, group->sequence - 1, log->version_head, now_ns,
                                               group->pad_units, group->pad_seal});
    nv_log_mark(log, &(struct nv_log_mark){group->position, group->sequence, log->version_head, now_ns, 1 + group->data,
                                           group->seal});
    enter_index(log, group);
    log->completed = group->position + (1 + group->data) * (uint64_t)NV_LOG_UNIT;
    if (group->dsync && log->synced == group->position - pad_bytes) {
        log->synced = log->completed;
        log->synced_versions = log->version_head;
    }
    acknowledge(log, group);
    group->used = false;
}

static void in_order(struct nv_log *log)
{
    while (log->flight && log->flight->left == 0) {
        struct nv_log_group *group = log->flight;
        if (group->error)
            nv_log_fail(log, group->error);
        log->flight = group->next;
        if (!log->flight)
            log->flight_last = &log->flight;
        log->in_flight--;
        if (log->severed)
            group->used = false; /* nobody waits for it any more */
        else
            complete(log, group);
    }
}

static void op_done(struct nv_log_group *group, struct nv_op *op)
{
    if (nv_log_goes_on(group->log, op))
        return;
    if (!group->error)
        group->error = nv_log_outcome(op);
    group->left--;
    in_order(group->log);
}

static void record_done(struct nv_op *op)
{
    op_done((struct nv_log_group *)((char *)op - offsetof(struct nv_log_group, op)), op);
}

static void pad_done(struct nv_op *op)
{
    op_done((struct nv_log_group *)((char *)op - offsetof(struct nv_log_group, pad_op)), op);
}

/* ---- submission ---- */

static uint32_t seal(struct nv_log *log, struct nv_log_head *head, uint8_t *unit)
{
    memcpy(head->id, log->super.id, 16);
    head->sequence = log->next++;
    head->chain = log->chain;
    head->epoch = log->config.claim.epoch;
    nv_log_head_encode(head, unit);
    log->chain = head->seal;
    return head->seal;
}

static void write_at(struct nv_log *log, struct nv_op *op, struct iovec *iov, void *bytes, uint64_t size)
{
    *iov = (struct iovec){bytes, size};
    op->handle = log->config.handle;
    op->kind = NV_OP_WRITE;
    op->iov = iov;
    op->iov_count = 1;
    op->offset = log->config.offset + NV_LOG_RING + log->head % log->ring;
    nv_io_submit(log->config.io, op);
}

static void write_pad(struct nv_log *log, struct nv_log_group *group)
{
    struct nv_log_head head = {.kind = NV_LOG_PAD, .units = group->pad_units};

    memset(group->pad, 0, NV_LOG_UNIT);
    group->pad_seal = seal(log, &head, group->pad);
    group->left++;
    group->pad_op = (struct nv_op){.done = pad_done, .flags = group->dsync ? NV_OP_DSYNC : 0};
    write_at(log, &group->pad_op, &group->pad_iov, group->pad, NV_LOG_UNIT);
    log->head += group->pad_units * (uint64_t)NV_LOG_UNIT;
}

static void submit(struct nv_log *log, uint8_t flags)
{
    struct nv_log_group *group = log->building;
    struct nv_log_head head;

    if (!group || !begins(log, group))
        return;
    assert(group->count > 0);
    forget_crowd(log);
    log->building = NULL;
    group->since_ns = nv_io_now_ns(log->config.io);
    group->dsync = group->wants_sync && log->synced == log->head; /* else a sync of all that is before it follows */
    needs(log, group->data, &group->pad_units);
    *log->flight_last = group;
    group->next = NULL;
    log->flight_last = &group->next;
    log->in_flight++;
    if (group->pad_units)
        write_pad(log, group);
    head = (struct nv_log_head){.kind = NV_LOG_WRITES, .entries = group->count, .units = 1 + group->data};
    group->position = log->head;
    group->sequence = log->next;
    group->seal = seal(log, &head, group->memory);
    group->left++;
    group->op = (struct nv_op){.done = record_done, .flags = flags | (group->dsync ? NV_OP_DSYNC : 0)};
    write_at(log, &group->op, &group->iov, group->memory, (1 + group->data) * (uint64_t)NV_LOG_UNIT);
    log->head += (1 + group->data) * (uint64_t)NV_LOG_UNIT;
    log->counts.groups++;
    assert(log->head - log->tail < log->ring);
}

void nv_log_submit(struct nv_log *log)
{
    submit(log, 0);
}
