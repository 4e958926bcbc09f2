/*
 * See desc.h. Checked in this order: the header, the legs, then each run of each leg. Invariant of a compiled map: its
 * runs are sorted, gapless and cover [0, size); each mapped run lies inside its object at the object's alignment.
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

struct reader {
    const uint8_t *record;
    nv_desc_header header;
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
    if (header->flags & ~(uint32_t)(NV_VOLUME_READ_ONLY | NV_VOLUME_ROTATIONAL))
        return nv_fail(EINVAL, "volume description has unknown flags 0x%x", header->flags);
    if (header->size > NV_SIZE_MAX)
        return nv_fail(E2BIG, "volume size %" PRIu64 " is above %llu", header->size, NV_SIZE_MAX);
    if (header->block_min == 0 || header->block_min > NV_BLOCK_MIN_MAX || (header->block_min & (header->block_min - 1)))
        return nv_fail(EINVAL, "minimum block %u is not a power of two of 1..%u", header->block_min, NV_BLOCK_MIN_MAX);
    if (header->leg_count != 1)
        return nv_fail(EINVAL, "%u legs; exactly 1 until mirrors are built", header->leg_count);
    for (size_t i = 0; i < sizeof header->reserved / sizeof header->reserved[0]; i++)
        if (header->reserved[i] != 0)
            return nv_fail(EINVAL, "volume description has a non-zero reserved field");
    return 0;
}

static int read_legs(struct reader *in)
{
    const uint64_t room = in->header.length - sizeof in->header;

    if (room < (uint64_t)in->header.leg_count * sizeof(nv_desc_leg))
        return nv_fail(EINVAL, "volume description ends inside its legs");
    for (uint32_t i = 0; i < in->header.leg_count; i++) {
        nv_desc_leg leg;
        memcpy(&leg, in->record + sizeof in->header + i * sizeof leg, sizeof leg);
        if (leg.state != NV_LEG_IN_SYNC)
            return nv_fail(EINVAL, "leg %u has state %u; the only leg must be in sync", leg.id, leg.state);
        if (leg.run_count > NV_RUNS_MAX || in->run_count > NV_RUNS_MAX - leg.run_count)
            return nv_fail(E2BIG, "leg %u has %" PRIu64 " runs, above %u", leg.id, leg.run_count, NV_RUNS_MAX);
        in->run_count += leg.run_count;
    }
    if (room - in->header.leg_count * sizeof(nv_desc_leg) != in->run_count * sizeof(nv_desc_run))
        return nv_fail(EINVAL, "volume description of %" PRIu64 " bytes does not hold exactly %" PRIu64 " runs",
                       in->header.length, in->run_count);
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
    if (run.state > NV_RUN_WRITE_PROTECTED)
        return nv_fail(EINVAL, "run at %" PRIu64 " has unknown state %u", run.offset, run.state);
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

/* Each object once, and the strictest alignment. */
static int collect_objects(struct nv_map *map)
{
    uint32_t count = 0;

    map->objects = calloc(map->run_count + 1, sizeof(struct nv_object *));
    if (!map->objects)
        return nv_fail(ENOMEM, "no memory for a map of %" PRIu64 " runs", map->run_count);
    for (uint64_t i = 0; i < map->run_count; i++) {
        struct nv_object *object = map->runs[i].object;
        if (object && (count == 0 || map->objects[count - 1] != object))
            map->objects[count++] = object;
        if (object && object->memory_align > map->memory_align)
            map->memory_align = object->memory_align;
    }
    qsort(map->objects, count, sizeof(struct nv_object *), compare_objects);
    for (uint32_t i = 0; i < count; i++)
        if (map->object_count == 0 || map->objects[map->object_count - 1] != map->objects[i])
            map->objects[map->object_count++] = map->objects[i];
    return 0;
}

/* Cells so large that at most two come on a run, and none is smaller than a sector. */
static int index_runs(struct nv_map *map)
{
    const uint64_t most = 2 * map->run_count;
    uint64_t count, run = 0;

    map->cell_shift = 9;
    while (map->size >> map->cell_shift > most)
        map->cell_shift++;
    count = (map->size >> map->cell_shift) + 1;
    map->cells = malloc((count + 1) * sizeof *map->cells);
    if (!map->cells)
        return nv_fail(ENOMEM, "no memory for the index of %" PRIu64 " runs", map->run_count);
    for (uint64_t cell = 0; cell < count; cell++) {
        while (run + 1 < map->run_count && map->runs[run + 1].offset <= cell << map->cell_shift)
            run++;
        map->cells[cell] = (uint32_t)run;
    }
    map->cells[count] = map->run_count ? (uint32_t)(map->run_count - 1) : 0;
    return 0;
}

static int fill_map(const struct reader *in, struct nv_map *map)
{
    uint64_t expected = 0;
    int failed;

    for (uint64_t i = 0; i < in->run_count; i++) {
        int error = read_run(in, i, expected, &map->runs[i]);
        if (error)
            return error;
        expected += map->runs[i].length;
    }
    if (expected != in->header.size)
        return nv_fail(EINVAL, "runs cover %" PRIu64 " of %" PRIu64 " bytes", expected, in->header.size);
    failed = collect_objects(map);
    return failed ? failed : index_runs(map);
}

int nv_desc_compile(const void *record, uint64_t length, uint32_t reactors, nv_object_lookup *lookup, void *context,
                    struct nv_map **out)
{
    struct reader in = {.record = record, .lookup = lookup, .context = context};
    struct nv_map *map;
    int error;

    if ((error = read_header(&in, length)) || (error = read_legs(&in)))
        return error;
    map = calloc(1, sizeof *map + in.run_count * sizeof(struct nv_run));
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
    memcpy(map->uuid, in.header.uuid, sizeof map->uuid);
    map->flags = in.header.flags;
    map->block_min = in.header.block_min;
    map->memory_align = 1;
    map->run_count = in.run_count;
    error = fill_map(&in, map);
    if (error) {
        nv_map_free(map);
        return error;
    }
    assert(map->object_count <= map->run_count);
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
    free(map->objects);
    free(map->cells);
    free(map->users);
    free(map);
}
