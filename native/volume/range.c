/*
 * See range.h. Each pair of overlapping requests is counted once: when the later one enters, in its blockers; and
 * uncounted once: when the earlier one leaves. Requests up to one stripe long are found through the buckets of three
 * neighbouring stripes, longer ones through one list, so the usual look-up touches few entries. The lock is
 * uncontended unless the volume has connections on several reactors.
 */
#include "volume/range.h"

#include <assert.h>
#include <stddef.h>

#include "reactor/reactor.h"

#define STRIPE_SHIFT 16u
#define STRIPE (1ull << STRIPE_SHIFT)

typedef void visit_fn(struct nv_range *found, struct nv_range *self, struct nv_range **ready);

void nv_range_table_init(struct nv_range_table *table)
{
    pthread_mutex_init(&table->lock, NULL);
}

void nv_range_table_free(struct nv_range_table *table)
{
    assert(!table->wide);
    for (unsigned i = 0; i < NV_RANGE_BUCKETS; i++)
        assert(!table->buckets[i]);
    pthread_mutex_destroy(&table->lock);
}

static bool overlap(const struct nv_range *a, const struct nv_range *b)
{
    return a->offset < b->offset + b->length && b->offset < a->offset + a->length;
}

static void visit_list(struct nv_range *list, struct nv_range *self, visit_fn *visit, struct nv_range **ready)
{
    for (struct nv_range *range = list; range; range = range->next)
        if (range != self && overlap(range, self))
            visit(range, self, ready);
}

static struct nv_range **home(struct nv_range_table *table, const struct nv_range *range)
{
    if (range->length > STRIPE)
        return &table->wide;
    return &table->buckets[(range->offset >> STRIPE_SHIFT) % NV_RANGE_BUCKETS];
}

static void visit_overlapping(struct nv_range_table *table, struct nv_range *self, visit_fn *visit,
                              struct nv_range **ready)
{
    visit_list(table->wide, self, visit, ready);
    if (self->length > STRIPE) {
        for (unsigned i = 0; i < NV_RANGE_BUCKETS; i++)
            visit_list(table->buckets[i], self, visit, ready);
        return;
    }
    uint64_t stripe = self->offset >> STRIPE_SHIFT;
    for (uint64_t i = 0; i < 3; i++) /* at stripe 0, -1 wraps to a bucket that is merely looked at */
        visit_list(table->buckets[(stripe + i - 1) % NV_RANGE_BUCKETS], self, visit, ready);
}

static void count_blocker(struct nv_range *found, struct nv_range *self, struct nv_range **ready)
{
    (void)ready;
    assert(found->order < self->order);
    self->blockers++;
}

static void unblock(struct nv_range *found, struct nv_range *self, struct nv_range **ready)
{
    if (found->order < self->order)
        return;
    assert(found->blockers > 0);
    if (--found->blockers == 0) {
        found->message.next = (struct nv_message *)*ready;
        *ready = found;
    }
}

void nv_range_enter(struct nv_range_table *table, struct nv_range *range)
{
    struct nv_range **list;

    assert(range->length > 0 && range->offset + range->length > range->offset);
    pthread_mutex_lock(&table->lock);
    range->order = table->next_order++;
    range->blockers = 1;
    visit_overlapping(table, range, count_blocker, NULL);
    list = home(table, range);
    range->next = *list;
    range->back = list;
    if (range->next)
        range->next->back = &range->next;
    *list = range;
    pthread_mutex_unlock(&table->lock);
}

bool nv_range_release(struct nv_range_table *table, struct nv_range *range)
{
    bool go;

    pthread_mutex_lock(&table->lock);
    assert(range->blockers > 0);
    go = --range->blockers == 0;
    pthread_mutex_unlock(&table->lock);
    return go;
}

static void ready_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct nv_range *range = (struct nv_range *)((char *)message - offsetof(struct nv_range, message));

    assert(range->reactor == reactor);
    (void)reactor;
    range->ready(range);
}

/* Those that wait for it no more. */
static struct nv_range *take_out(struct nv_range_table *table, struct nv_range *range)
{
    struct nv_range *ready = NULL;

    *range->back = range->next;
    if (range->next)
        range->next->back = range->back;
    visit_overlapping(table, range, unblock, &ready);
    return ready;
}

static void tell_ready(struct nv_range *ready)
{
    while (ready) {
        struct nv_range *next = (struct nv_range *)ready->message.next;
        ready->message.run = ready_arrives;
        nv_reactor_send(ready->reactor, &ready->message);
        ready = next;
    }
}

bool nv_range_withdraw(struct nv_range_table *table, struct nv_range *range)
{
    struct nv_range *ready = NULL;
    bool waits;

    pthread_mutex_lock(&table->lock);
    waits = range->blockers > 0;
    if (waits)
        ready = take_out(table, range);
    pthread_mutex_unlock(&table->lock);
    tell_ready(ready);
    return waits;
}

void nv_range_leave(struct nv_range_table *table, struct nv_range *range)
{
    struct nv_range *ready;

    pthread_mutex_lock(&table->lock);
    ready = take_out(table, range);
    pthread_mutex_unlock(&table->lock);
    tell_ready(ready);
}
