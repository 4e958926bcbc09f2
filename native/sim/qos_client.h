/*
 * A client that keeps a number of requests in flight and times each answer: simple replies, reads and what has no
 * payload (and writes, when asked for). Contents are nobody's business here: check.h judges them elsewhere.
 */
#ifndef NV_SIM_QOS_CLIENT_H
#define NV_SIM_QOS_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"
#include "sim/random.h"

#define QOS_DEPTH_MAX 64u

enum qos_mix { QOS_MIXED, QOS_READS, QOS_WRITES };

struct qos_request {
    bool used;
    uint16_t type;
    uint32_t length;
    uint64_t sent_ns, sent_busy_ns; /* on the clock; of the time that the world itself took */
    uint32_t regime;            /* of the limits, when it was sent */
    uint32_t connections;       /* the most that its volume had while it was in flight */
};

struct qos_client {
    int socket;
    uint32_t number;            /* of the connection, for the plane */
    uint32_t volume;            /* index */
    uint32_t depth;
    enum qos_mix mix;
    uint32_t bytes_max;
    uint64_t volume_bytes;
    bool open;                  /* requests may be made */
    bool dismissed;             /* ESHUTDOWN is a fair answer */
    bool leaving;               /* it is being ended */
    struct qos_request requests[QOS_DEPTH_MAX]; /* by cookie */
    uint64_t next_cookie;
    uint64_t answers, refusals;
    uint8_t *tx;
    uint32_t tx_start, tx_end;
    uint8_t head[16];           /* of the reply that comes in, and */
    uint32_t head_filled;
    uint32_t data_left;         /* how much of its data is still to come */
    uint64_t current;           /* its cookie */
};

/* Called for each answer, before its request is forgotten. */
typedef void qos_answered(void *context, struct qos_client *client, const struct qos_request *request, int error);

struct qos_client *qos_client_create(int socket, uint32_t volume, uint32_t depth, uint32_t bytes_max);
void qos_client_destroy(struct qos_client *client);
nv_connection_params qos_client_params(void);
uint32_t qos_client_unanswered(const struct qos_client *client);
/* Make requests until `depth` are in flight; each starts as a copy of `fresh` (times, regime). */
void qos_client_fill(struct qos_client *client, struct sim_random *random, const struct qos_request *fresh);
/* Move bytes both ways. False: none moved. */
bool qos_client_pump(struct qos_client *client, qos_answered *answered, void *context);
/* More connections than when its requests were sent. */
void qos_client_crowded(struct qos_client *client, uint32_t connections);

#endif
