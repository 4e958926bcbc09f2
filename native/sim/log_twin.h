/*
 * A second leg below the log, in some worlds of nvlog: what the log carries is written there, too, from the same memory, and
 * nobody waits for that, as a mirror does not wait for a leg that it has given up. It hangs at times, so it looks at memory
 * long after the answer; whether the bytes are still the same then is what the port watches.
 */
#ifndef NV_SIM_LOG_TWIN_H
#define NV_SIM_LOG_TWIN_H

#include "io/io_sim.h"
#include "log/log.h"
#include "sim/random.h"

#define TWIN_WRITES 256u

struct twin_write {
    struct nv_op op;
    struct iovec iov;
    struct twin *twin;
    bool asked;                     /* the log waits for its answer */
    bool out;
    bool kept;                      /* the log has its answer: it hears when this is over */
};

struct twin {
    struct nv_io *io;
    struct nv_log *log;
    struct sim_random random;
    int file;
    nv_handle handle;
    struct twin_write writes[TWIN_WRITES];
};

void twin_begin(struct twin *twin, struct nv_io *io, uint64_t seed, uint64_t size);
void twin_end(struct twin *twin);
/* Now and then it hangs, or goes on. */
void twin_step(struct twin *twin);
void twin_heal(struct twin *twin);
/* A write of the log's own begins; NULL: the twin is not told of this one. */
struct twin_write *twin_begins(struct twin *twin, struct nv_log *log, const struct nv_log_below *io);
/* It is answered. */
void twin_answered(struct twin_write *write, struct nv_log_below *io);
bool twin_rests(const struct twin *twin);

#endif
