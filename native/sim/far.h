/*
 * One of the simulation's disks behind an NBD server, as a remote export of the plane. Both ends that are not the plane's
 * are here: the server (by the protocol document, with numbers of its own, as the model clients are), and the front that
 * connects links and hears of their end.
 *
 * The server is honest but mortal: it carries requests out when it has parsed them, answers when it likes, in any order
 * and in pieces, is restarted (which loses every connection, and of its cache what it likes), loses single connections,
 * falls silent, shuts down, or babbles. It never carries out a request of a connection that the plane has given up on.
 */
#ifndef NV_SIM_FAR_H
#define NV_SIM_FAR_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"
#include "sim/client.h"
#include "sim/disk.h"
#include "sim/scenario.h"

struct far;

/* A life begins: the object is open, no link is there yet. The disk stays the caller's. */
struct far *far_create(struct scenario *scenario, struct client_rules *rules, nv_plane *plane, struct sim_disk *disk);
void far_destroy(struct far *far);
uint32_t far_object(const struct far *far);
/* One of the two does something. False: neither can. */
bool far_step(struct far *far);
/* Some trouble, by chance. */
void far_trouble(struct far *far);
/* No more trouble, and no more errors. */
void far_calm(struct far *far);
/* The plane is being stopped: nobody connects again. */
void far_quit(struct far *far);
/* What the plane says of its links. */
void far_heard(struct far *far, const nv_event *event);
/* Every connection ends, and nobody connects again. */
void far_end(struct far *far);
void far_describe(const struct far *far); /* to stderr */

#endif
