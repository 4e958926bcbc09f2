/*
 * What tls.c, tls_context.c and tls_client.c share: the context's inside, frozen once a connection was made from it.
 * Nothing else includes this file.
 */
#ifndef NV_NBD_TLS_INTERNAL_H
#define NV_NBD_TLS_INTERNAL_H

#include <openssl/ssl.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "limits.h"
#include "nbdvvol.h"

struct nv_psk {
    char name[NV_PSK_NAME_MAX + 1];
    unsigned char key[NV_PSK_KEY_MAX];
    unsigned key_size;
};

struct nv_tls_context {
    SSL_CTX *ssl;
    atomic_uint references;
    atomic_bool frozen; /* a connection was made: other threads read it, nothing may change */
    bool client; /* the client's side; else the server's */
    bool verify_client;
    struct nv_psk *keys; /* sorted by name */
    size_t key_count; /* a client has one: its own */
};

/* The key of an identity, or NULL. Only names that are in the file are found: the name itself is public. */
const struct nv_psk *nv_psk_find(const struct nv_tls_context *context, const char *name);

/* Called by OpenSSL (TLS 1.2, and as its fallback TLS 1.3 with SHA-256): defined in tls.c, installed by the
 * context. Returns the key's length, 0 for an unknown identity. */
unsigned nv_tls_psk_server(SSL *ssl, const char *identity, unsigned char *key, unsigned capacity);

/* The client's own identity and key. */
unsigned nv_tls_psk_client(SSL *ssl, const char *hint, char *identity, unsigned identity_capacity, unsigned char *key,
                           unsigned capacity);

/* tls_context.c, for tls_client.c. Each returns 0, or -errno with a sentence. */
nv_tls_context *nv_tls_context_create_side(bool client);
int nv_tls_context_unfrozen(const struct nv_tls_context *context);
int nv_tls_use_certificate(struct nv_tls_context *context, const char *cert_file, const char *key_file);
int nv_tls_load_keys(struct nv_tls_context *context, const char *keys_file);
const char *nv_tls_openssl_reason(void); /* of the last failure, which is forgotten */

void nv_tls_context_hold(struct nv_tls_context *context);

#endif
