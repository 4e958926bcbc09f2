"""Long runs of other programs, two at a time: while a test waits for its own, the next one's is under way already.

What a test sees is its own run's outcome, so nothing is judged less; a file of such tests takes half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

Key = TypeVar("Key")
Result = TypeVar("Result")
PROCESSORS = 2


@contextmanager
def in_pairs(
    request: pytest.FixtureRequest, parameter: str, work: Callable[[Key], Result]
) -> Iterator[dict[Key, Future[Result]]]:
    """`work` for each value that `parameter` takes in the tests of this file that were chosen, begun in their order."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    keys = dict.fromkeys(call.params[parameter] for call in calls if call and parameter in call.params)
    assert keys, f"no test of {request.path.name} has the parameter {parameter!r}"
    with ThreadPoolExecutor(PROCESSORS) as pool:
        try:
            yield {key: pool.submit(work, key) for key in keys}
        finally:
            pool.shutdown(cancel_futures=True)
