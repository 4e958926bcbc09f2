"""Remote exports in the rig: objects behind fake servers, and volumes over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from nbdvvol.dataplane.remote import PlaneLink
from nbdvvol.dataplane.types import LinkEnd, LinkParams, RemoteConfig, RemoteStats, Run
from tests.lib.fakeserver import CONTEXT, FakeServer
from tests.unit.plane_rig import Rig, eventually


def at_rest(look: Callable[[], RemoteStats]) -> RemoteStats:
    """The counters of one moment at which nothing waited for an answer: links ask for signs of life when they like."""
    found: list[RemoteStats] = []

    def rests() -> bool:
        found.append(look())
        return found[-1].in_flight == found[-1].waiting == 0

    eventually("nothing waits", rests, 20)
    return found[-1]


class Remote:
    """One remote export in a rig."""

    def __init__(self, rig: Rig, server: FakeServer, *, links: int = 1, **config: object) -> None:
        self.rig = rig
        self.server = server
        wish = RemoteConfig(server.size, align=server.block, **config)  # type: ignore[arg-type]
        self.object = rig.call(rig.plane.open_remote, wish)
        self.ends: list[Future[LinkEnd]] = []
        self.links: list[PlaneLink] = []
        self.failed: list[tuple[int, int]] = []
        rig.plane.on_sync_failed = lambda obj, error: self.failed.append((obj, error))
        for _ in range(links):
            self.link()

    def link(self) -> Future[LinkEnd]:
        """One more link."""
        server = self.server
        params = LinkParams(
            structured=server.style != "simple",
            extended=server.style == "extended",
            tflags=server.tflags,
            payload_max=server.payload_max,
            allocation=None if server.style == "simple" else CONTEXT,
            size=server.size,
            align=server.block,
        )
        with server.connect() as sock:
            link = self.rig.call(self.rig.plane.open_link, self.object, sock.fileno(), params)

        async def end() -> LinkEnd:
            return await asyncio.shield(link.ended)

        self.links.append(link)
        self.ends.append(self.rig.start(end()))
        return self.ends[-1]

    def volume(self, size: int | None = None, **extra: object) -> int:
        """A volume that is the whole export."""
        runs = [Run(0, size or self.server.size, self.object, 0)]
        return self.rig.volume(size or self.server.size, runs, block_min=self.server.block, **extra)

    @property
    def stats(self) -> RemoteStats:
        """The counters now."""
        return self.rig.call(self.rig.plane.remote_stats, self.object)
