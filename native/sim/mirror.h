/*
 * The mirrored volume in the simulation, as nvsim runs it: seeds (mirror.c) and exhaustively (exhaustive.c).
 */
#ifndef NV_SIM_MIRROR_H
#define NV_SIM_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

struct mirror_figures {
    uint64_t answers;               /* of requests, judged */
    uint64_t crashes;               /* points at which a process, a host's right to serve, or the power ended */
    uint64_t commits;               /* changes of the registry */
    uint64_t inspections;           /* of the disks' bytes */
};

/* One seed; steps 0: as the seed has it. A violation ends the process. */
struct mirror_figures mirror_run(uint64_t seed, uint32_t steps, bool trace);
enum exhaustive_family {
    EXHAUSTIVE_LIVES,               /* whatever may happen to two legs */
    EXHAUSTIVE_SYNCS,               /* syncs of the last leg in sync fail */
    EXHAUSTIVE_FAMILIES
};
/* Every sequence of operations of a family whose number leaves `part` when divided by `parts`; runs of them. */
uint64_t exhaustive_run(enum exhaustive_family family, uint32_t part, uint32_t parts, struct mirror_figures *figures,
                        uint64_t *sequences_run);
/* One run again, as a violation names it; false: it is not the name of one. */
bool exhaustive_replay(const char *name, bool trace);
/* How to say which run it is: empty if no exhaustive one is under way. */
const char *exhaustive_name(void);
/* Tell when the cell's bytes change on a leg. */
void mirror_follow(uint64_t cell);
/* What goes on, to stderr, for a violation. */
void mirror_describe(void);

#endif
