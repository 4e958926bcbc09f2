"""A small file that is replaced as a whole: after a crash it is the old one or the new one. All functions block."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from nbdvvol.model.base import Model
from nbdvvol.model.errors import Code, NvError

Whole = TypeVar("Whole", bound=Model)


def load_file(path: Path, kind: type[Whole], says: str, hint: str) -> Whole | None:
    """What was written there last; None: nothing. Raises NvError(INVALID) when that is damaged: what it should say, and
    what to do."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise NvError(Code.INVALID, f"{path} should say {says}, but cannot be read: {error}", hint) from error


def replace_file(path: Path, text: str) -> None:
    """Durable on return. "" removes it. Raises OSError; the old one may be there then, or the new one."""
    if text:
        fresh = path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    else:
        path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
