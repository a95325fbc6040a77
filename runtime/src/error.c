/* error.c - the words of the last failure, one text a thread. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "runtime.h"

enum { TEXT_BYTES = 2048 };

static _Thread_local char text[TEXT_BYTES];

static void append(const char *label, const char *words)
{
    size_t n = strlen(text);
    if (words) snprintf(text + n, sizeof text - n, "\n  %s: %s", label, words);
}

llmc_status fail(llmc_status status, const char *place, const char *hint, const char *fact, ...)
{
    va_list values;
    va_start(values, fact);
    vsnprintf(text, sizeof text, fact, values);
    va_end(values);
    append("at", place);
    append("hint", hint);
    return status;
}

const char *error_text(void)
{
    return text;
}
