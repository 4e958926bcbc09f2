/* responder: what the ceiling's two ways to answer share (ceiling.c, direct.c). Nothing of it is the product's. */
#ifndef RESPONDER_H
#define RESPONDER_H

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

enum { REQUEST_BYTES = 28, REPLY_BYTES = 16 };

#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u

static inline void die(const char *what)
{
    fprintf(stderr, "ceiling: %s: %s\n", what, strerror(errno));
    exit(1);
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint32_t get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return be32toh(v);
}

/* Anonymous memory for as long as a connection lives; `flags` beside that. */
static inline void *map_memory(size_t bytes, int flags)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (at == MAP_FAILED) die("memory");
    return at;
}

/* A simple reply; the cookie as it came. */
static inline void put_reply(uint8_t *to, uint32_t error, const void *cookie)
{
    const uint32_t magic = htobe32(REPLY_MAGIC);
    error = htobe32(error);
    memcpy(to, &magic, sizeof magic);
    memcpy(to + 4, &error, sizeof error);
    memcpy(to + 8, cookie, 8);
}

/* Send all of it, which the array does not survive. Blocking. False: the client is gone. */
static inline bool send_parts(int fd, struct iovec *part, unsigned parts)
{
    struct msghdr message = { .msg_iov = part, .msg_iovlen = parts };
    while (message.msg_iovlen > 0) {
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        while (message.msg_iovlen > 0 && (size_t)n >= message.msg_iov->iov_len) {
            n -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen > 0) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + n;
            message.msg_iov->iov_len -= (size_t)n;
        }
    }
    return true;
}

#endif
