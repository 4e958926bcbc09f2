/*
 * The write-back log of one VVol: writes are acknowledged when they are in a ring on a device of the host, and carried to
 * what is below (a mirror, a map, in the simulator one disk) later. docs/cache.md has the promise and the order of steps.
 *
 * It knows requests, the I/O port and one function that does I/O below; no volume, no reactor. Used by one thread, on
 * whose port everything runs. Who uses it keeps range order: while a write-like request is under way no other one that
 * overlaps it (widened to blocks of 4096 bytes) is handed in. Reads may come at any time.
 *
 * Nothing is answered from inside nv_log_start(): answers run from the port's completions and from nv_log_pump(), which
 * the user calls once a turn after new requests and completions, and nv_log_tick(), some times a second.
 * Nothing is allocated after nv_log_create().
 */
#ifndef NV_LOG_H
#define NV_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "io/io.h"
#include "log/scan.h"

struct nv_log;

enum nv_log_kind { NV_LOG_READ = 1, NV_LOG_WRITE, NV_LOG_ZEROES, NV_LOG_TRIM, NV_LOG_FLUSH };

#define NV_LOG_FUA 1u

/* I/O below the log. `done` never runs from inside the function that starts it. */
struct nv_log_below {
    struct nv_log_below *next;
    struct nv_log *log;
    void (*done)(struct nv_log_below *io);
    uint8_t kind;                   /* enum nv_log_kind */
    uint8_t flags;                  /* NV_LOG_FUA */
    bool ours;                      /* the log's own: destaging */
    int error;                      /* 0 or -errno */
    uint64_t offset, length;        /* bytes */
    uint8_t *data;
    void *user[8];                  /* of who carries it out */
};

struct nv_log_sync_wait {
    struct nv_log_sync_wait *next;
    uint64_t target;                /* position */
    void (*done)(struct nv_log_sync_wait *wait, int error);
};

struct nv_log_request {
    struct nv_log_request *next;    /* the log's, until it is done */
    void (*done)(struct nv_log_request *request);
    uint8_t kind, flags;
    int error;                      /* 0 or -errno, when done */
    uint64_t offset, length;        /* bytes; of write-like ones: whole blocks, but for the VVol's end */
    uint8_t *data;
    /* the log's own */
    struct nv_log_request *beside;  /* of the bypasses over covered blocks, or of the reads below */
    uint64_t moved;                 /* READ: bytes that are there */
    uint64_t covers;                /* FLUSH: bypassed writes that it covers */
    uint64_t losses;                /* FLUSH: how many there had been when it was asked for */
    uint8_t parts;                  /* FLUSH: what it waits for */
    bool alone;                     /* READ: one block at a time, a longer read has failed */
    bool dropped;                   /* written below; its tombstone is on its way */
    bool hold;                      /* FLUSH: the log could not be synced */
    bool routed;                    /* its place in a sequence has been noted */
    bool under_way;                 /* held: its record, or tombstone, may still come to be in the log */
    bool went_below;                /* held: it was written below, beside what the log has */
    uint64_t held_ns;               /* held: since when */
    struct nv_log_sync_wait wait;
    struct nv_log_below below;
};

enum nv_log_state {
    NV_LOG_CLOSED,
    NV_LOG_RECOVERING,
    NV_LOG_THROUGH,                 /* recovered, but nothing may be logged: control does not know yet, or it is draining */
    NV_LOG_SERVING,
    NV_LOG_FAILED,                  /* the device is not trusted: everything in it is carried below, and it is made void */
    NV_LOG_VOID,                    /* ... it is; all goes below */
};

enum nv_log_event {
    NV_LOG_OPENED,                  /* `found` says what was found */
    NV_LOG_DRAINED,                 /* nothing is logged any more, and the superblock says so */
    NV_LOG_FAILING,                 /* value: -errno of what went wrong */
    NV_LOG_LOST,                    /* value: the block that can be read nowhere */
    NV_LOG_NEEDS_WORD,              /* it cannot be made void on its device: nv_log_forget() when control has committed that */
    NV_LOG_RESTS,                   /* HANGS was found, and what had been asked of the device has ended: nv_log_free() may be */
};

struct nv_log_found {
    enum nv_log_verdict verdict;
    int error;                      /* UNREADABLE, HANGS: -errno */
    struct nv_log_super super;      /* as found, or as formatted */
    uint64_t records;
    uint64_t dirty_bytes;
};

struct nv_log_config {
    struct nv_io *io;
    nv_handle handle;               /* of the log's file or device */
    uint64_t offset;                /* where the log begins in it, a multiple of 4096 */
    struct nv_log_claim claim;      /* claim.length: bytes from offset on */
    bool discard;                   /* format whatever is there */
    bool anew;                      /* it is to be empty, and its device may have failed before (log/open.c) */
    uint8_t fresh[16];              /* random: id of a log that is formatted */
    uint8_t begin[16];              /* random: this life's chain */
    uint64_t size;                  /* of the VVol */
    uint32_t bypass_bytes;          /* writes of so many go below; at most NV_LOG_BYPASS_MAX */
    uint32_t stream_bytes;          /* ... and of writers that wrote so many in sequence; 0: no difference */
    uint32_t age_ms;                /* when the oldest logged write is to be destaged */
    uint32_t deadline_ms;           /* what of the log's device takes longer counts as failed; 0: nothing does */
    uint64_t rate;                  /* bytes a second that are destaged at most, while nobody waits for it; 0: no limit */
    uint32_t runs;                  /* destage writes under way at once when there is no room left; 0: NV_LOG_RUNS */
    void *context;
    void (*below)(void *context, struct nv_log_below *io);
    void (*event)(void *context, enum nv_log_event event, int64_t value);
};

struct nv_log_look {
    enum nv_log_state state;
    uint64_t ring_bytes, used_bytes;
    uint64_t dirty_blocks, lost_blocks;
    uint64_t losses;                /* blocks that were lost, ever */
    uint64_t oldest_age_ms;
    uint64_t held;                  /* requests that wait for the log to be void */
    uint64_t blocked;               /* bypasses that had to wait: for a destage write or read below, or for room */
    uint64_t logged, groups, syncs, bypassed, tombstones, destaged, merged;
};

/* 0 or -errno. */
int nv_log_create(const struct nv_log_config *config, struct nv_log **out);
/* Nothing is under way any more (nv_log_idle(), and not nv_log_abandoned()). */
void nv_log_free(struct nv_log *log);
/* Read what is there, and begin a life of it: NV_LOG_OPENED follows. Requests may come from then on. */
void nv_log_open(struct nv_log *log);
const struct nv_log_found *nv_log_found(const struct nv_log *log);
/* Control has committed that this log may hold data: write into it. */
void nv_log_allow(struct nv_log *log);
/* Other limits, from now on; what was routed or counted by the old ones stays as it is. bypass_bytes: NV_LOG_BYPASS_MAX. */
struct nv_log_limits {
    uint32_t bypass_bytes, stream_bytes, age_ms, deadline_ms;
    uint64_t rate;
};
void nv_log_limit(struct nv_log *log, const struct nv_log_limits *limits);
/* Carry everything below and log nothing more: NV_LOG_DRAINED follows, unless something was lost. */
void nv_log_drain(struct nv_log *log);
/* Control has committed that nothing in this log is to be replayed (NV_LOG_NEEDS_WORD). */
void nv_log_forget(struct nv_log *log);
/* Destage nothing more (the VVol is fenced); what is under way ends. */
void nv_log_stop(struct nv_log *log);
/* What waits for the log to be void, or for its room, may wait for ever: what is below fails, or control's word is needed. */
bool nv_log_stuck(const struct nv_log *log);
/* Stop, and answer what waits so with -ESHUTDOWN, now and later. */
void nv_log_shut(struct nv_log *log);
/* What `data` of an I/O of ours points to is used past its end, until nv_log_memory_back(): said before it is done. */
void nv_log_memory_kept(struct nv_log *log, const uint8_t *data);
void nv_log_memory_back(struct nv_log *log, const uint8_t *data);
/* The VVol has at least so many bytes; until now it had a multiple of 4096. */
void nv_log_grow(struct nv_log *log, uint64_t size);

void nv_log_start(struct nv_log *log, struct nv_log_request *request);
/* What clients send is on its way: a small record may wait for it, until the pump after the word that it is not. */
void nv_log_expect(struct nv_log *log, bool more);
/* One does. */
bool nv_log_waits(const struct nv_log *log);
void nv_log_pump(struct nv_log *log);
void nv_log_tick(struct nv_log *log);
/*
 * Nothing in it is missed when it is used no more: it is drained, or was never written to, or is void and its device does
 * nothing any more, or was refused.
 */
bool nv_log_holds_nothing(const struct nv_log *log);
/* Nothing of the log's is under way in the port or below, but for what hung when it was opened. */
bool nv_log_idle(const struct nv_log *log);
/* HANGS was found, and what was asked of the device has not ended: the log's memory is the port's until NV_LOG_RESTS. */
bool nv_log_abandoned(const struct nv_log *log);
void nv_log_look(const struct nv_log *log, struct nv_log_look *out);
enum nv_log_state nv_log_state(const struct nv_log *log);
struct nv_log_span {
    uint64_t offset, length;        /* bytes */
};
/* What can be read nowhere, from the VVol's beginning on, as many spans as fit; -ENOMEM. It takes its time. */
int nv_log_lost(const struct nv_log *log, struct nv_log_span *out, uint32_t max);
/*
 * From `offset` on so many bytes, at most `length`, are alike: `holds`: the log has something of each of their blocks, or
 * it is not known yet; else of none. Not all that are alike may be found.
 */
uint64_t nv_log_alike(const struct nv_log *log, uint64_t offset, uint64_t length, bool *holds);
/* NULL, or which invariant does not hold. */
const char *nv_log_check(const struct nv_log *log);

#endif
