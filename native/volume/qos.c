/*
 * See qos.h. A tick is 1/16 ns, so that rounding costs nothing that can be measured at any rate, and 64 bits last for 36
 * years of uptime. Costs are rounded up: a limit is never exceeded by rounding.
 */
#include "volume/qos.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

#include "error.h"
#include "limits.h"

#define TICKS_PER_NS 16u
#define TICKS_PER_SECOND (1000000000ull * TICKS_PER_NS)
#define SCALE_SHIFT 28u /* the smallest rate, 1 a second, still fits in 64 bits */

_Static_assert(sizeof(struct nv_qos_state) == 16, "both limits change in one compare-and-swap");

int nv_qos_check(const nv_qos_limits *limits)
{
    if (limits->iops > NV_QOS_IOPS_MAX)
        return nv_fail(EINVAL, "a limit of %" PRIu64 " I/Os a second is above %llu", limits->iops, NV_QOS_IOPS_MAX);
    if (limits->bandwidth && (limits->bandwidth < NV_QOS_BANDWIDTH_MIN || limits->bandwidth > NV_QOS_BANDWIDTH_MAX))
        return nv_fail(EINVAL, "a limit of %" PRIu64 " bytes a second is not in %llu..%llu", limits->bandwidth,
                       NV_QOS_BANDWIDTH_MIN, NV_QOS_BANDWIDTH_MAX);
    if (limits->burst_us < NV_QOS_BURST_MIN_US || limits->burst_us > NV_QOS_BURST_MAX_US)
        return nv_fail(EINVAL, "a burst of %u us is not in %u..%u", limits->burst_us, NV_QOS_BURST_MIN_US,
                       NV_QOS_BURST_MAX_US);
    if (limits->io_bytes && (limits->io_bytes < NV_QOS_IO_MIN || limits->io_bytes > NV_PAYLOAD_MAX))
        return nv_fail(EINVAL, "an I/O of %u bytes is not in %u..%u", limits->io_bytes, NV_QOS_IO_MIN, NV_PAYLOAD_MAX);
    if (limits->shares < 1 || limits->shares > NV_SHARES_MAX)
        return nv_fail(EINVAL, "%u shares are not in 1..%u", limits->shares, NV_SHARES_MAX);
    return limits->reserved ? nv_fail(EINVAL, "limits have a non-zero reserved field") : 0;
}

int nv_qos_limits_anything(const nv_qos_limits *limits)
{
    return limits->iops || limits->bandwidth;
}

static uint64_t scale(uint64_t rate)
{
    return rate ? (uint64_t)((((unsigned __int128)TICKS_PER_SECOND << SCALE_SHIFT) + rate - 1) / rate) : 0;
}

void nv_qos_init(struct nv_qos *qos, const nv_qos_limits *limits)
{
    memset(qos, 0, sizeof *qos);
    qos->scale[NV_QOS_IOS] = scale(limits->iops);
    qos->scale[NV_QOS_BYTES] = scale(limits->bandwidth);
    /* Whoever waits is woken up to a quantum late (nbd/pace.c): that comes off the burst, so that its word holds. */
    qos->tolerance = (limits->burst_us - NV_QOS_QUANTUM_US) * 1000ull * TICKS_PER_NS;
    qos->io_bytes = limits->io_bytes;
}

static uint64_t ticks(uint64_t units, uint64_t scale_of_one)
{
    const unsigned __int128 exact = (unsigned __int128)units * scale_of_one;

    return (uint64_t)((exact + ((1u << SCALE_SHIFT) - 1)) >> SCALE_SHIFT);
}

struct nv_qos_cost nv_qos_cost(const struct nv_qos *qos, uint64_t bytes)
{
    const uint64_t ios = qos->io_bytes && bytes > qos->io_bytes ? (bytes + qos->io_bytes - 1) / qos->io_bytes : 1;

    assert(bytes <= NV_PAYLOAD_MAX); /* no cost is longer than some hours: sums of them stay far from 2^64 */
    return (struct nv_qos_cost){
        .ticks = {[NV_QOS_IOS] = ticks(ios, qos->scale[NV_QOS_IOS]),
                  [NV_QOS_BYTES] = ticks(bytes, qos->scale[NV_QOS_BYTES])}};
}

/* True: `from` was there and is replaced by `to`; false: `from` is what was there. */
static bool swap(struct nv_qos_state *state, struct nv_qos_state *from, const struct nv_qos_state *to)
{
    unsigned __int128 expected, wanted, found;

    memcpy(&expected, from, sizeof expected);
    memcpy(&wanted, to, sizeof wanted);
    found = __sync_val_compare_and_swap((unsigned __int128 *)(void *)state, expected, wanted);
    memcpy(from, &found, sizeof found);
    return found == expected;
}

/* A first guess, perhaps torn: the swap tells. */
static struct nv_qos_state peek(const struct nv_qos_state *state)
{
    struct nv_qos_state seen;

    for (unsigned i = 0; i < NV_QOS_LIMITS; i++)
        seen.arrival[i] = __atomic_load_n(&state->arrival[i], __ATOMIC_RELAXED);
    return seen;
}

uint64_t nv_qos_reserve(struct nv_qos *qos, uint64_t now_ns, const struct nv_qos_cost *cost)
{
    struct nv_qos_state from = peek(&qos->state), to;
    uint64_t start;

    do {
        start = now_ns * TICKS_PER_NS;
        for (unsigned i = 0; i < NV_QOS_LIMITS; i++) { /* room for all of it; for more than the burst: nothing owed */
            const uint64_t slack = qos->tolerance > cost->ticks[i] ? qos->tolerance - cost->ticks[i] : 0;
            if (from.arrival[i] > start + slack)
                start = from.arrival[i] - slack;
        }
        for (unsigned i = 0; i < NV_QOS_LIMITS; i++)
            to.arrival[i] = qos->scale[i] ? (from.arrival[i] > start ? from.arrival[i] : start) + cost->ticks[i] : 0;
    } while (!swap(&qos->state, &from, &to));
    return (start + TICKS_PER_NS - 1) / TICKS_PER_NS;
}

void nv_qos_refund(struct nv_qos *qos, const struct nv_qos_cost *cost)
{
    struct nv_qos_state from = peek(&qos->state), to;

    do {
        to = from;
        for (unsigned i = 0; i < NV_QOS_LIMITS; i++)
            to.arrival[i] -= cost->ticks[i] < to.arrival[i] ? cost->ticks[i] : to.arrival[i];
    } while (!swap(&qos->state, &from, &to));
}
