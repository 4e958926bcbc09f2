/*
 * See qos_judge.h. A bucket that leaks at the rate and never holds more than B says the same as "no window of length w
 * holds more than B + rate * w", for every window at once.
 */
#include "sim/qos_judge.h"

#include "io/io_sim.h"
#include "limits.h"
#include "volume/volume.h"

#define BILLION 1000000000

void judge_begin(struct qos_judge *judge, uint64_t bytes_max)
{
    *judge = (struct qos_judge){.bytes_max = bytes_max};
}

void judge_changes(struct qos_judge *judge)
{
    judge->changing = true;
    judge->left = 0; /* from here on it may be the new limits that they give their time back to */
    judge->regime++;
}

void judge_changed(struct qos_judge *judge, const nv_qos_limits *limits)
{
    *judge = (struct qos_judge){
        .limits = *limits,
        .bytes_max = judge->bytes_max,
        .regime = judge->regime + 1,
        .leaving = judge->leaving,
        .left = judge->left,
    };
}

static uint64_t rate(const struct qos_judge *judge, unsigned which)
{
    return which ? judge->limits.bandwidth : judge->limits.iops;
}

static uint64_t ios_of(const struct qos_judge *judge, uint64_t bytes)
{
    const uint64_t unit = judge->limits.io_bytes;

    return unit && bytes ? (bytes - 1) / unit + 1 : 1;
}

/* Units of the largest request that there may be. */
static uint64_t most(const struct qos_judge *judge, unsigned which)
{
    return which ? judge->bytes_max : ios_of(judge, judge->bytes_max);
}

static void check_window(const struct qos_judge *judge, unsigned which)
{
    const __int128 of_rate = (__int128)rate(judge, which);
    const __int128 late_ns = (__int128)nv_sim_timers_late_ns();
    __int128 burst = of_rate * judge->limits.burst_us * 1000;
    __int128 one = (__int128)judge->largest[which] * BILLION + of_rate * NV_QOS_QUANTUM_US * 1000;
    __int128 back = (__int128)most(judge, which) * (judge->leaving + judge->left) * BILLION;
    __int128 allowed = (burst > one ? burst : one) + of_rate * late_ns + back;

    if (judge->level[which] > allowed)
        nv_sim_violation("%s: a window holds %llu more than its rate gives, and may hold %llu",
                         which ? "bytes" : "I/Os", (unsigned long long)(judge->level[which] / BILLION),
                         (unsigned long long)(allowed / BILLION));
}

void judge_start(struct qos_judge *judge, uint8_t kind, uint64_t bytes, uint64_t now_ns)
{
    uint64_t units[2];

    if (kind == NV_REQUEST_FLUSH)
        return;
    if (kind == NV_REQUEST_TRIM || kind == NV_REQUEST_STATUS)
        bytes = 0;
    if (bytes > NV_PAYLOAD_MAX)
        bytes = NV_PAYLOAD_MAX;
    units[0] = ios_of(judge, bytes);
    units[1] = bytes;
    for (unsigned i = 0; i < 2; i++) {
        judge->started[i] += units[i];
        if (judge->changing || !rate(judge, i))
            continue;
        judge->level[i] -= (__int128)rate(judge, i) * (now_ns - judge->at_ns);
        if (judge->level[i] < 0)
            judge->level[i] = 0;
        judge->level[i] += (__int128)units[i] * BILLION;
        if (units[i] > judge->largest[i])
            judge->largest[i] = units[i];
        check_window(judge, i);
    }
    judge->at_ns = now_ns;
}

void judge_leaves(struct qos_judge *judge)
{
    judge->leaving++;
}

void judge_left(struct qos_judge *judge)
{
    judge->leaving--;
    judge->left++;
}

uint64_t judge_patience_ns(const struct qos_judge *judge, uint32_t depth, uint32_t connections)
{
    uint64_t slowest = 0;

    if (judge->limits.iops && judge->limits.bandwidth)
        connections += judge->left; /* what one limit made wait moved the other's time on, and that is not given back */
    for (unsigned i = 0; i < 2; i++)
        if (rate(judge, i)) {
            uint64_t one_ns = (uint64_t)(((__int128)most(judge, i) * BILLION + rate(judge, i) - 1) / rate(judge, i));
            if (one_ns > slowest)
                slowest = one_ns;
        }
    return depth * (connections * (slowest + 1) + NV_QOS_QUANTUM_US * 1000ull + nv_sim_timers_late_ns());
}
