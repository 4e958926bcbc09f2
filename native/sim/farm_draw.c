/*
 * What a seed's farm is, and which troubles it will have (farm.h). Every seed has a mood: of each kind of trouble it knows
 * nothing, a little, or a storm, and it heals quickly or slowly; so that what hides behind one trouble is found in the
 * seeds that do not have it.
 */
#include <string.h>

#include "limits.h"
#include "sim/far_wire.h"
#include "sim/farm.h"
#include "sim/tally.h"
#include "volume/meta.h"

#define BITMAP_BYTES (2u * NV_META_PAGE)
#define REGION_BYTES (NV_META_BITMAPS + 2u * BITMAP_BYTES)

/* A chance in 1024 of something that is tried some dozens of times in a life. */
static uint16_t draw_mood(struct farm *farm)
{
    const uint64_t mood = farm_below(farm, 8);

    if (mood < 3)
        return 0;
    if (mood < 6)
        return (uint16_t)(4 + farm_below(farm, 28));
    return (uint16_t)(32 + farm_below(farm, mood == 6 ? 96 : 300));
}

static uint16_t sometimes(struct farm *farm, unsigned how_often, unsigned most)
{
    return farm_chance(farm, how_often) ? (uint16_t)(1 + farm_below(farm, most)) : 0;
}

static uint16_t between(struct farm *farm, unsigned least, unsigned most)
{
    return (uint16_t)(least + farm_below(farm, most - least + 1));
}

/* How often which step is taken, of 1000. */
static void draw_shares(struct farm *farm)
{
    struct farm_shares *share = &farm->shares;

    share->messages = farm_chance(farm, 200) ? between(farm, 1, 4) : between(farm, 10, 40);
    share->advance = between(farm, 4, farm_chance(farm, 256) ? 120 : 40);
    share->trouble = between(farm, 10, 40);
    share->heal = between(farm, 2, farm_chance(farm, 512) ? 30 : 8);
    share->tend = between(farm, 2, farm_chance(farm, 512) ? 40 : 8);
    share->control = between(farm, 2, 8);
    share->end = between(farm, 1, 6);
}

/* What a filter is to be doing when it dies. */
static void draw_aim(struct farm *farm)
{
    farm->aim = TALLY_KILL_ATTACHING + (uint32_t)farm_below(farm, TALLY_KILL_METADATA - TALLY_KILL_ATTACHING);
    farm->aims = farm->kill ? (uint32_t)farm_below(farm, 4) : 0;
    if (farm->kill && farm_chance(farm, 150)) {
        farm->aim = TALLY_KILL_METADATA;
        farm->aims = 12;
    } else if (farm->kill && farm_chance(farm, 300)) { /* what is soon over, and comes after a resync only */
        farm->aim = farm_chance(farm, 700) ? TALLY_KILL_CHECKPOINT : TALLY_KILL_PROMOTING;
        farm->aims = 4;
        farm->shares.tend = between(farm, 20, 40);
    }
    if (farm->spoil > 400 && farm_chance(farm, 512)) { /* what was decided of such a leg, and is not on disk yet */
        farm->aim = TALLY_KILL_PREPARING;
        farm->aims = 10;
        farm->policy.intent_idle_ms = (uint32_t)farm_below(farm, 300); /* no intent covers it */
        farm->shares.tend = between(farm, 20, 40);
        farm->shares.end = 6;
        farm->kill = (uint16_t)(farm->kill + 100);
    }
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
    draw_shares(farm);
    if (farm_chance(farm, 60))
        return;
    farm->hang = draw_mood(farm);
    farm->drop = draw_mood(farm);
    farm->reboot = draw_mood(farm);
    farm->read_errors = sometimes(farm, 300, farm_chance(farm, 256) ? 300 : 60);
    farm->write_errors = sometimes(farm, 300, farm_chance(farm, 256) ? 200 : 40);
    farm->sync_errors = sometimes(farm, 300, 150);
    farm->cut = farm->must_serve ? 0 : draw_mood(farm);
    farm->kill = draw_mood(farm);
    farm->rebind = draw_mood(farm);
    farm->spoil = sometimes(farm, 512, 1024);
    farm->swap = sometimes(farm, 512, 700);
    farm->jump = draw_mood(farm);
    farm->hasty = sometimes(farm, 256, 512);
    draw_aim(farm);
}

/*
 * Of the seeds that know of hangs some know of little else: time to lose the leg, to resync it, and for more writes, before
 * the old ones land; an end of the filter would have their places reconciled.
 */
static void draw_sticky(struct farm *farm)
{
    farm->sticky = !farm->in_memory && farm->hang && farm_chance(farm, 200);
    if (!farm->sticky)
        return;
    farm->must_serve = false;
    farm->lives = 1;
    farm->steps = 1500;
    farm->policy.op_deadline_ms = 300;
    farm->policy.intent_idle_ms = 300;
    farm->hang = between(farm, 20, 100);
    farm->drop = farm->reboot = farm->kill = farm->rebind = farm->cut = farm->jump = 0;
    farm->read_errors = farm->write_errors = farm->sync_errors = farm->aims = 0;
    farm->shares.advance = between(farm, 20, 60);
    farm->shares.tend = between(farm, 20, 60);
    farm->shares.heal = between(farm, 10, 30);
    farm->shares.end = 0;
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

static void draw_shape(struct farm *farm)
{
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
        .op_deadline_ms = 300 + (uint32_t)farm_below(farm, farm_chance(farm, 512) ? 500 : 3000), .hold_deadline_ms = (uint32_t)farm_below(farm, 8000),
        .intent_idle_ms = (uint32_t)farm_below(farm, 1500), .resync_rate = farm_chance(farm, 300) ? 1u << 20 : 0};
    if (farm->size % 512 == 0 && farm->size >= 4096 && farm_chance(farm, 100)) {
        farm->zero_from = farm->size / 1024 * 512;
        farm->zero_to = farm->zero_from + 512;
    }
}

/* Hits ask no leg: only a lease keeps a host from serving them when another one has the volume already. */
static void draw_cache(struct farm *farm)
{
    farm->leased = farm_chance(farm, 200);
    if (farm->in_memory || !farm_chance(farm, 350))
        return;
    farm->leased = true;
    if (farm_chance(farm, 300))
        farm->rebind = (uint16_t)(farm->rebind + 40);
    farm->cache_frames = NV_CACHE_FRAMES_MIN << farm_below(farm, 2);
    farm->cache_mode = farm_chance(farm, 512) ? NV_CACHE_MODE_READ : NV_CACHE_MODE_WRITETHROUGH;
}

static uint32_t draw_far_flags(struct sim_random *random)
{
    uint32_t flags = FAR_T_HAS_FLAGS | FAR_T_FLUSH | (sim_random_chance(random, 800) ? FAR_T_MULTI : 0) |
                     (sim_random_chance(random, 700) ? FAR_T_FUA : 0) | (sim_random_chance(random, 800) ? FAR_T_TRIM : 0) |
                     (sim_random_chance(random, 800) ? FAR_T_ZEROES : 0) | (sim_random_chance(random, 512) ? FAR_T_CACHE : 0);

    return flags | ((flags & FAR_T_ZEROES) && sim_random_chance(random, 512) ? FAR_T_FAST : 0);
}

static void draw_far_leg(struct farm *farm, struct farm_leg *leg, struct sim_random *random)
{
    leg->far = true;
    leg->claims = sim_random_chance(random, 512);
    leg->far_flags = draw_far_flags(random);
    leg->far_payload = sim_random_chance(random, 256) ? 8192 : 32u << 20;
    if (farm->reboot)
        farm->reboot = (uint16_t)(farm->reboot + 60);
}

/* Time for a client to give a server up, for its mirror to go on, and for the server to do then what it was asked before. */
static void draw_silence(struct farm *farm, struct sim_random *random)
{
    farm->hang = (uint16_t)(farm->hang + 60);
    farm->shares.advance = (uint16_t)(60 + sim_random_below(random, 60));
    farm->shares.heal = (uint16_t)(4 + sim_random_below(random, 8));
    if (sim_random_chance(random, 256))
        return;
    farm->lives = 1;
    farm->steps = 2000;
    farm->drop = farm->reboot = farm->kill = farm->rebind = farm->jump = 0;
    farm->read_errors = farm->write_errors = farm->sync_errors = 0;
    farm->aims = farm->shares.end = 0;
    if (sim_random_chance(random, 400))
        return;
    farm->hang = 0; /* of single connections: what is sent anew is answered, while the mirror still waits for the old copy */
    farm->silence = (uint16_t)(200 + sim_random_below(random, 400));
    farm->shares.trouble = 40;
    farm->policy.op_deadline_ms = 6000;
    farm->corner = 16;
    for (uint32_t i = 0; i < farm->leg_count; i++) {
        farm->legs[i].far_timeout_ms = 250;
        farm->legs[i].far_hold_ms = 250 + (uint32_t)sim_random_below(random, 500);
        farm->legs[i].far_flags |= farm->legs[i].far ? FAR_T_MULTI : 0;
    }
}

/*
 * Legs behind servers. Some seeds are about silence: servers that hang for longer than their clients wait for them. The
 * chance is its own: seeds without any such leg are what they would be if there were none.
 */
static void draw_far(struct farm *farm)
{
    struct sim_random random = {farm->seed * 0x9e3779b97f4a7c15ull + 101};
    const bool any = !farm->in_memory && sim_random_chance(&random, 400);
    const bool silent = any && !farm->must_serve && farm->hang && sim_random_chance(&random, 800);
    const uint32_t timeout_ms = farm->must_serve ? 20000 : 250 + (uint32_t)sim_random_below(&random, silent ? 500 : 4000);

    for (uint32_t i = 0; any && i < farm->leg_count; i++) {
        farm->legs[i].far_timeout_ms = timeout_ms;
        farm->legs[i].far_hold_ms = timeout_ms / 2 + (uint32_t)sim_random_below(&random, timeout_ms);
        if (sim_random_chance(&random, 600))
            draw_far_leg(farm, &farm->legs[i], &random);
    }
    if (silent)
        draw_silence(farm, &random);
}

/*
 * A log at each host. What it answers asks no leg: only a lease keeps a host from that when another one has the volume
 * already. All of the volume has storage.
 */
static void draw_log(struct farm *farm)
{
    struct farm_log *log = &farm->log;

    log->random.state = farm->seed ^ 0x6d6c6f676d6c6f67ull;
    if (farm->in_memory || farm->sticky || !sim_random_chance(&log->random, 300))
        return;
    farm->leased = true;
    farm->zero_from = farm->zero_to = 0;
    log->size = NV_LOG_RING + NV_LOG_RING_MIN + sim_random_below(&log->random, 64) * NV_LOG_UNIT;
    log->policy.age_ms = (uint32_t)sim_random_below(&log->random, 400);
    if (sim_random_chance(&log->random, 512))
        log->policy.bypass_bytes = (1 + (uint32_t)sim_random_below(&log->random, 16)) * NV_LOG_UNIT;
    if (sim_random_chance(&log->random, 300))
        log->policy.stream_bytes = 16u << 10;
    log->bad_luck.state = farm->seed ^ 0x6261646c75636b21ull;
    log->troubled = sim_random_chance(&log->bad_luck, 300);
    if (log->troubled && sim_random_chance(&log->bad_luck, 700))
        log->policy.deadline_ms = 100 + (uint32_t)sim_random_below(&log->bad_luck, 1000);
}

void farm_draw(struct farm *farm, uint64_t seed)
{
    *farm = (struct farm){.seed = seed, .random = {seed * 0x9e3779b97f4a7c15ull + 77}, .owner = FARM_HOSTS,
                           .corner = 48};
    draw_shape(farm);
    draw_troubles(farm);
    farm->in_memory = farm->align == 1 && farm_chance(farm, 150);
    farm->host_count = farm->in_memory ? 1 : FARM_HOSTS;
    if (farm->in_memory)
        farm->hang = farm->drop = farm->swap = 0;
    draw_sticky(farm);
    if (farm->must_serve) { /* slow is not hung, and nobody gives up */
        farm->policy.hold_deadline_ms = NV_DEADLINE_MAX_MS;
        farm->policy.op_deadline_ms = 20000;
        farm->faults.stall = farm->jump = 0;
    }
    draw_cache(farm);
    for (uint32_t i = 0; i < 16; i++)
        farm->uuid[i] = (uint8_t)farm_below(farm, 256);
    for (uint32_t leg = 0; leg < farm->leg_count; leg++)
        draw_runs(farm, &farm->legs[leg]);
    draw_far(farm);
    draw_log(farm);
}

void farm_plain(struct farm *farm)
{
    *farm = (struct farm){.seed = 1, .random = {77}, .owner = FARM_HOSTS, .reactors = 1, .cell_bytes = 512, .block_min = 512,
                          .align = 1, .cells = 8, .corner = 8, .size = 8u * 512u, .leg_count = 2, .host_count = FARM_HOSTS,
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
