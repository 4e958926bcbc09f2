/*
 * The last error's sentence. Thread-local, so that a reactor's failure never shows up as the API's.
 */
#include "error.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>

#include "nbdvvol.h"

static _Thread_local char sentence[256];

int nv_fail(int code, const char *format, ...)
{
    va_list arguments;

    assert(code > 0);
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return -code;
}

const char *nv_last_error(void)
{
    return sentence;
}
