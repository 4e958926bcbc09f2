"""Work orders: what control wants done to a datastore that this host sees (model/link.py, `Work`).

Bytes go through the data plane in the object's own I/O mode, so that one object is never used buffered and
direct at once. An order is known by its id: while it runs, a repetition is ignored; once done, its answer is
repeated. Every order is safe to do twice, because a filter that was killed does not remember.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol

import structlog
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from nbdvvol.dataplane.mirror import Verified
from nbdvvol.dataplane.types import DataPlane
from nbdvvol.filter.objects import HeldObject, ObjectTable
from nbdvvol.model.base import Model
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec, Work, WorkDone, WorkProgress
from nbdvvol.model.mirror import VerifyResult

_log = structlog.get_logger("work")
HEADER_BYTES = 8192
BLANK_BYTES = 1 << 20
"""A device counts as blank when this much at both ends is zero: file systems, partition tables, RAID labels."""
META_BYTES_MAX = 1 << 20
SCRUB_PIECE_BYTES = 64 << 20
_REMEMBERED = 1000

Send = Callable[[BaseModel], None]


def _from_hex(value: Any) -> bytes:
    return bytes.fromhex(value) if isinstance(value, str) else value


HexBytes = Annotated[bytes, BeforeValidator(_from_hex), Field(max_length=META_BYTES_MAX)]


class _Args(Model):
    store: DatastoreSpec
    object: str = ""


class _Probe(_Args):
    create_size: int = Field(default=0, ge=0)


class _WriteMeta(_Args):
    offset: int = Field(ge=0)
    data: HexBytes


class _ReadMeta(_Args):
    offset: int = Field(ge=0)
    length: int = Field(ge=0, le=META_BYTES_MAX)


class _Scrub(_Args):
    ranges: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]]]


class _LogRemove(Model):
    vvol: str
    file: str


class _Verify(Model):
    vvol: str
    epoch: int
    repair: bool


class _Sized(_Args):
    size: int = Field(gt=0)


Result = dict[str, Any]
Handler = Callable[[int, Any], Awaitable[Result]]
ForgetLog = Callable[[str, str], Awaitable[None]]
"""Of a VVol that is deleted: every note of its write-back logs, and then this file. Raises NvError, OSError."""


class Verify(Protocol):
    """Compares the legs of a mirror that runs here."""

    def __call__(self, uuid: str, epoch: int, *, repair: bool) -> Awaitable[Verified]:
        """Raises NvError, OSError."""


class WorkShop:
    """Does work orders, each in a task of its own."""

    def __init__(
        self, plane: DataPlane, objects: ObjectTable, send: Send, verify: Verify, forget_log: ForgetLog
    ) -> None:
        self._verify_legs = verify
        self._forget_log = forget_log
        self._plane = plane
        self._objects = objects
        self._send = send
        self._running: dict[int, asyncio.Task[None]] = {}
        self._done: OrderedDict[int, WorkDone] = OrderedDict()
        self._farm = ""
        self._kinds: dict[str, tuple[type[Model], Handler]] = {
            "probe": (_Probe, self._probe),
            "write_meta": (_WriteMeta, self._write_meta),
            "read_meta": (_ReadMeta, self._read_meta),
            "scrub": (_Scrub, self._scrub),
            "file_create": (_Sized, self._file_create),
            "file_grow": (_Sized, self._file_grow),
            "file_remove": (_Args, self._file_remove),
            "file_stat": (_Args, self._file_stat),
            "dir_list": (_Args, self._dir_list),
            "log_remove": (_LogRemove, self._log_remove),
            "verify": (_Verify, self._verify),
        }

    def order(self, farm: str, work: Work) -> None:
        """Take an order of the control with this identity."""
        if farm != self._farm:
            self._farm = farm
            self._done.clear()
        if work.id in self._done:
            self._send(self._done[work.id])
        elif work.id not in self._running:
            task = asyncio.get_running_loop().create_task(self._do(work))
            self._running[work.id] = task
            task.add_done_callback(lambda _: self._running.pop(work.id, None))

    async def stop(self) -> None:
        """Give up what runs; control orders it again from the next filter."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _do(self, work: Work) -> None:
        done = await self._outcome(work)
        if done.error:
            _log.warning("work order failed", id=work.id, what=work.what, error=done.error)
        self._done[work.id] = done
        while len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        self._send(done)

    async def _outcome(self, work: Work) -> WorkDone:
        model, handler = self._kinds[work.what]
        try:
            args = model.model_validate(work.args)
            return WorkDone(id=work.id, result=await handler(work.id, args))
        except NvError as error:
            text = f"{error.message} ({error.hint})" if error.hint else error.message
            return WorkDone(id=work.id, error=text, code=error.code.value)
        except (ValidationError, ValueError) as error:
            return WorkDone(id=work.id, error=f"{work.what}: {error}", code=Code.INVALID.value)
        except OSError as error:
            return WorkDone(id=work.id, error=f"{work.what}: {error}", code=Code.IO.value)
        except Exception as error:
            _log.exception("a work order failed in an unexpected way", id=work.id, what=work.what)
            return WorkDone(id=work.id, error=f"{work.what}: {error!r}", code=Code.INTERNAL.value)

    # ---- whole objects, through the data plane ----

    async def _with_object(
        self, args: _Args, act: Callable[[HeldObject], Awaitable[Result]], *, may_read_only: bool = False
    ) -> Result:
        held = await self._objects.acquire(args.store, args.object, may_read_only=may_read_only)
        try:
            await self._objects.refresh(args.store, held)
            return await act(held)
        finally:
            await self._objects.release(held)

    async def _probe(self, _: int, args: _Probe) -> Result:
        await self._objects.blocking(args.store, lambda store: store.prepare(args.create_size))
        if args.store.kind == "dir" and not args.object:
            direct = await self._objects.blocking(args.store, lambda store: store.direct_works())
            return {"size": 0, "block_size": 1, "header": "", "blank": True, "direct_ok": direct}

        async def look(held: HeldObject) -> Result:
            size = held.spec.size
            # A look in the other mode must not disturb an object in use, so the mode it is open in answers.
            direct = held.spec.direct or await self._objects.blocking(args.store, lambda store: store.direct_works())
            header = await self._read(held, 0, min(HEADER_BYTES, size))
            ends = await self._read(held, 0, min(BLANK_BYTES, size)), await self._read_end(held)
            blank = not any(end.strip(b"\0") for end in ends)
            return {
                "size": size,
                "block_size": held.spec.align,
                "header": header.hex(),
                "blank": blank,
                "direct_ok": direct,
                "fences": held.remote is not None and held.remote.fences,
            }

        return await self._with_object(args, look, may_read_only=True)

    async def _read_end(self, held: HeldObject) -> bytes:
        size = held.spec.size
        length = min(BLANK_BYTES, size)
        return await self._read(held, size - length, length)

    async def _read(self, held: HeldObject, offset: int, length: int) -> bytes:
        """Read any range: widened to the object's alignment, cut again."""
        align = held.spec.align
        start = offset - offset % align
        end = min(-(-(offset + length) // align) * align, held.spec.size)
        data = bytearray()
        while start + len(data) < end:
            at = start + len(data)
            data += await self._plane.read(held.number, at, min(META_BYTES_MAX, end - at))
        return bytes(data[offset - start : offset - start + length])

    async def _write_meta(self, _: int, args: _WriteMeta) -> Result:
        async def write(held: HeldObject) -> Result:
            _check_range(held, args.offset, len(args.data))
            await self._plane.write(held.number, args.offset, args.data, sync=True)
            return {}

        return await self._with_object(args, write)

    async def _read_meta(self, _: int, args: _ReadMeta) -> Result:
        async def read(held: HeldObject) -> Result:
            _check_range(held, args.offset, args.length)
            return {"data": (await self._read(held, args.offset, args.length)).hex()}

        return await self._with_object(args, read, may_read_only=True)

    async def _scrub(self, number: int, args: _Scrub) -> Result:
        async def scrub(held: HeldObject) -> Result:
            total = sum(length for _, length in args.ranges)
            done = 0
            for offset, length in args.ranges:
                _check_range(held, offset, length)
            for offset, length in args.ranges:
                for at in range(offset, offset + length, SCRUB_PIECE_BYTES):
                    piece = min(SCRUB_PIECE_BYTES, offset + length - at)
                    await self._plane.zero(held.number, at, piece)
                    done += piece
                    self._send(WorkProgress(id=number, progress=done / total))
            await self._plane.sync(held.number)
            return {}

        return await self._with_object(args, scrub)

    # ---- files of a directory ----

    async def _file_create(self, _: int, args: _Sized) -> Result:
        await self._objects.blocking(args.store, lambda store: store.create(args.object, args.size))
        return {}

    async def _file_grow(self, _: int, args: _Sized) -> Result:
        await self._objects.blocking(args.store, lambda store: store.grow(args.object, args.size))
        return await self._file_stat(0, args)

    async def _file_remove(self, _: int, args: _Args) -> Result:
        await self._objects.blocking(args.store, lambda store: store.remove(args.object))
        return {}

    async def _file_stat(self, _: int, args: _Args) -> Result:
        return {"size": await self._objects.blocking(args.store, lambda store: store.size(args.object))}

    async def _dir_list(self, _: int, args: _Args) -> Result:
        found = await self._objects.blocking(args.store, lambda store: store.list())
        return {"files": [{"name": name, "size": size} for name, size in found]}

    # ---- logs and mirrors ----

    async def _log_remove(self, _: int, args: _LogRemove) -> Result:
        await self._forget_log(args.vvol, args.file)
        return {}

    async def _verify(self, _: int, args: _Verify) -> Result:
        found = await self._verify_legs(args.vvol, args.epoch, repair=args.repair)
        result = VerifyResult(compared_bytes=found.compared_bytes, differed=found.differed, repaired=found.repaired)
        return result.model_dump()


def _check_range(held: HeldObject, offset: int, length: int) -> None:
    if offset + length > held.spec.size:
        raise NvError(
            Code.INVALID, f"{held.spec.path} has {held.spec.size} bytes; [{offset}, {offset + length}) is beyond it"
        )
