/*
 * The farm's inspector (farm.h): looks at the legs' disks from outside, with a reading of the on-disk format of its own
 * where it can, and says whether what may differ is written down where it must be.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim/farm.h"
#include "volume/meta.h"

#define BITMAP_BYTES (2u * NV_META_PAGE)

/* Where on the leg's disk. */
static uint64_t place_of(const struct farm *farm, uint32_t leg, uint64_t offset)
{
    const struct farm_leg *at = &farm->legs[leg];
    uint32_t run = 0;

    while (offset >= at->runs[run].offset + at->runs[run].length)
        run++;
    return at->runs[run].object_offset + (offset - at->runs[run].offset);
}

const uint8_t *farm_place(const struct farm *farm, uint32_t leg, uint64_t offset)
{
    return sim_disk_bytes(nv_sim_disk(farm->legs[leg].file)) + place_of(farm, leg, offset);
}

void farm_write(struct farm *farm, uint32_t leg, uint64_t offset, const void *bytes, size_t size)
{
    sim_disk_write(nv_sim_disk(farm->legs[leg].file), place_of(farm, leg, offset), bytes, size, 0, SIM_WRITE_DURABLE);
}

static const uint8_t *meta(const struct farm *farm, uint32_t leg)
{
    return sim_disk_bytes(nv_sim_disk(farm->legs[leg].file)) + farm->legs[leg].meta_offset;
}

/* What the metadata of one leg says, as far as it was asked for; during one inspection nothing changes. */
static struct reading {
    bool label_read, holds;
    bool intents_read, dirty_read;
    enum nv_page_state intents, dirty;
    const uint8_t *intent_bits, *dirty_masks;
    struct nv_page_head dirty_head;
} readings[FARM_LEGS];

static bool has_intent(const struct farm *farm, uint32_t leg, uint32_t region)
{
    struct reading *at = &readings[leg];
    struct nv_page_head head;

    if (!at->intents_read)
        at->intents = nv_page_open(NV_PAGE_INTENT, farm->uuid, 0, meta(farm, leg) + NV_META_BITMAPS, &head, &at->intent_bits);
    at->intents_read = true;
    switch (at->intents) {
    case NV_PAGE_VALID:
        return at->intent_bits[region / 8] >> region % 8 & 1;
    case NV_PAGE_BLANK:
        return false;
    default:
        nv_sim_violation("leg %u has no whole copy of its intents", FARM_LEG_ID(leg));
    }
}

/* `leg` has it written down that `other` may lack the region. */
static bool has_dirty(const struct farm *farm, uint32_t leg, uint32_t other, uint32_t region)
{
    struct reading *at = &readings[leg];
    const uint8_t *slots = meta(farm, leg) + NV_META_BITMAPS + BITMAP_BYTES;

    if (!at->dirty_read)
        at->dirty = nv_page_open(NV_PAGE_DIRTY, farm->uuid, 0, slots, &at->dirty_head, &at->dirty_masks);
    at->dirty_read = true;
    switch (at->dirty) {
    case NV_PAGE_VALID:
        for (uint32_t i = 0; i < NV_LEGS_MAX; i++)
            if (at->dirty_head.lanes[i] == FARM_LEG_ID(other))
                return at->dirty_masks[region] >> i & 1;
        return true; /* a leg that is not named is dirty everywhere */
    case NV_PAGE_BLANK:
        return true;
    default:
        nv_sim_violation("leg %u has no whole copy of its dirty maps", FARM_LEG_ID(leg));
    }
}

static bool region_differs(const struct farm *farm, uint32_t a, uint32_t b, uint32_t region)
{
    const uint64_t first = (uint64_t)region << farm->region_shift;
    uint64_t end = first + (1ull << farm->region_shift);
    const uint64_t step = farm->cell_bytes;

    end = end < farm->size ? end : farm->size;
    for (uint64_t at = first; at < end; at += step)
        if ((at < farm->zero_from || at >= farm->zero_to) && memcmp(farm_place(farm, a, at), farm_place(farm, b, at), step) != 0)
            return true;
    return false;
}

/* The label says that the leg's bytes are worth what the maps say. */
static bool label_holds(const struct farm *farm, uint32_t leg)
{
    const nv_leg_record *record = &farm->registry.legs[leg];
    struct reading *at = &readings[leg];
    struct nv_label label;

    if (!at->label_read)
        at->holds = nv_label_decode(meta(farm, leg), &label) &&
                    label.leg == FARM_LEG_ID(leg) && label.epoch >= record->stamp_epoch &&
                    label.generation >= record->stamp_generation;
    at->label_read = true;
    return at->holds;
}

static void inspect_pair(const struct farm *farm, uint32_t a, uint32_t b)
{
    const uint32_t regions = (uint32_t)((farm->size - 1) >> farm->region_shift) + 1;
    const bool both = farm_in_sync(farm, b);

    for (uint32_t region = 0; region < regions; region++) {
        if (!region_differs(farm, a, b, region))
            continue;
        if (has_intent(farm, a, region) && (!both || has_intent(farm, b, region)))
            continue;
        if (!both && has_dirty(farm, a, b, region))
            continue;
        nv_sim_violation("region %u differs between leg %u, in sync, and leg %u, %s, and %s does not have it written down",
                         region, FARM_LEG_ID(a), FARM_LEG_ID(b), both ? "in sync too" : "not in sync",
                         has_intent(farm, a, region) ? "the latter" : "the former");
    }
}

void farm_inspect(struct farm *farm)
{
    farm->inspections++;
    memset(readings, 0, sizeof readings);
    for (uint32_t a = 0; a < farm->leg_count; a++) {
        if (!farm_in_sync(farm, a) || !label_holds(farm, a))
            continue;
        for (uint32_t b = 0; b < farm->leg_count; b++)
            if (a != b && label_holds(farm, b))
                inspect_pair(farm, a, b);
    }
}

void farm_expect_equal(struct farm *farm)
{
    const uint32_t regions = (uint32_t)((farm->size - 1) >> farm->region_shift) + 1;

    memset(readings, 0, sizeof readings);
    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        if (!farm_in_sync(farm, leg))
            nv_sim_violation("leg %u is not in sync in the end", FARM_LEG_ID(leg));
        for (uint32_t region = 0; region < regions; region++) {
            if (leg > 0 && region_differs(farm, 0, leg, region))
                nv_sim_violation("legs %u and %u differ in region %u in the end", FARM_LEG_ID(0), FARM_LEG_ID(leg), region);
            if (has_intent(farm, leg, region))
                nv_sim_violation("leg %u still has the intent of region %u after a clean end", FARM_LEG_ID(leg), region);
        }
    }
}

void farm_acknowledged(void *context, uint64_t first, uint64_t count)
{
    struct farm *farm = context;

    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        if (!farm_in_sync(farm, leg) || farm->legs[leg].rebooted || farm->legs[leg].spoiled)
            continue;
        for (uint64_t cell = first; cell < first + count; cell++) {
            const uint64_t at = cell * farm->cell_bytes;
            if ((at >= farm->zero_from && at < farm->zero_to) ||
                check_possible(farm->check, cell, farm_place(farm, leg, at)))
                continue;
            check_explain(farm->check, cell, farm_place(farm, leg, at));
            nv_sim_violation("a change of cell %llu was acknowledged; leg %u, which the registry has in sync, lacks it",
                             (unsigned long long)cell, FARM_LEG_ID(leg));
        }
    }
}
