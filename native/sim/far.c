/*
 * See far.h. Invariants: a request is carried out once on a connection, at the moment it is parsed; each answer's last
 * piece leaves last; a piece that has begun to leave is finished before another begins.
 */
#include "sim/far.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "sim/check.h"

#define LINKS 4u
#define RX_CAPACITY (256u << 10)
#define PIECES 2048u
#define TIMEOUT_MS 1000u

enum { READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS };
enum { FUA = 1, NO_HOLE = 2, FAST = 16, PAYLOAD_LEN = 32 };
enum {
    T_HAS_FLAGS = 1, T_FLUSH = 4, T_FUA = 8, T_TRIM = 32, T_ZEROES = 64, T_MULTI = 256, T_CACHE = 1024, T_FAST = 2048,
};

struct piece {
    uint8_t *bytes;
    size_t size, sent;
    uint64_t cookie;
    bool last;          /* of its answer */
};

struct request {
    uint16_t flags, type;
    uint64_t cookie, offset, length;
    const uint8_t *payload;
};

struct link {
    uint32_t number;    /* the plane's; 0: the front has no link here */
    bool alive;         /* the server has the connection */
    bool mute, leaving; /* says nothing; refuses everything */
    int socket;
    bool structured, extended;
    uint8_t *rx;
    size_t rx_size;
    struct piece *pieces;
    uint32_t piece_count;
    bool begun;         /* pieces[0] has begun to leave */
};

struct far {
    struct scenario *scenario;
    struct client_rules *rules;
    nv_plane *plane;
    struct sim_disk *disk;
    struct sim_random random;
    uint32_t object, align, tflags, payload_max, places;
    bool calm, over;
    bool away;          /* nobody answers the door */
    bool impatient;     /* the front gives up now and then */
    struct link links[LINKS];
};

static uint64_t below(struct far *far, uint64_t bound)
{
    return sim_random_below(&far->random, bound);
}

static bool chance(struct far *far, unsigned of_1024)
{
    return sim_random_chance(&far->random, of_1024);
}

struct far *far_create(struct scenario *scenario, struct client_rules *rules, nv_plane *plane, struct sim_disk *disk)
{
    struct far *far = calloc(1, sizeof *far);

    assert(far);
    *far = (struct far){.scenario = scenario, .rules = rules, .plane = plane, .disk = disk, .align = scenario->align,
                        .random = {sim_random_next(&scenario->random)}};
    const bool through = chance(far, 200), flush = !through || chance(far, 512);
    far->tflags = T_HAS_FLAGS | T_MULTI | (flush ? T_FLUSH : 0) | (!flush || chance(far, 700) ? T_FUA : 0) |
                  (chance(far, 800) ? T_TRIM : 0) | (chance(far, 800) ? T_ZEROES : 0) | (chance(far, 512) ? T_CACHE : 0);
    if ((far->tflags & T_ZEROES) && chance(far, 512))
        far->tflags |= T_FAST;
    far->payload_max = chance(far, 256) ? 8192 : 32u << 20;
    far->places = 1 + (uint32_t)below(far, LINKS);
    far->impatient = rules->io_errors && chance(far, 400);
    rules->far_through = through;
    const nv_remote_config config = {.size = sim_disk_size(disk), .align = far->align, .timeout_ms = TIMEOUT_MS,
                                     .flags = through ? NV_REMOTE_WRITE_THROUGH : 0};
    if (nv_remote_open(plane, &config, &far->object) != 0)
        nv_sim_violation("a remote export does not open: %s", nv_last_error());
    for (uint32_t i = 0; i < LINKS; i++) {
        far->links[i].rx = malloc(RX_CAPACITY);
        far->links[i].pieces = calloc(PIECES, sizeof *far->links[i].pieces);
        assert(far->links[i].rx && far->links[i].pieces);
    }
    return far;
}

static void forget_pieces(struct link *link)
{
    for (uint32_t i = 0; i < link->piece_count; i++)
        free(link->pieces[i].bytes);
    link->piece_count = 0;
    link->begun = false;
}

void far_destroy(struct far *far)
{
    for (uint32_t i = 0; i < LINKS; i++) {
        forget_pieces(&far->links[i]);
        free(far->links[i].pieces);
        free(far->links[i].rx);
    }
    free(far);
}

uint32_t far_object(const struct far *far)
{
    return far->object;
}

void far_describe(const struct far *far)
{
    nv_remote_stats_t stats;

    for (uint32_t i = 0; i < far->places; i++) {
        const struct link *link = &far->links[i];
        fprintf(stderr, "far link %u: number %u%s%s%s%s, %zu bytes received, %u pieces to send\n", i, link->number,
                link->alive ? ", alive" : "", link->mute ? ", mute" : "", link->leaving ? ", leaving" : "",
                link->extended ? ", extended" : link->structured ? ", structured" : "", link->rx_size,
                link->piece_count);
    }
    if (nv_remote_stats(far->plane, far->object, &stats) == 0)
        fprintf(stderr, "far: %llu links serve, %llu in flight, %llu wait, owed %llu\n",
                (unsigned long long)stats.links, (unsigned long long)stats.in_flight,
                (unsigned long long)stats.waiting, (unsigned long long)stats.owed);
}

/* ---- the front ---- */

static bool connect_link(struct far *far, struct link *link)
{
    nv_link_params params = {.tflags = far->tflags, .payload_max = far->payload_max};

    *link = (struct link){.rx = link->rx, .pieces = link->pieces, .alive = true};
    link->extended = chance(far, 300);
    link->structured = !link->extended && chance(far, 512);
    params.flags = (link->structured ? NV_CONN_STRUCTURED : 0) | (link->extended ? NV_CONN_EXTENDED : 0);
    params.has_allocation = (link->structured || link->extended) && chance(far, 700);
    params.allocation_id = 77;
    link->socket = nv_sim_socket();
    if (nv_link_open(far->plane, far->object, link->socket, &params, 1 + (uint64_t)(link - far->links),
                     &link->number) != 0)
        nv_sim_violation("a link does not open: %s", nv_last_error());
    return true;
}

void far_heard(struct far *far, const nv_event *event)
{
    struct link *link = &far->links[event->token - 1];
    char reason[256];

    if (event->token < 1 || event->token > LINKS || link->number != event->args[1] || event->args[0] != far->object)
        nv_sim_violation("the end of a link that is not there: %llu", (unsigned long long)event->token);
    if (nv_link_forget(far->plane, link->number, reason, sizeof reason) != 0 || reason[0] == 0)
        nv_sim_violation("a link ended without a reason");
    if (far->rules->trace)
        printf("far link %u lost: %s (%d)\n", (unsigned)(link - far->links), reason, event->result);
    link->number = 0;
}

/* ---- answers ---- */

static uint8_t *put(uint8_t *to, uint64_t value, unsigned bytes)
{
    const uint64_t big = htobe64(value);

    memcpy(to, (const uint8_t *)&big + 8 - bytes, bytes);
    return to + bytes;
}

static uint64_t get(const uint8_t *from, unsigned bytes)
{
    uint64_t big = 0;

    memcpy((uint8_t *)&big + 8 - bytes, from, bytes);
    return be64toh(big);
}

static uint8_t *add_piece(struct link *link, uint64_t cookie, size_t size, bool last)
{
    struct piece *piece = &link->pieces[link->piece_count++];

    assert(link->piece_count <= PIECES);
    *piece = (struct piece){.bytes = malloc(size), .size = size, .cookie = cookie, .last = last};
    assert(piece->bytes);
    return piece->bytes;
}

static uint8_t *add_chunk(struct link *link, const struct request *request, uint16_t type, size_t body, bool last)
{
    uint8_t *to = add_piece(link, request->cookie, (link->extended ? 32 : 20) + body, last);

    to = put(to, link->extended ? 0x6e8a278cu : 0x668e33efu, 4);
    to = put(to, last, 2);
    to = put(to, type, 2);
    to = put(to, request->cookie, 8);
    if (link->extended)
        to = put(to, request->offset, 8);
    return put(to, body, link->extended ? 8 : 4);
}

static void add_simple(struct link *link, const struct request *request, int error, const uint8_t *data, size_t size)
{
    uint8_t *to = add_piece(link, request->cookie, 16 + size, true);

    to = put(to, 0x67446698u, 4);
    to = put(to, (uint64_t)error, 4);
    to = put(to, request->cookie, 8);
    if (size > 0)
        memcpy(to, data, size);
}

static void add_verdict(struct link *link, const struct request *request, int error)
{
    if (error && (link->structured || link->extended)) {
        uint8_t *to = add_chunk(link, request, 0x8001, 6 + 4, true);
        to = put(to, (uint64_t)error, 4);
        to = put(to, 4, 2);
        memcpy(to, "why?", 4);
    } else if (link->extended) {
        add_chunk(link, request, 0, 0, true);
    } else {
        add_simple(link, request, error, NULL, 0);
    }
}

static bool all_zero(const uint8_t *bytes, size_t size)
{
    return size == 0 || (bytes[0] == 0 && !memcmp(bytes, bytes + 1, size - 1));
}

/* One to four pieces, as data or holes; the last piece of the answer is one of them, or says only that it is over. */
static void add_content(struct far *far, struct link *link, const struct request *request, const uint8_t *data)
{
    uint64_t at = 0;

    if (!link->structured && !link->extended) {
        add_simple(link, request, 0, data, request->length);
        return;
    }
    for (uint32_t i = (uint32_t)below(far, 4); at < request->length; i -= i > 0) {
        uint64_t size = i ? 1 + below(far, request->length - at) : request->length - at;
        bool last = at + size == request->length && chance(far, 512);
        bool hole = all_zero(data + at, size) && chance(far, 512);
        uint8_t *to = add_chunk(link, request, hole ? 2 : 1, 8 + (hole ? 4 : size), last);
        to = put(to, request->offset + at, 8);
        if (hole)
            put(to, size, 4);
        else
            memcpy(to, data + at, size);
        at += size;
        if (last)
            return;
    }
    add_chunk(link, request, 0, 0, true);
}

static void add_status(struct far *far, struct link *link, const struct request *request)
{
    const unsigned width = link->extended ? 8 : 4;
    uint64_t lengths[32], at = request->offset, end = request->offset + request->length;
    bool holes[32];
    unsigned count = 0;

    for (; at < end && count < 32 && (count == 0 || chance(far, 800)); count++) {
        lengths[count] = sim_disk_extent(far->disk, at, end - at, &holes[count]);
        at += lengths[count];
    }
    if (at == end && chance(far, 200))
        lengths[count - 1] += 1000; /* the last one may reach further */
    uint8_t *to = add_chunk(link, request, link->extended ? 6 : 5, (link->extended ? 8 : 4) + count * 2 * width, true);
    to = put(to, 77, 4);
    if (link->extended)
        to = put(to, count, 4);
    for (unsigned i = 0; i < count; i++) {
        to = put(to, lengths[i], width);
        to = put(to, holes[i] ? 3 : 0, width);
    }
}

/* ---- carrying out ---- */

static bool fails(struct far *far, unsigned of_1024)
{
    return !far->calm && chance(far, of_1024);
}

static int change(struct far *far, const struct request *request)
{
    const struct nv_sim_faults *faults = &far->scenario->faults;
    const bool durable = request->flags & FUA;
    const bool sync_fails = durable && fails(far, faults->dsync_error);
    enum sim_write_mode mode = sync_fails ? SIM_WRITE_LOST : durable ? SIM_WRITE_DURABLE : SIM_WRITE_CACHED;
    uint64_t length = request->length;

    if (fails(far, faults->write_error) || sync_fails) /* part of it may have happened */
        length = below(far, length / far->rules->cell_bytes + 1) * far->rules->cell_bytes;
    if (length == request->length && (request->type == TRIM || (request->type == ZEROES && !(request->flags & NO_HOLE))) &&
        !durable)
        sim_disk_punch(far->disk, request->offset, length, nv_sim_time());
    else if (length > 0)
        sim_disk_write(far->disk, request->offset, request->payload, length, nv_sim_time(),
                       length < request->length && !sync_fails ? SIM_WRITE_CACHED : mode);
    return sync_fails || length < request->length ? EIO : 0;
}

static void carry_out(struct far *far, struct link *link, const struct request *request)
{
    const uint64_t size = sim_disk_size(far->disk);
    uint8_t *data;
    bool failed;

    if (request->offset > size || request->length > size - request->offset ||
        ((request->offset | request->length) & (far->align - 1)) ||
        ((request->type == READ || request->type == WRITE) && (request->length == 0 || request->length > far->payload_max)))
        nv_sim_violation("the far server is asked for command %u of %llu bytes at %llu", request->type,
                         (unsigned long long)request->length, (unsigned long long)request->offset);
    if (link->leaving) {
        add_verdict(link, request, ESHUTDOWN);
        return;
    }
    switch (request->type) {
    case READ:
        if (fails(far, far->scenario->faults.read_error)) {
            add_verdict(link, request, EIO);
            break;
        }
        data = malloc(request->length);
        assert(data);
        sim_disk_read(far->disk, request->offset, data, request->length);
        add_content(far, link, request, data);
        free(data);
        break;
    case FLUSH:
        failed = fails(far, 3u * far->scenario->faults.sync_error); /* FLUSH is rarer there */
        sim_disk_sync(far->disk, nv_sim_time(), failed);
        add_verdict(link, request, failed ? EIO : 0);
        break;
    case STATUS:
        add_status(far, link, request);
        break;
    case CACHE:
        add_verdict(link, request, fails(far, far->scenario->faults.read_error) ? EIO : 0);
        break;
    default:
        add_verdict(link, request, change(far, request));
    }
}

/* ---- the server's ear and mouth ---- */

static void hang_up(struct far *far, struct link *link, bool reset)
{
    (void)far;
    nv_sim_client_close(link->socket, reset);
    link->alive = false;
    link->rx_size = 0;
    forget_pieces(link);
}

/* One whole request; false: there is none. */
static bool parse(struct far *far, struct link *link)
{
    const size_t header = link->extended ? 32 : 28;
    struct request request;
    size_t payload;

    if (link->rx_size < header || link->piece_count > PIECES - 8)
        return false;
    request = (struct request){.flags = (uint16_t)get(link->rx + 4, 2), .type = (uint16_t)get(link->rx + 6, 2),
                               .cookie = get(link->rx + 8, 8), .offset = get(link->rx + 16, 8),
                               .length = get(link->rx + 24, link->extended ? 8 : 4), .payload = NULL};
    if (get(link->rx, 4) != (link->extended ? 0x21e41c71u : 0x25609513u) || request.type > STATUS ||
        (link->extended && ((request.flags & PAYLOAD_LEN) != 0) != (request.type == WRITE)))
        nv_sim_violation("the far server is sent %#llx, command %u, flags %#x",
                         (unsigned long long)get(link->rx, 4), request.type, request.flags);
    payload = request.type == WRITE ? request.length : 0;
    if (link->rx_size < header + payload)
        return false;
    if (payload > 0)
        request.payload = link->rx + header;
    if (far->rules->trace)
        printf("far link %u asked %llx: command %u flags %#x offset %llu length %llu\n",
               (unsigned)(link - far->links), (unsigned long long)request.cookie, request.type, request.flags,
               (unsigned long long)request.offset, (unsigned long long)request.length);
    if (request.type == DISC) {
        hang_up(far, link, false);
        return true;
    }
    carry_out(far, link, &request);
    link->rx_size -= header + payload;
    memmove(link->rx, link->rx + header + payload, link->rx_size);
    return true;
}

static bool hear(struct far *far, struct link *link)
{
    size_t got;

    if (nv_sim_client_left(link->socket)) { /* what it had not parsed it does not begin */
        hang_up(far, link, false);
        return true;
    }
    got = nv_sim_client_recv(link->socket, link->rx + link->rx_size, RX_CAPACITY - link->rx_size);
    link->rx_size += got;
    return parse(far, link) || got > 0;
}

/* A piece that may leave now: the last of an answer only when it is alone. */
static uint32_t choose_piece(struct far *far, const struct link *link)
{
    uint32_t start = (uint32_t)below(far, link->piece_count);

    for (uint32_t i = 0; i < link->piece_count; i++) {
        const uint32_t index = (start + i) % link->piece_count;
        uint32_t same = 0;
        for (uint32_t j = 0; j < link->piece_count; j++)
            same += link->pieces[j].cookie == link->pieces[index].cookie;
        if (!link->pieces[index].last || same == 1)
            return index;
    }
    assert(!"every answer has a piece that is not its last, or only its last");
    return 0;
}

static bool speak(struct far *far, struct link *link)
{
    struct piece *piece = &link->pieces[0];
    size_t part;

    if (link->mute || link->piece_count == 0)
        return false;
    if (!link->begun) {
        const uint32_t index = choose_piece(far, link);
        const struct piece chosen = link->pieces[index];
        link->pieces[index] = link->pieces[0];
        link->pieces[0] = chosen;
        link->begun = true;
    }
    part = piece->size - piece->sent;
    if (chance(far, 200))
        part = 1 + (size_t)below(far, part);
    part = nv_sim_client_send(link->socket, piece->bytes + piece->sent, part);
    piece->sent += part;
    if (piece->sent == piece->size) {
        free(piece->bytes);
        *piece = link->pieces[--link->piece_count];
        link->begun = false;
    }
    return part > 0;
}

bool far_step(struct far *far)
{
    const uint32_t start = (uint32_t)below(far, far->places);
    bool moved = false;

    for (uint32_t i = 0; i < far->places && !moved; i++) {
        struct link *link = &far->links[(start + i) % far->places];
        if (link->alive)
            moved = chance(far, 512) ? hear(far, link) || speak(far, link) : speak(far, link) || hear(far, link);
        else if (link->number == 0 && !far->over && !far->away)
            moved = connect_link(far, link);
    }
    return moved;
}

/* ---- trouble ---- */

/* Does the server owe a client something of these cells? */
static bool owes(const struct far *far, const struct scenario_run *run, uint64_t first, uint64_t count)
{
    const uint32_t cell = far->rules->cell_bytes;
    uint8_t durable[512];

    for (uint64_t i = 0; i < count; i++) {
        sim_disk_durable(far->disk, run->object_offset + i * cell, durable, cell);
        if (check_owed(far->rules->check, first + i, durable))
            return true;
    }
    return false;
}

static void restart(struct far *far)
{
    const struct scenario *scenario = far->scenario;
    const uint32_t cell = far->rules->cell_bytes;

    if (far->rules->trace)
        puts("-- the far server is restarted");
    for (uint32_t i = 0; i < scenario->run_count; i++) {
        const struct scenario_run *run = &scenario->runs[i];
        const uint64_t first = run->offset / cell;
        if (run->disk + 1 != scenario->far || run->state != NV_RUN_MAPPED || first >= far->rules->cells)
            continue;
        uint64_t count = run->length / cell < far->rules->cells - first ? run->length / cell : far->rules->cells - first;
        far->rules->far_lost |= owes(far, run, first, count);
        check_rebooted(far->rules->check, first, count);
    }
    meta_rebooted(&far->scenario->meta[scenario->far - 1]);
    sim_disk_reboot(far->disk, &far->random);
    for (uint32_t i = 0; i < far->places; i++)
        if (far->links[i].alive)
            hang_up(far, &far->links[i], chance(far, 512));
    far->away = chance(far, 512);
    for (uint32_t i = 0; i < far->places && !far->away; i++) /* at once: before the plane has heard of the loss */
        if (far->links[i].number == 0 && chance(far, 512))
            connect_link(far, &far->links[i]);
}

static void babble(struct far *far, struct link *link)
{
    uint64_t words[16];

    for (unsigned i = 0; i < 16; i++)
        words[i] = sim_random_next(&far->random);
    if (!link->begun)
        nv_sim_client_send(link->socket, words, 1 + (size_t)below(far, sizeof words));
    else
        hang_up(far, link, true);
}

void far_trouble(struct far *far)
{
    struct link *link = &far->links[below(far, far->places)];

    if (far->calm)
        return;
    switch (below(far, 8)) {
    case 0:
    case 1:
        restart(far);
        break;
    case 2:
        far->away = !far->away;
        break;
    case 3:
        if (far->impatient && nv_remote_give_up(far->plane, far->object, 1) != 0)
            nv_sim_violation("a remote export cannot be given up: %s", nv_last_error());
        break;
    case 4:
        link->mute = !link->mute;
        break;
    case 5:
        link->leaving |= link->alive;
        break;
    case 6:
        if (link->alive)
            babble(far, link);
        break;
    default:
        if (link->alive)
            hang_up(far, link, chance(far, 512));
    }
}

void far_calm(struct far *far)
{
    far->calm = true;
    far->away = false;
    for (uint32_t i = 0; i < far->places; i++)
        far->links[i].mute = false;
}

void far_quit(struct far *far)
{
    far_calm(far);
    far->over = true;
}

void far_end(struct far *far)
{
    far_quit(far);
    for (uint32_t i = 0; i < far->places; i++)
        if (far->links[i].alive)
            hang_up(far, &far->links[i], chance(far, 512));
}
