/*
 * A job on an object: metadata reads and writes, scrubbing, syncs, asked for by the front. It runs piece by piece on
 * one reactor, in the object's own I/O mode: for O_DIRECT through aligned memory. The front frees it after JOB_DONE.
 */
#ifndef NV_JOB_H
#define NV_JOB_H

#include "backend/backend.h"
#include "reactor/events.h"
#include "reactor/inbox.h"

struct nv_job {
    struct nv_message message;
    struct nv_piece piece;
    struct nv_sync_wait wait;
    struct nv_reactor *reactor;
    struct nv_object *object;
    struct nv_event_slot done;
    uint32_t op;                    /* NV_JOB_* */
    uint64_t offset;
    uint64_t length;
    uint64_t moved;
    uint8_t *buffer;                /* the caller's */
    uint8_t *bounce;                /* NV_JOB_PIECE bytes, aligned; NULL when buffer will do */
};

/* Front: -errno or 0 and a job to send to its reactor (nv_job_send). */
int nv_job_create(struct nv_object *object, uint32_t op, void *buffer, uint64_t offset, uint64_t length,
                  uint64_t token, struct nv_job **out);
void nv_job_send(struct nv_job *job, struct nv_reactor *reactor);
void nv_job_free(struct nv_job *job);

#endif
