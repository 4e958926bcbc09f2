/*
 * What a VVol behind a write-back log may hold: the judge of nvlog. Each block has versions, numbered as they are written
 * (range order makes one after the other of them); a version's bytes name block and number, or are zeros. It is kept by
 * sector what has been seen, so that nothing goes back, and by block what was acknowledged and what is durable.
 *
 *   a read returns, per sector, no version older than the newest that was acknowledged or seen when it was asked for
 *   what failed, and was then not there, does not come later
 *   after a power cut a sector has no version older than the newest durable one; after a kill, than the newest acknowledged
 *   what a crash left is all there is from then on: a version that did not survive never comes back
 *   without bypasses a crash leaves a prefix of what was written, in order
 */
#ifndef NV_SIM_LOG_MODEL_H
#define NV_SIM_LOG_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#define MODEL_BLOCKS 64u
#define MODEL_BLOCK 4096u
#define MODEL_SECTORS 8u
#define MODEL_VERSIONS 4096u

struct model_block {
    uint32_t newest;                /* the last that was begun */
    uint32_t acknowledged;
    uint32_t durable;
    uint32_t life;                  /* versions from this number on are of this life */
    uint32_t base[MODEL_SECTORS];   /* of an earlier life only this one, which survived */
    uint32_t seen[MODEL_SECTORS];   /* the newest that a read returned */
    bool lost;                      /* the log has said that it cannot be read any more: */
    uint32_t gone;                  /* ... no version up to this one */
    bool zero[MODEL_VERSIONS];      /* version 0: the beginning */
    bool failed[MODEL_VERSIONS];    /* answered with an error: may be there, or in part, or not */
    uint8_t dead[MODEL_VERSIONS];   /* of a failed one, a bit per sector: a later read found it not there */
    uint32_t answered;              /* the last that was answered */
    uint32_t order[MODEL_VERSIONS]; /* when it was begun, over all blocks */
};

struct model {
    uint32_t blocks;
    uint32_t order;
    bool pure;                      /* nothing went past the log: prefixes are judged */
    struct model_block block[MODEL_BLOCKS];
};

void model_begin(struct model *model, uint32_t blocks);
/* The bytes of one block's version. */
void model_fill(uint8_t *bytes, uint64_t block, uint32_t version);
/* A change of these blocks begins: their bytes are put in, unless they are zeros (bytes NULL). */
void model_write(struct model *model, uint64_t first, uint64_t blocks, uint8_t *bytes);
void model_written(struct model *model, uint64_t first, uint64_t blocks, bool fua, bool failed);
struct model_least {                /* what a read of a block may not be older than */
    uint32_t sector[MODEL_SECTORS];
    uint32_t answered;              /* changes that were over when it began */
};
void model_read(const struct model *model, uint64_t first, uint64_t blocks, struct model_least *least);
void model_was_read(struct model *model, uint64_t first, uint64_t blocks, const struct model_least *least,
                    const uint8_t *bytes);
/* What a FLUSH that begins now makes durable: a number per block. */
void model_flush(const struct model *model, uint32_t *covered);
void model_flushed(struct model *model, const uint32_t *covered);
void model_lost(struct model *model, uint64_t block);
/* Everything was read after a crash: judge it, and forget what did not survive. */
void model_crashed(struct model *model, const uint8_t *bytes, bool cache_survived);

#endif
