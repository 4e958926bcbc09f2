/*
 * A link through TLS (nbd.h). The handshake and what is haggled after it are bytes that Python says and asks for
 * (nv_link_say, LINK_HEARD); from the transmission phase on, requests are encrypted out of their own memory and answers
 * decrypted to where they belong. One send of ciphertext is under way at most.
 *
 * Invariants: Python asks for one thing at a time, at most NV_LINK_TALK bytes; what it says is encrypted in order,
 * before any request; `heard` is the front's between the event and its next word, the home's otherwise.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "backend/nbd.h"
#include "error.h"
#include "nbd/tls.h"
#include "reactor/plane.h"

struct word {                       /* something said, and how much is to be heard then */
    struct nv_message message;
    struct word *next;
    struct nv_link *link;
    uint32_t want;
    uint32_t length, taken;
    uint8_t bytes[];
};

struct nv_talk {
    bool ready;                     /* the TLS handshake is done */
    struct word *words, **words_tail; /* not wholly encrypted yet */
    uint32_t want, filled;
    uint8_t *heard;                 /* NV_LINK_TALK bytes, resident as far as used */
    struct nv_event_slot event;
    bool bye;
    bool asked;                     /* front: a word wants bytes, and LINK_HEARD has not been answered yet */
};

int nv_link_make_secure(struct nv_link *link, nv_tls_context *context, const char *hostname, uint32_t timeout_ms)
{
    struct nv_talk *talk = calloc(1, sizeof *talk);

    link->talk = talk;
    link->tls = nv_tls_new_client(context, hostname);
    if (talk) {
        talk->heard = nv_pages_map(NV_LINK_TALK);
        talk->words_tail = &talk->words;
    }
    if (!talk || !talk->heard || !link->tls)
        return -ENOMEM;
    link->haggle_ms = timeout_ms;
    return 0;
}

void nv_talk_free(struct nv_talk *talk)
{
    if (!talk)
        return;
    for (struct word *word = talk->words, *next; word; word = next) {
        next = word->next;
        free(word);
    }
    if (talk->heard)
        nv_pages_unmap(talk->heard, NV_LINK_TALK);
    free(talk);
}

/* ---- ciphertext in ---- */

/* False: nothing left to feed, or no room until plaintext was read. */
static bool feed(struct nv_link *link)
{
    ssize_t taken;

    if (link->cipher_start == link->cipher_end)
        return false;
    taken = nv_tls_feed(link->tls, link->cipher + link->cipher_start, link->cipher_end - link->cipher_start);
    if (taken < 0) {
        nv_link_lose(link, (int)taken, "no memory for TLS");
        return false;
    }
    link->cipher_start += (uint32_t)taken;
    return taken > 0;
}

size_t nv_link_decrypt(struct nv_link *link, void *to, size_t size)
{
    do {
        ssize_t got = nv_tls_read(link->tls, to, size);
        if (got > 0)
            return (size_t)got;
        if (got == -EPIPE)
            nv_link_lose(link, link->state == NV_LINK_LEAVING ? 0 : -ECONNRESET, "the server closed the connection");
        else if (got < 0)
            nv_link_lose(link, (int)got, "%s", nv_tls_error(link->tls));
        if (got < 0)
            return 0;
    } while (feed(link));
    return 0;
}

static bool shake_hands(struct nv_link *link)
{
    int state;

    do {
        state = nv_tls_handshake(link->tls);
    } while (state == 0 && feed(link));
    if (state < 0) {
        nv_link_transmit_secure(link); /* the alert that says why */
        nv_link_lose(link, state, "%s", nv_tls_error(link->tls));
    }
    link->talk->ready = state > 0;
    return state > 0;
}

/* What was asked for, as far as it has come. */
static void listen(struct nv_link *link)
{
    struct nv_talk *talk = link->talk;
    size_t got;

    while (talk->filled < talk->want &&
           (got = nv_link_decrypt(link, talk->heard + talk->filled, talk->want - talk->filled)) > 0)
        talk->filled += (uint32_t)got;
    if (link->state != NV_LINK_HAGGLING || talk->want == 0 || talk->filled < talk->want)
        return;
    talk->want = 0;
    talk->event.event = (nv_event){.kind = NV_EVENT_LINK_HEARD, .token = link->ended.event.token,
                                   .args = {link->remote->object.id, link->id}};
    nv_events_raise(&link->reactor->events, &talk->event);
}

void nv_link_haggle(struct nv_link *link)
{
    assert(link->state == NV_LINK_HAGGLING);
    if (link->talk->ready || shake_hands(link))
        listen(link);
    if (link->state == NV_LINK_HAGGLING)
        feed(link); /* what was not asked for waits inside TLS, within its bound */
    nv_link_transmit(link);
}

/* ---- ciphertext out ---- */

static bool encrypt_word(struct nv_link *link)
{
    struct nv_talk *talk = link->talk;
    struct word *word = talk->words;
    struct iovec iov;
    ssize_t taken;

    if (!word)
        return false;
    iov = (struct iovec){word->bytes + word->taken, word->length - word->taken};
    taken = nv_tls_write(link->tls, &iov, 1);
    if (taken < 0) {
        nv_link_lose(link, (int)taken, "%s", nv_tls_error(link->tls));
        return false;
    }
    word->taken += (uint32_t)taken;
    if (word->taken < word->length)
        return taken > 0;
    talk->words = word->next;
    if (!talk->words)
        talk->words_tail = &talk->words;
    free(word);
    return true;
}

static bool encrypt_asks(struct nv_link *link)
{
    ssize_t taken;

    if (link->talk->words || !nv_link_gather(link))
        return false;
    taken = nv_tls_write(link->tls, &link->tx_iov[link->tx_first], (int)(link->tx_count - link->tx_first));
    if (taken < 0) {
        nv_link_lose(link, (int)taken, "%s", nv_tls_error(link->tls));
        return false;
    }
    nv_link_advance(link, (uint64_t)taken);
    return taken > 0;
}

void nv_link_transmit_secure(struct nv_link *link)
{
    const void *cipher = NULL;
    size_t size;

    if (link->tx_pending || link->mute || link->state >= NV_LINK_LOST)
        return;
    while (link->talk->ready && link->state < NV_LINK_LOST && (encrypt_word(link) || encrypt_asks(link)))
        ;
    if (link->state >= NV_LINK_LOST)
        return;
    if (link->state == NV_LINK_LEAVING && !link->tx_sending && !link->tx_queue && !link->talk->bye)
        link->talk->bye = nv_tls_shutdown(link->tls) != -EAGAIN;
    size = nv_tls_pending(link->tls, &cipher);
    if (size == 0)
        return;
    link->cipher_iov = (struct iovec){(void *)(uintptr_t)cipher, size};
    nv_link_submit_send(link, &link->cipher_iov, 1);
}

void nv_link_sent_secure(struct nv_link *link, int64_t result)
{
    nv_tls_sent(link->tls, (size_t)result);
}

/* ---- the front's side ---- */

int nv_link_secure(nv_plane *plane, uint32_t object, int fd, nv_tls_context *context, const char *hostname,
                   uint32_t timeout_ms, uint64_t token, uint32_t *number)
{
    struct nv_link *link = NULL;
    int error;

    if (timeout_ms == 0 || timeout_ms > NV_HANDSHAKE_MAX_MS)
        return nv_fail(EINVAL, "a TLS handshake time of %u ms; 1..%u are possible", timeout_ms, NV_HANDSHAKE_MAX_MS);
    error = nv_link_new(plane, object, fd, token, &link);
    if (error)
        return error;
    if (nv_link_make_secure(link, context, hostname, timeout_ms) != 0) {
        nv_table_remove(&plane->links, link->id);
        nv_link_free(link);
        return nv_fail(ENOMEM, "no memory for a TLS connection, or %s is no host name", hostname ? hostname : "");
    }
    *number = link->id;
    nv_link_launch(link);
    return 0;
}

static int find_talking(nv_plane *plane, uint32_t number, struct nv_link **out)
{
    int error = nv_link_find(plane, number, out);

    if (error)
        return error;
    if ((*out)->told)
        return nv_fail(ENOTCONN, "link %u has ended", number);
    return (*out)->talk ? 0 : nv_fail(EINVAL, "link %u has no TLS", number);
}

static void word_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct word *word = (struct word *)((char *)message - offsetof(struct word, message));
    struct nv_link *link = word->link;

    (void)reactor;
    if (link->state != NV_LINK_HAGGLING) {
        free(word);
        return;
    }
    if (word->want > 0) {
        link->talk->want = word->want;
        link->talk->filled = 0;
    }
    if (word->length > 0) {
        word->next = NULL;
        *link->talk->words_tail = word;
        link->talk->words_tail = &word->next;
    } else {
        free(word);
    }
    nv_link_haggle(link);
    nv_link_arm_receive(link);
}

int nv_link_say(nv_plane *plane, uint32_t number, const void *bytes, uint64_t length, uint32_t want)
{
    struct nv_link *link;
    struct word *word;
    int error = find_talking(plane, number, &link);

    if (!error && (want > NV_LINK_TALK || length > NV_LINK_TALK))
        error = nv_fail(EINVAL, "%" PRIu64 " bytes to say, %u to hear; at most %u are possible", length, want,
                        NV_LINK_TALK);
    if (!error && link->talk->asked)
        error = nv_fail(EBUSY, "link %u still waits for what was asked for before", number);
    if (error)
        return error;
    word = malloc(sizeof *word + length);
    if (!word)
        return nv_fail(ENOMEM, "no memory for %" PRIu64 " bytes", length);
    *word = (struct word){.message.run = word_arrives, .link = link, .want = want, .length = (uint32_t)length};
    if (length > 0)
        memcpy(word->bytes, bytes, length);
    link->talk->asked = want > 0;
    nv_reactor_send(link->reactor, &word->message);
    return 0;
}

int nv_link_heard(nv_plane *plane, uint32_t number, void *out, uint64_t size)
{
    struct nv_link *link;
    uint32_t length;
    int error = find_talking(plane, number, &link);

    if (!error && !link->talk->asked)
        error = nv_fail(EAGAIN, "link %u was not asked for anything", number);
    if (error)
        return error;
    length = link->talk->filled; /* written before the event, and not again before the next word */
    if (length > size)
        return nv_fail(EMSGSIZE, "%u bytes were heard, room for %" PRIu64, length, size);
    memcpy(out, link->talk->heard, length);
    link->talk->asked = false;
    return (int)length;
}

struct entry {
    struct nv_message message;
    struct nv_link *link;
    nv_link_params params;
};

static void entry_arrives(struct nv_reactor *reactor, struct nv_message *message)
{
    struct entry *entry = (struct entry *)((char *)message - offsetof(struct entry, message));
    struct nv_link *link = entry->link;

    (void)reactor;
    if (link->state == NV_LINK_HAGGLING) {
        link->params = entry->params;
        nv_link_enters(link);
    }
    free(entry);
}

int nv_link_enter(nv_plane *plane, uint32_t number, const nv_link_params *params)
{
    struct nv_link *link;
    struct entry *entry;
    int error = find_talking(plane, number, &link);

    if (!error)
        error = nv_link_check_params(link->remote, params);
    if (error)
        return error;
    entry = calloc(1, sizeof *entry);
    if (!entry)
        return nv_fail(ENOMEM, "no memory for a message");
    *entry = (struct entry){.message.run = entry_arrives, .link = link, .params = *params};
    nv_reactor_send(link->reactor, &entry->message);
    return 0;
}
