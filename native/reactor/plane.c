/*
 * The plane's life: build, threads, events, stop, free (see plane.h). What the front thread can name is freed here, when
 * the event has come that says the reactors let go of it. Front-thread only, except thread_main.
 */
#include "reactor/plane.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "backend/nbd.h"
#include "nbd/session.h"
#include "error.h"
#include "reactor/job.h"
#include "volume/desc.h"
#include "volume/logged.h"
#include "volume/mirror.h"

#define EVENTS_AT_ONCE 64

struct nv_stop {
    struct nv_message message;
};

int nv_api_version(void)
{
    return NV_API_VERSION;
}

static int check_config(const nv_plane_config *config)
{
    if (config->reactors < 1 || config->reactors > NV_REACTORS_MAX)
        return nv_fail(EINVAL, "%u reactors; 1..%u are possible", config->reactors, NV_REACTORS_MAX);
    if (config->spin_us > NV_SPIN_MAX_US)
        return nv_fail(EINVAL, "a busy wait of %u us is above %u us", config->spin_us, NV_SPIN_MAX_US);
    if (config->pool_bytes < NV_POOL_MIN || config->pool_bytes > (1ull << 40))
        return nv_fail(EINVAL, "a pool of %llu bytes; at least %u and at most 1 TiB are possible",
                       (unsigned long long)config->pool_bytes, NV_POOL_MIN);
    if (config->connections_max < 1 || config->connections_max > NV_CONNECTIONS_MAX)
        return nv_fail(EINVAL, "%u connections; 1..%u are possible", config->connections_max, NV_CONNECTIONS_MAX);
    if (config->cache_bytes && (config->cache_bytes < (uint64_t)NV_CACHE_FRAMES_MIN * NV_CACHE_BLOCK ||
                                config->cache_bytes > (uint64_t)NV_CACHE_FRAMES_MAX * NV_CACHE_BLOCK))
        return nv_fail(EINVAL, "a cache of %llu bytes; at least %u are possible", (unsigned long long)config->cache_bytes,
                       NV_CACHE_FRAMES_MIN * NV_CACHE_BLOCK);
    return 0;
}

static int setup_reactor(struct nv_reactor *reactor)
{
    const nv_plane_config *config = &reactor->plane->config;
    const struct nv_io_config io = {
        .entries = NV_RING_ENTRIES,
        .completions = NV_RING_COMPLETIONS,
        .cpu = config->cpu_first < 0 ? -1 : config->cpu_first + (int)reactor->index,
        .io_flusher = config->flags & NV_PLANE_IO_FLUSHER,
    };
    struct nv_io_features features;
    int error = nv_reactor_setup(reactor, &io, &features, config->pool_bytes);

    if (error)
        return error;
    nv_features *seen = &reactor->plane->features;
    seen->defer_taskrun = features.defer_taskrun;
    seen->registered_ring = features.registered_ring;
    seen->registered_files = features.registered_files;
    seen->send_vectorized = features.send_vectorized;
    seen->io_flusher = features.io_flusher;
    return 0;
}

static void *thread_main(void *argument)
{
    struct nv_reactor *reactor = argument;
    struct nv_plane *plane = reactor->plane;
    int error;

    pthread_mutex_lock(&plane->start_lock); /* one at a time: they fill in the same features */
    error = setup_reactor(reactor);
    if (error)
        plane->start_error = error;
    plane->started++;
    pthread_cond_broadcast(&plane->start_changed);
    pthread_mutex_unlock(&plane->start_lock);
    if (error)
        return NULL;
    nv_reactor_loop(reactor);
    pthread_mutex_lock(&plane->start_lock); /* nobody may wake a port that is gone: leave together */
    plane->finished++;
    pthread_cond_broadcast(&plane->start_changed);
    while (!plane->released || (plane->finished < plane->config.reactors && !plane->start_error))
        pthread_cond_wait(&plane->start_changed, &plane->start_lock);
    pthread_mutex_unlock(&plane->start_lock);
    nv_reactor_teardown(reactor);
    return NULL;
}

static int start_threads(struct nv_plane *plane)
{
    static const int own_faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL}; /* blocked, they would end the process unheard */
    sigset_t all, before;
    uint32_t wanted = 0;

    sigfillset(&all);
    for (size_t i = 0; i < sizeof own_faults / sizeof own_faults[0]; i++)
        sigdelset(&all, own_faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals from outside are the front's */
    for (; wanted < plane->config.reactors; wanted++) {
        struct nv_reactor *reactor = &plane->reactors[wanted];
        int error = pthread_create(&reactor->thread, NULL, thread_main, reactor);
        if (error) {
            plane->start_error = -error;
            break;
        }
        reactor->threaded = true;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_lock(&plane->start_lock);
    while (plane->started < wanted)
        pthread_cond_wait(&plane->start_changed, &plane->start_lock);
    pthread_mutex_unlock(&plane->start_lock);
    return plane->start_error;
}

static bool make_table(struct nv_table *table, uint32_t capacity)
{
    table->slots = calloc(capacity, sizeof *table->slots);
    table->capacity = capacity;
    return table->slots != NULL;
}

/*
 * Locking counts against RLIMIT_MEMLOCK for every later mapping, so it is done only where no limit applies: whether
 * the privilege lifts it is found out by locking (on fault: no page is touched) one page more than the limit allows.
 */
static bool may_lock_all(void)
{
    struct rlimit limit;
    void *probe;
    size_t size;
    bool allowed;

    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0)
        return false;
    if (limit.rlim_cur == RLIM_INFINITY)
        return true;
    size = (size_t)limit.rlim_cur / NV_POOL_PAGE * NV_POOL_PAGE + NV_POOL_PAGE;
    probe = nv_pages_map(size);
    if (!probe)
        return false;
    allowed = mlock2(probe, size, MLOCK_ONFAULT) == 0;
    nv_pages_unmap(probe, size);
    return allowed;
}

static bool lock_memory(void)
{
    return may_lock_all() && mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0;
}

static int make_cache(struct nv_plane *plane)
{
    const uint64_t bytes = plane->config.cache_bytes, quarter = bytes / NV_CACHE_BLOCK / 4;
    const uint32_t reactors = plane->config.reactors;
    int error = nv_cache_create(bytes, NV_VOLUMES_MAX + 1, reactors > 1 ? reactors * NV_CACHE_SHARDS_A_REACTOR : 1,
                                &plane->cache);

    for (uint32_t i = 0; !error && i < reactors; i++) {
        struct nv_reactor *reactor = &plane->reactors[i];
        reactor->pins_max = (uint32_t)(quarter / reactors);
        reactor->want_max = bytes / 2 < NV_WANT_MAX ? bytes / 2 : NV_WANT_MAX;
        error = nv_ahead_setup(reactor);
    }
    return error;
}

static int build(struct nv_plane *plane)
{
    const uint32_t count = plane->config.reactors;

    plane->reactors = aligned_alloc(64, count * sizeof(struct nv_reactor));
    if (plane->reactors)
        memset(plane->reactors, 0, count * sizeof(struct nv_reactor)); /* whatever fails next, it can be taken down */
    plane->stops = calloc(count, sizeof *plane->stops);
    if (!plane->reactors || !plane->stops || !make_table(&plane->objects, NV_OBJECTS_MAX) ||
        !make_table(&plane->volumes, NV_VOLUMES_MAX) ||
        !make_table(&plane->connections, plane->config.connections_max) || !make_table(&plane->links, NV_LINKS_MAX))
        return -ENOMEM;
    plane->bell = nv_bell_create();
    if (plane->bell < 0)
        return plane->bell;
    for (uint32_t i = 0; i < count; i++) {
        struct nv_reactor *reactor = &plane->reactors[i];
        reactor->index = i;
        reactor->plane = plane;
        reactor->spin_max_ns = plane->config.spin_us * 1000ull;
        nv_events_init(&reactor->events, plane->bell);
        if (nv_recorder_init(&reactor->recorder) != 0)
            return -ENOMEM;
    }
    if (plane->config.cache_bytes) {
        int error = make_cache(plane);
        if (error)
            return error;
    }
    if (plane->config.flags & NV_PLANE_LOCK_MEMORY)
        plane->features.memory_locked = lock_memory();
    if (plane->threads)
        return start_threads(plane);
    for (uint32_t i = 0; i < count; i++) {
        int error = setup_reactor(&plane->reactors[i]);
        if (error)
            return error;
        plane->started++;
    }
    return 0;
}

int nv_plane_build(const nv_plane_config *config, bool threads, nv_plane **out)
{
    struct nv_plane *plane;
    int error = check_config(config);

    if (error)
        return error;
    plane = calloc(1, sizeof *plane);
    if (!plane)
        return nv_fail(ENOMEM, "no memory for the data plane");
    plane->config = *config;
    plane->threads = threads;
    plane->bell = -1;
    pthread_mutex_init(&plane->start_lock, NULL);
    pthread_cond_init(&plane->start_changed, NULL);
    error = build(plane);
    if (error) {
        nv_plane_stop(plane);
        nv_plane_free(plane);
        return nv_fail(-error, "the data plane did not start: %s%s", strerror(-error),
                       error == -ENOSYS || error == -EPERM ? " (io_uring is missing or forbidden here)" : "");
    }
    *out = plane;
    return 0;
}

nv_plane *nv_plane_create(const nv_plane_config *config)
{
    nv_plane *plane = NULL;
    int error = nv_plane_build(config, true, &plane);

    errno = -error;
    return plane;
}

/* --- events --- */

void nv_object_unuse(struct nv_map *map)
{
    for (uint32_t i = 0; i < map->object_count; i++) {
        assert(map->objects[i]->users > 0);
        map->objects[i]->users--;
    }
    nv_map_free(map);
}

void nv_volume_forget(nv_plane *plane, struct nv_volume *volume)
{
    (void)plane;
    if (!volume->gone || volume->changes > 0 || atomic_load(&volume->connections) > 0)
        return; /* events of another ring are still to come */
    if (volume->mirror)
        nv_mirror_free(volume->mirror);
    nv_logged_free_all(volume);
    nv_cached_close(volume);
    nv_object_unuse(volume->latest);
    nv_range_table_free(&volume->ranges);
    nv_range_table_free(&volume->below);
    free(volume->limits);
    free(volume);
}

static void connection_ended(nv_plane *plane, struct nv_conn *conn)
{
    struct nv_volume *volume = conn->bound;

    nv_table_remove(&plane->connections, conn->id);
    plane->assigned[conn->reactor->index]--;
    if (plane->stopped) {
        nv_conn_free(conn);
    } else { /* behind any message that may still be on its way to it */
        conn->open_message.run = nv_conn_frees;
        nv_reactor_send(conn->reactor, &conn->open_message);
    }
    if (volume) {
        atomic_fetch_sub(&volume->connections, 1);
        nv_volume_forget(plane, volume);
    }
}

static void volume_changed(nv_plane *plane, struct nv_volume_change *change)
{
    struct nv_volume *volume = change->volume;

    nv_cached_map_changed(volume, change->from, change->to);
    volume->changes--;
    volume->map_changes--;
    nv_object_unuse(change->from);
    free(change);
    nv_volume_forget(plane, volume);
}

static void volume_qos_changed(nv_plane *plane, struct nv_qos_change *change)
{
    struct nv_volume *volume = change->volume;

    volume->changes--;
    free(change->from);
    free(change);
    nv_volume_forget(plane, volume);
}

static void object_closed(nv_plane *plane, struct nv_object *object)
{
    nv_table_remove(&plane->objects, object->id);
    nv_object_free(object);
}

static void consume(nv_plane *plane, const struct nv_event_record *record)
{
    struct nv_volume *volume;
    struct nv_job *job;

    switch (record->event.kind) {
    case NV_EVENT_CONNECTION_CLOSED:
        connection_ended(plane, record->subject);
        break;
    case NV_EVENT_VOLUME_CHANGED:
        volume_changed(plane, record->subject);
        break;
    case NV_EVENT_VOLUME_QOS:
        volume_qos_changed(plane, record->subject);
        break;
    case NV_EVENT_VOLUME_CACHE:
        nv_cached_policy_changed(record->subject);
        break;
    case NV_EVENT_VOLUME_CLOSED:
        volume = record->subject;
        volume->gone = true;
        nv_table_remove(&plane->volumes, volume->id);
        nv_volume_forget(plane, volume);
        break;
    case NV_EVENT_OBJECT_CLOSED:
        object_closed(plane, record->subject);
        break;
    case NV_EVENT_LINK_LOST:
        nv_link_told(record->subject);
        break;
    case NV_EVENT_JOB_DONE:
        job = record->subject;
        job->object->users--;
        nv_job_free(job);
        break;
    case NV_EVENT_LOG_OPENED:
        nv_logged_opened(record->subject, record->event.args[0]);
        break;
    case NV_EVENT_LOG_RESTS:
        nv_logged_rests(record->subject);
        break;
    case NV_EVENT_LOG_DRAINED:
        nv_logged_drained(record->subject);
        break;
    case NV_EVENT_LOG_ATTACHED:
    case NV_EVENT_LOG_DETACHED:
        nv_switch_over(record->subject, record->event.result);
        break;
    case NV_EVENT_LEG_CHANGED:
    case NV_EVENT_VERIFY_DONE:
        free(record->subject); /* the command, if it was one */
        break;
    default:
        break;
    }
}

int nv_plane_event_fd(nv_plane *plane)
{
    return plane->bell;
}

int nv_plane_events(nv_plane *plane, nv_event *out, int max)
{
    struct nv_event_record records[EVENTS_AT_ONCE];
    int count = 0;

    nv_bell_silence(plane->bell);
    for (uint32_t i = 0; i < plane->config.reactors && count < max; i++) {
        struct nv_events *events = &plane->reactors[i].events;
        int room = max - count < EVENTS_AT_ONCE ? max - count : EVENTS_AT_ONCE;
        int got = nv_events_take(events, records, room);
        for (int j = 0; j < got; j++) {
            consume(plane, &records[j]);
            records[j].event.reactor = i;
            out[count++] = records[j].event;
        }
        if (got == room) /* there may be more: be called again */
            nv_bell_ring(plane->bell);
        if (got > 0 && !plane->stopped && atomic_exchange(&events->starved, 0))
            nv_io_wake(plane->reactors[i].io);
    }
    return count;
}

int nv_plane_features(nv_plane *plane, nv_features *out)
{
    *out = plane->features;
    return 0;
}

int nv_plane_reactor_stats(nv_plane *plane, uint32_t reactor, nv_reactor_stats *out)
{
    struct nv_reactor_counters *counters;

    if (reactor >= plane->config.reactors)
        return nv_fail(EINVAL, "reactor %u of %u", reactor, plane->config.reactors);
    counters = &plane->reactors[reactor].counters;
    *out = (nv_reactor_stats){
        .enters = atomic_load(&counters->enters),
        .sleeps = atomic_load(&counters->sleeps),
        .requests = atomic_load(&counters->requests),
        .batches = atomic_load(&counters->batches),
        .submissions = atomic_load(&counters->submissions),
        .copies_bytes = atomic_load(&counters->copies_bytes),
        .connections = atomic_load(&counters->connections),
        .pool_free_bytes = atomic_load(&counters->pool_free_bytes),
        .pool_waits = atomic_load(&counters->pool_waits),
    };
    return 0;
}

struct nv_reactor *nv_plane_least_loaded(nv_plane *plane)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < plane->config.reactors; i++)
        if (plane->assigned[i] < plane->assigned[best])
            best = i;
    return &plane->reactors[best];
}

/* --- the end --- */

static void stops(struct nv_reactor *reactor, struct nv_message *message)
{
    (void)message;
    reactor->stopping = true;
    for (struct nv_conn *conn = reactor->connections; conn; conn = conn->next)
        nv_conn_close(conn, -ESHUTDOWN);
    for (struct nv_remote *remote = reactor->remotes; remote; remote = remote->next)
        nv_remote_stops(remote);
}

static void ends(struct nv_reactor *reactor, struct nv_message *message)
{
    (void)message;
    reactor->ending = true;
    for (struct nv_remote *remote = reactor->remotes; remote; remote = remote->next)
        nv_remote_ends(remote);
}

void nv_plane_drained(nv_plane *plane)
{
    if (atomic_fetch_add(&plane->drained, 1) + 1 < plane->stopping)
        return;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        plane->stops[i].message.run = ends; /* each has run it for the first time: it is free again */
        if (plane->reactors[i].io)
            nv_reactor_send(&plane->reactors[i], &plane->stops[i].message);
    }
}

/* Mirrors end by themselves, with nothing left to reconcile where that can be had; logs with nothing under way. */
static void close_layered(nv_plane *plane)
{
    for (uint32_t i = 1; i <= plane->volumes.capacity && plane->volumes.used; i++) {
        const struct nv_volume *volume = nv_table_get(&plane->volumes, i);
        if (volume && (volume->mirror || volume->logged) && !volume->closing)
            (void)nv_volume_close(plane, i, 0);
    }
}

void nv_plane_stop(nv_plane *plane)
{
    if (!plane->reactors)
        return;
    close_layered(plane);
    for (uint32_t i = 0; i < plane->config.reactors; i++)
        plane->stopping += plane->reactors[i].io != NULL; /* before the first can have drained */
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        plane->stops[i].message.run = stops;
        if (plane->reactors[i].io)
            nv_reactor_send(&plane->reactors[i], &plane->stops[i].message);
    }
    pthread_mutex_lock(&plane->start_lock);
    plane->released = true; /* from here on the front wakes no port any more */
    pthread_cond_broadcast(&plane->start_changed);
    pthread_mutex_unlock(&plane->start_lock);
}

static void free_tables(nv_plane *plane)
{
    for (uint32_t i = 1; i <= plane->connections.capacity && plane->connections.used; i++)
        if (nv_table_get(&plane->connections, i))
            connection_ended(plane, nv_table_get(&plane->connections, i));
    for (uint32_t i = 1; i <= plane->volumes.capacity && plane->volumes.used; i++) {
        struct nv_volume *volume = nv_table_get(&plane->volumes, i);
        if (!volume)
            continue;
        nv_table_remove(&plane->volumes, i);
        volume->gone = true;
        nv_volume_forget(plane, volume);
    }
    for (uint32_t i = 1; i <= plane->links.capacity && plane->links.used; i++)
        if (nv_table_get(&plane->links, i)) {
            nv_link_free(nv_table_get(&plane->links, i));
            nv_table_remove(&plane->links, i);
        }
    for (uint32_t i = 1; i <= plane->objects.capacity && plane->objects.used; i++)
        if (nv_table_get(&plane->objects, i))
            object_closed(plane, nv_table_get(&plane->objects, i));
    free(plane->connections.slots);
    free(plane->links.slots);
    free(plane->volumes.slots);
    free(plane->objects.slots);
}

/* Events nobody will read any more: what they hand over is freed. */
static void drop_events(nv_plane *plane)
{
    struct nv_event_record record;

    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        struct nv_events *events = &plane->reactors[i].events;
        while (nv_events_take(events, &record, 1) == 1)
            consume(plane, &record);
        while (events->waiting) {
            struct nv_event_slot *slot = events->waiting;
            events->waiting = slot->next;
            record = (struct nv_event_record){slot->event, slot->subject};
            consume(plane, &record);
        }
    }
}

static void free_of_reactor(struct nv_reactor *reactor)
{
    nv_recorder_free(&reactor->recorder);
    nv_ahead_teardown(reactor);
}

void nv_plane_free(nv_plane *plane)
{
    if (plane->reactors) {
        for (uint32_t i = 0; i < plane->config.reactors; i++) {
            if (plane->reactors[i].threaded)
                pthread_join(plane->reactors[i].thread, NULL);
            else if (!plane->threads && i < plane->started)
                nv_reactor_teardown(&plane->reactors[i]);
        }
        plane->stopped = true;
        drop_events(plane);
    }
    free_tables(plane);
    if (plane->features.memory_locked)
        munlockall();
    if (plane->bell >= 0)
        nv_bell_destroy(plane->bell);
    pthread_mutex_destroy(&plane->start_lock);
    pthread_cond_destroy(&plane->start_changed);
    for (uint32_t i = 0; plane->reactors && i < plane->config.reactors; i++)
        free_of_reactor(&plane->reactors[i]);
    nv_cache_free(plane->cache);
    free(plane->stops);
    free(plane->reactors);
    free(plane);
}

void nv_plane_destroy(nv_plane *plane)
{
    nv_plane_stop(plane);
    nv_plane_free(plane);
}
