/*
 * What a far server says and hears on one connection (far.h): bytes to requests, answers to bytes, by the protocol document
 * and with numbers of its own, as the model clients are. Answers leave in pieces and in any order.
 *
 * Invariants: each answer's last piece leaves last; a piece that has begun to leave is finished before another begins.
 */
#ifndef NV_SIM_FAR_WIRE_H
#define NV_SIM_FAR_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sim/disk.h"
#include "sim/random.h"

#define FAR_REQUESTS 160u
#define FAR_PIECES 1024u

enum { FAR_READ, FAR_WRITE, FAR_DISC, FAR_FLUSH, FAR_TRIM, FAR_CACHE, FAR_ZEROES, FAR_STATUS };
enum { FAR_FUA = 1, FAR_NO_HOLE = 2 };
enum {
    FAR_T_HAS_FLAGS = 1, FAR_T_FLUSH = 4, FAR_T_FUA = 8, FAR_T_TRIM = 32, FAR_T_ZEROES = 64, FAR_T_MULTI = 256,
    FAR_T_CACHE = 1024, FAR_T_FAST = 2048,
};
#define FAR_ALLOCATION 77u          /* the id of base:allocation */

struct far_piece {
    uint8_t *bytes;
    size_t size, sent;
    uint64_t cookie;
    bool last;                      /* of its answer */
};

struct far_request {
    uint16_t flags, type;
    uint64_t cookie, offset, length;
    uint8_t *payload;               /* of a WRITE */
    uint64_t received_at;           /* by the world's time */
    uint64_t not_before_ns;
};

struct far_conn {
    int socket;
    bool structured, extended;
    uint8_t *rx;                    /* NULL: the server has no such connection */
    size_t rx_size;
    struct far_request requests[FAR_REQUESTS]; /* received, not carried out */
    uint32_t request_count;
    struct far_piece *pieces;
    uint32_t piece_count;
    bool begun;                     /* pieces[0] has begun to leave */
};

void far_conn_begin(struct far_conn *conn, int socket, bool structured, bool extended);
void far_conn_end(struct far_conn *conn, bool reset); /* what it had received and not carried out is forgotten */
/* Bytes that have come; then a whole request, if there is one, which is added to those received. True: something moved. */
bool far_conn_hear(struct far_conn *conn);
bool far_conn_speak(struct far_conn *conn, struct sim_random *random);
struct far_request far_conn_take(struct far_conn *conn, uint32_t index);
/* Answers. */
void far_answer(struct far_conn *conn, const struct far_request *request, int error);
void far_answer_content(struct far_conn *conn, const struct far_request *request, const uint8_t *data,
                        struct sim_random *random);
void far_answer_status(struct far_conn *conn, const struct far_request *request, const struct sim_disk *disk,
                       struct sim_random *random);

#endif
