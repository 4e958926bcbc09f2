/* See store.h. */
#include "io/store.h"

#include <assert.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define PAST_CACHE_BYTES 1024u /* a shorter copy is not worth a fence */
#define STEP 256u              /* bytes: four cache lines */

static struct sigaction before;
static bool ready;
static pthread_once_t once = PTHREAD_ONCE_INIT;
/* Of the copy that this thread is in. Of the initial model, because a handler may not allocate a thread's block for it. */
static _Thread_local sigjmp_buf *volatile way_out __attribute__((tls_model("initial-exec")));

static void copy_through_cache(uint8_t *to, const uint8_t *from, size_t length)
{
    memcpy(to, from, length);
}

#ifdef __x86_64__
static bool wide; /* the processor has AVX */

/*
 * Past the processor's cache: the lines that are written over need not be fetched before, nor others be thrown out for
 * them. `to` is aligned to 32 bytes; both ends are whole steps.
 */
__attribute__((target("avx"))) static void copy_past_cache(uint8_t *to, const uint8_t *from, size_t length)
{
    for (size_t at = 0; at < length; at += STEP) {
#pragma GCC unroll 8
        for (size_t part = 0; part < STEP; part += 32)
            _mm256_stream_si256((__m256i *)(void *)(to + at + part),
                                _mm256_loadu_si256((const __m256i *)(const void *)(from + at + part)));
    }
    _mm_sfence(); /* who hears of the write has to find it */
}

static void copy(uint8_t *to, const uint8_t *from, size_t length)
{
    if (wide && length >= PAST_CACHE_BYTES && length % STEP == 0 && (uintptr_t)to % 32 == 0)
        copy_past_cache(to, from, length);
    else
        copy_through_cache(to, from, length);
}
#else
#define copy copy_through_cache
#endif

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    if (way_out)
        siglongjmp(*way_out, 1);
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        sigaction(number, &before, NULL); /* the access is tried again, and ends as it would have without us */
        if (info->si_code <= 0)
            raise(number); /* somebody sent it: nothing is tried again */
    }
}

static void take_over(void)
{
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER};

    sigemptyset(&action.sa_mask);
#ifdef __x86_64__
    wide = __builtin_cpu_supports("avx");
#endif
    ready = sigaction(SIGBUS, &action, &before) == 0;
}

bool nv_store_ready(void)
{
    pthread_once(&once, take_over);
    return ready;
}

static bool guarded(void (*how)(uint8_t *to, const uint8_t *from, size_t length), void *to, const void *from,
                    size_t length)
{
    sigjmp_buf here;

    assert(ready && !way_out);
    if (sigsetjmp(here, 0) != 0) {
        way_out = NULL;
        return false;
    }
    way_out = &here;
    atomic_signal_fence(memory_order_seq_cst); /* the copy stays between the two */
    how(to, from, length);
    atomic_signal_fence(memory_order_seq_cst);
    way_out = NULL;
    return true;
}

bool nv_store(void *to, const void *from, size_t length)
{
    return guarded(copy, to, from, length);
}

bool nv_load(void *to, const void *from, size_t length)
{
    return guarded(copy_through_cache, to, from, length);
}
