/*
 * The recorder of one reactor: the fate of single requests, while somebody traces their volume. Records go into an SPSC
 * ring of their own that the front reads when it likes; a full ring drops what comes and counts it, and nobody waits.
 *
 * Off, a request pays for reading `session`, which is then 0, where a stamp would be taken. A session is the front's
 * number of a trace and the volume's number; stamps and records carry it, because slots of requests and the ring
 * outlive it. What the stamps mean is nbd/trace.h's business.
 */
#ifndef NV_RECORDER_H
#define NV_RECORDER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "limits.h"
#include "nbdvvol.h"
#include "reactor/inbox.h"

struct nv_stamps {                  /* of one request; they mean nothing unless `session` is the recorder's */
    uint64_t session;
    uint64_t received_ns;
    uint64_t parsed_ns;
    uint64_t submitted_ns;          /* 0: not yet, or never: it was answered without its volume's storage */
    uint64_t completed_ns;
};

struct nv_recorder {
    uint64_t session;               /* the reactor's: trace << 32 | volume; 0: nobody traces here */
    uint64_t since_ns;              /* ... when it began */
    uint32_t every;                 /* ... one of so many requests is recorded */
    uint32_t skipped;
    _Atomic uint64_t wanted;        /* the front's word: session, and */
    _Atomic uint32_t wanted_every;
    _Atomic bool telling;           /* `message` is on its way */
    struct nv_message message;
    _Atomic uint64_t recording;     /* what the reactor has made of it: session, and */
    _Atomic uint64_t dropped;       /* records of it that found the ring full */
    struct nv_trace_slot *slots;    /* NV_TRACE_RING of them, resident where touched */
    _Alignas(64) _Atomic uint32_t head; /* next to read */
    _Alignas(64) _Atomic uint32_t tail; /* next to write */
};

/* Front, before the reactor runs: 0 or -ENOMEM. */
int nv_recorder_init(struct nv_recorder *recorder);
void nv_recorder_free(struct nv_recorder *recorder);
/* Front: what the reactor is to record from the next turn on; session 0: nothing. True: send recorder->message. */
bool nv_recorder_ask(struct nv_recorder *recorder, uint64_t session, uint32_t every);
/* Front: take up to max records of a session; older ones are passed over. */
int nv_recorder_take(struct nv_recorder *recorder, uint64_t session, nv_trace_record *out, int max);
/* Front: pass over everything. */
void nv_recorder_clear(struct nv_recorder *recorder);
/* Reactor: is this request one of those that are recorded? Call once a request of the traced volume. */
bool nv_recorder_chooses(struct nv_recorder *recorder);
/* Reactor. */
void nv_recorder_put(struct nv_recorder *recorder, const nv_trace_record *record);

#endif
