/*
 * See log_cut_serve.h. Invariant: a request leaves its connection's buffer when the log has taken it; one that has to wait
 * (for a slot, or for a change of one of its blocks) holds up what is behind it on its connection and nobody else.
 */
#include "sim/log_cut_serve.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbd/wire.h"
#include "sim/log_cut.h"

#define CONNECTIONS 8u
#define PAYLOAD_MAX (CUT_REQUEST_BLOCKS * MODEL_BLOCK)
#define OPTION_MAX 4096u
#define OPTION_GO 7u
#define OPTION_INFO 6u
#define OPTION_ABORT 2u
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ull
#define REPLY_ACK 1u
#define REPLY_INFO 3u
#define REPLY_UNSUPPORTED ((1u << 31) + 1)
#define INFO_EXPORT 0u
#define INFO_BLOCK_SIZE 3u

struct connection {
    int fd;                         /* -1: free */
    uint32_t under_way;
    bool ended;                     /* the client has said so, or is gone */
    size_t have;
    uint8_t in[NBD_REQUEST_BYTES + PAYLOAD_MAX];
};

static struct connection connections[CONNECTIONS];

_Noreturn static void fail(const char *what)
{
    fprintf(stderr, "nvlogcut: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void send_all(int fd, const void *bytes, size_t size)
{
    const uint8_t *at = bytes;

    while (size > 0) {
        const ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            fail("send");
        if (sent < 0)
            (void)poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
        at += sent < 0 ? 0 : sent;
        size -= sent < 0 ? 0 : (size_t)sent;
    }
}

/* ---- the handshake: fixed newstyle, blocking ---- */

static bool receive(int fd, void *bytes, size_t size)
{
    return size == 0 || recv(fd, bytes, size, MSG_WAITALL) == (ssize_t)size;
}

static void reply_option(int fd, uint32_t option, uint32_t type, const uint8_t *data, uint32_t size)
{
    uint8_t head[20], *to = put64(head, OPTION_REPLY_MAGIC);

    to = put32(to, option);
    to = put32(to, type);
    put32(to, size);
    send_all(fd, head, sizeof head);
    send_all(fd, data, size);
}

static void tell_export(int fd, uint32_t option)
{
    uint8_t info[14], *to = put16(info, INFO_EXPORT);

    to = put64(to, CUT_BLOCKS * MODEL_BLOCK);
    to = put16(to, 1u | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES |
                       NBD_FLAG_CAN_MULTI_CONN);
    reply_option(fd, option, REPLY_INFO, info, (uint32_t)(to - info));
    to = put16(info, INFO_BLOCK_SIZE);
    to = put32(to, MODEL_BLOCK);
    to = put32(to, MODEL_BLOCK);
    to = put32(to, PAYLOAD_MAX);
    reply_option(fd, option, REPLY_INFO, info, (uint32_t)(to - info));
    reply_option(fd, option, REPLY_ACK, NULL, 0);
}

/* True: the transmission phase begins. */
static bool haggle(int fd)
{
    uint8_t head[18], data[OPTION_MAX];

    memcpy(head, "NBDMAGIC", 8);
    put16(put64(head + 8, NBD_OPTION_MAGIC), 3); /* fixed newstyle, no zeroes */
    send_all(fd, head, sizeof head);
    if (!receive(fd, head, 4))
        return false;
    while (receive(fd, head, 16)) {
        const uint32_t option = get32(head + 8), size = get32(head + 12);
        if (get64(head) != NBD_OPTION_MAGIC || size > sizeof data || !receive(fd, data, size))
            return false;
        if (option == OPTION_GO || option == OPTION_INFO)
            tell_export(fd, option);
        else
            reply_option(fd, option, option == OPTION_ABORT ? REPLY_ACK : REPLY_UNSUPPORTED, NULL, 0);
        if (option == OPTION_GO || option == OPTION_ABORT)
            return option == OPTION_GO;
    }
    return false;
}

static void welcome(int listener)
{
    struct connection *connection = connections;
    const int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    if (fd < 0)
        return;
    while (connection < connections + CONNECTIONS && connection->fd >= 0)
        connection++;
    if (connection == connections + CONNECTIONS || !haggle(fd)) {
        close(fd);
        return;
    }
    (void)fcntl(fd, F_SETFL, O_NONBLOCK);
    *connection = (struct connection){.fd = fd};
}

/* ---- transmission ---- */

static void answer(struct cut_request *request)
{
    struct connection *connection = request->user;
    uint8_t head[NBD_SIMPLE_BYTES];

    put64(put32(put32(head, NBD_SIMPLE_REPLY_MAGIC), 0), request->cookie);
    send_all(connection->fd, head, sizeof head);
    if (request->log.kind == NV_LOG_READ)
        send_all(connection->fd, request->data, request->log.length);
    connection->under_way--;
}

static enum nv_log_kind kind_of(uint16_t command)
{
    switch (command) {
    case NBD_CMD_READ:
        return NV_LOG_READ;
    case NBD_CMD_WRITE:
        return NV_LOG_WRITE;
    case NBD_CMD_TRIM:
        return NV_LOG_TRIM;
    case NBD_CMD_WRITE_ZEROES:
        return NV_LOG_ZEROES;
    default:
        return NV_LOG_FLUSH;
    }
}

static struct cut_request *free_request(void)
{
    for (uint32_t i = 0; i < CUT_DEPTH; i++)
        if (!cut_run.requests[i].used)
            return &cut_run.requests[i];
    return NULL;
}

/* The request at the front of the buffer, if it is whole: how much of the buffer it was; 0: it waits. */
static size_t take(struct connection *connection)
{
    const uint16_t flags = get16(connection->in + 4), command = get16(connection->in + 6);
    const uint64_t offset = get64(connection->in + 16), length = get32(connection->in + 24);
    const size_t payload = command == NBD_CMD_WRITE ? length : 0;
    const enum nv_log_kind kind = kind_of(command);
    struct cut_request *request = free_request();

    if (get32(connection->in) != NBD_REQUEST_MAGIC || length > PAYLOAD_MAX || offset % MODEL_BLOCK || length % MODEL_BLOCK ||
        offset + length > CUT_BLOCKS * MODEL_BLOCK)
        fail("a request that is not understood");
    if (command == NBD_CMD_DISC) {
        connection->ended = true;
        return 0;
    }
    if (!request || connection->have < NBD_REQUEST_BYTES + payload)
        return 0;
    memcpy(request->data, connection->in + NBD_REQUEST_BYTES, payload);
    request->answered = answer;
    request->user = connection;
    request->cookie = get64(connection->in + 8);
    if (!cut_ask(request, kind, flags & NBD_CMD_FLAG_FUA ? NV_LOG_FUA : 0, offset / MODEL_BLOCK, length / MODEL_BLOCK))
        return 0;
    connection->under_way++;
    return NBD_REQUEST_BYTES + payload;
}

static void serve(struct connection *connection)
{
    const size_t room = sizeof connection->in - connection->have;
    const ssize_t got = room > 0 ? recv(connection->fd, connection->in + connection->have, room, 0) : -1;
    size_t taken;

    if (got > 0)
        connection->have += (size_t)got;
    while (!connection->ended && connection->have >= NBD_REQUEST_BYTES && (taken = take(connection)) > 0) {
        connection->have -= taken;
        memmove(connection->in, connection->in + taken, connection->have);
    }
    connection->ended |= got == 0;
    if (connection->ended && connection->under_way == 0) {
        close(connection->fd);
        connection->fd = -1;
    }
}

static bool serve_all(void)
{
    bool busy = false;

    for (uint32_t i = 0; i < CONNECTIONS; i++) {
        if (connections[i].fd >= 0)
            serve(&connections[i]);
        busy |= connections[i].fd >= 0;
    }
    return busy;
}

void cut_serve(const char *socket_path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct pollfd polled[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = listener, .events = POLLIN}};
    bool over = false, busy = true;

    for (uint32_t i = 0; i < CONNECTIONS; i++)
        connections[i].fd = -1;
    snprintf(address.sun_path, sizeof address.sun_path, "%s", socket_path);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, CONNECTIONS) != 0)
        fail(socket_path);
    while (!over || busy) {
        (void)poll(polled, 2, 0);
        over |= polled[0].revents != 0;
        if (polled[1].revents)
            welcome(listener);
        busy = serve_all();
        cut_turn();
    }
    close(listener);
}
