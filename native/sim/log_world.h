/*
 * The world of nvlog: a write-back log (native/log) on one simulated disk over another one, which is what lies below it;
 * requests at random or by a script, and the registry's word about the log. One life runs until a crash or until all is
 * drained; the next one begins with what the disks were left with.
 */
#ifndef NV_SIM_LOG_WORLD_H
#define NV_SIM_LOG_WORLD_H

#include "log/log.h"
#include "sim/log_model.h"
#include "sim/log_twin.h"
#include "sim/random.h"

#define WORLD_REQUESTS 24u
#define WORLD_CROWD 96u             /* requests at once in a world that is crowded: more reads than the log has memory for */
#define WORLD_IOS (WORLD_CROWD + NV_LOG_RUNS + 1u)
#define WORLD_RING_MAX (1u << 20)

struct world_plan {
    uint64_t seed;
    uint32_t blocks, ring, depth, lives, steps;
    uint32_t bypass, stream, age_ms, deadline_ms;
    uint64_t rate;
    uint16_t log_trouble;           /* chance in 1024 of a life: its log device fails in some way */
    uint16_t leg_trouble;
    bool pure;                      /* nothing goes past the log, nothing fails: prefixes are judged */
    bool crowded;                   /* many reads at once, and what is below has a twin that keeps memory */
    int64_t crash_at;               /* the step of the first life at which it crashes; -1: by chance */
    const char *script;             /* what is asked for, instead of chance; NULL: chance */
    bool trace;
};

struct world_request {
    struct nv_log_request log;
    bool used;
    uint64_t first, blocks;
    uint8_t data[16 * MODEL_BLOCK];
    struct model_least least[16];
    uint32_t covered[MODEL_BLOCKS];
};

struct world_io {                   /* I/O below */
    struct nv_op op;
    struct iovec iov;
    struct nv_log_below *below;
    struct twin_write *twin;        /* or NULL */
    struct world_io *next;          /* of those that wait for a sync to end */
    uint64_t moved;
    bool used;
};

struct world {
    struct world_plan plan;
    struct sim_random random;
    struct model model, at_crash;
    struct nv_io *io;
    struct nv_log *log;
    int log_file, leg_file;
    nv_handle log_handle, leg_handle;
    struct world_request requests[WORLD_CROWD];
    uint32_t places;                /* of them */
    struct twin twin;
    bool leg_syncs;                 /* there, one sync at a time: who comes later waits */
    struct world_io *sync_waits;
    struct nv_log_below *landed, **landed_last; /* a crowded world answers what is below once a turn, as a volume does */
    struct world_io ios[WORLD_IOS];
    bool busy[MODEL_BLOCKS];        /* a change of the block is under way: range order */
    uint32_t outstanding;
    int leg_fault;                  /* a failed sync of the leg latches, as nv_sync does ... */
    bool forgiven;                  /* ... until the operator clears it, who goes on: one may still be under way */
    uint64_t leg_written, leg_synced;
    bool opened, drained, needs_word, calm, allowed, troubled;
    enum nv_log_verdict verdict;
    /* the registry */
    bool dirty;
    uint8_t id[16];
    uint64_t epoch;
    /* what the last life left */
    uint8_t *log_image, *leg_image;
    uint64_t log_size, leg_size, vvol_size;
    bool cache_survived;
    uint64_t step, done, crashes, life;
    uint64_t hung_openings;         /* logs that were refused for their device hung */
};

/* All lives of a plan; ends the process at a violation. */
void world_run(struct world *world, const struct world_plan *plan);
/* One life step by step: it begins and may log; block by block is written; it ends in a crash, whose outcome is judged. */
void world_begin(struct world *world, const struct world_plan *plan);
void world_ask(struct world *world, uint8_t kind, uint8_t flags, uint64_t block);
void world_write(struct world *world, uint64_t block);
/* All that can move moves until it is over; else `what` is a violation. */
void world_settle(struct world *world, bool (*over)(const struct world *world), const char *what);
bool world_has_answered(const struct world *world);
void world_end(struct world *world);

/* log_chains.c: a log that fails while what goes past it and what it carries are under way to the same place. */
void world_overtaken(struct world *world, uint64_t seed);
/* A log whose reads hang, and then the sync that a record waits for which was on its way. */
void world_late_sync(struct world *world, uint64_t seed);
/* A log whose tail cannot move, for what is there is lost. */
void world_lost_tail(struct world *world, uint64_t seed);

/* log_leg.c: I/O below the log, and its answers, where they come once a turn; of the world that runs. */
extern struct world *world_of_io;
void world_below(void *context, struct nv_log_below *asked);
void world_take_landed(struct world *world);

/* log_pace.c: a log whose destaging has a rate; ends the process at a violation. */
void pace_run(uint64_t seed);

#endif
