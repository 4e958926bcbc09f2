/*
 * The NBD transmission phase on the wire: numbers from the protocol document and big-endian access. Nothing here has
 * state. (The handshake is Python's, nbdvvol/nbd/.)
 */
#ifndef NV_WIRE_H
#define NV_WIRE_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu
#define NBD_EXTENDED_REPLY_MAGIC 0x6e8a278cu
#define NBD_OPTION_MAGIC 0x49484156454F5054ull

#define NBD_REQUEST_BYTES 28u
#define NBD_EXTENDED_BYTES 32u       /* request and reply */
#define NBD_SIMPLE_BYTES 16u
#define NBD_CHUNK_BYTES 20u

enum nbd_command {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7,
};

#define NBD_CMD_FLAG_FUA 1u
#define NBD_CMD_FLAG_NO_HOLE 2u
#define NBD_CMD_FLAG_DF 4u
#define NBD_CMD_FLAG_REQ_ONE 8u
#define NBD_CMD_FLAG_FAST_ZERO 16u
#define NBD_CMD_FLAG_PAYLOAD_LEN 32u

#define NBD_FLAG_READ_ONLY 2u
#define NBD_FLAG_SEND_FLUSH 4u
#define NBD_FLAG_SEND_FUA 8u
#define NBD_FLAG_SEND_TRIM 32u
#define NBD_FLAG_SEND_WRITE_ZEROES 64u
#define NBD_FLAG_SEND_DF 128u
#define NBD_FLAG_CAN_MULTI_CONN 256u
#define NBD_FLAG_SEND_CACHE 1024u
#define NBD_FLAG_SEND_FAST_ZERO 2048u
#define NBD_FLAG_BLOCK_STATUS_PAYLOAD 4096u

#define NBD_REPLY_FLAG_DONE 1u
#define NBD_REPLY_TYPE_NONE 0u
#define NBD_REPLY_TYPE_OFFSET_DATA 1u
#define NBD_REPLY_TYPE_OFFSET_HOLE 2u
#define NBD_REPLY_TYPE_BLOCK_STATUS 5u
#define NBD_REPLY_TYPE_BLOCK_STATUS_EXT 6u
#define NBD_REPLY_TYPE_ERROR 0x8001u
#define NBD_REPLY_TYPE_ERROR_OFFSET 0x8002u
#define NBD_REPLY_TYPE_ERROR_BIT 0x8000u

static inline uint16_t get16(const uint8_t *from)
{
    uint16_t value;
    memcpy(&value, from, sizeof value);
    return be16toh(value);
}

static inline uint32_t get32(const uint8_t *from)
{
    uint32_t value;
    memcpy(&value, from, sizeof value);
    return be32toh(value);
}

static inline uint64_t get64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return be64toh(value);
}

static inline uint8_t *put16(uint8_t *to, uint16_t value)
{
    value = htobe16(value);
    memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

static inline uint8_t *put32(uint8_t *to, uint32_t value)
{
    value = htobe32(value);
    memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

static inline uint8_t *put64(uint8_t *to, uint64_t value)
{
    value = htobe64(value);
    memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

#endif
