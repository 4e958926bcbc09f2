/*
 * steps: counts the user-space instructions of one thread, by address, by single-stepping it (ptrace).
 *
 * Why: this is exact on machines without performance counters, and valgrind 3.19 cannot run a program
 * that sleeps in io_uring_enter (it keeps its big lock there). A step costs microseconds, so the thread
 * runs about a thousand times slower: count with loads in lockstep, whose batches do not depend on speed.
 *
 * Writes to OUT lines "ADDRESS COUNT" when SIGTERM or SIGINT comes: how often the instruction at that address ran.
 * Kernel instructions do not count; a system call is one instruction.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

enum { TABLE_BITS = 18, TABLE_SIZE = 1 << TABLE_BITS };

struct row {
    uint64_t address, count;
};

static struct row table[TABLE_SIZE];
static unsigned used;
static volatile sig_atomic_t stop;

static void on_signal(int number) { (void)number; stop = 1; }

static void die(const char *what)
{
    fprintf(stderr, "steps: %s: %s\n", what, strerror(errno));
    exit(1);
}

static struct row *row_of(uint64_t address)
{
    uint64_t hash = address * 0x9e3779b97f4a7c15ull >> (64 - TABLE_BITS);
    while (table[hash].address != address) {
        if (table[hash].address == 0) {
            if (++used > TABLE_SIZE / 4 * 3) { fprintf(stderr, "steps: too many different addresses\n"); exit(1); }
            table[hash].address = address;
        }
        else hash = (hash + 1) % TABLE_SIZE;
    }
    return &table[hash];
}

/* Wait for the next stop. False: asked to end, or the thread is gone. */
static int next_stop(pid_t tid, int *status)
{
    while (waitpid(tid, status, __WALL) < 0) {
        if (errno != EINTR) die("waitpid");
        if (stop) return 0;
    }
    return WIFSTOPPED(*status);
}

static void count_steps(pid_t tid)
{
    uint64_t before = 0;
    int deliver = 0, status;
    while (!stop) {
        errno = 0;
        uint64_t address = (uint64_t)ptrace(PTRACE_PEEKUSER, tid, offsetof(struct user_regs_struct, rip), NULL);
        if (errno != 0) die("read registers");
        if (address != before) {    /* a `rep movsb` traps after every byte, and is one instruction */
            row_of(address)->count++;
        }
        before = address;
        if (ptrace(PTRACE_SINGLESTEP, tid, NULL, (void *)(intptr_t)deliver) < 0) die("step");
        if (!next_stop(tid, &status)) return;
        int number = WSTOPSIG(status);
        deliver = number == SIGTRAP || status >> 16 != 0 ? 0 : number;
    }
}

/* Is a SIGTRAP of ours still on its way to the thread? */
static int trap_pending(pid_t tid)
{
    char path[64], line[128];
    unsigned long long pending = 0;
    snprintf(path, sizeof path, "/proc/%d/status", tid);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, "SigPnd:", 7) == 0) pending = strtoull(line + 7, NULL, 16);
    fclose(file);
    return (pending >> (SIGTRAP - 1) & 1) != 0;
}

/*
 * The thread may run, or sleep in the kernel: stop it, so that it can be let go. A sleep that the stop
 * ends leaves the trap of its last step pending, and a trap that nobody traces kills the process.
 */
static void let_go(pid_t tid)
{
    int status;
    if (ptrace(PTRACE_DETACH, tid, NULL, NULL) == 0) return;
    if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) < 0) return;
    for (;;) {
        while (waitpid(tid, &status, __WALL) < 0)
            if (errno != EINTR) return;
        if (!WIFSTOPPED(status)) return;
        if (!trap_pending(tid)) break;
        if (ptrace(PTRACE_CONT, tid, NULL, NULL) < 0) return;
    }
    ptrace(PTRACE_DETACH, tid, NULL, NULL);
}

/* Both on one processor: a step is then two switches there, and no wake-up of a sleeping one, which costs ten times. */
static void share_processor(pid_t tid, cpu_set_t *before)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((unsigned)sched_getcpu(), &one);
    if (sched_getaffinity(tid, sizeof *before, before) < 0) die("read the thread's processors");
    if (sched_setaffinity(0, sizeof one, &one) < 0 || sched_setaffinity(tid, sizeof one, &one) < 0)
        die("share a processor with the thread");
}

int main(int argc, char **argv)
{
    cpu_set_t before;
    if (argc != 3) {
        fprintf(stderr, "usage: steps THREAD-ID OUT   (until SIGTERM)\n");
        return 2;
    }
    pid_t tid = (pid_t)strtol(argv[1], NULL, 10);
    struct sigaction action = { .sa_handler = on_signal };
    int status;
    assert(TABLE_SIZE > 0 && sizeof(long) == sizeof(uint64_t));
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) < 0) die("seize the thread");
    if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) < 0) die("stop the thread");
    share_processor(tid, &before);
    puts("counting");
    fflush(stdout);
    if (next_stop(tid, &status)) count_steps(tid);
    let_go(tid);
    sched_setaffinity(tid, sizeof before, &before);     /* it may be gone, and then needs none */
    FILE *out = fopen(argv[2], "we");
    if (!out) die(argv[2]);
    for (unsigned i = 0; i < TABLE_SIZE; i++)
        if (table[i].address)
            fprintf(out, "%llx %llu\n", (unsigned long long)table[i].address, (unsigned long long)table[i].count);
    return fclose(out) == 0 ? 0 : 1;
}
