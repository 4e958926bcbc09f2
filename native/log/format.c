/*
 * See format.h. Nothing here trusts a byte: every count and every kind is checked before it is used.
 */
#include "log/format.h"

#include <assert.h>
#include <string.h>

#include "reactor/crc32c.h"
#include "reactor/little.h"

#define VERSION 1u
#define SUPER_SEAL 124u
#define SUPER_ZEROS 128u
#define HEAD_SEAL 60u
#define HEAD_RANDOM 64u
#define HEAD_ENTRIES 80u
#define ENTRY_BYTES 24u

_Static_assert(HEAD_ENTRIES + NV_LOG_ENTRIES * ENTRY_BYTES <= NV_LOG_UNIT, "a head is one unit");
_Static_assert(NV_LOG_DATA_UNITS <= NV_LOG_ENTRIES, "each unit of data has an entry");

static const char super_magic[8] = "NVWBLOG";
static const char head_magic[8] = "NVWBREC";

static bool all_zero(const uint8_t *bytes, uint64_t length)
{
    for (uint64_t i = 0; i < length; i++)
        if (bytes[i])
            return false;
    return true;
}

/* ---- superblock ---- */

static uint32_t super_crc(const uint8_t *copy)
{
    return nv_crc32c(nv_crc32c(0, copy, SUPER_SEAL), copy + SUPER_ZEROS, NV_LOG_UNIT - SUPER_ZEROS);
}

void nv_log_super_encode(const struct nv_log_super *super, uint8_t *copy)
{
    memset(copy, 0, NV_LOG_UNIT);
    memcpy(copy, super_magic, 8);
    nv_put32(copy + 8, VERSION);
    memcpy(copy + 16, super->uuid, 16);
    memcpy(copy + 32, super->id, 16);
    nv_put64(nv_put64(nv_put64(copy + 48, super->sequence), super->epoch), super->generation);
    nv_put64(nv_put64(nv_put64(copy + 72, super->ring), super->tail), super->next);
    nv_put32(copy + 96, super->chain);
    nv_put32(copy + SUPER_SEAL, super_crc(copy));
}

static enum nv_log_super_state decode_copy(const uint8_t *copy, struct nv_log_super *out)
{
    if (all_zero(copy, NV_LOG_UNIT))
        return NV_LOG_SUPER_BLANK;
    if (memcmp(copy, super_magic, 8) != 0 || nv_get32(copy + SUPER_SEAL) != super_crc(copy))
        return NV_LOG_SUPER_FOREIGN;
    if (nv_get32(copy + 8) != VERSION)
        return NV_LOG_SUPER_VERSION;
    *out = (struct nv_log_super){.sequence = nv_get64(copy + 48), .epoch = nv_get64(copy + 56),
                                 .generation = nv_get64(copy + 64), .ring = nv_get64(copy + 72),
                                 .tail = nv_get64(copy + 80), .next = nv_get64(copy + 88),
                                 .chain = nv_get32(copy + 96)};
    memcpy(out->uuid, copy + 16, 16);
    memcpy(out->id, copy + 32, 16);
    if (out->ring % NV_LOG_UNIT || out->ring < NV_LOG_RING_MIN || out->ring > NV_LOG_RING_MAX || out->tail >= out->ring ||
        out->tail % NV_LOG_UNIT || out->sequence == 0)
        return NV_LOG_SUPER_FOREIGN;
    return NV_LOG_SUPER_VALID;
}

enum nv_log_super_state nv_log_super_decode(const uint8_t *copies, struct nv_log_super *out)
{
    struct nv_log_super both[2];
    const enum nv_log_super_state first = decode_copy(copies, &both[0]);
    const enum nv_log_super_state second = decode_copy(copies + NV_LOG_UNIT, &both[1]);

    if (first == NV_LOG_SUPER_VERSION || second == NV_LOG_SUPER_VERSION)
        return NV_LOG_SUPER_VERSION;
    if (first != NV_LOG_SUPER_VALID && second != NV_LOG_SUPER_VALID)
        return first == NV_LOG_SUPER_BLANK && second == NV_LOG_SUPER_BLANK ? NV_LOG_SUPER_BLANK : NV_LOG_SUPER_FOREIGN;
    if (first == NV_LOG_SUPER_VALID && second == NV_LOG_SUPER_VALID)
        *out = both[both[1].sequence > both[0].sequence];
    else
        *out = both[second == NV_LOG_SUPER_VALID];
    return NV_LOG_SUPER_VALID;
}

/* ---- records ---- */

void nv_log_entry_encode(uint8_t *unit, uint32_t index, const struct nv_log_entry *entry)
{
    uint8_t *to = unit + HEAD_ENTRIES + index * ENTRY_BYTES;
    const bool tombstone = entry->kind == NV_LOG_TOMBSTONE;

    assert(index < NV_LOG_ENTRIES && (tombstone || entry->blocks <= UINT32_MAX));
    to = nv_put32(nv_put64(to, entry->block), (uint32_t)entry->blocks);
    nv_put32(nv_put32(nv_put32(to, entry->kind), tombstone ? (uint32_t)(entry->blocks >> 32) : entry->crc), 0);
}

void nv_log_entry_decode(const uint8_t *unit, uint32_t index, struct nv_log_entry *out)
{
    const uint8_t *from = unit + HEAD_ENTRIES + index * ENTRY_BYTES;

    assert(index < NV_LOG_ENTRIES);
    *out = (struct nv_log_entry){.block = nv_get64(from), .blocks = nv_get32(from + 8), .kind = nv_get32(from + 12)};
    if (out->kind == NV_LOG_TOMBSTONE)
        out->blocks |= (uint64_t)nv_get32(from + 16) << 32;
    else
        out->crc = nv_get32(from + 16);
}

static uint32_t head_crc(const uint8_t *unit)
{
    return nv_crc32c(nv_crc32c(0, unit, HEAD_SEAL), unit + HEAD_RANDOM, NV_LOG_UNIT - HEAD_RANDOM);
}

void nv_log_head_encode(struct nv_log_head *head, uint8_t *unit)
{
    memcpy(unit, head_magic, 8);
    memcpy(unit + 8, head->id, 16);
    nv_put32(nv_put64(unit + 24, head->sequence), head->chain);
    nv_put32(nv_put32(nv_put32(unit + 36, head->entries), head->units), head->kind);
    nv_put32(nv_put64(unit + 48, head->epoch), 0);
    memcpy(unit + HEAD_RANDOM, head->random, 16);
    head->seal = head_crc(unit);
    nv_put32(unit + HEAD_SEAL, head->seal);
}

static bool entries_valid(const uint8_t *unit, const struct nv_log_head *head)
{
    uint32_t data = 0;

    for (uint32_t i = 0; i < head->entries; i++) {
        struct nv_log_entry entry;
        nv_log_entry_decode(unit, i, &entry);
        if (entry.blocks == 0 || entry.block + entry.blocks < entry.block)
            return false;
        if (entry.kind == NV_LOG_DATA ? entry.blocks != 1
                                      : entry.kind == NV_LOG_ZERO ? entry.blocks > NV_LOG_ZERO_BLOCKS
                                                                  : entry.kind != NV_LOG_TOMBSTONE)
            return false;
        data += entry.kind == NV_LOG_DATA;
    }
    return head->units == 1 + data && data <= NV_LOG_DATA_UNITS;
}

bool nv_log_head_decode(const uint8_t *unit, struct nv_log_head *out)
{
    if (memcmp(unit, head_magic, 8) != 0 || nv_get32(unit + HEAD_SEAL) != head_crc(unit))
        return false;
    *out = (struct nv_log_head){.sequence = nv_get64(unit + 24), .chain = nv_get32(unit + 32),
                                .entries = nv_get32(unit + 36), .units = nv_get32(unit + 40),
                                .kind = nv_get32(unit + 44), .epoch = nv_get64(unit + 48),
                                .seal = nv_get32(unit + HEAD_SEAL)};
    memcpy(out->id, unit + 8, 16);
    memcpy(out->random, unit + HEAD_RANDOM, 16);
    switch (out->kind) {
    case NV_LOG_WRITES:
        return out->entries > 0 && out->entries <= NV_LOG_ENTRIES && entries_valid(unit, out);
    case NV_LOG_BEGIN:
        return out->entries == 0 && out->units == 1;
    case NV_LOG_PAD:
        return out->entries == 0 && out->units > 0 && out->units < NV_LOG_RECORD_UNITS;
    default:
        return false;
    }
}

bool nv_log_head_follows(const struct nv_log_head *head, const uint8_t *id, uint64_t next, uint32_t chain)
{
    return memcmp(head->id, id, 16) == 0 && head->sequence == next && head->chain == chain;
}

bool nv_log_data_valid(const uint8_t *unit, const struct nv_log_head *head, const uint8_t *data)
{
    for (uint32_t i = 0; i < head->entries; i++) {
        struct nv_log_entry entry;
        nv_log_entry_decode(unit, i, &entry);
        if (entry.kind != NV_LOG_DATA)
            continue;
        if (nv_crc32c(0, data, NV_LOG_UNIT) != entry.crc)
            return false;
        data += NV_LOG_UNIT;
    }
    return true;
}
