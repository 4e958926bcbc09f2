"""Two network namespaces with a cable between them that can be cut. Needs root."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from pyroute2 import NetNS, netns

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Cable:
    """Namespaces `near` (address .1) and `far` (address .2), joined by a veth pair."""

    near: str
    far: str
    network: str

    def enter(self, name: str) -> list[str]:
        """Begin a command line with this to run it in a namespace."""
        return ["ip", "netns", "exec", name]

    @property
    def far_address(self) -> str:
        """Of the far end."""
        return f"{self.network}.2"

    def cut(self, yes: bool) -> None:
        """Take the far end down, or up: nothing passes, nobody is told."""
        with NetNS(self.far) as space:
            space.link("set", index=space.link_lookup(ifname="far0")[0], state="down" if yes else "up")


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Make both namespaces and the cable, and remove them; whatever runs in them has ended before."""
    number = next(_numbers)
    one = Cable(
        f"nvt{os.getpid()}a{number}", f"nvt{os.getpid()}b{number}", f"10.{os.getpid() % 200 + 20}.{number % 250}"
    )
    made = []
    try:
        for name in (one.near, one.far):
            netns.create(name)
            made.append(name)
        with NetNS(one.near) as near, NetNS(one.far) as far:
            near.link("add", ifname="near0", kind="veth", peer={"ifname": "far0", "net_ns_fd": one.far})
            for space, device, address in ((near, "near0", f"{one.network}.1"), (far, "far0", one.far_address)):
                for name in ("lo", device):
                    space.link("set", index=space.link_lookup(ifname=name)[0], state="up")
                space.addr("add", index=space.link_lookup(ifname=device)[0], address=address, prefixlen=24)
        yield one
    finally:
        for name in made:
            netns.remove(name)
