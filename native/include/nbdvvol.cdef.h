/*
 * The whole C API of the data plane, in the subset of C that cffi's cdef() reads: no guards, no
 * includes, no attributes. C code includes it through nbdvvol.h, Python through dataplane/ffi.py.
 *
 * Threads: every nv_plane_* / nv_object_* / nv_volume_* / nv_connection_* function is called from the
 * one Python thread that created the plane. Reactors are the plane's own pthreads; they never call
 * back, they only fill event rings and write the event fd.
 *
 * Returns: 0 or a count; failure is -errno, with a sentence for people in nv_last_error().
 * All sizes and offsets are bytes.
 */
#define NV_API_VERSION 2

/* ---- events: C -> Python, fixed 64-byte records ---- */
#define NV_EVENT_JOB_DONE 1          /* token = the job's; result 0 or -errno; args[0] = bytes done */
#define NV_EVENT_VOLUME_CHANGED 2    /* every reactor runs the new description, older I/O has drained */
#define NV_EVENT_VOLUME_CLOSED 3     /* drained; no request of it is anywhere in the plane */
#define NV_EVENT_OBJECT_CLOSED 4
#define NV_EVENT_CONNECTION_CLOSED 5 /* token = the connection's; result = why (0 = DISC or clean EOF) */
#define NV_EVENT_TLS_READY 6         /* TLS handshake done; nv_tls_identity() answers */
#define NV_EVENT_TLS_OPTION 7        /* one whole option waits; read it, then nv_tls_reply() */
#define NV_EVENT_SYNC_FAILED 8       /* an object's sync failed: latched; args[0] = object, result = -errno */
#define NV_EVENT_LINK_LOST 10        /* a connection to a remote export ended: token = the link's, args = object, link */
#define NV_EVENT_LINK_HEARD 11       /* haggling through TLS: what nv_link_say() wanted is there; token = the link's */
#define NV_EVENT_MAP_FAULT 9         /* reserved: token completes it; args = vvol offset, length, map version */
#define NV_EVENT_VOLUME_QOS 12       /* every reactor goes by the new limits */
#define NV_EVENT_VOLUME_ATTACHED 13  /* a mirror: requests run (0), or why not; args[0] = regions to reconcile */
#define NV_EVENT_LEG_FAILED 14       /* fenced here, acknowledgements are held: args = leg, generation; result = why */
#define NV_EVENT_LEG_STOPPED 15      /* a syncing leg is stale again, nothing is held: args[0] = leg; result = why */
#define NV_EVENT_RESYNC_DONE 16      /* promoting: args = leg, epoch and generation of its label */
#define NV_EVENT_LEG_CHANGED 17      /* a nv_leg_* call is through: token, result; args = leg, epoch, generation */
#define NV_EVENT_READ_REPAIRED 18    /* args = leg, offset, length, count so far; result 0 or -errno */
#define NV_EVENT_VERIFY_DONE 19      /* token, result; args = bytes compared, pieces that differed, pieces repaired */
#define NV_EVENT_VOLUME_FENCED 20    /* a leg's label is newer: nothing is served any more; args[0] = its epoch */
#define NV_EVENT_VOLUME_CACHE 21     /* the new cache policy is in force */
#define NV_EVENT_LOG_OPENED 22       /* token; args = verdict, dirty bytes, records, id (2); result: -errno if it cannot be read, or hangs */
#define NV_EVENT_LOG_DRAINED 23      /* nothing is logged any more; token, or 0: nobody has asked */
#define NV_EVENT_LOG_FAILED 24       /* result = why: what is logged is carried below, then the log is void */
#define NV_EVENT_LOG_LOST 25         /* args = offset of a block that can be read nowhere, how many so far */
#define NV_EVENT_LOG_NEEDS_WORD 26   /* it cannot be made void on its device: nv_volume_log_forget() */
#define NV_EVENT_LOG_ATTACHED 27     /* token; result: the log is before the volume, or why not */
#define NV_EVENT_LOG_DETACHED 28     /* token; result: there is no log any more, its object is free; or why there is */
#define NV_EVENT_LOG_RESTS 29        /* a log that hung as it was opened: that is over; its object is free as soon as it is out */

typedef struct {
    uint32_t kind;
    int32_t result;
    uint64_t token;
    uint32_t volume;
    uint32_t reactor;
    uint64_t args[5];
} nv_event;

/* ---- plane ---- */
#define NV_PLANE_LOCK_MEMORY 1       /* mlockall(ON_FAULT), where it may */
#define NV_PLANE_IO_FLUSHER 2        /* prctl(PR_SET_IO_FLUSHER), where it may */

typedef struct {
    uint32_t reactors;               /* 1..NV_REACTORS_MAX */
    int32_t cpu_first;               /* pin reactor i to cpu_first + i; -1: do not pin */
    uint32_t spin_us;                /* longest busy wait before sleeping in the ring */
    uint32_t flags;
    uint64_t pool_bytes;             /* shared I/O buffers of each reactor */
    uint32_t connections_max;
    uint32_t reserved;
    uint64_t cache_bytes;            /* memory of the cache, for all volumes (docs/cache.md); 0: none */
} nv_plane_config;

typedef struct {                     /* what the kernel offers and what is in use, for `doctor` */
    uint32_t defer_taskrun;
    uint32_t registered_ring;
    uint32_t registered_files;
    uint32_t send_vectorized;
    uint32_t memory_locked;
    uint32_t io_flusher;
    uint32_t reserved[10];
} nv_features;

typedef struct {                     /* one reactor's counters since start */
    uint64_t enters;                 /* io_uring_enter calls */
    uint64_t sleeps;
    uint64_t requests;
    uint64_t batches;
    uint64_t submissions;            /* ring entries */
    uint64_t copies_bytes;           /* payload bytes copied by user-space memcpy */
    uint64_t connections;
    uint64_t pool_free_bytes;
    uint64_t pool_waits;             /* requests that had to wait for a buffer */
    uint64_t reserved[7];
} nv_reactor_stats;

typedef struct nv_plane nv_plane;

int nv_api_version(void);
const char *nv_last_error(void);
nv_plane *nv_plane_create(const nv_plane_config *config);   /* NULL: errno and nv_last_error() */
void nv_plane_destroy(nv_plane *plane);                     /* drains, closes everything, joins */
int nv_plane_event_fd(nv_plane *plane);
int nv_plane_events(nv_plane *plane, nv_event *out, int max);
int nv_plane_features(nv_plane *plane, nv_features *out);
int nv_plane_reactor_stats(nv_plane *plane, uint32_t reactor, nv_reactor_stats *out);

/* ---- objects: an open file or device of a datastore ---- */
#define NV_OBJECT_DIRECT 1           /* the fd was opened with O_DIRECT */
#define NV_OBJECT_BLOCK 2            /* a block device */
#define NV_OBJECT_READ_ONLY 4

#define NV_JOB_READ 1
#define NV_JOB_WRITE 2
#define NV_JOB_ZERO 3                /* write real zeros where the backend cannot promise them, then sync */
#define NV_JOB_SYNC 4

int nv_object_open(nv_plane *plane, int fd, uint32_t flags, uint32_t align, uint64_t size,
                   uint32_t *object);                       /* dups fd; align: O_DIRECT alignment or 1 */
int nv_object_close(nv_plane *plane, uint32_t object, uint64_t token);
int nv_object_set_size(nv_plane *plane, uint32_t object, uint64_t size);
int nv_object_latch_fault(nv_plane *plane, uint32_t object); /* as if its sync had failed; raises no event */
int nv_object_clear_fault(nv_plane *plane, uint32_t object);
int nv_object_job(nv_plane *plane, uint32_t object, uint32_t op, void *buffer, uint64_t offset,
                  uint64_t length, uint64_t token);         /* buffer stays the caller's until JOB_DONE */

/* ---- remote exports: objects behind NBD servers; links are connections to one ---- */
#define NV_REMOTE_READ_ONLY 1
#define NV_REMOTE_WRITE_THROUGH 2    /* every change is durable when it is acknowledged (FUA, or FLUSH after it) */
#define NV_REMOTE_FLUSH_FIRST 4      /* begin with a FLUSH: what ran before us may have left something in the cache */

typedef struct {
    uint64_t size;
    uint32_t align;                  /* the server's minimum block: a power of two of 1..65536 */
    uint32_t flags;
    uint32_t timeout_ms;             /* a link on which requests wait and nothing is heard for so long is given up */
    uint32_t hold_ms;                /* ... and then has so long to say what became of its changes, or they fail */
} nv_remote_config;

typedef struct {                     /* what the haggling of one link found */
    uint32_t flags;                  /* NV_CONN_STRUCTURED, NV_CONN_EXTENDED */
    uint32_t tflags;                 /* the server's transmission flags */
    uint32_t payload_max;            /* at least align; larger requests are split */
    uint32_t has_allocation;         /* base:allocation was selected, with this id */
    uint32_t allocation_id;
    uint32_t align;                  /* the server's minimum block: the object's is a multiple of it */
    uint64_t size;                   /* of the export: not below the object's */
} nv_link_params;

typedef struct {
    uint64_t links;                  /* that serve now */
    uint64_t in_flight;              /* requests sent and not answered */
    uint64_t waiting;                /* pieces that wait for a link, or for room on one */
    uint64_t asked;
    uint64_t answered;
    uint64_t errors;                 /* answers that were errors */
    uint64_t again;                  /* requests sent once more, because their link was lost */
    uint64_t lost;                   /* links that were lost */
    uint64_t read_bytes;
    uint64_t write_bytes;
    uint64_t owed;                   /* 1: acknowledged changes wait for a FLUSH */
    uint64_t draining;               /* links given up whose changes may still be under way at the server */
    uint64_t unsure;                 /* changes that the server never said anything about: it may still carry them out */
    uint64_t reserved[3];
} nv_remote_stats_t;

int nv_remote_open(nv_plane *plane, const nv_remote_config *config, uint32_t *object); /* no link yet: I/O waits */
int nv_remote_give_up(nv_plane *plane, uint32_t object, int yes);  /* I/O without a link fails, until one comes */
int nv_remote_stats(nv_plane *plane, uint32_t object, nv_remote_stats_t *out);
/* On success the plane owns fd: a connected stream socket, in the transmission phase. */
int nv_link_open(nv_plane *plane, uint32_t object, int fd, const nv_link_params *params, uint64_t token,
                 uint32_t *link);
int nv_link_close(nv_plane *plane, uint32_t link);                 /* DISC once nothing is in flight */
/* After LINK_LOST: copy why, and forget the link. */
int nv_link_forget(nv_plane *plane, uint32_t link, char *reason, uint64_t size);
typedef struct {                     /* what reached one object's storage since it was opened, jobs included */
    uint64_t reads;                  /* contiguous pieces that ended well, not requests */
    uint64_t writes;
    uint64_t zeroes;
    uint64_t trims;
    uint64_t syncs;                  /* submitted; concurrent flushes share one */
    uint64_t others;                 /* prefetches and looks at allocation */
    uint64_t read_bytes;
    uint64_t write_bytes;
    uint64_t errors;                 /* of pieces and syncs */
    uint64_t reserved[7];
} nv_object_stats_t;

int nv_object_stats(nv_plane *plane, uint32_t object, nv_object_stats_t *out);

/* ---- volume description: a versioned flat record, native byte order, validated in C ---- */
#define NV_DESC_MAGIC 0x4456564e     /* "NVVD" */
#define NV_DESC_VERSION 1
#define NV_VOLUME_READ_ONLY 1
#define NV_VOLUME_ROTATIONAL 2
#define NV_VOLUME_MIRROR 4           /* has labels, intents and dirty maps; required for more than one leg */
#define NV_LEG_IN_SYNC 0
#define NV_LEG_STALE 1
#define NV_LEG_SYNCING 2
#define NV_RUN_MAPPED 0
#define NV_RUN_ZERO 1
#define NV_RUN_WRITE_PROTECTED 2

typedef struct {
    uint32_t magic;
    uint32_t version;
    uint64_t length;                 /* of the whole record */
    uint8_t uuid[16];
    uint64_t size;
    uint64_t epoch;
    uint64_t generation;
    uint64_t map_from;               /* the map version this change starts from (0: new volume) */
    uint64_t map_to;                 /* the map version it leads to */
    uint32_t flags;
    uint32_t block_min;
    uint32_t leg_count;              /* 1..NV_LEGS_MAX; 1 without NV_VOLUME_MIRROR */
    uint32_t reserved[7];
} nv_desc_header;                    /* 112 bytes; legs, mirror and metas (if any), runs of leg 0, of leg 1, ... */

typedef struct {
    uint32_t id;
    uint32_t state;
    uint64_t run_count;
} nv_desc_leg;

#define NV_READ_LEAST_OUTSTANDING 0
#define NV_READ_PRIMARY 1
#define NV_READ_NEAREST 2

typedef struct {                     /* with NV_VOLUME_MIRROR: once, behind the legs */
    uint32_t region_shift;           /* an intent bit covers 1 << region_shift bytes */
    uint32_t read_policy;            /* NV_READ_* */
    uint32_t op_deadline_ms;         /* a leg with an older operation has failed */
    uint32_t hold_deadline_ms;       /* how long acknowledgements wait for the registry before EIO */
    uint32_t intent_idle_ms;         /* a region without requests for so long loses its intent bit */
    uint32_t reserved;
    uint64_t resync_rate;            /* bytes a second while clients are served; 0: no limit */
} nv_desc_mirror;                    /* 32 bytes */

typedef struct {                     /* with NV_VOLUME_MIRROR: one a leg, behind nv_desc_mirror */
    uint64_t offset;                 /* of the leg's metadata region in the object */
    uint64_t bitmap_bytes;           /* of each half: intents, dirty maps (datastores/format.py) */
    uint32_t object;                 /* 0: the leg is absent, it has no runs and is stale */
    uint32_t reserved;
} nv_desc_meta;                      /* 24 bytes */

typedef struct {                     /* sorted by offset, gapless, covering [0, size) */
    uint64_t offset;                 /* in the VVol */
    uint64_t length;
    uint64_t object_offset;
    uint32_t object;
    uint32_t state;
} nv_desc_run;

typedef struct {
    uint64_t reads;
    uint64_t writes;
    uint64_t flushes;
    uint64_t trims;
    uint64_t zeroes;
    uint64_t others;
    uint64_t read_bytes;
    uint64_t write_bytes;
    uint64_t errors;
    uint64_t in_flight;
    uint64_t connections;
    uint64_t delayed;                /* requests that had to wait for the volume's limits */
    uint64_t delay_ns;               /* ... and how long, all together */
    uint64_t reserved[3];
} nv_volume_stats_t;

typedef struct {                     /* limits of a volume, over all its connections */
    uint64_t iops;                   /* I/Os a second; 0: no limit */
    uint64_t bandwidth;              /* bytes a second, read and written together; 0: no limit */
    uint32_t burst_us;               /* how much unused time may be saved up */
    uint32_t io_bytes;               /* a request counts as one I/O per so many bytes, begun; 0: as one */
    uint32_t shares;                 /* of a busy reactor's time, beside other volumes' (100 is usual) */
    uint32_t reserved;
} nv_qos_limits;

int nv_volume_open(nv_plane *plane, const void *desc, uint64_t length, uint32_t *volume);
int nv_volume_change(nv_plane *plane, uint32_t volume, const void *desc, uint64_t length, uint64_t token);
int nv_volume_close(nv_plane *plane, uint32_t volume, uint64_t token);
/* At any time, without a drain: requests that wait are weighed again. VOLUME_QOS tells when all reactors follow. */
int nv_volume_set_qos(nv_plane *plane, uint32_t volume, const nv_qos_limits *limits, uint64_t token);
int nv_volume_stats(nv_plane *plane, uint32_t volume, nv_volume_stats_t *out);

/* ---- the cache (docs/cache.md) ---- */
#define NV_CACHE_MODE_NONE 0
#define NV_CACHE_MODE_READ 1         /* what is read is kept; what is written is dropped */
#define NV_CACHE_MODE_WRITETHROUGH 2 /* what is written is kept, too */

typedef struct {
    uint32_t mode;                   /* NV_CACHE_MODE_* */
    uint32_t ahead_bytes;            /* at most so many are read ahead of a stream; 0: none */
    uint64_t floor_bytes;            /* of the cache, that other volumes cannot take */
} nv_cache_policy;

typedef struct {                     /* counts are of blocks of 4 KiB */
    uint32_t mode;
    uint32_t bypassed;               /* its storage is in memory already */
    uint64_t held_bytes;
    uint64_t floor_bytes;            /* in force */
    uint64_t hits;
    uint64_t misses;
    uint64_t filled;
    uint64_t refused;                /* were not put in: a write came between, or there was no room */
    uint64_t written;                /* put in by writes */
    uint64_t ahead;                  /* fetched ahead, and */
    uint64_t ahead_used;             /* asked for since */
    uint64_t reserved[4];
} nv_cache_status;

typedef struct {
    uint64_t bytes;
    uint64_t used_bytes;
    uint64_t pinned_bytes;           /* being sent */
    uint64_t evictions;
    uint64_t reserved[4];
} nv_cache_totals;

/* At any time; VOLUME_CACHE tells when it is in force. One change at a time. */
int nv_volume_set_cache(nv_plane *plane, uint32_t volume, const nv_cache_policy *policy, uint64_t token);
int nv_volume_cache(nv_plane *plane, uint32_t volume, nv_cache_status *out);
int nv_plane_cache(nv_plane *plane, nv_cache_totals *out);

/* ---- the write-back log (docs/cache.md, sections 7 to 10) ---- */
typedef struct {
    uint8_t id[16];                  /* with `dirty`: of the log that the registry means */
    uint8_t fresh[16];               /* random: id of a log that is formatted */
    uint8_t begin[16];               /* random: of this life */
    uint32_t dirty;                  /* the registry says that a log holds data of the volume */
    uint32_t discard;                /* format whatever is there */
    uint32_t beside;                 /* open it beside a volume that may be in use: nv_volume_log_attach() puts it before it */
    uint32_t bypass_bytes;           /* writes of so many go below; 0: none for its length */
    uint32_t stream_bytes;           /* ... and of who wrote so many in sequence; 0: no difference */
    uint32_t age_ms;                 /* when the oldest logged write is to be carried below */
    uint32_t deadline_ms;            /* what of the log's device takes longer counts as failed; 0: nothing does */
    uint64_t destage_rate;           /* bytes a second that are carried below at most, while nobody waits for it; 0: no limit */
    uint64_t reserved[3];
} nv_log_policy;

#define NV_LOG_STATE_CLOSED 0        /* refused: every request fails */
#define NV_LOG_STATE_RECOVERING 1
#define NV_LOG_STATE_THROUGH 2       /* nothing may be logged: not allowed yet, or it drains */
#define NV_LOG_STATE_SERVING 3
#define NV_LOG_STATE_FAILED 4
#define NV_LOG_STATE_VOID 5

typedef struct {
    uint32_t state;                  /* NV_LOG_STATE_* */
    uint32_t reserved0;
    uint64_t ring_bytes;
    uint64_t used_bytes;
    uint64_t dirty_bytes;            /* not carried below yet */
    uint64_t lost_bytes;
    uint64_t oldest_age_ms;
    uint64_t held;                   /* requests that wait for a failed log to be void */
    uint64_t blocked;                /* bypasses that had to wait */
    uint64_t logged;                 /* requests */
    uint64_t groups;
    uint64_t syncs;
    uint64_t bypassed;               /* requests */
    uint64_t tombstones;
    uint64_t destaged_bytes;
    uint64_t merged_bytes;           /* overwritten before they were carried */
    uint64_t reserved[4];
} nv_log_status;

/*
 * LOG_OPENED tells what was found. The log is before the volume at once, which has had no connection yet; or, opened `beside`,
 * is empty and waits to be attached. It stays until it is detached or the volume is closed. One whose device hangs past its
 * deadline is refused, and neither of these waits for it; but its object is in use (EBUSY) until LOG_RESTS.
 */
int nv_volume_log_open(nv_plane *plane, uint32_t volume, uint32_t object, uint64_t offset, uint64_t length,
                       const nv_log_policy *policy, uint64_t token);
int nv_volume_log_allow(nv_plane *plane, uint32_t volume);  /* the registry has it: write into it, again if it was drained */
int nv_volume_log_limit(nv_plane *plane, uint32_t volume, const nv_log_policy *policy); /* bypass, stream, age, deadline, rate */
int nv_volume_log_drain(nv_plane *plane, uint32_t volume, uint64_t token);
int nv_volume_log_forget(nv_plane *plane, uint32_t volume); /* the registry has that nothing in it is to be replayed */
/*
 * Requests go through the log from now on; and, if it is drained, void or was refused, past it again. What is under way ends
 * before, others are held meanwhile, for 2 s at most: -ETIMEDOUT, nothing has changed. -EBUSY: it holds something still.
 */
int nv_volume_log_attach(nv_plane *plane, uint32_t volume, uint64_t token);
int nv_volume_log_detach(nv_plane *plane, uint32_t volume, uint64_t token);
int nv_volume_log(nv_plane *plane, uint32_t volume, nv_log_status *out);
typedef struct {
    uint64_t offset;
    uint64_t length;
} nv_log_span;

/* What was logged and can be read nowhere, in the volume's order, 250 ms old at most: how many there are of `capacity`, or
 * -errno. Event LOG_LOST tells that there is more. */
int nv_volume_log_lost(nv_plane *plane, uint32_t volume, nv_log_span *out, uint32_t capacity);
const char *nv_log_verdict_word(uint32_t verdict);

/* ---- a trace: records of single requests of one volume, while it runs; one trace at a time ---- */
typedef struct {                     /* moments are of one monotonic clock, and in this order */
    uint64_t cookie;
    uint64_t offset;                 /* as the client sent them */
    uint64_t length;
    uint64_t received_ns;            /* its header came (shared by all that came with it) */
    uint64_t parsed_ns;
    uint64_t submitted_ns;           /* the storage was asked first; completed_ns if it never was */
    uint64_t completed_ns;           /* the reply was ready */
    uint64_t sent_ns;                /* the kernel has it whole (with TLS: it is encrypted) */
    uint32_t volume;
    uint32_t connection;
    uint32_t reactor;
    uint16_t type;                   /* of the request, as on the wire */
    uint16_t flags;
    int32_t error;                   /* of the reply, as on the wire */
    uint32_t reserved;
} nv_trace_record;

typedef struct {
    uint64_t dropped;                /* records for which there was no room, since the trace began */
    uint32_t recording;              /* 1: the reactor has heard of the trace */
    uint32_t reserved;
} nv_trace_state;

/* Record one of `every` requests of the volume on each reactor. now_ns: when that is. -EBUSY while a trace runs. */
int nv_trace_begin(nv_plane *plane, uint32_t volume, uint32_t every, uint64_t *now_ns);
/* Take up to max records of one reactor, in the order of their sending. A count, and how it goes. */
int nv_trace_read(nv_plane *plane, uint32_t reactor, nv_trace_record *out, int max, nv_trace_state *state);
/* End it; what was not read is gone. */
int nv_trace_end(nv_plane *plane);

/* ---- mirrors (docs/mirror.md): each nv_leg_* call ends with LEG_CHANGED and its token ---- */
#define NV_LANE_UNUSED 0
#define NV_LANE_STALE 1
#define NV_LANE_SYNCING 2
#define NV_LANE_PROMOTING 3          /* copied; the registry is being asked */
#define NV_LANE_IN_SYNC 4
#define NV_LANE_FAILING 5            /* fenced here; the registry is being asked */

#define NV_MIRROR_ATTACHING 1
#define NV_MIRROR_FROZEN 2           /* acknowledgements are held */
#define NV_MIRROR_EXPIRED 4          /* held for too long: EIO */
#define NV_MIRROR_FENCED 8

typedef struct {
    uint32_t id;
    uint32_t state;                  /* NV_LANE_* */
    uint32_t outstanding;            /* operations that have not completed, late ones included */
    uint32_t reserved;
    uint64_t dirty_regions;          /* not copied yet */
    uint64_t reads;
    uint64_t latency_ns;             /* of a read, smoothed */
} nv_leg_status;

typedef struct {
    uint32_t flags;                  /* NV_MIRROR_* */
    uint32_t leg_count;
    uint64_t regions;
    uint64_t intents;                /* regions with their bit set */
    uint64_t doubtful;               /* regions an unclean attach has not reconciled yet */
    uint64_t copied_bytes;           /* by resync and reconciliation since open */
    uint64_t repairs;
    nv_leg_status legs[8];
} nv_mirror_status;

int nv_leg_fail(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t token);
int nv_leg_release(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t generation, uint64_t token);
int nv_leg_resync(nv_plane *plane, uint32_t volume, uint32_t leg, uint32_t full, uint64_t generation,
                  uint64_t token);
int nv_leg_stop(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t token);
int nv_leg_promote(nv_plane *plane, uint32_t volume, uint32_t leg, uint64_t generation, uint64_t token);
int nv_volume_fence(nv_plane *plane, uint32_t volume);
int nv_volume_verify(nv_plane *plane, uint32_t volume, uint32_t repair, uint64_t token);
int nv_volume_mirror(nv_plane *plane, uint32_t volume, nv_mirror_status *out);

/* ---- the leg machine (docs/mirror.md section 3): no I/O, no clock; one a mirror, for one epoch ---- */
#define NV_LOOK_ABSENT 0             /* the leg cannot be reached */
#define NV_LOOK_FOREIGN 1            /* a label of another VVol or leg: never touched */
#define NV_LOOK_NO_LABEL 2           /* none is valid: only touched on the operator's word */
#define NV_LOOK_LABEL 3

typedef struct {
    uint32_t look;                   /* NV_LOOK_* */
    uint32_t syncing;                /* the label says "not in sync" */
    uint64_t epoch;
    uint64_t generation;
} nv_leg_look;

typedef struct {                     /* a leg as the registry has it */
    uint32_t id;
    uint32_t state;                  /* NV_LEG_* */
    uint64_t stamp_epoch;            /* the newest label that is known to be on it */
    uint64_t stamp_generation;
} nv_leg_record;

typedef struct {
    uint64_t epoch;
    uint64_t generation;
    uint32_t leg_count;
    uint32_t reserved;
    nv_leg_record legs[8];
} nv_legs_record;

#define NV_ASK_STALE 1
#define NV_ASK_SYNCING 2
#define NV_ASK_IN_SYNC 3
#define NV_ASK_CONFIRM 4             /* raise the leg's stamp; no compare-and-swap on the generation */

#define NV_ACT_ASK 1                 /* ask the registry; its answer is the record, by nv_legs_told() */
#define NV_ACT_OPEN 2                /* open the volume with the legs as the record has them; syncing is stale */
#define NV_ACT_FAIL 3                /* nv_leg_fail */
#define NV_ACT_RELEASE 4             /* nv_leg_release */
#define NV_ACT_RESYNC 5              /* nv_leg_resync */
#define NV_ACT_PROMOTE 6             /* nv_leg_promote */
#define NV_ACT_FENCE 7               /* nv_volume_fence: for good */
#define NV_ACT_REFUSE 8              /* do not open; `why` is one of NV_WHY_* */

#define NV_WHY_OLD_REGISTRY 1        /* a label is newer than the record */
#define NV_WHY_NO_LEG 2              /* no in-sync leg of the record is there with a valid label */
#define NV_WHY_EPOCH 3               /* the record is not of our epoch */
#define NV_WHY_LAST_LEG 4            /* the registry knows no other in-sync leg than the one that failed */

typedef struct {
    uint32_t kind;                   /* NV_ACT_* */
    uint32_t leg;
    uint32_t ask;                    /* ASK: NV_ASK_* */
    uint32_t full;                   /* RESYNC: its dirty map is worth nothing */
    uint32_t why;                    /* REFUSE */
    uint32_t reserved;
    uint64_t token;                  /* of the call into the plane: LEG_CHANGED brings it back */
    uint64_t epoch;                  /* ASK: ours */
    uint64_t generation;             /* ASK: expected; RELEASE, RESYNC, PROMOTE: the record's */
    uint64_t stamp_epoch;            /* ASK IN_SYNC, CONFIRM */
    uint64_t stamp_generation;
} nv_legs_action;

typedef struct nv_legs nv_legs;

nv_legs *nv_legs_create(uint64_t epoch);
void nv_legs_free(nv_legs *legs);
/* Every leg of the record has been looked at: begin. looks[i] belongs to record->legs[i]. */
void nv_legs_begin(nv_legs *legs, const nv_legs_record *record, const nv_leg_look *looks);
/* The registry's record came: an answer, or by itself. Older ones do no harm. */
void nv_legs_told(nv_legs *legs, const nv_legs_record *record);
/* What was asked may be lost (the link is back, or a while has passed): ask again. */
void nv_legs_ask_again(nv_legs *legs);
/* An event of the mirror's volume. */
void nv_legs_event(nv_legs *legs, const nv_event *event);
/* A stale leg was looked at (again). */
void nv_legs_looked(nv_legs *legs, uint32_t leg, const nv_leg_look *look);
/* Resync the leg as soon as that is possible; full: the operator's word, or it is new. */
void nv_legs_want_resync(nv_legs *legs, uint32_t leg, uint32_t full);
/* 1 and the next thing to do, or 0. Call it after each of the above until it says 0. */
int nv_legs_next(nv_legs *legs, nv_legs_action *out);

/* ---- connections: from GO / EXPORT_NAME on ---- */
#define NV_CONN_STRUCTURED 1
#define NV_CONN_EXTENDED 2
#define NV_CONN_READ_ONLY 4
#define NV_CONTEXT_BASE_ALLOCATION 1
#define NV_CONTEXTS_MAX 8

typedef struct {
    uint32_t id;                     /* chosen by the haggling, unique in this connection */
    uint32_t kind;
} nv_context;

typedef struct {
    uint32_t flags;
    uint32_t tflags;                 /* the transmission flags this client was told */
    uint32_t block_min;              /* requests must be multiples of it (1: any) */
    uint32_t payload_max;            /* the advertised maximum payload */
    uint32_t context_count;
    uint32_t reserved;
    nv_context contexts[8];
} nv_connection_params;

/* On success the plane owns fd. `early`: bytes that the haggling already read past the last option. */
int nv_connection_open(nv_plane *plane, int fd, uint32_t volume, const nv_connection_params *params,
                       const void *early, uint64_t early_length, uint64_t token, uint32_t *connection);
int nv_connection_close(nv_plane *plane, uint32_t connection);   /* hang up once what is in flight is done */

/* ---- TLS: C owns the socket from the STARTTLS acknowledgement on ---- */
typedef struct nv_tls_context nv_tls_context;

#define NV_TLS_VERIFY_CLIENT 1       /* a client certificate is required and checked against the CA */

nv_tls_context *nv_tls_context_create(void);
int nv_tls_context_x509(nv_tls_context *context, const char *ca_file, const char *cert_file,
                        const char *key_file, uint32_t flags);
int nv_tls_context_psk(nv_tls_context *context, const char *keys_file);   /* lines IDENTITY:HEX */
void nv_tls_context_free(nv_tls_context *context);                         /* counted: live connections keep it */

#define NV_TLS_CONTINUE 0
#define NV_TLS_CLOSE 1               /* send the bytes, then close */
#define NV_TLS_ENTER 2               /* send the bytes, then the transmission phase on `volume` */

/* The other side: who the servers are that we connect to. Without a CA file the system's authorities count. */
#define NV_TLS_TRUST_ANYBODY 2       /* the server's certificate is not checked: nobody listens in, but who is it? */

nv_tls_context *nv_tls_client_create(void);
int nv_tls_client_x509(nv_tls_context *context, const char *ca_file, const char *cert_file, const char *key_file,
                       uint32_t flags);                                    /* cert and key: NULL, or both */
int nv_tls_client_psk(nv_tls_context *context, const char *keys_file, const char *identity);

/* A link that begins with TLS, right after the server's STARTTLS acknowledgement. Its certificate must be for hostname
 * (a name or an address). Then: say bytes and ask for some (LINK_HEARD), take them, at last enter. */
int nv_link_secure(nv_plane *plane, uint32_t object, int fd, nv_tls_context *context, const char *hostname,
                   uint32_t timeout_ms, uint64_t token, uint32_t *link);
int nv_link_say(nv_plane *plane, uint32_t link, const void *bytes, uint64_t length, uint32_t want);
int nv_link_heard(nv_plane *plane, uint32_t link, void *out, uint64_t size);
int nv_link_enter(nv_plane *plane, uint32_t link, const nv_link_params *params);

int nv_tls_open(nv_plane *plane, int fd, nv_tls_context *context, uint32_t timeout_ms, uint64_t token,
                uint32_t *connection);
int nv_tls_identity(nv_plane *plane, uint32_t connection, char *out, uint64_t size);
int nv_tls_option(nv_plane *plane, uint32_t connection, uint32_t *option, void *out, uint64_t size);
int nv_tls_reply(nv_plane *plane, uint32_t connection, const void *bytes, uint64_t length, uint32_t action,
                 uint32_t volume, const nv_connection_params *params);
