"""A formatted datastore is opened only if its header is the right one: paths may lead to other disks one day."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from nbdvvol.datastores import format as disk
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import DatastoreKind
from nbdvvol.model.link import DatastoreSpec
from tests.unit.fake_plane import FakePlane

MIB = 1 << 20
RIGHT = uuid.UUID(int=7)


def _spec(path: Path, identity: str = str(RIGHT)) -> DatastoreSpec:
    return DatastoreSpec(name="s", kind=DatastoreKind.FILE, path=str(path), uuid=identity)


def _write(path: Path, identity: uuid.UUID = RIGHT) -> None:
    header = disk.plan_header(identity, uuid.UUID(int=1), MIB, 8 * MIB)
    path.write_bytes((disk.encode_header(header) * 2).ljust(8 * MIB, b"\0"))


async def test_the_right_datastore_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "store"
    _write(path)
    plane = FakePlane()
    table = ObjectTable(plane, FaultBook(tmp_path))
    held = await table.acquire(_spec(path), "")
    assert held.number in plane.objects
    await table.release(held)
    table.shutdown()


@pytest.mark.parametrize("there", ["another", "zeros", "garbage"])
async def test_anything_else_is_refused_and_closed(tmp_path: Path, there: str) -> None:
    path = tmp_path / "store"
    _write(path, uuid.UUID(int=8))
    if there != "another":
        path.write_bytes((b"\0" if there == "zeros" else b"garbage!") * (MIB // 8) * 8)
    plane = FakePlane()
    table = ObjectTable(plane, FaultBook(tmp_path))
    with pytest.raises(NvError, match="another datastore" if there == "another" else "no nbdvvol datastore") as refused:
        await table.acquire(_spec(path), "")
    assert refused.value.code in (Code.CONFLICT, Code.INVALID)
    assert not plane.objects
    table.shutdown()


async def test_what_is_not_formatted_yet_has_no_name_to_check(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(bytes(MIB))
    plane = FakePlane()
    table = ObjectTable(plane, FaultBook(tmp_path))
    await table.release(await table.acquire(_spec(path, ""), ""))
    table.shutdown()
