/*
 * The plane: reactors, and the tables of objects, volumes and connections that the front thread alone uses. What the
 * front can name it makes and frees; a reactor tells by event when it has let go.
 */
#ifndef NV_PLANE_H
#define NV_PLANE_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"
#include "nbdvvol.h"
#include "reactor/reactor.h"
#include "volume/volume.h"

struct nv_table {                   /* numbers 1..capacity to pointers */
    void **slots;
    uint32_t capacity;
    uint32_t used;
    uint32_t next;                  /* where to look first: numbers are reused late */
};

struct nv_plane {
    nv_plane_config config;
    nv_features features;
    int bell;
    struct nv_table objects;
    struct nv_table volumes;
    struct nv_table connections;
    struct nv_table links;
    pthread_mutex_t start_lock;
    pthread_cond_t start_changed;
    uint32_t started;               /* under start_lock: threads that are set up, or failed to */
    uint32_t finished;              /* ... that have left their loop */
    bool released;                  /* ... the front is through with their ports */
    int start_error;
    struct nv_stop *stops;
    uint32_t stopping;              /* reactors that were asked to stop */
    _Atomic uint32_t drained;       /* of them, those that have nothing left which starts pieces */
    bool threads;
    bool stopped;                   /* no reactor runs any more */
    uint64_t trace;                 /* the session of the trace that runs (reactor/recorder.h), or 0 */
    uint32_t traces;                /* begun so far */
    bool scattered;                 /* the simulator's wish: connections of mirrors live anywhere, as those by TLS do */
    uint32_t assigned[NV_REACTORS_MAX]; /* connections given to each reactor and not yet seen to end */
    struct nv_cache *cache;         /* NULL: none */
    struct nv_reactor *reactors;
};

static inline struct nv_reactor *nv_plane_reactor(struct nv_plane *plane, uint32_t index)
{
    return &plane->reactors[index];
}

/*
 * The simulator's plane: reactors without threads. Step each with nv_reactor_turn(); nv_plane_stop() asks all to
 * end, and once nv_reactor_finished() says so for each, nv_plane_free() frees everything.
 */
int nv_plane_build(const nv_plane_config *config, bool threads, nv_plane **out);
void nv_plane_stop(nv_plane *plane);
/* Reactor, once, while stopping. */
void nv_plane_drained(nv_plane *plane);
void nv_plane_free(nv_plane *plane);

/* Front-side tables. */
int nv_table_add(struct nv_table *table, void *item, uint32_t *number);
void *nv_table_get(const struct nv_table *table, uint32_t number);
void nv_table_remove(struct nv_table *table, uint32_t number);
void nv_volume_forget(nv_plane *plane, struct nv_volume *volume); /* frees it once nothing refers to it */
void nv_object_unuse(struct nv_map *map);
struct nv_reactor *nv_plane_least_loaded(nv_plane *plane);

#endif
