/*
 * The mirror layer's door (docs/mirror.md): what volumes and the front need of it. A mirror lives on its volume's owner
 * reactor, and everything here runs there unless it says "front" or "any reactor". Requests come in range order; they
 * may come from connections on other reactors, then they travel by message.
 *
 *   mirror.c        life, legs, freeze and release, queues, commands   mirror_write.c   writes, zeroes, trims, flushes
 *   mirror_io.c     operations on legs: late ones, pins, deadlines     mirror_read.c    reads, their conflicts, status
 *   mirror_task.c   release, promotion, checkpoints, clearing, end     mirror_attach.c  attach, the start of a resync
 *   intent.c        regions, intent pages, lazy clearing               copier.c         reconcile, resync, repair, verify
 */
#ifndef NV_MIRROR_H
#define NV_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

#include "nbdvvol.h"
#include "reactor/events.h"
#include "reactor/inbox.h"

struct nv_late;
struct nv_logged;
struct nv_map;
struct nv_mirror;
struct nv_object;
struct nv_range_table;
struct nv_reactor;
struct nv_volume;
struct nv_vreq;

enum nv_mirror_command_kind {
    NV_MIRROR_FAIL,
    NV_MIRROR_RELEASE,
    NV_MIRROR_RESYNC,
    NV_MIRROR_STOP,
    NV_MIRROR_PROMOTE,
    NV_MIRROR_FENCE,
    NV_MIRROR_VERIFY,
};

struct nv_mirror_command {          /* made by the front, freed by it when its event has come */
    struct nv_message message;
    struct nv_mirror_command *next;
    struct nv_mirror *mirror;
    enum nv_mirror_command_kind kind;
    uint32_t leg;
    bool option;                    /* RESYNC: full; VERIFY: repair */
    uint64_t generation;
    struct nv_event_slot done;
};

/* Front: make a mirror for a volume's first map, with all its memory. 0 or -errno. */
int nv_mirror_create(struct nv_volume *volume, struct nv_map *map, struct nv_reactor *owner);
/* Front, once VOLUME_CLOSED was seen, or no reactor runs any more. */
void nv_mirror_free(struct nv_mirror *mirror);
/* Front: begin to attach, by message. */
void nv_mirror_send_open(struct nv_mirror *mirror);
/* Front: give the legs of a newer map their lanes; -errno if it cannot follow the present one. */
int nv_mirror_check_change(const struct nv_map *from, struct nv_map *to);
/* Front: -errno, or the command is on its way and ends with an event. */
int nv_mirror_send_command(struct nv_volume *volume, enum nv_mirror_command_kind kind, uint32_t leg, bool option,
                           uint64_t generation, uint64_t token);
/* Front: a snapshot that the owner refreshes now and then. */
void nv_mirror_look(struct nv_mirror *mirror, nv_mirror_status *out);

/* Any thread: the reactor whose mirror it is. */
struct nv_reactor *nv_mirror_owner(const struct nv_mirror *mirror);
/* The owner's local half has a new map. */
void nv_mirror_changed(struct nv_mirror *mirror, const struct nv_map *from, const struct nv_map *to);
/* The volume is being closed: nothing is held any more, new requests are few. */
void nv_mirror_closes(struct nv_mirror *mirror);
/* Any reactor: no connection of the volume is left; the mirror ends, then VOLUME_CLOSED is raised. */
void nv_mirror_send_end(struct nv_mirror *mirror);

/* A log is above from now on, which hears of a fence; NULL: none is. */
void nv_mirror_under(struct nv_mirror *mirror, struct nv_logged *logged);
/*
 * The order that copies between legs take their places in, from now on: the volume's, or, with a log above, that of what it
 * hands below. False: copies are still under way by another order.
 */
bool nv_mirror_orders_by(struct nv_mirror *mirror, struct nv_range_table *table);
/*
 * Begin no piece of a copy, and give up the places of those that wait for a client's request; `rest` is queued once none is
 * under way. True: that is so already. Until they go on, by this order.
 */
bool nv_mirror_pause_copies(struct nv_mirror *mirror, struct nv_late *rest);
void nv_mirror_resume_copies(struct nv_mirror *mirror, struct nv_range_table *table);
/* Failed syncs of the last in-sync leg, so far: they may have lost what no other leg has. */
uint64_t nv_mirror_faults(const struct nv_mirror *mirror);

/* Any reactor: run a request whose turn has come. */
void nv_mirror_run(struct nv_vreq *request);
/*
 * Where a range of the volume stands in memory, and of which object, if a read may be answered from there now (NULL: it
 * may not, run it). "Now" is this turn of the owner: who sends later asks again.
 */
uint8_t *nv_mirror_view(struct nv_mirror *mirror, const struct nv_map *map, uint64_t offset, uint64_t length,
                        struct nv_object **object);
/* Copy `length` of the bytes that nv_mirror_view() has just shown, from `from` on: how many, or -errno. */
int64_t nv_mirror_copy(const struct nv_vreq *request, uint64_t from, void *to, uint64_t length);

#endif
