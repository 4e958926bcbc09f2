"""Control's own NBD endpoint: lists and describes every VVol, and sends clients to the host that serves it.

It never carries data: GO, EXPORT_NAME and SET_META_CONTEXT are refused with a text that names host and URI.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from nbdvvol.control.registry import Registry, bindings, views
from nbdvvol.model.errors import Code, NvError
from nbdvvol.nbd.constants import Reply
from nbdvvol.nbd.provider import Facts, Listing, Opened, ReplyError, match_contexts
from nbdvvol.nbd.server import Limits, Server, Visit


class TargetProvider:
    """What control answers to an NBD client, by full name."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def list(self) -> Sequence[Listing]:
        """Every VVol there is."""
        facts = await self._registry.run(bindings.all_facts)
        return [Listing(f"{vm}/{name}", words) for vm, name, words, _, _ in facts]

    async def info(self, name: str) -> Facts:
        """What the VVol's host reported of it. Raises ReplyError while no host serves it."""
        for vm, short, words, host, report in await self._registry.run(bindings.all_facts):
            if name != f"{vm}/{short}":
                continue
            if report is None or report.error:
                why = report.error if report is not None else "no host serves it now"
                where = f" on host {host}" if host else ""
                raise ReplyError(Reply.ERR_POLICY, f"VVol {name}{where}: {why}")
            return Facts(
                name=name,
                size=report.size,
                flags=report.flags,
                description=words,
                block_min=report.block_min,
                block_preferred=report.block_preferred,
                block_max=report.block_max,
            )
        raise ReplyError(Reply.ERR_UNKNOWN, f"no VVol {name!r}; names here are VM/NAME")

    async def list_meta(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """Meta contexts of a VVol."""
        return match_contexts(queries, (await self.info(name)).contexts)

    async def open(self, name: str) -> Opened:
        """Always refused: data goes straight to the host's filter."""
        vm, _, short = name.partition("/")
        try:
            found = await self._registry.run(views.export_uri, vm, short)
        except NvError as error:
            if error.code is Code.NOT_FOUND:
                raise ReplyError(Reply.ERR_UNKNOWN, f"no VVol {name!r}; names here are VM/NAME") from None
            text = error.message + (f" ({error.hint})" if error.hint else "")
            raise ReplyError(Reply.ERR_POLICY, f"control carries no data; {text}") from None
        raise ReplyError(
            Reply.ERR_POLICY, f"control carries no data; VVol {name} is served by host {found.host} at {found.uri}"
        )


class Target:
    """The endpoint on a listening socket."""

    def __init__(self, registry: Registry) -> None:
        provider = TargetProvider(registry)
        self._server = Server(receive=lambda _: Visit(provider), limits=Limits())
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, listener: socket.socket) -> None:
        """Serve in the background; the listener is ours from here on."""
        self._listener = listener
        self._task = asyncio.create_task(self._server.serve(listener), name="target")

    async def stop(self) -> None:
        """End every conversation."""
        await self._server.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
