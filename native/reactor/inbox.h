/*
 * A reactor's inbox: intrusive messages from any thread, read by the reactor in the order each sender sent them.
 * Lock-free push, one-shot take. Waking the reactor is the sender's next step (nv_reactor_send does both).
 */
#ifndef NV_INBOX_H
#define NV_INBOX_H

#include <stdatomic.h>
#include <stddef.h>

struct nv_reactor;

struct nv_message {
    struct nv_message *next;
    void (*run)(struct nv_reactor *reactor, struct nv_message *message); /* on the receiving reactor */
};

struct nv_inbox {
    _Atomic(struct nv_message *) newest;
};

static inline void nv_inbox_push(struct nv_inbox *inbox, struct nv_message *message)
{
    struct nv_message *head = atomic_load_explicit(&inbox->newest, memory_order_relaxed);

    do
        message->next = head;
    while (!atomic_compare_exchange_weak(&inbox->newest, &head, message));
}

static inline int nv_inbox_empty(struct nv_inbox *inbox)
{
    return atomic_load(&inbox->newest) == NULL;
}

/* Everything that has arrived, oldest first. */
static inline struct nv_message *nv_inbox_take(struct nv_inbox *inbox)
{
    struct nv_message *newest = NULL, *oldest = NULL;

    if (atomic_load_explicit(&inbox->newest, memory_order_relaxed) == NULL)
        return NULL;
    newest = atomic_exchange(&inbox->newest, NULL);
    while (newest) {
        struct nv_message *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}

#endif
