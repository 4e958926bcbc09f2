/*
 * One sentence for people about the last failure of an API call, per thread (nv_last_error() reads it).
 */
#ifndef NV_ERROR_H
#define NV_ERROR_H

/* Remember the sentence (cut at 255 bytes) and return -code. It says what, value, limit, what to do next. */
int nv_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
