/*
 * libFuzzer: arbitrary bytes as a client's transmission phase, into the real session, volume and file backend on the
 * simulated port. The first bytes choose what was negotiated and how the stream is cut; the rest is the stream.
 *
 * It holds the server to: no sanitizer report, no failed assertion, every connection ends after the client has gone,
 * nothing is left behind, framing of answers stays intact where replies carry their length, and bytes of the disk that
 * belong to no run are never written.
 *
 * With NV_FUZZ_CANARY a bug is planted (a WRITE_ZEROES that is carried out ends the process): it must be found.
 */
#include <string.h>

#include "fuzz/rig.h"
#include "io/io_sim.h"
#include "limits.h"
#include "nbd/wire.h"

#define SETTINGS_BYTES 4u

static struct {
    bool ended;
    bool framed;            /* every answer carries its length */
    uint8_t header[NBD_EXTENDED_BYTES];
    size_t have;            /* of the header */
    uint64_t skip;          /* of the body */
} client;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void heard(const nv_event *event)
{
    client.ended |= event->kind == NV_EVENT_CONNECTION_CLOSED;
}

/* Follow the frames of extended replies: the magic must stand wherever a reply starts. */
static void answered(const uint8_t *bytes, size_t size)
{
    while (client.framed && size > 0) {
        size_t part = client.skip < size ? (size_t)client.skip : size;
        client.skip -= part;
        bytes += part;
        size -= part;
        part = sizeof client.header - client.have < size ? sizeof client.header - client.have : size;
        memcpy(client.header + client.have, bytes, part);
        client.have += part;
        bytes += part;
        size -= part;
        if (client.have < sizeof client.header)
            continue;
        client.have = 0;
        client.skip = get64(client.header + 24);
        if (get32(client.header) != NBD_EXTENDED_REPLY_MAGIC || client.skip > NV_PAYLOAD_MAX + 8u)
            nv_sim_violation("an answer starts with %#x and has %llu bytes", get32(client.header),
                             (unsigned long long)client.skip);
    }
}

static void look_for_the_planted_bug(void)
{
#ifdef NV_FUZZ_CANARY
    for (unsigned i = 0; i < 2; i++) {
        nv_volume_stats_t stats;
        if (nv_volume_stats(rig.plane, rig.volumes[i], &stats) == 0 && stats.zeroes > 0)
            nv_sim_violation("the planted bug");
    }
#endif
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *settings = data;
    nv_connection_params params;
    uint32_t connection;
    size_t early;
    int socket;

    if (size < SETTINGS_BYTES)
        return -1;
    data += SETTINGS_BYTES;
    size -= SETTINGS_BYTES;
    early = size < settings[3] ? size : settings[3];
    params = rig_params(settings[0], settings[1] & 1 ? 512 : 1);
    rig.heard = heard;
    rig.answered = answered;
    rig_begin();
    memset(&client, 0, sizeof client);
    client.framed = params.flags & NV_CONN_EXTENDED;
    socket = nv_sim_socket();
    if (nv_connection_open(rig.plane, socket, rig.volumes[settings[1] & 1], &params, data, early, 1, &connection) != 0)
        nv_sim_violation("the connection does not open: %s", nv_last_error());
    rig_send(socket, data + early, size - early, 1u + settings[2] * 16u, !(settings[1] & 4));
    rig_leave(socket, settings[1] & 2, &client.ended);
    look_for_the_planted_bug();
    rig_end();
    return 0;
}
