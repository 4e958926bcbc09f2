/*
 * A simulated file on a disk with a volatile cache: what reads see, what is durable, and every version in
 * between, per 512-byte sector. A crash picks, sector by sector, the durable version or any later one.
 *
 * A sync that fails loses what it should have made durable: the versions stay visible to reads, but no later
 * sync saves them (that is what Linux does with dirty pages after a write-back error).
 */
#ifndef NV_SIM_DISK_H
#define NV_SIM_DISK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sim/random.h"

#define SIM_SECTOR 512u
#define SIM_BLOCK 4096u /* allocation unit, for holes */

struct sim_disk;

/* `image` may be NULL (zeros, all holes); it is copied. Sizes are multiples of SIM_BLOCK. */
struct sim_disk *sim_disk_create(const uint8_t *image, uint64_t size);
void sim_disk_destroy(struct sim_disk *disk);
uint64_t sim_disk_size(const struct sim_disk *disk);
/* Bytes from offset that exist, at most size. */
uint64_t sim_disk_clip(const struct sim_disk *disk, uint64_t offset, uint64_t size);
/* What reads see, as memory that changes with the disk. */
uint8_t *sim_disk_bytes(const struct sim_disk *disk);
void sim_disk_read(const struct sim_disk *disk, uint64_t offset, void *out, size_t size);

enum sim_write_mode {
    SIM_WRITE_CACHED,
    SIM_WRITE_DURABLE, /* RWF_DSYNC */
    SIM_WRITE_LOST,    /* a DSYNC write whose sync failed: visible, but no sync will save it */
};
/* bytes == NULL writes zeros. `time` orders the write against syncs. */
void sim_disk_write(struct sim_disk *disk, uint64_t offset, const void *bytes, size_t size, uint64_t time,
                    enum sim_write_mode mode);
/* Count the writes that reach this offset or go beyond it. */
void sim_disk_watch(struct sim_disk *disk, uint64_t offset);
uint64_t sim_disk_watched(const struct sim_disk *disk);
/* Zeros, and whole blocks inside become holes. */
void sim_disk_punch(struct sim_disk *disk, uint64_t offset, uint64_t size, uint64_t time);
/* Everything written before `time` is durable, or lost when the sync failed. */
void sim_disk_sync(struct sim_disk *disk, uint64_t time, bool failed);
/* The run that starts at offset: its length (clipped to `size`), and whether it is a hole. */
uint64_t sim_disk_extent(const struct sim_disk *disk, uint64_t offset, uint64_t size, bool *hole);
/* A sync has failed, and what it should have saved is still visible. */
bool sim_disk_has_lost(const struct sim_disk *disk);
/* The disk holds these bytes, durably, and nothing else ever was. */
void sim_disk_reset(struct sim_disk *disk, const uint8_t *image);
/* What a power cut leaves: drawn by chance into `image` (size bytes). */
void sim_disk_crash(const struct sim_disk *disk, struct sim_random *random, uint8_t *image);
/* The same, where somebody picks: a number below `bound` for each sector that could hold several things, 0 the newest. */
typedef uint64_t sim_pick(void *context, uint64_t bound);
void sim_disk_crash_by(const struct sim_disk *disk, sim_pick *pick, void *context, uint8_t *image);

#endif
