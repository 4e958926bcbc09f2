/*
 * The simulation's only source of chance: splitmix64. The same seed gives the same run on every machine.
 */
#ifndef NV_SIM_RANDOM_H
#define NV_SIM_RANDOM_H

#include <stdbool.h>
#include <stdint.h>

struct sim_random {
    uint64_t state;
};

static inline uint64_t sim_random_next(struct sim_random *random)
{
    uint64_t z = (random->state += 0x9e3779b97f4a7c15ull);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform in [0, bound); 0 for bound 0. */
static inline uint64_t sim_random_below(struct sim_random *random, uint64_t bound)
{
    return bound ? (uint64_t)(((unsigned __int128)sim_random_next(random) * bound) >> 64) : 0;
}

/* True `chance` times in 1024. */
static inline bool sim_random_chance(struct sim_random *random, unsigned chance)
{
    return chance && sim_random_below(random, 1024) < chance;
}

#endif
