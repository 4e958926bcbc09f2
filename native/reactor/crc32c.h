/*
 * CRC32C (Castagnoli), the checksum of everything that we write on disks. With the processor's own instruction where
 * it has one, else by a table.
 */
#ifndef NV_CRC32C_H
#define NV_CRC32C_H

#include <stdint.h>

/* Continue `crc` (0 to begin) over these bytes. */
uint32_t nv_crc32c(uint32_t crc, const void *bytes, uint64_t length);

#endif
