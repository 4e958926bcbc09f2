/*
 * Counters with one writer, a reactor, that the front reads at any time: an increment costs no locked instruction.
 */
#ifndef NV_COUNT_H
#define NV_COUNT_H

#include <stdatomic.h>
#include <stdint.h>

static inline void nv_count(_Atomic uint64_t *counter, uint64_t add)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + add, memory_order_relaxed);
}

#endif
