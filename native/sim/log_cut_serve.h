/*
 * An NBD server in front of the log that is being recorded (log_cut.h), for fio and whoever else speaks NBD: a few
 * connections on a unix socket, simple replies, READ, WRITE, FLUSH, TRIM and WRITE_ZEROES of whole blocks, FUA. Only what a
 * good client sends is understood; anything else ends the program with a sentence.
 */
#ifndef NV_SIM_LOG_CUT_SERVE_H
#define NV_SIM_LOG_CUT_SERVE_H

#include "sim/log_model.h"

#define CUT_STREAM_BYTES (16u * MODEL_BLOCK) /* so much in sequence, and a writer goes past the log */

/* Until standard input ends and every connection has. */
void cut_serve(const char *socket_path);

#endif
