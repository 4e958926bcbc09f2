/*
 * A small thread of the real I/O port for look-ups that the ring cannot do (SEEK_DATA / SEEK_HOLE). Started with the
 * first look-up. Operations come back through nv_worker_take() on the reactor's thread, which nv_io_wake() wakes.
 */
#ifndef NV_IO_WORKER_H
#define NV_IO_WORKER_H

#include "io/io.h"

struct nv_worker;

int nv_worker_create(struct nv_worker **out, struct nv_io *io);
void nv_worker_destroy(struct nv_worker *worker);
void nv_worker_submit(struct nv_worker *worker, struct nv_op *op);
struct nv_op *nv_worker_take(struct nv_worker *worker); /* a list of finished operations, oldest first */
bool nv_worker_ready(struct nv_worker *worker);

#endif
