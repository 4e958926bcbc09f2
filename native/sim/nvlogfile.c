/*
 * nvlogfile: the write-back log's format in files, so that the reader in Python can be held against the one in C.
 *
 * usage: nvlogfile make FILE RING SEED RECORDS [KEEP]   a log of some lives, whose oldest record is so old that KEEP are live
 *        nvlogfile scan FILE UUID EPOCH GENERATION [ID] what recovery finds, one line each; ID: the registry says "dirty"
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log/scan.h"
#include "reactor/crc32c.h"
#include "sim/random.h"

_Noreturn static void fail(const char *what)
{
    fprintf(stderr, "nvlogfile: %s\n", what);
    exit(2);
}

/* ---- make ---- */

struct maker {
    struct sim_random random;
    struct nv_log_super super;
    uint8_t *image;
    uint64_t position, sequence;
    uint32_t chain;
};

static void fill(struct maker *maker, uint8_t *bytes, uint64_t size)
{
    for (uint64_t i = 0; i < size; i += 8) {
        const uint64_t word = sim_random_next(&maker->random);
        memcpy(bytes + i, &word, size - i < 8 ? size - i : 8);
    }
}

static void add(struct maker *maker, uint8_t *unit, struct nv_log_head *head)
{
    memcpy(head->id, maker->super.id, 16);
    head->sequence = maker->sequence++;
    head->chain = maker->chain;
    head->epoch = maker->super.epoch;
    nv_log_head_encode(head, unit);
    maker->chain = head->seal;
    maker->position += head->units * (uint64_t)NV_LOG_UNIT;
}

static uint8_t *here(const struct maker *maker)
{
    return maker->image + NV_LOG_RING + maker->position % maker->super.ring;
}

static void pad(struct maker *maker, uint32_t units)
{
    const uint64_t left = maker->super.ring - maker->position % maker->super.ring;
    struct nv_log_head head = {.kind = NV_LOG_PAD, .units = (uint32_t)(left / NV_LOG_UNIT)};

    if (units * (uint64_t)NV_LOG_UNIT <= left)
        return;
    memset(here(maker), 0, NV_LOG_UNIT);
    add(maker, here(maker), &head);
}

static void begin(struct maker *maker)
{
    struct nv_log_head head = {.kind = NV_LOG_BEGIN, .units = 1};

    fill(maker, head.random, 16);
    memset(here(maker), 0, NV_LOG_UNIT);
    add(maker, here(maker), &head);
}

static void writes(struct maker *maker)
{
    struct nv_log_head head = {.kind = NV_LOG_WRITES, .units = 1};
    const uint32_t count = 1 + (uint32_t)sim_random_below(&maker->random, 6);
    uint8_t unit[NV_LOG_UNIT] = {0}, data[6 * NV_LOG_UNIT], *to;

    for (; head.entries < count; head.entries++) {
        struct nv_log_entry entry = {.block = sim_random_below(&maker->random, 64), .blocks = 1, .kind = NV_LOG_DATA};
        const uint64_t kind = sim_random_below(&maker->random, 8);
        if (kind == 0)
            entry = (struct nv_log_entry){entry.block, 1 + sim_random_below(&maker->random, 9), NV_LOG_ZERO, 0};
        else if (kind == 1)
            entry = (struct nv_log_entry){entry.block, 1 + sim_random_below(&maker->random, 1ull << 40), NV_LOG_TOMBSTONE, 0};
        if (entry.kind == NV_LOG_DATA) {
            to = data + (head.units++ - 1) * NV_LOG_UNIT;
            fill(maker, to, NV_LOG_UNIT);
            entry.crc = nv_crc32c(0, to, NV_LOG_UNIT);
        }
        nv_log_entry_encode(unit, head.entries, &entry);
    }
    pad(maker, head.units);
    to = here(maker);
    memcpy(to + NV_LOG_UNIT, data, (head.units - 1) * NV_LOG_UNIT);
    memcpy(to, unit, NV_LOG_UNIT);
    add(maker, to, &head);
}

static int make(const char *path, uint64_t ring, uint64_t seed, uint64_t records, uint64_t keep)
{
    struct maker maker = {.random = {seed}};
    FILE *file = fopen(path, "wb");

    if (!file || ring < NV_LOG_RING_MIN || ring % NV_LOG_UNIT)
        fail("no such file, or a ring too small");
    maker.image = calloc(1, NV_LOG_RING + ring);
    if (!maker.image)
        fail("no memory");
    maker.super = (struct nv_log_super){.sequence = 1 + sim_random_below(&maker.random, 9), .epoch = 3, .generation = 5,
                                        .ring = ring};
    fill(&maker, maker.super.uuid, 16);
    fill(&maker, maker.super.id, 16);
    maker.sequence = 1000;
    for (uint64_t i = 0; i < records; i++) {
        if (i + keep == records || i == 0) {
            maker.super.tail = maker.position % ring;
            maker.super.next = maker.sequence;
            maker.super.chain = maker.chain;
        }
        if (sim_random_chance(&maker.random, 100))
            begin(&maker);
        else
            writes(&maker);
    }
    nv_log_super_encode(&maker.super, maker.image + (maker.super.sequence & 1) * NV_LOG_UNIT);
    if (fwrite(maker.image, 1, NV_LOG_RING + ring, file) != NV_LOG_RING + ring || fclose(file) != 0)
        fail("cannot write");
    free(maker.image);
    return 0;
}

/* ---- scan ---- */

static void unhex(const char *text, uint8_t out[16])
{
    for (unsigned i = 0; i < 16; i++)
        if (sscanf(text + 2 * i, "%2hhx", &out[i]) != 1)
            fail("not a UUID in 32 digits");
}

static void print_record(const struct nv_log_scan *scan)
{
    static const char *const kinds[] = {"", "data", "zero", "tombstone"};

    printf("record %" PRIu64 " kind %u at %" PRIu64 " units %u\n", scan->head.sequence, scan->head.kind, scan->at,
           scan->head.units);
    for (uint32_t i = 0; i < scan->head.entries; i++) {
        struct nv_log_entry entry;
        nv_log_entry_decode(scan->unit, i, &entry);
        printf("  %s %" PRIu64 " %" PRIu64 " %08x\n", kinds[entry.kind], entry.block, entry.blocks, entry.crc);
    }
}

static int scan_image(const uint8_t *image, const struct nv_log_claim *claim)
{
    struct nv_log_super super = {.sequence = 0};
    enum nv_log_verdict verdict = nv_log_judge(nv_log_super_decode(image, &super), &super, claim);
    struct nv_log_scan scan;
    uint64_t offset, length;

    printf("%s\n", nv_log_verdict_name(verdict));
    if (verdict != NV_LOG_USABLE)
        return 0;
    nv_log_scan_begin(&scan, &super, claim->epoch);
    while (nv_log_scan_wants(&scan, &offset, &length))
        if (nv_log_scan_take(&scan, image + NV_LOG_RING + offset) == NV_LOG_SCAN_RECORD)
            print_record(&scan);
    printf("end %" PRIu64 " next %" PRIu64 " chain %08x%s\n", scan.position, scan.next, scan.chain, scan.newer ? " newer" : "");
    return 0;
}

static int scan_file(int argc, char **argv)
{
    struct nv_log_claim claim = {.epoch = strtoull(argv[4], NULL, 10), .generation = strtoull(argv[5], NULL, 10)};
    const int fd = open(argv[2], O_RDONLY | O_CLOEXEC);
    struct stat stat;
    const uint8_t *image;

    if (fd < 0 || fstat(fd, &stat) != 0 || stat.st_size < (off_t)NV_LOG_RING)
        fail("no such file, or shorter than two superblocks");
    claim.length = (uint64_t)stat.st_size;
    unhex(argv[3], claim.uuid);
    claim.dirty = argc == 7;
    if (claim.dirty)
        unhex(argv[6], claim.id);
    image = mmap(NULL, claim.length, PROT_READ, MAP_PRIVATE, fd, 0);
    if (image == MAP_FAILED)
        fail("cannot map the file");
    return scan_image(image, &claim);
}

int main(int argc, char **argv)
{
    if (argc >= 6 && argc <= 7 && strcmp(argv[1], "make") == 0)
        return make(argv[2], strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10), strtoull(argv[5], NULL, 10),
                    argc == 7 ? strtoull(argv[6], NULL, 10) : UINT64_MAX);
    if ((argc == 6 || argc == 7) && strcmp(argv[1], "scan") == 0)
        return scan_file(argc, argv);
    fputs("usage: nvlogfile make FILE RING SEED RECORDS [KEEP] | scan FILE UUID EPOCH GENERATION [ID]\n", stderr);
    return 2;
}
