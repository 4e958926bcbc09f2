/*
 * ceiling: the socket's ceiling. An NBD responder that does no storage work at all, so that its rate is
 * what the socket, the protocol and one client allow: reads are answered from one hot buffer, writes
 * are received and dropped. With --file it answers reads from a map of that file and receives writes into it: the ceiling
 * of a server whose bytes are somewhere in memory and not in a cache. With --direct it reads and writes that file past the
 * page cache (direct.h): the ceiling of a server of a disk. With --records it writes to it what a log would (records.h).
 *
 * Invariants: shares no code with the product. One thread per --threads (with --direct or --records: a connection), each owns its
 * connections for life. Per batch: one large recv, every whole request in it parsed, all replies in one gathered send.
 * A reply never leaves before its request was received whole, write payload included.
 *
 * It does not: keep what is written without --file, check ranges without --file, speak TLS, structured replies or
 * extended headers, defend itself against a hostile client (it trusts its benchmark), or share fairly.
 */
#define _GNU_SOURCE
#include "direct.h"
#include "records.h"
#include "responder.h"

#include <arpa/inet.h>
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    RECEIVE_BYTES = 256 << 10,  /* one recv: many small requests, and it stays in a core's L2 */
    HOT_BYTES = 256 << 10,      /* reads longer than this repeat it */
    REPLIES_MAX = RECEIVE_BYTES / REQUEST_BYTES + 1,
    BULK_BYTES = 64 << 10,      /* writes of so much are received where they belong, each request by itself */
    LOW_WATER_BYTES = 128 << 10, /* of bulk on TCP, waited for at once: fewer calls and wake-ups than each segment's */
    PARTS_MAX = 1000,           /* iovecs in one send; the kernel's limit is 1024 */
    READ_MAX = 32 << 20,
    OPTION_BYTES_MAX = 64 << 10,
    THREADS_MAX = 64,
    EVENTS_MAX = 64,
};

#define OPTION_MAGIC 0x49484156454f5054ull
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ull
#define CMD_READ 0
#define CMD_WRITE 1
#define CMD_DISC 2
#define TFLAGS (1u | 1u << 2 | 1u << 3 | 1u << 5 | 1u << 6 | 1u << 8) /* flags flush fua trim zeroes multi-conn */

struct connection {
    int fd;
    size_t have;                    /* bytes in `in` not yet parsed */
    size_t skip;                    /* bytes of write payload still to come */
    uint64_t skip_cookie;           /* whose payload that is: answered when it is whole */
    uint8_t *put;                   /* where they belong; NULL: they are dropped */
    bool bulk;                      /* the last write was a long one */
    unsigned replies;
    unsigned parts;
    struct iovec part[PARTS_MAX];
    uint8_t reply[REPLIES_MAX * REPLY_BYTES];
    uint8_t in[RECEIVE_BYTES];
};

struct worker {
    pthread_t thread;
    int epoll;
    int live;                       /* connections; written by the acceptor and the worker, atomically */
    struct connection *only;        /* the single connection of a worker with just one */
};

static struct {
    const char *unix_path;
    const char *file;
    bool direct, records;
    uint16_t tcp_port;
    uint64_t size;
    unsigned threads;
    unsigned spin_us;
    int buffer_bytes;
} options = { .size = 1ull << 30, .threads = 1, .buffer_bytes = 4 << 20 };

static struct worker workers[THREADS_MAX];
static uint8_t *hot;
static uint8_t *mapped;       /* the file; NULL without one */
static struct direct direct;
static struct records records;

static void put16(uint8_t *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, sizeof v); }
static void put32(uint8_t *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, sizeof v); }
static void put64(uint8_t *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, sizeof v); }

/* ---- transmission ---- */

/* Send what is staged. Blocking: this responder has nothing better to do. False: the client is gone. */
static bool flush_replies(struct connection *c)
{
    if (!send_parts(c->fd, c->part, c->parts)) return false;
    c->parts = 0;
    c->replies = 0;
    return true;
}

static void stage_bytes(struct connection *c, const void *bytes, size_t n)
{
    assert(c->parts < PARTS_MAX);
    struct iovec *last = c->parts > 0 ? &c->part[c->parts - 1] : NULL;
    if (last && (const uint8_t *)last->iov_base + last->iov_len == bytes) last->iov_len += n;
    else c->part[c->parts++] = (struct iovec){ (void *)(uintptr_t)bytes, n };
}

static bool stage_reply(struct connection *c, uint64_t cookie, uint64_t offset, size_t payload)
{
    unsigned need = 2 + (unsigned)(payload / HOT_BYTES) + 1;
    if (c->parts + need > PARTS_MAX && !flush_replies(c)) return false;
    assert(c->replies < REPLIES_MAX);
    uint8_t *r = c->reply + (size_t)c->replies++ * REPLY_BYTES;
    put_reply(r, 0, &cookie);
    stage_bytes(c, r, REPLY_BYTES);
    if (mapped && payload > 0) {
        stage_bytes(c, mapped + offset, payload);
        return true;
    }
    while (payload > 0) {
        size_t n = payload < HOT_BYTES ? payload : HOT_BYTES;
        stage_bytes(c, hot, n);
        payload -= n;
    }
    return true;
}

/* Parse every whole request of the receive buffer. False: close the connection. */
static bool parse(struct connection *c)
{
    const uint8_t *p = c->in, *end = c->in + c->have;
    for (;;) {
        if (c->skip > 0) {
            size_t n = (size_t)(end - p) < c->skip ? (size_t)(end - p) : c->skip;
            if (c->put) c->put = (uint8_t *)memcpy(c->put, p, n) + n;
            p += n;
            c->skip -= n;
            if (c->skip > 0) break;
            if (!stage_reply(c, c->skip_cookie, 0, 0)) return false;
        }
        if (end - p < REQUEST_BYTES) break;
        uint32_t length = get32(p + 24);
        uint16_t command = (uint16_t)(p[6] << 8 | p[7]);
        uint64_t cookie, offset = (uint64_t)get32(p + 16) << 32 | get32(p + 20);
        memcpy(&cookie, p + 8, sizeof cookie);
        if (mapped && (offset > options.size || length > options.size - offset)) return false;
        if (get32(p) != REQUEST_MAGIC || command == CMD_DISC || length > READ_MAX) return false;
        p += REQUEST_BYTES;
        if (command == CMD_WRITE && length > 0) {
            c->skip = length;
            c->skip_cookie = cookie;
            c->put = mapped ? mapped + offset : NULL;
            c->bulk = mapped && length >= BULK_BYTES;
        } else if (!stage_reply(c, cookie, offset, command == CMD_READ ? length : 0)) {
            return false;
        }
    }
    c->have = (size_t)(end - p);
    assert(c->have < REQUEST_BYTES);
    memmove(c->in, p, c->have);
    return true;
}

static void set_low_water(const struct connection *c, size_t bytes)
{
    int n = (int)bytes;
    if (options.tcp_port && setsockopt(c->fd, SOL_SOCKET, SO_RCVLOWAT, &n, sizeof n) < 0) die("low water");
}

/* Bulk straight to where it belongs. As serve(). */
static int store(struct connection *c)
{
    size_t want = c->skip < LOW_WATER_BYTES ? c->skip : LOW_WATER_BYTES;
    assert(c->put && c->have == 0 && want > 0);
    set_low_water(c, want);
    ssize_t n = recv(c->fd, c->put, want, options.tcp_port ? 0 : MSG_DONTWAIT);
    if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if (n == 0) return -1;
    c->put += n;
    c->skip -= (size_t)n;
    if (c->skip > 0) return 1;
    set_low_water(c, 1);
    return stage_reply(c, c->skip_cookie, 0, 0) && flush_replies(c) ? 1 : -1;
}

/* One batch. 1: served something, 0: nothing there, -1: close. */
static int serve(struct connection *c)
{
    if (c->bulk && c->skip > 0) return store(c);
    size_t want = c->bulk ? REQUEST_BYTES - c->have : RECEIVE_BYTES - c->have;
    ssize_t n = recv(c->fd, c->in + c->have, want, MSG_DONTWAIT);
    if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if (n == 0) return -1;
    c->have += (size_t)n;
    if (!parse(c)) return -1;
    return c->parts == 0 || flush_replies(c) ? 1 : -1;
}

static void close_connection(struct worker *w, struct connection *c)
{
    close(c->fd);
    munmap(c, sizeof *c);
    w->only = NULL;
    __atomic_sub_fetch(&w->live, 1, __ATOMIC_RELAXED);
}

/* With one connection, read its socket directly; epoll is asked only when that has been idle a while. */
static void *work(void *argument)
{
    struct worker *w = argument;
    struct epoll_event ready[EVENTS_MAX];
    uint64_t busy_ns = now_ns();
    for (;;) {
        if (w->only && __atomic_load_n(&w->live, __ATOMIC_RELAXED) == 1) {
            int served = serve(w->only);
            if (served < 0) { close_connection(w, w->only); continue; }
            if (served > 0) { busy_ns = now_ns(); continue; }
            if (options.spin_us > 0 && now_ns() - busy_ns < options.spin_us * 1000ull) continue;
        }
        bool spin = options.spin_us > 0 && now_ns() - busy_ns < options.spin_us * 1000ull;
        int n = epoll_wait(w->epoll, ready, EVENTS_MAX, spin ? 0 : -1);
        for (int i = 0; i < n; i++) {
            struct connection *c = ready[i].data.ptr;
            int served = serve(c);
            if (served < 0) close_connection(w, c);
            else w->only = c;
        }
        if (n > 0) busy_ns = now_ns();
    }
    return NULL;
}

/* ---- handshake: fixed newstyle, GO, INFO and EXPORT_NAME; every other option is refused ---- */

static bool read_all(int fd, void *out, size_t n)
{
    for (uint8_t *p = out; n > 0;) {
        ssize_t got = recv(fd, p, n, MSG_WAITALL);
        if (got <= 0) return false;
        p += got;
        n -= (size_t)got;
    }
    return true;
}

static bool write_all(int fd, const void *bytes, size_t n)
{
    return send(fd, bytes, n, MSG_NOSIGNAL) == (ssize_t)n;
}

static bool option_reply(int fd, uint32_t option, uint32_t type, const void *body, uint32_t n)
{
    uint8_t r[20 + 64];
    assert(n <= 64);
    put64(r, OPTION_REPLY_MAGIC);
    put32(r + 8, option);
    put32(r + 12, type);
    put32(r + 16, n);
    if (n > 0) memcpy(r + 20, body, n);
    return write_all(fd, r, 20 + n);
}

static bool info_reply(int fd, uint32_t option)
{
    uint8_t export[12], sizes[14];
    put16(export, 0);
    put64(export + 2, options.size);
    put16(export + 10, TFLAGS);
    put16(sizes, 3);
    put32(sizes + 2, 1);
    put32(sizes + 6, 4096);
    put32(sizes + 10, READ_MAX);
    return option_reply(fd, option, 3, export, sizeof export) && option_reply(fd, option, 3, sizes, sizeof sizes) &&
           option_reply(fd, option, 1, NULL, 0);
}

static bool haggle(int fd)
{
    uint8_t hello[18], word[4], head[16], body[OPTION_BYTES_MAX];
    memcpy(hello, "NBDMAGIC", 8);
    put64(hello + 8, OPTION_MAGIC);
    put16(hello + 16, 3);
    if (!write_all(fd, hello, sizeof hello) || !read_all(fd, word, sizeof word)) return false;
    bool zeroes = !(get32(word) & 2);
    for (;;) {
        if (!read_all(fd, head, sizeof head)) return false;
        uint32_t option = get32(head + 8), n = get32(head + 12);
        if (n > sizeof body || !read_all(fd, body, n)) return false;
        if (option == 1) {
            uint8_t reply[134] = { 0 };
            put64(reply, options.size);
            put16(reply + 8, TFLAGS);
            return write_all(fd, reply, zeroes ? sizeof reply : 10);
        }
        bool entered = option == 7;
        if (option == 2) {
            option_reply(fd, option, 1, NULL, 0);
            return false;
        }
        if (!(option == 6 || option == 7 ? info_reply(fd, option) : option_reply(fd, option, 0x80000001u, NULL, 0)))
            return false;
        if (entered) return true;
    }
}

/* ---- set-up ---- */

static void prepare_socket(int fd)
{
    int one = 1, bytes = options.buffer_bytes;
    struct timeval limit = { .tv_sec = 5 };
    if (options.tcp_port) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bytes > 0 && setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

static void *serve_from_disk(void *fd)
{
    if (options.records) records_serve(&records, (int)(intptr_t)fd);
    else direct_serve(&direct, (int)(intptr_t)fd);
    return NULL;
}

static void accept_one(int listener, unsigned turn)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    prepare_socket(fd);
    if (!haggle(fd)) {
        close(fd);
        return;
    }
    if (options.direct || options.records) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve_from_disk, (void *)(intptr_t)fd) != 0) die("thread");
        pthread_detach(thread);
        return;
    }
    struct connection *c = map_memory(sizeof *c, 0);
    c->fd = fd;
    struct worker *w = &workers[turn % options.threads];
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };
    __atomic_add_fetch(&w->live, 1, __ATOMIC_RELAXED);
    if (epoll_ctl(w->epoll, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll");
}

static int listen_on(void)
{
    int fd, one = 1, ok;
    if (options.unix_path) {
        struct sockaddr_un a = { .sun_family = AF_UNIX };
        if (strlen(options.unix_path) >= sizeof a.sun_path) { errno = ENAMETOOLONG; die(options.unix_path); }
        strcpy(a.sun_path, options.unix_path);
        unlink(options.unix_path);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        ok = bind(fd, (struct sockaddr *)&a, sizeof a);
    } else {
        struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(options.tcp_port) };
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        ok = bind(fd, (struct sockaddr *)&a, sizeof a);
    }
    if (fd < 0 || ok < 0 || listen(fd, 1024) < 0) die("listen");
    return fd;
}

/* Every page is in the table before the first request: what is measured is memory, not faults. */
static uint8_t *map_file(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat stat;
    if (fd < 0 || fstat(fd, &stat) < 0) die(path);
    if ((uint64_t)stat.st_size < options.size) { errno = ERANGE; die(path); }
    void *at = mmap(NULL, options.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (at == MAP_FAILED) die(path);
    close(fd);
    return at;
}

static unsigned number_of(const char *text, unsigned most)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (end == text || *end || *text == '-' || n > most) {
        fprintf(stderr, "ceiling: '%s' is not a number of 0..%u\n", text, most);
        exit(2);
    }
    return (unsigned)n;
}

static void parse_options(int argc, char **argv)
{
    static const struct option longs[] = {
        { "unix", 1, 0, 'u' }, { "tcp", 1, 0, 't' }, { "size", 1, 0, 's' }, { "threads", 1, 0, 'n' },
        { "spin-us", 1, 0, 'p' }, { "buffer", 1, 0, 'b' }, { "file", 1, 0, 'f' }, { "direct", 0, 0, 'd' },
        { "records", 0, 0, 'r' }, { 0 },
    };
    for (int o; (o = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (o) {
        case 'u': options.unix_path = optarg; break;
        case 't': options.tcp_port = (uint16_t)number_of(optarg, 65535); break;
        case 's': options.size = strtoull(optarg, NULL, 10); break;
        case 'n': options.threads = number_of(optarg, THREADS_MAX); break;
        case 'p': options.spin_us = number_of(optarg, 1000000); break;
        case 'b': options.buffer_bytes = (int)number_of(optarg, 1 << 30); break;
        case 'f': options.file = optarg; break;
        case 'd': options.direct = true; break;
        case 'r': options.records = true; break;
        default: exit(2);
        }
    }
    if (!options.unix_path == !options.tcp_port || options.threads < 1 || options.threads > THREADS_MAX ||
        ((options.direct || options.records) && !options.file)) {
        fprintf(stderr, "usage: ceiling --unix PATH | --tcp PORT [--size BYTES] [--threads 1..%d] [--spin-us N]"
                " [--buffer BYTES] [--file PATH [--direct | --records]]\n", THREADS_MAX);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    hot = map_memory(HOT_BYTES, MAP_POPULATE);
    memset(hot, 0x5a, HOT_BYTES);
    if (options.direct || options.records) {
        int file = open(options.file, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (file < 0) die(options.file);
        direct = (struct direct){ file, options.spin_us };
        records = (struct records){ file, options.size, options.spin_us };
    } else if (options.file) {
        mapped = map_file(options.file);
    }
    for (unsigned i = 0; i < options.threads; i++) {
        workers[i].epoll = epoll_create1(EPOLL_CLOEXEC);
        if (workers[i].epoll < 0 || pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) die("thread");
    }
    int listener = listen_on();
    for (unsigned turn = 0;; turn++) accept_one(listener, turn);
}
