/*
 * What the mirrored volume's simulations share: a farm (farm.h) with its hosts (host.h), control's side of binding, the
 * troubles' end, and what must be so in the end. Who does what when is decided in mirror.c, by chance, and in exhaustive.c.
 */
#ifndef NV_SIM_MIRROR_WORLD_H
#define NV_SIM_MIRROR_WORLD_H

#include "sim/farm.h"
#include "sim/host.h"
#include "sim/mirror.h"

struct world {
    struct farm farm;
    struct host hosts[FARM_HOSTS];
    uint64_t next_id;               /* of connections */
    uint32_t life, step;
};

/* A world, whose farm the caller draws before it begins. There is one at a time. */
struct world *world_create(void);
void world_begin(struct world *world, bool trace);
struct mirror_figures world_figures(const struct world *world);
void world_destroy(struct world *world);

void world_say(const struct world *world, const char *what, uint32_t which);
void world_follow(const struct world *world);

/* The host that serves, or is to; NULL: none is up. */
struct host *world_serving(struct world *world);
/*
 * Bind to a host: a new epoch, and every leg lets nothing of an older one through any more. What the old host had not
 * answered may have happened or not; what it had answered is there.
 */
void world_bind(struct world *world, struct host *host);
void world_kill(struct world *world, struct host *host);
void world_kill_all(struct world *world);
/* Power goes, at some legs or at all. */
void world_outage(struct world *world, bool everywhere);

void world_tell_troubles(struct world *world);
void world_heal(struct world *world, bool all);
/* Every trouble ends, for good. */
void world_calm(struct world *world);

bool world_answered(const struct host *host);
/* Every leg is in sync by the registry's word and the plane's, and nothing is left to clear, nor under way. */
bool world_at_rest(struct world *world, struct host *host);
/* Everything that can move moves once; if nothing can (false), the clock does. */
bool world_move(struct world *world);
/* Until all is at rest; the host that serves then. */
struct host *world_recover(struct world *world);
void world_verify(struct world *world, struct host *host);
void world_stop(struct world *world, struct host *host);
void world_read_everything(struct world *world, struct host *host);

#endif
