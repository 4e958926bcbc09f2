/*
 * One connection in the transmission phase (or, with TLS, in the haggling before it). It lives on one reactor for life
 * and in one mapping: the connection, its requests, its private receive chunk, its private 32 MiB of payload memory. The
 * mapping becomes resident where it is touched. With the private memory a connection always makes progress; the
 * reactor's pool only adds parallelism.
 *
 *   session.c  life: open, turn, end      receive.c  bytes to requests      memory.c   chunks and buffers
 *   request.c  is this request allowed    reply.c    answers to bytes       transmit.c bytes to the socket
 *   resident.c reads sent straight from memory  haggle.c   options through TLS  trace.c what a trace notes
 *   pace.c     the volume's limits        share.c    its part of a busy reactor       hit.c  reads sent from the cache
 */
#ifndef NV_SESSION_H
#define NV_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"
#include "nbdvvol.h"
#include "reactor/reactor.h"
#include "volume/volume.h"

struct nv_tls;
struct nv_haggle;
struct nv_conn;

enum nv_memory {
    NV_MEMORY_NONE,
    NV_MEMORY_POOL,                 /* request->buffer, pool_cost bytes of the pool */
    NV_MEMORY_PRIVATE,              /* the connection's own payload memory */
    NV_MEMORY_CHUNK,                /* inside request->chunk, which is pinned */
    NV_MEMORY_VIEW,                 /* a READ whose bytes stand in an object's view; it holds its place in the volume */
    NV_MEMORY_SPILL,                /* the end of such a read, in the connection's spill memory */
    NV_MEMORY_KEPT,                 /* kept_memory, which a fenced leg's late operation still uses, or did */
    NV_MEMORY_CACHE,                /* a READ whose bytes stand in frames of the cache, pinned; it has left the volume */
};

struct nv_chunk {                   /* receive memory; the bytes follow the struct */
    uint32_t refs;                  /* the connection (while current) and each request with its payload inside */
    bool is_private;
};

struct nv_request {
    struct nv_vreq v;
    struct nv_request *next;        /* free, held or transmit list */
    struct nv_conn *conn;
    uint64_t cookie;
    uint64_t offset;                /* as the client sent them */
    uint64_t length;
    uint32_t payload;               /* bytes that follow the header */
    uint16_t flags;
    uint16_t type;
    uint16_t contexts;              /* BLOCK_STATUS: bit i answers conn->params.contexts[i] */
    uint8_t memory;                 /* enum nv_memory */
    uint8_t pieces;                 /* of the reply, while a send has it */
    bool encoded;                   /* BLOCK_STATUS: the extents have their wire form already */
    bool over;                      /* KEPT: answered; it is released with the last late operation */
    uint8_t kept_memory;            /* KEPT: what it was */
    uint8_t *kept_buffer;
    int32_t status;                 /* 0 or the wire error */
    uint64_t pool_cost;
    uint8_t *buffer;
    struct nv_chunk *chunk;
    uint8_t frame_count;            /* CACHE */
    uint32_t frames[NV_HIT_FRAMES];
    uint8_t header[48];             /* of the reply */
    char text[NV_MESSAGE_MAX];      /* why status is not 0, for people */
};

enum nv_rx_state {
    NV_RX_HEADER,                   /* a request header is next */
    NV_RX_PACED,                    /* the current request waits for the volume's limits */
    NV_RX_ADMIT,                    /* the current request waits for memory */
    NV_RX_INLINE,                   /* the current request's payload is received into the chunk */
    NV_RX_BODY,                     /* ... into its own buffer */
    NV_RX_SKIP,                     /* ... and thrown away: the request has already failed */
};

struct nv_conn {
    struct nv_conn *next, **back;   /* of the reactor */
    struct nv_conn *volume_next, **volume_back;
    struct nv_conn *kick_next;
    struct nv_conn *send_next;
    struct nv_conn *starve_next;
    struct nv_conn *postpone_next;
    struct nv_conn *pace_next;
    struct nv_reactor *reactor;
    struct nv_volume *volume;       /* NULL while haggling */
    struct nv_volume_local *local;
    nv_handle handle;
    uint32_t id;
    nv_connection_params params;
    uint32_t header_bytes;
    bool kicked, sending, starving, postponed; /* on the reactor's lists */
    bool gated;                     /* rationed, or its volume has limits: as of the last nv_conn_parse() */
    bool rationed;                  /* its volume has to share the reactor (nbd/share.c) */
    uint64_t served_turn;           /* the last turn in which a request of it was parsed while rationed */
    bool pacing;                    /* in its volume's list of those that wait for the limits (nbd/pace.c) */
    struct nv_qos_cost pace_cost;   /* reserved for the current request, with */
    uint64_t pace_start_ns;         /* when it may start, and */
    uint64_t pace_since_ns;         /* when it asked */
    /* receive */
    bool rx_pending;                /* rx_op is with the port */
    bool rx_done;                   /* nothing more is received or parsed */
    bool rx_waiting;                /* the current request has been counted as waiting for memory */
    bool rx_stalled;                /* the next step waits for a slot or memory */
    uint8_t rx_state;
    struct nv_op rx_op;
    struct iovec rx_iov;
    struct nv_chunk *chunk;         /* current */
    struct nv_chunk *private_chunk;
    uint32_t rx_start, rx_end;      /* unparsed bytes of the chunk */
    uint32_t rx_window;             /* how much to receive at once */
    uint32_t rx_low_water;          /* of the socket; 0: it has none */
    uint64_t received_ns;           /* the last receive's moment, while the reactor records */
    uint32_t rx_filled;             /* BODY: payload bytes present; SKIP: bytes still to throw away */
    struct nv_request *current;
    /* requests */
    struct nv_request *slots;
    uint32_t slots_touched;
    struct nv_request *free_slots;
    uint32_t in_flight;             /* slots in use */
    struct nv_request *held, **held_tail;   /* parsed in this turn, not started yet */
    bool held_writes;
    uint64_t alone_at;              /* the volume's `bindings` when this was its only connection; 0: it was not */
    uint8_t *private_payload;
    bool private_busy;
    bool private_touched;           /* resident beyond what an idle connection may keep */
    uint64_t pool_bytes;
    uint32_t pins;                  /* frames of the cache that its replies hold */
    /* transmit */
    struct nv_request *tx_queue, **tx_queue_tail;
    struct nv_request *tx_sending;
    struct nv_request *again, **again_tail; /* reads that cannot be sent from memory after all */
    uint8_t *spill;                 /* NV_NOW_BYTES: of the one reply that a full socket took a part of */
    bool spill_touched;
    bool tx_views;                  /* the gathered send reads views */
    bool tx_pending;
    bool tx_dead;                   /* the peer takes no more */
    struct nv_op tx_op;
    uint32_t tx_first, tx_count;    /* of tx_iov */
    struct iovec tx_iov[NV_TX_IOV];
    /* end */
    bool closing;                   /* asked for; new requests get ESHUTDOWN */
    bool shut;
    bool ended;
    int32_t end_reason;             /* 0 or -errno */
    uint64_t deadline_ns;           /* 0: none */
    struct nv_event_slot closed;
    struct nv_message open_message; /* and later the one that frees */
    struct nv_message close_message;
    bool close_sent;                /* front thread */
    /* TLS */
    struct nv_tls *tls;
    struct nv_haggle *haggle;       /* with tls; its state says whether the transmission phase has begun */
    uint32_t haggle_ms;
    bool tls_bye;                   /* close_notify is queued */
    uint8_t *cipher;                /* NV_TLS_RECEIVE bytes of received ciphertext */
    uint32_t cipher_start, cipher_end;
    struct iovec cipher_iov;
    /* front thread */
    struct nv_volume *bound;        /* the volume whose connection count this one raised */
};

/* Front: map a connection's memory and fill it in; NULL without address space. */
struct nv_conn *nv_conn_create(struct nv_reactor *reactor, nv_handle handle);
/* Front, before open only; or the reactor after the end. Does not close the handle. */
void nv_conn_free(struct nv_conn *conn);
/* Front, before open: parameters of the transmission phase. */
void nv_conn_set_params(struct nv_conn *conn, struct nv_volume *volume, const nv_connection_params *params);
/* Front, before open: bytes that were read past the handshake (at most NV_RX_CHUNK / 2). */
void nv_conn_preload(struct nv_conn *conn, const void *bytes, uint32_t length);
/* Front, shared with the TLS entries (reactor/front.c): a connection in the table (reactor NULL: where there is least
 * to do), its start, its volume. */
int nv_connection_new(nv_plane *plane, struct nv_reactor *reactor, int fd, uint64_t token, struct nv_conn **out);
void nv_connection_launch(nv_plane *plane, struct nv_conn *conn);
int nv_connection_aim(nv_plane *plane, struct nv_conn *conn, uint32_t volume_number,
                      const nv_connection_params *params, struct nv_volume **volume);
void nv_connection_bind(struct nv_conn *conn, struct nv_volume *volume);
/* Reactor: the messages' handlers. */
void nv_conn_opens(struct nv_reactor *reactor, struct nv_message *message);
void nv_conn_closes(struct nv_reactor *reactor, struct nv_message *message);
void nv_conn_frees(struct nv_reactor *reactor, struct nv_message *message);

/* Reactor: do whatever can be done now: parse, start, send, receive, end. */
void nv_conn_turn(struct nv_conn *conn);
/* Reactor: the transmission phase on a volume begins. */
void nv_conn_enter(struct nv_conn *conn, struct nv_volume *volume, const nv_connection_params *params);
/* Reactor: finish what is in flight, then end; NV_FORCE_CLOSE_MS bounds it. */
void nv_conn_close(struct nv_conn *conn, int reason);
/* Reactor: no more receiving; -errno or 0 becomes the reason unless there is one. */
void nv_conn_stop_receiving(struct nv_conn *conn, int reason);
/* Reactor: sending failed or is pointless: drop what is staged. */
void nv_conn_kill(struct nv_conn *conn, int reason);
void nv_conn_tick(struct nv_conn *conn, uint64_t now_ns);

/* receive.c */
void nv_conn_parse(struct nv_conn *conn);
void nv_conn_arm_receive(struct nv_conn *conn);
void nv_conn_start_held(struct nv_conn *conn);
bool nv_conn_between_requests(const struct nv_conn *conn); /* the stream may end here */

/* memory.c */
struct nv_request *nv_request_take(struct nv_conn *conn);
void nv_request_release(struct nv_request *request);    /* memory, slot; wakes what waited for them */
bool nv_request_buffer(struct nv_request *request, uint32_t size); /* false: none now */
/* For mirrors: while v->pins, or in place of v->rescue, the memory outlives the answer. Before `finished`, any thread. */
void nv_request_keep(struct nv_vreq *v);
void nv_request_unpin(struct nv_vreq *v);
void nv_request_pin(struct nv_request *request, uint8_t *payload); /* payload inside the current chunk */
void nv_chunk_return(struct nv_conn *conn, struct nv_chunk *chunk); /* an unused one, to the pool */
bool nv_chunk_room(struct nv_conn *conn, uint32_t need); /* `need` bytes from rx_start on fit, and one more byte */
static inline uint8_t *nv_chunk_data(struct nv_chunk *chunk)
{
    return (uint8_t *)(chunk + 1);
}
#define NV_CHUNK_CAPACITY (NV_RX_CHUNK - (uint32_t)sizeof(struct nv_chunk))

/* hit.c */
/* A READ that needs no memory, because its blocks are in the cache. */
bool nv_hit_take(struct nv_request *request);
/* Queue the reply of a read that was taken. */
void nv_hit_stage(struct nv_request *request);
void nv_hit_release(struct nv_request *request);
/* Its bytes; at most frame_count pieces. */
unsigned nv_hit_pieces(const struct nv_request *request, struct iovec *iov);

/* resident.c */
/* A READ that needs no memory, because its bytes stand in memory already; false: it needs some, as others do. */
bool nv_resident_take(struct nv_request *request);
/* A WRITE is about to run: have the memory that it may change at hand. */
void nv_resident_expect(const struct nv_request *request);
/* Queue the reply of a read that was taken: the send is the read. */
void nv_resident_stage(struct nv_request *request);
/* Send the gathered replies, which read views; what the socket does not take is queued again, or waits for room. */
void nv_resident_send(struct nv_conn *conn);
/* Reads of conn->again get memory and start; what finds none waits for the next turn. */
void nv_resident_read_again(struct nv_conn *conn);
/* The volume's map has been replaced: no queued read may hold the old one. */
void nv_conn_remap(struct nv_conn *conn);

/* request.c */
/* Decode a header; false: not a request, the connection must end. Fills cookie, type, flags, offset, length, payload. */
bool nv_request_decode(struct nv_request *request, const uint8_t *header);
/* Judge it: 0 or a wire error with request->text filled in. */
int nv_request_check(struct nv_request *request);
/* BLOCK_STATUS with a payload: select contexts; 0 or a wire error. */
int nv_request_select(struct nv_request *request, const uint8_t *payload);
int nv_request_fail(struct nv_request *request, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* errno of a failed I/O to a wire error, with the text. */
void nv_request_failed_io(struct nv_request *request, int error);

/* reply.c */
/* The reply's pieces; at most nv_reply_pieces(). */
unsigned nv_reply_build(struct nv_request *request, struct iovec *iov);
unsigned nv_reply_pieces(const struct nv_request *request);

/* transmit.c */
void nv_conn_stage(struct nv_request *request);         /* queue the reply */
void nv_conn_transmit(struct nv_conn *conn);            /* send what is queued if nothing is in flight */
void nv_conn_drop_replies(struct nv_conn *conn);        /* those that no send has taken yet */
bool nv_conn_transmit_idle(struct nv_conn *conn);       /* with TLS, queues close_notify: call at the end only */
bool nv_conn_gather(struct nv_conn *conn);              /* fill tx_iov from the queue; false: nothing to send */
void nv_conn_advance(struct nv_conn *conn, uint64_t bytes); /* that much of tx_iov has gone; releases whole requests */
void nv_conn_submit_send(struct nv_conn *conn, struct iovec *iov, unsigned count);
void nv_conn_reply_gone(struct nv_request *request);    /* the socket has all of it */

#endif
