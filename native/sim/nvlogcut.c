/*
 * nvlogcut: a run of the write-back log on io_uring and real files, and every moment of it at which the power might have gone
 * (log_cut.h). The load is made here, by chance, or it is fio's: then this is an NBD server (log_cut_serve.h).
 *
 * usage: nvlogcut FOLDER SEED CUTS          as many of the boundaries of records; each may be torn inside
 *        nvlogcut FOLDER SEED CUTS SOCKET   what clients of SOCKET ask for, until standard input ends
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "sim/log_cut.h"
#include "sim/log_cut_serve.h"

#define REQUESTS 3000u

/* False: a block of it is busy. */
static bool ask(struct cut_request *request)
{
    struct sim_random *random = &cut_run.random;
    const uint64_t what = sim_random_below(random, 100), first = sim_random_below(random, CUT_BLOCKS - CUT_REQUEST_BLOCKS);
    const uint64_t blocks = 1 + (sim_random_chance(random, 300) ? sim_random_below(random, CUT_REQUEST_BLOCKS) : 0);

    if (what < 10)
        return cut_ask(request, NV_LOG_FLUSH, 0, 0, 0);
    if (what < 15)
        return cut_ask(request, NV_LOG_ZEROES, 0, first, blocks);
    for (uint64_t i = 0; i < blocks; i++)
        model_fill(request->data + i * MODEL_BLOCK, first + i, cut_run.versions[first + i] + 1);
    return cut_ask(request, NV_LOG_WRITE, what < 20 ? NV_LOG_FUA : 0, first, blocks);
}

static void load(void)
{
    uint32_t asked = 0, busy = 1;

    while (asked < REQUESTS || busy) {
        busy = 0;
        for (uint32_t i = 0; i < CUT_DEPTH; i++) {
            struct cut_request *request = &cut_run.requests[i];
            if (!request->used && asked < REQUESTS && sim_random_chance(&cut_run.random, 500))
                asked += ask(request);
            busy += request->used;
        }
        cut_turn();
    }
}

int main(int argc, char **argv)
{
    const uint32_t wanted = argc == 4 || argc == 5 ? (uint32_t)strtoul(argv[3], NULL, 10) : 0;
    uint32_t boundaries, cuts;

    if (wanted == 0) {
        fputs("usage: nvlogcut FOLDER SEED CUTS [SOCKET]\n", stderr);
        return 2;
    }
    cut_begin(argv[1], strtoull(argv[2], NULL, 10), argc == 5 ? CUT_STREAM_BYTES : 0);
    if (argc == 5)
        cut_serve(argv[4]);
    else
        load();
    cut_end();
    cuts = cut_judge(wanted, &boundaries);
    printf("%u events, %u boundaries of records, %u cuts, no violation\n", cut_run.events, boundaries, cuts);
    return 0;
}
