/*
 * How a mirror begins (docs/mirror.md section 2, attach), and how a resync does. Attach reads the metadata of every in-sync
 * leg, page by page, then writes the union of it to all of them. A leg that is lost meanwhile is asked for like any
 * other, and attach begins again without it. What is damaged counts as "every bit set".
 */
#include <assert.h>
#include <errno.h>

#include "volume/meta.h"
#include "volume/mirror_state.h"

static void read_intents(struct nv_mirror *mirror);
static void read_dirty(struct nv_mirror *mirror);

static void give_up(struct nv_mirror *mirror, int error)
{
    mirror->broken = true;
    mirror->attached.event.result = error;
    nv_mirror_raise(mirror, &mirror->attached);
    nv_task_end(mirror);
}

/* A leg was lost: the registry must know before this goes on; the last one fails: that is the end. True: it has ended. */
static bool begin_again(struct nv_mirror *mirror)
{
    if (!nv_mirror_frozen(mirror) && !mirror->fenced) {
        if (mirror->task.error)
            give_up(mirror, mirror->task.error);
        return mirror->broken;
    }
    nv_task_end(mirror);
    return true;
}

/* --- the last steps --- */

static void attached(struct nv_mirror *mirror)
{
    if (begin_again(mirror))
        return;
    mirror->attaching = false;
    mirror->attached.event.result = 0;
    mirror->attached.event.args[0] = mirror->intent.doubtful_count;
    mirror->attached.event.args[1] = mirror->epoch;
    mirror->attached.event.args[2] = mirror->task.generation;
    nv_mirror_raise(mirror, &mirror->attached);
    nv_mirror_wake_tick(mirror);
    nv_task_end(mirror);
}

static void labels_may_follow(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    (void)nv_mirror_judge(mio); /* the last leg serves also with a fault latched */
    nv_mio_end(mio);
    if (!begin_again(mirror))
        nv_task_labels(mirror, mirror->in_sync, false, attached);
}

/*
 * The label that was found may be one that a filter was writing when it died: there to be read, and not durable. It is
 * made so before its other slot is written, or a power cut could tear both.
 */
static void write_labels(struct nv_mirror *mirror)
{
    struct nv_mio *mio;

    if (begin_again(mirror))
        return;
    mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);
    nv_mio_round(mio, labels_may_follow);
    NV_EACH_LANE(lane, mirror->in_sync)
        nv_mio_sync(mio, lane);
    nv_mio_go(mio);
}

static void write_dirty(struct nv_mirror *mirror)
{
    if (!begin_again(mirror))
        nv_task_dirty_pages(mirror, true, write_labels);
}

/* All intents found are SET: dirty for legs that are not in sync, and doubtful between those that are. */
static void settle_intents(struct nv_mirror *mirror)
{
    struct nv_intent *intent = &mirror->intent;
    const uint8_t others = nv_lanes_used(mirror) & (uint8_t)~mirror->in_sync;
    const bool several = mirror->in_sync & (mirror->in_sync - 1);

    nv_intent_forget(mirror, mirror->in_sync);
    nv_intent_lost(mirror, others);
    if (!several) /* a sync may have failed before a crash that nobody has heard of */
        nv_intent_suspect(intent, 0, nv_mirror_map(mirror)->size);
    for (uint32_t region = 0; several && region < intent->regions; region++) {
        if (nv_region_state(intent, region) != NV_REGION_SET)
            continue;
        intent->state[region] |= NV_REGION_DOUBTFUL;
        intent->doubtful_count++;
    }
    mirror->task.after_force = write_dirty;
    nv_intent_force(mirror);
}

/* --- reading --- */

static void read_page(struct nv_mirror *mirror, uint32_t lane, uint64_t offset, void (*landed)(struct nv_mio *mio))
{
    struct nv_mio *mio = nv_mio_get(mirror, nv_mirror_map(mirror), NULL);

    mio->number = lane;
    nv_mio_memory(mio, NV_MIO_PAGES);
    nv_mio_round(mio, landed);
    nv_mio_meta(mio, lane, NV_PIECE_READ, offset, NV_PAGES_BYTES, mio->memory);
    nv_mio_go(mio);
}

/*
 * A page that cannot be read takes its leg with it, or the attach where there is no other: without its sequence nobody can
 * tell which slot the next copy may be written to, and a copy that seems older than it is would be believed later.
 */
static bool readable(struct nv_mirror *mirror, struct nv_mio *mio)
{
    const uint32_t lane = mio->number;
    const int error = mio->late ? -ETIMEDOUT : (int)(mio->parts[lane].result < 0 ? mio->parts[lane].result : 0);

    if (error && (mirror->in_sync & nv_lane_bit(lane)) && !nv_mirror_fault(mirror, lane, error))
        mirror->task.error = error;
    return !error;
}

/* The next lane of this page; true: there is one. */
static bool next_lane(struct nv_mirror *mirror)
{
    struct nv_task *task = &mirror->task;

    task->lanes_left &= mirror->in_sync;
    if (!task->lanes_left)
        return false;
    task->lane = (uint8_t)__builtin_ctz(task->lanes_left);
    task->lanes_left &= task->lanes_left - 1;
    return true;
}

static void dirty_read(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    const bool good = readable(mirror, mio);

    mirror->task.known |= nv_dirty_merge(mirror, mirror->task.page, mio->memory, good);
    nv_mio_end(mio);
    read_dirty(mirror);
}

/* Lanes that no page of this number names: everything there is dirty for them. */
static void dirty_unknown(struct nv_mirror *mirror, uint32_t page, uint8_t lanes)
{
    const struct nv_intent *intent = &mirror->intent;
    const uint32_t first = page * NV_DIRTY_A_PAGE;
    uint32_t end = first + NV_DIRTY_A_PAGE < intent->regions ? first + NV_DIRTY_A_PAGE : intent->regions;

    if (lanes)
        nv_intent_dirty(mirror, (uint64_t)first << intent->shift, (uint64_t)(end - first) << intent->shift, lanes);
}

static void read_dirty(struct nv_mirror *mirror)
{
    struct nv_task *task = &mirror->task;

    if (begin_again(mirror))
        return;
    if (!next_lane(mirror)) {
        dirty_unknown(mirror, task->page, nv_lanes_used(mirror) & (uint8_t)~(mirror->in_sync | task->known));
        task->known = 0;
        task->lanes_left = mirror->in_sync;
        if (++task->page == mirror->intent.dirty_page_count) {
            settle_intents(mirror);
            return;
        }
        next_lane(mirror);
    }
    read_page(mirror, task->lane, NV_META_BITMAPS + nv_mirror_map(mirror)->by_lane[task->lane]->bitmap_bytes +
              2ull * task->page * NV_META_PAGE, dirty_read);
}

static void intents_read(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;
    const bool good = readable(mirror, mio);

    nv_intent_merge(mirror, mirror->task.page, mio->memory, good, 0);
    nv_mio_end(mio);
    read_intents(mirror);
}

static void read_intents(struct nv_mirror *mirror)
{
    struct nv_task *task = &mirror->task;

    if (begin_again(mirror))
        return;
    if (!next_lane(mirror)) {
        task->lanes_left = mirror->in_sync;
        if (++task->page == mirror->intent.page_count) {
            task->page = 0;
            read_dirty(mirror);
            return;
        }
        next_lane(mirror);
    }
    read_page(mirror, task->lane, NV_META_BITMAPS + 2ull * task->page * NV_META_PAGE, intents_read);
}

void nv_task_attach(struct nv_mirror *mirror)
{
    nv_task_release_at_attach(mirror);
    for (uint32_t lane = NV_LEGS_MAX; lane-- > 0;) /* an object whose sync has failed while this process lived */
        if ((mirror->in_sync & nv_lane_bit(lane)) && nv_lane_latched(mirror, lane))
            nv_mirror_fault(mirror, lane, -EIO);
    if (begin_again(mirror))
        return;
    nv_intent_reset(&mirror->intent);
    nv_mirror_choose_primary(mirror);
    mirror->task.lanes_left = mirror->in_sync;
    read_intents(mirror);
}

/* --- the start of a resync --- */

static void end_prepare(struct nv_mirror *mirror, int error)
{
    struct nv_lane *at = &mirror->lanes[mirror->task.lane];

    nv_mirror_end_command(mirror, mirror->task.command, error);
    at->resync = NULL;
    mirror->copier.exhausted = false;
    nv_task_end(mirror);
}

static bool still(const struct nv_mirror *mirror, uint32_t state)
{
    return mirror->lanes[mirror->task.lane].state == state && mirror->lanes[mirror->task.lane].resync &&
           nv_lane_present(mirror, mirror->task.lane);
}

static void prepared(struct nv_mirror *mirror)
{
    if (mirror->task.error && still(mirror, NV_LANE_SYNCING))
        nv_mirror_lose_syncing(mirror, mirror->task.lane, mirror->task.error);
    end_prepare(mirror, still(mirror, NV_LANE_SYNCING) ? 0 : -EIO);
}

static void prepare_dirty(struct nv_mirror *mirror)
{
    nv_task_dirty_pages(mirror, true, prepared);
}

/* From here on it gets what is written; and then its metadata is made equal to the others'. */
static void go_live(struct nv_mirror *mirror)
{
    mirror->lanes[mirror->task.lane].state = NV_LANE_SYNCING;
    mirror->syncing |= nv_lane_bit(mirror->task.lane);
    nv_lane_counts_faults(mirror, mirror->task.lane, nv_mirror_map(mirror)->by_lane[mirror->task.lane]);
    mirror->task.after_force = prepare_dirty;
    nv_intent_force(mirror);
}

static void read_own(struct nv_mirror *mirror);

static void own_read(struct nv_mio *mio)
{
    struct nv_mirror *mirror = mio->mirror;

    if (mio->late || mio->parts[mio->number].result < 0)
        mirror->task.error = mio->late ? -ETIMEDOUT : (int)mio->parts[mio->number].result;
    else if (still(mirror, NV_LANE_STALE))
        nv_intent_merge(mirror, mirror->task.page, mio->memory, true, nv_lane_bit(mirror->task.lane));
    nv_mio_end(mio);
    mirror->task.page++;
    read_own(mirror);
}

/* What was on its way to the leg when it was lost may have landed there in part: its own intents tell where. */
static void read_own(struct nv_mirror *mirror)
{
    if (!still(mirror, NV_LANE_STALE) || nv_mirror_frozen(mirror) || mirror->fenced || mirror->task.error)
        end_prepare(mirror, mirror->task.error ? mirror->task.error : -EAGAIN);
    else if (mirror->task.page < mirror->intent.page_count)
        read_page(mirror, mirror->task.lane, NV_META_BITMAPS + 2ull * mirror->task.page * NV_META_PAGE, own_read);
    else
        go_live(mirror);
}

static void prepare_labelled(struct nv_mirror *mirror)
{
    if (mirror->task.error) {
        end_prepare(mirror, mirror->task.error);
        return;
    }
    mirror->task.page = 0;
    read_own(mirror);
}

/* A label of ours makes its dirty map count: what that says is durable by now. */
static void prepare_saved(struct nv_mirror *mirror)
{
    if (mirror->task.error)
        end_prepare(mirror, mirror->task.error);
    else
        nv_task_labels(mirror, nv_lane_bit(mirror->task.lane), true, prepare_labelled);
}

void nv_task_prepare(struct nv_mirror *mirror, uint32_t lane)
{
    struct nv_mirror_command *command = mirror->lanes[lane].resync;

    mirror->task.lane = (uint8_t)lane;
    mirror->task.command = command;
    if (command->option)
        nv_intent_dirty_all(mirror, nv_lane_bit(lane));
    nv_task_dirty_pages(mirror, false, prepare_saved);
}
