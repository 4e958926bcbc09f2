/* See ghost.h. */
#include "cache/ghost.h"

#include <stdlib.h>

#include "reactor/pool.h"

static uint32_t print_of(uint64_t spread_bits)
{
    return (uint32_t)(spread_bits >> 32) | 1u;
}

bool nv_ghost_init(struct nv_ghost *ghost, uint32_t frames)
{
    uint32_t sets = 1;

    while (sets * NV_GHOST_WAYS < frames)
        sets *= 2;
    ghost->set_mask = sets - 1;
    ghost->entries = nv_pages_map((size_t)sets * NV_GHOST_WAYS * sizeof *ghost->entries);
    return ghost->entries;
}

void nv_ghost_free(struct nv_ghost *ghost)
{
    if (ghost->entries)
        nv_pages_unmap(ghost->entries, ((size_t)ghost->set_mask + 1) * NV_GHOST_WAYS * sizeof *ghost->entries);
}

void nv_ghost_add(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag)
{
    const uint64_t bits = nv_ghost_spread(mixed, block, tag);
    struct nv_ghost_entry *set = nv_ghost_set(ghost, bits), *oldest = set;

    for (uint32_t i = 0; i < NV_GHOST_WAYS; i++) {
        if (set[i].print == 0 || set[i].print == print_of(bits)) {
            oldest = &set[i];
            break;
        }
        if (ghost->stamp - set[i].stamp > ghost->stamp - oldest->stamp)
            oldest = &set[i];
    }
    *oldest = (struct nv_ghost_entry){print_of(bits), ghost->stamp++};
}

bool nv_ghost_pass(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag, uint32_t span)
{
    const uint64_t bits = nv_ghost_spread(mixed, block, tag);
    struct nv_ghost_entry *set = nv_ghost_set(ghost, bits), *oldest = set;
    uint32_t most = 0;

    for (uint32_t i = 0; i < NV_GHOST_WAYS; i++) {
        const uint32_t age = set[i].print == 0 ? UINT32_MAX : ghost->stamp - set[i].stamp;
        if (set[i].print == print_of(bits)) {
            oldest = &set[i];
            if (age > span)
                break;
            oldest->print = 0;
            return true;
        }
        if (age > most) {
            most = age;
            oldest = &set[i];
        }
    }
    *oldest = (struct nv_ghost_entry){print_of(bits), ghost->stamp++};
    return false;
}

bool nv_ghost_take(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag, uint32_t span)
{
    const uint64_t bits = nv_ghost_spread(mixed, block, tag);
    struct nv_ghost_entry *set = nv_ghost_set(ghost, bits);

    for (uint32_t i = 0; i < NV_GHOST_WAYS; i++)
        if (set[i].print == print_of(bits)) {
            set[i].print = 0;
            return ghost->stamp - set[i].stamp <= span;
        }
    return false;
}
