"""Ask an NBD server on a unix socket whether it knows an export, as a client would (INFO)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nbdvvol.model.errors import NvError
from nbdvvol.nbd.client import haggle

ANSWER_S = 5.0


async def answers(socket: Path, export: str) -> bool:
    """Whether the server on `socket` describes `export` within ANSWER_S seconds."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                await _ask(reader, writer, export)
                # The server answers our ABORT before it closes; leaving earlier would look like a failure to it.
                await reader.read()
            finally:
                writer.close()
    except (OSError, EOFError, NvError):
        return False
    return True


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, export: str) -> None:
    talk = haggle(export, enter=False)
    given = b""
    try:
        wanted = next(talk)
        while True:
            if isinstance(wanted, bytes):
                writer.write(wanted)
                given = b""
            elif isinstance(wanted, int):
                given = await reader.readexactly(wanted)
            wanted = talk.send(given)
    except StopIteration:
        return
