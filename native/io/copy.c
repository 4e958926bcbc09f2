/* See copy.h. */
#include "io/copy.h"

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>

#define LEAST_BYTES 1024u /* a shorter copy is not worth a fence */
#define STEP 256u         /* bytes: four cache lines */

/* `to` is aligned to 32 bytes; both ends are whole steps. */
__attribute__((target("avx"))) static void copy_past_cache(uint8_t *to, const uint8_t *from, size_t length)
{
    for (size_t at = 0; at < length; at += STEP) {
#pragma GCC unroll 8
        for (size_t part = 0; part < STEP; part += 32)
            _mm256_stream_si256((__m256i *)(void *)(to + at + part),
                                _mm256_loadu_si256((const __m256i *)(const void *)(from + at + part)));
    }
    _mm_sfence(); /* who hears of the write has to find it */
}
#endif

void nv_copy_past_cache(void *to, const void *from, size_t length)
{
#ifdef __x86_64__
    if (length >= LEAST_BYTES && length % STEP == 0 && (uintptr_t)to % 32 == 0 && __builtin_cpu_supports("avx")) {
        copy_past_cache(to, from, length);
        return;
    }
#endif
    memcpy(to, from, length);
}
