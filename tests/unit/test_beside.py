"""How the suite's files are dealt out to two workers: from both ends of one queue, each file once."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

from tests.lib.beside import ORDER, TwoEnds, place

ROOT = Path(__file__).parents[2]


class Node:
    """What a scheduler sees of a worker."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.asked: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.asked += indices


def test_every_file_of_the_suite_has_a_place() -> None:
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(files) > 100
    assert {place(file)[0] for file in files} == set(range(len(ORDER)))


def test_two_workers_take_from_both_ends_until_they_meet() -> None:
    files = ["tests/e2e/test_a.py", "tests/sim/test_s.py", "tests/unit/test_u.py", "tests/unit/test_sanitizers.py"]
    files += ["tests/vm/test_v.py", "tests/wire/test_w.py"]
    waits, computes = Node("gw0"), Node("gw1")
    dealer = TwoEnds.__new__(TwoEnds)
    dealer.workqueue = OrderedDict((file, {f"{file}::test": False}) for file in files)
    dealer.assigned_work = {}
    dealer.registered_collections = {node: [f"{file}::test" for file in files] for node in (waits, computes)}
    while dealer.workqueue:
        for node in (waits, computes):
            dealer._assign_work_unit(node)
    assert [files[number].split("/")[1] for number in waits.asked] == ["vm", "e2e", "wire"]
    assert [files[number].split("_")[1] for number in computes.asked] == ["u.py", "sanitizers.py", "s.py"]
