/*
 * What the files of log/ share. Positions grow for ever; a position's place in the ring is position mod ring.
 *
 *     tail <= synced <= completed <= head        durable tail; synced; acknowledged; handed to the port
 *
 * Every record between tail and completed has a *mark*, and each block of its entries a *version*, in two rings that are
 * numbered as they grow. The index leads from a block to its newest version, a version to the next older one: a block that
 * the index has is *covered*, and stays so until the superblock's tail has passed its last record, because recovery would
 * replay it. A version is LIVE, CARRIED (the batch that is being destaged has it) or SETTLED (what is below is as new, and
 * flushed).
 *
 * Invariants: only synced versions are carried below (but when the log has failed); a version that is carried takes all
 * older ones of its block along; the tail passes settled records only; nothing is written into the ring between tail and
 * head.
 */
#ifndef NV_LOG_STATE_H
#define NV_LOG_STATE_H

#include <assert.h>
#include <stddef.h>

#include "log/log.h"

#define NV_LOG_NONE UINT64_MAX

enum nv_log_version_state { NV_LOG_LIVE, NV_LOG_CARRIED, NV_LOG_SETTLED };

struct nv_log_version {
    uint64_t block;
    uint64_t older;                 /* number of the version before; NONE, or one that is gone */
    uint32_t unit;                  /* DATA: of the ring */
    uint32_t crc;
    uint16_t pins;                  /* reads that look at its data */
    uint8_t kind;                   /* NV_LOG_DATA or NV_LOG_ZERO */
    uint8_t state;
    bool bad;                       /* its data cannot be read from the log */
};

struct nv_log_mark {
    uint64_t position, sequence;
    uint64_t first;                 /* number of its first version */
    uint64_t since_ns;
    uint32_t units;
    uint32_t seal;                  /* its head's checksum */
};

struct nv_log_slot {                /* of the index: open addressing */
    uint64_t block;                 /* plus one; 0: free */
    uint64_t number;
};

struct nv_log_list {
    struct nv_log_request *first, **last;
};

struct nv_log_group {               /* a record on its way */
    struct nv_log *log;
    struct nv_op op, pad_op;
    struct iovec iov, pad_iov;
    uint8_t *memory;                /* NV_LOG_RECORD_UNITS units */
    uint8_t *pad;                   /* one unit */
    struct nv_log_group *next;      /* in the order of the ring */
    struct nv_log_list requests;
    struct nv_log_entry entries[NV_LOG_ENTRIES];
    uint32_t count, data;           /* entries; of them DATA */
    uint64_t blocks;                /* versions that they make */
    uint64_t position, sequence;    /* of the record, behind its PAD */
    uint64_t since_ns;
    uint32_t seal, pad_units, pad_seal;
    uint32_t left;                  /* operations under way */
    int error;
    bool used, wants_sync, dsync;
};

struct nv_log_bounce {              /* a read of the log for a request */
    struct nv_log *log;
    struct nv_op op;
    struct iovec iov;
    uint8_t *memory;
    struct nv_log_request *request;
    uint64_t numbers[NV_LOG_BOUNCE_BLOCKS];
    uint64_t since_ns;
    uint32_t count;
    bool used;
    bool late;                      /* nobody waits for it any more; its memory is the port's until it ends */
};

struct nv_log_run_read {
    struct nv_log_run *run;
    struct nv_op op;
    struct iovec iov;
    uint64_t since_ns;
    bool used;
};

#define NV_LOG_RUN_READS 8u

struct nv_log_run {                 /* adjacent blocks on their way below */
    struct nv_log *log;
    uint8_t *memory;                /* while it is used */
    struct nv_log_run_read reads[NV_LOG_RUN_READS];
    struct nv_log_below below;
    uint32_t from, count;           /* in the batch */
    uint32_t next_read, reading;    /* relative to `from` */
    uint32_t at, writing;           /* blocks written; of the write under way */
    bool again;                     /* reading one block at a time what could not be read together */
    bool fine[NV_LOG_RUN_BLOCKS];   /* its data is here and is right */
    bool used;
    bool late;                      /* its reads hang: it is of no batch any more; its memory is the port's until they end */
};

struct nv_log_pick {
    uint64_t block, number;
};

enum nv_log_phase {
    NV_LOG_RESTING,
    NV_LOG_SYNCING,                 /* the log, so that there is something to carry */
    NV_LOG_CARRYING,
    NV_LOG_FLUSHING,                /* below */
    NV_LOG_MOVING,                  /* the tail */
    NV_LOG_VOIDING,                 /* the whole log, after a failure */
};

struct nv_log_destager {
    enum nv_log_phase phase;
    struct nv_log_pick *batch;      /* NV_LOG_BATCH, sorted by block */
    uint32_t count, next;
    uint32_t most;                  /* blocks of a batch, as long as storage takes no longer than it should */
    uint64_t began_ns;              /* the batch */
    uint64_t due_ns;                /* pace.c: when the next run may begin, ... */
    struct nv_op timer;             /* ... which is waited for; */
    bool timer_out, waits;
    bool waited;                    /* so was some run of the batch: how long that took says nothing of storage */
    struct nv_log_run runs[NV_LOG_RUNS];
    uint8_t *run_memory;            /* NV_LOG_RUN_MEMORIES times a run's */
    uint16_t memory_users[NV_LOG_RUN_MEMORIES]; /* the run that has it, and I/O below that kept it */
    struct nv_log_sync_wait sync;
    struct nv_log_below flush;
    bool failed, carried;
    uint64_t retry_ns;
    uint64_t covers;                /* bypassed changes that the flush below covers */
    struct nv_op op;                /* superblock */
    struct iovec iov;
    uint8_t *memory;                /* one unit */
    struct nv_log_super super;      /* as it will be when the write is done */
    uint64_t marks;                 /* likewise: those that the tail passes */
    bool super_out, given_up;       /* the write is under way; it has taken too long, and nobody waits for it any more */
    uint64_t super_since_ns;
};

struct nv_log_range {               /* blocks */
    uint64_t first, count;
};

struct nv_log_stream {
    uint64_t end, bytes;
};

struct nv_log {
    struct nv_log_config config;
    enum nv_log_state state;
    struct nv_log_super super;      /* as it is on the device */
    uint64_t ring;
    uint32_t group_data;            /* units of data in one record, at most */
    uint64_t reserve;
    /* positions and sequence */
    uint64_t tail, synced, completed, head;
    uint64_t next;                  /* sequence number of the next record */
    uint32_t chain;                 /* seal of the last one */
    /* what is logged */
    struct nv_log_mark *marks;
    uint64_t mark_tail, mark_head, mark_mask;
    struct nv_log_version *versions;
    uint64_t version_tail, version_head, version_mask;
    uint64_t synced_versions;       /* those before this number are synced */
    struct nv_log_slot *index;
    uint64_t index_mask, indexed;
    uint64_t unsettled;             /* versions */
    uint64_t dirty_blocks;          /* whose newest version is not settled */
    uint64_t lost_blocks;
    uint64_t losses;                /* ever */
    /* records on their way */
    struct nv_log_group groups[NV_LOG_GROUPS];
    struct nv_log_group *building;
    struct nv_log_group *flight, **flight_last;
    uint32_t in_flight;
    bool more_comes;                /* clients' bytes are on their way */
    uint32_t crowd, crowd_next;     /* most entries that were under way and building at once lately; and since it was forgotten */
    uint32_t crowd_records;         /* records that began since then */
    struct nv_log_sync_wait *sync_waiting;
    struct nv_op sync_op;
    bool syncing;
    uint64_t sync_since_ns;
    uint64_t sync_covers, sync_versions;
    /* requests */
    struct nv_log_list waiting;     /* for a group */
    struct nv_log_list entombing;   /* written below, waiting for a group for their tombstone */
    struct nv_log_list blocked;     /* bypasses: for a destage write or a read below to end, or for room */
    struct nv_log_request *active;  /* bypasses over covered blocks, from their start below to their tombstone's sync */
    uint32_t bypasses;              /* their number */
    struct nv_log_request *reading; /* reads below that are under way */
    struct nv_log_list thirsty;     /* reads: for a bounce */
    struct nv_log_list held;        /* until the log is void */
    struct nv_log_range haunted[NV_LOG_HAUNTED]; /* what was answered -EIO there may still come to be in the log: until it is void */
    uint32_t haunted_count;         /* more than fit: all blocks */
    struct nv_log_list early;       /* until it is open */
    struct nv_log_list finished;
    struct nv_log_bounce bounces[NV_LOG_BOUNCES];
    uint64_t below_writes, below_flushed; /* bypassed changes; those that a flush below has covered */
    uint32_t below_busy;            /* I/O below for requests */
    struct nv_log_stream streams[NV_LOG_STREAMS];
    uint32_t stream_next;
    struct nv_log_destager destager;
    /* open.c */
    struct nv_log_found found;
    struct nv_log_scan scan;
    struct nv_log_head last_head;   /* of the last valid record */
    struct nv_op op;
    struct iovec iov;
    void (*then)(struct nv_op *op); /* when it is over */
    uint64_t op_since_ns;
    uint64_t window, window_bytes;  /* of the ring, in runs[0].memory */
    uint8_t *copies;                /* two units: superblocks, BEGIN */
    bool opening;                   /* `op` is out */
    bool abandoned;                 /* ... and nobody waits for it any more */
    bool draining, drained, stopped, shut, forgotten, needs_word;
    bool severed;                   /* failed: what is written to the device does not count any more */
    struct nv_log_look counts;
    uint8_t *memory;
    uint64_t memory_bytes;
};

static inline uint64_t nv_log_units(uint64_t bytes)
{
    return (bytes + NV_LOG_UNIT - 1) / NV_LOG_UNIT;
}

static inline struct nv_log_version *nv_log_version(const struct nv_log *log, uint64_t number)
{
    assert(number >= log->version_tail && number < log->version_head);
    return &log->versions[number & log->version_mask];
}

/* The device is not trusted any more, or the log is void already. */
static inline bool nv_log_has_failed(const struct nv_log *log)
{
    return log->state == NV_LOG_FAILED || log->state == NV_LOG_VOID;
}

static inline struct nv_log_request *nv_log_who_waits(struct nv_log_sync_wait *wait)
{
    return (struct nv_log_request *)((char *)wait - offsetof(struct nv_log_request, wait));
}

static inline struct nv_log_request *nv_log_who_asked(struct nv_log_below *io)
{
    return (struct nv_log_request *)((char *)io - offsetof(struct nv_log_request, below));
}

/* ---- open.c ---- */
/* What the device was asked for as the log was opened has passed the deadline: the log is refused (HANGS). */
void nv_log_give_up_opening(struct nv_log *log);

/* ---- lists (log.c) ---- */
void nv_log_push(struct nv_log_list *list, struct nv_log_request *request);
struct nv_log_request *nv_log_pop(struct nv_log_list *list);
/* Back to the front: it could not go yet. */
void nv_log_unpop(struct nv_log_list *list, struct nv_log_request *request);
/* The request is over; it is answered by the next pump. */
void nv_log_finish(struct nv_log *log, struct nv_log_request *request, int error);
/* Decide where a request goes, again. */
void nv_log_route(struct nv_log *log, struct nv_log_request *request);
/* ... for all that stand in the list now: some may come back into it. */
void nv_log_route_all(struct nv_log *log, struct nv_log_list *list);

/* True: a transfer was short, and its rest has been handed in. Else it is over; whole if its result is its iov's length. */
bool nv_log_goes_on(struct nv_log *log, struct nv_op *op);
/* Of a transfer: 0 or -errno; nothing moved is an error, too. */
int nv_log_outcome(const struct nv_op *op);

/* ---- index.c: what is logged ---- */
uint64_t nv_log_newest(const struct nv_log *log, uint64_t block);
bool nv_log_covered(const struct nv_log *log, uint64_t first, uint64_t blocks);
/* A version for each block of a DATA or ZERO entry; `unit`, of the ring: where its data is, if it has any. */
void nv_log_put(struct nv_log *log, const struct nv_log_entry *entry, uint32_t unit);
void nv_log_mark(struct nv_log *log, const struct nv_log_mark *mark);
/* Versions from this number on are not carried below: they are not synced. */
uint64_t nv_log_carry_limit(const struct nv_log *log);
/* The newest version of a block with a number below `limit`, or NONE: what destaging carries. */
uint64_t nv_log_carry(const struct nv_log *log, uint64_t block, uint64_t limit);
/* What is below is as new as this version: it and all older ones of its block are settled. */
void nv_log_settle(struct nv_log *log, uint64_t number);
/* It is not any more. */
void nv_log_unsettle(struct nv_log *log, uint64_t first, uint64_t blocks);
void nv_log_spoil(struct nv_log *log, uint64_t number);
/* These blocks are covered no more: a tombstone is durable. */
void nv_log_drop(struct nv_log *log, uint64_t first, uint64_t blocks);
/* The superblock's tail has passed all marks before this number. */
void nv_log_expire(struct nv_log *log, uint64_t marks);
/* Nothing is logged any more; only what was lost is remembered. */
void nv_log_empty(struct nv_log *log);

/* ---- append.c: records on their way ---- */
enum nv_log_added { NV_LOG_ADDED, NV_LOG_FULL, NV_LOG_NO_GROUP };
enum nv_log_added nv_log_add(struct nv_log *log, struct nv_log_request *request, uint32_t kind);
bool nv_log_tombstone_room(const struct nv_log *log);
void nv_log_submit(struct nv_log *log);
/* How many changes are with the log now: the next records' size follows from it. */
void nv_log_count_crowd(struct nv_log *log);

/* ---- sync.c ---- */
/* True: everything acknowledged so far is durable already. Else wait->done comes. */
bool nv_log_sync(struct nv_log *log, struct nv_log_sync_wait *wait);
void nv_log_flush(struct nv_log *log, struct nv_log_request *request);
/* The log has failed: whoever waits for a sync hears it now, the sync under way may never end. */
void nv_log_sync_fails(struct nv_log *log, int error);

/* ---- read.c ---- */
void nv_log_read(struct nv_log *log, struct nv_log_request *request);
/* Reads for requests that have passed the deadline: nobody waits for them any more, who asked is answered -EIO. True: some. */
bool nv_log_give_up_reads(struct nv_log *log);
/* Is one of these blocks, which is covered by now, being read from below? */
bool nv_log_reading(const struct nv_log *log, uint64_t first, uint64_t blocks);

/* ---- bypass.c ---- */
void nv_log_bypass(struct nv_log *log, struct nv_log_request *request);
/* Its tombstone is in the log. */
void nv_log_entombed(struct nv_log *log, struct nv_log_request *request);
void nv_log_unblock(struct nv_log *log);
bool nv_log_bypassing(const struct nv_log *log, uint64_t block);
/* A bypass over covered blocks is over, or is to begin again. */
void nv_log_leave(struct nv_log *log, struct nv_log_request *request);
void nv_log_entomb(struct nv_log *log);
/* Hand I/O below. */
void nv_log_below(struct nv_log *log, struct nv_log_below *io);

/* ---- destage.c: what is carried, and when ---- */
void nv_log_destage(struct nv_log *log);
/* All of the batch has been written below, or has failed. */
void nv_log_carried(struct nv_log *log);
/* The rate counts: not in a log that is three quarters full, nor while a bypass waits, it is drained, has failed or ends. */
bool nv_log_paced(const struct nv_log *log);
/* Nothing is to be done for now; `moved`: something was. */
void nv_log_rest(struct nv_log *log, bool moved);

/* ---- carry.c: blocks on their way below ---- */
void nv_log_carry_on(struct nv_log *log);
/* The log has failed: what is not on its way yet is carried in its newest version, or not now. */
void nv_log_carry_newest(struct nv_log *log);
/* Runs whose reads have passed the deadline: what they were to carry is carried later. True: some. */
bool nv_log_give_up_runs(struct nv_log *log);
/* Is a destage write of one of these blocks under way? */
bool nv_log_carrying(const struct nv_log *log, uint64_t first, uint64_t blocks);

/* ---- pace.c: in its time ---- */
/* Blocks of a run, and of a batch, by the rate at most. */
uint32_t nv_log_run_most(const struct nv_log *log);
uint32_t nv_log_batch_most(const struct nv_log *log);
/* True: a run may begin. Else nv_log_carry_on() comes when it may, or from nv_log_resume(). */
bool nv_log_has_time(struct nv_log *log);
/* A run of so many blocks has begun. */
void nv_log_took_time(struct nv_log *log, uint32_t blocks);
/* Look again at what waits for its time: the rate may count no more. */
void nv_log_resume(struct nv_log *log);

/* ---- super.c: the tail ---- */
void nv_log_move_tail(struct nv_log *log);
/* The oldest record has a version that cannot be read, and that nothing newer has replaced below. */
bool nv_log_tail_is_lost(const struct nv_log *log);
void nv_log_make_void(struct nv_log *log);
/* The superblock takes too long. */
void nv_log_give_up_super(struct nv_log *log);
/* Bytes of the ring that are in use; whole quarters of it. */
uint64_t nv_log_used(const struct nv_log *log);

static inline uint32_t nv_log_quarters(const struct nv_log *log)
{
    return (uint32_t)(nv_log_used(log) * 4 / log->ring);
}

/* ---- fail.c ---- */
void nv_log_fail(struct nv_log *log, int error);
/* What takes longer than the deadline has failed. */
void nv_log_watch(struct nv_log *log);
bool nv_log_is_late(const struct nv_log *log, uint64_t since_ns);
/* A read of its device was given up, and has not ended yet. */
bool nv_log_hangs(const struct nv_log *log);
void nv_log_is_void(struct nv_log *log);
/* Nobody knows what one of these blocks will turn out to hold: reads fail, and changes wait until the log is void. */
bool nv_log_haunted(const struct nv_log *log, uint64_t first, uint64_t blocks);
/* It waits until the log is void, then it begins anew. */
void nv_log_hold(struct nv_log *log, struct nv_log_request *request);

#endif
