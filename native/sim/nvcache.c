/*
 * nvcache: the cache's core (native/cache) under threads of the real machine, because its hits take no lock. Each block of a
 * pretended storage has a version; who writes raises it between the cache's begins and ends, who reads fills what it found
 * or looks at what it hits: a hit's bytes must be of one version, not older than the last that was acknowledged before,
 * and stay what they are while they are pinned. Now and then the cache is held and released.
 *
 * usage: nvcache THREADS ROUNDS SEED
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "cache/cache.h"
#include "sim/random.h"

#define BLOCKS 1024u
#define FRAMES 512u
#define THREADS_MAX 16u
#define WORDS (NV_CACHE_BLOCK / sizeof(uint64_t))

static struct {
    struct nv_cache *cache;
    pthread_mutex_t locks[BLOCKS]; /* the range order */
    _Atomic uint64_t stored[BLOCKS], acknowledged[BLOCKS];
    _Atomic uint64_t hits, fills;
} world;

struct actor {
    pthread_t thread;
    struct sim_random random;
    long rounds;
    uint64_t bytes[WORDS];
};

_Noreturn static void fail(const char *what, uint64_t block)
{
    fprintf(stderr, "VIOLATION: block %lu: %s\n", (unsigned long)block, what);
    exit(1);
}

static const uint8_t *bytes_of(struct actor *actor, uint64_t version)
{
    for (size_t i = 0; i < WORDS; i++)
        actor->bytes[i] = version;
    return (const uint8_t *)actor->bytes;
}

static void write_block(struct actor *actor, uint64_t block)
{
    const bool keep = sim_random_chance(&actor->random, 512);
    uint64_t time, version;

    pthread_mutex_lock(&world.locks[block]);
    time = nv_cache_write_begins(world.cache, 0, block, 1);
    version = atomic_fetch_add(&world.stored[block], 1) + 1;
    nv_cache_write_ends(world.cache, 0, block, 1, time, block, 1, keep ? bytes_of(actor, version) : NULL);
    atomic_store(&world.acknowledged[block], version);
    pthread_mutex_unlock(&world.locks[block]);
}

static void look_at(uint32_t frame, uint64_t block, uint64_t least)
{
    const uint64_t *words = (const uint64_t *)nv_cache_bytes(world.cache, frame);
    const uint64_t version = words[0];

    if (version < least)
        fail("a hit is older than an acknowledged write", block);
    for (unsigned again = 0; again < 2; again++)
        for (size_t i = 0; i < WORDS; i++)
            if (words[i] != version)
                fail("a pinned frame is torn, or has changed", block);
}

static void read_block(struct actor *actor, uint64_t block)
{
    const uint64_t least = atomic_load(&world.acknowledged[block]);
    const struct nv_cache_spot spot = {0, nv_cache_tag(world.cache, 0), block, false};
    uint64_t since;
    uint32_t frame;

    if (spot.tag == 0)
        return;
    frame = nv_cache_pin(world.cache, &spot);
    if (frame != NV_CACHE_NONE) {
        look_at(frame, block, least);
        nv_cache_unpin(world.cache, frame);
        atomic_fetch_add_explicit(&world.hits, 1, memory_order_relaxed);
        return;
    }
    since = nv_cache_now(world.cache);
    bytes_of(actor, atomic_load(&world.stored[block]));
    if (nv_cache_fill(world.cache, &spot, 1, since, (const uint8_t *)actor->bytes, false).filled)
        atomic_fetch_add_explicit(&world.fills, 1, memory_order_relaxed);
}

static void *act(void *argument)
{
    struct actor *actor = argument;

    for (long i = 0; i < actor->rounds; i++) {
        const uint64_t space = sim_random_chance(&actor->random, 700) ? BLOCKS / 16 : BLOCKS;
        const uint64_t block = sim_random_below(&actor->random, space), what = sim_random_below(&actor->random, 10000);
        if (what == 0) {
            nv_cache_hold(world.cache, 0);
            nv_cache_release(world.cache, 0);
        } else if (what < 1500) {
            write_block(actor, block);
        } else {
            read_block(actor, block);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const long threads = argc == 4 ? strtol(argv[1], NULL, 10) : 0, rounds = argc == 4 ? strtol(argv[2], NULL, 10) : 0;
    static struct actor actors[THREADS_MAX];
    const char *wrong;

    if (threads < 1 || threads > (long)THREADS_MAX || rounds < 1 ||
        nv_cache_create((uint64_t)FRAMES * NV_CACHE_BLOCK, 1, 2, &world.cache) != 0) {
        fputs("usage: nvcache THREADS ROUNDS SEED\n", stderr);
        return 2;
    }
    nv_cache_open(world.cache, 0);
    nv_cache_release(world.cache, 0);
    for (unsigned i = 0; i < BLOCKS; i++)
        pthread_mutex_init(&world.locks[i], NULL);
    for (long i = 0; i < threads; i++) {
        actors[i].rounds = rounds;
        actors[i].random.state = (uint64_t)(strtol(argv[3], NULL, 10) * 1000 + i + 1) * 0x2545f4914f6cdd1dull;
        if (pthread_create(&actors[i].thread, NULL, act, &actors[i]) != 0)
            fail("no thread", 0);
    }
    for (long i = 0; i < threads; i++)
        pthread_join(actors[i].thread, NULL);
    wrong = nv_cache_check(world.cache);
    if (wrong)
        fail(wrong, 0);
    nv_cache_free(world.cache);
    printf("%lu hits, %lu fills, no violation\n", (unsigned long)world.hits, (unsigned long)world.fills);
    return 0;
}
