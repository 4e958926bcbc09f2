/*
 * Every limit of the data plane, in one place. Sizes are bytes, times are in the unit of the name.
 * A limit that guards memory is allocated before it is used: reaching it pushes back on the socket,
 * it never fails an I/O.
 */
#ifndef NV_LIMITS_H
#define NV_LIMITS_H

#include_next <limits.h> /* the C library's header has the same name: who asks for it gets it too */

#define NV_REACTORS_MAX 64u
#define NV_OBJECTS_MAX 65536u
#define NV_VOLUMES_MAX 16384u
#define NV_CONNECTIONS_MAX 65536u

/* volume description */
#define NV_LEGS_MAX 8u
#define NV_RUNS_MAX (1u << 22)
#define NV_BLOCK_MIN_MAX 65536u
#define NV_SIZE_MAX (1ull << 62)

/* mirrors */
#define NV_REGION_SHIFT_MIN 9u
#define NV_REGION_SHIFT_MAX 40u
#define NV_REGIONS_MAX (1u << 24)
#define NV_META_PAGE 4096u                     /* the on-disk structures' unit: datastores/format.py */
#define NV_META_BITMAPS 139264u                /* where the intents begin in a leg's metadata region */
#define NV_INTENTS_A_PAGE 31744u               /* regions in one intent page */
#define NV_DIRTY_A_PAGE 3968u                  /* ... in one page of dirty maps */
#define NV_DEADLINE_MAX_MS 3600000u
#define NV_MIRROR_IOS 256u                     /* requests of one mirror that are under way at once */
#define NV_MIRROR_SPAN (64ull << 20)           /* longest piece of one request that goes to the legs at once */
#define NV_MIRROR_TICK_MS 250u
#define NV_COPY_PIECE (1u << 20)               /* resync, reconciliation, verify */
#define NV_COPY_DEPTH 4u                       /* ... pieces under way at once */
#define NV_COPY_PACED (128u << 10)             /* a piece of a resync with a rate, while clients are served */
#define NV_COPY_LATE_US 2000u                  /* what such a resync may catch up with */
#define NV_COPY_WAIT_MAX_MS 100u               /* its longest timer: what must end is not held up by one */
#define NV_COPY_CHECKPOINT (1ull << 30)        /* bytes copied between two saved dirty maps */
#define NV_COPY_CHECKPOINT_MS 5000u            /* ... and time: what a slow copy has to do again after a crash */
#define NV_REPAIRS_MAX 16u                     /* places waiting to be rewritten after a read error */

/* protocol */
#define NV_PAYLOAD_MAX (32u << 20)             /* served; a longer one ends the connection */
#define NV_DF_ALWAYS_SERVED (64u << 10)        /* nbd.md 1.15.11 */
#define NV_MESSAGE_MAX 120u                    /* text of an error chunk */
#define NV_OPTION_MAX (64u << 10)              /* one TLS-haggling option */
#define NV_ANSWER_MAX (16u << 20)              /* the replies to one option (LIST of many exports) */

/* one connection */
#define NV_REQUESTS_PER_CONNECTION 256u        /* parsed and not yet wholly answered */
#define NV_RX_CHUNK (64u << 10)                /* receive chunk; the private one bounds idle memory */
#define NV_INLINE_PAYLOAD (16u << 10)          /* a payload up to this is received with its neighbours, into the chunk */
#define NV_RX_WINDOW_MIN 512u                  /* receive size right after a large payload */
#define NV_RX_LOW_WATER (128u << 10)           /* so much of a large payload is waited for at once, on TCP */
#define NV_RX_BULK (64u << 10)                 /* a payload from here on is bulk: its sender is at work, nobody spins for it */
#define NV_BRISK_TURNS 64u                     /* so long a connection with smaller requests is spun for */
#define NV_TX_REQUESTS 256u                    /* replies gathered into one send */
#define NV_TX_IOV (2u * NV_TX_REQUESTS)
#define NV_TX_BYTES (1u << 20)                 /* soft: no further reply joins a send beyond it */
#define NV_SOCKET_BUFFER (2u << 20)            /* SO_SNDBUF, SO_RCVBUF: absorb a client's window */
#define NV_EXTENTS_MAX 1000u                   /* extents in one BLOCK_STATUS answer: its memory is 32 KiB */

/* the cache: blocks of 4 KiB in RAM */
#define NV_CACHE_BLOCK 4096u
#define NV_CACHE_SHIFT 12u
#define NV_CACHE_STRIPE_SHIFT 4u               /* blocks that lie together are in one shard: 16 of them */
#define NV_CACHE_FRAMES_MIN 64u
#define NV_CACHE_FRAMES_MAX (1u << 30)         /* 4 TiB */
#define NV_CACHE_SHARD_MIN 256u                /* frames of a shard, at least */
#define NV_CACHE_SHARDS_A_REACTOR 4u           /* with more than one reactor */
#define NV_CACHE_SLOTS_MIN 4096u               /* write slots of a shard, at least */
#define NV_CACHE_CHAIN_STEPS 64u               /* a look into the index is bounded, whatever others do to it meanwhile */
#define NV_CACHE_EVICT_STEPS 64u               /* ... and a search for room */
#define NV_CACHE_LONG_BLOCKS 16u               /* of a read that is not taken apart for a few of its blocks */
#define NV_CACHE_FILL_MAX 256u                 /* blocks that one request puts in: bounds a turn */
#define NV_HIT_FRAMES 17u                      /* a hit of up to 64 KiB is sent from its frames; a longer one is copied */
#define NV_HIT_PINS 256u                       /* frames that one connection may have pinned */
#define NV_AHEAD_MAX (4u << 20)                /* bytes read ahead of a stream */
#define NV_AHEAD_PAUSE 16u                     /* requests of a stream for which nothing is fetched, when that was in vain, ... */
#define NV_AHEAD_PAUSE_MAX 1024u               /* ... and at most */
#define NV_SCAN_BYTES (4u << 20)               /* a longer stream is a scan (in a small cache, one of a tenth of it) */
#define NV_FETCHES 4u                          /* of a reactor, under way at once */
#define NV_FETCH_BYTES (256u << 10)
#define NV_WANT_MAX (64u << 20)                /* of one NBD_CMD_CACHE */

/* the write-back log (log/format.h): units of 4 KiB */
#define NV_LOG_UNIT 4096u
#define NV_LOG_RING 8192u                      /* where the ring begins, behind the two superblocks */
#define NV_LOG_RING_MIN (256u << 10)
#define NV_LOG_RING_MAX (1ull << 42)
#define NV_LOG_ENTRIES 160u                    /* of a record: with its fixed part they fit one unit */
#define NV_LOG_DATA_UNITS 128u                 /* of a record: 512 KiB */
#define NV_LOG_RECORD_UNITS (1u + NV_LOG_DATA_UNITS)
#define NV_LOG_ENTRIES_BESIDE 32u              /* so many are written beside whatever is under way */
#define NV_LOG_CROWD_RECORDS 64u               /* so many records long the size of clients' batches is remembered */
#define NV_LOG_HELD_TURNS 16u                  /* so long a small record waits for the rest of what a client is sending */
#define NV_LOG_GROUPS 6u                       /* 4 under way, one that is being built, one to spare */
#define NV_LOG_GROUPS_UNDER_WAY 4u
#define NV_LOG_RESERVE_MAX (1u << 20)          /* of the ring, for tombstones and BEGIN; less of a small ring */
#define NV_LOG_BYPASS_MAX (NV_LOG_DATA_UNITS * NV_LOG_UNIT)
#define NV_LOG_BATCH 8192u                     /* blocks that are destaged before the next flush below: 32 MiB */
#define NV_LOG_BATCH_MIN 256u                  /* ... at least, however slow storage is */
#define NV_LOG_BATCH_MS 100u                   /* ... which a batch is to take at most: who waits for room waits for it */
#define NV_LOG_RUN_BLOCKS 256u                 /* of one destage write: 1 MiB */
#define NV_LOG_RUNS 16u                        /* destage writes under way at once, when there is no room left */
#define NV_LOG_RUNS_CALM 4u                    /* ... and when a log is emptied */
#define NV_LOG_RUN_MEMORIES 128u               /* ... and their memory: seven legs that hang may each keep a set */
#define NV_LOG_HAUNTED 512u                    /* changes of a log that hangs which failed and may yet come to be seen; more: all */
#define NV_LOG_BOUNCES 16u                     /* reads of the log under way at once */
#define NV_LOG_BOUNCE_BLOCKS 16u               /* ... of 64 KiB at most */
#define NV_LOG_SCAN_BYTES (1u << 20)           /* read at once when a log is opened */
#define NV_LOG_STREAMS 4u                      /* sequential writers that are told apart */
#define NV_LOG_PACED_MS 10u                    /* of a rate: what one destage write takes, and what it may catch up with */
#define NV_LOG_PACED_BLOCKS 32u                /* ... but so many blocks at least: 128 KiB */
#define NV_LOG_PACED_BATCH_MS 1000u            /* ... until the next flush below */
#define NV_LOG_TIMER_MAX_MS 100u               /* its longest timer: what must end is not held up by one */
#define NV_LOG_RETRY_MS 1000u                  /* after a destage that failed */
#define NV_LOG_REST_MS 10u                     /* after a look that found nothing to destage */
#define NV_LOG_LOST_SPANS 1024u                /* of a log, that are told one by one; the rest as a sum */
#define NV_LOGGED_SLOTS 384u                   /* requests of one volume in its log at once; others wait */
#define NV_LOGGED_READ_SLOTS 128u              /* of them, for reads */
#define NV_GATE_PATIENCE_MS 2000u              /* so long requests are held for a log that goes in or out (switch.h) */
#define NV_LOG_ALIKE_BLOCKS 1024u              /* that a block status looks at one by one */
#define NV_LOG_ZERO_BLOCKS 256u                /* of one ZERO entry; a longer zero or trim goes below */

/* limits and shares of a volume */
#define NV_QOS_IOPS_MAX 100000000ull
#define NV_QOS_BANDWIDTH_MIN (64ull << 10)     /* bytes a second: the largest request then waits 512 s */
#define NV_QOS_BANDWIDTH_MAX (1ull << 40)
#define NV_QOS_BURST_MIN_US 1000u
#define NV_QOS_BURST_MAX_US 3600000000u
#define NV_QOS_IO_MIN 4096u
#define NV_QOS_QUANTUM_US 200u                 /* the shortest wait: a wake-up for each request would cost more */
#define NV_QOS_TIMER_MAX_MS 1000u              /* the longest timer: what must end is not held up by one */
#define NV_SHARES_MAX 10000u
#define NV_SHARES_USUAL 100u
#define NV_SHARE_REQUEST (8u << 10)            /* a request's own cost, in bytes moved */
#define NV_SHARE_TURN (384u << 10)             /* what a turn moves for the volume with the most shares */
#define NV_SHARE_MEMORY 16u                    /* turns after which a volume that was served counts as idle */

/* TLS: ciphertext of one connection, memory taken only while it waits */
#define NV_TLS_RECORD (16u << 10)               /* plaintext of one record at most (RFC 8446, 5.1) */
#define NV_TLS_RECEIVE (32u << 10)             /* one receive of ciphertext */
#define NV_TLS_CHUNK (64u << 10)
#define NV_TLS_INPUT_MAX (128u << 10)          /* received, not yet read as plaintext */
#define NV_TLS_OUTPUT_MAX (256u << 10)         /* encrypted, not yet sent */
#define NV_TLS_RESERVE 1024u                   /* of the output: one record's overhead, alerts, key updates */
#define NV_PSK_KEYS_MAX 65536u
#define NV_PSK_KEY_MIN 16u                     /* RFC 9257: 128 bits of entropy at least */
#define NV_PSK_KEY_MAX 64u
#define NV_PSK_NAME_MAX 128u                   /* OpenSSL takes identities up to 256 */

/* a remote export (backend/nbd.h) and one connection to it */
#define NV_LINKS_MAX 4096u                     /* of a plane */
#define NV_LINKS_PER_REMOTE 16u
#define NV_LINK_ASKS 128u                      /* requests in flight */
#define NV_LINK_BYTES (16ull << 20)            /* ... and their payload; one request may exceed it alone */
#define NV_LINK_BATCH 16u                      /* a connection is filled this far before the next one is tried */
#define NV_LINK_BATCH_BYTES (256ull << 10)
#define NV_LINK_RX (64u << 10)                 /* receive buffer */
#define NV_LINK_DIRECT (16u << 10)             /* what is missing of a read's payload is received in place from here on */
#define NV_LINK_TX_ASKS 64u                    /* requests gathered into one send */
#define NV_LINK_TX_IOV (2u * NV_LINK_TX_ASKS)
#define NV_LINK_TX_BYTES (1u << 20)            /* soft: no further request joins a send beyond it */
#define NV_LINK_SPANS 32u                      /* scattered pieces of one read's answer */
#define NV_LINK_ERROR_TEXT 4096u               /* longest error text that a server may send */
#define NV_LINK_REASON 160u                    /* why a connection was lost, for people */
#define NV_LINK_TALK (64u << 10)               /* bytes asked for at once while haggling through TLS */
#define NV_LINK_BYE_MS 1000u                   /* how long the server may take to close after DISC */
#define NV_LINK_FLUSH_PATIENCE 4u              /* time-outs of silence while a FLUSH is in flight: caches may be large */
#define NV_LINK_OLDEST 8u                      /* such silences that a single request may wait while others are answered */
#define NV_PIECE_SUSPECT 2u                    /* lost links after which a request is sent alone */
#define NV_PIECE_HANGUPS 8u                    /* ... and after which it fails */
#define NV_REMOTE_DOUBTS 16u                   /* places whose writes were given up; more are taken together */
#define NV_REMOTE_TIMEOUT_MAX_MS 600000u
#define NV_REMOTE_HOLD_MAX_MS 86400000u
#define NV_REMOTE_ZERO_PIECE (64ull << 20)     /* bounds how long one WRITE_ZEROES may run at the server */
#define NV_REMOTE_TRIM_PIECE (1ull << 30)

/* one reactor */
#define NV_POOL_MIN (4u << 20)
#define NV_POOL_PAGE 4096u
#define NV_EVENT_RING 1024u                    /* power of two */
#define NV_TRACE_RING 16384u                   /* power of two; above the records that one trace may ask for */
#define NV_TRACE_EVERY_MAX 1000000u
#define NV_RING_ENTRIES 1024u
#define NV_RING_COMPLETIONS 8192u
#define NV_STORAGE_BATCH 4u                    /* reads and writes that storage is given while a turn goes on */
#define NV_PARTIAL_TURNS 16u                   /* so long the rest of a request is said to be on its way */
#define NV_TURN_ROUNDS 8u                      /* completion rounds before replies must go out */

/* backend pieces: bound how long one operation runs, so that a drain is bounded too */
#define NV_ZERO_PIECE (1u << 20)
#define NV_PUNCH_PIECE (1ull << 30)
#define NV_JOB_PIECE (1u << 20)
#define NV_NOW_BYTES (256u << 10)              /* a longer transfer never runs inside a turn: others would wait */
#define NV_PREFETCH_BYTES 2048u                 /* of a block in memory, fetched into the processor's cache ahead */

/* times */
#define NV_SPIN_MAX_US 10000u
#define NV_HANDSHAKE_MAX_MS 600000u
#define NV_HAGGLE_SILENCE_MS 10000u
#define NV_FORCE_CLOSE_MS 5000u                /* a closing connection that does not drain is cut */
#define NV_TICK_MS 250u

#endif
