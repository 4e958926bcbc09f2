/*
 * Events from one reactor to the front thread: an SPSC ring of fixed records and the plane's bell. Each event's slot is
 * part of the object that raises it, so an event that finds the ring full waits in a list and is never lost.
 */
#ifndef NV_EVENTS_H
#define NV_EVENTS_H

#include <stdatomic.h>
#include <stdbool.h>

#include "limits.h"
#include "nbdvvol.h"

struct nv_event_slot {
    struct nv_event_slot *next;
    bool waiting;       /* raised, not yet in the ring */
    void *subject;      /* for the front: what ended with this event, or NULL */
    nv_event event;
};

struct nv_event_record {
    nv_event event;
    void *subject;
};

struct nv_events {
    int bell;
    bool rang;                              /* something new since the last ring of the bell */
    struct nv_event_slot *waiting, **waiting_tail;
    _Atomic uint32_t starved;               /* the reader should wake the reactor after it has made room */
    _Alignas(64) _Atomic uint32_t head;     /* next to read */
    _Alignas(64) _Atomic uint32_t tail;     /* next to write */
    struct nv_event_record records[NV_EVENT_RING];
};

void nv_events_init(struct nv_events *events, int bell);
/* Reactor: raise the slot's event. The slot stays untouched until it is no longer `waiting`. */
void nv_events_raise(struct nv_events *events, struct nv_event_slot *slot);
/* Reactor, at the end of a turn: move waiting events into the ring, ring the bell if there is news. */
void nv_events_flush(struct nv_events *events);
/* Front: take up to max events. */
int nv_events_take(struct nv_events *events, struct nv_event_record *out, int max);

#endif
