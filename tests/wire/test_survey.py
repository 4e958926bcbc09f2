"""What a rebuild of the registry reads of a datastore is the same, be it a file or an export of an NBD server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from nbdvvol.control.rebuild import Found
from nbdvvol.datastores import format as disk
from nbdvvol.model.farm import Farm
from nbdvvol.survey import survey
from tests.lib.peers import Peer, closed_peers, nbdkit
from tests.unit.test_rebuild import MIB, TWO, metadata, store_uuid

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(60)
SIZE = 64 * MIB
LEG = replace(metadata(TWO[0], TWO), slot=70)
"""Its entry is in the second page of the directory."""


def lay_down(file: Path, *, damage: tuple[int, ...] = ()) -> None:
    """Write a formatted datastore with one leg; `damage`: offsets of bytes to spoil."""
    header = disk.plan_header(store_uuid("a"), UUID(int=5), MIB, SIZE)
    assert LEG.label is not None and LEG.map is not None
    entry = disk.Entry(LEG.vvol, LEG.id, LEG.meta_offset, LEG.meta_length)
    layout = disk.region_layout(LEG.meta_length, LEG.label.size)
    pieces = {
        0: disk.encode_header(header),
        disk.PAGE: disk.encode_header(header),
        header.directory_offset + disk.PAGE: disk.encode_page({70: entry}, 1),
        LEG.meta_offset + layout.labels[LEG.label.sequence % 2]: disk.encode_label(LEG.label),
        LEG.meta_offset + layout.maps[LEG.map.version % 2]: disk.encode_map(LEG.map),
    }
    with file.open("r+b" if file.exists() else "w+b") as out:
        out.truncate(SIZE)
        for at, data in pieces.items():
            out.seek(at)
            out.write(data)
        for at in damage:
            out.seek(at)
            byte = out.read(1)
            out.seek(at)
            out.write(bytes([byte[0] ^ 1]))


async def looked(stores: dict[str, dict[str, str]]) -> dict[str, Found]:
    """What is found on each, by name."""
    farm = Farm.model_validate({"datastores": stores})
    return {found.name: found for found in await survey(farm)}


async def test_a_file_and_an_export_say_the_same(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(nbdkit(SIZE).start())
    for file in (tmp_path / "a.img", peers[0].file):
        lay_down(file)
    found = await looked(
        {"file": {"kind": "file", "path": str(tmp_path / "a.img")}, "far": {"kind": "nbd", "uri": peers[0].uri}}
    )
    for name in ("file", "far"):
        one = found[name]
        assert (one.found, one.size, one.legs, one.damaged_slots) == ("formatted", SIZE, (LEG,), ())
        assert one.header is not None and one.header.uuid == store_uuid("a")


async def test_whatever_cannot_be_read_is_told_as_it_is(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(nbdkit(SIZE))
    at = LEG.meta_offset + disk.PAGE
    for name, damage in (
        ("both headers", (100, disk.PAGE + 100)),
        ("one header", (100,)),
        ("entry", (2 * disk.PAGE + disk.PAGE + 6 * 64 + 3,)),
        ("label", (at + 20,)),
    ):
        lay_down(tmp_path / name, damage=damage)
    (tmp_path / "blank").write_bytes(bytes(MIB))
    (tmp_path / "other").write_bytes(b"some file system" * 4096)
    stores = {one.name.replace(" ", "-"): {"kind": "file", "path": str(one)} for one in tmp_path.iterdir()}
    stores |= {"gone": {"kind": "file", "path": str(tmp_path / "gone")}, "far": {"kind": "nbd", "uri": peers[0].uri}}
    found = await looked(stores)
    assert {name: one.found for name, one in found.items()} == {
        "both-headers": "damaged",
        "one-header": "formatted",
        "entry": "formatted",
        "label": "formatted",
        "blank": "blank",
        "other": "something else",
        "gone": "unreadable",
        "far": "unreadable",
    }
    assert all(found[name].error for name in ("both-headers", "gone", "far"))
    assert found["entry"].damaged_slots == (70,) and found["entry"].legs == ()
    (leg,) = found["label"].legs
    assert leg.label is None and leg.map == LEG.map and "no valid label" in leg.error
    assert found["one-header"].legs == (LEG,)
