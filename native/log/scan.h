/*
 * Recovery of a write-back log, without I/O: whose it is and whether it may be used (nv_log_judge), and its records one
 * after the other from the tail on (nv_log_scan). Who has the bytes hands them in; what is done with a record is his.
 *
 *     nv_log_scan_begin(&scan, &super, claim.epoch);
 *     while (nv_log_scan_wants(&scan, &offset, &length))
 *         if (nv_log_scan_take(&scan, bytes) == NV_LOG_SCAN_RECORD) ... scan.head, entries of scan.unit ...
 *
 * Invariants: a record is reported only if it is valid and so are all before it; after the end position, next and chain
 * are where the next life's BEGIN belongs; at most the ring is looked at, once.
 */
#ifndef NV_LOG_SCAN_H
#define NV_LOG_SCAN_H

#include <stdbool.h>
#include <stdint.h>

#include "log/format.h"

struct nv_log_claim {               /* what the registry says */
    uint8_t uuid[16];
    uint64_t epoch;
    uint64_t generation;
    uint64_t length;                /* bytes that the log's file or device has */
    bool dirty;                     /* a log holds data of this VVol: the one with ... */
    uint8_t id[16];
};

enum nv_log_verdict {
    NV_LOG_USABLE,                  /* what it holds is the VVol's */
    NV_LOG_FORMAT,                  /* nothing is there, and nothing is missed: format it */
    NV_LOG_MISSING,                 /* nothing is there (or something else), but the registry says that data is logged */
    NV_LOG_FOREIGN,                 /* not a log, or damaged; nothing is missed */
    NV_LOG_UNKNOWN_VERSION,
    NV_LOG_OTHER_VVOL,
    NV_LOG_OTHER_LOG,               /* of this VVol, but not the log that the registry means */
    NV_LOG_UNKNOWN_DATA,            /* it holds data, and the registry knows nothing of it */
    NV_LOG_REGISTRY_OLD,            /* its epoch or generation is above the registry's */
    NV_LOG_CUT,                     /* its ring is longer than its file */
    NV_LOG_TOO_MANY,                /* more records than a ring of its size can hold */
    NV_LOG_UNREADABLE,              /* an I/O error */
    NV_LOG_HANGS,                   /* its device has not answered within the deadline */
};

/* From the superblock alone; UNKNOWN_DATA and REGISTRY_OLD may still come from the records. */
enum nv_log_verdict nv_log_judge(enum nv_log_super_state state, const struct nv_log_super *super,
                                 const struct nv_log_claim *claim);
/* A short word for each verdict. */
const char *nv_log_verdict_name(enum nv_log_verdict verdict);

struct nv_log_scan {
    uint8_t id[16];
    uint64_t epoch_max;
    uint64_t ring;
    uint64_t begin;                 /* positions grow for ever; their place is position mod ring */
    uint64_t position;              /* of the record that is being looked at; at the end: behind the last valid one */
    uint64_t next;                  /* its sequence number */
    uint32_t chain;                 /* checksum of the head before it */
    bool has_head, over, newer;     /* newer: a record's epoch is above epoch_max */
    struct nv_log_head head;        /* of the record that was reported */
    uint64_t at;                    /* its position */
    uint8_t unit[NV_LOG_UNIT];      /* its head's bytes: entries */
};

enum nv_log_scan_result { NV_LOG_SCAN_MORE, NV_LOG_SCAN_RECORD, NV_LOG_SCAN_END };

void nv_log_scan_begin(struct nv_log_scan *scan, const struct nv_log_super *super, uint64_t epoch_max);
/* Which bytes of the ring are wanted next: they do not cross its end. False: the scan is over. */
bool nv_log_scan_wants(const struct nv_log_scan *scan, uint64_t *offset, uint64_t *length);
enum nv_log_scan_result nv_log_scan_take(struct nv_log_scan *scan, const uint8_t *bytes);

#endif
