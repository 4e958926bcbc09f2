/*
 * What the mirror's files share: its state, and operations on legs. Touched by the owner reactor only.
 *
 * An operation on legs is a `struct nv_mio`: one piece (or sync) a lane, all in one round. When every lane that still
 * counts has answered, the round has *landed*: `landed` runs, from nv_mirror_pump(), never from inside the call that
 * started it, and may start another round. A lane that is lost while its operation is out makes that operation *late*:
 * the round lands without it, and memory and map stay held until the late operation has completed too.
 */
#ifndef NV_MIRROR_STATE_H
#define NV_MIRROR_STATE_H

#include <pthread.h>

#include "backend/backend.h"
#include "limits.h"
#include "reactor/reactor.h"
#include "volume/intent.h"
#include "volume/map.h"
#include "volume/mirror.h"
#include "volume/range.h"
#include "volume/volume.h"

#define NV_STRIPE_SHIFT 16u
#define NV_STRIPES 1024u            /* a power of two */
#define NV_STRIPES_EACH 16u         /* a range of more stripes counts as wide */
#define NV_PAGES_BYTES (2u * NV_META_PAGE) /* both slots of a label or page */
#define NV_MIOS_RESERVED 32u        /* requests leave so many to the mirror's own operations */

struct nv_part {                    /* one lane's operation */
    struct nv_piece piece;
    struct nv_sync_wait wait;
    struct nv_mio *mio;
    const struct nv_map_leg *leg;   /* SYNC: whose objects */
    uint32_t object_next;
    int64_t result;                 /* of this round: a count, 0 or -errno */
};

enum nv_mio_memory { NV_MIO_NO_MEMORY, NV_MIO_PAGES, NV_MIO_COPY };

struct nv_mio {
    struct nv_mio *next, **back;    /* active (oldest round first), waiting for an intent, or free */
    struct nv_mio *landed_next;
    struct nv_mirror *mirror;
    struct nv_map *map;             /* held until nothing is out any more */
    struct nv_vreq *request;        /* whom it serves, if a request */
    void (*landed)(struct nv_mio *mio);
    uint64_t offset, length;        /* in the volume */
    uint64_t born_ms;               /* of the round */
    uint8_t sent;                   /* lanes of this round */
    uint8_t pending;                /* lanes with an operation out */
    uint8_t late;                   /* those of `pending` that nobody waits for any more */
    uint8_t did;                    /* FLUSH: lanes that are through, over all rounds */
    bool used;                      /* by somebody; else it is free, or late operations hold it */
    bool starting;                  /* its round is being put together: it does not land yet */
    bool active;
    bool borrows;                   /* operations use the request's memory */
    bool extra;                     /* not of the slab: made to replace a late one */
    uint8_t memory_kind;            /* enum nv_mio_memory */
    uint8_t *memory;
    struct nv_vreq *pinned;         /* whose memory late operations use */
    struct nv_message message;      /* carries the end of the pin */
    uint8_t *orphan;                /* memory that a late read may still fill, of nobody else */
    uint32_t begun;                 /* READ: writes begun in its stripes */
    bool of_primary;                /* READ: the leg was the primary when it was asked */
    uint64_t sampled_ns;            /* READ: when it started, if its latency is measured; else 0 */
    uint32_t number;                /* what the caller likes */
    void *context;                  /* ... and this */
    struct nv_part parts[NV_LEGS_MAX];
};

struct nv_lane {
    uint32_t id;                    /* of the leg; 0: unused */
    uint8_t state;                  /* NV_LANE_* */
    uint32_t outstanding;           /* operations that have not completed, late ones included */
    uint64_t label_sequence;        /* the newest known */
    uint64_t faults;                /* of its objects, that are known and dealt with */
    uint64_t reads, latency_ns;
    uint32_t sampled_at;            /* NEAREST: of its choices, when the latency was last measured */
    uint64_t read_end;              /* where its last read ended: sequential streams stay on a leg */
    struct nv_mirror_command *resync; /* waits for late operations and for its turn */
    struct nv_event_slot failed, stopped, done;
};

struct nv_queue {
    struct nv_vreq *first, **last;
};

static inline void nv_queue_init(struct nv_queue *queue)
{
    queue->first = NULL;
    queue->last = &queue->first;
}

struct nv_conflicts {               /* which stripes have writes in flight, and how many have begun there */
    uint16_t out[NV_STRIPES];
    uint32_t begun[NV_STRIPES];
    uint32_t wide_out, wide_begun, all_out, all_begun;
};

enum nv_task_kind {
    NV_TASK_NONE,
    NV_TASK_ATTACH,
    NV_TASK_RELEASE,
    NV_TASK_PROMOTE,
    NV_TASK_PREPARE,                /* the start of a resync */
    NV_TASK_CHECKPOINT,             /* copied regions become durable; perhaps the end of a resync */
    NV_TASK_RELABEL,
    NV_TASK_CLEAN,
    NV_TASK_END,
};

struct nv_task {                    /* one long operation at a time: mirror_task.c, mirror_attach.c */
    enum nv_task_kind kind;
    void (*after_labels)(struct nv_mirror *mirror);
    void (*after_pages)(struct nv_mirror *mirror);
    void (*after_force)(struct nv_mirror *mirror); /* waits for nv_intent_forced() */
    int error;                      /* of its operations: why no counted in-sync leg, or not the one meant, did it */
    uint64_t generation;            /* what its labels say */
    uint8_t label_left;             /* lanes still to be labelled */
    bool label_syncing;             /* what the labels say */
    uint8_t lane;
    uint8_t lanes_left;             /* ATTACH: to be read; CHECKPOINT: to be finished */
    uint8_t known;                  /* ATTACH: lanes that dirty pages of this number name */
    uint32_t page;
    uint8_t stage;                  /* END: 1: all that could be saved is, or is under way */
    bool forced;                    /* every page of dirty maps */
    uint32_t losses;                /* mirror->losses when it began */
    uint64_t sole_faults;           /* likewise, when its sync began */
    struct nv_mirror_command *command;
};

enum nv_copy_kind { NV_COPY_RECONCILE, NV_COPY_REWRITE, NV_COPY_RESYNC, NV_COPY_REPAIR, NV_COPY_VERIFY };

struct nv_copy {                    /* one region, or one range to repair, piece by piece */
    bool busy;
    enum nv_copy_kind kind;
    uint32_t region;
    uint8_t lanes;                  /* RESYNC: targets that have missed nothing meanwhile */
    uint8_t lane;                   /* REPAIR: the target; VERIFY: the one compared */
    uint8_t tried;                  /* sources that could not be read */
    uint8_t source;
    uint8_t compared;               /* VERIFY: lanes that were */
    bool keep;                      /* REWRITE: no sync has failed meanwhile */
    int error;
    bool waiting;                   /* RESYNC: for its next piece's time */
    bool paused;                    /* its next piece may not begin (nv_mirror_pause_copies) */
    uint64_t begin, at, end;
    uint64_t length;                /* of the present piece */
    struct nv_mio *mio;             /* VERIFY: holds the source's bytes */
    struct nv_range range;
    struct nv_range_table *order;   /* where it has its place; NULL: no piece of it has one */
    struct nv_mirror *mirror;
};

struct nv_repair {
    uint64_t offset, length;
    uint8_t lane;
};

struct nv_copier {
    struct nv_copy copies[NV_COPY_DEPTH];
    uint32_t busy, resyncing;       /* copies; those of a resync */
    uint32_t cursor;                /* region to look at next */
    uint64_t since_checkpoint, copied_bytes;
    uint64_t checkpoint_ms;         /* when the last one began, or since when nothing is unsaved */
    bool limited;                   /* clients were served between the last two ticks */
    uint64_t due_ns;                /* ... when the next piece of a resync may begin */
    struct nv_op timer;             /* out exactly while a copy waits for that */
    bool timer_out;
    bool exhausted;                 /* nothing to resync was found since something changed */
    bool stuck;                     /* a doubtful region could not be read anywhere: not again before the next tick */
    struct nv_repair repairs[NV_REPAIRS_MAX];
    uint32_t repair_count;
    uint64_t repaired;
    struct nv_event_slot repair_event;
    struct nv_mirror_command *verify;
    uint32_t verify_next;           /* region */
    int verify_error;
    uint64_t verify_bytes, verify_differed, verify_repaired;
};

struct nv_mirror {
    struct nv_volume *volume;
    struct nv_range_table *order;   /* of copies (nv_mirror_orders_by) */
    struct nv_late *pausing;        /* copies begin no piece; queued when none is under way */
    struct nv_logged *logged;       /* the log above; NULL: none */
    struct nv_reactor *reactor;
    struct nv_lane lanes[NV_LEGS_MAX];
    uint8_t used;                   /* lanes with a leg */
    uint8_t in_sync, promoting, syncing, failing; /* ... in these states */
    uint32_t primary;               /* of in_sync: answers reads while writes to the place are in flight */
    bool settling;                  /* the primary has changed: writes begun before have not all landed yet */
    uint32_t explored;              /* NEAREST: reads since start */
    uint8_t committed;              /* of `failing`: the registry has them stale */
    bool attaching;                 /* nothing runs yet */
    bool expired;                   /* frozen for too long: EIO */
    uint64_t sole_faults;           /* failed syncs of the last in-sync leg */
    bool suspected;                 /* the last in-sync leg's sync has failed, and what it may have lost is marked */
    bool fenced, broken;            /* for good: EIO; broken: the last in-sync leg did not attach */
    bool closing, end_wanted, ended;
    uint32_t losses;                /* counts lanes that were lost */
    uint64_t epoch, generation;
    uint8_t uuid[16];
    uint64_t frozen_ms, now_ms, swept_ms;
    uint32_t requests_seen;         /* by clients since the last tick */
    struct nv_queue held;           /* not started: run once it serves and is not frozen */
    struct nv_queue parked;         /* done: the acknowledgement is held */
    struct nv_queue reads;          /* wait for writes in flight to land, or for a region to be reconciled */
    struct nv_queue starved;        /* wait for a mio */
    bool reads_due, starved_due;    /* some of them may go now */
    struct nv_conflicts conflicts;
    struct nv_intent intent;
    struct nv_mio *slab, *free_mios, *active, **active_tail, *landed, **landed_tail;
    uint32_t free_count, mios_out;  /* out: used, or held by late operations */
    bool pumping;
    uint8_t *free_pages, *free_copies; /* linked through their first bytes */
    struct nv_task task;
    struct nv_mirror_command *commands, **commands_tail; /* RELEASE, PROMOTE: wait for their turn */
    bool checkpoint_due, clean_due, relabel_due;
    struct nv_copier copier;
    struct nv_ticker ticker;
    struct nv_late late;            /* pumps once more before the turn ends */
    bool tick_wanted;
    struct nv_message open_message, end_message;
    struct nv_event_slot attached, fenced_event, relabelled;
    pthread_mutex_t shown_lock;
    nv_mirror_status shown;
};

/* --- lanes --- */

#define NV_EACH_LANE(lane, mask) for (uint32_t lane##_left = (mask), lane; \
                                      lane##_left && (lane = (uint32_t)__builtin_ctz(lane##_left), true); \
                                      lane##_left &= lane##_left - 1)

static inline uint8_t nv_lane_bit(uint32_t lane)
{
    return (uint8_t)(1u << lane);
}

/* Lanes that an acknowledgement needs. */
static inline uint8_t nv_lanes_counted(const struct nv_mirror *mirror)
{
    return mirror->in_sync | mirror->promoting;
}

/* Lanes that get what is written. */
static inline uint8_t nv_lanes_live(const struct nv_mirror *mirror)
{
    return mirror->in_sync | mirror->promoting | mirror->syncing;
}

static inline uint8_t nv_lanes_used(const struct nv_mirror *mirror)
{
    return mirror->used;
}

static inline bool nv_mirror_frozen(const struct nv_mirror *mirror)
{
    return mirror->failing != 0;
}

static inline struct nv_map *nv_mirror_map(const struct nv_mirror *mirror)
{
    return mirror->volume->locals[mirror->reactor->index].map;
}

/* The leg can be reached: every live one can. */
static inline bool nv_lane_present(const struct nv_mirror *mirror, uint32_t lane)
{
    const struct nv_map_leg *leg = nv_mirror_map(mirror)->by_lane[lane];

    return leg && leg->meta;
}

/*
 * mirror.c: a sync of one of the lane's objects has failed, perhaps another volume's, since it got what is written (even
 * if the operator has cleared the fault meanwhile): it may not have all of it.
 */
bool nv_lane_latched(const struct nv_mirror *mirror, uint32_t lane);
/* From here on it counts: the lane gets what is written, or what it may have lost is marked. */
void nv_lane_counts_faults(struct nv_mirror *mirror, uint32_t lane, const struct nv_map_leg *leg);
/* No write-like request may start now. */
static inline bool nv_mirror_stopped(const struct nv_mirror *mirror)
{
    return nv_mirror_frozen(mirror) || mirror->settling || mirror->fenced || mirror->broken;
}
/* The region is doubtful no more. */
void nv_mirror_settle_region(struct nv_mirror *mirror, uint32_t region);
/* The primary is not in sync any more. */
void nv_mirror_choose_primary(struct nv_mirror *mirror);
/* The lane's operation failed: lose it, unless it is the last in-sync one (false). */
bool nv_mirror_fault(struct nv_mirror *mirror, uint32_t lane, int error);
/* Every lane of the landed round that failed, and those of objects with a latched sync; lanes that did it. */
uint8_t nv_mirror_judge(struct nv_mio *mio);
void nv_mirror_lose_syncing(struct nv_mirror *mirror, uint32_t lane, int error);
void nv_mirror_fence_now(struct nv_mirror *mirror, uint64_t epoch);
/* The registry has these failing lanes stale, and the survivors know it. */
void nv_mirror_unfreeze(struct nv_mirror *mirror, uint8_t lanes);
void nv_mirror_raise(struct nv_mirror *mirror, struct nv_event_slot *slot);
void nv_mirror_command_arrives(struct nv_reactor *reactor, struct nv_message *message);
void nv_mirror_end_command(struct nv_mirror *mirror, struct nv_mirror_command *command, int error);
/* mirror_life.c: refresh what the front may look at. */
void nv_mirror_show(struct nv_mirror *mirror);
/* Run whatever can go on; call it at the end of everything that enters the mirror from outside. */
void nv_mirror_pump(struct nv_mirror *mirror);
/* The same, once before the turn ends, for what comes many times a turn. */
void nv_mirror_pump_later(struct nv_mirror *mirror);
void nv_mirror_pump_due(struct nv_late *late);
/* mirror_life.c: somebody waits for time to pass. */
void nv_mirror_wake_tick(struct nv_mirror *mirror);

/* mirror.c: requests */
void nv_mirror_hold(struct nv_queue *queue, struct nv_vreq *request);
void nv_mirror_finish(struct nv_vreq *request, int error);
/* A write-like request or a flush is done on every counted lane: acknowledge or park it. */
void nv_mirror_acknowledge(struct nv_vreq *request);
/* What is left of a span at offset: its length, at most `length`, in one run of each lane. NULL: no storage there. */
const struct nv_run *nv_mirror_span(const struct nv_map *map, uint64_t offset, uint64_t *length);

/* mirror_io.c */
int nv_mirror_io_create(struct nv_mirror *mirror);
void nv_mirror_io_free(struct nv_mirror *mirror);
/* NULL: none left (for a request; the mirror's own always get one). */
struct nv_mio *nv_mio_get(struct nv_mirror *mirror, struct nv_map *map, struct nv_vreq *request);
/* Memory for both slots of a page, or for a copy; NULL: none left. It is the mio's until nothing is out any more. */
uint8_t *nv_mio_memory(struct nv_mio *mio, enum nv_mio_memory kind);
/* Begin a round, add its operations, and let it go: a round of none lands too. */
void nv_mio_round(struct nv_mio *mio, void (*landed)(struct nv_mio *mio));
void nv_mio_go(struct nv_mio *mio);
/* A piece of the volume's range on a lane; flags as of a piece. */
void nv_mio_piece(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint8_t flags, uint64_t offset, uint64_t length,
                  uint8_t *data);
void nv_mio_sync(struct nv_mio *mio, uint32_t lane);
/* Bytes of a lane's metadata region. */
void nv_mio_meta(struct nv_mio *mio, uint32_t lane, uint8_t kind, uint64_t offset, uint64_t length, uint8_t *data);
/* The user is through with it. */
void nv_mio_end(struct nv_mio *mio);
/* Nobody waits for the lane's operations any more. */
void nv_mirror_abandon(struct nv_mirror *mirror, uint32_t lane);
void nv_mirror_check_deadlines(struct nv_mirror *mirror);
bool nv_mirror_run_landed(struct nv_mirror *mirror);

/* mirror_write.c */
void nv_mirror_write(struct nv_vreq *request);
void nv_mirror_flush(struct nv_vreq *request);
void nv_mirror_intent_ready(struct nv_mio *mio, int error); /* what it waited for is durable, or is not to be had */

/* mirror_read.c */
void nv_mirror_read(struct nv_vreq *request);
void nv_conflict_begin(struct nv_mirror *mirror, uint64_t offset, uint64_t length);
void nv_conflict_end(struct nv_mirror *mirror, uint64_t offset, uint64_t length);
bool nv_mirror_doubtful(const struct nv_mirror *mirror, uint64_t offset, uint64_t length);

/* mirror_task.c: the one that is most urgent, if none runs. True: something began. */
bool nv_mirror_next_task(struct nv_mirror *mirror);
void nv_task_end(struct nv_mirror *mirror);
/* Lanes that were lost while attaching are stale: attach itself writes labels and dirty maps. */
void nv_task_release_at_attach(struct nv_mirror *mirror);
void nv_task_labels(struct nv_mirror *mirror, uint8_t lanes, bool syncing, void (*then)(struct nv_mirror *mirror));
void nv_task_dirty_pages(struct nv_mirror *mirror, bool forced, void (*then)(struct nv_mirror *mirror));

/* mirror_attach.c */
void nv_task_attach(struct nv_mirror *mirror);
void nv_task_prepare(struct nv_mirror *mirror, uint32_t lane);

/* copier.c */
/* Begin what can be begun; true: something was. */
bool nv_copier_pump(struct nv_mirror *mirror);
void nv_copier_tick(struct nv_mirror *mirror);
void nv_copier_repair(struct nv_mirror *mirror, uint64_t offset, uint64_t length, uint32_t lane);
/* A write to the range did not reach the lanes: what is being copied there does not count for them. */
void nv_copier_missed(struct nv_mirror *mirror, uint32_t first, uint32_t last, uint8_t lanes);
/* A sync has failed: what was written once more so far may be lost again. */
void nv_copier_suspect(struct nv_mirror *mirror);
bool nv_copier_reconciles(const struct nv_mirror *mirror, uint32_t region);
bool nv_copier_has_work(const struct nv_mirror *mirror);

#endif
