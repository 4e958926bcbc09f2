/*
 * See farm.h. Runs of a leg are gapless in the volume and disjoint on its disk; the metadata region is the disk's end.
 */
#include "sim/farm.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "volume/meta.h"

#define BITMAP_BYTES (2u * NV_META_PAGE)
#define REGION_BYTES (NV_META_BITMAPS + 2u * BITMAP_BYTES)

/* ---- drawing ---- */

static uint16_t sometimes(struct farm *farm, unsigned how_often, unsigned most)
{
    return farm_chance(farm, how_often) ? (uint16_t)(1 + farm_below(farm, most)) : 0;
}

static void draw_troubles(struct farm *farm)
{
    farm->faults.short_transfer = (uint16_t)farm_below(farm, 200);
    farm->faults.delay = (uint16_t)farm_below(farm, 300);
    farm->faults.stall = sometimes(farm, 200, 20);
    farm->faults.no_punch = farm_chance(farm, 200);
    farm->faults.no_zero_range = farm_chance(farm, 200);
    farm->faults.atom = farm->cell_bytes;
    farm->must_serve = farm_chance(farm, 512);
    farm->good = farm->must_serve || farm_chance(farm, 512) ? (uint32_t)farm_below(farm, farm->leg_count) : FARM_LEGS;
    if (farm_chance(farm, 200))
        return;
    farm->hang = sometimes(farm, 400, 4);
    farm->drop = sometimes(farm, 500, 6);
    farm->reboot = sometimes(farm, 300, 4);
    farm->leg_errors = sometimes(farm, 300, 60);
    farm->sync_errors = sometimes(farm, 200, 150);
    farm->cut = farm->must_serve ? 0 : sometimes(farm, 400, 4);
    farm->kill = sometimes(farm, 800, 6);
    farm->rebind = sometimes(farm, 300, 4);
    farm->spoil = sometimes(farm, 300, 300);
    farm->swap = sometimes(farm, 200, 300);
    farm->jump = sometimes(farm, 200, 3);
}

static void draw_runs(struct farm *farm, struct farm_leg *leg)
{
    uint64_t at = 0, top = 0;
    uint32_t wanted = 1 + (uint32_t)farm_below(farm, FARM_RUNS);

    while (at < farm->size) {
        struct farm_run *run = &leg->runs[leg->run_count++];
        const uint64_t left = farm->size - at;
        top += farm_below(farm, 4) * farm->cell_bytes * (512 / farm->cell_bytes);
        *run = (struct farm_run){.offset = at, .length = left, .object_offset = top};
        if (leg->run_count < wanted && left > 512)
            run->length = (1 + farm_below(farm, left / 512)) * 512;
        top += run->length;
        at += run->length;
    }
    leg->meta_offset = (top + SIM_BLOCK - 1) / SIM_BLOCK * SIM_BLOCK;
    leg->disk_size = leg->meta_offset + REGION_BYTES;
}

void farm_draw(struct farm *farm, uint64_t seed)
{
    *farm = (struct farm){.seed = seed, .random = {seed * 0x9e3779b97f4a7c15ull + 77}, .owner = FARM_HOSTS};
    farm->reactors = 1 + (uint32_t)farm_below(farm, 2);
    farm->lives = 1 + (uint32_t)farm_below(farm, 3);
    farm->steps = 300 + (uint32_t)farm_below(farm, 1500);
    farm->cell_bytes = farm_chance(farm, 200) ? 8 : 512;
    farm->block_min = farm_chance(farm, 512) ? farm->cell_bytes : 1;
    farm->align = 1;
    if (farm->cell_bytes == 512 && farm_chance(farm, 300))
        farm->align = farm->block_min = 512;
    farm->cells = 64 + farm_below(farm, 192);
    farm->size = farm->cells * farm->cell_bytes;
    farm->leg_count = 2 + (uint32_t)farm_below(farm, farm_chance(farm, 512) ? 1 : FARM_LEGS - 1);
    farm->region_shift = (farm->cell_bytes == 8 ? 9 : 10) + (uint32_t)farm_below(farm, 5);
    farm->policy = (nv_desc_mirror){
        .region_shift = farm->region_shift, .read_policy = (uint32_t)farm_below(farm, 3),
        .op_deadline_ms = 500 + (uint32_t)farm_below(farm, 3000), .hold_deadline_ms = (uint32_t)farm_below(farm, 8000),
        .intent_idle_ms = (uint32_t)farm_below(farm, 1500), .resync_rate = farm_chance(farm, 300) ? 1u << 20 : 0};
    if (farm->size % 512 == 0 && farm->size >= 4096 && farm_chance(farm, 100)) {
        farm->zero_from = farm->size / 1024 * 512;
        farm->zero_to = farm->zero_from + 512;
    }
    draw_troubles(farm);
    farm->in_memory = farm->align == 1 && farm_chance(farm, 150);
    farm->host_count = farm->in_memory ? 1 : FARM_HOSTS;
    if (farm->in_memory)
        farm->hang = farm->drop = farm->swap = 0;
    if (farm->must_serve) { /* slow is not hung, and nobody gives up */
        farm->policy.hold_deadline_ms = NV_DEADLINE_MAX_MS;
        farm->policy.op_deadline_ms = 20000;
        farm->faults.stall = farm->jump = 0;
    }
    for (uint32_t i = 0; i < 16; i++)
        farm->uuid[i] = (uint8_t)farm_below(farm, 256);
    for (uint32_t leg = 0; leg < farm->leg_count; leg++)
        draw_runs(farm, &farm->legs[leg]);
}

void farm_plain(struct farm *farm)
{
    *farm = (struct farm){.seed = 1, .random = {77}, .owner = FARM_HOSTS, .reactors = 1, .cell_bytes = 512, .block_min = 512,
                          .align = 1, .cells = 8, .size = 8u * 512u, .leg_count = 2, .host_count = FARM_HOSTS,
                          .region_shift = 10, .good = FARM_LEGS};
    farm->policy = (nv_desc_mirror){.region_shift = farm->region_shift, .op_deadline_ms = 3000, .hold_deadline_ms = 5000,
                                    .intent_idle_ms = 300};
    farm->faults.atom = farm->cell_bytes;
    memset(farm->uuid, 0x5a, sizeof farm->uuid);
    for (uint32_t leg = 0; leg < farm->leg_count; leg++) {
        farm->legs[leg].runs[0] = (struct farm_run){.length = farm->size};
        farm->legs[leg].run_count = 1;
        farm->legs[leg].meta_offset = farm->size;
        farm->legs[leg].disk_size = farm->legs[leg].meta_offset + REGION_BYTES;
    }
}

static void put_label(const struct farm *farm, uint32_t leg, uint8_t *region)
{
    struct nv_label label = {.leg = FARM_LEG_ID(leg), .epoch = 0, .generation = 1, .size = farm->size, .sequence = 1};

    memcpy(label.uuid, farm->uuid, sizeof label.uuid);
    nv_label_encode(&label, region + NV_META_PAGE);
}

void farm_make_disks(struct farm *farm)
{
    farm->registry = (nv_legs_record){.generation = 1, .leg_count = farm->leg_count};
    for (uint32_t i = 0; i < farm->leg_count; i++) {
        struct farm_leg *leg = &farm->legs[i];
        uint8_t *image = calloc(1, leg->disk_size);
        assert(image);
        memset(image, 0xa5, leg->meta_offset);
        for (uint32_t j = 0; j < leg->run_count; j++)
            memset(image + leg->runs[j].object_offset, 0, leg->runs[j].length);
        put_label(farm, i, image + leg->meta_offset);
        leg->file = nv_sim_file(sim_disk_create(image, leg->disk_size), farm->align, farm->in_memory);
        leg->path = i;
        leg->snapshot = image;
        leg->snapshot_generation = 1;
        farm->registry.legs[i] = (nv_leg_record){.id = FARM_LEG_ID(i), .state = NV_LEG_IN_SYNC, .stamp_generation = 1};
    }
}

void farm_free(struct farm *farm)
{
    for (uint32_t i = 0; i < farm->leg_count; i++)
        free(farm->legs[i].snapshot);
}

/* ---- the registry ---- */

bool farm_in_sync(const struct farm *farm, uint32_t leg)
{
    return farm->registry.legs[leg].state == NV_LEG_IN_SYNC;
}

static uint32_t count_in_sync(const struct farm *farm)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < farm->leg_count; i++)
        count += farm_in_sync(farm, i);
    return count;
}

static void stamp(nv_leg_record *leg, const nv_legs_action *ask)
{
    if (ask->stamp_epoch >= leg->stamp_epoch && ask->stamp_generation >= leg->stamp_generation) {
        leg->stamp_epoch = ask->stamp_epoch;
        leg->stamp_generation = ask->stamp_generation;
    }
}

static bool transition(struct farm *farm, nv_leg_record *leg, const nv_legs_action *ask)
{
    switch (ask->ask) {
    case NV_ASK_STALE:
        if (leg->state == NV_LEG_STALE || (leg->state == NV_LEG_IN_SYNC && count_in_sync(farm) == 1))
            return false;
        leg->state = NV_LEG_STALE;
        return true;
    case NV_ASK_SYNCING:
        if (leg->state != NV_LEG_STALE)
            return false;
        leg->state = NV_LEG_SYNCING;
        return true;
    default:
        if (leg->state != NV_LEG_SYNCING)
            return false;
        leg->state = NV_LEG_IN_SYNC;
        stamp(leg, ask);
        farm->legs[ask->leg - FARM_LEG_ID(0)].spoiled = false;
        farm->legs[ask->leg - FARM_LEG_ID(0)].rebooted = false;
        return true;
    }
}

void farm_apply(struct farm *farm, const nv_legs_action *ask)
{
    nv_leg_record *leg = &farm->registry.legs[ask->leg - FARM_LEG_ID(0)];

    assert(ask->leg >= FARM_LEG_ID(0) && ask->leg < FARM_LEG_ID(farm->leg_count));
    if (ask->epoch != farm->registry.epoch)
        return;
    if (ask->ask == NV_ASK_CONFIRM) {
        if (ask->stamp_epoch <= farm->registry.epoch && ask->stamp_generation <= farm->registry.generation)
            stamp(leg, ask);
        return;
    }
    if (ask->generation != farm->registry.generation || !transition(farm, leg, ask))
        return;
    if (farm->must_serve && ask->ask == NV_ASK_STALE && ask->leg == FARM_LEG_ID(farm->good))
        nv_sim_violation("leg %u is called stale, and it never had a trouble", ask->leg);
    farm->registry.generation++;
    farm->commits++;
    if (farm->rules.trace)
        printf("-- registry: leg %u state %u, generation %llu\n", ask->leg, leg->state,
               (unsigned long long)farm->registry.generation);
}

/* ---- the link ---- */

void farm_send(struct farm *farm, const struct farm_message *message)
{
    if (farm->cut_off[message->host] || farm->message_count + 2 > FARM_MESSAGES)
        return; /* lost: who asked asks again when the link is back */
    farm->messages[farm->message_count++] = *message;
    if (farm_chance(farm, 100)) /* said twice */
        farm->messages[farm->message_count++] = *message;
}

static struct farm_message take_message(struct farm *farm, uint32_t index)
{
    struct farm_message message = farm->messages[index];

    farm->messages[index] = farm->messages[--farm->message_count];
    return message;
}

bool farm_receive(struct farm *farm, uint32_t host, struct farm_message *out)
{
    uint32_t start = (uint32_t)farm_below(farm, farm->message_count);

    for (uint32_t i = 0; i < farm->message_count; i++) {
        uint32_t index = (start + i) % farm->message_count;
        if (farm->messages[index].host != host)
            continue;
        *out = take_message(farm, index);
        if (!out->ask)
            return true;
        farm_apply(farm, &out->action);
        out->ask = false;
        out->record = farm->registry;
        farm_send(farm, out);
        return false; /* the answer is on its way */
    }
    return false;
}

void farm_cut(struct farm *farm, uint32_t host)
{
    farm->cut_off[host] = true;
    for (uint32_t i = 0; i < farm->message_count;) {
        if (farm->messages[i].host == host)
            take_message(farm, i);
        else
            i++;
    }
}

/* ---- disks ---- */

void farm_fence(int file)
{
    nv_sim_trouble(file)->fenced = true;
}

void farm_power_cut(struct farm *farm, uint32_t index)
{
    struct farm_leg *leg = &farm->legs[index];
    struct sim_disk *disk = nv_sim_disk(leg->file);
    uint8_t *image = malloc(leg->disk_size);

    assert(image);
    if (farm->pick)
        sim_disk_crash_by(disk, farm->pick, farm->pick_context, image);
    else
        sim_disk_crash(disk, &farm->random, image);
    sim_disk_reset(disk, image);
    free(image);
    leg->rebooted = true;
}

void farm_take_snapshot(struct farm *farm, uint32_t index)
{
    struct farm_leg *leg = &farm->legs[index];

    memcpy(leg->snapshot, sim_disk_bytes(nv_sim_disk(leg->file)), leg->disk_size);
    leg->snapshot_epoch = farm->registry.legs[index].stamp_epoch;
    leg->snapshot_generation = farm->registry.legs[index].stamp_generation;
}

/* The label in the snapshot may be newer than the stamp was; what counts is what the registry knows now. */
bool farm_roll_back(struct farm *farm, uint32_t index)
{
    struct farm_leg *leg = &farm->legs[index];
    const nv_leg_record *record = &farm->registry.legs[index];
    struct nv_label label;

    if (!nv_label_decode(leg->snapshot + leg->meta_offset, &label) ||
        (label.epoch >= record->stamp_epoch && label.generation >= record->stamp_generation))
        return false;
    sim_disk_reset(nv_sim_disk(leg->file), leg->snapshot);
    leg->spoiled = true;
    return true;
}
