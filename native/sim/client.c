/*
 * See client.h. Invariants: a request is in the table from the moment its bytes are queued until its answer is complete
 * or the connection is over; the judge hears of a request before its first byte leaves and of its answer at its last.
 */
#include "sim/client.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"
#include "sim/answer.h"

#define TX_CAPACITY (512u << 10)
#define RX_CAPACITY (256u << 10)

enum { TFLAGS = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048, TFLAG_DF = 128, TFLAG_STATUS_PAYLOAD = 4096 };

struct client *client_create(struct client_rules *rules, uint32_t id, int socket, nv_connection_params *params)
{
    struct client *client = calloc(1, sizeof *client);

    assert(client);
    *client = (struct client){.rules = rules, .id = id, .socket = socket, .open = true, .next_cookie = 1};
    client->tx = malloc(TX_CAPACITY);
    client->rx = malloc(RX_CAPACITY);
    assert(client->tx && client->rx);
    client->extended = sim_random_chance(rules->random, 300);
    client->structured = client->extended || sim_random_chance(rules->random, 512);
    client->context = client->structured ? 0x1000 + id : 0;
    *params = (nv_connection_params){
        .flags = (client->structured ? NV_CONN_STRUCTURED : 0) | (client->extended ? NV_CONN_EXTENDED : 0),
        .tflags = TFLAGS | (client->structured ? TFLAG_DF : 0) | (client->extended ? TFLAG_STATUS_PAYLOAD : 0),
        .block_min = rules->block_min,
        .payload_max = 32u << 20,
        .context_count = client->structured,
        .contexts = {{client->context, NV_CONTEXT_BASE_ALLOCATION}},
    };
    return client;
}

void client_destroy(struct client *client)
{
    for (unsigned i = 0; i < CLIENT_REQUESTS; i++)
        free(client->requests[i].data);
    free(client->tx);
    free(client->rx);
    free(client);
}

uint32_t client_id(const struct client *client)
{
    return client->id;
}

bool client_open(const struct client *client)
{
    return client->open;
}

bool client_ended(const struct client *client)
{
    return client->over || nv_sim_client_ended(client->socket);
}

uint32_t client_unanswered(const struct client *client)
{
    uint32_t count = 0;

    for (unsigned i = 0; i < CLIENT_REQUESTS; i++)
        count += client->requests[i].used;
    return count;
}

void client_describe(const struct client *client)
{
    fprintf(stderr, "connection %u: %s%s%s, %u unanswered, %zu bytes to send, %zu received and not understood yet\n",
            client->id, client->extended ? "extended" : client->structured ? "structured" : "simple",
            client->open ? "" : ", closed", client_ended(client) ? ", ended" : "", client_unanswered(client),
            client->tx_end - client->tx_start, client->rx_size);
    for (unsigned i = 0; i < CLIENT_REQUESTS; i++) {
        const struct client_request *r = &client->requests[i];
        if (r->used)
            fprintf(stderr, "  cookie %llu: command %u flags %#x offset %llu length %llu, write %u\n",
                    (unsigned long long)r->cookie, r->type, r->flags, (unsigned long long)r->offset,
                    (unsigned long long)r->length, r->write);
    }
}

/* ---- making requests ---- */

static struct client_request *free_request(struct client *client, uint64_t payload)
{
    if (!client->open || TX_CAPACITY - (client->tx_end - client->tx_start) < payload + 64)
        return NULL;
    for (unsigned i = 0; i < CLIENT_REQUESTS; i++)
        if (!client->requests[i].used)
            return &client->requests[i];
    return NULL;
}

static void put(struct client *client, uint64_t value, unsigned bytes)
{
    uint64_t big = htobe64(value);

    memcpy(client->tx + client->tx_end, (uint8_t *)&big + 8 - bytes, bytes);
    client->tx_end += bytes;
    assert(client->tx_end <= TX_CAPACITY);
}

/* Queue a request's header. `length` on the wire is the payload's where there is one. */
static void put_header(struct client *client, const struct client_request *request, uint64_t wire_length)
{
    if (client->tx_start) {
        memmove(client->tx, client->tx + client->tx_start, client->tx_end - client->tx_start);
        client->tx_end -= client->tx_start;
        client->tx_start = 0;
    }
    put(client, client->extended ? 0x21e41c71u : 0x25609513u, 4);
    put(client, request->flags, 2);
    put(client, request->type, 2);
    put(client, request->cookie, 8);
    put(client, request->offset, 8);
    put(client, wire_length, client->extended ? 8 : 4);
    client->rules->requests++;
    onlooker_sent(client->rules->onlooker,
                  &(struct onlooker_request){.connection = client->id, .cookie = request->cookie,
                                             .offset = request->offset, .length = request->length,
                                             .wire_length = wire_length, .type = request->type,
                                             .flags = request->flags});
    if (client->rules->trace)
        printf("connection %u -> cookie %llu command %u flags %#x offset %llu length %llu write %u\n", client->id,
               (unsigned long long)request->cookie, request->type, request->flags, (unsigned long long)request->offset,
               (unsigned long long)request->length, request->write);
}

static void put_payload(struct client *client, const struct client_request *request)
{
    const struct client_rules *rules = client->rules;
    uint8_t *to = client->tx + client->tx_end;

    if (request->expect || request->late) /* refused before it matters what is in it */
        memset(to, 0xee, request->length);
    else
        check_fill(rules->check, request->write, request->offset / rules->cell_bytes,
                   request->length / rules->cell_bytes, to);
    client->tx_end += request->length;
}

static bool chance(struct client *client, unsigned of_1024)
{
    return sim_random_chance(client->rules->random, of_1024);
}

static uint64_t below(struct client *client, uint64_t bound)
{
    return sim_random_below(client->rules->random, bound);
}

/* Short ranges in one hot corner, mostly, so that requests meet; now and then long ones. */
static void draw_range(struct client *client, struct client_request *request)
{
    const struct client_rules *rules = client->rules;
    uint64_t longest = chance(client, rules->longs) ? rules->cells_max : 12;
    uint64_t space = chance(client, 700) && rules->cells > rules->corner ? rules->corner : rules->cells;
    uint64_t first = below(client, space);
    uint64_t count = 1 + below(client, longest < rules->cells - first ? longest : rules->cells - first);

    request->offset = first * rules->cell_bytes;
    request->length = count * rules->cell_bytes;
}

/* Spoil a request, and say what the answer must be then. */
static void draw_mistake(struct client *client, struct client_request *request)
{
    const struct client_rules *rules = client->rules;
    bool grows = request->type == COMMAND_WRITE || request->type == COMMAND_ZEROES;
    uint64_t size = rules->cells * rules->cell_bytes;

    switch (below(client, 3)) {
    case 0: /* a flag that this command does not have */
        request->flags |= request->type == COMMAND_ZEROES ? 0x80 : FLAG_NO_HOLE;
        request->expect = EINVAL;
        break;
    case 1: /* past the end, perhaps around the 64-bit corner */
        if (rules->growing)
            break;
        request->offset = chance(client, 512) ? size : UINT64_MAX - below(client, 4096);
        if (chance(client, 300) && request->length > rules->cell_bytes)
            request->offset = size - rules->cell_bytes;
        request->expect = grows ? ENOSPC : EINVAL;
        if (request->length <= size - request->offset && request->offset <= size)
            request->expect = 0;
        break;
    default: /* not a multiple of the block */
        if (rules->block_min > 1) {
            request->length -= 1 + below(client, rules->block_min - 1);
            request->expect = EINVAL;
        }
    }
}

/* Asks for durability where it is known to be lost. */
static bool must_fail(const struct client_rules *rules, const struct client_request *request)
{
    bool changes = request->type == COMMAND_WRITE || request->type == COMMAND_TRIM || request->type == COMMAND_ZEROES;

    if (rules->logged)
        return false;
    if (request->type == COMMAND_FLUSH)
        return rules->latched;
    return rules->latched_all && changes && (request->flags & FLAG_FUA);
}

/* Tell the judge; from here on the request counts as sent. */
static void announce(struct client *client, struct client_request *request)
{
    struct check *check = client->rules->check;
    enum check_kind kind = request->type == COMMAND_WRITE    ? CHECK_WRITE
                           : request->type == COMMAND_ZEROES ? CHECK_ZERO
                                                             : CHECK_TRIM;

    request->used = true;
    request->cookie = client->next_cookie++ * 0x9e3779b97f4a7c15ull + client->id;
    request->must_fail = must_fail(client->rules, request);
    request->clears = client->rules->clears;
    request->late = client->deposed;
    if (request->expect || request->late)
        return;
    switch (request->type) {
    case COMMAND_WRITE:
    case COMMAND_TRIM:
    case COMMAND_ZEROES:
        request->write = check_write_sent(check, kind, client->id, request->offset / client->rules->cell_bytes,
                                          request->length / client->rules->cell_bytes);
        break;
    case COMMAND_READ:
    case COMMAND_STATUS:
        request->sent = check_read_sent(check);
        break;
    case COMMAND_FLUSH:
        request->sent = check_flush_sent(check);
        break;
    default:
        break;
    }
}

static void send_request(struct client *client, struct client_request *request)
{
    bool status_payload = client->extended && request->type == COMMAND_STATUS && chance(client, 300);

    announce(client, request);
    if (client->extended && (request->type == COMMAND_WRITE || status_payload))
        request->flags |= FLAG_PAYLOAD_LEN;
    put_header(client, request, status_payload ? 12 : request->length);
    if (request->type == COMMAND_WRITE)
        put_payload(client, request);
    if (status_payload) {
        put(client, request->length, 8);
        put(client, client->context, 4);
    }
}

static uint16_t draw_command(struct client *client)
{
    static const uint16_t reading[] = {COMMAND_READ, COMMAND_READ, COMMAND_READ, COMMAND_STATUS};
    static const uint16_t all[] = {
        COMMAND_READ,  COMMAND_READ,  COMMAND_READ,  COMMAND_READ,  COMMAND_WRITE,  COMMAND_WRITE, COMMAND_WRITE,
        COMMAND_WRITE, COMMAND_WRITE, COMMAND_WRITE, COMMAND_FLUSH, COMMAND_FLUSH,  COMMAND_TRIM,  COMMAND_ZEROES,
        COMMAND_CACHE, COMMAND_STATUS};
    uint16_t command = client->rules->read_only ? reading[below(client, 4)] : all[below(client, 16)];

    return command == COMMAND_STATUS && !client->structured ? COMMAND_READ : command;
}

static void draw_flags(struct client *client, struct client_request *request)
{
    if (chance(client, 128)) /* tolerated everywhere */
        request->flags |= FLAG_FUA;
    if (request->type == COMMAND_ZEROES)
        request->flags |= (chance(client, 300) ? FLAG_NO_HOLE : 0) | (chance(client, 200) ? FLAG_FAST_ZERO : 0);
    if (request->type == COMMAND_STATUS && chance(client, 300))
        request->flags |= FLAG_REQ_ONE;
    if (request->type == COMMAND_READ && client->structured && chance(client, 200))
        request->flags |= FLAG_DF;
}

void client_request(struct client *client)
{
    struct client_request *request = free_request(client, (uint64_t)client->rules->cells_max * client->rules->cell_bytes);

    if (!request)
        return;
    free(request->data);
    *request = (struct client_request){.type = draw_command(client)};
    draw_flags(client, request);
    if (request->type != COMMAND_FLUSH) {
        draw_range(client, request);
        if (chance(client, 40))
            draw_mistake(client, request);
    }
    send_request(client, request);
}

static bool ask(struct client *client, uint16_t command, uint16_t flags, uint64_t first, uint64_t count)
{
    const uint64_t length = count * client->rules->cell_bytes;
    struct client_request *request = free_request(client, command == COMMAND_WRITE ? length : 0);

    if (!request)
        return false;
    free(request->data);
    *request = (struct client_request){.type = command, .flags = flags, .offset = first * client->rules->cell_bytes,
                                       .length = length};
    send_request(client, request);
    return true;
}

bool client_read(struct client *client, uint64_t first, uint64_t count)
{
    return ask(client, COMMAND_READ, 0, first, count);
}

void client_ask(struct client *client, uint16_t command, uint16_t flags, uint64_t first, uint64_t count)
{
    const bool fits = ask(client, command, flags, first, count);

    assert(fits);
    (void)fits;
}

/* ---- moving bytes ---- */

uint32_t client_early(struct client *client, uint8_t *out, uint32_t capacity)
{
    size_t size = client->tx_end - client->tx_start;

    size = size < capacity ? size : capacity;
    memcpy(out, client->tx + client->tx_start, size);
    client->tx_start += size;
    return (uint32_t)size;
}

bool client_pump(struct client *client, bool all)
{
    size_t to_send = client->tx_end - client->tx_start, sent = 0, room = RX_CAPACITY - client->rx_size, got = 0;

    if (client->over)
        return false;
    if (!all && chance(client, 256))
        to_send = (size_t)below(client, to_send + 1);
    if (!all && chance(client, 256))
        room = (size_t)below(client, room + 1);
    if (!client->shut && to_send)
        sent = nv_sim_client_send(client->socket, client->tx + client->tx_start, to_send);
    client->tx_start += sent;
    if (room)
        got = nv_sim_client_recv(client->socket, client->rx + client->rx_size, room);
    client->rx_size += got;
    client_understand(client);
    if (nv_sim_client_ended(client->socket) && client->rx_size == 0)
        client_saw_end(client);
    return sent || got;
}

/* ---- ends ---- */

static bool under_judgement(const struct client_request *request)
{
    return request->used && !request->expect && !request->late && !request->stray &&
           (request->type == COMMAND_READ || request->type == COMMAND_STATUS);
}

/* What is unanswered stays so: the judge has to live with both possibilities. */
static void forget_requests(struct client *client)
{
    for (unsigned i = 0; i < CLIENT_REQUESTS; i++) {
        struct client_request *request = &client->requests[i];
        if (under_judgement(request))
            check_read_over(client->rules->check, request->sent);
        request->used = false;
    }
}

void client_saw_end(struct client *client)
{
    uint32_t unanswered = client_unanswered(client);
    bool sent_away = client->rules->closing || client->dismissed || client->deposed;

    if (client->over)
        return;
    if (client->open && !sent_away)
        nv_sim_violation("connection %u: the server hung up", client->id);
    if (unanswered && !client->shut && !sent_away)
        nv_sim_violation("connection %u: the server ended with %u requests unanswered", client->id, unanswered);
    if (client->open)
        check_connection_closed(client->rules->check, client->id);
    client->open = false;
    client->over = true;
    onlooker_gone(client->rules->onlooker, client->id);
    forget_requests(client);
}

void client_disconnect(struct client *client)
{
    struct client_request bye = {.type = COMMAND_DISC, .cookie = client->next_cookie++};

    if (!client->open || TX_CAPACITY - (client->tx_end - client->tx_start) < 64)
        return;
    put_header(client, &bye, 0);
    client->open = false;
    client->disconnecting = true;
}

void client_dismissed(struct client *client)
{
    client->dismissed = true;
    onlooker_gone(client->rules->onlooker, client->id);
}

void client_deposed(struct client *client)
{
    if (client->deposed)
        return;
    client->deposed = true;
    for (unsigned i = 0; i < CLIENT_REQUESTS; i++) {
        struct client_request *request = &client->requests[i];
        if (!under_judgement(request))
            continue;
        check_read_over(client->rules->check, request->sent);
        request->stray = true;
    }
}

void client_shut(struct client *client)
{
    if (!client->open)
        return;
    client->open = false;
    client->shut = true;
    onlooker_gone(client->rules->onlooker, client->id);
    nv_sim_client_shut(client->socket);
    check_connection_closed(client->rules->check, client->id);
}

void client_close(struct client *client, bool reset)
{
    if (client->over)
        return;
    nv_sim_client_close(client->socket, reset);
    check_connection_closed(client->rules->check, client->id);
    client->open = false;
    client->shut = true;
    client->over = true;
    onlooker_gone(client->rules->onlooker, client->id);
    forget_requests(client);
}
