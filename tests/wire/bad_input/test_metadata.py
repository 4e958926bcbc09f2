"""Bad input, rows M1 to M9 where the running daemons meet them: damaged datastores, and a damaged registry.

tests/unit/test_format.py and test_registry.py have the same rows for the codecs alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.lib.farm import Farm, serves
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


USED: dict[str, Damage] = {
    "m2 this version": lambda head: head,
    "m4 first copy": flip(100),
    "m4 second copy": flip(PAGE + 100),
}
DAMAGES = REFUSED | USED


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    """A datastore and a VVol for each damage, each with bytes of its own; the farm is down."""
    names = {f"d{number}": number for number in range(len(DAMAGES))}
    spec = {
        "datastores": {name: {"kind": "file", "path": f"{name}.img", "size": "16MiB"} for name in names},
        "profiles": {name: {"datastore": name} for name in names},
        "vms": {"vm1": {"vvols": {name: {"size": "4MiB", "profile": name} for name in names}}},
    }
    with Farm(spec) as farm:
        farm.start()
        for name, number in names.items():
            with farm.open(name) as nbd:
                nbd.write(0, pattern(number, 0, MiB))
        farm.stop()
        yield farm


def test_m1_m2_m3_m4_m8_m9_damaged_datastores_are_refused_alone_and_left_alone(farm: Farm) -> None:
    """Every damage at once: what cannot be trusted is not served and not touched, all the others are."""
    images = {damage: farm.folder / f"d{number}.img" for number, damage in enumerate(DAMAGES)}
    good = {damage: image.read_bytes() for damage, image in images.items()}
    for damage, image in images.items():
        image.write_bytes(DAMAGES[damage](good[damage][:HEAD]) + good[damage][HEAD:])
    before = {damage: image.read_bytes() for damage, image in images.items()}
    farm.begin()
    for number, damage in enumerate(DAMAGES):
        if damage in USED:
            with farm.open(f"d{number}", wait_s=40) as nbd:
                assert difference(pattern(number, 0, MiB), nbd.read(0, MiB)) == "", damage
    for number, damage in enumerate(DAMAGES):
        if damage in REFUSED:
            wait_until(f"the status names {damage}", lambda n=number: any(f"d{n}" in str(p) for p in problems(farm)))
            assert not serves(farm.socket(), f"d{number}"), damage
            assert images[damage].read_bytes() == before[damage], "nothing is guessed, nothing is repaired over"
    farm.stop()
    for damage, image in images.items():
        if damage in REFUSED:
            image.write_bytes(good[damage])
    farm.start()
    for number in range(len(DAMAGES)):
        with farm.open(f"d{number}") as nbd:
            assert difference(pattern(number, 0, MiB), nbd.read(0, MiB)) == ""
    farm.stop()


def problems(farm: Farm) -> list[dict[str, str]]:
    """What `status` complains about."""
    found: list[dict[str, str]] = farm.api("GET", "/v1/status")["problems"]
    return found


@pytest.mark.parametrize("damage", ["m8 all zero", "m9 random", "truncated"])
def test_m8_m9_a_damaged_registry_is_refused_and_left_alone(farm: Farm, damage: str) -> None:
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
