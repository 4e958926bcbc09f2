/*
 * Copy bytes into a view of a file in memory, or out of one. A page that memory cannot give (the file was cut, or memory is full) raises
 * SIGBUS inside the copy; here that is an error of this one copy, not the end of the process. Of the real port only.
 *
 * Invariants: the signal is ours only while this thread is inside nv_store() or nv_load(); every other SIGBUS goes to whoever handled
 * it before.
 */
#ifndef NV_STORE_H
#define NV_STORE_H

#include <stdbool.h>
#include <stddef.h>

/* Take SIGBUS over, once a process; false: the system refuses. */
bool nv_store_ready(void);
/* True: all bytes are there. False: some may be; write them in another way, which tells what is wrong. */
bool nv_store(void *to, const void *from, size_t length);
/* True: all bytes were read. False: some may not; read them in another way. */
bool nv_load(void *to, const void *from, size_t length);

#endif
