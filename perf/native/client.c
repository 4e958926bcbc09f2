/* client: see client.h. The TLS part is here so that nothing else needs to know OpenSSL. */
#define _GNU_SOURCE
#include "client.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define OPTION_MAGIC 0x49484156454f5054ull
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ull
enum { OPT_STARTTLS = 5, OPT_GO = 7, OPT_STRUCTURED = 8, REP_ACK = 1, REP_INFO = 3, NAME_BYTES_MAX = 256 };

void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("loadgen: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

/* ---- TLS ---- */

static const struct target *psk_target;

static unsigned give_psk(SSL *ssl, const char *hint, char *identity, unsigned identity_size, unsigned char *key,
                         unsigned key_size)
{
    (void)ssl, (void)hint;
    if (strlen(psk_target->psk_identity) >= identity_size || psk_target->psk_bytes > key_size) return 0;
    strcpy(identity, psk_target->psk_identity);
    memcpy(key, psk_target->psk, psk_target->psk_bytes);
    return psk_target->psk_bytes;
}

static void start_tls(struct client *c, const struct target *target)
{
    static SSL_CTX *context;
    if (!context) {
        context = SSL_CTX_new(TLS_client_method());
        if (!context) fail("TLS: no context");
        psk_target = target;
        SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
        SSL_CTX_set_psk_client_callback(context, give_psk);
        SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        SSL_CTX_set_read_ahead(context, 1);     /* several records a receive, and not two receives a record */
        SSL_CTX_set_default_read_buffer_len(context, 4 * TLS_RECORD_BYTES);
        /* Left to themselves, OpenSSL's servers take this one and GnuTLS's take ChaCha20: ciphers would be compared. */
        if (!SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256")) fail("TLS: no AES-128-GCM");
    }
    SSL *ssl = SSL_new(context);
    if (!ssl || !SSL_set_fd(ssl, c->fd)) fail("TLS: no session");
    if (SSL_connect(ssl) != 1) fail("TLS handshake: %s", ERR_reason_error_string(ERR_get_error()));
    c->tls = ssl;
    c->record = malloc(TLS_RECORD_BYTES);
    if (!c->record) fail("out of memory");
}

static ssize_t tls_result(struct client *c, int n, const char *what)
{
    if (n > 0) return n;
    int error = SSL_get_error(c->tls, n);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return 0;
    fail("TLS %s: the server closed the connection or broke the protocol (%d)", what, error);
}

/* Gathers parts into whole records: one 28-byte request per record would measure the cipher's set-up. */
static ssize_t tls_send(struct client *c, struct iovec *part, int parts)
{
    ssize_t taken = 0;
    for (;;) {
        while (parts > 0 && c->record_have < TLS_RECORD_BYTES) {
            size_t n = TLS_RECORD_BYTES - c->record_have;
            if (n > part->iov_len) n = part->iov_len;
            memcpy(c->record + c->record_have, part->iov_base, n);
            c->record_have += n;
            taken += (ssize_t)n;
            part->iov_base = (uint8_t *)part->iov_base + n;
            part->iov_len -= n;
            if (part->iov_len == 0) part++, parts--;
        }
        if (c->record_have == 0) return taken;
        ssize_t sent = tls_result(c, SSL_write(c->tls, c->record, (int)c->record_have), "send");
        if (sent == 0) return taken;
        memmove(c->record, c->record + sent, c->record_have - (size_t)sent);
        c->record_have -= (size_t)sent;
    }
}

/* ---- the byte stream ---- */

bool client_unsent(const struct client *c) { return c->record_have > 0; }

const char *client_cipher(const struct client *c) { return c->tls ? SSL_get_cipher_name(c->tls) : NULL; }

ssize_t client_send(struct client *c, struct iovec *part, int parts)
{
    if (c->tls) return tls_send(c, part, parts);
    struct msghdr message = { .msg_iov = part, .msg_iovlen = (size_t)parts };
    ssize_t n = sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) return n;
    if (errno == EAGAIN || errno == EINTR) return 0;
    fail("send: %s", strerror(errno));
}

ssize_t client_recv(struct client *c, void *out, size_t size, bool wait)
{
    if (c->tls) return tls_result(c, SSL_read(c->tls, out, (int)size), "receive");
    ssize_t n = recv(c->fd, out, size, wait ? 0 : MSG_DONTWAIT);
    if (n > 0) return n;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    fail("receive: %s", n == 0 ? "the server closed the connection" : strerror(errno));
}

/* ---- haggling: blocking, exact lengths ---- */

static void read_all(struct client *c, void *out, size_t n)
{
    for (uint8_t *p = out; n > 0;) {
        ssize_t got = c->tls ? SSL_read(c->tls, p, (int)n) : recv(c->fd, p, n, MSG_WAITALL);
        if (got <= 0) fail("handshake: the server closed the connection");
        p += got;
        n -= (size_t)got;
    }
}

static void write_all(struct client *c, const void *bytes, size_t n)
{
    ssize_t sent = c->tls ? SSL_write(c->tls, bytes, (int)n) : send(c->fd, bytes, n, MSG_NOSIGNAL);
    if (sent != (ssize_t)n) fail("handshake: cannot send");
}

static void send_option(struct client *c, uint32_t option, const void *body, uint32_t n)
{
    uint8_t out[16 + 4 + NAME_BYTES_MAX + 8];
    assert(16 + (size_t)n <= sizeof out);
    uint64_t magic = htobe64(OPTION_MAGIC);
    uint32_t words[2] = { htobe32(option), htobe32(n) };
    memcpy(out, &magic, 8);
    memcpy(out + 8, words, 8);
    if (n > 0) memcpy(out + 16, body, n);
    write_all(c, out, 16 + n);
}

/* One option reply; its body (cut to `size`) in `body`. Returns the reply type. */
static uint32_t read_reply(struct client *c, uint8_t *body, size_t size)
{
    uint64_t magic;
    uint32_t words[3];
    memset(body, 0, size);
    read_all(c, &magic, 8);
    read_all(c, words, 12);
    if (be64toh(magic) != OPTION_REPLY_MAGIC) fail("handshake: not an option reply");
    for (uint32_t n = be32toh(words[2]), at = 0; at < n; at++) {
        uint8_t byte;
        read_all(c, &byte, 1);
        if (at < size) body[at] = byte;
    }
    return be32toh(words[1]);
}

static void go(struct client *c, const char *name)
{
    uint8_t body[4 + NAME_BYTES_MAX + 4], info[64];
    uint32_t length = (uint32_t)strlen(name), be = htobe32(length);
    memcpy(body, &be, 4);
    memcpy(body + 4, name, length);
    memcpy(body + 4 + length, "\0\1\0\3", 4);      /* one info request: BLOCK_SIZE */
    send_option(c, OPT_GO, body, length + 8);
    for (;;) {
        uint32_t type = read_reply(c, info, sizeof info - 1);
        if (type == REP_ACK) break;
        if (type != REP_INFO) fail("export '%s' refused: reply 0x%x %s", name, type, info);
        if (info[0] == 0 && info[1] == 0) {
            memcpy(&c->size, info + 2, 8);
            c->size = be64toh(c->size);
            c->tflags = (uint16_t)(info[10] << 8 | info[11]);
        }
    }
    if (c->size == 0) fail("export '%s' is empty or told no size", name);
}

/* A whole batch of writes in one send: the default buffer of 208 KiB holds fifty, and then says EAGAIN. */
static void widen(int fd, int bytes)
{
    if (bytes > 0 && setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

static int dial(const struct target *target)
{
    int fd = -1, one = 1;
    if (target->unix_path) {
        struct sockaddr_un a = { .sun_family = AF_UNIX };
        if (strlen(target->unix_path) >= sizeof a.sun_path) fail("socket path longer than 107 bytes");
        strcpy(a.sun_path, target->unix_path);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
            fail("cannot connect to %s: %s", target->unix_path, strerror(errno));
        widen(fd, target->buffer_bytes);
    } else {
        struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found;
        if (getaddrinfo(target->tcp_host, target->tcp_port, &hints, &found) != 0) fail("unknown host %s", target->tcp_host);
        fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, found->ai_addr, found->ai_addrlen) < 0)
            fail("cannot connect to %s:%s: %s", target->tcp_host, target->tcp_port, strerror(errno));
        freeaddrinfo(found);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    return fd;
}

/* The export's name with its one %u replaced; anything else in it stays as it is. */
static void export_name(char *out, size_t size, const char *pattern, unsigned number)
{
    const char *mark = strstr(pattern, "%u");
    int n = mark ? snprintf(out, size, "%.*s%u%s", (int)(mark - pattern), pattern, number, mark + 2)
                 : snprintf(out, size, "%s", pattern);
    if (n < 0 || (size_t)n >= size) fail("export name longer than %zu bytes", size - 1);
}

void client_open(struct client *c, const struct target *target, unsigned number)
{
    uint8_t hello[18], body[64];
    char name[NAME_BYTES_MAX];
    *c = (struct client){ .fd = dial(target) };
    read_all(c, hello, sizeof hello);
    if (memcmp(hello, "NBDMAGICIHAVEOPT", 16) != 0 || !(hello[17] & 1)) fail("not a fixed-newstyle NBD server");
    uint32_t flags = htobe32(1u | (hello[17] & 2u));
    write_all(c, &flags, 4);
    if (target->psk_identity) {
        send_option(c, OPT_STARTTLS, NULL, 0);
        if (read_reply(c, body, sizeof body - 1) != REP_ACK) fail("the server refuses TLS");
        start_tls(c, target);
    }
    if (target->structured) {
        send_option(c, OPT_STRUCTURED, NULL, 0);
        c->structured = read_reply(c, body, sizeof body - 1) == REP_ACK;
    }
    export_name(name, sizeof name, target->export_name, number);
    go(c, name);
    struct timeval limit = { .tv_usec = CLIENT_WAIT_MS * 1000 };
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (c->tls && fcntl(c->fd, F_SETFL, fcntl(c->fd, F_GETFL) | O_NONBLOCK) < 0) fail("fcntl: %s", strerror(errno));
    assert(c->size > 0 && c->fd >= 0);
}

void client_close(struct client *c)
{
    uint8_t bye[REQUEST_BYTES] = { 0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2 };
    struct iovec part = { bye, sizeof bye };
    client_send(c, &part, 1);
    if (c->tls) SSL_free(c->tls);
    free(c->record);
    close(c->fd);
}
