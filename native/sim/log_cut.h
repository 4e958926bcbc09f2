/*
 * A run of the write-back log on the real I/O port (io_uring) and real files that is recorded, and then every moment of it at
 * which the power might have gone (nvlogcut.c, which makes the load, or has fio make it: log_cut_serve.c).
 *
 * Each write that the port is given, to the log and below it, is recorded with its bytes, when it was handed in and when it
 * was done, and so is every sync, every request and every answer. From that the disks of any moment are made again: what
 * was durable, and of what was not, what a cut picks: all, nothing, every other write, or a write torn in its middle. Each of
 * these logs is recovered by the real code, from real files, everything is read, and held against the answers that had been
 * given by then: the same judge as in the simulator.
 */
#ifndef NV_SIM_LOG_CUT_H
#define NV_SIM_LOG_CUT_H

#include <stdbool.h>
#include <stdint.h>

#include "log/log.h"
#include "sim/log_model.h"
#include "sim/random.h"

#define CUT_BLOCKS 48u
#define CUT_RING (512u << 10)
#define CUT_DEPTH 16u
#define CUT_REQUEST_BLOCKS 8u

struct cut_request {
    struct nv_log_request log;
    uint32_t event;
    bool used;
    void (*answered)(struct cut_request *request); /* NULL: nobody wants to know */
    void *user;
    uint64_t cookie;
    uint8_t data[CUT_REQUEST_BLOCKS * MODEL_BLOCK];
};

struct cut_run {
    struct sim_random random;
    struct cut_request requests[CUT_DEPTH];
    uint32_t versions[CUT_BLOCKS];  /* changes of each block that have been asked for */
    uint32_t events;                /* recorded */
};

extern struct cut_run cut_run;

/* Two files in the folder, and a ring; `stream_bytes` as in the log's policy. Then an empty log, and all is recorded. */
void cut_begin(const char *folder, uint64_t seed, uint32_t stream_bytes);
/* What is under way goes on; sleeps up to 200 us where nothing can. */
void cut_turn(void);
/*
 * Hand in a request of whole blocks; a write brings its bytes in `data`, and what is read will be there. False: a change of
 * one of its blocks is under way (range order is kept here, as a volume keeps it).
 */
bool cut_ask(struct cut_request *request, enum nv_log_kind kind, uint8_t flags, uint64_t first, uint64_t blocks);
/* Nothing is under way: close the log, record nothing more. */
void cut_end(void);
/* Judge so many of the boundaries of records, evenly; how many, and in *boundaries how many there are. */
uint32_t cut_judge(uint32_t wanted, uint32_t *boundaries);

#endif
