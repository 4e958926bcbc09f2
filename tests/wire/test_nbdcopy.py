"""nbdcopy (libnbd-bin), both ways: many requests in flight on several connections, compared byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import need, run
from tests.lib.shared import INDIR_SIZE, ROOT_SIZE, SharedFarm

pytestmark = pytest.mark.timeout(90)


def nbdcopy(*args: str | Path) -> None:
    run([need("nbdcopy", "libnbd-bin"), *args])


@pytest.mark.parametrize("name", ["root", "hard", "indir"])
@pytest.mark.parametrize("options", [["--connections=1"], ["--connections=4", "--requests=64"], ["--synchronous"]])
def test_file_to_vvol_and_back(shared: SharedFarm, tmp_path: Path, name: str, options: list[str]) -> None:
    size = {"root": ROOT_SIZE}.get(name, INDIR_SIZE)
    data = bytearray(pattern(len(options), 0, 4 * MiB) * (size // (4 * MiB)))
    data[5 * MiB : 9 * MiB] = bytes(4 * MiB)  # zeros become WRITE_ZEROES
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(data)
    nbdcopy(*options, source, shared.uri(name))
    nbdcopy(*options, shared.uri(name), back)
    assert difference(bytes(data), back.read_bytes()) == ""


def test_vvol_to_vvol(shared: SharedFarm, tmp_path: Path) -> None:
    data = pattern(4, 0, INDIR_SIZE)
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(data)
    nbdcopy("--flush", source, shared.uri("indir"))
    nbdcopy("--flush", shared.uri("indir"), shared.uri("hard"))
    nbdcopy(shared.uri("hard"), back)
    assert difference(data, back.read_bytes()) == ""


def test_over_tcp_and_to_nothing(shared: SharedFarm) -> None:
    host, port = shared.tcp
    nbdcopy(f"nbd://{host}:{port}/vm1/root", "null:")
