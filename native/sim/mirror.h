/*
 * Seeds of the mirrored volume (mirror.c): nvsim --mirror.
 */
#ifndef NV_SIM_MIRROR_H
#define NV_SIM_MIRROR_H

#include <stdbool.h>
#include <stdint.h>

/* One seed; steps 0: as the seed has it. Answers judged. A violation ends the process. */
uint64_t mirror_run(uint64_t seed, uint32_t steps, bool trace);
/* Tell when the cell's bytes change on a leg. */
void mirror_follow(uint64_t cell);
/* What goes on, to stderr, for a violation. */
void mirror_describe(void);

#endif
