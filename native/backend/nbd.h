/*
 * The client of NBD servers: objects that are remote exports.
 *
 * A remote lives on one reactor, its home, with all its connections ("links") and its queue, so that none of this needs
 * a lock; pieces from other reactors come and go as messages. The handshake is Python's, which hands connected sockets
 * in (nv_link_open) and hears of their end by an event whose record is part of the link. What waits while no link is
 * there waits here, until a link comes or Python gives up.
 *
 * Which links serve. A server keeps acknowledged writes in a volatile cache until a FLUSH; one that was restarted may
 * have lost them. So links count as one set only while they are known to lead to one running server: a link joins the
 * set when the set is empty, or when a member has answered a request that was sent after the link had come (both
 * servers were then alive at once, so they are the same one). Every acknowledgement comes from the set, and FLUSH goes
 * to any of its members. When the last member is lost while acknowledged writes are not flushed, nobody can vouch for
 * them any more: the object's sync state latches -ESTALE, as a failed sync does, before anything else is sent.
 *
 * Requests that were not answered when their link was lost are sent again on another one. Reads at once. A change only
 * when the old copy can do nothing any more: the server has closed the connection, or has answered after all, which it
 * is given `hold` for on the old link, out of the set ("draining"). Until then whatever overlaps the change waits for it
 * (volume/range.h). A change whose fate is still unknown then fails, the object latches -ETIMEDOUT, and changes of that
 * place are refused until the operator clears the fault: nothing that was acknowledged is overwritten by an older write
 * without a word. (A server that ends a connection before it has ended its requests can still do that.)
 *
 * A request that costs one link after the other its life is sent alone, and fails after NV_PIECE_HANGUPS of them.
 *
 *   nbd_remote.c   the queue, syncs, life of an export         nbd_front.c    the C API
 *   nbd_set.c      which links serve, and what is owed         nbd_link.c     a connection's life, its clock
 *   nbd_dispatch.c which link, which request                   nbd_end.c      how a connection ends
 *   nbd_answer.c   what an answer means, or none               nbd_send.c     requests to bytes
 *   nbd_secure.c   through TLS                                 nbd_receive.c  bytes to answers
 */
#ifndef NV_NBD_CLIENT_H
#define NV_NBD_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"
#include "limits.h"
#include "nbd/wire.h"
#include "nbdvvol.h"
#include "reactor/reactor.h"

struct nv_tls;
struct nv_link;

#define NV_PIECE_FLUSH 0x80         /* kinds of the remote's own: the object's sync, or before a link leaves; */
#define NV_PIECE_PROBE 0x81         /* and a read of one block that nobody looks at */

enum nv_piece_stage { NV_STAGE_FIRST, NV_STAGE_WRITE_ZEROS, NV_STAGE_FLUSH };

enum nv_ask_state {
    NV_ASK_FREE,
    NV_ASK_QUEUED,                  /* no byte of it has been given to the port */
    NV_ASK_SENDING,                 /* its bytes belong to the send under way */
    NV_ASK_SENT,
};

struct nv_span {
    uint64_t from, to;
};

struct nv_ask {                     /* one request on one link */
    struct nv_ask *next;            /* free, to be sent, or being sent */
    struct nv_link *link;
    struct nv_piece *piece;         /* NULL: DISC, or abandoned */
    uint64_t offset;                /* on the wire, as is length */
    uint64_t length;
    uint64_t covers;                /* FLUSH: what it makes durable (remote->acked) */
    uint32_t serial;                /* of the link: no cookie comes twice, and the order of requests */
    uint32_t stamp;                 /* links that had come when it was sent */
    uint32_t tick;                  /* of its link, when it was taken */
    uint16_t command;
    uint16_t flags;
    uint8_t state;
    bool answered;                  /* wholly, but its bytes are still being sent */
    bool abandoned;                 /* its piece has gone elsewhere: an answer says nothing any more */
    bool described;                 /* BLOCK_STATUS: our context has been answered */
    bool full;                      /* BLOCK_STATUS: there is no room for what follows */
    int32_t error;                  /* the first wire error of its answer, or 0 */
    uint64_t got;                   /* READ: content bytes; BLOCK_STATUS: bytes described */
    uint32_t extents;
    uint32_t span_count;
    struct nv_span spans[NV_LINK_SPANS]; /* READ: what has been answered, in order, none touching the next */
    uint8_t header[NBD_EXTENDED_BYTES];
};

enum nv_link_state {
    NV_LINK_HAGGLING,               /* Python talks through TLS */
    NV_LINK_WAITING,                /* in the transmission phase, not yet known to lead to the set's server */
    NV_LINK_SERVING,                /* in the set */
    NV_LINK_LEAVING,                /* DISC is on its way, or sent: waits for the server to close */
    NV_LINK_DRAINING,               /* given up, but changes may still be under way at the server */
    NV_LINK_LOST,                   /* no byte means anything any more; waits for its operations */
    NV_LINK_ENDED,                  /* the front's, once it has heard of it */
};

enum nv_answer_state {
    NV_ANSWER_HEADER,
    NV_ANSWER_DATA,                 /* content of a READ */
    NV_ANSWER_STATUS,               /* descriptors of a BLOCK_STATUS */
};

struct nv_talk;

struct nv_link {
    struct nv_remote *remote;
    struct nv_link *next, **back;   /* of the remote */
    struct nv_reactor *reactor;     /* the remote's home */
    uint32_t id;
    nv_handle handle;
    nv_link_params params;
    uint8_t state;
    bool retiring;                  /* the server said that it shuts down: ends once nothing is in flight */
    bool parting;                   /* we want to leave, once nothing is in flight */
    bool alone;                     /* carries one suspect request, and nothing beside it */
    bool deaf;                      /* DRAINING: what it says cannot be understood, only its end */
    bool mute;                      /* DRAINING: it takes nothing more */
    bool sorted;                    /* DRAINING: only changes still wait for it */
    bool expired;                   /* LOST: nobody waits any longer to hear what became of its changes */
    uint32_t arrival;               /* its number among the links that came */
    uint32_t ticks;                 /* since it opened */
    uint32_t heard;                 /* tick of the last sign that the server works on what is in flight */
    uint64_t deadline_ns;           /* HAGGLING, LEAVING, DRAINING; LOST: the last word */
    struct nv_ticker ticker;
    struct nv_late late;
    /* requests */
    struct nv_ask *asks;
    struct nv_ask *free_asks;
    uint32_t asks_touched;
    uint32_t serials;
    uint32_t in_flight;
    uint32_t flushes;               /* FLUSHes in flight */
    uint64_t bytes;                 /* payload of what is in flight */
    /* send */
    struct nv_ask *tx_queue, **tx_tail;
    struct nv_ask *tx_sending;
    bool tx_pending;
    uint32_t tx_tick;               /* when the send under way was begun */
    struct nv_op tx_op;
    uint32_t tx_first, tx_count;
    struct iovec tx_iov[NV_LINK_TX_IOV];
    /* receive */
    bool rx_pending;
    uint8_t rx_state;
    struct nv_op rx_op;
    struct iovec rx_iov;
    uint8_t *rx;                    /* NV_LINK_RX bytes */
    uint32_t rx_start, rx_end;
    uint32_t rx_window;             /* how much to receive at once */
    struct nv_ask *rx_ask;          /* whose chunk is being received */
    uint8_t *rx_to;                 /* DATA: where the next byte goes */
    uint64_t rx_left;               /* DATA, SKIP: bytes; STATUS: descriptors */
    bool rx_last;                   /* the chunk ends the answer */
    /* TLS */
    struct nv_tls *tls;
    struct nv_talk *talk;
    uint32_t haggle_ms;
    uint8_t *cipher;                /* NV_TLS_RECEIVE bytes */
    uint32_t cipher_start, cipher_end;
    struct iovec cipher_iov;
    /* end */
    int32_t end_reason;
    char reason[NV_LINK_REASON];
    struct nv_event_slot ended;
    bool announced;                 /* its event is raised */
    bool forgotten;                 /* the front has no use for it any more */
    struct nv_message message;      /* opens; at its end, is forgotten */
    struct nv_message close_message;
    bool close_sent;                /* front */
    bool told;                      /* front: its end was consumed */
};

struct nv_remote_counters {         /* one writer, the home; read by the front */
    _Atomic uint64_t asked, answered, errors, again, lost, read_bytes, write_bytes, waiting, serving, draining, owed,
        unsure;
};

struct nv_remote {
    struct nv_object object;        /* first */
    struct nv_plane *plane;
    struct nv_reactor *home;
    struct nv_remote *next, **back; /* of its home */
    uint32_t timeout_ticks;
    uint64_t hold_ns;               /* how long a lost link is given to say what became of its changes */
    uint32_t patience;              /* how many time-outs a request may meet */
    bool write_through;             /* every change with FUA: nothing is ever owed */
    struct nv_link *links;
    struct nv_link *serving[NV_LINKS_PER_REMOTE]; /* the set */
    uint32_t serving_count;
    uint32_t current;               /* the member that is being filled */
    uint32_t waiting_count;
    uint32_t arrivals;
    struct nv_piece *queue, **queue_tail;
    struct nv_late late;
    bool gave_up;                   /* what has no link fails */
    bool stopping;                  /* the plane stops: nobody waits for a link any more */
    bool ending;                    /* nobody has anything to say any more: its links leave */
    uint64_t acked;                 /* changes acknowledged and not durable by themselves */
    uint64_t flushed;               /* as far as the last FLUSH that succeeded covers; acked != flushed: owed */
    uint64_t era;                   /* raised when owed changes were lost: a FLUSH of an earlier era has failed */
    uint64_t sets;                  /* that have ended: half of a change that one acknowledged is nothing to the next */
    struct nv_span doubts[NV_REMOTE_DOUBTS]; /* places of changes that may still be carried out, while the fault stands */
    uint32_t doubt_count;
    struct nv_piece sync_piece;
    struct nv_piece own_flush;      /* the first one, and before the set's last link leaves */
    bool own_flushing;
    bool flush_first;               /* still to be done */
    struct nv_piece probe;          /* asks a member for a sign of life, for links that wait */
    bool probing;
    uint8_t *probe_data;            /* object.align bytes */
    struct nv_remote_counters counters;
    struct nv_message open_message;
    struct nv_message end_message;
    bool closing;                   /* waits for links that drain */
    /* front */
    uint32_t open_links;
};

static inline struct nv_remote *nv_remote_of(struct nv_object *object)
{
    return (struct nv_remote *)object;
}

static inline bool nv_link_extended(const struct nv_link *link)
{
    return link->params.flags & NV_CONN_EXTENDED;
}

static inline bool nv_piece_changes(const struct nv_piece *piece)
{
    return piece->kind == NV_PIECE_WRITE || piece->kind == NV_PIECE_ZERO || piece->kind == NV_PIECE_TRIM;
}

static inline bool nv_ask_changes(const struct nv_ask *ask)
{
    return ask->command == NBD_CMD_WRITE || ask->command == NBD_CMD_TRIM || ask->command == NBD_CMD_WRITE_ZEROES;
}

/* nbd_remote.c, on the home */
void nv_remote_opens(struct nv_reactor *reactor, struct nv_message *message);
void nv_remote_gives_up(struct nv_remote *remote, bool yes);
void nv_remote_stops(struct nv_remote *remote);
void nv_remote_ends(struct nv_remote *remote);
void nv_remote_closes(struct nv_remote *remote);        /* the front knows of no link: the home forgets it, then */
void nv_remote_link_ended(struct nv_remote *remote);    /* it has one link less */
void nv_remote_append(struct nv_remote *remote, struct nv_piece *piece);     /* without asking for a turn */
void nv_remote_push_front(struct nv_remote *remote, struct nv_piece *piece); /* it was on the wire before, or is in a hurry */
struct nv_piece *nv_remote_pop(struct nv_remote *remote);
struct nv_piece *nv_remote_pop_all(struct nv_remote *remote);   /* linked by remote.next */
void nv_remote_finish(struct nv_remote *remote, struct nv_piece *piece, int64_t result);
void nv_remote_wants_turn(struct nv_remote *remote);    /* there may be room now */
/* Front. The sync state is the caller's to set up, with nv_remote_sync(), when the object has its number. */
struct nv_remote *nv_remote_create(struct nv_plane *plane, struct nv_reactor *home, const nv_remote_config *config);
void nv_remote_free(struct nv_remote *remote);
nv_sync_run nv_remote_sync;

/* nbd_set.c, on the home */
void nv_remote_link_came(struct nv_link *link);         /* in the transmission phase */
void nv_remote_link_goes(struct nv_link *link, uint8_t to); /* LEAVING, DRAINING or LOST */
void nv_remote_prove(struct nv_remote *remote, uint32_t stamp); /* a member answered what was sent when so many had come */
void nv_remote_owe(struct nv_remote *remote);           /* a change is acknowledged, and not durable by itself */
bool nv_remote_owes(const struct nv_remote *remote);
void nv_remote_settled(struct nv_remote *remote, uint64_t up_to); /* a FLUSH made these durable */

/* nbd_dispatch.c */
void nv_remote_run(struct nv_late *late);               /* hand what waits to links, as far as they have room */
bool nv_piece_flushes(const struct nv_piece *piece);
void nv_remote_flush_first(struct nv_remote *remote);   /* the first set begins */
bool nv_remote_flush_last(struct nv_link *link);        /* asks for one, if nobody can vouch for what is owed without it */

/* nbd_answer.c */
void nv_remote_concluded(struct nv_ask *ask);           /* answered and wholly sent */
void nv_remote_again(struct nv_ask *ask);               /* not answered, or by nobody who counts: to another link */
void nv_remote_takes_back(const struct nv_ask *ask);    /* the same, but the request's place stays */
void nv_remote_doubt(struct nv_ask *ask);               /* nobody will ever say what became of this change */
bool nv_remote_doubts(struct nv_remote *remote, const struct nv_piece *piece); /* ... and this would change the same place */

/* nbd_link.c */
struct nv_link *nv_link_create(struct nv_remote *remote, nv_handle handle);     /* front */
void nv_link_free(struct nv_link *link);                                        /* front */
void nv_link_opens(struct nv_reactor *reactor, struct nv_message *message);
void nv_link_closes(struct nv_reactor *reactor, struct nv_message *message);
void nv_link_enters(struct nv_link *link);              /* the transmission phase begins */
void nv_link_leave(struct nv_link *link);               /* DISC, once nothing is in flight */
void nv_link_says_bye(struct nv_link *link);            /* nothing is in flight */
struct nv_ask *nv_ask_take(struct nv_link *link, struct nv_piece *piece);
void nv_ask_free(struct nv_ask *ask);

/* nbd_end.c */
/* It serves no more. The first reason stands. 0 and -ECONNRESET: the server has ended it; all else we cannot be sure of. */
void nv_link_lose(struct nv_link *link, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));
void nv_link_settle(struct nv_link *link);              /* an operation or a request of it has ended */
void nv_link_settles(struct nv_late *late);
void nv_link_expire(struct nv_link *link);              /* DRAINING: nobody waits for it any longer */
void nv_link_hang_up(struct nv_link *link);             /* LOST: its last word has been said, or takes too long */
void nv_link_forgets(struct nv_reactor *reactor, struct nv_message *message); /* the front has */

/* nbd_send.c */
void nv_link_queue(struct nv_ask *ask);                 /* encode it; goes out with nv_link_transmit() */
void nv_link_transmit(struct nv_link *link);
bool nv_link_gather(struct nv_link *link);              /* fill tx_iov; false: nothing to send */
void nv_link_advance(struct nv_link *link, uint64_t bytes);
void nv_link_submit_send(struct nv_link *link, struct iovec *iov, unsigned count);
void nv_link_tx_release(struct nv_link *link);          /* lost, and no send is under way */

/* nbd_receive.c */
void nv_link_arm_receive(struct nv_link *link);
void nv_link_parse(struct nv_link *link);
void nv_link_parse_secure(struct nv_link *link);        /* what TLS still holds */
bool nv_link_receives_in_place(const struct nv_link *link); /* the receive under way goes to a piece's memory */

/* nbd_front.c */
int nv_link_new(struct nv_plane *plane, uint32_t object, int fd, uint64_t token, struct nv_link **out);
void nv_link_launch(struct nv_link *link);
int nv_link_find(struct nv_plane *plane, uint32_t number, struct nv_link **out);
int nv_link_check_params(const struct nv_remote *remote, const nv_link_params *params);
void nv_link_told(struct nv_link *link);                /* its LOST event is read */
void nv_remote_close(struct nv_remote *remote);         /* object.closing is set; OBJECT_CLOSED follows */
void nv_remote_closed(struct nv_remote *remote);        /* home: nothing of it is left there */

/* nbd_secure.c */
int nv_link_make_secure(struct nv_link *link, nv_tls_context *context, const char *hostname, uint32_t timeout_ms);
void nv_link_haggle(struct nv_link *link);              /* go on with what has been received */
size_t nv_link_decrypt(struct nv_link *link, void *to, size_t size);
void nv_link_transmit_secure(struct nv_link *link);
void nv_link_sent_secure(struct nv_link *link, int64_t result);
void nv_talk_free(struct nv_talk *talk);

#endif
