/*
 * The tail: a superblock that says where the oldest record is that recovery has to replay. It passes records whose
 * versions are all settled and that nobody reads; only when it is durable is their space free and are their blocks covered
 * no more. After a failure the same write makes the whole log void.
 */
#include <errno.h>

#include "log/state.h"

uint64_t nv_log_used(const struct nv_log *log)
{
    return log->head - log->tail;
}

static uint64_t end_of(const struct nv_log_mark *mark)
{
    return mark->position + mark->units * (uint64_t)NV_LOG_UNIT;
}

static const struct nv_log_mark *mark_at(const struct nv_log *log, uint64_t number)
{
    return &log->marks[number & log->mark_mask];
}

static bool may_pass(const struct nv_log *log, uint64_t number)
{
    const struct nv_log_mark *mark = mark_at(log, number);
    const uint64_t end = number + 1 < log->mark_head ? mark_at(log, number + 1)->first : log->version_head;

    if (end_of(mark) > log->synced)
        return false;
    for (uint64_t i = mark->first; i < end; i++) {
        const struct nv_log_version *version = nv_log_version(log, i);
        if (version->state != NV_LOG_SETTLED || version->pins)
            return false;
    }
    return true;
}

/* The first mark from the tail on, up to `end`, that the tail may not pass. */
static uint64_t passable(const struct nv_log *log, uint64_t end)
{
    uint64_t number = log->mark_tail;

    while (number < end && may_pass(log, number))
        number++;
    return number;
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
    destager->super_out = true;
    destager->given_up = false;
    destager->super_since_ns = nv_io_now_ns(log->config.io);
    nv_io_submit(log->config.io, &destager->op);
}

/* True: the write is over, and somebody waits for that. */
static bool is_over(struct nv_log *log, struct nv_op *op)
{
    struct nv_log_destager *destager = &log->destager;

    if (nv_log_goes_on(log, op))
        return false;
    destager->super_out = false;
    if (nv_log_outcome(op) == 0)
        log->super = destager->super;
    return !destager->given_up;
}

/*
 * The durable tail has passed the marks before `end`: their space is free, and their blocks are covered no more, up to one
 * that a read has pinned meanwhile, or whose place below a bypass that failed has spoilt. The next move looks at it again.
 */
static void free_space(struct nv_log *log, uint64_t end)
{
    const uint64_t number = passable(log, end);

    if (number == log->mark_tail)
        return;
    log->tail = end_of(mark_at(log, number - 1));
    nv_log_expire(log, number);
}

static void tail_moved(struct nv_op *op)
{
    struct nv_log *log = (struct nv_log *)((char *)op - offsetof(struct nv_log, destager.op));
    const int error = nv_log_outcome(op);

    if (!is_over(log, op))
        return;
    if (error) {
        nv_log_fail(log, error);
        nv_log_rest(log, true);
        return;
    }
    free_space(log, log->destager.marks);
    nv_log_rest(log, true);
    nv_log_unblock(log);
}

bool nv_log_tail_is_lost(const struct nv_log *log)
{
    const uint64_t next = log->mark_tail + 1, head = log->version_head;
    const uint64_t end = log->mark_tail == log->mark_head ? 0 : next < log->mark_head ? mark_at(log, next)->first : head;
    bool lost = false;

    for (uint64_t i = log->version_tail; i < end; i++)
        lost |= nv_log_version(log, i)->bad && nv_log_version(log, i)->state != NV_LOG_SETTLED;
    return lost;
}

/*
 * What is lost holds the tail until it is overwritten. Whoever waits for room has waited long enough when none is left even for
 * tombstones: the log has failed, so that all goes below.
 */
static void give_up_tail(struct nv_log *log)
{
    if (log->blocked.first && !nv_log_tombstone_room(log) && nv_log_tail_is_lost(log))
        nv_log_fail(log, -EIO);
}

void nv_log_move_tail(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    const struct nv_log_mark *before;
    uint64_t number;

    if (log->state == NV_LOG_FAILED) { /* it is all to be void soon */
        nv_log_rest(log, true);
        return;
    }
    number = passable(log, log->mark_head);
    if (number == log->mark_tail) {
        give_up_tail(log);
        nv_log_rest(log, destager->carried);
        return;
    }
    before = mark_at(log, number - 1);
    destager->super = log->super;
    destager->marks = number;
    destager->super.tail = end_of(before) % log->ring;
    destager->super.next = before->sequence + 1;
    destager->super.chain = before->seal;
    destager->phase = NV_LOG_MOVING;
    write_super(log, tail_moved);
}

/* It could not be made void on its device. */
static void ask_for_word(struct nv_log *log, int error)
{
    if (log->forgotten) {
        nv_log_is_void(log);
        return;
    }
    log->needs_word = true;
    log->config.event(log->config.context, NV_LOG_NEEDS_WORD, error);
}

static void made_void(struct nv_op *op)
{
    struct nv_log *log = (struct nv_log *)((char *)op - offsetof(struct nv_log, destager.op));
    const int error = nv_log_outcome(op);

    if (!is_over(log, op))
        return;
    nv_log_rest(log, true);
    if (error)
        ask_for_word(log, error);
    else
        nv_log_is_void(log);
}

void nv_log_give_up_super(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;
    const bool voiding = destager->phase == NV_LOG_VOIDING;

    destager->given_up = true;
    nv_log_fail(log, -ETIMEDOUT);
    nv_log_rest(log, true);
    if (voiding)
        ask_for_word(log, -ETIMEDOUT);
}

void nv_log_make_void(struct nv_log *log)
{
    struct nv_log_destager *destager = &log->destager;

    if (destager->super_out) { /* one that was given up: another one might overtake it, and leave none that is whole */
        nv_log_rest(log, true);
        ask_for_word(log, -ETIMEDOUT);
        return;
    }
    destager->super = log->super;
    destager->super.tail = log->head % log->ring; /* behind whatever may still be on its way */
    destager->super.next = log->next;
    destager->super.chain = log->chain;
    destager->phase = NV_LOG_VOIDING;
    write_super(log, made_void);
}
