/*
 * See desc.h. Checked in this order: the header, the legs, the mirror, then each run of each leg. Invariants of a
 * compiled map: the runs of each leg that is not absent are sorted, gapless and cover [0, size); each mapped run lies
 * inside its object at the object's alignment; the legs of a mirror have the same states at the same places.
 */
#include "volume/desc.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "limits.h"
#include "nbdvvol.h"
#include "error.h"

_Static_assert(sizeof(nv_desc_header) == 112, "the description's header is 112 bytes");
_Static_assert(sizeof(nv_desc_leg) == 16, "a leg is 16 bytes");
_Static_assert(sizeof(nv_desc_run) == 32, "a run is 32 bytes");
_Static_assert(sizeof(nv_desc_mirror) == 32, "a mirror's policy is 32 bytes");
_Static_assert(sizeof(nv_desc_meta) == 24, "the place of a leg's metadata is 24 bytes");

struct reader {
    const uint8_t *record;
    nv_desc_header header;
    bool mirrored;
    nv_desc_leg legs[NV_LEGS_MAX];
    nv_desc_mirror mirror;
    nv_desc_meta metas[NV_LEGS_MAX];
    uint64_t run_count;     /* of all legs */
    nv_object_lookup *lookup;
    void *context;
};

static int read_header(struct reader *in, uint64_t length)
{
    nv_desc_header *header = &in->header;

    if (length < sizeof *header)
        return nv_fail(EINVAL, "volume description of %" PRIu64 " bytes is shorter than its header of %zu", length,
                       sizeof *header);
    memcpy(header, in->record, sizeof *header);
    if (header->magic != NV_DESC_MAGIC)
        return nv_fail(EINVAL, "volume description starts with 0x%08x, not 0x%08x", header->magic, NV_DESC_MAGIC);
    if (header->version != NV_DESC_VERSION)
        return nv_fail(EINVAL, "volume description has version %u, this data plane reads %u", header->version,
                       NV_DESC_VERSION);
    if (header->length != length)
        return nv_fail(EINVAL, "volume description says %" PRIu64 " bytes and has %" PRIu64, header->length, length);
    if (header->flags & ~(uint32_t)(NV_VOLUME_READ_ONLY | NV_VOLUME_ROTATIONAL | NV_VOLUME_MIRROR))
        return nv_fail(EINVAL, "volume description has unknown flags 0x%x", header->flags);
    if (header->size > NV_SIZE_MAX)
        return nv_fail(E2BIG, "volume size %" PRIu64 " is above %llu", header->size, NV_SIZE_MAX);
    if (header->block_min == 0 || header->block_min > NV_BLOCK_MIN_MAX || (header->block_min & (header->block_min - 1)))
        return nv_fail(EINVAL, "minimum block %u is not a power of two of 1..%u", header->block_min, NV_BLOCK_MIN_MAX);
    in->mirrored = header->flags & NV_VOLUME_MIRROR;
    if (header->leg_count < 1 || header->leg_count > (in->mirrored ? NV_LEGS_MAX : 1))
        return nv_fail(EINVAL, "%u legs; %s", header->leg_count,
                       in->mirrored ? "1..8 are possible" : "exactly 1 without a mirror");
    for (size_t i = 0; i < sizeof header->reserved / sizeof header->reserved[0]; i++)
        if (header->reserved[i] != 0)
            return nv_fail(EINVAL, "volume description has a non-zero reserved field");
    return 0;
}

static uint64_t bytes_before_runs(const struct reader *in)
{
    const uint64_t mirror = in->mirrored ? sizeof(nv_desc_mirror) + in->header.leg_count * sizeof(nv_desc_meta) : 0;

    return sizeof in->header + in->header.leg_count * sizeof(nv_desc_leg) + mirror;
}

static int check_leg(struct reader *in, const nv_desc_leg *leg)
{
    if (!in->mirrored && leg->state != NV_LEG_IN_SYNC)
        return nv_fail(EINVAL, "leg %u has state %u; the only leg must be in sync", leg->id, leg->state);
    if (leg->state != NV_LEG_IN_SYNC && leg->state != NV_LEG_STALE)
        return nv_fail(EINVAL, "leg %u has state %u; a description knows in-sync and stale", leg->id, leg->state);
    if (in->mirrored && leg->id == 0)
        return nv_fail(EINVAL, "a leg has id 0");
    for (const nv_desc_leg *other = in->legs; other < leg; other++)
        if (other->id == leg->id)
            return nv_fail(EINVAL, "leg %u is named twice", leg->id);
    if (leg->run_count > NV_RUNS_MAX || in->run_count > NV_RUNS_MAX - leg->run_count)
        return nv_fail(E2BIG, "leg %u has %" PRIu64 " runs, above %u", leg->id, leg->run_count, NV_RUNS_MAX);
    in->run_count += leg->run_count;
    return 0;
}

static int read_legs(struct reader *in)
{
    const uint64_t before = bytes_before_runs(in), room = in->header.length - before;
    const uint8_t *at = in->record + sizeof in->header;
    uint32_t in_sync = 0;

    if (in->header.length < before)
        return nv_fail(EINVAL, "volume description ends inside its legs");
    for (uint32_t i = 0; i < in->header.leg_count; i++) {
        memcpy(&in->legs[i], at + i * sizeof(nv_desc_leg), sizeof(nv_desc_leg));
        int error = check_leg(in, &in->legs[i]);
        if (error)
            return error;
        in_sync += in->legs[i].state == NV_LEG_IN_SYNC;
    }
    if (in_sync == 0)
        return nv_fail(EINVAL, "no leg is in sync");
    if (room != in->run_count * sizeof(nv_desc_run))
        return nv_fail(EINVAL, "volume description of %" PRIu64 " bytes does not hold exactly %" PRIu64 " runs",
                       in->header.length, in->run_count);
    if (in->mirrored) {
        at += in->header.leg_count * sizeof(nv_desc_leg);
        memcpy(&in->mirror, at, sizeof in->mirror);
        memcpy(in->metas, at + sizeof in->mirror, in->header.leg_count * sizeof(nv_desc_meta));
    }
    return 0;
}

static int check_policy(const struct reader *in)
{
    const nv_desc_mirror *mirror = &in->mirror;
    const uint32_t shift = mirror->region_shift;

    if (shift < NV_REGION_SHIFT_MIN || shift > NV_REGION_SHIFT_MAX || (1ull << shift) < in->header.block_min)
        return nv_fail(EINVAL, "regions of 2^%u bytes are not in 2^%u..2^%u, or below the block", shift,
                       NV_REGION_SHIFT_MIN, NV_REGION_SHIFT_MAX);
    if (in->header.size >> shift >= NV_REGIONS_MAX)
        return nv_fail(E2BIG, "regions of 2^%u bytes are too small for a volume of %" PRIu64, shift, in->header.size);
    if (mirror->read_policy > NV_READ_NEAREST)
        return nv_fail(EINVAL, "read policy %u is unknown", mirror->read_policy);
    if (mirror->op_deadline_ms < 1 || mirror->op_deadline_ms > NV_DEADLINE_MAX_MS ||
        mirror->hold_deadline_ms > NV_DEADLINE_MAX_MS || mirror->intent_idle_ms > NV_DEADLINE_MAX_MS)
        return nv_fail(EINVAL, "a mirror's times are not in 1..%u ms", NV_DEADLINE_MAX_MS);
    if (mirror->reserved != 0)
        return nv_fail(EINVAL, "a mirror has a non-zero reserved field");
    return 0;
}

static uint64_t page_pairs_bytes(uint64_t regions, uint64_t a_page)
{
    return (regions + a_page - 1) / a_page * 2 * NV_META_PAGE;
}

static int read_meta(const struct reader *in, uint32_t index, struct nv_map_leg *leg)
{
    const nv_desc_meta *meta = &in->metas[index];
    const uint64_t regions = ((in->header.size - 1) >> in->mirror.region_shift) + 1;
    uint64_t size;

    if (meta->reserved != 0)
        return nv_fail(EINVAL, "leg %u has a non-zero reserved field", leg->id);
    if (meta->object == 0) {
        if (leg->run_count != 0 || leg->state != NV_LEG_STALE)
            return nv_fail(EINVAL, "leg %u has no metadata, but runs or a claim to be in sync", leg->id);
        return 0;
    }
    leg->meta = in->lookup(in->context, meta->object);
    if (!leg->meta)
        return nv_fail(ENOENT, "the metadata of leg %u is on object %u, which is not open", leg->id, meta->object);
    if (leg->meta->flags & NV_OBJECT_READ_ONLY)
        return nv_fail(EINVAL, "the metadata of leg %u is on read-only object %u", leg->id, meta->object);
    size = atomic_load(&leg->meta->size);
    if ((meta->offset | meta->bitmap_bytes) & (NV_META_PAGE - 1))
        return nv_fail(EINVAL, "the metadata of leg %u is not aligned to %u", leg->id, NV_META_PAGE);
    if (meta->offset > size || size - meta->offset < NV_META_BITMAPS ||
        meta->bitmap_bytes > (size - meta->offset - NV_META_BITMAPS) / 2)
        return nv_fail(ERANGE, "the metadata of leg %u is outside object %u of %" PRIu64 " bytes", leg->id,
                       meta->object, size);
    if (page_pairs_bytes(regions, NV_INTENTS_A_PAGE) > meta->bitmap_bytes ||
        page_pairs_bytes(regions, NV_DIRTY_A_PAGE) > meta->bitmap_bytes)
        return nv_fail(ENOSPC, "the metadata of leg %u has no room for %" PRIu64 " regions", leg->id, regions);
    leg->meta_offset = meta->offset;
    leg->bitmap_bytes = meta->bitmap_bytes;
    return 0;
}

static int check_mapping(const struct reader *in, const nv_desc_run *run, const struct nv_object *object)
{
    const uint64_t size = object ? atomic_load(&object->size) : 0;

    if (!object)
        return nv_fail(ENOENT, "run at %" PRIu64 " names object %u, which is not open", run->offset, run->object);
    if (run->object_offset > size || run->length > size - run->object_offset)
        return nv_fail(ERANGE, "run at %" PRIu64 ": [%" PRIu64 ", +%" PRIu64 ") is outside object %u of %" PRIu64
                       " bytes", run->offset, run->object_offset, run->length, run->object, size);
    if (in->header.block_min < object->align)
        return nv_fail(EINVAL, "minimum block %u is below the alignment %u of object %u", in->header.block_min,
                       object->align, run->object);
    if ((run->object_offset | run->offset | run->length) & (object->align - 1))
        return nv_fail(EINVAL, "run at %" PRIu64 " is not aligned to %u as object %u asks", run->offset, object->align,
                       run->object);
    if ((object->flags & NV_OBJECT_READ_ONLY) && !(in->header.flags & NV_VOLUME_READ_ONLY))
        return nv_fail(EINVAL, "run at %" PRIu64 " of a writable volume is on read-only object %u", run->offset,
                       run->object);
    return 0;
}

static int read_run(const struct reader *in, uint64_t index, uint64_t expected, struct nv_run *out)
{
    nv_desc_run run;
    int error;

    memcpy(&run, in->record + in->header.length - (in->run_count - index) * sizeof run, sizeof run);
    if (run.offset != expected)
        return nv_fail(EINVAL, "run %" PRIu64 " starts at %" PRIu64 ", not at %" PRIu64, index, run.offset, expected);
    if (run.length == 0 || run.length > in->header.size - run.offset)
        return nv_fail(EINVAL, "run at %" PRIu64 " of %" PRIu64 " bytes does not fit a volume of %" PRIu64, run.offset,
                       run.length, in->header.size);
    if (run.length & (in->header.block_min - 1) && run.offset + run.length != in->header.size)
        return nv_fail(EINVAL, "run at %" PRIu64 " of %" PRIu64 " bytes is not a multiple of the minimum block %u",
                       run.offset, run.length, in->header.block_min);
    if (run.state > NV_RUN_WRITE_PROTECTED || (in->mirrored && run.state == NV_RUN_WRITE_PROTECTED))
        return nv_fail(EINVAL, "run at %" PRIu64 " has state %u, which is unknown here", run.offset, run.state);
    *out = (struct nv_run){run.offset, run.length, run.object_offset, NULL, run.state};
    if (run.state == NV_RUN_ZERO)
        return 0;
    out->object = in->lookup(in->context, run.object);
    error = check_mapping(in, &run, out->object);
    return error;
}

/* By number, not by address: the order in which objects are synced must not depend on where they lie. */
static int compare_objects(const void *a, const void *b)
{
    const uint32_t left = (*(struct nv_object *const *)a)->id, right = (*(struct nv_object *const *)b)->id;

    return left < right ? -1 : left > right;
}

/* Sort, and keep each once; the new count. */
static uint32_t unique_objects(struct nv_object **objects, uint32_t count)
{
    uint32_t kept = 0;

    qsort(objects, count, sizeof *objects, compare_objects);
    for (uint32_t i = 0; i < count; i++)
        if (kept == 0 || objects[kept - 1] != objects[i])
            objects[kept++] = objects[i];
    return kept;
}

static uint32_t objects_of_runs(const struct nv_run *runs, uint64_t run_count, struct nv_object **out)
{
    uint32_t count = 0;

    for (uint64_t i = 0; i < run_count; i++)
        if (runs[i].object && (count == 0 || out[count - 1] != runs[i].object))
            out[count++] = runs[i].object;
    return unique_objects(out, count);
}

/* Each object once, and the strictest alignment of memory. `runs`: of all legs. */
static int collect_objects(struct nv_map *map, const struct nv_run *runs, uint64_t run_count)
{
    uint32_t count;

    map->objects = calloc(run_count + 1 + map->leg_count, sizeof(struct nv_object *));
    if (!map->objects)
        return nv_fail(ENOMEM, "no memory for a map of %" PRIu64 " runs", run_count);
    count = objects_of_runs(runs, run_count, map->objects);
    for (uint32_t i = 0; map->legs && i < map->leg_count; i++)
        if (map->legs[i].meta)
            map->objects[count++] = map->legs[i].meta;
    map->object_count = unique_objects(map->objects, count);
    for (uint32_t i = 0; i < map->object_count; i++)
        if (map->objects[i]->memory_align > map->memory_align)
            map->memory_align = map->objects[i]->memory_align;
    return 0;
}

/* Cells so large that at most two come on a run, and none is smaller than a sector. NULL: no memory. */
static uint32_t *index_runs(const struct nv_run *runs, uint64_t run_count, uint64_t size, uint32_t *shift)
{
    const uint64_t most = 2 * run_count;
    uint64_t count, run = 0;
    uint32_t *cells;

    *shift = 9;
    while (size >> *shift > most)
        ++*shift;
    count = (size >> *shift) + 1;
    cells = malloc((count + 1) * sizeof *cells);
    if (!cells)
        return NULL;
    for (uint64_t cell = 0; cell < count; cell++) {
        while (run + 1 < run_count && runs[run + 1].offset <= cell << *shift)
            run++;
        cells[cell] = (uint32_t)run;
    }
    cells[count] = run_count ? (uint32_t)(run_count - 1) : 0;
    return cells;
}

static int no_memory(uint64_t run_count)
{
    return nv_fail(ENOMEM, "no memory for the index of %" PRIu64 " runs", run_count);
}

/* `count` runs of one leg, from the record's run `first` on. */
static int fill_runs(const struct reader *in, struct nv_run *runs, uint64_t first, uint64_t count)
{
    uint64_t expected = 0;

    for (uint64_t i = 0; i < count; i++) {
        int error = read_run(in, first + i, expected, &runs[i]);
        if (error)
            return error;
        expected += runs[i].length;
    }
    if (expected != in->header.size)
        return nv_fail(EINVAL, "runs cover %" PRIu64 " of %" PRIu64 " bytes", expected, in->header.size);
    return 0;
}

/* Both legs are whole: do they have the same states at the same places? */
static bool same_states(const struct nv_map_leg *a, const struct nv_map_leg *b)
{
    uint64_t i = 0, j = 0;

    while (i < a->run_count && j < b->run_count) {
        const uint64_t end_a = a->runs[i].offset + a->runs[i].length, end_b = b->runs[j].offset + b->runs[j].length;
        if (a->runs[i].state != b->runs[j].state)
            return false;
        i += end_a <= end_b;
        j += end_b <= end_a;
    }
    return true;
}

static int fill_leg(const struct reader *in, uint32_t index, struct nv_run *runs, uint64_t first,
                    struct nv_map_leg *leg)
{
    int error;

    *leg = (struct nv_map_leg){.id = in->legs[index].id, .state = in->legs[index].state, .runs = runs,
                               .run_count = in->legs[index].run_count};
    error = read_meta(in, index, leg);
    if (error || !leg->meta)
        return error;
    error = fill_runs(in, runs, first, leg->run_count);
    if (error)
        return error;
    leg->objects = calloc(leg->run_count, sizeof(struct nv_object *));
    leg->cells = index_runs(runs, leg->run_count, in->header.size, &leg->cell_shift);
    if (!leg->objects || !leg->cells)
        return no_memory(leg->run_count);
    leg->object_count = objects_of_runs(runs, leg->run_count, leg->objects);
    return 0;
}

/* What the plain path sees of a mirror: one run that only the mirror can serve. The legs' runs stand behind it. */
static int fill_mirror(const struct reader *in, struct nv_map *map)
{
    const struct nv_map_leg *whole = NULL;
    uint64_t first = 0;
    int error = in->header.size ? check_policy(in) : nv_fail(EINVAL, "a mirror of 0 bytes");

    map->mirror = in->mirror;
    map->legs = calloc(map->leg_count, sizeof *map->legs);
    map->cells = calloc(2, sizeof *map->cells);
    if (!map->legs || !map->cells)
        return no_memory(in->run_count);
    map->cell_shift = 63;
    map->run_count = 1;
    map->runs[0] = (struct nv_run){.length = in->header.size, .state = NV_RUN_LEGS};
    for (uint32_t i = 0; !error && i < map->leg_count; i++) {
        struct nv_map_leg *leg = &map->legs[i];
        error = fill_leg(in, i, &map->runs[1 + first], first, leg);
        first += in->legs[i].run_count;
        if (error || !leg->meta)
            continue;
        if (whole && !same_states(whole, leg))
            error = nv_fail(EINVAL, "legs %u and %u differ in what has storage", whole->id, leg->id);
        whole = leg;
    }
    return error ? error : collect_objects(map, &map->runs[1], in->run_count);
}

static int fill_map(const struct reader *in, struct nv_map *map)
{
    int error;

    map->leg_count = in->header.leg_count;
    map->generation = in->header.generation;
    if (in->mirrored)
        return fill_mirror(in, map);
    map->run_count = in->run_count;
    error = fill_runs(in, map->runs, 0, in->run_count);
    if (!error)
        error = collect_objects(map, map->runs, map->run_count);
    if (error)
        return error;
    map->cells = index_runs(map->runs, map->run_count, map->size, &map->cell_shift);
    return map->cells ? 0 : no_memory(map->run_count);
}

int nv_desc_compile(const void *record, uint64_t length, uint32_t reactors, nv_object_lookup *lookup, void *context,
                    struct nv_map **out)
{
    struct reader in = {.record = record, .lookup = lookup, .context = context};
    struct nv_map *map;
    int error;

    if ((error = read_header(&in, length)) || (error = read_legs(&in)))
        return error;
    map = calloc(1, sizeof *map + (in.run_count + in.mirrored) * sizeof(struct nv_run));
    if (!map)
        return nv_fail(ENOMEM, "no memory for a map of %" PRIu64 " runs", in.run_count);
    map->users = aligned_alloc(64, reactors * sizeof(struct nv_map_user));
    if (!map->users) {
        nv_map_free(map);
        return nv_fail(ENOMEM, "no memory for a map");
    }
    memset(map->users, 0, reactors * sizeof(struct nv_map_user));
    map->size = in.header.size;
    map->version = in.header.map_to;
    map->epoch = in.header.epoch;
    map->generation = in.header.generation;
    memcpy(map->uuid, in.header.uuid, sizeof map->uuid);
    map->flags = in.header.flags;
    map->block_min = in.header.block_min;
    map->memory_align = 1;
    error = fill_map(&in, map);
    if (error) {
        nv_map_free(map);
        return error;
    }
    assert(map->object_count <= in.run_count + map->leg_count);
    *out = map;
    return 0;
}

uint64_t nv_desc_map_from(const void *record)
{
    nv_desc_header header;

    memcpy(&header, record, sizeof header);
    return header.map_from;
}

void nv_map_free(struct nv_map *map)
{
    if (!map)
        return;
    for (uint32_t i = 0; map->legs && i < map->leg_count; i++) {
        free(map->legs[i].objects);
        free(map->legs[i].cells);
    }
    free(map->legs);
    free(map->objects);
    free(map->cells);
    free(map->users);
    free(map);
}
