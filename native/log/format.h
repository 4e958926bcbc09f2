/*
 * The write-back log on disk, by byte offset: a pure codec, no I/O and no policy. datastores/logformat.py reads the same.
 * All integers are little-endian, all checksums CRC32C; a unit is 4096 bytes, as is a block of the VVol.
 *
 * Superblock, two copies, at 0 and at 4096; the copy is sequence mod 2. Written with DSYNC
 *     0   8   magic `NVWBLOG\0`        8   4   version (1)         12  4   zero
 *     16  16  VVol UUID                32  16  log id, random when it was formatted
 *     48  8   sequence of this copy    56  8   epoch               64  8   generation
 *     72  8   bytes of the ring        80  8   tail: offset in the ring of the oldest live record
 *     88  8   sequence number of that record (or of the next one, if none is live)
 *     96  4   chain value before it    100 24  zeros               124 4   checksum of bytes 0..123 and 128..4095
 *     128 3968 zeros
 * Ring, from 8192 on; a record lies whole. What would cross the end begins at 0 again, behind a PAD that takes what is left
 * Record: a head of one unit, then a unit of data for each of its DATA entries, in their order
 *     0   8   magic `NVWBREC\0`        8   16  log id              24  8   sequence number, one more than the last
 *     32  4   chain: the checksum of the head before (its bytes 60..63)
 *     36  4   entries                  40  4   units in all        44  4   kind: 1 WRITES, 2 BEGIN, 3 PAD
 *     48  8   epoch                    56  4   zero                60  4   checksum of the head but these 4 bytes
 *     64  16  BEGIN: a random number, else zeros
 *     80  24  each entry (0..160): 8 block, 4 blocks, 4 kind (1 DATA, 2 ZERO, 3 TOMBSTONE),
 *             4 DATA: checksum of its data; TOMBSTONE: high half of blocks, 4 zero
 *     the rest of the unit: zeros
 *
 * Validity. A superblock is valid when magic, version, checksum and bounds agree; of two valid copies the higher sequence
 * counts. A record is valid when its head is (magic, checksum, bounds), it *follows* the one before (log id, sequence number
 * exactly the next, chain exactly its checksum), and the checksums of all its data are right. The log's state is what the
 * records from the tail up to the first one that is not valid say: a contiguous prefix (scan.h). Each life begins with a
 * BEGIN in the place of the first invalid record, whose random number makes a chain of its own: what an earlier life left
 * behind it, whole or not, never follows.
 */
#ifndef NV_LOG_FORMAT_H
#define NV_LOG_FORMAT_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

struct nv_log_super {
    uint8_t uuid[16];
    uint8_t id[16];
    uint64_t sequence;
    uint64_t epoch;
    uint64_t generation;
    uint64_t ring;                  /* bytes */
    uint64_t tail;                  /* offset in the ring */
    uint64_t next;                  /* sequence number of the record there */
    uint32_t chain;                 /* checksum of the record before it */
};

enum nv_log_super_state {
    NV_LOG_SUPER_VALID,
    NV_LOG_SUPER_BLANK,             /* both copies are zeros */
    NV_LOG_SUPER_FOREIGN,           /* something else is there, or both copies are damaged */
    NV_LOG_SUPER_VERSION,           /* a whole copy of a version that we do not know */
};

enum nv_log_record_kind { NV_LOG_WRITES = 1, NV_LOG_BEGIN, NV_LOG_PAD };
enum nv_log_entry_kind { NV_LOG_DATA = 1, NV_LOG_ZERO, NV_LOG_TOMBSTONE };

struct nv_log_head {
    uint8_t id[16];
    uint64_t sequence;
    uint32_t chain;
    uint32_t entries;
    uint32_t units;
    uint32_t kind;
    uint64_t epoch;
    uint8_t random[16];
    uint32_t seal;                  /* its checksum */
};

struct nv_log_entry {
    uint64_t block;
    uint64_t blocks;                /* DATA: 1; ZERO: 1..NV_LOG_ZERO_BLOCKS; TOMBSTONE: any number */
    uint32_t kind;
    uint32_t crc;                   /* DATA */
};

/* One copy of NV_LOG_UNIT bytes. */
void nv_log_super_encode(const struct nv_log_super *super, uint8_t *copy);
/* Both copies, 2 * NV_LOG_UNIT bytes. VALID: *out is the newer one. */
enum nv_log_super_state nv_log_super_decode(const uint8_t *copies, struct nv_log_super *out);

/* The entry numbered `index` of a head that is being made, or was found valid. */
void nv_log_entry_encode(uint8_t *unit, uint32_t index, const struct nv_log_entry *entry);
void nv_log_entry_decode(const uint8_t *unit, uint32_t index, struct nv_log_entry *out);
/* Fill in the fixed part of a head whose entries are in place (the rest being zeros); sets head->seal. */
void nv_log_head_encode(struct nv_log_head *head, uint8_t *unit);
/* False: this is no whole head. Says nothing of what it follows. */
bool nv_log_head_decode(const uint8_t *unit, struct nv_log_head *out);
/* Does a head that is whole belong right behind the record with this sequence number - 1 and this seal? */
bool nv_log_head_follows(const struct nv_log_head *head, const uint8_t *id, uint64_t next, uint32_t chain);
/* Are the data of a WRITES record what its entries say? `data` is units - 1 units. */
bool nv_log_data_valid(const uint8_t *unit, const struct nv_log_head *head, const uint8_t *data);

#endif
