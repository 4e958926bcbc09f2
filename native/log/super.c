/*
 * The tail: a superblock that says where the oldest record is that recovery has to replay. It passes records whose
 * versions are all settled and that nobody reads; only when it is durable is their space free and are their blocks covered
 * no more. After a failure the same write makes the whole log void.
 */
#include <errno.h>
#include <string.h>

#include "log/state.h"

uint64_t nv_log_used(const struct nv_log *log)
{
    return log->head - log->tail;
}

static bool may_pass(const struct nv_log *log, uint64_t number)
{
    const struct nv_log_mark *mark = &log->marks[number & log->mark_mask];
    const uint64_t end = number + 1 < log->mark_head ? log->marks[(number + 1) & log->mark_mask].first : log->version_head;

    if (mark->position + mark->units * (uint64_t)NV_LOG_UNIT > log->synced)
        return false;
    for (uint64_t i = mark->first; i < end; i++) {
        const struct nv_log_version *version = nv_log_version(log, i);
        if (version->state != NV_LOG_SETTLED || version->pins)
            return false;
    }
    return true;
}

static void write_super(struct nv_log *log, void (*done)(struct nv_op *op))
{
    struct nv_log_destager *destager = &log->destager;

    destager->super.sequence = log->super.sequence + 1;
    destager->super.epoch = log->config.claim.epoch;
    destager->super.generation = log->config.claim.generation;
    nv_log_super_encode(&destager->super, destager->memory);
    destager->iov = (struct iovec){destager->memory, NV_LOG_UNIT};
    destager->op = (struct nv_op){.kind = NV_OP_WRITE, .flags = NV_OP_DSYNC, .handle = log->config.handle,
                                  .iov = &destager->iov, .iov_count = 1, .done = done,
                                  .offset = log->config.offset + (destager->super.sequence & 1) * NV_LOG_UNIT};
    nv_io_submit(log->config.io, &destager->op);
}

static int outcome(const struct nv_op *op)
{
    if (op->result > 0)
        return 0;
    return op->result < 0 ? (int)op->result : -EIO;
}

/*
 * The durable tail has passed the marks before `end`: their space is free, and their blocks are covered no more, up to one
 * that a read has pinned meanwhile, or whose place below a bypass that failed has spoilt. The next move looks at it again.
 */
static void free_space(struct nv_log *log, uint64_t end)
{
    uint64_t number = log->mark_tail;
    const struct nv_log_mark *before;

    while (number < end && may_pass(log, number))
        number++;
    if (number == log->mark_tail)
        return;
    before = &log->marks[(number - 1) & log->mark_mask];
    log->tail = before->position + before->units * (uint64_t)NV_LOG_UNIT;
    nv_log_expire(log, number);
}

static void tail_moved(struct nv_op *op)
{
    struct nv_log *log = (struct nv_log *)((char *)op - offsetof(struct nv_log, destager.op));
    const int error = outcome(op);

    if (nv_log_goes_on(log, op))
        return;
    if (error) {
        nv_log_fail(log, error);
        nv_log_rest(log, true);
        return;
    }
    log->super = log->destager.super;
    free_space(log, log->destager.marks);
    nv_log_rest(log, true);
    nv_log_unblock(log);
}

void nv_log_move_tail(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    uint64_t number = log->mark_tail;
    const struct nv_log_mark *before;

    if (log->state == NV_LOG_FAILED) { /* it is all to be void soon */
        nv_log_rest(log, true);
        return;
    }
    while (number < log->mark_head && may_pass(log, number))
        number++;
    if (number == log->mark_tail) {
        nv_log_rest(log, destager->carried);
        return;
    }
    before = &log->marks[(number - 1) & log->mark_mask];
    destager->super = log->super;
    destager->marks = number;
    destager->super.tail = (before->position + before->units * (uint64_t)NV_LOG_UNIT) % log->ring;
    destager->super.next = before->sequence + 1;
    destager->super.chain = before->seal;
    destager->phase = NV_LOG_MOVING;
    write_super(log, tail_moved);
}

static void made_void(struct nv_op *op)
{
    struct nv_log *log = (struct nv_log *)((char *)op - offsetof(struct nv_log, destager.op));
    const int error = outcome(op);

    if (nv_log_goes_on(log, op))
        return;
    if (!error)
        log->super = log->destager.super;
    nv_log_rest(log, true);
    if (!error || log->forgotten) {
        nv_log_is_void(log);
    } else {
        log->needs_word = true;
        log->config.event(log->config.context, NV_LOG_NEEDS_WORD, error);
    }
}

void nv_log_make_void(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;

    destager->super = log->super;
    destager->super.tail = log->head % log->ring; /* behind whatever may still be on its way */
    destager->super.next = log->next;
    destager->super.chain = log->chain;
    destager->phase = NV_LOG_VOIDING;
    write_super(log, made_void);
}
