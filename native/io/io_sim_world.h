/*
 * What io_sim.c (the world and the effects of operations), io_sim_socket.c and io_sim_port.c (the port's functions) share. One world a
 * process, one thread; everything above the port uses io.h and io_sim.h only.
 */
#ifndef NV_IO_SIM_WORLD_H
#define NV_IO_SIM_WORLD_H

#include "io/io_sim.h"

#define HANDLES_MAX 8192

enum handle_kind { HANDLE_FREE, HANDLE_FILE, HANDLE_SOCKET, HANDLE_CLOSED };

struct pipe_queue {
    uint8_t *bytes;
    size_t capacity, start, size;
};

struct sim_socket {
    struct pipe_queue to_server, to_client;
    bool client_shut, client_closed, client_reset;
    bool server_shut, server_shut_send, server_closed;
    bool hurried;
    size_t low_water;           /* of a RECV with NV_OP_LATER */
};

struct handle {
    enum handle_kind kind;
    struct sim_disk *disk;
    uint32_t align;
    bool in_memory;
    int origin;                 /* of a file: the one whose troubles it has; 0: its own */
    struct nv_sim_trouble trouble;
    struct sim_socket *socket;
    bool owner; /* frees the disk or socket at the end of the world */
    unsigned operations;
};

/* Kept in nv_op.port while the port owns the operation. */
struct op_state {
    struct nv_io *io;
    uint64_t hash;
    uint64_t moved;
    uint64_t not_before_ns;
    uint64_t entered_at; /* world time: what a sync covers */
    bool settled;        /* its effect is over: it only has to complete */
};
_Static_assert(sizeof(struct op_state) <= sizeof(((struct nv_op *)0)->port), "the state must fit in an operation");

struct op_list {
    struct nv_op **items;
    size_t count, capacity;
};

struct nv_io {
    struct op_list staged, ready;
    uint64_t submissions, enters;
};

struct sim_world {
    bool alive;
    struct sim_random random;
    struct nv_sim_faults faults;
    uint64_t clock_ns;
    uint64_t time; /* counts effects; orders writes against syncs */
    struct nv_sim_counts counts;
    uint64_t newest_entered; /* of the files' operations that were performed */
    uint64_t timers_late_ns; /* the latest of them all: from its time until its user heard of it */
    struct op_list pending;
    struct handle handles[HANDLES_MAX];
    int handle_count;
};

extern struct sim_world sim_world;

struct op_state *sim_state_of(struct nv_op *op);
void sim_list_add(struct op_list *list, struct nv_op *op);
/* Take the item at index; the last one takes its place. */
struct nv_op *sim_list_take(struct op_list *list, size_t index);
/* >= 3 or -EMFILE. */
int sim_add_handle(struct handle handle);
/* An open handle of this kind; anything else is a violation. */
struct handle *sim_handle_of(nv_handle number, enum handle_kind kind);
uint64_t sim_hash_iov(const struct nv_op *op);
bool sim_outgoing(const struct nv_op *op);
bool sim_incoming(const struct nv_op *op);
uint64_t sim_total(const struct nv_op *op);
/* Overwrite incoming memory, so that nobody relies on what was there. */
void sim_scribble(struct nv_op *op);
/* Outgoing memory must be what it was when it came. */
void sim_check_stable(struct nv_op *op);
/* The operation's effect, or a part of it; true when it has completed. */
bool sim_perform(struct nv_op *op);
/* The troubles of an operation's file. */
const struct nv_sim_trouble *sim_trouble_of(const struct nv_op *op);
/* It has completed with this: true. */
bool sim_finish(struct nv_op *op, int64_t result);
/* Visit `size` bytes of the operation's memory from `skip` on, piece by piece; stops when visit answers less. */
size_t sim_walk(const struct nv_op *op, uint64_t skip, size_t size,
                size_t (*visit)(void *context, uint8_t *bytes, size_t size), void *context);
/* Sockets: the operation's effect, as sim_perform(); something can go on. */
bool sim_recv(struct nv_op *op, struct sim_socket *socket);
bool sim_send_op(struct nv_op *op, struct sim_socket *socket);
bool sim_socket_ready(const struct nv_op *op, const struct sim_socket *socket);
void sim_socket_free(struct sim_socket *socket);
/* A send that happens at once, outside of any operation. */
int64_t sim_send(struct sim_socket *socket, struct iovec *iov, unsigned count);
void sim_make_ready(struct nv_op *op);

#endif
