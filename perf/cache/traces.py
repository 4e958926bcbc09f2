"""Traces of block numbers, generated and seeded: the same on every machine and every run."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate


def zipf(rng: random.Random, blocks: int, requests: int, skew: float) -> Iterator[int]:
    """Popular blocks, scattered over the volume: the block of rank r is asked for in proportion to 1 / r ** skew."""
    shares = list(accumulate(1 / rank**skew for rank in range(1, blocks + 1)))
    place = list(range(blocks))
    rng.shuffle(place)
    for _ in range(requests):
        yield place[bisect_left(shares, rng.random() * shares[-1])]


def scans(rng: random.Random, blocks: int, requests: int) -> Iterator[int]:
    """A popular set, and now and then somebody reads a quarter of the volume in one go: a backup, a virus scan."""
    popular = zipf(rng, blocks // 4, requests, 1.0)
    made = 0
    while made < requests:
        for _ in range(min(blocks // 2, requests - made)):
            yield next(popular)
            made += 1
        start = blocks // 4 + rng.randrange(blocks // 2)
        for block in range(start, min(start + blocks // 4, start + requests - made)):
            yield block
            made += 1


def loop(blocks: int, requests: int) -> Iterator[int]:
    """The same blocks in the same order, again and again: what LRU is worst at."""
    for at in range(requests):
        yield at % blocks


def bursts(rng: random.Random, blocks: int, requests: int) -> Iterator[int]:
    """Popular objects of four blocks, each touched several times within a moment, as guests touch their metadata."""
    made = 0
    for place in zipf(rng, blocks // 4, requests, 0.8):
        touches = [4 * place + rng.randrange(4) for _ in range(1 + rng.randrange(6))]
        yield from touches[: requests - made]
        made += len(touches)
        if made >= requests:
            return


def moving(rng: random.Random, blocks: int, requests: int) -> Iterator[int]:
    """A popular set that is another one after each quarter: what was good must be let go."""
    quarter = requests // 4
    for part in range(4):
        for block in zipf(rng, blocks // 2, quarter, 0.9):
            yield (block + part * blocks // 4) % blocks


def all_traces(blocks: int, requests: int) -> dict[str, array[int]]:
    """By name; 64-bit block numbers."""
    makers: dict[str, Callable[[random.Random], Iterator[int]]] = {
        "zipf 0.7": lambda rng: zipf(rng, blocks, requests, 0.7),
        "zipf 1.0": lambda rng: zipf(rng, blocks, requests, 1.0),
        "zipf with scans": lambda rng: scans(rng, blocks, requests),
        "loop": lambda rng: loop(blocks // 4, requests),
        "bursts": lambda rng: bursts(rng, blocks, requests),
        "moving": lambda rng: moving(rng, blocks, requests),
    }
    return {name: array("Q", make(random.Random(name))) for name, make in makers.items()}
