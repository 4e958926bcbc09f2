/*
 * See farm.h. Runs of a leg are gapless in the volume and disjoint on its disk; the metadata region is the disk's end.
 */
#include "sim/farm.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim/disk.h"
#include "sim/tally.h"
#include "volume/meta.h"

#define MESSAGE_LATE_STEPS 300u

static void put_label(const struct farm *farm, uint32_t leg, uint8_t *region)
{
    struct nv_label label = {.leg = FARM_LEG_ID(leg), .epoch = 0, .generation = 1, .size = farm->size, .sequence = 1};

    memcpy(label.uuid, farm->uuid, sizeof label.uuid);
    nv_label_encode(&label, region + NV_META_PAGE);
}

static void make_logs(struct farm *farm)
{
    uint8_t *image = calloc(1, farm->log.size);

    assert(image);
    for (uint32_t i = 0; i < FARM_HOSTS; i++)
        farm->log.files[i] = nv_sim_file(sim_disk_create(image, farm->log.size), 1, false);
    free(image);
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
        sim_disk_watch(nv_sim_disk(leg->file), leg->meta_offset);
        leg->path = i;
        leg->snapshot = image;
        leg->snapshot_generation = 1;
        farm->registry.legs[i] = (nv_leg_record){.id = FARM_LEG_ID(i), .state = NV_LEG_IN_SYNC, .stamp_generation = 1};
    }
    if (farm->log.size)
        make_logs(farm);
}

void farm_power_cut_logs(struct farm *farm)
{
    uint8_t *image = farm->log.size ? malloc(farm->log.size) : NULL;

    for (uint32_t i = 0; image && i < FARM_HOSTS; i++) {
        struct sim_disk *disk = nv_sim_disk(farm->log.files[i]);
        sim_disk_crash(disk, &farm->log.random, image);
        sim_disk_reset(disk, image);
    }
    free(image);
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
        farm_made_whole(farm, ask->leg - FARM_LEG_ID(0), farm->legs[ask->leg - FARM_LEG_ID(0)].resync_step);
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
    farm->messages[farm->message_count] = *message;
    farm->messages[farm->message_count++].sent_step = farm->now;
    if (!farm_chance(farm, 100))
        return;
    tally(TALLY_TWICE);
    farm->messages[farm->message_count] = farm->messages[farm->message_count - 1];
    farm->message_count++;
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
        if (farm->now - out->sent_step > MESSAGE_LATE_STEPS)
            tally(TALLY_LATE_MESSAGE);
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

bool farm_outclaimed(uint64_t epoch, uint32_t attempt, uint64_t by_epoch, uint32_t by_attempt)
{
    return epoch < by_epoch || (epoch == by_epoch && attempt < by_attempt);
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
    if (memcmp(image, sim_disk_bytes(disk), leg->disk_size) != 0)
        tally(TALLY_LOST);
    sim_disk_reset(disk, image);
    free(image);
    leg->rebooted = true;
    leg->rebooted_step = farm->now;
}

void farm_made_whole(struct farm *farm, uint32_t index, uint64_t since_step)
{
    if (farm->legs[index].rebooted_step <= since_step)
        farm->legs[index].rebooted = false;
}

bool farm_wrote_metadata(struct farm *farm)
{
    const uint64_t before = farm->metadata_writes;

    farm->metadata_writes = 0;
    for (uint32_t leg = 0; leg < farm->leg_count; leg++)
        farm->metadata_writes += sim_disk_watched(nv_sim_disk(farm->legs[leg].file));
    return farm->metadata_writes != before;
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
    tally(TALLY_ROLL_BACK);
    return true;
}
