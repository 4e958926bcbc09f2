/*
 * The simulated world's sockets (io_sim.h): pairs of byte queues, whose client's end the simulation holds.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim_world.h"

#define LOW_WATER_MIN (16u << 10)

int nv_sim_socket(void)
{
    struct sim_socket *socket = calloc(1, sizeof *socket);

    assert(socket);
    for (int i = 0; i < 2; i++) {
        struct pipe_queue *queue = i ? &socket->to_client : &socket->to_server;
        queue->capacity = 4096u << sim_random_below(&sim_world.random, 8);
        queue->bytes = malloc(queue->capacity);
        assert(queue->bytes);
    }
    return sim_add_handle((struct handle){.kind = HANDLE_SOCKET, .socket = socket, .owner = true});
}

void nv_sim_socket_room(int number, size_t bytes)
{
    struct sim_socket *socket = sim_handle_of(number, HANDLE_SOCKET)->socket;

    for (int i = 0; i < 2; i++) {
        struct pipe_queue *queue = i ? &socket->to_client : &socket->to_server;
        assert(queue->size == 0 && bytes > 0);
        queue->capacity = bytes;
        queue->bytes = realloc(queue->bytes, bytes);
        assert(queue->bytes);
    }
}

void sim_socket_free(struct sim_socket *socket)
{
    free(socket->to_server.bytes);
    free(socket->to_client.bytes);
    free(socket);
}

bool sim_socket_ready(const struct nv_op *op, const struct sim_socket *socket)
{
    if (op->kind == NV_OP_RECV)
        return socket->to_server.size >= (op->flags & NV_OP_LATER ? socket->low_water : 1) || socket->client_shut ||
               socket->server_shut;
    return socket->to_client.size < socket->to_client.capacity || socket->client_closed || socket->server_shut ||
           socket->server_shut_send;
}

/* ---- byte queues ---- */

static size_t queue_push(void *context, uint8_t *bytes, size_t size)
{
    struct pipe_queue *queue = context;
    size_t room = queue->capacity - queue->size, pushed;

    size = size < room ? size : room;
    for (pushed = 0; pushed < size;) {
        size_t at = (queue->start + queue->size) % queue->capacity;
        size_t part = queue->capacity - at < size - pushed ? queue->capacity - at : size - pushed;
        memcpy(queue->bytes + at, bytes + pushed, part);
        queue->size += part;
        pushed += part;
    }
    return pushed;
}

static size_t queue_pull(void *context, uint8_t *out, size_t size)
{
    struct pipe_queue *queue = context;
    size_t pulled;

    size = size < queue->size ? size : queue->size;
    for (pulled = 0; pulled < size;) {
        size_t part = queue->capacity - queue->start < size - pulled ? queue->capacity - queue->start : size - pulled;
        memcpy(out + pulled, queue->bytes + queue->start, part);
        queue->start = (queue->start + part) % queue->capacity;
        queue->size -= part;
        pulled += part;
    }
    return pulled;
}

/* ---- the port's side ---- */

/* Sockets with small buffers stand for those that have no low water: a world has both. */
bool nv_io_low_water(nv_handle handle, uint32_t bytes)
{
    struct sim_socket *socket = sim_handle_of(handle, HANDLE_SOCKET)->socket;
    const size_t most = socket->to_server.capacity / 2;

    assert(bytes > 0);
    if (most < LOW_WATER_MIN)
        return false;
    socket->low_water = bytes < most ? bytes : most;
    return true;
}

bool sim_recv(struct nv_op *op, struct sim_socket *socket)
{
    struct op_state *state = sim_state_of(op);
    size_t left = (size_t)(sim_total(op) - state->moved);
    size_t size = left < socket->to_server.size ? left : socket->to_server.size;

    if (socket->client_reset)
        return sim_finish(op, state->moved ? (int64_t)state->moved : -ECONNRESET);
    if (size == 0)
        return sim_finish(op, (int64_t)state->moved); /* the end of the stream */
    if (sim_random_chance(&sim_world.random, 256))
        size = 1 + (size_t)sim_random_below(&sim_world.random, size);
    state->moved += sim_walk(op, state->moved, size, queue_pull, &socket->to_server);
    if ((op->flags & NV_OP_WHOLE) && state->moved < sim_total(op))
        return false;
    return sim_finish(op, (int64_t)state->moved);
}

bool sim_send_op(struct nv_op *op, struct sim_socket *socket)
{
    struct op_state *state = sim_state_of(op);

    if (socket->client_closed || socket->server_shut || socket->server_shut_send)
        return sim_finish(op, state->moved ? (int64_t)state->moved : -EPIPE);
    size_t left = (size_t)(sim_total(op) - state->moved);
    if (left > 1 && sim_random_chance(&sim_world.random, 256))
        left = 1 + (size_t)sim_random_below(&sim_world.random, left);
    state->moved += sim_walk(op, state->moved, left, queue_push, &socket->to_client);
    if (state->moved > 0 && sim_random_chance(&sim_world.random, 16)) /* the real port: at an error's edge */
        return sim_finish(op, (int64_t)state->moved);
    return state->moved < sim_total(op) ? false : sim_finish(op, (int64_t)state->moved);
}

int64_t sim_send(struct sim_socket *socket, struct iovec *iov, unsigned count)
{
    const struct nv_op op = {.kind = NV_OP_SEND, .iov = iov, .iov_count = (uint16_t)count};
    size_t size = (size_t)sim_total(&op);

    if (socket->client_closed || socket->server_shut || socket->server_shut_send)
        return -EPIPE;
    if (sim_random_chance(&sim_world.random, sim_world.faults.bad_view))
        return -EFAULT;
    if (size > 1 && sim_random_chance(&sim_world.random, 256))
        size = 1 + (size_t)sim_random_below(&sim_world.random, size);
    size = sim_walk(&op, 0, size, queue_push, &socket->to_client);
    return size ? (int64_t)size : -EAGAIN;
}

/* ---- the client's side of sockets ---- */

static struct sim_socket *socket_of(int socket)
{
    struct sim_socket *found = sim_world.handles[socket].socket;

    assert(found);
    return found;
}

size_t nv_sim_client_send(int socket, const void *bytes, size_t size)
{
    struct sim_socket *at = socket_of(socket);

    assert(!at->client_shut);
    return at->server_closed || at->server_shut ? 0 : queue_push(&at->to_server, (uint8_t *)(uintptr_t)bytes, size);
}

size_t nv_sim_client_recv(int socket, void *out, size_t capacity)
{
    return queue_pull(&socket_of(socket)->to_client, out, capacity);
}

bool nv_sim_client_ended(int socket)
{
    const struct sim_socket *at = socket_of(socket);

    return (at->server_closed || at->server_shut || at->server_shut_send) && at->to_client.size == 0;
}

bool nv_sim_client_left(int socket)
{
    return socket_of(socket)->server_closed || socket_of(socket)->server_shut;
}

void nv_sim_client_shut(int socket)
{
    socket_of(socket)->client_shut = true;
}

void nv_sim_client_close(int socket, bool reset)
{
    struct sim_socket *at = socket_of(socket);

    at->client_shut = at->client_closed = true;
    at->client_reset = reset;
    if (reset)
        at->to_server.size = 0;
}

void nv_sim_hurry(int socket)
{
    socket_of(socket)->hurried = true;
    for (size_t i = 0; i < sim_world.pending.count; i++) {
        struct nv_op *op = sim_world.pending.items[i];
        if (op->kind != NV_OP_TIMER && op->handle == socket)
            sim_state_of(op)->not_before_ns = 0;
    }
}
