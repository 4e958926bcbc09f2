/*
 * Where a volume meets its write-back log (docs/cache.md, sections 7 to 10): one log a volume, which lives on one reactor,
 * its owner. It goes in and out as switch.h says, or is opened before the volume's first connection. The log itself is in log/,
 * which knows no volume.
 *
 * A request comes here when its turn in the range order has come, which is kept in whole blocks of 4096 bytes while a volume
 * has a log; from other reactors it travels by message, and back. Blocks that a write or a zero touches in part are read,
 * merged and written whole; a trim leaves them alone. What the log hands below runs on the owner, by the owner's map. A
 * mirror below has the same owner; it is a client's to the mirror, but for its order (volume.h: `below`): a client's write
 * that waits for the log must not hold up what is carried below.
 */
#ifndef NV_LOGGED_H
#define NV_LOGGED_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

struct nv_logged;
struct nv_map;
struct nv_reactor;
struct nv_switch;
struct nv_volume;
struct nv_vreq;

/* --- the front --- */

/* VOLUME_CLOSED was seen, or no reactor runs any more: its log, and those that it had. */
void nv_logged_free_all(struct nv_volume *volume);
/* It is before the volume now; or out, and what it has is given back as soon as nothing late uses it. */
void nv_logged_switched(struct nv_logged *logged, bool in);
/* LOG_OPENED is being taken; and LOG_RESTS: a log that hung may have been let go by its volume, and ends now. */
void nv_logged_opened(struct nv_logged *logged, uint64_t verdict);
void nv_logged_rests(struct nv_logged *logged);
/* 0, or -errno: a volume with a log cannot change over to this map. */
int nv_logged_check_change(const struct nv_volume *volume, const struct nv_map *to);
/* LOG_DRAINED is being taken. */
void nv_logged_drained(struct nv_logged *logged);

/* --- any thread --- */

struct nv_reactor *nv_logged_owner(const struct nv_logged *logged);
/* No connection of the volume is left: the log ends, then nv_volume_logged_ended() is called. */
void nv_logged_send_end(struct nv_logged *logged);
/* A request whose turn has come, on its own reactor. */
void nv_logged_run(struct nv_vreq *request);

/* --- the owner --- */

/* A newer epoch exists: nothing is acknowledged any more, nothing carried below. */
void nv_logged_fence(struct nv_logged *logged);
/* A mirror's late operation has ended, which used the memory of this request below the log (nv_request_unpin). */
void nv_logged_unpin(struct nv_vreq *v);

/* May it go in: it is recovered, and holds nothing. May it go out: it is drained, void or refused, or was before no request. */
int nv_logged_may_enter(const struct nv_logged *logged);
int nv_logged_may_leave(const struct nv_logged *logged);
/* No request comes any more: nv_switch_rests() is called once nothing of its own is under way. NULL: never mind. */
void nv_logged_leaves(struct nv_logged *logged, struct nv_switch *sw);
/* Then it is out of the reactor's hands. */
void nv_logged_gone(struct nv_logged *logged);

/* The volume is being closed: what waits for something that does not come is answered. */
void nv_logged_closes(struct nv_logged *logged);

/* Widen a range to whole blocks. */
static inline void nv_logged_widen(uint64_t *offset, uint64_t *length)
{
    const uint64_t end = (*offset + *length + NV_LOG_UNIT - 1) & ~(uint64_t)(NV_LOG_UNIT - 1);

    *offset &= ~(uint64_t)(NV_LOG_UNIT - 1);
    *length = end - *offset;
}

#endif
