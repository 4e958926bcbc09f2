/*
 * See far.h.
 */
#include "sim/far.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "io/io_sim.h"
#include "limits.h"
#include "sim/far_wire.h"
#include "sim/tally.h"

#define PLACES 3u       /* connections that the front wants */
#define CONNECTIONS 8u  /* that a server has of one opening, those included that their client has left */
#define CONNECTS_MAX 200u
#define DELAY_NS 10000000u
#define STALL_NS 2000000000u

struct connection {
    struct far_conn conn;
    uint32_t number;    /* the plane's link, or 0: it has ended, or was never there */
    bool leaving;       /* it refuses everything: the server shuts down */
    uint64_t silent_until_ns; /* what has come is neither carried out nor answered */
};

struct far {
    struct farm *farm;
    struct farm_leg *server;
    struct far *next;   /* of the same server */
    nv_plane *plane;
    int file;
    uint32_t object;
    uint64_t epoch;
    uint32_t attempt;
    uint32_t places, connects;
    bool left;          /* the front has no use for it */
    bool timed_out;     /* its client gave a connection up, and no server has said that it is over */
    bool flushed;
    bool refused;       /* its front has heard of a newer claim */
    struct connection connections[CONNECTIONS];
};

static bool chance(const struct far *far, unsigned of_1024)
{
    return farm_chance(far->farm, of_1024);
}

static const struct nv_sim_trouble *trouble_of(const struct far *far)
{
    return nv_sim_trouble(far->file);
}

static bool client_left(const struct connection *at)
{
    return nv_sim_client_left(at->conn.socket);
}

struct far *far_open(struct farm *farm, struct farm_leg *server, nv_plane *plane, int file, uint64_t epoch)
{
    struct far *far = calloc(1, sizeof *far);
    const nv_remote_config config = {.size = server->disk_size, .align = farm->align, .flags = NV_REMOTE_FLUSH_FIRST,
                                     .timeout_ms = server->far_timeout_ms, .hold_ms = server->far_hold_ms};

    assert(far);
    *far = (struct far){.farm = farm, .server = server, .next = server->openings, .plane = plane, .file = file,
                        .epoch = epoch, .attempt = ++server->attempts,
                        .places = 1 + (uint32_t)farm_below(farm, PLACES)};
    if (farm->silence)
        far->places = PLACES;
    server->openings = far;
    if (nv_remote_open(plane, &config, &far->object) != 0)
        nv_sim_violation("a remote export does not open: %s", nv_last_error());
    return far;
}

void far_free(struct far *far)
{
    struct far **link = &far->server->openings;

    far_settle(far);
    while (*link != far)
        link = &(*link)->next;
    *link = far->next;
    free(far);
}

uint32_t far_object(const struct far *far)
{
    return far->object;
}

/* ---- what is carried out ---- */

static bool fails(struct far *far, const struct far_request *request)
{
    const struct nv_sim_trouble *trouble = trouble_of(far);
    const bool read = request->type == FAR_READ || request->type == FAR_STATUS || request->type == FAR_CACHE;
    const bool failed = chance(far, read ? trouble->read_error : trouble->write_error);

    if (failed)
        tally(TALLY_LEG_ERROR);
    return failed;
}

static bool sync_fails(struct far *far)
{
    const bool failed = chance(far, trouble_of(far)->sync_error);

    if (failed)
        tally(TALLY_SYNC_ERROR);
    return failed;
}

static uint64_t part_of(struct far *far, uint64_t length)
{
    const uint64_t atom = far->farm->cell_bytes;

    return farm_below(far->farm, length / atom + 1) * atom;
}

/* A WRITE, ZEROES or TRIM; where it fails, part of it has happened. */
static int change(struct far *far, const struct far_request *request)
{
    struct sim_disk *disk = nv_sim_disk(far->file);
    const bool durable = request->flags & FAR_FUA;
    const bool lost = durable && sync_fails(far), failed = lost || fails(far, request);
    const enum sim_write_mode mode = lost ? SIM_WRITE_LOST : durable && !failed ? SIM_WRITE_DURABLE : SIM_WRITE_CACHED;
    const uint64_t length = failed ? part_of(far, request->length) : request->length;

    if (length == 0)
        return EIO;
    if (mode == SIM_WRITE_CACHED && !request->payload && !(request->flags & FAR_NO_HOLE))
        sim_disk_punch(disk, request->offset, length, nv_sim_time());
    else
        sim_disk_write(disk, request->offset, request->payload, length, nv_sim_time(), mode);
    return failed ? EIO : 0;
}

static int flush(struct far *far, const struct far_request *request)
{
    const bool failed = sync_fails(far);

    sim_disk_sync(nv_sim_disk(far->file), request->received_at, failed);
    far->flushed |= !failed;
    return failed ? EIO : 0;
}

static void read_content(struct far *far, struct connection *at, const struct far_request *request)
{
    uint8_t *data;

    if (fails(far, request)) {
        far_answer(&at->conn, request, EIO);
        return;
    }
    data = malloc(request->length);
    assert(data);
    sim_disk_read(nv_sim_disk(far->file), request->offset, data, request->length);
    far_answer_content(&at->conn, request, data, &far->farm->random);
    free(data);
}

static void check_request(const struct far *far, const struct far_request *request)
{
    const uint64_t size = far->server->disk_size;

    if (request->offset > size || request->length > size - request->offset ||
        ((request->offset | request->length) & (far->farm->align - 1)) ||
        ((request->type == FAR_READ || request->type == FAR_WRITE) &&
         (request->length == 0 || request->length > far->server->far_payload)))
        nv_sim_violation("a far server is asked for command %u of %llu bytes at %llu", request->type,
                         (unsigned long long)request->length, (unsigned long long)request->offset);
}

static void carry_out(struct far *far, struct connection *at, const struct far_request *request)
{
    check_request(far, request);
    if (far->farm->rules.trace)
        printf("-- far server carries out command %u flags %#x offset %llu length %llu%s\n", request->type, request->flags,
               (unsigned long long)request->offset, (unsigned long long)request->length,
               client_left(at) ? ", which nobody waits for" : "");
    if (at->leaving && !far->farm->calm) {
        far_answer(&at->conn, request, ESHUTDOWN);
        return;
    }
    switch (request->type) {
    case FAR_READ:
        read_content(far, at, request);
        break;
    case FAR_FLUSH:
        far_answer(&at->conn, request, flush(far, request));
        break;
    case FAR_STATUS:
        far_answer_status(&at->conn, request, nv_sim_disk(far->file), &far->farm->random);
        break;
    case FAR_CACHE:
        far_answer(&at->conn, request, 0);
        break;
    default:
        if (client_left(at))
            tally(TALLY_FAR_LATE);
        far_answer(&at->conn, request, change(far, request));
    }
}

/* ---- ends ---- */

/* Each sector of a write may have reached the disk or not. */
static void tear(struct far *far, const struct far_request *request)
{
    const uint64_t end = request->offset + request->length;
    uint32_t done = 0, left = 0;

    for (uint64_t at = request->offset, part; at < end; at += part) {
        part = SIM_SECTOR - at % SIM_SECTOR;
        part = part < end - at ? part : end - at;
        if (chance(far, 512)) {
            sim_disk_write(nv_sim_disk(far->file), at, request->payload + (at - request->offset), part, nv_sim_time(),
                           SIM_WRITE_CACHED);
            done++;
        } else {
            left++;
        }
    }
    if (done && left)
        tally(TALLY_TORN);
}

static void do_in_part(struct far *far, const struct far_request *request)
{
    if (request->type == FAR_WRITE)
        tear(far, request);
    else if ((request->type == FAR_ZEROES || request->type == FAR_TRIM) && chance(far, 512))
        sim_disk_write(nv_sim_disk(far->file), request->offset, NULL, part_of(far, request->length), nv_sim_time(),
                       SIM_WRITE_CACHED);
}

static void end_connection(struct far *far, struct connection *at)
{
    if (!client_left(at))
        tally(TALLY_FAR_CONNECTION);
    for (uint32_t i = 0; i < at->conn.request_count; i++)
        do_in_part(far, &at->conn.requests[i]);
    nv_sim_hurry(at->conn.socket); /* who waits for its end hears of it soon */
    far_conn_end(&at->conn, chance(far, 512));
}

void far_settle(struct far *far)
{
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        if (far->connections[i].conn.rx)
            end_connection(far, &far->connections[i]);
    far->timed_out = false;
}

void far_make_sure(struct far *far)
{
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        if (far->connections[i].conn.rx && client_left(&far->connections[i]))
            end_connection(far, &far->connections[i]);
    if (far->timed_out)
        tally(TALLY_FAR_WORD);
    far->timed_out = false;
}

/* That its client has, too; or NULL. */
static struct connection *some_connection(struct far *far)
{
    const uint32_t start = (uint32_t)farm_below(far->farm, CONNECTIONS);

    for (uint32_t i = 0; i < CONNECTIONS; i++) {
        struct connection *at = &far->connections[(start + i) % CONNECTIONS];
        if (at->conn.rx && !client_left(at))
            return at;
    }
    return NULL;
}

/* For longer than its client waits: perhaps also than it waits to hear what became of its changes. */
void far_silence(struct far *far)
{
    struct connection *at = some_connection(far);
    const struct farm_leg *server = far->server;
    const uint64_t wait_ms = 4ull * server->far_timeout_ms + farm_below(far->farm, 8u * server->far_hold_ms);

    if (!at)
        return;
    tally(TALLY_FAR_SILENT);
    at->silent_until_ns = nv_sim_clock_ns() + wait_ms * 1000000u;
}

void far_trouble(struct far *far)
{
    struct connection *at = some_connection(far);

    if (!at)
        return;
    if (chance(far, 512)) {
        tally(TALLY_FAR_LEAVES);
        at->leaving = true;
    } else {
        end_connection(far, at);
    }
}

/* ---- connecting ---- */

static bool unreachable(const struct far *far)
{
    const struct nv_sim_trouble *trouble = trouble_of(far);

    return trouble->gone || trouble->fenced ||
           (far->server->claims && farm_outclaimed(far->epoch, far->attempt, far->server->claim_epoch,
                                                   far->server->claim_attempt));
}

/* Nothing of an older claim is under way once this one is admitted. */
static void claim(struct far *far)
{
    struct farm_leg *server = far->server;

    if (!server->claims || (server->claim_epoch == far->epoch && server->claim_attempt == far->attempt))
        return;
    for (struct far *other = server->openings; other; other = other->next)
        if (other != far && farm_outclaimed(other->epoch, other->attempt, far->epoch, far->attempt)) {
            tally(TALLY_FAR_CLAIM);
            far_settle(other);
        }
    server->claim_epoch = far->epoch;
    server->claim_attempt = far->attempt;
}

static struct connection *free_place(struct far *far)
{
    struct connection *found = NULL;
    uint32_t used = 0;

    for (uint32_t i = 0; i < CONNECTIONS; i++) {
        struct connection *at = &far->connections[i];
        used += at->number != 0;
        if (at->number == 0 && !at->conn.rx)
            found = at;
    }
    return used < far->places ? found : NULL;
}

static bool connect_one(struct far *far)
{
    struct connection *at = far->left || far->connects == CONNECTS_MAX ? NULL : free_place(far);
    nv_link_params params = {.tflags = far->server->far_flags, .payload_max = far->server->far_payload,
                             .align = far->farm->align, .size = far->server->disk_size,
                             .allocation_id = FAR_ALLOCATION};

    if (!at)
        return false;
    claim(far);
    far->connects += far->farm->calm ? 0 : 1;
    at->leaving = false;
    at->silent_until_ns = 0;
    const bool extended = chance(far, 300), structured = !extended && chance(far, 512);
    params.flags = (structured ? NV_CONN_STRUCTURED : 0) | (extended ? NV_CONN_EXTENDED : 0);
    params.has_allocation = (structured || extended) && chance(far, 700);
    far_conn_begin(&at->conn, nv_sim_socket(), structured, extended);
    if (nv_link_open(far->plane, far->object, at->conn.socket, &params, 1 + (uint64_t)(at - far->connections),
                     &at->number) != 0)
        nv_sim_violation("a link does not open: %s", nv_last_error());
    return true;
}

void far_heard(struct far *far, const nv_event *event)
{
    struct connection *at = &far->connections[event->token - 1];
    char reason[256];

    if (event->token < 1 || event->token > CONNECTIONS || at->number != event->args[1])
        nv_sim_violation("the end of a link that is not there: %llu", (unsigned long long)event->token);
    if (nv_link_forget(far->plane, at->number, reason, sizeof reason) != 0 || reason[0] == 0)
        nv_sim_violation("a link ended without a reason");
    if (far->farm->rules.trace)
        printf("-- far link %u of object %u lost: %s (%d)\n", at->number, far->object, reason, event->result);
    if (event->result == -ETIMEDOUT)
        tally(TALLY_FAR_TIMED_OUT);
    far->timed_out |= event->result == -ETIMEDOUT;
    at->number = 0;
}

/* ---- what the front does ---- */

static void give_up(struct far *far)
{
    if (nv_remote_give_up(far->plane, far->object, 1) != 0)
        nv_sim_violation("a remote export cannot be given up: %s", nv_last_error());
}

void far_leave(struct far *far)
{
    if (far->left)
        return;
    far->left = true;
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        if (far->connections[i].number && nv_link_close(far->plane, far->connections[i].number) != 0)
            nv_sim_violation("a link does not close: %s", nv_last_error());
}

static nv_remote_stats_t stats_of(const struct far *far)
{
    nv_remote_stats_t stats;

    if (nv_remote_stats(far->plane, far->object, &stats) != 0)
        nv_sim_violation("a remote export has no figures: %s", nv_last_error());
    return stats;
}

bool far_is_over(const struct far *far)
{
    const nv_remote_stats_t stats = stats_of(far);

    return stats.in_flight == 0 && stats.waiting == 0 && stats.draining == 0;
}

bool far_is_doubtful(const struct far *far)
{
    return far->timed_out && !far->server->claims;
}

bool far_knows_all(const struct far *far)
{
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        if (far->connections[i].number && !far->connections[i].conn.rx && !client_left(&far->connections[i]))
            return false;
    return true;
}

bool far_is_sound(const struct far *far)
{
    return far_knows_all(far) && stats_of(far).links > 0;
}

bool far_knows_claims(const struct far *far)
{
    return far->server->claims;
}

bool far_has_flushed(const struct far *far)
{
    return far->flushed;
}

/* ---- steps ---- */

/* Received, and neither stuck nor to come later; or one past the last. */
static uint32_t choose_request(struct far *far, const struct far_conn *conn)
{
    const uint32_t start = (uint32_t)farm_below(far->farm, conn->request_count);

    for (uint32_t i = 0; i < conn->request_count; i++) {
        const uint32_t index = (start + i) % conn->request_count;
        if (conn->requests[index].received_at >= trouble_of(far)->stuck_before &&
            conn->requests[index].not_before_ns <= nv_sim_clock_ns())
            return index;
    }
    return conn->request_count;
}

static bool work(struct far *far, struct connection *at)
{
    const uint32_t index = choose_request(far, &at->conn);
    struct far_request request;

    if (index == at->conn.request_count)
        return false;
    request = far_conn_take(&at->conn, index);
    if (request.type == FAR_DISC) {
        end_connection(far, at);
        return true;
    }
    carry_out(far, at, &request);
    free(request.payload);
    return true;
}

static bool hear(struct far *far, struct connection *at)
{
    const uint32_t before = at->conn.request_count;
    const bool moved = far_conn_hear(&at->conn), came = at->conn.request_count > before && !far->farm->calm;

    if (came && chance(far, far->farm->faults.delay))
        at->conn.requests[before].not_before_ns = nv_sim_clock_ns() + farm_below(far->farm, DELAY_NS);
    if (came && chance(far, far->farm->faults.stall))
        at->conn.requests[before].not_before_ns = nv_sim_clock_ns() + farm_below(far->farm, STALL_NS);
    return moved;
}

/* Its client is gone: what was received may be done all the same, and perhaps what had only arrived. */
static bool wind_up(struct far *far, struct connection *at)
{
    if (chance(far, 512) && hear(far, at))
        return true;
    if (work(far, at))
        return true;
    if (at->conn.request_count > 0)
        return false;
    far_conn_end(&at->conn, false);
    return true;
}

static bool serve(struct far *far, struct connection *at)
{
    if (at->silent_until_ns > nv_sim_clock_ns() && !far->farm->calm)
        return hear(far, at);
    if (client_left(at))
        return wind_up(far, at);
    switch (farm_below(far->farm, 3)) {
    case 0:
        return hear(far, at) || work(far, at) || far_conn_speak(&at->conn, &far->farm->random);
    case 1:
        return work(far, at) || (at->conn.rx && far_conn_speak(&at->conn, &far->farm->random)) ||
               (at->conn.rx && hear(far, at));
    default:
        return far_conn_speak(&at->conn, &far->farm->random) || hear(far, at) || work(far, at);
    }
}

static bool has_connection(const struct far *far)
{
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        if (far->connections[i].conn.rx)
            return true;
    return false;
}

/* Nobody will connect soon: in time, what waits for that fails. */
static bool waits_in_vain(struct far *far)
{
    if (stats_of(far).links > 0 || stats_of(far).waiting == 0 || !(far->farm->calm || chance(far, 60)))
        return false;
    give_up(far);
    return true;
}

bool far_step(struct far *far)
{
    const uint32_t start = (uint32_t)farm_below(far->farm, CONNECTIONS);
    bool moved = false;

    if (unreachable(far)) {
        if (!far->refused && !far->left && !trouble_of(far)->gone)
            tally(TALLY_FAR_REFUSED);
        far->refused |= !trouble_of(far)->gone;
        moved = has_connection(far);
        far_settle(far);
        return waits_in_vain(far) || moved;
    }
    if (trouble_of(far)->hung)
        return waits_in_vain(far);
    for (uint32_t i = 0; i < CONNECTIONS && !moved; i++) {
        struct connection *at = &far->connections[(start + i) % CONNECTIONS];
        if (at->conn.rx)
            moved = serve(far, at);
    }
    if (!moved || chance(far, 100))
        moved |= connect_one(far);
    if (far->left || far->connects == CONNECTS_MAX)
        moved |= waits_in_vain(far);
    return moved;
}
