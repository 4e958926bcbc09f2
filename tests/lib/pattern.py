"""Bytes that tell where they belong: any wrong offset, seed or torn block shows."""

from __future__ import annotations

import random


def pattern(seed: int, offset: int, length: int) -> bytes:
    """The bytes [offset, offset+length) of an endless stream that the seed names.

    Every 8 KiB block of the stream is random and its own, so data at a wrong offset never matches."""
    block = 8192
    first, last = offset // block, (offset + length + block - 1) // block
    whole = b"".join(random.Random(f"{seed}:{number}").randbytes(block) for number in range(first, last))
    return whole[offset - first * block :][:length]


def difference(want: bytes, got: bytes) -> str:
    """Where two byte strings first differ, for a failure's text; empty when they are equal."""
    if want == got:
        return ""
    if len(want) != len(got):
        return f"lengths differ: {len(want)} wanted, {len(got)} got"
    at = next(i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b)
    count = sum(a != b for a, b in zip(want, got, strict=True))
    return f"first of {count} differences at {at}: wanted {want[at : at + 16].hex()}, got {got[at : at + 16].hex()}"
