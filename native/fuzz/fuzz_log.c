/*
 * libFuzzer: arbitrary bytes as a write-back log (log/format.h): superblocks and a ring. Recovery must end, and what it
 * reports must be whole records, one behind the other, inside the ring. The first byte says what is put right first, so
 * that the search gets past the checksums: 1 the superblock's, 2 the heads', 4 the data's.
 */
#include <stdint.h>
#include <string.h>

#include "io/io_sim.h"
#include "log/scan.h"
#include "reactor/crc32c.h"

#define UNITS 64u
#define RING ((uint64_t)UNITS * NV_LOG_UNIT)
#define SPARSE 192u /* bytes of input that one unit takes: more would all be padding */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t image[NV_LOG_RING + RING];

/* The input's bytes, a few to each unit: the fields of heads and superblocks are at their beginning. */
static void lay_out(const uint8_t *data, size_t size)
{
    memset(image, 0, sizeof image);
    for (size_t at = 0, unit = 0; at < size && unit < UNITS + 2; unit++, at += SPARSE) {
        const size_t part = size - at < SPARSE ? size - at : SPARSE;
        memcpy(image + unit * NV_LOG_UNIT, data + at, part);
    }
}

static void repair_super(struct nv_log_super *super)
{
    memset(super, 0, sizeof *super);
    memcpy(super->uuid, image + 16, 16);
    memcpy(super->id, image + 32, 16);
    super->sequence = 1;
    super->ring = RING;
    super->tail = image[80] % UNITS * (uint64_t)NV_LOG_UNIT;
    super->next = image[88];
    nv_log_super_encode(super, image + NV_LOG_UNIT);
}

static void repair_data(uint8_t *unit, const struct nv_log_head *head, uint64_t at)
{
    uint64_t offset = at % RING + NV_LOG_UNIT;

    for (uint32_t i = 0; i < head->entries && i < NV_LOG_ENTRIES; i++) {
        struct nv_log_entry entry;
        nv_log_entry_decode(unit, i, &entry);
        entry.kind = 1 + entry.kind % 3;
        if (entry.kind == NV_LOG_DATA && offset < RING) {
            entry.blocks = 1;
            entry.crc = nv_crc32c(0, image + NV_LOG_RING + offset, NV_LOG_UNIT);
            offset += NV_LOG_UNIT;
        }
        if (entry.kind == NV_LOG_ZERO)
            entry.blocks &= 0xff;
        nv_log_entry_encode(unit, i, &entry);
    }
}

static void repair_heads(const struct nv_log_super *super, bool data_too)
{
    uint64_t at = super->tail, next = super->next;
    uint32_t chain = super->chain;

    for (unsigned i = 0; i < UNITS; i++) {
        uint8_t *unit = image + NV_LOG_RING + at % RING;
        struct nv_log_head head = {.sequence = next++, .chain = chain, .epoch = unit[48] % 4};
        memcpy(head.id, super->id, 16);
        memcpy(&head.entries, unit + 36, 4);
        memcpy(&head.units, unit + 40, 4);
        head.kind = 1 + unit[44] % 3;
        if (data_too && head.kind == NV_LOG_WRITES)
            repair_data(unit, &head, at);
        nv_log_head_encode(&head, unit);
        chain = head.seal;
        at += (head.units % NV_LOG_RECORD_UNITS + !head.units) * (uint64_t)NV_LOG_UNIT;
    }
}

static void judge(const struct nv_log_scan *scan, uint64_t *end, uint64_t *next)
{
    if (scan->at != *end || scan->head.sequence != *next || scan->position <= scan->at)
        nv_sim_violation("record %llu does not continue the last one", (unsigned long long)scan->head.sequence);
    if (scan->at % RING + (scan->position - scan->at) > RING || scan->position - scan->begin > RING)
        nv_sim_violation("record %llu leaves the ring", (unsigned long long)scan->head.sequence);
    if (scan->head.epoch > scan->epoch_max)
        nv_sim_violation("record %llu is of a later epoch", (unsigned long long)scan->head.sequence);
    if (scan->head.kind == NV_LOG_WRITES && !nv_log_data_valid(scan->unit, &scan->head, image + NV_LOG_RING + scan->at % RING + NV_LOG_UNIT))
        nv_sim_violation("record %llu has damaged data", (unsigned long long)scan->head.sequence);
    *end = scan->position;
    *next = scan->head.sequence + 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct nv_log_super super = {.sequence = 0};
    struct nv_log_claim claim = {.epoch = 2, .generation = 2, .length = sizeof image};
    static struct nv_log_scan scan;
    uint64_t offset, length, end, next;

    if (size < 1)
        return 0;
    lay_out(data + 1, size - 1);
    if (data[0] & 1)
        repair_super(&super);
    if (nv_log_super_decode(image, &super) != NV_LOG_SUPER_VALID)
        return 0;
    memcpy(claim.uuid, super.uuid, 16);
    if (nv_log_judge(NV_LOG_SUPER_VALID, &super, &claim) != NV_LOG_USABLE)
        return 0;
    if ((data[0] & 2) && super.ring == RING)
        repair_heads(&super, data[0] & 4);
    nv_log_scan_begin(&scan, &super, claim.epoch);
    end = scan.position;
    next = scan.next;
    while (nv_log_scan_wants(&scan, &offset, &length)) {
        if (offset + length > RING || length == 0)
            nv_sim_violation("%llu bytes at %llu are asked for", (unsigned long long)length, (unsigned long long)offset);
        if (nv_log_scan_take(&scan, image + NV_LOG_RING + offset) == NV_LOG_SCAN_RECORD)
            judge(&scan, &end, &next);
    }
    if (scan.position != end || scan.next != next)
        nv_sim_violation("the end is not behind the last record");
    return 0;
}
