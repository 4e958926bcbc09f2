"""The kernel's nbd driver by generic netlink: connect, reconfigure, disconnect, status, and its dead-link events.

`Kernel` is what the keeper of an attachment needs; `NetlinkKernel` is the real one, tests have their own.
Source: Linux, include/uapi/linux/nbd-netlink.h. An attribute's place in `nla_map` is its number there.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket

from nbdvvol.model.errors import Code, NvError

FAMILY = "nbd"
FAMILY_VERSION = 1
EVENTS_GROUP = "nbd_mc_group"
CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = range(1, 6)


class NbdMessage(genlmsg):  # type: ignore[misc]  # pyroute2 has no types
    """One message of the family `nbd`."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]  # noqa: N801  (pyroute2 finds it by this name)
        """The nest of NBD_ATTR_SOCKETS."""

        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: N801
            """One socket."""

            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]  # noqa: N801
        """The nest of NBD_ATTR_DEVICE_LIST."""

        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: N801
            """One device."""

            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """What CONNECT tells the kernel. `index` None: the kernel takes a free device. Sizes in bytes."""

    index: int | None
    size: int
    block_size: int
    flags: int
    request_timeout_s: int
    dead_timeout_s: int
    backend: str


class Kernel(Protocol):
    """The driver as the keeper sees it. Every refusal is an OSError with the kernel's errno."""

    async def connect(self, settings: DeviceSettings, fds: Sequence[int]) -> int:
        """Make a device of sockets that are in the transmission phase; return its index."""

    async def reconfigure(self, index: int, backend: str, *, fds: Sequence[int] = (), size: int | None = None) -> None:
        """Offer sockets in place of dead ones (none dead: they are silently dropped), or set the size in bytes."""

    async def disconnect(self, index: int) -> None:
        """Take the device down; what is in flight fails."""

    async def connected(self, index: int) -> bool:
        """Whether the device has a configuration, whatever the state of its sockets."""

    async def link_dead(self) -> int:
        """Wait until the kernel gives up a socket; return the device's index."""

    def close(self) -> None:
        """Close the netlink sockets; the devices stay."""


class NetlinkKernel:
    """`Kernel` over two generic netlink sockets, one for commands and one for events."""

    def __init__(self) -> None:
        self._commands = _Socket()
        self._events = _Socket()

    @classmethod
    async def open(cls) -> NetlinkKernel:
        """Load the driver if need be and bind. Raises NvError(NO_KERNEL_NBD) when this kernel has none."""
        try:
            return await cls._bind()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTSUP):
                raise
        said = load_driver()
        try:
            return await cls._bind()
        except OSError as error:
            raise NvError(Code.NO_KERNEL_NBD, f"this kernel has no nbd driver (modprobe nbd: {said})") from error

    @classmethod
    async def _bind(cls) -> NetlinkKernel:
        kernel = cls()
        try:
            await kernel._commands.bind(FAMILY, NbdMessage)
            await kernel._events.bind(FAMILY, NbdMessage)
            kernel._events.add_membership(EVENTS_GROUP)
        except NetlinkError as error:
            kernel.close()
            raise OSError(error.code, str(error)) from error
        return kernel

    async def connect(self, settings: DeviceSettings, fds: Sequence[int]) -> int:
        """See Kernel."""
        attributes: list[tuple[str, Any]] = [
            ("NBD_ATTR_SIZE_BYTES", settings.size),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", settings.block_size),
            ("NBD_ATTR_SERVER_FLAGS", settings.flags),
            ("NBD_ATTR_TIMEOUT", settings.request_timeout_s),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", settings.dead_timeout_s),
            ("NBD_ATTR_BACKEND_IDENTIFIER", settings.backend),
            _sockets(fds),
        ]
        if settings.index is not None:
            attributes.insert(0, ("NBD_ATTR_INDEX", settings.index))
        for message in await self._request(CONNECT, attributes):
            index = message.get_attr("NBD_ATTR_INDEX")
            if index is not None:
                return int(index)
        raise OSError(errno.EPROTO, "the kernel did not tell which device it made")

    async def reconfigure(self, index: int, backend: str, *, fds: Sequence[int] = (), size: int | None = None) -> None:
        """See Kernel."""
        attributes: list[tuple[str, Any]] = [("NBD_ATTR_INDEX", index), ("NBD_ATTR_BACKEND_IDENTIFIER", backend)]
        if fds:
            attributes.append(_sockets(fds))
        if size is not None:
            attributes.append(("NBD_ATTR_SIZE_BYTES", size))
        await self._request(RECONFIGURE, attributes)

    async def disconnect(self, index: int) -> None:
        """See Kernel."""
        await self._request(DISCONNECT, [("NBD_ATTR_INDEX", index)])

    async def connected(self, index: int) -> bool:
        """See Kernel."""
        for message in await self._request(STATUS, [("NBD_ATTR_INDEX", index)]):
            devices = message.get_attr("NBD_ATTR_DEVICE_LIST")
            for device in devices.get_attrs("NBD_DEVICE_ITEM") if devices is not None else ():
                if device.get_attr("NBD_DEVICE_INDEX") == index:
                    return bool(device.get_attr("NBD_DEVICE_CONNECTED"))
        return False

    async def link_dead(self) -> int:
        """See Kernel."""
        while True:
            async for message in self._events.get():
                if message["cmd"] == LINK_DEAD:
                    return int(message.get_attr("NBD_ATTR_INDEX"))

    def close(self) -> None:
        """See Kernel."""
        self._commands.close()
        self._events.close()

    async def _request(self, command: int, attributes: list[tuple[str, Any]]) -> list[Any]:
        message = NbdMessage()
        message["cmd"] = command
        message["version"] = FAMILY_VERSION
        message["attrs"] = attributes
        try:
            answers = await self._commands.nlm_request(
                message, msg_type=self._commands.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK
            )
            return [answer async for answer in answers]
        except NetlinkError as error:
            raise OSError(error.code, str(error)) from error


class _Socket(AsyncGenericNetlinkSocket):  # type: ignore[misc]  # pyroute2 has no types
    module_err_level = "debug"  # an absent family is our caller's to report


def load_driver() -> str:
    """Try to load the nbd module; return what modprobe said, for people."""
    try:
        done = subprocess.run(["modprobe", FAMILY], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join(done.stderr.split()) or ("done" if done.returncode == 0 else f"status {done.returncode}")


def _sockets(fds: Sequence[int]) -> tuple[str, Any]:
    return "NBD_ATTR_SOCKETS", {"attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]}) for fd in fds]}
