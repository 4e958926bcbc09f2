/*
 * The C API of remote exports and their links (nbdvvol.cdef.h): checks the caller's words, keeps the table of links,
 * sends messages to the remote's home. Front-thread only; nothing here waits.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/nbd.h"
#include "error.h"
#include "reactor/plane.h"

struct wish {
    struct nv_message message;
    struct nv_remote *remote;
    bool give_up;
};

static int check_config(const nv_remote_config *config)
{
    if (config->align == 0 || (config->align & (config->align - 1)) || config->align > NV_BLOCK_MIN_MAX)
        return nv_fail(EINVAL, "minimum block %u is not a power of two of 1..%u", config->align, NV_BLOCK_MIN_MAX);
    if (config->flags & ~(uint32_t)(NV_REMOTE_READ_ONLY | NV_REMOTE_WRITE_THROUGH | NV_REMOTE_FLUSH_FIRST))
        return nv_fail(EINVAL, "remote flags 0x%x are unknown", config->flags);
    if (config->timeout_ms == 0 || config->timeout_ms > NV_REMOTE_TIMEOUT_MAX_MS)
        return nv_fail(EINVAL, "a time-out of %u ms; 1..%u are possible", config->timeout_ms,
                       NV_REMOTE_TIMEOUT_MAX_MS);
    if (config->hold_ms > NV_REMOTE_HOLD_MAX_MS)
        return nv_fail(EINVAL, "holding for %u ms; at most %u are possible", config->hold_ms, NV_REMOTE_HOLD_MAX_MS);
    if (config->size > NV_SIZE_MAX)
        return nv_fail(E2BIG, "an export of %" PRIu64 " bytes is above %llu", config->size, NV_SIZE_MAX);
    return 0;
}

int nv_remote_open(nv_plane *plane, const nv_remote_config *config, uint32_t *number)
{
    struct nv_remote *remote;
    int error = check_config(config);

    if (error)
        return error;
    remote = nv_remote_create(plane, nv_plane_reactor(plane, plane->objects.next % plane->config.reactors), config);
    if (!remote)
        return nv_fail(ENOMEM, "no memory for a remote export");
    if (nv_table_add(&plane->objects, &remote->object, &remote->object.id) != 0) {
        nv_remote_free(remote);
        return nv_fail(ENOSPC, "%u objects are open, the limit", NV_OBJECTS_MAX);
    }
    nv_sync_init(&remote->object.sync, remote->object.id, nv_remote_sync);
    *number = remote->object.id;
    remote->open_message.run = nv_remote_opens;
    nv_reactor_send(remote->home, &remote->open_message);
    return 0;
}

static int find_remote(nv_plane *plane, uint32_t number, struct nv_remote **out)
{
    struct nv_object *object = nv_table_get(&plane->objects, number);

    if (!object)
        return nv_fail(ENOENT, "object %u is not open", number);
    if (object->kind != NV_KIND_NBD)
        return nv_fail(EINVAL, "object %u is no remote export", number);
    *out = nv_remote_of(object);
    return object->closing ? nv_fail(EALREADY, "object %u is being closed", number) : 0;
}

static void wish_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct wish *wish = (struct wish *)((char *)message - offsetof(struct wish, message));

    (void)reactor;
    nv_remote_gives_up(wish->remote, wish->give_up);
    free(wish);
}

int nv_remote_give_up(nv_plane *plane, uint32_t number, int yes)
{
    struct nv_remote *remote;
    struct wish *wish;
    int error = find_remote(plane, number, &remote);

    if (error)
        return error;
    wish = calloc(1, sizeof *wish);
    if (!wish)
        return nv_fail(ENOMEM, "no memory for a message");
    *wish = (struct wish){.message.run = wish_arrives, .remote = remote, .give_up = yes != 0};
    nv_reactor_send(remote->home, &wish->message);
    return 0;
}

int nv_remote_stats(nv_plane *plane, uint32_t number, nv_remote_stats_t *out)
{
    struct nv_object *object = nv_table_get(&plane->objects, number);
    const struct nv_remote_counters *counters;
    uint64_t answered, again, asked;

    if (!object || object->kind != NV_KIND_NBD)
        return nv_fail(ENOENT, "object %u is no open remote export", number);
    counters = &nv_remote_of(object)->counters;
    answered = atomic_load(&counters->answered); /* before `asked`: each of them was asked first, so none is missing there */
    again = atomic_load(&counters->again);
    asked = atomic_load(&counters->asked);
    *out = (nv_remote_stats_t){
        .links = atomic_load(&counters->serving),
        .draining = atomic_load(&counters->draining),
        .in_flight = asked - answered - again,
        .waiting = atomic_load(&counters->waiting),
        .asked = asked,
        .answered = answered,
        .errors = atomic_load(&counters->errors),
        .again = again,
        .lost = atomic_load(&counters->lost),
        .read_bytes = atomic_load(&counters->read_bytes),
        .write_bytes = atomic_load(&counters->write_bytes),
        .owed = atomic_load(&counters->owed),
        .unsure = atomic_load(&counters->unsure),
    };
    return 0;
}

/* ---- links ---- */

/* Is it still the export that was opened? A scratch object of size 0 asks for nothing. */
static int check_export(const struct nv_object *object, const nv_link_params *params)
{
    const uint64_t size = atomic_load(&object->size);

    if (params->size < size)
        return nv_fail(EINVAL, "the export has %" PRIu64 " bytes now, not %" PRIu64, params->size, size);
    if (size > 0 && (params->align == 0 || object->align % params->align))
        return nv_fail(EINVAL, "the server wants blocks of %u bytes, not of %u", params->align, object->align);
    if (!(object->flags & NV_OBJECT_READ_ONLY) && (params->tflags & NBD_FLAG_READ_ONLY))
        return nv_fail(EINVAL, "the server offers the export for reading only");
    return 0;
}

int nv_link_check_params(const struct nv_remote *remote, const nv_link_params *params)
{
    const int error = check_export(&remote->object, params);

    if (error)
        return error;
    if (params->flags & ~(uint32_t)(NV_CONN_STRUCTURED | NV_CONN_EXTENDED))
        return nv_fail(EINVAL, "link flags 0x%x are unknown", params->flags);
    if (params->payload_max < remote->object.align || params->payload_max & (remote->object.align - 1))
        return nv_fail(EINVAL, "a maximum payload of %u is no multiple of the block %u", params->payload_max,
                       remote->object.align);
    if (params->has_allocation && !(params->flags & (NV_CONN_STRUCTURED | NV_CONN_EXTENDED)))
        return nv_fail(EINVAL, "block status needs structured replies");
    if (!(remote->object.flags & NV_OBJECT_READ_ONLY) && !(params->tflags & NBD_FLAG_SEND_FLUSH) &&
        !(remote->write_through && (params->tflags & NBD_FLAG_SEND_FUA)))
        return nv_fail(EINVAL, "the server offers no FLUSH: only write-through, by FUA, could be called durable");
    return 0;
}

int nv_link_new(nv_plane *plane, uint32_t object, int fd, uint64_t token, struct nv_link **out)
{
    struct nv_remote *remote;
    struct nv_link *link;
    int error = find_remote(plane, object, &remote);

    if (!error && remote->open_links == NV_LINKS_PER_REMOTE)
        error = nv_fail(ENOSPC, "object %u has %u links, the limit", object, NV_LINKS_PER_REMOTE);
    if (error)
        return error;
    link = nv_link_create(remote, -1);
    if (!link)
        return nv_fail(ENOMEM, "no address space for a link");
    if (nv_table_add(&plane->links, link, &link->id) != 0) {
        nv_link_free(link);
        return nv_fail(ENOSPC, "%u links are open, the limit", NV_LINKS_MAX);
    }
    link->handle = nv_io_open_socket(fd);
    if (link->handle < 0) {
        error = nv_fail(-link->handle, "descriptor %d is not a usable stream socket: %s", fd, strerror(-link->handle));
        nv_table_remove(&plane->links, link->id);
        nv_link_free(link);
        return error;
    }
    link->ended.event.token = token;
    *out = link;
    return 0;
}

void nv_link_launch(struct nv_link *link)
{
    link->remote->open_links++;
    link->message.run = nv_link_opens;
    nv_reactor_send(link->reactor, &link->message); /* from here on it may end at any moment */
}

int nv_link_open(nv_plane *plane, uint32_t object, int fd, const nv_link_params *params, uint64_t token,
                 uint32_t *number)
{
    struct nv_remote *remote;
    struct nv_link *link = NULL;
    int error = find_remote(plane, object, &remote);

    if (!error)
        error = nv_link_check_params(remote, params);
    if (!error)
        error = nv_link_new(plane, object, fd, token, &link);
    if (error)
        return error;
    link->params = *params;
    *number = link->id;
    nv_link_launch(link);
    return 0;
}

int nv_link_find(nv_plane *plane, uint32_t number, struct nv_link **out)
{
    *out = nv_table_get(&plane->links, number);
    return *out ? 0 : nv_fail(ENOENT, "link %u is not open", number);
}

int nv_link_close(nv_plane *plane, uint32_t number)
{
    struct nv_link *link;
    int error = nv_link_find(plane, number, &link);

    if (error || link->close_sent || link->told)
        return error;
    link->close_sent = true;
    link->close_message.run = nv_link_closes;
    nv_reactor_send(link->reactor, &link->close_message);
    return 0;
}

int nv_link_forget(nv_plane *plane, uint32_t number, char *reason, uint64_t size)
{
    struct nv_link *link;
    int error = nv_link_find(plane, number, &link);

    if (!error && !link->told)
        error = nv_fail(EBUSY, "link %u has not ended", number);
    if (error)
        return error;
    if (size > 0)
        snprintf(reason, size, "%s", link->reason);
    nv_table_remove(&plane->links, number);
    link->message.run = nv_link_forgets; /* behind a wish to close it that may be on its way */
    nv_reactor_send(link->reactor, &link->message);
    return 0;
}

/* ---- the end ---- */

static void object_closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_object *object = (struct nv_object *)((char *)message - offsetof(struct nv_object, close_message));

    nv_events_raise(&reactor->events, &object->closed);
}

static void remote_closes(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_object *object = (struct nv_object *)((char *)message - offsetof(struct nv_object, close_message));

    (void)reactor;
    nv_remote_closes(nv_remote_of(object));
}

void nv_remote_closed(struct nv_remote *remote)
{
    remote->object.close_message.run = object_closes;
    nv_reactor_send(nv_plane_reactor(remote->plane, 0), &remote->object.close_message); /* behind its fault events */
}

static void close_if_unlinked(struct nv_remote *remote)
{
    if (!remote->object.closing || remote->open_links > 0)
        return;
    remote->object.close_message.run = remote_closes;
    nv_reactor_send(remote->home, &remote->object.close_message);
}

static void remote_ends(struct nv_reactor *reactor, struct nv_message *message)
{
    (void)reactor;
    nv_remote_ends((struct nv_remote *)((char *)message - offsetof(struct nv_remote, end_message)));
}

void nv_remote_close(struct nv_remote *remote)
{
    if (remote->open_links > 0) {
        remote->end_message.run = remote_ends;
        nv_reactor_send(remote->home, &remote->end_message);
    }
    close_if_unlinked(remote);
}

void nv_link_told(struct nv_link *link)
{
    assert(!link->told && link->remote->open_links > 0);
    link->told = true;
    link->remote->open_links--;
    if (!link->remote->plane->stopped)
        close_if_unlinked(link->remote);
}
