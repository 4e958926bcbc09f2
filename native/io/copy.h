/*
 * Copies past the processor's cache, for bytes that nobody here reads again: a device fetches them, or another process.
 * The lines that are written over need not be fetched before, nor be taken back from whoever has read them, and others are not thrown
 * out for them. No system call, no state; of every port.
 */
#ifndef NV_COPY_H
#define NV_COPY_H

#include <stddef.h>

/* As memcpy; through the cache where a copy is short, not aligned, or the processor cannot. Whoever hears of it finds it. */
void nv_copy_past_cache(void *to, const void *from, size_t length);

#endif
