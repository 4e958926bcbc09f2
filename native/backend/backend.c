/*
 * The parts of the backend's door (backend.h) that are not on the way of every piece.
 */
#include "backend/backend.h"

#include <stdlib.h>

#include "backend/file.h"
#include "backend/nbd.h"

void nv_object_free(struct nv_object *object)
{
    nv_sync_free(&object->sync);
    if (object->kind == NV_KIND_NBD) {
        nv_remote_free(nv_remote_of(object));
        return;
    }
    nv_file_close(object);
    free(object);
}
