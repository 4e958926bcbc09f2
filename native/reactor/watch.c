/*
 * The C API's looking on (nbdvvol.cdef.h): what objects have counted, and traces of single requests. Front-thread only;
 * nothing here waits for a reactor.
 */
#include <errno.h>
#include <inttypes.h>

#include "limits.h"
#include "error.h"
#include "reactor/plane.h"

static void add_counters(nv_object_stats_t *sum, struct nv_object_counters *counters)
{
    sum->reads += atomic_load(&counters->kinds[NV_PIECE_READ].pieces);
    sum->writes += atomic_load(&counters->kinds[NV_PIECE_WRITE].pieces);
    sum->zeroes += atomic_load(&counters->kinds[NV_PIECE_ZERO].pieces);
    sum->trims += atomic_load(&counters->kinds[NV_PIECE_TRIM].pieces);
    sum->others += atomic_load(&counters->kinds[NV_PIECE_EXTENTS].pieces) +
                   atomic_load(&counters->kinds[NV_PIECE_PREFETCH].pieces);
    sum->read_bytes += atomic_load(&counters->kinds[NV_PIECE_READ].bytes);
    sum->write_bytes += atomic_load(&counters->kinds[NV_PIECE_WRITE].bytes);
    sum->errors += atomic_load(&counters->errors);
}

int nv_object_stats(nv_plane *plane, uint32_t number, nv_object_stats_t *out)
{
    struct nv_object *object = nv_table_get(&plane->objects, number);

    if (!object)
        return nv_fail(ENOENT, "object %u is not open", number);
    *out = (nv_object_stats_t){.syncs = atomic_load(&object->sync.syncs),
                               .errors = atomic_load(&object->sync.failures)};
    for (uint32_t i = 0; i < plane->config.reactors; i++)
        add_counters(out, &object->counters[i]);
    return 0;
}

/* --- traces --- */

static void ask_all(nv_plane *plane, uint64_t session, uint32_t every)
{
    plane->trace = session;
    for (uint32_t i = 0; i < plane->config.reactors; i++) {
        struct nv_reactor *reactor = nv_plane_reactor(plane, i);
        if (nv_recorder_ask(&reactor->recorder, session, every))
            nv_reactor_send(reactor, &reactor->recorder.message);
    }
}

int nv_trace_begin(nv_plane *plane, uint32_t volume, uint32_t every, uint64_t *now_ns)
{
    if (plane->trace)
        return nv_fail(EBUSY, "volume %u is being traced; one trace at a time is possible", (uint32_t)plane->trace);
    if (!nv_table_get(&plane->volumes, volume))
        return nv_fail(ENOENT, "volume %u is not open", volume);
    if (every < 1 || every > NV_TRACE_EVERY_MAX)
        return nv_fail(EINVAL, "one of %u requests; 1..%u are possible", every, NV_TRACE_EVERY_MAX);
    for (uint32_t i = 0; i < plane->config.reactors; i++)
        nv_recorder_clear(&nv_plane_reactor(plane, i)->recorder);
    *now_ns = nv_io_now_ns(nv_plane_reactor(plane, 0)->io);
    ask_all(plane, (uint64_t)++plane->traces << 32 | volume, every);
    return 0;
}

int nv_trace_read(nv_plane *plane, uint32_t reactor, nv_trace_record *out, int max, nv_trace_state *state)
{
    struct nv_recorder *recorder;

    *state = (nv_trace_state){0};
    if (!plane->trace)
        return nv_fail(ENOENT, "nothing is being traced");
    if (reactor >= plane->config.reactors)
        return nv_fail(EINVAL, "reactor %u of %u", reactor, plane->config.reactors);
    recorder = &nv_plane_reactor(plane, reactor)->recorder;
    state->recording = atomic_load(&recorder->recording) == plane->trace;
    if (state->recording) /* else what it dropped was another trace's */
        state->dropped = atomic_load(&recorder->dropped);
    return nv_recorder_take(recorder, plane->trace, out, max);
}

int nv_trace_end(nv_plane *plane)
{
    if (!plane->trace)
        return nv_fail(ENOENT, "nothing is being traced");
    ask_all(plane, 0, 1);
    return 0;
}
