/* records: see records.h. What each turn does: give the disk the next record, answer what is written, receive. */
#define _GNU_SOURCE
#include "records.h"
#include "responder.h"
#include "ring.h"

#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum {
    UNIT = 4096,
    BLOCKS = 128,               /* of a record, and in flight of a client: whoever sends more is not ours */
    RECORDS = 3,                /* two under way, one that is being built */
    UNDER_WAY = 2,
    RECORD_BYTES = (1 + BLOCKS) * UNIT,
    RECEIVE_BYTES = 256 << 10,
    WRITE_BYTES = 128 << 10,    /* the longest one */
    COMMAND_WRITE = 1,
    REAP_BATCH = 64,
};

struct record {
    bool used;
    unsigned blocks, replies;
    uint8_t *memory;            /* the head's unit, then the blocks' */
    uint8_t reply[BLOCKS * REPLY_BYTES];
};

struct server {
    const struct records *how;
    int fd;
    struct io_uring ring;
    bool receiving;
    size_t have;                /* bytes in `in` not yet parsed */
    unsigned under_way;         /* records */
    unsigned blocks_under_way;
    uint64_t at;                /* where the next record goes */
    unsigned parts;
    struct iovec part[RECORDS];
    struct record *building, *answered[RECORDS], record[RECORDS];
    uint8_t *memory;
    uint8_t in[RECEIVE_BYTES];
};

/* ---- records ---- */

static struct record *begin(struct server *s)
{
    for (unsigned i = 0; i < RECORDS; i++) {
        struct record *record = &s->record[i];
        if (record->used) continue;
        record->used = true;
        record->blocks = record->replies = 0;
        return record;
    }
    return NULL;
}

/* A record costs the disk nearly as much with one block as with eight: one beside another is as large as that. */
static void start(struct server *s)
{
    struct record *record = s->building;
    size_t bytes;
    if (!record || s->under_way == UNDER_WAY || record->blocks < s->blocks_under_way) return;
    bytes = (1 + (size_t)record->blocks) * UNIT;
    if (bytes > s->how->size - s->at) s->at = 0;
    struct io_uring_sqe *sqe = ring_entry(&s->ring);
    io_uring_prep_write(sqe, s->how->file, record->memory, (unsigned)bytes, s->at);
    io_uring_sqe_set_data(sqe, record);
    s->at += bytes;
    s->under_way++;
    s->blocks_under_way += record->blocks;
    s->building = NULL;
}

#ifdef __x86_64__
/* Nobody here reads them again, the disk does: past the processor's cache. */
__attribute__((target("avx"))) static void stream(uint8_t *to, const uint8_t *from, uint32_t length)
{
    for (uint32_t i = 0; i < length; i += 32)
        _mm256_stream_si256((__m256i *)(void *)(to + i), _mm256_loadu_si256((const __m256i *)(const void *)(from + i)));
    _mm_sfence();
}
#endif

static void copy_units(uint8_t *to, const uint8_t *from, uint32_t length)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx")) {
        stream(to, from, length);
        return;
    }
#endif
    memcpy(to, from, length);
}

/* One write of the client. False: it is more than it may have in flight. */
static bool add(struct server *s, const uint8_t *cookie, const uint8_t *payload, uint32_t length)
{
    struct record *record = s->building;
    if (!record) record = s->building = begin(s);
    if (!record || record->blocks + length / UNIT > BLOCKS) return false;
    put_reply(record->reply + (size_t)record->replies++ * REPLY_BYTES, 0, cookie);
    copy_units(record->memory + (1 + (size_t)record->blocks) * UNIT, payload, length);
    record->blocks += length / UNIT;
    return true;
}

/* False: the disk failed. */
static bool written(struct server *s, struct record *record, int32_t result)
{
    s->under_way--;
    s->blocks_under_way -= record->blocks;
    if (result != (int32_t)((1 + record->blocks) * UNIT)) return false;
    s->answered[s->parts] = record;
    s->part[s->parts++] = (struct iovec){ record->reply, (size_t)record->replies * REPLY_BYTES };
    return true;
}

static bool answer(struct server *s)
{
    if (s->parts == 0) return true;
    for (unsigned i = 0; i < s->parts; i++) s->answered[i]->used = false; /* nothing begins before they are sent */
    if (!send_parts(s->fd, s->part, s->parts)) return false;
    s->parts = 0;
    return true;
}

/* ---- requests ---- */

/* Take every whole write of the receive buffer. False: close the connection. */
static bool parse(struct server *s)
{
    const uint8_t *p = s->in, *end = s->in + s->have;
    while (end - p >= REQUEST_BYTES) {
        uint32_t length = get32(p + 24);
        unsigned command = (unsigned)p[6] << 8 | p[7];
        if (get32(p) != REQUEST_MAGIC || command != COMMAND_WRITE || length == 0 || length % UNIT || length > WRITE_BYTES)
            return false;
        if ((size_t)(end - p) < REQUEST_BYTES + (size_t)length) break;
        if (!add(s, p + 8, p + REQUEST_BYTES, length)) return false;
        p += REQUEST_BYTES + length;
    }
    s->have = (size_t)(end - p);
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
    unsigned count = io_uring_peek_batch_cqe(&s->ring, batch, REAP_BATCH);
    bool open = true;
    for (unsigned i = 0; i < count; i++) {
        struct record *record = io_uring_cqe_get_data(batch[i]);
        int32_t result = batch[i]->res;
        if (record) {
            open &= written(s, record, result);
            continue;
        }
        s->receiving = false;
        s->have += result > 0 ? (size_t)result : 0;
        open &= result > 0 && parse(s);
    }
    io_uring_cq_advance(&s->ring, count);
    return open ? count > 0 : -1;
}

static void turns(struct server *s)
{
    uint64_t busy_ns = now_ns();
    for (int done; (done = reap(s)) >= 0;) {
        start(s);
        receive(s);
        ring_enter(&s->ring, false); /* the disk has work before the client hears of anything */
        if (!answer(s)) return;
        if (done) busy_ns = now_ns();
        else if (now_ns() - busy_ns >= s->how->spin_us * 1000ull) ring_enter(&s->ring, true);
    }
}

void records_serve(const struct records *how, int fd)
{
    struct server *s = map_memory(sizeof *s, MAP_POPULATE);
    s->memory = map_memory((size_t)RECORDS * RECORD_BYTES, MAP_POPULATE);
    ring_begin(&s->ring, REAP_BATCH);
    s->how = how;
    s->fd = fd;
    for (unsigned i = 0; i < RECORDS; i++) s->record[i].memory = s->memory + (size_t)i * RECORD_BYTES;
    turns(s);
    io_uring_queue_exit(&s->ring);
    munmap(s->memory, (size_t)RECORDS * RECORD_BYTES);
    munmap(s, sizeof *s);
    close(fd);
}
