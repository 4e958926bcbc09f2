/* direct: see direct.h. What each turn does: answer what the disk has done, in one send; start what has arrived. */
#define _GNU_SOURCE
#include "direct.h"
#include "responder.h"
#include "ring.h"

#include <unistd.h>

enum {
    SLOTS = 1024,               /* the most that loadgen keeps in flight */
    BLOCK_BYTES = 256 << 10,    /* the longest request; memory that no request needs is never touched */
    RECEIVE_BYTES = 256 << 10,
    PARTS_MAX = 1000,           /* iovecs in one send; the kernel's limit is 1024 */
    START_BATCH = 4,            /* the disk is given that many while the rest of a batch is still parsed */
    REAP_BATCH = 64,
};

struct slot {
    struct slot *next;
    uint64_t cookie;
    uint32_t length;
    bool write;
    uint8_t reply[REPLY_BYTES];
};

struct server {
    const struct direct *how;
    int fd;
    struct io_uring ring;
    bool receiving;
    size_t have;                /* bytes in `in` not yet parsed */
    struct slot *writing;       /* whose payload is being received */
    uint64_t offset;            /* of that write */
    size_t filled;
    struct slot *free, *leaving;
    unsigned parts;
    struct iovec part[PARTS_MAX];
    struct slot slot[SLOTS];
    uint8_t *memory;            /* BLOCK_BYTES a slot */
    uint8_t in[RECEIVE_BYTES];
};

static uint8_t *memory_of(const struct server *s, const struct slot *slot)
{
    return s->memory + (size_t)(slot - s->slot) * BLOCK_BYTES;
}

/* ---- replies ---- */

/* Blocking: what the client does not read now it has not asked for. False: it is gone. */
static bool flush_replies(struct server *s)
{
    if (!send_parts(s->fd, s->part, s->parts)) return false;
    s->parts = 0;
    for (struct slot *slot; (slot = s->leaving);) {
        s->leaving = slot->next;
        slot->next = s->free;
        s->free = slot;
    }
    return true;
}

static bool stage_reply(struct server *s, struct slot *slot, int32_t result)
{
    const uint32_t error = result == (int32_t)slot->length ? 0 : EIO;
    if (s->parts + 2 > PARTS_MAX && !flush_replies(s)) return false;
    put_reply(slot->reply, error, &slot->cookie);
    s->part[s->parts++] = (struct iovec){ slot->reply, REPLY_BYTES };
    if (!slot->write && !error) s->part[s->parts++] = (struct iovec){ memory_of(s, slot), slot->length };
    slot->next = s->leaving;
    s->leaving = slot;
    return true;
}

/* ---- requests ---- */

static void start(struct server *s, struct slot *slot, uint64_t offset)
{
    struct io_uring_sqe *sqe = ring_entry(&s->ring);
    if (slot->write) io_uring_prep_write(sqe, s->how->file, memory_of(s, slot), slot->length, offset);
    else io_uring_prep_read(sqe, s->how->file, memory_of(s, slot), slot->length, offset);
    io_uring_sqe_set_data(sqe, slot);
    if (io_uring_sq_ready(&s->ring) >= START_BATCH) io_uring_submit(&s->ring);
}

/* What has come of a write's payload goes where O_DIRECT can take it from. False: it is not whole yet. */
static bool take_payload(struct server *s, const uint8_t **from, const uint8_t *end)
{
    struct slot *slot = s->writing;
    size_t n = (size_t)(end - *from) < slot->length - s->filled ? (size_t)(end - *from) : slot->length - s->filled;
    memcpy(memory_of(s, slot) + s->filled, *from, n);
    *from += n;
    s->filled += n;
    if (s->filled < slot->length) return false;
    s->writing = NULL;
    start(s, slot, s->offset);
    return true;
}

/* Start every whole request of the receive buffer. False: close the connection. */
static bool parse(struct server *s)
{
    const uint8_t *p = s->in, *end = s->in + s->have;
    for (;;) {
        if (s->writing && !take_payload(s, &p, end)) break;
        if (end - p < REQUEST_BYTES) break;
        uint32_t length = get32(p + 24);
        unsigned command = (unsigned)p[6] << 8 | p[7];
        struct slot *slot = s->free;
        if (get32(p) != REQUEST_MAGIC || command > 1 || length == 0 || length > BLOCK_BYTES || !slot) return false;
        s->free = slot->next;
        slot->length = length;
        slot->write = command == 1;
        memcpy(&slot->cookie, p + 8, sizeof slot->cookie);
        s->offset = (uint64_t)get32(p + 16) << 32 | get32(p + 20);
        p += REQUEST_BYTES;
        s->filled = 0;
        if (slot->write) s->writing = slot;
        else start(s, slot, s->offset);
    }
    s->have = (size_t)(end - p);
    assert(s->have < REQUEST_BYTES);
    memmove(s->in, p, s->have);
    return true;
}

static void receive(struct server *s)
{
    if (s->receiving) return;
    ring_receive(&s->ring, s->fd, s->in + s->have, RECEIVE_BYTES - s->have);
    s->receiving = true;
}

/* ---- the loop ---- */

/* 1: something was done, 0: there is nothing, -1: close. */
static int reap(struct server *s)
{
    struct io_uring_cqe *batch[REAP_BATCH];
    unsigned count;
    int done = 0;
    while ((count = io_uring_peek_batch_cqe(&s->ring, batch, REAP_BATCH)) > 0) {
        size_t arrived = 0;
        bool open = true;
        for (unsigned i = 0; i < count; i++) {
            struct slot *slot = io_uring_cqe_get_data(batch[i]);
            if (slot) {
                open &= stage_reply(s, slot, batch[i]->res);
            } else {
                s->receiving = false;
                open &= batch[i]->res > 0;
                arrived = batch[i]->res > 0 ? (size_t)batch[i]->res : 0;
            }
        }
        io_uring_cq_advance(&s->ring, count);
        s->have += arrived;
        if (!open || (arrived > 0 && !parse(s))) return -1;
        done = 1;
    }
    return done;
}

static void turns(struct server *s)
{
    uint64_t busy_ns = now_ns();
    for (int done; (done = reap(s)) >= 0;) {
        if (s->parts > 0 && !flush_replies(s)) return;
        receive(s);
        if (done) busy_ns = now_ns();
        ring_enter(&s->ring, !done && now_ns() - busy_ns >= s->how->spin_us * 1000ull);
    }
}

void direct_serve(const struct direct *how, int fd)
{
    struct server *s = map_memory(sizeof *s, 0);
    s->memory = map_memory((size_t)SLOTS * BLOCK_BYTES, MAP_NORESERVE);
    ring_begin(&s->ring, SLOTS);
    s->how = how;
    s->fd = fd;
    for (unsigned i = SLOTS; i-- > 0;) {
        s->slot[i].next = s->free;
        s->free = &s->slot[i];
    }
    turns(s);
    io_uring_queue_exit(&s->ring);
    munmap(s->memory, (size_t)SLOTS * BLOCK_BYTES);
    munmap(s, sizeof *s);
    close(fd);
}
