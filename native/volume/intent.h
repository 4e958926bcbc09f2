/*
 * The regions of a mirror: who may differ where. A region's state byte tells whether its intent bit is durable on every
 * live leg; its dirty byte which lanes may lack what is there. States change on the owner reactor alone, so the fast
 * path of a write is a load, a compare and a count. Pages of intent bits are written by group commit: one write of a
 * page at a time, and whoever comes meanwhile joins the next one.
 *
 * What is not here: what is written to legs (mirror_write.c), when bits may be cleared for good (mirror_task.c).
 */
#ifndef NV_INTENT_H
#define NV_INTENT_H

#include <stdbool.h>
#include <stdint.h>

struct nv_mio;
struct nv_mirror;

enum nv_region_state {
    NV_REGION_CLEAN,                /* the bit is 0 on disk */
    NV_REGION_SETTING,              /* it is to be 1: requests wait */
    NV_REGION_SET,                  /* it is 1 on every live leg */
    NV_REGION_CLEANING,             /* ... and a flush before clearing it is under way; a request makes it SET */
    NV_REGION_CLEARING,             /* it is being cleared: a request makes it SETTING */
};
#define NV_REGION_STATE 0x0fu
#define NV_REGION_TOUCHED 0x10u     /* by a request since the last sweep */
#define NV_REGION_DOUBTFUL 0x20u    /* in-sync legs may differ here: not reconciled yet */
#define NV_REGION_REWRITE 0x40u     /* a failed sync may have lost what is visible here: to be written once more */

struct nv_intent_page {
    uint64_t sequence;              /* of the newest copy on disk */
    bool writing;
    bool wanted;                    /* write it (again) */
    bool forced;                    /* ... for a leg that has just joined: the write under way does not count */
    bool forcing;                   /* the write under way is the forced one */
};

struct nv_intent {
    uint32_t regions;
    uint32_t shift;
    uint8_t *state;
    uint16_t *in_flight;            /* requests, from before they wait for the bit until they have landed */
    uint8_t *dirty;                 /* lanes that may lack what is there: a subset of it is on disk with the intents */
    uint8_t *copied;                /* ... and have been copied, but not made durable */
    uint32_t set_count;             /* regions that are not CLEAN */
    uint32_t doubtful_count;
    uint32_t rewrite_count;
    struct nv_intent_page *pages;
    uint32_t page_count;
    uint64_t *dirty_sequence;       /* per page of dirty maps: of the newest copy on disk */
    bool *dirty_unsaved;            /* ... it differs from memory */
    uint32_t dirty_page_count;
    struct nv_mio *waiting, **waiting_tail; /* for a bit */
    uint32_t writes_out;            /* pages being written */
};

/* 0 or -ENOMEM. */
int nv_intent_create(struct nv_intent *intent, uint64_t size, uint32_t shift);
void nv_intent_free(struct nv_intent *intent);
/* All CLEAN, nothing dirty; sequences stay. */
void nv_intent_reset(struct nv_intent *intent);

/* Count a request's regions as in flight; true if it may go at once, else put its mio on the waiting list. */
bool nv_intent_enter(struct nv_mirror *mirror, uint64_t offset, uint64_t length);
void nv_intent_leave(struct nv_mirror *mirror, uint64_t offset, uint64_t length);
void nv_intent_wait(struct nv_mirror *mirror, struct nv_mio *mio);
/* The lanes may lack what is written to the range. */
void nv_intent_dirty(struct nv_mirror *mirror, uint64_t offset, uint64_t length, uint8_t lanes);
/* The lanes are lost: they may lack whatever has its intent set, or is copied and not durable. */
void nv_intent_lost(struct nv_mirror *mirror, uint8_t lanes);
/* The regions of the range that are not CLEAN are to be written once more before their bits may be cleared. */
void nv_intent_suspect(struct nv_intent *intent, uint64_t offset, uint64_t length);
/* Every region, or none any more, is dirty for the lanes. */
void nv_intent_dirty_all(struct nv_mirror *mirror, uint8_t lanes);
void nv_intent_forget(struct nv_mirror *mirror, uint8_t lanes);
void nv_intent_set_state(struct nv_intent *intent, uint32_t region, enum nv_region_state state);

/* Write the pages that are wanted and not being written. */
void nv_intent_commit(struct nv_mirror *mirror);
/* Have every page written anew; nv_intent_forced() says when that is done. */
void nv_intent_force(struct nv_mirror *mirror);
bool nv_intent_forced(const struct nv_mirror *mirror);

/* Read what a page says: its intents become SET, or, as the `own` ones of a lane, dirty for it. Unreadable: all of them. */
void nv_intent_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable, uint8_t own);
/* The dirty bits of the lanes that the page names; these lanes. */
uint8_t nv_dirty_merge(struct nv_mirror *mirror, uint32_t page, const uint8_t *slots, bool readable);
/* A page of dirty maps, sealed with its next sequence. */
void nv_dirty_build(struct nv_mirror *mirror, uint32_t page, uint8_t *slot);

static inline uint32_t nv_region_of(const struct nv_intent *intent, uint64_t offset)
{
    return (uint32_t)(offset >> intent->shift);
}

static inline enum nv_region_state nv_region_state(const struct nv_intent *intent, uint32_t region)
{
    return intent->state[region] & NV_REGION_STATE;
}

#endif
