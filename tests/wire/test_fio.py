"""fio's nbd engine (libnbd inside) with verification, against the running daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lib.fioload import BLOCK_BYTES, FioLoad
from tests.lib.peers import Peer, closed_peers, qemu_nbd
from tests.lib.procs import need, run, wait_until
from tests.lib.shared import SharedFarm

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(120)


def fio(folder: Path, uri: str, **options: str | int) -> list[dict[str, object]]:
    settings = {"ioengine": "nbd", "uri": uri, "thread": 1, "size": "8M", "randseed": 7, "verify_fatal": 1, **options}
    job = folder / "job.fio"
    lines = [f"{key}={value}" for key, value in settings.items()]
    job.write_text("\n".join(["[global]", *lines, "[job]", ""]))
    done = run([need("fio", "fio"), "--output-format=json", f"--aux-path={folder}", job], timeout_s=100)
    jobs: list[dict[str, object]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert all(job["error"] == 0 for job in jobs), jobs
    return jobs


@pytest.mark.parametrize("name", ["root", "hard", "indir"])
def test_random_writes_are_verified(shared: SharedFarm, tmp_path: Path, name: str) -> None:
    fio(tmp_path, shared.uri(name), rw="randwrite", bs="4k", iodepth=32, verify="crc32c", do_verify=1)


def test_mixed_sizes_with_flushes(shared: SharedFarm, tmp_path: Path) -> None:
    options = {"rw": "randrw", "bsrange": "512-128k", "bs_unaligned": 1, "iodepth": 16, "fsync": 32}
    fio(tmp_path, shared.uri("root"), verify="crc32c", **options)


def test_several_connections(shared: SharedFarm, tmp_path: Path) -> None:
    options = {"rw": "randwrite", "bs": "4k", "iodepth": 16, "numjobs": 4, "offset_increment": "8M", "verify": "crc32c"}
    jobs = fio(tmp_path, shared.uri("root"), **options)
    assert len(jobs) == 4


def test_trims(shared: SharedFarm, tmp_path: Path) -> None:
    fio(tmp_path, shared.uri("root"), rw="randtrimwrite", bs="64k", iodepth=8, size="4M")


def test_the_load_that_runs_beside_kills_sees_one_lost_write(peers: list[Peer], tmp_path: Path) -> None:
    """A block is as the run before has left it."""
    peers.append(qemu_nbd(1 << 20).start())
    assert isinstance(peers[0].address, Path)
    load = FioLoad(tmp_path, peers[0].address, "e", 0, 1 << 20, iops=5000)
    try:
        wait_until("it has written everything twice", lambda: load.runs > 1, 60)
        load.end()
        newest, older = (number.to_bytes(4, "big") for number in (load.runs, load.runs - 1))
        with peers[0].file.open("r+b") as file:
            file.seek(7 * BLOCK_BYTES)
            block = file.read(BLOCK_BYTES)
            assert block.count(newest) > 100
            file.seek(7 * BLOCK_BYTES)
            file.write(block.replace(newest, older))
        with pytest.raises(AssertionError):
            load.stop()
    finally:
        load.close()
