/*
 * How often each trouble was met in the mirror's simulation, and each way out of it was taken: a simulation that finds
 * nothing proves something only where something happened. Counted over all runs of the process.
 */
#ifndef NV_SIM_TALLY_H
#define NV_SIM_TALLY_H

#include <stdint.h>

enum tally {
    /* troubles of legs */
    TALLY_HANG,
    TALLY_STUCK,
    TALLY_LOSS,
    TALLY_BACK,
    TALLY_REBOOT,
    TALLY_LOST,
    TALLY_ROLL_BACK,
    TALLY_SWAP,
    TALLY_REORDERED,
    TALLY_DELAYED,
    TALLY_LEG_ERROR,
    TALLY_SYNC_ERROR,
    TALLY_SHORT,
    TALLY_TORN,
    TALLY_FENCED,
    /* of legs behind servers, and of their clients */
    TALLY_FAR_CONNECTION,
    TALLY_FAR_LEAVES,
    TALLY_FAR_SILENT,
    TALLY_FAR_RESTART,
    TALLY_FAR_OWED,
    TALLY_FAR_TIMED_OUT,
    TALLY_FAR_DOUBT,
    TALLY_FAR_LATE,
    TALLY_FAR_WORD,
    TALLY_FAR_CLAIM,
    TALLY_FAR_REFUSED,
    /* of the links, and of time */
    TALLY_CUT,
    TALLY_LATE_MESSAGE,
    TALLY_TWICE,
    TALLY_JUMP,
    /* ends */
    TALLY_POWER_CUT,
    TALLY_REBIND,
    TALLY_KILL_SERVING,
    TALLY_KILL_ATTACHING,
    TALLY_KILL_FROZEN,
    TALLY_KILL_RELEASING,
    TALLY_KILL_PREPARING,
    TALLY_KILL_SYNCING,
    TALLY_KILL_CHECKPOINT,
    TALLY_KILL_PROMOTING,
    TALLY_KILL_CLEARING,
    TALLY_KILL_DOUBTFUL,
    TALLY_KILL_METADATA,
    TALLY_KILL_DEPOSED,
    /* ways out */
    TALLY_ATTACH_CLEAN,
    TALLY_ATTACH_UNCLEAN,
    TALLY_ATTACH_FAILED,
    TALLY_REFUSED,
    TALLY_FAILED_BY_TIME,
    TALLY_FAILED_BY_ERROR,
    TALLY_RELEASED,
    TALLY_RESYNC_PART,
    TALLY_RESYNC_FULL,
    TALLY_RESYNC_STOPPED,
    TALLY_RESYNC_WAITED,
    TALLY_PROMOTED,
    TALLY_REPAIRED,
    TALLY_FOUND_FENCED,
    TALLY_EXPIRED,
    TALLY_LATE_OPERATION,
    TALLY_LEASE_ENDS,
    TALLY_CLEAN_END,
    TALLY_CACHE_HIT,
    TALLY_LOG_FAILED,
    TALLY_LOG_SLOW,
    TALLY_LOG_HANGS,
    TALLY_LOG_VOID,
    TALLY_LOG_FORGOTTEN,
    TALLY_LOG_KEEPS,
    TALLY_LOG_IN,
    TALLY_LOG_OUT,
    TALLY_LOG_STAYS,
    TALLY_COUNT,
};

extern uint64_t tally_counts[TALLY_COUNT];

static inline void tally(enum tally what)
{
    tally_counts[what]++;
}

/* To stdout: a line each, the count, how many a thousand runs, what it is. */
void tally_print(uint64_t runs);

#endif
