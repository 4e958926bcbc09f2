"""Network namespaces joined by cables that can be cut, one by one. Needs root.

Each namespace sees nothing but its own loopback and its cables' ends, so the addresses are the same in every run."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyroute2 import NetNS, netns

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Cable:
    """A pair of interfaces, one in each of two namespaces."""

    near: str
    far: str
    device: str
    near_address: str
    far_address: str

    def cut(self, yes: bool) -> None:
        """Take the far end down, or up: nothing passes, nobody is told."""
        with NetNS(self.far) as space:
            space.link("set", index=space.link_lookup(ifname=self.device)[0], state="down" if yes else "up")


@dataclass(slots=True)
class Net:
    """Namespaces by name, and the cables between them."""

    spaces: dict[str, str]
    cables: dict[tuple[str, str], Cable] = field(default_factory=dict)

    def enter(self, name: str) -> list[str]:
        """Begin a command line with this to run it in a namespace."""
        return ["ip", "netns", "exec", self.spaces[name]]

    def cable(self, near: str, far: str) -> Cable:
        """The cable between two."""
        return self.cables[near, far]

    def lay(self, near: str, far: str) -> None:
        """Join two namespaces: `near` is 10.77.N.1, `far` 10.77.N.2."""
        number = len(self.cables) + 1
        device, network = f"cable{number}", f"10.77.{number}"
        one = Cable(self.spaces[near], self.spaces[far], device, f"{network}.1", f"{network}.2")
        with NetNS(one.near) as here, NetNS(one.far) as there:
            here.link("add", ifname=device, kind="veth", peer={"ifname": device, "net_ns_fd": one.far})
            for space, address in ((here, one.near_address), (there, one.far_address)):
                index = space.link_lookup(ifname=device)[0]
                space.link("set", index=index, state="up")
                space.addr("add", index=index, address=address, prefixlen=24)
        self.cables[near, far] = one


@contextlib.contextmanager
def net(*names: str) -> Iterator[Net]:
    """Make namespaces, with a cable between any two; remove them; whatever runs in them has ended before."""
    number = next(_numbers)
    made = Net({name: f"nvt{os.getpid()}n{number}{name}" for name in names})
    there = []
    try:
        for space in made.spaces.values():
            netns.create(space)
            there.append(space)
            with NetNS(space) as inside:
                inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")
        for near, far in itertools.combinations(names, 2):
            made.lay(near, far)
        yield made
    finally:
        for space in there:
            netns.remove(space)
