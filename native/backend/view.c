/*
 * See view.h. The bits are relaxed atomics: they carry no data, and what they say may be old by the time it is used.
 */
#include "backend/view.h"

#include <assert.h>
#include <stdlib.h>

#include "reactor/pool.h"

#define PAGE_SHIFT 12u
#define WORD_BITS 64u

static size_t map_bytes(uint64_t size)
{
    const uint64_t pages = (size >> PAGE_SHIFT) + 1;

    return (pages + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t);
}

struct nv_view *nv_view_create(nv_handle handle, uint64_t size, bool writable, struct nv_view *older)
{
    struct nv_view *view = calloc(1, sizeof *view);

    if (!view)
        return NULL;
    view->size = size;
    view->writable = writable;
    view->present = nv_pages_map(map_bytes(size));
    view->base = view->present ? nv_io_map(handle, size, writable) : NULL;
    if (!view->base) {
        if (view->present)
            nv_pages_unmap(view->present, map_bytes(size));
        free(view);
        return NULL;
    }
    view->older = older;
    return view;
}

void nv_view_free(struct nv_view *view)
{
    while (view) {
        struct nv_view *older = view->older;
        nv_io_unmap(view->base, view->size);
        nv_pages_unmap(view->present, map_bytes(view->size));
        free(view);
        view = older;
    }
}

/* The bits of one word that stand for pages first..last. */
static uint64_t bits_of(uint64_t word, uint64_t first, uint64_t last)
{
    const uint64_t low = word * WORD_BITS > first ? 0 : first - word * WORD_BITS;
    const uint64_t high = last - word * WORD_BITS < WORD_BITS ? last - word * WORD_BITS : WORD_BITS - 1;

    assert(low <= high && high < WORD_BITS);
    return (UINT64_MAX << low) & (UINT64_MAX >> (WORD_BITS - 1 - high));
}

/* The kernel is asked of a whole word's pages at once: who comes next finds its neighbours known. */
static uint64_t look(struct nv_view *view, uint64_t word)
{
    const uint64_t pages = (view->size + (1u << PAGE_SHIFT) - 1) >> PAGE_SHIFT, left = pages - word * WORD_BITS;
    const uint64_t found = nv_io_present(view->base + (word * WORD_BITS << PAGE_SHIFT),
                                         left < WORD_BITS ? (unsigned)left : WORD_BITS);

    return atomic_fetch_or_explicit(&view->present[word], found, memory_order_relaxed) | found;
}

static bool known(struct nv_view *view, uint64_t first, uint64_t last)
{
    for (uint64_t word = first / WORD_BITS; word <= last / WORD_BITS; word++) {
        const uint64_t bits = bits_of(word, first, last);
        if ((atomic_load_explicit(&view->present[word], memory_order_relaxed) & bits) != bits &&
            (look(view, word) & bits) != bits)
            return false;
    }
    return true;
}

uint8_t *nv_view_at(struct nv_view *view, uint64_t offset, uint64_t length)
{
    uint64_t first, last;

    assert(length > 0);
    if (offset > view->size || length > view->size - offset)
        return NULL;
    first = offset >> PAGE_SHIFT;
    last = (offset + length - 1) >> PAGE_SHIFT;
    if (__builtin_expect(first == last, 1) &&
        atomic_load_explicit(&view->present[first / WORD_BITS], memory_order_relaxed) >> (first % WORD_BITS) & 1)
        return view->base + offset; /* a block that has been asked for before, as nearly all have */
    return known(view, first, last) ? view->base + offset : NULL;
}

void nv_view_forget(struct nv_view *view, uint64_t offset, uint64_t length)
{
    uint64_t first, last;

    if (offset >= view->size || length == 0)
        return;
    if (length > view->size - offset)
        length = view->size - offset;
    first = offset >> PAGE_SHIFT;
    last = (offset + length - 1) >> PAGE_SHIFT;
    for (uint64_t word = first / WORD_BITS; word <= last / WORD_BITS; word++)
        atomic_fetch_and_explicit(&view->present[word], ~bits_of(word, first, last), memory_order_relaxed);
}
