/*
 * See file.h. Invariants: moved <= length; one operation of a piece is in flight at a time; a read never succeeds with
 * fewer bytes than asked (the end of the object is ENXIO, EIO to clients, never stale memory). Every change of the object's contents
 * that is not durable by itself is told to the sync state before `finished` runs.
 */
#include "backend/file.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "limits.h"
#include "nbdvvol.h"
#include "reactor/pool.h"
#include "reactor/reactor.h"

enum stage { STAGE_PUNCH, STAGE_ZERO_RANGE, STAGE_WRITE };

static void piece_done(struct nv_op *op);

static struct nv_piece *of_op(struct nv_op *op)
{
    return (struct nv_piece *)((char *)op - offsetof(struct nv_piece, op));
}

static void submit(struct nv_piece *piece, uint8_t kind, uint64_t length, uint8_t flags)
{
    assert(piece->moved + length <= piece->length);
    piece->op.kind = kind;
    piece->op.flags = flags;
    piece->op.done = piece_done;
    piece->op.handle = piece->object->handle;
    piece->op.offset = piece->offset + piece->moved;
    piece->op.length = length;
    piece->op.iov = &piece->iov;
    piece->op.iov_count = 1;
    nv_io_submit(piece->reactor->io, &piece->op);
}

/* A transfer of bytes that are in memory and stay there: done at once, unless it would keep others waiting. */
static bool in_memory(struct nv_piece *piece, uint64_t length)
{
    struct nv_view *view = atomic_load_explicit(&piece->object->view, memory_order_acquire);
    uint8_t *at;

    piece->op.view = NULL;
    if (!view || length > NV_NOW_BYTES || !(at = nv_view_at(view, piece->offset + piece->moved, length)))
        return false;
    piece->op.view = view->writable ? at : NULL;
    return true;
}

static void submit_transfer(struct nv_piece *piece)
{
    const uint64_t left = piece->length - piece->moved;
    uint8_t flags = 0;

    piece->iov = (struct iovec){piece->data + piece->moved, left};
    if (piece->kind == NV_PIECE_WRITE)
        flags = piece->flags & NV_PIECE_DSYNC ? NV_OP_DSYNC : 0;
    if (in_memory(piece, left))
        flags |= NV_OP_NOW;
    else if (piece->kind == NV_PIECE_READ && !(piece->object->flags & NV_OBJECT_DIRECT) &&
             !atomic_load_explicit(&piece->object->no_try_now, memory_order_relaxed))
        flags = NV_OP_TRY_NOW;
    submit(piece, piece->kind == NV_PIECE_WRITE ? NV_OP_WRITE : NV_OP_READ, left, flags);
}

static uint64_t at_most(uint64_t value, uint64_t limit)
{
    return value < limit ? value : limit;
}

static void submit_zero(struct nv_piece *piece)
{
    const uint64_t left = piece->length - piece->moved;

    if (piece->stage == STAGE_WRITE) {
        uint64_t length = at_most(left, NV_ZERO_PIECE);
        piece->iov = (struct iovec){(void *)(uintptr_t)nv_zero_pages(), length};
        submit(piece, NV_OP_WRITE, length, 0);
    } else {
        submit(piece, piece->stage == STAGE_PUNCH ? NV_OP_PUNCH : NV_OP_ZERO, at_most(left, NV_PUNCH_PIECE), 0);
    }
}

static bool usable(const struct nv_piece *piece, uint8_t stage)
{
    const struct nv_object *object = piece->object;

    if (stage == STAGE_PUNCH)
        return !(piece->flags & NV_PIECE_NO_HOLE) && !atomic_load(&object->no_punch);
    if (stage == STAGE_ZERO_RANGE) /* a block device may write the zeros out itself: that is not fast */
        return !((piece->flags & NV_PIECE_FAST) && (object->flags & NV_OBJECT_BLOCK)) &&
               !atomic_load(&object->no_zero_range);
    return !(piece->flags & NV_PIECE_FAST);
}

/* The first usable way from `stage` on; false if none is left. */
static bool choose_stage(struct nv_piece *piece, unsigned stage)
{
    for (; stage <= STAGE_WRITE; stage++)
        if (usable(piece, (uint8_t)stage)) {
            piece->stage = (uint8_t)stage;
            return true;
        }
    return false;
}

static bool unsupported(int64_t result)
{
    return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV || result == -ENOTTY;
}

static void learn(struct nv_object *object, uint8_t op_kind, int64_t result)
{
    if (!unsupported(result))
        return;
    if (op_kind == NV_OP_PUNCH)
        atomic_store(&object->no_punch, true);
    else if (op_kind == NV_OP_ZERO)
        atomic_store(&object->no_zero_range, true);
}

/* Pages may be gone, whatever the result. */
static void forget_view(struct nv_piece *piece)
{
    struct nv_view *view = atomic_load_explicit(&piece->object->view, memory_order_acquire);

    if (view)
        nv_view_forget(view, piece->offset, piece->length);
}

static void finish(struct nv_piece *piece, int64_t result)
{
    const bool changes = piece->kind == NV_PIECE_WRITE || piece->kind == NV_PIECE_ZERO || piece->kind == NV_PIECE_TRIM;
    const bool durable = piece->kind == NV_PIECE_WRITE && (piece->flags & NV_PIECE_DSYNC);

    assert(piece->moved <= piece->length);
    if (piece->kind == NV_PIECE_TRIM || piece->kind == NV_PIECE_ZERO)
        forget_view(piece);
    if (changes && !(durable && result == 0))
        nv_sync_wrote(&piece->object->sync);
    if (durable && result < 0) /* the kernel has told us, and will not tell the next sync */
        nv_sync_fail(&piece->object->sync, piece->reactor, (int)result);
    nv_piece_count(piece, piece->reactor->index, result);
    piece->finished(piece, result);
}

static void transfer_done(struct nv_piece *piece, int64_t result)
{
    if (result <= 0) {
        finish(piece, result < 0 ? result : -ENXIO); /* 0: the object ends before the map does */
        return;
    }
    piece->moved += (uint64_t)result;
    if (piece->moved < piece->length)
        submit_transfer(piece);
    else
        finish(piece, 0);
}

static void zero_done(struct nv_piece *piece, int64_t result)
{
    const bool wrote = piece->op.kind == NV_OP_WRITE;

    learn(piece->object, piece->op.kind, result);
    if (result < 0 && !wrote && result != -EIO) {
        if (choose_stage(piece, piece->stage + 1u))
            submit_zero(piece);
        else
            finish(piece, -EOPNOTSUPP);
        return;
    }
    if (result < 0 || (wrote && result == 0)) {
        finish(piece, result < 0 ? result : -EIO);
        return;
    }
    piece->moved += wrote ? (uint64_t)result : piece->op.length;
    if (piece->moved < piece->length)
        submit_zero(piece);
    else
        finish(piece, 0);
}

static void trim_done(struct nv_piece *piece, int64_t result)
{
    learn(piece->object, piece->op.kind, result);
    if (result < 0) {
        finish(piece, result == -EIO ? -EIO : 0);
        return;
    }
    piece->moved += piece->op.length;
    if (piece->moved < piece->length)
        submit(piece, NV_OP_PUNCH, at_most(piece->length - piece->moved, NV_PUNCH_PIECE), 0);
    else
        finish(piece, 0);
}

static void piece_done(struct nv_op *op)
{
    struct nv_piece *piece = of_op(op);

    if (op->flags & NV_OP_NOW_UNSUPPORTED)
        atomic_store_explicit(&piece->object->no_try_now, true, memory_order_relaxed);
    switch (piece->kind) {
    case NV_PIECE_READ:
    case NV_PIECE_WRITE:
        transfer_done(piece, op->result);
        break;
    case NV_PIECE_ZERO:
        zero_done(piece, op->result);
        break;
    case NV_PIECE_TRIM:
        trim_done(piece, op->result);
        break;
    case NV_PIECE_EXTENTS:
        finish(piece, op->result);
        break;
    case NV_PIECE_ANSWER:
        finish(piece, piece->answer);
        break;
    default:
        finish(piece, 0);
    }
}

/* A piece with nothing to do still completes through the port, so that callers never recurse. */
static void submit_answer(struct nv_piece *piece, int64_t answer)
{
    piece->kind = NV_PIECE_ANSWER;
    piece->answer = answer;
    submit(piece, NV_OP_TIMER, 0, 0);
}

static void start_trim(struct nv_piece *piece)
{
    const uint64_t unit = piece->object->align > 512 ? piece->object->align : 512;
    uint64_t first = (piece->offset + unit - 1) & ~(unit - 1);
    uint64_t end = (piece->offset + piece->length) & ~(unit - 1);

    if (first >= end || atomic_load(&piece->object->no_punch)) {
        submit_answer(piece, 0);
        return;
    }
    piece->offset = first; /* a hint shrinks inward to what the object can free */
    piece->length = end - first;
    submit(piece, NV_OP_PUNCH, at_most(piece->length, NV_PUNCH_PIECE), 0);
}

void nv_file_start(struct nv_piece *piece)
{
    assert(piece->length > 0 && piece->finished);
    piece->moved = 0;
    switch (piece->kind) {
    case NV_PIECE_READ:
    case NV_PIECE_WRITE:
        submit_transfer(piece);
        break;
    case NV_PIECE_ZERO:
        if (choose_stage(piece, STAGE_PUNCH))
            submit_zero(piece);
        else
            submit_answer(piece, -EOPNOTSUPP);
        break;
    case NV_PIECE_TRIM:
        start_trim(piece);
        break;
    case NV_PIECE_EXTENTS:
        piece->op.extents = piece->extents;
        piece->op.extents_max = piece->extents_max;
        submit(piece, NV_OP_EXTENTS, piece->length, 0);
        break;
    default:
        submit(piece, NV_OP_PREFETCH, piece->length, 0);
    }
}

/* --- the object --- */

static void synced(struct nv_op *op)
{
    nv_sync_ran((struct nv_sync *)((char *)op - offsetof(struct nv_sync, op)), op->result);
}

static void sync_file(struct nv_sync *sync, struct nv_reactor *reactor)
{
    struct nv_object *object = (struct nv_object *)((char *)sync - offsetof(struct nv_object, sync));

    sync->op.kind = NV_OP_SYNC;
    sync->op.flags = atomic_load(&object->view) ? NV_OP_NOW : 0;
    sync->op.handle = object->handle;
    sync->op.done = synced;
    nv_io_submit(reactor->io, &sync->op);
}

void nv_file_open(struct nv_object *object, nv_handle handle, uint32_t flags, uint32_t align, uint64_t size)
{
    object->kind = NV_KIND_FILE;
    object->handle = handle;
    object->flags = flags;
    object->align = object->memory_align = align;
    atomic_store(&object->size, size);
    if (!(flags & NV_OBJECT_DIRECT) && nv_io_in_memory(handle))
        atomic_store(&object->view, nv_view_create(handle, size, !(flags & NV_OBJECT_READ_ONLY), NULL));
    nv_sync_init(&object->sync, object->id, sync_file);
}

/* A view of the new size takes the place of the present one; without memory for it, that one stays. */
void nv_file_grow(struct nv_object *object, uint64_t size)
{
    struct nv_view *present = atomic_load(&object->view), *larger;

    if (!present || size <= present->size)
        return;
    larger = nv_view_create(object->handle, size, present->writable, present);
    if (larger)
        atomic_store_explicit(&object->view, larger, memory_order_release);
}

void nv_file_close(struct nv_object *object)
{
    nv_view_free(atomic_load(&object->view));
    nv_io_close(object->handle);
}
