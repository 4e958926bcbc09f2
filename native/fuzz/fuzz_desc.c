/*
 * libFuzzer: arbitrary bytes as a volume description (nbdvvol.cdef.h), which in life comes from another process. The
 * validator must refuse it with a sentence, or compile a map in which every byte of the volume has exactly one place
 * inside an object that was offered. The first byte says whether the fields that guard all others are put right first.
 */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "nbdvvol.h"
#include "volume/desc.h"

#define OBJECTS 4u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct nv_object *lookup(void *context, uint32_t number)
{
    struct nv_object *objects = context;

    return number >= 1 && number <= OBJECTS ? &objects[number - 1] : NULL;
}

static void offer(struct nv_object objects[OBJECTS])
{
    static const uint64_t sizes[OBJECTS] = {1u << 20, 1ull << 40, 0, UINT64_MAX};
    static const uint32_t aligns[OBJECTS] = {1, 512, 1, 4096};

    memset(objects, 0, OBJECTS * sizeof *objects);
    for (uint32_t i = 0; i < OBJECTS; i++) {
        objects[i].id = i + 1;
        objects[i].align = objects[i].memory_align = aligns[i];
        objects[i].flags = i == 2 ? NV_OBJECT_READ_ONLY : 0;
        atomic_store(&objects[i].size, sizes[i]);
    }
}

static void repair(uint8_t *record, uint64_t length)
{
    nv_desc_header header;

    if (length < sizeof header)
        return;
    memcpy(&header, record, sizeof header);
    header.magic = NV_DESC_MAGIC;
    header.version = NV_DESC_VERSION;
    header.length = length;
    header.leg_count = 1;
    memset(header.reserved, 0, sizeof header.reserved);
    memcpy(record, &header, sizeof header);
}

static void judge(const struct nv_map *map)
{
    uint64_t at = 0;

    for (uint64_t i = 0; i < map->run_count; i++) {
        const struct nv_run *run = &map->runs[i];
        if (run->offset != at || run->length == 0 || run->length > map->size - at)
            nv_sim_violation("run %llu does not continue the last one", (unsigned long long)i);
        at += run->length;
        if (!run->object) {
            if (run->state != NV_RUN_ZERO)
                nv_sim_violation("run %llu has no object", (unsigned long long)i);
            continue;
        }
        uint64_t end = atomic_load(&run->object->size);
        if (run->object_offset > end || run->length > end - run->object_offset)
            nv_sim_violation("run %llu reaches outside its object", (unsigned long long)i);
        if (nv_map_find(map, run->offset) != run || nv_map_find(map, run->offset + run->length - 1) != run)
            nv_sim_violation("run %llu is not found by its own offsets", (unsigned long long)i);
    }
    if (at != map->size)
        nv_sim_violation("the runs cover %llu of %llu bytes", (unsigned long long)at, (unsigned long long)map->size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct nv_object objects[OBJECTS];
    struct nv_map *map = NULL;
    uint8_t *record;

    if (size < 1)
        return -1;
    record = malloc(size - 1 ? size - 1 : 1); /* no longer than it says: one byte beyond is seen */
    assert(record);
    memcpy(record, data + 1, size - 1);
    if (data[0] & 1)
        repair(record, size - 1);
    offer(objects);
    int error = nv_desc_compile(record, size - 1, 2, lookup, objects, &map);
    if (error == 0)
        judge(map);
    else if (error > 0 || map || nv_last_error()[0] == 0)
        nv_sim_violation("a refusal of %d without a sentence", error);
    nv_map_free(map);
    free(record);
    return 0;
}
