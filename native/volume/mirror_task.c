/*
 * A mirror's long operations, one at a time: release after a failure, promotion, checkpoints of a resync, new labels,
 * lazy clearing, the end. (Attach and the start of a resync: mirror_attach.c.) Each is a chain of steps on metadata;
 * a step that finds its leg lost goes on with the others. Invariant: labels and pages of dirty maps are written by the
 * task that runs, and by nobody else, so that each has one write under way.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "volume/meta.h"
#include "volume/mirror_state.h"

static void next_label(struct nv_mirror *mirror);
static void next_dirty_page(struct nv_mirror *mirror);

void nv_task_end(struct nv_mirror *mirror)
{
    memset(&mirror->task, 0, sizeof mirror->task);
    nv_mirror_show(mirror);
}

static void begin(struct nv_mirror *mirror, enum nv_task_kind kind)
{
    assert(mirror->task.kind == NV_TASK_NONE);
    mirror->task.kind = kind;
    mirror->task.losses = mirror->losses;
    mirror->task.generation = mirror->generation;
}

/* --- labels --- */

/* The lane could not be labelled. That matters if it is the last in-sync one, or the only one meant. */
static void label_failed(struct nv_mirror *mirror, uint32_t lane, int error)
{
    if ((mirror->in_sync & nv_lane_bit(lane)) || mirror->task.label_syncing)
        mirror->task.error = error;
    next_label(mirror);
}

static void label_written(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    const uint32_t lane = mio->number;
    const bool did = nv_mirror_judge(mio) & nv_lane_bit(lane);

    nv_mio_end(mio);
    if (!did) {
        label_failed(mirror, lane, -EIO);
        return;
    }
    mirror->lanes[lane].label_sequence++;
    next_label(mirror);
}

static bool is_ours(const struct nv_mirror *mirror, const struct nv_label *label, uint32_t lane)
{
    return memcmp(label->uuid, mirror->uuid, sizeof label->uuid) == 0 && label->leg == mirror->lanes[lane].id;
}

/* What stands there is older than us, and ours: else the leg, or we, have no business here. 0 or -errno. */
static int check_label(struct nv_mirror *mirror, uint32_t lane, const uint8_t *slots)
{
    struct nv_lane *at = &mirror->lanes[lane];
    struct nv_label label;

    if (!nv_label_decode(slots, &label))
        return 0;
    if (!is_ours(mirror, &label, lane))
        return -ENXIO;
    if (label.epoch > mirror->epoch) {
        nv_mirror_fence_now(mirror, label.epoch);
        return -ESTALE;
    }
    if (label.sequence > at->label_sequence)
        at->label_sequence = label.sequence;
    return 0;
}

static void label_read(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    const uint32_t lane = mio->number;
    struct nv_lane *at = &mirror->lanes[lane];
    struct nv_label label = {.leg = at->id, .syncing = mirror->task.label_syncing, .epoch = mirror->epoch,
                             .generation = mirror->task.generation, .size = nv_mirror_map(mirror)->size};
    int error = nv_mirror_judge(mio) & nv_lane_bit(lane) ? 0 : -EIO;

    if (!error && (error = check_label(mirror, lane, mio->memory)))
        nv_mirror_fault(mirror, lane, error);
    if (error) {
        nv_mio_end(mio);
        label_failed(mirror, lane, error);
        return;
    }
    memcpy(label.uuid, mirror->uuid, sizeof label.uuid);
    label.sequence = at->label_sequence + 1;
    nv_label_encode(&label, mio->memory);
    nv_mio_round(mio, label_written);
    nv_mio_meta(mio, lane, NV_PIECE_WRITE, label.sequence % 2 * NV_META_PAGE, NV_META_PAGE, mio->memory);
    nv_mio_go(mio);
}

static bool may_label(const struct nv_mirror *mirror, uint32_t lane)
{
    if (mirror->fenced || !nv_lane_present(mirror, lane))
        return false;
    return mirror->task.label_syncing ? mirror->lanes[lane].state == NV_LANE_STALE
                                      : nv_lanes_live(mirror) & nv_lane_bit(lane);
}

static void next_label(struct nv_mirror *mirror)
{
    struct nv_task *task = &mirror->task;
    struct nv_mio *mio;
    uint32_t lane;

    while (task->label_left && !may_label(mirror, (uint32_t)__builtin_ctz(task->label_left)))
        task->label_left &= task->label_left - 1;
    if (mirror->fenced)
        task->error = -ESTALE;
    if (!task->label_left) {
        task->after_labels(mirror);
        return;
    }
    lane = (uint32_t)__builtin_ctz(task->label_left);
    task->label_left &= task->label_left - 1;
    mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);
    mio->number = lane;
    nv_mio_memory(mio, NV_MIO_PAGES);
    nv_mio_round(mio, label_read);
    nv_mio_meta(mio, lane, NV_PIECE_READ, 0, NV_PAGES_BYTES, mio->memory);
    nv_mio_go(mio);
}

void nv_task_labels(struct nv_mirror *mirror, uint8_t lanes, bool syncing, void (*then)(struct nv_mirror *mirror))
{
    mirror->task.label_left = lanes;
    mirror->task.label_syncing = syncing;
    mirror->task.after_labels = then;
    next_label(mirror);
}

/* --- pages of dirty maps --- */

static void dirty_page_written(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    if (nv_mirror_judge(mio) & mirror->in_sync) {
        mirror->intent.dirty_sequence[mio->number]++;
    } else {
        mirror->intent.dirty_unsaved[mio->number] = true;
        mirror->task.error = -EIO;
    }
    nv_mio_end(mio);
    mirror->task.page++;
    next_dirty_page(mirror);
}

static void next_dirty_page(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;
    struct nv_task *task = &mirror->task;
    struct nv_mio *mio;
    uint64_t slot;

    while (task->page < intent->dirty_page_count && !task->forced && !intent->dirty_unsaved[task->page])
        task->page++;
    if (task->page >= intent->dirty_page_count || task->error) {
        task->after_pages(mirror);
        return;
    }
    slot = 2ull * task->page + ((intent->dirty_sequence[task->page] + 1) & 1);
    mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);
    mio->number = task->page;
    nv_dirty_build(mirror, task->page, nv_mio_memory(mio, NV_MIO_PAGES));
    intent->dirty_unsaved[task->page] = false;
    nv_mio_round(mio, dirty_page_written);
    NV_EACH_LANE(lane, nv_lanes_live(mirror)) {
        const uint64_t half = nv_mirror_map(mirror)->by_lane[lane]->bitmap_bytes;
        nv_mio_meta(mio, lane, NV_PIECE_WRITE, NV_META_BITMAPS + half + slot * NV_META_PAGE, NV_META_PAGE, mio->memory);
    }
    nv_mio_go(mio);
}

void nv_task_dirty_pages(struct nv_mirror *mirror, bool forced, void (*then)(struct nv_mirror *mirror))
{
    mirror->task.page = 0;
    mirror->task.forced = forced;
    mirror->task.after_pages = then;
    next_dirty_page(mirror);
}

/* --- release --- */

/* End the queued commands of this kind whose lane is among `lanes`. */
static void end_commands(struct nv_mirror *mirror, enum nv_mirror_command_kind kind, uint8_t lanes, int error)
{
    struct nv_mirror_command **link = &mirror->commands;

    while (*link) {
        struct nv_mirror_command *command = *link;
        bool meant = false;
        for (uint32_t lane = 0; lane < NV_LEGS_MAX; lane++)
            meant |= (lanes & nv_lane_bit(lane)) && mirror->lanes[lane].id == command->leg;
        if (command->kind != kind || !meant) {
            link = &command->next;
            continue;
        }
        *link = command->next;
        nv_mirror_end_command(mirror, command, error);
    }
    mirror->commands_tail = link;
}

static void released(struct nv_mirror *mirror)
{
    const uint8_t lanes = mirror->task.lanes_left;
    const int error = mirror->task.error;

    if (error)
        mirror->committed &= (uint8_t)~lanes; /* the front may try again */
    else
        nv_mirror_unfreeze(mirror, lanes);
    end_commands(mirror, NV_MIRROR_RELEASE, lanes, error);
    nv_task_end(mirror);
}

static void release_dirty(struct nv_mirror *mirror)
{
    if (mirror->task.error)
        released(mirror);
    else
        nv_task_dirty_pages(mirror, false, released);
}

static void begin_release(struct nv_mirror *mirror)
{
    begin(mirror, NV_TASK_RELEASE);
    mirror->task.lanes_left = mirror->committed;
    nv_task_labels(mirror, nv_lanes_counted(mirror), false, release_dirty);
}

void nv_task_release_at_attach(struct nv_mirror *mirror)
{
    const uint8_t lanes = mirror->committed;

    nv_mirror_unfreeze(mirror, lanes);
    end_commands(mirror, NV_MIRROR_RELEASE, lanes, 0);
}

/* --- promotion --- */

static void promoted(struct nv_mirror *mirror)
{
    struct nv_mirror_command *command = mirror->task.command;
    const uint32_t lane = mirror->task.lane;
    int error = mirror->task.error;

    if (mirror->lanes[lane].state != NV_LANE_PROMOTING) {
        error = -ESTALE;
    } else if (!error) {
        mirror->lanes[lane].state = NV_LANE_IN_SYNC;
        mirror->promoting &= (uint8_t)~nv_lane_bit(lane);
        mirror->in_sync |= nv_lane_bit(lane);
    }
    nv_mirror_end_command(mirror, command, error);
    nv_task_end(mirror);
}

static bool begin_promotion(struct nv_mirror *mirror)
{
    struct nv_mirror_command *command = mirror->commands;
    uint32_t lane = 0;

    if (!command || command->kind != NV_MIRROR_PROMOTE)
        return false;
    mirror->commands = command->next;
    if (!mirror->commands)
        mirror->commands_tail = &mirror->commands;
    while (lane < NV_LEGS_MAX && mirror->lanes[lane].id != command->leg)
        lane++;
    if (lane == NV_LEGS_MAX || mirror->lanes[lane].state != NV_LANE_PROMOTING) {
        nv_mirror_end_command(mirror, command, -ESTALE);
        return true;
    }
    begin(mirror, NV_TASK_PROMOTE);
    mirror->task.command = command;
    mirror->task.lane = (uint8_t)lane;
    nv_task_labels(mirror, nv_lanes_counted(mirror), false, promoted);
    return true;
}

/* --- checkpoints of a resync --- */

static void next_finish(struct nv_mirror *mirror);

static bool any_dirty(const struct nv_intent *intent, uint8_t bit)
{
    for (uint32_t region = 0; region < intent->regions; region++)
        if (intent->dirty[region] & bit)
            return true;
    return false;
}

/* Copied, flushed, labelled: from here on the registry may call it in-sync at any moment, so it counts. */
static void lane_finished(struct nv_mirror *mirror)
{
    const uint32_t lane = mirror->task.lane;
    const uint8_t bit = nv_lane_bit(lane);
    struct nv_lane *at = &mirror->lanes[lane];

    if (!mirror->task.error && (mirror->syncing & bit) && !any_dirty(&mirror->intent, bit)) {
        mirror->syncing &= (uint8_t)~bit;
        mirror->promoting |= bit;
        at->state = NV_LANE_PROMOTING;
        at->done.event.args[0] = at->id;
        at->done.event.args[1] = mirror->epoch;
        at->done.event.args[2] = mirror->task.generation;
        nv_mirror_raise(mirror, &at->done);
    }
    next_finish(mirror);
}

static void next_finish(struct nv_mirror *mirror)
{
    struct nv_task *task = &mirror->task;

    task->lanes_left &= mirror->syncing;
    while (task->lanes_left && any_dirty(&mirror->intent, task->lanes_left & -task->lanes_left))
        task->lanes_left &= task->lanes_left - 1;
    if (task->error) /* the last in-sync leg does not take metadata: a leg cannot become in-sync now */
        NV_EACH_LANE(lane, mirror->syncing)
            nv_mirror_lose_syncing(mirror, lane, task->error);
    if (!task->lanes_left || task->error || nv_mirror_frozen(mirror)) {
        mirror->checkpoint_due = false;
        mirror->copier.since_checkpoint = 0;
        mirror->copier.checkpoint_ms = mirror->now_ms;
        mirror->copier.exhausted = false;
        nv_task_end(mirror);
        return;
    }
    task->lane = (uint8_t)__builtin_ctz(task->lanes_left);
    task->lanes_left &= task->lanes_left - 1;
    nv_task_labels(mirror, nv_lane_bit(task->lane), false, lane_finished);
}

/* What was copied before the sync is durable now; a leg that was lost has had its copies forgotten. */
static void checkpoint_synced(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    struct nv_intent *intent = &mirror->intent;
    const uint8_t lanes = nv_mirror_judge(mio) & mirror->syncing;

    nv_mio_end(mio);
    for (uint32_t region = 0; region < intent->regions; region++) {
        const uint8_t durable = intent->copied[region] & lanes;
        if (!durable)
            continue;
        intent->dirty[region] &= (uint8_t)~durable;
        intent->copied[region] &= (uint8_t)~durable;
        intent->dirty_unsaved[region / NV_DIRTY_A_PAGE] = true;
    }
    mirror->task.lanes_left = lanes;
    nv_task_dirty_pages(mirror, false, next_finish);
}

static void begin_checkpoint(struct nv_mirror *mirror)
{
    struct nv_mio *mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);

    assert(mirror->copier.resyncing == 0);
    begin(mirror, NV_TASK_CHECKPOINT);
    nv_mio_round(mio, checkpoint_synced);
    NV_EACH_LANE(lane, mirror->syncing)
        nv_mio_sync(mio, lane);
    nv_mio_go(mio);
}

/* --- new labels after a change --- */

static void relabel_saved(struct nv_mirror *mirror)
{
    mirror->relabelled.event.result = mirror->task.error;
    mirror->relabelled.event.args[1] = mirror->epoch;
    mirror->relabelled.event.args[2] = mirror->task.generation;
    nv_mirror_raise(mirror, &mirror->relabelled);
    nv_task_end(mirror);
}

static void relabelled(struct nv_mirror *mirror)
{
    nv_task_dirty_pages(mirror, true, relabel_saved); /* the table of lanes is new */
}

/* --- lazy clearing, and the end --- */

static void give_up_clearing(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    for (uint32_t region = 0; region < intent->regions; region++)
        if (nv_region_state(intent, region) == NV_REGION_CLEANING)
            nv_intent_set_state(intent, region, NV_REGION_SET);
}

static void clean_ends(struct nv_mirror *mirror)
{
    mirror->clean_due = false;
    if (mirror->task.kind == NV_TASK_END)
        mirror->task.stage = 1;
    else
        nv_task_end(mirror);
}

/* Flushed everywhere, and what stale legs lack is saved: the bits may go. */
static void clean_pages(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    if (mirror->task.error || mirror->losses != mirror->task.losses) {
        give_up_clearing(mirror);
        clean_ends(mirror);
        return;
    }
    for (uint32_t region = 0; region < intent->regions; region++) {
        if (nv_region_state(intent, region) != NV_REGION_CLEANING)
            continue;
        assert(intent->in_flight[region] == 0);
        nv_intent_set_state(intent, region, NV_REGION_CLEARING);
        intent->pages[region / NV_INTENTS_A_PAGE].wanted = true;
    }
    nv_intent_commit(mirror);
    clean_ends(mirror);
}

static void clean_synced(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    if (!(nv_mirror_judge(mio) & mirror->in_sync) || mirror->sole_faults != mirror->task.sole_faults)
        mirror->task.error = -EIO; /* or it has succeeded after one that failed, and the operator has cleared that */
    nv_mio_end(mio);
    if (mirror->task.error || mirror->losses != mirror->task.losses)
        clean_pages(mirror);
    else
        nv_task_dirty_pages(mirror, false, clean_pages);
}

static void begin_clean(struct nv_mirror *mirror)
{
    struct nv_mio *mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);

    mirror->task.sole_faults = mirror->sole_faults;
    nv_mio_round(mio, clean_synced);
    NV_EACH_LANE(lane, nv_lanes_live(mirror))
        nv_mio_sync(mio, lane);
    nv_mio_go(mio);
}

/* Nothing is asked of the mirror any more. */
static void begin_end(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;

    begin(mirror, NV_TASK_END);
    for (struct nv_mirror_command *command; (command = mirror->commands);) {
        mirror->commands = command->next;
        nv_mirror_end_command(mirror, command, -ESHUTDOWN);
    }
    NV_EACH_LANE(lane, nv_lanes_used(mirror)) {
        if (mirror->lanes[lane].resync)
            nv_mirror_end_command(mirror, mirror->lanes[lane].resync, -ESHUTDOWN);
        mirror->lanes[lane].resync = NULL;
    }
    if (mirror->attaching || nv_mirror_frozen(mirror) || mirror->fenced || mirror->broken) {
        mirror->task.stage = 1; /* it ends uncleanly, and the next attach sees to it */
        return;
    }
    for (uint32_t region = 0; region < intent->regions; region++)
        if ((intent->state[region] & ~NV_REGION_TOUCHED) == NV_REGION_SET)
            nv_intent_set_state(intent, region, NV_REGION_CLEANING);
    begin_clean(mirror);
}

static bool go_on_ending(struct nv_mirror *mirror)
{
    if (mirror->task.stage == 1 && mirror->intent.writes_out == 0 && !mirror->active && !mirror->landed)
        mirror->ended = true;
    return false;
}

/* --- which one --- */

static bool begin_resync(struct nv_mirror *mirror)
{
    NV_EACH_LANE(lane, nv_lanes_used(mirror)) {
        struct nv_lane *at = &mirror->lanes[lane];
        if (at->resync && !nv_lane_present(mirror, lane)) { /* it went away while it waited */
            nv_mirror_end_command(mirror, at->resync, -ENODEV);
            at->resync = NULL;
        }
        if (!at->resync || at->outstanding > 0) /* operations from before it was lost may still land there */
            continue;
        begin(mirror, NV_TASK_PREPARE);
        nv_task_prepare(mirror, lane);
        return true;
    }
    return false;
}

bool nv_mirror_next_task(struct nv_mirror *mirror)
{
    const bool released_all = mirror->failing == mirror->committed;

    if (mirror->task.kind == NV_TASK_END)
        return go_on_ending(mirror);
    if (mirror->task.kind != NV_TASK_NONE || mirror->ended)
        return false;
    if (mirror->end_wanted) {
        if (mirror->copier.busy > 0 || mirror->active || mirror->landed)
            return false;
        begin_end(mirror);
    } else if (mirror->broken || mirror->fenced) {
        return false;
    } else if (mirror->attaching) {
        if (!released_all)
            return false;
        begin(mirror, NV_TASK_ATTACH);
        nv_task_attach(mirror);
    } else if (mirror->failing && released_all) {
        begin_release(mirror);
    } else if (begin_promotion(mirror)) {
        return true;
    } else if (mirror->relabel_due) {
        mirror->relabel_due = false;
        begin(mirror, NV_TASK_RELABEL);
        nv_task_labels(mirror, nv_lanes_counted(mirror), false, relabelled);
    } else if (nv_mirror_frozen(mirror)) {
        return false;
    } else if (mirror->intent.doubtful_count == 0 && begin_resync(mirror)) {
        return true;
    } else if (mirror->checkpoint_due && mirror->copier.resyncing == 0) {
        begin_checkpoint(mirror);
    } else if (mirror->clean_due) {
        begin(mirror, NV_TASK_CLEAN);
        begin_clean(mirror);
    } else {
        return false;
    }
    return true;
}
