/*
 * A view of an object whose file lives in memory (tmpfs): reads are answered by sending straight from it. It knows which
 * pages are there, because touching a hole would fill it: a bit is set once the kernel said so, and cleared when a punch
 * went over it. A bit that is set in vain costs a page of zeros, never a wrong byte.
 *
 * Objects grow: a larger view replaces an older one, which stays until the object closes, because reads that began
 * with it may still be sent. Made and freed by the front thread; looked at by every reactor.
 */
#ifndef NV_VIEW_H
#define NV_VIEW_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/io.h"

struct nv_view {
    uint8_t *base;
    bool writable;
    uint64_t size;
    struct nv_view *older;
    _Atomic uint64_t *present;      /* a bit a page */
};

/* NULL: no memory or no address space for one; the object is read as others are. */
struct nv_view *nv_view_create(nv_handle handle, uint64_t size, bool writable, struct nv_view *older);
/* It and all older ones. */
void nv_view_free(struct nv_view *view);
/* Where these bytes stand, if all of them are in memory now; else NULL. */
uint8_t *nv_view_at(struct nv_view *view, uint64_t offset, uint64_t length);
/* A punch went over these bytes. */
void nv_view_forget(struct nv_view *view, uint64_t offset, uint64_t length);

#endif
