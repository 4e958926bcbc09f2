/*
 * The deliberate bug that is chosen: NVSIM_MUTANT=n in the environment. Each ..._mutants program numbers its own.
 */
#ifndef NV_SIM_MUTANT_H
#define NV_SIM_MUTANT_H

#include <stdbool.h>
#include <stdlib.h>

static inline bool mutant(int number)
{
    static int chosen = -1; /* asked for at every call of what is replaced */

    if (chosen < 0) {
        const char *word = getenv("NVSIM_MUTANT");
        chosen = word ? (int)strtol(word, NULL, 10) : 0;
    }
    return chosen == number;
}

#endif
