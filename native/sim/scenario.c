/*
 * See scenario.h. Invariants: runs are gapless in the volume, disjoint on the disks, and between them lie bytes that
 * nobody may write.
 */
#include "sim/scenario.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "limits.h"
#include "nbdvvol.h"

#define GAP_BYTE 0xa5

static uint64_t below(struct scenario *scenario, uint64_t bound)
{
    return sim_random_below(&scenario->random, bound);
}

static bool chance(struct scenario *scenario, unsigned of_1024)
{
    return sim_random_chance(&scenario->random, of_1024);
}

/* Half of the worlds only reorder and delay; the others fail in one or two ways each. */
static void draw_faults(struct scenario *scenario)
{
    struct nv_sim_faults *faults = &scenario->faults;

    faults->short_transfer = (uint16_t)below(scenario, 200);
    faults->delay = (uint16_t)below(scenario, 300);
    faults->stall = chance(scenario, 300) ? (uint16_t)below(scenario, 30) : 0;
    faults->no_punch = chance(scenario, 200);
    faults->no_zero_range = chance(scenario, 200);
    if (chance(scenario, 512))
        return;
    if (chance(scenario, 512))
        faults->read_error = (uint16_t)below(scenario, 50);
    if (chance(scenario, 512)) {
        faults->write_error = (uint16_t)below(scenario, 50);
        faults->punch_error = (uint16_t)below(scenario, 50);
    }
    if (chance(scenario, 600)) {
        faults->sync_error = (uint16_t)below(scenario, 150);
        faults->dsync_error = (uint16_t)below(scenario, 100);
    }
}

static void draw_runs(struct scenario *scenario)
{
    uint64_t at = 0, size = scenario->cells_final * scenario->cell_bytes, top[SCENARIO_DISKS] = {0};
    uint32_t wanted = 1 + (uint32_t)below(scenario, SCENARIO_RUNS);

    while (at < size) {
        struct scenario_run *run = &scenario->runs[scenario->run_count++];
        uint64_t left = size - at;
        run->disk = (uint32_t)below(scenario, SCENARIO_DISKS);
        run->offset = at;
        run->length = left;
        if (scenario->run_count < wanted)
            run->length = (1 + below(scenario, left / scenario->cell_bytes)) * scenario->cell_bytes;
        top[run->disk] += below(scenario, 8) * scenario->cell_bytes;
        run->object_offset = top[run->disk];
        top[run->disk] += run->length;
        at += run->length;
    }
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++) {
        scenario->disk_size[i] = (top[i] + scenario->cell_bytes + SIM_BLOCK - 1) / SIM_BLOCK * SIM_BLOCK + SIM_BLOCK;
        scenario->meta[i].offset = scenario->disk_size[i] - SIM_BLOCK;
    }
    assert(scenario->run_count <= SCENARIO_RUNS);
    if (scenario->run_count > 1 && chance(scenario, 200)) {
        struct scenario_run *run = &scenario->runs[below(scenario, scenario->run_count)];
        run->state = NV_RUN_ZERO;
        scenario->zero_from = run->offset;
        scenario->zero_to = run->offset + run->length;
    }
}

/*
 * A log in a third of the worlds, where no read fails: what it then loses is another judge's business (log_model.h). All of
 * the volume has storage, and it grows from a multiple of the log's block.
 */
static void draw_log(struct scenario *scenario)
{
    struct scenario_log *log = &scenario->log;
    const uint64_t unit = NV_LOG_UNIT / scenario->cell_bytes;

    log->random.state = scenario->seed ^ 0x6c6f67206c6f6721ull;
    if (!sim_random_chance(&log->random, 420) || scenario->faults.read_error)
        return;
    log->size = NV_LOG_RING + NV_LOG_RING_MIN + sim_random_below(&log->random, 64) * NV_LOG_UNIT;
    log->image = calloc(1, log->size);
    assert(log->image);
    log->policy.age_ms = (uint32_t)sim_random_below(&log->random, 400);
    if (sim_random_chance(&log->random, 512))
        log->policy.bypass_bytes = (1 + (uint32_t)sim_random_below(&log->random, 16)) * NV_LOG_UNIT;
    if (sim_random_chance(&log->random, 300))
        log->policy.stream_bytes = 16u << 10;
    if (scenario->seed % 4 == 0)
        log->policy.destage_rate = 4096ull << scenario->seed / 4 % 12;
    if (scenario->cells_first < scenario->cells_final)
        scenario->cells_first = scenario->cells_first / unit * unit;
    if (scenario->cells_first < 64)
        scenario->cells_first = scenario->cells_final;
    for (uint32_t i = 0; i < scenario->run_count; i++)
        scenario->runs[i].state = NV_RUN_MAPPED;
    scenario->zero_from = scenario->zero_to = 0;
}

static void make_images(struct scenario *scenario)
{
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++) {
        scenario->image[i] = malloc(scenario->disk_size[i]);
        assert(scenario->image[i]);
        memset(scenario->image[i], GAP_BYTE, scenario->disk_size[i]);
        memset(scenario->image[i] + scenario->meta[i].offset, 0, META_BYTES);
    }
    for (uint32_t i = 0; i < scenario->run_count; i++)
        if (scenario->runs[i].state == NV_RUN_MAPPED)
            memset(scenario->image[scenario->runs[i].disk] + scenario->runs[i].object_offset, 0,
                   scenario->runs[i].length);
}

void scenario_draw(struct scenario *scenario, uint64_t seed)
{
    *scenario = (struct scenario){.seed = seed, .random = {seed * 0x2545f4914f6cdd1dull + 1}};
    draw_faults(scenario);
    scenario->reactors = 1 + (uint32_t)below(scenario, 3);
    scenario->lives = 1 + (uint32_t)below(scenario, 3);
    scenario->steps = 200 + (uint32_t)below(scenario, 1500);
    scenario->cell_bytes = chance(scenario, 300) ? 8 : 512;
    scenario->faults.atom = scenario->cell_bytes; /* a read during a write may see part of it, but whole cells */
    scenario->block_min = chance(scenario, 512) ? scenario->cell_bytes : 1;
    scenario->align = 1;
    if (scenario->cell_bytes == 512 && chance(scenario, 300))
        scenario->align = scenario->block_min = 512;
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++)
        scenario->in_memory[i] = scenario->align == 1 && chance(scenario, 512);
    scenario->faults.bad_view = chance(scenario, 300) ? (uint16_t)below(scenario, 200) : 0;
    scenario->cells_final = 64 + below(scenario, 512);
    scenario->cells_first = scenario->cells_final;
    if (chance(scenario, 300))
        scenario->cells_first = 64 + below(scenario, scenario->cells_final - 63);
    draw_runs(scenario);
    scenario->limited = chance(scenario, 400);
    if (chance(scenario, 600)) /* from a fraction of the volume up to more than all of it */
        scenario->cache_frames = NV_CACHE_FRAMES_MIN << below(scenario, 2);
    draw_log(scenario);
    make_images(scenario);
}

void scenario_free(struct scenario *scenario)
{
    for (uint32_t i = 0; i < SCENARIO_DISKS; i++)
        free(scenario->image[i]);
    free(scenario->log.image);
}

uint64_t scenario_describe(const struct scenario *scenario, uint64_t cells, const uint32_t objects[SCENARIO_DISKS],
                           uint64_t map_from, uint64_t map_to, uint8_t out[1024])
{
    nv_desc_header header = {
        .magic = NV_DESC_MAGIC, .version = NV_DESC_VERSION, .size = cells * scenario->cell_bytes, .epoch = 1,
        .generation = 1, .map_from = map_from, .map_to = map_to, .block_min = scenario->block_min, .leg_count = 1,
    };
    nv_desc_leg leg = {.id = 1, .state = NV_LEG_IN_SYNC};
    uint8_t *to = out + sizeof header + sizeof leg;

    for (uint32_t i = 0; i < scenario->run_count && scenario->runs[i].offset < header.size; i++, leg.run_count++) {
        const struct scenario_run *run = &scenario->runs[i];
        uint64_t left = header.size - run->offset;
        nv_desc_run record = {run->offset, run->length < left ? run->length : left, run->object_offset,
                              objects[run->disk], run->state};
        memcpy(to, &record, sizeof record);
        to += sizeof record;
    }
    header.length = (uint64_t)(to - out);
    memcpy(out, &header, sizeof header);
    memcpy(out + sizeof header, &leg, sizeof leg);
    assert(header.length <= 1024);
    return header.length;
}

bool scenario_uses(const struct scenario *scenario, uint32_t disk, uint64_t cells)
{
    for (uint32_t i = 0; i < scenario->run_count; i++)
        if (scenario->runs[i].disk == disk && scenario->runs[i].state == NV_RUN_MAPPED &&
            scenario->runs[i].offset < cells * scenario->cell_bytes)
            return true;
    return false;
}

void scenario_check_gaps(const struct scenario *scenario)
{
    for (uint32_t disk = 0; disk < SCENARIO_DISKS; disk++)
        for (uint64_t at = 0; at < scenario->disk_size[disk];) {
            uint64_t next = at == scenario->meta[disk].offset ? at + META_BYTES : at + 1;
            for (uint32_t i = 0; i < scenario->run_count; i++) {
                const struct scenario_run *run = &scenario->runs[i];
                if (run->state == NV_RUN_MAPPED && run->disk == disk && at >= run->object_offset && at < run->object_offset + run->length)
                    next = run->object_offset + run->length;
            }
            if (next == at + 1 && scenario->image[disk][at] != GAP_BYTE)
                nv_sim_violation("byte %llu of disk %u belongs to no run and was written", (unsigned long long)at, disk);
            at = next;
        }
}
