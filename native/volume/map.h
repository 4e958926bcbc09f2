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
#include "limits.h"
#include "nbdvvol.h"

struct nv_run {
    uint64_t offset;                /* in the volume */
    uint64_t length;
    uint64_t object_offset;
    struct nv_object *object;       /* NULL unless mapped or write-protected */
    uint32_t state;                 /* NV_RUN_* */
};

#define NV_RUN_LEGS 255u            /* state, of the one run of a mirror's map: its legs have the real ones */

struct nv_map_leg {                 /* of a mirror */
    uint32_t id;
    uint32_t state;                 /* NV_LEG_IN_SYNC or NV_LEG_STALE, as the description has it */
    uint64_t run_count;             /* 0: absent */
    const struct nv_run *runs;
    uint32_t *cells;                /* as of a map */
    uint32_t cell_shift;
    struct nv_object **objects;     /* of its runs, each once */
    uint32_t object_count;
    uint32_t lane;                  /* its place in the mirror: set before reactors see the map */
    struct nv_object *meta;         /* where its metadata region lies; NULL: absent */
    uint64_t meta_offset;
    uint64_t bitmap_bytes;
};

struct nv_map_user {
    _Alignas(64) uint64_t in_flight; /* this reactor's requests on this map */
    bool retiring;                   /* a newer map is in place; tell when in_flight reaches 0 */
};

struct nv_map {
    uint64_t size;
    uint64_t version;
    uint64_t epoch;
    uint64_t generation;
    uint8_t uuid[16];
    uint32_t flags;                 /* NV_VOLUME_* */
    uint32_t block_min;
    uint32_t memory_align;          /* of payload memory: the strictest object's */
    uint32_t object_count;
    uint64_t run_count;             /* 1 of a mirror */
    struct nv_object **objects;     /* of all legs, each once */
    struct nv_map_user *users;      /* one a reactor */
    uint32_t cell_shift;            /* cell c of the volume starts at byte c << cell_shift */
    uint32_t *cells;                /* the run that holds each cell's first byte, and the last run */
    struct nv_volume_change *change; /* the change that retires this map */
    /* mirrors */
    struct nv_map_leg *legs;        /* NULL without NV_VOLUME_MIRROR */
    uint32_t leg_count;
    nv_desc_mirror mirror;
    const struct nv_map_leg *by_lane[NV_LEGS_MAX];
    struct nv_run runs[];           /* of a mirror: NV_RUN_LEGS, then those of leg 0, of leg 1, ... */
};

/*
 * The run that holds `offset` (< size). There are at least as many cells as runs, so that few runs begin in one cell and
 * the search takes the same few steps whether a map has one run or a million; many small runs in one cell are halved.
 */
static inline const struct nv_run *nv_runs_find(const struct nv_run *runs, const uint32_t *cells, uint32_t cell_shift,
                                                uint64_t offset)
{
    const uint64_t cell = offset >> cell_shift;
    uint64_t low = cells[cell], high = (uint64_t)cells[cell + 1] + 1;

    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (runs[middle].offset <= offset)
            low = middle;
        else
            high = middle;
    }
    return &runs[low];
}

/* For a mirror: its only run, NV_RUN_LEGS. */
static inline const struct nv_run *nv_map_find(const struct nv_map *map, uint64_t offset)
{
    return nv_runs_find(map->runs, map->cells, map->cell_shift, offset);
}

static inline const struct nv_run *nv_leg_find(const struct nv_map_leg *leg, uint64_t offset)
{
    return nv_runs_find(leg->runs, leg->cells, leg->cell_shift, offset);
}

#endif
