"""The whole suite in two workers: what mostly waits in one, what mostly computes in the other.

`make test` asks pytest-xdist for two workers (`-n 2 --dist loadfile`). Each is given whole files, so that the tests of
a file share their fixtures as they do alone. The files are a queue with two ends: even workers take from its beginning
(guests and farms: kills, restarts, deadlines), odd ones from its end (unit tests, sanitizers, simulators), until they
meet. So both processors have work all the time; two farms are beside each other at the very end only.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ORDER = (
    "tests/vm/",
    "tests/e2e/",
    "tests/wire/",
    "tests/fuzz/",
    "tests/sim/",
    "tests/unit/test_sanitizers.py",
    "tests/unit/",
)
"""What the files' names begin with, from one end of the queue to the other; the first that fits counts."""


def place(file: str) -> tuple[int, str]:
    """Where a test file is in the queue."""
    return next((number for number, head in enumerate(ORDER) if file.startswith(head)), len(ORDER)), file


class TwoEnds(LoadFileScheduling):
    """See the module."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        end = max if int(node.gateway.id.removeprefix("gw")) % 2 else min
        self.workqueue.move_to_end(end(self.workqueue, key=place), last=False)
        super()._assign_work_unit(node)
