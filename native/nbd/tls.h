/*
 * TLS for one connection, as an object that never touches a socket: ciphertext is fed in and taken out,
 * plaintext is read and written. OpenSSL 3.0 or later, server and client, TLS 1.2 and 1.3, certificates
 * (x509) and pre-shared keys (PSK).
 *
 * Invariants
 *  - Memory is bounded: at most NV_TLS_INPUT_MAX bytes of ciphertext wait to be decrypted and about
 *    NV_TLS_OUTPUT_MAX to be sent; an idle connection holds no record buffer at all.
 *  - The bytes that nv_tls_pending() points at do not move until nv_tls_sent() has counted them, whatever
 *    else is called in between: a send may be in flight meanwhile.
 *  - No renegotiation, no compression, no early data and no session resumption: an identity is proved
 *    anew on every connection, so a key that was withdrawn cannot come back through an old ticket.
 *  - One thread at a time uses an nv_tls; a context is shared by all, and frozen by its first connection.
 *
 * It does not read files after the context is made, knows nothing of NBD, and closes nothing.
 */
#ifndef NV_NBD_TLS_H
#define NV_NBD_TLS_H

#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "nbdvvol.h"

struct nv_tls;

/* A new server side of a TLS connection, or NULL when memory is short. Holds a reference to `context`. */
struct nv_tls *nv_tls_new(nv_tls_context *context);

/* A new client side. The server's certificate must be for `hostname`, a name or an address (NULL: its name is not
 * checked). NULL when memory is short or the name is none. */
struct nv_tls *nv_tls_new_client(nv_tls_context *context, const char *hostname);

/* NULL is fine. */
void nv_tls_free(struct nv_tls *tls);

/* Take in ciphertext. Returns how many bytes were taken: fewer than `size` only while NV_TLS_INPUT_MAX
 * bytes wait to be read as plaintext; -ENOMEM when memory is short. */
ssize_t nv_tls_feed(struct nv_tls *tls, const void *cipher, size_t size);

/* Let the next calls read received ciphertext where it stands, behind all that was fed. nv_tls_take_back() ends that, and
 * tells how many bytes at its end were not read: they are to be lent, or fed, again. */
void nv_tls_lend(struct nv_tls *tls, const void *cipher, size_t size);
size_t nv_tls_take_back(struct nv_tls *tls);

/* Go on with the handshake: 1 done, 0 wants more bytes, -EPROTO failed (nv_tls_error() says why).
 * Whatever the result, what nv_tls_pending() then holds (also an alert) is to be sent. */
int nv_tls_handshake(struct nv_tls *tls);

/* Plaintext bytes (> 0); 0 none yet (feed more; or, when ciphertext is pending, send that and try again);
 * -EPIPE after the peer's close_notify; -EPROTO when the stream is broken. */
ssize_t nv_tls_read(struct nv_tls *tls, void *plain, size_t capacity);

/* Encrypt. Returns the plaintext bytes taken in: fewer than offered once NV_TLS_OUTPUT_MAX bytes wait to
 * be sent (the rest is to be offered again after nv_tls_sent()); -EPROTO when the stream is broken. */
ssize_t nv_tls_write(struct nv_tls *tls, const struct iovec *vector, int count);

/* Ciphertext to send: returns the length of the first contiguous piece and where it is; 0 when there is none. */
size_t nv_tls_pending(struct nv_tls *tls, const void **cipher);

/* The first `size` bytes of what nv_tls_pending() showed have been sent. */
void nv_tls_sent(struct nv_tls *tls, size_t size);

/* Queue close_notify: 0; -EAGAIN no room, send what is pending first; -EPROTO the stream is already broken. */
int nv_tls_shutdown(struct nv_tls *tls);

/* Who the peer proved to be: the common name (else the first DNS name) of its verified certificate, or its
 * PSK identity; "" for an anonymous peer. Returns the length without the NUL; -ENAMETOOLONG. */
int nv_tls_peer(const struct nv_tls *tls, char *out, size_t capacity);

/* Why the last call failed, for people; "" when nothing did. */
const char *nv_tls_error(const struct nv_tls *tls);

#endif
