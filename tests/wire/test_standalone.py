"""`nbdvvol filter --serve PATH` without control: on stdin and stdout, and by LISTEN_FDS, both started by libnbd."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.lib.libnbd import libnbd
from tests.lib.nbdwords import MiB
from tests.lib.pattern import pattern
from tests.lib.procs import run

pytestmark = pytest.mark.timeout(60)
SIZE = 4 * MiB + 512

SCRIPT = """
h = nbd.NBD()
h.add_meta_context("base:allocation")
if P.get("name"):
    h.set_export_name(P["name"])
if P["activation"]:
    h.connect_systemd_socket_activation(P["argv"])
else:
    h.connect_command(P["argv"])
size = h.get_size()
first = h.pread(1000, 5)
if not h.is_read_only():
    data = random.Random(1).randbytes(2 * MiB + 3)
    h.pwrite(data, 100)
    h.flush()
    assert h.pread(len(data), 100) == data
    h.zero(4096, 4096)
    assert h.pread(4096, 4096) == bytes(4096)
extents = []
h.block_status(MiB, 0, lambda name, offset, e, err: extents.extend(e) or 0)
h.shutdown()
result = {"size": size, "first": first.hex()}
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(pattern(80, 0, SIZE))
    return path


def argv(image: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "nbdvvol", "filter", "--serve", str(image), *more]


def test_stdio(image: Path) -> None:
    got = libnbd(SCRIPT, argv=argv(image, "--stdio"), activation=False)
    assert got["size"] == SIZE and bytes.fromhex(got["first"]) == pattern(80, 5, 1000)
    written = image.read_bytes()
    assert len(written) == SIZE and written[:100] == pattern(80, 0, 100) and written[4096:8192] == bytes(4096)
    assert written[3 * MiB :] == pattern(80, 3 * MiB, MiB + 512)


def test_stdio_read_only_and_named(image: Path) -> None:
    more = ("--stdio", "--read-only", "--export", "disk")
    got = libnbd(SCRIPT, argv=argv(image, *more), activation=False, name="disk")
    assert got["size"] == SIZE
    assert image.read_bytes() == pattern(80, 0, SIZE)


def test_socket_activation(image: Path) -> None:
    got = libnbd(SCRIPT, argv=argv(image), activation=True)
    assert got["size"] == SIZE
    assert image.read_bytes()[4096:8192] == bytes(4096)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    failed = run(argv(tmp_path / "nothing", "--stdio"), check=False)
    assert failed.returncode == 1
    assert "nothing" in failed.stderr and "Traceback" not in failed.stderr
