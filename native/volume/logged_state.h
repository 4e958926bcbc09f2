/*
 * What logged.c, logged_below.c and logged_front.c share. All of it is the owner's but for what is said to be the front's;
 * the front looks at `shown`, under its lock.
 */
#ifndef NV_LOGGED_STATE_H
#define NV_LOGGED_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "log/log.h"
#include "nbdvvol.h"
#include "reactor/events.h"
#include "reactor/inbox.h"
#include "reactor/reactor.h"
#include "volume/logged.h"
#include "volume/volume.h"

struct nv_logged_below {            /* I/O below the log */
    struct nv_vreq v;
    struct nv_logged *logged;
    struct nv_log_below *io;        /* until it is over */
    struct nv_logged_below *next;   /* of the free ones */
    uint8_t *data;                  /* READ, WRITE: the memory that it was given */
    bool over;
    bool extra;                     /* made in place of one that is kept */
    /* while late operations keep its memory; whose that is: */
    bool ours;                      /* the log's */
    uint8_t *block;                 /* was a slot's */
    struct nv_vreq *client;         /* a client's request */
    uint8_t *orphan;                /* nobody's */
    struct nv_message message;      /* to the client's reactor and back */
};

struct nv_logged_slot {             /* a client's request in the log */
    struct nv_log_request log;
    struct nv_logged *logged;
    struct nv_logged_slot *next;    /* of the free ones */
    struct nv_vreq *request;
    uint64_t at;                    /* offset in the volume of what is under way, or next */
    uint64_t part;                  /* bytes of it */
    bool merging;                   /* a block is being read that the request touches in part */
    uint8_t *block;                 /* NV_LOG_UNIT bytes */
};

struct nv_logged_slots {
    struct nv_logged_slot *free;
    struct nv_vreq *waiting, **waiting_last; /* for one */
};

enum nv_logged_kind { NV_LOGGED_ALLOW, NV_LOGGED_DRAIN, NV_LOGGED_FORGET, NV_LOGGED_LIMIT };

struct nv_logged_command {
    struct nv_message message;
    struct nv_logged *logged;
    enum nv_logged_kind kind;
    uint64_t token;
    _Atomic bool sent;              /* until it has arrived */
};

#define NV_LOGGED_OWN (NV_LOG_RUNS + 1u) /* I/O below of the log's own: destage writes, and a flush */

struct nv_logged {
    struct nv_volume *volume;
    struct nv_reactor *reactor;
    struct nv_object *object;
    struct nv_log *log;
    struct nv_turner turner;
    struct nv_late late;
    struct nv_ticker ticker;
    struct nv_message open_message, end_message;
    struct nv_logged_command allow, drain, forget, limit;
    nv_log_policy limits;           /* of the command `limit`: the front's until it is sent, the owner's until it arrives */
    struct nv_event_slot opened, drained, failed, lost, word, rests;
    struct nv_log_below *landed_first, **landed_last;
    struct nv_logged_slots slots[2]; /* [1]: of reads, so that changes which wait for long hold up none */
    struct nv_logged_slot *all;     /* NV_LOGGED_SLOTS */
    struct nv_logged_below *below, *free_below; /* NV_LOGGED_SLOTS + NV_LOGGED_OWN, and extra ones */
    struct nv_log_below *starved_first, **starved_last; /* for one of them */
    uint8_t **blocks;               /* for slots whose block is kept */
    uint32_t block_count;
    uint64_t block_total;           /* blocks in `memory`: one a slot; of a mirror each leg may keep as many while it hangs */
    bool opening;                   /* when the mirror's copies under way are over */
    bool carrying;                  /* a batch is being destaged: */
    uint64_t faults;                /* ... failed syncs below that were known when it began */
    bool fenced;
    uint32_t held_turns;            /* so long a record has waited for the rest of what a client sends */
    bool pumping;
    bool was_busy;                  /* after the last pump something was under way */
    bool draining;                  /* LOG_DRAINED is owed */
    bool is_drained;
    bool closing;                   /* the volume is */
    bool end_wanted;
    bool before;                    /* the front's: requests go through it */
    uint32_t kept;                  /* I/O below whose memory late operations keep */
    struct nv_switch *leaves;
    struct nv_logged *retired;      /* the next one of the volume's */
    bool hangs;                     /* the front's: its device hung as it was opened; until LOG_RESTS is taken */
    bool orphan;                    /* the front's: the volume has it no more, and may be gone; LOG_RESTS frees it */
    bool asked_to_drain;            /* the front's: until LOG_DRAINED is taken */
    pthread_mutex_t shown_lock;
    nv_log_status shown;
    struct nv_log_span lost_spans[NV_LOG_LOST_SPANS];
    uint32_t lost_count;
    struct nv_log_span lost_fresh[NV_LOG_LOST_SPANS]; /* the owner's, while it looks */
    uint64_t lost_shown[2];         /* the owner's: blocks that are, and ever were, lost, as shown */
    uint8_t *memory;
};

/* logged_below.c */
void nv_logged_free_below(struct nv_logged *logged);
uint8_t *nv_logged_block(struct nv_logged *logged);

/* logged.c */
void nv_logged_send_open(struct nv_logged *logged);
void nv_logged_send(struct nv_logged *logged, struct nv_logged_command *command);
void nv_logged_below(void *context, struct nv_log_below *io);
void nv_logged_event(void *context, enum nv_log_event event, int64_t value);
void nv_logged_part_done(struct nv_log_request *log);

/* logged_front.c */
void nv_logged_tell_opened(struct nv_logged *logged);
void nv_logged_show(struct nv_logged *logged);
/* ... and where what is lost lies; false: it is shown already. */
bool nv_logged_show_lost(struct nv_logged *logged, const struct nv_log_look *look);

#endif
