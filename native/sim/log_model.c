/*
 * See log_model.h.
 */
#include "sim/log_model.h"

#include <assert.h>
#include <string.h>

#include "io/io_sim.h"

#define SECTOR (MODEL_BLOCK / MODEL_SECTORS)
#define NOTHING UINT32_MAX

void model_begin(struct model *model, uint32_t blocks)
{
    assert(blocks <= MODEL_BLOCKS);
    memset(model, 0, sizeof *model);
    model->blocks = blocks;
    for (uint32_t i = 0; i < blocks; i++) {
        model->block[i].zero[0] = true;
        model->block[i].life = 1;
    }
}

void model_fill(uint8_t *bytes, uint64_t block, uint32_t version)
{
    const uint64_t word = (block + 1) << 32 | version;

    for (uint32_t at = 0; at < MODEL_BLOCK; at += sizeof word)
        memcpy(bytes + at, &word, sizeof word);
}

void model_write(struct model *model, uint64_t first, uint64_t blocks, uint8_t *bytes)
{
    for (uint64_t i = 0; i < blocks; i++) {
        struct model_block *block = &model->block[first + i];
        block->newest++;
        assert(block->newest < MODEL_VERSIONS);
        block->zero[block->newest] = !bytes;
        block->failed[block->newest] = false;
        block->dead[block->newest] = 0;
        block->order[block->newest] = ++model->order;
        if (bytes)
            model_fill(bytes + i * MODEL_BLOCK, first + i, block->newest);
    }
}

void model_written(struct model *model, uint64_t first, uint64_t blocks, bool fua, bool failed)
{
    for (uint64_t i = 0; i < blocks; i++) {
        struct model_block *block = &model->block[first + i];
        block->failed[block->newest] = failed;
        block->answered = block->newest;
        if (failed)
            continue;
        block->acknowledged = block->newest;
        block->lost = false;
        if (fua)
            block->durable = block->newest;
    }
}

/* ---- what a sector holds ---- */

/* The version in a sector's bytes; zeros: `least` or a later version that is zeros. NOTHING: no version of this block. */
static uint32_t version_in(const struct model_block *block, uint64_t number, const uint8_t *bytes, uint32_t least)
{
    uint64_t word, other;

    memcpy(&word, bytes, sizeof word);
    for (uint32_t at = 0; at < SECTOR; at += sizeof word) {
        memcpy(&other, bytes + at, sizeof other);
        if (other != word)
            return NOTHING;
    }
    if (word == 0) {
        for (uint32_t version = least; version <= block->newest; version++)
            if (block->zero[version])
                return version;
        return NOTHING;
    }
    return word >> 32 == number + 1 && (uint32_t)word <= block->newest && !block->zero[(uint32_t)word] ? (uint32_t)word : NOTHING;
}

static bool allowed(const struct model_block *block, uint32_t sector, uint32_t version, uint32_t least)
{
    if (version == NOTHING || version < least || (block->dead[version] & 1u << sector))
        return false;
    return version >= block->life || version == block->base[sector];
}

/* Zeros may be of several versions: the oldest that is allowed is meant. */
static uint32_t judge(const struct model_block *block, uint64_t number, uint32_t sector, const uint8_t *bytes, uint32_t least,
                      const char *when)
{
    uint32_t version = version_in(block, number, bytes, least);

    while (version != NOTHING && block->zero[version] && !allowed(block, sector, version, least))
        version = version_in(block, number, bytes, version + 1);
    if (!allowed(block, sector, version, least)) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        nv_sim_violation("%s: block %llu sector %u holds %llx; versions %u..%u are allowed (life from %u, before it %u)", when,
                         (unsigned long long)number, sector, (unsigned long long)word, least, block->newest, block->life,
                         block->base[sector]);
    }
    return version;
}

/* ---- reads and flushes ---- */

void model_read(const struct model *model, uint64_t first, uint64_t blocks, struct model_least *least)
{
    for (uint64_t i = 0; i < blocks; i++) {
        const struct model_block *block = &model->block[first + i];
        for (uint32_t s = 0; s < MODEL_SECTORS; s++)
            least[i].sector[s] = block->seen[s] > block->acknowledged ? block->seen[s] : block->acknowledged;
        least[i].answered = block->answered;
    }
}

/* What had failed before the read began, and is not what it returned, never was. (Zeros do not tell whose they are.) */
static void bury(struct model_block *block, uint32_t sector, uint32_t version, uint32_t answered)
{
    for (uint32_t later = version + 1; later <= answered && !block->zero[version]; later++)
        if (block->failed[later])
            block->dead[later] |= (uint8_t)(1u << sector);
}

void model_was_read(struct model *model, uint64_t first, uint64_t blocks, const struct model_least *least,
                    const uint8_t *bytes)
{
    for (uint64_t i = 0; i < blocks; i++) {
        struct model_block *block = &model->block[first + i];
        for (uint32_t s = 0; s < MODEL_SECTORS; s++) {
            const uint32_t version = judge(block, first + i, s, bytes + i * MODEL_BLOCK + s * SECTOR,
                                           least[i].sector[s], "a read");
            bury(block, s, version, least[i].answered);
            if (version > block->seen[s])
                block->seen[s] = version;
        }
    }
}

void model_flush(const struct model *model, uint32_t *covered)
{
    for (uint32_t i = 0; i < model->blocks; i++)
        covered[i] = model->block[i].acknowledged;
}

void model_flushed(struct model *model, const uint32_t *covered)
{
    for (uint32_t i = 0; i < model->blocks; i++)
        if (covered[i] > model->block[i].durable && covered[i] > model->block[i].gone)
            model->block[i].durable = covered[i];
}

void model_lost(struct model *model, uint64_t block)
{
    model->block[block].lost = true;
    model->block[block].durable = 0; /* until it is overwritten, and that flushed */
    model->block[block].gone = model->block[block].acknowledged; /* nor by a FLUSH that was under way */
    model->block[block].life = 0;    /* what is below may be of any life */
}

/* ---- crashes ---- */

/*
 * Without bypasses: what was begun before a version that is there, is there, too. Writes of the same moment may have
 * gone into the log in any order, but each record is whole, so the order of beginning is that of the log here.
 */
static void judge_prefix(const struct model *model, const uint32_t *found)
{
    uint32_t newest = 0;

    for (uint32_t i = 0; i < model->blocks; i++)
        if (found[i] >= model->block[i].life && model->block[i].order[found[i]] > newest)
            newest = model->block[i].order[found[i]];
    for (uint32_t i = 0; i < model->blocks; i++) {
        const struct model_block *block = &model->block[i];
        uint32_t there = found[i];
        for (uint32_t version = there + 1; block->zero[there] && version <= block->newest; version++)
            if (block->zero[version]) /* zeros look the same: they may be the last ones */
                there = version;
        for (uint32_t version = there + 1; version <= block->newest; version++)
            if (version >= block->life && !block->failed[version] && block->order[version] < newest)
                nv_sim_violation("block %u has lost version %u, but a later write survived", i, version);
    }
}

void model_crashed(struct model *model, const uint8_t *bytes, bool cache_survived)
{
    uint32_t found[MODEL_BLOCKS];

    for (uint32_t i = 0; i < model->blocks; i++) {
        struct model_block *block = &model->block[i];
        uint32_t newest = 0;
        for (uint32_t s = 0; s < MODEL_SECTORS; s++) {
            const uint32_t promised = cache_survived ? block->acknowledged : block->durable;
            const uint32_t least = block->lost ? 0 : promised;
            block->seen[s] = judge(block, i, s, bytes + (uint64_t)i * MODEL_BLOCK + s * SECTOR, least, "after a crash");
            newest = block->seen[s] > newest ? block->seen[s] : newest;
        }
        found[i] = newest;
    }
    if (model->pure)
        judge_prefix(model, found);
    for (uint32_t i = 0; i < model->blocks; i++) {
        struct model_block *block = &model->block[i];
        uint32_t oldest = block->seen[0];
        for (uint32_t s = 1; s < MODEL_SECTORS; s++)
            oldest = block->seen[s] < oldest ? block->seen[s] : oldest;
        block->acknowledged = block->durable = oldest;
        block->life = block->newest + 1;
        memcpy(block->base, block->seen, sizeof block->base);
        block->lost = false;
    }
}
