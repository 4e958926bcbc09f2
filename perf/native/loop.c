/* loop: see loop.h. */
#define _GNU_SOURCE
#include "loop.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    VERSION_UNKNOWN = 0,
    VERSION_ZERO = 0x7fffffff,
    VERSION_BUSY = (int)0x80000000,
    PARTS_PER_SEND = 512,
    STALL_MS = 30000,               /* a server silent this long has lost a request */
};
enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_DONE_FLAG = 1 };

static const uint8_t wire_command[OP_COUNT] = { 0, 1, 4, 6, 3 };
static uint8_t *write_payload;      /* one hot block of noise for all unverified writes */

volatile int loop_phase = PHASE_WARM;

uint64_t loop_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;            /* xorshift64*, Vigna 2016 */
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1dull;
}

static void *get_memory(size_t count, size_t size)
{
    void *p = calloc(count, size);
    if (!p) fail("out of memory (%zu bytes)", count * size);
    return p;
}

/* ---- verified content ---- */

static uint64_t pattern_start(const struct lane *lane, uint64_t block, uint32_t version)
{
    uint64_t state = lane->work->seed * 0x9e3779b97f4a7c15ull ^ block * 0xd6e8feb86659fd93ull ^ version;
    return next_random(&state) | 1;
}

static void pattern_fill(const struct lane *lane, uint8_t *out, uint64_t block, uint32_t version)
{
    uint64_t word = pattern_start(lane, block, version);
    for (uint32_t at = 0; at < lane->work->block; at += 8, word += 0x9e3779b97f4a7c15ull) memcpy(out + at, &word, 8);
}

static void pattern_check(const struct lane *lane, const uint8_t *data, uint64_t block, uint32_t version)
{
    bool zero = version == VERSION_ZERO;
    uint64_t want = zero ? 0 : pattern_start(lane, block, version), got;
    for (uint32_t at = 0; at < lane->work->block; at += 8, want += zero ? 0 : 0x9e3779b97f4a7c15ull) {
        memcpy(&got, data + at, 8);
        if (got != want)
            fail("VERIFY FAILED: block %llu of %u bytes, at byte %u: got %016llx, want %016llx (version %u, seed %llu)",
                 (unsigned long long)block, lane->work->block, at, (unsigned long long)got, (unsigned long long)want,
                 version, (unsigned long long)lane->work->seed);
    }
}

/* ---- choosing and building requests ---- */

static bool choose_read_back(struct lane *lane, struct slot *slot)
{
    while (lane->next_block < lane->blocks) {
        uint64_t b = lane->next_block++;
        uint32_t version = lane->versions[b];
        if (version == VERSION_UNKNOWN) continue;
        slot->op = OP_READ;
        slot->block = lane->first_block + b;
        slot->version = version;
        lane->versions[b] = version | VERSION_BUSY;
        return true;
    }
    lane->left = 0;
    return false;
}

static uint64_t choose_block(struct lane *lane)
{
    if (lane->work->sequential) {
        uint64_t b = lane->next_block;
        lane->next_block = b + 1 < lane->blocks ? b + 1 : 0;
        return b;
    }
    return (uint64_t)(((unsigned __int128)next_random(&lane->random) * lane->blocks) >> 64);
}

static void choose(struct lane *lane, struct slot *slot)
{
    slot->op = lane->work->mix[(next_random(&lane->random) >> 32) * 100 >> 32];
    uint64_t b = choose_block(lane);
    if (lane->versions && slot->op != OP_FLUSH) {
        while (lane->versions[b] & VERSION_BUSY) b = b + 1 < lane->blocks ? b + 1 : 0;
        uint32_t version = lane->versions[b];
        if (slot->op == OP_WRITE) version = (version + 1) % VERSION_ZERO ? (version + 1) % VERSION_ZERO : 1;
        if (slot->op == OP_ZERO) version = VERSION_ZERO;
        if (slot->op == OP_TRIM) version = VERSION_UNKNOWN;
        lane->versions[b] = version | VERSION_BUSY;
        slot->version = version;
    }
    slot->block = lane->first_block + b;
}

static void build_header(const struct lane *lane, uint8_t *out, const struct slot *slot, uint16_t index)
{
    bool changes = slot->op == OP_WRITE || slot->op == OP_TRIM || slot->op == OP_ZERO;
    uint32_t magic = htobe32(REQUEST_MAGIC), length = htobe32(slot->op == OP_FLUSH ? 0 : lane->work->block);
    uint64_t cookie = (uint64_t)slot->turn << 16 | index;
    uint64_t offset = slot->op == OP_FLUSH ? 0 : htobe64(slot->block * lane->work->block);
    memcpy(out, &magic, 4);
    out[4] = 0;
    out[5] = lane->work->fua && changes;
    out[6] = 0;
    out[7] = wire_command[slot->op];
    memcpy(out + 8, &cookie, 8);
    memcpy(out + 16, &offset, 8);
    memcpy(out + 24, &length, 4);
}

static void stage(struct lane *lane, void *bytes, size_t n)
{
    struct iovec *last = lane->part_count > 0 ? &lane->parts[lane->part_count - 1] : NULL;
    if (last && (uint8_t *)last->iov_base + last->iov_len == bytes) last->iov_len += n;
    else lane->parts[lane->part_count++] = (struct iovec){ bytes, n };
}

static bool unsent(const struct lane *lane)
{
    return lane->part_at < lane->part_count || client_unsent(&lane->client);
}

/* Fill every free slot and stage the requests for one send. */
static void issue(struct lane *lane)
{
    const struct work *work = lane->work;
    unsigned least = work->lockstep ? work->depth : work->batch;
    if (unsent(lane) || lane->free_count == 0 || lane->left == 0 || loop_phase == PHASE_DRAIN) return;
    if (lane->free_count < least && lane->free_count < work->depth) return;
    uint64_t now = loop_now_ns();
    uint8_t *header = lane->headers;
    lane->part_at = lane->part_count = 0;
    while (lane->free_count > 0 && lane->left > 0) {
        uint16_t index = lane->free_slots[lane->free_count - 1];
        struct slot *slot = &lane->slots[index];
        assert(!slot->busy);
        if (!lane->read_back) choose(lane, slot);
        else if (!choose_read_back(lane, slot)) break;
        lane->free_count--;
        if (lane->left != UINT64_MAX) lane->left--;
        slot->busy = true;
        slot->turn++;
        slot->received = 0;
        slot->sent_ns = now;
        build_header(lane, header, slot, index);
        stage(lane, header, REQUEST_BYTES);
        header += REQUEST_BYTES;
        if (slot->op != OP_WRITE) continue;
        uint8_t *payload = lane->data ? lane->data + (size_t)index * work->block : write_payload;
        if (lane->data) pattern_fill(lane, payload, slot->block, slot->version);
        stage(lane, payload, work->block);
    }
}

static bool transmit(struct lane *lane, struct counters *counters)
{
    bool any = false;
    while (unsent(lane)) {
        int parts = lane->part_count - lane->part_at;
        struct iovec *part = lane->parts + lane->part_at;
        ssize_t n = client_send(&lane->client, part, parts < PARTS_PER_SEND ? parts : PARTS_PER_SEND);
        if (n == 0) break;
        any = true;
        counters->sends += loop_phase == PHASE_MEASURE;
        if (lane->client.tls) {     /* it moved the parts itself */
            while (lane->part_at < lane->part_count && lane->parts[lane->part_at].iov_len == 0) lane->part_at++;
            continue;
        }
        for (; lane->part_at < lane->part_count && (size_t)n >= part->iov_len; part++, lane->part_at++)
            n -= (ssize_t)part->iov_len;
        if (n > 0) {
            part->iov_base = (uint8_t *)part->iov_base + n;
            part->iov_len -= (size_t)n;
        }
    }
    return any;
}

/* ---- replies ---- */

static void complete(struct lane *lane, struct slot *slot, uint64_t now, struct counters *counters)
{
    size_t index = (size_t)(slot - lane->slots);
    assert(slot->busy && lane->free_count < lane->work->depth);
    if (slot->op == OP_READ && slot->received != lane->work->block)
        fail("a read of %u bytes was answered with %u", lane->work->block, slot->received);
    if (lane->versions && slot->op != OP_FLUSH) {
        if (slot->op == OP_READ && slot->version != VERSION_UNKNOWN) {
            pattern_check(lane, lane->data + index * lane->work->block, slot->block, slot->version);
            counters->verified++;
        }
        lane->versions[slot->block - lane->first_block] &= ~(uint32_t)VERSION_BUSY;
    }
    if (loop_phase == PHASE_MEASURE) histogram_add(&counters->latency[slot->op], now - slot->sent_ns);
    slot->busy = false;
    lane->free_slots[lane->free_count++] = (uint16_t)index;
}

static struct slot *slot_of(struct lane *lane, const uint8_t *cookie_bytes)
{
    uint64_t cookie;
    memcpy(&cookie, cookie_bytes, 8);
    struct slot *slot = &lane->slots[cookie & 0xffff];
    if ((cookie & 0xffff) >= lane->work->depth || !slot->busy || slot->turn != (uint32_t)(cookie >> 16))
        fail("a reply with a cookie that is not in flight: %016llx", (unsigned long long)cookie);
    return slot;
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return be32toh(v);
}

/* A structured chunk's head at p. Returns the bytes it took, 0 if it is not whole yet. */
static size_t parse_chunk(struct lane *lane, const uint8_t *p, size_t n)
{
    if (n < CHUNK_BYTES) return 0;
    unsigned flags = (unsigned)p[4] << 8 | p[5], type = (unsigned)p[6] << 8 | p[7];
    uint32_t length = get32(p + 16);
    struct slot *slot = slot_of(lane, p + 8);
    lane->filling = slot;
    lane->payload_left = 0;
    lane->last_chunk = flags & CHUNK_DONE_FLAG;
    if (type == CHUNK_NONE) return CHUNK_BYTES;
    if (type & 0x8000) fail("the server answered command %d with error %u", slot->op, n >= 24 ? get32(p + 20) : 0);
    if (type == CHUNK_DATA && length > 8) {
        if (n < CHUNK_BYTES + 8) return 0;
        lane->payload_left = length - 8;
        return CHUNK_BYTES + 8;
    }
    if (type != CHUNK_HOLE || length != 12) fail("unexpected reply chunk of type %u, %u bytes", type, length);
    if (n < CHUNK_BYTES + 12) return 0;
    uint32_t hole = get32(p + CHUNK_BYTES + 8);
    if (hole > lane->work->block - slot->received) fail("a hole longer than the read");
    if (lane->data) memset(lane->data + (size_t)(slot - lane->slots) * lane->work->block + slot->received, 0, hole);
    slot->received += hole;
    return CHUNK_BYTES + 12;
}

static size_t parse_simple(struct lane *lane, const uint8_t *p, size_t n)
{
    if (n < SIMPLE_BYTES) return 0;
    struct slot *slot = slot_of(lane, p + 8);
    uint32_t error = get32(p + 4);
    if (error != 0) fail("the server answered command %d with error %u", slot->op, error);
    lane->filling = slot;
    lane->payload_left = slot->op == OP_READ ? lane->work->block : 0;
    lane->last_chunk = true;
    return SIMPLE_BYTES;
}

static size_t take_payload(struct lane *lane, const uint8_t *p, size_t n)
{
    struct slot *slot = lane->filling;
    if (n > lane->payload_left) n = lane->payload_left;
    if (n > lane->work->block - slot->received) fail("more payload than was asked for");
    if (lane->data) memcpy(lane->data + (size_t)(slot - lane->slots) * lane->work->block + slot->received, p, n);
    slot->received += (uint32_t)n;
    lane->payload_left -= n;
    return n;
}

static void parse(struct lane *lane, uint64_t now, struct counters *counters)
{
    const uint8_t *p = lane->in, *end = p + lane->in_have;
    for (;;) {
        if (lane->payload_left > 0) p += take_payload(lane, p, (size_t)(end - p));
        if (lane->payload_left > 0) break;
        if (lane->filling) {
            if (lane->last_chunk) complete(lane, lane->filling, now, counters);
            lane->filling = NULL;
        }
        if (end - p < SIMPLE_BYTES) break;
        uint32_t magic = get32(p);
        if (magic != SIMPLE_MAGIC && magic != CHUNK_MAGIC) fail("not a reply: magic %08x", magic);
        size_t took = magic == CHUNK_MAGIC ? parse_chunk(lane, p, (size_t)(end - p))
                                           : parse_simple(lane, p, (size_t)(end - p));
        if (took == 0) {
            lane->filling = NULL;
            lane->payload_left = 0;
            break;
        }
        p += took;
    }
    lane->in_have = (size_t)(end - p);
    assert(lane->in_have <= CHUNK_BYTES + 12);
    memmove(lane->in, p, lane->in_have);
}

static bool receive(struct lane *lane, struct counters *counters, bool wait)
{
    bool any = false;
    for (;;) {
        ssize_t n = client_recv(&lane->client, lane->in + lane->in_have, RECEIVE_BYTES - lane->in_have, wait);
        if (n == 0) return any;
        any = true;
        counters->receives += loop_phase == PHASE_MEASURE;
        lane->in_have += (size_t)n;
        parse(lane, loop_now_ns(), counters);
        if (!lane->client.tls) return true;     /* TLS may hold more than the socket shows */
    }
}

/* ---- the loop ---- */

static bool finished(const struct lane *lane)
{
    bool quiet = lane->free_count == lane->work->depth && !unsent(lane);
    return quiet && (lane->left == 0 || loop_phase == PHASE_DRAIN);
}

static bool step(struct lane *lane, struct counters *counters, bool wait)
{
    bool any = receive(lane, counters, wait);
    issue(lane);
    return transmit(lane, counters) || any;
}

/* Serve what is ready, waiting at most timeout_ms. False: nothing happened. */
static bool poll_lanes(struct worker *w, struct pollfd *polls, int timeout_ms)
{
    bool any = false;
    for (unsigned i = 0; i < w->lane_count; i++)
        polls[i] = (struct pollfd){ w->lanes[i].client.fd, POLLIN | (unsent(&w->lanes[i]) ? POLLOUT : 0), 0 };
    int ready = poll(polls, w->lane_count, timeout_ms);
    if (ready < 0 && errno != EINTR) fail("poll: %s", strerror(errno));
    for (unsigned i = 0; ready > 0 && i < w->lane_count; i++)
        if (polls[i].revents) any |= step(&w->lanes[i], &w->counters, false);
    return any;
}

/* A single lane on a plain socket waits in its receive: a request at depth 1 costs two system calls, not four. */
static bool turn(struct worker *w, struct pollfd *polls, bool sleep)
{
    struct lane *first = &w->lanes[0];
    if (w->lane_count > 1 || (sleep && (first->client.tls || unsent(first))))
        return poll_lanes(w, polls, sleep ? CLIENT_WAIT_MS : 0);
    return step(first, &w->counters, sleep);
}

void loop_run(struct worker *w)
{
    struct pollfd *polls = get_memory(w->lane_count, sizeof *polls);
    uint64_t spin_ns = w->lanes[0].work->spin_us * 1000ull, busy_ns = loop_now_ns();
    for (unsigned i = 0; i < w->lane_count; i++) step(&w->lanes[i], &w->counters, false);
    for (;;) {
        unsigned done = 0;
        for (unsigned i = 0; i < w->lane_count; i++) done += finished(&w->lanes[i]);
        if (done == w->lane_count) break;
        bool any = turn(w, polls, loop_now_ns() - busy_ns >= spin_ns);
        uint64_t now = loop_now_ns();
        if (any) busy_ns = now;
        else if (now - busy_ns > STALL_MS * 1000000ull) fail("the server has not answered for %d s", STALL_MS / 1000);
    }
    free(polls);
}

void loop_read_back(struct worker *w)
{
    for (unsigned i = 0; i < w->lane_count; i++) {
        struct lane *lane = &w->lanes[i];
        assert(lane->versions && lane->free_count == lane->work->depth);
        lane->read_back = true;
        lane->next_block = 0;
        lane->left = UINT64_MAX;
    }
    loop_run(w);
}

void lane_prepare(struct lane *lane, const struct work *work, unsigned number, unsigned lanes)
{
    uint64_t span = work->span && work->span < lane->client.size ? work->span : lane->client.size;
    uint64_t blocks = span / work->block, part = blocks / lanes;
    lane->work = work;
    lane->random = (work->seed + 1) * 0x9e3779b97f4a7c15ull + number * 0xbf58476d1ce4e5b9ull;
    if (lane->random == 0) lane->random = 1;
    bool own_part = work->verify || work->sequential;
    lane->first_block = own_part ? part * number : 0;
    lane->blocks = own_part ? part : blocks;
    if (lane->blocks <= (work->verify ? 2 * work->depth : 0))
        fail("the export (%llu bytes) is too small for %u connections of depth %u and %u-byte blocks",
             (unsigned long long)span, lanes, work->depth, work->block);
    lane->slots = get_memory(work->depth, sizeof *lane->slots);
    lane->free_slots = get_memory(work->depth, sizeof *lane->free_slots);
    for (unsigned i = 0; i < work->depth; i++) lane->free_slots[i] = (uint16_t)(work->depth - 1 - i);
    lane->free_count = work->depth;
    lane->left = work->count ? work->count : UINT64_MAX;
    lane->headers = get_memory(work->depth, REQUEST_BYTES);
    lane->parts = get_memory(2 * (size_t)work->depth, sizeof *lane->parts);
    lane->in = get_memory(1, RECEIVE_BYTES);
    if (work->verify) {
        lane->versions = get_memory(lane->blocks, sizeof *lane->versions);
        lane->data = get_memory(work->depth, work->block);
    } else if (!write_payload) {
        write_payload = get_memory(1, work->block);
        uint64_t state = 0x5eed;
        for (uint32_t at = 0; at + 8 <= work->block; at += 8) {
            uint64_t word = next_random(&state);
            memcpy(write_payload + at, &word, 8);
        }
    }
}
