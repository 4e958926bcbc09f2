"""fio's nbd engine (libnbd inside) with verification, against the running daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lib.procs import need, run
from tests.lib.shared import SharedFarm

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
