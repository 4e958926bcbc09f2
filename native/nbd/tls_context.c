/*
 * A TLS identity: certificates, keys and who may connect; the server's, and what tls_client.c builds the
 * client's from. Made and filled by Python's thread, then shared read-only by every reactor (see tls.h for
 * what a connection promises).
 *
 * Invariants: counted; frozen by the first connection, so reactors need no lock; a failed call leaves the
 * context as unusable as it was, never half accepted (x509 and psk each install only what fully loaded).
 *
 * It does not watch files: new certificates or keys are a new context.
 */
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "limits.h"
#include "nbd/tls_internal.h"

/* A client that offers PSK wants to be known by it, so PSK goes first: in TLS 1.3 by protocol, in TLS 1.2 by
 * this order (OpenSSL offers it only with keys loaded). Certificates need forward secrecy; PSK may be plain,
 * which is what small clients have. TLS 1.3 keys from files are bound to SHA-256, so its suites go first. */
#define NV_TLS12_CIPHERS \
    "kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kDHEPSK+CHACHA20:kECDHEPSK+AES:kPSK+AESGCM:kPSK+CHACHA20:" \
    "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:!aNULL:!eNULL:!kRSA"
#define NV_TLS13_CIPHERS "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"

const char *nv_tls_openssl_reason(void)
{
    unsigned long code = ERR_peek_last_error();
    const char *reason = code ? ERR_reason_error_string(code) : NULL;
    ERR_clear_error();
    return reason ? reason : "unknown OpenSSL error";
}

static SSL_CTX *make_ssl_context(bool client)
{
    static const unsigned char session_id_context[] = "nbdvvol";
    SSL_CTX *ssl = SSL_CTX_new(client ? TLS_client_method() : TLS_server_method());
    if (!ssl)
        return NULL;
    SSL_CTX_set_min_proto_version(ssl, TLS1_2_VERSION);
    SSL_CTX_set_security_level(ssl, 2);
    SSL_CTX_set_options(ssl, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_NO_TICKET |
                                 SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_mode(ssl, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE |
                              SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_dh_auto(ssl, 1);
    if (!SSL_CTX_set_num_tickets(ssl, 0) || !SSL_CTX_set_max_early_data(ssl, 0) ||
        !SSL_CTX_set_cipher_list(ssl, NV_TLS12_CIPHERS) || !SSL_CTX_set_ciphersuites(ssl, NV_TLS13_CIPHERS) ||
        (!client && !SSL_CTX_set_session_id_context(ssl, session_id_context, sizeof session_id_context - 1))) {
        SSL_CTX_free(ssl);
        return NULL;
    }
    return ssl;
}

nv_tls_context *nv_tls_context_create_side(bool client)
{
    struct nv_tls_context *context = calloc(1, sizeof *context);
    if (context)
        context->ssl = make_ssl_context(client);
    if (!context || !context->ssl) {
        free(context);
        nv_fail(ENOMEM, "cannot make a TLS context: %s", nv_tls_openssl_reason());
        return NULL;
    }
    context->client = client;
    atomic_init(&context->references, 1);
    atomic_init(&context->frozen, false);
    return context;
}

nv_tls_context *nv_tls_context_create(void)
{
    return nv_tls_context_create_side(false);
}

void nv_tls_context_hold(struct nv_tls_context *context)
{
    unsigned before = atomic_fetch_add_explicit(&context->references, 1, memory_order_relaxed);
    assert(before > 0);
    atomic_store_explicit(&context->frozen, true, memory_order_relaxed);
}

static void forget_keys(struct nv_psk *keys, size_t count)
{
    if (keys)
        OPENSSL_cleanse(keys, count * sizeof *keys);
    free(keys);
}

void nv_tls_context_free(nv_tls_context *context)
{
    if (!context)
        return;
    unsigned before = atomic_fetch_sub_explicit(&context->references, 1, memory_order_acq_rel);
    assert(before > 0);
    if (before > 1)
        return;
    SSL_CTX_free(context->ssl);
    forget_keys(context->keys, context->key_count);
    free(context);
}

int nv_tls_context_unfrozen(const struct nv_tls_context *context)
{
    if (!atomic_load_explicit(&context->frozen, memory_order_relaxed))
        return 0;
    return nv_fail(EBUSY, "this TLS context already serves connections: load the new files into a new one");
}

static int load_client_authority(struct nv_tls_context *context, const char *ca_file)
{
    if (!ca_file || !*ca_file)
        return nv_fail(EINVAL, "client certificates are to be checked, but no CA file is given");
    STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(ca_file);
    if (!names || !SSL_CTX_load_verify_file(context->ssl, ca_file)) {
        sk_X509_NAME_pop_free(names, X509_NAME_free);
        return nv_fail(EINVAL, "CA file %s: %s", ca_file, nv_tls_openssl_reason());
    }
    SSL_CTX_set_client_CA_list(context->ssl, names); /* takes the list over */
    SSL_CTX_set_verify(context->ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    context->verify_client = true;
    return 0;
}

int nv_tls_context_x509(nv_tls_context *context, const char *ca_file, const char *cert_file,
                        const char *key_file, uint32_t flags)
{
    assert(context && context->ssl);
    int error = nv_tls_context_unfrozen(context);
    if (error)
        return error;
    error = nv_tls_use_certificate(context, cert_file, key_file);
    if (error)
        return error;
    return flags & NV_TLS_VERIFY_CLIENT ? load_client_authority(context, ca_file) : 0;
}

int nv_tls_use_certificate(struct nv_tls_context *context, const char *cert_file, const char *key_file)
{
    if (!cert_file || !key_file)
        return nv_fail(EINVAL, "x509 needs a certificate file and a key file");
    ERR_clear_error();
    if (SSL_CTX_use_certificate_chain_file(context->ssl, cert_file) != 1)
        return nv_fail(EINVAL, "certificate file %s: %s", cert_file, nv_tls_openssl_reason());
    if (SSL_CTX_use_PrivateKey_file(context->ssl, key_file, SSL_FILETYPE_PEM) != 1)
        return nv_fail(EINVAL, "key file %s: %s", key_file, nv_tls_openssl_reason());
    if (SSL_CTX_check_private_key(context->ssl) != 1)
        return nv_fail(EINVAL, "key file %s does not belong to certificate file %s: %s", key_file, cert_file,
                       nv_tls_openssl_reason());
    return 0;
}

/* ---- the keys file ---- */

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct nv_psk *)a)->name, ((const struct nv_psk *)b)->name);
}

const struct nv_psk *nv_psk_find(const struct nv_tls_context *context, const char *name)
{
    struct nv_psk wanted;
    size_t length = strnlen(name, sizeof wanted.name);
    if (length >= sizeof wanted.name || context->key_count == 0)
        return NULL;
    memcpy(wanted.name, name, length + 1);
    return bsearch(&wanted, context->keys, context->key_count, sizeof wanted, compare_names);
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)tolower((unsigned char)c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Returns what is wrong with the line, NULL when it was read into `psk`. */
static const char *parse_key_line(const char *line, struct nv_psk *psk)
{
    const char *colon = strrchr(line, ':'); /* a name may hold colons, a key cannot */
    if (line[0] == '#')
        return "starts with '#': neither comments nor names in hexadecimal are read here";
    if (!colon || colon == line)
        return "is not NAME:HEXKEY";
    size_t name_length = (size_t)(colon - line), digits = strlen(colon + 1);
    if (name_length > NV_PSK_NAME_MAX)
        return "has a name of more than 128 bytes";
    if (digits % 2 || digits < 2 * NV_PSK_KEY_MIN || digits > 2 * NV_PSK_KEY_MAX)
        return "has a key that is not 16 to 64 bytes (32 to 128 hexadecimal digits)";
    memset(psk, 0, sizeof *psk);
    memcpy(psk->name, line, name_length);
    for (size_t i = 0; i < digits; i += 2) {
        int high = hex_digit(colon[1 + i]), low = hex_digit(colon[2 + i]);
        if (high < 0 || low < 0)
            return "has a key that is not hexadecimal";
        psk->key[i / 2] = (unsigned char)(high << 4 | low);
    }
    psk->key_size = (unsigned)(digits / 2);
    return NULL;
}

struct key_table {
    struct nv_psk *keys;
    size_t count, capacity;
};

static int add_key(struct key_table *table, const struct nv_psk *psk, const char *path)
{
    if (table->count >= NV_PSK_KEYS_MAX)
        return nv_fail(E2BIG, "PSK file %s has more than %u keys", path, (unsigned)NV_PSK_KEYS_MAX);
    if (table->count == table->capacity) {
        size_t capacity = table->capacity ? 2 * table->capacity : 16;
        struct nv_psk *grown = calloc(capacity, sizeof *grown); /* not realloc: it would leave keys behind */
        if (!grown)
            return nv_fail(ENOMEM, "PSK file %s: out of memory", path);
        if (table->count)
            memcpy(grown, table->keys, table->count * sizeof *grown);
        forget_keys(table->keys, table->count);
        table->keys = grown;
        table->capacity = capacity;
    }
    table->keys[table->count++] = *psk;
    assert(table->count <= table->capacity);
    return 0;
}

static int read_key_lines(FILE *file, const char *path, struct key_table *table)
{
    char line[NV_PSK_NAME_MAX + 2 * NV_PSK_KEY_MAX + 4];
    int error = 0;
    for (unsigned number = 1; !error && fgets(line, sizeof line, file); number++) {
        struct nv_psk psk;
        size_t length = strcspn(line, "\r\n");
        const char *wrong = line[length] || feof(file) ? NULL : "is too long";
        line[length] = 0;
        if (!wrong && length == 0)
            continue;
        if (!wrong)
            wrong = parse_key_line(line, &psk);
        error = wrong ? nv_fail(EINVAL, "PSK file %s, line %u %s", path, number, wrong) : add_key(table, &psk, path);
        OPENSSL_cleanse(&psk, sizeof psk);
    }
    OPENSSL_cleanse(line, sizeof line);
    if (!error && ferror(file))
        error = nv_fail(EIO, "PSK file %s cannot be read", path);
    if (!error && table->count == 0)
        error = nv_fail(EINVAL, "PSK file %s holds no key: make one with psktool -u NAME -p %s", path, path);
    return error;
}

static int sort_keys(struct key_table *table, const char *path)
{
    qsort(table->keys, table->count, sizeof *table->keys, compare_names);
    for (size_t i = 1; i < table->count; i++)
        if (compare_names(&table->keys[i - 1], &table->keys[i]) == 0)
            return nv_fail(EINVAL, "PSK file %s has two keys for %s: remove one", path, table->keys[i].name);
    return 0;
}

int nv_tls_load_keys(struct nv_tls_context *context, const char *keys_file)
{
    assert(context && context->ssl && keys_file);
    int error = nv_tls_context_unfrozen(context);
    if (error)
        return error;
    FILE *file = fopen(keys_file, "re");
    if (!file)
        return nv_fail(errno, "PSK file %s: %s", keys_file, strerror(errno));
    struct key_table table = {0};
    setvbuf(file, NULL, _IONBF, 0); /* no copy of the keys in a buffer that nobody wipes */
    error = read_key_lines(file, keys_file, &table);
    fclose(file);
    if (!error)
        error = sort_keys(&table, keys_file);
    if (error) {
        forget_keys(table.keys, table.count);
        return error;
    }
    forget_keys(context->keys, context->key_count);
    context->keys = table.keys;
    context->key_count = table.count;
    return 0;
}

int nv_tls_context_psk(nv_tls_context *context, const char *keys_file)
{
    int error = nv_tls_load_keys(context, keys_file);
    if (!error)
        SSL_CTX_set_psk_server_callback(context->ssl, nv_tls_psk_server);
    return error;
}
