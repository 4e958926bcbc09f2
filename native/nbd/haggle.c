/* The API's TLS entries. */
#include <errno.h>

#include "error.h"
#include "nbdvvol.h"

int nv_tls_open(nv_plane *plane, int fd, nv_tls_context *context, uint32_t timeout_ms, uint64_t token,
                uint32_t *connection)
{
    (void)plane, (void)fd, (void)context, (void)timeout_ms, (void)token, (void)connection;
    return nv_fail(ENOTSUP, "TLS is not wired up yet");
}

int nv_tls_identity(nv_plane *plane, uint32_t connection, char *out, uint64_t size)
{
    (void)plane, (void)connection, (void)out, (void)size;
    return nv_fail(ENOTSUP, "TLS is not wired up yet");
}

int nv_tls_option(nv_plane *plane, uint32_t connection, uint32_t *option, void *out, uint64_t size)
{
    (void)plane, (void)connection, (void)option, (void)out, (void)size;
    return nv_fail(ENOTSUP, "TLS is not wired up yet");
}

int nv_tls_reply(nv_plane *plane, uint32_t connection, const void *bytes, uint64_t length, uint32_t action,
                 uint32_t volume, const nv_connection_params *params)
{
    (void)plane, (void)connection, (void)bytes, (void)length, (void)action, (void)volume, (void)params;
    return nv_fail(ENOTSUP, "TLS is not wired up yet");
}
