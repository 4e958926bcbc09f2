/*
 * See disk.h. Invariants: a sector's newest version equals what reads see; a sector without versions is durable as
 * it is; versions of a sector are newest first.
 */
#include "sim/disk.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define DISTINCT 32u /* contents that a power cut chooses from: the newest of a sector */

struct version {
    struct version *older;
    uint64_t time;
    bool lost;
    uint8_t bytes[SIM_SECTOR];
};

struct sim_disk {
    uint64_t size;
    uint8_t *now;
    uint8_t *durable;
    bool *allocated;            /* per block */
    struct version **versions;  /* per sector: newest first */
    uint64_t *touched;          /* sectors with versions, each once, so that a sync need not look at all */
    size_t touched_count;
    uint64_t watched_from, watched;
};

struct sim_disk *sim_disk_create(const uint8_t *image, uint64_t size)
{
    struct sim_disk *disk = calloc(1, sizeof *disk);

    assert(disk && size > 0 && size % SIM_BLOCK == 0);
    disk->size = disk->watched_from = size;
    disk->now = calloc(1, size);
    disk->durable = calloc(1, size);
    disk->allocated = calloc(size / SIM_BLOCK, sizeof *disk->allocated);
    disk->versions = calloc(size / SIM_SECTOR, sizeof *disk->versions);
    disk->touched = calloc(size / SIM_SECTOR, sizeof *disk->touched);
    assert(disk->now && disk->durable && disk->allocated && disk->versions && disk->touched);
    if (image) {
        memcpy(disk->now, image, size);
        memcpy(disk->durable, image, size);
        memset(disk->allocated, true, size / SIM_BLOCK);
    }
    return disk;
}

static void drop_versions(struct version *version)
{
    while (version) {
        struct version *older = version->older;
        free(version);
        version = older;
    }
}

void sim_disk_destroy(struct sim_disk *disk)
{
    for (size_t i = 0; i < disk->touched_count; i++)
        drop_versions(disk->versions[disk->touched[i]]);
    free(disk->now);
    free(disk->durable);
    free(disk->allocated);
    free(disk->versions);
    free(disk->touched);
    free(disk);
}

uint64_t sim_disk_size(const struct sim_disk *disk)
{
    return disk->size;
}

uint64_t sim_disk_clip(const struct sim_disk *disk, uint64_t offset, uint64_t size)
{
    if (offset >= disk->size)
        return 0;
    return size < disk->size - offset ? size : disk->size - offset;
}

uint8_t *sim_disk_bytes(const struct sim_disk *disk)
{
    return disk->now;
}

void sim_disk_read(const struct sim_disk *disk, uint64_t offset, void *out, size_t size)
{
    assert(sim_disk_clip(disk, offset, size) == size);
    memcpy(out, disk->now + offset, size);
}

/* The sector was just changed in `now`: remember the change as a version, or as durable. */
static void record(struct sim_disk *disk, uint64_t sector, uint64_t time, enum sim_write_mode mode)
{
    struct version **newest = &disk->versions[sector], *version;

    if (mode == SIM_WRITE_DURABLE) { /* older versions can never come back */
        struct version *gone = *newest;
        memcpy(disk->durable + sector * SIM_SECTOR, disk->now + sector * SIM_SECTOR, SIM_SECTOR);
        if (gone) { /* stays listed as touched: keep one version, equal to the durable one */
            drop_versions(gone->older);
            gone->older = NULL;
            gone->lost = false;
            gone->time = time;
            memcpy(gone->bytes, disk->now + sector * SIM_SECTOR, SIM_SECTOR);
        }
        return;
    }
    version = malloc(sizeof *version);
    assert(version);
    *version = (struct version){.older = *newest, .time = time, .lost = mode == SIM_WRITE_LOST};
    memcpy(version->bytes, disk->now + sector * SIM_SECTOR, SIM_SECTOR);
    if (!*newest)
        disk->touched[disk->touched_count++] = sector;
    *newest = version;
    assert(disk->touched_count <= disk->size / SIM_SECTOR);
}

void sim_disk_write(struct sim_disk *disk, uint64_t offset, const void *bytes, size_t size, uint64_t time,
                    enum sim_write_mode mode)
{
    assert(sim_disk_clip(disk, offset, size) == size);
    if (size == 0)
        return;
    disk->watched += offset + size > disk->watched_from;
    if (bytes)
        memcpy(disk->now + offset, bytes, size);
    else
        memset(disk->now + offset, 0, size);
    for (uint64_t sector = offset / SIM_SECTOR; sector <= (offset + size - 1) / SIM_SECTOR; sector++)
        record(disk, sector, time, mode);
    for (uint64_t block = offset / SIM_BLOCK; block <= (offset + size - 1) / SIM_BLOCK; block++)
        disk->allocated[block] = true;
}

void sim_disk_watch(struct sim_disk *disk, uint64_t offset)
{
    disk->watched_from = offset;
}

uint64_t sim_disk_watched(const struct sim_disk *disk)
{
    return disk->watched;
}

void sim_disk_punch(struct sim_disk *disk, uint64_t offset, uint64_t size, uint64_t time)
{
    sim_disk_write(disk, offset, NULL, size, time, SIM_WRITE_CACHED);
    for (uint64_t block = (offset + SIM_BLOCK - 1) / SIM_BLOCK; block < (offset + size) / SIM_BLOCK; block++)
        disk->allocated[block] = false;
}

/* Returns true when the sector has versions left. */
static bool sync_sector(struct sim_disk *disk, uint64_t sector, uint64_t time, bool failed)
{
    struct version **link = &disk->versions[sector];

    if (failed) {
        for (struct version *version = *link; version; version = version->older)
            version->lost |= version->time < time;
        return true;
    }
    while (*link && ((*link)->time >= time || (*link)->lost))
        link = &(*link)->older;
    if (*link) { /* the newest that this sync saves: older ones can never come back */
        memcpy(disk->durable + sector * SIM_SECTOR, (*link)->bytes, SIM_SECTOR);
        drop_versions(*link);
        *link = NULL;
    }
    return disk->versions[sector] != NULL;
}

void sim_disk_sync(struct sim_disk *disk, uint64_t time, bool failed)
{
    size_t kept = 0;

    for (size_t i = 0; i < disk->touched_count; i++)
        if (sync_sector(disk, disk->touched[i], time, failed))
            disk->touched[kept++] = disk->touched[i];
    disk->touched_count = kept;
}

uint64_t sim_disk_extent(const struct sim_disk *disk, uint64_t offset, uint64_t size, bool *hole)
{
    uint64_t end = offset;

    size = sim_disk_clip(disk, offset, size);
    assert(size > 0);
    *hole = !disk->allocated[offset / SIM_BLOCK];
    while (end < offset + size && disk->allocated[end / SIM_BLOCK] != *hole)
        end = (end / SIM_BLOCK + 1) * SIM_BLOCK;
    return end < offset + size ? end - offset : size;
}

bool sim_disk_has_lost(const struct sim_disk *disk)
{
    for (size_t i = 0; i < disk->touched_count; i++)
        for (const struct version *version = disk->versions[disk->touched[i]]; version; version = version->older)
            if (version->lost)
                return true;
    return false;
}

void sim_disk_reset(struct sim_disk *disk, const uint8_t *image)
{
    for (size_t i = 0; i < disk->touched_count; i++) {
        drop_versions(disk->versions[disk->touched[i]]);
        disk->versions[disk->touched[i]] = NULL;
    }
    disk->touched_count = 0;
    memset(disk->allocated, true, disk->size / SIM_BLOCK); /* a hole may have bytes again */
    memcpy(disk->now, image, disk->size);
    memcpy(disk->durable, image, disk->size);
}

/* What the sector may hold after a power cut, each content once, the newest first. */
static uint32_t list_contents(const struct sim_disk *disk, uint64_t sector, const uint8_t *out[DISTINCT])
{
    const struct version *version = disk->versions[sector];
    uint32_t count = 0;

    for (bool durable = false; !durable && count < DISTINCT;) {
        const uint8_t *bytes = version ? version->bytes : disk->durable + sector * SIM_SECTOR;
        uint32_t same = 0;
        while (same < count && memcmp(out[same], bytes, SIM_SECTOR) != 0)
            same++;
        if (same == count)
            out[count++] = bytes;
        durable = !version;
        version = version ? version->older : NULL;
    }
    return count;
}

void sim_disk_crash_by(const struct sim_disk *disk, sim_pick *pick, void *context, uint8_t *image)
{
    memcpy(image, disk->durable, disk->size);
    for (size_t i = 0; i < disk->touched_count; i++) {
        const uint64_t sector = disk->touched[i];
        const uint8_t *contents[DISTINCT];
        const uint32_t count = list_contents(disk, sector, contents);
        if (count > 1)
            memcpy(image + sector * SIM_SECTOR, contents[pick(context, count)], SIM_SECTOR);
        else
            memcpy(image + sector * SIM_SECTOR, contents[0], SIM_SECTOR);
    }
}

static uint64_t by_chance(void *random, uint64_t bound)
{
    return sim_random_below(random, bound);
}

void sim_disk_crash(const struct sim_disk *disk, struct sim_random *random, uint8_t *image)
{
    sim_disk_crash_by(disk, by_chance, random, image);
}
