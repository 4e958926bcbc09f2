/*
 * See meta.h. All integers on disk are little-endian; the checksum is CRC32C.
 */
#include "volume/meta.h"

#include <string.h>

#include "reactor/little.h"

#define VERSION 1u
#define LABEL_SEAL (NV_META_PAGE - 4u)
#define PAGE_SEAL (NV_PAGE_HEAD - 4u)

static const char label_magic[8] = "NVLABEL";
static const char page_magics[][8] = {
    [NV_PAGE_INTENT] = {'N', 'V', 'I', 'N', 'T', 'E', 'N', 'T'},
    [NV_PAGE_DIRTY] = {'N', 'V', 'D', 'I', 'R', 'T', 'Y', 0},
};

void nv_label_encode(const struct nv_label *label, uint8_t *slot)
{
    memset(slot, 0, NV_META_PAGE);
    memcpy(slot, label_magic, 8);
    nv_put32(nv_put32(slot + 8, VERSION), label->leg);
    memcpy(slot + 16, label->uuid, 16);
    nv_put64(nv_put64(slot + 32, label->epoch), label->generation);
    nv_put64(nv_put64(slot + 48, label->size), label->sequence);
    nv_put32(slot + 64, label->syncing);
    nv_put32(slot + LABEL_SEAL, nv_crc32c(0, slot, LABEL_SEAL));
}

static bool decode_label(const uint8_t *slot, struct nv_label *out)
{
    if (memcmp(slot, label_magic, 8) != 0 || nv_get32(slot + 8) != VERSION ||
        nv_get32(slot + LABEL_SEAL) != nv_crc32c(0, slot, LABEL_SEAL))
        return false;
    *out = (struct nv_label){.leg = nv_get32(slot + 12), .epoch = nv_get64(slot + 32), .generation = nv_get64(slot + 40),
                             .size = nv_get64(slot + 48), .sequence = nv_get64(slot + 56), .syncing = nv_get32(slot + 64)};
    memcpy(out->uuid, slot + 16, 16);
    return true;
}

bool nv_label_decode(const uint8_t *slots, struct nv_label *out)
{
    struct nv_label other;
    bool found = decode_label(slots, out);

    if (decode_label(slots + NV_META_PAGE, &other) && (!found || other.sequence > out->sequence)) {
        *out = other;
        found = true;
    }
    return found;
}

static uint32_t page_crc(const uint8_t *slot)
{
    return nv_crc32c(nv_crc32c(0, slot, PAGE_SEAL), slot + NV_PAGE_HEAD, NV_META_PAGE - NV_PAGE_HEAD);
}

void nv_page_seal(enum nv_page_kind kind, const struct nv_page_head *head, uint8_t *slot)
{
    uint8_t *to = slot + 64;

    memset(slot, 0, NV_PAGE_HEAD);
    memcpy(slot, page_magics[kind], 8);
    nv_put32(nv_put32(slot + 8, VERSION), head->number);
    memcpy(slot + 16, head->uuid, 16);
    nv_put64(nv_put64(nv_put64(slot + 32, head->sequence), head->epoch), head->generation);
    nv_put32(slot + 56, head->region_shift);
    for (unsigned i = 0; i < NV_LEGS_MAX; i++)
        to = nv_put32(to, head->lanes[i]);
    nv_put32(slot + PAGE_SEAL, page_crc(slot));
}

static bool open_slot(enum nv_page_kind kind, const uint8_t *uuid, uint32_t number, const uint8_t *slot,
                      struct nv_page_head *head)
{
    if (memcmp(slot, page_magics[kind], 8) != 0 || nv_get32(slot + 8) != VERSION || nv_get32(slot + 12) != number ||
        memcmp(slot + 16, uuid, 16) != 0 || nv_get32(slot + PAGE_SEAL) != page_crc(slot))
        return false;
    *head = (struct nv_page_head){.number = number, .sequence = nv_get64(slot + 32), .epoch = nv_get64(slot + 40),
                                  .generation = nv_get64(slot + 48), .region_shift = nv_get32(slot + 56)};
    memcpy(head->uuid, uuid, 16);
    for (unsigned i = 0; i < NV_LEGS_MAX; i++)
        head->lanes[i] = nv_get32(slot + 64 + 4 * i);
    return head->region_shift >= NV_REGION_SHIFT_MIN && head->region_shift <= NV_REGION_SHIFT_MAX;
}

static bool all_zero(const uint8_t *bytes, uint64_t length)
{
    for (uint64_t i = 0; i < length; i++)
        if (bytes[i])
            return false;
    return true;
}

enum nv_page_state nv_page_open(enum nv_page_kind kind, const uint8_t *uuid, uint32_t number, const uint8_t *slots,
                                struct nv_page_head *head, const uint8_t **bits)
{
    struct nv_page_head other;
    bool found = open_slot(kind, uuid, number, slots, head);

    *bits = slots + NV_PAGE_HEAD;
    if (open_slot(kind, uuid, number, slots + NV_META_PAGE, &other) && (!found || other.sequence > head->sequence)) {
        *head = other;
        *bits = slots + NV_META_PAGE + NV_PAGE_HEAD;
        found = true;
    }
    if (found)
        return NV_PAGE_VALID;
    return all_zero(slots, 2u * NV_META_PAGE) ? NV_PAGE_BLANK : NV_PAGE_DAMAGED;
}
