"""docs/reliability.md has the on-disk formats by byte offset: what the code writes is exactly that."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from uuid import UUID

import google_crc32c
import pytest

from nbdvvol.datastores import format as disk
from tests.unit.filter_words import MIB
from tests.unit.mirror_rig import META, SIZE, UUID_OF, MirrorRig
from tests.unit.plane_rig import eventually

pytestmark = pytest.mark.timeout(60)
PAGE = (Path(__file__).resolve().parents[2] / "docs/reliability.md").read_text()
ROW = re.compile(r"^\| (\d+) \| (\d+) \| ([^,|]+)", re.MULTILINE)
STORE, REGISTRY, VVOL = (UUID(int=n) for n in (1 << 100, 2 << 100, 3 << 100))


def table(title: str) -> dict[str, tuple[int, int]]:
    """What the page says: by field, its offset and length."""
    section = PAGE[PAGE.index(f"### {title}") :].removeprefix("### ").split("\n#")[0]
    rows = {name.strip(): (int(at), int(length)) for at, length, name in ROW.findall(section)}
    assert len(rows) > 4, title
    return rows


def little(value: int, length: int) -> bytes:
    return value.to_bytes(length, "little")


def agrees(title: str, raw: bytes, fields: dict[str, bytes | int], *more: str) -> None:
    """Every field of the page is there, where it says; all bytes that it does not name are zeros."""
    rows = table(title)
    assert set(rows) == {*fields, *more}, "the page names each field, and no other"
    rest = bytearray(raw)
    for name, (at, length) in rows.items():
        if name in fields:
            value = fields[name]
            assert raw[at : at + length] == (little(value, length) if isinstance(value, int) else value), name
        rest[at : at + length] = bytes(length)
    assert not any(rest)


def crc(*pieces: bytes) -> int:
    return google_crc32c.value(b"".join(pieces))


def test_the_header() -> None:
    raw = disk.encode_header(disk.Header(STORE, REGISTRY, MIB, 64 * MIB, 8192, MIB - 8192, MIB, 7))
    fields: dict[str, bytes | int] = {
        "magic `NVDSTORE`": b"NVDSTORE",
        "version": 1,
        "flags": 0,
        "datastore UUID": STORE.bytes,
        "registry UUID": REGISTRY.bytes,
        "extent size": MIB,
        "size": 64 * MIB,
        "directory offset": 8192,
        "directory length": MIB - 8192,
        "data offset": MIB,
        "sequence": 7,
        "checksum": crc(raw[:4092]),
    }
    agrees("Datastore header", raw, fields)


def test_a_directory_entry() -> None:
    raw = disk.encode_page({1: disk.Entry(VVOL, 5, 3 * MIB, MIB)}, 0)[64:128]
    fields: dict[str, bytes | int] = {
        "VVol UUID": VVOL.bytes,
        "leg": 5,
        "in use": 1,
        "region offset": 3 * MIB,
        "region length": MIB,
        "checksum": crc(raw[:60]),
    }
    agrees("Directory entry", raw, fields)


def label_fields(raw: bytes, label: disk.Label) -> dict[str, bytes | int]:
    return {
        "magic `NVLABEL\\0`": b"NVLABEL\0",
        "version": 1,
        "leg": label.leg,
        "VVol UUID": label.vvol.bytes,
        "epoch": label.epoch,
        "generation": label.generation,
        "size": label.size,
        "sequence": label.sequence,
        "syncing": int(label.syncing),
        "checksum": crc(raw[:4092]),
    }


def test_a_label() -> None:
    label = disk.Label(VVOL, 3, 11, 12, 64 * MIB, 13, True)
    raw = disk.encode_label(label)
    agrees("Leg label", raw, label_fields(raw, label))


def test_a_map_copy() -> None:
    runs = (disk.MapRun(0, MIB, 5 * MIB), disk.MapRun(MIB, MIB, 9 * MIB, 2))
    raw = disk.encode_map(disk.MapCopy(VVOL, 3, 21, 2 * MIB, runs, b"words"))
    body = struct.pack("<QQQII", 0, MIB, 5 * MIB, 0, 0) + struct.pack("<QQQII", MIB, MIB, 9 * MIB, 2, 0)
    fields: dict[str, bytes | int] = {
        "magic `NVMAPCPY`": b"NVMAPCPY",
        "version": 1,
        "leg": 3,
        "VVol UUID": VVOL.bytes,
        "map version": 21,
        "size": 2 * MIB,
        "runs": 2,
        "words": 5,
        "checksum of the words": crc(b"words"),
        "checksum": crc(raw[:60], body),
        "run": body[:32],
    }
    agrees("Map copy", raw[:96], fields)
    assert raw[64:128] == body and raw[128:133] == b"words" and len(raw) == 4096


def test_what_a_mirror_writes(tmp_path: Path) -> None:
    """The label, an intent page and a dirty page, as the data plane has written them."""
    rig = MirrorRig(tmp_path, intent_idle_s=60.0)
    rig.serve()
    rig.client().write(9 * MIB, b"region 2" * 512)
    rig.files[1].unlink()  # it does not come back
    rig.fail(2)
    eventually("control knows", lambda: "stale 2" in rig.registry.asked and rig.lane(2) != "failing")
    rig.client().write(29 * MIB, b"region 7" * 512)
    raw = rig.files[0].read_bytes()[:META]
    label = disk.decode_label(raw[:8192])
    slot = raw[label.sequence % 2 * 4096 :][:4096]
    assert (label.vvol, label.leg, label.epoch, label.generation) == (UUID(UUID_OF), 1, 2, label.generation)
    agrees("Leg label", slot, label_fields(slot, label))
    half = disk.region_layout(META, SIZE).bitmap_bytes
    seen = [page_of(raw, at, magic) for at, magic in ((139264, b"NVINTENT"), (139264 + half, b"NVDIRTY\0"))]
    intents, dirty = (page[128:] for page in seen)
    assert intents[0] == 1 << 2 | 1 << 7 and not any(intents[1:])
    assert struct.unpack_from("<8I", seen[0], 64) == (0,) * 8 and struct.unpack_from("<8I", seen[1], 64)[:2] == (1, 2)
    assert set(dirty[:8]) <= {0, 2} and dirty[2] == 2 and not any(dirty[8:])
    rig.close()


def page_of(raw: bytes, at: int, magic: bytes) -> bytes:
    """The newest copy of the first page, after a look at every field of it."""
    copies = [page for slot in (0, 1) if (page := raw[at + slot * 4096 :][:4096])[:8] == magic]
    page = max(copies, key=lambda one: struct.unpack_from("<Q", one, 32)[0])
    sequence, epoch, generation = struct.unpack_from("<QQQ", page, 32)
    assert (epoch, generation >= 1) == (2, True)
    assert page == raw[at + sequence % 2 * 4096 :][:4096], "the slot is sequence mod 2"
    fields: dict[str, bytes | int] = {
        "magic `NVINTENT`": magic,
        "version": 1,
        "page": 0,
        "VVol UUID": UUID(UUID_OF).bytes,
        "sequence": sequence,
        "epoch": epoch,
        "generation": generation,
        "region shift": 22,
        "checksum": crc(page[:124], page[128:]),
    }
    agrees("Intent and dirty page", page, fields, "lanes", "bits: intent: one a region")
    return page
