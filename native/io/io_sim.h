/*
 * The simulated I/O port: io.h in one thread, under a seed. It reorders completions, delays them, fails them,
 * cuts transfers short, and keeps disks whose unsynced sectors a crash may lose (sim/disk.h). Sockets are pairs
 * of byte queues whose other ends the simulation holds.
 *
 * There is one world at a time. nv_sim_step() performs one operation's effect; the port's own calls only take
 * operations and hand completions back. It also judges its user: an operation's memory that changes while the port
 * owns it, a handle used after its close, or an operation left behind is a violation, and ends the process.
 */
#ifndef NV_IO_SIM_H
#define NV_IO_SIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/io.h"
#include "sim/disk.h"
#include "sim/random.h"

struct nv_sim_faults {          /* chances in 1024, of an operation */
    uint16_t read_error;
    uint16_t write_error;
    uint16_t sync_error;
    uint16_t dsync_error;
    uint16_t punch_error;
    uint16_t short_transfer;
    uint16_t delay;             /* up to 10 ms of simulated time */
    uint16_t stall;             /* up to 2 s */
    uint32_t atom;              /* transfers are cut at multiples of it */
    uint16_t bad_view;          /* a send from a view fails (-EFAULT) */
    bool no_punch;              /* the disks do not know the operation */
    bool no_zero_range;
};

/* Begin a world. Its chance is its own: the same seed and the same calls give the same run. */
void nv_sim_begin(uint64_t seed, const struct nv_sim_faults *faults);
void nv_sim_end(void);
void nv_sim_set_faults(const struct nv_sim_faults *faults);

/* One operation, chosen by chance, has its effect. False: none can go on before the clock moves or somebody acts. */
bool nv_sim_step(void);
/* Move the clock to the next timer or delayed operation. False: there is none. */
bool nv_sim_advance(void);
uint64_t nv_sim_clock_ns(void);
uint64_t nv_sim_timers_late_ns(void); /* the latest so far: from its time until the user of the port heard of it */
struct nv_sim_counts {          /* of files' operations, so far in this world */
    uint64_t reordered, delayed, errors, fenced, syncs_failed, short_transfers, torn;
};
struct nv_sim_counts nv_sim_counts(void);

/* A file as a descriptor for nv_io_open_file(); the world owns the disk. With `align` > 1 it is open with O_DIRECT:
 * offsets, lengths and memory that are no multiples of it are violations. A file in memory has a view, too. */
int nv_sim_file(struct sim_disk *disk, uint32_t align, bool in_memory);
/*
 * Another descriptor of the same disk, as another machine has it: its troubles are its own. A file's troubles are those of
 * every handle that was opened through it.
 */
int nv_sim_file_again(int file);
struct nv_sim_trouble {
    bool hung;                  /* nothing completes */
    bool stuck_writes;          /* nothing but reads completes */
    bool stuck_reads;           /* no read completes */
    bool gone;                  /* everything fails with -EIO, without effect */
    bool fenced;                /* ... with -ESTALE */
    uint64_t stuck_before;      /* what was asked before this moment (nv_sim_time) does not complete */
    uint16_t read_error, write_error, sync_error; /* chances in 1024, beside the world's */
};
struct nv_sim_trouble *nv_sim_trouble(int file);
/* What is on its way through the file to its disk has its effect now, in part or not at all, and fails. */
void nv_sim_settle(int file, struct sim_random *random);
struct sim_disk *nv_sim_disk(int file);
/* Counts effects: an operation that is asked for from here on is later. */
uint64_t nv_sim_time(void);
/* The clock jumps forward. */
void nv_sim_jump(uint64_t ns);
/* What a power cut at this moment leaves, or with `cache_survives` the death of the process alone: operations in
 * flight may have happened in part. */
void nv_sim_crash(int file, bool cache_survives, struct sim_random *random, uint8_t *image);

/* A connected socket pair: the returned descriptor is the server's end, and names the client's in the calls below. */
int nv_sim_socket(void);
void nv_sim_socket_room(int socket, size_t bytes); /* how much of it each direction holds, before anything is sent */
size_t nv_sim_client_send(int socket, const void *bytes, size_t size); /* bytes taken; 0: full or closed */
size_t nv_sim_client_recv(int socket, void *out, size_t capacity);
bool nv_sim_client_ended(int socket);    /* the server is gone and everything it sent was received */
bool nv_sim_client_left(int socket);     /* ... whatever of it may still be on its way */
void nv_sim_client_shut(int socket);     /* no more will be sent */
void nv_sim_client_close(int socket, bool reset);
void nv_sim_hurry(int socket);           /* operations of it are not delayed any more */

/* How to tell what led to a violation; printed before the process ends. */
extern void (*nv_sim_on_violation)(void);
_Noreturn void nv_sim_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
