/*
 * See legs.h. Invariants: one question to the registry is out at a time, and what it wanted is judged by the record alone,
 * so a lost, repeated or late answer does no harm; a leg is released only by a record that calls it stale, which also
 * voids every question that was on its way with an older generation; nothing is asked or done any more once fenced.
 */
#include "volume/legs.h"

#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "limits.h"

enum phase {
    PHASE_IDLE,                     /* before nv_legs_begin */
    PHASE_COMMITTING,               /* legs that may not serve are to be stale first */
    PHASE_OPENING,                  /* OPEN was said */
    PHASE_SERVING,
    PHASE_REFUSED,
    PHASE_FENCED,
};

enum plane_state {                  /* of a leg, as the plane's events tell */
    PLANE_STALE,
    PLANE_IN_SYNC,
    PLANE_FAILING,
    PLANE_RELEASING,                /* told to, not done yet */
    PLANE_PREPARING,                /* RESYNC was said */
    PLANE_SYNCING,
    PLANE_PROMOTING,
    PLANE_PROMOTED,                 /* PROMOTE was said */
};

struct leg {
    uint32_t id;
    enum plane_state plane;
    nv_leg_look look;
    bool wanted;                    /* to be resynced */
    bool full;                      /* ... and its dirty map is worth nothing */
    bool confirm;                   /* its label, below, is to be told to the registry */
    uint64_t label_epoch, label_generation;
    uint64_t token;                 /* of the last call into the plane */
};

struct nv_legs {
    enum phase phase;
    uint64_t epoch;
    nv_legs_record record;
    struct leg legs[NV_LEGS_MAX];   /* beside those of the record */
    uint64_t tokens;                /* handed out */
    bool asked;                     /* a question is out */
    bool act;                       /* REFUSE or FENCE is still to be said */
    uint32_t why;
};

/* --- small things --- */

static bool at_least(uint64_t epoch, uint64_t generation, uint64_t than_epoch, uint64_t than_generation)
{
    return epoch >= than_epoch && generation >= than_generation;
}

static struct leg *find(nv_legs *legs, uint32_t id)
{
    for (uint32_t i = 0; i < legs->record.leg_count; i++)
        if (legs->legs[i].id == id)
            return &legs->legs[i];
    return NULL;
}

static nv_leg_record *recorded(nv_legs *legs, const struct leg *leg)
{
    return &legs->record.legs[leg - legs->legs];
}

static void refuse(nv_legs *legs, uint32_t why)
{
    legs->phase = PHASE_REFUSED;
    legs->act = true;
    legs->why = why;
}

static void fence(nv_legs *legs)
{
    if (legs->phase == PHASE_FENCED || legs->phase == PHASE_REFUSED)
        return;
    if (legs->phase == PHASE_IDLE || legs->phase == PHASE_COMMITTING) {
        refuse(legs, NV_WHY_EPOCH);
        return;
    }
    legs->phase = PHASE_FENCED;
    legs->act = true;
}

/* Its bytes are worth something as far as the dirty map says. */
static bool label_holds(const nv_leg_look *look, const nv_leg_record *record)
{
    return look->look == NV_LOOK_LABEL &&
           at_least(look->epoch, look->generation, record->stamp_epoch, record->stamp_generation);
}

static bool may_serve(const nv_leg_look *look, const nv_leg_record *record)
{
    return record->state == NV_LEG_IN_SYNC && label_holds(look, record) && !look->syncing;
}

nv_legs *nv_legs_create(uint64_t epoch)
{
    nv_legs *legs = calloc(1, sizeof *legs);

    if (legs)
        legs->epoch = epoch;
    return legs;
}

void nv_legs_free(nv_legs *legs)
{
    free(legs);
}

/* --- the beginning --- */

static bool registry_is_old(const nv_legs *legs)
{
    for (uint32_t i = 0; i < legs->record.leg_count; i++) {
        const nv_leg_look *look = &legs->legs[i].look;
        if (look->look == NV_LOOK_LABEL &&
            (look->epoch > legs->record.epoch || look->generation > legs->record.generation))
            return true;
    }
    return false;
}

void nv_legs_begin(nv_legs *legs, const nv_legs_record *record, const nv_leg_look *looks)
{
    uint32_t serving = 0;

    assert(legs->phase == PHASE_IDLE && record->leg_count <= NV_LEGS_MAX);
    legs->record = *record;
    for (uint32_t i = 0; i < record->leg_count; i++) {
        struct leg *leg = &legs->legs[i];
        leg->id = record->legs[i].id;
        leg->look = looks[i];
        leg->plane = may_serve(&looks[i], &record->legs[i]) ? PLANE_IN_SYNC : PLANE_STALE;
        leg->full = !label_holds(&looks[i], &record->legs[i]);
        serving += leg->plane == PLANE_IN_SYNC;
    }
    legs->phase = PHASE_COMMITTING;
    if (record->epoch != legs->epoch)
        refuse(legs, NV_WHY_EPOCH);
    else if (registry_is_old(legs))
        refuse(legs, NV_WHY_OLD_REGISTRY);
    else if (serving == 0)
        refuse(legs, NV_WHY_NO_LEG);
}

/* --- what comes in --- */

static void take_stamps(nv_legs *legs, const nv_legs_record *record)
{
    for (uint32_t i = 0; i < record->leg_count; i++) {
        nv_leg_record *mine = &legs->record.legs[i];
        if (at_least(record->legs[i].stamp_epoch, record->legs[i].stamp_generation, mine->stamp_epoch,
                     mine->stamp_generation)) {
            mine->stamp_epoch = record->legs[i].stamp_epoch;
            mine->stamp_generation = record->legs[i].stamp_generation;
        }
    }
}

/* The leg set has changed: keep what is known of those that stay. */
static void take_legs(nv_legs *legs, const nv_legs_record *record)
{
    struct leg old[NV_LEGS_MAX];
    const uint32_t old_count = legs->record.leg_count;

    memcpy(old, legs->legs, sizeof old);
    memset(legs->legs, 0, sizeof legs->legs);
    for (uint32_t i = 0; i < record->leg_count; i++) {
        legs->legs[i] = (struct leg){.id = record->legs[i].id, .full = true};
        for (uint32_t j = 0; j < old_count; j++)
            if (old[j].id == record->legs[i].id)
                legs->legs[i] = old[j];
    }
    legs->record = *record;
}

void nv_legs_told(nv_legs *legs, const nv_legs_record *record)
{
    if (legs->phase == PHASE_IDLE || record->epoch < legs->epoch || record->leg_count > NV_LEGS_MAX)
        return;
    if (record->epoch > legs->epoch) {
        fence(legs);
        return;
    }
    legs->asked = false;
    if (record->generation > legs->record.generation)
        take_legs(legs, record);
    else if (record->generation == legs->record.generation && record->leg_count == legs->record.leg_count)
        take_stamps(legs, record);
}

void nv_legs_ask_again(nv_legs *legs)
{
    legs->asked = false;
}

static void labelled(struct leg *leg, uint64_t epoch, uint64_t generation)
{
    leg->label_epoch = epoch;
    leg->label_generation = generation;
    leg->confirm = true;
}

static void all_labelled(nv_legs *legs, uint64_t epoch, uint64_t generation)
{
    for (uint32_t i = 0; i < legs->record.leg_count; i++) {
        struct leg *leg = &legs->legs[i];
        if (leg->plane == PLANE_IN_SYNC || leg->plane == PLANE_PROMOTING || leg->plane == PLANE_PROMOTED)
            labelled(leg, epoch, generation);
    }
}

/* A call into the plane is through. */
static void changed(nv_legs *legs, struct leg *leg, const nv_event *event)
{
    const uint64_t epoch = event->args[1], generation = event->args[2];

    if (!leg && event->token == 0 && event->result == 0) /* new labels after a change of the description */
        all_labelled(legs, epoch, generation);
    if (!leg || event->token != leg->token)
        return;
    switch (leg->plane) {
    case PLANE_RELEASING:
        leg->plane = event->result == 0 ? PLANE_STALE : PLANE_FAILING;
        leg->wanted = false; /* until somebody has looked whether it is there again */
        if (event->result == 0)
            all_labelled(legs, epoch, generation);
        break;
    case PLANE_PREPARING:
        leg->plane = event->result == 0 ? PLANE_SYNCING : PLANE_STALE;
        leg->wanted = false;
        leg->full &= event->result != 0;
        if (event->result == 0)
            labelled(leg, epoch, generation);
        break;
    case PLANE_PROMOTED:
        if (event->result != 0)
            break; /* it has failed meanwhile: that event has come, or comes */
        leg->plane = PLANE_IN_SYNC;
        all_labelled(legs, epoch, generation);
        break;
    default:
        break;
    }
}

void nv_legs_event(nv_legs *legs, const nv_event *event)
{
    struct leg *leg = event->args[0] <= UINT32_MAX ? find(legs, (uint32_t)event->args[0]) : NULL;

    switch (event->kind) {
    case NV_EVENT_VOLUME_ATTACHED:
        if (event->result == 0 && legs->phase == PHASE_OPENING) {
            legs->phase = PHASE_SERVING;
            all_labelled(legs, event->args[1], event->args[2]);
        }
        break;
    case NV_EVENT_LEG_FAILED:
        if (leg)
            leg->plane = PLANE_FAILING;
        break;
    case NV_EVENT_LEG_STOPPED:
        if (leg)
            leg->plane = PLANE_STALE;
        break;
    case NV_EVENT_RESYNC_DONE:
        if (!leg)
            break;
        leg->plane = PLANE_PROMOTING;
        leg->label_epoch = event->args[1];
        leg->label_generation = event->args[2];
        break;
    case NV_EVENT_LEG_CHANGED:
        changed(legs, leg, event);
        break;
    case NV_EVENT_VOLUME_FENCED:
        fence(legs);
        break;
    default:
        break;
    }
}

void nv_legs_looked(nv_legs *legs, uint32_t id, const nv_leg_look *look)
{
    struct leg *leg = find(legs, id);

    if (!leg)
        return;
    leg->look = *look;
    if (leg->plane == PLANE_STALE && !label_holds(look, recorded(legs, leg)))
        leg->full = true;
}

void nv_legs_want_resync(nv_legs *legs, uint32_t id, uint32_t full)
{
    struct leg *leg = find(legs, id);

    if (!leg)
        return;
    leg->wanted = true;
    leg->full |= full != 0;
}

/* --- what goes out --- */

static bool ask(nv_legs *legs, const struct leg *leg, uint32_t what, nv_legs_action *out)
{
    if (legs->asked)
        return false;
    legs->asked = true;
    *out = (nv_legs_action){.kind = NV_ACT_ASK, .leg = leg->id, .ask = what, .epoch = legs->epoch,
                            .generation = legs->record.generation, .stamp_epoch = leg->label_epoch,
                            .stamp_generation = leg->label_generation};
    return true;
}

static bool say(nv_legs *legs, struct leg *leg, uint32_t kind, enum plane_state state, nv_legs_action *out)
{
    leg->plane = state;
    leg->token = ++legs->tokens;
    *out = (nv_legs_action){.kind = kind, .leg = leg->id, .full = leg->full, .token = leg->token, .epoch = legs->epoch,
                            .generation = legs->record.generation};
    return true;
}

static bool others_in_sync(const nv_legs *legs, const nv_leg_record *than)
{
    for (uint32_t i = 0; i < legs->record.leg_count; i++)
        if (legs->record.legs[i].state == NV_LEG_IN_SYNC && &legs->record.legs[i] != than)
            return true;
    return false;
}

/* Before the volume opens: legs that may not serve are stale in the registry. */
static bool next_before_open(nv_legs *legs, nv_legs_action *out)
{
    uint32_t serving = 0;

    for (uint32_t i = 0; i < legs->record.leg_count; i++)
        if (legs->record.legs[i].state == NV_LEG_IN_SYNC && legs->legs[i].plane != PLANE_IN_SYNC)
            return ask(legs, &legs->legs[i], NV_ASK_STALE, out);
    for (uint32_t i = 0; i < legs->record.leg_count; i++) {
        if (legs->record.legs[i].state != NV_LEG_IN_SYNC)
            legs->legs[i].plane = PLANE_STALE;
        serving += legs->legs[i].plane == PLANE_IN_SYNC;
    }
    if (serving == 0) {
        refuse(legs, NV_WHY_NO_LEG);
        return false;
    }
    legs->phase = PHASE_OPENING;
    *out = (nv_legs_action){.kind = NV_ACT_OPEN, .epoch = legs->epoch, .generation = legs->record.generation};
    return true;
}

static bool next_of_failing(nv_legs *legs, struct leg *leg, const nv_leg_record *record, nv_legs_action *out)
{
    if (record->state == NV_LEG_STALE)
        return say(legs, leg, NV_ACT_RELEASE, PLANE_RELEASING, out);
    if (!others_in_sync(legs, record)) {
        legs->phase = PHASE_FENCED; /* the plane counts on a leg that the registry does not know: start again */
        legs->act = true;
        return false;
    }
    return ask(legs, leg, NV_ASK_STALE, out); /* a promoting one too: that voids the question that would promote it */
}

static bool next_of_stale(nv_legs *legs, struct leg *leg, const nv_leg_record *record, nv_legs_action *out)
{
    const bool touchable = leg->look.look == NV_LOOK_LABEL || (leg->look.look == NV_LOOK_NO_LABEL && leg->full);

    if (record->state == NV_LEG_IN_SYNC)
        return others_in_sync(legs, record) && ask(legs, leg, NV_ASK_STALE, out);
    if (!leg->wanted || !touchable || legs->phase != PHASE_SERVING)
        return false;
    if (record->state == NV_LEG_STALE)
        return ask(legs, leg, NV_ASK_SYNCING, out);
    return say(legs, leg, NV_ACT_RESYNC, PLANE_PREPARING, out);
}

static bool next_of_promoting(nv_legs *legs, struct leg *leg, const nv_leg_record *record, nv_legs_action *out)
{
    if (record->state == NV_LEG_IN_SYNC)
        return say(legs, leg, NV_ACT_PROMOTE, PLANE_PROMOTED, out);
    if (record->state == NV_LEG_SYNCING)
        return ask(legs, leg, NV_ASK_IN_SYNC, out);
    return say(legs, leg, NV_ACT_FAIL, PLANE_FAILING, out); /* somebody else has called it stale */
}

static bool next_of_leg(nv_legs *legs, struct leg *leg, nv_legs_action *out)
{
    const nv_leg_record *record = recorded(legs, leg);

    switch (leg->plane) {
    case PLANE_FAILING:
        return next_of_failing(legs, leg, record, out);
    case PLANE_STALE:
        return next_of_stale(legs, leg, record, out);
    case PLANE_PROMOTING:
        return next_of_promoting(legs, leg, record, out);
    case PLANE_IN_SYNC:
        if (record->state != NV_LEG_IN_SYNC) /* the registry has given it up: so does the plane */
            return say(legs, leg, NV_ACT_FAIL, PLANE_FAILING, out);
        return false;
    default:
        return false;
    }
}

static bool next_confirmation(nv_legs *legs, nv_legs_action *out)
{
    for (uint32_t i = 0; i < legs->record.leg_count; i++) {
        struct leg *leg = &legs->legs[i];
        const nv_leg_record *record = &legs->record.legs[i];
        if (!leg->confirm)
            continue;
        if (at_least(record->stamp_epoch, record->stamp_generation, leg->label_epoch, leg->label_generation))
            leg->confirm = false;
        else
            return ask(legs, leg, NV_ASK_CONFIRM, out);
    }
    return false;
}

int nv_legs_next(nv_legs *legs, nv_legs_action *out)
{
    if (legs->phase == PHASE_COMMITTING && next_before_open(legs, out))
        return 1;
    if (legs->phase == PHASE_OPENING || legs->phase == PHASE_SERVING) {
        for (uint32_t i = 0; i < legs->record.leg_count; i++) /* failures first: somebody waits for an answer */
            if (legs->legs[i].plane == PLANE_FAILING && next_of_leg(legs, &legs->legs[i], out))
                return 1;
        for (uint32_t i = 0; i < legs->record.leg_count && !legs->act; i++)
            if (next_of_leg(legs, &legs->legs[i], out))
                return 1;
        if (!legs->act && next_confirmation(legs, out))
            return 1;
    }
    if (!legs->act)
        return 0;
    legs->act = false;
    *out = (nv_legs_action){.kind = legs->phase == PHASE_FENCED ? NV_ACT_FENCE : NV_ACT_REFUSE, .why = legs->why};
    return 1;
}
