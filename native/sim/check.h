/*
 * What a volume's reads may return: the simulation's judge.
 *
 * A volume is an array of cells. Every write has a number and fills each of its cells with a word made of that number
 * and the cell's own, so a cell's bytes tell which write made them, and that it was meant for this place. Per cell the
 * judge keeps the writes that a read could return, and those that could be found there after a crash:
 *
 *  - a write is possible from when it is sent;
 *  - it is impossible for reads sent after a later write was answered ("later": sent after the earlier was answered or
 *    its connection was closed, or sent behind it on the same connection: parse order is range order);
 *  - once a read has returned a write, older ones never come back; and while nothing is being written all reads agree;
 *  - after a crash everything since the last write known to be durable (FUA, or answered before a successful FLUSH was
 *    sent) is possible, and nothing older.
 *
 * Failed writes and trims may have happened in full, in part or not at all: they are possible, but end nothing.
 *
 * Of a mirror (check_is_mirror) less is asked where copies may differ: what a read saw before a crash but nobody answered
 * may be gone after it, and what a read found after a crash lasts for certain only when a later FLUSH was answered.
 */
#ifndef NV_SIM_CHECK_H
#define NV_SIM_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct check;

enum check_kind { CHECK_WRITE, CHECK_ZERO, CHECK_TRIM };

struct check *check_create(uint32_t cell_bytes, uint64_t cells);
void check_destroy(struct check *check);
void check_is_mirror(struct check *check);
/* Whether a copy may hold these bytes for the cell: no write that was answered has ended them. */
bool check_possible(const struct check *check, uint64_t cell, const uint8_t *bytes);
/* Which write these bytes of a cell come from, for people. */
const char *check_name(const struct check *check, uint64_t cell, const uint8_t *bytes);
/* Which writes the cell may hold, and which one these bytes come from: for people, to stderr. */
void check_explain(const struct check *check, uint64_t cell, const uint8_t *bytes);
/* More cells at the end, zero. */
void check_grow(struct check *check, uint64_t cells);

/* A number for a write that is being sent now on `connection`. */
uint32_t check_write_sent(struct check *check, enum check_kind kind, uint32_t connection, uint64_t first, uint64_t count);
/* The bytes it is to carry. */
void check_fill(const struct check *check, uint32_t write, uint64_t first, uint64_t count, uint8_t *out);
void check_write_answered(struct check *check, uint32_t write, bool ok, bool durable);
/* The client closed the connection: what it sent later elsewhere comes after. */
void check_connection_closed(struct check *check, uint32_t connection);
/* The server has let go of the connection: nothing of it can still happen. */
void check_connection_drained(struct check *check, uint32_t connection);

/* A read is sent: keep the returned time for its answer. */
uint64_t check_read_sent(struct check *check);
void check_read_over(struct check *check, uint64_t sent);
/* The answer's bytes for these cells; a wrong one is a violation. Call before check_read_over(). */
void check_read_answer(struct check *check, uint64_t sent, uint64_t first, uint64_t count, const uint8_t *bytes);

uint64_t check_flush_sent(struct check *check);
void check_flush_answered(struct check *check, uint64_t sent);
/* The operator accepted a failed sync: nothing sent so far becomes durable by a later flush. */
void check_fault_cleared(struct check *check);
/* The server is gone: by a power cut, or alone (then nothing that was answered is lost). */
void check_crash(struct check *check, bool cache_survives);

#endif
