/*
 * The client's TLS identity: whom we trust, and who we say we are (tls_context.c has the server's). The checks are
 * strict unless the operator says otherwise: a certificate must come from a trusted authority and be for the name that
 * was dialled; with a pre-shared key alone, a server that does not know the key proves nothing and is refused.
 */
#include <assert.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "nbd/tls_internal.h"

nv_tls_context *nv_tls_client_create(void)
{
    nv_tls_context *context = nv_tls_context_create_side(true);
    if (context)
        SSL_CTX_set_verify(context->ssl, SSL_VERIFY_PEER, NULL);
    return context;
}

static int trust(struct nv_tls_context *context, const char *ca_file)
{
    ERR_clear_error();
    if (ca_file && SSL_CTX_load_verify_file(context->ssl, ca_file) != 1)
        return nv_fail(EINVAL, "CA file %s: %s", ca_file, nv_tls_openssl_reason());
    if (!ca_file && SSL_CTX_set_default_verify_paths(context->ssl) != 1)
        return nv_fail(EINVAL, "the system's certificate authorities: %s", nv_tls_openssl_reason());
    return 0;
}

int nv_tls_client_x509(nv_tls_context *context, const char *ca_file, const char *cert_file, const char *key_file,
                       uint32_t flags)
{
    assert(context && context->client);
    int error = nv_tls_context_unfrozen(context);
    if (!error)
        error = trust(context, ca_file);
    if (!error && (cert_file || key_file))
        error = nv_tls_use_certificate(context, cert_file, key_file);
    if (!error && (flags & NV_TLS_TRUST_ANYBODY))
        SSL_CTX_set_verify(context->ssl, SSL_VERIFY_NONE, NULL);
    return error;
}

int nv_tls_client_psk(nv_tls_context *context, const char *keys_file, const char *identity)
{
    assert(context && context->client && identity);
    int error = nv_tls_load_keys(context, keys_file);
    if (error)
        return error;
    const struct nv_psk *mine = nv_psk_find(context, identity);
    if (!mine)
        return nv_fail(ENOENT, "PSK file %s has no key for %s: add one with psktool -u %s -p %s", keys_file, identity,
                       identity, keys_file);
    struct nv_psk only = *mine;
    OPENSSL_cleanse(context->keys, context->key_count * sizeof *context->keys);
    context->keys[0] = only;
    context->key_count = 1;
    OPENSSL_cleanse(&only, sizeof only);
    SSL_CTX_set_psk_client_callback(context->ssl, nv_tls_psk_client);
    return 0;
}
