/*
 * See onlooker.h. It has a chance of its own, so that whether it looks changes nothing of what is looked at: a seed is
 * the same run with and without it, as far as clients and disks can tell.
 */
#include "sim/onlooker.h"

#include <assert.h>
#include <stdlib.h>

#include "io/io.h"
#include "io/io_sim.h"
#include "sim/random.h"

#define AT_ONCE 16

struct seen {
    struct onlooker_request request;
    uint64_t sent_ns;
    bool covered;           /* sent while every reactor recorded every request */
    bool answered, recorded, excused;
    int error;
};

struct onlooker {
    struct sim_random random;
    nv_plane *plane;
    uint32_t volume, reactors;
    bool tracing;
    bool everything;        /* the trace leaves no request out */
    uint64_t began_ns;
    struct seen *seen;
    uint32_t count, capacity;
};

struct onlooker *onlooker_create(uint64_t seed)
{
    struct onlooker *onlooker = calloc(1, sizeof *onlooker);

    assert(onlooker);
    onlooker->random.state = seed ^ 0x6f6e6c6f6f6b6572ull;
    return onlooker;
}

void onlooker_destroy(struct onlooker *onlooker)
{
    free(onlooker->seen);
    free(onlooker);
}

void onlooker_boot(struct onlooker *onlooker, nv_plane *plane, uint32_t volume, uint32_t reactors)
{
    onlooker->plane = plane;
    onlooker->volume = volume;
    onlooker->reactors = reactors;
    onlooker->tracing = false;
    onlooker->count = 0;
}

static uint64_t now_ns(void)
{
    return nv_io_now_ns(NULL);
}

static struct seen *find(struct onlooker *onlooker, uint64_t cookie)
{
    for (uint32_t i = onlooker->count; i > 0; i--)
        if (onlooker->seen[i - 1].request.cookie == cookie)
            return &onlooker->seen[i - 1];
    return NULL;
}

/* ---- what clients say ---- */

static bool recording(struct onlooker *onlooker)
{
    nv_trace_state state;

    for (uint32_t i = 0; onlooker->tracing && i < onlooker->reactors; i++)
        if (nv_trace_read(onlooker->plane, i, NULL, 0, &state) != 0 || !state.recording)
            return false;
    return onlooker->tracing;
}

void onlooker_sent(struct onlooker *onlooker, const struct onlooker_request *request)
{
    if (!onlooker)
        return;
    if (onlooker->count == onlooker->capacity) {
        onlooker->capacity = onlooker->capacity ? 2 * onlooker->capacity : 256;
        onlooker->seen = realloc(onlooker->seen, onlooker->capacity * sizeof *onlooker->seen);
        assert(onlooker->seen);
    }
    onlooker->seen[onlooker->count++] = (struct seen){
        .request = *request, .sent_ns = now_ns(), .covered = onlooker->everything && recording(onlooker)};
}

void onlooker_answered(struct onlooker *onlooker, uint64_t cookie, int error)
{
    struct seen *seen;

    if (!onlooker)
        return;
    seen = find(onlooker, cookie);
    assert(seen && !seen->answered);
    seen->answered = true;
    if (seen->recorded && seen->error != error)
        nv_sim_violation("cookie %llu: answered with error %d, recorded with %d", (unsigned long long)cookie, error,
                         seen->error);
    seen->error = error;
}

void onlooker_gone(struct onlooker *onlooker, uint32_t connection)
{
    for (uint32_t i = 0; onlooker && i < onlooker->count; i++)
        onlooker->seen[i].excused |= onlooker->seen[i].request.connection == connection;
}

/* ---- what the plane says ---- */

static void judge_words(const struct seen *seen, const nv_trace_record *record)
{
    const struct onlooker_request *request = &seen->request;

    if (record->type != request->type || record->flags != request->flags || record->offset != request->offset ||
        (record->length != request->length && record->length != request->wire_length))
        nv_sim_violation("cookie %llu: recorded as command %u flags %#x offset %llu length %llu",
                         (unsigned long long)record->cookie, record->type, record->flags,
                         (unsigned long long)record->offset, (unsigned long long)record->length);
    if (seen->recorded)
        nv_sim_violation("cookie %llu: recorded twice", (unsigned long long)record->cookie);
    if (seen->answered && record->error != seen->error)
        nv_sim_violation("cookie %llu: answered with error %d, recorded with %d", (unsigned long long)record->cookie,
                         seen->error, record->error);
}

static void judge_moments(const struct onlooker *onlooker, const struct seen *seen, const nv_trace_record *record)
{
    const uint64_t moments[] = {onlooker->began_ns,  seen->sent_ns,        record->received_ns, record->parsed_ns,
                                record->submitted_ns, record->completed_ns, record->sent_ns,     now_ns()};

    for (unsigned i = 2; i < sizeof moments / sizeof moments[0]; i++)
        if (moments[i] < moments[i - 1] || moments[i] < moments[0])
            nv_sim_violation("cookie %llu: moment %u of its record is %llu, after %llu",
                             (unsigned long long)record->cookie, i, (unsigned long long)moments[i],
                             (unsigned long long)moments[i - 1]);
}

static void judge(struct onlooker *onlooker, const nv_trace_record *record)
{
    struct seen *seen = find(onlooker, record->cookie);

    if (!seen || record->volume != onlooker->volume)
        nv_sim_violation("a record of cookie %llu on volume %u, which nobody sent",
                         (unsigned long long)record->cookie, record->volume);
    judge_words(seen, record);
    judge_moments(onlooker, seen, record);
    seen->recorded = true;
    seen->error = record->error;
}

/* Some of one reactor's records; false: there are no more now. */
static bool read_some(struct onlooker *onlooker, uint32_t reactor)
{
    nv_trace_record records[AT_ONCE];
    nv_trace_state state;
    int count = nv_trace_read(onlooker->plane, reactor, records, AT_ONCE, &state);

    if (count < 0 || state.dropped)
        nv_sim_violation("a trace cannot be read, or has dropped %llu", (unsigned long long)state.dropped);
    for (int i = 0; i < count; i++)
        judge(onlooker, &records[i]);
    return count == AT_ONCE;
}

static void begin(struct onlooker *onlooker)
{
    const uint32_t every = sim_random_chance(&onlooker->random, 700) ? 1 : 2;

    if (nv_trace_begin(onlooker->plane, onlooker->volume, every, &onlooker->began_ns) != 0)
        nv_sim_violation("a trace does not begin");
    onlooker->tracing = true;
    onlooker->everything = every == 1;
}

static void end(struct onlooker *onlooker)
{
    if (nv_trace_end(onlooker->plane) != 0)
        nv_sim_violation("a trace does not end");
    onlooker->tracing = false;
    for (uint32_t i = 0; i < onlooker->count; i++)
        onlooker->seen[i].excused = true;
}

void onlooker_act(struct onlooker *onlooker)
{
    if (!onlooker->tracing)
        begin(onlooker);
    else if (sim_random_chance(&onlooker->random, 100))
        end(onlooker);
    else
        read_some(onlooker, (uint32_t)sim_random_below(&onlooker->random, onlooker->reactors));
}

bool onlooker_content(struct onlooker *onlooker)
{
    if (!onlooker->tracing)
        return true;
    for (uint32_t i = 0; i < onlooker->reactors; i++)
        while (read_some(onlooker, i))
            ;
    for (uint32_t i = 0; i < onlooker->count; i++) {
        const struct seen *seen = &onlooker->seen[i];
        if (seen->covered && seen->answered && !seen->recorded && !seen->excused)
            return false;
    }
    return true;
}
