/* The C API (nbdvvol.cdef.h, kept clean for cffi) with the guard and includes that C needs. */
#ifndef NBDVVOL_H
#define NBDVVOL_H

#include <stdint.h>

#include "nbdvvol.cdef.h"

#endif
