/*
 * A write-back log that goes in before a volume while it is used, or out again (docs/cache.md section 10): for a moment each
 * reactor holds its requests back at the gate, where they would go to the log or below; what is under way ends, the log is put
 * in or taken out, and all go on. A request that has no answer when the gate closes is behind the log or before it, never both.
 *
 * Invariants: no request of the volume is below the gate of any reactor while the log goes in or out; from the first log on
 * write-like requests take whole blocks of the log in the range order, and none that does not is left when the gate closes.
 * Requests are held for NV_GATE_PATIENCE_MS at most: then the gate opens again, and nothing has changed.
 */
#ifndef NV_SWITCH_H
#define NV_SWITCH_H

#include <stdbool.h>
#include <stdint.h>

struct nv_logged;
struct nv_reactor;
struct nv_switch;
struct nv_switch_end;
struct nv_volume;
struct nv_volume_local;
struct nv_vreq;

struct nv_gate {                    /* of a volume on one reactor */
    bool widens;                    /* write-like requests take whole blocks of the log in the order */
    uint32_t narrow;                /* those that entered before */
    uint32_t running;               /* requests below the gate */
    struct nv_vreq *held, **held_last; /* at the gate, while it is closed; held_last: while there are some */
    struct nv_switch_end *waits;    /* wants to hear when `*count` is 0 */
    const uint32_t *count;
};

/* --- the front: 0, or -errno and nothing comes of it; LOG_ATTACHED or LOG_DETACHED tells how it ended --- */

int nv_switch_begin(struct nv_volume *volume, bool in, uint64_t token);
/* That event is being taken. */
void nv_switch_over(struct nv_switch *sw, int result);

/* --- a request's reactor --- */

/* The gate is closed: it goes on when it is open. */
void nv_gate_hold(struct nv_gate *gate, struct nv_vreq *request);
/* A request has left, and somebody waits for that. */
void nv_gate_left(struct nv_gate *gate);

/* --- the log's owner --- */

/* The log that is to leave has nothing under way. */
void nv_switch_rests(struct nv_switch *sw);

#endif
