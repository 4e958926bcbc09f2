/*
 * A leg's disk behind an NBD server of its own, as one host has it open: a remote export of its plane, through the client of
 * production. Both ends that are not the plane's are here: the server, and the front that connects and hears of ends. The
 * troubles are those of the file through which the server has the disk (nv_sim_trouble): gone is a server that nobody can
 * reach, hung one that says and does nothing.
 *
 * The server is honest but mortal: it carries out what it has received when it likes and in any order, answers late, in any
 * order and in pieces, and loses connections. When it ends a connection nothing of it is left to be done; when the client
 * ends one, what was received may be done later still. It is restarted as its disk is (reboot_leg), and loses of its
 * cache what it likes.
 *
 * Some know claims: a connection names its host's epoch, and which opening of the leg it is of. A newer claim ends whatever
 * older connections are there, and is admitted only then; an older one is refused. Elsewhere an opening whose connection
 * timed out may have left something behind: a new one waits until somebody has made sure (far_make_sure).
 */
#ifndef NV_SIM_FAR_H
#define NV_SIM_FAR_H

#include "nbdvvol.h"
#include "sim/farm.h"

struct far;

/* Open the leg's disk, which the server reaches through `file`, as an object of the plane. */
struct far *far_open(struct farm *farm, struct farm_leg *server, nv_plane *plane, int file, uint64_t epoch);
/* The plane is gone. */
void far_free(struct far *far);
uint32_t far_object(const struct far *far);
/* Both sides do something; false: neither can. */
bool far_step(struct far *far);
/* The end of one of its links. */
void far_heard(struct far *far, const nv_event *event);
/* What the server has of this opening is done in part or not at all, and its connections end. */
void far_settle(struct far *far);
/* The same with what its client has given up, on somebody's word. */
void far_make_sure(struct far *far);
/* Nothing moves on one of its connections for a while; the others go on. */
void far_silence(struct far *far);
/* A connection ends, or takes nothing new. */
void far_trouble(struct far *far);
/* Nobody connects any more: what waits fails. */
void far_leave(struct far *far);
/* Nothing of it is under way, as far as its client knows. */
bool far_is_over(const struct far *far);
/* Something may land late. */
bool far_is_doubtful(const struct far *far);
/* The client knows of every connection that has ended, and has one. */
bool far_is_sound(const struct far *far);
bool far_knows_all(const struct far *far);
bool far_knows_claims(const struct far *far);
/* It has made durable what was there before it was opened. */
bool far_has_flushed(const struct far *far);

#endif
