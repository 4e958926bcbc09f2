/*
 * The model client's inside, shared by its two halves: client.c makes requests and moves bytes, answer.c understands
 * and judges what comes back. Nothing else includes this file.
 */
#ifndef NV_SIM_ANSWER_H
#define NV_SIM_ANSWER_H

#include <stddef.h>

#include "sim/client.h"

enum {
    COMMAND_READ = 0,
    COMMAND_WRITE = 1,
    COMMAND_DISC = 2,
    COMMAND_FLUSH = 3,
    COMMAND_TRIM = 4,
    COMMAND_CACHE = 5,
    COMMAND_ZEROES = 6,
    COMMAND_STATUS = 7,
};

enum {
    FLAG_FUA = 1,
    FLAG_NO_HOLE = 2,
    FLAG_DF = 4,
    FLAG_REQ_ONE = 8,
    FLAG_FAST_ZERO = 16,
    FLAG_PAYLOAD_LEN = 32,
};

struct client_request {
    bool used;
    bool late;          /* sent to a deposed host */
    bool stray;         /* a read that was under way when its host was deposed */
    bool must_fail;     /* asked for durability after a failed sync was reported, */
    uint32_t clears;    /* and the operator had cleared faults this often */
    bool has_status;    /* a BLOCK_STATUS chunk has come */
    uint16_t type, flags;
    int expect;         /* the only fair answer, or 0 */
    int error;          /* from an error chunk, or 0 */
    uint32_t write;     /* the judge's number */
    uint32_t content;   /* content chunks so far */
    uint64_t cookie, offset, length;
    uint64_t sent;      /* the judge's time of a read or flush */
    uint64_t got;       /* READ: bytes so far */
    uint8_t *data;      /* READ: the bytes, then a map of those that have come */
};

struct client {
    struct client_rules *rules;
    uint32_t id;
    uint32_t context;   /* base:allocation's id */
    int socket;
    bool structured, extended;
    bool open;          /* requests may be made */
    bool disconnecting; /* DISC is on its way */
    bool shut;          /* the server may drop what it has not parsed */
    bool dismissed;     /* the operator has ended the connection */
    bool deposed;       /* its host serves the volume no more */
    bool over;          /* nothing comes any more */
    uint64_t next_cookie;
    struct client_request requests[CLIENT_REQUESTS];
    uint8_t *tx, *rx;
    size_t tx_start, tx_end, rx_size;
};

/* Take whole answers out of client->rx and judge them. */
void client_understand(struct client *client);
/* The stream has ended: was it fair? */
void client_saw_end(struct client *client);

#endif
