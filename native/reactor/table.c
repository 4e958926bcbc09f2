/*
 * The front's tables: numbers 1..capacity to pointers. Numbers are handed out in turn, so that one that has just been
 * freed is reused as late as possible.
 */
#include <assert.h>
#include <errno.h>

#include "reactor/plane.h"

int nv_table_add(struct nv_table *table, void *item, uint32_t *number)
{
    assert(item);
    if (table->used == table->capacity)
        return -ENOSPC;
    while (table->slots[table->next])
        table->next = (table->next + 1) % table->capacity;
    table->slots[table->next] = item;
    table->used++;
    *number = table->next + 1;
    table->next = (table->next + 1) % table->capacity;
    return 0;
}

void *nv_table_get(const struct nv_table *table, uint32_t number)
{
    return number >= 1 && number <= table->capacity ? table->slots[number - 1] : NULL;
}

void nv_table_remove(struct nv_table *table, uint32_t number)
{
    assert(nv_table_get(table, number) && table->used > 0);
    table->slots[number - 1] = NULL;
    table->used--;
}
