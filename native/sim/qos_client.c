/*
 * See qos_client.h. Numbers are the protocol document's.
 */
#include "sim/qos_client.h"

#include <assert.h>
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"

#define TX_CAPACITY (QOS_DEPTH_MAX * (28u + (16u << 10)))

enum { READ = 0, WRITE = 1, FLUSH = 3, TRIM = 4, CACHE = 5, ZEROES = 6 };
enum { TFLAGS = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048 };

struct qos_client *qos_client_create(int socket, uint32_t volume, uint32_t depth, uint32_t bytes_max)
{
    struct qos_client *client = calloc(1, sizeof *client);

    assert(client && depth > 0 && depth <= QOS_DEPTH_MAX);
    *client = (struct qos_client){.socket = socket, .volume = volume, .depth = depth, .bytes_max = bytes_max,
                                  .open = true};
    client->tx = malloc(TX_CAPACITY);
    assert(client->tx);
    return client;
}

void qos_client_destroy(struct qos_client *client)
{
    free(client->tx);
    free(client);
}

nv_connection_params qos_client_params(void)
{
    return (nv_connection_params){.tflags = TFLAGS, .block_min = 1, .payload_max = 32u << 20};
}

uint32_t qos_client_unanswered(const struct qos_client *client)
{
    uint32_t count = 0;

    for (unsigned i = 0; i < QOS_DEPTH_MAX; i++)
        count += client->requests[i].used;
    return count;
}

static void put(struct qos_client *client, uint64_t value, unsigned bytes)
{
    uint64_t big = htobe64(value);

    assert(client->tx_end + bytes <= TX_CAPACITY);
    memcpy(client->tx + client->tx_end, (uint8_t *)&big + 8 - bytes, bytes);
    client->tx_end += bytes;
}

static uint16_t draw_type(enum qos_mix mix, struct sim_random *random)
{
    static const uint16_t mixed[] = {READ, READ, READ, READ, READ, CACHE, TRIM, ZEROES, FLUSH, READ};

    return mix == QOS_MIXED ? mixed[sim_random_below(random, 10)] : mix == QOS_WRITES ? WRITE : READ;
}

static void send_one(struct qos_client *client, struct sim_random *random, const struct qos_request *fresh)
{
    struct qos_request *request = &client->requests[client->next_cookie % QOS_DEPTH_MAX];
    const uint64_t cookie = client->next_cookie++;

    if (request->used) /* answers need not come in order */
        return;
    *request = *fresh;
    request->used = true;
    request->type = draw_type(client->mix, random);
    request->length = client->bytes_max;
    if (client->mix == QOS_MIXED)
        request->length = 512 * (1 + (uint32_t)sim_random_below(random, client->bytes_max / 512));
    if (request->type == FLUSH)
        request->length = 0;
    put(client, 0x25609513u, 4);
    put(client, 0, 2);
    put(client, request->type, 2);
    put(client, cookie, 8);
    put(client, request->type == FLUSH ? 0 : sim_random_below(random, client->volume_bytes - request->length), 8);
    put(client, request->length, 4);
    if (request->type == WRITE) {
        assert(client->tx_end + request->length <= TX_CAPACITY);
        memset(client->tx + client->tx_end, 0x77, request->length);
        client->tx_end += request->length;
    }
}

void qos_client_fill(struct qos_client *client, struct sim_random *random, const struct qos_request *fresh)
{
    const uint32_t payload = client->mix == QOS_WRITES ? client->bytes_max : 0;
    uint32_t missing = client->depth - qos_client_unanswered(client);

    if (!client->open)
        return;
    memmove(client->tx, client->tx + client->tx_start, client->tx_end - client->tx_start);
    client->tx_end -= client->tx_start;
    client->tx_start = 0;
    for (; missing > 0 && client->tx_end + 28 + payload <= TX_CAPACITY; missing--)
        send_one(client, random, fresh);
}

static void finish(struct qos_client *client, qos_answered *answered, void *context)
{
    struct qos_request *request = &client->requests[client->current % QOS_DEPTH_MAX];
    uint32_t error;

    memcpy(&error, client->head + 4, 4);
    client->answers++;
    client->refusals += error != 0;
    answered(context, client, request, (int)be32toh(error));
    request->used = false;
    client->head_filled = 0;
}

static void understand(struct qos_client *client, const uint8_t *bytes, size_t size, qos_answered *answered,
                       void *context)
{
    while (size > 0) {
        size_t wanted = client->head_filled < 16 ? 16 - client->head_filled : client->data_left;
        size_t take = wanted < size ? wanted : size;
        if (client->head_filled < 16) {
            memcpy(client->head + client->head_filled, bytes, take);
            client->head_filled += (uint32_t)take;
            if (client->head_filled == 16) {
                uint32_t magic, error;
                memcpy(&magic, client->head, 4);
                memcpy(&error, client->head + 4, 4);
                memcpy(&client->current, client->head + 8, 8);
                client->current = be64toh(client->current);
                struct qos_request *request = &client->requests[client->current % QOS_DEPTH_MAX];
                if (be32toh(magic) != 0x67446698u || !request->used)
                    nv_sim_violation("an answer that nobody asked for");
                client->data_left = request->type == READ && !error ? request->length : 0;
            }
        } else {
            client->data_left -= (uint32_t)take;
        }
        bytes += take;
        size -= take;
        if (client->head_filled == 16 && client->data_left == 0)
            finish(client, answered, context);
    }
}

bool qos_client_pump(struct qos_client *client, qos_answered *answered, void *context)
{
    static uint8_t bytes[256u << 10];
    size_t sent = 0, got;

    if (client->tx_end > client->tx_start && !nv_sim_client_ended(client->socket) && client->open)
        sent = nv_sim_client_send(client->socket, client->tx + client->tx_start, client->tx_end - client->tx_start);
    client->tx_start += (uint32_t)sent;
    got = nv_sim_client_recv(client->socket, bytes, sizeof bytes);
    understand(client, bytes, got, answered, context);
    return sent || got;
}

void qos_client_crowded(struct qos_client *client, uint32_t connections)
{
    for (unsigned i = 0; i < QOS_DEPTH_MAX; i++)
        if (client->requests[i].used && client->requests[i].connections < connections)
            client->requests[i].connections = connections;
}
