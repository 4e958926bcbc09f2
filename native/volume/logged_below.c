/*
 * What a volume's log hands below (logged.h): requests of its own to the map or the mirror, on the owner, and what becomes
 * of their memory when a mirror keeps it past their end, because a leg that it has given up may still use it.
 *
 * Whose memory that is: a destage write's is the log's, which is told (nv_log_memory_kept) and leaves it alone until it comes
 * back; a merged block's is the slot's, which goes on with another block; all other is the client's, whose request is kept
 * as if the mirror had done it (nbd/session.h: nv_request_keep). A read of which a late operation may still write into the
 * memory was finished in other memory (`rescue`); its bytes are brought where nothing late can reach them.
 *
 * Invariants: `done` of what is below never runs from inside nv_logged_below(): it lands in a list that the next pump takes;
 * an I/O below that is kept is replaced by another one, so that those which hang do not use up what the log needs.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/session.h"
#include "reactor/plane.h"
#include "volume/logged_state.h"
#include "volume/mirror.h"

#define RESCUE_ALIGN 4096u

static struct nv_logged_slot *slot_of(const struct nv_log_below *io)
{
    return (struct nv_logged_slot *)((const char *)io - offsetof(struct nv_logged_slot, log.below));
}

/* ---- the pool ---- */

static void start(struct nv_logged *logged, struct nv_logged_below *below, struct nv_log_below *io);

static void put_back(struct nv_logged_below *below)
{
    struct nv_logged *logged = below->logged;
    struct nv_log_below *io = logged->starved_first;

    if (below->extra && !io) {
        free(below);
        return;
    }
    if (io) {
        logged->starved_first = io->next;
        if (!logged->starved_first)
            logged->starved_last = &logged->starved_first;
        start(logged, below, io);
        return;
    }
    below->next = logged->free_below;
    logged->free_below = below;
}

/* What hangs must not use up what is needed: another one in its place, while there is memory. */
static void replace(struct nv_logged *logged)
{
    struct nv_logged_below *other = calloc(1, sizeof *other);

    if (!other)
        return;
    other->logged = logged;
    other->extra = true;
    if (logged->starved_first) {
        put_back(other);
        return;
    }
    other->next = logged->free_below;
    logged->free_below = other;
}

/* ---- memory that is kept ---- */

static void kept_no_more(struct nv_logged_below *below)
{
    assert(below->logged->kept > 0);
    below->logged->kept--;
    put_back(below);
}

static void client_unpinned(struct nv_reactor *reactor, struct nv_message *message)
{
    (void)reactor;
    kept_no_more((struct nv_logged_below *)((char *)message - offsetof(struct nv_logged_below, message)));
}

static void unpin_client(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_logged_below *below = (struct nv_logged_below *)((char *)message - offsetof(struct nv_logged_below, message));

    assert(below->client->reactor == reactor);
    (void)reactor;
    nv_request_unpin(below->client);
    message->run = client_unpinned;
    nv_reactor_send(below->logged->reactor, message);
}

/* Nothing late uses its memory any more. */
static void let_go(struct nv_logged_below *below)
{
    struct nv_logged *logged = below->logged;

    if (below->ours)
        nv_log_memory_back(logged->log, below->data);
    if (below->block)
        logged->blocks[logged->block_count++] = below->block;
    free(below->orphan);
    if (!below->client) {
        kept_no_more(below);
    } else if (below->client->reactor == logged->reactor) {
        nv_request_unpin(below->client);
        kept_no_more(below);
    } else {
        below->message.run = unpin_client;
        nv_reactor_send(below->client->reactor, &below->message);
    }
}

void nv_logged_unpin(struct nv_vreq *v)
{
    struct nv_logged_below *below = (struct nv_logged_below *)v;

    assert(v->pins > 0 && v->reactor == below->logged->reactor);
    if (--v->pins == 0 && below->over)
        let_go(below);
}

static bool in_block(const struct nv_logged_slot *slot, const uint8_t *data)
{
    return slot->block && data >= slot->block && data < slot->block + NV_LOG_UNIT;
}

/* The slot's block is kept, or only its bytes are elsewhere; NULL: there is no other block. */
static uint8_t *move_block(struct nv_logged_below *below, struct nv_logged_slot *slot)
{
    uint8_t *old = slot->block, *other = nv_logged_block(slot->logged);

    if (!other)
        return NULL;
    memcpy(other, old, NV_LOG_UNIT);
    slot->block = other;
    slot->log.data = other + (slot->log.data - old);
    below->block = old;
    return other + (below->data - old);
}

/* The same for a client's memory: what has been read so far goes along. */
static uint8_t *move_client(struct nv_logged_below *below, struct nv_logged_slot *slot)
{
    struct nv_vreq *request = slot->request;
    const uint64_t size = (request->length + RESCUE_ALIGN - 1) / RESCUE_ALIGN * RESCUE_ALIGN;
    const uint64_t into = (uint64_t)(below->data - request->data);
    uint8_t *memory = aligned_alloc(RESCUE_ALIGN, size);

    if (!memory)
        return NULL;
    memcpy(memory, request->data, into);
    slot->log.data = memory + (slot->log.data - request->data);
    below->orphan = request->rescue; /* it was made here, then nobody else has it */
    request->rescue = request->data = memory;
    return memory + into;
}

static void keep_client(struct nv_logged_below *below, struct nv_logged_slot *slot)
{
    if (!below->orphan) { /* what is kept is the client's own */
        below->client = slot->request;
        below->client->pins++;
    }
    nv_request_keep(slot->request);
}

/* Late operations may still use its memory: see to it that it is nobody else's until they have ended. */
static void keep(struct nv_logged_below *below)
{
    struct nv_log_below *io = below->io;
    struct nv_logged_slot *slot = io->ours ? NULL : slot_of(io);
    uint8_t *bytes = below->data;

    replace(below->logged);
    below->logged->kept++;
    below->ours = io->ours;
    if (io->ours) {
        nv_log_memory_kept(below->logged->log, below->data); /* before the late ones may give it back */
        return;
    }
    if (in_block(slot, below->data))
        bytes = move_block(below, slot);
    else if (below->v.kind == NV_REQUEST_READ)
        bytes = move_client(below, slot);
    if (!below->block)
        keep_client(below, slot);
    if (!bytes)
        io->error = -ENOMEM;
    else if (below->v.rescue)
        memcpy(bytes, below->v.rescue, io->length);
}

/* ---- the way below and back ---- */

/* A batch begins with its first write. */
static void note_batch(struct nv_logged *logged, const struct nv_log_below *io)
{
    if (!io->ours || logged->carrying)
        return;
    logged->carrying = true;
    logged->faults = nv_volume_faults(logged->volume, logged->reactor);
}

/*
 * A batch ends with its flush. That succeeds also when a sync of somebody else has failed since the batch began, dropped
 * what of it was written, and the operator has cleared the fault: then all of it has to be carried once more.
 */
static int end_batch(struct nv_logged *logged, const struct nv_vreq *v)
{
    logged->carrying = false;
    return v->error || logged->faults == nv_volume_faults(logged->volume, logged->reactor) ? v->error : -EIO;
}

static void landed(struct nv_vreq *v)
{
    struct nv_logged_below *below = (struct nv_logged_below *)v;
    struct nv_logged *logged = below->logged;
    struct nv_log_below *io = below->io;

    io->error = io->ours && io->kind == NV_LOG_FLUSH ? end_batch(logged, v) : v->error;
    below->over = true;
    if (v->pins > 0)
        keep(below);
    else if (v->rescue && !io->error)
        memcpy(below->data, v->rescue, io->length); /* what was late has ended meanwhile */
    free(v->rescue);
    v->rescue = NULL;
    io->next = NULL;
    *logged->landed_last = io;
    logged->landed_last = &io->next;
    if (v->pins == 0)
        put_back(below);
    nv_reactor_late(logged->reactor, &logged->late);
}

/* What a client said of its zeroing holds below, too; what is carried keeps the space: nobody knows any more who asked. */
static uint8_t flags_of(const struct nv_log_below *io)
{
    const uint32_t fua = io->flags & NV_LOG_FUA ? NV_REQUEST_FUA : 0;

    if (io->ours)
        return (uint8_t)(fua | NV_REQUEST_NO_HOLE);
    return (uint8_t)(fua | (slot_of(io)->request->flags & (NV_REQUEST_NO_HOLE | NV_REQUEST_FAST)));
}

/*
 * A trim over what is logged (which comes with FUA, and a tombstone behind it) has to be zeros: did the storage take it for
 * the hint that it is, and do nothing, bytes would come back that are older than the logged ones.
 */
static uint8_t kind_of(const struct nv_log_below *io)
{
    static const uint8_t kinds[] = {[NV_LOG_READ] = NV_REQUEST_READ, [NV_LOG_WRITE] = NV_REQUEST_WRITE,
                                    [NV_LOG_ZEROES] = NV_REQUEST_ZERO, [NV_LOG_TRIM] = NV_REQUEST_TRIM,
                                    [NV_LOG_FLUSH] = NV_REQUEST_FLUSH};

    return io->kind == NV_LOG_TRIM && (io->flags & NV_LOG_FUA) ? NV_REQUEST_ZERO : kinds[io->kind];
}

static void start(struct nv_logged *logged, struct nv_logged_below *below, struct nv_log_below *io)
{
    const bool extra = below->extra;

    memset(below, 0, sizeof *below);
    below->extra = extra;
    below->io = io;
    below->logged = logged;
    below->data = io->kind == NV_LOG_READ || io->kind == NV_LOG_WRITE ? io->data : NULL;
    below->v.reactor = logged->reactor;
    below->v.volume = logged->volume;
    below->v.kind = kind_of(io);
    below->v.flags = (uint8_t)(flags_of(io) | NV_REQUEST_BELOW);
    below->v.offset = io->kind == NV_LOG_FLUSH ? 0 : io->offset;
    below->v.length = io->kind == NV_LOG_FLUSH ? 0 : io->length;
    below->v.data = below->data;
    below->v.finished = landed;
    nv_volume_below(&below->v);
}

void nv_logged_below(void *context, struct nv_log_below *io)
{
    struct nv_logged *logged = context;
    struct nv_logged_below *below = logged->free_below;

    note_batch(logged, io);
    if (!below) { /* those that hang could not be replaced */
        io->next = NULL;
        *logged->starved_last = io;
        logged->starved_last = &io->next;
        return;
    }
    logged->free_below = below->next;
    start(logged, below, io);
}

/* ---- blocks of the slots ---- */

uint8_t *nv_logged_block(struct nv_logged *logged)
{
    return logged->block_count ? logged->blocks[--logged->block_count] : NULL;
}

void nv_logged_free_below(struct nv_logged *logged)
{
    for (struct nv_logged_below *below = logged->free_below, *next; below; below = next) {
        next = below->next;
        if (below->extra)
            free(below);
    }
    free(logged->below);
    free(logged->blocks);
    if (logged->memory)
        nv_pages_unmap(logged->memory, logged->block_total * NV_LOG_UNIT);
}
