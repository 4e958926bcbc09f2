/*
 * What the fuzzers of connections share: a simulated world with one plane, two volumes (blocks of 1 and of 512 bytes) on
 * the same run of one disk, and guard bytes before and behind it that nobody may write. A world serves RIG_INPUTS inputs
 * before it is stopped and looked over for leftovers: what a connection does must not depend on those before it
 * (contents of the disk aside, which nothing here decides by).
 */
#ifndef NV_FUZZ_RIG_H
#define NV_FUZZ_RIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbdvvol.h"

#define RIG_VOLUME_BYTES (256u << 10)
#define RIG_INPUTS 100u
#define RIG_PATIENCE 100000u

struct rig {
    nv_plane *plane;
    uint32_t volumes[2];
    int file;
    unsigned inputs;
    void (*heard)(const nv_event *event);                   /* every event; may be NULL */
    void (*answered)(const uint8_t *bytes, size_t size);    /* every byte that the server sends */
};

extern struct rig rig;

/* Before and after each input. */
void rig_begin(void);
void rig_end(void);
/* One step of everything. `socket` >= 0: the client listens. False: nothing can move any more. */
bool rig_step(int socket);
/* Send, a piece at a time, stepping; gives up when the server takes nothing any more. */
void rig_send(int socket, const uint8_t *bytes, size_t size, uint32_t piece, bool listen);
/* The client leaves (by reset, or by a half-close); *ended must become true. */
void rig_leave(int socket, bool reset, const bool *ended);
/* Connection parameters out of one byte. */
nv_connection_params rig_params(uint8_t bits, uint32_t block_min);

#endif
