/* See store.h. */
#include "io/store.h"

#include <assert.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "io/copy.h"

static struct sigaction before;
static bool ready;
static pthread_once_t once = PTHREAD_ONCE_INIT;
/* Of the copy that this thread is in. Of the initial model, because a handler may not allocate a thread's block for it. */
static _Thread_local sigjmp_buf *volatile way_out __attribute__((tls_model("initial-exec")));

static void copy_through_cache(void *to, const void *from, size_t length)
{
    memcpy(to, from, length);
}

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
    ready = sigaction(SIGBUS, &action, &before) == 0;
}

bool nv_store_ready(void)
{
    pthread_once(&once, take_over);
    return ready;
}

static bool guarded(void (*how)(void *to, const void *from, size_t length), void *to, const void *from, size_t length)
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
    return guarded(nv_copy_past_cache, to, from, length);
}

bool nv_load(void *to, const void *from, size_t length)
{
    return guarded(copy_through_cache, to, from, length);
}
