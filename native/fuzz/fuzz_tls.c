/*
 * libFuzzer: what a client says through TLS before and after GO, into the real TLS object, option framing and session
 * on the simulated port. OpenSSL is the client, with a pre-shared key. The first bytes choose when the client stops being
 * well-behaved: the input is plaintext of options and of the transmission phase, or raw bytes instead of the client's
 * TLS records, from the start or from the end of the handshake on. Options are answered as Python would: GO enters the
 * transmission phase, ABORT closes, all others get a reply of some length.
 */
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuzz/rig.h"
#include "io/io_sim.h"
#include "limits.h"

#define SETTINGS_BYTES 4u
#define NAME "fuzz"

enum { OPTION_ABORT = 2, OPTION_GO = 7 };

static nv_tls_context *context;
static SSL_CTX *client_context;
static const unsigned char key[16] = "0123456789abcde";

static struct {
    SSL *ssl;
    BIO *incoming, *outgoing;
    uint32_t connection;
    uint8_t settings[SETTINGS_BYTES];
    bool ready, entered, ended;
} client;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned offer_key(SSL *ssl, const char *hint, char *identity, unsigned identity_max, unsigned char *out,
                          unsigned max)
{
    (void)ssl, (void)hint;
    if (max < sizeof key || identity_max < sizeof NAME)
        return 0;
    memcpy(identity, NAME, sizeof NAME);
    memcpy(out, key, sizeof key);
    return sizeof key;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    char path[] = "/tmp/nvfuzzXXXXXX";
    FILE *file = fdopen(mkstemp(path), "w");

    (void)argc, (void)argv;
    if (!file)
        abort();
    fputs(NAME ":", file);
    for (size_t i = 0; i < sizeof key; i++)
        fprintf(file, "%02x", key[i]);
    fputc('\n', file);
    fclose(file);
    context = nv_tls_context_create();
    if (!context || nv_tls_context_psk(context, path) != 0)
        nv_sim_violation("no TLS context: %s", nv_last_error());
    unlink(path);
    client_context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_psk_client_callback(client_context, offer_key);
    return 0;
}

/* ---- the front's part ---- */

static void take_option(void)
{
    static uint8_t payload[NV_OPTION_MAX], answer[5000];
    uint32_t option = 0, action = NV_TLS_CONTINUE;
    int length = nv_tls_option(rig.plane, client.connection, &option, payload, sizeof payload);
    nv_connection_params params = rig_params(client.settings[0], client.settings[1] & 1 ? 512 : 1);

    if (length < 0)
        nv_sim_violation("an offered option cannot be read: %s", nv_last_error());
    if (option == OPTION_GO)
        action = NV_TLS_ENTER;
    else if (option == OPTION_ABORT)
        action = NV_TLS_CLOSE;
    client.entered |= action == NV_TLS_ENTER;
    if (nv_tls_reply(rig.plane, client.connection, answer, option * 37 % sizeof answer, action,
                     rig.volumes[client.settings[1] & 1], &params) != 0)
        nv_sim_violation("an option cannot be answered: %s", nv_last_error());
}

static void heard(const nv_event *event)
{
    char identity[64];

    switch (event->kind) {
    case NV_EVENT_TLS_READY:
        client.ready = true;
        if (nv_tls_identity(rig.plane, client.connection, identity, sizeof identity) < 0 || strcmp(identity, NAME) != 0)
            nv_sim_violation("the peer is not who it proved to be");
        break;
    case NV_EVENT_TLS_OPTION:
        if (!client.ready || client.entered)
            nv_sim_violation("an option outside the haggling");
        take_option();
        break;
    case NV_EVENT_CONNECTION_CLOSED:
        client.ended = true;
        break;
    default:
        nv_sim_violation("event of kind %u", event->kind);
    }
}

/* ---- the client's part ---- */

static void answered(const uint8_t *bytes, size_t size)
{
    uint8_t plain[4096];

    BIO_write(client.incoming, bytes, (int)size);
    while (SSL_is_init_finished(client.ssl) && SSL_read(client.ssl, plain, sizeof plain) > 0)
        ;
}

static void send_records(int socket)
{
    char *records;
    long size = BIO_get_mem_data(client.outgoing, &records);
    uint8_t *copy = malloc((size_t)size + 1);

    if (!copy)
        abort();
    memcpy(copy, records, (size_t)size);
    (void)BIO_reset(client.outgoing);
    rig_send(socket, copy, (size_t)size, 1u + client.settings[2] * 16u, !(client.settings[1] & 4));
    free(copy);
}

static bool shake_hands(int socket)
{
    for (unsigned i = 0; i < 200 && !client.ended; i++) {
        int result = SSL_do_handshake(client.ssl);
        send_records(socket);
        if (result == 1)
            return true;
        for (unsigned j = 0; j < 10; j++)
            rig_step(socket);
    }
    return false;
}

static void talk(int socket, const uint8_t *data, size_t size)
{
    const bool raw_from_start = client.settings[3] & 1, raw_after = client.settings[3] & 2;
    const size_t record = 1u + (client.settings[3] >> 2) * 64u;

    if (raw_from_start) {
        rig_send(socket, data, size, 1u + client.settings[2] * 16u, true);
        return;
    }
    if (!shake_hands(socket))
        nv_sim_violation("an honest client cannot finish the TLS handshake");
    if (raw_after) {
        rig_send(socket, data, size, 1u + client.settings[2] * 16u, true);
        return;
    }
    while (size > 0 && !client.ended && !nv_sim_client_ended(socket)) {
        size_t part = size < record ? size : record;
        if (SSL_write(client.ssl, data, (int)part) <= 0)
            return;
        data += part;
        size -= part;
        send_records(socket);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int socket;

    if (size < SETTINGS_BYTES)
        return -1;
    rig.heard = heard;
    rig.answered = answered;
    rig_begin();
    memset(&client, 0, sizeof client);
    memcpy(client.settings, data, SETTINGS_BYTES);
    client.ssl = SSL_new(client_context);
    client.incoming = BIO_new(BIO_s_mem());
    client.outgoing = BIO_new(BIO_s_mem());
    SSL_set_bio(client.ssl, client.incoming, client.outgoing);
    SSL_set_connect_state(client.ssl);
    socket = nv_sim_socket();
    if (nv_tls_open(rig.plane, socket, context, 10000, 1, &client.connection) != 0)
        nv_sim_violation("the connection does not open: %s", nv_last_error());
    talk(socket, data + SETTINGS_BYTES, size - SETTINGS_BYTES);
    rig_leave(socket, client.settings[1] & 2, &client.ended);
    SSL_free(client.ssl);
    rig_end();
    return 0;
}
