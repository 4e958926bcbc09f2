/*
 * The real port's handles (file descriptors) and bells (eventfds): open, close, shut, look. Stateless; callable from
 * any thread. The ring itself is in io_uring.c.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "io/io.h"
#include "limits.h"

nv_handle nv_io_open_file(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    return copy < 0 ? -errno : copy;
}

nv_handle nv_io_open_socket(int fd)
{
    const int size = (int)NV_SOCKET_BUFFER, one = 1;
    int type = 0, domain = 0;
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
    length = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain != AF_UNIX)
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
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
