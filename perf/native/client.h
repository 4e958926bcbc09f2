/*
 * client: one NBD connection of the load generator: dialling, fixed-newstyle haggling, and a
 * non-blocking byte stream that is a plain socket or TLS (OpenSSL, PSK).
 *
 * Invariants: after client_open() the connection is in the transmission phase, and nothing blocks but a
 * client_recv() that was asked to wait.
 * It does not: parse requests or replies, retry, or reconnect. Any failure ends the program with a
 * sentence: a benchmark that limps on lies.
 */
#ifndef PERF_CLIENT_H
#define PERF_CLIENT_H
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu
enum { REQUEST_BYTES = 28, SIMPLE_BYTES = 16, CHUNK_BYTES = 20, TLS_RECORD_BYTES = 16 << 10, CLIENT_WAIT_MS = 100 };

struct target {
    const char *unix_path;          /* or: */
    const char *tcp_host;
    const char *tcp_port;
    const char *export_name;        /* may hold one %u: the connection's number */
    const char *psk_identity;       /* NULL: no TLS */
    uint8_t psk[64];
    unsigned psk_bytes;
    bool structured;                /* ask for structured replies */
    int buffer_bytes;               /* of a unix socket's send buffer; 0: the system's */
};

struct client {
    int fd;
    bool structured;                /* what the server granted */
    uint64_t size;
    uint16_t tflags;
    void *tls;                      /* SSL *, or NULL */
    size_t record_have;             /* plaintext in `record` that TLS has not taken yet */
    uint8_t *record;
};

__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);
void client_open(struct client *c, const struct target *target, unsigned number);
void client_close(struct client *c);                                   /* says DISC first */
ssize_t client_send(struct client *c, struct iovec *part, int parts);  /* bytes taken; 0: would block */
ssize_t client_recv(struct client *c, void *out, size_t size, bool wait); /* bytes; 0: would block; a plain socket
                                                                           * can wait, at most CLIENT_WAIT_MS */
const char *client_cipher(const struct client *c);                    /* NULL without TLS */
bool client_unsent(const struct client *c);                            /* bytes taken but still held here */
#endif
