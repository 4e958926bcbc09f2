/*
 * histogram: log-linear latency histogram, 64 buckets per power of two (within 1.6 %), nanoseconds.
 *
 * Invariants: fixed memory, adding is one increment. It does not lock: one per thread, merged at the end.
 */
#ifndef PERF_HISTOGRAM_H
#define PERF_HISTOGRAM_H
#include <assert.h>
#include <stdint.h>

enum { HISTOGRAM_SUB_BITS = 6, HISTOGRAM_BUCKETS = (40 - HISTOGRAM_SUB_BITS + 1) << HISTOGRAM_SUB_BITS };

struct histogram {
    uint64_t count;
    uint64_t sum_ns;
    uint64_t max_ns;
    uint64_t bucket[HISTOGRAM_BUCKETS];
};

static inline unsigned histogram_index(uint64_t ns)
{
    if (ns < 1u << HISTOGRAM_SUB_BITS) return (unsigned)ns;
    unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - HISTOGRAM_SUB_BITS;
    unsigned index = ((shift + 1) << HISTOGRAM_SUB_BITS) + (unsigned)((ns >> shift) & ((1u << HISTOGRAM_SUB_BITS) - 1));
    return index < HISTOGRAM_BUCKETS ? index : HISTOGRAM_BUCKETS - 1;
}

/* The middle of a bucket. */
static inline uint64_t histogram_value(unsigned index)
{
    assert(index < HISTOGRAM_BUCKETS);
    unsigned shift = index >> HISTOGRAM_SUB_BITS;
    if (shift == 0) return index;
    uint64_t low = ((uint64_t)(index & ((1u << HISTOGRAM_SUB_BITS) - 1)) | 1u << HISTOGRAM_SUB_BITS) << (shift - 1);
    return low + ((1ull << (shift - 1)) >> 1);
}

static inline void histogram_add(struct histogram *h, uint64_t ns)
{
    h->count++;
    h->sum_ns += ns;
    if (ns > h->max_ns) h->max_ns = ns;
    h->bucket[histogram_index(ns)]++;
}

static inline void histogram_merge(struct histogram *into, const struct histogram *from)
{
    into->count += from->count;
    into->sum_ns += from->sum_ns;
    if (from->max_ns > into->max_ns) into->max_ns = from->max_ns;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) into->bucket[i] += from->bucket[i];
}

/* The value that `fraction` of all samples do not exceed. */
static inline uint64_t histogram_quantile(const struct histogram *h, double fraction)
{
    assert(fraction >= 0 && fraction <= 1);
    uint64_t want = (uint64_t)(fraction * (double)h->count), seen = 0;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += h->bucket[i];
        if (seen > want) return histogram_value(i);
    }
    return h->max_ns;
}
#endif
