"""The data plane's failures as Python exceptions."""

from __future__ import annotations


class PlaneError(OSError):
    """A call into the data plane failed: `errno` and the C side's sentence (what, value, limit)."""
