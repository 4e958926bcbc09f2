"""The load generator's verified mix against the running daemon: many requests at once, every read checked.

It knows what each block holds, never has two requests in flight on one block, and reads everything back at the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import generators
from tests.lib.procs import run
from tests.lib.shared import SharedFarm

pytestmark = pytest.mark.timeout(120)
MIX = "read=45,write=40,trim=5,zero=5,flush=5"


@pytest.fixture(scope="module")
def loadgen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tools")
    generators.build(out)
    return out / "loadgen"


def load(loadgen: Path, where: list[str], *arguments: str) -> None:
    run([loadgen, *where, "--verify", "--mix", MIX, "--seconds", "0.5", *arguments], timeout_s=90)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--block", "4k", "--depth", "32"],
        ["--block", "512", "--depth", "200", "--connections", "2"],
        ["--block", "16k", "--depth", "8", "--connections", "6", "--structured", "--fua"],
        ["--block", "64k", "--depth", "8", "--connections", "2", "--structured"],
        ["--block", "1m", "--depth", "4"],
    ],
    ids=" ".join,
)
def test_no_read_is_ever_wrong(shared: SharedFarm, loadgen: Path, arguments: list[str]) -> None:
    load(loadgen, ["--unix", str(shared.socket()), "--export", "root"], *arguments)


def test_nor_with_a_cache_that_half_of_it_fits_into(shared: SharedFarm, loadgen: Path) -> None:
    where = ["--unix", str(shared.socket()), "--export", "cached"]
    load(loadgen, where, "--block", "2k", "--depth", "32", "--connections", "4", "--structured")


@pytest.mark.parametrize("name", ["hard", "indir"])
def test_nor_on_other_datastores(shared: SharedFarm, loadgen: Path, name: str) -> None:
    where = ["--unix", str(shared.socket()), "--export", name]
    load(loadgen, where, "--block", "4k", "--depth", "32", "--connections", "2")


def test_nor_over_tcp(shared: SharedFarm, loadgen: Path) -> None:
    where = ["--tcp", ":".join(map(str, shared.tcp)), "--export", "vm1/root"]
    load(loadgen, where, "--block", "8k", "--depth", "16", "--connections", "3", "--structured")
