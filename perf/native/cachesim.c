/*
 * Drives the data plane's own cache (native/cache) with a trace: block numbers on stdin, 64 bits each in the machine's order.
 * A block that is not there is put in, as a read that went to the storage would. Prints hits, requests and nanoseconds.
 *
 * usage: cachesim FRAMES SHARDS
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cache/cache.h"

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static bool request(struct nv_cache *cache, uint64_t block)
{
    static const uint8_t bytes[NV_CACHE_BLOCK];
    const struct nv_cache_spot spot = {0, nv_cache_tag(cache, 0), block, false};
    const uint32_t frame = nv_cache_pin(cache, &spot);

    if (frame != NV_CACHE_NONE) {
        nv_cache_unpin(cache, frame);
        return true;
    }
    (void)nv_cache_fill(cache, &spot, 1, nv_cache_now(cache), bytes, false);
    return false;
}

int main(int argc, char **argv)
{
    const unsigned long frames = argc == 3 ? strtoul(argv[1], NULL, 10) : 0, shards = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    static uint64_t blocks[65536];
    uint64_t hits = 0, requests = 0, spent_ns = 0;
    struct nv_cache *cache;
    const char *wrong;
    size_t got;

    if (!frames || !shards || nv_cache_create((uint64_t)frames * NV_CACHE_BLOCK, 1, (uint32_t)shards, &cache) != 0) {
        fputs("usage: cachesim FRAMES SHARDS\n", stderr);
        return 2;
    }
    nv_cache_open(cache, 0);
    nv_cache_release(cache, 0);
    while ((got = fread(blocks, sizeof *blocks, sizeof blocks / sizeof *blocks, stdin)) > 0) {
        const uint64_t start = now_ns();
        for (size_t i = 0; i < got; i++)
            hits += request(cache, blocks[i]);
        spent_ns += now_ns() - start;
        requests += got;
    }
    wrong = nv_cache_check(cache);
    nv_cache_free(cache);
    if (wrong) {
        fprintf(stderr, "cachesim: %s\n", wrong);
        return 1;
    }
    printf("%lu %lu %lu\n", (unsigned long)hits, (unsigned long)requests, (unsigned long)spent_ns);
    return 0;
}
