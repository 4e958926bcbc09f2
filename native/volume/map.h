/*
 * A compiled map: the immutable form of a volume description that reactors run. A change replaces the whole map;
 * requests keep the one they began with, and each reactor counts its users, so that the front knows when older I/O
 * has drained. The front thread makes and frees maps.
 */
#ifndef NV_MAP_H
#define NV_MAP_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"

struct nv_run {
    uint64_t offset;                /* in the volume */
    uint64_t length;
    uint64_t object_offset;
    struct nv_object *object;       /* NULL unless mapped or write-protected */
    uint32_t state;                 /* NV_RUN_* */
};

struct nv_map_user {
    _Alignas(64) uint64_t in_flight; /* this reactor's requests on this map */
    bool retiring;                   /* a newer map is in place; tell when in_flight reaches 0 */
};

struct nv_map {
    uint64_t size;
    uint64_t version;
    uint64_t epoch;
    uint8_t uuid[16];
    uint32_t flags;                 /* NV_VOLUME_* */
    uint32_t block_min;
    uint32_t memory_align;          /* of payload memory: the strictest object's */
    uint32_t object_count;
    uint64_t run_count;
    struct nv_object **objects;     /* each once */
    struct nv_map_user *users;      /* one a reactor */
    uint32_t cell_shift;            /* cell c of the volume starts at byte c << cell_shift */
    uint32_t *cells;                /* the run that holds each cell's first byte, and the last run */
    struct nv_volume_change *change; /* the change that retires this map */
    struct nv_run runs[];
};

/*
 * The run that holds `offset` (< size). There are at least as many cells as runs, so that few runs begin in one cell and
 * the search takes the same few steps whether a map has one run or a million; many small runs in one cell are halved.
 */
static inline const struct nv_run *nv_map_find(const struct nv_map *map, uint64_t offset)
{
    const uint64_t cell = offset >> map->cell_shift;
    uint64_t low = map->cells[cell], high = (uint64_t)map->cells[cell + 1] + 1;

    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (map->runs[middle].offset <= offset)
            low = middle;
        else
            high = middle;
    }
    return &map->runs[low];
}

#endif
