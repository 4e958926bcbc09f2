/*
 * A model NBD client on a simulated socket: it makes random requests, tells the judge (check.h) what it sends and what
 * comes back, and holds the server to the protocol: one answer per request, the right form for what was negotiated, an
 * error only where one is due. It encodes and decodes by itself, with numbers of its own from the protocol document.
 */
#ifndef NV_SIM_CLIENT_H
#define NV_SIM_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"
#include "sim/check.h"
#include "sim/onlooker.h"
#include "sim/random.h"

#define CLIENT_REQUESTS 24u

struct client_rules {           /* what the scenario allows, shared by its clients */
    struct check *check;
    struct onlooker *onlooker;  /* NULL: none */
    struct sim_random *random;
    uint32_t cell_bytes;
    uint32_t block_min;         /* of the volume: what is no multiple of it is EINVAL */
    uint64_t cells;             /* the volume's size as every client may know it */
    uint64_t zero_from, zero_to; /* bytes that have no storage: a write there fails */
    uint32_t cells_max;         /* longest request */
    uint32_t corner;            /* this many cells, at the start, are asked for mostly */
    uint16_t longs;             /* chance in 1024 that one may be so long; else it is a short one */
    bool io_errors;             /* reads and writes may fail */
    bool sync_errors;
    bool latched;               /* a failed sync was reported: FLUSH must fail until it is cleared */
    bool latched_all;           /* ... for every disk: so must FUA */
    uint32_t clears;            /* how often it was */
    bool closing;               /* ESHUTDOWN is a fair answer */
    bool logged;                /* what is latched below a write-back log need not concern a FLUSH, but may any change */
    bool growing;               /* the end may have moved already */
    bool read_only;             /* make no changes, for the final look */
    bool trace;
    /* a mirror: the range was changed and that was acknowledged */
    void (*acknowledged)(void *context, uint64_t first, uint64_t count);
    void *context;
    uint64_t requests;          /* made, and */
    uint64_t answers;           /* received by all clients of all lives */
};

struct client;

/* Negotiated state is drawn by chance. `id` is unique for the judge. */
struct client *client_create(struct client_rules *rules, uint32_t id, int socket, nv_connection_params *params);
void client_destroy(struct client *client);
uint32_t client_id(const struct client *client);

/* Make one random request, if there is room for it. */
void client_request(struct client *client);
/* READ of a range, for the final look; false: no room now. */
bool client_read(struct client *client, uint64_t first, uint64_t count);
/* One command on a range of cells, with its flags, both as on the wire. It must fit. */
void client_ask(struct client *client, uint16_t command, uint16_t flags, uint64_t first, uint64_t count);
/* Bytes of the stream that the handshake may have taken in already; they are not sent again. */
uint32_t client_early(struct client *client, uint8_t *out, uint32_t capacity);
/* Move some bytes each way and judge complete answers. False: nothing moved. */
bool client_pump(struct client *client, bool all);
/* Ends: DISC, half-close (the server may drop what it has not parsed), close or reset. */
void client_disconnect(struct client *client);
void client_dismissed(struct client *client); /* the operator ends it: ESHUTDOWN and a hang-up are fair from here on */
/* A newer host serves the volume: what is asked from here on may only fail, and reads under way prove nothing. */
void client_deposed(struct client *client);
void client_shut(struct client *client);
void client_close(struct client *client, bool reset);

bool client_open(const struct client *client);      /* requests may be made */
bool client_ended(const struct client *client);     /* the server has closed, or nobody listens any more */
uint32_t client_unanswered(const struct client *client);
void client_describe(const struct client *client);  /* to stderr */

#endif
