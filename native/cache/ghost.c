/* See ghost.h. */
#include "cache/ghost.h"

#include <stdlib.h>

#include "reactor/pool.h"

#define PRINT_SHIFT 40u
#define STAMP_SHIFT 16u
#define STAMP_MASK 0xffffffu
#define OLDER_SHIFT 8u
#define BITS 0xffu

static uint64_t spread(uint64_t mixed, uint64_t block, uint32_t tag)
{
    uint64_t x = (mixed ^ block / NV_GHOST_OCTET * 0xd6e8feb86659fd93ull) + tag;

    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
    return x ^ (x >> 32);
}

static uint64_t *set_of(const struct nv_ghost *ghost, uint64_t spread_bits)
{
    return &ghost->entries[(uint32_t)(spread_bits & ghost->set_mask) * NV_GHOST_WAYS];
}

static uint32_t print_of(uint64_t spread_bits)
{
    return (uint32_t)(spread_bits >> PRINT_SHIFT);
}

static uint32_t bit_of(uint64_t block)
{
    return 1u << block % NV_GHOST_OCTET;
}

bool nv_ghost_init(struct nv_ghost *ghost, uint32_t frames, uint32_t span)
{
    uint32_t sets = 1;

    while (sets * NV_GHOST_WAYS < frames)
        sets *= 2;
    ghost->set_mask = sets - 1;
    ghost->span = span < STAMP_MASK / 2 ? span : STAMP_MASK / 2;
    ghost->entries = nv_pages_map((size_t)sets * NV_GHOST_WAYS * sizeof *ghost->entries);
    return ghost->entries;
}

void nv_ghost_free(struct nv_ghost *ghost)
{
    if (ghost->entries)
        nv_pages_unmap(ghost->entries, ((size_t)ghost->set_mask + 1) * NV_GHOST_WAYS * sizeof *ghost->entries);
}

void nv_ghost_expect(const struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag)
{
    __builtin_prefetch(set_of(ghost, spread(mixed, block, tag)), 1);
}

/* ---- an entry ---- */

/* Additions since its newer bits began. */
static uint32_t age_of(const struct nv_ghost *ghost, uint64_t entry)
{
    return (ghost->stamp - (uint32_t)(entry >> STAMP_SHIFT)) & STAMP_MASK;
}

static uint32_t remembered(const struct nv_ghost *ghost, uint64_t entry)
{
    const uint32_t age = age_of(ghost, entry);
    uint32_t bits = 0;

    if (age <= ghost->span)
        bits |= (uint32_t)entry & BITS;
    if (age <= ghost->span / 2)
        bits |= (uint32_t)(entry >> OLDER_SHIFT) & BITS;
    return bits;
}

static uint64_t without(uint64_t entry, uint32_t bits)
{
    const uint64_t left = entry & ~(uint64_t)(bits | bits << OLDER_SHIFT);

    return left & (BITS | BITS << OLDER_SHIFT) ? left : 0;
}

static uint64_t with(const struct nv_ghost *ghost, uint64_t entry, uint32_t print, uint32_t bits)
{
    const uint32_t age = age_of(ghost, entry);
    uint64_t older = 0;

    if (entry != 0 && age <= ghost->span / 2)
        return entry | bits;
    if (entry != 0 && age <= ghost->span)
        older = entry & BITS & ~(uint64_t)bits;
    return (uint64_t)print << PRINT_SHIFT | (uint64_t)(ghost->stamp & STAMP_MASK) << STAMP_SHIFT | older << OLDER_SHIFT | bits;
}

/* ---- a set ---- */

static bool is_of(uint64_t entry, uint32_t print)
{
    return entry != 0 && entry >> PRINT_SHIFT == print;
}

/* The octet's entry, or else where it goes: a free one, or the oldest, which is made free. */
static uint64_t *entry_of(struct nv_ghost *ghost, uint64_t *set, uint32_t print)
{
    uint64_t *place = set;

    for (uint32_t i = 0; i < NV_GHOST_WAYS; i++) {
        if (is_of(set[i], print))
            return &set[i];
        if (*place != 0 && (set[i] == 0 || age_of(ghost, set[i]) > age_of(ghost, *place)))
            place = &set[i];
    }
    *place = 0;
    return place;
}

void nv_ghost_add(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag)
{
    const uint64_t bits = spread(mixed, block, tag);
    uint64_t *entry = entry_of(ghost, set_of(ghost, bits), print_of(bits));

    *entry = with(ghost, *entry, print_of(bits), bit_of(block));
    ghost->stamp++;
}

bool nv_ghost_take(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag)
{
    const uint64_t bits = spread(mixed, block, tag);
    uint64_t *set = set_of(ghost, bits);

    for (uint32_t i = 0; i < NV_GHOST_WAYS; i++)
        if (is_of(set[i], print_of(bits))) {
            const bool known = remembered(ghost, set[i]) & bit_of(block);
            set[i] = without(set[i], bit_of(block));
            return known;
        }
    return false;
}

uint32_t nv_ghost_pass(struct nv_ghost *ghost, uint64_t mixed, uint64_t block, uint32_t tag, uint32_t wanted)
{
    const uint64_t bits = spread(mixed, block, tag);
    uint64_t *entry = entry_of(ghost, set_of(ghost, bits), print_of(bits));
    const uint32_t known = remembered(ghost, *entry) & wanted;

    *entry = without(*entry, wanted);
    if (wanted & ~known)
        *entry = with(ghost, *entry, print_of(bits), wanted & ~known);
    ghost->stamp += (uint32_t)__builtin_popcount(wanted & ~known);
    return known;
}
