/*
 * Validate a volume description (nbdvvol.cdef.h) and compile it. The record comes from another process's words, so
 * nothing in it is believed: every field is checked before it is used, and a bad record changes nothing.
 */
#ifndef NV_DESC_H
#define NV_DESC_H

#include <stdint.h>

#include "volume/map.h"

/* The object of a number, or NULL. */
typedef struct nv_object *nv_object_lookup(void *context, uint32_t object);

/*
 * 0 and *out (free with nv_map_free), or -errno with nv_last_error(): -EINVAL for a malformed record, -ENOENT for an
 * unknown object, -ERANGE for a run outside its object, -E2BIG above a limit, -ENOMEM.
 */
int nv_desc_compile(const void *record, uint64_t length, uint32_t reactors, nv_object_lookup *lookup, void *context,
                    struct nv_map **out);
/* The record's map_from; the record must have compiled. */
uint64_t nv_desc_map_from(const void *record);
void nv_map_free(struct nv_map *map);

#endif
