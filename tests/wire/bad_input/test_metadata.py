"""Bad input, rows M1 to M9 where the running daemons meet them: damaged datastores, and a damaged registry.

tests/unit/test_format.py and test_registry.py have the same rows for the codecs alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lib.farm import Farm, plain_spec, serves
from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import wait_until

pytestmark = pytest.mark.timeout(120)
PAGE = 4096
HEAD = 2 * PAGE
Damage = Callable[[bytes], bytes]


def flip(at: int) -> Damage:
    """One bit of the header copy (or copies) at these pages is wrong."""
    return lambda head: head[:at] + bytes([head[at] ^ 1]) + head[at + 1 :]


def newer(head: bytes) -> bytes:
    """Both copies claim what no version of ours wrote: a version field far ahead, checksums that do not fit."""
    both = bytearray(head)
    for start in (0, PAGE):
        both[start + 8 : start + 12] = b"\xff\xff\xff\x7f"
    return bytes(both)


REFUSED: dict[str, Damage] = {
    "m1 bad magic": lambda head: b"NOTOURS!" + head[8:PAGE] + b"NOTOURS!" + head[PAGE + 8 :],
    "m3 newer version": newer,
    "m4 both copies": lambda head: flip(100)(flip(PAGE + 100)(head)),
    "m8 all zero": lambda head: bytes(len(head)),
    "m9 random": lambda head: random.Random(9).randbytes(len(head)),
}


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    """Two datastores; the tests damage `main` while the farm is down."""
    spec = plain_spec()
    spec["datastores"]["other"] = {"kind": "file", "path": "other.img", "size": "32MiB"}
    spec["profiles"]["other"] = {"datastore": "other"}
    spec["vms"]["vm2"] = {"vvols": {"safe": {"size": "4MiB", "profile": "other"}}}
    with Farm(spec) as farm:
        farm.start()
        with farm.open("root") as nbd:
            nbd.write(0, pattern(1, 0, MiB))
        farm.stop()
        yield farm


def image(farm: Farm) -> Path:
    return farm.folder / "main.img"


def put_head(farm: Farm, head: bytes) -> None:
    with image(farm).open("r+b") as file:
        file.write(head)


@pytest.fixture
def head(farm: Farm) -> Iterator[bytes]:
    """The datastore's good header; put back afterwards, and then everything is there again."""
    with image(farm).open("rb") as file:
        good = file.read(HEAD)
    yield good
    farm.stop()
    put_head(farm, good)


@pytest.mark.parametrize("damage", list(REFUSED))
def test_m1_m3_m4_m8_m9_a_damaged_datastore_is_refused_and_left_alone(farm: Farm, head: bytes, damage: str) -> None:
    put_head(farm, REFUSED[damage](head))
    before = image(farm).read_bytes()
    farm.begin()
    wait_until("the other datastore is served", lambda: serves(farm.socket("vm2"), "safe"), 40)
    wait_until("the status names the datastore", lambda: any("main" in str(p) for p in problems(farm)), 20)
    assert not serves(farm.socket("vm1"), "root")
    assert image(farm).read_bytes() == before, "nothing is guessed, nothing is repaired over"


def problems(farm: Farm) -> list[dict[str, str]]:
    """What `status` complains about."""
    found: list[dict[str, str]] = farm.api("GET", "/v1/status")["problems"]
    return found


@pytest.mark.parametrize("copy", [0, 1])
def test_m4_the_other_header_copy_is_used(farm: Farm, head: bytes, copy: int) -> None:
    put_head(farm, flip(copy * PAGE + 100)(head))
    farm.start()
    with farm.open("root") as nbd:
        assert difference(pattern(1, 0, MiB), nbd.read(0, MiB)) == ""


def test_m2_what_this_version_wrote_is_opened(farm: Farm, head: bytes) -> None:
    assert any(head)
    farm.start()
    with farm.open("root") as nbd:
        assert difference(pattern(1, 0, MiB), nbd.read(0, MiB)) == ""


@pytest.mark.parametrize("damage", ["m8 all zero", "m9 random", "truncated"])
def test_m8_m9_a_damaged_registry_is_refused_and_left_alone(farm: Farm, head: bytes, damage: str) -> None:
    database = next(path for path in farm.state.glob("*") if path.read_bytes()[:6] == b"SQLite")
    kept = {path: path.read_bytes() for path in farm.state.glob(f"{database.name}*")}
    size = len(kept[database])
    bad = {
        "m8 all zero": bytes(size),
        "m9 random": random.Random(8).randbytes(size),
        "truncated": kept[database][: size // 2 + 17],
    }[damage]
    try:
        for path in kept:
            path.unlink()
        database.write_bytes(bad)
        up = farm.begin()
        wait_until("up gives up", lambda: not up.alive(), 40)
        assert up.popen.returncode == 1
        assert database.name in up.text() or "registry" in up.text(), up.text()
        assert "Traceback" not in up.text(), up.text()
        assert database.read_bytes() == bad, "a registry that is not understood is never overwritten"
    finally:
        farm.kill_everything()
        for path in farm.state.glob(f"{database.name}*"):
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
