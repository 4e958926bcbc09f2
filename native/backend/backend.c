/*
 * The parts of the backend's door (backend.h) that are not on the way of every piece.
 */
#include "backend/backend.h"

#include <stdlib.h>

#include "backend/file.h"

void nv_object_free(struct nv_object *object)
{
    nv_sync_free(&object->sync);
    nv_file_close(object);
    free(object);
}
