/*
 * direct: the storage half of the ceiling's third form. One connection's requests become O_DIRECT reads and writes of
 * one file through io_uring, and nothing else: no check, no order among overlapping writes, no map, no counters.
 *
 * Invariants: shares no code with the product; one ring and one thread per connection, which runs direct_serve() from
 * the end of its handshake to the connection's end. A reply leaves once the kernel has answered its transfer.
 */
#ifndef DIRECT_H
#define DIRECT_H

struct direct {
    int file;               /* open with O_DIRECT */
    unsigned spin_us;       /* looks that long for work before it sleeps in the ring */
};

/* Serve a connection until the client goes. Ends the process where the kernel refuses what it needs. */
void direct_serve(const struct direct *how, int fd);

#endif
