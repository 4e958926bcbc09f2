/*
 * See recorder.h. Invariants: head <= tail <= head + NV_TRACE_RING (mod 2^32); only the reactor writes tail, slots and
 * its own half, only the front writes head; a message is on its way at most once, and the reactor reads what is wanted
 * after it has said that the next message may come, so that the front's last word is always heard.
 */
#include "reactor/recorder.h"

#include <assert.h>
#include <errno.h>

#include "io/io.h"
#include "reactor/count.h"
#include "reactor/pool.h"
#include "reactor/reactor.h"

struct nv_trace_slot {
    uint64_t session;
    nv_trace_record record;
};

_Static_assert((NV_TRACE_RING & (NV_TRACE_RING - 1)) == 0, "the ring is indexed by a mask");
_Static_assert(sizeof(nv_trace_record) == 88, "records are read by their layout");

static void switches(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_recorder *recorder = &reactor->recorder;

    assert(message == &recorder->message);
    (void)message;
    atomic_store(&recorder->telling, false);
    recorder->session = atomic_load(&recorder->wanted);
    recorder->every = atomic_load(&recorder->wanted_every);
    recorder->skipped = recorder->every; /* the first one is recorded */
    recorder->since_ns = nv_io_now_ns(reactor->io);
    if (atomic_load(&recorder->recording) != recorder->session)
        atomic_store(&recorder->dropped, 0);
    atomic_store(&recorder->recording, recorder->session);
}

int nv_recorder_init(struct nv_recorder *recorder)
{
    recorder->message.run = switches;
    recorder->slots = nv_pages_map(NV_TRACE_RING * sizeof *recorder->slots);
    return recorder->slots ? 0 : -ENOMEM;
}

void nv_recorder_free(struct nv_recorder *recorder)
{
    if (recorder->slots)
        nv_pages_unmap(recorder->slots, NV_TRACE_RING * sizeof *recorder->slots);
}

bool nv_recorder_ask(struct nv_recorder *recorder, uint64_t session, uint32_t every)
{
    atomic_store(&recorder->wanted_every, every);
    atomic_store(&recorder->wanted, session);
    return !atomic_exchange(&recorder->telling, true);
}

bool nv_recorder_chooses(struct nv_recorder *recorder)
{
    if (++recorder->skipped < recorder->every)
        return false;
    recorder->skipped = 0;
    return true;
}

void nv_recorder_put(struct nv_recorder *recorder, const nv_trace_record *record)
{
    uint32_t tail = atomic_load_explicit(&recorder->tail, memory_order_relaxed);
    uint32_t head = atomic_load_explicit(&recorder->head, memory_order_acquire);

    assert(recorder->session != 0 && tail - head <= NV_TRACE_RING);
    if (tail - head == NV_TRACE_RING) {
        nv_count(&recorder->dropped, 1);
        return;
    }
    recorder->slots[tail & (NV_TRACE_RING - 1)] = (struct nv_trace_slot){recorder->session, *record};
    atomic_store_explicit(&recorder->tail, tail + 1, memory_order_release);
}

int nv_recorder_take(struct nv_recorder *recorder, uint64_t session, nv_trace_record *out, int max)
{
    uint32_t head = atomic_load_explicit(&recorder->head, memory_order_relaxed);
    uint32_t tail = atomic_load_explicit(&recorder->tail, memory_order_acquire);
    int count = 0;

    for (; count < max && head != tail; head++) {
        const struct nv_trace_slot *slot = &recorder->slots[head & (NV_TRACE_RING - 1)];
        if (slot->session == session)
            out[count++] = slot->record;
    }
    atomic_store_explicit(&recorder->head, head, memory_order_release);
    return count;
}

void nv_recorder_clear(struct nv_recorder *recorder)
{
    atomic_store_explicit(&recorder->head, atomic_load_explicit(&recorder->tail, memory_order_acquire),
                          memory_order_release);
}
