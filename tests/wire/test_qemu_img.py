"""qemu-img against the running daemon: convert, compare, map, info, bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import need, run
from tests.lib.shared import INDIR_SIZE, ROOT_SIZE, SharedFarm

pytestmark = pytest.mark.timeout(90)


def qemu_img(*args: str | Path, check: bool = True):
    return run([need("qemu-img", "qemu-utils"), *args], check=check)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image as large as `indir` and `hard`, with a hole in it."""
    path = tmp_path / "image"
    data = bytearray(pattern(40, 0, INDIR_SIZE))
    data[3 * MiB : 6 * MiB] = bytes(3 * MiB)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["hard", "indir"])
def test_convert_there_and_back(shared: SharedFarm, image: Path, tmp_path: Path, name: str) -> None:
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", image, shared.uri(name))
    same = qemu_img("compare", "-f", "raw", "-F", "raw", image, shared.uri(name))
    assert "identical" in same.stdout
    back = tmp_path / "back.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", shared.uri(name), back)
    raw = tmp_path / "back.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", back, raw)
    assert difference(image.read_bytes(), raw.read_bytes()) == ""


def test_convert_out_of_order_with_many_coroutines(shared: SharedFarm, image: Path) -> None:
    qemu_img("convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", image, shared.uri("indir"))
    with shared.open("indir", "simple") as nbd:
        assert difference(image.read_bytes(), nbd.read(0, INDIR_SIZE)) == ""


def test_compare_finds_one_changed_byte(shared: SharedFarm, image: Path) -> None:
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", image, shared.uri("indir"))
    with shared.open("indir") as nbd:
        old = nbd.read(1_234_567, 1)
        nbd.write(1_234_567, bytes([old[0] ^ 1]))
    done = qemu_img("compare", "-f", "raw", "-F", "raw", image, shared.uri("indir"), check=False)
    assert done.returncode == 1 and "mismatch" in done.stdout


def test_map_shows_holes(shared: SharedFarm) -> None:
    with shared.open("root") as nbd:
        nbd.zero(20 * MiB, 4 * MiB)
        nbd.write(21 * MiB, b"m" * MiB)
    extents = json.loads(qemu_img("map", "--output=json", "-f", "raw", shared.uri("root")).stdout)
    assert sum(e["length"] for e in extents) == ROOT_SIZE
    at = {
        want: next(e for e in extents if e["start"] <= want < e["start"] + e["length"]) for want in (20 * MiB, 21 * MiB)
    }
    assert at[20 * MiB]["zero"] is True and at[20 * MiB]["data"] is False
    assert at[21 * MiB]["zero"] is False and at[21 * MiB]["data"] is True


def test_info_and_json_uri(shared: SharedFarm) -> None:
    described = {
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "server": {"type": "unix", "path": str(shared.socket())},
            "export": "root",
            "reconnect-delay": 5,
        },
    }
    info = json.loads(qemu_img("info", "--output=json", "json:" + json.dumps(described)).stdout)
    assert info["virtual-size"] == ROOT_SIZE


@pytest.mark.parametrize("write", [[], ["-w", "--pattern=90", "--flush-interval=32"]], ids=["read", "write"])
def test_bench(shared: SharedFarm, write: list[str]) -> None:
    qemu_img("bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "16", "-s", "4096", *write, shared.uri("root"))
    if write:
        with shared.open("root") as nbd:
            assert nbd.read(0, 2000 * 4096) == b"\x5a" * (2000 * 4096)


def test_a_whole_qcow2_lives_on_a_vvol(shared: SharedFarm, image: Path, tmp_path: Path) -> None:
    """qcow2 over raw NBD: its metadata writes, flushes and reads are those of a real guest disk."""
    qemu_img("create", "-q", "-f", "qcow2", shared.uri("root"), "16M")
    qemu_img("convert", "-n", "-f", "raw", "-O", "qcow2", image, shared.uri("root"))
    qemu_img("check", "-f", "qcow2", shared.uri("root"))
    same = qemu_img("compare", "-f", "raw", "-F", "qcow2", image, shared.uri("root"))
    assert "identical" in same.stdout
