"""One exception for people: a stable code, what was wrong with its value and limit, and what to do next."""

from __future__ import annotations

import enum

from nbdvvol.model.base import Model


class Code(enum.StrEnum):
    """Stable error codes, for scripts. A code's meaning never changes."""

    USAGE = "USAGE"
    CONFIG = "CONFIG"
    NOT_FOUND = "NOT_FOUND"
    EXISTS = "EXISTS"
    CONFLICT = "CONFLICT"
    BUSY = "BUSY"
    NO_SPACE = "NO_SPACE"
    TOO_LARGE = "TOO_LARGE"
    INVALID = "INVALID"
    UNSUPPORTED = "UNSUPPORTED"
    DENIED = "DENIED"
    STALE = "STALE"
    UNAVAILABLE = "UNAVAILABLE"
    TIMEOUT = "TIMEOUT"
    IO = "IO"
    NO_KERNEL_NBD = "NO_KERNEL_NBD"
    NOT_RUNNING = "NOT_RUNNING"
    INTERNAL = "INTERNAL"


HTTP_STATUS: dict[Code, int] = {
    Code.USAGE: 400,
    Code.CONFIG: 400,
    Code.INVALID: 400,
    Code.UNSUPPORTED: 400,
    Code.DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.EXISTS: 409,
    Code.CONFLICT: 409,
    Code.BUSY: 409,
    Code.STALE: 409,
    Code.TOO_LARGE: 413,
    Code.NO_SPACE: 507,
    Code.UNAVAILABLE: 503,
    Code.TIMEOUT: 504,
}
"""HTTP status of each code; codes not listed are 500."""


class ErrorBody(Model):
    """An error as the API sends it (the body of every non-2xx answer, under the key `error`)."""

    code: Code
    message: str
    hint: str = ""


class NvError(Exception):
    """An expected failure. `message` says what, value and limit; `hint` says what to do next."""

    def __init__(self, code: Code, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.hint})" if self.hint else "")

    def body(self) -> ErrorBody:
        """The API's form of this error."""
        return ErrorBody(code=self.code, message=self.message, hint=self.hint)
