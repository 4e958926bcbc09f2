/*
 * What is logged: versions, marks and the index (state.h). Linear probing; a slot that becomes free is filled by moving
 * later ones of its chain back, so there are no gravestones and a search ends at the first free slot.
 */
#include <errno.h>
#include <stdlib.h>

#include "log/state.h"

static uint64_t hash(const struct nv_log *log, uint64_t block)
{
    block *= 0x9e3779b97f4a7c15ull;
    return (block ^ block >> 32) & log->index_mask;
}

static struct nv_log_slot *slot_of(const struct nv_log *log, uint64_t block)
{
    uint64_t at = hash(log, block);

    while (log->index[at].block && log->index[at].block != block + 1)
        at = (at + 1) & log->index_mask;
    return &log->index[at];
}

uint64_t nv_log_newest(const struct nv_log *log, uint64_t block)
{
    const struct nv_log_slot *slot = slot_of(log, block);

    return slot->block ? slot->number : NV_LOG_NONE;
}

/* It is quicker to look up each of so many blocks than to look at each version that there is. */
static bool are_few(const struct nv_log *log, uint64_t blocks)
{
    return blocks <= log->version_head - log->version_tail;
}

bool nv_log_covered(const struct nv_log *log, uint64_t first, uint64_t blocks)
{
    bool covered = false;

    if (log->indexed == 0)
        return false;
    if (are_few(log, blocks)) {
        for (uint64_t i = 0; i < blocks && !covered; i++)
            covered = slot_of(log, first + i)->block != 0;
        return covered;
    }
    for (uint64_t number = log->version_tail; number < log->version_head && !covered; number++) {
        const uint64_t block = nv_log_version(log, number)->block;
        covered = block - first < blocks && slot_of(log, block)->block != 0;
    }
    return covered;
}

static void forget(struct nv_log *log, struct nv_log_slot *slot)
{
    uint64_t hole = (uint64_t)(slot - log->index), at = hole;

    log->indexed--;
    for (;;) {
        log->index[hole].block = 0;
        do {
            at = (at + 1) & log->index_mask;
            if (!log->index[at].block)
                return;
        } while (((at - hash(log, log->index[at].block - 1)) & log->index_mask) < ((at - hole) & log->index_mask));
        log->index[hole] = log->index[at];
        hole = at;
    }
}

/* The version that the index leads to, if it is not settled, counts its block as dirty. */
static void count_newest(struct nv_log *log, uint64_t number, int64_t change)
{
    const struct nv_log_version *version = nv_log_version(log, number);

    if (version->state == NV_LOG_SETTLED)
        return;
    log->dirty_blocks = (uint64_t)((int64_t)log->dirty_blocks + change);
    if (version->bad)
        log->lost_blocks = (uint64_t)((int64_t)log->lost_blocks + change);
}

static void put_block(struct nv_log *log, uint64_t block, const struct nv_log_entry *entry, uint32_t unit)
{
    struct nv_log_slot *slot = slot_of(log, block);
    const uint64_t number = log->version_head++;

    assert(number - log->version_tail <= log->version_mask);
    log->versions[number & log->version_mask] = (struct nv_log_version){
        .block = block, .older = slot->block ? slot->number : NV_LOG_NONE, .unit = unit, .crc = entry->crc,
        .kind = (uint8_t)entry->kind,
    };
    if (slot->block)
        count_newest(log, slot->number, -1);
    else
        log->indexed++;
    *slot = (struct nv_log_slot){block + 1, number};
    log->unsettled++;
    log->dirty_blocks++;
}

void nv_log_put(struct nv_log *log, const struct nv_log_entry *entry, uint32_t unit)
{
    assert(entry->kind != NV_LOG_TOMBSTONE);
    for (uint64_t i = 0; i < entry->blocks; i++)
        put_block(log, entry->block + i, entry, unit);
}

void nv_log_mark(struct nv_log *log, const struct nv_log_mark *mark)
{
    assert(log->mark_head - log->mark_tail <= log->mark_mask);
    log->marks[log->mark_head++ & log->mark_mask] = *mark;
}

uint64_t nv_log_carry_limit(const struct nv_log *log)
{
    return log->state == NV_LOG_FAILED ? log->version_head : log->synced_versions;
}

uint64_t nv_log_carry(const struct nv_log *log, uint64_t block, uint64_t limit)
{
    uint64_t number = nv_log_newest(log, block);

    while (number != NV_LOG_NONE && number >= limit)
        number = nv_log_version(log, number)->older;
    return number != NV_LOG_NONE && number >= log->version_tail ? number : NV_LOG_NONE;
}

static void settle_one(struct nv_log *log, uint64_t number)
{
    struct nv_log_version *version = nv_log_version(log, number);

    if (version->state == NV_LOG_SETTLED)
        return;
    if (nv_log_newest(log, version->block) == number)
        count_newest(log, number, -1);
    version->state = NV_LOG_SETTLED;
    log->unsettled--;
}

void nv_log_settle(struct nv_log *log, uint64_t number)
{
    const uint64_t carried = number;

    while (number != NV_LOG_NONE && number >= log->version_tail) {
        if (number != carried && nv_log_version(log, number)->state == NV_LOG_SETTLED)
            break; /* and so are all before it */
        log->counts.merged += number != carried;
        settle_one(log, number);
        number = nv_log_version(log, number)->older;
    }
}

void nv_log_unsettle(struct nv_log *log, uint64_t first, uint64_t blocks)
{
    for (uint64_t number = log->version_tail; number < log->version_head; number++) {
        struct nv_log_version *version = nv_log_version(log, number);
        if (version->block - first >= blocks || nv_log_newest(log, version->block) != number)
            continue;
        if (version->state == NV_LOG_SETTLED) {
            log->unsettled++;
            version->state = NV_LOG_LIVE;
            count_newest(log, number, 1);
            if (version->bad) {
                log->losses++;
                log->config.event(log->config.context, NV_LOG_LOST, (int64_t)version->block);
            }
        }
        version->state = NV_LOG_LIVE; /* CARRIED: what was written below may be gone again */
    }
}

void nv_log_spoil(struct nv_log *log, uint64_t number)
{
    struct nv_log_version *version = nv_log_version(log, number);

    if (version->bad)
        return;
    version->bad = true;
    if (version->state == NV_LOG_SETTLED)
        return;
    if (nv_log_newest(log, version->block) == number) {
        log->lost_blocks++;
        log->losses++;
    }
    log->config.event(log->config.context, NV_LOG_LOST, (int64_t)version->block);
}

static void drop_block(struct nv_log *log, struct nv_log_slot *slot)
{
    nv_log_settle(log, slot->number);
    forget(log, slot);
}

void nv_log_drop(struct nv_log *log, uint64_t first, uint64_t blocks)
{
    if (are_few(log, blocks)) {
        for (uint64_t i = 0; i < blocks; i++) {
            struct nv_log_slot *slot = slot_of(log, first + i);
            if (slot->block)
                drop_block(log, slot);
        }
        return;
    }
    for (uint64_t number = log->version_tail; number < log->version_head; number++) {
        const uint64_t block = nv_log_version(log, number)->block;
        struct nv_log_slot *slot = block - first < blocks ? slot_of(log, block) : NULL;
        if (slot && slot->block && slot->number == number)
            drop_block(log, slot);
    }
}

void nv_log_expire(struct nv_log *log, uint64_t marks)
{
    const uint64_t end = marks < log->mark_head ? log->marks[marks & log->mark_mask].first : log->version_head;

    for (uint64_t number = log->version_tail; number < end; number++) {
        const struct nv_log_version *version = nv_log_version(log, number);
        struct nv_log_slot *slot = slot_of(log, version->block);
        assert(version->state == NV_LOG_SETTLED && version->pins == 0);
        if (slot->block && slot->number == number)
            forget(log, slot);
    }
    log->version_tail = end;
    log->mark_tail = marks;
}

void nv_log_empty(struct nv_log *log)
{
    for (uint64_t number = log->version_tail; number < log->version_head; number++) {
        const struct nv_log_version *version = nv_log_version(log, number);
        struct nv_log_slot *slot = slot_of(log, version->block);
        const bool lost = version->bad && version->state != NV_LOG_SETTLED;
        if (slot->block && slot->number == number && !lost)
            drop_block(log, slot);
    }
    log->mark_tail = log->mark_head;
}

/* ---- what is lost ---- */

static int by_number(const void *left, const void *right)
{
    const uint64_t *a = left, *b = right;

    return *a < *b ? -1 : *a > *b;
}

static uint32_t join(const struct nv_log *log, const uint64_t *blocks, uint64_t count, struct nv_log_span *out, uint32_t max)
{
    uint32_t spans = 0;

    for (uint64_t i = 0; i < count; i++) {
        const uint64_t offset = blocks[i] * NV_LOG_UNIT, left = log->config.size - offset;
        const uint64_t length = left < NV_LOG_UNIT ? left : NV_LOG_UNIT;
        if (spans > 0 && out[spans - 1].offset + out[spans - 1].length == offset)
            out[spans - 1].length += length;
        else if (spans < max)
            out[spans++] = (struct nv_log_span){offset, length};
        else
            break;
    }
    return spans;
}

int nv_log_lost(const struct nv_log *log, struct nv_log_span *out, uint32_t max)
{
    uint64_t *blocks, count = 0;
    uint32_t spans;

    if (log->lost_blocks == 0)
        return 0;
    blocks = malloc(log->lost_blocks * sizeof *blocks);
    if (!blocks)
        return -ENOMEM;
    for (uint64_t number = log->version_tail; number < log->version_head; number++) {
        const struct nv_log_version *version = nv_log_version(log, number);
        if (version->bad && version->state != NV_LOG_SETTLED && nv_log_newest(log, version->block) == number)
            blocks[count++] = version->block;
    }
    assert(count == log->lost_blocks);
    qsort(blocks, count, sizeof *blocks, by_number);
    spans = join(log, blocks, count, out, max);
    free(blocks);
    return (int)spans;
}
