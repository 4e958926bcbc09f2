/*
 * See scan.h.
 */
#include "log/scan.h"

#include <assert.h>
#include <string.h>

enum nv_log_verdict nv_log_judge(enum nv_log_super_state state, const struct nv_log_super *super,
                                 const struct nv_log_claim *claim)
{
    if (state == NV_LOG_SUPER_VERSION)
        return NV_LOG_UNKNOWN_VERSION;
    if (state != NV_LOG_SUPER_VALID) {
        if (claim->dirty)
            return NV_LOG_MISSING;
        return state == NV_LOG_SUPER_BLANK ? NV_LOG_FORMAT : NV_LOG_FOREIGN;
    }
    if (memcmp(super->uuid, claim->uuid, 16) != 0)
        return NV_LOG_OTHER_VVOL;
    if (claim->dirty && memcmp(super->id, claim->id, 16) != 0)
        return NV_LOG_OTHER_LOG;
    if (super->epoch > claim->epoch || super->generation > claim->generation)
        return NV_LOG_REGISTRY_OLD;
    if (claim->length < NV_LOG_RING || super->ring > claim->length - NV_LOG_RING)
        return NV_LOG_CUT;
    return NV_LOG_USABLE;
}

const char *nv_log_verdict_name(enum nv_log_verdict verdict)
{
    static const char *const names[] = {
        [NV_LOG_USABLE] = "usable",
        [NV_LOG_FORMAT] = "blank",
        [NV_LOG_MISSING] = "missing",
        [NV_LOG_FOREIGN] = "foreign",
        [NV_LOG_UNKNOWN_VERSION] = "unknown-version",
        [NV_LOG_OTHER_VVOL] = "other-vvol",
        [NV_LOG_OTHER_LOG] = "other-log",
        [NV_LOG_UNKNOWN_DATA] = "unknown-data",
        [NV_LOG_REGISTRY_OLD] = "registry-old",
        [NV_LOG_CUT] = "cut",
        [NV_LOG_TOO_MANY] = "too-many",
        [NV_LOG_UNREADABLE] = "unreadable",
        [NV_LOG_HANGS] = "hangs",
    };

    return names[verdict];
}

void nv_log_scan_begin(struct nv_log_scan *scan, const struct nv_log_super *super, uint64_t epoch_max)
{
    memset(scan, 0, sizeof *scan);
    memcpy(scan->id, super->id, 16);
    scan->epoch_max = epoch_max;
    scan->ring = super->ring;
    scan->begin = scan->position = super->tail;
    scan->next = super->next;
    scan->chain = super->chain;
}

bool nv_log_scan_wants(const struct nv_log_scan *scan, uint64_t *offset, uint64_t *length)
{
    const uint64_t at = scan->position % scan->ring;

    if (scan->over)
        return false;
    *offset = scan->has_head ? at + NV_LOG_UNIT : at;
    *length = scan->has_head ? (scan->head.units - 1) * (uint64_t)NV_LOG_UNIT : NV_LOG_UNIT;
    assert(*length > 0 && *offset + *length <= scan->ring);
    return true;
}

static enum nv_log_scan_result end(struct nv_log_scan *scan)
{
    scan->over = true;
    return NV_LOG_SCAN_END;
}

/* The record whose head is in `unit` is valid. */
static enum nv_log_scan_result accept(struct nv_log_scan *scan)
{
    scan->at = scan->position;
    scan->position += scan->head.units * (uint64_t)NV_LOG_UNIT;
    scan->next++;
    scan->chain = scan->head.seal;
    scan->has_head = false;
    scan->over = scan->position - scan->begin == scan->ring;
    return NV_LOG_SCAN_RECORD;
}

static bool fits(const struct nv_log_scan *scan)
{
    const uint64_t bytes = scan->head.units * (uint64_t)NV_LOG_UNIT, at = scan->position % scan->ring;

    if (at + bytes > scan->ring || scan->position - scan->begin + bytes > scan->ring)
        return false;
    return scan->head.kind != NV_LOG_PAD || at + bytes == scan->ring;
}

enum nv_log_scan_result nv_log_scan_take(struct nv_log_scan *scan, const uint8_t *bytes)
{
    assert(!scan->over);
    if (scan->has_head)
        return nv_log_data_valid(scan->unit, &scan->head, bytes) ? accept(scan) : end(scan);
    memcpy(scan->unit, bytes, NV_LOG_UNIT);
    if (!nv_log_head_decode(scan->unit, &scan->head) ||
        !nv_log_head_follows(&scan->head, scan->id, scan->next, scan->chain) || !fits(scan))
        return end(scan);
    if (scan->head.epoch > scan->epoch_max) { /* a record of this log, written under a binding that we know nothing of */
        scan->newer = true;
        return end(scan);
    }
    if (scan->head.kind != NV_LOG_WRITES || scan->head.units == 1)
        return accept(scan);
    scan->has_head = true;
    return NV_LOG_SCAN_MORE;
}
