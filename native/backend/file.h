/*
 * The file backend: objects that are files or block devices, on the I/O port. It continues short transfers, falls back
 * where the object cannot do an operation natively, and remembers that. Pieces come through backend.h.
 */
#ifndef NV_FILE_H
#define NV_FILE_H

#include "backend/backend.h"

/* Front: make a zeroed object one of this kind. It owns the handle from here on. */
void nv_file_open(struct nv_object *object, nv_handle handle, uint32_t flags, uint32_t align, uint64_t size);
void nv_file_close(struct nv_object *object);
/* Front: the file has this size now. */
void nv_file_grow(struct nv_object *object, uint64_t size);

#endif
