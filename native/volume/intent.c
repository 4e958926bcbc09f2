/*
 * See intent.h. Invariants: a region with requests in flight is SETTING or SET; a region becomes SET only when a page
 * that says so is durable on every live leg; what a page on disk says of a region is at least what memory says of one
 * that is SET. On the dirty side: a bit in memory may be missing on disk only while the region's intent bit is set there.
 */
#include "volume/intent.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "volume/meta.h"
#include "volume/mirror_state.h"

static uint32_t last_region(const struct nv_intent *intent, uint64_t offset, uint64_t length)
{
    assert(length > 0);
    return nv_region_of(intent, offset + length - 1);
}

int nv_intent_create(struct nv_intent *intent, uint64_t size, uint32_t shift)
{
    const uint32_t regions = (uint32_t)((size - 1) >> shift) + 1;

    *intent = (struct nv_intent){.regions = regions, .shift = shift};
    intent->page_count = (regions + NV_INTENTS_A_PAGE - 1) / NV_INTENTS_A_PAGE;
    intent->dirty_page_count = (regions + NV_DIRTY_A_PAGE - 1) / NV_DIRTY_A_PAGE;
    intent->state = calloc(regions, sizeof *intent->state);
    intent->in_flight = calloc(regions, sizeof *intent->in_flight);
    intent->dirty = calloc(regions, sizeof *intent->dirty);
    intent->copied = calloc(regions, sizeof *intent->copied);
    intent->pages = calloc(intent->page_count, sizeof *intent->pages);
    intent->dirty_sequence = calloc(intent->dirty_page_count, sizeof *intent->dirty_sequence);
    intent->dirty_unsaved = calloc(intent->dirty_page_count, sizeof *intent->dirty_unsaved);
    intent->waiting_tail = &intent->waiting;
    if (intent->state && intent->in_flight && intent->dirty && intent->copied && intent->pages &&
        intent->dirty_sequence && intent->dirty_unsaved)
        return 0;
    nv_intent_free(intent);
    return -ENOMEM;
}

void nv_intent_free(struct nv_intent *intent)
{
    free(intent->state);
    free(intent->in_flight);
    free(intent->dirty);
    free(intent->copied);
    free(intent->pages);
    free(intent->dirty_sequence);
    free(intent->dirty_unsaved);
}

void nv_intent_reset(struct nv_intent *intent)
{
    assert(!intent->waiting && intent->writes_out == 0);
    memset(intent->state, NV_REGION_CLEAN, intent->regions);
    memset(intent->dirty, 0, intent->regions);
    memset(intent->copied, 0, intent->regions);
    memset(intent->dirty_unsaved, 0, intent->dirty_page_count * sizeof *intent->dirty_unsaved);
    intent->set_count = intent->doubtful_count = intent->rewrite_count = 0;
}

void nv_intent_set_state(struct nv_intent *intent, uint32_t region, enum nv_region_state state)
{
    const enum nv_region_state old = nv_region_state(intent, region);

    assert(region < intent->regions);
    intent->set_count += (state != NV_REGION_CLEAN) - (uint32_t)(old != NV_REGION_CLEAN);
    intent->state[region] = (uint8_t)((intent->state[region] & ~NV_REGION_STATE) | state);
}

static void want_page(struct nv_intent *intent, uint32_t region)
{
    intent->pages[region / NV_INTENTS_A_PAGE].wanted = true;
}

/* The slow path: true if the region may be written to at once after all. */
static bool begin_setting(struct nv_intent *intent, uint32_t region)
{
    switch (nv_region_state(intent, region)) {
    case NV_REGION_SET:
        return true;
    case NV_REGION_CLEANING:
        nv_intent_set_state(intent, region, NV_REGION_SET);
        return true;
    case NV_REGION_CLEAN:
    case NV_REGION_CLEARING:
        nv_intent_set_state(intent, region, NV_REGION_SETTING);
        want_page(intent, region);
        return false;
    default:
        return false;
    }
}

bool nv_intent_enter(struct nv_mirror *mirror, uint64_t offset, uint64_t length)
{
    struct nv_intent *intent = &mirror->intent;
    const uint32_t last = last_region(intent, offset, length);
    bool ready = true;

    for (uint32_t region = nv_region_of(intent, offset); region <= last; region++) {
        intent->in_flight[region]++;
        assert(intent->in_flight[region] > 0);
        if ((intent->state[region] & NV_REGION_STATE) != NV_REGION_SET)
            ready &= begin_setting(intent, region);
        intent->state[region] |= NV_REGION_TOUCHED;
    }
    return ready;
}

void nv_intent_leave(struct nv_mirror *mirror, uint64_t offset, uint64_t length)
{
    struct nv_intent *intent = &mirror->intent;
    const uint32_t last = last_region(intent, offset, length);

    for (uint32_t region = nv_region_of(intent, offset); region <= last; region++) {
        assert(intent->in_flight[region] > 0);
        intent->in_flight[region]--;
    }
}

void nv_intent_wait(struct nv_mirror *mirror, struct nv_mio *mio)
{
    mio->next = NULL;
    *mirror->intent.waiting_tail = mio;
    mirror->intent.waiting_tail = &mio->next;
}

static void set_dirty(struct nv_intent *intent, uint32_t region, uint8_t lanes)
{
    intent->copied[region] &= (uint8_t)~lanes;
    if ((intent->dirty[region] & lanes) == lanes)
        return;
    intent->dirty[region] |= lanes;
    intent->dirty_unsaved[region / NV_DIRTY_A_PAGE] = true;
}

void nv_intent_dirty(struct nv_mirror *mirror, uint64_t offset, uint64_t length, uint8_t lanes)
{
    struct nv_intent *intent = &mirror->intent;
    const uint32_t first = nv_region_of(intent, offset), last = last_region(intent, offset, length);

    for (uint32_t region = first; region <= last; region++)
        set_dirty(intent, region, lanes);
    nv_copier_missed(mirror, first, last, lanes);
}

void nv_intent_lost(struct nv_mirror *mirror, uint8_t lanes)
{
    struct nv_intent *intent = &mirror->intent;

    for (uint32_t region = 0; region < intent->regions; region++) {
        intent->copied[region] &= (uint8_t)~lanes;
        if (nv_region_state(intent, region) != NV_REGION_CLEAN)
            set_dirty(intent, region, lanes);
    }
    nv_copier_missed(mirror, 0, intent->regions - 1, lanes);
}

void nv_intent_suspect(struct nv_intent *intent, uint64_t offset, uint64_t length)
{
    const uint32_t last = last_region(intent, offset, length);

    for (uint32_t region = nv_region_of(intent, offset); region <= last; region++) {
        if (nv_region_state(intent, region) == NV_REGION_CLEAN || (intent->state[region] & NV_REGION_REWRITE))
            continue;
        intent->state[region] |= NV_REGION_REWRITE;
        intent->rewrite_count++;
    }
}

void nv_intent_dirty_all(struct nv_mirror *mirror, uint8_t lanes)
{
    for (uint32_t region = 0; region < mirror->intent.regions; region++)
        set_dirty(&mirror->intent, region, lanes);
}

void nv_intent_forget(struct nv_mirror *mirror, uint8_t lanes)
{
    struct nv_intent *intent = &mirror->intent;

    for (uint32_t region = 0; region < intent->regions; region++) {
        intent->copied[region] &= (uint8_t)~lanes;
        if (!(intent->dirty[region] & lanes))
            continue;
        intent->dirty[region] &= (uint8_t)~lanes;
        intent->dirty_unsaved[region / NV_DIRTY_A_PAGE] = true;
    }
}

/* --- intent pages --- */

static struct nv_page_head page_head(const struct nv_mirror *mirror, uint32_t number, uint64_t sequence)
{
    struct nv_page_head head = {.number = number, .region_shift = mirror->intent.shift, .sequence = sequence,
                                .epoch = mirror->epoch, .generation = mirror->generation};

    memcpy(head.uuid, mirror->uuid, sizeof head.uuid);
    return head;
}

static uint32_t regions_of_page(uint32_t regions, uint32_t a_page, uint32_t page)
{
    const uint32_t first = page * a_page;

    return regions - first < a_page ? regions - first : a_page;
}

static void build_intents(struct nv_mirror *mirror, uint32_t page, uint8_t *slot)
{
    const struct nv_intent *intent = &mirror->intent;
    const uint32_t first = page * NV_INTENTS_A_PAGE, count = regions_of_page(intent->regions, NV_INTENTS_A_PAGE, page);
    struct nv_page_head head = page_head(mirror, page, intent->pages[page].sequence + 1);

    memset(slot, 0, NV_META_PAGE);
    for (uint32_t i = 0; i < count; i++) {
        enum nv_region_state state = nv_region_state(intent, first + i);
        if (state != NV_REGION_CLEAN && state != NV_REGION_CLEARING)
            slot[NV_PAGE_HEAD + i / 8] |= (uint8_t)(1u << i % 8);
    }
    nv_page_seal(NV_PAGE_INTENT, &head, slot);
}

static bool bit_of(const uint8_t *bits, uint32_t index)
{
    return bits[index / 8] >> index % 8 & 1;
}

/* The page is on every live leg: what it says holds. */
static void page_is_durable(struct nv_intent *intent, uint32_t page, const uint8_t *bits)
{
    const uint32_t first = page * NV_INTENTS_A_PAGE, count = regions_of_page(intent->regions, NV_INTENTS_A_PAGE, page);

    intent->pages[page].sequence++;
    for (uint32_t i = 0; i < count; i++) {
        enum nv_region_state state = nv_region_state(intent, first + i);
        if (state == NV_REGION_SETTING && bit_of(bits, i))
            nv_intent_set_state(intent, first + i, NV_REGION_SET);
        else if (state == NV_REGION_CLEARING && !bit_of(bits, i))
            nv_intent_set_state(intent, first + i, NV_REGION_CLEAN);
    }
}

/* No in-sync leg has taken it: nobody may count on it, and the next try writes the same slot. */
static void page_failed(struct nv_intent *intent, uint32_t page)
{
    const uint32_t first = page * NV_INTENTS_A_PAGE, count = regions_of_page(intent->regions, NV_INTENTS_A_PAGE, page);

    for (uint32_t i = 0; i < count; i++) {
        enum nv_region_state state = nv_region_state(intent, first + i);
        if (state == NV_REGION_SETTING)
            nv_intent_set_state(intent, first + i, NV_REGION_CLEAN);
        else if (state == NV_REGION_CLEARING) /* equal everywhere, whatever the bit is: the next page says 0 again */
            nv_intent_set_state(intent, first + i, NV_REGION_CLEAN);
    }
}

static enum nv_region_state worst_state(const struct nv_intent *intent, const struct nv_mio *mio)
{
    const uint32_t last = last_region(intent, mio->offset, mio->length);
    enum nv_region_state worst = NV_REGION_SET;

    for (uint32_t region = nv_region_of(intent, mio->offset); region <= last; region++) {
        enum nv_region_state state = nv_region_state(intent, region);
        if (state == NV_REGION_CLEAN)
            return state;
        if (state != NV_REGION_SET)
            worst = state;
    }
    return worst;
}

/* Requests whose regions are all SET go on; those with one that could not be set fail. */
static void wake_waiting(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;
    struct nv_mio *list = intent->waiting;

    intent->waiting = NULL;
    intent->waiting_tail = &intent->waiting;
    for (struct nv_mio *mio = list, *next; mio; mio = next) {
        enum nv_region_state worst = worst_state(intent, mio);
        next = mio->next;
        if (worst == NV_REGION_SET)
            nv_mirror_intent_ready(mio, 0);
        else if (worst == NV_REGION_CLEAN)
            nv_mirror_intent_ready(mio, -EIO);
        else
            nv_intent_wait(mirror, mio);
    }
}

static void page_landed(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_intent *intent = &mirror->intent;
    const uint32_t page = mio->number;
    const uint8_t did = nv_mirror_judge(mio);

    assert(intent->pages[page].writing && intent->writes_out > 0);
    intent->pages[page].writing = intent->pages[page].forcing = false;
    intent->writes_out--;
    if (did & mirror->in_sync)
        page_is_durable(intent, page, mio->memory + NV_PAGE_HEAD);
    else
        page_failed(intent, page);
    nv_mio_end(mio);
    wake_waiting(mirror);
    nv_intent_commit(mirror);
}

static void write_page(struct nv_mirror *mirror, uint32_t page)
{
    struct nv_intent_page *at = &mirror->intent.pages[page];
    const uint64_t slot = 2ull * page + ((at->sequence + 1) & 1);
    struct nv_mio *mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);
    uint8_t *memory = nv_mio_memory(mio, NV_MIO_PAGES);

    assert(!at->writing && nv_lanes_live(mirror));
    at->forcing = at->forced;
    at->wanted = at->forced = false;
    at->writing = true;
    mirror->intent.writes_out++;
    mio->number = page;
    build_intents(mirror, page, memory);
    nv_mio_round(mio, page_landed);
    NV_EACH_LANE(lane, nv_lanes_live(mirror))
        nv_mio_meta(mio, lane, NV_PIECE_WRITE, NV_META_BITMAPS + slot * NV_META_PAGE, NV_META_PAGE, memory);
    nv_mio_go(mio);
}

void nv_intent_commit(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    for (uint32_t page = 0; page < intent->page_count; page++)
        if (intent->pages[page].wanted && !intent->pages[page].writing)
            write_page(mirror, page);
}

void nv_intent_force(struct nv_mirror *mirror)
{
    for (uint32_t page = 0; page < mirror->intent.page_count; page++)
        mirror->intent.pages[page].wanted = mirror->intent.pages[page].forced = true;
    nv_intent_commit(mirror);
}

bool nv_intent_forced(const struct nv_mirror *mirror)
{
    for (uint32_t page = 0; page < mirror->intent.page_count; page++)
        if (mirror->intent.pages[page].forced || mirror->intent.pages[page].forcing)
            return false;
    return true;
}

/* --- what pages on disk say --- */

/* Merge set bits: an intent becomes SET, or dirty for the lane whose own intent it is. */
static void merge_intents(struct nv_intent *intent, uint32_t first, uint32_t count, const uint8_t *bits, uint8_t own)
{
    for (uint32_t i = 0; i < count; i++) {
        if (bits && !bit_of(bits, i))
            continue;
        if (own)
            set_dirty(intent, first + i, own);
        else
            nv_intent_set_state(intent, first + i, NV_REGION_SET);
    }
}

void nv_intent_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable, uint8_t own)
{
    struct nv_intent *intent = &mirror->intent;
    const uint32_t first = page * NV_INTENTS_A_PAGE, count = regions_of_page(intent->regions, NV_INTENTS_A_PAGE, page);
    enum nv_page_state state = NV_PAGE_DAMAGED;
    struct nv_page_head head;
    const uint8_t *bits;

    if (readable)
        state = nv_page_open(NV_PAGE_INTENT, mirror->uuid, page, slots, &head, &bits);
    if (state == NV_PAGE_DAMAGED)
        merge_intents(intent, first, count, NULL, own);
    if (state != NV_PAGE_VALID)
        return;
    if (head.sequence > intent->pages[page].sequence)
        intent->pages[page].sequence = head.sequence;
    if (head.region_shift != intent->shift)
        merge_intents(intent, 0, intent->regions, NULL, own); /* its bits mean other places, other pages may be blank */
    else
        merge_intents(intent, first, count, bits, own);
}

/* Lane bits of the page's own table, as our lanes. */
static uint8_t translate(const struct nv_mirror *mirror, const struct nv_page_head *head, uint8_t theirs)
{
    uint8_t ours = 0;

    for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++)
        for (uint32_t i = 0; i < NV_LEGS_MAX; i++)
            if ((theirs >> i & 1) && head->lanes[i] && head->lanes[i] == mirror->lanes[lane].id)
                ours |= nv_lane_bit(lane);
    return ours;
}

uint8_t nv_dirty_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable)
{
    struct nv_intent *intent = &mirror->intent;
    const uint32_t first = page * NV_DIRTY_A_PAGE, count = regions_of_page(intent->regions, NV_DIRTY_A_PAGE, page);
    struct nv_page_head head;
    const uint8_t *masks;

    if (!readable || nv_page_open(NV_PAGE_DIRTY, mirror->uuid, page, slots, &head, &masks) != NV_PAGE_VALID)
        return 0;
    if (head.sequence > intent->dirty_sequence[page])
        intent->dirty_sequence[page] = head.sequence;
    if (head.region_shift != intent->shift)
        return 0;
    for (uint32_t i = 0; i < count; i++)
        if (masks[i])
            set_dirty(intent, first + i, translate(mirror, &head, masks[i]));
    return translate(mirror, &head, 0xff);
}

void nv_dirty_build(struct nv_mirror *mirror, uint32_t page, uint8_t *slot)
{
    const struct nv_intent *intent = &mirror->intent;
    const uint32_t first = page * NV_DIRTY_A_PAGE, count = regions_of_page(intent->regions, NV_DIRTY_A_PAGE, page);
    struct nv_page_head head = page_head(mirror, page, intent->dirty_sequence[page] + 1);

    for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++)
        head.lanes[lane] = mirror->lanes[lane].id;
    memset(slot, 0, NV_META_PAGE);
    memcpy(slot + NV_PAGE_HEAD, intent->dirty + first, count);
    nv_page_seal(NV_PAGE_DIRTY, &head, slot);
}
