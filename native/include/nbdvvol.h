/*
 * The C API of the data plane for C code: the cdef header with the guard and the types it leaves out.
 */
#ifndef NBDVVOL_H
#define NBDVVOL_H

#include <stdint.h>

#include "nbdvvol.cdef.h"

#endif
