/*
 * The parts of the backend's door (backend.h) that are not on the way of every piece.
 */
#include "backend/backend.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "backend/file.h"
#include "backend/nbd.h"

int nv_object_counts(struct nv_object *object, uint32_t reactors)
{
    const size_t bytes = reactors * sizeof *object->counters;

    object->counters = aligned_alloc(64, bytes);
    if (!object->counters)
        return -ENOMEM;
    memset(object->counters, 0, bytes);
    return 0;
}

void nv_piece_count_error(struct nv_object *object, uint32_t reactor, int64_t result)
{
    if (result != -EOPNOTSUPP) /* which says that there is a slower way */
        nv_count(&object->counters[reactor].errors, 1);
}

void nv_object_free(struct nv_object *object)
{
    nv_sync_free(&object->sync);
    if (object->kind == NV_KIND_NBD) {
        nv_remote_free(nv_remote_of(object));
        return;
    }
    nv_file_close(object);
    free(object->counters);
    free(object);
}
