/*
 * Little-endian numbers in bytes, as everything is that we write on disks. No alignment is asked for.
 */
#ifndef NV_LITTLE_H
#define NV_LITTLE_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

/* Both return where the next field begins. */
static inline uint8_t *nv_put32(uint8_t *to, uint32_t value)
{
    value = htole32(value);
    memcpy(to, &value, 4);
    return to + 4;
}

static inline uint8_t *nv_put64(uint8_t *to, uint64_t value)
{
    value = htole64(value);
    memcpy(to, &value, 8);
    return to + 8;
}

static inline uint32_t nv_get32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, 4);
    return le32toh(value);
}

static inline uint64_t nv_get64(const uint8_t *from)
{
    uint64_t value;

    memcpy(&value, from, 8);
    return le64toh(value);
}

#endif
