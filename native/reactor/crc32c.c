/*
 * See crc32c.h. Both ways give the same number; which one runs is decided by the processor.
 */
#include "reactor/crc32c.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u

static uint32_t step(uint32_t crc)
{
    for (unsigned bit = 0; bit < 8; bit++)
        crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
    return crc;
}

static uint32_t table[256]; /* one for all: room for what each thread has is scarce in a library that is loaded late */
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++)
        table[i] = step(i);
}

static uint32_t by_table(uint32_t crc, const uint8_t *at, uint64_t length)
{
    pthread_once(&table_once, make_table);
    for (uint64_t i = 0; i < length; i++)
        crc = (crc >> 8) ^ table[(crc ^ at[i]) & 0xff];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const uint8_t *at, uint64_t length)
{
    uint64_t wide = crc, word;

    for (; length >= 8; at += 8, length -= 8) {
        memcpy(&word, at, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    for (; length > 0; at++, length--)
        wide = __builtin_ia32_crc32qi((uint32_t)wide, *at);
    return (uint32_t)wide;
}
#endif

uint32_t nv_crc32c(uint32_t crc, const void *bytes, uint64_t length)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return ~by_instruction(~crc, bytes, length);
#endif
    return ~by_table(~crc, bytes, length);
}
