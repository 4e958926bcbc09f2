/*
 * The on-disk structures of a mirror's leg by byte offset (docs/mirror.md section 5): label, intent page, page of dirty
 * maps. A pure codec: no I/O, no policy. Each structure has two slots and a sequence number; what is not valid is never
 * guessed at.
 */
#ifndef NV_META_H
#define NV_META_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"
#include "reactor/crc32c.h"

#define NV_PAGE_HEAD 128u            /* of intent and dirty pages; the bits follow */

struct nv_label {
    uint8_t uuid[16];
    uint32_t leg;
    uint32_t syncing;               /* 1: not in sync, it is being copied to */
    uint64_t epoch;
    uint64_t generation;
    uint64_t size;
    uint64_t sequence;              /* the slot is sequence mod 2 */
};

enum nv_page_kind { NV_PAGE_INTENT, NV_PAGE_DIRTY };

struct nv_page_head {
    uint8_t uuid[16];
    uint32_t number;
    uint32_t region_shift;
    uint64_t sequence;              /* the slot is sequence mod 2 */
    uint64_t epoch;
    uint64_t generation;
    uint32_t lanes[NV_LEGS_MAX];    /* DIRTY: leg ids; 0: unused */
};

enum nv_page_state {
    NV_PAGE_BLANK,                  /* both slots are zeros: never written */
    NV_PAGE_VALID,
    NV_PAGE_DAMAGED,                /* no slot is valid, and not both are zeros */
};

/* One slot of NV_META_PAGE bytes. */
void nv_label_encode(const struct nv_label *label, uint8_t *slot);
/* The newest valid label of both slots, whoever's it is; false: there is none. */
bool nv_label_decode(const uint8_t *slots, struct nv_label *out);

/* Fill in the head of a slot whose bits are in place. */
void nv_page_seal(enum nv_page_kind kind, const struct nv_page_head *head, uint8_t *slot);
/* Look at both slots of a page of this volume. VALID: *head is filled in and *bits points into `slots`. */
enum nv_page_state nv_page_open(enum nv_page_kind kind, const uint8_t *uuid, uint32_t number, const uint8_t *slots,
                                struct nv_page_head *head, const uint8_t **bits);

#endif
