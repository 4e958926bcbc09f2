/*
 * loadgen: an NBD load generator that costs less than any server: it batches requests per write and
 * reads replies in large chunks, where libnbd and fio's engine make about four system calls a request.
 * Prints one JSON object.
 *
 * Modes: a closed loop for --seconds or --count requests; --idle opens connections and watches what the
 * server pays for them. With --pid the server's CPU time and memory are read around the measurement.
 *
 * It does not: judge, repeat or compare (the Python part of perf/ does), or survive any error: exit 1.
 */
#define _GNU_SOURCE
#include "client.h"
#include "loop.h"
#include "usage.h"

#include <assert.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { THREADS_MAX = 64, PIDS_MAX = 16 };

static const char *const op_names[OP_COUNT] = { "read", "write", "trim", "zero", "flush" };

static struct {
    struct target target;
    struct work work;
    unsigned connections, threads;
    double seconds, warmup_seconds, idle_seconds;
    bool idle;
    int pids[PIDS_MAX];
    unsigned pid_count;
} options = {
    .target = { .export_name = "", .buffer_bytes = 4 << 20 },
    .work = { .block = 4096, .depth = 1, .batch = 1, .seed = 1 },
    .connections = 1, .threads = 1, .seconds = 1, .warmup_seconds = 0.1,
};

/* ---- options ---- */

static uint64_t bytes_of(const char *text)
{
    char *end;
    uint64_t n = strtoull(text, &end, 10);
    unsigned shift = *end == 'k' || *end == 'K' ? 10 : *end == 'm' || *end == 'M' ? 20 : *end == 'g' || *end == 'G' ? 30 : 0;
    if (end == text || (shift ? end[1] : end[0])) fail("not a size: '%s' (digits, then k, m or g)", text);
    return n << shift;
}

static unsigned number_of(const char *text)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (end == text || *end || *text == '-' || n > 1u << 30) fail("not a number: '%s'", text);
    return (unsigned)n;
}

static double seconds_of(const char *text)
{
    char *end;
    double seconds = strtod(text, &end);
    if (end == text || *end || !(seconds >= 0 && seconds < 1e6)) fail("not a time in seconds: '%s'", text);
    return seconds;
}

/* "read=70,write=30": percents that add up to 100. */
static void parse_mix(char *text, struct work *work)
{
    unsigned at = 0;
    for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
        char *equals = strchr(item, '=');
        unsigned percent = equals ? number_of(equals + 1) : 100, op = 0;
        if (equals) *equals = 0;
        while (op < OP_COUNT && strcmp(op_names[op], item) != 0) op++;
        if (op == OP_COUNT || at + percent > 100) fail("--mix: '%s' is unknown, or the sum is above 100", item);
        memset(work->mix + at, (int)op, percent);
        at += percent;
    }
    if (at != 100) fail("--mix: the percents add up to %u, not 100", at);
}

static void parse_psk(char *text, struct target *target)
{
    char *colon = strchr(text, ':');
    if (!colon) fail("--tls-psk: want IDENTITY:HEXKEY");
    *colon = 0;
    target->psk_identity = text;
    for (char *hex = colon + 1; hex[0] && hex[1] && target->psk_bytes < sizeof target->psk; hex += 2) {
        unsigned byte;
        if (sscanf(hex, "%2x", &byte) != 1) fail("--tls-psk: the key is not hexadecimal");
        target->psk[target->psk_bytes++] = (uint8_t)byte;
    }
}

static void parse_tcp(char *text, struct target *target)
{
    char *colon = strrchr(text, ':');
    if (!colon) fail("--tcp: want HOST:PORT");
    *colon = 0;
    target->tcp_host = text;
    target->tcp_port = colon + 1;
}

static void check_options(void)
{
    const struct work *w = &options.work;
    if (!options.target.unix_path == !options.target.tcp_host) fail("give one of --unix PATH and --tcp HOST:PORT");
    if (w->depth < 1 || w->depth > DEPTH_MAX) fail("--depth %u: 1..%d", w->depth, DEPTH_MAX);
    if (options.connections < 1 || options.connections > LANES_MAX) fail("--connections: 1..%d", LANES_MAX);
    if (options.threads < 1 || options.threads > THREADS_MAX || options.threads > options.connections)
        fail("--threads %u: 1..%d and not above --connections", options.threads, THREADS_MAX);
    if (w->block < 1 || w->block > BLOCK_MAX) fail("--block %u: 1..%d", w->block, BLOCK_MAX);
    if (w->verify && w->block % 8 != 0) fail("--verify: --block must be a multiple of 8");
    if (w->batch < 1 || w->batch > w->depth) fail("--batch %u: 1..depth", w->batch);
}

static void usage(void)
{
    fputs("usage: loadgen --unix PATH | --tcp HOST:PORT [--export NAME, %u = connection number]\n"
          "  [--connections N] [--threads N] [--depth N] [--block SIZE] [--mix read=70,write=30,trim=,zero=,flush=]\n"
          "  [--sequential] [--span SIZE] [--fua] [--seconds S] [--warmup S] [--count N-per-connection] [--lockstep]\n"
          "  [--batch N] [--spin-us N] [--verify] [--seed N] [--structured] [--tls-psk IDENTITY:HEXKEY]\n"
          "  [--buffer SIZE] [--pid SERVER]... [--idle SECONDS]\n", stderr);
    exit(2);
}

static void parse_options(int argc, char **argv)
{
    static const struct option longs[] = {
        { "unix", 1, 0, 'u' }, { "tcp", 1, 0, 't' }, { "export", 1, 0, 'e' }, { "connections", 1, 0, 'c' },
        { "threads", 1, 0, 'n' }, { "depth", 1, 0, 'd' }, { "block", 1, 0, 'b' }, { "mix", 1, 0, 'm' },
        { "sequential", 0, 0, 's' }, { "span", 1, 0, 'r' }, { "fua", 0, 0, 'f' }, { "seconds", 1, 0, 'S' },
        { "warmup", 1, 0, 'w' }, { "count", 1, 0, 'C' }, { "lockstep", 0, 0, 'l' }, { "batch", 1, 0, 'B' },
        { "spin-us", 1, 0, 'p' }, { "verify", 0, 0, 'v' }, { "seed", 1, 0, 'x' }, { "structured", 0, 0, 'q' },
        { "tls-psk", 1, 0, 'k' }, { "buffer", 1, 0, 'z' }, { "pid", 1, 0, 'P' }, { "idle", 1, 0, 'i' }, { 0 },
    };
    struct work *w = &options.work;
    for (int o; (o = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (o) {
        case 'u': options.target.unix_path = optarg; break;
        case 't': parse_tcp(optarg, &options.target); break;
        case 'e': options.target.export_name = optarg; break;
        case 'c': options.connections = number_of(optarg); break;
        case 'n': options.threads = number_of(optarg); break;
        case 'd': w->depth = number_of(optarg); break;
        case 'b': w->block = (uint32_t)bytes_of(optarg); break;
        case 'm': parse_mix(optarg, w); break;
        case 's': w->sequential = true; break;
        case 'r': w->span = bytes_of(optarg); break;
        case 'f': w->fua = true; break;
        case 'S': options.seconds = seconds_of(optarg); break;
        case 'w': options.warmup_seconds = seconds_of(optarg); break;
        case 'C': w->count = strtoull(optarg, NULL, 10); break;
        case 'l': w->lockstep = true; break;
        case 'B': w->batch = number_of(optarg); break;
        case 'p': w->spin_us = number_of(optarg); break;
        case 'v': w->verify = true; break;
        case 'x': w->seed = strtoull(optarg, NULL, 10); break;
        case 'q': options.target.structured = true; break;
        case 'k': parse_psk(optarg, &options.target); break;
        case 'z': options.target.buffer_bytes = (int)bytes_of(optarg); break;
        case 'P':
            if (options.pid_count == PIDS_MAX) fail("--pid: at most %d", PIDS_MAX);
            options.pids[options.pid_count++] = (int)number_of(optarg);
            break;
        case 'i': options.idle = true; options.idle_seconds = seconds_of(optarg); break;
        default: usage();
        }
    }
    if (optind != argc) usage();
    check_options();
}

/* ---- running ---- */

struct reading {
    uint64_t wall_ns, client_ns;
    struct usage server;
};

static void read_now(struct reading *r)
{
    struct timespec t;
    memset(r, 0, sizeof *r);
    for (unsigned i = 0; i < options.pid_count; i++) usage_read(options.pids[i], &r->server);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    r->client_ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    r->wall_ns = loop_now_ns();
}

static void sleep_seconds(double seconds)
{
    struct timespec t = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
    nanosleep(&t, NULL);
}

static void *run_worker(void *worker)
{
    loop_run(worker);
    return NULL;
}

static void *run_read_back(void *worker)
{
    loop_read_back(worker);
    return NULL;
}

static void start_all(struct worker *workers, pthread_t *threads, void *(*body)(void *))
{
    for (unsigned i = 0; i < options.threads; i++)
        if (pthread_create(&threads[i], NULL, body, &workers[i]) != 0) fail("cannot start a thread");
}

static void join_all(pthread_t *threads)
{
    for (unsigned i = 0; i < options.threads; i++) pthread_join(threads[i], NULL);
}

/* The measured part. The connections stay open, so that per-connection server processes still count. */
static void measure(struct worker *workers, struct reading *before, struct reading *after)
{
    pthread_t threads[THREADS_MAX];
    if (options.work.count > 0) {
        loop_phase = PHASE_MEASURE;
        read_now(before);
        start_all(workers, threads, run_worker);
        join_all(threads);
        read_now(after);
    } else {
        start_all(workers, threads, run_worker);
        sleep_seconds(options.warmup_seconds);
        read_now(before);
        loop_phase = PHASE_MEASURE;
        sleep_seconds(options.seconds);
        loop_phase = PHASE_DRAIN;
        read_now(after);
        join_all(threads);
    }
    if (options.work.verify) {
        loop_phase = PHASE_WARM;
        start_all(workers, threads, run_read_back);
        join_all(threads);
    }
}

/* ---- the report ---- */

static void print_latency(const struct histogram *h, const char *name, const char *comma)
{
    printf("%s\"%s\": {\"count\": %llu, \"mean_ns\": %.0f, \"p50_ns\": %llu, \"p90_ns\": %llu, \"p99_ns\": %llu, "
           "\"p999_ns\": %llu, \"max_ns\": %llu}", comma, name, (unsigned long long)h->count,
           h->count ? (double)h->sum_ns / (double)h->count : 0, (unsigned long long)histogram_quantile(h, 0.5),
           (unsigned long long)histogram_quantile(h, 0.9), (unsigned long long)histogram_quantile(h, 0.99),
           (unsigned long long)histogram_quantile(h, 0.999), (unsigned long long)h->max_ns);
}

static void print_server(const struct reading *before, const struct reading *after, double requests)
{
    double wall = (double)(after->wall_ns - before->wall_ns), cpu = (double)(after->server.cpu_ns - before->server.cpu_ns);
    printf("\"server\": {\"cpu_ns\": %.0f, \"cpu_fraction\": %.6f, \"cpu_ns_per_request\": %.1f, \"rss_bytes\": %llu, "
           "\"rss_before_bytes\": %llu, \"rss_anon_bytes\": %llu, \"threads\": %u, \"switches\": %llu}", cpu, cpu / wall,
           requests > 0 ? cpu / requests : 0, (unsigned long long)after->server.rss_bytes,
           (unsigned long long)before->server.rss_bytes, (unsigned long long)after->server.rss_anon_bytes,
           after->server.threads, (unsigned long long)(after->server.switches - before->server.switches));
}

static void report(const struct worker *workers, const struct reading *before, const struct reading *after)
{
    static struct counters sum;
    static struct histogram all;
    for (unsigned i = 0; i < options.threads; i++) {
        for (unsigned op = 0; op < OP_COUNT; op++) histogram_merge(&sum.latency[op], &workers[i].counters.latency[op]);
        sum.sends += workers[i].counters.sends;
        sum.receives += workers[i].counters.receives;
        sum.verified += workers[i].counters.verified;
    }
    for (unsigned op = 0; op < OP_COUNT; op++) histogram_merge(&all, &sum.latency[op]);
    double seconds = (double)(after->wall_ns - before->wall_ns) / 1e9, requests = (double)all.count;
    double moved = (double)(sum.latency[OP_READ].count + sum.latency[OP_WRITE].count) * options.work.block;
    double client = (double)(after->client_ns - before->client_ns);
    const struct client *c = &workers[0].lanes[0].client;
    printf("{\"seconds\": %.6f, \"connections\": %u, \"depth\": %u, \"block\": %u, \"structured\": %s, \"cipher\": \"%s\", "
           "\"requests\": %.0f, \"iops\": %.1f, \"bytes_per_s\": %.0f, ", seconds, options.connections, options.work.depth,
           options.work.block, c->structured ? "true" : "false", c->tls ? client_cipher(c) : "", requests, requests / seconds,
           moved / seconds);
    print_server(before, after, requests);
    printf(", \"client\": {\"cpu_ns_per_request\": %.1f, \"sends\": %llu, \"receives\": %llu}, \"verified\": %llu, "
           "\"latency\": {", requests > 0 ? client / requests : 0, (unsigned long long)sum.sends,
           (unsigned long long)sum.receives, (unsigned long long)sum.verified);
    print_latency(&all, "all", "");
    for (unsigned op = 0; op < OP_COUNT; op++)
        if (sum.latency[op].count > 0) print_latency(&sum.latency[op], op_names[op], ", ");
    printf("}}\n");
}

static void report_idle(const struct reading *before, const struct reading *after)
{
    printf("{\"seconds\": %.6f, \"connections\": %u, ", (double)(after->wall_ns - before->wall_ns) / 1e9,
           options.connections);
    print_server(before, after, 0);
    printf("}\n");
}

/* What idle connections cost: memory against the time before they came, CPU time while they wait. */
static void run_idle(void)
{
    struct client *clients = calloc(options.connections, sizeof *clients);
    struct reading empty, before, after;
    if (!clients) fail("out of memory");
    read_now(&empty);
    for (unsigned i = 0; i < options.connections; i++) client_open(&clients[i], &options.target, i);
    sleep_seconds(options.warmup_seconds);
    read_now(&before);
    sleep_seconds(options.idle_seconds);
    read_now(&after);
    before.server.rss_bytes = empty.server.rss_bytes;
    report_idle(&before, &after);
    for (unsigned i = 0; i < options.connections; i++) client_close(&clients[i]);
    free(clients);
}

static void run_load(void)
{
    static struct worker workers[THREADS_MAX];
    struct lane *lanes = calloc(options.connections, sizeof *lanes);
    struct reading before, after;
    if (!lanes) fail("out of memory");
    unsigned given = 0;
    for (unsigned i = 0; i < options.threads; i++) {
        unsigned share = (options.connections - given) / (options.threads - i);
        workers[i].lanes = lanes + given;
        workers[i].lane_count = share;
        given += share;
    }
    assert(given == options.connections);
    for (unsigned i = 0; i < options.connections; i++) {
        client_open(&lanes[i].client, &options.target, i);
        lane_prepare(&lanes[i], &options.work, i, options.connections);
    }
    measure(workers, &before, &after);
    report(workers, &before, &after);
    for (unsigned i = 0; i < options.connections; i++) client_close(&lanes[i].client);
    free(lanes);
}

int main(int argc, char **argv)
{
    struct rlimit files;
    signal(SIGPIPE, SIG_IGN);       /* OpenSSL writes without MSG_NOSIGNAL */
    parse_options(argc, argv);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (options.idle) run_idle();
    else run_load();
    return 0;
}
