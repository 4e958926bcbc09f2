/*
 * usage: what a server costs: CPU time and memory of a process and all its descendants (nbd-server
 * forks per connection).
 *
 * CPU time comes from each process's CPU clock: user plus system, every thread, also ended ones, in
 * nanoseconds, where /proc/PID/stat counts 10 ms ticks. It does not see processes that ended, so take
 * both readings while the connections live.
 */
#ifndef PERF_USAGE_H
#define PERF_USAGE_H
#include <stdint.h>

struct usage {
    uint64_t cpu_ns;
    uint64_t rss_bytes;             /* resident, shared pages included */
    uint64_t rss_anon_bytes;        /* resident and private to the process: no mapped files */
    uint64_t switches;              /* context switches of its threads, voluntary and not */
    unsigned threads;
};

void usage_read(int pid, struct usage *out);    /* adds to *out; clear it first */
#endif
