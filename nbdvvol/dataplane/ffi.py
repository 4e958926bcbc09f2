"""The only importer of the C extension: `ffi`, `lib`, and `check` for its return values.

`NBDVVOL_NATIVE=path/to/_native.abi3.so` loads another build (the sanitizers')."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

from nbdvvol.dataplane.errors import PlaneError

API_VERSION = 2


def _load() -> ModuleType:
    path = os.environ.get("NBDVVOL_NATIVE")
    if not path:
        return importlib.import_module("nbdvvol.dataplane._native")
    spec = importlib.util.spec_from_file_location("_native", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"NBDVVOL_NATIVE={path}: not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_native = _load()
ffi: Any = _native.ffi
lib: Any = _native.lib

if lib.nv_api_version() != API_VERSION:
    raise ImportError(
        f"the data plane's extension has API version {lib.nv_api_version()}, this Python needs {API_VERSION}: "
        "run `make native`"
    )


def last_error() -> str:
    """The C side's sentence about the last failure in this thread."""
    return str(ffi.string(lib.nv_last_error()).decode("utf-8", "replace"))


def check(result: int) -> int:
    """Pass a non-negative result on; turn -errno into a PlaneError."""
    if result < 0:
        raise PlaneError(-result, last_error() or os.strerror(-result))
    return result
