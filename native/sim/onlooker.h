/*
 * Somebody who traces the volume now and then (nv_trace_begin) and judges what the records say: each is of a request that
 * a client made, as it was made, and once; its moments come in their order, none before the client sent it; and once all
 * is quiet, every request that was made and answered during the trace has left one.
 */
#ifndef NV_SIM_ONLOOKER_H
#define NV_SIM_ONLOOKER_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"

struct onlooker;

struct onlooker *onlooker_create(uint64_t seed);
void onlooker_destroy(struct onlooker *onlooker);
/* A life begins: look at this volume from now on. */
void onlooker_boot(struct onlooker *onlooker, nv_plane *plane, uint32_t volume, uint32_t reactors);
/* Begin a trace, read on, or end it, by chance. */
void onlooker_act(struct onlooker *onlooker);

struct onlooker_request {
    uint32_t connection;
    uint64_t cookie, offset, length;
    uint64_t wire_length;   /* what the header says, where that is not the length */
    uint16_t type, flags;
};

/* The clients' words. Without an onlooker (NULL) nobody listens. */
void onlooker_sent(struct onlooker *onlooker, const struct onlooker_request *request);
void onlooker_answered(struct onlooker *onlooker, uint64_t cookie, int error);
void onlooker_gone(struct onlooker *onlooker, uint32_t connection); /* its requests may leave a record, or none */

/* True unless a trace runs and a request that it covers is not recorded yet. */
bool onlooker_content(struct onlooker *onlooker);

#endif
