/*
 * The leg machine: what a mirror's legs may do, decided from the registry's record, the labels found and the plane's
 * events (docs/mirror.md section 3). Pure: no I/O, no clock, no thread. The filter drives it through cffi, the simulator
 * directly; the API is in nbdvvol.cdef.h.
 */
#ifndef NV_LEGS_H
#define NV_LEGS_H

#include "nbdvvol.h"

#endif
