/*
 * See tally.h.
 */
#include "sim/tally.h"

#include <stdio.h>

uint64_t tally_counts[TALLY_COUNT];

static const char *const names[TALLY_COUNT] = {
    [TALLY_HANG] = "trouble: a leg hangs",
    [TALLY_STUCK] = "trouble: a leg is back, what it was asked before is not",
    [TALLY_LOSS] = "trouble: a leg is gone",
    [TALLY_BACK] = "trouble: a leg that was gone is back",
    [TALLY_REBOOT] = "trouble: a leg is restarted under a filter and loses what was not flushed",
    [TALLY_LOST] = "trouble: a power cut loses writes that were not synced",
    [TALLY_ROLL_BACK] = "trouble: a leg comes back older than it was",
    [TALLY_SWAP] = "trouble: two legs come back in each other's place",
    [TALLY_REORDERED] = "trouble: an operation is overtaken by one that was asked for later",
    [TALLY_DELAYED] = "trouble: an operation is late",
    [TALLY_LEG_ERROR] = "trouble: an operation of a leg fails",
    [TALLY_SYNC_ERROR] = "trouble: a sync fails and loses what it should have saved",
    [TALLY_SHORT] = "trouble: a transfer is cut short",
    [TALLY_TORN] = "trouble: a write has happened in part when its filter or leg ends",
    [TALLY_FENCED] = "trouble: a deposed filter asks a leg, and is refused",
    [TALLY_FAR_CONNECTION] = "far trouble: a server ends a connection",
    [TALLY_FAR_LEAVES] = "far trouble: a server says that it shuts down",
    [TALLY_FAR_SILENT] = "far trouble: one connection of several is silent for long",
    [TALLY_FAR_RESTART] = "far trouble: a server is restarted, and its client alone can tell what that means",
    [TALLY_FAR_OWED] = "far way out: a client latches, because its server went with writes that were not flushed",
    [TALLY_FAR_TIMED_OUT] = "far way out: a client gives a connection up",
    [TALLY_FAR_DOUBT] = "far way out: a client latches, because nobody says what became of a write",
    [TALLY_FAR_LATE] = "far trouble: a server does late what its client has given up",
    [TALLY_FAR_WORD] = "far way out: somebody makes sure that nothing is under way at a server",
    [TALLY_FAR_CLAIM] = "far way out: a newer claim ends connections",
    [TALLY_FAR_REFUSED] = "far trouble: a deposed filter's connections end",
    [TALLY_CUT] = "trouble: the link to control is cut",
    [TALLY_LATE_MESSAGE] = "trouble: a message of the link is slow",
    [TALLY_TWICE] = "trouble: a message of the link comes twice",
    [TALLY_JUMP] = "trouble: the clock jumps",
    [TALLY_POWER_CUT] = "trouble: power goes at a leg while nobody serves",
    [TALLY_REBIND] = "trouble: a host is bound while another one serves",
    [TALLY_KILL_SERVING] = "a filter dies while it serves",
    [TALLY_KILL_ATTACHING] = "a filter dies while it attaches",
    [TALLY_KILL_FROZEN] = "a filter dies while it holds answers",
    [TALLY_KILL_RELEASING] = "a filter dies while it releases",
    [TALLY_KILL_PREPARING] = "a filter dies while it begins a resync",
    [TALLY_KILL_SYNCING] = "a filter dies while it copies to a leg",
    [TALLY_KILL_CHECKPOINT] = "a filter dies while it saves how far a copy is",
    [TALLY_KILL_PROMOTING] = "a filter dies while a leg becomes one of those in sync",
    [TALLY_KILL_CLEARING] = "a filter dies while it clears intents",
    [TALLY_KILL_DOUBTFUL] = "a filter dies while it reconciles",
    [TALLY_KILL_METADATA] = "a filter dies just after a label or a page of a map was written",
    [TALLY_KILL_DEPOSED] = "a filter dies that was deposed",
    [TALLY_ATTACH_CLEAN] = "way out: attached after a clean end",
    [TALLY_ATTACH_UNCLEAN] = "way out: attached, and regions are to be reconciled",
    [TALLY_ATTACH_FAILED] = "way out: the last leg does not attach",
    [TALLY_REFUSED] = "way out: the machine refuses to serve",
    [TALLY_FAILED_BY_TIME] = "way out: a leg fails because it takes too long",
    [TALLY_FAILED_BY_ERROR] = "way out: a leg fails because of an error",
    [TALLY_RELEASED] = "way out: what was held is released",
    [TALLY_RESYNC_PART] = "way out: a resync of what a leg lacks",
    [TALLY_RESYNC_FULL] = "way out: a resync of everything",
    [TALLY_RESYNC_STOPPED] = "way out: a resync is broken off",
    [TALLY_RESYNC_WAITED] = "way out: a resync waits for an operation from before",
    [TALLY_PROMOTED] = "way out: a leg is in sync again",
    [TALLY_REPAIRED] = "way out: a place is repaired after a read error",
    [TALLY_FOUND_FENCED] = "way out: a filter finds a newer epoch and stops",
    [TALLY_EXPIRED] = "way out: what is held fails, because control does not answer",
    [TALLY_LATE_OPERATION] = "way out: an operation completes that nobody waits for any more",
    [TALLY_CLEAN_END] = "way out: a volume is closed cleanly, whatever its legs are",
    [TALLY_LEASE_ENDS] = "way out: a host's lease ends before another one is bound",
    [TALLY_LOG_FAILED] = "log trouble: a log's disk refuses a write",
    [TALLY_LOG_SLOW] = "log trouble: a log's disk is too slow, and is given up",
    [TALLY_LOG_VOID] = "log way out: all that a failed log held is below",
    [TALLY_LOG_FORGOTTEN] = "log way out: control commits that a failed log is never replayed",
    [TALLY_LOG_KEEPS] = "log way out: memory of what was carried is kept for a leg that may still use it",
    [TALLY_LOG_IN] = "log switch: it goes in before a mirror that is served",
    [TALLY_LOG_OUT] = "log switch: it goes out",
    [TALLY_LOG_STAYS] = "log switch: it stays, for it holds something, or what is under way takes too long",
    [TALLY_CACHE_HIT] = "way out: a block is served from the cache",
};

void tally_print(uint64_t runs)
{
    for (unsigned what = 0; what < TALLY_COUNT; what++)
        printf("%10llu %9.1f a thousand: %s\n", (unsigned long long)tally_counts[what],
               runs ? 1000.0 * (double)tally_counts[what] / (double)runs : 0.0, names[what]);
}
