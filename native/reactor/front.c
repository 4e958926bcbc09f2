/*
 * The C API's objects, volumes and connections (nbdvvol.cdef.h): checks the caller's words, keeps the tables, sends the
 * reactors their messages. Front-thread only; nothing here waits.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "backend/file.h"
#include "backend/nbd.h"
#include "limits.h"
#include "nbd/pace.h"
#include "nbd/session.h"
#include "error.h"
#include "reactor/job.h"
#include "reactor/plane.h"
#include "volume/desc.h"
#include "volume/logged.h"
#include "volume/mirror.h"

/* --- objects --- */

static int check_object(uint32_t flags, uint32_t align)
{
    if (flags & ~(uint32_t)(NV_OBJECT_DIRECT | NV_OBJECT_BLOCK | NV_OBJECT_READ_ONLY))
        return nv_fail(EINVAL, "object flags 0x%x are unknown", flags);
    if (align == 0 || (align & (align - 1)) || align > NV_BLOCK_MIN_MAX)
        return nv_fail(EINVAL, "alignment %u is not a power of two of 1..%u", align, NV_BLOCK_MIN_MAX);
    if (!(flags & NV_OBJECT_DIRECT) && align != 1)
        return nv_fail(EINVAL, "alignment %u without O_DIRECT", align);
    if ((flags & NV_OBJECT_DIRECT) && align > NV_POOL_PAGE)
        return nv_fail(EINVAL, "O_DIRECT alignment %u is above %u", align, NV_POOL_PAGE);
    return 0;
}

int nv_object_open(nv_plane *plane, int fd, uint32_t flags, uint32_t align, uint64_t size, uint32_t *number)
{
    struct nv_object *object;
    nv_handle handle;
    int error = check_object(flags, align);

    if (error)
        return error;
    object = calloc(1, sizeof *object);
    if (!object || nv_object_counts(object, plane->config.reactors) != 0) {
        free(object);
        return nv_fail(ENOMEM, "no memory for an object");
    }
    handle = nv_io_open_file(fd);
    if (handle < 0) {
        error = nv_fail(-handle, "descriptor %d: %s", fd, strerror(-handle));
        free(object->counters);
        free(object);
        return error;
    }
    if (nv_table_add(&plane->objects, object, &object->id) != 0) {
        nv_io_close(handle);
        free(object->counters);
        free(object);
        return nv_fail(ENOSPC, "%u objects are open, the limit", NV_OBJECTS_MAX);
    }
    nv_file_open(object, handle, flags, align, size);
    *number = object->id;
    return 0;
}

static int find_object(nv_plane *plane, uint32_t number, struct nv_object **out)
{
    *out = nv_table_get(&plane->objects, number);
    return *out ? 0 : nv_fail(ENOENT, "object %u is not open", number);
}

static void object_closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_object *object = (struct nv_object *)((char *)message - offsetof(struct nv_object, close_message));

    nv_events_raise(&reactor->events, &object->closed);
}

int nv_object_close(nv_plane *plane, uint32_t number, uint64_t token)
{
    struct nv_object *object;
    int error = find_object(plane, number, &object);

    if (error)
        return error;
    if (object->users > 0)
        return nv_fail(EBUSY, "object %u is used by %u maps or jobs", number, object->users);
    if (object->closing)
        return nv_fail(EALREADY, "object %u is being closed", number);
    object->closing = true;
    object->closed.event = (nv_event){.kind = NV_EVENT_OBJECT_CLOSED, .token = token, .args = {number}};
    object->closed.subject = object;
    if (object->kind == NV_KIND_NBD) {
        nv_remote_close(nv_remote_of(object));
        return 0;
    }
    object->close_message.run = object_closes;
    nv_reactor_send(nv_plane_reactor(plane, 0), &object->close_message); /* behind its fault events */
    return 0;
}

int nv_object_set_size(nv_plane *plane, uint32_t number, uint64_t size)
{
    struct nv_object *object;
    int error = find_object(plane, number, &object);

    if (error)
        return error;
    if (size < atomic_load(&object->size) && object->users > 0)
        return nv_fail(EBUSY, "object %u of %" PRIu64 " bytes is in use and cannot shrink to %" PRIu64, number,
                       atomic_load(&object->size), size);
    if (object->kind == NV_KIND_FILE)
        nv_file_grow(object, size);
    atomic_store(&object->size, size);
    return 0;
}

int nv_object_latch_fault(nv_plane *plane, uint32_t number)
{
    struct nv_object *object;
    int error = find_object(plane, number, &object);

    if (!error)
        nv_sync_latch(&object->sync);
    return error;
}

int nv_object_clear_fault(nv_plane *plane, uint32_t number)
{
    struct nv_object *object;
    int error = find_object(plane, number, &object);

    if (!error)
        nv_sync_clear(&object->sync);
    return error;
}

int nv_object_job(nv_plane *plane, uint32_t number, uint32_t op, void *buffer, uint64_t offset, uint64_t length,
                  uint64_t token)
{
    struct nv_object *object;
    struct nv_job *job;
    int error = find_object(plane, number, &object);

    if (!error && object->closing)
        error = nv_fail(EALREADY, "object %u is being closed", number);
    if (!error)
        error = nv_job_create(object, op, buffer, offset, length, token, &job);
    if (error)
        return error;
    object->users++;
    nv_job_send(job, nv_plane_reactor(plane, number % plane->config.reactors));
    return 0;
}

/* --- volumes --- */

static struct nv_object *lookup_object(void *context, uint32_t number)
{
    struct nv_object *object = nv_table_get(&((nv_plane *)context)->objects, number);

    return object && !object->closing ? object : NULL;
}

static int compile(nv_plane *plane, const void *desc, uint64_t length, struct nv_map **map)
{
    int error = nv_desc_compile(desc, length, plane->config.reactors, lookup_object, plane, map);

    if (!error)
        for (uint32_t i = 0; i < (*map)->object_count; i++)
            (*map)->objects[i]->users++;
    return error;
}

static int find_volume(nv_plane *plane, uint32_t number, struct nv_volume **out)
{
    *out = nv_table_get(&plane->volumes, number);
    if (!*out)
        return nv_fail(ENOENT, "volume %u is not open", number);
    return (*out)->closing ? nv_fail(ESHUTDOWN, "volume %u is being closed", number) : 0;
}

int nv_volume_open(nv_plane *plane, const void *desc, uint64_t length, uint32_t *number)
{
    const uint32_t reactors = plane->config.reactors;
    const size_t bytes = sizeof(struct nv_volume) + reactors * sizeof(struct nv_volume_local);
    struct nv_volume *volume;
    struct nv_map *map;
    int error = compile(plane, desc, length, &map);

    if (error)
        return error;
    volume = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!volume) {
        nv_object_unuse(map);
        return nv_fail(ENOMEM, "no memory for a volume");
    }
    memset(volume, 0, bytes);
    if (nv_table_add(&plane->volumes, volume, &volume->id) != 0) {
        free(volume);
        nv_object_unuse(map);
        return nv_fail(ENOSPC, "%u volumes are open, the limit", NV_VOLUMES_MAX);
    }
    volume->plane = plane;
    volume->latest = map;
    nv_range_table_init(&volume->ranges);
    nv_range_table_init(&volume->below);
    nv_cached_open(volume);
    atomic_store(&volume->open_locals, reactors);
    for (uint32_t i = 0; i < reactors; i++) {
        volume->locals[i].map = map; /* published by the message that brings the first connection */
        volume->locals[i].volume = volume;
        volume->locals[i].share.weight = NV_SHARES_USUAL;
    }
    if (map->legs && nv_mirror_create(volume, map, nv_plane_reactor(plane, volume->id % reactors)) != 0) {
        nv_table_remove(&plane->volumes, volume->id);
        nv_range_table_free(&volume->ranges);
        nv_range_table_free(&volume->below);
        free(volume);
        nv_object_unuse(map);
        return nv_fail(ENOMEM, "no memory for a mirror");
    }
    *number = volume->id;
    if (volume->mirror)
        nv_mirror_send_open(volume->mirror);
    return 0;
}

static struct nv_volume_change *make_change(struct nv_volume *volume, struct nv_map *to, uint64_t token)
{
    const uint32_t reactors = volume->plane->config.reactors;
    struct nv_volume_change *change = calloc(1, sizeof *change + reactors * sizeof(struct nv_change_message));

    if (!change)
        return NULL;
    change->volume = volume;
    change->from = volume->latest;
    change->to = to;
    atomic_store(&change->left, reactors);
    change->owners_turn = reactors == 1;
    change->changed.event = (nv_event){
        .kind = NV_EVENT_VOLUME_CHANGED, .token = token, .volume = volume->id, .args = {to->version}};
    change->changed.subject = change;
    change->from->change = change;
    return change;
}

int nv_volume_change(nv_plane *plane, uint32_t number, const void *desc, uint64_t length, uint64_t token)
{
    struct nv_volume_change *change;
    struct nv_volume *volume;
    struct nv_map *map;
    int error = find_volume(plane, number, &volume);

    if (error || (error = compile(plane, desc, length, &map)))
        return error;
    if (nv_desc_map_from(desc) != volume->latest->version) {
        error = nv_fail(ESTALE, "the change starts from map version %" PRIu64 ", the volume runs %" PRIu64,
                        nv_desc_map_from(desc), volume->latest->version);
        nv_object_unuse(map);
        return error;
    }
    if (volume->mirror || map->legs) { /* one change at a time: lanes are handed out again when it is through */
        error = volume->map_changes ? nv_fail(EBUSY, "another change of mirror %u is under way", number)
                                : nv_mirror_check_change(volume->latest, map);
        if (error) {
            nv_object_unuse(map);
            return error;
        }
    }
    if ((error = nv_logged_check_change(volume, map))) {
        nv_object_unuse(map);
        return error;
    }
    change = make_change(volume, map, token);
    if (!change) {
        nv_object_unuse(map);
        return nv_fail(ENOMEM, "no memory for a volume change");
    }
    nv_cached_map_changes(volume, volume->latest, map);
    volume->latest = map;
    volume->changes++;
    volume->map_changes++;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        change->messages[i].change = change;
        change->messages[i].message.run = nv_volume_local_change;
        nv_reactor_send(nv_plane_reactor(plane, i), &change->messages[i].message);
    }
    return 0;
}

static struct nv_qos_change *make_qos_change(struct nv_volume *volume, const nv_qos_limits *limits, uint64_t token)
{
    const uint32_t reactors = volume->plane->config.reactors;
    struct nv_qos_change *change = calloc(1, sizeof *change + reactors * sizeof(struct nv_qos_message));

    if (!change)
        return NULL;
    if (nv_qos_limits_anything(limits)) {
        change->to = aligned_alloc(64, (sizeof *change->to + 63) / 64 * 64);
        if (!change->to) {
            free(change);
            return NULL;
        }
        nv_qos_init(change->to, limits);
    }
    change->volume = volume;
    change->from = volume->limits;
    change->shares = limits->shares;
    atomic_store(&change->left, reactors);
    change->changed.event = (nv_event){.kind = NV_EVENT_VOLUME_QOS, .token = token, .volume = volume->id};
    change->changed.subject = change;
    return change;
}

int nv_volume_set_qos(nv_plane *plane, uint32_t number, const nv_qos_limits *limits, uint64_t token)
{
    struct nv_qos_change *change;
    struct nv_volume *volume;
    int error = find_volume(plane, number, &volume);

    if (error || (error = nv_qos_check(limits)))
        return error;
    change = make_qos_change(volume, limits, token);
    if (!change)
        return nv_fail(ENOMEM, "no memory for a volume's limits");
    volume->limits = change->to;
    volume->changes++;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        change->messages[i].change = change;
        change->messages[i].message.run = nv_pace_changes;
        nv_reactor_send(nv_plane_reactor(plane, i), &change->messages[i].message);
    }
    return 0;
}

static void volume_closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_volume_local *local =
        (struct nv_volume_local *)((char *)message - offsetof(struct nv_volume_local, message));

    for (struct nv_conn *conn = local->connections; conn; conn = conn->volume_next)
        nv_conn_close(conn, -ESHUTDOWN);
    if (local->volume->mirror && nv_mirror_owner(local->volume->mirror) == reactor)
        nv_mirror_closes(local->volume->mirror);
    if (reactor->index == local->volume->id % reactor->plane->config.reactors && local->volume->owned)
        nv_logged_closes(local->volume->owned);
    nv_volume_local_close(reactor, local);
}

int nv_volume_close(nv_plane *plane, uint32_t number, uint64_t token)
{
    struct nv_volume *volume;
    int error = find_volume(plane, number, &volume);

    if (error)
        return error;
    volume->closing = true;
    volume->closed.event = (nv_event){.kind = NV_EVENT_VOLUME_CLOSED, .token = token, .volume = number};
    volume->closed.subject = volume;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        volume->locals[i].message.run = volume_closes;
        nv_reactor_send(nv_plane_reactor(plane, i), &volume->locals[i].message);
    }
    return 0;
}

int nv_volume_stats(nv_plane *plane, uint32_t number, nv_volume_stats_t *out)
{
    struct nv_volume *volume = nv_table_get(&plane->volumes, number);

    if (!volume)
        return nv_fail(ENOENT, "volume %u is not open", number);
    *out = (nv_volume_stats_t){.connections = atomic_load(&volume->connections)};
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        struct nv_volume_counters *counters = &volume->locals[i].counters;
        out->reads += atomic_load(&counters->kinds[NV_REQUEST_READ].requests);
        out->writes += atomic_load(&counters->kinds[NV_REQUEST_WRITE].requests);
        out->flushes += atomic_load(&counters->kinds[NV_REQUEST_FLUSH].requests);
        out->trims += atomic_load(&counters->kinds[NV_REQUEST_TRIM].requests);
        out->zeroes += atomic_load(&counters->kinds[NV_REQUEST_ZERO].requests);
        out->others += atomic_load(&counters->kinds[NV_REQUEST_CACHE].requests) +
                       atomic_load(&counters->kinds[NV_REQUEST_STATUS].requests);
        out->read_bytes += atomic_load(&counters->kinds[NV_REQUEST_READ].bytes);
        out->write_bytes += atomic_load(&counters->kinds[NV_REQUEST_WRITE].bytes);
        out->errors += atomic_load(&counters->errors);
        out->in_flight += atomic_load(&counters->in_flight);
        out->delayed += atomic_load(&counters->delayed);
        out->delay_ns += atomic_load(&counters->delay_ns);
    }
    return 0;
}

/* --- mirrors --- */

static int send_command(nv_plane *plane, uint32_t number, enum nv_mirror_command_kind kind, uint32_t leg, bool option,
                        uint64_t generation, uint64_t token)
{
    struct nv_volume *volume;
    int error = find_volume(plane, number, &volume);

    if (!error && kind == NV_MIRROR_RESYNC && volume->map_changes)
        error = nv_fail(EBUSY, "a change of mirror %u is under way", number);
    return error ? error : nv_mirror_send_command(volume, kind, leg, option, generation, token);
}

int nv_leg_fail(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t token)
{
    return send_command(plane, volume, NV_MIRROR_FAIL, leg, false, 0, token);
}

int nv_leg_release(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t generation, uint64_t token)
{
    return send_command(plane, volume, NV_MIRROR_RELEASE, leg, false, generation, token);
}

int nv_leg_resync(nv_plane *plane, uint32_t volume, uint32_t leg, uint32_t full, uint64_t generation, uint64_t token)
{
    return send_command(plane, volume, NV_MIRROR_RESYNC, leg, full != 0, generation, token);
}

int nv_leg_stop(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t token)
{
    return send_command(plane, volume, NV_MIRROR_STOP, leg, false, 0, token);
}

int nv_leg_promote(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t generation, uint64_t token)
{
    return send_command(plane, volume, NV_MIRROR_PROMOTE, leg, false, generation, token);
}

int nv_volume_fence(nv_plane *plane, uint32_t volume)
{
    return send_command(plane, volume, NV_MIRROR_FENCE, 0, false, 0, 0);
}

int nv_volume_verify(nv_plane *plane, uint32_t volume, uint32_t repair, uint64_t token)
{
    return send_command(plane, volume, NV_MIRROR_VERIFY, 0, repair != 0, 0, token);
}

int nv_volume_mirror(nv_plane *plane, uint32_t number, nv_mirror_status *out)
{
    struct nv_volume *volume = nv_table_get(&plane->volumes, number);

    if (!volume)
        return nv_fail(ENOENT, "volume %u is not open", number);
    if (!volume->mirror)
        return nv_fail(EINVAL, "volume %u is not a mirror", number);
    nv_mirror_look(volume->mirror, out);
    return 0;
}

/* --- connections --- */

static int check_params(const nv_connection_params *params)
{
    if (params->flags & ~(uint32_t)(NV_CONN_STRUCTURED | NV_CONN_EXTENDED | NV_CONN_READ_ONLY))
        return nv_fail(EINVAL, "connection flags 0x%x are unknown", params->flags);
    if (params->block_min == 0 || (params->block_min & (params->block_min - 1)) ||
        params->block_min > NV_BLOCK_MIN_MAX)
        return nv_fail(EINVAL, "minimum block %u is not a power of two of 1..%u", params->block_min, NV_BLOCK_MIN_MAX);
    if (params->payload_max < NV_POOL_PAGE || params->payload_max > NV_PAYLOAD_MAX)
        return nv_fail(EINVAL, "maximum payload %u is not in %u..%u", params->payload_max, NV_POOL_PAGE,
                       NV_PAYLOAD_MAX);
    if (params->context_count > NV_CONTEXTS_MAX)
        return nv_fail(EINVAL, "%u meta contexts, above %u", params->context_count, NV_CONTEXTS_MAX);
    for (uint32_t i = 0; i < params->context_count; i++)
        if (params->contexts[i].kind != NV_CONTEXT_BASE_ALLOCATION)
            return nv_fail(EINVAL, "meta context kind %u is unknown", params->contexts[i].kind);
    return 0;
}

int nv_connection_new(nv_plane *plane, struct nv_reactor *reactor, int fd, uint64_t token, struct nv_conn **out)
{
    struct nv_conn *conn = nv_conn_create(reactor ? reactor : nv_plane_least_loaded(plane), -1);

    if (!conn)
        return nv_fail(ENOMEM, "no address space for a connection");
    if (nv_table_add(&plane->connections, conn, &conn->id) != 0) {
        nv_conn_free(conn);
        return nv_fail(ENOSPC, "%u connections are open, the limit", plane->connections.capacity);
    }
    conn->handle = nv_io_open_socket(fd);
    if (conn->handle < 0) {
        int error = nv_fail(-conn->handle, "descriptor %d is not a usable stream socket: %s", fd,
                            strerror(-conn->handle));
        nv_table_remove(&plane->connections, conn->id);
        nv_conn_free(conn);
        return error;
    }
    conn->rx_low_water = nv_io_low_water(conn->handle, 1) ? 1 : 0;
    conn->closed.event.token = token;
    *out = conn;
    return 0;
}

void nv_connection_launch(nv_plane *plane, struct nv_conn *conn)
{
    plane->assigned[conn->reactor->index]++;
    conn->open_message.run = nv_conn_opens;
    nv_reactor_send(conn->reactor, &conn->open_message); /* from here on it may end at any moment */
}

int nv_connection_aim(nv_plane *plane, struct nv_conn *conn, uint32_t volume_number,
                      const nv_connection_params *params, struct nv_volume **volume)
{
    int error = find_volume(plane, volume_number, volume);

    if (!error && !params)
        error = nv_fail(EINVAL, "entering the transmission phase needs parameters");
    if (!error && conn && conn->bound)
        error = nv_fail(EALREADY, "connection %u is in the transmission phase", conn->id);
    return error ? error : check_params(params);
}

void nv_connection_bind(struct nv_conn *conn, struct nv_volume *volume)
{
    assert(!conn->bound);
    conn->bound = volume;
    volume->served = true;
    conn->closed.event.volume = volume->id;
    conn->alone_at = atomic_fetch_add(&volume->bindings, 1) + 1;
    if (atomic_fetch_add(&volume->connections, 1) > 0)
        conn->alone_at = 0;
}

/* Connections live with a mirror or a log, where their requests need no message; of others the least loaded will do. */
static struct nv_reactor *home_of(const nv_plane *plane, const struct nv_volume *volume)
{
    if (volume->logged && !plane->scattered)
        return nv_logged_owner(volume->logged);
    return volume->mirror && !plane->scattered ? nv_mirror_owner(volume->mirror) : NULL;
}

int nv_connection_open(nv_plane *plane, int fd, uint32_t volume_number, const nv_connection_params *params,
                       const void *early, uint64_t early_length, uint64_t token, uint32_t *number)
{
    struct nv_volume *volume;
    struct nv_conn *conn = NULL;
    int error = nv_connection_aim(plane, NULL, volume_number, params, &volume);

    if (!error && early_length > NV_CHUNK_CAPACITY)
        error = nv_fail(E2BIG, "%" PRIu64 " early bytes, above %u", early_length, NV_CHUNK_CAPACITY);
    if (!error)
        error = nv_connection_new(plane, home_of(plane, volume), fd, token, &conn);
    if (error)
        return error;
    nv_conn_set_params(conn, volume, params);
    if (early_length > 0)
        nv_conn_preload(conn, early, (uint32_t)early_length);
    nv_connection_bind(conn, volume);
    *number = conn->id;
    nv_connection_launch(plane, conn);
    return 0;
}

int nv_connection_close(nv_plane *plane, uint32_t number)
{
    struct nv_conn *conn = nv_table_get(&plane->connections, number);

    if (!conn)
        return nv_fail(ENOENT, "connection %u is not open", number);
    if (conn->close_sent)
        return 0;
    conn->close_sent = true;
    conn->close_message.run = nv_conn_closes;
    nv_reactor_send(conn->reactor, &conn->close_message);
    return 0;
}
