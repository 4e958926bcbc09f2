/* usage: see usage.h. */
#define _GNU_SOURCE
#include "usage.h"

#include <assert.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t field_of(const char *line, const char *key)
{
    size_t n = strlen(key);
    return strncmp(line, key, n) == 0 ? strtoull(line + n, NULL, 10) : 0;
}

static void read_status(const char *path, struct usage *out, int memory)
{
    char line[256];
    FILE *file = fopen(path, "re");
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        if (memory) {
            out->rss_bytes += field_of(line, "VmRSS:") << 10;
            out->rss_anon_bytes += field_of(line, "RssAnon:") << 10;
        } else {
            out->switches += field_of(line, "voluntary_ctxt_switches:");
            out->switches += field_of(line, "nonvoluntary_ctxt_switches:");
        }
    }
    fclose(file);
}

static void read_children(const char *path, struct usage *out)
{
    FILE *file = fopen(path, "re");
    int child;
    if (!file) return;
    while (fscanf(file, "%d", &child) == 1) usage_read(child, out);
    fclose(file);
}

void usage_read(int pid, struct usage *out)
{
    char path[320];
    clockid_t clock;
    struct timespec t;
    assert(pid > 0 && out);
    if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &t) != 0) return;
    out->cpu_ns += (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    read_status(path, out, 1);
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (!tasks) return;
    for (struct dirent *task; (task = readdir(tasks));) {
        if (task->d_name[0] == '.') continue;
        out->threads++;
        snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid, task->d_name);
        read_status(path, out, 0);
        snprintf(path, sizeof path, "/proc/%d/task/%s/children", pid, task->d_name);
        read_children(path, out);
    }
    closedir(tasks);
}
