/*
 * records: the ceiling's fourth form, of a write-back log. Writes gather in records, each a head of 4 KiB and their blocks,
 * which are written to one file in sequence past the page cache, two at once; a record's writes are answered when it is
 * written. That is all: no checksum, no chain, no index, no order of the answers, nothing ever carried anywhere, no read.
 *
 * Invariants: shares no code with the product; one ring and one thread per connection, which runs records_serve() from the
 * end of its handshake to the connection's end. A reply leaves once the kernel has answered its record.
 */
#ifndef RECORDS_H
#define RECORDS_H

#include <stdint.h>

struct records {
    int file;               /* open with O_DIRECT */
    uint64_t size;          /* of it: where the records begin anew */
    unsigned spin_us;       /* looks that long for work before it sleeps in the ring */
};

/* Serve a connection until the client goes. Ends the process where the kernel refuses what it needs. */
void records_serve(const struct records *how, int fd);

#endif
