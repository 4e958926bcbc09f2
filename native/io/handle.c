/*
 * The real port's handles (file descriptors) and bells (eventfds): open, close, shut, look. Stateless; callable from
 * any thread. The ring itself is in io_uring.c.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "io/io.h"
#include "io/store.h"
#include "limits.h"

#define PAGE 4096u
#define PRESENT_PAGES 64u

nv_handle nv_io_open_file(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    return copy < 0 ? -errno : copy;
}

static bool is_unix(int fd)
{
    int domain = AF_UNIX;
    socklen_t length = sizeof domain;

    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) < 0 || domain == AF_UNIX;
}

nv_handle nv_io_open_socket(int fd)
{
    const int size = (int)NV_SOCKET_BUFFER, one = 1;
    int type = 0;
    socklen_t length = sizeof type;
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0)
        return -errno;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) < 0)
        return -errno;
    if (type != SOCK_STREAM)
        return -EPROTOTYPE;
    /* The ring waits for a blocking socket; a non-blocking one would answer EAGAIN. */
    if ((flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0)
        return -errno;
    /* Sizes are wishes: the kernel clips them, and a socket with small buffers still works. */
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (!is_unix(fd))
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

bool nv_io_in_memory(nv_handle handle)
{
    struct statfs about;
    struct stat what;

    if (fstat(handle, &what) != 0 || !S_ISREG(what.st_mode) || fstatfs(handle, &about) != 0)
        return false; /* the node of a block device lies on a tmpfs, its bytes do not */
    return about.f_type == TMPFS_MAGIC || about.f_type == RAMFS_MAGIC;
}

/* mincore() tells only the owner and who may write; to anybody else it says that all pages are there. */
static bool told_what_is_there(nv_handle handle)
{
    struct stat what;
    char path[32];

    snprintf(path, sizeof path, "/proc/self/fd/%d", handle);
    return (fstat(handle, &what) == 0 && what.st_uid == geteuid()) || faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0;
}

uint8_t *nv_io_map(nv_handle handle, uint64_t size, bool writable)
{
    const int how = PROT_READ | (writable ? PROT_WRITE : 0);
    void *view;

    if (size == 0 || !told_what_is_there(handle) || (writable && !nv_store_ready()))
        return NULL;
    view = mmap(NULL, size, how, MAP_SHARED | MAP_NORESERVE, handle, 0);
    if (view == MAP_FAILED)
        return NULL;
    (void)munlock(view, size); /* the plane locks its own memory; whether the file may be swapped is its owner's choice */
    return view;
}

void nv_io_unmap(uint8_t *view, uint64_t size)
{
    munmap(view, size);
}

/*
 * Entries in the page table for the pages that are there, many with each fault: the first touch of each would fault by
 * itself else. It is an advice: what comes of it does not matter.
 */
static void make_ready(const uint8_t *at, uint64_t pages)
{
    while (pages) {
        const unsigned first = (unsigned)__builtin_ctzll(pages);
        const uint64_t gaps = ~(pages >> first);
        const unsigned count = gaps ? (unsigned)__builtin_ctzll(gaps) : PRESENT_PAGES;
        (void)madvise((void *)(uintptr_t)(at + first * PAGE), count * PAGE, MADV_POPULATE_READ);
        pages &= first + count < PRESENT_PAGES ? UINT64_MAX << (first + count) : 0;
    }
}

uint64_t nv_io_present(const uint8_t *at, unsigned pages)
{
    uint8_t there[PRESENT_PAGES];
    uint64_t found = 0;

    assert(pages > 0 && pages <= PRESENT_PAGES && ((uintptr_t)at & (PAGE - 1)) == 0);
    if (mincore((void *)(uintptr_t)at, pages * PAGE, there) != 0)
        return 0;
    for (unsigned i = 0; i < pages; i++)
        found |= (uint64_t)(there[i] & 1) << i;
    make_ready(at, found);
    return found;
}

int64_t nv_io_copy(nv_handle handle, void *to, uint64_t length, uint64_t offset)
{
    ssize_t got;

    while ((got = pread(handle, to, length, (off_t)offset)) < 0 && errno == EINTR)
        ;
    return got < 0 ? -errno : got;
}

void nv_io_close(nv_handle handle)
{
    assert(handle >= 0);
    close(handle);
}

void nv_io_shutdown(nv_handle handle)
{
    shutdown(handle, SHUT_RDWR); /* ENOTCONN: the peer was faster */
}

void nv_io_shutdown_send(nv_handle handle)
{
    shutdown(handle, SHUT_WR);
}

void nv_io_reset_on_close(nv_handle handle)
{
    const struct linger none = {.l_onoff = 1, .l_linger = 0};

    setsockopt(handle, SOL_SOCKET, SO_LINGER, &none, sizeof none); /* where it fails there is nothing to reset */
}

bool nv_io_low_water(nv_handle handle, uint32_t bytes)
{
    const int low = (int)bytes;

    assert(bytes > 0 && bytes <= NV_SOCKET_BUFFER);
    if (is_unix(handle))
        return false; /* a unix socket takes the option and wakes its reader for every byte all the same */
    return setsockopt(handle, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof low) == 0;
}

bool nv_io_hung_up(nv_handle handle)
{
    struct pollfd look = {.fd = handle, .events = POLLRDHUP};

    return poll(&look, 1, 0) == 1 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

int nv_bell_create(void)
{
    int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    return bell < 0 ? -errno : bell;
}

void nv_bell_ring(int bell)
{
    const uint64_t one = 1;

    while (write(bell, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void nv_bell_silence(int bell)
{
    uint64_t value;

    while (read(bell, &value, sizeof value) < 0 && errno == EINTR)
        ;
}

void nv_bell_destroy(int bell)
{
    close(bell);
}
