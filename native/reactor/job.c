/*
 * See job.h. Invariants: moved <= length; at most one piece or one sync is in flight; DONE is raised exactly once.
 * ZERO ends with a sync, because a scrubbed extent is handed out again on the strength of it.
 */
#include "reactor/job.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "limits.h"
#include "nbdvvol.h"
#include "error.h"
#include "reactor/reactor.h"

static void next_piece(struct nv_job *job);

int nv_job_create(struct nv_object *object, uint32_t op, void *buffer, uint64_t offset, uint64_t length,
                  uint64_t token, struct nv_job **out)
{
    const uint64_t size = atomic_load(&object->size);
    struct nv_job *job;

    if (op < NV_JOB_READ || op > NV_JOB_SYNC)
        return nv_fail(EINVAL, "object job %u is unknown", op);
    if (op != NV_JOB_READ && op != NV_JOB_SYNC && (object->flags & NV_OBJECT_READ_ONLY))
        return nv_fail(EROFS, "object %u is read-only", object->id);
    if (op != NV_JOB_SYNC && (offset > size || length > size - offset))
        return nv_fail(ERANGE, "[%" PRIu64 ", +%" PRIu64 ") is outside object %u of %" PRIu64 " bytes", offset, length,
                       object->id, size);
    if (op != NV_JOB_SYNC && ((offset | length) & (object->align - 1)))
        return nv_fail(EINVAL, "[%" PRIu64 ", +%" PRIu64 ") is not aligned to %u as object %u asks", offset, length,
                       object->align, object->id);
    job = calloc(1, sizeof *job);
    if (!job)
        return nv_fail(ENOMEM, "no memory for an object job");
    if (object->memory_align > 1 && (op == NV_JOB_READ || op == NV_JOB_WRITE)) {
        const size_t align = object->memory_align > 4096 ? object->memory_align : 4096;
        job->bounce = aligned_alloc(align, NV_JOB_PIECE);
        if (!job->bounce) {
            free(job);
            return nv_fail(ENOMEM, "no memory for an object job");
        }
    }
    job->object = object;
    job->op = op;
    job->offset = offset;
    job->length = op == NV_JOB_SYNC ? 0 : length;
    job->buffer = buffer;
    job->done.event = (nv_event){.kind = NV_EVENT_JOB_DONE, .token = token};
    job->done.subject = job;
    *out = job;
    return 0;
}

void nv_job_free(struct nv_job *job)
{
    free(job->bounce);
    free(job);
}

static void finish(struct nv_job *job, int error)
{
    assert(error <= 0 && job->reactor->jobs > 0);
    job->reactor->jobs--;
    job->done.event.result = error;
    job->done.event.args[0] = job->moved;
    nv_events_raise(&job->reactor->events, &job->done);
}

static void synced(struct nv_sync_wait *wait)
{
    finish((struct nv_job *)((char *)wait - offsetof(struct nv_job, wait)), wait->error);
}

static void sync_object(struct nv_job *job)
{
    job->wait.done = synced;
    if (nv_sync_begin(&job->object->sync, job->reactor, &job->wait))
        finish(job, job->wait.error);
}

static void piece_finished(struct nv_piece *piece, int64_t result)
{
    struct nv_job *job = (struct nv_job *)((char *)piece - offsetof(struct nv_job, piece));

    if (result < 0) {
        finish(job, (int)result);
        return;
    }
    if (job->op == NV_JOB_READ && job->bounce)
        memcpy(job->buffer + job->moved, job->bounce, job->piece.length);
    job->moved += piece->length;
    next_piece(job);
}

static void next_piece(struct nv_job *job)
{
    static const uint8_t kinds[] = {
        [NV_JOB_READ] = NV_PIECE_READ, [NV_JOB_WRITE] = NV_PIECE_WRITE, [NV_JOB_ZERO] = NV_PIECE_ZERO};
    const uint64_t left = job->length - job->moved;
    const uint64_t limit = job->op == NV_JOB_ZERO ? NV_PUNCH_PIECE : NV_JOB_PIECE;

    if (left == 0) {
        if (job->op == NV_JOB_ZERO || job->op == NV_JOB_SYNC)
            sync_object(job);
        else
            finish(job, 0);
        return;
    }
    job->piece.reactor = job->reactor;
    job->piece.object = job->object;
    job->piece.kind = kinds[job->op];
    job->piece.flags = job->op == NV_JOB_ZERO ? NV_PIECE_NO_HOLE : 0; /* the space stays the datastore's */
    job->piece.offset = job->offset + job->moved;
    job->piece.length = left < limit ? left : limit;
    job->piece.data = job->bounce ? job->bounce : job->buffer + job->moved;
    job->piece.finished = piece_finished;
    if (job->op == NV_JOB_WRITE && job->bounce)
        memcpy(job->bounce, job->buffer + job->moved, job->piece.length);
    nv_piece_start(&job->piece);
}

static void job_starts(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_job *job = (struct nv_job *)((char *)message - offsetof(struct nv_job, message));

    job->reactor = reactor;
    reactor->jobs++;
    next_piece(job);
}

void nv_job_send(struct nv_job *job, struct nv_reactor *reactor)
{
    job->message.run = job_starts;
    nv_reactor_send(reactor, &job->message);
}
