/*
 * loop: the closed loop of the load generator: each lane (one connection) keeps `depth` requests in
 * flight, sends as many as it may in one write and reads replies in large chunks.
 *
 * Invariants: a slot is busy from the moment its request is built until its reply is whole; a cookie
 * names its slot and the slot's turn, so a doubled or invented reply is caught. With `verify` no two
 * requests in flight touch one block, lanes own disjoint parts of the export, and every read must
 * return exactly what the last write to that block said.
 *
 * It does not: measure the server (usage.h), haggle (client.h), share lanes between threads.
 */
#ifndef PERF_LOOP_H
#define PERF_LOOP_H
#include "client.h"
#include "histogram.h"

enum op { OP_READ, OP_WRITE, OP_TRIM, OP_ZERO, OP_FLUSH, OP_COUNT };
enum phase { PHASE_WARM, PHASE_MEASURE, PHASE_DRAIN };
enum { RECEIVE_BYTES = 256 << 10, DEPTH_MAX = 1024, LANES_MAX = 4096, BLOCK_MAX = 32 << 20 };

struct work {
    uint64_t span;                  /* use the first `span` bytes of the export; 0: all of it */
    uint32_t block;
    unsigned depth;
    unsigned batch;                 /* send only when that many requests can go together */
    bool lockstep;                  /* send `depth` at once, wait for all of them: exact counts */
    bool sequential;
    bool fua;
    bool verify;
    uint8_t mix[100];               /* the op of each percent */
    uint64_t seed;
    unsigned spin_us;
    uint64_t count;                 /* requests per lane; 0: until the phase ends */
};

struct slot {
    uint64_t sent_ns;
    uint64_t block;
    uint32_t received;              /* read payload so far */
    uint32_t version;
    uint32_t turn;
    uint8_t op;
    bool busy;
};

struct lane {
    struct client client;
    const struct work *work;
    struct slot *slots;
    uint16_t *free_slots;
    unsigned free_count;
    uint64_t left;                  /* requests it may still send */
    uint64_t random;
    uint64_t first_block, blocks, next_block;
    uint8_t *headers;
    struct iovec *parts;
    int part_at, part_count;
    uint8_t *in;
    size_t in_have;
    struct slot *filling;           /* whose payload the stream is in */
    size_t payload_left;
    bool last_chunk;
    uint32_t *versions;             /* verify: what each block holds */
    uint8_t *data;                  /* verify: one block per slot */
    bool read_back;                 /* verify: the last pass reads every known block once */
};

struct counters {
    struct histogram latency[OP_COUNT];
    uint64_t sends, receives, verified;
};

struct worker {
    struct lane *lanes;
    unsigned lane_count;
    struct counters counters;
};

extern volatile int loop_phase;     /* enum phase; set by the main thread, read by workers */

uint64_t loop_now_ns(void);
void lane_prepare(struct lane *lane, const struct work *work, unsigned number, unsigned lanes);
void loop_run(struct worker *worker);           /* until the lanes' counts or the phase end */
void loop_read_back(struct worker *worker);     /* verify every block whose content is known */
#endif
