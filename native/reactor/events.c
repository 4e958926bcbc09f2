/*
 * See events.h. Invariants: head <= tail <= head + NV_EVENT_RING (mod 2^32); only the reactor writes tail and records,
 * only the front writes head; waiting slots enter the ring in the order they were raised.
 */
#include "reactor/events.h"

#include <assert.h>
#include <stddef.h>

#include "io/io.h"

_Static_assert((NV_EVENT_RING & (NV_EVENT_RING - 1)) == 0, "the ring is indexed by a mask");
_Static_assert(sizeof(nv_event) == 64, "events are 64-byte records");

void nv_events_init(struct nv_events *events, int bell)
{
    *events = (struct nv_events){.bell = bell};
    events->waiting_tail = &events->waiting;
}

static bool put(struct nv_events *events, const struct nv_event_slot *slot)
{
    uint32_t tail = atomic_load_explicit(&events->tail, memory_order_relaxed);
    uint32_t head = atomic_load_explicit(&events->head, memory_order_acquire);

    assert(tail - head <= NV_EVENT_RING);
    if (tail - head == NV_EVENT_RING)
        return false;
    events->records[tail & (NV_EVENT_RING - 1)] = (struct nv_event_record){slot->event, slot->subject};
    atomic_store_explicit(&events->tail, tail + 1, memory_order_release);
    events->rang = true;
    return true;
}

void nv_events_raise(struct nv_events *events, struct nv_event_slot *slot)
{
    assert(!slot->waiting && slot->event.kind != 0);
    if (!events->waiting && put(events, slot))
        return;
    slot->waiting = true;
    slot->next = NULL;
    *events->waiting_tail = slot;
    events->waiting_tail = &slot->next;
}

void nv_events_flush(struct nv_events *events)
{
    while (events->waiting) {
        struct nv_event_slot *slot = events->waiting, *next = slot->next;
        slot->waiting = false; /* once it is in the ring, the front may free it: nothing touches it after put() */
        if (!put(events, slot)) {
            atomic_store(&events->starved, 1);
            if (!put(events, slot)) { /* looked again after asking: the reader cannot have missed the wish */
                slot->waiting = true;
                break;
            }
        }
        events->waiting = next;
        if (!next)
            events->waiting_tail = &events->waiting;
    }
    if (events->rang) {
        events->rang = false;
        nv_bell_ring(events->bell);
    }
}

int nv_events_take(struct nv_events *events, struct nv_event_record *out, int max)
{
    uint32_t head = atomic_load_explicit(&events->head, memory_order_relaxed);
    uint32_t tail = atomic_load_explicit(&events->tail, memory_order_acquire);
    int count = 0;

    while (count < max && head != tail)
        out[count++] = events->records[head++ & (NV_EVENT_RING - 1)];
    atomic_store_explicit(&events->head, head, memory_order_release);
    return count;
}
