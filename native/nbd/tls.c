/*
 * The TLS connection object of tls.h: OpenSSL between two bounded queues of ciphertext.
 *
 * Invariants: a queue is a chain of fixed chunks, so bytes never move once they are in (a send may be
 * reading them); an empty queue holds no chunk; each queue is bounded by its own limit, and OpenSSL is told
 * to try again later when its output is full.
 *
 * It does not decide who may do what: it only tells whom the peer proved to be.
 */
#include "nbd/tls.h"

#include <assert.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "limits.h"
#include "nbd/tls_internal.h"


struct chunk {
    struct chunk *next;
    unsigned start, end; /* bytes [start, end) are in the queue */
    unsigned char bytes[NV_TLS_CHUNK - 16];
};

struct queue {
    struct chunk *first, *last;
    size_t size, limit;
};

struct nv_tls {
    struct nv_tls_context *context;
    SSL *ssl;
    struct queue input, output;
    const unsigned char *lent; /* NULL outside of nv_tls_lend() .. nv_tls_take_back() */
    size_t lent_size;
    bool handshaken;
    bool broken;
    char psk_name[NV_PSK_NAME_MAX + 1]; /* the identity whose key was handed out last, proved only by a finished handshake */
    char error[160];
};

/* ---- queues ---- */

static struct chunk *queue_room(struct queue *queue)
{
    struct chunk *last = queue->last;
    if (last && last->end < sizeof last->bytes)
        return last;
    struct chunk *chunk = malloc(sizeof *chunk);
    if (!chunk)
        return NULL;
    chunk->next = NULL;
    chunk->start = chunk->end = 0;
    if (last)
        last->next = chunk;
    else
        queue->first = chunk;
    return queue->last = chunk;
}

/* Returns the bytes taken, up to the queue's limit; -ENOMEM when none could be. */
static ssize_t queue_put(struct queue *queue, const unsigned char *bytes, size_t size)
{
    size_t room = queue->size < queue->limit ? queue->limit - queue->size : 0, taken = 0;
    if (size > room)
        size = room;
    while (taken < size) {
        struct chunk *chunk = queue_room(queue);
        if (!chunk)
            return taken ? (ssize_t)taken : -ENOMEM;
        size_t part = sizeof chunk->bytes - chunk->end;
        if (part > size - taken)
            part = size - taken;
        memcpy(chunk->bytes + chunk->end, bytes + taken, part);
        chunk->end += (unsigned)part;
        taken += part;
        queue->size += part;
    }
    assert(queue->size <= queue->limit);
    return (ssize_t)taken;
}

static void queue_drop(struct queue *queue, size_t size)
{
    assert(size <= queue->size);
    queue->size -= size;
    while (size || (queue->first && queue->first->start == queue->first->end)) {
        struct chunk *chunk = queue->first;
        size_t part = chunk->end - chunk->start;
        if (part > size)
            part = size;
        chunk->start += (unsigned)part;
        size -= part;
        if (chunk->start < chunk->end)
            break;
        queue->first = chunk->next;
        if (!queue->first)
            queue->last = NULL;
        free(chunk);
    }
    assert((queue->size == 0) == (queue->first == NULL));
}

static size_t queue_get(struct queue *queue, unsigned char *out, size_t capacity)
{
    size_t taken = 0;
    while (taken < capacity && queue->size) {
        struct chunk *chunk = queue->first;
        size_t part = chunk->end - chunk->start;
        if (part > capacity - taken)
            part = capacity - taken;
        memcpy(out + taken, chunk->bytes + chunk->start, part);
        queue_drop(queue, part);
        taken += part;
    }
    return taken;
}

/* From what is lent, once what was fed before is gone. */
static size_t lent_get(struct nv_tls *tls, unsigned char *out, size_t capacity)
{
    size_t taken = tls->input.size ? 0 : tls->lent_size;
    if (taken > capacity)
        taken = capacity;
    if (taken == 0)
        return 0;
    memcpy(out, tls->lent, taken);
    tls->lent += taken;
    tls->lent_size -= taken;
    return taken;
}

/* ---- the BIO between OpenSSL and the queues ---- */

static int bio_write(BIO *bio, const char *bytes, int size)
{
    struct nv_tls *tls = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    ssize_t taken = size > 0 ? queue_put(&tls->output, (const unsigned char *)bytes, (size_t)size) : 0;
    if (taken == 0 && size > 0) {
        BIO_set_retry_write(bio);
        return -1;
    }
    return (int)taken;
}

static int bio_read(BIO *bio, char *out, int capacity)
{
    struct nv_tls *tls = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    size_t taken = capacity > 0 ? queue_get(&tls->input, (unsigned char *)out, (size_t)capacity) : 0;
    if (taken == 0 && capacity > 0)
        taken = lent_get(tls, (unsigned char *)out, (size_t)capacity);
    if (taken == 0) {
        BIO_set_retry_read(bio);
        return -1;
    }
    return (int)taken;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH ? 1 : 0; /* OpenSSL flushes after each flight: nothing to do */
}

static BIO_METHOD *bio_method;

__attribute__((constructor)) static void make_bio_method(void)
{
    bio_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "nbdvvol queue");
    if (bio_method) {
        BIO_meth_set_write(bio_method, bio_write);
        BIO_meth_set_read(bio_method, bio_read);
        BIO_meth_set_ctrl(bio_method, bio_control);
    }
}

/* ---- life ---- */

static bool attach_bio(struct nv_tls *tls)
{
    BIO *bio = bio_method ? BIO_new(bio_method) : NULL;
    if (!bio)
        return false;
    BIO_set_data(bio, tls);
    BIO_set_init(bio, 1);
    SSL_set_bio(tls->ssl, bio, bio); /* takes the one reference over for both directions */
    return true;
}

static struct nv_tls *new_side(nv_tls_context *context)
{
    assert(context && context->ssl);
    struct nv_tls *tls = calloc(1, sizeof *tls);
    if (!tls)
        return NULL;
    tls->input.limit = NV_TLS_INPUT_MAX;
    tls->output.limit = NV_TLS_OUTPUT_MAX;
    tls->ssl = SSL_new(context->ssl);
    if (!tls->ssl || !SSL_set_app_data(tls->ssl, tls) || !attach_bio(tls)) {
        SSL_free(tls->ssl);
        free(tls);
        return NULL;
    }
    nv_tls_context_hold(context);
    tls->context = context;
    return tls;
}

struct nv_tls *nv_tls_new(nv_tls_context *context)
{
    assert(!context->client);
    struct nv_tls *tls = new_side(context);
    if (tls)
        SSL_set_accept_state(tls->ssl);
    return tls;
}

/* A certificate is for an address as an address, not as a name that looks like one. */
static bool expect_host(SSL *ssl, const char *hostname)
{
    if (X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), hostname))
        return true;
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return SSL_set1_host(ssl, hostname) && SSL_set_tlsext_host_name(ssl, hostname);
}

struct nv_tls *nv_tls_new_client(nv_tls_context *context, const char *hostname)
{
    assert(context->client);
    struct nv_tls *tls = new_side(context);
    if (!tls)
        return NULL;
    SSL_set_connect_state(tls->ssl);
    if (hostname && !expect_host(tls->ssl, hostname)) {
        ERR_clear_error();
        nv_tls_free(tls);
        return NULL;
    }
    return tls;
}

void nv_tls_free(struct nv_tls *tls)
{
    if (!tls)
        return;
    SSL_free(tls->ssl);
    queue_drop(&tls->input, tls->input.size);
    queue_drop(&tls->output, tls->output.size);
    nv_tls_context_free(tls->context);
    free(tls);
}

/* ---- ciphertext ---- */

ssize_t nv_tls_feed(struct nv_tls *tls, const void *cipher, size_t size)
{
    return queue_put(&tls->input, cipher, size);
}

void nv_tls_lend(struct nv_tls *tls, const void *cipher, size_t size)
{
    assert(!tls->lent);
    tls->lent = cipher;
    tls->lent_size = size;
}

size_t nv_tls_take_back(struct nv_tls *tls)
{
    const size_t left = tls->lent_size;

    tls->lent = NULL;
    tls->lent_size = 0;
    return left;
}

size_t nv_tls_pending(struct nv_tls *tls, const void **cipher)
{
    const struct chunk *first = tls->output.first;
    if (!first)
        return 0;
    *cipher = first->bytes + first->start;
    return first->end - first->start;
}

void nv_tls_sent(struct nv_tls *tls, size_t size)
{
    queue_drop(&tls->output, size);
}

/* ---- plaintext ---- */

static int fail(struct nv_tls *tls, const char *what)
{
    unsigned long code = ERR_peek_error();
    const char *reason = code ? ERR_reason_error_string(code) : NULL;
    const char *verify = X509_verify_cert_error_string(SSL_get_verify_result(tls->ssl));
    bool unverified = SSL_get_verify_result(tls->ssl) != X509_V_OK;
    snprintf(tls->error, sizeof tls->error, "%s: %s%s%s", what, reason ? reason : "the stream is broken",
             unverified ? ": " : "", unverified ? verify : "");
    ERR_clear_error();
    tls->broken = true;
    return -EPROTO;
}

/* What an SSL_* call that returned `result` means: 0 try again later, -EPIPE, -EPROTO. */
static int judge(struct nv_tls *tls, int result, const char *what)
{
    switch (SSL_get_error(tls->ssl, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        return 0;
    case SSL_ERROR_ZERO_RETURN:
        return -EPIPE;
    default:
        return fail(tls, what);
    }
}

int nv_tls_handshake(struct nv_tls *tls)
{
    if (tls->handshaken)
        return 1;
    if (tls->broken)
        return -EPROTO;
    ERR_clear_error();
    int result = SSL_do_handshake(tls->ssl);
    if (result == 1) {
        tls->handshaken = true;
        return 1;
    }
    int verdict = judge(tls, result, "TLS handshake failed");
    return verdict == -EPIPE ? fail(tls, "the peer closed the TLS handshake") : verdict;
}

ssize_t nv_tls_read(struct nv_tls *tls, void *plain, size_t capacity)
{
    assert(capacity > 0);
    if (tls->broken || !tls->handshaken)
        return tls->broken ? -EPROTO : 0;
    ERR_clear_error();
    size_t got = 0;
    int result = SSL_read_ex(tls->ssl, plain, capacity, &got);
    if (result == 1)
        return (ssize_t)got;
    return judge(tls, result, "TLS stream broken");
}

/* Where a gathered write has come to. */
struct cursor {
    const struct iovec *vector;
    int count;
    size_t offset; /* in vector[0] */
};

/* Past `size` bytes of the present vector, which has so many. */
static void cursor_advance(struct cursor *at, size_t size)
{
    at->offset += size;
    if (at->offset == at->vector->iov_len) {
        at->vector++;
        at->count--;
        at->offset = 0;
    }
}

static size_t cursor_copy(struct cursor *at, unsigned char *out, size_t capacity)
{
    size_t taken = 0;
    while (at->count > 0 && taken < capacity) {
        size_t part = at->vector->iov_len - at->offset;
        if (part > capacity - taken)
            part = capacity - taken;
        if (part)
            memcpy(out + taken, (const unsigned char *)at->vector->iov_base + at->offset, part);
        taken += part;
        cursor_advance(at, part);
    }
    return taken;
}

/* The next `size` bytes where they stand; NULL if they do not stand together. */
static const unsigned char *cursor_take(struct cursor *at, size_t size)
{
    if (at->count == 0 || at->vector->iov_len - at->offset < size)
        return NULL;
    const unsigned char *taken = (const unsigned char *)at->vector->iov_base + at->offset;
    cursor_advance(at, size);
    return taken;
}

ssize_t nv_tls_write(struct nv_tls *tls, const struct iovec *vector, int count)
{
    assert(count >= 0);
    if (tls->broken || !tls->handshaken)
        return -EPROTO;
    struct cursor at = {.vector = vector, .count = count};
    unsigned char gathered[NV_TLS_RECORD]; /* headers and small payloads: a record each would cost more than the copy */
    size_t total = 0;
    /* Room for a whole record is asked for first (OpenSSL would keep half a record to itself and want the
     * very same bytes again), and some is left for alerts and key updates. */
    while (tls->output.limit - tls->output.size >= NV_TLS_RECORD + NV_TLS_RESERVE) {
        size_t size = NV_TLS_RECORD, put = 0;
        const unsigned char *record = cursor_take(&at, size);
        if (!record) {
            record = gathered;
            size = cursor_copy(&at, gathered, sizeof gathered);
        }
        if (size == 0)
            break;
        ERR_clear_error();
        int result = SSL_write_ex(tls->ssl, record, size, &put);
        if (result != 1)
            return judge(tls, result, "TLS stream broken") ? -EPROTO : fail(tls, "TLS cannot write");
        assert(put == size);
        total += put;
    }
    return (ssize_t)total;
}

int nv_tls_shutdown(struct nv_tls *tls)
{
    if (tls->broken || !tls->handshaken)
        return -EPROTO;
    ERR_clear_error();
    int result = SSL_shutdown(tls->ssl);
    if (result >= 0 || SSL_get_error(tls->ssl, result) == SSL_ERROR_WANT_READ)
        return 0;
    return judge(tls, result, "TLS cannot close") == 0 ? -EAGAIN : -EPROTO;
}

/* ---- who it is ---- */

unsigned nv_tls_psk_server(SSL *ssl, const char *identity, unsigned char *key, unsigned capacity)
{
    struct nv_tls *tls = SSL_get_app_data(ssl);
    const struct nv_psk *psk = identity ? nv_psk_find(tls->context, identity) : NULL;
    if (!psk || psk->key_size > capacity)
        return 0;
    memcpy(tls->psk_name, psk->name, sizeof tls->psk_name);
    memcpy(key, psk->key, psk->key_size);
    return psk->key_size;
}

unsigned nv_tls_psk_client(SSL *ssl, const char *hint, char *identity, unsigned identity_capacity, unsigned char *key,
                           unsigned capacity)
{
    struct nv_tls *tls = SSL_get_app_data(ssl);
    const struct nv_psk *psk = tls->context->keys;
    (void)hint;
    if (!psk || psk->key_size > capacity || strlen(psk->name) >= identity_capacity)
        return 0;
    memcpy(identity, psk->name, strlen(psk->name) + 1);
    memcpy(key, psk->key, psk->key_size);
    return psk->key_size;
}

/* A key is proved only when the handshake used it: a client may name one, and then use a certificate. */
static bool psk_was_used(const SSL *ssl)
{
    if (SSL_version(ssl) >= TLS1_3_VERSION)
        return SSL_session_reused(ssl);
    int exchange = SSL_CIPHER_get_kx_nid(SSL_get_current_cipher(ssl));
    return exchange == NID_kx_psk || exchange == NID_kx_ecdhe_psk || exchange == NID_kx_dhe_psk ||
           exchange == NID_kx_rsa_psk;
}

static int copy_name(const char *name, size_t length, char *out, size_t capacity)
{
    if (length >= capacity)
        return -ENAMETOOLONG;
    memcpy(out, name, length);
    out[length] = 0;
    return (int)length;
}

/* A name with a NUL inside is no name: C code and people would read two different ones. */
static int copy_asn1(const ASN1_STRING *string, char *out, size_t capacity)
{
    unsigned char *utf8 = NULL;
    int length = ASN1_STRING_to_UTF8(&utf8, string);
    if (length < 0)
        return 0;
    int result = memchr(utf8, 0, (size_t)length) ? 0 : copy_name((const char *)utf8, (size_t)length, out, capacity);
    OPENSSL_free(utf8);
    return result;
}

static int certificate_name(const X509 *certificate, char *out, size_t capacity)
{
    const X509_NAME *subject = X509_get_subject_name(certificate);
    int index = X509_NAME_get_index_by_NID(subject, NID_commonName, -1), result = 0;
    if (index >= 0)
        return copy_asn1(X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, index)), out, capacity);
    GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    for (int i = 0; i < sk_GENERAL_NAME_num(names); i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
        if (name->type == GEN_DNS) {
            result = copy_asn1(name->d.dNSName, out, capacity);
            break;
        }
    }
    GENERAL_NAMES_free(names);
    return result;
}

int nv_tls_peer(const struct nv_tls *tls, char *out, size_t capacity)
{
    assert(capacity > 0);
    out[0] = 0;
    if (!tls->handshaken)
        return 0;
    if (psk_was_used(tls->ssl))
        return copy_name(tls->psk_name, strlen(tls->psk_name), out, capacity);
    const X509 *certificate = SSL_get0_peer_certificate(tls->ssl);
    if (!tls->context->verify_client || !certificate || SSL_get_verify_result(tls->ssl) != X509_V_OK)
        return 0;
    return certificate_name(certificate, out, capacity);
}

const char *nv_tls_error(const struct nv_tls *tls)
{
    return tls->error;
}
