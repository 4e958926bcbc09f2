/*
 * See log_twin.h.
 */
#include "sim/log_twin.h"

#include <stddef.h>
#include <string.h>

void twin_begin(struct twin *twin, struct nv_io *io, uint64_t seed, uint64_t size)
{
    memset(twin, 0, sizeof *twin);
    twin->io = io;
    twin->random.state = seed ^ 0x7477696e206c6567ull;
    twin->file = nv_sim_file(sim_disk_create(NULL, size), 1, false);
    twin->handle = nv_io_open_file(twin->file);
}

void twin_end(struct twin *twin)
{
    nv_io_close(twin->handle);
}

void twin_step(struct twin *twin)
{
    if (sim_random_chance(&twin->random, 8))
        nv_sim_trouble(twin->file)->hung = sim_random_chance(&twin->random, 512);
}

void twin_heal(struct twin *twin)
{
    nv_sim_trouble(twin->file)->hung = false;
}

static void write_over(struct nv_op *op)
{
    struct twin_write *write = (struct twin_write *)((char *)op - offsetof(struct twin_write, op));

    write->out = false; /* how much of it has been written is nobody's business */
    if (write->kept)
        nv_log_memory_back(write->twin->log, write->iov.iov_base);
}

struct twin_write *twin_begins(struct twin *twin, struct nv_log *log, const struct nv_log_below *io)
{
    struct twin_write *write = NULL;

    for (uint32_t i = 0; i < TWIN_WRITES && !write; i++)
        write = twin->writes[i].out || twin->writes[i].asked ? NULL : &twin->writes[i];
    if (!write || !io->ours || io->kind != NV_LOG_WRITE)
        return NULL;
    twin->log = log;
    *write = (struct twin_write){.twin = twin, .asked = true, .out = true, .iov = {io->data, io->length}};
    write->op = (struct nv_op){.kind = NV_OP_WRITE, .handle = twin->handle, .offset = io->offset, .iov = &write->iov,
                               .iov_count = 1, .done = write_over};
    nv_io_submit(twin->io, &write->op);
    return write;
}

void twin_answered(struct twin_write *write, struct nv_log_below *io)
{
    write->asked = false;
    if (!write->out)
        return;
    write->kept = true;
    nv_log_memory_kept(write->twin->log, io->data);
}

bool twin_rests(const struct twin *twin)
{
    bool busy = false;

    for (uint32_t i = 0; i < TWIN_WRITES; i++)
        busy |= twin->writes[i].out;
    return !busy;
}
