/*
 * See check.h. Time counts the judge's own events. Invariants: `dead` of a candidate is the time from which newly sent
 * reads cannot return it; a candidate that is dead for every read under way and for a crash is forgotten.
 */
#include "sim/check.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/io_sim.h"

#define NEVER UINT64_MAX
#define PRUNE_ABOVE 6u
#define NOBODY UINT32_MAX

struct write {
    uint64_t sent, answered; /* answered: 0 while it is under way */
    uint64_t first, count;
    uint32_t connection;
    enum check_kind kind;
    bool ok;
    bool lost;   /* its answer had not come when a power cut took what was not durable */
};

struct candidate {
    uint32_t write;
    bool crash_dead;
    bool image;  /* found there at the last start: as durable as it will ever be, but perhaps not this one */
    bool unsure; /* a failed sync may have lost it */
    bool answered_over; /* dead because a later write was answered, not only because of what reads saw */
    uint64_t dead;
    uint64_t seen; /* when a read found it there while nothing was being written; 0: not yet */
    uint32_t killer; /* the write that a read saw when this one died; NOBODY: none */
};

struct cell {
    struct candidate *candidates;
    uint32_t count, capacity;
    bool dirty; /* listed in check->dirty */
};

struct check {
    uint32_t cell_bytes;
    bool mirror;
    uint64_t cells;
    uint64_t time;
    struct cell *table;
    uint64_t *dirty; /* cells that a flush may settle */
    uint64_t dirty_count;
    struct write *writes;
    uint32_t write_count, write_capacity;
    uint64_t *closed; /* per connection: when the client closed it, or 0 */
    uint32_t connections;
    uint64_t *reads; /* times of the reads under way */
    uint32_t read_count, read_capacity;
};

static void *grown(void *array, size_t count, size_t size)
{
    array = realloc(array, count * size);
    assert(array);
    return array;
}

/* ---- candidates ---- */

static void add_candidate(struct check *check, uint64_t index, uint32_t write, bool image)
{
    struct cell *cell = &check->table[index];

    if (cell->count == cell->capacity) {
        cell->capacity = cell->capacity ? 2 * cell->capacity : 4;
        cell->candidates = grown(cell->candidates, cell->capacity, sizeof *cell->candidates);
    }
    cell->candidates[cell->count++] = (struct candidate){.write = write, .image = image, .dead = NEVER, .killer = NOBODY};
    if (!cell->dirty) {
        cell->dirty = true;
        check->dirty[check->dirty_count++] = index;
    }
}

static uint32_t new_write(struct check *check, struct write write)
{
    if (check->write_count == check->write_capacity) {
        check->write_capacity = check->write_capacity ? 2 * check->write_capacity : 256;
        check->writes = grown(check->writes, check->write_capacity, sizeof *check->writes);
    }
    check->writes[check->write_count] = write;
    return check->write_count++;
}

void check_grow(struct check *check, uint64_t cells)
{
    uint64_t old = check->cells;
    uint32_t zero;

    assert(cells >= old);
    check->table = grown(check->table, cells, sizeof *check->table);
    check->dirty = grown(check->dirty, cells, sizeof *check->dirty);
    memset(check->table + old, 0, (cells - old) * sizeof *check->table);
    check->cells = cells;
    check->time++;
    zero = new_write(check, (struct write){.sent = check->time, .answered = check->time, .first = old,
                                           .count = cells - old, .kind = CHECK_ZERO, .ok = true});
    for (uint64_t i = old; i < cells; i++)
        add_candidate(check, i, zero, true);
}

struct check *check_create(uint32_t cell_bytes, uint64_t cells)
{
    struct check *check = calloc(1, sizeof *check);

    assert(check && cell_bytes >= 8 && cell_bytes % 8 == 0);
    check->cell_bytes = cell_bytes;
    check_grow(check, cells);
    return check;
}

void check_is_mirror(struct check *check)
{
    check->mirror = true;
}

void check_destroy(struct check *check)
{
    for (uint64_t i = 0; i < check->cells; i++)
        free(check->table[i].candidates);
    free(check->table);
    free(check->dirty);
    free(check->writes);
    free(check->closed);
    free(check->reads);
    free(check);
}

/* True when `a` took effect before `b` whatever happened. */
static bool before(const struct check *check, uint32_t a, uint32_t b)
{
    const struct write *first = &check->writes[a], *second = &check->writes[b];
    uint64_t closed = first->connection < check->connections ? check->closed[first->connection] : 0;

    if (a == b)
        return false;
    if (first->answered && first->answered < second->sent)
        return true;
    if (closed && closed < second->sent)
        return true;
    return first->connection == second->connection && first->sent < second->sent;
}

/* What it wrote is there for certain. */
static bool certain(const struct write *write)
{
    return write->answered && write->ok && write->kind != CHECK_TRIM;
}

/* Dead from now on, because a read saw `killer`, or (NOBODY) because a later write was answered. */
static void kill_candidate(const struct check *check, struct candidate *candidate, uint32_t killer)
{
    if (candidate->dead == NEVER) {
        candidate->dead = check->time;
        candidate->killer = killer;
    }
    candidate->answered_over |= killer == NOBODY;
}

static void end_older(struct check *check, struct cell *cell, uint32_t write, bool for_reads, bool for_crash, bool seen)
{
    for (uint32_t i = 0; i < cell->count; i++) {
        struct candidate *candidate = &cell->candidates[i];
        if (!before(check, candidate->write, write))
            continue;
        if (for_reads)
            kill_candidate(check, candidate, seen ? write : NOBODY);
        candidate->crash_dead |= for_crash;
    }
}

static void prune(struct check *check, struct cell *cell)
{
    uint64_t oldest = check->time;
    uint32_t kept = 0;

    if (cell->count <= PRUNE_ABOVE)
        return;
    for (uint32_t i = 0; i < check->read_count; i++)
        oldest = check->reads[i] < oldest ? check->reads[i] : oldest;
    for (uint32_t i = 0; i < cell->count; i++) {
        const struct candidate *candidate = &cell->candidates[i];
        if (!(candidate->crash_dead && candidate->dead < oldest && (candidate->answered_over || !check->mirror)))
            cell->candidates[kept++] = *candidate;
    }
    cell->count = kept;
}

/* ---- writes ---- */

uint32_t check_write_sent(struct check *check, enum check_kind kind, uint32_t connection, uint64_t first, uint64_t count)
{
    uint32_t number;

    assert(first + count <= check->cells);
    while (check->connections <= connection) {
        check->closed = grown(check->closed, check->connections + 1, sizeof *check->closed);
        check->closed[check->connections++] = 0;
    }
    number = new_write(check, (struct write){.sent = ++check->time, .first = first, .count = count,
                                             .connection = connection, .kind = kind});
    for (uint64_t i = first; i < first + count; i++) {
        prune(check, &check->table[i]);
        add_candidate(check, i, number, false);
    }
    return number;
}

static uint64_t word_of(const struct check *check, uint32_t write, uint64_t cell)
{
    uint64_t z = ((uint64_t)write << 32) ^ cell ^ 0x5bd1e995u;

    if (check->writes[write].kind != CHECK_WRITE)
        return 0;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) | 1;
}

void check_fill(const struct check *check, uint32_t write, uint64_t first, uint64_t count, uint8_t *out)
{
    for (uint64_t i = first; i < first + count; i++) {
        uint64_t word = word_of(check, write, i);
        for (uint32_t at = 0; at < check->cell_bytes; at += 8, out += 8)
            memcpy(out, &word, 8);
    }
}

/* It failed, and a copy that reads saw it on may be lost with it: what they ended may come back. */
static void revive(struct check *check, uint32_t number)
{
    const struct write *write = &check->writes[number];

    for (uint64_t i = write->first; i < write->first + write->count; i++)
        for (uint32_t j = 0; j < check->table[i].count; j++) {
            struct candidate *candidate = &check->table[i].candidates[j];
            if (candidate->killer == number && !candidate->answered_over)
                candidate->dead = NEVER;
        }
}

void check_write_answered(struct check *check, uint32_t number, bool ok, bool durable)
{
    struct write *write = &check->writes[number];

    check->time++;
    if (!write->answered) /* else its connection has ended, and the answer was still on its way */
        write->answered = check->time;
    write->ok = ok && (durable || !write->lost); /* a deposed host's word, on its way when a cache was lost, is none */
    if (!ok && check->mirror)
        revive(check, number);
    if (!certain(write))
        return;
    for (uint64_t i = write->first; i < write->first + write->count; i++)
        end_older(check, &check->table[i], number, true, durable, false);
}

void check_connection_closed(struct check *check, uint32_t connection)
{
    check->time++;
    if (connection < check->connections)
        check->closed[connection] = check->time;
}

void check_connection_drained(struct check *check, uint32_t connection)
{
    check->time++;
    for (uint32_t i = 0; i < check->write_count; i++)
        if (check->writes[i].connection == connection && !check->writes[i].answered)
            check->writes[i].answered = check->time;
}

/* ---- reads ---- */

uint64_t check_read_sent(struct check *check)
{
    if (check->read_count == check->read_capacity) {
        check->read_capacity = check->read_capacity ? 2 * check->read_capacity : 64;
        check->reads = grown(check->reads, check->read_capacity, sizeof *check->reads);
    }
    return check->reads[check->read_count++] = ++check->time;
}

void check_read_over(struct check *check, uint64_t sent)
{
    for (uint32_t i = 0; i < check->read_count; i++)
        if (check->reads[i] == sent) {
            check->reads[i] = check->reads[--check->read_count];
            return;
        }
    assert(!"the read was sent");
}

/* Which write a word came from, for people. */
static const char *name_word(const struct check *check, uint64_t word, uint64_t index)
{
    static char name[120];

    if (word == 0)
        return "zeros";
    for (uint64_t cell = 0; cell < check->cells; cell++) /* the right cell first */
        for (uint32_t i = 0; i < check->write_count; i++) {
            const struct write *write = &check->writes[i];
            uint64_t at = cell ? cell - (cell <= index) : index;
            if (write->kind != CHECK_WRITE || word_of(check, i, at) != word)
                continue;
            snprintf(name, sizeof name, "write %u for cell %llu, connection %u, sent %llu, answered %llu%s", i,
                     (unsigned long long)at, write->connection, (unsigned long long)write->sent,
                     (unsigned long long)write->answered, write->ok ? "" : " not ok");
            return name;
        }
    return "of no write";
}

static void list_candidates(const struct check *check, uint64_t index, uint64_t word, char *text, size_t size)
{
    const struct cell *cell = &check->table[index];
    size_t used = 0;

    text[0] = 0;
    for (uint32_t i = 0; i < cell->count && used + 160 < size; i++) {
        const struct candidate *c = &cell->candidates[i];
        const struct write *w = &check->writes[c->write];
        used += (size_t)snprintf(text + used, size - used,
                                 "\n  write %u (%s, connection %u) sent %llu answered %llu%s dead %lld%s%s%s%s", c->write,
                                 w->kind == CHECK_WRITE ? "data" : w->kind == CHECK_ZERO ? "zero" : "trim",
                                 w->connection, (unsigned long long)w->sent, (unsigned long long)w->answered,
                                 w->ok ? "" : " (not ok)", (long long)c->dead, c->crash_dead ? " crash-dead" : "",
                                 c->image ? " image" : "", c->unsure ? " unsure" : "",
                                 word_of(check, c->write, index) == word ? "   <- what was read" : "");
    }
}

const char *check_name(const struct check *check, uint64_t cell, const uint8_t *bytes)
{
    uint64_t word;

    memcpy(&word, bytes, 8);
    return name_word(check, word, cell);
}

void check_explain(const struct check *check, uint64_t cell, const uint8_t *bytes)
{
    char text[1500];
    uint64_t word;

    memcpy(&word, bytes, 8);
    list_candidates(check, cell, word, text, sizeof text);
    fprintf(stderr, "cell %llu holds %#llx (%s); possible:%s\n", (unsigned long long)cell, (unsigned long long)word,
            name_word(check, word, cell), text);
}

static void complain(const struct check *check, uint64_t index, uint64_t sent, uint64_t word)
{
    char text[1500];

    list_candidates(check, index, word, text, sizeof text);
    nv_sim_violation("cell %llu (%u bytes each) reads %#llx (%s), which no possible write left there; read sent at "
                     "%llu, answered at %llu; possible:%s",
                     (unsigned long long)index, check->cell_bytes, (unsigned long long)word,
                     name_word(check, word, index), (unsigned long long)sent, (unsigned long long)check->time, text);
}

/* Nothing was being written to the cell between the read's start and now. */
static bool quiet(const struct check *check, const struct cell *cell, uint64_t since)
{
    for (uint32_t i = 0; i < cell->count; i++) {
        const struct write *write = &check->writes[cell->candidates[i].write];
        if (!write->answered || write->answered > since)
            return false;
    }
    return true;
}

static void learn_from_read(struct check *check, struct cell *cell, uint64_t index, uint64_t sent, uint64_t word)
{
    bool settled = quiet(check, cell, sent), image_only = settled;
    uint32_t matches = 0, match = 0;

    for (uint32_t i = 0; i < cell->count; i++) {
        const struct candidate *candidate = &cell->candidates[i];
        if (candidate->dead > sent && word_of(check, candidate->write, index) == word) {
            match = candidate->write;
            image_only &= candidate->image;
            matches++;
        }
    }
    assert(matches > 0);
    if (matches == 1)
        end_older(check, cell, match, true, false, true);
    for (uint32_t i = 0; i < cell->count && settled; i++) {
        struct candidate *candidate = &cell->candidates[i];
        if (word_of(check, candidate->write, index) == word) {
            if (matches == 1 && candidate->write == match && !candidate->seen)
                candidate->seen = check->time;
            continue;
        }
        kill_candidate(check, candidate, match);
        candidate->crash_dead |= image_only && candidate->image && !check->mirror;
    }
}

static void check_cell(struct check *check, uint64_t sent, uint64_t index, const uint8_t *bytes)
{
    struct cell *cell = &check->table[index];
    uint64_t word, other;
    bool possible = false;

    memcpy(&word, bytes, 8);
    for (uint32_t at = 8; at < check->cell_bytes; at += 8) {
        memcpy(&other, bytes + at, 8);
        if (other != word)
            nv_sim_violation("cell %llu is torn: %#llx at its start, %#llx at byte %u", (unsigned long long)index,
                             (unsigned long long)word, (unsigned long long)other, at);
    }
    for (uint32_t i = 0; i < cell->count && !possible; i++)
        possible = cell->candidates[i].dead > sent && word_of(check, cell->candidates[i].write, index) == word;
    if (!possible)
        complain(check, index, sent, word);
    learn_from_read(check, cell, index, sent, word);
}

bool check_possible(const struct check *check, uint64_t index, const uint8_t *bytes)
{
    const struct cell *cell = &check->table[index];
    uint64_t word;

    memcpy(&word, bytes, 8);
    for (uint32_t at = 8; at < check->cell_bytes; at += 8)
        if (memcmp(bytes + at, &word, 8) != 0)
            return false;
    for (uint32_t i = 0; i < cell->count; i++)
        if (!cell->candidates[i].answered_over && word_of(check, cell->candidates[i].write, index) == word)
            return true;
    return false;
}

void check_read_answer(struct check *check, uint64_t sent, uint64_t first, uint64_t count, const uint8_t *bytes)
{
    check->time++;
    assert(first + count <= check->cells);
    for (uint64_t i = first; i < first + count; i++, bytes += check->cell_bytes)
        check_cell(check, sent, i, bytes);
}

/* ---- durability ---- */

uint64_t check_flush_sent(struct check *check)
{
    return ++check->time;
}

/* A read found this one there, and then all was made durable: what else the cell might have held before is out. */
static void end_others(const struct check *check, struct cell *cell, const struct candidate *found)
{
    for (uint32_t i = 0; i < cell->count; i++)
        cell->candidates[i].crash_dead |= &cell->candidates[i] != found &&
                                          check->writes[cell->candidates[i].write].sent < found->seen;
}

void check_flush_answered(struct check *check, uint64_t sent)
{
    uint64_t kept = 0;

    check->time++;
    for (uint64_t i = 0; i < check->dirty_count; i++) {
        struct cell *cell = &check->table[check->dirty[i]];
        for (uint32_t j = 0; j < cell->count; j++) {
            const struct candidate *candidate = &cell->candidates[j];
            const struct write *write = &check->writes[candidate->write];
            if (certain(write) && write->answered < sent && !candidate->image && !candidate->unsure)
                end_older(check, cell, candidate->write, false, true, false);
            if (check->mirror && candidate->seen && candidate->seen < sent && !candidate->unsure)
                end_others(check, cell, candidate);
        }
        prune(check, cell);
        cell->dirty = cell->count > 1;
        if (cell->dirty)
            check->dirty[kept++] = check->dirty[i];
    }
    check->dirty_count = kept;
}

void check_fault_cleared(struct check *check)
{
    check->time++;
    for (uint64_t i = 0; i < check->cells; i++)
        for (uint32_t j = 0; j < check->table[i].count; j++)
            check->table[i].candidates[j].unsure = true; /* its answer may be on its way: it may be lost already */
}

/*
 * Disks of a mirror live on, with what is not durable in their caches: after the death of a process alone, what was
 * answered is there, and what it ended is dead to reads; a later power cut may still bring that back.
 */
static void survive_process(struct check *check, struct candidate *candidate)
{
    candidate->image |= !certain(&check->writes[candidate->write]);
    candidate->killer = NOBODY;
    candidate->seen = 0;
    if (!candidate->answered_over)
        candidate->dead = NEVER;
}

static void survive_power_cut(struct candidate *candidate)
{
    *candidate = (struct candidate){.write = candidate->write, .image = true, .dead = NEVER, .killer = NOBODY};
}

void check_crash(struct check *check, bool cache_survives)
{
    check->time++;
    check->read_count = 0;
    for (uint32_t i = 0; i < check->write_count; i++) {
        check->writes[i].lost |= !check->writes[i].ok && !cache_survives;
        if (!check->writes[i].answered)
            check->writes[i].answered = check->time;
    }
    for (uint64_t i = 0; i < check->cells; i++) {
        struct cell *cell = &check->table[i];
        uint32_t kept = 0;
        for (uint32_t j = 0; j < cell->count; j++) {
            struct candidate *candidate = &cell->candidates[j];
            if (cache_survives && !check->mirror ? candidate->dead != NEVER : candidate->crash_dead)
                continue;
            if (cache_survives && check->mirror)
                survive_process(check, candidate);
            else
                survive_power_cut(candidate);
            cell->candidates[kept++] = *candidate;
        }
        cell->count = kept;
        assert(kept > 0);
    }
}
